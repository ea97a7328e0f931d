//! The tree that the entries of an archive make up.

use std::collections::BTreeMap;

use crate::castore::ingest::{FileKind, MAX_DEPTH};
use crate::castore::node::{Directory, Name, Node, NodeError, printable};

/// A tree in the making.
pub(super) struct Tree {
    /// The root first; each stands after the one that it lies in.
    directories: Vec<BTreeMap<Name, Place>>,
}

enum Place {
    Directory(usize),
    Leaf(Node),
}

/// What an archive says that is at a path.
pub(super) enum Entry {
    Directory,
    Leaf(Node),
}

/// What is wrong with an entry of an archive.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EntryFault {
    /// Its path begins at the root of the file system.
    #[error("has an absolute path")]
    Absolute,
    /// Its path leads upwards.
    #[error("has \"..\" in its path")]
    Upwards,
    /// Its path can't be.
    #[error("has an impossible path: {0}")]
    Name(NodeError),
    /// It has no path.
    #[error("has no path of its own, and is no directory")]
    Root,
    /// It lies too deep.
    #[error("lies too deep: at most {MAX_DEPTH} directories may lie in one another")]
    TooDeep,
    /// Something else has its name.
    #[error("stands twice in the archive")]
    Twice,
    /// It lies in something that is no directory.
    #[error("lies in {above}, which is no directory")]
    Below {
        /// What it lies in, escaped.
        above: String,
    },
    /// It is a hard link to nothing that it could be.
    #[error("is a hard link to \"{target}\", which is no file before it in the archive")]
    HardLink {
        /// What it names, escaped.
        target: String,
    },
    /// It is a symbolic link that can't be.
    #[error("is a symbolic link: {0}")]
    Target(NodeError),
    /// It is nothing that can be stored.
    #[error("is {0}; only files, directories and links can be stored")]
    Kind(FileKind),
    /// It is something that another program understands.
    #[error("has the type '{kind}', which is not known here")]
    UnknownType {
        /// The type's byte, escaped.
        kind: String,
    },
    /// It is a sparse file in a form that is not understood.
    #[error("is a sparse file in a form that is not known here; archive it without --sparse")]
    Sparse,
    /// The archive has fewer bytes of it than it says.
    #[error("is said to have {stated} bytes, but there are {actual}")]
    Size {
        /// What the archive says.
        stated: u64,
        /// What it has.
        actual: u64,
    },
    /// What describes it can be read in two ways.
    #[error("has an extended header that is not clear: {what}")]
    Extension {
        /// What is wrong with that.
        what: &'static str,
    },
    /// The directory that it stands in can't take it.
    #[error("can't stand in its directory: {0}")]
    Directory(NodeError),
}

/// The names that a path consists of. Empty ones and `.` mean nothing.
pub(super) fn names(path: &[u8]) -> Result<Vec<Name>, EntryFault> {
    if path.first() == Some(&b'/') {
        return Err(EntryFault::Absolute);
    }
    let mut names = Vec::new();
    for part in path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".") {
        if part == b".." {
            return Err(EntryFault::Upwards);
        }
        if names.len() == MAX_DEPTH {
            return Err(EntryFault::TooDeep);
        }
        names.push(Name::new(part).map_err(EntryFault::Name)?);
    }
    Ok(names)
}

impl Tree {
    /// An empty directory.
    pub(super) fn new() -> Self {
        Self { directories: vec![BTreeMap::new()] }
    }

    /// Adds an entry, and the directories on the way to it. A directory may be told of more than once.
    pub(super) fn add(&mut self, names: &[Name], entry: Entry) -> Result<(), EntryFault> {
        let (above, last) = match (names.split_last(), entry) {
            (None, Entry::Directory) => return Ok(()),
            (None, Entry::Leaf(_)) => return Err(EntryFault::Root),
            (Some((_, above)), Entry::Directory) if above.len() + 1 == MAX_DEPTH => {
                return Err(EntryFault::TooDeep);
            }
            (Some(_), Entry::Directory) => (names, None),
            (Some((last, above)), Entry::Leaf(node)) => (above, Some((last, node))),
        };
        let mut at = 0;
        for (depth, name) in above.iter().enumerate() {
            at = self.descend(at, name).ok_or_else(|| {
                match (depth + 1 == names.len(), names.get(..=depth)) {
                    // It is a directory itself, and something else has its name.
                    (true, _) => EntryFault::Twice,
                    (false, path) => EntryFault::Below { above: shown(path.unwrap_or(names)) },
                }
            })?;
        }
        match (last, self.directories.get_mut(at)) {
            (Some((name, _)), Some(directory)) if directory.contains_key(name) => Err(EntryFault::Twice),
            (Some((name, node)), Some(directory)) => {
                directory.insert(name.clone(), Place::Leaf(node));
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// The directory `name` of the directory `at`, which is made if there is nothing; `None` where there is something
    /// else.
    fn descend(&mut self, at: usize, name: &Name) -> Option<usize> {
        let new = self.directories.len();
        let directory = self.directories.get_mut(at)?;
        match directory.get(name) {
            Some(Place::Directory(index)) => return Some(*index),
            Some(Place::Leaf(_)) => return None,
            None => directory.insert(name.clone(), Place::Directory(new)),
        };
        self.directories.push(BTreeMap::new());
        Some(new)
    }

    /// What stands at a path, if that is no directory.
    pub(super) fn leaf(&self, names: &[Name]) -> Option<&Node> {
        let (last, above) = names.split_last()?;
        let mut directory = self.directories.first()?;
        for name in above {
            match directory.get(name)? {
                Place::Directory(index) => directory = self.directories.get(*index)?,
                Place::Leaf(_) => return None,
            }
        }
        match directory.get(last)? {
            Place::Leaf(node) => Some(node),
            Place::Directory(_) => None,
        }
    }

    /// The root, and all directories, children before parents.
    pub(super) fn finish(self) -> Result<(Node, Vec<Directory>), EntryFault> {
        let mut nodes: BTreeMap<usize, Node> = BTreeMap::new();
        let mut directories = Vec::with_capacity(self.directories.len());
        for (index, entries) in self.directories.into_iter().enumerate().rev() {
            let mut directory = Directory::new();
            for (name, place) in entries {
                let node = match place {
                    Place::Leaf(node) => Some(node),
                    Place::Directory(below) => nodes.remove(&below),
                };
                // All that lie in it stand after it, and have been completed.
                if let Some(node) = node {
                    directory.insert(name, node).map_err(EntryFault::Directory)?;
                }
            }
            nodes.insert(index, directory.node());
            directories.push(directory);
        }
        let root = nodes.remove(&0).unwrap_or_else(|| Directory::new().node());
        Ok((root, directories))
    }
}

fn shown(names: &[Name]) -> String {
    let names: Vec<String> = names.iter().map(|name| printable(name.as_bytes())).collect();
    format!("\"{}\"", names.join("/"))
}
