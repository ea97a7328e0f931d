use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;

use proptest::prelude::*;
use tar::{EntryType, Header};

use super::*;
use crate::castore::fixtures::{HELLO, Sketch, digest, ingest, name, put_blob, sketch, store};
use crate::castore::ingest::{FileKind, MAX_DEPTH, Tally, Totals};
use crate::castore::tree::{ExportError, ObjectKind};
use crate::castore::{Digest, Directory, Node, NodeError, Store, memory};

fn packed(store: &Store, node: &Node) -> Result<Vec<u8>, ExportError> {
    let mut archive = Vec::new();
    write(store, node, &name(b"file"), &mut archive, &AtomicBool::new(false))?;
    Ok(archive)
}

fn unpacked(store: &Store, archive: &[u8]) -> Result<Node, ArchiveError> {
    Unpack { store, tally: &Tally::default(), cancel: &AtomicBool::new(false) }.run(archive)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn there_and_back(sketch in sketch()) {
        let (from, to) = (memory::store(), memory::store());
        let node = sketch.put(&from);
        let archive = packed(&from, &node).unwrap();
        prop_assert_eq!(archive.len() % 512, 0);
        prop_assert_eq!(&archive, &packed(&from, &node).unwrap());
        let back = unpacked(&to, &archive).unwrap();
        let expected = match &sketch {
            Sketch::Directory(_) => sketch,
            // What is no directory comes back in one.
            alone => Sketch::directory([("file", alone.clone())]),
        };
        let mut directories = Vec::new();
        prop_assert_eq!(&back, &expected.node(&mut directories));
        for directory in directories {
            let stored = to.directories.get(&directory.digest()).unwrap();
            prop_assert_eq!(stored.as_deref(), Some(&directory));
        }
        prop_assert_eq!(packed(&to, &back).unwrap(), archive);
    }

    #[test]
    fn whatever_comes_it_ends_without_a_panic(
        sketch in sketch(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        len in any::<prop::sample::Index>(),
    ) {
        let store = memory::store();
        let mut archive = packed(&store, &sketch.put(&store)).unwrap();
        for (at, byte) in changes {
            let at = at.index(archive.len());
            archive[at] = byte;
        }
        archive.truncate(len.index(archive.len()) + 1);
        let _ = unpacked(&store, &archive);
    }
}

/// Runs tar with `input` and yields what it writes.
fn tar(args: &[&str], input: &[u8]) -> Vec<u8> {
    let mut command = Command::new("tar");
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let output = std::thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(input).unwrap());
        child.wait_with_output().unwrap()
    });
    assert!(output.status.success(), "{args:?}");
    output.stdout
}

/// Names and targets around every limit of the format, as any other file system has them.
fn awkward() -> Sketch {
    let long = |len: usize, last: &str| format!("{}{last}", "n".repeat(len - last.len()));
    let link = |len: usize| Sketch::Symlink(format!("a//./{}", "t".repeat(len - 5)).into_bytes());
    let mut deep = Sketch::directory([("leaf", Sketch::file("deep"))]);
    for _ in 0..20 {
        deep = Sketch::directory([(&*long(200, "d"), deep)]);
    }
    let executable = Sketch::File { contents: vec![1; 512], executable: true };
    let mut entries = Sketch::directory([
        (&long(99, "f"), Sketch::file("99")),
        (&long(100, "f"), Sketch::file("100")),
        (&long(101, "f"), executable),
        (&long(255, "f"), Sketch::file("255")),
        (&long(99, "d"), Sketch::directory([])),
        (&long(100, "d"), Sketch::directory([("x", Sketch::file(""))])),
        ("link 99", link(99)),
        ("link 100", link(100)),
        ("link 101", link(101)),
        ("link 4095", link(4095)),
        ("deep", deep),
        ("empty", Sketch::directory([])),
    ]);
    if let Sketch::Directory(entries) = &mut entries {
        entries.insert(b"\xff\n \\\x01".to_vec(), Sketch::file("no text"));
    }
    entries
}

