use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::sync::Mutex;
use std::sync::atomic::Ordering;

use tempfile::TempDir;

use super::*;
use crate::castore::{
    Blob, BlobService, BlobStat, BlobWriter, Digest, Directory, LocalStore, StoreError, Stored, Target,
    memory,
};
use crate::config::Lifetime;
use crate::inputs::{Inputs, ShowError};
use crate::isolation::Demand;
use crate::view::ViewError;

fn me() -> Owner {
    Owner { uid: nix::unistd::geteuid().as_raw(), gid: nix::unistd::getegid().as_raw() }
}

fn name(bytes: &[u8]) -> Name {
    Name::new(bytes).unwrap()
}

fn file(store: &Store, bytes: &[u8], executable: bool) -> Node {
    let mut writer = store.blobs.create().unwrap();
    writer.write_all(bytes).unwrap();
    let Stored { digest, size, .. } = writer.finish().unwrap();
    Node::File { digest, size, executable }
}

fn directory<const N: usize>(store: &Store, entries: [(&[u8], Node); N]) -> Node {
    let mut directory = Directory::new();
    for (entry, node) in entries {
        directory.insert(name(entry), node).unwrap();
    }
    let node = directory.node();
    store.directories.put(vec![directory]).unwrap();
    node
}

fn link(target: &[u8]) -> Node {
    Node::Symlink { target: Target::new(target).unwrap() }
}

fn inputs<const N: usize>(entries: [(&[u8], Node); N]) -> BTreeMap<Name, Node> {
    entries.into_iter().map(|(entry, node)| (name(entry), node)).collect()
}

/// Copies from a store, in a directory that goes with the test.
fn copies(store: &Store, owner: Owner) -> (TempDir, Copies) {
    let dir = tempfile::tempdir().unwrap();
    let copies = Copies::open(store.clone(), &dir.path().join("copies"), owner).unwrap();
    (dir, copies)
}

fn entries(path: &Path) -> usize {
    fs::read_dir(path).unwrap().count()
}

fn never() -> AtomicBool {
    AtomicBool::new(false)
}

/// One store keeps blobs as files, the other doesn't.
fn stores() -> [(Option<TempDir>, Store); 2] {
    let dir = tempfile::tempdir().unwrap();
    let local = LocalStore::open_for(&dir.path().join("store"), Lifetime::Ephemeral).unwrap().store();
    [(Some(dir), local), (None, memory::store())]
}

#[test]
fn inputs_look_as_in_the_view() {
    // A user namespace may have few ids, and only root may give files away.
    let map = fs::read_to_string("/proc/self/uid_map").unwrap();
    let ids: u32 = map.split_whitespace().nth(2).and_then(|count| count.parse().ok()).unwrap();
    let owner = match nix::unistd::geteuid().is_root() && ids > 4321 {
        true => Owner { uid: 1234, gid: 4321 },
        false => me(),
    };
    for (_dir, store) in stores() {
        let noise: Vec<u8> = (0..700_001_u32).flat_map(u32::to_le_bytes).collect();
        let odd = b"odd \xff\n\x1b\\";
        let tree = directory(
            &store,
            [
                (b"big", file(&store, &noise, false)),
                (b"empty", directory(&store, [])),
                (b"link", link(odd)),
                (odd, directory(&store, [(b"nothing", file(&store, b"", true))])),
            ],
        );
        let (_copies_dir, copies) = copies(&store, owner);
        let wanted = inputs([
            (b"tree", tree),
            (b"bare", file(&store, b"bare", true)),
            (b"dangling", link(b"/no/where")),
        ]);
        let copied = copies.lay_out("b1", &wanted, &never()).unwrap();
        let at = |path: &[u8]| copied.path().join(std::ffi::OsStr::from_bytes(path));
        let under_odd = [b"tree/", &odd[..], b"/nothing"].concat();
        let cases: [(&[u8], u32); 9] = [
            (b"", 0o040_555),
            (b"tree", 0o040_555),
            (b"tree/big", 0o100_444),
            (b"tree/empty", 0o040_555),
            (b"tree/link", 0o120_777),
            (&under_odd[..under_odd.len() - 8], 0o040_555),
            (&under_odd, 0o100_555),
            (b"bare", 0o100_555),
            (b"dangling", 0o120_777),
        ];
        for (path, mode) in cases {
            let shown = path.escape_ascii();
            let found = fs::symlink_metadata(at(path)).unwrap();
            assert_eq!(format!("{:o}", found.mode()), format!("{mode:o}"), "{shown}");
            assert_eq!((found.uid(), found.gid()), (owner.uid, owner.gid), "{shown}");
            assert_eq!((found.mtime(), found.mtime_nsec()), (1, 0), "{shown}");
            assert_eq!((found.atime(), found.atime_nsec()), (1, 0), "{shown}");
            if found.is_file() {
                assert_eq!(found.nlink(), 1, "{shown} may be no hard link");
            }
        }
        assert!(fs::read(at(b"tree/big")).unwrap() == noise);
        assert_eq!(fs::read(at(b"bare")).unwrap(), b"bare");
        assert_eq!(fs::read_link(at(b"tree/link")).unwrap().as_os_str().as_bytes(), odd);
        assert_eq!(fs::read_link(at(b"dangling")).unwrap(), Path::new("/no/where"));
        assert_eq!(entries(copied.path()), 3);
        assert_eq!(entries(&at(b"tree")), 4);
    }
}

