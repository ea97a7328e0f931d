//! A daemon that copies inputs instead of showing them through FUSE.

use cofferdam_proto::build::{BuildRequest, build_event::Event};
use cofferdam_proto::castore::{DirectoryEntry, Entry, FileEntry, entry};
use nix::sys::signal::Signal;
use tonic::Code;

use crate::client::{client, connect, events, kinds, logged, request};
use crate::named;
use crate::support::case::{finish, set_mode};
use crate::support::daemon::Daemon;
use crate::support::leftovers::{gone, mounts, until};
use crate::support::{Case, endless_blob};

pub fn tests() -> impl IntoIterator<Item = (&'static str, fn(&Case))> {
    named![
        there_is_no_view,
        outputs_beside_copies,
        builds_have_copies_of_their_own,
        a_lost_blob_is_the_workers_fault,
        dropped_while_copying,
        killed_while_copying,
        ended_while_copying,
    ]
}

const COPIES: [&str; 2] = ["--isolation", "inputs=off"];

fn daemon(case: &Case, more: &[&str]) -> Daemon {
    Daemon::start(case, &[&COPIES[..], more].concat())
}

fn store_add(case: &Case, daemon: &Daemon, path: &str) -> [u8; 32] {
    let added = finish(case.cofferdam(["store", "add", path, "--to", &daemon.address()])).code(0).out();
    *blake3::Hash::from_hex(added.trim()).unwrap().as_bytes()
}

fn file(name: &str, digest: [u8; 32], size: u64) -> Entry {
    let file = FileEntry { name: name.into(), digest: digest.to_vec(), size, executable: false };
    Entry { entry: Some(entry::Entry::File(file)) }
}

fn there_is_no_view(case: &Case) {
    let daemon = daemon(case, &[]);
    let fuse = |of: &str| mounts(of).into_iter().filter(|line| line.contains(" - fuse")).count();
    assert_eq!(fuse(&daemon.pid().to_string()), fuse("self"));
    client(async {
        let reply = connect(&daemon).await.do_build(request("true", &[])).await.unwrap();
        let told = reply.metadata().get("x-cofferdam-isolation").unwrap().to_str().unwrap();
        assert!(told.split("; ").any(|part| part == "inputs=copies"), "{told}");
    });
}

fn outputs_beside_copies(case: &Case) {
    let daemon = daemon(case, &[]);
    case.write("file", "an input\n");
    let digest = store_add(case, &daemon, "file");
    let script = "cd /nix/store; mkdir out; ln -s ../input out/link; cat input > dev; \
                  (chmod u+w input; echo more >> input) 2> /dev/null; ls; stat -c '%a %u:%g' . | cut -c 1-4";
    let request = BuildRequest {
        inputs: vec![file("input", digest, 9)],
        inputs_dir: "nix/store".into(),
        scratch_paths: vec!["build".into(), "nix/store".into()],
        outputs: vec!["nix/store/out".into(), "nix/store/dev".into()],
        ..request(script, &[])
    };
    let all = client(events(&daemon, request)).unwrap();
    assert_eq!(kinds(&all).last(), Some(&"completed"), "{all:?}");
    assert_eq!(logged(&all), "dev\ninput\nout\n1775\n");
    let Some(Event::Completed(completed)) = all.last() else { panic!("{all:?}") };
    let dev = completed.outputs[1].output.as_ref().and_then(|entry| entry.entry.clone());
    let Some(entry::Entry::File(dev)) = dev else { panic!("{dev:?}") };
    assert_eq!((dev.digest, dev.size), (digest.to_vec(), 9));
    // What the build could write to was its own copy, if anything.
    let hex = blake3::Hash::from(digest).to_string();
    finish(case.cofferdam(["store", "get", &hex, "back", "--to", &daemon.address()])).code(0);
    assert_eq!(case.read("back"), b"an input\n");
    gone("a copy", || daemon.copies());
}

