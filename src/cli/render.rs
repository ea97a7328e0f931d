//! A build's events for people and for programs, and what a build's end means for the exit code.

use std::io::{self, Write};

use super::{Failed, remark};
use crate::build::events::{Event, LogStream, Output};
use crate::build::request::Request;
use crate::castore::Node;

/// How events are shown.
#[derive(Clone, Copy, Debug)]
pub enum Format {
    /// The build's output as if it ran here.
    Plain,
    /// Each event on a line of standard output, in the canonical JSON of the wire's message.
    Json,
}

/// How a build ended.
pub enum End {
    /// With these outputs.
    Completed(Vec<Output>),
    /// With this exit code.
    Failed(u8),
}

/// Shows an event. Yields the end, if that was it.
///
/// # Errors
/// Where standard output or error can't be written to.
pub fn show(event: &Event, format: Format) -> Result<Option<End>, Failed> {
    match format {
        Format::Plain => plain(event)?,
        Format::Json => writeln!(io::stdout(), "{}", event.to_json()).map_err(no_stdout)?,
    }
    Ok(match event {
        Event::Completed { outputs } => Some(End::Completed(outputs.clone())),
        Event::Failed(failure) => Some(End::Failed(exit_code(failure.exit_code))),
        _ => None,
    })
}

/// Standard output refused to be written to.
pub fn no_stdout(error: io::Error) -> Failed {
    Failed(format!("can't write to standard output: {error}"))
}

fn plain(event: &Event) -> Result<(), Failed> {
    match event {
        Event::Log { stream: LogStream::Stdout, data } => {
            let mut out = io::stdout().lock();
            out.write_all(data).and_then(|()| out.flush()).map_err(no_stdout)
        }
        Event::Log { stream: LogStream::Stderr, data } => {
            let written = io::stderr().lock().write_all(data);
            written.map_err(|error| Failed(format!("can't write to standard error: {error}")))
        }
        // A code of the command's own says it all, as in a shell.
        Event::Failed(failure)
            if failure.exit_code.is_some_and(|code| code < EXIT_NOT_EXECUTABLE)
                && failure.is_plain_exit() =>
        {
            Ok(())
        }
        Event::Failed(failure) => {
            remark(format_args!("cofferdam: {}", failure.message));
            Ok(())
        }
        _ => Ok(()),
    }
}

/// From here on exit codes stand for something else than the command's own end.
const EXIT_NOT_EXECUTABLE: i32 = 126;

fn exit_code(code: Option<i32>) -> u8 {
    match code.map(u8::try_from) {
        Some(Ok(0)) | Some(Err(_)) | None => 1,
        Some(Ok(code)) => code,
    }
}

/// Says which outputs there are, by path, kind and digest, and which needles are in them.
pub fn list_outputs(request: &Request, outputs: &[Output], format: Format) {
    if let Format::Json = format {
        return;
    }
    for (path, output) in request.outputs.iter().zip(outputs) {
        remark(format_args!("{path}: {}", describe(&output.node)));
        for needle in
            output.needles.iter().filter_map(|index| request.needles.get(usize::try_from(*index).ok()?))
        {
            remark(format_args!("{path}: refers to {}", crate::castore::node::printable(needle)));
        }
    }
}

/// A node in words: its kind and its digest or target.
pub fn describe(node: &Node) -> String {
    match node {
        Node::Directory { digest, .. } => format!("directory {digest}"),
        Node::File { digest, size, executable: false } => format!("file {digest}, {size} bytes"),
        Node::File { digest, size, executable: true } => format!("executable {digest}, {size} bytes"),
        Node::Symlink { target } => {
            format!("symbolic link to {}", crate::castore::node::printable(target.as_bytes()))
        }
    }
}
