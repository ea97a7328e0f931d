//! What a build may not leave: the host before and after, seen by a process in none of the worker's namespaces.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::castore::Digest;

/// What the names of keys and sockets that the probes make contain.
pub const MARK: &str = "cofferdam-selftest";

/// How much more memory the worker may hold than before, in KiB.
const MEMORY_SLACK_KIB: u64 = 16 * 1024;

/// Largest file of the host whose contents are compared.
const MAX_DIGESTED_BYTES: u64 = 4 << 20;

/// Files of the host that no build may change.
const CANARIES: [&str; 22] = [
    "/etc/passwd",
    "/etc/group",
    "/etc/shadow",
    "/etc/hosts",
    "/etc/hostname",
    "/etc/resolv.conf",
    "/etc/ld.so.preload",
    "/etc/ld.so.cache",
    "/etc/subuid",
    "/etc/sudoers",
    "/bin/sh",
    "/dev/null",
    "/dev/zero",
    "/dev/full",
    "/dev/random",
    "/dev/urandom",
    "/dev/tty",
    "/dev/fuse",
    "/proc/sys/kernel/core_pattern",
    "/proc/sys/kernel/hostname",
    "/proc/sys/vm/overcommit_memory",
    "/proc/sys/user/max_user_namespaces",
];

/// Kinds of things that builds have while they run: that one is gone is as it should be.
const TRANSIENT: [&str; 6] = [PROCESS, CONNECTION, BUILD, GROUP, KEY, SOCKET];
/// What the worker holds of it. It counts only where it grows again and again.
pub const MEMORY: &str = "memory";
const PROCESS: &str = "process";
const CONNECTION: &str = "FUSE connection";
const BUILD: &str = "directory of a build";
const GROUP: &str = "control group";
const KEY: &str = "key";
const SOCKET: &str = "unix socket";

/// What is looked at.
#[derive(Clone, Debug)]
pub struct Scope {
    /// The battery; 0 where it has ended.
    pub pid: u32,
    /// A name that the arguments of every process of the probes contain.
    pub token: String,
    /// The worker's state directory.
    pub state: PathBuf,
    /// The directory of all batteries; no build may change what lies in it directly.
    pub dir: PathBuf,
}

/// What the host looked like at one moment, by the kind of thing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    things: BTreeMap<&'static str, BTreeSet<String>>,
    open_files: u64,
    threads: u64,
    memory_kib: u64,
}

impl Snapshot {
    /// Whether a build still has a directory on disk.
    pub fn builds(&self) -> bool {
        self.things.get(BUILD).is_some_and(|builds| !builds.is_empty())
    }
}

impl Scope {
    /// Looks at everything.
    pub fn look(&self) -> Snapshot {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap_or_default();
        let things = [
            (PROCESS, self.processes()),
            ("mount of the host", lines("/proc/self/mountinfo").collect()),
            (CONNECTION, names("/sys/fs/fuse/connections")),
            (BUILD, names(self.state.join("builds"))),
            (GROUP, self.control_groups()),
            (KEY, keys()),
            ("System V object", system_v()),
            (SOCKET, unix_sockets()),
            ("canary file", self.canaries()),
        ];
        Snapshot {
            things: things.into(),
            open_files: self.open_files(),
            threads: field(&status, "Threads:"),
            memory_kib: field(&status, "RssAnon:"),
        }
    }

    /// What is left of a battery that has ended.
    pub fn leftovers(&self) -> Vec<String> {
        let processes = self.processes().into_iter().map(|process| format!("process {process}"));
        let mounts = lines("/proc/self/mountinfo").filter(|line| line.contains(&self.token));
        processes.chain(mounts.map(|line| format!("mount of the host {line}"))).collect()
    }

