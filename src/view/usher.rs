//! Seeing builds out: what they read is kept for the next one, and their directories go.

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cofferdam_sandbox::measure;
use fuser::{INodeNo, Notifier};

use super::inodes::{KEPT, KEPT_NAME};
use super::{Shared, mount};
use crate::castore::Name;
use crate::lock::lock;

/// When it is looked first whether the kernel has forgotten a build that has gone, and the longest time
/// between such looks, where it goes on remembering.
const FIRST_LOOK: Duration = Duration::from_secs(1);
const LAST_LOOK: Duration = Duration::from_secs(60);

/// When nothing has been shown for so long, what was only remembered in order to be fast is given up.
const IDLE: Duration = Duration::from_secs(30);

/// What the usher is told.
pub enum Farewell {
    /// The build with this name, whose directory has this number, has gone.
    Build(Name, u64),
    /// There is no more to do.
    Stop,
}

/// Sees builds out. In a thread of its own, since the kernel may take its time over a large tree, and may
/// wait for a request that is being answered.
pub struct Usher {
    farewells: mpsc::Sender<Farewell>,
    thread: Option<JoinHandle<()>>,
}

impl Usher {
    /// Starts the thread. At most `kept_files` files that builds have read are kept for later ones.
    pub fn start(
        shared: Arc<Shared>,
        at: PathBuf,
        notifier: Notifier,
        kept_files: usize,
    ) -> io::Result<Self> {
        let (farewells, waiting) = mpsc::channel();
        let thread = std::thread::Builder::new().name("view-usher".to_owned()).spawn(move || {
            Rounds { shared, at, notifier, gone: Vec::new(), kept: VecDeque::new(), kept_files }
                .see_out(&waiting);
        })?;
        Ok(Self { farewells, thread: Some(thread) })
    }

    /// Where farewells are to be sent.
    pub fn farewells(&self) -> mpsc::Sender<Farewell> {
        self.farewells.clone()
    }
}

impl Drop for Usher {
    fn drop(&mut self) {
        let _ = self.farewells.send(Farewell::Stop);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// What the usher's thread works on.
struct Rounds {
    shared: Arc<Shared>,
    /// Where the view is mounted.
    at: PathBuf,
    notifier: Notifier,
    /// The builds that have gone and that the kernel may still remember, and since when.
    gone: Vec<(u64, Instant)>,
    /// The files that are kept, in the order in which that began.
    kept: VecDeque<u64>,
    /// At most so many.
    kept_files: usize,
}

impl Rounds {
    /// Tells the kernel of each build that has gone, and looks after a while whether it has forgotten it.
    ///
    /// It has not where something still lay over the directory, such as an overlay in an ending sandbox:
    /// what is in use stays, and once it is used no more, it stays as a memory that no name leads to. Such
    /// are then shrunk away, and kept files with them.
    fn see_out(&mut self, waiting: &mpsc::Receiver<Farewell>) {
        let mut pause = FIRST_LOOK;
        let mut look = Instant::now();
        let mut trimmed = true;
        loop {
            let farewell = if !self.gone.is_empty() {
                waiting.recv_timeout(look.saturating_duration_since(Instant::now()))
            } else if !trimmed {
                waiting.recv_timeout(IDLE)
            } else {
                waiting.recv().map_err(|_| mpsc::RecvTimeoutError::Disconnected)
            };
            match farewell {
                Ok(Farewell::Build(name, number)) => {
                    if self.gone.is_empty() {
                        look = Instant::now() + pause;
                    }
                    self.keep_files();
                    self.forget(&name);
                    self.gone.push((number, Instant::now()));
                    trimmed = false;
                }
                Err(mpsc::RecvTimeoutError::Timeout) if self.gone.is_empty() => {
                    // Where there still is a build, its end will be another beginning of this.
                    if lock(&self.shared.builds).is_empty() {
                        self.shared.trim();
                        self.shared.store.directories.trim();
                        measure::trim_own_memory();
                    }
                    trimmed = true;
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    let inodes = lock(&self.shared.inodes);
                    self.gone.retain(|(number, _)| inodes.get(*number).is_some());
                    drop(inodes);
                    // Of one that has only just gone, the kernel may be about to say so.
                    if self.gone.iter().any(|(_, since)| since.elapsed() >= FIRST_LOOK) {
                        mount::shrink(&self.at);
                        pause = LAST_LOOK.min(pause * 2);
                    } else {
                        pause = FIRST_LOOK;
                    }
                    look = Instant::now() + pause;
                }
                Ok(Farewell::Stop) | Err(mpsc::RecvTimeoutError::Disconnected) => break,
            }
        }
    }

    /// Makes the kernel forget the directory of a build.
    fn forget(&self, name: &Name) {
        if let Err(error) = self.notifier.inval_entry(INodeNo::ROOT, name.as_os_str()) {
            tracing::debug!(build = %name, "the kernel was not told that a build has gone: {error}");
        }
        forget_listing(&self.notifier);
        lock(&self.shared.inodes).release(name);
    }

    /// Keeps the files that were read of late: the kernel drops a file's pages with the last name it knows
    /// for it, so it is shown another one before that of the build goes.
    fn keep_files(&mut self) {
        let read = lock(&self.shared.inodes).take_read();
        for number in read {
            let name = number.to_string();
            // There is none where the kernel was faster to forget it.
            if fs::symlink_metadata(self.at.join(KEPT_NAME).join(name)).is_ok() {
                self.kept.push_back(number);
            }
        }
        while self.kept.len() > self.kept_files
            && let Some(number) = self.kept.pop_front()
        {
            lock(&self.shared.inodes).let_go(number);
            // The kernel may have forgotten it by itself.
            let _ = self.notifier.inval_entry(INodeNo(KEPT), number.to_string().as_ref());
        }
    }
}

/// Makes the kernel ask again what the root holds.
pub fn forget_listing(notifier: &Notifier) {
    if let Err(error) = notifier.inval_inode(INodeNo::ROOT, 0, 0) {
        tracing::debug!("the kernel was not told that the list of builds has changed: {error}");
    }
}
