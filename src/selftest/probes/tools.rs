//! What several families need in the sandbox.

use std::collections::BTreeSet;
use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::Mode;

use crate::selftest::stage::{Running, Stage};
use crate::selftest::{Act, Mode as WorkerMode, Outcome};

/// The names in a directory.
pub fn names(dir: impl AsRef<Path>) -> io::Result<BTreeSet<String>> {
    let entries = std::fs::read_dir(dir)?;
    entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

/// Opens a path with these flags.
pub fn open_with(path: impl AsRef<Path>, flags: OFlag) -> Result<OwnedFd, Errno> {
    open(path.as_ref(), flags | OFlag::O_CLOEXEC, Mode::from_bits_truncate(0o600))
}

/// Opens a path for writing.
pub fn open_to_write(path: impl AsRef<Path>) -> io::Result<File> {
    File::options().write(true).open(path)
}

/// The value of a field of `/proc/self/status` or a file like it.
pub fn field(file: &str, name: &str) -> Option<String> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    Some(line.trim().to_owned())
}

/// A path as system calls take it. One with a NUL, which no path of ours has, becomes that of nothing.
pub fn c_string(path: impl AsRef<OsStr>) -> CString {
    CString::new(path.as_ref().as_bytes()).unwrap_or_default()
}

/// Puts a number into bytes that stand for one of the kernel's structs. Where it has no room nothing is put.
pub fn number(bytes: &mut [u8], at: usize, value: u32) {
    if let Some(place) = bytes.get_mut(at..at + size_of_val(&value)) {
        place.copy_from_slice(&value.to_ne_bytes());
    }
}

/// A user and a mount namespace below the sandbox's own. `None` where they are refused: then there is nothing to be done
/// in them.
pub fn nested() -> Option<()> {
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS).ok()
}

/// What an attacker says who holds on to something until its build is ended from outside.
const HOLDING: &str = "holding";

/// How long to hold. The probe's deadline ends it before.
const HOLD: Duration = Duration::from_secs(60);

/// Says that everything is in place, and waits to be ended.
pub fn hold() {
    println!("{HOLDING}");
    std::thread::sleep(HOLD);
}

/// Waits until `there` holds. `false`: it took longer than `patience`.
pub async fn eventually(patience: Duration, mut there: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + patience;
    while !there() {
        if Instant::now() > deadline {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    true
}

/// Starts a build whose attack, in a role, ends in [`hold`], and waits until it does.
///
/// # Errors
/// How the probe ends where the build does not get there.
pub async fn holding(stage: &Stage<'_>, role: &str, arguments: &[&OsStr]) -> Result<Running, Outcome> {
    let draft = stage.draft(role, arguments).map_err(|fault| Outcome::broken(fault.to_string()))?;
    let build = stage.start(draft).await.map_err(|fault| Outcome::broken(fault.to_string()))?;
    until_holding(build).await
}

/// Waits until a build that was started holds.
///
/// # Errors
/// As [`holding`].
pub async fn until_holding(mut build: Running) -> Result<Running, Outcome> {
    match build.said(HOLDING).await {
        Ok(()) => Ok(build),
        Err(ended) => Err(ended.verdict().and(Outcome::broken(ended.describe()))),
    }
}

/// Whether a build has ended that should not. It is ended then in any case.
pub async fn ended(mut build: Running) -> bool {
    tokio::time::timeout(Duration::from_millis(50), build.finish()).await.is_ok()
}

/// What pid 1's files in `/proc` may answer beside refusals: with a single id they would belong to the build, and are
/// hidden from it.
pub fn hidden_init(act: &Act) -> &'static [Errno] {
    match act.mode {
        WorkerMode::Single => &[Errno::ENOENT],
        WorkerMode::Root | WorkerMode::Range => &[],
    }
}
