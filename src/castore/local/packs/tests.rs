use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::castore::fixtures::put_blob;
use crate::castore::local::LocalStore;
use crate::castore::local::crashes::crashed;
use crate::castore::{Directory, Store};

fn open(dir: &Path) -> Store {
    LocalStore::open(dir).unwrap().store()
}

fn pack(dir: &Path) -> std::path::PathBuf {
    dir.join("packs/00000000")
}

fn contents(store: &Store, digest: &Digest) -> Option<Vec<u8>> {
    let blob = store.blobs.open(digest).unwrap()?;
    let mut bytes = vec![0; blob.size() as usize];
    assert_eq!(blob.read_at(&mut bytes, 0).unwrap(), bytes.len());
    Some(bytes)
}

#[test]
fn what_the_index_lacks_is_found_again() {
    let dir = TempDir::new().unwrap();
    let store = open(dir.path());
    let (indexed, _) = put_blob(&store, b"in the index").unwrap();
    store.directories.put(vec![Directory::new()]).unwrap();
    let (pending, _) = put_blob(&store, b"not in the index").unwrap();
    let (empty, _) = put_blob(&store, b"").unwrap();
    // Closed without a crash, it is all in the index.
    for (case, dir) in [
        ("crashed", crashed(dir.path())),
        ("closed", {
            drop(store);
            crashed(dir.path())
        }),
    ] {
        if case == "crashed" {
            std::fs::remove_file(dir.path().join("index.redb")).unwrap();
            let store = open(dir.path());
            assert_eq!(contents(&store, &indexed).unwrap(), b"in the index", "without any index");
        }
        let store = open(dir.path());
        assert_eq!(contents(&store, &indexed).unwrap(), b"in the index", "{case}");
        assert_eq!(contents(&store, &pending).unwrap(), b"not in the index", "{case}");
        assert_eq!(contents(&store, &empty).unwrap(), b"", "{case}");
        assert!(!{
            let mut writer = store.blobs.create().unwrap();
            writer.write_all(b"in the index").unwrap();
            writer.finish().unwrap().new
        });
    }
}

#[test]
fn half_a_record_is_no_blob() {
    let dir = TempDir::new().unwrap();
    let store = open(dir.path());
    let (whole, _) = put_blob(&store, b"whole").unwrap();
    let first = std::fs::metadata(pack(dir.path())).unwrap().len();
    let (half, _) = put_blob(&store, &[7; 1000]).unwrap();
    let second = std::fs::metadata(pack(dir.path())).unwrap().len();
    assert_eq!(second - first, HEADER_BYTES as u64 + 1000);
    for end in [first, first + 1, first + 4, first + 39, first + 40, first + 41, second - 1] {
        let dir = crashed(dir.path());
        OpenOptions::new().write(true).open(pack(dir.path())).unwrap().set_len(end).unwrap();
        let store = open(dir.path());
        assert_eq!(contents(&store, &whole).unwrap(), b"whole", "cut off at {end}");
        assert_eq!(contents(&store, &half), None, "cut off at {end}");
        assert_eq!(std::fs::metadata(pack(dir.path())).unwrap().len(), first);
        put_blob(&store, &[7; 1000]).unwrap();
        let dir = crashed(dir.path());
        assert_eq!(contents(&open(dir.path()), &half).unwrap(), [7; 1000], "stored again after {end}");
    }
    // What a crash of the machine may leave: the length, but not the bytes.
    for rest in [vec![0; 1040], vec![0xff; 1040]] {
        let dir = crashed(dir.path());
        let file = OpenOptions::new().write(true).open(pack(dir.path())).unwrap();
        file.write_all_at(&rest, first).unwrap();
        assert_eq!(contents(&open(dir.path()), &half), None);
    }
}

