//! A client that is not ours: `tests/python/client.py`, with Python's grpc and stubs from our .proto files.
//! Each of its cases is a trial.

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::sync::OnceLock;

mod support;

use support::case::finish;
use support::{Case, Facility, Lacking, Mode, binary, host_tools};

const CLIENT: &str = include_str!("python/client.py");

fn main() -> ExitCode {
    let cases = CLIENT.lines().filter_map(|line| line.trim().strip_prefix("def ")?.split_once('('));
    let tests = cases.map(|(name, _)| name).filter(|name| name.starts_with("test_"));
    let trials = tests.map(|name| {
        support::fallible(name.trim_start_matches("test_").to_owned(), Mode::own(), |case| run(case, name))
    });
    support::run(trials.collect())
}

fn run(case: &Case, test: &'static str) -> Result<(), Lacking> {
    let python = python().map_err(|reason| Lacking::new(Facility::Python, reason))?;
    let mut command = case.program(python.join("bin/python3"));
    command.arg(support::repository().join("tests/python/client.py")).arg(format!("Client.{test}"));
    command.env("PYTHONPATH", python.join("stubs")).env("PYTHONDONTWRITEBYTECODE", "1");
    command.env("COFFERDAM", binary()).env("COFFERDAM_HOST_TOOLS", host_tools().join(":"));
    let ran = finish(command);
    assert!(ran.status.success(), "{ran}");
    Ok(())
}

/// A virtual environment with what the client needs and the stubs, made once and kept.
fn python() -> Result<PathBuf, String> {
    static MADE: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    MADE.get_or_init(|| {
        let dir = support::target_dir().join("python");
        let requirements = support::repository().join("tests/python/requirements.txt");
        let wanted = std::fs::read(&requirements).map_err(|error| error.to_string())?;
        // Written last, so an environment that was left half made is made again.
        let stamp = dir.join("made-from.txt");
        if std::fs::read(&stamp).ok().as_deref() != Some(&wanted[..]) {
            step(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&dir))?;
            let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r"];
            step(Command::new(dir.join("bin/python3")).args(pip).arg(&requirements))?;
            std::fs::write(&stamp, wanted).map_err(|error| error.to_string())?;
        }
        generate(&dir)?;
        Ok(dir)
    })
    .clone()
}

/// Stubs from the .proto files as they are now.
fn generate(dir: &std::path::Path) -> Result<(), String> {
    let (protos, stubs) = (support::repository().join("proto/protos"), dir.join("stubs"));
    std::fs::create_dir_all(&stubs).map_err(|error| error.to_string())?;
    let mut protoc = Command::new(dir.join("bin/python3"));
    protoc.args(["-m", "grpc_tools.protoc"]).arg(format!("-I{}", protos.display()));
    protoc
        .arg(format!("--python_out={0}", stubs.display()))
        .arg(format!("--grpc_python_out={}", stubs.display()));
    for file in ["castore/protos/castore", "castore/protos/rpc_blobstore", "castore/protos/rpc_directory"] {
        protoc.arg(format!("snix/{file}.proto"));
    }
    for file in ["build/protos/build", "build/protos/rpc_build"] {
        protoc.arg(format!("snix/{file}.proto"));
    }
    step(&mut protoc)
}

/// Runs one step of the preparation; where it fails, its last word is the reason.
fn step(command: &mut Command) -> Result<(), String> {
    let run = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    let errors = String::from_utf8_lossy(&run.stderr);
    let last = errors.lines().last().unwrap_or("it says nothing");
    run.status.success().then_some(()).ok_or_else(|| format!("{command:?}: {last}"))
}
