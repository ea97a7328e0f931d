//! Keeps a store to a size while it is in use.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::gc::Goal;
use super::{LocalStore, Root};
use crate::castore::traits::StoreError;

/// How often it is looked whether the store has grown.
const PAUSE: Duration = Duration::from_secs(1);

/// How long after a collection that did not suffice the next one comes. What was in the way is in use, pinned, asked for
/// just then, or too young.
const RETRY: Duration = Duration::from_secs(10);

/// Of the size allowed, how much must have come since the last look for the store to be measured again.
const GROWTH_PERCENT: u64 = 1;

/// A thread that removes what was used longest ago once a store takes more than it may. It ends with this value.
pub struct Keeper {
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    /// Begins to keep `store` to `max_bytes`.
    ///
    /// # Errors
    /// Where there can be no further thread.
    pub fn start(store: LocalStore, max_bytes: u64) -> io::Result<Self> {
        let (stop, stopped) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("store-keeper".to_owned())
            .spawn(move || keep(&store, max_bytes, &stopped))?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.stop = None;
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn keep(store: &LocalStore, max_bytes: u64, stopped: &mpsc::Receiver<()>) {
    // When it is due whether or not the store has grown: at once, and while it is larger than it may be.
    let mut due = Some(Instant::now());
    loop {
        let pause = due.map_or(PAUSE, |due| due.saturating_duration_since(Instant::now()).min(PAUSE));
        let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(pause) else { break };
        let grown = store.root.grown.load(Ordering::Relaxed);
        if due.is_none_or(|due| due > Instant::now()) && grown < (max_bytes / 100 * GROWTH_PERCENT).max(1) {
            continue;
        }
        store.root.grown.fetch_sub(grown, Ordering::Relaxed);
        let ended = || !matches!(stopped.try_recv(), Err(mpsc::TryRecvError::Empty));
        let fits = keep_once(store, max_bytes, &ended).unwrap_or_else(|error| {
            tracing::error!("the store can't be kept to {max_bytes} bytes: {error}");
            false
        });
        due = (!fits).then(|| Instant::now() + RETRY);
    }
}

/// Yields whether the store takes no more than it may.
fn keep_once(store: &LocalStore, max_bytes: u64, ended: &dyn Fn() -> bool) -> Result<bool, StoreError> {
    if store.disk_bytes()? <= max_bytes {
        return Ok(true);
    }
    let goal = Goal { max_bytes: Some(max_bytes), unused_since: None };
    let collected = store.collect(goal, &mut |_| !ended())?;
    tracing::info!(
        blobs = collected.blobs,
        directories = collected.directories,
        freed = collected.freed,
        left = collected.left,
        "the store had more than it may"
    );
    Ok(collected.left <= max_bytes)
}

impl Root {
    /// Counts bytes that have come.
    pub(super) fn grow(&self, bytes: u64) {
        self.grown.fetch_add(bytes, Ordering::Relaxed);
    }
}

impl std::fmt::Debug for Keeper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keeper").finish_non_exhaustive()
    }
}
