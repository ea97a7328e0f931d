//! Arguments, dispatch, exit code.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    cofferdam_sandbox::serve_if_spawner();
    cofferdam::cli::main(std::env::args_os())
}
