//! pasta, of the passt project: the program that connects a network namespace to what the host reaches.
//!
//! It passes what comes out of an interface in the namespace on through ordinary sockets of the host, without privilege
//! there. See `pasta(1)` and <https://passt.top>. Its options have changed over the years, and its versions are dates or
//! "unknown": so it is asked whether it takes the very arguments that it will be given.

use std::ffi::{CString, OsStr};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::unistd::Uid;
use serde::{Deserialize, Serialize};

/// What it is called. It behaves as `passt` under that name.
const NAME: &str = "pasta";

/// Where it is looked for without a `PATH`.
const DEFAULT_PATH: &str = "/usr/local/bin:/usr/bin:/bin";

/// The device it makes its interface with.
const TUN: &str = "/dev/net/tun";

/// The name of the interface in a sandbox. By default it would be that of the host's.
pub const INTERFACE: &str = "eth0";

/// Where a name server of the host's can answer over IPv4: an address of the range that no router passes on.
pub const NAMES_IPV4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// The same over IPv6: a unique local address that nobody else uses.
pub const NAMES_IPV6: Ipv6Addr = Ipv6Addr::new(0xfd63, 0x6f66, 0x6665, 0x7264, 0, 0, 0, 0x53);

/// How much of what an unsuitable program says is passed on, in lines: its usage may follow.
const SAID_LINES: usize = 2;

/// Whom packets from outside seem to come from: an address that is nobody's (locally administered) in place of the host's.
const MAC: &str = "02:00:5e:10:00:01";

/// An installed pasta.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pasta {
    program: PathBuf,
    mappings: Mappings,
}

/// How it is kept from showing the host under addresses that it makes up: by default the host's loopback answers at the
/// gateway's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Mappings {
    /// The way since 2024, which has a mapping more.
    ByAddress,
    /// The way before.
    ByGateway,
}

impl Mappings {
    /// The options that turn them off.
    fn off(self) -> &'static [&'static str] {
        match self {
            Self::ByAddress => &["--map-host-loopback", "none", "--map-guest-addr", "none"],
            Self::ByGateway => &["--no-map-gw"],
        }
    }
}

/// Why no sandbox can be connected.
#[derive(Debug, thiserror::Error)]
pub enum PastaError {
    /// The program isn't there.
    #[error("{NAME} is not installed (Debian, Fedora, Arch: passt)")]
    NotInstalled,
    /// The program can't be run.
    #[error("can't run {}: {source}", .program.display())]
    Run {
        /// The program.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The program does not do what is needed.
    #[error("{} is older than 2023, or another program of this name: {said}", .program.display())]
    Unsuitable {
        /// The program.
        program: PathBuf,
        /// What it says about that.
        said: String,
    },
    /// There is no device to make interfaces with.
    #[error("there is no {TUN}: {0} (modprobe tun; a container is given it with --device {TUN})")]
    NoTun(io::Error),
    /// The device is closed to whom the program runs as.
    #[error("{TUN} has mode {mode:04o}, and {NAME} does not run as its owner: chmod 0666 it, as udev does")]
    ClosedTun {
        /// Permission bits.
        mode: u32,
    },
}

impl Pasta {
    /// Finds the program in `PATH`, and what it can do.
    ///
    /// # Errors
    /// Where it is missing or can't be used. The message says what to do.
    pub fn find() -> Result<Self, PastaError> {
        let path = std::env::var_os("PATH").unwrap_or_else(|| DEFAULT_PATH.into());
        let program = std::env::split_paths(&path)
            // It is run from another working directory.
            .filter(|dir| dir.is_absolute())
            .map(|dir| dir.join(NAME))
            .find(|program| is_program(program))
            .ok_or(PastaError::NotInstalled)?;
        let pasta = Self::probe(program)?;
        check_tun()?;
        Ok(pasta)
    }

    /// Which of the ways the program goes.
    fn probe(program: PathBuf) -> Result<Self, PastaError> {
        let mut said = String::new();
        for mappings in [Mappings::ByAddress, Mappings::ByGateway] {
            let pasta = Self { program: program.clone(), mappings };
            // The last argument has it end before it does anything.
            let mut arguments = pasta.words(&[NAMES_IPV4.into(), NAMES_IPV6.into()]);
            arguments.push("--version".into());
            let mut command = Command::new(&program);
            command.arg0(NAME).args(arguments).env_clear().stdin(Stdio::null());
            let ran =
                command.output().map_err(|source| PastaError::Run { program: program.clone(), source })?;
            if ran.status.success() {
                return Ok(pasta);
            }
            let lines = ran.stderr.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
            let lines: Vec<&[u8]> = lines.take(SAID_LINES).collect();
            said = format!("{} ({})", String::from_utf8_lossy(&lines.join(&b' ')).trim(), ran.status);
        }
        Err(PastaError::Unsuitable { program, said })
    }

