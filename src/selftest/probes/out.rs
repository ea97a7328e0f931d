//! OUT: hostile outputs, on their way into the store.

use std::ffi::OsStr;
use std::fs::{self, File, FileTimes, Permissions};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;
use nix::sys::stat::{Mode as Bits, SFlag, makedev, mknod};
use nix::unistd::mkfifo;

use super::tools::{eventually, names};
use crate::build::events::Output;
use crate::castore::{Digest, Directory, Node, Target};
use crate::selftest::stage::{End, Ended, Stage, name, path};
use crate::selftest::{Act, Company, Findings, Outcome, Play, Probe, Weight};

pub(super) const PROBES: &[Probe] = &[
    Probe {
        id: "OUT-01",
        promise: "symbolic links in outputs are stored as such, wherever they lead",
        weight: Weight::Required,
        company: Company::Shared,
        attack: links,
        play: Play::Script(|stage| Box::pin(links_stored(stage))),
    },
    Probe {
        id: "OUT-03",
        promise: "nobody changes an output while it is stored: what is left of the build is dead before",
        weight: Weight::Required,
        company: Company::Shared,
        attack: keep_changing,
        play: Play::Script(|stage| Box::pin(stored_at_rest(stage))),
    },
    Probe {
        id: "OUT-04",
        promise: "pipes, sockets and devices in outputs are refused by name, and never waited for",
        weight: Weight::Required,
        company: Company::Shared,
        attack: special_file,
        play: Play::Script(|stage| Box::pin(special_files_refused(stage))),
    },
    Probe {
        id: "OUT-05",
        promise: "a hard link in an output leads to no file but the build's own",
        weight: Weight::Required,
        company: Company::Shared,
        attack: foreign_hard_link,
        play: Play::Script(|stage| Box::pin(foreign_files_unchanged(stage))),
    },
    Probe {
        id: "OUT-06",
        promise: "a file with several names is stored under each, also across outputs",
        weight: Weight::Desired,
        company: Company::Shared,
        attack: own_hard_links,
        play: Play::Script(|stage| Box::pin(hard_links_stored(stage))),
    },
    Probe {
        id: "OUT-07",
        promise: "of an output's permissions nothing is stored but whether its owner may execute it",
        weight: Weight::Required,
        company: Company::Shared,
        attack: odd_permissions,
        play: Play::Script(|stage| Box::pin(permissions_dropped(stage))),
    },
    Probe {
        id: "OUT-09",
        promise: "large, long-named and deep trees are stored, or refused by a limit that is told",
        weight: Weight::Desired,
        company: Company::Shared,
        attack: huge_tree,
        play: Play::Script(|stage| Box::pin(huge_trees(stage))),
    },
    Probe {
        id: "OUT-10",
        promise: "names of any bytes are stored as they are, and escaped in messages",
        weight: Weight::Required,
        company: Company::Shared,
        attack: odd_names,
        play: Play::Script(|stage| Box::pin(names_stored(stage))),
    },
    Probe {
        id: "OUT-11",
        promise: "outputs of every kind are stored, missing ones told, and of failed builds nothing stays",
        weight: Weight::Desired,
        company: Company::Shared,
        attack: roots,
        play: Play::Script(|stage| Box::pin(roots_stored(stage))),
    },
    Probe {
        id: "OUT-13",
        promise: "references are found wherever they stand: across reads, in names, in targets of links",
        weight: Weight::Required,
        company: Company::Shared,
        attack: references,
        play: Play::Script(|stage| Box::pin(references_found(stage))),
    },
];

/// What an output is called, and where.
const OUT: &str = "nix/store/out";
/// The same, as the attack calls it.
const AT: &str = "/nix/store/out";
/// A second one.
const OTHER: &str = "nix/store/other";

/// Bytes as a path.
fn odd(bytes: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(bytes))
}

