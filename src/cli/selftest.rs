//! `cofferdam selftest`: what the sandbox holds on this machine.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use nix::unistd::{Gid, Uid};

use super::render::no_stdout;
use super::{Failed, cannot, remark};
use crate::isolation::{Demand, Layer, Wish};
use crate::selftest::battery::{self, Assignment};
use crate::selftest::mode::{self, Available, Become, Expected};
use crate::selftest::report::{ModeReport, Report};
use crate::selftest::{Mode, Probe, Profile, Weight, catalogue, find, host};

/// Exit code where a promise is broken, or an expected mode can't be run.
const EXIT_BROKEN: u8 = 1;

/// Arguments of `cofferdam selftest`.
#[derive(Debug, Args)]
#[command(
    after_help = "Exit codes: 0 if everything that can be tested here holds, 1 if something does not or an expected \
                  mode can't be run, 125 where the self-test itself fails."
)]
pub struct SelftestArgs {
    /// Print the result as one JSON document
    #[arg(long)]
    json: bool,
    /// Also write the result to FILE in JUnit's XML
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    /// Run the probe called ID, and no others; may be repeated
    #[arg(long, value_name = "ID", value_delimiter = ',')]
    only: Vec<String>,
    /// Run the probes in this mode, and in no others but those of --expect; may be repeated
    #[arg(long, value_enum, value_name = "MODE", value_delimiter = ',')]
    mode: Vec<Mode>,
    /// Print what the probes are and promise, and run none; * marks those without which nobody else's build may run
    #[arg(long)]
    list: bool,
    /// What is promised
    #[arg(long, value_enum, default_value_t)]
    profile: Profile,
    /// Show builds their inputs as copies on disk, as without FUSE: inputs=off; the mode says what ids are
    #[arg(long, value_name = "LAYER=DEMAND", value_parser = inputs_wish)]
    isolation: Option<Wish>,
    /// Fail unless these modes can be run here
    #[arg(long, value_enum, value_name = "MODE", value_delimiter = ',')]
    expect: Vec<Expected>,
}

/// A demand of the inputs: another one the modes make.
fn inputs_wish(text: &str) -> Result<Wish, String> {
    match text.parse::<Wish>()? {
        wish if wish.layer == Layer::Inputs => Ok(wish),
        _ => Err("the modes of the self-test say what ids are; only inputs can be chosen".into()),
    }
}

/// Runs the probes in every mode there is. Yields the exit code.
///
/// # Errors
/// Where it is the self-test that fails.
pub fn run(args: SelftestArgs) -> Result<u8, Failed> {
    let probes = chosen(&args.only)?;
    if args.list {
        return list(&probes).map(|()| 0);
    }
    let parent = parent_directory();
    let mut modes = Vec::new();
    // One that is expected is run all the same: it would be missing without a word.
    let wanted = |mode| args.mode.is_empty() || args.mode.contains(&mode) || is_expected(&args.expect, mode);
    for available in mode::available().into_iter().filter(|available| wanted(available.mode)) {
        modes.push(run_mode(available, &args, &probes, &parent)?);
    }
    let container = mode::container();
    let outside = args.expect.contains(&Expected::Container) && container.is_none();
    let report = Report::new(args.profile, container, modes);
    tell(&report, &args)?;
    if outside {
        remark(format_args!("cofferdam: this is no container, though one is expected"));
    }
    Ok(if report.summary().broken > 0 || outside { EXIT_BROKEN } else { 0 })
}

fn chosen(only: &[String]) -> Result<Vec<&'static Probe>, Failed> {
    if only.is_empty() {
        return Ok(catalogue().collect());
    }
    let known =
        |id: &String| find(id).ok_or_else(|| Failed(format!("--only: there is no probe {id:?}; see --list")));
    only.iter().map(known).collect()
}

fn list(probes: &[&Probe]) -> Result<(), Failed> {
    let mut out = io::stdout().lock();
    for Probe { id, promise, weight, .. } in probes {
        let mark = match weight {
            Weight::Required => '*',
            Weight::Desired => ' ',
        };
        writeln!(out, "{mark} {id:<8} {promise}").map_err(no_stdout)?;
    }
    Ok(())
}

