//! The process that connects a sandbox to the network, before it is pasta: a flat list of steps, as for a sandbox's own
//! first process.
//!
//! What comes from the build is taken apart by pasta, so it must be of no use to a build that gets hold of it. It becomes
//! the root of the build's own user namespace, which is nobody on the host, before it is executed; of the host it keeps the
//! network alone. Then pasta itself moves to an empty file system, gives up what it no longer needs, and allows itself few
//! system calls.

use std::ffi::CString;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::panic::AssertUnwindSafe;

use caps::{CapSet, Capability};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::sys::stat::{Mode, umask};

use super::privileges;
use crate::ids::IdMap;
use crate::sys;

/// What the process is given by the spawner.
pub struct Place<'a> {
    /// The ids of the sandbox.
    pub ids: &'a IdMap,
    /// The sandbox's first process.
    pub sandbox: BorrowedFd<'a>,
    /// The sandbox's network namespace.
    pub network: OwnedFd,
    /// The writing end of a pipe that takes something when everything is in place.
    pub ready: OwnedFd,
    /// Takes words for people.
    pub said: OwnedFd,
}

/// What pasta starts with where it is not root: what it keeps for itself at first where it is.
const CAPABILITIES: [Capability; 6] = [
    Capability::CAP_NET_ADMIN,
    Capability::CAP_NET_BIND_SERVICE,
    Capability::CAP_SETGID,
    Capability::CAP_SETPCAP,
    Capability::CAP_SETUID,
    Capability::CAP_SYS_ADMIN,
];

/// Becomes `program` and never comes back.
pub fn run(program: Option<CString>, arguments: &[CString], place: Place<'_>) -> ! {
    // A panic must end here, as in `child::run`.
    let _ = std::panic::catch_unwind(AssertUnwindSafe(|| {
        if let Err(Failed { act, errno }) = become_pasta(program, arguments, place) {
            say(format_args!("can't {act}: {errno}"));
        }
    }));
    // SAFETY: ends the process at once. Nothing of this copy of the spawner may run any further.
    unsafe { libc::_exit(127) }
}

/// Words for the spawner, which are all that it will know.
fn say(what: fmt::Arguments<'_>) {
    use std::io::Write;
    let _ = write!(std::io::stderr(), "{what}");
}

/// What could not be done, and why.
struct Failed {
    act: &'static str,
    errno: Errno,
}

fn cannot(act: &'static str) -> impl Fn(Errno) -> Failed {
    move |errno| Failed { act, errno }
}

fn become_pasta(program: Option<CString>, arguments: &[CString], place: Place<'_>) -> Result<(), Failed> {
    let Place { ids, sandbox, network, ready, said } = place;
    // First, so that the rest can be told.
    arrange(network, ready, said).map_err(cannot("put the standard streams in place"))?;
    setns(sandbox, CloneFlags::CLONE_NEWUSER).map_err(cannot("join the sandbox's user namespace"))?;
    sys::close_range(3, RawFd::MAX, 0).map_err(cannot("close descriptors"))?;
    umask(Mode::from_bits_truncate(0o077));
    privileges::leave_keyring().map_err(|failure| Failed {
        act: "join a keyring of its own",
        errno: Errno::from_raw(failure.errno),
    })?;
    privileges::become_root(ids).map_err(|failure| Failed {
        act: "become the sandbox's root",
        errno: Errno::from_raw(failure.errno),
    })?;
    if !ids.has_root {
        keep_capabilities().map_err(cannot("keep capabilities"))?;
    }
    prctl::set_no_new_privs().map_err(cannot("set no_new_privs"))?;
    sys::install_seccomp_filter(&NO_UNIX_SOCKETS).map_err(cannot("forbid unix sockets"))?;
    // After the last change of ids, which clears it.
    die_with_spawner().map_err(cannot("tie it to the spawner"))?;
    // Older versions take it for an error if one is ignored that they want to ignore.
    sys::reset_signals();
    let program = program.ok_or(Failed { act: "execute pasta", errno: Errno::EINVAL })?;
    Err(Failed { act: "execute pasta", errno: sys::execve(&program, arguments, &[]) })
}

