//! `snix.build.v1.BuildService`: requests to builds, events and faults back to the wire.

use std::pin::Pin;
use std::task::{Context, Poll};

use cofferdam_proto::build as wire;
use cofferdam_proto::build::build_service_server::{BuildService, BuildServiceServer};
use tokio_stream::Stream;
use tonic::metadata::MetadataValue;
use tonic::{Code, Request, Response, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::build::error::{Fault, FaultKind, Unsupported};
use crate::build::{Build, Builder, request};
use crate::isolation;

/// Longest request in bytes: what its additional files may hold, and room for all the rest.
pub const MAX_REQUEST_BYTES: usize = request::limits::ADDITIONAL_BYTES + (28 << 20);

/// Carries out builds for clients elsewhere.
pub struct Builds {
    builder: Option<Builder>,
}

/// The service; without a builder it refuses every build.
pub fn server(builder: Option<Builder>) -> BuildServiceServer<Builds> {
    BuildServiceServer::new(Builds { builder }).max_decoding_message_size(MAX_REQUEST_BYTES)
}

#[tonic::async_trait]
impl BuildService for Builds {
    type DoBuildStream = Events;

    async fn do_build(&self, request: Request<wire::BuildRequest>) -> Result<Response<Events>, Status> {
        let start = async {
            let builder = self.builder.as_ref().ok_or_else(|| Unsupported::BuildsDisabled {
                reason: "it was started with --no-builds".into(),
            })?;
            let request = request::Request::try_from(request.into_inner())?;
            builder.start(request).await
        };
        let build = start.await.map_err(|fault: Fault| status(&fault))?;
        let strength = MetadataValue::try_from(build.strength.to_string());
        let mut response = Response::new(Events { build });
        // It is made of words and digits.
        if let Ok(strength) = strength {
            response.metadata_mut().insert(isolation::METADATA, strength);
        }
        Ok(response)
    }
}

/// The events of a build as its client gets them. Dropping it ends the build.
pub struct Events {
    build: Build,
}

impl Stream for Events {
    type Item = Result<wire::BuildEvent, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.build
            .poll_next(context)
            .map(|next| next.map(|item| item.map(wire::BuildEvent::from).map_err(|fault| status(&fault))))
    }
}

/// A fault on its channel.
fn status(fault: &Fault) -> Status {
    let text = fault.to_string();
    match fault.kind() {
        FaultKind::InvalidRequest => Status::invalid_argument(text),
        FaultKind::Precondition => Status::failed_precondition(text),
        FaultKind::Busy(retry_after) => {
            let details = ErrorDetails::with_retry_info(Some(retry_after));
            Status::with_error_details(Code::ResourceExhausted, text, details)
        }
        FaultKind::Unavailable => Status::unavailable(text),
        FaultKind::Internal => Status::internal(text),
        FaultKind::Cancelled => Status::cancelled(text),
    }
}
