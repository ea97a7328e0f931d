//! `cofferdam store mount`.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use clap::Args;
use cofferdam_sandbox::Owner;
use cofferdam_sandbox::ids::{self, OwnIds};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::{Pid, Uid};
use tokio::sync::oneshot;

use super::Source;
use super::place::Place;
use crate::castore::{Name, Node, Store};
use crate::cli::{EXIT_TERMINATED, Failed, Signals, cannot, remark};
use crate::config::STORE_DEADLINE_SECONDS;
use crate::view::{Exposed, View};

/// What the tree is called in the view, below the mount that people see.
const TREE: &str = "tree";

/// How many requests are answered at a time, for each processor.
const THREADS_PER_CPU: usize = 2;

/// Arguments of `cofferdam store mount`.
#[derive(Debug, Args)]
pub struct MountArgs {
    /// What `store add` printed, or a directory below it
    #[arg(value_name = "DIGEST[/PATH]", value_parser = Place::parser())]
    place: Place,
    /// A directory of this host. What is in it is hidden meanwhile
    dir: PathBuf,
    /// Run this, show the tree to it alone, and end with its exit code
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
    /// Do not say on standard error that it is mounted
    #[arg(long, short)]
    quiet: bool,
}

/// Shows a tree as long as it is wanted. Yields the exit code.
///
/// # Errors
/// Where it can't be mounted, or the store can't be had.
pub fn run(args: MountArgs, source: Source) -> Result<u8, Failed> {
    let dir = args.dir.canonicalize().map_err(|error| cannot("mount at", &args.dir, error))?;
    if args.command.is_empty() && !Uid::effective().is_root() {
        return Err(Failed(format!(
            "only root can show {} to all of the host; to show it to one command, name that: \
             cofferdam store mount {} {} -- sh",
            dir.display(),
            args.place,
            args.dir.display()
        )));
    }
    // The lock first: namespaces are for good, and other users' names are not known in them.
    let claimed = source.claim()?;
    if !args.command.is_empty() {
        // Before there are threads, which would stay outside.
        enter_namespace()?;
    }
    let opened = claimed.open()?;
    let mounted = Mounted::new(&opened.store, &args.place, &dir)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failed(format!("can't wait for signals: {error}")))?;
    runtime.block_on(async {
        let signals = Signals::listen()?;
        match args.command.split_first() {
            Some((program, arguments)) => {
                let mut command = Command::new(program);
                command.args(arguments);
                run_command(command, signals).await
            }
            None => {
                if !args.quiet {
                    remark(format_args!("{} is mounted at {}", args.place, dir.display()));
                }
                mounted.until_unwanted(signals).await.map(|()| 0)
            }
        }
    })
}

/// Moves the program to where nobody outside sees its mounts.
fn enter_namespace() -> Result<(), Failed> {
    if !Uid::effective().is_root() {
        return ids::enter(OwnIds::Unwanted).map(drop).map_err(|error| Failed(error.to_string()));
    }
    let refused = |errno| Failed(format!("can't make a mount namespace: {errno}"));
    unshare(CloneFlags::CLONE_NEWNS).map_err(refused)?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none).map_err(refused)
}

/// A tree that is shown at a directory: the view is mounted there, and over it what it has of the tree.
struct Mounted {
    dir: PathBuf,
    /// Device and inode of what is shown.
    shown: (u64, u64),
    exposed: Exposed,
    _view: View,
}

impl Mounted {
    fn new(store: &Store, place: &Place, dir: &Path) -> Result<Self, Failed> {
        let failed = |error: &dyn std::fmt::Display| cannot("mount at", dir, error);
        let entries = entries(store, place)?;
        let cpus = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        let threads = NonZeroUsize::new(THREADS_PER_CPU).map_or(cpus, |each| cpus.saturating_mul(each));
        // Whoever runs this: root, be it of the host or of a namespace.
        let owner = Owner { uid: 0, gid: 0 };
        let timeout = Duration::from_secs(STORE_DEADLINE_SECONDS);
        let view =
            View::mount(store.clone(), dir, owner, threads, timeout).map_err(|error| failed(&error))?;
        let exposed = view.expose(TREE, entries).map_err(|error| failed(&error))?;
        let none: Option<&str> = None;
        mount(Some(exposed.path()), dir, none, MsFlags::MS_BIND, none).map_err(|errno| failed(&errno))?;
        let mut mounted = Self { dir: dir.to_owned(), shown: (0, 0), exposed, _view: view };
        mounted.shown = found(dir).map_err(|error| failed(&error))?;
        Ok(mounted)
    }

