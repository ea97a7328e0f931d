//! Stores as a crash, or a bad disk, may leave them: nothing wrong is given out, and what was on disk is there.

use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, PermissionsExt};

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::castore::fixtures::{name, put_blob};
use crate::castore::local::verify::Problem;
use crate::castore::{Digest, Directory, Node};

/// The store as it would be found after the death of its process: the files, without what it would do at its end.
pub(super) fn crashed(dir: &Path) -> TempDir {
    let copy = scratch();
    copy_tree(dir, copy.path());
    copy
}

/// A directory, where there is one on a file system in memory: what a crash leaves is made here, and need not be waited
/// for.
fn scratch() -> TempDir {
    TempDir::new_in("/dev/shm").or_else(|_| TempDir::new()).unwrap()
}

fn copy_tree(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let to = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => {
                fs::create_dir(&to).unwrap();
                copy_tree(&entry.path(), &to);
            }
            // The permissions, too.
            false => drop(fs::copy(entry.path(), to).unwrap()),
        }
    }
}

fn pack(dir: &Path) -> PathBuf {
    dir.join("packs/00000000")
}

fn index(dir: &Path) -> PathBuf {
    dir.join(index::FILE_NAME)
}

/// Blob `number` of a test: small, and longer with each.
fn bytes(number: u8) -> Vec<u8> {
    vec![number; 10 + 37 * usize::from(number)]
}

fn put(store: &Store, numbers: std::ops::Range<u8>) -> Vec<Digest> {
    numbers.map(|number| put_blob(store, &bytes(number)).unwrap().0).collect()
}

/// Stores a directory with these blobs, which puts them and it on disk.
fn acknowledge(store: &Store, numbers: std::ops::Range<u8>) -> Digest {
    let mut directory = Directory::new();
    for number in numbers {
        let bytes = bytes(number);
        let file = Node::File { digest: Digest::of(&bytes), size: bytes.len() as u64, executable: false };
        directory.insert(name(format!("{number:03}").as_bytes()), file).unwrap();
    }
    let digest = directory.digest();
    store.directories.put(vec![directory]).unwrap();
    digest
}

/// What the store gives for a blob; other bytes than its own are a failure.
fn read(store: &Store, digest: &Digest) -> Option<Vec<u8>> {
    let blob = match store.blobs.open(digest) {
        Ok(blob) => blob?,
        Err(StoreError::Damaged { .. } | StoreError::DamagedIndex { .. } | StoreError::Database { .. }) => {
            return None;
        }
        Err(error) => panic!("{error}"),
    };
    let mut bytes = vec![0; blob.size() as usize];
    assert_eq!(blob.read_at(&mut bytes, 0).unwrap(), bytes.len());
    assert_eq!(Digest::of(&bytes), *digest, "wrong bytes");
    Some(bytes)
}

/// What becomes of the end of a file when the machine dies.
#[derive(Clone, Copy, Debug)]
enum Loss {
    /// It is gone.
    Cut,
    /// Its length is there, its bytes are not.
    Zeroed,
    /// One page of it is not.
    Hole,
}

