//! What a probe has to work with outside of its sandbox: a worker, and builds that carry the attack.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::faults::Faults;
use super::{Findings, Mode, Outcome, Play, Probe, Profile};
use crate::build::error::Failure;
use crate::build::events::{Event, LogStream, Output};
use crate::build::request::{Draft, PathFault, Request, SandboxPath};
use crate::build::{Build, error::Fault};
use crate::castore::ingest::{Ingest, IngestError};
use crate::castore::{Name, Node};
use crate::worker::Worker;

/// What this program is called among a probe's inputs.
pub const PROGRAM: &str = "cofferdam-selftest";
/// Where inputs lie, and outputs are made.
pub const STORE: &str = "nix/store";
/// Where the attack starts.
pub const BUILD: &str = "build";

/// How much of a log is shown with a failure.
const SHOWN_LOG_BYTES: usize = 600;

/// What of the worker and of the host all probes of a mode share.
pub struct Theatre {
    /// The worker.
    pub worker: Worker,
    /// Who runs it.
    pub mode: Mode,
    /// What is promised.
    pub profile: Profile,
    /// A directory of this battery's own, which others can't write to. It holds `state`, the worker's, and `shown`.
    pub dir: PathBuf,
    /// This program, in the store.
    pub program: Node,
    /// What is wrong with blobs of the worker's store: nothing, unless a probe says so.
    pub faults: Arc<Faults>,
    /// Why builds get no network; `None`: they do.
    pub no_network: Option<String>,
}

impl Theatre {
    /// A directory that the worker may show to builds that ask for it.
    pub fn shown(&self) -> PathBuf {
        self.dir.join(super::battery::SHOWN)
    }

    /// The worker's state directory.
    pub fn state(&self) -> PathBuf {
        self.dir.join(super::battery::STATE)
    }

    /// The file that the worker was started from.
    pub fn own_file(&self) -> PathBuf {
        self.dir.join(super::battery::COPY)
    }
}

/// The place of one probe.
pub struct Stage<'a> {
    /// What it shares with others.
    pub theatre: &'a Theatre,
    /// The probe.
    pub probe: &'static Probe,
}

/// A build that has ended.
#[derive(Debug)]
pub struct Ended {
    /// What it wrote to standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error.
    pub stderr: Vec<u8>,
    /// How it ended.
    pub end: End,
}

/// How a build ended.
#[derive(Debug)]
pub enum End {
    /// With its outputs.
    Completed(Vec<Output>),
    /// By its own fault.
    Failed(Failure),
    /// Without a result.
    Fault(Fault),
}

impl Ended {
    fn fault(fault: Fault) -> Self {
        Self { stdout: Vec::new(), stderr: Vec::new(), end: End::Fault(fault) }
    }

    /// What the attack found. An attack that ended without telling is broken: nobody knows what it did.
    pub fn verdict(&self) -> Outcome {
        match Findings::read(&self.stdout) {
            Some(findings) => match &self.end {
                End::Completed(_) => findings.outcome(),
                _ => findings.outcome().and(Outcome::broken(self.describe())),
            },
            None => Outcome::broken(format!("the attack ended without a verdict: {}", self.describe())),
        }
    }

    /// How it ended, with the end of its log.
    pub fn describe(&self) -> String {
        let mut text = match &self.end {
            End::Completed(_) => "completed".to_owned(),
            End::Failed(failure) => failure.message.clone(),
            End::Fault(fault) => fault.to_string(),
        };
        for (name, log) in [("stdout", &self.stdout), ("stderr", &self.stderr)] {
            if !log.is_empty() {
                let start = log.len().saturating_sub(SHOWN_LOG_BYTES);
                let shown = log.get(start..).unwrap_or(log).trim_ascii();
                // Writing to a string can't fail.
                let _ = write!(text, "; {name}: {}", String::from_utf8_lossy(shown));
            }
        }
        text
    }
}

