//! Bad input is told plainly, before anything runs, with cofferdam's own exit code.

use crate::named;
use crate::support::case::{finish, set_mode};
use crate::support::leftovers::names;
use crate::support::{Case, Mode, binary};

pub fn tests() -> impl IntoIterator<Item = (&'static str, fn(&Case))> {
    named![bad_arguments, an_unreadable_input, an_unusable_state_dir, an_unusable_out_dir]
}

/// Flags, and what the complaint has to name.
const BAD: &[(&[&str], &str)] = &[
    (&["--no-such-flag"], "--no-such-flag"),
    (&["--input", "name=no/such/path"], "no/such/path"),
    (&["--input", "just-a-name"], "just-a-name"),
    (&["--input", "=file"], "--input"),
    (&["--input", "a/b=file"], "a/b"),
    (&["--input", "..=file"], "`..`"),
    (&["--input", "same=file", "--input", "same=file"], "same"),
    (&["--output", "a/b"], "a/b"),
    (&["--output", ".."], "`..`"),
    (&["--output", ""], "--output"),
    (&["--output", "same", "--output", "same"], "same"),
    (&["--env", "NOVALUE"], "NOVALUE"),
    (&["--env", "=value"], "--env"),
    (&["--needle", ""], "--needle"),
    (&["--host-path", "relative"], "relative"),
    (&["--host-path", "/no/such/path"], "/no/such/path"),
    (&["--rootfs", "no/such/root"], "no/such/root"),
    (&["--rootfs", "file"], "file"),
    // By option, and before the input is read, which has something in it that can't be.
    (&["--input", "bad=bad", "--output", "same", "--output", "same"], "--output"),
    (&["--input", "bad=bad", "--needle", ""], "--needle"),
];

fn bad_arguments(case: &Case) {
    case.write("file", "");
    std::os::unix::net::UnixListener::bind(case.make_dir("bad").join("a-socket")).unwrap();
    let before = names(&case.path(""));
    for (flags, named) in BAD {
        let ran = case.run(flags, "echo ran").code(125).says("");
        // Back-quoted names may be quoted another way.
        let bare = named.trim_matches('`');
        assert!(ran.err().contains(bare), "{flags:?} is not told by {bare:?}; {ran}");
        assert!(!ran.err().contains("panicked"), "{ran}");
    }
    finish(case.cofferdam(["run", "--host-tools"])).code(125).complains("command");
    assert_eq!(names(&case.path("")), before);
    assert!(names(&case.tmp()).is_empty());
}

fn an_unreadable_input(case: &Case) {
    std::os::unix::net::UnixListener::bind(case.make_dir("dir").join("a-socket")).unwrap();
    case.run(&["--input", "dir=dir"], "echo ran").code(125).says("").complains("dir/a-socket");
}

fn an_unusable_state_dir(case: &Case) {
    case.write("file", "");
    case.run(&["--state-dir", "file/state"], "echo ran").code(125).says("").complains("file/state");
}

fn an_unusable_out_dir(case: &Case) {
    case.write("file", "");
    case.run(&["--out-dir", "file", "--output", "x"], "echo ran; touch /outputs/x")
        .code(125)
        .says("")
        .complains("file");
    if case.mode != Mode::Root {
        set_mode(&case.make_dir("closed"), 0o555);
        case.run(&["--out-dir", "closed", "--output", "x"], "echo ran; touch /outputs/x")
            .code(125)
            .says("")
            .complains("closed: Permission denied");
    }
}

/// Ingesting an input fills a small disk, which only this command sees.
pub fn full_disk(case: &Case) {
    case.make_dir("small");
    case.write("big", vec![7; 24 << 20]);
    let on_small_disk = |flags: &[&str], script: &str| {
        let mut command = case.program("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c"]);
        // What is left is counted where the disk can be seen.
        command.arg(
            "mount -t tmpfs -o size=16m,mode=0755 none small || exit 99; \"$@\"; code=$?; \
             ls small/builds 2>/dev/null; exit $code",
        );
        command.arg("sh").arg(binary()).args(["run", "--host-tools", "--state-dir", "small"]);
        command.args(flags).args(["--", "/bin/sh", "-c", script]);
        finish(command)
    };
    on_small_disk(&["--input", "big=big"], "echo ran").code(125).says("").complains("no space left");
    // What the build itself can't write, the build is told.
    on_small_disk(&[], "head -c 30000000 /dev/zero > /build/fill || exit 9")
        .code(9)
        .complains("no space left");
    on_small_disk(&["--output", "x"], "echo fits > /outputs/x").code(0).says("");
    assert_eq!(case.read("x"), b"fits\n");
}
