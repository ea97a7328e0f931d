//! Tables of requests: each refusal with its words, and the oddities that are fine.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use cofferdam_proto::build::BuildRequest;
use cofferdam_proto::build::build_request::{AdditionalFile, BuildConstraints, EnvVar};
use cofferdam_proto::castore::{DirectoryEntry, Entry, FileEntry, SymlinkEntry, entry};

use super::*;

fn directory(name: &str) -> Entry {
    let directory = DirectoryEntry { name: name.into(), digest: vec![1; 32], size: 7 };
    Entry { entry: Some(entry::Entry::Directory(directory)) }
}

fn file(name: &str) -> Entry {
    let file = FileEntry { name: name.into(), digest: vec![2; 32], size: 5, executable: true };
    Entry { entry: Some(entry::Entry::File(file)) }
}

fn symlink(name: &str, target: &[u8]) -> Entry {
    let symlink = SymlinkEntry { name: name.into(), target: target.to_vec() };
    Entry { entry: Some(entry::Entry::Symlink(symlink)) }
}

fn strings<const N: usize>(texts: [&str; N]) -> Vec<String> {
    texts.map(str::to_owned).into()
}

fn var(key: &str, value: &[u8]) -> EnvVar {
    EnvVar { key: key.to_owned(), value: value.to_vec() }
}

fn added(path: &str) -> AdditionalFile {
    AdditionalFile { path: path.to_owned(), contents: b"text".to_vec() }
}

/// What a Nix client sends: `nix/store` is both the inputs' place and a scratch path.
pub(crate) fn base() -> BuildRequest {
    BuildRequest {
        inputs: vec![directory("dir"), file("file"), symlink("link", b"../elsewhere")],
        command_args: strings(["/nix/store/dir/bin/sh", "-c", "true"]),
        working_dir: "build".to_owned(),
        scratch_paths: strings(["build", "nix/store"]),
        inputs_dir: "nix/store".to_owned(),
        outputs: strings(["nix/store/out", "nix/store/dev"]),
        environment_vars: vec![var("HOME", b"/homeless-shelter"), var("out", b"\xff")],
        constraints: Some(BuildConstraints {
            system: "x86_64-linux".to_owned(),
            min_memory: 0,
            available_ro_paths: strings(["/usr/share/zoneinfo"]),
            network_access: false,
            provide_bin_sh: true,
        }),
        additional_files: vec![added("build/.attrs.json"), added("etc/extra")],
        refscan_needles: strings(["aaaa", "bbbb"]),
    }
}

/// The base with a root file system of inputs: a directory, a file and a link.
fn rooted(request: &mut BuildRequest) {
    request.inputs = vec![directory("home"), file("init"), symlink("lib", b"usr/lib")];
    request.inputs_dir = String::new();
    request.scratch_paths = strings(["build"]);
    request.outputs = strings(["build/out"]);
}

fn with_constraints(request: &mut BuildRequest) -> &mut BuildConstraints {
    request.constraints.as_mut().unwrap()
}

/// What is done to the base.
type Edit = fn(&mut BuildRequest);

/// What is done to the base once it is a draft.
type DraftEdit = fn(&mut Draft);

