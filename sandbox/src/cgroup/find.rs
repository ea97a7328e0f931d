//! Which part of the cgroup tree is this program's to use.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use nix::unistd::{AccessFlags, Uid, eaccess};

use super::{
    CgroupError, Cgroups, Changes, Choice, Controller, Privilege, SUPERVISOR, SUPERVISOR_CPU_WEIGHT, Status,
    fail, pids, read, sweep, write,
};
use crate::sys;

/// What [`find`] found.
#[derive(Debug)]
pub struct Found {
    /// A subtree, if there is one to use.
    pub cgroups: Option<Cgroups>,
    /// What that means.
    pub status: Status,
}

/// Finds a part of the cgroup tree that is this program's to use, and makes it ready: sweeps what dead programs left
/// there, moves this program into a leaf, turns controllers on.
///
/// Without a [`Choice::Path`] only a subtree that was given to this program is used: one that is marked as delegated,
/// one that belongs to the unprivileged user who runs it and holds nothing else, or the whole tree of a container or of
/// a host that nobody else divides. A cgroup that someone else manages, as the session of a login, is left alone.
///
/// Call this while the program has one thread and before it starts any process that is to be moved with it.
///
/// # Errors
/// Where a [`Choice::Path`] can't be used. Without one, the [`Status`] says why there is nothing to use.
pub fn find(choice: &Choice, privilege: Privilege) -> Result<Found, CgroupError> {
    let none = |reason: String| Ok(Found { cgroups: None, status: Status::None { reason } });
    match choice {
        Choice::Off => none("cgroups were turned off".into()),
        Choice::Path(path) => {
            let base = path.canonicalize().map_err(fail("find the cgroup", path))?;
            if !is_cgroup2(&base) {
                return Err(fail("use", path)(io::Error::other(
                    "it is no directory of a cgroup2 file system",
                )));
            }
            take(&base)
        }
        Choice::Auto => match ours(privilege) {
            Err(reason) => none(reason),
            Ok(base) if controllers_in(&base, "cgroup.controllers").is_empty() => {
                none(format!("{} has no controllers", base.display()))
            }
            Ok(base) => take(&base).or_else(|error| none(error.to_string())),
        },
    }
}

/// The subtree that was given to this program, or why there is none.
fn ours(privilege: Privilege) -> Result<PathBuf, String> {
    let table = fs::read_to_string("/proc/self/mountinfo")
        .map_err(|error| format!("/proc/self/mountinfo: {error}"))?;
    let own =
        fs::read_to_string("/proc/self/cgroup").map_err(|error| format!("/proc/self/cgroup: {error}"))?;
    let mounts = mounts(&table);
    if mounts.is_empty() {
        return Err("no cgroup2 file system is mounted".into());
    }
    let own = own_path(&own).ok_or("this program's cgroup lies outside of its cgroup namespace")?;
    let (mount, at) = mounts
        .iter()
        .find_map(|mount| Some((mount, mount.place(own)?)).filter(|(_, at)| is_cgroup2(at)))
        .ok_or_else(|| format!("this program's cgroup {} is not mounted", own.display()))?;
    let is_root_of_namespace = own == Path::new("/");
    let parent = || at.parent().filter(|_| at != mount.point).map(Path::to_owned);
    if at.file_name().is_some_and(|name| name == SUPERVISOR)
        && let Some(parent) = parent()
    {
        return Ok(parent);
    }
    if is_delegated(&at) || privilege == Privilege::User && is_owned(&at) {
        return Ok(at);
    }
    if let Some(parent) = parent().filter(|parent| is_delegated(parent)) {
        return Ok(parent);
    }
    match (privilege, is_root_of_namespace) {
        (Privilege::Root, true) => Ok(at),
        _ => Err(format!(
            "the cgroup {} is not this program's to divide (start it as a service with Delegate=yes, or name one \
             with --cgroup)",
            at.display()
        )),
    }
}

/// Makes `base` ready.
fn take(base: &Path) -> Result<Found, CgroupError> {
    sweep(base);
    let moved = make_room(base)?;
    let available = controllers_in(base, "cgroup.controllers");
    let found_on = controllers_in(base, "cgroup.subtree_control");
    enable(base, &available);
    let mut turned_on = controllers_in(base, "cgroup.subtree_control");
    turned_on.retain(|controller| !found_on.contains(controller));
    let changes = Changes { base: base.into(), turned_on, moved };
    let (path, lock) = Cgroups::claim(base)?;
    enable(&path, &available);
    let controllers = controllers_in(&path, "cgroup.subtree_control");
    // Absent where this program did not have to be moved.
    let _ = write(&base.join(SUPERVISOR), "cpu.weight", SUPERVISOR_CPU_WEIGHT);
    let cgroups = Cgroups { path, controllers: controllers.clone(), changes, _lock: lock };
    cgroups.try_out()?;
    Ok(Found { cgroups: Some(cgroups), status: Status::Version2 { controllers, at: base.into() } })
}

