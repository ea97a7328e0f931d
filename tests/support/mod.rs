//! What the black-box tests share: cases with directories of their own, the three ways to be a user, a
//! daemon that ends with its test, and the counting of what is left behind.
//!
//! A test that needs what this machine lacks is reported as ignored, with the reason. What is named in
//! `COFFERDAM_EXPECT` (comma-separated [`Facility`] names) must be there: lacking it is then a failure.
#![allow(dead_code, reason = "every test binary uses a part of this")]

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::OnceLock;

use libtest_mimic::{Arguments, Completion, Failed, Trial};

pub mod case;
pub mod daemon;
pub mod leftovers;
pub mod world;

pub use case::{Case, Mode};

/// What a test may need of the machine.
#[derive(Clone, Copy, Debug)]
pub enum Facility {
    /// Being run as root.
    Root,
    /// An unprivileged user with a range of sub-ids.
    Range,
    /// An unprivileged user without any.
    Single,
    /// `/dev/fuse`, open to whoever runs the test.
    Fuse,
    /// A Debian tree with a compiler (`scripts/rootfs`).
    Debootstrap,
    /// Python with grpcio in a virtual environment.
    Python,
    /// System calls of 32-bit programs.
    Calls32,
    /// A cgroup2 file system that can be added to.
    Cgroup2,
    /// The C sources of `scripts/sources`.
    Sources,
    /// The containers of `scripts/container`.
    Container,
    /// Loop devices.
    Loop,
    /// pasta, `/dev/net/tun` open to everyone, and root to make networks for it.
    Pasta,
}

impl Facility {
    fn name(self) -> &'static str {
        match self {
            Facility::Root => "root",
            Facility::Range => "range",
            Facility::Single => "single",
            Facility::Fuse => "fuse",
            Facility::Debootstrap => "debootstrap",
            Facility::Python => "python",
            Facility::Calls32 => "calls32",
            Facility::Cgroup2 => "cgroup2",
            Facility::Sources => "sources",
            Facility::Container => "container",
            Facility::Loop => "loop",
            Facility::Pasta => "pasta",
        }
    }

    fn is_expected(self) -> bool {
        let expected = std::env::var("COFFERDAM_EXPECT").unwrap_or_default();
        expected.split(',').any(|name| name.trim() == self.name())
    }
}

/// Why a test can't be run here.
pub struct Lacking {
    facility: Facility,
    reason: String,
}

impl Lacking {
    pub fn new(facility: Facility, reason: impl Into<String>) -> Lacking {
        Lacking { facility, reason: reason.into() }
    }

    /// Ignored, or failed where the facility was to be expected.
    fn verdict(self) -> Result<Completion, Failed> {
        let text = format!("lacks {}: {}", self.facility.name(), self.reason);
        match self.facility.is_expected() {
            true => Err(Failed::from(format!("{text} (COFFERDAM_EXPECT names it)"))),
            false => Ok(Completion::ignored_with(text)),
        }
    }
}

/// Pairs each function with its name.
#[macro_export]
macro_rules! named {
    ($($test:ident),* $(,)?) => { [$((stringify!($test), $test as _)),*] };
}

