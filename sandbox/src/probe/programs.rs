//! Files and programs of the host that builds get help from.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::errno::Errno;

use super::host::Host;
use super::outcome::{Act, Found, Tried, Trouble};
use super::trial::attempt;
use crate::ids;
use crate::pasta::{Pasta, PastaError};

/// What the two files give this user.
pub fn subordinate_ids(host: &Host) -> Tried {
    if host.is_admin {
        return Ok(Found::with("root needs none"));
    }
    let range = |file: &str, lines: &str| {
        ids::subordinate_len(lines, host.uid, host.user.as_deref()).ok_or_else(|| {
            Trouble::said("use subordinate ids", format!("{file} gives {} none", host.user_name()))
        })
    };
    let (uids, gids) = (range("/etc/subuid", &host.subuid)?, range("/etc/subgid", &host.subgid)?);
    let detail = format!("{uids} user ids, {gids} group ids");
    match uids.min(gids) < ids::MIN_SUBORDINATE {
        true => Err(Trouble::said("use subordinate ids", format!("{detail} are too few"))),
        false => Ok(Found::with(detail)),
    }
}

/// The two programs that map them.
pub fn id_helpers(host: &Host) -> Tried {
    if host.is_admin {
        return Ok(Found::with("root needs none"));
    }
    let find = |name: &str| {
        ids::find_program(name).ok_or_else(|| Trouble::said(format!("find {name}"), "it is not installed"))
    };
    let (uids, gids): (PathBuf, PathBuf) = (find("newuidmap")?, find("newgidmap")?);
    Ok(Found::with(format!("{}, {}", uids.display(), gids.display())))
}

/// Whether there is a pasta that takes the options that a build's network needs.
pub fn pasta() -> Tried {
    attempt(|| {
        let pasta = Pasta::find().map_err(|error| match error {
            PastaError::NotInstalled => Trouble::said("find pasta", "it is not installed"),
            PastaError::Run { program, source } => Trouble::io(format!("run {}", program.display()), &source),
            PastaError::Unsuitable { said, .. } => Trouble::said("use pasta", said),
            // With it, it makes its interface.
            PastaError::NoTun(source) => Trouble::io("open /dev/net/tun", &source),
            PastaError::ClosedTun { .. } => Trouble::errno("open /dev/net/tun", Errno::EACCES),
        })?;
        let version = words_of(pasta.program(), "--version")?;
        let version = version.lines().next().unwrap_or_default().trim().to_owned();
        Ok(Found::with(format!("{version}, {}", pasta.program().display())))
    })
}

fn words_of(program: &Path, option: &str) -> Result<String, Trouble> {
    let act = format!("run {} {option}", program.display());
    let output = Command::new(program).arg(option).stdin(Stdio::null()).output().act(&act)?;
    let text = [output.stdout, output.stderr].concat();
    Ok(String::from_utf8_lossy(&text).into_owned())
}
