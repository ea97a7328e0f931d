//! `cofferdam store tar`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use clap::Args;

use super::place::Place;
use super::{Opened, Source};
use crate::castore::archive;
use crate::cli::{Failed, cannot};

/// What is gathered before it is written, in bytes: headers are small.
const BUFFER_BYTES: usize = 64 * 1024;

/// Arguments of `cofferdam store tar`.
#[derive(Debug, Args)]
pub struct TarArgs {
    /// What `store add` printed, or something below it
    #[arg(value_name = "DIGEST[/PATH]", value_parser = Place::parser())]
    place: Place,
    /// Write it to FILE rather than to standard output
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Writes something of the store as an archive.
///
/// # Errors
/// Where a part of it is missing or damaged, or the archive can't be written.
pub fn run(args: &TarArgs, source: Source) -> Result<(), Failed> {
    let Some(path) = &args.output else {
        if io::stdout().is_terminal() {
            return Err(Failed("an archive is nothing for a terminal; choose a file with --output".into()));
        }
        return write(args, &source.open()?, &mut io::stdout().lock());
    };
    let opened = source.open()?;
    // Before anything is touched.
    args.place.find(&opened.store)?;
    let (mut file, new) = create(path)?;
    let written = write(args, &opened, &mut file);
    if written.is_err() && new {
        // The first failure is the one to tell of.
        let _ = fs::remove_file(path);
    }
    written
}

fn write(args: &TarArgs, opened: &Opened, out: &mut dyn Write) -> Result<(), Failed> {
    let node = args.place.find(&opened.store)?;
    let mut out = BufWriter::with_capacity(BUFFER_BYTES, out);
    let cancel = AtomicBool::new(false);
    Ok(archive::write(&opened.store, &node, &args.place.name()?, &mut out, &cancel)?)
}

/// Opens a file to be written anew; whether it was not there before.
fn create(path: &Path) -> Result<(File, bool), Failed> {
    let failed = |error| cannot("write", path, error);
    match OpenOptions::new().write(true).create_new(true).open(path) {
        Ok(file) => Ok((file, true)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            File::create(path).map(|file| (file, false)).map_err(failed)
        }
        Err(error) => Err(failed(error)),
    }
}
