//! `cofferdam selftest`: it runs in every mode, tells what came of it in each format, and its exit code counts.

use std::process::ExitCode;

mod support;

use support::case::{Ran, finish};
use support::world::World;
use support::{Case, Lacking, Mode};

/// A few probes of every family that hold whatever the profile.
const SOME: &str = "FS-05,FS-10,PR-01,PR-12,NET-01,DEV-02,PS-07,CAP-01,CAP-05,SEC-04,SEC-10";

fn main() -> ExitCode {
    let mut trials =
        support::in_own_mode(named![list, unknown_probe, expectations, cases_are_the_same, no_sabotage]);
    trials.extend(support::in_every_mode(named![holds]));
    trials.extend(support::in_own_mode(named![no_network_to_give]));
    let mode = Mode::own();
    trials.push(support::fallible(format!("networks_of_their_own::{mode}"), mode, networks_of_their_own));
    support::run(trials)
}

fn selftest(case: &Case, args: &[&str]) -> Ran {
    let mut command = case.cofferdam(["selftest"]);
    command.args(args);
    // The modes' own users must get there.
    support::case::set_mode(&case.tmp(), 0o755);
    finish(command)
}

/// The mode that a case is in, in the JSON of a run.
#[track_caller]
fn mode(report: &serde_json::Value, mode: Mode) -> &serde_json::Value {
    let modes = report["modes"].as_array().unwrap();
    let found = modes.iter().find(|found| found["mode"] == mode.to_string()).unwrap();
    assert_eq!(found["unavailable"], serde_json::Value::Null, "{found}");
    found
}

fn list(case: &Case) {
    let listed = selftest(case, &["--list"]).code(0).out();
    let ids: Vec<&str> = listed.lines().filter_map(|line| line.get(2..)?.split(' ').next()).collect();
    assert!(ids.len() >= 55, "{} probes: {listed}", ids.len());
    for id in ["FS-01", "PR-06", "NET-04", "DEV-05", "PS-03", "CAP-02", "SEC-01"] {
        assert!(listed.contains(&format!("* {id} ")), "{id} is not required: {listed}");
    }
    assert!(listed.contains("  SEC-10 "), "{listed}");
    let one = selftest(case, &["--list", "--only", "fs-14"]).code(0).out();
    assert_eq!(one.lines().count(), 1, "{one}");
}

fn unknown_probe(case: &Case) {
    selftest(case, &["--only", "FS-99"]).code(125).complains("FS-99");
    selftest(case, &["--expect", "moon"]).code(125);
}

/// What is expected and can't be had is a failure; what can't be had and isn't expected is told.
fn expectations(case: &Case) {
    let own = case.mode.to_string();
    let ran = selftest(case, &["--json", "--only", "CAP-01", "--expect", &own]).code(0);
    mode(&serde_json::from_str(&ran.out()).unwrap(), case.mode);
    // Without any range of sub-ids in sight there is no mode for one.
    let mut command = case.program("unshare");
    let hide = "mount --bind /dev/null /etc/subuid && exec \"$@\"";
    command.args(["--user", "--map-root-user", "--mount", "sh", "-c", hide, "sh"]);
    command.arg(support::binary()).args(["selftest", "--only", "CAP-01", "--expect", "range", "--json"]);
    let ran = finish(command).code(1);
    let report: serde_json::Value = serde_json::from_str(&ran.out()).unwrap();
    let range = &report["modes"][1];
    assert_eq!((&range["mode"], &range["expected"]), (&"range".into(), &true.into()));
    assert!(range["unavailable"].as_str().unwrap().contains("subuid"), "{range}");
    assert!(report["summary"]["broken"].as_u64().unwrap() >= 1, "{report}");
}

/// The same run in three formats says the same.
fn cases_are_the_same(case: &Case) {
    let ran = selftest(case, &["--json", "--junit", "out.xml", "--only", "CAP-01,SEC-04"]);
    let report: serde_json::Value = serde_json::from_str(&ran.out()).unwrap();
    let xml = String::from_utf8(case.read("out.xml")).unwrap();
    let cases = well_formed(&xml);
    let modes = report["modes"].as_array().unwrap();
    let expected: usize = modes
        .iter()
        .map(
            |mode| {
                if mode["unavailable"].is_null() { mode["probes"].as_array().unwrap().len() + 1 } else { 1 }
            },
        )
        .sum();
    assert_eq!(cases, expected, "{xml}");
    assert!(xml.contains("name=\"CAP-01 ") && xml.contains("name=\"LEFT "), "{xml}");
    let table = selftest(case, &["--only", "CAP-01"]).code(0).out();
    assert!(
        table.contains("CAP-01") && table.contains("held") && table.contains("not applicable"),
        "{table}"
    );
}

