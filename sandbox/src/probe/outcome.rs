//! What came of a step.

use std::fmt;

use nix::errno::Errno;
use serde::ser::{SerializeStruct, Serializer};
use serde::{Deserialize, Serialize};

use super::steps::Step;
use crate::report::SetupFailure;

/// What a try yields.
pub type Tried = Result<Found, Trouble>;

/// A step that was done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    /// What is worth knowing of it; empty where nothing is.
    pub detail: String,
    /// What falls short, where builds go on without it.
    pub shortfall: Option<Trouble>,
}

impl Found {
    /// It works, and this is worth knowing.
    pub fn with(detail: impl Into<String>) -> Self {
        Self { detail: detail.into(), shortfall: None }
    }

    /// It works but for this.
    pub fn but(detail: impl Into<String>, shortfall: Trouble) -> Self {
        Self { detail: detail.into(), shortfall: Some(shortfall) }
    }
}

/// What was tried and refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trouble {
    /// What was tried, as a verb with its object.
    pub act: String,
    /// How it was refused.
    pub why: Why,
}

/// How something was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Why {
    /// By the kernel.
    Errno(i32),
    /// It did not end in time.
    TimedOut,
    /// This signal ended the process that tried.
    Signal(i32),
    /// In words: a program's, or of something that was done without effect.
    Said(String),
}

impl Trouble {
    /// The kernel refused `act`.
    pub fn errno(act: impl Into<String>, errno: Errno) -> Self {
        Self { act: act.into(), why: Why::Errno(errno as i32) }
    }

    /// `act` was refused, or done without effect.
    pub fn said(act: impl Into<String>, words: impl Into<String>) -> Self {
        Self { act: act.into(), why: Why::Said(words.into()) }
    }

    /// An operation of the standard library was refused.
    pub fn io(act: impl Into<String>, error: &std::io::Error) -> Self {
        match error.raw_os_error() {
            Some(errno) => Self::errno(act, Errno::from_raw(errno)),
            None => Self::said(act, error.to_string()),
        }
    }

    /// What the kernel answered, if it was the kernel.
    pub fn as_errno(&self) -> Option<Errno> {
        match self.why {
            Why::Errno(errno) => Some(Errno::from_raw(errno)),
            _ => None,
        }
    }
}

impl From<SetupFailure> for Trouble {
    fn from(failure: SetupFailure) -> Self {
        let mut act = failure.step.to_string();
        if !failure.object.is_empty() {
            act = format!("{act} {}", failure.object);
        }
        Self { act, why: Why::Errno(failure.errno) }
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "can't {}: ", self.act)?;
        match &self.why {
            Why::Errno(errno) => write!(f, "{}", std::io::Error::from_raw_os_error(*errno)),
            Why::TimedOut => f.write_str("it hangs"),
            Why::Signal(signal) if *signal == libc::SIGSYS => {
                f.write_str("a system call filter killed the process (SIGSYS)")
            }
            Why::Signal(signal) => write!(f, "signal {signal} ended the process"),
            Why::Said(words) => f.write_str(words),
        }
    }
}

/// Names what was tried where the kernel refuses it.
pub(super) trait Act<T> {
    /// `act` is what was tried, as a verb with its object.
    fn act(self, act: &str) -> Result<T, Trouble>;
}

impl<T> Act<T> for Result<T, Errno> {
    fn act(self, act: &str) -> Result<T, Trouble> {
        self.map_err(|errno| Trouble::errno(act, errno))
    }
}

impl<T> Act<T> for std::io::Result<T> {
    fn act(self, act: &str) -> Result<T, Trouble> {
        self.map_err(|error| Trouble::io(act, &error))
    }
}

/// A step and what came of it, with the cause and the way out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The step.
    pub step: Step,
    /// What came of it.
    pub outcome: Outcome,
}

/// What came of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It works.
    Works {
        /// What is worth knowing of it; may be empty.
        detail: String,
    },
    /// It works in part.
    Degraded {
        /// What is worth knowing of it; may be empty.
        detail: String,
        /// What the kernel answered, if it was the kernel.
        errno: Option<Errno>,
        /// What is short, and why.
        cause: String,
        /// What to do about it.
        fix: String,
    },
    /// It does not work.
    Missing {
        /// What the kernel answered, if it was the kernel.
        errno: Option<Errno>,
        /// What was refused, and why.
        cause: String,
        /// What to do about it.
        fix: String,
    },
    /// It could not be tried.
    Untried {
        /// What has to work first.
        needs: Step,
    },
}

impl Outcome {
    /// The outcome in one word, as programs are told it.
    pub fn word(&self) -> &'static str {
        match self {
            Outcome::Works { .. } => "works",
            Outcome::Degraded { .. } => "degraded",
            Outcome::Missing { .. } => "missing",
            Outcome::Untried { .. } => "untried",
        }
    }

    /// Whether builds can count on it, be it in part.
    pub fn is_usable(&self) -> bool {
        matches!(self, Outcome::Works { .. } | Outcome::Degraded { .. })
    }

    /// What is worth knowing of it.
    pub fn detail(&self) -> Option<&str> {
        match self {
            Outcome::Works { detail } | Outcome::Degraded { detail, .. } => {
                Some(detail.as_str()).filter(|detail| !detail.is_empty())
            }
            _ => None,
        }
    }

    /// What the kernel answered.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Outcome::Degraded { errno, .. } | Outcome::Missing { errno, .. } => *errno,
            _ => None,
        }
    }

    /// Why it falls short.
    pub fn cause(&self) -> Option<&str> {
        match self {
            Outcome::Degraded { cause, .. } | Outcome::Missing { cause, .. } => Some(cause),
            _ => None,
        }
    }

    /// What to do about it.
    pub fn fix(&self) -> Option<&str> {
        match self {
            Outcome::Degraded { fix, .. } | Outcome::Missing { fix, .. } => {
                Some(fix.as_str()).filter(|fix| !fix.is_empty())
            }
            _ => None,
        }
    }
}

/// What the kernel answered, for programs.
#[derive(Serialize)]
struct KernelError {
    name: String,
    number: i32,
}

impl Serialize for Finding {
    /// Always with every field, `null` where there is nothing to say.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self { step, outcome } = self;
        let mut object = serializer.serialize_struct("Finding", 11)?;
        object.serialize_field("step", step.id())?;
        object.serialize_field("area", step.area().id())?;
        object.serialize_field("title", step.title())?;
        object.serialize_field("need", step.need().id())?;
        object.serialize_field("result", outcome.word())?;
        object.serialize_field("detail", &outcome.detail())?;
        let errno =
            outcome.errno().map(|errno| KernelError { name: format!("{errno:?}"), number: errno as i32 });
        object.serialize_field("errno", &errno)?;
        object.serialize_field("cause", &outcome.cause())?;
        object.serialize_field("fix", &outcome.fix())?;
        let needs = match outcome {
            Outcome::Untried { needs } => Some(needs.id()),
            _ => None,
        };
        object.serialize_field("needs", &needs)?;
        let costs =
            Some(step.costs()).filter(|costs| !costs.is_empty() && !matches!(outcome, Outcome::Works { .. }));
        object.serialize_field("costs", &costs)?;
        object.end()
    }
}
