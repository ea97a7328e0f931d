//! What a build may use, and how it is told that it had more.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use libtest_mimic::Trial;
use nix::sys::signal::Signal;

use crate::named;
use crate::support::case::{Running, finish};
use crate::support::leftovers::{LIMIT, gone, marker, names, processes, until};
use crate::support::{Case, Facility, Lacking, Mode, binary, fallible};

pub fn tests() -> impl IntoIterator<Item = (&'static str, fn(&Case))> {
    named![
        processes_are_counted_per_build,
        a_fork_bomb_is_contained,
        a_namespace_is_no_way_to_more_processes,
        descriptors_under_way_are_no_way_to_stop_others,
        shared_memory_is_bounded,
        memory_of_a_process_is_bounded,
        a_file_is_bounded,
        files_together_are_bounded,
        a_full_disk_is_the_workers_fault,
        limits_of_resources,
    ]
}

/// What doesn't depend on who runs it.
pub fn tests_in_own_mode() -> impl IntoIterator<Item = (&'static str, fn(&Case))> {
    named![senseless_limits]
}

/// Starts sleepers until there is no more room, then waits.
const FILL: &str = "perl -e '$SIG{CHLD} = \"IGNORE\"; my $n = 0; $| = 1;
    while (defined(my $pid = fork)) { if (!$pid) { sleep 1000; exit } last if ++$n >= 300 }
    print \"$n $!\\n\"; sleep $ARGV[0]'";

fn processes_are_counted_per_build(case: &Case) {
    let fill = |seconds| format!("{FILL} {seconds}");
    let flags = ["--max-processes", "64", "--cgroup", "off"];
    let mut first = Running::start(case.run_command(&flags, &fill(1000)));
    // Init, the shell unless it has become perl, and perl.
    first.wait_for("Resource temporarily unavailable");
    // Another build, of the same user, has as many; and whoever runs both has more.
    let second = case.run(&flags, &fill(0)).code(0).out();
    let had: u32 = second.split(' ').next().unwrap().parse().unwrap();
    assert!((61..=62).contains(&had), "{second}");
    let unlimited = case.run(&["--cgroup", "off"], &fill(0)).code(0).out();
    assert!(unlimited.starts_with("300 "), "{unlimited}");
    first.signal(Signal::SIGTERM);
    first.finish().code(143);
}

fn a_fork_bomb_is_contained(case: &Case) {
    let marker = marker();
    // The marker is in the arguments of every process of it.
    let script = format!("echo {marker}; exec perl -e 'while (1) {{ fork }}' {marker}");
    let mut bomb = Running::start(case.run_command(&["--max-processes", "128"], &script));
    bomb.wait_for(&marker);
    until("the bomb to go off", || processes(&marker).len() > 120);
    case.run(&[], "echo unharmed").code(0).says("unharmed\n");
    let most = (0..20).map(|_| processes(&marker).len()).max().unwrap();
    // With the program itself, whose arguments have it too.
    assert!(most <= 128 + 1, "{most} processes");
    bomb.signal(Signal::SIGTERM);
    gone("a process", || processes(&marker));
    assert!(bomb.finish().took < LIMIT);
}

fn a_namespace_is_no_way_to_more_processes(case: &Case) {
    let script = format!(
        "unshare --user --map-root-user sh -c 'ulimit -u unlimited 2>/dev/null; exec \"$@\"' sh {FILL} 0"
    );
    let out = case.run(&["--max-processes", "64", "--cgroup", "off"], &script).code(0).out();
    let had: u32 = out.split(' ').next().unwrap().parse().unwrap();
    assert!(had <= 62, "{out}");
}

/// The kernel counts descriptors in unread messages per user, and every start of a sandbox sends some.
fn descriptors_under_way_are_no_way_to_stop_others(case: &Case) {
    let script = "
import socket, sys, time
pairs = []
try:
    while True:
        pairs.append(socket.socketpair())
        pairs[-1][0].setblocking(False)
        try:
            while True:
                socket.send_fds(pairs[-1][0], [b'x'], [0] * 250)
        except BlockingIOError:
            pass
except OSError as error:
    print('full', error, flush=True)
time.sleep(1000)";
    let mut command = case.cofferdam(["run", "--host-tools", "--", "/usr/bin/python3", "-c", script]);
    command.stdin(Stdio::null());
    let mut hog = Running::start(command);
    hog.wait_for("Too many references");
    case.run(&[], "echo unharmed").code(0).says("unharmed\n");
    hog.signal(Signal::SIGTERM);
    hog.finish().code(143);
}

