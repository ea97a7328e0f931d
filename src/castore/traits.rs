//! What a store of blobs and directories can do, whatever it keeps them in.
//!
//! Calls block: whoever reads a store in bulk (the view, ingest, export) works in threads of its own,
//! and the gRPC services move each call off their executor.

use std::fs::File;
use std::io;
use std::sync::Arc;

use super::node::{Digest, Directory, NodeError};

/// Keeps blobs: byte strings of any length, named by their digest.
pub trait BlobService: Send + Sync {
    /// What can be said of a blob without opening it; `None` where there is none of this digest.
    ///
    /// # Errors
    /// Where the store can't tell.
    fn stat(&self, digest: &Digest) -> Result<Option<BlobStat>, StoreError>;

    /// Opens a blob; `None` where there is none of this digest.
    ///
    /// # Errors
    /// Where the store can't tell, or can't read it.
    fn open(&self, digest: &Digest) -> Result<Option<Arc<dyn Blob>>, StoreError>;

    /// Begins a new blob. It comes into being, whole, with [`BlobWriter::finish`]; a writer that is
    /// dropped before leaves nothing.
    ///
    /// # Errors
    /// Where the store can't be written to.
    fn create(&self) -> Result<Box<dyn BlobWriter>, StoreError>;
}

/// What a store says of a blob that it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlobStat {
    /// Its length in bytes. `None` where the store would have to read it to say so, as one behind gRPC may:
    /// the protocol has no field for it.
    pub size: Option<u64>,
}

/// A blob, open for reading.
pub trait Blob: Send + Sync {
    /// Length in bytes.
    fn size(&self) -> u64;

    /// Reads bytes from `offset` on into `buffer`; fewer than asked for only at the end.
    ///
    /// # Errors
    /// Where the store can't give them.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Makes sure that the bytes are those that the digest names. Where that is known already, it takes no time.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] where they are not; others where they can't be read.
    fn verify(&self) -> Result<(), StoreError>;

    /// The file that is all of the blob, where there is one: copies of it may then share its blocks.
    fn as_file(&self) -> Option<&File> {
        None
    }
}

/// A blob in the making.
pub trait BlobWriter: io::Write + Send {
    /// Completes the blob.
    ///
    /// # Errors
    /// Where it could not be stored; nothing of it is left then.
    fn finish(self: Box<Self>) -> Result<Stored, StoreError>;
}

/// What became of a blob that was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Its digest.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// False where the store had it before, and knows that.
    pub new: bool,
}

/// Keeps directories, named by the digest of their canonical encoding.
pub trait DirectoryService: Send + Sync {
    /// The directory of this digest; `None` where there is none.
    ///
    /// # Errors
    /// Where the store can't tell, or holds something else under this digest.
    fn get(&self, digest: &Digest) -> Result<Option<Arc<Directory>>, StoreError>;

    /// Stores directories, children before parents, all of them or none.
    ///
    /// A store that lasts has them on disk when this returns, and with them every blob that was finished
    /// before; so an empty list is of use, too.
    ///
    /// # Errors
    /// [`StoreError::MissingChild`] and [`StoreError::ChildSize`] where a directory refers to one that is
    /// neither in the store nor among those before it, or states another size for it.
    fn put(&self, directories: Vec<Directory>) -> Result<(), StoreError>;

    /// Gives back memory that only saves work. What is needed of it is read again.
    fn trim(&self) {}
}

/// A store: the two services that belong together.
#[derive(Clone)]
pub struct Store {
    /// The blobs.
    pub blobs: Arc<dyn BlobService>,
    /// The directories.
    pub directories: Arc<dyn DirectoryService>,
}

/// Why a store could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The operating system refused something.
    #[error("can't {act} {object}: {source}")]
    Io {
        /// What was tried, as a verb.
        act: &'static str,
        /// What it was tried on.
        object: String,
        /// The refusal.
        source: io::Error,
    },
    /// The index of a store refused something.
    #[error("can't {act} the store's index: {source}")]
    Database {
        /// What was tried, as a verb.
        act: &'static str,
        /// The refusal.
        source: Box<redb::Error>,
    },
    /// The index of a store can't be read. What lies in the packs is found again without it, directories are not.
    #[error(
        "the index {path} is damaged: {reason}; `cofferdam store verify --repair` makes a new one for what the packs hold"
    )]
    DamagedIndex {
        /// Its file.
        path: String,
        /// What is wrong.
        reason: String,
    },
    /// What was stored may never have reached the disk, although the kernel now counts it as written.
    #[error(
        "a sync of the store at {path} has failed before, so nothing more is stored: see to the disk, mount its file \
         system anew, start cofferdam again and run `cofferdam store verify`"
    )]
    Unsynced {
        /// Where the store lies.
        path: String,
    },
    /// What stands under the digest is not what the digest names.
    #[error("the {kind} {digest} in the store is damaged")]
    Damaged {
        /// `blob` or `directory`.
        kind: &'static str,
        /// Its digest.
        digest: Digest,
    },
    /// A directory came before one of its children.
    #[error("the directory {parent} has a child \"{name}\" of digest {child}, which is not in the store")]
    MissingChild {
        /// The directory.
        parent: Digest,
        /// The child's name, escaped.
        name: String,
        /// The child's digest.
        child: Digest,
    },
    /// A directory states a wrong size for a child.
    #[error("the directory {parent} states size {stated} for its child \"{name}\", which has size {actual}")]
    ChildSize {
        /// The directory.
        parent: Digest,
        /// The child's name, escaped.
        name: String,
        /// The size stated.
        stated: u64,
        /// The size the child has.
        actual: u64,
    },
    /// Another process works on this store.
    #[error("the store at {path} is in use by another process")]
    InUse {
        /// Where it lies.
        path: String,
    },
    /// What came from the store is not valid.
    #[error("the store gave an invalid directory: {0}")]
    Invalid(#[from] NodeError),
    /// A store elsewhere refused something.
    #[error("the store at {address} could not {act}: {message}")]
    Remote {
        /// Its address.
        address: String,
        /// What it was asked, as a verb.
        act: &'static str,
        /// What it answered.
        message: String,
    },
}

impl StoreError {
    /// An operating system's refusal of `act` on `object`.
    pub fn io(act: &'static str, object: impl Into<String>, source: io::Error) -> Self {
        Self::Io { act, object: object.into(), source }
    }
}
