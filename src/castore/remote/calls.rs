//! Calls to a store elsewhere: how long they are waited for, when they are made again, and what is told of a failure.

use std::error::Error;
use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tonic::{Code, Status};

use crate::castore::{Digest, StoreError};

/// How many bytes a store must bring within the deadline for that to begin anew: one that trickles is no better than
/// one that is silent.
const LEAST_PROGRESS_BYTES: u64 = 64 << 10;

/// How long to wait before a call is made again, the first time; twice as long each further time.
const FIRST_PAUSE: Duration = Duration::from_millis(20);

/// The longest such wait.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Whether a call that could not reach the store, and would change nothing there, is made again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// Until the deadline: the store may be just starting.
    UntilDeadline,
    /// Not at all.
    Never,
}

/// How calls to one store are made.
pub(super) struct Calls {
    /// What errors call the store.
    pub address: String,
    pub runtime: Handle,
    /// How long the store may keep us waiting.
    pub deadline: Duration,
    pub retry: Retry,
}

impl Calls {
    /// Waits for the answer to a call that may be made again; `None` where it is that there is no such thing.
    ///
    /// # Errors
    /// [`StoreError::Remote`] that says what could not be done.
    pub(super) fn repeated<T, F: Future<Output = Result<T, Status>>>(
        &self,
        act: impl Fn() -> String,
        call: impl FnMut() -> F,
    ) -> Result<Option<T>, StoreError> {
        let answer = self.runtime.block_on(repeat(self.patience(), call));
        found(answer).map_err(|status| self.refusal(act(), &status))
    }

    /// Waits for a call for as long as `moved` keeps growing.
    pub(super) fn while_moving<T>(
        &self,
        moved: &AtomicU64,
        call: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, Status> {
        self.runtime.block_on(async {
            let mut call = pin!(call);
            let mut before = 0;
            loop {
                if let Ok(answer) = timeout(self.deadline, &mut call).await {
                    return answer;
                }
                let now = moved.load(Ordering::Relaxed);
                if now == before {
                    return Err(late(self.deadline));
                }
                before = now;
            }
        })
    }

    /// What is left of the deadline, all of it.
    pub(super) fn patience(&self) -> Patience {
        Patience {
            deadline: self.deadline,
            ends: Instant::now() + self.deadline,
            brought: 0,
            pause: FIRST_PAUSE,
            retry: self.retry,
        }
    }

    /// Words a failure to do something.
    pub(super) fn refusal(&self, act: impl Into<String>, status: &Status) -> StoreError {
        self.failure(act, reason(status))
    }

    /// The same in words of our own.
    pub(super) fn failure(&self, act: impl Into<String>, message: impl Into<String>) -> StoreError {
        StoreError::Remote { address: self.address.clone(), act: act.into(), message: message.into() }
    }
}

/// What is left of a deadline.
#[derive(Clone)]
pub(super) struct Patience {
    deadline: Duration,
    ends: Instant,
    /// Bytes that came since the deadline began.
    brought: u64,
    pause: Duration,
    retry: Retry,
}

impl Patience {
    /// Waits for `call` until the deadline.
    pub(super) async fn wait<T>(
        &mut self,
        call: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, Status> {
        // A stream that always has something ready would never be timed out.
        if Instant::now() >= self.ends {
            return Err(late(self.deadline));
        }
        timeout_at(self.ends, call).await.unwrap_or_else(|_| Err(late(self.deadline)))
    }

    /// Notes that something came that had not come before. With enough of it the deadline begins anew.
    pub(super) fn progress(&mut self, bytes: usize) {
        self.brought = self.brought.saturating_add(bytes as u64);
        if self.brought >= LEAST_PROGRESS_BYTES {
            self.brought = 0;
            self.pause = FIRST_PAUSE;
            self.ends = Instant::now() + self.deadline;
        }
    }

    /// Pauses after a call has failed, if it is worth making again.
    ///
    /// # Errors
    /// The failure, where it is not, or there is no time left.
    pub(super) async fn pause(&mut self, failure: Status) -> Result<(), Status> {
        if self.retry == Retry::Never || !is_lost(&failure) {
            return Err(failure);
        }
        let pause = self.pause;
        if Instant::now() + pause >= self.ends {
            let tried = format!("{}; tried for {} s", reason(&failure), self.deadline.as_secs_f64());
            return Err(Status::unavailable(tried));
        }
        sleep(pause).await;
        self.pause = (pause * 2).min(LONGEST_PAUSE);
        Ok(())
    }
}

/// Makes a call again and again while the store is out of reach, until the deadline.
pub(super) async fn repeat<T, F: Future<Output = Result<T, Status>>>(
    mut patience: Patience,
    mut call: impl FnMut() -> F,
) -> Result<T, Status> {
    loop {
        match patience.wait(call()).await {
            Ok(answer) => return Ok(answer),
            Err(failure) => patience.pause(failure).await?,
        }
    }
}

/// `None` where the answer is that there is no such thing.
pub(super) fn found<T>(answer: Result<T, Status>) -> Result<Option<T>, Status> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(status) if status.code() == Code::NotFound => Ok(None),
        Err(status) => Err(status),
    }
}

/// The name of a blob in what was tried.
pub(super) fn blob(act: &str, digest: &Digest) -> String {
    format!("{act} the blob {digest}")
}

fn late(deadline: Duration) -> Status {
    Status::deadline_exceeded(format!("no answer within {} s", deadline.as_secs_f64()))
}

/// Whether the store was out of reach, or has gone in the middle of the call.
fn is_lost(status: &Status) -> bool {
    // A status that was made on this side, of what went wrong with the connection, has a source.
    status.code() == Code::Unavailable || status.source().is_some()
}

/// What a status says; of one that was made on this side, the innermost cause, which is the one that says something.
fn reason(status: &Status) -> String {
    let Some(mut cause) = status.source() else {
        return match status.code() {
            // Made here, or as clear without.
            Code::DeadlineExceeded | Code::Unavailable => status.message().to_owned(),
            code => format!("{} ({})", status.message(), code.description()),
        };
    };
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    format!("the connection failed: {cause}")
}
