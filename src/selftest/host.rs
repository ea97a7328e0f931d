//! The host's side: starts a battery a mode, has it run the probes, and compares the host before and after.

use std::fs::{self, File, Permissions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::unistd::{Gid, Uid};

use super::battery::{COPY, Order, Reply, SHOWN};
use super::left::{Difference, MEMORY, Scope, Snapshot, blind_spots, differences};
use super::mode::Become;
use super::report::{ModeReport, ProbeReport};
use super::{Company, DEADLINE, Mode, Outcome, Probe, Profile};
use crate::isolation::{Demand, Layer, Wish};

/// How long a worker may take to start or to end.
const START_PATIENCE: Duration = Duration::from_secs(60);

/// How long what builds leave may take to vanish.
const LEFT_PATIENCE: Duration = Duration::from_secs(5);

/// How long the host may take to come to rest between two batches.
const REST_PATIENCE: Duration = Duration::from_secs(10);

/// How much of a battery's standard error is kept.
const KEPT_STDERR_BYTES: u64 = 64 * 1024;

/// A group that no user is in, for probes to lose.
pub const CANARY_GROUP: u32 = 64_299;

/// The file below what may be shown that only this group may read.
pub const GROUP_FILE: &str = "group-only";

/// What is to be run.
pub struct Plan<'a> {
    /// The mode.
    pub mode: Mode,
    /// Whom to become for it.
    pub user: Option<Become>,
    /// What is promised.
    pub profile: Profile,
    /// How inputs are shown to builds, where that is chosen.
    pub inputs: Option<Demand>,
    /// The probes.
    pub probes: &'a [&'static Probe],
    /// Where directories may be made that nobody else writes to.
    pub parent: &'a Path,
}

/// What could not be done to begin with.
#[derive(Debug, thiserror::Error)]
#[error("can't {act} {object}: {source}")]
pub struct HostError {
    act: &'static str,
    object: String,
    source: io::Error,
}

fn cannot(act: &'static str, object: impl std::fmt::Display) -> impl FnOnce(io::Error) -> HostError {
    move |source| HostError { act, object: object.to_string(), source }
}

/// Runs the probes of one mode and tells of them.
///
/// # Errors
/// Where it fails by itself. That there is no worker in this mode is in the report.
pub fn run(plan: &Plan<'_>, progress: &mut dyn FnMut(&ProbeReport)) -> Result<ModeReport, HostError> {
    let dir = Directory::make(plan)?;
    let mut battery = Battery::start(plan, &dir.path)?;
    let scope = Scope {
        pid: battery.child.id(),
        token: dir.token.clone(),
        state: dir.path.join(super::battery::STATE),
        dir: dir.path.clone(),
    };
    let start = battery.next(START_PATIENCE);
    let mut report = ModeReport::new(plan.mode);
    if let Err(reason) = started(start) {
        report.unavailable = Some(with_stderr(reason, &battery.end().1));
        return Ok(report);
    }
    let outer = Scope { pid: 0, ..scope.clone() };
    let mut session = Session { battery, scope, seen: Vec::new(), progress };
    let ran = session.run_all(plan.probes);
    let Session { battery, seen, .. } = session;
    report.probes = seen;
    report.probes.sort_by_key(|probe| plan.probes.iter().position(|known| known.id == probe.id));
    report.notes = blind_spots();
    let (ended, stderr) = battery.end();
    let left = ran.and_then(|left| ended.map(|()| left)).map(|left| left.and(gone(&outer, &dir.path)));
    report.left = left.unwrap_or_else(|reason| Outcome::broken(with_stderr(reason, &stderr)));
    Ok(report)
}

fn started(reply: Result<Reply, String>) -> Result<(), String> {
    match reply? {
        Reply::Ready => Ok(()),
        Reply::Failed(reason) => Err(reason),
        other => Err(format!("the battery began with {other:?}")),
    }
}

fn with_stderr(reason: String, stderr: &str) -> String {
    match stderr.trim() {
        "" => reason,
        stderr => format!("{reason}; it said: {stderr}"),
    }
}

