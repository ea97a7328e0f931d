//! Bytes from anyone as a tar archive: what is taken in comes back as it is, or nothing is taken.
#![no_main]

use std::sync::atomic::AtomicBool;

use cofferdam::castore::archive::{Unpack, write};
use cofferdam::castore::ingest::Tally;
use cofferdam::castore::{Name, Node, Store, memory};
use libfuzzer_sys::fuzz_target;

/// Holes in a file cost nothing in an archive, and time to read.
const ENOUGH_BYTES: usize = 1 << 20;

fn unpacked(store: &Store, archive: &[u8]) -> Option<Node> {
    Unpack { store, tally: &Tally::default(), cancel: &AtomicBool::new(false) }.run(archive).ok()
}

fuzz_target!(|bytes: &[u8]| {
    // A sparse file may be endless: so it is for whoever adds one from the disk.
    if bytes.len() > ENOUGH_BYTES || bytes.chunks(512).any(|block| block.get(156) == Some(&b'S')) {
        return;
    }
    let (store, other) = (memory::store(), memory::store());
    let Some(root) = unpacked(&store, bytes) else { return };
    let (name, never) = (Name::new("root").expect("a name"), AtomicBool::new(false));
    let mut archive = Vec::new();
    write(&store, &root, &name, &mut archive, &never).expect("all of it is in the store");
    assert_eq!(unpacked(&other, &archive), Some(root));
});
