//! The database of a store: directories, and where small blobs lie in their packs.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::ErrorKind::{InvalidData, UnexpectedEof};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use nix::libc;
use redb::{
    Database, Durability, ReadTransaction, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction,
};

use super::packs::{Batch, Place};
use super::{Root, failed, shown};
use crate::castore::node::{Digest, Node};
use crate::castore::traits::StoreError;
use crate::castore::tree::ObjectKind;
use crate::config::Lifetime;
use crate::lock::lock;

/// What the database's file is called.
pub(super) const FILE_NAME: &str = "index.redb";

/// Canonical encodings by digest.
const DIRECTORIES: TableDefinition<&[u8; Digest::LEN], &[u8]> = TableDefinition::new("directories");

/// Small blobs by digest: number of the pack, offset of the contents, their length.
const SMALL: TableDefinition<&[u8; Digest::LEN], (u32, u64, u32)> = TableDefinition::new("small");

/// Up to where the records of each pack are in [`SMALL`], or were and have been removed from it.
const PACKS: TableDefinition<u32, u64> = TableDefinition::new("packs");

/// When roots were used last, in seconds since the epoch.
const USED: TableDefinition<Key, u64> = TableDefinition::new("used");

/// What is never removed, and since when, in seconds since the epoch.
const PINS: TableDefinition<Key, u64> = TableDefinition::new("pins");

/// `b'd'` or `b'b'`, for directory or blob, and the digest.
type Key = (u8, &'static [u8; Digest::LEN]);

/// How much of its file the database may keep in memory.
const CACHE_BYTES: usize = 16 * 1024 * 1024;

/// A directory on its way into the store, and its digest.
pub(super) struct Encoded {
    pub(super) digest: Digest,
    pub(super) bytes: Vec<u8>,
}

/// A blob or a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Object {
    /// Which of the two.
    pub kind: ObjectKind,
    /// Its digest.
    pub digest: Digest,
}

impl Object {
    /// What a node stands for in a store: nothing, for a symbolic link.
    pub fn of(node: &Node) -> Option<Self> {
        match node {
            Node::Directory { digest, .. } => Some(Self { kind: ObjectKind::Directory, digest: *digest }),
            Node::File { digest, .. } => Some(Self { kind: ObjectKind::Blob, digest: *digest }),
            Node::Symlink { .. } => None,
        }
    }

    fn key(&self) -> (u8, &[u8; Digest::LEN]) {
        match self.kind {
            ObjectKind::Directory => (b'd', self.digest.as_bytes()),
            ObjectKind::Blob => (b'b', self.digest.as_bytes()),
        }
    }
}

pub(super) struct Index {
    /// None where it could not be opened again.
    database: Mutex<Option<Arc<Database>>>,
    /// Whether it has to be: after an error of the disk a database refuses everything.
    failed: AtomicBool,
    root: Arc<Root>,
}

impl Index {
    /// Opens the database, or makes it. What happens to it, it is whole after the death of its process.
    pub(super) fn open(root: Arc<Root>) -> Result<Self, StoreError> {
        Ok(Self::of(open_file(&root, Checks::No)?, root))
    }

    /// The same, and reads all of it.
    pub(super) fn open_checked(root: &Arc<Root>) -> Result<Self, StoreError> {
        let index = Self::of(open_file(root, Checks::All)?, Arc::clone(root));
        index.each_directory(|_, _| Ok(()))?;
        index.places()?;
        index.ends()?;
        Ok(index)
    }

    fn of(database: Database, root: Arc<Root>) -> Self {
        Self { database: Mutex::new(Some(Arc::new(database))), failed: AtomicBool::new(false), root }
    }

    /// The database, opened anew if it has failed.
    fn database(&self) -> Result<Arc<Database>, StoreError> {
        let mut slot = lock(&self.database);
        if let Some(database) = &*slot
            && (!self.failed.load(Ordering::Acquire) || Arc::strong_count(database) > 1)
        {
            // Where others still have the one that failed, it says so itself.
            return Ok(Arc::clone(database));
        }
        let _ = contained(&self.root, || {
            drop(slot.take());
            Ok(())
        });
        let database = Arc::new(open_file(&self.root, Checks::No)?);
        self.failed.store(false, Ordering::Release);
        Ok(Arc::clone(slot.insert(database)))
    }

