//! Runs one command in Linux namespaces made for it.
//!
//! ```text
//! main process                     spawner                          sandbox
//! ids::enter() ── own namespaces
//! Spawner::start() ───── exec ───▶ serves, single-threaded
//! spawner.spawn(plan) ── memfd ──▶ clone3, id maps ───────────────▶ child: pid 1, the build: pid 2
//! Report::from_bytes() ◀────────── waits, words the end ◀────────── status pipe
//! ```
//!
//! [`Plan`] says what the command will see: plain data, made without a system call. The spawner is a process of
//! its own with one thread, so the child may allocate and take its time between `clone3` and `execve`; it is this very
//! program, so `main` begins with [`serve_if_spawner`]. This crate knows nothing of builds, stores or gRPC.
//!
//! Nothing here mounts anything on the host: [`ids::enter`] moves the program into a mount namespace of
//! its own, and every sandbox has one below that.

#![cfg(target_os = "linux")]

pub mod attack;
pub mod cgroup;
mod child;
mod frame;
pub mod ids;
pub mod landlock;
pub mod measure;
mod message;
pub mod pasta;
pub mod plan;
pub mod probe;
mod report;
mod sabotage;
pub mod scratch;
pub mod seccomp;
mod sources;
mod spawner;
mod sys;
pub mod ucounts;
pub mod users;

pub use ids::{IdMap, Identity, Owner};
pub use pasta::Pasta;
pub use plan::{
    Access, Command, Entry, Landlock, Layer, Limits, Mount, MountPoint, Network, Plan, TmpfsSize,
};
pub use report::{ExitStatus, Report, SetupFailure, Step};
pub use spawner::{Leftovers, Sandbox, SpawnError, Spawner, Stdio, Stock, serve_if_spawner};
