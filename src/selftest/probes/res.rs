//! RES: what one build can use up, and whether others notice.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Write};
use std::time::{Duration, Instant};

use cofferdam_sandbox::cgroup::{Controller, Status};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::statvfs::statvfs;
use tokio::task::JoinSet;

use super::tools::{eventually, field, hold, holding};
use crate::build::error::{Fault, Refused};
use crate::build::logs::MAX_PIECE;
use crate::build::request::Request;
use crate::selftest::battery::{MAX_WAITING, MEMORY_BYTES, SCRATCH_BYTES};
use crate::selftest::stage::{End, Ended, Stage, path};
use crate::selftest::{Act, Company, Findings, Outcome, Play, Probe, Weight};

pub(super) const PROBES: &[Probe] = &[
    Probe {
        id: "RES-01",
        promise: "a build that uses up its memory is ended as a whole, and told why",
        weight: Weight::Required,
        company: Company::Alone,
        attack: use_up_memory,
        play: Play::Script(|stage| Box::pin(out_of_memory(stage))),
    },
    Probe {
        id: "RES-02",
        promise: "/dev/shm takes no more bytes and no more files than it may",
        weight: Weight::Desired,
        company: Company::Alone,
        attack: fill_shm,
        play: Play::Plain,
    },
    Probe {
        id: "RES-03",
        promise: "a build that fills the disk is ended, and told why; so is one whose outputs are endless",
        weight: Weight::Required,
        company: Company::Alone,
        attack: fill_disk,
        play: Play::Script(|stage| Box::pin(disk_full(stage))),
    },
    Probe {
        id: "RES-04",
        promise: "a flood of output waits for its reader; it takes no memory and holds up nobody else",
        weight: Weight::Required,
        company: Company::Alone,
        attack: flood,
        play: Play::Script(|stage| Box::pin(unread_flood(stage))),
    },
    Probe {
        id: "RES-05",
        promise: "a line without an end arrives whole, in small pieces",
        weight: Weight::Required,
        company: Company::Shared,
        attack: endless_line,
        play: Play::Script(|stage| Box::pin(in_pieces(stage))),
    },
    Probe {
        id: "RES-06",
        promise: "output arrives byte for byte, and half a line without delay",
        weight: Weight::Required,
        company: Company::Shared,
        attack: any_bytes,
        play: Play::Script(|stage| Box::pin(byte_for_byte(stage))),
    },
    Probe {
        id: "RES-09",
        promise: "a build that keeps every processor busy holds up no other one",
        weight: Weight::Desired,
        company: Company::Alone,
        attack: spin,
        play: Play::Script(|stage| Box::pin(beside_spinning(stage))),
    },
    Probe {
        id: "RES-11",
        promise: "of many requests a bounded number waits, and the rest is sent away at once",
        weight: Weight::Desired,
        company: Company::Alone,
        attack: |act, findings| match act.role.as_str() {
            "hold" => hold(),
            _ => findings.check(true, ""),
        },
        play: Play::Script(|stage| Box::pin(many_requests(stage))),
    },
];

/// How often memory is asked for at a time.
const CHUNK: usize = 4 << 20;
/// Where a limit of memory that does not hold is noticed.
const TOO_MUCH_MEMORY: u64 = 2 * MEMORY_BYTES;

/// What is said by a part of a build that should have been ended with the rest.
const SURVIVED: &str = "survived";

fn use_up_memory(act: &Act, findings: &mut Findings) {
    match act.role.as_str() {
        "heap" | "shm" => {
            // The one that takes memory is a child: a build is more than the process that the kernel picks.
            let eaten = act.again("eat").arg(&act.role).output();
            println!("{SURVIVED}: {eaten:?}");
            hold();
        }
        _ => {
            let shared = act.arguments.first().is_some_and(|how| how == "shm");
            let eaten = if shared { eat_shared() } else { eat_heap() };
            findings.check(false, format_args!("{TOO_MUCH_MEMORY} bytes were to be had: {eaten:?}"));
        }
    }
}

