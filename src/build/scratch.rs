//! A build's directory on disk: made to its layout, opened for its outputs, removed with all it holds.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use cofferdam_sandbox::scratch::{open_emptied, remove_tree};
use cofferdam_sandbox::{Identity, Owner};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{Mode, fchmod, mkdirat};
use nix::unistd::{Gid, Uid, fchown, fchownat};

use super::plan::{OnDisk, Role};

/// Where the directories of all builds lie.
#[derive(Clone, Debug)]
pub struct ScratchRoot {
    dir: Arc<OwnedFd>,
    path: PathBuf,
}

/// The directory of one build. Dropping it removes it with all it holds, which blocks for as long as that takes.
#[derive(Debug)]
pub struct Scratch {
    root: ScratchRoot,
    name: CString,
    dir: Arc<OwnedFd>,
}

/// What could not be done on the scratch disk.
#[derive(Debug, thiserror::Error)]
#[error("can't {act} {path} in the scratch directory: {source}")]
pub struct ScratchError {
    /// What was tried, as a verb.
    pub act: &'static str,
    /// On what.
    pub path: PathBuf,
    /// The refusal.
    pub source: io::Error,
}

fn fail(act: &'static str, path: &Path) -> impl Fn(Errno) -> ScratchError {
    move |errno| ScratchError { act, path: path.into(), source: errno.into() }
}

impl ScratchRoot {
    /// Opens the directory at `path`, which is made if it isn't there and emptied if it is: only a worker that
    /// has locked its state directory may do this.
    ///
    /// # Errors
    /// Where it can't be made, opened or emptied.
    pub fn open(path: &Path) -> Result<Self, ScratchError> {
        let dir =
            open_emptied(path).map_err(|(act, source)| ScratchError { act, path: path.into(), source })?;
        Ok(Self { dir: Arc::new(dir), path: path.into() })
    }

    /// The directory itself.
    pub fn dir(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.dir)
    }

    /// Where the directory of the build called `id` is.
    pub fn path_of(&self, id: &str) -> PathBuf {
        self.path.join(id)
    }

    /// Makes the directory of the build called `id` with what its layout asks for.
    ///
    /// # Errors
    /// Where something can't be made. What was made is removed.
    pub fn create(
        &self,
        id: &str,
        layout: &[OnDisk],
        identity: &Identity,
        slot: u32,
    ) -> Result<Scratch, ScratchError> {
        let name = CString::new(id).map_err(|_| fail("make", Path::new(id))(Errno::EINVAL))?;
        let made = mkdirat(&self.dir, name.as_c_str(), Mode::S_IRWXU)
            .and_then(|()| open_dir(self.dir.as_fd(), OsStr::from_bytes(name.as_bytes())));
        let dir = made.map_err(fail("make", Path::new(id)))?;
        // From here on dropping it cleans up.
        let scratch = Scratch { root: self.clone(), name, dir: Arc::new(dir) };
        for item in layout {
            let (OnDisk::Directory { path, .. } | OnDisk::File { path, .. }) = item;
            scratch.make(item, identity, slot).map_err(fail("make", path))?;
        }
        Ok(scratch)
    }
}

impl Scratch {
    /// The directory itself.
    pub fn dir(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.dir)
    }

    /// Opens the directory that holds `path`; `None` where it isn't there. Symbolic links are not followed: the
    /// build may have put them anywhere.
    ///
    /// # Errors
    /// Where it can't be opened though it is there.
    pub fn parent_of(&self, path: &Path) -> Result<Option<OwnedFd>, ScratchError> {
        match walk(self.dir.as_fd(), path.parent().unwrap_or(Path::new("")), |_, _| Err(Errno::ENOENT)) {
            Ok(dir) => Ok(Some(dir)),
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => Ok(None),
            Err(errno) => Err(fail("open", path)(errno)),
        }
    }

    fn make(&self, item: &OnDisk, identity: &Identity, slot: u32) -> Result<(), Errno> {
        let (OnDisk::Directory { path, .. } | OnDisk::File { path, .. }) = item;
        let build = identity.build_owner(slot);
        let parent = make_parent(self.dir.as_fd(), path, build)?;
        let name = path.file_name().ok_or(Errno::EINVAL)?;
        match item {
            OnDisk::Directory { mode, owner, .. } => {
                make_directory(&parent, name, *mode, owner_of(*owner, identity, slot))
            }
            OnDisk::File { contents, .. } => make_file(&parent, name, contents, build),
        }
    }

    /// Removes the directory with all it holds.
    ///
    /// # Errors
    /// The first refusal.
    pub fn remove(&self) -> io::Result<()> {
        remove_tree(self.root.dir.as_fd(), &self.name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            let name = self.name.to_string_lossy();
            tracing::warn!(build = %name, %error, "scratch is left; the next start sweeps it");
        }
    }
}

