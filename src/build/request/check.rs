//! Whether the parts of a request agree with each other. No part of this touches the system.

use std::collections::{BTreeMap, HashSet};
use std::ops::Bound;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::error::{InvalidRequest, Relation, RequestFault};
use super::path::{PathFault, SandboxPath};
use super::{Constraints, Draft, Shell, limits};
use crate::castore::node::printable;
use crate::castore::{Name, Node};

type Checked = Result<(), InvalidRequest>;

/// Directories at the root that are the kernel's or the sandbox's own.
const KERNEL_TREES: [&str; 3] = ["proc", "dev", "sys"];

/// Directories at the root that the sandbox furnishes, and a request may add files to.
const FURNISHED_TREES: [&str; 2] = ["etc", "bin"];

/// What the sandbox puts into `/dev` beside device nodes of the host.
const OWN_DEVICES: [&[u8]; 7] = [b"fd", b"ptmx", b"pts", b"shm", b"stderr", b"stdin", b"stdout"];

/// Every check, those of single fields before those that compare fields.
pub(super) fn all(draft: &Draft) -> Checked {
    counts(draft)?;
    command(draft)?;
    environment(draft)?;
    exec_size(draft)?;
    constraints(&draft.constraints)?;
    needles(draft)?;
    inputs_dir(draft)?;
    scratch_paths(draft)?;
    outputs(draft)?;
    working_dir(draft)?;
    additional_files(draft)?;
    host_paths(draft)
}

fn refuse(field: impl Into<String>, fault: impl Into<RequestFault>) -> Checked {
    Err(InvalidRequest::new(field, fault))
}

/// Refuses a list that is too long.
pub(super) fn count(field: &str, count: usize, limit: usize) -> Checked {
    if count > limit { refuse(field, RequestFault::TooMany { count, limit }) } else { Ok(()) }
}

fn size(field: &str, len: usize, limit: usize) -> Checked {
    if len > limit { refuse(field, RequestFault::TooLong { len, limit }) } else { Ok(()) }
}

fn counts(draft: &Draft) -> Checked {
    count("inputs", draft.inputs.len(), limits::INPUTS)?;
    count("scratch_paths", draft.scratch_paths.len(), limits::SCRATCH_PATHS)?;
    count("outputs", draft.outputs.len(), limits::OUTPUTS)?;
    count("constraints.available_ro_paths", draft.constraints.ro_paths.len(), limits::RO_PATHS)?;
    count("additional_files", draft.additional_files.len(), limits::ADDITIONAL_FILES)?;
    count("refscan_needles", draft.needles.len(), limits::NEEDLES)?;
    let contents = draft.additional_files.values().map(Vec::len).sum();
    size("additional_files", contents, limits::ADDITIONAL_BYTES)?;
    size("refscan_needles", draft.needles.iter().map(Vec::len).sum(), limits::NEEDLE_BYTES)
}

fn command(draft: &Draft) -> Checked {
    match draft.command.first() {
        None => return refuse("command_args", RequestFault::Empty { needed: "a program" }),
        Some(program) if program.is_empty() => {
            return refuse("command_args[0]", RequestFault::Empty { needed: "a program" });
        }
        Some(_) => {}
    }
    for (index, argument) in draft.command.iter().enumerate() {
        exec_string(&format!("command_args[{index}]"), argument.len(), argument)?;
    }
    Ok(())
}

fn environment(draft: &Draft) -> Checked {
    for (index, (key, value)) in draft.environment.iter().enumerate() {
        let field = format!("environment_vars[{index}].key");
        if key.is_empty() {
            return refuse(field, RequestFault::Empty { needed: "the name of a variable" });
        }
        if key.contains(&b'=') {
            return refuse(field, RequestFault::EqualsSign);
        }
        let len = key.len().saturating_add(value.len()).saturating_add(1);
        exec_string(&field, key.len(), key)?;
        exec_string(&format!("environment_vars[{index}].value"), len, value)?;
    }
    Ok(())
}

/// Checks bytes that become part of a string of `len` bytes at exec.
fn exec_string(field: &str, len: usize, bytes: &[u8]) -> Checked {
    if memchr::memchr(0, bytes).is_some() {
        return refuse(field, RequestFault::Nul);
    }
    size(field, len, limits::EXEC_STRING_BYTES)
}

