//! Is everything in a store what its name says, and is nothing missing?

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs::File;
use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use nix::sys::stat::fstat;

use super::packs::{Contents, Place};
use super::verified::{Identity, hash};
use super::{LocalStore, failed};
use crate::castore::node::{Digest, Directory, Node};
use crate::castore::traits::StoreError;
use crate::castore::tree::ObjectKind;
use crate::lock::lock;

#[cfg(test)]
mod tests;

/// What becomes of what is damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// It stays.
    No,
    /// It is removed, so that it is missing and can be stored again; with a directory, all that contain it.
    Remove,
}

/// What a check of all that a store holds came to.
#[derive(Debug, Default)]
pub struct Report {
    /// How many blobs were compared with their digests.
    pub blobs: u64,
    /// How many bytes they have.
    pub bytes: u64,
    /// How many directories were.
    pub directories: u64,
    /// What is wrong.
    pub problems: Vec<Problem>,
}

/// Something that is wrong with a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Problem {
    /// An object's bytes are not those that its digest names.
    Damaged {
        /// What it is.
        kind: ObjectKind,
        /// Its digest.
        digest: Digest,
    },
    /// A directory names something that is not there, or was damaged.
    Missing {
        /// What it is.
        kind: ObjectKind,
        /// Its digest.
        digest: Digest,
        /// The first directory found that names it.
        parent: Digest,
    },
    /// A directory states another size for something than it has.
    Size {
        /// What it is.
        kind: ObjectKind,
        /// Its digest.
        digest: Digest,
        /// The directory.
        parent: Digest,
        /// What the directory says.
        stated: u64,
        /// What is so.
        actual: u64,
    },
    /// A file among the blobs that is none.
    Stray {
        /// Its path below the store.
        path: String,
    },
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Damaged { kind, digest } => write!(f, "the {kind} {digest} is damaged"),
            Self::Missing { kind, digest, parent } => {
                write!(f, "the {kind} {digest} is missing; the directory {parent} names it")
            }
            Self::Size { kind, digest, parent, stated, actual } => write!(
                f,
                "the {kind} {digest} has size {actual}, and the directory {parent} states {stated} for it"
            ),
            Self::Stray { path } => write!(f, "{path} is no blob"),
        }
    }
}

/// How far a check has come, in bytes of blobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Read so far.
    pub done: u64,
    /// In all.
    pub total: u64,
}

impl LocalStore {
    /// Reads everything and compares it with its digest; looks for all that directories name. `progress` is called now
    /// and then, from several threads, one at a time.
    ///
    /// What is stored meanwhile may or may not be looked at.
    ///
    /// # Errors
    /// Where something can't be read for other reasons than damage, or not be removed.
    pub fn verify(
        &self,
        repair: Repair,
        progress: &mut (dyn FnMut(Progress) + Send),
    ) -> Result<Report, StoreError> {
        let mut report = Report::default();
        let found = self.check_blobs(&mut report, progress)?;
        let (sound, damaged) = self.check_directories(&mut report, &found.sizes)?;
        if repair == Repair::Remove {
            self.packs.forget(&found.damaged_small)?;
            for (digest, identity) in found.damaged_large {
                self.root.discard(&digest, identity);
            }
            self.index.remove_directories(&self.with_all_above(sound, damaged)?)?;
            self.store.directories.trim();
        }
        Ok(report)
    }

    fn check_blobs(
        &self,
        report: &mut Report,
        progress: &mut (dyn FnMut(Progress) + Send),
    ) -> Result<Blobs, StoreError> {
        let mut small = self.packs.places()?;
        small.sort_unstable_by_key(|(digest, place)| (place.pack, place.offset, *digest));
        small.dedup();
        let large = self.large_blobs(report)?;
        let total = small.iter().map(|(_, place)| u64::from(place.len)).sum::<u64>()
            + large.iter().map(|(_, len)| len).sum::<u64>();
        let work = Work { store: self, small: &small, large: &large };
        let blobs = work.run(total, progress)?;
        let damaged = |digest: &Digest| Problem::Damaged { kind: ObjectKind::Blob, digest: *digest };
        report.problems.extend(blobs.damaged_small.iter().map(|(digest, _)| damaged(digest)));
        report.problems.extend(blobs.damaged_large.iter().map(|(digest, _)| damaged(digest)));
        report.blobs = (small.len() + large.len()) as u64;
        report.bytes = total;
        Ok(blobs)
    }

