//! The blob service of a store elsewhere.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use cofferdam_proto::castore as wire;
use tokio::task::JoinSet;
use tonic::{Code, Status, Streaming};

use super::calls::{Patience, blob, found, repeat};
use super::upload::RemoteWriter;
use super::{RemoteStore, STATS_AT_ONCE};
use crate::castore::file_blob::FileBlob;
use crate::castore::incoming::Incoming;
use crate::castore::{Blob, BlobService, BlobStat, BlobWriter, Digest, StoreError};

impl BlobService for RemoteStore {
    fn stat(&self, digest: &Digest) -> Result<Option<BlobStat>, StoreError> {
        let answer = self.calls.repeated(|| blob("look for", digest), || self.stat_once(*digest))?;
        Ok(answer)
    }

    fn stat_all(&self, digests: &[Digest]) -> Result<Vec<Option<BlobStat>>, StoreError> {
        let mut stats = vec![None; digests.len()];
        let mut next = digests.iter().copied().enumerate();
        let mut asked = JoinSet::new();
        let ask = |asked: &mut JoinSet<_>, (position, digest): (usize, Digest)| {
            let (store, patience) = (self.clone(), self.calls.patience());
            let call = async move { (position, digest, repeat(patience, || store.stat_once(digest)).await) };
            asked.spawn_on(call, &self.calls.runtime);
        };
        for place in next.by_ref().take(STATS_AT_ONCE) {
            ask(&mut asked, place);
        }
        while let Some(answer) = self.calls.runtime.block_on(asked.join_next()) {
            let Ok((position, digest, answer)) = answer else {
                return Err(self.calls.failure("look for blobs", "the call was abandoned"));
            };
            let stat = found(answer).map_err(|status| self.calls.refusal(blob("look for", &digest), &status));
            if let Some(place) = stats.get_mut(position) {
                *place = stat?;
            }
            if let Some(place) = next.next() {
                ask(&mut asked, place);
            }
        }
        Ok(stats)
    }

    /// Brings the blob here and checks it.
    fn open(&self, digest: &Digest) -> Result<Option<Arc<dyn Blob>>, StoreError> {
        self.bring(digest, None)
    }

    fn open_sized(&self, digest: &Digest, size: u64) -> Result<Option<Arc<dyn Blob>>, StoreError> {
        self.bring(digest, Some(size))
    }

    /// Where the connection is lost on the way, the store is asked again, and what came before is passed over.
    fn copy(&self, digest: &Digest, to: &mut dyn Write) -> Result<bool, StoreError> {
        let mut download = Download { to, taken: 0, patience: self.calls.patience() };
        loop {
            let failure = match self.calls.runtime.block_on(download.patience.wait(self.read(*digest))) {
                Err(status) if status.code() == Code::NotFound && download.taken == 0 => return Ok(false),
                Err(status) => status,
                Ok(stream) => match download.take(stream, &self.calls.runtime) {
                    Ok(()) => return Ok(true),
                    // A server may say only now that there is none.
                    Err(Broken::Store(status)) if status.code() == Code::NotFound && download.taken == 0 => {
                        return Ok(false);
                    }
                    Err(Broken::Store(status)) => status,
                    Err(Broken::Taker(source)) => {
                        return Err(StoreError::io("write", format!("the blob {digest}"), source));
                    }
                },
            };
            let pause = self.calls.runtime.block_on(download.patience.pause(failure));
            pause.map_err(|status| self.calls.refusal(blob("read", digest), &status))?;
        }
    }

    fn create(&self) -> Result<Box<dyn BlobWriter>, StoreError> {
        Ok(Box::new(RemoteWriter::start(Arc::clone(&self.calls), self.blobs.clone())))
    }
}

impl RemoteStore {
    fn stat_once(&self, digest: Digest) -> impl Future<Output = Result<BlobStat, Status>> + Send + use<> {
        let mut client = self.blobs.clone();
        let digest = digest.as_bytes().to_vec();
        let request = wire::StatBlobRequest { digest, send_chunks: true, send_bao: false };
        async move {
            let answer = client.stat(request).await?;
            Ok(BlobStat { size: size_of_chunks(&answer.into_inner().chunks) })
        }
    }

    async fn read(&self, digest: Digest) -> Result<Streaming<wire::BlobChunk>, Status> {
        let request = wire::ReadBlobRequest { digest: digest.as_bytes().to_vec() };
        Ok(self.blobs.clone().read(request).await?.into_inner())
    }

    fn bring(&self, digest: &Digest, size: Option<u64>) -> Result<Option<Arc<dyn Blob>>, StoreError> {
        let spool = &*self.spool;
        let file = nameless(spool);
        let file =
            file.map_err(|error| StoreError::io("make a file in", spool.display().to_string(), error))?;
        let mut incoming = Incoming::new(file, *digest, size);
        let copied = self.copy(digest, &mut incoming);
        if copied.is_err() && incoming.overrun().is_none() || matches!(copied, Ok(false)) {
            return copied.map(|_| None);
        }
        let size = incoming.len();
        let file = incoming.checked(&self.calls.address)?;
        Ok(Some(Arc::new(FileBlob::new(file, size))))
    }
}

/// A blob on its way here, over as many calls as it takes.
struct Download<'a> {
    to: &'a mut dyn Write,
    /// What `to` has got of it, in bytes.
    taken: u64,
    patience: Patience,
}

/// Why a call did not bring the rest of a blob.
enum Broken {
    Store(Status),
    Taker(io::Error),
}

impl Download<'_> {
    /// Passes on what a call brings beyond what calls before it have brought.
    fn take(
        &mut self,
        mut stream: Streaming<wire::BlobChunk>,
        runtime: &tokio::runtime::Handle,
    ) -> Result<(), Broken> {
        let mut known = self.taken;
        loop {
            let message = runtime.block_on(self.patience.wait(stream.message())).map_err(Broken::Store)?;
            let Some(wire::BlobChunk { data }) = message else {
                return match known {
                    0 => Ok(()),
                    _ => Err(Broken::Store(Status::data_loss("it gave more of the blob the last time"))),
                };
            };
            let old = usize::try_from(known).map_or(data.len(), |known| known.min(data.len()));
            known -= old as u64;
            let new = data.get(old..).unwrap_or_default();
            self.to.write_all(new).map_err(Broken::Taker)?;
            self.taken = self.taken.saturating_add(new.len() as u64);
            self.patience.progress(new.len());
        }
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
