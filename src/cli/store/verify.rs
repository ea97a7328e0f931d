//! `cofferdam store verify`.

use std::io::{self, Write};

use clap::Args;

use super::Source;
use super::progress::Line;
use crate::castore::local::verify::{Problem, Progress, Repair};
use crate::cli::{Failed, remark, render};
use crate::size::Rough;

/// Arguments of `cofferdam store verify`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// Remove what is damaged, and directories that contain a damaged one: what is missing can be stored again
    #[arg(long)]
    repair: bool,
}

/// Does what the arguments say. Yields the exit code.
///
/// # Errors
/// Where the store can't be read.
pub fn run(args: &VerifyArgs, source: Source) -> Result<u8, Failed> {
    let repair = if args.repair { Repair::Remove } else { Repair::No };
    let (own, aside) = source.own_checked(repair)?;
    if let Some(aside) = &aside {
        remark(format_args!(
            "the index was damaged; it is now {}, and the directories in it have to be stored again",
            aside.display()
        ));
    }
    let mut line = Line::default();
    let report = own.local.verify(repair, &mut |Progress { done, total }| {
        line.tell(format_args!("verify: {} of {}", Rough(done), Rough(total)));
    })?;
    drop(line);
    let mut out = io::stdout().lock();
    for problem in &report.problems {
        writeln!(out, "{problem}").map_err(render::no_stdout)?;
    }
    let damaged = report.problems.iter().filter(|problem| matches!(problem, Problem::Damaged { .. })).count();
    let other = report.problems.len() - damaged;
    let removed = if args.repair { ", which are removed" } else { "" };
    remark(format_args!(
        "{} blobs of {} and {} directories; {damaged} are damaged{removed}; {other} other problems",
        report.blobs,
        Rough(report.bytes),
        report.directories
    ));
    let left = if args.repair { other > 0 } else { !report.problems.is_empty() };
    Ok(u8::from(left || aside.is_some()))
}
