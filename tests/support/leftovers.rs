//! Counting what should be gone.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// How long the remains of a build that was ended may take to vanish.
pub const LIMIT: Duration = Duration::from_secs(2);

/// A number of seconds to sleep for that no other process on this machine sleeps for. Being an argument, it
/// marks the sleeper, and every process of ours that carries the command in its arguments.
pub fn marker() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{}.{:07}", 70_000 + NEXT.fetch_add(1, Ordering::Relaxed), std::process::id())
}

/// Every live process (zombies have no arguments) with `marker` in its arguments: "pid arguments".
pub fn processes(marker: &str) -> Vec<String> {
    let marker = marker.as_bytes();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Ok(arguments) = std::fs::read(entry.path().join("cmdline")) else { continue };
        if arguments.windows(marker.len()).any(|window| window == marker) {
            let arguments = String::from_utf8_lossy(&arguments).replace('\0', " ");
            found.push(format!("{} {arguments}", entry.file_name().display()));
        }
    }
    found
}

/// The mount namespace of process `pid` (or "self"); `None` once it is gone.
pub fn mount_namespace(pid: impl std::fmt::Display) -> Option<PathBuf> {
    std::fs::read_link(format!("/proc/{pid}/ns/mnt")).ok()
}

/// Every live process in this mount namespace, and all that descend from them: a program with its spawner and its
/// sandboxes.
pub fn family(namespace: &Path) -> BTreeSet<String> {
    let pids =
        || names(Path::new("/proc")).into_iter().filter(|name| name.bytes().all(|b| b.is_ascii_digit()));
    let mut family: BTreeSet<String> =
        pids().filter(|pid| mount_namespace(pid).is_some_and(|own| own == namespace)).collect();
    loop {
        let children: Vec<String> = pids()
            .filter(|pid| !family.contains(pid) && parent(pid).is_some_and(|parent| family.contains(&parent)))
            .collect();
        if children.is_empty() {
            return family;
        }
        family.extend(children);
    }
}

fn parent(pid: &str) -> Option<String> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    Some(status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().to_owned())
}

/// The mounts that process `pid` (or "self") sees, a line each; of a process that is gone: none.
pub fn mounts(pid: impl std::fmt::Display) -> BTreeSet<String> {
    let table = std::fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
    table.lines().map(str::to_owned).collect()
}

/// The names in a directory; of one that is gone: none.
pub fn names(dir: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// Waits until `remains` yields nothing, and panics with what it still yields after [`LIMIT`].
#[track_caller]
pub fn gone<T>(what: &str, mut remains: impl FnMut() -> T)
where
    T: std::fmt::Debug,
    for<'a> &'a T: IntoIterator,
{
    let start = Instant::now();
    loop {
        let now = remains();
        if (&now).into_iter().next().is_none() {
            return;
        }
        assert!(start.elapsed() < LIMIT, "after {LIMIT:?} there is still {what}: {now:#?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Waits until `there` holds.
#[track_caller]
pub fn until(what: &str, mut there: impl FnMut() -> bool) {
    let start = Instant::now();
    while !there() {
        assert!(start.elapsed() < Duration::from_secs(20), "waited 20 s for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
