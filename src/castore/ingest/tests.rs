use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::libc;
use nix::sys::stat::{Mode, SFlag, mkdirat, mknod};
use nix::unistd::mkfifo;
use proptest::prelude::*;
use rustix::fs::FileType;
use tempfile::TempDir;

use super::read::{BUFFER_BYTES, Reader};
use super::*;
use crate::castore::fixtures::{HELLO, Sketch, digest, ingest, ingest_with, sketch, store, with_dir};
use crate::castore::{Digest, StoreError, Target};
use crate::refscan::Patterns;

fn fault(result: Result<Node, IngestError>) -> TreeFault {
    match result {
        Err(IngestError::Tree(fault)) => fault,
        other => panic!("not the tree's fault: {other:?}"),
    }
}

/// As most tests have it.
fn plain<'a>(store: &'a Store, cancel: &'a AtomicBool) -> Ingest<'a> {
    Ingest { store, scanner: None, skip: &[], label: ".", allowance: None, tally: None, cancel }
}

#[test]
fn the_tree_of_the_design() {
    let (dir, store) = store();
    Sketch::hello().write(&dir.path().join("tree"));
    let hello = Node::Directory { digest: digest(HELLO), size: 8 };
    assert_eq!(ingest(&store, &dir.path().join("tree")).unwrap(), hello);
    assert_eq!(ingest(&store, &dir.path().join("tree/")).unwrap(), hello);
    let cancel = AtomicBool::new(false);
    let ingest = plain(&store, &cancel);
    let at = with_dir(dir.path(), |dir| ingest.at(dir, OsStr::new("tree")));
    assert_eq!(at.unwrap(), hello);
    assert!(store.directories.get(&digest(HELLO)).unwrap().is_some());
}

#[test]
fn roots_of_every_kind() {
    let (dir, store) = store();
    let at = |name: &str| dir.path().join(name);
    let sketches = [
        ("empty directory", Sketch::directory([])),
        ("empty file", Sketch::file("")),
        ("file", Sketch::File { contents: vec![7; 3 * BUFFER_BYTES + 1], executable: true }),
        ("dangling link", Sketch::Symlink(b"no/where".into())),
        ("link to a directory", Sketch::Symlink(b"empty directory".into())),
        ("link to itself", Sketch::Symlink(b"link to itself".into())),
    ];
    for (name, sketch) in sketches {
        sketch.write(&at(name));
        assert_eq!(ingest(&store, &at(name)).unwrap(), sketch.node(&mut Vec::new()), "{name}");
    }
    let slash = ingest(&store, &at("link to a directory/")).unwrap();
    assert!(matches!(slash, Node::Symlink { .. }), "a slash at the end follows nothing");
}

