//! What is told of a sandbox: from its first process to the spawner, and from there to the caller.

use std::fmt;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use crate::spawner::SpawnError;

/// The last word on a sandbox. Every process in it is dead by then.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Report {
    /// The command ran and ended.
    Ended(ExitStatus),
    /// Everything was in place, but the command could not be executed.
    NotExecuted {
        /// Why, as `execve(2)` says it.
        errno: i32,
    },
    /// The sandbox could not be set up.
    NotSetUp(SetupFailure),
    /// The first process of the sandbox was killed from outside.
    Killed,
    /// The program that connected the sandbox to the network ended before the command, which was killed for that.
    NetworkLost {
        /// How it ended, and what it said.
        why: String,
    },
}

impl Report {
    /// Longest report in bytes.
    pub const MAX_BYTES: usize = 4096;

    /// Reads what came out of a [`Sandbox`](crate::Sandbox).
    ///
    /// # Errors
    /// [`SpawnError::Gone`] where nothing did: the spawner ended before the sandbox.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, SpawnError> {
        match bytes {
            [] => Err(SpawnError::Gone),
            bytes => postcard::from_bytes(bytes).map_err(|_| SpawnError::Report),
        }
    }
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitStatus {
    /// It exited with this code.
    Code(i32),
    /// This signal ended it.
    Signal(i32),
}

/// The step that could not be done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetupFailure {
    /// The step.
    pub step: Step,
    /// Why, as the system call says it.
    pub errno: i32,
    /// What it was done to; empty where there is only one.
    pub object: String,
}

impl SetupFailure {
    /// Longest `object`, so that a report always fits one atomic write to a pipe.
    const MAX_OBJECT_BYTES: usize = 1024;

    pub(crate) fn new(step: Step, errno: Errno, object: impl Into<String>) -> Self {
        let mut object = object.into();
        let mut end = object.len().min(Self::MAX_OBJECT_BYTES);
        while !object.is_char_boundary(end) {
            end -= 1;
        }
        object.truncate(end);
        Self { step, errno: errno as i32, object }
    }
}

impl fmt::Display for SetupFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "can't {}", self.step)?;
        if !self.object.is_empty() {
            write!(f, " {}", self.object)?;
        }
        write!(f, ": {}", std::io::Error::from_raw_os_error(self.errno))?;
        match self.step.hint(Errno::from_raw(self.errno), &self.object) {
            Some(hint) => write!(f, " ({hint})"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for SetupFailure {}

/// What is done to set a sandbox up, roughly in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Step {
    /// The plan is read.
    ReadPlan,
    /// `clone3(2)` with all namespaces.
    Clone,
    /// The cgroup is opened, or made the root of a namespace.
    Cgroup,
    /// The id maps are written.
    MapIds,
    /// A pipe to the child is made.
    Pipe,
    /// Standard streams are put in place, everything else is closed.
    Streams,
    /// The sources of mounts are opened.
    OpenSource,
    /// The opened sources are passed on.
    PassSources,
    /// The child becomes the sandbox's root.
    BecomeRoot,
    /// Mount propagation is cut.
    Propagation,
    /// The tmpfs of the root is made.
    RootTmpfs,
    /// An entry is put into a tmpfs.
    MakeEntry,
    /// A mount point is found or made.
    MountPoint,
    /// Something is mounted.
    Mount,
    /// Something is made read-only.
    ReadOnly,
    /// The root is changed.
    Pivot,
    /// Loopback is brought up.
    Loopback,
    /// The program that connects the sandbox to the network is started.
    StartForwarder,
    /// The network is waited for.
    AwaitNetwork,
    /// Host and domain name are set.
    HostName,
    /// A session keyring of its own is joined.
    Keyring,
    /// A device node is tried, with the build's rights.
    Device,
    /// Ids and capabilities are given up.
    DropPrivileges,
    /// User namespaces are forbidden.
    ForbidUserNamespaces,
    /// A Landlock domain is entered.
    Landlock,
    /// The system call filter is installed.
    Seccomp,
    /// The tie to the spawner is made.
    Tie,
    /// Resource limits are set.
    Limits,
    /// The build process is forked.
    Fork,
    /// The working directory is entered.
    WorkingDir,
}

impl Step {
    /// What helps where the system refuses this step in this way.
    fn hint(self, errno: Errno, object: &str) -> Option<&'static str> {
        match (self, errno) {
            (Step::Clone, Errno::EPERM | Errno::EACCES) => Some(
                "user namespaces are not allowed here; see kernel.unprivileged_userns_clone and AppArmor",
            ),
            (Step::OpenSource, Errno::ELOOP) => {
                Some("it, or a directory on the way to it, has become a symbolic link")
            }
            (Step::Clone, Errno::ENOSPC | Errno::EUSERS) => Some("see user.max_*_namespaces in /proc/sys"),
            (Step::Mount, Errno::EPERM) if object == "proc" => Some(
                "a container that masks parts of /proc forbids a fresh one; run it with an unmasked /proc",
            ),
            (Step::ForbidUserNamespaces, Errno::EROFS | Errno::EACCES | Errno::ENODEV) => Some(
                "/proc/sys is read-only here or not the kernel's; run it where /proc is whole and writable",
            ),
            (Step::Seccomp, Errno::ENOSYS | Errno::EINVAL) => {
                Some("the kernel has no seccomp filters: CONFIG_SECCOMP_FILTER")
            }
            (Step::Landlock, Errno::ENOSYS | Errno::EOPNOTSUPP | Errno::EINVAL) => {
                Some("it takes Linux 6.12 with Landlock enabled: CONFIG_SECURITY_LANDLOCK, lsm=landlock,...")
            }
            _ => None,
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Step::ReadPlan => "read the plan of the sandbox",
            Step::Clone => "make namespaces",
            Step::Cgroup => "enter the cgroup",
            Step::MapIds => "write the id map",
            Step::Pipe => "make a pipe",
            Step::Streams => "put the standard streams in place",
            Step::OpenSource => "open",
            Step::PassSources => "pass the sources of mounts on",
            Step::BecomeRoot => "become the sandbox's root",
            Step::Propagation => "cut mount propagation",
            Step::RootTmpfs => "make the sandbox's root",
            Step::MakeEntry => "make",
            Step::MountPoint => "make the mount point",
            Step::Mount => "mount",
            Step::ReadOnly => "make read-only",
            Step::Pivot => "change the root",
            Step::Loopback => "bring up loopback",
            Step::StartForwarder => "start the program for the sandbox's network,",
            Step::AwaitNetwork => "connect the sandbox to the network",
            Step::HostName => "set the host name",
            Step::Keyring => "join a keyring of its own",
            Step::Device => "open, under the build's id, the device",
            Step::DropPrivileges => "give up privileges",
            Step::ForbidUserNamespaces => "forbid user namespaces",
            Step::Landlock => "keep the host's abstract sockets and processes out of reach (Landlock)",
            Step::Seccomp => "install the system call filter",
            Step::Tie => "tie the sandbox to its spawner",
            Step::Limits => "set resource limits",
            Step::Fork => "fork the build process",
            Step::WorkingDir => "enter the working directory",
        })
    }
}
