//! The templates of this host: one directory each, named by its key. What has a key for its name is
//! whole and never changes again; what is in the making or on its way out begins with a dot.
//!
//! Whoever starts from a template opens its directory once and all files from there, so that it has
//! one template, whole, also if that is replaced or removed in the meantime.

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, SystemTime},
};

use super::{
    key::{Ingredients, Key},
    manifest::{self, MEMORY, Manifest, PAGES, STATE},
};

/// What begins the name of a template on its way out.
pub(super) const OUTGOING: &str = ".old-";
const MISNAMED: &str = "it is made of something else than its name says";
/// A use is noted if the last one is at least so long ago.
const USE_NOTED: Duration = Duration::from_secs(60);

/// Where templates are. It need not exist.
#[derive(Clone, Debug)]
pub struct Store {
    pub(super) directory: PathBuf,
}

/// Which directory it was, whatever has its name now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    device: u64,
    inode: u64,
}

/// A template that was found fit, open. It stays whole for as long as this exists.
#[derive(Debug)]
pub struct Template {
    pub key: Key,
    pub identity: Identity,
    pub memory: File,
    pub state: File,
    pub pages: Option<File>,
}

/// One that cannot be used.
#[derive(Debug)]
pub struct Unfit {
    pub identity: Identity,
    /// For people.
    pub reason: String,
}

/// Why there is no template to be had.
#[derive(Debug)]
pub enum Unusable {
    /// None of the store's is, and none that would be built: others could put some there. For people.
    Place(String),
    /// That one only.
    Template(Unfit),
}

/// What a directory of the store holds.
pub struct Entry {
    pub key: Key,
    pub identity: Identity,
    /// Bytes on disk.
    pub space: u64,
    pub last_use: SystemTime,
    /// Or why there is none.
    pub manifest: Result<Manifest, String>,
    directory: File,
}

impl Identity {
    fn of(found: &fs::Metadata) -> Self {
        Self {
            device: found.dev(),
            inode: found.ino(),
        }
    }
}

impl Store {
    pub fn new(directory: &Path) -> Self {
        Self {
            directory: directory.to_owned(),
        }
    }

    pub fn path(&self) -> &Path {
        &self.directory
    }

