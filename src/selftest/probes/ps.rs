//! PS: /proc, /sys and control groups.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::signal::{Signal, raise};
use nix::sys::statvfs::{FsFlags, statvfs};

use super::tools::{names, open_to_write, open_with};
use crate::castore::Digest;
use crate::selftest::stage::Stage;
use crate::selftest::{Act, Company, Findings, Outcome, Play, Probe, Weight};

pub(super) const PROBES: &[Probe] = &[
    Probe {
        id: "PS-01",
        promise: "the kernel's settings can't be changed through /proc",
        weight: Weight::Required,
        company: Company::Shared,
        attack: write_settings,
        play: Play::Plain,
    },
    Probe {
        id: "PS-02",
        promise: "the parts of /proc and /sys that tell of the host's kernel and hardware show nothing",
        weight: Weight::Desired,
        company: Company::Shared,
        attack: read_kernel,
        play: Play::Plain,
    },
    Probe {
        id: "PS-03",
        promise: "the worker's own program can't be changed through /proc/PID/exe",
        weight: Weight::Required,
        company: Company::Shared,
        attack: overwrite_program,
        play: Play::Script(|stage| Box::pin(through_own_program(stage))),
    },
    Probe {
        id: "PS-05",
        promise: "a build does not see where its control group lies, and can't change its limits or leave it",
        weight: Weight::Required,
        company: Company::Shared,
        attack: control_groups,
        play: Play::Plain,
    },
    Probe {
        id: "PS-06",
        promise: "where a container masks /proc the worker says so, and does not run builds in a shared one",
        weight: Weight::Required,
        company: Company::Shared,
        attack: in_masked_container,
        play: Play::Script(|stage| Box::pin(with_masked_proc(stage))),
    },
    Probe {
        id: "PS-07",
        promise: "no namespace of others can be entered, and the build's own id maps can't be written again",
        weight: Weight::Desired,
        company: Company::Shared,
        attack: foreign_namespaces,
        play: Play::Plain,
    },
    Probe {
        id: "PS-08",
        promise: "crashes leave no core files",
        weight: Weight::Desired,
        company: Company::Shared,
        attack: crash,
        play: Play::Plain,
    },
];

fn write_settings(_: &Act, findings: &mut Findings) {
    let refusals = [Errno::EACCES, Errno::EPERM, Errno::EROFS, Errno::ENOENT];
    for file in [
        "/proc/sys/kernel/core_pattern",
        "/proc/sys/kernel/modprobe",
        "/proc/sys/kernel/hostname",
        "/proc/sys/vm/overcommit_memory",
        "/proc/sys/vm/drop_caches",
        "/proc/sys/net/ipv4/ip_forward",
        "/proc/sys/fs/binfmt_misc/register",
        "/proc/sys/user/max_user_namespaces",
        "/proc/sysrq-trigger",
        "/proc/irq/default_smp_affinity",
        "/proc/1/oom_score_adj",
    ] {
        findings.refused(&format!("open {file} for writing"), open_to_write(file), &refusals);
    }
    // By the mount too, for the day that a map gives the build more.
    for path in ["/proc/sys", "/proc/sysrq-trigger", "/proc/irq", "/proc/bus", "/proc/fs", "/proc/asound"] {
        match statvfs(path) {
            Err(Errno::ENOENT) => {}
            Err(errno) => findings.check(false, format_args!("look at {path}: {errno}")),
            Ok(found) => {
                findings.check(
                    found.flags().contains(FsFlags::ST_RDONLY),
                    format_args!("{path} is not read-only"),
                );
            }
        }
    }
}

fn read_kernel(_: &Act, findings: &mut Findings) {
    for file in [
        "/proc/kcore",
        "/proc/kmsg",
        "/proc/keys",
        "/proc/timer_list",
        "/proc/sched_debug",
        "/proc/latency_stats",
    ] {
        let mut bytes = [0; 64];
        // One that would wait for more has nothing to show either.
        let file_of = |path| File::options().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path);
        match file_of(file).and_then(|mut file| file.read(&mut bytes)) {
            Ok(0) => findings.check(true, ""),
            Ok(_) => findings.check(false, format_args!("{file} can be read")),
            refused => findings.refused(
                &format!("read {file}"),
                refused,
                &[Errno::EACCES, Errno::EPERM, Errno::ENOENT, Errno::EIO, Errno::EAGAIN],
            ),
        }
    }
    for dir in ["/proc/acpi", "/proc/scsi", "/proc/asound", "/sys/firmware", "/sys"] {
        let seen = names(dir).unwrap_or_default();
        findings.check(seen.is_empty(), format_args!("{dir} shows {seen:?}"));
    }
}

