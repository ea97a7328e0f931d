//! The castore: blobs and directories named by what they hold.

pub mod closure;
#[cfg(test)]
mod fixtures;
pub mod ingest;
pub mod local;
mod memo;
pub mod memory;
pub mod node;
pub mod remote;
pub mod traits;
pub mod tree;

pub use local::LocalStore;
pub use node::{Digest, Directory, Name, Node, NodeError, Target};
pub use traits::{Blob, BlobService, BlobWriter, DirectoryService, Store, StoreError};
