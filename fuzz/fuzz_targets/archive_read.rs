//! Bytes from anyone as a tar archive: what is taken in comes back as it is, or nothing is taken.
#![no_main]

use std::sync::atomic::AtomicBool;

use cofferdam::castore::archive::{Unpack, write};
use cofferdam::castore::ingest::Tally;
use cofferdam::castore::{Name, Node, Store, memory};
use libfuzzer_sys::fuzz_target;
use tar::Header;

const BLOCK_BYTES: usize = 512;

/// Holes in a file cost nothing in an archive, and time to read.
const ENOUGH_BYTES: usize = 1 << 20;

fn unpacked(store: &Store, archive: &[u8]) -> Option<Node> {
    Unpack { store, tally: &Tally::default(), cancel: &AtomicBool::new(false) }.run(archive).ok()
}

/// The bytes with a checksum in each block that is read as a header, and an end: no fuzzer guesses the former.
fn mended(bytes: &[u8]) -> Vec<u8> {
    let mut archive = bytes.to_vec();
    archive.resize(archive.len().next_multiple_of(BLOCK_BYTES), 0);
    let mut at: usize = 0;
    while let Some(block) = archive.get_mut(at..at.saturating_add(BLOCK_BYTES)) {
        let mut header = Header::from_byte_slice(block).clone();
        if block.iter().all(|byte| *byte == 0) {
            break;
        }
        header.set_cksum();
        block.copy_from_slice(header.as_bytes());
        let size = header.entry_size().ok().and_then(|size| usize::try_from(size).ok());
        let size = size.and_then(|size| size.checked_next_multiple_of(BLOCK_BYTES));
        at = size.map_or(usize::MAX, |size| at.saturating_add(BLOCK_BYTES).saturating_add(size));
    }
    archive.extend_from_slice(&[0; 2 * BLOCK_BYTES]);
    archive
}

fuzz_target!(|bytes: &[u8]| {
    // A sparse file may be endless: so it is for whoever adds one from the disk.
    if bytes.len() > ENOUGH_BYTES || bytes.chunks(512).any(|block| block.get(156) == Some(&b'S')) {
        return;
    }
    let (store, other) = (memory::store(), memory::store());
    let Some(root) = unpacked(&store, &mended(bytes)) else { return };
    let (name, never) = (Name::new("root").expect("a name"), AtomicBool::new(false));
    let mut archive = Vec::new();
    write(&store, &root, &name, &mut archive, &never).expect("all of it is in the store");
    assert_eq!(unpacked(&other, &archive), Some(root));
});
