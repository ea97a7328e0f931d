//! System calls that only the probes make: one function each, nothing decided here.

use std::os::fd::{AsRawFd, BorrowedFd};

use libc::{c_int, c_ulong};
use nix::errno::Errno;

/// Whether a file can be mapped to be executed.
pub fn map_executable(file: BorrowedFd<'_>) -> Result<(), Errno> {
    const LENGTH: usize = 1;
    let protection = libc::PROT_READ | libc::PROT_EXEC;
    // SAFETY: the kernel chooses the address, and nothing looks at what is mapped.
    let at = unsafe {
        libc::mmap(std::ptr::null_mut(), LENGTH, protection, libc::MAP_PRIVATE, file.as_raw_fd(), 0)
    };
    if at == libc::MAP_FAILED {
        return Err(Errno::last());
    }
    // SAFETY: it was mapped above, with this length, and nobody else knows of it.
    Errno::result(unsafe { libc::munmap(at, LENGTH) }).map(drop)
}

/// Makes `to` a copy of `from` that shares its blocks (`FICLONE`).
pub fn reflink(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<(), Errno> {
    /// `_IOW(0x94, 9, int)`.
    const FICLONE: c_ulong = 0x4004_9409;
    // SAFETY: plain integers.
    Errno::result(unsafe { libc::ioctl(to.as_raw_fd(), FICLONE as _, from.as_raw_fd()) }).map(drop)
}

/// Sets an extended attribute of an open file.
pub fn set_attribute(file: BorrowedFd<'_>, name: &std::ffi::CStr, value: &[u8]) -> Result<(), Errno> {
    // SAFETY: name and value live across the call, and the length is the value's.
    let answer = unsafe {
        libc::fsetxattr(file.as_raw_fd(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0 as c_int)
    };
    Errno::result(answer).map(drop)
}
