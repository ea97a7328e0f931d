//! CAN: what is left when a client, a build or a worker ends early.

use std::fs;
use std::io::Write;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::second::{Daemon, END, Place, children};
use super::tools::{eventually, field, hold, names, until_holding};
use crate::build::error::Fault;
use crate::build::events::Event;
use crate::build::request::Draft;
use crate::selftest::stage::{End, Stage, path};
use crate::selftest::{Act, Company, Findings, Outcome, Play, Probe, Weight};

pub(super) const PROBES: &[Probe] = &[
    Probe {
        id: "CAN-01",
        promise: "a build whose client goes is gone within seconds, whatever it was doing",
        weight: Weight::Required,
        company: Company::Shared,
        attack: busy,
        play: Play::Script(|stage| Box::pin(drop_in_each_phase(stage))),
    },
    Probe {
        id: "CAN-02",
        promise: "a worker that is killed takes its builds along, and leaves nothing that lasts",
        weight: Weight::Required,
        company: Company::Shared,
        attack: busy,
        play: Play::Script(|stage| Box::pin(kill_worker(stage))),
    },
    Probe {
        id: "CAN-04",
        promise: "the end of one sandbox is that of one build, and a spawner's end is noticed",
        weight: Weight::Desired,
        company: Company::Shared,
        attack: busy,
        play: Play::Script(|stage| Box::pin(kill_parts(stage))),
    },
    Probe {
        id: "CAN-05",
        promise: "a second worker on a state directory is refused, and harms nothing of the first",
        weight: Weight::Desired,
        company: Company::Shared,
        attack: busy,
        play: Play::Script(|stage| Box::pin(second_worker(stage))),
    },
    Probe {
        id: "CAN-06",
        promise: "SIGTERM lets builds end and takes no more; a second one ends them",
        weight: Weight::Desired,
        company: Company::Shared,
        attack: busy,
        play: Play::Script(|stage| Box::pin(terminate(stage))),
    },
    Probe {
        id: "CAN-08",
        promise: "all that a build wrote before its end comes before the one event that tells of it",
        weight: Weight::Required,
        company: Company::Shared,
        attack: full_pipe,
        play: Play::Script(|stage| Box::pin(everything_arrives(stage))),
    },
    Probe {
        id: "CAN-09",
        promise: "a hundred builds started and cancelled leave the worker as it was",
        weight: Weight::Desired,
        company: Company::Alone,
        attack: busy,
        play: Play::Script(|stage| Box::pin(start_and_cancel(stage))),
    },
];

/// Files of an output that takes a while to be read.
const FILES: usize = 400;

/// What the attackers of this family do with their time.
fn busy(act: &Act, findings: &mut Findings) {
    findings.check(true, "");
    match act.role.as_str() {
        "stubborn" => {
            for signal in [libc::SIGTERM, libc::SIGHUP, libc::SIGINT] {
                let _ = cofferdam_sandbox::attack::ignore_signal(signal);
            }
            let _ = act.again("hold").stdout(std::process::Stdio::null()).spawn();
            hold();
        }
        "output" => {
            let made = fs::create_dir("/build/out").and_then(|()| {
                (0..FILES).try_for_each(|file| fs::write(format!("/build/out/{file}"), vec![b'x'; 20_000]))
            });
            findings.works("make an output", made);
            println!("holding");
        }
        "wait" => {
            println!("holding");
            std::thread::sleep(Duration::from_millis(700));
        }
        "" => {}
        _ => hold(),
    }
}

/// Moments at which the stream is dropped, counted from the start of a build.
const MOMENTS_MS: [u64; 8] = [0, 1, 2, 4, 8, 16, 32, 64];