/// Checks that every element that is opened is closed, in order, and that no text has what must be escaped. Yields the
/// number of test cases.
#[track_caller]
fn well_formed(xml: &str) -> usize {
    let body = xml.strip_prefix("<?xml version=\"1.0\" encoding=\"UTF-8\"?>").unwrap();
    let (mut open, mut cases) = (Vec::new(), 0);
    for piece in body.split('<').skip(1) {
        let (tag, text) = piece.split_once('>').unwrap();
        assert!(!text.contains('>') && !tag.contains('&') || piece.contains(';'), "{piece}");
        let name = tag.trim_start_matches('/').split([' ', '/']).next().unwrap();
        match (tag.starts_with('/'), tag.ends_with('/')) {
            (true, _) => assert_eq!(open.pop(), Some(name), "{xml}"),
            (false, false) => open.push(name),
            (false, true) => {}
        }
        cases += usize::from(!tag.starts_with('/') && name == "testcase");
    }
    assert!(open.is_empty(), "{open:?} stay open in {xml}");
    cases
}

/// What `tests/sabotage.rs` can do to its program, nobody can to this one.
fn no_sabotage(case: &Case) {
    let mut command = case.cofferdam(["selftest", "--json", "--only", "CAP-01"]);
    command.env("COFFERDAM_WITHOUT", "capabilities,no-new-privs");
    support::case::set_mode(&case.tmp(), 0o755);
    let report = serde_json::from_str(&finish(command).out()).unwrap();
    let probe = &mode(&report, case.mode)["probes"][0];
    assert_eq!(probe["outcome"], "held", "{probe}");
}

/// Promises that hold in each mode. As root the battery changes to the other modes' users itself.
fn holds(case: &Case) {
    let ran = selftest(case, &["--json", "--only", SOME]);
    let report: serde_json::Value = serde_json::from_str(&ran.out()).unwrap();
    let mode = mode(&report, case.mode);
    for probe in mode["probes"].as_array().unwrap() {
        assert_eq!(probe["outcome"], "held", "{probe}");
    }
    assert_eq!(mode["probes"].as_array().unwrap().len(), SOME.split(',').count());
    assert_eq!(mode["left"]["outcome"], "held", "{mode}");
    ran.code(0);
}

/// Builds with network, and what they and the host can't reach of each other.
const NETWORK: &str = "NET-02,NET-03,NET-04,NET-05,NET-06,NET-07,NET-10";

/// Where pasta works, nothing of the network is left untested, in any mode that there is.
fn networks_of_their_own(case: &Case) -> Result<(), Lacking> {
    let world = World::new(case, "nameserver 192.0.2.1\n")?;
    support::case::set_mode(&case.tmp(), 0o755);
    let mut command = world.cofferdam(case);
    command.args(["selftest", "--json", "--only", NETWORK]);
    let ran = finish(command);
    let report: serde_json::Value = serde_json::from_str(&ran.out()).unwrap();
    mode(&report, case.mode);
    for mode in report["modes"].as_array().unwrap().iter().filter(|mode| mode["unavailable"].is_null()) {
        let probes = mode["probes"].as_array().unwrap();
        assert_eq!(probes.len(), NETWORK.split(',').count());
        for probe in probes {
            assert_eq!(probe["outcome"], "held", "{probe}");
        }
        assert_eq!(mode["left"]["outcome"], "held", "{mode}");
    }
    ran.code(0);
    Ok(())
}

/// Without a way out builds get no network at all, not the host's, and the probes say why.
fn no_network_to_give(case: &Case) {
    support::case::set_mode(&case.tmp(), 0o755);
    let mut command = case.program("unshare");
    command.args(["--user", "--map-root-user", "--net"]).arg(support::binary());
    command.args(["selftest", "--json", "--only", "NET-04,NET-05,NET-10"]);
    let ran = finish(command).code(0);
    let report: serde_json::Value = serde_json::from_str(&ran.out()).unwrap();
    for probe in report["modes"][0]["probes"].as_array().unwrap() {
        let expected = if probe["id"] == "NET-10" { "held" } else { "not_applicable" };
        assert_eq!(probe["outcome"], expected, "{probe}");
        let reasons = probe["reasons"].to_string();
        assert!(probe["id"] == "NET-10" || reasons.contains("builds get no network here"), "{probe}");
    }
}
