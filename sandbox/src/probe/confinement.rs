//! What keeps a build from what it should not do.

use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::unistd;

use super::outcome::{Act, Found, Tried, Trouble};
use super::raw;
use crate::child::{self, privileges};
use crate::ids::{BUILD_GID, BUILD_UID};
use crate::sys;

/// The version of landlock that keeps processes off abstract sockets and each other.
const LANDLOCK_SCOPES: u32 = 6;

/// A system call filter that has an effect.
pub fn seccomp() -> Tried {
    prctl::set_no_new_privs().act("set no_new_privs")?;
    for (action, name) in [
        (libc::SECCOMP_RET_ERRNO, "answering with an error"),
        (libc::SECCOMP_RET_KILL_PROCESS, "killing the process"),
    ] {
        raw::seccomp_knows(action).act(&format!("have system call filters act by {name}"))?;
    }
    let install = "install a system call filter";
    raw::seccomp_refuse_getppid(Errno::ENOMSG).act(install)?;
    match raw::getppid() {
        Err(Errno::ENOMSG) => Ok(Found::default()),
        _ => Err(Trouble::said(install, "it has no effect")),
    }
}

/// Landlock, and what it holds.
pub fn landlock() -> Tried {
    let version = raw::landlock_version().act("ask for landlock's version")?;
    let detail = format!("version {version}");
    if version < LANDLOCK_SCOPES {
        let short = Trouble::said(
            "keep builds off abstract sockets with landlock",
            format!("its version is {version}, and that takes {LANDLOCK_SCOPES} (Linux 6.12)"),
        );
        return Ok(Found::but(detail, short));
    }
    let name = format!("cofferdam-doctor-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(name).act("name an abstract socket")?;
    let _listener = UnixListener::bind_addr(&address).act("listen on an abstract socket")?;
    prctl::set_no_new_privs().act("set no_new_privs")?;
    let ruleset = raw::landlock_scopes().act("make a landlock ruleset")?;
    raw::landlock_restrict(ruleset.as_fd()).act("restrict a process with landlock")?;
    match UnixStream::connect_addr(&address) {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => Ok(Found::with(detail)),
        _ => Err(Trouble::said("keep a process off abstract sockets with landlock", "it has no effect")),
    }
}

/// In a sandbox: loopback up, and a connection over it.
pub fn loopback() -> Tried {
    sys::loopback_up().act("bring up loopback")?;
    let listener = TcpListener::bind(("127.0.0.1", 0)).act("listen on 127.0.0.1")?;
    let address = listener.local_addr().act("listen on 127.0.0.1")?;
    TcpStream::connect(address).act("connect to 127.0.0.1").map(|_| Found::default())
}

/// In a sandbox: its names.
pub fn host_name() -> Tried {
    child::set_names()?;
    let name = unistd::gethostname().act("read the host name")?;
    match name == "localhost" {
        true => Ok(Found::default()),
        false => Err(Trouble::said("set the host name", "the call had no effect")),
    }
}

/// In a sandbox: a session keyring.
pub fn keyring() -> Tried {
    match sys::join_new_session_keyring() {
        Ok(()) => Ok(Found::default()),
        Err(Errno::ENOSYS) => {
            Ok(Found::with("the kernel or an outer sandbox has no keyrings: nothing to hide"))
        }
        Err(Errno::EPERM) => Ok(Found::with("an outer sandbox forbids keyrings: nothing to hide")),
        Err(errno) => Err(Trouble::errno("join a session keyring", errno)),
    }
}

/// In a sandbox: limits of a build.
pub fn resource_limits() -> Tried {
    privileges::limit()?;
    Ok(Found::default())
}

/// In a sandbox: the state that a build starts in.
pub fn drop_privileges() -> Tried {
    privileges::drop_all()?;
    let failed =
        |what: &str| Err(Trouble::said("give up privileges", format!("{what} after all calls went well")));
    if (unistd::getuid().as_raw(), unistd::getgid().as_raw()) != (BUILD_UID, BUILD_GID) {
        return failed("the ids are others");
    }
    for set in
        [caps::CapSet::Effective, caps::CapSet::Permitted, caps::CapSet::Inheritable, caps::CapSet::Ambient]
    {
        if caps::read(None, set).is_ok_and(|left| !left.is_empty()) {
            return failed("capabilities are left");
        }
    }
    match prctl::get_no_new_privs().act("read no_new_privs")? {
        true => Ok(Found::default()),
        false => failed("no_new_privs is not set"),
    }
}

/// In a sandbox: what a build does that sandboxes a part of itself.
pub fn nested_namespaces() -> Tried {
    privileges::drop_all()?;
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS)
        .act("make user and mount namespaces in a build")
        .map(|()| Found::default())
}

/// In a sandbox: no supplementary groups.
pub fn drop_groups() -> Result<(), Trouble> {
    unistd::setgroups(&[]).act("drop supplementary groups")
}
