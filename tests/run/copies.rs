//! Inputs as files, where there is no FUSE or it is not wanted: to a build they are what they are in the view.

use std::collections::BTreeMap;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use nix::sys::signal::Signal;

use crate::named;
use crate::support::case::{Ran, Running, finish, set_mode};
use crate::support::leftovers::{LIMIT, gone, marker, names, processes, until};
use crate::support::{Case, Facility, Lacking, Mode, binary, endless_blob, host_tools};

pub fn tests() -> impl IntoIterator<Item = (&'static str, fn(&Case))> {
    named![
        copies_are_no_fuse,
        copies_can_be_run,
        copies_cannot_be_changed,
        changes_beside_inputs_are_the_builds_own,
        a_changed_blob_is_mended_by_storing_it_again,
        no_copy_stays,
        leftovers_of_a_crash_are_swept,
    ]
}

/// Those that compare with FUSE.
pub fn tests_with_fuse() -> impl IntoIterator<Item = (&'static str, fn(&Case))> {
    named![
        both_ways_look_the_same,
        root_inputs_look_the_same,
        inputs_in_scratch_look_the_same,
        fuse_can_be_required
    ]
}

const COPIES: &str = "inputs=off";
const FUSE: &str = "inputs=required";

/// A tree with everything that a tree can have.
fn make_tree(case: &Case) {
    case.write("dir/plain", "plain\n");
    case.write("dir/deep/er/file", vec![9; 300_000]);
    case.write("dir/odd \u{1b}\\name", "");
    case.make_dir("dir/empty");
    set_mode(&case.write("dir/tool", "#!/bin/sh\necho tool runs\n"), 0o755);
    case.link("dir/link", "deep/er/file");
    case.link("dir/dangling", "/no/where");
    case.write("bare", "bare\n");
}

/// All that a build sees of a directory but the sizes of directories and what belongs to a file system: inode and
/// device numbers, change times, link counts of directories. A file's size is in its digest.
fn look(dir: &str) -> String {
    format!(
        "cd {dir}; find . -printf '%P|%y|%m|%U:%G|%T@|%A@|%l\\n' | sort; \
         find . -type f -printf '%P|%s|%n\\n' | sort; \
         find . -type f -exec sha256sum {{}} + | sort"
    )
}

/// Both looks, where the owner is the same: a build of one id owns its copies, and nobody owns what is in the view.
fn assert_same(case: &Case, [view, copies]: [Ran; 2]) {
    let view = match case.mode {
        Mode::Single => view.out().replace("|65534:65534|", "|1000:100|"),
        Mode::Root | Mode::Range => view.out(),
    };
    assert_eq!(view, copies.out());
    assert!(view.contains("|1.0000000000|1.0000000000|"), "{view}");
}

fn both_ways_look_the_same(case: &Case) {
    make_tree(case);
    let flags = |way| ["--isolation", way, "--input", "d=dir", "--input", "bare=bare"];
    assert_same(case, [FUSE, COPIES].map(|way| case.run(&flags(way), &look("/inputs")).code(0)));
}

fn root_inputs_look_the_same(case: &Case) {
    make_tree(case);
    let flags = |way| ["--isolation", way, "--rootfs", "dir", "--input", "bare=bare"];
    // Only what is of the inputs: the sandbox puts its own beside it, with the time of now.
    let script = "cd /; ls | grep -vE '^(proc|dev|build|outputs|tmp|usr|bin|sbin|lib.*|etc)$' > /tmp/mine; \
                  xargs -d '\\n' -a /tmp/mine -I{} find {} -printf '%p|%y|%m|%U:%G|%T@|%A@|%l\\n' | sort; \
                  cat plain inputs/bare; sha256sum deep/er/file; ./tool";
    let [view, copies] = [FUSE, COPIES].map(|way| case.run(&flags(way), script).code(0));
    assert!(copies.out().ends_with("tool runs\n"), "{copies}");
    assert_same(case, [view, copies]);
    let script = "echo x > plain || echo x > /new || rm -f /plain || chmod 777 /plain; cat /plain";
    case.run(&flags(COPIES), &format!("cd / && {script}")).code(0).says("plain\n");
}

