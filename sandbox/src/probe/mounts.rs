//! The pieces of a build's file system, made with the functions that builds are made with.

use std::ffi::CStr;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, SFlag, fstat, major, minor};

use super::outcome::{Act, Found, Tried, Trouble};
use super::trial::in_sandbox;
use super::whole;
use crate::child::masks;
use crate::child::rootfs::{self, Kind};
use crate::ids::IdMap;
use crate::plan::{Access, Mount, MountPoint, Plan, TmpfsSize};
use crate::sources::{self, Source};
use crate::sys;

/// The device nodes that every build sees, and whether it writes to them here.
const DEVICES: [(&str, OFlag); 6] = [
    ("full", OFlag::O_RDONLY),
    ("null", OFlag::O_RDWR),
    ("random", OFlag::O_RDONLY),
    ("tty", OFlag::O_PATH),
    ("urandom", OFlag::O_RDONLY),
    ("zero", OFlag::O_RDONLY),
];

/// Room for all that is made in a tmpfs here.
const SMALL: TmpfsSize = TmpfsSize { bytes: 1 << 22, inodes: 100 };

/// A tmpfs that is attached, as the root of a sandbox is.
fn attached() -> Result<OwnedFd, Trouble> {
    let tmpfs = rootfs::tmpfs(0o755, SMALL).act("mount a tmpfs")?;
    attach(&tmpfs)?;
    Ok(tmpfs)
}

/// Attaches a mount where a build's root is put together.
fn attach(tree: &OwnedFd) -> Result<(), Trouble> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let anchor = open(rootfs::ANCHOR, flags, Mode::empty()).act("open /dev")?;
    sys::move_mount(tree.as_fd(), anchor.as_fd()).act("attach a mount with move_mount")
}

fn place(root: &OwnedFd, name: &str, kind: Kind) -> Result<OwnedFd, Trouble> {
    rootfs::walk(root.as_fd(), Path::new(name), kind).act(&format!("make {name} in a tmpfs"))
}

/// In a sandbox: a tmpfs that takes files.
pub fn fresh_tmpfs() -> Tried {
    let tmpfs = rootfs::tmpfs(0o755, SMALL).act("mount a tmpfs")?;
    write_file(tmpfs.as_fd(), c"file", "write to a tmpfs")?;
    Ok(Found::default())
}

fn write_file(dir: BorrowedFd<'_>, name: &CStr, act: &str) -> Result<(), Trouble> {
    let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_CLOEXEC;
    let file = openat(dir, name, flags, Mode::from_bits_truncate(0o644)).act(act)?;
    File::from(file).write_all(b"doctor").act(act)
}

/// In a sandbox: its own `/proc`, with what covers parts of it.
pub fn proc() -> Tried {
    let root = attached()?;
    let at = place(&root, "proc", Kind::Directory)?;
    let bare = rootfs::fresh(&Mount::Proc).act("mount proc")?;
    masks::mount(&bare, at.as_fd()).act("cover parts of a fresh /proc").map(|()| Found::default())
}

/// In a sandbox: its own terminals.
pub fn devpts() -> Tried {
    let devpts = rootfs::fresh(&Mount::Devpts).act("mount devpts")?;
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    openat(&devpts, c"ptmx", flags, Mode::empty()).act("open a terminal in devpts").map(|_| Found::default())
}

/// A part of the host, read-only in another place.
pub fn bind(ids: &IdMap) -> Tried {
    let plan = plan(ids, vec![Mount::HostPath { source: "/dev".into() }]);
    with_sources(&plan, |root, trees| {
        for tree in trees {
            let at = place(&root, "bound", Kind::Directory)?;
            sys::move_mount(tree.as_fd(), at.as_fd()).act("attach a mount with move_mount")?;
        }
        Ok(Found::default())
    })
}

/// The host's device nodes in another place, in use.
pub fn devices(ids: &IdMap) -> Tried {
    let source = |name| Mount::Device { source: Path::new("/dev").join(name) };
    let plan = plan(ids, DEVICES.iter().map(|(name, _)| source(name)).collect());
    with_sources(&plan, |root, trees| {
        for ((name, access), tree) in DEVICES.into_iter().zip(trees) {
            let kind = fstat(&tree).act(&format!("look at /dev/{name}"))?.st_mode;
            if SFlag::from_bits_truncate(kind) & SFlag::S_IFMT != SFlag::S_IFCHR {
                return Err(Trouble::said(format!("use /dev/{name}"), "it is no device"));
            }
            let at = place(&root, name, Kind::File)?;
            sys::move_mount(tree.as_fd(), at.as_fd()).act(&format!("bind /dev/{name}"))?;
            openat(&root, name, access | OFlag::O_CLOEXEC, Mode::empty())
                .act(&format!("open /dev/{name} where it is bound"))?;
        }
        Ok(Found::default())
    })
}

/// A plan of mounts alone, to open sources by.
fn plan(ids: &IdMap, mounts: Vec<Mount>) -> Plan {
    let point = |mount| MountPoint { at: PathBuf::new(), mount };
    whole::plan(PathBuf::new(), ids.clone(), mounts.into_iter().map(point).collect())
}

