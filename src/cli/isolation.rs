//! What is demanded of the sandbox, on the command line.

use clap::Args;

use crate::config::Settings;
use crate::isolation::Wish;

/// Flags of every subcommand that runs builds.
#[derive(Clone, Debug, Args)]
pub struct IsolationArgs {
    /// Demand a layer of the sandbox, or leave it out: LAYER is ids, inputs; DEMAND is required,
    /// preferred (the default) or off; may be repeated
    #[arg(long, value_name = "LAYER=DEMAND")]
    isolation: Vec<Wish>,
}

impl IsolationArgs {
    /// Puts the demands into the settings. Of two for one layer the last counts.
    pub fn apply(self, settings: &mut Settings) {
        for Wish { layer, demand } in self.isolation {
            *settings.isolation.of(layer) = demand;
        }
    }
}
