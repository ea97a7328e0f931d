//! Requests to and from the wire's messages, and from their JSON form.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use cofferdam_proto::build as wire;
use cofferdam_proto::build::build_request::{AdditionalFile, BuildConstraints, EnvVar};
use cofferdam_proto::castore::Entry;

use super::check::count;
use super::error::{InvalidRequest, RequestFault, RequestJsonError};
use super::path::SandboxPath;
use super::{Constraints, Draft, Network, Request, Shell, limits};
use crate::castore::node::{from_entry, printable, to_entry};
use crate::castore::{Name, Node, NodeError};

impl Request {
    /// Reads the canonical JSON form of a `BuildRequest`.
    ///
    /// # Errors
    /// [`RequestJsonError::Json`] names line and column, [`RequestJsonError::Invalid`] the field.
    pub fn from_json(text: &[u8]) -> Result<Self, RequestJsonError> {
        let message: wire::BuildRequest = cofferdam_proto::json::from_json(text)?;
        Ok(Self::try_from(message)?)
    }
}

impl TryFrom<wire::BuildRequest> for Request {
    type Error = InvalidRequest;

    /// Checks each field by itself, the order of the sorted lists, and then what [`Request::new`] does.
    fn try_from(message: wire::BuildRequest) -> Result<Self, InvalidRequest> {
        counts(&message)?;
        let scratch_paths = paths("scratch_paths", message.scratch_paths)?;
        ascending(&scratch_paths, |index| format!("scratch_paths[{index}]"), |path| path.as_bytes())?;
        Self::new(Draft {
            inputs: inputs(message.inputs)?,
            command: message.command_args.into_iter().map(String::into_bytes).collect(),
            working_dir: path(|| "working_dir".to_owned(), message.working_dir)?,
            scratch_paths: BTreeSet::from_iter(scratch_paths),
            inputs_dir: match message.inputs_dir {
                empty if empty.is_empty() => SandboxPath::root(),
                text => path(|| "inputs_dir".to_owned(), text)?,
            },
            outputs: paths("outputs", message.outputs)?,
            environment: environment(message.environment_vars)?,
            constraints: constraints(message.constraints)?,
            additional_files: additional_files(message.additional_files)?,
            needles: message.refscan_needles.into_iter().map(String::into_bytes).collect(),
        })
    }
}

/// Refuses lists that are too long, before anything is made of them.
fn counts(message: &wire::BuildRequest) -> Result<(), InvalidRequest> {
    count("inputs", message.inputs.len(), limits::INPUTS)?;
    count("scratch_paths", message.scratch_paths.len(), limits::SCRATCH_PATHS)?;
    count("outputs", message.outputs.len(), limits::OUTPUTS)?;
    count("additional_files", message.additional_files.len(), limits::ADDITIONAL_FILES)?;
    count("refscan_needles", message.refscan_needles.len(), limits::NEEDLES)?;
    let ro_paths = message.constraints.as_ref().map_or(0, |some| some.available_ro_paths.len());
    count("constraints.available_ro_paths", ro_paths, limits::RO_PATHS)
}

fn path(field: impl Fn() -> String, text: String) -> Result<SandboxPath, InvalidRequest> {
    SandboxPath::new(text).map_err(|fault| InvalidRequest::new(field(), fault))
}

fn paths(field: &str, texts: Vec<String>) -> Result<Vec<SandboxPath>, InvalidRequest> {
    texts.into_iter().enumerate().map(|(index, text)| path(|| format!("{field}[{index}]"), text)).collect()
}

/// Refuses a list whose keys don't ascend strictly.
fn ascending<'a, T>(
    list: &'a [T],
    field: impl Fn(usize) -> String,
    key: impl Fn(&'a T) -> &'a [u8],
) -> Result<(), InvalidRequest> {
    for (index, (previous, item)) in list.iter().zip(list.iter().skip(1)).enumerate() {
        let (previous, item) = (key(previous), key(item));
        let fault = match previous.cmp(item) {
            std::cmp::Ordering::Less => continue,
            std::cmp::Ordering::Equal => RequestFault::Duplicate { item: printable(item) },
            std::cmp::Ordering::Greater => {
                RequestFault::Unsorted { item: printable(item), previous: printable(previous) }
            }
        };
        return Err(InvalidRequest::new(field(index + 1), fault));
    }
    Ok(())
}

fn inputs(entries: Vec<Entry>) -> Result<BTreeMap<Name, Node>, InvalidRequest> {
    let mut inputs = Vec::with_capacity(entries.len());
    for (index, entry) in entries.into_iter().enumerate() {
        let input = from_entry(entry).and_then(|(name, node)| Ok((Name::new(name)?, node)));
        inputs.push(input.map_err(|fault| InvalidRequest::new(entry_field(index, &fault), fault))?);
    }
    ascending(&inputs, |index| format!("inputs[{index}].name"), |(name, _)| name.as_bytes())?;
    Ok(BTreeMap::from_iter(inputs))
}