fn eat_heap() -> io::Result<()> {
    let mut all: Vec<Vec<u8>> = Vec::new();
    while (all.len() * CHUNK) as u64 <= TOO_MUCH_MEMORY {
        // Not zeros, which need no memory until they are written to.
        all.push(vec![1; CHUNK]);
    }
    std::hint::black_box(&all);
    Ok(())
}

/// Memory that no process owns: files without a name.
fn eat_shared() -> io::Result<()> {
    let mut file: File = rustix::fs::memfd_create(c"eaten", rustix::fs::MemfdFlags::CLOEXEC)?.into();
    let mut files = Vec::new();
    for _ in 0..TOO_MUCH_MEMORY / CHUNK as u64 {
        file.write_all(&vec![1; CHUNK])?;
        files.push(file);
        file = rustix::fs::memfd_create(c"eaten", rustix::fs::MemfdFlags::CLOEXEC)?.into();
    }
    Ok(())
}

async fn out_of_memory(stage: &Stage<'_>) -> Outcome {
    let status = &stage.theatre.worker.limits;
    match status {
        Status::Version2 { controllers, .. } if controllers.contains(&Controller::Memory) => {}
        other => {
            return Outcome::not_applicable(format!("no cgroup limits the memory of a build here: {other}"));
        }
    }
    let mut outcome = Outcome::Held;
    for how in ["heap", "shm"] {
        let Ok(draft) = stage.draft(how, &[]) else { return Outcome::broken("no request") };
        let ended = stage.run(draft).await;
        let mut findings = Findings::default();
        findings.check(failed_with(&ended, "out of memory"), format_args!("{how}: {}", ended.describe()));
        let survived = String::from_utf8_lossy(&ended.stdout).contains(SURVIVED);
        findings.check(!survived, format_args!("{how}: the rest of the build went on: {}", ended.describe()));
        outcome = outcome.and(findings.outcome());
    }
    outcome
}

/// Whether a build failed by itself, with these words.
fn failed_with(ended: &Ended, words: &str) -> bool {
    matches!(&ended.end, End::Failed(failure) if failure.message.contains(words))
}

const SHM: &str = "/dev/shm";
/// More files than `/dev/shm` is to take.
const TOO_MANY_FILES: usize = 100_000;

fn fill_shm(_: &Act, findings: &mut Findings) {
    let Some(found) = findings.works("statvfs /dev/shm", statvfs(SHM)) else { return };
    let room = found.blocks() * found.fragment_size();
    findings.check(
        room > 0 && room <= MEMORY_BYTES / 2,
        format_args!("/dev/shm has room for {room} bytes, of {MEMORY_BYTES} that the build may have"),
    );
    let mut written = 0_u64;
    let filled = (|| -> io::Result<()> {
        let mut file = File::create("/dev/shm/file")?;
        while written <= MEMORY_BYTES / 2 {
            file.write_all(&vec![1; CHUNK])?;
            written += CHUNK as u64;
        }
        Ok(())
    })();
    findings.refused(&format!("write more than {written} bytes"), filled, &[Errno::ENOSPC]);
    findings.works("make room again", fs::remove_file("/dev/shm/file"));
    let many = (0..TOO_MANY_FILES).try_for_each(|n| File::create(format!("{SHM}/{n}")).map(drop));
    findings.refused(&format!("make {TOO_MANY_FILES} files"), many, &[Errno::ENOSPC]);
}

/// The length of the files that a disk is filled with; their number is too large for the limit.
const FILE_BYTES: u64 = 64 << 20;
const FILES: u64 = SCRATCH_BYTES / FILE_BYTES + 2;
/// How many times the limit a sparse output is said to hold.
const SPARSE: u64 = 64;

fn fill_disk(act: &Act, findings: &mut Findings) {
    match act.role.as_str() {
        "many" => {
            let filled = (0..FILES).try_for_each(|n| claim(["/build", "/tmp"][n as usize % 2], n));
            findings.works("fill the disk", filled);
            hold();
        }
        // Of the end of this one its signal tells.
        "long" => {
            let longer = File::create("/build/file").and_then(|file| file.set_len(i64::MAX as u64));
            findings.refused("make a file of 8 EiB", longer, &[Errno::EFBIG]);
        }
        "sparse" => {
            let made = fs::create_dir("out").and_then(|()| {
                (0..SPARSE).try_for_each(|n| File::create(format!("out/{n}"))?.set_len(SCRATCH_BYTES - 1))
            });
            findings.works("make files without contents", made);
        }
        _ => findings.check(true, ""),
    }
}