#[test]
fn a_flipped_bit_is_found_out_and_the_blob_can_be_stored_again() {
    let dir = TempDir::new().unwrap();
    let (digest, _) = put_blob(&open(dir.path()), b"sound").unwrap();
    for indexed in [true, false] {
        let dir = if indexed { crashed(dir.path()) } else { TempDir::new().unwrap() };
        let store = open(dir.path());
        put_blob(&store, b"sound").unwrap();
        let file = OpenOptions::new().write(true).open(pack(dir.path())).unwrap();
        file.write_all_at(b"S", HEADER_BYTES as u64).unwrap();
        let refused = store.blobs.open(&digest).err().unwrap();
        assert!(matches!(refused, StoreError::Damaged { digest: named, .. } if named == digest), "{refused}");
        assert_eq!(store.blobs.stat(&digest).unwrap(), None, "it is forgotten");
        put_blob(&store, b"sound").unwrap();
        assert_eq!(contents(&store, &digest).unwrap(), b"sound");
    }
}

#[test]
fn a_pack_that_was_cut_off_loses_what_it_held_and_nothing_else() {
    let dir = TempDir::new().unwrap();
    let store = open(dir.path());
    let (kept, _) = put_blob(&store, b"kept").unwrap();
    let (lost, _) = put_blob(&store, b"lost").unwrap();
    drop(store);
    let end = std::fs::metadata(pack(dir.path())).unwrap().len();
    OpenOptions::new().write(true).open(pack(dir.path())).unwrap().set_len(end - 2).unwrap();
    let store = open(dir.path());
    let (new, _) = put_blob(&store, b"new").unwrap();
    assert_eq!(contents(&store, &lost), None);
    assert_eq!(contents(&store, &kept).unwrap(), b"kept");
    assert_eq!(contents(&store, &new).unwrap(), b"new");
    // What was added after the cut is found again.
    let crash = crashed(dir.path());
    let store = open(crash.path());
    assert_eq!(contents(&store, &kept).unwrap(), b"kept");
    assert_eq!(contents(&store, &new).unwrap(), b"new");
    assert!(put_blob(&store, b"lost").is_ok());
    assert_eq!(contents(&store, &lost).unwrap(), b"lost");
}

#[test]
fn writers_of_one_blob_do_each_other_no_harm() {
    let dir = TempDir::new().unwrap();
    let store = open(dir.path());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for number in 0..200u32 {
                    put_blob(&store, &number.to_le_bytes()).unwrap();
                    if number % 50 == 0 {
                        store.directories.put(vec![Directory::new()]).unwrap();
                    }
                }
            });
        }
    });
    for store in [store, open(crashed(dir.path()).path())] {
        for number in 0..200u32 {
            assert_eq!(contents(&store, &Digest::of(&number.to_le_bytes())).unwrap(), number.to_le_bytes());
        }
    }
}

/// Records behind one another, as in a pack.
fn pack_of(blobs: &[Vec<u8>]) -> Vec<u8> {
    let record = |blob: &Vec<u8>| [&header(&Digest::of(blob), blob.len() as u32)[..], blob].concat();
    blobs.iter().flat_map(record).collect()
}

proptest! {
    /// Whatever stands before, between and behind them, whole records are found, and nothing else.
    #[test]
    fn any_bytes_are_a_pack(
        blobs in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..50), 0..6),
        noise in proptest::collection::vec(prop_oneof![Just(b'c'), Just(b'b'), any::<u8>()], 0..60),
        at in 0..6usize,
        cut in 0..200usize,
    ) {
        let (before, behind) = blobs.split_at(at.min(blobs.len()));
        let bytes = [pack_of(before), noise, pack_of(behind)].concat();
        let found = |bytes: &[u8]| -> Vec<Vec<u8>> {
            records(bytes).map(|(at, digest, contents)| {
                assert_eq!(&bytes[at..at + contents.len()], contents);
                assert_eq!(Digest::of(contents), digest);
                contents.to_vec()
            }).collect()
        };
        prop_assert_eq!(found(&bytes), blobs.clone());
        let cut = cut.min(bytes.len());
        let whole = found(&bytes[..bytes.len() - cut]);
        prop_assert_eq!(&whole[..], &blobs[..whole.len()]);
    }
}