/// A request with inputs in a scratch path, as `nix/store` is one.
fn in_scratch(case: &Case, script: &str) -> PathBuf {
    let added = case.cofferdam(["store", "add", "dir", "--state-dir", "state"]);
    let digest = finish(added).code(0).out();
    let listed = finish(case.cofferdam(["store", "ls", digest.trim(), "--state-dir", "state"])).code(0).out();
    assert!(listed.contains("plain"), "{listed}");
    let digest = blake3::Hash::from_hex(digest.trim()).unwrap();
    let request = serde_json::json!({
        "inputs": [{ "directory": { "name": base64(b"tree"), "digest": base64(digest.as_bytes()), "size": DIR_SIZE } }],
        "commandArgs": ["/bin/sh", "-c", script],
        "workingDir": "build",
        "scratchPaths": ["build", "nix/store"],
        "inputsDir": "nix/store",
        "outputs": ["nix/store/out"],
        "environmentVars": [{ "key": "PATH", "value": base64(b"/usr/bin:/bin") }],
        "constraints": { "system": format!("{}-linux", std::env::consts::ARCH), "availableRoPaths": host_tools() },
    });
    case.write("request.json", request.to_string())
}

/// The size of `dir` of [`make_tree`] as its parent states it: two for each entry and all below it.
const DIR_SIZE: u64 = 2 * 7 + 2 + 2;

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digits = bytes.chunks(3).flat_map(|chunk| {
        let bits = (0..3).fold(0, |bits, at| bits << 8 | u32::from(*chunk.get(at).unwrap_or(&0)));
        (0..4).map(move |at| match at <= chunk.len() {
            true => char::from(DIGITS[(bits >> (18 - 6 * at) & 63) as usize]),
            false => '=',
        })
    });
    digits.collect()
}

fn build(case: &Case, request: &Path, way: &str) -> Command {
    let mut command = case.cofferdam(["build", "--state-dir", "state", "--isolation", way]);
    for path in host_tools() {
        command.args(["--allow-host-path", path]);
    }
    command.arg(request);
    command
}

fn inputs_in_scratch_look_the_same(case: &Case) {
    make_tree(case);
    let request = in_scratch(case, &format!("{}; echo x > /nix/store/out", look("/nix/store/tree")));
    let looks = [FUSE, COPIES].map(|way| finish(build(case, &request, way)).code(0));
    // What the build made has a digest, which is told after what it said.
    assert_same(case, looks);
}

fn fuse_can_be_required(case: &Case) {
    case.write("file", "");
    let flags = ["--isolation", FUSE, "--input", "file=file"];
    let said = case.run(&flags, "stat -f -c %T /inputs").code(0).out();
    assert!(said.starts_with("fuse"), "{said}");
    case.run(&["--isolation", "inputs=perhaps"], "echo ran").code(125).says("").complains("none of required");
}

fn copies_are_no_fuse(case: &Case) {
    case.write("file", "");
    let script = "stat -f -c %T /inputs; grep fuse /proc/self/mountinfo; :";
    let flags = ["--isolation", COPIES, "--input", "file=file"];
    let ran = case.run(&flags, script).code(0);
    assert!(!ran.out().contains("fuse"), "{ran}");
    assert_eq!(ran.err(), "", "what was chosen is no reason to warn");
}

fn copies_can_be_run(case: &Case) {
    make_tree(case);
    let flags = ["--isolation", COPIES, "--input", "d=dir"];
    let ran = finish({
        let mut command = case.cofferdam(["run", "--host-tools"]);
        command.args(flags).args(["--", "/inputs/d/tool"]);
        command
    });
    ran.code(0).says("tool runs\n");
}

/// The program that tries to change inputs, ready to be an input itself.
fn tamper(case: &Case) {
    case.write("tamper.c", include_str!("tamper.c"));
    let compiled = case.program("gcc").args(["-o", "tamper", "tamper.c"]).status().unwrap();
    assert!(compiled.success());
    case.write("dir/file", "as it was");
}

fn copies_cannot_be_changed(case: &Case) {
    tamper(case);
    case.make_dir("dir/empty");
    case.link("dir/link", "file");
    let flags = |way| ["--isolation", way, "--input", "d=dir", "--input", "tamper=tamper"];
    let script =
        "/inputs/tamper /inputs/d && cat /inputs/d/file && find /inputs/d -printf '%P %m %T@\\n' | sort";
    let untouched = "as it was 555 1.0000000000\nempty 555 1.0000000000\nfile 444 1.0000000000\n\
                     link 777 1.0000000000\n";
    let ways: &[&str] = if case.mode.has_fuse().is_ok() { &[COPIES, FUSE] } else { &[COPIES] };
    for way in ways {
        let ran = case.run(&flags(way), script).code(0);
        let said = ran.out();
        let tries = said.strip_suffix(untouched).unwrap_or_else(|| panic!("{way}: {ran}"));
        assert_eq!(tries.lines().count(), 28, "{way}: {tries}");
        let done: Vec<_> = tries.lines().filter(|line| line.ends_with(" 0")).collect();
        assert_eq!(done, Vec::<&str>::new(), "{way}");
    }
}

