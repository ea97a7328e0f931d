//! Blobs as files.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, renameat};
use nix::libc;
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat};
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::Root;
use crate::castore::file_blob::FileBlob;
use crate::castore::node::Digest;
use crate::castore::traits::{Blob, BlobService, BlobStat, BlobWriter, StoreError};

/// A blob of up to this many bytes is written in one go, and not at all where it is there already; of a
/// larger one, smaller writes are gathered up to this.
const BUFFER_BYTES: usize = 64 * 1024;

pub(super) struct Blobs {
    root: Arc<Root>,
}

impl Blobs {
    pub(super) fn new(root: Arc<Root>) -> Self {
        Self { root }
    }
}

impl BlobService for Blobs {
    fn stat(&self, digest: &Digest) -> Result<Option<BlobStat>, StoreError> {
        Ok(self.root.stored_size(digest)?.map(|size| BlobStat { size: Some(size) }))
    }

    fn open(&self, digest: &Digest) -> Result<Option<Arc<dyn Blob>>, StoreError> {
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
        let file = match openat(&self.root.blobs, place(digest).as_str(), flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(Errno::ENOENT) => return Ok(None),
            Err(Errno::ELOOP) => return Err(StoreError::Damaged { kind: "blob", digest: *digest }),
            Err(errno) => return Err(refused("open", digest, errno)),
        };
        let stat = fstat(&file).map_err(|errno| refused("look at", digest, errno))?;
        let size = regular_size(&stat, digest)?;
        Ok(Some(Arc::new(FileBlob::new(file, size))))
    }

    fn create(&self) -> Result<Box<dyn BlobWriter>, StoreError> {
        Ok(Box::new(Writer {
            root: Arc::clone(&self.root),
            hasher: blake3::Hasher::new(),
            buffer: Vec::new(),
            file: None,
            failure: None,
        }))
    }
}

impl Root {
    /// Length of the blob, if it is there.
    fn stored_size(&self, digest: &Digest) -> Result<Option<u64>, StoreError> {
        match fstatat(&self.blobs, place(digest).as_str(), AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => regular_size(&stat, digest).map(Some),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(refused("look for", digest, errno)),
        }
    }
}

/// A blob in the making: hashed on the way into a temporary file, which exists only once there is more than
/// the buffer holds.
struct Writer {
    root: Arc<Root>,
    hasher: blake3::Hasher,
    buffer: Vec<u8>,
    file: Option<Temporary>,
    /// A failed write may have stored some of its bytes: the blob is lost then.
    failure: Option<Errno>,
}

impl Writer {
    fn save(&mut self, bytes: &[u8]) -> io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(Temporary::create(&self.root)?),
        };
        self.hasher.update(bytes);
        file.file.write_all(bytes)
    }

    fn save_buffer(&mut self) -> io::Result<()> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let saved = self.save(&buffer);
        buffer.clear();
        self.buffer = buffer;
        saved
    }

    fn push(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.buffer.len() + bytes.len() > BUFFER_BYTES && !self.buffer.is_empty() {
            self.save_buffer()?;
        }
        if bytes.len() > BUFFER_BYTES {
            return self.save(bytes);
        }
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }
}

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(errno) = self.failure {
            return Err(errno.into());
        }
        self.push(bytes).inspect_err(|error| {
            self.failure = Some(error.raw_os_error().map_or(Errno::EIO, Errno::from_raw));
        })?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl BlobWriter for Writer {
    fn finish(mut self: Box<Self>) -> Result<(Digest, u64), StoreError> {
        let unwritable = |error| StoreError::io("write", "a new blob", error);
        if let Some(errno) = self.failure {
            return Err(unwritable(errno.into()));
        }
        if self.file.is_some() {
            self.save_buffer().map_err(unwritable)?;
        } else {
            self.hasher.update(&self.buffer);
        }
        let digest = Digest::from(self.hasher.finalize());
        let size = self.hasher.count();
        // Another length under this name is what a crash of the machine may leave; then it is replaced.
        if self.root.stored_size(&digest)? == Some(size) {
            return Ok((digest, size));
        }
        let file = match self.file.take() {
            Some(file) => file,
            None => {
                let mut file = Temporary::create(&self.root).map_err(unwritable)?;
                file.file.write_all(&self.buffer).map_err(unwritable)?;
                file
            }
        };
        file.keep(&digest)?;
        Ok((digest, size))
    }
}

/// A file in `tmp/`, removed with this value unless it is kept.
struct Temporary {
    root: Arc<Root>,
    name: Option<String>,
    file: File,
}

impl Temporary {
    fn create(root: &Arc<Root>) -> io::Result<Self> {
        let name = root.temporary_name();
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
        let file = openat(&root.temporary, name.as_str(), flags, Mode::from_bits_truncate(0o444))?;
        Ok(Self { root: Arc::clone(root), name: Some(name), file: file.into() })
    }

    /// Makes it the blob `digest`.
    fn keep(mut self, digest: &Digest) -> Result<(), StoreError> {
        if let Some(name) = self.name.take() {
            let (from, to): (BorrowedFd<'_>, _) = (self.root.temporary.as_fd(), self.root.blobs.as_fd());
            if let Err(errno) = renameat(from, name.as_str(), to, place(digest).as_str()) {
                self.name = Some(name);
                return Err(refused("create", digest, errno));
            }
        }
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            // What can't be removed now is swept when the store is opened next.
            let _ = unlinkat(&self.root.temporary, name.as_str(), UnlinkatFlags::NoRemoveDir);
        }
    }
}

/// Where a blob lies below `blobs/`.
fn place(digest: &Digest) -> String {
    let hex = digest.to_hex();
    format!("{}/{hex}", &hex[..2])
}

fn regular_size(stat: &FileStat, digest: &Digest) -> Result<u64, StoreError> {
    let regular = SFlag::from_bits_truncate(stat.st_mode & libc::S_IFMT) == SFlag::S_IFREG;
    match u64::try_from(stat.st_size) {
        Ok(size) if regular => Ok(size),
        _ => Err(StoreError::Damaged { kind: "blob", digest: *digest }),
    }
}

fn refused(act: &'static str, digest: &Digest, errno: Errno) -> StoreError {
    StoreError::io(act, format!("blob {digest}"), errno.into())
}
