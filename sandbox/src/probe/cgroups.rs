//! Control groups (v2): whether builds can have some of their own.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{self, ForkResult, Pid};

use super::Examination;
use super::host::Host;
use super::outcome::{Act, Found, Outcome, Tried, Trouble};
use super::steps::Step;
use super::trial::attempt;

/// What limits of builds are made with.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];

/// Tries them all.
pub fn try_all(examination: &mut Examination, host: &Host) {
    let Some(own) = host.cgroup_dir() else {
        let trouble = Trouble::said("find this process's cgroup (v2)", "there is none to be seen");
        examination.add(Step::Cgroup, Err(trouble));
        examination.add_untried(Step::CgroupControllers, Step::Cgroup);
        examination.add_untried(Step::CgroupKill, Step::Cgroup);
        return;
    };
    examination.add(Step::Cgroup, within(&own, enter));
    if !examination.outcome(Step::Cgroup).is_some_and(Outcome::is_usable) {
        examination.add_untried(Step::CgroupControllers, Step::Cgroup);
        examination.add_untried(Step::CgroupKill, Step::Cgroup);
        return;
    }
    examination.add(Step::CgroupControllers, controllers(&own));
    examination.add(Step::CgroupKill, within(&own, kill));
}

/// Tries something in a new group below `own`, which is removed.
fn within(own: &Path, act: fn(&Path) -> Tried) -> Tried {
    let group = own.join(format!("cofferdam-doctor-{}", std::process::id()));
    let made = group.clone();
    let tried = attempt(|| {
        fs::create_dir(&made).act(&format!("make a cgroup in {}", parent(&made).display()))?;
        act(&made)
    });
    remove(&group);
    tried
}

fn parent(group: &Path) -> PathBuf {
    group.parent().unwrap_or(group).to_owned()
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

fn enter(group: &Path) -> Tried {
    let procs = group.join("cgroup.procs");
    fs::write(procs, "0").act("move a process into a cgroup of its own")?;
    Ok(Found::with(parent(group).display().to_string()))
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

fn controllers(own: &Path) -> Tried {
    let there = fs::read_to_string(own.join("cgroup.controllers")).act("read cgroup.controllers")?;
    let lacking: Vec<&str> = CONTROLLERS
        .into_iter()
        .filter(|name| !there.split_whitespace().any(|there| there == *name))
        .collect();
    match lacking.is_empty() {
        true => Ok(Found::with(CONTROLLERS.join(" "))),
        false => Err(Trouble::said(
            "limit builds by cgroups",
            format!("{} has no {}", own.display(), lacking.join(", ")),
        )),
    }
}
