//! The spawner process: makes sandboxes, reaps them, and clears up after the program.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::{MntFlags, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, send};
use nix::sys::stat::Mode;
use nix::sys::wait::waitpid;
use nix::unistd::{self, Pid};

use super::pasta::{Forwarder, Progress};
use super::stock::{Framed, Shelf};
use super::{Leftovers, Stock, Subject};
use crate::cgroup::Others;
use crate::child::Order;
use crate::frame::Frame;
use crate::message::{self, Fds};
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
    shelf: Shelf,
    estate: Option<Estate>,
}

/// What the program leaves to the spawner.
struct Estate {
    leftovers: Leftovers,
    /// How many sandboxes are made in advance.
    stock: Stock,
    /// Held open to the end: with it, until then, the lock.
    lock: OwnedFd,
}

/// A sandbox that has not been reaped.
struct Running {
    framed: Framed,
    /// The owner's socket.
    control: UnixStream,
    /// Whether the owner is still to be listened to.
    owner: Owner,
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
        Self { socket, sandboxes: Vec::new(), shelf: Shelf::default(), estate: None }
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
            sandbox.framed.end();
        }
        self.shelf.clear();
        let program = self.program();
        let Some(Estate { leftovers, lock: _lock, .. }) = self.estate else { return code };
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
            fds.push(PollFd::new(sandbox.framed.pidfd.as_fd(), PollFlags::POLLIN));
            if sandbox.owner == Owner::Listening {
                fds.push(PollFd::new(sandbox.control.as_fd(), PollFlags::POLLIN));
            }
            let forwarder = sandbox.forwarder.iter().flat_map(Forwarder::fds);
            fds.extend(forwarder.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        }
        fds.extend(self.shelf.pidfds().map(|pidfd| PollFd::new(pidfd, PollFlags::POLLIN)));
        // Whoever asks for something comes first.
        let patience = if self.shelf.is_wanting() { PollTimeout::ZERO } else { PollTimeout::NONE };
        match poll(&mut fds, patience) {
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
        let ended = |sandbox: &mut Running| ready.contains(&sandbox.framed.pidfd.as_raw_fd());
        for sandbox in self.sandboxes.extract_if(.., ended).collect::<Vec<_>>() {
            sandbox.bury();
        }
        self.shelf.remove(|pidfd| ready.contains(&pidfd.as_raw_fd()));
        if ready.is_empty()
            && let Some(Estate { stock: Stock::UpTo(most), .. }) = self.estate
        {
            self.shelf.restock(most);
        }
        match ready.contains(&self.socket.as_raw_fd()) {
            true => self.receive(),
            false => Ok(Turn::GoOn),
        }
    }

    /// Takes one message: the program's estate, or a request for a sandbox.
    fn receive(&mut self) -> Result<Turn, Errno> {
        let Fds { kind, fds } = match message::receive_fds(self.socket.as_fd()) {
            Err(Errno::EINTR) => return Ok(Turn::GoOn),
            message => message?,
        };
        let Some(kind) = kind else { return Ok(Turn::ProgramEnded) };
        if kind == Subject::Estate as u8 {
            if let Ok([message, lock]) = <[OwnedFd; 2]>::try_from(fds) {
                let read = message::read::<(Leftovers, Stock)>(message).ok();
                self.estate = read.map(|(leftovers, stock)| Estate { leftovers, stock, lock });
            }
        // Too few: the descriptor limit was reached. The owner sees its socket close.
        } else if let Ok([plan, sources, stdout, stderr, control]) = <[OwnedFd; 5]>::try_from(fds) {
            let control = UnixStream::from(control);
            match self.launch(Order { plan, sources, stdout, stderr }) {
                Ok((framed, forwarder)) => self.sandboxes.push(Running {
                    framed,
                    control,
                    owner: Owner::Listening,
                    forwarder,
                    network_lost: None,
                }),
                Err(failure) => tell(&control, &Report::NotSetUp(failure)),
            }
        }
        Ok(Turn::GoOn)
    }

    /// Has a sandbox made to a plan, of one that waits if there is one for it.
    fn launch(&mut self, order: Order) -> Result<(Framed, Option<Forwarder>), SetupFailure> {
        let fail = |errno| SetupFailure::new(Step::ReadPlan, errno, "");
        let plan = order.plan.try_clone().map_err(|_| fail(Errno::EMFILE))?;
        let plan: Plan = message::read(plan).map_err(fail)?;
        let frame = Frame::of(&plan);
        // Moving a process to a cgroup would take longer than making one, and pasta comes before the ids.
        if plan.cgroup.is_some() || matches!(plan.network, Network::Pasta { .. }) {
            let cgroup = plan.cgroup.as_deref().map(open_cgroup).transpose()?;
            let cgroup = cgroup.as_ref().map(|dir| dir.as_fd());
            let (framed, forwarder) =
                Framed::new_with(&frame, cgroup, |pid, pidfd| forward(&plan, pid, pidfd))?;
            return send_order(framed, &order).map(|framed| (framed, forwarder));
        }
        let waiting = self.shelf.take(&frame).and_then(|framed| send_order(framed, &order).ok());
        let framed = match waiting {
            Some(framed) => framed,
            None => send_order(Framed::new(&frame, None)?, &order)?,
        };
        self.shelf.want(frame);
        Ok((framed, None))
    }
}

fn send_order(framed: Framed, order: &Order) -> Result<Framed, SetupFailure> {
    match framed.order(order) {
        Ok(()) => Ok(framed),
        Err(errno) => {
            framed.end();
            Err(SetupFailure::new(Step::PassSources, errno, ""))
        }
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
        let _ = sys::pidfd_send_signal(self.framed.pidfd.as_fd(), libc::SIGKILL);
    }

    /// Deals with what the forwarder has to tell.
    fn watch_forwarder(&mut self, ready: &[RawFd]) {
        let Some(forwarder) = &mut self.forwarder else { return };
        match forwarder.look(|fd| ready.contains(&fd.as_raw_fd())) {
            Progress::None => {}
            // A sandbox that has ended does not want to know.
            Progress::Connected => drop(self.framed.go.write_all(&[1])),
            // The build would meet errors and be blamed for them.
            Progress::Ended => {
                self.network_lost = Some(forwarder.last_words());
                self.kill();
            }
        }
    }

    /// Reaps the sandbox's first process, by whose end all others are dead, and tells the owner.
    fn bury(mut self) {
        let _ = waitpid(self.framed.pid, None);
        // Of what is told as dead, nothing lives.
        self.forwarder = None;
        let mut bytes = Vec::new();
        // No writer is left, so this ends.
        let read =
            Read::by_ref(&mut self.framed.report).take(Report::MAX_BYTES as u64).read_to_end(&mut bytes);
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
