//! From a tree on disk to nodes in the store.
//!
//! What a build left behind is hostile: pipes that would block whoever opens them, links that lead
//! elsewhere, depth without end. So every step goes by directory descriptor, never follows a link, never
//! waits, and takes an entry's type from the descriptor it then reads. Nothing is looked up twice by path,
//! and no recursion follows the depth of the tree.
//!
//! Every byte is read once: it is scanned, hashed and stored on the way. A directory below the root takes one
//! file descriptor while it is worked on, so a walk holds up to [`MAX_DEPTH`] of them.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, openat, readlinkat};
use nix::libc;
use nix::sys::stat::{FileStat, Mode, fstat, fstatat};

use super::cursor::Cursor;
use super::node::{Digest, Directory, Name, Node, NodeError, Target, printable};
use super::traits::{Store, StoreError, Stored};
use crate::refscan::Scanner;

#[cfg(test)]
mod tests;

/// How many directories may lie in one another, the root included.
pub const MAX_DEPTH: usize = 512;

/// Contents are read in pieces of this size.
const BUFFER_BYTES: usize = 256 * 1024;

/// How trees are taken into a store.
pub struct Ingest<'a> {
    /// Where they go.
    pub store: &'a Store,
    /// Sees contents, targets of symbolic links and the names of all entries below the root.
    pub scanner: Option<&'a Scanner>,
    /// Names that are left out at the top level of a tree.
    pub skip: &'a [&'a [u8]],
    /// What the root is called in messages.
    pub label: &'a str,
    /// How many more bytes of contents are taken, where that is limited: those of a file without contents count as well,
    /// and those of one with several names once for each.
    pub allowance: Option<&'a AtomicU64>,
    /// Once this is true the work ends with [`IngestError::Cancelled`], within one piece of a file.
    pub cancel: &'a AtomicBool,
}

impl Ingest<'_> {
    /// Takes in what lies at `path`. Where that is a symbolic link, the link itself is taken, not what it
    /// points to; those on the way to it are followed.
    ///
    /// Blobs that were stored before a failure remain; directories come into the store with the root or not
    /// at all.
    ///
    /// # Errors
    /// [`IngestError::Tree`] where the tree can't be expressed in the castore, the other kinds where
    /// reading or storing failed.
    pub fn path(&self, path: &Path) -> Result<Node, IngestError> {
        // A slash at the end would follow the link; components have none.
        Walk::new(self).tree(AT_FDCWD, path.components().as_path().as_os_str())
    }

    /// Takes in the entry `name` of `dir`, as [`Ingest::path`] does, but looks at nothing outside of `dir`.
    ///
    /// # Errors
    /// As [`Ingest::path`]; a `name` that isn't one file name is refused.
    pub fn at(&self, dir: BorrowedFd<'_>, name: &OsStr) -> Result<Node, IngestError> {
        let name = Name::new(name.as_bytes())
            .map_err(|source| TreeFault::Name { path: printable(name.as_bytes()), source })?;
        Walk::new(self).tree(dir, name.as_os_str())
    }
}

/// One tree on its way into the store.
struct Walk<'a> {
    ingest: &'a Ingest<'a>,
    buffer: Vec<u8>,
    /// Complete directories, children before parents, each once.
    directories: Vec<Directory>,
    digests: HashSet<Digest>,
    path: Cursor,
}

/// A directory whose entries are being worked off.
struct Open {
    dir: Dir,
    /// The entries left, with their types where known; the last one is being worked on.
    entries: Vec<(Name, Option<Type>)>,
    directory: Directory,
}

/// What an entry turned out to be.
enum Found {
    Complete(Node),
    Directory(OwnedFd),
}

impl<'a> Walk<'a> {
    fn new(ingest: &'a Ingest<'a>) -> Self {
        Self {
            ingest,
            buffer: vec![0; BUFFER_BYTES],
            directories: Vec::new(),
            digests: HashSet::new(),
            path: Cursor::new(),
        }
    }

