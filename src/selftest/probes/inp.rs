//! INP: inputs, which are other people's, and the store behind them.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use cofferdam_sandbox::attack::{Arg, Call};
use nix::errno::Errno;
use nix::fcntl::OFlag;

use super::out::{Stored, store_file};
use super::tools::{hold, names, open_with, until_holding};
use crate::build::error::FaultKind;
use crate::build::request::Draft;
use crate::castore::{Directory, Node};
use crate::selftest::faults::Fault as StoreFault;
use crate::selftest::stage::{End, Stage, name};
use crate::selftest::{Act, Company, Findings, Outcome, Play, Probe, Weight};

pub(super) const PROBES: &[Probe] = &[
    Probe {
        id: "INP-01",
        promise: "however a build tampers with its inputs, the next build and the store see them as they were",
        weight: Weight::Required,
        company: Company::Shared,
        attack: tamper,
        play: Play::Script(|stage| Box::pin(tampered_with(stage))),
    },
    Probe {
        id: "INP-02",
        promise: "memory that the kernel keeps of an input's contents can't be changed through pipes or maps",
        weight: Weight::Required,
        company: Company::Shared,
        attack: poison_cache,
        play: Play::Script(|stage| Box::pin(tampered_with(stage))),
    },
    Probe {
        id: "INP-03",
        promise: "where the store fails a build, it is the worker's fault and not the build's, whatever that says",
        weight: Weight::Required,
        company: Company::Shared,
        attack: use_broken_input,
        play: Play::Script(|stage| Box::pin(failing_store(stage))),
    },
];

/// A tree among the inputs, and a file.
const TREE: &str = "some-tree";
const FILE: &str = "some-file";
/// What all files of it contain: more than a page.
const LINE: &[u8] = b"this is what was put into the store\n";
const LINES: usize = 1000;
/// What an attacker would rather have there.
const FOREIGN: &[u8] = b"tampered";

fn at(which: &str) -> PathBuf {
    Path::new("/nix/store").join(which)
}

/// The tree's files, and the file.
const FILES: [&str; 4] = ["some-tree/file", "some-tree/program", "some-tree/sub/inner", FILE];

async fn tampered_with(stage: &Stage<'_>) -> Outcome {
    let (file, tree) = match inputs(stage) {
        Ok(inputs) => inputs,
        Err(outcome) => return outcome,
    };
    let with_inputs = |role: &str| -> Result<Draft, Outcome> {
        let mut draft = stage.draft(role, &[]).map_err(|fault| Outcome::broken(fault.to_string()))?;
        draft.inputs.extend([(name(FILE), file.clone()), (name(TREE), tree.clone())]);
        Ok(draft)
    };
    let played = async {
        let start = stage.start(with_inputs("")?).await;
        let attacker = until_holding(start.map_err(|fault| Outcome::broken(fault.to_string()))?).await?;
        let said = Findings::read(&attacker.stdout).map(Findings::outcome);
        let mut outcome = said.unwrap_or_else(|| Outcome::broken("the attack said nothing"));
        // While the attacker still has everything open, and when it is gone.
        outcome = outcome.and(stage.run(with_inputs("look")?).await.verdict());
        drop(attacker);
        Ok(outcome.and(stage.run(with_inputs("look")?).await.verdict()))
    };
    let outcome = played.await.unwrap_or_else(|outcome| outcome);
    let mut stored = Stored::new(stage);
    let contents = stored.contents(Some(&file));
    stored.findings.check(contents == LINE.repeat(LINES), "the store has other contents");
    outcome.and(stored.findings.outcome())
}

/// Puts a file into the store, and a tree of such files.
fn inputs(stage: &Stage<'_>) -> Result<(Node, Node), Outcome> {
    let file = store_file(stage, &LINE.repeat(LINES))?;
    let broken = |error: &dyn std::fmt::Display| Outcome::broken(format!("can't prepare: {error}"));
    let Node::File { digest, size, .. } = file else { return Err(Outcome::broken("a file is none")) };
    let (mut sub, mut tree) = (Directory::new(), Directory::new());
    let program = Node::File { digest, size, executable: true };
    sub.insert(name("inner"), file.clone()).map_err(|error| broken(&error))?;
    for (at, node) in [("file", file.clone()), ("program", program), ("sub", sub.node())] {
        tree.insert(name(at), node).map_err(|error| broken(&error))?;
    }
    let node = tree.node();
    stage.theatre.worker.store.directories.put(vec![sub, tree]).map_err(|error| broken(&error))?;
    Ok((file, node))
}

