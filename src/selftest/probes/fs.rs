//! FS: ways out of the sandbox's file system.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use cofferdam_sandbox::attack::{Arg, Call};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode as Bits, SFlag, makedev, mknod};
use nix::sys::statfs::{PROC_SUPER_MAGIC, statfs};
use nix::sys::statvfs::{FsFlags, statvfs};
use nix::unistd::{chdir, chroot, geteuid};

use super::tools::{c_string, hidden_init, names, nested, number, open_to_write, open_with};
use crate::build::error::Fault;
use crate::build::request::{Draft, SandboxPath};
use crate::castore::{Directory, Node, Target};
use crate::selftest::stage::{BUILD, End, PROGRAM, STORE, Stage, name, path};
use crate::selftest::{Act, Company, Findings, Mode, Outcome, Play, Probe, Weight};

pub(super) const PROBES: &[Probe] = &[
    Probe {
        id: "FS-01",
        promise: "a build sees no root directory but its own",
        weight: Weight::Required,
        company: Company::Shared,
        attack: own_root_only,
        play: Play::Plain,
    },
    Probe {
        id: "FS-02",
        promise: "a second chroot does not lead above the sandbox's root",
        weight: Weight::Required,
        company: Company::Shared,
        attack: double_chroot,
        play: Play::Plain,
    },
    Probe {
        id: "FS-03",
        promise: "mounts can't be taken off, moved or made writable, in a user namespace below either",
        weight: Weight::Required,
        company: Company::Shared,
        attack: locked_mounts,
        play: Play::Plain,
    },
    Probe {
        id: "FS-05",
        promise: "no file can be opened by a guessed handle",
        weight: Weight::Required,
        company: Company::Shared,
        attack: guessed_handles,
        play: Play::Plain,
    },
    Probe {
        id: "FS-06",
        promise: "of the store a build sees its declared inputs and nothing else",
        weight: Weight::Required,
        company: Company::Shared,
        attack: declared_inputs_only,
        play: Play::Script(|stage| Box::pin(with_undeclared_inputs(stage))),
    },
    Probe {
        id: "FS-07",
        promise: "symbolic links in inputs lead no mount and no file of the request to the host",
        weight: Weight::Required,
        company: Company::Shared,
        attack: |_, findings| findings.check(true, ""),
        play: Play::Script(|stage| Box::pin(planted_links(stage))),
    },
    Probe {
        id: "FS-08",
        promise: "a false /proc among the inputs deceives nobody",
        weight: Weight::Required,
        company: Company::Shared,
        attack: true_proc,
        play: Play::Request(with_false_proc),
    },
    Probe {
        id: "FS-09",
        promise: "a build can't open its scratch space to other users of the host",
        weight: Weight::Required,
        company: Company::Shared,
        attack: open_scratch,
        play: Play::Script(|stage| Box::pin(peek_at_scratch(stage))),
    },
    Probe {
        id: "FS-10",
        promise: "what a build leaves can be removed, and leads its removal nowhere else",
        weight: Weight::Required,
        company: Company::Shared,
        attack: set_traps,
        play: Play::Script(|stage| Box::pin(remove_traps(stage))),
    },
    Probe {
        id: "FS-12",
        promise: "the layers of an overlay can't be reached or marked from within",
        weight: Weight::Required,
        company: Company::Shared,
        attack: overlay_tricks,
        play: Play::Request(with_tree),
    },
    Probe {
        id: "FS-13",
        promise: "inputs bring no set-id bits or devices, and can't be copied up by writing to them",
        weight: Weight::Required,
        company: Company::Shared,
        attack: copy_up,
        play: Play::Request(with_tree),
    },
    Probe {
        id: "FS-14",
        promise: "/, /etc and /bin can't be written to",
        weight: Weight::Desired,
        company: Company::Shared,
        attack: read_only_root,
        play: Play::Plain,
    },
];

/// Names that a root directory of ours may hold.
const ROOT: [&str; 7] = ["bin", "build", "dev", "etc", "nix", "proc", "tmp"];

