//! What the sandbox's first process gives up, and the state a build starts in.

use std::fs::Metadata;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{self, AccessFlags, Gid, Uid};

use crate::cgroup::Controller;
use crate::ids::{BUILD_GID, BUILD_UID, Groups, IdMap};
use crate::plan::{Limits, Mount, MountPoint, Plan};
use crate::report::{SetupFailure, Step};
use crate::sabotage::{Layer, kept};
use crate::sys;

/// Becomes the root of the sandbox's user namespace, where the map has one.
pub fn become_root(ids: &IdMap) -> Result<(), SetupFailure> {
    let step = || -> Result<(), Errno> {
        match ids.groups {
            // Supplementary groups of the host's user would open host files that are passed in.
            Groups::Droppable => unistd::setgroups(&[])?,
            Groups::Kept => {}
        }
        if ids.has_root {
            unistd::setresgid(Gid::from_raw(0), Gid::from_raw(0), Gid::from_raw(0))?;
            unistd::setresuid(Uid::from_raw(0), Uid::from_raw(0), Uid::from_raw(0))?;
        }
        Ok(())
    };
    step().map_err(|errno| SetupFailure::new(Step::BecomeRoot, errno, ""))
}

/// Becomes the build's user, without capabilities and without a way back.
pub fn drop_all() -> Result<(), SetupFailure> {
    let step = || -> Result<(), Errno> {
        if !kept(Layer::Capabilities) {
            prctl::set_keepcaps(true)?;
        }
        let (gid, uid) = (Gid::from_raw(BUILD_GID), Uid::from_raw(BUILD_UID));
        unistd::setresgid(gid, gid, gid)?;
        unistd::setresuid(uid, uid, uid)?;
        match kept(Layer::Capabilities) {
            true => clear_capabilities()?,
            false => hand_capabilities_on()?,
        }
        if kept(Layer::NoNewPrivs) {
            prctl::set_no_new_privs()?;
        }
        // The build has this process's user id: it must not be able to trace it.
        prctl::set_dumpable(!kept(Layer::Dumpable))
    };
    step().map_err(|errno| SetupFailure::new(Step::DropPrivileges, errno, ""))
}

/// Whether the build may open the device nodes that it asked for. Opening them could do something.
pub fn try_devices(plan: &Plan) -> Result<(), SetupFailure> {
    for MountPoint { at, mount } in &plan.mounts {
        let at = Path::new("/").join(at);
        let is_device = |found: Metadata| {
            let kind = found.file_type();
            kind.is_char_device() || kind.is_block_device()
        };
        if matches!(mount, Mount::HostPath { .. }) && at.symlink_metadata().is_ok_and(is_device) {
            unistd::eaccess(&at, AccessFlags::R_OK | AccessFlags::W_OK)
                .map_err(|errno| SetupFailure::new(Step::Device, errno, at.display().to_string()))?;
        }
    }
    Ok(())
}

/// Lets no program have capabilities that is executed from here on. What this process has, it keeps.
///
/// Must come before the ids change: taking from the set needs a capability.
pub fn empty_bounding_set() -> Result<(), SetupFailure> {
    if !kept(Layer::Capabilities) {
        return Ok(());
    }
    for capability in 0.. {
        match sys::drop_from_bounding_set(capability) {
            Ok(()) => {}
            Err(Errno::EINVAL) => break,
            Err(errno) => return Err(SetupFailure::new(Step::DropPrivileges, errno, "")),
        }
    }
    Ok(())
}

/// With a single id the uid does not change, and nothing is dropped with it.
fn clear_capabilities() -> Result<(), Errno> {
    use caps::CapSet::{Ambient, Effective, Inheritable, Permitted};
    for set in [Ambient, Effective, Permitted, Inheritable] {
        caps::clear(None, set).map_err(|_| Errno::last())?;
    }
    Ok(())
}

