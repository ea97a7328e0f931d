//! Pid 1 of the sandbox once everything is in place: starts the build, reaps, and tells how it ended.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::RawFd;

use nix::errno::Errno;
use nix::sys::personality::{self, Persona};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{self, ForkResult, Pid};

use super::send;
use crate::plan::{Command, Plan};
use crate::report::{ExitStatus, Report, SetupFailure, Step};
use crate::sabotage::{Layer, kept};
use crate::sys;

/// Where programs without a slash are looked for if the environment does not say: as `execvp(3)` does.
const DEFAULT_PATH: &[u8] = b"/bin:/usr/bin";

/// Runs the build to its end. With this process's own end the kernel kills whatever the build left.
pub fn run(plan: &Plan, report: &File) -> Result<(), SetupFailure> {
    // SAFETY: this process has one thread, like the spawner it is a copy of.
    match unsafe { unistd::fork() } {
        Err(errno) => Err(SetupFailure::new(Step::Fork, errno, "")),
        Ok(ForkResult::Parent { child }) => {
            let status = reap_until(child);
            send(report, &Report::Ended(status));
            Ok(())
        }
        Ok(ForkResult::Child) => {
            let report_of_failure = match become_build(&plan.command) {
                Ok(errno) => Report::NotExecuted { errno: errno as i32 },
                Err(failure) => Report::NotSetUp(failure),
            };
            send(report, &report_of_failure);
            // SAFETY: as in `child::run`.
            unsafe { libc::_exit(127) }
        }
    }
}

/// Waits for the build, and for every orphan that comes before it.
fn reap_until(build: Pid) -> ExitStatus {
    loop {
        match sys::wait() {
            Ok((pid, status)) if pid == build => return status,
            // Nobody else can have reaped it; not to wait for ever is all that is left.
            Err(Errno::ECHILD) => return ExitStatus::Signal(libc::SIGKILL),
            _ => {}
        }
    }
}

/// Becomes the command. Comes back with the reason if that fails.
fn become_build(command: &Command) -> Result<Errno, SetupFailure> {
    // A session of its own: no terminal, no one else's signals.
    if kept(Layer::Session) {
        unistd::setsid().map_err(|errno| SetupFailure::new(Step::Fork, errno, ""))?;
    }
    if kept(Layer::Signals) {
        umask(Mode::from_bits_truncate(0o022));
    }
    // Addresses are the same in every run, as in Nix's sandbox. Some outer sandboxes forbid the call.
    let _ = personality::set(Persona::ADDR_NO_RANDOMIZE);
    let working_dir = std::path::Path::new("/").join(&command.working_dir);
    unistd::chdir(&working_dir)
        .map_err(|errno| SetupFailure::new(Step::WorkingDir, errno, working_dir.display().to_string()))?;
    // The report's pipe is closed by a successful execve, and only by that.
    let last = if kept(Layer::Descriptors) { RawFd::MAX } else { super::LEAKED - 1 };
    sys::close_range(3, last, libc::CLOSE_RANGE_CLOEXEC)
        .map_err(|errno| SetupFailure::new(Step::Streams, errno, ""))?;
    if kept(Layer::Signals) {
        sys::reset_signals();
    }
    Ok(execute(command))
}

/// Executes the command, looking for it as `execvp(3)` does. Yields why that failed.
fn execute(command: &Command) -> Errno {
    let strings = |list: &[Vec<u8>]| {
        list.iter().map(|item| CString::new(item.as_slice())).collect::<Result<Vec<_>, _>>()
    };
    let (Ok(arguments), Ok(environment)) = (strings(&command.arguments), strings(&command.environment))
    else {
        return Errno::EINVAL;
    };
    let mut denied = None;
    for candidate in candidates(command) {
        let Ok(path) = CString::new(candidate) else { return Errno::EINVAL };
        match sys::execve(&path, &arguments, &environment) {
            Errno::ENOENT | Errno::ENOTDIR => {}
            Errno::EACCES => denied = Some(Errno::EACCES),
            other => return other,
        }
    }
    denied.unwrap_or(Errno::ENOENT)
}

/// The paths that may be meant by the command's program, in order.
fn candidates(command: &Command) -> Vec<Vec<u8>> {
    if command.program.contains(&b'/') {
        return vec![command.program.clone()];
    }
    let path = command.environment.iter().find_map(|variable| variable.strip_prefix(b"PATH="));
    path.unwrap_or(DEFAULT_PATH)
        .split(|byte| *byte == b':')
        .map(|dir| match dir {
            b"" => command.program.clone(),
            _ => [dir, b"/", &command.program].concat(),
        })
        .collect()
}