fn own_root_only(act: &Act, findings: &mut Findings) {
    for root in ["/", "/..", "/proc/self/root", "/proc/self/root/..", "/proc/2/root/"] {
        if let Some(seen) = findings.works(&format!("list {root}"), names(root)) {
            let foreign: Vec<&String> = seen.iter().filter(|name| !ROOT.contains(&name.as_str())).collect();
            findings.check(foreign.is_empty(), format_args!("{root} shows {foreign:?}"));
        }
    }
    match names("/proc/1/root/") {
        Ok(seen) => {
            let foreign: Vec<&String> = seen.iter().filter(|name| !ROOT.contains(&name.as_str())).collect();
            findings.check(foreign.is_empty(), format_args!("/proc/1/root shows {foreign:?}"));
        }
        refused => {
            let refusals = [&[Errno::EACCES, Errno::EPERM], hidden_init(act)].concat();
            findings.refused("list /proc/1/root", refused, &refusals);
        }
    }
    for old in
        ["/old_root", "/oldroot", "/.old", "/real-root", "/mnt", "/home", "/root", "/sys", "/run", "/var"]
    {
        findings.refused(&format!("look at {old}"), fs::symlink_metadata(old), &[Errno::ENOENT]);
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo");
    if let Some(mounts) = findings.works("read /proc/self/mountinfo", mounts) {
        let at_root = mounts.lines().filter(|line| line.split(' ').nth(4) == Some("/")).count();
        findings.same("mounts at /", at_root, 1);
    }
}

fn double_chroot(_: &Act, findings: &mut Findings) {
    let outside = ["etc/shadow", "home", "var", "usr", "root"];
    let before: Vec<bool> = outside.iter().map(|path| Path::new("/").join(path).exists()).collect();
    findings.same("paths of a host at /", before, vec![false; outside.len()]);
    if nested().is_none() {
        findings.refused("chroot", chroot("."), &[Errno::EPERM]);
        return;
    }
    findings.works("make a directory", fs::create_dir("jail"));
    findings.works("chroot to it", chroot("jail"));
    // The working directory is now outside of the root, the way of a classic escape.
    for _ in 0..64 {
        findings.works("go up", chdir(".."));
    }
    findings.works("chroot to where that leads", chroot("."));
    if let Some(seen) = findings.works("list it", names("/")) {
        let foreign: Vec<&String> = seen.iter().filter(|name| !ROOT.contains(&name.as_str())).collect();
        findings.check(foreign.is_empty(), format_args!("above the root there is {foreign:?}"));
        findings.check(seen.contains("proc"), "the way up does not end at the sandbox's root");
    }
}

fn locked_mounts(_: &Act, findings: &mut Findings) {
    let places = ["/", "/nix/store", "/build", "/tmp", "/proc", "/dev", "/dev/null", "/dev/shm"];
    let below = nested().is_some();
    let refusals: &[Errno] = match below {
        // Locked mounts are as good as none.
        true => &[Errno::EINVAL, Errno::EPERM, Errno::EBUSY],
        false => &[Errno::EPERM],
    };
    let none: Option<&str> = None;
    for place in places {
        if !Path::new(place).exists() {
            continue;
        }
        let flags = MntFlags::MNT_DETACH;
        // Detaching the root of a namespace of one's own is no way out; what lies under it is another root.
        if place != "/" {
            findings.refused(&format!("unmount {place}"), umount2(place, flags), refusals);
        }
        let remount = MsFlags::MS_REMOUNT | MsFlags::MS_BIND;
        match mount(none, place, none, remount, none) {
            Ok(()) => findings
                .check(!lost_flags(place), format_args!("remount {place}: it lost nosuid, nodev or ro")),
            refused => findings.refused(&format!("remount {place}"), refused, refusals),
        }
    }
    findings.refused(
        "move /nix/store",
        mount(Some("/nix/store"), "/build", none, MsFlags::MS_MOVE, none),
        refusals,
    );
    findings.fails("write to / afterwards", fs::write("/x", ""));
}

/// Whether a mount can now do what it could not.
fn lost_flags(place: &str) -> bool {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let options = mounts.lines().rev().find_map(|line| {
        let fields: Vec<&str> = line.split(' ').collect();
        (fields.get(4) == Some(&place)).then(|| fields.get(5).copied().unwrap_or_default().to_owned())
    });
    options.is_none_or(|options| !options.split(',').any(|option| option == "nosuid"))
}

fn guessed_handles(_: &Act, findings: &mut Findings) {
    // Length, type 1 (inode and generation), then the numbers: the root of an ext4, of an XFS, and a few more.
    for inode in [1_u32, 2, 3, 64, 128, 256] {
        let mut handle = vec![0; 8 + 128];
        for (at, value) in [(0, 8_u32), (4, 1), (8, inode), (12, 0)] {
            number(&mut handle, at, value);
        }
        for mount in ["/", "/build", "/nix/store", "/tmp", "/dev/null"] {
            use std::os::fd::AsRawFd;
            let Some(fd) = findings.works(&format!("open {mount}"), open_with(mount, OFlag::O_RDONLY)) else {
                continue;
            };
            let mut arguments =
                [Arg::Int(fd.as_raw_fd().into()), Arg::In(&handle), Arg::Int(OFlag::O_RDONLY.bits().into())];
            let act = format!("open inode {inode} of {mount} by handle");
            findings.refused(
                &act,
                Call::OPEN_BY_HANDLE_AT.make(&mut arguments),
                &[Errno::EPERM, Errno::ENOSYS],
            );
        }
    }
}

const UNDECLARED: &str = "undeclared-input";

async fn with_undeclared_inputs(stage: &Stage<'_>) -> Outcome {
    // It is in the store, and another build is shown it at this very time.
    let node = match stage.ingest(Path::new("/etc/hosts")) {
        Ok(node) => node,
        Err(error) => return Outcome::broken(format!("can't put a file into the store: {error}")),
    };
    let Ok(mut other) = stage.draft("hold", &[]) else { return Outcome::broken("no request") };
    other.inputs.insert(name(UNDECLARED), node);
    let mut other = match stage.start(other).await {
        Ok(other) => other,
        Err(fault) => return Outcome::broken(fault.to_string()),
    };
    if let Err(ended) = other.said("holding").await {
        return Outcome::broken(ended.describe());
    }
    let id = other.id().to_owned();
    stage.act("seek", &[OsStr::new(&id)]).await
}

fn declared_inputs_only(act: &Act, findings: &mut Findings) {
    if act.role == "hold" {
        findings.works("see the input", fs::metadata(Path::new("/nix/store").join(UNDECLARED)));
        super::tools::hold();
        return;
    }
    if let Some(seen) = findings.works("list /nix/store", names("/nix/store")) {
        findings.same("inputs", seen.into_iter().collect(), vec![PROGRAM.to_owned()]);
    }
    let id = act.arguments.first().cloned().unwrap_or_default();
    let store = Path::new("/nix/store");
    for way in [
        store.join(UNDECLARED),
        store.join("..").join("..").join(&id),
        store.join(&id),
        store.join(&id).join(UNDECLARED),
        Path::new("/nix").join(&id),
    ] {
        findings.refused(&format!("look at {}", way.display()), fs::symlink_metadata(&way), &[Errno::ENOENT]);
    }
}

/// A root file system from the castore, with links in it that lead to a place of the host which anyone may write to.
async fn planted_links(stage: &Stage<'_>) -> Outcome {
    let target = stage.theatre.shown().join("link-target");
    let made = fs::create_dir(&target)
        .and_then(|()| fs::set_permissions(&target, fs::Permissions::from_mode(0o777)));
    if let Err(error) = made {
        return Outcome::broken(format!("can't make {}: {error}", target.display()));
    }
    let mut outcome = Outcome::Held;
    for (what, change) in LINKED {
        let mut draft = match stage.draft("", &[]) {
            Ok(draft) => draft,
            Err(fault) => return Outcome::broken(fault.to_string()),
        };
        at_the_root(&mut draft);
        if let Err(reason) = change(stage, &mut draft, &target) {
            return Outcome::broken(format!("{what}: {reason}"));
        }
        let ended = stage.run(draft).await;
        outcome = outcome.and(match &ended.end {
            End::Fault(Fault::Invalid(_)) | End::Failed(_) => Outcome::Held,
            // A place inside of the sandbox of the same name is no escape.
            End::Completed(_) => Outcome::Held,
            End::Fault(_) => Outcome::broken(format!("{what}: {}", ended.describe())),
        });
        match names(&target) {
            Ok(seen) if seen.is_empty() => {}
            Ok(seen) => outcome = outcome.and(Outcome::broken(format!("{what}: made {seen:?} on the host"))),
            Err(error) => outcome = outcome.and(Outcome::broken(format!("{what}: {error}"))),
        }
    }
    // Removed with the battery's directory otherwise; a second run makes it anew.
    let _ = fs::remove_dir_all(&target);
    outcome
}

/// Puts the inputs at the root.
fn at_the_root(draft: &mut Draft) {
    draft.inputs_dir = SandboxPath::root();
    draft.scratch_paths = [path(BUILD)].into();
    if let Some(program) = draft.command.first_mut() {
        *program = format!("/{PROGRAM}").into_bytes();
    }
}

type Change = fn(&Stage<'_>, &mut Draft, &Path) -> Result<(), String>;

const LINKED: [(&str, Change); 6] = [
    ("a scratch path that is a link", |stage, draft, target| {
        link_at(stage, draft, "linked", target)?;
        draft.scratch_paths.insert(path("linked"));
        Ok(())
    }),
    ("a scratch path below a link", |stage, draft, target| {
        tree_with_link(stage, draft, target)?;
        draft.scratch_paths.insert(path("tree/link/scratch"));
        Ok(())
    }),
    ("an additional file below a link", |stage, draft, target| {
        tree_with_link(stage, draft, target)?;
        draft.additional_files.insert(path("tree/link/file"), b"planted".to_vec());
        Ok(())
    }),
    ("/build that is a link", |stage, draft, target| link_at(stage, draft, BUILD, target)),
    ("/dev that is a link", |stage, draft, target| link_at(stage, draft, "dev", target)),
    ("/etc that is a link", |stage, draft, target| link_at(stage, draft, "etc", target)),
];

fn link(target: &Path) -> Result<Node, String> {
    use std::os::unix::ffi::OsStrExt;
    let target = Target::new(target.as_os_str().as_bytes()).map_err(|error| error.to_string())?;
    Ok(Node::Symlink { target })
}

fn link_at(_: &Stage<'_>, draft: &mut Draft, at: &'static str, target: &Path) -> Result<(), String> {
    draft.inputs.insert(name(at), link(target)?);
    Ok(())
}

fn tree_with_link(stage: &Stage<'_>, draft: &mut Draft, target: &Path) -> Result<(), String> {
    let mut tree = Directory::new();
    tree.insert(name("link"), link(target)?).map_err(|error| error.to_string())?;
    let node = tree.node();
    stage.theatre.worker.store.directories.put(vec![tree]).map_err(|error| error.to_string())?;
    draft.inputs.insert(name("tree"), node);
    Ok(())
}

fn with_false_proc(stage: &Stage<'_>, draft: &mut Draft) -> Result<(), Outcome> {
    at_the_root(draft);
    let host = |error: &dyn std::fmt::Display| Outcome::broken(format!("can't prepare: {error}"));
    let dir = stage.theatre.dir.join("false-proc");
    let made = fs::create_dir_all(dir.join("self")).and_then(|()| {
        ["uid_map", "gid_map", "setgroups"]
            .iter()
            .try_for_each(|file| fs::write(dir.join("self").join(file), ""))
    });
    made.map_err(|error| host(&error))?;
    let node = stage.ingest(&dir).map_err(|error| host(&error));
    let _ = fs::remove_dir_all(&dir);
    draft.inputs.insert(name("proc"), node?);
    Ok(())
}

fn true_proc(_: &Act, findings: &mut Findings) {
    if let Some(found) = findings.works("statfs /proc", statfs("/proc")) {
        findings.same("type of /proc", found.filesystem_type(), PROC_SUPER_MAGIC);
    }
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    findings
        .check(map.lines().any(|line| line.split_whitespace().next() == Some("1000")), "no map of user 1000");
    findings.same("user", geteuid().as_raw(), 1000);
}

fn open_scratch(act: &Act, findings: &mut Findings) {
    if act.role == "peek" {
        // On the host, as another user.
        let Some(dir) = act.arguments.first().map(Path::new) else { return };
        findings.refused("list the scratch directory", fs::read_dir(dir), &[Errno::EACCES]);
        findings.refused("read a file in it", fs::read(dir.join("secret")), &[Errno::EACCES]);
        findings.refused("make a file in it", fs::write(dir.join("planted"), ""), &[Errno::EACCES]);
        return;
    }
    let open = |path: &str| fs::set_permissions(path, fs::Permissions::from_mode(0o777));
    findings.works("open /build", open("/build"));
    findings.works("write a file", fs::write("/build/secret", "secret"));
    findings.works("open it", open("/build/secret"));
    super::tools::hold();
}

async fn peek_at_scratch(stage: &Stage<'_>) -> Outcome {
    let Ok(draft) = stage.draft("", &[]) else { return Outcome::broken("no request") };
    let mut build = match stage.start(draft).await {
        Ok(build) => build,
        Err(fault) => return Outcome::broken(fault.to_string()),
    };
    if let Err(ended) = build.said("holding").await {
        return Outcome::broken(ended.describe());
    }
    let builds = stage.theatre.state().join("builds").join(build.id());
    let Some(secret) = find(&builds, "secret") else {
        return Outcome::broken(format!("there is no file of the build's below {}", builds.display()));
    };
    let mut findings = Findings::default();
    let state = stage.theatre.state();
    match fs::metadata(&state) {
        Ok(found) => {
            findings.check(
                found.mode() & 0o077 == 0,
                format_args!("the state directory has mode {:o}", found.mode()),
            );
            findings.same("owner of the state directory", found.uid(), geteuid().as_raw());
        }
        Err(error) => findings.check(false, format_args!("the state directory: {error}")),
    }
    let mut outcome = findings.outcome();
    let dir = secret.parent().unwrap_or(&builds);
    // The build's own user is another one than the worker's, but in mode single.
    let users = match (stage.theatre.mode, fs::metadata(&secret)) {
        (Mode::Single, _) | (_, Err(_)) => Vec::new(),
        (Mode::Root, Ok(found)) => vec![found.uid(), 65534],
        (Mode::Range, Ok(found)) => vec![found.uid()],
    };
    for user in users {
        outcome = outcome.and(peek(stage, user, dir));
    }
    outcome
}

/// Tries to look into a directory as another user of the host.
fn peek(stage: &Stage<'_>, user: u32, dir: &Path) -> Outcome {
    let mut command = Command::new(stage.theatre.own_file());
    let (mode, profile) = (stage.theatre.mode.name(), stage.theatre.profile.name());
    command.args(["probe", stage.probe.id, "--mode", mode, "--profile", profile, "--role", "peek"]);
    command.args(["--token", "none", "--"]).arg(dir).uid(user).gid(user);
    match command.output() {
        Ok(output) => match Findings::read(&output.stdout) {
            Some(findings) => findings.outcome(),
            None => Outcome::broken(format!("user {user}: {}", String::from_utf8_lossy(&output.stderr))),
        },
        Err(error) => Outcome::broken(format!("can't run anything as user {user}: {error}")),
    }
}

/// A file of this name, somewhere below.
fn find(dir: &Path, name: &str) -> Option<PathBuf> {
    fs::read_dir(dir).ok()?.flatten().find_map(|entry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => find(&entry.path(), name),
        _ => (entry.file_name() == name).then(|| entry.path()),
    })
}

/// How long the removal of all that may take.
const REMOVAL_PATIENCE: Duration = Duration::from_secs(20);

/// How many directories lie in one another.
const DEPTH: usize = 10_000;

fn set_traps(act: &Act, findings: &mut Findings) {
    let Some(precious) = act.arguments.first().map(Path::new) else { return };
    let all = || -> io::Result<()> {
        symlink(precious, "/build/link")?;
        symlink("..", "/build/up")?;
        symlink("/", "/nix/store/root")?;
        // What the worker has put there itself.
        fs::remove_file("/build/additional")?;
        symlink(precious.join("file"), "/build/additional")?;
        fs::create_dir_all("/build/closed/inner")?;
        fs::write("/build/closed/inner/file", "")?;
        for (path, mode) in
            [("/build/closed/inner/file", 0), ("/build/closed/inner", 0), ("/build/closed", 0o555)]
        {
            fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
        }
        for _ in 0..DEPTH {
            fs::create_dir("d")?;
            std::env::set_current_dir("d")?;
        }
        fs::write("bottom", "")
    };
    findings.works("set the traps", all());
}

async fn remove_traps(stage: &Stage<'_>) -> Outcome {
    let precious = stage.theatre.dir.join("precious");
    let file = precious.join("file");
    let made = fs::create_dir_all(&precious).and_then(|()| fs::write(&file, "precious"));
    let before = fs::metadata(&file).map(|found| (found.mode(), found.uid(), found.ino()));
    if let Err(error) = &made {
        return Outcome::broken(format!("can't prepare: {error}"));
    }
    let Ok(mut draft) = stage.draft("", &[precious.as_os_str()]) else {
        return Outcome::broken("no request");
    };
    draft.additional_files.insert(path("build/additional"), b"additional".to_vec());
    let mut build = match stage.start(draft).await {
        Ok(build) => build,
        Err(fault) => return Outcome::broken(fault.to_string()),
    };
    let left = stage.theatre.state().join("builds").join(build.id());
    let outcome = build.finish().await.verdict();
    let mut findings = Findings::default();
    let gone = super::tools::eventually(REMOVAL_PATIENCE, || !left.exists()).await;
    findings.check(gone, format_args!("the build's directory is still there: {:?}", names(&left)));
    let after = fs::metadata(&file).map(|found| (found.mode(), found.uid(), found.ino()));
    let same = matches!((&before, &after), (Ok(before), Ok(after)) if before == after);
    findings.check(same, format_args!("a file of the host: {after:?}, not {before:?}"));
    findings.check(
        fs::read(&file).is_ok_and(|bytes| bytes == b"precious"),
        "a file of the host has other contents",
    );
    let _ = fs::remove_dir_all(&precious);
    outcome.and(findings.outcome())
}

const TREE: &str = "some-input";

/// Adds an input with a file and an executable.
fn with_tree(stage: &Stage<'_>, draft: &mut Draft) -> Result<(), Outcome> {
    let fail = |error: &dyn std::fmt::Display| Outcome::broken(format!("can't prepare: {error}"));
    let Node::File { digest, size, .. } =
        stage.ingest(Path::new("/etc/passwd")).map_err(|error| fail(&error))?
    else {
        return Err(Outcome::broken("/etc/passwd is no file"));
    };
    let mut tree = Directory::new();
    for (at, executable) in [("file", false), ("program", true)] {
        tree.insert(name(at), Node::File { digest, size, executable }).map_err(|error| fail(&error))?;
    }
    draft.inputs.insert(name(TREE), tree.node());
    stage.theatre.worker.store.directories.put(vec![tree]).map_err(|error| fail(&error)).map(drop)
}

fn overlay_tricks(_: &Act, findings: &mut Findings) {
    let store = Path::new("/").join(STORE);
    let whiteout = mknod(&store.join("whiteout"), SFlag::S_IFCHR, Bits::S_IRUSR, makedev(0, 0));
    findings.refused("make a whiteout", whiteout, &[Errno::EPERM]);
    findings.works("make a directory", fs::create_dir(store.join("mine")));
    for attribute in [c"user.overlay.redirect", c"user.overlay.opaque", c"trusted.overlay.opaque"] {
        let at = c_string(store.join("mine"));
        let mut arguments = [Arg::Str(&at), Arg::Str(attribute), Arg::In(b"/etc"), Arg::Int(0)];
        match Call::SETXATTR.make(&mut arguments) {
            // Stored for the layer above, which is none: the entry must stay what it was.
            Ok(_) => {
                findings.same("a marked directory", names(store.join("mine")).unwrap_or_default().len(), 0)
            }
            refused => findings.refused("mark a directory", refused, &[Errno::EPERM, Errno::ENOTSUP]),
        }
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let layers = mounts.split([',', ' ', '\n']).filter_map(|option| {
        let (key, value) = option.split_once('=')?;
        ["lowerdir", "upperdir", "workdir"].contains(&key).then_some(value)
    });
    for layer in layers.flat_map(|value| value.split(':')).filter(|layer| layer.starts_with('/')) {
        findings.refused(
            &format!("look at the layer {layer}"),
            fs::symlink_metadata(layer),
            &[Errno::ENOENT],
        );
    }
    for up in ["/..", "/../..", "/nix/store/..", "/build/.."] {
        let seen = names(up).unwrap_or_default();
        let layers: Vec<&String> = seen
            .iter()
            .filter(|name| ["upper", "work", "lower", "scratch"].contains(&name.as_str()))
            .collect();
        findings.check(layers.is_empty(), format_args!("{up} shows the layers {layers:?}"));
    }
    let input = store.join(TREE);
    findings.fails("rename an input's file", fs::rename(input.join("file"), input.join("other")));
    findings.fails("rename a file into an input", fs::rename(store.join("mine"), input.join("mine")));
}

fn copy_up(_: &Act, findings: &mut Findings) {
    let input = Path::new("/").join(STORE).join(TREE);
    for file in [input.join("file"), input.join("program"), Path::new("/").join(STORE).join(PROGRAM)] {
        let name = file.display();
        if let Some(found) = findings.works(&format!("look at {name}"), fs::symlink_metadata(&file)) {
            findings.check(found.mode() & 0o7000 == 0, format_args!("{name} has mode {:o}", found.mode()));
            findings.check(found.file_type().is_file(), format_args!("{name} is no regular file"));
            findings.check(found.uid() != 1000, format_args!("{name} belongs to the build"));
        }
        let refusals = [Errno::EACCES, Errno::EPERM, Errno::EROFS, Errno::EOVERFLOW];
        findings.refused(&format!("open {name} for writing"), open_to_write(&file), &refusals);
        let mode = fs::Permissions::from_mode(0o755);
        findings.refused(&format!("chmod {name}"), fs::set_permissions(&file, mode), &refusals);
        findings.refused(
            &format!("chown {name}"),
            std::os::unix::fs::lchown(&file, Some(1000), None),
            &refusals,
        );
        findings.refused(&format!("remove {name}"), fs::remove_file(&file), &refusals);
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for line in mounts.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let (Some(at), Some(options)) = (fields.get(4), fields.get(5)) else { continue };
        let has = |option| options.split(',').any(|other| other == option);
        findings.check(has("nosuid"), format_args!("{at} is mounted without nosuid"));
        // Device nodes of the host, and those of pseudo terminals, are there to be used.
        findings
            .check(has("nodev") || at.starts_with("/dev/"), format_args!("{at} is mounted without nodev"));
    }
}

fn read_only_root(_: &Act, findings: &mut Findings) {
    // By the mount, not only by who owns it.
    if let Some(found) = findings.works("look at the mount of /", statvfs("/")) {
        findings.check(found.flags().contains(FsFlags::ST_RDONLY), "/ is not mounted read-only");
    }
    let refusals = [Errno::EACCES, Errno::EROFS, Errno::EPERM];
    for file in ["/x", "/etc/x", "/etc/passwd", "/nix/x", "/bin/sh", "/usr/x", "/var/x", "/dev/x"] {
        // Where there is no such directory, none must be made either.
        let allowed = [refusals.as_slice(), &[Errno::ENOENT]].concat();
        findings.refused(&format!("write {file}"), fs::write(file, "x"), &allowed);
    }
    for dir in ["/x", "/bin/x", "/usr", "/var", "/home", "/homeless-shelter"] {
        let allowed = [refusals.as_slice(), &[Errno::ENOENT]].concat();
        findings.refused(&format!("make {dir}"), fs::create_dir(dir), &allowed);
    }
    findings.refused("remove /etc/passwd", fs::remove_file("/etc/passwd"), &refusals);
    findings.refused(
        "rename /etc",
        fs::rename("/etc", "/build/etc"),
        &[Errno::EACCES, Errno::EROFS, Errno::EPERM, Errno::EXDEV],
    );
}
