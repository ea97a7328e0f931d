//! The numbers by which the kernel knows what it has seen of the view.
//!
//! * A file has one number for each (digest, size, executable), in whatever build and under whatever
//!   name: that is what makes builds share its pages. The size belongs to it, so that an entry which
//!   states a wrong size harms nobody but its own tree.
//! * A symbolic link has one for each target.
//! * A directory has one for each build and path. The kernel keeps one dentry per directory number, and
//!   a lookup under a second path would move it there: `..` and `pwd` would go wrong in the first.
//!
//! A file that was read may be looked up once more, as an entry of the directory [`KEPT`]. For as long as the
//! kernel remembers that one, it remembers the file's pages, also after all builds that have it are gone.
//!
//! Numbers are never used again. An entry lives for as long as the kernel remembers it (lookups granted
//! less lookups forgotten), and the directory of a build at least until the build is released.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::castore::{Digest, Directory, Name, Node, Target};

/// The number of the view's own root.
pub const ROOT: u64 = 1;

/// The number of the directory whose entries are the files that are kept, called by their numbers. It is not
/// listed.
pub const KEPT: u64 = 2;

/// What that directory is called in the root.
pub const KEPT_NAME: &str = ".kept";

/// At most this many files are remembered as read until [`Inodes::take_read`] is called.
const MAX_READ: usize = 1 << 16;

/// The first number given away. 0 means "nothing" to the kernel, and in the listing of the root, whose
/// offsets are the numbers of builds, 1 and 2 stand for `.` and `..`.
const FIRST: u64 = 3;

/// The entries of a directory, ascending by name, each with a fixed position.
#[derive(Debug, Default)]
pub struct Listing(Vec<(Name, Node)>);

impl Listing {
    /// The entry at `position`.
    pub fn get(&self, position: usize) -> Option<&(Name, Node)> {
        self.0.get(position)
    }

    /// The position of the entry called `name`.
    pub fn find(&self, name: &[u8]) -> Option<usize> {
        self.0.binary_search_by(|(entry, _)| entry.as_bytes().cmp(name)).ok()
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether a file of these contents is among the entries.
    pub fn has_file(&self, wanted: &Digest) -> bool {
        self.0.iter().any(|(_, node)| matches!(node, Node::File { digest, .. } if digest == wanted))
    }
}

impl From<&Directory> for Listing {
    fn from(directory: &Directory) -> Self {
        Self(directory.entries().map(|(name, node)| (name.clone(), node.clone())).collect())
    }
}

impl From<BTreeMap<Name, Node>> for Listing {
    fn from(entries: BTreeMap<Name, Node>) -> Self {
        Self(entries.into_iter().collect())
    }
}

/// What makes two files one to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileId {
    /// The contents.
    pub digest: Digest,
    /// Their length as the directory states it.
    pub size: u64,
    /// Whether the file may be executed.
    pub executable: bool,
}

/// What stands behind a number.
#[derive(Clone, Debug)]
pub enum Inode {
    /// The view's root, which lists the live builds.
    Root,
    /// The directory of files that are kept.
    Kept,
    /// A build's directory, or one below it.
    Directory(Place, Entries),
    /// A file.
    File(FileId),
    /// A symbolic link.
    Symlink(Arc<Target>),
}

/// Where a directory stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    /// The number of the build's directory.
    pub build: u64,
    /// The number of the directory above.
    pub parent: u64,
    /// The position in the listing of the directory above; no meaning for a build's directory.
    position: usize,
}

/// The entries of a directory.
#[derive(Clone, Debug)]
pub enum Entries {
    /// Not read yet; they are under this digest in the store.
    Stored(Digest),
    /// These.
    Known(Arc<Listing>),
}

#[derive(Debug)]
struct Record {
    inode: Inode,
    /// Lookups that the kernel holds, plus one while a build of ours holds its directory.
    held: u64,
    /// Whether it is a file that was read.
    read: bool,
    /// The directory in which it was looked up last, and the position there.
    seen: (u64, u32),
}

