//! What the far store was seen to have.

use std::time::{Duration, Instant};

use crate::castore::{BlobStat, Digest};
use crate::recent::Memo;

/// How many of each are remembered, some 100 bytes each.
const REMEMBERED: usize = 1 << 18;

/// For how long: the far store may remove what it had.
const REMEMBERED_FOR: Duration = Duration::from_secs(10 * 60);

/// Digests with what is known of them, for a while.
pub(super) struct Present<V>(Memo<Digest, (V, Instant)>);

/// Blobs that were found there or stored there.
pub(super) type PresentBlobs = Present<BlobStat>;

/// Directories that were stored there with all below them.
pub(super) type PresentDirectories = Present<()>;

impl<V: Clone> Present<V> {
    pub(super) fn new() -> Self {
        Self(Memo::new(REMEMBERED))
    }

    pub(super) fn get(&self, digest: &Digest) -> Option<V> {
        self.get_at(digest, Instant::now())
    }

    fn get_at(&self, digest: &Digest, now: Instant) -> Option<V> {
        let (value, since) = self.0.get(digest)?;
        (now.duration_since(since) < REMEMBERED_FOR).then_some(value)
    }

    pub(super) fn insert(&self, digest: Digest, value: V) {
        self.0.insert(digest, (value, Instant::now()), 1);
    }

    pub(super) fn forget(&self, digest: &Digest) {
        self.0.remove(digest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_known_for_ever() {
        let present = Present::new();
        let (digest, now) = (Digest::of(b"x"), Instant::now());
        present.insert(digest, 1);
        assert_eq!(present.get_at(&digest, now), Some(1));
        assert_eq!(present.get_at(&digest, now + REMEMBERED_FOR * 2), None);
        present.forget(&digest);
        assert_eq!(present.get(&digest), None);
    }
}
