//! Throw-away processes: each tries one thing, says what came of it, and is gone.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

use nix::fcntl::{OFlag, open};
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::stat::Mode;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::{self, ForkResult, Pid};
use serde::{Serialize, de::DeserializeOwned};

use super::outcome::{Act, Trouble, Why};
use crate::child::privileges;
use crate::ids::IdMap;
use crate::plan::Network;
use crate::spawner::server;
use crate::sys;

/// No step takes nearly this long on a machine that works.
const LIMIT: Duration = Duration::from_secs(10);

/// How much of what programs complain is kept.
const WORDS_BYTES: u64 = 2000;

/// Does `act` in a forked process, which is killed with all its children once it has said what came of it, or after ten
/// seconds. What it and the programs that it starts write to standard output and error is caught; of a refusal in words, it
/// becomes a part.
///
/// Call this only while the program has one thread.
///
/// # Errors
/// Those of `act`, and that its process did not end as it should.
pub fn attempt<T: Serialize + DeserializeOwned>(
    act: impl FnOnce() -> Result<T, Trouble>,
) -> Result<T, Trouble> {
    let (answer, report) = unistd::pipe2(OFlag::O_CLOEXEC).act("make a pipe")?;
    // Without one, the words are lost and nothing else.
    let words = memfd_create(c"cofferdam-words", MFdFlags::MFD_CLOEXEC).ok();
    let parent = unistd::getpid();
    // SAFETY: the program has one thread, as all callers see to, so the child may go on as usual.
    match unsafe { unistd::fork() }.act("fork")? {
        ForkResult::Child => {
            drop(answer);
            // A group of its own, so that whatever it starts can be killed with it.
            let _ = unistd::setpgid(Pid::from_raw(0), Pid::from_raw(0));
            let _ = prctl::set_pdeathsig(Signal::SIGKILL);
            if unistd::getppid() == parent {
                silence(words.as_ref());
                say(report, act);
            }
            end()
        }
        ForkResult::Parent { child } => {
            drop(report);
            let _ = unistd::setpgid(child, child);
            let result = listen(answer, child);
            let _ = killpg(child, Signal::SIGKILL);
            let _ = kill(child, Signal::SIGKILL);
            let _ = waitpid(child, None);
            result.map_err(|trouble| with_words(trouble, words))
        }
    }
}

/// What comes first in a sandbox.
pub const CLONE: &str = "make the namespaces of a sandbox with clone3";
/// What comes last before a step.
pub const PROPAGATION: &str = "cut mount propagation";

/// Does `act` as the root of a sandbox with all its namespaces, mapped as a build is. It is given what `open` yields, which
/// is called outside, as the sources of mounts are opened for a build.
pub fn in_sandbox<S, T: Serialize + DeserializeOwned>(
    ids: &IdMap,
    open: impl FnOnce() -> Result<S, Trouble>,
    act: impl FnOnce(S) -> Result<T, Trouble>,
) -> Result<T, Trouble> {
    attempt(|| {
        let (answer, report) = unistd::pipe2(OFlag::O_CLOEXEC).act("make a pipe")?;
        let (go, gone) = unistd::pipe2(OFlag::O_CLOEXEC).act("make a pipe")?;
        let opened = open()?;
        // SAFETY: this process is a copy of one with one thread.
        let cloned = unsafe { sys::clone_process(server::namespaces(&Network::Own).bits(), None) };
        match cloned.act(CLONE)? {
            sys::Cloned::Child => {
                drop((answer, gone));
                say(report, || first_process(go, ids, || act(opened)));
                end()
            }
            sys::Cloned::Parent { pid, .. } => {
                drop(report);
                server::write_maps(pid, ids)?;
                File::from(gone).write_all(&[1]).act("go on with the sandbox")?;
                listen(answer, pid)
            }
        }
    })
}

fn first_process<T>(
    go: OwnedFd,
    ids: &IdMap,
    act: impl FnOnce() -> Result<T, Trouble>,
) -> Result<T, Trouble> {
    File::from(go).read_exact(&mut [0]).act("wait for the id maps")?;
    unshare(CloneFlags::CLONE_NEWCGROUP).act("make a cgroup namespace")?;
    privileges::become_root(ids)?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).act(PROPAGATION)?;
    act()
}

/// Ends this process without a word more.
fn end() -> ! {
    // SAFETY: nothing of this copy of the program may run any further: neither its destructors nor what it
    // registered to run at exit.
    unsafe { libc::_exit(0) }
}

