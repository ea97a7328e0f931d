//! The services over a real socket, driven by our own client and by hand.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use tokio::runtime::Runtime;
use tonic::Code;
use tonic::transport::Channel;
use wire::blob_service_client::BlobServiceClient;
use wire::directory_service_client::DirectoryServiceClient;

use super::*;
use crate::address::Address;
use crate::castore::remote::RemoteStore;
use crate::castore::{Name, Node, Stored, memory};

/// A served store, both ends of it.
struct Served {
    runtime: Runtime,
    backing: Store,
    channel: Channel,
    remote: Store,
    _directory: tempfile::TempDir,
}

fn serve(backing: Store) -> Served {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("castore.sock");
    let listener = {
        let _inside = runtime.enter();
        tokio::net::UnixListener::bind(&socket).unwrap()
    };
    let server = tonic::transport::Server::builder()
        .add_service(blob_server(backing.clone()))
        .add_service(directory_server(backing.clone()))
        .serve_with_incoming(tokio_stream::wrappers::UnixListenerStream::new(listener));
    runtime.spawn(server);
    let address: Address = format!("unix:{}", socket.display()).parse().unwrap();
    let channel = runtime.block_on(address.connect()).unwrap();
    let remote =
        RemoteStore::new(channel.clone(), &address, runtime.handle().clone(), directory.path()).store();
    Served { runtime, backing, channel, remote, _directory: directory }
}

fn noise(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    bytes
}

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

/// A directory with these directories in it.
fn parent<'a>(children: impl IntoIterator<Item = (&'a str, &'a Directory)>) -> Directory {
    let mut directory = Directory::new();
    for (entry, child) in children {
        directory.insert(name(entry), child.node()).unwrap();
    }
    directory
}

/// A directory that is like no other of a different label.
fn leaf(label: &str) -> Directory {
    let mut directory = Directory::new();
    let digest = Digest::of(label.as_bytes());
    directory.insert(name(label), Node::File { digest, size: 1, executable: false }).unwrap();
    directory
}

fn write_blob(store: &Store, bytes: &[u8]) -> (Digest, u64) {
    let mut writer = store.blobs.create().unwrap();
    writer.write_all(bytes).unwrap();
    let Stored { digest, size, .. } = writer.finish().unwrap();
    (digest, size)
}

#[test]
fn blobs_go_there_and_back() {
    let served = serve(memory::store());
    for len in [0, 1, 256 << 10, (256 << 10) + 1, (1 << 20) - 1, 10 << 20] {
        let bytes = noise(len);
        let digest = Digest::of(&bytes);
        assert!(served.remote.blobs.stat(&digest).unwrap().is_none(), "{len}");
        assert!(served.remote.blobs.open(&digest).unwrap().is_none(), "{len}");
        assert_eq!(write_blob(&served.remote, &bytes), (digest, len as u64));
        assert!(served.backing.blobs.stat(&digest).unwrap().is_some(), "{len}");
        assert!(served.remote.blobs.stat(&digest).unwrap().is_some(), "{len}");
        let blob = served.remote.blobs.open(&digest).unwrap().unwrap();
        assert_eq!(blob.size(), len as u64);
        let mut back = vec![1; len + 5];
        assert_eq!(blob.read_at(&mut back, 0).unwrap(), len);
        assert!(back[..len] == bytes, "{len}");
        assert_eq!(blob.read_at(&mut back, len as u64).unwrap(), 0);
    }
}

#[test]
fn how_a_blob_is_cut_up_does_not_matter() {
    let served = serve(memory::store());
    let bytes = noise(300_000);
    let mut client = BlobServiceClient::new(served.channel.clone());
    for piece in [1000, 4096, 65_536, 300_000] {
        let mut chunks: Vec<_> =
            bytes.chunks(piece).map(|data| wire::BlobChunk { data: data.to_vec().into() }).collect();
        chunks.insert(chunks.len() / 2, wire::BlobChunk::default());
        let response = served.runtime.block_on(client.put(tokio_stream::iter(chunks))).unwrap();
        assert_eq!(response.into_inner().digest, Digest::of(&bytes).as_bytes(), "{piece}");
    }
    let stored = served.runtime.block_on(client.put(tokio_stream::iter([]))).unwrap();
    assert_eq!(stored.into_inner().digest, Digest::of(b"").as_bytes(), "no message at all");
    assert!(served.backing.blobs.stat(&Digest::of(b"")).unwrap().is_some());
    let digest = Digest::of(b"").as_bytes().to_vec();
    let mut stream =
        served.runtime.block_on(client.read(wire::ReadBlobRequest { digest })).unwrap().into_inner();
    assert_eq!(served.runtime.block_on(stream.message()).unwrap(), None, "the empty blob");
}

