//! `cofferdam store pin` and `unpin`.

use clap::Args;

use super::Source;
use super::place::Place;
use crate::castore::Digest;
use crate::castore::local::Object;
use crate::castore::tree::ObjectKind;
use crate::cli::{Failed, remark};

/// Arguments of `cofferdam store pin` and `unpin`.
#[derive(Debug, Args)]
pub struct PinArgs {
    /// What `store add` printed, or something below it
    #[arg(value_name = "DIGEST[/PATH]", value_parser = Place::parser())]
    place: Place,
}

/// Pins what the arguments name.
///
/// # Errors
/// Where it is not in the store, or the store can't be written to.
pub fn pin(args: &PinArgs, source: Source) -> Result<(), Failed> {
    let own = source.own()?;
    let node = args.place.find(&own.local.store())?;
    let object = Object::of(&node).ok_or_else(|| Failed(format!("{} is a symbolic link", args.place)))?;
    if !own.local.pin(object)? {
        remark(format_args!("{} is pinned already", object.digest));
    }
    Ok(())
}

/// Unpins what the arguments name. It need not be there any more.
///
/// # Errors
/// Where it is not pinned, or the store can't be written to.
pub fn unpin(args: &PinArgs, source: Source) -> Result<(), Failed> {
    let own = source.own()?;
    let digest: Digest = match args.place.is_bare() {
        true => *args.place.digest(),
        false => {
            let node = args.place.find(&own.local.store())?;
            Object::of(&node).ok_or_else(|| Failed(format!("{} is a symbolic link", args.place)))?.digest
        }
    };
    let mut pinned = false;
    for kind in [ObjectKind::Directory, ObjectKind::Blob] {
        pinned |= own.local.unpin(Object { kind, digest })?;
    }
    if pinned { Ok(()) } else { Err(Failed(format!("{digest} is not pinned"))) }
}
