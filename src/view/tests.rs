//! The view, mounted for real. Each test has a mount namespace of its own, which goes with its thread.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};

use super::*;
use crate::castore::memory;
use crate::castore::{Blob, BlobService, BlobStat, BlobWriter, Directory, DirectoryService, Stored, Target};

const OWNER: Owner = Owner { uid: 1234, gid: 4321 };
const PATIENCE: Duration = Duration::from_secs(20);

/// Runs `test` with a view of `store` in a private mount namespace. Says so where that can't be had.
fn with_view(store: Store, test: impl FnOnce(&View) + Send) {
    with_view_keeping(0, store, test);
}

/// As [`with_view`]; the view keeps that many files.
fn with_view_keeping(kept_files: usize, store: Store, test: impl FnOnce(&View) + Send) {
    with_view_patient(kept_files, PATIENCE, store, test);
}

/// As [`with_view_keeping`]; who waits for the store waits for so long.
fn with_view_patient(kept_files: usize, timeout: Duration, store: Store, test: impl FnOnce(&View) + Send) {
    if !nix::unistd::geteuid().is_root() || !Path::new("/dev/fuse").exists() {
        eprintln!("skipped: mounting FUSE needs root and /dev/fuse here");
        return;
    }
    std::thread::scope(|scope| {
        let run = || {
            if let Err(errno) = unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS) {
                eprintln!("skipped: can't have a mount namespace: {errno}");
                return;
            }
            let private = nix::mount::MsFlags::MS_REC | nix::mount::MsFlags::MS_PRIVATE;
            nix::mount::mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
            let at = tempfile::tempdir().unwrap();
            let threads = NonZeroUsize::new(3).unwrap();
            let view = View::mount_keeping(store, at.path(), OWNER, threads, timeout, kept_files).unwrap();
            test(&view);
            drop(view);
            assert_eq!(fs::read_dir(at.path()).unwrap().count(), 0, "still mounted");
        };
        if let Err(panic) = scope.spawn(run).join() {
            std::panic::resume_unwind(panic);
        }
    });
}

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

fn file(store: &Store, bytes: &[u8], executable: bool) -> Node {
    let mut writer = store.blobs.create().unwrap();
    writer.write_all(bytes).unwrap();
    let Stored { digest, size, .. } = writer.finish().unwrap();
    Node::File { digest, size, executable }
}

fn directory(store: &Store, entries: impl IntoIterator<Item = (String, Node)>) -> Node {
    let mut directory = Directory::new();
    for (entry, node) in entries {
        directory.insert(name(&entry), node).unwrap();
    }
    let node = directory.node();
    store.directories.put(vec![directory]).unwrap();
    node
}

fn link(target: &str) -> Node {
    Node::Symlink { target: Target::new(target).unwrap() }
}

fn inputs<const N: usize>(entries: [(&str, Node); N]) -> BTreeMap<Name, Node> {
    entries.into_iter().map(|(entry, node)| (name(entry), node)).collect()
}

fn noise(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    bytes
}

/// Bytes that look like noise, and are others for each number.
fn noise_of(number: u8, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&[number]).finalize_xof().fill(&mut bytes);
    bytes
}

/// Waits for the kernel to have forgotten: its notices come when they come.
fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "waited in vain for: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn trees_read_back_as_they_are() {
    let store = memory::store();
    let big = noise(3 << 20 | 77);
    let deep = directory(&store, [("big".to_owned(), file(&store, &big, false))]);
    let tree = directory(
        &store,
        [
            ("deep".to_owned(), deep),
            ("empty".to_owned(), directory(&store, [])),
            ("run".to_owned(), file(&store, b"#!/bin/sh\necho ran\n", true)),
            ("link".to_owned(), link("deep/big")),
            ("nothing".to_owned(), file(&store, b"", false)),
        ],
    );
    let bare = file(&store, b"bare", false);
    with_view(store, |view| {
        let entries = inputs([("tree", tree), ("bare", bare), ("dangling", link("/no/where"))]);
        let exposed = view.expose("b1", entries).unwrap();
        let at = |path: &str| exposed.path().join(path);
        assert_eq!(fs::read(at("bare")).unwrap(), b"bare");
        assert!(fs::read(at("tree/deep/big")).unwrap() == big);
        assert!(fs::read(at("tree/link")).unwrap() == big, "through the link");
        assert_eq!(fs::read(at("tree/nothing")).unwrap(), b"");
        assert_eq!(fs::read_link(at("dangling")).unwrap(), Path::new("/no/where"));
        assert_eq!(fs::read_dir(at("tree/empty")).unwrap().count(), 0);
        assert_eq!(Command::new(at("tree/run")).output().unwrap().stdout, b"ran\n");

        let names = |path: &str| -> BTreeSet<_> {
            fs::read_dir(at(path)).unwrap().map(|entry| entry.unwrap().file_name()).collect()
        };
        assert_eq!(names(""), ["bare", "dangling", "tree"].map(Into::into).into());
        assert_eq!(names("tree"), ["deep", "empty", "link", "nothing", "run"].map(Into::into).into());

        let partial = fs::File::open(at("tree/deep/big")).unwrap();
        for offset in [0, 1, 4095, 131_071, 1 << 20, big.len() - 5, big.len(), big.len() + 9] {
            let mut buffer = [0; 10_000];
            let read = partial.read_at(&mut buffer, offset as u64).unwrap();
            let expected = &big[offset.min(big.len())..(offset + 10_000).min(big.len())];
            assert!(&buffer[..read] == expected, "at {offset}");
        }
        let missing = fs::metadata(view.at.join("b2")).unwrap_err();
        assert_eq!(missing.raw_os_error(), Some(libc::ENOENT));
        assert!(exposed.fault().is_none());
    });
}

