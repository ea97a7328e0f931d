//! CAP: capabilities, ids and groups.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown};
use std::path::Path;
use std::process::Command;

use cofferdam_sandbox::attack::{Arg, Call};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Gid, Pid, Uid, getgroups, getresgid, getresuid, setgid, setgroups, setuid};

use super::tools::{c_string, field, hold};
use crate::build::request::Draft;
use crate::selftest::host::GROUP_FILE;
use crate::selftest::stage::{Running, Stage};
use crate::selftest::{Act, Company, Findings, Mode, Outcome, Play, Probe, Weight};

pub(super) const PROBES: &[Probe] = &[
    Probe {
        id: "CAP-01",
        promise: "a build has no capability in any set, and no_new_privs",
        weight: Weight::Required,
        company: Company::Shared,
        attack: no_capabilities,
        play: Play::Plain,
    },
    Probe {
        id: "CAP-02",
        promise: "programs with set-id bits or file capabilities give a build nothing",
        weight: Weight::Required,
        company: Company::Shared,
        attack: set_id_programs,
        play: Play::Request(with_set_id_program),
    },
    Probe {
        id: "CAP-03",
        promise: "a build has none of the supplementary groups of the worker's user",
        weight: Weight::Required,
        company: Company::Shared,
        attack: no_groups,
        play: Play::Request(with_group_file),
    },
    Probe {
        id: "CAP-04",
        promise: "a build that kills all it can and uses up its user's limits harms no other build",
        weight: Weight::Required,
        company: Company::Alone,
        attack: exhaust_user,
        play: Play::Script(|stage| Box::pin(beside_exhaustion(stage))),
    },
    Probe {
        id: "CAP-05",
        promise: "a build is user 1000 and group 100, and can become nobody else",
        weight: Weight::Desired,
        company: Company::Shared,
        attack: own_ids_only,
        play: Play::Plain,
    },
];

fn no_capabilities(_: &Act, findings: &mut Findings) {
    // Where the build has pid 1's user id on the host, `/proc` does not show it pid 1.
    let hidden = fs::metadata("/proc/1").is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound);
    let seen: &[&str] =
        if hidden { &["/proc/self/status"] } else { &["/proc/self/status", "/proc/1/status"] };
    for status in seen {
        for set in ["CapEff", "CapPrm", "CapInh", "CapAmb", "CapBnd"] {
            let seen = field(status, set).unwrap_or_default();
            findings.same(&format!("{set} of {status}"), seen.as_str(), "0000000000000000");
        }
        findings.same(&format!("NoNewPrivs of {status}"), field(status, "NoNewPrivs").as_deref(), Some("1"));
    }
}

const SET_ID_PROGRAM: &str = "set-id-program";

/// A copy of this program that belongs to the worker's user, with set-id bits, among what builds may be shown.
fn with_set_id_program(stage: &Stage<'_>, draft: &mut Draft) -> Result<(), Outcome> {
    let program = stage.theatre.shown().join(SET_ID_PROGRAM);
    let made = fs::copy(stage.theatre.own_file(), &program)
        .and_then(|_| fs::set_permissions(&program, fs::Permissions::from_mode(0o6755)));
    made.map_err(|error| Outcome::broken(format!("can't make {}: {error}", program.display())))?;
    // All of them, permitted and effective: struct vfs_cap_data, version 2. Only root can do that; elsewhere the bits
    // alone are tried.
    let mut capabilities = [0_u8; 20];
    for (at, value) in [(0, 0x0200_0001_u32), (4, u32::MAX), (8, 0), (12, 0x1ff), (16, 0)] {
        super::tools::number(&mut capabilities, at, value);
    }
    let path = c_string(&program);
    let mut arguments =
        [Arg::Str(&path), Arg::Str(c"security.capability"), Arg::In(&capabilities), Arg::Int(0)];
    let _ = Call::SETXATTR.make(&mut arguments);
    draft.constraints.ro_paths.push(program.clone());
    draft.command.push(program.into_os_string().into_encoded_bytes());
    Ok(())
}

