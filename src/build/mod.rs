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
mod limits;
pub mod logs;
pub(crate) mod network;
mod offer;
mod outputs;
mod plan;
mod rehearsal;
pub mod request;
mod sandbox;
mod scratch;

#[cfg(test)]
mod roundtrip;

use std::future::Future;
use std::io::Read;
use std::path::PathBuf;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use cofferdam_sandbox::cgroup::{BuildCgroup, Cgroups};
use cofferdam_sandbox::{ExitStatus, Identity, Landlock, Report, SpawnError, Spawner};
use tokio::sync::{mpsc, oneshot, watch};

use crate::castore::closure::Closure;
use crate::castore::{self, Store};
use crate::config::Settings;
use crate::inputs::{Inputs, ShowError, Shown};
use crate::isolation::{self, Strength};
use crate::refscan::Patterns;

use admission::{Slot, Slots};
use error::{Cause, Fault, WorkerError, WorkerPart};
use events::{Event, Output};
use limits::{Budget, Disk, Reached, Watch};
use network::Connection;
use offer::Offer;
use outputs::{Intake, IntakeError};
use plan::{Layout, Site};
use request::{Network, Request};
use scratch::{Scratch, ScratchRoot};

pub use scratch::ScratchError;

/// How many events may wait for a client that is slower than its build. With pieces of 64 KiB this bounds what
/// a build holds of the daemon's memory to 16 MiB; a full channel stops the build at its pipes.
const EVENTS_IN_FLIGHT: usize = 256;

/// How long a killed sandbox may take to end before the view is taken from under it.
const END_PATIENCE: Duration = Duration::from_secs(10);

/// Carries out builds with the means of one worker.
#[derive(Clone)]
pub struct Builder(Arc<Means>);

/// What builds are made with.
struct Means {
    settings: Settings,
    identity: Identity,
    /// What sandboxes are made of, but for the network, which each build chooses.
    strength: Strength,
    // Before the spawner, which waits for its sandboxes: they may be waiting for the view.
    inputs: Inputs,
    spawner: Spawner,
    store: Store,
    closure: Closure,
    scratch: ScratchRoot,
    slots: Slots,
    // After the spawner: builds must have left before it is removed.
    cgroups: Option<Cgroups>,
    budget: Budget,
    disk: Arc<Disk>,
    broken: watch::Sender<bool>,
}

/// What sandboxes are made with.
pub struct Sandboxes {
    /// Whose ids they run under.
    pub identity: Identity,
    /// What they are made of, but for the network, which each build chooses.
    pub strength: Strength,
    /// Makes them.
    pub spawner: Spawner,
    /// Limits them, where there are any.
    pub cgroups: Option<Cgroups>,
}

