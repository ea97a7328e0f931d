//! gRPC to calls and back: nothing is decided here.

pub mod build_service;
pub mod castore_service;
pub mod listen;

use std::future::Future;

use cofferdam_proto::build::build_service_server::SERVICE_NAME as BUILDS;
use cofferdam_proto::castore::blob_service_server::SERVICE_NAME as BLOBS;
use cofferdam_proto::castore::directory_service_server::SERVICE_NAME as DIRECTORIES;
use tokio::sync::watch;
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tonic::service::Routes;
use tonic::transport::Server;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::build::Builder;
use crate::castore::Store;
use listen::Listener;

/// How often a silent client is asked whether it is still there, and how long it may take to answer: a build
/// whose client is gone ends that much later.
const KEEPALIVE: std::time::Duration = std::time::Duration::from_secs(20);

/// What those who ask for health call the daemon as a whole.
const DAEMON: &str = "";

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
        for name in [DAEMON, BUILDS, BLOBS, DIRECTORIES] {
            health.set_service_status(name, ServingStatus::Serving).await;
        }
        if builder.is_none() {
            health.set_service_status(BUILDS, ServingStatus::NotServing).await;
        }
        let mut routes = Routes::builder();
        routes.add_service(build_service::server(builder));
        routes.add_service(castore_service::blob_server(store.clone()));
        routes.add_service(castore_service::directory_server(store));
        routes.add_service(health_service);
        // Many clients know only the older name of the service.
        routes.add_service(reflection().build_v1()?).add_service(reflection().build_v1alpha()?);
        Ok(Self { routes: routes.routes(), health })
    }

    /// Serves on `listener` until `stop` turns true, and then until the streams under way have ended. The file of a
    /// unix socket goes as soon as nobody is let in any more.
    ///
    /// # Errors
    /// Where the listener fails.
    pub fn serve(
        &self,
        listener: Listener,
        mut stop: watch::Receiver<bool>,
    ) -> impl Future<Output = Result<(), tonic::transport::Error>> + Send + use<> {
        let server = Server::builder()
            .http2_keepalive_interval(Some(KEEPALIVE))
            .http2_keepalive_timeout(Some(KEEPALIVE))
            .add_routes(self.routes.clone());
        let stopped = async move {
            // An error means that nobody is left to say stop.
            let _ = stop.wait_for(|stop| *stop).await;
        };
        async move {
            match listener {
                Listener::Unix(listener, file) => {
                    let stopped = async move {
                        stopped.await;
                        drop(file);
                    };
                    server.serve_with_incoming_shutdown(UnixListenerStream::new(listener), stopped).await
                }
                Listener::Tcp(listener) => {
                    server.serve_with_incoming_shutdown(TcpListenerStream::new(listener), stopped).await
                }
            }
        }
    }

    /// Tells whoever asks for health that this daemon takes no more builds. The store goes on for those that run.
    pub async fn stop_serving(&self) {
        for name in [DAEMON, BUILDS] {
            self.health.set_service_status(name, ServingStatus::NotServing).await;
        }
    }
}
