//! System calls that only the probes make: one function each, nothing decided here.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use libc::{c_int, c_long, c_uint, c_ulong};
use nix::errno::Errno;

/// The version of landlock's interface that the kernel offers.
pub fn landlock_version() -> Result<u32, Errno> {
    const VERSION: c_uint = 1;
    let none = std::ptr::null::<u8>();
    // SAFETY: a null attribute of size zero is what the call demands with this flag.
    let answer = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, none, 0_usize, VERSION) };
    Errno::result(answer).map(|version| u32::try_from(version).unwrap_or(0))
}

/// A landlock ruleset that keeps a process off abstract unix sockets and processes outside of it.
pub fn landlock_scopes() -> Result<OwnedFd, Errno> {
    /// `struct landlock_ruleset_attr` as of version 6.
    #[repr(C)]
    struct Attributes {
        handled_access_fs: u64,
        handled_access_net: u64,
        scoped: u64,
    }
    const ABSTRACT_UNIX_SOCKET: u64 = 1;
    const SIGNAL: u64 = 2;
    let attributes =
        Attributes { handled_access_fs: 0, handled_access_net: 0, scoped: ABSTRACT_UNIX_SOCKET | SIGNAL };
    // SAFETY: the struct lives across the call and its size is given.
    let answer = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, &raw const attributes, size_of_val(&attributes), 0)
    };
    let fd = Errno::result(answer)? as RawFd;
    // SAFETY: the call succeeded, so the kernel has just made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Puts this thread under a landlock ruleset.
pub fn landlock_restrict(ruleset: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: plain integers.
    let answer = unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0) };
    Errno::result(answer).map(drop)
}

/// Whether system call filters can answer with this action.
pub fn seccomp_knows(action: u32) -> Result<(), Errno> {
    // SAFETY: `action` lives across the call, which reads it.
    let answer = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL as c_uint, 0, &raw const action)
    };
    Errno::result(answer).map(drop)
}

/// Installs a filter that answers `getppid` with `errno` and lets everything else through.
pub fn seccomp_refuse_getppid(errno: Errno) -> Result<(), Errno> {
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let skip_unless_equal = |k: c_long| libc::sock_filter {
        code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
        jt: 0,
        jf: 1,
        k: k as u32,
    };
    let mut program = [
        // The number of the call is the first word that a filter sees.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0),
        skip_unless_equal(libc::SYS_getppid),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | errno as u32),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the program and its description live across the call.
    let answer = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER as c_uint, 0, &raw const filter)
    };
    Errno::result(answer).map(drop)
}

/// `getppid(2)` as a system call that can be refused.
pub fn getppid() -> Result<(), Errno> {
    // SAFETY: no arguments.
    Errno::result(unsafe { libc::syscall(libc::SYS_getppid) }).map(drop)
}

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
