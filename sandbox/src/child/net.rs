//! The sandbox's own network: loopback and nothing else.

use crate::frame::Own;
use crate::report::{SetupFailure, Step};
use crate::sabotage::{Layer, kept};
use crate::sys;

/// Brings up loopback where the network is the sandbox's own.
pub fn begin(network: Own) -> Result<(), SetupFailure> {
    match network {
        Own::Own if !kept(Layer::Network) => Ok(()),
        // 127.0.0.1 and ::1 come with the interface.
        Own::Own => sys::loopback_up().map_err(|errno| SetupFailure::new(Step::Loopback, errno, "")),
        Own::Shared => Ok(()),
    }
}
