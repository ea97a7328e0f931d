//! What a build will see and where it lies on disk: computed from the request, without a system call.
//!
//! ```text
//! BUILD DIR (one per build, mode 0700)     in the sandbox
//!   root/                                  the new root is put together on it
//!   tmp/                                   /tmp
//!   scratch/N/                             scratch path N; the upper layer where the inputs lie there too
//!   work/N/                                what overlay wants beside it
//!   inputs/                                upper layer over read-only inputs that have mount points in them
//! ```
//!
//! A scratch path within another is a directory of it, so that an output is whole wherever it begins; only where
//! the inputs lie between them does it get a mount of its own.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use cofferdam_sandbox::{
    Access, Command, Entry, IdMap, Layer, Mount, MountPoint, Network as SandboxNetwork, Plan,
};

use super::request::{Network, Request, SandboxPath, Shell};

/// The device nodes that every build sees.
const DEVICES: [&str; 6] = ["full", "null", "random", "tty", "urandom", "zero"];
/// Symbolic links in `/dev`.
const DEVICE_LINKS: [(&str, &str); 5] = [
    ("dev/fd", "/proc/self/fd"),
    ("dev/stdin", "/proc/self/fd/0"),
    ("dev/stdout", "/proc/self/fd/1"),
    ("dev/stderr", "/proc/self/fd/2"),
    ("dev/ptmx", "pts/ptmx"),
];
/// The largest share of memory that `/dev/shm` may take, as tmpfs writes it.
const SHM_SIZE: &str = "50%";

const PASSWD: &str = "root:x:0:0:Nix build user:/build:/noshell\n\
                      nixbld:x:1000:100:Nix build user:/build:/noshell\n\
                      nobody:x:65534:65534:Nobody:/:/noshell\n";
const GROUP: &str = "root:x:0:\nnixbld:!:100:\nnogroup:x:65534:\n";
const HOSTS: &str = "127.0.0.1 localhost\n::1 localhost\n";
const NSSWITCH: &str = "hosts: files dns\nservices: files\n";

/// What the worker adds to a request: where things lie, and what it lends of itself.
#[derive(Debug)]
pub struct Site {
    /// The build's own directory, absolute.
    pub build_dir: PathBuf,
    /// Where the view shows the inputs, absolute; `None` where there are none.
    pub inputs: Option<PathBuf>,
    /// The user namespace of the build.
    pub ids: IdMap,
    /// The program that appears as `/bin/sh` where one is asked for.
    pub shell: Option<PathBuf>,
    /// Files of the host's `/etc` that a build with network sees, by name.
    pub network_files: Vec<(String, Vec<u8>)>,
}

/// A build, laid out.
#[derive(Debug)]
pub struct Layout {
    /// What the sandbox is to be.
    pub plan: Plan,
    /// What must be in the build directory before it starts, parents before children.
    pub on_disk: Vec<OnDisk>,
    /// Where each output will be found in the build directory, in the order of the request.
    pub outputs: Vec<PathBuf>,
}

/// Something to be made in the build directory.
#[derive(Debug, PartialEq, Eq)]
pub enum OnDisk {
    /// A directory.
    Directory {
        /// Where.
        path: PathBuf,
        /// Permission bits.
        mode: u32,
        /// Whose it is.
        owner: Role,
    },
    /// A file of the build's own. Missing parents are made, the build's own too.
    File {
        /// Where.
        path: PathBuf,
        /// What it holds.
        contents: Vec<u8>,
    },
}

/// Who owns something on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The daemon.
    Daemon,
    /// The sandbox's root.
    Root,
    /// The sandbox's root, with the build's group: the build may add entries but not take others' away.
    RootForBuild,
    /// The build.
    Build,
}

/// Lays out a build.
pub fn lay_out(request: &Request, site: Site) -> Layout {
    let scratch = Scratches::of(request, site.inputs.is_some());
    let mut layout = Draft { on_disk: Vec::new(), entries: Vec::new(), mounts: Vec::new() };
    layout.directory("root", 0o700, Role::Daemon);
    layout.directory("scratch", 0o711, Role::Daemon);
    layout.directory("work", 0o711, Role::Daemon);
    layout.devices();
    layout.etc(request, &site);
    layout.host_paths(request, &site);
    layout.scratch(request, &scratch, site.inputs.as_deref());
    layout.inputs(request, &scratch, site.inputs.as_deref());
    layout.additional_files(request, &scratch);
    layout.working_dir(request, &scratch);
    layout.tmp(request);
    layout.mounts.sort_by(|a, b| a.at.cmp(&b.at));

    let lower = if request.inputs_dir.is_root() { site.inputs } else { None };
    Layout {
        outputs: request.outputs.iter().map(|output| scratch.on_disk(output)).collect(),
        on_disk: layout.on_disk,
        plan: Plan {
            base: site.build_dir,
            staging: "root".into(),
            ids: site.ids,
            root: Layer { lower, entries: layout.entries },
            mounts: layout.mounts,
            network: match request.constraints.network {
                Network::None => SandboxNetwork::Own,
                Network::Required => SandboxNetwork::Host,
            },
            command: command(request),
        },
    }
}

