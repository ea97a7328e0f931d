use proptest::prelude::*;

use super::*;
use crate::castore::fixtures::{EMPTY, HELLO, KEEP, digest, name};

/// The encoding of the design's third directory.
const HELLO_ENCODED: &str = "0a290a0362696e12208b5b5d642b646bb8ed504b0862c39413e87e57491497de7bd075953f7b83810e\
     1802122d0a0568656c6c6f1220dc5a4edb8240b018124052c330270696f96771a63b45250a5c17d3000e82335518\
     0c20011a110a046c696e6b120962696e2f2e6b656570";

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
}

#[test]
fn vectors() {
    let file = |contents: &[u8], executable| Node::File {
        digest: Digest::of(contents),
        size: contents.len() as u64,
        executable,
    };
    let mut keep = Directory::new();
    keep.insert(name(b".keep"), file(b"", false)).unwrap();
    let mut hello = Directory::new();
    hello.insert(name(b"link"), Node::Symlink { target: Target::new("bin/.keep").unwrap() }).unwrap();
    hello.insert(name(b"hello"), file(b"hello world\n", true)).unwrap();
    hello.insert(name(b"bin"), keep.node()).unwrap();
    for (directory, hex, size) in [(Directory::new(), EMPTY, 0), (keep, KEEP, 2), (hello.clone(), HELLO, 8)] {
        assert_eq!(directory.node(), Node::Directory { digest: digest(hex), size });
        assert_eq!(Directory::decode(&directory.encode()).unwrap(), directory);
        assert_eq!(digest(hex).to_hex(), hex);
    }
    assert_eq!(hello.encode(), bytes(HELLO_ENCODED));
    assert_eq!(Directory::decode(&bytes(HELLO_ENCODED)).unwrap(), hello);
}

/// A field of bytes, of a length below 128.
fn field(number: u8, contents: &[u8]) -> Vec<u8> {
    [&[number << 3 | 2, contents.len() as u8], contents].concat()
}

/// An entry of a directory: its list, its name, a digest or target, and what follows.
fn entry(list: u8, name: &[u8], second: &[u8], rest: &[u8]) -> Vec<u8> {
    field(list, &[field(1, name), field(2, second), rest.to_vec()].concat())
}