async fn drop_in_each_phase(stage: &Stage<'_>) -> Outcome {
    let mut findings = Findings::default();
    for moment in MOMENTS_MS {
        // The request itself is taken back, or the build is under way: whatever comes first.
        let Ok(draft) = stage.draft("hold", &[]) else { return Outcome::broken("no request") };
        let started = tokio::time::timeout(Duration::from_millis(moment), async {
            let mut build = stage.start(draft).await.map_err(|fault| fault.to_string())?;
            build.finish().await;
            Ok::<_, String>(())
        });
        if let Ok(Err(fault)) = started.await {
            findings.check(false, format_args!("a build was refused: {fault}"));
        }
    }
    gone(stage, "dropped while they began", &mut findings).await;
    for role in ["hold", "stubborn"] {
        match super::tools::holding(stage, role, &[]).await {
            Ok(build) => {
                let id = build.id().to_owned();
                drop(build);
                gone(stage, role, &mut findings).await;
                removed(stage, &id, role, &mut findings).await;
            }
            Err(outcome) => return findings.outcome().and(outcome),
        }
    }
    for moment in [0, 3, 10, 30] {
        if let Err(outcome) = drop_in_intake(stage, Duration::from_millis(moment), &mut findings).await {
            return findings.outcome().and(outcome);
        }
    }
    findings.outcome().and(drop_in_queue(stage).await)
}

/// Drops a build that takes in its output, searches it, or is about to tell of its end.
async fn drop_in_intake(stage: &Stage<'_>, after: Duration, findings: &mut Findings) -> Result<(), Outcome> {
    let mut draft = stage.draft("output", &[]).map_err(|fault| Outcome::broken(fault.to_string()))?;
    draft.outputs.push(path("build/out"));
    draft.needles.push(b"xxxxxxxxxxxxxxxxxxxxy".to_vec());
    let build = stage.start(draft).await.map_err(|fault| Outcome::broken(fault.to_string()))?;
    let build = until_holding(build).await?;
    let id = build.id().to_owned();
    tokio::time::sleep(after).await;
    drop(build);
    gone(stage, "dropped with its output", findings).await;
    removed(stage, &id, "dropped with its output", findings).await;
    Ok(())
}

async fn gone(stage: &Stage<'_>, what: &str, findings: &mut Findings) {
    let gone = eventually(END, || stage.processes().is_empty()).await;
    findings.check(gone, format_args!("{what}: still there after {END:?}: {:?}", stage.processes()));
}

async fn removed(stage: &Stage<'_>, id: &str, what: &str, findings: &mut Findings) {
    let state = stage.theatre.state();
    let left = || {
        let dirs = ["builds", "copies", "view"].map(|dir| state.join(dir).join(id));
        dirs.into_iter().filter(|dir| dir.symlink_metadata().is_ok()).collect::<Vec<_>>()
    };
    let removed = eventually(END, || left().is_empty()).await;
    findings.check(removed, format_args!("{what}: left after {END:?}: {:?}", left()));
}

/// A build that waits for a slot is taken back; the slot is there for the next one.
async fn drop_in_queue(stage: &Stage<'_>) -> Outcome {
    match queue(stage).await {
        Ok(findings) => findings.outcome(),
        Err(outcome) => outcome,
    }
}

async fn queue(stage: &Stage<'_>) -> Result<Findings, Outcome> {
    let mut findings = Findings::default();
    let place = Place::new(stage)?;
    let mut daemon = place.daemon(stage, &["--max-builds", "1", "--max-waiting", "1"]).await?;
    let running = place.holding(stage, "hold").await?;
    let waited = tokio::time::timeout(Duration::from_millis(200), place.build(stage, "hold")).await;
    findings.check(waited.is_err(), "two builds run where one may");
    drop(running);
    let end = tokio::time::Instant::now() + END;
    loop {
        let next = tokio::time::timeout_at(end, place.holding(stage, "hold")).await;
        match next {
            Ok(Ok(next)) => break drop(next),
            // The place in the queue of the one that was taken back may take a moment to be free: it is tried again, as
            // the daemon's answer asks for.
            Ok(Err(_)) if tokio::time::Instant::now() < end => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Ok(Err(outcome)) => return Err(findings.outcome().and(outcome)),
            Err(_) => break findings.check(false, format_args!("no slot is free after {END:?}")),
        }
    }
    let empty = eventually(END, || place.builds().is_empty()).await;
    findings.check(empty, format_args!("left on disk: {:?}", place.builds()));
    daemon.signal(Signal::SIGTERM);
    findings.check(daemon.end(END).await.is_some(), "the second daemon does not end");
    Ok(findings)
}

