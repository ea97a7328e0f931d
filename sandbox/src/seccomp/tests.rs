//! What the compiled programs answer: by an interpreter for every ABI of the table, and by this kernel for its own.

use std::io::Read;
use std::os::fd::AsRawFd;

use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork, pipe};

use super::compile::{Instruction, abis_of, compile};
use super::policy::{Abi, Mistake, Policy, Table};
use super::*;

const TABLE: &str = include_str!("../../policy/syscalls");
const PARITY_TEXT: &str = include_str!("../../policy/parity.policy");
const STRICT_TEXT: &str = include_str!("../../policy/strict.policy");

const EPERM: u32 = libc::EPERM as u32;
const ENOSYS: u32 = libc::ENOSYS as u32;
const EOPNOTSUPP: u32 = libc::EOPNOTSUPP as u32;
const EAFNOSUPPORT: u32 = libc::EAFNOSUPPORT as u32;

fn table() -> Table {
    Table::parse(TABLE).unwrap()
}

fn policy(profile: Profile) -> Policy {
    let parity = Policy::parse(PARITY_TEXT, &[]).unwrap();
    match profile {
        Profile::Parity => parity,
        Profile::Strict => Policy::parse(STRICT_TEXT, &[("parity", &parity)]).unwrap(),
    }
}

/// For each architecture and profile, the program.
fn programs() -> Vec<(Profile, &'static [Abi], Vec<Instruction>)> {
    let mut programs = Vec::new();
    for target in ["x86_64", "aarch64"] {
        let abis = abis_of(target).unwrap();
        for profile in Profile::ALL {
            programs.push((profile, abis, compile(&policy(profile), &table(), abis).unwrap()));
        }
    }
    programs
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Allowed,
    Refused(u32),
}
use Answer::{Allowed, Refused};

/// Runs a program as the kernel does: `Documentation/networking/filter.rst`. Yields the steps that it took, too.
fn interpret(program: &[Instruction], arch: u32, number: u32, arguments: [u64; 6]) -> (Answer, usize) {
    let load = |offset: u32| match offset {
        0 => number,
        4 => arch,
        16..64 if offset.is_multiple_of(4) => {
            let argument = arguments[(offset as usize - 16) / 8];
            if offset.is_multiple_of(8) { argument as u32 } else { (argument >> 32) as u32 }
        }
        offset => panic!("there is nothing at {offset}"),
    };
    let (mut accumulator, mut at) = (0, 0);
    for step in 1.. {
        let Instruction { code, jt, jf, k } = program[at];
        let jump = |yes: bool| usize::from(if yes { jt } else { jf });
        at += 1;
        match code {
            0x20 => accumulator = load(k),
            0x54 => accumulator &= k,
            0x05 => at += k as usize,
            0x15 => at += jump(accumulator == k),
            0x25 => at += jump(accumulator > k),
            0x35 => at += jump(accumulator >= k),
            0x06 => match k {
                0x7fff_0000 => return (Allowed, step),
                k if k >> 16 == 5 => return (Refused(k & 0xffff), step),
                k => panic!("{k:#x} is no answer of ours"),
            },
            code => panic!("{code:#x} is no instruction of ours"),
        }
    }
    unreachable!()
}

fn answer(program: &[Instruction], abi: Abi, number: u32, arguments: [u64; 6]) -> Answer {
    interpret(program, abi.audit_arch(), number, arguments).0
}

/// Asserts what all ABIs that have the call answer, and that at least one has it.
#[track_caller]
fn expect(profile: Profile, call: &str, arguments: [u64; 6], expected: Answer) {
    let table = table();
    let mut asked = 0;
    for (_, abis, program) in programs().iter().filter(|(its, ..)| *its == profile) {
        for abi in *abis {
            let Some(number) = table.number(call, *abi) else { continue };
            let given = answer(program, *abi, number, arguments);
            assert_eq!(given, expected, "{call} {arguments:x?} under {profile} on {abi:?}");
            asked += 1;
        }
    }
    assert!(asked > 0, "no ABI has {call}");
}