/// The command is what pid 2 was before: the worker's own program.
async fn through_own_program(stage: &Stage<'_>) -> Outcome {
    let file = stage.theatre.own_file();
    let look = || {
        let mode = fs::metadata(&file)?.permissions().mode();
        Ok::<_, std::io::Error>((Digest::of(&fs::read(&file)?), mode))
    };
    let before = look();
    let Ok(mut draft) = stage.draft("", &[]) else { return Outcome::broken("no request") };
    if let Some(program) = draft.command.first_mut() {
        *program = b"/proc/self/exe".to_vec();
    }
    let outcome = stage.run(draft).await.verdict();
    let mut findings = Findings::default();
    match (before, look()) {
        (Ok(before), Ok(after)) => findings.check(before == after, "the worker's program was changed"),
        (before, after) => findings.check(false, format_args!("the worker's program: {before:?}, {after:?}")),
    }
    outcome.and(findings.outcome())
}

fn overwrite_program(_: &Act, findings: &mut Findings) {
    let refusals = [Errno::EACCES, Errno::EPERM, Errno::EROFS, Errno::ETXTBSY, Errno::ENOENT];
    for program in ["/proc/1/exe", "/proc/self/exe", "/proc/2/exe"] {
        for (how, flags) in [
            ("write", OFlag::O_WRONLY),
            ("read and write", OFlag::O_RDWR),
            ("truncate", OFlag::O_WRONLY | OFlag::O_TRUNC),
        ] {
            findings.refused(&format!("open {program} to {how}"), open_with(program, flags), &refusals);
        }
        let mode = fs::Permissions::from_mode(0o4777);
        findings.refused(&format!("chmod {program}"), fs::set_permissions(program, mode), &refusals);
        let chown = std::os::unix::fs::chown(program, Some(1000), None);
        findings.refused(&format!("chown {program}"), chown, &refusals);
    }
    // A descriptor for reading, opened anew for writing.
    if let Ok(file) = File::open("/proc/self/exe") {
        use std::os::fd::AsRawFd;
        let again = format!("/proc/self/fd/{}", file.as_raw_fd());
        findings.refused("open it anew for writing", open_to_write(again), &refusals);
    }
    if let Some(found) = findings.works("look at its mount", statvfs("/proc/self/exe")) {
        findings.check(found.flags().contains(FsFlags::ST_RDONLY), "its mount is not read-only");
    }
}

fn control_groups(_: &Act, findings: &mut Findings) {
    let groups = fs::read_to_string("/proc/self/cgroup");
    if let Some(groups) = findings.works("read /proc/self/cgroup", groups) {
        for line in groups.lines() {
            findings.check(line.ends_with(":/"), format_args!("/proc/self/cgroup shows {line}"));
        }
    }
    findings.check(!Path::new("/sys/fs/cgroup").exists(), "/sys/fs/cgroup is there");
    let flags = CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWCGROUP;
    if unshare(flags).is_err() {
        return;
    }
    let none: Option<&str> = None;
    for kind in ["cgroup2", "cgroup"] {
        let options = (kind == "cgroup").then_some("none,name=systemd");
        if mount(Some("none"), "/build", Some(kind), MsFlags::empty(), options.or(none)).is_err() {
            continue;
        }
        let refusals = [Errno::EACCES, Errno::EPERM, Errno::ENOENT, Errno::EROFS];
        for file in [
            "cgroup.procs",
            "cgroup.subtree_control",
            "memory.max",
            "pids.max",
            "release_agent",
            "cgroup.kill",
        ] {
            let path = Path::new("/build").join(file);
            findings.refused(&format!("open {file} for writing"), open_to_write(path), &refusals);
        }
        findings.refused("make a control group", fs::create_dir("/build/mine"), &refusals);
        break;
    }
}

