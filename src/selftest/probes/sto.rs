//! STO: what the store does about damage, lies and sudden ends.

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::Signal;

use super::second::{END, Place};
use super::tools::eventually;
use crate::build::error::Fault;
use crate::castore::{Digest, Directory, Name, Node, Store, StoreError, Stored};
use crate::selftest::stage::{End, Stage, name};
use crate::selftest::{Act, Company, Findings, Outcome, Play, Probe, Weight};

pub(super) const PROBES: &[Probe] = &[
    Probe {
        id: "STO-01",
        promise: "a damaged blob is an I/O error and the worker's fault, never wrong bytes",
        weight: Weight::Required,
        company: Company::Shared,
        attack: read_damaged,
        play: Play::Script(|stage| Box::pin(damaged_blobs(stage))),
    },
    Probe {
        id: "STO-02",
        promise: "directories that are malformed, or lie of their children, are refused",
        weight: Weight::Required,
        company: Company::Shared,
        attack: |_, findings| findings.check(false, "a build of a bad directory was started"),
        play: Play::Script(|stage| Box::pin(bad_directories(stage))),
    },
    Probe {
        id: "STO-03",
        promise: "a worker that is killed while it stores leaves nothing half under a name",
        weight: Weight::Required,
        company: Company::Shared,
        attack: |_, findings| findings.check(true, ""),
        play: Play::Script(|stage| Box::pin(killed_while_storing(stage))),
    },
    Probe {
        id: "STO-04",
        promise: "a directory is stored only over children that are there, also after a crash",
        weight: Weight::Desired,
        company: Company::Shared,
        attack: |_, findings| findings.check(true, ""),
        play: Play::Script(|stage| Box::pin(children_before_parents(stage))),
    },
    Probe {
        id: "STO-07",
        promise: "no encoding of a directory, however wrong, makes the store fail",
        weight: Weight::Desired,
        company: Company::Shared,
        attack: |_, findings| findings.check(true, ""),
        play: Play::Script(|stage| Box::pin(hostile_encodings(stage))),
    },
];

const DAMAGED: &str = "damaged-input";

/// How long the attack waits, so that its input can be damaged once it runs.
const BEFORE_READING: Duration = Duration::from_millis(400);

fn read_damaged(act: &Act, findings: &mut Findings) {
    println!("holding");
    std::thread::sleep(BEFORE_READING);
    let read = fs::read(Path::new("/nix/store").join(DAMAGED));
    match read {
        // A copy from before the damage.
        Ok(bytes) => {
            let digest = Digest::of(&bytes).to_hex();
            findings
                .check(act.arguments.first().is_some_and(|right| *right == *digest), "wrong bytes were read");
        }
        refused => findings.refused("read a damaged input", refused, &[Errno::EIO]),
    }
}

/// When a blob is damaged.
#[derive(Clone, Copy, Debug, PartialEq)]
enum When {
    Before,
    While,
}

async fn damaged_blobs(stage: &Stage<'_>) -> Outcome {
    let mut outcome = Outcome::Held;
    type Damage = fn(&mut Vec<u8>);
    let flip: Damage = |bytes| {
        let middle = bytes.len() / 2;
        if let Some(byte) = bytes.get_mut(middle) {
            *byte ^= 1;
        }
    };
    // Small ones share a file, which can't be cut off for one of them alone.
    let damages: [(&str, usize, Damage); 5] = [
        ("one bit is another", 100_000, flip),
        ("one bit of a small one is another", 10_000, flip),
        ("it is cut off", 100_000, |bytes| bytes.truncate(50_000)),
        ("it is longer", 100_000, |bytes| bytes.push(b'x')),
        ("it is empty", 100_000, Vec::clear),
    ];
    for (what, size, damage) in damages {
        for when in [When::Before, When::While] {
            outcome = outcome.and(damaged(stage, what, size, damage, when).await);
        }
    }
    outcome
}