/// A build with these outputs, whose attack found nothing wrong.
///
/// # Errors
/// How the probe ends otherwise.
async fn outputs_of(stage: &Stage<'_>, role: &str, at: &[&'static str]) -> Result<Vec<Output>, Outcome> {
    let ended = build_of(stage, role, at, &[]).await;
    match (ended.verdict(), ended.end) {
        (Outcome::Held, End::Completed(outputs)) => Ok(outputs),
        (Outcome::Held, _) => Err(Outcome::broken("the build made no outputs")),
        (other, _) => Err(other),
    }
}

async fn build_of(stage: &Stage<'_>, role: &str, at: &[&'static str], needles: &[Vec<u8>]) -> Ended {
    match stage.draft(role, &[]) {
        Ok(mut draft) => {
            draft.outputs = at.iter().copied().map(path).collect();
            draft.needles = needles.to_vec();
            stage.run(draft).await
        }
        Err(fault) => panic!("{fault}"),
    }
}

/// What a build stored, to be looked at.
pub(super) struct Stored<'a> {
    stage: &'a Stage<'a>,
    pub(super) findings: Findings,
}

impl<'a> Stored<'a> {
    pub(super) fn new(stage: &'a Stage<'a>) -> Self {
        Self { stage, findings: Findings::default() }
    }

    fn directory(&mut self, node: Option<&Node>) -> Arc<Directory> {
        let found = match node {
            Some(Node::Directory { digest, .. }) => self.stage.theatre.worker.store.directories.get(digest),
            _ => Ok(None),
        };
        let found = self.findings.works("read a directory of the store", found);
        self.findings.check(matches!(found, Some(Some(_))), format_args!("no directory: {node:?}"));
        found.flatten().unwrap_or_default()
    }

    /// The contents of a file, which are read and compared with its digest.
    pub(super) fn contents(&mut self, node: Option<&Node>) -> Vec<u8> {
        let Some(Node::File { digest, size, .. }) = node else {
            self.findings.check(false, format_args!("no file: {node:?}"));
            return Vec::new();
        };
        let read = || -> io::Result<Vec<u8>> {
            let blob = self.stage.theatre.worker.store.blobs.open(digest).map_err(io::Error::other)?;
            let blob = blob.ok_or(io::ErrorKind::NotFound)?;
            let mut bytes = vec![0; usize::try_from(blob.size()).map_err(io::Error::other)?];
            blob.read_at(&mut bytes, 0)?;
            Ok(bytes)
        };
        let bytes = read();
        let bytes = self.findings.works("read a blob of the store", bytes).unwrap_or_default();
        self.findings.same("bytes of a blob", bytes.len() as u64, *size);
        self.findings.check(Digest::of(&bytes) == *digest, "a blob is not what its digest says");
        bytes
    }

    fn link(&mut self, directory: &Directory, at: &[u8], target: &[u8]) {
        let found = match directory.get(at) {
            Some(Node::Symlink { target }) => target.as_bytes(),
            _ => b"(no link)",
        };
        self.findings.same(&format!("target of {}", at.escape_ascii()), found, target);
    }
}

/// Names of links, and where they lead.
const LINKS: [(&[u8], &[u8]); 7] = [
    (b"shadow", b"/etc/shadow"),
    (b"up", b"../../../../../../../../etc"),
    (b"self", b"self"),
    (b"here", b"."),
    (b"proc", b"/proc/self/root/etc/shadow"),
    (b"dangling", b"/nowhere"),
    (b"odd", b"a\n\xff\x1b[31m"),
];

fn links(_: &Act, findings: &mut Findings) {
    let made = || -> io::Result<()> {
        symlink("/etc/shadow", Path::new("/").join(OTHER))?;
        fs::create_dir_all(Path::new(AT).join("deep/er"))?;
        for dir in ["", "deep/er"] {
            LINKS
                .iter()
                .try_for_each(|(at, target)| symlink(odd(target), Path::new(AT).join(dir).join(odd(at))))?;
        }
        Ok(())
    };
    findings.works("make links", made());
}

