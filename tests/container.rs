//! Cofferdam in containers, made by `scripts/container`: what one takes away is told, and what can't be done without
//! is refused with its cause.

use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::sync::OnceLock;

mod support;

use support::case::{Ran, finish};
use support::{Case, Facility, Lacking, Mode, binary, repository};

/// A test, and its name.
type Named = (&'static str, fn(&Case) -> Result<(), Lacking>);

const RUN: [&str; 7] = ["run", "--host-tools", "--input", "name=/etc/hostname", "--", "sh", "-c"];

fn main() -> ExitCode {
    let as_root: [Named; 6] = named![
        a_privileged_container,
        without_fuse_inputs_are_copied,
        many_ids_give_builds_their_own,
        one_id_is_shared,
        a_masked_proc_fails_builds,
        a_masked_proc_stops_a_daemon,
    ];
    let trials =
        as_root.map(|(name, test)| support::fallible(format!("{name}::{}", Mode::Root), Mode::Root, test));
    support::run(trials.into())
}

/// Runs the binary in a container.
fn contained(container: &[&str], arguments: &[&str]) -> Result<Ran, Lacking> {
    static AVAILABLE: OnceLock<Result<(), String>> = OnceLock::new();
    let probe = || {
        let ran = finish(script(&["--ids", "65536", "--no-fuse"], Path::new("true"), &[]));
        if ran.status.success() { Ok(()) } else { Err(ran.err()) }
    };
    AVAILABLE.get_or_init(probe).clone().map_err(|reason| Lacking::new(Facility::Container, reason))?;
    Ok(finish(script(container, binary(), arguments)))
}

fn script(container: &[&str], program: &Path, arguments: &[&str]) -> Command {
    let mut script = Command::new(repository().join("scripts/container"));
    script.args(container).arg("--").arg(program).args(arguments).stdin(Stdio::null());
    // A place that every user of a container may write to.
    script.env("COFFERDAM_LOG", "info").env("TMPDIR", "/var/tmp").env_remove("HOME");
    script
}

fn build(script: &str) -> Vec<&str> {
    RUN.into_iter().chain([script]).collect()
}

fn a_privileged_container(_: &Case) -> Result<(), Lacking> {
    let ran = contained(&[], &build("id -u; test -e /inputs/name"))?;
    ran.code(0).says("1000\n").complains("ids=own").complains("inputs=fuse");
    Ok(())
}

fn without_fuse_inputs_are_copied(_: &Case) -> Result<(), Lacking> {
    for ids in [&["--no-fuse"][..], &["--no-fuse", "--ids", "65536"], &["--no-fuse", "--ids", "1"]] {
        let ran = contained(ids, &build("cmp /inputs/name - </inputs/name && ! echo >/inputs/name"))?;
        ran.code(0).complains("inputs=copies").complains("--device /dev/fuse");
    }
    Ok(())
}

fn many_ids_give_builds_their_own(_: &Case) -> Result<(), Lacking> {
    let ran = contained(&["--ids", "65536"], &build("grep -c . /proc/self/uid_map"))?;
    ran.code(0).says("2\n").complains("ids=own");
    Ok(())
}

fn one_id_is_shared(_: &Case) -> Result<(), Lacking> {
    let ran = contained(&["--ids", "1"], &build("grep -c . /proc/self/uid_map"))?;
    ran.code(0).says("1\n").complains("ids=shared").complains("too few ids");
    Ok(())
}

fn a_masked_proc_fails_builds(_: &Case) -> Result<(), Lacking> {
    for ids in [&["--masked-proc"][..], &["--masked-proc", "--no-fuse", "--ids", "1"]] {
        contained(ids, &build("true"))?.code(125).complains("masks parts of /proc");
        let ran = contained(ids, &["doctor"])?;
        assert!(!ran.status.success() && ran.out().contains("systempaths=unconfined"), "{ran}");
    }
    Ok(())
}

/// It says so at its start, not with the first build.
fn a_masked_proc_stops_a_daemon(case: &Case) -> Result<(), Lacking> {
    let (state, socket) = (case.path("state"), format!("unix:{}", case.path("socket").display()));
    let daemon = ["daemon", "--listen", &socket, "--state-dir", &state.to_string_lossy()];
    let ran = contained(&["--masked-proc"], &daemon)?;
    assert!(!ran.out().contains("listening") && !ran.err().contains("listening"), "{ran}");
    ran.code(125).complains("masks parts of /proc");
    Ok(())
}
