//! Whatever crosses the wire, or is written as JSON, comes back as it was; and what is damaged on the
//! way is refused, not more.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use cofferdam_proto::build::{BuildEvent, BuildRequest};
use cofferdam_proto::castore as wire;
use cofferdam_proto::json::{from_json, to_json};
use proptest::collection::{btree_map, btree_set, vec};
use proptest::option;
use proptest::prelude::*;
use prost::Message;

use super::error::Failure;
use super::events::{Event, LogStream, Output};
use super::request::{Constraints, Draft, Network, Request, SandboxPath, Shell};
use crate::castore::{Digest, Directory, Name, Node, Target};

fn digest() -> impl Strategy<Value = Digest> {
    any::<[u8; 32]>().prop_map(Digest::from)
}

/// A name of any bytes that starts with `first`.
fn name(first: &'static str) -> impl Strategy<Value = Name> {
    vec(any::<u8>().prop_filter("no part of a name", |byte| ![0, b'/'].contains(byte)), 0..20)
        .prop_map(move |rest| Name::new([first.as_bytes(), &rest].concat()).unwrap())
}

fn node(sizes: impl Strategy<Value = u64>) -> impl Strategy<Value = Node> {
    let target = vec(1..=u8::MAX, 1..30);
    prop_oneof![
        (digest(), sizes).prop_map(|(digest, size)| Node::Directory { digest, size }),
        (digest(), any::<u64>(), any::<bool>()).prop_map(|(digest, size, executable)| Node::File {
            digest,
            size,
            executable
        }),
        target.prop_map(|target| Node::Symlink { target: Target::new(target).unwrap() }),
    ]
}

/// A path of up to three components, each starting with `first`: paths of different firsts never meet.
fn path(first: char) -> impl Strategy<Value = String> {
    vec("[a-z0-9.+-]{0,3}|ü", 1..4).prop_map(move |names| {
        names.into_iter().map(|name| format!("{first}{name}")).collect::<Vec<_>>().join("/")
    })
}

fn sandbox_path(text: String) -> SandboxPath {
    SandboxPath::new(text).unwrap()
}

/// Text without NUL bytes.
fn text(least: usize) -> impl Strategy<Value = Vec<u8>> {
    vec(prop_oneof![proptest::char::range(' ', '~'), proptest::char::range('\u{1}', '\u{10ffff}')], least..12)
        .prop_map(|chars| chars.into_iter().collect::<String>().into_bytes())
}

fn constraints() -> impl Strategy<Value = Constraints> {
    let network = prop_oneof![Just(Network::None), Just(Network::Required)];
    let shell = prop_oneof![Just(Shell::None), Just(Shell::Required)];
    let parts = ("[a-z0-9_]{1,9}-[a-z]{1,9}", any::<u64>(), btree_set(path('h'), 0..4), network, shell);
    let some = parts.prop_map(|(system, min_memory, ro_paths, network, shell)| Constraints {
        system: Some(system),
        min_memory,
        ro_paths: ro_paths.into_iter().rev().map(|path| PathBuf::from(format!("/{path}"))).collect(),
        network,
        shell,
    });
    prop_oneof![Just(Constraints::default()), some]
}

prop_compose! {
    pub(super) fn request()(
        inputs in btree_map(name("i"), node(any::<u64>()), 0..6),
        program in text(1),
        arguments in vec(text(0), 0..5),
        working_dir in path('w'),
        inputs_dir in prop_oneof![Just(None), path('j').prop_map(Some), Just(Some("nix/store".to_owned()))],
        inputs_dir_is_scratch in any::<bool>(),
        scratch in btree_set(path('k'), 1..5),
        outputs in btree_map(path('o'), any::<prop::sample::Index>(), 0..5),
        environment in btree_map("[^=\0]{1,8}".prop_map(String::into_bytes), vec(1..=u8::MAX, 0..20), 0..5),
        constraints in constraints(),
        files in btree_map("[a-z]{1,4}", (option::of(any::<prop::sample::Index>()), vec(any::<u8>(), 0..30)), 0..5),
        needles in vec(text(1), 0..6),
    ) -> Request {
        let mut scratch = scratch;
        if let (Some(dir), true) = (&inputs_dir, inputs_dir_is_scratch) {
            scratch.insert(dir.clone());
        }
        let roots: Vec<_> = scratch.iter().cloned().collect();
        let under = |index: prop::sample::Index, rest: &str| sandbox_path(format!("{}/{rest}", index.get(&roots)));
        let outputs: BTreeSet<_> = outputs.into_iter().map(|(rest, index)| under(index, &rest)).collect();
        let files: BTreeMap<_, _> = files.into_iter().map(|(name, (index, contents))| match index {
            Some(index) => (under(index, &format!("f/{name}")), contents),
            None => (sandbox_path(format!("f/{name}")), contents),
        }).collect();
        Request::new(Draft {
            inputs,
            command: [vec![program], arguments].concat(),
            working_dir: sandbox_path(working_dir),
            scratch_paths: scratch.into_iter().map(sandbox_path).collect(),
            inputs_dir: inputs_dir.map_or_else(SandboxPath::root, sandbox_path),
            outputs: outputs.into_iter().rev().collect(),
            environment,
            constraints,
            additional_files: files,
            needles,
        }).unwrap()
    }
}

