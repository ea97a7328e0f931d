//! What is told of a build: checked events, and the wire's messages to and fro.

use bytes::Bytes;
use cofferdam_proto::build as wire;
use cofferdam_proto::build::build_completed;
use cofferdam_proto::build::build_event::Event as WireEvent;
use cofferdam_proto::build::log_output::Stream as WireStream;

use super::error::Failure;
use crate::castore::node::{from_entry, printable, to_entry};
use crate::castore::{Node, NodeError};

/// One event of a build.
///
/// `Started` comes once and first, then any number of `Log`, then one `Refscan` per output in the
/// request's order, then `Completed`; or `Failed` in place of all that is left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The build has a slot and begins.
    Started {
        /// The worker's name for it.
        build_id: String,
    },
    /// The build wrote something.
    Log {
        /// Where to.
        stream: LogStream,
        /// One line with its newline, or a piece of a long or unfinished one.
        data: Bytes,
    },
    /// An output was searched.
    Refscan {
        /// Index into the request's outputs.
        output: u32,
        /// Indices of the needles found in it, ascending.
        needles: Vec<u64>,
    },
    /// The build succeeded.
    Completed {
        /// What it left behind, in the request's order.
        outputs: Vec<Output>,
    },
    /// The build failed by itself.
    Failed(Failure),
}

/// One of the two streams that a build writes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogStream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// What a build left behind under one of its output paths.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// The root of it.
    pub node: Node,
    /// Indices of the needles found in it, ascending.
    pub needles: Vec<u64>,
}

impl Event {
    /// The canonical JSON form of the wire's message, on one line without a newline.
    pub fn to_json(&self) -> String {
        cofferdam_proto::json::to_json(&wire::BuildEvent::from(self.clone()))
    }
}

impl From<Event> for wire::BuildEvent {
    fn from(event: Event) -> Self {
        let event = match event {
            Event::Started { build_id } => WireEvent::Started(wire::BuildStarted { build_id }),
            Event::Log { stream, data } => {
                let stream = match stream {
                    LogStream::Stdout => WireStream::Stdout,
                    LogStream::Stderr => WireStream::Stderr,
                };
                WireEvent::Log(wire::LogOutput { stream: stream.into(), data })
            }
            Event::Refscan { output, needles } => {
                WireEvent::Refscan(wire::RefscanResult { output_index: output, found_needles: needles })
            }
            Event::Completed { outputs } => {
                let outputs = outputs.into_iter().map(|Output { node, needles }| build_completed::Output {
                    output: Some(to_entry(Vec::new(), &node)),
                    needles,
                });
                WireEvent::Completed(wire::BuildCompleted { outputs: outputs.collect() })
            }
            Event::Failed(Failure { message, exit_code }) => {
                WireEvent::Failed(wire::BuildFailed { message, exit_code })
            }
        };
        Self { event: Some(event) }
    }
}

impl TryFrom<wire::BuildEvent> for Event {
    type Error = EventError;

    fn try_from(message: wire::BuildEvent) -> Result<Self, EventError> {
        Ok(match message.event.ok_or(EventError::Unset)? {
            WireEvent::Started(wire::BuildStarted { build_id }) => Self::Started { build_id },
            WireEvent::Log(wire::LogOutput { stream, data }) => {
                let stream = match WireStream::try_from(stream) {
                    Ok(WireStream::Stdout) => LogStream::Stdout,
                    Ok(WireStream::Stderr) => LogStream::Stderr,
                    Ok(WireStream::Unspecified) | Err(_) => {
                        return Err(EventError::Stream { number: stream });
                    }
                };
                Self::Log { stream, data }
            }
            WireEvent::Refscan(wire::RefscanResult { output_index, found_needles }) => {
                let needles = ascending(found_needles).ok_or(EventError::Needles)?;
                Self::Refscan { output: output_index, needles }
            }
            WireEvent::Completed(wire::BuildCompleted { outputs }) => {
                let outputs = outputs.into_iter().enumerate().map(|(index, message)| {
                    output(message).map_err(|fault| EventError::Output { index, fault })
                });
                Self::Completed { outputs: outputs.collect::<Result<_, _>>()? }
            }
            WireEvent::Failed(wire::BuildFailed { message, exit_code }) => {
                Self::Failed(Failure { message, exit_code })
            }
        })
    }
}

fn output(message: build_completed::Output) -> Result<Output, OutputFault> {
    let (name, node) = from_entry(message.output.ok_or(OutputFault::Unset)?)?;
    if !name.is_empty() {
        return Err(OutputFault::Named { name: printable(&name) });
    }
    let needles = ascending(message.needles).ok_or(OutputFault::Needles)?;
    Ok(Output { node, needles })
}

fn ascending(indices: Vec<u64>) -> Option<Vec<u64>> {
    indices.is_sorted_by(|a, b| a < b).then_some(indices)
}

