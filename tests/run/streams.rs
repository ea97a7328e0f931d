//! What the build writes, and how it exits, is what the caller gets.

use crate::named;
use crate::support::{Case, case::finish};

pub fn tests() -> impl IntoIterator<Item = (&'static str, fn(&Case))> {
    named![
        stdout_and_stderr_are_apart,
        bytes_are_exact,
        a_long_line_arrives_whole,
        many_lines_keep_their_order,
        stdin_is_empty,
        a_broken_stdout_is_told,
        a_broken_stderr_is_borne,
        exit_codes,
        command_not_found,
        command_not_executable,
        json_events_in_order,
        json_tells_of_failure,
        needles_are_reported,
    ]
}

fn stdout_and_stderr_are_apart(case: &Case) {
    let ran = case.run(&[], "echo out; echo err >&2").code(0);
    assert_eq!((ran.out().as_str(), ran.err().as_str()), ("out\n", "err\n"));
}

fn bytes_are_exact(case: &Case) {
    let ran = case.run(&[], r"printf 'a\377\000b\n\n\r\303'; printf '\200' >&2").code(0);
    assert_eq!(ran.stdout, b"a\xff\0b\n\n\r\xc3");
    assert_eq!(ran.stderr, b"\x80");
}

fn a_long_line_arrives_whole(case: &Case) {
    let ran = case.run(&[], "head -c 1048576 /dev/zero | tr '\\0' x").code(0);
    assert_eq!(ran.stdout.len(), 1 << 20);
    assert!(ran.stdout.iter().all(|&byte| byte == b'x'));
}

fn many_lines_keep_their_order(case: &Case) {
    let expected: String = (1..=100_000).map(|n| format!("{n}\n")).collect();
    assert!(case.run(&[], "seq 1 100000").code(0).out() == expected);
}

fn stdin_is_empty(case: &Case) {
    case.run(&[], "wc -c").code(0).says("0\n");
}

/// A pipe that nobody reads from.
fn broken_pipe() -> std::io::PipeWriter {
    std::io::pipe().unwrap().1
}

fn a_broken_stdout_is_told(case: &Case) {
    let run = case.run_command(&[], "echo hi").stdout(broken_pipe()).output().unwrap();
    assert_eq!(run.status.code(), Some(125));
    let told = String::from_utf8_lossy(&run.stderr);
    assert_eq!(told, "cofferdam: can't write to standard output: Broken pipe (os error 32)\n");
}

fn a_broken_stderr_is_borne(case: &Case) {
    let flags = ["--output", "x", "--needle", "hi"];
    let mut command = case.run_command(&flags, "echo hi > /outputs/x");
    let run = command.stderr(broken_pipe()).output().unwrap();
    assert_eq!(run.status.code(), Some(0), "what it has to remark is not worth more");
    assert_eq!(case.read("x"), b"hi\n");
    let run = case.cofferdam(["run", "--no-such-flag"]).stderr(broken_pipe()).output().unwrap();
    assert_eq!(run.status.code(), Some(125));
}

fn exit_codes(case: &Case) {
    for (script, code) in [("exit 0", 0), ("exit 1", 1), ("exit 42", 42), ("exit 255", 255)] {
        case.run(&[], script).code(code);
    }
    case.run(&[], "kill -TERM $$").code(128 + 15).complains("term");
    case.run(&[], "kill -KILL $$").code(128 + 9).complains("kill");
    // Real-time signals have no names.
    case.run(&[], "kill -40 $$").code(128 + 40).complains("signal 40");
}

fn command_not_found(case: &Case) {
    finish(case.cofferdam(["run", "--host-tools", "--", "/no/such/program"]))
        .code(127)
        .complains("/no/such/program");
    finish(case.cofferdam(["run", "--host-tools", "--", "no-such-program"]))
        .code(127)
        .complains("no-such-program");
    // Without --host-tools nothing of the host is there.
    finish(case.cofferdam(["run", "--", "/bin/sh", "-c", "true"])).code(127).complains("/bin/sh");
}

fn command_not_executable(case: &Case) {
    case.write("plain", "echo never\n");
    finish(case.cofferdam(["run", "--host-tools", "--input", "plain=plain", "--", "/inputs/plain"]))
        .code(126)
        .complains("/inputs/plain");
}

fn json_events_in_order(case: &Case) {
    let flags = ["--json", "--output", "b", "--output", "a"];
    let events = case.run(&flags, "echo hi; echo 1 > /outputs/a; echo 2 > /outputs/b").code(0).json();
    let kinds: Vec<&str> = events.iter().map(kind).collect();
    assert_eq!(kinds, ["started", "log", "refscan", "refscan", "completed"]);
    assert!(!events[0]["started"]["buildId"].as_str().unwrap().is_empty());
    assert_eq!(events[1]["log"]["stream"], "STREAM_STDOUT");
    assert_eq!(events[1]["log"]["data"], "aGkK");
    // Proto3 JSON may leave out an index of 0.
    assert_eq!(events[2]["refscan"]["outputIndex"].as_u64().unwrap_or(0), 0);
    assert_eq!(events[3]["refscan"]["outputIndex"], 1);
    assert_eq!(events[4]["completed"]["outputs"].as_array().unwrap().len(), 2);
    assert_eq!((case.read("a"), case.read("b")), (b"1\n".to_vec(), b"2\n".to_vec()));
}

fn json_tells_of_failure(case: &Case) {
    let events = case.run(&["--json"], "exit 3").code(3).json();
    assert_eq!(events.iter().map(kind).collect::<Vec<_>>(), ["started", "failed"]);
    assert_eq!(events[1]["failed"]["exitCode"], 3);
}

fn needles_are_reported(case: &Case) {
    let flags = ["--json", "--output", "x", "--needle", "absent", "--needle", "abc", "--needle", "bc"];
    let events = case.run(&flags, "mkdir /outputs/x; ln -s ..abc.. /outputs/x/link").code(0).json();
    let found = |value: &serde_json::Value| -> Vec<String> {
        value.as_array().unwrap().iter().map(|n| n.to_string().trim_matches('"').to_owned()).collect()
    };
    assert_eq!(found(&events[1]["refscan"]["foundNeedles"]), ["1", "2"]);
    assert_eq!(found(&events[2]["completed"]["outputs"][0]["needles"]), ["1", "2"]);
}

/// The one key of an event.
fn kind(event: &serde_json::Value) -> &str {
    let keys: Vec<&String> = event.as_object().unwrap().keys().collect();
    assert_eq!(keys.len(), 1, "{event}");
    keys[0]
}
