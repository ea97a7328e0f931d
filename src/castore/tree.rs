//! From nodes in the store to files on disk, and to a list.

use std::ffi::{CString, OsStr};
use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::vec;

use cofferdam_sandbox::scratch::remove_tree;
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::symlinkat;

use super::cursor::Cursor;
use super::ingest::{MAX_DEPTH, Tally};
use super::look::{self, Look};
use super::node::{Digest, Directory, Name, Node, NodeError};
use super::traits::{Blob, Store, StoreError, Stored};

#[cfg(test)]
mod tests;

/// Contents are copied in pieces of this size.
const BUFFER_BYTES: usize = 256 * 1024;

/// Lays `node` out as the new entry `name` of `dir`.
///
/// It looks like [`Look::Plain`]. Nothing that exists is overwritten or followed, and contents are checked
/// against their digest. What was made before a failure is removed again, as far as that is possible.
///
/// Where the store's file system can share blocks between files, nothing is copied.
///
/// # Errors
/// [`ExportError::Missing`], [`ExportError::Contents`] and [`ExportError::Size`] where the store doesn't
/// hold what the tree says, [`ExportError::Io`] where it can't be written; among these is `EEXIST` for a
/// `name` that is taken.
pub fn export(store: &Store, node: &Node, dir: BorrowedFd<'_>, name: &OsStr) -> Result<(), ExportError> {
    export_unless(store, node, dir, name, Look::Plain, &AtomicBool::new(false))
}

/// [`export`] with any `look`, unless `cancel` turns true on the way.
///
/// # Errors
/// Those of [`export`], and [`ExportError::Cancelled`].
pub fn export_unless(
    store: &Store,
    node: &Node,
    dir: BorrowedFd<'_>,
    name: &OsStr,
    look: Look,
    cancel: &AtomicBool,
) -> Result<(), ExportError> {
    Export { look, ..Export::plain(store, cancel) }.to(node, dir, name)
}

/// How trees are laid out.
pub struct Export<'a> {
    /// Where they come from.
    pub store: &'a Store,
    /// What they look like.
    pub look: Look,
    /// Counts what is written, for whoever wants to know. Nothing of it is new.
    pub tally: Option<&'a Tally>,
    /// Once this is true the work ends with [`ExportError::Cancelled`].
    pub cancel: &'a AtomicBool,
}

impl<'a> Export<'a> {
    /// As [`Look::Plain`], not counted.
    pub fn plain(store: &'a Store, cancel: &'a AtomicBool) -> Self {
        Self { store, look: Look::Plain, tally: None, cancel }
    }

    /// Lays `node` out as the new entry `name` of `dir`, as [`export`] does.
    ///
    /// # Errors
    /// Those of [`export`], and [`ExportError::Cancelled`].
    pub fn to(&self, node: &Node, dir: BorrowedFd<'_>, name: &OsStr) -> Result<(), ExportError> {
        let name = Name::new(name.as_bytes()).map_err(|source| ExportError::Name { source })?;
        let mut layout =
            Layout { export: self, buffer: vec![0; BUFFER_BYTES], path: Cursor::new(), made: false };
        let done = layout.tree(node, dir, &name);
        if done.is_err() && layout.made {
            // The first failure is the one to tell of.
            let _ = CString::new(name.as_bytes()).map(|name| remove_tree(dir, &name));
        }
        done
    }
}

/// A tree on its way to the disk.
struct Layout<'a> {
    export: &'a Export<'a>,
    buffer: Vec<u8>,
    path: Cursor,
    /// Whether anything was made, so the root at least.
    made: bool,
}

/// A directory that was made: its files are there, these directories are not yet. The last one is being
/// worked on.
struct Made {
    fd: OwnedFd,
    left: Vec<(Name, Digest)>,
}

