//! PR: processes.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use cofferdam_sandbox::attack::{Arg, Call};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::signal::{Signal, kill, raise};
use nix::sys::stat::makedev;
use nix::sys::uio::{RemoteIoVec, process_vm_writev};
use nix::sys::wait::waitpid;
use nix::sys::{prctl, ptrace};
use nix::unistd::{Pid, getpid, getsid, isatty, setsid};

use super::tools::{eventually, field, hidden_init, hold, holding, names};
use crate::build::events::Output;
use crate::build::request::Draft;
use crate::castore::{Digest, Node};
use crate::selftest::faults::Fault;
use crate::selftest::stage::{End, Ended, Stage, name, path};
use crate::selftest::{Act, Company, Findings, Outcome, Play, Probe, Profile, Weight};

pub(super) const PROBES: &[Probe] = &[
    Probe {
        id: "PR-01",
        promise: "a build is over when its command ends; what it left running is dead before its outputs are read",
        weight: Weight::Required,
        company: Company::Shared,
        attack: leave_running,
        play: Play::Script(|stage| Box::pin(end_at_once(stage))),
    },
    Probe {
        id: "PR-02",
        promise: "a build that closes its standard output and error goes on",
        weight: Weight::Required,
        company: Company::Shared,
        attack: close_streams,
        play: Play::Script(|stage| Box::pin(without_streams(stage))),
    },
    Probe {
        id: "PR-03",
        promise: "no process survives the end or the cancelling of its build, whatever it ignores",
        weight: Weight::Required,
        company: Company::Shared,
        attack: hide,
        play: Play::Script(|stage| Box::pin(end_the_hidden(stage))),
    },
    Probe {
        id: "PR-04",
        promise: "processes are limited: a fork bomb stops itself, and other builds go on",
        weight: Weight::Required,
        company: Company::Alone,
        attack: fork_bomb,
        play: Play::Script(|stage| Box::pin(beside_fork_bomb(stage))),
    },
    Probe {
        id: "PR-06",
        promise: "the sandbox's first process can't be traced, read or robbed; no other process is visible",
        weight: Weight::Required,
        company: Company::Shared,
        attack: attack_init,
        play: Play::Request(|_, draft| {
            draft.command.push(std::process::id().to_string().into_bytes());
            Ok(())
        }),
    },
    Probe {
        id: "PR-07",
        promise: "a build can trace its children and filter its own system calls, as debuggers and tests do",
        weight: Weight::Desired,
        company: Company::Shared,
        attack: own_children,
        play: Play::Plain,
    },
    Probe {
        id: "PR-08",
        promise: "a quiet build outlives the threads of the worker that started it",
        weight: Weight::Required,
        company: Company::Shared,
        attack: |_, findings| {
            std::thread::sleep(QUIET);
            findings.check(true, "");
        },
        play: Play::Script(|stage| Box::pin(among_threads(stage))),
    },
    Probe {
        id: "PR-10",
        promise: "a build that waits for a store that does not answer can be cancelled all the same",
        weight: Weight::Required,
        company: Company::Alone,
        attack: wait_for_store,
        play: Play::Script(|stage| Box::pin(stalled_store(stage))),
    },
    Probe {
        id: "PR-11",
        promise: "a command that can't be executed fails the build with the reason",
        weight: Weight::Desired,
        company: Company::Shared,
        attack: |_, findings| findings.check(true, ""),
        play: Play::Script(|stage| Box::pin(not_executable(stage))),
    },
    Probe {
        id: "PR-12",
        promise: "exit codes and signals are told as they are",
        weight: Weight::Desired,
        company: Company::Shared,
        attack: end_somehow,
        play: Play::Script(|stage| Box::pin(faithful_ends(stage))),
    },
    Probe {
        id: "PR-13",
        promise: "signals, umask, limits, priority and terminal do not depend on who started the worker",
        weight: Weight::Desired,
        company: Company::Shared,
        attack: initial_state,
        play: Play::Plain,
    },
    Probe {
        id: "PR-14",
        promise: "a build has no terminal and can type into none",
        weight: Weight::Required,
        company: Company::Shared,
        attack: no_terminal,
        play: Play::Plain,
    },
];

/// A build whose survivor would last for ever must end long before this.
const AT_ONCE: Duration = Duration::from_secs(5);

const OUTPUT: &str = "nix/store/out";

