//! The sandbox's file system: a new root, everything mounted on it, and the old one gone.
//!
//! What it is made of comes as descriptors, see `sources`. Places in the new root are walked to by descriptor and
//! never through a symbolic link, so that nothing in the inputs can send a mount elsewhere.

use std::ffi::{CString, OsStr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, SFlag, fchmod, fstat, mkdirat};
use nix::unistd::{self, fchdir, pivot_root, symlinkat};

use super::masks;
use crate::frame::{self, Frame};
use crate::ids::IdMap;
use crate::plan::{Access, Entry, Mount, MountPoint, Plan, TmpfsSize};
use crate::report::{SetupFailure, Step};
use crate::sabotage::{Layer, kept};
use crate::sources::{self, READ_ONLY, Source, Sources, plain};
use crate::sys::{self, FsContext};

/// A directory that every host has. In the sandbox's own mount namespace, layers and the new root are attached on it
/// until the root is changed, and then go with the old one.
pub const ANCHOR: &str = "/dev";

/// The root in the making.
pub enum Root {
    /// A furnished tmpfs, which is the root already.
    Furnished(OwnedFd),
    /// Nothing yet: the root will show a lower directory. Layers and it are attached on this one.
    Layered(OwnedFd),
}

/// Does what can be done before the plan is known: cuts propagation, furnishes the root, and moves into it.
pub fn begin(frame: &Frame) -> Result<Root, SetupFailure> {
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .map_err(failure(Step::Propagation, Path::new("")))?;
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let anchor = nix::fcntl::open(ANCHOR, flags, Mode::empty())
        .map_err(failure(Step::RootTmpfs, Path::new(ANCHOR)))?;
    let Some(root) = &frame.root else { return Ok(Root::Layered(anchor)) };
    // Before the anchor, below which the devices lie, is covered.
    let devices = open_devices(root)?;
    let tmpfs = furnish(root, devices, &anchor, &frame.ids)?;
    pivot(tmpfs.as_fd()).map_err(failure(Step::Pivot, Path::new("")))?;
    Ok(Root::Furnished(tmpfs))
}

/// The device nodes among the furniture, each in its turn.
fn open_devices(root: &frame::Root) -> Result<Vec<Option<OwnedFd>>, SetupFailure> {
    let device = |point: &MountPoint| match &point.mount {
        Mount::Device { source } => sources::host_path(source).map(Some),
        _ => Ok(None),
    };
    root.furniture.iter().map(device).collect()
}

/// A root with the mounts of the frame on it, in its place.
fn furnish(
    root: &frame::Root,
    devices: Vec<Option<OwnedFd>>,
    place: &OwnedFd,
    ids: &IdMap,
) -> Result<OwnedFd, SetupFailure> {
    let fail = failure(Step::RootTmpfs, Path::new(""));
    let tmpfs = tmpfs(0o755, root.size).map_err(&fail)?;
    sys::move_mount(tmpfs.as_fd(), place.as_fd()).map_err(&fail)?;
    for (MountPoint { at, mount }, device) in root.furniture.iter().zip(devices) {
        let tree = match device {
            Some(device) => device,
            None => fresh(mount, Some(ids)).map_err(failure(Step::Mount, at))?,
        };
        put(tmpfs.as_fd(), at, mount, &tree)?;
    }
    Ok(tmpfs)
}

/// Mounts the detached `tree` in its place, which is made if it isn't there.
fn put(root: BorrowedFd<'_>, at: &Path, mount: &Mount, tree: &OwnedFd) -> Result<(), SetupFailure> {
    let kind = Kind::of(tree.as_fd()).map_err(failure(Step::Mount, at))?;
    let place = walk(root, at, kind).map_err(failure(Step::MountPoint, at))?;
    match mount {
        Mount::Proc => masks::mount(tree, place.as_fd()),
        _ => sys::move_mount(tree.as_fd(), place.as_fd()),
    }
    .map_err(failure(Step::Mount, at))
}

