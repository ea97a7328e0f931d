//! A trivial build (one input, one output) over gRPC on a unix socket, beside what others take to run
//! `busybox true` in a sandbox: interleaved, in one run. Prints a table and records it.
//!
//! `scripts/bench` is the way to run it: as root, with bubblewrap, runc and busybox-static installed.

use std::path::{Path, PathBuf};
use std::process::Command;

use cofferdam_proto::build::build_service_client::BuildServiceClient;
use cofferdam_proto::build::{BuildRequest, build_event::Event, build_request};
use cofferdam_proto::castore::{BlobChunk, Entry, FileEntry, blob_service_client::BlobServiceClient, entry};
use tonic::transport::{Channel, Endpoint};

#[path = "../tests/support/mod.rs"]
mod support;

mod common;

use common::{BUSYBOX, Contender};
use support::daemon::Daemon;
use support::{Case, Mode};

fn main() {
    if !common::asked_for() {
        return;
    }
    let case = Case::new(Mode::own());
    let daemon = Daemon::start(&case, &[]);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let mut client = runtime.block_on(Client::connect(&daemon));
    let root = root(&case);
    let bundle = bundle(&case, &root);

    common::compare(
        "trivial",
        "A trivial build",
        &mut [
            Contender::new("cofferdam, DoBuild: one input, one output", || runtime.block_on(client.build())),
            Contender::new("bwrap --unshare-all, read-only bind", || common::bwrap(&root, &[])),
            Contender::new("bwrap --unshare-all, with /proc, /dev, /tmp", || {
                common::bwrap(&root, &["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]);
            }),
            Contender::new("runc run", || runc(&bundle)),
        ],
    );
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

fn runc(bundle: &Path) {
    let id = format!("cofferdam-bench-{}", std::process::id());
    common::succeeds(Command::new("runc").args(["run", "--bundle"]).arg(bundle).arg(id));
}
