//! A template in the making: `.new-<key>`, locked (flock(2)) by whoever makes it. The lock is the
//! directory's own and ends with its owner, so one that can be locked is a leftover.

use std::{
    fs::{self, DirBuilder, File, Permissions},
    io::{self, Write},
    os::{
        fd::AsRawFd,
        unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    },
    path::{Path, PathBuf},
};

use super::{
    key::{Ingredients, Key},
    manifest::{Content, MANIFEST, MEMORY, Manifest, PAGES, STATE},
    store::{Store, Unusable, discard, rename_new, set_immutable},
};

/// What begins the name of a template in the making.
pub(super) const DRAFT: &str = ".new-";

/// Ours, until it is published. Dropped, it goes.
#[derive(Debug)]
pub struct Draft<'a> {
    store: &'a Store,
    key: Key,
    path: PathBuf,
    directory: File,
    published: bool,
}

impl<'a> Draft<'a> {
    /// None if somebody else makes the same template right now.
    pub fn begin(store: &'a Store, key: &Key) -> io::Result<Option<Self>> {
        store.create()?;
        let path = store.directory.join(format!("{DRAFT}{key}"));
        // What was locked may be one that its owner has just published or dropped: then again.
        for _ in 0..8 {
            match DirBuilder::new().mode(0o700).create(&path) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
                _ => {}
            }
            let Some(directory) = open_directory(&path)? else {
                continue;
            };
            if !lock(&directory)? {
                return Ok(None);
            }
            if is_still(&directory, &path) {
                let draft = Self {
                    store,
                    key: key.clone(),
                    path,
                    directory,
                    published: false,
                };
                draft.clear()?;
                return Ok(Some(draft));
            }
        }
        Ok(None)
    }

    /// Of a maker that did not live to drop it.
    fn clear(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.path)? {
            let path = entry?.path();
            if let Ok(file) = File::open(&path) {
                let _ = set_immutable(&file, false);
            }
            fs::remove_file(path)?;
        }
        Ok(())
    }

    /// A new file in it, read-write.
    pub fn file(&self, name: &str) -> io::Result<File> {
        File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(self.path.join(name))
    }

    /// A file of it, read-only, as a pod's VMM would get it.
    pub fn open(&self, name: &str) -> io::Result<File> {
        File::open(self.path.join(name))
    }

    /// Makes it a template, for all to see at once. Nobody may have its files open for writing any
    /// more. One that is there already, and fit, stays; an unfit one goes.
    pub fn publish(mut self, made_of: Ingredients) -> io::Result<()> {
        let memory = self.finish(MEMORY)?;
        // Running clones see what is written to memory, and none of them could tell: the file system
        // is to refuse it, where it can.
        if let Err(e) = set_immutable(&memory, true) {
            log::debug!("make a template's memory immutable: {e}");
        }
        let state = self.finish(STATE)?;
        let mut manifest = Manifest::new(made_of, Content::of(&memory)?, Content::of(&state)?);
        if self.path.join(PAGES).exists() {
            manifest.pages = Some(Content::of(&self.finish(PAGES)?)?);
        }
        let mut file = self.file(MANIFEST)?;
        file.write_all(&serde_json::to_vec_pretty(&manifest)?)?;
        file.sync_all()?;
        self.directory.sync_all()?;
        let place = self.store.directory.join(self.key.as_str());
        match rename_new(&self.path, &place) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                let unfit = match self.store.open(&manifest.made_of) {
                    Ok(Some(_)) => return Ok(()),
                    Ok(None) => None,
                    Err(Unusable::Template(unfit)) => Some(unfit.identity),
                    Err(Unusable::Place(why)) => return Err(io::Error::other(why)),
                };
                self.store.remove(&self.key, unfit)?;
                rename_new(&self.path, &place)?;
            }
            renamed => renamed?,
        }
        self.published = true;
        File::open(&self.store.directory)?.sync_all()
    }

    /// Opens a file anew, for reading only, once its bytes are on disk.
    fn finish(&self, name: &str) -> io::Result<File> {
        let path = self.path.join(name);
        fs::set_permissions(&path, Permissions::from_mode(0o400))?;
        let file = File::open(&path)?;
        file.sync_all()?;
        Ok(file)
    }
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        if !self.published {
            if let Err(e) = discard(&self.path) {
                log::warn!("remove {}: {e}", self.path.display());
            }
        }
    }
}

/// Deletes a draft whose maker is gone. Says whether it was one.
pub(super) fn discard_leftover(path: &Path) -> io::Result<bool> {
    let Some(directory) = open_directory(path)? else {
        return Ok(false);
    };
    if !lock(&directory)? || !is_still(&directory, path) {
        return Ok(false);
    }
    discard(path)?;
    Ok(true)
}

fn open_directory(path: &Path) -> io::Result<Option<File>> {
    let opened = File::options()
        .read(true)
        .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW)
        .open(path);
    match opened {
        Ok(directory) => Ok(Some(directory)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// Says whether it is ours now.
fn lock(directory: &File) -> io::Result<bool> {
    // SAFETY: flock(2) takes numbers.
    if unsafe { libc::flock(directory.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.kind() {
        io::ErrorKind::WouldBlock => Ok(false),
        _ => Err(error),
    }
}

/// Whether the name is still that of the directory we hold.
fn is_still(directory: &File, path: &Path) -> bool {
    match (directory.metadata(), fs::symlink_metadata(path)) {
        (Ok(ours), Ok(there)) => (ours.dev(), ours.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}
