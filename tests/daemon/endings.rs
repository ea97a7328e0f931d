//! However a build or a daemon ends, nothing of it stays.

use std::time::{Duration, Instant};

use cofferdam_proto::build::{BuildEvent, build_event::Event};
use nix::sys::signal::Signal;
use tonic::{Code, Streaming};

use crate::client::{client, connect, events, kinds, request};
use crate::named;
use crate::support::Case;
use crate::support::daemon::Daemon;
use crate::support::leftovers::{LIMIT, gone, marker, mounts, names, processes, until};

pub fn tests() -> impl IntoIterator<Item = (&'static str, fn(&Case))> {
    named![
        a_stream_that_is_dropped_ends_the_build,
        a_dropped_build_leaves_the_others_alone,
        whoever_stops_waiting_leaves_the_queue,
        dropped_while_taking_in,
        fifty_dropped_builds_leave_no_descriptor,
        kill_leaves_nothing,
        kill_while_taking_in,
        a_second_terminate_leaves_nothing,
        a_second_terminate_while_taking_in,
        terminate_lets_builds_end,
    ]
}

/// Starts a build that sleeps for `marker` and yields its stream once it sleeps.
async fn sleeping(daemon: &Daemon, marker: &str) -> Streaming<BuildEvent> {
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

fn whoever_stops_waiting_leaves_the_queue(case: &Case) {
    let daemon = Daemon::start(case, &["--max-builds", "1", "--max-waiting", "1"]);
    let (running, waiting) = (marker(), marker());
    client(async {
        let first = sleeping(&daemon, &running).await;
        let mut queued = connect(&daemon).await;
        let queued = tokio::spawn(async move {
            // An impatient one may have taken the place before.
            while let Err(refused) = queued.do_build(request("true", &[])).await {
                assert_eq!(refused.code(), Code::ResourceExhausted);
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
        // There is one place in the queue: a further request is refused once it is taken.
        let refused = async || {
            let impatient = request(&format!(": {waiting}; sleep {waiting}"), &[]);
            let mut client = connect(&daemon).await;
            match tokio::time::timeout(Duration::from_millis(100), client.do_build(impatient)).await {
                Ok(Err(status)) => Some(status.code()),
                Ok(Ok(_)) => panic!("two builds run at a time"),
                // This one waited, and has left again.
                Err(_) => None,
            }
        };
        let soon = Instant::now() + LIMIT;
        while refused().await != Some(Code::ResourceExhausted) {
            assert!(Instant::now() < soon, "the queue has more than one place");
        }
        queued.abort();
        while refused().await.is_some() {
            assert!(Instant::now() < soon + LIMIT, "who is gone still waits");
        }
        drop(first);
        // The daemon may not have heard yet that the last impatient one, or the first, is gone.
        let last = loop {
            match events(&daemon, request("echo x > /outputs/x", &["x"])).await {
                Ok(last) => break last,
                Err(refused) => assert_eq!(refused.code(), Code::ResourceExhausted),
            }
            assert!(Instant::now() < soon + 2 * LIMIT, "who is gone still has its place");
        };
        assert_eq!(kinds(&last), ["started", "refscan", "completed"]);
    });
    gone("a process", || processes(&running));
    gone("a process", || processes(&waiting));
    gone("a scratch directory", || daemon.scratch());
}

/// Starts a build with a large output and yields its stream while the daemon reads that.
async fn taking_in(daemon: &Daemon) -> Streaming<BuildEvent> {
    let marker = marker();
    let script = format!(": {marker}; truncate -s 4G /outputs/x; echo made");
    let mut stream = connect(daemon).await.do_build(request(&script, &["x"])).await.unwrap().into_inner();
    for _ in ["started", "log"] {
        stream.message().await.unwrap().unwrap();
    }
    until("the build's end", || processes(&marker).is_empty());
    let next = tokio::time::timeout(Duration::from_millis(100), stream.message()).await;
    assert!(next.is_err(), "the output is read too fast for this test: {next:?}");
    stream
}

fn half_made_blobs(daemon: &Daemon) -> std::collections::BTreeSet<String> {
    names(&daemon.state().join("store/tmp"))
}

fn dropped_while_taking_in(case: &Case) {
    let daemon = Daemon::start(case, &["--max-builds", "1"]);
    client(async { drop(taking_in(&daemon).await) });
    gone("a scratch directory", || daemon.scratch());
    gone("a blob in the making", || half_made_blobs(&daemon));
    // The only slot is free again.
    client(events(&daemon, request("true", &[]))).unwrap();
}

fn fifty_dropped_builds_leave_no_descriptor(case: &Case) {
    let daemon = Daemon::start(case, &[]);
    let marker = marker();
    let drop_one = async |phase: usize| {
        let mut client = connect(&daemon).await;
        let call = client.do_build(request(&format!("echo ready; sleep {marker}"), &[]));
        if phase == 0 {
            let _ = tokio::time::timeout(Duration::from_millis(5), call).await;
            return;
        }
        let mut stream = call.await.unwrap().into_inner();
        for _ in 0..phase {
            stream.message().await.unwrap().unwrap();
        }
    };
    client(drop_one(2));
    client(events(&daemon, request("true", &[]))).unwrap();
    let descriptors = || std::fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap().count();
    gone("a process", || processes(&marker));
    gone("a scratch directory", || daemon.scratch());
    std::thread::sleep(Duration::from_millis(200));
    let before = descriptors();
    client(async {
        for n in 0..50 {
            drop_one(n % 3).await;
        }
    });
    gone("a process", || processes(&marker));
    gone("a scratch directory", || daemon.scratch());
    until("the descriptors to be closed", || descriptors() <= before);
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

/// The same, while the daemon reads an output.
fn ends_while_taking_in(case: &Case, signals: &[Signal], exit_code: Option<i32>) {
    let mut daemon = Daemon::start(case, &[]);
    let took = client(async {
        let mut stream = taking_in(&daemon).await;
        let mut last = Instant::now();
        for signal in signals {
            tokio::time::sleep(Duration::from_millis(100)).await;
            last = Instant::now();
            daemon.signal(*signal);
        }
        let end = stream.message().await;
        assert!(end.is_err(), "a stream that was cut must not look like a build's end: {end:?}");
        assert_eq!(daemon.wait(), exit_code);
        last.elapsed()
    });
    assert!(took < LIMIT, "took {took:?}");
    gone("a process of the daemon", || daemon.processes());
    gone("a scratch directory", || daemon.scratch());
    drop(daemon);
    let daemon = Daemon::start(case, &[]);
    assert!(half_made_blobs(&daemon).is_empty());
    client(events(&daemon, request("true", &[]))).unwrap();
}

fn kill_while_taking_in(case: &Case) {
    ends_while_taking_in(case, &[Signal::SIGKILL], None);
}

fn a_second_terminate_while_taking_in(case: &Case) {
    ends_while_taking_in(case, &[Signal::SIGTERM, Signal::SIGTERM], Some(0));
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
        daemon.signal(Signal::SIGTERM);
        tokio::time::sleep(Duration::from_millis(200)).await;
        // Until the last build has ended clients are let in, and told.
        let refused = connect(&daemon).await.do_build(request("true", &[])).await.unwrap_err();
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
