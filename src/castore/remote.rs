//! A store behind gRPC: a client of `snix.castore.v1`.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::future::Future;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use cofferdam_proto::castore as wire;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tonic::transport::Channel;
use tonic::{Code, Status};
use wire::blob_service_client::BlobServiceClient;
use wire::directory_service_client::DirectoryServiceClient;

use super::children::check_children;
use super::file_blob::FileBlob;
use super::{
    Blob, BlobService, BlobStat, BlobWriter, Digest, Directory, DirectoryService, Store, StoreError, Stored,
};

/// Largest message that carries a piece of a blob, in bytes. We send smaller ones.
pub const MAX_BLOB_MESSAGE: usize = 16 << 20;

/// Largest directory message in bytes: some hundred thousand entries.
pub const MAX_DIRECTORY_MESSAGE: usize = 64 << 20;

/// What we send of a blob in one message, in bytes.
const PIECE: usize = 256 << 10;

/// Pieces on their way to the store before the writer has to wait.
const PIECES_AHEAD: usize = 4;

/// How long the store may keep us waiting for an answer, or for the next message of a stream.
const DEADLINE: Duration = Duration::from_secs(60);

/// A store elsewhere.
///
/// Its calls block the calling thread while `runtime` works, so they must not be made from async code:
/// tokio panics there. The runtime must have a thread of its own.
#[derive(Clone)]
pub struct RemoteStore {
    inner: Arc<Inner>,
}

struct Inner {
    address: String,
    blobs: BlobServiceClient<Channel>,
    directories: DirectoryServiceClient<Channel>,
    runtime: Handle,
    spool: PathBuf,
}

impl RemoteStore {
    /// A store at the other end of `channel`; `address` is what errors call it. Blobs that are read are
    /// first brought here as a whole, into nameless files in the directory `spool`.
    pub fn new(channel: Channel, address: impl ToString, runtime: Handle, spool: &Path) -> Self {
        let blobs = BlobServiceClient::new(channel.clone()).max_decoding_message_size(MAX_BLOB_MESSAGE);
        let directories = DirectoryServiceClient::new(channel)
            .max_decoding_message_size(MAX_DIRECTORY_MESSAGE)
            .max_encoding_message_size(MAX_DIRECTORY_MESSAGE);
        let (address, spool) = (address.to_string(), spool.to_owned());
        Self { inner: Arc::new(Inner { address, blobs, directories, runtime, spool }) }
    }

    /// Both services of it.
    pub fn store(self) -> Store {
        Store { blobs: Arc::new(self.clone()), directories: Arc::new(self) }
    }
}

impl Inner {
    /// Waits for `call`, but not for ever; `None` where the answer is that there is no such thing.
    fn call<T>(
        &self,
        act: &'static str,
        call: impl Future<Output = Result<T, Status>>,
    ) -> Result<Option<T>, StoreError> {
        match self.runtime.block_on(in_time(call)) {
            Ok(answer) => Ok(Some(answer)),
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(self.refusal(act, &status)),
        }
    }

    fn refusal(&self, act: &'static str, status: &Status) -> StoreError {
        let message = format!("{} ({})", status.message(), status.code().description());
        StoreError::Remote { address: self.address.clone(), act, message }
    }

    fn not_found(&self, act: &'static str) -> StoreError {
        let message = "it says that it has no such thing".to_owned();
        StoreError::Remote { address: self.address.clone(), act, message }
    }

    fn spool_error(&self, act: &'static str, source: io::Error) -> StoreError {
        StoreError::io(act, self.spool.display().to_string(), source)
    }
}

async fn in_time<T>(call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    let late = |_| Status::deadline_exceeded(format!("no answer within {} s", DEADLINE.as_secs()));
    tokio::time::timeout(DEADLINE, call).await.map_err(late)?
}

impl BlobService for RemoteStore {
    fn stat(&self, digest: &Digest) -> Result<Option<BlobStat>, StoreError> {
        let mut client = self.inner.blobs.clone();
        let digest = digest.as_bytes().to_vec();
        let request = wire::StatBlobRequest { digest, send_chunks: true, send_bao: false };
        let answer = self.inner.call("look for a blob", client.stat(request))?;
        Ok(answer.map(|answer| BlobStat { size: size_of_chunks(&answer.into_inner().chunks) }))
    }

