//! Whether builds can run here: every step that one needs, really tried in a throw-away process.
//!
//! ```text
//! this process ── examine() ──┬─ fork: a step as whoever runs this                    (bare)
//!                             └─ fork: the stage, after ids::enter()
//!                                       ├─ fork: a step where the program stands      (entered)
//!                                       └─ fork ── clone3: a step where a build stands (sandboxed)
//! ```
//!
//! A step that hangs or is killed ends its own process and nothing else. What a step says are facts: a [`Trouble`]
//! with what was tried and how it was refused. Only `advice` turns them into causes and fixes, by what [`Host`]
//! has read; it makes no system call.

mod advice;
mod bare;
mod cgroups;
mod confinement;
mod host;
mod mounts;
mod outcome;
mod programs;
mod raw;
mod stage;
mod steps;
mod storage;
mod trial;
mod whole;

use std::path::PathBuf;

pub use host::{Host, Mode};
pub use outcome::{Finding, Found, Outcome, Tried, Trouble, Why};
pub use steps::{Area, Need, Step};
pub use trial::attempt;

/// What an examination is given.
#[derive(Clone, Debug)]
pub struct Setup {
    /// An empty directory on the file system of the state directory, which the examination removes with all it holds.
    pub scratch: PathBuf,
    /// A static program that ends with 0 if it is called with `--version`: this one.
    pub program: PathBuf,
}

/// All that was found.
#[derive(Clone, Debug)]
pub struct Examination {
    /// What was read of the host.
    pub host: Host,
    /// Who builds would be.
    pub mode: Mode,
    /// The steps, in the order of [`Step::ALL`], but for those that the caller tries itself.
    pub findings: Vec<Finding>,
}

impl Examination {
    /// What came of a step; `None` where nobody tried it.
    pub fn outcome(&self, step: Step) -> Option<&Outcome> {
        self.findings.iter().find(|finding| finding.step == step).map(|finding| &finding.outcome)
    }

    /// Adds what the caller has tried itself, in its place.
    pub fn add(&mut self, step: Step, tried: Tried) {
        let outcome = advice::judge(step, tried, &self.host);
        self.put(Finding { step, outcome });
    }

    /// Adds a step that could not be tried for want of another.
    pub fn add_untried(&mut self, step: Step, needs: Step) {
        self.put(Finding { step, outcome: Outcome::Untried { needs } });
    }

    fn put(&mut self, finding: Finding) {
        self.findings.retain(|other| other.step != finding.step);
        self.findings.push(finding);
        self.findings.sort_by_key(|finding| finding.step);
    }
}

/// Tries everything that needs no more than this crate. `setup` is called once, late, so that what it makes is not left
/// by a program that is interrupted; where it yields nothing, what needs a place on disk stays untried for want of
/// [`Step::StateDirectory`].
///
/// Call this while the program has one thread. It takes about a second, and never longer than the steps' time limits.
pub fn examine(setup: impl FnOnce() -> Option<Setup>) -> Examination {
    let host = Host::read();
    let mut examination = Examination { mode: host.mode(), host, findings: Vec::new() };
    bare::try_all(&mut examination);
    stage::try_all(&mut examination, setup);
    examination
}