impl Stage<'_> {
    /// A request that runs the probe's attack, in a role, with further arguments.
    ///
    /// This program is an input in `nix/store`, which is a scratch path too, as in a build of Nix's. The attack starts in
    /// `build`.
    ///
    /// # Errors
    /// Never, in practice: the paths are constants.
    pub fn draft(&self, role: &str, arguments: &[&OsStr]) -> Result<Draft, PathFault> {
        let (store, build) = (SandboxPath::new(STORE)?, SandboxPath::new(BUILD)?);
        let mut command: Vec<Vec<u8>> = vec![format!("/{STORE}/{PROGRAM}").into()];
        command.extend(self.command_tail(role).map(String::into_bytes));
        command.extend(arguments.iter().map(|argument| argument.as_bytes().to_vec()));
        Ok(Draft {
            inputs: [(name(PROGRAM), self.theatre.program.clone())].into(),
            command,
            working_dir: build.clone(),
            scratch_paths: [build, store.clone()].into(),
            inputs_dir: store,
            ..Draft::default()
        })
    }

    /// The arguments that have this program run the attack.
    fn command_tail(&self, role: &str) -> impl Iterator<Item = String> {
        let Theatre { mode, profile, dir, .. } = self.theatre;
        let token = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let options =
            ["--mode", mode.name(), "--profile", profile.name(), "--role", role, "--token", &token, "--"];
        ["probe", self.probe.id]
            .iter()
            .chain(&options)
            .map(|word| (*word).to_owned())
            .collect::<Vec<_>>()
            .into_iter()
    }

    /// Carries out the probe.
    pub async fn play(&self) -> Outcome {
        match &self.probe.play {
            Play::Plain => self.act("", &[]).await,
            Play::Request(adapt) => match self.draft("", &[]) {
                Ok(mut draft) => match adapt(self, &mut draft) {
                    Ok(()) => self.run(draft).await.verdict(),
                    Err(outcome) => outcome,
                },
                Err(fault) => Outcome::broken(fault.to_string()),
            },
            Play::Script(script) => script(self).await,
        }
    }

    /// One build that runs the attack in a role.
    pub async fn act(&self, role: &str, arguments: &[&OsStr]) -> Outcome {
        match self.draft(role, arguments) {
            Ok(draft) => self.run(draft).await.verdict(),
            Err(fault) => Outcome::broken(fault.to_string()),
        }
    }

    /// Carries out a build to its end.
    pub async fn run(&self, draft: Draft) -> Ended {
        match self.start(draft).await {
            Ok(mut running) => running.finish().await,
            Err(fault) => Ended::fault(fault),
        }
    }

    /// Starts a build. Dropping it ends it.
    ///
    /// # Errors
    /// Before any event.
    pub async fn start(&self, draft: Draft) -> Result<Running, Fault> {
        let request = Request::new(draft)?;
        let build = self.theatre.worker.builder.start(request).await?;
        Ok(Running { build, stdout: Vec::new(), stderr: Vec::new(), longest_piece: 0 })
    }

    /// The processes on the host that run this probe's attack, as "pid arguments".
    pub fn processes(&self) -> Vec<String> {
        let token = self.theatre.dir.file_name().unwrap_or_default().to_string_lossy();
        let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        entries
            .filter_map(|entry| {
                let arguments = std::fs::read(entry.path().join("cmdline")).ok()?;
                let words: Vec<String> = arguments
                    .split(|byte| *byte == 0)
                    .map(|word| String::from_utf8_lossy(word).into_owned())
                    .collect();
                let ours =
                    words.iter().any(|word| word == self.probe.id) && words.contains(&token.to_string());
                ours.then(|| format!("{} {}", entry.file_name().display(), words.join(" ")))
            })
            .collect()
    }

    /// Takes a file or a tree of the host into the store.
    ///
    /// # Errors
    /// Where that fails.
    pub fn ingest(&self, path: &Path) -> Result<Node, IngestError> {
        ingest(&self.theatre.worker, path)
    }
}

/// Takes a file or a tree of the host into the store.
pub(super) fn ingest(worker: &Worker, path: &Path) -> Result<Node, IngestError> {
    let (cancel, label) = (std::sync::atomic::AtomicBool::new(false), path.display().to_string());
    Ingest {
        store: &worker.store,
        scanner: None,
        skip: &[],
        label: &label,
        allowance: None,
        tally: None,
        cancel: &cancel,
    }
    .path(path)
}

/// A name that is known to be one.
///
/// # Panics
/// Where it is none, which a constant can't come to be.
pub fn name(constant: &'static str) -> Name {
    Name::new(constant).unwrap_or_else(|error| panic!("{constant:?}: {error}"))
}

/// A path that is known to be one.
///
/// # Panics
/// Where it is none, which a constant can't come to be.
pub fn path(constant: &'static str) -> SandboxPath {
    SandboxPath::new(constant).unwrap_or_else(|error| panic!("{constant:?}: {error}"))
}

/// A build that runs.
pub struct Running {
    build: Build,
    /// What it has written to standard output so far.
    pub stdout: Vec<u8>,
    stderr: Vec<u8>,
    /// The length of the longest piece that its log came in so far.
    pub longest_piece: usize,
}

impl Running {
    /// The worker's name for the build.
    pub fn id(&self) -> &str {
        &self.build.id
    }

    /// Waits until standard output contains `text`.
    ///
    /// # Errors
    /// The end, where the build ended without.
    pub async fn said(&mut self, text: &str) -> Result<(), Ended> {
        let mut searched = 0;
        loop {
            let rest = self.stdout.get(searched..).unwrap_or_default();
            if memchr::memmem::find(rest, text.as_bytes()).is_some() {
                return Ok(());
            }
            searched = self.stdout.len().saturating_sub(text.len());
            if let Some(ended) = self.step().await {
                return Err(ended);
            }
        }
    }

    /// Waits for the end.
    pub async fn finish(&mut self) -> Ended {
        loop {
            if let Some(ended) = self.step().await {
                return ended;
            }
        }
    }

    /// Takes one event.
    async fn step(&mut self) -> Option<Ended> {
        let end = match self.build.next().await {
            Some(Ok(Event::Log { stream, data })) => {
                self.longest_piece = self.longest_piece.max(data.len());
                match stream {
                    LogStream::Stdout => self.stdout.extend_from_slice(&data),
                    LogStream::Stderr => self.stderr.extend_from_slice(&data),
                }
                return None;
            }
            Some(Ok(Event::Completed { outputs })) => End::Completed(outputs),
            Some(Ok(Event::Failed(failure))) => End::Failed(failure),
            Some(Ok(_)) => return None,
            Some(Err(fault)) => End::Fault(fault),
            None => End::Fault(Fault::Cancelled),
        };
        let (stdout, stderr) = (std::mem::take(&mut self.stdout), std::mem::take(&mut self.stderr));
        Some(Ended { stdout, stderr, end })
    }
}