async fn links_stored(stage: &Stage<'_>) -> Outcome {
    let outputs = match outputs_of(stage, "", &[OUT, OTHER]).await {
        Ok(outputs) => outputs,
        Err(outcome) => return outcome,
    };
    let mut stored = Stored::new(stage);
    let root = stored.directory(outputs.first().map(|output| &output.node));
    let deep = stored.directory(root.get(b"deep"));
    let deeper = stored.directory(deep.get(b"er"));
    for (at, target) in LINKS {
        stored.link(&root, at, target);
        stored.link(&deeper, at, target);
    }
    let Ok(target) = Target::new("/etc/shadow") else { return Outcome::broken("no target") };
    let at_root = outputs.get(1).is_some_and(|output| output.node == Node::Symlink { target });
    stored.findings.check(at_root, "an output that is a link was not stored as one");
    stored.findings.outcome()
}

/// How long survivors go on, unless they are ended.
const CHANGING: Duration = Duration::from_secs(20);
/// How many files a tree has whose storing takes its time.
const MANY: usize = 300;

fn keep_changing(act: &Act, findings: &mut Findings) {
    let out = Path::new(AT);
    if act.role == "survivor" {
        return change_forever(out);
    }
    let made = || -> io::Result<()> {
        fs::create_dir_all(out.join("a-directory"))?;
        fs::write(out.join("a-directory/inner"), "inner")?;
        for n in 0..MANY {
            fs::write(out.join(format!("file-{n}")), [b'x'; 1000])?;
        }
        fs::write(out.join("grows"), "")?;
        let mut survivor = act.again("survivor");
        survivor.stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        survivor.spawn().map(drop)
    };
    if findings.works("make a tree", made()).is_some() {
        // The survivor is at it when the main process ends.
        let grown = || fs::metadata(out.join("grows")).is_ok_and(|found| found.len() > 0);
        let deadline = Instant::now() + Duration::from_secs(5);
        while !grown() && Instant::now() < deadline {
            std::thread::yield_now();
        }
        findings.check(grown(), "the survivor did not start");
    }
}

/// Directories become links, files pipes, and one file grows and shrinks.
fn change_forever(out: &Path) {
    let Ok(grows) = File::options().write(true).open(out.join("grows")) else { return };
    let deadline = Instant::now() + CHANGING;
    let mut n = 0;
    while Instant::now() < deadline {
        let _ = grows.write_all_at(&[b'g'; 4096], n % 64 * 4096);
        let file = out.join(format!("file-{}", n % MANY as u64));
        let _ = fs::remove_file(&file).and_then(|()| Ok(mkfifo(&file, Bits::S_IRWXU)?));
        let _ = fs::remove_file(&file).and_then(|()| fs::write(&file, [b'x'; 1000]));
        let (directory, aside) = (out.join("a-directory"), out.join("z-aside"));
        let _ = fs::rename(&directory, &aside).and_then(|()| symlink("/etc", &directory));
        let _ = fs::remove_file(&directory).and_then(|()| fs::rename(&aside, &directory));
        if n.is_multiple_of(100) {
            let _ = grows.set_len(1);
        }
        n += 1;
    }
}

async fn stored_at_rest(stage: &Stage<'_>) -> Outcome {
    let start = Instant::now();
    let ended = build_of(stage, "", &[OUT], &[]).await;
    let mut stored = Stored::new(stage);
    stored.findings.check(start.elapsed() < CHANGING / 2, "the build waited for what it left behind");
    match &ended.end {
        End::Completed(outputs) => {
            let root = stored.directory(outputs.first().map(|output| &output.node));
            let files: Vec<Node> = root.entries().map(|(_, node)| node.clone()).collect();
            for file in files.iter().filter(|node| matches!(node, Node::File { .. })) {
                stored.contents(Some(file));
            }
            // One of those may just have been away.
            stored.findings.check(files.len() >= MANY, format_args!("{} entries", files.len()));
        }
        // What the survivor had just made is seen as it was when it died.
        End::Failed(failure) if failure.message.contains("is a fifo") => stored.findings.check(true, ""),
        _ => stored.findings.check(false, ended.describe()),
    }
    stored.findings.check(stage.processes().is_empty(), "what the build left behind still runs");
    stored.findings.outcome()
}

