//! What the benchmarks share: contenders run in turn, a table, a record.

#![allow(dead_code, reason = "each benchmark uses some of it")]

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How often contenders are run.
#[derive(Clone, Copy)]
pub struct Rounds {
    /// To begin with, without being measured.
    pub warm_up: usize,
    pub measured: usize,
}

const ROUNDS: Rounds = Rounds { warm_up: 20, measured: 200 };

/// The static busybox of Debian's busybox-static.
pub const BUSYBOX: &str = "/bin/busybox";

/// Cargo passes --bench; run by `cargo test --benches` without it, there is nothing to measure.
pub fn asked_for() -> bool {
    std::env::args().any(|argument| argument == "--bench")
}

/// Something to measure.
pub struct Contender<'a> {
    name: &'a str,
    prepare: Option<Box<dyn FnMut() + 'a>>,
    run: Box<dyn FnMut() + 'a>,
    times: Vec<Duration>,
}

impl<'a> Contender<'a> {
    pub fn new(name: &'a str, run: impl FnMut() + 'a) -> Contender<'a> {
        Contender { name, prepare: None, run: Box::new(run), times: Vec::new() }
    }

    /// What is done before each run, and not measured.
    pub fn after(mut self, prepare: impl FnMut() + 'a) -> Contender<'a> {
        self.prepare = Some(Box::new(prepare));
        self
    }
}

/// Runs all of them in turn, prints what they took, and records it as `benches/record/DATE-NAME.md`.
pub fn compare(name: &str, title: &str, contenders: &mut [Contender]) {
    measure(ROUNDS, contenders);
    let bwrap = said("bwrap", &["--version"]);
    let Rounds { warm_up, measured } = ROUNDS;
    let runs = format!("{measured} runs each after {warm_up} to warm up, interleaved; milliseconds.");
    let report = format!("{}{runs}\n{bwrap}.\n\n{}", heading(title), table("median, of ours", contenders));
    println!("{report}");
    record(name, &report);
}

/// Runs all of them in turn and notes what they took.
pub fn measure(rounds: Rounds, contenders: &mut [Contender]) {
    for round in 0..rounds.warm_up + rounds.measured {
        for contender in contenders.iter_mut() {
            if let Some(prepare) = &mut contender.prepare {
                prepare();
            }
            let start = Instant::now();
            (contender.run)();
            if round >= rounds.warm_up {
                contender.times.push(start.elapsed());
            }
        }
    }
}

/// Keeps a report as `benches/record/DATE-NAME.md`.
pub fn record(name: &str, report: &str) {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("benches/record");
    let record = dir.join(format!("{}-{name}.md", said("date", &["-u", "+%F"])));
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(&record, report).unwrap();
    println!("recorded in {}", record.display());
}

/// The title, when, and on what machine.
pub fn heading(title: &str) -> String {
    format!(
        "# {title}, {}\n\nLinux {}, {}, {} cores. ",
        said("date", &["-u", "+%F %H:%M UTC"]),
        said("uname", &["-r"]),
        cpu(),
        std::thread::available_parallelism().map_or(0, usize::from),
    )
}

/// What they took, as Markdown; the last column compares with the first of them.
pub fn table(ratio: &str, contenders: &mut [Contender]) -> String {
    let mut text = format!("| what | median | p90 | min | {ratio} |\n|---|---:|---:|---:|---:|\n");
    let mut first = None;
    for Contender { name, times, .. } in contenders {
        times.sort_unstable();
        let at = |part: f64| times[(times.len() as f64 * part) as usize].as_secs_f64() * 1e3;
        let (median, p90, min) = (at(0.5), at(0.9), at(0.0));
        let ratio = median / *first.get_or_insert(median);
        writeln!(text, "| {name} | {median:.2} | {p90:.2} | {min:.2} | {ratio:.2} × |").expect("to a String");
    }
    text
}

fn cpu() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    model.map_or("an unnamed CPU", |(_, model)| model).to_owned()
}

/// The first line that a program prints.
pub fn said(program: &str, args: &[&str]) -> String {
    let run = Command::new(program).args(args).output().unwrap();
    String::from_utf8_lossy(&run.stdout).lines().next().unwrap_or_default().to_owned()
}

/// `busybox true` in bubblewrap's sandbox.
pub fn bwrap(root: &Path, more: &[&str]) {
    let mut command = Command::new("bwrap");
    command.args(["--unshare-all", "--ro-bind"]).arg(root).arg("/").args(more).args(["/bin/busybox", "true"]);
    succeeds(&mut command);
}

/// Runs a command, which has to go well.
pub fn succeeds(command: &mut Command) {
    let status = command.stdin(Stdio::null()).status().unwrap();
    assert!(status.success(), "{command:?}: {status}");
}
