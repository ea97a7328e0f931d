//! Which network builds may have, as options say it.

use clap::ValueEnum;
use cofferdam_sandbox::Pasta;

use super::Failed;
use crate::config::NetworkPolicy;

/// A network that builds may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum NetworkChoice {
    /// One of its own for each build, connected by pasta: it reaches what this host reaches, but not its loopback
    Pasta,
    /// This host's, with all that it reaches
    Host,
}

impl NetworkChoice {
    /// What `option` asks for, if this host has it.
    ///
    /// # Errors
    /// Where pasta is missing or can't be used.
    pub fn policy(self, option: &str) -> Result<NetworkPolicy, Failed> {
        match self {
            Self::Host => Ok(NetworkPolicy::Host),
            Self::Pasta => Pasta::find().map(NetworkPolicy::Pasta).map_err(|error| {
                Failed(format!(
                    "{option}: {error}; without pasta there is {option}=host, which shares this host's network with all \
                     that it reaches, the services that listen on its loopback included"
                ))
            }),
        }
    }
}

/// The policy for an option that may be missing.
///
/// # Errors
/// Where pasta is missing or can't be used.
pub fn policy(choice: Option<NetworkChoice>, option: &str) -> Result<NetworkPolicy, Failed> {
    choice.map_or(Ok(NetworkPolicy::Refused), |choice| choice.policy(option))
}
