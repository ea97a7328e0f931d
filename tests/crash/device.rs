//! Block devices that fail, and that lose their power.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use cofferdam::castore::local::verify::{Problem, Repair};
use cofferdam::castore::tree::ObjectKind;
use cofferdam::castore::{LocalStore, Store};
use libtest_mimic::Trial;
use nix::mount::{MsFlags, umount};
use nix::sys::signal::Signal;
use tonic::Code;

use crate::disk::{Client, Filling, in_mounts_of_its_own, tmpfs};
use crate::named;
use crate::random::Seed;
use crate::support::daemon::Daemon;
use crate::support::{self, Case, Facility, Lacking, Mode};
use crate::{Acknowledged, alone, holds};

/// How many times the power fails.
const LOSSES: usize = 6;

type Test = fn(&Case, &Disk);

pub fn trials() -> Vec<Trial> {
    let trial = |(name, test): (&str, Test)| {
        support::without_fuse(name, Mode::Root, move |case| {
            let _alone = alone();
            let mut outcome = Ok(());
            in_mounts_of_its_own(|| {
                outcome = Disk::make(case).map(|disk| {
                    test(case, &disk);
                    // The device goes with the last mount of it.
                    umount(&disk.mounted).unwrap();
                });
            });
            outcome
        })
    };
    named![failing_disk, power_loss].map(trial).into()
}

/// An ext4 file system in a file, which lies on a tmpfs; what is written to it and not on the "disk" yet is in memory
/// only.
struct Disk {
    tmpfs: PathBuf,
    image: PathBuf,
    mounted: PathBuf,
}

impl Disk {
    /// Makes one and mounts it as the case's `disk`. It has 256 MiB.
    fn make(case: &Case) -> Result<Disk, Lacking> {
        let (below, mounted) = (case.make_dir("below"), case.make_dir("disk"));
        tmpfs(&below, MsFlags::empty(), "size=512m");
        let disk = Disk { image: below.join("image"), tmpfs: below, mounted };
        std::fs::File::create(&disk.image).unwrap().set_len(256 << 20).unwrap();
        let mut mkfs = Command::new("mkfs.ext4");
        let lacks = |reason| Lacking::new(Facility::Loop, reason);
        tool(mkfs.args(["-q", "-E", "lazy_itable_init=0,lazy_journal_init=0"]).arg(&disk.image))
            .map_err(lacks)?;
        disk.mount(&disk.image).map_err(lacks)?;
        Ok(disk)
    }

    fn mount(&self, image: &Path) -> Result<(), String> {
        tool(Command::new("mount").args(["-o", "loop"]).arg(image).arg(&self.mounted))
    }

    /// Has the tmpfs so many MiB, or, where it holds more than that, no more than it holds.
    fn room(&self, mebibytes: u64) {
        let used = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&self.image).unwrap()) * 512;
        tmpfs(&self.tmpfs, MsFlags::MS_REMOUNT, &format!("size={}", used.max(mebibytes << 20)));
    }

    /// The disk as it is at this moment, and would be found after a loss of power.
    fn snapshot(&self) -> PathBuf {
        let copy = self.tmpfs.join("copy");
        let changed = || std::fs::metadata(&self.image).unwrap().modified().unwrap();
        loop {
            let before = changed();
            tool(Command::new("cp").arg("--sparse=always").arg(&self.image).arg(&copy)).unwrap();
            // A copy of a disk that changed meanwhile is of no moment.
            if changed() == before {
                return copy;
            }
        }
    }
}

fn tool(command: &mut Command) -> Result<(), String> {
    let program = command.get_program().display().to_string();
    match command.output() {
        Ok(run) if run.status.success() => Ok(()),
        Ok(run) => Err(format!("{program}: {}", String::from_utf8_lossy(&run.stderr).trim())),
        Err(error) => Err(format!("{program}: {error}")),
    }
}

/// A daemon on the disk, through a link that does not change.
fn start(case: &Case, disk: &Disk) -> (Daemon, Client) {
    if !case.path("state").exists() {
        case.make_dir("disk/state");
        std::os::unix::fs::symlink(disk.mounted.join("state"), case.path("state")).unwrap();
    }
    let daemon = Daemon::start(case, &["--no-builds"]);
    let client = Client::connect(&daemon);
    (daemon, client)
}

