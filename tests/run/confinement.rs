//! What a build may ask of the kernel, and what must go on working for all that.

use cofferdam_sandbox::{Landlock, landlock};
use libtest_mimic::Trial;

use crate::named;
use crate::support::{self, Case, Facility, Lacking, Mode};

pub fn tests() -> impl IntoIterator<Item = (&'static str, fn(&Case))> {
    named![
        every_process_is_filtered,
        unknown_calls_do_not_exist,
        set_id_modes_are_refused,
        attributes_are_not_supported,
        what_is_closed_to_builds_does_not_exist,
        terminals_take_no_false_input,
        files_are_copied_and_packed_as_ever,
        sandboxes_nest,
        builds_filter_and_trace_themselves,
        abstract_sockets_of_the_host_are_out_of_reach,
    ]
}

/// Compiles `source` on the host, statically.
#[track_caller]
fn compile(case: &Case, source: &str) {
    const HEADER: &str = r#"
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <unistd.h>
#define SAY(what, call) do { errno = 0; long r = (call); printf("%s %s\n", what, r < 0 ? strerrorname_np(errno) : "ok"); } while (0)
"#;
    case.write("probe.c", [HEADER, source].concat());
    let compile = ["-static", "-o", "probe", "probe.c"];
    assert!(case.program("gcc").args(compile).status().unwrap().success());
}

/// Compiles `source` and runs it in a build.
#[track_caller]
fn say(case: &Case, source: &str, flags: &[&str], expected: &str) {
    compile(case, source);
    let flags = [&["--input", "probe=probe"], flags].concat();
    case.run(&flags, "exec /inputs/probe 2>&1").code(0).says(expected);
}

fn every_process_is_filtered(case: &Case) {
    // Pid 1 too, which is not the build's own.
    let script = "grep -h '^Seccomp:' /proc/1/status /proc/self/status; (grep '^Seccomp:' /proc/self/status)";
    case.run(&[], script).code(0).says("Seccomp:\t2\nSeccomp:\t2\nSeccomp:\t2\n");
}

fn unknown_calls_do_not_exist(case: &Case) {
    const SOURCE: &str = r#"
int main(void) {
    SAY("600", syscall(600));
    SAY("5000", syscall(5000));
    /* Known, if with nonsense. */
    SAY("clone3", syscall(SYS_clone3, 0, 0));
    SAY("rseq", syscall(SYS_rseq, 1, 0, 0, 0));
    SAY("statx", syscall(SYS_statx, AT_FDCWD, "/", 0, 0, 0));
    return 0;
}
"#;
    say(case, SOURCE, &[], "600 ENOSYS\n5000 ENOSYS\nclone3 EINVAL\nrseq EINVAL\nstatx EFAULT\n");
}

fn set_id_modes_are_refused(case: &Case) {
    let script = "touch f; mkdir d; for mode in u+s g+s 4755 2755 6755; do chmod $mode f 2>&1; chmod $mode d 2>&1; done;
                  chmod 1777 d; chmod 755 f; stat -c %a f d";
    let ran = case.run(&[], script).code(0);
    let (refused, rest): (Vec<String>, Vec<String>) =
        ran.out().lines().map(str::to_owned).partition(|line| line.contains("Operation not permitted"));
    assert_eq!(refused.len(), 10, "{ran}");
    assert_eq!(rest, ["755", "1777"], "{ran}");
    const SOURCE: &str = r#"
int main(void) {
    int fd = open("f", O_CREAT | O_RDWR, 0644);
    SAY("chmod", chmod("f", 04755));
    SAY("fchmod", fchmod(fd, 02755));
    SAY("fchmodat", syscall(SYS_fchmodat, AT_FDCWD, "f", 04755));
    SAY("fchmodat2", syscall(452, AT_FDCWD, "f", 06755, 0));
    SAY("fchmod 1755", fchmod(fd, 01755));
    return 0;
}
"#;
    let expected = "chmod EPERM\nfchmod EPERM\nfchmodat EPERM\nfchmodat2 EPERM\nfchmod 1755 ok\n";
    say(case, SOURCE, &[], expected);
}

/// What is refused is refused by every way into the kernel.
pub fn by_other_ways() -> impl Iterator<Item = Trial> {
    Mode::ALL.into_iter().map(|mode| {
        let name = format!("other_ways_into_the_kernel_are_filtered::{mode}");
        support::fallible(name, mode, |case| {
            calls_of_32_bit(case)?;
            other_ways_into_the_kernel_are_filtered(case);
            Ok(())
        })
    })
}

/// A call as 32-bit programs of x86 make it, and one of x32.
const OTHER_WAYS: &str = r#"
static long call32(long nr, long a, long b, long c) {
    long r;
    __asm__ volatile("int $0x80" : "=a"(r) : "a"(nr), "b"(a), "c"(b), "d"(c) : "memory", "r8", "r9", "r10", "r11");
    r = (int)r;
    if (r < 0) { errno = -r; return -1; }
    return r;
}
static long callx32(long nr, long a, long b) { return syscall(0x40000000 | nr, a, b); }
"#;