#[test]
fn attributes_are_those_of_a_store() {
    let store = memory::store();
    let (plain, program) = (file(&store, &noise(5000), false), file(&store, b"x", true));
    let empty = directory(&store, []);
    // In a user namespace of few ids the owner is nobody.
    let map = fs::read_to_string("/proc/self/uid_map").unwrap();
    let ids = map.split_whitespace().nth(2).and_then(|count| count.parse::<u32>().ok()).unwrap();
    let nobody = Owner { uid: 65534, gid: 65534 };
    let owner = if ids > OWNER.gid { OWNER } else { nobody };
    with_view(store, |view| {
        let entries = inputs([("plain", plain), ("program", program), ("dir", empty), ("link", link("abc"))]);
        let exposed = view.expose("b1", entries).unwrap();
        let cases = [
            ("", 0o040_555, 0u64),
            ("plain", 0o100_444, 5000),
            ("program", 0o100_555, 1),
            ("dir", 0o040_555, 0),
            ("link", 0o120_777, 3),
        ];
        for (path, mode, size) in cases {
            let found = fs::symlink_metadata(exposed.path().join(path)).unwrap();
            assert_eq!(format!("{:o}", found.mode()), format!("{mode:o}"), "{path}");
            assert_eq!((found.size(), found.blocks()), (size, size.div_ceil(512)), "{path}");
            assert_eq!((found.uid(), found.gid(), found.nlink()), (owner.uid, owner.gid, 1), "{path}");
            assert_eq!((found.mtime(), found.atime(), found.ctime()), (1, 1, 1), "{path}");
        }
    });
}

#[test]
fn nothing_can_be_changed() {
    let store = memory::store();
    let tree = directory(&store, [("file".to_owned(), file(&store, b"x", false))]);
    with_view(store, |view| {
        let exposed = view.expose("b1", inputs([("tree", tree)])).unwrap();
        let path = exposed.path().join("tree/file");
        let refusals = [
            ("unlink", fs::remove_file(&path)),
            ("open for writing", fs::OpenOptions::new().write(true).open(&path).map(drop)),
            ("create", fs::write(exposed.path().join("new"), b"")),
            ("rename", fs::rename(&path, exposed.path().join("other"))),
            ("chmod", fs::set_permissions(&path, fs::Permissions::from_mode(0o777))),
            ("mkdir", fs::create_dir(exposed.path().join("tree/dir"))),
        ];
        for (act, refusal) in refusals {
            assert_eq!(refusal.unwrap_err().raw_os_error(), Some(libc::EROFS), "{act}");
        }
    });
}

/// The kernel has one dentry per directory number: were it shared, the second name would take the
/// directory away from the first.
#[test]
fn one_directory_under_two_names_keeps_both_places() {
    let store = memory::store();
    let inner = directory(&store, [("leaf".to_owned(), file(&store, b"leaf", false))]);
    let twin = directory(&store, [("inner".to_owned(), inner)]);
    let (a, b) = (file(&store, b"in a", false), file(&store, b"in b", false));
    let outer_a = directory(&store, [("twin".to_owned(), twin.clone()), ("mark".to_owned(), a)]);
    let outer_b = directory(&store, [("twin".to_owned(), twin), ("mark".to_owned(), b)]);
    with_view(store, |view| {
        let both = || inputs([("a", outer_a.clone()), ("b", outer_b.clone())]);
        let builds = [view.expose("b1", both()).unwrap(), view.expose("b2", both()).unwrap()];
        // All four places are held open at once, and looked at in turn.
        let script = "cd \"$1/twin/inner\" && read -r go && /bin/pwd -P && cat ../../mark leaf";
        let mut shells = Vec::new();
        for build in &builds {
            for outer in ["a", "b"] {
                let outer = build.path().join(outer);
                let mut command = Command::new("/bin/sh");
                command.args(["-c", script, "sh"]).arg(&outer);
                command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
                shells.push((outer, command.spawn().unwrap()));
            }
        }
        std::thread::sleep(Duration::from_millis(50));
        for build in &builds {
            let found = Command::new("find").arg(build.path()).output().unwrap();
            assert_eq!(found.stdout.iter().filter(|byte| **byte == b'\n').count(), 1 + 2 + 2 * 4);
        }
        for (outer, mut shell) in shells {
            shell.stdin.take().unwrap().write_all(b"go\n").unwrap();
            let said = String::from_utf8(shell.wait_with_output().unwrap().stdout).unwrap();
            let mark = if outer.ends_with("a") { "in a" } else { "in b" };
            assert_eq!(said, format!("{}/twin/inner\n{mark}leaf", outer.display()));
        }
    });
}

