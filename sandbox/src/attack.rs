//! System calls for those who test what a sandbox holds: each can be made with arguments of the caller's choice, without
//! harm to the caller's own memory.
//!
//! [`Call`] is a table of the calls that attacks need and that no safe wrapper offers. A row says of which kind each
//! argument is; what the kernel reads or writes is then always a live buffer of at least the size that the call takes
//! for granted. This crate itself uses none of it.

use std::ffi::CStr;

use libc::c_long;
use nix::errno::Errno;

/// An argument of a [`Call`].
#[derive(Debug)]
pub enum Arg<'a> {
    /// A number: a flag, an id, a descriptor.
    Int(i64),
    /// A string that the kernel reads.
    Str(&'a CStr),
    /// Bytes that the kernel reads.
    In(&'a [u8]),
    /// Bytes that the kernel may write, or read.
    Out(&'a mut [u8]),
    /// No string or bytes.
    Null,
}

/// What a call expects in the place of one argument.
#[derive(Clone, Copy, Debug)]
enum Shape {
    Int,
    /// This number and no other; takes no argument.
    Fixed(c_long),
    Str,
    /// At least so many bytes that are read.
    In(usize),
    /// At least so many bytes that may be written.
    Out(usize),
    /// At least so many bytes that may be written, and are zero to begin with.
    Zeroed(usize),
    /// The length of the bytes before it; takes no argument.
    Len,
}

/// A system call with its arguments' kinds.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    number: c_long,
    shape: &'static [Shape],
}

/// Which of the kernel's entrances a call goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entrance {
    /// That of ordinary programs.
    Native,
    /// That of x32 programs: 64-bit registers, numbers with a bit set. Only on x86_64.
    X32,
}

/// The bit that tells x32 calls.
#[cfg(target_arch = "x86_64")]
const X32_BIT: c_long = 0x4000_0000;