    /// Does something with the database, and notes where that fails.
    fn attempt<T>(&self, act: impl FnOnce(&Database) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let database = self.database()?;
        let done = contained(&self.root, || act(&database));
        if done.is_err() {
            self.failed.store(true, Ordering::Release);
        }
        done
    }

    /// Reads the database as it is now.
    fn read<T>(&self, look: impl FnOnce(&ReadTransaction) -> Result<T, StoreError>) -> Result<T, StoreError> {
        self.attempt(|database| look(&database.begin_read().map_err(|error| refused("read", error))?))
    }

    /// Carries out one transaction: all of it or nothing. It is on disk when this returns.
    fn write<T>(
        &self,
        change: impl FnOnce(&WriteTransaction) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let done = self.attempt(|database| {
            let mut writing = database.begin_write().map_err(|error| refused("write to", error))?;
            match self.root.lifetime {
                Lifetime::Ephemeral => {
                    writing.set_durability(Durability::None).map_err(|error| refused("write to", error))?;
                }
                // After a crash the database is not walked as a whole.
                Lifetime::Lasting => writing.set_quick_repair(true),
            }
            let done = change(&writing)?;
            writing.commit().map_err(|error| refused("write to", error))?;
            Ok(done)
        });
        // A full disk refuses what is written; any other refusal may be that of what was written before.
        done.inspect_err(|error| {
            if let StoreError::Io { source, .. } = error
                && !matches!(source.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
            {
                self.root.note_failed_sync();
            }
        })
    }

    /// Hands the encoding of a directory to `look`, if there is one.
    pub(super) fn directory<T>(
        &self,
        digest: &Digest,
        look: impl FnOnce(&[u8]) -> T,
    ) -> Result<Option<T>, StoreError> {
        self.read(|reading| {
            let table = reading.open_table(DIRECTORIES).map_err(|error| refused("read", error))?;
            let found = table.get(digest.as_bytes()).map_err(|error| refused("read", error))?;
            Ok(found.map(|found| look(found.value())))
        })
    }

    /// Those of `given` that are not there as they are, in their order.
    pub(super) fn absent<'a>(&self, given: &'a [Encoded]) -> Result<Vec<&'a Encoded>, StoreError> {
        self.read(|reading| {
            let table = reading.open_table(DIRECTORIES).map_err(|error| refused("read", error))?;
            let mut absent = Vec::new();
            for directory in given {
                let found = table.get(directory.digest.as_bytes()).map_err(|error| refused("read", error))?;
                if found.is_none_or(|found| found.value() != directory.bytes) {
                    absent.push(directory);
                }
            }
            Ok(absent)
        })
    }

    /// Where a small blob lies.
    pub(super) fn place(&self, digest: &Digest) -> Result<Option<Place>, StoreError> {
        self.read(|reading| {
            let table = reading.open_table(SMALL).map_err(|error| refused("read", error))?;
            let found = table.get(digest.as_bytes()).map_err(|error| refused("read", error))?;
            Ok(found.map(|found| found.value().into()))
        })
    }

    /// [`Index::place`] for many, in their order.
    pub(super) fn places_of(&self, digests: &[Digest]) -> Result<Vec<Option<Place>>, StoreError> {
        self.read(|reading| {
            let table = reading.open_table(SMALL).map_err(|error| refused("read", error))?;
            let place = |digest: &Digest| {
                let found = table.get(digest.as_bytes()).map_err(|error| refused("read", error))?;
                Ok(found.map(|found| found.value().into()))
            };
            digests.iter().map(place).collect()
        })
    }

    /// Up to where the records of a pack are known.
    pub(super) fn known(&self, pack: u32) -> Result<Option<u64>, StoreError> {
        self.read(|reading| {
            let table = reading.open_table(PACKS).map_err(|error| refused("read", error))?;
            let found = table.get(pack).map_err(|error| refused("read", error))?;
            Ok(found.map(|found| found.value()))
        })
    }

    /// Up to where the records of all packs are known.
    pub(super) fn ends(&self) -> Result<Vec<(u32, u64)>, StoreError> {
        self.read(|reading| {
            let table = reading.open_table(PACKS).map_err(|error| refused("read", error))?;
            let entries = table.iter().map_err(|error| refused("read", error))?;
            entries
                .map(|entry| {
                    let (pack, end) = entry.map_err(|error| refused("read", error))?;
                    Ok((pack.value(), end.value()))
                })
                .collect()
        })
    }

    /// Forgets the small blobs that would lie beyond these ends of packs.
    pub(super) fn cut_off(&self, ends: &BTreeMap<u32, u64>) -> Result<(), StoreError> {
        self.write(|writing| {
            let mut table = writing.open_table(SMALL).map_err(|error| refused("write to", error))?;
            let lies_within = |place: (u32, u64, u32)| {
                let Place { pack, offset, len } = place.into();
                ends.get(&pack).is_none_or(|end| offset.saturating_add(u64::from(len)) <= *end)
            };
            table.retain(|_, place| lies_within(place)).map_err(|error| refused("write to", error))?;
            let mut table = writing.open_table(PACKS).map_err(|error| refused("write to", error))?;
            for (pack, end) in ends {
                table.insert(pack, end).map_err(|error| refused("write to", error))?;
            }
            Ok(())
        })
    }

    /// Adds directories, small blobs whose packs are on disk, and when roots were used.
    pub(super) fn add(
        &self,
        directories: &[&Encoded],
        blobs: &Batch,
        used: &HashMap<Object, u64>,
    ) -> Result<(), StoreError> {
        self.write(|writing| {
            let mut table = writing.open_table(DIRECTORIES).map_err(|error| refused("write to", error))?;
            for directory in directories {
                table
                    .insert(directory.digest.as_bytes(), directory.bytes.as_slice())
                    .map_err(|error| refused("write to", error))?;
            }
            let mut table = writing.open_table(SMALL).map_err(|error| refused("write to", error))?;
            for (digest, place) in &blobs.places {
                table
                    .insert(digest.as_bytes(), <(u32, u64, u32)>::from(*place))
                    .map_err(|error| refused("write to", error))?;
            }
            let mut table = writing.open_table(PACKS).map_err(|error| refused("write to", error))?;
            for (pack, end) in &blobs.ends {
                table.insert(pack, end).map_err(|error| refused("write to", error))?;
            }
            let mut table = writing.open_table(USED).map_err(|error| refused("write to", error))?;
            for (object, time) in used {
                table.insert(object.key(), time).map_err(|error| refused("write to", error))?;
            }
            Ok(())
        })
    }

    /// When roots were used last.
    pub(super) fn used(&self) -> Result<Vec<(Object, u64)>, StoreError> {
        self.objects(USED)
    }

    /// What is never removed, and since when.
    pub(super) fn pins(&self) -> Result<Vec<(Object, u64)>, StoreError> {
        self.objects(PINS)
    }

    fn objects(&self, table: TableDefinition<Key, u64>) -> Result<Vec<(Object, u64)>, StoreError> {
        self.read(|reading| {
            let table = reading.open_table(table).map_err(|error| refused("read", error))?;
            let mut objects = Vec::new();
            for entry in table.iter().map_err(|error| refused("read", error))? {
                let (key, time) = entry.map_err(|error| refused("read", error))?;
                let (kind, digest) = key.value();
                let kind = if kind == b'd' { ObjectKind::Directory } else { ObjectKind::Blob };
                objects.push((Object { kind, digest: Digest::from(*digest) }, time.value()));
            }
            Ok(objects)
        })
    }

    /// Pins something from `time` on, or pins it no longer; false where that was so before.
    pub(super) fn pin(&self, object: Object, time: Option<u64>) -> Result<bool, StoreError> {
        self.write(|writing| {
            let mut table = writing.open_table(PINS).map_err(|error| refused("write to", error))?;
            let found = table.get(object.key()).map_err(|error| refused("read", error))?;
            let pinned = found.map(|found| found.value());
            match time {
                Some(time) if pinned.is_none() => {
                    drop(table.insert(object.key(), time).map_err(|error| refused("write to", error))?);
                }
                None => drop(table.remove(object.key()).map_err(|error| refused("write to", error))?),
                Some(_) => {}
            }
            Ok(pinned.is_some() != time.is_some())
        })
    }

    /// Forgets when blobs were used.
    pub(super) fn forget_used<'d>(
        &self,
        blobs: impl IntoIterator<Item = &'d Digest>,
    ) -> Result<(), StoreError> {
        self.write(|writing| {
            let mut used = writing.open_table(USED).map_err(|error| refused("write to", error))?;
            for digest in blobs {
                used.remove((b'b', digest.as_bytes())).map_err(|error| refused("write to", error))?;
            }
            Ok(())
        })
    }

    /// Forgets packs that are gone.
    pub(super) fn forget_packs(&self, packs: &[u32]) -> Result<(), StoreError> {
        self.write(|writing| {
            let mut table = writing.open_table(PACKS).map_err(|error| refused("write to", error))?;
            for pack in packs {
                table.remove(pack).map_err(|error| refused("write to", error))?;
            }
            Ok(())
        })
    }

    /// Forgets that small blobs lie where they are said to, if they still are.
    pub(super) fn forget(&self, blobs: &[(Digest, Place)]) -> Result<(), StoreError> {
        self.write(|writing| {
            let mut table = writing.open_table(SMALL).map_err(|error| refused("write to", error))?;
            let mut used = writing.open_table(USED).map_err(|error| refused("write to", error))?;
            for (digest, place) in blobs {
                let found = table.get(digest.as_bytes()).map_err(|error| refused("read", error))?;
                let found = found.map(|found| Place::from(found.value()));
                if found == Some(*place) {
                    table.remove(digest.as_bytes()).map_err(|error| refused("write to", error))?;
                    used.remove((b'b', digest.as_bytes())).map_err(|error| refused("write to", error))?;
                }
            }
            Ok(())
        })
    }

    /// Removes directories, all of them or none.
    pub(super) fn remove_directories<'d>(
        &self,
        digests: impl IntoIterator<Item = &'d Digest>,
    ) -> Result<(), StoreError> {
        self.write(|writing| {
            let mut table = writing.open_table(DIRECTORIES).map_err(|error| refused("write to", error))?;
            let mut used = writing.open_table(USED).map_err(|error| refused("write to", error))?;
            for digest in digests {
                table.remove(digest.as_bytes()).map_err(|error| refused("write to", error))?;
                used.remove((b'd', digest.as_bytes())).map_err(|error| refused("write to", error))?;
            }
            Ok(())
        })
    }

    /// Hands every directory to `look`, as it was when this began, until that says no.
    pub(super) fn each_directory(
        &self,
        mut look: impl FnMut(Digest, &[u8]) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        self.read(|reading| {
            let table = reading.open_table(DIRECTORIES).map_err(|error| refused("read", error))?;
            for entry in table.iter().map_err(|error| refused("read", error))? {
                let (digest, bytes) = entry.map_err(|error| refused("read", error))?;
                look(Digest::from(*digest.value()), bytes.value())?;
            }
            Ok(())
        })
    }

    /// Where every small blob lies, in no order.
    pub(super) fn places(&self) -> Result<Vec<(Digest, Place)>, StoreError> {
        self.read(|reading| {
            let table = reading.open_table(SMALL).map_err(|error| refused("read", error))?;
            let entries = table.iter().map_err(|error| refused("read", error))?;
            let place =
                |entry: Result<(redb::AccessGuard<'_, &[u8; Digest::LEN]>, redb::AccessGuard<'_, _>), _>| {
                    let (digest, place) =
                        entry.map_err(|error: redb::StorageError| refused("read", error))?;
                    Ok((Digest::from(*digest.value()), Place::from(place.value())))
                };
            entries.map(place).collect()
        })
    }
}