async fn damaged(
    stage: &Stage<'_>,
    what: &str,
    size: usize,
    damage: fn(&mut Vec<u8>),
    when: When,
) -> Outcome {
    let broken = |error: &dyn std::fmt::Display| Outcome::broken(format!("{what}: {error}"));
    // Contents that nobody has read before, so that no cache has them.
    let mut bytes = format!("{what} {when:?} {:?}\n", Instant::now()).into_bytes();
    bytes.resize(size, b'.');
    let (digest, size) = match put(&stage.theatre.worker.store, &bytes) {
        Ok(put) => put,
        Err(error) => return broken(&error),
    };
    let Ok(mut draft) = stage.draft("", &[OsStr::new(&digest.to_hex())]) else {
        return Outcome::broken("no request");
    };
    draft.inputs.insert(name(DAMAGED), Node::File { digest, size, executable: false });
    let sound = bytes.clone();
    damage(&mut bytes);
    let state = stage.theatre.state();
    let replace = || replace(&state, &digest, &sound, &bytes);
    if when == When::Before
        && let Err(error) = replace()
    {
        return broken(&error);
    }
    let started = stage.start(draft).await;
    let ended = match started {
        Ok(mut build) => {
            if when == When::While {
                match build.said("holding").await {
                    Ok(()) => {}
                    Err(ended) => return broken(&ended.describe()),
                }
                if let Err(error) = replace() {
                    return broken(&error);
                }
            }
            build.finish().await
        }
        Err(fault) => return judge(what, when, &digest, &fault),
    };
    let _ = fs::remove_file(blob_file(&state, &digest));
    match &ended.end {
        End::Fault(fault) => judge(what, when, &digest, fault),
        _ => ended.verdict().and(match when {
            When::While => Outcome::Held,
            When::Before => Outcome::broken(format!("{what}, {when:?}: {}", ended.describe())),
        }),
    }
}

/// A build without result must be the store's fault, by name.
fn judge(what: &str, when: When, digest: &Digest, fault: &Fault) -> Outcome {
    let named = fault.to_string().contains(&digest.to_string());
    match fault {
        Fault::Worker(_) | Fault::UnfitInputs(_) if named => Outcome::Held,
        _ => Outcome::broken(format!("{what}, {when:?}: {fault}, which does not name the blob {digest}")),
    }
}

fn put(store: &Store, bytes: &[u8]) -> Result<(Digest, u64), StoreError> {
    let mut writer = store.blobs.create()?;
    writer.write_all(bytes).map_err(|error| StoreError::io("write", "a new blob", error))?;
    let Stored { digest, size, .. } = writer.finish()?;
    Ok((digest, size))
}

fn blob_file(state: &Path, digest: &Digest) -> PathBuf {
    let hex = digest.to_hex();
    state.join("store/blobs").join(hex.get(..2).unwrap_or_default()).join(hex)
}

/// Writes other bytes to where the blob `sound` lies, as a disk that fails would.
fn replace(state: &Path, digest: &Digest, sound: &[u8], bytes: &[u8]) -> std::io::Result<()> {
    let file = blob_file(state, digest);
    if file.exists() {
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600))?;
        return fs::write(&file, bytes);
    }
    for pack in fs::read_dir(state.join("store/packs"))? {
        let pack = pack?.path();
        if let Some(at) = memchr::memmem::find(&fs::read(&pack)?, sound) {
            let file = fs::OpenOptions::new().write(true).open(&pack)?;
            return file.write_all_at(bytes, u64::try_from(at).unwrap_or(u64::MAX));
        }
    }
    Err(std::io::ErrorKind::NotFound.into())
}

async fn bad_directories(stage: &Stage<'_>) -> Outcome {
    let mut findings = Findings::default();
    let store = &stage.theatre.worker.store;
    for (what, bytes) in bad_encodings() {
        findings.fails(&format!("read a directory with {what}"), Directory::decode(&bytes));
    }
    let missing = Node::Directory { digest: Digest::of(b"nowhere"), size: 0 };
    let lying = Node::Directory { digest: Directory::new().digest(), size: 7 };
    for (what, child) in [("a missing child", &missing), ("a child of another size", &lying)] {
        let mut parent = Directory::new();
        findings.works("make a directory", parent.insert(name("child"), child.clone()));
        let digest = parent.digest();
        findings.fails(
            &format!("store a directory with {what}"),
            store.directories.put(vec![Directory::new(), parent]),
        );
        let there = store.directories.get(&digest).map(|found| found.is_some());
        findings
            .check(matches!(there, Ok(false)), format_args!("a directory with {what} is stored: {there:?}"));
    }
    for (what, node) in [
        ("a missing directory", missing),
        ("a directory of another size", lying),
        ("a missing blob", Node::File { digest: Digest::of(b"nowhere either"), size: 14, executable: false }),
    ] {
        let Ok(mut draft) = stage.draft("", &[]) else { return Outcome::broken("no request") };
        draft.inputs.insert(name("bad"), node);
        let ended = stage.run(draft).await;
        let refused = matches!(&ended.end, End::Fault(Fault::UnfitInputs(_)));
        findings.check(refused, format_args!("a build with {what}: {}", ended.describe()));
    }
    findings.outcome()
}