macro_rules! calls {
    ($($(#[$doc:meta])* $name:ident = $number:expr, [$($shape:expr),* $(,)?];)*) => {
        impl Call { $(
            $(#[$doc])*
            pub const $name: Self = { use Shape::*; Self { number: $number as c_long, shape: &[$($shape),*] } };
        )* }
    };
}

calls! {
    /// `open_by_handle_at(mount, handle, flags)`; the handle is a `struct file_handle` whose first four bytes are the
    /// length of what follows the first eight.
    OPEN_BY_HANDLE_AT = libc::SYS_open_by_handle_at, [Int, In(8 + 128), Int];
    /// `fchmod(fd, mode)`.
    FCHMOD = libc::SYS_fchmod, [Int, Int];
    /// `fchmodat(dir, path, mode)`.
    FCHMODAT = libc::SYS_fchmodat, [Int, Str, Int];
    /// `fchmodat2(dir, path, mode, flags)`.
    FCHMODAT2 = 452, [Int, Str, Int, Int];
    /// `setxattr(path, name, value, size, flags)`.
    SETXATTR = libc::SYS_setxattr, [Str, Str, In(0), Len, Int];
    /// `lsetxattr(path, name, value, size, flags)`.
    LSETXATTR = libc::SYS_lsetxattr, [Str, Str, In(0), Len, Int];
    /// `fsetxattr(fd, name, value, size, flags)`.
    FSETXATTR = libc::SYS_fsetxattr, [Int, Str, In(0), Len, Int];
    /// `getxattr(path, name, value, size)`.
    GETXATTR = libc::SYS_getxattr, [Str, Str, Out(0), Len];
    /// `lgetxattr(path, name, value, size)`.
    LGETXATTR = libc::SYS_lgetxattr, [Str, Str, Out(0), Len];
    /// `fgetxattr(fd, name, value, size)`.
    FGETXATTR = libc::SYS_fgetxattr, [Int, Str, Out(0), Len];
    /// `listxattr(path, list, size)`.
    LISTXATTR = libc::SYS_listxattr, [Str, Out(0), Len];
    /// `llistxattr(path, list, size)`.
    LLISTXATTR = libc::SYS_llistxattr, [Str, Out(0), Len];
    /// `flistxattr(fd, list, size)`.
    FLISTXATTR = libc::SYS_flistxattr, [Int, Out(0), Len];
    /// `removexattr(path, name)`.
    REMOVEXATTR = libc::SYS_removexattr, [Str, Str];
    /// `setxattrat(dir, path, flags, name, args, size)`; the last ones are a `struct xattr_args`.
    SETXATTRAT = 463, [Int, Str, Int, Str, In(16), Len];
    /// `getxattrat(dir, path, flags, name, args, size)`, with room for no value in `args`.
    GETXATTRAT = 464, [Int, Str, Int, Str, In(16), Len];
    /// `listxattrat(dir, path, flags, list, size)`.
    LISTXATTRAT = 465, [Int, Str, Int, Out(0), Len];
    /// `removexattrat(dir, path, flags, name)`.
    REMOVEXATTRAT = 466, [Int, Str, Int, Str];
    /// A number that is no call's.
    UNKNOWN = 600, [Int, Int, Int];
    /// `clone3(args, size)`, with a size too small to be carried out.
    CLONE3_TOO_SMALL = libc::SYS_clone3, [In(8), Fixed(8)];
    /// `rseq(area, length, flags, signature)`, with a length that can't be carried out.
    RSEQ_BAD_LENGTH = libc::SYS_rseq, [In(32), Fixed(1), Int, Int];
    /// `statx(dir, path, flags, mask, buffer)`.
    STATX = libc::SYS_statx, [Int, Str, Int, Int, Out(256)];
    /// `add_key(type, description, payload, length, keyring)`.
    ADD_KEY = libc::SYS_add_key, [Str, Str, In(0), Len, Int];
    /// `request_key(type, description, callout, keyring)`.
    REQUEST_KEY = libc::SYS_request_key, [Str, Str, Str, Int];
    /// `keyctl(KEYCTL_GET_KEYRING_ID, keyring, create)`.
    KEYCTL_GET_KEYRING_ID = libc::SYS_keyctl, [Fixed(0), Int, Int];
    /// `keyctl(KEYCTL_JOIN_SESSION_KEYRING, no name)`: a new one.
    KEYCTL_JOIN_NEW_SESSION = libc::SYS_keyctl, [Fixed(1), Fixed(0)];
    /// `keyctl(KEYCTL_LINK, key, keyring)`.
    KEYCTL_LINK = libc::SYS_keyctl, [Fixed(8), Int, Int];
    /// `keyctl(KEYCTL_SEARCH, keyring, type, description, 0)`.
    KEYCTL_SEARCH = libc::SYS_keyctl, [Fixed(10), Int, Str, Str, Fixed(0)];
    /// `keyctl(KEYCTL_READ, key, buffer, length)`.
    KEYCTL_READ = libc::SYS_keyctl, [Fixed(11), Int, Out(0), Len];
    /// `keyctl(KEYCTL_REVOKE, key)`.
    KEYCTL_REVOKE = libc::SYS_keyctl, [Fixed(3), Int];
    /// `keyctl(KEYCTL_UNLINK, key, keyring)`.
    KEYCTL_UNLINK = libc::SYS_keyctl, [Fixed(9), Int, Int];
    /// `io_uring_setup(entries, params)`, with params that name no memory.
    IO_URING_SETUP = libc::SYS_io_uring_setup, [Int, Zeroed(120)];
    /// `bpf(BPF_MAP_CREATE, attributes, size)`.
    BPF_MAP_CREATE = libc::SYS_bpf, [Fixed(0), Out(128), Len];
    /// `userfaultfd(flags)`.
    USERFAULTFD = libc::SYS_userfaultfd, [Int];
    /// `perf_event_open(attributes, pid, cpu, group, flags)`.
    PERF_EVENT_OPEN = libc::SYS_perf_event_open, [Out(136), Int, Int, Int, Int];
    /// `fsopen(type, flags)`.
    FSOPEN = libc::SYS_fsopen, [Str, Int];
    /// `fsconfig(fd, command, key, value, aux)`.
    FSCONFIG = libc::SYS_fsconfig, [Int, Int, Str, Str, Int];
    /// `open_tree(dir, path, flags)`.
    OPEN_TREE = libc::SYS_open_tree, [Int, Str, Int];
    /// `move_mount(from, path, to, path, flags)`.
    MOVE_MOUNT = libc::SYS_move_mount, [Int, Str, Int, Str, Int];
    /// `mount_setattr(dir, path, flags, attributes, size)`.
    MOUNT_SETATTR = libc::SYS_mount_setattr, [Int, Str, Int, In(32), Fixed(32)];
    /// `pivot_root(new, old)`.
    PIVOT_ROOT = libc::SYS_pivot_root, [Str, Str];
    /// `kexec_load(entry, 0, no segments, flags)`.
    KEXEC_LOAD = libc::SYS_kexec_load, [Int, Fixed(0), Fixed(0), Int];
    /// `reboot(magic, magic, command)` with `LINUX_REBOOT_CMD_CAD_OFF`, the mildest there is.
    REBOOT_CAD_OFF = libc::SYS_reboot, [Fixed(0xfee1_dead), Fixed(672_274_793), Fixed(0)];
    /// `init_module(image, length, parameters)`.
    INIT_MODULE = libc::SYS_init_module, [In(0), Len, Str];
    /// `finit_module(fd, parameters, flags)`.
    FINIT_MODULE = libc::SYS_finit_module, [Int, Str, Int];
    /// `delete_module(name, flags)`.
    DELETE_MODULE = libc::SYS_delete_module, [Str, Int];
    /// `swapon(path, flags)`.
    SWAPON = libc::SYS_swapon, [Str, Int];
    /// `swapoff(path)`.
    SWAPOFF = libc::SYS_swapoff, [Str];
    /// `acct(path)`.
    ACCT = libc::SYS_acct, [Str];
    /// `settimeofday(no time, zone)`.
    SETTIMEOFDAY = libc::SYS_settimeofday, [Fixed(0), In(8)];
    /// `clock_settime(clock, time)`.
    CLOCK_SETTIME = libc::SYS_clock_settime, [Int, In(16)];
    /// `syslog(type, buffer, length)`.
    SYSLOG = libc::SYS_syslog, [Int, Out(0), Len];
    /// `sethostname(name, length)`.
    SETHOSTNAME = libc::SYS_sethostname, [In(0), Len];
    /// `quotactl(command, device, id, data)`, with room for what any command writes.
    QUOTACTL = libc::SYS_quotactl, [Int, Str, Int, Out(256)];
    /// `setpriority(which, who, priority)`.
    SETPRIORITY = libc::SYS_setpriority, [Int, Int, Int];
    /// `sched_setscheduler(pid, policy, parameters)`.
    SCHED_SETSCHEDULER = libc::SYS_sched_setscheduler, [Int, Int, In(4)];
    /// `pidfd_open(pid, flags)`.
    PIDFD_OPEN = libc::SYS_pidfd_open, [Int, Int];
    /// `pidfd_getfd(pidfd, target, flags)`.
    PIDFD_GETFD = libc::SYS_pidfd_getfd, [Int, Int, Int];
    /// `ioctl(fd, TIOCSTI, byte)`.
    TIOCSTI = libc::SYS_ioctl, [Int, Fixed(libc::TIOCSTI as c_long), In(1)];
    /// `ioctl(fd, TIOCLINUX, subcode)`: pastes, on a virtual console.
    TIOCLINUX = libc::SYS_ioctl, [Int, Fixed(libc::TIOCLINUX as c_long), Out(64)];
    /// `socket(family, type, protocol)`.
    SOCKET = libc::SYS_socket, [Int, Int, Int];
    /// `kill(pid, signal)`.
    KILL = libc::SYS_kill, [Int, Int];
    /// `shmget(key, size, flags)`.
    SHMGET = libc::SYS_shmget, [Int, Int, Int];
    /// `memfd_secret(flags)`.
    MEMFD_SECRET = libc::SYS_memfd_secret, [Int];
    /// `lsm_set_self_attr(attribute, context, size, flags)`.
    LSM_SET_SELF_ATTR = 460, [Int, In(32), Fixed(32), Int];
}

#[cfg(target_arch = "x86_64")]
calls! {
    /// `chmod(path, mode)`.
    CHMOD = libc::SYS_chmod, [Str, Int];
    /// `iopl(level)`.
    IOPL = libc::SYS_iopl, [Int];
    /// `ioperm(from, count, on)`.
    IOPERM = libc::SYS_ioperm, [Int, Int, Int];
}

impl Call {
    /// Makes the call.
    ///
    /// # Errors
    /// What the kernel answers. A call that yields a descriptor leaves it open: the process that tests is short-lived.
    ///
    /// # Panics
    /// Where `arguments` don't fit the row of the table: a mistake of the caller's.
    pub fn make(self, arguments: &mut [Arg<'_>]) -> Result<i64, Errno> {
        self.enter(Entrance::Native, arguments)
    }

    /// Makes the call through one of the kernel's entrances. `ENOSYS` where there is no such entrance.
    ///
    /// # Errors
    /// As [`Call::make`].
    ///
    /// # Panics
    /// As [`Call::make`].
    pub fn enter(self, entrance: Entrance, arguments: &mut [Arg<'_>]) -> Result<i64, Errno> {
        let number = match entrance {
            Entrance::Native => self.number,
            #[cfg(target_arch = "x86_64")]
            Entrance::X32 => self.number | X32_BIT,
            #[cfg(not(target_arch = "x86_64"))]
            Entrance::X32 => return Err(Errno::ENOSYS),
        };
        let [a, b, c, d, e, f] = self.registers(arguments);
        // SAFETY: `registers` has checked each argument against the row: a pointer is null or that of a live buffer of
        // at least the size that the kernel takes for granted, and a length is that of the buffer before it. The rows
        // name no call that changes the memory of the caller in another way.
        Errno::result(unsafe { libc::syscall(number, a, b, c, d, e, f) })
    }

    /// Has this process ended by SIGSYS when it makes the call, by a filter of its own as tests and browsers install.
    ///
    /// # Errors
    /// Where the kernel lets it have no filter.
    pub fn forbid(self) -> Result<(), Errno> {
        let number = u32::try_from(self.number).map_err(|_| Errno::EINVAL)?;
        let row = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
        // Load the call's number, the first field of struct seccomp_data; compare; kill or allow.
        let mut program = [
            row((libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16, 0, 0, 0),
            row((libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16, 0, 1, number),
            row((libc::BPF_RET | libc::BPF_K) as u16, 0, 0, libc::SECCOMP_RET_KILL_PROCESS),
            row((libc::BPF_RET | libc::BPF_K) as u16, 0, 0, libc::SECCOMP_RET_ALLOW),
        ];
        let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
        // SAFETY: the kernel copies the program, whose length is given; both live across the call.
        let answer =
            unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const filter) };
        Errno::result(answer).map(drop)
    }

    fn registers(self, arguments: &mut [Arg<'_>]) -> [c_long; 6] {
        let mut registers = [0; 6];
        let mut given = arguments.iter_mut();
        let mut length = 0;
        for (register, shape) in registers.iter_mut().zip(self.shape) {
            *register = match shape {
                Shape::Fixed(value) => *value,
                Shape::Len => length,
                shape => {
                    let argument = given.next().expect("an argument for each kind in the table");
                    let (value, len) = shape.accept(argument);
                    length = len;
                    value
                }
            };
        }
        assert!(given.next().is_none(), "more arguments than the table has kinds");
        registers
    }
}

impl Shape {
    /// The register's value, and the length of the bytes that it refers to.
    fn accept(self, argument: &mut Arg<'_>) -> (c_long, c_long) {
        let len = |bytes: &[u8]| c_long::try_from(bytes.len()).unwrap_or(c_long::MAX);
        match (self, argument) {
            (Shape::Int, Arg::Int(value)) => (*value as c_long, 0),
            (Shape::Str | Shape::In(_) | Shape::Out(_) | Shape::Zeroed(_), Arg::Null) => (0, 0),
            (Shape::Str, Arg::Str(text)) => (text.as_ptr() as c_long, 0),
            (Shape::In(min), Arg::In(bytes)) if bytes.len() >= min => (bytes.as_ptr() as c_long, len(bytes)),
            (Shape::Out(min), Arg::Out(bytes)) if bytes.len() >= min => {
                (bytes.as_mut_ptr() as c_long, len(bytes))
            }
            (Shape::Zeroed(min), Arg::Out(bytes)) if bytes.len() >= min => {
                bytes.fill(0);
                (bytes.as_mut_ptr() as c_long, len(bytes))
            }
            (shape, argument) => panic!("{argument:?} where the table has {shape:?}"),
        }
    }
}

/// Makes this process deaf to a signal.
///
/// # Errors
/// Where the kernel knows no such signal, or lets nobody ignore it.
pub fn ignore_signal(signal: i32) -> Result<(), Errno> {
    // SAFETY: SIG_IGN installs no code of ours.
    match unsafe { libc::signal(signal, libc::SIG_IGN) } {
        libc::SIG_ERR => Err(Errno::last()),
        _ => Ok(()),
    }
}

/// The calls of the i386 entrance (`int 0x80`), with its numbers.
#[cfg(target_arch = "x86_64")]
pub mod i386 {
    use std::ffi::CStr;
    use std::num::NonZeroUsize;

    use nix::errno::Errno;
    use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};

    /// A way to change permission bits.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Chmod {
        /// `chmod(path, mode)`.
        Chmod,
        /// `fchmodat(AT_FDCWD, path, mode)`.
        Fchmodat,
        /// `fchmodat2(AT_FDCWD, path, mode, 0)`.
        Fchmodat2,
    }

    const PAGE: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

    /// Changes permission bits as a 32-bit program would. Where the kernel has no such entrance, the process is ended by
    /// SIGSEGV.
    ///
    /// # Errors
    /// What the kernel answers; `ENAMETOOLONG` for a path longer than a page.
    pub fn chmod(how: Chmod, path: &CStr, mode: u32) -> Result<(), Errno> {
        let bytes = path.to_bytes_with_nul();
        if bytes.len() > PAGE.get() {
            return Err(Errno::ENAMETOOLONG);
        }
        let (read_write, flags) =
            (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE | MapFlags::MAP_32BIT);
        // SAFETY: a new mapping, wherever there is room: nothing of the program lies in it.
        let low = unsafe { mmap_anonymous(None, PAGE, read_write, flags) }?;
        // SAFETY: the mapping is a page long, was made for this alone and is never unmapped; the length was checked.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), low.as_ptr().cast::<u8>(), bytes.len()) };
        let path = low.as_ptr() as u64;
        let at = libc::AT_FDCWD as u32 as u64;
        let mode = u64::from(mode);
        let (number, b, c, d) = match how {
            Chmod::Chmod => (15, path, mode, 0),
            Chmod::Fchmodat => (306, at, path, mode),
            Chmod::Fchmodat2 => (452, at, path, mode),
        };
        // SAFETY: the calls above read a string, which lies in the first 4 GiB, and write no memory.
        Errno::result(unsafe { enter(number, b, c, d) }).map(drop)
    }

    /// # Safety
    /// The call of this number must not write to memory of the caller.
    unsafe fn enter(number: i32, b: u64, c: u64, d: u64) -> libc::c_long {
        let answer: i64;
        // SAFETY: as the caller upholds. rbx is the compiler's own, so it is exchanged and put back; the entrance may
        // clear r8 to r11; the fourth argument is 0.
        unsafe {
            std::arch::asm!(
                "xchg rbx, {b}",
                "int 0x80",
                "xchg rbx, {b}",
                b = inout(reg) b => _,
                inout("rax") i64::from(number) => answer,
                in("rcx") c,
                in("rdx") d,
                in("rsi") 0_u64,
                out("r8") _, out("r9") _, out("r10") _, out("r11") _,
            );
        }
        // The answer has 32 bits.
        match answer as i32 {
            error @ -4095..=-1 => {
                Errno::set_raw(-error);
                -1
            }
            value => value.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_made_with_what_it_is_given() {
        let mut buffer = [0; 256];
        let here = libc::AT_FDCWD.into();
        let mut statx = |path| {
            let mut arguments =
                [Arg::Int(here), Arg::Str(path), Arg::Int(0), Arg::Int(0x7ff), Arg::Out(&mut buffer)];
            Call::STATX.make(&mut arguments)
        };
        assert_eq!(statx(c"/nonexistent"), Err(Errno::ENOENT));
        assert_eq!(statx(c"/"), Ok(0));
        assert_ne!(buffer, [0; 256]);
        assert_eq!(Call::UNKNOWN.make(&mut [Arg::Int(1), Arg::Int(2), Arg::Int(3)]), Err(Errno::ENOSYS));
    }

    #[test]
    #[should_panic(expected = "where the table has")]
    fn a_buffer_too_small_is_refused() {
        let _ = Call::IO_URING_SETUP.make(&mut [Arg::Int(1), Arg::Out(&mut [0; 8])]);
    }

    #[test]
    #[should_panic(expected = "where the table has")]
    fn a_number_is_no_pointer() {
        let _ = Call::FSOPEN.make(&mut [Arg::Int(4096), Arg::Int(0)]);
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn the_i386_entrance_changes_modes() {
        use std::os::unix::fs::PermissionsExt;
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = std::ffi::CString::new(file.path().to_str().unwrap()).unwrap();
        for (how, mode) in [(i386::Chmod::Chmod, 0o640), (i386::Chmod::Fchmodat, 0o604)] {
            i386::chmod(how, &path, mode).unwrap();
            assert_eq!(file.path().metadata().unwrap().permissions().mode() & 0o7777, mode);
        }
    }
}
