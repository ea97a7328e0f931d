//! What of a sandbox is the same for one build and the next: it can be made before there is a build to use it.
//!
//! Making namespaces and furnishing a root takes most of a sandbox's time. The spawner makes a frame while a build
//! runs, for the next one of the same kind: see `spawner/stock.rs`. A sandbox is set up by the same code and in the same
//! order whether its frame was waiting or not.

use crate::ids::IdMap;
use crate::plan::{Entry, Mount, MountPoint, Network, Plan, TmpfsSize};
use crate::seccomp;
use crate::ucounts::Share;

/// The frame of a sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// The user namespace.
    pub ids: IdMap,
    /// Whether the network is its own.
    pub network: Own,
    /// Decides on the sandbox's limit of user namespaces.
    pub seccomp: Option<seccomp::Profile>,
    /// Its limits of what else the kernel counts per user.
    pub shares: Vec<Share>,
    /// The root's tmpfs, and what is mounted on it; `None` where the root shows a lower directory.
    pub root: Option<Root>,
}

/// Whether something is the sandbox's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Own {
    /// It is.
    Own,
    /// It is shared with the spawner.
    Shared,
}

/// A furnished root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Root {
    /// What fits into it.
    pub size: TmpfsSize,
    /// Mounts that take nothing of the host but device nodes.
    pub furniture: Vec<MountPoint>,
}

impl Frame {
    /// The frame that a plan needs.
    pub fn of(plan: &Plan) -> Frame {
        let root = || Root {
            size: size_of_root(plan),
            furniture: plan.mounts.iter().filter(|point| is_furniture(plan, point)).cloned().collect(),
        };
        Frame {
            ids: plan.ids.clone(),
            network: match plan.network {
                Network::Host => Own::Shared,
                Network::Own | Network::Pasta { .. } => Own::Own,
            },
            seccomp: plan.seccomp,
            shares: shares(plan),
            root: plan.root.lower.is_none().then(root),
        }
    }
}

/// The limits to be set: those of namespaces only where a build can make any.
fn shares(plan: &Plan) -> Vec<Share> {
    let strict = plan.seccomp == Some(seccomp::Profile::Strict);
    plan.limits.shares.iter().filter(|share| !(strict && share.of.is_namespaces())).copied().collect()
}

/// Whether a mount is part of the frame: it takes nothing of the host but a device node, and lies in no other.
pub fn is_furniture(plan: &Plan, point: &MountPoint) -> bool {
    let constant = match point.mount {
        Mount::Device { .. } | Mount::Proc | Mount::Devpts | Mount::Tmpfs { .. } => true,
        Mount::Writable { .. }
        | Mount::HostPath { .. }
        | Mount::Inputs { .. }
        | Mount::InputsBelow { .. } => false,
    };
    constant && plan.root.lower.is_none() && !lies_in_another(plan, point)
}

/// Whether a mount's place is in another mount.
pub fn lies_in_another(plan: &Plan, MountPoint { at, .. }: &MountPoint) -> bool {
    plan.mounts.iter().any(|other| other.at != *at && at.starts_with(&other.at))
}

/// What the root's tmpfs has to take, rounded up, so that builds that differ little have the same frame.
pub fn size_of_root(plan: &Plan) -> TmpfsSize {
    /// What a file of one byte takes on machines with large pages.
    const PAGE: usize = 65536;
    /// For the directories of an overlay, and the root itself.
    const MORE: usize = 64;
    let entries = plan.root.entries.iter().map(|entry| match entry {
        Entry::Directory { path, .. } => (path, 0),
        Entry::File { path, contents, .. } => (path, contents.len()),
        Entry::Symlink { path, target } => (path, target.as_os_str().len()),
    });
    let all = entries.chain(plan.mounts.iter().map(|mount| (&mount.at, 0)));
    let (bytes, inodes) = all.fold((MORE * PAGE, MORE), |(bytes, inodes), (path, size)| {
        (bytes + size.next_multiple_of(PAGE), inodes + path.components().count())
    });
    TmpfsSize { bytes: bytes.next_power_of_two() as u64, inodes: inodes.next_power_of_two() as u64 }
}