/// What a survivor goes on writing to, and how much lies between the first and the last of it.
const BALLAST_BYTES: usize = 8 << 20;

fn leave_running(act: &Act, findings: &mut Findings) {
    let out = Path::new("/").join(OUTPUT);
    if act.role == "survivor" {
        let _ = setsid();
        let log = |name: &str| fs::OpenOptions::new().append(true).create(true).open(out.join(name));
        let (Ok(mut first), Ok(mut last)) = (log("a"), log("z")) else { return };
        println!("holding");
        loop {
            // Whoever reads the two at different times finds different lengths.
            let _ = first.write_all(b"x").and_then(|()| last.write_all(b"x"));
        }
    }
    findings.works("make the output", fs::create_dir(&out));
    // Between the two when it comes to reading them.
    findings.works("write a large file", fs::write(out.join("m"), vec![7; BALLAST_BYTES]));
    let survivor = act.again("survivor").stdin(Stdio::null()).spawn();
    findings.works("leave a process that keeps standard output", survivor);
    std::thread::sleep(Duration::from_millis(100));
}

async fn end_at_once(stage: &Stage<'_>) -> Outcome {
    let Ok(mut draft) = stage.draft("", &[]) else { return Outcome::broken("no request") };
    draft.outputs.push(path(OUTPUT));
    let start = Instant::now();
    let ended = stage.run(draft).await;
    let mut findings = Findings::default();
    let took = start.elapsed();
    findings.check(took < AT_ONCE, format_args!("the build ended only after {took:?}"));
    let lengths = output(&ended).and_then(|output| lengths(stage, output));
    match lengths {
        // The survivor may be killed between two writes.
        Some((first, last)) => findings.check(
            first > 0 && first.abs_diff(last) <= 1,
            format_args!("a process wrote while outputs were read: {first} and {last} bytes"),
        ),
        None => findings.check(false, format_args!("no output: {}", ended.describe())),
    }
    ended.verdict().and(findings.outcome())
}

/// The first output.
fn output(ended: &Ended) -> Option<&Output> {
    match &ended.end {
        End::Completed(outputs) => outputs.first(),
        _ => None,
    }
}

/// How long the survivor's two files are.
fn lengths(stage: &Stage<'_>, output: &Output) -> Option<(u64, u64)> {
    let Node::Directory { digest, .. } = &output.node else { return None };
    let directory = stage.theatre.worker.store.directories.get(digest).ok()??;
    let length = |name: &[u8]| match directory.get(name)? {
        Node::File { size, .. } => Some(*size),
        _ => None,
    };
    Some((length(b"a")?, length(b"z")?))
}

fn close_streams(_: &Act, findings: &mut Findings) {
    // In place of them something that is no pipe: this process has no way to have no such descriptors at all.
    let null = File::options().write(true).open("/dev/null");
    if let Some(mut null) = findings.works("open /dev/null", null) {
        findings.works("let go of standard output", nix::unistd::dup2_stdout(&null));
        findings.works("let go of standard error", nix::unistd::dup2_stderr(&null));
        let _ = null.flush();
    }
    std::thread::sleep(Duration::from_secs(1));
    // It has no other way to tell.
    let mut said = Vec::new();
    let _ = findings.write(&mut said);
    let _ = fs::write(Path::new("/").join(OUTPUT), said);
}

async fn without_streams(stage: &Stage<'_>) -> Outcome {
    let Ok(mut draft) = stage.draft("", &[]) else { return Outcome::broken("no request") };
    draft.outputs.push(path(OUTPUT));
    let ended = stage.run(draft).await;
    let said = output(&ended).and_then(|output| match &output.node {
        Node::File { digest, .. } => contents(stage, digest),
        _ => None,
    });
    match said.and_then(|said| Findings::read(&said)) {
        Some(findings) => findings.outcome(),
        None => Outcome::broken(format!("it did not go on: {}", ended.describe())),
    }
}

/// All of a small blob.
fn contents(stage: &Stage<'_>, digest: &Digest) -> Option<Vec<u8>> {
    let blob = stage.theatre.worker.store.blobs.open(digest).ok()??;
    let mut bytes = vec![0; usize::try_from(blob.size()).ok()?.min(1 << 20)];
    let read = blob.read_at(&mut bytes, 0).ok()?;
    bytes.truncate(read);
    Some(bytes)
}

