//! Where the daemon listens: unix sockets and TCP ports.

use std::fs::DirBuilder;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::{Mode, umask};
use tokio::net::{TcpListener, UnixListener, UnixStream};

use crate::address::Address;

/// A socket that clients can connect to.
pub enum Listener {
    /// A unix socket. It is removed again when this is dropped.
    Unix(UnixListener, SocketFile),
    /// A TCP port.
    Tcp(TcpListener),
}

/// The file of a unix socket; dropping it removes it.
pub struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Why the daemon can't listen somewhere.
#[derive(Debug, thiserror::Error)]
#[error("can't listen on {address}: {source}")]
pub struct ListenError {
    /// Where.
    pub address: Address,
    /// Why.
    pub source: io::Error,
}

impl Listener {
    /// Listens at `address`. The file of a unix socket is made with mode 0600, in a directory that is made
    /// with mode 0700 if it isn't there; one that a dead daemon left is replaced.
    ///
    /// # Errors
    /// Where the address is taken or out of reach.
    pub async fn bind(address: &Address) -> Result<Self, ListenError> {
        let bound = match address {
            Address::Unix(path) => bind_unix(path).await,
            Address::Tcp { host, port } => {
                // The brackets of an IPv6 address are part of the address, not of the name.
                let host = host.trim_start_matches('[').trim_end_matches(']');
                TcpListener::bind((host, *port)).await.map(Self::Tcp)
            }
        };
        bound.map_err(|source| ListenError { address: address.clone(), source })
    }

    /// Where it listens, with the port that was chosen if port 0 was asked for.
    ///
    /// # Errors
    /// Where the system can't tell.
    pub fn address(&self) -> io::Result<Address> {
        Ok(match self {
            Self::Unix(_, SocketFile(path)) => Address::Unix(path.clone()),
            Self::Tcp(listener) => match listener.local_addr()? {
                SocketAddr::V4(at) => Address::Tcp { host: at.ip().to_string(), port: at.port() },
                SocketAddr::V6(at) => Address::Tcp { host: format!("[{}]", at.ip()), port: at.port() },
            },
        })
    }
}

async fn bind_unix(path: &Path) -> io::Result<Listener> {
    if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    }
    match bind_private(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            let is_socket = std::fs::symlink_metadata(path)?.file_type().is_socket();
            if !is_socket {
                return Err(io::Error::new(io::ErrorKind::AddrInUse, "there is a file that is no socket"));
            }
            // Refused: nobody listens any more.
            match UnixStream::connect(path).await {
                Err(refused) if refused.kind() == io::ErrorKind::ConnectionRefused => {
                    std::fs::remove_file(path)?;
                    bind_private(path)
                }
                _ => Err(io::Error::new(io::ErrorKind::AddrInUse, "another program listens there")),
            }
        }
        bound => bound,
    }
}

fn bind_private(path: &Path) -> io::Result<Listener> {
    // The file must never be open to others, not even between bind and chmod.
    let before = umask(Mode::S_IRWXG | Mode::S_IRWXO | Mode::S_IXUSR);
    let bound = UnixListener::bind(path);
    umask(before);
    Ok(Listener::Unix(bound?, SocketFile(path.into())))
}