    /// The battery, all that descend from it, and whatever carries the token.
    fn processes(&self) -> BTreeSet<String> {
        let mut parents = BTreeMap::new();
        let mut marked = BTreeSet::new();
        for name in names("/proc").iter().filter(|name| name.bytes().all(|byte| byte.is_ascii_digit())) {
            let Ok(pid) = name.parse::<u32>() else { continue };
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            parents.insert(pid, field(&status, "PPid:"));
            let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            if contains(&arguments, self.token.as_bytes()) {
                marked.insert(pid);
            }
        }
        let descends = |mut pid: u32| {
            // As many steps as there are processes: pids that are used again could make a circle.
            for _ in 0..parents.len() {
                match parents.get(&pid) {
                    _ if pid == self.pid && pid != 0 => return true,
                    Some(parent) => pid = u32::try_from(*parent).unwrap_or(0),
                    None => return false,
                }
            }
            false
        };
        let ours = parents.keys().filter(|pid| marked.contains(pid) || descends(**pid));
        ours.filter(|pid| **pid != std::process::id()).map(|pid| describe_process(*pid)).collect()
    }

    /// How many, but for blobs: the view keeps a bounded number of those that were read last.
    fn open_files(&self) -> u64 {
        let entries = fs::read_dir(format!("/proc/{}/fd", self.pid)).into_iter().flatten().flatten();
        let links = entries.map(|entry| fs::read_link(entry.path()).unwrap_or_default());
        let blobs = ["store/blobs", "store/packs"].map(|dir| Path::new(super::battery::STATE).join(dir));
        let others = links.filter(|link| {
            !blobs.iter().any(|dir| contains(link.as_os_str().as_bytes(), dir.as_os_str().as_bytes()))
        });
        others.count() as u64
    }

    /// Groups below those that the battery is in.
    fn control_groups(&self) -> BTreeSet<String> {
        let mounts: Vec<String> = lines("/proc/self/mountinfo").collect();
        let mounts = mounts.iter().filter_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            right.starts_with("cgroup").then(|| left.split(' ').nth(4).map(PathBuf::from))?
        });
        let groups: Vec<String> = lines(format!("/proc/{}/cgroup", self.pid))
            .filter_map(|line| line.splitn(3, ':').nth(2).map(|path| path.trim_start_matches('/').to_owned()))
            .collect();
        mounts
            .flat_map(|mount| groups.iter().map(move |group| mount.join(group)))
            .flat_map(|group| {
                let inner = fs::read_dir(group).into_iter().flatten().flatten();
                inner.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            })
            .map(|entry| entry.path().display().to_string())
            .filter(|path| path.contains("cofferdam"))
            .collect()
    }

    fn canaries(&self) -> BTreeSet<String> {
        let fixed = CANARIES.iter().map(PathBuf::from);
        let home = std::env::var_os("HOME").map(PathBuf::from).filter(|home| home.is_absolute());
        let beside = home.iter().chain([&self.dir]).flat_map(|dir| {
            let entries = fs::read_dir(dir).into_iter().flatten().flatten();
            entries.map(|entry| entry.path()).chain([dir.clone()])
        });
        fixed.chain(beside).map(|path| describe_file(&path)).collect()
    }
}

/// Something that differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The kind of thing.
    pub kind: &'static str,
    words: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.words)
    }
}

impl Difference {
    /// One of a kind, in words.
    pub fn new(kind: &'static str, words: impl Into<String>) -> Self {
        Self { kind, words: words.into() }
    }
}

/// What differs; nothing where there is no difference that counts.
pub fn differences(before: &Snapshot, after: &Snapshot) -> Vec<Difference> {
    let mut all = Vec::new();
    for (kind, now) in &after.things {
        let Some(then) = before.things.get(kind) else { continue };
        all.extend(now.difference(then).map(|thing| Difference::new(kind, format!("new {kind}: {thing}"))));
        if !TRANSIENT.contains(kind) {
            all.extend(
                then.difference(now).map(|thing| Difference::new(kind, format!("{kind} gone: {thing}"))),
            );
        }
    }
    for (what, then, now) in [
        ("open files of the worker", before.open_files, after.open_files),
        ("threads of the worker", before.threads, after.threads),
    ] {
        // Fewer is as it should be: what was warmed up may have cooled.
        if now > then {
            all.push(Difference::new(what, format!("{what}: {now}, before {then}")));
        }
    }
    if after.memory_kib > before.memory_kib + MEMORY_SLACK_KIB {
        let (now, then) = (after.memory_kib, before.memory_kib);
        all.push(Difference::new(MEMORY, format!("memory of the worker: {now} KiB, before {then}")));
    }
    all
}

