//! Where a daemon listens or a store answers: a unix socket, or a host and port.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::{TcpStream, UnixStream};
use tonic::codegen::http::Uri;
use tonic::transport::{Channel, ClientTlsConfig, Endpoint};
use tower::Service;

/// Longest path of a unix socket in bytes: `sun_path` of Linux without its NUL.
const MAX_SOCKET_PATH: usize = 107;

/// How long a connection may take to come about.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How often a silent peer over TCP is asked whether it is still there, and how long it may take to say so.
const KEEP_ALIVE: Duration = Duration::from_secs(20);

/// An address of gRPC without TLS.
///
/// Written `unix:PATH`, `HOST:PORT`, `grpc+unix:PATH` or `grpc+http://HOST:PORT`; a host that is an IPv6
/// address stands in brackets.
///
/// ```
/// use cofferdam::address::Address;
///
/// let address: Address = "grpc+http://localhost:8000".parse()?;
/// assert_eq!(address.to_string(), "localhost:8000");
/// # Ok::<(), cofferdam::address::AddressError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// A unix socket.
    Unix(PathBuf),
    /// A TCP port.
    Tcp {
        /// A name, an IPv4 address, or an IPv6 address in brackets.
        host: String,
        /// The port.
        port: u16,
    },
}

impl Address {
    /// Connects.
    ///
    /// # Errors
    /// [`ConnectError`] with the system's reason.
    ///
    /// # Cancel safety
    /// Dropping the future abandons the attempt.
    pub async fn connect(&self) -> Result<Channel, ConnectError> {
        let connecting = async {
            match self {
                Self::Unix(path) => connect_unix(path).await,
                Self::Tcp { host, port } => connect_tcp(host, *port).await,
            }
        };
        connecting.await.map_err(|source| ConnectError { address: self.clone(), source })
    }

    /// A channel that connects when it is first used, and anew whenever the connection was lost. Until then, and where
    /// that fails, its calls fail with `UNAVAILABLE`.
    ///
    /// Call this on the executor. Over a unix socket there is no TLS.
    ///
    /// # Errors
    /// [`ConnectError`] where TLS can't be had: there are no root certificates on this system.
    pub fn connect_lazily(&self, security: Security) -> Result<Channel, ConnectError> {
        let channel = match self {
            Self::Unix(path) => Ok(unix_endpoint().connect_with_connector_lazy(unix_connector(path))),
            Self::Tcp { host, port } => tcp_endpoint(host, *port, security)
                .map(|endpoint| endpoint.connect_with_connector_lazy(tcp_connector(host, *port))),
        };
        channel.map_err(|source| ConnectError { address: self.clone(), source })
    }
}

/// Whether a connection over TCP is encrypted, and the other side made to prove its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Security {
    /// Neither.
    Plain,
    /// Both, by TLS with the root certificates of this system.
    Tls,
}

async fn connect_tcp(host: &str, port: u16) -> Result<Channel, tonic::transport::Error> {
    tcp_endpoint(host, port, Security::Plain)?.connect_with_connector(tcp_connector(host, port)).await
}

fn tcp_endpoint(host: &str, port: u16, security: Security) -> Result<Endpoint, tonic::transport::Error> {
    let endpoint = match security {
        Security::Plain => Endpoint::from_shared(format!("http://{host}:{port}"))?,
        Security::Tls => Endpoint::from_shared(format!("https://{host}:{port}"))?
            .tls_config(ClientTlsConfig::new().with_native_roots())?,
    };
    let endpoint = endpoint.http2_keep_alive_interval(KEEP_ALIVE).keep_alive_timeout(KEEP_ALIVE);
    Ok(endpoint.connect_timeout(CONNECT_TIMEOUT))
}

