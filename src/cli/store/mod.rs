//! `cofferdam store`: files and directories into the store, and out again.

mod add;
mod cat;
mod gc;
mod get;
mod ls;
mod mount;
mod pin;
mod place;
mod progress;
mod stat;
mod tar;
mod untar;
mod verify;

use std::path::PathBuf;

use clap::{Args, Subcommand};
use tokio::runtime::Runtime;

use super::{Failed, StateArgs, runtime, start_failed_here};
use crate::address::Address;
use crate::castore::local::verify::Repair;
use crate::castore::remote::RemoteStore;
use crate::castore::{LocalStore, Store};
use crate::config::Lifetime;
use crate::worker::StateDir;

pub(super) use add::add;
pub(super) use get::put;

/// Arguments of `cofferdam store`.
#[derive(Debug, Args)]
pub struct StoreArgs {
    #[command(subcommand)]
    command: StoreCommand,
    /// Use the store of a daemon: unix:PATH, HOST:PORT, grpc+unix:PATH or grpc+http://HOST:PORT
    #[arg(long, value_name = "ADDR", global = true, conflicts_with = "state_dir")]
    to: Option<Address>,
    #[command(flatten)]
    state: StateArgs,
}

#[derive(Debug, Subcommand)]
enum StoreCommand {
    /// Put files and directories into the store and print their digests.
    Add(add::AddArgs),
    /// Write a file or a directory of the store to DEST, which must not be there yet.
    ///
    /// A digest stands for contents alone. A file that is named by one alone comes back without the permission to execute
    /// it: that is part of the directory it was in. No contents at all have one digest, of the empty file and of the empty
    /// directory: it comes back as a directory if the store has an empty one, else as a file.
    Get(get::GetArgs),
    /// List a directory of the store.
    Ls(ls::LsArgs),
    /// Write the contents of a file of the store to standard output.
    Cat(cat::CatArgs),
    /// Write a directory or a file of the store as a tar archive.
    ///
    /// The archive depends on what is in it and on nothing else: names are sorted, owners are 0, times one second after the
    /// epoch, modes 0444, or 0555 for directories and what may be executed.
    Tar(tar::TarArgs),
    /// Put what is in an uncompressed tar archive into the store and print its digest.
    ///
    /// Hard links become files of their own. Refused are absolute paths and those with "..", devices, links to what is not
    /// in the archive before them, names that stand twice, and archives that are cut off.
    Untar(untar::UntarArgs),
    /// Show a directory of the store at DIR, read-only, until SIGINT or SIGTERM or until it is unmounted.
    ///
    /// With COMMAND, only COMMAND and what it starts see it, and it lasts as long as COMMAND. That takes no privileges: for
    /// others than root, COMMAND runs in a user namespace, in which they are root without being so outside. Without COMMAND
    /// all of the host sees it, which takes root.
    Mount(mount::MountArgs),
    /// Read everything in the store, compare it with its digest, and look for all that directories name.
    ///
    /// Each thing that is wrong is a line on standard output. Exit code: 0 where nothing is wrong, or all that was is
    /// removed; 1 otherwise.
    Verify(verify::VerifyArgs),
    /// Remove from the store what was used longest ago, or not for long.
    ///
    /// What is pinned stays, and so does what is younger than ten minutes: it may be part of something on its way there.
    #[command(group = clap::ArgGroup::new("goal").required(true).multiple(true).args(["size", "unused_for"]))]
    Gc(gc::GcArgs),
    /// Keep a directory, with all beneath it, or a file in the store, whatever is removed from it.
    Pin(pin::PinArgs),
    /// Keep it no longer.
    Unpin(pin::PinArgs),
    /// Show how much the store holds, and what is pinned.
    Stat(stat::StatArgs),
}

