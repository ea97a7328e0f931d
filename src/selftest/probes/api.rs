//! API: requests that no client of good will sends.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use cofferdam_proto::build as wire;
use cofferdam_proto::build::BuildRequest;
use cofferdam_proto::build::build_request::{AdditionalFile, BuildConstraints, EnvVar};
use cofferdam_proto::castore::{DirectoryEntry, Entry, FileEntry, SymlinkEntry, entry};
use nix::sys::signal::Signal;
use prost::Message;

use super::second::{Daemon, END, Place};
use crate::build::error::{Fault, FaultKind, Unsupported};
use crate::build::request::{Constraints, Request, limits};
use crate::castore::{Digest, Node};
use crate::selftest::stage::{End, Stage, name, path};
use crate::selftest::{Act, Company, Findings, Outcome, Play, Probe, Weight};

pub(super) const PROBES: &[Probe] = &[
    Probe {
        id: "API-01",
        promise: "paths that are empty, absolute or not plain are refused, in every field",
        weight: Weight::Required,
        company: Company::Shared,
        attack: let_in,
        play: Play::Script(|_| Box::pin(async { odd_paths() })),
    },
    Probe {
        id: "API-02",
        promise: "lists out of order, duplicates, overlaps and reserved places are refused",
        weight: Weight::Required,
        company: Company::Shared,
        attack: let_in,
        play: Play::Script(|_| Box::pin(async { odd_lists() })),
    },
    Probe {
        id: "API-03",
        promise: "additional files lie where files may lie, and are of a limited size",
        weight: Weight::Required,
        company: Company::Shared,
        attack: own_files,
        play: Play::Script(|stage| Box::pin(additional_files(stage))),
    },
    Probe {
        id: "API-04",
        promise: "a request sees no path of the host that the operator did not allow",
        weight: Weight::Required,
        company: Company::Shared,
        attack: let_in,
        play: Play::Script(|stage| Box::pin(host_paths(stage))),
    },
    Probe {
        id: "API-05",
        promise: "a daemon listens for its own user alone, and on TCP only if told that this is insecure",
        weight: Weight::Required,
        company: Company::Shared,
        attack: let_in,
        play: Play::Script(|stage| Box::pin(private_socket(stage))),
    },
    Probe {
        id: "API-06",
        promise: "commands, variables and constraints that can't be had are refused with the reason",
        weight: Weight::Desired,
        company: Company::Shared,
        attack: let_in,
        play: Play::Script(|stage| Box::pin(odd_values(stage))),
    },
    Probe {
        id: "API-07",
        promise: "no message, however made, makes the worker fail",
        weight: Weight::Required,
        company: Company::Shared,
        attack: let_in,
        play: Play::Script(|_| Box::pin(async { mutated_messages() })),
    },
    Probe {
        id: "API-08",
        promise: "how much one request may ask for is limited",
        weight: Weight::Desired,
        company: Company::Shared,
        attack: let_in,
        play: Play::Script(|stage| Box::pin(too_much(stage))),
    },
    Probe {
        id: "API-10",
        promise: "names of builds can't be guessed, and messages tell no paths of the host",
        weight: Weight::Desired,
        company: Company::Shared,
        attack: |_, findings| findings.check(true, ""),
        play: Play::Script(|stage| Box::pin(names_and_messages(stage))),
    },
];

fn let_in(_: &Act, findings: &mut Findings) {
    findings.check(false, "a build that should have been refused was started");
}

fn directory(name: &[u8]) -> Entry {
    let directory = DirectoryEntry { name: name.to_vec(), digest: vec![1; 32], size: 7 };
    Entry { entry: Some(entry::Entry::Directory(directory)) }
}

fn file(name: &[u8], digest: usize) -> Entry {
    let file = FileEntry { name: name.to_vec(), digest: vec![2; digest], size: 5, executable: true };
    Entry { entry: Some(entry::Entry::File(file)) }
}

fn link(name: &[u8], target: &[u8]) -> Entry {
    let link = SymlinkEntry { name: name.to_vec(), target: target.to_vec() };
    Entry { entry: Some(entry::Entry::Symlink(link)) }
}

