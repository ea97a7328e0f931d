//! What a build may ask of the kernel: a filter before every system call.
//!
//! Two profiles are compiled from `policy/`, which says in its README what they refuse and why, when this crate is
//! built: a sandbox hands a finished program to the kernel, with one call.

#[cfg(test)]
mod compile;
#[cfg(test)]
mod policy;
#[cfg(test)]
mod tests;

use std::fmt;
use std::str::FromStr;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::sys::statfs::{PROC_SUPER_MAGIC, fstatfs};
use serde::{Deserialize, Serialize};

use crate::sys;

// PARITY and STRICT: instructions for the architecture that this is compiled for.
include!(concat!(env!("OUT_DIR"), "/programs.rs"));

/// What a build is refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Profile {
    /// Little more than in Nix's sandbox: nested sandboxes, debuggers and filters of the build's own work.
    #[default]
    Parity,
    /// What few builds need and attacks on the kernel start from, too: user namespaces, mounts, most kinds of sockets.
    Strict,
}

impl Profile {
    /// All profiles, from the weakest.
    pub const ALL: [Profile; 2] = [Profile::Parity, Profile::Strict];

    fn program(self) -> &'static [libc::sock_filter] {
        match self {
            Profile::Parity => &PARITY,
            Profile::Strict => &STRICT,
        }
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Profile::Parity => "parity",
            Profile::Strict => "strict",
        })
    }
}

/// No profile has this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no profile {0:?}: it is \"parity\" or \"strict\"")]
pub struct UnknownProfile(String);

impl FromStr for Profile {
    type Err = UnknownProfile;

    fn from_str(name: &str) -> Result<Self, UnknownProfile> {
        let found = Self::ALL.into_iter().find(|profile| profile.to_string() == name);
        found.ok_or_else(|| UnknownProfile(name.to_owned()))
    }
}

/// Whether the kernel takes filters that refuse calls with an error number. Changes nothing.
///
/// # Errors
/// `ENOSYS` or `EINVAL` from a kernel without, `EOPNOTSUPP` from one that lacks this kind of refusal, and whatever a
/// sandbox around this process answers that keeps it from calling `seccomp(2)`.
pub fn supported() -> Result<(), Errno> {
    sys::seccomp_action_available(libc::SECCOMP_RET_ERRNO)
}

/// Puts this process, and all that it will start, under the profile for good. It must have `no_new_privs`.
pub(crate) fn install(profile: Profile) -> Result<(), Errno> {
    sys::install_seccomp_filter(profile.program())
}

/// Lets nobody make user namespaces in this one or below it: a second layer under the strict filter.
///
/// This process needs `CAP_SYS_RESOURCE` in its user namespace, whose limit it is that it sees there, see
/// `namespaces(7)`.
pub(crate) fn forbid_user_namespaces() -> Result<(), Errno> {
    let limit =
        open("/proc/sys/user/max_user_namespaces", OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    match fstatfs(&limit)?.filesystem_type() {
        PROC_SUPER_MAGIC => nix::unistd::write(limit, b"0").map(drop),
        // Somebody's idea of a procfs.
        _ => Err(Errno::ENODEV),
    }
}