/// Puts the root together and moves into it.
pub fn assemble(plan: &Plan, begun: Root, sources: Sources) -> Result<(), SetupFailure> {
    let fail = failure(Step::RootTmpfs, Path::new(""));
    let (root, pivots) = match (begun, sources.root_lower) {
        (Root::Furnished(tmpfs), None) => {
            make_entries(tmpfs.as_fd(), plan)?;
            (tmpfs, Pivots::Before)
        }
        (Root::Layered(anchor), Some(lower)) => {
            // Under the root: what lies on its own directory, `/..` leads to.
            sys::move_mount(lower.as_fd(), anchor.as_fd()).map_err(&fail)?;
            (layered_root(plan, &anchor, lower, &sources.mounts)?, Pivots::Now)
        }
        _ => return Err(fail(Errno::EINVAL)),
    };
    let mut sealed = Vec::new();
    let mounts = plan.mounts.iter().filter(|point| !frame::is_furniture(plan, point));
    for (MountPoint { at, mount }, source) in mounts.zip(sources.mounts) {
        let tree = match source {
            Source::Tree(tree) => tree,
            Source::Overlay { lower, holder, upper, work } => {
                // Overlay takes its layers from this mount namespace only. In its own place it covers them.
                put(root.as_fd(), at, mount, &lower)?;
                put(root.as_fd(), at, mount, &holder)?;
                overlay(&lower, &upper, &work).map_err(failure(Step::Mount, at))?
            }
            Source::Fresh => fresh(mount, Some(&plan.ids)).map_err(failure(Step::Mount, at))?,
        };
        put(root.as_fd(), at, mount, &tree)?;
        if let Mount::InputsBelow { access: Access::ReadOnly, .. } = mount {
            sealed.push((tree, at.as_path()));
        }
    }
    // Only now: mount points had to be made in them.
    for (tree, at) in &sealed {
        sys::set_mount_attributes(tree.as_fd(), READ_ONLY).map_err(failure(Step::ReadOnly, at))?;
    }
    if kept(Layer::ReadOnlyRoot) {
        let at = Path::new("/");
        sys::set_mount_attributes(root.as_fd(), READ_ONLY).map_err(failure(Step::ReadOnly, at))?;
    }
    match pivots {
        Pivots::Before => Ok(()),
        Pivots::Now => pivot(root.as_fd()).map_err(failure(Step::Pivot, Path::new(""))),
    }
}

/// When this process moves into its root.
enum Pivots {
    /// It has, with the frame.
    Before,
    /// At the end.
    Now,
}

/// A root that shows a lower directory, with its entries and places for all mounts, in its place.
///
/// All that the sandbox adds is made in a tmpfs before the lower directory shows through: what lies there,
/// a symbolic link above all, is then hidden and not followed, and nothing is ever copied up.
fn layered_root(
    plan: &Plan,
    place: &OwnedFd,
    lower: OwnedFd,
    sources: &[Source],
) -> Result<OwnedFd, SetupFailure> {
    let fail = failure(Step::RootTmpfs, Path::new(""));
    let tmpfs = tmpfs(0o755, frame::size_of_root(plan)).map_err(&fail)?;
    sys::move_mount(tmpfs.as_fd(), place.as_fd()).map_err(&fail)?;
    let make = |name: &str| walk(tmpfs.as_fd(), Path::new(name), Kind::Directory).map_err(&fail);
    let (upper, work, merged) = (make("upper")?, make("work")?, make("merged")?);
    make_entries(upper.as_fd(), plan)?;
    make_places(upper.as_fd(), plan, sources)?;
    let root = overlay(&lower, &upper, &work).map_err(&fail)?;
    sys::move_mount(root.as_fd(), merged.as_fd()).map_err(&fail)?;
    Ok(root)
}

fn make_entries(root: BorrowedFd<'_>, plan: &Plan) -> Result<(), SetupFailure> {
    plan.root.entries.iter().try_for_each(|entry| make_entry(root, entry))
}

/// Makes a place for each mount that lies in no other.
fn make_places(root: BorrowedFd<'_>, plan: &Plan, sources: &[Source]) -> Result<(), SetupFailure> {
    for (point, source) in plan.mounts.iter().zip(sources) {
        if frame::lies_in_another(plan, point) {
            continue;
        }
        let kind = match source {
            Source::Tree(tree) => Kind::of(tree.as_fd()),
            Source::Overlay { .. } | Source::Fresh => Ok(Kind::Directory),
        };
        kind.and_then(|kind| walk(root, &point.at, kind)).map_err(failure(Step::MountPoint, &point.at))?;
    }
    Ok(())
}

fn make_entry(root: BorrowedFd<'_>, entry: &Entry) -> Result<(), SetupFailure> {
    let (path, made) = match entry {
        Entry::Directory { path, mode } => {
            let made =
                walk(root, path, Kind::Directory).and_then(|_| parent(root, path)).and_then(|(dir, name)| {
                    // A descriptor of O_PATH, which `walk` gives, can't be changed through.
                    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                    let directory = openat(dir, name, flags, Mode::empty())?;
                    fchmod(directory, Mode::from_bits_truncate(*mode))
                });
            (path, made)
        }
        Entry::File { path, mode, contents } => {
            let made = parent(root, path).and_then(|(dir, name)| {
                let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_CLOEXEC;
                let file = openat(dir, name, flags, Mode::from_bits_truncate(*mode))?;
                std::io::Write::write_all(&mut std::fs::File::from(file), contents)
                    .map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))
            });
            (path, made)
        }
        Entry::Symlink { path, target } => {
            let made = parent(root, path).and_then(|(dir, name)| symlinkat(target.as_path(), dir, name));
            (path, made)
        }
    };
    made.map_err(failure(Step::MakeEntry, path))
}

/// What stands in a place.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// Anything that is mounted over a file: a file, a device, a socket.
    File,
}

impl Kind {
    /// What `fd` refers to; a symbolic link is an error.
    pub fn of(fd: BorrowedFd<'_>) -> Result<Self, Errno> {
        let kind = SFlag::from_bits_truncate(fstat(fd)?.st_mode) & SFlag::S_IFMT;
        match kind {
            SFlag::S_IFDIR => Ok(Kind::Directory),
            SFlag::S_IFLNK => Err(Errno::ELOOP),
            _ => Ok(Kind::File),
        }
    }
}

