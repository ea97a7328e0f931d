//! What a build with a network of its own reaches, what it doesn't, and what is left of it.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, Ipv6Addr, TcpStream, ToSocketAddrs};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::time::{Duration, Instant};

use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::named;
use crate::support::case::{Running, finish};
use crate::support::leftovers::{gone, marker, names, processes, until};
use crate::support::world::{GATEWAY, GATEWAY_IPV6, Greeter, HOST, MEANING, OUTSIDE, World, name_server};
use crate::support::{self, Case, Mode};

type Test = fn(&Case, &World);

/// One trial a mode, each with a world of its own.
pub fn trials() -> Vec<Trial> {
    let tests: [(&str, Test); 14] = named![
        the_outside_is_in_reach,
        the_hosts_loopback_is_not,
        nor_are_the_hosts_abstract_sockets,
        nobody_can_connect_in,
        names_are_resolved_by_the_hosts_stub,
        names_are_resolved_by_servers_outside,
        the_files_of_etc,
        each_build_has_a_namespace_of_its_own,
        its_forwarder_is_confined,
        nothing_stays_however_it_ends,
        nor_of_a_daemon_that_is_killed,
        without_its_forwarder_a_build_ends,
        a_host_without_a_network_gives_none,
        without_pasta_none_is_promised,
    ];
    let trial = |name: &str, mode: Mode, test: Test| {
        support::fallible(format!("network_{name}::{mode}"), mode, move |case| {
            test(case, &World::new(case, "nameserver 127.0.0.53\noptions edns0\nsearch test.example\n")?);
            Ok(())
        })
    };
    tests.into_iter().flat_map(|(name, test)| Mode::ALL.map(|mode| trial(name, mode, test))).collect()
}

/// A command that says what the greeter at an address says, or that it can't. Some versions of pasta leave an attempt
/// that is refused without an answer.
fn ask(address: &str, port: u16) -> String {
    format!(
        "timeout 2 bash -c 'read -r line <>/dev/tcp/{address}/{port} && echo \"$line\"' 2>/dev/null || echo no {address}\n"
    )
}

fn the_outside_is_in_reach(case: &Case, world: &World) {
    world.outside(|| {
        Greeter::listen((Ipv4Addr::UNSPECIFIED, 7), "hello");
        Greeter::listen((GATEWAY_IPV6.parse::<Ipv6Addr>().unwrap(), 8), "hello again");
    });
    let script = [ask(OUTSIDE, 7), ask(GATEWAY, 7), ask(GATEWAY_IPV6, 8)].concat();
    finish(world.run(case, &["--network"], &script)).code(0).says("hello\nhello\nhello again\n");
    finish(world.run(case, &["--network=pasta"], &ask(OUTSIDE, 7))).code(0).says("hello\n");
    // Only where it is asked for.
    finish(world.run(case, &[], &ask(OUTSIDE, 7))).code(0).says(&format!("no {OUTSIDE}\n"));
}

fn the_hosts_loopback_is_not(case: &Case, world: &World) {
    let greeters = world.on_host(|| {
        [
            Greeter::listen((Ipv4Addr::LOCALHOST, 7), "loopback"),
            Greeter::listen((Ipv6Addr::LOCALHOST, 7), "loopback"),
            Greeter::listen((Ipv4Addr::new(127, 0, 0, 53), 53), "loopback"),
        ]
    });
    // The host itself does reach them.
    finish(world.run(case, &["--network=host"], &ask("127.0.0.1", 7))).code(0).says("loopback\n");
    finish(world.run(case, &["--network=host"], &ask("::1", 7))).code(0).says("loopback\n");
    let before: usize = greeters.iter().map(Greeter::greeted).sum();
    assert_eq!(before, 2);
    let addresses =
        ["127.0.0.1", "::1", "localhost", "0.0.0.0", GATEWAY, GATEWAY_IPV6, HOST, "fd00:1::2", "169.254.1.1"];
    // All at once: each may take its time to fail.
    let ask = |(number, address): (usize, &&str)| format!("( {} ) > {number} &\n", ask(address, 7));
    let script: String = addresses.iter().enumerate().map(ask).chain(["wait; cat ?".into()]).collect();
    let expected: String = addresses.iter().map(|address| format!("no {address}\n")).collect();
    finish(world.run(case, &["--network"], &script)).code(0).says(&expected);
    let after: usize = greeters.iter().map(Greeter::greeted).sum();
    assert_eq!(after, before, "somebody came");
}

