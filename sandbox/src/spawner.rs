//! The process that makes sandboxes, and its handle.
//!
//! It has one thread for life, so that forking there is safe, and little memory, so that it is cheap. For each
//! sandbox it is sent the plan in a memfd, the ends of two pipes and one end of a control socket. The other end is
//! the sandbox's owner: when that is shut or closed, the sandbox is killed; the last thing that comes over it is the
//! [`Report`](crate::Report).
//!
//! When the program ends, however it does, its end of the spawner's own socket closes. The spawner then kills every
//! sandbox, removes what they left on disk, and ends.

mod pasta;
pub(crate) mod server;
pub(crate) mod stock;

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, Shutdown, SockFlag, SockType, shutdown, socketpair};
use nix::sys::stat::{fstat, stat};
use serde::{Deserialize, Serialize};

use crate::plan::Plan;
use crate::{message, sources, sys};

/// What the spawner is called in lists of processes, and how it is told from the program proper.
const TITLE: &str = "cofferdam: spawner";

/// What a message to the spawner is about, as its only byte; the rest of it are descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Subject {
    /// What the program leaves: a message, and a lock.
    Estate,
    /// A sandbox: the plan, what it is made of, standard output, standard error, and the control socket.
    Sandbox,
}

/// The handle of the spawner process. Dropping it ends every sandbox and the spawner, in this order.
#[derive(Debug)]
pub struct Spawner {
    process: Child,
    /// `None` only while it is being dropped.
    socket: Option<OwnedFd>,
}

impl Drop for Spawner {
    /// Waits until the spawner has killed and removed everything.
    fn drop(&mut self) {
        // Half of it stays open: that tells the spawner that the program waits for it, and has not been killed.
        if let Some(socket) = &self.socket {
            let _ = shutdown(socket.as_raw_fd(), Shutdown::Write);
        }
        let _ = self.process.wait();
        self.socket = None;
    }
}

/// What a program that ended may have left. Where there is nothing any more, that is fine.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Leftovers {
    /// Mounts in the program's own namespace.
    pub mounts: Vec<PathBuf>,
    /// Files and trees.
    pub trees: Vec<PathBuf>,
    /// Cgroups.
    pub cgroups: Option<crate::cgroup::Remains>,
}

/// Whether sandboxes are made in advance, each while another one is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stock {
    /// They are, up to this many.
    UpTo(usize),
    /// They are not: there will be but one.
    None,
}

/// Where a build's output goes.
#[derive(Debug)]
pub struct Stdio {
    /// Becomes standard output, usually the writing end of a pipe.
    pub stdout: OwnedFd,
    /// Becomes standard error.
    pub stderr: OwnedFd,
}

/// Why no sandbox could be asked for.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The spawner process can't be made.
    #[error("can't start the spawner: {0}")]
    Start(io::Error),
    /// The program's own file is not where it was when it was started.
    #[error("can't find this program's own file at {path}: it was moved or replaced while it started")]
    Program {
        /// Where it was.
        path: PathBuf,
    },
    /// Something of the host that the sandbox is made of can't be opened.
    #[error(transparent)]
    Source(#[from] crate::SetupFailure),
    /// The spawner process is gone.
    #[error("the spawner is gone")]
    Gone,
    /// The operating system refused something on the way.
    #[error("can't {act}: {source}")]
    Io {
        /// What was tried, as a verb.
        act: &'static str,
        /// The refusal.
        source: io::Error,
    },
    /// The spawner said something that makes no sense.
    #[error("the spawner sent a report that can't be read")]
    Report,
}

impl SpawnError {
    pub(crate) fn io(act: &'static str) -> impl Fn(Errno) -> Self {
        move |errno| Self::Io { act, source: errno.into() }
    }
}

