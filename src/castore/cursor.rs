//! Where a walk through a tree stands.

use std::fmt;

use super::node::{Name, printable};

/// The path from the root of a tree to where a walk stands. As text it is escaped, and the root is `.`.
#[derive(Default)]
pub(super) struct Cursor {
    path: Vec<u8>,
    /// How long the path was before each of its names.
    before: Vec<usize>,
}

impl Cursor {
    /// At the root.
    pub(super) fn new() -> Self {
        Self::default()
    }

    /// Steps down to the entry `name`.
    pub(super) fn enter(&mut self, name: &Name) {
        self.before.push(self.path.len());
        if !self.path.is_empty() {
            self.path.push(b'/');
        }
        self.path.extend_from_slice(name.as_bytes());
    }

    /// Steps up again; at the root, stays there.
    pub(super) fn leave(&mut self) {
        self.rise_to(self.before.len().saturating_sub(1));
    }

    /// Steps up until the path has no more than `depth` names.
    pub(super) fn rise_to(&mut self, depth: usize) {
        if let Some(len) = self.before.get(depth) {
            self.path.truncate(*len);
            self.before.truncate(depth);
        }
    }

    /// The path's bytes; none at the root.
    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.path
    }

    /// As text, where the root is called `root` and all other paths begin with that.
    pub(super) fn below(&self, root: &str) -> String {
        if self.path.is_empty() { root.to_owned() } else { format!("{root}/{self}") }
    }
}

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.path.is_empty() { f.write_str(".") } else { f.write_str(&printable(&self.path)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn down_and_up() {
        let mut cursor = Cursor::new();
        let mut stands = |step: &str, expected: &str| {
            match step {
                "" => cursor.leave(),
                number if number.parse::<usize>().is_ok() => cursor.rise_to(number.parse().unwrap()),
                name => cursor.enter(&Name::new(name).unwrap()),
            }
            assert_eq!((cursor.to_string(), cursor.below("out")), {
                let below = if expected == "." { "out".to_owned() } else { format!("out/{expected}") };
                (expected.to_owned(), below)
            });
        };
        stands("a", "a");
        stands("b\n", "a/b\\n");
        stands("", "a");
        stands("c", "a/c");
        stands("d", "a/c/d");
        stands("3", "a/c/d");
        stands("1", "a");
        stands("", ".");
        stands("", ".");
    }
}