impl Layout<'_> {
    fn tree(&mut self, node: &Node, dir: BorrowedFd<'_>, name: &Name) -> Result<(), ExportError> {
        let Node::Directory { digest, .. } = node else {
            return self.leaf(node, dir, name);
        };
        let mut above = vec![self.directory(digest, dir, name)?];
        while let Some(parent) = above.last() {
            let Some((name, digest)) = parent.left.last() else {
                // Only now: what is made in a directory changes its time.
                let sealed = look::seal_directory(parent.fd.as_fd(), self.export.look);
                sealed.map_err(|errno| self.failed("finish", errno))?;
                above.pop();
                if let Some(parent) = above.last_mut() {
                    parent.left.pop();
                    self.path.leave();
                }
                continue;
            };
            self.path.enter(name);
            if above.len() == MAX_DEPTH {
                return Err(ExportError::TooDeep { path: self.path.to_string() });
            }
            let made = self.directory(digest, parent.fd.as_fd(), name)?;
            above.push(made);
        }
        Ok(())
    }

    /// Makes a directory with all of its entries that are not directories.
    fn directory(&mut self, digest: &Digest, dir: BorrowedFd<'_>, name: &Name) -> Result<Made, ExportError> {
        self.check_cancelled()?;
        let directory = load(self.export.store, digest, &self.path)?;
        mkdirat(dir, name.as_os_str(), Mode::from_bits_truncate(0o755))
            .map_err(|errno| self.failed("create", errno))?;
        self.made = true;
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = openat(dir, name.as_os_str(), flags, Mode::empty())
            .map_err(|errno| self.failed("open", errno))?;
        let mut left = Vec::new();
        for (name, node) in directory.entries() {
            if let Node::Directory { digest, .. } = node {
                left.push((name.clone(), *digest));
            } else {
                self.path.enter(name);
                self.leaf(node, fd.as_fd(), name)?;
                self.path.leave();
            }
        }
        Ok(Made { fd, left })
    }

    fn leaf(&mut self, node: &Node, dir: BorrowedFd<'_>, name: &Name) -> Result<(), ExportError> {
        self.check_cancelled()?;
        match node {
            Node::Directory { .. } => Ok(()),
            Node::Symlink { target } => {
                symlinkat(OsStr::from_bytes(target.as_bytes()), dir, name.as_os_str())
                    .map_err(|errno| self.failed("create", errno))?;
                self.made = true;
                look::seal_symlink(dir, name, self.export.look).map_err(|errno| self.failed("finish", errno))
            }
            Node::File { digest, size, executable } => {
                let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
                let mode = Mode::from_bits_truncate(if *executable { 0o755 } else { 0o644 });
                let file = openat(dir, name.as_os_str(), flags, mode)
                    .map_err(|errno| self.failed("create", errno))?;
                self.made = true;
                let file = File::from(file);
                self.contents(&file, digest, *size)?;
                look::seal_file(file.as_fd(), *executable, self.export.look)
                    .map_err(|errno| self.failed("finish", errno))
            }
        }
    }

    /// Fills a new file with a blob. What it then holds is checked, not what the store was seen to hold.
    fn contents(&mut self, mut file: &File, digest: &Digest, stated: u64) -> Result<(), ExportError> {
        let io = |act, path: &Cursor, source| ExportError::Io { act, path: path.to_string(), source };
        let blob = self.export.store.blobs.open_sized(digest, stated)?;
        let blob = blob.ok_or_else(|| missing(ObjectKind::Blob, digest, &self.path))?;
        let shared = shares_blocks(file, &*blob);
        let mut hasher = blake3::Hasher::new();
        loop {
            self.check_cancelled()?;
            let count = match shared {
                true => file.read_at(&mut self.buffer, hasher.count()),
                false => blob.read_at(&mut self.buffer, hasher.count()),
            };
            let count = count.map_err(|error| io("read the contents of", &self.path, error))?;
            let Some(chunk) = self.buffer.get(..count).filter(|chunk| !chunk.is_empty()) else { break };
            hasher.update(chunk);
            if let Some(tally) = self.export.tally {
                tally.read(chunk.len() as u64);
            }
            if !shared {
                file.write_all(chunk).map_err(|error| io("write", &self.path, error))?;
            }
        }
        if Digest::from(hasher.finalize()) != *digest {
            return Err(ExportError::Contents { path: self.path.to_string(), digest: *digest });
        }
        let actual = hasher.count();
        if actual != stated {
            return Err(ExportError::Size { path: self.path.to_string(), digest: *digest, stated, actual });
        }
        if let Some(tally) = self.export.tally {
            tally.stored(&Stored { digest: *digest, size: actual, new: false });
        }
        Ok(())
    }

    fn check_cancelled(&self) -> Result<(), ExportError> {
        if self.export.cancel.load(Ordering::Relaxed) { Err(ExportError::Cancelled) } else { Ok(()) }
    }

    fn failed(&self, act: &'static str, errno: Errno) -> ExportError {
        ExportError::Io { act, path: self.path.to_string(), source: errno.into() }
    }
}

/// Makes `file` share the blocks of a blob, where the file system can (`FICLONE`): btrfs, XFS and some others,
/// if both lie on the same one.
fn shares_blocks(file: &File, blob: &dyn Blob) -> bool {
    blob.as_file().is_some_and(|from| rustix::fs::ioctl_ficlone(file, from).is_ok())
}

