//! Who is at fault, split once: the request or the worker ends a build without a further event
//! ([`Fault`]); the build's own end, if it's a bad one, is an event ([`Failure`]).

use std::error::Error;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use cofferdam_sandbox::SetupFailure;
use nix::sys::signal::Signal;

use super::logs::LogError;
use super::request::{InvalidRequest, SandboxPath};
use crate::castore::closure::{Finding, Problem};
use crate::castore::ingest::TreeFault;
use crate::castore::node::printable;
use crate::inputs::ShowError;
use crate::size::Size;

/// Why a build got no terminal event: the request's fault, the worker's, or the client's wish.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// No worker could carry out such a request.
    #[error("{0}")]
    Invalid(#[from] InvalidRequest),
    /// This worker doesn't offer what the request needs.
    #[error("{0}")]
    Unsupported(#[from] Unsupported),
    /// The store lacks inputs, or has them in other sizes than stated.
    #[error("{0}")]
    UnfitInputs(#[from] UnfitInputs),
    /// The worker takes no build now.
    #[error("{0}")]
    Refused(#[from] Refused),
    /// The worker could not go on.
    #[error("{0}")]
    Worker(#[from] WorkerError),
    /// The client has gone, or took the request back.
    #[error("the build was cancelled")]
    Cancelled,
}

impl From<ShowError> for Fault {
    fn from(error: ShowError) -> Self {
        match error {
            ShowError::Cancelled => Self::Cancelled,
            error => WorkerError::new(WorkerPart::View, error).into(),
        }
    }
}

impl From<LogError> for Fault {
    fn from(error: LogError) -> Self {
        match error {
            LogError::Closed => Self::Cancelled,
            LogError::Read { .. } => WorkerError::new(WorkerPart::Log, error).into(),
        }
    }
}

/// What this worker doesn't offer; another might.
#[derive(Debug, thiserror::Error)]
pub enum Unsupported {
    /// It is of another system.
    #[error("constraints.system: this worker builds for {}, not for {wanted}", offered.join(", "))]
    System {
        /// What is needed.
        wanted: String,
        /// What there is.
        offered: Vec<String>,
    },
    /// It has less memory.
    #[error("constraints.min_memory: this worker gives a build {offered} bytes of memory, not {wanted}")]
    Memory {
        /// Bytes needed.
        wanted: u64,
        /// Bytes there are.
        offered: u64,
    },
    /// It doesn't let builds see this path of its own.
    #[error(
        "constraints.available_ro_paths: this worker shows builds no \"{}\"; its operator can, with --allow-host-path",
        .path.display()
    )]
    HostPath {
        /// The path.
        path: PathBuf,
    },
    /// The path is allowed, but isn't there.
    #[error("constraints.available_ro_paths: this worker has no \"{}\": {source}", .path.display())]
    HostPathMissing {
        /// The path.
        path: PathBuf,
        /// Why it can't be had.
        source: io::Error,
    },
    /// The path is a device that builds may not open.
    #[error(
        "constraints.available_ro_paths: builds can't open the device \"{}\" of this worker: {source}; its mode or \
         access list must let their user ids read and write it", .path.display()
    )]
    ClosedDevice {
        /// The path.
        path: PathBuf,
        /// The refusal.
        source: io::Error,
    },
    /// It has no shell to offer.
    #[error(
        "constraints.provide_bin_sh: this worker has no /bin/sh for builds; its operator can name one with \
             --sandbox-shell"
    )]
    NoShell,
    /// It lets no build reach the network.
    #[error(
        "constraints.network_access: this worker gives builds no network; its operator can, with \
             --allow-network"
    )]
    NoNetwork,
    /// It can't isolate builds well enough, and so does none.
    #[error("this worker does no builds: {reason}")]
    BuildsDisabled {
        /// What it lacks.
        reason: String,
    },
}

/// Inputs that the store lacks, or has in other sizes than stated; never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnfitInputs(pub Vec<Finding>);

/// Longest text of [`UnfitInputs`] in bytes: it travels in the headers of a response, for which many clients
/// take no more than 8 KiB.
const UNFIT_INPUTS_BYTES: usize = 4096;

