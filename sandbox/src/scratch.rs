//! Removing what builds leave behind: any tree, however deep and whatever its modes, by descriptor.

use std::ffi::{CStr, CString};
use std::fs::DirBuilder;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat, renameat};
use nix::sys::stat::{FchmodatFlags, Mode, fchmodat};
use nix::unistd::{UnlinkatFlags, unlinkat};

/// Removes the tree called `name` in `dir`. That it isn't there is fine.
///
/// Every directory is moved up into the tree's root before it is emptied, so a tree of any depth takes three
/// descriptors and no recursion. Nothing is named by more than one component: no symbolic link is followed.
///
/// # Errors
/// The first refusal; whatever could be removed is gone.
pub fn remove_tree(dir: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    match unlinkat(dir, name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => return Ok(()),
        Err(errno) if is_directory(errno) => {}
        Err(errno) => return Err(errno.into()),
    }
    let emptied = empty(&open_to_empty(dir, name)?);
    match unlinkat(dir, name, UnlinkatFlags::RemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(errno) => Err(emptied.err().unwrap_or(errno).into()),
    }
}

/// Opens the directory at `path`, which is made with mode 0700 if it isn't there and emptied if it is. A symbolic link
/// in its place is refused.
///
/// # Errors
/// The first refusal, with what was refused, as a verb.
pub fn open_emptied(path: &Path) -> Result<OwnedFd, (&'static str, io::Error)> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(("make", error)),
        _ => {}
    }
    // Not through a link: everything in there is about to be removed.
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let dir = nix::fcntl::open(path, flags, Mode::empty()).map_err(|errno| ("open", errno.into()))?;
    remove_contents(dir.as_fd()).map_err(|error| ("sweep", error))?;
    Ok(dir)
}

/// Removes everything in `dir`, but not `dir` itself.
///
/// # Errors
/// The first refusal; whatever could be removed is gone.
pub fn remove_contents(dir: BorrowedFd<'_>) -> io::Result<()> {
    let mut first_error = Ok(());
    for name in names(dir)? {
        let removed = remove_tree(dir, &name);
        first_error = first_error.and(removed);
    }
    first_error
}

/// Empties a directory. Yields the first refusal.
fn empty(root: &OwnedFd) -> Result<(), Errno> {
    let mut first_error = Ok(());
    let mut moved = Moved { root, count: 0, pending: Vec::new() };
    let mut note = |result: Result<(), Errno>| first_error = first_error.and(result);
    note(moved.take_out_of(root));
    while let Some(name) = moved.pending.pop() {
        note(open_to_empty(root.as_fd(), &name).and_then(|directory| moved.take_out_of(&directory)));
        note(unlinkat(root, name.as_c_str(), UnlinkatFlags::RemoveDir));
    }
    first_error
}

/// The directories that were moved up into `root` and are still to be emptied.
struct Moved<'a> {
    root: &'a OwnedFd,
    count: u64,
    pending: Vec<CString>,
}

impl Moved<'_> {
    /// Leaves nothing in `directory`: removes what can be, moves directories up.
    fn take_out_of(&mut self, directory: &OwnedFd) -> Result<(), Errno> {
        let mut first_error = Ok(());
        for name in names(directory.as_fd())? {
            let gone = match unlinkat(directory, name.as_c_str(), UnlinkatFlags::NoRemoveDir) {
                Err(errno) if is_directory(errno) => {
                    // Most directories that overlay leaves behind are empty.
                    match unlinkat(directory, name.as_c_str(), UnlinkatFlags::RemoveDir) {
                        Err(Errno::ENOTEMPTY | Errno::EEXIST | Errno::EACCES) => {
                            self.move_up(directory, &name)
                        }
                        other => other,
                    }
                }
                other => other,
            };
            first_error = first_error.and(gone);
        }
        first_error
    }

    fn move_up(&mut self, directory: &OwnedFd, name: &CStr) -> Result<(), Errno> {
        loop {
            self.count += 1;
            let new_name = CString::new(format!(".removed-{}", self.count)).map_err(|_| Errno::EINVAL)?;
            match renameat(directory, name, self.root, new_name.as_c_str()) {
                Ok(()) => {
                    self.pending.push(new_name);
                    return Ok(());
                }
                // The build may have made something of this name.
                Err(Errno::EEXIST | Errno::ENOTEMPTY | Errno::ENOTDIR) => {}
                Err(Errno::EACCES) => {
                    // Moving a directory writes to its `..`.
                    make_accessible(directory.as_fd(), name)?;
                    renameat(directory, name, self.root, new_name.as_c_str())?;
                    self.pending.push(new_name);
                    return Ok(());
                }
                Err(errno) => return Err(errno),
            }
        }
    }
}