#[test]
fn executable_is_what_the_owner_may() {
    let (dir, store) = store();
    for (mode, expected) in [(0o644, false), (0o744, true), (0o655, false), (0o100, true), (0o000, false)] {
        let path = dir.path().join("file");
        fs::write(&path, b"").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        match ingest(&store, &path) {
            Ok(Node::File { executable, .. }) => assert_eq!(executable, expected, "{mode:o}"),
            // Without capabilities an unreadable file is just that.
            Err(IngestError::Io { act: "open", source, .. }) => {
                assert_eq!((source.kind(), mode & 0o400), (io::ErrorKind::PermissionDenied, 0));
            }
            other => panic!("{mode:o}: {other:?}"),
        }
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn what_has_no_node_is_named_and_never_waited_for() {
    let (dir, store) = store();
    let tree = dir.path().join("tree");
    fs::create_dir_all(tree.join("sub")).unwrap();
    let make_fifo = |path: &Path| mkfifo(path, Mode::S_IRWXU);
    let make_socket = |path: &Path| UnixListener::bind(path).map(drop).map_err(|_| Errno::EIO);
    let make_null = |path: &Path| mknod(path, SFlag::S_IFCHR, Mode::S_IRWXU, libc::makedev(1, 3));
    let make_whiteout = |path: &Path| mknod(path, SFlag::S_IFCHR, Mode::S_IRWXU, 0);
    let make_block = |path: &Path| mknod(path, SFlag::S_IFBLK, Mode::S_IRWXU, libc::makedev(7, 0));
    type Make<'a> = &'a dyn Fn(&Path) -> Result<(), Errno>;
    let cases: [(FileKind, Make, &str); 5] = [
        (FileKind::Fifo, &make_fifo, "./sub/b\\nd is a fifo"),
        (FileKind::Socket, &make_socket, "./sub/b\\nd is a socket"),
        (FileKind::CharacterDevice, &make_null, "./sub/b\\nd is a character device"),
        (FileKind::Whiteout, &make_whiteout, "./sub/b\\nd is a whiteout"),
        (FileKind::BlockDevice, &make_block, "./sub/b\\nd is a block device"),
    ];
    for (kind, make, message) in cases {
        let path = tree.join("sub/b\nd");
        if let Err(errno) = make(&path) {
            assert_eq!(errno, Errno::EPERM, "{kind:?}");
            eprintln!("not tested: {kind:?}, only root may make one");
            continue;
        }
        let found = fault(ingest(&store, &tree));
        assert_eq!(found, TreeFault::Unsupported { path: "./sub/b\\nd".to_owned(), kind });
        assert!(found.to_string().starts_with(message), "{found}");
        assert_eq!(fault(ingest(&store, &path)), TreeFault::Unsupported { path: ".".to_owned(), kind });

        // A type that the directory got wrong, or that changed since.
        let cancel = AtomicBool::new(false);
        let ingest = plain(&store, &cancel);
        let label = || "b".to_owned();
        let lied = with_dir(&tree.join("sub"), |dir| {
            Reader::new(&ingest).entry(dir, OsStr::new("b\nd"), FileType::RegularFile, &label)
        });
        assert!(lied.is_err(), "{kind:?}");
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn nothing_there() {
    let (dir, store) = store();
    let found = fault(ingest(&store, &dir.path().join("no/where")));
    assert_eq!(found, TreeFault::NotFound { path: ".".to_owned() });
    let cancel = AtomicBool::new(false);
    let ingest = plain(&store, &cancel);
    for name in ["", ".", "..", "store/blobs", "/etc"] {
        let at = with_dir(dir.path(), |dir| ingest.at(dir, OsStr::new(name)));
        assert!(matches!(fault(at), TreeFault::Name { .. }), "{name}");
    }
}

/// Makes `depth` directories in one another.
fn nest(path: &Path, depth: usize) {
    fs::create_dir(path).unwrap();
    let mut dir = OwnedFd::from(File::open(path).unwrap());
    for _ in 1..depth {
        mkdirat(&dir, "d", Mode::S_IRWXU).unwrap();
        dir = openat(&dir, "d", OFlag::O_RDONLY | OFlag::O_DIRECTORY, Mode::empty()).unwrap();
    }
}

#[test]
fn depth_has_a_limit() {
    let (dir, store) = store();
    for depth in [1, 2, MAX_DEPTH, MAX_DEPTH + 1, 600] {
        let path = dir.path().join(depth.to_string());
        nest(&path, depth);
        let taken = ingest(&store, &path);
        if depth <= MAX_DEPTH {
            assert!(matches!(taken.unwrap(), Node::Directory { size, .. } if size == 2 * (depth as u64 - 1)));
        } else {
            let path = format!("./{}", vec!["d"; MAX_DEPTH].join("/"));
            assert_eq!(fault(taken), TreeFault::TooDeep { path });
        }
    }
}

#[test]
fn links_are_taken_not_followed() {
    let (dir, store) = store();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    let links: [(&[u8], &[u8]); 5] =
        [(b"up", b".."), (b"self", b"self"), (b"away", b"/etc"), (b"b\xff", b"a\n\xffb"), (b"here", b".")];
    for (name, target) in links {
        symlink(OsStr::from_bytes(target), tree.join(OsStr::from_bytes(name))).unwrap();
    }
    let Node::Directory { digest, size: 10 } = ingest(&store, &tree).unwrap() else { panic!() };
    let directory = store.directories.get(&digest).unwrap().unwrap();
    for (name, target) in links {
        let target = Target::new(target).unwrap();
        assert_eq!(directory.get(name), Some(&Node::Symlink { target }));
    }
}

#[test]
fn a_file_that_became_a_link_is_not_followed() {
    let (dir, store) = store();
    symlink("/etc", dir.path().join("link")).unwrap();
    let cancel = AtomicBool::new(false);
    let ingest = plain(&store, &cancel);
    for hint in [FileType::RegularFile, FileType::Directory] {
        let path = || "link".to_owned();
        let lied =
            with_dir(dir.path(), |dir| Reader::new(&ingest).entry(dir, OsStr::new("link"), hint, &path));
        let Err(IngestError::Io { act: "open", source, .. }) = lied else { panic!("{lied:?}") };
        assert_eq!(source.raw_os_error(), Some(libc::ELOOP));
    }
}

#[test]
fn skipped_names_are_left_out_at_the_top_only() {
    let (dir, store) = store();
    let skipped = || ("skipped", Sketch::file("x"));
    let with = Sketch::directory([skipped(), ("sub", Sketch::directory([skipped()]))]);
    let without = Sketch::directory([("sub", Sketch::directory([skipped()]))]);
    let path = dir.path().join("tree");
    with.write(&path);
    let taken = ingest_with(&store, &path, None, &[b"skipped", b"nowhere"]).unwrap();
    assert_eq!(taken, without.node(&mut Vec::new()));
}

#[test]
fn the_scanner_sees_names_targets_and_contents() {
    let (dir, store) = store();
    let needles =
        ["name-of-root", "in-name", "in-target", "in-contents", "at-an-edge", "/", "skipped", "in-dir"];
    let patterns = Patterns::new(&needles).unwrap();
    let mut edge = vec![b'.'; BUFFER_BYTES - 5];
    edge.extend_from_slice(b"at-an-edge");
    let tree = Sketch::directory([
        ("a-in-dir", Sketch::directory([("x-in-name-x", Sketch::file("nothing"))])),
        ("link", Sketch::Symlink(b"to-in-target".into())),
        ("file", Sketch::file("...in-contents")),
        ("large", Sketch::File { contents: edge, executable: false }),
        ("skipped", Sketch::file("")),
    ]);
    let path = dir.path().join("name-of-root");
    tree.write(&path);
    let scanner = Scanner::new(&patterns);
    ingest_with(&store, &path, Some(&scanner), &[b"skipped"]).unwrap();
    assert_eq!(scanner.found(), [1, 2, 3, 4, 7]);
}

#[test]
fn contents_have_a_limit_holes_and_other_names_included() {
    let (dir, store) = store();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    File::create(tree.join("a")).unwrap().set_len(1000).unwrap();
    fs::hard_link(tree.join("a"), tree.join("b")).unwrap();
    let cancel = AtomicBool::new(false);
    for (bytes, enough) in [(2000, true), (1999, false), (0, false)] {
        let left = AtomicU64::new(bytes);
        let ingest = Ingest { allowance: Some(&left), ..plain(&store, &cancel) };
        let taken = ingest.path(&tree);
        assert_eq!(matches!(taken, Err(IngestError::TooMuch { .. })), !enough, "{bytes}: {taken:?}");
    }
}

#[test]
fn cancelled() {
    let (dir, store) = store();
    Sketch::hello().write(&dir.path().join("tree"));
    let cancel = AtomicBool::new(true);
    let ingest = plain(&store, &cancel);
    assert!(matches!(ingest.path(&dir.path().join("tree")), Err(IngestError::Cancelled)));
    assert!(store.directories.get(&digest(HELLO)).unwrap().is_none());
}

#[test]
fn a_store_that_fails_is_not_the_trees_fault() {
    let (dir, store) = store();
    let tree = TempDir::new().unwrap();
    fs::write(tree.path().join("file"), vec![0; 2 * BUFFER_BYTES]).unwrap();
    fs::remove_dir(dir.path().join("store/tmp")).unwrap();
    let failed = ingest(&store, tree.path()).unwrap_err();
    assert!(matches!(failed, IngestError::Store(StoreError::Io { .. })), "{failed:?}");
}

/// The walk alone, threads from the first file on, and as it comes.
fn crews() -> [(&'static str, Crew); 3] {
    let crew = |threads, start_at| Crew { threads, start_at };
    [("alone", crew(1, 1)), ("four at once", crew(4, 1)), ("four later", crew(4, 3))]
}

/// Takes in the directory at `path`.
fn with_crew(ingest: &Ingest<'_>, path: &Path, crew: &Crew) -> Result<Node, IngestError> {
    walk::tree(ingest, AT_FDCWD, path.as_os_str(), crew)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn threads_make_no_difference(sketch in sketch(), needle in "[a-c]{1,2}") {
        let dir = TempDir::new().unwrap();
        sketch.write(&dir.path().join("tree"));
        let mut directories = Vec::new();
        let node = sketch.node(&mut directories);
        let patterns = Patterns::new(&[needle]).unwrap();
        let mut seen = Vec::new();
        for (_, crew) in crews() {
            let store = crate::castore::memory::store();
            let (cancel, tally, scanner) = (AtomicBool::new(false), Tally::default(), Scanner::new(&patterns));
            let ingest = Ingest {
                store: &store,
                scanner: Some(&scanner),
                skip: &[],
                label: ".",
                allowance: None,
                tally: Some(&tally),
                cancel: &cancel,
            };
            prop_assert_eq!(&with_crew(&ingest, &dir.path().join("tree"), &crew).unwrap(), &node);
            for directory in &directories {
                let stored = store.directories.get(&directory.digest()).unwrap();
                prop_assert_eq!(stored.as_deref(), Some(directory));
            }
            let totals = tally.totals();
            prop_assert!(totals.new_bytes <= totals.bytes && totals.new_files <= totals.files);
            seen.push((scanner.found(), totals));
        }
        prop_assert!(seen.windows(2).all(|pair| pair[0] == pair[1]), "{:?}", seen);
    }
}

#[test]
fn many_files_are_taken_once_each_and_counted() {
    let dir = TempDir::new().unwrap();
    let tree = dir.path().join("tree");
    let mut sketch = std::collections::BTreeMap::new();
    // More than fit the queue, in directories that have nothing else and in one that does; each content twice.
    for number in 0..40 {
        let file =
            |number: usize| (format!("f{number}").into_bytes(), Sketch::file(&format!("{}", number / 2)));
        let files = (0..40).map(|below| file(40 * number + below)).collect();
        sketch.insert(format!("d{number}").into_bytes(), Sketch::Directory(files));
        sketch.extend([file(number)]);
    }
    let sketch = Sketch::Directory(sketch);
    sketch.write(&tree);
    let bytes =
        |numbers: std::ops::Range<usize>| numbers.map(|number| number.to_string().len() as u64).sum::<u64>();
    for (name, crew) in crews() {
        let (_place, store) = store();
        let (cancel, tally) = (AtomicBool::new(false), Tally::default());
        let ingest = Ingest { tally: Some(&tally), ..plain(&store, &cancel) };
        assert_eq!(with_crew(&ingest, &tree, &crew).unwrap(), sketch.node(&mut Vec::new()), "{name}");
        let totals = tally.totals();
        let all = 2 * bytes(0..800) + 2 * bytes(0..20);
        assert_eq!((totals.files, totals.bytes), (1640, all), "{name}");
        // Two threads may find at the same time that something is not there.
        assert!(totals.new_files >= 800 && totals.new_bytes >= bytes(0..800), "{name}: {totals:?}");
        if crew.threads == 1 {
            assert_eq!((totals.new_files, totals.new_bytes), (800, bytes(0..800)));
        }
        let again = Tally::default();
        with_crew(&Ingest { tally: Some(&again), ..plain(&store, &cancel) }, &tree, &crew).unwrap();
        assert_eq!(again.totals(), Totals { new_files: 0, new_bytes: 0, ..totals }, "{name}");
    }
}

#[test]
fn the_first_fault_in_the_order_of_names_is_told_whoever_meets_it() {
    let (dir, store) = store();
    let tree = dir.path().join("tree");
    for number in 0..20 {
        let below = tree.join(format!("{number:02}"));
        fs::create_dir_all(&below).unwrap();
        (0..20).for_each(|file| fs::write(below.join(format!("{file:02}")), "x").unwrap());
    }
    let cancel = AtomicBool::new(false);
    // Each lies before those made so far; some are met by the walk, some by a reader.
    type Make<'a> = &'a dyn Fn(&Path);
    let faults: [(&str, Make); 4] = [
        ("19/19-pipe", &|path| mkfifo(path, Mode::S_IRWXU).unwrap()),
        ("12/05-deep", &|path| nest(path, MAX_DEPTH)),
        ("07/10-socket", &|path| drop(UnixListener::bind(path).unwrap())),
        ("00/00-pipe", &|path| mkfifo(path, Mode::S_IRWXU).unwrap()),
    ];
    for (path, make) in faults {
        make(&tree.join(path));
        for (name, crew) in crews() {
            for _ in 0..20 {
                let found = fault(with_crew(&plain(&store, &cancel), &tree, &crew)).to_string();
                assert!(found.starts_with(&format!("./{path}")), "{name}: {path}: {found}");
            }
        }
    }
}

/// A store in which some blobs can't be written.
struct Refusing {
    store: Store,
    refused: &'static [u8],
}

struct RefusingWriter {
    bytes: Vec<u8>,
    refused: &'static [u8],
    inner: Box<dyn crate::castore::BlobWriter>,
}

impl crate::castore::BlobService for Refusing {
    fn stat(&self, digest: &Digest) -> Result<Option<crate::castore::BlobStat>, StoreError> {
        self.store.blobs.stat(digest)
    }

    fn open(&self, digest: &Digest) -> Result<Option<std::sync::Arc<dyn crate::castore::Blob>>, StoreError> {
        self.store.blobs.open(digest)
    }

    fn create(&self) -> Result<Box<dyn crate::castore::BlobWriter>, StoreError> {
        let (refused, inner) = (self.refused, self.store.blobs.create()?);
        Ok(Box::new(RefusingWriter { bytes: Vec::new(), refused, inner }))
    }
}

impl io::Write for RefusingWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes.extend_from_slice(bytes);
        self.inner.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl crate::castore::BlobWriter for RefusingWriter {
    fn finish(self: Box<Self>) -> Result<Stored, StoreError> {
        match self.bytes.starts_with(self.refused) {
            // Later ones fail before this one does.
            true if self.bytes.ends_with(b"slowly") => {
                std::thread::sleep(std::time::Duration::from_millis(20))
            }
            true => {}
            false => return self.inner.finish(),
        }
        Err(StoreError::io("keep", String::from_utf8_lossy(&self.bytes), io::ErrorKind::StorageFull.into()))
    }
}

#[test]
fn the_first_failure_of_a_file_is_told_though_a_later_one_came_first() {
    let (dir, store) = store();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    for number in 0..100 {
        let contents = match number {
            30 => "refused slowly".to_owned(),
            31..60 => format!("refused {number}"),
            _ => number.to_string(),
        };
        fs::write(tree.join(format!("{number:03}")), contents).unwrap();
    }
    let blobs = Refusing { store: store.clone(), refused: b"refused" };
    let refusing = Store { blobs: std::sync::Arc::new(blobs), directories: store.directories.clone() };
    let cancel = AtomicBool::new(false);
    for (name, crew) in crews() {
        let failed = with_crew(&plain(&refusing, &cancel), &tree, &crew).unwrap_err();
        let IngestError::Store(StoreError::Io { object, .. }) = &failed else { panic!("{name}: {failed:?}") };
        assert_eq!(object, "refused slowly", "{name}");
    }
}

#[test]
fn what_changes_while_it_is_read_is_read_to_its_end() {
    let (dir, store) = store();
    // Files of the kernel say that they are empty, and are not.
    let copy = fs::read("/proc/version").unwrap();
    let Node::File { digest, size, .. } = ingest(&store, Path::new("/proc/version")).unwrap() else {
        panic!()
    };
    assert_eq!((digest, size), (Digest::of(&copy), copy.len() as u64));
    // As large as the buffer, and around it.
    for size in [BUFFER_BYTES - 1, BUFFER_BYTES, BUFFER_BYTES + 1, 2 * BUFFER_BYTES] {
        let contents: Vec<u8> = (0..size).map(|at| (at % 251) as u8).collect();
        fs::write(dir.path().join("file"), &contents).unwrap();
        let expected = Node::File { digest: Digest::of(&contents), size: size as u64, executable: false };
        assert_eq!(ingest(&store, &dir.path().join("file")).unwrap(), expected, "{size}");
    }
}

#[test]
fn cancelled_while_threads_read() {
    let dir = TempDir::new().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    for number in 0..600 {
        File::create(tree.join(number.to_string())).unwrap().set_len(10 << 20).unwrap();
    }
    for (name, crew) in crews() {
        let (_place, store) = store();
        let cancel = AtomicBool::new(false);
        let start = std::time::Instant::now();
        let taken = std::thread::scope(|scope| {
            let taking = scope.spawn(|| with_crew(&plain(&store, &cancel), &tree, &crew));
            std::thread::sleep(std::time::Duration::from_millis(50));
            cancel.store(true, Ordering::Relaxed);
            taking.join().unwrap()
        });
        assert!(matches!(taken, Err(IngestError::Cancelled)), "{name}: {taken:?}");
        assert!(start.elapsed().as_secs() < 3, "{name}: {:?}", start.elapsed());
    }
}
