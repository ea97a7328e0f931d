//! SEC: what a build may ask of the kernel.

use std::ffi::{CStr, OsStr};
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;

use cofferdam_sandbox::attack::{Arg, Call, Entrance};
use nix::errno::Errno;
use nix::fcntl::AT_FDCWD;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use super::tools::{nested, number};
use crate::selftest::stage::Stage;
use crate::selftest::{Act, Company, Findings, Outcome, Play, Probe, Profile, Weight};

pub(super) const PROBES: &[Probe] = &[
    Probe {
        id: "SEC-01",
        promise: "no file can be given a set-id mode, through any of the kernel's entrances",
        weight: Weight::Required,
        company: Company::Shared,
        attack: set_id_modes,
        play: Play::Plain,
    },
    Probe {
        id: "SEC-03",
        promise: "extended attributes are answered ENOTSUP, as in Nix's sandbox",
        weight: Weight::Desired,
        company: Company::Shared,
        attack: extended_attributes,
        play: Play::Plain,
    },
    Probe {
        id: "SEC-04",
        promise: "calls that the sandbox does not know are answered ENOSYS, so that C libraries fall back",
        weight: Weight::Desired,
        company: Company::Shared,
        attack: unknown_calls,
        play: Play::Plain,
    },
    Probe {
        id: "SEC-05",
        promise: "the keyrings of whoever started the worker are out of reach",
        weight: Weight::Required,
        company: Company::Shared,
        attack: seek_key,
        play: Play::Script(|stage| Box::pin(with_key(stage))),
    },
    Probe {
        id: "SEC-06",
        promise: "io_uring is refused: it would get around what is refused elsewhere",
        weight: Weight::Desired,
        company: Company::Shared,
        attack: io_uring,
        play: Play::Plain,
    },
    Probe {
        id: "SEC-07",
        promise: "bpf, userfaultfd and perf_event_open are refused, whatever the host's sysctls say",
        weight: Weight::Desired,
        company: Company::Shared,
        attack: kernel_programs,
        play: Play::Plain,
    },
    Probe {
        id: "SEC-08",
        promise: "a build can mount and unmount nothing in its own namespaces",
        weight: Weight::Desired,
        company: Company::Shared,
        attack: mounts,
        play: Play::Plain,
    },
    Probe {
        id: "SEC-09",
        promise: "nested user namespaces work in profile parity and are refused in profile strict",
        weight: Weight::Required,
        company: Company::Shared,
        attack: nested_namespaces,
        play: Play::Plain,
    },
    Probe {
        id: "SEC-10",
        promise: "what concerns the whole machine is refused: modules, clocks, swap, reboot, priorities",
        weight: Weight::Desired,
        company: Company::Shared,
        attack: the_whole_machine,
        play: Play::Plain,
    },
];

/// The directory from which relative paths start, as an argument.
fn here() -> Arg<'static> {
    Arg::Int(AT_FDCWD.as_raw_fd().into())
}

const SET_ID: [u32; 3] = [0o4755, 0o2755, 0o6755];

fn set_id_modes(act: &Act, findings: &mut Findings) {
    match act.role.as_str() {
        "i386" => return set_id_by_i386(findings),
        "x32" => return set_id_by(Entrance::X32, &[Errno::EPERM, Errno::ENOSYS], findings),
        _ => {}
    }
    set_id_by(Entrance::Native, &[Errno::EPERM], findings);
    // An entrance that the kernel or a filter closes may end the process.
    for role in ["i386", "x32"] {
        if act.run_again(role, &[], findings).is_err() {
            // That is as good as a refusal, if the modes are what they were.
            findings.check(!any_set_id(), format_args!("{role}: a file has a set-id mode"));
        }
    }
}

fn any_set_id() -> bool {
    let files = fs::read_dir("/build").into_iter().flatten().flatten();
    files.filter_map(|file| file.metadata().ok()).any(|found| found.permissions().mode() & 0o6000 != 0)
}

