//! Sandboxes in the making: a first process in namespaces of its own, up to the point where it has to know the plan.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sched::CloneFlags;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::wait::waitpid;
use nix::unistd::{self, Pid};

use crate::child::{self, Order};
use crate::frame::{Frame, Own};
use crate::ids::IdMap;
use crate::message;
use crate::report::{SetupFailure, Step};
use crate::sabotage::{Layer, kept};
use crate::sys;

/// A sandbox without a plan.
pub struct Framed {
    /// Its first process.
    pub pid: Pid,
    /// The same, for ever.
    pub pidfd: OwnedFd,
    /// Yields what its processes report.
    pub report: File,
    /// Tells it to go on. Its end tells it that the spawner is gone.
    pub go: File,
    orders: OwnedFd,
}

impl Framed {
    /// Clones a first process and gives it ids. It goes on by itself as far as it can.
    pub fn new(frame: &Frame, cgroup: Option<BorrowedFd<'_>>) -> Result<Self, SetupFailure> {
        Self::new_with(frame, cgroup, |_, _| Ok(())).map(|(framed, ())| framed)
    }

    /// The same, with something that must be done to the process while it waits for its ids.
    pub fn new_with<T>(
        frame: &Frame,
        cgroup: Option<BorrowedFd<'_>>,
        first: impl FnOnce(Pid, BorrowedFd<'_>) -> Result<T, SetupFailure>,
    ) -> Result<(Self, T), SetupFailure> {
        let pipe =
            || unistd::pipe2(OFlag::O_CLOEXEC).map_err(|errno| SetupFailure::new(Step::Pipe, errno, ""));
        let (report_read, report) = pipe()?;
        let (go, go_write) = pipe()?;
        let (orders_write, orders) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .map_err(|errno| SetupFailure::new(Step::Pipe, errno, ""))?;
        // SAFETY: the spawner has one thread for life.
        let cloned = unsafe { sys::clone_process(namespaces(frame.network).bits(), cgroup) }
            .map_err(|errno| SetupFailure::new(Step::Clone, errno, ""))?;
        match cloned {
            sys::Cloned::Child => child::run(frame, child::Streams { report, orders, go }),
            sys::Cloned::Parent { pid, pidfd } => {
                let framed = Self {
                    pid,
                    pidfd,
                    report: report_read.into(),
                    go: go_write.into(),
                    orders: orders_write,
                };
                let mapped = write_maps(pid, &frame.ids).and_then(|()| {
                    let made = first(pid, framed.pidfd.as_fd())?;
                    let go = (&framed.go).write_all(&[1]);
                    go.map_err(|_| SetupFailure::new(Step::MapIds, Errno::EPIPE, "")).map(|()| made)
                });
                match mapped {
                    Ok(made) => Ok((framed, made)),
                    Err(failure) => {
                        framed.end();
                        Err(failure)
                    }
                }
            }
        }
    }

    /// Tells it what it is to be.
    pub fn order(&self, order: &Order) -> Result<(), Errno> {
        let Order { plan, sources, stdout, stderr } = order;
        let fds = [plan.as_fd(), sources.as_fd(), stdout.as_fd(), stderr.as_fd()];
        message::send_fds(self.orders.as_fd(), 0, &fds)
    }

    /// Kills it and waits until it is dead.
    pub fn end(self) {
        let _ = sys::pidfd_send_signal(self.pidfd.as_fd(), libc::SIGKILL);
        let _ = waitpid(self.pid, None);
    }
}

/// The namespaces of a sandbox, but for that of cgroups, which it makes itself.
pub fn namespaces(network: Own) -> CloneFlags {
    let mut namespaces = CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID;
    for (layer, namespace) in [(Layer::Ipc, CloneFlags::CLONE_NEWIPC), (Layer::Uts, CloneFlags::CLONE_NEWUTS)]
    {
        if kept(layer) {
            namespaces |= namespace;
        }
    }
    if network == Own::Own && kept(Layer::Network) {
        namespaces |= CloneFlags::CLONE_NEWNET;
    }
    namespaces
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

/// Frames that wait for their plans.
#[derive(Default)]
pub struct Shelf {
    framed: Vec<(Frame, Framed)>,
    /// What is to be made next.
    wanted: Option<Frame>,
}

impl Shelf {
    /// A sandbox for this frame, if there is one.
    pub fn take(&mut self, frame: &Frame) -> Option<Framed> {
        let at = self.framed.iter().position(|(ready, _)| ready == frame)?;
        Some(self.framed.swap_remove(at).1)
    }

    /// Another one like this is likely to be wanted.
    pub fn want(&mut self, frame: Frame) {
        self.wanted = Some(frame);
    }

    /// Whether there is something to be made.
    pub fn is_wanting(&self) -> bool {
        self.wanted.is_some()
    }

    /// Makes what is wanted, unless there is one, and keeps no more than `most`: the oldest goes.
    pub fn restock(&mut self, most: usize) {
        let Some(frame) = self.wanted.take() else { return };
        if most == 0 || self.framed.iter().any(|(ready, _)| *ready == frame) {
            return;
        }
        // Nobody waits for it. Whoever does next will be told if it can't be made.
        if let Ok(framed) = Framed::new(&frame, None) {
            self.framed.push((frame, framed));
        }
        if self.framed.len() > most {
            self.framed.remove(0).1.end();
        }
    }

    /// The first processes, to be watched.
    pub fn pidfds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.framed.iter().map(|(_, framed)| framed.pidfd.as_fd())
    }

    /// Takes away what has died.
    pub fn remove(&mut self, dead: impl Fn(BorrowedFd<'_>) -> bool) {
        for (_, framed) in self.framed.extract_if(.., |(_, framed)| dead(framed.pidfd.as_fd())) {
            framed.end();
        }
    }

    /// Ends all of them.
    pub fn clear(&mut self) {
        self.framed.drain(..).for_each(|(_, framed)| framed.end());
    }
}
