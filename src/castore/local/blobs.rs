//! Blobs: small ones in packs, others as files.

use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, renameat};
use nix::libc;
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat};
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::Root;
use super::packs::{Packs, Place, SMALL_BYTES};
use crate::castore::file_blob::FileBlob;
use crate::castore::memory::MemoryBlob;
use crate::castore::node::Digest;
use crate::castore::traits::{Blob, BlobService, BlobStat, BlobWriter, StoreError, Stored};
use crate::castore::tree::ObjectKind;
use crate::lock::lock;

/// How many times a small blob is looked for that is just being moved from one pack to another.
const MOVES: usize = 8;

pub(super) struct Blobs {
    root: Arc<Root>,
    packs: Arc<Packs>,
}

impl Blobs {
    pub(super) fn new(root: Arc<Root>, packs: Arc<Packs>) -> Self {
        Self { root, packs }
    }

    /// The blob, if it is in a pack.
    fn small(&self, digest: &Digest) -> Result<Option<Arc<dyn Blob>>, StoreError> {
        for _ in 0..MOVES {
            let Some(place) = self.packs.find(digest)? else { break };
            if let Some(contents) = self.packs.read(digest, place)? {
                return Ok(Some(Arc::new(MemoryBlob(contents))));
            }
        }
        Ok(None)
    }
}

impl BlobService for Blobs {
    fn stat(&self, digest: &Digest) -> Result<Option<BlobStat>, StoreError> {
        let size = match self.packs.find(digest)? {
            Some(place) => Some(u64::from(place.len)),
            None => self.root.stored_size(digest)?,
        };
        Ok(size.map(|size| BlobStat { size: Some(size) }))
    }

    fn stat_all(&self, digests: &[Digest]) -> Result<Vec<Option<BlobStat>>, StoreError> {
        let stat = |(digest, place): (&Digest, Option<Place>)| {
            let size = match place {
                Some(place) => Some(u64::from(place.len)),
                None => self.root.stored_size(digest)?,
            };
            Ok(size.map(|size| BlobStat { size: Some(size) }))
        };
        digests.iter().zip(self.packs.find_all(digests)?).map(stat).collect()
    }

    fn open(&self, digest: &Digest) -> Result<Option<Arc<dyn Blob>>, StoreError> {
        if let Some(blob) = self.small(digest)? {
            return Ok(Some(blob));
        }
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
        let file = match openat(&self.root.blobs, place(digest).as_str(), flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(Errno::ENOENT) => return Ok(None),
            Err(Errno::ELOOP) => return Err(StoreError::Damaged { kind: "blob", digest: *digest }),
            Err(errno) => return Err(refused("open", digest, errno)),
        };
        let stat = fstat(&file).map_err(|errno| refused("look at", digest, errno))?;
        let size = blob_size(&stat, digest)?;
        let blob = |size| LocalBlob {
            root: Arc::clone(&self.root),
            digest: *digest,
            file: FileBlob::new(file, size),
            verified: Mutex::new(false),
        };
        Ok(size.map(|size| Arc::new(blob(size)) as Arc<dyn Blob>))
    }

    fn is_near(&self, _digest: &Digest) -> bool {
        true
    }

    fn create(&self) -> Result<Box<dyn BlobWriter>, StoreError> {
        Ok(Box::new(Writer {
            root: Arc::clone(&self.root),
            packs: Arc::clone(&self.packs),
            hasher: blake3::Hasher::new(),
            buffer: Vec::new(),
            file: None,
            failure: None,
        }))
    }
}

/// A blob in its file.
struct LocalBlob {
    root: Arc<Root>,
    digest: Digest,
    file: FileBlob,
    /// Whether it was. Locked during that: others who ask must wait for the answer, and need not hash it as well.
    verified: Mutex<bool>,
}

impl Blob for LocalBlob {
    fn size(&self) -> u64 {
        self.file.size()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buffer, offset)
    }

    fn verify(&self) -> Result<(), StoreError> {
        let mut verified = lock(&self.verified);
        if !*verified {
            self.root.verify(self.file.file(), &self.digest)?;
            *verified = true;
        }
        Ok(())
    }

    fn is_near(&self) -> bool {
        true
    }

    fn as_file(&self) -> Option<&File> {
        self.file.as_file()
    }
}