fn tcp_connector(
    host: &str,
    port: u16,
) -> impl Service<Uri, Response = TokioIo<TcpStream>, Error = io::Error, Future: Send> + Send + 'static {
    let host = host.to_owned();
    tower::service_fn(move |_| {
        let host = host.clone();
        async move {
            let stream = TcpStream::connect(resolve(&host, port).await?.as_slice()).await?;
            stream.set_nodelay(true)?;
            Ok(TokioIo::new(stream))
        }
    })
}

/// The addresses of a host: a name, an IPv4 address, or an IPv6 address that may stand in brackets.
///
/// Names are asked of `getent(1)`, not of the C library: in a static program it loads, of whatever version the host has,
/// what `/etc/nsswitch.conf` names, and may well crash there.
///
/// # Errors
/// Where the name is unknown, or there is no `getent`.
pub async fn resolve(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    if let Ok(address) = bare.parse::<IpAddr>() {
        return Ok(vec![(address, port).into()]);
    }
    if bare.eq_ignore_ascii_case("localhost") {
        return Ok(vec![(Ipv4Addr::LOCALHOST, port).into(), (Ipv6Addr::LOCALHOST, port).into()]);
    }
    let name = bare.to_owned();
    let ask = move || std::process::Command::new("getent").args(["ahosts", "--", &name]).output();
    let said = tokio::task::spawn_blocking(ask).await.map_err(io::Error::from)??;
    let said = String::from_utf8_lossy(&said.stdout);
    let mut found: Vec<SocketAddr> = Vec::new();
    for address in said.lines().filter_map(|line| line.split_whitespace().next()?.parse::<IpAddr>().ok()) {
        let address = (address, port).into();
        if !found.contains(&address) {
            found.push(address);
        }
    }
    match found.is_empty() {
        true => Err(io::Error::new(io::ErrorKind::AddrNotAvailable, format!("the host {bare} is unknown"))),
        false => Ok(found),
    }
}

async fn connect_unix(path: &Path) -> Result<Channel, tonic::transport::Error> {
    unix_endpoint().connect_with_connector(unix_connector(path)).await
}

fn unix_endpoint() -> Endpoint {
    // The URI is what the server is told it is called; the connector decides where it is.
    Endpoint::from_static("http://localhost").connect_timeout(CONNECT_TIMEOUT)
}

