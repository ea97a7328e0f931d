//! A cache in front of a server that may do what none should.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::*;
use crate::castore::fixtures::{Sketch, put_blob};
use crate::castore::remote::faulty::{Asked, Fault, PIECE, Server};
use crate::castore::{Stored, WrongBytes, memory};

/// The deadline of calls that are meant to miss it.
const SHORT: Duration = Duration::from_millis(500);

/// The deadline of all others.
const LONG: Duration = Duration::from_secs(30);

/// A cache over a server, and what is near.
struct Cached {
    server: Server,
    near: Store,
    store: Store,
}

fn cached(deadline: Duration) -> Cached {
    cached_near(memory::store(), deadline)
}

fn cached_near(near: Store, deadline: Duration) -> Cached {
    let server = Server::start();
    let store = over(near.clone(), server.client(deadline).store(), server.address());
    Cached { server, near, store }
}

fn noise(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    bytes
}

fn contents(blob: &dyn Blob) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(blob.size()).unwrap()];
    let read = blob.read_at(&mut bytes, 0).unwrap();
    assert_eq!(read, bytes.len());
    bytes
}

/// A tree of two directories with a file each, below a third.
fn tree() -> Sketch {
    let leaf = |text: &str| Sketch::directory([("file", Sketch::file(text))]);
    Sketch::directory([("a", leaf("in a")), ("b", leaf("in b"))])
}

fn digest_of(node: &Node) -> Digest {
    match node {
        Node::Directory { digest, .. } | Node::File { digest, .. } => *digest,
        Node::Symlink { .. } => panic!("a link has no digest"),
    }
}

fn until(what: &str, mut is: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is() {
        assert!(start.elapsed() < Duration::from_secs(10), "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn what_was_read_is_near_from_then_on() {
    let Cached { server, near, store } = cached(SHORT);
    let bytes = noise(3 * PIECE);
    let (digest, size) = put_blob(server.store(), &bytes).unwrap();
    let root = digest_of(&tree().put(server.store()));
    assert!(contents(&*store.blobs.open_sized(&digest, size).unwrap().unwrap()) == bytes);
    assert!(store.directories.get(&root).unwrap().is_some());
    assert_eq!(server.asked(), [Asked::Read(digest), Asked::GetTree(root)]);
    server.vanish();
    assert!(contents(&*store.blobs.open(&digest).unwrap().unwrap()) == bytes);
    for node in store.directories.get(&root).unwrap().unwrap().entries().map(|(_, node)| node) {
        assert!(store.directories.get(&digest_of(node)).unwrap().is_some(), "all below it came as well");
    }
    assert!(near.blobs.stat(&digest).unwrap().is_some());
}

#[test]
fn what_is_nowhere_is_not_there() {
    let Cached { server: _server, store, .. } = cached(LONG);
    let none = Digest::of(b"none");
    assert_eq!(store.blobs.stat(&none).unwrap(), None);
    assert!(store.blobs.open(&none).unwrap().is_none());
    assert!(store.directories.get(&none).unwrap().is_none());
    let nodes =
        [Node::Directory { digest: none, size: 0 }, Node::File { digest: none, size: 4, executable: false }];
    store.directories.prepare(&nodes).unwrap();
}

#[test]
fn wrong_bytes_stay_out() {
    let Cached { server, near, store } = cached(LONG);
    let bytes = noise(5 * PIECE);
    let (digest, size) = put_blob(server.store(), &bytes).unwrap();
    for (lie, long) in
        [(Fault::Wrong, false), (Fault::Short, false), (Fault::Long, true), (Fault::Endless, true)]
    {
        server.set(lie);
        let error = store.blobs.open_sized(&digest, size).map(drop).unwrap_err();
        let told = error.to_string();
        assert!(told.contains(&digest.to_hex()) && told.contains(&server.address()), "{lie:?}: {told}");
        match error {
            StoreError::Wrong { fault, .. } => {
                assert_eq!(matches!(*fault, WrongBytes::Long { .. }), long, "{lie:?}: {fault}");
            }
            other => panic!("{lie:?}: {other:?}"),
        }
        assert!(near.blobs.stat(&digest).unwrap().is_none(), "{lie:?}");
    }
    let mut changed = bytes.clone();
    changed[0] ^= 1;
    for given in [&changed[..], &bytes[..4 * PIECE]] {
        assert!(near.blobs.stat(&Digest::of(given)).unwrap().is_none(), "nor under a name of their own");
    }
    server.set(Fault::None);
    assert!(contents(&*store.blobs.open_sized(&digest, size).unwrap().unwrap()) == bytes);
}

#[test]
fn wrong_directories_stay_out() {
    let Cached { server, near, store } = cached(LONG);
    let root = digest_of(&tree().put(server.store()));
    for lie in [Fault::Wrong, Fault::Foreign, Fault::Twice, Fault::Endless] {
        server.set(lie);
        let told = store.directories.get(&root).unwrap_err().to_string();
        assert!(told.contains(&root.to_hex()) && told.contains(&server.address()), "{lie:?}: {told}");
        assert!(near.directories.get(&root).unwrap().is_none(), "{lie:?}");
    }
    // What there is of a tree is shown, but not taken for the whole.
    for lie in [Fault::Incomplete, Fault::Admits] {
        server.set(lie);
        assert_eq!(store.directories.get(&root).unwrap().unwrap().digest(), root, "{lie:?}");
        assert!(near.directories.get(&root).unwrap().is_none(), "{lie:?}");
    }
    server.set(Fault::None);
    assert!(store.directories.get(&root).unwrap().is_some());
    assert!(near.directories.get(&root).unwrap().is_some());
}

#[test]
fn fifty_readers_make_one_download() {
    let Cached { server, store, .. } = cached(LONG);
    server.slow_down(Duration::from_millis(300));
    let bytes = noise(5 * PIECE);
    let (digest, size) = put_blob(server.store(), &bytes).unwrap();
    let root = digest_of(&tree().put(server.store()));
    let read_all = || -> Vec<Result<bool, StoreError>> {
        let read = || {
            let blob = store.blobs.open_sized(&digest, size)?;
            Ok(blob.is_some_and(|blob| contents(&*blob) == bytes) && store.directories.get(&root)?.is_some())
        };
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..50).map(|_| scope.spawn(read)).collect();
            readers.into_iter().map(|reader| reader.join().unwrap()).collect()
        })
    };
    // One failure is everybody's.
    server.set(Fault::Wrong);
    assert!(read_all().iter().all(Result::is_err));
    assert_eq!(server.asked(), [Asked::Read(digest)]);
    // And nobody's who comes later.
    server.set(Fault::None);
    assert!(read_all().iter().all(|read| matches!(read, Ok(true))));
    assert_eq!(server.asked(), [Asked::Read(digest), Asked::GetTree(root)]);
}

