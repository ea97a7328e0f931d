use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};

use redb::{Database, TableDefinition};
use tempfile::TempDir;

use super::*;
use crate::castore::fixtures::{EMPTY, HELLO, KEEP, Sketch, digest, name, put_blob, store};
use crate::castore::{Blob, BlobStat, Digest, Directory, Node};

fn read(blob: &dyn Blob) -> Vec<u8> {
    let mut bytes = vec![0; blob.size() as usize + 1];
    let count = blob.read_at(&mut bytes, 0).unwrap();
    bytes.truncate(count);
    bytes
}

/// A blob that has a file of its own.
fn large(first: u8) -> Vec<u8> {
    let mut bytes = vec![7; packs::SMALL_BYTES + 1];
    bytes[0] = first;
    bytes
}

fn place_of(dir: &TempDir, digest: &Digest) -> std::path::PathBuf {
    dir.path().join(format!("store/blobs/{}/{digest}", &digest.to_hex()[..2]))
}

fn files_below(path: &Path) -> usize {
    let entries = fs::read_dir(path).unwrap().map(Result::unwrap);
    entries.map(|entry| if entry.path().is_dir() { files_below(&entry.path()) } else { 1 }).sum()
}

#[test]
fn blobs_of_all_sizes_in_writes_of_all_sizes() {
    let (dir, store) = store();
    let edge = 64 * 1024;
    let bytes: Vec<u8> = (0..300_000u32).flat_map(|number| number.to_le_bytes()).collect();
    let sizes = [0, 1, edge - 1, edge, edge + 1, 2 * edge, 3 * edge + 7, bytes.len()];
    for size in sizes {
        for step in [1000, edge - 1, edge, edge + 1, usize::MAX] {
            let bytes = &bytes[..size];
            let mut writer = store.blobs.create().unwrap();
            bytes.chunks(step.min(size.max(1))).for_each(|chunk| writer.write_all(chunk).unwrap());
            let stored = writer.finish().unwrap();
            assert_eq!((stored.digest, stored.size), (Digest::of(bytes), size as u64), "{size} by {step}");
            let blob = store.blobs.open(&Digest::of(bytes)).unwrap().unwrap();
            assert_eq!(blob.size(), size as u64);
            assert!(read(&*blob) == bytes, "{size} by {step}");
        }
    }
    let large = sizes.iter().filter(|size| **size > edge).count();
    assert_eq!(files_below(&dir.path().join("store/blobs")), large);
    assert_eq!(files_below(&dir.path().join("store/tmp")), 0);
}

#[test]
fn a_large_blob_is_a_read_only_file_of_its_bytes() {
    let (dir, store) = store();
    for bytes in [b"hello world\n".to_vec(), [&b"hello world\n"[..], &large(0)].concat()] {
        let (digest, _) = put_blob(&store, &bytes).unwrap();
        let blob = store.blobs.open(&digest).unwrap().unwrap();
        let mut read = [0; 5];
        assert_eq!(blob.read_at(&mut read, 6).unwrap(), 5);
        assert_eq!(&read, b"world");
        assert_eq!(blob.read_at(&mut read, bytes.len() as u64 - 2).unwrap(), 2);
        assert_eq!(blob.read_at(&mut read, 1_000_000).unwrap(), 0);
        if bytes.len() > packs::SMALL_BYTES {
            assert_eq!(fs::read(place_of(&dir, &digest)).unwrap(), bytes);
            assert_eq!(fs::metadata(place_of(&dir, &digest)).unwrap().permissions().mode() & 0o333, 0);
        } else {
            assert!(!place_of(&dir, &digest).exists());
        }
    }
    assert_eq!(
        fs::metadata(dir.path().join("store/packs/00000000")).unwrap().permissions().mode() & 0o077,
        0
    );
    assert_eq!(fs::metadata(dir.path().join("store")).unwrap().permissions().mode() & 0o777, 0o700);
}

