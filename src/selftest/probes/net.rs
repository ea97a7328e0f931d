//! NET: the network, and other ways to talk to somebody outside.

use std::ffi::OsStr;
use std::fs;
use std::io::{IoSlice, IoSliceMut, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{SocketAddr as UnixAddress, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use cofferdam_sandbox::attack::{Arg, Call};
use nix::errno::Errno;

use super::tools::{eventually, hold, names, until_holding};
use crate::build::request::{Draft, Network};
use crate::castore::Node;
use crate::selftest::stage::{End, Running, Stage, path};
use crate::selftest::{Act, Company, Findings, Outcome, Play, Probe, Profile, Weight};

pub(super) const PROBES: &[Probe] = &[
    Probe {
        id: "NET-01",
        promise: "a build without network has a loopback of its own, which works, and nothing else",
        weight: Weight::Required,
        company: Company::Shared,
        attack: loopback_only,
        play: Play::Script(|stage| Box::pin(beside_listeners(stage))),
    },
    Probe {
        id: "NET-02",
        promise: "no socket of the host, the worker's included, is in the sandbox's file system",
        weight: Weight::Required,
        company: Company::Shared,
        attack: no_sockets,
        play: Play::Script(|stage| Box::pin(with_and_without_network(stage))),
    },
    Probe {
        id: "NET-03",
        promise: "a build with network can't hand a descriptor to the host, nor change a stored output by one",
        weight: Weight::Required,
        company: Company::Shared,
        attack: hand_out_descriptor,
        play: Play::Script(|stage| Box::pin(receive_descriptor(stage))),
    },
    Probe {
        id: "NET-04",
        promise: "two builds with network can't reach each other's sockets",
        weight: Weight::Required,
        company: Company::Shared,
        attack: meet,
        play: Play::Script(|stage| Box::pin(two_with_network(stage))),
    },
    Probe {
        id: "NET-05",
        promise: "the host can't connect to a socket that a build with network has opened",
        weight: Weight::Required,
        company: Company::Shared,
        attack: meet,
        play: Play::Script(|stage| Box::pin(connect_into(stage))),
    },
    Probe {
        id: "NET-06",
        promise: "a build with network has what names need, and reaches nothing on the host's loopback",
        weight: Weight::Desired,
        company: Company::Shared,
        attack: network_as_needed,
        play: Play::Script(|stage| Box::pin(with_network(stage))),
    },
    Probe {
        id: "NET-07",
        promise: "the process that gives a build its network ends with the build",
        weight: Weight::Required,
        company: Company::Alone,
        attack: |_, findings| {
            findings.check(true, "");
            hold();
        },
        play: Play::Script(|stage| Box::pin(helper_ends(stage))),
    },
    Probe {
        id: "NET-09",
        promise: "raw sockets are refused; profile strict: all but unix, IPv4, IPv6 and netlink for routes",
        weight: Weight::Desired,
        company: Company::Shared,
        attack: kinds_of_sockets,
        play: Play::Plain,
    },
    Probe {
        id: "NET-10",
        promise: "a build gets no network because it asks for it, but because the operator lets it",
        weight: Weight::Required,
        company: Company::Shared,
        attack: |_, findings| findings.check(false, "it was let in"),
        play: Play::Script(|stage| Box::pin(uninvited(stage))),
    },
];

/// What the host listens on while a build tries to get there. Names and numbers go to the attack as arguments.
struct Listeners {
    tcp: TcpListener,
    udp: UdpSocket,
    unix: UnixListener,
    name: String,
}

impl Listeners {
    fn open(stage: &Stage<'_>) -> std::io::Result<Self> {
        let name = format!("cofferdam-selftest-{}-{}", stage.probe.id, std::process::id());
        let unix = UnixListener::bind_addr(&UnixAddress::from_abstract_name(&name)?)?;
        unix.set_nonblocking(true)?;
        let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        tcp.set_nonblocking(true)?;
        let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        udp.set_nonblocking(true)?;
        Ok(Self { tcp, udp, unix, name })
    }

    fn arguments(&self) -> Vec<String> {
        let port =
            |address: std::io::Result<SocketAddr>| address.map_or(0, |address| address.port()).to_string();
        vec![self.name.clone(), port(self.tcp.local_addr()), port(self.udp.local_addr())]
    }

    /// Checks that nobody got here.
    fn untouched(&self) -> Outcome {
        let mut findings = Findings::default();
        findings.check(self.tcp.accept().is_err(), "the host's TCP listener got a connection");
        findings.check(self.udp.recv(&mut [0; 16]).is_err(), "the host's UDP socket got a datagram");
        findings.check(self.unix.accept().is_err(), "the host's abstract socket got a connection");
        findings.outcome()
    }
}

/// As [`Stage::act`], with network; where the worker gives builds none, why.
fn draft_with_network(stage: &Stage<'_>, role: &str, arguments: &[String]) -> Result<Draft, Outcome> {
    if let Some(why) = &stage.theatre.no_network {
        return Err(Outcome::not_applicable(why));
    }
    let arguments: Vec<&OsStr> = arguments.iter().map(OsStr::new).collect();
    let mut draft = stage.draft(role, &arguments).map_err(|fault| Outcome::broken(fault.to_string()))?;
    draft.constraints.network = Network::Required;
    Ok(draft)
}

/// A build with network that holds.
async fn holding(stage: &Stage<'_>, role: &str, arguments: &[String]) -> Result<Running, Outcome> {
    let draft = draft_with_network(stage, role, arguments)?;
    match stage.start(draft).await {
        Err(fault) => Err(Outcome::broken(fault.to_string())),
        Ok(build) => until_holding(build).await,
    }
}

async fn beside_listeners(stage: &Stage<'_>) -> Outcome {
    let listeners = match Listeners::open(stage) {
        Ok(listeners) => listeners,
        Err(error) => return Outcome::broken(format!("the host can't listen: {error}")),
    };
    let arguments = listeners.arguments();
    let arguments: Vec<&OsStr> = arguments.iter().map(OsStr::new).collect();
    stage.act("", &arguments).await.and(listeners.untouched())
}

fn port(act: &Act, at: usize) -> u16 {
    act.arguments.get(at).and_then(|text| text.to_str()?.parse().ok()).unwrap_or(1)
}

/// The host's abstract socket.
fn abstract_socket(act: &Act) -> std::io::Result<UnixAddress> {
    let name = act.arguments.first().map(|name| name.as_encoded_bytes().to_vec()).unwrap_or_default();
    UnixAddress::from_abstract_name(name)
}

const UNREACHABLE: [Errno; 4] = [Errno::ENETUNREACH, Errno::EHOSTUNREACH, Errno::EACCES, Errno::EPERM];

fn loopback_only(act: &Act, findings: &mut Findings) {
    let devices = fs::read_to_string("/proc/net/dev").unwrap_or_default();
    let devices: Vec<&str> =
        devices.lines().filter_map(|line| line.split_once(':')).map(|(name, _)| name.trim()).collect();
    findings.same("network interfaces", devices, vec!["lo"]);
    let routes = fs::read_to_string("/proc/net/route").unwrap_or_default();
    findings.same("routes", routes.lines().skip(1).count(), 0);
    works_on(findings, IpAddr::V4(Ipv4Addr::LOCALHOST));
    // Where the host's kernel has it at all.
    if Path::new("/proc/net/if_inet6").exists() {
        works_on(findings, IpAddr::V6(std::net::Ipv6Addr::LOCALHOST));
    }
    let patience = Duration::from_secs(2);
    for far in ["1.1.1.1:53", "8.8.8.8:443", "10.0.0.1:22", "169.254.169.254:80", "[2606:4700:4700::1111]:53"]
    {
        let Ok(address) = far.parse() else { continue };
        let refusals = [UNREACHABLE.as_slice(), &[Errno::EAFNOSUPPORT, Errno::EADDRNOTAVAIL]].concat();
        findings.refused(
            &format!("connect to {far}"),
            TcpStream::connect_timeout(&address, patience),
            &refusals,
        );
    }
    let datagram = UdpSocket::bind("0.0.0.0:0").and_then(|socket| socket.send_to(b"x", "1.1.1.1:53"));
    findings.refused("send a datagram to 1.1.1.1", datagram, &UNREACHABLE);
    let refusals = [Errno::ECONNREFUSED];
    let tcp = TcpStream::connect((Ipv4Addr::LOCALHOST, port(act, 1)));
    findings.refused("connect to a port of the host's loopback", tcp, &refusals);
    let unix = abstract_socket(act).and_then(|address| UnixStream::connect_addr(&address));
    findings.refused("connect to an abstract socket of the host", unix, &[Errno::ECONNREFUSED, Errno::EPERM]);
}

/// Checks that one can talk to oneself.
fn works_on(findings: &mut Findings, address: IpAddr) {
    let talk = || -> std::io::Result<Vec<u8>> {
        let listener = TcpListener::bind((address, 0))?;
        let mut there = TcpStream::connect(listener.local_addr()?)?;
        let (mut here, _) = listener.accept()?;
        there.write_all(b"hello")?;
        drop(there);
        let mut heard = Vec::new();
        std::io::Read::read_to_end(&mut here, &mut heard)?;
        Ok(heard)
    };
    if let Some(heard) = findings.works(&format!("talk over {address}"), talk()) {
        findings.same("what was heard", heard, b"hello".to_vec());
    }
}

async fn with_and_without_network(stage: &Stage<'_>) -> Outcome {
    let without = stage.act("", &[]).await;
    match draft_with_network(stage, "", &[]) {
        Ok(draft) => without.and(stage.run(draft).await.verdict()),
        Err(outcome) => without.and(outcome),
    }
}

fn no_sockets(_: &Act, findings: &mut Findings) {
    let mut found = Vec::new();
    let mut open = vec![PathBuf::from("/")];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() && entry.path() != Path::new("/proc") => open.push(entry.path()),
                Ok(kind) if kind.is_socket() => found.push(entry.path()),
                _ => {}
            }
        }
    }
    findings.check(found.is_empty(), format_args!("there are sockets: {found:?}"));
    for place in
        ["/run", "/var/run", "/var/run/nscd/socket", "/run/docker.sock", "/run/dbus/system_bus_socket"]
    {
        findings.refused(&format!("look at {place}"), fs::symlink_metadata(place), &[Errno::ENOENT]);
    }
}