/// One field of a message: its number, and bytes of a known length.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let length = u8::try_from(bytes.len()).unwrap_or(0);
    [&[number << 3 | 2, length][..], bytes].concat()
}

/// An entry: its name, and a digest unless it is a link.
fn entry(name: &[u8], second: &[u8]) -> Vec<u8> {
    [field(1, name), field(2, second)].concat()
}

/// Encodings that are no directory's. Fields: 1 directories, 2 files, 3 links.
fn bad_encodings() -> Vec<(&'static str, Vec<u8>)> {
    let digest = [7; 32];
    let dir = |name: &[u8]| field(1, &entry(name, &digest));
    let file = |name: &[u8]| field(2, &entry(name, &digest));
    let link = |name: &[u8], target: &[u8]| field(3, &entry(name, target));
    vec![
        ("an order that descends", [dir(b"b"), dir(b"a")].concat()),
        ("a name that stands twice", [file(b"a"), file(b"a")].concat()),
        ("a name of two kinds", [dir(b"a"), file(b"a")].concat()),
        ("an empty name", file(b"")),
        ("the name .", file(b".")),
        ("the name ..", dir(b"..")),
        ("a slash in a name", link(b"a/b", b"c")),
        ("a NUL in a name", file(b"a\0")),
        ("a digest too short", field(2, &entry(b"a", &digest[..31]))),
        ("a digest too long", field(2, &entry(b"a", &[7; 33]))),
        ("no digest", field(1, &field(1, b"a"))),
        ("an empty target", link(b"a", b"")),
        ("a NUL in a target", link(b"a", b"b\0c")),
        ("kinds in another order", [file(b"b"), dir(b"a")].concat()),
        ("a field that is not known", field(9, b"x")),
        ("an end in the middle", file(b"a").split_last().map(|(_, rest)| rest.to_vec()).unwrap_or_default()),
    ]
}

async fn hostile_encodings(_: &Stage<'_>) -> Outcome {
    let mut findings = Findings::default();
    // Numbers that look random, and are the same at each run.
    let mut numbers = blake3::Hasher::new();
    numbers.update(b"hostile encodings");
    let mut numbers = numbers.finalize_xof();
    let mut tree = Directory::new();
    for at in ["a", "b", "c"] {
        findings.works(
            "insert",
            tree.insert(name(at), Node::File { digest: Digest::of(b""), size: 3, executable: true }),
        );
    }
    let good = tree.encode();
    let mut accepted = 0_u32;
    for round in 0..5_000_u32 {
        let mut random = [0; 64];
        numbers.fill(&mut random);
        let mut bytes = match round % 2 {
            0 => good.clone(),
            _ => random.to_vec(),
        };
        for pair in random.chunks_exact(4).take(1 + round as usize % 4) {
            let at = usize::from(*pair.first().unwrap_or(&0)) % bytes.len().max(1);
            if let (Some(place), Some(value)) = (bytes.get_mut(at), pair.get(1)) {
                *place = *value;
            }
        }
        bytes.truncate(bytes.len().saturating_sub(usize::from(random[63] % 8)));
        // A panic ends the probe. What is taken must be what would be written.
        if let Ok(read) = Directory::decode(&bytes) {
            accepted += 1;
            if read.encode() != bytes {
                findings.check(false, "a directory was read that would be written in another way");
            }
        }
    }
    findings.check(accepted > 0, "none of the changed directories was one: nothing was tested");
    // Messages of 200 levels.
    let mut deep = b"x".to_vec();
    for _ in 0..200 {
        deep = [&[1 << 3 | 2, 0x80 | (deep.len() & 0x7f) as u8, (deep.len() >> 7) as u8][..], &deep].concat();
    }
    findings.fails("read what lies 200 deep", Directory::decode(&deep));
    findings.outcome()
}

async fn killed_while_storing(stage: &Stage<'_>) -> Outcome {
    match kill_in_upload(stage).await {
        Ok(findings) => findings.outcome(),
        Err(outcome) => outcome,
    }
}

