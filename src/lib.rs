//! Executes content-addressed build requests in Linux namespaces it makes itself.

pub mod castore;
pub mod refscan;