fn kill(mut daemon: Daemon) {
    daemon.signal(Signal::SIGKILL);
    daemon.wait();
}

/// Writes that the kernel had taken fail: the client is told, nothing more is stored, and what was acknowledged before
/// is on the disk.
fn failing_disk(case: &Case, disk: &Disk) {
    let seed = Seed::choose();
    let mut random = seed.random();
    let mut acknowledged = Acknowledged::default();
    let (daemon, mut client) = start(case, disk);
    for filling in [Filling::Small, Filling::Large, Filling::Directories] {
        client.store_tree(filling, &mut random, &mut acknowledged).unwrap();
    }
    disk.room(0);
    // Blobs of a tree whose directory is refused are promised nothing.
    let mut promised = Acknowledged::default();
    let mut refused = None;
    for _ in 0..600 {
        let mut more = Acknowledged::default();
        match client.store_tree(Filling::Large, &mut random, &mut more) {
            Ok(()) => {
                promised.blobs.extend(more.blobs);
                promised.directories.extend(more.directories);
            }
            Err(status) => {
                refused = Some(status);
                break;
            }
        }
    }
    let refused = refused.expect("a disk without room can't take it all");
    assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
    acknowledged.blobs.extend(promised.blobs);
    acknowledged.directories.extend(promised.directories);
    // The disk is well again, but what the kernel gave up is lost: no further promise is made on top of it.
    disk.room(512);
    let again = client.store_tree(Filling::Small, &mut random, &mut Acknowledged::default()).unwrap_err();
    assert_eq!(again.code(), Code::Unavailable, "{again:?}");
    kill(daemon);
    umount(&disk.mounted).unwrap();
    disk.mount(&disk.image).unwrap();
    drop(after_loss(&case.path("state"), &acknowledged));
    let (daemon, mut client) = start(case, disk);
    client.store_tree(Filling::Small, &mut random, &mut acknowledged).unwrap();
    kill(daemon);
    holds(&case.path("state"), &acknowledged);
}

/// What is not on the disk is lost, at any moment: what was acknowledged with a directory is there, and what else there
/// is, is sound.
fn power_loss(case: &Case, disk: &Disk) {
    let seed = Seed::choose();
    let mut random = seed.random();
    let mut acknowledged = Acknowledged::default();
    let mut lost = 0;
    for _ in 0..LOSSES {
        let (daemon, mut client) = start(case, disk);
        for _ in 0..1 + random.below(8) {
            let filling = [Filling::Small, Filling::Large, Filling::Directories][random.below(3) as usize];
            client.store_tree(filling, &mut random, &mut acknowledged).unwrap();
        }
        // Blobs that no directory was stored after: they may be lost.
        let mut unpromised = Acknowledged::default();
        for _ in 0..random.below(30) {
            client.store_blob(&mut random, &mut unpromised).unwrap();
        }
        std::thread::sleep(random.time(Duration::from_millis(200)));
        daemon.signal(Signal::SIGSTOP);
        let copy = disk.snapshot();
        kill(daemon);
        // The machine comes back, with the disk as it was.
        umount(&disk.mounted).unwrap();
        std::fs::rename(copy, &disk.image).unwrap();
        disk.mount(&disk.image).unwrap();
        let store = after_loss(&case.path("state"), &acknowledged);
        lost +=
            unpromised.blobs.iter().filter(|(digest, _)| store.blobs.open(digest).unwrap().is_none()).count();
    }
    eprintln!("{LOSSES} losses of power; {lost} blobs were lost, none of them promised");
    assert!(lost > 0, "the power loss lost nothing: what does it test?");
}

/// Opens the store and looks for all that was promised. A large blob that was not may have other bytes under its name,
/// which is found out.
fn after_loss(state: &Path, promised: &Acknowledged) -> Store {
    let local = LocalStore::open(&state.join("store")).unwrap();
    let digests: BTreeSet<_> = promised.blobs.iter().map(|(digest, _)| *digest).collect();
    for problem in local.verify(Repair::Remove, &mut |_| ()).unwrap().problems {
        let unpromised = matches!(
            problem,
            Problem::Damaged { kind: ObjectKind::Blob, digest } if !digests.contains(&digest)
        );
        assert!(unpromised, "{problem}");
    }
    drop(local);
    holds(state, promised);
    LocalStore::open(&state.join("store")).unwrap().store()
}