#[test]
fn each_rule_holds_on_every_abi_that_has_the_call() {
    const SET_ID: u64 = 0o4755;
    const SET_GROUP_ID: u64 = 0o2755;
    const PLAIN: u64 = 0o1777;
    const NEW_USER: u64 = 0x1000_0000;
    const CREATE: u64 = 0o101;
    const TMPFILE: u64 = 0o20_200_002;
    // Whoever checks 64 bits, where the kernel takes 32, is passed by.
    const HIGH: u64 = 1 << 40;
    let a = |arguments: &[u64]| {
        let mut all = [0; 6];
        all[..arguments.len()].copy_from_slice(arguments);
        all
    };
    let (parity, strict) = (Profile::Parity, Profile::Strict);
    let both = [
        ("chmod", a(&[0, SET_ID]), Refused(EPERM)),
        ("chmod", a(&[0, SET_GROUP_ID]), Refused(EPERM)),
        ("chmod", a(&[0, SET_ID | HIGH]), Refused(EPERM)),
        ("chmod", a(&[0, PLAIN]), Allowed),
        ("chmod", a(&[SET_ID, 0o644, SET_ID]), Allowed),
        ("fchmod", a(&[1, 0o6000]), Refused(EPERM)),
        ("fchmod", a(&[1, 0o755]), Allowed),
        ("fchmodat", a(&[0, 0, SET_ID]), Refused(EPERM)),
        ("fchmodat", a(&[0, SET_ID, PLAIN]), Allowed),
        ("fchmodat2", a(&[0, 0, SET_GROUP_ID]), Refused(EPERM)),
        ("fchmodat2", a(&[0, SET_ID, PLAIN, SET_ID]), Allowed),
        ("setxattr", a(&[]), Refused(EOPNOTSUPP)),
        ("getxattr", a(&[]), Refused(EOPNOTSUPP)),
        ("listxattrat", a(&[]), Refused(EOPNOTSUPP)),
        ("fremovexattr", a(&[]), Refused(EOPNOTSUPP)),
        ("keyctl", a(&[]), Refused(ENOSYS)),
        ("bpf", a(&[]), Refused(ENOSYS)),
        ("io_uring_setup", a(&[]), Refused(ENOSYS)),
        ("ioctl", a(&[0, 0x5412]), Refused(EPERM)),
        ("ioctl", a(&[0, 0x5412 | HIGH]), Refused(EPERM)),
        ("ioctl", a(&[0, 0x541c]), Refused(EPERM)),
        ("ioctl", a(&[0x5412, 0x5401]), Allowed),
    ];
    for (call, arguments, expected) in both {
        expect(parity, call, arguments, expected);
        expect(strict, call, arguments, expected);
    }
    let only_strict = [
        ("clone", a(&[NEW_USER | 17]), Refused(EPERM)),
        ("unshare", a(&[NEW_USER | HIGH]), Refused(EPERM)),
        ("clone3", a(&[]), Refused(ENOSYS)),
        ("mount", a(&[]), Refused(EPERM)),
        ("open_tree", a(&[]), Refused(EPERM)),
        ("socket", a(&[0]), Refused(EAFNOSUPPORT)),
        ("socket", a(&[38]), Refused(EAFNOSUPPORT)),
        ("socket", a(&[40]), Refused(EAFNOSUPPORT)),
        ("socket", a(&[16, 3, 6]), Refused(EAFNOSUPPORT)),
        ("socketpair", a(&[30]), Refused(EAFNOSUPPORT)),
        ("socketcall", a(&[1]), Refused(EAFNOSUPPORT)),
        ("socketcall", a(&[8]), Refused(EAFNOSUPPORT)),
        ("open", a(&[0, CREATE, SET_ID]), Refused(EPERM)),
        ("openat", a(&[0, 0, CREATE, SET_GROUP_ID]), Refused(EPERM)),
        ("openat", a(&[0, 0, TMPFILE, SET_ID]), Refused(EPERM)),
        ("openat2", a(&[]), Refused(ENOSYS)),
        ("creat", a(&[0, SET_ID]), Refused(EPERM)),
        ("mknod", a(&[0, SET_ID]), Refused(EPERM)),
        ("mknodat", a(&[0, 0, SET_ID]), Refused(EPERM)),
        ("memfd_secret", a(&[]), Refused(ENOSYS)),
        ("vm86", a(&[]), Refused(ENOSYS)),
        ("init_module", a(&[]), Refused(EPERM)),
    ];
    for (call, arguments, expected) in only_strict {
        expect(strict, call, arguments, expected);
        expect(parity, call, arguments, Allowed);
    }
    let allowed_by_strict = [
        ("clone", a(&[0x11, NEW_USER])),
        ("unshare", a(&[0x0002_0000])),
        ("socket", a(&[1])),
        ("socket", a(&[2])),
        ("socket", a(&[10])),
        ("socket", a(&[16, 3, 0])),
        ("socketpair", a(&[1])),
        ("socketcall", a(&[3])),
        // Without one of the flags the mode is whatever lay in the register.
        ("open", a(&[0, 0, SET_ID])),
        ("openat", a(&[0, 0, 0, SET_ID])),
        ("openat", a(&[0, 0, CREATE, 0o666])),
        ("creat", a(&[0, 0o666])),
        ("mknod", a(&[0, 0o10_666])),
    ];
    for (call, arguments) in allowed_by_strict {
        expect(strict, call, arguments, Allowed);
    }
}

