//! The raw system calls that have no safe wrapper elsewhere: one function each, nothing decided here.

use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use libc::{c_int, c_long, c_uint, c_void};
use nix::errno::Errno;

use crate::report::ExitStatus;

/// Turns a system call's answer into a descriptor that is owned.
fn owned(answer: c_long) -> Result<OwnedFd, Errno> {
    let fd = Errno::result(answer)? as RawFd;
    // SAFETY: the call succeeded, so the kernel has just made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The two sides of [`clone_process`].
pub enum Cloned {
    /// In the new process.
    Child,
    /// In the old one.
    Parent {
        /// The new process, as this one sees it.
        pid: nix::unistd::Pid,
        /// Refers to the new process for ever.
        pidfd: OwnedFd,
    },
}

/// `clone3(2)` in the manner of `fork`, with `CLONE_PIDFD` and new namespaces, into the cgroup whose directory is given.
///
/// # Safety
/// The calling process must be single-threaded, so that the child's copy of the memory is consistent.
pub unsafe fn clone_process(namespaces: c_int, cgroup: Option<BorrowedFd<'_>>) -> Result<Cloned, Errno> {
    // As linux/sched.h has it; libc's constant is cut off.
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    let mut pidfd: RawFd = -1;
    // SAFETY: all-zero is a valid value of this struct of integers.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = namespaces as u64 | libc::CLONE_PIDFD as u64;
    args.pidfd = (&raw mut pidfd) as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: `args` and `pidfd` live across the call; no stack is given, so the child goes on with a copy
    // of this one, as after fork; the caller upholds that there is one thread.
    let answer = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of_val(&args)) };
    match Errno::result(answer)? {
        0 => Ok(Cloned::Child),
        pid => {
            Ok(Cloned::Parent { pid: nix::unistd::Pid::from_raw(pid as i32), pidfd: owned(pidfd.into())? })
        }
    }
}

/// Waits for any child to end. Not through `nix`, which has no words for children that real-time signals ended.
pub fn wait() -> Result<(nix::unistd::Pid, ExitStatus), Errno> {
    wait_pid(-1)
}

/// Waits for this child to end.
pub fn wait_for(child: nix::unistd::Pid) -> Result<ExitStatus, Errno> {
    wait_pid(child.as_raw()).map(|(_, status)| status)
}

fn wait_pid(which: libc::pid_t) -> Result<(nix::unistd::Pid, ExitStatus), Errno> {
    let mut status = 0;
    // SAFETY: `status` lives across the call.
    let pid = Errno::result(unsafe { libc::waitpid(which, &raw mut status, 0) })?;
    let status = match libc::WIFSIGNALED(status) {
        true => ExitStatus::Signal(libc::WTERMSIG(status)),
        false => ExitStatus::Code(libc::WEXITSTATUS(status)),
    };
    Ok((nix::unistd::Pid::from_raw(pid), status))
}

/// Sends `signal` to the process of a pidfd.
pub fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: c_int) -> Result<(), Errno> {
    // SAFETY: plain integers and a null siginfo, which the call allows.
    let answer = unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, std::ptr::null::<c_void>(), 0)
    };
    Errno::result(answer).map(drop)
}

/// Whether an extended attribute of the file at `path` is there and has this value.
pub fn has_attribute(path: &Path, name: &CStr, value: &[u8]) -> bool {
    use std::os::unix::ffi::OsStrExt;
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else { return false };
    let mut buffer = [0_u8; 16];
    // SAFETY: both names are C strings, and pointer and length those of the buffer; all live across the call.
    let answer =
        unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len()) };
    usize::try_from(answer).is_ok_and(|length| buffer.get(..length) == Some(value))
}

/// Marks every descriptor from `first` to `last` close-on-exec, or closes it.
pub fn close_range(first: RawFd, last: RawFd, flags: c_uint) -> Result<(), Errno> {
    // SAFETY: plain integers. Where descriptors are closed, the callers are children that own none of them.
    let answer = unsafe { libc::syscall(libc::SYS_close_range, first as c_uint, last as c_uint, flags) };
    Errno::result(answer).map(drop)
}

/// A detached copy of the mount at `path`, with all mounts below it if `recursive`.
pub fn open_tree(path: &CStr, recursive: bool) -> Result<OwnedFd, Errno> {
    let mut flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= libc::AT_RECURSIVE as c_uint;
    }
    // SAFETY: `path` is a C string that lives across the call.
    owned(unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) })
}