/// What must not happen: the build has what its user namespace can give. For [`Layer::Capabilities`].
fn hand_capabilities_on() -> Result<(), Errno> {
    use caps::CapSet::{Ambient, Effective, Inheritable, Permitted};
    let has = caps::read(None, Permitted).map_err(|_| Errno::last())?;
    for set in [Effective, Inheritable, Ambient] {
        caps::set(None, set, &has).map_err(|_| Errno::last())?;
    }
    Ok(())
}

/// Leaves the session keyring of whoever started the daemon: its keys could be read otherwise.
pub fn leave_keyring() -> Result<(), SetupFailure> {
    if !kept(Layer::Keyring) {
        return Ok(());
    }
    match sys::join_new_session_keyring() {
        // A kernel or an outer sandbox without keyrings has no keys to leak.
        Ok(()) | Err(Errno::ENOSYS | Errno::EPERM) => Ok(()),
        Err(errno) => Err(SetupFailure::new(Step::Keyring, errno, "")),
    }
}

/// How much likelier than the program's own processes a build's are to be killed when the machine runs out of memory,
/// in thousandths of all memory.
const OOM_SCORE: i32 = 500;

/// Has the kernel kill builds before the program that serves them, and before most others. Some outer sandboxes forbid
/// it; the kernel then decides by size alone.
pub fn volunteer_for_oom() {
    const FILE: &str = "/proc/self/oom_score_adj";
    let inherited = std::fs::read_to_string(FILE).ok().and_then(|text| text.trim().parse::<i32>().ok());
    let score = inherited.unwrap_or(0).saturating_add(OOM_SCORE).min(1000);
    let _ = std::fs::write(FILE, score.to_string());
}

/// Descriptors that builds can't have of the program's limit where they share its user id: the kernel counts those that
/// are under way in sockets per user, and must not refuse the program its own.
const DESCRIPTORS_KEPT: u64 = 1024;
/// Signals and timers that builds may have waiting, whatever the number of their processes.
const SIGNALS_MIN: u64 = 1024;

/// Resource limits of a build. What a user namespace counts by itself (processes, since Linux 5.14) is counted per build
/// whatever its user id; see `docs/isolation.md`.
pub fn limit(limits: &Limits, ids: &IdMap) -> Result<(), SetupFailure> {
    let at_most = |resource: Resource, limit: Option<u64>, name: &str| -> Result<(), SetupFailure> {
        let Some(limit) = limit else { return Ok(()) };
        getrlimit(resource)
            .and_then(|(_, hard)| setrlimit(resource, limit.min(hard), limit.min(hard)))
            .map_err(|errno| SetupFailure::new(Step::Limits, errno, name))
    };
    // What the cgroup counts it also tells of; and programs that map much and use little don't fail.
    let uncounted = |controller| !limits.controllers.contains(&controller);
    let data = limits.memory.filter(|_| uncounted(Controller::Memory));
    let processes = limits.processes.filter(|_| uncounted(Controller::Pids));
    at_most(Resource::RLIMIT_DATA, data, "RLIMIT_DATA")?;
    at_most(Resource::RLIMIT_FSIZE, limits.file_size, "RLIMIT_FSIZE")?;
    at_most(Resource::RLIMIT_NPROC, processes, "RLIMIT_NPROC")?;
    let signals = limits.processes.map(|processes| processes.max(SIGNALS_MIN));
    at_most(Resource::RLIMIT_SIGPENDING, signals, "RLIMIT_SIGPENDING")?;
    let descriptors_and_core = || -> Result<(), Errno> {
        let (_, files) = getrlimit(Resource::RLIMIT_NOFILE)?;
        let files = match ids.has_root {
            // The build has a user id of its own.
            true => files,
            false => files.saturating_sub(DESCRIPTORS_KEPT).max(files / 2),
        };
        setrlimit(Resource::RLIMIT_NOFILE, files, files)?;
        let (_, core) = getrlimit(Resource::RLIMIT_CORE)?;
        setrlimit(Resource::RLIMIT_CORE, 0, core)
    };
    descriptors_and_core().map_err(|errno| SetupFailure::new(Step::Limits, errno, ""))
}
