//! Directories in a database.

use std::sync::Arc;

use redb::{Database, Durability, ReadableDatabase, TableDefinition, TableError, WriteTransaction};

use super::Root;
use crate::castore::children::check_children;
use crate::castore::node::{Digest, Directory};
use crate::castore::traits::{DirectoryService, StoreError};
use crate::config::Lifetime;
use crate::recent::Memo;

/// Canonical encodings by digest.
const TABLE: TableDefinition<&[u8; Digest::LEN], &[u8]> = TableDefinition::new("directories");

/// How much of its file the database may keep in memory.
const DATABASE_CACHE_BYTES: usize = 16 * 1024 * 1024;

/// How many entries of directories may be remembered in decoded form, about 150 bytes each.
const REMEMBERED_ENTRIES: usize = 256 * 1024;

pub(super) struct Directories {
    database: Database,
    remembered: Memo<Digest, Arc<Directory>>,
    root: Arc<Root>,
}

impl Directories {
    pub(super) fn open(root: Arc<Root>) -> Result<Self, StoreError> {
        let path = root.path.join("directories.redb");
        let database = Database::builder()
            .set_cache_size(DATABASE_CACHE_BYTES)
            .create(path)
            .map_err(|error| refused("open", error))?;
        let remembered = Memo::new(REMEMBERED_ENTRIES);
        let directories = Self { database, remembered, root };
        directories.make_table()?;
        Ok(directories)
    }

    /// Makes the table, so that readers need not ask whether there is one. A transaction syncs: a store that
    /// has it is opened without.
    fn make_table(&self) -> Result<(), StoreError> {
        let reading = self.database.begin_read().map_err(|error| refused("read", error))?;
        match reading.open_table(TABLE) {
            Ok(_) => Ok(()),
            Err(TableError::TableDoesNotExist(_)) => {
                let writing = self.begin_write()?;
                writing.open_table(TABLE).map_err(|error| refused("create a table in", error))?;
                writing.commit().map_err(|error| refused("write to", error))
            }
            Err(error) => Err(refused("read", error)),
        }
    }

    fn begin_write(&self) -> Result<WriteTransaction, StoreError> {
        let mut writing = self.database.begin_write().map_err(|error| refused("write to", error))?;
        if self.root.lifetime == Lifetime::Ephemeral {
            writing.set_durability(Durability::None).map_err(|error| refused("write to", error))?;
        }
        Ok(writing)
    }

    fn read(&self, digest: &Digest) -> Result<Option<Arc<Directory>>, StoreError> {
        let reading = self.database.begin_read().map_err(|error| refused("read", error))?;
        let table = reading.open_table(TABLE).map_err(|error| refused("read", error))?;
        let Some(found) = table.get(digest.as_bytes()).map_err(|error| refused("read", error))? else {
            return Ok(None);
        };
        let damaged = || StoreError::Damaged { kind: "directory", digest: *digest };
        if Digest::of(found.value()) != *digest {
            return Err(damaged());
        }
        Directory::decode(found.value()).map(|directory| Some(Arc::new(directory))).map_err(|_| damaged())
    }

    /// Those of `given` that the table doesn't hold as they are, in their order.
    fn absent<'a>(&self, given: &'a [Encoded]) -> Result<Vec<&'a Encoded>, StoreError> {
        let reading = self.database.begin_read().map_err(|error| refused("read", error))?;
        let table = reading.open_table(TABLE).map_err(|error| refused("read", error))?;
        let mut absent = Vec::new();
        for directory in given {
            let found = table.get(directory.digest.as_bytes()).map_err(|error| refused("read", error))?;
            if found.is_none_or(|found| found.value() != directory.bytes) {
                absent.push(directory);
            }
        }
        Ok(absent)
    }

    fn insert(&self, directories: &[&Encoded]) -> Result<(), StoreError> {
        let writing = self.begin_write()?;
        {
            let mut table = writing.open_table(TABLE).map_err(|error| refused("write to", error))?;
            for directory in directories {
                table
                    .insert(directory.digest.as_bytes(), directory.bytes.as_slice())
                    .map_err(|error| refused("write to", error))?;
            }
        }
        writing.commit().map_err(|error| refused("write to", error))
    }
}

impl DirectoryService for Directories {
    fn get(&self, digest: &Digest) -> Result<Option<Arc<Directory>>, StoreError> {
        if let Some(directory) = self.remembered.get(digest) {
            return Ok(Some(directory));
        }
        let directory = self.read(digest)?;
        if let Some(directory) = &directory {
            let weight = 1 + directory.entries().len();
            self.remembered.insert(*digest, Arc::clone(directory), weight);
        }
        Ok(directory)
    }

    fn put(&self, directories: Vec<Directory>) -> Result<(), StoreError> {
        let encoded: Vec<Encoded> = directories.iter().map(Encoded::from).collect();
        let digests = encoded.iter().map(|encoded| encoded.digest);
        check_children(digests.zip(&directories), |child| Ok(self.get(child)?.map(|child| child.size())))?;
        let absent = self.absent(&encoded)?;
        // Blobs before the directories that name them.
        self.root.sync()?;
        // A commit costs another sync; a tree that is here already should not.
        if absent.is_empty() { Ok(()) } else { self.insert(&absent) }
    }

    fn trim(&self) {
        self.remembered.clear();
    }
}

struct Encoded {
    digest: Digest,
    bytes: Vec<u8>,
}

impl From<&Directory> for Encoded {
    fn from(directory: &Directory) -> Self {
        let bytes = directory.encode();
        Self { digest: Digest::of(&bytes), bytes }
    }
}

fn refused(act: &'static str, source: impl Into<redb::Error>) -> StoreError {
    StoreError::Database { act, source: Box::new(source.into()) }
}
