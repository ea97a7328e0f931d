//! A build, from the request to the last event.
//!
//! ```text
//! request ─▶ admission ─▶ plan ─▶ sandbox ─▶ logs ─▶ outputs ─▶ events
//! ```
//!
//! [`Builder::start`] and `Running::stages` show all of it. Each stage has a file of its own; what a build holds of
//! the worker is in one place, `Held`, and given back in one place, whichever way the build ends.

pub mod admission;
pub mod error;
pub mod events;
pub mod logs;
mod outputs;
mod plan;
pub mod request;
mod sandbox;
mod scratch;

use std::future::Future;
use std::io::Read;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use cofferdam_sandbox::{Identity, Report, Spawner};
use tokio::sync::{mpsc, oneshot};

use crate::castore::Store;
use crate::castore::closure::Closure;
use crate::config::{NetworkPolicy, Settings};
use crate::refscan::Patterns;
use crate::view::{Exposed, View};

use admission::{Slot, Slots};
use error::{Cause, Fault, UnfitInputs, Unsupported, WorkerError, WorkerPart};
use events::{Event, Output};
use outputs::{Intake, IntakeError};
use plan::{Layout, Site};
use request::{Network, Request, SandboxPath, Shell};
use scratch::{Scratch, ScratchRoot};

pub use scratch::ScratchError;

/// How many events may wait for a client that is slower than its build. With pieces of 64 KiB this bounds what
/// a build holds of the daemon's memory to 16 MiB; a full channel stops the build at its pipes.
const EVENTS_IN_FLIGHT: usize = 256;

/// Files of the host's `/etc` that a build with network sees.
const NETWORK_FILES: [&str; 3] = ["resolv.conf", "services", "hosts"];

/// Carries out builds with the means of one worker.
#[derive(Clone)]
pub struct Builder(Arc<Means>);

/// What builds are made with.
struct Means {
    settings: Settings,
    identity: Identity,
    // Before the spawner, which waits for its sandboxes: they may be waiting for the view.
    view: View,
    spawner: Spawner,
    store: Store,
    closure: Closure,
    scratch: ScratchRoot,
    slots: Slots,
}

/// A build that was taken on. Dropping it ends the build and leaves nothing behind.
#[derive(Debug)]
pub struct Build {
    /// The worker's name for it.
    pub id: String,
    events: mpsc::Receiver<Event>,
    end: Option<oneshot::Receiver<Result<(), Fault>>>,
}

impl Build {
    /// The next event. `None` comes after the terminal one, an error in its place.
    ///
    /// # Errors
    /// [`Fault`] where the worker could not go on.
    ///
    /// # Cancel safety
    /// Nothing is lost by dropping the future.
    pub async fn next(&mut self) -> Option<Result<Event, Fault>> {
        std::future::poll_fn(|context| self.poll_next(context)).await
    }

    /// [`Build::next`] for those who poll.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Event, Fault>>> {
        if let Some(event) = ready!(self.events.poll_recv(context)) {
            return Poll::Ready(Some(Ok(event)));
        }
        let Some(end) = &mut self.end else { return Poll::Ready(None) };
        let end = ready!(Pin::new(end).poll(context));
        self.end = None;
        Poll::Ready(match end {
            Ok(Ok(())) => None,
            Ok(Err(fault)) => Some(Err(fault)),
            Err(_) => Some(Err(WorkerError::new(WorkerPart::Program, "the build's task ended early").into())),
        })
    }
}

impl Builder {
    /// Puts the means together. `scratch` is emptied: the caller has locked the state directory.
    ///
    /// # Errors
    /// Where the scratch directory can't be made or swept.
    pub fn new(
        settings: Settings,
        identity: Identity,
        spawner: Spawner,
        store: Store,
        view: View,
        scratch: &std::path::Path,
    ) -> Result<Self, ScratchError> {
        let slots = Slots::new(settings.max_builds, settings.max_waiting);
        let scratch = ScratchRoot::open(scratch)?;
        let closure = Closure::new();
        Ok(Self(Arc::new(Means { settings, identity, spawner, store, view, closure, scratch, slots })))
    }

    /// Takes on a build: checks that this worker can do it and has its inputs, and waits for a slot.
    ///
    /// # Errors
    /// [`Fault`] before any event.
    ///
    /// # Cancel safety
    /// Dropping the future takes the request back.
    pub async fn start(&self, request: Request) -> Result<Build, Fault> {
        let means = &self.0;
        means.offers(&request)?;
        let request = Arc::new(request);
        means.complete(&request).await?;
        let slot = means.slots.acquire().await.map_err(Fault::Refused)?;

        let id = new_id().map_err(|error| WorkerError::new(WorkerPart::Program, error))?;
        let (sender, events) = mpsc::channel(EVENTS_IN_FLIGHT);
        let (tell_end, end) = oneshot::channel();
        let lease = Arc::new(Lease { means: Arc::clone(means), slot });
        let running = Running { lease, request, id: id.clone(), events: sender };
        tokio::spawn(running.run(tell_end));
        Ok(Build { id, events, end: Some(end) })
    }

