//! What is asked for: a checked build request.
//!
//! A [`Draft`] holds typed parts, a [`Request`] parts that also agree with each other. Requests come
//! from callers in this process by [`Request::new`], from the wire by `try_from`, and from people as
//! JSON by [`Request::from_json`]. Later stages see nothing but [`Request`].

mod check;
mod error;
mod path;
mod wire;

#[cfg(test)]
mod cases;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Deref;
use std::path::PathBuf;

use crate::castore::{Name, Node};

pub use error::{InvalidRequest, Relation, RequestFault, RequestJsonError};
pub use path::{PathFault, SandboxPath};

/// How much one request may ask for.
pub mod limits {
    /// Most inputs.
    pub const INPUTS: usize = 1_000_000;
    /// Most outputs.
    pub const OUTPUTS: usize = 1_000;
    /// Most scratch paths.
    pub const SCRATCH_PATHS: usize = 1_000;
    /// Most paths of the worker's own file system.
    pub const RO_PATHS: usize = 1_000;
    /// Most needles.
    pub const NEEDLES: usize = 100_000;
    /// Most bytes in all needles together: the automaton that searches for them takes some fifty times as much memory.
    pub const NEEDLE_BYTES: usize = 4 << 20;
    /// Most additional files.
    pub const ADDITIONAL_FILES: usize = 10_000;
    /// Most bytes in all additional files together.
    pub const ADDITIONAL_BYTES: usize = 100 << 20;
    /// Most bytes in one argument, or in one variable with its name and `=`: `MAX_ARG_STRLEN` of Linux
    /// without the final NUL.
    pub const EXEC_STRING_BYTES: usize = (128 << 10) - 1;
    /// Most bytes in arguments and environment together, as Linux counts them: each string with its
    /// NUL and the pointer to it. A quarter of the usual stack limit of 8 MiB.
    pub const EXEC_BYTES: usize = 2 << 20;
    /// Most bytes in the name of a system.
    pub const SYSTEM_BYTES: usize = 64;
}

/// The parts of a request, each valid by itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Draft {
    /// What appears under `inputs_dir`, by name.
    pub inputs: BTreeMap<Name, Node>,
    /// The program and its arguments.
    pub command: Vec<Vec<u8>>,
    /// Where the command starts.
    pub working_dir: SandboxPath,
    /// Directories that the build may write to; empty at its start.
    pub scratch_paths: BTreeSet<SandboxPath>,
    /// Where the inputs appear; may be the root.
    pub inputs_dir: SandboxPath,
    /// What the build is to leave behind, in the client's order.
    pub outputs: Vec<SandboxPath>,
    /// The whole environment.
    pub environment: BTreeMap<Vec<u8>, Vec<u8>>,
    /// What the worker must offer.
    pub constraints: Constraints,
    /// Files that are written before the build starts, with their contents.
    pub additional_files: BTreeMap<SandboxPath, Vec<u8>>,
    /// Byte strings that the outputs are searched for. They may repeat and nest.
    pub needles: Vec<Vec<u8>>,
}

/// What the worker must offer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Constraints {
    /// The platform that the command needs, such as `x86_64-linux`; `None`: whatever this one is.
    pub system: Option<String>,
    /// Memory in bytes that the build must be able to use; 0: no matter.
    pub min_memory: u64,
    /// Paths of the worker's own file system that are to appear read-only in the sandbox.
    pub ro_paths: Vec<PathBuf>,
    /// Whether the build needs the network.
    pub network: Network,
    /// Whether `/bin/sh` must be there.
    pub shell: Shell,
}

/// Whether a build needs the network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Network {
    /// It gets a loopback of its own and nothing else.
    #[default]
    None,
    /// It must reach other machines.
    Required,
}

/// Whether a build needs a shell from the worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Shell {
    /// It brings what it needs.
    #[default]
    None,
    /// `/bin/sh` must be there.
    Required,
}

/// A valid build request: a [`Draft`] whose parts agree with each other and keep the [`limits`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request(Draft);

impl Request {
    /// Checks `draft`.
    ///
    /// # Errors
    /// Names the first field at fault as the wire calls it, and says what is wrong with it. Maps and
    /// sets count as lists in ascending order.
    pub fn new(draft: Draft) -> Result<Self, InvalidRequest> {
        check::all(&draft)?;
        Ok(Self(draft))
    }

    /// The parts, to make another request of.
    pub fn into_draft(self) -> Draft {
        self.0
    }
}

impl Deref for Request {
    type Target = Draft;

    fn deref(&self) -> &Draft {
        &self.0
    }
}

impl Draft {
    /// The longest scratch path that `path` is or lies in.
    fn owner_of(&self, path: &SandboxPath) -> Option<&SandboxPath> {
        path.ancestors().find_map(|ancestor| self.scratch_paths.get(ancestor))
    }
}