/// What of that is kept for saying how many are not named.
const MORE_BYTES: usize = 32;

impl fmt::Display for UnfitInputs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = match self.0.iter().all(|finding| finding.problem == Problem::Missing) {
            true => "the store lacks inputs, upload them first:".to_owned(),
            false => "inputs are not in the store, or not of the size stated:".to_owned(),
        };
        let limit = UNFIT_INPUTS_BYTES - MORE_BYTES;
        let mut named = 0;
        for finding in &self.0 {
            let finding = format!("{} {finding}", if named == 0 { "" } else { "," });
            if named > 0 && text.len() + finding.len() > limit {
                break;
            }
            text.push_str(&finding);
            named += 1;
        }
        // The first one alone may be too long, by its path.
        text.truncate(text.floor_char_boundary(limit));
        match self.0.len() - named {
            0 => f.write_str(&text),
            more => write!(f, "{text}, and {more} more"),
        }
    }
}

impl Error for UnfitInputs {}

/// Why no build is taken on now; another worker, or this one later, may.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// As many builds run and wait as may.
    #[error("{running} builds run and {waiting} wait here already; try again in {} s", retry_after.as_secs())]
    Busy {
        /// Builds that run.
        running: usize,
        /// Builds that wait for a slot.
        waiting: usize,
        /// When it is worth trying again.
        retry_after: Duration,
    },
    /// The worker is about to end.
    #[error("this worker is shutting down and takes no more builds")]
    Draining,
}

/// Something of the worker's failed; the build isn't to blame.
#[derive(Debug, thiserror::Error)]
#[error("the worker's {part} failed: {source}")]
pub struct WorkerError {
    /// Which part of it.
    pub part: WorkerPart,
    /// The first cause.
    pub source: Box<dyn Error + Send + Sync>,
}

impl WorkerError {
    /// A failure of `part`.
    pub fn new(part: WorkerPart, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { part, source: source.into() }
    }
}

/// The parts of a worker that can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WorkerPart {
    /// The castore.
    Store,
    /// The file system that shows inputs.
    View,
    /// The spawner, or the making of a sandbox.
    Sandbox,
    /// The disk that scratch paths are on.
    Scratch,
    /// The way of the build's output to the log.
    Log,
    /// The program itself: something happened that it holds impossible.
    Program,
}

impl fmt::Display for WorkerPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Store => "store",
            Self::View => "view of the inputs",
            Self::Sandbox => "sandbox",
            Self::Scratch => "scratch space",
            Self::Log => "log",
            Self::Program => "program",
        })
    }
}

/// The channel that a fault takes to the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// The request is malformed: sending it again is useless everywhere.
    InvalidRequest,
    /// Something must change before the request can be carried out here.
    Precondition,
    /// Try again after this time, or elsewhere at once.
    Busy(Duration),
    /// Try again elsewhere.
    Unavailable,
    /// The worker is broken.
    Internal,
    /// Nobody waits for an answer.
    Cancelled,
}

impl Fault {
    /// The channel it takes.
    pub fn kind(&self) -> FaultKind {
        match self {
            Self::Invalid(_) => FaultKind::InvalidRequest,
            Self::Unsupported(_) | Self::UnfitInputs(_) => FaultKind::Precondition,
            Self::Refused(Refused::Busy { retry_after, .. }) => FaultKind::Busy(*retry_after),
            Self::Refused(Refused::Draining) => FaultKind::Unavailable,
            Self::Worker(WorkerError { part: WorkerPart::Program, .. }) => FaultKind::Internal,
            Self::Worker(_) => FaultKind::Unavailable,
            Self::Cancelled => FaultKind::Cancelled,
        }
    }
}

/// A build that failed by itself, as its last event tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What went wrong, for people.
    pub message: String,
    /// As a shell gives it; `None` where the command is not what failed.
    pub exit_code: Option<i32>,
}

impl Failure {
    /// Whether the message says no more than the exit code.
    pub fn is_plain_exit(&self) -> bool {
        self.exit_code.is_some_and(|code| self.message == Cause::Exited { code }.to_string())
    }
}