    /// The blobs with files of their own, and how long these are.
    fn large_blobs(&self, report: &mut Report) -> Result<Vec<(Digest, u64)>, StoreError> {
        let mut blobs = Vec::new();
        for (digest, file) in self.blob_files()? {
            let path = file.path();
            match digest {
                Some(digest) => {
                    let len = file.metadata().map_err(|error| failed("look at", &path, error))?.len();
                    blobs.push((digest, len));
                }
                None => {
                    let path = path.strip_prefix(&self.root.path).unwrap_or(&path);
                    report.problems.push(Problem::Stray { path: path.display().to_string() });
                }
            }
        }
        Ok(blobs)
    }

    /// Checks all directories; yields the sizes of those that are sound by themselves, and those that are damaged.
    fn check_directories(
        &self,
        report: &mut Report,
        blobs: &HashMap<Digest, u64>,
    ) -> Result<(HashMap<Digest, u64>, Vec<Digest>), StoreError> {
        let mut sizes = HashMap::new();
        let mut bad = Vec::new();
        self.index.each_directory(|digest, bytes| {
            report.directories += 1;
            match Directory::decode(bytes).ok().filter(|_| Digest::of(bytes) == digest) {
                Some(directory) => drop(sizes.insert(digest, directory.size())),
                None => {
                    report.problems.push(Problem::Damaged { kind: ObjectKind::Directory, digest });
                    bad.push(digest);
                }
            }
            Ok(())
        })?;
        let mut told = HashSet::new();
        self.index.each_directory(|digest, bytes| {
            let Some(directory) = sizes.get(&digest).and_then(|_| Directory::decode(bytes).ok()) else {
                return Ok(());
            };
            for (_, node) in directory.entries() {
                if let Some(problem) = misfit(digest, node, &sizes, blobs)
                    && told.insert(problem_key(&problem))
                {
                    report.problems.push(problem);
                }
            }
            Ok(())
        })?;
        Ok((sizes, bad))
    }

    /// Adds to `bad` all directories that contain one of them, or a missing one, at whatever depth.
    fn with_all_above(
        &self,
        mut sound: HashMap<Digest, u64>,
        mut bad: Vec<Digest>,
    ) -> Result<Vec<Digest>, StoreError> {
        loop {
            let mut above = Vec::new();
            self.index.each_directory(|digest, bytes| {
                let directory = sound.get(&digest).and_then(|_| Directory::decode(bytes).ok());
                if let Some(directory) = directory
                    && directory.child_directories().any(|(_, child, size)| sound.get(&child) != Some(&size))
                {
                    above.push(digest);
                }
                Ok(())
            })?;
            if above.is_empty() {
                return Ok(bad);
            }
            for digest in above {
                sound.remove(&digest);
                bad.push(digest);
            }
        }
    }
}

/// What does not fit of an entry.
fn misfit(
    parent: Digest,
    node: &Node,
    directories: &HashMap<Digest, u64>,
    blobs: &HashMap<Digest, u64>,
) -> Option<Problem> {
    let (kind, digest, stated, actual) = match node {
        Node::Directory { digest, size } => (ObjectKind::Directory, *digest, *size, directories.get(digest)),
        Node::File { digest, size, .. } => (ObjectKind::Blob, *digest, *size, blobs.get(digest)),
        Node::Symlink { .. } => return None,
    };
    match actual {
        None => Some(Problem::Missing { kind, digest, parent }),
        Some(actual) if *actual != stated => {
            Some(Problem::Size { kind, digest, parent, stated, actual: *actual })
        }
        Some(_) => None,
    }
}