impl Drop for Index {
    /// A damaged database may panic at its end, too.
    fn drop(&mut self) {
        let _ = contained(&self.root, || {
            drop(lock(&self.database).take());
            Ok(())
        });
    }
}

/// Whether a database is read as a whole when it is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Checks {
    /// Only what is needed.
    No,
    /// All of it, and compared with its checksums.
    All,
}

/// Opens the database's file, or makes it, under its name only once it is complete.
fn open_file(root: &Root, checks: Checks) -> Result<Database, StoreError> {
    let path = root.path.join(FILE_NAME);
    let there = path.try_exists().map_err(|error| failed("look for", &path, error))?;
    let made = root.path.join("tmp").join(root.temporary_name());
    contained(root, || {
        let mut builder = Database::builder();
        builder.set_cache_size(CACHE_BYTES).set_check_integrity_on_open(checks == Checks::All);
        let database = builder.create(if there { &path } else { &made });
        let database = database.map_err(|error| refused("open", error))?;
        make_tables(&database, root.lifetime)?;
        if !there {
            fs::rename(&made, &path).map_err(|error| failed("create", &path, error))?;
        }
        Ok(database)
    })
}

/// Gives the database's file, which nobody has open, another name, and yields its path.
pub(super) fn move_aside(root: &Root) -> Result<PathBuf, StoreError> {
    let path = root.path.join(FILE_NAME);
    let aside = root.path.join(format!("{FILE_NAME}.damaged"));
    fs::rename(&path, &aside).map_err(|error| failed("move aside", &path, error))?;
    Ok(aside)
}