#[test]
fn what_is_not_there_is_not_there() {
    let (_dir, store) = store();
    let empty = digest(EMPTY);
    assert!(store.blobs.stat(&empty).unwrap().is_none());
    assert!(store.blobs.open(&empty).unwrap().is_none());
    assert!(store.directories.get(&empty).unwrap().is_none());
    // The empty blob and the empty directory have one digest, and are two things.
    put_blob(&store, b"").unwrap();
    assert!(store.blobs.stat(&empty).unwrap().is_some());
    assert!(store.directories.get(&empty).unwrap().is_none());
    store.directories.put(vec![Directory::new()]).unwrap();
    assert_eq!(*store.directories.get(&empty).unwrap().unwrap(), Directory::new());
}

#[test]
fn a_dropped_writer_leaves_nothing() {
    let (dir, store) = store();
    let mut writer = store.blobs.create().unwrap();
    writer.write_all(&[7; 200_000]).unwrap();
    assert_eq!(files_below(&dir.path().join("store/tmp")), 1);
    drop(writer);
    assert_eq!(files_below(&dir.path().join("store/tmp")), 0);
    assert_eq!(files_below(&dir.path().join("store/blobs")), 0);
}

#[test]
fn a_truncated_blob_is_mended_by_storing_it_again() {
    let (dir, store) = store();
    let bytes = large(0);
    let (hello, _) = put_blob(&store, &bytes).unwrap();
    let path = place_of(&dir, &hello);
    // The last one as if the machine had died: this process has not hashed what lies there.
    let other = large(1);
    let whole = Some(BlobStat { size: Some(other.len() as u64) });
    for (left, counts) in [(&b""[..], None), (b"hel", Some(BlobStat { size: Some(3) })), (&other, whole)] {
        let _ = fs::remove_file(&path);
        fs::write(&path, left).unwrap();
        assert_eq!(store.blobs.stat(&hello).unwrap(), counts, "{left:?}");
        assert_eq!(store.blobs.open(&hello).unwrap().is_some(), counts.is_some(), "{left:?}");
        put_blob(&store, &bytes).unwrap();
        assert_eq!(fs::read(&path).unwrap(), bytes, "{left:?}");
    }
}

#[test]
fn a_damaged_blob_is_found_out_and_can_be_stored_again() {
    let bytes = [7; 70_000];
    let digest = Digest::of(&bytes);
    let flipped = [&[6][..], &bytes[1..]].concat();
    let longer = [&bytes[..], b"x"].concat();
    for damaged in [&flipped[..], &bytes[1..], &longer] {
        let (dir, store) = store();
        let path = dir.path().join(format!("store/blobs/{}/{digest}", &digest.to_hex()[..2]));
        put_blob(&store, &bytes).unwrap();
        store.blobs.open(&digest).unwrap().unwrap().verify().unwrap();

        let mode = fs::metadata(&path).unwrap().permissions();
        fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
        fs::write(&path, damaged).unwrap();
        fs::set_permissions(&path, mode).unwrap();
        let blob = store.blobs.open(&digest).unwrap().unwrap();
        let refused = blob.verify().unwrap_err();
        assert!(matches!(refused, StoreError::Damaged { digest: named, .. } if named == digest), "{refused}");
        assert!(store.blobs.stat(&digest).unwrap().is_none(), "it is removed");

        put_blob(&store, &bytes).unwrap();
        store.blobs.open(&digest).unwrap().unwrap().verify().unwrap();
    }
}

#[test]
fn a_blob_is_hashed_once_and_again_when_it_has_changed() {
    let dir = TempDir::new().unwrap();
    let digest = Digest::of(b"hello");
    let root = Root::open(dir.path(), Lifetime::Lasting).unwrap();
    // As the last process left it.
    let path = dir.path().join(format!("blobs/{}/{digest}", &digest.to_hex()[..2]));
    fs::write(&path, "hello").unwrap();
    let file = File::open(&path).unwrap();
    assert!(!root.verified.knows(&digest));
    root.verify(&file, &digest).unwrap();
    assert!(root.verified.knows(&digest));
    fs::write(&path, "hell0").unwrap();
    assert!(root.verify(&file, &digest).is_err());
    // One that has come in its place stays, whoever still holds the old one.
    fs::write(&path, "hello").unwrap();
    assert!(root.verify(&file, &digest).is_err());
    assert!(path.exists());
}