/// Takes space without writing to it, where the file system can.
fn claim(dir: &str, n: u64) -> io::Result<()> {
    let mut file = File::create(format!("{dir}/{n}"))?;
    let length = i64::try_from(FILE_BYTES).unwrap_or(i64::MAX);
    match fallocate(&file, FallocateFlags::empty(), 0, length) {
        Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => {
            (0..FILE_BYTES / CHUNK as u64).try_for_each(|_| file.write_all(&vec![1; CHUNK]))
        }
        result => Ok(result?),
    }
}

/// How long it may take to notice.
const NOTICING_PATIENCE: Duration = Duration::from_secs(8);

async fn disk_full(stage: &Stage<'_>) -> Outcome {
    let mut findings = Findings::default();
    for role in ["many", "long", "sparse"] {
        let Ok(mut draft) = stage.draft(role, &[]) else { return Outcome::broken("no request") };
        if role == "sparse" {
            draft.outputs = vec![path("build/out")];
        }
        match tokio::time::timeout(NOTICING_PATIENCE, stage.run(draft)).await {
            Ok(ended) => findings.check(
                failed_with(&ended, "--max-scratch"),
                format_args!("{role}, not told that it reached --max-scratch: {}", ended.describe()),
            ),
            Err(_) => findings
                .check(false, format_args!("{role}: not ended after {} s", NOTICING_PATIENCE.as_secs())),
        }
    }
    findings.outcome().and(stage.act("canary", &[]).await)
}

/// How much a flood is: more than pipe, channel and all buffers hold.
const FLOOD_LINES: usize = 4 << 20;
/// How long nobody reads it.
const UNREAD: Duration = Duration::from_millis(800);
/// How much more memory the worker may take meanwhile. Beside the flood it holds what the other build needs.
const RSS_KIB: u64 = 16 << 10;

const FLOODING: &str = "flooding\n";

fn flood(act: &Act, findings: &mut Findings) {
    if act.role == "canary" {
        return findings.check(true, "");
    }
    let mut out = io::stdout().lock();
    let block = b"y\n".repeat(32 << 10);
    let start = Instant::now();
    let mut flooded = || -> io::Result<()> {
        out.write_all(FLOODING.as_bytes())?;
        (0..2 * FLOOD_LINES / block.len()).try_for_each(|_| out.write_all(&block))
    };
    findings.works("write", flooded());
    findings.check(start.elapsed() >= UNREAD, "a flood that nobody reads was taken all the same");
}

async fn unread_flood(stage: &Stage<'_>) -> Outcome {
    let Ok(draft) = stage.draft("", &[]) else { return Outcome::broken("no request") };
    let mut build = match stage.start(draft).await {
        Ok(build) => build,
        Err(fault) => return Outcome::broken(fault.to_string()),
    };
    if let Err(ended) = build.said(FLOODING).await {
        return Outcome::broken(ended.describe());
    }
    let mut findings = Findings::default();
    let before = resident();
    let start = Instant::now();
    let other = stage.act("canary", &[]).await;
    tokio::time::sleep(UNREAD.saturating_sub(start.elapsed())).await;
    let grown = resident().saturating_sub(before);
    findings.check(before > 0, "the worker can't tell its memory");
    findings.check(grown <= RSS_KIB, format_args!("the worker grew by {grown} KiB while nobody read"));
    let ended = build.finish().await;
    let lines = ended.stdout.strip_prefix(FLOODING.as_bytes()).unwrap_or_default();
    let same = lines.get(..2 * FLOOD_LINES).is_some_and(|lines| lines.chunks(2).all(|line| line == b"y\n"));
    findings.check(same, "the flood did not arrive as it was written");
    other.and(findings.outcome()).and(ended.verdict())
}

