//! Whether a program will do as `/bin/sh` in a sandbox that has nothing else: looked at before a build needs it.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::{Failed, cannot};

/// The kind of program header that names a dynamic loader (elf(5)).
const PT_INTERP: u32 = 3;

/// `path`, if it is an executable ELF program that starts without a dynamic loader.
///
/// # Errors
/// Says what else it is.
pub fn checked(path: PathBuf) -> Result<PathBuf, Failed> {
    let fail = |why: String| cannot("use the shell", &path, format!("{why} (--sandbox-shell)"));
    match is_static(&path) {
        // The sandbox follows no symbolic link out of itself.
        Ok(Ok(())) => path.canonicalize().map_err(|error| fail(error.to_string())),
        Ok(Err(why)) => Err(fail(why.into())),
        Err(error) => Err(fail(error.to_string())),
    }
}

/// Whether the program needs nothing but itself; the inner error says why not.
fn is_static(path: &Path) -> io::Result<Result<(), &'static str>> {
    // Not opened before it is known to be a file: opening a fifo waits.
    let found = path.metadata()?;
    if !found.is_file() {
        return Ok(Err("it is not a file"));
    }
    if found.permissions().mode() & 0o111 == 0 {
        return Ok(Err("it is not executable"));
    }
    let file = File::open(path)?;
    match has_loader(&file) {
        Ok(Some(false)) => Ok(Ok(())),
        Ok(Some(true)) => Ok(Err("it is dynamically linked, and builds don't have its loader and libraries")),
        Ok(None) => Ok(Err("it is not an ELF program of this byte order")),
        // Headers that lie past the end of the file, or of all files.
        Err(error) if matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidInput) => {
            Ok(Err("it is not an ELF program, or a part of one"))
        }
        Err(error) => Err(error),
    }
}

/// Whether an ELF program asks for a dynamic loader; `None` where it is no such program.
fn has_loader(file: &File) -> io::Result<Option<bool>> {
    const BYTE_ORDER: u8 = if cfg!(target_endian = "little") { 1 } else { 2 };
    // Where the ELF header has offset, size and number of the program headers.
    let (offset, sizes) = match read::<6>(file, 0)? {
        [0x7f, b'E', b'L', b'F', 1, BYTE_ORDER] => (u32::from_ne_bytes(read(file, 28)?).into(), 42),
        [0x7f, b'E', b'L', b'F', 2, BYTE_ORDER] => (u64::from_ne_bytes(read(file, 32)?), 54),
        _ => return Ok(None),
    };
    let size = u16::from_ne_bytes(read(file, sizes)?);
    let count = u16::from_ne_bytes(read(file, sizes + 2)?);
    for index in 0..u64::from(count) {
        let at = offset.saturating_add(index * u64::from(size));
        if u32::from_ne_bytes(read(file, at)?) == PT_INTERP {
            return Ok(Some(true));
        }
    }
    Ok(Some(false))
}

fn read<const N: usize>(file: &File, at: u64) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    file.read_exact_at(&mut bytes, at)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A 64-bit program with one program header of each kind.
    fn elf(kinds: &[u32]) -> Vec<u8> {
        let mut bytes = b"\x7fELF\x02".to_vec();
        bytes.push(if cfg!(target_endian = "little") { 1 } else { 2 });
        bytes.resize(32, 0);
        bytes.extend(64_u64.to_ne_bytes());
        bytes.resize(54, 0);
        bytes.extend(56_u16.to_ne_bytes());
        bytes.extend((kinds.len() as u16).to_ne_bytes());
        for (index, kind) in kinds.iter().enumerate() {
            bytes.resize(64 + 56 * index, 0);
            bytes.extend(kind.to_ne_bytes());
        }
        bytes
    }

    #[test]
    fn only_a_static_program_will_do() {
        let mut far = elf(&[1]);
        far[32..40].copy_from_slice(&u64::MAX.to_ne_bytes());
        let mut foreign = elf(&[1]);
        foreign[5] ^= 3;
        let table = [
            ("static", elf(&[1, 2, 1]), 0o755, None),
            ("no headers", elf(&[]), 0o711, None),
            ("dynamic", elf(&[1, PT_INTERP, 1]), 0o755, Some("dynamically linked")),
            ("not executable", elf(&[1]), 0o644, Some("not executable")),
            ("script", b"#!/bin/sh\nexit 0\n".to_vec(), 0o755, Some("not an ELF program")),
            ("empty", Vec::new(), 0o755, Some("not an ELF program")),
            ("cut", elf(&[1])[..60].to_vec(), 0o755, Some("a part of one")),
            ("headers past the end", far, 0o755, Some("a part of one")),
            ("other byte order", foreign, 0o755, Some("byte order")),
        ];
        let dir = tempfile::tempdir().unwrap();
        for (name, contents, mode, refusal) in table {
            let path = dir.path().join(name);
            std::fs::write(&path, contents).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            let checked = checked(path.clone()).map_err(|failed| failed.to_string());
            match (checked, refusal) {
                (Ok(same), None) => assert_eq!(same, path),
                (Err(text), Some(why)) => {
                    assert!(text.contains(why) && text.contains(path.to_str().unwrap()), "{name}: {text}");
                }
                (other, _) => panic!("{name}: {other:?}"),
            }
        }
    }

    #[test]
    fn what_is_no_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for (path, why) in [(dir.path().to_owned(), "not a file"), (dir.path().join("no"), "No such file")] {
            let text = checked(path).unwrap_err().to_string();
            assert!(text.contains(why), "{text}");
        }
    }
}
