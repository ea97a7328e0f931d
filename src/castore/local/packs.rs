//! Small blobs, one behind the other in a few large files.
//!
//! A file of its own costs a small blob more than its bytes: an inode, a name, several system calls to make it and
//! some to open it. In a pack it is a record, written by one call and read by one; and what was stored together lies
//! together, so that a disk is read ahead.
//!
//! ```text
//! packs/00000000   a record after the other, up to PACK_BYTES
//! record           "cblb", length of the contents (4 bytes, little endian), their digest (32 bytes), the contents
//! ```
//!
//! Records are only ever added at the end of the last pack. The index says where they lie, and lags behind: what was
//! added since it was last written is kept in memory, and found again from the packs themselves after a crash, as is
//! everything where the index itself is lost. A record counts if its contents have its digest, so half a record at the
//! end of a pack is no blob, and is cut off.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard};

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::index::{Encoded, Index};
use super::{Root, failed};
use crate::castore::node::Digest;
use crate::castore::traits::StoreError;
use crate::castore::tree::ObjectKind;
use crate::config::Lifetime;
use crate::lock::lock;
use crate::recent::Memo;

#[cfg(test)]
mod tests;

/// The largest blob that goes into a pack, in bytes.
pub(super) const SMALL_BYTES: usize = 64 * 1024;

/// A pack that has this many bytes is full.
const PACK_BYTES: u64 = 64 << 20;

/// How many blobs may be missing from the index, some 100 bytes of memory each.
const MAX_PENDING: usize = 1 << 16;

/// How many packs are kept open.
const OPEN_PACKS: usize = 128;

const MAGIC: [u8; 4] = *b"cblb";
/// No pack is longer.
const MAX_PACK_BYTES: u64 = PACK_BYTES + (HEADER_BYTES + SMALL_BYTES) as u64;

const HEADER_BYTES: usize = MAGIC.len() + 4 + Digest::LEN;

/// Where a blob lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) pack: u32,
    /// Where its contents begin.
    pub(super) offset: u64,
    /// How long they are.
    pub(super) len: u32,
}

impl Place {
    /// What the blob takes in its pack.
    pub(super) fn record_bytes(&self) -> u64 {
        HEADER_BYTES as u64 + u64::from(self.len)
    }
}

impl From<(u32, u64, u32)> for Place {
    fn from((pack, offset, len): (u32, u64, u32)) -> Self {
        Self { pack, offset, len }
    }
}

impl From<Place> for (u32, u64, u32) {
    fn from(Place { pack, offset, len }: Place) -> Self {
        (pack, offset, len)
    }
}

/// What lies at a place.
pub(super) enum Contents {
    /// The blob.
    Sound(Arc<[u8]>),
    /// Other bytes, or fewer.
    Damaged,
    /// Nothing: the pack has been removed. What was sound in it lies elsewhere.
    Moved,
}

/// Blobs that the index does not have yet, and how far the packs then are known.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) places: Vec<(Digest, Place)>,
    pub(super) ends: BTreeMap<u32, u64>,
}

pub(super) struct Packs {
    root: Arc<Root>,
    index: Arc<Index>,
    state: Mutex<State>,
    /// Held while packs reach the disk: who finds nothing left to sync must know that it has.
    turn: Mutex<()>,
    open: Memo<u32, Arc<File>>,
}

struct State {
    /// The last pack, which grows; none before the first blob.
    last: Option<Last>,
    next: u32,
    /// Packs that have something to be synced, the last one included.
    unsynced: Vec<Arc<File>>,
    pending: HashMap<Digest, Place>,
    /// Ends of the packs that have grown since the index was written.
    ends: BTreeMap<u32, u64>,
    /// A record in the making.
    record: Vec<u8>,
}

struct Last {
    number: u32,
    file: Arc<File>,
    end: u64,
}