impl Root {
    /// Length of the blob, if it is there.
    fn stored_size(&self, digest: &Digest) -> Result<Option<u64>, StoreError> {
        match fstatat(&self.blobs, place(digest).as_str(), AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => blob_size(&stat, digest),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(refused("look for", digest, errno)),
        }
    }

    /// Opens the directory that a blob lies in.
    pub(super) fn open_parent(&self, digest: &Digest) -> io::Result<File> {
        let place = place(digest);
        let parent = place.split('/').next().unwrap_or_default();
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW;
        Ok(openat(&self.blobs, parent, flags, Mode::empty())?.into())
    }
}

/// A blob in the making: hashed on the way into a temporary file, which exists only once there is more than goes into
/// a pack.
struct Writer {
    root: Arc<Root>,
    packs: Arc<Packs>,
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
        if self.buffer.len() + bytes.len() > SMALL_BYTES && !self.buffer.is_empty() {
            self.save_buffer()?;
        }
        if bytes.len() > SMALL_BYTES {
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
    fn finish(mut self: Box<Self>) -> Result<Stored, StoreError> {
        let unwritable = |error| StoreError::io("write", "a new blob", error);
        if let Some(errno) = self.failure {
            return Err(unwritable(errno.into()));
        }
        if self.file.is_some() {
            self.save_buffer().map_err(unwritable)?;
        }
        let Some(file) = self.file.take() else {
            let digest = Digest::of(&self.buffer);
            let new = self.packs.add(&digest, &self.buffer)?;
            return Ok(Stored { digest, size: self.buffer.len() as u64, new });
        };
        let digest = Digest::from(self.hasher.finalize());
        let size = self.hasher.count();
        self.root.keep.rescue(ObjectKind::Blob, &digest);
        // Another length under this name is what a crash of the machine may leave, and other bytes what a disk that fails
        // may; a file of which nobody knows that it is sound is replaced by this one, of which that is known.
        let new = self.root.stored_size(&digest)? != Some(size);
        if new || !self.root.is_hashed(&digest) {
            file.keep(&digest)?;
            self.root.grow(if new { size } else { 0 });
        }
        Ok(Stored { digest, size, new })
    }
}

/// A file in `tmp/`, removed with this value unless it is kept.
struct Temporary {
    file: File,
    name: TemporaryName,
}

struct TemporaryName {
    root: Arc<Root>,
    /// None once it has been given away.
    name: Option<String>,
}

impl Temporary {
    fn create(root: &Arc<Root>) -> io::Result<Self> {
        let name = root.temporary_name();
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
        let file = openat(&root.temporary, name.as_str(), flags, Mode::from_bits_truncate(0o444))?;
        Ok(Self { file: file.into(), name: TemporaryName { root: Arc::clone(root), name: Some(name) } })
    }

    /// Makes it the blob `digest`.
    fn keep(self, digest: &Digest) -> Result<(), StoreError> {
        let Self { file, mut name } = self;
        let root = Arc::clone(&name.root);
        let rename = || match &name.name {
            Some(from) => renameat(&root.temporary, from.as_str(), &root.blobs, place(digest).as_str()),
            None => Ok(()),
        };
        root.unsynced.add(file, digest, rename).map_err(|errno| refused("create", digest, errno))?;
        name.name = None;
        root.hashed(digest);
        Ok(())
    }
}

impl Drop for TemporaryName {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            // What can't be removed now is swept when the store is opened next.
            let _ = unlinkat(&self.root.temporary, name.as_str(), UnlinkatFlags::NoRemoveDir);
        }
    }
}

/// Where a blob lies below `blobs/`.
pub(super) fn place(digest: &Digest) -> String {
    let hex = digest.to_hex();
    format!("{}/{hex}", &hex[..2])
}

/// The length of a blob by that of its file. An empty file is what a crash of the machine leaves of a blob that
/// was not synced: unless it is the empty blob, there is none.
fn blob_size(stat: &FileStat, digest: &Digest) -> Result<Option<u64>, StoreError> {
    let regular = SFlag::from_bits_truncate(stat.st_mode & libc::S_IFMT) == SFlag::S_IFREG;
    match u64::try_from(stat.st_size) {
        Ok(size) if regular => Ok(Some(size).filter(|size| *size > 0 || *digest == Digest::of(b""))),
        _ => Err(StoreError::Damaged { kind: "blob", digest: *digest }),
    }
}

pub(super) fn refused(act: &'static str, digest: &Digest, errno: Errno) -> StoreError {
    StoreError::io(act, format!("blob {digest}"), errno.into())
}
