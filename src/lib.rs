//! Executes content-addressed build requests in Linux namespaces it makes itself.
//!
//! The `cofferdam` binary is [`cli::main`]. `ARCHITECTURE.md` in the repository shows how the modules hang together.

#![forbid(unsafe_code)]

pub mod address;
pub mod build;
pub mod castore;
pub mod cli;
pub mod config;
pub mod inputs;
pub mod isolation;
mod lock;
mod recent;
pub mod refscan;
pub mod remote;
pub mod selftest;
pub mod server;
pub mod size;
pub mod store_url;
pub mod view;
pub mod worker;
