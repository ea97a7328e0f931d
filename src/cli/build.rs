//! `cofferdam build`: a request from a file, carried out here or by a daemon.

use std::io::Read;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use clap::Args;

use super::isolation::IsolationArgs;
use super::limits::LimitArgs;
use super::network::{self, NetworkChoice};
use super::render::{self, End, Format};
use super::store_choice::StoreChoiceArgs;
use super::{Failed, Signals, StateArgs, cannot, path_parser, runtime, shell, start_failed_here};
use crate::address::Address;
use crate::build::events::Event;
use crate::build::request::Request;
use crate::config::{Floor, Lifetime, Settings};
use crate::remote::RemoteBuild;
use crate::worker::{Groundwork, Worker};

/// Longest request file in bytes: base64 makes contents a third longer.
const MAX_REQUEST_BYTES: u64 = 256 << 20;

/// Arguments of `cofferdam build`.
#[derive(Debug, Args)]
pub struct BuildArgs {
    /// A snix.build.v1.BuildRequest in the canonical JSON of proto3; `-` reads standard input
    #[arg(value_name = "REQUEST.json")]
    request: PathBuf,
    /// Have a daemon do it: unix:PATH, HOST:PORT, grpc+unix:PATH or grpc+http://HOST:PORT
    #[arg(long, value_name = "ADDR", conflicts_with_all = ["state_dir", "allow_host_path", "allow_network", "sandbox_shell", "profile", "isolation"])]
    #[arg(conflicts_with_all = LimitArgs::NAMES)]
    #[arg(conflicts_with_all = StoreChoiceArgs::NAMES)]
    to: Option<Address>,
    /// Print each event as a line of JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    state: StateArgs,
    #[command(flatten)]
    store: StoreChoiceArgs,
    /// Let the build see PATH of this host, and all beneath it, if the request asks for it; may be repeated
    #[arg(long, value_name = "PATH", value_parser = path_parser())]
    allow_host_path: Vec<PathBuf>,
    /// Give the build this network, if the request asks for one
    #[arg(long, value_name = "NETWORK")]
    allow_network: Option<NetworkChoice>,
    /// Give the build this statically linked program as /bin/sh, if the request asks for one
    #[arg(long, value_name = "PATH", value_parser = path_parser())]
    sandbox_shell: Option<PathBuf>,
    #[command(flatten)]
    isolation: IsolationArgs,
    #[command(flatten)]
    limits: LimitArgs,
}

/// Carries out the request. Yields the exit code.
///
/// # Errors
/// Where it is cofferdam that fails, or the request.
pub fn run(args: BuildArgs) -> Result<u8, Failed> {
    let format = if args.json { Format::Json } else { Format::Plain };
    let request = read_request(&args.request)?;
    let end = match args.to {
        Some(address) => runtime()?.block_on(on_daemon(&address, &request, format))?,
        None => {
            super::start_logging("warn")?;
            let mut settings = Settings::new(args.state.resolve()?, Lifetime::Lasting);
            settings.max_builds = NonZeroUsize::MIN;
            settings.allowed_host_paths = args.allow_host_path;
            settings.network = network::policy(args.allow_network, "--allow-network")?;
            settings.limits = args.limits.settings(Floor::None);
            settings.shell = args.sandbox_shell.map(shell::checked).transpose()?;
            args.isolation.apply(&mut settings);
            args.store.apply(&mut settings)?;
            let ground = Groundwork::lay(settings).map_err(start_failed_here)?;
            let runtime = runtime()?;
            let worker = ground.build(runtime.handle())?;
            runtime.block_on(async {
                let mut signals = Signals::listen()?;
                in_process(&worker, request.clone(), format, &mut signals).await
            })?
        }
    };
    match end {
        End::Completed(outputs) => {
            render::list_outputs(&request, &outputs, format);
            Ok(0)
        }
        End::Failed(code) => Ok(code),
    }
}

fn read_request(path: &Path) -> Result<Request, Failed> {
    let mut bytes = Vec::new();
    let read = match path.as_os_str() == "-" {
        true => std::io::stdin().take(MAX_REQUEST_BYTES + 1).read_to_end(&mut bytes),
        false => std::fs::File::open(path)
            .and_then(|file| file.take(MAX_REQUEST_BYTES + 1).read_to_end(&mut bytes)),
    };
    read.map_err(|error| cannot("read", path, error))?;
    if bytes.len() as u64 > MAX_REQUEST_BYTES {
        return Err(cannot("read", path, format!("it has more than {MAX_REQUEST_BYTES} bytes")));
    }
    Request::from_json(&bytes).map_err(|error| Failed(format!("{}: {error}", path.display())))
}

async fn on_daemon(address: &Address, request: &Request, format: Format) -> Result<End, Failed> {
    let mut build = RemoteBuild::start(address, request).await?;
    // Ctrl-C ends this program, and with it the stream, and with that the build.
    while let Some(event) = build.next().await {
        if let Some(end) = render::show(&event?, format)? {
            return Ok(end);
        }
    }
    Err(Failed(format!("{address} ended the stream without a result")))
}

/// Carries out a build with a worker of this program, and shows its events. A signal ends it. The worker is at rest
/// afterwards.
///
/// # Errors
/// Where it is cofferdam that fails, or the request.
pub(super) async fn in_process(
    worker: &Worker,
    request: Request,
    format: Format,
    signals: &mut Signals,
) -> Result<End, Failed> {
    let shown = show_all(worker, request, format);
    let end = tokio::select! {
        end = shown => end,
        code = signals.next() => Ok(End::Failed(code)),
    };
    // The build was dropped, whichever way it went. Wait for what it held.
    worker.builder.drain().await;
    end
}

async fn show_all(worker: &Worker, request: Request, format: Format) -> Result<End, Failed> {
    let mut build = worker.builder.start(request).await?;
    while let Some(event) = build.next().await {
        let event: Event = event?;
        if let Some(end) = render::show(&event, format)? {
            return Ok(end);
        }
    }
    Err(Failed("the build ended without a result".into()))
}