const OUTPUT: &str = "nix/store/out";

fn hand_out_descriptor(act: &Act, findings: &mut Findings) {
    let out = Path::new("/").join(OUTPUT);
    findings.works("write the output", fs::write(&out, "honest"));
    let Some(file) = findings.works("open it again", fs::File::options().write(true).open(&out)) else {
        return;
    };
    let sent = abstract_socket(act).and_then(|address| UnixStream::connect_addr(&address));
    match sent {
        Err(error) => {
            let refusals = [Errno::ECONNREFUSED, Errno::EPERM];
            findings.refused("connect to the host", Err::<(), _>(error), &refusals);
        }
        Ok(stream) => {
            findings.check(false, "an abstract socket of the host can be reached");
            use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
            let fds = [file.as_raw_fd()];
            let message = [ControlMessage::ScmRights(&fds)];
            let _ =
                sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(b"x")], &message, MsgFlags::empty(), None);
        }
    }
}

async fn receive_descriptor(stage: &Stage<'_>) -> Outcome {
    let listeners = match Listeners::open(stage) {
        Ok(listeners) => listeners,
        Err(error) => return Outcome::broken(format!("the host can't listen: {error}")),
    };
    let mut draft = match draft_with_network(stage, "", &listeners.arguments()) {
        Ok(draft) => draft,
        Err(outcome) => return outcome,
    };
    draft.outputs.push(path(OUTPUT));
    let ended = stage.run(draft).await;
    let outcome = ended.verdict();
    let Some(mut file) = received(&listeners.unix) else { return outcome };
    // It got through; what is stored must not change all the same.
    let _ = file.write_all(b"tampered");
    let stored = match &ended.end {
        End::Completed(outputs) => outputs.first().and_then(|output| match &output.node {
            Node::File { digest, .. } => stage.theatre.worker.store.blobs.open(digest).ok().flatten(),
            _ => None,
        }),
        _ => None,
    };
    let mut bytes = [0; 16];
    let read =
        stored.and_then(|blob| blob.read_at(&mut bytes, 0).ok()).and_then(|length| bytes.get(..length));
    match read {
        Some(b"honest") => outcome,
        other => outcome.and(Outcome::broken(format!("what is stored has changed: {other:?}"))),
    }
}