fn shared_memory_is_bounded(case: &Case) {
    let script = "head -c 2000000 /dev/zero > /dev/shm/x; echo $?; stat -c %s /dev/shm/x";
    let ran = case.run(&["--max-shm", "1M"], script).code(0).says("1\n1048576\n");
    ran.complains("no space left");
    let script = "perl -e 'for (1..100000) { open(F, \">/dev/shm/$_\") or die \"$!\" } print \"all\"'";
    case.run(&[], script).code(28).says("").complains("no space left");
}

fn memory_of_a_process_is_bounded(case: &Case) {
    let script =
        |mib: u32| format!("perl -e 'my $x = \"x\" x ($ARGV[0] << 20); print length($x) >> 20' {mib}");
    let flags = ["--max-memory", "128M", "--cgroup", "off"];
    case.run(&flags, &script(32)).code(0).says("32");
    case.run(&flags, &script(256)).code(1).says("").complains("out of memory");
}

fn a_file_is_bounded(case: &Case) {
    let flags = ["--max-scratch", "1M"];
    let limit = "limit of 1048576 bytes (1 MiB) for a file (--max-scratch)";
    // Killed for it; told by its shell; told by itself alone.
    case.run(&flags, "exec head -c 2000000 /dev/zero > /build/x")
        .code(153)
        .complains("SIGXFSZ")
        .complains(limit);
    case.run(&flags, "head -c 2000000 /dev/zero > /build/x; exit $?").code(153).complains(limit);
    let script = "trap '' XFSZ; head -c 2000000 /dev/zero > /build/x || exit 3";
    case.run(&flags, script).code(3).complains("file too large").complains(limit);
    // What has no blocks counts as well.
    case.run(&flags, "truncate -s 1T /build/x").complains(limit);
    let ran = case.run(&flags, "head -c 1000000 /dev/zero > /build/x; exit 3").code(3);
    assert!(!ran.err().contains("limit"), "{ran}");
}

fn files_together_are_bounded(case: &Case) {
    let script = "mkdir -p a/b; for i in 1 2 3 4; do head -c 800000 /dev/zero > a/b/$i; done; chmod 0 a/b a; sleep 100";
    let ran = case.run(&["--max-scratch", "2M"], script).code(1).complains("limit reached");
    ran.complains("more than 2097152 bytes (2 MiB)");
    // In /tmp, too, as parts of one sum.
    let script = "for dir in /tmp /build /outputs; do head -c 800000 /dev/zero > $dir/file; done; sleep 100";
    let ran = case.run(&["--max-scratch", "2M"], script).code(1).complains("limit reached");
    assert!(ran.took < Duration::from_secs(20), "took {:?}", ran.took);
    case.run(&["--max-scratch", "3M"], "head -c 800000 /dev/zero > file; ln file second; sleep 2.5").code(0);
}

fn a_full_disk_is_the_workers_fault(case: &Case) {
    let ran = case.run(&["--min-free", "4P"], "echo begun; sleep 100").code(125).says("begun\n");
    ran.complains("scratch space failed").complains("--min-free");
    case.run(&["--min-free", "1"], "sleep 1.5").code(0);
}

fn limits_of_resources(case: &Case) {
    let script =
        "grep -E '^Max (core|stack|data)' /proc/self/limits | tr -s ' '; cat /proc/self/oom_score_adj";
    let mut started_with = case.program("sh");
    started_with.args(["-c", "ulimit -S -s 4096; exec \"$@\"", "sh"]).arg(binary());
    started_with.args(["run", "--host-tools", "--", "/bin/sh", "-c", script]);
    let out = finish(started_with).code(0).out();
    assert!(out.contains("Max core file size 0 "), "{out}");
    assert!(out.contains("Max stack size 4194304 "), "{out}");
    assert!(out.contains("Max data size unlimited"), "{out}");
    let score: i32 = out.lines().last().unwrap().parse().unwrap();
    assert!(score >= 500, "{out}");
}

fn senseless_limits(case: &Case) {
    for (flags, named) in [
        (["--max-memory", "5MB"], "whole number of bytes"),
        (["--max-memory", "100"], "less than 4096 bytes"),
        (["--max-processes", "1"], "--max-processes"),
        (["--max-shm", "0%"], "1% to 100%"),
        (["--cgroup", "relative"], "absolute path"),
        (["--cgroup", "/no/such/cgroup"], "/no/such/cgroup"),
        (["--cgroup", "/usr"], "no directory of a cgroup2 file system"),
    ] {
        case.run(&flags, "echo ran").code(125).says("").complains(named);
    }
}

type InCgroup = fn(&Case, &Base);