#[test]
fn what_is_changed_in_a_copy_is_not_changed_in_the_store() {
    let (_dir, store) = stores().into_iter().next().unwrap();
    let wanted = inputs([(b"file", file(&store, b"as it was", false))]);
    let (_copies_dir, copies) = copies(&store, me());
    let [first, second] = ["b1", "b2"].map(|id| copies.lay_out(id, &wanted, &never()).unwrap());
    let path = first.path().join("file");
    let mut permissions = fs::metadata(&path).unwrap().permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o644);
    fs::set_permissions(&path, permissions).unwrap();
    fs::OpenOptions::new().write(true).open(&path).unwrap().write_all_at(b"changed", 0).unwrap();
    assert_eq!(fs::read(second.path().join("file")).unwrap(), b"as it was");
    let third = copies.lay_out("b3", &wanted, &never()).unwrap();
    assert_eq!(fs::read(third.path().join("file")).unwrap(), b"as it was");
}

#[test]
fn copies_go_with_their_build_and_no_other() {
    let store = memory::store();
    let tree = directory(&store, [(b"a", directory(&store, [(b"b", file(&store, b"x", false))]))]);
    let wanted = inputs([(b"tree", tree), (b"link", link(b"/"))]);
    let (dir, copies) = copies(&store, me());
    let first = copies.lay_out("b1", &wanted, &never()).unwrap();
    let second = copies.lay_out("b2", &wanted, &never()).unwrap();
    let taken = copies.lay_out("b1", &wanted, &never()).unwrap_err();
    assert!(taken.to_string().contains("copies/b1") && taken.to_string().contains("exists"), "{taken}");
    drop(second);
    assert_eq!(fs::read(first.path().join("tree/a/b")).unwrap(), b"x");
    drop(first);
    assert_eq!(entries(&dir.path().join("copies")), 0);
}

#[test]
fn the_start_sweeps_and_follows_no_link() {
    let store = memory::store();
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("copies");
    fs::create_dir_all(place.join("old/tree")).unwrap();
    fs::write(place.join("old/tree/file"), "x").unwrap();
    fs::create_dir(dir.path().join("kept")).unwrap();
    fs::write(dir.path().join("kept/file"), "x").unwrap();
    symlink(dir.path().join("kept"), place.join("link")).unwrap();
    Copies::open(store.clone(), &place, me()).unwrap();
    assert_eq!((entries(&place), entries(&dir.path().join("kept"))), (0, 1));
    let by_link = dir.path().join("link");
    symlink("kept", &by_link).unwrap();
    assert!(matches!(Copies::open(store, &by_link, me()), Err(CopyError::Directory { act: "open", .. })));
    assert_eq!(entries(&dir.path().join("kept")), 1);
}

/// A store whose blobs are not what they are called, or fail, or say when they are read.
struct Bad {
    good: Store,
    what: Badness,
}

enum Badness {
    Flipped,
    Short,
    Long,
    Unreadable,
    Missing,
    /// It is told to end while the blob of this many bytes is read.
    Cancels(Arc<AtomicBool>, u64, Mutex<u64>),
}

struct BadBlob(Arc<dyn Blob>, Arc<Bad>);

impl Blob for BadBlob {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut count = self.0.read_at(buffer, offset)?;
        match &self.1.what {
            Badness::Flipped => buffer[..count].iter_mut().take(1).for_each(|byte| *byte ^= 1),
            Badness::Short => count = count.saturating_sub(1),
            Badness::Long if count == 0 && offset == self.size() => {
                buffer[0] = 0;
                count = 1;
            }
            Badness::Long | Badness::Missing => {}
            Badness::Unreadable => return Err(io::Error::from_raw_os_error(libc::EIO)),
            Badness::Cancels(cancel, size, read) if self.size() == *size => {
                *read.lock().unwrap() += count as u64;
                cancel.store(true, Ordering::Relaxed);
            }
            Badness::Cancels(..) => {}
        }
        Ok(count)
    }

    fn verify(&self) -> Result<(), StoreError> {
        Ok(())
    }
}

struct BadBlobs(Arc<Bad>);