/// A build that was taken on. Dropping it ends the build and leaves nothing behind.
#[derive(Debug)]
pub struct Build {
    /// The worker's name for it.
    pub id: String,
    /// What its sandbox is made of.
    pub strength: Strength,
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
        sandboxes: Sandboxes,
        store: Store,
        inputs: Inputs,
        scratch: &std::path::Path,
    ) -> Result<Self, ScratchError> {
        let Sandboxes { identity, strength, spawner, cgroups } = sandboxes;
        let path = scratch;
        let slots = Slots::new(settings.max_builds, settings.max_waiting);
        let scratch = ScratchRoot::open(scratch)?;
        let closure = Closure::new();
        let budget = Budget::new(&settings.limits, settings.max_builds, cgroups.as_ref());
        let disk = Arc::new(Disk::new(scratch.dir(), path.into(), settings.limits.floor));
        Ok(Self(Arc::new(Means {
            settings,
            identity,
            strength,
            spawner,
            store,
            inputs,
            closure,
            scratch,
            slots,
            cgroups,
            budget,
            disk,
            broken: watch::Sender::new(false),
        })))
    }

    /// Takes on a build: checks that this worker can do it and has its inputs, and waits for a slot.
    ///
    /// # Errors
    /// [`Fault`] before any event.
    ///
    /// # Cancel safety
    /// Dropping the future takes the request back.
    pub async fn start(&self, request: Request) -> Result<Build, Fault> {
        let devices: Vec<PathBuf> =
            request.constraints.ro_paths.iter().filter(|path| offer::is_device(path)).cloned().collect();
        if !devices.is_empty() {
            self.rehearse_devices(devices).await?;
        }
        let build = self.take_on(request).await?;
        tracing::info!(build = %build.id, isolation = %build.strength, "build started");
        Ok(build)
    }

    async fn take_on(&self, request: Request) -> Result<Build, Fault> {
        let request = Arc::new(request);
        let check = {
            let (means, request) = (Arc::clone(&self.0), Arc::clone(&request));
            move || {
                let offer = means.offers(&request)?;
                // First: what is found to be there is there until the build ends.
                let lease = means.lease_inputs(&request);
                means.has_inputs(&request)?;
                Ok::<_, Fault>((offer, lease))
            }
        };
        let (offer, inputs) = blocking(check).await??;
        let slot = self.0.slots.acquire().await?;

        let id = new_id().map_err(|error| WorkerError::new(WorkerPart::Program, error))?;
        let (sender, events) = mpsc::channel(EVENTS_IN_FLIGHT);
        let (tell_end, end) = oneshot::channel();
        let lease = Arc::new(Lease { means: Arc::clone(&self.0), slot });
        let strength = Strength {
            network: match request.constraints.network {
                Network::None => isolation::Network::None,
                Network::Required => self.0.settings.network.strength(),
            },
            ..self.0.strength.clone()
        };
        let running = Arc::new(Running { lease, request, offer, _inputs: inputs, id: id.clone() });
        tokio::spawn(running.run(tell_end, sender));
        Ok(Build { id, strength, events, end: Some(end) })
    }

    /// Refuses new builds from now on, and waits until those that run have ended.
    pub async fn drain(&self) {
        self.0.slots.drain();
        self.0.slots.idle().await;
    }

    /// Gives back memory that only saves work, which a worker that rests has no use for. What is needed of it is read
    /// again.
    pub fn trim(&self) {
        self.0.closure.trim();
        self.0.inputs.trim();
        self.0.store.directories.trim();
        cofferdam_sandbox::measure::trim_own_memory();
    }

    /// Waits until this worker can do no more builds, whatever is asked of it: its spawner is gone.
    pub async fn broken(&self) {
        let mut broken = self.0.broken.subscribe();
        // An error is impossible while `self` holds the sender.
        let _ = broken.wait_for(|broken| *broken).await;
    }
}