/// Kinds of special files, and what is said of them.
const SPECIAL: [(&str, &str); 3] =
    [("fifo", "is a fifo"), ("socket", "is a socket"), ("whiteout", "is a whiteout")];

fn special_file(act: &Act, findings: &mut Findings) {
    let at = Path::new("/build/out/sub/special");
    findings.works("make a directory", fs::create_dir_all("/build/out/sub"));
    let device = |kind, number| mknod(Path::new("/build/device"), kind, Bits::S_IRWXU, number);
    match act.role.as_str() {
        "fifo" => drop(findings.works("make a fifo", mkfifo(at, Bits::S_IRWXU))),
        "socket" => drop(findings.works("make a socket", UnixListener::bind(at))),
        "whiteout" => match mknod(at, SFlag::S_IFCHR, Bits::S_IRWXU, makedev(0, 0)) {
            Ok(()) => findings.check(true, ""),
            // Nothing to be refused then: tell so by a special file of another kind.
            refused => {
                findings.refused("make a whiteout", refused, &[Errno::EPERM]);
                findings.works("make a fifo", mkfifo(at, Bits::S_IRWXU));
            }
        },
        _ => {
            findings.refused("make /dev/null", device(SFlag::S_IFCHR, makedev(1, 3)), &[Errno::EPERM]);
            findings.refused("make a disk", device(SFlag::S_IFBLK, makedev(8, 0)), &[Errno::EPERM]);
        }
    }
}

async fn special_files_refused(stage: &Stage<'_>) -> Outcome {
    let mut outcome = stage.act("", &[]).await;
    for (kind, words) in SPECIAL {
        let ended = build_of(stage, kind, &["build/out"], &[]).await;
        let mut findings = Findings::read(&ended.stdout).unwrap_or_default();
        let told = match &ended.end {
            End::Failed(failure) => {
                let message = &failure.message;
                message.contains("build/out/sub/special")
                    && (message.contains(words) || kind == "whiteout" && message.contains("is a fifo"))
            }
            _ => false,
        };
        findings.check(told, format_args!("{kind}: {}", ended.describe()));
        outcome = outcome.and(findings.outcome());
    }
    outcome
}

/// An input for hard links.
const INPUT: &str = "some-input";
const CONTENTS: &[u8] = b"an input's contents\n";

fn foreign_hard_link(act: &Act, findings: &mut Findings) {
    let input = Path::new("/nix/store").join(INPUT);
    if act.role == "after" {
        let read = fs::read(&input).unwrap_or_default();
        return findings.check(read == CONTENTS, "the input has other contents in the next build");
    }
    findings.works("make a directory", fs::create_dir(AT));
    let link = Path::new(AT).join("link");
    match fs::hard_link(&input, &link) {
        Ok(()) => {
            // A copy of the build's own, by the overlay: then it may do with it what it likes.
            let mine = fs::set_permissions(&link, Permissions::from_mode(0o600));
            if mine.is_ok() {
                let _ = fs::write(&link, "changed");
            }
            findings.check(true, "");
        }
        refused => {
            // Where no id in here is its owner, there is none for a copy.
            let refusals = [Errno::EXDEV, Errno::EPERM, Errno::EACCES, Errno::EOVERFLOW];
            findings.refused("link to an input", refused, &refusals);
        }
    }
    for foreign in ["/etc/passwd", "/proc/self/exe", "/dev/null", "/etc/group"] {
        let linked = fs::hard_link(foreign, Path::new(AT).join("foreign"));
        let errors = [Errno::EXDEV, Errno::EPERM, Errno::EACCES];
        findings.refused(&format!("link to {foreign}"), linked, &errors);
    }
}

async fn foreign_files_unchanged(stage: &Stage<'_>) -> Outcome {
    let node = match store_file(stage, CONTENTS) {
        Ok(node) => node,
        Err(outcome) => return outcome,
    };
    let mut outcome = Outcome::Held;
    for role in ["", "after"] {
        let Ok(mut draft) = stage.draft(role, &[]) else { return Outcome::broken("no request") };
        draft.inputs.insert(name(INPUT), node.clone());
        if role.is_empty() {
            draft.outputs = vec![path(OUT)];
        }
        outcome = outcome.and(stage.run(draft).await.verdict());
    }
    let mut stored = Stored::new(stage);
    stored.contents(Some(&node));
    outcome.and(stored.findings.outcome())
}

