//! Steps that are tried where the program stands once it has namespaces of its own, and in sandboxes below.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{self, ForkResult};
use serde::{Deserialize, Serialize};

use super::outcome::{Act, Found, Outcome, Tried, Trouble, Why};
use super::steps::Step;
use super::trial::{self, attempt, in_sandbox};
use super::{Examination, Mode, Setup, confinement, mounts, storage, whole};
use crate::ids::{self, EnterError, Entered, IdMap, Identity, OwnIds};
use crate::{scratch, sys};

/// How long all steps of the stage may take together, a few of which may hang.
const LIMIT: Duration = Duration::from_secs(120);

/// What the spawner is given to hold in place of a lock.
const ANY_DIRECTORY: &str = "/";

/// A step that is given a directory.
type OnDisk = fn(&Path) -> Tried;

/// A step that is given the ids of a build.
type WithIds = fn(&IdMap) -> Tried;

/// Steps that need a place on the disk of the state directory, and nothing but that.
const STORAGE: [(Step, OnDisk); 4] = [
    (Step::StateSpace, storage::space),
    (Step::StateExecute, storage::execute),
    (Step::StateAttributes, storage::attributes),
    (Step::Reflink, storage::reflink),
];

/// Steps of a sandbox that need nothing of the host.
const IN_SANDBOX: [(Step, fn() -> Tried); 11] = [
    (Step::Tmpfs, mounts::fresh_tmpfs),
    (Step::Proc, mounts::proc),
    (Step::Devpts, mounts::devpts),
    (Step::Overlay, mounts::overlay),
    (Step::Pivot, mounts::pivot),
    (Step::Loopback, confinement::loopback),
    (Step::HostName, confinement::host_name),
    (Step::Keyring, confinement::keyring),
    (Step::DropPrivileges, confinement::drop_privileges),
    (Step::NestedNamespaces, confinement::nested_namespaces),
    (Step::NoUserNamespaces, confinement::no_user_namespaces),
];

/// Steps of a sandbox that is made of something of the host.
const FROM_HOST: [(Step, WithIds); 2] = [(Step::BindMounts, mounts::bind), (Step::Devices, mounts::devices)];

/// Steps that need a place on the disk of the state directory.
fn need_setup() -> impl Iterator<Item = Step> {
    let storage = STORAGE.iter().map(|(step, _)| *step);
    storage.chain([Step::FuseMount, Step::StateOverlay, Step::WholeSandbox])
}

/// What the stage says.
#[derive(Serialize, Deserialize)]
enum Word {
    /// A step was tried.
    Tried(Step, Tried),
    /// It could not be, for want of the other.
    Untried(Step, Step),
}

/// Tries them all, and removes the setup's directory.
pub fn try_all(examination: &mut Examination, setup: impl FnOnce() -> Option<Setup>) {
    examination.add(Step::BuildIds, attempt(build_ids));
    let works = matches!(examination.outcome(Step::BuildIds), Some(Outcome::Works { .. }));
    if works && examination.mode == Mode::Single {
        examination.mode = Mode::Range;
    }
    examination.add(Step::Enter, attempt(enter));
    let setup = setup();
    match examination.outcome(Step::Enter).is_some_and(Outcome::is_usable) {
        true => {
            if let Err(trouble) = perform(examination, setup.as_ref()) {
                examination.add(Step::Enter, Err(trouble));
            }
        }
        // What disks can do shows without namespaces too.
        false => {
            for (step, act) in STORAGE {
                match &setup {
                    Some(setup) => examination.add(step, attempt(|| act(&setup.scratch))),
                    None => examination.add_untried(step, Step::StateDirectory),
                }
            }
        }
    }
    for step in all() {
        if examination.outcome(step).is_none() {
            examination.add_untried(step, Step::Enter);
        }
    }
    if let Some(setup) = setup {
        // The stage has done so, unless it did not get that far.
        let _ = fs::remove_dir_all(&setup.scratch);
    }
}

fn enter() -> Tried {
    Ok(Found::with(ids::enter(OwnIds::Wanted)?.identity.to_string()))
}

