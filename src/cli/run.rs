//! `cofferdam run`: one command in a sandbox, without a daemon.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::num::NonZeroUsize;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use clap::Args;

use super::render::{End, Format};
use super::{Failed, build, cannot, path_parser, runtime, store};
use crate::build::events::Output;
use crate::build::request::{Constraints, Draft, Network, Request, SandboxPath, Shell};
use crate::castore::{Directory, Name, Node, Store};
use crate::config::{Lifetime, NetworkPolicy, Settings};
use crate::worker::{Groundwork, Worker};

const INPUTS: &str = "inputs";
const OUTPUTS: &str = "outputs";
const BUILD: &str = "build";

/// What the root file system given by `--rootfs` does not bring: the sandbox has its own.
const NOT_FROM_ROOTFS: [&str; 7] = ["dev", "proc", "sys", "tmp", INPUTS, OUTPUTS, BUILD];

/// Where programs are looked for unless `--env PATH=...` says otherwise.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Arguments of `cofferdam run`.
///
/// In the sandbox, inputs appear at /inputs/NAME, outputs are made at /outputs/NAME, and the command starts in /build.
#[derive(Debug, Args)]
#[command(
    after_help = "The command sees these variables and no others: PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:\
                        /usr/bin:/sbin:/bin, HOME=/build, TMPDIR=/tmp, and what --env adds or replaces."
)]
pub struct RunArgs {
    /// Make DIR the root of the sandbox, as a copy that can't be written to; its /dev, /proc, /sys, /tmp, /build,
    /// /inputs and /outputs are left out
    #[arg(long, value_name = "DIR")]
    rootfs: Option<PathBuf>,
    /// Show the file or directory PATH as /inputs/NAME; may be repeated
    #[arg(long, value_name = "NAME=PATH")]
    input: Vec<OsString>,
    /// Show PATH of this host, read-only, in its own place; may be repeated
    #[arg(long, value_name = "PATH", value_parser = path_parser())]
    host_path: Vec<PathBuf>,
    /// Show this host's /usr, /bin, /lib*, /sbin and /etc/alternatives, read-only
    #[arg(long)]
    host_tools: bool,
    /// Expect /outputs/NAME to be made, and write it to the out directory; may be repeated
    #[arg(long, value_name = "NAME")]
    output: Vec<OsString>,
    /// Write outputs to DIR as NAME. What is there of this name is replaced, but not a directory
    #[arg(long, value_name = "DIR", default_value = ".")]
    out_dir: PathBuf,
    /// Set a variable of the command's environment; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    env: Vec<OsString>,
    /// Let the command use this host's network, with all that it reaches
    #[arg(long)]
    network: bool,
    /// Search the outputs for S and tell which of them contain it; may be repeated
    #[arg(long, value_name = "S")]
    needle: Vec<OsString>,
    /// Print each event as a line of JSON instead of what the command writes
    #[arg(long)]
    json: bool,
    /// Keep the store in DIR, so that inputs seen before cost less [default: a temporary directory in $TMPDIR or
    /// /var/tmp]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// Runs the command. Yields the exit code.
///
/// # Errors
/// Where it is cofferdam that fails, or an argument makes no sense.
pub fn run(args: RunArgs) -> Result<u8, Failed> {
    super::start_logging("warn");
    let wanted = Wanted::from_args(args)?;
    let (state_dir, lifetime) = match &wanted.state_dir {
        Some(dir) => (dir.clone(), Lifetime::Lasting),
        None => (temporary_dir()?, Lifetime::Ephemeral),
    };
    let mut settings = Settings::new(state_dir, lifetime);
    settings.max_builds = NonZeroUsize::MIN;
    settings.allowed_host_paths = wanted.draft.constraints.ro_paths.clone();
    settings.network = NetworkPolicy::Host;
    let ground = Groundwork::lay(settings)?;
    let runtime = runtime()?;
    let worker = ground.build()?;

    let (names, out_dir, format) = (wanted.outputs.clone(), wanted.out_dir.clone(), wanted.format);
    let request = wanted.request(&worker.store)?;
    let needles = request.needles.clone();
    match runtime.block_on(build::in_process(&worker, request, format))? {
        End::Failed(code) => Ok(code),
        End::Completed(outputs) => {
            deliver(&worker, &names, &outputs, &out_dir)?;
            if let Format::Plain = format {
                tell_needles(&names, &outputs, &needles);
            }
            Ok(0)
        }
    }
}

/// A directory of this run's own. Its name says whose it is, should a power cut leave it.
fn temporary_dir() -> Result<PathBuf, Failed> {
    let parent =
        std::env::var_os("TMPDIR").filter(|dir| !dir.is_empty()).map_or("/var/tmp".into(), PathBuf::from);
    let template = parent.join("cofferdam-run-XXXXXX");
    nix::unistd::mkdtemp(&template).map_err(|error| cannot("make a directory in", &parent, error))
}

/// What the arguments mean, checked as far as that goes without touching anything.
struct Wanted {
    rootfs: Option<PathBuf>,
    inputs: BTreeMap<Name, PathBuf>,
    outputs: Vec<Name>,
    out_dir: PathBuf,
    state_dir: Option<PathBuf>,
    format: Format,
    /// The request but for its inputs.
    draft: Draft,
}

impl Wanted {
    fn from_args(args: RunArgs) -> Result<Self, Failed> {
        let mut inputs = BTreeMap::new();
        for argument in &args.input {
            let (name, path) = key_value("--input", argument)?;
            let path = PathBuf::from(OsStr::from_bytes(path));
            // Later errors would come after minutes of copying.
            path.metadata().map_err(|error| cannot("use input", &path, error))?;
            let name = name_of("--input", name)?;
            if inputs.insert(name.clone(), path).is_some() {
                return Err(Failed(format!("--input: the name {name} is given twice")));
            }
        }
        let mut ro_paths: BTreeSet<PathBuf> = args.host_path.into_iter().collect();
        if args.host_tools {
            ro_paths.extend(host_tools());
        }
        for path in &ro_paths {
            path.metadata().map_err(|error| cannot("use host path", path, error))?;
        }
        if args.needle.iter().any(|needle| needle.is_empty()) {
            return Err(Failed("--needle: an empty string is everywhere".into()));
        }
        let outputs = args.output.iter().map(|name| name_of("--output", name.as_bytes()));
        let outputs = outputs.collect::<Result<Vec<_>, _>>()?;
        check_destination(&args.out_dir, &outputs)?;
        if let Some(rootfs) = &args.rootfs {
            std::fs::read_dir(rootfs).map_err(|error| cannot("use root file system", rootfs, error))?;
        }
        Ok(Self {
            draft: Draft {
                command: args.command.into_iter().map(OsString::into_vec).collect(),
                working_dir: SandboxPath::new(BUILD)?,
                scratch_paths: [SandboxPath::new(BUILD)?, SandboxPath::new(OUTPUTS)?].into(),
                outputs: outputs
                    .iter()
                    .map(|name| SandboxPath::new(OUTPUTS)?.join(name))
                    .collect::<Result<_, _>>()?,
                environment: environment(&args.env)?,
                constraints: Constraints {
                    ro_paths: ro_paths.into_iter().collect(),
                    network: if args.network { Network::Required } else { Network::None },
                    shell: Shell::None,
                    ..Constraints::default()
                },
                needles: args.needle.into_iter().map(OsString::into_vec).collect(),
                ..Draft::default()
            },
            rootfs: args.rootfs,
            inputs,
            outputs,
            out_dir: args.out_dir,
            state_dir: args.state_dir,
            format: if args.json { Format::Json } else { Format::Plain },
        })
    }

