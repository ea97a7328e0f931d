//! One case: a mode, directories of its own, and the binary run in them.

use std::ffi::OsStr;
use std::fmt;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{self, Receiver};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};
use tempfile::TempDir;

use super::{Facility, Lacking, binary};

/// No case takes nearly this long; one that does hangs.
const DEADLINE: Duration = Duration::from_secs(120);

/// Who runs the binary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Root.
    Root,
    /// An unprivileged user with a range of sub-ids and newuidmap.
    Range,
    /// An unprivileged user with no id but its own.
    Single,
}

type Probe = Result<(), (Facility, String)>;
type Probes = [OnceLock<Probe>; 3];

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.facility().name())
    }
}

impl Mode {
    pub const ALL: [Mode; 3] = [Mode::Root, Mode::Range, Mode::Single];

    /// The mode of whoever runs the tests.
    pub fn own() -> Mode {
        match (geteuid().is_root(), has_sub_ids(&user_name(geteuid().as_raw()))) {
            (true, _) => Mode::Root,
            (false, true) => Mode::Range,
            (false, false) => Mode::Single,
        }
    }

    /// Whether this caller can be in this mode, on this machine.
    pub fn available(self) -> Result<(), Lacking> {
        static KNOWN: Probes = [const { OnceLock::new() }; 3];
        self.probed(&KNOWN, Self::probe)
    }

    /// Whether this mode's user may use FUSE.
    pub fn has_fuse(self) -> Result<(), Lacking> {
        static KNOWN: Probes = [const { OnceLock::new() }; 3];
        self.probed(&KNOWN, Self::probe_fuse)
    }

    /// Probes once.
    fn probed(self, known: &Probes, probe: fn(Self) -> Probe) -> Result<(), Lacking> {
        let known = known[self as usize].get_or_init(|| probe(self));
        known.clone().map_err(|(facility, reason)| Lacking::new(facility, reason))
    }

    fn facility(self) -> Facility {
        match self {
            Mode::Root => Facility::Root,
            Mode::Range => Facility::Range,
            Mode::Single => Facility::Single,
        }
    }

    /// User and group to become, where that isn't what the caller is already.
    pub fn ids(self) -> Option<u32> {
        match self {
            _ if !geteuid().is_root() => None,
            Mode::Root => None,
            Mode::Range => Some(7001),
            Mode::Single => Some(7002),
        }
    }

    fn probe(self) -> Probe {
        let lacks = |reason: &str| Err((self.facility(), reason.to_owned()));
        match (self, self.ids()) {
            (Mode::Root, _) if !geteuid().is_root() => return lacks("not run as root"),
            (Mode::Range, Some(_)) if !has_sub_ids("cofferdam-range") => {
                return lacks("there is no user cofferdam-range with sub-ids; scripts/test lends one");
            }
            (Mode::Range | Mode::Single, None) if self != Mode::own() => {
                return lacks("not the kind of user that runs the tests");
            }
            _ => {}
        }
        let namespaces: &[&str] = match self {
            Mode::Root => &["--mount", "--pid", "--fork"],
            Mode::Range => &["--user", "--map-root-user", "--map-auto"],
            Mode::Single => &["--user", "--map-root-user"],
        };
        let mut unshare = Command::new("unshare");
        self.becomes(unshare.args(namespaces).arg("true").current_dir("/"));
        match unshare.output() {
            Err(error) => lacks(&format!("unshare: {error}")),
            Ok(run) if !run.status.success() => {
                lacks(&format!("no namespaces: {}", String::from_utf8_lossy(&run.stderr).trim()))
            }
            Ok(_) => Ok(()),
        }
    }

    fn probe_fuse(self) -> Probe {
        let mut open = Command::new("sh");
        self.becomes(open.args(["-c", "exec 3<>/dev/fuse"]).current_dir("/"));
        match open.output() {
            Ok(run) if run.status.success() => Ok(()),
            Ok(run) => Err((Facility::Fuse, String::from_utf8_lossy(&run.stderr).trim().to_owned())),
            Err(error) => Err((Facility::Fuse, format!("sh: {error}"))),
        }
    }

    /// Has the command run as this mode's user.
    fn becomes(self, command: &mut Command) {
        if let Some(id) = self.ids() {
            command.uid(id).gid(id);
        }
    }
}