/// A descriptor that somebody sent to a socket, if anybody did.
fn received(listener: &UnixListener) -> Option<fs::File> {
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
    let (stream, _) = listener.accept().ok()?;
    let mut space = nix::cmsg_space!([i32; 1]);
    let mut byte = [0];
    let mut slices = [IoSliceMut::new(&mut byte)];
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut slices, Some(&mut space), MsgFlags::empty()).ok()?;
    let fd = message.cmsgs().ok()?.find_map(|message| match message {
        ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
        _ => None,
    })?;
    // By its number alone it is nobody's.
    let copied = fs::File::options().write(true).open(format!("/proc/self/fd/{fd}")).ok();
    let _ = nix::unistd::close(fd);
    copied
}

fn meet(act: &Act, findings: &mut Findings) {
    let Some(address) = findings.works("name a socket", abstract_socket(act)) else { return };
    let port = port(act, 1);
    if act.role == "listen" {
        let unix = findings.works("open an abstract socket", UnixListener::bind_addr(&address));
        let tcp = findings.works("open a port", TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)));
        hold();
        return drop((unix, tcp));
    }
    let unix = UnixStream::connect_addr(&address);
    findings.refused(
        "connect to another build's abstract socket",
        unix,
        &[Errno::ECONNREFUSED, Errno::EPERM],
    );
    let tcp = TcpStream::connect((Ipv4Addr::LOCALHOST, port));
    findings.refused("connect to another build's port", tcp, &[Errno::ECONNREFUSED]);
}