fn needle_indices() -> impl Strategy<Value = Vec<u64>> {
    btree_set(any::<u64>(), 0..5).prop_map(|indices| indices.into_iter().collect())
}

fn event() -> impl Strategy<Value = Event> {
    let stream = prop_oneof![Just(LogStream::Stdout), Just(LogStream::Stderr)];
    let output = (node(any::<u64>()), needle_indices()).prop_map(|(node, needles)| Output { node, needles });
    prop_oneof![
        any::<String>().prop_map(|build_id| Event::Started { build_id }),
        (stream, vec(any::<u8>(), 0..50)).prop_map(|(stream, data)| Event::Log { stream, data: data.into() }),
        (any::<u32>(), needle_indices()).prop_map(|(output, needles)| Event::Refscan { output, needles }),
        vec(output, 0..4).prop_map(|outputs| Event::Completed { outputs }),
        (any::<String>(), any::<Option<i32>>())
            .prop_map(|(message, exit_code)| Event::Failed(Failure { message, exit_code })),
    ]
}

fn directory() -> impl Strategy<Value = Directory> {
    btree_map(name("n"), node(0..1_u64 << 40), 0..12).prop_map(|entries| {
        let mut directory = Directory::new();
        for (name, node) in entries {
            directory.insert(name, node).unwrap();
        }
        directory
    })
}

/// `bytes` with some of them replaced, removed or doubled.
fn damage(bytes: &mut Vec<u8>, places: Vec<(prop::sample::Index, u8, u8)>) {
    for (place, how, byte) in places {
        let at = place.index(bytes.len().max(1));
        match how % 3 {
            _ if bytes.is_empty() => bytes.push(byte),
            0 => bytes[at] = byte,
            1 => drop(bytes.remove(at)),
            _ => bytes.insert(at, byte),
        }
    }
}

fn damages() -> impl Strategy<Value = Vec<(prop::sample::Index, u8, u8)>> {
    vec((any::<prop::sample::Index>(), any::<u8>(), any::<u8>()), 1..6)
}

proptest! {
    #[test]
    fn requests(request in request()) {
        let message = BuildRequest::try_from(&request).unwrap();
        let decoded = BuildRequest::decode(message.encode_to_vec().as_slice()).unwrap();
        prop_assert_eq!(&decoded, &message);
        let back = Request::try_from(decoded).unwrap();
        prop_assert_eq!(&back, &request);
        prop_assert_eq!(BuildRequest::try_from(&back).unwrap(), message.clone());
        let json = to_json(&message);
        prop_assert_eq!(from_json::<BuildRequest>(json.as_bytes()).unwrap(), message);
        prop_assert_eq!(Request::from_json(json.as_bytes()).unwrap(), request);
    }

    #[test]
    fn events(event in event()) {
        let message = BuildEvent::from(event.clone());
        let decoded = BuildEvent::decode(message.encode_to_vec().as_slice()).unwrap();
        prop_assert_eq!(Event::try_from(decoded).unwrap(), event.clone());
        let json = event.to_json();
        prop_assert!(!json.contains('\n'));
        prop_assert_eq!(from_json::<BuildEvent>(json.as_bytes()).unwrap(), message);
    }

    #[test]
    fn directories(directory in directory()) {
        let message = wire::Directory::from(&directory);
        prop_assert_eq!(Directory::try_from(message.clone()).unwrap(), directory.clone());
        prop_assert_eq!(Directory::decode(&directory.encode()).unwrap(), directory);
        prop_assert_eq!(from_json::<wire::Directory>(to_json(&message).as_bytes()).unwrap(), message);
    }

    /// Nothing from outside makes these panic, and what is taken is whole.
    #[test]
    fn damaged_messages(request in request(), event in event(), directory in directory(), places in damages()) {
        let mut bytes = BuildRequest::try_from(&request).unwrap().encode_to_vec();
        damage(&mut bytes, places.clone());
        if let Ok(message) = BuildRequest::decode(bytes.as_slice())
            && let Ok(request) = Request::try_from(message)
        {
            prop_assert_eq!(&Request::new(Draft::clone(&request)).unwrap(), &request);
            prop_assert!(BuildRequest::try_from(&request).is_ok());
        }
        let mut bytes = BuildEvent::from(event).encode_to_vec();
        damage(&mut bytes, places.clone());
        if let Ok(message) = BuildEvent::decode(bytes.as_slice()) {
            drop(Event::try_from(message));
        }
        let mut bytes = directory.encode();
        damage(&mut bytes, places);
        if let Ok(directory) = Directory::decode(&bytes) {
            prop_assert_eq!(directory.encode(), bytes);
        }
    }

    #[test]
    fn damaged_json(request in request(), places in damages()) {
        let mut json = to_json(&BuildRequest::try_from(&request).unwrap()).into_bytes();
        damage(&mut json, places);
        if let Err(error) = Request::from_json(&json) {
            prop_assert!(!error.to_string().is_empty());
        }
    }
}
