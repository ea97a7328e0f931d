//! Nodes and directories: checked values, their canonical encoding, and the wire's messages to and fro.
//!
//! Whatever reaches a [`Directory`] has valid names, each once, and digests of the right length; the
//! rest of the program need not look again.

use std::collections::BTreeMap;
use std::fmt;

use cofferdam_proto::castore as wire;
use prost::Message;

#[cfg(test)]
mod tests;

/// The BLAKE3 digest of a blob's bytes or of a directory's canonical encoding.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; Digest::LEN]);

impl Digest {
    /// Length of a digest in bytes.
    pub const LEN: usize = 32;

    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// The digest's bytes.
    pub fn as_bytes(&self) -> &[u8; Self::LEN] {
        &self.0
    }

    /// Lower-case hexadecimal, 64 characters.
    pub fn to_hex(&self) -> String {
        blake3::Hash::from_bytes(self.0).to_hex().to_string()
    }
}

impl From<[u8; Digest::LEN]> for Digest {
    fn from(bytes: [u8; Digest::LEN]) -> Self {
        Self(bytes)
    }
}

impl From<blake3::Hash> for Digest {
    fn from(hash: blake3::Hash) -> Self {
        Self(*hash.as_bytes())
    }
}

impl TryFrom<&[u8]> for Digest {
    type Error = NodeError;

    fn try_from(bytes: &[u8]) -> Result<Self, NodeError> {
        bytes.try_into().map(Self).map_err(|_| NodeError::DigestLength { len: bytes.len() })
    }
}

impl std::str::FromStr for Digest {
    type Err = NodeError;

    fn from_str(text: &str) -> Result<Self, NodeError> {
        blake3::Hash::from_hex(text).map(Self::from).map_err(|_| NodeError::DigestText)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_hex())
    }
}

/// The name of an entry: 1 to 255 bytes, neither `.` nor `..`, without `/` and NUL.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(Vec<u8>);

impl Name {
    /// Longest name in bytes: `NAME_MAX` of Linux.
    pub const MAX: usize = 255;

    /// Checks `bytes`.
    ///
    /// # Errors
    /// [`NodeError::Name`] says what is wrong with them.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Result<Self, NodeError> {
        let bytes = bytes.into();
        let fault = match bytes.as_slice() {
            b"" => Some("is empty"),
            b"." | b".." => Some("names the directory itself or its parent"),
            _ if bytes.len() > Self::MAX => Some("is longer than 255 bytes"),
            _ if bytes.contains(&b'/') => Some("contains a slash"),
            _ if bytes.contains(&0) => Some("contains a NUL byte"),
            _ => None,
        };
        match fault {
            None => Ok(Self(bytes)),
            Some(fault) => Err(NodeError::Name { name: printable(&bytes), fault }),
        }
    }

    /// The name's bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The name as the operating system takes it.
    pub fn as_os_str(&self) -> &std::ffi::OsStr {
        std::os::unix::ffi::OsStrExt::from_bytes(&self.0)
    }
}

impl std::borrow::Borrow<[u8]> for Name {
    fn borrow(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&printable(&self.0))
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

/// What a symbolic link points to: 1 to 4095 bytes without NUL. It need not exist.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Target(Vec<u8>);

impl Target {
    /// Longest target in bytes: `PATH_MAX` of Linux without its NUL.
    pub const MAX: usize = 4095;

    /// Checks `bytes`.
    ///
    /// # Errors
    /// [`NodeError::Target`] says what is wrong with them.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Result<Self, NodeError> {
        let bytes = bytes.into();
        let fault = match bytes.as_slice() {
            b"" => "is empty",
            _ if bytes.len() > Self::MAX => "is longer than 4095 bytes",
            _ if bytes.contains(&0) => "contains a NUL byte",
            _ => return Ok(Self(bytes)),
        };
        Err(NodeError::Target { fault })
    }

    /// The target's bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", printable(&self.0))
    }
}