/// Checks that of a battery that has ended nothing is left.
fn gone(scope: &Scope, dir: &Path) -> Outcome {
    let deadline = Instant::now() + LEFT_PATIENCE;
    loop {
        let mut left = scope.leftovers();
        if scope.state.exists() {
            left.push(format!("state directory {}", scope.state.strip_prefix(dir).unwrap_or(dir).display()));
        }
        match left.is_empty() {
            true => return Outcome::Held,
            false if Instant::now() > deadline => {
                let words = left.iter().map(|thing| format!("left when the worker had ended: {thing}"));
                return Outcome::Broken(words.collect());
            }
            false => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// A battery at work.
struct Session<'a> {
    battery: Battery,
    scope: Scope,
    seen: Vec<ProbeReport>,
    progress: &'a mut dyn FnMut(&ProbeReport),
}

impl Session<'_> {
    /// Runs all probes: those that bear company side by side, the others one by one. The error is the end of the battery.
    fn run_all(&mut self, probes: &[&'static Probe]) -> Result<Outcome, String> {
        // What is made once and kept, threads and caches, is no leftover.
        self.order(&[])?;
        self.order(&[])?;
        let (shared, alone): (Vec<&Probe>, Vec<&Probe>) =
            probes.iter().partition(|probe| probe.company == Company::Shared);
        let mut left = Outcome::Held;
        for batch in std::iter::once(shared).chain(alone.into_iter().map(|probe| vec![probe])) {
            if !batch.is_empty() {
                left = left.and(self.batch(&batch)?);
            }
        }
        Ok(left)
    }

    /// Runs a batch. Other programs of this host make differences as well. So what is left counts if it is left again
    /// when the batch is repeated; and it is put down to those probes that leave it twice when they run alone.
    fn batch(&mut self, batch: &[&'static Probe]) -> Result<Outcome, String> {
        let (results, mut left) = self.compared(batch)?;
        for result in results {
            (self.progress)(&result);
            self.seen.push(result);
        }
        if !left.is_empty() {
            left = self.again(batch, &left)?;
        }
        // What is remembered to save work is bounded, but may take several rounds to come to its bounds.
        if !left.is_empty() && left.iter().all(|thing| thing.kind == MEMORY) {
            left = self.again(batch, &left)?;
        }
        if left.is_empty() {
            return Ok(Outcome::Held);
        }
        let mut culprits = 0;
        for probe in batch {
            let mut alone = self.again(&[probe], &left)?;
            if !alone.is_empty() {
                alone = self.again(&[probe], &alone)?;
            }
            if let Some(report) = self.seen.iter_mut().find(|report| report.id == probe.id)
                && !alone.is_empty()
            {
                culprits += 1;
                let words = alone.iter().map(|thing| format!("left behind: {thing}")).collect();
                let outcome = std::mem::replace(&mut report.outcome, Outcome::Held);
                report.outcome = outcome.and(Outcome::Broken(words));
            }
        }
        let ids: Vec<&str> = batch.iter().map(|probe| probe.id).collect();
        let together = || left.iter().map(|thing| format!("after {}: {thing}", ids.join(" ")));
        Ok(if culprits == 0 { Outcome::Broken(together().collect()) } else { Outcome::Held })
    }

    /// Repeats probes, and yields what differs again, of the kinds that differed before.
    fn again(&mut self, batch: &[&'static Probe], before: &[Difference]) -> Result<Vec<Difference>, String> {
        let (_, mut left) = self.compared(batch)?;
        left.retain(|thing| before.iter().any(|known| known.kind == thing.kind));
        Ok(left)
    }

    /// Runs probes and yields what they came to, and how the host differs for good.
    fn compared(&mut self, batch: &[&'static Probe]) -> Result<(Vec<ProbeReport>, Vec<Difference>), String> {
        let before = self.settled();
        let (results, canary) = self.order(batch)?;
        let deadline = Instant::now() + LEFT_PATIENCE;
        let mut left = loop {
            let left = differences(&before, &self.scope.look());
            if left.is_empty() || Instant::now() > deadline {
                break left;
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        if let Outcome::Broken(reasons) = canary {
            left.extend(reasons.into_iter().map(|reason| Difference::new("canary build", reason)));
        }
        Ok((results, left))
    }

    /// The host at rest: two looks that see the same, and no build.
    fn settled(&self) -> Snapshot {
        let deadline = Instant::now() + REST_PATIENCE;
        let mut last = self.scope.look();
        loop {
            std::thread::sleep(Duration::from_millis(30));
            let now = self.scope.look();
            if now == last && !now.builds() || Instant::now() > deadline {
                return now;
            }
            last = now;
        }
    }

    fn order(&mut self, batch: &[&'static Probe]) -> Result<(Vec<ProbeReport>, Outcome), String> {
        self.battery.order(&Order::Run(batch.iter().map(|probe| probe.id.to_owned()).collect()))?;
        let mut results = Vec::new();
        loop {
            // Each has its own deadline in the battery; this one is for a battery that hangs.
            match self.battery.next(DEADLINE * 4)? {
                Reply::Probe { id, outcome, seconds } => {
                    if let Some(probe) = batch.iter().find(|probe| probe.id == id) {
                        results.push(ProbeReport::new(probe, outcome, seconds));
                    }
                }
                Reply::Done { canary } => {
                    let done: Vec<&str> = results.iter().map(|result| result.id).collect();
                    let missed = batch.iter().filter(|probe| !done.contains(&probe.id));
                    let missed = missed.map(|probe| {
                        ProbeReport::new(probe, Outcome::broken("the battery did not run it"), 0.0)
                    });
                    results.extend(missed.collect::<Vec<_>>());
                    return Ok((results, canary));
                }
                other => return Err(format!("the battery answered {other:?}")),
            }
        }
    }
}

/// A battery's process.
struct Battery {
    child: Child,
    orders: Option<ChildStdin>,
    replies: Receiver<String>,
    stderr: Option<JoinHandle<String>>,
}

impl Battery {
    fn start(plan: &Plan<'_>, dir: &Path) -> Result<Self, HostError> {
        let program = dir.join(COPY);
        let mut command = Command::new(&program);
        command.arg("battery").arg("--dir").arg(dir);
        command.args(["--mode", plan.mode.name(), "--profile", plan.profile.name()]);
        if let Some(demand) = plan.inputs {
            command.arg("--isolation").arg(Wish { layer: Layer::Inputs, demand }.to_string());
        }
        let grouped = dir.join(SHOWN).join(GROUP_FILE).exists();
        if grouped || plan.user.is_some() {
            let user = plan.user.unwrap_or(Become { uid: Uid::effective(), gid: Gid::effective() });
            command.arg("--user").arg(format!("{}:{}", user.uid, user.gid));
        }
        if grouped {
            command.arg("--group").arg(CANARY_GROUP.to_string());
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.current_dir("/");
        let mut child = command.spawn().map_err(cannot("execute", program.display()))?;
        let (sender, replies) = mpsc::channel();
        if let Some(stdout) = child.stdout.take() {
            std::thread::spawn(move || {
                for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                    if sender.send(line).is_err() {
                        break;
                    }
                }
            });
        }
        let orders = child.stdin.take();
        let stderr = child.stderr.take().map(|stderr| std::thread::spawn(move || keep(stderr)));
        Ok(Self { child, orders, replies, stderr })
    }

    fn order(&mut self, order: &Order) -> Result<(), String> {
        let orders = self.orders.as_mut().ok_or("the battery was told to end")?;
        let line = serde_json::to_string(order).map_err(|error| error.to_string())?;
        writeln!(orders, "{line}").map_err(|error| format!("the battery ended: {error}"))
    }

    fn next(&mut self, patience: Duration) -> Result<Reply, String> {
        match self.replies.recv_timeout(patience) {
            Ok(line) => {
                serde_json::from_str(&line).map_err(|error| format!("the battery said {line:?}: {error}"))
            }
            Err(RecvTimeoutError::Timeout) => {
                let _ = self.child.kill();
                Err(format!("the battery said nothing for {} s", patience.as_secs()))
            }
            Err(RecvTimeoutError::Disconnected) => match self.child.wait() {
                Ok(status) => Err(format!("the battery ended early: {status}")),
                Err(error) => Err(format!("the battery ended early: {error}")),
            },
        }
    }

    /// Ends it by the end of its input, and yields what it wrote to standard error.
    fn end(mut self) -> (Result<(), String>, String) {
        self.orders = None;
        let deadline = Instant::now() + START_PATIENCE;
        let ended = loop {
            match self.child.try_wait() {
                Ok(Some(status)) if status.success() => break Ok(()),
                Ok(Some(status)) => break Err(format!("the battery ended with {status}")),
                Err(error) => break Err(format!("the battery's end can't be seen: {error}")),
                Ok(None) if Instant::now() > deadline => break Err("the battery does not end".into()),
                Ok(None) => std::thread::sleep(Duration::from_millis(10)),
            }
        };
        let _ = self.child.kill();
        let _ = self.child.wait();
        let stderr = self.stderr.take().and_then(|thread| thread.join().ok()).unwrap_or_default();
        (ended, stderr)
    }
}

impl Drop for Battery {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads to the end, and keeps the beginning.
fn keep(mut from: impl Read) -> String {
    let mut kept = Vec::new();
    // What can't be read is nobody's loss: it is shown where something else went wrong.
    let _ = from.by_ref().take(KEPT_STDERR_BYTES).read_to_end(&mut kept);
    let _ = io::copy(&mut from, &mut io::sink());
    String::from_utf8_lossy(&kept).into_owned()
}

/// A battery's directory. It is removed with all it holds.
struct Directory {
    path: PathBuf,
    /// Its name.
    token: String,
}

impl Directory {
    fn make(plan: &Plan<'_>) -> Result<Self, HostError> {
        let template = plan.parent.join("cofferdam-selftest-XXXXXX");
        let path = nix::unistd::mkdtemp(&template)
            .map_err(|errno| cannot("make a directory in", plan.parent.display())(errno.into()))?;
        let token = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let made = Self { path, token };
        made.furnish(plan)?;
        Ok(made)
    }

    fn furnish(&self, plan: &Plan<'_>) -> Result<(), HostError> {
        let shown = self.path.join(SHOWN);
        fs::DirBuilder::new().mode(0o755).create(&shown).map_err(cannot("make", shown.display()))?;
        self.place_program()?;
        if Uid::effective().is_root() {
            self.place_group_file(&shown)?;
        }
        if let Some(user) = plan.user {
            for path in [self.path.clone(), self.path.join(COPY), shown] {
                let (uid, gid) = (Some(user.uid.as_raw()), Some(user.gid.as_raw()));
                chown(&path, uid, gid).map_err(cannot("give away", path.display()))?;
            }
        }
        // Others pass through it; the user's own things in it are closed.
        fs::set_permissions(&self.path, Permissions::from_mode(0o755)).map_err(cannot("open", &self.token))
    }

    /// A copy of this program that belongs to the user of the mode: that is the worst case, and the original is not at
    /// risk.
    fn place_program(&self) -> Result<(), HostError> {
        let copy = self.path.join(COPY);
        let mut from = File::open("/proc/self/exe").map_err(cannot("open", "this program's own file"))?;
        let mut to = File::create_new(&copy).map_err(cannot("make", copy.display()))?;
        io::copy(&mut from, &mut to).map_err(cannot("write", copy.display()))?;
        to.set_permissions(Permissions::from_mode(0o755)).map_err(cannot("open", copy.display()))
    }

    /// A file that the worker may read by its group alone. Only root can give groups, and not in a container that has
    /// few: then there is none.
    fn place_group_file(&self, shown: &Path) -> Result<(), HostError> {
        let file = shown.join(GROUP_FILE);
        fs::write(&file, "for the group alone\n").map_err(cannot("write", file.display()))?;
        if chown(&file, None, Some(CANARY_GROUP)).is_err() {
            return fs::remove_file(&file).map_err(cannot("remove", file.display()));
        }
        fs::set_permissions(&file, Permissions::from_mode(0o640)).map_err(cannot("close", file.display()))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // What can't be removed was told of as left.
        let _ = fs::remove_dir_all(&self.path);
    }
}
