//! Control groups, version 2: limits that hold for all of a build together, where a subtree is ours to use.
//!
//! ```text
//! BASE                          delegated to this program, or named by its operator
//!   cofferdam-supervisor/       the program itself, out of the way: BASE may hold no processes once it has controllers
//!   cofferdam-builds-PID/       this program's builds; locked as long as it lives
//!     BUILD ID/                 the limits of one build
//!       inner/                  its processes, and the root of its cgroup namespace
//! ```
//!
//! The limits lie a level above what a build could ever be shown: mounting cgroup2 in a namespace of its own it
//! finds `inner`, where no controller is. See `cgroups(7)` and the kernel's `admin-guide/cgroup-v2`.

mod build;
mod find;

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{fmt, fs};

use nix::errno::Errno;
use nix::sys::wait::waitpid;
use serde::{Deserialize, Serialize};

use crate::sys;

pub use build::{BuildCgroup, Readings};
pub use find::{Found, find};

/// What the directories of programs' builds are called, but for the number behind it.
const GROUP_PREFIX: &str = "cofferdam-builds-";
/// Where programs move themselves.
const SUPERVISOR: &str = "cofferdam-supervisor";
/// Where a build's processes are.
const INNER: &str = "inner";
/// How much more the program weighs than a build when processors are short: it serves all builds their inputs.
const SUPERVISOR_CPU_WEIGHT: &str = "1000";
/// How many names are tried for a program's own cgroup.
const CLAIM_ATTEMPTS: u32 = 100;
/// How often, and with which pauses, the program's own cgroup is tried to be removed after it.
const LEAVING_ATTEMPTS: u32 = 20;
const LEAVING_PAUSE: Duration = Duration::from_millis(5);
/// How long dead processes may take to leave a cgroup.
const REMOVAL_PATIENCE: Duration = Duration::from_secs(2);

/// Where limits are to be enforced by cgroups.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// Where the system has given this program a subtree with controllers.
    #[default]
    Auto,
    /// Nowhere.
    Off,
    /// Below this directory of a cgroup2 file system, whoever manages it.
    Path(PathBuf),
}

/// Who looks for a subtree: root may write to all of them, so that this says nothing about whose they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Privilege {
    /// Root, of the host or of a container.
    Root,
    /// An unprivileged user, also in a user namespace of its own.
    User,
}

/// What can be limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Controller {
    /// Memory and swap.
    Memory,
    /// The number of processes and threads.
    Pids,
    /// Time on processors.
    Cpu,
    /// Reading and writing of disks.
    Io,
}

impl Controller {
    const ALL: [Self; 4] = [Self::Memory, Self::Pids, Self::Cpu, Self::Io];

    /// Its name in the files of cgroup2.
    pub fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Pids => "pids",
            Self::Cpu => "cpu",
            Self::Io => "io",
        }
    }
}

/// What of a build is limited, and by what: for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Status {
    /// By cgroups: with these controllers, and below this directory.
    Version2 {
        /// Controllers that limit.
        controllers: Vec<Controller>,
        /// Where.
        at: PathBuf,
    },
    /// By resource limits of single processes alone.
    None {
        /// Why not by cgroups.
        reason: String,
    },
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None { reason } => write!(f, "none: {reason}; {}", Instead(&[])),
            Self::Version2 { controllers, at } => {
                let names: Vec<&str> = controllers.iter().map(|one| one.name()).collect();
                match names.as_slice() {
                    [] => write!(f, "v2: nothing, as {} has no controllers", at.display())?,
                    names => write!(f, "v2: {}", names.join(", "))?,
                }
                match Instead(controllers).to_string().as_str() {
                    "" => Ok(()),
                    instead => write!(f, "; {instead}"),
                }
            }
        }
    }
}

/// What holds where these controllers are all there are.
struct Instead<'a>(&'a [Controller]);

impl fmt::Display for Instead<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [
            (Controller::Pids, "processes and file sizes are limited per build by rlimits"),
            (Controller::Memory, "memory per process only"),
            (Controller::Cpu, "cpu not at all"),
        ];
        let missing = parts.iter().filter(|(controller, _)| !self.0.contains(controller));
        f.write_str(&missing.map(|(_, text)| *text).collect::<Vec<_>>().join(", "))
    }
}

