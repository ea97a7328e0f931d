//! Inputs as files: a private copy for each build, `<state>/copies/<build id>/<input name>`.
//!
//! Where the file system can, a copy shares its blocks with the store's blob. It is never a hard link: a build that
//! runs under the id of the copies' owner could change the blob through it, or lock it against other builds.
//!
//! Everything is made by descriptor, never through a symbolic link, and belongs to whom the view says, where that
//! id can own files; else to the program itself. What keeps the build's hands off is then that its mounts of the
//! copies can't be written to.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use cofferdam_sandbox::Owner;
use cofferdam_sandbox::scratch::{open_emptied, remove_tree};
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{Mode, mkdirat};
use nix::sys::statvfs::{FsFlags, fstatvfs};

use crate::castore::look::{self, Look};
use crate::castore::tree::{ExportError, export_unless};
use crate::castore::{Name, Node, Store};

#[cfg(test)]
mod tests;

/// Where the inputs of all builds are laid out.
pub struct Copies {
    store: Store,
    owner: Owner,
    root: Arc<OwnedFd>,
    path: PathBuf,
}

/// The inputs of one build, laid out. Dropping it removes them, which blocks for as long as that takes.
#[derive(Debug)]
pub struct Copied {
    root: Arc<OwnedFd>,
    name: CString,
    path: PathBuf,
}

/// Why inputs could not be laid out.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The directory of all builds, or that of one, can't be made.
    #[error("can't {act} {path} for copies of inputs: {source}")]
    Directory {
        /// What was tried, as a verb.
        act: &'static str,
        /// The directory.
        path: PathBuf,
        /// The refusal.
        source: io::Error,
    },
    /// An input can't be laid out.
    #[error("can't lay out the input {name}: {source}")]
    Input {
        /// The input.
        name: Name,
        /// Why.
        source: ExportError,
    },
}

impl CopyError {
    /// Whether it was only told to end.
    pub fn is_cancelled(&self) -> bool {
        matches!(self, Self::Input { source: ExportError::Cancelled, .. })
    }
}

impl Copies {
    /// Opens the directory at `path`, which is made if it isn't there and emptied if it is: only a worker that has
    /// locked its state directory may do this. All that is laid out in it will belong to `owner`.
    ///
    /// # Errors
    /// Where it can't be made, opened or emptied.
    pub fn open(store: Store, path: &Path, owner: Owner) -> Result<Self, CopyError> {
        let fail = |(act, source)| CopyError::Directory { act, path: path.into(), source };
        let root = open_emptied(path).map_err(fail)?;
        Ok(Self { store, owner, root: Arc::new(root), path: path.into() })
    }

    /// Warns where programs among the inputs can't be executed. To be called where builds will see copies.
    pub fn warn_of_noexec(&self) {
        if fstatvfs(&*self.root).is_ok_and(|found| found.flags().contains(FsFlags::ST_NOEXEC)) {
            tracing::warn!(
                "{} is mounted noexec: builds can't execute programs of their inputs (choose another --state-dir)",
                self.path.display()
            );
        }
    }

    /// Lays `inputs` out in a new directory for the build called `build_id`, unless `cancel` turns true on the way.
    ///
    /// # Errors
    /// Where the store does not hold exactly what the inputs say, or the disk can't take it. What was made is
    /// removed.
    pub fn lay_out(
        &self,
        build_id: &str,
        inputs: &BTreeMap<Name, Node>,
        cancel: &AtomicBool,
    ) -> Result<Copied, CopyError> {
        let path = self.path.join(build_id);
        let fail = |act| {
            let path = path.clone();
            move |errno: Errno| CopyError::Directory { act, path, source: errno.into() }
        };
        let name = CString::new(build_id).map_err(|_| fail("make")(Errno::EINVAL))?;
        mkdirat(&self.root, name.as_c_str(), Mode::S_IRWXU).map_err(fail("make"))?;
        // From here on dropping it cleans up.
        let copied = Copied { root: Arc::clone(&self.root), name, path: path.clone() };
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let dir = openat(&self.root, copied.name.as_c_str(), flags, Mode::empty()).map_err(fail("open"))?;
        let look = Look::Input(self.owner);
        for (name, node) in inputs {
            export_unless(&self.store, node, dir.as_fd(), name.as_os_str(), look, cancel)
                .map_err(|source| CopyError::Input { name: name.clone(), source })?;
        }
        look::seal_directory(dir.as_fd(), look).map_err(fail("finish"))?;
        Ok(copied)
    }
}

impl Copied {
    /// The directory that holds them.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Copied {
    fn drop(&mut self) {
        if let Err(error) = remove_tree(self.root.as_fd(), &self.name) {
            let path = self.path.display();
            tracing::warn!(%path, %error, "copies of inputs are left; the next start sweeps them");
        }
    }
}
