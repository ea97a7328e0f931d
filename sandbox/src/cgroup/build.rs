//! The cgroup of one build.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{CgroupError, Cgroups, Controller, INNER, fail, is_missing, kill_all, read, remove_tree, write};
use crate::plan::Limits;

/// The cgroup of one build. Dropping it kills what lives in there, and removes it.
#[derive(Debug)]
pub struct BuildCgroup {
    path: PathBuf,
    inner: PathBuf,
}

/// What a build has used, as far as the kernel and the controllers tell.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Readings {
    /// The most memory that it had, in bytes.
    pub memory_peak: Option<u64>,
    /// How many of its processes were killed because memory was short.
    pub oom_kills: u64,
    /// The most processes and threads that it had.
    pub processes_peak: Option<u64>,
    /// How many more it was refused.
    pub processes_refused: u64,
    /// Time on processors.
    pub cpu: Option<Duration>,
    /// Of this, in programs.
    pub cpu_user: Option<Duration>,
    /// Of this, in the kernel.
    pub cpu_system: Option<Duration>,
    /// Bytes read from disks.
    pub io_read: Option<u64>,
    /// Bytes written to disks.
    pub io_written: Option<u64>,
}

impl Cgroups {
    /// Makes the cgroup of the build called `id`, with its limits as far as there are controllers for them.
    ///
    /// # Errors
    /// Where it can't be made or a limit can't be set. Nothing stays then.
    pub fn create(&self, id: &str, limits: &Limits) -> Result<BuildCgroup, CgroupError> {
        let path = self.path().join(id);
        fs::create_dir(&path).map_err(fail("make the cgroup", &path))?;
        // From here on dropping it cleans up.
        let build = BuildCgroup { inner: path.join(INNER), path };
        for (controller, file, value) in settings(limits) {
            if !limits.controllers.contains(&controller) {
                continue;
            }
            match write(&build.path, file, &value) {
                // Swap is not accounted for by every kernel; then there is none to limit, or no way to.
                Err(error) if is_missing(&error) && file == "memory.swap.max" => {}
                set => set.map_err(|error| fail("set", &build.path.join(file))(error))?,
            }
        }
        fs::create_dir(&build.inner).map_err(fail("make the cgroup", &build.inner))?;
        // Not a build's own id where that owns the files: more cgroups are kernel memory that nothing counts.
        write(&build.path, "cgroup.max.descendants", "1").map_err(fail("limit the cgroup", &build.path))?;
        Ok(build)
    }
}

/// The files that hold limits, with what goes into them.
fn settings(limits: &Limits) -> Vec<(Controller, &'static str, String)> {
    let mut all = Vec::new();
    let mut set = |controller, file, value: Option<u64>| {
        all.extend(value.map(|value| (controller, file, value.to_string())));
    };
    set(Controller::Memory, "memory.max", limits.memory);
    set(Controller::Memory, "memory.swap.max", limits.swap);
    // A build that has lost one process at random is of no use.
    set(Controller::Memory, "memory.oom.group", Some(1));
    set(Controller::Pids, "pids.max", limits.processes);
    set(Controller::Cpu, "cpu.weight", limits.cpu_weight.map(u64::from));
    all
}

impl BuildCgroup {
    /// Where the build's processes are to be started.
    pub fn inner(&self) -> &Path {
        &self.inner
    }

    /// What the build has used so far. What can't be read is left out.
    pub fn readings(&self) -> Readings {
        let number = |file| read(&self.path, file).ok()?.trim().parse().ok();
        let (events, pids) = (self.keyed("memory.events"), self.keyed("pids.events"));
        let (cpu, io) = (self.keyed("cpu.stat"), read(&self.path, "io.stat").ok());
        let time = |key| Some(Duration::from_micros(value(cpu.as_deref()?, key)?));
        Readings {
            memory_peak: number("memory.peak"),
            oom_kills: events.and_then(|events| value(&events, "oom_kill")).unwrap_or(0),
            processes_peak: number("pids.peak"),
            processes_refused: pids.and_then(|events| value(&events, "max")).unwrap_or(0),
            cpu: time("usage_usec"),
            cpu_user: time("user_usec"),
            cpu_system: time("system_usec"),
            io_read: io.as_deref().map(|text| sum(text, "rbytes=")),
            io_written: io.as_deref().map(|text| sum(text, "wbytes=")),
        }
    }

    fn keyed(&self, file: &str) -> Option<String> {
        read(&self.path, file).ok()
    }

    /// Kills every process of the build at once.
    pub fn kill(&self) {
        kill_all(&self.path);
    }

    /// Kills what is left of the build and removes its cgroup. It blocks until the dead have left.
    ///
    /// # Errors
    /// Where it can't be removed.
    pub fn remove(self) -> Result<(), CgroupError> {
        // Dropping it then finds nothing.
        remove_tree(&self.path)
    }
}

impl Drop for BuildCgroup {
    fn drop(&mut self) {
        if self.path.exists() {
            let _ = remove_tree(&self.path);
        }
    }
}

/// The number behind `key` in lines of `KEY NUMBER`.
fn value(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

/// The sum of all numbers behind `key` in lines of `DEVICE KEY=NUMBER KEY=NUMBER`.
fn sum(text: &str, key: &str) -> u64 {
    let numbers = text.split_whitespace().filter_map(|word| word.strip_prefix(key)?.parse::<u64>().ok());
    numbers.fold(0, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_by_their_whole_key() {
        let events = "low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 1\n";
        assert_eq!(value(events, "oom"), Some(3));
        assert_eq!(value(events, "oom_kill"), Some(2));
        assert_eq!(value(events, "kill"), None);
        assert_eq!(value("max x\n", "max"), None);
    }

    #[test]
    fn disks_are_added_up() {
        let text = "254:0 rbytes=4096 wbytes=100 rios=1 wios=2 dbytes=0 dios=0\n7:1 rbytes=4 wbytes=x\n";
        assert_eq!((sum(text, "rbytes="), sum(text, "wbytes=")), (4100, 100));
    }

    #[test]
    fn only_what_is_limited_is_set() {
        let files =
            |limits: &Limits| settings(limits).into_iter().map(|(_, file, _)| file).collect::<Vec<_>>();
        assert_eq!(files(&Limits::default()), ["memory.oom.group"]);
        let limits = Limits { memory: Some(1), swap: Some(0), processes: Some(5), ..Limits::default() };
        assert_eq!(files(&limits), ["memory.max", "memory.swap.max", "memory.oom.group", "pids.max"]);
    }
}
