//! What of the store is of no use any more: leftovers of makers that are gone, templates that no pod
//! of this host can start from, and those least recently used where there are too many.

use std::{
    fs, io,
    time::{Duration, SystemTime},
};

use super::{
    background::TRIED,
    build,
    draft::{self, DRAFT},
    key::Key,
    store::{Entry, OUTGOING, Store, discard},
};

/// A note on a build is kept this long.
const NOTES: Duration = Duration::from_secs(24 * 3600);
/// Bytes that a template counts for at the least.
const LEAST: u64 = 1 << 20;

/// Something that went.
#[derive(Debug, PartialEq, Eq)]
pub struct Removed {
    /// In the store.
    pub name: String,
    /// For people.
    pub reason: String,
}

/// How far to go.
#[derive(Clone, Copy, Debug)]
pub struct Limits<'a> {
    /// Bytes on disk that all templates may take.
    pub space: u64,
    /// Stays, however little space there is.
    pub keep: Option<&'a Key>,
    /// Read every byte, and remove what is not what was written.
    pub verify: bool,
}

impl Store {
    /// Removes what is of no use. Others may do the same at the same time.
    pub fn gc(&self, limits: Limits<'_>) -> io::Result<Vec<Removed>> {
        let mut removed = self.remove_leftovers()?;
        let mut space = 0_u64;
        for entry in self.list()? {
            let size = entry.space.max(LEAST);
            let reason = match useless(&entry, limits.verify) {
                Some(reason) => reason,
                None if limits.keep == Some(&entry.key) => {
                    space = space.saturating_add(size);
                    continue;
                }
                None if space.saturating_add(size) > limits.space => {
                    "others were used more recently, and there is no space for all".into()
                }
                None => {
                    space = space.saturating_add(size);
                    continue;
                }
            };
            if self.remove(&entry.key, Some(entry.identity))? {
                removed.push(Removed {
                    name: entry.key.to_string(),
                    reason,
                });
            }
        }
        Ok(removed)
    }

    fn remove_leftovers(&self) -> io::Result<Vec<Removed>> {
        let mut removed = Vec::new();
        for name in self.names()? {
            let path = self.directory.join(&name);
            let gone = if let Some(key) = name.strip_prefix(DRAFT) {
                let gone = draft::discard_leftover(&path)?;
                if let (true, Some(key)) = (gone, Key::parse(key)) {
                    build::remove_cgroup(&key);
                }
                gone
            } else if name.starts_with(OUTGOING) {
                discard(&path)?;
                true
            } else if name.starts_with(TRIED) {
                let age = fs::metadata(&path)
                    .and_then(|found| found.modified())
                    .map(|at| SystemTime::now().duration_since(at).unwrap_or_default());
                age.is_ok_and(|age| age > NOTES) && fs::remove_file(&path).is_ok()
            } else {
                false
            };
            if gone {
                removed.push(Removed {
                    name,
                    reason: "left over".into(),
                });
            }
        }
        Ok(removed)
    }
}

fn useless(entry: &Entry, verify: bool) -> Option<String> {
    let manifest = match &entry.manifest {
        Ok(manifest) => manifest,
        Err(reason) => return Some(reason.clone()),
    };
    if let Some(reason) = manifest.made_of.outdated() {
        return Some(reason);
    }
    match verify {
        true => entry.verify().err(),
        false => entry.check().err(),
    }
}