    fn tree(mut self, dir: BorrowedFd<'_>, root: &OsStr) -> Result<Node, IngestError> {
        let mut above: Vec<Open> = Vec::new();
        let mut found = self.entry(dir, root, None)?;
        loop {
            match found {
                Found::Directory(fd) if above.len() < MAX_DEPTH => {
                    let skip = if above.is_empty() { self.ingest.skip } else { &[] };
                    above.push(self.open(fd, skip)?);
                }
                Found::Directory(_) => return Err(TreeFault::TooDeep { path: self.shown() }.into()),
                Found::Complete(node) => {
                    let parent = above.last_mut();
                    let Some((parent, name)) =
                        parent.and_then(|open| open.entries.pop().map(|(name, _)| (open, name)))
                    else {
                        // The root: only now is everything known that it refers to. Where it is a
                        // file there are no directories; then this makes its blob last.
                        self.ingest.store.directories.put(self.directories)?;
                        if let Node::File { digest, .. } = &node {
                            self.ingest.store.blobs.keep(digest)?;
                        }
                        return Ok(node);
                    };
                    self.path.leave();
                    let inserted = parent.directory.insert(name, node);
                    inserted.map_err(|source| TreeFault::Name { path: self.shown(), source })?;
                }
            }
            found = match above.last() {
                Some(Open { dir, entries, .. }) if !entries.is_empty() => {
                    let (name, hint) = &entries[entries.len() - 1];
                    self.path.enter(name);
                    self.entry(dir.as_fd(), name.as_os_str(), *hint)?
                }
                _ => Found::Complete(self.close(above.pop())),
            };
        }
    }

    /// Lists a directory that was found.
    fn open(&self, fd: OwnedFd, skip: &[&[u8]]) -> Result<Open, IngestError> {
        let failed = |errno| self.failed("list", errno);
        let mut dir = Dir::from_fd(fd).map_err(failed)?;
        let mut entries = Vec::new();
        for entry in dir.iter() {
            self.check_cancelled()?;
            let entry = entry.map_err(failed)?;
            let name = entry.file_name().to_bytes();
            if name == b"." || name == b".." || skip.contains(&name) {
                continue;
            }
            self.scan(name);
            let name = Name::new(name).map_err(|source| TreeFault::Name { path: self.shown(), source })?;
            entries.push((name, entry.file_type()));
        }
        Ok(Open { dir, entries, directory: Directory::new() })
    }

    /// Notes a directory all of whose entries are known.
    fn close(&mut self, open: Option<Open>) -> Node {
        let directory = open.map(|open| open.directory).unwrap_or_default();
        let digest = directory.digest();
        let size = directory.size();
        if self.digests.insert(digest) {
            self.directories.push(directory);
        }
        Node::Directory { digest, size }
    }

    /// Takes in one entry, or opens it where it is a directory. `hint` saves a look where the directory said
    /// what the entry is.
    fn entry(&mut self, dir: BorrowedFd<'_>, name: &OsStr, hint: Option<Type>) -> Result<Found, IngestError> {
        self.check_cancelled()?;
        match hint {
            Some(Type::File | Type::Directory) => return self.open_entry(dir, name),
            Some(Type::Symlink) => return self.symlink(dir, name),
            _ => {}
        }
        // Opening a device may set it in motion, so what is unknown is looked at first.
        let stat = fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW)
            .map_err(|errno| self.failed("look at", errno))?;
        match stat.st_mode & libc::S_IFMT {
            libc::S_IFREG | libc::S_IFDIR => self.open_entry(dir, name),
            libc::S_IFLNK => self.symlink(dir, name),
            _ => Err(self.unsupported(&stat)),
        }
    }

    fn open_entry(&mut self, dir: BorrowedFd<'_>, name: &OsStr) -> Result<Found, IngestError> {
        let flags =
            OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC | OFlag::O_NOCTTY;
        let fd = openat(dir, name, flags, Mode::empty()).map_err(|errno| self.failed("open", errno))?;
        let stat = fstat(&fd).map_err(|errno| self.failed("look at", errno))?;
        match stat.st_mode & libc::S_IFMT {
            libc::S_IFREG => self.file(fd.into(), stat.st_mode & libc::S_IXUSR != 0),
            libc::S_IFDIR => Ok(Found::Directory(fd)),
            _ => Err(self.unsupported(&stat)),
        }
    }

    fn file(&mut self, mut file: File, executable: bool) -> Result<Found, IngestError> {
        let mut writer = self.ingest.store.blobs.create()?;
        let mut stream = self.ingest.scanner.map(Scanner::stream);
        loop {
            self.check_cancelled()?;
            let chunk = match file.read(&mut self.buffer) {
                Ok(0) => break,
                Ok(count) => &self.buffer[..count],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => return Err(IngestError::Io { act: "read", path: self.shown(), source }),
            };
            self.charge(chunk.len() as u64)?;
            if let Some(stream) = &mut stream {
                stream.feed(chunk);
            }
            writer.write_all(chunk).map_err(|error| StoreError::io("write", "a new blob", error))?;
        }
        let Stored { digest, size, .. } = writer.finish()?;
        Ok(Found::Complete(Node::File { digest, size, executable }))
    }

    /// Takes `bytes` from the allowance.
    fn charge(&self, bytes: u64) -> Result<(), IngestError> {
        let Some(allowance) = self.ingest.allowance else { return Ok(()) };
        let charge = |left: u64| left.checked_sub(bytes);
        match allowance.fetch_update(Ordering::Relaxed, Ordering::Relaxed, charge) {
            Ok(_) => Ok(()),
            Err(_) => Err(IngestError::TooMuch { path: self.shown() }),
        }
    }

    fn symlink(&self, dir: BorrowedFd<'_>, name: &OsStr) -> Result<Found, IngestError> {
        let target = readlinkat(dir, name).map_err(|errno| self.failed("read", errno))?.into_vec();
        self.scan(&target);
        let target =
            Target::new(target).map_err(|source| TreeFault::Target { path: self.shown(), source })?;
        Ok(Found::Complete(Node::Symlink { target }))
    }

    fn scan(&self, whole: &[u8]) {
        if let Some(scanner) = self.ingest.scanner {
            scanner.scan(whole);
        }
    }

    fn check_cancelled(&self) -> Result<(), IngestError> {
        if self.ingest.cancel.load(Ordering::Relaxed) { Err(IngestError::Cancelled) } else { Ok(()) }
    }

    /// Where the walk stands, for people.
    fn shown(&self) -> String {
        self.path.below(self.ingest.label)
    }

    fn unsupported(&self, stat: &FileStat) -> IngestError {
        TreeFault::Unsupported { path: self.shown(), kind: FileKind::of(stat) }.into()
    }

    fn failed(&self, act: &'static str, errno: Errno) -> IngestError {
        match errno {
            Errno::ENOENT => TreeFault::NotFound { path: self.shown() }.into(),
            errno => IngestError::Io { act, path: self.shown(), source: errno.into() },
        }
    }
}