#[test]
fn other_programs_read_what_we_write() {
    let (dir, store) = store();
    let node = awkward().put(&store);
    let archive = packed(&store, &node).unwrap();
    let out = dir.path().join("out");
    fs::create_dir(&out).unwrap();
    tar(&["xf", "-", "-C", out.to_str().unwrap()], &archive);
    assert_eq!(ingest(&store, &out).unwrap(), node);
    let hello = packed(&store, &Sketch::hello().put(&store)).unwrap();
    let listed = String::from_utf8(tar(&["tvf", "-", "--utc", "--full-time"], &hello)).unwrap();
    let expected = [
        "dr-xr-xr-x 0/0               0 1970-01-01 00:00:01 bin/",
        "-r--r--r-- 0/0               0 1970-01-01 00:00:01 bin/.keep",
        "-r-xr-xr-x 0/0              12 1970-01-01 00:00:01 hello",
        "lrwxrwxrwx 0/0               0 1970-01-01 00:00:01 link -> bin/.keep",
    ];
    assert_eq!(listed.lines().collect::<Vec<_>>(), expected);
}

#[test]
fn what_other_programs_write_is_read() {
    let (dir, store) = store();
    let tree = dir.path().join("tree");
    awkward().write(&tree);
    let mut node = ingest(&store, &tree).unwrap();
    let at = tree.to_str().unwrap();
    for format in [&["--format=gnu"][..], &["--format=oldgnu"], &["--format=pax"]] {
        if format == ["--format=pax"] {
            // The one thing that isn't: such a name is in an extended header, which ends at a newline.
            let refused =
                unpacked(&store, &tar(&["cf", "-", "-C", at, "--format=pax", "."], b"")).unwrap_err();
            assert!(refused.to_string().contains("or a name in it has a newline"), "{refused}");
            fs::remove_file(tree.join(OsStr::from_bytes(b"\xff\n \\\x01"))).unwrap();
            fs::write(tree.join(OsStr::from_bytes(b"\xff \\\x01")), "no text").unwrap();
            node = ingest(&store, &tree).unwrap();
        }
        for what in [&["."][..], &["--transform=s,^[.]/,,S", "."]] {
            let args = [&["cf", "-", "-C", at], format, what].concat();
            assert_eq!(unpacked(&store, &tar(&args, b"")).unwrap(), node, "{args:?}");
        }
    }
    // Old forms have short names.
    Sketch::hello().write(&dir.path().join("hello"));
    let at = dir.path().join("hello");
    for format in ["--format=v7", "--format=ustar"] {
        let archive = tar(&["cf", "-", "-C", at.to_str().unwrap(), format, "."], b"");
        let found = unpacked(&store, &archive).unwrap();
        assert_eq!(found, Node::Directory { digest: digest(HELLO), size: 8 }, "{format}");
    }
}

#[test]
fn hard_links_and_holes_become_files() {
    let (dir, store) = store();
    let tree = dir.path().join("tree");
    fs::create_dir_all(tree.join("sub")).unwrap();
    fs::write(tree.join("a"), "twice").unwrap();
    fs::hard_link(tree.join("a"), tree.join("sub/b")).unwrap();
    let mut holes = fs::File::create(tree.join("holes")).unwrap();
    holes.set_len(3 << 20).unwrap();
    std::io::Seek::seek(&mut holes, std::io::SeekFrom::Start(1 << 20)).unwrap();
    holes.write_all(b"in the middle").unwrap();
    drop(holes);
    let node = ingest(&store, &tree).unwrap();
    for sparse in [&[][..], &["--sparse"]] {
        let archive = tar(&[&["cf", "-", "-C", tree.to_str().unwrap()], sparse, &["."]].concat(), b"");
        assert_eq!(unpacked(&store, &archive).unwrap(), node, "{sparse:?}");
    }
    let sparse = ["cf", "-", "-C", tree.to_str().unwrap(), "--sparse", "--format=pax", "."];
    let refused = unpacked(&store, &tar(&sparse, b"")).unwrap_err();
    assert!(refused.to_string().contains("holes\" is a sparse file in a form"), "{refused}");
}

/// An entry by hand: its type, path, target, contents, and the length that it states.
fn block(kind: u8, path: &[u8], target: &[u8], contents: &[u8], len: u64) -> Vec<u8> {
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::new(kind));
    header.set_mode(0o644);
    header.set_size(len);
    header.as_old_mut().name[..path.len()].copy_from_slice(path);
    header.as_old_mut().linkname[..target.len()].copy_from_slice(target);
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(contents);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn file(path: &[u8]) -> Vec<u8> {
    block(b'0', path, b"", b"x", 1)
}

fn archive(blocks: &[Vec<u8>]) -> Vec<u8> {
    [blocks.concat(), vec![0; 1024]].concat()
}

