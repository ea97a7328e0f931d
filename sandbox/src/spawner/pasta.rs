//! The process that connects a sandbox to the network, as the spawner has it: started before the sandbox goes on, watched
//! while it runs, dead before its end is told.

use std::fmt::Write;
use std::fs::File;
use std::io::{Read, Seek};
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::sched::CloneFlags;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::{self, Pid};

use crate::child::forwarder::{self, Place};
use crate::ids::IdMap;
use crate::pasta::Pasta;
use crate::report::{ExitStatus, SetupFailure, Step};
use crate::sys;

/// How much of what it says is kept. As text it may be three times as long, and must fit a report.
const SAID_BYTES: i64 = 1024;

/// A running pasta. Dropping it kills it and waits for its end.
pub struct Forwarder {
    pid: Pid,
    pidfd: OwnedFd,
    /// Yields something when everything is in place; `None` afterwards.
    ready: Option<File>,
    said: File,
    /// How it ended, once that is known.
    ended: Option<ExitStatus>,
}

/// What a forwarder was found to be.
#[derive(Debug, PartialEq, Eq)]
pub enum Progress {
    /// Nothing new.
    None,
    /// It has connected the sandbox.
    Connected,
    /// It has ended.
    Ended,
}

impl Forwarder {
    /// Starts pasta on the network namespace of `sandbox`, whose first process must not have changed its ids: later on it
    /// may be closed to the spawner.
    pub fn start(
        pasta: &Pasta,
        name_servers: &[IpAddr],
        ids: &IdMap,
        (sandbox, sandbox_fd): (Pid, BorrowedFd<'_>),
    ) -> Result<Self, SetupFailure> {
        let program = || pasta.program().display().to_string();
        let fail = |errno| SetupFailure::new(Step::StartForwarder, errno, program());
        let network = format!("/proc/{sandbox}/ns/net");
        let network = nix::fcntl::open(network.as_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty());
        let network =
            network.map_err(|errno| SetupFailure::new(Step::OpenSource, errno, "its network namespace"))?;
        let (ready, ready_write) = unistd::pipe2(OFlag::O_CLOEXEC).map_err(fail)?;
        // It is opened by name in /proc, by the sandbox's root, who may own nothing here.
        fchmod(&ready_write, Mode::from_bits_truncate(0o622)).map_err(fail)?;
        let said = memory_for_words().map_err(fail)?;
        let said_write = said.try_clone().map_err(|_| fail(Errno::EMFILE))?;
        let (name, arguments) = (pasta.program_name(), pasta.arguments(name_servers));
        // It sees no other process of the host, and others of its kind neither.
        // SAFETY: the spawner has one thread for life.
        let cloned = unsafe { sys::clone_process(CloneFlags::CLONE_NEWPID.bits(), None) }.map_err(fail)?;
        match cloned {
            sys::Cloned::Child => {
                let (ready, said) = (ready_write, said_write.into());
                forwarder::run(name, &arguments, Place { ids, sandbox: sandbox_fd, network, ready, said })
            }
            sys::Cloned::Parent { pid, pidfd } => {
                Ok(Self { pid, pidfd, ready: Some(ready.into()), said, ended: None })
            }
        }
    }

    /// What is to be polled.
    pub fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let alive = self.ended.is_none().then(|| self.pidfd.as_fd());
        alive.into_iter().chain(self.ready.as_ref().map(|ready| ready.as_fd()))
    }

    /// Takes note of what `ready` says of the descriptors.
    pub fn look(&mut self, ready: impl Fn(BorrowedFd<'_>) -> bool) -> Progress {
        // It may end right after it has told, but not before it has.
        if let Some(pipe) = self.ready.take_if(|pipe| ready(pipe.as_fd()))
            && matches!((&pipe).read(&mut [0; 32]), Ok(1..))
        {
            return Progress::Connected;
        }
        if self.ended.is_none() && ready(self.pidfd.as_fd()) {
            self.reap();
            return Progress::Ended;
        }
        Progress::None
    }

    /// How it ended and what it said.
    pub fn last_words(&mut self) -> String {
        let mut why = match self.ended {
            Some(ExitStatus::Code(code)) => format!("pasta exited with code {code}"),
            Some(ExitStatus::Signal(signal)) => format!("pasta was ended by signal {signal}"),
            None => "pasta ended".into(),
        };
        let mut said = vec![0; SAID_BYTES as usize];
        let read = self.said.rewind().and_then(|()| self.said.read(&mut said)).unwrap_or_default();
        said.truncate(said.iter().take(read).position(|byte| *byte == 0).unwrap_or(read));
        let said = String::from_utf8_lossy(&said);
        let mut lines = said.lines().map(str::trim).filter(|line| !is_noise(line)).peekable();
        if lines.peek().is_some() {
            // Writing to a string can't fail.
            let _ = write!(why, ": {}", lines.collect::<Vec<_>>().join("; "));
        }
        why
    }

    fn reap(&mut self) {
        if let (None, Ok(status)) = (self.ended, sys::wait_for(self.pid)) {
            self.ended = Some(status);
        }
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        if self.ended.is_none() {
            // The only error is that it is dead already.
            let _ = sys::pidfd_send_signal(self.pidfd.as_fd(), libc::SIGKILL);
            self.reap();
        }
    }
}

/// What older versions add to every line where they can't reach the system's log.
fn is_noise(line: &str) -> bool {
    line.is_empty() || (line.starts_with("Failed to send") && line.ends_with("to syslog"))
}

/// A file in memory of a fixed size: however much is said, nothing waits for a reader, and nothing grows.
fn memory_for_words() -> Result<File, Errno> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = File::from(memfd_create(c"cofferdam-words", flags)?);
    unistd::ftruncate(&file, SAID_BYTES)?;
    let seals = SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file)
}
