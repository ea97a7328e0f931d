//! A store in memory, for tests of what stands on a store: no worker keeps its blobs there.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex};

use super::children::check_children;
use super::{
    Blob, BlobService, BlobStat, BlobWriter, Digest, Directory, DirectoryService, Store, StoreError, Stored,
};
use crate::lock::lock;

/// An empty store.
pub fn store() -> Store {
    let memory = Arc::new(MemoryStore::default());
    Store { blobs: Arc::clone(&memory) as _, directories: memory }
}

/// Blobs and directories, for as long as the value lives.
#[derive(Default)]
pub struct MemoryStore {
    blobs: Arc<Mutex<HashMap<Digest, Arc<[u8]>>>>,
    directories: Mutex<HashMap<Digest, Arc<Directory>>>,
}

impl BlobService for MemoryStore {
    fn stat(&self, digest: &Digest) -> Result<Option<BlobStat>, StoreError> {
        let size = lock(&self.blobs).get(digest).map(|bytes| bytes.len() as u64);
        Ok(size.map(|size| BlobStat { size: Some(size) }))
    }

    fn open(&self, digest: &Digest) -> Result<Option<Arc<dyn Blob>>, StoreError> {
        let bytes = lock(&self.blobs).get(digest).cloned();
        Ok(bytes.map(|bytes| Arc::new(MemoryBlob(bytes)) as Arc<dyn Blob>))
    }

    fn is_near(&self, _digest: &Digest) -> bool {
        true
    }

    fn create(&self) -> Result<Box<dyn BlobWriter>, StoreError> {
        Ok(Box::new(MemoryWriter { blobs: Arc::clone(&self.blobs), bytes: Vec::new() }))
    }
}

impl DirectoryService for MemoryStore {
    fn get(&self, digest: &Digest) -> Result<Option<Arc<Directory>>, StoreError> {
        Ok(lock(&self.directories).get(digest).cloned())
    }

    fn is_near(&self, _digest: &Digest) -> bool {
        true
    }

    fn put(&self, directories: Vec<Directory>) -> Result<(), StoreError> {
        let new: Vec<(Digest, Directory)> =
            directories.into_iter().map(|directory| (directory.digest(), directory)).collect();
        let mut stored = lock(&self.directories);
        check_children(new.iter().map(|(digest, directory)| (*digest, directory)), |child| {
            Ok(stored.get(child).map(|child| child.size()))
        })?;
        stored.extend(new.into_iter().map(|(digest, directory)| (digest, Arc::new(directory))));
        Ok(())
    }
}

/// A blob in memory.
pub(super) struct MemoryBlob(pub(super) Arc<[u8]>);

impl Blob for MemoryBlob {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut rest = usize::try_from(offset).ok().and_then(|at| self.0.get(at..)).unwrap_or_default();
        io::Read::read(&mut rest, buffer)
    }

    fn verify(&self) -> Result<(), StoreError> {
        Ok(())
    }

    fn is_near(&self) -> bool {
        true
    }
}

struct MemoryWriter {
    blobs: Arc<Mutex<HashMap<Digest, Arc<[u8]>>>>,
    bytes: Vec<u8>,
}

impl io::Write for MemoryWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl BlobWriter for MemoryWriter {
    fn finish(self: Box<Self>) -> Result<Stored, StoreError> {
        let digest = Digest::of(&self.bytes);
        let size = self.bytes.len() as u64;
        let new = lock(&self.blobs).insert(digest, self.bytes.into()).is_none();
        Ok(Stored { digest, size, new })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::castore::{Name, Node};

    #[test]
    fn a_blob_comes_into_being_with_finish() {
        let store = store();
        let digest = Digest::of(b"hello");
        let mut writer = store.blobs.create().unwrap();
        writer.write_all(b"hel").unwrap();
        writer.write_all(b"lo").unwrap();
        assert_eq!(store.blobs.stat(&digest).unwrap(), None);
        assert_eq!(writer.finish().unwrap(), Stored { digest, size: 5, new: true });
        assert_eq!(store.blobs.stat(&digest).unwrap(), Some(BlobStat { size: Some(5) }));
        let blob = store.blobs.open(&digest).unwrap().unwrap();
        let cases: [(u64, usize, &[u8]); 5] =
            [(0, 9, b"hello"), (0, 2, b"he"), (3, 9, b"lo"), (5, 9, b""), (u64::MAX, 9, b"")];
        for (offset, len, expected) in cases {
            let mut buffer = vec![0; len];
            let read = blob.read_at(&mut buffer, offset).unwrap();
            assert_eq!(&buffer[..read], expected, "from {offset}");
        }
        assert!(store.blobs.open(&Digest::of(b"other")).unwrap().is_none());
    }

    #[test]
    fn directories_are_stored_all_or_none() {
        let store = store().directories;
        let leaf = Directory::new();
        let mut parent = Directory::new();
        parent.insert(Name::new("leaf").unwrap(), leaf.node()).unwrap();
        let mut liar = Directory::new();
        liar.insert(Name::new("leaf").unwrap(), Node::Directory { digest: leaf.digest(), size: 3 }).unwrap();

        let refused = store.put(vec![parent.clone(), leaf.clone()]).unwrap_err();
        assert!(matches!(refused, StoreError::MissingChild { .. }), "{refused}");
        let refused = store.put(vec![leaf.clone(), liar]).unwrap_err();
        assert!(matches!(refused, StoreError::ChildSize { stated: 3, actual: 0, .. }), "{refused}");
        assert!(store.get(&leaf.digest()).unwrap().is_none(), "nothing of it is left");

        store.put(vec![leaf, parent.clone()]).unwrap();
        assert_eq!(*store.get(&parent.digest()).unwrap().unwrap(), parent);
    }
}