fn exec_size(draft: &Draft) -> Checked {
    const NUL_AND_POINTER: usize = 1 + size_of::<usize>();
    let arguments: usize = draft.command.iter().map(|argument| argument.len() + NUL_AND_POINTER).sum();
    let variables: usize =
        draft.environment.iter().map(|(key, value)| key.len() + 1 + value.len() + NUL_AND_POINTER).sum();
    let len = arguments + variables;
    if len > limits::EXEC_BYTES {
        return refuse("command_args", RequestFault::ExecTooLong { len });
    }
    Ok(())
}

fn constraints(constraints: &Constraints) -> Checked {
    if let Some(system) = &constraints.system {
        size("constraints.system", system.len(), limits::SYSTEM_BYTES)?;
        if system.is_empty() || !system.bytes().all(|byte| byte.is_ascii_graphic()) {
            let system = printable(system.as_bytes());
            return refuse("constraints.system", RequestFault::System { system });
        }
    }
    let mut seen = HashSet::new();
    for (index, path) in constraints.ro_paths.iter().enumerate() {
        let field = host_path_field(index);
        if let Err(fault) = place_of(path) {
            return refuse(field, fault);
        }
        if !seen.insert(path.as_os_str()) {
            let item = printable(path.as_os_str().as_bytes());
            return refuse(field, RequestFault::Duplicate { item });
        }
    }
    Ok(())
}

fn host_path_field(index: usize) -> String {
    format!("constraints.available_ro_paths[{index}]")
}

/// Where a path of the worker appears in the sandbox.
fn place_of(path: &Path) -> Result<SandboxPath, RequestFault> {
    match path.as_os_str().as_bytes() {
        b"/" => Err(RequestFault::HostRoot),
        // What follows the slash is held to the rules of the sandbox: one spelling per path.
        [b'/', rest @ ..] => match SandboxPath::new(rest) {
            Ok(path) => Ok(path),
            Err(PathFault::Absolute) => Err(PathFault::DoubleSlash.into()),
            Err(fault) => Err(fault.into()),
        },
        [] => Err(PathFault::Empty.into()),
        relative => Err(RequestFault::RelativeHostPath { path: printable(relative) }),
    }
}

fn needles(draft: &Draft) -> Checked {
    match draft.needles.iter().position(Vec::is_empty) {
        Some(index) => refuse(
            format!("refscan_needles[{index}]"),
            RequestFault::Empty { needed: "a byte string to search for" },
        ),
        None => Ok(()),
    }
}

fn inputs_dir(draft: &Draft) -> Checked {
    outside(&KERNEL_TREES, "inputs_dir", &draft.inputs_dir)?;
    outside(&FURNISHED_TREES, "inputs_dir", &draft.inputs_dir)?;
    for (index, name) in draft.inputs.keys().enumerate() {
        if let Err(fault) = draft.inputs_dir.join(name) {
            return refuse(format!("inputs[{index}].name"), fault);
        }
    }
    Ok(())
}

fn scratch_paths(draft: &Draft) -> Checked {
    for (index, path) in draft.scratch_paths.iter().enumerate() {
        let field = format!("scratch_paths[{index}]");
        below_root(&field, path)?;
        outside(&KERNEL_TREES, &field, path)?;
        outside(&FURNISHED_TREES, &field, path)?;
        match overlap(draft, path) {
            None | Some((Relation::Contains, ..)) => {}
            Some(overlap) => laid_over(draft, &field, path, overlap)?,
        }
    }
    Ok(())
}

/// Refuses to mount anything at a path that is or lies in an input, but for one case: a root file system made of
/// inputs is full of directories that are there to be mounted on.
fn laid_over(draft: &Draft, field: &str, path: &SandboxPath, overlap: Overlap<'_>) -> Checked {
    match overlap {
        (Relation::Equals | Relation::Within, _, Node::Directory { .. }) if draft.inputs_dir.is_root() => {
            Ok(())
        }
        overlap => refuse_overlap(draft, field, path, overlap),
    }
}

fn outputs(draft: &Draft) -> Checked {
    let mut seen = HashSet::new();
    for (index, path) in draft.outputs.iter().enumerate() {
        let field = format!("outputs[{index}]");
        below_root(&field, path)?;
        outside(&KERNEL_TREES, &field, path)?;
        if !seen.insert(path) {
            return refuse(field, RequestFault::Duplicate { item: path.to_string() });
        }
        if draft.owner_of(path).is_none() {
            return refuse(field, RequestFault::NoScratch { path: path.clone() });
        }
        clear_of_inputs(draft, &field, path)?;
    }
    Ok(())
}

