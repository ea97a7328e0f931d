//! The castore as one FUSE file system for all builds: `/<build id>/<input name>`.
//!
//! Content never changes, so the kernel may remember everything for ever, and a second look costs no
//! request. Only the root changes, when a build comes or goes. What a build has read of its files stays in the
//! page cache for those after it.
//!
//! # What the store can't give
//! A read that the store does not answer with exactly the bytes named is an I/O error to its reader. The
//! build would take that for its own, so it is recorded as well, *before* the reader gets its error: as
//! [`Exposed::fault`] of each build concerned. These are, for a directory, the build it was reached in,
//! and for a file, whose pages all builds share, every build that has seen a directory with such a file.
//! One build's broken input is thus no other's fault.
//!
//! A store that does not answer at all is such a fault, too, once its time is up. Until then nobody waits for
//! it but those who read what it has not given.

mod ahead;
mod contents;
mod far;
mod fs;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod inodes;
mod mount;
mod usher;

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::io;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use cofferdam_sandbox::Owner;
use tokio::sync::watch;

use crate::castore::{Digest, Name, Node, NodeError, Store, StoreError};
use crate::lock::lock;
use crate::recent::Memo;
use ahead::Ahead;
use contents::Opened;
use far::Far;
use inodes::{Inodes, Listing};
use usher::{Farewell, Usher};

/// How many blobs are kept open, and so how many file descriptors the view takes.
const OPEN_BLOBS: usize = 512;

/// How many directory entries are kept beyond what the kernel remembers, for the next build.
const RECENT_ENTRIES: usize = 1 << 18;

/// How many files that were read are kept for the next build, about 1 KiB of the kernel's memory each. Their
/// pages are the kernel's to take back whenever it is short of memory, and the files with them.
const KEPT_FILES: usize = 1 << 16;

/// The mounted view. Dropping it unmounts it, whatever is still in use; that may take seconds where the
/// store does not answer.
pub struct View {
    at: PathBuf,
    shared: Arc<Shared>,
    // Dropped before the usher: aborting the connection frees it from whatever it waits for.
    mounted: mount::Mounted,
    usher: Usher,
}

impl View {
    /// Mounts the view at the directory `at`, in the mount namespace of the calling thread. All in it belongs to
    /// `owner`.
    ///
    /// The namespace should be private to this process. `threads` is how many requests are answered at
    /// a time where the store is near; those that wait for one elsewhere are not counted. They are answered after
    /// `timeout` at the latest, with an error then; one that reads a large blob gets more time, as its size demands.
    ///
    /// # Errors
    /// [`ViewError::Device`], [`ViewError::Mount`] and [`ViewError::Session`] where the kernel refuses.
    pub fn mount(
        store: Store,
        at: &Path,
        owner: Owner,
        threads: NonZeroUsize,
        timeout: Duration,
    ) -> Result<Self, ViewError> {
        Self::mount_keeping(store, at, owner, threads, timeout, KEPT_FILES)
    }

    fn mount_keeping(
        store: Store,
        at: &Path,
        owner: Owner,
        threads: NonZeroUsize,
        timeout: Duration,
        kept_files: usize,
    ) -> Result<Self, ViewError> {
        let at = std::path::absolute(at).map_err(|source| ViewError::Mount { at: at.to_owned(), source })?;
        let shared = Arc::new(Shared {
            store,
            owner,
            inodes: Mutex::new(Inodes::new()),
            listings: Memo::new(RECENT_ENTRIES),
            blobs: Memo::new(OPEN_BLOBS),
            builds: Mutex::new(HashMap::new()),
        });
        let on_end = {
            let shared = Arc::clone(&shared);
            move |end: io::Result<()>| {
                let cause = end.err().map_or_else(|| "it was unmounted".to_owned(), |e| e.to_string());
                shared.fault(&shared.exposed(), Fault::Ended { cause });
            }
        };
        let session = |source| ViewError::Session { source };
        let far = Far::start(Arc::clone(&shared), timeout).map_err(session)?;
        let (ahead, windows) = Ahead::new();
        let filesystem = fs::Castore::new(Arc::clone(&shared), far, ahead);
        let mounted = mount::Mounted::new(filesystem, &at, threads, on_end)?;
        ahead::start(&shared, windows, &mounted.notifier()).map_err(session)?;
        let usher =
            Usher::start(Arc::clone(&shared), at.clone(), mounted.notifier(), kept_files).map_err(session)?;
        Ok(Self { at, shared, mounted, usher })
    }