#[test]
fn requests_that_can_not_be_met_are_refused() {
    let served = serve(memory::store());
    let mut blobs = BlobServiceClient::new(served.channel.clone());
    let mut directories = DirectoryServiceClient::new(served.channel.clone());
    let absent = Digest::of(b"absent").as_bytes().to_vec();
    let cases = [
        ("absent", absent, Code::NotFound, "is not in the store"),
        ("short", vec![1; 31], Code::InvalidArgument, "digest: a digest has 32 bytes, this one 31"),
        ("none", vec![], Code::InvalidArgument, "digest: a digest has 32 bytes, this one 0"),
    ];
    for (case, digest, code, text) in cases {
        let stat = wire::StatBlobRequest { digest: digest.clone(), send_chunks: true, send_bao: true };
        let read = wire::ReadBlobRequest { digest: digest.clone() };
        let get = |recursive| wire::GetDirectoryRequest {
            by_what: Some(ByWhat::Digest(digest.clone())),
            recursive,
        };
        let answers = served.runtime.block_on(async {
            [
                blobs.stat(stat).await.map(drop),
                blobs.read(read).await.map(drop),
                directories.get(get(false)).await.map(drop),
                directories.get(get(true)).await.map(drop),
            ]
        });
        for (call, answer) in answers.into_iter().enumerate() {
            let status = answer.unwrap_err();
            assert_eq!(status.code(), code, "{case}, call {call}: {status}");
            assert!(status.message().contains(text), "{case}, call {call}: {status}");
        }
    }
    let nothing = wire::GetDirectoryRequest { by_what: None, recursive: false };
    let status = served.runtime.block_on(directories.get(nothing)).unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().starts_with("by_what:"), "{status}");
}

#[test]
fn a_stored_blob_has_neither_chunks_nor_bao() {
    let served = serve(memory::store());
    let (digest, _) = write_blob(&served.backing, b"x");
    let request =
        wire::StatBlobRequest { digest: digest.as_bytes().to_vec(), send_chunks: true, send_bao: true };
    let mut client = BlobServiceClient::new(served.channel.clone());
    let answer = served.runtime.block_on(client.stat(request)).unwrap().into_inner();
    assert_eq!(answer, wire::StatBlobResponse::default());
}

#[test]
fn trees_go_there_and_back() {
    let served = serve(memory::store());
    let empty = Directory::new();
    let a = parent([("empty", &empty)]);
    // `empty` is reached three ways, and `a` from two depths.
    let b = parent([("a", &a), ("empty", &empty)]);
    let root = parent([("a", &a), ("b", &b), ("empty", &empty)]);
    let all = [&empty, &a, &b, &root];
    served.remote.directories.put(all.map(Clone::clone).to_vec()).unwrap();
    for directory in all {
        let digest = directory.digest();
        assert_eq!(*served.remote.directories.get(&digest).unwrap().unwrap(), *directory);
    }
    assert!(served.remote.directories.get(&leaf("x").digest()).unwrap().is_none());

    let mut client = DirectoryServiceClient::new(served.channel.clone());
    let mut list = |directory: &Directory, recursive| -> Vec<Directory> {
        let by_what = Some(ByWhat::Digest(directory.digest().as_bytes().to_vec()));
        let request = wire::GetDirectoryRequest { by_what, recursive };
        served.runtime.block_on(async {
            let mut stream = client.get(request).await.unwrap().into_inner();
            let mut listed = Vec::new();
            while let Some(message) = stream.message().await.unwrap() {
                listed.push(Directory::try_from(message).unwrap());
            }
            listed
        })
    };
    assert_eq!(list(&root, false), std::slice::from_ref(&root));
    assert_eq!(list(&empty, true), std::slice::from_ref(&empty));
    assert_eq!(list(&root, true), [root.clone(), b, a, empty], "parents before children");
}

