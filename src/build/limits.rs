//! What builds may use: of memory and processes, which the sandbox limits, and of the disk, which is watched here.
//!
//! A disk without quotas knows no limit of a whole directory. So a build's scratch space is walked again and again, with
//! pauses a hundred times as long as a walk takes. Between two walks, and with files that have no name any more, a build
//! can go beyond its limit: the floor of free space is what keeps the disk from filling up.

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cofferdam_sandbox::cgroup::{Cgroups, Readings};
use cofferdam_sandbox::measure::{Usage, Walk, measure};
use cofferdam_sandbox::{ExitStatus, Limits, Report, TmpfsSize, ucounts};
use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::statvfs::fstatvfs;
use nix::sys::sysinfo::sysinfo;

use super::Stop;
use super::error::{Cause, LimitReached, WorkerError, WorkerPart};
use crate::config::{Floor, LimitSettings};
use crate::lock::lock;
use crate::size::Size;

/// How often the disk is looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// How much longer than a walk the pause after it is at least, so that walking takes 1 % of the time.
const PAUSE_FACTOR: u32 = 100;
/// How long a build that was ended for the sake of the disk may take to give its space back.
const CLEARING_PATIENCE: Duration = Duration::from_secs(5);
/// How long each build is measured to find the one that uses most.
const COMPARING_PATIENCE: Duration = Duration::from_secs(2);
/// How long a failed build's files are looked through for one that has reached the limit.
const FINDING_PATIENCE: Duration = Duration::from_secs(2);

/// Bytes of a scratch limit for each inode that comes with it. Sources and packages have 5 KB and more a file.
const SCRATCH_BYTES_PER_INODE: u64 = 4096;
/// Inodes that come with any scratch limit.
const SCRATCH_INODES_MIN: u64 = 65_536;
/// Inodes of `/dev/shm`: each takes about 1 KiB of the kernel's memory beside its contents.
const SHM_INODES: u64 = 65_536;

/// The share of a disk that is kept free unless it is chosen: 2 %, but no more than 1 GiB and 10 000 inodes.
const FLOOR_PARTS: u64 = 50;
const FLOOR_MAX_BYTES: u64 = 1 << 30;
const FLOOR_MAX_INODES: u64 = 10_000;

/// The most and the fewest processes that each build may have by default.
const PROCESSES_MAX: u64 = 16_384;
const PROCESSES_MIN: u64 = 512;

/// What each build of a worker may use.
#[derive(Clone, Debug)]
pub struct Budget {
    /// What the sandbox limits.
    pub limits: Limits,
    /// `/dev/shm`.
    pub shm: TmpfsSize,
    /// Files on disk together.
    pub scratch: Option<ScratchBudget>,
}

/// How much the files of a build may take on disk together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScratchBudget {
    bytes: u64,
    inodes: u64,
}

impl Budget {
    /// What settings come to on this machine.
    pub fn new(settings: &LimitSettings, max_builds: NonZeroUsize, cgroups: Option<&Cgroups>) -> Self {
        let memory = settings.memory.map(|Size(bytes)| bytes);
        // A machine that can't tell its memory has enough for the limit.
        let ram = sysinfo().map_or(u64::MAX, |info| info.ram_total());
        Self {
            limits: Limits {
                controllers: cgroups.map(|cgroups| cgroups.controllers().to_vec()).unwrap_or_default(),
                memory,
                // Memory that is limited is not to be made up for by a slow disk.
                swap: memory.map(|_| 0),
                processes: Some(settings.processes.unwrap_or_else(|| default_processes(max_builds))),
                cpu_weight: None,
                file_size: settings.scratch.map(|Size(bytes)| bytes),
                shares: ucounts::shares(max_builds.get()),
            },
            shm: TmpfsSize { bytes: settings.shm.of(ram.min(memory.unwrap_or(ram))), inodes: SHM_INODES },
            scratch: settings.scratch.map(|Size(bytes)| ScratchBudget {
                bytes,
                inodes: (bytes / SCRATCH_BYTES_PER_INODE).max(SCRATCH_INODES_MIN),
            }),
        }
    }

    /// The limits that the end of a build has to do with.
    pub fn reached(&self, report: &Report, readings: &Readings, longest_file: u64) -> Reached {
        let by_signal = match report {
            Report::Ended(ExitStatus::Signal(signal)) => *signal == libc::SIGXFSZ,
            // As a shell tells of it.
            Report::Ended(ExitStatus::Code(code)) => *code == 128 + libc::SIGXFSZ,
            _ => false,
        };
        let file = |limit: &u64| by_signal || longest_file >= *limit;
        Reached {
            out_of_memory: (readings.oom_kills > 0).then_some(self.limits.memory),
            other: match (self.limits.file_size.filter(file), self.limits.processes) {
                (Some(limit), _) => Some(LimitReached::FileSize(limit)),
                (None, Some(limit)) if readings.processes_refused > 0 => Some(LimitReached::Processes(limit)),
                (None, _) => None,
            },
        }
    }
}