#[test]
fn files_of_equal_contents_share_their_pages_across_builds() {
    let store = memory::store();
    let shared = file(&store, b"shared", false);
    with_view(store, |view| {
        let exposed = ["b1", "b2"].map(|id| view.expose(id, inputs([("x", shared.clone())])).unwrap());
        let inode = |build: &Exposed| fs::metadata(build.path().join("x")).unwrap().ino();
        assert_eq!(inode(&exposed[0]), inode(&exposed[1]));
        assert_ne!(
            fs::metadata(exposed[0].path()).unwrap().ino(),
            fs::metadata(exposed[1].path()).unwrap().ino()
        );
    });
}

#[test]
fn large_directories_are_listed_once_through() {
    const ENTRIES: usize = 20_000;
    let store = memory::store();
    let node = file(&store, b"x", false);
    let subdirectory = directory(&store, []);
    let many = (0..ENTRIES).map(|n| {
        let node = if n % 100 == 0 { subdirectory.clone() } else { node.clone() };
        (format!("entry-{n:05}-{}", "x".repeat(n % 50)), node)
    });
    let large = directory(&store, many);
    with_view(store, |view| {
        let exposed = view.expose("b1", inputs([("large", large)])).unwrap();
        let path = exposed.path().join("large");
        // The second time with attributes known to the kernel, the third time from its own cache.
        for turn in 0..3 {
            let listed: Vec<_> =
                fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            assert_eq!(listed.len(), ENTRIES, "turn {turn}");
            assert!(listed.is_sorted(), "turn {turn}");
            let found =
                fs::read_dir(&path).unwrap().filter(|e| e.as_ref().unwrap().metadata().unwrap().is_dir());
            assert_eq!(found.count(), ENTRIES / 100, "turn {turn}");
        }
        drop(exposed);
        wait_for("the table to be empty", || view.inodes() == 0);
    });
}

#[test]
fn builds_come_and_go_and_leave_nothing() {
    let store = memory::store();
    let inner = directory(&store, [("leaf".to_owned(), file(&store, b"leaf", false))]);
    let tree = directory(
        &store,
        [
            ("inner".to_owned(), inner),
            ("link".to_owned(), link("inner")),
            ("run".to_owned(), file(&store, b"r", true)),
        ],
    );
    with_view(store, |view| {
        let listed = || -> BTreeSet<_> {
            fs::read_dir(&view.at)
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect()
        };
        let stays = view.expose("stays", inputs([("tree", tree.clone())])).unwrap();
        fs::read(stays.path().join("tree/inner/leaf")).unwrap();
        fs::read_dir(stays.path().join("tree")).unwrap().for_each(drop);
        let baseline = view.inodes();
        for round in 0..1000 {
            let id = format!("build-{round}");
            assert!(!view.at.join(&id).exists());
            let exposed = view.expose(&id, inputs([("tree", tree.clone()), ("link", link("x"))])).unwrap();
            assert_eq!(fs::read(exposed.path().join("tree/link/leaf")).unwrap(), b"leaf");
            assert!(!exposed.path().join("tree/none").exists());
            fs::read_dir(exposed.path().join("tree")).unwrap().for_each(drop);
            if round % 100 == 0 {
                assert_eq!(listed(), ["stays".to_owned(), id.clone()].into());
            }
            drop(exposed);
            if round % 100 == 0 {
                wait_for("the build to be gone", || !listed().contains(&id));
            }
        }
        // Less, if the kernel was short of memory.
        wait_for("the table to be as before", || view.inodes() <= baseline);
        assert_eq!(listed(), ["stays".to_owned()].into());
        drop(stays);
        wait_for("the table to be empty", || view.inodes() == 0);
    });
}

