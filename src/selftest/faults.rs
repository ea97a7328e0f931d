//! A store with faults, for probes of what a worker does about them.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::castore::{Blob, BlobService, BlobStat, BlobWriter, Digest, Store, StoreError};

/// What is wrong with a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Reading it takes until it is healed, or [`LONGEST_STALL`].
    Stalls,
    /// Reading it fails.
    Fails,
}

/// A read is not stalled for longer than this, so that the battery can always end.
pub const LONGEST_STALL: Duration = Duration::from_secs(60);

/// The blobs that something is wrong with.
#[derive(Debug, Default)]
pub struct Faults {
    blobs: Mutex<HashMap<Digest, Fault>>,
    healed: Condvar,
}

impl Faults {
    /// A store that is as the one below, but for these faults.
    pub fn over(self: &Arc<Self>, below: Store) -> Store {
        let faults = Arc::clone(self);
        Store { blobs: Arc::new(FaultyBlobs { below: below.blobs, faults }), directories: below.directories }
    }

    /// From now on something is wrong with this blob.
    pub fn set(&self, digest: Digest, fault: Fault) {
        self.lock().insert(digest, fault);
    }

    /// It is in order again, also for those who wait for it.
    pub fn heal(&self, digest: &Digest) {
        self.lock().remove(digest);
        self.healed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Digest, Fault>> {
        // A map is never left half changed.
        self.blobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What whoever reads this blob meets with.
    fn meet(&self, digest: &Digest) -> io::Result<()> {
        let blobs = self.lock();
        match blobs.get(digest) {
            None => Ok(()),
            Some(Fault::Fails) => Err(io::ErrorKind::Other.into()),
            Some(Fault::Stalls) => {
                let stalls = |blobs: &mut HashMap<Digest, Fault>| blobs.get(digest) == Some(&Fault::Stalls);
                drop(self.healed.wait_timeout_while(blobs, LONGEST_STALL, stalls));
                Ok(())
            }
        }
    }
}

struct FaultyBlobs {
    below: Arc<dyn BlobService>,
    faults: Arc<Faults>,
}

impl BlobService for FaultyBlobs {
    fn stat(&self, digest: &Digest) -> Result<Option<BlobStat>, StoreError> {
        self.below.stat(digest)
    }

    fn open(&self, digest: &Digest) -> Result<Option<Arc<dyn Blob>>, StoreError> {
        let faulty = |below| {
            let (digest, faults) = (*digest, Arc::clone(&self.faults));
            Arc::new(FaultyBlob { below, digest, faults }) as Arc<dyn Blob>
        };
        Ok(self.below.open(digest)?.map(faulty))
    }

    fn create(&self) -> Result<Box<dyn BlobWriter>, StoreError> {
        self.below.create()
    }
}

struct FaultyBlob {
    below: Arc<dyn Blob>,
    digest: Digest,
    faults: Arc<Faults>,
}

impl Blob for FaultyBlob {
    fn size(&self) -> u64 {
        self.below.size()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.faults.meet(&self.digest)?;
        self.below.read_at(buffer, offset)
    }
}