async fn kill_worker(stage: &Stage<'_>) -> Outcome {
    match kill_and_restart(stage).await {
        Ok(findings) => findings.outcome(),
        Err(outcome) => outcome,
    }
}

async fn kill_and_restart(stage: &Stage<'_>) -> Result<Findings, Outcome> {
    let mut findings = Findings::default();
    let place = Place::new(stage)?;
    let mounts = || fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let before = mounts();
    for role in ["hold", "stubborn", "begin"] {
        let mut daemon = place.daemon(stage, &["--max-builds", "2"]).await?;
        let build = match role {
            // Killed while the sandbox is made.
            "begin" => place.build(stage, "hold").await?,
            role => place.holding(stage, role).await?,
        };
        daemon.signal(Signal::SIGKILL);
        daemon.end(END).await;
        gone(stage, role, &mut findings).await;
        findings.same(&format!("{role}: mounts of the host"), mounts(), before.clone());
        drop(build);
    }
    let state = place.state();
    // The socket of one that was killed is still there: the next one takes its place, and sweeps.
    let _ = fs::remove_file(place.socket());
    let planted = state.join("builds/planted");
    let made =
        fs::create_dir_all(planted.join("inner")).and_then(|()| fs::write(planted.join("inner/file"), ""));
    findings.works("plant leftovers", made);
    let mut daemon = place.daemon(stage, &[]).await?;
    let swept = eventually(END, || place.builds().is_empty()).await;
    findings.check(swept, format_args!("the next start leaves {:?}", place.builds()));
    drop(place.holding(stage, "hold").await?);
    daemon.signal(Signal::SIGTERM);
    findings.check(daemon.end(END).await.is_some(), "the daemon does not end");
    gone(stage, "after the end", &mut findings).await;
    Ok(findings)
}

async fn kill_parts(stage: &Stage<'_>) -> Outcome {
    match kill_init_and_spawner(stage).await {
        Ok(findings) => findings.outcome(),
        Err(outcome) => outcome,
    }
}

async fn kill_init_and_spawner(stage: &Stage<'_>) -> Result<Findings, Outcome> {
    let mut findings = Findings::default();
    let place = Place::new(stage)?;
    let mut daemon = place.daemon(stage, &["--max-builds", "2"]).await?;
    let mut victim = place.holding(stage, "hold").await?;
    let first = stage.processes();
    let mut other = place.holding(stage, "hold").await?;
    let pid = first.iter().find_map(|line| line.split(' ').next()?.parse::<u32>().ok());
    let init = pid.and_then(|pid| field(&format!("/proc/{pid}/status"), "PPid")?.parse::<i32>().ok());
    let Some(init) = findings.works("find a sandbox's first process", init.ok_or("it is not there")) else {
        return Ok(findings);
    };
    findings.works("kill it", kill(Pid::from_raw(init), Signal::SIGKILL));
    let end = tokio::time::timeout(END, last(&mut victim)).await;
    let as_fault = matches!(&end, Ok(Err(_)));
    findings
        .check(as_fault, format_args!("the build whose sandbox was killed: {end:?}, not the worker's fault"));
    let still = tokio::time::timeout(Duration::from_millis(100), last(&mut other)).await;
    findings.check(still.is_err(), format_args!("the other build ended as well: {still:?}"));
    let spawners = children(daemon.pid());
    findings.check(!spawners.is_empty(), "the daemon has no spawner");
    for spawner in spawners {
        let _ = kill(Pid::from_raw(spawner.cast_signed()), Signal::SIGKILL);
    }
    let end = tokio::time::timeout(END, last(&mut other)).await;
    findings.check(
        matches!(&end, Ok(Err(_))),
        format_args!("the build whose spawner was killed: {end:?}, not the worker's fault"),
    );
    let status = daemon.end(END).await;
    findings.check(
        status.is_some_and(|status| !status.success()),
        format_args!("a daemon without a spawner: {status:?}, no end with an error"),
    );
    gone(stage, "without a spawner", &mut findings).await;
    Ok(findings)
}

