//! What the tests of the castore share.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::Path;
use std::sync::atomic::AtomicBool;

use proptest::prelude::*;
use tempfile::TempDir;

use super::ingest::{Ingest, IngestError};
use super::local::LocalStore;
use super::node::{Digest, Directory, Name, Node, Target};
use super::traits::{Store, StoreError, Stored};
use crate::config::Lifetime;
use crate::refscan::Scanner;

/// The empty directory, which is also the empty blob.
pub(super) const EMPTY: &str = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262";
/// `{ .keep: empty file }`.
pub(super) const KEEP: &str = "8b5b5d642b646bb8ed504b0862c39413e87e57491497de7bd075953f7b83810e";
/// `{ bin: KEEP, hello: "hello world\n" executable, link -> bin/.keep }`.
pub(super) const HELLO: &str = "fb8c6e81db869c486d76733de6593944cfe2a311d452e478ec7e5180d77a0617";

pub(super) fn digest(hex: &str) -> Digest {
    hex.parse().unwrap()
}

pub(super) fn name(bytes: &[u8]) -> Name {
    Name::new(bytes).unwrap()
}

/// A store that goes with the directory beside it.
pub(super) fn store() -> (TempDir, Store) {
    let dir = TempDir::new().unwrap();
    let store = LocalStore::open_for(&dir.path().join("store"), Lifetime::Ephemeral).unwrap().store();
    (dir, store)
}

pub(super) fn put_blob(store: &Store, bytes: &[u8]) -> Result<(Digest, u64), StoreError> {
    let mut writer = store.blobs.create()?;
    writer.write_all(bytes).unwrap();
    let Stored { digest, size, .. } = writer.finish()?;
    Ok((digest, size))
}

/// Takes in `path` without scanner and skipped names.
pub(super) fn ingest(store: &Store, path: &Path) -> Result<Node, IngestError> {
    ingest_with(store, path, None, &[])
}

pub(super) fn ingest_with(
    store: &Store,
    path: &Path,
    scanner: Option<&Scanner>,
    skip: &[&[u8]],
) -> Result<Node, IngestError> {
    Ingest { store, scanner, skip, label: ".", allowance: None, tally: None, cancel: &AtomicBool::new(false) }
        .path(path)
}

/// A tree, in memory.
#[derive(Clone, Debug)]
pub(super) enum Sketch {
    Directory(BTreeMap<Vec<u8>, Sketch>),
    File { contents: Vec<u8>, executable: bool },
    Symlink(Vec<u8>),
}

impl Sketch {
    pub(super) fn directory<const N: usize>(entries: [(&str, Sketch); N]) -> Self {
        Self::Directory(entries.map(|(name, entry)| (name.as_bytes().to_vec(), entry)).into())
    }

    pub(super) fn file(contents: &str) -> Self {
        Self::File { contents: contents.into(), executable: false }
    }

    pub(super) fn hello() -> Self {
        Self::directory([
            ("bin", Self::directory([(".keep", Self::file(""))])),
            ("hello", Self::File { contents: b"hello world\n".into(), executable: true }),
            ("link", Self::Symlink(b"bin/.keep".into())),
        ])
    }

    /// Makes it, without any of our own code.
    pub(super) fn write(&self, path: &Path) {
        match self {
            Self::Directory(entries) => {
                fs::create_dir(path).unwrap();
                for (name, entry) in entries {
                    entry.write(&path.join(OsStr::from_bytes(name)));
                }
            }
            Self::File { contents, executable } => {
                let mode = if *executable { 0o700 } else { 0o600 };
                let file = OpenOptions::new().create_new(true).write(true).mode(mode).open(path);
                file.unwrap().write_all(contents).unwrap();
            }
            Self::Symlink(target) => symlink(OsStr::from_bytes(target), path).unwrap(),
        }
    }

    /// What it is in the castore; the directories it consists of are added to `directories`, children first.
    pub(super) fn node(&self, directories: &mut Vec<Directory>) -> Node {
        match self {
            Self::Directory(entries) => {
                let mut directory = Directory::new();
                for (entry, below) in entries {
                    directory.insert(name(entry), below.node(directories)).unwrap();
                }
                let node = directory.node();
                directories.push(directory);
                node
            }
            Self::File { contents, executable } => Node::File {
                digest: Digest::of(contents),
                size: contents.len() as u64,
                executable: *executable,
            },
            Self::Symlink(target) => Node::Symlink { target: Target::new(&target[..]).unwrap() },
        }
    }

    /// Puts it into a store, without reading it from disk.
    pub(super) fn put(&self, store: &Store) -> Node {
        for contents in self.contents() {
            put_blob(store, contents).unwrap();
        }
        let mut directories = Vec::new();
        let node = self.node(&mut directories);
        store.directories.put(directories).unwrap();
        node
    }

    /// The contents of all files.
    pub(super) fn contents(&self) -> Vec<&[u8]> {
        match self {
            Self::Directory(entries) => entries.values().flat_map(Self::contents).collect(),
            Self::File { contents, .. } => vec![contents],
            Self::Symlink(_) => Vec::new(),
        }
    }

    /// The paths of everything below it, ascending component by component.
    pub(super) fn paths(&self) -> Vec<Vec<u8>> {
        let Self::Directory(entries) = self else { return Vec::new() };
        let mut paths = Vec::new();
        for (name, entry) in entries {
            paths.push(name.clone());
            paths.extend(entry.paths().into_iter().map(|below| [name, &b"/"[..], &below].concat()));
        }
        paths
    }
}

/// Any tree.
pub(super) fn sketch() -> impl Strategy<Value = Sketch> {
    let name = prop_oneof![
        4 => "[a-c.]{1,3}".prop_map(String::into_bytes),
        1 => prop::collection::vec(any::<u8>(), 1..40),
    ]
    .prop_filter("not a name", |bytes| Name::new(&bytes[..]).is_ok());
    let contents = prop_oneof![
        4 => prop::collection::vec(any::<u8>(), 0..20),
        1 => (any::<u8>(), 0usize..600_000).prop_map(|(byte, len)| vec![byte; len]),
    ];
    let target = prop::collection::vec(1..=255u8, 1..30);
    let leaf = prop_oneof![
        2 => (contents, any::<bool>())
            .prop_map(|(contents, executable)| Sketch::File { contents, executable }),
        1 => target.prop_map(Sketch::Symlink),
    ];
    leaf.prop_recursive(5, 40, 6, move |inner| {
        prop::collection::btree_map(name.clone(), inner, 0..6).prop_map(Sketch::Directory)
    })
}

/// Runs `check` with `path` open as a directory.
pub(super) fn with_dir<T>(path: &Path, check: impl FnOnce(std::os::fd::BorrowedFd<'_>) -> T) -> T {
    check(File::open(path).unwrap().as_fd())
}
