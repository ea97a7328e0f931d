//! Everything at once: the spawner, and a sandbox that runs a command to its end.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd;

use super::Setup;
use super::outcome::{Act, Found, Tried, Trouble};
use crate::ids::{IdMap, Identity};
use crate::landlock;
use crate::plan::{Command, Layer, Limits, Mount, MountPoint, Network, Plan, TmpfsSize};
use crate::report::{ExitStatus, Report};
use crate::seccomp::Profile;
use crate::spawner::{Leftovers, SpawnError, Spawner, Stdio, Stock};

/// What is done, for the message where it isn't.
const ACT: &str = "run a command in a sandbox";

impl From<SpawnError> for Trouble {
    fn from(error: SpawnError) -> Self {
        match error {
            SpawnError::Start(source) => Trouble::io("start the spawner", &source),
            SpawnError::Io { act, source } => Trouble::io(act, &source),
            error => Trouble::said("use the spawner", error.to_string()),
        }
    }
}

/// The spawner starts, and ends when it is to.
pub fn spawner(lock: &Path) -> Tried {
    start(&Leftovers::default(), lock).map(|_| Found::default())
}

fn start(leftovers: &Leftovers, lock: &Path) -> Result<Spawner, Trouble> {
    let lock = File::open(lock).act(&format!("open {}", lock.display()))?;
    Ok(Spawner::start(leftovers, lock.as_fd(), Stock::None)?)
}

/// A sandbox with everything in it that builds have but for inputs, in which this program is the command.
pub fn sandbox(setup: &Setup, identity: &Identity) -> Tried {
    let base = setup.scratch.join("whole");
    prepare(&base, setup, identity).act("lay out a sandbox in the state directory")?;
    let spawner = start(&Leftovers::default(), &base)?;
    let (output, stdout) = unistd::pipe2(OFlag::O_CLOEXEC).act("make a pipe")?;
    let stderr = stdout.try_clone().act("make a pipe")?;
    let sandbox = spawner.spawn(&everything(base, identity), Stdio { stdout, stderr })?;
    let mut report = Vec::new();
    UnixStream::from(sandbox).read_to_end(&mut report).act("hear of a sandbox")?;
    judge(Report::from_bytes(&report)?, output)
}

fn prepare(base: &Path, setup: &Setup, identity: &Identity) -> std::io::Result<()> {
    let build = identity.build_owner(0);
    for name in ["", "build"] {
        fs::create_dir(base.join(name))?;
    }
    // The command starts there.
    chown(base.join("build"), Some(build.uid), Some(build.gid))?;
    // A copy, for this program may lie where a build can't be shown anything, or be its owner's alone.
    let program = base.join("program");
    fs::copy(&setup.program, &program)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))
}

fn everything(base: PathBuf, identity: &Identity) -> Plan {
    let mount = |at: &str, mount| MountPoint { at: at.into(), mount };
    let device =
        |name: &str| mount(&format!("dev/{name}"), Mount::Device { source: Path::new("/dev").join(name) });
    let mut mounts = vec![
        mount("build", Mount::Writable { source: "build".into() }),
        mount("program", Mount::HostPath { source: base.join("program") }),
        mount("proc", Mount::Proc),
        mount("dev/pts", Mount::Devpts),
        mount("dev/shm", Mount::Tmpfs { mode: 0o1777, size: TmpfsSize { bytes: 1 << 20, inodes: 100 } }),
    ];
    mounts.extend(["full", "null", "random", "tty", "urandom", "zero"].map(device));
    plan(base, identity.map(0), mounts)
}

/// A plan of these mounts, in which this program is the command.
pub fn plan(base: PathBuf, ids: IdMap, mounts: Vec<MountPoint>) -> Plan {
    Plan {
        base,
        ids,
        root: Layer::default(),
        mounts,
        network: Network::Own,
        seccomp: Some(Profile::default()),
        landlock: landlock::offered(),
        cgroup: None,
        limits: Limits::default(),
        command: Command {
            program: b"/program".into(),
            arguments: vec![b"cofferdam".into(), b"--version".into()],
            environment: Vec::new(),
            working_dir: "build".into(),
        },
    }
}

fn judge(report: Report, output: OwnedFd) -> Tried {
    match report {
        Report::Ended(ExitStatus::Code(0)) => Ok(Found::default()),
        Report::Ended(ExitStatus::Code(code)) => {
            let mut words = String::new();
            let _ = File::from(output).take(1000).read_to_string(&mut words);
            Err(Trouble::said(ACT, format!("it ended with exit code {code} and said: {}", words.trim())))
        }
        Report::Ended(ExitStatus::Signal(signal)) => {
            Err(Trouble::said(ACT, format!("signal {signal} ended it")))
        }
        Report::NotExecuted { errno } => {
            Err(Trouble::errno("execute a program in a sandbox", Errno::from_raw(errno)))
        }
        Report::NotSetUp(failure) => Err(failure.into()),
        Report::NetworkLost { why } => Err(Trouble::said(ACT, why)),
        Report::Killed => Err(Trouble::said(ACT, "it was killed from outside")),
    }
}
