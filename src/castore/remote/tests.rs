//! Against a server that does what none should.

use std::time::{Duration, Instant};

use super::faulty::{Asked, Fault, PIECE, Server};
use crate::castore::fixtures::{Sketch, put_blob};
use crate::castore::{Digest, Directory, Node, Store, StoreError, WrongBytes};

/// The deadline of calls that are meant to miss it.
const SHORT: Duration = Duration::from_millis(500);

/// What such a call may take in all.
const SOON: Duration = Duration::from_secs(4);

fn noise(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    bytes
}

/// A server with a blob and a tree of three directories.
fn served() -> (Server, Store, Vec<u8>, Node) {
    let server = Server::start();
    let bytes = noise(10 * PIECE);
    put_blob(server.store(), &bytes).unwrap();
    let leaf = |text: &str| Sketch::directory([("file", Sketch::file(text))]);
    let tree = Sketch::directory([("a", leaf("a")), ("b", leaf("b"))]).put(server.store());
    let store = server.client(SHORT).store();
    (server, store, bytes, tree)
}

fn root(tree: &Node) -> Digest {
    match tree {
        Node::Directory { digest, .. } => *digest,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_server_that_keeps_us_waiting_is_given_up() {
    let (server, store, bytes, tree) = served();
    let (blob, root) = (Digest::of(&bytes), root(&tree));
    let large = Digest::of(b"none of them");
    type Call<'a> = (&'a str, &'a [Fault], &'a dyn Fn() -> Result<(), StoreError>);
    let stat = || store.blobs.stat(&blob).map(drop);
    let stats = || store.blobs.stat_all(&[blob, large]).map(drop);
    let read = || store.blobs.copy(&blob, &mut std::io::sink()).map(drop);
    let open = || store.blobs.open(&blob).map(drop);
    let get = || store.directories.get(&root).map(drop);
    let get_tree = || store.directories.get_tree(&root).map(drop);
    let put = || store.directories.put(vec![Directory::new()]);
    let write = || put_blob(&store, b"new").map(drop);
    let calls: [Call<'_>; 8] = [
        ("stat", &[Fault::Silent], &stat),
        ("stats", &[Fault::Silent], &stats),
        ("read", &[Fault::Silent, Fault::Stalls, Fault::Babbles, Fault::Trickles, Fault::Dies], &read),
        ("open", &[Fault::Silent, Fault::Stalls, Fault::Babbles, Fault::Trickles, Fault::Dies], &open),
        ("get", &[Fault::Silent], &get),
        ("get a tree", &[Fault::Silent, Fault::Stalls, Fault::Dies], &get_tree),
        ("put", &[Fault::Silent], &put),
        ("write", &[Fault::Silent], &write),
    ];
    for (name, faults, call) in calls {
        for fault in faults {
            server.set(*fault);
            let start = Instant::now();
            let error = call().expect_err(name).to_string();
            assert!(start.elapsed() < SOON, "{name}, {fault:?}: {:?}", start.elapsed());
            let named = format!("the store at {} could not ", server.address());
            assert!(error.starts_with(&named), "{name}, {fault:?}: {error}");
            assert!(error.contains(" 0.5 s"), "{name}, {fault:?}: {error}");
        }
        server.set(Fault::None);
        call().unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

#[test]
fn what_was_lost_on_the_way_is_asked_for_again() {
    let (server, store, bytes, tree) = served();
    server.set(Fault::DiesOnce);
    let mut got = Vec::new();
    assert!(store.blobs.copy(&Digest::of(&bytes), &mut got).unwrap());
    assert!(got == bytes, "once and in order");
    assert_eq!(server.asked(), [Asked::Read(Digest::of(&bytes)), Asked::Read(Digest::of(&bytes))]);
    server.set(Fault::DiesOnce);
    assert_eq!(store.directories.get_tree(&root(&tree)).unwrap().unwrap().len(), 3);
    assert_eq!(server.asked().len(), 2);
}

#[test]
fn a_server_may_come_later_and_come_back() {
    let (server, _, bytes, tree) = served();
    let store = server.client(Duration::from_secs(20)).store();
    let blob = Digest::of(&bytes);
    for _ in 0..3 {
        server.vanish();
        std::thread::scope(|scope| {
            let (stat, open) =
                (scope.spawn(|| store.blobs.stat(&blob)), scope.spawn(|| store.blobs.open(&blob)));
            let tree = scope.spawn(|| store.directories.get_tree(&root(&tree)));
            std::thread::sleep(Duration::from_millis(300));
            assert!(!stat.is_finished() && !open.is_finished() && !tree.is_finished());
            server.come_back();
            assert!(stat.join().unwrap().unwrap().is_some());
            assert_eq!(open.join().unwrap().unwrap().unwrap().size(), bytes.len() as u64);
            assert_eq!(tree.join().unwrap().unwrap().unwrap().len(), 3);
        });
        // Also what is never asked for again.
        put_blob(&store, b"new").unwrap();
    }
}

#[test]
fn what_is_not_there_is_no_error() {
    let (_server, store, ..) = served();
    let none = Digest::of(b"none");
    assert!(!store.blobs.copy(&none, &mut Vec::new()).unwrap());
    assert!(store.blobs.open_sized(&none, 4).unwrap().is_none());
    assert!(store.directories.get_tree(&none).unwrap().is_none());
    let none = [none; 200];
    assert_eq!(store.blobs.stat_all(&none).unwrap(), [None; 200]);
}

#[test]
fn many_blobs_are_looked_for_in_their_order() {
    let (_server, store, ..) = served();
    let there = |n: u32| n.is_multiple_of(3);
    let blobs: Vec<Digest> = (0..300).map(|n: u32| Digest::of(&n.to_le_bytes())).collect();
    for n in (0..300).filter(|n| there(*n)) {
        put_blob(&store, &n.to_le_bytes()).unwrap();
    }
    let stats = store.blobs.stat_all(&blobs).unwrap();
    assert!(stats.iter().zip(0..).all(|(stat, n)| stat.is_some() == there(n)));
}

#[test]
fn lies_about_blobs_are_found_out() {
    let (server, store, bytes, _) = served();
    let (blob, size) = (Digest::of(&bytes), bytes.len() as u64);
    let cases = [
        (Fault::Short, WrongBytes::Short { size: size - PIECE as u64, stated: size }),
        (Fault::Long, WrongBytes::Long { limit: size }),
        (Fault::Endless, WrongBytes::Long { limit: size }),
    ];
    for (lie, expected) in cases {
        server.set(lie);
        match store.blobs.open_sized(&blob, size).map(drop).unwrap_err() {
            StoreError::Wrong { digest, fault, .. } => {
                assert_eq!((digest, *fault), (blob, expected), "{lie:?}")
            }
            other => panic!("{lie:?}: {other}"),
        }
    }
    server.set(Fault::Wrong);
    match store.blobs.open(&blob).map(drop).unwrap_err() {
        StoreError::Wrong { fault, .. } => {
            assert!(matches!(*fault, WrongBytes::Digest { size: given, .. } if given == size), "{fault}");
        }
        other => panic!("{other}"),
    }
}

#[test]
fn lies_about_trees_are_found_out() {
    let (server, store, _, tree) = served();
    let root = root(&tree);
    let cases = [
        (Fault::Wrong, "gave something else for the directory"),
        (Fault::Foreign, "does not belong there"),
        (Fault::Twice, "sent before"),
        (Fault::Long, "sent before"),
        (Fault::Endless, "sent before"),
        (Fault::Babbles, "does not belong there"),
        (Fault::Incomplete, "which is not in the store"),
        (Fault::Admits, "which is not in the store"),
        (Fault::Short, "which is not in the store"),
    ];
    for (lie, told) in cases {
        server.set(lie);
        let error = store.directories.get_tree(&root).unwrap_err().to_string();
        assert!(error.contains(told), "{lie:?}: {error}");
    }
    server.set(Fault::None);
    let tree: Vec<Digest> =
        store.directories.get_tree(&root).unwrap().unwrap().iter().map(|d| d.digest()).collect();
    assert_eq!((tree.len(), tree.first()), (3, Some(&root)));
}

#[test]
fn a_full_server_says_so() {
    let (server, store, ..) = served();
    server.set(Fault::Full);
    for error in
        [put_blob(&store, b"new").unwrap_err(), store.directories.put(vec![Directory::new()]).unwrap_err()]
    {
        assert!(error.to_string().contains("no space left"), "{error}");
    }
}
