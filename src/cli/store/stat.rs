//! `cofferdam store stat`.

use std::io::{self, Write};

use clap::Args;

use super::Source;
use crate::cli::{Failed, render};
use crate::size::Rough;

/// Arguments of `cofferdam store stat`.
#[derive(Debug, Args)]
pub struct StatArgs {
    /// One JSON document, sizes in bytes
    #[arg(long)]
    json: bool,
}

/// Does what the arguments say.
///
/// # Errors
/// Where the store can't be read.
pub fn run(args: &StatArgs, source: Source) -> Result<(), Failed> {
    let own = source.own()?;
    let (usage, pins) = (own.local.usage()?, own.local.pins()?);
    let mut out = io::stdout().lock();
    if args.json {
        let pins: Vec<_> = pins
            .iter()
            .map(|(object, since)| {
                serde_json::json!({
                    "kind": object.kind.to_string(), "digest": object.digest.to_string(), "since": since,
                })
            })
            .collect();
        let report = serde_json::json!({
            "bytes": usage.total(),
            "small_blobs": usage.small_blobs, "small_bytes": usage.small_bytes, "pack_bytes": usage.pack_bytes,
            "large_blobs": usage.large_blobs, "large_bytes": usage.large_bytes,
            "directories": usage.directories, "index_bytes": usage.index_bytes,
            "pins": pins,
        });
        return writeln!(out, "{report}").map_err(render::no_stdout);
    }
    let mut line = |name: &str, number: u64, what: String| {
        writeln!(out, "{name:<12} {number:>10}  {what}").map_err(render::no_stdout)
    };
    line("large blobs", usage.large_blobs, Rough(usage.large_bytes).to_string())?;
    let packed = format!("{}, in packs of {}", Rough(usage.small_bytes), Rough(usage.pack_bytes));
    line("small blobs", usage.small_blobs, packed)?;
    line("directories", usage.directories, format!("index of {}", Rough(usage.index_bytes)))?;
    line("pins", pins.len() as u64, String::new())?;
    writeln!(out, "in all       {:>10}", Rough(usage.total()).to_string()).map_err(render::no_stdout)?;
    pins.iter().try_for_each(|(object, _)| {
        writeln!(out, "pinned: {} {}", object.kind, object.digest).map_err(render::no_stdout)
    })
}