    /// Brings the blob here and checks it.
    fn open(&self, digest: &Digest) -> Result<Option<Arc<dyn Blob>>, StoreError> {
        const ACT: &str = "read a blob";
        let inner = &self.inner;
        let mut client = inner.blobs.clone();
        let request = wire::ReadBlobRequest { digest: digest.as_bytes().to_vec() };
        let Some(response) = inner.call(ACT, client.read(request))? else { return Ok(None) };
        let mut stream = response.into_inner();
        let file = nameless(&inner.spool).map_err(|source| inner.spool_error("make a file in", source))?;
        let mut hasher = blake3::Hasher::new();
        let mut size: u64 = 0;
        // A server may say only now that there is none.
        while let Some(message) = inner.call(ACT, stream.message())? {
            let Some(chunk) = message else {
                if Digest::from(hasher.finalize()) != *digest {
                    return Err(StoreError::Damaged { kind: "blob", digest: *digest });
                }
                return Ok(Some(Arc::new(FileBlob::new(file, size))));
            };
            hasher.update(&chunk.data);
            file.write_all_at(&chunk.data, size)
                .map_err(|source| inner.spool_error("write a file in", source))?;
            size = size.saturating_add(chunk.data.len() as u64);
        }
        if size == 0 { Ok(None) } else { Err(inner.not_found(ACT)) }
    }

    fn create(&self) -> Result<Box<dyn BlobWriter>, StoreError> {
        let (pieces, incoming) = mpsc::channel(PIECES_AHEAD);
        let mut client = self.inner.blobs.clone();
        let upload = self.inner.runtime.spawn(async move {
            client.put(Upload(incoming)).await.map(|response| response.into_inner().digest)
        });
        Ok(Box::new(RemoteWriter {
            inner: Arc::clone(&self.inner),
            pieces,
            upload: Some(upload),
            hasher: blake3::Hasher::new(),
            buffer: Vec::new(),
            len: 0,
        }))
    }
}

/// The length of a blob that consists of `chunks`. A store need not cut up its blobs, and lists none then.
fn size_of_chunks(chunks: &[wire::stat_blob_response::ChunkMeta]) -> Option<u64> {
    let (first, rest) = chunks.split_first()?;
    rest.iter().try_fold(first.size, |size, chunk| size.checked_add(chunk.size))
}

/// A file without a name, which goes when it is closed.
fn nameless(directory: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_TMPFILE).mode(0o600).open(directory)
}

enum Piece {
    Data(Bytes),
    End,
}

/// The messages of an upload. Its end must be said: a stream that just ended would be a blob to the
/// store, so the pieces of an abandoned writer are followed by nothing, until the call is cancelled.
struct Upload(mpsc::Receiver<Piece>);

impl tokio_stream::Stream for Upload {
    type Item = wire::BlobChunk;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<wire::BlobChunk>> {
        match ready!(self.0.poll_recv(context)) {
            Some(Piece::Data(data)) => Poll::Ready(Some(wire::BlobChunk { data })),
            Some(Piece::End) => Poll::Ready(None),
            None => Poll::Pending,
        }
    }
}

struct RemoteWriter {
    inner: Arc<Inner>,
    pieces: mpsc::Sender<Piece>,
    /// None once it has been waited for.
    upload: Option<JoinHandle<Result<Vec<u8>, Status>>>,
    hasher: blake3::Hasher,
    buffer: Vec<u8>,
    len: u64,
}

impl RemoteWriter {
    const ACT: &str = "store a blob";

    /// What the store answered to the whole call.
    async fn answer(&mut self) -> Result<Vec<u8>, Status> {
        let Some(upload) = &mut self.upload else {
            return Err(Status::aborted("the upload has failed before"));
        };
        let answer = upload.await;
        self.upload = None;
        answer.unwrap_or_else(|_| Err(Status::aborted("the upload was abandoned")))
    }

    fn send(&mut self, piece: Piece) -> Result<(), StoreError> {
        let inner = Arc::clone(&self.inner);
        let sending = async {
            match self.pieces.send(piece).await {
                Ok(()) => Ok(()),
                // The call was over before its stream: its answer says why.
                Err(_) => Err(match self.answer().await {
                    Ok(_) => Status::internal("the store did not wait for the end of the blob"),
                    Err(status) => status,
                }),
            }
        };
        inner.runtime.block_on(in_time(sending)).map_err(|status| inner.refusal(Self::ACT, &status))
    }

