//! A store behind gRPC: a client of `snix.castore.v1`.
//!
//! Every call has a deadline: a store that is silent, or brings next to nothing, for so long has failed. Calls that change
//! nothing there are made again until then where the store is out of reach, so that it may be started later, and anew.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use cofferdam_proto::castore as wire;
use tokio::runtime::Handle;
use tonic::transport::Channel;
use wire::blob_service_client::BlobServiceClient;
use wire::directory_service_client::DirectoryServiceClient;

use super::Store;
use crate::config::STORE_DEADLINE_SECONDS;
use calls::Calls;

mod blobs;
mod calls;
mod directories;
#[cfg(test)]
pub(super) mod faulty;
#[cfg(test)]
mod tests;
mod upload;

pub use calls::Retry;

/// Largest message that carries a piece of a blob, in bytes. We send smaller ones.
pub const MAX_BLOB_MESSAGE: usize = 16 << 20;

/// Largest directory message in bytes: some hundred thousand entries.
pub const MAX_DIRECTORY_MESSAGE: usize = 64 << 20;

/// How many blobs are looked for at the same time.
const STATS_AT_ONCE: usize = 64;

/// A store elsewhere.
///
/// Its calls block the calling thread while `runtime` works, so they must not be made from async code:
/// tokio panics there. The runtime must have a thread of its own.
#[derive(Clone)]
pub struct RemoteStore {
    calls: Arc<Calls>,
    blobs: BlobServiceClient<Channel>,
    directories: DirectoryServiceClient<Channel>,
    spool: Arc<Path>,
}

impl RemoteStore {
    /// A store at the other end of `channel`; `address` is what errors call it. Blobs that are opened are
    /// first brought here as a whole, into nameless files in the directory `spool`.
    ///
    /// It may keep us waiting for [`STORE_DEADLINE_SECONDS`], and is not asked again where it is out of reach.
    pub fn new(channel: Channel, address: impl ToString, runtime: Handle, spool: &Path) -> Self {
        let deadline = Duration::from_secs(STORE_DEADLINE_SECONDS);
        Self::with_deadline(channel, address, runtime, spool, deadline, Retry::Never)
    }

    /// [`RemoteStore::new`] with another deadline, and a choice whether to ask again.
    pub fn with_deadline(
        channel: Channel,
        address: impl ToString,
        runtime: Handle,
        spool: &Path,
        deadline: Duration,
        retry: Retry,
    ) -> Self {
        let blobs = BlobServiceClient::new(channel.clone()).max_decoding_message_size(MAX_BLOB_MESSAGE);
        let directories = DirectoryServiceClient::new(channel)
            .max_decoding_message_size(MAX_DIRECTORY_MESSAGE)
            .max_encoding_message_size(MAX_DIRECTORY_MESSAGE);
        let calls = Arc::new(Calls { address: address.to_string(), runtime, deadline, retry });
        Self { calls, blobs, directories, spool: spool.into() }
    }

    /// Both services of it.
    pub fn store(self) -> Store {
        Store { blobs: Arc::new(self.clone()), directories: Arc::new(self) }
    }
}
