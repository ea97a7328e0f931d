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
use crate::plan::{Access, Entry, Mount, MountPoint, Plan, TmpfsSize};
use crate::report::{SetupFailure, Step};
use crate::sabotage::{Layer, kept};
use crate::sources::{READ_ONLY, Source, Sources, plain};
use crate::sys::{self, FsContext};

/// A directory that every host has. In the sandbox's own mount namespace, layers and the new root are attached on it
/// until the root is changed, and then go with the old one.
pub const ANCHOR: &str = "/dev";

/// Puts the root together and moves into it.
pub fn assemble(plan: &Plan, sources: Sources) -> Result<(), SetupFailure> {
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .map_err(failure(Step::Propagation, Path::new("")))?;

    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let anchor = nix::fcntl::open(ANCHOR, flags, Mode::empty())
        .map_err(failure(Step::RootTmpfs, Path::new(ANCHOR)))?;
    attach_layers(&anchor, plan, &sources.mounts)?;
    let root = make_root(plan, &anchor, sources.root_lower, &sources.mounts)?;
    let mut sealed = Vec::new();
    for (MountPoint { at, mount }, source) in plan.mounts.iter().zip(sources.mounts) {
        let tree = match source {
            Source::Tree(tree) => tree,
            Source::Overlay { lower, upper, work, .. } => {
                overlay(&lower, &upper, &work).map_err(failure(Step::Mount, at))?
            }
            Source::Fresh => fresh(mount).map_err(failure(Step::Mount, at))?,
        };
        let kind = Kind::of(tree.as_fd()).map_err(failure(Step::Mount, at))?;
        let place = walk(root.as_fd(), at, kind).map_err(failure(Step::MountPoint, at))?;
        match mount {
            Mount::Proc => masks::mount(&tree, place.as_fd()),
            _ => sys::move_mount(tree.as_fd(), place.as_fd()),
        }
        .map_err(failure(Step::Mount, at))?;
        if let Mount::InputsBelow { access: Access::ReadOnly, .. } = mount {
            sealed.push((tree, at.as_path()));
        }
    }
    // Only now: mount points had to be made in them.
    if kept(Layer::ReadOnlyRoot) {
        sealed.push((
            root.try_clone().map_err(|_| SetupFailure::new(Step::ReadOnly, Errno::EMFILE, "/"))?,
            Path::new("/"),
        ));
    }
    for (tree, at) in sealed {
        sys::set_mount_attributes(tree.as_fd(), READ_ONLY).map_err(failure(Step::ReadOnly, at))?;
    }
    pivot(root.as_fd()).map_err(failure(Step::Pivot, Path::new("")))
}

/// Attaches the layers of all overlays on the anchor: overlay takes them from this mount namespace only.
///
/// Before the root, for what is attached there later comes to lie on the root, and `/..` leads to it: into scratch
/// space from behind.
fn attach_layers(anchor: &OwnedFd, plan: &Plan, sources: &[Source]) -> Result<(), SetupFailure> {
    for (MountPoint { at, .. }, source) in plan.mounts.iter().zip(sources) {
        if let Source::Overlay { lower, holder, .. } = source {
            for layer in [lower, holder] {
                sys::move_mount(layer.as_fd(), anchor.as_fd()).map_err(failure(Step::Mount, at))?;
            }
        }
    }
    Ok(())
}

/// Attaches the root directory, with its entries and places for all mounts, on the anchor.
///
/// All that the sandbox adds is made in the tmpfs before the lower directory shows through: what lies there,
/// a symbolic link above all, is then hidden and not followed, and nothing is ever copied up.
fn make_root(
    plan: &Plan,
    anchor: &OwnedFd,
    lower: Option<OwnedFd>,
    sources: &[Source],
) -> Result<OwnedFd, SetupFailure> {
    let fail = failure(Step::RootTmpfs, Path::new(""));
    let tmpfs = tmpfs(0o755, size_of_root(plan)).map_err(&fail)?;
    if let Some(lower) = &lower {
        sys::move_mount(lower.as_fd(), anchor.as_fd()).map_err(&fail)?;
    }
    sys::move_mount(tmpfs.as_fd(), anchor.as_fd()).map_err(&fail)?;
    let Some(lower) = lower else {
        fill(tmpfs.as_fd(), plan, sources)?;
        return Ok(tmpfs);
    };
    let make = |name: &str| walk(tmpfs.as_fd(), Path::new(name), Kind::Directory).map_err(&fail);
    let (upper, work, merged) = (make("upper")?, make("work")?, make("merged")?);
    fill(upper.as_fd(), plan, sources)?;
    let root = overlay(&lower, &upper, &work).map_err(&fail)?;
    sys::move_mount(root.as_fd(), merged.as_fd()).map_err(&fail)?;
    Ok(root)
}

/// Makes the root's entries, and a place for each mount that lies in no other.
fn fill(root: BorrowedFd<'_>, plan: &Plan, sources: &[Source]) -> Result<(), SetupFailure> {
    for entry in &plan.root.entries {
        make_entry(root, entry)?;
    }
    for (MountPoint { at, .. }, source) in plan.mounts.iter().zip(sources) {
        if plan.mounts.iter().any(|other| other.at != *at && at.starts_with(&other.at)) {
            continue;
        }
        let kind = match source {
            Source::Tree(tree) => Kind::of(tree.as_fd()),
            Source::Overlay { .. } | Source::Fresh => Ok(Kind::Directory),
        };
        kind.and_then(|kind| walk(root, at, kind)).map_err(failure(Step::MountPoint, at))?;
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

/// What the root takes, and not much more: nothing else is ever to be written there.
fn size_of_root(plan: &Plan) -> TmpfsSize {
    /// What a file of one byte takes on machines with large pages.
    const PAGE: usize = 65536;
    /// For the directories of an overlay, and the root itself.
    const MORE: usize = 64;
    let entries = plan.root.entries.iter().map(|entry| match entry {
        Entry::Directory { path, .. } => (path, 0),
        Entry::File { path, contents, .. } => (path, contents.len()),
        Entry::Symlink { path, target } => (path, target.as_os_str().len()),
    });
    let all = entries.chain(plan.mounts.iter().map(|mount| (&mount.at, 0)));
    let (bytes, inodes) = all.fold((MORE * PAGE, MORE), |(bytes, inodes), (path, size)| {
        (bytes + size.next_multiple_of(PAGE), inodes + path.components().count())
    });
    TmpfsSize { bytes: bytes as u64, inodes: inodes as u64 }
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

/// A file system that takes nothing from the host.
pub fn fresh(mount: &Mount) -> Result<OwnedFd, Errno> {
    match mount {
        Mount::Proc => FsContext::open(c"proc")?.mount(plain() | libc::MOUNT_ATTR_NOEXEC),
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
