//! The walk through a tree.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, Scope};
use std::vec;

use nix::errno::Errno;
use rustix::fs::{AtFlags, FileType, RawDir, statat};

use super::directories::{Complete, Pending};
use super::error::{IngestError, TreeFault};
use super::queue::{Closing, Crew, Queue};
use super::read::{Found, Reader, failed};
use super::{Ingest, MAX_DEPTH};
use crate::castore::node::{Directory, Name, Node};
use crate::lock::lock;

/// What the kernel tells of a directory at a time, in bytes.
const LISTING_BYTES: usize = 32 * 1024;

/// After so many bytes of contents, what waits is worth a few threads, however few files it is.
const MUCH_BYTES: u64 = 8 << 20;

/// Takes in the entry `root` of `dir`.
pub(super) fn tree(
    ingest: &Ingest<'_>,
    dir: BorrowedFd<'_>,
    root: &OsStr,
    crew: &Crew,
) -> Result<Node, IngestError> {
    let mut reader = Reader::new(ingest);
    let path = || ingest.label.to_owned();
    let (node, directories) = match reader.entry(dir, root, FileType::Unknown, &path)? {
        Found::Symlink(node) => (node, Vec::new()),
        Found::File(file) => (reader.file(file, &path)?, Vec::new()),
        Found::Directory(fd) => below(ingest, fd, reader, crew)?,
    };
    // Only now is everything known that the root refers to. Where it is a file, this makes its blob last.
    ingest.store.directories.put(directories)?;
    if let Node::File { digest, .. } = &node {
        ingest.store.blobs.keep(digest)?;
    }
    Ok(node)
}

/// Takes in all that lies in the directory `fd`, but stores no directory yet.
fn below(
    ingest: &Ingest<'_>,
    fd: OwnedFd,
    reader: Reader<'_>,
    crew: &Crew,
) -> Result<(Node, Vec<Directory>), IngestError> {
    let work =
        Work { ingest, complete: Complete::default(), queue: Queue::new(), failure: FirstFailure::new() };
    thread::scope(|scope| {
        let _closing = Closing(&work.queue);
        let start = move |work| start(scope, work, crew);
        Walk { work: &work, reader, listing: Vec::new(), turn: 0, crew, start, threads: 0 }.run(fd);
    });
    if let Some(error) = work.failure.error() {
        return Err(error);
    }
    match work.complete.finish() {
        (Some(root), directories) => Ok((root, directories)),
        // A walk that has ended well has counted all entries.
        (None, _) => Err(IngestError::Cancelled),
    }
}

/// Starts threads that take files from the queue; yields how many.
fn start<'s>(scope: &'s Scope<'s, '_>, work: &'s Work<'_>, crew: &Crew) -> usize {
    if crew.threads < 2 {
        return 0;
    }
    let spawn = |_| {
        // Here, so that there is no moment without.
        let jobs = work.queue.join();
        let run = move || {
            let mut reader = Reader::new(work.ingest);
            jobs.for_each(|job| work.take_in(&mut reader, &job));
        };
        // A machine without room for threads does without.
        thread::Builder::new().name("ingest".to_owned()).spawn_scoped(scope, run).is_ok()
    };
    (0..crew.threads).map(spawn).take_while(|started| *started).count()
}

/// What all threads work on.
struct Work<'a> {
    ingest: &'a Ingest<'a>,
    complete: Complete,
    queue: Queue<Job>,
    failure: FirstFailure,
}

/// A file to be taken in.
struct Job {
    /// Where it stands in the order of the walk.
    turn: u64,
    dir: Arc<OwnedFd>,
    place: Arc<Pending>,
    name: Name,
}

impl Work<'_> {
    fn take_in(&self, reader: &mut Reader<'_>, job: &Job) {
        if self.failure.is_before(job.turn) {
            return;
        }
        let Job { turn, dir, place, name } = job;
        let label = self.ingest.label;
        let path = || place.path(Some(name), label);
        let node = match reader.entry(dir, name.as_os_str(), FileType::RegularFile, &path) {
            Ok(Found::File(file)) => reader.file(file, &path),
            // It was none when the directory was listed.
            Ok(Found::Directory(_)) => Err(failed("read", &path, Errno::EISDIR)),
            Ok(Found::Symlink(node)) => Ok(node),
            Err(error) => Err(error),
        };
        let done = node.and_then(|node| self.complete.add(place, name.clone(), node, label));
        if let Err(error) = done {
            self.failure.note(*turn, error);
        }
    }
}

/// The failure that comes first in the order of the walk, whichever thread met it when.
struct FirstFailure {
    turn: AtomicU64,
    error: Mutex<Option<IngestError>>,
}

impl FirstFailure {
    fn new() -> Self {
        Self { turn: AtomicU64::new(u64::MAX), error: Mutex::new(None) }
    }

    fn note(&self, turn: u64, error: IngestError) {
        let mut first = lock(&self.error);
        if turn < self.turn.load(Ordering::Relaxed) {
            self.turn.store(turn, Ordering::Relaxed);
            *first = Some(error);
        }
    }

    /// Whether something failed before this turn: then it need not be taken. What is before the failure must be: it
    /// may fail as well.
    fn is_before(&self, turn: u64) -> bool {
        self.turn.load(Ordering::Relaxed) < turn
    }

    fn error(&self) -> Option<IngestError> {
        lock(&self.error).take()
    }
}

