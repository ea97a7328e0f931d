//! Answers to the kernel's requests.
//!
//! Nothing here may notify the kernel, or wait for a thread that does: the kernel may hold the notice up
//! until the request is answered.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{
    AccessFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty,
    ReplyEntry, ReplyLock, ReplyOpen, ReplyStatfs, ReplyXattr, Request,
};

use super::inodes::{Entries, FileId, Inode, KEPT, KEPT_NAME, Listing, ROOT};
use super::{Fault, Shared};
use crate::castore::{Blob, Digest, Name, Node, look};
use crate::lock::lock;

/// How long the kernel may believe an answer: for ever, as far as it can count.
const FOREVER: Duration = Duration::from_secs(u32::MAX as u64);

/// Numbers are never used again, so there is one generation of each.
const GENERATION: Generation = Generation(0);

/// Requests that the kernel makes ahead of need, at most at a time.
const MAX_BACKGROUND: u16 = 64;

/// Largest read in bytes; the kernel derives it from what it may write.
const MAX_REQUEST: u32 = 1 << 20;

/// What stands for the number of an entry that has none yet, as libfuse has it. (0 would hide the entry.)
const UNKNOWN: u64 = u32::MAX as u64;

/// Offset that follows `..`; entries come after it.
pub(super) const AFTER_DOTS: u64 = 2;

/// The file system.
pub struct Castore {
    shared: Arc<Shared>,
}

/// What the attributes of a node depend on.
#[derive(Clone, Copy)]
enum Shape {
    Directory,
    File { size: u64, executable: bool },
    Symlink { len: usize },
}

impl From<&Node> for Shape {
    fn from(node: &Node) -> Self {
        match node {
            Node::Directory { .. } => Self::Directory,
            Node::File { size, executable, .. } => Self::File { size: *size, executable: *executable },
            Node::Symlink { target } => Self::Symlink { len: target.as_bytes().len() },
        }
    }
}

impl From<&Inode> for Shape {
    fn from(inode: &Inode) -> Self {
        match inode {
            Inode::Root | Inode::Kept | Inode::Directory(..) => Self::Directory,
            Inode::File(file) => (*file).into(),
            Inode::Symlink(target) => Self::Symlink { len: target.as_bytes().len() },
        }
    }
}

impl From<FileId> for Shape {
    fn from(file: FileId) -> Self {
        Self::File { size: file.size, executable: file.executable }
    }
}

/// Whether a listing counts as a lookup of what it lists.
#[derive(Clone, Copy)]
enum Grant {
    Lookup,
    Nothing,
}

impl Shape {
    fn kind(self) -> FileType {
        match self {
            Self::Directory => FileType::Directory,
            Self::File { .. } => FileType::RegularFile,
            Self::Symlink { .. } => FileType::Symlink,
        }
    }
}

