//! A bounded memory of what was looked up, for stores and checks that would otherwise look it up again.

use std::collections::HashMap;
use std::mem;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::node::Digest;

/// Values by digest, up to a total weight. When half of it is used up, whatever was not asked for since
/// the last such time is forgotten.
pub(super) struct Memo<V> {
    half: usize,
    generations: Mutex<Generations<V>>,
}

struct Generations<V> {
    young: HashMap<Digest, (V, usize)>,
    young_weight: usize,
    old: HashMap<Digest, (V, usize)>,
}

impl<V: Clone> Memo<V> {
    /// A memo of at most `weight`, in whatever unit its values are weighed.
    pub(super) fn new(weight: usize) -> Self {
        let generations = Generations { young: HashMap::new(), young_weight: 0, old: HashMap::new() };
        Self { half: weight / 2, generations: Mutex::new(generations) }
    }

    /// The value remembered for `digest`.
    pub(super) fn get(&self, digest: &Digest) -> Option<V> {
        let mut generations = self.lock();
        if let Some((value, _)) = generations.young.get(digest) {
            return Some(value.clone());
        }
        let (value, weight) = generations.old.remove(digest)?;
        generations.insert(*digest, value.clone(), weight, self.half);
        Some(value)
    }

    /// Remembers `value`, unless it alone outweighs half the memo.
    pub(super) fn insert(&self, digest: Digest, value: V, weight: usize) {
        if weight <= self.half {
            self.lock().insert(digest, value, weight, self.half);
        }
    }

    /// A thread that panicked inside left at worst something forgotten.
    fn lock(&self) -> MutexGuard<'_, Generations<V>> {
        self.generations.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<V> Generations<V> {
    fn insert(&mut self, digest: Digest, value: V, weight: usize, half: usize) {
        if self.young_weight + weight > half {
            self.old = mem::take(&mut self.young);
            self.young_weight = 0;
        }
        self.young_weight += weight;
        if let Some((_, weight)) = self.young.insert(digest, (value, weight)) {
            self.young_weight -= weight;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(number: usize) -> Digest {
        Digest::of(&number.to_le_bytes())
    }

    #[test]
    fn what_is_asked_for_stays_and_the_rest_goes() {
        let memo = Memo::new(20);
        for number in 0..1000 {
            memo.insert(digest(number), number, 1);
            assert_eq!(memo.get(&digest(0)), Some(0));
            assert_eq!(memo.get(&digest(number)), Some(number));
        }
        let kept = (0..1000).filter(|number| memo.get(&digest(*number)).is_some()).count();
        assert!((2..=20).contains(&kept), "{kept}");
    }

    #[test]
    fn weight_counts() {
        let memo = Memo::new(20);
        memo.insert(digest(0), 0, 11);
        assert_eq!(memo.get(&digest(0)), None);
        memo.insert(digest(1), 1, 10);
        memo.insert(digest(2), 2, 10);
        memo.insert(digest(3), 3, 10);
        let kept = [1, 2, 3].map(|number| memo.get(&digest(number)));
        assert_eq!(kept, [None, Some(2), Some(3)]);
    }

    #[test]
    fn the_same_again_is_counted_once() {
        let memo = Memo::new(20);
        (0..1000).for_each(|number| memo.insert(digest(1), number, 1));
        assert_eq!(memo.get(&digest(1)), Some(999));
        assert!(memo.lock().young_weight <= 10);
    }
}
