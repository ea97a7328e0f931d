//! A daemon that ends with its test.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::leftovers::{self, until};
use super::{Case, host_tools};

/// A daemon on a unix socket in the case's working directory, allowed to show the host's tools.
pub struct Daemon {
    child: Child,
    socket: PathBuf,
    state: PathBuf,
    namespace: PathBuf,
    said: Arc<Mutex<String>>,
}

impl Daemon {
    /// Starts one and waits until it listens.
    #[track_caller]
    pub fn start(case: &Case, flags: &[&str]) -> Daemon {
        Daemon::start_as(case, "", flags)
    }

    /// The same for one of several: its socket and its state directory begin with `name`.
    #[track_caller]
    pub fn start_as(case: &Case, name: &str, flags: &[&str]) -> Daemon {
        Daemon::start_by(case.cofferdam(["daemon"]), case, name, flags)
    }

    /// The same with a command that begins otherwise.
    #[track_caller]
    pub fn start_by(mut command: Command, case: &Case, name: &str, flags: &[&str]) -> Daemon {
        let (socket, state) = (case.path(&format!("{name}socket")), case.path(&format!("{name}state")));
        command.arg("--listen").arg(format!("unix:{}", socket.display())).arg("--state-dir").arg(&state);
        for path in host_tools() {
            command.args(["--allow-host-path", path]);
        }
        let mut child = command.args(flags).stderr(Stdio::piped()).spawn().unwrap();

        let said = Arc::new(Mutex::new(String::new()));
        let errors = BufReader::new(child.stderr.take().unwrap());
        let log = Arc::clone(&said);
        std::thread::spawn(move || {
            for line in errors.lines().map_while(Result::ok) {
                *log.lock().unwrap() += &format!("{line}\n");
            }
        });
        let mut daemon = Daemon { child, socket, state, namespace: PathBuf::new(), said };
        let ready = format!("listening on unix:{}", daemon.socket.display());
        until("the daemon to listen", || {
            let ended = daemon.child.try_wait().unwrap();
            assert!(ended.is_none(), "the daemon ended: {ended:?}\n{}", daemon.said());
            daemon.said().contains(&ready)
        });
        daemon.namespace = leftovers::mount_namespace(daemon.pid()).unwrap();
        daemon
    }

    /// All that it wrote to stderr so far.
    pub fn said(&self) -> String {
        self.said.lock().unwrap().clone()
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    pub fn state(&self) -> &Path {
        &self.state
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its address, as clients write it.
    pub fn address(&self) -> String {
        format!("unix:{}", self.socket.display())
    }

    /// Every process of this daemon, itself included. Not for one without builds, which has no namespace of its own.
    pub fn processes(&self) -> Vec<String> {
        assert_ne!(Some(&self.namespace), leftovers::mount_namespace("self").as_ref());
        leftovers::family(&self.namespace).into_iter().collect()
    }

    /// Scratch directories of builds.
    pub fn scratch(&self) -> std::collections::BTreeSet<String> {
        leftovers::names(&self.state.join("builds"))
    }

    /// Directories of builds with copies of inputs.
    pub fn copies(&self) -> std::collections::BTreeSet<String> {
        leftovers::names(&self.state.join("copies"))
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// Waits for its end and yields its exit code; `None` where a signal ended it.
    pub fn wait(&mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the daemon said:\n{}", self.said());
        }
        let _ = kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM);
        for _ in 0..200 {
            if self.child.try_wait().is_ok_and(|status| status.is_some()) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
