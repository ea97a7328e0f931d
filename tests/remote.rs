//! Stores chosen by URL, and above all remote ones: a daemon that has another one as its store.

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use cofferdam_proto::build::{BuildRequest, build_event::Event};
use cofferdam_proto::castore::{DirectoryEntry, Entry, FileEntry, entry};
use nix::sys::signal::Signal;
use tonic::{Code, Status};

#[path = "daemon/client.rs"]
#[allow(dead_code, reason = "every test binary uses a part of this")]
mod client;
mod support;
#[path = "remote/tls.rs"]
mod tls;

use client::{client, connect, events, kinds, logged, request};
use support::case::{self, Ran, finish};
use support::daemon::Daemon;
use support::leftovers::{gone, marker, names, processes};
use support::{Case, Mode};
use tls::a_store_behind_tls;

fn main() -> ExitCode {
    let mut trials = support::in_every_mode(named![
        what_one_built_the_other_reads,
        a_store_elsewhere_on_this_machine,
        a_silent_store_ends_the_build
    ]);
    trials.extend(support::in_every_mode_without_fuse(named![copies_come_from_far_as_well]));
    trials.extend(support::in_own_mode(named![
        killed_and_restarted_under_load,
        a_store_that_comes_later,
        a_store_in_memory,
        what_is_no_store,
        a_store_behind_tls
    ]));
    trials.push(support::in_mode("a_full_cache", Mode::Root, a_full_cache));
    support::run(trials)
}

/// A daemon that only keeps a store.
fn far(case: &Case) -> Daemon {
    Daemon::start_as(case, "far-", &["--no-builds"])
}

/// Where that answers, as the setting says it.
fn url(case: &Case) -> String {
    format!("grpc+unix:{}", case.path("far-socket").display())
}

/// A daemon that builds, and has it as its store.
fn near(case: &Case, seconds: &str, flags: &[&str]) -> Daemon {
    let url = url(case);
    Daemon::start_as(case, "near-", &[&["--store", &url, "--store-timeout", seconds], flags].concat())
}

fn store(case: &Case, daemon: &Daemon, args: &[&str]) -> Ran {
    let mut command = case.cofferdam(["store"]);
    command.args(args).arg("--to").arg(daemon.address());
    finish(command)
}

fn add(case: &Case, daemon: &Daemon, path: &str) -> [u8; 32] {
    let added = store(case, daemon, &["add", path]).code(0).out();
    *blake3::Hash::from_hex(added.trim()).unwrap().as_bytes()
}

fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A directory without subdirectories, as the input `name`.
fn directory(name: &str, digest: [u8; 32], entries: u64) -> Entry {
    let directory = DirectoryEntry { name: name.into(), digest: digest.to_vec(), size: 2 * entries };
    Entry { entry: Some(entry::Entry::Directory(directory)) }
}

fn file(name: &str, digest: [u8; 32], size: u64) -> Entry {
    let file = FileEntry { name: name.into(), digest: digest.to_vec(), size, executable: false };
    Entry { entry: Some(entry::Entry::File(file)) }
}

/// What a build made, under a name.
fn output(events: &[Event], name: &str) -> Entry {
    let Some(Event::Completed(completed)) = events.last() else { panic!("{events:?}") };
    let mut output = completed.outputs[0].output.clone().unwrap();
    match output.entry.as_mut().unwrap() {
        entry::Entry::Directory(directory) => directory.name = name.into(),
        entry::Entry::File(file) => file.name = name.into(),
        entry::Entry::Symlink(link) => link.name = name.into(),
    }
    output
}

fn digest_of(entry: &Entry) -> String {
    match entry.entry.as_ref().unwrap() {
        entry::Entry::Directory(directory) => hex(&directory.digest),
        entry::Entry::File(file) => hex(&file.digest),
        entry::Entry::Symlink(_) => panic!("a link has no digest"),
    }
}

fn build(daemon: &Daemon, script: &str, inputs: Vec<Entry>) -> Result<Vec<Event>, Status> {
    client(events(daemon, BuildRequest { inputs, ..request(script, &["x"]) }))
}