impl From<Cause> for Failure {
    fn from(cause: Cause) -> Self {
        Self { message: cause.to_string(), exit_code: cause.exit_code() }
    }
}

/// What can make a build fail by itself.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// The command ended with a code other than 0.
    #[error("the command exited with code {code}")]
    Exited {
        /// The code.
        code: i32,
    },
    /// A signal ended the command.
    #[error("the command was ended by {}", SignalName(*signal))]
    Signalled {
        /// The signal's number.
        signal: i32,
    },
    /// The kernel would not execute the program.
    #[error("can't execute \"{}\": {source}{}", printable(program), exec_hint(source))]
    NotExecutable {
        /// The program, as the request names it.
        program: Vec<u8>,
        /// The refusal.
        source: io::Error,
    },
    /// The command succeeded, but not all outputs are there.
    #[error("the command succeeded, but did not make {}", quoted(paths))]
    MissingOutputs {
        /// Those that are missing, in the request's order.
        paths: Vec<SandboxPath>,
    },
    /// An output holds something that the castore has no form for.
    #[error("an output can't be stored: {0}")]
    UnstorableOutput(TreeFault),
    /// It was killed because there was no more memory.
    #[error("out of memory: {}", memory_limit(*limit))]
    OutOfMemory {
        /// Bytes that the build may have, if that is limited.
        limit: Option<u64>,
    },
    /// Its files take more of the disk than they may.
    #[error("limit reached: the build's files take more than {limit} on disk (--max-scratch)")]
    ScratchFull {
        /// What they may take.
        limit: Size,
    },
    /// Its outputs hold more than its files may take of the disk.
    #[error(
        "limit reached: the outputs hold more than {limit}, holes and each name of a file counted (--max-scratch); {path} \
         is where it shows"
    )]
    OutputsTooLarge {
        /// What they may hold.
        limit: Size,
        /// The file that was too much, escaped.
        path: String,
    },
    /// It has more files than it may.
    #[error("limit reached: the build has more than {limit} files and directories (a part of --max-scratch)")]
    TooManyFiles {
        /// How many it may have.
        limit: u64,
    },
    /// It ended in another way, for which a limit may be the reason.
    #[error("{end}, and had reached {limit}")]
    AtLimit {
        /// How it ended.
        end: Box<Cause>,
        /// What it had reached.
        limit: LimitReached,
    },
    /// Something that the request places in the sandbox has no place there.
    #[error("the sandbox can't be laid out as requested: {0}")]
    Layout(SetupFailure),
}

impl Cause {
    /// What a shell would give as `$?`; `None` where the command is not what failed.
    fn exit_code(&self) -> Option<i32> {
        match self {
            Self::Exited { code } => Some(*code),
            Self::Signalled { signal, .. } => Some(128_i32.saturating_add(*signal)),
            Self::NotExecutable { source, .. } if source.kind() == io::ErrorKind::NotFound => Some(127),
            Self::NotExecutable { .. } => Some(126),
            // By a signal of the kernel's.
            Self::OutOfMemory { .. } => Some(128 + Signal::SIGKILL as i32),
            Self::AtLimit { end, .. } => end.exit_code(),
            Self::MissingOutputs { .. }
            | Self::UnstorableOutput(_)
            | Self::ScratchFull { .. }
            | Self::OutputsTooLarge { .. }
            | Self::TooManyFiles { .. }
            | Self::Layout(_) => None,
        }
    }
}

/// A limit that a build was held to. Programs tell of it in their own ways, or not at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LimitReached {
    /// No more processes were to be had.
    #[error("its limit of {0} processes (--max-processes)")]
    Processes(u64),
    /// A file could not become longer.
    #[error("its limit of {} for a file (--max-scratch)", Size(*.0))]
    FileSize(u64),
}

fn memory_limit(limit: Option<u64>) -> String {
    match limit {
        Some(bytes) => format!("limit {} (--max-memory)", Size(bytes)),
        None => "this worker, or its cgroup, had none left".into(),
    }
}

/// `signal 9 (SIGKILL)`; real-time signals have no name.
struct SignalName(i32);