/// Limits that the end of a build has to do with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reached {
    /// It was killed because memory was short: its own, if that is limited.
    pub out_of_memory: Option<Option<u64>>,
    /// What it was refused, and may have failed for.
    pub other: Option<LimitReached>,
}

/// A fair part of half of the processes that this machine, or this user, may have.
fn default_processes(max_builds: NonZeroUsize) -> u64 {
    let number = |file| std::fs::read_to_string(file).ok()?.trim().parse::<u64>().ok();
    let machine = [number("/proc/sys/kernel/pid_max"), number("/proc/sys/kernel/threads-max")];
    let user = getrlimit(Resource::RLIMIT_NPROC).ok().map(|(soft, _)| soft);
    let all = machine.into_iter().chain([user]).flatten().min().unwrap_or(u64::MAX);
    (all / 2 / max_builds.get() as u64).clamp(PROCESSES_MIN, PROCESSES_MAX)
}

/// The disk that all builds write to.
#[derive(Debug)]
pub struct Disk {
    dir: Arc<OwnedFd>,
    path: PathBuf,
    floor: Floor,
    roll: Mutex<Roll>,
}

/// The builds that write to a disk.
#[derive(Debug, Default)]
struct Roll {
    count: u64,
    builds: BTreeMap<u64, Entry>,
    /// Until then the space that the last ended build gives back is waited for.
    quiet_until: Option<Instant>,
}

#[derive(Debug)]
struct Entry {
    dir: Arc<OwnedFd>,
    /// Why this build is to end, so that others can go on.
    ended_for: Option<DiskLow>,
}

/// Less is free on the scratch disk than there is to be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{free} left on the disk of {}, and {floor} are to stay free (see --min-free); this build was ended because it uses \
     most, {used}", .path.display()
)]
pub struct DiskLow {
    /// What is left.
    pub free: Amount,
    /// What is to stay.
    pub floor: Amount,
    /// What the build that is ended for it has.
    pub used: Size,
    /// A directory on the disk.
    pub path: PathBuf,
}

/// An amount of what disks have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Amount {
    /// Space.
    Bytes(Size),
    /// Files and directories.
    Inodes(u64),
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes(size) => size.fmt(f),
            Self::Inodes(number) => write!(f, "{number} inodes"),
        }
    }
}

impl Disk {
    /// The disk of a directory.
    pub fn new(dir: Arc<OwnedFd>, path: PathBuf, floor: Floor) -> Self {
        Self { dir, path, floor, roll: Mutex::default() }
    }

    /// What is free, and should be more; `None` where there is enough. A disk that can't tell has enough.
    fn shortage(&self) -> Option<(Amount, Amount)> {
        let found = fstatvfs(&self.dir).ok()?;
        let block = found.fragment_size();
        let total = found.blocks().saturating_mul(block);
        let floor = match self.floor {
            Floor::None => return None,
            Floor::Share => (total / FLOOR_PARTS).min(FLOOR_MAX_BYTES),
            Floor::Size(Size(bytes)) => bytes,
        };
        // What is free for all but root.
        let free = found.blocks_available().saturating_mul(block);
        if free < floor {
            return Some((Amount::Bytes(Size(free)), Amount::Bytes(Size(floor))));
        }
        // Some file systems have no fixed number of them, and say that there are none.
        let floor = (found.files() / FLOOR_PARTS).min(FLOOR_MAX_INODES);
        let free = found.files_available();
        (free < floor).then_some((Amount::Inodes(free), Amount::Inodes(floor)))
    }

    /// Chooses the build that uses most to end, if none is about to give its space back. It blocks.
    fn make_room(&self, (free, floor): (Amount, Amount)) {
        let builds: Vec<_> = {
            let mut roll = lock(&self.roll);
            if roll.quiet_until.is_some_and(|until| Instant::now() < until) {
                return;
            }
            let patience = COMPARING_PATIENCE * u32::try_from(roll.builds.len()).unwrap_or(u32::MAX);
            roll.quiet_until = Instant::now().checked_add(patience.saturating_add(CLEARING_PATIENCE));
            roll.builds.iter().map(|(number, entry)| (*number, Arc::clone(&entry.dir))).collect()
        };
        let used = |dir: &OwnedFd| {
            usage(dir, COMPARING_PATIENCE, &AtomicBool::new(false)).map_or(0, |usage| usage.bytes)
        };
        let most = builds.iter().map(|(number, dir)| (used(dir), *number)).max();
        let mut roll = lock(&self.roll);
        roll.quiet_until = Instant::now().checked_add(CLEARING_PATIENCE);
        if let Some((used, number)) = most
            && let Some(entry) = roll.builds.get_mut(&number)
        {
            entry.ended_for = Some(DiskLow { free, floor, used: Size(used), path: self.path.clone() });
        }
    }

