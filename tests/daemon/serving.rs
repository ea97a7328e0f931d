//! What a daemon offers, and to whom.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use cofferdam_proto::build::{BuildRequest, build_event::Event};
use cofferdam_proto::castore::{Entry, FileEntry, entry};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tonic::Code;

use crate::client::{client, connect, constraints, events, kinds, logged, request};
use crate::named;
use crate::support::Case;
use crate::support::case::{finish, set_mode};
use crate::support::daemon::Daemon;
use crate::support::leftovers::{gone, mounts, until};

pub fn tests() -> impl IntoIterator<Item = (&'static str, fn(&Case))> {
    named![a_build_runs, the_view_is_nowhere_on_the_host, builds_wait_for_a_slot, outputs_beside_inputs]
}

pub fn own_mode_tests() -> impl IntoIterator<Item = (&'static str, fn(&Case))> {
    named![
        no_builds,
        the_socket_is_private,
        a_stale_socket_is_replaced,
        a_live_socket_is_kept,
        all_or_no_sockets,
        tcp_needs_insecure,
        a_shell_of_the_operators_choice,
        nonsense_on_the_socket,
        a_closed_stderr,
        the_log_has_no_colours,
        bad_arguments,
        bad_requests,
    ]
}

fn a_build_runs(case: &Case) {
    let daemon = Daemon::start(case, &[]);
    let events = client(events(&daemon, request("echo hi; echo x > /outputs/x", &["x"]))).unwrap();
    assert_eq!(kinds(&events), ["started", "log", "refscan", "completed"]);
    assert_eq!(logged(&events), "hi\n");
    gone("a scratch directory", || daemon.scratch());
}

fn the_view_is_nowhere_on_the_host(case: &Case) {
    let daemon = Daemon::start(case, &[]);
    client(events(&daemon, request("true", &[]))).unwrap();
    let fuse = |mounts: std::collections::BTreeSet<String>| {
        mounts.into_iter().filter(|line| line.contains(" - fuse")).collect::<Vec<_>>()
    };
    let host = fuse(mounts("self"));
    let own: Vec<_> = fuse(mounts(daemon.pid())).into_iter().filter(|mount| !host.contains(mount)).collect();
    assert_eq!(own.len(), 1, "one view, in the daemon's own mount namespace: {own:?}");
    let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/mnt")).unwrap();
    assert_ne!(namespace(&daemon.pid().to_string()), namespace("self"));
}

fn builds_wait_for_a_slot(case: &Case) {
    let daemon = Daemon::start(case, &["--max-builds", "1"]);
    let span = || async {
        let events = events(&daemon, request("date +%s%N; sleep 0.3; date +%s%N", &[])).await.unwrap();
        assert_eq!(kinds(&events).last(), Some(&"completed"));
        let times: Vec<u64> = logged(&events).lines().map(|line| line.parse().unwrap()).collect();
        (times[0], times[1])
    };
    let (a, b, c) = client(async { tokio::join!(span(), span(), span()) });
    let mut spans = [a, b, c];
    spans.sort_unstable();
    assert!(spans.windows(2).all(|pair| pair[0].1 <= pair[1].0), "two at a time: {spans:?}");
}

fn outputs_beside_inputs(case: &Case) {
    let daemon = Daemon::start(case, &[]);
    case.write("file", "an input\n");
    let added = finish(case.cofferdam(["store", "add", "file", "--to", &daemon.address()])).code(0).out();
    let digest = blake3::Hash::from_hex(added.trim()).unwrap();
    let file =
        FileEntry { name: b"input".to_vec(), digest: digest.as_bytes().to_vec(), size: 9, executable: false };
    let script = "cd /nix/store; mkdir out; ln -s ../input out/link; cat input > dev; echo more >> input; ls";
    let request = BuildRequest {
        inputs: vec![Entry { entry: Some(entry::Entry::File(file)) }],
        inputs_dir: "nix/store".into(),
        scratch_paths: vec!["build".into(), "nix/store".into()],
        outputs: vec!["nix/store/out".into(), "nix/store/dev".into()],
        refscan_needles: vec!["absent".into(), "input".into(), "../in".into()],
        ..request(script, &[])
    };
    let events = client(events(&daemon, request)).unwrap();
    let (logs, rest) = events.split_at(events.len() - 3);
    assert_eq!(kinds(rest), ["refscan", "refscan", "completed"], "{events:?}");
    let logged = logged(logs);
    assert!(logged.ends_with("dev\ninput\nout\n"), "{logged}");
    let found: Vec<_> = rest
        .iter()
        .filter_map(|event| match event {
            Event::Refscan(refscan) => Some(refscan.found_needles.clone()),
            _ => None,
        })
        .collect();
    assert_eq!(found, [vec![1, 2], vec![1]]);
    // What the build could write to was its own copy, if anything.
    let get = finish(case.cofferdam(["store", "get", added.trim(), "back", "--to", &daemon.address()]));
    get.code(0);
    assert_eq!(case.read("back"), b"an input\n");
}