/// Moves this program out of `base`, which may hold no processes itself once its children have controllers. Yields
/// whether it had to be moved.
fn make_room(base: &Path) -> Result<bool, CgroupError> {
    // The one cgroup that has no type is the root, for which that is no rule.
    if !base.join("cgroup.type").exists() {
        return Ok(false);
    }
    let own = i32::try_from(std::process::id()).unwrap_or_default();
    let inside = pids(base);
    if let Some(other) = inside.iter().find(|pid| **pid != own) {
        let who = match other {
            0 => "processes of another pid namespace".into(),
            pid => format!("other processes (as pid {pid})"),
        };
        return Err(fail("divide the cgroup", base)(io::Error::other(format!(
            "{who} live in it; move them into a cgroup below it, or name another with --cgroup"
        ))));
    }
    if inside.is_empty() {
        return Ok(false);
    }
    let leaf = base.join(SUPERVISOR);
    match fs::create_dir(&leaf) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(fail("make the cgroup", &leaf)(error));
        }
        _ => {}
    }
    let moved = write(&leaf, "cgroup.procs", &own.to_string());
    moved.map(|()| true).map_err(fail("move this program into the cgroup", &leaf))
}

/// Turns controllers on for the children of `dir`, as far as that goes: what is on is read afterwards.
fn enable(dir: &Path, controllers: &[Controller]) {
    for controller in controllers {
        // One by one: a write is refused as a whole.
        let _ = write(dir, "cgroup.subtree_control", &format!("+{}", controller.name()));
    }
}

fn controllers_in(dir: &Path, file: &str) -> Vec<Controller> {
    let list = read(dir, file).unwrap_or_default();
    Controller::ALL.into_iter().filter(|one| list.split_whitespace().any(|name| name == one.name())).collect()
}

fn is_cgroup2(path: &Path) -> bool {
    statfs(path).is_ok_and(|found| found.filesystem_type() == CGROUP2_SUPER_MAGIC)
}

/// Whether a service manager has marked the cgroup as left to whoever runs in it, see
/// <https://systemd.io/CGROUP_DELEGATION/>.
fn is_delegated(path: &Path) -> bool {
    [c"trusted.delegate", c"user.delegate"].iter().any(|name| sys::has_attribute(path, name, b"1"))
}

/// Whether the cgroup belongs to the user who runs this, and may be divided by that user.
fn is_owned(path: &Path) -> bool {
    let files = ["cgroup.procs", "cgroup.subtree_control"];
    let ours = |found: fs::Metadata| found.uid() == Uid::effective().as_raw();
    fs::metadata(path).is_ok_and(ours)
        && files.iter().all(|file| eaccess(&path.join(file), AccessFlags::W_OK).is_ok())
}

/// A mount of cgroup2.
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    /// Which cgroup lies at the mount point.
    root: PathBuf,
    point: PathBuf,
}

impl Mount {
    /// Where the cgroup `path` is found.
    fn place(&self, path: &Path) -> Option<PathBuf> {
        let rest = path.strip_prefix(&self.root).ok()?;
        // Joining an empty path would add a slash.
        Some(if rest.as_os_str().is_empty() { self.point.clone() } else { self.point.join(rest) })
    }
}

/// The mounts of cgroup2 in a table as `/proc/PID/mountinfo` shows it.
fn mounts(table: &str) -> Vec<Mount> {
    let mount = |line: &str| {
        let (place, kind) = line.split_once(" - ")?;
        let mut fields = place.split(' ');
        let (root, point) = (fields.nth(3)?, fields.next()?);
        (kind.split(' ').next() == Some("cgroup2"))
            .then(|| Mount { root: unescaped(root).into(), point: unescaped(point).into() })
    };
    table.lines().filter_map(mount).collect()
}

/// A field of mountinfo without its octal escapes, as far as they stand for ASCII.
fn unescaped(field: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(field.to_owned(), |text, (escape, plain)| text.replace(escape, plain))
}

/// The cgroup in the tree of version 2, out of a file as `/proc/PID/cgroup` shows it. `None` where it lies outside of
/// the cgroup namespace.
fn own_path(text: &str) -> Option<&Path> {
    let path = Path::new(text.lines().find_map(|line| line.strip_prefix("0::"))?);
    let inside = !path.components().any(|component| component == Component::ParentDir);
    (path.is_absolute() && inside).then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_and_places_are_read_from_tables() {
        let table = "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n\
                     35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n\
                     41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:7 - cgroup2 cgroup2 rw\n\
                     42 31 0:38 /a/b /mnt/with\\040space ro - cgroup2 none rw\n\
                     broken\n";
        let found = mounts(table);
        let mount = |root: &str, point: &str| Mount { root: root.into(), point: point.into() };
        assert_eq!(found, [mount("/", "/sys/fs/cgroup/unified"), mount("/a/b", "/mnt/with space")]);
        let place = |index: usize, path: &str| found[index].place(Path::new(path));
        assert_eq!(place(0, "/"), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(place(0, "/a/x"), Some("/sys/fs/cgroup/unified/a/x".into()));
        assert_eq!(place(1, "/a/b/c"), Some("/mnt/with space/c".into()));
        assert_eq!(place(1, "/a/x"), None);
    }

    #[test]
    fn the_own_cgroup_is_that_of_version_2() {
        let cases = [
            ("9:name=systemd:/x\n8:pids:/y\n0::/user.slice/a\n", Some("/user.slice/a")),
            ("0::/\n", Some("/")),
            ("0::/../other\n", None),
            ("8:pids:/y\n", None),
            ("", None),
        ];
        for (text, expected) in cases {
            assert_eq!(own_path(text), expected.map(Path::new), "{text}");
        }
    }
}