/// A file in the store.
pub(super) fn store_file(stage: &Stage<'_>, contents: &[u8]) -> Result<Node, Outcome> {
    let store = || -> io::Result<Node> {
        let mut writer = stage.theatre.worker.store.blobs.create().map_err(io::Error::other)?;
        writer.write_all(contents)?;
        let blob = writer.finish().map_err(io::Error::other)?;
        let (digest, size) = (blob.digest, blob.size);
        Ok(Node::File { digest, size, executable: false })
    };
    store().map_err(|error| Outcome::broken(format!("can't put a file into the store: {error}")))
}

fn own_hard_links(_: &Act, findings: &mut Findings) {
    let made = || -> io::Result<()> {
        fs::create_dir_all(Path::new(AT).join("sub"))?;
        let file = Path::new(AT).join("a");
        fs::write(&file, "linked")?;
        fs::hard_link(&file, Path::new(AT).join("sub/b"))?;
        fs::hard_link(&file, Path::new("/").join(OTHER))
    };
    findings.works("make hard links", made());
}

async fn hard_links_stored(stage: &Stage<'_>) -> Outcome {
    let outputs = match outputs_of(stage, "", &[OUT, OTHER]).await {
        Ok(outputs) => outputs,
        Err(outcome) => return outcome,
    };
    let expected = Node::File { digest: Digest::of(b"linked"), size: 6, executable: false };
    let mut stored = Stored::new(stage);
    let root = stored.directory(outputs.first().map(|output| &output.node));
    let sub = stored.directory(root.get(b"sub"));
    for (what, node) in [
        ("a", root.get(b"a")),
        ("sub/b", sub.get(b"b")),
        ("other", outputs.get(1).map(|output| &output.node)),
    ] {
        stored.findings.same(what, node, Some(&expected));
    }
    stored.findings.outcome()
}

/// Files of an output with odd permissions, and whether their owner may execute them.
const MODES: [(&str, u32, bool); 7] = [
    ("closed", 0o000, false),
    ("plain", 0o666, false),
    ("others-execute", 0o611, false),
    ("owner-executes", 0o100, true),
    ("set-uid", 0o4755, true),
    ("set-gid", 0o2755, true),
    ("sticky", 0o1644, false),
];

fn odd_permissions(_: &Act, findings: &mut Findings) {
    let out = Path::new(AT);
    findings.works("make a directory", fs::create_dir(out));
    nix::sys::stat::umask(Bits::empty());
    for (at, mode, _) in MODES {
        // Not chmod, of which the system call filter keeps set-id bits.
        let made = File::options().write(true).create_new(true).mode(mode).open(out.join(at));
        if let Some(mut file) = findings.works(&format!("make a file of mode {mode:04o}"), made) {
            findings.works("write to it", file.write_all(at.as_bytes()));
        }
    }
    let old = SystemTime::UNIX_EPOCH - Duration::from_secs(69 * 365 * 86_400);
    let new = SystemTime::UNIX_EPOCH + Duration::from_secs(476 * 365 * 86_400);
    for (at, time) in [("plain", old), ("owner-executes", new)] {
        let file = File::options().write(true).open(out.join(at));
        // Some file systems know no such times, and take the nearest.
        let _ = file.and_then(|file| file.set_times(FileTimes::new().set_modified(time)));
    }
    for (at, mode) in [("closed-directory", 0o000), ("set-gid-directory", 0o3777)] {
        findings.works("make a directory", fs::DirBuilder::new().mode(mode).create(out.join(at)));
    }
    findings.works("open the output to all", fs::set_permissions(out, Permissions::from_mode(0o777)));
}