/// The last event of a build that is elsewhere. `Err` says why there is none.
async fn last(build: &mut crate::remote::RemoteBuild) -> Result<Event, String> {
    loop {
        match build.next().await {
            Some(Ok(event @ (Event::Completed { .. } | Event::Failed(_)))) => return Ok(event),
            Some(Ok(_)) => {}
            Some(Err(error)) => return Err(error.to_string()),
            None => return Err("the stream ended".to_owned()),
        }
    }
}

async fn second_worker(stage: &Stage<'_>) -> Outcome {
    match two_on_one(stage).await {
        Ok(findings) => findings.outcome(),
        Err(outcome) => outcome,
    }
}

async fn two_on_one(stage: &Stage<'_>) -> Result<Findings, Outcome> {
    let mut findings = Findings::default();
    let place = Place::new(stage)?;
    let mut first = place.daemon(stage, &[]).await?;
    let mut build = place.holding(stage, "hold").await?;
    let before = place.builds();
    let mut second = Daemon::of(place.spawn(stage, &[])?);
    // It waits some seconds for one that is about to end.
    let status = second.end(Duration::from_secs(10)).await;
    findings.check(
        status.is_some_and(|status| !status.success()),
        format_args!("a second daemon on the state directory: {status:?}, no refusal"),
    );
    findings.check(place.said().contains("in use"), format_args!("its words: {}", place.said()));
    findings.same("what builds have on disk", place.builds(), before);
    findings.check(place.socket().exists(), "the first daemon's socket is gone");
    let still = tokio::time::timeout(Duration::from_millis(100), last(&mut build)).await;
    findings.check(still.is_err(), format_args!("the first daemon's build has ended: {still:?}"));
    drop(build);
    first.signal(Signal::SIGTERM);
    findings.check(first.end(END).await.is_some(), "the first daemon does not end");
    Ok(findings)
}

async fn terminate(stage: &Stage<'_>) -> Outcome {
    match drain(stage).await {
        Ok(findings) => findings.outcome(),
        Err(outcome) => outcome,
    }
}

async fn drain(stage: &Stage<'_>) -> Result<Findings, Outcome> {
    let mut findings = Findings::default();
    let place = Place::new(stage)?;
    let mut daemon = place.daemon(stage, &["--max-builds", "2"]).await?;
    let mut build = place.holding(stage, "wait").await?;
    daemon.signal(Signal::SIGTERM);
    tokio::time::sleep(Duration::from_millis(200)).await;
    findings.check(!daemon.has_ended(), "SIGTERM did not wait for a build");
    findings.check(place.build(stage, "").await.is_err(), "a build was taken on after SIGTERM");
    let end = tokio::time::timeout(END, last(&mut build)).await;
    let completed = matches!(&end, Ok(Ok(Event::Completed { .. })));
    findings.check(completed, format_args!("the build that ran at SIGTERM: {end:?}"));
    drop(build);
    let status = daemon.end(END).await;
    findings.check(status.is_some_and(|status| status.success()), format_args!("after SIGTERM: {status:?}"));

    let mut daemon = place.daemon(stage, &[]).await?;
    let build = place.holding(stage, "stubborn").await?;
    daemon.signal(Signal::SIGSTOP);
    tokio::time::sleep(Duration::from_millis(100)).await;
    daemon.signal(Signal::SIGCONT);
    drop(place.build(stage, "").await?);
    daemon.signal(Signal::SIGTERM);
    tokio::time::sleep(Duration::from_millis(100)).await;
    findings.check(!daemon.has_ended(), "the first SIGTERM did not wait for a build");
    // Two signals in a row are one to a daemon that is slow to look: the first has been seen once it refuses builds.
    let end = Instant::now() + END;
    while Instant::now() < end && place.build(stage, "").await.is_ok() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    daemon.signal(Signal::SIGTERM);
    findings.check(daemon.end(END).await.is_some(), "the second SIGTERM did not end the daemon");
    gone(stage, "after the second SIGTERM", &mut findings).await;
    drop(build);
    Ok(findings)
}

