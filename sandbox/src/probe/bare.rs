//! Steps that are tried as whoever runs the program, before it goes anywhere.

use std::fs;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::personality::{self, Persona};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::sys::stat::Mode as Permissions;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{self, ForkResult, Gid, Pid, Uid};

use super::outcome::{Act, Found, Tried, Trouble};
use super::steps::Step;
use super::trial::attempt;
use super::{Examination, cgroups, confinement, programs};
use crate::sys;

/// Each kind of namespace but the user's.
const NAMESPACES: [(Step, CloneFlags, &str); 6] = [
    (Step::MountNamespace, CloneFlags::CLONE_NEWNS, "make a mount namespace"),
    (Step::PidNamespace, CloneFlags::CLONE_NEWPID, "make a pid namespace"),
    (Step::NetworkNamespace, CloneFlags::CLONE_NEWNET, "make a network namespace"),
    (Step::IpcNamespace, CloneFlags::CLONE_NEWIPC, "make an ipc namespace"),
    (Step::UtsNamespace, CloneFlags::CLONE_NEWUTS, "make a uts namespace"),
    (Step::CgroupNamespace, CloneFlags::CLONE_NEWCGROUP, "make a cgroup namespace"),
];

/// Tries them all.
pub fn try_all(examination: &mut Examination) {
    let host = examination.host.clone();
    examination.add(Step::Kernel, Ok(Found::with(host.kernel.clone())));
    namespaces(examination);
    examination.add(Step::SubIds, programs::subordinate_ids(&host));
    examination.add(Step::IdHelpers, programs::id_helpers(&host));
    examination.add(Step::Pasta, programs::pasta());
    examination.add(Step::Seccomp, attempt(confinement::filters));
    examination.add(Step::Landlock, attempt(confinement::landlock));
    examination.add(Step::Personality, attempt(same_addresses));
    examination.add(Step::ParentDeath, attempt(parent_death));
    examination.add(Step::Pidfd, attempt(pidfd));
    examination.add(Step::CloseRange, attempt(close_range));
    examination.add(Step::Memfd, attempt(memfd));
    examination.add(Step::Kvm, attempt(kvm));
    cgroups::try_all(examination);
}

fn namespaces(examination: &mut Examination) {
    examination.add(Step::UserNamespace, attempt(|| user_namespace().map(|()| Found::default())));
    let usable = examination.outcome(Step::UserNamespace).is_some_and(super::Outcome::is_usable);
    for (step, flag, act) in NAMESPACES {
        match usable {
            true => examination.add(step, attempt(|| namespace(flag, act))),
            false => examination.add_untried(step, Step::UserNamespace),
        }
    }
}

/// A user namespace with the user as its root, as any user may have.
fn user_namespace() -> Result<(), Trouble> {
    let (uid, gid) = (Uid::effective(), Gid::effective());
    unshare(CloneFlags::CLONE_NEWUSER).act("make a user namespace")?;
    fs::write("/proc/self/setgroups", "deny").act("write /proc/self/setgroups")?;
    fs::write("/proc/self/uid_map", format!("0 {uid} 1")).act("write /proc/self/uid_map")?;
    fs::write("/proc/self/gid_map", format!("0 {gid} 1")).act("write /proc/self/gid_map")
}

fn namespace(flag: CloneFlags, act: &str) -> Tried {
    user_namespace()?;
    unshare(flag).act(act)?;
    if flag == CloneFlags::CLONE_NEWPID {
        first_process()?;
    }
    Ok(Found::default())
}

/// The namespace is only there with its first process.
fn first_process() -> Result<(), Trouble> {
    // SAFETY: this process is a copy of one with one thread.
    match unsafe { unistd::fork() }.act("fork in a pid namespace")? {
        ForkResult::Child => {
            let code = if unistd::getpid() == Pid::from_raw(1) { 0 } else { 1 };
            // SAFETY: as in `trial`.
            unsafe { libc::_exit(code) }
        }
        ForkResult::Parent { child } => match waitpid(child, None).act("wait for a process")? {
            WaitStatus::Exited(_, 0) => Ok(()),
            _ => Err(Trouble::said("make a pid namespace", "its first process is not number 1")),
        },
    }
}