/// Puts the words of this process and of what it starts where they can be read later.
fn silence(words: Option<&OwnedFd>) {
    let null = open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()).ok();
    let places = [(0, null.as_ref()), (1, words.or(null.as_ref())), (2, words.or(null.as_ref()))];
    for (target, fd) in places {
        if let Some(fd) = fd {
            let _ = sys::place_fd(fd.as_raw_fd(), target);
        }
    }
}

fn say<T: Serialize>(report: OwnedFd, act: impl FnOnce() -> Result<T, Trouble>) {
    let result = std::panic::catch_unwind(AssertUnwindSafe(act))
        .unwrap_or_else(|_| Err(Trouble::said("go on", "this is a bug in cofferdam: the process panicked")));
    if let Ok(bytes) = postcard::to_stdvec(&result) {
        // One that can't be told is seen as a process that ended without a word.
        let _ = File::from(report).write_all(&bytes);
    }
}

/// Reads what the process `child` says, for as long as a step may take.
fn listen<T: DeserializeOwned>(answer: OwnedFd, child: Pid) -> Result<T, Trouble> {
    let deadline = Instant::now() + LIMIT;
    let mut answer = File::from(answer);
    let mut bytes = Vec::new();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut ready = [PollFd::new(answer.as_fd(), PollFlags::POLLIN)];
        match poll(&mut ready, PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO)) {
            Err(nix::errno::Errno::EINTR) => continue,
            Ok(0) => return Err(Trouble { act: "get to the end".into(), why: Why::TimedOut }),
            _ => {}
        }
        let mut part = [0; 4096];
        let length = answer.read(&mut part).act("read what the process says")?;
        bytes.extend(part.iter().take(length));
        // The end of the pipe does not tell: what the process started may hold it too.
        match postcard::from_bytes::<Result<T, Trouble>>(&bytes) {
            Ok(result) => return result,
            Err(_) if length > 0 => {}
            Err(_) => return Err(Trouble { act: "get to the end".into(), why: ended(child) }),
        }
    }
}

/// How a process ended that said nothing.
fn ended(child: Pid) -> Why {
    // It has closed its pipe, and is about to end if it hasn't.
    for _ in 0..100 {
        // Not reaped yet: until then the pid, by which it is killed, is its own.
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        match waitid(Id::Pid(child), flags) {
            Ok(WaitStatus::StillAlive) => std::thread::sleep(Duration::from_millis(10)),
            Ok(WaitStatus::Signaled(_, signal, _)) => return Why::Signal(signal as i32),
            _ => break,
        }
    }
    Why::Said("its process ended without a word".into())
}

/// Adds what programs complained to a refusal that is in words.
fn with_words(trouble: Trouble, words: Option<OwnedFd>) -> Trouble {
    let Trouble { act, why: Why::Said(mut said) } = trouble else { return trouble };
    let mut bytes = Vec::new();
    if let Some(mut words) = words.map(File::from) {
        let _ = words.rewind();
        let _ = words.take(WORDS_BYTES).read_to_end(&mut bytes);
    }
    let text = String::from_utf8_lossy(&bytes);
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
        said.push_str("; ");
        said.push_str(line);
    }
    Trouble { act, why: Why::Said(said) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::errno::Errno;

    // The harness has threads, so what the children do here takes no lock that another thread could hold: it makes
    // system calls and small allocations, which glibc keeps possible after a fork.

    #[test]
    fn what_a_process_finds_comes_back() {
        assert_eq!(attempt(|| Ok(7_u32)), Ok(7));
        let refused = Trouble::errno("do it", Errno::EPERM);
        assert_eq!(attempt::<()>(|| Err(Trouble::errno("do it", Errno::EPERM))), Err(refused));
    }

    #[test]
    fn a_process_that_dies_is_told_by_its_signal() {
        let died = attempt::<()>(|| {
            let _ = kill(unistd::getpid(), Signal::SIGSYS);
            Ok(())
        });
        assert_eq!(died.unwrap_err().why, Why::Signal(libc::SIGSYS));
    }

    #[test]
    fn programs_words_become_part_of_a_refusal_in_words() {
        let said = attempt::<()>(|| {
            let _ = unistd::write(std::io::stderr(), b"the disk is on fire\n");
            Err(Trouble::said("run it", "exit code 1"))
        });
        assert_eq!(said.unwrap_err().to_string(), "can't run it: exit code 1; the disk is on fire");
    }
}
