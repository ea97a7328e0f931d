//! Who the program and its builds are: user and group ids, inside and outside.
//!
//! | who runs it | map of the program | map of a build | inputs belong to |
//! |---|---|---|---|
//! | root | its own | `0 → first`, `1000 → first + 1 + slot` | the build's root |
//! | unprivileged, with subordinate ids | `0 → self`, `1… → range` | `0 → 1`, `1000 → 2 + slot` | the build's root |
//! | unprivileged, with one id | `0 → self` | `1000 → 0` | nobody |
//!
//! Groups go the same way, with 100 in place of 1000. See `user_namespaces(7)`, `subuid(5)`, `newuidmap(1)`.

use std::fmt;
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{self, ForkResult, Gid, Pid, Uid};

use serde::{Deserialize, Serialize};

use crate::users::User;

/// The user id that a build sees as its own.
pub const BUILD_UID: u32 = 1000;
/// The group id that a build sees as its own.
pub const BUILD_GID: u32 = 100;

/// Where builds' host ids start when root runs the program and owns them all. By systemd's table of
/// well-known ranges (<https://systemd.io/UIDS-GIDS/>) this one, up to 2³¹, is used by nobody.
const ROOT_RANGE_FIRST: u32 = 0x7000_0000;
/// How many ids are taken from there.
const ROOT_RANGE_LEN: u32 = 0x1_0000;
/// How many ids are taken off the top of what a container gives its root.
const CONTAINER_RANGE_LEN: u32 = 1024;
/// Ids below this one belong to a container's own users.
const CONTAINER_RANGE_MIN: u32 = 10_000;

/// Whose ids builds run under.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Identity {
    /// Ids of the host that are nobody's, given by root.
    Root {
        /// The user ids.
        uids: IdRange,
        /// The group ids.
        gids: IdRange,
    },
    /// The subordinate ids of an unprivileged user.
    Range {
        /// How many there are, of users and of groups each.
        len: u32,
    },
    /// The one id that the program runs under.
    Single,
}

/// Consecutive ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdRange {
    first: u32,
    len: u32,
}

/// A user and a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// User id, as the program sees it.
    pub uid: u32,
    /// Group id, as the program sees it.
    pub gid: u32,
}

/// The user namespace of one build.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct IdMap {
    /// For `/proc/PID/uid_map`.
    pub(crate) uid_map: String,
    /// For `/proc/PID/gid_map`.
    pub(crate) gid_map: String,
    /// Whether the namespace has a root, to set things up as.
    pub(crate) has_root: bool,
    /// What becomes of supplementary groups.
    pub(crate) groups: Groups,
}

/// What becomes of the supplementary groups that the program was started with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Groups {
    /// They are dropped.
    Droppable,
    /// They stay as the program has them: with one id mapped, the kernel forbids `setgroups`.
    Kept,
}

impl Identity {
    /// How many builds can run at once, each under an id of its own; `None`: they share one.
    pub fn slots(&self) -> Option<u32> {
        match self {
            Identity::Root { uids, gids } => Some(uids.len.min(gids.len) - 1),
            Identity::Range { len } => Some(len - 1),
            Identity::Single => None,
        }
    }

    /// The owner of inputs: the root of every build, or an id that is mapped nowhere.
    pub fn inputs_owner(&self) -> Owner {
        match self {
            Identity::Root { uids, gids } => Owner { uid: uids.first, gid: gids.first },
            Identity::Range { .. } => Owner { uid: 1, gid: 1 },
            Identity::Single => Owner { uid: 65534, gid: 65534 },
        }
    }

    /// The owner of inputs that are files on disk, where no id can be one that is mapped nowhere: the root of every
    /// build, or where it has none, itself.
    pub fn copies_owner(&self) -> Owner {
        self.root_owner()
    }

    /// The owner of a directory that a build's inputs are laid over: its root, or where it has none, itself.
    pub fn root_owner(&self) -> Owner {
        match self {
            Identity::Single => Owner { uid: 0, gid: 0 },
            _ => self.inputs_owner(),
        }
    }

