//! A blob on its way to a store elsewhere.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use cofferdam_proto::castore as wire;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tonic::Status;
use tonic::transport::Channel;
use wire::blob_service_client::BlobServiceClient;

use super::Calls;
use crate::castore::{BlobWriter, Digest, StoreError, Stored};

/// What we send of a blob in one message, in bytes.
const PIECE: usize = 256 << 10;

/// Pieces on their way to the store before the writer has to wait.
const PIECES_AHEAD: usize = 4;

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

/// Sends what is written to it. Dropping it before the end leaves nothing in the store.
pub(super) struct RemoteWriter {
    calls: Arc<Calls>,
    pieces: mpsc::Sender<Piece>,
    /// None once it has been waited for.
    upload: Option<JoinHandle<Result<Vec<u8>, Status>>>,
    hasher: blake3::Hasher,
    buffer: Vec<u8>,
    len: u64,
}

impl RemoteWriter {
    const ACT: &str = "store a blob";

    /// Begins the upload.
    pub(super) fn start(calls: Arc<Calls>, mut client: BlobServiceClient<Channel>) -> Self {
        let (pieces, incoming) = mpsc::channel(PIECES_AHEAD);
        let upload = calls.runtime.spawn(async move {
            client.put(Upload(incoming)).await.map(|response| response.into_inner().digest)
        });
        let hasher = blake3::Hasher::new();
        Self { calls, pieces, upload: Some(upload), hasher, buffer: Vec::new(), len: 0 }
    }

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
        let calls = Arc::clone(&self.calls);
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
        let sent = calls.runtime.block_on(calls.patience().wait(sending));
        sent.map_err(|status| calls.refusal(Self::ACT, &status))
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
        let calls = Arc::clone(&self.calls);
        let answer = calls.runtime.block_on(calls.patience().wait(self.answer()));
        let answer = answer.map_err(|status| calls.refusal(Self::ACT, &status))?;
        let digest = Digest::from(self.hasher.finalize());
        if answer != digest.as_bytes() {
            return Err(calls.failure(Self::ACT, format!("what it stored is not {digest}")));
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
