//! `cofferdam build`, with a daemon and without.

use nix::sys::signal::Signal;

use crate::named;
use crate::support::case::{Running, finish};
use crate::support::daemon::Daemon;
use crate::support::leftovers::{gone, marker, processes};
use crate::support::{Case, host_tools, repository};

pub fn tests() -> impl IntoIterator<Item = (&'static str, fn(&Case))> {
    named![build_command]
}

pub fn own_mode_tests() -> impl IntoIterator<Item = (&'static str, fn(&Case))> {
    named![build_command_without_a_daemon, a_lost_daemon, a_state_directory_in_use]
}

/// The example request, with the paths that this host has.
fn example(case: &Case) -> String {
    let text = std::fs::read_to_string(repository().join("examples/request.json")).unwrap();
    let mut request: serde_json::Value = serde_json::from_str(&text).unwrap();
    request["constraints"]["system"] = format!("{}-linux", std::env::consts::ARCH).into();
    request["constraints"]["availableRoPaths"] = host_tools().into();
    let path = case.write("request.json", request.to_string());
    path.to_string_lossy().into_owned()
}

fn build_command(case: &Case) {
    let path = example(case);
    let daemon = Daemon::start(case, &[]);
    let build = |flags: &[&str]| {
        let mut command = case.cofferdam(["build", &path]);
        command.args(flags);
        finish(command)
    };
    build(&["--to", &daemon.address()]).code(0).says("Hello from a request.\n");
    build(&["--to", &format!("grpc+{}", daemon.address())]).code(0).says("Hello from a request.\n");
    let events = build(&["--json", "--to", &daemon.address()]).code(0).json();
    assert!(events.last().unwrap().get("completed").is_some(), "{events:?}");
    let digest =
        events.last().unwrap()["completed"]["outputs"][0]["output"]["file"]["digest"].as_str().unwrap();
    assert_eq!(digest.len(), 44, "32 bytes as base64");
    build(&["--to", "unix:no-such-socket"]).code(125).complains("no-such-socket");
}

fn build_command_without_a_daemon(case: &Case) {
    let path = example(case);
    finish(case.cofferdam(["build", &path, "--state-dir", "state"])).code(125).complains("--allow-host-path");
    let allowed = host_tools().into_iter().flat_map(|path| ["--allow-host-path", path]);
    let mut build = case.cofferdam(["build", &path, "--state-dir", "state"]);
    build.args(allowed);
    finish(build).code(0).says("Hello from a request.\n");
    let table = [
        ("{", "line 1"),
        (r#"{"noSuchField": 1}"#, "noSuchField"),
        (r#"{"commandArgs": "true"}"#, "column 22: invalid type: string \"true\", expected a list"),
        (r#"{"commandArgs": [], "workingDir": "build"}"#, "command_args"),
        (r#"{"commandArgs": ["/bin/sh"], "workingDir": "/"}"#, "working_dir"),
    ];
    for (text, named) in table {
        case.write("bad.json", text);
        let ran = finish(case.cofferdam(["build", "bad.json"])).code(125).says("");
        assert!(ran.err().contains(named), "{text} is not told by {named:?}; {ran}");
    }
    finish(case.cofferdam(["build", "no-such.json"])).code(125).complains("no-such.json");
}

fn a_lost_daemon(case: &Case) {
    let text = std::fs::read_to_string(example(case)).unwrap();
    let mut request: serde_json::Value = serde_json::from_str(&text).unwrap();
    let marker = marker();
    request["commandArgs"][2] = format!("echo ready; sleep {marker}").into();
    case.write("request.json", request.to_string());
    let mut daemon = Daemon::start(case, &[]);
    let mut build = Running::start(case.cofferdam(["build", "request.json", "--to", &daemon.address()]));
    build.wait_for("ready");
    daemon.signal(Signal::SIGKILL);
    daemon.wait();
    let lost = format!("the connection to {} was lost", daemon.address());
    build.finish().code(125).complains(&lost);
    gone("a process", || processes(&marker));
}

fn a_state_directory_in_use(case: &Case) {
    let path = example(case);
    let daemon = Daemon::start(case, &["--no-builds"]);
    let state = daemon.state().to_str().unwrap();
    let store = Running::start(case.cofferdam(["store", "add", &path, "--state-dir", state]));
    let build = Running::start(case.cofferdam(["build", &path, "--state-dir", state]));
    let run = Running::start(case.cofferdam(["run", "--state-dir", state, "--", "true"]));
    for (running, advice) in [(store, "with --to ADDR"), (build, "with --to ADDR"), (run, "--state-dir")] {
        running.finish().code(125).complains("is in use").complains(advice).complains(state);
    }
}