    /// The user that the build in this slot runs as.
    ///
    /// `slot` counts from 0 and is less than [`Identity::slots`].
    pub fn build_owner(&self, slot: u32) -> Owner {
        match self {
            Identity::Root { uids, gids } => Owner { uid: uids.first + 1 + slot, gid: gids.first + 1 + slot },
            Identity::Range { .. } => Owner { uid: 2 + slot, gid: 2 + slot },
            Identity::Single => Owner { uid: 0, gid: 0 },
        }
    }

    /// The user namespace for the build in this slot.
    pub fn map(&self, slot: u32) -> IdMap {
        let build = self.build_owner(slot);
        let own = |inside: u32, outside: u32| format!("{inside} {outside} 1\n");
        match self {
            Identity::Single => IdMap {
                uid_map: own(BUILD_UID, build.uid),
                gid_map: own(BUILD_GID, build.gid),
                has_root: false,
                groups: Groups::Kept,
            },
            _ => {
                let root = self.root_owner();
                IdMap {
                    uid_map: own(0, root.uid) + &own(BUILD_UID, build.uid),
                    gid_map: own(0, root.gid) + &own(BUILD_GID, build.gid),
                    has_root: true,
                    groups: Groups::Droppable,
                }
            }
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Identity::Root { uids, .. } => {
                write!(f, "root, builds under host ids {} to {}", uids.first, uids.first + (uids.len - 1))
            }
            Identity::Range { len } => write!(f, "unprivileged, builds under {len} subordinate ids"),
            Identity::Single => write!(f, "unprivileged, builds under one id"),
        }
    }
}

/// Whether builds should have ids of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnIds {
    /// If they can be had.
    Wanted,
    /// They run under that of the program, which must not be root.
    Unwanted,
}

/// What [`enter`] found.
#[derive(Debug)]
pub struct Entered {
    /// Whose ids builds run under.
    pub identity: Identity,
    /// Why it is not a stronger one, where that can be changed.
    pub note: Option<String>,
    /// Supplementary groups that builds keep.
    pub kept_groups: Vec<u32>,
    /// Keeps other programs of root off these ids.
    pub claim: Option<IdClaim>,
}

/// A claim to a part of root's range of ids, which lasts as long as this value.
#[derive(Debug)]
pub struct IdClaim {
    _lock: fs::File,
}

/// Where claims are made, a file for each part of the range.
const CLAIMS: &str = "/run/cofferdam-ids";
/// How many programs of root can each have a part.
const CLAIM_PARTS: u32 = 32;

impl IdClaim {
    /// Takes a part of `range` that no other program has. `None` where no claim can be made or all parts are taken.
    fn make(range: IdRange) -> Option<(IdRange, Self)> {
        let made = fs::DirBuilder::new().mode(0o700).create(CLAIMS);
        if made.is_err_and(|error| error.kind() != io::ErrorKind::AlreadyExists) {
            return None;
        }
        let len = range.len / CLAIM_PARTS;
        (0..CLAIM_PARTS).find_map(|part| {
            let first = range.first + part * len;
            let mut options = fs::OpenOptions::new();
            options.write(true).create(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
            let lock = options.open(Path::new(CLAIMS).join(first.to_string())).ok()?;
            lock.try_lock().ok()?;
            Some((IdRange { first, len }, Self { _lock: lock }))
        })
    }
}

/// Why the program could not get namespaces of its own.
#[derive(Debug, thiserror::Error)]
pub enum EnterError {
    /// No user namespace.
    #[error(
        "can't make a user namespace: {0} (see user.max_user_namespaces, kernel.unprivileged_userns_clone and \
         kernel.apparmor_restrict_unprivileged_userns in sysctl)"
    )]
    UserNamespace(Errno),
    /// Root's own id is not for builds.
    #[error("root's builds need ids of their own, or they would run as root")]
    BuildsAsRoot,
    /// No mount namespace.
    #[error("can't make a mount namespace: {0}")]
    MountNamespace(Errno),
    /// The mounts of the new namespace are still tied to the host's.
    #[error("can't cut the mount namespace off from the host's: {0}")]
    Propagation(Errno),
    /// The id map could not be written.
    #[error("can't write {file}: {source}")]
    Map {
        /// The file.
        file: &'static str,
        /// Why.
        source: io::Error,
    },
    /// An id map could not be read.
    #[error("can't read {file}: {source}")]
    ReadMap {
        /// The file.
        file: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The process that writes the map could not be started.
    #[error("can't fork: {0}")]
    Fork(Errno),
}

