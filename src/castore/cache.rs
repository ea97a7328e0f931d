//! A local store in front of another one, which may be far away.
//!
//! Near is what was asked for and what was stored here; far is all of it. What holds:
//!
//! * What comes from far is checked against its digest before it gets its name near, and nobody sees it before.
//! * However many want the same at the same time, it is fetched once, and all are told of a failure. Who comes later tries
//!   again, but at once only after one that came quickly.
//! * A directory is fetched with all below it, in one call.
//! * A `put` of directories returns when they are far, too, and the blobs that they name, which go first. A blob that no
//!   directory names goes with [`BlobService::keep`].
//! * What turns out to be damaged near is fetched again.
//!
//! Blobs are fetched whole: their digest says nothing of a part of them, and a list of chunks proves nothing until all
//! of them are there. Whoever reads one in sequence then reads a local file.

use std::collections::HashSet;
use std::io::{self, Write};
use std::sync::Arc;

use super::incoming::Incoming;
use super::whole::children_first;
use super::{
    Blob, BlobService, BlobStat, BlobWriter, Digest, Directory, DirectoryService, Lease, Node, Store,
    StoreError,
};
use crate::recent::Memo;
use ahead::Ahead;
use flights::Flights;
use present::{Present, PresentBlobs, PresentDirectories};

mod ahead;
mod flights;
mod present;
mod send;
#[cfg(test)]
mod tests;

/// How many trees are remembered of which all is near, or known to be far.
const REMEMBERED_TREES: usize = 1 << 16;

/// `far` with `near` in front of it; `address` is what errors call `far`.
pub fn over(near: Store, far: Store, address: impl ToString) -> Store {
    let cache = Cache(Arc::new(Inner {
        near,
        far,
        address: address.to_string(),
        fetches: Flights::new(),
        trees: Flights::new(),
        sends: Flights::new(),
        blobs: Present::new(),
        directories: Present::new(),
        prepared: Memo::new(REMEMBERED_TREES),
        ahead: Ahead::default(),
    }));
    Store { blobs: Arc::new(cache.clone()), directories: Arc::new(cache) }
}

/// Both services of such a store.
#[derive(Clone)]
struct Cache(Arc<Inner>);

/// What a store has of a digest, if anything.
type Found<T> = Option<Arc<T>>;

struct Inner {
    near: Store,
    far: Store,
    address: String,
    /// By digest and the size stated: who states a wrong one must not be another's failure.
    fetches: Flights<(Digest, Option<u64>), Found<dyn Blob>>,
    trees: Flights<Digest, Found<Directory>>,
    sends: Flights<Digest, ()>,
    /// What far is known to have.
    blobs: PresentBlobs,
    directories: PresentDirectories,
    /// Trees whose directories were near and whose blobs were found, with the removals near that there had been.
    prepared: Memo<Digest, u64>,
    ahead: Ahead,
}

impl BlobService for Cache {
    fn stat(&self, digest: &Digest) -> Result<Option<BlobStat>, StoreError> {
        Ok(self.stat_all(&[*digest])?.pop().flatten())
    }

    fn stat_all(&self, digests: &[Digest]) -> Result<Vec<Option<BlobStat>>, StoreError> {
        let mut stats = self.0.near.blobs.stat_all(digests)?;
        let mut unknown = Vec::new();
        for (digest, stat) in digests.iter().zip(&mut stats) {
            *stat = stat.or_else(|| self.0.blobs.get(digest));
            if stat.is_none() {
                unknown.push(*digest);
            }
        }
        if unknown.is_empty() {
            return Ok(stats);
        }
        let mut found = unknown.iter().zip(self.0.far.blobs.stat_all(&unknown)?);
        for stat in stats.iter_mut().filter(|stat| stat.is_none()) {
            let Some((digest, far)) = found.next() else { break };
            if let Some(far) = far {
                self.0.blobs.insert(*digest, far);
            }
            *stat = far;
        }
        Ok(stats)
    }