/// Whether this is how `unlink` refuses a directory: EISDIR on Linux, EPERM by POSIX.
fn is_directory(errno: Errno) -> bool {
    matches!(errno, Errno::EISDIR | Errno::EPERM)
}

fn open_to_empty(dir: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    match openat(dir, name, flags, Mode::empty()) {
        Err(Errno::EACCES) => {
            make_accessible(dir, name)?;
            openat(dir, name, flags, Mode::empty())
        }
        opened => opened,
    }
}

fn make_accessible(dir: BorrowedFd<'_>, name: &CStr) -> Result<(), Errno> {
    // The caller found a directory here, and nobody else works on this tree any more.
    fchmodat(dir, name, Mode::S_IRWXU, FchmodatFlags::FollowSymlink)
}

/// The names in a directory, read at once: it is about to change.
fn names(dir: BorrowedFd<'_>) -> Result<Vec<CString>, Errno> {
    // A descriptor of its own, because reading moves the position that copies share.
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let mut listing = Dir::openat(dir, c".", flags, Mode::empty())?;
    let mut names = Vec::new();
    for entry in listing.iter() {
        let name = entry?.file_name().to_owned();
        if name.as_c_str() != c"." && name.as_c_str() != c".." {
            names.push(name);
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn handle(path: &std::path::Path) -> OwnedFd {
        fs::File::open(path).unwrap().into()
    }

    #[test]
    fn trees_made_for_the_cleaner_go_and_nothing_else_does() {
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("kept"), "kept").unwrap();
        let tree = dir.path().join("tree");
        fs::create_dir_all(tree.join("a/b/c")).unwrap();
        fs::create_dir_all(tree.join(".removed-1/.removed-2")).unwrap();
        fs::write(tree.join(".removed-3"), "").unwrap();
        symlink(&outside, tree.join("a/link")).unwrap();
        symlink("..", tree.join("a/b/up")).unwrap();
        fs::write(tree.join("a/b/c/file"), "x").unwrap();
        fs::set_permissions(tree.join("a/b/c"), PermissionsExt::from_mode(0o000)).unwrap();
        fs::set_permissions(tree.join("a/b"), PermissionsExt::from_mode(0o555)).unwrap();
        remove_tree(handle(dir.path()).as_fd(), c"tree").unwrap();
        assert!(!tree.exists());
        assert_eq!(fs::read_to_string(outside.join("kept")).unwrap(), "kept");
    }

    #[test]
    fn ten_thousand_levels_take_no_stack_and_few_descriptors() {
        let dir = tempfile::tempdir().unwrap();
        let mut at = handle(dir.path());
        for _ in 0..10_000 {
            nix::sys::stat::mkdirat(&at, "deep", Mode::S_IRWXU).unwrap();
            at = openat(&at, "deep", OFlag::O_DIRECTORY, Mode::empty()).unwrap();
        }
        remove_contents(handle(dir.path()).as_fd()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_is_not_there_is_removed_already() {
        let dir = tempfile::tempdir().unwrap();
        remove_tree(handle(dir.path()).as_fd(), c"nothing").unwrap();
    }
}
