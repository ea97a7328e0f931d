//! The directory service of a store elsewhere.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cofferdam_proto::castore as wire;
use tonic::{Code, Status, Streaming};
use wire::get_directory_request::ByWhat;

use super::RemoteStore;
use super::calls::Patience;
use crate::castore::children::check_children;
use crate::castore::whole::Tree;
use crate::castore::{Digest, Directory, DirectoryService, StoreError, WrongBytes};

/// How a stream with a tree ends.
type TreeEnd = Result<Option<Vec<Arc<Directory>>>, Status>;

impl DirectoryService for RemoteStore {
    fn get(&self, digest: &Digest) -> Result<Option<Arc<Directory>>, StoreError> {
        let call = || async move { self.ask(digest, false).await?.message().await };
        let Some(Some(message)) = self.calls.repeated(|| act(digest), call)? else { return Ok(None) };
        let directory = Directory::try_from(message)?;
        match directory.digest() {
            actual if actual == *digest => Ok(Some(Arc::new(directory))),
            actual => Err(self.wrong(digest, &directory, actual)),
        }
    }

    /// Asks for the tree in one call, and takes only what belongs to it.
    fn get_tree(&self, root: &Digest) -> Result<Option<Vec<Arc<Directory>>>, StoreError> {
        let mut patience = self.calls.patience();
        let mut most = 0;
        loop {
            let failure = match self.calls.runtime.block_on(patience.wait(self.ask(root, true))) {
                Err(status) if status.code() == Code::NotFound => return Ok(None),
                Err(status) => status,
                Ok(stream) => match self.take_tree(root, stream, &mut patience, &mut most)? {
                    Ok(tree) => return Ok(tree),
                    Err(status) if status.code() == Code::NotFound => return Ok(None),
                    Err(status) => status,
                },
            };
            let pause = self.calls.runtime.block_on(patience.pause(failure));
            pause.map_err(|status| self.calls.refusal(format!("{} and all below it", act(root)), &status))?;
        }
    }

    /// Stores the trees among `directories` one by one, since a call carries one: all or none holds for
    /// each of them.
    fn put(&self, directories: Vec<Directory>) -> Result<(), StoreError> {
        const ACT: &str = "store directories";
        let directories: Vec<(Digest, Directory)> =
            directories.into_iter().map(|directory| (directory.digest(), directory)).collect();
        // The store checks this as well, but its refusal would be only text.
        check_children(directories.iter().map(|(digest, directory)| (*digest, directory)), |child| {
            Ok(DirectoryService::get(self, child)?.map(|child| child.size()))
        })?;
        for (root, tree) in trees(&directories) {
            let messages: Vec<wire::Directory> = tree.into_iter().map(Into::into).collect();
            let moved = Arc::new(AtomicU64::new(0));
            let sent = Arc::clone(&moved);
            let messages = messages.into_iter().inspect(move |_| {
                sent.fetch_add(1, Ordering::Relaxed);
            });
            let mut client = self.directories.clone();
            let stored = self.calls.while_moving(&moved, client.put(tokio_stream::iter(messages)));
            let stored = stored.map_err(|status| self.calls.refusal(ACT, &status))?;
            if stored.into_inner().root_digest != root.as_bytes() {
                return Err(self.calls.failure(ACT, format!("what it stored is not {root}")));
            }
        }
        Ok(())
    }
}

impl RemoteStore {
    async fn ask(&self, digest: &Digest, recursive: bool) -> Result<Streaming<wire::Directory>, Status> {
        let by_what = Some(ByWhat::Digest(digest.as_bytes().to_vec()));
        let request = wire::GetDirectoryRequest { by_what, recursive };
        Ok(self.directories.clone().get(request).await?.into_inner())
    }

    /// Takes a tree from a stream. The inner error is the stream's; `most` is how many directories of the tree have come
    /// in any call.
    fn take_tree(
        &self,
        root: &Digest,
        mut stream: Streaming<wire::Directory>,
        patience: &mut Patience,
        most: &mut usize,
    ) -> Result<TreeEnd, StoreError> {
        let mut tree = Tree::new(*root);
        let mut count = 0;
        loop {
            let message = match self.calls.runtime.block_on(patience.wait(stream.message())) {
                Ok(Some(message)) => message,
                Ok(None) if count == 0 => return Ok(Ok(None)),
                Ok(None) => return tree.complete().map(|tree| Ok(Some(tree))),
                // It has no more of it: then it is known what is missing.
                Err(status) if count > 0 && lacks_the_rest(&status) => {
                    return tree.complete().map(|tree| Ok(Some(tree)));
                }
                Err(status) => return Ok(Err(status)),
            };
            let bytes = prost::Message::encoded_len(&message);
            let directory = Directory::try_from(message)?;
            let digest = directory.digest();
            if count == 0 && digest != *root {
                return Err(self.wrong(root, &directory, digest));
            }
            if !tree.add(digest, Arc::new(directory))? {
                let message = format!("it sent {digest}, which does not belong there, or was sent before");
                return Err(self.calls.failure(format!("{} and all below it", act(root)), message));
            }
            count += 1;
            if count > *most {
                *most = count;
                patience.progress(bytes);
            }
        }
    }

    fn wrong(&self, digest: &Digest, directory: &Directory, actual: Digest) -> StoreError {
        let fault = WrongBytes::Digest { size: directory.encoded_len() as u64, actual };
        let address = self.calls.address.clone();
        StoreError::Wrong { address, kind: "directory", digest: *digest, fault: fault.into() }
    }
}

/// Whether a server that has begun to send a tree says that it has not all of it. There is no code for that.
fn lacks_the_rest(status: &Status) -> bool {
    let codes = [Code::Internal, Code::NotFound, Code::DataLoss, Code::FailedPrecondition];
    codes.contains(&status.code()) && std::error::Error::source(status).is_none()
}

fn act(digest: &Digest) -> String {
    format!("give the directory {digest}")
}

/// Splits a list of directories, children before parents, into trees: each ends with a root and has
/// nothing that this does not reach, and each digest stands in one of them.
fn trees(directories: &[(Digest, Directory)]) -> Vec<(Digest, Vec<&Directory>)> {
    let mut trees = Vec::new();
    let mut taken: HashSet<Digest> = HashSet::new();
    for (last, (root, _)) in directories.iter().enumerate().rev() {
        if taken.contains(root) {
            continue;
        }
        let mut wanted = HashSet::from([*root]);
        let mut tree = Vec::new();
        for (digest, directory) in directories.iter().take(last + 1).rev() {
            if wanted.contains(digest) && taken.insert(*digest) {
                wanted.extend(directory.child_directories().map(|(_, child, _)| child));
                tree.push(directory);
            }
        }
        tree.reverse();
        trees.push((*root, tree));
    }
    // A tree may lack what one found before it has; that one goes first.
    trees
}
