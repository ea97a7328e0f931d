//! Which builds may run now, which wait, and which are sent away.

use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, TryAcquireError};

use super::error::Refused;

/// What a client that was sent away is told to wait.
pub const RETRY_AFTER: Duration = Duration::from_secs(5);

/// The worker's slots: as many builds run at a time as there are slots, a bounded number waits for
/// them in the order of arrival, and all others are refused.
#[derive(Clone, Debug)]
pub struct Slots(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    count: NonZeroUsize,
    max_waiting: usize,
    waiting: AtomicUsize,
    /// Hands out the right to take an index, in the order of arrival. Closed means draining.
    permits: Arc<Semaphore>,
    free: Mutex<BTreeSet<usize>>,
    returned: Notify,
}

impl Slots {
    /// `count` free slots, for which up to `max_waiting` builds may wait.
    pub fn new(count: NonZeroUsize, max_waiting: usize) -> Self {
        Self(Arc::new(Shared {
            count,
            max_waiting,
            waiting: AtomicUsize::new(0),
            permits: Arc::new(Semaphore::new(count.get())),
            free: Mutex::new((0..count.get()).collect()),
            returned: Notify::new(),
        }))
    }

    /// A slot, at once or when one becomes free.
    ///
    /// # Errors
    /// [`Refused::Busy`] where too many wait already, [`Refused::Draining`] after [`Slots::drain`].
    ///
    /// # Cancel safety
    /// Who stops waiting leaves the queue; nothing is lost.
    pub async fn acquire(&self) -> Result<Slot, Refused> {
        let shared = &self.0;
        match Arc::clone(&shared.permits).try_acquire_owned() {
            Ok(permit) => return Ok(self.slot(permit)),
            Err(TryAcquireError::Closed) => return Err(Refused::Draining),
            Err(TryAcquireError::NoPermits) => {}
        }
        let _place = Place::take(shared)?;
        let permit = Arc::clone(&shared.permits).acquire_owned().await;
        permit.map(|permit| self.slot(permit)).map_err(|_| Refused::Draining)
    }

    fn slot(&self, permit: OwnedSemaphorePermit) -> Slot {
        // There are as many permits as indices, and an index is returned before its permit.
        let index = self.0.free().pop_first().expect("whoever has a permit finds an index");
        Slot { index, shared: Arc::clone(&self.0), _permit: permit }
    }

    /// Takes no more builds on: those that wait are refused, those that run go on.
    pub fn drain(&self) {
        self.0.permits.close();
    }

    /// Returns when no build runs; after [`Slots::drain`] none will again.
    ///
    /// # Cancel safety
    /// May be dropped at any time.
    pub async fn idle(&self) {
        loop {
            let returned = self.0.returned.notified();
            tokio::pin!(returned);
            // From here on no return is missed.
            returned.as_mut().enable();
            if self.running() == 0 {
                return;
            }
            returned.await;
        }
    }

    /// How many slots there are.
    pub fn count(&self) -> NonZeroUsize {
        self.0.count
    }

    /// How many slots are taken.
    pub fn running(&self) -> usize {
        self.0.running()
    }

    /// How many builds wait for a slot.
    pub fn waiting(&self) -> usize {
        self.0.waiting.load(Ordering::Relaxed)
    }
}

impl Shared {
    fn free(&self) -> std::sync::MutexGuard<'_, BTreeSet<usize>> {
        // The set is whole between any two calls, so a panic elsewhere doesn't spoil it.
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn running(&self) -> usize {
        self.count.get() - self.free().len()
    }
}

/// A place in the queue, given up when dropped.
struct Place<'a>(&'a Shared);