fn variable(key: &str, value: &[u8]) -> EnvVar {
    EnvVar { key: key.to_owned(), value: value.to_vec() }
}

fn added(path: &str) -> AdditionalFile {
    AdditionalFile { path: path.to_owned(), contents: b"text".to_vec() }
}

fn strings<const N: usize>(texts: [&str; N]) -> Vec<String> {
    texts.map(str::to_owned).into()
}

/// A valid request with something in every field.
fn valid() -> BuildRequest {
    BuildRequest {
        inputs: vec![directory(b"dir"), file(b"file", 32), link(b"link", b"../elsewhere")],
        command_args: strings(["/nix/store/dir/bin/sh", "-c", "true"]),
        working_dir: "build".to_owned(),
        scratch_paths: strings(["build", "nix/store"]),
        inputs_dir: "nix/store".to_owned(),
        outputs: strings(["nix/store/out"]),
        environment_vars: vec![variable("A", b"1"), variable("B", b"\xff")],
        constraints: Some(BuildConstraints {
            system: "x86_64-linux".to_owned(),
            min_memory: 0,
            available_ro_paths: strings(["/usr/share"]),
            network_access: false,
            provide_bin_sh: false,
        }),
        additional_files: vec![added("build/file")],
        refscan_needles: strings(["aaaa", "bbbb"]),
    }
}

/// Checks that a changed request is refused as malformed.
fn refused(findings: &mut Findings, what: &str, change: impl FnOnce(&mut BuildRequest)) {
    let mut request = valid();
    change(&mut request);
    match Request::try_from(request) {
        Ok(_) => findings.check(false, format_args!("{what}: it is taken")),
        Err(invalid) => {
            let kind = Fault::from(invalid).kind();
            findings.same(what, kind, FaultKind::InvalidRequest);
        }
    }
}

/// The request that all others are made of must be in order, or every refusal would be in vain.
fn begin() -> Findings {
    let mut findings = Findings::default();
    findings.works("the request that the others are made of", Request::try_from(valid()));
    findings
}

fn odd_paths() -> Outcome {
    let mut findings = begin();
    let long = "a/".repeat(2100) + "a";
    let component = "c".repeat(256);
    let odd = [
        "..",
        "../x",
        "build/../x",
        "/build",
        "build//x",
        "./build",
        "build/.",
        "build/",
        "/",
        ".",
        "a\0b",
        &long,
        &component,
    ];
    for path in odd.into_iter().chain([""]) {
        let shown: String = path.chars().take(20).collect();
        let text = || path.to_owned();
        refused(&mut findings, &format!("working_dir {shown:?}"), |r| r.working_dir = text());
        refused(&mut findings, &format!("scratch_paths {shown:?}"), |r| r.scratch_paths = vec![text()]);
        refused(&mut findings, &format!("outputs {shown:?}"), |r| r.outputs = vec![text()]);
        refused(&mut findings, &format!("additional_files {shown:?}"), |r| {
            r.additional_files = vec![added(path)]
        });
        // Empty is the root there.
        if !path.is_empty() {
            refused(&mut findings, &format!("inputs_dir {shown:?}"), |r| r.inputs_dir = text());
        }
    }
    findings.outcome()
}