/// The namespace is standard input: newer versions of pasta close every descriptor but the standard ones.
fn arrange(network: OwnedFd, ready: OwnedFd, said: OwnedFd) -> Result<(), Errno> {
    // Out of the way first, so that none is overwritten before it is placed.
    let lift = |fd: OwnedFd| fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(10));
    let lifted = [lift(network)?, lift(ready)?, lift(said)?];
    (0..).zip(lifted).try_for_each(|(target, fd)| sys::place_fd(fd, target))
}

/// Keeps across `execve` what only root keeps by itself.
fn keep_capabilities() -> Result<(), Errno> {
    let wanted = CAPABILITIES.into_iter().collect();
    for set in [CapSet::Inheritable, CapSet::Ambient] {
        caps::set(None, set, &wanted).map_err(|_| Errno::last())?;
    }
    Ok(())
}

/// Makes this process end when the spawner does.
fn die_with_spawner() -> Result<(), Errno> {
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    // It may have ended before that. Then nobody reads from the pipe any more.
    let stdout = std::io::stdout();
    let mut read = [PollFd::new(stdout.as_fd(), PollFlags::empty())];
    poll(&mut read, PollTimeout::ZERO)?;
    match read.iter().all(|fd| fd.revents().is_some_and(|events| !events.contains(PollFlags::POLLERR))) {
        true => Ok(()),
        false => Err(Errno::EPIPE),
    }
}

/// Refuses unix sockets, by which pasta could reach abstract ones of the host: it shares the host's network namespace.
/// It has one use for them, the system's log.
static NO_UNIX_SOCKETS: [libc::sock_filter; 10] = {
    // Where struct seccomp_data has the number of the call, the architecture, and the first argument's lower half.
    const NUMBER: u32 = 0;
    const ARCHITECTURE: u32 = 4;
    const FIRST_ARGUMENT: u32 = if cfg!(target_endian = "little") { 16 } else { 20 };
    // From linux/audit.h.
    const NATIVE: u32 = if cfg!(target_arch = "x86_64") { 0xC000_003E } else { 0xC000_00B7 };
    // Numbers from here on are x32's, on x86_64; there are none elsewhere.
    const X32: u32 = 0x4000_0000;
    const REFUSED: u32 = libc::SECCOMP_RET_ERRNO | libc::EAFNOSUPPORT as u32;
    const FOREIGN: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;
    [
        load(ARCHITECTURE),
        branch(libc::BPF_JEQ, NATIVE, 0, 7),
        load(NUMBER),
        branch(libc::BPF_JGE, X32, 5, 0),
        branch(libc::BPF_JEQ, libc::SYS_socket as u32, 0, 3),
        load(FIRST_ARGUMENT),
        branch(libc::BPF_JEQ, libc::AF_UNIX as u32, 0, 1),
        answer(REFUSED),
        answer(libc::SECCOMP_RET_ALLOW),
        answer(FOREIGN),
    ]
};

const fn load(offset: u32) -> libc::sock_filter {
    instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset)
}

/// Goes on `yes` or `no` instructions after the next one.
const fn branch(comparison: u32, with: u32, yes: u8, no: u8) -> libc::sock_filter {
    instruction(libc::BPF_JMP | comparison | libc::BPF_K, yes, no, with)
}

const fn answer(with: u32) -> libc::sock_filter {
    instruction(libc::BPF_RET | libc::BPF_K, 0, 0, with)
}

const fn instruction(code: u32, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt, jf, k }
}

#[cfg(test)]
mod tests {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, fork};

    use super::*;

    #[test]
    fn unix_sockets_alone_are_refused() {
        // SAFETY: the child makes system calls and nothing else, and ends with one.
        match unsafe { fork() }.unwrap() {
            ForkResult::Child => {
                let kind = |family| socket(family, SockType::Datagram, SockFlag::empty(), None).map(drop);
                let refused = prctl::set_no_new_privs()
                    .and_then(|()| kind(AddressFamily::Unix))
                    .and_then(|()| sys::install_seccomp_filter(&NO_UNIX_SOCKETS))
                    .and_then(|()| kind(AddressFamily::Inet))
                    .map(|()| kind(AddressFamily::Unix) == Err(Errno::EAFNOSUPPORT));
                // SAFETY: ends the process at once.
                unsafe { libc::_exit(if refused == Ok(true) { 0 } else { 1 }) }
            }
            ForkResult::Parent { child } => {
                assert_eq!(waitpid(child, None), Ok(WaitStatus::Exited(child, 0)));
            }
        }
    }
}
