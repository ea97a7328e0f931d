//! The process that runs the probes of one mode: a real worker, which does as the host's side says.
//!
//! Orders come on standard input and replies go to standard output, a line of JSON each. With the end of its input it
//! ends.

use std::io::{self, BufRead, Write};
use std::num::NonZeroUsize;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cofferdam_sandbox::Pasta;
use cofferdam_sandbox::attack::Call;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{Gid, setgroups, setresgid, setresuid};
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;

use super::faults::Faults;
use super::mode::Become;
use super::stage::{self, Stage, Theatre};
use super::{DEADLINE, Mode, Outcome, Play, Probe, Profile, find};
use crate::castore::Node;
use crate::config::{Lifetime, NetworkPolicy, Settings};
use crate::isolation::Demand;
use crate::size::Size;
use crate::worker::Groundwork;

/// The worker's state directory, in the battery's.
pub const STATE: &str = "state";
/// What builds may be shown, in the battery's directory.
pub const SHOWN: &str = "shown";
/// The program that the battery is started from, in the battery's directory.
pub const COPY: &str = "cofferdam";

/// How many probes run at once; each may have two builds.
const PROBES_AT_ONCE: usize = 6;

/// How many builds may wait: few, so that a probe can fill the queue.
pub const MAX_WAITING: usize = 32;

/// What each build may use: little, so that a probe soon comes to the end of it, and it does the host no harm.
pub const MEMORY_BYTES: u64 = 256 << 20;
/// The same of files on disk.
pub const SCRATCH_BYTES: u64 = 256 << 20;

/// How long the worker's threads stay idle. Short, so that they come and go while probes run, as they do in a daemon
/// over a day.
const THREAD_KEEP_ALIVE: Duration = Duration::from_millis(200);

/// How many processes and threads a build may have: fewer than a fork bomb of the probes would start.
const PROCESSES: u64 = 1024;

/// What the host's side asks for.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// Run the probes of these ids, side by side as far as they allow it, and then a build that has nothing to do.
    Run(Vec<String>),
}

/// What the battery answers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// The worker is there.
    Ready,
    /// There is no worker.
    Failed(String),
    /// A probe is done.
    Probe {
        /// Its id.
        id: String,
        /// What came of it.
        outcome: Outcome,
        /// How long it took.
        seconds: f64,
    },
    /// An order is carried out.
    Done {
        /// What came of the build after it.
        canary: Outcome,
    },
}

/// What a battery is told when it starts.
#[derive(Debug)]
pub struct Assignment {
    /// Who runs it.
    pub mode: Mode,
    /// What is promised.
    pub profile: Profile,
    /// How inputs are shown to builds.
    pub inputs: Demand,
    /// The battery's directory.
    pub dir: PathBuf,
}

/// Becomes the user and the member of the group, and executes `arguments` as that one: a program that has changed its
/// user is denied its own files in `/proc`.
///
/// # Errors
/// Where a step is refused. There is no other way back.
pub fn become_user(user: Become, group: Option<Gid>, program: &Path, arguments: &[String]) -> io::Error {
    let switched = setgroups(group.as_slice())
        .and_then(|()| setresgid(user.gid, user.gid, user.gid))
        .and_then(|()| setresuid(user.uid, user.uid, user.uid));
    match switched {
        Ok(()) => Command::new(program).args(arguments).exec(),
        Err(errno) => errno.into(),
    }
}

/// Runs probes until the input ends. Call this while the program has one thread.
///
/// # Errors
/// Where nobody reads the replies any more.
pub fn run(assignment: Assignment) -> io::Result<()> {
    match set_up(assignment) {
        Ok((runtime, theatre)) => {
            reply(&Reply::Ready)?;
            serve(&runtime, &Arc::new(theatre))
        }
        Err(reason) => reply(&Reply::Failed(reason)),
    }
}

fn set_up(assignment: Assignment) -> Result<(tokio::runtime::Runtime, Theatre), String> {
    let Assignment { mode, profile, inputs, dir } = assignment;
    let words = |error: &dyn std::fmt::Display| error.to_string();
    // A session keyring of this worker's own, as a login gives one, so that there is one for builds to look for. Without
    // it each thread that puts a key in would make one.
    let _ = Call::KEYCTL_JOIN_NEW_SESSION.make(&mut []);
    // So that it is the sandbox that forbids core files, and not whoever started this.
    let _ =
        getrlimit(Resource::RLIMIT_CORE).and_then(|(_, hard)| setrlimit(Resource::RLIMIT_CORE, hard, hard));
    let (pasta, no_network) = match network() {
        Ok(pasta) => (Some(pasta), None),
        Err(why) => (None, Some(why)),
    };
    let ground = Groundwork::lay(settings(&dir, mode, inputs, pasta)).map_err(|error| words(&error))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_keep_alive(THREAD_KEEP_ALIVE)
        .build()
        .map_err(|error| format!("can't start threads: {error}"))?;
    // The worker's parts look for the executor.
    let within = runtime.enter();
    let faults = Arc::new(Faults::default());
    let worker =
        ground.build_over(runtime.handle(), |store| faults.over(store)).map_err(|error| words(&error))?;
    drop(within);
    let program = stage::ingest(&worker, &dir.join(COPY)).map_err(|error| words(&error))?;
    let program = match program {
        Node::File { digest, size, .. } => Node::File { digest, size, executable: true },
        other => other,
    };
    Ok((runtime, Theatre { worker, mode, profile, dir, program, faults, no_network }))
}