fn odd_lists() -> Outcome {
    let mut findings = begin();
    let f = &mut findings;
    refused(f, "inputs out of order", |r| r.inputs.reverse());
    refused(f, "an input twice", |r| r.inputs = vec![directory(b"a"), file(b"a", 32)]);
    refused(f, "scratch paths out of order", |r| r.scratch_paths.reverse());
    refused(f, "a scratch path twice", |r| r.scratch_paths = strings(["build", "build"]));
    refused(f, "an output twice", |r| r.outputs = strings(["nix/store/out", "nix/store/out"]));
    refused(f, "a variable twice", |r| r.environment_vars = vec![variable("A", b"1"), variable("A", b"2")]);
    refused(f, "variables out of order", |r| r.environment_vars.reverse());
    refused(f, "a file twice", |r| r.additional_files = vec![added("build/a"), added("build/a")]);
    refused(f, "a host path that is the root", |r| ro_paths(r, strings(["/"])));
    refused(f, "a host path twice", |r| ro_paths(r, strings(["/usr", "/usr"])));
    refused(f, "an output in no scratch path", |r| r.outputs = strings(["home/out"]));
    for place in ["proc", "dev", "sys", "etc", "bin", "proc/self", "dev/shm", "sys/fs"] {
        refused(f, &format!("scratch in {place}"), |r| r.scratch_paths = vec![place.to_owned()]);
        refused(f, &format!("inputs in {place}"), |r| r.inputs_dir = place.to_owned());
    }
    refused(f, "scratch on an input", |r| r.scratch_paths = strings(["build", "nix/store/file"]));
    findings.outcome()
}

fn ro_paths(request: &mut BuildRequest, paths: Vec<String>) {
    request.constraints.get_or_insert_default().available_ro_paths = paths;
}

/// An input of the same name as a directory of an additional file.
fn own_files(_: &Act, findings: &mut Findings) {
    let at = "/build/deep/er/file";
    findings.same(at, fs::read_to_string(at).unwrap_or_default().as_str(), "contents");
    if let Some(found) = findings.works("look at it", fs::symlink_metadata(at)) {
        use std::os::unix::fs::MetadataExt;
        findings.same("its owner", (found.uid(), found.gid()), (1000, 100));
        findings.check(
            found.file_type().is_file() && found.mode() & 0o7022 == 0,
            format_args!("mode {:o}", found.mode()),
        );
    }
}

async fn additional_files(stage: &Stage<'_>) -> Outcome {
    let mut findings = begin();
    let f = &mut findings;
    refused(f, "a file on an input", |r| r.additional_files = vec![added("nix/store/file")]);
    refused(f, "a file below an input that is a file", |r| {
        r.additional_files = vec![added("nix/store/file/x")]
    });
    refused(f, "a file below an input that is a link", |r| {
        r.additional_files = vec![added("nix/store/link/x")]
    });
    refused(f, "a file on an output", |r| r.additional_files = vec![added("nix/store/out")]);
    refused(f, "a file below a file", |r| r.additional_files = vec![added("build/a"), added("build/a/b")]);
    refused(f, "a file on a scratch path", |r| r.additional_files = vec![added("build")]);
    refused(f, "a file in /proc", |r| r.additional_files = vec![added("proc/x")]);
    refused(f, "a file in /dev", |r| r.additional_files = vec![added("dev/x")]);
    refused(f, "a file too large", |r| {
        r.additional_files = vec![AdditionalFile {
            path: "build/x".to_owned(),
            contents: vec![0; limits::ADDITIONAL_BYTES + 1],
        }];
    });
    let Ok(mut draft) = stage.draft("", &[]) else { return Outcome::broken("no request") };
    draft.additional_files.insert(path("build/deep/er/file"), b"contents".to_vec());
    findings.outcome().and(stage.run(draft).await.verdict())
}

async fn host_paths(stage: &Stage<'_>) -> Outcome {
    let mut outcome = Outcome::Held;
    let shown = stage.theatre.shown();
    // A link in what is allowed leads to what is not.
    let linked = shown.join("link-to-etc");
    let _ = fs::remove_file(&linked);
    let made = std::os::unix::fs::symlink("/etc", &linked);
    let beside = PathBuf::from(format!("{}-beside", shown.display()));
    let up = shown.join("../state");
    let paths = [
        "/",
        "/root/.ssh",
        "/proc",
        "/sys",
        "/etc",
        "/etc/shadow",
        "/var/run/docker.sock",
        "/home",
        "relative",
        "",
    ];
    let more = [linked.clone(), beside, up, stage.theatre.dir.clone(), stage.theatre.state()];
    for asked in paths.into_iter().map(PathBuf::from).chain(more) {
        let Ok(mut draft) = stage.draft("", &[]) else { return Outcome::broken("no request") };
        draft.constraints.ro_paths.push(asked.clone());
        let ended = stage.run(draft).await;
        let refused = matches!(&ended.end, End::Fault(Fault::Invalid(_) | Fault::Unsupported(_)));
        if !refused {
            outcome = outcome.and(Outcome::broken(format!("{}: {}", asked.display(), ended.describe())));
        }
    }
    let _ = fs::remove_file(&linked);
    match made {
        Ok(()) => outcome,
        Err(error) => outcome.and(Outcome::broken(format!("can't make a link: {error}"))),
    }
}