    fn open(&self, digest: &Digest) -> Result<Option<Arc<dyn Blob>>, StoreError> {
        self.0.blob(digest, None)
    }

    fn open_sized(&self, digest: &Digest, size: u64) -> Result<Option<Arc<dyn Blob>>, StoreError> {
        self.0.blob(digest, Some(size))
    }

    fn is_near(&self, digest: &Digest) -> bool {
        self.0.near.blobs.stat(digest).is_ok_and(|stat| stat.is_some())
    }

    fn keep(&self, digest: &Digest) -> Result<(), StoreError> {
        self.0.near.blobs.keep(digest)?;
        self.0.send_blobs(vec![*digest])
    }

    fn create(&self) -> Result<Box<dyn BlobWriter>, StoreError> {
        self.0.near.blobs.create()
    }
}

impl DirectoryService for Cache {
    fn get(&self, digest: &Digest) -> Result<Option<Arc<Directory>>, StoreError> {
        match self.0.near_directory(digest)? {
            Some(directory) => Ok(Some(directory)),
            None => self.0.trees.join(*digest, || self.0.fetch_tree(digest)),
        }
    }

    fn put(&self, directories: Vec<Directory>) -> Result<(), StoreError> {
        let own: HashSet<Digest> = directories.iter().map(Directory::digest).collect();
        let children = directories.iter().flat_map(Directory::child_directories);
        for child in children.map(|(_, child, _)| child).filter(|child| !own.contains(child)) {
            // Near takes no directory without its children. Far may have them.
            self.get(&child)?;
        }
        self.0.near.directories.put(directories.clone())?;
        self.0.send(directories)
    }

    fn is_near(&self, digest: &Digest) -> bool {
        self.0.near_directory(digest).is_ok_and(|directory| directory.is_some())
    }

    fn prepare(&self, roots: &[Node]) -> Result<(), StoreError> {
        let removals = self.removals();
        let mut files = Files::default();
        let mut trees = Vec::new();
        for root in roots {
            match root {
                Node::Directory { digest, .. } if self.0.prepared.get(digest) != Some(removals) => {
                    if self.walk(*digest, &mut files)? {
                        trees.push(*digest);
                    }
                }
                Node::File { digest, size, .. } => files.add(*digest, *size),
                Node::Directory { .. } | Node::Symlink { .. } => {}
            }
        }
        let digests: Vec<Digest> = files.all.iter().map(|(digest, _)| *digest).collect();
        let near = self.0.near.blobs.stat_all(&digests)?;
        let absent: Vec<(Digest, u64)> = files
            .all
            .into_iter()
            .zip(near)
            .filter(|(_, near)| near.is_none())
            .map(|(file, _)| file)
            .collect();
        let digests: Vec<Digest> = absent.iter().map(|(digest, _)| *digest).collect();
        let far = self.stat_all(&digests)?;
        if far.iter().all(Option::is_some) {
            trees.into_iter().for_each(|root| self.0.prepared.insert(root, removals, 1));
        }
        let there = absent.into_iter().zip(far).filter(|(_, far)| far.is_some()).map(|(file, _)| file);
        self.0.fetch_ahead(there);
        Ok(())
    }

    fn trim(&self) {
        self.0.near.directories.trim();
    }

    fn lease(&self, roots: &[Node]) -> Lease {
        self.0.near.directories.lease(roots)
    }

    fn removals(&self) -> u64 {
        self.0.near.directories.removals()
    }
}

impl Cache {
    /// Brings the directories of a tree here and notes its files; whether none was missing.
    fn walk(&self, root: Digest, files: &mut Files) -> Result<bool, StoreError> {
        let (mut seen, mut left) = (HashSet::from([root]), vec![root]);
        let mut complete = true;
        while let Some(digest) = left.pop() {
            let Some(directory) = self.get(&digest)? else {
                complete = false;
                continue;
            };
            for (_, node) in directory.entries() {
                match node {
                    Node::Directory { digest, .. } => left.extend(seen.insert(*digest).then_some(*digest)),
                    Node::File { digest, size, .. } => files.add(*digest, *size),
                    Node::Symlink { .. } => {}
                }
            }
        }
        Ok(complete)
    }
}