fn working_dir(draft: &Draft) -> Checked {
    let (field, path) = ("working_dir", &draft.working_dir);
    below_root(field, path)?;
    outside(&KERNEL_TREES, field, path)?;
    // To start where the shell lies is fine.
    if path.as_bytes() != b"bin" {
        clear_of_shell(draft, field, path)?;
    }
    match overlap(draft, path) {
        Some(overlap @ (Relation::Equals | Relation::Within, _, Node::File { .. })) => {
            refuse_overlap(draft, field, path, overlap)
        }
        _ => Ok(()),
    }
}

fn additional_files(draft: &Draft) -> Checked {
    for (index, path) in draft.additional_files.keys().enumerate() {
        let field = format!("additional_files[{index}].path");
        below_root(&field, path)?;
        outside(&KERNEL_TREES, &field, path)?;
        not_the_directory(&["tmp", "etc"], &field, path)?;
        clear_of_inputs(draft, &field, path)?;
        clear_of_shell(draft, &field, path)?;
        let above = path.ancestors().skip(1).find_map(|above| draft.additional_files.get_key_value(above));
        if let Some((above, _)) = above {
            return refuse_conflict(field, path, Relation::Within, "the additional file", above);
        }
    }
    // What must be a directory, or is yet to be made, can't be one of the files, nor lie in one.
    let scratch = draft.scratch_paths.iter().map(|path| ("the scratch path", path));
    let outputs = draft.outputs.iter().map(|path| ("the output", path));
    let others = [("working_dir", &draft.working_dir), ("inputs_dir", &draft.inputs_dir)];
    for (other, other_path) in scratch.chain(outputs).chain(others) {
        let file = other_path.ancestors().find_map(|above| draft.additional_files.get_key_value(above));
        if let Some((file, _)) = file {
            let index = draft.additional_files.keys().take_while(|path| *path < file).count();
            let relation = if file == other_path { Relation::Equals } else { Relation::Contains };
            return refuse_conflict(
                format!("additional_files[{index}].path"),
                file,
                relation,
                other,
                other_path,
            );
        }
    }
    Ok(())
}

/// What the worker lends of its own file system lies over all else, and nothing can be put into it.
fn host_paths(draft: &Draft) -> Checked {
    let scratch = draft.scratch_paths.iter().map(|path| ("the scratch path", path));
    let scratch: Occupied<'_> = scratch.map(|other| (other.1.as_bytes(), other)).collect();
    let files = draft.additional_files.keys().map(|path| ("the additional file", path));
    let outputs = draft.outputs.iter().map(|path| ("the output", path));
    let whole: Occupied<'_> = files.chain(outputs).map(|other| (other.1.as_bytes(), other)).collect();
    for (index, path) in draft.constraints.ro_paths.iter().enumerate() {
        let field = host_path_field(index);
        let path = match place_of(path) {
            Ok(path) => path,
            Err(fault) => return refuse(field, fault),
        };
        clear_of_own(&field, &path)?;
        clear_of_shell(draft, &field, &path)?;
        if let Some(overlap) = overlap(draft, &path) {
            laid_over(draft, &field, &path, overlap)?;
        }
        let other = match occupant(&scratch, &path) {
            // Beside what the build makes there it does no harm.
            None | Some((Relation::Within, _)) => occupant(&whole, &path),
            other => other,
        };
        if let Some((relation, (other, other_path))) = other {
            return refuse_conflict(field, &path, relation, other, other_path);
        }
    }
    Ok(())
}

/// Refuses what would cover a part of the sandbox that is its own in every build.
fn clear_of_own(field: &str, path: &SandboxPath) -> Checked {
    outside(&["proc"], field, path)?;
    not_the_directory(&["dev", "tmp"], field, path)?;
    let mut names = path.components();
    match (names.next(), names.next()) {
        (Some(b"dev"), Some(name)) if OWN_DEVICES.contains(&name) => {
            refuse(field, RequestFault::Reserved { path: path.clone(), tree: "dev" })
        }
        _ => Ok(()),
    }
}

/// What stands where, by path: what it is called, and the path again.
type Occupied<'a> = BTreeMap<&'a [u8], (&'static str, &'a SandboxPath)>;

