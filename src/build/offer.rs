//! Whether this worker can carry out a request: what it offers, and whether it has the inputs.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use nix::sys::sysinfo::sysinfo;

use super::Means;
use super::error::{Fault, UnfitInputs, Unsupported, WorkerError, WorkerPart};
use super::request::{Network, Request, SandboxPath, Shell};
use crate::castore::{Lease, Node};
use crate::config::NetworkPolicy;

/// What this worker gives to a request.
#[derive(Debug)]
pub(super) struct Offer {
    /// Where the host paths lie that it asks for, in its order.
    pub host_paths: Vec<PathBuf>,
}

impl Means {
    /// Checks that this worker offers what the request needs. It may look at the disk.
    pub(super) fn offers(&self, request: &Request) -> Result<Offer, Unsupported> {
        let needs = &request.constraints;
        let offered = systems();
        if let Some(wanted) = needs.system.as_ref().filter(|wanted| !offered.contains(wanted)) {
            return Err(Unsupported::System { wanted: wanted.clone(), offered });
        }
        // A machine that can't tell its memory is given the benefit of the doubt.
        let ram = sysinfo().map_or(u64::MAX, |info| info.ram_total());
        let offered = ram.min(self.budget.limits.memory.unwrap_or(ram));
        if needs.min_memory > offered {
            return Err(Unsupported::Memory { wanted: needs.min_memory, offered });
        }
        let host_paths = needs.ro_paths.iter().map(|path| match self.settings.resolve_host_path(path) {
            Ok(Some(real)) => Ok(real),
            Ok(None) => Err(Unsupported::HostPath { path: path.clone() }),
            Err(source) => Err(Unsupported::HostPathMissing { path: path.clone(), source }),
        });
        let host_paths = host_paths.collect::<Result<_, _>>()?;
        match (needs.network, &self.settings.network) {
            (Network::Required, NetworkPolicy::Refused) => return Err(Unsupported::NoNetwork),
            (Network::Required, NetworkPolicy::Pasta(_) | NetworkPolicy::Host) | (Network::None, _) => {}
        }
        match (needs.shell, &self.settings.shell) {
            (Shell::Required, None) => Err(Unsupported::NoShell),
            _ => Ok(Offer { host_paths }),
        }
    }

    /// Keeps what is in the store of the inputs there.
    pub(super) fn lease_inputs(&self, request: &Request) -> Lease {
        let roots: Vec<Node> = request.inputs.values().cloned().collect();
        self.store.directories.lease(&roots)
    }

    /// Checks that all inputs are in the store, and as large as stated. It blocks: a store that has them elsewhere brings
    /// the directories here, so that no walk will have to wait for the network.
    pub(super) fn has_inputs(&self, request: &Request) -> Result<(), Fault> {
        let nodes: Vec<Node> = request.inputs.values().cloned().collect();
        let prepared = self.store.directories.prepare(&nodes);
        prepared.map_err(|error| WorkerError::new(WorkerPart::Store, error))?;
        let roots = request.inputs.iter().map(|(name, node)| {
            let path = request.inputs_dir.join(name).unwrap_or_else(|_| SandboxPath::root());
            (path.to_string(), node)
        });
        let findings = self
            .closure
            .check(&self.store, roots)
            .map_err(|error| WorkerError::new(WorkerPart::Store, error))?;
        if findings.is_empty() { Ok(()) } else { Err(UnfitInputs(findings).into()) }
    }
}

/// Whether a path of the host leads to a device node. It may change; then the sandbox finds out.
pub(super) fn is_device(path: &Path) -> bool {
    path.metadata()
        .is_ok_and(|found| found.file_type().is_char_device() || found.file_type().is_block_device())
}

/// The platforms that this machine builds for, as Nix writes them.
fn systems() -> Vec<String> {
    vec![format!("{}-linux", std::env::consts::ARCH)]
}
