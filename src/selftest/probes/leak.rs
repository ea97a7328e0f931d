//! LEAK: what a build learns of the host, of the worker, and of other builds.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::Path;

use cofferdam_sandbox::attack::{Arg, Call};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::stat::makedev;
use nix::sys::utsname::uname;

use super::tools::{c_string, field, hold, names, until_holding};
use crate::build::request::Draft;
use crate::selftest::stage::{BUILD, PROGRAM, STORE, Stage, path};
use crate::selftest::{Act, Company, Findings, Outcome, Play, Probe, Weight};

pub(super) const PROBES: &[Probe] = &[
    Probe {
        id: "LEAK-01",
        promise: "a build gets descriptors 0, 1 and 2, and no other",
        weight: Weight::Required,
        company: Company::Shared,
        attack: three_descriptors,
        play: Play::Plain,
    },
    Probe {
        id: "LEAK-03",
        promise: "the environment is the request's, and reaches no process but the command",
        weight: Weight::Required,
        company: Company::Shared,
        attack: requested_environment,
        play: Play::Script(|stage| Box::pin(with_environment(stage))),
    },
    Probe {
        id: "LEAK-04",
        promise: "names, users and pid 1 tell nothing of the host or of the worker",
        weight: Weight::Desired,
        company: Company::Shared,
        attack: fixed_names,
        play: Play::Script(|stage| Box::pin(with_worker_directory(stage))),
    },
    Probe {
        id: "LEAK-05",
        promise: "two builds do not find each other by anything they share the name of",
        weight: Weight::Required,
        company: Company::Shared,
        attack: meet,
        play: Play::Script(|stage| Box::pin(two_builds(stage))),
    },
    Probe {
        id: "LEAK-06",
        promise: "a build finds nothing that another one left",
        weight: Weight::Desired,
        company: Company::Shared,
        attack: leave_and_look,
        play: Play::Script(|stage| Box::pin(one_after_the_other(stage))),
    },
    Probe {
        id: "LEAK-07",
        promise: "of the host a build learns what docs/isolation.md lists, and no addresses or paths",
        weight: Weight::Desired,
        company: Company::Shared,
        attack: accepted_leaks_only,
        play: Play::Script(|stage| Box::pin(with_worker_directory(stage))),
    },
];

/// Descriptors that are looked at: more than any program of ours has.
const DESCRIPTORS: usize = 4096;

fn three_descriptors(_: &Act, findings: &mut Findings) {
    let open: Vec<String> = (3..DESCRIPTORS)
        .filter_map(|fd| {
            let target = fs::read_link(format!("/proc/self/fd/{fd}")).ok()?;
            Some(format!("{fd} is {}", target.display()))
        })
        .collect();
    findings.check(open.is_empty(), format_args!("there are other descriptors: {open:?}"));
    for fd in 0..3 {
        let target = fs::read_link(format!("/proc/self/fd/{fd}")).unwrap_or_default();
        let found = fs::metadata(format!("/proc/self/fd/{fd}"));
        let right = found.is_ok_and(|found| match fd {
            // By its number: the path may be that of a place that is not in the sandbox.
            0 => found.rdev() == makedev(1, 3),
            _ => found.file_type().is_fifo(),
        });
        findings.check(right, format_args!("descriptor {fd} is {}", target.display()));
        let flags = field(&format!("/proc/self/fdinfo/{fd}"), "flags").unwrap_or_default();
        let mode = flags.chars().last();
        let expected = if fd == 0 { '0' } else { '1' };
        findings.same(&format!("access mode of descriptor {fd}"), mode, Some(expected));
    }
}

const VARIABLES: [(&str, &str); 7] = [
    ("A", "1"),
    ("EMPTY", ""),
    ("LD_PRELOAD", "/build/planted.so"),
    ("LD_LIBRARY_PATH", "/build"),
    ("LD_AUDIT", "/build/planted.so"),
    ("GCONV_PATH", "/build"),
    ("cofferdam-selftest-marker", "in-the-environment"),
];