/// Every refusal: what is done to the base, and the whole message.
#[rustfmt::skip]
const REFUSALS: &[(Edit, &str)] = &[
    // Inputs.
    (|r| r.inputs[1] = Entry { entry: None }, "inputs[1]: the entry is neither a directory, a file nor a symbolic link"),
    (|r| r.inputs[0] = directory(""), "inputs[0].name: the name \"\" is empty"),
    (|r| r.inputs[0] = directory("."), "inputs[0].name: the name \".\" names the directory itself or its parent"),
    (|r| r.inputs[0] = directory(".."), "inputs[0].name: the name \"..\" names the directory itself or its parent"),
    (|r| r.inputs[0] = directory("a/b"), "inputs[0].name: the name \"a/b\" contains a slash"),
    (|r| r.inputs[0] = directory("a\0"), "inputs[0].name: the name \"a\\x00\" contains a NUL byte"),
    (|r| r.inputs[2] = file(&"n".repeat(256)), LONG_NAME),
    (|r| r.inputs[0] = short_digest(31), "inputs[0].digest: a digest has 32 bytes, this one 31"),
    (|r| r.inputs[0] = short_digest(0), "inputs[0].digest: a digest has 32 bytes, this one 0"),
    (|r| r.inputs[2] = symlink("link", b""), "inputs[2].target: the target is empty"),
    (|r| r.inputs[2] = symlink("link", b"a\0b"), "inputs[2].target: the target contains a NUL byte"),
    (|r| r.inputs[2] = symlink("link", &[b'a'; 4096]), "inputs[2].target: the target is longer than 4095 bytes"),
    (|r| r.inputs.swap(0, 1), "inputs[1].name: \"dir\" stands after \"file\"; the list must ascend, byte by byte"),
    (|r| r.inputs[1] = file("dir"), "inputs[1].name: \"dir\" stands twice"),
    (|r| r.inputs = vec![Entry::default(); 1_000_001], "inputs: has 1000001 items; at most 1000000 are possible"),
    // The command.
    (|r| r.command_args.clear(), "command_args: is empty; a program is needed"),
    (|r| r.command_args[0].clear(), "command_args[0]: is empty; a program is needed"),
    (|r| r.command_args[2] = "a\0b".to_owned(), "command_args[2]: contains a NUL byte"),
    (|r| r.command_args[1] = "x".repeat(128 << 10), "command_args[1]: has 131072 bytes; at most 131071 are possible"),
    (|r| r.command_args = vec!["x".repeat(100_000); 30], const {
        "command_args: arguments and environment take 3000315 bytes; at most 2097152 are possible (E2BIG), so pass large values in files"
    }),
    (|r| r.environment_vars = (10..40).map(|n| var(&format!("V{n}"), &[b'v'; 100_000])).collect(), const {
        "command_args: arguments and environment take 3000444 bytes; at most 2097152 are possible (E2BIG), so pass large values in files"
    }),
    // The working directory.
    (|r| r.working_dir = String::new(), "working_dir: the path is empty"),
    (|r| r.working_dir = "/build".to_owned(), "working_dir: the path starts with a slash; paths are relative to the root of the sandbox"),
    (|r| r.working_dir = "build/".to_owned(), "working_dir: the path ends with a slash"),
    (|r| r.working_dir = "proc/self".to_owned(), "working_dir: \"proc/self\" lies in /proc, which the sandbox furnishes itself"),
    (|r| r.working_dir = "nix/store/file".to_owned(), "working_dir: \"nix/store/file\" is also the input \"nix/store/file\""),
    (|r| r.working_dir = "nix/store/file/x".to_owned(), "working_dir: \"nix/store/file/x\" lies within the input \"nix/store/file\""),
    (|r| r.working_dir = "bin/sh".to_owned(), "working_dir: \"bin/sh\" is also the shell that constraints.provide_bin_sh asks for, \"bin/sh\""),
    // Scratch paths.
    (|r| r.scratch_paths[0] = String::new(), "scratch_paths[0]: the path is empty"),
    (|r| r.scratch_paths[0] = "a//b".to_owned(), "scratch_paths[0]: the path has two slashes in a row"),
    (|r| r.scratch_paths[0] = "./a".to_owned(), "scratch_paths[0]: the path has a component \".\""),
    (|r| r.scratch_paths[0] = "a/../b".to_owned(), "scratch_paths[0]: the path has a component \"..\""),
    (|r| r.scratch_paths[0] = "a\0".to_owned(), "scratch_paths[0]: the path contains a NUL byte"),
    (|r| r.scratch_paths[0] = "a".repeat(256), "scratch_paths[0]: the path has a component of 256 bytes; at most 255 are possible"),
    (|r| r.scratch_paths[0] = "a/".repeat(2047) + "b", "scratch_paths[0]: the path has 4095 bytes; at most 4094 are possible"),
    (|r| r.scratch_paths.reverse(), "scratch_paths[1]: \"build\" stands after \"nix/store\"; the list must ascend, byte by byte"),
    (|r| r.scratch_paths = strings(["a/b", "a-b"]), "scratch_paths[1]: \"a-b\" stands after \"a/b\"; the list must ascend, byte by byte"),
    (|r| r.scratch_paths[1] = "build".to_owned(), "scratch_paths[1]: \"build\" stands twice"),
    (|r| r.scratch_paths[0] = "bin".to_owned(), "scratch_paths[0]: \"bin\" lies in /bin, which the sandbox furnishes itself"),
    (|r| r.scratch_paths[0] = "dev".to_owned(), "scratch_paths[0]: \"dev\" lies in /dev, which the sandbox furnishes itself"),
    (|r| r.scratch_paths[0] = "etc/x".to_owned(), "scratch_paths[0]: \"etc/x\" lies in /etc, which the sandbox furnishes itself"),
    (|r| r.scratch_paths[1] = "proc/x".to_owned(), "scratch_paths[1]: \"proc/x\" lies in /proc, which the sandbox furnishes itself"),
    (|r| r.scratch_paths[1] = "sys".to_owned(), "scratch_paths[1]: \"sys\" lies in /sys, which the sandbox furnishes itself"),
    (|r| r.scratch_paths[1] = "nix/store/dir".to_owned(), "scratch_paths[1]: \"nix/store/dir\" is also the input \"nix/store/dir\""),
    (|r| r.scratch_paths[1] = "nix/store/dir/a/b".to_owned(), "scratch_paths[1]: \"nix/store/dir/a/b\" lies within the input \"nix/store/dir\""),
    (|r| { rooted(r); r.scratch_paths.push("init".to_owned()) }, "scratch_paths[1]: \"init\" is also the input \"init\""),
    (|r| { rooted(r); r.scratch_paths.push("lib/x".to_owned()) }, "scratch_paths[1]: \"lib/x\" lies within the input \"lib\""),
    (|r| r.scratch_paths = (1000..2001).map(|n| format!("s{n}")).collect(), "scratch_paths: has 1001 items; at most 1000 are possible"),
    // The inputs' directory.
    (|r| r.inputs_dir = "/".to_owned(), "inputs_dir: the path starts with a slash; paths are relative to the root of the sandbox"),
    (|r| r.inputs_dir = "nix/store/".to_owned(), "inputs_dir: the path ends with a slash"),
    (|r| r.inputs_dir = ".".to_owned(), "inputs_dir: the path has a component \".\""),
    (|r| r.inputs_dir = "proc".to_owned(), "inputs_dir: \"proc\" lies in /proc, which the sandbox furnishes itself"),
    (|r| r.inputs_dir = "dev/x".to_owned(), "inputs_dir: \"dev/x\" lies in /dev, which the sandbox furnishes itself"),
    (|r| r.inputs_dir = "sys".to_owned(), "inputs_dir: \"sys\" lies in /sys, which the sandbox furnishes itself"),
    (|r| r.inputs_dir = "etc".to_owned(), "inputs_dir: \"etc\" lies in /etc, which the sandbox furnishes itself"),
    (|r| r.inputs_dir = "bin/x".to_owned(), "inputs_dir: \"bin/x\" lies in /bin, which the sandbox furnishes itself"),
    (|r| r.inputs_dir = "a/".repeat(2044) + "bc", "inputs[1].name: the path has 4095 bytes; at most 4094 are possible"),
    // Outputs.
    (|r| r.outputs[1] = String::new(), "outputs[1]: the path is empty"),
    (|r| r.outputs[1] = "/nix/store/out".to_owned(), "outputs[1]: the path starts with a slash; paths are relative to the root of the sandbox"),
    (|r| r.outputs[1] = "nix/store/../x".to_owned(), "outputs[1]: the path has a component \"..\""),
    (|r| r.outputs[1] = "nix/store/out".to_owned(), "outputs[1]: \"nix/store/out\" stands twice"),
    (|r| r.outputs[0] = "elsewhere/out".to_owned(), "outputs[0]: \"elsewhere/out\" lies in no scratch path; a build can write nowhere else"),
    (|r| r.outputs[0] = "builder".to_owned(), "outputs[0]: \"builder\" lies in no scratch path; a build can write nowhere else"),
    (|r| r.outputs[0] = "nix".to_owned(), "outputs[0]: \"nix\" lies in no scratch path; a build can write nowhere else"),
    (|r| r.outputs[0] = "dev/shm/x".to_owned(), "outputs[0]: \"dev/shm/x\" lies in /dev, which the sandbox furnishes itself"),
    (|r| r.outputs[0] = "nix/store/file".to_owned(), "outputs[0]: \"nix/store/file\" is also the input \"nix/store/file\""),
    (|r| r.outputs[0] = "nix/store/dir/out".to_owned(), "outputs[0]: \"nix/store/dir/out\" lies within the input \"nix/store/dir\""),
    (|r| r.outputs[0] = "nix/store".to_owned(), "outputs[0]: \"nix/store\" contains the input \"nix/store/dir\""),
    (|r| { r.scratch_paths[1] = "nix".to_owned(); r.outputs[0] = "nix".to_owned() }, "outputs[0]: \"nix\" contains the input \"nix/store/dir\""),
    (|r| r.outputs = (1000..2001).map(|n| format!("build/{n}")).collect(), "outputs: has 1001 items; at most 1000 are possible"),
    // The environment.
    (|r| r.environment_vars[0].key.clear(), "environment_vars[0].key: is empty; the name of a variable is needed"),
    (|r| r.environment_vars[1].key = "a=b".to_owned(), "environment_vars[1].key: contains \"=\", which ends the name of an environment variable"),
    (|r| r.environment_vars[1].key = "a\0b".to_owned(), "environment_vars[1].key: contains a NUL byte"),
    (|r| r.environment_vars[1].value = b"a\0b".to_vec(), "environment_vars[1].value: contains a NUL byte"),
    (|r| r.environment_vars[1].value = vec![b'x'; 128 << 10], "environment_vars[1].value: has 131076 bytes; at most 131071 are possible"),
    (|r| r.environment_vars[1].key = "x".repeat(128 << 10), "environment_vars[1].key: has 131072 bytes; at most 131071 are possible"),
    (|r| r.environment_vars.reverse(), "environment_vars[1].key: \"HOME\" stands after \"out\"; the list must ascend, byte by byte"),
    (|r| r.environment_vars[1] = var("HOME", b"/"), "environment_vars[1].key: \"HOME\" stands twice"),
    // Constraints.
    (|r| with_constraints(r).system.clear(), "constraints.system: \"\" names no system; a name like \"x86_64-linux\" is needed"),
    (|r| r.constraints = Some(BuildConstraints::default()), "constraints.system: \"\" names no system; a name like \"x86_64-linux\" is needed"),
    (|r| with_constraints(r).system = "x86 linux".to_owned(), "constraints.system: \"x86 linux\" names no system; a name like \"x86_64-linux\" is needed"),
    (|r| with_constraints(r).system = "\u{fc}".to_owned(), "constraints.system: \"\\xc3\\xbc\" names no system; a name like \"x86_64-linux\" is needed"),
    (|r| with_constraints(r).system = "x".repeat(65), "constraints.system: has 65 bytes; at most 64 are possible"),
    (|r| with_constraints(r).available_ro_paths[0] = "/".to_owned(), "constraints.available_ro_paths[0]: the worker's whole file system can't be had"),
    (|r| with_constraints(r).available_ro_paths[0] = String::new(), "constraints.available_ro_paths[0]: the path is empty"),
    (|r| with_constraints(r).available_ro_paths[0] = "usr".to_owned(), "constraints.available_ro_paths[0]: \"usr\" is not absolute; it names a place on the worker, and must start with a slash"),
    (|r| with_constraints(r).available_ro_paths[0] = "//usr".to_owned(), "constraints.available_ro_paths[0]: the path has two slashes in a row"),
    (|r| with_constraints(r).available_ro_paths[0] = "/usr/".to_owned(), "constraints.available_ro_paths[0]: the path ends with a slash"),
    (|r| with_constraints(r).available_ro_paths[0] = "/usr/../root".to_owned(), "constraints.available_ro_paths[0]: the path has a component \"..\""),
    (|r| with_constraints(r).available_ro_paths[0] = "/usr\0".to_owned(), "constraints.available_ro_paths[0]: the path contains a NUL byte"),
    (|r| with_constraints(r).available_ro_paths = strings(["/b", "/a", "/b"]), "constraints.available_ro_paths[2]: \"/b\" stands twice"),
    (|r| with_constraints(r).available_ro_paths = vec!["/a".to_owned(); 1001], "constraints.available_ro_paths: has 1001 items; at most 1000 are possible"),
    (|r| with_constraints(r).available_ro_paths = strings(["/proc"]), "constraints.available_ro_paths[0]: \"proc\" lies in /proc, which the sandbox furnishes itself"),
    (|r| with_constraints(r).available_ro_paths = strings(["/proc/sys"]), "constraints.available_ro_paths[0]: \"proc/sys\" lies in /proc, which the sandbox furnishes itself"),
    (|r| with_constraints(r).available_ro_paths = strings(["/tmp"]), "constraints.available_ro_paths[0]: \"tmp\" lies in /tmp, which the sandbox furnishes itself"),
    (|r| with_constraints(r).available_ro_paths = strings(["/dev"]), "constraints.available_ro_paths[0]: \"dev\" lies in /dev, which the sandbox furnishes itself"),
    (|r| with_constraints(r).available_ro_paths = strings(["/dev/fd"]), "constraints.available_ro_paths[0]: \"dev/fd\" lies in /dev, which the sandbox furnishes itself"),
    (|r| with_constraints(r).available_ro_paths = strings(["/dev/shm/x"]), "constraints.available_ro_paths[0]: \"dev/shm/x\" lies in /dev, which the sandbox furnishes itself"),
    (|r| with_constraints(r).available_ro_paths = strings(["/bin/sh"]), "constraints.available_ro_paths[0]: \"bin/sh\" is also the shell that constraints.provide_bin_sh asks for, \"bin/sh\""),
    (|r| with_constraints(r).available_ro_paths = strings(["/bin"]), "constraints.available_ro_paths[0]: \"bin\" contains the shell that constraints.provide_bin_sh asks for, \"bin/sh\""),
    (|r| with_constraints(r).available_ro_paths = strings(["/build"]), "constraints.available_ro_paths[0]: \"build\" is also the scratch path \"build\""),
    (|r| with_constraints(r).available_ro_paths = strings(["/nix"]), "constraints.available_ro_paths[0]: \"nix\" contains the input \"nix/store/dir\""),
    (|r| with_constraints(r).available_ro_paths = strings(["/nix/store"]), "constraints.available_ro_paths[0]: \"nix/store\" contains the input \"nix/store/dir\""),
    (|r| with_constraints(r).available_ro_paths = strings(["/nix/store/dir"]), "constraints.available_ro_paths[0]: \"nix/store/dir\" is also the input \"nix/store/dir\""),
    (|r| with_constraints(r).available_ro_paths = strings(["/nix/store/dir/sub"]), "constraints.available_ro_paths[0]: \"nix/store/dir/sub\" lies within the input \"nix/store/dir\""),
    (|r| { r.inputs.clear(); with_constraints(r).available_ro_paths = strings(["/nix"]) }, "constraints.available_ro_paths[0]: \"nix\" contains the scratch path \"nix/store\""),
    (|r| with_constraints(r).available_ro_paths = strings(["/nix/store/out"]), "constraints.available_ro_paths[0]: \"nix/store/out\" is also the output \"nix/store/out\""),
    (|r| with_constraints(r).available_ro_paths = strings(["/nix/store/out/lib"]), "constraints.available_ro_paths[0]: \"nix/store/out/lib\" lies within the output \"nix/store/out\""),
    (|r| { r.outputs = strings(["build/a/out"]); with_constraints(r).available_ro_paths = strings(["/build/a"]) }, "constraints.available_ro_paths[0]: \"build/a\" contains the output \"build/a/out\""),
    (|r| { r.scratch_paths.insert(1, "build/a/b".to_owned()); with_constraints(r).available_ro_paths = strings(["/build/a"]) }, "constraints.available_ro_paths[0]: \"build/a\" contains the scratch path \"build/a/b\""),
    (|r| with_constraints(r).available_ro_paths = strings(["/etc"]), "constraints.available_ro_paths[0]: \"etc\" contains the additional file \"etc/extra\""),
    (|r| with_constraints(r).available_ro_paths = strings(["/etc/extra"]), "constraints.available_ro_paths[0]: \"etc/extra\" is also the additional file \"etc/extra\""),
    (|r| with_constraints(r).available_ro_paths = strings(["/etc/extra/x"]), "constraints.available_ro_paths[0]: \"etc/extra/x\" lies within the additional file \"etc/extra\""),
    (|r| { rooted(r); with_constraints(r).available_ro_paths = strings(["/init"]) }, "constraints.available_ro_paths[0]: \"init\" is also the input \"init\""),
    (|r| { rooted(r); with_constraints(r).available_ro_paths = strings(["/lib/x"]) }, "constraints.available_ro_paths[0]: \"lib/x\" lies within the input \"lib\""),
    // Additional files.
    (|r| r.additional_files[0].path.clear(), "additional_files[0].path: the path is empty"),
    (|r| r.additional_files[0].path = "../x".to_owned(), "additional_files[0].path: the path has a component \"..\""),
    (|r| r.additional_files[0].path = "/etc/x".to_owned(), "additional_files[0].path: the path starts with a slash; paths are relative to the root of the sandbox"),
    (|r| r.additional_files.reverse(), "additional_files[1].path: \"build/.attrs.json\" stands after \"etc/extra\"; the list must ascend, byte by byte"),
    (|r| r.additional_files[1].path = "build/.attrs.json".to_owned(), "additional_files[1].path: \"build/.attrs.json\" stands twice"),
    (|r| r.additional_files[1].path = "build/.attrs.json/x".to_owned(), "additional_files[1].path: \"build/.attrs.json/x\" lies within the additional file \"build/.attrs.json\""),
    (|r| r.additional_files[1].path = "dev/null".to_owned(), "additional_files[1].path: \"dev/null\" lies in /dev, which the sandbox furnishes itself"),
    (|r| r.additional_files[1].path = "proc".to_owned(), "additional_files[1].path: \"proc\" lies in /proc, which the sandbox furnishes itself"),
    (|r| r.additional_files[1].path = "sys/x".to_owned(), "additional_files[1].path: \"sys/x\" lies in /sys, which the sandbox furnishes itself"),
    (|r| r.additional_files[1].path = "etc".to_owned(), "additional_files[1].path: \"etc\" lies in /etc, which the sandbox furnishes itself"),
    (|r| r.additional_files[1].path = "tmp".to_owned(), "additional_files[1].path: \"tmp\" lies in /tmp, which the sandbox furnishes itself"),
    (|r| r.additional_files[1].path = "nix/store/file".to_owned(), "additional_files[1].path: \"nix/store/file\" is also the input \"nix/store/file\""),
    (|r| r.additional_files[1].path = "nix/store/dir/x".to_owned(), "additional_files[1].path: \"nix/store/dir/x\" lies within the input \"nix/store/dir\""),
    (|r| r.additional_files[1].path = "nix".to_owned(), "additional_files[1].path: \"nix\" contains the input \"nix/store/dir\""),
    (|r| { r.inputs.clear(); r.scratch_paths[1] = "out".to_owned(); r.outputs = strings(["out"]); r.additional_files[1].path = "nix".to_owned() }, const {
        "additional_files[1].path: \"nix\" contains inputs_dir \"nix/store\""
    }),
    (|r| { r.additional_files.remove(0); r.additional_files[0].path = "build".to_owned() }, "additional_files[0].path: \"build\" is also the scratch path \"build\""),
    (|r| { r.scratch_paths[0] = "build/sub".to_owned(); r.additional_files.remove(0); r.additional_files[0].path = "build".to_owned() }, const {
        "additional_files[0].path: \"build\" contains the scratch path \"build/sub\""
    }),
    (|r| r.additional_files[1].path = "nix/store/out".to_owned(), "additional_files[1].path: \"nix/store/out\" is also the output \"nix/store/out\""),
    (|r| { r.outputs[0] = "nix/store/a/out".to_owned(); r.additional_files[1].path = "nix/store/a".to_owned() }, const {
        "additional_files[1].path: \"nix/store/a\" contains the output \"nix/store/a/out\""
    }),
    (|r| { r.working_dir = "work/here".to_owned(); r.additional_files[1].path = "work".to_owned() }, const {
        "additional_files[1].path: \"work\" contains working_dir \"work/here\""
    }),
    (|r| { r.additional_files.remove(0); r.additional_files[0].path = "bin/sh".to_owned() }, const {
        "additional_files[0].path: \"bin/sh\" is also the shell that constraints.provide_bin_sh asks for, \"bin/sh\""
    }),
    (|r| { r.additional_files.remove(0); r.additional_files[0].path = "bin".to_owned() }, const {
        "additional_files[0].path: \"bin\" contains the shell that constraints.provide_bin_sh asks for, \"bin/sh\""
    }),
    (|r| r.additional_files[1].contents = vec![0; (100 << 20) - 3], "additional_files: has 104857601 bytes; at most 104857600 are possible"),
    (|r| r.additional_files = vec![added("x"); 10_001], "additional_files: has 10001 items; at most 10000 are possible"),
    // Needles.
    (|r| r.refscan_needles[1].clear(), "refscan_needles[1]: is empty; a byte string to search for is needed"),
    (|r| r.refscan_needles = vec!["x".to_owned(); 100_001], "refscan_needles: has 100001 items; at most 100000 are possible"),
    (|r| r.refscan_needles[0] = "x".repeat((4 << 20) - 3), "refscan_needles: has 4194305 bytes; at most 4194304 are possible"),
];