/// Makes the tables, so that readers need not ask whether they are there. A transaction syncs: a store that has
/// them is opened without.
fn make_tables(database: &Database, lifetime: Lifetime) -> Result<(), StoreError> {
    let reading = database.begin_read().map_err(|error| refused("read", error))?;
    // The one that is made last.
    if reading.open_table(PINS).is_ok() {
        return Ok(());
    }
    drop(reading);
    let mut writing = database.begin_write().map_err(|error| refused("write to", error))?;
    match lifetime {
        Lifetime::Ephemeral => {
            writing.set_durability(Durability::None).map_err(|error| refused("write to", error))?;
        }
        Lifetime::Lasting => writing.set_quick_repair(true),
    }
    writing.open_table(DIRECTORIES).map_err(|error| refused("create a table in", error))?;
    writing.open_table(SMALL).map_err(|error| refused("create a table in", error))?;
    writing.open_table(PACKS).map_err(|error| refused("create a table in", error))?;
    writing.open_table(USED).map_err(|error| refused("create a table in", error))?;
    writing.open_table(PINS).map_err(|error| refused("create a table in", error))?;
    writing.commit().map_err(|error| refused("write to", error))
}

/// Does something with the database of `root`. On one whose bytes were changed by others it may panic; that, too, is
/// damage.
fn contained<T>(root: &Root, act: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
    let done = catch_unwind(AssertUnwindSafe(act)).unwrap_or_else(|panic| {
        let said = panic.downcast_ref::<String>().map(String::as_str);
        let said = said.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it can't be read");
        Err(refused("read", redb::Error::Corrupted(said.to_owned())))
    });
    done.map_err(|error| match error {
        StoreError::Database { source, .. } if is_damage(&source) => {
            StoreError::DamagedIndex { path: shown(&root.path.join(FILE_NAME)), reason: source.to_string() }
        }
        error => error,
    })
}