/// Bytes like no others of another seed.
fn noise(seed: usize, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// The worker says that it is the store, and which.
#[track_caller]
fn assert_blames_the_store(case: &Case, status: &Status) {
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert!(status.message().contains(&url(case)), "{status}");
}

fn what_one_built_the_other_reads(case: &Case) {
    let far = Daemon::start_as(case, "far-", &[]);
    let near = near(case, "20", &[]);
    let big = noise(0, 3 << 20);
    case.write("tree/big", &big);
    case.write("tree/small", "small\n");
    let tree = directory("tree", add(case, &far, "tree"), 2);
    let script = "cp /inputs/tree/big /outputs/x && cat /inputs/tree/small";
    let made = build(&far, script, vec![tree.clone()]).unwrap();
    assert_eq!(kinds(&made), ["started", "log", "refscan", "completed"]);
    // What the one has built, the other reads; what it builds of that, the first has.
    let script = "mkdir -p /outputs/x/sub/empty && cp /inputs/big /outputs/x/sub/copy && \
                  ln -s sub/copy /outputs/x/link && cp -r /inputs/tree /outputs/x/tree && cat /inputs/tree/small";
    let made = build(&near, script, vec![output(&made, "big"), tree]).unwrap();
    assert_eq!(logged(&made), "small\n");
    let made = digest_of(&output(&made, "x"));
    store(case, &far, &["get", &made, "got"]).code(0);
    assert!(case.read("got/sub/copy") == big && case.read("got/link") == big);
    assert_eq!(case.read("got/tree/small"), b"small\n");
    assert!(case.path("got/sub/empty").is_dir());
    // Also where it is a single file, and where it is there already.
    for text in ["lone", "lone", "other"] {
        let made = build(&near, &format!("echo {text} > /outputs/x"), vec![]).unwrap();
        let got = format!("{text}-{}", case.path("").read_dir().unwrap().count());
        store(case, &far, &["get", &digest_of(&output(&made, "x")), &got]).code(0);
        assert_eq!(case.read(&got), format!("{text}\n").as_bytes());
    }
    // And what a client gives to the one is in the other.
    case.write("given", "given to the near one");
    let given = hex(&add(case, &near, "given"));
    store(case, &far, &["get", &given, "given-back"]).code(0);
}

fn copies_come_from_far_as_well(case: &Case) {
    let far = far(case);
    let near = near(case, "20", &["--isolation", "inputs=off"]);
    case.write("tree/big", noise(0, 3 << 20));
    let tree = directory("tree", add(case, &far, "tree"), 1);
    let made = build(&near, "cp -r /inputs/tree /outputs/x", vec![tree.clone()]).unwrap();
    assert_eq!(digest_of(&output(&made, "x")), digest_of(&tree));
}

fn a_store_elsewhere_on_this_machine(case: &Case) {
    let url = format!("local:{}", case.path("elsewhere").display());
    let first = Daemon::start_as(case, "first-", &["--store", &url]);
    let made = build(&first, "echo here > /outputs/x", vec![]).unwrap();
    assert!(names(&case.path("elsewhere")).contains("lock"));
    assert!(names(&first.state().join("store")).is_empty(), "the state directory has none");
    // There is room for one.
    let mut second =
        case.cofferdam(["daemon", "--listen", "unix:second-socket", "--state-dir", "second-state"]);
    second.args(["--store", &url]);
    finish(second).code(125).complains("elsewhere is in use by another process");
    drop(first);
    let second = Daemon::start_as(case, "second-", &["--store", &url]);
    let script = "cat /inputs/made > /outputs/x";
    let again = build(&second, script, vec![output(&made, "made")]).unwrap();
    assert_eq!(digest_of(&output(&again, "x")), digest_of(&output(&made, "x")));
}

fn a_store_in_memory(case: &Case) {
    let daemon = Daemon::start(case, &["--store", "memory:"]);
    let made = build(&daemon, "echo here > /outputs/x", vec![]).unwrap();
    let again = build(&daemon, "cat /inputs/made > /outputs/x", vec![output(&made, "made")]).unwrap();
    assert_eq!(digest_of(&output(&again, "x")), digest_of(&output(&made, "x")));
    drop(daemon);
    assert!(names(&case.path("state/store")).is_empty());
    let daemon = Daemon::start(case, &["--store", "memory:"]);
    let gone = build(&daemon, "true", vec![output(&made, "made")]).unwrap_err();
    assert_eq!(gone.code(), Code::FailedPrecondition, "{gone}");
    // One-shot builds take the same setting.
    finish(case.run_command(&["--store", "memory:", "--output", "y"], "echo once > /outputs/y")).code(0);
    assert_eq!(case.read("y"), b"once\n");
}

fn what_is_no_store(case: &Case) {
    case.write("full/tmp/precious", "mine");
    let open = case.make_dir("open");
    case::set_mode(&open, 0o777);
    let table = [
        (["--store", "http://localhost:1"], "its scheme is unknown"),
        (["--store", "grpc+unix:"], "the path of the socket is missing"),
        (["--store", "local:full"], "full is not empty and no store"),
        (["--store", "local:open"], "others than its owner may write"),
        (["--store-timeout", "0"], "--store-timeout"),
    ];
    for (flags, told) in table {
        for command in
            [&["daemon", "--listen", "unix:s"][..], &["daemon", "--no-builds", "--listen", "unix:s"]]
        {
            let mut daemon = case.cofferdam(command);
            daemon.args(["--state-dir", "state"]).args(flags);
            finish(daemon).code(125).complains(told);
        }
        case.run(&flags, "echo ran").code(125).says("").complains(told);
    }
    assert_eq!(case.read("full/tmp/precious"), b"mine");
}

fn a_store_that_comes_later(case: &Case) {
    let near = near(case, "1", &[]);
    let absent = file("x", [7; 32], 1);
    let start = Instant::now();
    let refused = build(&near, "true", vec![absent.clone()]).unwrap_err();
    assert_blames_the_store(case, &refused);
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
    // Its outputs could be built, but not be kept.
    let lost = build(&near, "echo x > /outputs/x", vec![]).unwrap_err();
    assert_blames_the_store(case, &lost);
    let far = far(case);
    build(&near, "echo x > /outputs/x", vec![]).unwrap();
    let missing = build(&near, "true", vec![absent]).unwrap_err();
    assert_eq!(missing.code(), Code::FailedPrecondition, "{missing}");
    drop(far);
}

/// The far daemon stands still while a build reads.
fn a_silent_store_ends_the_build(case: &Case) {
    let far = far(case);
    let near = near(case, "2", &[]);
    case.write("tree/big", noise(0, 3 << 20));
    let tree = directory("tree", add(case, &far, "tree"), 1);
    let marker = marker();
    let script = format!(": {marker}; echo ready; sleep 1; cat /inputs/tree/big > /dev/null; sleep {marker}");
    let silent = client(async {
        let request = BuildRequest { inputs: vec![tree.clone()], ..request(&script, &[]) };
        let mut stream = connect(&near).await.do_build(request).await.unwrap().into_inner();
        for _ in ["started", "log"] {
            stream.message().await.unwrap().unwrap();
        }
        far.signal(Signal::SIGSTOP);
        let start = Instant::now();
        let end = stream.message().await.unwrap_err();
        assert!(start.elapsed() < Duration::from_secs(7), "{:?}", start.elapsed());
        end
    });
    assert_blames_the_store(case, &silent);
    assert!(silent.message().contains("within 2 s"), "{silent}");
    gone("a process of the build, be it in D state", || processes(&marker));
    gone("a scratch directory", || near.scratch());
    far.signal(Signal::SIGCONT);
    // For so long the failure is told to others.
    std::thread::sleep(Duration::from_secs(1));
    let made = build(&near, "cp -r /inputs/tree /outputs/x", vec![tree.clone()]).unwrap();
    assert_eq!(digest_of(&output(&made, "x")), digest_of(&tree));
}

/// What builds did while their store came and went.
#[derive(Default)]
struct Tally {
    completed: Mutex<Vec<(String, Vec<u8>)>>,
    unavailable: AtomicUsize,
}

fn killed_and_restarted_under_load(case: &Case) {
    const TREES: usize = 40;
    const SMALL: usize = 10;
    const BUILDERS: usize = 4;
    /// How long the store is away, in milliseconds: some are longer than builds wait for it.
    const AWAY: [u64; 7] = [50, 300, 3500, 100, 1000, 4000, 200];

    let mut far_daemon = far(case);
    let near = near(case, "2", &["--max-builds", "4"]);
    let trees: Vec<(Entry, Vec<u8>)> = (0..TREES)
        .map(|n| {
            let big = noise(n, 4 << 20);
            let mut all = big.clone();
            case.write(&format!("{n}/big"), &big);
            for small in 0..SMALL {
                let text = format!("{n} {small}\n");
                case.write(&format!("{n}/small{small}"), &text);
                all.extend(text.as_bytes());
            }
            (directory("tree", add(case, &far_daemon, &n.to_string()), 1 + SMALL as u64), all)
        })
        .collect();
    let (tally, next, over) = (Tally::default(), AtomicUsize::new(0), AtomicBool::new(false));
    let one = |n: usize| {
        let (tree, contents) = &trees[n % TREES];
        let made = build(
            &near,
            &format!("cat /inputs/tree/* > /outputs/x && echo {n} >> /outputs/x"),
            vec![tree.clone()],
        );
        match made {
            Ok(made) => {
                assert_eq!(kinds(&made), ["started", "refscan", "completed"], "{n}: {made:?}");
                let expected = [contents, format!("{n}\n").as_bytes()].concat();
                let digest = digest_of(&output(&made, "x"));
                assert_eq!(digest, blake3::hash(&expected).to_hex().as_str(), "{n}: wrong bytes");
                tally.completed.lock().unwrap().push((digest, expected));
            }
            Err(status) => {
                assert_blames_the_store(case, &status);
                tally.unavailable.fetch_add(1, Ordering::Relaxed);
            }
        }
    };
    std::thread::scope(|scope| {
        let builders: Vec<_> = (0..BUILDERS)
            .map(|_| {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        one(next.fetch_add(1, Ordering::Relaxed));
                    }
                })
            })
            .collect();
        for (n, away) in AWAY.into_iter().enumerate() {
            std::thread::sleep(Duration::from_millis(200 + 130 * n as u64));
            far_daemon.signal(Signal::SIGKILL);
            far_daemon.wait();
            std::thread::sleep(Duration::from_millis(away));
            far_daemon = far(case);
        }
        std::thread::sleep(Duration::from_millis(500));
        over.store(true, Ordering::Relaxed);
        for builder in builders {
            builder.join().unwrap();
        }
    });
    // With its store back it is as good as before.
    let before = tally.completed.lock().unwrap().len();
    for n in 0..BUILDERS {
        one(next.fetch_add(1, Ordering::Relaxed) + n);
    }
    let completed = tally.completed.into_inner().unwrap();
    assert_eq!(completed.len(), before + BUILDERS, "a build fails although its store is back");
    let unavailable = tally.unavailable.into_inner();
    println!("{} builds completed, {unavailable} lost their store", completed.len());
    assert!(before > 0 && unavailable > 0, "{before} completed, {unavailable} did not: a test of nothing");
    // What was completed is in the far store, whenever that was killed.
    for (n, (digest, expected)) in completed.iter().enumerate() {
        store(case, &far_daemon, &["get", digest, &format!("got{n}")]).code(0);
        assert!(case.read(&format!("got{n}")) == *expected, "{digest}");
        std::fs::remove_file(case.path(&format!("got{n}"))).unwrap();
    }
    gone("a scratch directory", || near.scratch());
}

