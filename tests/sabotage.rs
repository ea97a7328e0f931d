//! The proof of the self-test: with a layer of the sandbox left out, the probes that are to notice do.
//!
//! Only of a build with the feature `sabotage`: `cargo test --features sabotage --test sabotage`.

use std::process::ExitCode;

use libtest_mimic::Trial;
use serde_json::Value;

mod support;

use support::case::finish;
use support::{Case, Mode};

/// What is left out, which probe notices, and a part of what it then says.
type Row = (&'static str, &'static [(&'static str, &'static str)]);

/// Where one layer stands behind another, the first is left out too: with it in place the second is never reached.
const ROWS: &[Row] = &[
    ("capabilities", &[("CAP-01", "CapEff"), ("CAP-02", "CapEff"), ("SEC-10", "reboot")]),
    ("no-new-privs", &[("CAP-01", "NoNewPrivs")]),
    ("dumpable", &[("PR-06", "/proc/1/")]),
    ("read-only-root", &[("FS-14", "not mounted read-only")]),
    ("network", &[("NET-01", "network interfaces")]),
    ("ipc", &[("LEAK-05", "System V segment: it succeeded")]),
    ("uts", &[("LEAK-04", "host name")]),
    ("cgroup-namespace", &[("PS-05", "/proc/self/cgroup")]),
    ("proc-masks", &[("PS-01", "/proc/sys is not read-only")]),
    ("keyring,seccomp", &[("SEC-05", "search keyring")]),
    ("descriptors", &[("LEAK-01", "other descriptors")]),
    ("session", &[("PR-13", "session"), ("PR-14", "session")]),
    ("mount-flags", &[("FS-13", "without nosuid")]),
    ("signals", &[("PR-12", "it went on"), ("PR-13", "ignored signals")]),
    ("seccomp", &[("SEC-01", "it succeeded"), ("SEC-03", "it succeeded"), ("SEC-07", "it succeeded")]),
    ("network,landlock", &[("LEAK-05", "connect to the other build's socket: it succeeded")]),
    ("limits", &[("PR-04", "no end to it"), ("PR-13", "core files"), ("PS-08", "core files")]),
];

fn main() -> ExitCode {
    let mut trials = support::in_own_mode([("whole", whole as fn(&Case))]);
    trials.extend(ROWS.iter().map(|row| trial(*row)));
    support::run(trials)
}

fn trial((left_out, notices): Row) -> Trial {
    support::in_mode(&format!("without_{left_out}"), Mode::own(), move |case| {
        noticed(case, left_out, notices)
    })
}

/// What the probes say of the sandbox as it should be.
fn whole(case: &Case) {
    let mut probes: Vec<_> = ROWS.iter().flat_map(|(_, notices)| *notices).map(|(id, _)| *id).collect();
    probes.sort_unstable();
    probes.dedup();
    for found in outcomes(case, "", &probes) {
        assert_eq!(found["outcome"], "held", "{found}");
    }
}

fn noticed(case: &Case, left_out: &str, notices: &[(&str, &str)]) {
    let probes: Vec<_> = notices.iter().map(|(id, _)| *id).collect();
    let found = outcomes(case, left_out, &probes);
    for (id, sign) in notices {
        let found = found.iter().find(|found| found["id"] == *id).unwrap();
        assert_eq!(found["outcome"], "broken", "{id} does not notice that {left_out} is left out: {found}");
        let reasons = found["reasons"].to_string();
        assert!(reasons.contains(sign), "{id} is broken, but not for the want of {left_out}: {reasons}");
    }
}

/// What became of the probes in the caller's own mode.
fn outcomes(case: &Case, left_out: &str, probes: &[&str]) -> Vec<Value> {
    let mut command =
        case.cofferdam(["selftest", "--json", "--mode", &case.mode.to_string(), "--only", &probes.join(",")]);
    command.env("COFFERDAM_WITHOUT", left_out);
    // The modes' own users must get there.
    support::case::set_mode(&case.tmp(), 0o755);
    let report: Value = serde_json::from_str(&finish(command).out()).unwrap();
    let modes = report["modes"].as_array().unwrap();
    let own = modes.iter().find(|mode| mode["mode"] == case.mode.to_string()).unwrap();
    let found = own["probes"].as_array().unwrap_or_else(|| panic!("not run: {own}"));
    assert_eq!(found.len(), probes.len(), "{own}");
    found.clone()
}
