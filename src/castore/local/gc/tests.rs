use std::sync::atomic::{AtomicUsize, Ordering};

use tempfile::TempDir;

use super::*;
use crate::castore::fixtures::{Sketch, put_blob};
use crate::castore::local::verify::Repair;

/// A tree with a small and a large file, different for each `number`, and a directory that all of them share.
fn tree(number: u8) -> Sketch {
    let large = Sketch::File { contents: vec![number; 100_000], executable: false };
    let small = Sketch::File { contents: vec![number; 1000], executable: false };
    let shared = Sketch::directory([("shared", Sketch::file("shared"))]);
    Sketch::directory([("large", large), ("small", small), ("shared", shared)])
}

fn root(node: &Node) -> Object {
    Object::of(node).unwrap()
}

/// Puts trees into a store, of which number N was used N hours after the epoch.
fn filled(dir: &std::path::Path, numbers: std::ops::Range<u8>) -> (LocalStore, Vec<Node>) {
    let local = LocalStore::open(dir).unwrap();
    let nodes: Vec<Node> = numbers.clone().map(|number| tree(number).put(&local.store())).collect();
    local.root.keep.take_used();
    let used =
        nodes.iter().zip(numbers).map(|(node, number)| (root(node), u64::from(number) * 3600)).collect();
    local.index.add(&[], &Default::default(), &used).unwrap();
    (local, nodes)
}

/// Long after everything was stored.
fn later() -> SystemTime {
    SystemTime::now() + 10 * GRACE
}

fn hours(hours: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(3600 * hours)
}

fn there(local: &LocalStore, nodes: &[Node]) -> Vec<bool> {
    let problems = local.verify(Repair::No, &mut |_| ()).unwrap().problems;
    assert_eq!(problems, [], "a collection leaves no holes");
    let there = |node: &Node| local.store().directories.get(&root(node).digest).unwrap().is_some();
    nodes.iter().map(there).collect()
}

#[test]
fn what_was_used_longest_ago_goes_first() {
    let dir = TempDir::new().unwrap();
    let (local, nodes) = filled(dir.path(), 1..9);
    let before = local.usage().unwrap();
    assert_eq!((before.large_blobs, before.small_blobs, before.directories), (8, 9, 9));
    let same =
        local.collect_at(Goal { max_bytes: Some(before.total()), ..Goal::default() }, later(), &mut |_| true);
    assert_eq!(same.unwrap().freed, 0, "it fits");
    let goal = Goal { max_bytes: Some(500_000), unused_since: None };
    let collected = local.collect_at(goal, later(), &mut |_| true).unwrap();
    assert_eq!((collected.blobs, collected.directories), (8, 4));
    assert_eq!(there(&local, &nodes), [false, false, false, false, true, true, true, true]);
    assert_eq!(local.usage().unwrap().large_bytes, 400_000);
    assert_eq!(collected.left, local.disk_bytes().unwrap());

    let goal = Goal { max_bytes: None, unused_since: Some(hours(7)) };
    let collected = local.collect_at(goal, later(), &mut |_| true).unwrap();
    assert_eq!(collected.directories, 2);
    assert_eq!(there(&local, &nodes)[6..], [true, true]);
    let after = local.usage().unwrap();
    assert!(after.pack_bytes < before.pack_bytes / 2, "what is left of the pack was moved: {after:?}");
    // All of it can be stored again, also after a restart.
    drop(local);
    let (local, _) = filled(dir.path(), 1..9);
    assert_eq!(there(&local, &nodes), [true; 8]);
}

