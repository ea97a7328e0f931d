//! `cofferdam run`: one command in a sandbox, without a daemon.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::num::NonZeroUsize;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;
use nix::unistd::{AccessFlags, eaccess};

use super::isolation::IsolationArgs;
use super::limits::LimitArgs;
use super::network::{self, NetworkChoice};
use super::render::{End, Format};
use super::store_choice::StoreChoiceArgs;
use super::{Failed, Signals, build, cannot, path_parser, remark, runtime, store};
use crate::build::events::Output;
use crate::build::request::{Constraints, Draft, InvalidRequest, Network, Request, SandboxPath, Shell};
use crate::castore::{Directory, Name, Node, Store};
use crate::config::{Floor, Lifetime, LimitSettings, NetworkPolicy, Settings};
use crate::worker::Groundwork;

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
    /// Give the command a network [default without NETWORK: pasta]
    #[arg(long, value_name = "NETWORK", num_args = 0..=1, require_equals = true, default_missing_value = "pasta")]
    network: Option<NetworkChoice>,
    /// Search the outputs for S and tell which of them contain it; may be repeated
    #[arg(long, value_name = "S")]
    needle: Vec<OsString>,
    /// Print each event as a line of JSON instead of what the command writes
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    isolation: IsolationArgs,
    /// Keep the store in DIR, so that inputs seen before cost less [default: a temporary directory in $TMPDIR or
    /// /var/tmp]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    #[command(flatten)]
    store: StoreChoiceArgs,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
    // Last, or what follows would come under its heading.
    #[command(flatten)]
    limits: LimitArgs,
}

/// Runs the command. Yields the exit code.
///
/// # Errors
/// Where it is cofferdam that fails, or an argument makes no sense.
pub fn run(args: RunArgs) -> Result<u8, Failed> {
    super::start_logging("warn")?;
    let store = args.store.clone();
    let (isolation, wanted) = Wanted::from_args(args)?;
    let (state_dir, lifetime) = match &wanted.state_dir {
        Some(dir) => (dir.clone(), Lifetime::Lasting),
        None => (temporary_dir()?, Lifetime::Ephemeral),
    };
    let mut settings = Settings::new(state_dir, lifetime);
    settings.max_builds = NonZeroUsize::MIN;
    settings.allowed_host_paths = wanted.draft.constraints.ro_paths.clone();
    settings.network = wanted.network.clone();
    isolation.apply(&mut settings);
    store.apply(&mut settings)?;
    settings.limits = wanted.limits.clone();
    let ground = Groundwork::lay(settings)?;
    let runtime = runtime()?;
    let worker = ground.build(runtime.handle())?;

    let (names, out_dir, format) = (wanted.outputs.clone(), wanted.out_dir.clone(), wanted.format);
    let request = wanted.request(&worker.store)?;
    let needles = request.needles.clone();
    runtime.block_on(async {
        let mut signals = Signals::listen()?;
        let outputs = match build::in_process(&worker, request, format, &mut signals).await? {
            End::Failed(code) => return Ok(code),
            End::Completed(outputs) => outputs,
        };
        let delivery = Delivery {
            store: worker.store.clone(),
            nodes: names.iter().cloned().zip(outputs.iter().map(|output| output.node.clone())).collect(),
            out_dir,
        };
        if let Some(code) = delivery.unless(&mut signals).await? {
            return Ok(code);
        }
        if let Format::Plain = format {
            tell_needles(&names, &outputs, &needles);
        }
        Ok(0)
    })
}

/// A directory of this run's own. Its name says whose it is, should a power cut leave it.
fn temporary_dir() -> Result<PathBuf, Failed> {
    let parent =
        std::env::var_os("TMPDIR").filter(|dir| !dir.is_empty()).map_or("/var/tmp".into(), PathBuf::from);
    let template = parent.join("cofferdam-run-XXXXXX");
    nix::unistd::mkdtemp(&template).map_err(|error| cannot("make a directory in", &parent, error))
}

/// What the arguments mean, checked as far as that goes without reading the inputs.
struct Wanted {
    rootfs: Option<PathBuf>,
    inputs: BTreeMap<Name, PathBuf>,
    outputs: Vec<Name>,
    out_dir: PathBuf,
    state_dir: Option<PathBuf>,
    format: Format,
    network: NetworkPolicy,
    limits: LimitSettings,
    /// The request but for its inputs.
    draft: Draft,
}

