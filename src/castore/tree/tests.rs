use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use cofferdam_sandbox::Owner;
use proptest::prelude::*;

use super::*;
use crate::castore::fixtures::{Sketch, digest, ingest, name as a_name, put_blob, sketch, store, with_dir};

fn export_to(store: &Store, node: &Node, path: &Path) -> Result<(), ExportError> {
    with_dir(path.parent().unwrap(), |dir| export(store, node, dir, path.file_name().unwrap()))
}

fn paths(store: &Store, node: &Node) -> Result<Vec<Vec<u8>>, ExportError> {
    list(store, node).map(|entry| entry.map(|(path, _)| path)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn there_and_back(sketch in sketch()) {
        let (dir, store) = store();
        let (first, second) = (dir.path().join("first"), dir.path().join("second"));
        sketch.write(&first);
        let mut directories = Vec::new();
        let node = sketch.node(&mut directories);
        prop_assert_eq!(&ingest(&store, &first).unwrap(), &node);
        for directory in directories {
            let stored = store.directories.get(&directory.digest()).unwrap().unwrap();
            prop_assert_eq!(&*stored, &directory);
            prop_assert_eq!(&Directory::decode(&directory.encode()).unwrap(), &directory);
        }
        export_to(&store, &node, &second).unwrap();
        prop_assert_eq!(&ingest(&store, &second).unwrap(), &node);
        prop_assert_eq!(&paths(&store, &node).unwrap()[1..], &sketch.paths()[..]);
    }

    #[test]
    fn as_inputs_all_of_a_tree_has_one_look(sketch in sketch()) {
        let (dir, store) = store();
        let node = sketch.put(&store);
        let owner = Owner { uid: nix::unistd::geteuid().as_raw(), gid: nix::unistd::getegid().as_raw() };
        let (look, cancel) = (Look::Input(owner), AtomicBool::new(false));
        let out = OsStr::new("out");
        with_dir(dir.path(), |dir| export_unless(&store, &node, dir, out, look, &cancel)).unwrap();
        for below in std::iter::once(Vec::new()).chain(sketch.paths()) {
            let path = dir.path().join("out").join(OsStr::from_bytes(&below));
            let path = if below.is_empty() { dir.path().join("out") } else { path };
            let found = fs::symlink_metadata(path).unwrap();
            let mode = found.mode() & 0o7777;
            let modes: &[u32] = match found.file_type() {
                kind if kind.is_dir() => &[0o555],
                kind if kind.is_symlink() => &[0o777],
                _ => &[0o444, 0o555],
            };
            prop_assert!(modes.contains(&mode), "{:o}", mode);
            prop_assert_eq!((found.mtime(), found.mtime_nsec()), (1, 0));
            prop_assert_eq!((found.atime(), found.atime_nsec()), (1, 0));
        }
        // The executable bits, contents and targets are those of the tree.
        prop_assert_eq!(ingest(&store, &dir.path().join("out")).unwrap(), node);
    }
}

#[test]
fn modes() {
    let (dir, store) = store();
    let node = Sketch::hello().put(&store);
    export_to(&store, &node, &dir.path().join("out")).unwrap();
    let mode = |path: &str| fs::metadata(dir.path().join(path)).unwrap().permissions().mode() & 0o777;
    // Whatever the umask is, it is the same for everyone.
    fs::create_dir(dir.path().join("new")).unwrap();
    let all = mode("new");
    let expected = [("out", 0o755), ("out/bin", 0o755), ("out/bin/.keep", 0o644), ("out/hello", 0o755)];
    expected.iter().for_each(|(path, expected)| assert_eq!(mode(path), expected & all, "{path}"));
    assert_eq!(fs::read_link(dir.path().join("out/link")).unwrap(), Path::new("bin/.keep"));
}

#[test]
fn listed_in_order_of_components() {
    let (_dir, store) = store();
    let file = || Sketch::file("x");
    let sub = || Sketch::directory([("b", file()), ("a", file())]);
    let node = Sketch::directory([("b", sub()), ("b-", file()), ("a", file()), ("b.", file())]).put(&store);
    let listed = paths(&store, &node).unwrap();
    assert_eq!(listed, [&b""[..], b"a", b"b", b"b/a", b"b/b", b"b-", b"b."]);
    let file = Sketch::file("x").put(&store);
    assert_eq!(list(&store, &file).map(Result::unwrap).collect::<Vec<_>>(), [(Vec::new(), file.clone())]);
}

#[test]
fn nothing_is_overwritten_or_followed() {
    let (dir, store) = store();
    let nodes = [Sketch::hello(), Sketch::file("new"), Sketch::Symlink(b"new".into())].map(|s| s.put(&store));
    let taken = [
        Sketch::file("old"),
        Sketch::directory([("old", Sketch::file("old"))]),
        Sketch::directory([]),
        Sketch::Symlink(b"dangling".into()),
        Sketch::Symlink(b"/".into()),
    ];
    for (number, before) in taken.into_iter().enumerate() {
        let path = dir.path().join(number.to_string());
        before.write(&path);
        for node in &nodes {
            let refused = export_to(&store, node, &path);
            let Err(ExportError::Io { act: "create", source, .. }) = refused else { panic!("{refused:?}") };
            assert_eq!(source.kind(), io::ErrorKind::AlreadyExists);
            assert_eq!(ingest(&store, &path).unwrap(), before.node(&mut Vec::new()));
        }
    }
    assert!(!dir.path().join("dangling").exists());
    for name in ["", "..", "a/b"] {
        let refused = with_dir(dir.path(), |dir| export(&store, &nodes[0], dir, OsStr::new(name)));
        assert!(matches!(refused, Err(ExportError::Name { .. })), "{name}");
    }
}

/// `{ a: { b: { bad }, c: "c" }, d: "d" }` with `bad` as given.
fn with_bad(store: &Store, bad: Node) -> Node {
    let mut below = bad;
    for names in [&[&b"bad"[..]][..], &[b"b", b"c"], &[b"a", b"d"]] {
        let mut directory = Directory::new();
        directory.insert(a_name(names[0]), below).unwrap();
        if let Some(name) = names.get(1) {
            let (digest, size) = put_blob(store, name).unwrap();
            directory.insert(a_name(name), Node::File { digest, size, executable: false }).unwrap();
        }
        below = directory.node();
        store.directories.put(vec![directory]).unwrap();
    }
    below
}

#[test]
fn what_fails_is_named_and_leaves_nothing() {
    let (dir, store) = store();
    let file = |digest, size| Node::File { digest, size, executable: false };
    let (good, size) = put_blob(&store, b"good").unwrap();
    let (changed, changed_size) = put_blob(&store, &[7; 70_000]).unwrap();
    let place = dir.path().join(format!("store/blobs/{}/{changed}", &changed.to_hex()[..2]));
    fs::remove_file(&place).unwrap();
    fs::write(&place, [8; 70_000]).unwrap();
    let nowhere = Digest::of(b"nowhere");
    let cases = [
        (file(nowhere, 7), format!("the blob {nowhere}, needed for PATH, is not in the store")),
        (
            file(changed, changed_size),
            format!("the store's contents for PATH are not those of digest {changed}"),
        ),
        (file(good, size + 1), format!("PATH is said to have 5 bytes, but blob {good} has 4")),
    ];
    let target = dir.path().join("target");
    fs::create_dir(&target).unwrap();
    for (bad, message) in cases {
        for (node, path) in [(bad.clone(), "."), (with_bad(&store, bad), "a/b/bad")] {
            let failed = export_to(&store, &node, &target.join("out")).unwrap_err();
            assert_eq!(failed.to_string(), message.replace("PATH", path));
            assert_eq!(fs::read_dir(&target).unwrap().count(), 0, "{message}");
        }
    }
    let directory = Node::Directory { digest: nowhere, size: 0 };
    let failed = export_to(&store, &directory, &target.join("out")).unwrap_err();
    assert_eq!(failed.to_string(), format!("the directory {nowhere}, needed for ., is not in the store"));
    let failed = paths(&store, &directory).unwrap_err();
    assert!(matches!(failed, ExportError::Missing { kind: ObjectKind::Directory, .. }), "{failed}");
}

#[test]
fn a_hostile_depth_is_refused() {
    let (dir, store) = store();
    let mut directories = vec![Directory::new()];
    for _ in 1..3000 {
        let mut parent = Directory::new();
        parent.insert(a_name(b"d"), directories.last().unwrap().node()).unwrap();
        directories.push(parent);
    }
    let nodes: Vec<Node> = directories.iter().map(Directory::node).collect();
    store.directories.put(directories).unwrap();
    let target = dir.path().join("target");
    fs::create_dir(&target).unwrap();
    for (depth, fits) in [(MAX_DEPTH, true), (MAX_DEPTH + 1, false), (3000, false)] {
        let node = &nodes[depth - 1];
        let path = target.join(depth.to_string());
        let deepest = vec!["d"; MAX_DEPTH].join("/");
        match (export_to(&store, node, &path), paths(&store, node)) {
            (Ok(()), Ok(listed)) => {
                assert!(fits, "{depth}");
                assert_eq!(listed.len(), MAX_DEPTH);
                assert_eq!(ingest(&store, &path).unwrap(), *node);
            }
            (Err(ExportError::TooDeep { path: exported }), Err(ExportError::TooDeep { path: listed })) => {
                assert!(!fits, "{depth}");
                assert_eq!((&exported, &listed), (&deepest, &deepest));
                assert!(!path.exists());
            }
            other => panic!("{depth}: {other:?}"),
        }
    }
    assert_eq!(nodes[0], Node::Directory { digest: digest(crate::castore::fixtures::EMPTY), size: 0 });
}
