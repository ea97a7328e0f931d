//! What a build will see and where it lies on disk: computed from the request, without a system call.
//!
//! ```text
//! BUILD DIR (one per build, mode 0700)     in the sandbox
//!   scratch/N/                             scratch path N; /tmp is one in every build
//!   inputs/                                what lies between read-only inputs
//!   work/                                  what overlay wants beside the layer that is written to
//! ```
//!
//! A scratch path within another is a directory of it. Inputs in a scratch path are shown by an overlay whose upper
//! layer is the directory of the scratch path that would be seen without them: what is written beside them is found
//! where it would be if there were none. So every output is whole on disk, wherever it begins.

use std::collections::{BTreeMap, HashSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use cofferdam_sandbox::{
    Access, Command, Entry, IdMap, Landlock, Layer, Limits, Mount, MountPoint, Network as SandboxNetwork,
    Plan, TmpfsSize, seccomp,
};

use super::network::Connection;
use super::request::{Request, SandboxPath, Shell};

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
    /// The cgroup of the build's processes, absolute; `None` where it has none of its own.
    pub cgroup: Option<PathBuf>,
    /// What it may use.
    pub limits: Limits,
    /// How much fits into its `/dev/shm`.
    pub shm: TmpfsSize,
    /// Where the host paths lie that the request asks for, in its order, free of symbolic links.
    pub host_paths: Vec<PathBuf>,
    /// The program that appears as `/bin/sh` where one is asked for, its path free of symbolic links.
    pub shell: Option<PathBuf>,
    /// The build's way to the network; `None` where it asks for none.
    pub connection: Option<Connection>,
    /// Which system calls the build is refused.
    pub seccomp: Option<seccomp::Profile>,
    /// What more of the outside is kept from it than namespaces do.
    pub landlock: Landlock,
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
    /// A directory. Missing parents are made, the build's own.
    Directory {
        /// Where.
        path: PathBuf,
        /// Permission bits.
        mode: u32,
        /// Whose it is.
        owner: Role,
    },
    /// A file of the build's own. Missing parents are made likewise.
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
    let places = Places::of(request, site.inputs.is_some());
    let mut draft = Draft::default();
    draft.directory("scratch", 0o711, Role::Daemon);
    draft.devices(site.shm);
    draft.etc(request, &site);
    draft.host_paths(request, &site);
    draft.scratch(&places);
    draft.additional_files(&places);
    draft.working_dir(&places);
    match &site.inputs {
        Some(source) => draft.inputs(&places, source),
        None => draft.no_inputs(&places),
    }
    draft.mounts.sort_by(|a, b| a.at.cmp(&b.at));

    let directories =
        draft.directories.into_iter().map(|(path, (mode, owner))| OnDisk::Directory { path, mode, owner });
    let files = draft.files.into_iter().map(|(path, contents)| OnDisk::File { path, contents });
    // Requests have no output that lies nowhere; nothing would be found there.
    let output = |output| places.in_scratch(output).unwrap_or_default();
    Layout {
        on_disk: directories.chain(files).collect(),
        outputs: request.outputs.iter().map(output).collect(),
        plan: Plan {
            base: site.build_dir,
            ids: site.ids,
            root: Layer {
                lower: site.inputs.filter(|_| request.inputs_dir.is_root()),
                entries: draft.entries,
            },
            mounts: draft.mounts,
            network: site.connection.map_or(SandboxNetwork::Own, |connection| connection.network),
            seccomp: site.seccomp,
            landlock: site.landlock,
            cgroup: site.cgroup,
            limits: site.limits,
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

/// Where a path of the sandbox lies.
enum Place {
    /// It is there already: in an input, or in what the worker lends of its file system.
    Given,
    /// In the build directory.
    OnDisk(PathBuf),
    /// In the tmpfs of the root.
    Root,
}

/// Tells where paths lie.
struct Places<'a> {
    request: &'a Request,
    has_inputs: bool,
    /// The scratch paths that lie in no other, in order; their number is their place on disk.
    mounted: Vec<SandboxPath>,
    /// The places of host paths.
    host: HashSet<&'a [u8]>,
}

impl<'a> Places<'a> {
    fn of(request: &'a Request, has_inputs: bool) -> Self {
        let mut scratch = request.scratch_paths.clone();
        scratch.insert(SandboxPath::tmp());
        let outermost = |path: &&SandboxPath| !path.ancestors().skip(1).any(|above| scratch.contains(above));
        Self {
            request,
            has_inputs,
            mounted: scratch.iter().filter(outermost).cloned().collect(),
            host: request
                .constraints
                .ro_paths
                .iter()
                .map(|path| relative(path).as_os_str().as_bytes())
                .collect(),
        }
    }

    /// The mounted scratch path that `path` is or lies in, with its number.
    fn scratch_of(&self, path: &SandboxPath) -> Option<(usize, &SandboxPath)> {
        path.ancestors().find_map(|above| {
            let number = self.mounted.binary_search_by(|mount| mount.as_bytes().cmp(above)).ok()?;
            Some((number, self.mounted.get(number)?))
        })
    }

    /// Where in the build directory `path` is found, if it is or lies in a scratch path.
    fn in_scratch(&self, path: &SandboxPath) -> Option<PathBuf> {
        let (number, mount) = self.scratch_of(path)?;
        Some(below(scratch_dir(number), &path.strip_prefix(mount)?))
    }

    fn find(&self, path: &SandboxPath) -> Place {
        let dir = &self.request.inputs_dir;
        if path.ancestors().any(|above| self.host.contains(above)) || self.is_given_by_inputs(path) {
            return Place::Given;
        }
        if let Some(place) = self.in_scratch(path) {
            return Place::OnDisk(place);
        }
        match path.strip_prefix(dir) {
            Some(rest) if self.has_inputs && !dir.is_root() => Place::OnDisk(below("inputs".into(), &rest)),
            _ => Place::Root,
        }
    }

    /// Whether `path` is the inputs' directory, or an input or in one and no scratch path covers it there.
    fn is_given_by_inputs(&self, path: &SandboxPath) -> bool {
        let dir = &self.request.inputs_dir;
        let Some(rest) = path.strip_prefix(dir).filter(|_| self.has_inputs) else { return false };
        let Some(name) = rest.components().next() else { return true };
        self.request.inputs.contains_key(name)
            && !self.scratch_of(path).is_some_and(|(_, mount)| mount != dir && mount.starts_with(dir))
    }
}

fn scratch_dir(number: usize) -> PathBuf {
    PathBuf::from(format!("scratch/{number}"))
}

fn below(dir: PathBuf, rest: &SandboxPath) -> PathBuf {
    // Joining an empty path would add a slash.
    if rest.is_root() { dir } else { dir.join(to_path(rest)) }
}

/// A path of the host, as seen from the root.
fn relative(path: &Path) -> &Path {
    path.strip_prefix("/").unwrap_or(path)
}

/// A layout in the making.
#[derive(Default)]
struct Draft {
    // In this order parents come before children.
    directories: BTreeMap<PathBuf, (u32, Role)>,
    files: Vec<(PathBuf, Vec<u8>)>,
    entries: Vec<Entry>,
    mounts: Vec<MountPoint>,
}

impl Draft {
    fn directory(&mut self, path: impl Into<PathBuf>, mode: u32, owner: Role) {
        self.directories.insert(path.into(), (mode, owner));
    }

    fn mount(&mut self, at: impl Into<PathBuf>, mount: Mount) {
        self.mounts.push(MountPoint { at: at.into(), mount });
    }

    fn devices(&mut self, shm: TmpfsSize) {
        self.mount("proc", Mount::Proc);
        for device in DEVICES {
            let source = Path::new("/dev").join(device);
            self.mount(Path::new("dev").join(device), Mount::Device { source });
        }
        self.mount("dev/pts", Mount::Devpts);
        self.mount("dev/shm", Mount::Tmpfs { mode: 0o1777, size: shm });
        for (path, target) in DEVICE_LINKS {
            self.entries.push(Entry::Symlink { path: path.into(), target: target.into() });
        }
    }

    /// The files that every build sees in `/etc`, unless the request has something of its own there.
    fn etc(&mut self, request: &Request, site: &Site) {
        let mut files = vec![("passwd", PASSWD.as_bytes()), ("group", GROUP.as_bytes())];
        match &site.connection {
            None => files.push(("hosts", HOSTS.as_bytes())),
            Some(Connection { files: own, .. }) => {
                files.push(("nsswitch.conf", NSSWITCH.as_bytes()));
                files.extend(own.iter().map(|(name, contents)| (name.as_str(), contents.as_slice())));
            }
        }
        let own = request.additional_files.keys().chain([&request.working_dir]);
        let own: HashSet<&[u8]> = own.flat_map(SandboxPath::ancestors).collect();
        for (name, contents) in files {
            let path = format!("etc/{name}");
            if !own.contains(path.as_bytes()) {
                let contents = contents.to_vec();
                self.entries.push(Entry::File { path: path.into(), mode: 0o444, contents });
            }
        }
        self.entries.push(Entry::Directory { path: "etc".into(), mode: 0o555 });
    }

    fn host_paths(&mut self, request: &Request, site: &Site) {
        for (path, source) in request.constraints.ro_paths.iter().zip(&site.host_paths) {
            self.mount(relative(path), Mount::HostPath { source: source.clone() });
        }
        if let (Shell::Required, Some(shell)) = (request.constraints.shell, &site.shell) {
            self.mount(to_path(&SandboxPath::shell()), Mount::HostPath { source: shell.clone() });
        }
    }

    fn scratch(&mut self, places: &Places<'_>) {
        for path in &places.request.scratch_paths {
            if let Some(place) = places.in_scratch(path) {
                self.directory(place, 0o755, Role::Build);
            }
        }
        for (number, path) in places.mounted.iter().enumerate() {
            let source = scratch_dir(number);
            self.directory(&source, if *path == SandboxPath::tmp() { 0o1777 } else { 0o700 }, Role::Build);
            // Where the inputs are shown with it, there is nothing to be seen without them.
            if !places.has_inputs || *path != places.request.inputs_dir {
                self.mount(to_path(path), Mount::Writable { source });
            }
        }
    }

    fn additional_files(&mut self, places: &Places<'_>) {
        for (path, contents) in &places.request.additional_files {
            let contents = contents.clone();
            match places.find(path) {
                Place::OnDisk(place) => self.files.push((place, contents)),
                Place::Root => self.entries.push(Entry::File { path: to_path(path), mode: 0o444, contents }),
                // Requests have none there.
                Place::Given => {}
            }
        }
    }

    fn working_dir(&mut self, places: &Places<'_>) {
        let path = &places.request.working_dir;
        match places.find(path) {
            Place::OnDisk(place) => self.directory_unless_there(place),
            Place::Root => self.entries.push(Entry::Directory { path: to_path(path), mode: 0o755 }),
            Place::Given => {}
        }
    }

    fn directory_unless_there(&mut self, place: PathBuf) {
        self.directories.entry(place).or_insert((0o755, Role::Build));
    }

    /// Shows the inputs. Comes last: whether they can be shown as they are depends on what lies between them.
    fn inputs(&mut self, places: &Places<'_>, source: &Path) {
        let dir = &places.request.inputs_dir;
        let at = to_path(dir);
        if dir.is_root() {
            return;
        }
        let (upper, access) = match places.in_scratch(dir) {
            Some(upper) => {
                let mode = if *dir == SandboxPath::tmp() { 0o1777 } else { 0o1775 };
                self.directory(&upper, mode, Role::RootForBuild);
                (upper, Access::ReadWrite)
            }
            None if self.lies_between(&at) => {
                self.directory("inputs", 0o755, Role::Root);
                ("inputs".into(), Access::ReadOnly)
            }
            None => return self.mount(at, Mount::Inputs { source: source.into() }),
        };
        self.directory("work", 0o700, Role::Root);
        let (lower, work) = (source.into(), "work".into());
        self.mount(at, Mount::InputsBelow { lower, upper, work, access });
    }

    /// Whether anything is to be found between the inputs in `dir`.
    fn lies_between(&self, dir: &Path) -> bool {
        let mut on_disk = self.directories.keys().chain(self.files.iter().map(|(path, _)| path));
        on_disk.any(|path| path.starts_with("inputs"))
            || self.mounts.iter().any(|mount| mount.at.starts_with(dir))
    }

    /// Makes the inputs' directory though nothing is in it, unless that would be a part of an output.
    fn no_inputs(&mut self, places: &Places<'_>) {
        let dir = &places.request.inputs_dir;
        if dir.is_root() {
            return;
        }
        match places.find(dir) {
            Place::OnDisk(place) if !places.request.outputs.iter().any(|output| output.contains(dir)) => {
                self.directory_unless_there(place);
            }
            Place::Root => self.entries.push(Entry::Directory { path: to_path(dir), mode: 0o555 }),
            Place::OnDisk(_) | Place::Given => {}
        }
    }
}

#[cfg(test)]
mod tests;