fn lose(file: &Path, from: u64, loss: Loss) {
    let file = OpenOptions::new().read(true).write(true).open(file).unwrap();
    let len = file.metadata().unwrap().len();
    match loss {
        Loss::Cut => file.set_len(from).unwrap(),
        Loss::Zeroed => file.write_all_at(&vec![0; (len - from) as usize], from).unwrap(),
        Loss::Hole => file.write_all_at(&vec![0; (len - from).min(4096) as usize], from).unwrap(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    /// Power fails: of what was added to a pack since the last `put` of directories, any part may be missing, and the
    /// index may be one of before that, or none.
    #[test]
    fn power_loss_takes_only_what_no_directory_was_put_after(
        acknowledged in 1..20u8,
        then in 0..20u8,
        at in 0.0..1.0f64,
        loss in prop::sample::select(vec![Loss::Cut, Loss::Zeroed, Loss::Hole]),
        older in prop::sample::select(vec![None, Some(0), Some(1)]),
    ) {
        let dir = scratch();
        let local = LocalStore::open(dir.path()).unwrap();
        let store = local.store();
        let mut indexes = vec![crashed(dir.path())];
        let first = acknowledged / 2;
        put(&store, 0..first);
        acknowledge(&store, 0..first);
        indexes.push(crashed(dir.path()));
        let mut blobs = put(&store, 0..acknowledged);
        let directory = acknowledge(&store, 0..acknowledged);
        let synced = fs::metadata(pack(dir.path())).unwrap().len();
        blobs.extend(put(&store, acknowledged..acknowledged + then));
        let crash = crashed(dir.path());
        drop((store, local));

        let end = fs::metadata(pack(crash.path())).unwrap().len();
        let from = synced + ((end - synced) as f64 * at) as u64;
        lose(&pack(crash.path()), from, loss);
        if let Some(older) = older {
            fs::copy(index(indexes[older].path()), index(crash.path())).unwrap();
        }
        let local = LocalStore::open(crash.path()).unwrap();
        let problems = local.verify(Repair::No, &mut |_| ()).unwrap().problems;
        prop_assert!(problems.is_empty(), "{:?}", problems);
        let store = local.store();
        let (before, after) = blobs.split_at(usize::from(acknowledged));
        for digest in before {
            prop_assert!(read(&store, digest).is_some());
        }
        after.iter().for_each(|digest| drop(read(&store, digest)));
        if older.is_none() {
            prop_assert!(store.directories.get(&directory).unwrap().is_some());
        }
        // All of it can be stored again, and is there after another crash.
        put(&store, 0..acknowledged + then);
        acknowledge(&store, 0..acknowledged + then);
        drop((store, local));
        let crash = crashed(crash.path());
        let store = LocalStore::open(crash.path()).unwrap().store();
        for digest in &blobs {
            prop_assert!(read(&store, digest).is_some());
        }
    }

    /// A pack is shorter than the index says, which no crash does: what is lost is missing, and can be stored again.
    #[test]
    fn a_pack_may_be_shorter_than_the_index_says(at in 0.0..1.0f64, more in 0..10u8) {
        let dir = scratch();
        let store = LocalStore::open(dir.path()).unwrap().store();
        let blobs = put(&store, 0..20);
        acknowledge(&store, 0..20);
        drop(store);
        let len = fs::metadata(pack(dir.path())).unwrap().len();
        lose(&pack(dir.path()), (len as f64 * at) as u64, Loss::Cut);
        let store = LocalStore::open(dir.path()).unwrap().store();
        let new = put(&store, 20..20 + more);
        for digest in &blobs {
            let known = store.blobs.stat(digest).unwrap().is_some();
            prop_assert_eq!(read(&store, digest).is_some(), known);
        }
        // Nothing was put after them, but it was only the process that died.
        let crash = crashed(dir.path());
        let again = LocalStore::open(crash.path()).unwrap().store();
        for digest in &new {
            prop_assert!(read(&again, digest).is_some());
        }
        put(&again, 0..20);
        for digest in &blobs {
            prop_assert!(read(&again, digest).is_some());
        }
    }
}

/// A store with something in every table, closed.
fn filled(dir: &Path) -> (Vec<Digest>, Digest) {
    let store = LocalStore::open(dir).unwrap().store();
    let blobs = put(&store, 0..60);
    for end in 1..29 {
        acknowledge(&store, 0..2 * end);
    }
    (blobs, acknowledge(&store, 0..58))
}

/// Opens a store with an index that is not right, and reads all there is. No panic gets out, and no wrong byte.
fn survive(dir: &Path, blobs: &[Digest], directory: &Digest) {
    let local = match LocalStore::open(dir) {
        Ok(local) => local,
        Err(StoreError::DamagedIndex { path, .. }) => {
            assert!(path.ends_with("index.redb"), "{path}");
            return;
        }
        Err(StoreError::Database { .. } | StoreError::Io { .. }) => return,
        Err(error) => panic!("{error}"),
    };
    let store = local.store();
    blobs.iter().for_each(|digest| drop(read(&store, digest)));
    if let Ok(Some(found)) = store.directories.get(directory) {
        assert_eq!(found.digest(), *directory);
    }
    let _ = local.verify(Repair::No, &mut |_| ());
    let _ = put_blob(&store, b"new");
    let _ = store.directories.put(vec![Directory::new()]);
}

/// Opens it as `store verify --repair` does; all blobs are there then, and it is as good as new.
fn mend(dir: &Path, blobs: &[Digest], directory: &Digest) -> bool {
    let (local, aside) = LocalStore::open_checked(dir, Repair::Remove).unwrap();
    local.verify(Repair::Remove, &mut |_| ()).unwrap();
    let store = local.store();
    for digest in blobs {
        assert!(read(&store, digest).is_some(), "{digest}");
    }
    assert!(aside.is_some() || store.directories.get(directory).unwrap().is_some());
    assert_eq!(acknowledge(&store, 0..58), *directory);
    let problems = local.verify(Repair::No, &mut |_| ()).unwrap().problems;
    assert_eq!(problems, []);
    assert_eq!(aside.is_some(), dir.join("index.redb.damaged").exists());
    aside.is_some()
}

#[test]
fn no_byte_of_the_index_is_trusted() {
    let dir = scratch();
    let (blobs, directory) = filled(dir.path());
    let len = fs::metadata(index(dir.path())).unwrap().len();
    // The header byte by byte, and positions all over the rest.
    let positions = (0..192).chain((192..len).step_by((len / 150) as usize | 1));
    let (mut count, mut moved) = (0, 0);
    for at in positions {
        let crash = crashed(dir.path());
        let file = OpenOptions::new().read(true).write(true).open(index(crash.path())).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1 << (at % 8)], at).unwrap();
        survive(crashed(crash.path()).path(), &blobs, &directory);
        moved += usize::from(mend(crash.path(), &blobs, &directory));
        count += 1;
    }
    eprintln!("{count} flipped bits, {moved} of them made the index damaged");
    assert!(moved > 0);
}