/// By which the environment is found in another process.
const MARKER: &[u8] = b"cofferdam-selftest-marker";

fn requested_environment(act: &Act, findings: &mut Findings) {
    let seen: BTreeMap<OsString, OsString> = std::env::vars_os().collect();
    let expected = VARIABLES.map(|(key, value)| (key.into(), value.into())).into();
    findings.same("the environment", seen, expected);
    if act.role.is_empty() {
        hold();
    }
}

/// The processes between the worker and the command must not have been given what is meant for the command.
async fn with_environment(stage: &Stage<'_>) -> Outcome {
    let Ok(mut draft) = stage.draft("", &[]) else { return Outcome::broken("no request") };
    draft.environment =
        VARIABLES.map(|(key, value)| (key.as_bytes().to_vec(), value.as_bytes().to_vec())).into();
    let build = match stage.start(draft).await {
        Ok(build) => build,
        Err(fault) => return Outcome::broken(fault.to_string()),
    };
    let build = match until_holding(build).await {
        Ok(build) => build,
        Err(outcome) => return outcome,
    };
    let mut findings = Findings::default();
    let running = stage.processes();
    let command = running.iter().find_map(|line| line.split(' ').next()?.parse::<u32>().ok());
    let Some(command) = findings.works("find the command's process", command.ok_or("it is not there")) else {
        return findings.outcome();
    };
    findings.check(has_marker(command) != Some(false), "the command does not have its environment");
    let mut above = parent(command);
    while let Some(pid) = above.filter(|pid| *pid > 1) {
        findings.check(
            has_marker(pid) != Some(true),
            format_args!("process {pid}, which started the command, has its environment"),
        );
        above = if pid == std::process::id() { None } else { parent(pid) };
    }
    // The attack is cut short, so what it found is judged by a second build that is not.
    drop(build);
    findings.outcome().and(environment_of_a_whole_build(stage).await)
}

async fn environment_of_a_whole_build(stage: &Stage<'_>) -> Outcome {
    let Ok(mut draft) = stage.draft("tell", &[]) else { return Outcome::broken("no request") };
    draft.environment =
        VARIABLES.map(|(key, value)| (key.as_bytes().to_vec(), value.as_bytes().to_vec())).into();
    stage.run(draft).await.verdict()
}

/// Whether a process has the marker in its environment; `None` where that can't be seen.
fn has_marker(pid: u32) -> Option<bool> {
    let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
    Some(memchr::memmem::find(&environment, MARKER).is_some())
}

fn parent(pid: u32) -> Option<u32> {
    field(&format!("/proc/{pid}/status"), "PPid")?.parse().ok()
}

/// Tells the attack the worker's directory, which is among the worker's arguments and in none of the sandbox.
async fn with_worker_directory(stage: &Stage<'_>) -> Outcome {
    stage.act("", &[stage.theatre.dir.as_os_str()]).await
}

const PASSWD: &str = "root:x:0:0:Nix build user:/build:/noshell\n\
                      nixbld:x:1000:100:Nix build user:/build:/noshell\n\
                      nobody:x:65534:65534:Nobody:/:/noshell\n";
const GROUP: &str = "root:x:0:\nnixbld:!:100:\nnogroup:x:65534:\n";
const HOSTS: &str = "127.0.0.1 localhost\n::1 localhost\n";

