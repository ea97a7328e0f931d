//! The store that settings choose.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::runtime::Handle;

use super::local::keeper::Keeper;
use super::remote::{RemoteStore, Retry};
use super::{LocalStore, Store, StoreError, cache, memory};
use crate::config::Lifetime;
use crate::store_url::StoreUrl;

/// A store that was opened.
pub struct Opened {
    /// The store.
    pub store: Store,
    /// Keeps what of it lies on this machine to a size, where one is chosen, for as long as this lives.
    pub keeper: Option<Keeper>,
}

impl From<Store> for Opened {
    fn from(store: Store) -> Self {
        Self { store, keeper: None }
    }
}

/// Which store, and what it stands on.
pub struct Choice<'a> {
    /// The store that is wanted; `None`: that at `near`.
    pub url: Option<&'a StoreUrl>,
    /// How long one elsewhere may keep us waiting.
    pub deadline: Duration,
    /// Where the store of this machine lies unless it is elsewhere, and the cache in front of a remote one.
    pub near: PathBuf,
    /// How many bytes of it may lie on this machine's disk; the store in memory has no such limit.
    pub max_bytes: Option<u64>,
    /// Whether what lies at `near` outlives the process.
    pub lifetime: Lifetime,
    /// Carries out the calls to a remote store. It needs threads of its own.
    pub runtime: &'a Handle,
}

impl Choice<'_> {
    /// Opens the store. A remote one need not be there yet.
    ///
    /// # Errors
    /// Where a local one can't be opened, or another process has it; where there are no certificates for TLS.
    pub fn open(&self) -> Result<Opened, StoreError> {
        match self.url {
            None => self.open_near(),
            Some(StoreUrl::Memory) => Ok(memory::store().into()),
            Some(StoreUrl::Local(path)) => {
                check(path)?;
                self.keep(LocalStore::open(path)?)
            }
            Some(StoreUrl::Remote(url)) => {
                tracing::info!(store = %url, cache = %self.near.display(), "the store is elsewhere");
                let Opened { store: near, keeper } = self.open_near()?;
                let _within = self.runtime.enter();
                let channel = url.address().connect_lazily(url.security());
                let channel = channel.map_err(|error| StoreError::Remote {
                    address: url.to_string(),
                    act: "be reached".into(),
                    message: error.to_string(),
                })?;
                let (runtime, spool) = (self.runtime.clone(), &self.near);
                let retry = Retry::UntilDeadline;
                let far = RemoteStore::with_deadline(channel, url, runtime, spool, self.deadline, retry);
                Ok(Opened { store: cache::over(near, far.store(), url), keeper })
            }
        }
    }

    fn open_near(&self) -> Result<Opened, StoreError> {
        self.keep(LocalStore::open_for(&self.near, self.lifetime)?)
    }

    fn keep(&self, local: LocalStore) -> Result<Opened, StoreError> {
        let store = local.store();
        let keeper = self.max_bytes.map(|max_bytes| Keeper::start(local, max_bytes)).transpose();
        let keeper =
            keeper.map_err(|error| StoreError::io("start", "a thread that keeps the store small", error))?;
        Ok(Opened { store, keeper })
    }
}

/// Refuses a directory that others can change, or that holds something else: a part of what a store's directory holds is
/// removed when it is opened.
fn check(path: &Path) -> Result<(), StoreError> {
    let shown = || path.display().to_string();
    let mut entries = match path.read_dir() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(|error| StoreError::io("read", shown(), error))?,
    };
    let mode =
        path.metadata().map_err(|error| StoreError::io("look at", shown(), error))?.permissions().mode();
    if mode & 0o022 != 0 {
        return Err(StoreError::Writable { path: shown(), mode: mode & 0o7777 });
    }
    match entries.next().is_none() || path.join("lock").symlink_metadata().is_ok() {
        true => Ok(()),
        false => Err(StoreError::NotAStore { path: shown() }),
    }
}