/// Every number of every ABI gets what its rule says, and nothing else is refused: whatever the arguments are.
#[test]
fn no_other_number_is_refused() {
    let table = table();
    let patterns = [0, 1, u64::from(u32::MAX), u64::MAX];
    for (profile, abis, program) in programs() {
        let policy = policy(profile);
        for abi in abis {
            let name = |number| table.calls.iter().find(|(_, its)| its[*abi as usize] == Some(number));
            let limits = [0x4000_0000, 0x7fff_ffff, 0x8000_0000, u32::MAX - 1];
            for number in (0..2000).chain(limits).chain(limits.map(|limit| limit + 1)) {
                let rule = name(number).and_then(|(call, _)| policy.rules.get(call));
                let assigned = table.assigned[*abi as usize].iter().any(|range| range.contains(&number));
                for pattern in patterns {
                    let given = answer(&program, *abi, number, [pattern; 6]);
                    match rule {
                        Some(rule) if rule.unless.is_empty() => {
                            assert_eq!(given, Refused(rule.refusal.errno))
                        }
                        Some(rule) => {
                            assert!(matches!(given, Allowed | Refused(_)));
                            if let Refused(errno) = given {
                                assert_eq!(errno, rule.refusal.errno);
                            }
                        }
                        // The number that a tracer leaves.
                        None if assigned || number == u32::MAX => {
                            assert_eq!(given, Allowed, "{number} on {abi:?}")
                        }
                        None => assert_eq!(given, Refused(ENOSYS), "{number} on {abi:?}"),
                    }
                }
            }
        }
    }
}

#[test]
fn what_builds_rely_on_is_there() {
    // Old libraries fall back on ENOSYS alone, and these are newer than the oldest of them.
    let calls = [(435, "clone3"), (334, "rseq"), (332, "statx"), (439, "faccessat2"), (451, "cachestat")];
    let (_, _, parity) = &programs()[0];
    for (number, name) in calls {
        assert_eq!(answer(parity, Abi::X86_64, number, [0; 6]), Allowed, "{name}");
    }
    for (number, name) in
        [(101, "ptrace"), (157, "prctl"), (317, "seccomp"), (444, "landlock_create_ruleset")]
    {
        for (profile, abis, program) in programs() {
            if abis[0] == Abi::X86_64 {
                assert_eq!(answer(&program, Abi::X86_64, number, [0; 6]), Allowed, "{name}, {profile}");
            }
        }
    }
}

#[test]
fn a_foreign_abi_has_no_calls() {
    for (_, _, program) in programs() {
        let (given, _) = interpret(&program, 0xc000_00f3, 1, [0; 6]);
        assert_eq!(given, Refused(ENOSYS));
    }
    // x32: the numbers of x86_64 with a bit more.
    for (.., program) in programs().iter().filter(|(_, abis, _)| abis[0] == Abi::X86_64) {
        for number in 0..1000 {
            assert_eq!(answer(program, Abi::X86_64, 0x4000_0000 | number, [0; 6]), Refused(ENOSYS));
        }
    }
}

/// The kernel compiles the program for every sandbox, and walks through it for every number of every ABI.
#[test]
fn programs_are_short_and_no_number_takes_long_to_find() {
    for (profile, abis, program) in programs() {
        let longest = match profile {
            Profile::Parity => 100,
            Profile::Strict => 350,
        };
        assert!(program.len() <= longest, "{} instructions for {profile}", program.len());
        for abi in abis {
            for number in 0..600 {
                let (_, steps) = interpret(&program, abi.audit_arch(), number, [u64::MAX; 6]);
                assert!(steps <= 30, "{steps} steps for {number} on {abi:?} under {profile}");
            }
        }
    }
}

#[test]
fn what_was_built_in_is_what_the_files_say() {
    let abis = abis_of(std::env::consts::ARCH).unwrap();
    for profile in Profile::ALL {
        let compiled = compile(&policy(profile), &table(), abis).unwrap();
        let built_in: Vec<Instruction> = profile
            .program()
            .iter()
            .map(|i| Instruction { code: i.code, jt: i.jt, jf: i.jf, k: i.k })
            .collect();
        assert_eq!(built_in, compiled, "{profile}");
    }
}