fn builds_have_copies_of_their_own(case: &Case) {
    let daemon = daemon(case, &["--max-builds", "2"]);
    case.write("file", "an input\n");
    let digest = store_add(case, &daemon, "file");
    // A lock on an input is no other build's business.
    let script = "exec 3< /inputs/input; flock --exclusive --nonblock 3 && echo locked; sleep 0.5; ls -i /inputs/input";
    let one = || async {
        let request = BuildRequest { inputs: vec![file("input", digest, 9)], ..request(script, &[]) };
        logged(&events(&daemon, request).await.unwrap())
    };
    let (first, second) = client(async { tokio::join!(one(), one()) });
    assert!(first.starts_with("locked\n") && second.starts_with("locked\n"), "{first} {second}");
    assert_ne!(first, second, "one inode");
}

fn a_lost_blob_is_the_workers_fault(case: &Case) {
    let daemon = daemon(case, &[]);
    // Large enough for a file of its own in the store.
    let contents = "an input\n".repeat(10_000);
    case.write("dir/sub/file", &contents);
    let digest = store_add(case, &daemon, "dir");
    let directory = DirectoryEntry { name: "tree".into(), digest: digest.to_vec(), size: 4 };
    let build = |script: &str| {
        let entry = Entry { entry: Some(entry::Entry::Directory(directory.clone())) };
        client(events(&daemon, BuildRequest { inputs: vec![entry], ..request(script, &[]) }))
    };
    assert_eq!(logged(&build("cat /inputs/tree/sub/file").unwrap()), contents);
    let blob = blake3::hash(contents.as_bytes()).to_hex();
    let place = daemon.state().join(format!("store/blobs/{}/{blob}", &blob[..2]));
    // As many bytes, but others.
    set_mode(&place, 0o644);
    std::fs::write(&place, contents.to_uppercase()).unwrap();
    for problem in ["are not those of digest", "is not in the store"] {
        let fault = build("echo ran").unwrap_err();
        assert_eq!(fault.code(), Code::Unavailable, "{fault}");
        for part in [problem, &blob, "sub/file", "input tree"] {
            assert!(fault.message().contains(part), "{fault}");
        }
        gone("a copy", || daemon.copies());
        gone("a scratch directory", || daemon.scratch());
        let _ = std::fs::remove_file(&place);
    }
}

/// Starts a build and waits until its input is being copied.
async fn copying(
    daemon: &Daemon,
    endless: ([u8; 32], u64),
) -> tonic::Streaming<cofferdam_proto::build::BuildEvent> {
    let inputs = vec![file("endless", endless.0, endless.1)];
    let request = BuildRequest { inputs, ..request("echo ran", &[]) };
    let mut stream = connect(daemon).await.do_build(request).await.unwrap().into_inner();
    let started = stream.message().await.unwrap();
    assert!(started.is_some());
    until("a copy to be begun", || !daemon.copies().is_empty());
    stream
}

fn dropped_while_copying(case: &Case) {
    let endless = endless_blob(case, "state");
    let daemon = daemon(case, &["--max-builds", "1"]);
    client(async { drop(copying(&daemon, endless).await) });
    gone("a copy", || daemon.copies());
    gone("a scratch directory", || daemon.scratch());
    // The only slot is free again.
    client(events(&daemon, request("true", &[]))).unwrap();
}

/// Ends a daemon while it copies.
fn ends_while_copying(case: &Case, signals: &[Signal], exit_code: Option<i32>) {
    let endless = endless_blob(case, "state");
    let mut daemon = daemon(case, &[]);
    client(async {
        let mut stream = copying(&daemon, endless).await;
        for signal in signals {
            daemon.signal(*signal);
            // Two of one kind that come at once are one.
            tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        }
        let end = stream.message().await;
        assert!(end.is_err(), "a stream that was cut must not look like a build's end: {end:?}");
    });
    gone("a process of the daemon", || daemon.processes());
    gone("a copy", || daemon.copies());
    assert_eq!(daemon.wait(), exit_code);
}

fn killed_while_copying(case: &Case) {
    ends_while_copying(case, &[Signal::SIGKILL], None);
}

fn ended_while_copying(case: &Case) {
    ends_while_copying(case, &[Signal::SIGTERM, Signal::SIGTERM], Some(0));
}