#[test]
fn directories_may_be_told_of_never_or_twice() {
    let (_dir, store) = store();
    let sub = Sketch::directory([("f", Sketch::file("x"))]);
    let expected = Sketch::directory([("d", sub)]).node(&mut Vec::new());
    let told = |path: &[u8]| block(b'5', path, b"", b"", 0);
    let cases = [
        vec![file(b"d/f")],
        vec![told(b"d/"), file(b"d/f")],
        vec![told(b"./"), told(b"d"), file(b"d/f"), told(b"./d/")],
        vec![file(b"./d//./f"), told(b"d//")],
        // As it was before there was a type for directories.
        vec![block(0, b"d/", b"", b"", 0), file(b"d/f")],
    ];
    for (number, case) in cases.iter().enumerate() {
        assert_eq!(unpacked(&store, &archive(case)).unwrap(), expected, "{number}");
    }
    assert_eq!(unpacked(&store, &archive(&[])).unwrap(), Directory::new().node());
}

#[test]
fn hostile_entries_are_named() {
    let (_dir, store) = store();
    let deep = vec!["d"; MAX_DEPTH].join("/").into_bytes();
    let long = |path: &[u8]| block(b'L', b"././@LongLink", b"", path, path.len() as u64);
    let pax = |text: &[u8]| block(b'x', b"pax", b"", text, text.len() as u64);
    let no_link = |target: &str| EntryFault::HardLink { target: target.into() };
    let unclear = |what| EntryFault::Extension { what };
    let link = |path: &[u8], target: &[u8]| block(b'1', path, target, b"", 0);
    let below = |above: &str| EntryFault::Below { above: above.into() };
    let kind = |kind: u8| block(kind, b"dev", b"", b"", 0);
    let cases: Vec<(Vec<Vec<u8>>, &str, EntryFault)> = vec![
        (vec![file(b"/etc/passwd")], "/etc/passwd", EntryFault::Absolute),
        (vec![file(b"a/../../b")], "a/../../b", EntryFault::Upwards),
        (vec![file(b"..")], "..", EntryFault::Upwards),
        (vec![file(b".")], ".", EntryFault::Root),
        (vec![file(b"a"), file(b"a")], "a", EntryFault::Twice),
        (vec![file(b"a"), file(b"./a")], "./a", EntryFault::Twice),
        (vec![file(b"a/b"), file(b"a")], "a", EntryFault::Twice),
        (vec![file(b"a"), block(b'5', b"a/", b"", b"", 0)], "a/", EntryFault::Twice),
        (vec![file(b"a"), file(b"a/b/c")], "a/b/c", below("\"a\"")),
        // A link must not lead out of the tree, nor anywhere else.
        (vec![block(b'2', b"l", b"/etc", b"", 0), file(b"l/passwd")], "l/passwd", below("\"l\"")),
        (vec![link(b"l", b"/etc/passwd")], "l", no_link("/etc/passwd")),
        (vec![link(b"l", b"../up")], "l", no_link("../up")),
        (vec![link(b"l", b"later"), file(b"later")], "l", no_link("later")),
        (vec![file(b"d/f"), link(b"l", b"d")], "l", no_link("d")),
        (vec![link(b"l", b"l")], "l", no_link("l")),
        (vec![kind(b'3')], "dev", EntryFault::Kind(FileKind::CharacterDevice)),
        (vec![kind(b'4')], "dev", EntryFault::Kind(FileKind::BlockDevice)),
        (vec![kind(b'6')], "dev", EntryFault::Kind(FileKind::Fifo)),
        (vec![kind(b'M')], "dev", EntryFault::UnknownType { kind: "M".into() }),
        (
            vec![block(b'2', b"l", b"", b"", 0)],
            "l",
            EntryFault::Target(NodeError::Target { fault: "is empty" }),
        ),
        (vec![long(&deep), block(b'5', b"", b"", b"", 0)], "", EntryFault::TooDeep),
        (vec![long(&[&deep[..], b"/f"].concat()), file(b"f")], "", EntryFault::TooDeep),
        (
            vec![block(b'0', b"short", b"", b"abc", 4096)],
            "short",
            EntryFault::Size { stated: 4096, actual: 1536 },
        ),
        (vec![pax(b"9 path=a\n9 path=b\n"), file(b"f")], "a", unclear("it says something twice")),
        (
            vec![pax(b"99 path=a\n"), file(b"f")],
            "f",
            unclear("it is malformed, or a name in it has a newline"),
        ),
        (
            vec![block(b'g', b"global", b"", b"9 path=a\n", 9), file(b"f")],
            "global",
            unclear("it gives all entries one name or size"),
        ),
        (vec![pax(b"22 GNU.sparse.major=1\n"), file(b"f")], "f", EntryFault::Sparse),
    ];
    for (blocks, expected, reason) in cases {
        match unpacked(&store, &archive(&blocks)) {
            Err(ArchiveError::Entry { path, fault }) => {
                assert_eq!(fault, reason, "{path}");
                assert!(expected.is_empty() || path == expected, "{path} is not {expected}");
            }
            other => panic!("{expected}: {reason}: {other:?}"),
        }
    }
    // What is refused leaves no tree.
    assert!(store.directories.get(&Directory::new().digest()).unwrap().is_none());
}

