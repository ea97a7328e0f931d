//! A build of nothing, to find out by trying whether this worker can do any, or can lend a device.

use std::path::{Path, PathBuf};

use cofferdam_sandbox::{SetupFailure, SpawnError, Step};

use super::Builder;
use super::error::{Fault, Unsupported, WorkerError};
use super::request::{Constraints, Draft, Request, SandboxPath};

/// What can't be executed, anywhere: all is in place by then.
const NOTHING: &[u8] = b"/";

impl Builder {
    /// Carries out a build of nothing.
    ///
    /// # Errors
    /// [`Fault`] where this worker can do no build.
    pub async fn rehearse(&self) -> Result<(), Fault> {
        self.rehearse_with(Vec::new()).await
    }

    /// Tries whether a build may open these device nodes of the host, for reading and writing, under its own id.
    pub(super) async fn rehearse_devices(&self, devices: Vec<PathBuf>) -> Result<(), Fault> {
        match self.rehearse_with(devices).await {
            Err(Fault::Worker(error)) => Err(match closed_device(&error) {
                Some(refused) => refused.into(),
                None => error.into(),
            }),
            done => done,
        }
    }

    async fn rehearse_with(&self, ro_paths: Vec<PathBuf>) -> Result<(), Fault> {
        let request = Request::new(Draft {
            command: vec![NOTHING.to_vec()],
            working_dir: SandboxPath::tmp(),
            constraints: Constraints { ro_paths, ..Constraints::default() },
            ..Draft::default()
        })?;
        // That it fails is what is expected of it.
        let mut build = self.take_on(request).await?;
        while let Some(event) = build.next().await {
            event?;
        }
        Ok(())
    }
}

/// The device that a sandbox was refused.
fn closed_device(error: &WorkerError) -> Option<Unsupported> {
    let source = error.source.as_ref();
    let failure = match source.downcast_ref::<SpawnError>() {
        Some(SpawnError::Source(failure)) => failure,
        _ => source.downcast_ref::<SetupFailure>()?,
    };
    matches!(failure.step, Step::Device).then(|| Unsupported::ClosedDevice {
        path: Path::new(&failure.object).into(),
        source: std::io::Error::from_raw_os_error(failure.errno),
    })
}