fn set_id_by(entrance: Entrance, refusals: &[Errno], findings: &mut Findings) {
    let Some(file) = findings.works("make a file", File::create("set-id")) else { return };
    let (fd, path) = (i64::from(file.as_raw_fd()), c"set-id");
    for mode in SET_ID {
        let bits = || Arg::Int(mode.into());
        let mut calls: Vec<(&str, Call, Vec<Arg<'_>>)> = vec![
            ("fchmod", Call::FCHMOD, vec![Arg::Int(fd), bits()]),
            ("fchmodat", Call::FCHMODAT, vec![here(), Arg::Str(path), bits()]),
            ("fchmodat2", Call::FCHMODAT2, vec![here(), Arg::Str(path), bits(), Arg::Int(0)]),
        ];
        #[cfg(target_arch = "x86_64")]
        calls.push(("chmod", Call::CHMOD, vec![Arg::Str(path), bits()]));
        for (name, call, mut arguments) in calls {
            let act = format!("{name} to {mode:o}, {entrance:?}");
            match call.enter(entrance, &mut arguments) {
                // Kernels before 6.6 have no fchmodat2.
                Err(Errno::ENOSYS) if name == "fchmodat2" => {}
                result => findings.refused(&act, result, refusals),
            }
        }
    }
    findings.check(!any_set_id(), format_args!("{entrance:?}: a file has a set-id mode"));
    // What is no set-id mode must go on working.
    findings.works("chmod to 750", fs::set_permissions("set-id", fs::Permissions::from_mode(0o750)));
}

#[cfg(target_arch = "x86_64")]
fn set_id_by_i386(findings: &mut Findings) {
    use cofferdam_sandbox::attack::i386::{self, Chmod};
    if findings.works("make a file", File::create("set-id-i386")).is_none() {
        return;
    }
    for how in [Chmod::Chmod, Chmod::Fchmodat, Chmod::Fchmodat2] {
        for mode in SET_ID {
            let act = format!("{how:?} to {mode:o} as a 32-bit program");
            findings.refused(&act, i386::chmod(how, c"set-id-i386", mode), &[Errno::EPERM, Errno::ENOSYS]);
        }
    }
    findings.check(!any_set_id(), "a file has a set-id mode");
}

#[cfg(not(target_arch = "x86_64"))]
fn set_id_by_i386(findings: &mut Findings) {
    findings.not_applicable("there are no 32-bit x86 programs on this architecture");
}

fn extended_attributes(_: &Act, findings: &mut Findings) {
    let Some(file) = findings.works("make a file", File::create("attributes")) else { return };
    let (fd, path, name) = (i64::from(file.as_raw_fd()), c"attributes", c"user.cofferdam");
    let (path, name) = (|| Arg::Str(path), || Arg::Str(name));
    let mut buffers = [[0_u8; 256]; 7];
    let [a, b, c, d, e, f, g] = &mut buffers;
    let args = [0_u8; 16];
    let calls: Vec<(&str, Call, Vec<Arg<'_>>)> = vec![
        ("setxattr", Call::SETXATTR, vec![path(), name(), Arg::In(b"x"), Arg::Int(0)]),
        ("lsetxattr", Call::LSETXATTR, vec![path(), name(), Arg::In(b"x"), Arg::Int(0)]),
        ("fsetxattr", Call::FSETXATTR, vec![Arg::Int(fd), name(), Arg::In(b"x"), Arg::Int(0)]),
        ("getxattr", Call::GETXATTR, vec![path(), name(), Arg::Out(a)]),
        ("lgetxattr", Call::LGETXATTR, vec![path(), name(), Arg::Out(b)]),
        ("fgetxattr", Call::FGETXATTR, vec![Arg::Int(fd), name(), Arg::Out(c)]),
        ("listxattr", Call::LISTXATTR, vec![path(), Arg::Out(d)]),
        ("llistxattr", Call::LLISTXATTR, vec![path(), Arg::Out(e)]),
        ("flistxattr", Call::FLISTXATTR, vec![Arg::Int(fd), Arg::Out(f)]),
    ];
    for (act, call, mut arguments) in calls {
        findings.refused(act, call.make(&mut arguments), &[Errno::EOPNOTSUPP]);
    }
    // A kernel before 6.13 does not have these.
    let newer: Vec<(&str, Call, Vec<Arg<'_>>)> = vec![
        ("setxattrat", Call::SETXATTRAT, vec![here(), path(), Arg::Int(0), name(), Arg::In(&args)]),
        ("getxattrat", Call::GETXATTRAT, vec![here(), path(), Arg::Int(0), name(), Arg::In(&args)]),
        ("listxattrat", Call::LISTXATTRAT, vec![here(), path(), Arg::Int(0), Arg::Out(g)]),
    ];
    for (act, call, mut arguments) in newer {
        findings.refused(act, call.make(&mut arguments), &[Errno::EOPNOTSUPP, Errno::ENOSYS]);
    }
}

