//! The spawner process: makes sandboxes, reaps them, and clears up after the program.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::{MntFlags, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::CloneFlags;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, send};
use nix::sys::stat::Mode;
use nix::sys::wait::waitpid;
use nix::unistd::{self, Pid};
use serde::de::DeserializeOwned;

use super::pasta::{Forwarder, Progress};
use super::{Leftovers, Stdio, Subject};
use crate::cgroup::Others;
use crate::child;
use crate::ids::IdMap;
use crate::plan::{Network, Plan};
use crate::report::{ExitStatus, Report, SetupFailure, Step};
use crate::sabotage::{Layer, kept};
use crate::{scratch, sys};

/// Serves what comes over `socket`, until the program ends. Yields the exit code.
pub fn serve(socket: OwnedFd) -> i32 {
    Server::new(socket).serve()
}

/// The spawner process itself.
struct Server {
    socket: OwnedFd,
    sandboxes: Vec<Running>,
    estate: Option<Estate>,
}

/// What the program leaves to the spawner.
struct Estate {
    leftovers: Leftovers,
    /// Held open to the end: with it, until then, the lock.
    lock: OwnedFd,
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
    /// Tells the child to go on. Its end tells the child that the spawner is gone.
    go: File,
    /// What connects it to the network, if anything does.
    forwarder: Option<Forwarder>,
    /// Why the network is gone, where it is.
    network_lost: Option<String>,
}

#[derive(PartialEq, Eq)]
enum Owner {
    Listening,
    WantsItDead,
}

impl Server {
    fn new(socket: OwnedFd) -> Self {
        Self { socket, sandboxes: Vec::new(), estate: None }
    }

    /// Serves until the program ends. Yields the exit code.
    fn serve(mut self) -> i32 {
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
        let program = self.program();
        let Some(Estate { leftovers, lock: _lock }) = self.estate else { return code };
        for mount in &leftovers.mounts {
            // Gone already is as good.
            let _ = umount2(mount, MntFlags::MNT_DETACH);
        }
        if let Some(Err(error)) = leftovers.cgroups.as_ref().map(|remains| remains.clear(program)) {
            complain(format_args!("{error}"));
        }
        for path in &leftovers.trees {
            if let Err(error) = remove(path) {
                complain(format_args!("can't remove {}: {error}", path.display()));
            }
        }
        code
    }

