//! From a tree on disk to nodes in the store.
//!
//! What a build left behind is hostile: pipes that would block whoever opens them, links that lead
//! elsewhere, depth without end. So every step goes by directory descriptor, never follows a link, never
//! waits, and takes an entry's type from the descriptor it then reads. Nothing is looked up twice by path,
//! and no recursion follows the depth of the tree.
//!
//! Every byte is read once: it is scanned, hashed and stored on the way.
//!
//! # Who does what
//! * One `walk` lists the directories, in the order of names.
//! * Files are `read` by a few threads, which take them from a bounded `queue`. They are started only
//!   once there is enough for them to do; before, and where there is one processor, the walk reads files itself.
//! * Whoever has the last entry of a directory completes it, and the one above if that was the last one there
//!   (`directories`).
//!
//! The walk holds a descriptor for each directory on the way to where it stands, up to [`MAX_DEPTH`], and each file
//! in the queue one of the directory that it lies in.

use std::ffi::OsStr;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use nix::fcntl::AT_FDCWD;

use super::node::{Name, Node, printable};
use super::traits::{Store, Stored};
use crate::refscan::Scanner;
use queue::Crew;

pub use error::{FileKind, IngestError, TreeFault};

mod directories;
mod error;
mod queue;
mod read;
#[cfg(test)]
mod tests;
mod walk;

/// How many directories may lie in one another, the root included.
pub const MAX_DEPTH: usize = 512;

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
    /// Counts what is taken, for whoever wants to know.
    pub tally: Option<&'a Tally>,
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
    /// reading or storing failed. Where several things are wrong it is the first one, in the order of names; what an
    /// allowance does not last for is one of them.
    pub fn path(&self, path: &Path) -> Result<Node, IngestError> {
        // A slash at the end would follow the link; components have none.
        walk::tree(self, AT_FDCWD, path.components().as_path().as_os_str(), &Crew::of_this_machine())
    }

    /// Takes in the entry `name` of `dir`, as [`Ingest::path`] does, but looks at nothing outside of `dir`.
    ///
    /// # Errors
    /// As [`Ingest::path`]; a `name` that isn't one file name is refused.
    pub fn at(&self, dir: BorrowedFd<'_>, name: &OsStr) -> Result<Node, IngestError> {
        let name = Name::new(name.as_bytes())
            .map_err(|source| TreeFault::Name { path: printable(name.as_bytes()), source })?;
        walk::tree(self, dir, name.as_os_str(), &Crew::of_this_machine())
    }
}

/// Counts of what was taken into a store. They can be read while that goes on.
#[derive(Debug, Default)]
pub struct Tally {
    files: AtomicU64,
    bytes: AtomicU64,
    new_files: AtomicU64,
    new_bytes: AtomicU64,
}

/// What a [`Tally`] has come to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// How many files were taken.
    pub files: u64,
    /// How many bytes they hold.
    pub bytes: u64,
    /// How many of them the store did not have, as far as it knows.
    pub new_files: u64,
    /// How many bytes these hold.
    pub new_bytes: u64,
}

impl Totals {
    /// Both together.
    pub fn and(self, other: Self) -> Self {
        let Self { files, bytes, new_files, new_bytes } = self;
        Self {
            files: files.saturating_add(other.files),
            bytes: bytes.saturating_add(other.bytes),
            new_files: new_files.saturating_add(other.new_files),
            new_bytes: new_bytes.saturating_add(other.new_bytes),
        }
    }
}

impl Tally {
    /// Notes bytes that have been read.
    pub fn read(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Notes a file whose bytes have all been read.
    pub fn stored(&self, stored: &Stored) {
        self.files.fetch_add(1, Ordering::Relaxed);
        if stored.new {
            self.new_files.fetch_add(1, Ordering::Relaxed);
            self.new_bytes.fetch_add(stored.size, Ordering::Relaxed);
        }
    }

    /// What it has come to by now.
    pub fn totals(&self) -> Totals {
        let now = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Totals {
            files: now(&self.files),
            bytes: now(&self.bytes),
            new_files: now(&self.new_files),
            new_bytes: now(&self.new_bytes),
        }
    }
}