    /// Takes the inputs into the store and completes the request with them.
    fn request(self, store: &Store) -> Result<Request, Failed> {
        let mut inputs = BTreeMap::new();
        for (name, path) in self.inputs {
            inputs.insert(name, store::add(store, &path, &[])?);
        }
        let mut draft = self.draft;
        match self.rootfs {
            None => {
                draft.inputs_dir = SandboxPath::new(INPUTS)?;
                draft.inputs = inputs;
            }
            Some(rootfs) => draft.inputs = root_inputs(store, &rootfs, inputs)?,
        }
        Ok(Request::new(draft)?)
    }
}

/// The entries of a root file system, and the inputs in a directory beside them.
fn root_inputs(
    store: &Store,
    rootfs: &Path,
    inputs: BTreeMap<Name, Node>,
) -> Result<BTreeMap<Name, Node>, Failed> {
    let Node::Directory { digest, .. } = store::add(store, rootfs, &NOT_FROM_ROOTFS.map(str::as_bytes))?
    else {
        return Err(cannot("use root file system", rootfs, "it is not a directory"));
    };
    let root = store.directories.get(&digest)?;
    let root = root.ok_or_else(|| cannot("use root file system", rootfs, "the store has lost it"))?;
    let mut all: BTreeMap<Name, Node> =
        root.entries().map(|(name, node)| (name.clone(), node.clone())).collect();
    if !inputs.is_empty() {
        let mut directory = Directory::new();
        for (name, node) in inputs {
            directory.insert(name, node)?;
        }
        all.insert(Name::new(INPUTS)?, directory.node());
        store.directories.put(vec![directory])?;
    }
    Ok(all)
}

/// `KEY=VALUE` in two.
fn key_value<'a>(option: &str, argument: &'a OsStr) -> Result<(&'a [u8], &'a [u8]), Failed> {
    let bytes = argument.as_bytes();
    let at = bytes.iter().position(|byte| *byte == b'=');
    at.and_then(|at| Some((bytes.get(..at)?, bytes.get(at + 1..)?)))
        .ok_or_else(|| Failed(format!("{option}: \"{}\" has no \"=\"", bytes.escape_ascii())))
}