#[test]
fn deep_and_wide_trees_come_in_order() {
    let store = memory::store();
    let mut chain = vec![Directory::new()];
    for depth in 0..5000 {
        let mut directory = parent([("below", chain.last().unwrap())]);
        let marks = (0..depth % 3).map(|n| (format!("leaf-{n}"), leaf(&format!("{}", (depth + n) % 40))));
        for (entry, child) in marks {
            directory.insert(name(&entry), child.node()).unwrap();
        }
        chain.push(directory);
    }
    let leaves: Vec<Directory> = (0..50).map(|n| leaf(&format!("{n}"))).collect();
    let total = chain.len() + 40;
    let root = chain.last().unwrap().digest();
    store.directories.put(leaves.into_iter().chain(chain).collect()).unwrap();
    let order = parents_first(&store, root, || false).unwrap();
    assert_eq!(order.len(), total);
    let position: HashMap<Digest, usize> = order.iter().copied().enumerate().map(|(n, d)| (d, n)).collect();
    assert_eq!(position.len(), total, "each once");
    for digest in &order {
        for (_, child, _) in store.directories.get(digest).unwrap().unwrap().child_directories() {
            assert!(position[digest] < position[&child]);
        }
    }
    assert!(parents_first(&store, root, || true).unwrap().is_empty(), "given up");
}

#[test]
fn uploads_of_directories_are_checked() {
    let empty = Directory::new();
    let (x, y) = (leaf("x"), leaf("y"));
    let root = parent([("x", &x), ("y", &y)]);
    let upper = parent([("root", &root)]);
    let mut liar = Directory::new();
    liar.insert(name("x"), Node::Directory { digest: x.digest(), size: 77 }).unwrap();
    let good = |directories: &[&Directory]| -> Vec<wire::Directory> {
        directories.iter().map(|directory| wire::Directory::from(*directory)).collect()
    };
    let bad = |entries: &[(&str, usize)]| wire::Directory {
        files: entries
            .iter()
            .map(|(entry, len)| wire::FileEntry {
                name: entry.as_bytes().to_vec(),
                digest: vec![0; *len],
                size: 0,
                executable: false,
            })
            .collect(),
        ..Default::default()
    };
    let with_link = wire::Directory {
        symlinks: vec![wire::SymlinkEntry { name: b"link".to_vec(), target: vec![] }],
        ..Default::default()
    };
    let accepted = [
        ("one", good(&[&empty]), &empty),
        ("a tree", good(&[&x, &y, &root]), &root),
        ("one that comes again", good(&[&x, &y, &x, &root, &root]), &root),
        ("children from before", good(&[&root]), &root),
    ];
    let refused = [
        ("no message", vec![], "the stream has no directory"),
        ("a child too late", good(&[&root, &x, &y]), "message 1: no later directory"),
        ("a child not at all", good(&[&x, &root]), "message 1: the directory"),
        ("a wrong size", good(&[&x, &liar]), "message 1: the directory"),
        ("one too many", good(&[&empty, &x, &y, &root]), "message 0: no later directory"),
        ("two roots", good(&[&x, &y, &root, &empty]), "message 2: no later directory"),
        ("the root, then more of it", good(&[&x, &y, &root, &upper, &x]), "message 3: no later directory"),
        ("a slash", vec![bad(&[("a/b", 32)])], "message 0: the name \"a/b\" contains a slash"),
        ("no name", vec![bad(&[("", 32)])], "message 0: the name \"\" is empty"),
        ("itself", vec![bad(&[(".", 32)])], "message 0: the name \".\""),
        ("a name twice", vec![bad(&[("a", 32), ("a", 32)])], "message 0: the name \"a\" stands twice"),
        ("out of order", vec![bad(&[("b", 32), ("a", 32)])], "message 0: \"a\" stands after a greater name"),
        ("a short digest", vec![bad(&[("a", 31)])], "message 0: a digest has 32 bytes, this one 31"),
        ("a link to nothing", [good(&[&x]), vec![with_link]].concat(), "message 1: the target is empty"),
    ];
    for (case, messages, text) in refused {
        let served = serve(memory::store());
        let mut client = DirectoryServiceClient::new(served.channel.clone());
        let status = served.runtime.block_on(client.put(tokio_stream::iter(messages))).unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{case}: {status}");
        assert!(status.message().starts_with(text), "{case}: {status}");
        for directory in [&empty, &x, &y, &root, &liar] {
            assert!(served.backing.directories.get(&directory.digest()).unwrap().is_none(), "{case}");
        }
    }
    let served = serve(memory::store());
    let mut client = DirectoryServiceClient::new(served.channel.clone());
    for (case, messages, expected) in accepted {
        let stored = served.runtime.block_on(client.put(tokio_stream::iter(messages))).unwrap();
        assert_eq!(stored.into_inner().root_digest, expected.digest().as_bytes(), "{case}");
        assert_eq!(
            *served.backing.directories.get(&expected.digest()).unwrap().unwrap(),
            *expected,
            "{case}"
        );
    }
}

