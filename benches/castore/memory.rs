//! What the view keeps of a million inodes that the kernel has forgotten.

use std::fmt::Write;
use std::num::NonZeroUsize;
use std::path::Path;
use std::time::{Duration, Instant};

use cofferdam::castore::{Digest, Directory, LocalStore, Name, Node, Store};
use cofferdam::view::View;
use cofferdam_sandbox::Owner;

use super::{reader, world};

/// Half a million empty directories, which are one and the same to the store, and as many files, which are not.
const BRANCHES: u64 = 500;
const LEAVES: u64 = 1000;

/// Walks, has the kernel forget, and says what this process takes.
pub fn part(dir: &Path, _: &super::Wanted) -> String {
    let dir = dir.join("memory");
    let at = dir.join("view");
    std::fs::create_dir_all(&at).unwrap();
    let store = LocalStore::open(&dir.join("store")).unwrap().store();
    let tree = tree(&store);
    let (threads, timeout) = (NonZeroUsize::new(4).unwrap(), Duration::from_secs(60));
    let view = View::mount(store, &at, Owner { uid: 0, gid: 0 }, threads, timeout).unwrap();
    let exposed = view.expose("build", [(Name::new("tree").unwrap(), tree)].into()).unwrap();
    cofferdam_sandbox::measure::trim_own_memory();
    let start = resident();
    let seen = reader::walk(exposed.path());
    assert_eq!(seen.files, BRANCHES * LEAVES);
    let walked = resident();
    drop(exposed);
    let forgotten = settle();
    // What any idle daemon does some time after its last build.
    let idle = {
        let deadline = Instant::now() + Duration::from_secs(90);
        while resident() > start + (32 << 20) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(500));
        }
        resident()
    };
    drop(view);
    std::fs::remove_dir_all(&dir).unwrap();
    let mut text =
        "## Memory after a million inodes\n\n| anonymous memory of the process | MiB |\n|---|---:|\n"
            .to_owned();
    for (what, bytes) in [
        ("before", start),
        ("after a walk over 500 000 files and as many directories", walked),
        ("after the build has gone and the kernel has dropped its caches", forgotten),
        ("a while later", idle),
    ] {
        writeln!(text, "| {what} | {:.1} |", bytes as f64 / f64::from(1 << 20)).unwrap();
    }
    text
}

fn tree(store: &Store) -> Node {
    let empty = Directory::new();
    let mut leaves = Directory::new();
    for number in 0..LEAVES {
        leaves.insert(name("dir", number), empty.node()).unwrap();
    }
    let mut root = Directory::new();
    let mut all = vec![empty, leaves.clone()];
    for branch in 0..BRANCHES {
        let mut files = Directory::new();
        for number in 0..LEAVES {
            let digest = Digest::of(format!("{branch} {number}").as_bytes());
            files.insert(name("file", number), Node::File { digest, size: 1, executable: false }).unwrap();
        }
        root.insert(name("files", branch), files.node()).unwrap();
        root.insert(name("dirs", branch), leaves.node()).unwrap();
        all.push(files);
    }
    let node = root.node();
    all.push(root);
    store.directories.put(all).unwrap();
    node
}

fn name(kind: &str, number: u64) -> Name {
    Name::new(format!("{kind}-{number}")).unwrap()
}

fn settle() -> u64 {
    world::drop_caches();
    std::thread::sleep(Duration::from_secs(3));
    world::drop_caches();
    resident()
}

/// Anonymous memory of this process in bytes.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() << 10
}
