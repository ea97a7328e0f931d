//! A blob that comes from elsewhere: counted, limited and hashed on its way.

use std::io::{self, Write};

use super::node::Digest;
use super::traits::{StoreError, WrongBytes};

/// The most that is taken of a blob whose size nobody has stated: 64 GiB. A stream without end has to end somewhere.
pub(super) const MAX_UNSTATED_BYTES: u64 = 64 << 30;

/// Passes bytes on to `to`, and knows afterwards whether they were those of a digest.
///
/// Of more bytes than there should be it passes on none of the write that is too much, and refuses that one.
pub(super) struct Incoming<W> {
    to: W,
    digest: Digest,
    stated: Option<u64>,
    hasher: blake3::Hasher,
    overrun: bool,
}

impl<W: Write> Incoming<W> {
    /// For the blob `digest`, which has `stated` bytes, if anybody has said so.
    pub(super) fn new(to: W, digest: Digest, stated: Option<u64>) -> Self {
        Self { to, digest, stated, hasher: blake3::Hasher::new(), overrun: false }
    }

    /// What was taken so far, in bytes.
    pub(super) fn len(&self) -> u64 {
        self.hasher.count()
    }

    fn limit(&self) -> u64 {
        self.stated.unwrap_or(MAX_UNSTATED_BYTES)
    }

    /// What is known to be wrong with what came; of a stream that has not ended, only that it was too long.
    pub(super) fn overrun(&self) -> Option<WrongBytes> {
        self.overrun.then(|| WrongBytes::Long { limit: self.limit() })
    }

    /// Where the bytes went, once there are no more and if they are right. Then they are all there is to the blob, even if
    /// another size was stated.
    ///
    /// # Errors
    /// [`StoreError::Wrong`], of the store at `address`.
    pub(super) fn checked(self, address: &str) -> Result<W, StoreError> {
        let (size, actual) = (self.len(), Digest::from(self.hasher.finalize()));
        let fault = match self.stated {
            _ if self.overrun => WrongBytes::Long { limit: self.limit() },
            _ if actual == self.digest => return Ok(self.to),
            Some(stated) if size < stated => WrongBytes::Short { size, stated },
            _ => WrongBytes::Digest { size, actual },
        };
        Err(StoreError::Wrong {
            address: address.to_owned(),
            kind: "blob",
            digest: self.digest,
            fault: fault.into(),
        })
    }
}

impl<W: Write> Write for Incoming<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.len().saturating_add(bytes.len() as u64) > self.limit() {
            self.overrun = true;
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let written = self.to.write(bytes)?;
        self.hasher.update(bytes.get(..written).unwrap_or(bytes));
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_right_bytes_pass() {
        let (right, empty) = (Digest::of(b"hello"), Digest::of(b""));
        let other = |size, bytes: &[u8]| Some(WrongBytes::Digest { size, actual: Digest::of(bytes) });
        /// What is wanted, in what size, what comes, and what is wrong with it.
        type Case<'a> = (&'a str, Digest, Option<u64>, &'a [&'a [u8]], Option<WrongBytes>);
        let cases: [Case<'_>; 10] = [
            ("in one", right, Some(5), &[b"hello"], None),
            ("in pieces", right, Some(5), &[b"he", b"", b"llo"], None),
            ("of no stated size", right, None, &[b"hello"], None),
            ("fewer than stated, and right", right, Some(6), &[b"hello"], None),
            ("nothing", empty, Some(0), &[], None),
            ("short", right, Some(5), &[b"hell"], Some(WrongBytes::Short { size: 4, stated: 5 })),
            ("long", right, Some(5), &[b"hello", b"!"], Some(WrongBytes::Long { limit: 5 })),
            ("other bytes", right, Some(5), &[b"jello"], other(5, b"jello")),
            ("other bytes of no stated size", right, None, &[b"hell"], other(4, b"hell")),
            ("of another size than stated", right, Some(4), &[b"hell"], other(4, b"hell")),
        ];
        for (case, digest, stated, pieces, fault) in cases {
            let mut incoming = Incoming::new(Vec::new(), digest, stated);
            let refused = pieces.iter().any(|piece| incoming.write_all(piece).is_err());
            assert_eq!(refused, matches!(fault, Some(WrongBytes::Long { .. })), "{case}");
            assert_eq!(incoming.overrun().is_some(), refused, "{case}");
            match (incoming.checked("there"), fault) {
                (Ok(bytes), None) => assert_eq!(bytes, pieces.concat(), "{case}"),
                (Err(StoreError::Wrong { fault, .. }), Some(expected)) => {
                    assert_eq!(*fault, expected, "{case}");
                }
                (other, expected) => panic!("{case}: {other:?} instead of {expected:?}"),
            }
        }
    }
}