/// Moves the program into a mount namespace of its own, and into a user namespace if it is unprivileged.
/// From here on it sees itself as root; nothing it mounts is visible outside or outlives it.
///
/// Call this once, first, while the program has one thread.
///
/// # Errors
/// Where the kernel refuses a namespace. The message names the settings that do so.
pub fn enter(own_ids: OwnIds) -> Result<Entered, EnterError> {
    let entered = match (is_privileged(), own_ids) {
        (true, OwnIds::Wanted) => enter_as_root()?,
        (true, OwnIds::Unwanted) => return Err(EnterError::BuildsAsRoot),
        (false, own_ids) => enter_unprivileged(own_ids)?,
    };
    // The host's later unmounts must reach this namespace, or it would keep its disks busy; nothing goes back.
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none).map_err(EnterError::Propagation)?;
    Ok(entered)
}

/// Whether the program is root and may do as root does.
pub(crate) fn is_privileged() -> bool {
    Uid::effective().is_root()
        && matches!(caps::has_cap(None, caps::CapSet::Effective, caps::Capability::CAP_SYS_ADMIN), Ok(true))
}

fn enter_as_root() -> Result<Entered, EnterError> {
    let read = |file| fs::read_to_string(file).map_err(|source| EnterError::ReadMap { file, source });
    let uids = free_range(&read("/proc/self/uid_map")?);
    let gids = free_range(&read("/proc/self/gid_map")?);
    unshare(CloneFlags::CLONE_NEWNS).map_err(EnterError::MountNamespace)?;
    // Builds under an id of their own drop them anyway. A container that forbids it has none to drop, most likely.
    let _ = unistd::setgroups(&[]);
    let kept_groups = Vec::new();
    let (Some(uids), Some(gids)) = (uids, gids) else {
        let note = Some("this container gives its root too few ids for builds to have their own".into());
        return Ok(Entered { identity: Identity::Single, note, kept_groups, claim: None });
    };
    // Groups go with the users: who has claimed the one has the other.
    let (uids, gids, claim) = match IdClaim::make(uids) {
        Some((part, claim)) => {
            let gids = IdRange { first: gids.first + (part.first - uids.first), len: part.len };
            (part, gids, Some(claim))
        }
        None => (uids, gids, None),
    };
    Ok(Entered { identity: Identity::Root { uids, gids }, note: None, kept_groups, claim })
}

/// Ids that no one uses, out of an id map as `/proc/PID/uid_map` shows it.
fn free_range(map: &str) -> Option<IdRange> {
    let extents = map.lines().filter_map(|line| {
        let mut fields = line.split_whitespace().map(|field| field.parse::<u64>().ok());
        let (inside, _, len) = (fields.next()??, fields.next()??, fields.next()??);
        Some((inside, inside + len))
    });
    let mut best = None;
    for (start, end) in extents {
        let wanted = u64::from(ROOT_RANGE_FIRST)..u64::from(ROOT_RANGE_FIRST + ROOT_RANGE_LEN);
        if start <= wanted.start && wanted.end <= end {
            return Some(IdRange { first: ROOT_RANGE_FIRST, len: ROOT_RANGE_LEN });
        }
        // The last two of 65536 are nobody and the id that means none.
        let first = end.saturating_sub(u64::from(CONTAINER_RANGE_LEN) + 2);
        if first >= start.max(u64::from(CONTAINER_RANGE_MIN)) {
            best = u32::try_from(first).ok().map(|first| IdRange { first, len: CONTAINER_RANGE_LEN });
        }
    }
    best
}

