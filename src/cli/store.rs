//! `cofferdam store`: files and directories into the store, and out again.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use clap::{Args, Subcommand};

use super::{Failed, StateArgs, cannot, render, runtime, start_failed_here};
use crate::address::Address;
use crate::castore::ingest::Ingest;
use crate::castore::look::Look;
use crate::castore::node::printable;
use crate::castore::remote::RemoteStore;
use crate::castore::{Digest, LocalStore, Node, Store, tree};
use crate::config::Lifetime;
use crate::worker::StateDir;

/// Arguments of `cofferdam store`.
#[derive(Debug, Args)]
pub struct StoreArgs {
    #[command(subcommand)]
    command: StoreCommand,
    /// Use the store of a daemon: unix:PATH, HOST:PORT, grpc+unix:PATH or grpc+http://HOST:PORT
    #[arg(long, value_name = "ADDR", global = true, conflicts_with = "state_dir")]
    to: Option<Address>,
    #[command(flatten)]
    state: StateArgs,
}

#[derive(Debug, Subcommand)]
enum StoreCommand {
    /// Put a file or a directory into the store and print its digest.
    Add {
        /// The file or directory
        path: PathBuf,
    },
    /// Write a file or a directory of the store to DEST, which must not be there yet.
    ///
    /// A digest stands for contents alone. A file comes back without the permission to execute it: that is part of the
    /// directory it was in. No contents at all have one digest, of the empty file and of the empty directory: it comes
    /// back as a directory if the store has an empty one, else as a file.
    Get {
        /// What `store add` printed
        digest: String,
        /// Where to
        dest: PathBuf,
    },
    /// List a directory of the store with all beneath it.
    Ls {
        /// What `store add` printed
        digest: String,
    },
}

/// Does what the arguments say.
///
/// # Errors
/// Where the store, or the file system, refuses.
pub fn run(args: StoreArgs) -> Result<(), Failed> {
    super::start_logging("warn")?;
    // Nothing is opened for what can't be meant.
    let command = Checked::try_from(args.command)?;
    match args.to {
        Some(address) => {
            // The store's calls block on this runtime, so they are made from outside of it.
            let runtime = runtime()?;
            let channel = runtime.block_on(address.connect())?;
            let store = RemoteStore::new(channel, &address, runtime.handle().clone(), &std::env::temp_dir());
            command.run(&store.store())
        }
        None => {
            let state =
                StateDir::take(&args.state.resolve()?, Lifetime::Lasting).map_err(start_failed_here)?;
            command.run(&LocalStore::open(&state.store())?.store())
        }
    }
}

/// A subcommand with its digest read.
enum Checked {
    Add(PathBuf),
    Get(Digest, PathBuf),
    Ls(Digest),
}

impl TryFrom<StoreCommand> for Checked {
    type Error = Failed;

    fn try_from(command: StoreCommand) -> Result<Self, Failed> {
        let read = |text: &str| text.parse().map_err(|error| Failed(format!("\"{text}\": {error}")));
        Ok(match command {
            StoreCommand::Add { path } => Self::Add(path),
            StoreCommand::Get { digest, dest } => Self::Get(read(&digest)?, dest),
            StoreCommand::Ls { digest } => Self::Ls(read(&digest)?),
        })
    }
}

impl Checked {
    fn run(self, store: &Store) -> Result<(), Failed> {
        match self {
            Self::Add(path) => {
                let node = add(store, &path, &[])?;
                match node {
                    Node::Directory { digest, .. } | Node::File { digest, .. } => {
                        writeln!(io::stdout(), "{digest}").map_err(render::no_stdout)
                    }
                    // `add` follows links, so this is one that was made just now.
                    Node::Symlink { .. } => Err(cannot("add", &path, "it is a symbolic link")),
                }
            }
            Self::Get(digest, dest) => {
                let node = find(store, &digest)?;
                put(store, &node, &dest, &AtomicBool::new(false))
            }
            Self::Ls(digest) => {
                let mut out = io::stdout().lock();
                for entry in tree::list(store, &find(store, &digest)?) {
                    let (path, node) = entry?;
                    let path = if path.is_empty() { ".".into() } else { printable(&path) };
                    writeln!(out, "{path}: {}", render::describe(&node)).map_err(render::no_stdout)?;
                }
                Ok(())
            }
        }
    }
}

/// Takes what lies at `path` into the store. A link at `path` itself is followed; `skip` names what is left out at
/// the top of a directory.
pub(super) fn add(store: &Store, path: &Path, skip: &[&[u8]]) -> Result<Node, Failed> {
    let found = path.canonicalize().map_err(|error| cannot("add", path, error))?;
    let cancel = AtomicBool::new(false);
    let label = printable(path.as_os_str().as_bytes());
    let ingest =
        Ingest { store, scanner: None, skip, label: &label, allowance: None, tally: None, cancel: &cancel };
    Ok(ingest.path(&found)?)
}

/// Lays `node` out at `dest`, which must not be there. Once `cancel` is true it removes what it has made and fails.
pub(super) fn put(store: &Store, node: &Node, dest: &Path, cancel: &AtomicBool) -> Result<(), Failed> {
    let Some(name) = dest.file_name() else {
        return Err(cannot("write", dest, "the path has no name at its end"));
    };
    let parent = dest.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let dir = File::open(parent).map_err(|error| cannot("open", parent, error))?;
    tree::export_unless(store, node, dir.as_fd(), OsStr::new(name), Look::Plain, cancel)
        .map_err(|error| cannot("write", dest, error))
}

/// The node that a digest alone stands for: a directory if there is one, else a file.
fn find(store: &Store, digest: &Digest) -> Result<Node, Failed> {
    if let Some(directory) = store.directories.get(digest)? {
        return Ok(directory.node());
    }
    match store.blobs.open(digest)? {
        Some(blob) => Ok(Node::File { digest: *digest, size: blob.size(), executable: false }),
        None => Err(Failed(format!("the store has neither a directory nor a file of digest {digest}"))),
    }
}