async fn private_socket(stage: &Stage<'_>) -> Outcome {
    match socket_and_port(stage).await {
        Ok(findings) => findings.outcome(),
        Err(outcome) => outcome,
    }
}

async fn socket_and_port(stage: &Stage<'_>) -> Result<Findings, Outcome> {
    let mut findings = Findings::default();
    let place = Place::new(stage)?;
    let mut daemon = place.daemon(stage, &["--no-builds"]).await?;
    let mode = |path: &std::path::Path| path.metadata().map(|found| found.permissions().mode() & 0o777);
    let socket = place.socket();
    findings.same("mode of the socket", mode(&socket).ok(), Some(0o600));
    findings.same("mode of its directory", socket.parent().and_then(|dir| mode(dir).ok()), Some(0o700));
    findings.same("mode of the state directory", mode(&place.state()).ok(), Some(0o700));
    daemon.signal(Signal::SIGTERM);
    findings.check(daemon.end(END).await.is_some(), "the daemon does not end");
    let child = Command::new(stage.theatre.own_file())
        .args(["daemon", "--no-builds", "--listen", "127.0.0.1:0", "--state-dir"])
        .arg(place.state())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    if let Some(child) = findings.works("start a daemon on TCP", child) {
        let status = Daemon::of(child).end(Duration::from_secs(3)).await;
        findings.check(
            status.is_some_and(|status| !status.success()),
            format_args!("a daemon on TCP without --insecure: {status:?}, no refusal"),
        );
    }
    Ok(findings)
}

async fn odd_values(stage: &Stage<'_>) -> Outcome {
    let mut findings = begin();
    let f = &mut findings;
    refused(f, "no command", |r| r.command_args.clear());
    refused(f, "an empty program", |r| r.command_args = strings([""]));
    refused(f, "a NUL in an argument", |r| r.command_args.push("a\0b".to_owned()));
    refused(f, "an argument of 3 MiB", |r| r.command_args.push("a".repeat(3 << 20)));
    refused(f, "arguments of 3 MiB together", |r| r.command_args = vec!["a".repeat(100_000); 30]);
    refused(f, "a variable without a name", |r| r.environment_vars = vec![variable("", b"")]);
    refused(f, "a variable with = in its name", |r| r.environment_vars = vec![variable("A=B", b"")]);
    refused(f, "a NUL in a variable's name", |r| r.environment_vars = vec![variable("A\0", b"")]);
    refused(f, "a NUL in a variable", |r| r.environment_vars = vec![variable("A", b"\0")]);
    refused(f, "a system with a space", |r| r.constraints.get_or_insert_default().system = "a b".to_owned());
    let mut outcome = findings.outcome();
    type Change = fn(&mut Constraints);
    let foreign: [(&str, Change); 2] = [
        ("a foreign system", |constraints| constraints.system = Some("pdp11-unix".to_owned())),
        ("all the memory there can be", |constraints| constraints.min_memory = u64::MAX),
    ];
    for (what, change) in foreign {
        let Ok(mut draft) = stage.draft("", &[]) else { return Outcome::broken("no request") };
        change(&mut draft.constraints);
        let ended = stage.run(draft).await;
        outcome = outcome.and(match &ended.end {
            End::Fault(Fault::Unsupported(Unsupported::System { .. } | Unsupported::Memory { .. })) => {
                Outcome::Held
            }
            _ => Outcome::broken(format!("{what}: {}", ended.describe())),
        });
    }
    outcome
}

/// How many messages are tried.
const MESSAGES: u32 = 20_000;