impl Castore {
    pub fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    fn attributes(&self, number: u64, shape: Shape) -> FileAttr {
        let (size, perm) = match shape {
            Shape::Directory => (0, look::INPUT_DIRECTORY_MODE),
            Shape::File { size, executable } => (size, look::input_file_mode(executable)),
            Shape::Symlink { len } => (len as u64, 0o777),
        };
        let time = SystemTime::UNIX_EPOCH + look::INPUT_TIME;
        FileAttr {
            ino: INodeNo(number),
            size,
            blocks: size.div_ceil(512),
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind: shape.kind(),
            perm,
            // Of a directory, 1 says that its subdirectories are not counted. 2 would say that there are
            // none, and programs that trust it would not descend.
            nlink: 1,
            uid: self.shared.owner.uid,
            gid: self.shared.owner.gid,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }

    fn inode(&self, number: u64) -> Result<Inode, Errno> {
        lock(&self.shared.inodes).get(number).ok_or(Errno::ESTALE)
    }

    /// Grants a lookup; `None` where there is no such entry.
    fn enter(&self, parent: u64, name: &[u8]) -> Result<Option<FileAttr>, Errno> {
        let listing = self.listing(parent)?;
        let Some(position) = listing.find(name) else { return Ok(None) };
        let Some((_, node)) = listing.get(position) else { return Ok(None) };
        let number = lock(&self.shared.inodes).enter(parent, position, node).ok_or(Errno::ESTALE)?;
        Ok(Some(self.attributes(number, node.into())))
    }

    /// Grants a lookup in the root.
    fn enter_root(&self, name: &OsStr) -> Option<FileAttr> {
        let number = match name {
            name if name == KEPT_NAME => KEPT,
            name => lock(&self.shared.inodes).enter_build(name.as_bytes())?,
        };
        Some(self.attributes(number, Shape::Directory))
    }

    /// Grants a lookup of a file that is to be kept.
    fn enter_kept(&self, name: &OsStr) -> Option<FileAttr> {
        let number = name.to_str()?.parse().ok()?;
        let file = lock(&self.shared.inodes).keep(number)?;
        Some(self.attributes(number, file.into()))
    }

    /// The entries of a directory other than the root.
    fn listing(&self, number: u64) -> Result<Arc<Listing>, Errno> {
        let (place, digest) = match self.inode(number)? {
            Inode::Directory(_, Entries::Known(listing)) => return Ok(listing),
            Inode::Directory(place, Entries::Stored(digest)) => (place, digest),
            Inode::Kept => return Ok(Arc::default()),
            _ => return Err(Errno::ENOTDIR),
        };
        let recent = self.shared.listings.get(&digest);
        let listing = match recent {
            Some(listing) => listing,
            None => self.load(&digest).map_err(|fault| {
                self.shared.fault(&[place.build], fault);
                Errno::EIO
            })?,
        };
        lock(&self.shared.inodes).fill(number, Arc::clone(&listing));
        Ok(listing)
    }

    fn load(&self, digest: &Digest) -> Result<Arc<Listing>, Fault> {
        let digest = *digest;
        let directory = self.shared.store.directories.get(&digest);
        let directory = directory.map_err(|source| Fault::Store { digest, source })?;
        let directory = directory.ok_or(Fault::MissingDirectory { digest })?;
        let listing = Arc::new(Listing::from(&*directory));
        self.shared.listings.insert(digest, Arc::clone(&listing), 1 + listing.len());
        Ok(listing)
    }

    /// Reads from a file into `buffer` and yields how much of it was filled: all of it, unless the file
    /// ends before.
    fn read_file(&self, file: FileId, offset: u64, buffer: &mut [u8]) -> Result<usize, Fault> {
        let digest = file.digest;
        let blob = self.blob(file)?;
        let rest = usize::try_from(file.size.saturating_sub(offset)).unwrap_or(usize::MAX);
        let wanted = rest.min(buffer.len());
        let mut filled = 0;
        while let Some(space) = buffer.get_mut(filled..wanted).filter(|space| !space.is_empty()) {
            let at = offset.saturating_add(filled as u64);
            match blob.read_at(space, at) {
                // The kernel would fill up with zeros.
                Ok(0) => return Err(Fault::EndsEarly { digest, size: file.size, offset: at }),
                Ok(read) => filled = wanted.min(filled.saturating_add(read)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(Fault::Read { digest, offset: at, source }),
            }
        }
        Ok(filled)
    }

    /// Opens the blob of a file, which must have the length that the file is said to have, and the bytes that its digest
    /// names.
    fn blob(&self, file: FileId) -> Result<Arc<dyn Blob>, Fault> {
        let digest = file.digest;
        let recent = self.shared.blobs.get(&digest);
        let blob = match recent {
            Some(blob) => blob,
            None => {
                let blob = self.shared.store.blobs.open_sized(&digest, file.size);
                let blob = blob.map_err(|source| Fault::Store { digest, source })?;
                let blob = blob.ok_or(Fault::MissingBlob { digest })?;
                self.shared.blobs.insert(digest, Arc::clone(&blob), 1);
                blob
            }
        };
        let actual = blob.size();
        if actual != file.size {
            // It may be put right: then another file is to be opened.
            self.shared.blobs.remove(&digest);
            return Err(Fault::Size { digest, stated: file.size, actual });
        }
        match blob.verify() {
            Ok(()) => Ok(blob),
            Err(source) => {
                self.shared.blobs.remove(&digest);
                Err(Fault::Store { digest, source })
            }
        }
    }

    /// Records that a file can't be read, for all builds that have seen one of these contents.
    fn fault_of_file(&self, digest: &Digest, fault: Fault) {
        let listings = lock(&self.shared.inodes).known_listings();
        let mut concerned = Vec::new();
        for (build, listing) in listings {
            if !concerned.contains(&build) && listing.has_file(digest) {
                concerned.push(build);
            }
        }
        self.shared.fault(&concerned, fault);
    }

    /// Gives `.` and `..` from `offset` on to `add`, which takes (number, next offset, name) and says
    /// whether the reply is full, as this does.
    fn dots(&self, number: u64, offset: u64, mut add: impl FnMut(u64, u64, &str) -> bool) -> bool {
        let parent = match lock(&self.shared.inodes).get(number) {
            Some(Inode::Directory(place, _)) => place.parent,
            _ => ROOT,
        };
        (offset < 1 && add(number, 1, ".")) || (offset < AFTER_DOTS && add(parent, AFTER_DOTS, ".."))
    }

    /// Lists the root: the live builds, whose numbers are the offsets too, since positions shift. Each
    /// entry that `add` had room for is one lookup granted, if `grant` says so.
    fn list_root(&self, offset: u64, grant: Grant, mut add: impl FnMut(u64, &Name) -> bool) {
        let mut after = offset.max(AFTER_DOTS);
        let mut inodes = lock(&self.shared.inodes);
        while let Some((number, name)) = inodes.next_build(after) {
            let name = name.clone();
            if add(number, &name) {
                break;
            }
            if let Grant::Lookup = grant {
                inodes.enter_build(name.as_bytes());
            }
            after = number;
        }
    }
}

/// The entries of `listing` from `offset` on, each with its position and the offset that follows it.
pub(super) fn from_offset(
    listing: &Listing,
    offset: u64,
) -> impl Iterator<Item = (usize, u64, &Name, &Node)> {
    let first = usize::try_from(offset.saturating_sub(AFTER_DOTS)).unwrap_or(usize::MAX);
    (first..listing.len()).filter_map(move |position| {
        let (name, node) = listing.get(position)?;
        Some((position, AFTER_DOTS + 1 + position as u64, name, node))
    })
}

impl Filesystem for Castore {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let wanted = InitFlags::FUSE_ASYNC_READ
            | InitFlags::FUSE_PARALLEL_DIROPS
            | InitFlags::FUSE_CACHE_SYMLINKS
            | InitFlags::FUSE_EXPLICIT_INVAL_DATA
            | InitFlags::FUSE_MAX_PAGES
            | InitFlags::FUSE_DO_READDIRPLUS
            | InitFlags::FUSE_READDIRPLUS_AUTO
            | InitFlags::FUSE_NO_OPEN_SUPPORT
            | InitFlags::FUSE_NO_OPENDIR_SUPPORT
            // Builds share files: a lock that the kernel keeps for one would be seen by others.
            | InitFlags::FUSE_POSIX_LOCKS
            | InitFlags::FUSE_FLOCK_LOCKS;
        // Most make things faster only, and locks are older than all else: a kernel without one of them will do.
        if let Err(unsupported) = config.add_capabilities(wanted) {
            tracing::debug!(?unsupported, "this kernel's FUSE is old");
            let _ = config.add_capabilities(wanted & !unsupported);
        }
        let _ = config.set_max_write(MAX_REQUEST);
        let _ = config.set_max_background(MAX_BACKGROUND);
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = match parent.0 {
            // What isn't there may come: such an answer must not be kept.
            ROOT => self.enter_root(name).ok_or(Errno::ENOENT),
            KEPT => self.enter_kept(name).ok_or(Errno::ENOENT),
            // Number 0: there is nothing, and that may be kept.
            parent => self
                .enter(parent, name.as_bytes())
                .map(|found| found.unwrap_or_else(|| self.attributes(0, Shape::Directory))),
        };
        match found {
            Ok(attributes) => reply.entry(&FOREVER, &attributes, GENERATION),
            Err(errno) => reply.error(errno),
        }
    }

    fn forget(&self, _request: &Request, number: INodeNo, lookups: u64) {
        lock(&self.shared.inodes).forget(number.0, lookups);
    }

    fn getattr(&self, _request: &Request, number: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.inode(number.0) {
            Ok(inode) => reply.attr(&FOREVER, &self.attributes(number.0, Shape::from(&inode))),
            Err(errno) => reply.error(errno),
        }
    }

    fn readlink(&self, _request: &Request, number: INodeNo, reply: ReplyData) {
        match self.inode(number.0) {
            Ok(Inode::Symlink(target)) => reply.data(target.as_bytes()),
            Ok(_) => reply.error(Errno::EINVAL),
            Err(errno) => reply.error(errno),
        }
    }

    fn read(
        &self,
        _request: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        thread_local! {
            static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
        }
        let file = lock(&self.shared.inodes).read(number.0);
        let Some(file) = file else { return reply.error(Errno::ESTALE) };
        BUFFER.with_borrow_mut(|buffer| {
            let size = size.min(MAX_REQUEST) as usize;
            if buffer.len() < size {
                buffer.resize(size, 0);
            }
            let Some(buffer) = buffer.get_mut(..size) else { return reply.error(Errno::EIO) };
            match self.read_file(file, offset, buffer) {
                Ok(filled) => reply.data(buffer.get(..filled).unwrap_or_default()),
                Err(fault) => {
                    self.fault_of_file(&file.digest, fault);
                    reply.error(Errno::EIO);
                }
            }
        });
    }

    fn readdir(
        &self,
        _request: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let full = self.dots(number.0, offset, |number, next, name| {
            reply.add(INodeNo(number), next, FileType::Directory, name)
        });
        if full {
            return reply.ok();
        }
        if number == INodeNo::ROOT {
            self.list_root(offset, Grant::Nothing, |number, name| {
                reply.add(INodeNo(number), number, FileType::Directory, name.as_os_str())
            });
            return reply.ok();
        }
        let listing = match self.listing(number.0) {
            Ok(listing) => listing,
            Err(errno) => return reply.error(errno),
        };
        let inodes = lock(&self.shared.inodes);
        for (position, next, name, node) in from_offset(&listing, offset) {
            let child = inodes.find(number.0, position, node).unwrap_or(UNKNOWN);
            if reply.add(INodeNo(child), next, Shape::from(node).kind(), name.as_os_str()) {
                break;
            }
        }
        drop(inodes);
        reply.ok();
    }

    /// Lists and grants a lookup of each entry listed, `.` and `..` excepted.
    fn readdirplus(
        &self,
        _request: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let mut add = |child: u64, next: u64, name: &OsStr, shape: Shape| {
            reply.add(INodeNo(child), next, name, &FOREVER, &self.attributes(child, shape), GENERATION)
        };
        let full = self
            .dots(number.0, offset, |number, next, name| add(number, next, name.as_ref(), Shape::Directory));
        if full {
            return reply.ok();
        }
        if number == INodeNo::ROOT {
            self.list_root(offset, Grant::Lookup, |child, name| {
                add(child, child, name.as_os_str(), Shape::Directory)
            });
            return reply.ok();
        }
        let listing = match self.listing(number.0) {
            Ok(listing) => listing,
            Err(errno) => return reply.error(errno),
        };
        let mut inodes = lock(&self.shared.inodes);
        for (position, next, name, node) in from_offset(&listing, offset) {
            let Some(child) = inodes.enter(number.0, position, node) else { break };
            if add(child, next, name.as_os_str(), node.into()) {
                inodes.forget(child, 1);
                break;
            }
        }
        drop(inodes);
        reply.ok();
    }

    fn statfs(&self, _request: &Request, _number: INodeNo, reply: ReplyStatfs) {
        reply.statfs(0, 0, 0, 0, 0, 4096, Name::MAX as u32, 4096);
    }

    // "Not implemented" makes the kernel open and close without asking, from the first time on.

    fn open(&self, _request: &Request, _number: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.error(Errno::ENOSYS);
    }

    fn opendir(&self, _request: &Request, _number: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.error(Errno::ENOSYS);
    }

    fn flush(&self, _request: &Request, _number: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    // Who only reads can lock what nobody writes at any time, and nothing needs to be kept of it. An exclusive lock would
    // have to be kept for one build alone, of a file that the kernel does not tell apart from that of others.

    fn getlk(
        &self,
        _request: &Request,
        _number: INodeNo,
        _: FileHandle,
        _: LockOwner,
        start: u64,
        end: u64,
        _kind: i32,
        pid: u32,
        reply: ReplyLock,
    ) {
        reply.locked(start, end, libc::F_UNLCK, pid);
    }

    fn setlk(
        &self,
        _request: &Request,
        _number: INodeNo,
        _: FileHandle,
        _: LockOwner,
        _start: u64,
        _end: u64,
        kind: i32,
        _pid: u32,
        _sleep: bool,
        reply: ReplyEmpty,
    ) {
        match kind {
            libc::F_WRLCK => reply.error(Errno::ENOLCK),
            _ => reply.ok(),
        }
    }

    // And these make it answer for us: there are no extended attributes, and modes are all there is.

    fn getxattr(&self, _request: &Request, _number: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _request: &Request, _number: INodeNo, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn access(&self, _request: &Request, _number: INodeNo, _: AccessFlags, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }
}
