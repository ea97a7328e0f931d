//! What a sandbox will be: plain data, made before anything is.
//!
//! Paths *inside* the sandbox are relative to its root and clean (no leading `/`, no `.` or `..`).
//! Paths *outside* are sources: absolute, or relative to [`Plan::base`].

use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::cgroup::Controller;
use crate::ids::IdMap;
use crate::pasta::Pasta;
use crate::seccomp;
use crate::ucounts::Share;

/// All that the child needs to know.
#[derive(Debug, Serialize, Deserialize)]
pub struct Plan {
    /// Where relative sources start: an absolute directory outside of the sandbox.
    pub base: PathBuf,
    /// Who the command is, inside and outside.
    pub ids: IdMap,
    /// The root directory. It is read-only once everything is in place.
    pub root: Layer,
    /// What is mounted over the root, parents before children.
    pub mounts: Vec<MountPoint>,
    /// Whose network the command sees.
    pub network: Network,
    /// Which system calls the command is refused. `None`: only what the kernel itself refuses it.
    pub seccomp: Option<seccomp::Profile>,
    /// What more of the outside is kept from the command than namespaces do.
    pub landlock: Landlock,
    /// The cgroup that its processes are started in, absolute; `None`: that of the spawner.
    pub cgroup: Option<PathBuf>,
    /// What it may use.
    pub limits: Limits,
    /// The command.
    pub command: Command,
}

/// A tmpfs with entries, laid over a lower directory if there is one.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Layer {
    /// A directory whose contents show through.
    pub lower: Option<PathBuf>,
    /// What is put into the tmpfs, parents before children.
    pub entries: Vec<Entry>,
}

/// Something that is put into a tmpfs. Missing parents are made as directories of mode 0755.
#[derive(Debug, Serialize, Deserialize)]
pub enum Entry {
    /// A directory.
    Directory {
        /// Where.
        path: PathBuf,
        /// Permission bits.
        mode: u32,
    },
    /// A regular file.
    File {
        /// Where.
        path: PathBuf,
        /// Permission bits.
        mode: u32,
        /// What it holds.
        contents: Vec<u8>,
    },
    /// A symbolic link.
    Symlink {
        /// Where.
        path: PathBuf,
        /// What it points to.
        target: PathBuf,
    },
}

/// A mount and its place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountPoint {
    /// Where in the sandbox. What isn't there is made: a directory, or a file where the source is none.
    pub at: PathBuf,
    /// What.
    pub mount: Mount,
}

/// What can be mounted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mount {
    /// A directory that the command may write to.
    Writable {
        /// The directory.
        source: PathBuf,
    },
    /// A file, directory or device of the host with all that is mounted below it, read-only.
    HostPath {
        /// The path, absolute and free of symbolic links.
        source: PathBuf,
    },
    /// The inputs, read-only.
    Inputs {
        /// The directory that holds them.
        source: PathBuf,
    },
    /// The inputs with a directory over them that receives what is written.
    InputsBelow {
        /// The directory that holds them.
        lower: PathBuf,
        /// Receives what is written.
        upper: PathBuf,
        /// An empty directory on the same file system as `upper`.
        work: PathBuf,
        /// Who may write: the command too, or only whoever makes mount points in it.
        access: Access,
    },
    /// One of the host's device nodes.
    Device {
        /// Its path, absolute.
        source: PathBuf,
    },
    /// A fresh procfs.
    Proc,
    /// A fresh devpts.
    Devpts,
    /// An empty tmpfs.
    Tmpfs {
        /// Permission bits of its root.
        mode: u32,
        /// How much fits.
        size: TmpfsSize,
    },
}

/// How much fits into a tmpfs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TmpfsSize {
    /// Bytes of all files together.
    pub bytes: u64,
    /// Files, directories and links.
    pub inodes: u64,
}

/// What a build may use; `None`: as much as the program itself. What its cgroup can't count, resource limits do, as far
/// as they go (`setrlimit(2)`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// What its cgroup counts.
    pub controllers: Vec<Controller>,
    /// Bytes of memory: of all together where the cgroup counts it, else of each process's heap and what else it has
    /// mapped for itself to write to, touched or not; neither of files that are mapped nor of shared memory.
    pub memory: Option<u64>,
    /// Bytes of swap beside that, where a cgroup limits it.
    pub swap: Option<u64>,
    /// Processes and threads, two of which are the sandbox's own and the command.
    pub processes: Option<u64>,
    /// The build's share of processors that are short, 100 being usual, where a cgroup deals them out.
    pub cpu_weight: Option<u16>,
    /// Bytes of each file.
    pub file_size: Option<u64>,
    /// What the kernel counts per user.
    pub shares: Vec<Share>,
}

/// What the command may do to a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Access {
    /// Read.
    ReadOnly,
    /// Read and write.
    ReadWrite,
}

/// Whose network the command sees.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Network {
    /// A namespace of its own, with loopback alone.
    Own,
    /// A namespace of its own that reaches what the host reaches, but not the host's loopback. The command starts once
    /// it does. Where pasta ends before the command, so does the command.
    Pasta {
        /// The program that connects it.
        pasta: Pasta,
        /// Addresses in the namespace, at most one of each family, at which the first name server of its family answers
        /// that the host's `/etc/resolv.conf` has.
        name_servers: Vec<IpAddr>,
    },
    /// The host's.
    Host,
}

/// What more of the outside is kept from the command than namespaces do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Landlock {
    /// Nothing.
    Off,
    /// Abstract unix sockets and signals. The kernel must have them ([`ABI_OF_SCOPES`](crate::landlock::ABI_OF_SCOPES)).
    Scoped,
}

/// The command and what it starts with. Byte strings hold no NUL.
#[derive(Debug, Serialize, Deserialize)]
pub struct Command {
    /// The program. Without a slash it is looked for in the `PATH` of `environment`.
    pub program: Vec<u8>,
    /// `argv`, the program's own name first.
    pub arguments: Vec<Vec<u8>>,
    /// The whole environment, each `KEY=VALUE`.
    pub environment: Vec<Vec<u8>>,
    /// Where it starts, in the sandbox.
    pub working_dir: PathBuf,
}