    /// Makes the directory `build_id` with `inputs` as its entries. It is there when this returns, and
    /// goes with the value that it returns.
    ///
    /// Nothing is read from the store yet.
    ///
    /// # Errors
    /// [`ViewError::Id`] where `build_id` can't be a name; [`ViewError::InUse`] where it is taken, be it
    /// by a build that is just going.
    pub fn expose(&self, build_id: &str, inputs: BTreeMap<Name, Node>) -> Result<Exposed, ViewError> {
        let name = Name::new(build_id).map_err(ViewError::Id)?;
        let inputs = Arc::new(Listing::from(inputs));
        let (report, fault) = watch::channel(None);
        let number = {
            // Under both locks, so that no fault finds the directory without its build.
            let mut builds = lock(&self.shared.builds);
            let number = lock(&self.shared.inodes).expose(name.clone(), inputs);
            let number = number.ok_or_else(|| ViewError::InUse { id: build_id.to_owned() })?;
            builds.insert(number, report);
            number
        };
        usher::forget_listing(&self.mounted.notifier());
        Ok(Exposed {
            path: self.at.join(name.as_os_str()),
            name,
            number,
            fault,
            shared: Arc::clone(&self.shared),
            farewells: self.usher.farewells(),
        })
    }

    /// Gives back memory that only saves work: of directories and blobs that are read again, it remembers them again.
    pub fn trim(&self) {
        self.shared.trim();
    }

    /// How many inodes the view keeps for the kernel, the root's not counted.
    #[cfg(test)]
    fn inodes(&self) -> usize {
        lock(&self.shared.inodes).len()
    }
}

/// A build's directory in the view. Dropping it takes the directory away, without waiting for that.
pub struct Exposed {
    path: PathBuf,
    name: Name,
    number: u64,
    fault: watch::Receiver<Option<Arc<Fault>>>,
    shared: Arc<Shared>,
    farewells: mpsc::Sender<Farewell>,
}

impl Exposed {
    /// The directory's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The first fault that this build may have met, if there was one.
    ///
    /// A build that met one must not be judged by its exit status.
    pub fn fault(&self) -> Option<Arc<Fault>> {
        self.fault.borrow().clone()
    }

    /// Waits for the first fault that this build may have met.
    ///
    /// # Cancel safety
    /// Nothing is lost by dropping the future.
    pub fn faulted(&self) -> impl Future<Output = Arc<Fault>> + Send + 'static {
        let mut fault = self.fault.clone();
        async move {
            match fault.wait_for(Option::is_some).await.map(|fault| fault.clone()) {
                Ok(Some(fault)) => fault,
                // The sender is gone, and with it all that could go wrong.
                _ => std::future::pending().await,
            }
        }
    }
}

impl Drop for Exposed {
    fn drop(&mut self) {
        lock(&self.shared.inodes).retire(&self.name);
        lock(&self.shared.builds).remove(&self.number);
        let farewell = Farewell::Build(self.name.clone(), self.number);
        if self.farewells.send(farewell).is_err() {
            // The view is gone, and the kernel's memory of it.
            lock(&self.shared.inodes).release(&self.name);
        }
    }
}

impl std::fmt::Debug for Exposed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Exposed").field("path", &self.path).finish_non_exhaustive()
    }
}

/// What the threads of the file system work on.
struct Shared {
    store: Store,
    owner: Owner,
    inodes: Mutex<Inodes>,
    listings: Memo<Digest, Arc<Listing>>,
    blobs: Memo<Digest, Arc<Opened>>,
    /// Where the faults of each exposed build go, by the number of its directory.
    builds: Mutex<HashMap<u64, watch::Sender<Option<Arc<Fault>>>>>,
}

impl Shared {
    fn trim(&self) {
        self.listings.clear();
        self.blobs.clear();
        lock(&self.inodes).shrink();
    }

    fn exposed(&self) -> Vec<u64> {
        lock(&self.builds).keys().copied().collect()
    }

