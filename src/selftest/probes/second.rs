//! A daemon beside the battery's worker, for probes that end it, each with a state directory of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::tools::eventually;
use crate::address::Address;
use crate::build::events::{Event, LogStream};
use crate::build::request::{Draft, Request};
use crate::castore::Store;
use crate::castore::remote::RemoteStore;
use crate::remote::RemoteBuild;
use crate::selftest::Outcome;
use crate::selftest::stage::{BUILD, Stage, path};

/// How long a daemon may take to start.
const START: Duration = Duration::from_secs(10);

/// How long what a daemon leaves may take to vanish.
pub const END: Duration = Duration::from_secs(5);

/// A directory for one daemon after another. Removed with this value.
pub struct Place {
    dir: PathBuf,
}

impl Place {
    /// A new one, named after the probe.
    ///
    /// # Errors
    /// Where it can't be made.
    pub fn new(stage: &Stage<'_>) -> Result<Self, Outcome> {
        let dir = stage.theatre.dir.join(format!("second-{}", stage.probe.id));
        // What a run that was cut short has left.
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir(&dir)
            .map_err(|error| Outcome::broken(format!("can't make {}: {error}", dir.display())))?;
        Ok(Self { dir })
    }

    /// The state directory of the daemons here.
    pub fn state(&self) -> PathBuf {
        self.dir.join("state")
    }

    /// The socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("run/socket")
    }

    /// Where the daemon's socket is to be found.
    pub fn address(&self) -> Address {
        Address::Unix(self.socket())
    }

    /// The names of builds that have something on disk.
    pub fn builds(&self) -> Vec<String> {
        super::tools::names(self.state().join("builds")).unwrap_or_default().into_iter().collect()
    }

    /// Starts a daemon with these arguments more, and waits until it listens.
    ///
    /// # Errors
    /// Where it does not.
    pub async fn daemon(&self, stage: &Stage<'_>, arguments: &[&str]) -> Result<Daemon, Outcome> {
        let mut daemon = Daemon { child: self.spawn(stage, arguments)?, ended: None };
        let listens = eventually(START, || daemon.has_ended() || self.answers()).await;
        if listens && !daemon.has_ended() {
            return Ok(daemon);
        }
        Err(Outcome::broken(format!("the second daemon does not start: {}", self.said())))
    }

    /// Whether somebody listens at the socket: its file may be that of a daemon that was killed.
    fn answers(&self) -> bool {
        std::os::unix::net::UnixStream::connect(self.socket()).is_ok()
    }

    /// Starts one without waiting for anything.
    ///
    /// # Errors
    /// Where it can't be executed.
    pub fn spawn(&self, stage: &Stage<'_>, arguments: &[&str]) -> Result<Child, Outcome> {
        let broken = |error: std::io::Error| Outcome::broken(format!("can't start a second daemon: {error}"));
        let log = fs::File::options().append(true).create(true).open(self.log()).map_err(broken)?;
        let program = stage.theatre.own_file();
        let mut command = Command::new(&program);
        command.args(["daemon", "--listen"]).arg(format!("unix:{}", self.socket().display()));
        command.arg("--state-dir").arg(self.state()).arg("--allow-host-path").arg(&program).args(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().map_err(broken)
    }

    /// The end of what the daemons here have said.
    pub fn said(&self) -> String {
        let said = fs::read(self.log()).unwrap_or_default();
        let start = said.len().saturating_sub(600);
        String::from_utf8_lossy(said.get(start..).unwrap_or_default()).trim().to_owned()
    }

    fn log(&self) -> PathBuf {
        self.dir.join("log")
    }

    /// The store of the daemon, from outside. Its calls block.
    ///
    /// # Errors
    /// Where the daemon can't be reached.
    pub async fn store(&self) -> Result<Store, Outcome> {
        let channel = self.address().connect().await.map_err(|error| Outcome::broken(error.to_string()))?;
        let runtime = tokio::runtime::Handle::current();
        Ok(RemoteStore::new(channel, "the second daemon", runtime, &self.dir).store())
    }

    /// Starts a build that runs the probe's attack in a role and is known to hold.
    ///
    /// # Errors
    /// Where it does not get that far.
    pub async fn holding(&self, stage: &Stage<'_>, role: &str) -> Result<RemoteBuild, Outcome> {
        let mut build = self.build(stage, role).await?;
        let mut said = Vec::new();
        while memchr::memmem::find(&said, b"holding").is_none() {
            match build.next().await {
                Some(Ok(Event::Log { stream: LogStream::Stdout, data })) => said.extend_from_slice(&data),
                Some(Ok(Event::Log { .. } | Event::Started { .. })) => {}
                other => return Err(Outcome::broken(format!("a build does not get to hold: {other:?}"))),
            }
        }
        Ok(build)
    }

    /// Starts a build that runs the probe's attack in a role.
    ///
    /// # Errors
    /// Where it is refused.
    pub async fn build(&self, stage: &Stage<'_>, role: &str) -> Result<RemoteBuild, Outcome> {
        let request = request(stage, role).map_err(Outcome::broken)?;
        let build = RemoteBuild::start(&self.address(), &request).await;
        build.map_err(|error| Outcome::broken(format!("the second daemon refuses a build: {error}")))
    }
}

/// A request that needs nothing of the store: the program is shown in its place on the host.
pub fn request(stage: &Stage<'_>, role: &str) -> Result<Request, String> {
    let draft = stage.draft(role, &[]).map_err(|fault| fault.to_string())?;
    let program = stage.theatre.own_file();
    let mut command = draft.command.clone();
    if let Some(first) = command.first_mut() {
        *first = program.as_os_str().as_encoded_bytes().to_vec();
    }
    let mut draft =
        Draft { inputs: Default::default(), command, scratch_paths: [path(BUILD)].into(), ..draft };
    draft.constraints.ro_paths.push(program);
    // The wire has no form for constraints without.
    draft.constraints.system = Some(format!("{}-linux", std::env::consts::ARCH));
    Request::new(draft).map_err(|error| error.to_string())
}

impl Drop for Place {
    fn drop(&mut self) {
        // What can't be removed is told of as left.
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// A daemon. It is killed with this value.
pub struct Daemon {
    child: Child,
    ended: Option<ExitStatus>,
}

impl Daemon {
    /// One that was started without waiting.
    pub fn of(child: Child) -> Self {
        Self { child, ended: None }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        if self.ended.is_none() {
            let _ = kill(Pid::from_raw(self.child.id().cast_signed()), signal);
        }
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().ok().flatten();
        }
        self.ended.is_some()
    }

    /// Waits for its end. `None`: it takes longer than `patience`.
    pub async fn end(&mut self, patience: Duration) -> Option<ExitStatus> {
        eventually(patience, || self.has_ended()).await;
        self.ended
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.signal(Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

/// The processes whose parent is `pid`.
pub fn children(pid: u32) -> Vec<u32> {
    let tasks =
        fs::read_dir(Path::new("/proc").join(pid.to_string()).join("task")).into_iter().flatten().flatten();
    tasks
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|text| text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<u32>>())
        .collect()
}
