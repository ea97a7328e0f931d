//! What the disk of the state directory can do.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::{OpenOptionsExt, chown};
use std::path::Path;

use nix::sys::statfs::statfs;
use nix::sys::statvfs::statvfs;

use super::outcome::{Act, Found, Tried, Trouble};
use super::{mounts, raw};
use crate::ids::Identity;

/// Less than this and the next build may fill the disk.
const LOW_BYTES: u64 = 1 << 30;
/// Less than this and the next build may use up the inodes.
const LOW_INODES: u64 = 100_000;

fn new_file(dir: &Path, name: &str) -> Result<File, Trouble> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(0o700);
    let mut file = options.open(dir.join(name)).act("make a file in the state directory")?;
    file.write_all(b"#!/bin/sh\n").act("write to a file in the state directory")?;
    Ok(file)
}

/// How much room there is.
pub fn space(dir: &Path) -> Tried {
    let found = statvfs(dir).act("read how much space the state directory has")?;
    let free = found.blocks_available() * found.fragment_size();
    let detail = format!("{} free, on {}", size(free), kind(dir));
    // Some file systems have no fixed number of inodes, and say 0 of 0.
    let inodes = Some(found.files_available()).filter(|_| found.files() > 0);
    if free < LOW_BYTES {
        let words = format!("{} are free", size(free));
        return Ok(Found::but(detail, Trouble::said("count on the space of the state directory", words)));
    }
    match inodes {
        Some(inodes) if inodes < LOW_INODES => {
            let words = format!("{inodes} inodes are free");
            Ok(Found::but(detail, Trouble::said("count on the inodes of the state directory", words)))
        }
        _ => Ok(Found::with(detail)),
    }
}

fn size(bytes: u64) -> String {
    match bytes >> 20 {
        mebibytes @ 0..10_240 => format!("{mebibytes} MiB"),
        mebibytes => format!("{} GiB", mebibytes >> 10),
    }
}

/// What the file system is called; those of `statfs(2)` that one meets.
fn kind(dir: &Path) -> String {
    let names: [(i64, &str); 12] = [
        (0xef53, "ext4"),
        (0x0102_1994, "tmpfs"),
        (0x5846_5342, "xfs"),
        (0x9123_683e, "btrfs"),
        (0x2fc1_2fc1, "zfs"),
        (0xf2f5_2010, "f2fs"),
        (0xca45_1a4e, "bcachefs"),
        (0x794c_7630, "overlayfs"),
        (0x6969, "nfs"),
        (0x0102_1997, "9p"),
        (0x6573_5546, "fuse"),
        (0xff53_4d42, "cifs"),
    ];
    let Ok(found) = statfs(dir) else { return "an unknown file system".into() };
    let magic = found.filesystem_type().0;
    let name = names.iter().find(|(known, _)| *known == magic & 0xffff_ffff);
    name.map_or_else(|| format!("file system {magic:#x}"), |(_, name)| (*name).to_owned())
}

/// Whether what lies there can be executed.
pub fn execute(dir: &Path) -> Tried {
    let file = new_file(dir, "execute")?;
    raw::map_executable(file.as_fd())
        .act("map a file in the state directory for execution")
        .map(|()| Found::default())
}

/// Whether files take the attributes that overlay keeps.
pub fn attributes(dir: &Path) -> Tried {
    let file = new_file(dir, "attributes")?;
    raw::set_attribute(file.as_fd(), c"user.cofferdam", b"y")
        .act("set a user extended attribute")
        .map(|()| Found::default())
}

/// Whether copies can share blocks.
pub fn reflink(dir: &Path) -> Tried {
    let (from, to) = (new_file(dir, "from")?, new_file(dir, "to")?);
    raw::reflink(from.as_fd(), to.as_fd()).act("share the blocks of a file").map(|()| Found::default())
}

const OVERLAY: [&str; 3] = ["lower", "upper", "work"];

/// An overlay on directories there, made as for a build.
pub fn overlay(dir: &Path, identity: &Identity) -> Tried {
    let root = identity.root_owner();
    for name in OVERLAY {
        let path = dir.join(name);
        fs::create_dir(&path).act("make a directory in the state directory")?;
        chown(&path, Some(root.uid), Some(root.gid)).act("give a directory to a build's root")?;
    }
    mounts::overlay_on_disk(dir, &identity.map(0))
}
