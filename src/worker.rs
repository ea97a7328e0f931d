//! A worker, put together: namespaces, spawner, store, view, and the builder over them.
//!
//! It takes two steps. [`Groundwork::lay`] does what must be done while the program has one thread;
//! [`Groundwork::build`] may then start as many as it likes.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cofferdam_sandbox::cgroup::{self, Cgroups, Privilege};
use cofferdam_sandbox::ids::{EnterError, Entered, IdClaim};
use cofferdam_sandbox::seccomp::Profile;
use cofferdam_sandbox::{Identity, Leftovers, SpawnError, Spawner, Stock, landlock, seccomp};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::runtime::Handle;

use crate::build::{Builder, Sandboxes, ScratchError};
use crate::castore::choose::{Choice, Opened};
use crate::castore::local::keeper::Keeper;
use crate::castore::{Store, StoreError};
use crate::config::{Lifetime, Settings};
use crate::inputs::Inputs;
use crate::inputs::copies::{Copies, CopyError};
use crate::isolation::{Demand, Ids, Lacking, Layer, Network, Strength};
use crate::size::Size;
use crate::view::View;

/// The file by which a state directory is known and locked.
const LOCK: &str = "cofferdam.lock";

/// How long to wait for a worker that has ended, but whose sandboxes are still being removed.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// The most sandboxes that are made in advance. Each is a waiting process in namespaces of its own.
const STOCK_MAX: usize = 64;

/// How many requests to the view are answered at a time, for each processor.
const VIEW_THREADS_PER_CPU: usize = 2;

/// A build waits for so much longer than the store may take for one call: the store's own reason is the better one.
const BEYOND_STORE_DEADLINE: Duration = Duration::from_secs(5);

/// What a worker stands on, made before the program has threads.
pub struct Groundwork {
    settings: Settings,
    identity: Identity,
    spawner: Spawner,
    cgroups: cgroup::Found,
    state: StateDir,
    claim: Option<IdClaim>,
}

/// A worker: what the daemon serves, and what one-shot builds use in-process.
pub struct Worker {
    /// Where inputs come from and outputs go.
    pub store: Store,
    /// Carries out builds.
    pub builder: Builder,
    /// What builds are limited by.
    pub limits: cgroup::Status,
    _keeper: Option<Keeper>,
    // After the rest: while anything of the worker lives, the state directory and the ids are its own.
    _state: StateDir,
    _claim: Option<IdClaim>,
}

