//! A store in a directory of its own on this machine.
//!
//! ```text
//! lock              locked for as long as anyone uses the store
//! packs/00000000    small blobs, one behind the other
//! blobs/af/af13…    one read-only file for each blob of more than 64 KiB, named by its digest
//! index.redb        directories by digest, in canonical encoding, and where small blobs lie in the packs
//! index.redb.damaged  an index that could not be read, moved aside ([`LocalStore::open_checked`])
//! tmp/              blobs in the making; swept when the store is opened
//! ```
//!
//! # What holds
//! * A blob's name is the digest of the bytes that were written; it appears whole, by a rename or with its place in a
//!   pack. Small blobs and directories are checked against their digest each time they are read.
//! * Every directory in the store has all its child directories there. A `put` stores all of its
//!   directories or none.
//! * After the death of the process all of that holds.
//! * After the death of the machine it holds for all that was stored before a `put` of directories that
//!   returned: the directories, and every blob that was finished before, are on disk then. Whoever takes in a
//!   tree ends with such a `put`, also where the tree is a single file.
//!
//! # What does not
//! * A blob that was finished after the last `put` may be missing after the death of the machine, or, where it has a file
//!   of its own, be cut off under its name. One that is empty, and should not be, counts as missing. One of another length does
//!   not; it is found out when its length is compared with what a tree states
//!   ([`Closure`](super::closure::Closure)). Storing either again mends it.
//! * After a sync that failed nothing more is put ([`StoreError::Unsynced`]). A larger blob that was not on disk by then may
//!   have other bytes under its name, once the page cache is gone; `verify` finds it. On a disk that is merely full,
//!   what does not fit is refused, and all goes on once there is room.
//! * An ephemeral store syncs nothing: it goes with its process.
//! * Blobs in files are not hashed again when they are opened. Whoever hands their bytes on to where they must be right does
//!   that while it copies them ([`export`](super::tree::export)), or asks for it before
//!   ([`Blob::verify`](super::Blob::verify)), which costs something only for those that this process has neither
//!   stored nor hashed, or that have changed since. What changes while it is open is not noticed.
//!
//! A `put` after which nothing new was stored costs no sync. One syncs the packs that have grown; after a few larger
//! blobs these, after many the whole file system, once; and the database once. The first one of a process always syncs
//! the file system: what the last one left is not known.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use nix::libc;

use super::node::Digest;
use super::traits::{Store, StoreError};
use crate::config::Lifetime;
pub use index::Object;

use index::Index;
use keep::Keep;
use packs::Packs;
use unsynced::Unsynced;
use verified::Verified;
use verify::Repair;

mod blobs;
#[cfg(test)]
mod crashes;
mod directories;
pub mod gc;
mod index;
mod keep;
pub mod keeper;
mod packs;
#[cfg(test)]
mod tests;
mod unsynced;
mod verified;
pub mod verify;

/// Mode of the directories that a store consists of: what it holds is its owner's business.
const DIRECTORY_MODE: u32 = 0o700;

/// A store in a directory on this machine, opened by this process alone.
pub struct LocalStore {
    root: Arc<Root>,
    index: Arc<Index>,
    packs: Arc<Packs>,
    store: Store,
}

impl LocalStore {
    /// Opens the store at `path`, or makes an empty one there. It remains locked until the last clone of
    /// [`LocalStore::store`] and the last [`BlobWriter`](super::BlobWriter) are gone.
    ///
    /// # Errors
    /// [`StoreError::InUse`] where another process (or another `LocalStore`) has it open;
    /// [`StoreError::Io`] and [`StoreError::Database`] where it can't be made or read.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        Self::open_for(path, Lifetime::Lasting)
    }

    /// [`LocalStore::open`] for a store that may be ephemeral: of such a one, nothing is made to reach the disk.
    ///
    /// # Errors
    /// As [`LocalStore::open`].
    pub fn open_for(path: &Path, lifetime: Lifetime) -> Result<Self, StoreError> {
        let root = Arc::new(Root::open(path, lifetime)?);
        let index = Index::open(Arc::clone(&root))?;
        Self::with(root, index)
    }

    /// [`LocalStore::open`], and reads the whole index. One that is damaged is moved aside where `repair` says so, and a
    /// new one is made for the blobs in the packs; directories have to be stored again. Yields the store, and to where the
    /// damaged index was moved.
    ///
    /// # Errors
    /// [`StoreError::DamagedIndex`] where it is and stays; others as [`LocalStore::open`].
    pub fn open_checked(path: &Path, repair: Repair) -> Result<(Self, Option<PathBuf>), StoreError> {
        let root = Arc::new(Root::open(path, Lifetime::Lasting)?);
        match (Index::open_checked(&root), repair) {
            (Ok(index), _) => Ok((Self::with(root, index)?, None)),
            (Err(StoreError::DamagedIndex { reason, .. }), Repair::Remove) => {
                let aside = index::move_aside(&root)?;
                tracing::error!(%reason, to = %aside.display(), "the store's index is damaged; it is moved aside");
                let store = Self::with(Arc::clone(&root), Index::open(root)?)?;
                store.packs.flush()?;
                Ok((store, Some(aside)))
            }
            (Err(error), _) => Err(error),
        }
    }

    fn with(root: Arc<Root>, index: Index) -> Result<Self, StoreError> {
        let index = Arc::new(index);
        let packs = Arc::new(Packs::open(Arc::clone(&root), Arc::clone(&index))?);
        let directories = directories::Directories::new(&root, &index, &packs);
        let blobs = blobs::Blobs::new(Arc::clone(&root), Arc::clone(&packs));
        let store = Store { blobs: Arc::new(blobs), directories: Arc::new(directories) };
        Ok(Self { root, index, packs, store })
    }

    /// The files of blobs that have one, with the digests that they are named by; and what else lies there.
    fn blob_files(&self) -> Result<Vec<(Option<Digest>, fs::DirEntry)>, StoreError> {
        let list = |dir: &Path| {
            let entries = fs::read_dir(dir).and_then(Iterator::collect::<io::Result<Vec<_>>>);
            entries.map_err(|error| failed("list", dir, error))
        };
        let blobs = self.root.path.join("blobs");
        let named = |file: fs::DirEntry| {
            let digest = file.file_name().to_str().and_then(|name| name.parse::<Digest>().ok());
            (digest.filter(|digest| blobs.join(blobs::place(digest)) == file.path()), file)
        };
        let mut files = Vec::new();
        for parent in list(&blobs)? {
            files.extend(list(&parent.path())?.into_iter().map(named));
        }
        Ok(files)
    }

    /// The two services.
    pub fn store(&self) -> Store {
        self.store.clone()
    }
}