/// A kind of file that the castore has no node for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
    /// A character device.
    CharacterDevice,
    /// The character device 0:0, which an overlay leaves where a file of a lower layer was deleted.
    Whiteout,
    /// A block device.
    BlockDevice,
    /// Something that didn't exist when this was written.
    Unknown,
}

impl FileKind {
    fn of(stat: &FileStat) -> Self {
        match stat.st_mode & libc::S_IFMT {
            libc::S_IFIFO => Self::Fifo,
            libc::S_IFSOCK => Self::Socket,
            libc::S_IFCHR if stat.st_rdev == 0 => Self::Whiteout,
            libc::S_IFCHR => Self::CharacterDevice,
            libc::S_IFBLK => Self::BlockDevice,
            _ => Self::Unknown,
        }
    }
}

impl fmt::Display for FileKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fifo => "a fifo",
            Self::Socket => "a socket",
            Self::CharacterDevice => "a character device",
            Self::Whiteout => "a whiteout",
            Self::BlockDevice => "a block device",
            Self::Unknown => "of an unknown kind",
        })
    }
}

/// Why a tree was not taken in. Paths begin with [`Ingest::label`], which is the root, and are escaped.
#[derive(Debug, thiserror::Error)]
pub enum IngestError {
    /// The tree is at fault.
    #[error("{0}")]
    Tree(TreeFault),
    /// The operating system didn't let us read it.
    #[error("can't {act} {path}: {source}")]
    Io {
        /// What was tried, as a verb.
        act: &'static str,
        /// What it was tried on.
        path: String,
        /// The refusal.
        source: io::Error,
    },
    /// The store didn't take it.
    #[error("can't store the tree: {0}")]
    Store(#[from] StoreError),
    /// The allowance does not last.
    #[error("{path} is where the tree comes to hold more than it may")]
    TooMuch {
        /// The file that is too much.
        path: String,
    },
    /// It was told to end.
    #[error("cancelled")]
    Cancelled,
}

impl From<TreeFault> for IngestError {
    fn from(fault: TreeFault) -> Self {
        Self::Tree(fault)
    }
}

/// What makes it impossible to express a tree in the castore.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TreeFault {
    /// There is nothing: most likely at the root, else it went away during the walk.
    #[error("{path} does not exist")]
    NotFound {
        /// What was looked for.
        path: String,
    },
    /// An entry is neither a regular file, a directory nor a symbolic link.
    #[error("{path} is {kind}; only files, directories and symbolic links can be stored")]
    Unsupported {
        /// Where it lies.
        path: String,
        /// What it is.
        kind: FileKind,
    },
    /// Directories lie too deep in one another.
    #[error("{path} lies too deep: at most {MAX_DEPTH} directories may lie in one another")]
    TooDeep {
        /// The first directory that is too deep.
        path: String,
    },
    /// An entry can't stand in its directory.
    #[error("in {path}: {source}")]
    Name {
        /// The directory.
        path: String,
        /// What is wrong with the entry.
        source: NodeError,
    },
    /// The target of a symbolic link can't be stored.
    #[error("{path}: {source}")]
    Target {
        /// The symbolic link.
        path: String,
        /// What is wrong with its target.
        source: NodeError,
    },
}