#[test]
fn our_client_checks_children_and_sends_several_trees() {
    let served = serve(memory::store());
    let store = &served.remote.directories;
    let (x, y, shared) = (leaf("x"), leaf("y"), leaf("shared"));
    let first = parent([("shared", &shared), ("x", &x)]);
    let second = parent([("shared", &shared), ("y", &y)]);
    let refused = store.put(vec![x.clone(), first.clone()]).unwrap_err();
    assert!(matches!(refused, StoreError::MissingChild { .. }), "{refused}");
    let mut liar = Directory::new();
    liar.insert(name("x"), Node::Directory { digest: x.digest(), size: 9 }).unwrap();
    let refused = store.put(vec![x.clone(), liar]).unwrap_err();
    assert!(matches!(refused, StoreError::ChildSize { stated: 9, actual: 2, .. }), "{refused}");
    assert!(store.get(&x.digest()).unwrap().is_none());

    let all = [&shared, &x, &y, &first, &second, &Directory::new()].map(Clone::clone);
    store.put(all.to_vec()).unwrap();
    for directory in all {
        assert!(served.backing.directories.get(&directory.digest()).unwrap().is_some());
    }
    store.put(vec![]).unwrap();
    let above = parent([("first", &first)]);
    store.put(vec![above]).unwrap();
}

/// A store whose answers are wrong or errors, and which counts the writers alive.
struct Broken {
    writers: Arc<Mutex<usize>>,
}

struct BrokenBlob;

impl Blob for BrokenBlob {
    fn size(&self) -> u64 {
        300_000
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<usize> {
        Ok(if offset == 0 { buffer.len() } else { 0 })
    }

    fn verify(&self) -> Result<(), StoreError> {
        Ok(())
    }
}

struct BrokenWriter {
    writers: Arc<Mutex<usize>>,
    len: usize,
}

impl std::io::Write for BrokenWriter {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.len += bytes.len();
        if self.len > 4 << 20 { Err(std::io::ErrorKind::StorageFull.into()) } else { Ok(bytes.len()) }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl BlobWriter for BrokenWriter {
    fn finish(self: Box<Self>) -> Result<Stored, StoreError> {
        Ok(Stored { digest: Digest::of(b"something else"), size: 0, new: true })
    }
}

impl Drop for BrokenWriter {
    fn drop(&mut self) {
        *self.writers.lock().unwrap() -= 1;
    }
}

impl crate::castore::BlobService for Broken {
    fn stat(&self, digest: &Digest) -> Result<Option<crate::castore::BlobStat>, StoreError> {
        Err(StoreError::Damaged { kind: "blob", digest: *digest })
    }

    fn open(&self, digest: &Digest) -> Result<Option<Arc<dyn Blob>>, StoreError> {
        if *digest == Digest::of(b"hello") {
            return Ok(Some(Arc::new(BrokenBlob)));
        }
        Err(StoreError::io("open", "the disk", std::io::ErrorKind::Other.into()))
    }

