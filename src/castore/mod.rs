//! The castore: blobs and directories named by what they hold.

pub mod archive;
pub mod cache;
mod children;
pub mod choose;
pub mod closure;
mod cursor;
mod file_blob;
#[cfg(test)]
mod fixtures;
mod incoming;
pub mod ingest;
pub mod local;
pub mod look;
pub mod memory;
pub mod node;
pub mod remote;
pub mod traits;
pub mod tree;
mod whole;

pub use local::LocalStore;
pub use node::{Digest, Directory, Name, Node, NodeError, Target};
pub use traits::{
    Blob, BlobService, BlobStat, BlobWriter, DirectoryService, Lease, Store, StoreError, Stored, WrongBytes,
};
