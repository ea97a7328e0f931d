//! What must stay in a store, and when its trees were used last.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{SystemTime, UNIX_EPOCH};

use super::index::Object;
use crate::castore::node::{Digest, Node};
use crate::castore::tree::ObjectKind;
use crate::lock::lock;

/// How many objects may be asked for while garbage is collected, some 60 bytes each. With more, the collection ends.
const MAX_RESCUED: usize = 1 << 20;

/// What keeps objects in a store, but for pins, which are in the index.
pub(super) struct Keep {
    state: Mutex<State>,
    /// Whether garbage is being collected.
    collecting: AtomicBool,
    /// Held for reading while a `put` relies on directories being there, and for writing while some are removed.
    gate: RwLock<()>,
    removals: AtomicU64,
}

#[derive(Default)]
struct State {
    leases: HashMap<u64, Vec<Object>>,
    next: u64,
    used: HashMap<Object, u64>,
    rescued: HashSet<Object>,
}

impl Keep {
    pub(super) fn new() -> Self {
        Self {
            state: Mutex::default(),
            collecting: AtomicBool::new(false),
            gate: RwLock::new(()),
            removals: AtomicU64::new(0),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Whoever relies on an object being there says so, before it looks: a collection under way then leaves it.
    pub(super) fn rescue(&self, kind: ObjectKind, digest: &Digest) {
        if self.collecting.load(Ordering::Acquire) {
            let rescued = &mut self.state().rescued;
            if rescued.len() < MAX_RESCUED {
                rescued.insert(Object { kind, digest: *digest });
            }
        }
    }

    /// The lock of those who rely on directories staying.
    pub(super) fn relying(&self) -> RwLockReadGuard<'_, ()> {
        self.gate.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The lock of whoever removes directories.
    pub(super) fn removing(&self) -> RwLockWriteGuard<'_, ()> {
        self.gate.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts objects as used now.
    pub(super) fn touch(&self, objects: impl IntoIterator<Item = Object>) {
        let now = seconds(SystemTime::now());
        self.state().used.extend(objects.into_iter().map(|object| (object, now)));
    }

    /// When roots were used since this was last called.
    pub(super) fn take_used(&self) -> HashMap<Object, u64> {
        std::mem::take(&mut self.state().used)
    }

    /// Takes back what could not be written down. What was used since counts more.
    pub(super) fn give_back(&self, used: HashMap<Object, u64>) {
        let mut state = self.state();
        for (object, time) in used {
            state.used.entry(object).or_insert(time);
        }
    }

    /// How many roots were used since the index was told.
    pub(super) fn untold(&self) -> usize {
        self.state().used.len()
    }

    /// Keeps the trees of `roots` until what this yields is dropped.
    pub(super) fn lease(self: &Arc<Self>, roots: &[Node]) -> Held {
        let objects: Vec<Object> = roots.iter().filter_map(Object::of).collect();
        self.touch(objects.iter().copied());
        let mut state = self.state();
        let number = state.next;
        state.next += 1;
        if self.collecting.load(Ordering::Acquire) {
            state.rescued.extend(objects.iter().copied());
        }
        state.leases.insert(number, objects);
        drop(state);
        Held { keep: Arc::clone(self), number }
    }

    /// All that is leased.
    pub(super) fn leased(&self) -> Vec<Object> {
        self.state().leases.values().flatten().copied().collect()
    }

    /// From now on, what is asked for is noted; false where another collection is under way.
    pub(super) fn begin(&self) -> bool {
        let mut state = self.state();
        state.rescued = HashSet::new();
        !self.collecting.swap(true, Ordering::AcqRel)
    }

    /// What was asked for since [`Keep::begin`]; `None` where that is too much to remember.
    pub(super) fn rescued<T>(&self, look: impl FnOnce(&HashSet<Object>) -> T) -> Option<T> {
        let state = self.state();
        (state.rescued.len() < MAX_RESCUED).then(|| look(&state.rescued))
    }

    /// The collection is over.
    pub(super) fn end(&self) {
        self.collecting.store(false, Ordering::Release);
        self.state().rescued = HashSet::new();
    }

    /// How many times something was removed.
    pub(super) fn removals(&self) -> u64 {
        self.removals.load(Ordering::Acquire)
    }

    /// Counts a removal.
    pub(super) fn removed(&self) {
        self.removals.fetch_add(1, Ordering::AcqRel);
    }
}

/// A lease.
pub(super) struct Held {
    keep: Arc<Keep>,
    number: u64,
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut state = self.keep.state();
        let objects = state.leases.remove(&self.number).unwrap_or_default();
        // Used to the end.
        let now = seconds(SystemTime::now());
        state.used.extend(objects.into_iter().map(|object| (object, now)));
    }
}

/// Seconds since the epoch; 0 before it.
pub(super) fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