/// What needs a cgroup2 file system that root may add to; controllers it need not have.
pub fn cgroup_tests() -> Vec<Trial> {
    let tests: [(&str, InCgroup); 4] = [
        ("a_build_has_a_cgroup_of_its_own", a_build_has_a_cgroup_of_its_own),
        ("a_build_can_not_change_its_cgroup", a_build_can_not_change_its_cgroup),
        ("a_killed_program_leaves_no_cgroup", a_killed_program_leaves_no_cgroup),
        ("what_a_crash_left_is_swept_and_no_more", what_a_crash_left_is_swept_and_no_more),
    ];
    let trial = |mode: Mode, (name, test): (&str, InCgroup)| {
        fallible(format!("{name}::{mode}"), mode, move |case| {
            test(case, &Base::make(mode)?);
            Ok(())
        })
    };
    // What belongs to an unprivileged user needs no mark.
    let delegated = trial(Mode::Root, ("a_delegated_cgroup_is_taken", a_delegated_cgroup_is_taken));
    let all = tests.into_iter().flat_map(|test| Mode::ALL.map(|mode| trial(mode, test)));
    all.chain([delegated]).collect()
}

/// One that a service manager has marked is used, one that it has not is left alone.
fn a_delegated_cgroup_is_taken(case: &Case, base: &Base) {
    let come_of_it = || {
        let mut command = base.run_with("auto", case, "true");
        command.env("COFFERDAM_LOG", "info");
        finish(command).code(0).err()
    };
    let refused = come_of_it();
    assert!(refused.contains("is not this program's to divide"), "{refused}");
    let mark = "import os, sys; os.setxattr(sys.argv[1], 'trusted.delegate', b'1')";
    assert!(Command::new("python3").args(["-c", mark]).arg(&base.0).status().unwrap().success());
    let taken = come_of_it();
    assert!(!taken.contains("is not this program's to divide"), "{taken}");
    // In a hybrid tree there is nothing to be had of it.
    assert!(taken.contains("limits=v2: ") || taken.contains("has no controllers"), "{taken}");
}

/// A cgroup given to a mode's user. It is removed with all in it when this is dropped.
struct Base(PathBuf);

impl Base {
    fn make(mode: Mode) -> Result<Base, Lacking> {
        let lacks = |reason: String| Lacking::new(Facility::Cgroup2, reason);
        if !nix::unistd::geteuid().is_root() {
            return Err(lacks("not run as root".into()));
        }
        let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let mount = table.lines().find(|line| line.contains(" - cgroup2 "));
        let mount =
            mount.and_then(|line| line.split(' ').nth(4)).ok_or_else(|| lacks("none is mounted".into()))?;
        let path = Path::new(mount).join(format!("cofferdam-test-{}", marker()));
        std::fs::create_dir(&path).map_err(|error| lacks(format!("{}: {error}", path.display())))?;
        let base = Base(path);
        for file in ["", "cgroup.procs", "cgroup.subtree_control", "cgroup.threads"] {
            std::os::unix::fs::chown(base.0.join(file), mode.ids(), mode.ids()).unwrap();
        }
        Ok(base)
    }

    /// `run` in this cgroup, told to use it.
    fn run(&self, case: &Case, script: &str) -> Command {
        self.run_with(&self.0, case, script)
    }

    /// `run` in this cgroup, told `choice`.
    fn run_with(&self, choice: impl AsRef<OsStr>, case: &Case, script: &str) -> Command {
        // Only root may go into it; then it is given to the mode's user.
        let mut command = case.program("sh");
        command.uid_of_root();
        let become_user = match case.mode.ids() {
            Some(id) => format!("setpriv --reuid {id} --regid {id} --clear-groups"),
            None => String::new(),
        };
        command.args([
            "-c",
            &format!("echo $$ > {}/cgroup.procs && exec {become_user} \"$@\"", self.0.display()),
        ]);
        command.arg("sh").arg(binary()).args(["run", "--host-tools", "--cgroup"]).arg(choice);
        command.args(["--", "/bin/sh", "-c", script]);
        command
    }

    /// The cgroups of builds.
    fn builds(&self) -> Vec<PathBuf> {
        let groups = names(&self.0).into_iter().filter(|name| name.starts_with("cofferdam-builds-"));
        let builds = |group: PathBuf| names(&group).into_iter().map(move |name| group.join(name));
        groups.flat_map(|name| builds(self.0.join(name))).filter(|path| path.is_dir()).collect()
    }

    /// What is in there but for the files of any cgroup.
    fn left(&self) -> BTreeSet<String> {
        let is_left = |name: &String| self.0.join(name).is_dir();
        names(&self.0).into_iter().filter(is_left).collect()
    }
}

