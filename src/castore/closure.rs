//! Is everything there that a tree consists of, and is it as large as the tree says?

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::vec;

use super::node::{Digest, Directory, Name, Node, printable};
use super::traits::{BlobStat, Store, StoreError};
use crate::recent::Memo;

pub use super::tree::ObjectKind;

#[cfg(test)]
mod tests;

/// At most this many findings are told of at once.
pub const MAX_FINDINGS: usize = 100;

/// Longer paths are cut off here: a store may hold trees deeper than any path that Linux takes.
const SHOWN_PATH_BYTES: usize = 4096;

/// How many complete directories are remembered, 100 bytes each.
const REMEMBERED_DIRECTORIES: usize = 128 * 1024;

/// How many roots are looked for together.
const LOOKED_AHEAD: usize = 4096;

/// How many blobs are, that were inputs by themselves, 100 bytes each.
const REMEMBERED_FILES: usize = 64 * 1024;

/// Finds what is wrong with trees, and remembers the directories with which nothing is: the inputs of one
/// build are mostly those of the one before.
///
/// It goes with one store. Where that has removed something since, everything is looked at again.
pub struct Closure {
    /// The sizes of complete directories.
    complete: Memo<Digest, u64>,
    /// The sizes of blobs that were inputs by themselves.
    files: Memo<Digest, u64>,
    /// How many removals the store had then.
    removals: AtomicU64,
}

/// Something that is not in the store as a tree needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What needs it, escaped: of what is missing, the first place where it was come upon. Beyond 4 KiB it
    /// is cut off, and ends in `/...`.
    pub path: String,
    /// What it is.
    pub kind: ObjectKind,
    /// Its digest.
    pub digest: Digest,
    /// What is wrong with it.
    pub problem: Problem,
}

/// What can be wrong with a part of a tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Problem {
    /// It is not in the store.
    Missing,
    /// It has not the size that the tree states: the tree is wrong, or, after a crash, a blob was cut off.
    Size {
        /// What the tree says.
        stated: u64,
        /// What the store has.
        actual: u64,
    },
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} (needed for {}", self.kind, self.digest, self.path)?;
        match self.problem {
            Problem::Missing => f.write_str(")"),
            Problem::Size { stated, actual } => write!(f, " with size {stated}, but of size {actual})"),
        }
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
        Self {
            complete: Memo::new(REMEMBERED_DIRECTORIES),
            files: Memo::new(REMEMBERED_FILES),
            removals: AtomicU64::new(0),
        }
    }

    /// Gives back the memory of what was found complete.
    pub fn trim(&self) {
        self.complete.clear();
        self.files.clear();
    }

    /// What `store` does not have as the trees of `roots` need it: every directory below them is looked at
    /// and every blob looked for, each digest once. The text beside a root stands for it in [`Finding::path`].
    ///
    /// Empty means that all is there, in the sizes stated, as far as the store knows sizes without reading
    /// ([`BlobStat::size`]). The search ends at [`MAX_FINDINGS`].
    ///
    /// # Errors
    /// Where the store can't tell, or holds a damaged directory.
    pub fn check<'n>(
        &self,
        store: &Store,
        roots: impl IntoIterator<Item = (String, &'n Node)>,
    ) -> Result<Vec<Finding>, StoreError> {
        let removals = store.directories.removals();
        if self.removals.swap(removals, Ordering::AcqRel) != removals {
            self.trim();
        }
        let mut search = Search {
            store,
            remembered: &self.complete,
            remembered_files: &self.files,
            directories: HashMap::new(),
            blobs: HashMap::new(),
            ahead: HashMap::new(),
            findings: Vec::new(),
        };
        let roots: Vec<(String, &Node)> = roots.into_iter().collect();
        for some in roots.chunks(LOOKED_AHEAD) {
            search.look_ahead(some.iter().map(|(_, node)| *node))?;
            for (path, node) in some {
                search.tree(path, node)?;
                if search.full() {
                    return Ok(search.findings);
                }
            }
        }
        Ok(search.findings)
    }
}

struct Search<'a> {
    store: &'a Store,
    remembered: &'a Memo<Digest, u64>,
    remembered_files: &'a Memo<Digest, u64>,
    /// What was looked at so far. An empty directory and an empty blob have the same digest, so the two are
    /// kept apart.
    directories: HashMap<Digest, Seen>,
    blobs: HashMap<Digest, Option<BlobStat>>,
    /// Blobs that were looked for, but not asked for yet.
    ahead: HashMap<Digest, Option<BlobStat>>,
    findings: Vec<Finding>,
}

/// What is known of a directory.
#[derive(Clone, Copy)]
struct Seen {
    /// None where it is missing.
    size: Option<u64>,
    /// Whether nothing is wrong with what it consists of.
    complete: bool,
}

/// A directory that is in the store and whose files were looked for.
struct Open {
    digest: Digest,
    size: u64,
    /// The child directories left with the sizes stated, the one being worked on excluded.
    left: vec::IntoIter<(Name, Digest, u64)>,
    /// The child directory being worked on.
    current: Option<Name>,
    complete: bool,
}

