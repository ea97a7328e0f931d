//! A client of a daemon.

use std::future::Future;
use std::time::Duration;

use cofferdam_proto::build::build_service_client::BuildServiceClient;
use cofferdam_proto::build::{BuildEvent, BuildRequest, build_event::Event, build_request};
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use crate::support::daemon::Daemon;
use crate::support::host_tools;

/// Runs a client against a deadline.
pub fn client<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let work = async { tokio::time::timeout(Duration::from_secs(60), work).await };
    runtime.block_on(work).expect("the daemon does not answer")
}

pub async fn connect(daemon: &Daemon) -> BuildServiceClient<Channel> {
    let endpoint = Endpoint::try_from(daemon.address()).unwrap();
    BuildServiceClient::new(endpoint.connect().await.unwrap())
}

/// A request for `/bin/sh -c SCRIPT` with the host's tools and one output, `outputs/x`, if any.
pub fn request(script: &str, outputs: &[&str]) -> BuildRequest {
    BuildRequest {
        command_args: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
        working_dir: "build".to_owned(),
        scratch_paths: vec!["build".to_owned(), "outputs".to_owned()],
        inputs_dir: "inputs".to_owned(),
        outputs: outputs.iter().map(|name| format!("outputs/{name}")).collect(),
        environment_vars: vec![build_request::EnvVar {
            key: "PATH".to_owned(),
            value: b"/usr/bin:/bin".to_vec(),
        }],
        constraints: Some(build_request::BuildConstraints {
            system: format!("{}-linux", std::env::consts::ARCH),
            available_ro_paths: host_tools().into_iter().map(str::to_owned).collect(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

pub fn constraints(request: &mut BuildRequest) -> &mut build_request::BuildConstraints {
    request.constraints.get_or_insert_default()
}

/// All events up to the end of the stream, or the error that ended it.
pub async fn events(daemon: &Daemon, request: BuildRequest) -> Result<Vec<Event>, Status> {
    let mut stream = connect(daemon).await.do_build(request).await?.into_inner();
    let mut all = Vec::new();
    while let Some(BuildEvent { event }) = stream.message().await? {
        all.push(event.expect("an event of a known kind"));
    }
    Ok(all)
}

pub fn kinds(events: &[Event]) -> Vec<&'static str> {
    let kind = |event: &Event| match event {
        Event::Started(_) => "started",
        Event::Log(_) => "log",
        Event::Refscan(_) => "refscan",
        Event::Completed(_) => "completed",
        Event::Failed(_) => "failed",
    };
    events.iter().map(kind).collect()
}

/// What the build wrote to stdout and stderr.
pub fn logged(events: &[Event]) -> String {
    let data = |event: &Event| match event {
        Event::Log(log) => log.data.to_vec(),
        _ => Vec::new(),
    };
    String::from_utf8(events.iter().flat_map(data).collect()).unwrap()
}
