//! A build, from the request to the last event.

pub mod request;
