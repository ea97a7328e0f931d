//! `cofferdam daemon`: builds and the store, served over gRPC.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::isolation::IsolationArgs;
use super::limits::LimitArgs;
use super::network::{self, NetworkChoice};
use super::store_choice::StoreChoiceArgs;
use super::{Failed, Signals, StateArgs, path_parser, remark, runtime, shell};
use crate::address::Address;
use crate::build::Builder;
use crate::castore::Store;
use crate::castore::choose::Opened;
use crate::config::{self, Floor, Lifetime, Settings};
use crate::server::Services;
use crate::server::listen::Listener;
use crate::worker::{Groundwork, StateDir};

/// Arguments of `cofferdam daemon`.
#[derive(Debug, Args)]
pub struct DaemonArgs {
    /// Listen at ADDR: unix:PATH or HOST:PORT; may be repeated [default:
    /// unix:$XDG_RUNTIME_DIR/cofferdam.sock, or unix:/run/cofferdam/cofferdam.sock]
    #[arg(long, value_name = "ADDR")]
    listen: Vec<Address>,
    #[command(flatten)]
    state: StateArgs,
    #[command(flatten)]
    store: StoreChoiceArgs,
    /// Run up to N builds at once [default: one per processor]
    #[arg(long, value_name = "N")]
    max_builds: Option<NonZeroUsize>,
    /// Let up to N more builds wait for their turn, and refuse those beyond
    #[arg(long, value_name = "N", default_value_t = config::MAX_WAITING)]
    max_waiting: usize,
    /// Let builds that ask for it see PATH of this host, and all beneath it, read-only; may be repeated
    #[arg(long, value_name = "PATH", value_parser = path_parser())]
    allow_host_path: Vec<PathBuf>,
    /// Give builds that ask for network this one; all that ask are refused otherwise
    #[arg(long, value_name = "NETWORK")]
    allow_network: Option<NetworkChoice>,
    /// Give builds that ask for a shell this statically linked program as /bin/sh
    #[arg(long, value_name = "PATH", value_parser = path_parser())]
    sandbox_shell: Option<PathBuf>,
    #[command(flatten)]
    isolation: IsolationArgs,
    /// Listen on TCP although everyone who reaches the port can then read the store and run builds
    #[arg(long)]
    insecure: bool,
    /// Serve the store alone and refuse all builds
    #[arg(long)]
    no_builds: bool,
    // Last, or what follows would come under its heading.
    #[command(flatten)]
    limits: LimitArgs,
}

/// Serves until told to stop.
///
/// # Errors
/// Where the daemon can't start, or its sockets fail.
pub fn run(mut args: DaemonArgs) -> Result<u8, Failed> {
    super::start_logging("info")?;
    if args.listen.is_empty() {
        args.listen.push(Address::Unix(config::default_socket()));
    }
    if let Some(tcp) = args.listen.iter().find(|address| matches!(address, Address::Tcp { .. }))
        && !args.insecure
    {
        return Err(Failed(format!(
            "without authentication everyone who reaches {tcp} could run builds; --insecure allows that"
        )));
    }
    let mut settings = Settings::new(args.state.resolve()?, Lifetime::Lasting);
    settings.max_builds = args.max_builds.unwrap_or(settings.max_builds);
    settings.max_waiting = args.max_waiting;
    settings.allowed_host_paths = args.allow_host_path;
    settings.shell = args.sandbox_shell.map(shell::checked).transpose()?;
    settings.network = network::policy(args.allow_network, "--allow-network")?;
    args.isolation.apply(&mut settings);
    args.store.apply(&mut settings)?;
    settings.limits = args.limits.settings(Floor::Share);

    if args.no_builds {
        let state = StateDir::take(&settings.state_dir, settings.lifetime)?;
        let runtime = runtime()?;
        let Opened { store, keeper: _keeper } = state.open_store(&settings, runtime.handle())?;
        return runtime.block_on(serve(&args.listen, store, None));
    }
    let ground = Groundwork::lay(settings)?;
    let runtime = runtime()?;
    let worker = ground.build(runtime.handle())?;
    runtime.block_on(async {
        // Whatever keeps builds from running is told now, not to the first client.
        worker.builder.rehearse().await?;
        serve(&args.listen, worker.store.clone(), Some(worker.builder.clone())).await
    })
}

/// How long clients may take to go once all builds have ended.
const CLOSING_PATIENCE: Duration = Duration::from_secs(3);

/// Serves until SIGTERM or SIGINT, then until running builds have ended or a second one comes.
async fn serve(addresses: &[Address], store: Store, builder: Option<Builder>) -> Result<u8, Failed> {
    let mut signals = Signals::listen()?;
    let services = Services::new(store, builder.clone()).await?;
    let (stop, stopped) = watch::channel(false);
    let mut listeners = Vec::with_capacity(addresses.len());
    for address in addresses {
        listeners.push(Listener::bind(address).await?);
    }
    // Only now is anybody let in: a daemon that can't start must not have begun a build.
    let mut servers = JoinSet::new();
    for (listener, address) in listeners.into_iter().zip(addresses) {
        let bound = listener.address().unwrap_or_else(|_| address.clone());
        servers.spawn(services.serve(listener, stopped.clone()));
        remark(format_args!("listening on {bound}"));
    }
    tokio::select! {
        Some(ended) = servers.join_next() => {
            return Err(Failed(match ended {
                Ok(Err(error)) => format!("a server failed: {error}"),
                Ok(Ok(())) | Err(_) => "a server ended early".into(),
            }));
        }
        () = broken(builder.as_ref()) => {
            services.stop_serving().await;
            return Err(Failed("the spawner process is gone; without it no build is possible".into()));
        }
        _ = signals.next() => {}
    }
    tracing::info!("stopping: running builds go on to their end; a second signal ends them");
    services.stop_serving().await;
    let drained = async {
        if let Some(builder) = &builder {
            builder.drain().await;
        }
        // Only now: the streams of the builds go over these servers.
        let _ = stop.send(true);
        let ended = async { while servers.join_next().await.is_some() {} };
        // What is left are uploads, downloads and connections that say nothing.
        let _ = tokio::time::timeout(CLOSING_PATIENCE, ended).await;
    };
    tokio::select! {
        () = drained => {}
        _ = signals.next() => tracing::info!("stopped: running builds were ended"),
    }
    Ok(0)
}

/// Waits until no build is possible any more; for ever where none ever was.
async fn broken(builder: Option<&Builder>) {
    match builder {
        Some(builder) => builder.broken().await,
        None => std::future::pending().await,
    }
}