async fn permissions_dropped(stage: &Stage<'_>) -> Outcome {
    let outputs = match outputs_of(stage, "", &[OUT]).await {
        Ok(outputs) => outputs,
        Err(outcome) => return outcome,
    };
    let mut expected = Directory::new();
    let mut added = Ok(());
    for (at, _, executable) in MODES {
        let node = Node::File { digest: Digest::of(at.as_bytes()), size: at.len() as u64, executable };
        added = added.and_then(|()| expected.insert(name(at), node));
    }
    for at in ["closed-directory", "set-gid-directory"] {
        added = added.and_then(|()| expected.insert(name(at), Directory::new().node()));
    }
    let mut findings = Findings::default();
    findings.works("say what is expected", added);
    let node = outputs.first().map(|output| &output.node);
    findings.same("the output", node, Some(&expected.node()));
    findings.outcome()
}

/// Entries of one directory: more than fit a page of anything.
const ENTRIES: usize = 5_000;
/// Levels that a tree may well have, and more than it may have.
const LEVELS: (usize, usize) = (300, 1000);
/// Levels of long names, whose path no system call takes.
const LONG_LEVELS: usize = 30;

fn huge_tree(act: &Act, findings: &mut Findings) {
    let nest = |level: &str, levels: usize| {
        (0..levels).try_for_each(|_| {
            fs::create_dir(level)?;
            std::env::set_current_dir(level)
        })
    };
    let made = || -> io::Result<()> {
        fs::create_dir(AT)?;
        std::env::set_current_dir(AT)?;
        match act.role.as_str() {
            "wide" => {
                (0..ENTRIES).try_for_each(|n| File::create(n.to_string()).map(drop))?;
                File::create("n".repeat(255))?;
                symlink("t".repeat(4095), "link")
            }
            "long" => {
                nest(&"l".repeat(255), LONG_LEVELS)?;
                fs::write("bottom", "bottom")
            }
            "deep" => nest("d", LEVELS.0),
            _ => nest("d", LEVELS.1),
        }
    };
    findings.works("make the tree", made());
}

async fn huge_trees(stage: &Stage<'_>) -> Outcome {
    let mut stored = Stored::new(stage);
    for (role, entry, levels) in
        [("wide", "", 0), ("long", &*"l".repeat(255), LONG_LEVELS), ("deep", "d", LEVELS.0)]
    {
        let outputs = match outputs_of(stage, role, &[OUT]).await {
            Ok(outputs) => outputs,
            Err(outcome) => return outcome,
        };
        let mut at = stored.directory(outputs.first().map(|output| &output.node));
        for _ in 0..levels {
            at = stored.directory(at.get(entry.as_bytes()));
        }
        match role {
            "wide" => {
                stored.findings.same("entries", at.entries().len(), ENTRIES + 2);
                stored.link(&at, b"link", &[b't'; 4095]);
            }
            "long" => {
                let bottom = stored.contents(at.get(b"bottom"));
                stored.findings.check(bottom == b"bottom", "the bottom is another");
            }
            _ => stored.findings.same("entries at the bottom", at.entries().len(), 0),
        }
    }
    let ended = build_of(stage, "too-deep", &[OUT], &[]).await;
    let told = matches!(&ended.end, End::Failed(failure) if failure.message.contains("lies too deep"));
    stored.findings.check(told, format_args!("{} levels: {}", LEVELS.1, ended.describe()));
    stored.findings.outcome()
}

/// Names that are hard to take for text.
const NAMES: [&[u8]; 12] = [
    b"not \xff\xfe text",
    b"new\nline",
    b"\x1b[31mred",
    b"-rf",
    b"back\\slash",
    b"case",
    b"CASE",
    b" ",
    b"\x01",
    b"...",
    b"\xc3\xa9",
    b"e\xcc\x81",
];

fn odd_names(act: &Act, findings: &mut Findings) {
    let out = Path::new(AT);
    findings.works("make a directory", fs::create_dir(out));
    match act.role.as_str() {
        "" => {
            for at in NAMES {
                findings.works(&format!("make {}", at.escape_ascii()), fs::write(out.join(odd(at)), at));
            }
        }
        _ => {
            let at = out.join(odd(b"b\xff\n\x1b[31m\x07"));
            findings.works("make a fifo", mkfifo(&at, Bits::S_IRWXU));
        }
    }
}

