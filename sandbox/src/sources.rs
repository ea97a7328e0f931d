//! What of the host a sandbox is made of: opened by whoever asks for it, handed over as descriptors.
//!
//! The sandbox's first process has no rights but those of its own user namespace; the way to a source may be closed to
//! it. So the caller opens all of them, in its own thread: one that hangs holds up its own build and no other. From
//! then on nothing of the host is named by a path.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::stat::{SFlag, fstat};

use crate::frame;
use crate::message;
use crate::plan::{Mount, MountPoint, Plan};
use crate::report::{SetupFailure, Step};
use crate::sabotage::{Layer, kept};
use crate::sys;

/// Attributes of what the build must not change.
pub const READ_ONLY: u64 = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
/// For device nodes, which `nodev` would turn off.
const DEVICE: u64 = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;

/// Attributes of every mount that is not a device node.
pub fn plain() -> u64 {
    if kept(Layer::MountFlags) { libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV } else { 0 }
}

/// What a plan's root and mounts are made of, but for what is part of the frame, in the order of the plan.
pub struct Sources {
    /// What shows through the root.
    pub root_lower: Option<OwnedFd>,
    /// One for each mount that is not part of the frame.
    pub mounts: Vec<Source>,
}

/// What one mount is made of.
pub enum Source {
    /// A detached mount.
    Tree(OwnedFd),
    /// The layers of an overlay.
    Overlay {
        /// A detached mount.
        lower: OwnedFd,
        /// A detached mount that holds the next two: overlay wants them on one.
        holder: OwnedFd,
        /// A directory on `holder`.
        upper: OwnedFd,
        /// Another one.
        work: OwnedFd,
    },
    /// Nothing of the host: a file system is made.
    Fresh,
}

/// Opens everything that the plan names outside of the sandbox, and queues it on a socket. The other end is for
/// [`receive`].
pub fn open(plan: &Plan) -> Result<OwnedFd, SetupFailure> {
    let mut fds = Vec::new();
    if let Some(lower) = &plan.root.lower {
        fds.push(tree(plan, lower, READ_ONLY)?);
    }
    for point in plan.mounts.iter().filter(|point| !frame::is_furniture(plan, point)) {
        match &point.mount {
            Mount::Writable { source } => fds.push(tree(plan, source, plain())?),
            Mount::Inputs { source } => fds.push(tree(plan, source, READ_ONLY)?),
            Mount::Device { source } | Mount::HostPath { source } => fds.push(host_path(source)?),
            Mount::InputsBelow { lower, upper, work, .. } => {
                fds.push(tree(plan, lower, READ_ONLY)?);
                fds.extend(writable_layers(plan, upper, work)?);
            }
            Mount::Proc | Mount::Devpts | Mount::Tmpfs { .. } => {}
        }
    }
    send(&fds).map_err(|errno| SetupFailure::new(Step::PassSources, errno, ""))
}

/// A detached copy of a mount at a path that is ours.
fn tree(plan: &Plan, source: &Path, attributes: u64) -> Result<OwnedFd, SetupFailure> {
    let fail = |errno| SetupFailure::new(Step::OpenSource, errno, source.display().to_string());
    let path =
        CString::new(plan.base.join(source).as_os_str().as_bytes()).map_err(|_| fail(Errno::EINVAL))?;
    let tree = sys::open_tree(&path, false).map_err(fail)?;
    sys::set_mount_attributes(tree.as_fd(), attributes).map_err(fail)?;
    Ok(tree)
}

/// A detached copy of what is at a path of the host, with all that is mounted below it unless it is a device.
pub fn host_path(source: &Path) -> Result<OwnedFd, SetupFailure> {
    let fail = |errno| SetupFailure::new(Step::OpenSource, errno, source.display().to_string());
    // The path was looked up when it was allowed. What has become a symbolic link since leads elsewhere.
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let found = openat2(nix::fcntl::AT_FDCWD, source, how).map_err(fail)?;
    let device = is_device(found.as_fd()).map_err(fail)?;
    let tree = sys::open_tree_of(found.as_fd(), !device).map_err(fail)?;
    match device {
        true => sys::set_mount_attributes(tree.as_fd(), DEVICE),
        false => sys::set_mount_attributes_recursively(tree.as_fd(), READ_ONLY),
    }
    .map_err(fail)?;
    Ok(tree)
}

fn is_device(fd: BorrowedFd<'_>) -> Result<bool, Errno> {
    let kind = SFlag::from_bits_truncate(fstat(fd)?.st_mode) & SFlag::S_IFMT;
    Ok(kind == SFlag::S_IFCHR || kind == SFlag::S_IFBLK)
}

/// The plan's own directory, and the two in it that an overlay writes to.
fn writable_layers(plan: &Plan, upper: &Path, work: &Path) -> Result<[OwnedFd; 3], SetupFailure> {
    let holder = tree(plan, Path::new(""), plain())?;
    let directory = |path: &Path| {
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
        openat2(&holder, path, how)
            .map_err(|errno| SetupFailure::new(Step::OpenSource, errno, path.display().to_string()))
    };
    let (upper, work) = (directory(upper)?, directory(work)?);
    Ok([holder, upper, work])
}

fn send(fds: &[OwnedFd]) -> Result<OwnedFd, Errno> {
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    for chunk in fds.chunks(message::MAX_FDS) {
        let chunk: Vec<BorrowedFd<'_>> = chunk.iter().map(AsFd::as_fd).collect();
        // Nobody reads yet: rather an error than a wait.
        message::send_fds(ours.as_fd(), 0, &chunk)?;
    }
    Ok(theirs)
}

/// Takes what [`open`] queued for this plan.
pub fn receive(plan: &Plan, socket: BorrowedFd<'_>) -> Result<Sources, SetupFailure> {
    let mut queue = Queue { socket, received: Vec::new().into_iter() };
    let fail = |errno| SetupFailure::new(Step::PassSources, errno, "");
    let root_lower = plan.root.lower.as_ref().map(|_| queue.next()).transpose().map_err(fail)?;
    let mounts = plan.mounts.iter().filter(|point| !frame::is_furniture(plan, point));
    let mounts = mounts.map(|point| queue.source(point)).collect::<Result<_, _>>();
    Ok(Sources { root_lower, mounts: mounts.map_err(fail)? })
}

struct Queue<'a> {
    socket: BorrowedFd<'a>,
    received: std::vec::IntoIter<OwnedFd>,
}

impl Queue<'_> {
    fn source(&mut self, point: &MountPoint) -> Result<Source, Errno> {
        Ok(match &point.mount {
            Mount::Writable { .. } | Mount::Inputs { .. } | Mount::Device { .. } | Mount::HostPath { .. } => {
                Source::Tree(self.next()?)
            }
            Mount::InputsBelow { .. } => Source::Overlay {
                lower: self.next()?,
                holder: self.next()?,
                upper: self.next()?,
                work: self.next()?,
            },
            Mount::Proc | Mount::Devpts | Mount::Tmpfs { .. } => Source::Fresh,
        })
    }

    fn next(&mut self) -> Result<OwnedFd, Errno> {
        if let Some(fd) = self.received.next() {
            return Ok(fd);
        }
        self.received = message::receive_fds(self.socket)?.fds.into_iter();
        // Too few came: the limit of descriptors was reached, or the sender is gone.
        self.received.next().ok_or(Errno::EMFILE)
    }
}
