//! The command line: a file per subcommand.

pub mod build;
pub mod daemon;
mod render;
pub mod run;
pub mod store;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::config;

/// Exit code where cofferdam itself fails, as in other programs that run programs.
pub const EXIT_FAILURE: u8 = 125;

/// Executes content-addressed build requests in Linux namespaces it makes itself.
///
/// Exit codes: 0 if all went well; for `run` and `build`, that of the command, 128 + n where signal n ended it, 126 and
/// 127 where it can't be executed, 1 where it made no or wrong outputs; 125 where cofferdam itself fails.
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
    /// Put files and directories into the store, and take them out.
    Store(store::StoreArgs),
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
        Subcommands::Store(args) => store::run(args).map(|()| 0),
    };
    match done {
        Ok(code) => code.into(),
        Err(failure) => {
            eprintln!("cofferdam: {failure}");
            EXIT_FAILURE.into()
        }
    }
}

/// What a subcommand could not do, in words.
#[derive(Debug)]
pub struct Failed(String);

impl std::fmt::Display for Failed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl<E: std::error::Error> From<E> for Failed {
    fn from(error: E) -> Self {
        Self(error.to_string())
    }
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
    #[arg(long, value_name = "DIR")]
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
fn start_logging(default: &str) {
    let filter = tracing_subscriber::EnvFilter::try_from_env("COFFERDAM_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(default));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
}

/// The executor. Only now may the program have threads.
fn runtime() -> Result<tokio::runtime::Runtime, Failed> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failed(format!("can't start threads: {error}")))
}