fn is_damage(error: &redb::Error) -> bool {
    use redb::Error::{
        Corrupted, TableDoesNotExist, TableTypeMismatch, TypeDefinitionChanged, UpgradeRequired,
    };
    matches!(
        error,
        Corrupted(_)
            | TableDoesNotExist(_)
            | TableTypeMismatch { .. }
            | TypeDefinitionChanged { .. }
            | UpgradeRequired(_)
    )
}

pub(super) fn refused(act: &'static str, source: impl Into<redb::Error>) -> StoreError {
    match source.into() {
        // What the file's bytes are at fault for, not the disk.
        redb::Error::Io(source) if matches!(source.kind(), InvalidData | UnexpectedEof) => {
            StoreError::Database { act, source: Box::new(redb::Error::Corrupted(source.to_string())) }
        }
        redb::Error::Io(source) => StoreError::io(act, format!("the store's {FILE_NAME}"), source),
        source => StoreError::Database { act, source: Box::new(source) },
    }
}

#[cfg(test)]
impl Index {
    /// Puts other bytes where a directory lies.
    pub(super) fn overwrite_directory(&self, digest: &Digest, bytes: &[u8]) {
        let write = |writing: &WriteTransaction| {
            writing.open_table(DIRECTORIES).unwrap().insert(digest.as_bytes(), bytes).unwrap();
            Ok(())
        };
        self.write(write).unwrap();
    }
}