#[test]
fn pins_leases_and_what_is_young_stay() {
    let dir = TempDir::new().unwrap();
    let (local, nodes) = filled(dir.path(), 1..5);
    let all = Goal { max_bytes: Some(0), unused_since: None };
    assert!(local.pin(root(&nodes[0])).unwrap());
    assert!(!local.pin(root(&nodes[0])).unwrap(), "it is already");
    assert_eq!(local.pins().unwrap().len(), 1);
    let lease = local.store().directories.lease(&nodes[1..2]);
    let young = tree(9).put(&local.store());
    local.collect_at(all, SystemTime::now(), &mut |_| true).unwrap();
    assert_eq!(there(&local, &[young]), [true]);
    local.collect_at(all, later(), &mut |_| true).unwrap();
    assert_eq!(there(&local, &nodes), [true, true, false, false]);
    assert!(local.unpin(root(&nodes[0])).unwrap());
    assert!(!local.unpin(root(&nodes[0])).unwrap());
    local.collect_at(all, later(), &mut |_| true).unwrap();
    assert_eq!(there(&local, &nodes), [false, true, false, false]);
    drop(lease);
    // Its end is a use.
    local.collect_at(all, SystemTime::now(), &mut |_| true).unwrap();
    assert_eq!(there(&local, &nodes), [false, true, false, false]);
    local.collect_at(all, later(), &mut |_| true).unwrap();
    let usage = local.usage().unwrap();
    assert_eq!((usage.large_blobs, usage.small_blobs, usage.directories, usage.pack_bytes), (0, 0, 0, 0));
}

#[test]
fn what_is_asked_for_meanwhile_stays() {
    let dir = TempDir::new().unwrap();
    let (local, nodes) = filled(dir.path(), 1..6);
    let store = local.store();
    let mut asked = false;
    let all = Goal { max_bytes: Some(0), unused_since: None };
    let loose = put_blob(&store, b"asked for by itself").unwrap().0;
    let lost = put_blob(&store, b"not asked for").unwrap().0;
    local
        .collect_at(all, later(), &mut |step| {
            if step == Step::Mark && !std::mem::replace(&mut asked, true) {
                store.blobs.stat(&loose).unwrap();
                store.directories.get(&root(&nodes[0]).digest).unwrap();
                tree(2).put(&store);
            }
            true
        })
        .unwrap();
    assert_eq!(there(&local, &nodes), [true, true, false, false, false]);
    assert!(store.blobs.stat(&loose).unwrap().is_some());
    assert!(store.blobs.stat(&lost).unwrap().is_none());
}

#[test]
fn collections_beside_uploads_leave_no_holes() {
    let dir = TempDir::new().unwrap();
    let local = LocalStore::open(dir.path()).unwrap();
    let store = local.store();
    /// Says so, also where a test fails.
    struct Done<'a>(&'a AtomicUsize);
    impl Drop for Done<'_> {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
    let done = AtomicUsize::new(0);
    let all = Goal { max_bytes: Some(0), unused_since: None };
    let collections = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for thread in 0..3u8 {
            let (store, done, collections) = (&store, &done, &collections);
            scope.spawn(move || {
                let _done = Done(done);
                for round in (0..=u8::MAX).cycle() {
                    if collections.load(Ordering::Relaxed) > 10 {
                        break;
                    }
                    let sketch = tree(thread.wrapping_add(round % 5));
                    let node = sketch.node(&mut Vec::new());
                    let lease = store.directories.lease(std::slice::from_ref(&node));
                    let mut directories = Vec::new();
                    sketch.node(&mut directories);
                    store.directories.put(directories).unwrap();
                    for contents in sketch.contents() {
                        put_blob(store, contents).unwrap();
                    }
                    // From here on all of it is there for as long as the lease lives.
                    for contents in sketch.contents() {
                        let digest = Digest::of(contents);
                        assert!(store.blobs.open(&digest).unwrap().is_some(), "a leased blob is gone");
                    }
                    drop(lease);
                }
            });
        }
        while done.load(Ordering::Relaxed) < 3 {
            local.collect_at(all, later(), &mut |_| true).unwrap();
            collections.fetch_add(1, Ordering::Relaxed);
        }
    });
    assert!(there(&local, &[]).is_empty());
    drop((local, store));
    assert!(there(&LocalStore::open(dir.path()).unwrap(), &[]).is_empty());
}
