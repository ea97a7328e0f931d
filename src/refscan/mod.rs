//! Reference scanning: which of a set of needles occur anywhere in a stream of bytes?
//!
//! A build request names needles, usually the hashes of its inputs' paths. Those found in an output are
//! what the output refers to. They are looked for in file contents, in the targets of symbolic links and
//! in the names of entries.
//!
//! # What is found
//! Exactly the needles that a naive search for each of them, one by one, would find: needles may overlap,
//! nest, repeat, differ in length and consist of any bytes. A match may lie across any number of chunks of
//! one stream. It never lies across two streams, nor across two names.
//!
//! # The pieces
//! * [`Patterns`] is built once from the needles of a request, and shared: a clone costs one counter.
//! * [`Scanner`] collects what was found in one output. Threads may share it.
//! * [`ScanStream`] is the way through one file, fed chunk by chunk.
//!
//! ```
//! use cofferdam::refscan::{Patterns, Scanner};
//!
//! let patterns = Patterns::new(&["abc", "bcd", "nowhere", "abc"])?;
//! let scanner = Scanner::new(&patterns);
//! let mut stream = scanner.stream();
//! stream.feed(b"..ab");
//! stream.feed(b"cd..");
//! assert_eq!(scanner.found(), [0, 1, 3]);
//! # Ok::<(), cofferdam::refscan::PatternsError>(())
//! ```
//!
//! # Cost
//! One step of an automaton a byte, whatever the needles and whatever the data. Once every needle was
//! found, one comparison a chunk. Without needles, nothing.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

mod engine;
#[cfg(test)]
mod tests;

use engine::{Cursor, Engine};

/// A set of needles, ready to be looked for.
#[derive(Clone)]
pub struct Patterns(Arc<Inner>);

struct Inner {
    engine: Engine,
    /// For each distinct needle, where it stood among the needles given; ascending.
    indices: Vec<Vec<u64>>,
}

impl Patterns {
    /// Prepares `needles`. Equal ones are looked for once and reported under each of their indices; no
    /// needles at all is fine.
    ///
    /// # Errors
    /// [`PatternsError::Empty`] names the first needle without bytes, [`PatternsError::TooLarge`] says that
    /// all needles together are more than an automaton can hold.
    pub fn new(needles: &[impl AsRef<[u8]>]) -> Result<Self, PatternsError> {
        let mut distinct: Vec<&[u8]> = Vec::with_capacity(needles.len());
        let mut indices: Vec<Vec<u64>> = Vec::with_capacity(needles.len());
        let mut seen = HashMap::with_capacity(needles.len());
        for (index, needle) in needles.iter().enumerate() {
            let needle = needle.as_ref();
            if needle.is_empty() {
                return Err(PatternsError::Empty { index });
            }
            let pattern = *seen.entry(needle).or_insert_with(|| {
                distinct.push(needle);
                indices.push(Vec::new());
                distinct.len() - 1
            });
            indices[pattern].push(index as u64);
        }
        let engine = Engine::new(&distinct)?;
        Ok(Self(Arc::new(Inner { engine, indices })))
    }

    /// How many distinct needles there are.
    pub fn distinct(&self) -> usize {
        self.0.indices.len()
    }
}

impl std::fmt::Debug for Patterns {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Patterns").field("distinct", &self.distinct()).finish_non_exhaustive()
    }
}

/// Why a set of needles can't be looked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PatternsError {
    /// A needle has no bytes: it would be found everywhere.
    #[error("needle {index} is empty")]
    Empty {
        /// Where it stands among the needles.
        index: usize,
    },
    /// The needles are too large for an automaton.
    #[error("{count} needles of {bytes} bytes in all are too many to look for")]
    TooLarge {
        /// How many distinct needles there are.
        count: usize,
        /// Their length in bytes, together.
        bytes: usize,
    },
}

/// What was found so far in one output.
pub struct Scanner {
    patterns: Patterns,
    found: Found,
}

impl Scanner {
    /// A scanner that has found nothing yet.
    pub fn new(patterns: &Patterns) -> Self {
        Self { found: Found::new(patterns.distinct()), patterns: patterns.clone() }
    }

    /// Begins a stream of bytes, such as a file.
    pub fn stream(&self) -> ScanStream<'_> {
        ScanStream { scanner: self, cursor: self.patterns.0.engine.start() }
    }

    /// Looks through `whole`, which is not the part of anything: a name, or the target of a link.
    pub fn scan(&self, whole: &[u8]) {
        self.stream().feed(whole);
    }

    /// The indices of all needles found so far, ascending. What other threads are feeding meanwhile may or
    /// may not be among it.
    pub fn found(&self) -> Vec<u64> {
        let indices = self.patterns.0.indices.iter().enumerate();
        let mut found: Vec<u64> = indices
            .filter(|(pattern, _)| self.found.contains(*pattern))
            .flat_map(|(_, indices)| indices.iter().copied())
            .collect();
        found.sort_unstable();
        found
    }
}

/// The way through one stream of bytes. Dropping it loses nothing.
pub struct ScanStream<'a> {
    scanner: &'a Scanner,
    cursor: Cursor,
}

impl ScanStream<'_> {
    /// Looks through the next bytes of the stream.
    pub fn feed(&mut self, chunk: &[u8]) {
        let Scanner { patterns, found } = self.scanner;
        // Once all are found it no longer matters where the cursor stands.
        if !found.all() {
            patterns.0.engine.feed(&mut self.cursor, chunk, found);
        }
    }
}

/// One bit for each distinct needle.
///
/// The order of memory accesses doesn't matter: bits only ever get set, and whoever wants the final answer
/// has joined the threads that set them.
struct Found {
    bits: Box<[AtomicU64]>,
    missing: AtomicUsize,
}

impl Found {
    fn new(patterns: usize) -> Self {
        let bits = (0..patterns.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self { bits, missing: AtomicUsize::new(patterns) }
    }

    fn contains(&self, pattern: usize) -> bool {
        self.bits[pattern / 64].load(Ordering::Relaxed) & (1 << (pattern % 64)) != 0
    }

    fn insert(&self, pattern: usize) {
        let bit = 1 << (pattern % 64);
        if self.bits[pattern / 64].fetch_or(bit, Ordering::Relaxed) & bit == 0 {
            self.missing.fetch_sub(1, Ordering::Relaxed);
        }
    }

    fn all(&self) -> bool {
        self.missing.load(Ordering::Relaxed) == 0
    }
}
