//! gRPC to calls and back: nothing is decided here.

pub mod build_service;
pub mod castore_service;
pub mod listen;

use std::future::Future;
use std::pin::Pin;

use tokio::sync::watch;
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tonic::service::Routes;
use tonic::transport::Server;
use tonic_health::server::HealthReporter;

use crate::build::Builder;
use crate::castore::Store;
use listen::Listener;

/// How often a silent client is asked whether it is still there, and how long it may take to answer: a build
/// whose client is gone ends that much later.
const KEEPALIVE: std::time::Duration = std::time::Duration::from_secs(20);

/// All services of a daemon.
pub struct Services {
    routes: Routes,
    health: HealthReporter,
}

/// Why the services can't be put together.
#[derive(Debug, thiserror::Error)]
#[error("can't offer reflection: {0}")]
pub struct ServicesError(#[from] tonic_reflection::server::Error);

impl Services {
    /// The services over `store` and `builder`; without a builder, builds are refused.
    ///
    /// # Errors
    /// Where the description of the services can't be read.
    pub async fn new(store: Store, builder: Option<Builder>) -> Result<Self, ServicesError> {
        let (health, health_service) = tonic_health::server::health_reporter();
        let reflection = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(cofferdam_proto::DESCRIPTORS)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        let builds = build_service::server(builder);
        let blobs = castore_service::blob_server(store.clone());
        let directories = castore_service::directory_server(store);
        health.set_service_status("", tonic_health::ServingStatus::Serving).await;
        set_serving(&health, &builds).await;
        set_serving(&health, &blobs).await;
        set_serving(&health, &directories).await;
        let mut routes = Routes::builder();
        routes.add_service(builds).add_service(blobs).add_service(directories);
        routes.add_service(health_service);
        // Many clients know only the older name of the service.
        routes.add_service(reflection().build_v1()?).add_service(reflection().build_v1alpha()?);
        Ok(Self { routes: routes.routes(), health })
    }

    /// Serves on `listener` until `stop` turns true, and then until the streams under way have ended.
    ///
    /// # Errors
    /// Where the listener fails.
    pub fn serve(
        &self,
        listener: Listener,
        mut stop: watch::Receiver<bool>,
    ) -> Pin<Box<dyn Future<Output = Result<(), tonic::transport::Error>> + Send>> {
        let server = Server::builder()
            .http2_keepalive_interval(Some(KEEPALIVE))
            .http2_keepalive_timeout(Some(KEEPALIVE))
            .add_routes(self.routes.clone());
        let stopped = async move {
            // An error means that nobody is left to say stop.
            let _ = stop.wait_for(|stop| *stop).await;
        };
        match listener {
            Listener::Unix(listener, file) => Box::pin(async move {
                let served =
                    server.serve_with_incoming_shutdown(UnixListenerStream::new(listener), stopped).await;
                drop(file);
                served
            }),
            Listener::Tcp(listener) => {
                Box::pin(server.serve_with_incoming_shutdown(TcpListenerStream::new(listener), stopped))
            }
        }
    }

    /// Tells whoever asks for health that this daemon takes no more work.
    pub async fn stop_serving(&self) {
        let services = ["", service_name(&build_service::server(None))];
        for name in services {
            self.health.set_service_status(name, tonic_health::ServingStatus::NotServing).await;
        }
    }
}

async fn set_serving<S: tonic::server::NamedService>(health: &HealthReporter, _: &S) {
    health.set_serving::<S>().await;
}

fn service_name<S: tonic::server::NamedService>(_: &S) -> &'static str {
    S::NAME
}
