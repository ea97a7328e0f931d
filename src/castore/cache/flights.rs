//! Work that several want done at the same time, and that is done once.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use crate::castore::StoreError;
use crate::lock::lock;

type End<V> = Result<V, Arc<StoreError>>;

/// What is being worked on, by key.
pub(super) struct Flights<K, V>(Mutex<HashMap<K, Arc<Flight<V>>>>);

struct Flight<V> {
    end: Mutex<Option<End<V>>>,
    ended: Condvar,
}

impl<K: Copy + Eq + Hash, V: Clone> Flights<K, V> {
    pub(super) fn new() -> Self {
        Self(Mutex::new(HashMap::new()))
    }

    /// Does `work`, or waits for whoever does the same already. All of them get one result, a failure too; who comes
    /// later begins anew.
    ///
    /// # Errors
    /// What `work` fails with.
    pub(super) fn join(&self, key: K, work: impl FnOnce() -> Result<V, StoreError>) -> Result<V, StoreError> {
        let mut first = false;
        let flight = Arc::clone(lock(&self.0).entry(key).or_insert_with(|| {
            first = true;
            Arc::new(Flight { end: Mutex::new(None), ended: Condvar::new() })
        }));
        let end = match first {
            true => {
                let mut landing = Landing { flights: self, key, flight: &flight, end: None };
                landing.end.insert(work().map_err(Arc::new)).clone()
            }
            false => flight.wait(),
        };
        // Who was alone keeps the error as it is.
        drop(flight);
        end.map_err(|error| Arc::try_unwrap(error).unwrap_or_else(StoreError::Shared))
    }
}

impl<V: Clone> Flight<V> {
    fn wait(&self) -> End<V> {
        let mut end = lock(&self.end);
        loop {
            if let Some(end) = &*end {
                return end.clone();
            }
            end = self.ended.wait(end).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Tells all who wait, also where the work has panicked.
struct Landing<'a, K: Eq + Hash, V> {
    flights: &'a Flights<K, V>,
    key: K,
    flight: &'a Flight<V>,
    end: Option<End<V>>,
}

impl<K: Eq + Hash, V> Drop for Landing<'_, K, V> {
    fn drop(&mut self) {
        // Who comes from now on looks whether it has been done, and finds what the work has left.
        lock(&self.flights.0).remove(&self.key);
        let end = self.end.take().unwrap_or_else(|| Err(Arc::new(StoreError::Abandoned)));
        *lock(&self.flight.end) = Some(end);
        self.flight.ended.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use super::*;
    use crate::castore::Digest;

    const WAITING: usize = 20;

    /// Has `WAITING` threads join one flight that ends with `work`, and yields what each was told.
    fn all_join(work: fn() -> Result<u32, StoreError>) -> (usize, Vec<Result<u32, String>>) {
        let (flights, done) = (Flights::new(), AtomicUsize::new(0));
        let start = Barrier::new(WAITING);
        let told = std::thread::scope(|scope| {
            let join = || {
                start.wait();
                let told = flights.join(Digest::of(b"x"), || {
                    done.fetch_add(1, Ordering::Relaxed);
                    // Until the others have come.
                    std::thread::sleep(Duration::from_millis(300));
                    work()
                });
                told.map_err(|error| error.to_string())
            };
            let threads: Vec<_> = (0..WAITING).map(|_| scope.spawn(join)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap_or(Err("panicked".into()))).collect()
        });
        assert!(lock(&flights.0).is_empty());
        (done.into_inner(), told)
    }

    #[test]
    fn one_works_and_all_are_told() {
        assert_eq!(all_join(|| Ok(7)), (1, vec![Ok(7); WAITING]));
        let failure = || Err(StoreError::InUse { path: "/x".into() });
        let told = "the store at /x is in use by another process".to_owned();
        assert_eq!(all_join(failure), (1, vec![Err(told); WAITING]));
    }

    #[test]
    fn a_panic_is_told_too() {
        let (done, mut told) = all_join(|| panic!("on purpose"));
        assert_eq!(done, 1);
        told.sort();
        let abandoned = Err(StoreError::Abandoned.to_string());
        let panicked = Err("panicked".to_owned());
        assert_eq!(told.iter().filter(|told| **told == panicked).count(), 1);
        assert_eq!(told.iter().filter(|told| **told == abandoned).count(), WAITING - 1);
    }

    #[test]
    fn who_comes_later_begins_anew() {
        let flights = Flights::new();
        let digest = Digest::of(b"x");
        assert!(flights.join(digest, || Err(StoreError::Abandoned)).is_err());
        assert_eq!(flights.join(digest, || Ok(1)).unwrap(), 1);
        assert_eq!(flights.join(digest, || Ok(2)).unwrap(), 2);
    }
}
