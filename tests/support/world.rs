//! A host with a network behind it: two network namespaces, joined by a pair of virtual interfaces.
//!
//! ```text
//! the build ── pasta ── host: up0, 192.0.2.2, fd00:1::2 ─── 192.0.2.1, fd00:1::1: outside, and 198.51.100.1 there
//! ```
//!
//! cofferdam is run in the host's; nothing of it is left once this is dropped. Making it takes root.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::sched::{CloneFlags, setns};
use nix::unistd::geteuid;

use super::leftovers::{names, until};
use super::{Case, Facility, Lacking};

/// The host's address, on the way out.
pub const HOST: &str = "192.0.2.2";
/// The way out: what the host and its builds have as their gateway.
pub const GATEWAY: &str = "192.0.2.1";
/// The same over IPv6.
pub const GATEWAY_IPV6: &str = "fd00:1::1";
/// An address further out.
pub const OUTSIDE: &str = "198.51.100.1";
/// What every name of the tests' name servers means.
pub const MEANING: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 77);

/// The two namespaces, each kept by a process that sleeps.
pub struct World {
    host: Child,
    outside: Child,
}

impl World {
    /// Makes one. `resolv_conf` is the host's, for who runs in it.
    pub fn new(case: &Case, resolv_conf: &str) -> Result<World, Lacking> {
        let lacks = |reason: String| Lacking::new(Facility::Pasta, reason);
        if !geteuid().is_root() {
            return Err(lacks("not run as root".into()));
        }
        for program in ["pasta", "ip", "nsenter", "unshare", "perl"] {
            let found = std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
                .any(|dir| dir.join(program).is_file());
            if !found {
                return Err(lacks(format!(
                    "{program} is not installed (Debian: passt, iproute2, util-linux, perl)"
                )));
            }
        }
        match Path::new("/dev/net/tun").metadata() {
            Ok(found) if found.permissions().mode() & 0o666 == 0o666 => {}
            Ok(_) => return Err(lacks("/dev/net/tun is closed to others; scripts/test lends one".into())),
            Err(error) => return Err(lacks(format!("/dev/net/tun: {error}"))),
        }
        let file = case.write("resolv.conf.of-the-host", resolv_conf);
        let mount = format!("mount --bind {} /etc/resolv.conf && exec sleep infinity", file.display());
        let world = World {
            host: sleeper(&["--net", "--mount"], &mount),
            outside: sleeper(&["--net"], "exec sleep infinity"),
        };
        world.wire().map_err(lacks)?;
        Ok(world)
    }

    fn wire(&self) -> Result<(), String> {
        let (host, outside) = (self.host.id(), self.outside.id());
        ip(host, &format!("link add up0 type veth peer name down0 netns {outside}"))?;
        for (pid, commands) in [
            (
                outside,
                [
                    "link set lo up",
                    "addr add 192.0.2.1/24 dev down0",
                    "addr add fd00:1::1/64 dev down0 nodad",
                    "addr add 198.51.100.1/32 dev lo",
                    "link set down0 up",
                ]
                .as_slice(),
            ),
            (
                host,
                &[
                    "link set lo up",
                    "addr add 192.0.2.2/24 dev up0",
                    "addr add fd00:1::2/64 dev up0 nodad",
                    "link set up0 up",
                    "route add default via 192.0.2.1",
                    "route add default via fd00:1::1",
                ],
            ),
        ] {
            commands.iter().try_for_each(|command| ip(pid, command))?;
        }
        // Without an address of the link there is no IPv6 for pasta. The kernel makes one by and by.
        let addresses =
            || self.on_host(|| std::fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap());
        until("an address of the link", || addresses().lines().any(|line| line.starts_with("fe80")));
        Ok(())
    }

    /// Cuts the host off.
    pub fn unplug(&self) {
        ip(self.host.id(), "link del up0").unwrap();
    }

    /// Runs `make` in the host's network; the sockets that it makes stay there.
    pub fn on_host<T: Send>(&self, make: impl FnOnce() -> T + Send) -> T {
        within(self.host.id(), make)
    }

    /// The same outside of the host.
    pub fn outside<T: Send>(&self, make: impl FnOnce() -> T + Send) -> T {
        within(self.outside.id(), make)
    }

    /// The binary on the host.
    pub fn cofferdam(&self, case: &Case) -> Command {
        case.cofferdam_in(self.host.id())
    }

