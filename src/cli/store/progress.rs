//! How far it has come, for people who watch, and what it has come to.

use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use crate::castore::ingest::{Tally, Totals};
use crate::cli::remark;
use crate::size::Rough;

/// How often the line is drawn.
const PAUSE: Duration = Duration::from_millis(100);

/// Back to the line's start, and all of it gone.
const CLEAR: &str = "\r\x1b[K";

/// Whether people are told.
#[derive(Clone, Copy, Debug)]
pub enum Telling {
    /// While it goes on, if standard error is a terminal, and at the end.
    All,
    /// Nothing.
    Nothing,
}

impl Telling {
    /// As `--quiet` has it.
    pub fn unless(quiet: bool) -> Self {
        if quiet { Self::Nothing } else { Self::All }
    }

    /// Does `work`, and shows what `tally` comes to meanwhile, after the word `doing`.
    pub fn watch<T>(self, doing: &str, tally: &Tally, work: impl FnOnce() -> T) -> T {
        if matches!(self, Self::Nothing) || !io::stderr().is_terminal() {
            return work();
        }
        thread::scope(|scope| {
            // It goes with the work, be it by a panic.
            let (_done, ended) = mpsc::channel::<()>();
            scope.spawn(move || draw(doing, tally, &ended));
            work()
        })
    }

    /// Tells what something has come to; without what is new where the store can't know.
    pub fn summary(self, totals: Totals, knows_new: bool) {
        if let Self::All = self {
            remark(format_args!("{}", Summary { totals, knows_new }));
        }
    }
}

/// Draws the line until there is no more to tell.
fn draw(doing: &str, tally: &Tally, ended: &mpsc::Receiver<()>) {
    let mut drawn = false;
    while let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(PAUSE) {
        let Totals { files, bytes, .. } = tally.totals();
        // That nobody can read it is no reason to stop.
        let _ = write!(io::stderr(), "{CLEAR}{doing}: {} files, {}", files, Rough(bytes));
        drawn = true;
    }
    if drawn {
        let _ = write!(io::stderr(), "{CLEAR}");
    }
}

/// A line that is drawn anew for each thing that is told, though not too often, where people watch. It goes with this.
#[derive(Default)]
pub struct Line {
    drawn: Option<Instant>,
}

impl Line {
    /// Shows `text`, if it is time.
    pub fn tell(&mut self, text: fmt::Arguments<'_>) {
        let due = self.drawn.is_none_or(|drawn| drawn.elapsed() >= PAUSE);
        if due && io::stderr().is_terminal() {
            // That nobody can read it is no reason to stop.
            let _ = write!(io::stderr(), "{CLEAR}{text}");
            self.drawn = Some(Instant::now());
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if self.drawn.is_some() {
            let _ = write!(io::stderr(), "{CLEAR}");
        }
    }
}

/// Totals in a line.
struct Summary {
    totals: Totals,
    knows_new: bool,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Totals { files, bytes, new_files, new_bytes } = self.totals;
        let many = |files| if files == 1 { "file" } else { "files" };
        write!(f, "{files} {}, {}", many(files), Rough(bytes))?;
        if self.knows_new {
            let known = files.saturating_sub(new_files);
            let known_bytes = Rough(bytes.saturating_sub(new_bytes));
            write!(f, "; new: {new_files}, {}; known: {known}, {known_bytes}", Rough(new_bytes))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line() {
        let totals = Totals { files: 3, bytes: 5000, new_files: 1, new_bytes: 5000 };
        let line = |totals, knows_new| Summary { totals, knows_new }.to_string();
        assert_eq!(line(totals, true), "3 files, 4.8 KiB; new: 1, 4.8 KiB; known: 2, 0 bytes");
        assert_eq!(line(Totals { files: 1, ..totals }, false), "1 file, 4.8 KiB");
    }
}