    fn create(&self) -> Result<Box<dyn BlobWriter>, StoreError> {
        *self.writers.lock().unwrap() += 1;
        Ok(Box::new(BrokenWriter { writers: Arc::clone(&self.writers), len: 0 }))
    }
}

#[test]
fn a_broken_store_is_the_servers_fault_and_is_noticed() {
    let writers = Arc::new(Mutex::new(0));
    let broken = Arc::new(Broken { writers: Arc::clone(&writers) });
    let served = serve(Store { blobs: broken, directories: memory::store().directories });
    let mut client = BlobServiceClient::new(served.channel.clone());
    let digest = Digest::of(b"x").as_bytes().to_vec();
    let stat = wire::StatBlobRequest { digest: digest.clone(), send_chunks: false, send_bao: false };
    let status = served.runtime.block_on(client.stat(stat)).unwrap_err();
    assert_eq!((status.code(), status.message().contains("is damaged")), (Code::Internal, true), "{status}");
    let status = served.runtime.block_on(client.read(wire::ReadBlobRequest { digest })).unwrap_err();
    assert_eq!((status.code(), status.message().contains("the disk")), (Code::Unavailable, true), "{status}");

    let truncated = served.remote.blobs.open(&Digest::of(b"hello")).map(|_| ()).unwrap_err();
    assert!(truncated.to_string().contains("ends at byte 262144 of 300000"), "{truncated}");

    let mut writer = served.remote.blobs.create().unwrap();
    writer.write_all(b"hello").unwrap();
    let wrong = writer.finish().unwrap_err().to_string();
    assert!(wrong.contains("what it stored is not"), "{wrong}");

    // The refusal comes while we write; writing on and finishing must not do worse than fail.
    let mut writer = served.remote.blobs.create().unwrap();
    let piece = noise(1 << 20);
    let refused = (0..100).find_map(|_| writer.write_all(&piece).err()).unwrap();
    assert!(refused.to_string().contains("a new blob"), "{refused}");
    assert!(writer.write_all(&piece).is_err());
    assert!(writer.finish().is_err());

    // Abandoned in the middle.
    let mut writer = served.remote.blobs.create().unwrap();
    writer.write_all(&piece).unwrap();
    let start = Instant::now();
    while *writers.lock().unwrap() == 0 {
        assert!(start.elapsed() < Duration::from_secs(10), "the server has not begun");
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(writer);
    while *writers.lock().unwrap() > 0 {
        assert!(start.elapsed() < Duration::from_secs(10), "the server still holds a writer");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn an_abandoned_upload_leaves_nothing() {
    let served = serve(memory::store());
    let bytes = noise(1 << 20);
    for len in [10, 256 << 10, 1 << 20].into_iter().cycle().take(150) {
        let mut writer = served.remote.blobs.create().unwrap();
        writer.write_all(&bytes[..len]).unwrap();
        drop(writer);
        // Keeps step with the server, which takes a burst of abandoned calls for an attack.
        served.remote.blobs.stat(&Digest::of(b"")).unwrap();
    }
    // One that is completed after them, so that the server has seen them all.
    write_blob(&served.remote, b"later");
    for len in [0, 10, 256 << 10, 512 << 10, 768 << 10, 1 << 20] {
        assert!(served.backing.blobs.stat(&Digest::of(&bytes[..len])).unwrap().is_none(), "{len}");
    }
}

#[test]
fn a_store_that_has_gone_is_named() {
    let served = serve(memory::store());
    let channel = {
        let _inside = served.runtime.enter();
        tonic::transport::Endpoint::from_static("http://127.0.0.1:1").connect_lazy()
    };
    let (runtime, spool) = (served.runtime.handle().clone(), std::env::temp_dir());
    let store = RemoteStore::new(channel, "its-address", runtime, &spool).store();
    let digest = Digest::of(b"x");
    let mut writer = store.blobs.create().unwrap();
    writer.write_all(b"x").unwrap();
    let errors = [
        store.blobs.stat(&digest).unwrap_err(),
        store.blobs.open(&digest).map(drop).unwrap_err(),
        writer.finish().unwrap_err(),
        store.directories.get(&digest).unwrap_err(),
        store.directories.put(vec![Directory::new()]).unwrap_err(),
    ];
    for error in errors {
        assert!(error.to_string().starts_with("the store at its-address could not"), "{error}");
    }
}