const LONG_NAME: &str = "inputs[2].name: the name \"nnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnn\" is longer than 255 bytes";

fn short_digest(len: usize) -> Entry {
    let directory = DirectoryEntry { name: b"dir".to_vec(), digest: vec![1; len], size: 7 };
    Entry { entry: Some(entry::Entry::Directory(directory)) }
}

#[test]
fn every_refusal_names_its_field() {
    assert_eq!(Request::try_from(base()).map(drop), Ok(()));
    let mut wrong = Vec::new();
    for (edit, message) in REFUSALS {
        let mut request = base();
        edit(&mut request);
        match Request::try_from(request) {
            Ok(_) => wrong.push(format!("accepted, not refused with: {message}")),
            Err(refusal) if refusal.to_string() != *message => {
                wrong.push(format!("{refusal}\n  not {message}"))
            }
            Err(_) => {}
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What looks odd and is fine.
#[rustfmt::skip]
const ODDITIES: &[(&str, Edit)] = &[
    ("nothing but a command", |r| *r = BuildRequest { command_args: strings(["a"]), working_dir: "w".to_owned(), ..BuildRequest::default() }),
    ("outputs in any order", |r| r.outputs = strings(["nix/store/z", "nix/store/a", "build/m"])),
    ("an output in an output", |r| r.outputs = strings(["build/a/b", "build/a"])),
    ("an output that is a scratch path", |r| r.outputs = strings(["build"])),
    ("an output where the inputs would be", |r| { r.inputs.clear(); r.outputs = strings(["nix/store"]) }),
    ("an input called as the sandbox's own", |r| r.inputs[0] = directory("etc")),
    ("a dangling link of the greatest length", |r| r.inputs[2] = symlink("link", &[b'x'; 4095])),
    ("names that are not UTF-8", |r| if let Some(entry::Entry::File(file)) = &mut r.inputs[1].entry { file.name = b"f\xff".to_vec() }),
    ("scratch paths in one another", |r| r.scratch_paths = strings(["build", "build/a", "build/a/b", "nix/store"])),
    ("a scratch path above the inputs", |r| r.scratch_paths = strings(["build", "nix"])),
    ("a scratch path beside the inputs", |r| { r.scratch_paths = strings(["build", "nix/store/mine"]); r.outputs = strings(["nix/store/mine/o"]) }),
    ("scratch paths sorted by bytes", |r| r.scratch_paths = strings(["a-b", "a/b", "build", "nix/store"])),
    ("scratch in /tmp", |r| r.scratch_paths = strings(["build", "nix/store", "tmp"])),
    ("nobody writes", |r| { r.scratch_paths.clear(); r.outputs.clear() }),
    ("work in an input", |r| r.working_dir = "nix/store/dir/src".to_owned()),
    ("work behind a link", |r| r.working_dir = "nix/store/link".to_owned()),
    ("work where nothing is", |r| r.working_dir = "some/where/else".to_owned()),
    ("empty arguments", |r| r.command_args = strings(["sh", "", ""])),
    ("a program without a slash", |r| r.command_args = strings(["sh"])),
    ("the longest argument", |r| r.command_args[1] = "x".repeat((128 << 10) - 1)),
    ("the longest variable", |r| r.environment_vars[1].value = vec![b'x'; (128 << 10) - 5]),
    ("an empty value", |r| r.environment_vars[0].value.clear()),
    ("a value of any bytes", |r| r.environment_vars[0].value = (1..=255).collect()),
    ("a variable of any name", |r| r.environment_vars[1].key = "ü -%".to_owned()),
    ("no constraints", |r| r.constraints = None),
    ("a foreign system", |r| with_constraints(r).system = "riscv64-freebsd".to_owned()),
    ("all the memory there could be", |r| with_constraints(r).min_memory = u64::MAX),
    ("host paths in any order", |r| with_constraints(r).available_ro_paths = strings(["/b", "/a"])),
    ("a host path that is not for everyone", |r| with_constraints(r).available_ro_paths = strings(["/sys", "/root/.ssh"])),
    ("a host like many", |r| { let lent = with_constraints(r); lent.provide_bin_sh = false; lent.available_ro_paths = strings(["/bin", "/etc/alternatives", "/lib", "/lib64", "/sbin", "/usr"]) }),
    ("a host like many under inputs at the root", |r| { rooted(r); r.inputs.pop(); let lent = with_constraints(r); lent.provide_bin_sh = false; lent.available_ro_paths = strings(["/bin", "/etc/alternatives", "/lib", "/lib64", "/sbin", "/usr"]) }),
    ("host paths beside inputs and outputs", |r| with_constraints(r).available_ro_paths = strings(["/nix/store/of-the-host", "/nix/store/dir-2"])),
    ("host paths where the inputs would be", |r| { r.inputs.clear(); r.scratch_paths.pop(); r.outputs.clear(); with_constraints(r).available_ro_paths = strings(["/nix/store"]) }),
    ("host paths in scratch", |r| with_constraints(r).available_ro_paths = strings(["/build/cache", "/tmp/.X11-unix"])),
    ("host paths in one another", |r| with_constraints(r).available_ro_paths = strings(["/usr/share", "/usr"])),
    ("host paths over directories at the root", |r| { rooted(r); with_constraints(r).available_ro_paths = strings(["/home", "/home/me"]) }),
    ("devices of the host", |r| with_constraints(r).available_ro_paths = strings(["/dev/kvm", "/dev/net/tun", "/dev/null"])),
    ("work in what the host lends", |r| r.working_dir = "usr/share/zoneinfo/Europe".to_owned()),
    ("work where the shell is", |r| r.working_dir = "bin".to_owned()),
    ("inputs in /tmp", |r| r.inputs_dir = "tmp/inputs".to_owned()),
    ("inputs instead of /tmp", |r| r.inputs_dir = "tmp".to_owned()),
    ("a file in /tmp over inputs at the root", |r| { rooted(r); r.inputs.push(directory("tmp")); r.additional_files = vec![added("tmp/x")] }),
    ("a shell of one's own", |r| { with_constraints(r).provide_bin_sh = false; r.additional_files = vec![added("bin/sh")] }),
    ("another program beside the shell", |r| r.additional_files = vec![added("bin/shell")]),
    ("a file in an output", |r| { r.outputs = strings(["build"]); r.additional_files = vec![added("build/x")] }),
    ("a file beside the inputs", |r| r.additional_files = vec![added("nix/store/.links")]),
    ("a file where nothing else is", |r| r.additional_files = vec![added("homeless/shelter")]),
    ("files called alike", |r| r.additional_files = vec![added("a"), added("a-b"), added("ab/c")]),
    ("an empty file", |r| r.additional_files[0].contents.clear()),
    ("needles that repeat and nest", |r| r.refscan_needles = strings(["ab", "ab", "b", "abc", "a\0"])),
    ("inputs at the root", rooted),
    ("inputs at the root, called as the sandbox's own", |r| { rooted(r); r.inputs = ["bin", "dev", "etc", "proc", "sys", "tmp"].map(directory).into(); r.additional_files.clear() }),
    ("scratch over an input at the root", |r| { rooted(r); r.scratch_paths = strings(["build", "home"]); r.outputs = strings(["home/me/out", "home"]) }),
    ("scratch in an input at the root", |r| { rooted(r); r.scratch_paths = strings(["build", "home/me"]); r.outputs = strings(["home/me/out"]); r.additional_files = vec![added("home/me/.rc")] }),
];

#[test]
fn oddities_are_fine_and_kept() {
    for (name, edit) in ODDITIES {
        let mut message = base();
        edit(&mut message);
        let request = Request::try_from(message.clone()).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(BuildRequest::try_from(&request), Ok(message), "{name}");
    }
}

/// Beside the scratch that covers a part of it, an input at the root is as closed as any other.
#[test]
fn a_covered_input_is_open_only_where_it_is_covered() {
    let cases: [(Edit, &str); 3] = [
        (
            |r| r.additional_files = vec![added("home/you/.rc")],
            "additional_files[0].path: \"home/you/.rc\" lies within the input \"home\"",
        ),
        (
            |r| r.outputs = strings(["home/you/out"]),
            "outputs[0]: \"home/you/out\" lies in no scratch path; a build can write nowhere else",
        ),
        (
            |r| r.outputs = strings(["home"]),
            "outputs[0]: \"home\" lies in no scratch path; a build can write nowhere else",
        ),
    ];
    for (edit, message) in cases {
        let mut request = base();
        rooted(&mut request);
        request.scratch_paths = strings(["build", "home/me"]);
        edit(&mut request);
        assert_eq!(Request::try_from(request).unwrap_err().to_string(), message);
    }
}

#[test]
fn the_longest_scratch_path_owns_an_output() {
    let mut message = base();
    message.scratch_paths = strings(["build", "build/a", "build/a-b", "nix/store"]);
    let request = Request::try_from(message).unwrap();
    let cases = [
        ("build/x", Some("build")),
        ("build", Some("build")),
        ("build/a/x/y", Some("build/a")),
        ("build/a", Some("build/a")),
        ("build/a-b/x", Some("build/a-b")),
        ("build/a-c", Some("build")),
        ("nix", None),
        ("builder", None),
    ];
    for (path, owner) in cases {
        let found = request.owner_of(&path.parse().unwrap()).map(SandboxPath::to_string);
        assert_eq!(found.as_deref(), owner, "{path}");
    }
}

/// What only callers in this process can get wrong.
#[test]
fn drafts_are_checked_as_the_wire_is() {
    let cases: [(DraftEdit, &str); 4] = [
        (|d| d.working_dir = SandboxPath::root(), "working_dir: the path is empty"),
        (|d| d.outputs.push(SandboxPath::root()), "outputs[2]: the path is empty"),
        (|d| d.scratch_paths = BTreeSet::from([SandboxPath::root()]), "scratch_paths[0]: the path is empty"),
        (
            |d| d.additional_files = BTreeMap::from([(SandboxPath::root(), Vec::new())]),
            "additional_files[0].path: the path is empty",
        ),
    ];
    for (edit, message) in cases {
        let mut draft = Draft::clone(&Request::try_from(base()).unwrap());
        edit(&mut draft);
        assert_eq!(Request::new(draft).unwrap_err().to_string(), message);
    }
}

/// What is valid in this process and can't be sent to another.
#[test]
fn what_the_wire_has_no_form_for_is_named() {
    use std::ffi::OsString;
    use std::os::unix::ffi::OsStringExt;

    let cases: [(DraftEdit, &str); 6] = [
        (|d| d.command.push(b"\xff".to_vec()), "command_args[3]"),
        (|d| d.needles.push(b"\xff".to_vec()), "refscan_needles[2]"),
        (|d| d.working_dir = SandboxPath::new(b"\xff").unwrap(), "working_dir"),
        (|d| drop(d.environment.insert(b"\xff".to_vec(), Vec::new())), "environment_vars[2].key"),
        (
            |d| d.constraints.ro_paths.push(PathBuf::from(OsString::from_vec(b"/\xff".to_vec()))),
            "constraints.available_ro_paths[1]",
        ),
        (|d| d.constraints.system = None, "constraints.system"),
    ];
    for (edit, field) in cases {
        let mut draft = Draft::clone(&Request::try_from(base()).unwrap());
        edit(&mut draft);
        let request = Request::new(draft).unwrap();
        assert_eq!(BuildRequest::try_from(&request).unwrap_err().field, field);
    }
}

#[test]
fn json_is_read_and_refused() {
    let cases = [
        (r#"{"commandArgs":["a"],"workingDir":"w"}"#, None),
        (r#"{"command_args":["a"],"working_dir":"w","refscan_needles":["n"]}"#, None),
        (r#"{"commandArgs":["a"]}"#, Some("working_dir: the path is empty")),
        ("{\"commandArgs\":[\"a\"],\n \"workDir\":\"w\"}", Some("line 2, column 10: ")),
    ];
    for (text, refusal) in cases {
        let found = Request::from_json(text.as_bytes()).map(drop).map_err(|error| error.to_string());
        match (found, refusal) {
            (Ok(()), None) => {}
            (Err(found), Some(refusal)) => assert!(found.starts_with(refusal), "{found}"),
            (found, refusal) => panic!("{text}: {found:?}, not {refusal:?}"),
        }
    }
}