/// A file that is read.
pub struct Reading {
    /// The file.
    pub file: FileId,
    /// The directory in which it was looked up last, its entries and the position there, if that is still known.
    pub seen: Option<(u64, Arc<Listing>, usize)>,
}

#[derive(Debug)]
struct Build {
    number: u64,
    /// Still to be seen; false between `retire` and `release`.
    live: bool,
}

/// The table of numbers.
#[derive(Debug)]
pub struct Inodes {
    next: u64,
    records: HashMap<u64, Record>,
    files: HashMap<FileId, u64>,
    symlinks: HashMap<Arc<Target>, u64>,
    directories: HashMap<Place, u64>,
    builds: HashMap<Name, Build>,
    /// The live builds by number, which is the order of the root's listing.
    live: BTreeMap<u64, Name>,
    /// Files that were read for the first time since they were last asked for.
    read: Vec<u64>,
}

impl Inodes {
    /// A table that knows the root alone.
    pub fn new() -> Self {
        Self {
            next: FIRST,
            records: HashMap::new(),
            files: HashMap::new(),
            symlinks: HashMap::new(),
            directories: HashMap::new(),
            builds: HashMap::new(),
            live: BTreeMap::new(),
            read: Vec::new(),
        }
    }

    /// How many numbers are alive, the root's not counted.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// What stands behind `number`; `None` where the kernel should have forgotten it.
    pub fn get(&self, number: u64) -> Option<Inode> {
        match number {
            ROOT => Some(Inode::Root),
            KEPT => Some(Inode::Kept),
            _ => self.records.get(&number).map(|record| record.inode.clone()),
        }
    }

    /// The file behind `number`, and notes that it is read; `None` where there is no such file.
    pub fn read(&mut self, number: u64) -> Option<Reading> {
        let record = self.records.get_mut(&number)?;
        let Inode::File(file) = record.inode else { return None };
        let (parent, position) = record.seen;
        self.note_read(number);
        let seen = match self.records.get(&parent).map(|parent| &parent.inode) {
            Some(Inode::Directory(_, Entries::Known(listing))) => {
                Some((parent, Arc::clone(listing), position as usize))
            }
            _ => None,
        };
        Some(Reading { file, seen })
    }

    /// The number of a file that is to be read ahead, and notes that it is read; `None` where the kernel doesn't know it,
    /// or has read it before.
    pub fn read_ahead(&mut self, file: FileId) -> Option<u64> {
        let number = *self.files.get(&file)?;
        self.records.get(&number).is_some_and(|record| !record.read).then(|| self.note_read(number))?;
        Some(number)
    }

    fn note_read(&mut self, number: u64) {
        if let Some(record) = self.records.get_mut(&number)
            && !record.read
            && self.read.len() < MAX_READ
        {
            record.read = true;
            self.read.push(number);
        }
    }

