//! The command line: a file per subcommand.

pub mod build;
pub mod daemon;
pub mod doctor;
mod isolation;
mod limits;
mod network;
pub mod probe;
mod render;
pub mod run;
pub mod selftest;
mod shell;
pub mod store;
mod store_choice;

use std::ffi::OsStr;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::config;
use crate::worker::WorkerStartError;

/// Exit code where cofferdam itself fails, as in other programs that run programs.
pub const EXIT_FAILURE: u8 = 125;

/// Executes content-addressed build requests in Linux namespaces it makes itself.
///
/// Exit codes: 0 if all went well; for `run` and `build`, that of the command, 128 + n where signal n ended it, 126 and
/// 127 where it can't be executed, 1 where it made no or wrong outputs; for `doctor`, 1 where builds can't run; 125 where
/// cofferdam itself fails.
#[derive(Debug, Parser)]
#[command(name = "cofferdam", version, max_term_width = 100)]
pub struct Arguments {
    #[command(subcommand)]
    command: Subcommands,
}

#[derive(Debug, Subcommand)]
enum Subcommands {
    /// Run one command in a sandbox, without a daemon.
    Run(run::RunArgs),
    /// Serve builds and the store over gRPC.
    Daemon(daemon::DaemonArgs),
    /// Carry out a build request that is written as JSON.
    Build(build::BuildArgs),
    /// Try every step that a build needs of this machine, and say what is missing and what to do about it.
    Doctor(doctor::DoctorArgs),
    /// Put files and directories into the store, and take them out.
    Store(store::StoreArgs),
    /// Show what the sandbox holds on this machine: attack it from within, and look for what is left.
    Selftest(selftest::SelftestArgs),
    #[command(hide = true)]
    Battery(selftest::BatteryArgs),
    #[command(hide = true)]
    Probe(probe::ProbeArgs),
}

/// Does what the arguments say, up to the exit code.
pub fn main(arguments: impl IntoIterator<Item = impl Into<std::ffi::OsString> + Clone>) -> ExitCode {
    let arguments = match Arguments::try_parse_from(arguments) {
        Ok(arguments) => arguments,
        Err(error) => {
            let _ = error.print();
            // Help and version are no failures.
            return if error.use_stderr() { EXIT_FAILURE.into() } else { ExitCode::SUCCESS };
        }
    };
    let done = match arguments.command {
        Subcommands::Run(args) => run::run(args),
        Subcommands::Daemon(args) => daemon::run(args),
        Subcommands::Build(args) => build::run(args),
        Subcommands::Doctor(args) => doctor::run(args),
        Subcommands::Store(args) => store::run(args),
        Subcommands::Selftest(args) => selftest::run(args),
        Subcommands::Battery(args) => selftest::battery(args),
        Subcommands::Probe(args) => probe::run(args).map(|()| 0),
    };
    match done {
        Ok(code) => code.into(),
        Err(failure) => {
            remark(format_args!("cofferdam: {failure}"));
            EXIT_FAILURE.into()
        }
    }
}

