//! The build's sandbox while it runs, and what its end means.

use cofferdam_sandbox::{ExitStatus, Plan, Report, SetupFailure, SpawnError, Spawner, Stdio, Step};
use nix::errno::Errno;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::pipe::Receiver;

use super::Stop;
use super::error::{Cause, Fault, WorkerError, WorkerPart};
use super::limits::Reached;
use super::request::Request;

/// A sandbox that was asked for. Dropping it kills everything inside.
pub struct Running {
    control: UnixStream,
    said: Vec<u8>,
}

/// The reading ends of what a build writes.
pub struct Pipes {
    /// Standard output.
    pub stdout: Receiver,
    /// Standard error.
    pub stderr: Receiver,
}

impl Running {
    /// Asks the spawner for a sandbox.
    ///
    /// # Errors
    /// Where the spawner can't be reached, or there are no pipes to be had.
    pub fn start(spawner: &Spawner, plan: &Plan) -> Result<(Self, Pipes), WorkerError> {
        let start = || -> Result<_, SpawnError> {
            let io = |act| move |source| SpawnError::Io { act, source };
            let (stdout, stdout_writer) = std::io::pipe().map_err(io("make a pipe"))?;
            let (stderr, stderr_writer) = std::io::pipe().map_err(io("make a pipe"))?;
            let receiver =
                |pipe: std::io::PipeReader| Receiver::from_owned_fd(pipe.into()).map_err(io("watch a pipe"));
            let pipes = Pipes { stdout: receiver(stdout)?, stderr: receiver(stderr)? };
            let stdio = Stdio { stdout: stdout_writer.into(), stderr: stderr_writer.into() };
            let control = std::os::unix::net::UnixStream::from(spawner.spawn(plan, stdio)?);
            control.set_nonblocking(true).map_err(io("watch the sandbox"))?;
            let control = UnixStream::from_std(control).map_err(io("watch the sandbox"))?;
            Ok((Self { control, said: Vec::new() }, pipes))
        };
        start().map_err(|error| WorkerError::new(WorkerPart::Sandbox, error))
    }

    /// Waits for the report. Every process of the sandbox is dead by then.
    ///
    /// # Errors
    /// Where the spawner is gone.
    ///
    /// # Cancel safety
    /// What was heard so far is kept for the next call.
    pub async fn report(&mut self) -> Result<Report, WorkerError> {
        while self.said.len() < Report::MAX_BYTES {
            match self.control.read_buf(&mut self.said).await {
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            }
        }
        Report::from_bytes(&self.said).map_err(|error| WorkerError::new(WorkerPart::Sandbox, error))
    }

    /// Kills whatever lives and waits until it is dead.
    pub async fn end(mut self) {
        // Errors mean that the sandbox, or all of them, ended before.
        let _ = self.control.shutdown().await;
        let _ = self.report().await;
    }
}

/// What the end of a sandbox says of its build.
///
/// # Errors
/// Everything but success: by the build's fault, or by the worker's.
pub fn judge(report: Report, request: &Request, reached: &Reached) -> Result<(), Stop> {
    let cause = match report {
        Report::Ended(ExitStatus::Code(0)) => return Ok(()),
        // Its first process is killed with all others, but may get to say how the command ended.
        Report::Ended(_) | Report::Killed if let Some(limit) = reached.out_of_memory => {
            Cause::OutOfMemory { limit }
        }
        Report::Ended(ExitStatus::Code(code)) => Cause::Exited { code },
        Report::Ended(ExitStatus::Signal(signal)) => Cause::Signalled { signal },
        Report::NotExecuted { errno } => Cause::NotExecutable {
            program: request.command.first().cloned().unwrap_or_default(),
            source: std::io::Error::from_raw_os_error(errno),
        },
        Report::NotSetUp(failure) if is_requests_fault(&failure) => Cause::Layout(failure),
        Report::NotSetUp(failure) => {
            return Err(Fault::from(WorkerError::new(WorkerPart::Sandbox, failure)).into());
        }
        Report::NetworkLost { why } => {
            let lost = format!("the build lost its network: {why}");
            return Err(Fault::from(WorkerError::new(WorkerPart::Sandbox, lost)).into());
        }
        Report::Killed => {
            let killed = "its first process was killed from outside";
            return Err(Fault::from(WorkerError::new(WorkerPart::Sandbox, killed)).into());
        }
    };
    Err(Stop::Failed(match (cause, reached.other) {
        (
            end @ (Cause::Exited { .. } | Cause::Signalled { .. } | Cause::NotExecutable { .. }),
            Some(limit),
        ) => Cause::AtLimit { end: Box::new(end), limit },
        (cause, _) => cause,
    }))
}

/// Whether a sandbox can't be set up because what is requested collides: a file where a directory is needed,
/// say, which shows only once the inputs are there.
fn is_requests_fault(failure: &SetupFailure) -> bool {
    let collision = [Errno::EEXIST, Errno::ENOTDIR, Errno::EISDIR, Errno::ELOOP, Errno::ENOENT, Errno::EROFS]
        .contains(&Errno::from_raw(failure.errno));
    match failure.step {
        Step::WorkingDir => true,
        Step::MakeEntry | Step::MountPoint => collision,
        _ => false,
    }
}
