//! Removing what was used longest ago.
//!
//! The unit of use is a tree: what a build had as an input, what was put into the store or taken out of it under one
//! root. An object is as old as the last use of any tree that it is a part of; one that is in none, as old as itself.
//! So a directory is never older than what contains it, and what is removed first never leaves a hole.
//!
//! A collection runs beside everything else. It marks, with the index as it is at that moment; then it removes, in steps
//! that each hold a lock for a short time, and spares what anybody asked for since it began.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::time::{Duration, SystemTime};

use nix::errno::Errno;
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::index::Object;
use super::keep::seconds;
use super::packs::{Contents, Place};
use super::{LocalStore, blobs, failed, index};
use crate::castore::node::{Digest, Directory, Node};
use crate::castore::traits::StoreError;
use crate::castore::tree::ObjectKind;

#[cfg(test)]
mod tests;

/// What is younger is not removed: it may be a part of something that is still on its way here.
pub const GRACE: Duration = Duration::from_secs(600);

/// Of a size that is not to be exceeded, how much is used after a collection, so that the next one is not due at once.
const FILL_PERCENT: u64 = 90;

/// How many blobs are removed in one step.
const STEP: usize = 4096;

/// What is to be removed. Pins, leases and what is younger than [`GRACE`] stay whatever this says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Goal {
    /// What was used longest ago, once the store has more bytes than this.
    pub max_bytes: Option<u64>,
    /// What was not used since.
    pub unused_since: Option<SystemTime>,
}

/// What a store holds, in numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Blobs in packs, and what they have in bytes.
    pub small_blobs: u64,
    /// Their bytes.
    pub small_bytes: u64,
    /// Blobs with files of their own.
    pub large_blobs: u64,
    /// Their bytes.
    pub large_bytes: u64,
    /// Directories.
    pub directories: u64,
    /// What the packs take on disk, removed blobs included, in bytes.
    pub pack_bytes: u64,
    /// What the index takes.
    pub index_bytes: u64,
    /// Trees and blobs that are pinned.
    pub pins: u64,
}

impl Usage {
    /// What all of it takes on disk, in bytes, give or take what file systems add.
    pub fn total(&self) -> u64 {
        self.large_bytes + self.pack_bytes + self.index_bytes
    }
}

/// What a collection has removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// How many blobs.
    pub blobs: u64,
    /// How many directories.
    pub directories: u64,
    /// What the store takes less than before, in bytes.
    pub freed: u64,
    /// What it takes now.
    pub left: u64,
}

/// What a collection is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Finding out what is used.
    Mark,
    /// So many of so many objects are removed.
    Remove(u64, u64),
    /// So many of so many packs that are mostly empty are emptied.
    Pack(u64, u64),
}

/// When each object was used last, in seconds since the epoch.
#[derive(Default)]
struct Ages {
    directories: HashMap<Digest, u64>,
    blobs: HashMap<Digest, u64>,
}

impl Ages {
    fn of(&mut self, kind: ObjectKind) -> &mut HashMap<Digest, u64> {
        match kind {
            ObjectKind::Directory => &mut self.directories,
            ObjectKind::Blob => &mut self.blobs,
        }
    }
}

/// What there is to be removed, with its size.
struct Stock {
    small: Vec<(Digest, Place)>,
    /// With the time of its file.
    large: Vec<(Digest, u64, u64)>,
}

impl LocalStore {
    /// What the store holds.
    ///
    /// # Errors
    /// Where it can't be read.
    pub fn usage(&self) -> Result<Usage, StoreError> {
        self.packs.flush()?;
        let stock = self.stock()?;
        let mut usage = Usage {
            small_blobs: stock.small.len() as u64,
            small_bytes: stock.small.iter().map(|(_, place)| u64::from(place.len)).sum(),
            large_blobs: stock.large.len() as u64,
            large_bytes: stock.large.iter().map(|(_, len, _)| len).sum(),
            pins: self.index.pins()?.len() as u64,
            ..Usage::default()
        };
        self.index.each_directory(|_, _| {
            usage.directories += 1;
            Ok(())
        })?;
        usage.pack_bytes = self.pack_sizes()?.values().map(|(len, _)| len).sum();
        usage.index_bytes = self.index_bytes()?;
        Ok(usage)
    }

    /// What the store takes on disk, in bytes.
    pub fn disk_bytes(&self) -> Result<u64, StoreError> {
        let large: u64 = self.large()?.iter().map(|(_, len, _)| len).sum();
        let packs: u64 = self.pack_sizes()?.values().map(|(len, _)| len).sum();
        Ok(large + packs + self.index_bytes()?)
    }