/// When everything is stopped: after the command has ended, or has said that it holds.
const STOP_AFTER: Duration = Duration::from_millis(500);

fn hide(act: &Act, findings: &mut Findings) {
    match act.role.as_str() {
        "hidden" => {
            let _ = setsid();
            for deaf in [Signal::SIGHUP, Signal::SIGTERM, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGCHLD] {
                let _ = cofferdam_sandbox::attack::ignore_signal(deaf as i32);
            }
            let _ = prctl::set_child_subreaper(true);
            // A child of its own, so that its parent is no process of the build any more.
            let _ = act.again("grandchild").spawn();
            hold();
        }
        "grandchild" => {
            let _ = setsid();
            std::thread::sleep(STOP_AFTER);
            // All but itself, and the first process, which can't be stopped from within.
            let _ = kill(Pid::from_raw(-1), Signal::SIGSTOP);
            hold();
        }
        _ => {
            let mut child =
                findings.works("start a process", act.again("hidden").stdout(Stdio::piped()).spawn());
            let said = child.as_mut().and_then(|child| child.stdout.as_mut()).map(|stdout| {
                use std::io::Read;
                stdout.read(&mut [0; 8])
            });
            findings.check(matches!(said, Some(Ok(1..))), "the process did not hide");
            if act.role == "stay" {
                hold();
            }
        }
    }
}

async fn end_the_hidden(stage: &Stage<'_>) -> Outcome {
    let mut outcome = stage.act("", &[]).await;
    let mut findings = Findings::default();
    let vanish = || eventually(AT_ONCE, || stage.processes().is_empty());
    findings.check(vanish().await, format_args!("after the end there are still {:?}", stage.processes()));
    match holding(stage, "stay", &[] as &[&OsStr]).await {
        Ok(build) => {
            tokio::time::sleep(STOP_AFTER * 2).await;
            drop(build);
            let gone = vanish().await;
            findings
                .check(gone, format_args!("after the cancelling there are still {:?}", stage.processes()));
        }
        Err(failed) => outcome = outcome.and(failed),
    }
    outcome.and(findings.outcome())
}

/// More than any build needs, and few enough to do no harm where there is no limit.
const TOO_MANY: usize = 8000;

fn fork_bomb(act: &Act, findings: &mut Findings) {
    if act.role == "canary" {
        return findings.check(true, "");
    }
    let mut threads = 0;
    // Threads count as processes do, and cost less.
    let refused = loop {
        let thread = std::thread::Builder::new()
            .stack_size(16 << 10)
            .spawn(|| std::thread::sleep(Duration::from_secs(60)));
        match thread {
            Ok(_) if threads < TOO_MANY => threads += 1,
            Ok(_) => break None,
            Err(error) => break Some(error),
        }
    };
    match refused {
        Some(error) => findings.refused("one more thread", Err::<(), _>(error), &[Errno::EAGAIN]),
        None => findings
            .check(false, format_args!("{TOO_MANY} threads could be started, and there is no end to it")),
    }
    // Told now: while it holds, others run.
    let _ = findings.write(std::io::stdout());
    hold();
}

async fn beside_fork_bomb(stage: &Stage<'_>) -> Outcome {
    let mut bomb = match holding(stage, "", &[] as &[&OsStr]).await {
        Ok(bomb) => bomb,
        Err(outcome) => return outcome,
    };
    let said = std::mem::take(&mut bomb.stdout);
    let mut outcome =
        Findings::read(&said).map_or(Outcome::broken("the bomb said nothing"), Findings::outcome);
    outcome = outcome.and(stage.act("canary", &[]).await);
    let start = Instant::now();
    drop(bomb);
    let gone = eventually(AT_ONCE, || stage.processes().is_empty()).await;
    let mut findings = Findings::default();
    findings.check(
        gone,
        format_args!("cancelled {:?} ago, and still there: {:?}", start.elapsed(), stage.processes()),
    );
    outcome.and(findings.outcome())
}

