//! A tree of directories on its way from a store, piece by piece.

use std::collections::HashMap;
use std::sync::Arc;

use super::node::{Digest, Directory};
use super::traits::StoreError;

/// How many directories a tree may have that is taken at a time.
pub const MAX_TREE_DIRECTORIES: usize = 1 << 20;

/// How many bytes they may have in all, encoded.
pub const MAX_TREE_BYTES: u64 = 512 << 20;

/// A tree that is not complete yet. It takes what it needs and nothing else, so it is as finite as the tree is.
pub(super) struct Tree {
    root: Digest,
    /// In the order in which they came.
    directories: Vec<(Digest, Arc<Directory>)>,
    known: HashMap<Digest, Slot>,
    /// What was found to be needed, in that order; a part of it may have come by now.
    needed: Vec<Need>,
    /// Where in `needed` to look for the next that has not.
    next: usize,
    bytes: u64,
}

/// What is known of a directory that the tree has, or needs.
enum Slot {
    Needed,
    There { size: u64 },
}

/// A child directory, and who needs it.
struct Need {
    child: Digest,
    parent: Digest,
    name: String,
    stated: u64,
}

impl Tree {
    /// Nothing of the tree of `root` yet.
    pub(super) fn new(root: Digest) -> Self {
        Self {
            root,
            directories: Vec::new(),
            known: HashMap::from([(root, Slot::Needed)]),
            needed: Vec::new(),
            next: 0,
            bytes: 0,
        }
    }

    /// Takes a directory of this digest; false where it is not one that is needed and has not come yet.
    ///
    /// # Errors
    /// [`StoreError::TooLarge`].
    pub(super) fn add(&mut self, digest: Digest, directory: Arc<Directory>) -> Result<bool, StoreError> {
        match self.known.get_mut(&digest) {
            Some(slot @ Slot::Needed) => *slot = Slot::There { size: directory.size() },
            Some(Slot::There { .. }) | None => return Ok(false),
        }
        self.bytes = self.bytes.saturating_add(directory.encoded_len() as u64);
        for (name, child, stated) in directory.child_directories() {
            self.known.entry(child).or_insert(Slot::Needed);
            self.needed.push(Need { child, parent: digest, name: name.to_string(), stated });
        }
        self.directories.push((digest, directory));
        if self.known.len() > MAX_TREE_DIRECTORIES || self.bytes > MAX_TREE_BYTES {
            return Err(StoreError::TooLarge { root: self.root });
        }
        Ok(true)
    }

    /// The next directory that is needed, its parent having come; `None` where the tree is complete.
    pub(super) fn wanted(&mut self) -> Option<Digest> {
        while let Some(need) = self.needed.get(self.next) {
            if let Some(Slot::Needed) = self.known.get(&need.child) {
                return Some(need.child);
            }
            self.next += 1;
        }
        None
    }

    /// All of it, in the order in which it came.
    ///
    /// # Errors
    /// [`StoreError::MissingChild`] where something is still needed, [`StoreError::ChildSize`] where a parent states
    /// another size than its child has.
    pub(super) fn complete(self) -> Result<Vec<Arc<Directory>>, StoreError> {
        for Need { child, parent, name, stated } in self.needed {
            match self.known.get(&child) {
                Some(Slot::There { size }) if *size == stated => {}
                Some(Slot::There { size }) => {
                    return Err(StoreError::ChildSize { parent, name, stated, actual: *size });
                }
                Some(Slot::Needed) | None => return Err(StoreError::MissingChild { parent, name, child }),
            }
        }
        Ok(self.directories.into_iter().map(|(_, directory)| directory).collect())
    }
}

/// The same directories with children before parents, as [`DirectoryService::put`](super::DirectoryService::put) takes
/// them. Those that nothing else refers to come last.
pub(super) fn children_first(directories: Vec<Arc<Directory>>) -> Vec<Directory> {
    let mut left: HashMap<Digest, Arc<Directory>> = HashMap::new();
    let mut roots = Vec::new();
    for directory in directories {
        let digest = directory.digest();
        roots.push(digest);
        left.insert(digest, directory);
    }
    let mut ordered = Vec::with_capacity(left.len());
    for root in roots {
        let mut path = Vec::new();
        path.extend(left.remove(&root).map(opened));
        while let Some((_, below)) = path.last_mut() {
            match below.pop() {
                Some(child) => path.extend(left.remove(&child).map(opened)),
                None => ordered.extend(path.pop().map(|(directory, _)| Arc::unwrap_or_clone(directory))),
            }
        }
    }
    ordered
}

/// A directory with the children that are still to come before it.
fn opened(directory: Arc<Directory>) -> (Arc<Directory>, Vec<Digest>) {
    let below = directory.child_directories().map(|(_, child, _)| child).collect();
    (directory, below)
}
