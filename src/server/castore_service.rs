//! `snix.castore.v1` over any store.
//!
//! The store's calls block, so each is made on a thread for such calls, and none of these threads waits
//! for a client.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use bytes::Bytes;
use cofferdam_proto::castore as wire;
use prost::Message;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use wire::blob_service_server::{BlobService, BlobServiceServer};
use wire::directory_service_server::{DirectoryService, DirectoryServiceServer};
use wire::get_directory_request::ByWhat;

use crate::castore::remote::{MAX_BLOB_MESSAGE, MAX_DIRECTORY_MESSAGE};
use crate::castore::{Blob, BlobWriter, Digest, Directory, Store, StoreError};

/// What is sent of a blob in one message, in bytes.
const READ_PIECE: u64 = 256 << 10;

/// What is collected of a blob before it is given to the store, in bytes, and in messages.
const WRITE_BATCH: usize = 256 << 10;
const WRITE_BATCH_MESSAGES: usize = 64;

/// Messages that are ready before the client takes them.
const MESSAGES_AHEAD: usize = 2;

/// Directories that are read at a time for a client that asked for a tree.
const GET_BATCH: usize = 64;

/// What one `Directory.Put` may hold: the store gets all of it at once.
const MAX_PUT_BYTES: usize = 512 << 20;
const MAX_PUT_DIRECTORIES: usize = 1 << 20;

/// The blob service of `store`.
pub fn blob_server(store: Store) -> BlobServiceServer<Blobs> {
    BlobServiceServer::new(Blobs { store }).max_decoding_message_size(MAX_BLOB_MESSAGE)
}

/// The directory service of `store`.
pub fn directory_server(store: Store) -> DirectoryServiceServer<Directories> {
    DirectoryServiceServer::new(Directories { store })
        .max_decoding_message_size(MAX_DIRECTORY_MESSAGE)
        .max_encoding_message_size(MAX_DIRECTORY_MESSAGE)
}

/// `snix.castore.v1.BlobService`.
pub struct Blobs {
    store: Store,
}

#[tonic::async_trait]
impl BlobService for Blobs {
    type ReadStream = ReceiverStream<Result<wire::BlobChunk, Status>>;

    async fn stat(
        &self,
        request: Request<wire::StatBlobRequest>,
    ) -> Result<Response<wire::StatBlobResponse>, Status> {
        let digest = digest_field("digest", &request.get_ref().digest)?;
        let blobs = Arc::clone(&self.store.blobs);
        if blocking(move || blobs.stat(&digest)).await?.is_some() {
            // No chunks and no outboard: the blob is read whole.
            Ok(Response::new(wire::StatBlobResponse::default()))
        } else {
            Err(no_such("blob", &digest))
        }
    }