impl Search<'_> {
    fn tree(&mut self, root: &str, node: &Node) -> Result<(), StoreError> {
        let mut above: Vec<Open> = Vec::new();
        let mut next = match node {
            Node::Symlink { .. } => return Ok(()),
            Node::File { digest, size, .. } => {
                if self.remembered_files.get(digest) != Some(*size)
                    && self.blob(digest, *size, || root.to_owned())?
                {
                    self.remembered_files.insert(*digest, *size, 1);
                }
                return Ok(());
            }
            Node::Directory { digest, size } => (*digest, *size),
        };
        loop {
            let (digest, stated) = next;
            let place = || path(root, &above, None);
            let mut opened = None;
            let seen = match self.known(&digest) {
                Some(seen) => seen,
                None => match self.store.directories.get(&digest)? {
                    Some(directory) => {
                        opened = Some(self.open(digest, &directory, root, &above)?);
                        Seen { size: Some(directory.size()), complete: true }
                    }
                    None => {
                        self.report(ObjectKind::Directory, &digest, Problem::Missing, place);
                        let missing = Seen { size: None, complete: false };
                        self.directories.insert(digest, missing);
                        missing
                    }
                },
            };
            let fits = self.fits(ObjectKind::Directory, &digest, stated, seen.size, place);
            if let Some(parent) = above.last_mut() {
                parent.complete &= seen.complete && fits;
            }
            above.extend(opened);
            match self.advance(&mut above) {
                Some(child) if !self.full() => next = child,
                _ => return Ok(()),
            }
        }
    }

    /// The next directory to look at: closes those that have none left.
    fn advance(&mut self, above: &mut Vec<Open>) -> Option<(Digest, u64)> {
        loop {
            let open = above.last_mut()?;
            if let Some((name, digest, stated)) = open.left.next() {
                open.current = Some(name);
                return Some((digest, stated));
            }
            let Open { digest, size, complete, .. } = above.pop()?;
            if complete {
                self.remembered.insert(digest, size, 1);
            }
            self.directories.insert(digest, Seen { size: Some(size), complete });
            if let Some(parent) = above.last_mut() {
                parent.complete &= complete;
            }
        }
    }

    fn known(&self, digest: &Digest) -> Option<Seen> {
        let remembered = || self.remembered.get(digest).map(|size| Seen { size: Some(size), complete: true });
        self.directories.get(digest).copied().or_else(remembered)
    }

    /// Looks for the files of a directory.
    fn open(
        &mut self,
        digest: Digest,
        directory: &Directory,
        root: &str,
        above: &[Open],
    ) -> Result<Open, StoreError> {
        self.look_ahead(directory.entries().map(|(_, node)| node))?;
        let mut complete = true;
        let mut left = Vec::new();
        for (name, node) in directory.entries() {
            match node {
                Node::Directory { digest, size } => left.push((name.clone(), *digest, *size)),
                Node::File { digest, size, .. } => {
                    complete &= self.blob(digest, *size, || path(root, above, Some(name)))?;
                }
                Node::Symlink { .. } => {}
            }
        }
        Ok(Open { digest, size: directory.size(), left: left.into_iter(), current: None, complete })
    }

    /// Looks for blobs that will be asked for one by one: a store is faster at many together.
    fn look_ahead<'n>(&mut self, nodes: impl Iterator<Item = &'n Node>) -> Result<(), StoreError> {
        let unknown = |node: &Node| match node {
            Node::File { digest, size, .. }
                if !self.blobs.contains_key(digest) && self.remembered_files.get(digest) != Some(*size) =>
            {
                Some(*digest)
            }
            _ => None,
        };
        let mut digests: Vec<Digest> = nodes.filter_map(unknown).collect();
        digests.sort_unstable();
        digests.dedup();
        let stats = self.store.blobs.stat_all(&digests)?;
        self.ahead = digests.into_iter().zip(stats).collect();
        Ok(())
    }

    /// Looks for the blob of a file; whether it is as needed.
    fn blob(&mut self, digest: &Digest, stated: u64, place: impl Fn() -> String) -> Result<bool, StoreError> {
        let stat = match self.blobs.get(digest) {
            Some(stat) => *stat,
            None => {
                let stat = match self.ahead.remove(digest) {
                    Some(stat) => stat,
                    None => self.store.blobs.stat(digest)?,
                };
                self.blobs.insert(*digest, stat);
                if stat.is_none() {
                    self.report(ObjectKind::Blob, digest, Problem::Missing, &place);
                }
                stat
            }
        };
        let Some(stat) = stat else { return Ok(false) };
        Ok(self.fits(ObjectKind::Blob, digest, stated, stat.size, place))
    }

    /// Whether something has the size stated, or one that is not known.
    fn fits(
        &mut self,
        kind: ObjectKind,
        digest: &Digest,
        stated: u64,
        actual: Option<u64>,
        place: impl Fn() -> String,
    ) -> bool {
        match actual {
            Some(actual) if actual != stated => {
                self.report(kind, digest, Problem::Size { stated, actual }, place);
                false
            }
            _ => true,
        }
    }

    fn report(&mut self, kind: ObjectKind, digest: &Digest, problem: Problem, place: impl Fn() -> String) {
        if !self.full() {
            self.findings.push(Finding { path: place(), kind, digest: *digest, problem });
        }
    }

    fn full(&self) -> bool {
        self.findings.len() >= MAX_FINDINGS
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
