//! Which store a worker works on, on the command line.

use std::time::Duration;

use clap::Args;

use super::{Failed, cannot};
use crate::config::{STORE_DEADLINE_SECONDS, Settings};
use crate::size::Size;
use crate::store_url::StoreUrl;

/// Options of every subcommand that has a worker of its own.
#[derive(Clone, Debug, Args)]
pub struct StoreChoiceArgs {
    /// Work on this store: local:PATH, memory:, grpc+unix:PATH, grpc+http://HOST:PORT or grpc+https://HOST:PORT; in front
    /// of one behind gRPC, the store in the state directory is a cache [default: the store in the state directory]
    #[arg(long, value_name = "URL")]
    store: Option<StoreUrl>,
    /// Give up on a store behind gRPC that keeps a call waiting for longer
    #[arg(long, value_name = "SECONDS", default_value_t = STORE_DEADLINE_SECONDS,
          value_parser = clap::value_parser!(u64).range(1..=MAX_DEADLINE_SECONDS))]
    store_timeout: u64,
    /// Once the store on this machine's disk takes more than SIZE, remove from it what was used longest ago: 20G
    #[arg(long, value_name = "SIZE")]
    store_size: Option<Size>,
}

/// A day: more is as good as no deadline.
const MAX_DEADLINE_SECONDS: u64 = 24 * 60 * 60;

impl StoreChoiceArgs {
    /// The options that make no sense for a build that is done elsewhere.
    pub const NAMES: [&str; 3] = ["store", "store_timeout", "store_size"];

    /// Puts the choice into the settings.
    ///
    /// # Errors
    /// Where the path of a local store can't be told.
    pub fn apply(self, settings: &mut Settings) -> Result<(), Failed> {
        settings.store = match self.store {
            // Also the error that names it should say where it is.
            Some(StoreUrl::Local(path)) => {
                let absolute = std::path::absolute(&path).map_err(|error| cannot("find", &path, error))?;
                Some(StoreUrl::Local(absolute))
            }
            store => store,
        };
        settings.store_size = self.store_size;
        settings.store_deadline = Duration::from_secs(self.store_timeout);
        Ok(())
    }
}