/// Whether this machine has them.
fn calls_of_32_bit(case: &Case) -> Result<(), Lacking> {
    let lacks = |reason: &str| Err(Lacking::new(Facility::Calls32, reason));
    if !cfg!(target_arch = "x86_64") {
        return lacks("int 0x80 is x86's");
    }
    compile(case, &[OTHER_WAYS, "int main(void) { return call32(20, 0, 0, 0) != getpid(); }"].concat());
    match case.program("./probe").status().unwrap().success() {
        true => Ok(()),
        false => lacks("the kernel has no int 0x80 (CONFIG_IA32_EMULATION, ia32_emulation=)"),
    }
}

fn other_ways_into_the_kernel_are_filtered(case: &Case) {
    const MAIN: &str = r#"
int main(void) {
    int fd = open("f", O_CREAT | O_RDWR, 0644);
    SAY("getpid", call32(20, 0, 0, 0));
    SAY("fchmod 755", call32(94, fd, 0755, 0));
    SAY("fchmod", call32(94, fd, 04755, 0));
    SAY("chmod", call32(15, 0, 02755, 0));
    SAY("fchmodat", call32(306, AT_FDCWD, 0, 04755));
    SAY("fchmodat2", call32(452, AT_FDCWD, 0, 04755));
    SAY("fgetxattr", call32(231, fd, 0, 0));
    SAY("keyctl", call32(288, 0, -3, 0));
    SAY("ioctl", call32(54, fd, TIOCSTI, 0));
    SAY("600", call32(600, 0, 0, 0));
    SAY("x32 getpid", callx32(SYS_getpid, 0, 0));
    SAY("x32 fchmod", callx32(SYS_fchmod, fd, 04755));
    return 0;
}
"#;
    say(
        case,
        &[OTHER_WAYS, MAIN].concat(),
        &[],
        "getpid ok\nfchmod 755 ok\nfchmod EPERM\nchmod EPERM\nfchmodat EPERM\nfchmodat2 EPERM\n\
         fgetxattr EOPNOTSUPP\nkeyctl ENOSYS\nioctl EPERM\n600 ENOSYS\nx32 getpid ENOSYS\nx32 fchmod ENOSYS\n",
    );
}

fn attributes_are_not_supported(case: &Case) {
    const SOURCE: &str = r#"
int main(void) {
    char b[64];
    int fd = open("f", O_CREAT | O_RDWR, 0644);
    SAY("set", setxattr("f", "user.a", "1", 1, 0));
    SAY("lset", lsetxattr("f", "user.a", "1", 1, 0));
    SAY("fset", fsetxattr(fd, "user.a", "1", 1, 0));
    SAY("get", getxattr("f", "user.a", b, 64));
    SAY("lget", lgetxattr("f", "user.a", b, 64));
    SAY("fget", fgetxattr(fd, "user.a", b, 64));
    SAY("list", listxattr("f", b, 64));
    SAY("llist", llistxattr("f", b, 64));
    SAY("flist", flistxattr(fd, b, 64));
    SAY("remove", removexattr("f", "user.a"));
    SAY("lremove", lremovexattr("f", "user.a"));
    SAY("fremove", fremovexattr(fd, "user.a"));
    for (int nr = 463; nr <= 466; nr++) SAY("at", syscall(nr, AT_FDCWD, "f", 0, 0, 0, 0));
    return 0;
}
"#;
    let calls = "set lset fset get lget fget list llist flist remove lremove fremove at at at at";
    // ENOTSUP is the same number.
    let expected: String = calls.split(' ').map(|call| format!("{call} EOPNOTSUPP\n")).collect();
    say(case, SOURCE, &[], &expected);
}

fn what_is_closed_to_builds_does_not_exist(case: &Case) {
    const SOURCE: &str = r#"
int main(void) {
    char params[256] = {0};
    SAY("keyctl", syscall(SYS_keyctl, 0, -3, 0));
    SAY("add_key", syscall(SYS_add_key, "user", "k", "v", 1, -2));
    SAY("request_key", syscall(SYS_request_key, "user", "k", 0, 0));
    SAY("bpf", syscall(SYS_bpf, 0, 0, 0));
    SAY("perf", syscall(SYS_perf_event_open, 0, 0, -1, -1, 0));
    SAY("userfaultfd", syscall(SYS_userfaultfd, 1));
    SAY("io_uring", syscall(SYS_io_uring_setup, 4, params));
    return 0;
}
"#;
    let calls = "keyctl add_key request_key bpf perf userfaultfd io_uring";
    let expected: String = calls.split(' ').map(|call| format!("{call} ENOSYS\n")).collect();
    say(case, SOURCE, &[], &expected);
}

