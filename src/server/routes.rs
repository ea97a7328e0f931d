//! Which service a call is for.

use std::collections::HashMap;
use std::convert::Infallible;
use std::future::{Future, ready};
use std::pin::Pin;
use std::task::{Context, Poll};

use tonic::Status;
use tonic::body::Body;
use tonic::codegen::http::{Request, Response};
use tonic::server::NamedService;
use tower::Service;
use tower::util::BoxCloneService;

/// Hands each call to the service that its path names: `/package.Service/Method`.
///
/// For generated services alone: these are always ready, so only this is asked, and it says yes.
#[derive(Clone, Default)]
pub struct Routes {
    services: HashMap<&'static str, BoxCloneService<Request<Body>, Response<Body>, Infallible>>,
}

impl Routes {
    /// No services: every call is unimplemented.
    pub fn new() -> Self {
        Self::default()
    }

    /// These and `service`.
    #[must_use]
    pub fn with<S>(mut self, service: S) -> Self
    where
        S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
        S: NamedService + Clone + Send + 'static,
        S::Future: Send + 'static,
    {
        self.services.insert(S::NAME, BoxCloneService::new(service));
        self
    }
}

impl Service<Request<Body>> for Routes {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let name = request.uri().path().split('/').nth(1).unwrap_or_default();
        match self.services.get_mut(name) {
            Some(service) => service.call(request),
            None => {
                let status =
                    Status::unimplemented(format!("there is no service \"{}\" here", name.escape_debug()));
                Box::pin(ready(Ok(status.into_http())))
            }
        }
    }
}