fn unknown_calls(_: &Act, findings: &mut Findings) {
    let mut none = [Arg::Int(0), Arg::Int(0), Arg::Int(0)];
    findings.refused("call 600", Call::UNKNOWN.make(&mut none), &[Errno::ENOSYS]);
    findings.refused(
        "clone3 with arguments that are too small",
        Call::CLONE3_TOO_SMALL.make(&mut [Arg::In(&[0; 8])]),
        &[Errno::EINVAL, Errno::ENOSYS],
    );
    findings.refused(
        "rseq with a length that is too small",
        Call::RSEQ_BAD_LENGTH.make(&mut [Arg::In(&[0; 32]), Arg::Int(0), Arg::Int(0)]),
        &[Errno::EINVAL, Errno::ENOSYS],
    );
    let mut found = [0; 256];
    let mut arguments = [here(), Arg::Str(c"/"), Arg::Int(0), Arg::Int(0x7ff), Arg::Out(&mut found)];
    findings.works("statx", Call::STATX.make(&mut arguments));
    let lsm = Call::LSM_SET_SELF_ATTR.make(&mut [Arg::Int(100), Arg::In(&[0; 32]), Arg::Int(0)]);
    let refusals = [Errno::ENOSYS, Errno::EOPNOTSUPP, Errno::EINVAL, Errno::E2BIG];
    findings.refused("lsm_set_self_attr", lsm, &refusals);
}

const SESSION_KEYRING: i64 = -3;
const USER_KEYRING: i64 = -4;
const USER_SESSION_KEYRING: i64 = -5;

/// Puts a key where the worker's user has its keys, and has builds look for it.
async fn with_key(stage: &Stage<'_>) -> Outcome {
    let Ok(description) = std::ffi::CString::new(format!("cofferdam-selftest-{}", std::process::id())) else {
        return Outcome::broken("no name for a key");
    };
    let mut keys = Vec::new();
    for keyring in [SESSION_KEYRING, USER_KEYRING] {
        let mut arguments =
            [Arg::Str(c"user"), Arg::Str(&description), Arg::In(b"of the host"), Arg::Int(keyring)];
        match Call::ADD_KEY.make(&mut arguments) {
            Ok(key) => keys.push((key, keyring)),
            Err(Errno::ENOSYS) => return Outcome::not_applicable("this kernel has no keyrings"),
            Err(errno) => {
                return Outcome::not_applicable(format!(
                    "the host lets the worker's user have no keys: {errno}"
                ));
            }
        }
    }
    let mut arguments: Vec<String> = vec![description.to_string_lossy().into_owned()];
    arguments.extend(keys.iter().map(|(key, _)| key.to_string()));
    let arguments: Vec<&OsStr> = arguments.iter().map(OsStr::new).collect();
    let outcome = stage.act("", &arguments).await;
    for (key, keyring) in keys {
        // A key that can't be taken out is told of as left.
        let _ = Call::KEYCTL_UNLINK.make(&mut [Arg::Int(key), Arg::Int(keyring)]);
    }
    outcome
}

fn seek_key(act: &Act, findings: &mut Findings) {
    let mut arguments = act.arguments.iter();
    let description = arguments.next().map(super::tools::c_string).unwrap_or_default();
    let refusals =
        [Errno::ENOSYS, Errno::EPERM, Errno::EACCES, Errno::ENOKEY, Errno::EKEYREVOKED, Errno::EINVAL];
    for keyring in [SESSION_KEYRING, USER_KEYRING, USER_SESSION_KEYRING] {
        let mut search = [Arg::Int(keyring), Arg::Str(c"user"), Arg::Str(&description)];
        findings.refused(
            &format!("search keyring {keyring}"),
            Call::KEYCTL_SEARCH.make(&mut search),
            &refusals,
        );
    }
    let mut request = [Arg::Str(c"user"), Arg::Str(&description), Arg::Null, Arg::Int(SESSION_KEYRING)];
    findings.refused("request the key", Call::REQUEST_KEY.make(&mut request), &refusals);
    for key in arguments {
        let Some(key) = key.to_str().and_then(|key| key.parse().ok()) else { continue };
        let mut buffer = [0; 64];
        let read = Call::KEYCTL_READ.make(&mut [Arg::Int(key), Arg::Out(&mut buffer)]);
        findings.refused("read the key by its number", read, &refusals);
        let link = Call::KEYCTL_LINK.make(&mut [Arg::Int(key), Arg::Int(SESSION_KEYRING)]);
        findings.refused("link the key", link, &refusals);
        findings.refused("revoke the key", Call::KEYCTL_REVOKE.make(&mut [Arg::Int(key)]), &refusals);
    }
}

