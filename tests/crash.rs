//! A store, killed in the middle of everything, and on a disk that is full, fails or loses its power.
//!
//! A disk that fails is a loop device whose file has no room: writes come back as EIO, when the kernel gets to them.
//! (The device mapper's `error` and `flakey` targets do more, but few kernels of containers and of small virtual machines
//! have them.)
//!
//! * `COFFERDAM_CRASH_ROUNDS` says how many times each of the first two tests kills the program (20 if it is not set).
//! * `COFFERDAM_CRASH_SEED` repeats what a failure has told its seed of; the moments still differ, as the clock does.

use std::process::ExitCode;

#[path = "support/mod.rs"]
mod support;

#[path = "crash/device.rs"]
mod device;
#[path = "crash/disk.rs"]
mod disk;
#[path = "crash/kills.rs"]
mod kills;
#[path = "crash/load.rs"]
mod load;
#[path = "crash/random.rs"]
mod random;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use cofferdam::castore::local::verify::{Repair, Report};
use cofferdam::castore::{Digest, LocalStore, Store};
use support::{Case, Mode};

fn main() -> ExitCode {
    let kill = |(name, test): (&str, fn(&Case))| {
        support::without_fuse(name, Mode::own(), move |case| {
            let _alone = alone();
            test(case);
            Ok(())
        })
    };
    let mut trials: Vec<_> = kills::tests().into_iter().map(kill).collect();
    trials.extend(disk::trials());
    trials.extend(device::trials());
    support::run(trials)
}

/// Has one test run at a time. A process that another one starts would hold, until it is executed, the lock of a store
/// that is open here.
pub fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the program has said that it stored.
#[derive(Debug, Default)]
pub struct Acknowledged {
    /// Blobs, and how long they are.
    pub blobs: BTreeSet<(Digest, u64)>,
    /// Directories.
    pub directories: BTreeSet<Digest>,
}

/// Opens the store of a state directory and reads all of it; nothing may be wrong.
#[track_caller]
pub fn sound(state: &Path) -> (Report, Store) {
    let local = LocalStore::open(&state.join("store")).unwrap();
    let report = local.verify(Repair::No, &mut |_| ()).unwrap();
    assert!(report.problems.is_empty(), "{:#?}", report.problems);
    (report, local.store())
}

/// The same, and what was acknowledged must be there.
#[track_caller]
pub fn holds(state: &Path, acknowledged: &Acknowledged) -> Report {
    let (report, store) = sound(state);
    for (digest, size) in &acknowledged.blobs {
        let found = store.blobs.open(digest).unwrap().map(|blob| blob.size());
        assert_eq!(found, Some(*size), "blob {digest}, which was acknowledged");
    }
    for digest in &acknowledged.directories {
        let found = store.directories.get(digest).unwrap();
        assert!(found.is_some(), "directory {digest}, which was acknowledged");
    }
    report
}
