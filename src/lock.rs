//! Locks for values that no holder can leave half changed.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks `mutex`, also where a thread that held it has panicked: what it guards must be whole at every
/// point where that may happen.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
