//! The process that makes sandboxes, and its handle.
//!
//! It is forked while the program has one thread and stays single-threaded, so that forking there is safe and
//! cheap. For each sandbox it is sent the plan in a memfd, the ends of two pipes and one end of a control
//! socket. The other end is the sandbox's owner: when that is shut or closed, the sandbox is killed; the
//! last thing that comes over it is the [`Report`].
//!
//! When the program ends, however it does, its end of the spawner's own socket closes. The spawner then
//! kills every sandbox, removes what they left on disk, and ends.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::{MntFlags, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::CloneFlags;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, send, sendmsg,
    socketpair,
};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{self, ForkResult, Pid};

use crate::child;
use crate::plan::{Network, Plan};
use crate::report::{Report, SetupFailure, Step};
use crate::{scratch, sys};

/// The handle of the spawner process. Dropping it ends every sandbox and the spawner, in this order.
#[derive(Debug)]
pub struct Spawner {
    pid: Pid,
    /// `None` only while it is being dropped.
    socket: Option<OwnedFd>,
}

impl Drop for Spawner {
    /// Waits until the spawner has killed and removed everything.
    fn drop(&mut self) {
        self.socket = None;
        let _ = waitpid(self.pid, None);
    }
}

/// What a program that ended may have left. Where there is nothing any more, that is fine.
#[derive(Debug, Default)]
pub struct Leftovers {
    /// Mounts in the program's own namespace.
    pub mounts: Vec<PathBuf>,
    /// Files and trees.
    pub trees: Vec<PathBuf>,
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
    Start(Errno),
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
    fn io(act: &'static str) -> impl Fn(Errno) -> Self {
        move |errno| Self::Io { act, source: errno.into() }
    }
}

impl Spawner {
    /// Forks the spawner, which sees to `leftovers` once the program has ended and every sandbox is dead.
    /// Descriptors that are open now stay open in the spawner to its end: a lock on the trees, taken before, covers
    /// their removal too.
    ///
    /// Call this while the program has one thread, after [`crate::ids::enter`] and before anything opens
    /// `/dev/fuse`: a copy of that descriptor would keep its connection alive.
    ///
    /// # Errors
    /// Where the system refuses a socket or a process.
    pub fn start(leftovers: Leftovers) -> Result<Self, SpawnError> {
        let (ours, theirs) = seqpacket().map_err(SpawnError::Start)?;
        // SAFETY: the program has one thread, as this function demands, so the child may go on as usual.
        match unsafe { unistd::fork() }.map_err(SpawnError::Start)? {
            ForkResult::Parent { child } => Ok(Self { pid: child, socket: Some(ours) }),
            ForkResult::Child => {
                drop(ours);
                // Nothing of the original may run here, not even by unwinding into it.
                let server = AssertUnwindSafe(|| Server::new(theirs).serve(&leftovers));
                let code = std::panic::catch_unwind(server).unwrap_or(1);
                // SAFETY: ends this copy of the program at once, without running what belongs to the original.
                unsafe { libc::_exit(code) }
            }
        }
    }

    /// Asks for a sandbox. That it could not be made is told by its [`Report`].
    ///
    /// # Errors
    /// Where the spawner can't be reached.
    pub fn spawn(&self, plan: &Plan, stdio: Stdio) -> Result<Sandbox, SpawnError> {
        let bytes = postcard::to_stdvec(plan)
            .map_err(|error| SpawnError::Io { act: "encode the plan", source: io::Error::other(error) })?;
        let memfd =
            memfd_create(c"cofferdam-plan", MFdFlags::MFD_CLOEXEC).map_err(SpawnError::io("make a memfd"))?;
        let mut memfd = File::from(memfd);
        memfd.write_all(&bytes).map_err(|source| SpawnError::Io { act: "write the plan", source })?;
        let (control, theirs) =
            UnixStream::pair().map_err(|source| SpawnError::Io { act: "make a socket", source })?;
        let fds = [memfd.as_raw_fd(), stdio.stdout.as_raw_fd(), stdio.stderr.as_raw_fd(), theirs.as_raw_fd()];
        let socket = self.socket.as_ref().ok_or(SpawnError::Gone)?;
        sendmsg::<()>(
            socket.as_raw_fd(),
            &[IoSlice::new(&[0])],
            &[ControlMessage::ScmRights(&fds)],
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
        .map_err(|errno| match errno {
            Errno::EPIPE | Errno::ECONNRESET | Errno::ENOTCONN => SpawnError::Gone,
            errno => SpawnError::io("reach the spawner")(errno),
        })?;
        Ok(Sandbox { control })
    }
}

/// A sandbox, owned: dropping it kills everything inside.
///
/// It is a stream socket. Shutting down its writing side kills the sandbox; the bytes that come out of it up to its
/// end, which comes once every process of the sandbox is dead, are for [`Report::from_bytes`]. Thus it fits
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

/// The spawner process itself.
struct Server {
    socket: OwnedFd,
    sandboxes: Vec<Running>,
}

/// A sandbox that has not been reaped.
struct Running {
    pid: Pid,
    pidfd: OwnedFd,
    /// The owner's socket.
    control: UnixStream,
    /// Whether the owner is still to be listened to.
    owner: Owner,
    report: File,
    /// Its end tells the child that the spawner is gone.
    _go: File,
}

#[derive(PartialEq, Eq)]
enum Owner {
    Listening,
    WantsItDead,
}

impl Server {
    fn new(socket: OwnedFd) -> Self {
        Self { socket, sandboxes: Vec::new() }
    }