fn nor_are_the_hosts_abstract_sockets(case: &Case, world: &World) {
    let name = format!("cofferdam-test-{}", marker());
    let _listener =
        world.on_host(|| UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap());
    let connect = format!(
        "use Socket; socket(S, AF_UNIX, SOCK_STREAM, 0) or die; print connect(S, pack_sockaddr_un(\"\\0{name}\")) ? 'in' : $!"
    );
    // The host itself does reach it.
    let host = std::process::Command::new("perl");
    let seen = world.on_host(move || {
        let mut host = host;
        host.args(["-e", &connect]).output().map(|run| (run.stdout, connect)).unwrap()
    });
    let (seen, connect) = seen;
    assert_eq!(String::from_utf8_lossy(&seen), "in");
    let mut command = world.cofferdam(case);
    command.args(["run", "--host-tools", "--network", "--", "perl", "-e", &connect]);
    finish(command).code(0).says("Connection refused");
}

fn nobody_can_connect_in(case: &Case, world: &World) {
    let script = "use IO::Socket::INET; $| = 1; \
                  my $l = IO::Socket::INET->new(Listen => 5, LocalAddr => '0.0.0.0', LocalPort => 7777) or die; \
                  print \"ready\\n\"; alarm 60; $l->accept; print \"somebody came\\n\"";
    let mut command = world.cofferdam(case);
    command.args(["run", "--host-tools", "--network", "--", "perl", "-e", script]);
    let mut running = Running::start(command);
    running.wait_for("ready");
    let connect = |address: &str| {
        let address = (address, 7777).to_socket_addrs().unwrap().next().unwrap();
        TcpStream::connect_timeout(&address, Duration::from_secs(2)).map(drop).map_err(|error| error.kind())
    };
    // For a while: left to itself, pasta looks once a second for ports to forward.
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(3) {
        for address in ["127.0.0.1", HOST, "::1", "fd00:1::2"] {
            assert_eq!(world.on_host(|| connect(address)), Err(ErrorKind::ConnectionRefused), "{address}");
        }
        for address in [HOST, "fd00:1::2"] {
            assert_eq!(world.outside(|| connect(address)), Err(ErrorKind::ConnectionRefused), "{address}");
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    running.signal(Signal::SIGINT);
    let ran = running.finish();
    assert_eq!(ran.out(), "ready\n");
}

fn names_are_resolved_by_the_hosts_stub(case: &Case, world: &World) {
    world.on_host(|| name_server(Ipv4Addr::new(127, 0, 0, 53).into()));
    let script = "getent ahostsv4 something.example | cut -d' ' -f1 | sort -u; cat /etc/resolv.conf";
    let expected = format!("{MEANING}\nnameserver 169.254.1.1\noptions edns0\nsearch test.example\n");
    finish(world.run(case, &["--network"], script)).code(0).says(&expected);
}

fn names_are_resolved_by_servers_outside(case: &Case, world: &World) {
    world.outside(|| name_server(OUTSIDE.parse().unwrap()));
    world.outside(|| name_server(GATEWAY_IPV6.parse().unwrap()));
    world.on_host(|| name_server(Ipv6Addr::LOCALHOST.into()));
    let rows = [
        // The first does not answer, and is asked once.
        (
            "options timeout:1 attempts:1\nnameserver 198.51.100.9\nnameserver 198.51.100.1\n",
            "198.51.100.9\n198.51.100.1\n",
        ),
        ("nameserver fd00:1::1\n", "fd00:1::1\n"),
        ("nameserver ::1\n", "fd63:6f66:6665:7264::53\n"),
    ];
    for (resolv_conf, servers) in rows {
        // The file that is mounted there.
        std::fs::write(case.path("resolv.conf.of-the-host"), resolv_conf).unwrap();
        let script = "getent ahostsv4 something.example | cut -d' ' -f1 | sort -u; sed -n 's/^nameserver //p' /etc/resolv.conf";
        finish(world.run(case, &["--network"], script)).code(0).says(&format!("{MEANING}\n{servers}"));
    }
}

fn the_files_of_etc(case: &Case, world: &World) {
    let script = "cd /etc; ls -A | grep -v alternatives; cat nsswitch.conf; cmp services /inputs/services && \
                  cmp hosts /inputs/hosts && echo same; find . -path ./alternatives -prune -o -type f -perm /222 -print";
    let inputs = ["--network", "--input", "services=/etc/services", "--input", "hosts=/etc/hosts"];
    let ssl = std::path::Path::new("/etc/ssl/certs/ca-certificates.crt").exists();
    let expected = format!(
        "group\nhosts\nnsswitch.conf\npasswd\nresolv.conf\nservices\n{}hosts: files dns\nservices: files\nsame\n",
        if ssl { "ssl\n" } else { "" }
    );
    finish(world.run(case, &inputs, script)).code(0).says(&expected);
    if ssl {
        let inputs = ["--network", "--input", "certs=/etc/ssl/certs/ca-certificates.crt"];
        let script = "cmp /etc/ssl/certs/ca-certificates.crt /inputs/certs && ls /etc/ssl/certs";
        finish(world.run(case, &inputs, script)).code(0).says("ca-certificates.crt\n");
    }
}

fn each_build_has_a_namespace_of_its_own(case: &Case, world: &World) {
    let script =
        "readlink /proc/self/ns/net; tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' ' | sort; read -r line";
    let [mut first, mut second] = [(); 2].map(|()| {
        Running::start(world.run(case, &["--network"], &format!("{script}; echo ready; sleep 60")))
    });
    for running in [&mut first, &mut second] {
        running.wait_for("ready");
    }
    assert_eq!(world.forwarders().len(), 2);
    let seen = [first, second].map(|running| {
        running.signal(Signal::SIGINT);
        running.finish().out()
    });
    let host = world.on_host(|| std::fs::read_link("/proc/thread-self/ns/net").unwrap());
    assert_ne!(seen[0], seen[1]);
    for seen in seen {
        let lines: Vec<&str> = seen.lines().collect();
        assert_eq!(lines[1..], ["eth0", "lo", "ready"], "{seen}");
        assert!(lines[0].starts_with("net:[") && lines[0] != host.to_str().unwrap(), "{seen}");
    }
}

fn its_forwarder_is_confined(case: &Case, world: &World) {
    let script = "echo ready; sleep 60";
    let mut running = Running::start(world.run(case, &["--network"], script));
    running.wait_for("ready");
    let [pid] = world.forwarders()[..] else { panic!("{:?}", world.processes()) };
    let of = |pid: &str, name: &str| std::fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap();
    let (own, pid) = (running.pid().to_string(), pid.to_string());
    for namespace in ["mnt", "user", "ipc", "uts", "pid"] {
        assert_ne!(of(&own, namespace), of(&pid, namespace), "{namespace}");
    }
    assert_eq!(std::fs::read(format!("/proc/{pid}/environ")).unwrap(), b"");
    // Nothing to read but an empty directory.
    assert!(names(std::path::Path::new(&format!("/proc/{pid}/root"))).is_empty());
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field =
        |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
    assert_eq!(field("NoNewPrivs:"), "1");
    // pasta's own, and one against unix sockets.
    assert_eq!((field("Seccomp:").as_str(), field("Seccomp_filters:").as_str()), ("2", "2"), "{status}");
    // Under whatever id it is root in the build's namespace: on the host it is nobody, or who runs cofferdam.
    let uid: u32 = field("Uid:").split_whitespace().next().unwrap().parse().unwrap();
    match case.mode {
        Mode::Root => assert!(uid >= 0x7000_0000, "{uid}"),
        Mode::Range => assert!(uid >= 700_100, "{uid}"),
        Mode::Single => assert_eq!(uid, 7002),
    }
    // Of descriptors it has those it has made, and the three it was given.
    let fds = names(std::path::Path::new(&format!("/proc/{pid}/fd")));
    let target = |fd: &String| std::fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap();
    let strange = |what: &str| {
        !["socket:", "pipe:", "net:", "anon_inode:", "/dev/net/tun", "/memfd:cofferdam-words"]
            .iter()
            .any(|known| what.starts_with(known))
    };
    let strangers: Vec<_> = fds.iter().map(target).filter(|what| strange(what.to_str().unwrap())).collect();
    assert!(strangers.is_empty(), "{strangers:?}");
    running.signal(Signal::SIGINT);
    running.finish();
}

fn nothing_stays_however_it_ends(case: &Case, world: &World) {
    finish(world.run(case, &["--network"], "true")).code(0);
    gone("a process after success", || world.processes());
    finish(world.run(case, &["--network"], "exit 3")).code(3);
    gone("a process after failure", || world.processes());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGKILL] {
        let marker = marker();
        let mut running =
            Running::start(world.run(case, &["--network"], &format!("echo ready; sleep {marker}")));
        running.wait_for("ready");
        assert_eq!(world.forwarders().len(), 1);
        running.signal(signal);
        gone("a process after a signal", || world.processes());
        gone("a build", || processes(&marker));
        running.finish();
    }
    // Nor where the one that started it is gone before it.
    let mut running = Running::start(world.run(case, &["--network"], "echo ready; sleep 60"));
    running.wait_for("ready");
    let spawner = world.processes().into_iter().find_map(|line| {
        let (pid, arguments) = line.split_once(' ')?;
        arguments.starts_with("cofferdam: spawner").then(|| pid.parse().unwrap())
    });
    kill(Pid::from_raw(spawner.unwrap()), Signal::SIGKILL).unwrap();
    gone("a process after the spawner", || world.processes());
    running.finish().code(125);
    gone("something in TMPDIR", || names(&case.tmp()));
    // And in the midst of its start, at first without a spawner that could remove its directory.
    for wait in [5, 15, 25, 35, 50, 80] {
        let running = Running::start(world.run(case, &["--network"], "sleep 60"));
        std::thread::sleep(Duration::from_millis(wait));
        running.signal(Signal::SIGKILL);
        gone("a process after an early signal", || world.processes());
        running.finish();
    }
}

fn nor_of_a_daemon_that_is_killed(case: &Case, world: &World) {
    let marker = marker();
    let request = serde_json::json!({
        "commandArgs": ["/bin/sh", "-c", format!("echo ready; sleep {marker}")],
        "workingDir": "build",
        "scratchPaths": ["build"],
        "inputsDir": "inputs",
        // /usr/bin:/bin
        "environmentVars": [{ "key": "PATH", "value": "L3Vzci9iaW46L2Jpbg==" }],
        "constraints": {
            "system": format!("{}-linux", std::env::consts::ARCH),
            "availableRoPaths": support::host_tools(),
            "networkAccess": true,
        },
    });
    case.write("request.json", request.to_string());
    let start = |network: &[&str]| {
        let mut daemon = world.cofferdam(case);
        daemon.args(["daemon", "--listen", "unix:socket", "--state-dir", "state"]).args(network);
        for path in support::host_tools() {
            daemon.args(["--allow-host-path", path]);
        }
        let daemon = Running::start(daemon);
        until("the daemon to listen", || UnixStream::connect(case.path("socket")).is_ok());
        daemon
    };
    let ask = || case.cofferdam(["build", "request.json", "--to", "unix:socket"]);
    // Only an operator gives a network.
    let daemon = start(&[]);
    finish(ask()).code(125).complains("network_access").complains("--allow-network");
    daemon.signal(Signal::SIGTERM);
    daemon.finish().code(0);
    let daemon = start(&["--allow-network", "pasta"]);
    let mut builds = [(); 2].map(|()| Running::start(ask()));
    builds.iter_mut().for_each(|build| build.wait_for("ready"));
    assert_eq!(world.forwarders().len(), 2);
    // One of them is cancelled: its client goes.
    let [first, second] = builds;
    first.signal(Signal::SIGKILL);
    first.finish();
    gone("a forwarder", || world.forwarders().split_off(1));
    daemon.signal(Signal::SIGKILL);
    gone("a process", || world.processes());
    gone("a build", || processes(&format!("sleep {marker}")));
    daemon.finish().complains("network=pasta");
    second.finish().code(125);
}

fn without_its_forwarder_a_build_ends(case: &Case, world: &World) {
    let marker = marker();
    let mut running = Running::start(world.run(case, &["--network"], &format!("echo ready; sleep {marker}")));
    running.wait_for("ready");
    let [pid] = world.forwarders()[..] else { panic!("{:?}", world.processes()) };
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    running.finish().code(125).complains("lost its network").complains("signal 9");
    gone("a build", || processes(&marker));
    gone("a process", || world.processes());
}

fn a_host_without_a_network_gives_none(case: &Case, world: &World) {
    world.unplug();
    let greeter = world.on_host(|| Greeter::listen((Ipv4Addr::LOCALHOST, 7), "loopback"));
    let script =
        ["echo started\n".into(), ask(OUTSIDE, 7), ask("169.254.2.2", 7), ask("127.0.0.1", 7)].concat();
    let ran = finish(world.run(case, &["--network"], &script));
    match ran.out().as_str() {
        // pasta of 2023 does not go without; by its own words.
        "" => drop(ran.code(125).complains("pasta exited").complains("interface")),
        // Newer ones do, and wait for one.
        _ => drop(ran.code(0).says(&format!("started\nno {OUTSIDE}\nno 169.254.2.2\nno 127.0.0.1\n"))),
    }
    assert_eq!(greeter.greeted(), 0);
    gone("a process", || world.processes());
}

fn without_pasta_none_is_promised(case: &Case, _: &World) {
    case.make_dir("bin");
    let path = case.path("bin").into_os_string();
    let mut run = case.run_command(&["--network"], "true");
    run.env("PATH", &path);
    finish(run).code(125).complains("passt").complains("--network=host");
    let mut daemon = case.cofferdam(["daemon", "--listen", "unix:socket", "--state-dir", "state"]);
    daemon.arg("--allow-network=pasta").env("PATH", &path);
    finish(daemon).code(125).complains("passt").complains("--allow-network=host");
    assert!(!case.path("socket").exists());
}
