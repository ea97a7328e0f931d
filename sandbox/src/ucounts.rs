//! What the kernel counts per user and user namespace, `/proc/sys/user`: a build's share of it.
//!
//! What a process of a sandbox has is counted for the build's user there, and for whoever made the sandbox's user
//! namespace, which is the same user for all builds. Without limits of its own one build could use up what that user may
//! have, and no other would get any.

use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::Mode;
use nix::sys::statfs::{PROC_SUPER_MAGIC, fstatfs};
use serde::{Deserialize, Serialize};

const DIRECTORY: &str = "/proc/sys/user";

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Counted {
    /// `inotify_init(2)`: 128 per user on most hosts.
    InotifyInstances,
    /// `inotify_add_watch(2)`.
    InotifyWatches,
    /// `fanotify_init(2)`.
    FanotifyGroups,
    /// `fanotify_mark(2)`.
    FanotifyMarks,
    /// User namespaces.
    UserNamespaces,
    /// Mount namespaces.
    MountNamespaces,
    /// Process namespaces.
    PidNamespaces,
    /// Network namespaces.
    NetworkNamespaces,
    /// Namespaces of System V objects.
    IpcNamespaces,
    /// Namespaces of host names.
    UtsNamespaces,
    /// Cgroup namespaces.
    CgroupNamespaces,
}

impl Counted {
    const ALL: [Self; 11] = [
        Self::InotifyInstances,
        Self::InotifyWatches,
        Self::FanotifyGroups,
        Self::FanotifyMarks,
        Self::UserNamespaces,
        Self::MountNamespaces,
        Self::PidNamespaces,
        Self::NetworkNamespaces,
        Self::IpcNamespaces,
        Self::UtsNamespaces,
        Self::CgroupNamespaces,
    ];

    fn file(self) -> &'static str {
        match self {
            Self::InotifyInstances => "max_inotify_instances",
            Self::InotifyWatches => "max_inotify_watches",
            Self::FanotifyGroups => "max_fanotify_groups",
            Self::FanotifyMarks => "max_fanotify_marks",
            Self::UserNamespaces => "max_user_namespaces",
            Self::MountNamespaces => "max_mnt_namespaces",
            Self::PidNamespaces => "max_pid_namespaces",
            Self::NetworkNamespaces => "max_net_namespaces",
            Self::IpcNamespaces => "max_ipc_namespaces",
            Self::UtsNamespaces => "max_uts_namespaces",
            Self::CgroupNamespaces => "max_cgroup_namespaces",
        }
    }

    /// What a build can't do without, however many builds there are.
    fn least(self) -> u32 {
        match self {
            Self::InotifyInstances | Self::FanotifyGroups => 8,
            Self::InotifyWatches | Self::FanotifyMarks => 4096,
            _ => 256,
        }
    }

    /// What a small host has by default. In a user namespace of its own, a worker or a container does not see the limits
    /// that count: there the kernel says that there are none.
    fn usual(self) -> u64 {
        match self {
            Self::InotifyInstances | Self::FanotifyGroups => 128,
            Self::InotifyWatches | Self::FanotifyMarks => 65_536,
            _ => 8192,
        }
    }

    /// Whether it is of no use without user namespaces of one's own.
    pub(crate) fn is_namespaces(self) -> bool {
        !matches!(
            self,
            Self::InotifyInstances | Self::InotifyWatches | Self::FanotifyGroups | Self::FanotifyMarks
        )
    }
}

/// The most that a build may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// Of what.
    pub of: Counted,
    /// How many.
    pub most: u32,
}

/// What each of this many builds may have, so that others and this process's user have as much. Nothing is said of what
/// this kernel does not count.
pub fn shares(builds: usize) -> Vec<Share> {
    let all = |of: Counted| {
        let text = std::fs::read_to_string(format!("{DIRECTORY}/{}", of.file())).ok()?;
        Some((of, text.trim().parse().ok()?))
    };
    Counted::ALL.into_iter().filter_map(all).map(|(of, all)| share(of, all, builds)).collect()
}

fn share(of: Counted, all: u64, builds: usize) -> Share {
    // The kernel takes no more than an `int`.
    const MOST: u64 = i32::MAX as u64;
    let all = if all >= MOST { of.usual() } else { all };
    let parts = (builds as u64).saturating_add(1);
    let most = (all / parts).clamp(u64::from(of.least()), MOST);
    Share { of, most: u32::try_from(most).unwrap_or(u32::MAX) }
}

/// Sets the limits of this process's user namespace, in which it needs `CAP_SYS_RESOURCE`: see `namespaces(7)`. Within a
/// container that lets nobody write to `/proc/sys` there are none.
pub(crate) fn limit(shares: &[Share]) -> Result<(), Errno> {
    if shares.is_empty() {
        return Ok(());
    }
    match shares.iter().try_for_each({
        let directory = directory()?;
        move |share| write(&directory, *share)
    }) {
        Err(Errno::EROFS | Errno::EACCES | Errno::EPERM | Errno::ENOENT) => Ok(()),
        other => other,
    }
}

fn directory() -> Result<OwnedFd, Errno> {
    let directory = open(DIRECTORY, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    match fstatfs(&directory)?.filesystem_type() {
        PROC_SUPER_MAGIC => Ok(directory),
        // Somebody's idea of a procfs.
        _ => Err(Errno::ENODEV),
    }
}

fn write(directory: &OwnedFd, Share { of, most }: Share) -> Result<(), Errno> {
    let file = openat(directory.as_fd(), of.file(), OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    nix::unistd::write(file, most.to_string().as_bytes()).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_build_has_a_part_of_what_there_is_and_never_nothing() {
        let most = |of, all, builds| share(of, all, builds).most;
        assert_eq!(most(Counted::InotifyInstances, 128, 3), 32);
        assert_eq!(most(Counted::InotifyInstances, 128, 1000), 8);
        assert_eq!(most(Counted::MountNamespaces, 96_000, 15), 6000);
        assert_eq!(most(Counted::MountNamespaces, 0, usize::MAX), 256);
        assert_eq!(most(Counted::UserNamespaces, i32::MAX as u64, 3), 2048);
    }

    #[test]
    fn what_this_kernel_counts_is_shared() {
        let shares = shares(1);
        assert!(shares.iter().any(|share| share.of == Counted::UserNamespaces), "{shares:?}");
    }
}