    /// Pins the tree or blob `object`: it is not removed. False where it was pinned already.
    ///
    /// # Errors
    /// [`StoreError::Database`] where that can't be written down.
    pub fn pin(&self, object: Object) -> Result<bool, StoreError> {
        self.root.keep.rescue(object.kind, &object.digest);
        self.index.pin(object, Some(seconds(SystemTime::now())))
    }

    /// Pins it no longer. False where it was not pinned.
    ///
    /// # Errors
    /// As [`LocalStore::pin`].
    pub fn unpin(&self, object: Object) -> Result<bool, StoreError> {
        self.index.pin(object, None)
    }

    /// What is pinned, and since when in seconds since the epoch.
    ///
    /// # Errors
    /// [`StoreError::Database`] where that can't be read.
    pub fn pins(&self) -> Result<Vec<(Object, u64)>, StoreError> {
        self.index.pins()
    }

    /// Removes what `goal` says, in steps, for as long as `progress` says yes to them. Where a collection is under way
    /// already it does nothing.
    ///
    /// # Errors
    /// Where the store can't be read or written. What was removed until then is gone; nothing else is harmed.
    pub fn collect(
        &self,
        goal: Goal,
        progress: &mut dyn FnMut(Step) -> bool,
    ) -> Result<Collected, StoreError> {
        self.collect_at(goal, SystemTime::now(), progress)
    }

    fn collect_at(
        &self,
        goal: Goal,
        now: SystemTime,
        progress: &mut dyn FnMut(Step) -> bool,
    ) -> Result<Collected, StoreError> {
        if !self.root.keep.begin() {
            return Ok(Collected { left: self.disk_bytes()?, ..Collected::default() });
        }
        let collected = self.mark_and_remove(goal, now, progress);
        self.root.keep.end();
        collected
    }

    fn mark_and_remove(
        &self,
        goal: Goal,
        now: SystemTime,
        progress: &mut dyn FnMut(Step) -> bool,
    ) -> Result<Collected, StoreError> {
        let go_on = progress(Step::Mark);
        self.packs.flush()?;
        let before = self.disk_bytes()?;
        let over = goal.max_bytes.is_some_and(|max| before > max);
        let mut collected = Collected { left: before, ..Collected::default() };
        if !go_on || !over && goal.unused_since.is_none() {
            return Ok(collected);
        }
        let stock = self.stock()?;
        let (ages, sizes) = self.ages(&stock)?;
        let goal = if over { goal } else { Goal { max_bytes: None, ..goal } };
        let young = seconds(now.checked_sub(GRACE).unwrap_or(SystemTime::UNIX_EPOCH));
        let cut = cut(goal, &ages, &stock, &sizes).min(young);
        let old = |ages: &HashMap<Digest, u64>| -> HashSet<Digest> {
            ages.iter().filter(|(_, age)| **age < cut).map(|(digest, _)| *digest).collect()
        };
        let (directories, blobs) = (old(&ages.directories), old(&ages.blobs));
        drop((ages, sizes));
        if !directories.is_empty() || !blobs.is_empty() {
            self.root.keep.removed();
            let total = (directories.len() + blobs.len()) as u64;
            collected.directories = self.remove_directories(directories)?;
            let mut go_on = progress(Step::Remove(collected.directories, total));
            if go_on {
                self.remove_blobs(&stock, &blobs, &mut |removed| {
                    collected.blobs += removed;
                    go_on = progress(Step::Remove(collected.directories + collected.blobs, total));
                    go_on
                })?;
            }
        }
        self.repack(progress)?;
        collected.left = self.disk_bytes()?;
        collected.freed = before.saturating_sub(collected.left);
        Ok(collected)
    }

    fn stock(&self) -> Result<Stock, StoreError> {
        Ok(Stock { small: self.index.places()?, large: self.large()? })
    }

    /// Large blobs, their lengths and the times of their files.
    fn large(&self) -> Result<Vec<(Digest, u64, u64)>, StoreError> {
        let mut large = Vec::new();
        for (digest, file) in self.blob_files()? {
            let Some(digest) = digest else { continue };
            match file.metadata() {
                Ok(found) => {
                    let time = found.modified().map_or(0, seconds);
                    large.push((digest, found.len(), time));
                }
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(failed("look at", &file.path(), error)),
            }
        }
        Ok(large)
    }

    /// Length of each pack, and the time when it was last added to.
    fn pack_sizes(&self) -> Result<BTreeMap<u32, (u64, u64)>, StoreError> {
        let mut sizes = BTreeMap::new();
        for number in self.packs.numbers()? {
            let path = self.root.path.join("packs").join(super::packs::name(number));
            let found = fs::metadata(&path).map_err(|error| failed("look at", &path, error))?;
            sizes.insert(number, (found.len(), found.modified().map_or(0, seconds)));
        }
        Ok(sizes)
    }

