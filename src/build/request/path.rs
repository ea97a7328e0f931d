//! Paths inside the sandbox.

use std::borrow::Borrow;
use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use crate::castore::Name;
use crate::castore::node::printable;

/// A clean path relative to the sandbox's root: names with one slash between each two, neither `.` nor
/// `..` among them, no NUL. The path of the root itself is empty; it is the default, and made only by
/// [`SandboxPath::root`].
///
/// Paths are ordered by their bytes, slashes included, as the protocol sorts its strings: `a-b` comes
/// before `a/b`.
#[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SandboxPath(Vec<u8>);

impl SandboxPath {
    /// Longest path in bytes: `PATH_MAX` of Linux without the leading slash and the final NUL.
    pub const MAX: usize = libc::PATH_MAX as usize - 2;

    /// Checks `bytes`, which may not be empty.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Result<Self, PathFault> {
        let bytes = bytes.into();
        match bytes.as_slice() {
            [] => return Err(PathFault::Empty),
            [b'/', ..] => return Err(PathFault::Absolute),
            [.., b'/'] => return Err(PathFault::TrailingSlash),
            _ if bytes.len() > Self::MAX => return Err(PathFault::TooLong { len: bytes.len() }),
            _ if bytes.contains(&0) => return Err(PathFault::Nul),
            _ => {}
        }
        for component in bytes.split(|&byte| byte == b'/') {
            match component {
                b"" => return Err(PathFault::DoubleSlash),
                b"." => return Err(PathFault::Dot),
                b".." => return Err(PathFault::DotDot),
                _ if component.len() > Name::MAX => {
                    return Err(PathFault::LongComponent { len: component.len() });
                }
                _ => {}
            }
        }
        Ok(Self(bytes))
    }

    /// The root of the sandbox, whose path is empty.
    pub fn root() -> Self {
        Self(Vec::new())
    }

    /// `tmp`, which every build may write to as to a scratch path.
    pub fn tmp() -> Self {
        Self(b"tmp".to_vec())
    }

    /// `bin/sh`, where a shell appears that the worker provides.
    pub fn shell() -> Self {
        Self(b"bin/sh".to_vec())
    }

    /// Whether this is the root.
    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// The path's bytes, without a leading slash.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The names that lead from the root to here; none for the root.
    pub fn components(&self) -> impl DoubleEndedIterator<Item = &[u8]> {
        // Splitting an empty path would yield one empty name.
        self.0.split(|&byte| byte == b'/').filter(|component| !component.is_empty())
    }

    /// Whether `other` is this path or lies beneath it.
    pub fn contains(&self, other: &Self) -> bool {
        self.beneath(other).is_some()
    }

    /// Whether this path is `prefix` or lies beneath it.
    pub fn starts_with(&self, prefix: &Self) -> bool {
        prefix.contains(self)
    }

    /// This path as seen from `prefix`; the root where they are equal, `None` where this path doesn't
    /// lie there.
    pub fn strip_prefix(&self, prefix: &Self) -> Option<Self> {
        prefix.beneath(self).map(|rest| Self(rest.to_vec()))
    }

    /// What is left of `other` once this path is taken off its front.
    fn beneath<'a>(&self, other: &'a Self) -> Option<&'a [u8]> {
        if self.is_root() {
            return Some(&other.0);
        }
        match other.0.strip_prefix(self.0.as_slice())? {
            [] => Some(&[]),
            [b'/', rest @ ..] => Some(rest),
            _ => None,
        }
    }

    /// The path of `name` in this directory.
    ///
    /// # Errors
    /// [`PathFault::TooLong`].
    pub fn join(&self, name: &Name) -> Result<Self, PathFault> {
        let mut bytes = self.0.clone();
        if !self.is_root() {
            bytes.push(b'/');
        }
        bytes.extend_from_slice(name.as_bytes());
        if bytes.len() > Self::MAX { Err(PathFault::TooLong { len: bytes.len() }) } else { Ok(Self(bytes)) }
    }

    /// This path and those of the directories that it lies in, the longest first, without the root.
    pub fn ancestors(&self) -> impl Iterator<Item = &[u8]> {
        let first = (!self.is_root()).then_some(self.0.as_slice());
        std::iter::successors(first, |path| {
            path.iter().rposition(|&byte| byte == b'/').and_then(|slash| path.get(..slash))
        })
    }

    /// The path as a process in the sandbox writes it: with a leading slash.
    pub fn to_absolute(&self) -> PathBuf {
        let mut bytes = Vec::with_capacity(self.0.len() + 1);
        bytes.push(b'/');
        bytes.extend_from_slice(&self.0);
        PathBuf::from(OsString::from_vec(bytes))
    }
}