impl Drop for Base {
    fn drop(&mut self) {
        let _ = std::fs::write(self.0.join("cgroup.kill"), "1");
        for _ in 0..100 {
            remove_below(&self.0);
            if std::fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn remove_below(dir: &Path) {
    for name in names(dir) {
        let path = dir.join(name);
        if path.is_dir() {
            remove_below(&path);
            let _ = std::fs::remove_dir(path);
        }
    }
}

/// Undoes what `Case::program` has set: the shell is to start as whoever runs the tests.
trait AsTester {
    fn uid_of_root(&mut self);
}

impl AsTester for Command {
    fn uid_of_root(&mut self) {
        use std::os::unix::process::CommandExt;
        self.uid(0).gid(0);
    }
}

fn lines(path: &Path) -> Vec<String> {
    std::fs::read_to_string(path).unwrap_or_default().lines().map(str::to_owned).collect()
}

fn a_build_has_a_cgroup_of_its_own(case: &Case, base: &Base) {
    let script = "grep ^0:: /proc/self/cgroup; grep ^0:: /proc/1/cgroup; echo ready; sleep 1000";
    let mut running = Running::start(base.run(case, script));
    running.wait_for("ready");
    let builds = base.builds();
    let [build] = builds.as_slice() else { panic!("{builds:?}") };
    assert_eq!(lines(&build.join("cgroup.procs")), Vec::<String>::new());
    until("init, the shell and sleep", || lines(&build.join("inner/cgroup.procs")).len() == 3);
    // The program and its spawner.
    assert_eq!(lines(&base.0.join("cgroup.procs")), Vec::<String>::new());
    assert_eq!(lines(&base.0.join("cofferdam-supervisor/cgroup.procs")).len(), 2);
    running.signal(Signal::SIGTERM);
    let ran = running.finish().code(143);
    let seen = match case.mode {
        // Pid 1 has the build's own id and is hidden from it.
        Mode::Single => 1,
        Mode::Root | Mode::Range => 2,
    };
    assert_eq!(ran.out(), format!("{}ready\n", "0::/\n".repeat(seen)));
    gone("a cgroup", || base.left());
}

/// Mounts cgroup2 as whoever a build can become, and tries what would get it more.
fn a_build_can_not_change_its_cgroup(case: &Case, base: &Base) {
    let script = "unshare --user --map-root-user --mount --cgroup sh -c '
        mount -t cgroup2 none /tmp || exit 0
        cd /tmp; cat cgroup.controllers; ls -d memory.max pids.max cgroup.max.descendants.. 2>/dev/null
        mkdir more 2>/dev/null && echo made
        echo $$ 2>/dev/null > ../cgroup.procs && echo out
        umount -l /tmp; cat /proc/self/cgroup | grep ^0::; echo tried'";
    let ran = finish(base.run(case, script)).code(0);
    // A sandbox without nested namespaces can't even try.
    assert!(["\n0::/\ntried\n", "0::/\ntried\n", ""].contains(&ran.out().as_str()), "{ran}");
    gone("a cgroup", || base.left());
}

fn a_killed_program_leaves_no_cgroup(case: &Case, base: &Base) {
    let marker = marker();
    let mut running = Running::start(base.run(case, &format!("echo ready; setsid sleep {marker}")));
    running.wait_for("ready");
    assert_eq!(base.builds().len(), 1);
    running.signal(Signal::SIGKILL);
    gone("a process", || processes(&marker));
    gone("a cgroup", || base.left());
    running.finish();
}

fn what_a_crash_left_is_swept_and_no_more(case: &Case, base: &Base) {
    let marker = marker();
    let mut sleeper = Command::new("sleep").arg(&marker).stdout(Stdio::null()).spawn().unwrap();
    let [dead, alive, other] =
        ["cofferdam-builds-1-0", "cofferdam-builds-2-0", "another"].map(|name| base.0.join(name));
    for path in [&dead.join("id/inner"), &alive.join("id/inner"), &other] {
        std::fs::create_dir_all(path).unwrap();
        for path in path.ancestors().take_while(|path| **path != base.0) {
            std::os::unix::fs::chown(path, case.mode.ids(), case.mode.ids()).unwrap();
            for file in ["cgroup.procs", "cgroup.kill"] {
                std::os::unix::fs::chown(path.join(file), case.mode.ids(), case.mode.ids()).unwrap();
            }
        }
    }
    std::fs::write(dead.join("id/inner/cgroup.procs"), sleeper.id().to_string()).unwrap();
    let lock = std::fs::File::open(&alive).unwrap();
    lock.try_lock().unwrap();
    finish(base.run(case, "echo ran")).code(0).says("ran\n");
    assert_eq!(base.left().into_iter().collect::<Vec<_>>(), ["another", "cofferdam-builds-2-0"]);
    assert!(alive.join("id/inner").is_dir());
    assert!(!sleeper.wait().unwrap().success(), "it was killed");
}