impl BlobService for BadBlobs {
    fn stat(&self, digest: &Digest) -> Result<Option<BlobStat>, StoreError> {
        self.0.good.blobs.stat(digest)
    }

    fn open(&self, digest: &Digest) -> Result<Option<Arc<dyn Blob>>, StoreError> {
        if let Badness::Missing = self.0.what {
            return Ok(None);
        }
        let blob = self.0.good.blobs.open(digest)?;
        Ok(blob.map(|blob| Arc::new(BadBlob(blob, Arc::clone(&self.0))) as Arc<dyn Blob>))
    }

    fn create(&self) -> Result<Box<dyn BlobWriter>, StoreError> {
        self.0.good.blobs.create()
    }
}

fn bad(good: &Store, what: Badness) -> (Arc<Bad>, Store) {
    let bad = Arc::new(Bad { good: good.clone(), what });
    let store =
        Store { blobs: Arc::new(BadBlobs(Arc::clone(&bad))), directories: Arc::clone(&good.directories) };
    (bad, store)
}

#[test]
fn what_the_store_gets_wrong_is_named_and_leaves_nothing() {
    let good = memory::store();
    let Node::File { digest, .. } = file(&good, b"contents", false) else { panic!() };
    let tree = || directory(&good, [(b"deep", file(&good, b"contents", false))]);
    let table = [
        (Badness::Flipped, format!("are not those of digest {digest}")),
        (Badness::Short, format!("are not those of digest {digest}")),
        (Badness::Long, format!("are not those of digest {digest}")),
        (Badness::Unreadable, "can't read the contents of deep".to_owned()),
        (Badness::Missing, format!("the blob {digest}, needed for deep, is not in the store")),
    ];
    for (what, message) in table {
        let (_, store) = bad(&good, what);
        let (dir, copies) = copies(&store, me());
        let wanted = inputs([(b"a-link", link(b"x")), (b"tree", tree())]);
        let error = copies.lay_out("b1", &wanted, &never()).unwrap_err();
        assert!(!error.is_cancelled(), "{error}");
        let error = error.to_string();
        assert!(error.starts_with("can't lay out the input tree: ") && error.contains(&message), "{error}");
        assert_eq!(entries(&dir.path().join("copies")), 0, "{message}");
    }
}

#[test]
fn told_to_end_it_ends_soon_and_leaves_nothing() {
    let good = memory::store();
    let large = vec![7; 64 << 20];
    let cancel = Arc::new(AtomicBool::new(false));
    let (bad, store) =
        bad(&good, Badness::Cancels(Arc::clone(&cancel), large.len() as u64, Mutex::default()));
    let (dir, copies) = copies(&store, me());
    let wanted = inputs([
        (b"a", file(&good, b"first", false)),
        (b"b", file(&good, &large, false)),
        (b"c", link(b"x")),
    ]);
    let error = copies.lay_out("b1", &wanted, &cancel).unwrap_err();
    assert!(error.is_cancelled(), "{error}");
    let Badness::Cancels(_, _, read) = &bad.what else { panic!() };
    let read = *read.lock().unwrap();
    assert!(read > 0 && read <= 1 << 20, "{read} bytes were read of it");
    assert_eq!(entries(&dir.path().join("copies")), 0);
    // Nothing is begun, either, and it is no fault.
    let shown = Inputs::Copies(copies).show("b2", &inputs([(b"c", link(b"x"))]), &cancel).unwrap_err();
    assert!(matches!(shown, ShowError::Cancelled), "{shown}");
    assert_eq!(entries(&dir.path().join("copies")), 0);
}

#[test]
fn without_fuse_it_depends_on_the_demand() {
    let refusals: BTreeSet<i32> = [libc::ENOENT, libc::EACCES, libc::EPERM, libc::ENODEV, libc::ENXIO].into();
    for errno in refusals {
        let refusal = || io::Error::from_raw_os_error(errno);
        let device = || ViewError::Device { source: refusal() };
        let mount = || ViewError::Mount { at: "/state/view".into(), source: refusal() };
        let choose = |demand, error: ViewError| {
            let (_dir, copies) = copies(&memory::store(), me());
            Inputs::choose(demand, || Err(error), copies)
        };
        for error in [&device as &dyn Fn() -> ViewError, &mount] {
            let reason = error().to_string();
            assert!(reason.contains(&refusal().to_string()), "{reason}");
            assert!(matches!(choose(Demand::Preferred, error()), Ok(Inputs::Copies(_))), "{reason}");
            let refused = choose(Demand::Required, error()).err().unwrap().to_string();
            assert!(refused.contains("required") && refused.ends_with(&reason), "{refused}");
        }
    }
    let (_dir, copies) = copies(&memory::store(), me());
    let chosen = Inputs::choose(Demand::Off, || panic!("FUSE is not to be tried"), copies);
    assert!(matches!(chosen, Ok(Inputs::Copies(_))));
}