fn attack_init(act: &Act, findings: &mut Findings) {
    let init = Pid::from_raw(1);
    let refusals = [Errno::EPERM, Errno::EACCES, Errno::ESRCH, Errno::ENOSYS];
    let of_files = [&refusals, hidden_init(act)].concat();
    let attached = ptrace::attach(init);
    if attached.is_ok() {
        // Stopped, it would not see the end of this process, and the verdict would never come.
        let _ = waitpid(init, None).and_then(|_| ptrace::detach(init, None));
    }
    findings.refused("attach to pid 1", attached, &refusals);
    findings.refused("seize pid 1", ptrace::seize(init, ptrace::Options::empty()), &refusals);
    for file in ["mem", "environ", "maps", "auxv", "stack", "syscall"] {
        let path = format!("/proc/1/{file}");
        let read = File::open(&path).and_then(|mut file| {
            use std::io::Read;
            file.read(&mut [0; 16])
        });
        findings.refused(&format!("read {path}"), read, &of_files);
    }
    findings.refused("list /proc/1/fd", names("/proc/1/fd"), &of_files);
    findings.refused("list /proc/1/map_files", names("/proc/1/map_files"), &of_files);
    for link in ["exe", "cwd", "root"] {
        findings.refused(
            &format!("follow /proc/1/{link}"),
            fs::read_link(format!("/proc/1/{link}")),
            &of_files,
        );
    }
    let local = [std::io::IoSlice::new(b"x")];
    let remote = [RemoteIoVec { base: 0x40_0000, len: 1 }];
    findings.refused("write to pid 1's memory", process_vm_writev(init, &local, &remote), &refusals);
    match Call::PIDFD_OPEN.make(&mut [Arg::Int(1), Arg::Int(0)]) {
        Ok(pidfd) => {
            for fd in 0..5 {
                let got = Call::PIDFD_GETFD.make(&mut [Arg::Int(pidfd), Arg::Int(fd), Arg::Int(0)]);
                findings.refused(&format!("take descriptor {fd} of pid 1"), got, &refusals);
            }
        }
        refused => findings.refused("pidfd_open pid 1", refused, &refusals),
    }
    if let Some(seen) = findings.works("list /proc", names("/proc")) {
        let mut foreign: Vec<String> =
            seen.into_iter().filter(|name| name.bytes().all(|b| b.is_ascii_digit())).collect();
        foreign.retain(|pid| pid != "1" && *pid != getpid().to_string());
        findings.check(foreign.is_empty(), format_args!("there are other processes: {foreign:?}"));
    }
    let worker = act.arguments.first().and_then(|pid| pid.to_str()?.parse().ok());
    if let Some(worker) = worker.filter(|pid| ![1, getpid().as_raw()].contains(pid)) {
        findings.refused("signal the worker", kill(Pid::from_raw(worker), None), &[Errno::ESRCH]);
        findings.refused("look at the worker", fs::metadata(format!("/proc/{worker}")), &[Errno::ENOENT]);
    }
    findings.refused("signal the parent of pid 1", kill(Pid::from_raw(-9999), None), &[Errno::ESRCH]);
}

fn own_children(act: &Act, findings: &mut Findings) {
    match act.role.as_str() {
        "child" => return hold(),
        "filtered" => {
            if findings.works("install a filter", Call::UNKNOWN.forbid()).is_some() {
                // Which ends this process.
                let _ = Call::UNKNOWN.make(&mut [Arg::Int(0), Arg::Int(0), Arg::Int(0)]);
            }
            return;
        }
        _ => {}
    }
    if let Some(mut child) = findings.works("start a child", act.again("child").stdout(Stdio::null()).spawn())
    {
        let pid = Pid::from_raw(child.id().cast_signed());
        findings.works("trace a child", ptrace::seize(pid, ptrace::Options::empty()));
        let _ = child.kill();
        let _ = child.wait();
    }
    if let Some(ended) = findings.works("start a child that filters itself", act.again("filtered").output()) {
        let (signal, said) = (ended.status.signal(), String::from_utf8_lossy(&ended.stdout));
        findings.check(
            signal == Some(Signal::SIGSYS as i32),
            format_args!("what it forbade itself did not end it: {signal:?}, {said}"),
        );
    }
    if act.profile == Profile::Parity {
        findings.works("make a user namespace", unshare(CloneFlags::CLONE_NEWUSER));
    }
}

/// How long the quiet build is quiet: several lives of a thread of the worker's.
const QUIET: Duration = Duration::from_millis(1500);

