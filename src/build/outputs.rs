//! What a build left behind: taken into the store and searched for references, in one read of every byte.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64};

use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::stat::fstatat;

use super::error::{Cause, Fault, WorkerError, WorkerPart};
use super::events::Output;
use super::request::{Request, SandboxPath};
use super::scratch::{Scratch, ScratchError};
use crate::castore::Store;
use crate::castore::ingest::{Ingest, IngestError};
use crate::refscan::{Patterns, Scanner};
use crate::size::Size;

/// Takes in the outputs of a build that has ended.
pub struct Intake<'a> {
    /// The build's request.
    pub request: &'a Request,
    /// What is searched for.
    pub patterns: &'a Patterns,
    /// Where each output lies in the scratch directory, in the order of the request.
    pub places: &'a [PathBuf],
    /// The build's directory; none of its processes lives.
    pub scratch: &'a Scratch,
    /// What all outputs may hold together. Files with holes take little on disk and may still be endless to read.
    pub limit: Option<Size>,
    /// Where the outputs go.
    pub store: &'a Store,
    /// Once this is true the work ends with [`Fault::Cancelled`].
    pub cancel: &'a AtomicBool,
}

/// How taking in the outputs ends early.
pub enum IntakeError {
    /// The build made something wrong, or nothing.
    Build(Cause),
    /// The worker could not go on.
    Fault(Fault),
}

impl From<WorkerError> for IntakeError {
    fn from(error: WorkerError) -> Self {
        Self::Fault(error.into())
    }
}

impl From<ScratchError> for IntakeError {
    fn from(error: ScratchError) -> Self {
        Self::Fault(WorkerError::new(WorkerPart::Scratch, error).into())
    }
}

impl Intake<'_> {
    /// Takes in all outputs, in the order of the request, and calls `each` with the index of an output and the
    /// needles found in it as soon as it is done.
    ///
    /// # Errors
    /// [`IntakeError::Build`] names all outputs that are missing, before anything is read, or the first thing
    /// that can't be stored.
    pub fn run(&self, mut each: impl FnMut(u32, &[u64])) -> Result<Vec<Output>, IntakeError> {
        self.find_missing()?;
        let left = self.limit.map(|Size(bytes)| AtomicU64::new(bytes));
        let mut outputs = Vec::with_capacity(self.places.len());
        for (index, (path, place)) in (0..).zip(self.request.outputs.iter().zip(self.places)) {
            let output = self.take(path, place, left.as_ref())?;
            each(index, &output.needles);
            outputs.push(output);
        }
        Ok(outputs)
    }

    fn find_missing(&self) -> Result<(), IntakeError> {
        let mut missing = Vec::new();
        for (path, place) in self.request.outputs.iter().zip(self.places) {
            if !self.exists(place)? {
                missing.push(path.clone());
            }
        }
        match missing.is_empty() {
            true => Ok(()),
            false => Err(IntakeError::Build(Cause::MissingOutputs { paths: missing })),
        }
    }

    fn exists(&self, place: &Path) -> Result<bool, ScratchError> {
        let (Some(parent), Some(name)) = (self.scratch.parent_of(place)?, place.file_name()) else {
            return Ok(false);
        };
        match fstatat(&parent, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(_) => Ok(true),
            Err(Errno::ENOENT) => Ok(false),
            Err(errno) => Err(ScratchError { act: "look at", path: place.into(), source: errno.into() }),
        }
    }

    fn take(
        &self,
        path: &SandboxPath,
        place: &Path,
        allowance: Option<&AtomicU64>,
    ) -> Result<Output, IntakeError> {
        let missing = || IntakeError::Build(Cause::MissingOutputs { paths: vec![path.clone()] });
        let parent = self.scratch.parent_of(place)?.ok_or_else(missing)?;
        let name = place.file_name().ok_or_else(missing)?;
        let scanner = Scanner::new(self.patterns);
        let (store, label) = (self.store, path.to_string());
        let ingest = Ingest {
            store,
            scanner: Some(&scanner),
            skip: &[],
            label: &label,
            allowance,
            tally: None,
            cancel: self.cancel,
        };
        match ingest.at(std::os::fd::AsFd::as_fd(&parent), name) {
            Ok(node) => Ok(Output { node, needles: scanner.found() }),
            Err(IngestError::Tree(fault)) => Err(IntakeError::Build(Cause::UnstorableOutput(fault))),
            Err(IngestError::TooMuch { path }) => {
                // Without a limit nothing is too much.
                let limit = self.limit.unwrap_or(Size(u64::MAX));
                Err(IntakeError::Build(Cause::OutputsTooLarge { limit, path }))
            }
            Err(IngestError::Cancelled) => Err(IntakeError::Fault(Fault::Cancelled)),
            Err(IngestError::Store(error)) => {
                Err(IntakeError::Fault(WorkerError::new(WorkerPart::Store, error).into()))
            }
            Err(error @ IngestError::Io { .. }) => {
                Err(IntakeError::Fault(WorkerError::new(WorkerPart::Scratch, error).into()))
            }
        }
    }
}