/// A subtree that is this program's. It is removed when this is dropped.
#[derive(Debug)]
pub struct Cgroups {
    path: PathBuf,
    controllers: Vec<Controller>,
    changes: Changes,
    /// Tells others that it is in use.
    _lock: File,
}

/// Something that could not be done with cgroups.
#[derive(Debug, thiserror::Error)]
#[error("can't {act} {path}: {source}")]
pub struct CgroupError {
    /// What was tried, as a verb.
    pub act: &'static str,
    /// On what.
    pub path: PathBuf,
    /// The refusal.
    pub source: io::Error,
}

fn fail(act: &'static str, path: &Path) -> impl Fn(io::Error) -> CgroupError {
    move |source| CgroupError { act, path: path.into(), source }
}

/// What a program has made of the cgroup that it divides.
#[derive(Clone, Debug, Default)]
struct Changes {
    base: PathBuf,
    /// Controllers that were off for its children.
    turned_on: Vec<Controller>,
    /// Whether the program went to [`SUPERVISOR`].
    moved: bool,
}

/// What a program leaves of cgroups, for whoever outlives it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Remains {
    group: PathBuf,
    base: PathBuf,
    turned_on: Vec<Controller>,
    moved: bool,
}

impl Remains {
    /// Removes all of it, moves this process back, and leaves the cgroup that was divided as it was found, unless others
    /// are in there by now. Every process of the program that is alive in the end has to call it.
    ///
    /// # Errors
    /// Where the cgroups of builds can't be removed.
    pub fn clear(&self, others: Others) -> Result<(), CgroupError> {
        remove_tree(&self.group)?;
        for controller in &self.turned_on {
            // Refused where another program's builds are limited by it.
            let _ = write(&self.base, "cgroup.subtree_control", &format!("-{}", controller.name()));
        }
        if self.moved {
            let leaf = self.base.join(SUPERVISOR);
            let back = write(&self.base, "cgroup.procs", &std::process::id().to_string());
            let attempts = match (back, others) {
                (Err(_), _) => 0,
                (Ok(()), Others::None | Others::Stay) => 1,
                (Ok(()), Others::Leaving) => LEAVING_ATTEMPTS,
            };
            for attempt in 0..attempts {
                if attempt > 0 {
                    std::thread::sleep(LEAVING_PAUSE);
                }
                if fs::remove_dir(&leaf).is_ok() {
                    break;
                }
            }
        }
        Ok(())
    }
}

/// Whether other processes of the program are alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Others {
    /// None is.
    None,
    /// They will see to it themselves.
    Stay,
    /// They are dying.
    Leaving,
}

impl Cgroups {
    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What is to be cleared after the program.
    pub fn remains(&self) -> Remains {
        let Changes { base, turned_on, moved } = self.changes.clone();
        Remains { group: self.path.clone(), base, turned_on, moved }
    }

    /// What builds can be limited in.
    pub fn controllers(&self) -> &[Controller] {
        &self.controllers
    }

    /// Makes a directory in `base` that no living program has.
    fn claim(base: &Path) -> Result<(PathBuf, File), CgroupError> {
        let pid = std::process::id();
        // Programs in other pid namespaces may have the same pid.
        for attempt in 0..CLAIM_ATTEMPTS {
            let path = base.join(format!("{GROUP_PREFIX}{pid}-{attempt}"));
            match fs::create_dir(&path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(fail("make the cgroup", &path)(error));
                }
                _ => {}
            }
            let Ok(lock) = File::open(&path) else { continue };
            // It may have been swept between being made and being locked.
            if lock.try_lock().is_ok() && is_at(&lock, &path) {
                return Ok((path, lock));
            }
        }
        Err(fail("make a cgroup in", base)(io::ErrorKind::AlreadyExists.into()))
    }

    /// Makes sure that a process can be started in there, which takes more than writing to its files.
    fn try_out(&self) -> Result<(), CgroupError> {
        let path = self.path.join("probe");
        fs::create_dir(&path).map_err(fail("make the cgroup", &path))?;
        let entered = File::open(&path).and_then(|dir| {
            // SAFETY: `find` demands that the program has one thread.
            match unsafe { sys::clone_process(0, Some(dir.as_fd())) }? {
                // SAFETY: ends the copy at once; nothing of the program may run in it.
                sys::Cloned::Child => unsafe { libc::_exit(0) },
                sys::Cloned::Parent { pid, .. } => Ok(waitpid(pid, None).map(drop)?),
            }
        });
        let removed = remove_dir(&path);
        entered.map_err(fail("start a process in the cgroup", &path))?;
        removed
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        // The spawner has been here before, if there was one; the next start tries again.
        let _ = self.remains().clear(Others::None);
    }
}