fn name_of(option: &str, bytes: &[u8]) -> Result<Name, Failed> {
    Name::new(bytes).map_err(|error| Failed(format!("{option}: {error}")))
}

fn environment(set: &[OsString]) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, Failed> {
    let mut all: BTreeMap<Vec<u8>, Vec<u8>> = [("PATH", PATH), ("HOME", "/build"), ("TMPDIR", "/tmp")]
        .map(|(key, value)| (key.into(), value.into()))
        .into();
    for argument in set {
        let (key, value) = key_value("--env", argument)?;
        if key.is_empty() {
            return Err(Failed(format!(
                "--env: \"{}\" has no name before \"=\"",
                argument.as_bytes().escape_ascii()
            )));
        }
        all.insert(key.into(), value.into());
    }
    Ok(all)
}

/// Where this host has its programs and libraries.
fn host_tools() -> Vec<PathBuf> {
    let libraries = std::fs::read_dir("/").into_iter().flatten().flatten().map(|entry| entry.path());
    let libraries =
        libraries.filter(|path| path.file_name().is_some_and(|n| n.as_bytes().starts_with(b"lib")));
    ["/usr", "/bin", "/sbin", "/etc/alternatives"]
        .into_iter()
        .map(PathBuf::from)
        .chain(libraries)
        .filter(|path| path.is_dir())
        .collect()
}

/// Whether outputs can be written where they are wanted, before anything runs.
fn check_destination(out_dir: &Path, outputs: &[Name]) -> Result<(), Failed> {
    if outputs.is_empty() {
        return Ok(());
    }
    let dir = out_dir.metadata().map_err(|error| cannot("write outputs to", out_dir, error))?;
    if !dir.is_dir() {
        return Err(cannot("write outputs to", out_dir, "it is not a directory"));
    }
    for name in outputs {
        let path = out_dir.join(name.as_os_str());
        if path.symlink_metadata().is_ok_and(|found| found.is_dir()) {
            return Err(cannot(
                "replace",
                &path,
                "it is a directory; remove it first, or choose another --out-dir",
            ));
        }
    }
    Ok(())
}

/// Writes the outputs to the out directory. Each is complete before it takes its name.
fn deliver(worker: &Worker, names: &[Name], outputs: &[Output], out_dir: &Path) -> Result<(), Failed> {
    for (name, output) in names.iter().zip(outputs) {
        let path = out_dir.join(name.as_os_str());
        let mut hidden = OsString::from(".cofferdam-");
        hidden.push(format!("{}-", std::process::id()));
        // Names have an end; the longest ones keep a part.
        hidden.push(OsStr::from_bytes(name.as_bytes().get(..200).unwrap_or(name.as_bytes())));
        let hidden = out_dir.join(hidden);
        store::put(&worker.store, &output.node, &hidden)?;
        std::fs::rename(&hidden, &path).map_err(|error| {
            // What could not take its place must not stay under another name.
            let _ = if hidden.is_dir() {
                std::fs::remove_dir_all(&hidden)
            } else {
                std::fs::remove_file(&hidden)
            };
            cannot("write", &path, error)
        })?;
    }
    Ok(())
}

fn tell_needles(names: &[Name], outputs: &[Output], needles: &[Vec<u8>]) {
    for (name, output) in names.iter().zip(outputs) {
        for needle in output.needles.iter().filter_map(|index| needles.get(usize::try_from(*index).ok()?)) {
            eprintln!("cofferdam: {name} contains {}", needle.escape_ascii());
        }
    }
}
