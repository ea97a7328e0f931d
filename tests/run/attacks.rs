//! What a build, a neighbour or a slip must not be able to do to the host. Each of these once could.

use std::os::unix::fs::PermissionsExt;

use crate::named;
use crate::support::{self, Case, case::finish};

pub fn tests() -> impl IntoIterator<Item = (&'static str, fn(&Case))> {
    named![
        its_program_is_out_of_reach,
        an_orphans_signal_is_not_the_builds,
        a_real_time_signal_has_its_number,
        what_is_no_state_directory_is_left_alone,
        links_in_a_state_directory_are_not_followed,
    ]
}

/// Changes the file it is run from, as soon as it is loaded.
const EVIL: &str = r#"
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
__attribute__((constructor)) static void evil(void) {
    printf("chmod %d\n", chmod("/proc/self/exe", 0777) ? errno : 0);
    printf("open %d\n", open("/proc/self/exe", O_WRONLY) < 0 ? errno : 0);
    fflush(stdout);
}
"#;

fn its_program_is_out_of_reach(case: &Case) {
    case.write("evil.c", EVIL);
    let compile = ["-shared", "-fPIC", "-o", "evil.so", "evil.c"];
    assert!(case.program("gcc").args(compile).status().unwrap().success());
    // Before its own command is executed, a process of the build is still one of cofferdam's.
    let mut command = case.cofferdam(["run", "--host-tools", "--input", "evil.so=evil.so"]);
    command.args(["--env", "LD_PRELOAD=/inputs/evil.so", "--", "/proc/self/exe", "--version"]);
    let said = finish(command).out();
    // EROFS, 30: whoever owns the file. To open it may already be forbidden by its mode, EACCES.
    assert!(said.starts_with("chmod 30\n") && !said.contains("open 0"), "{said}");
    let mode = std::fs::metadata(support::binary()).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o755, "{mode:o}");
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