impl Packs {
    /// Opens the packs and finds what the index does not know of them.
    pub(super) fn open(root: Arc<Root>, index: Arc<Index>) -> Result<Self, StoreError> {
        let state = State {
            last: None,
            next: 0,
            unsynced: Vec::new(),
            pending: HashMap::new(),
            ends: BTreeMap::new(),
            record: Vec::new(),
        };
        let packs =
            Self { root, index, state: Mutex::new(state), turn: Mutex::new(()), open: Memo::new(OPEN_PACKS) };
        let numbers = packs.numbers()?;
        packs.forget_what_is_gone(&numbers)?;
        for number in numbers {
            packs.recover(number)?;
        }
        Ok(packs)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// The packs there are, ascending.
    pub(super) fn numbers(&self) -> Result<Vec<u32>, StoreError> {
        let dir = self.root.path.join("packs");
        let entries = fs::read_dir(&dir).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        let entries = entries.map_err(|error| failed("list", &dir, error))?;
        let number = |entry: fs::DirEntry| {
            let name = entry.file_name();
            let name = name.to_str().filter(|name| name.len() == NAME_DIGITS)?;
            u32::from_str_radix(name, 16).ok()
        };
        let mut numbers: Vec<u32> = entries.into_iter().filter_map(number).collect();
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// Makes the index forget what it says of packs that are gone or shorter than it says. That is no crash's doing; but
    /// a blob that it names must be there, for who stores it again is told that it is, and what is added to such a pack
    /// must be found again.
    fn forget_what_is_gone(&self, numbers: &[u32]) -> Result<(), StoreError> {
        let mut gone = BTreeMap::new();
        for (pack, known) in self.index.ends()? {
            let len = match numbers.binary_search(&pack) {
                // What can't be written to, a directory say, is none, and has no length to trust.
                Ok(_) => self.open_pack(pack, OFlag::O_RDWR).and_then(|file| Ok(file.metadata()?.len())),
                Err(_) => Ok(0),
            };
            let len = len.map_err(|error| pack_error("look at", pack, error))?;
            if len < known {
                tracing::error!(
                    pack,
                    bytes = known - len,
                    "a pack is shorter than it was; what is lost is forgotten"
                );
                gone.insert(pack, len);
            }
        }
        match gone.is_empty() {
            true => Ok(()),
            false => self.index.cut_off(&gone),
        }
    }

    /// Takes up a pack: finds the records behind what the index knows, and cuts off what is none.
    fn recover(&self, number: u32) -> Result<(), StoreError> {
        let fail = |act| move |error| pack_error(act, number, error);
        let file = self.open_pack(number, OFlag::O_RDWR).map_err(fail("open"))?;
        let file = Arc::new(file);
        let known = self.index.known(number)?.unwrap_or(0);
        let len = file.metadata().map_err(fail("look at"))?.len();
        let mut end = known.min(len);
        // No record goes further; whatever made the file longer.
        let tail = len.min(MAX_PACK_BYTES).saturating_sub(end);
        let mut tail = vec![0; usize::try_from(tail).unwrap_or(0)];
        file.read_exact_at(&mut tail, end).map_err(fail("read"))?;
        let begin = end;
        for (at, digest, contents) in records(&tail) {
            let place = Place {
                pack: number,
                offset: begin + at as u64,
                len: u32::try_from(contents.len()).unwrap_or(0),
            };
            end = place.offset + contents.len() as u64;
            let mut state = self.state();
            state.pending.insert(digest, place);
            state.ends.insert(number, end);
            state.note_unsynced(&file);
            let full = state.pending.len() >= MAX_PENDING;
            drop(state);
            if full {
                self.flush()?;
            }
        }
        if end < len {
            tracing::info!(
                pack = number,
                bytes = len - end,
                "the end of a pack holds no whole blob; cut off"
            );
            file.set_len(end).map_err(fail("cut off the end of"))?;
        }
        let mut state = self.state();
        state.next = number.saturating_add(1);
        state.last = Some(Last { number, file, end });
        Ok(())
    }

    fn open_pack(&self, number: u32, flags: OFlag) -> io::Result<File> {
        let flags = flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        Ok(openat(&self.root.packs, name(number).as_str(), flags, Mode::from_bits_truncate(0o600))?.into())
    }

    /// Where a blob lies, if it is in a pack.
    pub(super) fn find(&self, digest: &Digest) -> Result<Option<Place>, StoreError> {
        self.root.keep.rescue(ObjectKind::Blob, digest);
        let pending = self.state().pending.get(digest).copied();
        match pending {
            Some(place) => Ok(Some(place)),
            None => self.index.place(digest),
        }
    }

    /// Where every small blob lies, in no order; of some also where they lay before.
    pub(super) fn places(&self) -> Result<Vec<(Digest, Place)>, StoreError> {
        // In this order: what gets into the index meanwhile is there twice, not missing.
        let pending: Vec<_> = self.state().pending.iter().map(|(digest, place)| (*digest, *place)).collect();
        let mut places = self.index.places()?;
        places.extend(pending);
        Ok(places)
    }

    /// [`Packs::find`] for many, in their order.
    pub(super) fn find_all(&self, digests: &[Digest]) -> Result<Vec<Option<Place>>, StoreError> {
        digests.iter().for_each(|digest| self.root.keep.rescue(ObjectKind::Blob, digest));
        let pending: Vec<_> = {
            let state = self.state();
            digests.iter().map(|digest| state.pending.get(digest).copied()).collect()
        };
        let indexed = self.index.places_of(digests)?;
        Ok(pending.into_iter().zip(indexed).map(|(pending, indexed)| pending.or(indexed)).collect())
    }

    /// The contents of the blob `digest`, which lies at `place`, compared with the digest.
    ///
    /// A damaged one is forgotten, so that it can be stored again.
    pub(super) fn read(&self, digest: &Digest, place: Place) -> Result<Option<Arc<[u8]>>, StoreError> {
        let damaged = match self.contents(digest, place)? {
            Contents::Moved => return Ok(None),
            Contents::Sound(contents) => return Ok(Some(contents)),
            Contents::Damaged => StoreError::Damaged { kind: "blob", digest: *digest },
        };
        tracing::error!(%digest, pack = place.pack, "a blob in the store is damaged; it is forgotten");
        self.forget(&[(*digest, place)])?;
        Err(damaged)
    }

    /// What lies at a place, compared with the digest that it should have.
    pub(super) fn contents(&self, digest: &Digest, place: Place) -> Result<Contents, StoreError> {
        let act = |error| pack_error("read", place.pack, error);
        let file = match self.open.get(&place.pack) {
            Some(file) => file,
            None => match self.open_pack(place.pack, OFlag::O_RDONLY) {
                Ok(file) => {
                    let file = Arc::new(file);
                    self.open.insert(place.pack, Arc::clone(&file), 1);
                    file
                }
                // It has just been moved to another pack.
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Contents::Moved),
                Err(error) => return Err(act(error)),
            },
        };
        let mut record = vec![0; HEADER_BYTES + place.len as usize];
        match file.read_exact_at(&mut record, place.offset.saturating_sub(HEADER_BYTES as u64)) {
            Ok(()) if first_record(&record).is_some_and(|(found, _)| found == *digest) => {
                Ok(Contents::Sound(record.get(HEADER_BYTES..).unwrap_or_default().into()))
            }
            Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => Err(act(error)),
            _ => Ok(Contents::Damaged),
        }
    }

    /// Forgets that blobs lie where they are said to.
    pub(super) fn forget(&self, blobs: &[(Digest, Place)]) -> Result<(), StoreError> {
        self.root.keep.removed();
        let mut state = self.state();
        for (digest, place) in blobs {
            if state.pending.get(digest) == Some(place) {
                state.pending.remove(digest);
            }
        }
        drop(state);
        self.index.forget(blobs)
    }

    /// Adds a blob; false where it is there already.
    pub(super) fn add(&self, digest: &Digest, contents: &[u8]) -> Result<bool, StoreError> {
        self.root.keep.rescue(ObjectKind::Blob, digest);
        let mut state = self.state();
        // Under the lock, where nothing is removed.
        if state.pending.contains_key(digest) || self.index.place(digest)?.is_some() {
            return Ok(false);
        }
        self.append(&mut state, digest, contents)
            .map_err(|error| StoreError::io("write", "a new blob", error))?;
        let full = state.pending.len() >= MAX_PENDING;
        drop(state);
        if full {
            self.flush()?;
        }
        Ok(true)
    }

    fn append(&self, state: &mut State, digest: &Digest, contents: &[u8]) -> io::Result<()> {
        let len = u32::try_from(contents.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
        if state.last.as_ref().is_none_or(|last| last.end >= PACK_BYTES) {
            let number = state.next;
            // Where this fails there may be a file of that name already.
            state.next = number.checked_add(1).ok_or(io::ErrorKind::StorageFull)?;
            state.last = Some(self.begin(number)?);
        }
        let State { last, record, .. } = state;
        let Some(last) = last else { return Err(io::ErrorKind::NotFound.into()) };
        record.clear();
        record.extend_from_slice(&header(digest, len));
        record.extend_from_slice(contents);
        if let Err(error) = last.file.write_all_at(record, last.end) {
            // What was written of it would be overwritten, or cut off at the next start; but the disk may be full.
            let _ = last.file.set_len(last.end);
            return Err(error);
        }
        let place = Place { pack: last.number, offset: last.end + HEADER_BYTES as u64, len };
        last.end += record.len() as u64;
        self.root.grow(record.len() as u64);
        let (number, file, end) = (last.number, Arc::clone(&last.file), last.end);
        state.note_unsynced(&file);
        state.ends.insert(number, end);
        state.pending.insert(*digest, place);
        Ok(())
    }

    /// Makes a pack, whose name is on disk when this returns.
    fn begin(&self, number: u32) -> io::Result<Last> {
        let file = self.open_pack(number, OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL)?;
        if self.root.lifetime == Lifetime::Lasting {
            nix::unistd::fsync(&self.root.packs)?;
        }
        Ok(Last { number, file: Arc::new(file), end: 0 })
    }

    /// Forgets where blobs lie, but for those that are `asked` for; says how many it has forgotten.
    ///
    /// Who looks for one comes before this, and is asked about, or after, and does not find it.
    pub(super) fn remove_unless(
        &self,
        blobs: &[(Digest, Place)],
        asked: impl Fn(&Digest) -> bool,
    ) -> Result<u64, StoreError> {
        // Nothing is added meanwhile: that a blob is there is a reason not to.
        let state = self.state();
        let gone: Vec<_> = blobs.iter().filter(|(digest, _)| !asked(digest)).copied().collect();
        self.index.forget(&gone)?;
        drop(state);
        Ok(gone.len() as u64)
    }

    /// Adds a blob again that lies at `from`, which is to go.
    pub(super) fn relocate(&self, digest: &Digest, from: Place, contents: &[u8]) -> Result<(), StoreError> {
        let mut state = self.state();
        // Forgotten meanwhile, or in another place.
        if state.pending.contains_key(digest) || self.index.place(digest)? != Some(from) {
            return Ok(());
        }
        let appended = self.append(&mut state, digest, contents);
        appended.map_err(|error| StoreError::io("move", format!("blob {digest}"), error))
    }

    /// Adds nothing more to a pack; whether otherwise something would have been.
    pub(super) fn close(&self, number: u32) -> bool {
        self.state().last.take_if(|last| last.number == number).is_some()
    }

    /// Removes a pack in which nothing lies any more.
    pub(super) fn delete(&self, number: u32) -> Result<(), StoreError> {
        let unlinked = unlinkat(&self.root.packs, name(number).as_str(), UnlinkatFlags::NoRemoveDir);
        unlinked.map_err(|errno| pack_error("remove", number, errno.into()))?;
        self.open.remove(&number);
        self.index.forget_packs(&[number])
    }

    /// What is to go into the index; [`Packs::sync`] must come between this and that.
    pub(super) fn batch(&self) -> Batch {
        let state = self.state();
        let places = state.pending.iter().map(|(digest, place)| (*digest, *place)).collect();
        Batch { places, ends: state.ends.clone() }
    }

    /// Notes that the index has this.
    pub(super) fn indexed(&self, batch: &Batch) {
        let mut state = self.state();
        for (digest, place) in &batch.places {
            if state.pending.get(digest) == Some(place) {
                state.pending.remove(digest);
            }
        }
        state.ends.retain(|pack, end| batch.ends.get(pack) != Some(end));
    }

    /// Returns once every blob that was added before is on disk.
    pub(super) fn sync(&self) -> Result<(), StoreError> {
        let _turn = lock(&self.turn);
        self.root.check_syncs()?;
        let unsynced = std::mem::take(&mut self.state().unsynced);
        if self.root.lifetime == Lifetime::Ephemeral {
            return Ok(());
        }
        unsynced.iter().try_for_each(|file| file.sync_data()).map_err(|error| {
            self.root.note_failed_sync();
            StoreError::io("sync", self.root.path.join("packs").display().to_string(), error)
        })
    }

    /// Brings the index up to date.
    pub(super) fn flush(&self) -> Result<(), StoreError> {
        self.add_with(&[])
    }

    /// The same, and adds directories.
    pub(super) fn add_with(&self, directories: &[&Encoded]) -> Result<(), StoreError> {
        let batch = self.batch();
        self.sync()?;
        let used = self.root.keep.take_used();
        if directories.is_empty() && batch.ends.is_empty() && used.is_empty() {
            return Ok(());
        }
        if let Err(error) = self.index.add(directories, &batch, &used) {
            self.root.keep.give_back(used);
            return Err(error);
        }
        self.indexed(&batch);
        Ok(())
    }
}

impl State {
    fn note_unsynced(&mut self, file: &Arc<File>) {
        if !self.unsynced.iter().any(|known| Arc::ptr_eq(known, file)) {
            self.unsynced.push(Arc::clone(file));
        }
    }
}

impl Drop for Packs {
    /// So that the next start has nothing to find.
    fn drop(&mut self) {
        if self.root.lifetime == Lifetime::Lasting
            && let Err(error) = self.flush()
        {
            tracing::warn!("the index is not up to date, the next start mends that: {error}");
        }
    }
}

const NAME_DIGITS: usize = 8;

/// What a pack is called.
pub(super) fn name(number: u32) -> String {
    format!("{number:08x}")
}

fn pack_error(act: &'static str, number: u32, error: io::Error) -> StoreError {
    StoreError::io(act, format!("pack {}", name(number)), error)
}

/// What comes before the contents of a blob.
fn header(digest: &Digest, len: u32) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    let len = len.to_le_bytes();
    let parts = MAGIC.iter().chain(&len).chain(digest.as_bytes()).copied();
    header.iter_mut().zip(parts).for_each(|(byte, part)| *byte = part);
    header
}

/// The whole records in `bytes`: where the contents of each begin, and what they are. What is none is passed over.
fn records(bytes: &[u8]) -> impl Iterator<Item = (usize, Digest, &[u8])> {
    let mut at = 0;
    std::iter::from_fn(move || {
        loop {
            let rest = bytes.get(at..).filter(|rest| !rest.is_empty())?;
            if let Some((digest, contents)) = first_record(rest) {
                let begin = at + HEADER_BYTES;
                at = begin + contents.len();
                return Some((begin, digest, contents));
            }
            // Something is damaged, or was never finished. What comes after it may still be sound.
            at += 1 + memchr::memmem::find(rest.get(1..)?, &MAGIC)?;
        }
    })
}

/// The record that `bytes` begin with, if it is whole.
fn first_record(bytes: &[u8]) -> Option<(Digest, &[u8])> {
    let rest = bytes.strip_prefix(&MAGIC)?;
    let (len, rest) = rest.split_first_chunk()?;
    let (digest, rest) = rest.split_first_chunk::<{ Digest::LEN }>()?;
    let len = usize::try_from(u32::from_le_bytes(*len)).ok().filter(|len| *len <= SMALL_BYTES)?;
    let (digest, contents) = (Digest::from(*digest), rest.get(..len)?);
    (Digest::of(contents) == digest).then_some((digest, contents))
}

#[cfg(test)]
impl Packs {
    /// How many blobs are not in the index, and how many packs not on disk.
    pub(super) fn waiting(&self) -> (usize, usize) {
        let state = self.state();
        (state.pending.len(), state.unsynced.len())
    }
}