/// What makes two problems one: the object, and for a size also who states it.
fn problem_key(problem: &Problem) -> (Option<ObjectKind>, Option<Digest>, Option<Digest>) {
    match problem {
        Problem::Damaged { kind, digest } | Problem::Missing { kind, digest, .. } => {
            (Some(*kind), Some(*digest), None)
        }
        Problem::Size { kind, digest, parent, .. } => (Some(*kind), Some(*digest), Some(*parent)),
        Problem::Stray { .. } => (None, None, None),
    }
}

/// What was found of the blobs.
#[derive(Default)]
struct Blobs {
    /// Lengths of those that are sound.
    sizes: HashMap<Digest, u64>,
    damaged_small: Vec<(Digest, Place)>,
    damaged_large: Vec<(Digest, Identity)>,
}

/// Blobs to be read, by several threads.
struct Work<'a> {
    store: &'a LocalStore,
    small: &'a [(Digest, Place)],
    large: &'a [(Digest, u64)],
}

/// How many small blobs a thread takes at a time.
const TAKEN: usize = 64;

impl Work<'_> {
    fn run(&self, total: u64, progress: &mut (dyn FnMut(Progress) + Send)) -> Result<Blobs, StoreError> {
        let (next, done) = (AtomicUsize::new(0), AtomicU64::new(0));
        let chunks = self.small.chunks(TAKEN).count();
        let (found, progress) = (Mutex::new(Blobs::default()), Mutex::new(progress));
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let work = || -> Result<(), StoreError> {
            loop {
                let turn = next.fetch_add(1, Ordering::Relaxed);
                let read = match self.small.chunks(TAKEN).nth(turn) {
                    Some(chunk) => self.check_small(chunk, &found)?,
                    None => match self.large.get(turn.saturating_sub(chunks)) {
                        Some((digest, _)) => self.check_large(digest, &found)?,
                        None => return Ok(()),
                    },
                };
                let done = done.fetch_add(read, Ordering::Relaxed) + read;
                lock(&progress)(Progress { done, total });
            }
        };
        std::thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
            let own = work();
            let ended = others
                .into_iter()
                .map(|other| other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            std::iter::once(own).chain(ended.collect::<Vec<_>>()).collect::<Result<(), _>>()
        })?;
        Ok(found.into_inner().unwrap_or_default())
    }

    fn check_small(&self, chunk: &[(Digest, Place)], found: &Mutex<Blobs>) -> Result<u64, StoreError> {
        let mut read = 0;
        for (digest, place) in chunk {
            let contents = self.store.packs.contents(digest, *place)?;
            let mut found = lock(found);
            match contents {
                Contents::Sound(contents) => {
                    read += contents.len() as u64;
                    found.sizes.insert(*digest, contents.len() as u64);
                }
                Contents::Damaged => found.damaged_small.push((*digest, *place)),
                Contents::Moved if self.store.packs.find(digest)? == Some(*place) => {
                    found.damaged_small.push((*digest, *place));
                }
                Contents::Moved => {}
            }
        }
        Ok(read)
    }

    fn check_large(&self, digest: &Digest, found: &Mutex<Blobs>) -> Result<u64, StoreError> {
        let path = self.store.root.path.join("blobs").join(super::blobs::place(digest));
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
            Err(error) => return Err(failed("open", &path, error)),
        };
        let stat = fstat(&file).map_err(|errno| failed("look at", &path, errno.into()))?;
        // A disk that fails to give bytes is as bad as one that gives others.
        let sound = hash(&file, stat.st_size).is_ok_and(|hash| hash == *digest);
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        let mut found = lock(found);
        match sound {
            true => drop(found.sizes.insert(*digest, size)),
            false => found.damaged_large.push((*digest, Identity::from(&stat))),
        }
        Ok(size)
    }
}
