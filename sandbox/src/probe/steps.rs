//! The steps: what each is called, what it is for, and what its want costs.

use serde::{Deserialize, Serialize};

/// What is lost where a step does not work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Builds.
    Builds,
    /// A layer of the sandbox, or a kind of build.
    Layer,
    /// Nothing.
    Information,
}

impl Need {
    /// The name for programs.
    pub fn id(self) -> &'static str {
        match self {
            Need::Builds => "builds",
            Need::Layer => "layer",
            Need::Information => "information",
        }
    }
}

/// What steps are grouped by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Area {
    /// The kernel, the namespaces.
    Namespaces,
    /// User and group ids.
    Ids,
    /// The sandbox's file system.
    Mounts,
    /// How inputs are shown.
    Inputs,
    /// The sandbox's network.
    Network,
    /// What a build can't do.
    Confinement,
    /// What the spawner uses.
    Processes,
    /// Memory, processes, time.
    Limits,
    /// Where the store and the scratch space lie.
    State,
    /// Everything at once.
    Whole,
}

impl Area {
    /// The name for programs.
    pub fn id(self) -> &'static str {
        match self {
            Area::Namespaces => "namespaces",
            Area::Ids => "ids",
            Area::Mounts => "mounts",
            Area::Inputs => "inputs",
            Area::Network => "network",
            Area::Confinement => "confinement",
            Area::Processes => "processes",
            Area::Limits => "limits",
            Area::State => "state",
            Area::Whole => "whole",
        }
    }
}

