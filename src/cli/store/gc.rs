//! `cofferdam store gc`.

use std::time::{Duration, SystemTime};

use clap::Args;

use super::Source;
use super::progress::Line;
use crate::castore::local::gc::{Goal, Step};
use crate::cli::{Failed, remark};
use crate::size::{Rough, Size};

/// Arguments of `cofferdam store gc`.
#[derive(Debug, Args)]
pub struct GcArgs {
    /// Remove what was used longest ago until the store takes no more than SIZE: 20G
    #[arg(long, value_name = "SIZE")]
    size: Option<Size>,
    /// Remove what was not used for so many days
    #[arg(long, value_name = "DAYS")]
    unused_for: Option<u32>,
}

/// Does what the arguments say.
///
/// # Errors
/// Where the store can't be read or written.
pub fn run(args: &GcArgs, source: Source) -> Result<(), Failed> {
    let own = source.own()?;
    let days = |days: u32| Duration::from_secs(u64::from(days) * 24 * 60 * 60);
    let goal = Goal {
        max_bytes: args.size.map(|Size(bytes)| bytes),
        unused_since: args
            .unused_for
            .map(|unused| SystemTime::now().checked_sub(days(unused)).unwrap_or(SystemTime::UNIX_EPOCH)),
    };
    let mut line = Line::default();
    let collected = own.local.collect(goal, &mut |step| {
        match step {
            Step::Mark => line.tell(format_args!("gc: looking for what is used")),
            Step::Remove(done, total) => line.tell(format_args!("gc: {done} of {total} objects removed")),
            Step::Pack(done, total) => line.tell(format_args!("gc: {done} of {total} packs emptied")),
        }
        true
    })?;
    drop(line);
    remark(format_args!(
        "removed {} blobs and {} directories; freed {}; the store takes {}",
        collected.blobs,
        collected.directories,
        Rough(collected.freed),
        Rough(collected.left)
    ));
    if goal.max_bytes.is_some_and(|max| collected.left > max) {
        remark(format_args!("that is more than asked for: the rest is pinned, or younger than ten minutes"));
    }
    Ok(())
}