fn entry_field(index: usize, fault: &NodeError) -> String {
    let part = match fault {
        NodeError::Name { .. } => ".name",
        NodeError::DigestLength { .. } => ".digest",
        NodeError::Target { .. } => ".target",
        _ => "",
    };
    format!("inputs[{index}]{part}")
}

fn environment(variables: Vec<EnvVar>) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, InvalidRequest> {
    ascending(&variables, |index| format!("environment_vars[{index}].key"), |var| var.key.as_bytes())?;
    Ok(variables.into_iter().map(|var| (var.key.into_bytes(), var.value)).collect())
}

fn constraints(message: Option<BuildConstraints>) -> Result<Constraints, InvalidRequest> {
    let Some(message) = message else { return Ok(Constraints::default()) };
    Ok(Constraints {
        system: Some(message.system),
        min_memory: message.min_memory,
        ro_paths: message.available_ro_paths.into_iter().map(PathBuf::from).collect(),
        network: if message.network_access { Network::Required } else { Network::None },
        shell: if message.provide_bin_sh { Shell::Required } else { Shell::None },
    })
}

fn additional_files(files: Vec<AdditionalFile>) -> Result<BTreeMap<SandboxPath, Vec<u8>>, InvalidRequest> {
    let field = |index| format!("additional_files[{index}].path");
    let mut checked = Vec::with_capacity(files.len());
    for (index, file) in files.into_iter().enumerate() {
        checked.push((path(|| field(index), file.path)?, file.contents));
    }
    ascending(&checked, field, |(path, _)| path.as_bytes())?;
    Ok(BTreeMap::from_iter(checked))
}

impl TryFrom<&Request> for wire::BuildRequest {
    type Error = InvalidRequest;

    /// The message for a request; fails for what only this process can be asked: text that is not
    /// UTF-8, and constraints without a system.
    fn try_from(request: &Request) -> Result<Self, InvalidRequest> {
        let Draft { inputs, command, working_dir, scratch_paths, inputs_dir, .. } = &**request;
        let Draft { outputs, environment, constraints, additional_files, needles, .. } = &**request;
        Ok(Self {
            inputs: inputs.iter().map(|(name, node)| to_entry(name.as_bytes().to_vec(), node)).collect(),
            command_args: texts("command_args", command)?,
            working_dir: text(|| "working_dir", working_dir.as_bytes())?,
            scratch_paths: texts("scratch_paths", scratch_paths.iter().map(SandboxPath::as_bytes))?,
            inputs_dir: text(|| "inputs_dir", inputs_dir.as_bytes())?,
            outputs: texts("outputs", outputs.iter().map(SandboxPath::as_bytes))?,
            environment_vars: indexed(environment)
                .map(|(index, (key, value))| {
                    let key = text(|| format!("environment_vars[{index}].key"), key)?;
                    Ok(EnvVar { key, value: value.clone() })
                })
                .collect::<Result<_, _>>()?,
            constraints: constraints_message(constraints)?,
            additional_files: indexed(additional_files)
                .map(|(index, (path, contents))| {
                    let path = text(|| format!("additional_files[{index}].path"), path.as_bytes())?;
                    Ok(AdditionalFile { path, contents: contents.clone() })
                })
                .collect::<Result<_, _>>()?,
            refscan_needles: texts("refscan_needles", needles)?,
        })
    }
}

fn constraints_message(constraints: &Constraints) -> Result<Option<BuildConstraints>, InvalidRequest> {
    if *constraints == Constraints::default() {
        return Ok(None);
    }
    let Some(system) = constraints.system.clone() else {
        let needed = "the system that the other constraints go with";
        return Err(InvalidRequest::new("constraints.system", RequestFault::Empty { needed }));
    };
    let ro_paths = constraints.ro_paths.iter().map(|path| path.as_os_str().as_bytes());
    Ok(Some(BuildConstraints {
        system,
        min_memory: constraints.min_memory,
        available_ro_paths: texts("constraints.available_ro_paths", ro_paths)?,
        network_access: constraints.network == Network::Required,
        provide_bin_sh: constraints.shell == Shell::Required,
    }))
}

fn indexed<I: IntoIterator>(items: I) -> impl Iterator<Item = (usize, I::Item)> {
    items.into_iter().enumerate()
}

fn text<F: Display>(field: impl Fn() -> F, bytes: &[u8]) -> Result<String, InvalidRequest> {
    String::from_utf8(bytes.to_vec())
        .map_err(|_| InvalidRequest::new(field().to_string(), RequestFault::NotUtf8))
}

fn texts<I>(field: &str, items: I) -> Result<Vec<String>, InvalidRequest>
where
    I: IntoIterator<Item: AsRef<[u8]>>,
{
    indexed(items).map(|(index, item)| text(|| format!("{field}[{index}]"), item.as_ref())).collect()
}