fn terminals_take_no_false_input(case: &Case) {
    const SOURCE: &str = r#"
int main(void) {
    int pty = open("/dev/ptmx", O_RDWR | O_NOCTTY);
    struct winsize size;
    SAY("size", ioctl(pty, TIOCGWINSZ, &size));
    SAY("type", ioctl(pty, TIOCSTI, "x"));
    /* The kernel looks at 32 bits. */
    SAY("type", syscall(SYS_ioctl, pty, 0xffffffff00000000 | TIOCSTI, "x"));
    SAY("paste", ioctl(pty, TIOCLINUX, "\3"));
    return 0;
}
"#;
    say(case, SOURCE, &[], "size ok\ntype EPERM\ntype EPERM\npaste EPERM\n");
}

fn files_are_copied_and_packed_as_ever(case: &Case) {
    let script =
        "set -e; mkdir -p a/b; echo x > a/b/f; ln -s b/f a/l; ln a/b/f a/h; chmod 750 a/b; touch -d @7 a/b/f;
                  cp -a a c; cp -p a/b/f g; mv c d; ls -lR d > /dev/null;
                  tar -cf t.tar d; mkdir e; tar -xpf t.tar -C e; diff -r a e/d; install -D -m 755 g i/j;
                  stat -c '%a %Y' e/d/b/f e/d/b; readlink e/d/l";
    let ran = case.run(&[], script).code(0);
    assert_eq!(ran.err(), "", "{ran}");
    let said = ran.out();
    assert!(said.starts_with("644 7\n750 ") && said.ends_with("\nb/f\n"), "{ran}");
}

fn sandboxes_nest(case: &Case) {
    let script = "unshare --user --map-root-user --mount --pid --fork --net --ipc --uts sh -ec '
                      id -u; mount -t tmpfs none /tmp; mount -t proc proc /proc; echo x > /tmp/x; cat /tmp/x;
                      mount --bind /build /tmp; hostname inner; hostname; echo $$'";
    case.run(&[], script).code(0).says("0\nx\ninner\n1\n");
}

fn builds_filter_and_trace_themselves(case: &Case) {
    const SOURCE: &str = r#"
int main(void) {
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getppid, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | 77),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {4, code};
    SAY("filter", syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program));
    SAY("filtered", syscall(SYS_getppid));
    SAY("signal", kill(getpid(), 0));
    int status;
    pid_t child = fork();
    if (child == 0) {
        ptrace(PTRACE_TRACEME);
        raise(SIGSTOP);
        _exit(syscall(SYS_getpid) == 5 ? 0 : 1);
    }
    waitpid(child, &status, 0);
    SAY("attached", ptrace(PTRACE_SYSCALL, child, 0, 0));
    /* A tracer puts itself in a call's place, as gdb and proot do: the number becomes -1, the answer its own. */
    for (int stop = 0; waitpid(child, &status, 0) == child && WIFSTOPPED(status); stop++) {
#ifdef __x86_64__
        long nr = ptrace(PTRACE_PEEKUSER, child, 8 * 15, 0);
        if (nr == SYS_getpid) {
            ptrace(PTRACE_POKEUSER, child, 8 * 15, -1L);
            ptrace(PTRACE_POKEUSER, child, 8 * 10, 5L);
        }
#endif
        ptrace(PTRACE_SYSCALL, child, 0, 0);
    }
#ifdef __x86_64__
    printf("exit %d\n", WEXITSTATUS(status));
#else
    printf("exit 0\n");
#endif
    return 0;
}
"#;
    say(case, SOURCE, &[], "filter ok\nfiltered EBADFD\nsignal ok\nattached ok\nexit 0\n");
}

fn abstract_sockets_of_the_host_are_out_of_reach(case: &Case) {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixListener};
    let name = format!("cofferdam-test-{}-{}", std::process::id(), case.mode);
    let address = SocketAddr::from_abstract_name(&name).unwrap();
    let _listener = UnixListener::bind_addr(&address).unwrap();
    let source = r#"
static int reach(const char *name) {
    struct sockaddr_un address = {AF_UNIX};
    memcpy(address.sun_path + 1, name, strlen(name));
    int s = socket(AF_UNIX, SOCK_STREAM, 0);
    return connect(s, (void *)&address, offsetof(struct sockaddr_un, sun_path) + 1 + strlen(name));
}
static int own(const char *name) {
    struct sockaddr_un address = {AF_UNIX};
    memcpy(address.sun_path + 1, name, strlen(name));
    int s = socket(AF_UNIX, SOCK_STREAM, 0);
    if (bind(s, (void *)&address, offsetof(struct sockaddr_un, sun_path) + 1 + strlen(name))) return -1;
    return listen(s, 1);
}
int main(void) {
    SAY("host's", reach("NAME"));
    SAY("own", own("NAME-own"));
    SAY("own", reach("NAME-own"));
    return 0;
}
"#;
    let source = source.replace("NAME", &name);
    // Where the network is the build's own there is nobody of this name.
    say(case, &source, &[], "host's ECONNREFUSED\nown ok\nown ok\n");
    let reached = match landlock::offered() {
        Landlock::Scoped => "EPERM",
        // docs/isolation.md: not held there.
        Landlock::Off => "ok",
    };
    say(case, &source, &["--network=host"], &format!("host's {reached}\nown ok\nown ok\n"));
}