fn enter_unprivileged(own_ids: OwnIds) -> Result<Entered, EnterError> {
    let (uid, gid) = (Uid::effective(), Gid::effective());
    // Inside of the namespace they will all look like nobody's.
    let groups = unistd::getgroups().unwrap_or_default();
    let namespaces = CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS;
    let ranges = match own_ids {
        OwnIds::Wanted => Subordinate::find(uid),
        OwnIds::Unwanted => Err("not wanted".into()),
    };
    let missing = match ranges {
        Ok(ranges) => {
            let helper = MapHelper::start(&ranges, uid, gid)?;
            unshare(namespaces).map_err(EnterError::UserNamespace)?;
            match helper.finish() {
                Ok(()) => {
                    // Allowed, because the map was written with privilege; if not, a build can't either.
                    let _ = unistd::setgroups(&[]);
                    let len = ranges.uids.len.min(ranges.gids.len);
                    let (identity, kept_groups) = (Identity::Range { len }, Vec::new());
                    return Ok(Entered { identity, note: None, kept_groups, claim: None });
                }
                Err(why) => why,
            }
        }
        Err(why) => {
            unshare(namespaces).map_err(EnterError::UserNamespace)?;
            why
        }
    };
    // A process without privilege outside may map itself alone, and only after giving up setgroups.
    write_map("/proc/self/setgroups", "deny")?;
    write_map("/proc/self/uid_map", &format!("0 {uid} 1"))?;
    write_map("/proc/self/gid_map", &format!("0 {gid} 1"))?;
    let kept_groups = groups.into_iter().filter(|group| *group != gid).map(Gid::as_raw).collect();
    Ok(Entered { identity: Identity::Single, note: Some(missing), kept_groups, claim: None })
}

fn write_map(file: &'static str, text: &str) -> Result<(), EnterError> {
    fs::write(file, text).map_err(|source| EnterError::Map { file, source })
}

/// The subordinate ids of a user, and the programs that may map them.
struct Subordinate {
    uids: IdRange,
    gids: IdRange,
    newuidmap: PathBuf,
    newgidmap: PathBuf,
}

/// The fewest subordinate ids that are of use: a build needs a root and a user of its own.
pub(crate) const MIN_SUBORDINATE: u32 = 3;

impl Subordinate {
    fn find(uid: Uid) -> Result<Self, String> {
        let name = User::with_id(uid.as_raw()).map(|user| user.name);
        let range = |file: &str| {
            let lines = fs::read_to_string(file).unwrap_or_default();
            subordinate_range(&lines, uid.as_raw(), name.as_deref())
                .filter(|range| range.len >= MIN_SUBORDINATE)
                .ok_or_else(|| format!("{file} gives this user no subordinate ids"))
        };
        let program = |name: &str| {
            find_program(name)
                .ok_or_else(|| format!("{name} is not installed (Debian: uidmap, Fedora: shadow-utils)"))
        };
        Ok(Self {
            uids: range("/etc/subuid")?,
            gids: range("/etc/subgid")?,
            newuidmap: program("newuidmap")?,
            newgidmap: program("newgidmap")?,
        })
    }
}

/// Where a program is, by `PATH`.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/bin".into());
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|path| path.is_file())
}

/// How many ids a file in the form of `subuid(5)` gives a user, at most in one piece.
pub(crate) fn subordinate_len(lines: &str, uid: u32, name: Option<&str>) -> Option<u32> {
    subordinate_range(lines, uid, name).map(|range| range.len)
}

/// The largest range that a file in the form of `subuid(5)` gives a user.
fn subordinate_range(lines: &str, uid: u32, name: Option<&str>) -> Option<IdRange> {
    lines
        .lines()
        .filter_map(|line| {
            let mut fields = line.trim().split(':');
            let who = fields.next()?;
            let (first, len) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
            let ours = name == Some(who) || who.parse() == Ok(uid);
            ours.then_some(IdRange { first, len })
        })
        .max_by_key(|range| range.len)
}