/// Once the connection is aborted no request is answered any more: what still works needs none.
#[test]
fn a_second_look_costs_no_request() {
    let store = memory::store();
    let bytes = noise(300_000);
    let inner = directory(&store, [("leaf".to_owned(), file(&store, &bytes, false))]);
    let tree = directory(&store, [("inner".to_owned(), inner), ("link".to_owned(), link("inner/leaf"))]);
    with_view(store, |view| {
        let exposed = view.expose("b1", inputs([("tree", tree)])).unwrap();
        let at = |path: &str| exposed.path().join(path);
        let look = || -> io::Result<()> {
            assert!(fs::read(at("tree/inner/leaf"))? == bytes);
            assert!(fs::read(at("tree/link"))? == bytes);
            assert_eq!(fs::metadata(at("tree"))?.mode(), 0o040_555);
            assert_eq!(fs::read_link(at("tree/link"))?, Path::new("inner/leaf"));
            let listed = fs::read_dir(at("tree"))?.collect::<io::Result<Vec<_>>>()?;
            assert_eq!(listed.len(), 2);
            let missing = fs::metadata(at("tree/missing")).unwrap_err();
            assert_eq!(missing.raw_os_error(), Some(libc::ENOENT));
            Ok(())
        };
        look().unwrap();
        look().unwrap();
        let held = fs::File::open(at("tree")).unwrap();
        nix::mount::umount2(&view.at, nix::mount::MntFlags::MNT_FORCE).unwrap_err();
        wait_for("the end", || exposed.fault().is_some());
        look().unwrap();
        assert!(fs::metadata(at("tree/another")).is_err_and(|e| e.raw_os_error() != Some(libc::ENOENT)));
        drop(held);
    });
}

#[test]
fn builds_in_parallel_do_not_disturb_each_other() {
    let store = memory::store();
    let leaf = directory(&store, [("leaf".to_owned(), file(&store, b"leaf", false))]);
    let many = (0..300).map(|n| {
        let node = if n % 3 == 0 {
            leaf.clone()
        } else {
            file(&store, format!("{}", n % 50).as_bytes(), n % 2 == 0)
        };
        (format!("{n}"), node)
    });
    let tree = directory(&store, many.collect::<Vec<_>>());
    with_view(store, |view| {
        std::thread::scope(|scope| {
            for worker in 0..4 {
                let tree = &tree;
                scope.spawn(move || {
                    for round in 0..40 {
                        let id = format!("{worker}-{round}");
                        let both = inputs([("a", tree.clone()), ("b", tree.clone())]);
                        let exposed = view.expose(&id, both).unwrap();
                        for (outer, n) in
                            ["a", "b"].into_iter().flat_map(|outer| (0..300).map(move |n| (outer, n)))
                        {
                            let path = exposed.path().join(format!("{outer}/{n}"));
                            if n % 3 == 0 {
                                assert_eq!(fs::canonicalize(path.join("leaf")).unwrap(), path.join("leaf"));
                            } else {
                                assert_eq!(fs::read(path).unwrap(), format!("{}", n % 50).as_bytes());
                            }
                        }
                        assert_eq!(fs::read_dir(exposed.path().join("a")).unwrap().count(), 300);
                        assert!(exposed.fault().is_none());
                    }
                });
            }
        });
        wait_for("the table to be empty", || view.inodes() == 0);
    });
}

/// A store that counts how often its blobs are read, and may cut them off.
struct Reading {
    inner: Store,
    reads: Arc<AtomicUsize>,
    /// Where they end, whatever their size.
    end: usize,
}

struct ReadBlob {
    inner: Arc<dyn Blob>,
    reads: Arc<AtomicUsize>,
    end: usize,
}

impl Blob for ReadBlob {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        let left = self.end.saturating_sub(offset as usize).min(buffer.len());
        self.inner.read_at(&mut buffer[..left], offset)
    }

    fn verify(&self) -> Result<(), StoreError> {
        self.inner.verify()
    }
}

impl BlobService for Reading {
    fn stat(&self, digest: &Digest) -> Result<Option<BlobStat>, StoreError> {
        self.inner.blobs.stat(digest)
    }

    fn open(&self, digest: &Digest) -> Result<Option<Arc<dyn Blob>>, StoreError> {
        let opened = self.inner.blobs.open(digest)?;
        let (reads, end) = (Arc::clone(&self.reads), self.end);
        Ok(opened.map(|inner| Arc::new(ReadBlob { inner, reads, end }) as Arc<dyn Blob>))
    }

    fn create(&self) -> Result<Box<dyn BlobWriter>, StoreError> {
        self.inner.blobs.create()
    }
}

