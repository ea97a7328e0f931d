//! Opening /dev/fuse, mounting, and ending the mount so that nobody hangs.

use std::fs::OpenOptions;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use fuser::{Config, Filesystem, Notifier, Session, SessionACL};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags};

use super::ViewError;

const DEVICE: &str = "/dev/fuse";

/// With a read-only superblock a read costs no GETATTR.
const FLAGS: MsFlags = MsFlags::MS_RDONLY.union(MsFlags::MS_NOSUID).union(MsFlags::MS_NODEV);

/// How long the threads may take to end once the connection is aborted. One of them may be waiting for
/// the store.
const END: Duration = Duration::from_secs(5);

/// A mounted file system; dropping it ends it.
pub struct Mounted {
    at: PathBuf,
    notifier: Notifier,
    thread: Option<JoinHandle<()>>,
    /// Behind a lock only so that the view can be shared.
    ended: Mutex<mpsc::Receiver<()>>,
}

impl Mounted {
    /// Mounts `filesystem` at the directory `at` of the current mount namespace and serves it from
    /// `threads` threads, which inherit that namespace. `on_end` is told when serving has ended, with
    /// the cause.
    ///
    /// The device is opened here and not before: its user namespace must be the mount's.
    pub fn new(
        filesystem: impl Filesystem,
        at: &Path,
        threads: NonZeroUsize,
        on_end: impl FnOnce(io::Result<()>) + Send + 'static,
    ) -> Result<Self, ViewError> {
        let device = OpenOptions::new().read(true).write(true).open(DEVICE);
        let device: OwnedFd = device.map_err(|source| ViewError::Device { source })?.into();
        // With default_permissions it is the kernel that checks modes.
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions",
            device.as_raw_fd()
        );
        nix::mount::mount(Some("cofferdam"), at, Some("fuse.cofferdam"), FLAGS, Some(options.as_str()))
            .map_err(|errno| ViewError::Mount { at: at.to_owned(), source: errno.into() })?;
        Self::serve(filesystem, device, at, threads, on_end).map_err(|source| {
            let _ = unmount(at);
            ViewError::Session { source }
        })
    }

    fn serve(
        filesystem: impl Filesystem,
        device: OwnedFd,
        at: &Path,
        threads: NonZeroUsize,
        on_end: impl FnOnce(io::Result<()>) + Send + 'static,
    ) -> io::Result<Self> {
        let mut config = Config::default();
        config.acl = SessionACL::All;
        config.n_threads = Some(threads.get());
        let session = Session::from_fd(filesystem, device, SessionACL::All, config)?;
        let notifier = session.notifier();
        let (sender, ended) = mpsc::channel();
        let thread = std::thread::Builder::new().name("view".to_owned()).spawn(move || {
            on_end(session.run());
            let _ = sender.send(());
        })?;
        Ok(Self { at: at.to_owned(), notifier, thread: Some(thread), ended: Mutex::new(ended) })
    }

    /// What tells the kernel to drop what it remembers. Must not be used by a thread that serves
    /// requests: the kernel may wait for such a request before it takes the notice.
    pub fn notifier(&self) -> Notifier {
        self.notifier.clone()
    }
}

impl Drop for Mounted {
    /// Aborts the connection: requests under way get an error at once, and so does every later one.
    fn drop(&mut self) {
        if let Err(errno) = unmount(&self.at) {
            tracing::warn!(at = %self.at.display(), "can't unmount the view: {errno}");
        }
        let ended = self.ended.get_mut().unwrap_or_else(PoisonError::into_inner);
        match ended.recv_timeout(END) {
            // Disconnected: the thread has panicked, which also is an end.
            Ok(()) | Err(mpsc::RecvTimeoutError::Disconnected) => {
                let _ = self.thread.take().map(JoinHandle::join);
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {
                tracing::warn!(at = %self.at.display(), "the threads of the view have not ended");
            }
        }
    }
}

/// Force aborts the connection even where the mount is in use; detach then takes it out of the way.
fn unmount(at: &Path) -> Result<(), Errno> {
    nix::mount::umount2(at, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH)
}

/// Makes the kernel forget all names of the file system at `at` that are not in use. That is a side
/// effect of mounting it again as it is; a name that is in use by a live build stays.
pub fn shrink(at: &Path) {
    let flags = MsFlags::MS_REMOUNT | FLAGS;
    if let Err(errno) = nix::mount::mount(None::<&str>, at, None::<&str>, flags, None::<&str>) {
        tracing::warn!(at = %at.display(), "can't make the kernel forget builds that have gone: {errno}");
    }
}
