//! `cofferdam doctor`, from outside: in environments that lack something for real it says what, and why.

use std::ffi::{CString, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

use serde_json::Value;

mod support;

use support::case::{Ran, finish, set_mode};
use support::leftovers::names;
use support::{Case, Mode, binary};

/// A test and its name.
type Named = (&'static str, fn(&Case));
/// A call, the answer to it, the exit code, and the steps by which it shows with their errno.
type Refused = (libc::c_long, u32, i32, &'static [(&'static str, Option<&'static str>)]);

fn main() -> ExitCode {
    // This program is also what confines cofferdam by a system call filter: see `confined`.
    if let Some(confinement) = std::env::var_os(CONFINEMENT) {
        return confine(&confinement.to_string_lossy());
    }
    let mut trials = support::in_every_mode(named![
        a_machine_that_can,
        the_table_is_for_people,
        no_user_namespaces,
        a_state_directory_that_will_not_do,
        beside_a_daemon,
        what_a_filter_takes,
        interrupted,
    ]);
    trials.extend(support::in_own_mode(named![bad_arguments]));
    let as_root: [Named; 7] = named![
        a_covered_proc,
        a_read_only_proc,
        no_fuse,
        fuse_closed_to_users,
        a_state_directory_that_executes_nothing,
        a_state_directory_behind_a_closed_one,
        a_chroot,
    ];
    trials.extend(as_root.map(|(name, test)| support::in_mode(name, Mode::Root, test)));
    let with_range: [Named; 3] = named![no_newuidmap, newuidmap_without_effect, newuidmap_that_hangs];
    trials.extend(with_range.map(|(name, test)| support::in_mode(name, Mode::Range, test)));
    trials.push(support::in_mode("no_sub_ids", Mode::Single, no_sub_ids));
    for mode in [Mode::Range, Mode::Single] {
        trials.push(support::in_mode("no_place_for_state", mode, no_place_for_state));
    }
    support::run(trials)
}

/// What doctor said as JSON.
struct Told(Value);

impl Told {
    #[track_caller]
    fn by(ran: &Ran) -> Told {
        assert!(!ran.err().contains("panicked"), "{ran}");
        Told(serde_json::from_slice(&ran.stdout).unwrap_or_else(|error| panic!("{error}; {ran}")))
    }

    #[track_caller]
    fn step(&self, id: &str) -> &Value {
        let steps = self.0["steps"].as_array().expect("steps are a list");
        steps.iter().find(|step| step["step"] == id).unwrap_or_else(|| panic!("no {id} in {}", self.0))
    }

    /// Asserts results, by step.
    #[track_caller]
    fn results(self, expected: &[(&str, &str)]) -> Told {
        for (id, result) in expected {
            assert_eq!(self.step(id)["result"], *result, "{id}: {}", self.step(id));
        }
        self
    }

    /// Asserts that a step is missing, with this errno, and what its cause and fix say.
    #[track_caller]
    fn missing(self, id: &str, errno: Option<&str>, cause: &str, fix: &str) -> Told {
        let step = self.step(id);
        assert_eq!(step["result"], "missing", "{step}");
        assert_eq!(step["errno"]["name"].as_str(), errno, "{step}");
        for (field, text) in [("cause", cause), ("fix", fix)] {
            assert!(
                step[field].as_str().is_some_and(|told| told.contains(text)),
                "no {text:?} in {field}: {step}"
            );
        }
        assert!(step["costs"].is_string(), "{step}");
        self
    }
}

fn doctor(case: &Case) -> Command {
    case.cofferdam(["doctor", "--json", "--state-dir", "state"])
}

/// Runs `script` in namespaces of its own, of which the last command is `exec "$@"`: doctor.
fn after(case: &Case, namespaces: &[&str], script: &str) -> Ran {
    let mut command = case.program("unshare");
    command.args(namespaces).args(["sh", "-ec", &format!("{script}\nexec \"$@\""), "sh"]);
    command.arg(binary()).args(["doctor", "--json", "--state-dir", "state"]);
    finish(command)
}

const OWN_MOUNTS: [&str; 3] = ["--mount", "--propagation", "private"];

/// Who the mode's user is, and what it can't have here whatever the machine can do.
fn mode_of(case: &Case) -> &'static [&'static str] {
    match case.mode {
        Mode::Root => &["root", "container-root"],
        Mode::Range => &["range"],
        Mode::Single => &["single"],
    }
}

fn a_machine_that_can(case: &Case) {
    let before = (names(&case.path("")), names(&case.tmp()));
    let told = Told::by(&finish(doctor(case)).code(0));
    assert_eq!(told.0["format"], 1);
    assert_ne!(told.0["verdict"], "unable");
    assert!(mode_of(case).contains(&told.0["mode"].as_str().unwrap()), "{}", told.0["mode"]);
    let steps = told.0["steps"].as_array().unwrap();
    let documented = std::fs::read_to_string(support::repository().join("docs/doctor.md")).unwrap();
    for step in steps {
        let fields =
            ["step", "area", "title", "need", "result", "detail", "errno", "cause", "fix", "needs", "costs"];
        for field in fields {
            assert!(step.get(field).is_some(), "no {field} in {step}");
        }
        let id = step["step"].as_str().unwrap();
        assert!(documented.contains(&format!("| `{id}` |")), "{id} is not in docs/doctor.md");
        // Whoever runs these tests runs builds in them: nothing that builds need is missing.
        if step["need"] == "builds" {
            assert_eq!(step["result"], "works", "{step}");
        }
    }
    assert_eq!(steps.len(), documented.lines().filter(|line| line.starts_with("| `")).count());
    // The state directory was not there, and is not.
    assert_eq!((names(&case.path("")), names(&case.tmp())), before);
}

fn the_table_is_for_people(case: &Case) {
    let ran = finish(case.cofferdam(["doctor", "--state-dir", "state"])).code(0);
    let text = ran.out();
    assert!(text.contains("Builds can run here") && text.contains("whole sandbox"), "{ran}");
    assert!(!text.contains('\x1b'), "no colours where no terminal is: {ran}");
    assert_eq!(ran.err(), "");
    let mut coloured = case.cofferdam(["doctor", "--state-dir", "state"]);
    coloured.env("CLICOLOR_FORCE", "1");
    assert!(finish(coloured).out().contains('\x1b'));
}

fn no_user_namespaces(case: &Case) {
    let namespaces: &[&str] = &["--user", "--map-root-user", "--mount"];
    let told = after(case, namespaces, "echo 0 > /proc/sys/user/max_user_namespaces").code(1);
    let told = Told::by(&told);
    assert_eq!(told.0["verdict"], "unable");
    told.missing(
        "user-namespace",
        Some("ENOSPC"),
        "user.max_user_namespaces is 0",
        "sysctl -w user.max_user_namespaces=15000 (it is 0)",
    )
    .missing("clone3", Some("ENOSPC"), "make the namespaces of a sandbox", "user.max_user_namespaces")
    .results(&[
        ("mount-namespace", "untried"),
        ("proc", "untried"),
        ("whole-sandbox", "untried"),
        ("whole-build", "missing"),
    ]);
    // Of another kind: user namespaces are there, and the limit of the other is named.
    let told = after(case, namespaces, "echo 0 > /proc/sys/user/max_net_namespaces").code(1);
    Told::by(&told).results(&[("user-namespace", "works"), ("ipc-namespace", "works")]).missing(
        "network-namespace",
        Some("ENOSPC"),
        "user.max_net_namespaces is 0",
        "sysctl -w user.max_net_namespaces",
    );
}

fn a_state_directory_that_will_not_do(case: &Case) {
    let state = case.make_dir("state");
    set_mode(&state, 0o777);
    Told::by(&finish(doctor(case)).code(1))
        .missing("state-directory", None, "mode 0777", "chmod go-w")
        .results(&[
            ("whole-build", "untried"),
            ("state-overlay", "untried"),
            ("proc", "works"),
            ("pivot-root", "works"),
        ]);
    set_mode(&state, 0o700);
    case.write("state/of-something-else", "");
    Told::by(&finish(doctor(case)).code(1)).missing("state-directory", None, "not empty", "--state-dir");
    assert!(names(&state).iter().eq(["of-something-else"]));
    if case.mode != Mode::Root {
        set_mode(&case.make_dir("closed"), 0o555);
        let closed = case.cofferdam(["doctor", "--json", "--state-dir", "closed/state"]);
        Told::by(&finish(closed).code(1)).missing("state-directory", Some("EACCES"), "closed", "--state-dir");
    }
}

/// Root has one wherever its home is.
fn no_place_for_state(case: &Case) {
    let mut homeless = case.cofferdam(["doctor", "--json"]);
    homeless.env_remove("HOME");
    Told::by(&finish(homeless).code(1)).missing("state-directory", None, "$HOME", "--state-dir");
}

/// A state directory in use is no reason not to look at it, and its user is not disturbed.
fn beside_a_daemon(case: &Case) {
    let daemon = support::daemon::Daemon::start(case, &[]);
    let state = case.path("state");
    assert!(state.exists(), "the daemon's state directory is this one");
    let before = names(&state);
    Told::by(&finish(doctor(case)).code(0))
        .results(&[("state-directory", "works"), ("whole-build", "works")]);
    assert_eq!(names(&state), before);
    drop(daemon);
}

/// However it ends, nothing is left.
fn interrupted(case: &Case) {
    use nix::sys::signal::Signal;
    for (signal, after) in [(Signal::SIGKILL, 50), (Signal::SIGINT, 200), (Signal::SIGKILL, 350)] {
        let running = support::case::Running::start(doctor(case));
        std::thread::sleep(Duration::from_millis(after));
        running.signal(signal);
        // It may have been done already.
        running.finish();
        let start = std::time::Instant::now();
        while !names(&case.path("")).is_empty() {
            assert!(start.elapsed() < Duration::from_secs(10), "{signal}: {:?}", names(&case.path("")));
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn bad_arguments(case: &Case) {
    finish(case.cofferdam(["doctor", "--no-such-flag"])).code(125).says("").complains("--no-such-flag");
    finish(case.cofferdam(["doctor", "too", "much"])).code(125).says("").complains("too");
}

fn a_covered_proc(case: &Case) {
    let told =
        after(case, &OWN_MOUNTS, "mount -t tmpfs none /proc/irq; mount -t tmpfs none /proc/fs").code(1);
    Told::by(&told)
        .missing("proc", Some("EPERM"), "/proc/irq, /proc/fs", "systempaths=unconfined")
        .missing("whole-sandbox", Some("EPERM"), "mount proc", "steps above")
        .results(&[
            ("user-namespace", "works"),
            ("clone3", "works"),
            ("devpts", "works"),
            ("pivot-root", "works"),
        ]);
}

fn a_read_only_proc(case: &Case) {
    let told =
        after(case, &OWN_MOUNTS, "mount --bind /proc/sys /proc/sys; mount -o remount,ro,bind /proc/sys")
            .code(1);
    Told::by(&told).missing("proc", Some("EPERM"), "are covered: /proc/sys", "unmask=ALL");
}

fn no_fuse(case: &Case) {
    let told = Told::by(&after(case, &OWN_MOUNTS, "mount --bind /dev/null /dev/fuse").code(0));
    let told = told.missing("fuse-device", None, "number 1:3", "mknod -m 0666 /dev/fuse c 10 229");
    without_fuse(told);
    let script = "mkdir old; mount --rbind /dev old; mount -t tmpfs none /dev; \
                  for d in full null random tty urandom zero; do touch /dev/$d; mount --bind old/$d /dev/$d; done; \
                  umount -l old; rmdir old";
    let told = Told::by(&after(case, &OWN_MOUNTS, script).code(0));
    without_fuse(told.missing("fuse-device", Some("ENOENT"), "open /dev/fuse", "modprobe fuse"));
}

/// Builds can run on copies of their inputs.
fn without_fuse(told: Told) {
    assert_eq!(told.0["verdict"], "weaker");
    told.results(&[("fuse-mount", "missing"), ("whole-sandbox", "works"), ("whole-build", "works")]);
}

fn fuse_closed_to_users(case: &Case) {
    let device = "mount -t tmpfs none /mnt; mknod -m 0600 /mnt/fuse c 10 229; mount --bind /mnt/fuse /dev/fuse; \
                  umount -l /mnt; chown 7002:7002 .; set -- setpriv --reuid 7002 --regid 7002 --clear-groups \"$@\"";
    let told = Told::by(&after(case, &OWN_MOUNTS, device).code(0));
    assert_eq!(told.0["user"]["uid"], 7002);
    without_fuse(told.missing("fuse-device", Some("EACCES"), "its mode", "chmod 0666 /dev/fuse"));
}

fn a_state_directory_that_executes_nothing(case: &Case) {
    let told = after(case, &OWN_MOUNTS, "mkdir state; mount -t tmpfs -o noexec,mode=0700 none state");
    Told::by(&told.code(1)).missing("state-execute", Some("EPERM"), "noexec", "--state-dir").missing(
        "whole-sandbox",
        Some("EACCES"),
        "execute a program",
        "steps above",
    );
    let told =
        after(case, &OWN_MOUNTS, "mkdir -p state; mount -t tmpfs -o size=200m,mode=0700 none state").code(0);
    let told = Told::by(&told);
    assert_eq!(told.step("state-space")["result"], "degraded", "{}", told.step("state-space"));
    assert!(told.step("state-space")["detail"].as_str().unwrap().contains("tmpfs"));
}

/// What only another user may pass is no hindrance to root.
fn a_state_directory_behind_a_closed_one(case: &Case) {
    let closed = case.make_dir("closed");
    std::os::unix::fs::chown(&closed, Some(7002), Some(7002)).unwrap();
    set_mode(&closed, 0o700);
    let command = case.cofferdam(["doctor", "--json", "--state-dir", "closed/state"]);
    Told::by(&finish(command).code(0)).results(&[("state-directory", "works"), ("whole-sandbox", "works")]);
    assert!(names(&closed).is_empty(), "{:?}", names(&closed));
}

fn a_chroot(case: &Case) {
    // A directory of a mount, not its root: what people mean by a chroot.
    let script = "mkdir root; for d in usr bin lib lib64 dev proc etc tmp; do \
                      [ -e /$d ] || continue; mkdir root/$d; mount --rbind /$d root/$d; done; \
                  cp \"$1\" root/cofferdam; shift; set -- chroot root /cofferdam \"$@\"";
    let told = after(case, &OWN_MOUNTS, script).code(1);
    Told::by(&told).missing("user-namespace", Some("EPERM"), "runs in a chroot", "outside");
}

fn no_newuidmap(case: &Case) {
    let mut command = doctor(case);
    command.env("PATH", "/nonexistent");
    let told = Told::by(&finish(command).code(0));
    assert_eq!((&told.0["mode"], &told.0["verdict"]), (&"single".into(), &"weaker".into()));
    told.results(&[("sub-ids", "works"), ("whole-build", "works")])
        .missing("id-helpers", None, "newuidmap: it is not installed", "apt install uidmap")
        .missing("build-ids", None, "newuidmap", "id-helpers")
        .missing("pasta", None, "not installed", "passt");
}

fn newuidmap_without_effect(case: &Case) {
    let mut command = case.program("setpriv");
    command.arg("--no-new-privs").arg(binary()).args(["doctor", "--json", "--state-dir", "state"]);
    let told = Told::by(&finish(command).code(0));
    assert_eq!(told.0["mode"], "single");
    told.results(&[("sub-ids", "works"), ("id-helpers", "works"), ("whole-build", "works")]).missing(
        "build-ids",
        None,
        "no_new_privs is set",
        "NoNewPrivileges=no",
    );
}

/// A step that never ends costs its time limit and nothing else.
fn newuidmap_that_hangs(case: &Case) {
    let program = case.write("bin/newuidmap", "#!/bin/sh\necho $$ >> pids\nexec sleep 1000\n");
    set_mode(&program, 0o755);
    let mut command = doctor(case);
    command.env("PATH", format!("{}:/usr/bin:/bin", case.path("bin").display()));
    let ran = finish(command).code(1);
    assert!(ran.took < Duration::from_secs(60), "{:?}", ran.took);
    Told::by(&ran).missing("enter", None, "it hangs", "").results(&[
        ("user-namespace", "works"),
        ("proc", "untried"),
        ("state-execute", "works"),
        ("whole-build", "untried"),
    ]);
    let pids = String::from_utf8(case.read("pids")).unwrap();
    // What is dead may wait to be reaped, which is not doctor's to do.
    let lives = |pid: &&str| {
        let stat = std::fs::read_to_string(Path::new("/proc").join(pid).join("stat")).unwrap_or_default();
        stat.contains("(sleep)") && !stat.contains(") Z ")
    };
    support::leftovers::gone("hanging programs", || pids.lines().filter(lives).collect::<Vec<_>>());
}

fn no_sub_ids(case: &Case) {
    let told = Told::by(&finish(doctor(case)).code(0));
    let fix = told.step("sub-ids")["fix"].as_str().unwrap().to_owned();
    let told = told.missing("sub-ids", None, "/etc/subuid gives", "/etc/subuid and to /etc/subgid").missing(
        "build-ids",
        None,
        "no subordinate ids",
        "sub-ids",
    );
    let name =
        told.0["user"]["name"].as_str().map_or_else(|| told.0["user"]["uid"].to_string(), str::to_owned);
    assert!(fix.contains(&format!(": {name}:")) && fix.ends_with(":65536"), "{fix}");
}

fn what_a_filter_takes(case: &Case) {
    const EPERM: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
    const ENOSYS: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;
    const KILL: u32 = libc::SECCOMP_RET_KILL_PROCESS;
    let table: &[Refused] = &[
        (libc::SYS_personality, EPERM, 0, &[("personality", Some("EPERM"))]),
        (libc::SYS_landlock_create_ruleset, ENOSYS, 0, &[("landlock", Some("ENOSYS"))]),
        (libc::SYS_seccomp, EPERM, 1, &[("seccomp", Some("EPERM")), ("whole-sandbox", Some("EPERM"))]),
        (libc::SYS_clone3, ENOSYS, 1, &[("clone3", Some("ENOSYS")), ("pidfd", Some("ENOSYS"))]),
        (libc::SYS_mount_setattr, ENOSYS, 1, &[("bind-mounts", Some("ENOSYS")), ("spawner", Some("ENOSYS"))]),
        (libc::SYS_pivot_root, EPERM, 1, &[("pivot-root", Some("EPERM")), ("whole-sandbox", Some("EPERM"))]),
        (libc::SYS_setdomainname, KILL, 1, &[("host-name", None)]),
        (libc::SYS_memfd_create, ENOSYS, 1, &[("memfd", Some("ENOSYS"))]),
        (libc::SYS_unshare, EPERM, 1, &[("user-namespace", Some("EPERM"))]),
    ];
    for (call, action, code, steps) in table {
        let ran = finish(confined(case, *call, *action));
        let mut told = Told::by(&ran);
        for (step, errno) in *steps {
            let cause = match (*step, *action) {
                // What refuses it is told by the step of its own.
                ("whole-sandbox", _) => "can't",
                (_, KILL) => "SIGSYS",
                ("landlock", _) => "landlock",
                _ => "Seccomp: 2",
            };
            told = told.missing(step, *errno, cause, "");
        }
        ran.code(*code);
    }
}

/// The variable that makes this program a launcher: a system call's number and the answer to it.
const CONFINEMENT: &str = "COFFERDAM_TEST_CONFINEMENT";

/// Doctor under a system call filter that refuses one call.
fn confined(case: &Case, call: libc::c_long, action: u32) -> Command {
    let launcher = case.path("launcher");
    if !launcher.exists() {
        std::fs::copy(std::env::current_exe().unwrap(), &launcher).unwrap();
        set_mode(&launcher, 0o755);
    }
    let mut command = case.program(launcher);
    command.env(CONFINEMENT, format!("{call} {action}"));
    command.arg(binary()).args(["doctor", "--json", "--state-dir", "state"]);
    command
}

/// Installs the filter and becomes the command in the arguments.
fn confine(confinement: &str) -> ExitCode {
    let (call, action) = confinement.split_once(' ').expect("a call and an action");
    let statement = |code: u32, k: u32, jf| libc::sock_filter { code: code as u16, jt: 0, jf, k };
    let mut program = [
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, call.parse().unwrap(), 1),
        statement(libc::BPF_RET | libc::BPF_K, action.parse().unwrap(), 0),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    nix::sys::prctl::set_no_new_privs().unwrap();
    // SAFETY: the filter and its program live across the call.
    let installed =
        unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter, 0, 0) };
    assert_eq!(installed, 0, "{}", std::io::Error::last_os_error());
    let string = |text: &OsStr| CString::new(text.as_bytes()).unwrap();
    let arguments: Vec<CString> = std::env::args_os().skip(1).map(|argument| string(&argument)).collect();
    let error = nix::unistd::execv(&arguments[0], &arguments);
    panic!("{error:?}");
}
