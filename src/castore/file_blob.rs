//! A blob in a file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::traits::{Blob, StoreError};

/// A blob that is all of an open file, and known to be what it should.
pub(super) struct FileBlob {
    file: File,
    size: u64,
}

impl FileBlob {
    /// The blob in `file`, which has `size` bytes.
    pub(super) fn new(file: File, size: u64) -> Self {
        Self { file, size }
    }

    /// The file.
    pub(super) fn file(&self) -> &File {
        &self.file
    }
}

impl Blob for FileBlob {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut filled = 0;
        while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match self.file.read_at(rest, offset.saturating_add(filled as u64)) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(filled)
    }

    fn verify(&self) -> Result<(), StoreError> {
        Ok(())
    }

    fn is_near(&self) -> bool {
        true
    }

    fn as_file(&self) -> Option<&File> {
        Some(&self.file)
    }
}
