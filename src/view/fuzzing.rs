//! What the fuzz target of the view drives: the table of numbers and the listings, as the kernel would, against a
//! plain model of them. Tests do the same with a few thousand random inputs.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::fs::{AFTER_DOTS, from_offset};
use super::inodes::{Inode, Inodes, Listing};
use crate::castore::{Digest, Name, Node, Target};

/// How many entries a directory has at most, and how many things are asked.
const MAX_ENTRIES: usize = 40;
const MAX_STEPS: usize = 400;

/// The fuzzer's bytes, taken from the front; zeros once they are used up.
struct Choices<'a>(&'a [u8]);

impl<'a> Choices<'a> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        taken
    }

    fn number(&mut self) -> u64 {
        let mut bytes = [0; 8];
        bytes.iter_mut().for_each(|byte| *byte = self.byte());
        u64::from_le_bytes(bytes)
    }

    fn below(&mut self, end: usize) -> usize {
        usize::from(self.byte()).checked_rem(end).unwrap_or(0)
    }

    fn node(&mut self) -> Node {
        // Few contents, so that some are the same.
        let digest = Digest::of(&[self.byte() % 4]);
        match self.byte() % 4 {
            0 => Node::Directory { digest, size: u64::from(self.byte()) },
            1 => Node::File { digest, size: self.number(), executable: false },
            2 => Node::File { digest, size: 0, executable: self.byte() > 127 },
            _ => Node::Symlink { target: Target::new(vec![1 + self.byte() % 4]).expect("a target") },
        }
    }

    fn entries(&mut self) -> BTreeMap<Name, Node> {
        let count = self.below(MAX_ENTRIES);
        let mut entries = BTreeMap::new();
        for _ in 0..count {
            let len = self.below(6);
            if let Ok(name) = Name::new(self.bytes(len)) {
                entries.insert(name, self.node());
            }
        }
        entries
    }
}

/// What the kernel holds of the view, as far as it was told.
#[derive(Default)]
struct Kernel {
    /// The lookups of each number.
    held: HashMap<u64, u64>,
    /// Directories by number, and what is in them.
    directories: Vec<(u64, Arc<Listing>)>,
}

/// Asks for entries, listings and numbers as `bytes` say.
///
/// # Panics
/// Where an answer is not what it must be.
pub fn lookups(bytes: &[u8]) {
    let mut choices = Choices(bytes);
    let trees = [choices.entries(), choices.entries()];
    let listings = trees.clone().map(|tree| Arc::new(Listing::from(tree)));
    for (tree, listing) in trees.iter().zip(&listings) {
        check_listing(tree, listing, &mut choices);
    }
    let names = ["a", "b"].map(|name| Name::new(name).expect("a name"));
    let (mut inodes, mut kernel) = (Inodes::new(), Kernel::default());
    let mut builds: [Option<u64>; 2] = [None, None];
    for _ in 0..MAX_STEPS {
        if choices.0.is_empty() {
            break;
        }
        let which = choices.below(2);
        let (name, listing) = (&names[which], &listings[which]);
        match choices.byte() % 8 {
            0 if builds[which].is_none() => {
                let number = inodes.expose(name.clone(), Arc::clone(listing)).expect("the name is free");
                assert!(inodes.expose(name.clone(), Arc::clone(listing)).is_none(), "the name is taken");
                builds[which] = Some(number);
                kernel.directories.push((number, Arc::clone(listing)));
            }
            1 => {
                let found = inodes.enter_build(name.as_bytes());
                if let Some(number) = found {
                    assert_eq!(builds[which], Some(number));
                    *kernel.held.entry(number).or_default() += 1;
                }
            }
            2 => {
                if let Some(number) = builds[which].take() {
                    inodes.retire(name);
                    assert_eq!(inodes.enter_build(name.as_bytes()), None, "it is hidden");
                    inodes.release(name);
                    if !kernel.held.contains_key(&number) {
                        kernel.directories.retain(|(directory, _)| *directory != number);
                        assert!(inodes.get(number).is_none());
                    }
                }
            }
            3 => list_root(&inodes, &builds),
            4 => {
                // Most are small, and some of those are in use.
                let number = if choices.byte() == 0 { choices.number() } else { u64::from(choices.byte()) };
                inodes.forget(number, 0);
                let _ =
                    (inodes.get(number), inodes.read(number), inodes.keep(number), inodes.build_of(number));
                if let Some(held) = kernel.held.get_mut(&number) {
                    // It may have been a file that can be kept.
                    *held += u64::from(matches!(inodes.get(number), Some(Inode::File(_))));
                }
            }
            5 => kernel.forget(&mut inodes, &builds, &mut choices),
            _ => kernel.look_up(&mut inodes, &listings, &mut choices),
        }
        for number in kernel.held.keys() {
            assert!(inodes.get(*number).is_some(), "what the kernel holds is there");
        }
    }
    // In the end nothing is left.
    for (name, build) in names.iter().zip(builds) {
        if build.is_some() {
            inodes.retire(name);
            inodes.release(name);
        }
    }
    for (number, count) in kernel.held {
        inodes.forget(number, count);
        assert!(inodes.get(number).is_none(), "all lookups are forgotten");
    }
    assert!(inodes.known_listings().is_empty());
}

