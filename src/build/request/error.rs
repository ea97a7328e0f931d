//! What makes a request invalid.

use std::fmt;

use cofferdam_proto::json::JsonError;

use super::limits;
use super::path::{PathFault, SandboxPath};
use crate::castore::NodeError;

/// A request that can't be carried out by any worker.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {fault}")]
pub struct InvalidRequest {
    /// The field at fault as the wire calls it, such as `outputs[3]` or `environment_vars[2].key`.
    pub field: String,
    /// What is wrong with it.
    pub fault: RequestFault,
}

impl InvalidRequest {
    pub(super) fn new(field: impl Into<String>, fault: impl Into<RequestFault>) -> Self {
        Self { field: field.into(), fault: fault.into() }
    }
}

/// What is wrong with a field of a request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestFault {
    /// It is no path in the sandbox.
    #[error("{0}")]
    Path(#[from] PathFault),
    /// It is no entry of a directory.
    #[error("{0}")]
    Node(#[from] NodeError),
    /// It is empty.
    #[error("is empty; {needed} is needed")]
    Empty {
        /// What should be there.
        needed: &'static str,
    },
    /// It contains a NUL byte.
    #[error("contains a NUL byte")]
    Nul,
    /// The name of a variable contains `=`.
    #[error("contains \"=\", which ends the name of an environment variable")]
    EqualsSign,
    /// It is less than the one before.
    #[error("\"{item}\" stands after \"{previous}\"; the list must ascend, byte by byte")]
    Unsorted {
        /// The item that stands too late, escaped.
        item: String,
        /// The item before it, escaped.
        previous: String,
    },
    /// It is there already.
    #[error("\"{item}\" stands twice")]
    Duplicate {
        /// The item, escaped.
        item: String,
    },
    /// There are too many items.
    #[error("has {count} items; at most {limit} are possible")]
    TooMany {
        /// How many there are.
        count: usize,
        /// How many there may be.
        limit: usize,
    },
    /// There are too many bytes.
    #[error("has {len} bytes; at most {limit} are possible")]
    TooLong {
        /// How many there are.
        len: usize,
        /// How many there may be.
        limit: usize,
    },
    /// Linux would refuse to execute a program with so much.
    #[error(
        "arguments and environment take {len} bytes; at most {} are possible (E2BIG), \
         so pass large values in files",
        limits::EXEC_BYTES
    )]
    ExecTooLong {
        /// How many bytes they take: each with its NUL and a pointer.
        len: usize,
    },
    /// It lies where the sandbox puts things of its own.
    #[error("\"{path}\" lies in /{tree}, which the sandbox furnishes itself")]
    Reserved {
        /// The path.
        path: SandboxPath,
        /// The directory at the root that it lies in.
        tree: &'static str,
    },
    /// It is in the way of something else.
    #[error("\"{path}\" {relation} {other} \"{other_path}\"")]
    Conflict {
        /// The path.
        path: SandboxPath,
        /// How the two lie.
        relation: Relation,
        /// What the other is.
        other: String,
        /// The other's path.
        other_path: SandboxPath,
    },
    /// An output lies in no scratch path.
    #[error("\"{path}\" lies in no scratch path; a build can write nowhere else")]
    NoScratch {
        /// The output.
        path: SandboxPath,
    },
    /// It is not the name of a system.
    #[error("\"{system}\" names no system; a name like \"x86_64-linux\" is needed")]
    System {
        /// The name, escaped.
        system: String,
    },
    /// A host path isn't absolute.
    #[error("\"{path}\" is not absolute; it names a place on the worker, and must start with a slash")]
    RelativeHostPath {
        /// The path, escaped.
        path: String,
    },
    /// The worker's whole file system is asked for.
    #[error("the worker's whole file system can't be had")]
    HostRoot,
    /// The wire takes only UTF-8 here.
    #[error("is not UTF-8, which a request to another machine must be")]
    NotUtf8,
}

/// How one path lies to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Relation {
    /// They are the same.
    Equals,
    /// It lies beneath the other.
    Within,
    /// The other lies beneath it.
    Contains,
}

impl Relation {
    /// How `path` lies to `other`; `None` where neither contains the other.
    pub(super) fn of(path: &SandboxPath, other: &SandboxPath) -> Option<Self> {
        match (path.contains(other), other.contains(path)) {
            (true, true) => Some(Self::Equals),
            (true, false) => Some(Self::Contains),
            (false, true) => Some(Self::Within),
            (false, false) => None,
        }
    }
}

impl fmt::Display for Relation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Equals => "is also",
            Self::Within => "lies within",
            Self::Contains => "contains",
        })
    }
}

/// Why a text is no request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestJsonError {
    /// It is not the JSON form of a `BuildRequest`.
    #[error("{0}")]
    Json(#[from] JsonError),
    /// It is, but of an invalid one.
    #[error("{0}")]
    Invalid(#[from] InvalidRequest),
}