#[test]
fn directories_wait_for_the_blobs_before_them() {
    let dir = TempDir::new().unwrap();
    for (lifetime, few) in [(Lifetime::Lasting, 3), (Lifetime::Ephemeral, 0)] {
        let path = dir.path().join(format!("{lifetime:?}"));
        let root = Arc::new(Root::open(&path, lifetime).unwrap());
        let index = Arc::new(Index::open(Arc::clone(&root)).unwrap());
        let packs = Arc::new(Packs::open(Arc::clone(&root), Arc::clone(&index)).unwrap());
        let directories = Arc::new(directories::Directories::new(&root, &index, &packs));
        let blobs = Arc::new(blobs::Blobs::new(Arc::clone(&root), Arc::clone(&packs)));
        let store = Store { blobs, directories };
        let unsynced = || root.unsynced.count();
        let lasting = lifetime == Lifetime::Lasting;
        assert_eq!(unsynced(), if lasting { None } else { Some(0) }, "what the last process left");
        store.directories.put(vec![]).unwrap();
        assert_eq!(unsynced(), Some(0), "an empty put syncs, too");

        // Each new one waits, and one that is there already does not.
        for bytes in [large(1), large(2), large(3), large(1), b"small".to_vec()] {
            put_blob(&store, &bytes).unwrap();
        }
        assert_eq!((unsynced(), packs.waiting()), (Some(few), (1, 1)));
        store.directories.put(vec![Directory::new()]).unwrap();
        assert_eq!((unsynced(), packs.waiting()), (Some(0), (0, 0)));
        for number in 0..100u8 {
            put_blob(&store, &[number; 3]).unwrap();
            put_blob(&store, &large(number)).unwrap();
        }
        assert_eq!(unsynced(), if lasting { None } else { Some(0) }, "too many to count");
        assert_eq!(packs.waiting(), (100, 1));
        store.directories.put(vec![Directory::new()]).unwrap();
        assert_eq!((unsynced(), packs.waiting()), (Some(0), (100, 0)), "nothing new for the index to name");
        store.directories.put(vec![parent_of(Directory::new().node())]).unwrap();
        assert_eq!(packs.waiting(), (0, 0));
        for bytes in [vec![99; 3], large(99)] {
            assert_eq!(read(&*store.blobs.open(&Digest::of(&bytes)).unwrap().unwrap()), bytes);
        }
    }
}

#[test]
fn what_is_no_regular_file_is_damaged() {
    let (dir, store) = store();
    let hello = Digest::of(b"hello");
    let path = dir.path().join(format!("store/blobs/{}/{hello}", &hello.to_hex()[..2]));
    let damaged = |name: &str| {
        let opened = store.blobs.open(&hello).map(drop);
        assert!(matches!(opened, Err(StoreError::Damaged { kind: "blob", .. })), "{name}");
        let looked = store.blobs.stat(&hello);
        assert!(matches!(looked, Err(StoreError::Damaged { kind: "blob", .. })), "{name}");
    };
    symlink("/etc/hostname", &path).unwrap();
    damaged("symbolic link");
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    damaged("directory");
    fs::remove_dir(&path).unwrap();
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    damaged("fifo");
}

#[test]
fn a_store_is_opened_once_at_a_time() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("a/b/store");
    let local = LocalStore::open(&path).unwrap();
    let in_use = || matches!(LocalStore::open(&path), Err(StoreError::InUse { .. }));
    assert!(in_use());
    let store = local.store();
    drop(local);
    assert!(in_use(), "while one of its services is in use");
    let writer = store.blobs.create().unwrap();
    drop(store);
    assert!(in_use(), "while a blob is being written");
    drop(writer);
    assert!(!in_use());
}

#[test]
fn opening_sweeps_and_keeps() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("store");
    let node = Sketch::hello().put(&LocalStore::open(&path).unwrap().store());
    fs::write(path.join("tmp/0"), b"half a blob").unwrap();
    fs::create_dir_all(path.join("tmp/blobs/00")).unwrap();
    let store = LocalStore::open(&path).unwrap().store();
    assert_eq!(fs::read_dir(path.join("tmp")).unwrap().count(), 0);
    let Node::Directory { digest: root, .. } = node else { panic!("{node:?}") };
    assert_eq!(store.directories.get(&root).unwrap().unwrap().node(), node);
    assert!(store.blobs.stat(&Digest::of(b"hello world\n")).unwrap().is_some());
}

