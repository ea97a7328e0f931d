//! `cofferdam daemon` and `cofferdam build`, from outside: over gRPC, and through what ends a daemon.

use std::process::ExitCode;

#[path = "../support/mod.rs"]
mod support;

mod client;
mod command;
mod copies;
mod endings;
mod isolation;
mod serving;

fn main() -> ExitCode {
    let mut trials = support::in_every_mode(serving::tests());
    trials.extend(support::in_every_mode(endings::tests()));
    trials.extend(support::in_every_mode(command::tests()));
    trials.extend(support::in_every_mode(isolation::tests()));
    trials.extend(support::in_every_mode_without_fuse(copies::tests()));
    trials.extend(support::in_own_mode(serving::own_mode_tests()));
    trials.extend(support::in_own_mode(command::own_mode_tests()));
    support::run(trials)
}