fn fixed_names(act: &Act, findings: &mut Findings) {
    if let Some(names) = findings.works("uname", uname()) {
        findings.same("host name", names.nodename(), OsStr::new("localhost"));
        findings.same("domain name", names.domainname(), OsStr::new("(none)"));
    }
    for (file, expected) in [("/etc/passwd", PASSWD), ("/etc/group", GROUP), ("/etc/hosts", HOSTS)] {
        findings.same(file, fs::read_to_string(file).unwrap_or_default().as_str(), expected);
    }
    if let Some(seen) = findings.works("list /etc", names("/etc")) {
        findings.same(
            "/etc",
            seen.into_iter().collect::<Vec<_>>(),
            ["group", "hosts", "passwd"].map(String::from).into(),
        );
    }
    for absent in ["/etc/machine-id", "/etc/hostname", "/etc/resolv.conf", "/var/lib/dbus/machine-id", "/sys"]
    {
        findings.refused(absent, fs::symlink_metadata(absent), &[Errno::ENOENT]);
    }
    let worker = act.arguments.first().map(|dir| dir.as_bytes()).unwrap_or(b"/nothing");
    for file in ["cmdline", "comm", "environ", "status", "cgroup"] {
        let at = format!("/proc/1/{file}");
        let Ok(bytes) = fs::read(&at) else { continue };
        for secret in [worker, b"battery", b"--dir"] {
            let there = memchr::memmem::find(&bytes, secret).is_some();
            findings.check(!there, format_args!("{at} contains {:?}", String::from_utf8_lossy(secret)));
        }
    }
}

/// What both builds name their things.
const NAME: &str = "cofferdam-selftest-leak-05";
/// The key of a System V segment.
const KEY: i64 = 0x00c0_ffe5;
const IPC_CREAT: i64 = 0o1000;
/// `O_RDWR | O_CREAT`.
const MQ_CREATE: i64 = 0o102;

fn meet(act: &Act, findings: &mut Findings) {
    match act.role.as_str() {
        "keep" => keep(findings),
        _ => seek(findings),
    }
}

fn program() -> std::path::PathBuf {
    Path::new("/").join(STORE).join(PROGRAM)
}

/// Files by which builds could meet.
fn places() -> [std::path::PathBuf; 4] {
    ["/build", "/tmp", "/dev/shm", "/nix/store"].map(|dir| Path::new(dir).join(NAME))
}

/// Puts something of the name everywhere, locks what is shared, and waits.
fn keep(findings: &mut Findings) {
    let address = SocketAddr::from_abstract_name(NAME);
    let socket = findings.works("listen", address.and_then(|address| UnixListener::bind_addr(&address)));
    for place in places() {
        let writable =
            place.parent().is_some_and(|dir| dir != Path::new("/nix/store")) || store_is_writable();
        if writable {
            findings.works(&format!("write {}", place.display()), fs::write(&place, "kept"));
        }
    }
    let made = Call::SHMGET.make(&mut [Arg::Int(KEY), Arg::Int(4096), Arg::Int(IPC_CREAT | 0o666)]);
    findings.works("make a System V segment", made);
    let queue = c_string(NAME);
    // Not every kernel has them.
    let _ = Call::MQ_OPEN.make(&mut [Arg::Str(&queue), Arg::Int(MQ_CREATE), Arg::Int(0o666)]);
    let program = findings.works("open the program", fs::File::open(program()));
    // Whether it is granted is no matter here; what the other build sees of it is.
    let exclusive = program.map(|file| Flock::lock(file, FlockArg::LockExclusiveNonblock));
    let shared = findings.works("open the program", fs::File::open(self::program()));
    let shared = match &exclusive {
        Some(Err(_)) => shared.and_then(|file| Flock::lock(file, FlockArg::LockSharedNonblock).ok()),
        _ => None,
    };
    findings.check(exclusive.as_ref().is_some_and(Result::is_ok) || shared.is_some(), "no lock was granted");
    hold();
    drop(socket);
}

fn store_is_writable() -> bool {
    let own = Path::new("/").join(STORE).join("writable");
    fs::write(&own, "").is_ok()
}

