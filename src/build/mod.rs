//! A build, from the request to the last event.

pub mod admission;
pub mod error;
pub mod events;
pub mod request;
