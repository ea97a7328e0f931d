//! Requests whose answers may take long in coming, and those who wait for them.
//!
//! The threads that take requests from the kernel answer what is at hand. What is not is handed to these threads,
//! so that a store which does not answer holds up nobody but those who asked for it. Each such request has a
//! deadline: then it is answered with an error, whoever may still be waiting for the store on its behalf.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::inodes::{FileId, Listing};
use super::{Fault, Shared};
use crate::castore::Digest;
use crate::lock::lock;

/// At most this many requests wait for the store at a time. Those beyond wait for one of them to end, or for
/// their deadlines.
const MAX_THREADS: usize = 64;

/// At most this many are waiting in all. It is the kernel that limits them, to one for each thread of a build
/// and as many again as it reads ahead; beyond this they are refused.
const MAX_WAITING: usize = 1 << 16;

/// A store that gives a large blob must first have all of it, to check it. So it has more time, as if it were read at
/// this rate, in bytes a second.
const SLOWEST: u64 = 16 << 20;

/// A thread with nothing to do ends after this time.
const IDLE: Duration = Duration::from_secs(10);

/// What is wanted from the store.
#[derive(Clone, Copy)]
pub enum Wish {
    /// The entries of a directory.
    Listing(Digest),
    /// Bytes of a file: at most so many, from this offset on.
    Bytes(FileId, u64, usize),
}

/// What came of a wish.
pub enum Given {
    /// The entries of the directory.
    Listing(Arc<Listing>),
    /// The bytes, fewer than wished for only at the end of the file.
    Bytes(Vec<u8>),
}

/// Tells the kernel what came of a request. It must not wait for anything.
type Reply = Box<dyn FnOnce(Result<Given, Fault>) + Send>;

/// The threads, and those who wait. Dropping it refuses all who still do.
pub struct Far(Arc<Desk>);

struct Desk {
    shared: Arc<Shared>,
    /// How long a request may take.
    timeout: Duration,
    state: Mutex<State>,
    /// There is a wish to be fulfilled, or nothing more to come.
    wishes: Condvar,
    /// There is a first one waiting, or nothing more to come.
    deadlines: Condvar,
}

/// When a request is to be answered at the latest, and its number.
type Ticket = (Instant, u64);

#[derive(Default)]
struct State {
    /// All who wait. Whoever takes one out of here answers it.
    waiting: BTreeMap<Ticket, Waiting>,
    /// Those of them whose wishes nobody has taken up.
    queue: VecDeque<(Ticket, Wish)>,
    next: u64,
    threads: usize,
    idle: usize,
    ended: bool,
}

struct Waiting {
    digest: Digest,
    /// How long it may wait.
    patience: Duration,
    reply: Reply,
}

impl Far {
    /// Starts the thread that watches deadlines.
    pub fn start(shared: Arc<Shared>, timeout: Duration) -> std::io::Result<Self> {
        let desk = Arc::new(Desk {
            shared,
            timeout,
            state: Mutex::default(),
            wishes: Condvar::new(),
            deadlines: Condvar::new(),
        });
        let watched = Arc::clone(&desk);
        thread::Builder::new().name("view-deadlines".to_owned()).spawn(move || watched.watch())?;
        Ok(Self(desk))
    }

    /// Has `wish` fulfilled and `reply` told of it, at the latest when time is up.
    pub fn ask(&self, wish: Wish, reply: impl FnOnce(Result<Given, Fault>) + Send + 'static) {
        let (digest, size) = match wish {
            Wish::Listing(digest) => (digest, 0),
            Wish::Bytes(file, ..) => (file.digest, file.size),
        };
        let patience = self.0.timeout.saturating_add(Duration::from_secs(size / SLOWEST));
        let mut state = lock(&self.0.state);
        if state.ended || state.waiting.len() >= MAX_WAITING {
            drop(state);
            return reply(Err(Fault::Crowded { digest }));
        }
        let ticket = (Instant::now() + patience, state.next);
        state.next += 1;
        state.waiting.insert(ticket, Waiting { digest, patience, reply: Box::new(reply) });
        state.queue.push_back((ticket, wish));
        if state.waiting.first_key_value().is_some_and(|(first, _)| *first == ticket) {
            self.0.deadlines.notify_one();
        }
        if state.queue.len() <= state.idle {
            self.0.wishes.notify_one();
        } else if state.threads < MAX_THREADS {
            let desk = Arc::clone(&self.0);
            let made = thread::Builder::new().name("view-far".to_owned()).spawn(move || desk.serve());
            match made {
                Ok(_) => state.threads += 1,
                // One of those that there are takes it up, or its deadline comes.
                Err(error) => tracing::warn!("can't start a thread to wait for the store: {error}"),
            }
        }
    }
}

impl Drop for Far {
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        state.ended = true;
        state.queue.clear();
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        self.0.wishes.notify_all();
        self.0.deadlines.notify_all();
        // The threads themselves end when the store lets go of them.
        for Waiting { digest, reply, .. } in waiting.into_values() {
            reply(Err(Fault::Crowded { digest }));
        }
    }
}

impl Desk {
    /// Fulfils wishes until there have been none for a while.
    fn serve(&self) {
        let mut state = lock(&self.state);
        loop {
            if let Some((ticket, wish)) = state.queue.pop_front() {
                drop(state);
                let given = self.fulfil(wish);
                // Gone where it came too late.
                let waiting = lock(&self.state).waiting.remove(&ticket);
                if let Some(Waiting { reply, .. }) = waiting {
                    reply(given);
                }
                state = lock(&self.state);
                continue;
            }
            if state.ended {
                break;
            }
            state.idle += 1;
            let (woken, timeout) =
                self.wishes.wait_timeout(state, IDLE).unwrap_or_else(PoisonError::into_inner);
            state = woken;
            state.idle -= 1;
            if timeout.timed_out() && state.queue.is_empty() {
                break;
            }
        }
        state.threads -= 1;
    }

    fn fulfil(&self, wish: Wish) -> Result<Given, Fault> {
        match wish {
            Wish::Listing(digest) => self.shared.load(&digest).map(Given::Listing),
            Wish::Bytes(file, offset, size) => {
                let mut bytes = vec![0; size];
                let filled = self.shared.read(file, offset, &mut bytes)?;
                bytes.truncate(filled);
                Ok(Given::Bytes(bytes))
            }
        }
    }

    /// Refuses whoever waits for too long.
    fn watch(&self) {
        let mut state = lock(&self.state);
        while !state.ended {
            let Some((&(deadline, _), _)) = state.waiting.first_key_value() else {
                state = self.deadlines.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let now = Instant::now();
            if now < deadline {
                let woken = self.deadlines.wait_timeout(state, deadline - now);
                state = woken.unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            let in_time = state.waiting.split_off(&(now, u64::MAX));
            let late = std::mem::replace(&mut state.waiting, in_time);
            state.queue.retain(|(ticket, _)| !late.contains_key(ticket));
            drop(state);
            for Waiting { digest, patience, reply } in late.into_values() {
                reply(Err(Fault::Late { digest, after: patience }));
            }
            state = lock(&self.state);
        }
    }
}