fn settings(dir: &Path, mode: Mode, inputs: Demand, network: Option<Pasta>) -> Settings {
    let mut settings = Settings::new(dir.join(STATE), Lifetime::Ephemeral);
    // Twice: a probe with two builds must not wait for another one.
    settings.max_builds = NonZeroUsize::MIN.saturating_add(2 * PROBES_AT_ONCE);
    settings.max_waiting = MAX_WAITING;
    settings.limits.memory = Some(Size(MEMORY_BYTES));
    settings.limits.scratch = Some(Size(SCRATCH_BYTES));
    settings.limits.processes = Some(PROCESSES);
    settings.allowed_host_paths = vec![dir.join(SHOWN)];
    settings.network = network.map_or(NetworkPolicy::Refused, NetworkPolicy::Pasta);
    settings.isolation.inputs = inputs;
    // A mode that is not what it is called must not be run under its name.
    settings.isolation.ids = match mode {
        Mode::Root | Mode::Range => Demand::Required,
        Mode::Single => Demand::Off,
    };
    settings
}

/// The means to give builds a network of their own, or why there is none. The host's is never given: probes of what a
/// build with network can't reach would prove nothing.
fn network() -> Result<Pasta, String> {
    let pasta = Pasta::find().map_err(|error| format!("builds get no network here: {error}"))?;
    match crate::build::network::is_connected() {
        true => Ok(pasta),
        // Older versions of pasta end where there is nothing to connect to.
        false => Err("builds get no network here: this host has no default route".into()),
    }
}

fn serve(runtime: &tokio::runtime::Runtime, theatre: &Arc<Theatre>) -> io::Result<()> {
    for line in io::stdin().lock().lines() {
        let Order::Run(ids) = serde_json::from_str(&line?)?;
        let probes: Vec<&'static Probe> = ids.iter().filter_map(|id| find(id)).collect();
        runtime.block_on(perform(theatre, probes))?;
        let canary = runtime.block_on(canary(theatre));
        // What was remembered, and what many threads have freed, is no leftover.
        theatre.worker.builder.trim();
        reply(&Reply::Done { canary })?;
    }
    Ok(())
}

/// Runs probes side by side, and tells of each as it ends.
async fn perform(theatre: &Arc<Theatre>, probes: Vec<&'static Probe>) -> io::Result<()> {
    let at_once = Arc::new(Semaphore::new(PROBES_AT_ONCE));
    let mut running = tokio::task::JoinSet::new();
    for probe in probes {
        let (theatre, at_once) = (Arc::clone(theatre), Arc::clone(&at_once));
        running.spawn(async move {
            // It is never closed.
            let _turn = at_once.acquire_owned().await;
            let start = Instant::now();
            // A task of its own, so that one that panics is told of under its name.
            let played = tokio::spawn(async move {
                let stage = Stage { theatre: &theatre, probe };
                tokio::time::timeout(DEADLINE, stage.play()).await
            });
            let outcome = match played.await {
                Ok(Ok(outcome)) => outcome,
                Ok(Err(_)) => Outcome::broken(format!("no verdict within {} s", DEADLINE.as_secs())),
                Err(error) => Outcome::broken(format!("the probe itself failed: {error}")),
            };
            Reply::Probe { id: probe.id.to_owned(), outcome, seconds: start.elapsed().as_secs_f64() }
        });
    }
    while let Some(done) = running.join_next().await {
        reply(&done.map_err(io::Error::other)?)?;
    }
    Ok(())
}

/// A build that has nothing to do, to see whether builds still work.
async fn canary(theatre: &Theatre) -> Outcome {
    static CANARY: Probe = Probe {
        id: "CANARY",
        promise: "a build works",
        weight: super::Weight::Required,
        company: super::Company::Shared,
        attack: |_, findings| findings.check(true, ""),
        play: Play::Plain,
    };
    let stage = Stage { theatre, probe: &CANARY };
    match tokio::time::timeout(DEADLINE, stage.act("", &[])).await {
        Ok(Outcome::Held) => Outcome::Held,
        Ok(other) => Outcome::broken(format!("an ordinary build fails afterwards: {other:?}")),
        Err(_) => Outcome::broken("an ordinary build does not end afterwards"),
    }
}

fn reply(reply: &Reply) -> io::Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, reply)?;
    out.write_all(b"\n")?;
    out.flush()
}