    /// Serves until the program ends. Yields the exit code.
    fn serve(mut self, leftovers: &Leftovers) -> i32 {
        self.stand_apart();
        let code = loop {
            match self.turn() {
                Ok(Turn::GoOn) => {}
                Ok(Turn::ProgramEnded) => break 0,
                Err(errno) => {
                    complain(format_args!("the spawner fails: {errno}"));
                    break 1;
                }
            }
        };
        for sandbox in &self.sandboxes {
            sandbox.kill();
        }
        for sandbox in self.sandboxes.drain(..) {
            let _ = waitpid(sandbox.pid, None);
        }
        for mount in &leftovers.mounts {
            // Gone already is as good.
            let _ = umount2(mount, MntFlags::MNT_DETACH);
        }
        for path in &leftovers.trees {
            if let Err(error) = remove(path) {
                complain(format_args!("can't remove {}: {error}", path.display()));
            }
        }
        code
    }

    /// Becomes independent of the terminal and of what the program was started with.
    fn stand_apart(&self) {
        // Ctrl-C at a terminal goes to the whole foreground group, and a service manager's SIGTERM to all processes of
        // the service. This one must outlive the program.
        let _ = unistd::setsid();
        sys::ignore_termination();
        let _ = unistd::chdir("/");
        let _ = nix::sys::prctl::set_name(c"cofferdam-spawn");
        // SAFETY: nothing in this process or its children reads arguments or environment from here on.
        unsafe { sys::overwrite_command_line(b"cofferdam: spawner") };
    }

