//! The battery that shows, on the machine at hand, what the sandbox holds.
//!
//! ```text
//! selftest (host)                      battery, one a mode                   sandbox
//! host::run ──── starts, as a user ──▶ a real worker
//!           ──── runs these probes ──▶ stage: a build request ─────────────▶ `cofferdam probe ID`: the attack
//!           ◀─── outcomes ──────────── judges ◀──────────────── log, outputs
//! left: host before and after
//! report: table, JSON, JUnit
//! ```
//!
//! A [`Probe`] has an id and a promise, an attack that runs inside of a sandbox, and a [`Play`] that says what build it
//! is part of. The families are in [`probes`], a file each. What the host looks like is compared from outside, by a
//! process that is in none of the worker's namespaces ([`left`]).

pub mod battery;
pub mod faults;
pub mod findings;
pub mod host;
pub mod left;
pub mod mode;
pub mod probes;
pub mod report;
pub mod stage;

use std::ffi::{OsStr, OsString};
use std::future::Future;
use std::pin::Pin;
use std::process::Command;
use std::time::Duration;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::build::request::Draft;

pub use findings::{Findings, Outcome};
pub use mode::Mode;
use stage::Stage;

/// One promise, and how it is put to the test.
pub struct Probe {
    /// What it is called, for good: `FS-01`.
    pub id: &'static str,
    /// What holds if the probe says so, in one line.
    pub promise: &'static str,
    /// Whether other people's builds may run without it.
    pub weight: Weight,
    /// Whether other probes may run at the same time.
    pub company: Company,
    /// What is done in the sandbox.
    pub attack: Attack,
    /// What build it is part of.
    pub play: Play,
}

/// How much depends on a promise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weight {
    /// Nobody else's builds may run without it.
    Required,
    /// It should hold.
    Desired,
}

/// Whether a probe may run beside others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Company {
    /// It may.
    Shared,
    /// It strains the worker or measures it.
    Alone,
}

/// What is done in the sandbox.
pub type Attack = fn(&Act, &mut Findings);

/// What a probe's build does outside of its sandbox.
pub type Script = for<'a> fn(&'a Stage<'a>) -> Pin<Box<dyn Future<Output = Outcome> + Send + 'a>>;

/// What build a probe is part of.
pub enum Play {
    /// One build that runs the attack and tells what it found.
    Plain,
    /// The same, of a request with changes. They may find that there is nothing to be tested here.
    Request(fn(&Stage<'_>, &mut Draft) -> Result<(), Outcome>),
    /// Whatever the script says.
    Script(Script),
}

/// How long one probe may take.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// What the attack is told: as arguments of the command that it is.
#[derive(Debug)]
pub struct Act {
    /// The probe's id.
    pub id: String,
    /// Who runs the worker.
    pub mode: Mode,
    /// What is promised.
    pub profile: Profile,
    /// Which of several attackers this one is; mostly empty.
    pub role: String,
    /// Marks the processes of the self-test.
    pub token: String,
    /// Whatever else it has to know.
    pub arguments: Vec<OsString>,
}

impl Act {
    /// This attack in another role, as a process of its own: for what a process can do only to itself, or once.
    ///
    /// What it finds it tells on standard output, for [`Findings::read`].
    pub fn again(&self, role: &str) -> Command {
        let mut command = Command::new("/proc/self/exe");
        command.args(["probe", &self.id, "--mode", self.mode.name(), "--profile", self.profile.name()]);
        command.args(["--role", role, "--token", &self.token, "--"]);
        command
    }

    /// Runs this attack in another role and takes over what it found. `Err` says how it ended without a word.
    ///
    /// # Errors
    /// Where it can't be executed, or ends early.
    pub fn run_again(&self, role: &str, arguments: &[&OsStr], findings: &mut Findings) -> Result<(), String> {
        let output = self.again(role).args(arguments).output().map_err(|error| error.to_string())?;
        match Findings::read(&output.stdout) {
            Some(more) => {
                findings.absorb(more);
                Ok(())
            }
            None => Err(format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim())),
        }
    }
}

/// How close to Nix, or how strict.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Profile {
    /// Like Nix, and stricter where no derivation needs what is refused.
    #[default]
    Parity,
    /// Hardened; some derivations will not build.
    Strict,
}

impl Profile {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Parity => "parity",
            Self::Strict => "strict",
        }
    }
}

/// Every probe, by family.
pub fn catalogue() -> impl Iterator<Item = &'static Probe> {
    probes::FAMILIES.iter().copied().flatten()
}

/// The probe called `id`, in whatever case.
pub fn find(id: &str) -> Option<&'static Probe> {
    catalogue().find(|probe| probe.id.eq_ignore_ascii_case(id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_probe_has_an_id_of_its_own_and_a_promise_of_one_line() {
        let mut seen = std::collections::HashSet::new();
        for probe in catalogue() {
            assert!(seen.insert(probe.id), "{} twice", probe.id);
            assert!(!probe.promise.is_empty() && !probe.promise.contains('\n'), "{}", probe.id);
            assert!(probe.promise.len() <= 100, "{}: {} bytes", probe.id, probe.promise.len());
        }
    }
}