impl fmt::Display for SignalName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Signal::try_from(self.0) {
            Ok(signal) => write!(f, "signal {} ({})", self.0, signal.as_str()),
            Err(_) => write!(f, "signal {}", self.0),
        }
    }
}

/// What an errno of `execve` most often means.
fn exec_hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOENT) => {
            "; neither the program nor what it needs to start (a script's interpreter, a dynamic loader) may be \
             missing from the inputs"
        }
        Some(libc::ENOEXEC) => "; it is neither a script with an interpreter nor a program for this machine",
        Some(libc::EACCES) => "; it is not an executable file",
        Some(libc::E2BIG) => "; pass large values in files",
        _ => "",
    }
}

fn quoted(paths: &[SandboxPath]) -> String {
    paths.iter().map(|path| format!("\"{path}\"")).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::request::PathFault;
    use crate::castore::closure::ObjectKind;
    use crate::castore::{Digest, ingest::FileKind};

    fn path(text: &str) -> SandboxPath {
        text.parse().unwrap()
    }

    fn not_executable(errno: i32) -> Cause {
        Cause::NotExecutable { program: b"/bin/x".to_vec(), source: io::Error::from_raw_os_error(errno) }
    }

    #[test]
    fn failures_have_words_and_a_shells_code() {
        let fault = TreeFault::Unsupported { path: "out/s".into(), kind: FileKind::Socket };
        let cases = [
            (Cause::Exited { code: 3 }, "the command exited with code 3", Some(3)),
            (Cause::Signalled { signal: 11 }, "the command was ended by signal 11 (SIGSEGV)", Some(139)),
            (
                Cause::OutOfMemory { limit: Some(1 << 30) },
                "out of memory: limit 1073741824 bytes (1 GiB) (--max-memory)",
                Some(137),
            ),
            (
                Cause::OutOfMemory { limit: None },
                "out of memory: this worker, or its cgroup, had none left",
                Some(137),
            ),
            (
                Cause::AtLimit {
                    end: Box::new(Cause::Signalled { signal: 25 }),
                    limit: LimitReached::FileSize(5000),
                },
                "the command was ended by signal 25 (SIGXFSZ), and had reached its limit of 5000 bytes for a file \
                 (--max-scratch)",
                Some(153),
            ),
            (
                Cause::AtLimit {
                    end: Box::new(Cause::Exited { code: 2 }),
                    limit: LimitReached::Processes(64),
                },
                "the command exited with code 2, and had reached its limit of 64 processes (--max-processes)",
                Some(2),
            ),
            (
                Cause::ScratchFull { limit: Size(1 << 20) },
                "limit reached: the build's files take more than 1048576 bytes (1 MiB) on disk (--max-scratch)",
                None,
            ),
            (
                Cause::OutputsTooLarge { limit: Size(1 << 20), path: "out/f".into() },
                "limit reached: the outputs hold more than 1048576 bytes (1 MiB), holes and each name of a file counted \
                 (--max-scratch); out/f is where",
                None,
            ),
            (
                Cause::TooManyFiles { limit: 9 },
                "limit reached: the build has more than 9 files and directories",
                None,
            ),
            (Cause::Signalled { signal: 40 }, "the command was ended by signal 40", Some(168)),
            (
                not_executable(libc::ENOENT),
                "can't execute \"/bin/x\": No such file or directory (os error 2); neither the program",
                Some(127),
            ),
            (
                not_executable(libc::EACCES),
                "can't execute \"/bin/x\": Permission denied (os error 13); it is not an executable file",
                Some(126),
            ),
            (
                not_executable(libc::ENOEXEC),
                "can't execute \"/bin/x\": Exec format error (os error 8); it is neither",
                Some(126),
            ),
            (
                not_executable(libc::EIO),
                "can't execute \"/bin/x\": Input/output error (os error 5)",
                Some(126),
            ),
            (
                Cause::MissingOutputs { paths: vec![path("out/b"), path("out/a")] },
                "the command succeeded, but did not make \"out/b\", \"out/a\"",
                None,
            ),
            (
                Cause::UnstorableOutput(fault),
                "an output can't be stored: out/s is a socket; only files, directories and symbolic links can be \
                 stored",
                None,
            ),
        ];
        for (cause, message, exit_code) in cases {
            let failure = Failure::from(cause);
            assert!(failure.message.starts_with(message), "{}\n  not {message}", failure.message);
            assert_eq!(failure.exit_code, exit_code, "{message}");
            assert_eq!(failure.is_plain_exit(), message == "the command exited with code 3", "{message}");
        }
    }

    #[test]
    fn faults_have_words_and_a_channel() {
        let unfit = |problem| {
            let path = "nix/store/x".into();
            UnfitInputs(vec![Finding { kind: ObjectKind::Blob, digest: Digest::of(b""), path, problem }])
        };
        let invalid = InvalidRequest { field: "outputs[0]".to_owned(), fault: PathFault::Empty.into() };
        let busy = Refused::Busy { running: 2, waiting: 8, retry_after: Duration::from_secs(5) };
        let system = Unsupported::System {
            wanted: "riscv64-linux".to_owned(),
            offered: vec!["x86_64-linux".to_owned(), "i686-linux".to_owned()],
        };
        let cases: [(Fault, &str, FaultKind); 9] = [
            (invalid.into(), "outputs[0]: the path is empty", FaultKind::InvalidRequest),
            (
                system.into(),
                "constraints.system: this worker builds for x86_64-linux, i686-linux, not for riscv64-linux",
                FaultKind::Precondition,
            ),
            (
                unfit(Problem::Missing).into(),
                "the store lacks inputs, upload them first: blob af1349b9f5f9a1a6a0404dea36dcc949\
                 9bcb25c9adc112b7cc9a93cae41f3262 (needed for nix/store/x)",
                FaultKind::Precondition,
            ),
            (
                unfit(Problem::Size { stated: 5, actual: 7 }).into(),
                "inputs are not in the store, or not of the size stated: blob af1349b9f5f9a1a6a0404dea36dcc949\
                 9bcb25c9adc112b7cc9a93cae41f3262 (needed for nix/store/x with size 5, but of size 7)",
                FaultKind::Precondition,
            ),
            (
                busy.into(),
                "2 builds run and 8 wait here already; try again in 5 s",
                FaultKind::Busy(Duration::from_secs(5)),
            ),
            (
                Refused::Draining.into(),
                "this worker is shutting down and takes no more builds",
                FaultKind::Unavailable,
            ),
            (
                WorkerError::new(WorkerPart::Scratch, io::Error::from_raw_os_error(libc::ENOSPC)).into(),
                "the worker's scratch space failed: No space left on device (os error 28)",
                FaultKind::Unavailable,
            ),
            (
                WorkerError::new(WorkerPart::Program, "lost").into(),
                "the worker's program failed: lost",
                FaultKind::Internal,
            ),
            (Fault::Cancelled, "the build was cancelled", FaultKind::Cancelled),
        ];
        for (fault, message, kind) in cases {
            assert!(fault.to_string().ends_with(message), "{fault}\n  not {message}");
            assert_eq!(fault.kind(), kind, "{message}");
        }
    }

    #[test]
    fn however_much_is_missing_its_list_fits_a_header() {
        let digest = Digest::of(b"");
        let finding = |path| Finding { kind: ObjectKind::Blob, digest, path, problem: Problem::Missing };
        let cases = [
            (vec!["in/x".to_owned(); 100], ", and 55 more"),
            (vec!["in/x".to_owned(); 45], " (needed for in/x)"),
            (["y".repeat(9000)].into(), "yyyy"),
            (vec!["y".repeat(4000); 3], ", and 2 more"),
        ];
        for (paths, end) in cases {
            let text = UnfitInputs(paths.into_iter().map(finding).collect()).to_string();
            assert!(
                text.len() <= UNFIT_INPUTS_BYTES && text.len() > UNFIT_INPUTS_BYTES - 300,
                "{}",
                text.len()
            );
            assert!(text.ends_with(end), "{text}\n  not {end}");
        }
    }
}