/// A detached copy of the mount that `place` lies on, from there, with all mounts below it if `recursive`.
pub fn open_tree_of(place: BorrowedFd<'_>, recursive: bool) -> Result<OwnedFd, Errno> {
    let mut flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_EMPTY_PATH as c_uint;
    if recursive {
        flags |= libc::AT_RECURSIVE as c_uint;
    }
    // SAFETY: the path is a C string; the flags say that it is empty.
    owned(unsafe { libc::syscall(libc::SYS_open_tree, place.as_raw_fd(), c"".as_ptr(), flags) })
}

/// Attaches the detached mount `tree` on what `at` refers to.
pub fn move_mount(tree: BorrowedFd<'_>, at: BorrowedFd<'_>) -> Result<(), Errno> {
    let flags = libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_EMPTY_PATH;
    // SAFETY: both paths are C strings; the flags say that they are empty.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            at.as_raw_fd(),
            c"".as_ptr(),
            flags,
        )
    };
    Errno::result(answer).map(drop)
}

/// Sets attributes (`MOUNT_ATTR_*`) on a mount.
pub fn set_mount_attributes(mount: BorrowedFd<'_>, set: u64) -> Result<(), Errno> {
    mount_setattr(mount, set, libc::AT_EMPTY_PATH)
}

/// Sets attributes (`MOUNT_ATTR_*`) on a mount and on all below it.
pub fn set_mount_attributes_recursively(mount: BorrowedFd<'_>, set: u64) -> Result<(), Errno> {
    mount_setattr(mount, set, libc::AT_EMPTY_PATH | libc::AT_RECURSIVE)
}

fn mount_setattr(mount: BorrowedFd<'_>, set: u64, flags: c_int) -> Result<(), Errno> {
    let attributes = libc::mount_attr { attr_set: set, attr_clr: 0, propagation: 0, userns_fd: 0 };
    // SAFETY: the struct lives across the call and its size is given.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of_val(&attributes),
        )
    };
    Errno::result(answer).map(drop)
}

/// A file system in the making (`fsopen(2)`).
pub struct FsContext(OwnedFd);

impl FsContext {
    // Commands of fsconfig(2), as linux/mount.h numbers them.
    const SET_FLAG: c_uint = 0;
    const SET_STRING: c_uint = 1;
    const CREATE: c_uint = 6;

    /// Begins a file system of this type.
    pub fn open(kind: &CStr) -> Result<Self, Errno> {
        const FSOPEN_CLOEXEC: c_uint = 1;
        // SAFETY: `kind` is a C string that lives across the call.
        owned(unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), FSOPEN_CLOEXEC) }).map(Self)
    }

    fn config(
        &self,
        command: c_uint,
        key: *const libc::c_char,
        value: *const libc::c_char,
    ) -> Result<(), Errno> {
        // SAFETY: both are null or C strings that the callers keep alive across the call.
        let answer = unsafe { libc::syscall(libc::SYS_fsconfig, self.0.as_raw_fd(), command, key, value, 0) };
        Errno::result(answer).map(drop)
    }

    /// Sets an option that has no value.
    pub fn flag(&self, key: &CStr) -> Result<(), Errno> {
        self.config(Self::SET_FLAG, key.as_ptr(), std::ptr::null())
    }

    /// Sets an option.
    pub fn string(&self, key: &CStr, value: &CStr) -> Result<(), Errno> {
        self.config(Self::SET_STRING, key.as_ptr(), value.as_ptr())
    }

    /// Makes the file system and a detached mount of it, with attributes (`MOUNT_ATTR_*`).
    pub fn mount(self, attributes: u64) -> Result<OwnedFd, Errno> {
        const FSMOUNT_CLOEXEC: c_uint = 1;
        self.config(Self::CREATE, std::ptr::null(), std::ptr::null())?;
        // SAFETY: plain integers.
        owned(unsafe {
            libc::syscall(libc::SYS_fsmount, self.0.as_raw_fd(), FSMOUNT_CLOEXEC, attributes as c_uint)
        })
    }
}

/// Brings up the network interface `lo` of this network namespace.
pub fn loopback_up() -> Result<(), Errno> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: all-zero is a valid value of this struct of integers and bytes.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads an ifreq, which lives across the call.
    let answer = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw const request) };
    Errno::result(answer).map(drop)
}

/// Takes a capability out of the bounding set. `EINVAL`: the kernel knows no such capability.
pub fn drop_from_bounding_set(capability: u32) -> Result<(), Errno> {
    // SAFETY: plain integers.
    Errno::result(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability as libc::c_ulong, 0, 0, 0) })
        .map(drop)
}

/// Joins a new, empty session keyring. `ENOSYS`: the kernel has no keyrings.
pub fn join_new_session_keyring() -> Result<(), Errno> {
    // SAFETY: a null name asks for an anonymous keyring.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            libc::KEYCTL_JOIN_SESSION_KEYRING as c_long,
            std::ptr::null::<libc::c_char>(),
        )
    };
    Errno::result(answer).map(drop)
}

