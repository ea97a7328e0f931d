//! What was stored here, on its way to the far store.

use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::Inner;
use crate::castore::{BlobStat, Digest, Directory, Node, StoreError};
use crate::lock::lock;

/// How many blobs are sent at the same time.
const SENT_AT_ONCE: usize = 16;

/// How much of a blob is read at a time.
const PIECE_BYTES: usize = 256 << 10;

impl Inner {
    /// Sends directories, children before parents, and before them what they need and the far store lacks: blobs, and
    /// directories that are only here.
    pub(super) fn send(&self, directories: Vec<Directory>) -> Result<(), StoreError> {
        let digests: Vec<Digest> = directories.iter().map(Directory::digest).collect();
        if digests.iter().all(|digest| self.directories.get(digest).is_some()) {
            return Ok(());
        }
        let (all, more) = self.with_lacking_children(directories, digests)?;
        self.send_blobs(files(&all))?;
        self.far.directories.put(all)?;
        for digest in more {
            self.directories.insert(digest, ());
        }
        Ok(())
    }

    /// The same directories, and before them those below them that the far store lacks; with the digests of all.
    fn with_lacking_children(
        &self,
        directories: Vec<Directory>,
        mut digests: Vec<Digest>,
    ) -> Result<(Vec<Directory>, Vec<Digest>), StoreError> {
        let mut known: HashSet<Digest> = digests.iter().copied().collect();
        let mut lacking = Vec::new();
        let children = |directory: &Directory| -> Vec<Digest> {
            directory.child_directories().map(|(_, child, _)| child).collect()
        };
        let mut left: Vec<Digest> = directories.iter().flat_map(children).collect();
        while let Some(child) = left.pop() {
            if !known.insert(child)
                || self.directories.get(&child).is_some()
                || self.far.directories.get(&child)?.is_some()
            {
                continue;
            }
            // It was there when its parent was stored here.
            let Some(directory) = self.near.directories.get(&child)? else { continue };
            left.extend(children(&directory));
            digests.push(child);
            lacking.push(directory);
        }
        let mut all = crate::castore::whole::children_first(lacking);
        all.extend(directories);
        Ok((all, digests))
    }

    /// Sends those of `blobs` that the far store lacks, several at a time.
    pub(super) fn send_blobs(&self, blobs: Vec<Digest>) -> Result<(), StoreError> {
        let unknown: Vec<Digest> =
            blobs.into_iter().filter(|digest| self.blobs.get(digest).is_none()).collect();
        let stats = self.far.blobs.stat_all(&unknown)?;
        let mut lacking = Vec::new();
        for (digest, stat) in unknown.into_iter().zip(stats) {
            match stat {
                Some(stat) => self.blobs.insert(digest, stat),
                None => lacking.push(digest),
            }
        }
        let (next, failure) = (AtomicUsize::new(0), Mutex::new(None));
        let work = || {
            while lock(&failure).is_none()
                && let Some(digest) = lacking.get(next.fetch_add(1, Ordering::Relaxed))
            {
                if let Err(error) = self.sends.join(*digest, || self.send_blob(digest)) {
                    // The first one is the one to tell of.
                    lock(&failure).get_or_insert(error);
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..SENT_AT_ONCE.min(lacking.len()) {
                scope.spawn(work);
            }
            work();
        });
        match failure.into_inner() {
            Ok(None) => Ok(()),
            Ok(Some(error)) => Err(error),
            Err(_) => Err(StoreError::Abandoned),
        }
    }

    /// Sends a blob, if it is here: a directory may be stored before the blobs that it names.
    fn send_blob(&self, digest: &Digest) -> Result<(), StoreError> {
        if self.blobs.get(digest).is_some() {
            return Ok(());
        }
        let Some(blob) = self.near.blobs.open(digest)? else { return Ok(()) };
        blob.verify()?;
        let mut writer = self.far.blobs.create()?;
        let mut buffer = vec![0; PIECE_BYTES.min(usize::try_from(blob.size()).unwrap_or(PIECE_BYTES))];
        let mut offset = 0;
        while offset < blob.size() {
            let read = blob.read_at(&mut buffer, offset);
            let read = read.map_err(|error| StoreError::io("read", format!("the blob {digest}"), error))?;
            let Some(piece) = buffer.get(..read).filter(|piece| !piece.is_empty()) else { break };
            std::io::Write::write_all(&mut writer, piece).map_err(|error| self.unsent(digest, error))?;
            offset += read as u64;
        }
        let stored = writer.finish()?;
        if stored.digest != *digest {
            return Err(StoreError::Damaged { kind: "blob", digest: *digest });
        }
        self.blobs.insert(*digest, BlobStat { size: Some(stored.size) });
        Ok(())
    }

    /// A writer of the far store tells of its failure in an error of I/O.
    fn unsent(&self, digest: &Digest, error: std::io::Error) -> StoreError {
        match error.downcast::<StoreError>() {
            Ok(error) => error,
            Err(error) => StoreError::Remote {
                address: self.address.clone(),
                act: format!("store the blob {digest}"),
                message: error.to_string(),
            },
        }
    }
}

/// The blobs that directories name, each once.
fn files(directories: &[Directory]) -> Vec<Digest> {
    let mut seen = HashSet::new();
    let entries = directories.iter().flat_map(Directory::entries);
    let files = entries.filter_map(|(_, node)| match node {
        Node::File { digest, .. } => Some(*digest),
        Node::Directory { .. } | Node::Symlink { .. } => None,
    });
    files.filter(|digest| seen.insert(*digest)).collect()
}