#[test]
fn what_a_build_has_read_is_there_for_the_next() {
    let inner = memory::store();
    let contents: Vec<Vec<u8>> = (0..6u8).map(|number| [&noise(150_000)[..], &[number]].concat()).collect();
    let files = contents.iter().enumerate().map(|(n, bytes)| (n.to_string(), file(&inner, bytes, false)));
    let tree = directory(&inner, files.collect::<Vec<_>>());
    let reads = Arc::new(AtomicUsize::new(0));
    let blobs = Arc::new(Reading { inner: inner.clone(), reads: Arc::clone(&reads), end: usize::MAX });
    let store = Store { blobs, directories: inner.directories };
    with_view_keeping(4, store, |view| {
        assert!(matches!(view.expose(".kept", BTreeMap::new()), Err(ViewError::InUse { .. })));
        // How often the store was read for a build that reads these files, and is gone when this returns.
        let build = |id: &str, files: std::ops::Range<usize>| {
            let before = reads.load(Ordering::Relaxed);
            let exposed = view.expose(id, inputs([("tree", tree.clone())])).unwrap();
            for number in files {
                let path = exposed.path().join(format!("tree/{number}"));
                assert!(fs::read(path).unwrap() == contents[number], "{id} {number}");
            }
            drop(exposed);
            // Nothing but kept files is left.
            wait_for("the build to be forgotten", || view.inodes() <= 4);
            reads.load(Ordering::Relaxed) - before
        };
        assert!(build("first", 0..4) > 0);
        assert_eq!(build("second", 0..4), 0);
        assert!(build("others", 4..6) > 0, "0 and 1 go");
        assert_eq!(build("last", 2..6), 0);
        assert!(build("again", 0..1) > 0, "2 goes");
        assert_eq!(build("kept", 0..1), 0);
        assert!(build("gone", 2..3) > 0);
        assert_eq!(fs::read_dir(&view.at).unwrap().count(), 0, "none of that is listed");
    });
}

#[test]
fn a_blob_that_ends_early_is_an_io_error() {
    let inner = memory::store();
    let bytes = noise(300_000);
    let node = file(&inner, &bytes, false);
    for end in [0, 1, 4096, 150_000, 299_999] {
        let blobs = Arc::new(Reading { inner: inner.clone(), reads: Arc::default(), end });
        let store = Store { blobs, directories: Arc::clone(&inner.directories) };
        with_view(store, |view| {
            let exposed = view.expose("b1", inputs([("x", node.clone())])).unwrap();
            let error = fs::read(exposed.path().join("x")).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EIO), "{end}");
            let fault = exposed.fault().unwrap();
            assert!(
                matches!(*fault, Fault::EndsEarly { size: 300_000, offset, .. } if offset >= end as u64),
                "{end}: {fault}"
            );
        });
    }
}

/// As builds see it: under an overlay, which may outlast the directory by a moment.
#[test]
fn a_damaged_blob_is_an_io_error_and_names_itself() {
    let dir = tempfile::tempdir().unwrap();
    let store = crate::castore::LocalStore::open(dir.path()).unwrap().store();
    let bytes = noise(300_000);
    let node = file(&store, &bytes, false);
    let Node::File { digest, .. } = node else { unreachable!() };
    let path = dir.path().join(format!("blobs/{}/{digest}", &digest.to_hex()[..2]));
    with_view(store.clone(), |view| {
        let damaged = [&bytes[..200_000], &[bytes[200_000] ^ 1], &bytes[200_001..]].concat();
        fs::remove_file(&path).unwrap();
        fs::write(&path, damaged).unwrap();
        let exposed = view.expose("b1", inputs([("file", node.clone())])).unwrap();
        let at = exposed.path().join("file");
        let mut first = [0; 16];
        let refused = fs::File::open(&at).unwrap().read_at(&mut first, 0).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EIO));
        let fault = exposed.fault().unwrap().to_string();
        assert!(fault.contains(&digest.to_string()) && fault.contains("damaged"), "{fault}");
        // Stored again, it is there for the next build.
        file(&store, &bytes, false);
        let exposed = view.expose("b2", inputs([("file", node.clone())])).unwrap();
        assert!(fs::read(exposed.path().join("file")).unwrap() == bytes);
        assert!(exposed.fault().is_none());
    });
}

#[test]
fn builds_do_not_see_each_others_locks() {
    use nix::fcntl::{FcntlArg, Flock, FlockArg, fcntl};
    let store = memory::store();
    let node = file(&store, b"shared", false);
    with_view(store, |view| {
        let open = |id: &str| {
            let exposed = view.expose(id, inputs([("file", node.clone())])).unwrap();
            let file = fs::File::open(exposed.path().join("file")).unwrap();
            (exposed, file)
        };
        let ((_first, one), (_second, other)) = (open("b1"), open("b2"));
        let shared = Flock::lock(one, FlockArg::LockSharedNonblock).map_err(|(_, errno)| errno).unwrap();
        let exclusive = Flock::lock(other, FlockArg::LockExclusiveNonblock).unwrap_err();
        assert_eq!(exclusive.1, nix::errno::Errno::ENOLCK, "whether or not there is another");
        let mut wanted =
            libc::flock { l_type: libc::F_RDLCK as i16, l_whence: 0, l_start: 0, l_len: 0, l_pid: 0 };
        fcntl(&exclusive.0, FcntlArg::F_SETLK(&wanted)).unwrap();
        wanted.l_type = libc::F_WRLCK as i16;
        fcntl(&*shared, FcntlArg::F_GETLK(&mut wanted)).unwrap();
        assert_eq!(i32::from(wanted.l_type), libc::F_UNLCK);
    });
}