/// The directory of a store: locked, complete and swept.
struct Root {
    path: PathBuf,
    /// `packs/`.
    packs: OwnedFd,
    /// `blobs/`.
    blobs: OwnedFd,
    /// `tmp/`.
    temporary: OwnedFd,
    /// Number of the next temporary file.
    next: AtomicU64,
    lifetime: Lifetime,
    unsynced: Unsynced,
    /// Whether any sync has failed.
    sync_failed: AtomicBool,
    verified: Verified,
    keep: Arc<Keep>,
    /// Bytes that have come since the keeper, if there is one, looked last.
    grown: AtomicU64,
    /// The lock goes with this description, when the last user of the store does.
    _lock: File,
}

impl Root {
    fn open(path: &Path, lifetime: Lifetime) -> Result<Self, StoreError> {
        let make = |path: &Path| {
            let made = DirBuilder::new().recursive(true).mode(DIRECTORY_MODE).create(path);
            made.map_err(|error| failed("create", path, error))
        };
        make(path)?;
        let lock = lock(path)?;
        // From here on nobody else is in there.
        let temporary = path.join("tmp");
        sweep(&temporary)?;
        make(&temporary)?;
        let packs = path.join("packs");
        make(&packs)?;
        let blobs = path.join("blobs");
        if !blobs.try_exists().map_err(|error| failed("look for", &blobs, error))? {
            // All or nothing, so that later ones need not look whether each is there.
            let new = temporary.join("blobs");
            (0..=u8::MAX).try_for_each(|first| make(&new.join(format!("{first:02x}"))))?;
            fs::rename(&new, &blobs).map_err(|error| failed("create", &blobs, error))?;
        }
        Ok(Self {
            path: path.to_owned(),
            packs: open_directory(&packs)?,
            blobs: open_directory(&blobs)?,
            temporary: open_directory(&temporary)?,
            next: AtomicU64::new(0),
            lifetime,
            unsynced: Unsynced::new(lifetime),
            sync_failed: AtomicBool::new(false),
            verified: Verified::new(),
            keep: Arc::new(Keep::new()),
            grown: AtomicU64::new(0),
            _lock: lock,
        })
    }

    /// Notes that a sync has failed. The kernel tells that once, and counts the pages as written from then on: nothing
    /// that is not on disk yet can be promised any more.
    fn note_failed_sync(&self) {
        self.sync_failed.store(true, Ordering::Release);
    }

    /// Refuses where a sync has failed.
    fn check_syncs(&self) -> Result<(), StoreError> {
        match self.sync_failed.load(Ordering::Acquire) {
            true => Err(StoreError::Unsynced { path: shown(&self.path) }),
            false => Ok(()),
        }
    }

    /// A name in `tmp/` that is not taken.
    fn temporary_name(&self) -> String {
        self.next.fetch_add(1, Ordering::Relaxed).to_string()
    }
}

fn lock(store: &Path) -> Result<File, StoreError> {
    let path = store.join("lock");
    let file = OpenOptions::new().create(true).write(true).truncate(false).mode(0o600).open(&path);
    let file = file.map_err(|error| failed("open", &path, error))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StoreError::InUse { path: shown(store) }),
        Err(TryLockError::Error(error)) => Err(failed("lock", &path, error)),
    }
}

/// Removes what a killed process left half made.
fn sweep(temporary: &Path) -> Result<(), StoreError> {
    match fs::remove_dir_all(temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("empty", temporary, error)),
        _ => Ok(()),
    }
}

fn open_directory(path: &Path) -> Result<OwnedFd, StoreError> {
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW).open(path);
    opened.map(OwnedFd::from).map_err(|error| failed("open", path, error))
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

fn failed(act: &'static str, path: &Path, source: io::Error) -> StoreError {
    StoreError::io(act, shown(path), source)
}
