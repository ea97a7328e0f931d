//! What was found, for people and for programs.

use std::io::{self, Write};

use anstyle::{AnsiColor, Style};
use cofferdam_sandbox::probe::{Area, Finding, Host, Mode, Need, Outcome, Step};
use serde::Serialize;
use serde::ser::{SerializeStruct, Serializer};

use super::{Report, Verdict};

/// Grows when a field changes its meaning or goes; new ones may come at any time.
const FORMAT: u32 = 1;

const GOOD: Style = AnsiColor::Green.on_default();
const SHORT: Style = AnsiColor::Yellow.on_default();
const BAD: Style = AnsiColor::Red.on_default().bold();
const HEAD: Style = Style::new().bold();
const PLAIN: Style = Style::new();

/// Where the second column begins, and the lines that explain an outcome.
const INDENT: usize = 12;

/// Everything, step by step, and what it comes to.
pub fn table(report: &Report, out: &mut impl Write) -> io::Result<()> {
    let width = Step::ALL.iter().map(|step| step.title().len()).max().unwrap_or(0);
    let mut area = None;
    for finding in &report.examination.findings {
        if area != Some(finding.step.area()) {
            area = Some(finding.step.area());
            writeln!(out, "{HEAD}{}{HEAD:#}", title(finding.step.area()))?;
        }
        row(finding, width, out)?;
    }
    writeln!(out)?;
    summary(report, out)
}

fn title(area: Area) -> &'static str {
    match area {
        Area::Namespaces => "Namespaces",
        Area::Ids => "Ids",
        Area::Mounts => "Mounts",
        Area::Inputs => "Inputs",
        Area::Network => "Network",
        Area::Confinement => "Confinement",
        Area::Processes => "Processes",
        Area::Limits => "Limits",
        Area::State => "State directory",
        Area::Whole => "Everything at once",
    }
}

fn row(finding: &Finding, width: usize, out: &mut impl Write) -> io::Result<()> {
    let Finding { step, outcome } = finding;
    let style = colour(finding);
    let word = outcome.word();
    let remark = match outcome {
        Outcome::Untried { needs } => format!("needs {}", needs.title()),
        outcome => [outcome.errno().map(|errno| format!("{errno:?}")), outcome.detail().map(str::to_owned)]
            .into_iter()
            .flatten()
            .collect::<Vec<_>>()
            .join("  "),
    };
    let line = format!("{:width$}  {remark}", step.title());
    writeln!(out, "  {style}{word:<8}{style:#}  {}", line.trim_end())?;
    for (name, text) in [("cause", outcome.cause()), ("fix", outcome.fix())] {
        explain(name, text.unwrap_or_default(), out)?;
    }
    Ok(())
}

fn explain(name: &str, text: &str, out: &mut impl Write) -> io::Result<()> {
    for (number, line) in text.lines().enumerate() {
        let name = if number == 0 { format!("{name}:") } else { String::new() };
        writeln!(out, "{:INDENT$}{name:<7}{line}", "")?;
    }
    Ok(())
}

fn colour(finding: &Finding) -> Style {
    match (&finding.outcome, finding.step.need()) {
        (Outcome::Works { .. }, _) => GOOD,
        (_, Need::Information) => PLAIN,
        (Outcome::Degraded { .. }, _) | (_, Need::Layer) => SHORT,
        (_, Need::Builds) => BAD,
    }
}

fn summary(report: &Report, out: &mut impl Write) -> io::Result<()> {
    let (style, verdict) = match report.verdict {
        Verdict::Ready => (GOOD, "Builds can run here, with all that cofferdam can do."),
        Verdict::Weaker => (SHORT, "Builds can run here, without some of what cofferdam can do."),
        Verdict::Unable => (BAD, "Builds can't run here."),
    };
    writeln!(out, "{style}{verdict}{style:#}")?;
    let host = &report.examination.host;
    writeln!(out, "  {:<10}{}, {}", "you are", user(host), mode(report.examination.mode, host))?;
    if report.verdict != Verdict::Unable {
        for (name, what) in offer(report) {
            writeln!(out, "  {name:<10}{what}")?;
        }
    }
    let falls_short = |finding: &&Finding| {
        finding.step.need() != Need::Information
            && matches!(finding.outcome, Outcome::Missing { .. } | Outcome::Degraded { .. })
    };
    let short: Vec<&Finding> = report.examination.findings.iter().filter(falls_short).collect();
    if !short.is_empty() {
        writeln!(out, "{HEAD}Missing or short, and what it costs:{HEAD:#}")?;
    }
    for finding in short {
        let style = colour(finding);
        writeln!(out, "  {style}{}{style:#}: {}", finding.step.title(), finding.step.costs())?;
    }
    Ok(())
}

fn user(host: &Host) -> String {
    match &host.user {
        Some(name) => format!("{name} (user {}, group {})", host.uid, host.gid),
        None => format!("user {}, group {}", host.uid, host.gid),
    }
}

fn mode(mode: Mode, host: &Host) -> String {
    let container = host.container.as_deref().map(|kind| format!(" ({kind})")).unwrap_or_default();
    match mode {
        Mode::Root => format!("root of this machine{container}"),
        Mode::ContainerRoot => format!("root of a container{container}"),
        Mode::Range => format!("unprivileged, with subordinate ids{container}"),
        Mode::Single => format!("unprivileged, with one id{container}"),
    }
}

/// What builds have, in a few lines.
fn offer(report: &Report) -> Vec<(&'static str, String)> {
    let outcome = |step| report.examination.outcome(step);
    let works = |step| outcome(step).is_some_and(Outcome::is_usable);
    let detail = |step| outcome(step).and_then(Outcome::detail).unwrap_or_default().to_owned();
    let either = |step, yes: &str, no: &str| if works(step) { yes.to_owned() } else { no.to_owned() };
    vec![
        ("ids", detail(Step::Enter)),
        ("inputs", either(Step::FuseMount, "shown over FUSE", "laid out as files: no FUSE")),
        ("network", either(Step::Pasta, "none, or one apart from the host's", "none, or the host's")),
        (
            "limits",
            either(Step::CgroupControllers, "by cgroups", "by resource limits of single processes alone"),
        ),
        ("disk", detail(Step::StateSpace)),
    ]
}

impl Serialize for Report {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct User<'a> {
            uid: u32,
            gid: u32,
            name: Option<&'a str>,
        }
        let host = &self.examination.host;
        let mut object = serializer.serialize_struct("Report", 9)?;
        object.serialize_field("format", &FORMAT)?;
        object.serialize_field("version", env!("CARGO_PKG_VERSION"))?;
        object.serialize_field("verdict", &self.verdict)?;
        object.serialize_field("mode", self.examination.mode.id())?;
        object.serialize_field("user", &User { uid: host.uid, gid: host.gid, name: host.user.as_deref() })?;
        object.serialize_field("container", &host.container)?;
        object.serialize_field("kernel", &host.kernel)?;
        let state_dir = self.state_dir.as_ref().map(|path| path.display().to_string());
        object.serialize_field("state_dir", &state_dir)?;
        object.serialize_field("steps", &self.examination.findings)?;
        object.end()
    }
}