/// KiB of memory that this process takes.
fn resident() -> u64 {
    let field = field("/proc/self/status", "VmRSS").unwrap_or_default();
    field.split(' ').next().and_then(|number| number.parse().ok()).unwrap_or(0)
}

/// How long an endless line is.
const LINE_BYTES: usize = 2 << 20;

fn endless_line(_: &Act, findings: &mut Findings) {
    let mut out = io::stdout().lock();
    let block = vec![b'x'; 256 << 10];
    let written = (0..LINE_BYTES / block.len()).try_for_each(|_| out.write_all(&block));
    // An end after all, so that the verdict is a line of its own.
    findings.works("write", written.and_then(|()| out.write_all(b"\n")));
}

async fn in_pieces(stage: &Stage<'_>) -> Outcome {
    let Ok(draft) = stage.draft("", &[]) else { return Outcome::broken("no request") };
    let mut build = match stage.start(draft).await {
        Ok(build) => build,
        Err(fault) => return Outcome::broken(fault.to_string()),
    };
    let ended = build.finish().await;
    let mut findings = Findings::default();
    findings.check(
        build.longest_piece <= MAX_PIECE && build.longest_piece > 0,
        format_args!("a piece of {} bytes, not of at most {MAX_PIECE}", build.longest_piece),
    );
    let line = ended.stdout.split(|byte| *byte == b'\n').next().unwrap_or_default();
    findings.same("bytes of the line", line.len(), LINE_BYTES);
    findings.check(line.iter().all(|byte| *byte == b'x'), "the line has other bytes in it");
    findings.outcome().and(ended.verdict())
}

/// How many lines of one byte.
const SHORT_LINES: usize = 50_000;
/// What is asked for without a newline.
const PROMPT: &str = "password: ";
/// How long half a line may be held back, on a machine that is busy.
const PROMPT_PATIENCE: Duration = Duration::from_secs(1);

/// What is hard to take for text.
fn hard_to_take() -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..=255).collect();
    bytes.extend(
        b"\r\n10%\r20%\r\r\n\n\n\0\0\n\x1b[31mred\x1b[0m\x1b]0;title\x07\n\xff\xfe\xc3\n\xed\xa0\x80\n",
    );
    bytes.extend(b"\n".repeat(SHORT_LINES));
    bytes.extend(b"cofferdam-probe\n\n");
    bytes
}

fn any_bytes(_: &Act, findings: &mut Findings) {
    let (mut out, mut err) = (io::stdout().lock(), io::stderr().lock());
    let mut write = || -> io::Result<()> {
        err.write_all(&hard_to_take())?;
        err.write_all(b"the end without a newline")?;
        out.write_all(&hard_to_take())?;
        out.write_all(PROMPT.as_bytes())?;
        out.flush()?;
        std::thread::sleep(2 * PROMPT_PATIENCE);
        out.write_all(b"\n")
    };
    findings.works("write", write());
}

async fn byte_for_byte(stage: &Stage<'_>) -> Outcome {
    let Ok(draft) = stage.draft("", &[]) else { return Outcome::broken("no request") };
    let mut build = match stage.start(draft).await {
        Ok(build) => build,
        Err(fault) => return Outcome::broken(fault.to_string()),
    };
    let mut findings = Findings::default();
    if let Err(ended) = build.said("cofferdam-probe\n\n").await {
        return Outcome::broken(ended.describe());
    }
    match tokio::time::timeout(PROMPT_PATIENCE, build.said(PROMPT)).await {
        Ok(Ok(())) => findings.check(true, ""),
        Ok(Err(ended)) => return Outcome::broken(ended.describe()),
        Err(_) => findings
            .check(false, format_args!("half a line was held back for {} s", PROMPT_PATIENCE.as_secs())),
    }
    let ended = build.finish().await;
    let mut expected = hard_to_take();
    findings.check(ended.stdout.starts_with(&expected), "standard output is not what was written");
    expected.extend(b"the end without a newline");
    findings.check(ended.stderr == expected, "standard error is not what was written");
    findings.outcome().and(ended.verdict())
}