#[test]
fn a_wrong_size_is_the_fault_of_who_states_it() {
    let Cached { server, store, .. } = cached(LONG);
    let bytes = noise(5 * PIECE);
    let (digest, size) = put_blob(server.store(), &bytes).unwrap();
    assert!(store.blobs.open_sized(&digest, size - 1).is_err());
    // Larger ones are told by the size that the blob has.
    assert_eq!(store.blobs.open_sized(&digest, size + 1).unwrap().unwrap().size(), size);
}

#[test]
fn what_is_far_is_remembered() {
    let Cached { server, store, .. } = cached(LONG);
    let (digest, _) = put_blob(server.store(), b"far").unwrap();
    for _ in 0..3 {
        assert!(store.blobs.stat(&digest).unwrap().is_some());
    }
    assert_eq!(server.asked(), [Asked::Stat(digest)]);
    let none = Digest::of(b"none");
    for _ in 0..3 {
        assert!(store.blobs.stat(&none).unwrap().is_none());
    }
    assert_eq!(server.asked().len(), 3, "what isn't there may come");
}

#[test]
fn trees_go_far_and_their_blobs_before_them() {
    let Cached { server, store, .. } = cached(LONG);
    // One blob is there already.
    put_blob(server.store(), b"in a").unwrap();
    let root = digest_of(&tree().put(&store));
    let asked = server.asked();
    let puts: Vec<&Asked> =
        asked.iter().filter(|asked| matches!(asked, Asked::PutBlob(_) | Asked::PutDirectories(_))).collect();
    match puts[..] {
        [Asked::PutBlob(blob), Asked::PutDirectories(directories)] => {
            assert_eq!((*blob, directories.last()), (Digest::of(b"in b"), Some(&root)));
        }
        _ => panic!("{puts:?}"),
    }
    assert!(server.store().directories.get(&root).unwrap().is_some());
    // Once more, and nothing is asked.
    tree().put(&store);
    assert_eq!(server.asked(), []);
    // A file that stands alone.
    let (lone, _) = put_blob(&store, b"lone").unwrap();
    assert!(server.store().blobs.stat(&lone).unwrap().is_none());
    store.blobs.keep(&lone).unwrap();
    assert!(server.store().blobs.stat(&lone).unwrap().is_some());
}