async fn among_threads(stage: &Stage<'_>) -> Outcome {
    let comings_and_goings = async {
        loop {
            let burst: Vec<_> = (0..8)
                .map(|_| tokio::task::spawn_blocking(|| std::thread::sleep(Duration::from_millis(5))))
                .collect();
            for task in burst {
                let _ = task.await;
            }
            // Longer than a thread of the battery's stays idle.
            tokio::time::sleep(Duration::from_millis(400)).await;
        }
    };
    tokio::select! {
        outcome = stage.act("", &[]) => outcome,
        () = comings_and_goings => Outcome::broken("unreachable"),
    }
}

const STALLED: &str = "stalled-input";

fn wait_for_store(_: &Act, findings: &mut Findings) {
    println!("holding");
    let read = fs::read(Path::new("/nix/store").join(STALLED));
    findings.check(false, format_args!("the read was answered: {:?}", read.map(|bytes| bytes.len())));
}

async fn stalled_store(stage: &Stage<'_>) -> Outcome {
    // Contents that no one has read before, so that no cache has them.
    let file = stage.theatre.dir.join(STALLED);
    let ingested = fs::write(&file, format!("{:?}", Instant::now())).map_err(|error| error.to_string());
    let ingested = ingested.and_then(|()| stage.ingest(&file).map_err(|error| error.to_string()));
    let _ = fs::remove_file(&file);
    let (node, digest) = match ingested {
        Ok(node @ Node::File { digest, .. }) => (node, digest),
        other => return Outcome::broken(format!("can't put a file into the store: {other:?}")),
    };
    let Ok(mut draft) = stage.draft("", &[]) else { return Outcome::broken("no request") };
    draft.inputs.insert(name(STALLED), node);
    stage.theatre.faults.set(digest, Fault::Stalls);
    let outcome = cancel_in_read(stage, draft).await;
    stage.theatre.faults.heal(&digest);
    outcome
}

