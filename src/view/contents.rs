//! What the store has for the view: directories and the bytes of files, checked, and with what went wrong.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::inodes::{FileId, Listing};
use super::{Fault, Shared};
use crate::castore::{Blob, Digest};
use crate::lock::lock;

/// A file that is not open yet and has at most so many bytes is opened, and so hashed, by a thread that answers
/// requests, where the store is near. It takes less than a millisecond.
const SOON_HASHED: u64 = 1 << 20;

/// A blob that was opened.
pub struct Opened {
    blob: Arc<dyn Blob>,
    /// Whether its bytes are known to be what its digest names.
    verified: AtomicBool,
}

impl Opened {
    fn verify(&self) -> Result<(), crate::castore::StoreError> {
        if !self.verified.load(Ordering::Acquire) {
            self.blob.verify()?;
            self.verified.store(true, Ordering::Release);
        }
        Ok(())
    }
}

impl Shared {
    /// The entries of a directory, if they can be had at once.
    pub fn listing_at_hand(&self, digest: &Digest) -> Option<Result<Arc<Listing>, Fault>> {
        if let Some(listing) = self.listings.get(digest) {
            return Some(Ok(listing));
        }
        self.store.directories.is_near(digest).then(|| self.load(digest))
    }

    /// The entries of a directory.
    pub fn load(&self, digest: &Digest) -> Result<Arc<Listing>, Fault> {
        let digest = *digest;
        let directory = self.store.directories.get(&digest);
        let directory = directory.map_err(|source| Fault::Store { digest, source })?;
        let directory = directory.ok_or(Fault::MissingDirectory { digest })?;
        let listing = Arc::new(Listing::from(&*directory));
        self.listings.insert(digest, Arc::clone(&listing), 1 + listing.len());
        Ok(listing)
    }

    /// Whether a file can be read at once.
    pub fn is_at_hand(&self, file: FileId) -> bool {
        match self.blobs.get(&file.digest) {
            Some(open) if open.verified.load(Ordering::Acquire) => open.blob.is_near(),
            _ => file.size <= SOON_HASHED && self.store.blobs.is_near(&file.digest),
        }
    }

    /// Reads from a file into `buffer` and yields how much of it was filled: all of it, unless the file
    /// ends before.
    pub fn read(&self, file: FileId, offset: u64, buffer: &mut [u8]) -> Result<usize, Fault> {
        let digest = file.digest;
        let open = self.open(file)?;
        let rest = usize::try_from(file.size.saturating_sub(offset)).unwrap_or(usize::MAX);
        let wanted = rest.min(buffer.len());
        let mut filled = 0;
        while let Some(space) = buffer.get_mut(filled..wanted).filter(|space| !space.is_empty()) {
            let at = offset.saturating_add(filled as u64);
            match open.blob.read_at(space, at) {
                // The kernel would fill up with zeros.
                Ok(0) => return Err(Fault::EndsEarly { digest, size: file.size, offset: at }),
                Ok(read) => filled = wanted.min(filled.saturating_add(read)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(Fault::Read { digest, offset: at, source }),
            }
        }
        Ok(filled)
    }

    /// Opens the blob of a file, which must have the length that the file is said to have, and the bytes that its digest
    /// names.
    fn open(&self, file: FileId) -> Result<Arc<Opened>, Fault> {
        let digest = file.digest;
        let recent = self.blobs.get(&digest);
        let open = match recent {
            Some(open) => open,
            None => {
                let blob = self.store.blobs.open_sized(&digest, file.size);
                let blob = blob.map_err(|source| Fault::Store { digest, source })?;
                let blob = blob.ok_or(Fault::MissingBlob { digest })?;
                let open = Arc::new(Opened { blob, verified: AtomicBool::new(false) });
                // Before it is verified: who reads it meanwhile waits for that, and need not do it as well.
                self.blobs.insert(digest, Arc::clone(&open), 1);
                open
            }
        };
        let actual = open.blob.size();
        if actual != file.size {
            // It may be put right: then another file is to be opened.
            self.blobs.remove(&digest);
            return Err(Fault::Size { digest, stated: file.size, actual });
        }
        match open.verify() {
            Ok(()) => Ok(open),
            Err(source) => {
                self.blobs.remove(&digest);
                Err(Fault::Store { digest, source })
            }
        }
    }

    /// Records that a file can't be read, for all builds that have seen one of these contents.
    pub fn fault_of_file(&self, digest: &Digest, fault: Fault) {
        let listings = lock(&self.inodes).known_listings();
        let mut concerned = Vec::new();
        for (build, listing) in listings {
            if !concerned.contains(&build) && listing.has_file(digest) {
                concerned.push(build);
            }
        }
        self.fault(&concerned, fault);
    }
}
