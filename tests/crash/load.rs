//! Clients that store blobs and directories for as long as a daemon lives, and note what it has acknowledged.

use cofferdam::castore::Digest;
use cofferdam_proto::castore as wire;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};
use wire::blob_service_client::BlobServiceClient;
use wire::directory_service_client::DirectoryServiceClient;

use crate::Acknowledged;
use crate::random::Random;

/// How many different blobs there are: few enough that clients store the same ones now and then.
const BLOBS: u64 = 20_000;

/// The bytes of one of them.
fn blob(number: u64) -> Vec<u8> {
    let mut random = Random::new(number);
    let most = match random.below(10) {
        0 => 300 << 10,
        1..=4 => 64 << 10,
        _ => 2 << 10,
    };
    let len = random.below(most + 1);
    random.bytes(len)
}

/// Stores things until that fails. Yields what was acknowledged, and the failure.
pub async fn client(address: String, mut random: Random) -> (Acknowledged, Status) {
    let mut acknowledged = Acknowledged::default();
    let failure = match Endpoint::try_from(address).unwrap().connect().await {
        Ok(channel) => loop {
            if let Err(status) = store_tree(&channel, &mut random, &mut acknowledged).await {
                break status;
            }
        },
        Err(error) => Status::unavailable(error.to_string()),
    };
    (acknowledged, failure)
}

/// Stores a few blobs and two directories over them.
async fn store_tree(
    channel: &Channel,
    random: &mut Random,
    acknowledged: &mut Acknowledged,
) -> Result<(), Status> {
    let mut files = Vec::new();
    for name in 0..=random.below(12) {
        let bytes = blob(random.below(BLOBS));
        let size = bytes.len() as u64;
        let digest = put_blob(channel, bytes, random).await?;
        acknowledged.blobs.insert((digest, size));
        files.push(wire::FileEntry {
            name: format!("{name:02}").into(),
            digest: digest.as_bytes().to_vec(),
            size,
            executable: false,
        });
    }
    let child = wire::Directory { files, ..Default::default() };
    let entry = |name: &str, child: &wire::Directory| wire::DirectoryEntry {
        name: name.as_bytes().to_vec(),
        digest: digest_of(child).as_bytes().to_vec(),
        size: 2 * child.files.len() as u64,
    };
    let parent = wire::Directory { directories: vec![entry("child", &child)], ..Default::default() };
    let all = [child, parent];
    let digests = all.each_ref().map(digest_of);
    let stored = DirectoryServiceClient::new(channel.clone()).put(tokio_stream::iter(all)).await?;
    assert_eq!(stored.into_inner().root_digest, digests[1].as_bytes());
    acknowledged.directories.extend(digests);
    Ok(())
}

/// The digest of a directory.
pub fn digest_of(directory: &wire::Directory) -> Digest {
    Digest::of(&prost::Message::encode_to_vec(directory))
}

/// Stores a blob, in messages of any length.
pub async fn put_blob(channel: &Channel, bytes: Vec<u8>, random: &mut Random) -> Result<Digest, Status> {
    let digest = Digest::of(&bytes);
    let piece = 1 + random.below(100_000) as usize;
    let chunks: Vec<_> =
        bytes.chunks(piece).map(|data| wire::BlobChunk { data: data.to_vec().into() }).collect();
    let stored = BlobServiceClient::new(channel.clone()).put(tokio_stream::iter(chunks)).await?;
    assert_eq!(stored.into_inner().digest, digest.as_bytes());
    Ok(digest)
}
