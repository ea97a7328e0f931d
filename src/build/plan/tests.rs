//! What lies where, as tables; and, of any request, that what a build writes is found again.

use std::collections::BTreeSet;

use proptest::collection::{btree_map, btree_set, vec};
use proptest::prelude::*;

use super::super::request::{Constraints, Draft as Parts, Network};
use super::*;
use crate::castore::{Digest, Name, Node};

fn path(text: &str) -> SandboxPath {
    if text.is_empty() { SandboxPath::root() } else { SandboxPath::new(text).unwrap() }
}

fn paths<const N: usize>(texts: [&str; N]) -> BTreeSet<SandboxPath> {
    texts.into_iter().map(path).collect()
}

fn files<const N: usize>(texts: [&str; N]) -> BTreeMap<SandboxPath, Vec<u8>> {
    texts.into_iter().map(|text| (path(text), b"text".to_vec())).collect()
}

fn inputs<'a>(names: impl IntoIterator<Item = &'a str>) -> BTreeMap<Name, Node> {
    let node = Node::Directory { digest: Digest::from([1; 32]), size: 0 };
    names.into_iter().map(|name| (Name::new(name).unwrap(), node.clone())).collect()
}

/// One input in `nix/store`, work in `build`, one output there.
fn plain() -> Parts {
    Parts {
        inputs: inputs(["in"]),
        command: vec![b"/nix/store/in/bin/sh".to_vec(), b"-e".to_vec()],
        working_dir: path("build"),
        scratch_paths: paths(["build"]),
        inputs_dir: path("nix/store"),
        outputs: vec![path("build/out")],
        ..Parts::default()
    }
}

fn laid_out(parts: Parts) -> Layout {
    let request = Request::new(parts).unwrap();
    let site = Site {
        build_dir: "/scratch/build".into(),
        inputs: (!request.inputs.is_empty()).then(|| "/view/build".into()),
        ids: cofferdam_sandbox::Identity::Single.map(0),
        cgroup: None,
        limits: Limits::default(),
        shm: TmpfsSize { bytes: 4096, inodes: 7 },
        host_paths: request.constraints.ro_paths.clone(),
        shell: Some("/static/sh".into()),
        connection: (request.constraints.network == Network::Required).then(|| Connection {
            network: SandboxNetwork::Host,
            files: vec![("resolv.conf".into(), b"nameserver ::1\n".to_vec())],
        }),
        seccomp: None,
        landlock: cofferdam_sandbox::Landlock::Off,
    };
    lay_out(&request, site)
}

/// A layout in words, without what is the same in every build.
fn words(layout: &Layout) -> Vec<String> {
    let lower = layout.plan.root.lower.iter().map(|lower| format!("/ over {}", lower.display()));
    let mounts = layout.plan.mounts.iter().map(|point| {
        let what = match &point.mount {
            Mount::Writable { source } => source.display().to_string(),
            Mount::HostPath { source } => format!("host {}", source.display()),
            Mount::Inputs { source } => format!("inputs {}", source.display()),
            Mount::InputsBelow { lower, upper, work, access } => {
                format!("{access:?} {} over {}, {}", upper.display(), lower.display(), work.display())
            }
            other => format!("{other:?}"),
        };
        format!("/{} = {what}", point.at.display())
    });
    let entries = layout.plan.root.entries.iter().map(|entry| match entry {
        Entry::Directory { path, mode } => format!("/{} dir {mode:o}", path.display()),
        Entry::File { path, mode, .. } => format!("/{} file {mode:o}", path.display()),
        Entry::Symlink { path, target } => format!("/{} -> {}", path.display(), target.display()),
    });
    let on_disk = layout.on_disk.iter().map(|item| match item {
        OnDisk::Directory { path, mode, owner } => format!("{} {mode:o} {owner:?}", path.display()),
        OnDisk::File { path, .. } => format!("{} file", path.display()),
    });
    let outputs = layout.outputs.iter().map(|place| format!("out {}", place.display()));
    lower.chain(mounts).chain(entries).chain(on_disk).chain(outputs).collect()
}

