//! From a tree in the store to an archive.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use tar::{EntryType, Header};

use crate::castore::look;
use crate::castore::node::{Digest, Name, Node, printable};
use crate::castore::traits::Store;
use crate::castore::tree::{ExportError, ObjectKind, list};

/// Archives consist of blocks of this size.
const BLOCK_BYTES: usize = 512;

/// Contents are copied in pieces of this size.
const BUFFER_BYTES: usize = 256 * 1024;

/// How GNU's tar calls the entry that has the name of the next one.
const LONG: &[u8] = b"././@LongLink";

/// Writes what lies below the directory `node` as an archive to `out`, or a `node` of another kind as its only entry,
/// under `name`.
///
/// Entries are sorted by name, component by component, and directories stand before what is in them. All belong to 0:0
/// and were changed one second after the epoch; modes are 0444, or 0555 for what may be executed and for directories.
/// Long names have GNU's form, and the root has no entry: unpacking it leaves the directory that it is unpacked in as
/// it is.
///
/// Contents are checked against their digest before any of them is written. After a failure `out` is no archive, for
/// it has no end.
///
/// # Errors
/// Those of [`list`]; [`ExportError::Missing`], [`ExportError::Size`] and [`ExportError::Store`] where the store has not
/// what the tree says; [`ExportError::Io`] where it can't be read or written, [`ExportError::Cancelled`] once `cancel`
/// is true.
pub fn write(
    store: &Store,
    node: &Node,
    name: &Name,
    out: &mut dyn Write,
    cancel: &AtomicBool,
) -> Result<(), ExportError> {
    let mut archive = Archive { store, out, cancel, buffer: vec![0; BUFFER_BYTES] };
    for entry in list(store, node) {
        let (mut path, node) = entry?;
        if path.is_empty() {
            match node {
                Node::Directory { .. } => continue,
                _ => path = name.as_bytes().to_vec(),
            }
        }
        archive.entry(path, &node)?;
    }
    archive.end()
}

struct Archive<'a> {
    store: &'a Store,
    out: &'a mut dyn Write,
    cancel: &'a AtomicBool,
    buffer: Vec<u8>,
}

impl Archive<'_> {
    fn entry(&mut self, mut path: Vec<u8>, node: &Node) -> Result<(), ExportError> {
        self.check_cancelled()?;
        match node {
            Node::Directory { .. } => {
                path.push(b'/');
                self.header(&path, EntryType::Directory, look::INPUT_DIRECTORY_MODE, 0)
            }
            Node::Symlink { target } => {
                let mut header = header(EntryType::Symlink, 0o777, 0);
                if let Err(long) = fill(&mut header.as_old_mut().linkname, target.as_bytes()) {
                    self.long(EntryType::GNULongLink, long)?;
                }
                self.named(header, &path)
            }
            Node::File { digest, size, executable } => {
                self.header(&path, EntryType::Regular, look::input_file_mode(*executable), *size)?;
                self.contents(&path, digest, *size)
            }
        }
    }

    fn header(&mut self, path: &[u8], kind: EntryType, mode: u16, size: u64) -> Result<(), ExportError> {
        self.named(header(kind, mode, size), path)
    }

    /// Writes `header` under this name, be it long or not.
    fn named(&mut self, mut header: Header, path: &[u8]) -> Result<(), ExportError> {
        if let Err(long) = fill(&mut header.as_old_mut().name, path) {
            self.long(EntryType::GNULongName, long)?;
        }
        header.set_cksum();
        self.put(header.as_bytes())
    }

    /// Writes the name or target of the entry that comes next.
    fn long(&mut self, kind: EntryType, text: &[u8]) -> Result<(), ExportError> {
        let len = text.len() as u64 + 1;
        let mut header = header(kind, 0o644, len);
        let _ = fill(&mut header.as_old_mut().name, LONG);
        header.set_cksum();
        self.put(header.as_bytes())?;
        self.put(text)?;
        self.put(&[0])?;
        self.pad(len)
    }

    fn contents(&mut self, path: &[u8], digest: &Digest, stated: u64) -> Result<(), ExportError> {
        let shown = || printable(path);
        let blob = self.store.blobs.open_sized(digest, stated)?;
        let blob = blob.ok_or_else(|| ExportError::Missing {
            path: shown(),
            kind: ObjectKind::Blob,
            digest: *digest,
        })?;
        let wrong = |actual| ExportError::Size { path: shown(), digest: *digest, stated, actual };
        if blob.size() != stated {
            return Err(wrong(blob.size()));
        }
        blob.verify()?;
        let mut written = 0;
        while written < stated {
            self.check_cancelled()?;
            let read = blob.read_at(&mut self.buffer, written).map_err(|source| ExportError::Io {
                act: "read the contents of",
                path: shown(),
                source,
            })?;
            let rest = usize::try_from(stated - written).unwrap_or(usize::MAX);
            let chunk = self.buffer.get(..read.min(rest)).filter(|chunk| !chunk.is_empty());
            let chunk = chunk.ok_or_else(|| wrong(written))?;
            self.out.write_all(chunk).map_err(unwritable)?;
            written += chunk.len() as u64;
        }
        self.pad(stated)
    }

    /// Fills up the last block of what has `len` bytes.
    fn pad(&mut self, len: u64) -> Result<(), ExportError> {
        let over = len % BLOCK_BYTES as u64;
        let missing = (BLOCK_BYTES - usize::try_from(over).unwrap_or(0)) % BLOCK_BYTES;
        self.put([0; BLOCK_BYTES].get(..missing).unwrap_or_default())
    }

    fn end(&mut self) -> Result<(), ExportError> {
        self.put(&[0; 2 * BLOCK_BYTES])?;
        self.out.flush().map_err(unwritable)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), ExportError> {
        self.out.write_all(bytes).map_err(unwritable)
    }

    fn check_cancelled(&self) -> Result<(), ExportError> {
        if self.cancel.load(Ordering::Relaxed) { Err(ExportError::Cancelled) } else { Ok(()) }
    }
}

fn header(kind: EntryType, mode: u16, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode.into());
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(look::INPUT_TIME.as_secs());
    header.set_size(size);
    header
}

/// Writes a text to a field, as much of it as has room; one that is cut off is the error.
fn fill<'t>(field: &mut [u8], text: &'t [u8]) -> Result<(), &'t [u8]> {
    field.iter_mut().zip(text).for_each(|(place, byte)| *place = *byte);
    if text.len() > field.len() { Err(text) } else { Ok(()) }
}

fn unwritable(source: io::Error) -> ExportError {
    ExportError::Io { act: "write", path: "the archive".to_owned(), source }
}