fn no_builds(case: &Case) {
    let daemon = Daemon::start(case, &["--no-builds"]);
    client(async {
        let reply = connect(&daemon).await.do_build(request("true", &[])).await;
        // The refusal may come with the headers or as the first thing on the stream.
        let refusal = match reply {
            Err(status) => status,
            Ok(reply) => {
                let mut stream = reply.into_inner();
                let refusal = stream.message().await.expect_err("an event from a store");
                assert!(matches!(stream.message().await, Ok(None)), "one error, then the end");
                refusal
            }
        };
        assert_eq!(refusal.code(), Code::FailedPrecondition, "{refusal}");
        assert!(refusal.message().contains("--no-builds"), "{refusal}");
    });
    let run = finish(case.cofferdam(["store", "ls", &"00".repeat(32), "--to", &daemon.address()]));
    run.code(125).complains("00000000");
}

fn the_socket_is_private(case: &Case) {
    let daemon = Daemon::start(case, &[]);
    let mode = std::fs::metadata(daemon.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let mode = std::fs::metadata(daemon.state()).unwrap().permissions().mode();
    assert_eq!(mode & 0o077, 0, "the state directory is nobody else's");
}

fn a_stale_socket_is_replaced(case: &Case) {
    drop(UnixListener::bind(case.path("socket")).unwrap());
    let mut daemon = Daemon::start(case, &[]);
    client(events(&daemon, request("true", &[]))).unwrap();
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait(), Some(0));
    assert!(!daemon.socket().exists());
}

fn a_live_socket_is_kept(case: &Case) {
    let daemon = Daemon::start(case, &[]);
    let second = case.cofferdam(["daemon", "--state-dir", "other", "--listen", &daemon.address()]);
    finish(second).code(125).complains("socket");
    client(events(&daemon, request("true", &[]))).unwrap();
}

fn all_or_no_sockets(case: &Case) {
    case.write("taken", "");
    let listen = ["--listen", "unix:first", "--listen", "unix:taken"];
    let mut command = case.cofferdam(["daemon", "--state-dir", "state"]);
    command.args(listen);
    let ran = finish(command).code(125).complains("unix:taken");
    assert!(!ran.err().contains("listening"), "{ran}");
    assert!(!case.path("first").exists());
}

fn tcp_needs_insecure(case: &Case) {
    let refused = case.cofferdam(["daemon", "--state-dir", "state", "--listen", "127.0.0.1:0"]);
    finish(refused).code(125).complains("--insecure");
    let daemon = Daemon::start(case, &["--listen", "127.0.0.1:0", "--insecure"]);
    let port = || {
        let said = daemon.said();
        let address = said.lines().find_map(|line| line.split_once("listening on 127.0.0.1:"))?.1;
        address.split_whitespace().next()?.parse::<u16>().ok()
    };
    until("the port in the log", || port().is_some());
    let address = format!("grpc+http://127.0.0.1:{}", port().unwrap());
    case.write("file", "over tcp\n");
    let digest = finish(case.cofferdam(["store", "add", "file", "--to", &address])).code(0).out();
    finish(case.cofferdam(["store", "get", digest.trim(), "back", "--to", &address])).code(0);
    assert_eq!(case.read("back"), b"over tcp\n");
}

fn a_shell_of_the_operators_choice(case: &Case) {
    case.write("shell.c", "#include <stdio.h>\nint main(void) { puts(\"at your service\"); }\n");
    let made = finish({
        let mut gcc = case.program("gcc");
        gcc.args(["-static", "-o", "shell", "shell.c"]);
        gcc
    });
    made.code(0);
    let path = case.path("shell");
    let daemon = Daemon::start(case, &["--sandbox-shell", path.to_str().unwrap()]);
    let mut wanted = request("whatever", &[]);
    constraints(&mut wanted).available_ro_paths.clear();
    constraints(&mut wanted).provide_bin_sh = true;
    assert_eq!(logged(&client(events(&daemon, wanted)).unwrap()), "at your service\n");
    // One that could not work is refused before anything else.
    set_mode(&case.write("script", "#!/bin/sh\n"), 0o755);
    let script = case.path("script");
    let script = script.to_str().unwrap();
    finish(case.cofferdam(["daemon", "--state-dir", "other", "--sandbox-shell", script]))
        .code(125)
        .complains(script)
        .complains("ELF");
}

/// What every client of HTTP/2 says first, and empty settings.
const GREETING: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

