//! Why a tree was not taken in.

use std::fmt;
use std::io;

use nix::libc;
use nix::sys::stat::FileStat;

use super::MAX_DEPTH;
use crate::castore::node::NodeError;
use crate::castore::traits::StoreError;

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
    pub(super) fn of(stat: &FileStat) -> Self {
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

/// Why a tree was not taken in. Paths begin with [`Ingest::label`](super::Ingest::label), which is the root, and are escaped.
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