fn unix_connector(
    path: &Path,
) -> impl Service<Uri, Response = TokioIo<UnixStream>, Error = io::Error, Future: Send> + Send + 'static {
    let path = path.to_owned();
    tower::service_fn(move |_| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    })
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let refuse = |fault| AddressError { text: text.to_owned(), fault };
        if let Some(path) = text.strip_prefix("grpc+unix:").or_else(|| text.strip_prefix("unix:")) {
            // `unix:///run/x` is another way to write `unix:/run/x`.
            let path = if path.starts_with("///") { path.strip_prefix("//").unwrap_or(path) } else { path };
            return match path {
                "" => Err(refuse("the path of the socket is missing")),
                _ if path.len() > MAX_SOCKET_PATH => Err(refuse("a socket's path has at most 107 bytes")),
                _ if path.contains('\0') => Err(refuse("the path contains a NUL byte")),
                _ => Ok(Self::Unix(PathBuf::from(path))),
            };
        }
        let rest = match text.strip_prefix("grpc+http://") {
            Some(rest) => rest.strip_suffix('/').unwrap_or(rest),
            None if text.contains("://") => {
                return Err(refuse("the scheme is unknown; there are grpc+http: and grpc+unix:"));
            }
            None => text,
        };
        let (host, port) = rest.rsplit_once(':').ok_or_else(|| refuse("the port is missing"))?;
        let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        match bracketed {
            Some(inside) if inside.parse::<std::net::Ipv6Addr>().is_err() => {
                return Err(refuse("what stands in brackets is not an IPv6 address"));
            }
            None if host.is_empty() => return Err(refuse("the host is missing")),
            None if host.contains(':') => return Err(refuse("an IPv6 address stands in brackets")),
            None if !host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte)) => {
                return Err(refuse("the host has characters that no host name has"));
            }
            _ => {}
        }
        let digits = port.bytes().all(|byte| byte.is_ascii_digit());
        match port.parse() {
            Ok(port) if digits => Ok(Self::Tcp { host: host.to_owned(), port }),
            _ => Err(refuse("the port is not a number from 0 to 65535")),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

/// What makes a text no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{text}\" is not an address: {fault} (unix:PATH or HOST:PORT is wanted)")]
pub struct AddressError {
    /// The text.
    pub text: String,
    /// What is wrong with it.
    pub fault: &'static str,
}

/// Why a connection did not come about.
#[derive(Debug, thiserror::Error)]
#[error("can't connect to {address}: {}", reason(.source))]
pub struct ConnectError {
    /// Where to.
    pub address: Address,
    source: tonic::transport::Error,
}

/// The innermost cause, which is the one that says something; and a question where it suggests one.
fn reason(error: &tonic::transport::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    let kind = cause.downcast_ref::<io::Error>().map(io::Error::kind);
    let hint = match kind {
        Some(io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => "; is the daemon running?",
        _ => "",
    };
    format!("{cause}{hint}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written() {
        let cases = [
            ("unix:/run/x.sock", "unix:/run/x.sock"),
            ("unix:x.sock", "unix:x.sock"),
            ("unix:///run/x.sock", "unix:/run/x.sock"),
            ("unix:////run/x.sock", "unix://run/x.sock"),
            ("grpc+unix:/run/x.sock", "unix:/run/x.sock"),
            ("grpc+unix:///run/x.sock", "unix:/run/x.sock"),
            ("localhost:8000", "localhost:8000"),
            ("127.0.0.1:0", "127.0.0.1:0"),
            ("[::1]:65535", "[::1]:65535"),
            ("grpc+http://[::]:8000", "[::]:8000"),
            ("grpc+http://build-1.example.org:8000/", "build-1.example.org:8000"),
        ];
        for (text, canonical) in cases {
            let address: Address = text.parse().unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(address.to_string(), canonical, "{text}");
            assert_eq!(canonical.parse(), Ok(address), "{text}");
        }
    }

    #[test]
    fn what_is_no_address_is_refused() {
        let long = format!("unix:/{}", "x".repeat(107));
        let cases = [
            ("", "the port is missing"),
            ("unix:", "the path of the socket"),
            (&long, "107 bytes"),
            ("unix:/a\0b", "NUL"),
            ("localhost", "the port is missing"),
            (":8000", "the host is missing"),
            ("localhost:", "the port is not"),
            ("localhost:+80", "the port is not"),
            ("localhost:65536", "the port is not"),
            ("::1:8000", "stands in brackets"),
            ("[::x]:8000", "not an IPv6"),
            ("user@host:1", "no host name"),
            ("a b:1", "no host name"),
            ("grpc+https://localhost:1", "the scheme is unknown"),
            ("http://localhost:1", "the scheme is unknown"),
            ("grpc+http://localhost:1/path", "the port is not"),
        ];
        for (text, fault) in cases {
            let error = text.parse::<Address>().unwrap_err().to_string();
            assert!(error.contains(fault), "{text:?}: {error}");
        }
    }

    #[tokio::test]
    async fn a_failed_connection_names_address_and_cause() {
        let directory = tempfile::tempdir().unwrap();
        let stale = directory.path().join("stale");
        drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let cases = [
            (format!("unix:{}/none", directory.path().display()), "No such file or directory"),
            (format!("unix:{}", stale.display()), "Connection refused"),
            (free.to_string(), "Connection refused"),
        ];
        for (text, cause) in cases {
            let error = text.parse::<Address>().unwrap().connect().await.unwrap_err().to_string();
            assert!(error.contains(&text) && error.contains(cause), "{error}");
            assert!(error.ends_with("is the daemon running?"), "{error}");
        }
    }
}
