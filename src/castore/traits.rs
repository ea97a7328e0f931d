//! What a store of blobs and directories can do, whatever it keeps them in.
//!
//! Calls block: whoever reads a store in bulk (the view, ingest, export) works in threads of its own,
//! and the gRPC services move each call off their executor.

use std::fs::File;
use std::io;
use std::sync::Arc;

use super::node::{Digest, Directory, Node, NodeError};
use super::whole::Tree;

pub use super::whole::{MAX_TREE_BYTES, MAX_TREE_DIRECTORIES};

/// How much [`BlobService::copy`] reads at a time.
const COPY_BYTES: usize = 256 << 10;

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

    /// [`BlobService::open`] of a blob that has `size` bytes, as whoever names it says. A store that brings it from
    /// elsewhere takes no more than that.
    ///
    /// # Errors
    /// As [`BlobService::open`].
    fn open_sized(&self, digest: &Digest, size: u64) -> Result<Option<Arc<dyn Blob>>, StoreError> {
        let _ = size;
        self.open(digest)
    }

    /// [`BlobService::stat`] of many blobs, in their order. A store elsewhere is asked for several at a time.
    ///
    /// # Errors
    /// As [`BlobService::stat`].
    fn stat_all(&self, digests: &[Digest]) -> Result<Vec<Option<BlobStat>>, StoreError> {
        digests.iter().map(|digest| self.stat(digest)).collect()
    }

    /// Writes the bytes that the store gives for this digest to `to`; false where it has none. They are as they
    /// come: whoever takes them checks them. Where `to` refuses some, no more are fetched.
    ///
    /// # Errors
    /// Where the store can't give them; [`StoreError::Io`] where `to` refused them.
    fn copy(&self, digest: &Digest, to: &mut dyn io::Write) -> Result<bool, StoreError> {
        let Some(blob) = self.open(digest)? else { return Ok(false) };
        let mut buffer = vec![0; COPY_BYTES];
        let mut offset: u64 = 0;
        loop {
            let read = blob.read_at(&mut buffer, offset);
            let read = read.map_err(|source| StoreError::io("read", format!("the blob {digest}"), source))?;
            let Some(piece) = buffer.get(..read).filter(|piece| !piece.is_empty()) else { return Ok(true) };
            to.write_all(piece)
                .map_err(|source| StoreError::io("write", format!("the blob {digest}"), source))?;
            offset = offset.saturating_add(read as u64);
        }
    }

    /// Makes a blob last that was finished here and that no directory will name. (What directories name lasts with them,
    /// [`DirectoryService::put`].) A store on this machine has it already; one that stands for another sends it there.
    ///
    /// # Errors
    /// Where the store that lasts does not take it.
    fn keep(&self, digest: &Digest) -> Result<(), StoreError> {
        let _ = digest;
        Ok(())
    }

    /// Whether a blob can be opened and read, or found missing, as fast as a disk of this machine allows: then whoever
    /// serves others, too, may wait for that on the spot. What asks another machine must say no.
    fn is_near(&self, _digest: &Digest) -> bool {
        false
    }

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

    /// Whether all of it can be read as fast as a disk of this machine allows.
    fn is_near(&self) -> bool {
        false
    }

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

    /// Whether a directory can be had, or found missing, as fast as a disk of this machine allows. What asks another
    /// machine must say no.
    fn is_near(&self, _digest: &Digest) -> bool {
        false
    }

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

    /// The directory of this digest with all below it, each once and after one that refers to it; `None` where it is
    /// not there itself.
    ///
    /// # Errors
    /// As [`DirectoryService::get`]; [`StoreError::MissingChild`] where something below it is not there;
    /// [`StoreError::TooLarge`] beyond [`MAX_TREE_DIRECTORIES`] or [`MAX_TREE_BYTES`].
    fn get_tree(&self, root: &Digest) -> Result<Option<Vec<Arc<Directory>>>, StoreError> {
        let Some(directory) = self.get(root)? else { return Ok(None) };
        let mut tree = Tree::new(*root);
        tree.add(*root, directory)?;
        while let Some(next) = tree.wanted() {
            match self.get(&next)? {
                Some(directory) => tree.add(next, directory)?,
                None => break,
            };
        }
        tree.complete().map(Some)
    }

    /// Is told that the trees of `roots` will soon be walked, and their files read. A store that has them elsewhere
    /// brings the directories here before it returns, and may go on to fetch files.
    ///
    /// # Errors
    /// Where it can't bring them. What is not there is no error.
    fn prepare(&self, roots: &[Node]) -> Result<(), StoreError> {
        let _ = roots;
        Ok(())
    }

    /// Keeps the trees of `roots`, their blobs included, from being removed for as long as the value that this yields
    /// lives, and counts them as used now. A store that removes nothing by itself has nothing to do.
    fn lease(&self, roots: &[Node]) -> Lease {
        let _ = roots;
        Lease::default()
    }

    /// How many times this store has removed something by itself. Who remembers what is in it forgets that when this
    /// changes.
    fn removals(&self) -> u64 {
        0
    }
}

