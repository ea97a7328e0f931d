//! `cofferdam doctor`: whether builds can run here, and what to do where they can't.

mod show;

use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use clap::Args;
use cofferdam_sandbox::probe::{self, Examination, Found, Need, Outcome, Setup, Step, Tried, Trouble};
use serde::Serialize;

use super::render::no_stdout;
use super::{Failed, StateArgs};
use crate::worker::StateDir;

/// Exit code where builds can't run.
const EXIT_UNABLE: u8 = 1;

/// The steps by which that is decided: the others say why.
const DECISIVE: [Step; 3] = [Step::StateDirectory, Step::WholeSandbox, Step::WholeBuild];

/// Arguments of `cofferdam doctor`.
///
/// Every step is really tried, in processes and directories that are gone afterwards. Exit codes: 0 where builds can run,
/// be it with less than the whole sandbox; 1 where they can't.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    #[command(flatten)]
    state: StateArgs,
    /// Print one JSON document, whose shape docs/doctor.md describes
    #[arg(long)]
    json: bool,
}

/// Tries everything and says what came of it. Yields the exit code.
///
/// # Errors
/// Where nothing can be said, or this program's own file can't be found.
pub fn run(args: DoctorArgs) -> Result<u8, Failed> {
    let program = std::env::current_exe()
        .map_err(|error| Failed(format!("can't find this program's own file: {error}")))?;
    let report = Report::make(args.state.resolve(), &program);
    if args.json {
        let text = serde_json::to_string_pretty(&report)
            .map_err(|error| Failed(format!("can't write the report as JSON: {error}")))?;
        writeln!(io::stdout(), "{text}").map_err(no_stdout)?;
    } else {
        show::table(&report, &mut anstream::stdout().lock()).map_err(no_stdout)?;
    }
    Ok(match report.verdict {
        Verdict::Ready | Verdict::Weaker => 0,
        Verdict::Unable => EXIT_UNABLE,
    })
}

/// What it comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Verdict {
    /// Builds can run, with all that cofferdam can do.
    Ready,
    /// Builds can run, without some of it.
    Weaker,
    /// Builds can't run.
    Unable,
}

/// All that is told.
struct Report {
    verdict: Verdict,
    state_dir: Option<PathBuf>,
    examination: Examination,
}

impl Report {
    fn make(state_dir: Result<PathBuf, Failed>, program: &Path) -> Self {
        let mut place = None;
        let mut of_place = Ok(Found::default());
        let mut examination = probe::examine(|| {
            match &state_dir {
                Ok(path) => match Place::in_state_dir(path) {
                    Ok(made) => {
                        of_place = Ok(Found::with(told_of(path)));
                        place = Some(made);
                    }
                    Err(trouble) => of_place = Err(trouble),
                },
                Err(failed) => of_place = Err(Trouble::said("choose a state directory", failed.to_string())),
            }
            let scratch = place.as_ref().map(|Place(scratch)| scratch.clone())?;
            Some(Setup { scratch, program: program.into() })
        });
        examination.add(Step::StateDirectory, of_place);
        let enters = examination.outcome(Step::Enter).is_some_and(Outcome::is_usable);
        match place.as_ref().and_then(|Place(scratch)| scratch.parent()) {
            None => examination.add_untried(Step::WholeBuild, Step::StateDirectory),
            Some(_) if !enters => examination.add_untried(Step::WholeBuild, Step::Enter),
            Some(parent) => {
                examination.add(Step::WholeBuild, probe::attempt(|| whole_build(program, parent)));
            }
        }
        Self { verdict: verdict(&examination), state_dir: state_dir.ok(), examination }
    }
}

fn told_of(path: &Path) -> String {
    match path.exists() {
        true => path.display().to_string(),
        false => format!("{}, not made yet", path.display()),
    }
}

fn verdict(examination: &Examination) -> Verdict {
    let works = |step: &Step| examination.outcome(*step).is_some_and(Outcome::is_usable);
    if !DECISIVE.iter().all(works) {
        return Verdict::Unable;
    }
    let falls_short = |finding: &probe::Finding| {
        finding.step.need() != Need::Information && !matches!(finding.outcome, Outcome::Works { .. })
    };
    match examination.findings.iter().any(falls_short) {
        true => Verdict::Weaker,
        false => Verdict::Ready,
    }
}

/// An empty directory where builds would have theirs. The examination removes it.
struct Place(PathBuf);

impl Drop for Place {
    fn drop(&mut self) {
        // Where the examination did not get to it.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

impl Place {
    /// In the state directory or, where that has not been made yet, in the nearest directory above it that is there.
    fn in_state_dir(state_dir: &Path) -> Result<Self, Trouble> {
        let absolute = std::path::absolute(state_dir)
            .map_err(|error| Trouble::io(format!("find {}", state_dir.display()), &error))?;
        let there =
            absolute.ancestors().find(|path| path.symlink_metadata().is_ok()).unwrap_or(Path::new("/"));
        if there == absolute {
            let there = there
                .canonicalize()
                .map_err(|error| Trouble::io(format!("find {}", there.display()), &error))?;
            StateDir::check(&there)
                .map_err(|error| Trouble::said("use the state directory", error.to_string()))?;
        }
        let act = || format!("make a directory in {}", there.display());
        let path = there.join(format!(".cofferdam-doctor-{}", std::process::id()));
        let made = std::fs::DirBuilder::new().mode(0o700).create(&path);
        made.map_err(|error| Trouble::io(act(), &error))?;
        path.canonicalize().map(Self).map_err(|error| Trouble::io(act(), &error))
    }
}

/// This program runs a build, in which it is the input and the command. Its temporary directory is beside the state
/// directory's own, and is gone with it.
fn whole_build(program: &Path, temporary: &Path) -> Tried {
    const ACT: &str = "run a build with an input";
    let mut input = std::ffi::OsString::from("program=");
    input.push(program);
    let ran = Command::new(program)
        .args(["run", "--input"])
        .arg(input)
        .args(["--", "/inputs/program", "--version"])
        .env("TMPDIR", temporary)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| Trouble::io(ACT, &error))?;
    let complaint = String::from_utf8_lossy(&ran.stderr);
    let complaint = complaint.lines().map(|line| line.strip_prefix("cofferdam: ").unwrap_or(line));
    match ran.status.success() {
        true => Ok(Found::default()),
        false => Err(Trouble::said(ACT, complaint.collect::<Vec<_>>().join("; "))),
    }
}