/// What the stage tries.
fn all() -> impl Iterator<Item = Step> {
    let sandbox = IN_SANDBOX.iter().map(|(step, _)| *step);
    let from_host = FROM_HOST.iter().map(|(step, _)| *step);
    let others =
        [Step::Clone, Step::IdMaps, Step::Propagation, Step::Groups, Step::FuseDevice, Step::Spawner];
    sandbox.chain(from_host).chain(others).chain(need_setup())
}

fn build_ids() -> Tried {
    let Entered { identity, note, .. } = ids::enter(OwnIds::Wanted)?;
    match note {
        None => Ok(Found::with(identity.to_string())),
        Some(note) => Err(Trouble::said("give builds ids of their own", note)),
    }
}

impl From<EnterError> for Trouble {
    fn from(error: EnterError) -> Self {
        match error {
            error @ EnterError::BuildsAsRoot => Trouble::said("run builds", error.to_string()),
            EnterError::UserNamespace(errno) => Trouble::errno("make a user namespace", errno),
            EnterError::MountNamespace(errno) => Trouble::errno("make a mount namespace", errno),
            EnterError::Propagation(errno) => {
                Trouble::errno("cut the mount namespace off from the host's", errno)
            }
            EnterError::Map { file, source } => Trouble::io(format!("write {file}"), &source),
            EnterError::ReadMap { file, source } => Trouble::io(format!("read {file}"), &source),
            EnterError::Fork(errno) => Trouble::errno("fork", errno),
        }
    }
}

/// Forks the stage and takes down what it says.
fn perform(examination: &mut Examination, setup: Option<&Setup>) -> Result<(), Trouble> {
    let (words, voice) = unistd::pipe2(OFlag::O_CLOEXEC).act("make a pipe")?;
    // SAFETY: the program has one thread, as `examine` demands, so the child may go on as usual.
    match unsafe { unistd::fork() }.act("fork")? {
        ForkResult::Child => {
            drop(words);
            // What ends the program must not end this one, which removes the setup's directory.
            let _ = unistd::setsid();
            sys::ignore_termination();
            let played = std::panic::catch_unwind(|| Stage::enter(voice).map(|stage| stage.play(setup)));
            // SAFETY: as in `trial`.
            unsafe { libc::_exit(i32::from(played.is_err())) }
        }
        ForkResult::Parent { child } => {
            drop(voice);
            let heard = listen(examination, words);
            if heard.is_err() {
                let _ = kill(child, Signal::SIGKILL);
            }
            let _ = waitpid(child, None);
            heard
        }
    }
}

fn listen(examination: &mut Examination, words: OwnedFd) -> Result<(), Trouble> {
    let act = "try steps in namespaces of the program's own";
    let deadline = Instant::now() + LIMIT;
    let mut words = File::from(words);
    let mut heard = Vec::new();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut ready = [PollFd::new(words.as_fd(), PollFlags::POLLIN)];
        match poll(&mut ready, PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO)) {
            Err(nix::errno::Errno::EINTR) => continue,
            Ok(0) => return Err(Trouble { act: act.into(), why: Why::TimedOut }),
            _ => {}
        }
        let mut part = [0; 4096];
        let length = words.read(&mut part).act(act)?;
        if length == 0 {
            return Ok(());
        }
        heard.extend(part.iter().take(length));
        while let Ok((word, rest)) = postcard::take_from_bytes::<Word>(&heard) {
            let rest = rest.to_vec();
            match word {
                Word::Tried(step, tried) => examination.add(step, tried),
                Word::Untried(step, needs) => examination.add_untried(step, needs),
            }
            heard = rest;
        }
    }
}

/// Where nothing has to be opened.
fn nothing() -> Result<(), Trouble> {
    Ok(())
}

/// A process in namespaces of the program's own.
struct Stage {
    voice: File,
    identity: Identity,
    kept_groups: Vec<u32>,
    /// Keeps the ids while they are used.
    _claim: Option<ids::IdClaim>,
}

impl Stage {
    fn enter(voice: OwnedFd) -> Result<Self, EnterError> {
        let Entered { identity, kept_groups, claim, .. } = ids::enter(OwnIds::Wanted)?;
        Ok(Self { voice: voice.into(), identity, kept_groups, _claim: claim })
    }

