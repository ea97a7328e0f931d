//! Entries that are looked at, and files that are read.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::sync::atomic::Ordering;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat};
use nix::libc;
use nix::sys::stat::{FileStat, Mode, fstat, fstatat};
use rustix::fs::FileType;

use super::Ingest;
use super::error::{FileKind, IngestError, TreeFault};
use crate::castore::node::{Node, Target};
use crate::castore::traits::{StoreError, Stored};
use crate::refscan::Scanner;

/// Contents are read in pieces of this size.
pub(super) const BUFFER_BYTES: usize = 256 * 1024;

/// Reads entries, one after the other, with one buffer.
pub(super) struct Reader<'a> {
    ingest: &'a Ingest<'a>,
    buffer: Vec<u8>,
    bytes: u64,
}

/// What an entry turned out to be.
#[derive(Debug)]
pub(super) enum Found {
    /// A directory, open.
    Directory(OwnedFd),
    /// A regular file, open.
    File(Regular),
    /// A symbolic link.
    Symlink(Node),
}

/// A regular file.
#[derive(Debug)]
pub(super) struct Regular {
    file: File,
    /// Its length when it was looked at.
    size: u64,
    executable: bool,
}

impl<'a> Reader<'a> {
    /// One for the trees of `ingest`.
    pub(super) fn new(ingest: &'a Ingest<'a>) -> Self {
        Self { ingest, buffer: Vec::new(), bytes: 0 }
    }

    /// Looks at the entry `name` of `dir`. `hint` is what the directory said that the
    /// entry is, which may save a look; `path` is
    /// what it is called in messages.
    pub(super) fn entry(
        &self,
        dir: impl AsFd,
        name: &OsStr,
        hint: FileType,
        path: &dyn Fn() -> String,
    ) -> Result<Found, IngestError> {
        self.check_cancelled()?;
        match hint {
            FileType::RegularFile | FileType::Directory => return open(dir, name, path),
            FileType::Symlink => return self.symlink(dir, name, path),
            _ => {}
        }
        // Opening a device may set it in motion, so what is unknown is looked at first.
        let stat = fstatat(&dir, name, AtFlags::AT_SYMLINK_NOFOLLOW)
            .map_err(|errno| failed("look at", path, errno))?;
        match stat.st_mode & libc::S_IFMT {
            libc::S_IFREG | libc::S_IFDIR => open(dir, name, path),
            libc::S_IFLNK => self.symlink(dir, name, path),
            _ => Err(unsupported(&stat, path)),
        }
    }

    /// Takes in the contents of a file.
    pub(super) fn file(&mut self, regular: Regular, path: &dyn Fn() -> String) -> Result<Node, IngestError> {
        let Regular { mut file, size, executable } = regular;
        // Here, so that a walk that reads nothing itself has none.
        self.buffer.resize(BUFFER_BYTES, 0);
        let mut writer = self.ingest.store.blobs.create()?;
        let mut stream = self.ingest.scanner.map(Scanner::stream);
        let mut taken = 0;
        loop {
            self.check_cancelled()?;
            let chunk = match file.read(&mut self.buffer) {
                Ok(0) => break,
                Ok(count) => self.buffer.get(..count).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => return Err(IngestError::Io { act: "read", path: path(), source }),
            };
            let count = chunk.len() as u64;
            self.charge(count, path)?;
            if let Some(stream) = &mut stream {
                stream.feed(chunk);
            }
            writer.write_all(chunk).map_err(|error| StoreError::io("write", "a new blob", error))?;
            taken += count;
            // A read that gave less than there was room for, and came to where the file is said to end, has seen
            // the end.
            if chunk.len() < BUFFER_BYTES && taken == size {
                break;
            }
        }
        self.bytes = self.bytes.saturating_add(taken);
        let stored = writer.finish()?;
        if let Some(tally) = self.ingest.tally {
            tally.stored(&stored);
        }
        let Stored { digest, size, .. } = stored;
        Ok(Node::File { digest, size, executable })
    }

    /// Takes `bytes` from the allowance.
    fn charge(&self, bytes: u64, path: &dyn Fn() -> String) -> Result<(), IngestError> {
        if let Some(tally) = self.ingest.tally {
            tally.read(bytes);
        }
        let Some(allowance) = self.ingest.allowance else { return Ok(()) };
        let charge = |left: u64| left.checked_sub(bytes);
        match allowance.fetch_update(Ordering::Relaxed, Ordering::Relaxed, charge) {
            Ok(_) => Ok(()),
            Err(_) => Err(IngestError::TooMuch { path: path() }),
        }
    }

    fn symlink(&self, dir: impl AsFd, name: &OsStr, path: &dyn Fn() -> String) -> Result<Found, IngestError> {
        let target = readlinkat(dir, name).map_err(|errno| failed("read", path, errno))?.into_vec();
        self.scan(&target);
        let target = Target::new(target).map_err(|source| TreeFault::Target { path: path(), source })?;
        Ok(Found::Symlink(Node::Symlink { target }))
    }

    /// How many bytes of contents it has read.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Has the scanner look at a name or a target.
    pub(super) fn scan(&self, whole: &[u8]) {
        if let Some(scanner) = self.ingest.scanner {
            scanner.scan(whole);
        }
    }

    /// Fails once the work is to end.
    pub(super) fn check_cancelled(&self) -> Result<(), IngestError> {
        if self.ingest.cancel.load(Ordering::Relaxed) { Err(IngestError::Cancelled) } else { Ok(()) }
    }
}

fn open(dir: impl AsFd, name: &OsStr, path: &dyn Fn() -> String) -> Result<Found, IngestError> {
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC | OFlag::O_NOCTTY;
    let fd = openat(dir, name, flags, Mode::empty()).map_err(|errno| failed("open", path, errno))?;
    let stat = fstat(&fd).map_err(|errno| failed("look at", path, errno))?;
    match stat.st_mode & libc::S_IFMT {
        libc::S_IFREG => Ok(Found::File(Regular {
            file: fd.into(),
            size: u64::try_from(stat.st_size).unwrap_or(0),
            executable: stat.st_mode & libc::S_IXUSR != 0,
        })),
        libc::S_IFDIR => Ok(Found::Directory(fd)),
        _ => Err(unsupported(&stat, path)),
    }
}

fn unsupported(stat: &FileStat, path: &dyn Fn() -> String) -> IngestError {
    TreeFault::Unsupported { path: path(), kind: FileKind::of(stat) }.into()
}

/// What a refusal of the operating system means.
pub(super) fn failed(act: &'static str, path: &dyn Fn() -> String, errno: Errno) -> IngestError {
    match errno {
        Errno::ENOENT => TreeFault::NotFound { path: path() }.into(),
        errno => IngestError::Io { act, path: path(), source: errno.into() },
    }
}
