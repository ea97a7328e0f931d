//! Reads and walks trees by descriptor, in the order in which directories list them, as tar and find do.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::dir::{Dir, Type};
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, openat};
use nix::sys::stat::{Mode, fstatat};

/// What was come upon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum {
    pub files: u64,
    pub bytes: u64,
}

/// Opens every file, reads it to its end, closes it. In one thread.
pub fn read(top: &Path) -> Sum {
    let mut buffer = vec![0; 128 << 10];
    let mut sum = Sum::default();
    let mut file = |dir: BorrowedFd, name: &std::ffi::CStr| {
        let file = openat(dir, name, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).unwrap();
        sum.files += 1;
        loop {
            match nix::unistd::read(&file, &mut buffer).unwrap() {
                0 => break,
                read => sum.bytes += read as u64,
            }
        }
    };
    each(open(AT_FDCWD, top), &mut |dir, name, kind| {
        if kind == Type::File {
            file(dir, name);
        }
    });
    sum
}

/// Looks at the attributes of everything.
pub fn walk(top: &Path) -> Sum {
    let mut sum = Sum::default();
    each(open(AT_FDCWD, top), &mut |dir, name, kind| {
        let found = fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW).unwrap();
        if kind == Type::File {
            sum.files += 1;
            sum.bytes += found.st_size as u64;
        }
    });
    sum
}

fn open(dir: impl AsFd, name: &(impl nix::NixPath + ?Sized)) -> OwnedFd {
    openat(dir, name, OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()).unwrap()
}

/// Shows `visit` each entry of a directory, and then those of the directories in it. These trees are shallow.
fn each(dir: OwnedFd, visit: &mut impl FnMut(BorrowedFd, &std::ffi::CStr, Type)) {
    let mut dir = Dir::from_fd(dir).unwrap();
    let at = dir.as_fd().try_clone_to_owned().unwrap();
    let mut below = Vec::new();
    for entry in dir.iter() {
        let entry = entry.unwrap();
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let kind = entry.file_type().unwrap();
        visit(at.as_fd(), name, kind);
        if kind == Type::Directory {
            below.push(name.to_owned());
        }
    }
    for name in below {
        each(open(&at, name.as_c_str()), visit);
    }
}
