//! What a build writes, from its pipes to log events, line by line and byte for byte.

use std::fs::File;
use std::future::Future;
use std::io::{self, Read};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use nix::fcntl::{FcntlArg, fcntl};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;
use tokio::sync::mpsc::Sender;
use tokio::time::{Instant, sleep_until};

use super::events::{Event, LogStream};

/// Longest piece of a log in bytes; a longer line comes in several.
pub const MAX_PIECE: usize = 64 << 10;

/// How long half a line is held back for its other half.
pub const FLUSH_AFTER: Duration = Duration::from_millis(100);

/// How much is asked of a pipe at a time.
const READ_SIZE: usize = 64 << 10;

/// Cuts a stream of bytes into lines.
///
/// Each piece ends with a newline and has no other, or is a part of a line: [`MAX_PIECE`] bytes of a
/// long one, or what [`LineSplitter::flush`] found. Joined, they are the bytes that were fed. Pieces
/// share the memory that was read into.
#[derive(Debug, Default)]
pub struct LineSplitter {
    held: BytesMut,
    /// How much of `held` is known to have no newline.
    searched: usize,
}

impl LineSplitter {
    /// A splitter that holds nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes. Take out all pieces between two calls, so that no more than [`MAX_PIECE`] bytes and
    /// those of one call are ever held.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.held.extend_from_slice(bytes);
    }

    /// Where bytes can be added without copying them first: append, leave what is there.
    fn buffer(&mut self) -> &mut BytesMut {
        // Small rests are used up, so that a slow writer's lines share memory.
        if self.held.capacity() - self.held.len() < READ_SIZE / 16 {
            self.held.reserve(READ_SIZE);
        }
        &mut self.held
    }

    /// Takes the next piece, if a whole one is there.
    pub fn next_piece(&mut self) -> Option<Bytes> {
        let end = self.piece_end()?;
        self.searched = 0;
        Some(self.held.split_to(end).freeze())
    }

    /// Takes what is there of an unfinished line. To be called when there is no whole piece.
    pub fn flush(&mut self) -> Option<Bytes> {
        self.searched = 0;
        (!self.held.is_empty()).then(|| self.held.split().freeze())
    }

    /// Whether half a line is held, once there is no whole piece.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Length of the next whole piece.
    fn piece_end(&mut self) -> Option<usize> {
        let window = self.held.get(..MAX_PIECE).unwrap_or(&self.held);
        let rest = window.get(self.searched..)?;
        if let Some(newline) = memchr::memchr(b'\n', rest) {
            return Some(self.searched + newline + 1);
        }
        if window.len() == MAX_PIECE {
            return Some(MAX_PIECE);
        }
        self.searched = window.len();
        None
    }
}

/// Why a build's output could not be handed on.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// Nobody takes the events any more.
    #[error("the receiver of the log has gone")]
    Closed,
    /// A pipe could not be read.
    #[error("can't read the build's {}: {source}", name(*stream))]
    Read {
        /// Which one.
        stream: LogStream,
        /// The refusal.
        source: io::Error,
    },
}

fn name(stream: LogStream) -> &'static str {
    match stream {
        LogStream::Stdout => "standard output",
        LogStream::Stderr => "standard error",
    }
}

/// Sends what comes out of the two pipes to `events`, until both have ended.
///
/// A pipe ends when nobody can write to it any more; and at the latest, once `dead` has come true, with
/// the bytes that it held then. `dead` must not come true before every process of the sandbox has gone.
/// A process elsewhere that got hold of a pipe thus delays nothing. Half a line is sent
/// [`FLUSH_AFTER`] it was read. While `events` is full nothing is read, and the build has to wait.
///
/// # Errors
/// [`LogError::Closed`] when the receiver of `events` was dropped, [`LogError::Read`] where the kernel
/// refuses to read a pipe.
///
/// # Cancel safety
/// What was read and not yet sent is lost.
pub async fn pump(
    stdout: Receiver,
    stderr: Receiver,
    dead: impl Future<Output = ()>,
    events: Sender<Event>,
) -> Result<(), LogError> {
    let mut stdout = Pump::new(LogStream::Stdout, stdout);
    let mut stderr = Pump::new(LogStream::Stderr, stderr);
    tokio::select! {
        biased;
        () = dead => {}
        ended = async { tokio::try_join!(stdout.follow(&events), stderr.follow(&events)) } => {
            return ended.map(drop);
        }
    }
    tokio::try_join!(stdout.drain(&events), stderr.drain(&events)).map(drop)
}