/// In a sandbox: `act`, on an attached tmpfs and the trees of a plan, opened as for a build.
fn with_sources(plan: &Plan, act: impl FnOnce(OwnedFd, Vec<OwnedFd>) -> Tried) -> Tried {
    let open = || Ok(sources::open(plan)?);
    in_sandbox(&plan.ids, open, |socket| {
        let tree = |source| match source {
            Source::Tree(tree) => Some(tree),
            _ => None,
        };
        let trees = sources::receive(plan, socket.as_fd())?.mounts.into_iter().filter_map(tree).collect();
        act(attached()?, trees)
    })
}

/// In a sandbox: an overlay in a tmpfs, as the root is one where inputs lie at the root.
pub fn overlay() -> Tried {
    let root = attached()?;
    let dir = |name| place(&root, name, Kind::Directory);
    overlay_on(&dir("lower")?, &dir("upper")?, &dir("work")?)
}

/// An overlay on the directories `lower`, `upper` and `work` of the state directory, made as for a build.
pub fn overlay_on_disk(base: &Path, ids: &IdMap) -> Tried {
    let mount = Mount::InputsBelow {
        lower: "lower".into(),
        upper: "upper".into(),
        work: "work".into(),
        access: Access::ReadWrite,
    };
    let plan = Plan { base: base.into(), ..plan(ids, vec![mount]) };
    in_sandbox(
        ids,
        || Ok(sources::open(&plan)?),
        |socket| match sources::receive(&plan, socket.as_fd())?.mounts.pop() {
            Some(Source::Overlay { lower, holder, upper, work }) => {
                attach(&lower)?;
                attach(&holder)?;
                overlay_on(&lower, &upper, &work)
            }
            _ => Err(Trouble::errno("open the layers of an overlay", Errno::EBADMSG)),
        },
    )
}

fn overlay_on(lower: &OwnedFd, upper: &OwnedFd, work: &OwnedFd) -> Tried {
    let overlay = rootfs::overlay(lower, upper, work).act("mount an overlay with userxattr")?;
    attach(&overlay)?;
    write_file(overlay.as_fd(), c"file", "write to an overlay")?;
    let written = openat(upper, c"file", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty());
    written.act("find in the upper layer what was written to an overlay").map(|_| Found::default())
}

/// In a sandbox: a root of its own, with nothing of the old one.
pub fn pivot() -> Tried {
    let root = attached()?;
    rootfs::pivot(root.as_fd()).act("change the root with pivot_root")?;
    match std::fs::read_dir("/").act("read the new root")?.next() {
        None => Ok(Found::default()),
        Some(_) => Err(Trouble::said("change the root with pivot_root", "the old root is still there")),
    }
}

const FUSE: &str = "/dev/fuse";

/// Where the program stands: the device, opened.
pub fn fuse_device() -> Tried {
    open_fuse().map(|_| Found::default())
}

fn open_fuse() -> Result<OwnedFd, Trouble> {
    const NUMBER: (u64, u64) = (10, 229);
    let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC;
    let device = open(FUSE, flags, Mode::empty()).act("open /dev/fuse")?;
    let found = fstat(&device).act("look at /dev/fuse")?.st_rdev;
    match (major(found), minor(found)) {
        NUMBER => Ok(device),
        (major, minor) => {
            Err(Trouble::said("use /dev/fuse", format!("it is no FUSE device but number {major}:{minor}")))
        }
    }
}

/// Where the program stands: a FUSE mount on `at`, and the kernel's first request to it.
pub fn fuse_mount(at: &Path) -> Tried {
    let device = open_fuse()?;
    unshare(CloneFlags::CLONE_NEWNS).act("make a mount namespace")?;
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("cofferdam"), at, Some("fuse.cofferdam"), flags, Some(options.as_str())).act("mount FUSE")?;
    let version = first_request(device);
    let unmounted = umount2(at, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH).act("unmount FUSE");
    let (major, minor) = version?;
    unmounted.map(|()| Found::with(format!("protocol {major}.{minor}")))
}

/// The protocol that the kernel speaks, from its first request: see `fuse(4)`.
fn first_request(device: OwnedFd) -> Result<(u32, u32), Trouble> {
    const INIT: u32 = 26;
    /// What the kernel demands of a reader, whatever it has to say.
    const BUFFER: usize = 8192;
    let act = "read the kernel's first request to FUSE";
    let mut ready = [PollFd::new(device.as_fd(), PollFlags::POLLIN)];
    if poll(&mut ready, PollTimeout::from(3000_u16)).act(act)? == 0 {
        return Err(Trouble::said(act, "there is none"));
    }
    let mut request = [0; BUFFER];
    let length = File::from(device).read(&mut request).act(act)?;
    let words: Vec<u32> = request
        .get(..length)
        .unwrap_or_default()
        .as_chunks::<4>()
        .0
        .iter()
        .map(|word| u32::from_ne_bytes(*word))
        .collect();
    // A header of ten words, the second of which is the kind; then what INIT says, the versions first.
    match (words.get(1), words.get(10), words.get(11)) {
        (Some(&INIT), Some(&major), Some(&minor)) => Ok((major, minor)),
        _ => Err(Trouble::errno(act, Errno::EPROTO)),
    }
}
