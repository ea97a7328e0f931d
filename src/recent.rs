//! What was used last, within a limit.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Mutex;

use crate::lock::lock;

/// What was looked up, remembered for whoever asks from whatever thread: the values used last, within a
/// limit of weight.
#[derive(Debug)]
pub struct Memo<K, V>(Mutex<Recent<K, V>>);

impl<K: Hash + Eq + Copy, V: Clone> Memo<K, V> {
    /// A memo of values that weigh at most `limit` together, in whatever unit they are weighed; one that
    /// alone weighs more than half of it is held until the next one comes.
    pub fn new(limit: usize) -> Self {
        Self(Mutex::new(Recent::new(limit)))
    }

    /// The value remembered for `key`.
    pub fn get(&self, key: &K) -> Option<V> {
        lock(&self.0).get(key)
    }

    /// Remembers `value`.
    pub fn insert(&self, key: K, value: V, weight: usize) {
        lock(&self.0).insert(key, value, weight);
    }

    /// Forgets the value of `key`.
    pub fn remove(&self, key: &K) {
        lock(&self.0).remove(key);
    }

    /// Forgets all values, and gives their memory back.
    pub fn clear(&self) {
        lock(&self.0).clear();
    }
}

/// Keeps the values used last, up to a total weight.
///
/// Two generations: what is used moves to the younger one, and when that has half the weight allowed,
/// it becomes the older one and what had not moved is dropped. Every call takes constant time.
#[derive(Debug)]
struct Recent<K, V> {
    young: HashMap<K, (V, usize)>,
    old: HashMap<K, (V, usize)>,
    weight: usize,
    half: usize,
}

impl<K: Hash + Eq + Copy, V: Clone> Recent<K, V> {
    fn new(limit: usize) -> Self {
        Self { young: HashMap::new(), old: HashMap::new(), weight: 0, half: (limit / 2).max(1) }
    }

    /// The value of `key`, if it is still held.
    fn get(&mut self, key: &K) -> Option<V> {
        if let Some((value, _)) = self.young.get(key) {
            return Some(value.clone());
        }
        let (value, weight) = self.old.remove(key)?;
        self.insert(*key, value.clone(), weight);
        Some(value)
    }

    /// Drops the value of `key`.
    fn remove(&mut self, key: &K) {
        self.old.remove(key);
        if let Some((_, weight)) = self.young.remove(key) {
            self.weight = self.weight.saturating_sub(weight);
        }
    }

    /// Drops all values.
    fn clear(&mut self) {
        (self.young, self.old, self.weight) = (HashMap::new(), HashMap::new(), 0);
    }

    /// Holds `value`, which weighs `weight`.
    fn insert(&mut self, key: K, value: V, weight: usize) {
        if self.weight.saturating_add(weight) > self.half {
            self.old = std::mem::take(&mut self.young);
            self.weight = 0;
        }
        self.weight = self.weight.saturating_add(weight);
        if let Some((_, replaced)) = self.young.insert(key, (value, weight)) {
            self.weight = self.weight.saturating_sub(replaced);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_holds_and_what_is_used_stays() {
        let mut recent = Recent::new(10);
        for key in 0..1000 {
            recent.insert(key, key, 1);
            assert_eq!(recent.get(&0), Some(0), "used all the time, after {key}");
            assert!(recent.young.len() + recent.old.len() <= 10);
        }
        assert_eq!(recent.get(&1), None);
        recent.remove(&0);
        assert_eq!(recent.get(&0), None);
        assert_eq!(recent.get(&999), Some(999));
        recent.clear();
        assert_eq!((recent.get(&999), recent.weight), (None, 0));
    }

    #[test]
    fn a_heavy_value_is_held_until_the_next() {
        let mut recent = Recent::new(10);
        recent.insert("heavy", 1, 1000);
        assert_eq!(recent.get(&"heavy"), Some(1));
        recent.insert("light", 2, 1);
        recent.insert("full", 3, 5);
        assert_eq!(recent.get(&"heavy"), None);
        assert_eq!(recent.get(&"full"), Some(3));
    }
}
