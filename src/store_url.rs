//! Which store a worker works on, as one setting.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::address::{Address, Security};

/// A store.
///
/// Written `local:PATH`, `memory:`, `grpc+unix:PATH`, `grpc+http://HOST:PORT` or `grpc+https://HOST:PORT`; a host that is
/// an IPv6 address stands in brackets.
///
/// ```
/// use cofferdam::store_url::StoreUrl;
///
/// let url: StoreUrl = "grpc+https://store.example.org:8000/".parse()?;
/// assert_eq!(url.to_string(), "grpc+https://store.example.org:8000");
/// # Ok::<(), cofferdam::store_url::StoreUrlError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum StoreUrl {
    /// One in a directory of this machine.
    Local(PathBuf),
    /// One in memory, which goes with the worker.
    Memory,
    /// One behind gRPC.
    Remote(RemoteUrl),
}

/// A store behind gRPC. TLS goes with TCP alone.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RemoteUrl {
    address: Address,
    security: Security,
}

impl RemoteUrl {
    /// Where it answers.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Whether over TLS.
    pub fn security(&self) -> Security {
        self.security
    }
}

impl FromStr for StoreUrl {
    type Err = StoreUrlError;

    fn from_str(text: &str) -> Result<Self, StoreUrlError> {
        let refuse = |fault: &str| StoreUrlError { text: text.to_owned(), fault: fault.to_owned() };
        let remote = |address: &str, security| {
            let address = address.parse::<Address>().map_err(|error| refuse(error.fault))?;
            Ok(Self::Remote(RemoteUrl { address, security }))
        };
        let (scheme, rest) = text.split_once(':').ok_or_else(|| refuse("it has no scheme"))?;
        match scheme {
            "local" => local_path(rest).map(Self::Local).map_err(refuse),
            "memory" if rest.is_empty() || rest == "//" => Ok(Self::Memory),
            "memory" => Err(refuse("a store in memory has no path")),
            "grpc+unix" => remote(text, Security::Plain),
            "grpc+http" if rest.starts_with("//") => remote(text, Security::Plain),
            // An address is written the same way with and without TLS.
            "grpc+https" if rest.starts_with("//") => remote(&format!("grpc+http:{rest}"), Security::Tls),
            "grpc+http" | "grpc+https" => Err(refuse("two slashes are missing after the scheme")),
            _ => Err(refuse("its scheme is unknown")),
        }
    }
}

/// The path of a local store. `local:///var/x` is another way to write `local:/var/x`.
fn local_path(path: &str) -> Result<PathBuf, &'static str> {
    let path = if path.starts_with("///") { path.strip_prefix("//").unwrap_or(path) } else { path };
    match path {
        "" => Err("the path of the store is missing"),
        _ if path.contains('\0') => Err("the path contains a NUL byte"),
        _ if path.starts_with("//") => {
            Err("the path begins with two slashes: local:/PATH or local:PATH is wanted")
        }
        _ => Ok(Path::new(path).to_owned()),
    }
}

impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local(path) => write!(f, "local:{}", path.display()),
            Self::Memory => f.write_str("memory:"),
            Self::Remote(remote) => remote.fmt(f),
        }
    }
}

impl fmt::Display for RemoteUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.address, self.security) {
            (unix @ Address::Unix(_), _) => write!(f, "grpc+{unix}"),
            (tcp @ Address::Tcp { .. }, Security::Plain) => write!(f, "grpc+http://{tcp}"),
            (tcp @ Address::Tcp { .. }, Security::Tls) => write!(f, "grpc+https://{tcp}"),
        }
    }
}

/// What makes a text no store.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "\"{text}\" is no store: {fault} (local:PATH, memory:, grpc+unix:PATH, grpc+http://HOST:PORT or \
     grpc+https://HOST:PORT is wanted)"
)]
pub struct StoreUrlError {
    /// The text.
    pub text: String,
    /// What is wrong with it.
    pub fault: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stores_are_read_and_written() {
        let cases = [
            ("local:/var/lib/x", "local:/var/lib/x"),
            ("local:///var/lib/x", "local:/var/lib/x"),
            ("local:x/y", "local:x/y"),
            ("local:a:b", "local:a:b"),
            ("memory:", "memory:"),
            ("memory://", "memory:"),
            ("grpc+unix:/run/x.sock", "grpc+unix:/run/x.sock"),
            ("grpc+unix:///run/x.sock", "grpc+unix:/run/x.sock"),
            ("grpc+unix:x.sock", "grpc+unix:x.sock"),
            ("grpc+http://localhost:8000", "grpc+http://localhost:8000"),
            ("grpc+http://[::1]:8000/", "grpc+http://[::1]:8000"),
            ("grpc+https://store.example.org:443/", "grpc+https://store.example.org:443"),
        ];
        for (text, canonical) in cases {
            let url: StoreUrl = text.parse().unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(url.to_string(), canonical, "{text}");
            assert_eq!(canonical.parse(), Ok(url), "{text}");
        }
    }

    #[test]
    fn with_and_without_tls_are_two() {
        let security = |text: &str| match text.parse() {
            Ok(StoreUrl::Remote(remote)) => remote.security(),
            other => panic!("{text}: {other:?}"),
        };
        assert_eq!(security("grpc+https://a:1"), Security::Tls);
        assert_eq!(security("grpc+http://a:1"), Security::Plain);
        assert_eq!(security("grpc+unix:a"), Security::Plain);
    }

    #[test]
    fn what_is_no_store_is_refused() {
        let cases = [
            ("", "no scheme"),
            ("/var/lib/x", "no scheme"),
            ("local:", "the path of the store is missing"),
            ("local:/a\0b", "NUL"),
            ("local://a/b", "two slashes"),
            ("memory:x", "has no path"),
            ("unix:/run/x.sock", "scheme is unknown"),
            ("localhost:8000", "scheme is unknown"),
            ("http://localhost:8000", "scheme is unknown"),
            ("s3://bucket", "scheme is unknown"),
            ("Local:/x", "scheme is unknown"),
            ("grpc+unix:", "the path of the socket is missing"),
            ("grpc+http:localhost:8000", "two slashes are missing"),
            ("grpc+http://localhost", "the port is missing"),
            ("grpc+https://localhost", "the port is missing"),
            ("grpc+https://localhost:1/path", "the port is not"),
            ("grpc+https://::1:1", "stands in brackets"),
            ("grpc+https://unix:x", "the port is not"),
        ];
        for (text, fault) in cases {
            let error = text.parse::<StoreUrl>().unwrap_err().to_string();
            assert!(error.contains(fault), "{text:?}: {error}");
            assert!(error.contains("grpc+https://HOST:PORT is wanted"), "{text:?}: {error}");
        }
    }
}