/// Where batteries have their directories: other users must be able to get there.
fn parent_directory() -> PathBuf {
    let chosen = std::env::var_os("TMPDIR").map(PathBuf::from).filter(|dir| dir.is_absolute());
    chosen.unwrap_or_else(|| "/var/tmp".into())
}

fn run_mode(
    available: Available,
    args: &SelftestArgs,
    probes: &[&'static Probe],
    parent: &Path,
) -> Result<ModeReport, Failed> {
    let Available { mode, user } = available;
    let mut report = match user {
        Err(reason) => {
            let mut report = ModeReport::new(mode);
            report.unavailable = Some(reason);
            report
        }
        Ok(user) => {
            remark(format_args!("cofferdam: {} probes in mode {mode}", probes.len()));
            let plan = host::Plan {
                mode,
                user,
                profile: args.profile,
                inputs: args.isolation.as_ref().map(|wish| wish.demand),
                probes,
                parent,
            };
            let mut done = 0;
            let mut progress = |probe: &crate::selftest::report::ProbeReport| {
                done += 1;
                remark(format_args!("[{done}/{}] {mode} {} {}", probes.len(), probe.id, probe.outcome));
            };
            host::run(&plan, &mut progress).map_err(|error| Failed(error.to_string()))?
        }
    };
    report.expected = is_expected(&args.expect, mode);
    Ok(report)
}

fn is_expected(expected: &[Expected], mode: Mode) -> bool {
    expected.iter().any(|expected| match expected {
        Expected::Root => mode == Mode::Root,
        Expected::Range => mode == Mode::Range,
        Expected::Single => mode == Mode::Single,
        Expected::Container => false,
    })
}

fn tell(report: &Report, args: &SelftestArgs) -> Result<(), Failed> {
    if let Some(file) = &args.junit {
        std::fs::write(file, report.to_junit()).map_err(|error| cannot("write", file, error))?;
    }
    let mut out = io::stdout().lock();
    match args.json {
        true => {
            let json =
                report.to_json().map_err(|error| Failed(format!("can't encode the result: {error}")))?;
            writeln!(out, "{json}")
        }
        false => writeln!(out, "{report}"),
    }
    .map_err(no_stdout)
}

/// Arguments of `cofferdam battery`: the self-test's own worker.
#[derive(Debug, Args)]
pub struct BatteryArgs {
    #[arg(long)]
    dir: PathBuf,
    #[arg(long, value_enum)]
    mode: Mode,
    #[arg(long, value_enum)]
    profile: Profile,
    #[arg(long, value_parser = inputs_wish)]
    isolation: Option<Wish>,
    /// Become this UID:GID first
    #[arg(long, value_parser = user_parser)]
    user: Option<(u32, u32)>,
    /// With this supplementary group
    #[arg(long)]
    group: Option<u32>,
}

fn user_parser(text: &str) -> Result<(u32, u32), String> {
    let (uid, gid) = text.split_once(':').ok_or("it is UID:GID")?;
    let number = |text: &str| text.parse::<u32>().map_err(|error| error.to_string());
    Ok((number(uid)?, number(gid)?))
}

/// Runs the probes of one mode as the host's side says.
///
/// # Errors
/// Where the host's side is gone.
pub fn battery(args: BatteryArgs) -> Result<u8, Failed> {
    let BatteryArgs { dir, mode, profile, isolation, user, group } = args;
    if let Some((uid, gid)) = user {
        let user = Become { uid: Uid::from_raw(uid), gid: Gid::from_raw(gid) };
        let mut again = vec!["battery".into(), "--dir".into(), dir.display().to_string()];
        again.extend(["--mode", mode.name(), "--profile", profile.name()].map(str::to_owned));
        again.extend(isolation.iter().flat_map(|wish| ["--isolation".to_owned(), wish.to_string()]));
        let error = battery::become_user(user, group.map(Gid::from_raw), &dir.join(battery::COPY), &again);
        return Err(Failed(format!("can't become user {uid}: {error}")));
    }
    super::start_logging("warn")?;
    let inputs = isolation.map_or(Demand::Preferred, |wish| wish.demand);
    let assignment = Assignment { mode, profile, inputs, dir };
    battery::run(assignment).map(|()| 0).map_err(|error| Failed(format!("can't go on: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_read() {
        assert_eq!(user_parser("1:2"), Ok((1, 2)));
        assert!(user_parser("1").is_err() && user_parser("a:2").is_err());
    }
}
