//! What builds may use: the options that `run`, `build` and `daemon` have in common.

use std::ffi::OsStr;

use clap::Args;
use clap::builder::{OsStringValueParser, TypedValueParser};
use cofferdam_sandbox::cgroup::Choice;

use crate::config::{Floor, LimitSettings, SHM};
use crate::size::{Share, Size};

/// Limits of builds. SIZE is a number of bytes, or of KiB, MiB, GiB: 512M, 2G.
#[derive(Debug, Args)]
#[command(next_help_heading = "Limits of each build (SIZE: a number of bytes, or 512M, 2G)")]
pub struct LimitArgs {
    /// Memory of a build; without cgroups, of each of its processes
    #[arg(long, value_name = "SIZE", value_parser = at_least_a_page)]
    max_memory: Option<Size>,
    /// Processes and threads of a build [default: its part of half of what the system allows, from 512 to 16384]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(PROCESSES_MIN..))]
    max_processes: Option<u64>,
    /// Files of a build on disk, each and, as far as watching tells, all together
    #[arg(long, value_name = "SIZE", value_parser = at_least_a_page)]
    max_scratch: Option<Size>,
    /// Files of a build in /dev/shm, or a share of its memory
    #[arg(long, value_name = "SIZE|PERCENT", default_value_t = SHM)]
    max_shm: Share,
    /// End the build that uses most when less than this is free on the disk; 0 never does [default: for a daemon, 2 %
    /// of the disk or 1G, whichever is less; else 0]
    #[arg(long, value_name = "SIZE")]
    min_free: Option<Size>,
    /// Where to limit builds as a whole: `auto` takes a cgroup that was delegated, `off` none, PATH that one
    #[arg(long, value_name = "auto|off|PATH", default_value = "auto",
          value_parser = OsStringValueParser::new().try_map(|text| cgroup(&text)))]
    cgroup: Choice,
}

/// The sandbox's own process, and the command.
const PROCESSES_MIN: u64 = 2;

/// Nothing at all runs in less.
const PAGE: Size = Size(4096);

impl LimitArgs {
    /// The options by which a build that is done elsewhere can't be limited.
    pub const NAMES: [&str; 6] =
        ["max_memory", "max_processes", "max_scratch", "max_shm", "min_free", "cgroup"];

    /// What they come to, where `floor` is what stays free on the disk unless that is chosen.
    pub fn settings(self, floor: Floor) -> LimitSettings {
        LimitSettings {
            memory: self.max_memory,
            processes: self.max_processes,
            scratch: self.max_scratch,
            shm: self.max_shm,
            floor: match self.min_free {
                None => floor,
                Some(Size(0)) => Floor::None,
                Some(size) => Floor::Size(size),
            },
            cgroup: self.cgroup,
        }
    }
}

fn at_least_a_page(text: &str) -> Result<Size, String> {
    match text.parse() {
        Ok(size) if size < PAGE => Err(format!("it is less than {PAGE}")),
        Ok(size) => Ok(size),
        Err(error) => Err(error.to_string()),
    }
}

fn cgroup(text: &OsStr) -> Result<Choice, &'static str> {
    match text.to_str() {
        Some("auto") => Ok(Choice::Auto),
        Some("off") => Ok(Choice::Off),
        _ => match super::absolute_path(text) {
            Ok(path) => Ok(Choice::Path(path)),
            Err(_) => Err("it is `auto`, `off`, or an absolute path without \"..\""),
        },
    }
}
