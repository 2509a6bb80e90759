//! `template.json`: what a template was made of, and what its files must look like to be what was
//! written. It is checked against the files, never trusted on its own.

use std::{
    fs::{self, File},
    io::{self, Read},
    os::{
        fd::{AsRawFd, FromRawFd},
        unix::fs::{FileExt, MetadataExt},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

use super::key::{Ingredients, Stamp, hex};

/// Its name in a template's directory.
pub const MANIFEST: &str = "template.json";
/// Guest memory, sparse.
pub const MEMORY: &str = "memory";
/// vCPUs, devices and everything else.
pub const STATE: &str = "state";
/// Runs of pages that every start touches (machine.proto, `pages_fd`); not every template has it.
pub const PAGES: &str = "pages";

/// Of the manifest's own form.
const VERSION: u32 = 1;
/// Bytes of a manifest at most.
const LIMIT: u64 = 64 << 10;
/// Bytes that are hashed at a time, and skipped if they are zeroes.
const PAGE: usize = 4096;

/// What a file of a template must be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Content {
    pub stamp: Stamp,
    /// Of every 4 KiB page that is not all zeroes, each behind its number (u64, little-endian).
    pub sha256: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub version: u32,
    /// Seconds since the epoch.
    pub made_at: u64,
    pub made_of: Ingredients,
    pub memory: Content,
    pub state: Content,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pages: Option<Content>,
}

impl Manifest {
    pub fn new(made_of: Ingredients, memory: Content, state: Content) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        Self {
            version: VERSION,
            made_at: now.unwrap_or_default().as_secs(),
            made_of,
            memory,
            state,
            pages: None,
        }
    }

    /// Reads it from a template's open directory. The error is the reason for people.
    pub fn read(directory: &File) -> Result<Self, String> {
        let file = open_at(directory, MANIFEST).map_err(|e| format!("open {MANIFEST}: {e}"))?;
        let mut text = Vec::new();
        file.take(LIMIT)
            .read_to_end(&mut text)
            .map_err(|e| format!("read {MANIFEST}: {e}"))?;
        let manifest: Self =
            serde_json::from_slice(&text).map_err(|e| format!("{MANIFEST}: {e}"))?;
        match manifest.version {
            VERSION => Ok(manifest),
            other => Err(format!("{MANIFEST}: version {other}, not {VERSION}")),
        }
    }
}

impl Content {
    /// Reads the whole file.
    pub fn of(file: &File) -> io::Result<Self> {
        Ok(Self {
            stamp: Stamp::from(&file.metadata()?),
            sha256: digest(file)?,
        })
    }

    /// Opens the file that this describes. The error is the reason for people.
    pub fn open(&self, directory: &File, name: &str) -> Result<File, String> {
        let file = open_at(directory, name).map_err(|e| format!("open {name}: {e}"))?;
        let found = file
            .metadata()
            .map_err(|e| format!("look at {name}: {e}"))?;
        if !found.is_file() {
            return Err(format!("{name} is no regular file"));
        }
        check_owner(name, &found, 0o022)?;
        let stamp = Stamp::from(&found);
        if stamp.size != self.stamp.size {
            let (is, was) = (stamp.size, self.stamp.size);
            return Err(format!("{name} has {is} bytes, not {was}"));
        }
        if stamp != self.stamp {
            return Err(format!("{name} was changed after it was made"));
        }
        Ok(file)
    }
}

/// Refuses what others may write to (`forbidden` bits of the mode), or own.
pub(super) fn check_owner(what: &str, found: &fs::Metadata, forbidden: u32) -> Result<(), String> {
    // SAFETY: geteuid(2) takes nothing and cannot fail.
    let user = unsafe { libc::geteuid() };
    if found.uid() != user {
        return Err(format!(
            "{what} belongs to user {}, not {user}",
            found.uid()
        ));
    }
    if found.mode() & forbidden != 0 {
        let mode = found.mode() & 0o7777;
        return Err(format!("{what} has mode {mode:o}: open to others"));
    }
    Ok(())
}

/// Opens a file of a directory, read-only; not through a symbolic link, and not waiting for anybody.
fn open_at(directory: &File, name: &str) -> io::Result<File> {
    let name = std::ffi::CString::new(name)?;
    let flags = libc::O_RDONLY | libc::O_NOFOLLOW | libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: the name ends in NUL and outlives the call.
    let fd = unsafe { libc::openat(directory.as_raw_fd(), name.as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor for us.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// The same for equal contents, wherever a file system puts its holes.
fn digest(file: &File) -> io::Result<String> {
    let size = file.metadata()?.len();
    let mut hash = hmac_sha256::Hash::new();
    let mut page = [0; PAGE];
    let mut at = 0;
    while at < size {
        // SAFETY: lseek(2) takes numbers.
        let data = unsafe { libc::lseek(file.as_raw_fd(), at as libc::off_t, libc::SEEK_DATA) };
        let Ok(data) = u64::try_from(data) else {
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                // Nothing but a hole is left.
                Some(libc::ENXIO) => break,
                _ => return Err(error),
            }
        };
        at = data - data % PAGE as u64;
        // The rest of this piece, as a hole's beginning needs no look-up: zeroes are skipped.
        for _ in 0..64 {
            let length = usize::try_from(size - at).map_or(PAGE, |left| left.min(PAGE));
            let part = &mut page[..length];
            file.read_exact_at(part, at)?;
            if part.iter().any(|byte| *byte != 0) {
                hash.update((at / PAGE as u64).to_le_bytes());
                hash.update(&*part);
            }
            at += length as u64;
            if at >= size {
                break;
            }
        }
    }
    hash.update(size.to_le_bytes());
    Ok(hex(&hash.finalize()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_and_zeroes_are_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let (sparse, full) = (directory.path().join("s"), directory.path().join("f"));
        let mut bytes = vec![0; (1 << 20) + 17];
        bytes[700_000] = 1;
        bytes[(1 << 20) + 3] = 2;
        fs::write(&full, &bytes).unwrap();
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&sparse)
            .unwrap();
        file.set_len(bytes.len() as u64).unwrap();
        file.write_all_at(&[1], 700_000).unwrap();
        file.write_all_at(&[2], (1 << 20) + 3).unwrap();
        let of = |path| digest(&File::open(path).unwrap()).unwrap();
        assert_eq!(of(&sparse), of(&full));
        for (at, value) in [(700_000, 3), (0, 1), ((1 << 20) + 16, 1)] {
            let before = of(&sparse);
            file.write_all_at(&[value], at).unwrap();
            assert_ne!(of(&sparse), before);
        }
        let before = of(&sparse);
        file.set_len(1 << 21).unwrap();
        assert_ne!(of(&sparse), before);
    }
}