/// Where inputs are the lower layer of an overlay, what a build may do it does to a layer of its own.
fn changes_beside_inputs_are_the_builds_own(case: &Case) {
    make_tree(case);
    tamper(case);
    let marker = marker();
    let attack = "cd /nix/store/tree; { chmod u+w . plain file; echo more >> plain; ./tamper .; echo x > new; \
                  rm -rf deep; mv link other; } > /dev/null 2>&1";
    std::fs::rename(case.path("tamper"), case.path("dir/tamper")).unwrap();
    let script = format!("{attack}; echo ready $(tail -n 1 plain); sleep {marker}");
    // The tree has two entries more.
    let request = in_scratch(case, &script);
    let text = String::from_utf8(case.read("request.json")).unwrap();
    case.write(
        "request.json",
        text.replace(&format!("\"size\":{DIR_SIZE}"), &format!("\"size\":{}", DIR_SIZE + 4)),
    );
    let mut running = Running::start(build(case, &request, COPIES));
    // A build of one id owns its inputs, and so has changed what it sees; others may not.
    running.wait_for(match case.mode {
        Mode::Single => "ready more\n",
        Mode::Root | Mode::Range => "ready plain\n",
    });
    let builds = names(&case.path("state/copies"));
    assert_eq!(builds.len(), 1);
    let lower = case.path("state/copies").join(builds.first().unwrap());
    let found = tree_of(&lower.join("tree"));
    let expected = tree_of(&case.path("dir"));
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (path, (bytes, _, _)) in &expected {
        let (found, mode, time) = &found[path];
        assert!(found == bytes, "{path} has other contents");
        assert_eq!(
            (mode & 0o222, *time),
            (if mode & 0o170_000 == 0o120_000 { 0o222 } else { 0 }, 1),
            "{path}"
        );
    }
    running.signal(Signal::SIGTERM);
    running.finish().code(143);
    gone("a copy", || names(&case.path("state/copies")));
}

/// Contents or target, mode and time of all in a directory.
fn tree_of(dir: &Path) -> BTreeMap<String, (Vec<u8>, u32, i64)> {
    let mut all = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        let found = std::fs::symlink_metadata(&path).unwrap();
        let bytes = match found.file_type() {
            kind if kind.is_dir() => {
                all.extend(tree_of(&path).into_iter().map(|(below, what)| (format!("{name}/{below}"), what)));
                Vec::new()
            }
            kind if kind.is_symlink() => {
                std::fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes()
            }
            _ => std::fs::read(&path).unwrap(),
        };
        all.insert(name, (bytes, found.mode(), found.mtime()));
    }
    all
}

fn a_changed_blob_is_mended_by_storing_it_again(case: &Case) {
    // Large enough for a file of its own in the store.
    let contents = "as it was".repeat(10_000);
    case.write("dir/deep/file", &contents);
    let flags = ["--isolation", COPIES, "--state-dir", "state", "--input", "d=dir"];
    case.run(&flags, "cat /inputs/d/deep/file").code(0).says(&contents);
    let digest = blake3::hash(contents.as_bytes()).to_hex();
    let blob = case.path(&format!("state/store/blobs/{}/{digest}", &digest[..2]));
    set_mode(&blob, 0o644);
    std::fs::OpenOptions::new().write(true).open(&blob).unwrap().write_all_at(b"A", 0).unwrap();
    // The input is stored again for the build, over what nobody knows to be sound.
    case.run(&flags, "cat /inputs/d/deep/file").code(0).says(&contents);
    assert!(names(&case.path("state/copies")).is_empty());
}

