use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::castore::fixtures::{Sketch, name, put_blob, store};
use crate::castore::traits::{Blob, BlobService, BlobStat, BlobWriter, DirectoryService};

/// A store that counts the questions, and denies having what is listed.
struct Counting {
    store: Store,
    questions: AtomicUsize,
    denied: Vec<(ObjectKind, Digest)>,
}

impl Counting {
    fn denies(&self, kind: ObjectKind, digest: &Digest) -> bool {
        self.questions.fetch_add(1, Ordering::Relaxed);
        self.denied.contains(&(kind, *digest))
    }
}

impl BlobService for Counting {
    fn stat(&self, digest: &Digest) -> Result<Option<BlobStat>, StoreError> {
        if self.denies(ObjectKind::Blob, digest) { Ok(None) } else { self.store.blobs.stat(digest) }
    }

    fn open(&self, _: &Digest) -> Result<Option<Arc<dyn Blob>>, StoreError> {
        unreachable!("no blob need be opened")
    }

    fn create(&self) -> Result<Box<dyn BlobWriter>, StoreError> {
        unreachable!("no blob need be made")
    }
}

impl DirectoryService for Counting {
    fn get(&self, digest: &Digest) -> Result<Option<Arc<Directory>>, StoreError> {
        if self.denies(ObjectKind::Directory, digest) { Ok(None) } else { self.store.directories.get(digest) }
    }

    fn put(&self, _: Vec<Directory>) -> Result<(), StoreError> {
        unreachable!("no directory need be put")
    }
}

/// The store seen through one that denies some objects, and the counter of questions.
fn denying(store: &Store, denied: &[(ObjectKind, Digest)]) -> (Store, Arc<Counting>) {
    let counting =
        Arc::new(Counting { store: store.clone(), questions: AtomicUsize::new(0), denied: denied.to_vec() });
    (Store { blobs: counting.clone(), directories: counting.clone() }, counting)
}

fn digest_of(node: &Node) -> Digest {
    match node {
        Node::Directory { digest, .. } | Node::File { digest, .. } => *digest,
        Node::Symlink { .. } => panic!("a link has no digest"),
    }
}

fn told(findings: &[Finding]) -> Vec<(&str, ObjectKind)> {
    assert!(findings.iter().all(|finding| finding.problem == Problem::Missing));
    findings.iter().map(|missing| (&missing.path[..], missing.kind)).collect()
}

#[test]
fn complete_trees_lack_nothing_and_are_remembered() {
    let (_dir, store) = store();
    let nodes = [
        Sketch::hello().put(&store),
        Sketch::directory([]).put(&store),
        Sketch::directory([("in", Sketch::hello()), ("file", Sketch::file("x"))]).put(&store),
        Sketch::Symlink(b"nowhere".into()).put(&store),
    ];
    let (seen, counting) = denying(&store, &[]);
    let closure = Closure::new();
    let roots = || nodes.iter().map(|node| ("in".to_owned(), node));
    assert_eq!(closure.check(&seen, roots()).unwrap(), []);
    // Directories: hello, bin, empty, outer; blobs: empty, "hello world\n", "x".
    assert_eq!(counting.questions.swap(0, Ordering::Relaxed), 7);
    assert_eq!(closure.check(&seen, roots()).unwrap(), []);
    assert_eq!(counting.questions.load(Ordering::Relaxed), 0);
}