/// What makes a worker's event invalid.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EventError {
    /// It is none of the events there are.
    #[error("the event is of no known kind")]
    Unset,
    /// A log event belongs to no stream.
    #[error("log.stream: {number} is neither standard output (1) nor standard error (2)")]
    Stream {
        /// The stream's number.
        number: i32,
    },
    /// The needles found in an output don't ascend.
    #[error("refscan.found_needles: the indices do not ascend")]
    Needles,
    /// An output is invalid.
    #[error("completed.outputs[{index}]: {fault}")]
    Output {
        /// Which one.
        index: usize,
        /// What is wrong with it.
        fault: OutputFault,
    },
}

/// What makes an output in an event invalid.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OutputFault {
    /// There is none.
    #[error("there is no entry")]
    Unset,
    /// It has a name, which roots don't have.
    #[error("the entry has a name, \"{name}\"; that of an output is empty")]
    Named {
        /// The name, escaped.
        name: String,
    },
    /// The needles found in it don't ascend.
    #[error("the indices of its needles do not ascend")]
    Needles,
    /// It is no node.
    #[error("{0}")]
    Node(#[from] NodeError),
}

#[cfg(test)]
mod tests {
    use cofferdam_proto::castore::{Entry, FileEntry, entry};

    use super::*;
    use crate::castore::Digest;

    fn completed(name: &[u8], digest_len: usize, needles: Vec<u64>) -> WireEvent {
        let digest = vec![1; digest_len];
        let file = FileEntry { name: name.to_vec(), digest, size: 0, executable: false };
        let output = Some(Entry { entry: Some(entry::Entry::File(file)) });
        WireEvent::Completed(wire::BuildCompleted {
            outputs: vec![build_completed::Output { output, needles }],
        })
    }

    fn log(stream: i32) -> WireEvent {
        WireEvent::Log(wire::LogOutput { stream, data: Bytes::new() })
    }

    #[test]
    fn invalid_events_are_refused() {
        let unset = WireEvent::Completed(wire::BuildCompleted { outputs: vec![Default::default()] });
        let needles =
            |found_needles| WireEvent::Refscan(wire::RefscanResult { output_index: 0, found_needles });
        let cases = [
            (None, "the event is of no known kind"),
            (Some(log(0)), "log.stream: 0 is neither standard output (1) nor standard error (2)"),
            (Some(log(3)), "log.stream: 3 is neither standard output (1) nor standard error (2)"),
            (Some(needles(vec![2, 1])), "refscan.found_needles: the indices do not ascend"),
            (Some(needles(vec![1, 1])), "refscan.found_needles: the indices do not ascend"),
            (Some(unset), "completed.outputs[0]: there is no entry"),
            (
                Some(completed(b"out", 32, vec![])),
                "completed.outputs[0]: the entry has a name, \"out\"; that of an output is empty",
            ),
            (Some(completed(b"", 31, vec![])), "completed.outputs[0]: a digest has 32 bytes, this one 31"),
            (
                Some(completed(b"", 32, vec![7, 7])),
                "completed.outputs[0]: the indices of its needles do not ascend",
            ),
        ];
        for (event, message) in cases {
            let error = Event::try_from(wire::BuildEvent { event }).unwrap_err();
            assert_eq!(error.to_string(), message);
        }
        let fine = wire::BuildEvent { event: Some(completed(b"", 32, vec![0, 7])) };
        assert!(Event::try_from(fine).is_ok());
    }

    #[test]
    fn json_lines() {
        let node = Node::File { digest: Digest::from([0; 32]), size: 5, executable: true };
        let cases = [
            (Event::Started { build_id: "b1".to_owned() }, r#"{"started":{"buildId":"b1"}}"#.to_owned()),
            (
                Event::Log { stream: LogStream::Stderr, data: Bytes::from_static(b"\xffhi\n") },
                r#"{"log":{"stream":"STREAM_STDERR","data":"/2hpCg=="}}"#.to_owned(),
            ),
            (
                Event::Refscan { output: 1, needles: vec![0, 2] },
                r#"{"refscan":{"outputIndex":1,"foundNeedles":["0","2"]}}"#.to_owned(),
            ),
            (
                Event::Completed { outputs: vec![Output { node, needles: vec![] }] },
                format!(
                    r#"{{"completed":{{"outputs":[{{"output":{{"file":{{"digest":"{}=","size":"5","executable":true}}}}}}]}}}}"#,
                    "A".repeat(43)
                ),
            ),
            (
                Event::Failed(Failure { message: "no".to_owned(), exit_code: Some(0) }),
                r#"{"failed":{"message":"no","exitCode":0}}"#.to_owned(),
            ),
            (
                Event::Failed(Failure { message: "no".to_owned(), exit_code: None }),
                r#"{"failed":{"message":"no"}}"#.to_owned(),
            ),
        ];
        for (event, text) in cases {
            assert_eq!(event.to_json(), text);
        }
    }
}
