//! Is everything there that a tree consists of?

use std::collections::HashMap;
use std::vec;

use super::node::{Digest, Directory, Name, Node, printable};
use super::traits::{Store, StoreError};
use crate::recent::Memo;

pub use super::tree::ObjectKind;

#[cfg(test)]
mod tests;

/// At most this many missing objects are told of at once.
pub const MAX_MISSING: usize = 100;

/// Longer paths are cut off here: a store may hold trees deeper than any path that Linux takes.
const SHOWN_PATH_BYTES: usize = 4096;

/// How many complete directories are remembered, 100 bytes each.
const REMEMBERED_DIRECTORIES: usize = 128 * 1024;

/// Finds what trees lack, and remembers which directories lack nothing: the inputs of one build are mostly
/// those of the one before.
///
/// It goes with one store, and with as long as nothing is removed from that.
pub struct Closure {
    complete: Memo<Digest, ()>,
}

/// Something that is not in the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// What needs it, escaped: the first place where it was come upon. Beyond 4 KiB it is cut off, and ends
    /// in `/...`.
    pub path: String,
    /// What it is.
    pub kind: ObjectKind,
    /// Its digest.
    pub digest: Digest,
}

impl std::fmt::Display for Missing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} (needed for {})", self.kind, self.digest, self.path)
    }
}

impl Default for Closure {
    fn default() -> Self {
        Self::new()
    }
}

impl Closure {
    /// One that has seen nothing yet.
    pub fn new() -> Self {
        Self { complete: Memo::new(REMEMBERED_DIRECTORIES) }
    }

    /// What the trees of `roots` lack in `store`: every directory below them is looked at and every blob
    /// looked for, each digest once. The text beside a root stands for it in [`Missing::path`].
    ///
    /// Empty means that all is there. The search ends at [`MAX_MISSING`].
    ///
    /// # Errors
    /// Where the store can't tell, or holds a damaged directory.
    pub fn missing<'n>(
        &self,
        store: &Store,
        roots: impl IntoIterator<Item = (String, &'n Node)>,
    ) -> Result<Vec<Missing>, StoreError> {
        let mut search = Search {
            store,
            remembered: &self.complete,
            directories: HashMap::new(),
            blobs: HashMap::new(),
            missing: Vec::new(),
        };
        for (path, node) in roots {
            search.tree(&path, node)?;
            if search.full() {
                break;
            }
        }
        Ok(search.missing)
    }
}

struct Search<'a> {
    store: &'a Store,
    remembered: &'a Memo<Digest, ()>,
    /// What was looked at so far, and whether it is complete. An empty directory and an empty blob have
    /// the same digest, so the two are kept apart.
    directories: HashMap<Digest, bool>,
    blobs: HashMap<Digest, bool>,
    missing: Vec<Missing>,
}

/// A directory that is in the store and whose files were looked for.
struct Open {
    digest: Digest,
    /// The child directories left, the one being worked on excluded.
    left: vec::IntoIter<(Name, Digest)>,
    /// The child directory being worked on.
    current: Option<Name>,
    complete: bool,
}

impl Search<'_> {
    fn tree(&mut self, root: &str, node: &Node) -> Result<(), StoreError> {
        let mut above: Vec<Open> = Vec::new();
        let mut next = match node {
            Node::Symlink { .. } => return Ok(()),
            Node::File { digest, .. } => return self.blob(digest, || root.to_owned()).map(drop),
            Node::Directory { digest, .. } => *digest,
        };
        loop {
            let complete = match self.known(&next) {
                Some(complete) => complete,
                None => match self.store.directories.get(&next)? {
                    Some(directory) => {
                        let open = self.open(next, &directory, root, &above)?;
                        above.push(open);
                        true
                    }
                    None => {
                        self.directories.insert(next, false);
                        self.report(ObjectKind::Directory, &next, path(root, &above, None));
                        false
                    }
                },
            };
            if let Some(parent) = above.last_mut() {
                parent.complete &= complete;
            }
            match self.advance(&mut above) {
                Some(digest) if !self.full() => next = digest,
                _ => return Ok(()),
            }
        }
    }

    /// The next directory to look at: closes those that have none left.
    fn advance(&mut self, above: &mut Vec<Open>) -> Option<Digest> {
        loop {
            let open = above.last_mut()?;
            if let Some((name, digest)) = open.left.next() {
                open.current = Some(name);
                return Some(digest);
            }
            let Open { digest, complete, .. } = above.pop()?;
            if complete {
                self.remembered.insert(digest, (), 1);
            }
            self.directories.insert(digest, complete);
            if let Some(parent) = above.last_mut() {
                parent.complete &= complete;
            }
        }
    }

    fn known(&self, digest: &Digest) -> Option<bool> {
        self.directories.get(digest).copied().or_else(|| self.remembered.get(digest).map(|()| true))
    }

    /// Looks for the files of a directory.
    fn open(
        &mut self,
        digest: Digest,
        directory: &Directory,
        root: &str,
        above: &[Open],
    ) -> Result<Open, StoreError> {
        let mut complete = true;
        let mut left = Vec::new();
        for (name, node) in directory.entries() {
            match node {
                Node::Directory { digest, .. } => left.push((name.clone(), *digest)),
                Node::File { digest, .. } => {
                    complete &= self.blob(digest, || path(root, above, Some(name)))?;
                }
                Node::Symlink { .. } => {}
            }
        }
        Ok(Open { digest, left: left.into_iter(), current: None, complete })
    }

    fn blob(&mut self, digest: &Digest, path: impl FnOnce() -> String) -> Result<bool, StoreError> {
        if let Some(there) = self.blobs.get(digest) {
            return Ok(*there);
        }
        let there = self.store.blobs.has(digest)?;
        self.blobs.insert(*digest, there);
        if !there {
            self.report(ObjectKind::Blob, digest, path());
        }
        Ok(there)
    }

    fn report(&mut self, kind: ObjectKind, digest: &Digest, path: String) {
        if !self.full() {
            self.missing.push(Missing { path, kind, digest: *digest });
        }
    }

    fn full(&self) -> bool {
        self.missing.len() >= MAX_MISSING
    }
}

/// The path through the directories `above` to `name`.
fn path(root: &str, above: &[Open], name: Option<&Name>) -> String {
    let mut path = root.to_owned();
    for name in above.iter().filter_map(|open| open.current.as_ref()).chain(name) {
        path.push('/');
        if path.len() > SHOWN_PATH_BYTES {
            path.push_str("...");
            break;
        }
        path.push_str(&printable(name.as_bytes()));
    }
    path
}