async fn names_stored(stage: &Stage<'_>) -> Outcome {
    let outputs = match outputs_of(stage, "", &[OUT]).await {
        Ok(outputs) => outputs,
        Err(outcome) => return outcome,
    };
    let mut stored = Stored::new(stage);
    let root = stored.directory(outputs.first().map(|output| &output.node));
    stored.findings.same("entries", root.entries().len(), NAMES.len());
    for at in NAMES {
        let node = Node::File { digest: Digest::of(at), size: at.len() as u64, executable: false };
        stored.findings.same(&at.escape_ascii().to_string(), root.get(at), Some(&node));
    }
    let ended = build_of(stage, "fifo", &[OUT], &[]).await;
    match &ended.end {
        End::Failed(failure) => {
            let plain =
                !failure.message.chars().any(char::is_control) && failure.message.contains("is a fifo");
            stored.findings.check(plain, format_args!("the message is {:?}", failure.message));
        }
        _ => stored.findings.check(false, ended.describe()),
    }
    stored.findings.outcome()
}

/// What a failed build wrote, and where.
const FORGOTTEN: &[u8] = b"the output of a build that fails";
const LITTER: &[u8] = b"what nobody asked for";

fn roots(act: &Act, findings: &mut Findings) {
    let at = |which: &str| Path::new("/nix/store").join(which);
    let made = || -> io::Result<()> {
        match act.role.as_str() {
            "kinds" => {
                fs::write(at("file"), "file")?;
                fs::write(at("executable"), "executable")?;
                fs::set_permissions(at("executable"), Permissions::from_mode(0o755))?;
                symlink("target", at("link"))?;
                fs::create_dir(at("empty"))?;
                fs::write(at("litter"), LITTER)
            }
            _ => fs::write(at("out"), FORGOTTEN),
        }
    };
    findings.works("make outputs", made());
    if act.role == "fails" {
        std::process::exit(3);
    }
}

async fn roots_stored(stage: &Stage<'_>) -> Outcome {
    let at = ["nix/store/file", "nix/store/executable", "nix/store/link", "nix/store/empty"];
    let outputs = match outputs_of(stage, "kinds", &at).await {
        Ok(outputs) => outputs,
        Err(outcome) => return outcome,
    };
    let file = |contents: &[u8], executable| Node::File {
        digest: Digest::of(contents),
        size: contents.len() as u64,
        executable,
    };
    let Ok(target) = Target::new("target") else { return Outcome::broken("no target") };
    let expected = vec![
        file(b"file", false),
        file(b"executable", true),
        Node::Symlink { target },
        Directory::new().node(),
    ];
    let mut findings = Findings::default();
    findings.same("outputs", outputs.into_iter().map(|output| output.node).collect(), expected);
    let ended = build_of(stage, "missing", &[OUT, OTHER], &[]).await;
    let named = matches!(&ended.end, End::Failed(failure) if failure.message.ends_with("did not make \"nix/store/other\""));
    findings.check(named, format_args!("a missing output: {}", ended.describe()));
    let left = match stage.draft("fails", &[]) {
        Ok(mut draft) => {
            draft.outputs = vec![path(OUT)];
            failed_build(stage, draft, &mut findings).await
        }
        Err(fault) => Some(fault.to_string()),
    };
    findings.check(left.is_none(), format_args!("a failed build left {left:?}"));
    for (what, contents) in [("of a failed build", FORGOTTEN), ("nobody asked for", LITTER)] {
        let stat = stage.theatre.worker.store.blobs.stat(&Digest::of(contents));
        findings.check(matches!(stat, Ok(None)), format_args!("a file {what} is in the store: {stat:?}"));
    }
    findings.outcome()
}