#[test]
fn an_overlay_may_lie_over_it_and_outlast_it() {
    let store = memory::store();
    let twin = directory(&store, [("leaf".to_owned(), file(&store, b"leaf", false))]);
    let tree = directory(&store, [("a".to_owned(), twin.clone()), ("b".to_owned(), twin)]);
    with_view(store, |view| {
        let exposed = view.expose("b1", inputs([("tree", tree)])).unwrap();
        let scratch = tempfile::tempdir().unwrap();
        // An upper directory may not lie on an overlay, which the test's own root may be.
        let none = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("none"), scratch.path(), Some("tmpfs"), none, None::<&str>).unwrap();
        for part in ["upper", "work", "merged"] {
            fs::create_dir(scratch.path().join(part)).unwrap();
        }
        let (merged, upper) = (scratch.path().join("merged"), scratch.path().join("upper"));
        let work = scratch.path().join("work");
        let lower = exposed.path().display();
        let options =
            format!("lowerdir={lower},upperdir={},workdir={},userxattr", upper.display(), work.display());
        nix::mount::mount(Some("none"), &merged, Some("overlay"), none, Some(options.as_str())).unwrap();
        let in_both = || {
            for twin in ["tree/a", "tree/b", "tree/a"] {
                let script = "cd \"$1\" && /bin/pwd -P && cat leaf && ls ..";
                let said = Command::new("/bin/sh").args(["-c", script, "sh"]).arg(merged.join(twin)).output();
                let said = String::from_utf8(said.unwrap().stdout).unwrap();
                assert_eq!(said, format!("{}\nleafa\nb\n", merged.join(twin).display()));
            }
        };
        in_both();
        fs::write(merged.join("out"), b"made").unwrap();
        assert_eq!(fs::read(upper.join("out")).unwrap(), b"made");
        drop(exposed);
        wait_for("the build to be gone", || !view.at.join("b1").exists());
        in_both();
        for mount in [&merged, scratch.path()] {
            nix::mount::umount2(mount, nix::mount::MntFlags::empty()).unwrap();
        }
        wait_for("the table to be empty", || view.inodes() == 0);
    });
}

#[test]
fn ids_are_names_and_taken_once() {
    with_view(memory::store(), |view| {
        assert!(matches!(view.expose("a/b", BTreeMap::new()), Err(ViewError::Id(_))));
        let exposed = view.expose("a", BTreeMap::new()).unwrap();
        assert!(matches!(view.expose("a", BTreeMap::new()), Err(ViewError::InUse { .. })));
        drop(exposed);
        wait_for("the id to be free", || view.expose("a", BTreeMap::new()).is_ok());
    });
}

/// A store that lacks what it is told to lack.
struct Lacking {
    inner: Store,
    digest: Digest,
}

impl BlobService for Lacking {
    fn stat(&self, digest: &Digest) -> Result<Option<BlobStat>, StoreError> {
        self.inner.blobs.stat(digest)
    }

    fn open(&self, digest: &Digest) -> Result<Option<Arc<dyn Blob>>, StoreError> {
        if *digest == self.digest { Ok(None) } else { self.inner.blobs.open(digest) }
    }

    fn create(&self) -> Result<Box<dyn BlobWriter>, StoreError> {
        self.inner.blobs.create()
    }
}

impl DirectoryService for Lacking {
    fn get(&self, digest: &Digest) -> Result<Option<Arc<Directory>>, StoreError> {
        if *digest == self.digest {
            return Err(StoreError::Damaged { kind: "directory", digest: self.digest });
        }
        self.inner.directories.get(digest)
    }

    fn put(&self, directories: Vec<Directory>) -> Result<(), StoreError> {
        self.inner.directories.put(directories)
    }
}

#[test]
fn what_the_store_lacks_is_an_io_error_and_the_fault_of_those_who_have_it() {
    let cases = ["missing blob", "stated too long", "stated too short", "damaged directory"];
    for case in cases {
        let inner = memory::store();
        let good = file(&inner, b"good", false);
        let digest = Digest::of(b"bytes");
        let size = match case {
            "stated too long" => 5000,
            "stated too short" => 2,
            _ => 5,
        };
        file(&inner, b"bytes", false);
        let bad = Node::File { digest, size, executable: false };
        let folder = directory(&inner, [("bad".to_owned(), bad)]);
        let Node::Directory { digest: folder_digest, .. } = folder else { panic!("not a directory") };
        let tree = directory(&inner, [("folder".to_owned(), folder)]);
        let digest = match case {
            "missing blob" => digest,
            "damaged directory" => folder_digest,
            _ => Digest::of(b"nothing"),
        };
        let lacking = Arc::new(Lacking { inner, digest });
        let store = Store { blobs: Arc::clone(&lacking) as _, directories: lacking };
        with_view(store, |view| {
            let hit = view.expose("hit", inputs([("tree", tree.clone()), ("good", good.clone())])).unwrap();
            let other = view.expose("other", inputs([("good", good.clone())])).unwrap();
            let unread = view.expose("unread", inputs([("tree", tree.clone())])).unwrap();
            assert_eq!(fs::read(hit.path().join("good")).unwrap(), b"good", "{case}");
            assert!(hit.fault().is_none(), "{case}");
            let error = fs::read(hit.path().join("tree/folder/bad")).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EIO), "{case}");
            let fault = hit.fault().unwrap();
            let as_expected = match case {
                "missing blob" => matches!(*fault, Fault::MissingBlob { .. }),
                "damaged directory" => matches!(*fault, Fault::Store { .. }),
                _ => matches!(*fault, Fault::Size { actual: 5, stated, .. } if stated == size),
            };
            assert!(as_expected, "{case}: {fault}");
            assert!(other.fault().is_none() && unread.fault().is_none(), "{case}");
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            assert!(Arc::ptr_eq(&runtime.block_on(hit.faulted()), &fault), "{case}");
        });
    }
}

