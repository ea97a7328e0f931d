//! A store with a tree in it, shown as builds see it.

use std::cell::{Ref, RefCell};
use std::fs::File;
use std::io::{Read, Write};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use cofferdam::castore::ingest::Ingest;
use cofferdam::castore::{LocalStore, Name, Node, Store};
use cofferdam::view::{Exposed, View};
use cofferdam_sandbox::Owner;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

/// Who all inputs belong to.
const OWNER: Owner = Owner { uid: 0, gid: 0 };

/// Of this many requests each thread answers one at a time: what the daemon takes on 2 cores.
const THREADS: usize = 4;

/// What stands for b3sum, in the words of the record.
pub const SUMMER: &str =
    "this benchmark: BLAKE3 of stdin in pieces of 64 KiB, in one thread, as b3sum does with a pipe";

/// Moves into a mount namespace of its own.
pub fn own_mounts() {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
}

/// A store in a directory, with one tree, and the view of it.
pub struct World {
    dir: PathBuf,
    tree: Node,
    shown: RefCell<Option<Shown>>,
}

/// The tree as one build sees it.
pub struct Shown {
    overlay: Overlay,
    exposed: Exposed,
    _view: View,
}

impl World {
    pub fn new(dir: PathBuf, sources: &Path) -> World {
        std::fs::create_dir_all(dir.join("view")).unwrap();
        let store = LocalStore::open(&dir.join("store")).unwrap().store();
        let tree = take_in(&store, sources);
        drop(store);
        let world = World { dir, tree, shown: RefCell::new(None) };
        world.start_anew();
        world
    }

    /// Ends the daemon's part and starts it again: what it remembered is gone.
    pub fn start_anew(&self) {
        drop(self.shown.take());
        let store = LocalStore::open(&self.dir.join("store")).unwrap().store();
        let threads = NonZeroUsize::new(THREADS).unwrap();
        let view =
            View::mount(store, &self.dir.join("view"), OWNER, threads, Duration::from_secs(60)).unwrap();
        let inputs = [(Name::new("tree").unwrap(), self.tree.clone())].into();
        let exposed = view.expose("build", inputs).unwrap();
        let overlay = overlay(&self.dir, exposed.path());
        *self.shown.borrow_mut() = Some(Shown { overlay, exposed, _view: view });
    }

    pub fn shown(&self) -> Ref<'_, Shown> {
        Ref::map(self.shown.borrow(), |shown| shown.as_ref().unwrap())
    }
}

impl Drop for World {
    fn drop(&mut self) {
        drop(self.shown.take());
        std::fs::remove_dir_all(&self.dir).unwrap();
    }
}

impl Shown {
    pub fn view(&self) -> PathBuf {
        self.exposed.path().join("tree")
    }

    pub fn overlay(&self) -> PathBuf {
        self.overlay.path().join("tree")
    }
}

/// An overlay, unmounted when dropped.
pub struct Overlay(PathBuf);

impl Overlay {
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        umount2(&self.0, MntFlags::MNT_DETACH).unwrap();
    }
}

/// Lays an empty directory of `dir` over `lower`, as sandboxes do where outputs go beside inputs.
pub fn overlay(dir: &Path, lower: &Path) -> Overlay {
    let [upper, work, merged] = ["upper", "work", "merged"].map(|part| {
        let part = dir.join("overlay").join(part);
        std::fs::create_dir_all(&part).unwrap();
        part
    });
    let options = format!(
        "lowerdir={},upperdir={},workdir={},userxattr",
        lower.display(),
        upper.display(),
        work.display()
    );
    mount(Some("none"), &merged, Some("overlay"), MsFlags::empty(), Some(options.as_str())).unwrap();
    Overlay(merged)
}

/// Takes a tree into a store.
pub fn take_in(store: &Store, tree: &Path) -> Node {
    let cancel = AtomicBool::new(false);
    let ingest = Ingest {
        store,
        scanner: None,
        skip: &[],
        label: "the tree",
        allowance: None,
        tally: None,
        cancel: &cancel,
    };
    ingest.path(tree).unwrap()
}

/// Makes the kernel drop what it has cached of files, and waits until the view has heard of it.
pub fn drop_caches() {
    nix::unistd::sync();
    std::fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    std::thread::sleep(Duration::from_millis(500));
}

/// A file of `size` bytes that no disk can make smaller.
pub fn noise(path: &Path, size: u64) {
    let mut file = File::create(path).unwrap();
    let mut noise = blake3::Hasher::new().finalize_xof();
    let mut buffer = vec![0; 1 << 20];
    for _ in 0..size >> 20 {
        noise.fill(&mut buffer);
        file.write_all(&buffer).unwrap();
    }
    file.sync_all().unwrap();
}

/// `tar cf - . | b3sum`.
pub fn tar_and_sum(tree: &Path) {
    let mut command = Command::new("tar");
    let mut tar = command.args(["cf", "-", "."]).current_dir(tree).stdout(Stdio::piped()).spawn().unwrap();
    let mut stream = tar.stdout.take().unwrap();
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        match stream.read(&mut buffer).unwrap() {
            0 => break,
            read => hasher.update(&buffer[..read]),
        };
    }
    assert!(tar.wait().unwrap().success() && hasher.count() > 0);
}