    /// Waits until it is unmounted, or a signal asks for that.
    async fn until_unwanted(&self, mut signals: Signals) -> Result<(), Failed> {
        tokio::select! {
            _ = signals.next() => Ok(()),
            unmounted = self.until_unmounted() => {
                unmounted.map_err(|error| Failed(format!("can't watch the mounts: {error}")))
            }
            fault = self.until_ended() => Err(Failed(fault)),
        }
    }

    async fn until_unmounted(&self) -> io::Result<()> {
        let (dir, shown) = (self.dir.clone(), self.shown);
        let (report, unmounted) = oneshot::channel();
        // It ends with the program, if not before.
        std::thread::Builder::new().name("mounts".to_owned()).spawn(move || {
            // Nobody is there to be told any more where that fails.
            let _ = report.send(watch_mounts(&dir, shown));
        })?;
        unmounted.await.unwrap_or(Ok(()))
    }

    /// Waits until the file system has ended by itself. That something could not be read was told of in the log.
    async fn until_ended(&self) -> String {
        match &*self.exposed.faulted().await {
            fault @ crate::view::Fault::Ended { .. } => fault.to_string(),
            _ => std::future::pending().await,
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // The view takes itself away; what was unmounted by others need not be again.
        if found(&self.dir).is_ok_and(|found| found == self.shown)
            && let Err(errno) = umount2(&self.dir, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
        {
            tracing::warn!(at = %self.dir.display(), "can't unmount the tree: {errno}");
        }
    }
}

/// What is at a directory now: its device and inode.
fn found(dir: &Path) -> io::Result<(u64, u64)> {
    dir.metadata().map(|found| (found.dev(), found.ino()))
}

/// Returns once something else than `shown` is at `dir`.
fn watch_mounts(dir: &Path, shown: (u64, u64)) -> io::Result<()> {
    let mounts = File::open("/proc/self/mountinfo")?;
    // Whoever polls this file for urgent data waits for a change of the mounts: proc_pid_mountinfo(5).
    let mut polled = [PollFd::new(mounts.as_fd(), PollFlags::POLLPRI)];
    while found(dir).is_ok_and(|found| found == shown) {
        match poll(&mut polled, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// The entries of the directory that is meant.
fn entries(store: &Store, place: &Place) -> Result<BTreeMap<Name, Node>, Failed> {
    let Node::Directory { digest, .. } = place.find(store)? else {
        return Err(Failed(format!("{place} is no directory, so it can't be mounted")));
    };
    let directory = store.directories.get(&digest)?;
    let directory = directory.ok_or_else(|| Failed(format!("the directory {digest} is not in the store")))?;
    Ok(directory.entries().map(|(name, node)| (name.clone(), node.clone())).collect())
}

/// Runs a command to its end and yields its exit code. It is told of SIGTERM; SIGINT is the terminal's to send to both.
async fn run_command(mut command: Command, mut signals: Signals) -> Result<u8, Failed> {
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            remark(format_args!("cofferdam: can't run {}: {error}", command.get_program().display()));
            return Ok(if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 });
        }
    };
    let lost = |error: &dyn std::fmt::Display| Failed(format!("can't wait for the command: {error}"));
    let pid = i32::try_from(child.id()).map(Pid::from_raw).map_err(|error| lost(&error))?;
    // It is left to be reaped: until then its id is its own.
    let wait = move || waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT);
    let mut ended = tokio::task::spawn_blocking(wait);
    loop {
        tokio::select! {
            status = &mut ended => {
                status.map_err(|error| lost(&error))?.map_err(|errno| lost(&errno))?;
                break;
            }
            code = signals.next() => {
                if code == EXIT_TERMINATED {
                    kill(pid, Signal::SIGTERM).map_err(|errno| lost(&errno))?;
                }
            }
        }
    }
    let status = child.wait().map_err(|error| lost(&error))?;
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
    Ok(u8::try_from(code).unwrap_or(1))
}