fn nonsense_on_the_socket(case: &Case) {
    let daemon = Daemon::start(case, &[]);
    client(events(&daemon, request("true", &[]))).unwrap();
    let descriptors = || std::fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap().count();
    std::thread::sleep(Duration::from_millis(200));
    let before = descriptors();
    let after_greeting = |frames: &[u8]| [GREETING, frames].concat();
    let table = [
        Vec::new(),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        vec![0xff; 100_000],
        GREETING[..10].to_vec(),
        after_greeting(b""),
        // Headers that never come whole, longer ones than any, and ones that can't be decoded.
        after_greeting(b"\0\0\x10\x01\x04\0\0\0\x01\x82"),
        after_greeting(b"\xff\xff\xff\x01\x04\0\0\0\x01"),
        after_greeting(b"\0\0\x04\x01\x05\0\0\0\x01\xff\xff\xff\xff"),
        // Data for a stream that isn't there, and a frame of no known kind.
        after_greeting(b"\0\0\x01\0\0\0\0\0\x07x"),
        after_greeting(b"\0\0\x01\xee\0\0\0\0\0x"),
    ];
    let mut open = Vec::new();
    for bytes in table.iter().cycle().take(3 * table.len()) {
        let mut stream = UnixStream::connect(daemon.socket()).unwrap();
        // It may hang up before all is said.
        let _ = stream.write_all(bytes);
        match open.len() % 3 {
            0 => stream.shutdown(std::net::Shutdown::Write).unwrap_or(()),
            1 => stream.shutdown(std::net::Shutdown::Read).unwrap_or(()),
            _ => {}
        }
        open.push(stream);
    }
    client(events(&daemon, request("true", &[]))).unwrap();
    drop(open);
    client(events(&daemon, request("true", &[]))).unwrap();
    until("the descriptors to be closed", || descriptors() <= before);
    assert!(!daemon.said().contains("panicked"), "{}", daemon.said());
}

fn a_closed_stderr(case: &Case) {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let socket = case.path("socket");
    let address = format!("unix:{}", socket.display());
    let mut command = case.cofferdam(["daemon", "--state-dir", "state", "--no-builds", "--listen", &address]);
    let mut daemon = command.stderr(writer).spawn().unwrap();
    until("the daemon to listen", || {
        assert!(daemon.try_wait().unwrap().is_none(), "the daemon ended");
        UnixStream::connect(&socket).is_ok()
    });
    case.write("file", "");
    finish(case.cofferdam(["store", "add", "file", "--to", &address])).code(0);
    kill(Pid::from_raw(daemon.id() as i32), Signal::SIGTERM).unwrap();
    assert_eq!(daemon.wait().unwrap().code(), Some(0));
}

fn the_log_has_no_colours(case: &Case) {
    let daemon = Daemon::start(case, &[]);
    client(events(&daemon, request("true", &[]))).unwrap();
    until("the log of a build", || daemon.said().contains("build started"));
    assert!(!daemon.said().contains('\x1b'), "{:?}", daemon.said());
    let mut command = case.cofferdam(["daemon", "--state-dir", "other", "--listen", "unix:other-socket"]);
    finish({
        command.env("COFFERDAM_LOG", "cofferdam=loud");
        command
    })
    .code(125)
    .complains("COFFERDAM_LOG=\"cofferdam=loud\"");
}

fn bad_arguments(case: &Case) {
    let table: [(&[&str], &str); 7] = [
        (&["--no-such-flag"], "--no-such-flag"),
        (&["--listen", "nonsense"], "nonsense"),
        (&["--listen", "unix:no/such/dir/socket"], "no/such/dir"),
        (&["--max-builds", "0"], "--max-builds"),
        (&["--allow-host-path", "relative"], "relative"),
        (&["--sandbox-shell", "/no/such/shell"], "/no/such/shell"),
        (&["--sandbox-shell", "/etc/passwd"], "not executable"),
    ];
    for (flags, named) in table {
        let mut command = case.cofferdam(["daemon", "--state-dir", "state"]);
        command.args(flags);
        let start = Instant::now();
        let ran = finish(command).code(125);
        assert!(start.elapsed() < Duration::from_secs(5));
        assert!(ran.err().contains(named) && !ran.err().contains("panicked"), "{flags:?}; {ran}");
    }
}

fn bad_requests(case: &Case) {
    type Change = fn(&mut BuildRequest);
    let table: [(Change, Code, &str); 7] = [
        (|request| request.command_args.clear(), Code::InvalidArgument, "command_args"),
        (|request| request.working_dir = "/build".into(), Code::InvalidArgument, "working_dir"),
        (|request| request.outputs = vec!["elsewhere/x".into()], Code::InvalidArgument, "outputs[0]"),
        (
            |request| request.refscan_needles = vec!["ok".into(), String::new()],
            Code::InvalidArgument,
            "refscan_needles[1]",
        ),
        (
            |request| constraints(request).min_memory = 1 << 62,
            Code::FailedPrecondition,
            "constraints.min_memory",
        ),
        (
            |request| constraints(request).system = "riscv64-plan9".into(),
            Code::FailedPrecondition,
            "riscv64-plan9",
        ),
        (
            |request| constraints(request).available_ro_paths.push("/var".into()),
            Code::FailedPrecondition,
            "/var",
        ),
    ];
    let daemon = Daemon::start(case, &[]);
    for (change, code, named) in table {
        let mut request = request("echo ran", &[]);
        change(&mut request);
        let refusal = client(events(&daemon, request)).expect_err(named);
        assert_eq!(refusal.code(), code, "{named}: {refusal}");
        assert!(refusal.message().contains(named), "{named}: {refusal}");
    }
    assert!(daemon.scratch().is_empty());
}
