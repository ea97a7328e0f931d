//! The sandbox's first process, from `clone3` to the end: a flat list of steps, in the order that the
//! kernel demands.

pub(crate) mod confine;
pub mod forwarder;
mod init;
pub(crate) mod masks;
mod net;
pub(crate) mod privileges;
pub(crate) mod rootfs;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd};
use std::panic::AssertUnwindSafe;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::sys::stat::{Mode, umask};
use nix::unistd;

use crate::frame::Frame;
use crate::message;
use crate::plan::Plan;

use crate::report::{Report, SetupFailure, Step};
use crate::sabotage::{Layer, kept};
use crate::sources::Sources;
use crate::{sources, sys};

use rootfs::Root;

/// Where [`Layer::Descriptors`] left out shows.
const LEAKED: RawFd = 9;

/// What the first process of a sandbox is given by the spawner.
pub struct Streams {
    /// Takes reports.
    pub report: OwnedFd,
    /// Yields the [`Order`], once there is one.
    pub orders: OwnedFd,
    /// Yields one byte when the id map is written, another when the network is there, where one is made, and ends with
    /// the spawner.
    pub go: OwnedFd,
}

/// What a sandbox is to be, as it comes from the program: the descriptors of a message to the spawner.
pub struct Order {
    /// The plan, in a memfd.
    pub plan: OwnedFd,
    /// Yields what the sandbox is made of.
    pub sources: OwnedFd,
    /// Becomes the build's standard output.
    pub stdout: OwnedFd,
    /// Becomes the build's standard error.
    pub stderr: OwnedFd,
}

/// Runs as pid 1 of the new namespaces and never comes back.
pub fn run(frame: &Frame, streams: Streams) -> ! {
    // A panic must end here: further up the stack lies what belongs to the spawner.
    let code = std::panic::catch_unwind(AssertUnwindSafe(|| first_process(frame, streams))).unwrap_or(1);
    // SAFETY: ends the process at once. Nothing of this copy of the spawner may run any further: neither its
    // destructors nor what it registered to run at exit.
    unsafe { libc::_exit(code) }
}

fn first_process(frame: &Frame, streams: Streams) -> i32 {
    let Ok(Arranged { report, mut go, orders }) = streams.arrange() else { return 1 };
    let mut build = || {
        let root = set_frame_up(frame, &mut go)?;
        let (plan, sources) = receive_order(&orders)?;
        set_up(&plan, root, sources, &mut go)?;
        init::run(&plan, &report)
    };
    match build() {
        Ok(()) => 0,
        Err(failure) => {
            send(&report, &Report::NotSetUp(failure));
            1
        }
    }
}

/// All that does not depend on the plan.
fn set_frame_up(frame: &Frame, go: &mut File) -> Result<Root, SetupFailure> {
    // Until the map is written this process has no ids to make anything with.
    let mut byte = [0];
    go.read_exact(&mut byte).map_err(|_| SetupFailure::new(Step::MapIds, Errno::EPIPE, ""))?;
    // Entries get exactly the modes that the plan says.
    umask(Mode::empty());

    if kept(Layer::CgroupNamespace) {
        // Not by clone3, for which the root would be the spawner's cgroup.
        unshare(CloneFlags::CLONE_NEWCGROUP).map_err(|errno| SetupFailure::new(Step::Cgroup, errno, ""))?;
    }
    privileges::volunteer_for_oom();
    privileges::leave_keyring()?;
    privileges::become_root(&frame.ids)?;
    if kept(Layer::Seccomp) {
        confine::forbid_user_namespaces(frame.seccomp)?;
    }
    let root = rootfs::begin(frame)?;
    net::begin(frame.network)?;
    if kept(Layer::Uts) {
        set_names()?;
    }
    privileges::empty_bounding_set()?;
    // As long as nobody wants this sandbox it must go with the spawner, too. Ids change once more.
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(|errno| SetupFailure::new(Step::Tie, errno, ""))?;
    Ok(root)
}

