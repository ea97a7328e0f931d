//! What a build gets that asks for the network: a namespace, and the files of `/etc` that go with it.

mod resolver;

use std::fs::File;
use std::io::{self, Read};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use cofferdam_sandbox::Network;
use nix::ifaddrs::getifaddrs;

use crate::config::NetworkPolicy;
use resolver::{Host, Resolver};

/// A file of the host that builds with network see.
struct HostFile {
    /// Its place below `/etc` in the build.
    name: &'static str,
    /// Where hosts have it; the first that is there is taken.
    sources: &'static [&'static str],
    /// A longer one is refused: half of it would be something else.
    max_bytes: u64,
}

const RESOLV_CONF: HostFile =
    HostFile { name: "resolv.conf", sources: &["/etc/resolv.conf"], max_bytes: 64 << 10 };

/// Those that are passed on as they are. A host without one of them gives its builds none either.
const AS_THEY_ARE: [HostFile; 3] = [
    HostFile { name: "services", sources: &["/etc/services"], max_bytes: 4 << 20 },
    // Some list every name that advertisements come from.
    HostFile { name: "hosts", sources: &["/etc/hosts"], max_bytes: 32 << 20 },
    HostFile {
        name: "ssl/certs/ca-certificates.crt",
        // Debian, Arch and NixOS; Fedora; openSUSE; Alpine.
        sources: &[
            "/etc/ssl/certs/ca-certificates.crt",
            "/etc/pki/tls/certs/ca-bundle.crt",
            "/etc/ssl/ca-bundle.pem",
            "/etc/ssl/cert.pem",
        ],
        max_bytes: 16 << 20,
    },
];

/// Where systemd-resolved lists the name servers that it asks itself.
const UPLINKS: HostFile =
    HostFile { name: "", sources: &["/run/systemd/resolve/resolv.conf"], max_bytes: 64 << 10 };

/// A build's way to the network.
#[derive(Debug)]
pub struct Connection {
    /// The namespace.
    pub network: Network,
    /// Files below the build's `/etc`, by name.
    pub files: Vec<(String, Vec<u8>)>,
}

/// Why a build can't be given the network.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// A file can't be read.
    #[error("can't give a build this host's {}: {source}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is too long.
    #[error("can't give a build this host's {}: it has more than {limit} bytes", .path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Bytes.
        limit: u64,
    },
}

/// What a build that asks for the network gets under this policy. Reads from the host's disk.
///
/// # Errors
/// Where a file that is there can't be read, or is longer than such files are.
pub fn connect(policy: &NetworkPolicy) -> Result<Connection, ConnectionError> {
    let mut files = Vec::new();
    let resolv_conf = read(&RESOLV_CONF)?;
    let network = match policy {
        // Such builds were refused before.
        NetworkPolicy::Refused => return Ok(Connection { network: Network::Own, files }),
        NetworkPolicy::Host => {
            files.extend(resolv_conf.map(|text| (RESOLV_CONF.name.into(), text)));
            Network::Host
        }
        NetworkPolicy::Pasta(pasta) => {
            let Resolver { text, name_servers } = resolver(&resolv_conf.unwrap_or_default())?;
            files.push((RESOLV_CONF.name.into(), text));
            Network::Pasta { pasta: pasta.clone(), name_servers }
        }
    };
    for file in &AS_THEY_ARE {
        files.extend(read(file)?.map(|contents| (file.name.into(), contents)));
    }
    Ok(Connection { network, files })
}

/// The resolver's configuration for a namespace that pasta connects.
fn resolver(resolv_conf: &[u8]) -> Result<Resolver, ConnectionError> {
    let uplinks = read(&UPLINKS)?.unwrap_or_default();
    let (has_ipv4, has_ipv6) = (has_ipv4(), has_ipv6());
    let host = Host { addresses: addresses(), has_ipv4, has_ipv6, uplinks };
    Ok(resolver::rewrite(resolv_conf, &host))
}

/// Whether this host reaches others, as far as its routes tell.
pub(crate) fn is_connected() -> bool {
    has_ipv4() || has_ipv6()
}

// Where /proc does not tell there is no such network.
fn has_ipv4() -> bool {
    std::fs::read_to_string("/proc/self/net/route").is_ok_and(|table| resolver::has_ipv4_route(&table))
}

fn has_ipv6() -> bool {
    std::fs::read_to_string("/proc/self/net/ipv6_route").is_ok_and(|table| resolver::has_ipv6_route(&table))
}

/// The host's own addresses. It may have changed when they are used; what then can't be reached is asked for in vain.
fn addresses() -> Vec<IpAddr> {
    let interfaces = getifaddrs().into_iter().flatten().filter_map(|interface| interface.address);
    let address = |found: nix::sys::socket::SockaddrStorage| {
        let v4 = found.as_sockaddr_in().map(|found| IpAddr::from(found.ip()));
        v4.or_else(|| found.as_sockaddr_in6().map(|found| IpAddr::from(found.ip())))
    };
    interfaces.filter_map(address).collect()
}

/// What the host has in the first of a file's places that is there. Symbolic links are followed.
fn read(file: &HostFile) -> Result<Option<Vec<u8>>, ConnectionError> {
    for path in file.sources {
        match read_up_to(Path::new(path), file.max_bytes) {
            Err(ConnectionError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            found => return found.map(Some),
        }
    }
    Ok(None)
}

fn read_up_to(path: &Path, limit: u64) -> Result<Vec<u8>, ConnectionError> {
    let mut contents = Vec::new();
    let read = File::open(path).and_then(|file| file.take(limit + 1).read_to_end(&mut contents));
    read.map_err(|source| ConnectionError::Read { path: path.into(), source })?;
    match contents.len() as u64 > limit {
        true => Err(ConnectionError::TooLong { path: path.into(), limit }),
        false => Ok(contents),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_file_is_read_beyond_its_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "12345").unwrap();
        assert_eq!(read_up_to(&path, 5).unwrap(), b"12345");
        let error = read_up_to(&path, 4).unwrap_err().to_string();
        assert!(error.contains("more than 4 bytes") && error.contains("file"), "{error}");
        // One without an end.
        assert!(matches!(read_up_to(Path::new("/dev/zero"), 9), Err(ConnectionError::TooLong { .. })));
    }

    #[test]
    fn the_first_place_that_is_there_counts_and_links_are_followed() {
        let file = |sources| HostFile { name: "x", sources, max_bytes: 1 << 20 };
        let missing = file(&["/nonexistent/a", "/nonexistent/b"]);
        assert_eq!(read(&missing).unwrap(), None);
        let second = file(&["/nonexistent/a", "/proc/self/exe/none", "/etc/passwd"]);
        assert!(read(&second).is_err(), "what is there but can't be read is told");
        let second = file(&["/nonexistent/a", "/etc/passwd"]);
        assert_eq!(read(&second).unwrap(), Some(std::fs::read("/etc/passwd").unwrap()));
    }
}