    /// Watches over a build whose files lie in `dir`, for as long as the result lives.
    pub fn watch(self: &Arc<Self>, dir: Arc<OwnedFd>, budget: Option<ScratchBudget>) -> Watch {
        let mut roll = lock(&self.roll);
        roll.count += 1;
        let number = roll.count;
        roll.builds.insert(number, Entry { dir: Arc::clone(&dir), ended_for: None });
        Watch { disk: Arc::clone(self), number, dir, budget, dropped: Arc::default() }
    }
}

/// Watches what a build has on disk.
#[derive(Debug)]
pub struct Watch {
    disk: Arc<Disk>,
    number: u64,
    dir: Arc<OwnedFd>,
    budget: Option<ScratchBudget>,
    /// Ends a walk that is under way.
    dropped: Arc<AtomicBool>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.dropped.store(true, Ordering::Relaxed);
        lock(&self.disk.roll).builds.remove(&self.number);
    }
}

impl Watch {
    /// Waits until the build must end for what it has on disk.
    ///
    /// # Cancel safety
    /// Nothing is lost by dropping the future.
    pub async fn excess(&self) -> Stop {
        let mut next_walk = Instant::now();
        loop {
            tokio::time::sleep(LOOK_INTERVAL).await;
            if let Some(stop) = self.ended_for() {
                return stop;
            }
            let disk = Arc::clone(&self.disk);
            let looked = super::blocking(move || {
                if let Some(shortage) = disk.shortage() {
                    disk.make_room(shortage);
                }
            });
            // A lost thread is told by whatever the build does next.
            let _ = looked.await;
            if let Some(budget) = self.budget
                && Instant::now() >= next_walk
            {
                let begun = Instant::now();
                if let Some(cause) = self.walk(budget).await {
                    return Stop::Failed(cause);
                }
                next_walk = Instant::now() + begun.elapsed() * PAUSE_FACTOR;
            }
        }
    }

    fn ended_for(&self) -> Option<Stop> {
        let low = lock(&self.disk.roll).builds.get(&self.number)?.ended_for.clone()?;
        Some(WorkerError::new(WorkerPart::Scratch, low).into())
    }

    /// Measures the build's files. Yields the limit that they are beyond.
    async fn walk(&self, budget: ScratchBudget) -> Option<Cause> {
        let (dir, dropped) = (Arc::clone(&self.dir), Arc::clone(&self.dropped));
        let measured = super::blocking(move || {
            measure(dir.as_fd(), |usage| {
                match budget.excess(usage).is_some() || dropped.load(Ordering::Relaxed) {
                    true => Walk::Stop,
                    false => Walk::GoOn,
                }
            })
        });
        budget.excess(&measured.await.ok()?.ok()?)
    }
}

impl ScratchBudget {
    fn excess(&self, used: &Usage) -> Option<Cause> {
        if used.bytes > self.bytes {
            return Some(Cause::ScratchFull { limit: Size(self.bytes) });
        }
        (used.inodes > self.inodes).then_some(Cause::TooManyFiles { limit: self.inodes })
    }
}

/// What lies in a directory, as far as it can be counted in time.
fn usage(dir: &OwnedFd, patience: Duration, cancel: &AtomicBool) -> Result<Usage, Errno> {
    let deadline = Instant::now() + patience;
    measure(dir.as_fd(), |_| match Instant::now() > deadline || cancel.load(Ordering::Relaxed) {
        true => Walk::Stop,
        false => Walk::GoOn,
    })
}

