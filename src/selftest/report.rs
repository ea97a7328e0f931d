//! What came of it: for people as tables, for programs as JSON, for CI as JUnit's XML.

use std::fmt::{self, Write as _};

use serde::Serialize;

use super::{Mode, Outcome, Probe, Profile, Weight};

/// The version of the JSON's shape.
const JSON_VERSION: u32 = 1;

/// Where a table's last column starts.
const PROMISE_WIDTH: usize = 84;

/// All of a run.
#[derive(Debug, Serialize)]
pub struct Report {
    version: u32,
    cofferdam: &'static str,
    kernel: String,
    /// What is promised.
    pub profile: Profile,
    /// Why this is taken for a container, if it is.
    pub container: Option<String>,
    /// Each mode, also those that can't be run here.
    pub modes: Vec<ModeReport>,
    summary: Summary,
}

/// One mode.
#[derive(Debug, Serialize)]
pub struct ModeReport {
    /// Which.
    pub mode: Mode,
    /// Whether it was to be expected.
    pub expected: bool,
    /// Why it can't be run here.
    pub unavailable: Option<String>,
    /// Its probes.
    pub probes: Vec<ProbeReport>,
    /// Whether the host is afterwards as it was.
    #[serde(flatten, serialize_with = "as_left")]
    pub left: Outcome,
    /// What could not be looked at.
    pub notes: Vec<String>,
}

/// One probe.
#[derive(Clone, Debug, Serialize)]
pub struct ProbeReport {
    /// Its id.
    pub id: &'static str,
    /// What it promises.
    pub promise: &'static str,
    required: bool,
    /// What came of it.
    #[serde(flatten)]
    pub outcome: Outcome,
    seconds: f64,
}

/// How many of which kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Promises that hold.
    pub held: usize,
    /// Promises that don't, and expected modes that can't be run.
    pub broken: usize,
    /// Promises that can't be tested here.
    pub not_applicable: usize,
}

/// What the host's side itself checks, after every batch and at the end.
pub const LEFT_PROMISE: &str = "nothing of any build is left, and the host is as it was";

fn as_left<S: serde::Serializer>(left: &Outcome, serializer: S) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    struct Left<'a> {
        left: &'a Outcome,
    }
    Left { left }.serialize(serializer)
}

impl ProbeReport {
    /// A probe's, which took so many seconds.
    pub fn new(probe: &Probe, outcome: Outcome, seconds: f64) -> Self {
        let (id, promise, required) = (probe.id, probe.promise, probe.weight == Weight::Required);
        // Milliseconds will do.
        Self { id, promise, required, outcome, seconds: (seconds * 1000.0).round() / 1000.0 }
    }
}

impl ModeReport {
    /// Of a mode in which nothing was run yet.
    pub fn new(mode: Mode) -> Self {
        let left = Outcome::not_applicable("nothing was run");
        Self { mode, expected: false, unavailable: None, probes: Vec::new(), left, notes: Vec::new() }
    }

    fn outcomes(&self) -> impl Iterator<Item = &Outcome> {
        let left = self.unavailable.is_none().then_some(&self.left);
        self.probes.iter().map(|probe| &probe.outcome).chain(left)
    }

    fn summary(&self) -> Summary {
        let mut summary = Summary::default();
        for outcome in self.outcomes() {
            match outcome {
                Outcome::Held => summary.held += 1,
                Outcome::Broken(_) => summary.broken += 1,
                Outcome::NotApplicable(_) => summary.not_applicable += 1,
            }
        }
        if self.expected && self.unavailable.is_some() {
            summary.broken += 1;
        }
        summary
    }
}

impl Report {
    /// Puts the modes together.
    pub fn new(profile: Profile, container: Option<String>, modes: Vec<ModeReport>) -> Self {
        let summary = modes.iter().map(ModeReport::summary).fold(Summary::default(), |all, mode| Summary {
            held: all.held + mode.held,
            broken: all.broken + mode.broken,
            not_applicable: all.not_applicable + mode.not_applicable,
        });
        let kernel =
            std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned();
        let (version, cofferdam) = (JSON_VERSION, env!("CARGO_PKG_VERSION"));
        Self { version, cofferdam, kernel, profile, container, modes, summary }
    }

    /// How many of which kind.
    pub fn summary(&self) -> Summary {
        self.summary
    }

    /// As one JSON document.
    ///
    /// # Errors
    /// Never, in practice.
    pub fn to_json(&self) -> Result<String, serde_json::Error> {
        serde_json::to_string_pretty(self)
    }

    /// As a document that CI systems show as tests: a suite a mode, a case a probe.
    pub fn to_junit(&self) -> String {
        let mut xml = String::from(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuites name=\"cofferdam selftest\">\n",
        );
        for mode in &self.modes {
            // Writing to a string can't fail.
            let _ = junit_suite(&mut xml, mode);
        }
        xml.push_str("</testsuites>\n");
        xml
    }
}

fn junit_suite(xml: &mut String, mode: &ModeReport) -> fmt::Result {
    let Summary { held, broken, not_applicable } = mode.summary();
    let unavailable = usize::from(mode.unavailable.is_some() && !mode.expected);
    writeln!(
        xml,
        "  <testsuite name=\"{}\" tests=\"{}\" failures=\"{broken}\" errors=\"0\" skipped=\"{}\">",
        mode.mode,
        held + broken + not_applicable + unavailable,
        not_applicable + unavailable,
    )?;
    if let Some(reason) = &mode.unavailable {
        let outcome = match mode.expected {
            true => Outcome::broken(reason),
            false => Outcome::not_applicable(reason),
        };
        junit_case(xml, mode.mode, "MODE", "this mode can be run", &outcome, 0.0)?;
    } else {
        for ProbeReport { id, promise, outcome, seconds, .. } in &mode.probes {
            junit_case(xml, mode.mode, id, promise, outcome, *seconds)?;
        }
        junit_case(xml, mode.mode, "LEFT", LEFT_PROMISE, &mode.left, 0.0)?;
    }
    writeln!(xml, "  </testsuite>")
}