/// A store that gives some of its blobs, and of the others none until it is told to.
struct Stalling {
    inner: Store,
    near: BTreeSet<Digest>,
    healed: Mutex<bool>,
    change: std::sync::Condvar,
}

impl BlobService for Stalling {
    fn stat(&self, digest: &Digest) -> Result<Option<BlobStat>, StoreError> {
        self.inner.blobs.stat(digest)
    }

    fn open(&self, digest: &Digest) -> Result<Option<Arc<dyn Blob>>, StoreError> {
        if !self.near.contains(digest) {
            let stalled = lock(&self.healed);
            drop(self.change.wait_while(stalled, |healed| !*healed).unwrap());
        }
        self.inner.blobs.open(digest)
    }

    fn is_near(&self, digest: &Digest) -> bool {
        self.near.contains(digest)
    }

    fn create(&self) -> Result<Box<dyn BlobWriter>, StoreError> {
        self.inner.blobs.create()
    }
}

/// What the kernel says each thread of this process is doing that is called so.
fn states(threads: &str) -> Vec<char> {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    let stats = tasks.filter_map(|task| fs::read_to_string(task.unwrap().path().join("stat")).ok());
    stats
        .filter(|stat| stat.contains(threads))
        .filter_map(|stat| stat.rsplit_once(") ")?.1.chars().next())
        .collect()
}

#[test]
fn a_store_that_stalls_holds_up_nobody_else_and_not_for_ever() {
    const READERS: usize = 100;
    const TIMEOUT: Duration = Duration::from_secs(3);
    let inner = memory::store();
    let near: Vec<Node> = (0..50u8).map(|number| file(&inner, &noise_of(number, 20_000), false)).collect();
    let far: Vec<Node> = (50..150u8).map(|number| file(&inner, &noise_of(number, 20_000), false)).collect();
    let digests = near.iter().filter_map(|node| match node {
        Node::File { digest, .. } => Some(*digest),
        _ => None,
    });
    let blobs = Arc::new(Stalling {
        inner: inner.clone(),
        near: digests.collect(),
        healed: Mutex::new(false),
        change: std::sync::Condvar::new(),
    });
    let store = Store { blobs: Arc::clone(&blobs) as _, directories: Arc::clone(&inner.directories) };
    let named = |nodes: Vec<Node>| nodes.into_iter().enumerate().map(|(n, node)| (n.to_string(), node));
    let (near, far) = (directory(&inner, named(near)), directory(&inner, named(far)));
    with_view_patient(0, TIMEOUT, store, |view| {
        let stalled = view.expose("stalled", inputs([("far", far.clone())])).unwrap();
        let other = view.expose("other", inputs([("near", near)])).unwrap();
        std::thread::scope(|scope| {
            let start = Instant::now();
            for reader in 0..READERS {
                let path = stalled.path().join(format!("far/{reader}"));
                let read = move || {
                    let error = fs::read(path).unwrap_err();
                    assert_eq!(error.raw_os_error(), Some(libc::EIO));
                    let waited = start.elapsed();
                    assert!(waited >= TIMEOUT && waited < TIMEOUT * 3, "{waited:?}");
                };
                std::thread::Builder::new().name("a-reader".to_owned()).spawn_scoped(scope, read).unwrap();
            }
            wait_for("all to wait", || {
                let waiting = states("(a-reader)").into_iter().filter(|state| *state == 'D' || *state == 'S');
                waiting.count() == READERS
            });
            for number in 0..50u8 {
                let read = fs::read(other.path().join(format!("near/{number}"))).unwrap();
                assert!(read == noise_of(number, 20_000), "{number}");
            }
            assert_eq!(fs::read_dir(stalled.path().join("far")).unwrap().count(), READERS);
            assert!(start.elapsed() < TIMEOUT, "others had to wait");
            assert!(stalled.fault().is_none());
        });
        let fault = stalled.fault().unwrap();
        assert!(matches!(*fault, Fault::Late { after, .. } if after == TIMEOUT), "{fault}");
        assert!(other.fault().is_none());
        wait_for("the readers to end", || states("(a-reader)").is_empty());
        // What comes too late harms nobody, and afterwards all is well.
        *lock(&blobs.healed) = true;
        blobs.change.notify_all();
        let next = view.expose("next", inputs([("far", far)])).unwrap();
        assert!(fs::read(next.path().join("far/0")).unwrap() == noise_of(50, 20_000));
        assert!(next.fault().is_none());
    });
}