    /// Waits for one thing to happen and deals with it.
    fn turn(&mut self) -> Result<Turn, Errno> {
        let mut fds = vec![PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        for sandbox in &self.sandboxes {
            fds.push(PollFd::new(sandbox.pidfd.as_fd(), PollFlags::POLLIN));
            if sandbox.owner == Owner::Listening {
                fds.push(PollFd::new(sandbox.control.as_fd(), PollFlags::POLLIN));
            }
        }
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
        let ready: Vec<RawFd> =
            fds.iter().filter(|fd| fd.any() == Some(true)).map(|fd| fd.as_fd().as_raw_fd()).collect();
        for sandbox in &mut self.sandboxes {
            if ready.contains(&sandbox.control.as_raw_fd()) {
                // The owner never sends anything: this is its end.
                sandbox.owner = Owner::WantsItDead;
                sandbox.kill();
            }
        }
        let ended = |sandbox: &mut Running| ready.contains(&sandbox.pidfd.as_raw_fd());
        for sandbox in self.sandboxes.extract_if(.., ended).collect::<Vec<_>>() {
            sandbox.bury();
        }
        match ready.contains(&self.socket.as_raw_fd()) {
            true => self.receive(),
            false => Ok(Turn::GoOn),
        }
    }

    /// Takes one request for a sandbox.
    fn receive(&mut self) -> Result<Turn, Errno> {
        let mut byte = [0];
        let mut space = nix::cmsg_space!([RawFd; 4]);
        let mut slices = [IoSliceMut::new(&mut byte)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = match recvmsg::<()>(self.socket.as_raw_fd(), &mut slices, Some(&mut space), flags) {
            Err(Errno::EINTR) => return Ok(Turn::GoOn),
            message => message?,
        };
        let mut fds = Vec::new();
        // An error here means that the message was cut off, for want of descriptors.
        for part in message.cmsgs().into_iter().flatten() {
            if let ControlMessageOwned::ScmRights(raw) = part {
                // SAFETY: the kernel has just made these descriptors for this process alone.
                fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        if message.bytes == 0 {
            return Ok(Turn::ProgramEnded);
        }
        // Too few: the descriptor limit was reached. The owner sees its socket close.
        if let Ok([plan, stdout, stderr, control]) = <[OwnedFd; 4]>::try_from(fds) {
            match launch(plan, Stdio { stdout, stderr }) {
                Ok((pid, pidfd, report, go)) => self.sandboxes.push(Running {
                    pid,
                    pidfd,
                    control: control.into(),
                    owner: Owner::Listening,
                    report,
                    _go: go,
                }),
                Err(failure) => tell(&control.into(), &Report::NotSetUp(failure)),
            }
        }
        Ok(Turn::GoOn)
    }
}

/// Says something to whoever reads the program's standard error, if anybody does.
fn complain(what: std::fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr(), "cofferdam: {what}");
}

fn remove(path: &Path) -> io::Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(()) };
    let name = CString::new(name.as_bytes())?;
    match File::open(parent) {
        Ok(parent) => scratch::remove_tree(parent.as_fd(), &name),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

enum Turn {
    GoOn,
    ProgramEnded,
}

impl Running {
    fn kill(&self) {
        // The only error is that it is dead already.
        let _ = sys::pidfd_send_signal(self.pidfd.as_fd(), libc::SIGKILL);
    }

    /// Reaps the sandbox's first process, by whose end all others are dead, and tells the owner.
    fn bury(mut self) {
        let _ = waitpid(self.pid, Some(WaitPidFlag::empty()));
        let mut bytes = Vec::new();
        // No writer is left, so this ends.
        let read = Read::by_ref(&mut self.report).take(Report::MAX_BYTES as u64).read_to_end(&mut bytes);
        // The first record is the cause, what follows are its echoes.
        let report = match (read, postcard::take_from_bytes::<Report>(&bytes)) {
            (Ok(_), Ok((report, _))) => report,
            _ => Report::Killed,
        };
        tell(&self.control, &report);
    }
}

fn tell(control: &UnixStream, report: &Report) {
    if let Ok(bytes) = postcard::to_stdvec(report) {
        // An owner that is gone does not want to know. There is room: nothing else is ever sent.
        let _ = send(control.as_raw_fd(), &bytes, MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT);
    }
}

/// Makes a sandbox: clones its first process and gives it ids.
fn launch(plan: OwnedFd, stdio: Stdio) -> Result<(Pid, OwnedFd, File, File), SetupFailure> {
    let plan = read_plan(plan)?;
    let pipe = || unistd::pipe2(OFlag::O_CLOEXEC).map_err(|errno| SetupFailure::new(Step::Pipe, errno, ""));
    let (report_read, report) = pipe()?;
    let (go, go_write) = pipe()?;
    let mut namespaces = CloneFlags::CLONE_NEWUSER
        | CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWCGROUP;
    if plan.network == Network::Own {
        namespaces |= CloneFlags::CLONE_NEWNET;
    }
    // SAFETY: the spawner has one thread for life.
    let cloned = unsafe { sys::clone_process(namespaces.bits()) }
        .map_err(|errno| SetupFailure::new(Step::Clone, errno, ""))?;
    match cloned {
        sys::Cloned::Child => {
            let streams = child::Streams { stdout: stdio.stdout, stderr: stdio.stderr, report, go };
            child::run(&plan, streams)
        }
        sys::Cloned::Parent { pid, pidfd } => {
            let mut go_write = File::from(go_write);
            let mapped = write_maps(pid, &plan).and_then(|()| {
                go_write.write_all(&[1]).map_err(|_| SetupFailure::new(Step::MapIds, Errno::EPIPE, ""))
            });
            if let Err(failure) = mapped {
                let _ = sys::pidfd_send_signal(pidfd.as_fd(), libc::SIGKILL);
                let _ = waitpid(pid, None);
                return Err(failure);
            }
            Ok((pid, pidfd, File::from(report_read), go_write))
        }
    }
}

fn read_plan(memfd: OwnedFd) -> Result<Plan, SetupFailure> {
    let mut bytes = Vec::new();
    let mut file = File::from(memfd);
    let read = io::Seek::rewind(&mut file).and_then(|()| file.read_to_end(&mut bytes));
    let fail = |errno| SetupFailure::new(Step::ReadPlan, errno, "");
    read.map_err(|error| fail(error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)))?;
    postcard::from_bytes(&bytes).map_err(|_| fail(Errno::EBADMSG))
}

fn write_maps(pid: Pid, plan: &Plan) -> Result<(), SetupFailure> {
    for (file, map) in [("uid_map", &plan.ids.uid_map), ("gid_map", &plan.ids.gid_map)] {
        let path = format!("/proc/{pid}/{file}");
        std::fs::write(&path, map).map_err(|error| {
            let errno = error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
            SetupFailure::new(Step::MapIds, errno, format!("{file} \"{}\"", map.trim_end()))
        })?;
    }
    Ok(())
}