/// What stands under a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Node {
    /// A directory.
    Directory {
        /// Digest of its canonical encoding.
        digest: Digest,
        /// Its [`Directory::size`].
        size: u64,
    },
    /// A regular file.
    File {
        /// Digest of its contents.
        digest: Digest,
        /// Length of its contents in bytes.
        size: u64,
        /// Whether its owner may execute it.
        executable: bool,
    },
    /// A symbolic link.
    Symlink {
        /// What it points to.
        target: Target,
    },
}

/// A directory: its entries, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Directory {
    entries: BTreeMap<Name, Node>,
    size: u64,
}

impl Directory {
    /// A directory without entries.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an entry.
    ///
    /// # Errors
    /// [`NodeError::DuplicateName`] where the name is taken; the directory is then unchanged.
    /// [`NodeError::TooLarge`] where its size would not fit 64 bits.
    pub fn insert(&mut self, name: Name, node: Node) -> Result<(), NodeError> {
        if self.entries.contains_key(&name) {
            return Err(NodeError::DuplicateName { name });
        }
        let below = if let Node::Directory { size, .. } = node { size } else { 0 };
        let Some(size) = self.size.checked_add(2).and_then(|size| size.checked_add(below)) else {
            return Err(NodeError::TooLarge { name });
        };
        self.size = size;
        self.entries.insert(name, node);
        Ok(())
    }

    /// The entry called `name`.
    pub fn get(&self, name: &[u8]) -> Option<&Node> {
        self.entries.get(name)
    }

    /// The entries, ascending by name.
    pub fn entries(&self) -> impl ExactSizeIterator<Item = (&Name, &Node)> {
        self.entries.iter()
    }

    /// The digests of the child directories with the sizes that this directory claims for them.
    pub fn child_directories(&self) -> impl Iterator<Item = (&Name, Digest, u64)> {
        self.entries.iter().filter_map(|(name, node)| match node {
            Node::Directory { digest, size } => Some((name, *digest, *size)),
            _ => None,
        })
    }

    /// The size that a parent's entry states: twice the number of entries, plus the sizes of the
    /// child directories.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The canonical encoding, which the digest is taken of.
    pub fn encode(&self) -> Vec<u8> {
        wire::Directory::from(self).encode_to_vec()
    }

    /// Length of the canonical encoding in bytes.
    pub fn encoded_len(&self) -> usize {
        wire::Directory::from(self).encoded_len()
    }

    /// The digest of the canonical encoding.
    pub fn digest(&self) -> Digest {
        Digest::of(&self.encode())
    }

    /// This directory as an entry of a parent.
    pub fn node(&self) -> Node {
        Node::Directory { digest: self.digest(), size: self.size() }
    }

    /// Reads a canonical encoding.
    ///
    /// # Errors
    /// Where the bytes are not a valid directory, or not in canonical form.
    pub fn decode(bytes: &[u8]) -> Result<Self, NodeError> {
        let message = wire::Directory::decode(bytes).map_err(|_| NodeError::Encoding)?;
        let directory = Self::try_from(message)?;
        if directory.encode() == bytes { Ok(directory) } else { Err(NodeError::NotCanonical) }
    }
}

impl From<&Directory> for wire::Directory {
    fn from(directory: &Directory) -> Self {
        let mut message = wire::Directory::default();
        for (name, node) in directory.entries() {
            match to_entry(name.as_bytes().to_vec(), node).entry {
                Some(wire::entry::Entry::Directory(entry)) => message.directories.push(entry),
                Some(wire::entry::Entry::File(entry)) => message.files.push(entry),
                Some(wire::entry::Entry::Symlink(entry)) => message.symlinks.push(entry),
                None => {}
            }
        }
        message
    }
}

impl TryFrom<wire::Directory> for Directory {
    type Error = NodeError;

