//! The castore beside the disk it lies on: a tree of real sources is read, walked and stored, each comparison interleaved
//! in one run. Prints tables and records them.
//!
//! Builds' side of it is an overlay over the view, mounted as their sandbox mounts it. Beside it stand ext4, an overlay
//! over ext4 and the view without overlay, so that what the overlay takes can be told from what FUSE takes.
//!
//! `scripts/bench castore` is the way to run it: as root, since it mounts and drops the kernel's caches. Given names of
//! parts after `cargo bench --bench castore --`, it runs these alone and records nothing.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

mod common;

#[path = "../tests/support/mod.rs"]
mod support;

#[path = "castore/memory.rs"]
mod memory;
#[path = "castore/reader.rs"]
mod reader;
#[path = "castore/setup.rs"]
mod setup;
#[path = "castore/world.rs"]
mod world;

use common::{Contender, Rounds};
use reader::Sum;
use world::{Shown, World};

/// What takes tenths of a second.
const SOME: Rounds = Rounds { warm_up: 2, measured: 15 };

/// What takes seconds, or needs the caches to be dropped before.
const FEW: Rounds = Rounds { warm_up: 1, measured: 5 };

/// Measures, in a directory of its own, as much as is wanted.
type Part = fn(&Path, &Wanted) -> String;

/// The parts by their names, or those of what they consist of.
const PARTS: [(&[&str], Part); 5] = [
    (&["memory"], memory::part),
    (&["read-warm", "read-cold", "walk-warm", "walk-cold"], tree),
    (&["large-warm", "large-cold"], large),
    (&["add"], add),
    (&["setup"], setup::part),
];

/// The parts that were asked for.
struct Wanted(Vec<String>);

impl Wanted {
    fn all(&self) -> bool {
        self.0.is_empty()
    }

    fn has(&self, part: &str) -> bool {
        self.all() || self.0.iter().any(|wanted| wanted == part)
    }
}

fn main() {
    cofferdam_sandbox::serve_if_spawner();
    if !common::asked_for() {
        return;
    }
    let named = std::env::args().skip(1).filter(|argument| !argument.starts_with('-'));
    let wanted = Wanted(named.collect());
    // While there is one thread.
    world::own_mounts();
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut report = common::heading("The castore beside the disk");
    report += "Each comparison interleaved; milliseconds unless said otherwise.\n";
    for (names, part) in PARTS {
        if names.iter().any(|name| wanted.has(name)) {
            let text = part(dir.path(), &wanted);
            println!("{text}");
            write!(report, "\n{text}").unwrap();
        }
    }
    if wanted.all() {
        common::record("castore", &report);
    }
}

/// The tree of sources, unpacked on the disk.
fn sources() -> PathBuf {
    common::said(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/tree"), &[]).into()
}

/// Reading and walking the tree.
fn tree(dir: &Path, wanted: &Wanted) -> String {
    let sources = sources();
    let on_disk = world::overlay(dir, &sources);
    let world = World::new(dir.join("tree"), &sources);
    let all = reader::read(&sources);
    let mut text = format!("## A tree of {} files, {} MB\n", all.files, all.bytes >> 20);
    let places = |shown: &Shown| {
        [
            ("ext4", sources.clone()),
            ("overlay over ext4", on_disk.path().to_owned()),
            ("the view", shown.view()),
            ("overlay over the view, as builds see it", shown.overlay()),
        ]
    };
    for (part, act, run, cold) in [
        ("read-warm", "Read, warm", reader::read as fn(&Path) -> Sum, false),
        ("read-cold", "Read, cold", reader::read, true),
        ("walk-warm", "Walked (readdir, stat), warm", reader::walk, false),
        ("walk-cold", "Walked (readdir, stat), cold", reader::walk, true),
    ] {
        let expected = run(&sources);
        if wanted.has(part) {
            let places = places(&world.shown());
            let mut contenders: Vec<Contender> = places
                .iter()
                .map(|(name, place)| {
                    let contender = Contender::new(name, || assert_eq!(run(place), expected));
                    if cold { contender.after(world::drop_caches) } else { contender }
                })
                .collect();
            if cold {
                let fresh = || assert_eq!(run(&world.shown().overlay()), expected);
                contenders.push(Contender::new("the same, the daemon just started", fresh).after(|| {
                    world.start_anew();
                    world::drop_caches();
                }));
            }
            common::measure(if cold { FEW } else { SOME }, &mut contenders);
            write!(text, "\n{act}:\n\n{}", common::table("of ext4", &mut contenders)).unwrap();
        }
    }
    text
}

/// One file of 1 GiB.
fn large(dir: &Path, wanted: &Wanted) -> String {
    let files = dir.join("large");
    std::fs::create_dir(&files).unwrap();
    world::noise(&files.join("file"), 1 << 30);
    let world = World::new(dir.join("large-world"), &files);
    let on_disk = world::overlay(dir, &files);
    let mut text = "## A file of 1 GiB\n".to_owned();
    let shown = world.shown();
    for (part, state, cold) in [("large-warm", "warm", false), ("large-cold", "cold", true)] {
        if !wanted.has(part) {
            continue;
        }
        let mut contenders = [
            ("ext4", files.clone()),
            ("overlay over ext4", on_disk.path().to_owned()),
            ("the view", shown.view()),
            ("overlay over the view, as builds see it", shown.overlay()),
        ]
        .map(|(name, place)| {
            let contender = Contender::new(name, move || assert_eq!(reader::read(&place).bytes, 1 << 30));
            if cold { contender.after(world::drop_caches) } else { contender }
        });
        common::measure(FEW, &mut contenders);
        write!(text, "\nRead, {state}:\n\n{}", common::table("of ext4", &mut contenders)).unwrap();
    }
    drop(shown);
    drop(world);
    std::fs::remove_dir_all(files).unwrap();
    text
}

/// Taking the tree in.
fn add(dir: &Path, _: &Wanted) -> String {
    let sources = sources();
    let state = dir.join("added");
    let empty = || {
        let _ = std::fs::remove_dir_all(&state);
        nix::unistd::sync();
    };
    let mut contenders = [
        Contender::new("`tar cf - . \\| b3sum`", || world::tar_and_sum(&sources)).after(empty),
        Contender::new("`cofferdam store add`, into an empty store", || {
            let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_cofferdam"));
            command.args(["store", "add", "--state-dir"]).arg(&state).arg(&sources);
            command.stdout(std::process::Stdio::null());
            common::succeeds(&mut command);
        })
        .after(empty),
    ];
    common::measure(FEW, &mut contenders);
    empty();
    format!(
        "## Storing the tree, from a warm cache\n\nThe sum is taken by {}.\n\n{}",
        world::SUMMER,
        common::table("of tar and sum", &mut contenders)
    )
}