/// Where two builds might meet: a name, and a port that is free on the host right now.
fn meeting_place(stage: &Stage<'_>) -> Vec<String> {
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| listener.local_addr());
    let name = format!("cofferdam-selftest-{}-{}", stage.probe.id, std::process::id());
    vec![name, port.map_or(1, |address| address.port()).to_string()]
}

async fn two_with_network(stage: &Stage<'_>) -> Outcome {
    let place = meeting_place(stage);
    let listening = match holding(stage, "listen", &place).await {
        Ok(listening) => listening,
        Err(outcome) => return outcome,
    };
    let draft = match draft_with_network(stage, "connect", &place) {
        Ok(draft) => draft,
        Err(outcome) => return outcome,
    };
    let outcome = stage.run(draft).await.verdict();
    drop(listening);
    outcome
}

async fn connect_into(stage: &Stage<'_>) -> Outcome {
    let place = meeting_place(stage);
    let listening = match holding(stage, "listen", &place).await {
        Ok(listening) => listening,
        Err(outcome) => return outcome,
    };
    let act = Act {
        id: stage.probe.id.to_owned(),
        mode: stage.theatre.mode,
        profile: stage.theatre.profile,
        role: "connect".to_owned(),
        token: String::new(),
        arguments: place.into_iter().map(Into::into).collect(),
    };
    let mut findings = Findings::default();
    meet(&act, &mut findings);
    drop(listening);
    findings.outcome()
}

