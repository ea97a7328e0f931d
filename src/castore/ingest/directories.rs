//! Directories that wait for their entries, and those that are complete.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};

use super::error::{IngestError, TreeFault};
use crate::castore::cursor::Cursor;
use crate::castore::node::{Digest, Directory, Name, Node};
use crate::lock::lock;

/// A directory, some of whose entries are not known yet.
///
/// It lives as long as one of these refers to it, and has no descriptor, so that any number may wait.
pub(super) struct Pending {
    /// The directory above, and the name there; none for the root.
    above: Option<(Arc<Pending>, Name)>,
    state: Mutex<State>,
}

struct State {
    directory: Directory,
    /// How many entries are missing.
    missing: usize,
}

impl Pending {
    /// A directory of `entries` entries.
    pub(super) fn new(above: Option<(Arc<Pending>, Name)>, entries: usize) -> Arc<Self> {
        let state = State { directory: Directory::new(), missing: entries };
        Arc::new(Self { above, state: Mutex::new(state) })
    }

    /// The path of the entry `name` of this directory, or of itself, below a root that is called `root`.
    pub(super) fn path(&self, name: Option<&Name>, root: &str) -> String {
        let mut names: Vec<&Name> = name.into_iter().collect();
        let mut place = self;
        while let Some((above, name)) = &place.above {
            names.push(name);
            place = above;
        }
        let mut cursor = Cursor::new();
        names.into_iter().rev().for_each(|name| cursor.enter(name));
        cursor.below(root)
    }

    /// Adds an entry; yields the directory if that was the last one.
    fn add(&self, name: Name, node: Node, root: &str) -> Result<Option<Directory>, IngestError> {
        let mut state = lock(&self.state);
        let inserted = state.directory.insert(name, node);
        inserted.map_err(|source| TreeFault::Name { path: self.path(None, root), source })?;
        state.missing = state.missing.saturating_sub(1);
        Ok((state.missing == 0).then(|| std::mem::take(&mut state.directory)))
    }
}

/// Complete directories, children before parents, each once.
#[derive(Default)]
pub(super) struct Complete {
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    directories: Vec<Directory>,
    digests: HashSet<Digest>,
    root: Option<Node>,
}

impl Complete {
    /// Adds the entry `name` to the directory `place`, and completes all that lacked nothing else.
    pub(super) fn add(
        &self,
        place: &Arc<Pending>,
        name: Name,
        node: Node,
        root: &str,
    ) -> Result<(), IngestError> {
        match place.add(name, node, root)? {
            Some(directory) => self.complete(place, directory, root),
            None => Ok(()),
        }
    }

    /// Keeps `directory`, which stands at `place`, and completes all above that lacked nothing else.
    pub(super) fn complete(
        &self,
        place: &Arc<Pending>,
        mut directory: Directory,
        root: &str,
    ) -> Result<(), IngestError> {
        let mut place = place;
        loop {
            let node = directory.node();
            self.keep(&node, directory);
            let Some((above, name)) = &place.above else {
                lock(&self.kept).root = Some(node);
                return Ok(());
            };
            match above.add(name.clone(), node, root)? {
                Some(next) => (place, directory) = (above, next),
                None => return Ok(()),
            }
        }
    }

    /// Before its node gets anywhere: so it stands before whatever refers to it.
    fn keep(&self, node: &Node, directory: Directory) {
        if let Node::Directory { digest, .. } = node {
            let mut kept = lock(&self.kept);
            if kept.digests.insert(*digest) {
                kept.directories.push(directory);
            }
        }
    }

    /// The root, if that is complete, with all directories.
    pub(super) fn finish(self) -> (Option<Node>, Vec<Directory>) {
        let kept = self.kept.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        (kept.root, kept.directories)
    }
}
