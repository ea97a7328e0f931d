//! Files and programs of the host that builds get help from.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use super::host::Host;
use super::outcome::{Act, Found, Tried, Trouble};
use super::trial::attempt;
use crate::ids;

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

/// The options of pasta that cut a build off from the host's own addresses.
const PASTA_OPTIONS: [&str; 7] =
    ["--config-net", "--tcp-ports", "--udp-ports", "--tcp-ns", "--udp-ns", "--no-map-gw", "--foreground"];

/// Whether there is a pasta that takes the options that a build's network needs.
pub fn pasta() -> Tried {
    let Some(path) = ids::find_program("pasta") else {
        return Err(Trouble::said("find pasta", "it is not installed"));
    };
    attempt(|| {
        let version = words_of(&path, "--version")?;
        let help = words_of(&path, "--help")?;
        let lacking: Vec<&str> = PASTA_OPTIONS.into_iter().filter(|option| !help.contains(option)).collect();
        if !lacking.is_empty() {
            return Err(Trouble::said("use pasta", format!("it does not know {}", lacking.join(" "))));
        }
        // With it, it makes its interface.
        File::options().read(true).write(true).open("/dev/net/tun").act("open /dev/net/tun")?;
        let version = version.lines().next().unwrap_or_default().trim().to_owned();
        Ok(Found::with(format!("{version}, {}", path.display())))
    })
}

fn words_of(program: &PathBuf, option: &str) -> Result<String, Trouble> {
    let act = format!("run {} {option}", program.display());
    // Old ones print their help to standard error.
    let output = Command::new(program).arg(option).stdin(Stdio::null()).output().act(&act)?;
    let text = [output.stdout, output.stderr].concat();
    Ok(String::from_utf8_lossy(&text).into_owned())
}