    /// Refuses new builds from now on, and waits until those that run have ended.
    pub async fn drain(&self) {
        self.0.slots.drain();
        self.0.slots.idle().await;
    }
}

impl Means {
    /// Whether this worker offers what the request needs.
    fn offers(&self, request: &Request) -> Result<(), Unsupported> {
        let needs = &request.constraints;
        let offered = systems();
        if let Some(wanted) = needs.system.as_ref().filter(|wanted| !offered.contains(wanted)) {
            return Err(Unsupported::System { wanted: wanted.clone(), offered });
        }
        if let Some(path) = needs.ro_paths.iter().find(|path| !self.settings.allows(path)) {
            return Err(Unsupported::HostPath { path: path.clone() });
        }
        match (needs.network, self.settings.network) {
            (Network::Required, NetworkPolicy::Refused) => return Err(Unsupported::NoNetwork),
            (Network::Required, NetworkPolicy::Host) | (Network::None, _) => {}
        }
        match (needs.shell, &self.settings.shell) {
            (Shell::Required, None) => Err(Unsupported::NoShell),
            _ => Ok(()),
        }
    }

    /// Whether all inputs are in the store, and as large as stated.
    async fn complete(self: &Arc<Self>, request: &Arc<Request>) -> Result<(), Fault> {
        if request.inputs.is_empty() {
            return Ok(());
        }
        let (means, request) = (Arc::clone(self), Arc::clone(request));
        let findings = blocking(move || {
            let roots = request.inputs.iter().map(|(name, node)| {
                let path = request.inputs_dir.join(name).unwrap_or_else(|_| SandboxPath::root());
                (path.to_string(), node)
            });
            means
                .closure
                .check(&means.store, roots)
                .map_err(|error| WorkerError::new(WorkerPart::Store, error))
        });
        let findings = findings.await??;
        if findings.is_empty() { Ok(()) } else { Err(UnfitInputs(findings).into()) }
    }
}

/// The worker's means, while a build has a slot. Threads that work for the build share it, so that the slot, and
/// with it the user id, is free only when the last of them is done.
struct Lease {
    // Given back before the slot: who waits for all slots may take the worker apart.
    means: Arc<Means>,
    slot: Slot,
}

impl std::ops::Deref for Lease {
    type Target = Means;

    fn deref(&self) -> &Means {
        &self.means
    }
}

impl Lease {
    fn slot_number(&self) -> u32 {
        // A worker has no more slots than ids.
        u32::try_from(self.slot.index()).unwrap_or(u32::MAX)
    }
}

/// A build under way.
struct Running {
    lease: Arc<Lease>,
    request: Arc<Request>,
    /// Its name, also of its directories in the view and on disk.
    id: String,
    events: mpsc::Sender<Event>,
}

/// What a build holds of the worker.
#[derive(Default)]
struct Held {
    exposed: Option<Exposed>,
    scratch: Option<Arc<Scratch>>,
    sandbox: Option<sandbox::Running>,
    /// Tells work in other threads to stop.
    cancel: Arc<AtomicBool>,
}

impl Held {
    /// Gives everything back, in the order that dependence demands.
    async fn release(self) {
        self.cancel.store(true, Ordering::Relaxed);
        if let Some(sandbox) = self.sandbox {
            sandbox.end().await;
        }
        drop(self.exposed);
        // The last holder removes the directory; a thread that still reads outputs may be that one.
        if blocking(move || drop(self.scratch)).await.is_err() {
            tracing::warn!("removing scratch ended early; the next start sweeps it");
        }
    }
}

/// How a build ends without success: by its own fault, or by another's.
enum Stop {
    Failed(Cause),
    Fault(Fault),
}

impl<E: Into<Fault>> From<E> for Stop {
    fn from(fault: E) -> Self {
        Self::Fault(fault.into())
    }
}

impl Running {
    async fn run(self, tell_end: oneshot::Sender<Result<(), Fault>>) {
        let mut held = Held::default();
        let ended = tokio::select! {
            ended = self.stages(&mut held) => ended,
            () = self.events.closed() => Err(Fault::Cancelled.into()),
        };
        let (last, end) = match ended {
            Ok(outputs) => (Some(Event::Completed { outputs }), Ok(())),
            Err(Stop::Failed(cause)) => (Some(Event::Failed(cause.into())), Ok(())),
            Err(Stop::Fault(fault)) => (None, Err(fault)),
        };
        if let Err(fault) = &end {
            tracing::info!(build = %self.id, %fault, "build ended without a result");
        }
        if let Some(last) = last {
            // A client that has gone does not want it.
            let _ = self.events.send(last).await;
        }
        drop(self.events);
        let _ = tell_end.send(end);
        held.release().await;
    }