    fn index_bytes(&self) -> Result<u64, StoreError> {
        let path = self.root.path.join(index::FILE_NAME);
        Ok(fs::metadata(&path).map_err(|error| failed("look at", &path, error))?.len())
    }

    /// When everything was used last, and the sizes of directories.
    fn ages(&self, stock: &Stock) -> Result<(Ages, HashMap<Digest, u64>), StoreError> {
        let kept = self.index.pins()?.into_iter().map(|(object, _)| object).chain(self.root.keep.leased());
        let mut roots: Vec<(Object, u64)> = kept.map(|object| (object, u64::MAX)).collect();
        roots.extend(self.index.used()?);
        roots.sort_unstable_by_key(|(_, time)| std::cmp::Reverse(*time));
        let (mut ages, mut sizes) = (Ages::default(), HashMap::new());
        for (root, time) in roots {
            self.age(&mut ages, &mut sizes, root, time)?;
        }
        let packs = self.pack_sizes()?;
        for (digest, place) in &stock.small {
            let time = packs.get(&place.pack).map_or(u64::MAX, |(_, time)| *time);
            ages.blobs.entry(*digest).or_insert(time);
        }
        for (digest, _, time) in &stock.large {
            ages.blobs.entry(*digest).or_insert(*time);
        }
        self.index.each_directory(|digest, bytes| {
            ages.directories.entry(digest).or_insert(0);
            sizes.entry(digest).or_insert(bytes.len() as u64);
            Ok(())
        })?;
        Ok((ages, sizes))
    }

    /// Gives everything in the tree of `root` that has no age yet the age `time`.
    fn age(
        &self,
        ages: &mut Ages,
        sizes: &mut HashMap<Digest, u64>,
        root: Object,
        time: u64,
    ) -> Result<(), StoreError> {
        if ages.of(root.kind).contains_key(&root.digest) {
            return Ok(());
        }
        ages.of(root.kind).insert(root.digest, time);
        let mut left = if root.kind == ObjectKind::Directory { vec![root.digest] } else { vec![] };
        while let Some(digest) = left.pop() {
            let decoded = |bytes: &[u8]| (bytes.len() as u64, Directory::decode(bytes).ok());
            let Some((size, Some(directory))) = self.index.directory(&digest, decoded)? else { continue };
            sizes.insert(digest, size);
            for (_, node) in directory.entries() {
                match node {
                    Node::Directory { digest, .. } => {
                        if let Entry::Vacant(unaged) = ages.directories.entry(*digest) {
                            unaged.insert(time);
                            left.push(*digest);
                        }
                    }
                    Node::File { digest, .. } => {
                        ages.blobs.entry(*digest).or_insert(time);
                    }
                    Node::Symlink { .. } => {}
                }
            }
        }
        Ok(())
    }

    /// Removes directories, but for those that somebody asked for, and all that these contain.
    fn remove_directories(&self, mut old: HashSet<Digest>) -> Result<u64, StoreError> {
        let _alone = self.root.keep.removing();
        let asked = self.root.keep.rescued(|rescued| -> Vec<Digest> {
            let directories = rescued.iter().filter(|object| object.kind == ObjectKind::Directory);
            directories.map(|object| object.digest).collect()
        });
        // Too much to tell what may go.
        let Some(mut asked) = asked else { return Ok(0) };
        let mut spared = HashSet::new();
        while let Some(digest) = asked.pop() {
            if !spared.insert(digest) {
                continue;
            }
            let contained = self.index.directory(&digest, |bytes| Directory::decode(bytes).ok())?.flatten();
            for (_, node) in contained.iter().flat_map(Directory::entries) {
                match node {
                    Node::Directory { digest, .. } => asked.push(*digest),
                    Node::File { digest, .. } => self.root.keep.rescue(ObjectKind::Blob, digest),
                    Node::Symlink { .. } => {}
                }
            }
        }
        old.retain(|digest| !spared.contains(digest));
        self.index.remove_directories(&old)?;
        self.store.directories.trim();
        Ok(old.len() as u64)
    }

