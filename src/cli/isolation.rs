//! What is demanded of the sandbox, on the command line.

use clap::Args;
use cofferdam_sandbox::seccomp::Profile;

use crate::config::Settings;
use crate::isolation::Wish;

/// Flags of every subcommand that runs builds.
#[derive(Debug, Args)]
pub struct IsolationArgs {
    /// Refuse builds little more than Nix does (parity), or all that few of them need (strict): nested sandboxes, mounts,
    /// unusual sockets
    #[arg(long, value_name = "parity|strict", default_value_t)]
    profile: Profile,
    /// Demand a layer of the sandbox, or leave it out: LAYER is ids, seccomp, landlock, cgroup or inputs; DEMAND is
    /// required (the default for seccomp), preferred (the default for all others) or off; may be repeated
    #[arg(long, value_name = "LAYER=DEMAND")]
    isolation: Vec<Wish>,
}

impl IsolationArgs {
    /// Puts the demands into the settings. Of two for one layer the last counts.
    pub fn apply(self, settings: &mut Settings) {
        settings.profile = self.profile;
        for Wish { layer, demand } in self.isolation {
            *settings.isolation.of(layer) = demand;
        }
    }
}