/// A view that ends does not wait for a store that stalls, and leaves nobody waiting for it.
#[test]
fn ending_the_view_frees_those_who_wait_for_the_store() {
    let inner = memory::store();
    let node = file(&inner, b"far", false);
    let blobs = Arc::new(Stalling {
        inner: inner.clone(),
        near: BTreeSet::new(),
        healed: Mutex::new(false),
        change: std::sync::Condvar::new(),
    });
    let store = Store { blobs: Arc::clone(&blobs) as _, directories: inner.directories };
    let start = Instant::now();
    with_view(store, |view| {
        let exposed = view.expose("b1", inputs([("x", node)])).unwrap();
        let path = exposed.path().join("x");
        let reader = std::thread::spawn(move || fs::read(path).map(drop));
        std::thread::sleep(Duration::from_millis(100));
        nix::mount::umount2(&view.at, nix::mount::MntFlags::MNT_FORCE).unwrap_err();
        reader.join().unwrap().unwrap_err();
    });
    assert!(start.elapsed() < PATIENCE / 2, "{:?}", start.elapsed());
    *lock(&blobs.healed) = true;
    blobs.change.notify_all();
}

/// Files read one after the other: most are there before they are asked for.
#[test]
fn the_files_of_a_directory_are_read_ahead_of_who_reads_them_in_turn() {
    const FILES: usize = 600;
    let inner = memory::store();
    let contents = |number: usize| format!("{number} ").repeat(1 + number % 900).into_bytes();
    let files = (0..FILES).map(|number| (format!("{number:04}"), file(&inner, &contents(number), false)));
    let tree = directory(&inner, files.collect::<Vec<_>>());
    const READ: usize = 20;
    // In turn, and here and there.
    for (stride, read_ahead) in [(1, true), (2, true), (7, false), (FILES - 1, false)] {
        with_view(inner.clone(), |view| {
            let exposed = view.expose("b1", inputs([("tree", tree.clone())])).unwrap();
            let dir = exposed.path().join("tree");
            let read = |number: usize| fs::read(dir.join(format!("{number:04}")));
            let listed = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().metadata().unwrap());
            assert_eq!(listed.count(), FILES);
            for number in (0..READ).map(|step| step * stride % FILES) {
                assert!(read(number).unwrap() == contents(number), "{stride} {number}");
            }
            std::thread::sleep(Duration::from_millis(300));
            // No request is answered any more.
            let held = fs::File::open(&dir).unwrap();
            nix::mount::umount2(&view.at, nix::mount::MntFlags::MNT_FORCE).unwrap_err();
            let there = (0..FILES).filter(|number| match read(*number) {
                Ok(found) => found == contents(*number) || panic!("{number} is not what it was"),
                Err(_) => false,
            });
            let beyond = there.count() - READ;
            assert_eq!(beyond > 0, read_ahead, "{beyond} beyond what was read by {stride}");
            assert!(beyond < 300, "{beyond} by {stride}");
            drop(held);
        });
    }
}

#[test]
fn ending_the_view_frees_its_readers_and_tells_its_builds() {
    let store = memory::store();
    let node = file(&store, &noise(1 << 20), false);
    let kept = Mutex::new(None);
    with_view(store.clone(), |view| {
        let exposed = view.expose("b1", inputs([("x", node)])).unwrap();
        // In use: an open file, and a working directory in another process.
        let open = fs::File::open(exposed.path().join("x")).unwrap();
        let mut sleeper = Command::new("/bin/sleep").arg("60").current_dir(exposed.path()).spawn().unwrap();
        nix::mount::umount2(&view.at, nix::mount::MntFlags::MNT_FORCE).unwrap_err();
        assert!(open.read_at(&mut [0; 10], 500_000).is_err());
        wait_for("the fault", || exposed.fault().is_some());
        assert!(matches!(*exposed.fault().unwrap(), Fault::Ended { .. }));
        sleeper.kill().unwrap();
        sleeper.wait().unwrap();
        *kept.lock().unwrap() = Some(exposed);
    });
    // Outlives its view; dropping it then is harmless.
    if let Some(exposed) = kept.into_inner().unwrap() {
        let shared = Arc::clone(&exposed.shared);
        drop(exposed);
        assert!(!lock(&shared.builds).keys().any(|_| true));
    }
}
