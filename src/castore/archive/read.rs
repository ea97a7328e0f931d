//! From an archive to a tree in the store.

use std::cell::Cell;
use std::io::{self, Read, Write};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};

use tar::EntryType;

use super::tree::{Entry, EntryFault, Tree, names};
use crate::castore::ingest::{FileKind, Tally};
use crate::castore::node::{Node, Target, printable};
use crate::castore::traits::{Store, StoreError, Stored};

/// Contents are copied in pieces of this size.
const BUFFER_BYTES: usize = 256 * 1024;

/// What may describe an entry, in bytes: its header, and those that have its long name and the like. They are read
/// into memory.
const MAX_DESCRIPTION_BYTES: u64 = 1 << 20;

/// How archives are taken into a store.
pub struct Unpack<'a> {
    /// Where they go.
    pub store: &'a Store,
    /// Counts what is taken.
    pub tally: &'a Tally,
    /// Once this is true the work ends with [`ArchiveError::Cancelled`].
    pub cancel: &'a AtomicBool,
}

/// Why an archive was not taken in.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// An entry is at fault.
    #[error("in the archive, \"{path}\" {fault}")]
    Entry {
        /// The path that the archive has for it, escaped.
        path: String,
        /// What is wrong with it.
        fault: EntryFault,
    },
    /// It can't be read, or is none.
    #[error(
        "can't read the archive {place}: {source} (one that is compressed has to be decompressed first, as by zcat)"
    )]
    Read {
        /// Where that happened.
        place: String,
        /// What the operating system says, or what is wrong with the archive.
        source: io::Error,
    },
    /// It has no end.
    #[error("the archive ends {place} without the empty block that ends an archive: it is cut off")]
    CutOff {
        /// Where.
        place: String,
    },
    /// The store didn't take it.
    #[error("can't store the archive: {0}")]
    Store(#[from] StoreError),
    /// It was told to end.
    #[error("cancelled")]
    Cancelled,
}

impl Unpack<'_> {
    /// Takes in the tree of an uncompressed archive, to the end of `archive`; yields its root, which is a directory.
    ///
    /// Owners, times and permissions other than the owner's to execute are not kept. A hard link becomes a second
    /// entry of the same contents. Blobs that were stored before a failure remain; directories come into the store
    /// with the root or not at all.
    ///
    /// # Errors
    /// [`ArchiveError::Entry`] where something can't be stored or is not clear, the other kinds where reading or storing
    /// failed.
    pub fn run(&self, archive: impl Read) -> Result<Node, ArchiveError> {
        let meter = Rc::new(Meter::default());
        let mut last = None;
        let mut archive = tar::Archive::new(Metered { inner: archive, meter: Rc::clone(&meter) });
        let mut tree = Tree::new();
        let mut buffer = vec![0; BUFFER_BYTES];
        let mut entries = archive.entries().map_err(|source| unreadable(&last, source))?;
        loop {
            meter.left.set(MAX_DESCRIPTION_BYTES);
            let Some(entry) = entries.next() else { break };
            let mut entry = entry.map_err(|source| unreadable(&last, source))?;
            let path = entry.path_bytes().into_owned();
            self.entry(&mut entry, &path, &mut tree, &meter, &mut buffer)?;
            last = Some(path);
        }
        if meter.ended.get() {
            return Err(ArchiveError::CutOff { place: place(&last) });
        }
        // Whoever writes it to a pipe fills up the last of their own, larger blocks, and must not be cut short.
        meter.left.set(u64::MAX);
        let mut rest = archive.into_inner();
        while self.piece(&mut rest, &mut buffer).map_err(|source| unreadable(&last, source))? > 0 {
            self.check_cancelled()?;
        }
        let (root, directories) = tree.finish().map_err(|fault| at_fault(b"", fault))?;
        self.store.directories.put(directories)?;
        Ok(root)
    }

    fn entry(
        &self,
        entry: &mut tar::Entry<'_, impl Read>,
        path: &[u8],
        tree: &mut Tree,
        meter: &Meter,
        buffer: &mut [u8],
    ) -> Result<(), ArchiveError> {
        let wrong = |fault| at_fault(path, fault);
        if entry.header().entry_type().is_pax_global_extensions() {
            return check_extensions(entry, Scope::All).map_err(wrong);
        }
        check_extensions(entry, Scope::One).map_err(wrong)?;
        let names = names(path).map_err(wrong)?;
        let executable = entry.header().mode().map_err(|source| unreadable(&Some(path.to_vec()), source))?;
        let executable = executable & 0o100 != 0;
        let link = entry.link_name_bytes().map(|target| target.into_owned()).unwrap_or_default();
        // As it was before there was a type for directories.
        let is_directory = path.last() == Some(&b'/');
        meter.left.set(u64::MAX);
        let new = match entry.header().entry_type() {
            EntryType::Directory => Entry::Directory,
            EntryType::Regular if is_directory => Entry::Directory,
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                let stored = self.contents(entry, path, buffer)?;
                Entry::Leaf(Node::File { digest: stored.digest, size: stored.size, executable })
            }
            EntryType::Symlink => {
                let target = Target::new(link).map_err(|fault| wrong(EntryFault::Target(fault)))?;
                Entry::Leaf(Node::Symlink { target })
            }
            EntryType::Link => {
                let no_file = || wrong(EntryFault::HardLink { target: printable(&link) });
                let target = super::tree::names(&link).map_err(|_| no_file())?;
                Entry::Leaf(tree.leaf(&target).ok_or_else(no_file)?.clone())
            }
            EntryType::Char => return Err(wrong(EntryFault::Kind(FileKind::CharacterDevice))),
            EntryType::Block => return Err(wrong(EntryFault::Kind(FileKind::BlockDevice))),
            EntryType::Fifo => return Err(wrong(EntryFault::Kind(FileKind::Fifo))),
            other => {
                let kind = printable(&[other.as_byte()]);
                return Err(wrong(EntryFault::UnknownType { kind }));
            }
        };
        // What follows a header that needs no contents is not looked at.
        while self.piece(entry, buffer).map_err(|source| unreadable(&Some(path.to_vec()), source))? > 0 {
            self.check_cancelled()?;
        }
        tree.add(&names, new).map_err(wrong)
    }

    /// Stores the contents of an entry.
    fn contents(
        &self,
        entry: &mut tar::Entry<'_, impl Read>,
        path: &[u8],
        buffer: &mut [u8],
    ) -> Result<Stored, ArchiveError> {
        let stated = entry.size();
        let mut actual = 0;
        let mut writer = self.store.blobs.create()?;
        loop {
            self.check_cancelled()?;
            let count = self.piece(entry, buffer);
            let count = count.map_err(|source| unreadable(&Some(path.to_vec()), source))?;
            let Some(chunk) = buffer.get(..count).filter(|chunk| !chunk.is_empty()) else { break };
            writer.write_all(chunk).map_err(|error| StoreError::io("write", "a new blob", error))?;
            actual += chunk.len() as u64;
            self.tally.read(chunk.len() as u64);
        }
        if actual != stated {
            return Err(at_fault(path, EntryFault::Size { stated, actual }));
        }
        let stored = writer.finish()?;
        self.tally.stored(&stored);
        Ok(stored)
    }

    /// Reads as much as there is, up to the end of the buffer; nothing at the end.
    fn piece(&self, from: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
        let mut filled = 0;
        while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match from.read(rest) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(filled)
    }

    fn check_cancelled(&self) -> Result<(), ArchiveError> {
        if self.cancel.load(Ordering::Relaxed) { Err(ArchiveError::Cancelled) } else { Ok(()) }
    }
}