fn junit_case(
    xml: &mut String,
    mode: Mode,
    id: &str,
    promise: &str,
    outcome: &Outcome,
    seconds: f64,
) -> fmt::Result {
    let name = escaped(&format!("{id} {promise}"));
    write!(
        xml,
        "    <testcase classname=\"cofferdam.selftest.{mode}\" name=\"{name}\" time=\"{seconds:.3}\""
    )?;
    match outcome {
        Outcome::Held => writeln!(xml, "/>"),
        Outcome::Broken(reasons) => {
            let text = escaped(&reasons.join("; "));
            writeln!(xml, ">\n      <failure message=\"{text}\">{text}</failure>\n    </testcase>")
        }
        Outcome::NotApplicable(reasons) => {
            let text = escaped(&reasons.join("; "));
            writeln!(xml, ">\n      <skipped message=\"{text}\"/>\n    </testcase>")
        }
    }
}

/// For text and attributes of XML 1.0, which has no place for most control characters.
fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&apos;"),
            '\n' | '\r' | '\t' => safe.push(' '),
            '\u{fffe}' | '\u{ffff}' => safe.push('\u{fffd}'),
            control if control < ' ' => safe.push('\u{fffd}'),
            other => safe.push(other),
        }
    }
    safe
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Held => "held",
            Self::Broken(_) => "BROKEN",
            Self::NotApplicable(_) => "not applicable",
        })
    }
}

impl fmt::Display for ProbeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        row(f, self.id, self.promise, &self.outcome)
    }
}

fn row(f: &mut fmt::Formatter<'_>, id: &str, promise: &str, outcome: &Outcome) -> fmt::Result {
    write!(f, "{id:<8} {promise:<PROMISE_WIDTH$} {outcome}")?;
    let (Outcome::Broken(reasons) | Outcome::NotApplicable(reasons)) = outcome else { return Ok(()) };
    reasons.iter().try_for_each(|reason| write!(f, "\n           {}", printable(reason)))
}

/// What a probe has said, without what would move the cursor.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

impl fmt::Display for ModeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "mode {}", self.mode)?;
        if let Some(reason) = &self.unavailable {
            let weight = if self.expected { "BROKEN, because it is expected" } else { "not applicable" };
            return writeln!(f, "  {weight}: {}", printable(reason));
        }
        for probe in &self.probes {
            writeln!(f, "  {probe}")?;
        }
        f.write_str("  ")?;
        row(f, "LEFT", LEFT_PROMISE, &self.left)?;
        f.write_char('\n')?;
        self.notes.iter().try_for_each(|note| writeln!(f, "  note: {note}"))
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} held, {} broken, {} not applicable", self.held, self.broken, self.not_applicable)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cofferdam {}, Linux {}, profile {}", self.cofferdam, self.kernel, self.profile.name())?;
        match &self.container {
            Some(why) => writeln!(f, ", in a container ({why})\n")?,
            None => f.write_str("\n\n")?,
        }
        for mode in &self.modes {
            writeln!(f, "{mode}")?;
        }
        write!(f, "{}", self.summary)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(outcome: Outcome) -> Report {
        let mut mode = ModeReport::new(Mode::Root);
        mode.probes =
            vec![ProbeReport { id: "XX-01", promise: "a <b>", required: true, outcome, seconds: 0.5 }];
        mode.left = Outcome::Held;
        Report::new(Profile::Parity, None, vec![mode])
    }

    #[test]
    fn what_is_counted() {
        let count = |outcome| report(outcome).summary();
        assert_eq!(count(Outcome::Held), Summary { held: 2, broken: 0, not_applicable: 0 });
        assert_eq!(count(Outcome::broken("x")), Summary { held: 1, broken: 1, not_applicable: 0 });
        let mut mode = ModeReport::new(Mode::Range);
        mode.unavailable = Some("no".into());
        assert_eq!(mode.summary(), Summary::default());
        mode.expected = true;
        assert_eq!(mode.summary(), Summary { held: 0, broken: 1, not_applicable: 0 });
    }

    #[test]
    fn json_has_its_shape() {
        let json: serde_json::Value =
            serde_json::from_str(&report(Outcome::broken("why")).to_json().unwrap()).unwrap();
        let probe = &json["modes"][0]["probes"][0];
        assert_eq!(probe["id"], "XX-01");
        assert_eq!(probe["outcome"], "broken");
        assert_eq!(probe["reasons"][0], "why");
        assert_eq!(json["modes"][0]["left"]["outcome"], "held");
        assert_eq!(json["summary"]["broken"], 1);
    }

    #[test]
    fn xml_takes_any_text() {
        let xml = report(Outcome::broken("\"<&>' \u{1b}[1m\n")).to_junit();
        assert!(xml.contains("&quot;&lt;&amp;&gt;&apos; \u{fffd}[1m "), "{xml}");
        assert!(xml.contains("a &lt;b&gt;") && xml.contains("failures=\"1\""), "{xml}");
    }
}