async fn with_network(stage: &Stage<'_>) -> Outcome {
    let listeners = match Listeners::open(stage) {
        Ok(listeners) => listeners,
        Err(error) => return Outcome::broken(format!("the host can't listen: {error}")),
    };
    let draft = match draft_with_network(stage, "", &listeners.arguments()) {
        Ok(draft) => draft,
        Err(outcome) => return outcome,
    };
    let ended = stage.run(draft).await;
    ended.verdict().and(listeners.untouched())
}

fn network_as_needed(act: &Act, findings: &mut Findings) {
    if let Some(seen) = findings.works("list /etc", names("/etc")) {
        findings.check(seen.contains("nsswitch.conf"), "there is no /etc/nsswitch.conf");
    }
    let resolvers = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let resolvers: Vec<&str> =
        resolvers.lines().filter_map(|line| line.trim().strip_prefix("nameserver")).map(str::trim).collect();
    // The host's own loopback is another one.
    let local = resolvers.iter().filter(|address| address.starts_with("127."));
    findings.same("nameservers on the loopback", local.count(), 0);
    let gateways = fs::read_to_string("/proc/net/route").unwrap_or_default();
    let gateways: Vec<Ipv4Addr> = gateways.lines().skip(1).filter_map(gateway).collect();
    for address in gateways.into_iter().chain([Ipv4Addr::LOCALHOST]) {
        let port = port(act, 1);
        let reached = TcpStream::connect_timeout(&(address, port).into(), Duration::from_secs(2));
        findings.fails(&format!("reach a port of the host's loopback by {address}"), reached);
        // Whether it arrives is seen at the other end.
        let _ = UdpSocket::bind("0.0.0.0:0")
            .and_then(|socket| socket.send_to(b"x", (address, self::port(act, 2))));
    }
    let unix = abstract_socket(act).and_then(|address| UnixStream::connect_addr(&address));
    findings.refused("connect to an abstract socket of the host", unix, &[Errno::ECONNREFUSED, Errno::EPERM]);
}

/// The gateway of a line of `/proc/net/route`, if it has one.
fn gateway(line: &str) -> Option<Ipv4Addr> {
    let hexadecimal = line.split_whitespace().nth(2)?;
    let number = u32::from_str_radix(hexadecimal, 16).ok()?;
    (number != 0).then(|| Ipv4Addr::from(number.to_ne_bytes()))
}

/// What helpers that give a network are called.
const HELPERS: [&str; 5] = ["pasta", "passt", "pasta.avx2", "passt.avx2", "slirp4netns"];

async fn helper_ends(stage: &Stage<'_>) -> Outcome {
    let before = helpers();
    let build = match holding(stage, "", &[]).await {
        Ok(build) => build,
        Err(outcome) => return outcome,
    };
    let during: Vec<u32> = helpers().into_iter().filter(|pid| !before.contains(pid)).collect();
    let mut findings = Findings::default();
    if during.is_empty() {
        drop(build);
        return Outcome::not_applicable("no process gives builds their network here");
    }
    for pid in &during {
        let sandboxed = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let filtered = sandboxed.lines().any(|line| line.starts_with("Seccomp:") && !line.ends_with('0'));
        findings.check(
            filtered,
            format_args!("the network's process {pid} runs without a filter of system calls"),
        );
    }
    drop(build);
    let gone = eventually(Duration::from_secs(2), || !helpers().iter().any(|pid| during.contains(pid))).await;
    findings.check(gone, "the network's process outlives its build");
    findings.outcome()
}

/// The helpers on this host.
fn helpers() -> Vec<u32> {
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid: &u32| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            HELPERS.contains(&name.trim())
        })
        .collect()
}

