//! Directories in the database.

use std::collections::HashSet;
use std::sync::Arc;

use super::Root;
use super::index::{Encoded, Index, Object};
use super::packs::Packs;
use crate::castore::children::check_children;
use crate::castore::node::{Digest, Directory, Node};
use crate::castore::traits::{DirectoryService, Lease, StoreError};
use crate::castore::tree::ObjectKind;
use crate::recent::Memo;

/// How many entries of directories may be remembered in decoded form, about 150 bytes each.
const REMEMBERED_ENTRIES: usize = 256 * 1024;

/// When so many trees were used again, that is written down, though nothing else is to be.
const MAX_UNTOLD: usize = 4096;

pub(super) struct Directories {
    root: Arc<Root>,
    index: Arc<Index>,
    packs: Arc<Packs>,
    remembered: Memo<Digest, Arc<Directory>>,
}

impl Directories {
    pub(super) fn new(root: &Arc<Root>, index: &Arc<Index>, packs: &Arc<Packs>) -> Self {
        Self {
            root: Arc::clone(root),
            index: Arc::clone(index),
            packs: Arc::clone(packs),
            remembered: Memo::new(REMEMBERED_ENTRIES),
        }
    }

    fn read(&self, digest: &Digest) -> Result<Option<Arc<Directory>>, StoreError> {
        let decode = |bytes: &[u8]| match Digest::of(bytes) == *digest {
            true => Directory::decode(bytes).ok(),
            false => None,
        };
        match self.index.directory(digest, decode)? {
            None => Ok(None),
            Some(Some(directory)) => Ok(Some(Arc::new(directory))),
            Some(None) => Err(StoreError::Damaged { kind: "directory", digest: *digest }),
        }
    }
}

impl DirectoryService for Directories {
    fn get(&self, digest: &Digest) -> Result<Option<Arc<Directory>>, StoreError> {
        self.root.keep.rescue(ObjectKind::Directory, digest);
        if let Some(directory) = self.remembered.get(digest) {
            return Ok(Some(directory));
        }
        let directory = self.read(digest)?;
        if let Some(directory) = &directory {
            let weight = 1 + directory.entries().len();
            self.remembered.insert(*digest, Arc::clone(directory), weight);
        }
        Ok(directory)
    }

    fn is_near(&self, _digest: &Digest) -> bool {
        true
    }

    fn put(&self, directories: Vec<Directory>) -> Result<(), StoreError> {
        let _stay = self.root.keep.relying();
        let encoded: Vec<Encoded> = directories.iter().map(Encoded::from).collect();
        self.root.keep.touch(roots(&encoded, &directories));
        let digests = encoded.iter().map(|encoded| encoded.digest);
        check_children(digests.zip(&directories), |child| Ok(self.get(child)?.map(|child| child.size())))?;
        encoded.iter().for_each(|new| self.root.keep.rescue(ObjectKind::Directory, &new.digest));
        let absent = self.index.absent(&encoded)?;
        // Blobs before the directories that name them.
        self.root.sync()?;
        match absent.is_empty() {
            // A commit costs another sync; a tree that is here already should not.
            true if self.root.keep.untold() < MAX_UNTOLD => self.packs.sync(),
            true => self.packs.flush(),
            false => self.packs.add_with(&absent),
        }
    }

    fn trim(&self) {
        self.remembered.clear();
    }

    fn lease(&self, roots: &[Node]) -> Lease {
        // Not while directories are removed: what is there afterwards stays.
        let _stay = self.root.keep.relying();
        Lease::new(self.root.keep.lease(roots))
    }

    fn removals(&self) -> u64 {
        self.root.keep.removals()
    }
}

/// Those of directories that are put at a time that no other one contains.
fn roots<'d>(encoded: &'d [Encoded], directories: &[Directory]) -> impl Iterator<Item = Object> + use<'d> {
    let children: HashSet<Digest> =
        directories.iter().flat_map(Directory::child_directories).map(|(_, child, _)| child).collect();
    let roots = encoded.iter().map(|encoded| encoded.digest).filter(move |digest| !children.contains(digest));
    roots.map(|digest| Object { kind: ObjectKind::Directory, digest })
}

impl From<&Directory> for Encoded {
    fn from(directory: &Directory) -> Self {
        let bytes = directory.encode();
        Self { digest: Digest::of(&bytes), bytes }
    }
}