async fn kill_in_upload(stage: &Stage<'_>) -> Result<Findings, Outcome> {
    let mut findings = Findings::default();
    let place = Place::new(stage)?;
    let mut daemon = place.daemon(stage, &["--no-builds"]).await?;
    let temporary = place.state().join("store/tmp");
    let store = place.store().await?;
    let whole = off_executor({
        let store = store.clone();
        move || put(&store, b"whole").map_err(|error| error.to_string())
    });
    let whole = whole.await.map_err(Outcome::broken)?;
    let writer = off_executor(move || {
        let mut writer = store.blobs.create().map_err(|error| error.to_string())?;
        writer.write_all(&vec![b'h'; 4 << 20]).map_err(|error| error.to_string())?;
        Ok(writer)
    });
    let writer = writer.await.map_err(Outcome::broken)?;
    let begun = eventually(END, || !super::tools::names(&temporary).unwrap_or_default().is_empty()).await;
    findings.check(begun, "nothing was being stored when the daemon was killed");
    daemon.signal(Signal::SIGKILL);
    daemon.end(END).await;
    let _ = off_executor(move || {
        drop(writer);
        Ok(())
    })
    .await;
    whole_blobs_only(&place.state(), &mut findings);
    findings.works("plant what another end may leave", fs::write(temporary.join("planted"), "half"));
    let _ = fs::remove_file(place.socket());
    let mut daemon = place.daemon(stage, &["--no-builds"]).await?;
    let left = super::tools::names(&temporary).unwrap_or_default();
    findings.check(left.is_empty(), format_args!("the next start leaves {left:?}"));
    let store = place.store().await?;
    let there = off_executor(move || store.blobs.stat(&whole.0).map_err(|error| error.to_string())).await;
    findings.check(matches!(there, Ok(Some(_))), format_args!("what was stored before: {there:?}"));
    daemon.signal(Signal::SIGTERM);
    findings.check(daemon.end(END).await.is_some(), "the daemon does not end");
    Ok(findings)
}

/// Runs what blocks, and what needs an executor of its own to be outside of.
async fn off_executor<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    tokio::task::spawn_blocking(work).await.map_err(|error| error.to_string())?
}

/// Checks that every file among the blobs is what its name says.
fn whole_blobs_only(state: &Path, findings: &mut Findings) {
    let parents = fs::read_dir(state.join("store/blobs")).into_iter().flatten().flatten();
    for file in parents.flat_map(|parent| fs::read_dir(parent.path()).into_iter().flatten().flatten()) {
        let (name, bytes) = (file.file_name(), fs::read(file.path()).unwrap_or_default());
        let right = name.to_string_lossy() == Digest::of(&bytes).to_hex();
        findings.check(right, format_args!("the blob {} holds {} other bytes", name.display(), bytes.len()));
    }
}

async fn children_before_parents(stage: &Stage<'_>) -> Outcome {
    match kill_between(stage).await {
        Ok(findings) => findings.outcome(),
        Err(outcome) => outcome,
    }
}

async fn kill_between(stage: &Stage<'_>) -> Result<Findings, Outcome> {
    let mut findings = Findings::default();
    let place = Place::new(stage)?;
    let mut daemon = place.daemon(stage, &["--no-builds"]).await?;
    let (leaf, root, unstored) =
        (tree(b"leaf", None), tree(b"root", Some(&tree(b"leaf", None))), tree(b"none", None));
    let dangling = tree(b"dangling", Some(&unstored));
    let store = place.store().await?;
    let stored = off_executor({
        let (leaf, root, dangling) = (leaf.clone(), root.clone(), dangling.clone());
        move || {
            put(&store, b"leaf").map_err(|error| error.to_string())?;
            let refused = store.directories.put(vec![dangling]).is_err();
            store.directories.put(vec![leaf, root]).map_err(|error| error.to_string())?;
            Ok(refused)
        }
    });
    findings.same("a directory without its child was refused", stored.await, Ok(true));
    daemon.signal(Signal::SIGKILL);
    daemon.end(END).await;
    whole_blobs_only(&place.state(), &mut findings);
    let _ = fs::remove_file(place.socket());
    let mut daemon = place.daemon(stage, &["--no-builds"]).await?;
    let store = place.store().await?;
    let found = off_executor(move || {
        [root, leaf, dangling]
            .iter()
            .map(|directory| {
                let found = store.directories.get(&directory.digest()).map_err(|error| error.to_string())?;
                Ok(found.is_some())
            })
            .collect::<Result<Vec<bool>, String>>()
    });
    findings.same("root, child and dangling root after a crash", found.await, Ok(vec![true, true, false]));
    daemon.signal(Signal::SIGTERM);
    findings.check(daemon.end(END).await.is_some(), "the daemon does not end");
    Ok(findings)
}

/// A directory with one entry: a file of these contents, or a directory.
fn tree(contents: &'static [u8], child: Option<&Directory>) -> Directory {
    let node = match child {
        Some(child) => child.node(),
        None => Node::File { digest: Digest::of(contents), size: contents.len() as u64, executable: false },
    };
    let mut directory = Directory::new();
    if let Ok(name) = Name::new(contents) {
        // The only one, so that it can't be there already.
        let _ = directory.insert(name, node);
    }
    directory
}
