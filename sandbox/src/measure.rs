//! How much a tree takes on disk, while whoever it belongs to may be changing it.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat};

/// What a tree takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes on disk.
    pub bytes: u64,
    /// Files, directories, links and all else.
    pub inodes: u64,
    /// Length of the longest file in bytes, whether they are on disk or not.
    pub longest_file: u64,
}

/// Whether to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Walk {
    /// To the end.
    GoOn,
    /// What was counted so far will do.
    Stop,
}

/// Measures what lies in `dir`, until all is counted or `ask` has enough.
///
/// A walk by descriptor: no symbolic link is followed, nothing outside of `dir` is reached, and a tree of any depth takes
/// few descriptors and no recursion. What vanishes meanwhile does not count, and what moves may count twice or not at
/// all. A file that has no name any more is not found.
pub fn measure(dir: BorrowedFd<'_>, mut ask: impl FnMut(&Usage) -> Walk) -> Result<Usage, Errno> {
    let mut walker = Walker { usage: Usage::default(), levels: Vec::new() };
    let mut at = open(dir, c".")?;
    loop {
        let Ok(level) = walker.list(&at, &mut ask)? else { return Ok(walker.usage) };
        walker.levels.push(level);
        at = match walker.next(at) {
            Some(next) => next,
            None => return Ok(walker.usage),
        };
    }
}

/// How many levels keep a descriptor each. Below them the way back leads through `..`.
const OPEN_LEVELS: usize = 64;

struct Walker {
    usage: Usage,
    /// From the top to where the walk is.
    levels: Vec<Level>,
}

/// A directory on the way.
struct Level {
    /// Device and inode.
    id: (u64, u64),
    /// `None` below the first levels, and for the last one.
    kept: Option<OwnedFd>,
    /// Directories in it that are still to be visited.
    pending: Vec<CString>,
}

/// The walk is to end.
struct Enough;

impl Walker {
    /// Counts what is in a directory.
    fn list(
        &mut self,
        at: &OwnedFd,
        ask: &mut impl FnMut(&Usage) -> Walk,
    ) -> Result<Result<Level, Enough>, Errno> {
        let mut level = Level { id: id(&fstat(at)?), kept: None, pending: Vec::new() };
        // A descriptor of its own, because reading moves the position that copies share.
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut listing = Dir::openat(at, c".", flags, Mode::empty())?;
        for entry in listing.iter() {
            // What can't be read any more has been removed.
            let Ok(entry) = entry else { break };
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            let Ok(found) = fstatat(at, name, AtFlags::AT_SYMLINK_NOFOLLOW) else { continue };
            if self.count(&found) {
                level.pending.push(name.to_owned());
            }
            if ask(&self.usage) == Walk::Stop {
                return Ok(Err(Enough));
            }
        }
        Ok(Ok(level))
    }

    /// Adds a file. Yields whether it is a directory.
    fn count(&mut self, found: &FileStat) -> bool {
        let kind = SFlag::from_bits_truncate(found.st_mode) & SFlag::S_IFMT;
        let bytes = u64::try_from(found.st_blocks).unwrap_or(0).saturating_mul(512);
        self.usage.inodes += 1;
        match kind {
            SFlag::S_IFDIR => self.usage.bytes += bytes,
            // All names of a file lie in this tree: each brings its part.
            _ => self.usage.bytes += bytes / found.st_nlink.max(1),
        }
        if kind == SFlag::S_IFREG {
            self.usage.longest_file = self.usage.longest_file.max(u64::try_from(found.st_size).unwrap_or(0));
        }
        kind == SFlag::S_IFDIR
    }