/// Keeps trees in a store until it is dropped.
#[derive(Default)]
pub struct Lease(Option<Box<dyn std::any::Any + Send + Sync>>);

impl Lease {
    /// One that ends when `guard` is dropped.
    pub fn new(guard: impl Send + Sync + 'static) -> Self {
        Self(Some(Box::new(guard)))
    }
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Lease").field(&self.0.is_some()).finish()
    }
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
        /// What it was asked, as a verb with its object.
        act: String,
        /// What it answered, or that it did not.
        message: String,
    },
    /// A store elsewhere gave other bytes than those of the digest. They were thrown away.
    #[error("the store at {address} gave something else for the {kind} {digest}: {fault}")]
    Wrong {
        /// Its address.
        address: String,
        /// `blob` or `directory`.
        kind: &'static str,
        /// The digest that was asked for.
        digest: Digest,
        /// What is wrong with what came.
        fault: Box<WrongBytes>,
    },
    /// A tree has more directories, or larger ones, than are taken at a time.
    #[error(
        "the tree {root} is too large: at most {MAX_TREE_DIRECTORIES} directories of {MAX_TREE_BYTES} bytes in all"
    )]
    TooLarge {
        /// Its root.
        root: Digest,
    },
    /// Others could change what lies in the store.
    #[error(
        "{path} can't be a store: it has mode {mode:04o}: others than its owner may write to it; chmod go-w it"
    )]
    Writable {
        /// The directory.
        path: String,
        /// Its permission bits.
        mode: u32,
    },
    /// Something else is in the way of a new store.
    #[error("{path} is not empty and no store of cofferdam; choose another place with --store local:PATH")]
    NotAStore {
        /// The directory.
        path: String,
    },
    /// The thread that another one waited for has panicked.
    #[error("the store's work was abandoned")]
    Abandoned,
    /// What another caller was told who had asked for the same at the same time.
    #[error("{0}")]
    Shared(Arc<StoreError>),
}

/// What can be wrong with bytes that should have a certain digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WrongBytes {
    /// They have another.
    #[error("{size} bytes with the digest {actual}")]
    Digest {
        /// How many came.
        size: u64,
        /// Their digest.
        actual: Digest,
    },
    /// They end too early.
    #[error("{size} bytes instead of {stated}")]
    Short {
        /// How many came.
        size: u64,
        /// How many there should be.
        stated: u64,
    },
    /// They go on where they should end.
    #[error("more than {limit} bytes")]
    Long {
        /// How many there may be.
        limit: u64,
    },
}

impl StoreError {
    /// An operating system's refusal of `act` on `object`.
    pub fn io(act: &'static str, object: impl Into<String>, source: io::Error) -> Self {
        Self::Io { act, object: object.into(), source }
    }
}