fn user_name(uid: u32) -> String {
    let users = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let line = users.lines().find(|line| line.split(':').nth(2) == Some(&uid.to_string()));
    line.and_then(|line| line.split(':').next()).map_or(uid.to_string(), str::to_owned)
}

fn has_sub_ids(user: &str) -> bool {
    let ranges = std::fs::read_to_string("/etc/subuid").unwrap_or_default();
    let tool = ["/usr/bin/newuidmap", "/bin/newuidmap"].iter().any(|path| Path::new(path).exists());
    tool && ranges.lines().any(|line| line.split(':').next() == Some(user))
}

/// Sets the permission bits of a path.
pub fn set_mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

/// A mode and directories that belong to its user: `work`, `home` and `tmp`.
pub struct Case {
    pub mode: Mode,
    dir: TempDir,
}

impl Case {
    pub fn new(mode: Mode) -> Case {
        let dir = tempfile::Builder::new().prefix("cofferdam-test-").tempdir().unwrap();
        set_mode(dir.path(), 0o755);
        let case = Case { mode, dir };
        for name in ["work", "home", "tmp"] {
            let path = case.dir.path().join(name);
            std::fs::create_dir(&path).unwrap();
            case.give(&path);
        }
        case
    }

    /// Makes the mode's user the owner.
    fn give(&self, path: &Path) {
        if let Some(id) = self.mode.ids() {
            std::os::unix::fs::lchown(path, Some(id), Some(id)).unwrap();
        }
    }

    /// A path in the directory where commands run.
    pub fn path(&self, relative: &str) -> PathBuf {
        self.dir.path().join("work").join(relative)
    }

    /// The case's TMPDIR.
    pub fn tmp(&self) -> PathBuf {
        self.dir.path().join("tmp")
    }

    /// Makes a directory, with its parents.
    pub fn make_dir(&self, relative: &str) -> PathBuf {
        let mut path = self.path("");
        for part in Path::new(relative) {
            path.push(part);
            if !path.exists() {
                std::fs::create_dir(&path).unwrap();
                self.give(&path);
            }
        }
        path
    }

    /// Writes a file, with its parents.
    pub fn write(&self, relative: &str, contents: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(relative);
        if let Some(parent) = Path::new(relative).parent() {
            self.make_dir(&parent.to_string_lossy());
        }
        std::fs::write(&path, contents).unwrap();
        self.give(&path);
        path
    }

    /// Makes a symbolic link.
    pub fn link(&self, relative: &str, target: &str) {
        std::os::unix::fs::symlink(target, self.path(relative)).unwrap();
        self.give(&self.path(relative));
    }

    /// What a file in the working directory holds.
    #[track_caller]
    pub fn read(&self, relative: &str) -> Vec<u8> {
        let path = self.path(relative);
        std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    /// A program as the mode's user, in the working directory, with an environment of its own.
    pub fn program(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = self.program_of_callers(program);
        self.mode.becomes(&mut command);
        command
    }

    /// The same as the user who runs the tests.
    fn program_of_callers(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command
            .current_dir(self.path(""))
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HOME", self.dir.path().join("home"))
            .env("TMPDIR", self.tmp())
            .env("LC_ALL", "C")
            .env("COFFERDAM_TEST_SECRET", "of the host")
            .stdin(Stdio::null());
        command
    }

    /// The binary, as the mode's user, in the network and with the mounts of process `pid`. Takes root.
    pub fn cofferdam_in(&self, pid: u32) -> Command {
        let mut command = self.program_of_callers("nsenter");
        command.args(["--target", &pid.to_string(), "--net", "--mount"]);
        if let Some(id) = self.mode.ids().map(|id| id.to_string()) {
            command.args(["--setuid", &id, "--setgid", &id]);
        }
        // Changing mounts changes the working directory.
        command.args(["env", "--chdir"]).arg(self.path("")).arg(binary());
        command
    }

    /// The binary, with arguments.
    pub fn cofferdam<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = self.program(binary());
        command.args(args);
        command
    }

    /// `cofferdam run --host-tools FLAGS -- /bin/sh -c SCRIPT`, to its end.
    #[track_caller]
    pub fn run(&self, flags: &[&str], script: &str) -> Ran {
        finish(self.run_command(flags, script))
    }

    /// The same, not yet started.
    pub fn run_command(&self, flags: &[&str], script: &str) -> Command {
        let mut command = self.cofferdam(["run", "--host-tools"]);
        command.args(flags).args(["--", "/bin/sh", "-c", script]);
        command
    }
}