    fn remove_blobs(
        &self,
        stock: &Stock,
        old: &HashSet<Digest>,
        removed: &mut dyn FnMut(u64) -> bool,
    ) -> Result<(), StoreError> {
        let asked = |digest: &Digest, rescued: &HashSet<Object>| {
            rescued.contains(&Object { kind: ObjectKind::Blob, digest: *digest })
        };
        let small: Vec<_> = stock.small.iter().filter(|(digest, _)| old.contains(digest)).copied().collect();
        for step in small.chunks(STEP) {
            let gone = self.packs.remove_unless(step, |digest| {
                // Who asks from now on does not find it.
                self.root.keep.rescued(|rescued| asked(digest, rescued)).unwrap_or(true)
            })?;
            if !removed(gone) {
                return Ok(());
            }
        }
        let large = stock.large.iter().map(|(digest, ..)| digest);
        let large: Vec<&Digest> = large.filter(|digest| old.contains(digest)).collect();
        for digest in &large {
            let unlinked = self.root.keep.rescued(|rescued| match asked(digest, rescued) {
                true => Err(Errno::EBUSY),
                false => {
                    unlinkat(&self.root.blobs, blobs::place(digest).as_str(), UnlinkatFlags::NoRemoveDir)
                }
            });
            match unlinked {
                Some(Ok(())) if !removed(1) => break,
                Some(Ok(())) => {}
                None | Some(Err(Errno::EBUSY | Errno::ENOENT)) => {}
                Some(Err(errno)) => return Err(blobs::refused("remove", digest, errno)),
            }
        }
        if large.is_empty() { Ok(()) } else { self.index.forget_used(large) }
    }

    /// Empties the packs of which more than half is taken by blobs that were removed.
    fn repack(&self, progress: &mut dyn FnMut(Step) -> bool) -> Result<(), StoreError> {
        let sizes = self.pack_sizes()?;
        let mut live = self.live()?;
        let sparse: Vec<u32> = sizes
            .iter()
            .filter(|(pack, (len, _))| bytes(live.get(pack).map_or(&[], Vec::as_slice)) * 2 < *len)
            .map(|(pack, _)| *pack)
            .collect();
        // What was added to the last one since is live, too.
        if sparse.iter().any(|pack| self.packs.close(*pack)) {
            self.packs.flush()?;
            live = self.live()?;
        }
        for (done, pack) in sparse.iter().enumerate() {
            if !progress(Step::Pack(done as u64, sparse.len() as u64)) {
                break;
            }
            let mut blobs = live.remove(pack).unwrap_or_default();
            blobs.sort_unstable_by_key(|(_, place)| place.offset);
            self.empty_pack(*pack, &blobs)?;
        }
        Ok(())
    }

    /// The blobs in each pack.
    fn live(&self) -> Result<BTreeMap<u32, Vec<(Digest, Place)>>, StoreError> {
        let mut live: BTreeMap<u32, Vec<(Digest, Place)>> = BTreeMap::new();
        for (digest, place) in self.index.places()? {
            live.entry(place.pack).or_default().push((digest, place));
        }
        Ok(live)
    }

    /// Moves `blobs`, which are all that a pack holds, to the last pack, and removes it.
    fn empty_pack(&self, pack: u32, blobs: &[(Digest, Place)]) -> Result<(), StoreError> {
        for (digest, place) in blobs {
            match self.packs.contents(digest, *place)? {
                Contents::Sound(contents) => self.packs.relocate(digest, *place, &contents)?,
                Contents::Damaged => {
                    tracing::error!(%digest, pack, "a blob in the store is damaged; it is forgotten");
                    self.packs.forget(&[(*digest, *place)])?;
                }
                Contents::Moved => {}
            }
        }
        self.packs.flush()?;
        self.packs.delete(pack)
    }
}

/// What blobs take in their packs.
fn bytes(blobs: &[(Digest, Place)]) -> u64 {
    blobs.iter().map(|(_, place)| place.record_bytes()).sum()
}

/// The age from which on objects stay.
fn cut(goal: Goal, ages: &Ages, stock: &Stock, directories: &HashMap<Digest, u64>) -> u64 {
    let unused = goal.unused_since.map_or(0, seconds);
    let Some(max) = goal.max_bytes else { return unused };
    let mut by_age: BTreeMap<u64, u64> = BTreeMap::new();
    let mut add =
        |age: Option<&u64>, bytes: u64| *by_age.entry(age.copied().unwrap_or(0)).or_default() += bytes;
    stock.small.iter().for_each(|(digest, place)| add(ages.blobs.get(digest), place.record_bytes()));
    stock.large.iter().for_each(|(digest, len, _)| add(ages.blobs.get(digest), *len));
    directories.iter().for_each(|(digest, size)| add(ages.directories.get(digest), *size));
    let room = max / 100 * FILL_PERCENT;
    let mut kept: u64 = 0;
    for (age, bytes) in by_age.iter().rev() {
        kept = kept.saturating_add(*bytes);
        if kept > room {
            return unused.max(age.saturating_add(1));
        }
    }
    unused
}