/// Whether `path` still leads to `file`.
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (file.metadata(), fs::metadata(path)) {
        (Ok(open), Ok(found)) => (open.dev(), open.ino()) == (found.dev(), found.ino()),
        _ => false,
    }
}

/// Removes what programs that are dead have left in `base`.
fn sweep(base: &Path) {
    for name in children(base) {
        let path = base.join(&name);
        if name.starts_with(GROUP_PREFIX)
            && let Ok(dir) = File::open(&path)
            && dir.try_lock().is_ok()
        {
            // What can't be removed is in nobody's way.
            let _ = remove_tree(&path);
        }
    }
}

/// Kills whatever lives in a cgroup or below it, and removes it with all below it. That it isn't there is fine.
///
/// # Errors
/// Where it can't be removed, though processes were given two seconds to die.
pub fn remove_tree(path: &Path) -> Result<(), CgroupError> {
    if !path.exists() {
        return Ok(());
    }
    kill_all(path);
    remove_quiet_tree(path)
}

fn remove_quiet_tree(path: &Path) -> Result<(), CgroupError> {
    // A few levels are all there can be: builds can't make any.
    for name in children(path) {
        remove_quiet_tree(&path.join(name))?;
    }
    remove_dir(path)
}

/// Removes a cgroup whose processes are dead or about to be.
fn remove_dir(path: &Path) -> Result<(), CgroupError> {
    let deadline = Instant::now() + REMOVAL_PATIENCE;
    let mut pause = Duration::from_micros(100);
    loop {
        match fs::remove_dir(path) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {}
            Err(error) => return Err(fail("remove the cgroup", path)(error)),
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// Kills every process in a cgroup and below it.
fn kill_all(path: &Path) {
    // Since Linux 5.14.
    if write(path, "cgroup.kill", "1").is_ok() {
        return;
    }
    for name in children(path) {
        kill_all(&path.join(name));
    }
    let killed = |pid: &i32| {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(*pid), nix::sys::signal::Signal::SIGKILL);
    };
    // 0 stands for those of another pid namespace; to `kill` it would mean this program's own group.
    pids(path).iter().filter(|pid| **pid > 0).for_each(killed);
}

/// The processes in a cgroup itself. Those of another pid namespace are 0.
fn pids(path: &Path) -> Vec<i32> {
    let list = read(path, "cgroup.procs").unwrap_or_default();
    list.lines().filter_map(|line| line.parse().ok()).collect()
}

/// The names of the cgroups in a cgroup.
fn children(path: &Path) -> Vec<String> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}

fn read(dir: &Path, file: &str) -> io::Result<String> {
    let mut text = String::new();
    File::open(dir.join(file))?.read_to_string(&mut text)?;
    Ok(text)
}

/// Writes to a file that is there: a missing one means that the kernel lacks what it is for.
fn write(dir: &Path, file: &str, value: &str) -> io::Result<()> {
    OpenOptions::new().write(true).open(dir.join(file))?.write_all(value.as_bytes())
}

/// Whether this says that a file isn't there.
fn is_missing(error: &io::Error) -> bool {
    matches!(error.raw_os_error().map(Errno::from_raw), Some(Errno::ENOENT))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_says_what_is_limited_and_what_is_not() {
        let at = PathBuf::from("/sys/fs/cgroup/x");
        let cases = [
            (
                Status::Version2 { controllers: Controller::ALL.into(), at: at.clone() },
                "v2: memory, pids, cpu, io",
            ),
            (
                Status::Version2 { controllers: vec![Controller::Pids], at: at.clone() },
                "v2: pids; memory per process only, cpu not at all",
            ),
            (
                Status::Version2 { controllers: vec![], at },
                "v2: nothing, as /sys/fs/cgroup/x has no controllers; processes and file sizes are limited per build by \
                 rlimits, memory per process only, cpu not at all",
            ),
            (
                Status::None { reason: "it was turned off".into() },
                "none: it was turned off; processes and file sizes are limited per build by rlimits, memory per process \
                 only, cpu not at all",
            ),
        ];
        for (status, text) in cases {
            assert_eq!(status.to_string(), text);
        }
    }
}