/// Makes this process deaf to what a terminal or a service manager sends to whole groups of processes.
pub fn ignore_termination() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT] {
        // SAFETY: SIG_IGN installs no code of ours.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

/// Sets every signal to its default action and empties the mask.
pub fn reset_signals() {
    // The kernel's struct, all zero: SIG_DFL, no flags, no mask. As long as any architecture's.
    let default = [0_u64; 5];
    // SAFETY: `default` lives across the calls and installs no code of ours. Not through libc: it keeps two signals
    // to itself and would leave them ignored. Signals that can't be changed answer EINVAL, which is right.
    unsafe {
        for signal in 1..=libc::SIGRTMAX() {
            libc::syscall(libc::SYS_rt_sigaction, signal, &raw const default, std::ptr::null::<c_void>(), 8);
        }
        let mut none = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}

/// Replaces the program. Comes back only if it can't.
pub fn execve(program: &CStr, arguments: &[CString], environment: &[CString]) -> Errno {
    match nix::unistd::execve(program, arguments, environment) {
        Err(errno) => errno,
        Ok(never) => match never {},
    }
}

/// Sets the NIS domain name of this UTS namespace.
pub fn set_domain_name(name: &str) -> Result<(), Errno> {
    // SAFETY: pointer and length are those of a live string.
    Errno::result(unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) }).map(drop)
}

/// Gives `fd` the number `target`, closing what had it, and leaves it open across `execve`.
///
/// Only for a process that owns nothing under `target`.
pub fn place_fd(fd: RawFd, target: RawFd) -> Result<(), Errno> {
    // SAFETY: plain integers; what `target` was is owned by nobody in this process, as the caller sees to.
    Errno::result(unsafe { libc::dup2(fd, target) }).map(drop)
}

/// Takes ownership of a descriptor placed with [`place_fd`].
pub fn adopt(fd: RawFd) -> Result<std::fs::File, Errno> {
    // SAFETY: plain integers.
    Errno::result(unsafe { libc::fcntl(fd, libc::F_GETFD) })?;
    // SAFETY: it is open, and was placed under this number for the caller alone.
    Ok(unsafe { std::fs::File::from_raw_fd(fd) })
}

/// Whether a seccomp filter may answer with this action. `EOPNOTSUPP`: it may not.
pub fn seccomp_action_available(action: u32) -> Result<(), Errno> {
    // SAFETY: the operation reads one integer, which lives across the call.
    let answer =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, &raw const action) };
    Errno::result(answer).map(drop)
}

/// Runs this program before every system call of this process from now on (`seccomp(2)`).
pub fn install_seccomp_filter(program: &[libc::sock_filter]) -> Result<(), Errno> {
    let len = u16::try_from(program.len()).map_err(|_| Errno::EINVAL)?;
    let program = libc::sock_fprog { len, filter: program.as_ptr().cast_mut() };
    // SAFETY: pointer and length are those of a live slice, which the kernel copies and does not write to.
    let answer =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) };
    Errno::result(answer).map(drop)
}

/// The argument of `landlock_create_ruleset(2)`, as of ABI 6.
#[repr(C)]
struct LandlockRuleset {
    handled_access_fs: u64,
    handled_access_net: u64,
    scoped: u64,
}

/// The version of Landlock. `ENOSYS`, `EOPNOTSUPP`: there is none, or it is turned off.
pub fn landlock_abi() -> Result<u32, Errno> {
    const LANDLOCK_CREATE_RULESET_VERSION: c_uint = 1;
    // SAFETY: with this flag the call takes no argument and makes nothing.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<c_void>(),
            0_usize,
            LANDLOCK_CREATE_RULESET_VERSION,
        )
    };
    Errno::result(answer).map(|version| version as u32)
}

/// Puts this process into a Landlock domain of its own with these scopes (`LANDLOCK_SCOPE_*`), which handles no access
/// to files or networks.
pub fn landlock_scope(scoped: u64) -> Result<(), Errno> {
    let ruleset = LandlockRuleset { handled_access_fs: 0, handled_access_net: 0, scoped };
    // SAFETY: the struct lives across the call and its size is given.
    let ruleset = owned(unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, &raw const ruleset, size_of_val(&ruleset), 0)
    })?;
    // SAFETY: plain integers.
    let answer = unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0) };
    Errno::result(answer).map(drop)
}

/// Gives memory that is free within this process back to the kernel, as far as the C library can (`malloc_trim(3)`).
pub fn trim_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes a plain integer, locks what it touches, and frees nothing that is in use.
    unsafe {
        libc::malloc_trim(0);
    }
}
