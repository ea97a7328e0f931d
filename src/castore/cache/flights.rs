//! Work that several want done at the same time, and that is done once.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::castore::StoreError;
use crate::lock::lock;

/// A failure that took so long is told to those who come within as long after it. The kernel asks again at once for what
/// it could not read ahead: its reader must not wait for another deadline.
const SLOW: Duration = Duration::from_secs(1);

type End<V> = Result<V, Arc<StoreError>>;

/// What is being worked on, by key, and what has just failed slowly.
pub(super) struct Flights<K, V>(Mutex<HashMap<K, Arc<Flight<V>>>>);

struct Flight<V> {
    began: Instant,
    end: Mutex<Option<Ended<V>>>,
    ended: Condvar,
}

struct Ended<V> {
    at: Instant,
    how: End<V>,
}

impl<K: Copy + Eq + Hash, V: Clone> Flights<K, V> {
    pub(super) fn new() -> Self {
        Self(Mutex::new(HashMap::new()))
    }

    /// Does `work`, or waits for whoever does the same already. All of them get one result, a failure too; who comes
    /// later begins anew, unless that failure took long and was just now.
    ///
    /// # Errors
    /// What `work` fails with.
    pub(super) fn join(&self, key: K, work: impl FnOnce() -> Result<V, StoreError>) -> Result<V, StoreError> {
        let mut first = false;
        let mut flights = lock(&self.0);
        flights.retain(|_, flight| !flight.is_past());
        let flight = Arc::clone(flights.entry(key).or_insert_with(|| {
            first = true;
            Arc::new(Flight { began: Instant::now(), end: Mutex::new(None), ended: Condvar::new() })
        }));
        drop(flights);
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
                return end.how.clone();
            }
            end = self.ended.wait(end).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Whether it ended so long ago that whoever asks now begins anew.
    fn is_past(&self) -> bool {
        lock(&self.end).as_ref().is_some_and(|end| end.at.elapsed() >= SLOW)
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
        let how = self.end.take().unwrap_or_else(|| Err(Arc::new(StoreError::Abandoned)));
        let slow_failure = how.is_err() && self.flight.began.elapsed() >= SLOW;
        if !slow_failure {
            // Who comes from now on looks whether it has been done, and finds what the work has left.
            lock(&self.flights.0).remove(&self.key);
        }
        *lock(&self.flight.end) = Some(Ended { at: Instant::now(), how });
        self.flight.ended.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::castore::Digest;
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering};

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

    #[test]
    fn a_slow_failure_is_told_for_a_moment() {
        let flights = Flights::new();
        let digest = Digest::of(b"x");
        let slowly = |end: Result<u32, StoreError>| {
            std::thread::sleep(SLOW);
            end
        };
        assert!(flights.join(digest, || slowly(Err(StoreError::Abandoned))).is_err());
        assert!(flights.join(digest, || Ok(1)).is_err());
        std::thread::sleep(SLOW);
        assert_eq!(flights.join(digest, || slowly(Ok(2))).unwrap(), 2);
        assert_eq!(flights.join(digest, || Ok(3)).unwrap(), 3);
        assert!(lock(&flights.0).is_empty());
    }
}