#[test]
fn the_table_agrees_with_libc() {
    let native = abis_of(std::env::consts::ARCH).unwrap()[0];
    let calls = [
        ("fchmod", libc::SYS_fchmod),
        ("fchmodat", libc::SYS_fchmodat),
        ("fchmodat2", libc::SYS_fchmodat2),
        ("fsetxattr", libc::SYS_fsetxattr),
        ("keyctl", libc::SYS_keyctl),
        ("bpf", libc::SYS_bpf),
        ("userfaultfd", libc::SYS_userfaultfd),
        ("ioctl", libc::SYS_ioctl),
        ("openat", libc::SYS_openat),
        ("socket", libc::SYS_socket),
        ("clone", libc::SYS_clone),
        ("unshare", libc::SYS_unshare),
        ("mount", libc::SYS_mount),
        ("mount_setattr", libc::SYS_mount_setattr),
    ];
    for (call, number) in calls {
        assert_eq!(table().number(call, native).map(i64::from), Some(number), "{call}");
    }
}

#[test]
fn mistakes_in_a_policy_are_told_with_their_line() {
    let mistake = |text: &str| Policy::parse(text, &[]).unwrap_err().to_string();
    let cases = [
        ("# one\n\nEBADNAME chmod", "line 3: EBADNAME is no error number known here"),
        ("EPERM", "line 1: no call is named"),
        ("EPERM unless arg0 == 1", "line 1: no call is named"),
        ("EPERM a\nEPERM b\n  c a", "line 2: a has a rule already"),
        ("include parity", "line 1: there is no policy parity"),
        ("EPERM a unless", "line 1: \"\" is no condition"),
        ("EPERM a unless arg0 == 1 or", "line 1: \"\" is no condition"),
        ("EPERM a unless arg6 == 1", "line 1: \"arg6 == 1\" names no argument"),
        ("EPERM a unless mode == 1", "line 1: \"mode == 1\" names no argument"),
        ("EPERM a unless arg0 < 1", "line 1: < can't be asked here"),
        ("EPERM a unless arg0 & 1 != 1", "line 1: != can't be asked here"),
        ("EPERM a unless arg0 == 0x1ffffffff", "line 1: 0x1ffffffff is no number of 32 bits"),
        ("EPERM a unless arg0 == 09", "line 1: 09 is no number of 32 bits"),
    ];
    for (text, expected) in cases {
        assert_eq!(mistake(text), expected, "{text:?}");
    }
    let table = |text: &str| Table::parse(text).map(drop).map_err(|mistake: Mistake| mistake.to_string());
    assert_eq!(table("chmod 1 2 3"), Err("line 1: chmod needs 4 columns".into()));
    assert_eq!(table("chmod 1 2 3 4\nchmod 1 2 3 4"), Err("line 2: chmod is there twice".into()));
    assert_eq!(table("assigned 1 - - -"), Err("line 1: 1 is no range".into()));
}

#[test]
fn a_rule_for_a_call_without_a_number_is_refused() {
    let policy = Policy::parse("EPERM chmdo", &[]).unwrap();
    let error = compile(&policy, &table(), &[Abi::X86_64]).unwrap_err().to_string();
    assert_eq!(error, "chmdo is not in the table of system calls");
}

#[test]
fn profiles_have_names() {
    for profile in Profile::ALL {
        assert_eq!(profile.to_string().parse(), Ok(profile));
    }
    let error = "Parity".parse::<Profile>().unwrap_err().to_string();
    assert!(error.contains("\"Parity\"") && error.contains("strict"), "{error}");
}

/// Runs `work` in a process of its own, and yields what it tells. It must not allocate: other tests have threads here,
/// and one of them may hold the allocator's lock at the fork.
fn in_a_process(work: impl Fn(&dyn Fn(u32))) -> Vec<u32> {
    let (read, write) = pipe().unwrap();
    // SAFETY: the child makes system calls and ends.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            work(&|told| {
                // SAFETY: the integer lives across the call.
                unsafe { libc::write(write.as_raw_fd(), (&raw const told).cast(), size_of_val(&told)) };
            });
            // SAFETY: ends the process at once.
            unsafe { libc::_exit(0) }
        }
        ForkResult::Parent { child } => {
            drop(write);
            let mut bytes = Vec::new();
            std::fs::File::from(read).read_to_end(&mut bytes).unwrap();
            assert_eq!(waitpid(child, None).unwrap(), WaitStatus::Exited(child, 0));
            bytes.chunks_exact(4).map(|told| u32::from_ne_bytes(told.try_into().unwrap())).collect()
        }
    }
}

