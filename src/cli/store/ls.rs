//! `cofferdam store ls`.

use std::io::{self, BufWriter, Write};

use clap::Args;

use super::Source;
use super::place::Place;
use crate::castore::node::printable;
use crate::castore::tree::{self, ExportError};
use crate::castore::{Node, Store};
use crate::cli::{Failed, render};

/// So many lines are looked at together for how wide their sizes are.
const TOGETHER: usize = 4096;

/// Arguments of `cofferdam store ls`.
#[derive(Debug, Args)]
pub struct LsArgs {
    /// What `store add` printed, or something below it
    #[arg(value_name = "DIGEST[/PATH]", value_parser = Place::parser())]
    place: Place,
    /// Show the kind of each (dir, file, exec for files that may be executed, link), its size, its digest, and where
    /// links lead. The size of a directory counts what is in it, not bytes
    #[arg(long, short)]
    long: bool,
    /// Show all that lies below as well
    #[arg(long, short = 'R')]
    recursive: bool,
}

/// Lists something of the store.
///
/// # Errors
/// Where it is not there, or a part of it is not.
pub fn run(args: &LsArgs, source: Source) -> Result<(), Failed> {
    let opened = source.open()?;
    let node = args.place.find(&opened.store)?;
    let mut lines =
        Lines { out: BufWriter::new(io::stdout().lock()), long: args.long, waiting: Vec::new(), width: 0 };
    match &node {
        Node::Directory { .. } if args.recursive => {
            for entry in tree::list(&opened.store, &node).skip(1) {
                let (path, node) = entry?;
                lines.add(path, node)?;
            }
        }
        Node::Directory { .. } => {
            for (name, node) in entries(&opened.store, &node)? {
                lines.add(name, node)?;
            }
        }
        _ => lines.add(args.place.name()?.as_bytes().to_vec(), node)?,
    }
    lines.end()
}

/// What is in a directory.
fn entries(store: &Store, node: &Node) -> Result<Vec<(Vec<u8>, Node)>, ExportError> {
    let Node::Directory { digest, .. } = node else { return Ok(Vec::new()) };
    let directory = store.directories.get(digest)?.ok_or_else(|| ExportError::Missing {
        path: ".".to_owned(),
        kind: tree::ObjectKind::Directory,
        digest: *digest,
    })?;
    Ok(directory.entries().map(|(name, node)| (name.as_bytes().to_vec(), node.clone())).collect())
}

/// Lines on their way out.
struct Lines<W> {
    out: W,
    long: bool,
    waiting: Vec<(Vec<u8>, Node)>,
    /// The widest size so far.
    width: usize,
}

impl<W: Write> Lines<W> {
    fn add(&mut self, path: Vec<u8>, node: Node) -> Result<(), Failed> {
        self.waiting.push((path, node));
        if self.waiting.len() >= TOGETHER { self.write() } else { Ok(()) }
    }

    fn end(mut self) -> Result<(), Failed> {
        self.write()?;
        self.out.flush().map_err(render::no_stdout)
    }

    fn write(&mut self) -> Result<(), Failed> {
        let sizes = self.waiting.iter().map(|(_, node)| size(node).to_string().len());
        self.width = sizes.max().unwrap_or(0).max(self.width);
        for (path, node) in self.waiting.drain(..) {
            let path = printable(&path);
            let written = match self.long {
                true => writeln!(self.out, "{}", long(&path, &node, self.width)),
                false => writeln!(self.out, "{path}"),
            };
            written.map_err(render::no_stdout)?;
        }
        Ok(())
    }
}

fn size(node: &Node) -> u64 {
    match node {
        Node::Directory { size, .. } | Node::File { size, .. } => *size,
        Node::Symlink { target } => target.as_bytes().len() as u64,
    }
}

fn long(path: &str, node: &Node, width: usize) -> String {
    let size = size(node);
    let line = |kind, digest: &str| format!("{kind:4} {size:width$} {digest:64} {path}");
    match node {
        Node::Directory { digest, .. } => line("dir", &digest.to_hex()),
        Node::File { digest, executable: false, .. } => line("file", &digest.to_hex()),
        Node::File { digest, executable: true, .. } => line("exec", &digest.to_hex()),
        Node::Symlink { target } => {
            format!("{} -> {}", line("link", "-"), printable(target.as_bytes()))
        }
    }
}
