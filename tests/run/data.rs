//! Inputs go in and outputs come out as they are.

use std::os::unix::fs::PermissionsExt;

use crate::named;
use crate::support::{Case, case};

pub fn tests() -> impl IntoIterator<Item = (&'static str, fn(&Case))> {
    named![
        an_output_lands,
        a_tree_lands,
        a_symlink_lands,
        outputs_land_in_out_dir,
        an_existing_file_is_replaced,
        an_existing_directory_is_refused_first,
        inputs_are_as_given,
        inputs_cannot_be_changed,
        host_paths_are_shown_read_only,
        missing_outputs_are_all_named,
        a_fifo_is_named,
        nothing_of_a_failed_build_lands,
        scratch_may_not_lead_outside,
        the_readme_example,
    ]
}

fn an_output_lands(case: &Case) {
    case.run(&["--output", "x"], "echo hi > /outputs/x").code(0).says("");
    assert_eq!(case.read("x"), b"hi\n");
}

fn a_tree_lands(case: &Case) {
    let script = "mkdir -p /outputs/t/empty /outputs/t/sub; echo a > /outputs/t/sub/plain; \
                  echo b > /outputs/t/tool; chmod 755 /outputs/t/tool; ln -s sub/plain /outputs/t/link; \
                  ln -s nowhere /outputs/t/dangling; head -c 3000000 /dev/zero > /outputs/t/big";
    case.run(&["--output", "t"], script).code(0);
    assert!(case.path("t/empty").is_dir());
    assert_eq!(case.read("t/sub/plain"), b"a\n");
    assert_eq!(case.read("t/link"), b"a\n");
    assert_eq!(std::fs::read_link(case.path("t/dangling")).unwrap().to_str(), Some("nowhere"));
    assert_eq!(case.read("t/big"), vec![0; 3_000_000]);
    let executable = |path| std::fs::metadata(case.path(path)).unwrap().permissions().mode() & 0o111;
    assert_ne!(executable("t/tool") & 0o100, 0);
    assert_eq!(executable("t/sub/plain"), 0);
}

fn a_symlink_lands(case: &Case) {
    case.run(&["--output", "l"], "ln -s some/where /outputs/l").code(0);
    assert_eq!(std::fs::read_link(case.path("l")).unwrap().to_str(), Some("some/where"));
}

fn outputs_land_in_out_dir(case: &Case) {
    case.make_dir("sub/dir");
    case.run(&["--output", "x", "--out-dir", "sub/dir"], "echo hi > /outputs/x").code(0);
    assert_eq!(case.read("sub/dir/x"), b"hi\n");
    assert!(!case.path("x").exists());
}

fn an_existing_file_is_replaced(case: &Case) {
    case.write("x", "old and longer");
    case.run(&["--output", "x"], "echo new > /outputs/x").code(0);
    assert_eq!(case.read("x"), b"new\n");
}

fn an_existing_directory_is_refused_first(case: &Case) {
    case.write("x/precious", "kept");
    let ran = case.run(&["--output", "x"], "echo ran; echo new > /outputs/x").code(125).complains("x");
    assert_eq!(ran.out(), "", "the build ran");
    assert_eq!(case.read("x/precious"), b"kept");
}

fn inputs_are_as_given(case: &Case) {
    case.write("dir/plain", "plain\n");
    case.write("dir/deep/er/file", "deep\n");
    case.make_dir("dir/empty");
    case::set_mode(&case.write("dir/tool", "#!/bin/sh\necho tool runs\n"), 0o755);
    case.link("dir/link", "deep/er/file");
    case.link("dir/dangling", "/no/where");
    case.write("bare", "bare\n");
    let script = "cd /inputs; cat bare d/plain d/link; d/tool; readlink d/link d/dangling; \
                  [ -x d/plain ] && echo plain is executable; [ -e d/dangling ] && echo not dangling; \
                  ls d/empty; ls /inputs; ls d";
    case.run(&["--input", "d=dir", "--input", "bare=bare"], script).code(0).says(
        "bare\nplain\ndeep\ntool runs\ndeep/er/file\n/no/where\nbare\nd\ndangling\ndeep\nempty\nlink\nplain\ntool\n",
    );
}

fn inputs_cannot_be_changed(case: &Case) {
    case.write("dir/file", "as it was\n");
    let script = "cd /inputs/dir; exec 2>/dev/null; echo x > file; echo x >> file; echo x > new; rm -f file; \
                  mv file other; chmod 777 file; chmod 777 .; touch file; ln file /build/hard; rm -rf /inputs/dir; \
                  cat file; ls /inputs /inputs/dir";
    case.run(&["--input", "dir=dir"], script)
        .code(0)
        .says("as it was\n/inputs:\ndir\n\n/inputs/dir:\nfile\n");
    assert_eq!(case.read("dir/file"), b"as it was\n");
}

fn host_paths_are_shown_read_only(case: &Case) {
    let dir = case.make_dir("shared");
    case.write("shared/file", "shown\n");
    let dir = dir.to_str().unwrap();
    let script = format!("cat {dir}/file; echo x > {dir}/new || echo refused; ls {dir}/..");
    let ran = case.run(&["--host-path", dir], &script).code(0).says("shown\nrefused\nshared\n");
    assert!(ran.err().contains("Read-only") || ran.err().contains("ermission denied"), "{ran}");
    assert!(!case.path("shared/new").exists());
}

fn missing_outputs_are_all_named(case: &Case) {
    let flags = ["--output", "first", "--output", "made", "--output", "last"];
    let ran = case.run(&flags, "echo x > /outputs/made").complains("first").complains("last");
    assert_ne!(ran.status.code(), Some(0));
    assert!(!ran.err().contains("made"), "{ran}");
}

fn a_fifo_is_named(case: &Case) {
    let ran = case.run(&["--output", "x"], "mkdir /outputs/x; mkfifo /outputs/x/the-pipe");
    assert_ne!(ran.status.code(), Some(0));
    ran.complains("x/the-pipe").complains("fifo");
}

fn nothing_of_a_failed_build_lands(case: &Case) {
    case.write("x", "old");
    case.run(&["--output", "x", "--output", "y"], "echo new | tee /outputs/x /outputs/y; exit 7").code(7);
    assert_eq!(case.read("x"), b"old");
    assert!(!case.path("y").exists());
}

fn scratch_may_not_lead_outside(case: &Case) {
    case.write("host-file", "of the host");
    let target = case.path("host-file");
    let script = format!("ln -s {} /outputs/x", target.display());
    case.run(&["--output", "x"], &script).code(0);
    // The link itself is the output; nobody followed it.
    assert_eq!(std::fs::read_link(case.path("x")).unwrap(), target);
    assert_eq!(case.read("host-file"), b"of the host");
}

fn the_readme_example(case: &Case) {
    for name in ["hello.c", "greeting.h"] {
        let source = crate::support::repository().join("examples/hello").join(name);
        case.write(&format!("examples/hello/{name}"), std::fs::read(source).unwrap());
    }
    let gcc = ["--", "gcc", "-O2", "-o", "/outputs/hello", "/inputs/src/hello.c"];
    let flags = ["run", "--host-tools", "--input", "src=examples/hello", "--output", "hello"];
    case::finish(case.cofferdam(flags.iter().chain(&gcc))).code(0);
    case::finish(case.program(case.path("hello"))).code(0).says("Hello from inside the cofferdam.\n");
}