fn seek(findings: &mut Findings) {
    let address = SocketAddr::from_abstract_name(NAME);
    let connected = address.and_then(|address| UnixStream::connect_addr(&address));
    findings.refused("connect to the other build's socket", connected, &[Errno::ECONNREFUSED]);
    for place in places() {
        findings.refused(
            &format!("look at {}", place.display()),
            fs::symlink_metadata(&place),
            &[Errno::ENOENT],
        );
    }
    let found = Call::SHMGET.make(&mut [Arg::Int(KEY), Arg::Int(4096), Arg::Int(0o666)]);
    findings.refused("find the other build's System V segment", found, &[Errno::ENOENT, Errno::ENOSYS]);
    let queue = c_string(NAME);
    let found = Call::MQ_OPEN.make(&mut [Arg::Str(&queue), Arg::Int(0), Arg::Int(0)]);
    let refusals = [Errno::ENOENT, Errno::ENOSYS, Errno::EPERM, Errno::EACCES];
    findings.refused("find the other build's message queue", found, &refusals);
    let others: Vec<String> = names("/proc")
        .unwrap_or_default()
        .into_iter()
        .filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
        .filter(|pid| pid != "1" && *pid != std::process::id().to_string())
        .collect();
    findings.check(others.is_empty(), format_args!("there are other processes: {others:?}"));
    for (file, header) in [("locks", 0), ("sysvipc/shm", 1), ("sysvipc/sem", 1), ("sysvipc/msg", 1)] {
        let text = fs::read_to_string(Path::new("/proc").join(file)).unwrap_or_default();
        // Those of open file descriptions have no process: every reader on the host is shown them all.
        let lines: Vec<&str> = text.lines().skip(header).filter(|line| !line.contains("OFDLCK")).collect();
        findings.check(lines.is_empty(), format_args!("/proc/{file} shows {lines:?}"));
    }
    let sockets = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    findings.check(!sockets.contains(NAME), "/proc/net/unix shows the other build's socket");
    if let Some(file) = findings.works("open the program", fs::File::open(program())) {
        let refusal = Flock::lock(file, FlockArg::LockExclusiveNonblock).err().map(|(_, errno)| errno);
        findings.check(
            refusal != Some(Errno::EWOULDBLOCK),
            "an input that the other build has locked can't be locked",
        );
    }
}

/// Two builds over an overlay each, and two that see the view as it is.
async fn two_builds(stage: &Stage<'_>) -> Outcome {
    let mut outcome = Outcome::Held;
    for inputs in [Inputs::BelowScratch, Inputs::ReadOnly] {
        let kept = match meeting(stage, "keep", inputs) {
            Ok(draft) => stage.start(draft).await.map_err(|fault| Outcome::broken(fault.to_string())),
            Err(broken) => Err(broken),
        };
        let kept = match kept {
            Ok(build) => until_holding(build).await,
            Err(broken) => Err(broken),
        };
        let (kept, seeking) = match (kept, meeting(stage, "seek", inputs)) {
            (Ok(kept), Ok(seeking)) => (kept, seeking),
            (Err(broken), _) | (_, Err(broken)) => return outcome.and(broken),
        };
        outcome = outcome.and(stage.run(seeking).await.verdict());
        if super::tools::ended(kept).await {
            outcome = outcome.and(Outcome::broken("the first build has ended before the second"));
        }
    }
    outcome
}

/// Whether the place of the inputs can be written to.
#[derive(Clone, Copy)]
enum Inputs {
    BelowScratch,
    ReadOnly,
}

fn meeting(stage: &Stage<'_>, role: &str, inputs: Inputs) -> Result<Draft, Outcome> {
    let mut draft = stage.draft(role, &[]).map_err(|fault| Outcome::broken(fault.to_string()))?;
    if let Inputs::ReadOnly = inputs {
        draft.scratch_paths = [path(BUILD)].into();
    }
    Ok(draft)
}