impl Kernel {
    /// Looks up an entry of a directory that it knows, by position.
    fn look_up(&mut self, inodes: &mut Inodes, listings: &[Arc<Listing>; 2], choices: &mut Choices<'_>) {
        let at = choices.below(self.directories.len());
        let Some((parent, listing)) = self.directories.get(at).map(|(n, l)| (*n, Arc::clone(l))) else {
            return;
        };
        let position = choices.below(listing.len() + 1);
        let Some((_, node)) = listing.get(position) else { return };
        let before = inodes.find(parent, position, node);
        let number = inodes.enter(parent, position, node).expect("the directory is there");
        assert!(before.is_none_or(|before| before == number), "it has one number");
        assert_eq!(inodes.find(parent, position, node), Some(number));
        *self.held.entry(number).or_default() += 1;
        let matches = match (node, inodes.get(number)) {
            (Node::Directory { .. }, Some(Inode::Directory(place, _))) => {
                assert_eq!((place.parent, Some(place.build)), (parent, inodes.build_of(parent)));
                if self.directories.iter().all(|(known, _)| *known != number) {
                    let listing = &listings[choices.below(2)];
                    inodes.fill(number, Arc::clone(listing));
                    self.directories.push((number, Arc::clone(listing)));
                }
                true
            }
            (Node::File { digest, size, executable }, Some(Inode::File(file))) => {
                (file.digest, file.size, file.executable) == (*digest, *size, *executable)
            }
            (Node::Symlink { target }, Some(Inode::Symlink(found))) => *found == *target,
            _ => false,
        };
        assert!(matches, "{node:?} is {:?}", inodes.get(number));
    }

    /// Takes lookups of something back.
    fn forget(&mut self, inodes: &mut Inodes, builds: &[Option<u64>; 2], choices: &mut Choices<'_>) {
        let mut numbers: Vec<u64> = self.held.keys().copied().collect();
        numbers.sort_unstable();
        let Some(number) = numbers.get(choices.below(numbers.len())).copied() else { return };
        let held = self.held.remove(&number).unwrap_or_default();
        let taken = held.min(1 + u64::from(choices.byte()));
        inodes.forget(number, taken);
        if taken < held {
            self.held.insert(number, held - taken);
        } else if !builds.contains(&Some(number)) {
            assert!(inodes.get(number).is_none(), "nobody holds it");
            self.directories.retain(|(directory, _)| *directory != number);
        }
    }
}

/// The live builds, each once, from any offset on.
fn list_root(inodes: &Inodes, builds: &[Option<u64>; 2]) {
    let mut expected: Vec<u64> = builds.iter().flatten().copied().collect();
    expected.sort_unstable();
    let mut after = AFTER_DOTS;
    let mut found = Vec::new();
    while let Some((number, _)) = inodes.next_build(after) {
        assert!(number > after);
        found.push(number);
        after = number;
    }
    assert_eq!(found, expected);
}

/// Finding by name, and listing from any offset, against the entries themselves.
fn check_listing(tree: &BTreeMap<Name, Node>, listing: &Listing, choices: &mut Choices<'_>) {
    assert_eq!(listing.len(), tree.len());
    for (position, (name, node)) in tree.iter().enumerate() {
        assert_eq!(listing.find(name.as_bytes()), Some(position));
        assert_eq!(listing.get(position), Some(&(name.clone(), node.clone())));
    }
    let len = choices.below(8);
    let wanted = choices.bytes(len);
    assert_eq!(listing.find(wanted).is_some(), tree.contains_key(wanted));
    let offset = choices.number();
    let first = usize::try_from(offset.saturating_sub(AFTER_DOTS)).unwrap_or(usize::MAX);
    let rest: Vec<&Name> = tree.keys().skip(first).collect();
    assert_eq!(from_offset(listing, offset).map(|(_, _, name, _)| name).collect::<Vec<_>>(), rest);
    // In pages, as the kernel asks: each goes on where the last one ended.
    let room = 1 + choices.below(5);
    let (mut at, mut listed) = (0, Vec::new());
    loop {
        let page: Vec<_> =
            from_offset(listing, at).take(room).map(|(_, next, name, _)| (next, name)).collect();
        let Some((next, _)) = page.last() else { break };
        assert!(*next > at);
        at = *next;
        listed.extend(page.into_iter().map(|(_, name)| name));
    }
    assert!(listed.into_iter().eq(tree.keys()));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn any_lookups(bytes in prop::collection::vec(any::<u8>(), 0..3000)) {
            super::lookups(&bytes);
        }
    }
}
