//! The sandbox's own network: loopback and nothing else.

use crate::plan::Network;
use crate::report::{SetupFailure, Step};
use crate::sabotage::{Layer, kept};
use crate::sys;

/// Brings up loopback where the network is the sandbox's own.
pub fn set_up(network: Network) -> Result<(), SetupFailure> {
    match network {
        // 127.0.0.1 and ::1 come with the interface.
        Network::Own if !kept(Layer::Network) => Ok(()),
        Network::Own => sys::loopback_up().map_err(|errno| SetupFailure::new(Step::Loopback, errno, "")),
        Network::Host => Ok(()),
    }
}