    /// `cofferdam run --host-tools FLAGS -- bash -c SCRIPT` on the host.
    pub fn run(&self, case: &Case, flags: &[&str], script: &str) -> Command {
        let mut command = self.cofferdam(case);
        command.args(["run", "--host-tools"]).args(flags).args(["--", "bash", "-c", script]);
        command
    }

    /// Every process in the host's network but the one that keeps it: "pid arguments".
    pub fn processes(&self) -> BTreeSet<String> {
        let network = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net")).ok();
        let keeper = self.host.id().to_string();
        let host = network(&keeper);
        names(Path::new("/proc"))
            .into_iter()
            .filter(|pid| {
                pid.bytes().all(|byte| byte.is_ascii_digit()) && *pid != keeper && network(pid) == host
            })
            .map(|pid| {
                let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                format!("{pid} {}", String::from_utf8_lossy(&arguments).replace('\0', " "))
            })
            .collect()
    }

    /// The pids of what connects builds on the host.
    pub fn forwarders(&self) -> Vec<i32> {
        let pasta = |line: &String| {
            let (pid, arguments) = line.split_once(' ')?;
            arguments.contains(" --netns /proc/self/fd/0 ").then(|| pid.parse().ok())?
        };
        self.processes().iter().filter_map(pasta).collect()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for keeper in [&mut self.host, &mut self.outside] {
            let _ = keeper.kill();
            let _ = keeper.wait();
        }
    }
}

/// A process in namespaces of its own, once it is in them.
fn sleeper(namespaces: &[&str], script: &str) -> Child {
    let mut command = Command::new("unshare");
    command.args(namespaces).args(["sh", "-c", script]).stdin(Stdio::null());
    let child = command.spawn().unwrap();
    let name = format!("/proc/{}/comm", child.id());
    until("namespaces", || std::fs::read_to_string(&name).is_ok_and(|name| name == "sleep\n"));
    child
}

fn ip(pid: u32, arguments: &str) -> Result<(), String> {
    let mut command = Command::new("nsenter");
    command.args(["--target", &pid.to_string(), "--net", "ip"]).args(arguments.split(' '));
    let run = command.output().map_err(|error| format!("nsenter: {error}"))?;
    match run.status.success() {
        true => Ok(()),
        false => Err(format!("ip {arguments}: {}", String::from_utf8_lossy(&run.stderr).trim())),
    }
}

fn within<T: Send>(pid: u32, make: impl FnOnce() -> T + Send) -> T {
    let namespace = File::open(format!("/proc/{pid}/ns/net")).unwrap();
    let enter = || {
        setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
        make()
    };
    std::thread::scope(|scope| scope.spawn(enter).join().unwrap())
}

/// Greets whoever connects.
pub struct Greeter(Arc<AtomicUsize>);

impl Greeter {
    /// To be made within a [`World`].
    pub fn listen(address: impl Into<SocketAddr>, greeting: &str) -> Greeter {
        let listener = TcpListener::bind(address.into()).unwrap();
        let greeting = format!("{greeting}\n");
        let greeted = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&greeted);
        // It ends with the tests.
        std::thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                count.fetch_add(1, Ordering::SeqCst);
                // Who has gone again has been counted.
                let _ = stream.write_all(greeting.as_bytes());
            }
        });
        Greeter(greeted)
    }

    /// How many have come.
    pub fn greeted(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

/// A name server that knows one answer, [`MEANING`]. To be made within a [`World`].
pub fn name_server(address: IpAddr) {
    let socket = UdpSocket::bind((address, 53)).unwrap();
    std::thread::spawn(move || {
        let mut query = [0; 512];
        while let Ok((length, peer)) = socket.recv_from(&mut query) {
            let _ = socket.send_to(&answer(&query[..length]), peer);
        }
    });
}

/// The answer to a query: one address if it asks for one of IPv4, none otherwise.
fn answer(query: &[u8]) -> Vec<u8> {
    let end_of_name = 12 + query[12..].iter().position(|byte| *byte == 0).unwrap();
    let question = &query[12..end_of_name + 5];
    let asks_for_ipv4 = question[question.len() - 4..] == [0, 1, 0, 1];
    let mut answer = query[..2].to_vec();
    // A response, recursion was wanted and is to be had; one question, and at most one answer.
    answer.extend([0x81, 0x80, 0, 1, 0, u8::from(asks_for_ipv4), 0, 0, 0, 0]);
    answer.extend(question);
    if asks_for_ipv4 {
        // The name of the question, an IPv4 address, for a minute, of four bytes.
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        answer.extend(MEANING.octets());
    }
    answer
}