#[test]
fn what_is_only_near_goes_with_what_needs_it() {
    let Cached { server, near, store } = cached(LONG);
    let child = tree().put(&near);
    let parent = |name: &str| {
        let mut parent = Directory::new();
        parent.insert(super::super::Name::new(name).unwrap(), child.clone()).unwrap();
        parent
    };
    store.directories.put(vec![parent("x")]).unwrap();
    assert!(server.store().directories.get(&digest_of(&child)).unwrap().is_some());
    assert!(server.store().blobs.stat(&Digest::of(b"in b")).unwrap().is_some());
    // And what is only far is fetched first.
    let far = digest_of(&Sketch::directory([("far", tree())]).put(server.store()));
    let mut above = Directory::new();
    let far = server.store().directories.get(&far).unwrap().unwrap().node();
    above.insert(super::super::Name::new("above").unwrap(), far.clone()).unwrap();
    store.directories.put(vec![above]).unwrap();
    assert!(near.directories.get(&digest_of(&far)).unwrap().is_some());
}

#[test]
fn a_directory_may_come_before_its_blobs() {
    let Cached { server, store, .. } = cached(LONG);
    let mut directories = Vec::new();
    let root = digest_of(&tree().node(&mut directories));
    store.directories.put(directories).unwrap();
    assert!(server.store().directories.get(&root).unwrap().is_some());
}

#[test]
fn what_does_not_go_far_is_told_and_tried_again() {
    let Cached { server, store, .. } = cached(SHORT);
    let sketch = tree();
    for fault in [Fault::Full, Fault::Silent] {
        server.set(fault);
        put_blob(&store, b"in a").unwrap();
        put_blob(&store, b"in b").unwrap();
        let mut directories = Vec::new();
        sketch.node(&mut directories);
        let error = store.directories.put(directories).unwrap_err().to_string();
        assert!(error.contains(&server.address()), "{fault:?}: {error}");
        assert!(store.blobs.keep(&Digest::of(b"in a")).is_err(), "{fault:?}");
    }
    server.set(Fault::None);
    let root = digest_of(&sketch.put(&store));
    assert!(server.store().directories.get(&root).unwrap().is_some());
}

#[test]
fn a_store_that_vanishes_and_comes_back() {
    let Cached { server, store, .. } = cached(LONG);
    let bytes = noise(50 * PIECE);
    let (digest, _) = put_blob(server.store(), &bytes).unwrap();
    let root = digest_of(&tree().put(server.store()));
    server.vanish();
    std::thread::scope(|scope| {
        let blob = scope.spawn(|| store.blobs.open(&digest));
        let directory = scope.spawn(|| store.directories.get(&root));
        std::thread::sleep(Duration::from_millis(200));
        assert!(!blob.is_finished() && !directory.is_finished());
        server.come_back();
        assert!(contents(&*blob.join().unwrap().unwrap().unwrap()) == bytes);
        assert!(directory.join().unwrap().unwrap().is_some());
    });
    let root = digest_of(&Sketch::directory([("x", tree())]).put(&store));
    assert!(server.store().directories.get(&root).unwrap().is_some());
}

#[test]
fn prepared_trees_are_walked_and_read_without_the_network() {
    let Cached { server, near, store } = cached(SHORT);
    let tree = tree().put(server.store());
    let lone = noise(2 << 20);
    let (lone, size) = put_blob(server.store(), &lone).unwrap();
    let inputs = [tree.clone(), Node::File { digest: lone, size, executable: true }];
    store.directories.prepare(&inputs).unwrap();
    let small = [Digest::of(b"in a"), Digest::of(b"in b")];
    until("small blobs to come", || small.iter().all(|blob| near.blobs.stat(blob).unwrap().is_some()));
    assert!(near.blobs.stat(&lone).unwrap().is_none(), "large ones are left for whoever reads them");
    let asked = server.asked();
    assert!(!asked.iter().any(|asked| matches!(asked, Asked::Get(_))), "{asked:?}");
    assert_eq!(asked.iter().filter(|asked| matches!(asked, Asked::GetTree(_))).count(), 1, "{asked:?}");
    // A second time there is nothing to ask, and nobody to ask.
    server.vanish();
    store.directories.prepare(&inputs).unwrap();
    let closure = crate::castore::closure::Closure::new();
    let roots = inputs.iter().map(|node| ("input".to_owned(), node));
    assert_eq!(closure.check(&store, roots).unwrap(), []);
}

