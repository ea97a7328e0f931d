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
use crate::isolation::{self, Demand, Lacking, Layer};
use crate::view::{self, Exposed, View, ViewError};

use copies::{Copied, Copies, CopyError};

/// The way in which a worker shows inputs to its builds.
pub enum Inputs {
    /// Through FUSE.
    View(View),
    /// As files on disk.
    Copies(Copies),
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

impl Inputs {
    /// The view, if `demand` and the kernel allow; whether the kernel does is found by trying.
    ///
    /// # Errors
    /// Where the view can't be had and `demand` leaves no choice.
    pub fn choose(
        demand: Demand,
        view: impl FnOnce() -> Result<View, ViewError>,
        copies: Copies,
    ) -> Result<Self, Lacking> {
        let tried = || {
            view().inspect_err(|error| {
                if demand == Demand::Preferred {
                    // Builds are the same, but every one now waits for its inputs, which has to be known.
                    tracing::warn!("inputs are copied for each build, for want of FUSE: {error}");
                }
            })
        };
        match demand.settle(Layer::Inputs, tried)? {
            Some(view) => Ok(Self::View(view)),
            None => {
                copies.warn_of_noexec();
                Ok(Self::Copies(copies))
            }
        }
    }

    /// What is told of it.
    pub fn strength(&self) -> isolation::Inputs {
        match self {
            Self::View(_) => isolation::Inputs::Fuse,
            Self::Copies(_) => isolation::Inputs::Copies,
        }
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
            Self::Copies(copies) => match copies.lay_out(build_id, inputs, cancel) {
                Ok(copied) => Ok(Shown::Copied(copied)),
                Err(error) if error.is_cancelled() => Err(ShowError::Cancelled),
                Err(error) => Err(ShowError::Copies(error)),
            },
        }
    }

    /// Gives back memory that only saves work.
    pub fn trim(&self) {
        if let Self::View(view) = self {
            view.trim();
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