impl Spawner {
    /// Starts the spawner, which sees to `leftovers` once the program has ended and every sandbox is dead. It keeps
    /// a copy of `lock` open until then, so that a lock on the trees covers their removal too.
    ///
    /// Call this after [`crate::ids::enter`], and before anything opens `/dev/fuse`: a copy of that descriptor would
    /// keep its connection alive.
    ///
    /// The spawner is this very program, executed anew from a read-only mount that exists nowhere else: a build that
    /// gets hold of its executable, as `/proc/self/exe` before its own command is executed, can't write to the file,
    /// whoever owns it. See CVE-2019-5736.
    ///
    /// # Errors
    /// Where the system refuses a socket, a mount or a process.
    pub fn start(leftovers: &Leftovers, lock: BorrowedFd<'_>, stock: Stock) -> Result<Self, SpawnError> {
        let (ours, theirs) = seqpacket().map_err(SpawnError::io("make a socket"))?;
        let program = own_program()?;
        let mut command = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()));
        // Nothing of the program's arguments and environment goes into the sandboxes.
        command.arg0(TITLE).env_clear().stdin(theirs).stdout(std::process::Stdio::null());
        #[cfg(feature = "sabotage")]
        command.env(crate::sabotage::VARIABLE, crate::sabotage::left_out());
        let process = command.spawn().map_err(SpawnError::Start)?;
        let spawner = Self { process, socket: Some(ours) };
        let message = message::write(&(leftovers, stock))?;
        spawner.send(Subject::Estate, &[message.as_fd(), lock])?;
        Ok(spawner)
    }

    fn send(&self, subject: Subject, fds: &[BorrowedFd<'_>]) -> Result<(), SpawnError> {
        let socket = self.socket.as_ref().ok_or(SpawnError::Gone)?;
        message::send_fds(socket.as_fd(), subject as u8, fds).map_err(|errno| match errno {
            Errno::EPIPE | Errno::ECONNRESET | Errno::ENOTCONN => SpawnError::Gone,
            errno => SpawnError::io("reach the spawner")(errno),
        })
    }

    /// Asks for a sandbox, after opening what it is made of, which may block. That it could not be made is told by its
    /// [`Report`](crate::Report).
    ///
    /// # Errors
    /// Where a source can't be opened, or the spawner can't be reached.
    pub fn spawn(&self, plan: &Plan, stdio: Stdio) -> Result<Sandbox, SpawnError> {
        let message = message::write(plan)?;
        let sources = sources::open(plan)?;
        let (control, theirs) =
            UnixStream::pair().map_err(|source| SpawnError::Io { act: "make a socket", source })?;
        self.send(
            Subject::Sandbox,
            &[message.as_fd(), sources.as_fd(), stdio.stdout.as_fd(), stdio.stderr.as_fd(), theirs.as_fd()],
        )?;
        Ok(Sandbox { control })
    }
}

/// A sandbox, owned: dropping it kills everything inside.
///
/// It is a stream socket. Shutting down its writing side kills the sandbox; the bytes that come out of it up to its
/// end, which comes once every process of the sandbox is dead, are for [`Report::from_bytes`](crate::Report::from_bytes). Thus it fits
/// whatever its owner waits with.
#[derive(Debug)]
pub struct Sandbox {
    control: UnixStream,
}

impl From<Sandbox> for UnixStream {
    fn from(sandbox: Sandbox) -> Self {
        sandbox.control
    }
}

fn seqpacket() -> Result<(OwnedFd, OwnedFd), Errno> {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
}

/// The program's own file on a detached mount that can't be written to.
fn own_program() -> Result<OwnedFd, SpawnError> {
    // The link itself leads to a mount of the namespace that the program was started in, which can't be copied here.
    let io = |source| SpawnError::Io { act: "find this program's own file", source };
    let path = std::fs::read_link("/proc/self/exe").map_err(io)?;
    let moved = || SpawnError::Program { path: path.clone() };
    let name = CString::new(path.as_os_str().as_bytes()).map_err(|_| moved())?;
    let tree = sys::open_tree(&name, false).map_err(|_| moved())?;
    let (found, running) = (fstat(&tree), stat("/proc/self/exe"));
    let (found, running) = (found.map_err(|_| moved())?, running.map_err(|_| moved())?);
    if (found.st_dev, found.st_ino) != (running.st_dev, running.st_ino) {
        return Err(moved());
    }
    let attributes = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
    sys::set_mount_attributes(tree.as_fd(), attributes)
        .map_err(SpawnError::io("make this program's file read-only"))?;
    Ok(tree)
}

/// Becomes the spawner, where this process was started as one, and never comes back. To be called first in `main`.
pub fn serve_if_spawner() {
    if std::env::args_os().next().is_some_and(|name| name == TITLE) {
        let code = match io::stdin().as_fd().try_clone_to_owned() {
            Ok(socket) => server::serve(socket),
            Err(_) => 1,
        };
        std::process::exit(code);
    }
}