/// What of the host can't be looked at here.
pub fn blind_spots() -> Vec<String> {
    let mut blind = Vec::new();
    if !Path::new("/sys/fs/fuse/connections").exists() {
        blind.push("/sys/fs/fuse/connections is not there: FUSE connections are not counted".into());
    }
    if !Path::new("/proc/keys").exists() {
        blind.push("/proc/keys is not there: keys are not counted".into());
    }
    blind
}

fn describe_process(pid: u32) -> String {
    let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let mut words = String::from_utf8_lossy(&arguments).replace('\0', " ");
    if words.is_empty() {
        words = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    }
    format!("{pid} {}", words.trim().chars().take(120).collect::<String>())
}

/// Kind, mode, owner, and contents or device number.
fn describe_file(path: &Path) -> String {
    let name = path.display();
    let Ok(found) = path.symlink_metadata() else { return format!("{name}: not there") };
    let (mode, uid, gid) = (found.mode(), found.uid(), found.gid());
    let holds = match found.file_type() {
        kind if kind.is_file() && found.len() <= MAX_DIGESTED_BYTES => match fs::read(path) {
            Ok(bytes) => Digest::of(&bytes).to_hex(),
            Err(error) => error.kind().to_string(),
        },
        kind if kind.is_file() => {
            format!("{} bytes of {}.{}", found.len(), found.mtime(), found.mtime_nsec())
        }
        kind if kind.is_char_device() || kind.is_block_device() => format!("device {:x}", found.rdev()),
        kind if kind.is_symlink() => format!("link to {:?}", fs::read_link(path).unwrap_or_default()),
        _ => String::new(),
    };
    format!("{name}: {mode:o} {uid}:{gid} {holds}")
}

/// Keys of the probes, without what changes by itself. Other programs of the host have keys, too.
fn keys() -> BTreeSet<String> {
    let line = |line: String| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (serial, owner, rest) = (fields.first()?, fields.get(5)?, fields.get(7..)?);
        Some(format!("{serial} of {owner}: {}", rest.join(" ").split(':').next().unwrap_or_default()))
    };
    lines("/proc/keys").filter_map(line).filter(|key| key.contains(MARK)).collect()
}

fn system_v() -> BTreeSet<String> {
    let objects = |kind: &'static str| {
        let ids = move |line: String| {
            let mut fields = line.split_whitespace();
            Some(format!("{kind} of key {}, id {}", fields.next()?, fields.next()?))
        };
        lines(format!("/proc/sysvipc/{kind}")).skip(1).filter_map(ids)
    };
    ["shm", "sem", "msg"].into_iter().flat_map(objects).collect()
}

/// Those of the probes that have a name.
fn unix_sockets() -> BTreeSet<String> {
    let names = lines("/proc/net/unix").filter_map(|line| line.split_whitespace().nth(7).map(str::to_owned));
    names.filter(|name| name.contains(MARK)).collect()
}

/// The number after a name, in files like `/proc/PID/status`.
fn field(status: &str, name: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

fn lines(path: impl AsRef<Path>) -> impl Iterator<Item = String> {
    let mut text = Vec::new();
    if let Ok(mut file) = fs::File::open(path) {
        // What was read before an error is better than nothing: a kernel file that changes meanwhile.
        let _ = file.read_to_end(&mut text);
    }
    String::from_utf8_lossy(&text).lines().map(str::to_owned).collect::<Vec<_>>().into_iter()
}

fn names(dir: impl AsRef<Path>) -> BTreeSet<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    memchr::memmem::find(bytes, part).is_some()
}