impl Wanted {
    fn from_args(args: RunArgs) -> Result<(IsolationArgs, Self), Failed> {
        let inputs = inputs(&args.input)?;
        let network = network::policy(args.network, "--network")?;
        if let Some(rootfs) = &args.rootfs {
            std::fs::read_dir(rootfs).map_err(|error| cannot("use root file system", rootfs, error))?;
        }
        let outputs = args.output.iter().map(|name| name_of("--output", name.as_bytes()));
        let outputs = outputs.collect::<Result<Vec<_>, _>>()?;
        let draft = Draft {
            command: args.command.into_iter().map(OsString::into_vec).collect(),
            working_dir: SandboxPath::new(BUILD)?,
            scratch_paths: [SandboxPath::new(BUILD)?, SandboxPath::new(OUTPUTS)?].into(),
            inputs_dir: match &args.rootfs {
                None => SandboxPath::new(INPUTS)?,
                Some(_) => SandboxPath::root(),
            },
            outputs: outputs
                .iter()
                .map(|name| SandboxPath::new(OUTPUTS)?.join(name))
                .collect::<Result<_, _>>()?,
            environment: environment(&args.env)?,
            constraints: Constraints {
                ro_paths: host_paths(args.host_path, args.host_tools)?,
                network: if args.network.is_some() { Network::Required } else { Network::None },
                shell: Shell::None,
                ..Constraints::default()
            },
            needles: args.needle.into_iter().map(OsString::into_vec).collect(),
            ..Draft::default()
        };
        // The inputs may take minutes to copy: whatever is wrong without them is told before.
        let draft = Request::new(draft).map_err(in_options)?.into_draft();
        check_destination(&args.out_dir, &outputs)?;
        let wanted = Self {
            draft,
            rootfs: args.rootfs,
            inputs,
            outputs,
            out_dir: args.out_dir,
            state_dir: args.state_dir,
            limits: args.limits.settings(Floor::None),
            format: if args.json { Format::Json } else { Format::Plain },
            network,
        };
        Ok((args.isolation, wanted))
    }

    /// Takes the inputs into the store and completes the request with them.
    fn request(self, store: &Store) -> Result<Request, Failed> {
        let mut inputs = BTreeMap::new();
        for (name, path) in self.inputs {
            inputs.insert(name, store::add(store, &path, &[])?);
        }
        let mut draft = self.draft;
        draft.inputs = match self.rootfs {
            None => inputs,
            Some(rootfs) => root_inputs(store, &rootfs, inputs)?,
        };
        Request::new(draft).map_err(in_options)
    }
}

/// What is wrong with a request, told of the option that it comes from.
fn in_options(error: InvalidRequest) -> Failed {
    let field = error.field.split('[').next().unwrap_or_default();
    let option = match field {
        "command_args" => "COMMAND",
        "inputs" => "--input",
        "outputs" => "--output",
        "environment_vars" => "--env",
        "constraints.available_ro_paths" => "--host-path",
        "refscan_needles" => "--needle",
        _ => &error.field,
    };
    Failed(format!("{option}: {}", error.fault))
}

/// The inputs by name, each of which is there.
fn inputs(arguments: &[OsString]) -> Result<BTreeMap<Name, PathBuf>, Failed> {
    let mut inputs = BTreeMap::new();
    for argument in arguments {
        let (name, path) = key_value("--input", argument)?;
        let path = PathBuf::from(OsStr::from_bytes(path));
        path.metadata().map_err(|error| cannot("use input", &path, error))?;
        let name = name_of("--input", name)?;
        if inputs.insert(name.clone(), path).is_some() {
            return Err(Failed(format!("--input: the name {name} is given twice")));
        }
    }
    Ok(inputs)
}

/// What of the host is shown, once each.
fn host_paths(given: Vec<PathBuf>, tools: bool) -> Result<Vec<PathBuf>, Failed> {
    let mut paths: BTreeSet<PathBuf> = given.into_iter().collect();
    if tools {
        paths.extend(host_tools());
    }
    for path in &paths {
        path.metadata().map_err(|error| cannot("use host path", path, error))?;
    }
    Ok(paths.into_iter().collect())
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
    eaccess(out_dir, AccessFlags::W_OK | AccessFlags::X_OK)
        .map_err(|errno| cannot("write outputs to", out_dir, std::io::Error::from(errno)))?;
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

/// Outputs on their way from the store to the out directory.
struct Delivery {
    store: Store,
    nodes: Vec<(Name, Node)>,
    out_dir: PathBuf,
}

impl Delivery {
    /// Writes the outputs, unless a signal comes: then what is half written is removed, and the exit code that stands
    /// for the signal is the result.
    async fn unless(self, signals: &mut Signals) -> Result<Option<u8>, Failed> {
        let cancel = Arc::new(AtomicBool::new(false));
        let cancelled = Arc::clone(&cancel);
        let mut writing = tokio::task::spawn_blocking(move || self.write(&cancelled));
        let lost = |error| Failed(format!("can't write the outputs: {error}"));
        tokio::select! {
            written = &mut writing => written.map_err(lost)?.map(|()| None),
            code = signals.next() => {
                cancel.store(true, Ordering::Relaxed);
                // It has removed what it could. If it was just done, or failed, the signal is still the first cause.
                let _ = writing.await;
                Ok(Some(code))
            }
        }
    }

    /// Each output is complete before it takes its name.
    fn write(&self, cancel: &AtomicBool) -> Result<(), Failed> {
        for (name, node) in &self.nodes {
            let path = self.out_dir.join(name.as_os_str());
            let mut hidden = OsString::from(".cofferdam-");
            hidden.push(format!("{}-", std::process::id()));
            // Names have an end; the longest ones keep a part.
            hidden.push(OsStr::from_bytes(name.as_bytes().get(..200).unwrap_or(name.as_bytes())));
            let hidden = self.out_dir.join(hidden);
            store::put(&self.store, node, &hidden, cancel)?;
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
}

fn tell_needles(names: &[Name], outputs: &[Output], needles: &[Vec<u8>]) {
    for (name, output) in names.iter().zip(outputs) {
        for needle in output.needles.iter().filter_map(|index| needles.get(usize::try_from(*index).ok()?)) {
            remark(format_args!("cofferdam: {name} contains {}", needle.escape_ascii()));
        }
    }
}