/// The thread that lists the directories.
struct Walk<'a, 'w, S> {
    work: &'w Work<'a>,
    reader: Reader<'a>,
    /// What the kernel writes its listings to.
    listing: Vec<u8>,
    turn: u64,
    crew: &'a Crew,
    start: S,
    /// How many threads take files.
    threads: usize,
}

/// A directory whose entries are being worked off.
struct Open {
    dir: Arc<OwnedFd>,
    place: Arc<Pending>,
    /// The entries left, with their types where known.
    entries: vec::IntoIter<(Name, FileType)>,
}

impl<'a, 'w, S: Fn(&'w Work<'a>) -> usize> Walk<'a, 'w, S> {
    /// Walks through the directory `root`, and has taken in all of it when this returns, or noted why not.
    fn run(mut self, root: OwnedFd) {
        let mut above = Vec::new();
        if let Err(error) = self.walk(root, &mut above) {
            self.work.failure.note(self.turn, error);
        }
        self.drain();
    }

    fn walk(&mut self, root: OwnedFd, above: &mut Vec<Open>) -> Result<(), IngestError> {
        above.extend(self.open(root, None, self.work.ingest.skip)?);
        while let Some(Open { dir, place, entries }) = above.last_mut() {
            let Some((name, kind)) = entries.next() else {
                above.pop();
                continue;
            };
            self.turn += 1;
            if self.work.failure.is_before(self.turn) {
                return Ok(());
            }
            let (dir, place) = (Arc::clone(dir), Arc::clone(place));
            if let Some(fd) = self.entry(dir, &place, &name, kind)? {
                if above.len() == MAX_DEPTH {
                    let path = place.path(Some(&name), self.work.ingest.label);
                    return Err(TreeFault::TooDeep { path }.into());
                }
                above.extend(self.open(fd, Some((place, name)), &[])?);
            }
        }
        Ok(())
    }

    /// Takes in an entry, or has that done, or yields it where it is a directory.
    fn entry(
        &mut self,
        dir: Arc<OwnedFd>,
        place: &Arc<Pending>,
        name: &Name,
        kind: FileType,
    ) -> Result<Option<OwnedFd>, IngestError> {
        let label = self.work.ingest.label;
        let path = || place.path(Some(name), label);
        let kind = match kind {
            // Not every file system says it.
            FileType::Unknown => {
                kind_of(dir.as_fd(), name).map_err(|errno| failed("look at", &path, errno))?
            }
            kind => kind,
        };
        if kind == FileType::RegularFile {
            self.hand_over(Job { turn: self.turn, dir, place: Arc::clone(place), name: name.clone() });
            return Ok(None);
        }
        let node = match self.reader.entry(&dir, name.as_os_str(), kind, &path)? {
            Found::Directory(fd) => return Ok(Some(fd)),
            Found::File(file) => self.reader.file(file, &path)?,
            Found::Symlink(node) => node,
        };
        self.work.complete.add(place, name.clone(), node, label)?;
        Ok(None)
    }

    /// Lists a directory that was found. One without entries is complete.
    fn open(
        &mut self,
        fd: OwnedFd,
        above: Option<(Arc<Pending>, Name)>,
        skip: &[&[u8]],
    ) -> Result<Option<Open>, IngestError> {
        let label = self.work.ingest.label;
        // For messages, until it is known how many entries it has.
        let place = Pending::new(above.clone(), 0);
        let path = || place.path(None, label);
        let mut entries = Vec::new();
        self.listing.reserve(LISTING_BYTES);
        let mut listing = RawDir::new(&fd, self.listing.spare_capacity_mut());
        while let Some(entry) = listing.next() {
            self.reader.check_cancelled()?;
            let entry = entry.map_err(|errno| failed("list", &path, errno_of(errno)))?;
            let name = entry.file_name().to_bytes();
            if name == b"." || name == b".." || skip.contains(&name) {
                continue;
            }
            self.reader.scan(name);
            let name = Name::new(name).map_err(|source| TreeFault::Name { path: path(), source })?;
            entries.push((name, entry.file_type()));
        }
        entries.sort_unstable_by(|(one, _), (other, _)| one.cmp(other));
        let place = Pending::new(above, entries.len());
        if entries.is_empty() {
            self.work.complete.complete(&place, Directory::new(), label)?;
            return Ok(None);
        }
        Ok(Some(Open { dir: Arc::new(fd), place, entries: entries.into_iter() }))
    }

    /// Puts a file into the queue, and does what it takes for that not to grow.
    fn hand_over(&mut self, job: Job) {
        let waiting = self.work.queue.push(job);
        if self.threads > 0 || waiting < self.crew.start_at {
            return;
        }
        self.threads = (self.start)(self.work);
        if self.threads == 0 {
            self.drain();
        }
    }

    /// Takes in what is in the queue. Once that turns out to be much, others help.
    fn drain(&mut self) {
        while let Some(job) = self.work.queue.try_take() {
            self.work.take_in(&mut self.reader, &job);
            if self.threads == 0 && self.reader.bytes() > MUCH_BYTES && self.work.queue.waiting() > 1 {
                self.threads = (self.start)(self.work);
            }
        }
    }
}

fn kind_of(dir: BorrowedFd<'_>, name: &Name) -> Result<FileType, Errno> {
    let stat = statat(dir, name.as_os_str(), AtFlags::SYMLINK_NOFOLLOW).map_err(errno_of)?;
    Ok(FileType::from_raw_mode(stat.st_mode))
}

fn errno_of(errno: rustix::io::Errno) -> Errno {
    Errno::from_raw(errno.raw_os_error())
}
