//! Answers to the kernel's requests.
//!
//! What is at hand is answered by the thread that took the request. What may take long is left to [`Far`], whose
//! threads answer it when they have it: nothing here waits for a store that is not near.
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

use super::ahead::Ahead;
use super::far::{Far, Given, Wish};
use super::inodes::{Entries, FileId, Inode, KEPT, KEPT_NAME, Listing, Place, ROOT, Reading};
use super::{Fault, Shared};
use crate::castore::{Name, Node, look};
use crate::lock::lock;

/// How long the kernel may believe an answer: for ever, as far as it can count.
const FOREVER: Duration = Duration::from_secs(u32::MAX as u64);

/// Numbers are never used again, so there is one generation of each.
const GENERATION: Generation = Generation(0);

/// Reads from the page cache that the kernel has under way, at most at a time. Those beyond wait in the kernel, and
/// everybody's behind them: so more than a stalled store can keep waiting in all likelihood.
const MAX_BACKGROUND: u16 = 4096;

/// Largest read in bytes; the kernel derives it from what it may write.
const MAX_REQUEST: u32 = 1 << 20;

/// What stands for the number of an entry that has none yet, as libfuse has it. (0 would hide the entry.)
const UNKNOWN: u64 = u32::MAX as u64;

/// Offset that follows `..`; entries come after it.
pub(super) const AFTER_DOTS: u64 = 2;

/// The file system.
pub struct Castore {
    shared: Arc<Shared>,
    far: Far,
    ahead: Ahead,
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
    /// The file system that shows what `shared` holds.
    pub fn new(shared: Arc<Shared>, far: Far, ahead: Ahead) -> Self {
        Self { shared, far, ahead }
    }

    /// Has `answer` told of the entries of a directory other than the root: now, if they are at hand.
    fn with_listing(
        &self,
        number: u64,
        answer: impl FnOnce(&Shared, Result<Arc<Listing>, Errno>) + Send + 'static,
    ) {
        let (place, digest) = match self.shared.inode(number) {
            Ok(Inode::Directory(_, Entries::Known(listing))) => return answer(&self.shared, Ok(listing)),
            Ok(Inode::Directory(place, Entries::Stored(digest))) => (place, digest),
            Ok(Inode::Kept) => return answer(&self.shared, Ok(Arc::default())),
            Ok(_) => return answer(&self.shared, Err(Errno::ENOTDIR)),
            Err(errno) => return answer(&self.shared, Err(errno)),
        };
        if let Some(found) = self.shared.listing_at_hand(&digest) {
            return answer(&self.shared, self.shared.learn(number, place, found));
        }
        let shared = Arc::clone(&self.shared);
        self.far.ask(Wish::Listing(digest), move |given| {
            let found = given.and_then(|given| match given {
                Given::Listing(listing) => Ok(listing),
                Given::Bytes(_) => Err(Fault::MissingDirectory { digest }),
            });
            answer(&shared, shared.learn(number, place, found));
        });
    }
}

impl Castore {
    /// Answers a read of a file that is at hand.
    fn read_now(&self, file: FileId, offset: u64, size: usize, reply: ReplyData) {
        thread_local! {
            static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
        }
        BUFFER.with_borrow_mut(|buffer| {
            if buffer.len() < size {
                buffer.resize(size, 0);
            }
            let Some(buffer) = buffer.get_mut(..size) else { return reply.error(Errno::EIO) };
            match self.shared.read(file, offset, buffer) {
                Ok(filled) => reply.data(buffer.get(..filled).unwrap_or_default()),
                Err(fault) => {
                    self.shared.fault_of_file(&file.digest, fault);
                    reply.error(Errno::EIO);
                }
            }
        });
    }
}

