//! What a build, a neighbour or a slip must not be able to do to the host. Each of these once could.

use std::os::unix::fs::PermissionsExt;

use crate::named;
use crate::support::{self, Case, Mode, case::finish};

pub fn tests() -> impl IntoIterator<Item = (&'static str, fn(&Case))> {
    named![
        its_program_is_out_of_reach,
        an_orphans_signal_is_not_the_builds,
        a_real_time_signal_has_its_number,
        what_is_no_state_directory_is_left_alone,
        links_in_a_state_directory_are_not_followed,
    ]
}

fn its_program_is_out_of_reach(case: &Case) {
    // Before its own command is executed, a process of the build is still one of cofferdam's. Its program is static, so
    // nothing of the build's can be loaded into it; pid 1 goes on running it, and shows nobody where it lies.
    let script = "for way in exe root cwd; do ls /proc/1/$way/ >&2; done; dd if=/dev/null of=/proc/1/exe conv=nocreat,notrunc";
    let ran = case.run(&[], script);
    let refusal = match case.mode {
        // Pid 1 has the build's own id.
        Mode::Single => "No such file or directory",
        Mode::Root | Mode::Range => "Permission denied",
    };
    assert_eq!(ran.err().matches(refusal).count(), 4, "{}", ran.err());
    let program = ["run", "--host-tools", "--", "/proc/self/exe", "--version"];
    assert!(finish(case.cofferdam(program)).code(0).out().starts_with("cofferdam "));
    let mode = std::fs::metadata(support::binary()).unwrap().permissions().mode();
    assert_eq!(mode & 0o7000, 0, "{mode:o}");
}

fn an_orphans_signal_is_not_the_builds(case: &Case) {
    let script = "((bash -c 'sleep .2; kill -40 $$') &); sleep 0.6; echo finished";
    case.run(&[], script).code(0).says("finished\n");
}

fn a_real_time_signal_has_its_number(case: &Case) {
    case.run(&[], "kill -50 $$").code(128 + 50).complains("signal 50");
}

fn what_is_no_state_directory_is_left_alone(case: &Case) {
    case.write("project/builds/precious", "precious");
    case.run(&["--state-dir", "project"], "true").code(125).complains("project");
    assert_eq!(case.read("project/builds/precious"), b"precious");
    support::case::set_mode(&case.make_dir("open"), 0o777);
    case.run(&["--state-dir", "open"], "true").code(125).complains("0777");
}

fn links_in_a_state_directory_are_not_followed(case: &Case) {
    case.write("victim/precious", "precious");
    case.make_dir("state");
    case.link("state/builds", "../victim");
    case.link("state/cofferdam.lock", "../victim/precious");
    case.run(&["--state-dir", "state"], "true").code(125);
    case.program("rm").arg("state/cofferdam.lock").status().unwrap();
    case.write("state/cofferdam.lock", "");
    case.run(&["--state-dir", "state"], "true");
    assert_eq!(case.read("victim/precious"), b"precious");
}
