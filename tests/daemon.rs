//! `cofferdam daemon` and `cofferdam build`, from outside: over gRPC, and through what ends a daemon.

use std::future::Future;
use std::os::unix::fs::PermissionsExt;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use cofferdam_proto::build::build_service_client::BuildServiceClient;
use cofferdam_proto::build::{BuildEvent, BuildRequest, build_event::Event, build_request};
use nix::sys::signal::Signal;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

mod support;

use support::case::finish;
use support::daemon::Daemon;
use support::leftovers::{gone, marker, mounts, processes, until};
use support::{Case, host_tools};

fn main() -> ExitCode {
    let mut trials = support::in_every_mode(named![
        a_build_runs,
        a_stream_that_is_dropped_ends_the_build,
        a_dropped_build_leaves_the_others_alone,
        kill_leaves_nothing,
        a_second_terminate_leaves_nothing,
        terminate_lets_builds_end,
        the_view_is_nowhere_on_the_host,
        builds_wait_for_a_slot,
        build_command,
    ]);
    trials.extend(support::in_own_mode(named![
        no_builds,
        the_socket_is_private,
        a_stale_socket_is_replaced,
        a_live_socket_is_kept,
        tcp_needs_insecure,
        bad_arguments,
        bad_requests,
        build_command_without_a_daemon,
    ]));
    support::run(trials)
}

/// Runs a client against a deadline.
fn client<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let work = async { tokio::time::timeout(Duration::from_secs(60), work).await };
    runtime.block_on(work).expect("the daemon does not answer")
}

async fn connect(daemon: &Daemon) -> BuildServiceClient<Channel> {
    let endpoint = Endpoint::try_from(daemon.address()).unwrap();
    BuildServiceClient::new(endpoint.connect().await.unwrap())
}