fn owner_of(role: Role, identity: &Identity, slot: u32) -> Option<Owner> {
    match role {
        Role::Daemon => None,
        Role::Root => Some(identity.root_owner()),
        Role::RootForBuild => {
            Some(Owner { uid: identity.root_owner().uid, gid: identity.build_owner(slot).gid })
        }
        Role::Build => Some(identity.build_owner(slot)),
    }
}

/// The directory that `path` lies in, made if it isn't there: the build's own, and open to all.
fn make_parent(dir: BorrowedFd<'_>, path: &Path, owner: Owner) -> Result<OwnedFd, Errno> {
    walk(dir, path.parent().unwrap_or(Path::new("")), |dir, name| {
        mkdirat(dir, name, Mode::from_bits_truncate(0o755))?;
        let (uid, gid) = ids(owner);
        fchownat(dir, name, uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW)
    })
}

fn make_directory(parent: &OwnedFd, name: &OsStr, mode: u32, owner: Option<Owner>) -> Result<(), Errno> {
    mkdirat(parent, name, Mode::S_IRWXU)?;
    let made = open_dir(parent.as_fd(), name)?;
    if let Some((uid, gid)) = owner.map(ids) {
        fchown(&made, uid, gid)?;
    }
    // After the change of owner, which may clear bits.
    fchmod(&made, Mode::from_bits_truncate(mode))
}

fn make_file(parent: &OwnedFd, name: &OsStr, contents: &[u8], owner: Owner) -> Result<(), Errno> {
    let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mut file = File::from(openat(parent, name, flags, Mode::from_bits_truncate(0o644))?);
    file.write_all(contents).map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
    let (uid, gid) = ids(owner);
    fchown(&file, uid, gid)
}

fn ids(owner: Owner) -> (Option<Uid>, Option<Gid>) {
    (Some(Uid::from_raw(owner.uid)), Some(Gid::from_raw(owner.gid)))
}

/// Walks to the directory at `path` without following a link, and calls `make` on what isn't there.
fn walk(
    dir: BorrowedFd<'_>,
    path: &Path,
    make: impl Fn(&OwnedFd, &OsStr) -> Result<(), Errno>,
) -> Result<OwnedFd, Errno> {
    let mut at = open_dir(dir, OsStr::new("."))?;
    for component in path.components() {
        let Component::Normal(name) = component else { return Err(Errno::EINVAL) };
        at = match open_dir(at.as_fd(), name) {
            Err(Errno::ENOENT) => {
                make(&at, name)?;
                open_dir(at.as_fd(), name)?
            }
            opened => opened?,
        };
    }
    Ok(at)
}

fn open_dir(dir: BorrowedFd<'_>, name: &OsStr) -> Result<OwnedFd, Errno> {
    openat(
        dir,
        name,
        OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC,
        Mode::empty(),
    )
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// A build has to get to what lies deep in its scratch path.
    #[test]
    fn parents_are_open_whatever_lies_in_them() {
        let temporary = tempfile::tempdir().unwrap();
        let dir: OwnedFd = File::open(temporary.path()).unwrap().into();
        let me = Owner { uid: Uid::effective().as_raw(), gid: Gid::effective().as_raw() };
        let path = Path::new("a/b/c");
        let parent = make_parent(dir.as_fd(), path, me).unwrap();
        make_directory(&parent, OsStr::new("c"), 0o1775, Some(me)).unwrap();
        make_file(&parent, OsStr::new("f"), b"text", me).unwrap();
        for (path, mode) in [("a", 0o755), ("a/b", 0o755), ("a/b/c", 0o1775), ("a/b/f", 0o644)] {
            let found = std::fs::metadata(temporary.path().join(path)).unwrap().permissions().mode();
            assert_eq!(found & 0o7777, mode, "{path}");
        }
    }
}