    /// Checks names, digests, targets, the order within each list and that each name stands once.
    fn try_from(message: wire::Directory) -> Result<Self, NodeError> {
        use wire::entry::Entry;
        let directories = message.directories.into_iter().map(Entry::Directory);
        let files = message.files.into_iter().map(Entry::File);
        let symlinks = message.symlinks.into_iter().map(Entry::Symlink);
        let lists: [Box<dyn Iterator<Item = Entry>>; 3] =
            [Box::new(directories), Box::new(files), Box::new(symlinks)];
        let mut directory = Self::new();
        for list in lists {
            let mut last: Option<Name> = None;
            for entry in list {
                let (name, node) = from_entry(wire::Entry { entry: Some(entry) })?;
                let name = Name::new(name)?;
                if last.as_ref().is_some_and(|last| *last > name) {
                    return Err(NodeError::Unsorted { name });
                }
                directory.insert(name.clone(), node)?;
                last = Some(name);
            }
        }
        Ok(directory)
    }
}

/// The message for `node` under `name`; the name of a root is empty.
pub fn to_entry(name: Vec<u8>, node: &Node) -> wire::Entry {
    use wire::entry::Entry;
    let entry = match node {
        Node::Directory { digest, size } => {
            Entry::Directory(wire::DirectoryEntry { name, digest: digest.as_bytes().to_vec(), size: *size })
        }
        Node::File { digest, size, executable } => Entry::File(wire::FileEntry {
            name,
            digest: digest.as_bytes().to_vec(),
            size: *size,
            executable: *executable,
        }),
        Node::Symlink { target } => {
            Entry::Symlink(wire::SymlinkEntry { name, target: target.as_bytes().to_vec() })
        }
    };
    wire::Entry { entry: Some(entry) }
}

/// The unchecked name and the checked node of a message.
///
/// # Errors
/// Where the message is unset, or its digest or target invalid.
pub fn from_entry(message: wire::Entry) -> Result<(Vec<u8>, Node), NodeError> {
    use wire::entry::Entry;
    Ok(match message.entry.ok_or(NodeError::Unset)? {
        Entry::Directory(entry) => {
            (entry.name, Node::Directory { digest: entry.digest.as_slice().try_into()?, size: entry.size })
        }
        Entry::File(entry) => {
            let digest = entry.digest.as_slice().try_into()?;
            (entry.name, Node::File { digest, size: entry.size, executable: entry.executable })
        }
        Entry::Symlink(entry) => (entry.name, Node::Symlink { target: Target::new(entry.target)? }),
    })
}

/// `bytes` for people: what is not printable ASCII is escaped.
pub fn printable(bytes: &[u8]) -> String {
    bytes.escape_ascii().to_string()
}

/// What makes a node or directory invalid.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NodeError {
    /// The digest has the wrong length.
    #[error("a digest has {} bytes, this one {len}", Digest::LEN)]
    DigestLength {
        /// How many bytes there were.
        len: usize,
    },
    /// The text is not a digest.
    #[error("a digest is written as 64 hexadecimal characters")]
    DigestText,
    /// The name is not a file name.
    #[error("the name \"{name}\" {fault}")]
    Name {
        /// The name, escaped.
        name: String,
        /// What is wrong with it.
        fault: &'static str,
    },
    /// The target can't be a symbolic link's.
    #[error("the target {fault}")]
    Target {
        /// What is wrong with it.
        fault: &'static str,
    },
    /// A name stands twice.
    #[error("the name \"{name}\" stands twice")]
    DuplicateName {
        /// The name.
        name: Name,
    },
    /// A list isn't sorted by name.
    #[error("\"{name}\" stands after a greater name; names must ascend")]
    Unsorted {
        /// The name that stands too late.
        name: Name,
    },
    /// The size of the directory doesn't fit 64 bits.
    #[error("with \"{name}\" the size of the directory exceeds 64 bits")]
    TooLarge {
        /// The entry that makes it too large.
        name: Name,
    },
    /// An entry is neither directory, file nor symbolic link.
    #[error("the entry is neither a directory, a file nor a symbolic link")]
    Unset,
    /// The bytes are not a Directory message.
    #[error("this is not an encoded directory")]
    Encoding,
    /// The bytes are a Directory message, but not in canonical form.
    #[error("the encoding of the directory is not canonical")]
    NotCanonical,
}