#[test]
fn the_index_may_be_anything() {
    let dir = scratch();
    let (blobs, directory) = filled(dir.path());
    let whole = fs::read(index(dir.path())).unwrap();
    let half = &whole[..whole.len() / 2];
    let zeroed = [half, &vec![0; half.len()]].concat();
    let cases: [(&str, &[u8]); 6] = [
        ("empty", b""),
        ("text", b"no database\n"),
        ("half", half),
        ("half and zeros", &zeroed),
        ("zeros", &vec![0; whole.len()]),
        ("a page", &whole[..4096]),
    ];
    for (case, bytes) in cases {
        let crash = crashed(dir.path());
        fs::write(index(crash.path()), bytes).unwrap();
        survive(crashed(crash.path()).path(), &blobs, &directory);
        let unrepaired = LocalStore::open_checked(crash.path(), Repair::No).map(drop);
        if case == "empty" {
            // As good as none.
            unrepaired.unwrap();
            continue;
        }
        let refused = unrepaired.unwrap_err();
        assert!(matches!(refused, StoreError::DamagedIndex { .. }), "{case}: {refused:?}");
        assert!(refused.to_string().contains("index.redb is damaged"), "{case}: {refused}");
        assert!(mend(crash.path(), &blobs, &directory), "{case}");
    }
}

/// What a bad disk refuses, one level up: a pack that can't be read is no reason to panic or to lose other blobs.
#[test]
fn what_can_not_be_read_is_an_error_and_no_damage() {
    let dir = scratch();
    let local = LocalStore::open(dir.path()).unwrap();
    let (digest, _) = put_blob(&local.store(), b"small").unwrap();
    acknowledge(&local.store(), 0..0);
    drop(local);
    let aside = dir.path().join("aside");
    fs::rename(pack(dir.path()), &aside).unwrap();
    fs::create_dir(pack(dir.path())).unwrap();
    let refused = LocalStore::open(dir.path()).err().unwrap();
    assert!(refused.to_string().contains("pack 00000000"), "{refused}");
    fs::remove_dir(pack(dir.path())).unwrap();
    fs::rename(&aside, pack(dir.path())).unwrap();
    fs::set_permissions(pack(dir.path()), PermissionsExt::from_mode(0o600)).unwrap();
    let local = LocalStore::open(dir.path()).unwrap();
    assert!(read(&local.store(), &digest).is_some());
    assert_eq!(local.verify(Repair::No, &mut |_| ()).unwrap().problems, Vec::<Problem>::new());
}

/// The kernel tells of a failed sync once. Nothing is promised from then on, and what is stored can be read.
#[test]
fn after_a_failed_sync_nothing_more_is_put() {
    let dir = scratch();
    let local = LocalStore::open(dir.path()).unwrap();
    let store = local.store();
    let blobs = put(&store, 0..3);
    let before = acknowledge(&store, 0..3);
    local.root.note_failed_sync();
    for directories in [vec![], vec![Directory::new()]] {
        let refused = store.directories.put(directories).unwrap_err();
        assert!(matches!(refused, StoreError::Unsynced { .. }), "{refused}");
    }
    assert!(store.directories.get(&Directory::new().digest()).unwrap().is_none());
    assert!(store.directories.get(&before).unwrap().is_some());
    assert!(blobs.iter().all(|digest| read(&store, digest).is_some()));
}