/// Declares the steps, one a line: `Name, "id", area, need, "title", "what its want costs"`.
macro_rules! steps {
    ($($(#[$doc:meta])* $name:ident, $id:literal, $area:ident, $need:ident, $title:literal, $costs:literal;)*) => {
        /// A step that a build needs, or that makes its sandbox stronger.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
        pub enum Step { $(#[doc = $title] $name,)* }

        impl Step {
            /// All of them, in the order in which they are told.
            pub const ALL: &[Step] = &[$(Step::$name,)*];

            /// The name for programs.
            pub fn id(self) -> &'static str {
                match self { $(Step::$name => $id,)* }
            }

            /// The group it is in.
            pub fn area(self) -> Area {
                match self { $(Step::$name => Area::$area,)* }
            }

            /// What is lost without it.
            pub fn need(self) -> Need {
                match self { $(Step::$name => Need::$need,)* }
            }

            /// The name for people.
            pub fn title(self) -> &'static str {
                match self { $(Step::$name => $title,)* }
            }

            /// What its want costs, in words; empty for what is only information.
            pub fn costs(self) -> &'static str {
                match self { $(Step::$name => $costs,)* }
            }
        }
    };
}

const _: () = assert!(Step::ALL.len() < 64);

steps! {
    Kernel, "kernel", Namespaces, Information, "kernel", "";
    UserNamespace, "user-namespace", Namespaces, Builds, "user namespace", "no build can run";
    MountNamespace, "mount-namespace", Namespaces, Builds, "mount namespace", "no build can run";
    PidNamespace, "pid-namespace", Namespaces, Builds, "pid namespace", "no build can run";
    NetworkNamespace, "network-namespace", Namespaces, Builds, "network namespace", "no build can run";
    IpcNamespace, "ipc-namespace", Namespaces, Builds, "ipc namespace", "no build can run";
    UtsNamespace, "uts-namespace", Namespaces, Builds, "uts namespace", "no build can run";
    CgroupNamespace, "cgroup-namespace", Namespaces, Builds, "cgroup namespace", "no build can run";
    Enter, "enter", Namespaces, Builds, "namespaces of the program's own", "no build can run";
    Clone, "clone3", Namespaces, Builds, "a sandbox's namespaces at once, by clone3", "no build can run";
    NestedNamespaces, "nested-namespaces", Namespaces, Layer, "user namespaces within a build",
        "builds that sandbox parts of themselves fail";

    SubIds, "sub-ids", Ids, Layer, "subordinate ids in /etc/subuid and /etc/subgid",
        "builds run under the user's own id";
    IdHelpers, "id-helpers", Ids, Layer, "newuidmap and newgidmap", "builds run under the user's own id";
    BuildIds, "build-ids", Ids, Layer, "ids of builds' own", "all builds share one user id, and its limits";
    IdMaps, "id-maps", Ids, Builds, "id maps of a build", "no build can run";
    Groups, "groups", Ids, Layer, "dropping supplementary groups",
        "builds may read what the user's groups may read of allowed host paths";

    Propagation, "mount-propagation", Mounts, Builds, "cutting mount propagation", "no build can run";
    Tmpfs, "tmpfs", Mounts, Builds, "tmpfs, by fsopen and fsmount", "no build can run";
    BindMounts, "bind-mounts", Mounts, Builds, "open_tree, mount_setattr, move_mount", "no build can run";
    Proc, "proc", Mounts, Builds, "a fresh /proc", "no build can run";
    Devpts, "devpts", Mounts, Builds, "devpts", "no build can run";
    Devices, "devices", Mounts, Builds, "the host's device nodes", "no build can run";
    Overlay, "overlay", Mounts, Builds, "overlay with userxattr, on tmpfs",
        "builds with a root file system of their own can't run";
    Pivot, "pivot-root", Mounts, Builds, "pivot_root", "no build can run";

    FuseDevice, "fuse-device", Inputs, Layer, "/dev/fuse",
        "inputs are laid out as files for each build, which takes time and space";
    FuseMount, "fuse-mount", Inputs, Layer, "a FUSE mount in namespaces of our own",
        "inputs are laid out as files for each build, which takes time and space";

    Loopback, "loopback", Network, Builds, "loopback in a network namespace", "no build can run";
    Pasta, "pasta", Network, Layer, "pasta and its device, installed",
        "builds with network share the host's";

    HostName, "host-name", Confinement, Builds, "host and domain name", "no build can run";
    Keyring, "keyring", Confinement, Builds, "a session keyring of a build's own", "no build can run";
    ResourceLimits, "resource-limits", Confinement, Builds, "resource limits", "no build can run";
    DropPrivileges, "drop-privileges", Confinement, Builds, "no ids, no capabilities, no_new_privs", "no build can run";
    Seccomp, "seccomp", Confinement, Builds, "system call filters", "no build can run";
    NoUserNamespaces, "no-user-namespaces", Confinement, Layer, "closing user namespaces to a build",
        "builds under the strict profile fail";
    Landlock, "landlock", Confinement, Layer, "landlock", "no second wall around abstract sockets and signals";
    Personality, "personality", Confinement, Layer, "addresses that are the same in every run",
        "builds that print addresses differ from run to run";

    ParentDeath, "parent-death", Processes, Builds, "children that die with their parent", "no build can run";
    Pidfd, "pidfd", Processes, Builds, "clone3 with a pidfd", "no build can run";
    CloseRange, "close-range", Processes, Builds, "close_range", "no build can run";
    Memfd, "memfd", Processes, Builds, "memfd_create", "no build can run";
    Spawner, "spawner", Processes, Builds, "the spawner, from a read-only mount of this program", "no build can run";

    Cgroup, "cgroup", Limits, Layer, "a part of the cgroup tree (v2) to divide",
        "memory and processes are limited by resource limits alone, processors not";
    CgroupControllers, "cgroup-controllers", Limits, Layer, "cgroup controllers: cpu, memory, pids",
        "memory and processes are limited by resource limits alone, processors not";
    CgroupKill, "cgroup-kill", Limits, Layer, "cgroup.kill", "builds are ended by their pid namespace alone";

    StateDirectory, "state-directory", State, Builds, "state directory", "no build can run";
    StateSpace, "state-space", State, Layer, "free space and inodes", "builds may fill the disk";
    StateExecute, "state-execute", State, Builds, "executing what builds make", "builds can't run programs they made";
    StateOverlay, "state-overlay", State, Builds, "overlay with userxattr, on the state directory's disk",
        "builds whose inputs and outputs share a directory, as in nix/store, can't run";
    StateAttributes, "state-attributes", State, Layer, "user extended attributes",
        "builds that replace a directory of their inputs fail";
    Reflink, "reflink", State, Information, "copies that share blocks", "";
    Kvm, "kvm", State, Information, "/dev/kvm", "";

    WholeSandbox, "whole-sandbox", Whole, Builds, "a whole sandbox", "no build can run";
    WholeBuild, "whole-build", Whole, Builds, "a whole build, with an input", "no build can run";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_step_has_an_id_of_its_own_and_says_what_its_want_costs() {
        let mut ids: Vec<&str> = Step::ALL.iter().map(|step| step.id()).collect();
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), Step::ALL.len());
        for step in Step::ALL {
            assert_eq!(step.costs().is_empty(), step.need() == Need::Information, "{}", step.id());
        }
        assert!(Step::ALL.is_sorted());
    }
}