    /// Records a fault of the builds whose directories are `concerned`.
    fn fault(&self, concerned: &[u64], fault: Fault) {
        let fault = Arc::new(fault);
        let builds = lock(&self.builds);
        let mut first = false;
        for report in concerned.iter().filter_map(|number| builds.get(number)) {
            first |= report.send_if_modified(|seen| {
                let first = seen.is_none();
                seen.get_or_insert_with(|| Arc::clone(&fault));
                first
            });
        }
        drop(builds);
        if first {
            tracing::error!("a build can't read its inputs: {fault}");
        }
    }
}

/// Why a build could not read its inputs.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The store has no such blob.
    #[error("the blob {digest} is not in the store")]
    MissingBlob {
        /// Its digest.
        digest: Digest,
    },
    /// The store has no such directory.
    #[error("the directory {digest} is not in the store")]
    MissingDirectory {
        /// Its digest.
        digest: Digest,
    },
    /// A blob is not as long as an entry says.
    #[error("the blob {digest} has {actual} bytes where a directory states {stated}")]
    Size {
        /// Its digest.
        digest: Digest,
        /// The length stated.
        stated: u64,
        /// The length it has.
        actual: u64,
    },
    /// A blob has fewer bytes than its length says.
    #[error("the blob {digest} of {size} bytes has none at {offset}")]
    EndsEarly {
        /// Its digest.
        digest: Digest,
        /// The length it should have.
        size: u64,
        /// Where nothing was found. It may end before that: the kernel reads ahead in several threads.
        offset: u64,
    },
    /// The store could not open something.
    #[error("can't get {digest} from the store: {source}")]
    Store {
        /// What was to be opened.
        digest: Digest,
        /// The store's reason.
        source: StoreError,
    },
    /// A blob could not be read.
    #[error("can't read the blob {digest} at byte {offset}: {source}")]
    Read {
        /// Its digest.
        digest: Digest,
        /// Where in it.
        offset: u64,
        /// The refusal.
        source: io::Error,
    },
    /// The store has not answered in time.
    #[error("the store has not given {digest} within {} s", .after.as_secs_f32())]
    Late {
        /// What was wanted from it.
        digest: Digest,
        /// How long it was waited for.
        after: Duration,
    },
    /// Too many wait for the store already, or the view has ended meanwhile.
    #[error("can't wait for the store to give {digest}: too many do, or the view has ended")]
    Crowded {
        /// What was wanted from it.
        digest: Digest,
    },
    /// The file system has ended.
    #[error("the file system that shows the inputs has ended: {cause}")]
    Ended {
        /// Why.
        cause: String,
    },
}

/// Why there is no view, or no directory in it.
#[derive(Debug, thiserror::Error)]
pub enum ViewError {
    /// The FUSE device can't be opened.
    #[error("can't open /dev/fuse: {source}{}", device_hint(.source))]
    Device {
        /// The refusal.
        source: io::Error,
    },
    /// The kernel refused the mount.
    #[error("can't mount FUSE at {}: {source}{}", .at.display(), mount_hint(.source))]
    Mount {
        /// Where.
        at: PathBuf,
        /// The refusal.
        source: io::Error,
    },
    /// The kernel and we did not come to terms, or a thread could not be started.
    #[error("can't start to serve FUSE: {source}")]
    Session {
        /// The refusal.
        source: io::Error,
    },
    /// The build's id can't be the name of a directory.
    #[error("a build id must be a file name: {0}")]
    Id(NodeError),
    /// Another build has this id.
    #[error("the view has a build {id} already")]
    InUse {
        /// The id.
        id: String,
    },
}

fn device_hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOENT) => " (a container needs `--device /dev/fuse`; a host, the kernel module `fuse`)",
        Some(libc::ENODEV | libc::ENXIO) => " (the kernel module `fuse` is not loaded)",
        Some(libc::EACCES | libc::EPERM) => " (this user, or this container, may not use the device)",
        _ => "",
    }
}

fn mount_hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM) => " (mounting needs CAP_SYS_ADMIN over the mount namespace)",
        Some(libc::ENODEV) => " (this kernel has no FUSE)",
        _ => "",
    }
}

#[cfg(test)]
mod tests;
