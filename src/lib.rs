//! Executes content-addressed build requests in Linux namespaces it makes itself.

pub mod address;
pub mod build;
pub mod castore;
pub mod config;
pub mod refscan;
pub mod server;
pub mod view;
pub mod worker;
