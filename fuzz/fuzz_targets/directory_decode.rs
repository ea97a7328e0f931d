//! Bytes from anyone as a directory: whatever decodes has one encoding, one digest, and entries that hold together.
#![no_main]

use cofferdam::castore::{Digest, Directory, Name, Node};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(directory) = Directory::decode(bytes) else { return };
    assert_eq!(directory.encode(), bytes, "there is one encoding");
    assert_eq!(directory.digest(), Digest::of(bytes));
    let mut again = Directory::new();
    let mut last: Option<&Name> = None;
    for (name, node) in directory.entries() {
        assert!(last.is_none_or(|last| last < name), "names ascend, each once");
        assert_eq!(Name::new(name.as_bytes()).as_ref(), Ok(name));
        assert_eq!(directory.get(name.as_bytes()), Some(node));
        again.insert(name.clone(), node.clone()).expect("it was inserted before");
        last = Some(name);
    }
    assert_eq!(again, directory);
    let sizes = directory.child_directories().map(|(_, _, size)| size);
    let expected = sizes.fold(2 * directory.entries().len() as u64, |sum, size| sum + size);
    assert_eq!(directory.node(), Node::Directory { digest: directory.digest(), size: expected });
});
