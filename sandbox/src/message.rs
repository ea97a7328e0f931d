//! What goes from process to process: descriptors, and values in memfds, which can carry any size.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Seek, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::spawner::SpawnError;

/// Puts a value into a memfd.
pub fn write(value: &impl Serialize) -> Result<File, SpawnError> {
    let bytes = postcard::to_stdvec(value)
        .map_err(|error| SpawnError::Io { act: "encode a message", source: io::Error::other(error) })?;
    let memfd =
        memfd_create(c"cofferdam-message", MFdFlags::MFD_CLOEXEC).map_err(SpawnError::io("make a memfd"))?;
    let mut file = File::from(memfd);
    file.write_all(&bytes).map_err(|source| SpawnError::Io { act: "write a message", source })?;
    Ok(file)
}

/// What [`write`] put into a memfd.
pub fn read<T: DeserializeOwned>(memfd: OwnedFd) -> Result<T, Errno> {
    let mut bytes = Vec::new();
    let mut file = File::from(memfd);
    let read = file.rewind().and_then(|()| file.read_to_end(&mut bytes));
    read.map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
    postcard::from_bytes(&bytes).map_err(|_| Errno::EBADMSG)
}

/// The most descriptors that go into one message; the kernel takes no more than 253.
pub const MAX_FDS: usize = 128;

/// A message of descriptors, and the byte that says what they are.
#[derive(Debug, Default)]
pub struct Fds {
    /// What they are; `None` at the end of the stream.
    pub kind: Option<u8>,
    /// The descriptors. Fewer than were sent where the limit of descriptors was reached.
    pub fds: Vec<OwnedFd>,
}

/// Sends descriptors over a seqpacket socket, without waiting for room.
pub fn send_fds(socket: BorrowedFd<'_>, kind: u8, fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
    let raw: Vec<RawFd> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&[kind])], &rights, flags, None).map(drop)
}

/// Waits for a message of descriptors.
pub fn receive_fds(socket: BorrowedFd<'_>) -> Result<Fds, Errno> {
    let mut kind = [0];
    let mut space = nix::cmsg_space!([RawFd; MAX_FDS]);
    let mut slices = [IoSliceMut::new(&mut kind)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut slices, Some(&mut space), flags)?;
    let mut fds = Vec::new();
    // An error here means that the message was cut off, for want of descriptors.
    for part in message.cmsgs().into_iter().flatten() {
        if let ControlMessageOwned::ScmRights(raw) = part {
            // SAFETY: the kernel has just made these descriptors for this process alone.
            fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    let kind = (message.bytes > 0).then_some(kind);
    Ok(Fds { kind: kind.map(|[kind]| kind), fds })
}