/// What every build is to see.
fn look(findings: &mut Findings) {
    for which in FILES {
        if let Some(seen) = findings.works(&format!("read {which}"), fs::read(at(which))) {
            findings.check(seen == LINE.repeat(LINES), format_args!("{which} has other contents"));
        }
        let mode = if which.ends_with("program") { 0o555 } else { 0o444 };
        if let Some(seen) = findings.works("look at it", fs::metadata(at(which))) {
            findings.same(&format!("mode of {which}"), seen.permissions().mode() & 0o7777, mode);
        }
    }
    for (dir, expected) in [(TREE, vec!["file", "program", "sub"]), ("some-tree/sub", vec!["inner"])] {
        if let Some(seen) = findings.works(&format!("list {dir}"), names(at(dir))) {
            findings.same(&format!("entries of {dir}"), seen.iter().map(String::as_str).collect(), expected);
        }
    }
}

/// Tells what was found, and holds on to everything.
fn tell_and_hold(findings: &Findings) {
    let _ = findings.write(io::stdout());
    hold();
}

fn tamper(act: &Act, findings: &mut Findings) {
    if act.role == "look" {
        return look(findings);
    }
    let mut open = Vec::new();
    for which in FILES {
        open.extend(through_descriptors(&at(which), findings));
    }
    for which in FILES {
        by_name(&at(which));
    }
    for dir in [TREE, "some-tree/sub"] {
        let dir = at(dir);
        let _ = fs::set_permissions(&dir, Permissions::from_mode(0o777));
        let _ = fs::write(dir.join("new"), FOREIGN);
        let _ = fs::create_dir(dir.join("new-directory"));
        let _ = symlink("/etc/passwd", dir.join("new-link"));
        let _ = fs::rename(&dir, at("elsewhere"));
        let _ = fs::remove_dir_all(&dir);
    }
    tell_and_hold(findings);
}

/// Through a descriptor that was opened for reading nothing may be written, whatever the file system makes of names.
fn through_descriptors(path: &Path, findings: &mut Findings) -> Option<File> {
    let shown = path.display();
    let file = findings.works(&format!("open {shown}"), File::open(path))?;
    let fd = || Arg::Int(file.as_raw_fd().into());
    let length = (LINE.len() * LINES) as i64;
    let refused = [
        ("map it shared, to write", Call::MMAP_SHARED_WRITE.make(&mut [Arg::Int(length), fd()])),
        ("truncate it", Call::FTRUNCATE.make(&mut [fd(), Arg::Int(0)])),
        (
            "punch a hole into it",
            Call::FALLOCATE.make(&mut [fd(), Arg::Int(3), Arg::Int(0), Arg::Int(length)]),
        ),
        ("clone another over it", Call::CLONE_FILE.make(&mut [fd(), fd()])),
        ("change its flags", Call::SET_FILE_FLAGS.make(&mut [fd(), Arg::In(&0x10_u64.to_ne_bytes())])),
    ];
    for (act, result) in refused {
        findings.fails(&format!("{act}, {shown}"), result);
    }
    findings.fails(&format!("write to {shown}"), (&file).write_all(FOREIGN));
    findings
        .fails(&format!("change the owner of {shown}"), std::os::unix::fs::fchown(&file, Some(0), Some(0)));
    past_the_cache(path, findings);
    // Refused, or done to a copy of the build's own: the next build shows.
    let again = format!("/proc/self/fd/{}", file.as_raw_fd());
    let _ = OpenOptions::new().write(true).open(&again).and_then(|mut file| file.write_all(FOREIGN));
    let _ = file.set_permissions(Permissions::from_mode(0o777));
    let _ = file.set_modified(SystemTime::now());
    by_opening(path, findings);
    Some(file)
}

/// What lies on disk, not in memory.
fn past_the_cache(path: &Path, findings: &mut Findings) {
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_DIRECT);
    let mut seen = Vec::new();
    // Not every file system reads so, or any length.
    if options.open(path).is_ok_and(|mut file| file.read_to_end(&mut seen).is_ok()) {
        findings
            .check(seen == LINE.repeat(LINES), format_args!("{}: other contents on disk", path.display()));
    }
}

/// For writing an input can't be opened, unless that makes a copy of the build's own.
fn by_opening(path: &Path, findings: &mut Findings) {
    let refusals = [Errno::EROFS, Errno::EACCES, Errno::EPERM];
    for flags in [
        OFlag::O_WRONLY,
        OFlag::O_RDWR,
        OFlag::O_WRONLY | OFlag::O_APPEND,
        OFlag::O_RDWR | OFlag::O_DIRECT,
        OFlag::O_WRONLY | OFlag::O_TRUNC,
    ] {
        match open_with(path, flags) {
            Ok(fd) => drop(File::from(fd).write_all(FOREIGN)),
            refused => {
                findings.refused(&format!("open {} with {flags:?}", path.display()), refused, &refusals)
            }
        }
    }
}