    /// The files that were read for the first time since this was last called.
    pub fn take_read(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.read)
    }

    /// Grants a lookup of a file under its number; `None` where the kernel has forgotten it.
    pub fn keep(&mut self, number: u64) -> Option<FileId> {
        let record = self.records.get_mut(&number)?;
        let Inode::File(file) = record.inode else { return None };
        record.held += 1;
        Some(file)
    }

    /// Notes that a file is no longer kept: the next one to read it reads it for the first time.
    pub fn let_go(&mut self, number: u64) {
        if let Some(record) = self.records.get_mut(&number) {
            record.read = false;
        }
    }

    /// Makes the directory of a build and holds it; `None` where the name is taken.
    pub fn expose(&mut self, name: Name, inputs: Arc<Listing>) -> Option<u64> {
        if self.builds.contains_key(&name) || name.as_bytes() == KEPT_NAME.as_bytes() {
            return None;
        }
        let number = self.next;
        let place = Place { build: number, parent: ROOT, position: 0 };
        self.add(Inode::Directory(place, Entries::Known(inputs)));
        self.live.insert(number, name.clone());
        self.builds.insert(name, Build { number, live: true });
        Some(number)
    }

    /// Hides a build: it is neither found nor listed any more, but its name stays taken.
    pub fn retire(&mut self, name: &Name) {
        if let Some(build) = self.builds.get_mut(name) {
            build.live = false;
            self.live.remove(&build.number);
        }
    }

    /// Lets go of a build's directory and of its name.
    pub fn release(&mut self, name: &Name) {
        if let Some(build) = self.builds.remove(name) {
            self.live.remove(&build.number);
            self.forget(build.number, 1);
        }
    }

    /// Grants a lookup of a live build's directory and yields its number.
    pub fn enter_build(&mut self, name: &[u8]) -> Option<u64> {
        let build = self.builds.get(name).filter(|build| build.live)?;
        self.records.get_mut(&build.number)?.held += 1;
        Some(build.number)
    }

    /// The first live build whose number is greater than `after`.
    pub fn next_build(&self, after: u64) -> Option<(u64, &Name)> {
        let after = std::ops::Bound::Excluded(after);
        self.live.range((after, std::ops::Bound::Unbounded)).next().map(|(number, name)| (*number, name))
    }

    /// Grants a lookup of the entry at `position` in the directory `parent`, which is `node`, and yields
    /// its number; `None` where `parent` is not a known directory.
    pub fn enter(&mut self, parent: u64, position: usize, node: &Node) -> Option<u64> {
        let found = self.find(parent, position, node);
        let known = found.is_some();
        let number = match found {
            Some(number) => number,
            None => {
                let inode = match node {
                    Node::Directory { digest, .. } => {
                        let place = Place { build: self.build_of(parent)?, parent, position };
                        Inode::Directory(place, Entries::Stored(*digest))
                    }
                    Node::File { digest, size, executable } => {
                        Inode::File(FileId { digest: *digest, size: *size, executable: *executable })
                    }
                    Node::Symlink { target } => Inode::Symlink(Arc::new(target.clone())),
                };
                self.add(inode)
            }
        };
        let record = self.records.get_mut(&number)?;
        record.held += u64::from(known);
        record.seen = (parent, u32::try_from(position).unwrap_or(u32::MAX));
        Some(number)
    }

    /// The number of an entry, if the kernel remembers it.
    pub fn find(&self, parent: u64, position: usize, node: &Node) -> Option<u64> {
        match node {
            Node::Directory { .. } => {
                let place = Place { build: self.build_of(parent)?, parent, position };
                self.directories.get(&place).copied()
            }
            Node::File { digest, size, executable } => {
                let id = FileId { digest: *digest, size: *size, executable: *executable };
                self.files.get(&id).copied()
            }
            Node::Symlink { target } => self.symlinks.get(target).copied(),
        }
    }

    /// Notes the entries of a directory, now that they are read.
    pub fn fill(&mut self, number: u64, listing: Arc<Listing>) {
        if let Some(Record { inode: Inode::Directory(_, entries), .. }) = self.records.get_mut(&number) {
            *entries = Entries::Known(listing);
        }
    }

    /// Takes `count` lookups back. What nobody holds any more is dropped.
    pub fn forget(&mut self, number: u64, count: u64) {
        let Some(record) = self.records.get_mut(&number) else { return };
        record.held = record.held.saturating_sub(count);
        if record.held > 0 {
            return;
        }
        match self.records.remove(&number).map(|record| record.inode) {
            Some(Inode::Directory(place, _)) => drop(self.directories.remove(&place)),
            Some(Inode::File(id)) => drop(self.files.remove(&id)),
            Some(Inode::Symlink(target)) => drop(self.symlinks.remove(&target)),
            Some(Inode::Root | Inode::Kept) | None => {}
        }
    }

    /// Gives back memory that the table took when it was much larger.
    pub fn shrink(&mut self) {
        fn shrink<K: Eq + std::hash::Hash, V>(map: &mut HashMap<K, V>) {
            if map.capacity() / 4 > map.len() {
                map.shrink_to(map.len() * 2);
            }
        }
        shrink(&mut self.records);
        shrink(&mut self.files);
        shrink(&mut self.symlinks);
        shrink(&mut self.directories);
    }

    /// The directory of the build that the directory `number` belongs to.
    pub fn build_of(&self, number: u64) -> Option<u64> {
        match self.records.get(&number)?.inode {
            Inode::Directory(place, _) => Some(place.build),
            _ => None,
        }
    }

    /// All known listings, each with the build it belongs to.
    pub fn known_listings(&self) -> Vec<(u64, Arc<Listing>)> {
        let inodes = self.directories.values().filter_map(|number| self.records.get(number));
        inodes
            .filter_map(|record| match &record.inode {
                Inode::Directory(place, Entries::Known(listing)) => Some((place.build, Arc::clone(listing))),
                _ => None,
            })
            .collect()
    }

    fn add(&mut self, inode: Inode) -> u64 {
        let number = self.next;
        self.next += 1;
        match &inode {
            Inode::Directory(place, _) => drop(self.directories.insert(*place, number)),
            Inode::File(id) => drop(self.files.insert(*id, number)),
            Inode::Symlink(target) => drop(self.symlinks.insert(Arc::clone(target), number)),
            Inode::Root | Inode::Kept => {}
        }
        self.records.insert(number, Record { inode, held: 1, read: false, seen: (0, 0) });
        number
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn name(text: &str) -> Name {
        Name::new(text).unwrap()
    }

    fn file(text: &str, executable: bool) -> Node {
        Node::File { digest: Digest::of(text.as_bytes()), size: text.len() as u64, executable }
    }

    fn directory(text: &str) -> Node {
        Node::Directory { digest: Digest::of(text.as_bytes()), size: 0 }
    }

    fn symlink(text: &str) -> Node {
        Node::Symlink { target: Target::new(text).unwrap() }
    }

    fn build(inodes: &mut Inodes, id: &str) -> u64 {
        inodes.expose(name(id), Arc::default()).unwrap()
    }

    #[test]
    fn files_and_links_are_shared_and_directories_are_not() {
        let mut inodes = Inodes::new();
        let (a, b) = (build(&mut inodes, "a"), build(&mut inodes, "b"));
        let mut resized = file("x", false);
        if let Node::File { size, .. } = &mut resized {
            *size = 7;
        }
        let cases = [
            ("the same file in two builds", file("x", false), file("x", false), true),
            ("plain and executable", file("x", false), file("x", true), false),
            ("a wrong size", file("x", false), resized, false),
            ("two contents", file("x", false), file("y", false), false),
            ("the same link", symlink("x"), symlink("x"), true),
            ("two targets", symlink("x"), symlink("y"), false),
            ("the same directory", directory("x"), directory("x"), false),
        ];
        for (case, first, second, shared) in cases {
            let first = inodes.enter(a, 0, &first).unwrap();
            let second = inodes.enter(b, 0, &second).unwrap();
            assert_eq!(first == second, shared, "{case}");
        }
        let twice = [0, 1].map(|position| inodes.enter(a, position, &directory("x")).unwrap());
        assert_ne!(twice[0], twice[1], "two names of one directory");
        assert_eq!(inodes.enter(a, 1, &directory("x")), Some(twice[1]), "a second lookup");
    }

    #[test]
    fn a_number_lives_until_the_last_lookup_is_forgotten_and_is_not_used_again() {
        for node in [file("x", true), symlink("x"), directory("x")] {
            let mut inodes = Inodes::new();
            let a = build(&mut inodes, "a");
            let number = inodes.enter(a, 0, &node).unwrap();
            assert_eq!(inodes.enter(a, 0, &node), Some(number));
            inodes.forget(number, 1);
            assert!(inodes.get(number).is_some());
            inodes.forget(number, 1);
            assert!(inodes.get(number).is_none());
            assert_eq!(inodes.len(), 1);
            assert!(inodes.enter(a, 0, &node).unwrap() > number);
        }
    }

    #[test]
    fn a_build_is_found_until_retired_and_its_name_is_free_once_released() {
        let mut inodes = Inodes::new();
        let a = build(&mut inodes, "a");
        assert_eq!(inodes.enter_build(b"a"), Some(a));
        assert_eq!(inodes.next_build(0), Some((a, &name("a"))));
        assert_eq!(inodes.expose(name("a"), Arc::default()), None);
        inodes.retire(&name("a"));
        assert_eq!(inodes.enter_build(b"a"), None);
        assert_eq!(inodes.next_build(0), None);
        assert_eq!(inodes.expose(name("a"), Arc::default()), None);
        inodes.release(&name("a"));
        assert!(inodes.get(a).is_some(), "the kernel still remembers it");
        let again = build(&mut inodes, "a");
        assert_ne!(a, again);
        inodes.forget(a, 1);
        assert!(inodes.get(a).is_none());
        assert_eq!(inodes.len(), 1);
    }

    #[test]
    fn a_directory_belongs_to_the_build_it_was_entered_from() {
        let mut inodes = Inodes::new();
        let (a, b) = (build(&mut inodes, "a"), build(&mut inodes, "b"));
        let below = inodes.enter(a, 0, &directory("x")).unwrap();
        let deeper = inodes.enter(below, 0, &directory("y")).unwrap();
        assert_eq!(inodes.build_of(deeper), Some(a));
        assert_eq!(inodes.known_listings().len(), 2);
        inodes.fill(deeper, Arc::default());
        let mut builds: Vec<u64> = inodes.known_listings().into_iter().map(|(build, _)| build).collect();
        builds.sort_unstable();
        assert_eq!(builds, [a, a, b]);
        let plain = inodes.enter(a, 1, &file("f", false)).unwrap();
        assert_eq!(inodes.enter(plain, 0, &directory("z")), None, "a file has no entries");
    }

    proptest! {
        /// Whatever is looked up, in whatever order it is forgotten: counts agree with a plain count,
        /// and nothing is left in the end.
        #[test]
        fn counts_agree_with_a_plain_count(steps in proptest::collection::vec((0..4usize, 0..3usize, 0..2u8), 0..200)) {
            let mut inodes = Inodes::new();
            let builds = [build(&mut inodes, "a"), build(&mut inodes, "b")];
            let nodes = [file("x", false), file("x", true), symlink("x"), directory("x")];
            let mut held: HashMap<u64, u64> = HashMap::new();
            for (kind, position, which) in steps {
                let parent = builds[usize::from(which)];
                if position < 2 {
                    *held.entry(inodes.enter(parent, position, &nodes[kind]).unwrap()).or_default() += 1;
                } else if let Some(number) = inodes.find(parent, 0, &nodes[kind]) {
                    inodes.forget(number, 1);
                    let count = held.get_mut(&number).unwrap();
                    *count -= 1;
                    if *count == 0 {
                        held.remove(&number);
                    }
                }
                prop_assert_eq!(inodes.len(), builds.len() + held.len());
            }
            for (number, count) in held {
                inodes.forget(number, count);
            }
            for id in ["a", "b"] {
                inodes.retire(&name(id));
                inodes.release(&name(id));
            }
            prop_assert_eq!(inodes.len(), 0);
            prop_assert!(inodes.files.is_empty() && inodes.symlinks.is_empty());
            prop_assert!(inodes.directories.is_empty() && inodes.builds.is_empty() && inodes.live.is_empty());
        }
    }
}