fn leave_and_look(act: &Act, findings: &mut Findings) {
    for dir in ["/build", "/tmp", "/dev/shm"] {
        if let Some(seen) = findings.works(&format!("list {dir}"), names(dir)) {
            findings.check(seen.is_empty(), format_args!("{dir} holds {seen:?} at the start"));
        }
        if act.role == "leave" {
            findings.works("leave a file", fs::write(Path::new(dir).join(NAME), [0xa5; 1 << 16]));
            findings.works("leave a directory", fs::create_dir(Path::new(dir).join("directory")));
        } else {
            findings
                .check(untouched_space(dir), format_args!("a file made longer in {dir} is not all zeros"));
        }
    }
    if let Some(seen) = findings.works("list /nix/store", names("/nix/store")) {
        findings.same("/nix/store", seen.into_iter().collect::<Vec<_>>(), vec![PROGRAM.to_owned()]);
    }
    if act.role == "leave" {
        findings.works("leave a file", fs::write(Path::new("/nix/store").join(NAME), [0xa5; 1 << 16]));
    }
}

/// Whether space that was given out anew holds nothing.
fn untouched_space(dir: &str) -> bool {
    let at = Path::new(dir).join("space");
    let made = fs::File::create_new(&at).and_then(|file| {
        nix::fcntl::fallocate(&file, nix::fcntl::FallocateFlags::empty(), 0, 1 << 20)
            .or_else(|_| nix::unistd::ftruncate(&file, 1 << 20))
            .map_err(std::io::Error::from)
    });
    let zeros = made.and_then(|()| fs::read(&at)).is_ok_and(|bytes| bytes.iter().all(|byte| *byte == 0));
    let _ = fs::remove_file(&at);
    zeros
}

async fn one_after_the_other(stage: &Stage<'_>) -> Outcome {
    let mut outcome = stage.act("leave", &[]).await;
    // As many as there are slots may be needed to come by the same one again.
    for _ in 0..3 {
        outcome = outcome.and(stage.act("", &[]).await);
    }
    outcome
}

fn accepted_leaks_only(act: &Act, findings: &mut Findings) {
    for readable in ["/proc/version", "/proc/cpuinfo", "/proc/meminfo", "/proc/uptime"] {
        findings.works(&format!("read {readable}"), fs::read(readable));
    }
    findings.refused("/sys", fs::symlink_metadata("/sys"), &[Errno::ENOENT]);
    let devices = fs::read_to_string("/proc/net/dev").unwrap_or_default();
    let devices: Vec<&str> =
        devices.lines().filter_map(|line| line.split_once(':')).map(|(name, _)| name.trim()).collect();
    findings.same("network interfaces", devices, vec!["lo"]);
    for (file, header) in [("arp", 1), ("route", 1), ("tcp", 1), ("udp", 1), ("unix", 1)] {
        let text = fs::read_to_string(Path::new("/proc/net").join(file)).unwrap_or_default();
        let lines: Vec<&str> = text.lines().skip(header).collect();
        findings.check(lines.is_empty(), format_args!("/proc/net/{file} shows {lines:?}"));
    }
    // What is bound from a directory of the host tells its path; it must be this build's own.
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let worker = act.arguments.first().map(|dir| dir.to_string_lossy()).unwrap_or_default();
    let mut builds = std::collections::BTreeSet::new();
    for line in mounts.lines().filter(|line| line.contains(&*worker)) {
        let after = line.split_once("/state/").map(|(_, after)| after).unwrap_or(line);
        let mut parts = after.split(['/', ' ']).filter(|part| !["builds", "copies", "view"].contains(part));
        builds.insert(parts.next().unwrap_or_default().to_owned());
    }
    findings
        .check(builds.len() <= 1, format_args!("the list of mounts tells more than one build: {builds:?}"));
    // A fixed few: the host's own mounts would be many more.
    let places: Vec<&str> = mounts.lines().filter_map(|line| line.split(' ').nth(4)).collect();
    let foreign = places.iter().filter(|place| !KNOWN_PLACES.iter().any(|known| within(place, known)));
    let foreign: Vec<&&str> = foreign.collect();
    findings.check(foreign.is_empty(), format_args!("there are mounts at {foreign:?}"));
}

/// What may have something mounted on it, or below.
const KNOWN_PLACES: [&str; 5] = ["/build", "/dev", "/nix/store", "/proc", "/tmp"];

fn within(place: &str, known: &str) -> bool {
    place == "/" || place.strip_prefix(known).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}
