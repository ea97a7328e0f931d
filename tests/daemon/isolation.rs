//! What a daemon demands of its sandboxes, and what it tells of them.

use std::collections::BTreeMap;

use cofferdam_proto::build::build_event::Event;
use nix::sys::stat::{Mode as Bits, SFlag, makedev, mknod};
use tonic::Code;

use crate::client::{client, connect, constraints, events, logged, request};
use crate::named;
use crate::support::case::{finish, set_mode};
use crate::support::daemon::Daemon;
use crate::support::{Case, Mode};

pub fn tests() -> impl IntoIterator<Item = (&'static str, fn(&Case))> {
    named![
        builds_are_told_of_their_isolation,
        the_strict_profile_is_strict,
        what_is_required_is_there_or_no_daemon_is,
        only_devices_that_builds_may_open_are_lent,
    ]
}

/// What the response says of the isolation, layer by layer.
fn told(daemon: &Daemon) -> BTreeMap<String, String> {
    let response = client(async { connect(daemon).await.do_build(request("true", &[])).await }).unwrap();
    let told = response.metadata().get("x-cofferdam-isolation").expect("it is told").to_str().unwrap();
    told.split("; ").map(|layer| layer.split_once('=').unwrap()).map(|(k, v)| (k.into(), v.into())).collect()
}

fn builds_are_told_of_their_isolation(case: &Case) {
    let told = told(&Daemon::start(case, &[]));
    let ids = if case.mode == Mode::Single { "shared" } else { "own" };
    for (layer, expected) in [
        ("ids", ids),
        ("namespaces", "user,mnt,pid,net,ipc,uts,cgroup"),
        ("seccomp", "parity"),
        ("inputs", "fuse"),
        ("network", "none"),
    ] {
        assert_eq!(told.get(layer).map(String::as_str), Some(expected), "{layer} of {told:?}");
    }
    // What the kernel has decides on these two.
    assert!(told.contains_key("landlock") && told.contains_key("cgroup"), "{told:?}");
}

fn the_strict_profile_is_strict(case: &Case) {
    let daemon = Daemon::start(case, &["--profile", "strict", "--isolation", "landlock=off"]);
    let told = told(&daemon);
    assert_eq!((told["seccomp"].as_str(), told["landlock"].as_str()), ("strict", "none"));
    let script = "unshare -U true 2>&1 || echo no namespace; ls / >/dev/null && echo all else";
    let said = logged(&client(events(&daemon, request(script, &[]))).unwrap());
    assert!(said.ends_with("no namespace\nall else\n"), "{said}");
}

fn what_is_required_is_there_or_no_daemon_is(case: &Case) {
    let demanding = |demand: &str| {
        let mut command = case.cofferdam(["daemon", "--state-dir", "state", "--listen", "unix:socket"]);
        command.args(["--isolation", demand, "--cgroup", "off"]);
        finish(command)
    };
    demanding("cgroup=required")
        .code(125)
        .complains("isolation layer cgroup is required, but can't be had: ");
    if case.mode == Mode::Single {
        demanding("ids=required").code(125).complains("isolation layer ids is required");
    }
    demanding("moon=required").code(125).complains("there is no layer \"moon\"");
    let daemon = Daemon::start(case, &["--isolation", "seccomp=off", "--isolation", "inputs=off"]);
    let told = told(&daemon);
    assert_eq!((told["seccomp"].as_str(), told["inputs"].as_str()), ("none", "copies"));
}

fn only_devices_that_builds_may_open_are_lent(case: &Case) {
    // Only root can make one; as others, what lies below /dev and is closed will do.
    let node = case.path("node");
    let open = if case.mode == Mode::Root {
        mknod(&node, SFlag::S_IFCHR, Bits::from_bits_truncate(0o666), makedev(1, 5)).unwrap();
        set_mode(&node, 0o666);
        node.clone()
    } else {
        "/dev/zero".into()
    };
    let closed: &std::path::Path = if case.mode == Mode::Root { &node } else { "/dev/mem".as_ref() };
    let allow = |path: &std::path::Path| path.to_str().unwrap().to_owned();
    let daemon =
        Daemon::start(case, &["--allow-host-path", &allow(&open), "--allow-host-path", &allow(closed)]);
    let asking = |path: &std::path::Path, script: &str| {
        let mut wanted = request(script, &[]);
        constraints(&mut wanted).available_ro_paths.push(allow(path));
        client(events(&daemon, wanted))
    };
    if case.mode == Mode::Root {
        let script = format!("head -c 3 {0} | wc -c; echo x > {0} && echo written", open.display());
        let said = asking(&open, &script).unwrap();
        assert_eq!(logged(&said), "3\nwritten\n");
        assert!(matches!(said.last(), Some(Event::Completed(_))), "{said:?}");
        set_mode(&node, 0o600);
    }
    if closed.exists() {
        let refused = asking(closed, "true").unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
        let said = refused.message();
        assert!(said.contains("can't open the device") && said.contains("Permission denied"), "{said}");
    }
}