    /// The next directory to list, `at` being the last one that was.
    fn next(&mut self, at: OwnedFd) -> Option<OwnedFd> {
        let mut at = Some(at);
        loop {
            let depth = self.levels.len();
            let level = self.levels.last_mut()?;
            let here = match (&at, &level.kept) {
                (Some(here), _) => Some(here.as_fd()),
                (None, Some(kept)) => Some(kept.as_fd()),
                // The way back to it was lost: what is left of it is not counted.
                (None, None) => None,
            };
            if let Some(here) = here {
                while let Some(name) = level.pending.pop() {
                    // It may have been removed, or replaced by something else.
                    let Ok(below) = open(here, &name) else { continue };
                    if depth <= OPEN_LEVELS && level.kept.is_none() {
                        level.kept = at;
                    }
                    return Some(below);
                }
            }
            // Up, but only to where the walk came from: the directory may have been moved.
            let above = here.and_then(|here| open(here, c"..").ok());
            self.levels.pop();
            let expected = self.levels.last()?.id;
            at = above.filter(|above| fstat(above).is_ok_and(|found| id(&found) == expected));
        }
    }
}

fn id(found: &FileStat) -> (u64, u64) {
    (found.st_dev, found.st_ino)
}

fn open(dir: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    openat(dir, name, flags, Mode::empty())
}

/// Makes what a process is seen to use what it does use: gives memory that it has freed back to the kernel.
pub fn trim_own_memory() {
    crate::sys::trim_memory();
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::Path;

    use super::*;

    fn usage_of(path: &Path) -> Usage {
        measure(fs::File::open(path).unwrap().as_fd(), |_| Walk::GoOn).unwrap()
    }

    #[test]
    fn everything_counts_once_and_links_lead_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        fs::create_dir_all(tree.join("a/b/c")).unwrap();
        fs::create_dir_all(tree.join("a/d")).unwrap();
        fs::write(dir.path().join("outside"), vec![1; 1 << 20]).unwrap();
        symlink("../outside", tree.join("link")).unwrap();
        symlink("..", tree.join("a/up")).unwrap();
        fs::write(tree.join("a/b/c/file"), vec![1; 256 << 10]).unwrap();
        let before = usage_of(&tree);
        // a, b, c, d, two links, one file.
        assert_eq!((before.inodes, before.longest_file), (7, 256 << 10));
        assert!(((256 << 10)..(1 << 20)).contains(&before.bytes), "{before:?}");
        fs::hard_link(tree.join("a/b/c/file"), tree.join("a/second")).unwrap();
        let with_link = usage_of(&tree);
        assert_eq!((with_link.inodes, with_link.bytes), (8, before.bytes));
        fs::File::create(tree.join("sparse")).unwrap().set_len(1 << 40).unwrap();
        let with_hole = usage_of(&tree);
        assert_eq!((with_hole.longest_file, with_hole.bytes), (1 << 40, before.bytes));
    }

    #[test]
    fn a_deep_tree_is_walked_down_and_up_again() {
        const LEVELS: u64 = 3000;
        let dir = tempfile::tempdir().unwrap();
        let mut at: OwnedFd = fs::File::open(dir.path()).unwrap().into();
        for _ in 0..LEVELS {
            for name in ["deep", "side"] {
                nix::sys::stat::mkdirat(&at, name, Mode::S_IRWXU).unwrap();
            }
            at = openat(&at, "deep", OFlag::O_DIRECTORY, Mode::empty()).unwrap();
        }
        assert_eq!(usage_of(dir.path()).inodes, 2 * LEVELS);
        crate::scratch::remove_contents(fs::File::open(dir.path()).unwrap().as_fd()).unwrap();
    }

    #[test]
    fn who_has_enough_is_asked_no_more() {
        let dir = tempfile::tempdir().unwrap();
        for name in 0..100 {
            fs::write(dir.path().join(name.to_string()), "").unwrap();
        }
        let handle = fs::File::open(dir.path()).unwrap();
        let stop = |usage: &Usage| if usage.inodes == 7 { Walk::Stop } else { Walk::GoOn };
        assert_eq!(measure(handle.as_fd(), stop).unwrap().inodes, 7);
    }
}
