//! gRPC to calls and back; nothing is decided here.

pub mod castore_service;
pub mod routes;