/// Everything in the tree of `node`, each with its path relative to it: first `node` itself, with an empty
/// path, then what lies below it. Entries of a directory ascend by name, and each is followed by what lies
/// below it.
///
/// The list ends with the first error.
pub fn list<'a>(store: &'a Store, node: &Node) -> Listing<'a> {
    Listing { store, above: Vec::new(), path: Cursor::new(), root: Some(node.clone()), below: None }
}

/// The iterator that [`list`] returns.
pub struct Listing<'a> {
    store: &'a Store,
    /// The entries left of each directory on the way to the entry listed last.
    above: Vec<vec::IntoIter<(Name, Node)>>,
    path: Cursor,
    root: Option<Node>,
    /// The entry listed last, if it is a directory.
    below: Option<Digest>,
}

impl Listing<'_> {
    /// Goes on to the entries of the directory listed last.
    fn descend(&mut self, digest: &Digest) -> Result<(), ExportError> {
        if self.above.len() == MAX_DEPTH {
            return Err(ExportError::TooDeep { path: self.path.to_string() });
        }
        let directory = load(self.store, digest, &self.path)?;
        let entries: Vec<_> = directory.entries().map(|(name, node)| (name.clone(), node.clone())).collect();
        self.above.push(entries.into_iter());
        Ok(())
    }

    fn listed(&mut self, node: Node) -> (Vec<u8>, Node) {
        if let Node::Directory { digest, .. } = &node {
            self.below = Some(*digest);
        }
        (self.path.as_bytes().to_vec(), node)
    }
}

impl Iterator for Listing<'_> {
    type Item = Result<(Vec<u8>, Node), ExportError>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some(root) = self.root.take() {
            return Some(Ok(self.listed(root)));
        }
        if let Some(digest) = self.below.take()
            && let Err(error) = self.descend(&digest)
        {
            self.above.clear();
            return Some(Err(error));
        }
        loop {
            self.path.rise_to(self.above.len().saturating_sub(1));
            if let Some((name, node)) = self.above.last_mut()?.next() {
                self.path.enter(&name);
                return Some(Ok(self.listed(node)));
            }
            self.above.pop();
        }
    }
}

fn load(store: &Store, digest: &Digest, path: &Cursor) -> Result<Arc<Directory>, ExportError> {
    let directory = store.directories.get(digest)?;
    directory.ok_or_else(|| missing(ObjectKind::Directory, digest, path))
}

fn missing(kind: ObjectKind, digest: &Digest, path: &Cursor) -> ExportError {
    ExportError::Missing { path: path.to_string(), kind, digest: *digest }
}

/// The two kinds of things that a digest may name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ObjectKind {
    /// The contents of a file.
    Blob,
    /// A directory.
    Directory,
}

impl fmt::Display for ObjectKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Blob => "blob",
            Self::Directory => "directory",
        })
    }
}

/// Why a tree could not be laid out or listed. Paths are relative to its root, which itself is `.`, and
/// escaped.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The name given for the root is no name.
    #[error("can't lay out a tree: {source}")]
    Name {
        /// What is wrong with it.
        source: NodeError,
    },
    /// The store lacks a part of the tree.
    #[error("the {kind} {digest}, needed for {path}, is not in the store")]
    Missing {
        /// What it is needed for.
        path: String,
        /// What is missing.
        kind: ObjectKind,
        /// Its digest.
        digest: Digest,
    },
    /// The store gave other bytes than the digest names.
    #[error("the store's contents for {path} are not those of digest {digest}")]
    Contents {
        /// The file.
        path: String,
        /// The digest of what it should contain.
        digest: Digest,
    },
    /// The tree states a wrong size for a file.
    #[error("{path} is said to have {stated} bytes, but blob {digest} has {actual}")]
    Size {
        /// The file.
        path: String,
        /// The digest of what it contains.
        digest: Digest,
        /// The size that its directory states, in bytes.
        stated: u64,
        /// The size of the blob in bytes.
        actual: u64,
    },
    /// Directories lie too deep in one another.
    #[error("{path} lies too deep: at most {MAX_DEPTH} directories may lie in one another")]
    TooDeep {
        /// The first directory that is too deep.
        path: String,
    },
    /// The operating system refused something.
    #[error("can't {act} {path}: {source}")]
    Io {
        /// What was tried, as a verb.
        act: &'static str,
        /// What it was tried on.
        path: String,
        /// The refusal.
        source: io::Error,
    },
    /// The store could not say what the tree consists of.
    #[error("can't read the tree: {0}")]
    Store(#[from] StoreError),
    /// It was told to end.
    #[error("cancelled")]
    Cancelled,
}