/// A process that stays outside of the new user namespace and runs newuidmap and newgidmap on it.
struct MapHelper {
    pid: Pid,
    go: OwnedFd,
    program: PathBuf,
}

impl MapHelper {
    fn start(ranges: &Subordinate, uid: Uid, gid: Gid) -> Result<Self, EnterError> {
        let parent = unistd::getpid();
        let (wait, go) = unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(EnterError::Fork)?;
        // SAFETY: the program has one thread, as `enter` demands, so the child may go on as usual.
        match unsafe { unistd::fork() }.map_err(EnterError::Fork)? {
            ForkResult::Parent { child } => Ok(Self { pid: child, go, program: ranges.newuidmap.clone() }),
            ForkResult::Child => {
                drop(go);
                let mut byte = [0];
                let unshared = matches!(fs::File::from(wait).read(&mut byte), Ok(1));
                let map = |program: &PathBuf, own: u32, range: IdRange| {
                    Command::new(program)
                        .args([parent.to_string(), "0".into(), own.to_string(), "1".into()])
                        .args(["1".into(), range.first.to_string(), range.len.to_string()])
                        .status()
                        .is_ok_and(|status| status.success())
                };
                let mapped = unshared
                    && map(&ranges.newuidmap, uid.as_raw(), ranges.uids)
                    && map(&ranges.newgidmap, gid.as_raw(), ranges.gids);
                std::process::exit(if mapped { 0 } else { 1 });
            }
        }
    }

    /// Lets the helper go on, once the namespace is there. The error is a note for people.
    fn finish(self) -> Result<(), String> {
        let started = fs::File::from(self.go).write_all(&[1]);
        match (started, waitpid(self.pid, None)) {
            (Ok(()), Ok(WaitStatus::Exited(_, 0))) => Ok(()),
            _ => Err(format!("{} could not map the subordinate ids", self.program.display())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_free_range_is_found_in_each_kind_of_map() {
        let range = |first, len| Some(IdRange { first, len });
        let cases = [
            ("the host", "         0          0 4294967295\n", range(0x7000_0000, 0x1_0000)),
            ("a container with 65536 ids", "0 100000 65536\n", range(64510, 1024)),
            ("a container in a rootless user's namespace", "0 1000 1\n1 100000 65536\n", range(64511, 1024)),
            ("one id", "0 1000 1\n", None),
            ("few ids", "0 1000 500\n", None),
            ("nothing", "", None),
            ("nonsense", "a b c\n", None),
        ];
        for (name, map, expected) in cases {
            assert_eq!(free_range(map), expected, "{name}");
        }
    }

    #[test]
    fn subordinate_ids_go_by_name_or_number_and_the_largest_range_wins() {
        let lines = "root:1:2\nme:100:10\n1001:200:5\nme:300:65536\nbroken:x:1\nme:\n";
        let range = |first, len| Some(IdRange { first, len });
        assert_eq!(subordinate_range(lines, 1000, Some("me")), range(300, 65536));
        assert_eq!(subordinate_range(lines, 1001, Some("other")), range(200, 5));
        assert_eq!(subordinate_range(lines, 1001, None), range(200, 5));
        assert_eq!(subordinate_range(lines, 7, Some("broken")), None);
        assert_eq!(subordinate_range("", 7, Some("me")), None);
    }

    #[test]
    fn no_two_slots_share_an_id_and_none_is_roots() {
        let root =
            Identity::Root { uids: IdRange { first: 500, len: 4 }, gids: IdRange { first: 900, len: 9 } };
        for identity in [root, Identity::Range { len: 4 }] {
            let slots = identity.slots().unwrap();
            assert_eq!(slots, 3);
            let mut owners: Vec<u32> = (0..slots).map(|slot| identity.build_owner(slot).uid).collect();
            owners.push(identity.root_owner().uid);
            owners.sort();
            owners.dedup();
            assert_eq!(owners.len(), 4);
        }
    }
}