/// Filling the cache fills a small disk, which only this command sees.
fn a_full_cache(case: &Case) {
    let far = far(case);
    let (big, small) = (noise(0, 40 << 20), noise(1, 2 << 20));
    case.write("big", &big);
    case.write("small", &small);
    let request = |name: &str, size: usize| {
        let digest = add(case, &far, name);
        let request = BuildRequest {
            inputs: vec![file("in", digest, size as u64)],
            ..request("cat /inputs/in > /dev/null && echo read > /outputs/x", &["x"])
        };
        let json = cofferdam_proto::json::to_json(&request);
        case.write(&format!("{name}.json"), json);
        hex(&digest)
    };
    let big_digest = request("big", big.len());
    request("small", small.len());
    case.make_dir("disk");
    let script = "mount -t tmpfs -o size=24m,mode=0755 none disk || exit 99; \
                  build() { \"$0\" build \"$1.json\" --state-dir disk --store \"$URL\" $TOOLS; }; \
                  build big; echo big $?; find disk -size +1M -type f; find disk/store/tmp -type f; \
                  build small; echo small $?; \
                  \"$0\" store get \"$BIG\" got --state-dir disk; echo got $?";
    let mut command = case.program("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", script]).arg(support::binary());
    let tools: Vec<String> =
        support::host_tools().iter().map(|path| format!("--allow-host-path {path}")).collect();
    command.env("URL", url(case)).env("BIG", big_digest).env("TOOLS", tools.join(" "));
    let ran = finish(command).complains("store").complains("no space left");
    let said: Vec<String> = ran.out().lines().map(str::to_owned).collect();
    assert_eq!(said.first().map(String::as_str), Some("big 125"), "nothing is left of it; {ran}");
    assert!(said.contains(&"small 0".to_owned()), "{ran}");
    assert_eq!(said.last().map(String::as_str), Some("got 125"), "{ran}");
    assert!(!case.path("got").exists());
}