    /// Makes the store's directory if there is none.
    pub fn create(&self) -> io::Result<()> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.directory)
    }

    /// Opens the template made of this, if there is one. Checks all that can be checked without
    /// reading its bytes: the VMM knows the state's checksum, and memory that was written to after
    /// it was made has another ctime.
    pub fn open(&self, made_of: &Ingredients) -> Result<Option<Template>, Unusable> {
        let key = made_of.key();
        self.check_place().map_err(Unusable::Place)?;
        let Some((directory, found)) = self.open_directory(&key).ok().flatten() else {
            return Ok(None);
        };
        let identity = Identity::of(&found);
        let fit = || {
            manifest::check_owner("its directory", &found, 0o077)?;
            let manifest = Manifest::read(&directory)?;
            if manifest.made_of.key() != key {
                return Err(MISNAMED.into());
            }
            let pages = manifest.pages.as_ref();
            Ok(Template {
                memory: manifest.memory.open(&directory, MEMORY)?,
                state: manifest.state.open(&directory, STATE)?,
                pages: pages
                    .map(|pages| pages.open(&directory, PAGES))
                    .transpose()?,
                key,
                identity,
            })
        };
        match fit() {
            Ok(template) => {
                note_use(&directory, &found);
                Ok(Some(template))
            }
            Err(reason) => Err(Unusable::Template(Unfit { identity, reason })),
        }
    }

    /// All templates, those first that were used last.
    pub fn list(&self) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for name in self.names()? {
            let Some(key) = Key::parse(&name) else {
                continue;
            };
            let Some((directory, found)) = self.open_directory(&key)? else {
                continue;
            };
            let place = self.directory.join(&name);
            let space = [MEMORY, STATE, PAGES]
                .iter()
                .filter_map(|file| fs::symlink_metadata(place.join(file)).ok())
                .map(|file| file.blocks().saturating_mul(512))
                .sum();
            entries.push(Entry {
                key,
                identity: Identity::of(&found),
                space,
                last_use: found.modified().unwrap_or(SystemTime::UNIX_EPOCH),
                manifest: Manifest::read(&directory),
                directory,
            });
        }
        entries.sort_by_key(|entry| std::cmp::Reverse(entry.last_use));
        Ok(entries)
    }

    /// Takes a template away: with `only` that one and no other that replaced it. Pods that run from
    /// it keep it. Says whether there was anything to take.
    pub fn remove(&self, key: &Key, only: Option<Identity>) -> io::Result<bool> {
        let place = self.directory.join(key.as_str());
        let outgoing = self.outgoing();
        match fs::rename(&place, &outgoing) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(e),
        }
        let taken = match fs::symlink_metadata(&outgoing) {
            Ok(found) => Identity::of(&found),
            // Somebody cleans up at this very moment.
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(true),
            Err(e) => return Err(e),
        };
        if only.is_some_and(|only| only != taken) && rename_new(&outgoing, &place).is_ok() {
            return Ok(false);
        }
        discard(&outgoing)?;
        Ok(only.is_none_or(|only| only == taken))
    }

    /// The names in the store; none if there is no store.
    pub(super) fn names(&self) -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(&self.directory) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(e),
        };
        let names = entries.map(|entry| Ok(entry?.file_name().into_string().ok()));
        names.filter_map(io::Result::transpose).collect()
    }

    /// A name for something on its way out that nobody else uses.
    fn outgoing(&self) -> PathBuf {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let next = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{OUTGOING}{}-{next}", process::id());
        self.directory.join(name)
    }

    fn open_directory(&self, key: &Key) -> io::Result<Option<(File, fs::Metadata)>> {
        let open = |flags| {
            File::options()
                .read(true)
                .custom_flags(flags | libc::O_NOFOLLOW)
                .open(self.directory.join(key.as_str()))
        };
        // What is no directory has no files: it is found unfit, and goes.
        let opened = open(libc::O_DIRECTORY).or_else(|e| match e.raw_os_error() {
            Some(libc::ENOTDIR | libc::ELOOP) => open(libc::O_PATH),
            _ => Err(e),
        });
        match opened {
            Ok(directory) => {
                let found = directory.metadata()?;
                Ok(Some((directory, found)))
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Nobody else may put things into the store, once there is one. The error is the reason for people.
    pub fn check_place(&self) -> Result<(), String> {
        let place = self.directory.display().to_string();
        match fs::metadata(&self.directory) {
            Ok(found) => manifest::check_owner(&place, &found, 0o022),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(format!("{place}: {e}")),
        }
    }
}

impl Entry {
    /// Whether it is what was written, as far as that shows without reading it, wherever it is
    /// ([`Store::check_place`]). The error is the reason for people, here and below.
    pub fn check(&self) -> Result<(), String> {
        self.files().map(drop)
    }

    /// Reads every byte.
    pub fn verify(&self) -> Result<(), String> {
        for (name, file, content) in self.files()? {
            let found = manifest::Content::of(&file).map_err(|e| format!("read {name}: {e}"))?;
            if found.sha256 != content.sha256 {
                return Err(format!("{name} has another checksum than it was made with"));
            }
        }
        Ok(())
    }

    fn files(&self) -> Result<Vec<(&'static str, File, &manifest::Content)>, String> {
        let manifest = self.manifest.as_ref().map_err(Clone::clone)?;
        if manifest.made_of.key() != self.key {
            return Err(MISNAMED.into());
        }
        let files = [
            (MEMORY, Some(&manifest.memory)),
            (STATE, Some(&manifest.state)),
        ];
        let files = files.into_iter().chain([(PAGES, manifest.pages.as_ref())]);
        files
            .filter_map(|(name, content)| Some((name, content?)))
            .map(|(name, content)| Ok((name, content.open(&self.directory, name)?, content)))
            .collect()
    }
}

/// The directory's mtime is the time of its last use.
fn note_use(directory: &File, found: &fs::Metadata) {
    let age = found.modified().ok().and_then(|used| used.elapsed().ok());
    if age.is_some_and(|age| age < USE_NOTED) {
        return;
    }
    if let Err(e) = directory.set_modified(SystemTime::now()) {
        log::debug!("note the use of a template: {e}");
    }
}

/// Renames, unless something has the new name already (renameat2(2), RENAME_NOREPLACE).
pub(super) fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    use std::{ffi::CString, os::unix::ffi::OsStrExt};
    let from = CString::new(from.as_os_str().as_bytes())?;
    let to = CString::new(to.as_os_str().as_bytes())?;
    // SAFETY: both strings end in NUL and outlive the call.
    let result = unsafe {
        libc::renameat2(
            libc::AT_FDCWD,
            from.as_ptr(),
            libc::AT_FDCWD,
            to.as_ptr(),
            libc::RENAME_NOREPLACE,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Deletes a directory of the store, or what is there instead, whoever else is at it too.
pub(super) fn discard(directory: &Path) -> io::Result<()> {
    if let Ok(memory) = open_plain(&directory.join(MEMORY)) {
        let _ = set_immutable(&memory, false);
    }
    let removed = match fs::symlink_metadata(directory) {
        Ok(found) if !found.is_dir() => fs::remove_file(directory),
        _ => fs::remove_dir_all(directory),
    };
    match removed {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

fn open_plain(path: &Path) -> io::Result<File> {
    File::options()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
}

// linux/fs.h; the kernel reads an int, whatever the size in the number says.
const FS_IOC_GETFLAGS: libc::c_ulong = 0x8008_6601;
const FS_IOC_SETFLAGS: libc::c_ulong = 0x4008_6602;
const FS_IMMUTABLE_FL: libc::c_int = 0x10;

/// Has the file system refuse every change of a file, root's too (chattr(1), `+i`).
pub(super) fn set_immutable(file: &File, on: bool) -> io::Result<()> {
    let mut flags: libc::c_int = 0;
    // SAFETY: the request writes an int to where `flags` is.
    if unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_GETFLAGS, &raw mut flags) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let new = match on {
        true => flags | FS_IMMUTABLE_FL,
        false => flags & !FS_IMMUTABLE_FL,
    };
    if new == flags {
        return Ok(());
    }
    // SAFETY: the request reads an int from where `new` is.
    if unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_SETFLAGS, &raw const new) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
