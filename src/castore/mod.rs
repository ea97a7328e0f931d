//! The castore: blobs and directories named by what they hold.

pub mod memory;
pub mod node;
pub mod remote;
pub mod traits;

pub use node::{Digest, Directory, Name, Node, NodeError, Target};
pub use traits::{Blob, BlobService, BlobWriter, DirectoryService, Store, StoreError};