fn mutated_messages() -> Outcome {
    let mut findings = begin();
    let f = &mut findings;
    for bad in [&b""[..], b".", b"..", b"/", b"a/b", b"a\0", &[b'n'; 300]] {
        let shown = String::from_utf8_lossy(bad.get(..bad.len().min(8)).unwrap_or_default()).into_owned();
        refused(f, &format!("an input called {shown:?}"), |r| r.inputs = vec![directory(bad)]);
    }
    for target in [&b""[..], b"a\0b", &[b't'; 4096], &[b't'; 70_000]] {
        refused(f, &format!("a link's target of {} bytes", target.len()), |r| {
            r.inputs = vec![link(b"l", target)]
        });
    }
    for digest in [0, 1, 31, 33, 64] {
        refused(f, &format!("a digest of {digest} bytes"), |r| r.inputs = vec![file(b"f", digest)]);
    }
    refused(f, "an input of no kind", |r| r.inputs = vec![Entry { entry: None }]);

    // Numbers that look random, and are the same at each run.
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"mutated messages");
    let mut numbers = hasher.finalize_xof();
    let good = valid().encode_to_vec();
    let (mut decoded, mut taken) = (0_u32, 0_u32);
    for _ in 0..MESSAGES {
        let mut random = [0; 24];
        numbers.fill(&mut random);
        let bytes = mutated(&good, &random);
        let Ok(message) = BuildRequest::decode(bytes.as_slice()) else { continue };
        decoded += 1;
        // A panic ends the probe. Whatever is taken can be sent on, and is the same there.
        if let Ok(request) = Request::try_from(message) {
            taken += 1;
            let again = wire::BuildRequest::try_from(&request).map(Request::try_from);
            if !matches!(&again, Ok(Ok(again)) if *again == request) {
                findings.check(
                    false,
                    format_args!("a request that is taken is another one when sent on: {again:?}"),
                );
            }
        }
    }
    findings.check(decoded > MESSAGES / 100, format_args!("of {MESSAGES} messages only {decoded} were such"));
    findings.check(taken > 0, "none of the messages was a valid request");
    findings.outcome()
}

/// A message with a few bytes changed, doubled, taken out or put in.
fn mutated(good: &[u8], random: &[u8; 24]) -> Vec<u8> {
    let mut bytes = good.to_vec();
    let (steps, rest) = random.split_at(1);
    for step in rest.chunks_exact(4).take(1 + usize::from(steps.first().copied().unwrap_or(0)) % 4) {
        let &[how, high, low, value] = step else { continue };
        let at = usize::from(u16::from_be_bytes([high, low])) % bytes.len().max(1);
        match how % 6 {
            0 | 1 => bytes.get_mut(at).into_iter().for_each(|byte| *byte = value),
            2 => bytes.get_mut(at).into_iter().for_each(|byte| *byte ^= 1 << (value % 8)),
            3 => bytes.insert(at, value),
            4 => drop(bytes.drain(at..(at + usize::from(value % 16)).min(bytes.len()))),
            _ => {
                let end = (at + usize::from(value)).min(bytes.len());
                let doubled = bytes.get(at..end).unwrap_or_default().to_vec();
                bytes.extend(doubled);
            }
        }
    }
    bytes
}

async fn too_much(stage: &Stage<'_>) -> Outcome {
    let mut findings = begin();
    let f = &mut findings;
    refused(f, "inputs", |r| r.inputs = vec![Entry::default(); limits::INPUTS + 1]);
    refused(f, "outputs", |r| r.outputs = vec![String::new(); limits::OUTPUTS + 1]);
    refused(f, "scratch paths", |r| r.scratch_paths = vec![String::new(); limits::SCRATCH_PATHS + 1]);
    refused(f, "host paths", |r| ro_paths(r, vec!["/x".to_owned(); limits::RO_PATHS + 1]));
    refused(f, "additional files", |r| r.additional_files = vec![added(""); limits::ADDITIONAL_FILES + 1]);
    refused(f, "needles", |r| r.refscan_needles = vec!["x".to_owned(); limits::NEEDLES + 1]);
    refused(f, "bytes of needles", |r| r.refscan_needles = vec!["x".repeat(limits::NEEDLE_BYTES + 1)]);
    refused(f, "an empty needle", |r| r.refscan_needles = vec![String::new()]);
    match oversized(stage).await {
        Ok(more) => findings.absorb(more),
        Err(outcome) => return findings.outcome().and(outcome),
    }
    findings.outcome()
}

