//! What a digest and a path stand for.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::OsStrExt;

use clap::builder::{OsStringValueParser, TypedValueParser};

use crate::castore::node::printable;
use crate::castore::{Digest, Name, Node, Store};
use crate::cli::Failed;

/// `DIGEST` or `DIGEST/PATH`: something in the store, named by its own digest or by that of a directory above it.
#[derive(Clone, Debug)]
pub struct Place {
    digest: Digest,
    names: Vec<Name>,
}

impl Place {
    /// Reads one from the command line.
    pub fn parser() -> impl TypedValueParser<Value = Self> {
        OsStringValueParser::new().try_map(|text: OsString| Self::parse(&text))
    }

    /// Slashes that are doubled or at the end mean nothing.
    fn parse(text: &OsStr) -> Result<Self, String> {
        let mut parts = text.as_bytes().split(|byte| *byte == b'/');
        let digest = parts.next().unwrap_or_default();
        let digest = printable(digest).parse().map_err(|error| format!("{error}"))?;
        let names = parts.filter(|part| !part.is_empty()).map(Name::new);
        let names = names.collect::<Result<_, _>>().map_err(|error| format!("{error}"))?;
        Ok(Self { digest, names })
    }

    /// The digest that it begins with.
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// Whether it is a digest alone.
    pub fn is_bare(&self) -> bool {
        self.names.is_empty()
    }

    /// What it is called: the last name of its path, else the digest.
    pub fn name(&self) -> Result<Name, Failed> {
        match self.names.last() {
            Some(name) => Ok(name.clone()),
            None => Ok(Name::new(self.digest.to_hex())?),
        }
    }

    /// The node that it stands for. A digest alone is that of a directory if there is one, else that of a file.
    ///
    /// # Errors
    /// Where the store has no such thing.
    pub fn find(&self, store: &Store) -> Result<Node, Failed> {
        let mut node = self.root(store)?;
        for (depth, name) in self.names.iter().enumerate() {
            let above =
                || Self { digest: self.digest, names: self.names.iter().take(depth).cloned().collect() };
            let Node::Directory { digest, .. } = &node else {
                return Err(Failed(format!("{} is no directory, so there is no {self}", above())));
            };
            let directory = store.directories.get(digest)?;
            let directory = directory.ok_or_else(|| {
                Failed(format!("the directory {digest}, needed for {}, is not in the store", above()))
            })?;
            let found = directory.get(name.as_bytes());
            node = found.ok_or_else(|| Failed(format!("there is no {name} in {}", above())))?.clone();
        }
        Ok(node)
    }

    fn root(&self, store: &Store) -> Result<Node, Failed> {
        let digest = self.digest;
        if let Some(directory) = store.directories.get(&digest)? {
            return Ok(directory.node());
        }
        match store.blobs.open(&digest)? {
            Some(blob) => Ok(Node::File { digest, size: blob.size(), executable: false }),
            None => Err(Failed(format!("the store has neither a directory nor a file of digest {digest}"))),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.digest)?;
        self.names.iter().try_for_each(|name| write!(f, "/{name}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places() {
        let digest = "0123456789abcdef".repeat(4);
        let cases: [(&str, Result<&str, &str>); 9] = [
            ("D", Ok("D")),
            ("D/", Ok("D")),
            ("D/a/b", Ok("D/a/b")),
            ("D//a/b//", Ok("D/a/b")),
            ("D/a\n", Ok("D/a\\n")),
            ("D/a/../b", Err("names the directory itself or its parent")),
            ("D/./b", Err("names the directory itself or its parent")),
            ("a/D", Err("64 hexadecimal")),
            ("D0", Err("64 hexadecimal")),
        ];
        for (text, expected) in cases {
            let parsed = Place::parse(OsStr::new(&text.replace('D', &digest)));
            match (parsed, expected) {
                (Ok(place), Ok(shown)) => assert_eq!(place.to_string(), shown.replace('D', &digest)),
                (Err(error), Err(part)) => assert!(error.contains(part), "{text:?}: {error}"),
                (parsed, _) => panic!("{text:?}: {parsed:?}"),
            }
        }
    }
}
