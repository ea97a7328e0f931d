//! `kill -9` at any moment.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::load::client;
use crate::named;
use crate::random::{Random, Seed};
use crate::support::Case;
use crate::support::case::finish;
use crate::support::daemon::Daemon;
use crate::{Acknowledged, holds, sound};

pub fn tests() -> impl IntoIterator<Item = (&'static str, fn(&Case))> {
    named![daemon_under_load, store_add]
}

/// Clients of a daemon at a time.
const CLIENTS: usize = 4;

/// A daemon lives less than this.
const LIFE: Duration = Duration::from_millis(400);

/// So often a test goes on with a new store.
const ROUNDS_A_STORE: u64 = 25;

/// No start may take longer, whatever the last end was like.
const START: Duration = Duration::from_secs(2);

fn rounds() -> u64 {
    let given = std::env::var("COFFERDAM_CRASH_ROUNDS").ok();
    given.map_or(20, |rounds| rounds.parse().expect("COFFERDAM_CRASH_ROUNDS is a number"))
}

/// A daemon is killed while clients store blobs and directories: whatever it has acknowledged is there, and nothing
/// is damaged.
fn daemon_under_load(case: &Case) {
    let seed = Seed::choose();
    let mut random = seed.random();
    let mut acknowledged = Acknowledged::default();
    let (mut longest, mut blobs, mut directories, mut at_start) = (Duration::ZERO, 0, 0, 0);
    for round in 0..rounds() {
        if round % ROUNDS_A_STORE == 0 {
            let _ = std::fs::remove_dir_all(case.path("state"));
            acknowledged = Acknowledged::default();
        }
        if random.below(3) == 0 {
            killed_at_its_start(case, &mut random);
            at_start += 1;
            // One that was hardly born has made no store yet, and this test must not make it one.
            if case.path("state/cofferdam.lock").exists() {
                holds(&case.path("state"), &acknowledged);
            }
        }
        let begun = Instant::now();
        let daemon = Daemon::start(case, &["--no-builds"]);
        longest = longest.max(begun.elapsed());
        for more in killed_under_load(daemon, &mut random) {
            blobs += more.blobs.len();
            directories += more.directories.len();
            acknowledged.blobs.extend(more.blobs);
            acknowledged.directories.extend(more.directories);
        }
        holds(&case.path("state"), &acknowledged);
    }
    eprintln!(
        "{} daemons killed under load and {at_start} at their start: {blobs} blobs and {directories} directories \
         acknowledged, all there; the longest start took {longest:?}",
        rounds()
    );
    assert!(longest < START, "a start took {longest:?}");
}

fn killed_at_its_start(case: &Case, random: &mut Random) {
    let mut command = case.cofferdam(["daemon", "--no-builds", "--state-dir", "state", "--listen"]);
    command.arg(format!("unix:{}", case.path("socket").display())).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    std::thread::sleep(random.time(Duration::from_millis(30)));
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Lets clients store until the daemon is killed, and yields what was acknowledged to each.
fn killed_under_load(mut daemon: Daemon, random: &mut Random) -> Vec<Acknowledged> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let address = daemon.address();
    let clients: Vec<_> =
        (0..CLIENTS).map(|_| runtime.spawn(client(address.clone(), Random::new(random.next())))).collect();
    std::thread::sleep(random.time(LIFE));
    daemon.signal(Signal::SIGKILL);
    daemon.wait();
    let ends = async {
        let mut all = Vec::new();
        for client in clients {
            let (acknowledged, _) = client.await.unwrap();
            all.push(acknowledged);
        }
        all
    };
    runtime
        .block_on(async { tokio::time::timeout(Duration::from_secs(20), ends).await })
        .expect("a client does not notice that its daemon is dead")
}

/// `store add` is killed: what it leaves is sound, and it comes to the same digest when it is done again.
fn store_add(case: &Case) {
    let seed = Seed::choose();
    let mut random = seed.random();
    plant(case, &mut random);
    let add = |state: &str| case.cofferdam(["store", "add", "tree", "--state-dir", state]);
    let whole = finish(add("whole")).code(0);
    let (digest, usual) = (whole.out(), whole.took);
    let mut killed = 0;
    for round in 0..rounds() {
        // Half of the time what was left is gone on with.
        let state = case.path("state");
        if round % 2 == 0 {
            let _ = std::fs::remove_dir_all(&state);
        }
        let mut child = add("state").stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(random.time(usual * 5 / 4));
        child.kill().unwrap();
        killed += u64::from(!child.wait().unwrap().success());
        if state.exists() {
            sound(&state);
        }
        if round % 2 == 1 {
            finish(add("state")).code(0).says(&digest);
            complete(&state, &case.path("whole"));
        }
    }
    eprintln!("{killed} of {} runs of store add killed before their end, after at most {usual:?}", rounds());
}

/// Whether two stores have the same number of things.
fn complete(state: &Path, whole: &Path) {
    let count = |state: &Path| {
        let (report, _) = sound(state);
        (report.blobs, report.bytes, report.directories)
    };
    assert_eq!(count(state), count(whole));
}

/// A tree of some hundred files.
fn plant(case: &Case, random: &mut Random) {
    for number in 0..400 {
        let len = match random.below(20) {
            0 => random.below(300 << 10),
            1..=4 => random.below(64 << 10),
            _ => random.below(4 << 10),
        };
        let bytes = random.bytes(len);
        case.write(&format!("tree/{}/{}/{number}", random.below(5), random.below(6)), bytes);
    }
}