/// Far more than there are processors.
const SPINNERS: usize = 200;
/// How long another build may take meanwhile.
const BESIDE_PATIENCE: Duration = Duration::from_secs(8);

fn spin(act: &Act, findings: &mut Findings) {
    if act.role == "canary" {
        // Inputs are read through the view, which has to get its share as well.
        let Some(read) = findings.works("read an input", fs::read("/proc/self/exe")) else { return };
        return findings.check(!read.is_empty(), "the input is empty");
    }
    for _ in 0..SPINNERS {
        let spinner = std::thread::Builder::new().stack_size(16 << 10).spawn(|| {
            loop {
                std::hint::spin_loop();
            }
        });
        findings.works("start a thread", spinner);
    }
    hold();
}

async fn beside_spinning(stage: &Stage<'_>) -> Outcome {
    let spinning = match holding(stage, "", &[] as &[&OsStr]).await {
        Ok(spinning) => spinning,
        Err(outcome) => return outcome,
    };
    let beside = tokio::time::timeout(BESIDE_PATIENCE, stage.act("canary", &[])).await;
    drop(spinning);
    let late = || {
        let seconds = BESIDE_PATIENCE.as_secs();
        Outcome::broken(format!("another build took more than {seconds} s beside {SPINNERS} busy threads"))
    };
    beside.unwrap_or_else(|_| late())
}

/// More requests than may run and wait.
const REQUESTS: usize = 300;
/// How long it may take until all requests are taken on, wait, or are sent away.
const SORTING_PATIENCE: Duration = Duration::from_secs(10);

async fn many_requests(stage: &Stage<'_>) -> Outcome {
    let request = || stage.draft("hold", &[]).ok().and_then(|draft| Request::new(draft).ok());
    let Some(wanted) = request() else { return Outcome::broken("no request") };
    let mut open = JoinSet::new();
    for _ in 0..REQUESTS {
        let (builder, wanted) = (stage.theatre.worker.builder.clone(), wanted.clone());
        open.spawn(async move { builder.start(wanted).await });
    }
    let mut findings = Findings::default();
    let (mut running, mut refused) = (Vec::new(), 0);
    let deadline = tokio::time::Instant::now() + SORTING_PATIENCE;
    while open.len() > MAX_WAITING {
        match tokio::time::timeout_at(deadline, open.join_next()).await {
            Ok(Some(Ok(Ok(build)))) => running.push(build),
            Ok(Some(Ok(Err(Fault::Refused(Refused::Busy { .. }))))) => refused += 1,
            Ok(Some(other)) => findings.check(false, format_args!("a request ended otherwise: {other:?}")),
            Ok(None) => break,
            Err(_) => {
                findings
                    .check(false, format_args!("{} requests wait, of {MAX_WAITING} that may", open.len()));
                break;
            }
        }
    }
    findings.check(refused > 0, format_args!("of {REQUESTS} requests none was sent away"));
    findings.same("requests that wait", open.len(), MAX_WAITING);
    let refuses = |result: Result<_, _>| matches!(result, Ok(Err(Fault::Refused(Refused::Busy { .. }))));
    let mut one_more = |what: &str, full: bool, result| {
        findings.check(refuses(result) == full, format_args!("{what}, one more is not treated so"));
    };
    let soon = Duration::from_millis(500);
    let start = || tokio::time::timeout(soon, stage.theatre.worker.builder.start(wanted.clone()));
    one_more("with a full queue", true, start().await.map(|taken| taken.map(drop)));
    // Whoever stops waiting leaves the queue, and so do all who wait for builds that are cancelled here.
    open.abort_all();
    let emptied = async { while open.join_next().await.is_some() {} };
    if tokio::time::timeout(SORTING_PATIENCE, emptied).await.is_err() {
        return findings.outcome().and(Outcome::broken("requests can't be taken back"));
    }
    one_more("with an empty queue", false, start().await.map(|taken| taken.map(drop)));
    drop(running);
    let gone = eventually(SORTING_PATIENCE, || stage.processes().is_empty()).await;
    findings.check(gone, "cancelled builds go on");
    findings.outcome().and(stage.act("canary", &[]).await)
}
