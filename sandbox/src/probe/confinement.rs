//! What keeps a build from what it should not do.

use std::net::{TcpListener, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::prctl;
use nix::sys::stat::{Mode, fchmod};
use nix::unistd;

use super::outcome::{Act, Found, Tried, Trouble};
use crate::child::{self, confine, privileges};
use crate::ids::{BUILD_GID, BUILD_UID, IdMap};
use crate::plan::Limits;
use crate::seccomp::{self, Profile};
use crate::{landlock, sys};

/// The filters that builds run under, and that they have an effect.
pub fn filters() -> Tried {
    let install = "install a system call filter";
    seccomp::supported().act("ask whether system call filters can refuse calls")?;
    let file = memfd_create(c"cofferdam-doctor", MFdFlags::MFD_CLOEXEC).act("make a memfd")?;
    prctl::set_no_new_privs().act("set no_new_privs")?;
    for profile in Profile::ALL {
        seccomp::install(profile).act(install)?;
        // Every profile refuses to make programs that change whoever runs them.
        match fchmod(&file, Mode::S_ISUID | Mode::S_IRWXU) {
            Err(Errno::EPERM) => {}
            _ => return Err(Trouble::said(install, format!("profile {profile} has no effect"))),
        }
    }
    Ok(Found::default())
}

/// Landlock, and what it holds.
pub fn landlock() -> Tried {
    let version = sys::landlock_abi().act("ask for landlock's version")?;
    let detail = format!("version {version}");
    if version < landlock::ABI_OF_SCOPES {
        let wanted = landlock::ABI_OF_SCOPES;
        let words = format!("its version is {version}, and that takes {wanted} (Linux 6.12)");
        let short = Trouble::said("keep builds off abstract sockets with landlock", words);
        return Ok(Found::but(detail, short));
    }
    let name = format!("cofferdam-doctor-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(name).act("name an abstract socket")?;
    let _listener = UnixListener::bind_addr(&address).act("listen on an abstract socket")?;
    prctl::set_no_new_privs().act("set no_new_privs")?;
    landlock::restrict().act("restrict a process with landlock")?;
    match UnixStream::connect_addr(&address) {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => Ok(Found::with(detail)),
        _ => Err(Trouble::said("keep a process off abstract sockets with landlock", "it has no effect")),
    }
}

/// In a sandbox: user namespaces closed, as the strict profile has it.
pub fn no_user_namespaces() -> Tried {
    confine::forbid_user_namespaces(Some(Profile::Strict))?;
    match unshare(CloneFlags::CLONE_NEWUSER) {
        Err(Errno::ENOSPC) => Ok(Found::default()),
        _ => Err(Trouble::said("forbid user namespaces in a build", "they can still be made")),
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
pub fn resource_limits(ids: &IdMap) -> Tried {
    const LIMITS: Limits = Limits {
        controllers: Vec::new(),
        memory: Some(1 << 30),
        swap: None,
        processes: Some(1000),
        cpu_weight: None,
        file_size: Some(1 << 30),
        shares: Vec::new(),
    };
    privileges::limit(&LIMITS, ids)?;
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
