//! What every store checks of directories before it takes them.

use std::collections::HashMap;

use super::node::{Digest, Directory};
use super::traits::StoreError;

/// Checks that the children of each directory stand before it or are in the store, and have the sizes that
/// it states. `stored` says what size a directory in the store has.
///
/// # Errors
/// [`StoreError::MissingChild`] and [`StoreError::ChildSize`], and what `stored` fails with.
pub(super) fn check_children<'d>(
    directories: impl IntoIterator<Item = (Digest, &'d Directory)>,
    mut stored: impl FnMut(&Digest) -> Result<Option<u64>, StoreError>,
) -> Result<(), StoreError> {
    let mut sizes: HashMap<Digest, u64> = HashMap::new();
    for (parent, directory) in directories {
        for (name, child, stated) in directory.child_directories() {
            let name = || name.to_string();
            let size = match sizes.get(&child) {
                Some(size) => Some(*size),
                None => stored(&child)?,
            };
            let actual = size.ok_or_else(|| StoreError::MissingChild { parent, name: name(), child })?;
            if actual != stated {
                return Err(StoreError::ChildSize { parent, name: name(), stated, actual });
            }
            sizes.insert(child, actual);
        }
        sizes.insert(parent, directory.size());
    }
    Ok(())
}