/// What an extended header tells of.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Scope {
    One,
    All,
}

/// Refuses extended headers that other programs would read in another way.
fn check_extensions(entry: &mut tar::Entry<'_, impl Read>, scope: Scope) -> Result<(), EntryFault> {
    let unclear = |what| EntryFault::Extension { what };
    let extensions = entry.pax_extensions().map_err(|_| unclear("it can't be read"))?;
    let mut seen = [false; 3];
    for extension in extensions.into_iter().flatten() {
        let key =
            extension.map_err(|_| unclear("it is malformed, or a name in it has a newline"))?.key_bytes();
        if key.starts_with(b"GNU.sparse.") {
            return Err(EntryFault::Sparse);
        }
        let keys: [&[u8]; 3] = [b"path", b"linkpath", b"size"];
        for (seen, _) in seen.iter_mut().zip(keys).filter(|(_, known)| *known == key) {
            if std::mem::replace(seen, true) {
                return Err(unclear("it says something twice"));
            }
            if scope == Scope::All {
                return Err(unclear("it gives all entries one name or size"));
            }
        }
    }
    Ok(())
}

/// How far a reader may read.
#[derive(Default)]
struct Meter {
    left: Cell<u64>,
    /// Whether it has come to the end.
    ended: Cell<bool>,
}

struct Metered<R> {
    inner: R,
    meter: Rc<Meter>,
}

impl<R: Read> Read for Metered<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.meter.left.get();
        if left == 0 {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, DESCRIPTION_TOO_LONG));
        }
        let room = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        let count = self.inner.read(buffer.get_mut(..room).unwrap_or_default())?;
        self.meter.left.set(left - count as u64);
        self.meter.ended.set(count == 0 && room > 0);
        Ok(count)
    }
}

const DESCRIPTION_TOO_LONG: &str = "what describes the next entry is longer than 1 MiB";

/// After which entry something is.
fn place(last: &Option<Vec<u8>>) -> String {
    last.as_ref().map_or_else(|| "at its start".to_owned(), |path| format!("after \"{}\"", printable(path)))
}

fn unreadable(last: &Option<Vec<u8>>, source: io::Error) -> ArchiveError {
    ArchiveError::Read { place: place(last), source }
}

fn at_fault(path: &[u8], fault: EntryFault) -> ArchiveError {
    ArchiveError::Entry { path: printable(path), fault }
}
