//! Blobs that are fetched before anybody asks for them.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, Weak};

use super::Inner;
use crate::castore::Digest;
use crate::lock::lock;

/// How many are fetched at the same time.
const THREADS: usize = 8;

/// Only smaller blobs are, of up to this many bytes: what it costs to ask for one weighs most with them, and a large one
/// may well never be read.
const LARGEST_BYTES: u64 = 1 << 20;

/// How many may wait for their turn, and how many bytes they may have in all. What comes on top is fetched when it is read.
const WAITING: usize = 1 << 16;
const WAITING_BYTES: u64 = 256 << 20;

/// Blobs with their sizes, waiting to be fetched.
#[derive(Default)]
pub(super) struct Ahead(Mutex<Queue>);

#[derive(Default)]
struct Queue {
    blobs: VecDeque<(Digest, u64)>,
    bytes: u64,
    threads: usize,
}

impl Inner {
    /// Has blobs fetched in the background.
    pub(super) fn fetch_ahead(self: &Arc<Self>, blobs: impl IntoIterator<Item = (Digest, u64)>) {
        let mut queue = lock(&self.ahead.0);
        for (digest, size) in blobs.into_iter().filter(|(_, size)| *size <= LARGEST_BYTES) {
            if queue.blobs.len() < WAITING && queue.bytes + size <= WAITING_BYTES {
                queue.bytes += size;
                queue.blobs.push_back((digest, size));
            }
        }
        while queue.threads < THREADS.min(queue.blobs.len()) {
            let inner = Arc::downgrade(self);
            let started = std::thread::Builder::new().name("fetch ahead".into()).spawn(move || work(&inner));
            if let Err(error) = started {
                tracing::debug!(%error, "no thread to fetch blobs ahead");
                break;
            }
            queue.threads += 1;
        }
    }

    fn next_ahead(&self) -> Option<(Digest, u64)> {
        let mut queue = lock(&self.ahead.0);
        let next = queue.blobs.pop_front();
        match next {
            Some((_, size)) => queue.bytes -= size,
            None => queue.threads -= 1,
        }
        next
    }

    /// Whoever reads what was waiting is told what is wrong with the store, and no others need to be.
    fn give_up_ahead(&self) {
        let mut queue = lock(&self.ahead.0);
        queue.blobs.clear();
        queue.bytes = 0;
    }
}

/// Fetches what waits, as long as there is something and the cache is in use.
fn work(inner: &Weak<Inner>) {
    while let Some(inner) = inner.upgrade()
        && let Some((digest, size)) = inner.next_ahead()
    {
        if let Err(error) = inner.blob(&digest, Some(size)) {
            tracing::debug!(%digest, %error, "can't fetch a blob ahead");
            inner.give_up_ahead();
        }
    }
}
