//! Control groups (v2): whether builds can have some of their own, and be limited by them.

use std::fs;
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{self, ForkResult, Pid, Uid};

use super::Examination;
use super::outcome::{Act, Found, Tried, Trouble};
use super::steps::Step;
use super::trial::attempt;
use crate::cgroup::{self, Cgroups, Choice, Controller, Privilege, Status};

/// What limits of builds are made with, and a file of each that takes one.
const LIMITS: [(Controller, &str, &str); 3] = [
    (Controller::Cpu, "cpu.weight", "50"),
    (Controller::Memory, "memory.max", "1073741824"),
    (Controller::Pids, "pids.max", "100"),
];

/// Tries them all, in the subtree that a worker would use, which is left as it was.
///
/// In this process and not in one of its own: it is this one that has to make room.
pub fn try_all(examination: &mut Examination) {
    let privilege = if Uid::effective().is_root() { Privilege::Root } else { Privilege::User };
    let trouble = match cgroup::find(&Choice::Auto, privilege) {
        Ok(cgroup::Found { cgroups: Some(cgroups), .. }) => {
            examination.add(Step::Cgroup, Ok(Found::with(cgroups.path().display().to_string())));
            examination.add(Step::CgroupControllers, controllers(&cgroups));
            examination.add(Step::CgroupKill, within(&cgroups, kill));
            return;
        }
        Ok(cgroup::Found { status: Status::None { reason }, .. }) => Trouble::said(FIND, reason),
        Ok(cgroup::Found { status, .. }) => Trouble::said(FIND, status.to_string()),
        Err(error) => Trouble::io(format!("{} {}", error.act, error.path.display()), &error.source),
    };
    examination.add(Step::Cgroup, Err(trouble));
    examination.add_untried(Step::CgroupControllers, Step::Cgroup);
    examination.add_untried(Step::CgroupKill, Step::Cgroup);
}

const FIND: &str = "use cgroups";

/// Tries something in a new group of the program's, which is removed.
fn within(cgroups: &Cgroups, act: fn(&Path) -> Tried) -> Tried {
    let group = cgroups.path().join("doctor");
    let tried = attempt(|| {
        fs::create_dir(&group).act("make a cgroup")?;
        act(&group)
    });
    remove(&group);
    tried
}

/// A group with limits, as far as there are controllers.
fn controllers(cgroups: &Cgroups) -> Tried {
    let has = cgroups.controllers();
    let names = has.iter().map(|one| one.name()).collect::<Vec<_>>().join(" ");
    let lacking: Vec<&str> =
        LIMITS.iter().filter(|(one, ..)| !has.contains(one)).map(|(one, ..)| one.name()).collect();
    if !lacking.is_empty() {
        let short = Trouble::said("limit builds by cgroups", format!("there is no {}", lacking.join(", ")));
        return if has.is_empty() { Err(short) } else { Ok(Found::but(names, short)) };
    }
    within(cgroups, |group| {
        for (_, file, limit) in LIMITS {
            fs::write(group.join(file), limit).act(&format!("write {file}"))?;
        }
        Ok(Found::default())
    })
    .map(|_| Found::with(names))
}

/// A group is busy until the last of its processes is reaped, which may not be ours to do.
fn remove(group: &Path) {
    for _ in 0..50 {
        match fs::remove_dir(group) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                std::thread::sleep(Duration::from_millis(10));
            }
            _ => return,
        }
    }
}

/// A process in a group of its own, killed with the group.
fn kill(group: &Path) -> Tried {
    // SAFETY: this process is a copy of one with one thread.
    let child = match unsafe { unistd::fork() }.act("fork")? {
        ForkResult::Child => loop {
            unistd::pause();
        },
        ForkResult::Parent { child } => child,
    };
    let killed = kill_group(group, child).and_then(|()| dies(child));
    // Where that went wrong, it is still there.
    let _ = nix::sys::signal::kill(child, Signal::SIGKILL);
    let _ = waitpid(child, None);
    killed.map(|()| Found::default())
}

/// Waits for the end that the group's should bring.
fn dies(child: Pid) -> Result<(), Trouble> {
    for _ in 0..200 {
        match waitpid(child, Some(WaitPidFlag::WNOHANG)).act("wait for a process")? {
            WaitStatus::StillAlive => std::thread::sleep(Duration::from_millis(10)),
            _ => return Ok(()),
        }
    }
    Err(Trouble::said("kill a cgroup", "its process lives on"))
}

fn kill_group(group: &Path, child: Pid) -> Result<(), Trouble> {
    fs::write(group.join("cgroup.procs"), child.to_string())
        .act("move a process into a cgroup of its own")?;
    fs::write(group.join("cgroup.kill"), "1").act("write cgroup.kill")
}
