//! What a sandbox costs: from asking the spawner for one to its report, beside `bwrap --unshare-all` from fork to wait.
//! Both run `busybox true`, interleaved, in one run. Prints a table and records it.
//!
//! Ours is all that a build gets: a root with /etc, /dev, /proc with its covers, /tmp and scratch on disk, inputs, ids of
//! its own, no capabilities, the filter, and every other layer that this kernel has. Once with inputs in a place of their
//! own, as `cofferdam run` shows them, and once where outputs go as well, as in Nix's store, which takes an overlay on disk.
//! `scripts/bench` is the way to run it.

use std::fs::File;
use std::io::Read;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use cofferdam_sandbox::ids::{self, OwnIds};
use cofferdam_sandbox::{
    Access, Command, Entry, ExitStatus, Identity, Layer, Leftovers, Limits, Mount, MountPoint, Network, Plan,
    Report, Spawner, Stdio, Stock, TmpfsSize, landlock, seccomp::Profile,
};

mod common;

use common::{BUSYBOX, Contender};

fn main() {
    cofferdam_sandbox::serve_if_spawner();
    if !common::asked_for() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    for name in ["bin", "proc", "dev", "tmp"] {
        std::fs::create_dir_all(root.join(name)).unwrap();
    }
    std::fs::copy(BUSYBOX, root.join("bin/busybox")).unwrap();
    let lock = File::create(dir.path().join("lock")).unwrap();
    let entered = ids::enter(OwnIds::Wanted).unwrap();
    let spawner = Spawner::start(&Leftovers::default(), lock.as_fd(), Stock::UpTo(2)).unwrap();
    let sandbox = Sandbox::new(spawner, &entered.identity, dir.path());
    let plan = |inputs| plan(&entered.identity, dir.path().join("scratch"), inputs);
    let plain = plan(Mount::Inputs { source: root.join("bin") });
    let mixed = plan(Mount::InputsBelow {
        lower: root.join("bin"),
        upper: "upper".into(),
        work: "work".into(),
        access: Access::ReadWrite,
    });

    let furnished = ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"];
    common::compare(
        "spawn",
        "A sandbox from nothing to its end",
        &mut [
            Contender::new("cofferdam, a build's sandbox, inputs in a place of their own", || {
                sandbox.run(&plain)
            }),
            Contender::new("cofferdam, the same, inputs where outputs go (overlay on disk)", || {
                sandbox.run(&mixed)
            }),
            Contender::new("bwrap --unshare-all, read-only bind", || common::bwrap(&root, &[])),
            Contender::new("bwrap --unshare-all, with /proc, /dev, /tmp", || {
                common::bwrap(&root, &furnished)
            }),
        ],
    );
}

/// A spawner, and what it is asked for again and again.
struct Sandbox {
    spawner: Spawner,
    null: OwnedFd,
}

impl Sandbox {
    fn new(spawner: Spawner, identity: &Identity, dir: &Path) -> Sandbox {
        let build = identity.build_owner(0);
        let inside = identity.root_owner();
        for (name, owner, mode) in [
            ("build", build, 0o700),
            ("tmp", build, 0o1777),
            ("upper", inside, 0o755),
            ("work", inside, 0o700),
        ] {
            let path = dir.join("scratch").join(name);
            std::fs::create_dir_all(&path).unwrap();
            chown(&path, Some(owner.uid), Some(owner.gid)).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        }
        Sandbox { spawner, null: File::options().write(true).open("/dev/null").unwrap().into() }
    }

    /// To the report.
    fn run(&self, plan: &Plan) {
        let stdio = Stdio { stdout: self.null.try_clone().unwrap(), stderr: self.null.try_clone().unwrap() };
        let mut control = UnixStream::from(self.spawner.spawn(plan, stdio).unwrap());
        let mut said = Vec::new();
        control.read_to_end(&mut said).unwrap();
        let _ = control.shutdown(Shutdown::Both);
        assert_eq!(Report::from_bytes(&said).unwrap(), Report::Ended(ExitStatus::Code(0)));
    }
}

/// As `build::plan` lays a build out whose inputs are in `nix/store`.
fn plan(identity: &Identity, base: PathBuf, inputs: Mount) -> Plan {
    let mut mounts = [
        ("build", Mount::Writable { source: "build".into() }),
        ("dev/pts", Mount::Devpts),
        ("dev/shm", Mount::Tmpfs { mode: 0o1777, size: TmpfsSize { bytes: 1 << 30, inodes: 65_536 } }),
        ("nix/store", inputs),
        ("proc", Mount::Proc),
        ("tmp", Mount::Writable { source: "tmp".into() }),
    ]
    .map(|(at, mount)| MountPoint { at: at.into(), mount })
    .into_iter()
    .collect::<Vec<_>>();
    for device in ["full", "null", "random", "tty", "urandom", "zero"] {
        let source = Path::new("/dev").join(device);
        mounts.push(MountPoint { at: Path::new("dev").join(device), mount: Mount::Device { source } });
    }
    mounts.sort_by(|a, b| a.at.cmp(&b.at));
    let file = |path: &str| Entry::File { path: path.into(), mode: 0o444, contents: b"root:x:0:\n".to_vec() };
    let link = |path: &str, target: &str| Entry::Symlink { path: path.into(), target: target.into() };
    Plan {
        base,
        ids: identity.map(0),
        root: Layer {
            lower: None,
            entries: vec![
                link("dev/fd", "/proc/self/fd"),
                link("dev/stdin", "/proc/self/fd/0"),
                link("dev/stdout", "/proc/self/fd/1"),
                link("dev/stderr", "/proc/self/fd/2"),
                link("dev/ptmx", "pts/ptmx"),
                file("etc/passwd"),
                file("etc/group"),
                file("etc/hosts"),
            ],
        },
        mounts,
        network: Network::Own,
        seccomp: Some(Profile::Parity),
        landlock: landlock::offered(),
        cgroup: None,
        limits: Limits { processes: Some(4096), ..Limits::default() },
        command: Command {
            program: b"/nix/store/busybox".to_vec(),
            arguments: vec![b"true".to_vec()],
            environment: Vec::new(),
            working_dir: "build".into(),
        },
    }
}
