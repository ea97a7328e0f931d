//! A server for tests: it may be told to do what no server should, tells what it was asked, and can go and come back.

use std::collections::HashSet;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cofferdam_proto::castore as wire;
use tokio::runtime::Runtime;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};
use wire::blob_service_server::{BlobService, BlobServiceServer};
use wire::directory_service_server::{DirectoryService, DirectoryServiceServer};
use wire::get_directory_request::ByWhat;

use super::{RemoteStore, Retry};
use crate::address::{Address, Security};
use crate::castore::{Digest, Directory, Store, memory};
use crate::lock::lock;

/// What is sent of a blob in one message, in bytes.
pub(in crate::castore) const PIECE: usize = 10_000;

/// What is wrong with the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::castore) enum Fault {
    /// Nothing.
    None,
    /// It does not answer.
    Silent,
    /// The streams that it sends stop after their first message, without an end.
    Stalls,
    /// They go on for ever with messages that hold nothing.
    Babbles,
    /// They come one byte at a time, and slowly.
    Trickles,
    /// One byte is another one.
    Wrong,
    /// The last message is missing.
    Short,
    /// There is one message too many.
    Long,
    /// They never end.
    Endless,
    /// The connection is lost after the first message.
    Dies,
    /// The same, once.
    DiesOnce,
    /// The root alone comes of a tree.
    Incomplete,
    /// After the first message it says that it lacks the rest.
    Admits,
    /// A directory comes that was not asked for.
    Foreign,
    /// A directory comes twice.
    Twice,
    /// It takes nothing.
    Full,
}

/// What it was asked, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::castore) enum Asked {
    Stat(Digest),
    Read(Digest),
    PutBlob(Digest),
    Get(Digest),
    GetTree(Digest),
    PutDirectories(Vec<Digest>),
}

#[derive(Clone)]
struct Service(Arc<State>);

struct State {
    store: Store,
    fault: Mutex<Fault>,
    asked: Mutex<Vec<Asked>>,
    delay: Mutex<Duration>,
    died: AtomicBool,
}

/// The server, and what a client needs.
pub(in crate::castore) struct Server {
    service: Service,
    socket: PathBuf,
    serving: Mutex<Option<Runtime>>,
    client: Runtime,
    _dir: tempfile::TempDir,
}

impl Server {
    /// One that is in order, over an empty store.
    pub(in crate::castore) fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let state = State {
            store: memory::store(),
            fault: Mutex::new(Fault::None),
            asked: Mutex::default(),
            delay: Mutex::default(),
            died: AtomicBool::new(false),
        };
        let server = Self {
            service: Service(Arc::new(state)),
            socket: dir.path().join("socket"),
            serving: Mutex::new(None),
            client: runtime(),
            _dir: dir,
        };
        server.come_back();
        server
    }

    /// What it serves, past all faults.
    pub(in crate::castore) fn store(&self) -> &Store {
        &self.service.0.store
    }

    pub(in crate::castore) fn set(&self, fault: Fault) {
        *lock(&self.service.0.fault) = fault;
        self.service.0.died.store(false, Ordering::Relaxed);
    }

    /// Lets every blob wait before it is sent.
    pub(in crate::castore) fn slow_down(&self, delay: Duration) {
        *lock(&self.service.0.delay) = delay;
    }

    /// What it was asked since the last time.
    pub(in crate::castore) fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut lock(&self.service.0.asked))
    }

    /// Ends it, with all connections.
    pub(in crate::castore) fn vanish(&self) {
        if let Some(serving) = lock(&self.serving).take() {
            serving.shutdown_timeout(Duration::from_secs(5));
            std::fs::remove_file(&self.socket).unwrap();
        }
    }

    /// Starts it again.
    pub(in crate::castore) fn come_back(&self) {
        let serving = runtime();
        let listener = {
            let _within = serving.enter();
            tokio::net::UnixListener::bind(&self.socket).unwrap()
        };
        let server = tonic::transport::Server::builder()
            .add_service(BlobServiceServer::new(self.service.clone()))
            .add_service(DirectoryServiceServer::new(self.service.clone()))
            .serve_with_incoming(tokio_stream::wrappers::UnixListenerStream::new(listener));
        serving.spawn(server);
        *lock(&self.serving) = Some(serving);
    }

    /// What errors call it.
    pub(in crate::castore) fn address(&self) -> String {
        format!("grpc+unix:{}", self.socket.display())
    }

    /// A client with this deadline, which asks again.
    pub(in crate::castore) fn client(&self, deadline: Duration) -> RemoteStore {
        let address: Address = self.address().parse().unwrap();
        let _within = self.client.enter();
        let channel = address.connect_lazily(Security::Plain).unwrap();
        let (runtime, spool) = (self.client.handle().clone(), std::env::temp_dir());
        RemoteStore::with_deadline(channel, self.address(), runtime, &spool, deadline, Retry::UntilDeadline)
    }
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Service {
    /// Notes what is asked, and yields what is wrong.
    async fn ask(&self, asked: Asked) -> Fault {
        lock(&self.0.asked).push(asked);
        let fault = *lock(&self.0.fault);
        match fault {
            Fault::Silent => std::future::pending().await,
            Fault::DiesOnce if self.0.died.swap(true, Ordering::Relaxed) => Fault::None,
            fault => fault,
        }
    }
}

