//! What a tree looks like on disk, and what inputs look like to builds, whichever way they are shown.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use cofferdam_sandbox::Owner;
use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::stat::{Mode, UtimensatFlags, fchmod, futimens, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, fchown, fchownat};

use super::node::Name;

/// Modification time of an input: one second after the epoch, as the stores of Nix and Guix have it.
pub const INPUT_TIME: Duration = Duration::from_secs(1);

/// Permission bits of a directory that is or lies in an input.
pub const INPUT_DIRECTORY_MODE: u16 = 0o555;

/// Permission bits of a file that is or lies in an input.
pub fn input_file_mode(executable: bool) -> u16 {
    if executable { 0o555 } else { 0o444 }
}

/// What a tree looks like on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// Made by whoever runs this, now: files of mode 0644 or 0755 and directories of 0755, less the umask.
    Plain,
    /// As inputs of builds are: not to be written to, [`INPUT_TIME`], and of this owner.
    Input(Owner),
}

/// Gives a directory its look. All that is in it must have been made before.
pub fn seal_directory(directory: BorrowedFd<'_>, look: Look) -> Result<(), Errno> {
    seal(directory, INPUT_DIRECTORY_MODE, look)
}

/// Gives a file its look. It must have been read and written for the last time.
pub(super) fn seal_file(file: BorrowedFd<'_>, executable: bool, look: Look) -> Result<(), Errno> {
    seal(file, input_file_mode(executable), look)
}

/// Gives the symbolic link `name` in `dir` its look.
pub(super) fn seal_symlink(dir: BorrowedFd<'_>, name: &Name, look: Look) -> Result<(), Errno> {
    let Look::Input(owner) = look else { return Ok(()) };
    let (uid, gid) = ids(owner);
    fchownat(dir, name.as_os_str(), uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW)?;
    let time = TimeSpec::from(INPUT_TIME);
    utimensat(dir, name.as_os_str(), &time, &time, UtimensatFlags::NoFollowSymlink)
}

fn seal(fd: BorrowedFd<'_>, mode: u16, look: Look) -> Result<(), Errno> {
    let Look::Input(owner) = look else { return Ok(()) };
    let (uid, gid) = ids(owner);
    fchown(fd, uid, gid)?;
    // After the change of owner, which may clear bits; and whatever the umask is.
    fchmod(fd, Mode::from_bits_truncate(mode.into()))?;
    let time = TimeSpec::from(INPUT_TIME);
    futimens(fd, &time, &time)
}

fn ids(owner: Owner) -> (Option<Uid>, Option<Gid>) {
    (Some(Uid::from_raw(owner.uid)), Some(Gid::from_raw(owner.gid)))
}