fn io_uring(_: &Act, findings: &mut Findings) {
    let mut params = [0; 120];
    let made = Call::IO_URING_SETUP.make(&mut [Arg::Int(4), Arg::Out(&mut params)]);
    findings.refused("io_uring_setup", made, &[Errno::ENOSYS]);
}

fn kernel_programs(_: &Act, findings: &mut Findings) {
    let refusals = [Errno::ENOSYS, Errno::EPERM];
    const USER_MODE_ONLY: i64 = 1;
    let fault = Call::USERFAULTFD.make(&mut [Arg::Int(USER_MODE_ONLY)]);
    findings.refused("userfaultfd for user mode", fault, &refusals);
    // BPF_MAP_CREATE: an array of one number.
    let mut attributes = [0; 128];
    for (at, value) in [(0, 2_u32), (4, 4), (8, 4), (12, 1)] {
        number(&mut attributes, at, value);
    }
    let map = Call::BPF_MAP_CREATE.make(&mut [Arg::Out(&mut attributes)]);
    findings.refused("bpf, a map", map, &refusals);
    // The task clock of this process, without the kernel's part: what perf_event_paranoid 2 allows everyone.
    let mut attributes = [0; 136];
    const EXCLUDE_KERNEL_AND_HYPERVISOR: u32 = 1 << 5 | 1 << 6;
    for (at, value) in [(0, 1_u32), (4, 136), (8, 1), (40, EXCLUDE_KERNEL_AND_HYPERVISOR)] {
        number(&mut attributes, at, value);
    }
    let mut arguments = [Arg::Out(&mut attributes), Arg::Int(0), Arg::Int(-1), Arg::Int(-1), Arg::Int(0)];
    findings.refused("perf_event_open", Call::PERF_EVENT_OPEN.make(&mut arguments), &refusals);
}

fn mounts(_: &Act, findings: &mut Findings) {
    let refusals = [Errno::EPERM, Errno::ENOSYS];
    let none: Option<&str> = None;
    let tmpfs = mount(Some("none"), "/build", Some("tmpfs"), MsFlags::empty(), none);
    findings.refused("mount a tmpfs", tmpfs, &refusals);
    let bind = mount(Some("/"), "/build", none, MsFlags::MS_BIND, none);
    findings.refused("bind /", bind, &refusals);
    let remount = MsFlags::MS_REMOUNT | MsFlags::MS_BIND;
    findings.refused("remount /", mount(none, "/", none, remount, none), &refusals);
    findings.refused("unmount /build", umount2("/build", MntFlags::MNT_DETACH), &refusals);
    findings.refused("fsopen", Call::FSOPEN.make(&mut [Arg::Str(c"tmpfs"), Arg::Int(0)]), &refusals);
    let mut config = [Arg::Int(0), Arg::Int(0), Arg::Str(c"ro"), Arg::Null, Arg::Int(0)];
    // Without a file system in the making there is nothing to configure.
    let config = Call::FSCONFIG.make(&mut config);
    findings.refused("fsconfig", config, &[Errno::EPERM, Errno::ENOSYS, Errno::EINVAL, Errno::EBADF]);
    const CLONE: i64 = 1;
    let tree = Call::OPEN_TREE.make(&mut [here(), Arg::Str(c"/"), Arg::Int(CLONE)]);
    findings.refused("open_tree", tree, &refusals);
    let mut moved = [here(), Arg::Str(c"/build"), here(), Arg::Str(c"/tmp"), Arg::Int(0)];
    findings.refused("move_mount", Call::MOVE_MOUNT.make(&mut moved), &refusals);
    let mut set = [here(), Arg::Str(c"/"), Arg::Int(0), Arg::In(&[0; 32])];
    // That sets nothing: the kernel may find nothing to refuse, and nothing is changed.
    match Call::MOUNT_SETATTR.make(&mut set) {
        Ok(_) => {}
        refused => findings.refused("mount_setattr", refused, &refusals),
    }
    // MOUNT_ATTR_RDONLY, taken away.
    let mut attributes = [0; 32];
    number(&mut attributes, 8, 1);
    let mut clear = [here(), Arg::Str(c"/"), Arg::Int(0), Arg::In(&attributes)];
    findings.refused("mount_setattr without ro", Call::MOUNT_SETATTR.make(&mut clear), &refusals);
    let pivot = Call::PIVOT_ROOT.make(&mut [Arg::Str(c"/build"), Arg::Str(c"/build")]);
    findings.refused("pivot_root", pivot, &refusals);
}