/// The length of the longest file in a directory, as far as it is found in time. It blocks.
pub fn longest_file(dir: &OwnedFd, cancel: &AtomicBool) -> u64 {
    usage(dir, FINDING_PATIENCE, cancel).map_or(0, |usage| usage.longest_file)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use super::*;

    fn handle(path: &std::path::Path) -> Arc<OwnedFd> {
        Arc::new(File::open(path).unwrap().into())
    }

    #[test]
    fn the_build_that_uses_most_is_ended_and_only_that_one() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Arc::new(Disk::new(handle(dir.path()), dir.path().into(), Floor::Size(Size(u64::MAX))));
        let watches: Vec<Watch> = [1, 300, 20]
            .into_iter()
            .map(|kib| {
                let build = dir.path().join(kib.to_string());
                fs::create_dir(&build).unwrap();
                fs::write(build.join("file"), vec![1; kib << 10]).unwrap();
                disk.watch(handle(&build), None)
            })
            .collect();
        let ended = || watches.iter().map(|watch| watch.ended_for().is_some()).collect::<Vec<_>>();
        assert_eq!(ended(), [false, false, false]);
        let shortage = disk.shortage().expect("no disk has that much");
        disk.make_room(shortage);
        assert_eq!(ended(), [false, true, false]);
        // Its space may come back any moment.
        disk.make_room(shortage);
        assert_eq!(ended(), [false, true, false]);
        let Some(Stop::Fault(fault)) = watches[1].ended_for() else { panic!("it is not the build's fault") };
        let text = fault.to_string();
        assert!(text.contains("--min-free") && text.contains(&dir.path().display().to_string()), "{text}");
    }

    #[test]
    fn a_build_with_too_much_on_disk_is_ended_by_its_own_fault() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a", "b", "c"] {
            fs::write(dir.path().join(name), vec![1; 8192]).unwrap();
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let excess = |bytes, inodes| {
            let disk = Arc::new(Disk::new(handle(dir.path()), dir.path().into(), Floor::None));
            let watch = disk.watch(handle(dir.path()), Some(ScratchBudget { bytes, inodes }));
            let watching = async { tokio::time::timeout(LOOK_INTERVAL * 3, watch.excess()).await.ok() };
            runtime.block_on(watching).map(|stop| match stop {
                Stop::Failed(cause) => cause.to_string(),
                Stop::Fault(fault) => panic!("{fault}"),
            })
        };
        assert_eq!(excess(1 << 20, 3), None);
        let too_many = excess(1 << 20, 2).unwrap();
        assert!(too_many.contains("more than 2 files"), "{too_many}");
        let too_much = excess(8192, 3).unwrap();
        assert!(too_much.contains("8192 bytes (8 KiB) on disk"), "{too_much}");
    }

    #[test]
    fn an_ordinary_disk_is_not_short() {
        let dir = tempfile::tempdir().unwrap();
        for floor in [Floor::None, Floor::Size(Size(0))] {
            assert_eq!(Disk::new(handle(dir.path()), dir.path().into(), floor).shortage(), None);
        }
    }

    #[test]
    fn limits_follow_from_settings() {
        let settings = LimitSettings {
            memory: Some(Size(1 << 30)),
            scratch: Some(Size(10 << 30)),
            processes: Some(7),
            ..LimitSettings::default()
        };
        let budget = Budget::new(&settings, NonZeroUsize::MIN, None);
        let limits = Limits {
            controllers: Vec::new(),
            memory: Some(1 << 30),
            swap: Some(0),
            processes: Some(7),
            cpu_weight: None,
            file_size: Some(10 << 30),
            shares: ucounts::shares(1),
        };
        assert_eq!(budget.limits, limits);
        assert_eq!(budget.scratch, Some(ScratchBudget { bytes: 10 << 30, inodes: (10 << 30) / 4096 }));
        // Half of the memory that the build has, not of the machine's.
        assert!(budget.shm.bytes <= 1 << 29 && budget.shm.bytes > (1 << 29) - 100, "{:?}", budget.shm);
    }

    #[test]
    fn many_builds_share_what_processes_there_are() {
        let number = |builds| default_processes(NonZeroUsize::new(builds).unwrap());
        assert!(number(1) <= PROCESSES_MAX && number(1) >= number(8));
        assert_eq!(number(usize::MAX), PROCESSES_MIN);
    }

    #[test]
    fn what_was_reached_is_told_by_signals_readings_and_files() {
        let settings =
            LimitSettings { scratch: Some(Size(100)), processes: Some(7), ..LimitSettings::default() };
        let budget = Budget::new(&settings, NonZeroUsize::MIN, None);
        let ended = |code| Report::Ended(ExitStatus::Code(code));
        let calm = Readings::default();
        let refused = Readings { processes_refused: 3, ..Readings::default() };
        let reached = |report: &Report, readings, longest| budget.reached(report, readings, longest).other;
        let file = Some(LimitReached::FileSize(100));
        assert_eq!(reached(&ended(1), &calm, 99), None);
        assert_eq!(reached(&ended(1), &calm, 100), file);
        assert_eq!(reached(&ended(153), &calm, 0), file);
        assert_eq!(reached(&Report::Ended(ExitStatus::Signal(25)), &calm, 0), file);
        assert_eq!(reached(&ended(1), &refused, 0), Some(LimitReached::Processes(7)));
        let killed = Readings { oom_kills: 1, ..Readings::default() };
        assert_eq!(budget.reached(&Report::Killed, &killed, 0).out_of_memory, Some(None));
    }
}
