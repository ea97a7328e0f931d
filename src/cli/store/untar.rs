//! `cofferdam store untar`.

use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use clap::Args;

use super::Source;
use super::add::ReportArgs;
use crate::castore::archive::Unpack;
use crate::castore::ingest::Tally;
use crate::cli::{Failed, cannot};

/// Arguments of `cofferdam store untar`.
#[derive(Debug, Args)]
pub struct UntarArgs {
    /// The archive; `-` reads standard input
    #[arg(value_name = "FILE", default_value = "-")]
    archive: PathBuf,
    #[command(flatten)]
    report: ReportArgs,
}

/// Puts what is in an archive into the store and prints its digest.
///
/// # Errors
/// Where the archive has something that can't be stored, or is not clear.
pub fn run(args: &UntarArgs, source: Source) -> Result<(), Failed> {
    let path = args.archive.as_path();
    let archive: Box<dyn Read> = match path.as_os_str() == "-" {
        true => Box::new(io::stdin().lock()),
        false => Box::new(File::open(path).map_err(|error| cannot("open", path, error))?),
    };
    let opened = source.open()?;
    let (telling, tally, cancel) = (args.report.telling(), Tally::default(), AtomicBool::new(false));
    let unpack = Unpack { store: &opened.store, tally: &tally, cancel: &cancel };
    let node = telling.watch("adding", &tally, || unpack.run(archive))?;
    args.report.print(path, &node, tally.totals(), opened.knows_new)?;
    telling.summary(tally.totals(), opened.knows_new);
    Ok(())
}