/// Names in a directory of the build's own may come to mean something else, in this build alone.
fn by_name(path: &Path) {
    let _ = fs::set_permissions(path, Permissions::from_mode(0o777));
    let _ = fs::write(path, FOREIGN);
    let _ = fs::hard_link(path, at("link")).and_then(|()| fs::write(at("link"), FOREIGN));
    let _ = fs::remove_file(at("link"));
    let _ = fs::rename(path, at("renamed")).and_then(|()| fs::write(at("renamed"), FOREIGN));
    let _ = fs::remove_file(path);
    let _ = fs::write(path, FOREIGN);
}

fn poison_cache(act: &Act, findings: &mut Findings) {
    if act.role == "look" {
        return look(findings);
    }
    for which in FILES {
        findings.works(&format!("put {which} into a pipe"), through_pipe(&at(which)));
        findings.works(&format!("write to a private map of {which}"), through_private_map(&at(which)));
    }
    look(findings);
    tell_and_hold(findings);
}

/// As in CVE-2022-0847: a page of the file in a pipe whose slots were marked as writable before.
fn through_pipe(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    let (mut out, mut into) = io::pipe()?;
    let mut page = vec![0; 4096];
    for _ in 0..16 {
        into.write_all(&page)?;
    }
    for _ in 0..16 {
        out.read_exact(&mut page)?;
    }
    let (from, to) = (Arg::Int(file.as_raw_fd().into()), Arg::Int(into.as_raw_fd().into()));
    Call::SPLICE.make(&mut [from, to, Arg::Int(1), Arg::Int(0)])?;
    into.write_all(FOREIGN)
}

/// As in CVE-2016-5195, without the race: what is forced into a private map is a copy.
fn through_private_map(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    let (length, fd) = (Arg::Int(4096), Arg::Int(file.as_raw_fd().into()));
    let address = Call::MMAP_PRIVATE_READ.make(&mut [length, fd])?;
    let address = u64::try_from(address).map_err(io::Error::other)?;
    let memory = OpenOptions::new().write(true).open("/proc/self/mem");
    // Some kernels let nobody force it, which is as well.
    let _ = memory.and_then(|memory| memory.write_all_at(FOREIGN, address));
    Ok(())
}

/// An input that can't be read.
const BROKEN: &str = "broken-input";

fn use_broken_input(act: &Act, findings: &mut Findings) {
    let read = fs::read(at(BROKEN));
    match act.role.as_str() {
        "healed" => drop(findings.works("read the input", read)),
        // What a compiler does.
        "fails" if read.is_err() => std::process::exit(2),
        // What a careless build does: it goes on without.
        _ => findings.refused("read the input", read, &[Errno::EIO]),
    }
    if act.role == "goes-on" {
        findings.works("make an output", fs::write(at("out"), "without the input"));
    }
}

async fn failing_store(stage: &Stage<'_>) -> Outcome {
    let mut outcome = Outcome::Held;
    for role in ["fails", "goes-on"] {
        outcome = outcome.and(with_failing_blob(stage, role).await);
    }
    outcome
}

async fn with_failing_blob(stage: &Stage<'_>, role: &str) -> Outcome {
    // A blob of its own: what was read once may stay in memory for good.
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let node = match store_file(stage, format!("{role} {}", now.as_nanos()).as_bytes()) {
        Ok(node) => node,
        Err(outcome) => return outcome,
    };
    let Node::File { digest, .. } = node else { return Outcome::broken("a file is none") };
    let draft = |role: &str| {
        stage.draft(role, &[] as &[&OsStr]).map(|mut draft| {
            draft.inputs.insert(name(BROKEN), node.clone());
            draft
        })
    };
    let (Ok(mut failing), Ok(healed)) = (draft(role), draft("healed")) else {
        return Outcome::broken("no request");
    };
    if role == "goes-on" {
        failing.outputs = vec![crate::selftest::stage::path("nix/store/out")];
    }
    stage.theatre.faults.set(digest, StoreFault::Fails);
    let ended = stage.run(failing).await;
    stage.theatre.faults.heal(&digest);
    let mut findings = Findings::default();
    let excused = matches!(&ended.end, End::Fault(fault) if fault.kind() == FaultKind::Unavailable);
    findings.check(excused, format_args!("a build that {role}, its input broken: {}", ended.describe()));
    findings.outcome().and(stage.run(healed).await.verdict())
}