/// Something in `others` that `path` is, contains or lies in: of several that which `path` is, or contains.
fn occupant<'a>(
    others: &Occupied<'a>,
    path: &SandboxPath,
) -> Option<(Relation, (&'static str, &'a SandboxPath))> {
    if let Some(other) = others.get(path.as_bytes()) {
        return Some((Relation::Equals, *other));
    }
    let below = [path.as_bytes(), b"/"].concat();
    let next = others.range::<[u8], _>((Bound::Included(below.as_slice()), Bound::Unbounded)).next();
    match next.filter(|(next, _)| next.starts_with(&below)) {
        Some((_, other)) => Some((Relation::Contains, *other)),
        None => Some((Relation::Within, *path.ancestors().find_map(|above| others.get(above))?)),
    }
}

/// Refuses a path that has to do with the shell, if one is asked for.
fn clear_of_shell(draft: &Draft, field: &str, path: &SandboxPath) -> Checked {
    let shell = SandboxPath::shell();
    match (draft.constraints.shell, Relation::of(path, &shell)) {
        (Shell::Required, Some(relation)) => {
            let other = "the shell that constraints.provide_bin_sh asks for,";
            refuse_conflict(field, path, relation, other, &shell)
        }
        _ => Ok(()),
    }
}

/// Refuses what would stand in the place of a directory at the root.
fn not_the_directory(trees: &[&'static str], field: &str, path: &SandboxPath) -> Checked {
    match trees.iter().find(|tree| path.as_bytes() == tree.as_bytes()) {
        Some(tree) => refuse(field, RequestFault::Reserved { path: path.clone(), tree }),
        None => Ok(()),
    }
}

fn below_root(field: &str, path: &SandboxPath) -> Checked {
    if path.is_root() { refuse(field, PathFault::Empty) } else { Ok(()) }
}

fn outside(trees: &[&'static str], field: &str, path: &SandboxPath) -> Checked {
    let first = path.components().next();
    match trees.iter().find(|tree| first == Some(tree.as_bytes())) {
        Some(tree) => refuse(field, RequestFault::Reserved { path: path.clone(), tree }),
        None => Ok(()),
    }
}

/// An input that a path has to do with, and how the path lies to it.
type Overlap<'a> = (Relation, &'a Name, &'a Node);

/// The input that `path` is, lies in or contains; of several the first. What `/tmp` covers doesn't count.
fn overlap<'a>(draft: &'a Draft, path: &SandboxPath) -> Option<Overlap<'a>> {
    if draft.inputs_dir.is_root() && SandboxPath::tmp().contains(path) {
        return None;
    }
    let Some(rest) = path.strip_prefix(&draft.inputs_dir).filter(|rest| !rest.is_root()) else {
        let (name, node) = draft.inputs.first_key_value()?;
        return path.contains(&draft.inputs_dir).then_some((Relation::Contains, name, node));
    };
    let mut components = rest.components();
    let (name, node) = draft.inputs.get_key_value(components.next()?)?;
    let relation = if components.next().is_some() { Relation::Within } else { Relation::Equals };
    Some((relation, name, node))
}

/// Refuses a path that has to do with an input, unless a scratch path over that input owns it.
fn clear_of_inputs(draft: &Draft, field: &str, path: &SandboxPath) -> Checked {
    let Some(overlap @ (relation, name, _)) = self::overlap(draft, path) else { return Ok(()) };
    let covered = relation != Relation::Contains
        && draft
            .owner_of(path)
            .and_then(|owner| self::overlap(draft, owner))
            .is_some_and(|(relation, covered, _)| relation != Relation::Contains && covered == name);
    if covered { Ok(()) } else { refuse_overlap(draft, field, path, overlap) }
}

fn refuse_overlap(
    draft: &Draft,
    field: &str,
    path: &SandboxPath,
    (relation, name, _): Overlap<'_>,
) -> Checked {
    match draft.inputs_dir.join(name) {
        Ok(input) => refuse_conflict(field, path, relation, "the input", &input),
        Err(fault) => refuse(field, fault),
    }
}

fn refuse_conflict(
    field: impl Into<String>,
    path: &SandboxPath,
    relation: Relation,
    other: &str,
    other_path: &SandboxPath,
) -> Checked {
    let (path, other, other_path) = (path.clone(), other.to_owned(), other_path.clone());
    refuse(field, RequestFault::Conflict { path, relation, other, other_path })
}