/// What a stream makes of messages under a fault; `empty` is one without content.
fn stream<T: Clone + Send + Sync + 'static>(messages: Vec<T>, empty: T, fault: Fault) -> Answers<T> {
    let lost = || Err(Status::unavailable("the connection was lost"));
    let first = messages.first().cloned().map(Ok).into_iter();
    let last = messages.last().cloned().unwrap_or(empty.clone());
    let but_last = messages.len().saturating_sub(1);
    let all = tokio_stream::iter(messages.into_iter().map(Ok));
    match fault {
        Fault::Stalls => Box::pin(tokio_stream::iter(first).chain(tokio_stream::pending())),
        Fault::Babbles => Box::pin(all.chain(tokio_stream::iter(std::iter::repeat(Ok(empty))))),
        Fault::Trickles => {
            let (sender, slowly) = tokio::sync::mpsc::channel(1);
            tokio::spawn(async move {
                while sender.send(Ok(last.clone())).await.is_ok() {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            });
            Box::pin(tokio_stream::wrappers::ReceiverStream::new(slowly))
        }
        Fault::Short => Box::pin(all.take(but_last)),
        Fault::Long => Box::pin(all.chain(tokio_stream::iter([Ok(last)]))),
        Fault::Endless => Box::pin(all.chain(tokio_stream::iter(std::iter::repeat(Ok(last))))),
        Fault::Dies | Fault::DiesOnce => {
            Box::pin(tokio_stream::iter(first).chain(tokio_stream::iter([lost()])))
        }
        Fault::Admits => {
            let lacks = Status::internal("the tree is not complete");
            Box::pin(tokio_stream::iter(first).chain(tokio_stream::iter([Err(lacks)])))
        }
        _ => Box::pin(all),
    }
}

#[tonic::async_trait]
impl BlobService for Service {
    type ReadStream = Answers<wire::BlobChunk>;

    async fn stat(
        &self,
        request: Request<wire::StatBlobRequest>,
    ) -> Result<Response<wire::StatBlobResponse>, Status> {
        let digest = digest(&request.get_ref().digest);
        self.ask(Asked::Stat(digest)).await;
        match self.0.store.blobs.stat(&digest).unwrap() {
            Some(_) => Ok(Response::new(wire::StatBlobResponse::default())),
            None => Err(Status::not_found("no such blob")),
        }
    }

    async fn read(
        &self,
        request: Request<wire::ReadBlobRequest>,
    ) -> Result<Response<Self::ReadStream>, Status> {
        let digest = digest(&request.get_ref().digest);
        let fault = self.ask(Asked::Read(digest)).await;
        let delay = *lock(&self.0.delay);
        tokio::time::sleep(delay).await;
        let blob = self.0.store.blobs.open(&digest).unwrap();
        let blob = blob.ok_or_else(|| Status::not_found("no such blob"))?;
        let mut bytes = vec![0; blob.size() as usize];
        blob.read_at(&mut bytes, 0).unwrap();
        if fault == Fault::Wrong {
            bytes[0] ^= 1;
        }
        let piece = if fault == Fault::Trickles { 1 } else { PIECE };
        let chunk = |data: &[u8]| wire::BlobChunk { data: data.to_vec().into() };
        let messages: Vec<_> = bytes.chunks(piece).map(chunk).collect();
        Ok(Response::new(stream(messages, wire::BlobChunk::default(), fault)))
    }