/// A store whose blobs may turn out damaged, and which may be full.
struct Weak {
    below: Store,
    damaged: Arc<AtomicBool>,
    /// Set once a damaged blob was found, as if it were removed, and until another is stored.
    removed: Arc<AtomicBool>,
    room: Arc<AtomicUsize>,
}

impl BlobService for Weak {
    fn stat(&self, digest: &Digest) -> Result<Option<BlobStat>, StoreError> {
        self.below.blobs.stat(digest)
    }

    fn open(&self, digest: &Digest) -> Result<Option<Arc<dyn Blob>>, StoreError> {
        if self.removed.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let (damaged, removed) = (Arc::clone(&self.damaged), Arc::clone(&self.removed));
        let weak = |below| Arc::new(WeakBlob { below, damaged, removed, digest: *digest }) as Arc<dyn Blob>;
        Ok(self.below.blobs.open(digest)?.map(weak))
    }

    fn create(&self) -> Result<Box<dyn BlobWriter>, StoreError> {
        let (removed, room) = (Arc::clone(&self.removed), Arc::clone(&self.room));
        Ok(Box::new(WeakWriter { below: self.below.blobs.create()?, removed, room }))
    }
}

struct WeakBlob {
    below: Arc<dyn Blob>,
    damaged: Arc<AtomicBool>,
    removed: Arc<AtomicBool>,
    digest: Digest,
}

impl Blob for WeakBlob {
    fn size(&self) -> u64 {
        self.below.size()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.below.read_at(buffer, offset)
    }

    fn verify(&self) -> Result<(), StoreError> {
        match self.damaged.swap(false, Ordering::Relaxed) {
            true => {
                self.removed.store(true, Ordering::Relaxed);
                Err(StoreError::Damaged { kind: "blob", digest: self.digest })
            }
            false => Ok(()),
        }
    }
}

struct WeakWriter {
    below: Box<dyn BlobWriter>,
    removed: Arc<AtomicBool>,
    room: Arc<AtomicUsize>,
}

impl Write for WeakWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = |room: usize| room.checked_sub(bytes.len());
        match self.room.fetch_update(Ordering::Relaxed, Ordering::Relaxed, taken) {
            Ok(_) => self.below.write(bytes),
            Err(_) => Err(io::ErrorKind::StorageFull.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl BlobWriter for WeakWriter {
    fn finish(self: Box<Self>) -> Result<Stored, StoreError> {
        self.removed.store(false, Ordering::Relaxed);
        self.below.finish()
    }
}

fn weak(room: usize) -> (Store, Arc<AtomicBool>, Arc<AtomicUsize>) {
    let (below, room) = (memory::store(), Arc::new(AtomicUsize::new(room)));
    let (damaged, removed) = (Arc::default(), Arc::default());
    let directories = Arc::clone(&below.directories);
    let blobs = Arc::new(Weak { below, damaged: Arc::clone(&damaged), removed, room: Arc::clone(&room) });
    (Store { blobs, directories }, damaged, room)
}

#[test]
fn a_damaged_blob_is_fetched_again() {
    let (near, damaged, _) = weak(usize::MAX);
    let Cached { server, store, .. } = cached_near(near, LONG);
    let (digest, size) = put_blob(server.store(), b"precious").unwrap();
    for reads in 1..4 {
        assert!(contents(&*store.blobs.open_sized(&digest, size).unwrap().unwrap()) == b"precious");
        assert_eq!(server.asked(), [Asked::Read(digest)], "{reads}");
        damaged.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_full_disk_is_no_fault_of_the_remote() {
    let (near, _, room) = weak(3 * PIECE);
    let Cached { server, near, store } = cached_near(near, LONG);
    let bytes = noise(5 * PIECE);
    let (digest, size) = put_blob(server.store(), &bytes).unwrap();
    let error = store.blobs.open_sized(&digest, size).map(drop).unwrap_err();
    assert!(matches!(error, StoreError::Io { .. }), "{error}");
    assert!(error.to_string().contains(&digest.to_hex()), "{error}");
    assert!(near.blobs.stat(&digest).unwrap().is_none());
    room.store(usize::MAX, Ordering::Relaxed);
    assert!(contents(&*store.blobs.open_sized(&digest, size).unwrap().unwrap()) == bytes);
}