/// As much as a pipe of an unprivileged user may hold.
const PIPE_BYTES: usize = 1 << 20;

/// What is written: each place has a value of its own, as far as bytes go.
fn pattern() -> Vec<u8> {
    (0..PIPE_BYTES).map(|at| (at % 251) as u8).collect()
}

fn full_pipe(_: &Act, _: &mut Findings) {
    let out = std::io::stdout();
    // Where the host allows less, the write waits for the reader. The end comes right after it in any case.
    let _ = fcntl(&out, FcntlArg::F_SETPIPE_SZ(1 << 20));
    let mut out = out.lock();
    let _ = out.write_all(&pattern()).and_then(|()| out.flush());
    // Nothing else is to follow.
    std::process::exit(0);
}

async fn everything_arrives(stage: &Stage<'_>) -> Outcome {
    let mut findings = Findings::default();
    for _ in 0..5 {
        let Ok(draft): Result<Draft, _> = stage.draft("", &[]) else { return Outcome::broken("no request") };
        let mut build = match stage.start(draft).await {
            Ok(build) => build,
            Err(fault) => return Outcome::broken(fault.to_string()),
        };
        let first = build.finish().await;
        findings.check(
            matches!(first.end, End::Completed(_)),
            format_args!(
                "the build {}",
                if let End::Failed(failure) = &first.end { &failure.message } else { "has no result" }
            ),
        );
        findings.same("bytes that arrived", first.stdout.len(), PIPE_BYTES);
        findings.check(first.stdout == pattern(), "what arrived is not what was written");
        let more = build.finish().await;
        let none = matches!(more.end, End::Fault(Fault::Cancelled)) && more.stdout.is_empty();
        findings.check(none, format_args!("after the last event there is more: {}", more.describe()));
    }
    findings.outcome()
}

/// How many builds are started and cancelled, and how many at a time.
const CYCLES: usize = 100;
const AT_ONCE: usize = 10;

async fn start_and_cancel(stage: &Stage<'_>) -> Outcome {
    let mut findings = Findings::default();
    let start = Instant::now();
    // What is made once and kept is there after the first.
    if let Err(outcome) = cancelled(stage, AT_ONCE).await {
        return outcome;
    }
    gone(stage, "cancelled", &mut findings).await;
    let before = open_files();
    for _ in 0..CYCLES / AT_ONCE {
        if let Err(outcome) = cancelled(stage, AT_ONCE).await {
            return findings.outcome().and(outcome);
        }
    }
    gone(stage, "cancelled", &mut findings).await;
    let flat = eventually(END, || open_files() <= before).await;
    findings.check(flat, format_args!("open files: {}, before {before}", open_files()));
    let builds = stage.theatre.state().join("builds");
    let empty = eventually(END, || names(&builds).unwrap_or_default().is_empty()).await;
    findings.check(empty, format_args!("left on disk: {:?}", names(&builds)));
    findings.check(
        start.elapsed() < Duration::from_secs(20),
        format_args!("{CYCLES} builds took {:?} to start and cancel", start.elapsed()),
    );
    findings.outcome()
}

/// Starts builds at once and drops each as soon as it has begun.
async fn cancelled(stage: &Stage<'_>, count: usize) -> Result<(), Outcome> {
    let mut builds = Vec::new();
    for _ in 0..count {
        let draft = stage.draft("hold", &[]).map_err(|fault| Outcome::broken(fault.to_string()))?;
        builds.push(stage.start(draft).await.map_err(|fault| Outcome::broken(fault.to_string()))?);
    }
    for mut build in builds {
        // Some before their command, some after.
        let _ = tokio::time::timeout(Duration::from_millis(5), build.said("holding")).await;
    }
    Ok(())
}

/// Descriptors of this process but for blobs, of which the view keeps a bounded number.
fn open_files() -> usize {
    let entries = fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let links = entries.filter_map(|entry| fs::read_link(entry.path()).ok());
    let of_blobs = |link: &str| link.contains("/store/blobs/") || link.contains("/store/packs/");
    links.filter(|link| !of_blobs(&link.to_string_lossy())).count()
}
