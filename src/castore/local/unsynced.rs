//! What was stored and may not be on disk yet.

use std::fs::File;
use std::io;
use std::mem;
use std::sync::Mutex;

use nix::errno::Errno;
use nix::unistd::syncfs;

use super::Root;
use crate::castore::node::Digest;
use crate::castore::traits::StoreError;
use crate::config::Lifetime;
use crate::lock::lock;

/// Up to this many blobs are synced one by one. More are synced with all else on their file system: that is
/// cheaper by far, unless others have just written much there, and who stores a few should not wait for that.
const FEW: usize = 8;

/// The blobs stored since the last sync.
pub(super) struct Unsynced {
    blobs: Mutex<Blobs>,
    /// Held during a sync: who finds nothing left to sync must know that it has reached the disk.
    turn: Mutex<()>,
}

enum Blobs {
    /// These, and the names they have.
    Few(Vec<(File, Digest)>),
    /// Any number.
    Many,
    /// None that matters: the store goes with its process.
    Ephemeral,
}

impl Unsynced {
    /// Of a store that was just opened. What its last process left unsynced is not known.
    pub(super) fn new(lifetime: Lifetime) -> Self {
        let blobs = match lifetime {
            Lifetime::Lasting => Blobs::Many,
            Lifetime::Ephemeral => Blobs::Ephemeral,
        };
        Self { blobs: Mutex::new(blobs), turn: Mutex::new(()) }
    }

    /// Gives the blob in `file` its name, by `rename`, and notes it: no sync comes between the two.
    pub(super) fn add(
        &self,
        file: File,
        digest: &Digest,
        rename: impl FnOnce() -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        let mut blobs = lock(&self.blobs);
        rename()?;
        match &mut *blobs {
            Blobs::Few(few) if few.len() < FEW => few.push((file, *digest)),
            Blobs::Few(_) => *blobs = Blobs::Many,
            Blobs::Many | Blobs::Ephemeral => {}
        }
        Ok(())
    }
}

impl Root {
    /// Returns once every blob that was stored before is on disk, under its name.
    ///
    /// Where nothing was, that is at once. Where that once failed, it fails from then on.
    pub(super) fn sync(&self) -> Result<(), StoreError> {
        let Unsynced { blobs, turn } = &self.unsynced;
        let _turn = lock(turn);
        self.check_syncs()?;
        let unsynced = {
            let mut blobs = lock(blobs);
            match *blobs {
                Blobs::Ephemeral => return Ok(()),
                Blobs::Few(_) | Blobs::Many => mem::replace(&mut *blobs, Blobs::Few(Vec::new())),
            }
        };
        let synced = match unsynced {
            Blobs::Few(few) => few.iter().try_for_each(|(file, digest)| self.sync_blob(file, digest)),
            Blobs::Many => syncfs(&self.blobs).map_err(io::Error::from),
            Blobs::Ephemeral => Ok(()),
        };
        synced.map_err(|error| {
            self.note_failed_sync();
            StoreError::io("sync", self.path.display().to_string(), error)
        })
    }

    fn sync_blob(&self, file: &File, digest: &Digest) -> io::Result<()> {
        file.sync_data()?;
        self.open_parent(digest)?.sync_all()
    }
}

#[cfg(test)]
impl Unsynced {
    /// How many blobs wait for a sync; `None` where that is not known.
    pub(super) fn count(&self) -> Option<usize> {
        match &*lock(&self.blobs) {
            Blobs::Few(few) => Some(few.len()),
            Blobs::Many => None,
            Blobs::Ephemeral => Some(0),
        }
    }
}