/// Carries out a build that fails. Yields what is left of it.
async fn failed_build(
    stage: &Stage<'_>,
    draft: crate::build::request::Draft,
    findings: &mut Findings,
) -> Option<String> {
    let mut build = match stage.start(draft).await {
        Ok(build) => build,
        Err(fault) => return Some(fault.to_string()),
    };
    let dir = stage.theatre.state().join("builds").join(build.id());
    let ended = build.finish().await;
    let failed = matches!(&ended.end, End::Failed(failure) if failure.exit_code == Some(3));
    findings.check(failed, format_args!("exit code 3: {}", ended.describe()));
    let gone = eventually(Duration::from_secs(5), || !dir.exists()).await;
    (!gone).then(|| format!("{:?}", names(&dir)))
}

/// How long references of Nix are.
const HASH_BYTES: usize = 32;
/// Needles beside those that are found.
const DECOYS: usize = 2_000;
/// What files are read in is a divisor of this.
const LARGEST_READ: usize = 1 << 20;

/// A needle: its number stands first, so that no two begin alike for long.
fn needle(number: usize) -> Vec<u8> {
    let mut needle = format!("{number:08}-abcdefghijklmnopqrstuvwxyz").into_bytes();
    needle.truncate(HASH_BYTES);
    needle
}

/// Powers of two at which reads and chunks may end.
fn edges() -> impl Iterator<Item = usize> {
    (9..=20).map(|power| 1 << power)
}

/// The needles that are looked for: those that are there come first.
fn needles() -> Vec<Vec<u8>> {
    let there = needles_there();
    let mut all: Vec<Vec<u8>> = (0..there).map(needle).collect();
    // In one another, and in each other's way.
    all.extend([b"nested-overlap".to_vec(), b"sted".to_vec(), b"overlapping".to_vec()]);
    all.extend((there..there + DECOYS).map(|number| needle(1_000_000 + number)));
    all
}

/// In an entry's name, a directory's name, a link's target, the end of a file, and at each edge.
fn needles_there() -> usize {
    4 + edges().count()
}

fn references(_: &Act, findings: &mut Findings) {
    let out = Path::new(AT);
    let named = |number: usize| String::from_utf8_lossy(&needle(number)).into_owned();
    let made = || -> io::Result<()> {
        fs::create_dir_all(out.join(format!("dir-{}-x", named(0))))?;
        fs::write(out.join(format!("x{}", named(1))), "")?;
        symlink(format!("/nix/store/{}-name", named(2)), out.join("link"))?;
        fs::write(out.join("overlap"), "..nested-overlapping..")?;
        let mut large = vec![b'.'; LARGEST_READ + HASH_BYTES];
        for (number, edge) in edges().enumerate() {
            let at = edge - 1 - number % (HASH_BYTES - 1);
            if let Some(place) = large.get_mut(at..at + HASH_BYTES) {
                place.copy_from_slice(&needle(4 + number));
            }
        }
        large.extend(needle(3));
        fs::write(out.join("large"), &large)?;
        // All but a byte of each decoy, again and again.
        let mut near = Vec::new();
        for number in 0..DECOYS {
            let decoy = needle(1_000_000 + needles_there() + number);
            near.extend_from_slice(decoy.get(..HASH_BYTES - 1).unwrap_or_default());
            near.extend_from_slice(decoy.get(..HASH_BYTES - 1).unwrap_or_default());
        }
        fs::write(out.join("near-misses"), &near)
    };
    findings.works("make the output", made());
}

async fn references_found(stage: &Stage<'_>) -> Outcome {
    let needles = needles();
    let ended = build_of(stage, "", &[OUT], &needles).await;
    let mut findings = Findings::default();
    if let End::Completed(outputs) = &ended.end {
        let found = outputs.first().map(|output| output.needles.clone()).unwrap_or_default();
        let expected: Vec<u64> = (0..needles_there() as u64 + 3).collect();
        let missed: Vec<u64> = expected.iter().copied().filter(|index| !found.contains(index)).collect();
        findings.check(missed.is_empty(), format_args!("needles {missed:?} were not found"));
        findings.check(found.len() <= expected.len(), format_args!("found {found:?}, which are not there"));
    }
    findings.outcome().and(ended.verdict())
}