/// Runs a command to its end.
#[track_caller]
pub fn finish(command: Command) -> Ran {
    Running::start(command).finish()
}

/// A command that was started. It is killed when this is dropped.
pub struct Running {
    child: Child,
    stdout: Receiver<Vec<u8>>,
    stderr: Option<JoinHandle<Vec<u8>>>,
    seen: Vec<u8>,
}

impl Running {
    #[track_caller]
    pub fn start(mut command: Command) -> Running {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut errors = child.stderr.take().unwrap();
        let (sender, stdout) = mpsc::channel();
        std::thread::spawn(move || {
            let mut line = Vec::new();
            while output.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
                if sender.send(std::mem::take(&mut line)).is_err() {
                    return;
                }
            }
        });
        let stderr = std::thread::spawn(move || {
            let mut all = Vec::new();
            // What was read before an error is still worth showing.
            let _ = errors.read_to_end(&mut all);
            all
        });
        Running { child, stdout, stderr: Some(stderr), seen: Vec::new() }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// Waits until a line of its stdout contains `text`.
    #[track_caller]
    pub fn wait_for(&mut self, text: &str) {
        let start = Instant::now();
        while !self.seen.windows(text.len()).any(|window| window == text.as_bytes()) {
            match self.stdout.recv_timeout(Duration::from_secs(20)) {
                Ok(line) => self.seen.extend(line),
                Err(_) => panic!("no {text:?} on stdout within {:?}: {}", start.elapsed(), self.remains()),
            }
        }
    }

    /// Ends the command and tells what it has said.
    fn remains(&mut self) -> String {
        let _ = self.child.kill();
        let status = self.child.wait();
        let errors = self.stderr.take().map(|thread| thread.join().unwrap()).unwrap_or_default();
        format!("{status:?}\nstdout: {}\nstderr: {}", self.seen.escape_ascii(), show(&errors))
    }

    /// Waits for the end.
    #[track_caller]
    pub fn finish(mut self) -> Ran {
        let start = Instant::now();
        let status = loop {
            self.seen.extend(self.stdout.try_iter().flatten());
            match self.child.try_wait().unwrap() {
                Some(status) => break status,
                None if start.elapsed() > DEADLINE => panic!("it hangs: {}", self.remains()),
                None => std::thread::sleep(Duration::from_millis(2)),
            }
        };
        // The pipes close with the last holder: one that outlives the command fails the case, here too.
        while let Ok(line) = self.stdout.recv_timeout(Duration::from_secs(5)) {
            self.seen.extend(line);
        }
        let stderr = self.stderr.take().unwrap();
        while !stderr.is_finished() {
            assert!(start.elapsed() < DEADLINE, "something still holds stderr");
            std::thread::sleep(Duration::from_millis(1));
        }
        let stdout = std::mem::take(&mut self.seen);
        Ran { status, stdout, stderr: stderr.join().unwrap(), took: start.elapsed() }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How a command ended and what it wrote.
pub struct Ran {
    pub status: ExitStatus,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub took: Duration,
}

impl Ran {
    /// Asserts the exit code (128 + n for a signal).
    #[track_caller]
    pub fn code(self, expected: i32) -> Ran {
        let code = self.status.code().unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0));
        assert_eq!(code, expected, "exit code; {self}");
        self
    }

    /// Asserts what stdout is, byte by byte.
    #[track_caller]
    pub fn says(self, expected: &str) -> Ran {
        assert_eq!(self.out(), expected, "stdout; {self}");
        self
    }

    /// Asserts that stderr contains `text`, in whatever case.
    #[track_caller]
    pub fn complains(self, text: &str) -> Ran {
        assert!(self.err().to_lowercase().contains(&text.to_lowercase()), "no {text:?} on stderr; {self}");
        self
    }

    /// stdout as text.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// stderr as text.
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// stdout as JSON, one value a line.
    #[track_caller]
    pub fn json(&self) -> Vec<serde_json::Value> {
        let parse =
            |line: &str| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e} in {line:?}; {self}"));
        self.out().lines().map(parse).collect()
    }
}

impl fmt::Display for Ran {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\nstdout: {}\nstderr: {}", self.status, show(&self.stdout), show(&self.stderr))
    }
}

/// Text for a failure's message: enough of it to see what went wrong.
fn show(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(4000)]).into_owned()
}