    /// Whether the program waits for this process to end, or has been killed.
    fn program(&self) -> Others {
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::empty())];
        let polled = poll(&mut fds, PollTimeout::ZERO);
        match (polled, fds.first().and_then(PollFd::revents)) {
            (Ok(_), Some(events)) if !events.contains(PollFlags::POLLHUP) => Others::Stay,
            _ => Others::Leaving,
        }
    }

    /// Becomes independent of the terminal and of what the program was started with.
    fn stand_apart(&self) {
        // Ctrl-C at a terminal goes to the whole foreground group, and a service manager's SIGTERM to all processes of
        // the service. This one must outlive the program.
        let _ = unistd::setsid();
        sys::ignore_termination();
        let _ = unistd::chdir("/");
        let _ = nix::sys::prctl::set_name(c"cofferdam-spawn");
    }

    /// Waits for one thing to happen and deals with it.
    fn turn(&mut self) -> Result<Turn, Errno> {
        let mut fds = vec![PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        for sandbox in &self.sandboxes {
            fds.push(PollFd::new(sandbox.pidfd.as_fd(), PollFlags::POLLIN));
            if sandbox.owner == Owner::Listening {
                fds.push(PollFd::new(sandbox.control.as_fd(), PollFlags::POLLIN));
            }
            let forwarder = sandbox.forwarder.iter().flat_map(Forwarder::fds);
            fds.extend(forwarder.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
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
            sandbox.watch_forwarder(&ready);
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

    /// Takes one message: the program's estate, or a request for a sandbox.
    fn receive(&mut self) -> Result<Turn, Errno> {
        let mut byte = [0];
        let mut space = nix::cmsg_space!([RawFd; 5]);
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
        if byte == [Subject::Estate as u8] {
            if let Ok([leftovers, lock]) = <[OwnedFd; 2]>::try_from(fds) {
                self.estate = read_message(leftovers).ok().map(|leftovers| Estate { leftovers, lock });
            }
        // Too few: the descriptor limit was reached. The owner sees its socket close.
        } else if let Ok([plan, sources, stdout, stderr, control]) = <[OwnedFd; 5]>::try_from(fds) {
            match launch(plan, sources, Stdio { stdout, stderr }) {
                Ok(Launched { pid, pidfd, report, go, forwarder }) => self.sandboxes.push(Running {
                    pid,
                    pidfd,
                    control: control.into(),
                    owner: Owner::Listening,
                    report,
                    go,
                    forwarder,
                    network_lost: None,
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

    /// Deals with what the forwarder has to tell.
    fn watch_forwarder(&mut self, ready: &[RawFd]) {
        let Some(forwarder) = &mut self.forwarder else { return };
        match forwarder.look(|fd| ready.contains(&fd.as_raw_fd())) {
            Progress::None => {}
            // A sandbox that has ended does not want to know.
            Progress::Connected => drop(self.go.write_all(&[1])),
            // The build would meet errors and be blamed for them.
            Progress::Ended => {
                self.network_lost = Some(forwarder.last_words());
                self.kill();
            }
        }
    }

    /// Reaps the sandbox's first process, by whose end all others are dead, and tells the owner.
    fn bury(mut self) {
        let _ = waitpid(self.pid, None);
        // Of what is told as dead, nothing lives.
        self.forwarder = None;
        let mut bytes = Vec::new();
        // No writer is left, so this ends.
        let read = Read::by_ref(&mut self.report).take(Report::MAX_BYTES as u64).read_to_end(&mut bytes);
        // The first record is the cause, what follows are its echoes.
        let report = match (read, postcard::take_from_bytes::<Report>(&bytes)) {
            (Ok(_), Ok((report, _))) => report,
            _ => Report::Killed,
        };
        let report = match self.network_lost {
            // A build that was done by then needed no network any more.
            Some(why) if report != Report::Ended(ExitStatus::Code(0)) => Report::NetworkLost { why },
            _ => report,
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

/// A sandbox that was just made.
struct Launched {
    pid: Pid,
    pidfd: OwnedFd,
    report: File,
    go: File,
    forwarder: Option<Forwarder>,
}

/// Makes a sandbox: clones its first process, gives it ids, and starts what connects it to the network.
fn launch(plan: OwnedFd, sources: OwnedFd, stdio: Stdio) -> Result<Launched, SetupFailure> {
    let plan = read_plan(plan)?;
    let pipe = || unistd::pipe2(OFlag::O_CLOEXEC).map_err(|errno| SetupFailure::new(Step::Pipe, errno, ""));
    let (report_read, report) = pipe()?;
    let (go, go_write) = pipe()?;
    let namespaces = namespaces(&plan.network);
    let cgroup = plan.cgroup.as_deref().map(open_cgroup).transpose()?;
    // SAFETY: the spawner has one thread for life.
    let cloned = unsafe { sys::clone_process(namespaces.bits(), cgroup.as_ref().map(|dir| dir.as_fd())) }
        .map_err(|errno| SetupFailure::new(Step::Clone, errno, ""))?;
    match cloned {
        sys::Cloned::Child => {
            let Stdio { stdout, stderr } = stdio;
            let streams = child::Streams { stdout, stderr, report, go, sources };
            child::run(&plan, streams)
        }
        sys::Cloned::Parent { pid, pidfd } => {
            let mut go_write = File::from(go_write);
            let started = write_maps(pid, &plan.ids).and_then(|()| {
                let forwarder = forward(&plan, pid, pidfd.as_fd())?;
                let go = go_write.write_all(&[1]);
                go.map_err(|_| SetupFailure::new(Step::MapIds, Errno::EPIPE, "")).map(|()| forwarder)
            });
            match started {
                Ok(forwarder) => {
                    Ok(Launched { pid, pidfd, report: report_read.into(), go: go_write, forwarder })
                }
                Err(failure) => {
                    let _ = sys::pidfd_send_signal(pidfd.as_fd(), libc::SIGKILL);
                    let _ = waitpid(pid, None);
                    Err(failure)
                }
            }
        }
    }
}

/// Starts what connects the sandbox to the network, if anything is to. The sandbox need not wait for it yet.
fn forward(plan: &Plan, pid: Pid, pidfd: BorrowedFd<'_>) -> Result<Option<Forwarder>, SetupFailure> {
    match &plan.network {
        Network::Pasta { pasta, name_servers } if kept(Layer::Network) => {
            Forwarder::start(pasta, name_servers, &plan.ids, (pid, pidfd)).map(Some)
        }
        _ => Ok(None),
    }
}

fn open_cgroup(path: &Path) -> Result<OwnedFd, SetupFailure> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    nix::fcntl::open(path, flags, Mode::empty())
        .map_err(|errno| SetupFailure::new(Step::Cgroup, errno, path.display().to_string()))
}

/// The namespaces of a sandbox, but for that of cgroups, which it makes itself.
pub fn namespaces(network: &Network) -> CloneFlags {
    let mut namespaces = CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID;
    for (layer, namespace) in [(Layer::Ipc, CloneFlags::CLONE_NEWIPC), (Layer::Uts, CloneFlags::CLONE_NEWUTS)]
    {
        if kept(layer) {
            namespaces |= namespace;
        }
    }
    if *network != Network::Host && kept(Layer::Network) {
        namespaces |= CloneFlags::CLONE_NEWNET;
    }
    namespaces
}

fn read_plan(memfd: OwnedFd) -> Result<Plan, SetupFailure> {
    read_message(memfd).map_err(|errno| SetupFailure::new(Step::ReadPlan, errno, ""))
}

/// What `write_message` put into a memfd.
fn read_message<T: DeserializeOwned>(memfd: OwnedFd) -> Result<T, Errno> {
    let mut bytes = Vec::new();
    let mut file = File::from(memfd);
    let read = io::Seek::rewind(&mut file).and_then(|()| file.read_to_end(&mut bytes));
    read.map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
    postcard::from_bytes(&bytes).map_err(|_| Errno::EBADMSG)
}

/// Gives the user namespace of a process its ids.
pub fn write_maps(pid: Pid, ids: &IdMap) -> Result<(), SetupFailure> {
    for (file, map) in [("uid_map", &ids.uid_map), ("gid_map", &ids.gid_map)] {
        let path = format!("/proc/{pid}/{file}");
        std::fs::write(&path, map).map_err(|error| {
            let errno = error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
            SetupFailure::new(Step::MapIds, errno, format!("{file} \"{}\"", map.trim_end()))
        })?;
    }
    Ok(())
}