async fn with_masked_proc(stage: &Stage<'_>) -> Outcome {
    // On the host, in a user namespace of its own: what a container's root sees.
    let state = stage.theatre.dir.join("masked-state");
    let mut command = Command::new(stage.theatre.own_file());
    command.args(["probe", stage.probe.id, "--mode", stage.theatre.mode.name()]);
    command.args(["--profile", stage.theatre.profile.name(), "--token", "none", "--"]);
    command.arg(stage.theatre.own_file()).arg(&state);
    let output = tokio::task::spawn_blocking(move || command.output()).await;
    let _ = fs::remove_dir_all(&state);
    match output {
        Ok(Ok(output)) => match Findings::read(&output.stdout) {
            Some(findings) => findings.outcome(),
            None => Outcome::broken(format!(
                "no verdict: {}: {}",
                output.status,
                String::from_utf8_lossy(&output.stderr).trim()
            )),
        },
        Ok(Err(error)) => Outcome::broken(format!("can't run anything: {error}")),
        Err(error) => Outcome::broken(format!("can't run anything: {error}")),
    }
}

fn in_masked_container(act: &Act, findings: &mut Findings) {
    let (Some(program), Some(state)) = (act.arguments.first(), act.arguments.get(1)) else { return };
    // In two steps, as a container does it: what was mounted by the outer one is locked for the inner one.
    if let Err(errno) = unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS) {
        return findings
            .not_applicable(format!("no user namespace can be made here to play the container in: {errno}"));
    }
    let mapped = fs::write("/proc/self/setgroups", "deny")
        .and_then(|()| fs::write("/proc/self/uid_map", "0 0 1"))
        .and_then(|()| fs::write("/proc/self/gid_map", "0 0 1"));
    if findings.works("map ids", mapped).is_none() {
        return;
    }
    let none: Option<&str> = None;
    let masked = mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .and_then(|()| mount(Some("/dev/null"), "/proc/version", none, MsFlags::MS_BIND, none));
    if let Err(errno) = masked {
        return findings.not_applicable(format!("/proc can't be masked here: {errno}"));
    }
    let ran = Command::new(program)
        .args([OsStr::new("run"), OsStr::new("--state-dir"), state])
        .args(["--", "/true"])
        .output();
    if let Some(ran) = findings.works("execute the worker", ran) {
        let said = String::from_utf8_lossy(&ran.stderr);
        findings.same("exit code of a worker with a masked /proc", ran.status.code(), Some(125));
        findings
            .check(said.contains("/proc"), format_args!("it does not say what is wrong: {}", said.trim()));
    }
}

fn foreign_namespaces(_: &Act, findings: &mut Findings) {
    for namespace in ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup", "time"] {
        for process in ["1", "self"] {
            let path = format!("/proc/{process}/ns/{namespace}");
            match File::open(&path) {
                Err(error) => {
                    let refusals = [Errno::EACCES, Errno::EPERM, Errno::ENOENT];
                    findings.refused(&format!("open {path}"), Err::<(), _>(error), &refusals);
                }
                Ok(file) => {
                    let refusals = [Errno::EPERM, Errno::EINVAL];
                    findings.refused(&format!("enter {path}"), setns(file, CloneFlags::empty()), &refusals);
                }
            }
        }
    }
    let refusals = [Errno::EPERM, Errno::EACCES, Errno::EROFS];
    for (file, text) in
        [("uid_map", "0 0 1"), ("gid_map", "0 0 1"), ("setgroups", "allow"), ("setgroups", "deny")]
    {
        let path = format!("/proc/self/{file}");
        let written = fs::write(&path, text);
        // Where it is denied already, denying it changes nothing.
        let denied = text == "deny" && fs::read_to_string(&path).is_ok_and(|seen| seen.trim() == "deny");
        if !denied {
            findings.refused(&format!("write {text} to {path}"), written, &refusals);
        }
    }
}

/// How often.
const CRASHES: usize = 10;

fn crash(act: &Act, findings: &mut Findings) {
    if act.role == "crash" {
        // Twice: the first one ends in a handler of this program's own start, which then steps aside.
        let _ = [raise(Signal::SIGSEGV), raise(Signal::SIGSEGV)];
        return;
    }
    findings.same("soft limit of core files", getrlimit(Resource::RLIMIT_CORE).map(|(soft, _)| soft), Ok(0));
    for _ in 0..CRASHES {
        if let Some(status) = findings.works("crash", act.again("crash").stdout(Stdio::null()).status()) {
            findings.same("signal", status.signal(), Some(Signal::SIGSEGV as i32));
            findings.check(!status.core_dumped(), "a core was dumped");
        }
    }
    let left = names(".").unwrap_or_default();
    findings.check(left.is_empty(), format_args!("the crashes left {left:?}"));
}
