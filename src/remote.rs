//! A worker elsewhere: builds on a daemon, over gRPC.

use std::error::Error;

use cofferdam_proto::build as wire;
use cofferdam_proto::build::build_service_client::BuildServiceClient;
use tonic::Streaming;
use tonic::transport::Channel;

use crate::address::{Address, ConnectError};
use crate::build::events::{Event, EventError};
use crate::build::request::{InvalidRequest, Request};

/// Longest event in bytes: the last one of a build with many outputs and needles is the largest.
const MAX_EVENT_BYTES: usize = 64 << 20;

/// A build on a daemon. Dropping it ends the build.
pub struct RemoteBuild {
    address: Address,
    events: Streaming<wire::BuildEvent>,
}

/// Why a daemon did not carry out a build.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// It is out of reach.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The request can't be sent.
    #[error("the request has no form on the wire: {0}")]
    Request(#[from] InvalidRequest),
    /// It refused, or could not go on.
    #[error("{address} answers {code:?}: {message}")]
    Status {
        /// The daemon.
        address: Address,
        /// Its status code.
        code: tonic::Code,
        /// Its words.
        message: String,
    },
    /// It can't be reached any more.
    #[error("the connection to {address} was lost: {cause}")]
    Lost {
        /// The daemon.
        address: Address,
        /// What the connection says.
        cause: String,
    },
    /// It sent an event that is not valid.
    #[error("{address} sent an invalid event: {source}")]
    Event {
        /// The daemon.
        address: Address,
        /// What is wrong with it.
        source: EventError,
    },
}

impl RemoteBuild {
    /// Asks the daemon at `address` for a build.
    ///
    /// # Errors
    /// Where it can't be reached, or refuses.
    pub async fn start(address: &Address, request: &Request) -> Result<Self, RemoteError> {
        let channel: Channel = address.connect().await?;
        let request = wire::BuildRequest::try_from(request)?;
        let mut client = BuildServiceClient::new(channel).max_decoding_message_size(MAX_EVENT_BYTES);
        let answer = client.do_build(request).await.map_err(|status| refusal(address, &status))?;
        Ok(Self { address: address.clone(), events: answer.into_inner() })
    }

    /// The next event; `None` at the end of the stream.
    ///
    /// # Errors
    /// Where the daemon could not go on, or can't be reached any more.
    ///
    /// # Cancel safety
    /// Nothing is lost by dropping the future.
    pub async fn next(&mut self) -> Option<Result<Event, RemoteError>> {
        let event = match self.events.message().await {
            Ok(event) => event?,
            Err(status) => return Some(Err(refusal(&self.address, &status))),
        };
        let event = Event::try_from(event);
        Some(event.map_err(|source| RemoteError::Event { address: self.address.clone(), source }))
    }
}

/// What ended a call: the daemon's words, or what became of the connection.
fn refusal(address: &Address, status: &tonic::Status) -> RemoteError {
    let address = address.clone();
    // A status that was made on this side, of what went wrong here, has a source.
    let Some(mut cause) = status.source() else {
        return RemoteError::Status { address, code: status.code(), message: status.message().into() };
    };
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    RemoteError::Lost { address, cause: cause.to_string() }
}
