//! What a build may reach of processes outside: a Landlock domain that scopes signals and abstract unix sockets.
//!
//! Namespaces keep both from a build with a network and a process namespace of its own. With the host's network the
//! abstract sockets of the host are in reach; this takes them away, though not the other way round: the host may connect
//! to a build's. No access to files is handled, as that would forbid every mount, in nested namespaces too.
//! See `landlock(7)`.

use nix::errno::Errno;

use crate::plan::Landlock;
use crate::sys;

/// The first version that has both scopes: Linux 6.12.
pub const ABI_OF_SCOPES: u32 = 6;

const SCOPE_ABSTRACT_UNIX_SOCKET: u64 = 1;
const SCOPE_SIGNAL: u64 = 2;

/// The version of Landlock here. `None`: the kernel has none, or it is turned off.
pub fn abi() -> Option<u32> {
    sys::landlock_abi().ok()
}

/// The most that a plan may ask for here.
pub fn offered() -> Landlock {
    match abi() {
        Some(ABI_OF_SCOPES..) => Landlock::Scoped,
        _ => Landlock::Off,
    }
}

/// Puts this process, and all that it will start, into a domain of its own. It must have `no_new_privs`.
/// `EINVAL`: the kernel does not know the scopes.
pub(crate) fn restrict() -> Result<(), Errno> {
    sys::landlock_scope(SCOPE_ABSTRACT_UNIX_SOCKET | SCOPE_SIGNAL)
}