    async fn put(
        &self,
        request: Request<Streaming<wire::BlobChunk>>,
    ) -> Result<Response<wire::PutBlobResponse>, Status> {
        let (mut stream, mut bytes) = (request.into_inner(), Vec::new());
        while let Some(chunk) = stream.message().await? {
            bytes.extend_from_slice(&chunk.data);
        }
        tokio::task::yield_now().await;
        if self.ask(Asked::PutBlob(Digest::of(&bytes))).await == Fault::Full {
            return Err(Status::resource_exhausted("no space left"));
        }
        let mut writer = self.0.store.blobs.create().unwrap();
        writer.write_all(&bytes).unwrap();
        let digest = writer.finish().unwrap().digest.as_bytes().to_vec();
        Ok(Response::new(wire::PutBlobResponse { digest }))
    }
}

#[tonic::async_trait]
impl DirectoryService for Service {
    type GetStream = Answers<wire::Directory>;

    async fn get(
        &self,
        request: Request<wire::GetDirectoryRequest>,
    ) -> Result<Response<Self::GetStream>, Status> {
        let wire::GetDirectoryRequest { by_what: Some(ByWhat::Digest(bytes)), recursive } =
            request.into_inner()
        else {
            return Err(Status::invalid_argument("by_what"));
        };
        let digest = digest(&bytes);
        let asked = if recursive { Asked::GetTree(digest) } else { Asked::Get(digest) };
        let fault = self.ask(asked).await;
        let get = |digest: &Digest| self.0.store.directories.get(digest).unwrap();
        let root = get(&digest).ok_or_else(|| Status::not_found("no such directory"))?;
        let mut all = vec![root];
        let mut seen = HashSet::from([digest]);
        let mut next = 0;
        while let Some(directory) = all.get(next).cloned()
            && recursive
            && fault != Fault::Incomplete
        {
            let new = directory.child_directories().map(|(_, child, _)| child);
            all.extend(new.filter(|child| seen.insert(*child)).filter_map(|child| get(&child)));
            next += 1;
        }
        let mut messages: Vec<wire::Directory> = all.iter().map(|directory| (&**directory).into()).collect();
        match fault {
            Fault::Wrong => {
                messages[0].symlinks.push(wire::SymlinkEntry { name: b"zz".into(), target: b"x".into() })
            }
            Fault::Foreign => {
                let symlinks = vec![wire::SymlinkEntry { name: b"a".into(), target: b"b".into() }];
                messages.insert(1, wire::Directory { symlinks, ..Default::default() });
            }
            Fault::Twice => messages.insert(1, messages[0].clone()),
            _ => {}
        }
        Ok(Response::new(stream(messages, wire::Directory::default(), fault)))
    }

    async fn put(
        &self,
        request: Request<Streaming<wire::Directory>>,
    ) -> Result<Response<wire::PutDirectoryResponse>, Status> {
        let (mut stream, mut all) = (request.into_inner(), Vec::new());
        while let Some(message) = stream.message().await? {
            all.push(Directory::try_from(message).unwrap());
        }
        let digests: Vec<Digest> = all.iter().map(Directory::digest).collect();
        let root_digest = digests.last().unwrap().as_bytes().to_vec();
        if self.ask(Asked::PutDirectories(digests)).await == Fault::Full {
            return Err(Status::resource_exhausted("no space left"));
        }
        let put = self.0.store.directories.put(all);
        put.map_err(|error| Status::invalid_argument(error.to_string()))?;
        Ok(Response::new(wire::PutDirectoryResponse { root_digest }))
    }
}

fn digest(bytes: &[u8]) -> Digest {
    bytes.try_into().unwrap()
}
