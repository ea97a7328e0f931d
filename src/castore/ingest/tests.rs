use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;

use nix::sys::stat::{SFlag, mkdirat, mknod};
use nix::unistd::mkfifo;
use tempfile::TempDir;

use super::*;
use crate::castore::fixtures::{HELLO, Sketch, digest, ingest, ingest_with, store, with_dir};
use crate::refscan::Patterns;

fn fault(result: Result<Node, IngestError>) -> TreeFault {
    match result {
        Err(IngestError::Tree(fault)) => fault,
        other => panic!("not the tree's fault: {other:?}"),
    }
}

#[test]
fn the_tree_of_the_design() {
    let (dir, store) = store();
    Sketch::hello().write(&dir.path().join("tree"));
    let hello = Node::Directory { digest: digest(HELLO), size: 8 };
    assert_eq!(ingest(&store, &dir.path().join("tree")).unwrap(), hello);
    assert_eq!(ingest(&store, &dir.path().join("tree/")).unwrap(), hello);
    let cancel = AtomicBool::new(false);
    let ingest =
        Ingest { store: &store, scanner: None, skip: &[], label: ".", allowance: None, cancel: &cancel };
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
        let ingest =
            Ingest { store: &store, scanner: None, skip: &[], label: ".", allowance: None, cancel: &cancel };
        let lied = with_dir(&tree.join("sub"), |dir| {
            let mut walk = Walk::new(&ingest);
            walk.entry(dir, OsStr::new("b\nd"), Some(Type::File)).map(drop)
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
    let ingest =
        Ingest { store: &store, scanner: None, skip: &[], label: ".", allowance: None, cancel: &cancel };
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
    let ingest =
        Ingest { store: &store, scanner: None, skip: &[], label: ".", allowance: None, cancel: &cancel };
    for hint in [Type::File, Type::Directory] {
        let lied = with_dir(dir.path(), |dir| {
            Walk::new(&ingest).entry(dir, OsStr::new("link"), Some(hint)).map(drop)
        });
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
        let ingest = Ingest {
            store: &store,
            scanner: None,
            skip: &[],
            label: ".",
            allowance: Some(&left),
            cancel: &cancel,
        };
        let taken = ingest.path(&tree);
        assert_eq!(matches!(taken, Err(IngestError::TooMuch { .. })), !enough, "{bytes}: {taken:?}");
    }
}

#[test]
fn cancelled() {
    let (dir, store) = store();
    Sketch::hello().write(&dir.path().join("tree"));
    let cancel = AtomicBool::new(true);
    let ingest =
        Ingest { store: &store, scanner: None, skip: &[], label: ".", allowance: None, cancel: &cancel };
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