impl<'a> Place<'a> {
    fn take(shared: &'a Shared) -> Result<Self, Refused> {
        let taken = shared.waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |waiting| {
            (waiting < shared.max_waiting).then_some(waiting + 1)
        });
        match taken {
            Ok(_) => Ok(Self(shared)),
            Err(waiting) => {
                Err(Refused::Busy { running: shared.running(), waiting, retry_after: RETRY_AFTER })
            }
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The right to run one build; given back when dropped.
#[derive(Debug)]
pub struct Slot {
    index: usize,
    shared: Arc<Shared>,
    // Dropped after the index was returned.
    _permit: OwnedSemaphorePermit,
}

impl Slot {
    /// Which slot it is, from 0 on; no two builds have the same at a time.
    pub fn index(&self) -> usize {
        self.index
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.shared.free().insert(self.index);
        self.shared.returned.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use tokio::task::{JoinSet, yield_now};
    use tokio::time::timeout;

    use super::*;

    fn slots(count: usize, max_waiting: usize) -> Slots {
        Slots::new(NonZeroUsize::new(count).unwrap(), max_waiting)
    }

    #[tokio::test]
    async fn indices_are_unique_and_come_back() {
        let slots = slots(3, 0);
        let first = slots.acquire().await.unwrap();
        let second = slots.acquire().await.unwrap();
        let third = slots.acquire().await.unwrap();
        assert_eq!([first.index(), second.index(), third.index()], [0, 1, 2]);
        drop(second);
        assert_eq!(slots.running(), 2);
        assert_eq!(slots.acquire().await.unwrap().index(), 1);
    }

    #[tokio::test]
    async fn the_queue_is_bounded_and_fair() {
        let slots = slots(1, 2);
        let running = slots.acquire().await.unwrap();
        let (order, mut arrived) = tokio::sync::mpsc::unbounded_channel();
        let mut waiters = JoinSet::new();
        for number in 0..2 {
            let (waiter_slots, order) = (slots.clone(), order.clone());
            waiters.spawn(async move {
                let slot = waiter_slots.acquire().await.unwrap();
                order.send(number).unwrap();
                yield_now().await;
                drop(slot);
            });
            while slots.waiting() <= number {
                yield_now().await;
            }
        }
        let refusal = slots.acquire().await.unwrap_err();
        assert_eq!(refusal, Refused::Busy { running: 1, waiting: 2, retry_after: RETRY_AFTER });
        drop(running);
        waiters.join_all().await;
        assert_eq!((arrived.recv().await, arrived.recv().await), (Some(0), Some(1)));
        assert_eq!((slots.running(), slots.waiting()), (0, 0));
    }

    #[tokio::test]
    async fn who_stops_waiting_leaves_the_queue() {
        let slots = slots(1, 1);
        let running = slots.acquire().await.unwrap();
        for _ in 0..3 {
            assert!(timeout(Duration::from_millis(1), slots.acquire()).await.is_err());
            assert_eq!(slots.waiting(), 0);
        }
        let mut waiter = pin!(slots.acquire());
        assert!(timeout(Duration::from_millis(1), &mut waiter).await.is_err());
        drop(running);
        assert_eq!(waiter.await.unwrap().index(), 0);
    }

    #[tokio::test]
    async fn a_slot_given_to_one_who_left_is_not_lost() {
        let slots = slots(1, 1);
        let running = slots.acquire().await.unwrap();
        {
            let mut waiter = pin!(slots.acquire());
            assert!(timeout(Duration::from_millis(1), &mut waiter).await.is_err());
            // The permit goes to the waiter, which is dropped without ever looking at it.
            drop(running);
        }
        assert_eq!(slots.acquire().await.unwrap().index(), 0);
    }

    #[tokio::test]
    async fn draining_lets_the_running_end() {
        let slots = slots(1, 1);
        let running = slots.acquire().await.unwrap();
        let waiter = tokio::spawn({
            let slots = slots.clone();
            async move { slots.acquire().await.map(drop) }
        });
        while slots.waiting() == 0 {
            yield_now().await;
        }
        slots.drain();
        assert_eq!(waiter.await.unwrap(), Err(Refused::Draining));
        assert_eq!(slots.acquire().await.map(drop), Err(Refused::Draining));
        assert!(timeout(Duration::from_millis(5), slots.idle()).await.is_err());
        let idle = tokio::spawn({
            let slots = slots.clone();
            async move { slots.idle().await }
        });
        yield_now().await;
        drop(running);
        idle.await.unwrap();
        assert_eq!(slots.running(), 0);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn many_at_once_never_share_an_index() {
        let slots = slots(4, 1000);
        let taken = Arc::new(Mutex::new(BTreeSet::new()));
        let mut builds = JoinSet::new();
        for number in 0..500_u64 {
            let (slots, taken) = (slots.clone(), Arc::clone(&taken));
            builds.spawn(async move {
                let slot = slots.acquire().await.unwrap();
                assert!(slot.index() < 4);
                assert!(taken.lock().unwrap().insert(slot.index()));
                tokio::time::sleep(Duration::from_micros(number % 7 * 50)).await;
                assert!(taken.lock().unwrap().remove(&slot.index()));
            });
        }
        builds.join_all().await;
        assert_eq!((slots.running(), slots.waiting()), (0, 0));
    }
}
