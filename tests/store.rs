//! `cofferdam store`: trees go in and come back as they were.

use std::os::unix::fs::PermissionsExt;
use std::process::ExitCode;

mod support;

use support::Case;
use support::case::{self, Ran, finish};
use support::daemon::Daemon;

/// The digests of the design's three directories, and of no bytes at all.
const EMPTY: &str = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262";
const KEEP: &str = "8b5b5d642b646bb8ed504b0862c39413e87e57491497de7bd075953f7b83810e";
const TREE: &str = "fb8c6e81db869c486d76733de6593944cfe2a311d452e478ec7e5180d77a0617";

fn main() -> ExitCode {
    let mut trials = support::in_own_mode(named![known_digests, bad_arguments, what_cannot_be_stored]);
    trials.extend(support::in_every_mode(named![there_and_back, there_and_back_over_the_wire]));
    support::run(trials)
}

fn store(case: &Case, args: &[&str], place: &[&str]) -> Ran {
    let mut command = case.cofferdam(["store"]);
    command.args(args).args(place);
    finish(command)
}

fn known_digests(case: &Case) {
    case.write("keep/.keep", "");
    tree(case, "tree");
    case.make_dir("empty");
    case.write("nothing", "");
    let table = [("keep", KEEP), ("tree", TREE), ("empty", EMPTY), ("nothing", EMPTY)];
    for (path, digest) in table {
        store(case, &["add", path], &["--state-dir", "state"]).code(0).says(&format!("{digest}\n"));
    }
}

fn tree(case: &Case, name: &str) {
    case.write(&format!("{name}/bin/.keep"), "");
    case::set_mode(&case.write(&format!("{name}/hello"), "hello world\n"), 0o755);
    case.link(&format!("{name}/link"), "bin/.keep");
}

fn comes_back(case: &Case, place: &[&str]) {
    tree(case, "tree");
    store(case, &["add", "tree"], place).code(0).says(&format!("{TREE}\n"));
    let listing = store(case, &["ls", TREE], place).code(0).out();
    for name in ["bin", "hello", "link"] {
        assert!(listing.contains(name), "no {name} in {listing}");
    }
    store(case, &["get", TREE, "back"], place).code(0);
    let same = case.program("diff").args(["-r", "--no-dereference", "tree", "back"]).status().unwrap();
    assert!(same.success());
    let executable = |path| std::fs::metadata(case.path(path)).unwrap().permissions().mode() & 0o100 != 0;
    assert!(executable("back/hello") && !executable("back/bin/.keep"));
    // Once more, and nothing is lost by what is already there.
    store(case, &["add", "tree"], place).code(0).says(&format!("{TREE}\n"));
    store(case, &["get", TREE, "back"], place).code(125).complains("back");
    store(case, &["get", &"0".repeat(64), "none"], place).code(125).complains("0000");
    assert!(!case.path("none").exists());
}

fn there_and_back(case: &Case) {
    comes_back(case, &["--state-dir", "state"]);
}

fn there_and_back_over_the_wire(case: &Case) {
    let daemon = Daemon::start(case, &["--no-builds"]);
    comes_back(case, &["--to", &daemon.address()]);
    // And a file larger than any message.
    let big: Vec<u8> = (0..9_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    case.write("big", &big);
    let digest = store(case, &["add", "big"], &["--to", &daemon.address()]).code(0).out();
    assert_eq!(digest.trim(), blake3::hash(&big).to_hex().as_str());
    store(case, &["get", digest.trim(), "big-back"], &["--to", &daemon.address()]).code(0);
    assert!(case.read("big-back") == big);
}

fn bad_arguments(case: &Case) {
    case.write("file", "");
    let long = "0".repeat(63);
    let table: [(&[&str], &str); 6] = [
        (&["add", "no/such"], "no/such"),
        (&["get", "xyz", "dest"], "xyz"),
        (&["get", &long, "dest"], &long),
        (&["ls", EMPTY, "--no-such-flag"], "--no-such-flag"),
        (&["ls", KEEP, "--to", "nonsense"], "nonsense"),
        (&["frobnicate"], "frobnicate"),
    ];
    for (args, named) in table {
        let ran = store(case, args, &["--state-dir", "state"]).code(125).says("");
        assert!(ran.err().contains(named) && !ran.err().contains("panicked"), "{args:?}; {ran}");
    }
}

fn what_cannot_be_stored(case: &Case) {
    let made = case.program("mkfifo").arg(case.make_dir("dir").join("the-pipe")).status().unwrap();
    assert!(made.success());
    store(case, &["add", "dir"], &["--state-dir", "state"]).code(125).says("").complains("dir/the-pipe");
}
