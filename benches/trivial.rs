//! A trivial build (one input, one output) over gRPC on a unix socket, beside what others take to run
//! `busybox true` in a sandbox: interleaved, in one run. Prints a table and records it.
//!
//! `scripts/bench` is the way to run it: as root, with bubblewrap, runc and busybox-static installed.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cofferdam_proto::build::build_service_client::BuildServiceClient;
use cofferdam_proto::build::{BuildRequest, build_event::Event, build_request};
use cofferdam_proto::castore::{BlobChunk, Entry, FileEntry, blob_service_client::BlobServiceClient, entry};
use tonic::transport::{Channel, Endpoint};

#[path = "../tests/support/mod.rs"]
mod support;

use support::daemon::Daemon;
use support::{Case, Mode};

const WARM_UP: usize = 20;
const MEASURED: usize = 200;

/// The static busybox of Debian's busybox-static.
const BUSYBOX: &str = "/bin/busybox";

fn main() {
    // Cargo passes --bench; run by `cargo test --benches` without it, there is nothing to measure.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let case = Case::new(Mode::own());
    let daemon = Daemon::start(&case, &[]);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let mut client = runtime.block_on(Client::connect(&daemon));
    let root = root(&case);
    let bundle = bundle(&case, &root);

    type Contender<'a> = (&'a str, Box<dyn FnMut() + 'a>);
    let mut contenders: [Contender; 4] = [
        ("cofferdam, DoBuild: one input, one output", Box::new(|| runtime.block_on(client.build()))),
        ("bwrap --unshare-all, read-only bind", Box::new(|| bwrap(&root, &[]))),
        (
            "bwrap --unshare-all, with /proc, /dev, /tmp",
            Box::new(|| bwrap(&root, &["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"])),
        ),
        ("runc run", Box::new(|| runc(&bundle))),
    ];
    let mut times: [Vec<Duration>; 4] = std::array::from_fn(|_| Vec::with_capacity(MEASURED));
    for round in 0..WARM_UP + MEASURED {
        for ((_, run), times) in contenders.iter_mut().zip(&mut times) {
            let start = Instant::now();
            run();
            if round >= WARM_UP {
                times.push(start.elapsed());
            }
        }
    }

    let names = contenders.iter().map(|(name, _)| *name);
    let report = report(names.zip(&mut times));
    println!("{report}");
    let record =
        support::repository().join(format!("benches/record/{}-trivial.md", said("date", &["-u", "+%F"])));
    std::fs::create_dir_all(record.parent().expect("it lies in a directory")).unwrap();
    std::fs::write(&record, report).unwrap();
    println!("recorded in {}", record.display());
    support::tidy_up();
}

/// A connection, and the request that it sends again and again.
struct Client {
    builds: BuildServiceClient<Channel>,
    request: BuildRequest,
}

impl Client {
    async fn connect(daemon: &Daemon) -> Client {
        let channel = Endpoint::try_from(daemon.address()).unwrap().connect().await.unwrap();
        let busybox = std::fs::read(BUSYBOX).unwrap();
        let size = busybox.len() as u64;
        let pieces: Vec<BlobChunk> =
            busybox.chunks(1 << 20).map(|piece| BlobChunk { data: piece.to_vec().into() }).collect();
        let put = BlobServiceClient::new(channel.clone()).put(tokio_stream::iter(pieces)).await.unwrap();
        let digest = put.into_inner().digest;
        let file = FileEntry { name: b"busybox".to_vec(), digest, size, executable: true };
        let request = BuildRequest {
            inputs: vec![Entry { entry: Some(entry::Entry::File(file)) }],
            command_args: ["/inputs/busybox", "sh", "-c", "echo hi > $out"].map(str::to_owned).to_vec(),
            working_dir: "build".to_owned(),
            scratch_paths: vec!["build".to_owned(), "outputs".to_owned()],
            inputs_dir: "inputs".to_owned(),
            outputs: vec!["outputs/out".to_owned()],
            environment_vars: vec![build_request::EnvVar {
                key: "out".to_owned(),
                value: b"/outputs/out".to_vec(),
            }],
            constraints: Some(build_request::BuildConstraints {
                system: format!("{}-linux", std::env::consts::ARCH),
                ..Default::default()
            }),
            ..Default::default()
        };
        Client { builds: BuildServiceClient::new(channel), request }
    }

    /// From the request to the end of the stream.
    async fn build(&mut self) {
        let mut stream = self.builds.do_build(self.request.clone()).await.unwrap().into_inner();
        let mut last = None;
        while let Some(event) = stream.message().await.unwrap() {
            last = event.event;
        }
        assert!(matches!(last, Some(Event::Completed(_))), "{last:?}");
    }
}

/// A root with nothing but busybox in it.
fn root(case: &Case) -> PathBuf {
    let root = case.make_dir("bundle/rootfs");
    for name in ["bin", "proc", "dev", "tmp"] {
        case.make_dir(&format!("bundle/rootfs/{name}"));
    }
    std::fs::copy(BUSYBOX, root.join("bin/busybox")).unwrap();
    root
}

/// The OCI bundle for runc: the same root, all the namespaces, the mounts of `runc spec` that count.
fn bundle(case: &Case, root: &Path) -> PathBuf {
    let namespaces =
        ["pid", "network", "ipc", "uts", "mount", "cgroup"].map(|kind| serde_json::json!({ "type": kind }));
    let mount = |point: &str, kind: &str, options: &[&str]| serde_json::json!({ "destination": point, "type": kind, "source": kind, "options": options });
    let config = serde_json::json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": { "uid": 0, "gid": 0 },
            "args": ["/bin/busybox", "true"],
            "cwd": "/",
            "noNewPrivileges": true,
        },
        "root": { "path": root, "readonly": true },
        "mounts": [
            mount("/proc", "proc", &[]),
            mount("/dev", "tmpfs", &["nosuid", "mode=755"]),
            mount("/tmp", "tmpfs", &["nosuid", "nodev"]),
        ],
        "linux": { "namespaces": namespaces },
    });
    case.write("bundle/config.json", config.to_string());
    case.path("bundle")
}

fn bwrap(root: &Path, more: &[&str]) {
    let mut command = Command::new("bwrap");
    command.args(["--unshare-all", "--ro-bind"]).arg(root).arg("/").args(more).args(["/bin/busybox", "true"]);
    succeeds(&mut command);
}

fn runc(bundle: &Path) {
    let id = format!("cofferdam-bench-{}", std::process::id());
    succeeds(Command::new("runc").args(["run", "--bundle"]).arg(bundle).arg(id));
}

fn succeeds(command: &mut Command) {
    let status = command.stdin(Stdio::null()).status().unwrap();
    assert!(status.success(), "{command:?}: {status}");
}

/// The machine and the table, as Markdown.
fn report<'a>(rows: impl Iterator<Item = (&'a str, &'a mut Vec<Duration>)>) -> String {
    let mut text = format!(
        "# A trivial build, {}\n\nLinux {}, {}, {} cores. {MEASURED} runs each after {WARM_UP} to warm up, interleaved; \
         milliseconds.\n{} {}.\n\n",
        said("date", &["-u", "+%F %H:%M UTC"]),
        said("uname", &["-r"]),
        cpu(),
        std::thread::available_parallelism().map_or(0, usize::from),
        said("bwrap", &["--version"]),
        said("runc", &["--version"]),
    );
    text += "| what | median | p90 | min | median, of ours |\n|---|---:|---:|---:|---:|\n";
    let mut ours = None;
    for (name, times) in rows {
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