    async fn read(
        &self,
        request: Request<wire::ReadBlobRequest>,
    ) -> Result<Response<Self::ReadStream>, Status> {
        let digest = digest_field("digest", &request.get_ref().digest)?;
        let blobs = Arc::clone(&self.store.blobs);
        let blob = blocking(move || blobs.open(&digest)).await?.ok_or_else(|| no_such("blob", &digest))?;
        let (sender, receiver) = mpsc::channel(MESSAGES_AHEAD);
        tokio::spawn(async move {
            if let Err(status) = send_blob(digest, blob, &sender).await {
                let _ = sender.send(Err(status)).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn put(
        &self,
        request: Request<Streaming<wire::BlobChunk>>,
    ) -> Result<Response<wire::PutBlobResponse>, Status> {
        let mut stream = request.into_inner();
        let blobs = Arc::clone(&self.store.blobs);
        // Dropped without `finish` wherever this returns early or is dropped itself.
        let mut writer = blocking(move || blobs.create()).await?;
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while let Some(chunk) = stream.message().await? {
            bytes += chunk.data.len();
            batch.push(chunk.data);
            if bytes >= WRITE_BATCH || batch.len() >= WRITE_BATCH_MESSAGES {
                writer = write(writer, std::mem::take(&mut batch)).await?;
                bytes = 0;
            }
        }
        not_cancelled().await;
        writer = write(writer, batch).await?;
        let blobs = Arc::clone(&self.store.blobs);
        let stored = blocking(move || {
            let stored = writer.finish()?;
            blobs.keep(&stored.digest)?;
            Ok(stored)
        });
        let stored = stored.await?;
        Ok(Response::new(wire::PutBlobResponse { digest: stored.digest.as_bytes().to_vec() }))
    }
}

/// Sends a blob piece by piece, until it ends or the client is gone.
async fn send_blob(
    digest: Digest,
    blob: Arc<dyn Blob>,
    sender: &mpsc::Sender<Result<wire::BlobChunk, Status>>,
) -> Result<(), Status> {
    let size = blob.size();
    let mut offset = 0;
    while offset < size {
        let blob = Arc::clone(&blob);
        let wanted = (size - offset).min(READ_PIECE);
        let data = blocking(move || {
            let mut buffer = vec![0; usize::try_from(wanted).unwrap_or(0)];
            let read = blob.read_at(&mut buffer, offset);
            let read = read.map_err(|source| StoreError::io("read the blob", digest.to_hex(), source))?;
            buffer.truncate(read);
            Ok(buffer)
        })
        .await?;
        if data.is_empty() {
            return Err(Status::internal(format!("the blob {digest} ends at byte {offset} of {size}")));
        }
        offset += data.len() as u64;
        if sender.send(Ok(wire::BlobChunk { data: data.into() })).await.is_err() {
            break;
        }
    }
    Ok(())
}

async fn write(mut writer: Box<dyn BlobWriter>, batch: Vec<Bytes>) -> Result<Box<dyn BlobWriter>, Status> {
    blocking(move || {
        for data in batch {
            writer.write_all(&data).map_err(|source| StoreError::io("write", "a new blob", source))?;
        }
        Ok(writer)
    })
    .await
}

/// `snix.castore.v1.DirectoryService`.
pub struct Directories {
    store: Store,
}

#[tonic::async_trait]
impl DirectoryService for Directories {
    type GetStream = ReceiverStream<Result<wire::Directory, Status>>;

    async fn get(
        &self,
        request: Request<wire::GetDirectoryRequest>,
    ) -> Result<Response<Self::GetStream>, Status> {
        let request = request.into_inner();
        let Some(ByWhat::Digest(digest)) = request.by_what else {
            return Err(Status::invalid_argument("by_what: it is not said which directory is wanted"));
        };
        let digest = digest_field("by_what.digest", &digest)?;
        let (sender, receiver) = mpsc::channel(MESSAGES_AHEAD);
        let directories = Arc::clone(&self.store.directories);
        let found = blocking(move || directories.get(&digest)).await?;
        let found = found.ok_or_else(|| no_such("directory", &digest))?;
        let store = self.store.clone();
        tokio::spawn(async move {
            let sent = if request.recursive {
                send_tree(store, digest, &sender).await
            } else {
                let _ = sender.send(Ok(wire::Directory::from(&*found))).await;
                Ok(())
            };
            if let Err(status) = sent {
                let _ = sender.send(Err(status)).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn put(
        &self,
        request: Request<Streaming<wire::Directory>>,
    ) -> Result<Response<wire::PutDirectoryResponse>, Status> {
        let mut stream = request.into_inner();
        let mut messages = Vec::new();
        let mut bytes: usize = 0;
        while let Some(message) = stream.message().await? {
            bytes = bytes.saturating_add(message.encoded_len());
            if bytes > MAX_PUT_BYTES || messages.len() >= MAX_PUT_DIRECTORIES {
                return Err(Status::resource_exhausted(format!(
                    "one call stores at most {MAX_PUT_DIRECTORIES} directories of {MAX_PUT_BYTES} bytes in total"
                )));
            }
            messages.push(message);
        }
        not_cancelled().await;
        let directories = Arc::clone(&self.store.directories);
        let stored = tokio::task::spawn_blocking(move || {
            let tree = check_tree(messages)?;
            directories.put(tree.directories).map_err(|error| match &error {
                StoreError::MissingChild { parent, .. } | StoreError::ChildSize { parent, .. } => {
                    let ordinal = tree.ordinals.get(parent).copied().unwrap_or_default();
                    Status::invalid_argument(format!("message {ordinal}: {error}"))
                }
                _ => status(&error),
            })?;
            Ok(tree.root)
        });
        let root = stored.await.unwrap_or_else(|error| Err(died(&error)))?;
        Ok(Response::new(wire::PutDirectoryResponse { root_digest: root.as_bytes().to_vec() }))
    }
}

/// Sends a tree: parents before children, each digest once.
async fn send_tree(
    store: Store,
    root: Digest,
    sender: &mpsc::Sender<Result<wire::Directory, Status>>,
) -> Result<(), Status> {
    let order = {
        let (store, sender) = (store.clone(), sender.clone());
        blocking(move || parents_first(&store, root, || sender.is_closed())).await?
    };
    for batch in order.chunks(GET_BATCH) {
        let (batch, directories) = (batch.to_vec(), Arc::clone(&store.directories));
        let messages = blocking(move || {
            let get = |digest: &Digest| {
                let directory = directories.get(digest)?;
                Ok(directory.map(|directory| wire::Directory::from(&*directory)).ok_or(*digest))
            };
            batch.iter().map(get).collect::<Result<Vec<_>, StoreError>>()
        })
        .await?;
        for message in messages {
            let message = message.map_err(|digest| incomplete(&digest))?;
            if sender.send(Ok(message)).await.is_err() {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// The digests of a tree, each once and after all directories that refer to it. Ends early, and with
/// less, where `given_up` says so.
///
/// Walks the tree in depth and turns the order in which it leaves the directories around. Only digests
/// are kept: a tree may be larger than memory.
fn parents_first(
    store: &Store,
    root: Digest,
    given_up: impl Fn() -> bool,
) -> Result<Vec<Digest>, StoreError> {
    let children = |digest: &Digest| -> Result<Vec<Digest>, StoreError> {
        // One that is missing is found out, and said, when it is to be sent.
        let directory = store.directories.get(digest)?;
        Ok(directory.iter().flat_map(|d| d.child_directories()).map(|(_, child, _)| child).collect())
    };
    let mut seen = HashSet::from([root]);
    let mut order = Vec::new();
    let mut path = vec![(root, children(&root)?)];
    while let Some((digest, below)) = path.last_mut() {
        match below.pop() {
            Some(child) if seen.insert(child) => {
                if given_up() {
                    return Ok(Vec::new());
                }
                path.push((child, children(&child)?));
            }
            Some(_) => {}
            None => {
                order.push(*digest);
                path.pop();
            }
        }
    }
    order.reverse();
    Ok(order)
}

/// An uploaded tree whose messages are valid and hang together.
#[derive(Debug)]
struct Tree {
    directories: Vec<Directory>,
    /// Which message brought a directory first, from 0.
    ordinals: HashMap<Digest, usize>,
    root: Digest,
}

/// Checks all that can be checked of an upload without the store: each message, and that the last one
/// reaches them all, with children before parents. A directory may come twice: clients that don't keep
/// track send it for each of its places.
fn check_tree(messages: Vec<wire::Directory>) -> Result<Tree, Status> {
    let refuse = |ordinal: usize, fault: &dyn std::fmt::Display| {
        Status::invalid_argument(format!("message {ordinal}: {fault}"))
    };
    let mut directories = Vec::new();
    let mut ordinals = HashMap::new();
    let mut last = None;
    for (ordinal, message) in messages.into_iter().enumerate() {
        let directory = Directory::try_from(message).map_err(|error| refuse(ordinal, &error))?;
        let digest = directory.digest();
        last = Some(digest);
        if let std::collections::hash_map::Entry::Vacant(entry) = ordinals.entry(digest) {
            entry.insert(ordinal);
            directories.push((ordinal, digest, directory));
        }
    }
    let root = last.ok_or_else(|| Status::invalid_argument("the stream has no directory"))?;
    let mut reached = HashSet::from([root]);
    for (ordinal, digest, directory) in directories.iter().rev() {
        if !reached.contains(digest) {
            return Err(refuse(
                *ordinal,
                &"no later directory that the root reaches has this one as a child",
            ));
        }
        reached.extend(directory.child_directories().map(|(_, child, _)| child));
    }
    let directories = directories.into_iter().map(|(_, _, directory)| directory).collect();
    Ok(Tree { directories, ordinals, root })
}

/// Returns only where the client has really sent all it had.
///
/// tonic shows a stream that was cancelled as one that has ended. The transport knows better: it drops a
/// cancelled call as soon as that has to wait. So this waits once, before anything is stored.
async fn not_cancelled() {
    tokio::task::yield_now().await;
}

/// Makes a call of the store where blocking is allowed.
async fn blocking<T: Send + 'static>(
    call: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, Status> {
    match tokio::task::spawn_blocking(call).await {
        Ok(answer) => answer.map_err(|error| status(&error)),
        Err(error) => Err(died(&error)),
    }
}

fn digest_field(field: &str, bytes: &[u8]) -> Result<Digest, Status> {
    Digest::try_from(bytes).map_err(|error| Status::invalid_argument(format!("{field}: {error}")))
}

fn no_such(kind: &str, digest: &Digest) -> Status {
    Status::not_found(format!("the {kind} {digest} is not in the store"))
}

fn incomplete(digest: &Digest) -> Status {
    Status::internal(format!("the tree is not complete: the directory {digest} is not in the store"))
}

fn died(error: &tokio::task::JoinError) -> Status {
    Status::internal(format!("a call of the store did not end: {error}"))
}

/// What a client is told of a store's error. `UNAVAILABLE` is what may be better another time.
fn status(error: &StoreError) -> Status {
    let text = error.to_string();
    match error {
        StoreError::MissingChild { .. } | StoreError::ChildSize { .. } => Status::invalid_argument(text),
        StoreError::Io { .. }
        | StoreError::Database { .. }
        | StoreError::InUse { .. }
        | StoreError::Unsynced { .. }
        | StoreError::Remote { .. }
        | StoreError::Wrong { .. } => Status::unavailable(text),
        StoreError::TooLarge { .. } => Status::resource_exhausted(text),
        StoreError::DamagedIndex { .. }
        | StoreError::Damaged { .. }
        | StoreError::Invalid(_)
        | StoreError::NotAStore { .. }
        | StoreError::Writable { .. }
        | StoreError::Abandoned => Status::internal(text),
        StoreError::Shared(error) => status(error),
    }
}

#[cfg(test)]
mod tests;
