use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

use tempfile::TempDir;

use super::*;
use crate::castore::fixtures::{Sketch, put_blob};

fn check(dir: &Path, repair: Repair) -> Vec<Problem> {
    let mut last = Progress { done: 0, total: 0 };
    let store = LocalStore::open(dir).unwrap();
    let report = store.verify(repair, &mut |progress| last = progress).unwrap();
    assert!(last.done <= last.total);
    report.problems
}

/// A store with a tree of small and large files, and the digests of two of them and of the tree.
fn filled(dir: &Path) -> (Digest, Digest, Digest) {
    let store = LocalStore::open(dir).unwrap();
    let large = Sketch::File { contents: vec![7; 100_000], executable: false };
    let below = Sketch::directory([("small", Sketch::file("small")), ("large", large)]);
    let tree = Sketch::directory([("below", below), ("other", Sketch::file("other"))]);
    let Node::Directory { digest, .. } = tree.put(&store.store()) else { panic!("{tree:?}") };
    (Digest::of(b"small"), Digest::of(&[7; 100_000]), digest)
}

fn flip(file: &Path, at: u64) {
    std::fs::set_permissions(file, PermissionsExt::from_mode(0o600)).unwrap();
    let file = OpenOptions::new().read(true).write(true).open(file).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

#[test]
fn a_sound_store_has_no_problems() {
    let dir = TempDir::new().unwrap();
    filled(dir.path());
    let report = LocalStore::open(dir.path()).unwrap().verify(Repair::No, &mut |_| ()).unwrap();
    assert_eq!(report.problems, []);
    assert_eq!((report.blobs, report.bytes, report.directories), (3, 100_010, 2));
}

#[test]
fn every_flipped_byte_of_a_pack_is_found() {
    let dir = TempDir::new().unwrap();
    filled(dir.path());
    let pack = dir.path().join("packs/00000000");
    let len = std::fs::metadata(&pack).unwrap().len();
    for at in 0..len {
        flip(&pack, at);
        let problems = check(dir.path(), Repair::No);
        let damaged = problems.iter().filter(|problem| matches!(problem, Problem::Damaged { .. })).count();
        assert_eq!(damaged, 1, "byte {at}: {problems:?}");
        flip(&pack, at);
    }
    assert_eq!(check(dir.path(), Repair::No), []);
}

#[test]
fn what_is_wrong_is_told_and_removed_and_can_be_stored_again() {
    type Spoil = fn(&Path, &Path);
    let cases: [(&str, Spoil); 5] = [
        ("a flipped bit", |_, large| flip(large, 50_000)),
        ("a large blob cut off", |_, large| {
            std::fs::set_permissions(large, PermissionsExt::from_mode(0o600)).unwrap();
            OpenOptions::new().write(true).open(large).unwrap().set_len(5).unwrap();
        }),
        ("a large blob gone", |_, large| std::fs::remove_file(large).unwrap()),
        ("a pack cut off", |pack, _| OpenOptions::new().write(true).open(pack).unwrap().set_len(42).unwrap()),
        ("a pack gone", |pack, _| std::fs::remove_file(pack).unwrap()),
    ];
    for (case, spoil) in cases {
        let dir = TempDir::new().unwrap();
        let (small, large, tree) = filled(dir.path());
        let file = dir.path().join("blobs").join(crate::castore::local::blobs::place(&large));
        spoil(&dir.path().join("packs/00000000"), &file);
        let digest = if case.contains("pack") { small } else { large };
        let missing =
            |problem: &Problem| matches!(problem, Problem::Missing { digest: named, .. } if *named == digest);
        assert!(check(dir.path(), Repair::No).iter().any(missing), "{case}");
        check(dir.path(), Repair::Remove);
        // What is left to say: it is missing.
        let left = check(dir.path(), Repair::No);
        assert!(left.iter().all(|problem| matches!(problem, Problem::Missing { .. })), "{case}: {left:?}");
        assert!(left.iter().any(missing), "{case}: {left:?}");
        let store = LocalStore::open(dir.path()).unwrap().store();
        assert!(store.directories.get(&tree).unwrap().is_some(), "{case}: directories stay");
        drop(store);
        filled(dir.path());
        assert_eq!(check(dir.path(), Repair::No), [], "{case}");
    }
}

#[test]
fn a_damaged_directory_goes_with_all_above_it() {
    let dir = TempDir::new().unwrap();
    let (_, _, tree) = filled(dir.path());
    let store = LocalStore::open(dir.path()).unwrap();
    let below = store.store().directories.get(&tree).unwrap().unwrap();
    let below = below.child_directories().next().unwrap().1;
    let other = Sketch::directory([("a", Sketch::directory([]))]).put(&store.store());
    store.index.overwrite_directory(&below, b"x");
    drop(store);
    let problems = check(dir.path(), Repair::Remove);
    assert!(
        problems.contains(&Problem::Damaged { kind: ObjectKind::Directory, digest: below }),
        "{problems:?}"
    );
    let told = Problem::Missing { kind: ObjectKind::Directory, digest: below, parent: tree };
    assert!(problems.contains(&told), "{problems:?}");
    assert_eq!(check(dir.path(), Repair::No), []);
    let store = LocalStore::open(dir.path()).unwrap().store();
    assert!(store.directories.get(&below).unwrap().is_none());
    assert!(store.directories.get(&tree).unwrap().is_none());
    let Node::Directory { digest: other, .. } = other else { panic!("{other:?}") };
    assert!(store.directories.get(&other).unwrap().is_some());
}

#[test]
fn strays_and_wrong_sizes_are_told_of() {
    let dir = TempDir::new().unwrap();
    let store = LocalStore::open(dir.path()).unwrap();
    let (digest, _) = put_blob(&store.store(), b"five!").unwrap();
    let mut directory = Directory::new();
    let name = crate::castore::Name::new("file").unwrap();
    directory.insert(name, Node::File { digest, size: 6, executable: false }).unwrap();
    let parent = directory.digest();
    store.store().directories.put(vec![directory]).unwrap();
    drop(store);
    std::fs::write(dir.path().join("blobs/00/stray"), "").unwrap();
    assert_eq!(
        check(dir.path(), Repair::No),
        [
            Problem::Stray { path: "blobs/00/stray".to_owned() },
            Problem::Size { kind: ObjectKind::Blob, digest, parent, stated: 6, actual: 5 },
        ]
    );
}
