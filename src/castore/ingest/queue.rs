//! Work that waits for whoever is free.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::lock::lock;

/// How many jobs may wait. Each holds the descriptor of a directory.
const CAPACITY: usize = 256;

/// Threads beyond these would wait for the store.
const THREADS_MAX: usize = 8;

/// With this many jobs a few threads have more to do than to be started.
const MANY: usize = 64;

/// The threads that share the work on a tree.
pub(super) struct Crew {
    /// How many there may be; with fewer than two, the walk does all itself.
    pub(super) threads: usize,
    /// They are started once so many jobs wait.
    pub(super) start_at: usize,
}

impl Crew {
    /// One thread for each processor, for trees of more than a few files.
    pub(super) fn of_this_machine() -> Self {
        let processors = thread::available_parallelism().map_or(1, usize::from);
        Self { threads: processors.min(THREADS_MAX), start_at: MANY }
    }
}

/// Jobs, first in, first out, a bounded number of them.
pub(super) struct Queue<J> {
    state: Mutex<State<J>>,
    /// There are jobs, or there won't be any more.
    filled: Condvar,
    /// There is room, or nobody will make any.
    drained: Condvar,
}

struct State<J> {
    jobs: VecDeque<J>,
    /// No jobs will be added.
    closed: bool,
    /// Threads that take jobs.
    takers: usize,
    /// How many of them wait for one.
    idle: usize,
    /// Whether someone waits for room.
    full: bool,
}

impl<J> Queue<J> {
    /// An empty one.
    pub(super) fn new() -> Self {
        let state = State { jobs: VecDeque::new(), closed: false, takers: 0, idle: 0, full: false };
        Self { state: Mutex::new(state), filled: Condvar::new(), drained: Condvar::new() }
    }

    /// Adds a job and yields how many wait. While there are too many and someone takes them, it waits until half of
    /// them are gone.
    pub(super) fn push(&self, job: J) -> usize {
        let mut state = lock(&self.state);
        if state.jobs.len() >= CAPACITY {
            state.full = true;
            while state.jobs.len() > CAPACITY / 2 && state.takers > 0 {
                state = self.drained.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            state.full = false;
        }
        state.jobs.push_back(job);
        if state.idle > 0 {
            self.filled.notify_one();
        }
        state.jobs.len()
    }

    /// How many jobs wait.
    pub(super) fn waiting(&self) -> usize {
        lock(&self.state).jobs.len()
    }

    /// A job, if one is there.
    pub(super) fn try_take(&self) -> Option<J> {
        self.taken(&mut lock(&self.state))
    }

    /// A job; `None` once there are none and won't be any.
    fn take(&self) -> Option<J> {
        let mut state = lock(&self.state);
        loop {
            let job = self.taken(&mut state);
            if job.is_some() || state.closed {
                return job;
            }
            state.idle += 1;
            state = self.filled.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.idle -= 1;
        }
    }

    fn taken(&self, state: &mut MutexGuard<'_, State<J>>) -> Option<J> {
        let job = state.jobs.pop_front();
        if state.full && state.jobs.len() <= CAPACITY / 2 {
            self.drained.notify_one();
        }
        job
    }

    /// Says that no jobs will be added.
    pub(super) fn close(&self) {
        lock(&self.state).closed = true;
        self.filled.notify_all();
    }

    /// Becomes one of those who take jobs.
    pub(super) fn join(&self) -> Taker<'_, J> {
        lock(&self.state).takers += 1;
        Taker(self)
    }
}

/// Someone who takes jobs: yields them until the queue is closed and empty.
pub(super) struct Taker<'q, J>(&'q Queue<J>);

impl<J> Iterator for Taker<'_, J> {
    type Item = J;

    fn next(&mut self) -> Option<J> {
        self.0.take()
    }
}

impl<J> Drop for Taker<'_, J> {
    /// Also in a panic: nobody must wait for room that no one makes.
    fn drop(&mut self) {
        lock(&self.0.state).takers -= 1;
        self.0.drained.notify_all();
    }
}

/// Closes a queue when it goes, also in a panic: nobody must wait for jobs that no one adds.
pub(super) struct Closing<'q, J>(pub(super) &'q Queue<J>);

impl<J> Drop for Closing<'_, J> {
    fn drop(&mut self) {
        self.0.close();
    }
}