fn set_id_programs(act: &Act, findings: &mut Findings) {
    if act.role == "gained" {
        findings.same("user of the program", getresuid().map(|ids| ids.effective.as_raw()), Ok(1000));
        findings.same("group of the program", getresgid().map(|ids| ids.effective.as_raw()), Ok(100));
        for set in ["CapEff", "CapPrm"] {
            let seen = field("/proc/self/status", set).unwrap_or_default();
            findings.same(set, seen.as_str(), "0000000000000000");
        }
        return;
    }
    let Some(program) = act.arguments.first() else { return };
    if let Some(found) = findings.works("look at the program", fs::metadata(program)) {
        findings.same("its mode, as prepared", found.mode() & 0o7777, 0o6755);
    }
    let mut command = Command::new(program);
    command.args(["probe", &act.id, "--mode", act.mode.name(), "--profile", act.profile.name()]);
    command.args(["--role", "gained", "--token", &act.token, "--"]);
    match command.output() {
        Ok(output) => match Findings::read(&output.stdout) {
            Some(more) => findings.absorb(more),
            None => findings.check(false, format_args!("the program said nothing: {}", output.status)),
        },
        // Not to be executed at all is safe too.
        refused => findings.refused("execute it", refused, &[Errno::EPERM, Errno::EACCES]),
    }
    let own = c"/build/own";
    findings.works("copy a program", fs::copy("/proc/self/exe", "/build/own"));
    let mut arguments = [
        Arg::Str(own),
        Arg::Str(c"security.capability"),
        Arg::In(&[1, 0, 0, 2, 255, 255, 255, 255, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        Arg::Int(0),
    ];
    let refusals = [Errno::EPERM, Errno::EOPNOTSUPP];
    findings.refused("set capabilities of a file", Call::SETXATTR.make(&mut arguments), &refusals);
    let _ = fs::remove_file("/build/own");
}

fn with_group_file(stage: &Stage<'_>, draft: &mut Draft) -> Result<(), Outcome> {
    if stage.theatre.mode == Mode::Single {
        let why = "with one id the kernel lets nobody drop groups; the worker warns where its user has any";
        return Err(Outcome::not_applicable(why));
    }
    let file = stage.theatre.shown().join(GROUP_FILE);
    if file.exists() {
        draft.constraints.ro_paths.push(file.clone());
        draft.command.push(file.into_os_string().into_encoded_bytes());
    }
    Ok(())
}

fn no_groups(act: &Act, findings: &mut Findings) {
    findings.same("groups", getgroups().map(|groups| groups.len()), Ok(0));
    // Root gives the worker's user a group, and a file to it; others have the groups that they have.
    if let Some(file) = act.arguments.first() {
        findings.refused("read the file of a group of the worker's user", fs::read(file), &[Errno::EACCES]);
    }
}

fn own_ids_only(act: &Act, findings: &mut Findings) {
    if let Some(ids) = findings.works("getresuid", getresuid()) {
        let ids = [ids.real, ids.effective, ids.saved].map(Uid::as_raw);
        findings.same("user ids", ids, [1000; 3]);
    }
    if let Some(ids) = findings.works("getresgid", getresgid()) {
        let ids = [ids.real, ids.effective, ids.saved].map(Gid::as_raw);
        findings.same("group ids", ids, [100; 3]);
    }
    findings.works("make a file", fs::write("mine", ""));
    for id in [0, 1, 999, 65534] {
        let refusals = [Errno::EPERM, Errno::EINVAL];
        findings.refused(&format!("chown to {id}"), lchown("mine", Some(id), None), &refusals);
        findings.refused(&format!("chgrp to {id}"), lchown("mine", None, Some(id)), &refusals);
        findings.refused(&format!("setuid {id}"), setuid(Uid::from_raw(id)), &refusals);
        findings.refused(&format!("setgid {id}"), setgid(Gid::from_raw(id)), &refusals);
    }
    findings.refused("setgroups", setgroups(&[Gid::from_raw(100)]), &[Errno::EPERM]);
    let mapped = |file: &str| -> Vec<String> {
        let map = fs::read_to_string(file).unwrap_or_default();
        map.lines().map(|line| line.split_whitespace().step_by(2).collect::<Vec<_>>().join("+")).collect()
    };
    let expected = |own: &str| match act.mode {
        Mode::Single => vec![format!("{own}+1")],
        // The sandbox's root, which owns what is not the build's to change.
        Mode::Root | Mode::Range => vec!["0+1".to_owned(), format!("{own}+1")],
    };
    findings.same("user ids that are mapped", mapped("/proc/self/uid_map"), expected("1000"));
    findings.same("group ids that are mapped", mapped("/proc/self/gid_map"), expected("100"));
}

/// What one user may have of a kind: more of it than any limit allows.
const MANY: usize = 4096;

fn exhaust_user(act: &Act, findings: &mut Findings) {
    match act.role.as_str() {
        "victim" => {
            findings.works("make a file", fs::write("/build/own", ""));
            return hold();
        }
        "after" => {
            findings.works("make a pipe", std::io::pipe());
            findings.works("watch files", inotify());
            return;
        }
        _ => {}
    }
    // Every process that this one may signal, but itself.
    let killed = kill(Pid::from_raw(-1), Signal::SIGKILL);
    findings.check(!matches!(killed, Err(Errno::EINVAL)), "kill -1 makes no sense here");
    findings.works("make a file for all", fs::write("/build/open", "open"));
    findings.works("open it", fs::set_permissions("/build/open", fs::Permissions::from_mode(0o777)));
    let watches: Vec<_> = std::iter::repeat_with(inotify).take(MANY).map_while(Result::ok).collect();
    let pipes: Vec<_> = std::iter::repeat_with(std::io::pipe).take(MANY).map_while(Result::ok).collect();
    for (_, writer) in &pipes {
        // As large as one pipe may be, until the user's pages are used up.
        let _ = nix::fcntl::fcntl(writer, nix::fcntl::FcntlArg::F_SETPIPE_SZ(1 << 20));
    }
    findings.check(!watches.is_empty() || !pipes.is_empty(), "nothing could be used up");
    hold();
}

fn inotify() -> Result<nix::sys::inotify::Inotify, Errno> {
    nix::sys::inotify::Inotify::init(nix::sys::inotify::InitFlags::IN_CLOEXEC)
}

async fn beside_exhaustion(stage: &Stage<'_>) -> Outcome {
    let victim = match started(stage, "victim").await {
        Ok(victim) => victim,
        Err(outcome) => return outcome,
    };
    let attacker = match started(stage, "attacker").await {
        Ok(attacker) => attacker,
        Err(outcome) => return outcome,
    };
    let mut outcome = stage.act("after", &[]).await;
    let mut findings = Findings::default();
    let owners: Vec<Option<BTreeSet<u32>>> = [&victim, &attacker]
        .map(|build| owners(&stage.theatre.state().join("builds").join(build.id())))
        .into();
    match (stage.theatre.mode, owners.as_slice()) {
        (Mode::Single, _) => {}
        (_, [Some(one), Some(other)]) => {
            let shared: Vec<&u32> =
                one.intersection(other).filter(|id| **id != worker_owner(stage)).collect();
            // One id owns the inputs of all builds; the builds' own differ.
            findings.check(
                shared.len() <= 1 && one != other,
                format_args!("two builds run as the same users, {one:?}"),
            );
        }
        _ => findings.check(false, "the builds' directories can't be read"),
    }
    findings.check(!super::tools::ended(victim).await, "the other build has ended");
    drop(attacker);
    if stage.theatre.mode == Mode::Single {
        // The worker's user is the build's: what counts is that the worker survives, which the build after it showed.
        return outcome;
    }
    outcome = outcome.and(findings.outcome());
    outcome
}

fn worker_owner(stage: &Stage<'_>) -> u32 {
    fs::metadata(stage.theatre.state()).map_or(0, |found| found.uid())
}

async fn started(stage: &Stage<'_>, role: &str) -> Result<Running, Outcome> {
    super::tools::holding(stage, role, &[] as &[&OsStr]).await
}

/// Who owns what lies in a directory, and in the directories in it.
fn owners(dir: &Path) -> Option<BTreeSet<u32>> {
    let mut all = BTreeSet::new();
    for entry in fs::read_dir(dir).ok()?.flatten() {
        let found = entry.metadata().ok()?;
        all.insert(found.uid());
        if found.is_dir() {
            all.extend(owners(&entry.path())?);
        }
    }
    Some(all)
}
