//! What the benchmarks share: contenders run in turn, a table, a record.

#![allow(dead_code, reason = "each benchmark uses some of it")]

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const WARM_UP: usize = 20;
const MEASURED: usize = 200;

/// The static busybox of Debian's busybox-static.
pub const BUSYBOX: &str = "/bin/busybox";

/// Cargo passes --bench; run by `cargo test --benches` without it, there is nothing to measure.
pub fn asked_for() -> bool {
    std::env::args().any(|argument| argument == "--bench")
}

/// Something to measure.
pub struct Contender<'a> {
    name: &'a str,
    run: Box<dyn FnMut() + 'a>,
    times: Vec<Duration>,
}

impl<'a> Contender<'a> {
    pub fn new(name: &'a str, run: impl FnMut() + 'a) -> Contender<'a> {
        Contender { name, run: Box::new(run), times: Vec::with_capacity(MEASURED) }
    }
}

/// Runs all of them in turn, prints what they took, and records it as `benches/record/DATE-NAME.md`.
pub fn compare(name: &str, title: &str, contenders: &mut [Contender]) {
    for round in 0..WARM_UP + MEASURED {
        for contender in contenders.iter_mut() {
            let start = Instant::now();
            (contender.run)();
            if round >= WARM_UP {
                contender.times.push(start.elapsed());
            }
        }
    }
    let report = report(title, contenders);
    println!("{report}");
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("benches/record");
    let record = dir.join(format!("{}-{name}.md", said("date", &["-u", "+%F"])));
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(&record, report).unwrap();
    println!("recorded in {}", record.display());
}

/// The machine and the table, as Markdown.
fn report(title: &str, contenders: &mut [Contender]) -> String {
    let mut text = format!(
        "# {title}, {}\n\nLinux {}, {}, {} cores. {MEASURED} runs each after {WARM_UP} to warm up, interleaved; \
         milliseconds.\n{}.\n\n",
        said("date", &["-u", "+%F %H:%M UTC"]),
        said("uname", &["-r"]),
        cpu(),
        std::thread::available_parallelism().map_or(0, usize::from),
        said("bwrap", &["--version"]),
    );
    text += "| what | median | p90 | min | median, of ours |\n|---|---:|---:|---:|---:|\n";
    let mut ours = None;
    for Contender { name, times, .. } in contenders {
        times.sort_unstable();
        let at = |part: f64| times[(times.len() as f64 * part) as usize].as_secs_f64() * 1e3;
        let (median, p90, min) = (at(0.5), at(0.9), at(0.0));
        let ratio = median / *ours.get_or_insert(median);
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
fn said(program: &str, args: &[&str]) -> String {
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