    fn send_buffer(&mut self) -> Result<(), StoreError> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let data = std::mem::take(&mut self.buffer).into();
        self.send(Piece::Data(data))
    }
}

impl io::Write for RemoteWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = PIECE.saturating_sub(self.buffer.len());
        let taken = bytes.get(..room).unwrap_or(bytes);
        self.hasher.update(taken);
        self.len += taken.len() as u64;
        self.buffer.extend_from_slice(taken);
        if self.buffer.len() >= PIECE {
            self.send_buffer().map_err(|error| io::Error::new(io::ErrorKind::BrokenPipe, error))?;
        }
        Ok(taken.len())
    }

    /// Does nothing: a part of a blob is of no use to the store.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl BlobWriter for RemoteWriter {
    fn finish(mut self: Box<Self>) -> Result<Stored, StoreError> {
        self.send_buffer()?;
        self.send(Piece::End)?;
        let inner = Arc::clone(&self.inner);
        let answer = inner.runtime.block_on(in_time(self.answer()));
        let answer = answer.map_err(|status| inner.refusal(Self::ACT, &status))?;
        let digest = Digest::from(self.hasher.finalize());
        if answer != digest.as_bytes() {
            let message = format!("what it stored is not {digest}");
            return Err(StoreError::Remote { address: inner.address.clone(), act: Self::ACT, message });
        }
        Ok(Stored { digest, size: self.len, new: true })
    }
}

impl Drop for RemoteWriter {
    fn drop(&mut self) {
        if let Some(upload) = &self.upload {
            upload.abort();
        }
    }
}

impl DirectoryService for RemoteStore {
    fn get(&self, digest: &Digest) -> Result<Option<Arc<Directory>>, StoreError> {
        const ACT: &str = "give a directory";
        let inner = &self.inner;
        let mut client = inner.directories.clone();
        let by_what = wire::get_directory_request::ByWhat::Digest(digest.as_bytes().to_vec());
        let request = wire::GetDirectoryRequest { by_what: Some(by_what), recursive: false };
        let call = async { client.get(request).await?.into_inner().message().await };
        let Some(Some(message)) = inner.call(ACT, call)? else { return Ok(None) };
        let directory = Directory::try_from(message)?;
        if directory.digest() != *digest {
            return Err(StoreError::Damaged { kind: "directory", digest: *digest });
        }
        Ok(Some(Arc::new(directory)))
    }

    /// Stores the trees among `directories` one by one, since a call carries one: all or none holds for
    /// each of them.
    fn put(&self, directories: Vec<Directory>) -> Result<(), StoreError> {
        const ACT: &str = "store directories";
        let directories: Vec<(Digest, Directory)> =
            directories.into_iter().map(|directory| (directory.digest(), directory)).collect();
        // The store checks this as well, but its refusal would be only text.
        check_children(directories.iter().map(|(digest, directory)| (*digest, directory)), |child| {
            Ok(DirectoryService::get(self, child)?.map(|child| child.size()))
        })?;
        for tree in trees(&directories) {
            let messages: Vec<wire::Directory> = tree.into_iter().map(Into::into).collect();
            let mut client = self.inner.directories.clone();
            let stored = self.inner.call(ACT, client.put(tokio_stream::iter(messages)))?;
            stored.ok_or_else(|| self.inner.not_found(ACT))?;
        }
        Ok(())
    }
}

/// Splits a list of directories, children before parents, into trees: each ends with a root and has
/// nothing that this does not reach, and each digest stands in one of them.
fn trees(directories: &[(Digest, Directory)]) -> Vec<Vec<&Directory>> {
    let mut trees = Vec::new();
    let mut taken: HashSet<Digest> = HashSet::new();
    for (last, (root, _)) in directories.iter().enumerate().rev() {
        if taken.contains(root) {
            continue;
        }
        let mut wanted = HashSet::from([*root]);
        let mut tree = Vec::new();
        for (digest, directory) in directories.iter().take(last + 1).rev() {
            if wanted.contains(digest) && taken.insert(*digest) {
                wanted.extend(directory.child_directories().map(|(_, child, _)| child));
                tree.push(directory);
            }
        }
        tree.reverse();
        trees.push(tree);
    }
    // A tree may lack what one found before it has; that one goes first.
    trees
}