/// One stream on its way.
struct Pump {
    pipe: Receiver,
    lines: Lines,
}

impl Pump {
    fn new(stream: LogStream, pipe: Receiver) -> Self {
        Self { pipe, lines: Lines { stream, splitter: LineSplitter::new(), flush_at: None } }
    }

    /// Reads to the end of the pipe. May be dropped on the way without loss: a piece leaves the splitter
    /// only when its place among the events is certain.
    async fn follow(&mut self, events: &Sender<Event>) -> Result<(), LogError> {
        loop {
            let flush_at = self.lines.flush_at;
            let flush = async {
                match flush_at {
                    Some(time) => sleep_until(time).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                read = self.pipe.read_buf(self.lines.splitter.buffer()) => match read {
                    Ok(0) => return self.lines.send_rest(events).await,
                    Ok(_) => self.lines.send_pieces(events).await?,
                    Err(source) => return Err(self.lines.error(source)),
                },
                () = flush => self.lines.send_rest(events).await?,
            }
        }
    }

    /// Reads what the pipe holds now and no more.
    async fn drain(self, events: &Sender<Event>) -> Result<(), LogError> {
        let Self { pipe, mut lines } = self;
        lines.send_pieces(events).await?;
        // Read directly: the runtime may not yet have heard that there is something to read.
        let mut file = File::from(pipe.into_nonblocking_fd().map_err(|source| lines.error(source))?);
        // A pipe never holds more than this; what comes after it was not written by the build.
        let capacity = fcntl(&file, FcntlArg::F_GETPIPE_SZ).map_err(|errno| lines.error(errno.into()))?;
        let mut left = usize::try_from(capacity).unwrap_or(0);
        let mut chunk = vec![0; READ_SIZE];
        while left > 0 {
            let read = match file.read(&mut chunk) {
                Ok(0) => break,
                Ok(read) => read,
                Err(source) if source.kind() == io::ErrorKind::WouldBlock => break,
                Err(source) if source.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => return Err(lines.error(source)),
            };
            left = left.saturating_sub(read);
            lines.splitter.feed(chunk.get(..read).unwrap_or_default());
            lines.send_pieces(events).await?;
        }
        lines.send_rest(events).await
    }
}

/// The lines of one stream, between its pipe and the events.
struct Lines {
    stream: LogStream,
    splitter: LineSplitter,
    /// When the half line in the splitter is to be sent.
    flush_at: Option<Instant>,
}

impl Lines {
    /// Sends every whole piece, and notes since when half a line has waited.
    async fn send_pieces(&mut self, events: &Sender<Event>) -> Result<(), LogError> {
        while self.splitter.piece_end().is_some() {
            let place = events.reserve().await.map_err(|_| LogError::Closed)?;
            if let Some(data) = self.splitter.next_piece() {
                place.send(Event::Log { stream: self.stream, data });
                self.flush_at = None;
            }
        }
        if self.flush_at.is_none() && !self.splitter.is_empty() {
            self.flush_at = Some(Instant::now() + FLUSH_AFTER);
        }
        Ok(())
    }

    /// Sends the half line at the end, if there is one.
    async fn send_rest(&mut self, events: &Sender<Event>) -> Result<(), LogError> {
        if !self.splitter.is_empty() {
            let place = events.reserve().await.map_err(|_| LogError::Closed)?;
            if let Some(data) = self.splitter.flush() {
                place.send(Event::Log { stream: self.stream, data });
            }
        }
        self.flush_at = None;
        Ok(())
    }

    fn error(&self, source: io::Error) -> LogError {
        LogError::Read { stream: self.stream, source }
    }
}

#[cfg(test)]
mod tests;
