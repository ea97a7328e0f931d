//! However a run ends, nothing of it stays.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::named;
use crate::support::leftovers::{self, LIMIT, gone, marker, mounts, names, processes, until};
use crate::support::{Case, case::Running};

pub fn tests() -> impl IntoIterator<Item = (&'static str, fn(&Case))> {
    named![
        nothing_stays_after_success,
        nothing_stays_after_failure,
        host_mounts_are_untouched,
        a_background_process_does_not_delay,
        an_orphan_ends_by_any_signal,
        a_closed_stdout_does_not_end_the_build,
        interrupt_ends_it,
        terminate_ends_it,
        kill_ends_it,
        an_interrupt_while_outputs_are_written,
        two_at_a_time,
        many_at_a_time,
    ]
}

fn nothing_stays_after_success(case: &Case) {
    case.write("in", "x");
    // A tree that is made to be hard to remove, too.
    let script =
        "mkdir -p /build/a/b; touch /build/a/b/c; chmod 0 /build/a/b /build/a; cp /inputs/in /outputs/x";
    case.run(&["--input", "in=in", "--output", "x"], script).code(0);
    gone("something in TMPDIR", || names(&case.tmp()));
    assert_eq!(names(&case.path("")).into_iter().collect::<Vec<_>>(), ["in", "x"]);
}

fn nothing_stays_after_failure(case: &Case) {
    case.run(&["--output", "x"], "touch /build/file /tmp/file; exit 1").code(1);
    gone("something in TMPDIR", || names(&case.tmp()));
    assert!(names(&case.path("")).is_empty());
}

fn host_mounts_are_untouched(case: &Case) {
    case.write("in", "x");
    let before = mounts("self");
    let marker = marker();
    let script = format!("echo ready; exec sleep {marker}");
    let mut running = Running::start(case.run_command(&["--input", "in=in"], &script));
    running.wait_for("ready");
    assert_eq!(mounts("self"), before, "while the build runs");
    running.signal(Signal::SIGTERM);
    running.finish();
    assert_eq!(mounts("self"), before, "after it");
}

fn a_background_process_does_not_delay(case: &Case) {
    let marker = marker();
    let script = format!("setsid sleep {marker} & echo ok > /outputs/x");
    let ran = case.run(&["--output", "x"], &script).code(0);
    assert!(ran.took < Duration::from_secs(10), "took {:?}", ran.took);
    gone("a process", || processes(&marker));
    assert_eq!(case.read("x"), b"ok\n");
}

fn an_orphan_ends_by_any_signal(case: &Case) {
    for signal in [9, 11, 40] {
        let script = format!("( sh -c 'kill -{signal} $$' & ); sleep 0.5; echo survived");
        case.run(&[], &script).code(0).says("survived\n");
    }
}

fn a_closed_stdout_does_not_end_the_build(case: &Case) {
    case.run(&["--output", "x"], "exec >&- 2>&-; sleep 0.5; echo ok > /outputs/x").code(0);
    assert_eq!(case.read("x"), b"ok\n");
}

/// Starts a build that sleeps, sends the signal, and counts what is left.
fn ends_with(case: &Case, signal: Signal) {
    let before = mounts("self");
    let marker = marker();
    // Neither a deaf build nor its deaf grandchild may stay.
    let script = format!("trap '' INT TERM; setsid sleep {marker} & echo ready; sleep {marker}; echo never");
    let mut running = Running::start(case.run_command(&["--output", "x"], &script));
    running.wait_for("ready");
    assert!(!processes(&marker).is_empty());
    running.signal(signal);
    gone("a process", || processes(&marker));
    gone("something in TMPDIR", || names(&case.tmp()));
    let ran = running.finish();
    assert!(ran.took < LIMIT);
    assert!(!ran.status.success() && !ran.out().contains("never"), "{ran}");
    assert!(!case.path("x").exists());
    assert_eq!(mounts("self"), before);
}

fn interrupt_ends_it(case: &Case) {
    ends_with(case, Signal::SIGINT);
}

fn terminate_ends_it(case: &Case) {
    ends_with(case, Signal::SIGTERM);
}

fn kill_ends_it(case: &Case) {
    ends_with(case, Signal::SIGKILL);
}

fn an_interrupt_while_outputs_are_written(case: &Case) {
    for (signal, code) in [(Signal::SIGINT, 130), (Signal::SIGTERM, 143)] {
        let script = "echo small > /outputs/a; truncate -s 256M /outputs/b";
        let running = Running::start(case.run_command(&["--output", "a", "--output", "b"], script));
        let hidden = || {
            names(&case.path(""))
                .into_iter()
                .any(|name| name.starts_with(".cofferdam-") && name.ends_with("-b"))
        };
        until("the second output to be written", hidden);
        running.signal(signal);
        let sent = Instant::now();
        running.finish().code(code);
        assert!(sent.elapsed() < LIMIT, "took {:?}", sent.elapsed());
        assert_eq!(names(&case.path("")).into_iter().collect::<Vec<_>>(), ["a"]);
        gone("something in TMPDIR", || names(&case.tmp()));
    }
}

fn two_at_a_time(case: &Case) {
    let script = |name: &str| format!("echo ready; sleep 0.5; echo {name} > /outputs/{name}");
    let [mut first, mut second] =
        ["a", "b"].map(|name| Running::start(case.run_command(&["--output", name], &script(name))));
    first.wait_for("ready");
    second.wait_for("ready");
    first.finish().code(0);
    second.finish().code(0);
    assert_eq!((case.read("a"), case.read("b")), (b"a\n".to_vec(), b"b\n".to_vec()));
    gone("something in TMPDIR", || names(&case.tmp()));
}

fn many_at_a_time(case: &Case) {
    case.write("in", "x\n");
    let flags = ["--input", "in=in"];
    let all: Vec<Running> =
        (0..8).map(|_| Running::start(case.run_command(&flags, "cat /inputs/in"))).collect();
    for running in all {
        running.finish().code(0).says("x\n");
    }
    gone("something in TMPDIR", || leftovers::names(&case.tmp()));
}