impl Borrow<[u8]> for SandboxPath {
    fn borrow(&self) -> &[u8] {
        &self.0
    }
}

impl std::str::FromStr for SandboxPath {
    type Err = PathFault;

    fn from_str(text: &str) -> Result<Self, PathFault> {
        Self::new(text)
    }
}

/// The path for people: what is not printable ASCII is escaped.
impl fmt::Display for SandboxPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&printable(&self.0))
    }
}

impl fmt::Debug for SandboxPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

/// What makes bytes no path in the sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathFault {
    /// There are none.
    #[error("the path is empty")]
    Empty,
    /// The first is a slash.
    #[error("the path starts with a slash; paths are relative to the root of the sandbox")]
    Absolute,
    /// The last is a slash.
    #[error("the path ends with a slash")]
    TrailingSlash,
    /// Two slashes follow one another.
    #[error("the path has two slashes in a row")]
    DoubleSlash,
    /// A component is `.`.
    #[error("the path has a component \".\"")]
    Dot,
    /// A component is `..`.
    #[error("the path has a component \"..\"")]
    DotDot,
    /// There is a NUL among them.
    #[error("the path contains a NUL byte")]
    Nul,
    /// A component is too long.
    #[error("the path has a component of {len} bytes; at most {} are possible", Name::MAX)]
    LongComponent {
        /// Its length in bytes.
        len: usize,
    },
    /// The whole is too long.
    #[error("the path has {len} bytes; at most {} are possible", SandboxPath::MAX)]
    TooLong {
        /// Its length in bytes.
        len: usize,
    },
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn path(text: &str) -> SandboxPath {
        if text.is_empty() { SandboxPath::root() } else { SandboxPath::new(text).unwrap() }
    }

    #[test]
    fn prefixes_are_whole_components() {
        let cases = [
            ("a", "a", Some("")),
            ("a", "a/b", Some("b")),
            ("a/b", "a/b/c/d", Some("c/d")),
            ("", "a/b", Some("a/b")),
            ("", "", Some("")),
            ("a", "ab", None),
            ("a", "a-b/c", None),
            ("a/b", "a", None),
            ("a", "", None),
            ("b", "a/b", None),
        ];
        for (prefix, whole, rest) in cases {
            let (prefix, whole, rest) = (path(prefix), path(whole), rest.map(path));
            assert_eq!(whole.strip_prefix(&prefix), rest, "{prefix} {whole}");
            assert_eq!(prefix.contains(&whole), rest.is_some(), "{prefix} {whole}");
            assert_eq!(whole.starts_with(&prefix), rest.is_some(), "{prefix} {whole}");
        }
    }

    #[test]
    fn parts() {
        let cases: [(&str, &[&str], &[&str], &str); 3] = [
            ("", &[], &[], "/"),
            ("a", &["a"], &["a"], "/a"),
            ("a/b/c", &["a", "b", "c"], &["a/b/c", "a/b", "a"], "/a/b/c"),
        ];
        for (text, components, ancestors, absolute) in cases {
            let path = path(text);
            let text_of = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
            assert_eq!(path.components().map(text_of).collect::<Vec<_>>(), components);
            assert_eq!(path.ancestors().map(text_of).collect::<Vec<_>>(), ancestors);
            assert_eq!(path.to_absolute(), Path::new(absolute));
        }
    }

    #[test]
    fn names_are_appended() {
        let name = Name::new("n").unwrap();
        assert_eq!(SandboxPath::root().join(&name), Ok(path("n")));
        assert_eq!(path("a/b").join(&name), Ok(path("a/b/n")));
        let long = SandboxPath::new(["x"; SandboxPath::MAX / 2].join("/")).unwrap();
        assert_eq!(long.join(&name), Err(PathFault::TooLong { len: SandboxPath::MAX + 1 }));
    }

    #[test]
    fn the_order_is_that_of_the_bytes() {
        let sorted = ["a", "a-b", "a.b", "a/b", "a0", "b"].map(path);
        assert!(sorted.is_sorted());
    }
}