impl Shared {
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
            uid: self.owner.uid,
            gid: self.owner.gid,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }

    fn inode(&self, number: u64) -> Result<Inode, Errno> {
        lock(&self.inodes).get(number).ok_or(Errno::ESTALE)
    }

    /// Grants a lookup; `None` where there is no such entry.
    fn enter(&self, parent: u64, listing: &Listing, name: &[u8]) -> Result<Option<FileAttr>, Errno> {
        let Some(position) = listing.find(name) else { return Ok(None) };
        let Some((_, node)) = listing.get(position) else { return Ok(None) };
        let number = lock(&self.inodes).enter(parent, position, node).ok_or(Errno::ESTALE)?;
        Ok(Some(self.attributes(number, node.into())))
    }

    /// Grants a lookup in the root.
    fn enter_root(&self, name: &OsStr) -> Option<FileAttr> {
        let number = match name {
            name if name == KEPT_NAME => KEPT,
            name => lock(&self.inodes).enter_build(name.as_bytes())?,
        };
        Some(self.attributes(number, Shape::Directory))
    }

    /// Grants a lookup of a file that is to be kept.
    fn enter_kept(&self, name: &OsStr) -> Option<FileAttr> {
        let number = name.to_str()?.parse().ok()?;
        let file = lock(&self.inodes).keep(number)?;
        Some(self.attributes(number, file.into()))
    }

    /// Notes the entries that were found for the directory `number`, or records that they could not be.
    fn learn(
        &self,
        number: u64,
        place: Place,
        found: Result<Arc<Listing>, Fault>,
    ) -> Result<Arc<Listing>, Errno> {
        match found {
            Ok(listing) => {
                lock(&self.inodes).fill(number, Arc::clone(&listing));
                Ok(listing)
            }
            Err(fault) => {
                self.fault(&[place.build], fault);
                Err(Errno::EIO)
            }
        }
    }

    /// Gives `.` and `..` from `offset` on to `add`, which takes (number, next offset, name) and says
    /// whether the reply is full, as this does.
    fn dots(&self, number: u64, offset: u64, mut add: impl FnMut(u64, u64, &str) -> bool) -> bool {
        let parent = match lock(&self.inodes).get(number) {
            Some(Inode::Directory(place, _)) => place.parent,
            _ => ROOT,
        };
        (offset < 1 && add(number, 1, ".")) || (offset < AFTER_DOTS && add(parent, AFTER_DOTS, ".."))
    }

    /// Lists the root: the live builds, whose numbers are the offsets too, since positions shift. Each
    /// entry that `add` had room for is one lookup granted, if `grant` says so.
    fn list_root(&self, offset: u64, grant: Grant, mut add: impl FnMut(u64, &Name) -> bool) {
        let mut after = offset.max(AFTER_DOTS);
        let mut inodes = lock(&self.inodes);
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

fn answer_entry(reply: ReplyEntry, found: Result<FileAttr, Errno>) {
    match found {
        Ok(attributes) => reply.entry(&FOREVER, &attributes, GENERATION),
        Err(errno) => reply.error(errno),
    }
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
            ROOT => self.shared.enter_root(name).ok_or(Errno::ENOENT),
            KEPT => self.shared.enter_kept(name).ok_or(Errno::ENOENT),
            parent => {
                let name = name.to_owned();
                return self.with_listing(parent, move |shared, listing| {
                    let found = listing.and_then(|listing| shared.enter(parent, &listing, name.as_bytes()));
                    // Number 0: there is nothing, and that may be kept.
                    let nothing = || shared.attributes(0, Shape::Directory);
                    answer_entry(reply, found.map(|found| found.unwrap_or_else(nothing)));
                });
            }
        };
        answer_entry(reply, found);
    }

    fn forget(&self, _request: &Request, number: INodeNo, lookups: u64) {
        lock(&self.shared.inodes).forget(number.0, lookups);
    }

    fn getattr(&self, _request: &Request, number: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.shared.inode(number.0) {
            Ok(inode) => reply.attr(&FOREVER, &self.shared.attributes(number.0, Shape::from(&inode))),
            Err(errno) => reply.error(errno),
        }
    }

    fn readlink(&self, _request: &Request, number: INodeNo, reply: ReplyData) {
        match self.shared.inode(number.0) {
            Ok(Inode::Symlink(target)) => reply.data(target.as_bytes()),
            Ok(_) => reply.error(Errno::EINVAL),
            Err(errno) => reply.error(errno),
        }
    }

    fn read(
        &self,
        request: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let reading = lock(&self.shared.inodes).read(number.0);
        let Some(Reading { file, seen }) = reading else { return reply.error(Errno::ESTALE) };
        let size = size.min(MAX_REQUEST) as usize;
        if offset == 0
            && let Some((directory, listing, position)) = seen
        {
            self.ahead.notice(request.pid(), directory, position, &listing);
        }
        if self.shared.is_at_hand(file) {
            return self.read_now(file, offset, size, reply);
        }
        let shared = Arc::clone(&self.shared);
        self.far.ask(Wish::Bytes(file, offset, size), move |given| match given {
            Ok(Given::Bytes(bytes)) => reply.data(&bytes),
            Ok(Given::Listing(_)) => reply.error(Errno::EIO),
            Err(fault) => {
                shared.fault_of_file(&file.digest, fault);
                reply.error(Errno::EIO);
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
        let full = self.shared.dots(number.0, offset, |number, next, name| {
            reply.add(INodeNo(number), next, FileType::Directory, name)
        });
        if full {
            return reply.ok();
        }
        if number == INodeNo::ROOT {
            self.shared.list_root(offset, Grant::Nothing, |number, name| {
                reply.add(INodeNo(number), number, FileType::Directory, name.as_os_str())
            });
            return reply.ok();
        }
        self.with_listing(number.0, move |shared, listing| {
            let listing = match listing {
                Ok(listing) => listing,
                Err(errno) => return reply.error(errno),
            };
            let inodes = lock(&shared.inodes);
            for (position, next, name, node) in from_offset(&listing, offset) {
                let child = inodes.find(number.0, position, node).unwrap_or(UNKNOWN);
                if reply.add(INodeNo(child), next, Shape::from(node).kind(), name.as_os_str()) {
                    break;
                }
            }
            drop(inodes);
            reply.ok();
        });
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
        fn add(
            reply: &mut ReplyDirectoryPlus,
            attributes: FileAttr,
            next: u64,
            name: impl AsRef<OsStr>,
        ) -> bool {
            reply.add(attributes.ino, next, name, &FOREVER, &attributes, GENERATION)
        }
        let shared = &self.shared;
        let full = shared.dots(number.0, offset, |number, next, name| {
            add(&mut reply, shared.attributes(number, Shape::Directory), next, name)
        });
        if full {
            return reply.ok();
        }
        if number == INodeNo::ROOT {
            shared.list_root(offset, Grant::Lookup, |child, name| {
                add(&mut reply, shared.attributes(child, Shape::Directory), child, name.as_os_str())
            });
            return reply.ok();
        }
        self.with_listing(number.0, move |shared, listing| {
            let listing = match listing {
                Ok(listing) => listing,
                Err(errno) => return reply.error(errno),
            };
            let mut inodes = lock(&shared.inodes);
            for (position, next, name, node) in from_offset(&listing, offset) {
                let Some(child) = inodes.enter(number.0, position, node) else { break };
                if add(&mut reply, shared.attributes(child, node.into()), next, name.as_os_str()) {
                    inodes.forget(child, 1);
                    break;
                }
            }
            drop(inodes);
            reply.ok();
        });
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