/// Yields an endless long name.
struct Endless(Vec<u8>, usize);

impl std::io::Read for Endless {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let rest = self.0.get(self.1..).unwrap_or_default();
        let count = if rest.is_empty() { buffer.len() } else { rest.len().min(buffer.len()) };
        match rest.get(..count) {
            Some(rest) if !rest.is_empty() => buffer[..count].copy_from_slice(rest),
            _ => buffer.fill(b'n'),
        }
        self.1 += count;
        Ok(count)
    }
}

#[test]
fn what_is_no_archive_is_told_and_nothing_is_read_without_end() {
    let (_dir, store) = store();
    let whole = archive(&[file(b"f")]);
    let cases: [(&[u8], &str); 6] = [
        (b"", "ends at its start without"),
        (&whole[..1024], "ends after \"f\" without"),
        (&whole[..700], "\"f\" is said to have 1 bytes, but there are 1"),
        (&whole[..300], "can't read the archive at its start"),
        (&[0x1f; 2048], "at its start: "),
        (b"\x1f\x8b compressed", "as by zcat"),
    ];
    for (bytes, expected) in cases {
        let message = unpacked(&store, bytes).map_err(|error| error.to_string());
        match (message, expected.contains("but there are 1")) {
            // The contents were there, though not what fills up their block.
            (Err(message), true) => assert!(message.contains("can't read"), "{message}"),
            (Err(message), false) => assert!(message.contains(expected), "{message} lacks {expected}"),
            (Ok(node), _) => panic!("{expected}: {node:?}"),
        }
    }
    for kind in [b'L', b'K', b'x', b'g'] {
        let endless = Endless(block(kind, b"long", b"", b"", 1 << 40), 0);
        let unpack = Unpack { store: &store, tally: &Tally::default(), cancel: &AtomicBool::new(false) };
        let refused = unpack.run(endless).unwrap_err().to_string();
        assert!(refused.contains("1 MiB") || refused.contains("can't be read"), "{refused}");
    }
}

#[test]
fn counted_and_read_to_the_end() {
    let (_dir, store) = store();
    put_blob(&store, b"x").unwrap();
    let mut bytes = archive(&[file(b"known"), block(b'0', b"new", b"", b"new", 3)]);
    bytes.extend_from_slice(&[0; 20_000]);
    let tally = Tally::default();
    let mut rest = &bytes[..];
    Unpack { store: &store, tally: &tally, cancel: &AtomicBool::new(false) }.run(&mut rest).unwrap();
    assert_eq!(tally.totals(), Totals { files: 2, bytes: 4, new_files: 1, new_bytes: 3 });
    assert!(rest.is_empty(), "whoever writes it must not be cut short");
    let cancelled = Unpack { store: &store, tally: &tally, cancel: &AtomicBool::new(true) }.run(&bytes[..]);
    assert!(matches!(cancelled, Err(ArchiveError::Cancelled)));
}

#[test]
fn what_the_store_lacks_makes_no_archive() {
    let (_dir, store) = store();
    let (good, size) = put_blob(&store, b"good").unwrap();
    let node = |digest, size| Node::File { digest, size, executable: false };
    let nowhere = Digest::of(b"nowhere");
    let cases = [
        (
            node(nowhere, 7),
            ExportError::Missing { path: "file".into(), kind: ObjectKind::Blob, digest: nowhere },
        ),
        (node(good, size + 1), ExportError::Size { path: "file".into(), digest: good, stated: 5, actual: 4 }),
    ];
    for (node, expected) in cases {
        assert_eq!(packed(&store, &node).unwrap_err().to_string(), expected.to_string());
    }
    let full = write(
        &store,
        &node(good, size),
        &name(b"file"),
        &mut fs::OpenOptions::new().write(true).open(Path::new("/dev/full")).unwrap(),
        &AtomicBool::new(false),
    );
    let message = full.unwrap_err().to_string();
    assert!(message.starts_with("can't write the archive: "), "{message}");
}