/// Messages over the wire that are larger than a daemon takes, and larger than most servers would take by default.
async fn oversized(stage: &Stage<'_>) -> Result<Findings, Outcome> {
    use wire::build_service_client::BuildServiceClient;
    let mut findings = Findings::default();
    let place = Place::new(stage)?;
    let _daemon = place.daemon(stage, &["--no-builds"]).await?;
    let channel = place.address().connect().await.map_err(|error| Outcome::broken(error.to_string()))?;
    for (what, bytes, code) in [
        ("5 MiB", 5 << 20, tonic::Code::FailedPrecondition),
        (
            "more than a message may have",
            crate::server::build_service::MAX_REQUEST_BYTES + 1,
            tonic::Code::OutOfRange,
        ),
    ] {
        let mut request = valid();
        request.additional_files =
            vec![AdditionalFile { path: "build/x".to_owned(), contents: vec![0; bytes] }];
        let answer = BuildServiceClient::new(channel.clone()).do_build(request).await;
        let seen = answer.err().map(|status| status.code());
        findings.same(&format!("the answer to a request of {what}"), seen, Some(code));
    }
    Ok(findings)
}

/// How many names of builds are compared.
const BUILDS: usize = 8;

async fn names_and_messages(stage: &Stage<'_>) -> Outcome {
    let mut findings = Findings::default();
    let mut ids = Vec::new();
    for _ in 0..BUILDS {
        let Ok(draft) = stage.draft("", &[]) else { return Outcome::broken("no request") };
        match stage.start(draft).await {
            Ok(build) => ids.push(build.id().to_owned()),
            Err(fault) => findings.check(false, format_args!("a build is refused: {fault}")),
        }
    }
    for (at, id) in ids.iter().enumerate() {
        let plain = id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
        findings.check(plain, format_args!("{id} is not 128 bits"));
        for other in ids.iter().skip(at + 1) {
            // Of 32 random digits two are expected to agree.
            let same = id.bytes().zip(other.bytes()).filter(|(a, b)| a == b).count();
            findings.check(same < 16, format_args!("{id} and {other} are alike"));
        }
    }
    let dir = stage.theatre.dir.display().to_string();
    for (what, message) in messages(stage).await {
        findings.check(!message.is_empty(), format_args!("{what}: no message"));
        findings.check(!message.contains(&dir), format_args!("{what}: the message tells a path: {message}"));
    }
    findings.outcome()
}

/// What clients are told when something goes wrong.
async fn messages(stage: &Stage<'_>) -> Vec<(&'static str, String)> {
    type Change = fn(&mut crate::build::request::Draft);
    let cases: [(&'static str, Change); 5] = [
        ("a program that is not there", |draft| draft.command = vec![b"/nowhere".to_vec()]),
        ("a program that is no program", |draft| draft.command = vec![b"/etc/passwd".to_vec()]),
        ("an output that is not made", |draft| draft.outputs.push(path("build/nothing"))),
        ("an input that is not there", |draft| {
            let node = Node::File { digest: Digest::of(b"not there"), size: 9, executable: false };
            draft.inputs.insert(name("missing"), node);
        }),
        ("a host path that is not allowed", |draft| draft.constraints.ro_paths.push("/etc".into())),
    ];
    let mut messages = Vec::new();
    for (what, change) in cases {
        let Ok(mut draft) = stage.draft("", &[]) else { continue };
        change(&mut draft);
        let message = match stage.run(draft).await.end {
            End::Completed(_) => String::new(),
            End::Failed(failure) => failure.message,
            End::Fault(fault) => fault.to_string(),
        };
        messages.push((what, message));
    }
    messages
}