fn errno_of(result: Result<(), Errno>) -> u32 {
    result.map_or_else(|errno| errno as u32, |()| 0)
}

/// Makes `calls` in a process that is under the profile, and yields the errno of each, 0 for none.
fn under(profile: Profile, calls: &[(u32, [u64; 6])]) -> Vec<u32> {
    in_a_process(|tell| {
        if prctl::set_no_new_privs().and_then(|()| install(profile)).is_err() {
            return;
        }
        for (number, [a, b, c, d, e, f]) in calls {
            // SAFETY: what the callers pass is no address of anything: no memory is touched.
            let answer = unsafe { libc::syscall(i64::from(*number), *a, *b, *c, *d, *e, *f) };
            tell(errno_of(Errno::result(answer).map(drop)));
        }
    })
}

#[test]
fn no_user_namespace_is_made_where_they_are_forbidden() {
    let errnos = in_a_process(|tell| {
        let another = || errno_of(unshare(CloneFlags::CLONE_NEWUSER));
        tell(another());
        // Not yet: nobody has an id here.
        tell(another());
        tell(errno_of(forbid_user_namespaces()));
        tell(another());
        // Who has given up its capabilities can't take it back.
        tell(errno_of(caps::clear(None, caps::CapSet::Effective).map_err(|_| Errno::ENODATA)));
        tell(errno_of(forbid_user_namespaces()));
    });
    assert_eq!(errnos, [0, EPERM, 0, libc::ENOSPC as u32, 0, libc::EACCES as u32]);
}

/// Whatever the interpreter says, it is the kernel's word that counts.
#[test]
fn the_kernel_refuses_what_the_policy_does() {
    supported().unwrap();
    let native = abis_of(std::env::consts::ARCH).unwrap()[0];
    for profile in Profile::ALL {
        let (policy, table) = (policy(profile), table());
        let refused: Vec<(&String, u32, u32)> = policy
            .rules
            .iter()
            // It takes no argument that could be wrong: should the filter fail, it would do something.
            .filter(|(call, rule)| rule.unless.is_empty() && *call != "vhangup")
            .filter_map(|(call, rule)| Some((call, table.number(call, native)?, rule.refusal.errno)))
            .collect();
        let calls: Vec<(u32, [u64; 6])> =
            refused.iter().map(|(_, number, _)| (*number, [u64::MAX; 6])).collect();
        let expected: Vec<u32> = refused.iter().map(|(.., errno)| *errno).collect();
        assert!(expected.len() > 20);
        assert_eq!(under(profile, &calls), expected, "{profile}: {refused:?}");
    }
}

#[test]
fn the_kernel_looks_at_arguments_as_the_policy_does() {
    let number = |call: &str| table().number(call, abis_of(std::env::consts::ARCH).unwrap()[0]).unwrap();
    // fd -1: what is let through fails with EBADF.
    let none = u64::from(u32::MAX);
    let calls = [
        (number("fchmod"), [none, 0o644, 0, 0, 0, 0]),
        (number("fchmod"), [none, 0o4755, 0, 0, 0, 0]),
        (number("ioctl"), [none, 0x5401, 0, 0, 0, 0]),
        (number("ioctl"), [none, 0x5412 | 1 << 40, 0, 0, 0, 0]),
        (number("socket"), [38, 5, 0, 0, 0, 0]),
        (number("unshare"), [1, 0, 0, 0, 0, 0]),
        (600, [0; 6]),
        (0x4000_0000 | 39, [0; 6]),
    ];
    let (ebadf, einval) = (libc::EBADF as u32, libc::EINVAL as u32);
    let parity = under(Profile::Parity, &calls);
    assert_eq!(parity[..4], [ebadf, EPERM, ebadf, EPERM]);
    // Built into this kernel or not: it is the kernel's answer.
    assert_ne!(parity[4], EPERM);
    assert_eq!(parity[5..], [einval, ENOSYS, ENOSYS]);
    let strict = under(Profile::Strict, &calls);
    assert_eq!(strict, [ebadf, EPERM, ebadf, EPERM, EAFNOSUPPORT, einval, ENOSYS, ENOSYS]);
}