/// One trial a mode, each with a case of its own. The test panics where it fails.
pub fn in_every_mode(tests: impl IntoIterator<Item = (&'static str, fn(&Case))>) -> Vec<Trial> {
    tests.into_iter().flat_map(|(name, test)| Mode::ALL.map(|mode| in_mode(name, mode, test))).collect()
}

/// The same for tests that do without FUSE.
pub fn in_every_mode_without_fuse(tests: impl IntoIterator<Item = (&'static str, fn(&Case))>) -> Vec<Trial> {
    let trial = |name, mode, test: fn(&Case)| {
        without_fuse(name, mode, move |case| {
            test(case);
            Ok(())
        })
    };
    tests.into_iter().flat_map(|(name, test)| Mode::ALL.map(|mode| trial(name, mode, test))).collect()
}

/// One trial in the first mode that this caller can be in: for what doesn't depend on the mode.
pub fn in_own_mode(tests: impl IntoIterator<Item = (&'static str, fn(&Case))>) -> Vec<Trial> {
    tests.into_iter().map(|(name, test)| in_mode(name, Mode::own(), test)).collect()
}

/// One trial in one mode.
pub fn in_mode(name: &str, mode: Mode, test: impl FnOnce(&Case) + Send + 'static) -> Trial {
    fallible(format!("{name}::{mode}"), mode, move |case| {
        test(case);
        Ok(())
    })
}

/// One trial in one mode that may find out later that something is lacking.
pub fn fallible(
    name: String,
    mode: Mode,
    test: impl FnOnce(&Case) -> Result<(), Lacking> + Send + 'static,
) -> Trial {
    trial(name, mode, move |case| mode.has_fuse().and_then(|()| test(case)))
}

/// The same for a test that does without FUSE.
pub fn without_fuse(
    name: &str,
    mode: Mode,
    test: impl FnOnce(&Case) -> Result<(), Lacking> + Send + 'static,
) -> Trial {
    trial(format!("{name}::{mode}"), mode, test)
}

fn trial(
    name: String,
    mode: Mode,
    test: impl FnOnce(&Case) -> Result<(), Lacking> + Send + 'static,
) -> Trial {
    Trial::ignorable_test(name, move || {
        let outcome = mode.available().and_then(|()| test(&Case::new(mode)));
        outcome.map_or_else(Lacking::verdict, |()| Ok(Completion::Completed))
    })
}

/// Runs the trials as the command line asks, and tidies up.
pub fn run(trials: Vec<Trial>) -> ExitCode {
    let conclusion = libtest_mimic::run(&Arguments::from_args(), trials);
    tidy_up();
    conclusion.exit_code()
}

/// Removes the copy of the binary.
pub fn tidy_up() {
    if let Some(copy) = BINARY.get() {
        // One that can't be removed is no reason to change a verdict.
        let _ = std::fs::remove_dir_all(copy.parent().expect("the copy lies in a directory"));
    }
}

static BINARY: OnceLock<PathBuf> = OnceLock::new();

/// A copy of the binary that every user can reach: the build directory may lie in a home.
pub fn binary() -> &'static Path {
    BINARY.get_or_init(|| {
        let dir = tempfile::Builder::new().prefix("cofferdam-test-bin-").tempdir().unwrap().keep();
        case::set_mode(&dir, 0o755);
        let copy = dir.join("cofferdam");
        std::fs::copy(env!("CARGO_BIN_EXE_cofferdam"), &copy).unwrap();
        case::set_mode(&copy, 0o755);
        copy
    })
}

/// The repository.
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Cargo's target directory: what is fetched once and kept lies there.
pub fn target_dir() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("target/tmp has a parent")
}

/// Runs one of `scripts/` and yields the last line that it prints.
pub fn script(name: &str) -> Result<String, String> {
    let run = std::process::Command::new(repository().join("scripts").join(name))
        .env("CARGO_TARGET_DIR", target_dir())
        .output()
        .map_err(|error| format!("scripts/{name}: {error}"))?;
    let last =
        |bytes: &[u8]| String::from_utf8_lossy(bytes).lines().last().unwrap_or("it says nothing").to_owned();
    match run.status.success() {
        true => Ok(last(&run.stdout)),
        false => Err(last(&run.stderr)),
    }
}

/// Puts a blob that takes minutes to read into the store of a state directory. Its name is not that of its contents,
/// which is found out only at their end. Yields digest and size.
pub fn endless_blob(case: &Case, state: &str) -> ([u8; 32], u64) {
    const SIZE: u64 = 64 << 30;
    let seed = case.write("seed", "");
    let mut add = case.cofferdam(["store", "add", "--state-dir", state]);
    add.arg(seed);
    case::finish(add).code(0);
    let digest = *blake3::hash(b"endless").as_bytes();
    let hex = blake3::Hash::from(digest).to_hex();
    let place = case.write(&format!("{state}/store/blobs/{}/{hex}", &hex[..2]), "");
    std::fs::OpenOptions::new().write(true).open(place).unwrap().set_len(SIZE).unwrap();
    (digest, SIZE)
}

/// The parts of the host that `--host-tools` shows, as far as this host has them.
pub fn host_tools() -> Vec<&'static str> {
    ["/bin", "/etc/alternatives", "/lib", "/lib32", "/lib64", "/usr"]
        .into_iter()
        .filter(|path| Path::new(path).exists())
        .collect()
}
