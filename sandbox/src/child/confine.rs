//! What the sandbox's processes may no longer ask of the kernel.

use nix::errno::Errno;

use crate::plan::Landlock;
use crate::report::{SetupFailure, Step};
use crate::ucounts::Share;
use crate::{landlock, seccomp, ucounts};

/// Closes user namespaces to the build where its profile refuses them: should the filter have a hole, there is nothing
/// behind it. While this process is root here, and before anything may lie over parts of /proc.
pub fn forbid_user_namespaces(profile: Option<seccomp::Profile>) -> Result<(), SetupFailure> {
    match profile {
        Some(seccomp::Profile::Strict) => {
            seccomp::forbid_user_namespaces().map_err(failure(Step::ForbidUserNamespaces))
        }
        Some(seccomp::Profile::Parity) | None => Ok(()),
    }
}

/// Leaves other builds what the kernel counts per user. Under the same conditions.
pub fn share(shares: &[Share]) -> Result<(), SetupFailure> {
    ucounts::limit(shares).map_err(failure(Step::Limits))
}

/// Keeps the outside's abstract sockets and processes from this process and all that follow.
pub fn restrict(landlock: Landlock) -> Result<(), SetupFailure> {
    match landlock {
        Landlock::Scoped => landlock::restrict().map_err(failure(Step::Landlock)),
        Landlock::Off => Ok(()),
    }
}

/// Puts this process and all that follow under the filter.
pub fn filter(profile: Option<seccomp::Profile>) -> Result<(), SetupFailure> {
    profile.map_or(Ok(()), |profile| seccomp::install(profile).map_err(failure(Step::Seccomp)))
}

fn failure(step: Step) -> impl Fn(Errno) -> SetupFailure {
    move |errno| SetupFailure::new(step, errno, "")
}
