//! Layers of the sandbox that a test leaves out, to prove that the probes notice.
//!
//! Without the feature `sabotage` there is no such thing: [`kept`] is then always true, at compile time. With it,
//! `COFFERDAM_WITHOUT` names the layers, separated by commas, as the program is started.

/// A part of the sandbox that can be left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// No capabilities.
    Capabilities,
    /// `no_new_privs`.
    NoNewPrivs,
    /// Processes that can't be traced, though they have the build's user id.
    Dumpable,
    /// A read-only root.
    ReadOnlyRoot,
    /// The network namespace.
    Network,
    /// The ipc namespace.
    Ipc,
    /// The uts namespace.
    Uts,
    /// The cgroup namespace.
    CgroupNamespace,
    /// What covers parts of `/proc`.
    ProcMasks,
    /// A session keyring of the build's own.
    Keyring,
    /// Closing what is not the build's.
    Descriptors,
    /// A session of the build's own.
    Session,
    /// The system call filter, and what else its profile forbids.
    Seccomp,
    /// The Landlock domain.
    Landlock,
    /// Resource limits.
    Limits,
    /// `nosuid` and `nodev`.
    MountFlags,
    /// The standard umask and signal actions.
    Signals,
}

#[cfg(feature = "sabotage")]
mod switch {
    use std::sync::OnceLock;

    use super::Layer;

    /// Names the layers.
    pub const VARIABLE: &str = "COFFERDAM_WITHOUT";

    impl Layer {
        fn name(self) -> &'static str {
            match self {
                Layer::Capabilities => "capabilities",
                Layer::NoNewPrivs => "no-new-privs",
                Layer::Dumpable => "dumpable",
                Layer::ReadOnlyRoot => "read-only-root",
                Layer::Network => "network",
                Layer::Ipc => "ipc",
                Layer::Uts => "uts",
                Layer::CgroupNamespace => "cgroup-namespace",
                Layer::ProcMasks => "proc-masks",
                Layer::Keyring => "keyring",
                Layer::Descriptors => "descriptors",
                Layer::Session => "session",
                Layer::Seccomp => "seccomp",
                Layer::Landlock => "landlock",
                Layer::Limits => "limits",
                Layer::MountFlags => "mount-flags",
                Layer::Signals => "signals",
            }
        }
    }

    /// What is left out, as the variable has it.
    pub fn left_out() -> &'static str {
        static LEFT_OUT: OnceLock<String> = OnceLock::new();
        LEFT_OUT.get_or_init(|| std::env::var(VARIABLE).unwrap_or_default())
    }

    /// Whether the layer is in place.
    pub fn kept(layer: Layer) -> bool {
        !left_out().split(',').any(|name| name == layer.name())
    }
}

#[cfg(feature = "sabotage")]
pub use switch::{VARIABLE, kept, left_out};

/// Whether the layer is in place.
#[cfg(not(feature = "sabotage"))]
pub const fn kept(_: Layer) -> bool {
    true
}