fn nested_namespaces(act: &Act, findings: &mut Findings) {
    match act.profile {
        Profile::Parity => {
            let flags = CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET;
            if findings.works("unshare user, mount and net", unshare(flags)).is_none() {
                return;
            }
            let map = fs::write("/proc/self/setgroups", "deny")
                .and_then(|()| fs::write("/proc/self/uid_map", "0 1000 1"))
                .and_then(|()| fs::write("/proc/self/gid_map", "0 100 1"));
            findings.works("map ids", map);
            let none: Option<&str> = None;
            let tmpfs = mount(Some("none"), "/build", Some("tmpfs"), MsFlags::empty(), none);
            findings.works("mount a tmpfs", tmpfs);
        }
        Profile::Strict => {
            let refusals = [Errno::EPERM, Errno::ENOSPC, Errno::ENOSYS];
            findings.refused("unshare user", unshare(CloneFlags::CLONE_NEWUSER), &refusals);
            findings.check(nested().is_none(), "a nested mount namespace was made");
        }
    }
}

/// The time of day as clock_settime takes it: should it be let, it changes next to nothing.
fn timespec_of_now() -> [u8; 16] {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&now.as_secs().to_ne_bytes());
    bytes[8..].copy_from_slice(&u64::from(now.subsec_nanos()).to_ne_bytes());
    bytes
}

fn the_whole_machine(_: &Act, findings: &mut Findings) {
    let refusals = [Errno::EPERM, Errno::ENOSYS, Errno::EACCES];
    let s = |text: &'static CStr| Arg::Str(text);
    let int = Arg::Int;
    let priority = 1_u32.to_ne_bytes();
    let now = timespec_of_now();
    let mut log = [0; 64];
    let mut quota = [0; 256];
    let calls: Vec<(&str, Call, Vec<Arg<'_>>)> = vec![
        ("kexec_load", Call::KEXEC_LOAD, vec![int(0), int(0)]),
        ("reboot", Call::REBOOT_CAD_OFF, vec![]),
        ("init_module", Call::INIT_MODULE, vec![Arg::In(b"\x7fELF"), s(c"")]),
        ("finit_module", Call::FINIT_MODULE, vec![int(0), s(c""), int(0)]),
        ("delete_module", Call::DELETE_MODULE, vec![s(c"cofferdam"), int(0)]),
        ("swapon", Call::SWAPON, vec![s(c"/build/swap"), int(0)]),
        ("swapoff", Call::SWAPOFF, vec![s(c"/build/swap")]),
        ("acct", Call::ACCT, vec![s(c"/build/acct")]),
        ("settimeofday", Call::SETTIMEOFDAY, vec![Arg::In(&[0; 8])]),
        ("clock_settime", Call::CLOCK_SETTIME, vec![int(0), Arg::In(&now)]),
        ("syslog", Call::SYSLOG, vec![int(5), Arg::Out(&mut log)]),
        ("sethostname", Call::SETHOSTNAME, vec![Arg::In(b"attacked")]),
        ("setpriority", Call::SETPRIORITY, vec![int(0), int(0), int(-20)]),
        ("sched_setscheduler", Call::SCHED_SETSCHEDULER, vec![int(0), int(1), Arg::In(&priority)]),
    ];
    for (act, call, mut arguments) in calls {
        findings.refused(act, call.make(&mut arguments), &refusals);
    }
    // Without a device there may be nothing to refuse.
    let quotactl =
        Call::QUOTACTL.make(&mut [int(0x0080_0002), s(c"/dev/null"), int(0), Arg::Out(&mut quota)]);
    findings.fails("quotactl", quotactl);
    #[cfg(target_arch = "x86_64")]
    {
        findings.refused("iopl", Call::IOPL.make(&mut [int(3)]), &refusals);
        findings.refused("ioperm", Call::IOPERM.make(&mut [int(0x80), int(1), int(1)]), &refusals);
    }
}
