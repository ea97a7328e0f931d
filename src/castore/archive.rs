//! Trees as tar archives, in and out.
//!
//! This is for the command line alone: no daemon parses archives.
//!
//! What [`write()`] makes depends on the tree and on nothing else. What [`Unpack`] takes may come from anyone: it touches
//! no file, and whatever it can't express, or would have to guess, it refuses with the entry named.

mod read;
#[cfg(test)]
mod tests;
mod tree;
mod write;

pub use read::{ArchiveError, Unpack};
pub use tree::EntryFault;
pub use write::write;
