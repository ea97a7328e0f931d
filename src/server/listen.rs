//! Where the daemon listens: unix sockets and TCP ports.

use std::fs::{DirBuilder, File};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::stat::{Mode, fchmod};
use tokio::net::{TcpListener, UnixListener, UnixSocket, UnixStream};
use tokio::time::{Instant, sleep};

use crate::address::{Address, resolve};

/// How many connections may wait to be taken.
const BACKLOG: u32 = 1024;

/// How long another daemon may take to bind a socket in the same directory.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// A socket that clients can connect to.
#[derive(Debug)]
pub enum Listener {
    /// A unix socket.
    Unix(UnixListener, SocketFile),
    /// A TCP port.
    Tcp(TcpListener),
}

/// The file of a unix socket. Dropping it removes the file, unless another lies there by now.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    id: FileId,
    // Until the file is gone: a daemon that finds it must find somebody listening, too, and leave it alone.
    _listening: OwnedFd,
}

/// Device and inode.
type FileId = (u64, u64);

impl Drop for SocketFile {
    fn drop(&mut self) {
        if file_id(&self.path).is_ok_and(|id| id == self.id) {
            // Gone already is as good.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn file_id(path: &Path) -> io::Result<FileId> {
    path.symlink_metadata().map(|file| (file.dev(), file.ino()))
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
            Address::Tcp { host, port } => bind_tcp(host, *port).await.map(Self::Tcp),
        };
        bound.map_err(|source| ListenError { address: address.clone(), source })
    }

    /// Where it listens, with the port that was chosen if port 0 was asked for.
    ///
    /// # Errors
    /// Where the system can't tell.
    pub fn address(&self) -> io::Result<Address> {
        Ok(match self {
            Self::Unix(_, file) => Address::Unix(file.path.clone()),
            Self::Tcp(listener) => match listener.local_addr()? {
                SocketAddr::V4(at) => Address::Tcp { host: at.ip().to_string(), port: at.port() },
                SocketAddr::V6(at) => Address::Tcp { host: format!("[{}]", at.ip()), port: at.port() },
            },
        })
    }
}

async fn bind_tcp(host: &str, port: u16) -> io::Result<TcpListener> {
    TcpListener::bind(resolve(host, port).await?.as_slice()).await
}

async fn bind_unix(path: &Path) -> io::Result<Listener> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // That one, and no others: a missing parent is more likely a slip.
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let _alone = lock(dir).await?;
    remove_stale(path).await?;
    let socket = UnixSocket::new_stream()?;
    // The file takes its mode from the socket, so it is never open to others. The umask belongs to all threads.
    fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
    socket.bind(path)?;
    let id = file_id(path)?;
    let listener = socket.listen(BACKLOG)?;
    let file = SocketFile { path: path.into(), id, _listening: listener.as_fd().try_clone_to_owned()? };
    Ok(Listener::Unix(listener, file))
}

/// Locks a directory against other daemons. Whoever holds it may take what nobody listens at for a dead daemon's: a
/// live one's socket is in that state between bind and listen.
async fn lock(dir: &Path) -> io::Result<Flock<File>> {
    let mut dir = File::open(dir)?;
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match Flock::lock(dir, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((back, Errno::EWOULDBLOCK)) if Instant::now() < deadline => dir = back,
            Err((_, Errno::EWOULDBLOCK)) => {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "another program has locked the directory",
                ));
            }
            Err((_, errno)) => return Err(errno.into()),
        }
        sleep(Duration::from_millis(10)).await;
    }
}

/// Makes room for a socket where a dead daemon has left one.
async fn remove_stale(path: &Path) -> io::Result<()> {
    let taken = |text| Err(io::Error::new(io::ErrorKind::AddrInUse, text));
    match path.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
        Ok(file) if !file.file_type().is_socket() => return taken("there is a file that is no socket"),
        Ok(_) => {}
    }
    match UnixStream::connect(path).await.map_err(|error| error.kind()) {
        Err(io::ErrorKind::ConnectionRefused) => std::fs::remove_file(path),
        // Its daemon has removed it just now.
        Err(io::ErrorKind::NotFound) => Ok(()),
        Ok(_) | Err(_) => taken("another program listens there"),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn stale(path: &Path) {
        drop(std::os::unix::net::UnixListener::bind(path).unwrap());
    }

    #[tokio::test]
    async fn the_file_is_private_and_goes_with_the_listener() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("made/socket");
        for _ in 0..2 {
            let listener = Listener::bind(&Address::Unix(path.clone())).await.unwrap();
            assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
            let dir = path.parent().unwrap();
            assert_eq!(dir.metadata().unwrap().permissions().mode() & 0o777, 0o700);
            UnixStream::connect(&path).await.unwrap();
            drop(listener);
            assert!(!path.exists());
        }
    }

    #[tokio::test]
    async fn what_others_put_there_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let first = Listener::bind(&Address::Unix(path.clone())).await.unwrap();
        std::fs::remove_file(&path).unwrap();
        let second = Listener::bind(&Address::Unix(path.clone())).await.unwrap();
        drop(first);
        UnixStream::connect(&path).await.unwrap();
        drop(second);
        std::fs::write(&path, "no socket").unwrap();
        let error = Listener::bind(&Address::Unix(path.clone())).await.unwrap_err().to_string();
        assert!(error.contains("no socket") && path.exists(), "{error}");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn one_of_many_takes_a_dead_ones_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        for _ in 0..100 {
            stale(&path);
            let rivals: Vec<_> = (0..4)
                .map(|_| {
                    let address = Address::Unix(path.clone());
                    tokio::spawn(async move { Listener::bind(&address).await })
                })
                .collect();
            let mut bound = Vec::new();
            for rival in rivals {
                bound.extend(rival.await.unwrap());
            }
            assert_eq!(bound.len(), 1);
            UnixStream::connect(&path).await.unwrap();
        }
    }
}
