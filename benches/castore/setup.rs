//! A build with many inputs beside one with a single one, over gRPC on a unix socket.

use std::path::Path;

use cofferdam_proto::build::build_service_client::BuildServiceClient;
use cofferdam_proto::build::{BuildRequest, build_event::Event, build_request};
use cofferdam_proto::castore::{BlobChunk, Entry, FileEntry, blob_service_client::BlobServiceClient, entry};
use tonic::transport::{Channel, Endpoint};

use super::common::{self, BUSYBOX, Contender, Rounds};
use super::support::daemon::Daemon;
use super::support::{self, Case, Mode};

const ROUNDS: Rounds = Rounds { warm_up: 10, measured: 100 };

pub fn part(_: &Path, _: &super::Wanted) -> String {
    let case = Case::new(Mode::own());
    let daemon = Daemon::start(&case, &[]);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let channel =
        runtime.block_on(async { Endpoint::try_from(daemon.address()).unwrap().connect().await.unwrap() });
    let mut inputs = vec![runtime.block_on(put(&channel, "busybox", &std::fs::read(BUSYBOX).unwrap()))];
    for number in 1..10_000 {
        let name = format!("input-{number}");
        inputs.push(runtime.block_on(put(&channel, &name, name.as_bytes())));
    }
    inputs.sort_by(|a, b| a.name.cmp(&b.name));
    let build = |count: usize| {
        // "busybox" is the first by name.
        let request = request(&inputs[..count]);
        let mut client = BuildServiceClient::new(channel.clone());
        let runtime = &runtime;
        move || runtime.block_on(run(&mut client, request.clone()))
    };
    let mut contenders = [
        Contender::new("a build with 1 input", build(1)),
        Contender::new("a build with 10 000 inputs", build(10_000)),
    ];
    common::measure(ROUNDS, &mut contenders);
    let table = common::table("of the first", &mut contenders);
    drop(contenders);
    drop(daemon);
    support::tidy_up();
    format!("## A trivial build over gRPC, from the request to the end of the stream\n\n{table}")
}

async fn put(channel: &Channel, name: &str, bytes: &[u8]) -> FileEntry {
    let pieces: Vec<BlobChunk> =
        bytes.chunks(1 << 20).map(|piece| BlobChunk { data: piece.to_vec().into() }).collect();
    let put = BlobServiceClient::new(channel.clone()).put(tokio_stream::iter(pieces)).await.unwrap();
    let digest = put.into_inner().digest;
    FileEntry { name: name.into(), digest, size: bytes.len() as u64, executable: true }
}

fn request(inputs: &[FileEntry]) -> BuildRequest {
    BuildRequest {
        inputs: inputs.iter().map(|file| Entry { entry: Some(entry::Entry::File(file.clone())) }).collect(),
        command_args: ["/inputs/busybox", "true"].map(str::to_owned).to_vec(),
        working_dir: "build".to_owned(),
        scratch_paths: vec!["build".to_owned()],
        inputs_dir: "inputs".to_owned(),
        constraints: Some(build_request::BuildConstraints {
            system: format!("{}-linux", std::env::consts::ARCH),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// From the request to the end of the stream.
async fn run(client: &mut BuildServiceClient<Channel>, request: BuildRequest) {
    let mut stream = client.do_build(request).await.unwrap().into_inner();
    let mut last = None;
    while let Some(event) = stream.message().await.unwrap() {
        last = event.event;
    }
    assert!(matches!(last, Some(Event::Completed(_))), "{last:?}");
}