/// A request for `/bin/sh -c SCRIPT` with the host's tools and one output, `outputs/x`, if any.
fn request(script: &str, outputs: &[&str]) -> BuildRequest {
    BuildRequest {
        command_args: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
        working_dir: "build".to_owned(),
        scratch_paths: vec!["build".to_owned(), "outputs".to_owned()],
        inputs_dir: "inputs".to_owned(),
        outputs: outputs.iter().map(|name| format!("outputs/{name}")).collect(),
        environment_vars: vec![build_request::EnvVar {
            key: "PATH".to_owned(),
            value: b"/usr/bin:/bin".to_vec(),
        }],
        constraints: Some(build_request::BuildConstraints {
            system: format!("{}-linux", std::env::consts::ARCH),
            available_ro_paths: host_tools().into_iter().map(str::to_owned).collect(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// All events up to the end of the stream, or the error that ended it.
async fn events(daemon: &Daemon, request: BuildRequest) -> Result<Vec<Event>, Status> {
    let mut stream = connect(daemon).await.do_build(request).await?.into_inner();
    let mut all = Vec::new();
    while let Some(BuildEvent { event }) = stream.message().await? {
        all.push(event.expect("an event of a known kind"));
    }
    Ok(all)
}

fn kinds(events: &[Event]) -> Vec<&'static str> {
    let kind = |event: &Event| match event {
        Event::Started(_) => "started",
        Event::Log(_) => "log",
        Event::Refscan(_) => "refscan",
        Event::Completed(_) => "completed",
        Event::Failed(_) => "failed",
    };
    events.iter().map(kind).collect()
}

/// What the build wrote to stdout and stderr.
fn logged(events: &[Event]) -> String {
    let data = |event: &Event| match event {
        Event::Log(log) => log.data.to_vec(),
        _ => Vec::new(),
    };
    String::from_utf8(events.iter().flat_map(data).collect()).unwrap()
}

fn a_build_runs(case: &Case) {
    let daemon = Daemon::start(case, &[]);
    let events = client(events(&daemon, request("echo hi; echo x > /outputs/x", &["x"]))).unwrap();
    assert_eq!(kinds(&events), ["started", "log", "refscan", "completed"]);
    assert_eq!(logged(&events), "hi\n");
    gone("a scratch directory", || daemon.scratch());
}

/// Starts a build that sleeps for `marker` and yields its stream once it sleeps.
async fn sleeping(daemon: &Daemon, marker: &str) -> tonic::Streaming<BuildEvent> {
    let script = format!("trap '' TERM; setsid sleep {marker} & echo ready; sleep {marker}");
    let mut stream = connect(daemon).await.do_build(request(&script, &[])).await.unwrap().into_inner();
    let started = stream.message().await.unwrap().unwrap().event;
    assert!(matches!(started, Some(Event::Started(_))), "{started:?}");
    let log = stream.message().await.unwrap().unwrap().event;
    assert!(matches!(log, Some(Event::Log(_))), "{log:?}");
    assert!(!processes(marker).is_empty());
    stream
}

fn a_stream_that_is_dropped_ends_the_build(case: &Case) {
    let daemon = Daemon::start(case, &[]);
    client(events(&daemon, request("true", &[]))).unwrap();
    let (host, own, idle) = (mounts("self"), mounts(daemon.pid()), daemon.processes().len());
    let marker = marker();
    client(async {
        let stream = sleeping(&daemon, &marker).await;
        assert_eq!(daemon.scratch().len(), 1);
        drop(stream);
    });
    gone("a process", || processes(&marker));
    gone("a scratch directory", || daemon.scratch());
    gone("a mount of the daemon's", || &mounts(daemon.pid()) - &own);
    gone("a process of the daemon's", || daemon.processes().split_off(idle.min(daemon.processes().len())));
    assert_eq!(mounts("self"), host);
    // And it is as good as before.
    let after = client(events(&daemon, request("echo x > /outputs/x", &["x"]))).unwrap();
    assert_eq!(kinds(&after), ["started", "refscan", "completed"]);
}

fn a_dropped_build_leaves_the_others_alone(case: &Case) {
    let daemon = Daemon::start(case, &["--max-builds", "2"]);
    let (doomed, script) = (marker(), "echo ready; sleep 1; echo x > /outputs/x");
    client(async {
        let other = events(&daemon, request(script, &["x"]));
        let drop_soon = async { drop(sleeping(&daemon, &doomed).await) };
        let (other, ()) = tokio::join!(other, drop_soon);
        assert_eq!(kinds(&other.unwrap()), ["started", "log", "refscan", "completed"]);
    });
    gone("a process", || processes(&doomed));
}

/// Ends a daemon while a build of it sleeps, and counts what is left.
fn ends_with(case: &Case, signals: &[Signal], exit_code: Option<i32>) {
    let before = mounts("self");
    let mut daemon = Daemon::start(case, &[]);
    let marker = marker();
    client(async {
        let mut stream = sleeping(&daemon, &marker).await;
        for signal in signals {
            daemon.signal(*signal);
            // Two of one kind that come at once are one.
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        let end = stream.message().await;
        assert!(end.is_err(), "a stream that was cut must not look like a build's end: {end:?}");
    });
    gone("a process of the build", || processes(&marker));
    gone("a process of the daemon", || daemon.processes());
    gone("a scratch directory", || daemon.scratch());
    assert_eq!(mounts("self"), before);
    let code = daemon.wait();
    assert_eq!(code, exit_code);
    // What was stored is still good.
    drop(daemon);
    let daemon = Daemon::start(case, &[]);
    client(events(&daemon, request("true", &[]))).unwrap();
}

fn kill_leaves_nothing(case: &Case) {
    ends_with(case, &[Signal::SIGKILL], None);
}

fn a_second_terminate_leaves_nothing(case: &Case) {
    ends_with(case, &[Signal::SIGTERM, Signal::SIGTERM], Some(0));
}

fn terminate_lets_builds_end(case: &Case) {
    let mut daemon = Daemon::start(case, &[]);
    client(async {
        let mut stream = connect(&daemon)
            .await
            .do_build(request("echo ready; sleep 1; echo x > /outputs/x", &["x"]))
            .await
            .unwrap()
            .into_inner();
        let started = stream.message().await.unwrap();
        assert!(started.is_some());
        // Opened before: the daemon takes no new connections once it stops.
        let mut second = connect(&daemon).await;
        daemon.signal(Signal::SIGTERM);
        tokio::time::sleep(Duration::from_millis(200)).await;
        let refused = second.do_build(request("true", &[])).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unavailable, "{refused}");
        let mut events = Vec::new();
        while let Some(event) = stream.message().await.unwrap() {
            events.extend(event.event);
        }
        assert_eq!(kinds(&events), ["log", "refscan", "completed"]);
    });
    assert_eq!(daemon.wait(), Some(0));
    gone("a process of the daemon", || daemon.processes());
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
    drop(std::os::unix::net::UnixListener::bind(case.path("socket")).unwrap());
    let daemon = Daemon::start(case, &[]);
    client(events(&daemon, request("true", &[]))).unwrap();
}

fn a_live_socket_is_kept(case: &Case) {
    let daemon = Daemon::start(case, &[]);
    let second = case.cofferdam(["daemon", "--state-dir", "other", "--listen", &daemon.address()]);
    finish(second).code(125).complains("socket");
    client(events(&daemon, request("true", &[]))).unwrap();
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

fn bad_arguments(case: &Case) {
    let table: [(&[&str], &str); 5] = [
        (&["--no-such-flag"], "--no-such-flag"),
        (&["--listen", "nonsense"], "nonsense"),
        (&["--listen", "unix:no/such/dir/socket"], "no/such/dir"),
        (&["--max-builds", "0"], "--max-builds"),
        (&["--allow-host-path", "relative"], "relative"),
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
    let table: [(Change, Code, &str); 6] = [
        (|request| request.command_args.clear(), Code::InvalidArgument, "command_args"),
        (|request| request.working_dir = "/build".into(), Code::InvalidArgument, "working_dir"),
        (|request| request.outputs = vec!["elsewhere/x".into()], Code::InvalidArgument, "outputs[0]"),
        (
            |request| request.refscan_needles = vec!["ok".into(), String::new()],
            Code::InvalidArgument,
            "refscan_needles[1]",
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

fn constraints(request: &mut BuildRequest) -> &mut build_request::BuildConstraints {
    request.constraints.get_or_insert_default()
}

/// The example request, with the paths that this host has.
fn example(case: &Case) -> String {
    let text = std::fs::read_to_string(support::repository().join("examples/request.json")).unwrap();
    let mut request: serde_json::Value = serde_json::from_str(&text).unwrap();
    request["constraints"]["system"] = format!("{}-linux", std::env::consts::ARCH).into();
    request["constraints"]["availableRoPaths"] = host_tools().into();
    let path = case.write("request.json", request.to_string());
    path.to_string_lossy().into_owned()
}

fn build_command(case: &Case) {
    let path = example(case);
    let daemon = Daemon::start(case, &[]);
    let build = |flags: &[&str]| {
        let mut command = case.cofferdam(["build", &path]);
        command.args(flags);
        finish(command)
    };
    build(&["--to", &daemon.address()]).code(0).says("Hello from a request.\n");
    build(&["--to", &format!("grpc+{}", daemon.address())]).code(0).says("Hello from a request.\n");
    let events = build(&["--json", "--to", &daemon.address()]).code(0).json();
    assert!(events.last().unwrap().get("completed").is_some(), "{events:?}");
    let digest =
        events.last().unwrap()["completed"]["outputs"][0]["output"]["file"]["digest"].as_str().unwrap();
    assert_eq!(digest.len(), 44, "32 bytes as base64");
    build(&["--to", "unix:no-such-socket"]).code(125).complains("no-such-socket");
}

fn build_command_without_a_daemon(case: &Case) {
    let path = example(case);
    finish(case.cofferdam(["build", &path, "--state-dir", "state"])).code(125).complains("--allow-host-path");
    let allowed = host_tools().into_iter().flat_map(|path| ["--allow-host-path", path]);
    let mut build = case.cofferdam(["build", &path, "--state-dir", "state"]);
    build.args(allowed);
    finish(build).code(0).says("Hello from a request.\n");
    let table = [
        ("{", "line 1"),
        (r#"{"noSuchField": 1}"#, "noSuchField"),
        (r#"{"commandArgs": "true"}"#, "column 22: invalid type: string \"true\", expected a list"),
        (r#"{"commandArgs": [], "workingDir": "build"}"#, "command_args"),
        (r#"{"commandArgs": ["/bin/sh"], "workingDir": "/"}"#, "working_dir"),
    ];
    for (text, named) in table {
        case.write("bad.json", text);
        let ran = finish(case.cofferdam(["build", "bad.json"])).code(125).says("");
        assert!(ran.err().contains(named), "{text} is not told by {named:?}; {ran}");
    }
    finish(case.cofferdam(["build", "no-such.json"])).code(125).complains("no-such.json");
}