/// What every build has, in the words above.
const ALWAYS: [&str; 19] = [
    "/dev/full = Device { source: \"/dev/full\" }",
    "/dev/null = Device { source: \"/dev/null\" }",
    "/dev/pts = Devpts",
    "/dev/random = Device { source: \"/dev/random\" }",
    "/dev/shm = Tmpfs { mode: 1023, size: TmpfsSize { bytes: 4096, inodes: 7 } }",
    "/dev/tty = Device { source: \"/dev/tty\" }",
    "/dev/urandom = Device { source: \"/dev/urandom\" }",
    "/dev/zero = Device { source: \"/dev/zero\" }",
    "/proc = Proc",
    "/dev/fd -> /proc/self/fd",
    "/dev/stdin -> /proc/self/fd/0",
    "/dev/stdout -> /proc/self/fd/1",
    "/dev/stderr -> /proc/self/fd/2",
    "/dev/ptmx -> pts/ptmx",
    "/etc/passwd file 444",
    "/etc/group file 444",
    "/etc/hosts file 444",
    "/etc dir 555",
    "scratch 711 Daemon",
];

/// What is done to the plain request.
type Edit = fn(&mut Parts);

type Case = (&'static str, Edit, &'static [&'static str]);

/// Each with what there is then beside what there always is.
#[rustfmt::skip]
const CASES: &[Case] = &[
    ("plain", |_| {}, &[
        "/build = scratch/0", "/nix/store = inputs /view/build", "/tmp = scratch/1",
        "scratch/0 700 Build", "scratch/1 1777 Build", "out scratch/0/out",
    ]),
    ("no inputs", |p| p.inputs.clear(), &[
        "/build = scratch/0", "/tmp = scratch/1", "/nix/store dir 555",
        "scratch/0 700 Build", "scratch/1 1777 Build", "out scratch/0/out",
    ]),
    ("no scratch", |p| { p.scratch_paths.clear(); p.outputs.clear() }, &[
        "/nix/store = inputs /view/build", "/tmp = scratch/0", "/build dir 755", "scratch/0 1777 Build",
    ]),
    // Scratch and the inputs.
    ("scratch is the inputs' place", |p| { p.scratch_paths = paths(["build", "nix/store"]); p.outputs = vec![path("nix/store/out"), path("build/o")] }, &[
        "/build = scratch/0", "/nix/store = ReadWrite scratch/1 over /view/build, work", "/tmp = scratch/2",
        "scratch/0 700 Build", "scratch/1 1775 RootForBuild", "scratch/2 1777 Build", "work 700 Root",
        "out scratch/1/out", "out scratch/0/o",
    ]),
    ("scratch above the inputs", |p| { p.scratch_paths = paths(["nix"]); p.outputs = vec![path("nix/store/out"), path("nix/o")]; p.working_dir = path("nix") }, &[
        "/nix = scratch/0", "/nix/store = ReadWrite scratch/0/store over /view/build, work", "/tmp = scratch/1",
        "scratch/0 700 Build", "scratch/0/store 1775 RootForBuild", "scratch/1 1777 Build", "work 700 Root",
        "out scratch/0/store/out", "out scratch/0/o",
    ]),
    ("scratch above the inputs, and there too", |p| { p.scratch_paths = paths(["nix", "nix/store", "nix/store/x"]); p.outputs = vec![path("nix/store/x")]; p.working_dir = path("nix/store") }, &[
        "/nix = scratch/0", "/nix/store = ReadWrite scratch/0/store over /view/build, work", "/tmp = scratch/1",
        "scratch/0 700 Build", "scratch/0/store 1775 RootForBuild", "scratch/0/store/x 755 Build",
        "scratch/1 1777 Build", "work 700 Root", "out scratch/0/store/x",
    ]),
    ("scratch beneath the inputs", |p| { p.scratch_paths = paths(["nix/store/x"]); p.outputs = vec![path("nix/store/x/o")]; p.working_dir = path("nix/store/x") }, &[
        "/nix/store = ReadOnly inputs over /view/build, work", "/nix/store/x = scratch/0", "/tmp = scratch/1",
        "inputs 755 Root", "scratch/0 700 Build", "scratch/1 1777 Build", "work 700 Root", "out scratch/0/o",
    ]),
    ("scratch in an output", |p| { p.scratch_paths = paths(["build", "build/out/a", "build/out/a/b", "nix/store", "nix/store/o/c"]); p.outputs = vec![path("build/out"), path("nix/store/o"), path("build")] }, &[
        "/build = scratch/0", "/nix/store = ReadWrite scratch/1 over /view/build, work", "/tmp = scratch/2",
        "scratch/0 700 Build", "scratch/0/out/a 755 Build", "scratch/0/out/a/b 755 Build",
        "scratch/1 1775 RootForBuild", "scratch/1/o/c 755 Build", "scratch/2 1777 Build", "work 700 Root",
        "out scratch/0/out", "out scratch/1/o", "out scratch/0",
    ]),
    ("no inputs where scratch is", |p| { p.inputs.clear(); p.scratch_paths = paths(["build", "nix"]); p.outputs = vec![path("nix/store/out")] }, &[
        "/build = scratch/0", "/nix = scratch/1", "/tmp = scratch/2",
        "scratch/0 700 Build", "scratch/1 700 Build", "scratch/1/store 755 Build", "scratch/2 1777 Build",
        "out scratch/1/store/out",
    ]),
    ("no inputs, an output in their place", |p| { p.inputs.clear(); p.scratch_paths = paths(["build", "nix"]); p.outputs = vec![path("nix/store")] }, &[
        "/build = scratch/0", "/nix = scratch/1", "/tmp = scratch/2",
        "scratch/0 700 Build", "scratch/1 700 Build", "scratch/2 1777 Build", "out scratch/1/store",
    ]),
    // Inputs at the root.
    ("inputs at the root", |p| p.inputs_dir = path(""), &[
        "/ over /view/build", "/build = scratch/0", "/tmp = scratch/1",
        "scratch/0 700 Build", "scratch/1 1777 Build", "out scratch/0/out",
    ]),
    ("scratch and work in an input at the root", |p| { p.inputs_dir = path(""); p.scratch_paths = paths(["in/a"]); p.outputs = vec![path("in/a/o")]; p.working_dir = path("in/a/w") }, &[
        "/ over /view/build", "/in/a = scratch/0", "/tmp = scratch/1",
        "scratch/0 700 Build", "scratch/0/w 755 Build", "scratch/1 1777 Build", "out scratch/0/o",
    ]),
    ("files and work beside inputs at the root", |p| { p.inputs_dir = path(""); p.additional_files = files(["f/x", "tmp/x"]); p.working_dir = path("w") }, &[
        "/ over /view/build", "/build = scratch/0", "/tmp = scratch/1", "/f/x file 444", "/w dir 755",
        "scratch/0 700 Build", "scratch/1 1777 Build", "scratch/1/x file", "out scratch/0/out",
    ]),
    // /tmp.
    ("files and work in /tmp", |p| { p.additional_files = files(["tmp/x/y"]); p.working_dir = path("tmp/w/w") }, &[
        "/build = scratch/0", "/nix/store = inputs /view/build", "/tmp = scratch/1",
        "scratch/0 700 Build", "scratch/1 1777 Build", "scratch/1/w/w 755 Build", "scratch/1/x/y file",
        "out scratch/0/out",
    ]),
    ("scratch in /tmp", |p| { p.scratch_paths = paths(["tmp/s"]); p.outputs = vec![path("tmp/s/o")]; p.working_dir = path("tmp") }, &[
        "/nix/store = inputs /view/build", "/tmp = scratch/0",
        "scratch/0 1777 Build", "scratch/0/s 755 Build", "out scratch/0/s/o",
    ]),
    ("scratch is /tmp", |p| { p.scratch_paths = paths(["tmp"]); p.outputs = vec![path("tmp/o")]; p.working_dir = path("tmp/s") }, &[
        "/nix/store = inputs /view/build", "/tmp = scratch/0",
        "scratch/0 1777 Build", "scratch/0/s 755 Build", "out scratch/0/o",
    ]),
    ("inputs are /tmp", |p| p.inputs_dir = path("tmp"), &[
        "/build = scratch/0", "/tmp = ReadWrite scratch/1 over /view/build, work",
        "scratch/0 700 Build", "scratch/1 1777 RootForBuild", "work 700 Root", "out scratch/0/out",
    ]),
    ("inputs in /tmp", |p| p.inputs_dir = path("tmp/in"), &[
        "/build = scratch/0", "/tmp = scratch/1", "/tmp/in = ReadWrite scratch/1/in over /view/build, work",
        "scratch/0 700 Build", "scratch/1 1777 Build", "scratch/1/in 1775 RootForBuild", "work 700 Root",
        "out scratch/0/out",
    ]),
    // Additional files.
    ("files everywhere", |p| { p.scratch_paths.insert(path("build/a")); p.additional_files = files(["build/a/x", "build/b/x", "etc/passwd", "nix/store/.links/x", "nix/x", "opt/x"]) }, &[
        "/build = scratch/0", "/nix/store = ReadOnly inputs over /view/build, work", "/tmp = scratch/1",
        "/etc/passwd file 444", "/nix/x file 444", "/opt/x file 444",
        "inputs 755 Root", "scratch/0 700 Build", "scratch/0/a 755 Build", "scratch/1 1777 Build", "work 700 Root",
        "scratch/0/a/x file", "scratch/0/b/x file", "inputs/.links/x file", "out scratch/0/out",
    ]),
    ("a file between inputs and outputs", |p| { p.scratch_paths = paths(["nix"]); p.outputs.clear(); p.working_dir = path("nix/store/.w"); p.additional_files = files(["nix/store/.links/x"]) }, &[
        "/nix = scratch/0", "/nix/store = ReadWrite scratch/0/store over /view/build, work", "/tmp = scratch/1",
        "scratch/0 700 Build", "scratch/0/store 1775 RootForBuild", "scratch/0/store/.w 755 Build",
        "scratch/1 1777 Build", "work 700 Root", "scratch/0/store/.links/x file",
    ]),
    // The working directory.
    ("work deep in scratch", |p| p.working_dir = path("build/a/b"), &[
        "/build = scratch/0", "/nix/store = inputs /view/build", "/tmp = scratch/1",
        "scratch/0 700 Build", "scratch/0/a/b 755 Build", "scratch/1 1777 Build", "out scratch/0/out",
    ]),
    ("work elsewhere", |p| p.working_dir = path("some/where"), &[
        "/build = scratch/0", "/nix/store = inputs /view/build", "/tmp = scratch/1", "/some/where dir 755",
        "scratch/0 700 Build", "scratch/1 1777 Build", "out scratch/0/out",
    ]),
    ("work beside inputs", |p| p.working_dir = path("nix/store/some/where"), &[
        "/build = scratch/0", "/nix/store = ReadOnly inputs over /view/build, work", "/tmp = scratch/1",
        "inputs 755 Root", "inputs/some/where 755 Build", "scratch/0 700 Build", "scratch/1 1777 Build",
        "work 700 Root", "out scratch/0/out",
    ]),
    ("work in an input", |p| p.working_dir = path("nix/store/in/src"), &[
        "/build = scratch/0", "/nix/store = inputs /view/build", "/tmp = scratch/1",
        "scratch/0 700 Build", "scratch/1 1777 Build", "out scratch/0/out",
    ]),
    ("work in an input in scratch", |p| { p.scratch_paths = paths(["nix"]); p.outputs.clear(); p.working_dir = path("nix/store/in") }, &[
        "/nix = scratch/0", "/nix/store = ReadWrite scratch/0/store over /view/build, work", "/tmp = scratch/1",
        "scratch/0 700 Build", "scratch/0/store 1775 RootForBuild", "scratch/1 1777 Build", "work 700 Root",
    ]),
    ("work where the inputs are", |p| p.working_dir = path("nix/store"), &[
        "/build = scratch/0", "/nix/store = inputs /view/build", "/tmp = scratch/1",
        "scratch/0 700 Build", "scratch/1 1777 Build", "out scratch/0/out",
    ]),
    ("work in what the host lends", |p| { p.working_dir = path("usr/src"); p.constraints.ro_paths = vec!["/usr".into()] }, &[
        "/build = scratch/0", "/nix/store = inputs /view/build", "/tmp = scratch/1", "/usr = host /usr",
        "scratch/0 700 Build", "scratch/1 1777 Build", "out scratch/0/out",
    ]),
    // What the worker lends.
    ("a shell", |p| p.constraints.shell = Shell::Required, &[
        "/bin/sh = host /static/sh", "/build = scratch/0", "/nix/store = inputs /view/build", "/tmp = scratch/1",
        "scratch/0 700 Build", "scratch/1 1777 Build", "out scratch/0/out",
    ]),
    ("the network", |p| p.constraints.network = Network::Required, &[
        "/build = scratch/0", "/nix/store = inputs /view/build", "/tmp = scratch/1",
        "/etc/nsswitch.conf file 444", "/etc/resolv.conf file 444",
        "scratch/0 700 Build", "scratch/1 1777 Build", "out scratch/0/out",
    ]),
    ("host paths", |p| p.constraints.ro_paths = ["/usr/share", "/bin", "/usr", "/dev/kvm"].map(PathBuf::from).into(), &[
        "/bin = host /bin", "/build = scratch/0", "/dev/kvm = host /dev/kvm", "/nix/store = inputs /view/build",
        "/tmp = scratch/1", "/usr = host /usr", "/usr/share = host /usr/share",
        "scratch/0 700 Build", "scratch/1 1777 Build", "out scratch/0/out",
    ]),
    ("host paths beside inputs", |p| p.constraints.ro_paths = vec!["/nix/store/host".into()], &[
        "/build = scratch/0", "/nix/store = ReadOnly inputs over /view/build, work",
        "/nix/store/host = host /nix/store/host", "/tmp = scratch/1",
        "inputs 755 Root", "scratch/0 700 Build", "scratch/1 1777 Build", "work 700 Root", "out scratch/0/out",
    ]),
];

#[test]
fn what_lies_where() {
    for (name, edit, expected) in CASES {
        let mut parts = plain();
        edit(&mut parts);
        let mut found = words(&laid_out(parts));
        found.retain(|line| expected.contains(&line.as_str()) || !ALWAYS.contains(&line.as_str()));
        assert_eq!(found, *expected, "{name}");
    }
}

#[test]
fn what_every_build_has() {
    let found = words(&laid_out(plain()));
    let missing: Vec<_> = ALWAYS.iter().filter(|line| !found.iter().any(|found| found == *line)).collect();
    assert_eq!(missing, Vec::<&&str>::new());
}

#[test]
fn what_is_in_etc() {
    let cases: [(Edit, &[&str]); 4] = [
        (|_| {}, &["etc/passwd", "etc/group", "etc/hosts"]),
        (
            |p| p.constraints.network = Network::Required,
            &["etc/passwd", "etc/group", "etc/nsswitch.conf", "etc/resolv.conf"],
        ),
        (|p| p.additional_files = files(["etc/hosts/x"]), &["etc/passwd", "etc/group", "etc/hosts/x"]),
        (|p| p.working_dir = path("etc/group/x"), &["etc/passwd", "etc/hosts"]),
    ];
    for (edit, expected) in cases {
        let mut parts = plain();
        edit(&mut parts);
        let layout = laid_out(parts);
        let files = layout.plan.root.entries.iter().filter_map(|entry| match entry {
            Entry::File { path, .. } => path.to_str(),
            _ => None,
        });
        assert_eq!(files.collect::<Vec<_>>(), expected);
    }
}

#[test]
fn the_command() {
    let cases: [(&[&[u8]], &str); 3] =
        [(&[b"/a/b/prog", b"x/y"], "prog x/y"), (&[b"prog"], "prog"), (&[b"./dir/prog", b""], "prog ")];
    for (given, arguments) in cases {
        let mut parts = plain();
        parts.command = given.iter().map(|part| part.to_vec()).collect();
        parts.environment = BTreeMap::from([(b"A".to_vec(), b"=1".to_vec()), (b"B".to_vec(), Vec::new())]);
        let Layout { plan: Plan { command, network, .. }, .. } = laid_out(parts);
        assert_eq!(command.program, given[0]);
        assert_eq!(command.arguments.join(&b' '), arguments.as_bytes());
        assert_eq!(command.environment, [b"A==1".to_vec(), b"B=".to_vec()]);
        assert_eq!(command.working_dir, Path::new("build"));
        assert_eq!(network, SandboxNetwork::Own);
    }
}

/// Paths that meet often.
fn any_path(longest: usize) -> impl Strategy<Value = String> {
    vec(prop_oneof![Just("a"), Just("b"), Just("in"), Just("tmp")], 1..=longest)
        .prop_map(|names| names.join("/"))
}

prop_compose! {
    /// Requests whose parts lie in one another in all ways that are valid.
    fn tangled()(
        has_inputs in prop::bool::weighted(0.8),
        scratch in btree_set(any_path(3), 1..5),
        inputs_dir in prop_oneof![4 => any_path(2), 1 => Just(String::new())],
        working_dir in any_path(4),
        outputs in vec((any::<prop::sample::Index>(), vec("[ao]", 0..3)), 1..3),
        files in btree_map(any_path(4), Just(Vec::new()), 0..3),
        host in btree_set(any_path(3), 0..2),
    ) -> Parts {
        let roots: Vec<_> = scratch.iter().cloned().collect();
        let outputs: BTreeSet<_> = outputs.into_iter()
            .map(|(root, rest)| path(&[vec![root.get(&roots).clone()], rest].concat().join("/")))
            .collect();
        Parts {
            inputs: if has_inputs { inputs(["in"]) } else { BTreeMap::new() },
            working_dir: path(&working_dir),
            scratch_paths: roots.iter().map(|root| path(root)).collect(),
            inputs_dir: path(&inputs_dir),
            outputs: outputs.into_iter().collect(),
            constraints: Constraints {
                ro_paths: host.into_iter().map(|path| format!("/{path}").into()).collect(),
                ..Constraints::default()
            },
            additional_files: files.into_iter().map(|(at, contents)| (path(&at), contents)).collect(),
            ..plain()
        }
    }
}

/// Where a path of the sandbox leads, going by the mounts alone.
#[derive(Debug, PartialEq)]
enum Leads {
    /// To what the build directory has there. Between inputs it does unless there is an input.
    OnDisk(PathBuf),
    ToInputs,
    ToHost,
    ToRoot,
}

fn leads(plan: &Plan, path: &SandboxPath) -> Leads {
    let path = to_path(path);
    // The last is the deepest, and of several in one place the uppermost.
    let Some(point) = plan.mounts.iter().rfind(|point| path.starts_with(&point.at)) else {
        return Leads::ToRoot;
    };
    match &point.mount {
        Mount::Writable { source: place } | Mount::InputsBelow { upper: place, .. } => {
            let rest = path.strip_prefix(&point.at).unwrap();
            Leads::OnDisk(place.components().chain(rest.components()).collect())
        }
        Mount::Inputs { .. } => Leads::ToInputs,
        Mount::HostPath { .. } => Leads::ToHost,
        other => panic!("{} leads to {other:?}", path.display()),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, max_global_rejects: 1_000_000, ..ProptestConfig::default() })]

    #[test]
    fn every_output_is_whole(parts in tangled().prop_filter("valid", |parts| Request::new(parts.clone()).is_ok())) {
        let layout = laid_out(parts.clone());
        for (output, place) in parts.outputs.iter().zip(&layout.outputs) {
            prop_assert_eq!(leads(&layout.plan, output), Leads::OnDisk(place.clone()));
            let inside = |at: &Path| at != to_path(output) && at.starts_with(to_path(output));
            let strange = layout.plan.mounts.iter().find(|point| inside(&point.at));
            prop_assert!(strange.is_none(), "{} is mounted in {output}", strange.unwrap().at.display());
        }
    }

    #[test]
    fn all_that_is_made_can_be_seen(parts in tangled().prop_filter("valid", |parts| Request::new(parts.clone()).is_ok())) {
        let layout = laid_out(parts.clone());
        let entries: Vec<_> = layout.plan.root.entries.iter().map(|entry| match entry {
            Entry::Directory { path, .. } | Entry::File { path, .. } | Entry::Symlink { path, .. } => path,
        }).collect();
        for path in parts.additional_files.keys() {
            match leads(&layout.plan, path) {
                Leads::OnDisk(place) => {
                    let file = OnDisk::File { path: place, contents: Vec::new() };
                    prop_assert!(layout.on_disk.contains(&file), "no {path}");
                }
                Leads::ToRoot => prop_assert!(entries.contains(&&to_path(path)), "no {path}"),
                Leads::ToInputs | Leads::ToHost => prop_assert!(false, "{path} is covered"),
            }
        }
        let dir = &parts.working_dir;
        let input = parts.inputs_dir.join(&Name::new("in").unwrap()).unwrap();
        let is_directory = |place: &Path| layout.on_disk.iter().any(|item| match item {
            OnDisk::Directory { path, .. } => path == place,
            OnDisk::File { .. } => false,
        });
        // What an input or the host has there is theirs to say.
        if parts.inputs.is_empty() || !input.contains(dir) {
            match leads(&layout.plan, dir) {
                Leads::OnDisk(place) => prop_assert!(is_directory(&place), "no {}", place.display()),
                Leads::ToRoot => prop_assert!(entries.contains(&&to_path(dir)), "no {dir}"),
                Leads::ToInputs => prop_assert_eq!(dir, &parts.inputs_dir),
                Leads::ToHost => {}
            }
        }
    }
}
