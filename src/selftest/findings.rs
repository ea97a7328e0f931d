//! What a probe found: collected in the sandbox, told on its standard output, judged outside.

use std::fmt::Display;
use std::io::{self, Write};

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

/// How lines of a probe's report begin, so that nothing else it writes is taken for one.
const MARK: &str = "cofferdam-probe:";

/// What became of a promise.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "outcome", content = "reasons")]
pub enum Outcome {
    /// It was put to the test and holds.
    Held,
    /// It doesn't hold: each way in which it doesn't.
    Broken(Vec<String>),
    /// It can't be put to the test here, and why not.
    NotApplicable(Vec<String>),
}

impl Outcome {
    /// Not held, for one reason.
    pub fn broken(reason: impl Into<String>) -> Self {
        Self::Broken(vec![reason.into()])
    }

    /// Not to be tested, for one reason.
    pub fn not_applicable(reason: impl Into<String>) -> Self {
        Self::NotApplicable(vec![reason.into()])
    }

    /// Both together: what is broken in one is broken, and what holds in one was put to the test.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Broken(mut all), Self::Broken(more)) => {
                all.extend(more);
                Self::Broken(all)
            }
            (Self::Broken(all), _) | (_, Self::Broken(all)) => Self::Broken(all),
            (Self::NotApplicable(mut all), Self::NotApplicable(more)) => {
                all.extend(more);
                Self::NotApplicable(all)
            }
            _ => Self::Held,
        }
    }
}

/// What one run of a probe found so far. Without a single check it proves nothing, and counts as broken.
#[derive(Debug, Default)]
pub struct Findings {
    checks: usize,
    broken: Vec<String>,
    not_applicable: Vec<String>,
}

impl Findings {
    /// Checks that `holds`; what it says `otherwise` is the finding.
    pub fn check(&mut self, holds: bool, otherwise: impl Display) {
        self.checks += 1;
        if !holds {
            self.broken.push(otherwise.to_string());
        }
    }

    /// Checks that two values are the same.
    pub fn same<T: PartialEq + std::fmt::Debug>(&mut self, what: &str, seen: T, expected: T) {
        let holds = seen == expected;
        self.check(holds, format_args!("{what}: {seen:?}, not {expected:?}"));
    }

    /// Checks that an attempt was refused with one of these errors.
    pub fn refused<T>(&mut self, act: &str, result: Result<T, impl Into<io::Error>>, with: &[Errno]) {
        match result {
            Ok(_) => self.check(false, format_args!("{act}: it succeeded")),
            Err(error) => {
                let error: io::Error = error.into();
                let errno = error.raw_os_error().map(Errno::from_raw);
                let expected = with.iter().map(|errno| format!("{errno:?}")).collect::<Vec<_>>().join(" or ");
                let as_expected = errno.is_some_and(|errno| with.contains(&errno));
                self.check(as_expected, format_args!("{act}: {error}, not {expected}"));
            }
        }
    }

    /// Checks that an attempt was refused, however.
    pub fn fails<T>(&mut self, act: &str, result: Result<T, impl Display>) {
        self.check(result.is_err(), format_args!("{act}: it succeeded"));
    }

    /// Checks that something works, and yields it.
    pub fn works<T>(&mut self, act: &str, result: Result<T, impl Display>) -> Option<T> {
        self.checks += 1;
        result.map_err(|error| self.broken.push(format!("{act}: {error}"))).ok()
    }

    /// Says that all or a part of the probe can't be done here.
    pub fn not_applicable(&mut self, why: impl Into<String>) {
        self.not_applicable.push(why.into());
    }

    /// Takes over what another part of the probe found.
    pub fn absorb(&mut self, more: Self) {
        self.checks += more.checks;
        self.broken.extend(more.broken);
        self.not_applicable.extend(more.not_applicable);
    }

    /// What it all comes to. A part that can't be done here is told only where nothing else was.
    pub fn outcome(self) -> Outcome {
        match self {
            Self { broken, .. } if !broken.is_empty() => Outcome::Broken(broken),
            Self { checks: 0, not_applicable, .. } if !not_applicable.is_empty() => {
                Outcome::NotApplicable(not_applicable)
            }
            Self { checks: 0, .. } => Outcome::broken("the probe checked nothing"),
            _ => Outcome::Held,
        }
    }

    /// Tells them, for [`Findings::read`].
    ///
    /// # Errors
    /// Where `out` can't be written to.
    pub fn write(&self, mut out: impl Write) -> io::Result<()> {
        let line = |text: &String| text.replace(['\n', '\r'], " ");
        for text in &self.broken {
            writeln!(out, "{MARK} broken {}", line(text))?;
        }
        for text in &self.not_applicable {
            writeln!(out, "{MARK} not-applicable {}", line(text))?;
        }
        writeln!(out, "{MARK} done {}", self.checks)?;
        out.flush()
    }

    /// Findings as [`Findings::write`] told them, among whatever else; `None` where they don't come to their end.
    pub fn read(said: &[u8]) -> Option<Self> {
        let mut findings = Self::default();
        for line in String::from_utf8_lossy(said).lines() {
            let Some((kind, rest)) =
                line.strip_prefix(MARK).and_then(|line| line.trim_start().split_once(' '))
            else {
                continue;
            };
            match kind {
                "broken" => findings.broken.push(rest.to_owned()),
                "not-applicable" => findings.not_applicable.push(rest.to_owned()),
                "done" => {
                    findings.checks = rest.parse().ok()?;
                    return Some(findings);
                }
                _ => {}
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(findings: &Findings) -> Option<Outcome> {
        let mut said = b"noise\n".to_vec();
        findings.write(&mut said).unwrap();
        Findings::read(&said).map(Findings::outcome)
    }

    #[test]
    fn what_is_told_is_read() {
        let mut findings = Findings::default();
        assert_eq!(told(&findings), Some(Outcome::broken("the probe checked nothing")));
        findings.not_applicable("no such thing");
        assert_eq!(told(&findings), Some(Outcome::not_applicable("no such thing")));
        findings.check(true, "-");
        assert_eq!(told(&findings), Some(Outcome::Held));
        findings.refused("open\nit", Err::<(), _>(Errno::EIO), &[Errno::EPERM]);
        let Some(Outcome::Broken(reasons)) = told(&findings) else { panic!("not broken") };
        assert_eq!(reasons.len(), 1);
        assert!(reasons[0].starts_with("open it: ") && reasons[0].ends_with("not EPERM"), "{reasons:?}");
    }

    #[test]
    fn without_an_end_there_is_no_verdict() {
        assert!(Findings::read(b"").is_none());
        assert!(Findings::read(b"cofferdam-probe: broken it\n").is_none());
        assert!(Findings::read(b"done 3\n").is_none());
    }

    #[test]
    fn what_is_broken_in_a_part_is_broken() {
        let broken = |reason: &str| Outcome::broken(reason);
        assert_eq!(Outcome::Held.and(broken("a")), broken("a"));
        assert_eq!(broken("a").and(broken("b")), Outcome::Broken(vec!["a".into(), "b".into()]));
        assert_eq!(Outcome::not_applicable("a").and(Outcome::Held), Outcome::Held);
    }
}
