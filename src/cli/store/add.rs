//! `cofferdam store add`.

use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use clap::Args;

use super::Source;
use super::progress::Telling;
use crate::castore::ingest::{Ingest, Tally, Totals};
use crate::castore::node::printable;
use crate::castore::{Digest, Node, Store};
use crate::cli::{Failed, cannot, render};

/// Arguments of `cofferdam store add`.
#[derive(Debug, Args)]
pub struct AddArgs {
    /// The files or directories; a symbolic link that is named here is followed
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,
    #[command(flatten)]
    report: ReportArgs,
}

/// How what was put into the store is told of.
#[derive(Debug, Args)]
pub struct ReportArgs {
    /// Print the digests alone: no progress, and no line on standard error at the end
    #[arg(long, short)]
    quiet: bool,
    /// Print a line of JSON in place of each digest: path, kind, digest, files, bytes, and of these new_files, new_bytes
    #[arg(long)]
    json: bool,
}

impl ReportArgs {
    /// What people are told.
    pub fn telling(&self) -> Telling {
        Telling::unless(self.quiet || self.json)
    }

    /// Tells programs of something that is in the store now.
    ///
    /// # Errors
    /// Where standard output can't be written to.
    pub fn print(&self, path: &Path, node: &Node, totals: Totals, knows_new: bool) -> Result<(), Failed> {
        let (kind, digest) = kind_and_digest(path, node)?;
        let line = if self.json {
            let (new_files, new_bytes) =
                if knows_new { (Some(totals.new_files), Some(totals.new_bytes)) } else { (None, None) };
            let value = serde_json::json!({
                "path": printable(path.as_os_str().as_bytes()),
                "kind": kind,
                "digest": digest.to_hex(),
                "files": totals.files,
                "bytes": totals.bytes,
                "new_files": new_files,
                "new_bytes": new_bytes,
            });
            value.to_string()
        } else {
            digest.to_hex()
        };
        writeln!(io::stdout(), "{line}").map_err(render::no_stdout)
    }
}

fn kind_and_digest<'n>(path: &Path, node: &'n Node) -> Result<(&'static str, &'n Digest), Failed> {
    match node {
        Node::Directory { digest, .. } => Ok(("directory", digest)),
        Node::File { digest, .. } => Ok(("file", digest)),
        // `add` follows links, so this is one that was made just now.
        Node::Symlink { .. } => Err(cannot("add", path, "it is a symbolic link")),
    }
}

/// Puts files and directories into the store and prints their digests.
///
/// # Errors
/// With the first one that can't be.
pub fn run(args: &AddArgs, source: Source) -> Result<(), Failed> {
    let opened = source.open()?;
    let telling = args.report.telling();
    let mut all = Totals::default();
    for path in &args.paths {
        let tally = Tally::default();
        let node = telling.watch("adding", &tally, || add_counting(&opened.store, path, &[], &tally))?;
        let totals = tally.totals();
        args.report.print(path, &node, totals, opened.knows_new)?;
        all = all.and(totals);
    }
    telling.summary(all, opened.knows_new);
    Ok(())
}

/// Takes what lies at `path` into the store. A link at `path` itself is followed; `skip` names what is left out at
/// the top of a directory.
pub(in crate::cli) fn add(store: &Store, path: &Path, skip: &[&[u8]]) -> Result<Node, Failed> {
    add_counting(store, path, skip, &Tally::default())
}

fn add_counting(store: &Store, path: &Path, skip: &[&[u8]], tally: &Tally) -> Result<Node, Failed> {
    let found = path.canonicalize().map_err(|error| cannot("add", path, error))?;
    let cancel = AtomicBool::new(false);
    let label = printable(path.as_os_str().as_bytes());
    let ingest = Ingest {
        store,
        scanner: None,
        skip,
        label: &label,
        allowance: None,
        tally: Some(tally),
        cancel: &cancel,
    };
    Ok(ingest.path(&found)?)
}