    /// The program.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Its `argv`, for a process that has the network namespace as standard input, and that tells on its standard
    /// output when everything is in place. At each of `name_servers` the first of its family in the host's
    /// `/etc/resolv.conf` answers.
    pub(crate) fn arguments(&self, name_servers: &[IpAddr]) -> Vec<CString> {
        let all = [NAME.to_owned()].into_iter().chain(self.words(name_servers));
        // None of them holds a NUL.
        all.filter_map(|argument| CString::new(argument).ok()).collect()
    }

    fn words(&self, name_servers: &[IpAddr]) -> Vec<String> {
        let mut words = vec!["--foreground", "--quiet"];
        // Descriptors by number are closed by newer versions, and the namespace's file below the sandbox's /proc/PID may
        // be closed to pasta; the standard streams stay open, and are open to their holder.
        words.extend(["--netns", "/proc/self/fd/0", "--pid", "/proc/self/fd/1"]);
        // Its end is seen to. By itself it would watch the directory of the namespace's file.
        words.push("--no-netns-quit");
        words.extend(["--config-net", "--ns-ifname", INTERFACE, "--mac-addr", MAC]);
        // No port of the host leads into the sandbox, and none of the sandbox's loopback to the host's.
        for direction in ["-t", "-u", "-T", "-U"] {
            words.extend([direction, "none"]);
        }
        words.extend(self.mappings.off());
        // The interface is configured without them.
        words.extend(["--no-dhcp", "--no-dhcpv6", "--no-ra"]);
        let mut words: Vec<String> = words.into_iter().map(str::to_owned).collect();
        for at in name_servers {
            words.extend(["--dns-forward".into(), at.to_string()]);
        }
        words
    }

    pub(crate) fn program_name(&self) -> Option<CString> {
        CString::new(self.program.as_os_str().as_bytes()).ok()
    }
}

fn is_program(path: &Path) -> bool {
    path.metadata().is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}

/// Whether the device can be opened by pasta, which root has run under another id.
fn check_tun() -> Result<(), PastaError> {
    let mode = Path::new(TUN).metadata().map_err(PastaError::NoTun)?.permissions().mode() & 0o7777;
    let own = || {
        nix::unistd::eaccess(OsStr::new(TUN), nix::unistd::AccessFlags::R_OK | nix::unistd::AccessFlags::W_OK)
    };
    match mode & 0o006 == 0o006 || (!Uid::effective().is_root() && own().is_ok()) {
        true => Ok(()),
        false => Err(PastaError::ClosedTun { mode }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a program makes of its arguments.
    const NEW: &str = "exit 0";
    const OLD: &str = "case \"$*\" in *--map-host-loopback*) echo unrecognized >&2; exit 1;; esac";
    const OTHER: &str = "echo no such option >&2; exit 2";
    const SILENT: &str = "kill -9 $$";

    fn probe(script: &str) -> Result<Mappings, String> {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join(NAME);
        std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        Pasta::probe(program).map(|pasta| pasta.mappings).map_err(|error| error.to_string())
    }

    #[test]
    fn a_program_is_asked_what_it_takes() {
        assert_eq!(probe(NEW), Ok(Mappings::ByAddress));
        assert_eq!(probe(OLD), Ok(Mappings::ByGateway));
        assert!(probe(OTHER).unwrap_err().contains("no such option"));
        assert!(probe(SILENT).unwrap_err().contains("signal: 9"));
        // The last word keeps it from doing anything.
        let last = "for last; do :; done; [ \"$last\" = --version ]";
        assert_eq!(probe(last), Ok(Mappings::ByAddress));
    }

    #[test]
    fn the_host_is_kept_out_in_every_way() {
        for (mappings, off) in [
            (Mappings::ByAddress, "--map-host-loopback none --map-guest-addr none"),
            (Mappings::ByGateway, "--no-map-gw"),
        ] {
            let pasta = Pasta { program: "/pasta".into(), mappings };
            let words = pasta.words(&[NAMES_IPV4.into()]).join(" ");
            for expected in [off, "-t none -u none -T none -U none", "--dns-forward 169.254.1.1"] {
                assert!(words.contains(expected), "no {expected:?} in {words}");
            }
            assert!(!pasta.words(&[]).join(" ").contains("dns"));
        }
    }
}
