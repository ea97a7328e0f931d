//! What of a fresh `/proc` a build does not get: paths that speak of the machine are empty, paths that steer it are
//! read-only. The files' owner is the host's root, whom no sandbox has, so this is a second lock on a shut door; the
//! list is that of other container runtimes.
//!
//! A user namespace within the sandbox may mount a `/proc` of its own only while one without covers is in sight of the
//! kernel (`mount_too_revealing` in fs/namespace.c). One is kept below the covered one, where no path leads:
//!
//! ```text
//! /proc      tmpfs, holds: empty/  empty.file  proc/ ─ procfs, bare
//!   over it  the same procfs, covered: what a build sees
//! ```

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;

use super::rootfs::{Kind, open_place, tmpfs, walk};
use crate::plan::TmpfsSize;
use crate::sabotage::{Layer, kept};
use crate::sources::READ_ONLY;
use crate::sys;

/// Read-only.
const STEERING: [&str; 6] = ["asound", "bus", "fs", "irq", "sys", "sysrq-trigger"];
/// Empty.
const TELLING: [&str; 9] =
    ["acpi", "kcore", "keys", "kmsg", "latency_stats", "sched_debug", "scsi", "timer_list", "timer_stats"];

/// Enough for the three places, whatever the size of a page.
const ROOM: TmpfsSize = TmpfsSize { bytes: 1 << 20, inodes: 16 };

/// Mounts the procfs `bare`, which is detached, in `place`, with covers.
pub fn mount(bare: &OwnedFd, place: BorrowedFd<'_>) -> Result<(), Errno> {
    if !kept(Layer::ProcMasks) {
        return sys::move_mount(bare.as_fd(), place);
    }
    let below = tmpfs(0o500, ROOM)?;
    sys::move_mount(below.as_fd(), place)?;
    let made = |name: &str, kind| walk(below.as_fd(), Path::new(name), kind);
    let (directory, file) = (made("empty", Kind::Directory)?, made("empty.file", Kind::File)?);
    sys::move_mount(bare.as_fd(), made("proc", Kind::Directory)?.as_fd())?;
    let covered = sys::open_tree_of(bare.as_fd(), false)?;
    sys::move_mount(covered.as_fd(), place)?;
    for name in STEERING {
        if let Some(found) = find(covered.as_fd(), name)? {
            cover(found.as_fd(), found.as_fd())?;
        }
    }
    for name in TELLING {
        if let Some(found) = find(covered.as_fd(), name)? {
            match Kind::of(found.as_fd())? {
                Kind::Directory => cover(directory.as_fd(), found.as_fd())?,
                Kind::File => cover(file.as_fd(), found.as_fd())?,
            }
        }
    }
    Ok(())
}

/// Not every kernel has all of them.
fn find(proc: BorrowedFd<'_>, name: &str) -> Result<Option<OwnedFd>, Errno> {
    match open_place(proc, name.as_ref()) {
        Err(Errno::ENOENT) => Ok(None),
        found => found.map(Some),
    }
}

/// Mounts a read-only copy of `what` over `at`.
fn cover(what: BorrowedFd<'_>, at: BorrowedFd<'_>) -> Result<(), Errno> {
    let tree = sys::open_tree_of(what, false)?;
    sys::set_mount_attributes(tree.as_fd(), READ_ONLY | libc::MOUNT_ATTR_NOEXEC)?;
    sys::move_mount(tree.as_fd(), at)
}
