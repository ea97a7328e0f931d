//! How builds get to see their inputs: through the view, or where FUSE can't be had, as copies.
//!
//! Both show `<somewhere>/<build id>/<input name>`, read-only by mode, and with one look
//! ([`look`](crate::castore::look)). They differ in when the store is read: the view reads what the build reads,
//! while it reads, so that a store that fails is a fault found later; copies are complete and checked before the
//! build starts, which takes time and disk for all that the build may never look at.

pub mod copies;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::castore::{Name, Node};
use crate::config::Demand;
use crate::view::{self, Exposed, View, ViewError};

use copies::{Copied, Copies, CopyError};

/// The way in which a worker shows inputs to its builds.
pub enum Inputs {
    /// Through FUSE.
    View(View),
    /// As files on disk.
    Copies {
        /// Where they are laid out.
        copies: Copies,
        /// Why they are not shown through FUSE.
        why: Why,
    },
}

/// Why inputs are copied.
#[derive(Debug, thiserror::Error)]
pub enum Why {
    /// It was chosen.
    #[error("FUSE is turned off")]
    Chosen,
    /// There was no view to be had.
    #[error("for want of FUSE: {0}")]
    NoView(ViewError),
}

/// The inputs of one build. Dropping it takes them away, which may block.
#[derive(Debug)]
pub enum Shown {
    /// Through FUSE.
    Viewed(Exposed),
    /// As files on disk.
    Copied(Copied),
}

/// Why a build can't be shown its inputs.
#[derive(Debug, thiserror::Error)]
pub enum ShowError {
    /// The view has no room for them.
    #[error(transparent)]
    View(#[from] ViewError),
    /// They can't be laid out.
    #[error(transparent)]
    Copies(CopyError),
    /// It was told to end.
    #[error("cancelled")]
    Cancelled,
}

/// Why a worker has no way to show inputs.
#[derive(Debug, thiserror::Error)]
#[error("inputs can't be shown through FUSE, which is required here: {0}")]
pub struct NoView(#[from] pub ViewError);

impl Inputs {
    /// The view, if `demand` and the kernel allow; whether the kernel does is found by trying.
    ///
    /// # Errors
    /// [`NoView`] where `demand` leaves no choice.
    pub fn choose(
        demand: Demand,
        view: impl FnOnce() -> Result<View, ViewError>,
        copies: Copies,
    ) -> Result<Self, NoView> {
        match demand {
            Demand::Required => Ok(Self::View(view()?)),
            Demand::Off => Ok(Self::copied(copies, Why::Chosen)),
            Demand::Preferred => Ok(match view() {
                Ok(view) => Self::View(view),
                Err(error) => Self::copied(copies, Why::NoView(error)),
            }),
        }
    }

    fn copied(copies: Copies, why: Why) -> Self {
        match &why {
            Why::Chosen => tracing::debug!("inputs are copied for each build: {why}"),
            Why::NoView(_) => tracing::warn!("inputs are copied for each build, {why}"),
        }
        copies.warn_of_noexec();
        Self::Copies { copies, why }
    }

    /// Shows `inputs` to the build called `build_id`. Blocks while they are copied, unless `cancel` turns true.
    ///
    /// # Errors
    /// Where the store or the disk fails, or it was cancelled; nothing is left then.
    pub fn show(
        &self,
        build_id: &str,
        inputs: &BTreeMap<Name, Node>,
        cancel: &AtomicBool,
    ) -> Result<Shown, ShowError> {
        match self {
            Self::View(view) => Ok(Shown::Viewed(view.expose(build_id, inputs.clone())?)),
            Self::Copies { copies, .. } => match copies.lay_out(build_id, inputs, cancel) {
                Ok(copied) => Ok(Shown::Copied(copied)),
                Err(error) if error.is_cancelled() => Err(ShowError::Cancelled),
                Err(error) => Err(ShowError::Copies(error)),
            },
        }
    }
}

impl Shown {
    /// The directory that holds the inputs.
    pub fn path(&self) -> &Path {
        match self {
            Self::Viewed(exposed) => exposed.path(),
            Self::Copied(copied) => copied.path(),
        }
    }

    /// The first fault that this build may have met with its inputs, if there was one.
    ///
    /// A build that met one must not be judged by its exit status. Copies have none: they were checked before.
    pub fn fault(&self) -> Option<Arc<view::Fault>> {
        match self {
            Self::Viewed(exposed) => exposed.fault(),
            Self::Copied(_) => None,
        }
    }

    /// Waits for the first fault that this build may have met.
    ///
    /// # Cancel safety
    /// Nothing is lost by dropping the future.
    pub async fn faulted(&self) -> Arc<view::Fault> {
        match self {
            Self::Viewed(exposed) => exposed.faulted().await,
            Self::Copied(_) => std::future::pending().await,
        }
    }
}
