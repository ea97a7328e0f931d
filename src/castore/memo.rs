//! What was looked up by digest, remembered for whoever asks from whatever thread.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::node::Digest;
use crate::recent::Recent;

/// The values used last, by digest, within a limit of weight.
pub(super) struct Memo<V>(Mutex<Recent<Digest, V>>);

impl<V: Clone> Memo<V> {
    /// A memo of values that weigh at most `limit` together, in whatever unit they are weighed.
    pub(super) fn new(limit: usize) -> Self {
        Self(Mutex::new(Recent::new(limit)))
    }

    /// The value remembered for `digest`.
    pub(super) fn get(&self, digest: &Digest) -> Option<V> {
        self.lock().get(digest)
    }

    /// Remembers `value`.
    pub(super) fn insert(&self, digest: Digest, value: V, weight: usize) {
        self.lock().insert(digest, value, weight);
    }

    /// A thread that panicked inside left at worst something forgotten.
    fn lock(&self) -> MutexGuard<'_, Recent<Digest, V>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