/// Files with their sizes, each once.
#[derive(Default)]
struct Files {
    all: Vec<(Digest, u64)>,
    seen: HashSet<Digest>,
}

impl Files {
    fn add(&mut self, digest: Digest, size: u64) {
        if self.seen.insert(digest) {
            self.all.push((digest, size));
        }
    }
}

impl Inner {
    fn blob(&self, digest: &Digest, stated: Option<u64>) -> Result<Option<Arc<dyn Blob>>, StoreError> {
        match self.near_blob(digest)? {
            Some(blob) => Ok(Some(blob)),
            None => self.fetches.join((*digest, stated), || self.fetch(digest, stated)),
        }
    }

    /// A blob near, known to be right.
    fn near_blob(&self, digest: &Digest) -> Result<Option<Arc<dyn Blob>>, StoreError> {
        let opened = self.near.blobs.open(digest);
        let verified = opened.and_then(|blob| match blob {
            Some(blob) => blob.verify().map(|()| Some(blob)),
            None => Ok(None),
        });
        unless_damaged(verified)
    }

    fn near_directory(&self, digest: &Digest) -> Result<Option<Arc<Directory>>, StoreError> {
        unless_damaged(self.near.directories.get(digest))
    }

    /// Fetches a blob that is not near, if another has not done so meanwhile.
    fn fetch(&self, digest: &Digest, stated: Option<u64>) -> Result<Option<Arc<dyn Blob>>, StoreError> {
        if let Some(blob) = self.near_blob(digest)? {
            return Ok(Some(blob));
        }
        let mut incoming = Incoming::new(Writing(self.near.blobs.create()?), *digest, stated);
        match self.far.blobs.copy(digest, &mut incoming) {
            Ok(false) => {
                self.blobs.forget(digest);
                return Ok(None);
            }
            // What is wrong with the bytes is told below.
            Err(_) if incoming.overrun().is_some() => {}
            Err(error) => return Err(error),
            Ok(true) => {}
        }
        let size = Some(incoming.len());
        let Writing(writer) = incoming.checked(&self.address)?;
        writer.finish()?;
        self.blobs.insert(*digest, BlobStat { size });
        let blob = self.near_blob(digest)?;
        blob.map(Some).ok_or(StoreError::Damaged { kind: "blob", digest: *digest })
    }

    /// Fetches a directory that is not near, with all below it.
    fn fetch_tree(&self, root: &Digest) -> Result<Option<Arc<Directory>>, StoreError> {
        if let Some(directory) = self.near_directory(root)? {
            return Ok(Some(directory));
        }
        match self.far.directories.get_tree(root) {
            Ok(None) => Ok(None),
            Ok(Some(tree)) => {
                self.near.directories.put(children_first(tree))?;
                self.near.directories.get(root)
            }
            // A tree that is not whole can't be near. What there is of it is shown, so that the rest is missed by name.
            Err(StoreError::MissingChild { .. } | StoreError::ChildSize { .. }) => {
                self.far.directories.get(root)
            }
            Err(error) => Err(error),
        }
    }
}

/// What is damaged near is as good as not there: it is fetched again.
fn unless_damaged<T>(found: Result<Option<T>, StoreError>) -> Result<Option<T>, StoreError> {
    match found {
        Err(error @ StoreError::Damaged { .. }) => {
            tracing::warn!(%error, "it is fetched again");
            Ok(None)
        }
        found => found,
    }
}

/// A writer of blobs as one of bytes.
struct Writing(Box<dyn BlobWriter>);

impl Write for Writing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}
