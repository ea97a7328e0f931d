//! The wire: messages, clients and servers of `snix.build.v1` and `snix.castore.v1`.
//!
//! Everything here is generated from `protos/`; names, numbers and packages are those of the snix
//! project, so that its clients work unchanged.

#[allow(missing_docs, clippy::all)]
mod snix {
    pub mod build {
        pub mod v1 {
            tonic::include_proto!("snix.build.v1");
        }
    }
    pub mod castore {
        pub mod v1 {
            tonic::include_proto!("snix.castore.v1");
        }
    }
}

pub mod json;

/// `snix.build.v1`: build requests and events.
pub use snix::build::v1 as build;
/// `snix.castore.v1`: blobs and directories.
pub use snix::castore::v1 as castore;

/// All the .proto files, as an encoded `google.protobuf.FileDescriptorSet`.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