/// Why there is no worker.
#[derive(Debug, thiserror::Error)]
pub enum WorkerStartError {
    /// The state directory can't be used.
    #[error("can't {act} the state directory {path}: {source}")]
    State {
        /// What was tried, as a verb.
        act: &'static str,
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another worker uses the state directory.
    #[error("the state directory {path} is in use by another cofferdam")]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// Others could change what lies in the state directory.
    #[error(
        "the state directory {path} has mode {mode:04o}: others than its owner may write to it; chmod go-w it"
    )]
    Writable {
        /// The directory.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The state directory belongs to someone else.
    #[error("the state directory {path} belongs to user {owner}, not to the one who runs this")]
    Foreign {
        /// The directory.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
    },
    /// The directory has been used for something else.
    #[error("{path} is not empty and no state directory of cofferdam; choose another with --state-dir")]
    NotEmpty {
        /// The directory.
        path: PathBuf,
    },
    /// There are no namespaces to be had.
    #[error(transparent)]
    Enter(#[from] EnterError),
    /// The cgroup that was named can't be used.
    #[error("--cgroup: {0}")]
    Cgroup(#[from] cgroup::CgroupError),
    /// A layer that is required can't be had.
    #[error(transparent)]
    Lacking(#[from] Lacking),
    /// There is no spawner.
    #[error(transparent)]
    Spawner(#[from] SpawnError),
    /// There is no store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// There is no place for copies of inputs.
    #[error(transparent)]
    Copies(#[from] CopyError),
    /// There is no scratch space.
    #[error(transparent)]
    Scratch(#[from] ScratchError),
}

impl Groundwork {
    /// Takes the state directory, moves the program into namespaces of its own, and starts the spawner.
    ///
    /// Call this first, while the program has one thread.
    ///
    /// # Errors
    /// Where the state directory is in use or can't be made, or the kernel refuses a namespace.
    pub fn lay(settings: Settings) -> Result<Self, WorkerStartError> {
        // The lock before the fork: the spawner holds it too, until it has removed what builds left.
        let state = StateDir::take(&settings.state_dir, settings.lifetime)?;
        // In a namespace of its own every user looks like root.
        let privilege = match nix::unistd::Uid::effective().is_root() {
            true => cgroup::Privilege::Root,
            false => cgroup::Privilege::User,
        };
        let demand = settings.isolation.ids;
        let wanted = if demand == Demand::Off { Ids::Shared } else { Ids::Own };
        let Entered { identity, note, kept_groups, claim } = cofferdam_sandbox::ids::enter(wanted.into())?;
        let own = match Ids::from(&identity) {
            Ids::Own => Ok(()),
            Ids::Shared => Err(note.unwrap_or_default()),
        };
        demand.settle(Layer::Ids, || own)?;
        tracing::info!(%identity, "identities");
        if !kept_groups.is_empty() {
            tracing::warn!(
                "builds may read what groups {kept_groups:?} of this user may: with one id the kernel lets nobody drop them \
                 (give the user ranges in /etc/subuid and /etc/subgid)"
            );
        }
        let trees = match settings.lifetime {
            Lifetime::Lasting => vec![state.builds(), state.copies()],
            Lifetime::Ephemeral => vec![state.path.clone()],
        };
        // The spawner, too, takes some for each sandbox.
        raise_descriptor_limit();
        // Before the spawner, which is to be where this program is.
        let cgroups = find_cgroups(&settings, privilege)?;
        tracing::info!(limits = %cgroups.status, "cgroups");
        let leftovers = Leftovers {
            mounts: vec![state.view()],
            trees,
            cgroups: cgroups.cgroups.as_ref().map(Cgroups::remains),
        };
        let stock = match settings.lifetime {
            Lifetime::Lasting => Stock::UpTo(settings.max_builds.get().min(STOCK_MAX)),
            // There will be one build.
            Lifetime::Ephemeral => Stock::None,
        };
        let spawner = Spawner::start(&leftovers, state.lock.as_fd(), stock)?;
        Ok(Self { settings, identity, spawner, cgroups, state, claim })
    }

    /// Opens the store, mounts the view or does without, and puts the builder over them. `runtime` will carry out the
    /// calls to a remote store.
    ///
    /// # Errors
    /// Where one of them can't be had.
    pub fn build(self, runtime: &Handle) -> Result<Worker, WorkerStartError> {
        self.build_over(runtime, |store| store)
    }

    /// The same with another store over the one that was chosen, which `over` is given.
    ///
    /// # Errors
    /// As [`Groundwork::build`].
    pub fn build_over(
        self,
        runtime: &Handle,
        over: impl FnOnce(Store) -> Store,
    ) -> Result<Worker, WorkerStartError> {
        let Self { mut settings, identity, spawner, cgroups, state, claim } = self;
        let cgroup::Found { cgroups, status: limits } = cgroups;
        if let Some(slots) = identity.slots().and_then(|slots| NonZeroUsize::new(slots as usize)) {
            settings.max_builds = settings.max_builds.min(slots);
        }
        let Opened { store, keeper } = state.open_store(&settings, runtime)?;
        let store = over(store);
        let at = state.view();
        state.subdirectory(&at)?;
        let cpus = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        let threads = cpus.saturating_mul(NonZeroUsize::new(VIEW_THREADS_PER_CPU).unwrap_or(cpus));
        let timeout = settings.store_deadline.saturating_add(BEYOND_STORE_DEADLINE);
        let view = || View::mount(store.clone(), &at, identity.inputs_owner(), threads, timeout);
        // Opened whether they are used or not: the last worker may have used them, and left some in a crash.
        let copies = Copies::open(store.clone(), &state.copies(), identity.copies_owner())?;
        let inputs = Inputs::choose(settings.isolation.inputs, view, copies)?;
        let strength = Strength {
            ids: Ids::from(&identity),
            seccomp: settings.isolation.seccomp.settle(Layer::Seccomp, || has_seccomp(settings.profile))?,
            landlock: settings.isolation.landlock.settle(Layer::Landlock, has_landlock)?,
            cgroup: match &limits {
                cgroup::Status::Version2 { controllers, .. } => controllers.clone(),
                cgroup::Status::None { .. } => Vec::new(),
            },
            inputs: inputs.strength(),
            network: Network::None,
        };
        let sandboxes = Sandboxes { identity, strength, spawner, cgroups };
        let builder = Builder::new(settings, sandboxes, store.clone(), inputs, &state.builds())?;
        Ok(Worker { store, builder, limits, _keeper: keeper, _state: state, _claim: claim })
    }
}

/// The cgroups that limit builds, as far as they are demanded.
fn find_cgroups(settings: &Settings, privilege: Privilege) -> Result<cgroup::Found, WorkerStartError> {
    let off = cgroup::Choice::Off;
    let choice = match settings.isolation.cgroup {
        Demand::Off => &off,
        Demand::Required | Demand::Preferred => &settings.limits.cgroup,
    };
    let found = cgroup::find(choice, privilege)?;
    let limits = match &found.status {
        cgroup::Status::Version2 { controllers, at } if controllers.is_empty() => {
            Err(format!("{} has no controllers", at.display()))
        }
        cgroup::Status::Version2 { .. } => Ok(()),
        cgroup::Status::None { reason } => Err(reason.clone()),
    };
    settings.isolation.cgroup.settle(Layer::Cgroup, || limits)?;
    Ok(found)
}

fn has_seccomp(profile: Profile) -> Result<Profile, String> {
    seccomp::supported().map(|()| profile).map_err(|errno| format!("the kernel takes no filters: {errno}"))
}

/// The version of Landlock, if it has the scopes that builds are kept in.
fn has_landlock() -> Result<u32, String> {
    match landlock::abi() {
        Some(version) if version >= landlock::ABI_OF_SCOPES => Ok(version),
        Some(version) => Err(format!(
            "the kernel has version {version} of Landlock, and scopes came with {}",
            landlock::ABI_OF_SCOPES
        )),
        None => Err("the kernel has no Landlock, or it is turned off (see lsm= in its command line)".into()),
    }
}

/// As many descriptors as the program may have: the view keeps blobs open, and each build takes some.
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(errno) = raised {
        tracing::warn!(%errno, "can't raise the limit of open files");
    }
}

/// A state directory that is this program's alone.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    lifetime: Lifetime,
    /// Locked as long as any copy of it is open, and the spawner has one.
    lock: File,
}

impl StateDir {
    /// Makes the directory at `path` if need be, and locks it.
    ///
    /// # Errors
    /// Where that fails, or another program has it.
    pub fn take(path: &Path, lifetime: Lifetime) -> Result<Self, WorkerStartError> {
        let fail = |act| move |source| WorkerStartError::State { act, path: path.into(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(fail("make"))?;
        // Also the spawner goes by this path, from another working directory.
        let path = path.canonicalize().map_err(fail("find"))?;
        Self::check(&path)?;
        let mut options = OpenOptions::new();
        options.write(true).create(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
        let lock = options.open(path.join(LOCK)).map_err(fail("lock"))?;
        let lock = Self::lock(lock, &path)?;
        Ok(Self { path, lifetime, lock })
    }

    /// Refuses a directory that others can change, or that holds something else: parts of it will be emptied.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(path: &Path) -> Result<(), WorkerStartError> {
        let fail = |act| move |source| WorkerStartError::State { act, path: path.into(), source };
        let found = path.metadata().map_err(fail("look at"))?;
        let mode = found.permissions().mode();
        if mode & 0o022 != 0 {
            return Err(WorkerStartError::Writable { path: path.into(), mode: mode & 0o7777 });
        }
        if found.uid() != nix::unistd::Uid::effective().as_raw() {
            return Err(WorkerStartError::Foreign { path: path.into(), owner: found.uid() });
        }
        let mut entries = path.read_dir().map_err(fail("read"))?.peekable();
        if entries.peek().is_some() && path.join(LOCK).symlink_metadata().is_err() {
            return Err(WorkerStartError::NotEmpty { path: path.into() });
        }
        Ok(())
    }

    fn lock(file: File, path: &Path) -> Result<File, WorkerStartError> {
        let deadline = Instant::now() + LOCK_PATIENCE;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => {}
                Err(TryLockError::WouldBlock) => return Err(WorkerStartError::InUse { path: path.into() }),
                Err(TryLockError::Error(source)) => {
                    return Err(WorkerStartError::State { act: "lock", path: path.into(), source });
                }
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Opens the store that the settings choose.
    ///
    /// # Errors
    /// Where it can't be opened. A remote one need not be there yet.
    pub fn open_store(&self, settings: &Settings, runtime: &Handle) -> Result<Opened, StoreError> {
        let choice = Choice {
            url: settings.store.as_ref(),
            deadline: settings.store_deadline,
            near: self.store(),
            max_bytes: settings.store_size.map(|Size(bytes)| bytes),
            lifetime: self.lifetime,
            runtime,
        };
        choice.open()
    }

    /// Where the store lies, unless another is chosen.
    pub fn store(&self) -> PathBuf {
        self.path.join("store")
    }

    /// Where the directories of builds lie.
    fn builds(&self) -> PathBuf {
        self.path.join("builds")
    }

    /// Where inputs are copied to.
    fn copies(&self) -> PathBuf {
        self.path.join("copies")
    }

    /// Where the view is mounted.
    fn view(&self) -> PathBuf {
        self.path.join("view")
    }

    fn subdirectory(&self, path: &Path) -> Result<(), WorkerStartError> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
        made.map_err(|source| WorkerStartError::State {
            act: "make a directory in",
            path: path.into(),
            source,
        })
    }
}

impl Drop for StateDir {
    fn drop(&mut self) {
        if self.lifetime != Lifetime::Ephemeral {
            return;
        }
        // Where there was a spawner, it has removed it already.
        match std::fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %self.path.display(), %error, "can't remove the state directory");
            }
            _ => {}
        }
    }
}