    fn say(&self, word: &Word) {
        let mut voice = &self.voice;
        // Where nobody listens any more the rest goes by quickly, and what was made is removed.
        if let Ok(bytes) = postcard::to_stdvec(word) {
            let _ = voice.write_all(&bytes);
        }
    }

    fn tell(&self, step: Step, tried: Tried) {
        self.say(&Word::Tried(step, tried));
    }

    fn play(self, setup: Option<&Setup>) {
        self.tell(Step::FuseDevice, attempt(mounts::fuse_device));
        self.tell(Step::Spawner, attempt(|| whole::spawner(Path::new(ANY_DIRECTORY))));
        let cloned = self.clone();
        if cloned {
            for (step, act) in IN_SANDBOX {
                self.tell(step, in_sandbox(&self.identity.map(0), nothing, |()| act()));
            }
            let ids = self.identity.map(0);
            let limited = in_sandbox(&ids, nothing, |()| confinement::resource_limits(&ids));
            self.tell(Step::ResourceLimits, limited);
            for (step, act) in FROM_HOST {
                self.tell(step, act(&self.identity.map(0)));
            }
        }
        match setup {
            Some(setup) => self.on_disk(setup, cloned),
            None => need_setup().for_each(|step| self.say(&Word::Untried(step, Step::StateDirectory))),
        }
    }

    /// The namespaces of a sandbox, its ids and the end of propagation: what all its other steps need. Whether they are
    /// there.
    fn clone(&self) -> bool {
        let steps = [Step::Clone, Step::IdMaps, Step::Propagation];
        let failed =
            in_sandbox(&self.identity.map(0), nothing, Ok).err().map(|trouble| match trouble.act.as_str() {
                act if act == trial::CLONE => (Step::Clone, trouble),
                act if act == trial::PROPAGATION => (Step::Propagation, trouble),
                _ => (Step::IdMaps, trouble),
            });
        for step in steps {
            match &failed {
                Some((at, trouble)) if *at == step => self.tell(step, Err(trouble.clone())),
                Some((at, _)) if *at < step => self.say(&Word::Untried(step, *at)),
                _ => self.tell(step, Ok(Found::default())),
            }
        }
        match &failed {
            None => self.tell(Step::Groups, self.groups()),
            Some((at, _)) => self.without(*at),
        }
        failed.is_none()
    }

    /// Nothing of a sandbox can be tried without `needs`.
    fn without(&self, needs: Step) {
        let sandbox = IN_SANDBOX.iter().map(|(step, _)| *step);
        let from_host = FROM_HOST.iter().map(|(step, _)| *step);
        for step in sandbox.chain(from_host).chain([
            Step::Groups,
            Step::ResourceLimits,
            Step::StateOverlay,
            Step::WholeSandbox,
        ]) {
            self.say(&Word::Untried(step, needs));
        }
    }

    fn groups(&self) -> Tried {
        match in_sandbox(&self.identity.map(0), nothing, |()| confinement::drop_groups()) {
            Ok(()) => Ok(Found::default()),
            Err(_) if self.kept_groups.is_empty() => Ok(Found::with("the user has none")),
            Err(mut trouble) => {
                trouble.act = format!("{} {:?}", trouble.act, self.kept_groups);
                Err(trouble)
            }
        }
    }

    fn on_disk(&self, setup: &Setup, cloned: bool) {
        for (step, act) in STORAGE {
            self.tell(step, attempt(|| act(&setup.scratch)));
        }
        self.tell(Step::FuseMount, attempt(|| mounts::fuse_mount(&setup.scratch)));
        if cloned {
            self.tell(Step::StateOverlay, storage::overlay(&setup.scratch, &self.identity));
            self.tell(Step::WholeSandbox, attempt(|| whole::sandbox(setup, &self.identity)));
        }
        let (Some(parent), Some(name)) = (setup.scratch.parent(), setup.scratch.file_name()) else { return };
        // Here is who may: builds' ids own parts of it.
        if let (Ok(parent), Ok(name)) = (File::open(parent), CString::new(name.as_bytes())) {
            let _ = scratch::remove_tree(parent.as_fd(), &name);
        }
    }
}
