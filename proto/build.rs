//! Generates the messages and services from the .proto files, without protoc.

use std::path::PathBuf;

use prost::Message;

const ROOT: &str = "protos";
const FILES: [&str; 5] = [
    "snix/castore/protos/castore.proto",
    "snix/castore/protos/rpc_blobstore.proto",
    "snix/castore/protos/rpc_directory.proto",
    "snix/build/protos/build.proto",
    "snix/build/protos/rpc_build.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed={ROOT}");
    let descriptors = protox::compile(FILES, [ROOT])?;
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    std::fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    let mut config = tonic_prost_build::Config::new();
    // The JSON form finds a message's descriptor by its name.
    config.enable_type_names();
    tonic_prost_build::configure()
        // File contents and log lines are handed on, not copied.
        .bytes(".snix.castore.v1.BlobChunk")
        .bytes(".snix.build.v1.LogOutput")
        .compile_fds_with_config(descriptors, config)?;
    Ok(())
}