#[test]
fn what_is_no_directory_or_not_in_its_one_form() {
    let some = [7; 32];
    let file = |name: &[u8]| entry(2, name, &some, &[]);
    let link = |name: &[u8]| entry(3, name, b"to", &[]);
    assert!(Directory::decode(&[file(b"a"), file(b"b"), link(b"aa")].concat()).is_ok());
    let bad_name = |text: &[u8]| Name::new(text).unwrap_err();
    let cases: Vec<(&str, Vec<Vec<u8>>, NodeError)> = vec![
        ("nonsense", vec![vec![0xff; 9]], NodeError::Encoding),
        ("cut off", vec![file(b"a")[..20].to_vec()], NodeError::Encoding),
        ("unsorted", vec![file(b"b"), file(b"a")], NodeError::Unsorted { name: name(b"a") }),
        ("twice", vec![file(b"a"), file(b"a")], NodeError::DuplicateName { name: name(b"a") }),
        ("twice in two lists", vec![file(b"a"), link(b"a")], NodeError::DuplicateName { name: name(b"a") }),
        ("lists in another order", vec![link(b"a"), file(b"b")], NodeError::NotCanonical),
        ("an unknown field", vec![file(b"a"), field(9, b"x")], NodeError::NotCanonical),
        ("an unknown field below", vec![entry(2, b"a", &some, &field(9, b"x"))], NodeError::NotCanonical),
        ("a size of zero, said", vec![entry(2, b"a", &some, &[0x18, 0])], NodeError::NotCanonical),
        ("not executable, said", vec![entry(2, b"a", &some, &[0x20, 0])], NodeError::NotCanonical),
        ("executable twice over", vec![entry(2, b"a", &some, &[0x20, 2])], NodeError::NotCanonical),
        ("a number too long", vec![entry(2, b"a", &some, &[0x18, 0x81, 0])], NodeError::NotCanonical),
        ("a name said twice", vec![entry(2, b"a", &some, &field(1, b"a"))], NodeError::NotCanonical),
        ("a short digest", vec![entry(2, b"a", &some[1..], &[])], NodeError::DigestLength { len: 31 }),
        ("no digest", vec![field(1, &field(1, b"a"))], NodeError::DigestLength { len: 0 }),
        ("no target", vec![field(3, &field(1, b"a"))], NodeError::Target { fault: "is empty" }),
        (
            "a target with NUL",
            vec![entry(3, b"a", b"\0", &[])],
            NodeError::Target { fault: "contains a NUL byte" },
        ),
        ("no name", vec![file(b"")], bad_name(b"")),
        ("a dot", vec![file(b".")], bad_name(b".")),
        ("two dots", vec![link(b"..")], bad_name(b"..")),
        ("a path", vec![file(b"a/b")], bad_name(b"a/b")),
        ("a NUL", vec![file(b"a\0")], bad_name(b"a\0")),
        (
            "too large",
            [b"a", b"b"]
                .map(|name| entry(1, name, &some, &[0x18, 255, 255, 255, 255, 255, 255, 255, 255, 127]))
                .into(),
            NodeError::TooLarge { name: name(b"b") },
        ),
    ];
    for (case, parts, expected) in cases {
        assert_eq!(Directory::decode(&parts.concat()).unwrap_err(), expected, "{case}");
    }
}

fn any_node() -> impl Strategy<Value = Node> {
    let digest = any::<[u8; 32]>().prop_map(Digest::from);
    prop_oneof![
        (digest.clone(), 0..1u64 << 50).prop_map(|(digest, size)| Node::Directory { digest, size }),
        (digest, any::<u64>(), any::<bool>()).prop_map(|(digest, size, executable)| Node::File {
            digest,
            size,
            executable
        }),
        prop::collection::vec(1..=255u8, 1..60)
            .prop_map(|target| Node::Symlink { target: Target::new(target).unwrap() }),
    ]
}

fn any_name() -> impl Strategy<Value = Name> {
    let text = prop_oneof![Just(vec![b'n'; 255]), prop::collection::vec(any::<u8>(), 1..12)];
    text.prop_filter_map("not a name", |bytes| Name::new(bytes).ok())
}

proptest! {
    #[test]
    fn one_directory_has_one_encoding(
        entries in prop::collection::btree_map(any_name(), any_node(), 0..12),
        at in any::<prop::sample::Index>(),
        byte in any::<u8>(),
    ) {
        let mut forwards = Directory::new();
        let mut backwards = Directory::new();
        for (name, node) in &entries {
            forwards.insert(name.clone(), node.clone()).unwrap();
        }
        for (name, node) in entries.iter().rev() {
            backwards.insert(name.clone(), node.clone()).unwrap();
        }
        prop_assert_eq!(&forwards, &backwards);
        let encoded = forwards.encode();
        prop_assert_eq!(&encoded, &backwards.encode());
        prop_assert_eq!(forwards.digest(), Digest::of(&encoded));
        prop_assert_eq!(&Directory::decode(&encoded).unwrap(), &forwards);
        let below: u64 = forwards.child_directories().map(|(_, _, size)| size).sum();
        prop_assert_eq!(forwards.size(), 2 * entries.len() as u64 + below);
        // Whatever becomes of it, it is one directory in one form or none.
        let mut changed = encoded;
        if !changed.is_empty() {
            let at = at.index(changed.len());
            changed[at] = byte;
        }
        if let Ok(other) = Directory::decode(&changed) {
            prop_assert_eq!(other.encode(), changed);
        }
    }
}