/// A line on standard error. That nobody can read it is no reason to stop.
fn remark(line: std::fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// What a subcommand could not do, in words: what was tried, on what, and why not.
#[derive(Debug)]
pub struct Failed(String);

impl std::fmt::Display for Failed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Errors that say what was tried, and on what. `io::Error` doesn't: it goes through [`cannot`] or the like.
macro_rules! complete {
    ($($error:ty),* $(,)?) => { $(
        impl From<$error> for Failed {
            fn from(error: $error) -> Self {
                Self(error.to_string())
            }
        }
    )* };
}

complete! {
    crate::address::ConnectError,
    crate::build::error::Fault,
    crate::build::request::PathFault,
    crate::castore::NodeError,
    crate::castore::StoreError,
    crate::castore::archive::ArchiveError,
    crate::castore::ingest::IngestError,
    crate::castore::tree::ExportError,
    crate::remote::RemoteError,
    crate::server::ServicesError,
    crate::server::listen::ListenError,
}

impl From<WorkerStartError> for Failed {
    fn from(error: WorkerStartError) -> Self {
        start_failed(error, "")
    }
}

/// A worker that can't start. Where another one has the state directory there is a way out, or `more` than one.
fn start_failed(error: WorkerStartError, more: &str) -> Failed {
    let advice = match error {
        WorkerStartError::InUse { .. } => format!("; choose another with --state-dir{more}"),
        _ => String::new(),
    };
    Failed(format!("{error}{advice}"))
}

/// For subcommands that can turn to a daemon instead.
fn start_failed_here(error: WorkerStartError) -> Failed {
    start_failed(error, ", or have the daemon that uses it do this with --to ADDR")
}

/// `act` was tried on `path` and refused.
fn cannot(act: &str, path: &Path, error: impl std::fmt::Display) -> Failed {
    Failed(format!("can't {act} {}: {error}", path.display()))
}

/// Where the store and the scratch space lie.
#[derive(Debug, Args)]
struct StateArgs {
    /// Keep the store and the scratch space in DIR [default: /var/lib/cofferdam for root,
    /// $XDG_STATE_HOME/cofferdam or ~/.local/state/cofferdam for others]
    #[arg(long, value_name = "DIR", global = true)]
    state_dir: Option<PathBuf>,
}

impl StateArgs {
    fn resolve(self) -> Result<PathBuf, Failed> {
        self.state_dir.or_else(config::default_state_dir).ok_or_else(|| {
            Failed("there is neither $XDG_STATE_HOME nor $HOME; choose a place with --state-dir".into())
        })
    }
}

/// An absolute path, for the value of an option.
fn absolute_path(text: &OsStr) -> Result<PathBuf, &'static str> {
    let path = Path::new(text);
    let plain = |part| matches!(part, std::path::Component::RootDir | std::path::Component::Normal(_));
    // Collecting the components takes out double and trailing slashes.
    match path.is_absolute() && path.components().all(plain) {
        true => Ok(path.components().collect()),
        false => Err("a path of the host is absolute and has no \"..\""),
    }
}

fn path_parser() -> impl clap::builder::TypedValueParser<Value = PathBuf> {
    use clap::builder::{OsStringValueParser, TypedValueParser};
    OsStringValueParser::new().try_map(|text| absolute_path(&text))
}

/// Log lines of the program itself go to standard error; `COFFERDAM_LOG` chooses which.
fn start_logging(default: &str) -> Result<(), Failed> {
    let chosen = std::env::var_os(LOG_VARIABLE).unwrap_or_default();
    let directives = if chosen.is_empty() { OsStr::new(default) } else { &chosen };
    let filter = tracing_subscriber::EnvFilter::try_new(directives.to_string_lossy())
        .map_err(|error| Failed(format!("{LOG_VARIABLE}=\"{}\": {error}", directives.display())))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        // A line that can't be written would be told on standard error, with a panic.
        .log_internal_errors(false)
        .init();
    Ok(())
}

const LOG_VARIABLE: &str = "COFFERDAM_LOG";

/// The executor. Only now may the program have threads.
fn runtime() -> Result<tokio::runtime::Runtime, Failed> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failed(format!("can't start threads: {error}")))
}

/// The signals that ask this program to end. Once it listens to them they do nothing by themselves.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    /// Must be called on the executor.
    fn listen() -> Result<Self, Failed> {
        let on = |kind| signal(kind).map_err(|error| Failed(format!("can't listen to signals: {error}")));
        Ok(Self { interrupt: on(SignalKind::interrupt())?, terminate: on(SignalKind::terminate())? })
    }

    /// The exit code that the next one stands for. None is lost between two calls.
    async fn next(&mut self) -> u8 {
        tokio::select! {
            _ = self.interrupt.recv() => EXIT_INTERRUPTED,
            _ = self.terminate.recv() => EXIT_TERMINATED,
        }
    }
}

/// 128 + SIGINT.
const EXIT_INTERRUPTED: u8 = 130;
/// 128 + SIGTERM.
const EXIT_TERMINATED: u8 = 143;