/// Starts a build that has copies, sends the signal, and counts what is left.
fn no_copy_stays(case: &Case) {
    make_tree(case);
    let flags = ["--isolation", COPIES, "--state-dir", "state", "--input", "d=dir"];
    let copies = || names(&case.path("state/copies"));
    case.run(&flags, "test -e /inputs/d/plain").code(0);
    gone("a copy after success", copies);
    case.run(&flags, "exit 7").code(7);
    gone("a copy after failure", copies);
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGKILL] {
        let marker = marker();
        let mut running = Running::start(case.run_command(&flags, &format!("echo ready; sleep {marker}")));
        running.wait_for("ready");
        assert_eq!(copies().len(), 1);
        running.signal(signal);
        gone("a process", || processes(&marker));
        gone("a copy", copies);
        running.finish();
    }
    // Also while they are made.
    let request = endless(case);
    for (signal, code) in [(Signal::SIGTERM, 143), (Signal::SIGINT, 130), (Signal::SIGKILL, 137)] {
        let running = Running::start(build(case, &request, COPIES));
        until("a copy to be begun", || !copies().is_empty());
        let sent = Instant::now();
        running.signal(signal);
        let ran = running.finish().code(code);
        assert!(sent.elapsed() < LIMIT, "took {:?}", sent.elapsed());
        assert_eq!(ran.out(), "");
        gone("a copy", copies);
    }
}

/// A request whose input takes minutes to copy.
fn endless(case: &Case) -> PathBuf {
    let (digest, size) = endless_blob(case, "state");
    let file = serde_json::json!({ "name": base64(b"endless"), "digest": base64(&digest), "size": size });
    let request = serde_json::json!({
        "inputs": [{ "file": file }],
        "commandArgs": ["/bin/sh", "-c", "echo ran"],
        "workingDir": "build",
        "scratchPaths": ["build"],
        "inputsDir": "inputs",
        "constraints": { "system": format!("{}-linux", std::env::consts::ARCH), "availableRoPaths": host_tools() },
    });
    case.write("request.json", request.to_string())
}

fn leftovers_of_a_crash_are_swept(case: &Case) {
    case.write("kept/file", "kept");
    case.run(&["--state-dir", "state"], "true").code(0);
    case.make_dir("state/copies/0123/tree");
    case.write("state/copies/0123/tree/file", "x");
    case.link("state/copies/link", "../../kept");
    // At the start, and also by a worker that makes no copies, if it can.
    let mut running = Running::start(case.run_command(&["--state-dir", "state"], "echo ready; sleep 60"));
    running.wait_for("ready");
    assert!(names(&case.path("state/copies")).is_empty());
    running.signal(Signal::SIGTERM);
    running.finish().code(143);
    assert_eq!(case.read("kept/file"), b"kept");
}

/// A machine without the device, as containers are: a mount namespace with a /dev of its own.
const NO_FUSE: &str = "set -e; dev=$(mktemp -d); mount -t tmpfs -o mode=0755 none $dev; \
    for node in null zero full random urandom tty ptmx; do \
        touch $dev/$node; mount --bind /dev/$node $dev/$node; \
    done; \
    mkdir $dev/pts $dev/shm; mount --rbind $dev /dev; umount -l $dev; rmdir $dev; \
    test ! -e /dev/fuse; exec \"$@\"";

pub fn without_the_device(case: &Case) -> Result<(), Lacking> {
    if !nix::unistd::geteuid().is_root() {
        return Err(Lacking::new(Facility::Root, "only root can hide /dev/fuse"));
    }
    case.write("file", "shown\n");
    let state = case.path("state");
    let run = |flags: &[&str], script: &str| {
        // As root, whoever then runs the binary.
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", NO_FUSE, "sh"]);
        if let Some(id) = case.mode.ids() {
            let (uid, gid) = (format!("--reuid={id}"), format!("--regid={id}"));
            command.args(["setpriv", &uid, &gid, "--clear-groups"]);
        }
        command
            .current_dir(case.path(""))
            .arg(binary())
            .args(["run", "--host-tools", "--state-dir"])
            .arg(&state);
        command.args(["--input", "file=file"]).args(flags).args(["--", "/bin/sh", "-c", script]);
        finish(command)
    };
    let ran = run(&[], "cat /inputs/file; stat -f -c %T /inputs").code(0);
    assert!(ran.out().starts_with("shown\n") && !ran.out().contains("fuse"), "{ran}");
    ran.complains("inputs are copied").complains("/dev/fuse: No such file").complains("--device /dev/fuse");
    assert_eq!(run(&["--isolation", COPIES], "cat /inputs/file").code(0).says("shown\n").err(), "");
    let refused = run(&["--isolation", FUSE], "echo ran").code(125).says("");
    refused.complains("required").complains("/dev/fuse: No such file");
    gone("a copy", || names(&state.join("copies")));
    Ok(())
}
