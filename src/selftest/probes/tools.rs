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
use nix::sys::stat::Mode;

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