impl Means {
    /// Refuses builds from now on if `fault` says that none can succeed.
    fn notice(&self, fault: &Fault) {
        if let Fault::Worker(error) = fault
            && let Some(SpawnError::Gone) = error.source.downcast_ref()
        {
            tracing::error!("the spawner process is gone; no build is possible any more");
            self.slots.drain();
            self.broken.send_replace(true);
        }
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
    offer: Offer,
    /// Keeps its inputs in the store.
    _inputs: castore::Lease,
    /// Its name, also of its directories in the view and on disk.
    id: String,
}

/// What a build holds of the worker.
struct Held {
    cancel: Cancel,
    sandbox: sandbox::Running,
    shown: Option<Shown>,
    cgroup: Option<BuildCgroup>,
    scratch: Arc<Scratch>,
}

/// A build that was set up, and started in a sandbox.
struct SetUp {
    sandbox: sandbox::Running,
    pipes: sandbox::Pipes,
    shown: Option<Shown>,
    cgroup: Option<BuildCgroup>,
    scratch: Scratch,
    /// Where each output will be found.
    outputs: Vec<PathBuf>,
}

/// Tells work in other threads to stop, at the latest when it is dropped.
#[derive(Default)]
struct Cancel(Arc<AtomicBool>);

impl Cancel {
    fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Drop for Cancel {
    fn drop(&mut self) {
        self.cancel();
    }
}

impl Held {
    /// Gives everything back, in the order that dependence demands.
    async fn release(self) {
        drop(self.cancel);
        let cgroup = self.cgroup;
        if let Some(cgroup) = &cgroup {
            // All at once, where the end of its first process would be told to one after the other.
            cgroup.kill();
        }
        if tokio::time::timeout(END_PATIENCE, self.sandbox.end()).await.is_err() {
            // A read that the view does not answer can't be killed; without the view it ends.
            tracing::error!("a sandbox does not end although it was killed");
        }
        // The last holder removes the directory; a thread that still reads outputs may be that one.
        let (shown, scratch) = (self.shown, self.scratch);
        let remove = move || {
            drop(shown);
            if let Some(Err(error)) = cgroup.map(BuildCgroup::remove) {
                tracing::warn!(%error, "a cgroup is left; the end of this program, or the next start, removes it");
            }
            drop(scratch);
        };
        if blocking(remove).await.is_err() {
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
    async fn run(self: Arc<Self>, tell_end: oneshot::Sender<Result<(), Fault>>, events: mpsc::Sender<Event>) {
        // Dropped with the last event, so that the stream ends while the rest is given back.
        let _ = events.send(Event::Started { build_id: self.id.clone() }).await;
        let (held, ended) = match self.prepare(&events).await {
            Ok((mut held, pipes, places)) => {
                let ended = tokio::select! {
                    ended = self.stages(&mut held, pipes, places, &events) => ended,
                    () = events.closed() => Err(Fault::Cancelled.into()),
                };
                (Some(held), ended)
            }
            Err(fault) => (None, Err(fault.into())),
        };
        let (last, end) = match ended {
            Ok(outputs) => (Some(Event::Completed { outputs }), Ok(())),
            Err(Stop::Failed(cause)) => (Some(Event::Failed(cause.into())), Ok(())),
            Err(Stop::Fault(fault)) => (None, Err(fault)),
        };
        if let Err(fault) = &end {
            tracing::info!(build = %self.id, %fault, "build ended without a result");
            self.lease.notice(fault);
        }
        if let Some(last) = last {
            // A client that has gone does not want it.
            let _ = events.send(last).await;
        }
        drop(events);
        let _ = tell_end.send(end);
        if let Some(held) = held {
            held.release().await;
        }
    }

    /// Everything up to the start of the command, in a thread where it may block. Where inputs are copied it may
    /// take long: it is cut short if the client goes.
    async fn prepare(
        self: &Arc<Self>,
        events: &mpsc::Sender<Event>,
    ) -> Result<(Held, sandbox::Pipes, Vec<PathBuf>), Fault> {
        let (running, cancel) = (Arc::clone(self), Cancel::default());
        let cancelled = Arc::clone(&cancel.0);
        let mut prepared = pin!(blocking(move || running.set_up(&cancelled)));
        let prepared = tokio::select! {
            prepared = &mut prepared => prepared,
            () = events.closed() => {
                cancel.cancel();
                prepared.await
            }
        };
        let SetUp { sandbox, pipes, shown, cgroup, scratch, outputs } = prepared??;
        Ok((Held { cancel, sandbox, shown, cgroup, scratch: Arc::new(scratch) }, pipes, outputs))
    }

    /// What [`Running::prepare`] does there.
    fn set_up(&self, cancelled: &AtomicBool) -> Result<SetUp, Fault> {
        let Running { lease, request, id, .. } = self;
        let shown = self.show(cancelled)?;
        let cgroup = lease.cgroups.as_ref().map(|all| all.create(id, &lease.budget.limits)).transpose();
        let cgroup = cgroup.map_err(|error| WorkerError::new(WorkerPart::Sandbox, error))?;
        let site = self.site(shown.as_ref(), cgroup.as_ref(), self.connection()?);
        let Layout { plan, on_disk, outputs } = plan::lay_out(request, site);
        let scratch = lease
            .scratch
            .create(id, &on_disk, &lease.identity, lease.slot_number())
            .map_err(|error| WorkerError::new(WorkerPart::Scratch, error))?;
        let (sandbox, pipes) = sandbox::Running::start(&lease.spawner, &plan)?;
        Ok(SetUp { sandbox, pipes, shown, cgroup, scratch, outputs })
    }

    /// All the rest of a build's way.
    async fn stages(
        &self,
        held: &mut Held,
        pipes: sandbox::Pipes,
        places: Vec<PathBuf>,
        events: &mpsc::Sender<Event>,
    ) -> Result<Vec<Output>, Stop> {
        let watch = self.lease.disk.watch(held.scratch.dir(), self.lease.budget.scratch);
        let report = follow(&mut held.sandbox, pipes, held.shown.as_ref(), &watch, events).await?;
        drop(watch);
        let reached = self.reached(&report, held).await?;
        sandbox::judge(report, &self.request, &reached)?;
        self.take_in(places, held, events.clone()).await
    }

    /// Shows the inputs, if there are any.
    fn show(&self, cancelled: &AtomicBool) -> Result<Option<Shown>, ShowError> {
        if self.request.inputs.is_empty() {
            return Ok(None);
        }
        self.lease.inputs.show(&self.id, &self.request.inputs, cancelled).map(Some)
    }

    /// The build's way to the network, if it asks for one.
    fn connection(&self) -> Result<Option<Connection>, WorkerError> {
        match self.request.constraints.network {
            Network::None => Ok(None),
            Network::Required => network::connect(&self.lease.settings.network)
                .map(Some)
                .map_err(|error| WorkerError::new(WorkerPart::Sandbox, error)),
        }
    }

    /// The limits that the end of the build has to do with.
    async fn reached(&self, report: &Report, held: &Held) -> Result<Reached, Fault> {
        let readings = held.cgroup.as_ref().map(BuildCgroup::readings).unwrap_or_default();
        tracing::debug!(build = %self.id, ?readings, "ended");
        let budget = &self.lease.budget;
        let longest_file = match (report, budget.limits.file_size) {
            (Report::Ended(ExitStatus::Code(0)), _) | (_, None) => 0,
            _ => {
                let (dir, cancel) = (held.scratch.dir(), Arc::clone(&held.cancel.0));
                blocking(move || limits::longest_file(&dir, &cancel)).await?
            }
        };
        Ok(budget.reached(report, &readings, longest_file))
    }

    fn site(
        &self,
        shown: Option<&Shown>,
        cgroup: Option<&BuildCgroup>,
        connection: Option<Connection>,
    ) -> Site {
        Site {
            build_dir: self.lease.scratch.path_of(&self.id),
            inputs: shown.map(|shown| shown.path().into()),
            ids: self.lease.identity.map(self.lease.slot_number()),
            cgroup: cgroup.map(|cgroup| cgroup.inner().into()),
            limits: self.lease.budget.limits.clone(),
            shm: self.lease.budget.shm,
            host_paths: self.offer.host_paths.clone(),
            shell: self.lease.settings.shell.clone(),
            connection,
            seccomp: self.lease.strength.seccomp,
            landlock: match self.lease.strength.landlock {
                Some(_) => Landlock::Scoped,
                None => Landlock::Off,
            },
        }
    }

    /// Takes the outputs into the store.
    async fn take_in(
        &self,
        places: Vec<PathBuf>,
        held: &Held,
        events: mpsc::Sender<Event>,
    ) -> Result<Vec<Output>, Stop> {
        let (lease, request) = (Arc::clone(&self.lease), Arc::clone(&self.request));
        let (scratch, cancel) = (Arc::clone(&held.scratch), Arc::clone(&held.cancel.0));
        let taken = blocking(move || {
            let patterns = Patterns::new(&request.needles)
                .map_err(|error| IntakeError::from(WorkerError::new(WorkerPart::Program, error)))?;
            let (request, patterns, places) = (&*request, &patterns, places.as_slice());
            let limit = lease.settings.limits.scratch;
            let (scratch, store, cancel) = (&*scratch, &lease.store, &*cancel);
            let intake = Intake { request, patterns, places, scratch, limit, store, cancel };
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

/// Sends on what the build writes, until every process of it is dead and every byte was sent.
async fn follow(
    sandbox: &mut sandbox::Running,
    pipes: sandbox::Pipes,
    shown: Option<&Shown>,
    watch: &Watch,
    events: &mpsc::Sender<Event>,
) -> Result<Report, Stop> {
    let (tell_dead, dead) = oneshot::channel();
    let report = async {
        let report = sandbox.report().await?;
        let _ = tell_dead.send(());
        Ok::<_, Fault>(report)
    };
    let logs = async {
        let dead = async {
            let _ = dead.await;
        };
        Ok(logs::pump(pipes.stdout, pipes.stderr, dead, events.clone()).await?)
    };
    let faulted = async {
        match shown {
            Some(shown) => shown.faulted().await,
            None => std::future::pending().await,
        }
    };
    let view_failed = |fault| WorkerError::new(WorkerPart::View, fault).into();
    let (report, ()) = tokio::select! {
        fault = faulted => return Err(view_failed(fault)),
        excess = watch.excess() => return Err(excess),
        ended = async { tokio::try_join!(report, logs) } => ended?,
    };
    // It may have come with the very last read. A build that met a fault is not to be judged.
    match shown.and_then(Shown::fault) {
        Some(fault) => Err(view_failed(fault)),
        None => Ok(report),
    }
}

/// Runs `work` where it may block.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Fault> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| WorkerError::new(WorkerPart::Program, error).into())
}

/// A name for a build that nobody can guess.
fn new_id() -> std::io::Result<String> {
    let mut bytes = [0; 16];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