fn command(request: &Request) -> Command {
    let mut arguments = request.command.clone();
    let program = arguments.first().cloned().unwrap_or_default();
    // As Nix does: a program is told its name, not its path.
    if let (Some(first), Some(name)) = (arguments.first_mut(), program.rsplit(|byte| *byte == b'/').next()) {
        *first = name.to_vec();
    }
    let variable = |(key, value): (&Vec<u8>, &Vec<u8>)| [key.as_slice(), b"=", value].concat();
    Command {
        program,
        arguments,
        environment: request.environment.iter().map(variable).collect(),
        working_dir: to_path(&request.working_dir),
    }
}

fn to_path(path: &SandboxPath) -> PathBuf {
    OsStr::from_bytes(path.as_bytes()).into()
}

/// The scratch paths that are mounts of their own; their number is their place on disk.
struct Scratches<'a> {
    mounted: Vec<&'a SandboxPath>,
}

impl<'a> Scratches<'a> {
    fn of(request: &'a Request, has_inputs: bool) -> Self {
        let inputs_dir = &request.inputs_dir;
        let stands_alone = |path: &&SandboxPath| {
            let around = |other: &&SandboxPath| other != path && path.starts_with(other);
            let outer =
                request.scratch_paths.iter().filter(around).max_by_key(|outer| outer.as_bytes().len());
            outer.is_none_or(|outer| {
                // The inputs would cover the way from the one to the other.
                has_inputs && path.starts_with(inputs_dir) && !outer.starts_with(inputs_dir)
            })
        };
        Self { mounted: request.scratch_paths.iter().filter(stands_alone).collect() }
    }

    /// The mount that `path` lies in: its number, and where in it.
    fn find(&self, path: &SandboxPath) -> Option<(usize, SandboxPath)> {
        let holds = |(_, mount): &(usize, &&SandboxPath)| path.starts_with(mount);
        let (number, mount) =
            self.mounted.iter().enumerate().filter(holds).max_by_key(|(_, mount)| mount.as_bytes().len())?;
        Some((number, path.strip_prefix(mount)?))
    }

    /// Where `path`, which lies in a scratch path, is found in the build directory.
    fn on_disk(&self, path: &SandboxPath) -> PathBuf {
        match self.find(path) {
            Some((number, rest)) => place(number, &rest),
            // Requests have no such output; nothing will be found there.
            None => PathBuf::from("scratch/none"),
        }
    }
}

fn place(number: usize, rest: &SandboxPath) -> PathBuf {
    let mount = PathBuf::from(format!("scratch/{number}"));
    // Joining an empty path would add a slash.
    if rest.is_root() { mount } else { mount.join(to_path(rest)) }
}

/// A layout in the making.
struct Draft {
    on_disk: Vec<OnDisk>,
    entries: Vec<Entry>,
    mounts: Vec<MountPoint>,
}

impl Draft {
    fn directory(&mut self, path: impl Into<PathBuf>, mode: u32, owner: Role) {
        self.on_disk.push(OnDisk::Directory { path: path.into(), mode, owner });
    }

    fn mount(&mut self, at: impl Into<PathBuf>, mount: Mount) {
        self.mounts.push(MountPoint { at: at.into(), mount });
    }

    fn devices(&mut self) {
        self.mount("proc", Mount::Proc);
        for device in DEVICES {
            let source = Path::new("/dev").join(device);
            self.mount(Path::new("dev").join(device), Mount::Device { source });
        }
        self.mount("dev/pts", Mount::Devpts);
        self.mount("dev/shm", Mount::Tmpfs { mode: 0o1777, size: SHM_SIZE.into() });
        for (path, target) in DEVICE_LINKS {
            self.entries.push(Entry::Symlink { path: path.into(), target: target.into() });
        }
    }

    /// The files that every build sees in `/etc`, unless the request brings its own.
    fn etc(&mut self, request: &Request, site: &Site) {
        let mut files = vec![("passwd", PASSWD.as_bytes()), ("group", GROUP.as_bytes())];
        match request.constraints.network {
            Network::None => files.push(("hosts", HOSTS.as_bytes())),
            Network::Required => {
                files.push(("nsswitch.conf", NSSWITCH.as_bytes()));
                files.extend(
                    site.network_files.iter().map(|(name, contents)| (name.as_str(), contents.as_slice())),
                );
            }
        }
        for (name, contents) in files {
            let path = format!("etc/{name}");
            if !request.additional_files.contains_key(path.as_bytes()) {
                self.entries.push(Entry::File {
                    path: path.into(),
                    mode: 0o444,
                    contents: contents.to_vec(),
                });
            }
        }
        self.entries.push(Entry::Directory { path: "etc".into(), mode: 0o555 });
    }