/// Does what the arguments say. Yields the exit code.
///
/// # Errors
/// Where the store, or the file system, refuses.
pub fn run(args: StoreArgs) -> Result<u8, Failed> {
    super::start_logging("warn")?;
    let source = match args.to {
        Some(address) => Source::Daemon(address),
        None => Source::Here(args.state),
    };
    let done = match args.command {
        StoreCommand::Add(args) => add::run(&args, source),
        StoreCommand::Get(args) => get::run(&args, source),
        StoreCommand::Ls(args) => ls::run(&args, source),
        StoreCommand::Cat(args) => cat::run(&args, source),
        StoreCommand::Tar(args) => tar::run(&args, source),
        StoreCommand::Untar(args) => untar::run(&args, source),
        StoreCommand::Mount(args) => return mount::run(args, source),
        StoreCommand::Verify(args) => return verify::run(&args, source),
        StoreCommand::Gc(args) => gc::run(&args, source),
        StoreCommand::Pin(args) => pin::pin(&args, source),
        StoreCommand::Unpin(args) => pin::unpin(&args, source),
        StoreCommand::Stat(args) => stat::run(&args, source),
    };
    done.map(|()| 0)
}

/// Whose store is meant.
enum Source {
    /// That of a daemon.
    Daemon(Address),
    /// That of a state directory, which no daemon may be using.
    Here(StateArgs),
}

/// A store, and what it needs as long as it is used. The store's calls must not be made on the runtime.
struct Opened {
    store: Store,
    /// Whether the store can say that it had a blob before.
    knows_new: bool,
    _state: Option<StateDir>,
    _runtime: Option<Runtime>,
}

impl Source {
    /// Opens it.
    ///
    /// # Errors
    /// Where it is in use or can't be reached.
    fn open(self) -> Result<Opened, Failed> {
        self.claim()?.open()
    }

    /// Takes the state directory, if it is one. The program needs no more than one thread for that.
    fn claim(self) -> Result<Claimed, Failed> {
        Ok(match self {
            Self::Daemon(address) => Claimed::Daemon(address),
            Self::Here(state) => {
                let state = StateDir::take(&state.resolve()?, Lifetime::Lasting);
                Claimed::Here(state.map_err(start_failed_here)?)
            }
        })
    }
}

/// A store of this machine itself, for what no protocol has words for.
struct Own {
    local: LocalStore,
    _state: StateDir,
}

impl Source {
    /// Opens the store as one of this machine.
    ///
    /// # Errors
    /// Where it is another's, in use, or can't be opened.
    fn own(self) -> Result<Own, Failed> {
        let state = self.state()?;
        Ok(Own { local: LocalStore::open(&state.store())?, _state: state })
    }

    /// The same, and checks the store's index; yields where a damaged one was moved to, if `repair` asks for that.
    ///
    /// # Errors
    /// As [`Source::own`]; where the index is damaged and is not to be repaired.
    fn own_checked(self, repair: Repair) -> Result<(Own, Option<PathBuf>), Failed> {
        let state = self.state()?;
        let (local, aside) = LocalStore::open_checked(&state.store(), repair)?;
        Ok((Own { local, _state: state }, aside))
    }

    fn state(self) -> Result<StateDir, Failed> {
        match self.claim()? {
            Claimed::Daemon(_) => Err(Failed(
                "--to is for what can be asked of any store; this is done where the store lies, while no daemon uses it"
                    .into(),
            )),
            Claimed::Here(state) => Ok(state),
        }
    }
}

/// A store that is not opened yet, but no one else's.
enum Claimed {
    Daemon(Address),
    Here(StateDir),
}

impl Claimed {
    fn open(self) -> Result<Opened, Failed> {
        match self {
            Self::Daemon(address) => {
                let runtime = runtime()?;
                let channel = runtime.block_on(address.connect())?;
                let handle = runtime.handle().clone();
                let store = RemoteStore::new(channel, &address, handle, &std::env::temp_dir()).store();
                Ok(Opened { store, knows_new: false, _state: None, _runtime: Some(runtime) })
            }
            Self::Here(state) => {
                let store = LocalStore::open(&state.store())?.store();
                Ok(Opened { store, knows_new: true, _state: Some(state), _runtime: None })
            }
        }
    }
}
