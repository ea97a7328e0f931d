//! Disks that are full, in a mount namespace of the test's own.

use std::path::Path;
use std::time::Duration;

use cofferdam_proto::castore as wire;
use libtest_mimic::Trial;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::Signal;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};
use wire::directory_service_client::DirectoryServiceClient;

use crate::load::{digest_of, put_blob};
use crate::random::{Random, Seed};
use crate::support::case::finish;
use crate::support::daemon::Daemon;
use crate::support::leftovers::names;
use crate::support::{self, Case, Mode};
use crate::{Acknowledged, alone, holds, sound};

/// What a disk is filled with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filling {
    /// Blobs that go into packs.
    Small,
    /// Blobs that are files.
    Large,
    /// Directories, which go into the index.
    Directories,
}

/// A full disk: what fills it, how it is mounted before and after there is space again.
type Row = (&'static str, Filling, &'static str, &'static str);

const ROWS: [Row; 5] = [
    ("full_of_small_blobs", Filling::Small, "size=12m", "size=96m"),
    ("full_of_large_blobs", Filling::Large, "size=12m", "size=96m"),
    ("full_of_directories", Filling::Directories, "size=12m", "size=96m"),
    ("out_of_inodes", Filling::Large, "nr_inodes=300", "nr_inodes=3000"),
    ("no_room_for_a_store", Filling::Small, "nr_inodes=100", "nr_inodes=3000"),
];

pub fn trials() -> Vec<Trial> {
    let trial = |(name, filling, full, more)| {
        support::without_fuse(name, Mode::Root, move |case| {
            let _alone = alone();
            in_mounts_of_its_own(|| {
                let state = case.make_dir("state");
                tmpfs(&state, MsFlags::empty(), full);
                by_store_add(case, filling, more);
                tmpfs(&state, MsFlags::empty(), full);
                if name != "no_room_for_a_store" {
                    through_a_daemon(case, filling, more);
                }
            });
            Ok(())
        })
    };
    ROWS.into_iter().map(trial).collect()
}

/// Runs a test on a thread whose mounts, and those of the programs that it starts, nobody else sees.
pub fn in_mounts_of_its_own(test: impl FnOnce() + Send) {
    let enter = || {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
        test();
    };
    let ended = std::thread::scope(|scope| scope.spawn(enter).join());
    ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

pub fn tmpfs(at: &Path, flags: MsFlags, options: &str) {
    let options = format!("mode=0755,{options}");
    mount(Some("none"), at, Some("tmpfs"), flags, Some(options.as_str())).unwrap();
}

/// `store add` of more than fits says so and leaves a sound store; with more space it succeeds.
fn by_store_add(case: &Case, filling: Filling, more: &str) {
    plant(case, filling);
    let state = case.path("state");
    let add = || finish(case.cofferdam(["store", "add", "tree", "--state-dir", "state"]));
    for _ in 0..2 {
        add().code(125).says("").complains("no space left");
        if state.join("store/index.redb").exists() {
            assert!(names(&state.join("store/tmp")).is_empty(), "the store's tmp");
            sound(&state);
        }
    }
    tmpfs(&state, MsFlags::MS_REMOUNT, more);
    let digest = add().code(0).out();
    sound(&state);
    add().code(0).says(&digest);
    sound(&state);
}

/// Clients of a daemon are told of the full disk; what it has acknowledged is there, and with more space it goes on.
fn through_a_daemon(case: &Case, filling: Filling, more: &str) {
    let seed = Seed::choose();
    let mut random = seed.random();
    let state = case.path("state");
    let mut acknowledged = Acknowledged::default();
    let mut daemon = Daemon::start(case, &["--no-builds"]);
    let mut client = Client::connect(&daemon);
    for _ in 0..5 {
        let refused = client.fill(filling, &mut random, &mut acknowledged).expect("it can't all fit");
        assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
        assert!(refused.message().contains("No space left"), "{refused:?}");
    }
    tmpfs(&state, MsFlags::MS_REMOUNT, more);
    let before = acknowledged.directories.len();
    client.store_tree(filling, &mut random, &mut acknowledged).unwrap();
    assert!(acknowledged.directories.len() > before);
    daemon.signal(Signal::SIGKILL);
    daemon.wait();
    holds(&state, &acknowledged);
}

/// A client that waits for its answers.
pub struct Client {
    runtime: tokio::runtime::Runtime,
    channel: Channel,
}

impl Client {
    pub fn connect(daemon: &Daemon) -> Client {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let endpoint = Endpoint::try_from(daemon.address()).unwrap().timeout(Duration::from_secs(20));
        let channel = runtime.block_on(endpoint.connect()).unwrap();
        Client { runtime, channel }
    }

    /// Stores trees until one is refused; up to 64 MiB of them.
    pub fn fill(
        &mut self,
        filling: Filling,
        random: &mut Random,
        acknowledged: &mut Acknowledged,
    ) -> Option<tonic::Status> {
        (0..640).find_map(|_| self.store_tree(filling, random, acknowledged).err())
    }

    /// Stores a blob, and no directory with it.
    pub fn store_blob(
        &mut self,
        random: &mut Random,
        acknowledged: &mut Acknowledged,
    ) -> Result<(), tonic::Status> {
        let len = random.below(128 << 10);
        let bytes = random.bytes(len);
        let digest = self.runtime.block_on(put_blob(&self.channel, bytes, random))?;
        acknowledged.blobs.insert((digest, len));
        Ok(())
    }

    /// Stores some 100 KiB: blobs and a directory with them.
    pub fn store_tree(
        &mut self,
        filling: Filling,
        random: &mut Random,
        acknowledged: &mut Acknowledged,
    ) -> Result<(), tonic::Status> {
        let mut directory = wire::Directory::default();
        for number in 0..if filling == Filling::Small { 50 } else { 1 } {
            let len = match filling {
                Filling::Small => random.below(4000),
                Filling::Large => 100_000,
                Filling::Directories => 0,
            };
            let bytes = random.bytes(len);
            let digest = self.runtime.block_on(put_blob(&self.channel, bytes, random))?;
            acknowledged.blobs.insert((digest, len));
            directory.files.push(wire::FileEntry {
                name: format!("{number:02}").into(),
                digest: digest.as_bytes().to_vec(),
                size: len,
                executable: false,
            });
        }
        if filling == Filling::Directories {
            directory.symlinks = symlinks(random);
        }
        let digest = digest_of(&directory);
        let mut directories = DirectoryServiceClient::new(self.channel.clone());
        self.runtime.block_on(directories.put(tokio_stream::iter([directory])))?;
        acknowledged.directories.insert(digest);
        Ok(())
    }
}

/// Entries of some 100 KiB.
fn symlinks(random: &mut Random) -> Vec<wire::SymlinkEntry> {
    let link = |number| wire::SymlinkEntry {
        name: format!("{number:04}").into(),
        target: format!("{:0200x}", random.next()).into(),
    };
    (0..500).map(link).collect()
}

/// Plants a tree of more than 12 MiB.
fn plant(case: &Case, filling: Filling) {
    let mut random = Random::new(1);
    match filling {
        Filling::Small => (0..1000).for_each(|number| {
            case.write(&format!("tree/{}/{number}", number % 7), random.bytes(16_000));
        }),
        Filling::Large => (0..200).for_each(|number| {
            case.write(&format!("tree/{}/{number}", number % 7), random.bytes(80_000));
        }),
        // Few and large names, and none of them twice.
        Filling::Directories => (0..200).for_each(|number| {
            case.make_dir(&format!("tree/{number}"));
            for link in 0..60 {
                let target = format!("{:01000x}", random.next());
                case.link(&format!("tree/{number}/{link}"), &target);
            }
        }),
    }
}