    fn host_paths(&mut self, request: &Request, site: &Site) {
        for path in &request.constraints.ro_paths {
            let at = path.strip_prefix("/").unwrap_or(path);
            self.mount(at, Mount::HostPath { source: path.clone() });
        }
        if let (Shell::Required, Some(shell)) = (request.constraints.shell, &site.shell) {
            self.mount("bin/sh", Mount::HostPath { source: shell.clone() });
        }
    }

    fn scratch(&mut self, request: &Request, scratch: &Scratches<'_>, inputs: Option<&Path>) {
        for (number, path) in scratch.mounted.iter().enumerate() {
            let upper = place(number, &SandboxPath::root());
            match inputs {
                Some(lower) if **path == request.inputs_dir => {
                    let work = PathBuf::from(format!("work/{number}"));
                    self.directory(&upper, 0o1775, Role::RootForBuild);
                    self.directory(&work, 0o700, Role::Root);
                    let mount =
                        Mount::InputsBelow { lower: lower.into(), upper, work, access: Access::ReadWrite };
                    self.mount(to_path(path), mount);
                }
                _ => {
                    self.directory(&upper, 0o700, Role::Build);
                    self.mount(to_path(path), Mount::Writable { source: upper });
                }
            }
        }
        for path in request.scratch_paths.iter().filter(|path| !scratch.mounted.contains(path)) {
            self.directory(scratch.on_disk(path), 0o755, Role::Build);
        }
    }

    fn inputs(&mut self, request: &Request, scratch: &Scratches<'_>, inputs: Option<&Path>) {
        let dir = &request.inputs_dir;
        if dir.is_root() || scratch.mounted.contains(&dir) {
            return;
        }
        let Some(source) = inputs else {
            if scratch.find(dir).is_none() {
                self.entries.push(Entry::Directory { path: to_path(dir), mode: 0o555 });
            }
            return;
        };
        let beneath = |path: &SandboxPath| path != dir && path.starts_with(dir);
        let host_beneath = |path: &PathBuf| path.starts_with(dir.to_absolute());
        let crowded = request.scratch_paths.iter().any(beneath)
            || request.additional_files.keys().any(beneath)
            || beneath(&request.working_dir)
            || request.constraints.ro_paths.iter().any(host_beneath);
        if !crowded {
            return self.mount(to_path(dir), Mount::Inputs { source: source.into() });
        }
        self.directory("inputs", 0o755, Role::Root);
        self.directory("work/inputs", 0o700, Role::Root);
        let mount = Mount::InputsBelow {
            lower: source.into(),
            upper: "inputs".into(),
            work: "work/inputs".into(),
            access: Access::ReadOnly,
        };
        self.mount(to_path(dir), mount);
    }

    fn additional_files(&mut self, request: &Request, scratch: &Scratches<'_>) {
        let dir = &request.inputs_dir;
        for (path, contents) in &request.additional_files {
            let contents = contents.clone();
            match (scratch.find(path), path.strip_prefix(dir)) {
                (Some((number, rest)), _) => {
                    self.on_disk.push(OnDisk::File { path: place(number, &rest), contents });
                }
                (None, Some(rest)) if !dir.is_root() && !request.inputs.is_empty() => {
                    self.on_disk
                        .push(OnDisk::File { path: Path::new("inputs").join(to_path(&rest)), contents });
                }
                _ => self.entries.push(Entry::File { path: to_path(path), mode: 0o444, contents }),
            }
        }
    }

    fn working_dir(&mut self, request: &Request, scratch: &Scratches<'_>) {
        let dir = &request.working_dir;
        let inside_input = dir.strip_prefix(&request.inputs_dir).is_some_and(|rest| {
            rest.components().next().is_some_and(|first| request.inputs.contains_key(first))
        });
        if inside_input || request.scratch_paths.contains(dir) {
            return;
        }
        match scratch.find(dir) {
            Some((number, rest)) => self.directory(place(number, &rest), 0o755, Role::Build),
            None if dir.starts_with(&request.inputs_dir) && !request.inputs_dir.is_root() => {}
            None => self.entries.push(Entry::Directory { path: to_path(dir), mode: 0o755 }),
        }
    }

    fn tmp(&mut self, request: &Request) {
        if request.scratch_paths.contains(&b"tmp"[..]) {
            return;
        }
        self.directory("tmp", 0o1777, Role::Build);
        self.mount("tmp", Mount::Writable { source: "tmp".into() });
    }
}
