//! The database of a store: directories, and where small blobs lie in their packs.

use std::collections::HashMap;
use std::sync::Arc;

use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};

use super::Root;
use super::packs::{Batch, Place};
use crate::castore::node::{Digest, Node};
use crate::castore::traits::StoreError;
use crate::castore::tree::ObjectKind;
use crate::config::Lifetime;

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
    database: Database,
    root: Arc<Root>,
}

impl Index {
    /// Opens the database, or makes it. What happens to it, it is whole after the death of its process.
    pub(super) fn open(root: Arc<Root>) -> Result<Self, StoreError> {
        let database = Database::builder()
            .set_cache_size(CACHE_BYTES)
            .create(root.path.join("index.redb"))
            .map_err(|error| refused("open", error))?;
        let index = Self { database, root };
        index.make_tables()?;
        Ok(index)
    }

    /// Makes the tables, so that readers need not ask whether they are there. A transaction syncs: a store that has
    /// them is opened without.
    fn make_tables(&self) -> Result<(), StoreError> {
        let reading = self.database.begin_read().map_err(|error| refused("read", error))?;
        // The one that is made last.
        if reading.open_table(PINS).is_ok() {
            return Ok(());
        }
        self.write(|writing| {
            writing.open_table(DIRECTORIES).map_err(|error| refused("create a table in", error))?;
            writing.open_table(SMALL).map_err(|error| refused("create a table in", error))?;
            writing.open_table(PACKS).map_err(|error| refused("create a table in", error))?;
            writing.open_table(USED).map_err(|error| refused("create a table in", error))?;
            writing.open_table(PINS).map_err(|error| refused("create a table in", error))?;
            Ok(())
        })
    }

    /// Carries out one transaction: all of it or nothing. It is on disk when this returns.
    fn write<T>(
        &self,
        change: impl FnOnce(&WriteTransaction) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let mut writing = self.database.begin_write().map_err(|error| refused("write to", error))?;
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
    }

    /// Hands the encoding of a directory to `look`, if there is one.
    pub(super) fn directory<T>(
        &self,
        digest: &Digest,
        look: impl FnOnce(&[u8]) -> T,
    ) -> Result<Option<T>, StoreError> {
        let reading = self.database.begin_read().map_err(|error| refused("read", error))?;
        let table = reading.open_table(DIRECTORIES).map_err(|error| refused("read", error))?;
        let found = table.get(digest.as_bytes()).map_err(|error| refused("read", error))?;
        Ok(found.map(|found| look(found.value())))
    }

    /// Those of `given` that are not there as they are, in their order.
    pub(super) fn absent<'a>(&self, given: &'a [Encoded]) -> Result<Vec<&'a Encoded>, StoreError> {
        let reading = self.database.begin_read().map_err(|error| refused("read", error))?;
        let table = reading.open_table(DIRECTORIES).map_err(|error| refused("read", error))?;
        let mut absent = Vec::new();
        for directory in given {
            let found = table.get(directory.digest.as_bytes()).map_err(|error| refused("read", error))?;
            if found.is_none_or(|found| found.value() != directory.bytes) {
                absent.push(directory);
            }
        }
        Ok(absent)
    }

    /// Where a small blob lies.
    pub(super) fn place(&self, digest: &Digest) -> Result<Option<Place>, StoreError> {
        let reading = self.database.begin_read().map_err(|error| refused("read", error))?;
        let table = reading.open_table(SMALL).map_err(|error| refused("read", error))?;
        let found = table.get(digest.as_bytes()).map_err(|error| refused("read", error))?;
        Ok(found.map(|found| found.value().into()))
    }

    /// Up to where the records of a pack are known.
    pub(super) fn known(&self, pack: u32) -> Result<Option<u64>, StoreError> {
        let reading = self.database.begin_read().map_err(|error| refused("read", error))?;
        let table = reading.open_table(PACKS).map_err(|error| refused("read", error))?;
        let found = table.get(pack).map_err(|error| refused("read", error))?;
        Ok(found.map(|found| found.value()))
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
        let reading = self.database.begin_read().map_err(|error| refused("read", error))?;
        let table = reading.open_table(table).map_err(|error| refused("read", error))?;
        let mut objects = Vec::new();
        for entry in table.iter().map_err(|error| refused("read", error))? {
            let (key, time) = entry.map_err(|error| refused("read", error))?;
            let (kind, digest) = key.value();
            let kind = if kind == b'd' { ObjectKind::Directory } else { ObjectKind::Blob };
            objects.push((Object { kind, digest: Digest::from(*digest) }, time.value()));
        }
        Ok(objects)
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
        let reading = self.database.begin_read().map_err(|error| refused("read", error))?;
        let table = reading.open_table(DIRECTORIES).map_err(|error| refused("read", error))?;
        for entry in table.iter().map_err(|error| refused("read", error))? {
            let (digest, bytes) = entry.map_err(|error| refused("read", error))?;
            look(Digest::from(*digest.value()), bytes.value())?;
        }
        Ok(())
    }

    /// Where every small blob lies, in no order.
    pub(super) fn places(&self) -> Result<Vec<(Digest, Place)>, StoreError> {
        let reading = self.database.begin_read().map_err(|error| refused("read", error))?;
        let table = reading.open_table(SMALL).map_err(|error| refused("read", error))?;
        let entries = table.iter().map_err(|error| refused("read", error))?;
        let place =
            |entry: Result<(redb::AccessGuard<'_, &[u8; Digest::LEN]>, redb::AccessGuard<'_, _>), _>| {
                let (digest, place) = entry.map_err(|error: redb::StorageError| refused("read", error))?;
                Ok((Digest::from(*digest.value()), Place::from(place.value())))
            };
        entries.map(place).collect()
    }
}

pub(super) fn refused(act: &'static str, source: impl Into<redb::Error>) -> StoreError {
    StoreError::Database { act, source: Box::new(source.into()) }
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
