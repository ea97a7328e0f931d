//! `cofferdam store cat`.

use std::io::{self, Write};

use clap::Args;

use super::Source;
use super::place::Place;
use crate::castore::{Digest, Node, Store};
use crate::cli::{Failed, render};

/// Contents are copied in pieces of this size.
const BUFFER_BYTES: usize = 256 * 1024;

/// Arguments of `cofferdam store cat`.
#[derive(Debug, Args)]
pub struct CatArgs {
    /// What `store add` printed, or something below it
    #[arg(value_name = "DIGEST[/PATH]", value_parser = Place::parser())]
    place: Place,
}

/// Writes the contents of a file to standard output.
///
/// # Errors
/// Where it is no file, or damaged: then nothing was written.
pub fn run(args: &CatArgs, source: Source) -> Result<(), Failed> {
    let opened = source.open()?;
    let digest = contents(&opened.store, &args.place)?;
    let missing = || Failed(format!("the contents of {}, blob {digest}, are not in the store", args.place));
    let blob = opened.store.blobs.open(&digest)?.ok_or_else(missing)?;
    // What is written can't be taken back.
    blob.verify()?;
    let mut out = io::stdout().lock();
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut offset = 0;
    loop {
        let read = blob.read_at(&mut buffer, offset);
        let count = read.map_err(|error| Failed(format!("can't read {}: {error}", args.place)))?;
        let Some(chunk) = buffer.get(..count).filter(|chunk| !chunk.is_empty()) else { break };
        out.write_all(chunk).map_err(render::no_stdout)?;
        offset += chunk.len() as u64;
    }
    out.flush().map_err(render::no_stdout)
}

/// The blob that is meant. A digest alone may be that of a directory as well; then it is not meant.
fn contents(store: &Store, place: &Place) -> Result<Digest, Failed> {
    if place.is_bare() && store.blobs.stat(place.digest())?.is_some() {
        return Ok(*place.digest());
    }
    match place.find(store)? {
        Node::File { digest, .. } => Ok(digest),
        Node::Directory { .. } => Err(Failed(format!("{place} is a directory"))),
        Node::Symlink { .. } => Err(Failed(format!("{place} is a symbolic link, which is not followed"))),
    }
}