/// The place at `path`, made if it isn't there. No component is followed if it is a symbolic link.
pub fn walk(root: BorrowedFd<'_>, path: &Path, kind: Kind) -> Result<OwnedFd, Errno> {
    let (dir, name) = parent(root, path)?;
    let place = match (open_place(dir.as_fd(), name), kind) {
        (Err(Errno::ENOENT), Kind::Directory) => {
            mkdirat(&dir, name, Mode::from_bits_truncate(0o755))?;
            open_place(dir.as_fd(), name)?
        }
        (Err(Errno::ENOENT), Kind::File) => {
            let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_CLOEXEC;
            drop(openat(&dir, name, flags, Mode::from_bits_truncate(0o444))?);
            open_place(dir.as_fd(), name)?
        }
        (place, _) => place?,
    };
    match (Kind::of(place.as_fd())?, kind) {
        (found, wanted) if found == wanted => Ok(place),
        (_, Kind::Directory) => Err(Errno::ENOTDIR),
        (_, Kind::File) => Err(Errno::EISDIR),
    }
}

/// The directory that `path` lies in, made if it isn't there, and the last component.
fn parent<'a>(root: BorrowedFd<'_>, path: &'a Path) -> Result<(OwnedFd, &'a OsStr), Errno> {
    let mut names = path.components().map(|component| match component {
        Component::Normal(name) => Ok(name),
        _ => Err(Errno::EINVAL),
    });
    let mut name = names.next().ok_or(Errno::EINVAL)??;
    let mut dir = root.try_clone_to_owned().map_err(|_| Errno::EMFILE)?;
    for next in names {
        let below = match open_place(dir.as_fd(), name) {
            Err(Errno::ENOENT) => {
                mkdirat(&dir, name, Mode::from_bits_truncate(0o755))?;
                open_place(dir.as_fd(), name)?
            }
            below => below?,
        };
        match Kind::of(below.as_fd())? {
            Kind::Directory => dir = below,
            Kind::File => return Err(Errno::ENOTDIR),
        }
        name = next?;
    }
    Ok((dir, name))
}

/// Something in `dir`, itself if it is a symbolic link.
pub fn open_place(dir: BorrowedFd<'_>, name: &OsStr) -> Result<OwnedFd, Errno> {
    openat(dir, name, OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())
}

/// A fresh tmpfs, detached.
pub fn tmpfs(mode: u32, size: TmpfsSize) -> Result<OwnedFd, Errno> {
    let context = FsContext::open(c"tmpfs")?;
    let options = [
        (c"mode", format!("{mode:04o}")),
        (c"size", size.bytes.to_string()),
        (c"nr_inodes", size.inodes.to_string()),
    ];
    for (key, value) in options {
        context.string(key, &CString::new(value).map_err(|_| Errno::EINVAL)?)?;
    }
    context.mount(plain())
}

/// An overlay whose upper layer takes what is written, detached.
pub fn overlay(lower: &OwnedFd, upper: &OwnedFd, work: &OwnedFd) -> Result<OwnedFd, Errno> {
    let context = FsContext::open(c"overlay")?;
    for (key, directory) in [(c"lowerdir", lower), (c"upperdir", upper), (c"workdir", work)] {
        // By descriptor: the paths may hold characters that overlay gives a meaning, and the directories
        // above them need not be open to the sandbox's root.
        let path =
            CString::new(format!("/proc/self/fd/{}", directory.as_raw_fd())).map_err(|_| Errno::EINVAL)?;
        context.string(key, &path)?;
    }
    // Without it the overlay would need `trusted.*` attributes, which take privilege on the host.
    context.flag(c"userxattr")?;
    context.mount(plain())
}

/// A file system that takes nothing from the host; a procfs for these ids, or for any.
pub fn fresh(mount: &Mount, ids: Option<&IdMap>) -> Result<OwnedFd, Errno> {
    match mount {
        Mount::Proc => {
            let context = FsContext::open(c"proc")?;
            if ids.is_some_and(|ids| !ids.has_root) {
                // The files of pid 1 belong to the root of the spawner's user namespace, who is the build here.
                context.string(c"hidepid", c"2")?;
            }
            context.mount(plain() | libc::MOUNT_ATTR_NOEXEC)
        }
        Mount::Devpts => {
            let context = FsContext::open(c"devpts")?;
            context.string(c"mode", c"0620")?;
            context.string(c"ptmxmode", c"0666")?;
            context.mount(libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC)
        }
        Mount::Tmpfs { mode, size } => tmpfs(*mode, *size),
        _ => Err(Errno::EINVAL),
    }
}

/// Makes `root` the root directory and leaves nothing of the old one.
pub fn pivot(root: BorrowedFd<'_>) -> Result<(), Errno> {
    fchdir(root)?;
    // The old root comes to lie over the new one, so that it needs no directory there: see pivot_root(2).
    pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    unistd::chdir("/")
}

fn failure(step: Step, object: &Path) -> impl Fn(Errno) -> SetupFailure {
    move |errno| SetupFailure::new(step, errno, object.display().to_string())
}
