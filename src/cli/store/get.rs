//! `cofferdam store get`.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use clap::Args;

use super::Source;
use super::place::Place;
use super::progress::Telling;
use crate::castore::ingest::Tally;
use crate::castore::tree::Export;
use crate::castore::{Node, Store};
use crate::cli::{Failed, cannot};

/// Arguments of `cofferdam store get`.
#[derive(Debug, Args)]
pub struct GetArgs {
    /// What `store add` printed, or something below it
    #[arg(value_name = "DIGEST[/PATH]", value_parser = Place::parser())]
    place: Place,
    /// Where to
    dest: PathBuf,
    /// Show no progress, and no line on standard error at the end
    #[arg(long, short)]
    quiet: bool,
}

/// Writes something of the store to the disk.
///
/// # Errors
/// Where it is not in the store or can't be written.
pub fn run(args: &GetArgs, source: Source) -> Result<(), Failed> {
    let opened = source.open()?;
    let node = args.place.find(&opened.store)?;
    let (telling, tally, cancel) = (Telling::unless(args.quiet), Tally::default(), AtomicBool::new(false));
    let export = Export { tally: Some(&tally), ..Export::plain(&opened.store, &cancel) };
    telling.watch("writing", &tally, || put_as(&export, &node, &args.dest))?;
    telling.summary(tally.totals(), false);
    Ok(())
}

/// Lays `node` out at `dest`, which must not be there. Once `cancel` is true it removes what it has made and fails.
pub(in crate::cli) fn put(
    store: &Store,
    node: &Node,
    dest: &Path,
    cancel: &AtomicBool,
) -> Result<(), Failed> {
    put_as(&Export::plain(store, cancel), node, dest)
}

fn put_as(export: &Export<'_>, node: &Node, dest: &Path) -> Result<(), Failed> {
    let Some(name) = dest.file_name() else {
        return Err(cannot("write", dest, "the path has no name at its end"));
    };
    let parent = dest.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let dir = File::open(parent).map_err(|error| cannot("open", parent, error))?;
    export.to(node, dir.as_fd(), OsStr::new(name)).map_err(|error| cannot("write", dest, error))
}
