//! Which blobs were found to be what their names say.

use std::fs::File;
use std::os::unix::fs::FileExt;

use nix::fcntl::AtFlags;
use nix::sys::stat::{FileStat, fstat, fstatat};
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::Root;
use super::blobs::{place, refused};
use crate::castore::node::Digest;
use crate::castore::traits::StoreError;
use crate::recent::Memo;

/// How many blobs are remembered, some 100 bytes each. Those beyond are hashed again.
const REMEMBERED: usize = 1 << 18;

/// How much is read at a time.
const READ_BYTES: u64 = 1 << 20;

/// The blobs whose bytes this process has hashed, as they were then.
pub(super) struct Verified(Memo<Digest, Identity>);

/// What changes when a file is replaced or written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
    size: i64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl From<&FileStat> for Identity {
    fn from(stat: &FileStat) -> Self {
        Self {
            device: stat.st_dev,
            inode: stat.st_ino,
            size: stat.st_size,
            modified: (stat.st_mtime, stat.st_mtime_nsec),
            changed: (stat.st_ctime, stat.st_ctime_nsec),
        }
    }
}

impl Verified {
    /// Of no blob anything is known yet.
    pub(super) fn new() -> Self {
        Self(Memo::new(REMEMBERED))
    }
}

impl Root {
    /// Makes sure that the open `file` holds the blob `digest`: hashes it, unless that was done and it has not changed.
    ///
    /// One that is damaged is removed. A client that is told of a missing blob sends it again; one that is there would
    /// be in the way.
    pub(super) fn verify(&self, file: &File, digest: &Digest) -> Result<(), StoreError> {
        // Before the bytes: whoever changes them now makes another identity of it.
        let stat = fstat(file).map_err(|errno| refused("look at", digest, errno))?;
        let identity = Identity::from(&stat);
        if self.verified.0.get(digest) == Some(identity) {
            return Ok(());
        }
        let found = hash(file, stat.st_size)
            .map_err(|error| StoreError::io("read", format!("blob {digest}"), error))?;
        if found == *digest {
            self.verified.0.insert(*digest, identity, 1);
            return Ok(());
        }
        tracing::error!(%digest, %found, "a blob in the store is damaged; it is removed");
        self.discard(digest, identity);
        Err(StoreError::Damaged { kind: "blob", digest: *digest })
    }

    /// Notes that the blob `digest`, which was hashed on its way here and has just got its name, is right.
    pub(super) fn hashed(&self, digest: &Digest) {
        // What can't be looked at now is hashed when it is read.
        if let Ok(stat) = fstatat(&self.blobs, place(digest).as_str(), AtFlags::AT_SYMLINK_NOFOLLOW) {
            self.verified.0.insert(*digest, Identity::from(&stat), 1);
        }
    }

    /// Whether this process has hashed the blob `digest`, and it has not changed since.
    pub(super) fn is_hashed(&self, digest: &Digest) -> bool {
        let now = fstatat(&self.blobs, place(digest).as_str(), AtFlags::AT_SYMLINK_NOFOLLOW);
        now.is_ok_and(|now| self.verified.0.get(digest) == Some(Identity::from(&now)))
    }

    /// Removes a damaged blob, unless it was replaced meanwhile.
    pub(super) fn discard(&self, digest: &Digest, damaged: Identity) {
        // Whoever remembers that it is there forgets that.
        self.keep.removed();
        let place = place(digest);
        let now = fstatat(&self.blobs, place.as_str(), AtFlags::AT_SYMLINK_NOFOLLOW);
        if now.is_ok_and(|now| Identity::from(&now) == damaged)
            && let Err(errno) = unlinkat(&self.blobs, place.as_str(), UnlinkatFlags::NoRemoveDir)
        {
            tracing::warn!(%digest, %errno, "can't remove a damaged blob");
        }
    }
}

/// The digest of what a file of about this size holds, to its end.
pub(super) fn hash(file: &File, size: i64) -> std::io::Result<Digest> {
    // One more byte, so that the end of a small file is found by the first read.
    let room = u64::try_from(size).unwrap_or(0).saturating_add(1).min(READ_BYTES);
    let mut buffer = vec![0; usize::try_from(room).unwrap_or(1)];
    let mut hasher = blake3::Hasher::new();
    loop {
        match file.read_at(&mut buffer, hasher.count()) {
            Ok(0) => return Ok(hasher.finalize().into()),
            Ok(count) => {
                hasher.update(buffer.get(..count).unwrap_or_default());
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
impl Verified {
    /// Whether anything is known of this blob.
    pub(super) fn knows(&self, digest: &Digest) -> bool {
        self.0.get(digest).is_some()
    }
}