/// Waits until there is something to be done.
fn receive_order(orders: &File) -> Result<(Plan, Sources), SetupFailure> {
    let fail = |errno| SetupFailure::new(Step::ReadPlan, errno, "");
    let received = message::receive_fds(orders.as_fd()).map_err(fail)?;
    let Ok([plan, sources, stdout, stderr]) = <[OwnedFd; 4]>::try_from(received.fds) else {
        // The spawner has ended, or descriptors have run out.
        return Err(fail(Errno::EPIPE));
    };
    let plan: Plan = message::read(plan).map_err(fail)?;
    for (target, fd) in (1..).zip([stdout, stderr]) {
        sys::place_fd(fd.into_raw_fd(), target)
            .map_err(|errno| SetupFailure::new(Step::Streams, errno, ""))?;
    }
    let sources = sources::receive(&plan, sources.as_fd())?;
    Ok((plan, sources))
}

fn set_up(plan: &Plan, root: Root, sources: Sources, go: &mut File) -> Result<(), SetupFailure> {
    rootfs::assemble(plan, root, sources)?;
    net::set_up(&plan.network, go)?;
    if kept(Layer::Limits) {
        privileges::limit(&plan.limits, &plan.ids)?;
    }
    privileges::drop_all()?;
    privileges::try_devices(plan)?;
    // Both need the no_new_privs of that. The filter comes last: what is before may use any call.
    if kept(Layer::Landlock) && kept(Layer::NoNewPrivs) {
        confine::restrict(plan.landlock)?;
    }
    if kept(Layer::Seccomp) && kept(Layer::NoNewPrivs) {
        confine::filter(plan.seccomp)?;
    }
    // After the last change of ids, which clears it.
    tie_to_spawner(go.as_fd())
}

/// Gives the sandbox the names that every build sees.
pub(crate) fn set_names() -> Result<(), SetupFailure> {
    let fail = |errno| SetupFailure::new(Step::HostName, errno, "");
    unistd::sethostname("localhost").map_err(fail)?;
    sys::set_domain_name("(none)").map_err(fail)
}

/// Makes this process die when the spawner does.
fn tie_to_spawner(go: BorrowedFd<'_>) -> Result<(), SetupFailure> {
    let fail = |errno| SetupFailure::new(Step::Tie, errno, "");
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(fail)?;
    // It may have died before that. Its parent's pid is 0 in here either way, but its pipe would have ended.
    let mut ended = [PollFd::new(go, PollFlags::POLLIN)];
    poll(&mut ended, PollTimeout::ZERO).map_err(fail)?;
    match ended[0].any() {
        Some(false) => Ok(()),
        _ => Err(fail(Errno::EPIPE)),
    }
}

struct Arranged {
    report: File,
    go: File,
    orders: File,
}

impl Streams {
    /// Puts the streams where the build looks for them, and closes everything else: nothing of the spawner or of
    /// other sandboxes stays open here.
    fn arrange(self) -> Result<Arranged, Errno> {
        let null = || nix::fcntl::open("/dev/null", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty());
        // Out of the way first, so that none is overwritten before it is placed.
        let lift = |fd: OwnedFd| fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(10));
        // Until there is an order, output goes nowhere.
        let streams = [null()?, null()?, null()?, self.report, self.go, self.orders];
        let lifted = streams.map(lift);
        for (target, fd) in (0..).zip(lifted) {
            sys::place_fd(fd?, target)?;
        }
        sys::close_range(6, RawFd::MAX, 0)?;
        if !kept(Layer::Descriptors) {
            // What must not happen: the build holds a directory of the host.
            let leak = nix::fcntl::open("/", OFlag::O_PATH | OFlag::O_DIRECTORY, Mode::empty())?;
            sys::place_fd(leak.into_raw_fd(), LEAKED)?;
        }
        Ok(Arranged { report: sys::adopt(3)?, go: sys::adopt(4)?, orders: sys::adopt(5)? })
    }
}

/// Sends a report to the spawner. There is no one to tell if that fails; it then sees a process that ended
/// without a word.
fn send(report: &File, what: &Report) {
    if let Ok(bytes) = postcard::to_stdvec(what) {
        let mut pipe = report;
        let _ = pipe.write_all(&bytes);
    }
}
