//! `cofferdam probe`: an attack of the self-test's, in the sandbox that it is to hold. Of no use anywhere else.

use std::ffi::OsString;
use std::io;

use clap::Args;

use super::Failed;
use super::render::no_stdout;
use crate::selftest::{Act, Attack, Findings, Mode, Profile, find};

/// Arguments of `cofferdam probe`.
#[derive(Debug, Args)]
pub struct ProbeArgs {
    id: String,
    #[arg(long, value_enum)]
    mode: Mode,
    #[arg(long, value_enum)]
    profile: Profile,
    #[arg(long, default_value = "")]
    role: String,
    /// Marks the process for those who look for leftovers
    #[arg(long)]
    token: String,
    #[arg(last = true)]
    arguments: Vec<OsString>,
}

/// Carries out the attack and tells what it found.
///
/// # Errors
/// Where there is no such probe, or nobody listens.
pub fn run(args: ProbeArgs) -> Result<(), Failed> {
    let ProbeArgs { id, mode, profile, role, token, arguments } = args;
    let attack: Attack = match find(&id) {
        Some(probe) => probe.attack,
        None if id == "CANARY" => |_, findings| findings.check(true, ""),
        None => return Err(Failed(format!("there is no probe {id:?}"))),
    };
    let mut findings = Findings::default();
    attack(&Act { id, mode, profile, role, token, arguments }, &mut findings);
    findings.write(io::stdout().lock()).map_err(no_stdout)
}
