//! Settings of a worker: one definition, whatever they come from.

use std::io;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cofferdam_sandbox::Pasta;
use cofferdam_sandbox::cgroup::Choice;

use cofferdam_sandbox::seccomp::Profile;

use crate::isolation::{Demands, Network};
use crate::size::{Share, Size};
use crate::store_url::StoreUrl;

/// Everything about a worker that can be chosen.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where the scratch space lies, and the store, or the cache in front of a remote one; one worker at a time.
    pub state_dir: PathBuf,
    /// Whether the state directory outlives the worker.
    pub lifetime: Lifetime,
    /// The store; `None`: that of the state directory.
    pub store: Option<StoreUrl>,
    /// How long a remote store may keep a call waiting.
    pub store_deadline: Duration,
    /// How much of the store, or of the cache in front of a remote one, may lie on disk; `None`: as much as there is room.
    pub store_size: Option<Size>,
    /// How many builds run at once.
    pub max_builds: NonZeroUsize,
    /// How many more may wait for their turn.
    pub max_waiting: usize,
    /// What of the host builds may see, if they ask: these paths and all beneath them.
    pub allowed_host_paths: Vec<PathBuf>,
    /// Which network builds get, if they ask.
    pub network: NetworkPolicy,
    /// What each build may use.
    pub limits: LimitSettings,
    /// The program that is `/bin/sh` for builds that ask for one; it must be statically linked.
    pub shell: Option<PathBuf>,
    /// What system calls builds are refused.
    pub profile: Profile,
    /// What is demanded of the sandbox.
    pub isolation: Demands,
}

/// What each build may use; `None`: as much as there is.
#[derive(Clone, Debug)]
pub struct LimitSettings {
    /// Memory of a build, or where no cgroup counts that, of each of its processes.
    pub memory: Option<Size>,
    /// Processes and threads; `None`: a part of what this system allows.
    pub processes: Option<u64>,
    /// Files on disk, each and all together.
    pub scratch: Option<Size>,
    /// Files in `/dev/shm`; a share is one of the build's memory.
    pub shm: Share,
    /// What is to stay free on the disk.
    pub floor: Floor,
    /// Where cgroups are looked for.
    pub cgroup: Choice,
}

/// The largest share of a build's memory that `/dev/shm` takes where none is chosen: that of Nix, and of tmpfs itself.
pub const SHM: Share = Share::Percent(50);

impl Default for LimitSettings {
    fn default() -> Self {
        Self {
            memory: None,
            processes: None,
            scratch: None,
            shm: SHM,
            floor: Floor::None,
            cgroup: Choice::Auto,
        }
    }
}

/// What is to stay free on the disk that builds write to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Floor {
    /// Nothing: builds may fill it.
    None,
    /// A small part of it.
    Share,
    /// This much.
    Size(Size),
}

/// What becomes of a state directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lifetime {
    /// It stays for the next worker.
    Lasting,
    /// It goes with the worker.
    Ephemeral,
}

/// Which network builds get that ask for one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetworkPolicy {
    /// None: they are refused.
    Refused,
    /// One of their own each, which this program connects to what the host reaches.
    Pasta(Pasta),
    /// The host's.
    Host,
}

impl NetworkPolicy {
    /// What builds that ask for a network get.
    pub fn strength(&self) -> Network {
        match self {
            Self::Refused => Network::None,
            Self::Pasta(_) => Network::Pasta,
            Self::Host => Network::Host,
        }
    }
}

/// How many seconds a remote store may keep a call waiting by default.
pub const STORE_DEADLINE_SECONDS: u64 = 60;

/// How many builds wait by default before more are refused.
pub const MAX_WAITING: usize = 1000;

impl Settings {
    /// The defaults, for a state directory.
    pub fn new(state_dir: PathBuf, lifetime: Lifetime) -> Self {
        Self {
            state_dir,
            lifetime,
            store: None,
            store_deadline: Duration::from_secs(STORE_DEADLINE_SECONDS),
            store_size: None,
            max_builds: std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN),
            max_waiting: MAX_WAITING,
            allowed_host_paths: Vec::new(),
            network: NetworkPolicy::Refused,
            limits: LimitSettings::default(),
            shell: None,
            profile: Profile::default(),
            isolation: Demands::default(),
        }
    }

    /// Where the host's `path` lies, free of symbolic links, if builds may see it: it must lie under an allowed one as it
    /// is written, and also where links lead, so that nobody who may write there can lead elsewhere. `None`: they may not.
    ///
    /// # Errors
    /// Where the path can't be looked up.
    pub fn resolve_host_path(&self, path: &Path) -> io::Result<Option<PathBuf>> {
        let mut under = self.allowed_host_paths.iter().filter(|allowed| path.starts_with(allowed)).peekable();
        if under.peek().is_none() {
            return Ok(None);
        }
        let real = path.canonicalize()?;
        let allowed =
            under.any(|allowed| allowed.canonicalize().is_ok_and(|allowed| real.starts_with(allowed)));
        Ok(allowed.then_some(real))
    }
}

/// The state directory where none is chosen: `/var/lib/cofferdam` for root, and
/// `$XDG_STATE_HOME/cofferdam` or `~/.local/state/cofferdam` for others. `None` without a home.
pub fn default_state_dir() -> Option<PathBuf> {
    if nix::unistd::Uid::effective().is_root() {
        return Some("/var/lib/cofferdam".into());
    }
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let state = absolute("XDG_STATE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".local/state")));
    state.map(|state| state.join("cofferdam"))
}

/// The daemon's socket where none is chosen: `$XDG_RUNTIME_DIR/cofferdam.sock`, or
/// `/run/cofferdam/cofferdam.sock`.
pub fn default_socket() -> PathBuf {
    match std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from) {
        Some(dir) if dir.is_absolute() => dir.join("cofferdam.sock"),
        _ => "/run/cofferdam/cofferdam.sock".into(),
    }
}