fn same_addresses() -> Tried {
    personality::set(Persona::ADDR_NO_RANDOMIZE).act("turn off the randomisation of addresses")?;
    match personality::get().act("read the personality")?.contains(Persona::ADDR_NO_RANDOMIZE) {
        true => Ok(Found::default()),
        false => Err(Trouble::said("turn off the randomisation of addresses", "the call had no effect")),
    }
}

/// A grandchild that is to die with its parent holds a pipe: its end tells.
fn parent_death() -> Tried {
    let (read, write) = unistd::pipe2(OFlag::O_CLOEXEC).act("make a pipe")?;
    let (ready, set) = unistd::pipe2(OFlag::O_CLOEXEC).act("make a pipe")?;
    // SAFETY: this process is a copy of one with one thread.
    match unsafe { unistd::fork() }.act("fork")? {
        ForkResult::Child => {
            let _ = set_child_up(set);
            // Until its child is set up; then it dies, and the child has to follow.
            let _ = unistd::read(&ready, &mut [0]);
            // SAFETY: as in `trial`.
            unsafe { libc::_exit(0) }
        }
        ForkResult::Parent { .. } => drop(write),
    }
    drop(set);
    let mut end = [PollFd::new(std::os::fd::AsFd::as_fd(&read), PollFlags::POLLIN)];
    match poll(&mut end, PollTimeout::from(3000_u16)).act("wait for the end of a process")? {
        0 => Err(Trouble::said("have a child die with its parent", "it lives on")),
        _ => Ok(Found::default()),
    }
}

/// Forks a child that is to die with this process, and waits otherwise.
fn set_child_up(ready: std::os::fd::OwnedFd) -> Result<(), Errno> {
    // SAFETY: this process is a copy of one with one thread.
    if let ForkResult::Child = unsafe { unistd::fork() }? {
        let tied = prctl::set_pdeathsig(Signal::SIGKILL);
        let _ = unistd::write(&ready, &[u8::from(tied.is_ok())]);
        drop(ready);
        loop {
            unistd::pause();
        }
    }
    Ok(())
}

fn pidfd() -> Tried {
    // SAFETY: this process is a copy of one with one thread.
    match unsafe { sys::clone_process(0, None) }.act("make a process with clone3 and a pidfd")? {
        sys::Cloned::Child => loop {
            unistd::pause();
        },
        sys::Cloned::Parent { pid, pidfd } => {
            let pidfd = std::os::fd::AsFd::as_fd(&pidfd);
            sys::pidfd_send_signal(pidfd, libc::SIGKILL).act("send a signal to a pidfd")?;
            let mut end = [PollFd::new(pidfd, PollFlags::POLLIN)];
            let ended = poll(&mut end, PollTimeout::from(3000_u16)).act("wait for a pidfd")?;
            let _ = waitpid(pid, None);
            match ended {
                0 => Err(Trouble::said("wait for a pidfd", "it does not tell the end of its process")),
                _ => Ok(Found::default()),
            }
        }
    }
}

fn close_range() -> Tried {
    let fd = nix::fcntl::open("/dev/null", OFlag::O_RDONLY, Permissions::empty()).act("open /dev/null")?;
    sys::close_range(3, i32::MAX, libc::CLOSE_RANGE_CLOEXEC).act("mark descriptors with close_range")?;
    let flags = fcntl(&fd, FcntlArg::F_GETFD).act("read the flags of a descriptor")?;
    match FdFlag::from_bits_truncate(flags).contains(FdFlag::FD_CLOEXEC) {
        true => Ok(Found::default()),
        false => Err(Trouble::said("mark descriptors with close_range", "the call had no effect")),
    }
}

fn memfd() -> Tried {
    memfd_create(c"cofferdam-doctor", MFdFlags::MFD_CLOEXEC).act("make a memfd").map(|_| Found::default())
}

fn kvm() -> Tried {
    let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC;
    nix::fcntl::open("/dev/kvm", flags, Permissions::empty()).act("open /dev/kvm").map(|_| Found::default())
}