#[test]
fn directories_of_the_design() {
    let (_dir, store) = store();
    let node = Sketch::hello().put(&store);
    assert_eq!(node, Node::Directory { digest: digest(HELLO), size: 8 });
    let hello = store.directories.get(&digest(HELLO)).unwrap().unwrap();
    assert_eq!(hello.get(b"bin"), Some(&Node::Directory { digest: digest(KEEP), size: 2 }));
    let hex: String = hello.encode().iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(
        hex,
        "0a290a0362696e12208b5b5d642b646bb8ed504b0862c39413e87e57491497de7bd075953f7b83810e\
         1802122d0a0568656c6c6f1220dc5a4edb8240b018124052c330270696f96771a63b45250a5c17d3000e82335518\
         0c20011a110a046c696e6b120962696e2f2e6b656570"
    );
    assert_eq!(store.directories.get(&digest(KEEP)).unwrap().unwrap().size(), 2);
}

fn parent_of(child: Node) -> Directory {
    let mut parent = Directory::new();
    parent.insert(name(b"child"), child).unwrap();
    parent
}

#[test]
fn children_come_first_and_have_the_sizes_stated() {
    let child = parent_of(Node::File { digest: Digest::of(b""), size: 0, executable: false });
    let parent = parent_of(child.node());
    let wrong = parent_of(Node::Directory { digest: child.digest(), size: 3 });

    let (_dir, store) = store();
    let missing = |result| matches!(result, Err(StoreError::MissingChild { .. }));
    assert!(missing(store.directories.put(vec![parent.clone()])), "child nowhere");
    assert!(missing(store.directories.put(vec![parent.clone(), child.clone()])), "child after parent");
    assert!(store.directories.get(&child.digest()).unwrap().is_none(), "all or none");
    store.directories.put(vec![child.clone(), parent.clone(), child.clone()]).unwrap();

    for before in [vec![], vec![child.clone()]] {
        let refused = store.directories.put([before, vec![wrong.clone()]].concat()).unwrap_err();
        assert!(matches!(refused, StoreError::ChildSize { stated: 3, actual: 2, .. }), "{refused}");
        assert!(refused.to_string().contains("states size 3 for its child \"child\""), "{refused}");
    }
    assert!(store.directories.get(&wrong.digest()).unwrap().is_none());
    store.directories.put(vec![parent_of(parent.node())]).unwrap();
}

#[test]
fn damaged_directories_are_told_of_and_mended() {
    let dir = TempDir::new().unwrap();
    let keep = parent_of(Node::File { digest: Digest::of(b""), size: 0, executable: false });
    let unsorted = b"\x0a\x00";
    let cases: [(&str, &[u8]); 3] =
        [("other bytes", b"x"), ("another directory", b""), ("truncated", &keep.encode()[..9])];
    drop(LocalStore::open(dir.path()).unwrap());
    let write = |digest: Digest, bytes: &[u8]| {
        let database = Database::open(dir.path().join("index.redb")).unwrap();
        let writing = database.begin_write().unwrap();
        let table: TableDefinition<&[u8; 32], &[u8]> = TableDefinition::new("directories");
        writing.open_table(table).unwrap().insert(digest.as_bytes(), bytes).unwrap();
        writing.commit().unwrap();
    };
    let damaged = |store: &Store, digest| {
        let got = store.directories.get(&digest);
        matches!(got, Err(StoreError::Damaged { kind: "directory", digest: named }) if named == digest)
    };
    for (name, bytes) in cases {
        write(keep.digest(), bytes);
        let store = LocalStore::open(dir.path()).unwrap().store();
        assert!(damaged(&store, keep.digest()), "{name}");
        store.directories.put(vec![keep.clone()]).unwrap();
        assert_eq!(*store.directories.get(&keep.digest()).unwrap().unwrap(), keep, "{name}");
    }
    // The digest is right, but it isn't that of a directory.
    write(Digest::of(unsorted), unsorted);
    assert!(damaged(&LocalStore::open(dir.path()).unwrap().store(), Digest::of(unsorted)));
}
