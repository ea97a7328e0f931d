//! Reading ahead of whoever reads the files of a directory one after the other.
//!
//! The kernel reads ahead within a file. Most files are small, and each costs a request that somebody waits for: that is
//! what makes a first read through FUSE slow. So where a process reads the files of a directory in the order in which
//! they are listed, those that follow are read from the store here and given to the kernel unasked
//! (`FUSE_NOTIFY_STORE`): when the process comes to them it finds them in the page cache.
//!
//! That is done by threads of its own, for a notice may wait for a page that is being read, and so for the answer
//! to a request. Whatever fails here is met again by whoever reads the file, and is reported then.

use std::collections::HashMap;
use std::io;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread;

use fuser::{INodeNo, Notifier};

use super::Shared;
use super::inodes::{FileId, Listing};
use crate::castore::Node;
use crate::lock::lock;

/// Files of up to so many bytes are read ahead: of a larger one, its own first read brings as much.
const SMALL: u64 = 128 << 10;

/// How many entries of a directory are read ahead, at first and at most.
const FIRST_WINDOW: usize = 4;
const LAST_WINDOW: usize = 128;

/// A reader may leave out this many entries and still be one who reads all of them.
const SLACK: usize = 4;

/// How many readers are told apart.
const READERS: usize = 256;

/// How many windows may wait to be read. Beyond, nothing is read ahead.
const QUEUED: usize = 16;

/// How many threads read ahead: while one waits for the disk, another one is busy.
const THREADS: usize = 2;

/// Notices who reads one file after the other.
pub struct Ahead {
    readers: Mutex<HashMap<u32, Reader>>,
    windows: SyncSender<Window>,
}

/// Where a process has got to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Reader {
    directory: u64,
    /// The position up to which its files have been read, or are being read ahead.
    end: usize,
    /// The position of a file before that which is left to be read by the process: when it does, it is time for more.
    mark: Option<usize>,
    /// How many entries were read ahead last.
    window: usize,
}

/// A part of a directory that is to be read ahead.
pub struct Window {
    listing: Arc<Listing>,
    positions: std::ops::Range<usize>,
    /// A position to be left out.
    mark: Option<usize>,
}

impl Ahead {
    /// Knows no reader yet. What is to be read ahead comes out of the other end.
    pub fn new() -> (Self, Receiver<Window>) {
        let (windows, queue) = sync_channel(QUEUED);
        (Self { readers: Mutex::default(), windows }, queue)
    }

    /// Notes that process `pid` reads the file at `position` of `directory` from its beginning.
    pub fn notice(&self, pid: u32, directory: u64, position: usize, listing: &Arc<Listing>) {
        let mut readers = lock(&self.readers);
        if readers.len() >= READERS && !readers.contains_key(&pid) {
            readers.clear();
        }
        let before = readers.get(&pid).copied();
        let (reader, positions) = advance(before, directory, position, listing);
        readers.insert(pid, reader);
        drop(readers);
        if !positions.is_empty() {
            let listing = Arc::clone(listing);
            // Where all are busy already, what comes next is not read ahead, and then noticed anew.
            let _ = self.windows.try_send(Window { listing, positions, mark: reader.mark });
        }
    }
}

/// Where a reader has got to who was at `before`, and which entries are to be read ahead of it.
fn advance(
    before: Option<Reader>,
    directory: u64,
    position: usize,
    listing: &Listing,
) -> (Reader, std::ops::Range<usize>) {
    let window = match before {
        Some(Reader { directory: same, end, mark, window }) if same == directory => {
            let next = position >= end && position - end <= SLACK;
            if next || mark == Some(position) {
                (window * 2).clamp(FIRST_WINDOW, LAST_WINDOW)
            } else if position < end {
                return (Reader { directory, end, mark, window }, 0..0);
            } else {
                0
            }
        }
        // Who has read others like this may go on so in the next directory.
        Some(Reader { window, .. }) if !(0..position).any(|above| small(listing, above).is_some()) => window,
        _ => 0,
    };
    let from = match before {
        Some(Reader { directory: same, end, .. }) if same == directory => end.max(position + 1),
        _ => position + 1,
    };
    let from = if window == 0 { position + 1 } else { from };
    let to = (from + window).min(listing.len()).max(from);
    let last = to == listing.len();
    let mark = if last { None } else { (from + window / 2..to).find(|at| small(listing, *at).is_some()) };
    (Reader { directory, end: to, mark, window }, from..to)
}

/// The small file at a position.
fn small(listing: &Listing, position: usize) -> Option<FileId> {
    match listing.get(position)? {
        (_, Node::File { digest, size: size @ 1..=SMALL, executable }) => {
            Some(FileId { digest: *digest, size: *size, executable: *executable })
        }
        _ => None,
    }
}

/// Starts the threads that read ahead. They end when the [`Ahead`] is gone.
pub fn start(shared: &Arc<Shared>, windows: Receiver<Window>, notifier: &Notifier) -> io::Result<()> {
    let windows = Arc::new(Mutex::new(windows));
    for _ in 0..THREADS {
        let (shared, windows, notifier) = (Arc::clone(shared), Arc::clone(&windows), notifier.clone());
        thread::Builder::new().name("view-ahead".to_owned()).spawn(move || {
            let mut buffer = Vec::new();
            loop {
                let window = lock(&windows).recv();
                let Ok(window) = window else { break };
                give(&shared, &window, &notifier, &mut buffer);
            }
        })?;
    }
    Ok(())
}

/// Reads a window and gives it to the kernel.
fn give(shared: &Shared, window: &Window, notifier: &Notifier, buffer: &mut Vec<u8>) {
    for position in window.positions.clone().filter(|position| window.mark != Some(*position)) {
        let Some(file) = small(&window.listing, position) else { continue };
        if !shared.is_at_hand(file) {
            continue;
        }
        // Not of those that the kernel doesn't know, or that were read before.
        let Some(number) = lock(&shared.inodes).read_ahead(file) else { continue };
        buffer.resize(SMALL as usize, 0);
        if let Ok(read) = shared.read(file, 0, buffer) {
            // The kernel may have forgotten it.
            let _ = notifier.store(INodeNo(number), 0, buffer.get(..read).unwrap_or_default());
        }
    }
}