async fn cancel_in_read(stage: &Stage<'_>, draft: Draft) -> Outcome {
    let mut build = match stage.start(draft).await {
        Ok(build) => build,
        Err(fault) => return Outcome::broken(fault.to_string()),
    };
    if let Err(ended) = build.said("holding").await {
        return Outcome::broken(ended.describe());
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    let mut findings = Findings::default();
    findings.check(!stage.processes().is_empty(), "the build did not wait for the store");
    drop(build);
    let gone = eventually(AT_ONCE, || stage.processes().is_empty()).await;
    findings.check(gone, format_args!("cancelled {AT_ONCE:?} ago, and still there: {:?}", stage.processes()));
    findings.outcome()
}

async fn not_executable(stage: &Stage<'_>) -> Outcome {
    let mut outcome = Outcome::Held;
    let files: [(&'static str, &[u8]); 4] = [
        ("build/no-program", b"\x01\x02\x03"),
        // An executable of a machine that nobody has any more.
        ("build/wrong-machine", b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x02\0\x01\0\0\0"),
        ("build/no-interpreter", b"#!/nonexistent/interpreter\n"),
        ("build/plain", b"#!/bin/sh\n"),
    ];
    for command in [
        "/nonexistent",
        "nonexistent",
        "/build",
        "/build/no-program",
        "/build/wrong-machine",
        "/build/no-interpreter",
        "/build/plain",
    ] {
        let Ok(mut draft) = stage.draft("", &[]) else { return Outcome::broken("no request") };
        draft.command = vec![command.into()];
        for (at, bytes) in files {
            draft.additional_files.insert(path(at), bytes.to_vec());
        }
        let ended = stage.run(draft).await;
        outcome = outcome.and(match &ended.end {
            End::Failed(failure)
                if matches!(failure.exit_code, Some(126 | 127)) && failure.message.contains(command) =>
            {
                Outcome::Held
            }
            _ => Outcome::broken(format!("{command}: {}", ended.describe())),
        });
    }
    outcome
}

fn end_somehow(act: &Act, findings: &mut Findings) {
    let (kind, number) = act.role.split_once('-').unwrap_or_default();
    let number = number.parse().unwrap_or(0);
    match kind {
        "exit" => std::process::exit(number),
        "signal" => {
            // Twice: the first SIGSEGV ends in a handler of this program's own start, which then steps aside.
            let _ = Signal::try_from(number).map(|signal| [raise(signal), raise(signal)]);
        }
        "kill" => {
            let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
            let _ = kill(getpid(), Signal::SIGKILL);
        }
        _ => {}
    }
    findings.check(false, "it went on");
}

async fn faithful_ends(stage: &Stage<'_>) -> Outcome {
    let mut outcome = Outcome::Held;
    for (role, code) in [
        ("exit-1", 1),
        ("exit-2", 2),
        ("exit-42", 42),
        ("exit-126", 126),
        ("exit-200", 200),
        ("exit-255", 255),
        ("signal-6", 134),
        ("signal-11", 139),
        ("signal-15", 143),
        ("kill-9", 137),
    ] {
        let Ok(draft) = stage.draft(role, &[]) else { return Outcome::broken("no request") };
        let ended = stage.run(draft).await;
        outcome = outcome.and(match &ended.end {
            End::Failed(failure) if failure.exit_code == Some(code) => Outcome::Held,
            _ => Outcome::broken(format!("{role}: {}", ended.describe())),
        });
    }
    let Ok(draft) = stage.draft("exit-0", &[]) else { return Outcome::broken("no request") };
    let ended = stage.run(draft).await;
    outcome.and(match &ended.end {
        End::Completed(_) => Outcome::Held,
        _ => Outcome::broken(format!("exit-0: {}", ended.describe())),
    })
}

/// The only signal whose state a program of this kind can't tell: its own start ignores it.
const SIGPIPE_BIT: u64 = 1 << (libc::SIGPIPE - 1);

fn initial_state(_: &Act, findings: &mut Findings) {
    let status = "/proc/self/status";
    let bits = |name| field(status, name).and_then(|bits| u64::from_str_radix(&bits, 16).ok());
    findings.same("blocked signals", bits("SigBlk"), Some(0));
    findings.same("ignored signals", bits("SigIgn").map(|bits| bits & !SIGPIPE_BIT), Some(0));
    findings.same("pending signals", bits("ShdPnd"), Some(0));
    findings.same("umask", field(status, "Umask").as_deref(), Some("0022"));
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
    // proc_pid_stat(5), counted from the state: session, terminal, nice.
    findings.same("session", fields.get(3).copied(), Some("2"));
    findings.same("terminal", fields.get(4).copied(), Some("0"));
    findings.same("nice", fields.get(16).copied(), Some("0"));
    let personality = fs::read_to_string("/proc/self/personality").unwrap_or_default();
    findings.same("personality", personality.trim(), "00040000");
    findings.same("soft limit of core files", getrlimit(Resource::RLIMIT_CORE).map(|(soft, _)| soft), Ok(0));
    if let Some((soft, hard)) = findings.works("limit of open files", getrlimit(Resource::RLIMIT_NOFILE)) {
        findings.same("soft limit of open files", soft, hard);
    }
    findings.same("huge pages", field(status, "THP_enabled").as_deref(), Some("1"));
    let score = fs::read_to_string("/proc/self/oom_score_adj").unwrap_or_default();
    findings.check(
        score.trim().parse::<i32>().is_ok_and(|score| score >= 0),
        "it is the last to be killed for memory",
    );
}

fn no_terminal(_: &Act, findings: &mut Findings) {
    for fd in 0..3 {
        let typed = Call::TIOCSTI.make(&mut [Arg::Int(fd), Arg::In(b"x")]);
        let refusals = [Errno::ENOTTY, Errno::EPERM, Errno::EIO];
        findings.refused(&format!("type into descriptor {fd}"), typed, &refusals);
        let mut bytes = [0; 64];
        let pasted = Call::TIOCLINUX.make(&mut [Arg::Int(fd), Arg::Out(&mut bytes)]);
        findings.refused(&format!("paste into descriptor {fd}"), pasted, &refusals);
    }
    findings.same("standard input is a terminal", isatty(std::io::stdin()).unwrap_or(false), false);
    findings.same("standard output is a terminal", isatty(std::io::stdout()).unwrap_or(false), false);
    // By its number: the path may be that of a place that is not in the sandbox.
    let stdin = fs::metadata("/proc/self/fd/0").map(|found| found.rdev());
    findings.same("standard input", stdin.ok(), Some(makedev(1, 3)));
    let terminal = File::options().read(true).custom_flags(OFlag::O_NOCTTY.bits()).open("/dev/tty");
    findings.refused("open /dev/tty", terminal, &[Errno::ENXIO]);
    findings.same("session", getsid(None), Ok(getpid()));
}