fn kinds_of_sockets(act: &Act, findings: &mut Findings) {
    const STREAM: i64 = libc::SOCK_STREAM as i64;
    const DATAGRAM: i64 = libc::SOCK_DGRAM as i64;
    const RAW: i64 = libc::SOCK_RAW as i64;
    const SEQUENCED: i64 = libc::SOCK_SEQPACKET as i64;
    let socket = |family: i32, kind: i64, protocol: i64| {
        Call::SOCKET.make(&mut [Arg::Int(family.into()), Arg::Int(kind), Arg::Int(protocol)])
    };
    for (name, family, kind) in [("unix", libc::AF_UNIX, STREAM), ("IPv4", libc::AF_INET, STREAM)] {
        findings.works(name, socket(family, kind, 0));
    }
    findings.works("netlink for routes", socket(libc::AF_NETLINK, RAW, libc::NETLINK_ROUTE.into()));
    // Without capabilities these are nobody's in either profile.
    for (name, family) in [("packet", libc::AF_PACKET), ("raw IPv4", libc::AF_INET)] {
        let refusals = [Errno::EPERM, Errno::EAFNOSUPPORT, Errno::EACCES, Errno::EPROTONOSUPPORT];
        findings.refused(name, socket(family, RAW, 1), &refusals);
    }
    if act.profile != Profile::Strict {
        return;
    }
    const AF_SMC: i32 = 43;
    for (name, family, kind, protocol) in [
        ("AF_ALG", libc::AF_ALG, SEQUENCED, 0),
        ("AF_RXRPC", libc::AF_RXRPC, DATAGRAM, libc::AF_INET.into()),
        ("AF_PACKET", libc::AF_PACKET, RAW, 0),
        ("AF_KEY", libc::AF_KEY, RAW, 2),
        ("AF_XDP", libc::AF_XDP, RAW, 0),
        ("AF_SMC", AF_SMC, STREAM, 0),
        ("AF_TIPC", libc::AF_TIPC, DATAGRAM, 0),
        ("AF_VSOCK", libc::AF_VSOCK, STREAM, 0),
        ("AF_CAN", libc::AF_CAN, RAW, 1),
        ("AF_BLUETOOTH", libc::AF_BLUETOOTH, RAW, 1),
        ("netlink for IPsec", libc::AF_NETLINK, RAW, libc::NETLINK_XFRM.into()),
        ("netlink for netfilter", libc::AF_NETLINK, RAW, libc::NETLINK_NETFILTER.into()),
    ] {
        findings.refused(name, socket(family, kind, protocol), &[Errno::EAFNOSUPPORT]);
    }
}

/// A request as a client would write it, to a worker whose operator has said nothing of the network.
async fn uninvited(stage: &Stage<'_>) -> Outcome {
    let (request, state) =
        (stage.theatre.dir.join("request.json"), stage.theatre.dir.join("uninvited-state"));
    let json = format!(
        r#"{{"commandArgs":["/nonexistent"],"workingDir":"build","scratchPaths":["build"],"inputsDir":"nix/store",
             "constraints":{{"networkAccess":true,"system":"{}-linux"}}}}"#,
        std::env::consts::ARCH
    );
    if let Err(error) = fs::write(&request, json) {
        return Outcome::broken(format!("can't write the request: {error}"));
    }
    let mut command = Command::new(stage.theatre.own_file());
    command.arg("build").arg(&request).arg("--state-dir").arg(&state);
    let output = tokio::task::spawn_blocking(move || command.output()).await;
    let _ = (fs::remove_file(&request), fs::remove_dir_all(&state));
    match output {
        Ok(Ok(output)) => {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            let mut findings = Findings::default();
            findings.same("exit code", output.status.code(), Some(125));
            findings
                .check(said.contains("network_access"), format_args!("it does not say why: {}", said.trim()));
            findings.outcome()
        }
        Ok(Err(error)) => Outcome::broken(format!("can't run anything: {error}")),
        Err(error) => Outcome::broken(format!("can't run anything: {error}")),
    }
}