#[test]
fn what_is_missing_is_named_once_with_what_needs_it() {
    let (_dir, store) = store();
    let sub = || Sketch::directory([("b\n", Sketch::file("gone")), ("c", Sketch::file("there"))]);
    let twice = Sketch::directory([("one", sub()), ("two", sub()), ("z", Sketch::hello())]);
    let (twice, sub, gone) = (twice.put(&store), sub().put(&store), Sketch::file("gone").put(&store));
    let hello = Sketch::hello().put(&store);
    let (blob, directory) = (ObjectKind::Blob, ObjectKind::Directory);
    type Case<'a> = (&'a str, &'a [(ObjectKind, Digest)], &'a [&'a Node], &'a [(&'a str, ObjectKind)]);
    let no_gone = [(blob, digest_of(&gone))];
    let no_sub = [(directory, digest_of(&sub))];
    let no_roots = [(directory, digest_of(&hello)), (directory, digest_of(&twice))];
    let cases: &[Case] = &[
        ("a blob below", &no_gone, &[&twice], &[("0/one/b\\n", blob)]),
        ("a blob at the root", &no_gone, &[&gone, &gone], &[("0", blob)]),
        ("a blob in two trees", &no_gone, &[&sub, &twice], &[("0/b\\n", blob)]),
        ("a directory", &no_sub, &[&twice, &sub], &[("0/one", directory)]),
        ("roots", &no_roots, &[&hello, &twice], &[("0", directory), ("1", directory)]),
        ("nothing that is needed", &no_sub, &[&hello], &[]),
    ];
    for (case, denied, roots, expected) in cases {
        let (seen, _) = denying(&store, denied);
        let closure = Closure::new();
        let roots = || roots.iter().enumerate().map(|(index, node)| (index.to_string(), *node));
        for round in 1..3 {
            let missing = closure.check(&seen, roots()).unwrap();
            assert_eq!(told(&missing), *expected, "{case}, round {round}");
        }
        // What lacked something was not taken for complete, and what comes later is noticed.
        assert_eq!(closure.check(&store, roots()).unwrap(), [], "{case}");
        assert_eq!(closure.check(&seen, roots()).unwrap(), [], "{case}: what was complete is remembered");
    }
}

#[test]
fn an_empty_blob_is_not_an_empty_directory() {
    let (_dir, store) = store();
    let node = Sketch::directory([("empty", Sketch::directory([])), ("file", Sketch::file(""))]);
    let mut directories = Vec::new();
    let node = node.node(&mut directories);
    store.directories.put(directories).unwrap();
    let closure = Closure::new();
    let missing = || closure.check(&store, [("in".to_owned(), &node)]).unwrap();
    assert_eq!(told(&missing()), [("in/file", ObjectKind::Blob)]);
    assert_eq!(missing()[0].to_string(), format!("blob {} (needed for in/file)", Digest::of(b"")));
    put_blob(&store, b"").unwrap();
    assert_eq!(missing(), []);
}

#[test]
fn the_report_has_an_end() {
    let (_dir, store) = store();
    let mut root = Directory::new();
    let mut directories = Vec::new();
    for first in 0..30u8 {
        let mut directory = Directory::new();
        for second in 0..7u8 {
            let digest = Digest::of(&[first, second]);
            let file = Node::File { digest, size: 2, executable: false };
            directory.insert(name(format!("{second}").as_bytes()), file).unwrap();
        }
        root.insert(name(format!("{first:02}").as_bytes()), directory.node()).unwrap();
        directories.push(directory);
    }
    let node = root.node();
    directories.push(root);
    store.directories.put(directories).unwrap();
    let closure = Closure::new();
    let mut lacked = 0;
    loop {
        let missing = closure.check(&store, [("in".to_owned(), &node)]).unwrap();
        assert_eq!(missing.len(), (210 - lacked).min(MAX_FINDINGS));
        if missing.is_empty() {
            break;
        }
        for first in 0..30u8 {
            for second in 0..7u8 {
                if missing.iter().any(|missing| missing.digest == Digest::of(&[first, second])) {
                    put_blob(&store, &[first, second]).unwrap();
                    lacked += 1;
                }
            }
        }
    }
    assert_eq!(lacked, 210);
}

#[test]
fn any_depth() {
    let (_dir, store) = store();
    let mut directories = vec![Directory::new()];
    for _ in 1..5000 {
        let mut parent = Directory::new();
        parent.insert(name(b"d"), directories.last().unwrap().node()).unwrap();
        directories.push(parent);
    }
    let node = directories.last().unwrap().node();
    let deepest = directories[0].digest();
    store.directories.put(directories).unwrap();
    let (seen, _) = denying(&store, &[(ObjectKind::Directory, deepest)]);
    let closure = Closure::new();
    let missing = closure.check(&seen, [("in".to_owned(), &node)]).unwrap();
    assert_eq!(told(&missing), [(&format!("in{}/...", "/d".repeat(2047))[..], ObjectKind::Directory)]);
    assert_eq!(closure.check(&store, [("in".to_owned(), &node)]).unwrap(), []);
}

#[test]
fn wrong_sizes_are_told_wherever_they_are_stated() {
    let (_dir, store) = store();
    let (five, _) = put_blob(&store, b"12345").unwrap();
    let file = |size| Node::File { digest: five, size, executable: false };
    let mut inner = Directory::new();
    inner.insert(name(b"right"), file(5)).unwrap();
    let mut outer = inner.clone();
    outer.insert(name(b"long"), file(6)).unwrap();
    outer.insert(name(b"short"), file(0)).unwrap();
    outer.insert(name(b"inner"), inner.node()).unwrap();
    store.directories.put(vec![inner.clone(), outer.clone()]).unwrap();
    let resized = |node: Node, size| match node {
        Node::Directory { digest, .. } => Node::Directory { digest, size },
        node => node,
    };
    let (blob, directory) = (ObjectKind::Blob, ObjectKind::Directory);
    let in_outer = [("0/long", blob, 6, 5), ("0/short", blob, 0, 5)];
    let at_root = |stated, actual| [("0", directory, stated, actual)];
    type Case<'a> = (&'a str, Node, &'a [(&'a str, ObjectKind, u64, u64)]);
    let cases: &[Case] = &[
        ("a file", file(5), &[]),
        ("a file of a wrong size", file(4), &[("0", blob, 4, 5)]),
        ("files below", outer.node(), &in_outer),
        ("a directory", inner.node(), &[]),
        ("a directory of a wrong size", resized(inner.node(), 3), &at_root(3, 2)),
        (
            "a wrong directory of a wrong size",
            resized(outer.node(), 9),
            &[&at_root(9, 10)[..], &in_outer].concat(),
        ),
    ];
    let fresh = Closure::new();
    for (case, node, expected) in cases {
        // The second time what is right is remembered; what is wrong is not.
        for closure in [&Closure::new(), &fresh, &fresh] {
            let findings = closure.check(&store, [("0".to_owned(), node)]).unwrap();
            let told: Vec<_> = findings
                .iter()
                .map(|finding| match finding.problem {
                    Problem::Size { stated, actual } => (&finding.path[..], finding.kind, stated, actual),
                    Problem::Missing => panic!("{case}: {finding} is missing"),
                })
                .collect();
            assert_eq!(sorted(told), sorted(expected.to_vec()), "{case}");
        }
    }
}

fn sorted<T: Ord>(mut items: Vec<T>) -> Vec<T> {
    items.sort();
    items
}