    /// All the way of a build.
    async fn stages(&self, held: &mut Held) -> Result<Vec<Output>, Stop> {
        self.send(Event::Started { build_id: self.id.clone() }).await?;

        let inputs = self.expose(held)?;
        let Layout { plan, on_disk, outputs } = plan::lay_out(&self.request, self.site(inputs));
        let scratch = self.make_scratch(held, on_disk).await?;

        let (running, pipes) = sandbox::Running::start(&self.lease.spawner, &plan)?;
        let running = held.sandbox.insert(running);
        let report = self.follow(running, pipes, held.exposed.as_ref()).await?;
        sandbox::judge(report, &self.request)?;

        self.take_in(outputs, scratch, &held.cancel).await
    }

    async fn send(&self, event: Event) -> Result<(), Fault> {
        self.events.send(event).await.map_err(|_| Fault::Cancelled)
    }

    /// Shows the inputs in the view, if there are any. Yields where.
    fn expose(&self, held: &mut Held) -> Result<Option<PathBuf>, Fault> {
        if self.request.inputs.is_empty() {
            return Ok(None);
        }
        let exposed = self.lease.view.expose(&self.id, self.request.inputs.clone());
        let exposed = exposed.map_err(|error| WorkerError::new(WorkerPart::View, error))?;
        Ok(Some(held.exposed.insert(exposed).path().into()))
    }

    fn site(&self, inputs: Option<PathBuf>) -> Site {
        let network_files = match self.request.constraints.network {
            Network::None => Vec::new(),
            // A host without one of them gives its builds none either.
            Network::Required => NETWORK_FILES
                .iter()
                .filter_map(|name| Some(((*name).into(), std::fs::read(format!("/etc/{name}")).ok()?)))
                .collect(),
        };
        Site {
            build_dir: self.lease.scratch.path_of(&self.id),
            inputs,
            ids: self.lease.identity.map(self.lease.slot_number()),
            shell: self.lease.settings.shell.clone(),
            network_files,
        }
    }

    async fn make_scratch(&self, held: &mut Held, on_disk: Vec<plan::OnDisk>) -> Result<Arc<Scratch>, Fault> {
        let (lease, id) = (Arc::clone(&self.lease), self.id.clone());
        let made = blocking(move || {
            lease.scratch.create(&id, &on_disk, &lease.identity, lease.slot_number()).map(Arc::new)
        });
        let scratch = made.await?.map_err(|error| WorkerError::new(WorkerPart::Scratch, error))?;
        held.scratch = Some(Arc::clone(&scratch));
        Ok(scratch)
    }

    /// Sends on what the build writes, until every process of it is dead and every byte was sent.
    async fn follow(
        &self,
        running: &mut sandbox::Running,
        pipes: sandbox::Pipes,
        exposed: Option<&Exposed>,
    ) -> Result<Report, Fault> {
        let (tell_dead, dead) = oneshot::channel();
        let report = async {
            let report = running.report().await;
            let _ = tell_dead.send(());
            report
        };
        let dead = async {
            let _ = dead.await;
        };
        let logs = logs::pump(pipes.stdout, pipes.stderr, dead, self.events.clone());
        let faulted = async {
            match exposed {
                Some(exposed) => exposed.faulted().await,
                None => std::future::pending().await,
            }
        };
        let view_failed = |fault| WorkerError::new(WorkerPart::View, fault);
        tokio::select! {
            fault = faulted => Err(view_failed(fault).into()),
            (report, logs) = async { tokio::join!(report, logs) } => {
                // It may have come with the very last read. A build that met a fault is not to be judged.
                if let Some(fault) = exposed.and_then(Exposed::fault) {
                    return Err(view_failed(fault).into());
                }
                logs.map_err(Fault::from)?;
                Ok(report?)
            }
        }
    }

    async fn take_in(
        &self,
        places: Vec<PathBuf>,
        scratch: Arc<Scratch>,
        cancel: &Arc<AtomicBool>,
    ) -> Result<Vec<Output>, Stop> {
        let patterns = Patterns::new(&self.request.needles)
            .map_err(|error| WorkerError::new(WorkerPart::Program, error))?;
        let (lease, request, cancel) =
            (Arc::clone(&self.lease), Arc::clone(&self.request), Arc::clone(cancel));
        let events = self.events.clone();
        let taken = blocking(move || {
            let (request, patterns, places) = (&*request, &patterns, places.as_slice());
            let intake =
                Intake { request, patterns, places, scratch: &scratch, store: &lease.store, cancel: &cancel };
            intake.run(|output, needles| {
                // A client that has gone is noticed elsewhere.
                let _ = events.blocking_send(Event::Refscan { output, needles: needles.to_vec() });
            })
        });
        taken.await?.map_err(|error| match error {
            IntakeError::Build(cause) => Stop::Failed(cause),
            IntakeError::Fault(fault) => Stop::Fault(fault),
        })
    }
}

/// Runs `work` where it may block.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Fault> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| WorkerError::new(WorkerPart::Program, error).into())
}

/// The platforms that this machine builds for, as Nix writes them.
fn systems() -> Vec<String> {
    vec![format!("{}-linux", std::env::consts::ARCH)]
}

/// A name for a build that nobody can guess.
fn new_id() -> std::io::Result<String> {
    let mut bytes = [0; 16];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
