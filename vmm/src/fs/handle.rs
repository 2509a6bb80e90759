//! The files and directories the guest has open.
//!
//! A handle's number is never used twice. The table's lock is held for lines; a directory's own
//! lock is held while it is read, which only another read of that same open directory can notice.

use std::collections::HashMap;
use std::ffi::c_int;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::dirs::DirStream;
use super::inode::Node;
use super::limits::Permit;
use super::root::RootListing;
use super::self_fd::SelfFd;
use super::sys::Errno;

/// An open regular file.
///
/// On overlayfs a file opened for reading keeps showing the lower layer's data after the file was
/// copied up for a writer. The guest has one page cache for both, so such a handle is opened anew
/// once the file has been written to; elsewhere that does no harm.
pub(super) struct FileHandle {
    pub(super) node: Arc<Node>,
    file: RwLock<Arc<OwnedFd>>,
    flags: c_int,
    predates_writes: AtomicBool,
    _permit: Permit,
}

impl FileHandle {
    /// `flags`: those it was opened with. To be made after [`Node::note_write`] of a writer.
    pub(super) fn new(node: Arc<Node>, file: OwnedFd, flags: c_int, permit: Permit) -> FileHandle {
        let predates_writes = AtomicBool::new(!writes(flags) && !node.was_written());
        let file = RwLock::new(Arc::new(file));
        FileHandle {
            node,
            file,
            flags,
            predates_writes,
            _permit: permit,
        }
    }

    /// The file, as it is now.
    pub(super) fn file(&self, links: &SelfFd) -> Arc<OwnedFd> {
        if self.predates_writes.load(Ordering::Relaxed) && self.node.was_written() {
            if let Ok(file) = links.open(self.node.place(), self.flags) {
                self.predates_writes.store(false, Ordering::Relaxed);
                *self.file.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(file);
            }
        }
        self.file
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// True when a file opened with `flags` can be written to.
pub(super) fn writes(flags: c_int) -> bool {
    flags & libc::O_ACCMODE != libc::O_RDONLY
}

/// An open directory of a share.
pub(super) struct DirHandle {
    pub(super) node: Arc<Node>,
    pub(super) stream: Mutex<DirStream>,
    dir: OwnedFd,
    _permit: Permit,
}

impl DirHandle {
    pub(super) fn new(node: Arc<Node>, dir: OwnedFd, permit: Permit) -> DirHandle {
        DirHandle {
            node,
            stream: Mutex::default(),
            dir,
            _permit: permit,
        }
    }

    pub(super) fn dir(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }
}

#[derive(Clone)]
pub(super) enum Handle {
    File(Arc<FileHandle>),
    Dir(Arc<DirHandle>),
    /// The directory of shares.
    Root(Arc<RootListing>),
}

impl Handle {
    fn share(&self) -> Option<u64> {
        match self {
            Handle::File(file) => Some(file.node.share.id),
            Handle::Dir(dir) => Some(dir.node.share.id),
            Handle::Root(_) => None,
        }
    }
}

struct Open {
    handles: HashMap<u64, Handle>,
    next: u64,
}

/// All handles of a server.
pub(super) struct HandleTable(RwLock<Open>);

impl HandleTable {
    pub(super) fn new() -> HandleTable {
        HandleTable(RwLock::new(Open {
            handles: HashMap::new(),
            next: 1,
        }))
    }

    fn get(&self, fh: u64) -> Result<Handle, Errno> {
        let open = self.0.read().unwrap_or_else(PoisonError::into_inner);
        open.handles.get(&fh).cloned().ok_or(Errno(libc::EBADF))
    }

    fn with<T>(&self, act: impl FnOnce(&mut Open) -> T) -> T {
        act(&mut self.0.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// Handles that are open.
    pub(super) fn len(&self) -> usize {
        self.with(|open| open.handles.len())
    }

    /// The number that the next handle gets.
    pub(super) fn next(&self) -> u64 {
        self.with(|open| open.next)
    }

    /// Gives new handles numbers from `next` on, or higher ones.
    pub(super) fn skip_to(&self, next: u64) {
        self.with(|open| open.next = open.next.max(next));
    }

    /// The open file `fh` of inode `node`; EBADF for any other.
    pub(super) fn file(&self, fh: u64, node: u64) -> Result<Arc<FileHandle>, Errno> {
        match self.get(fh)? {
            Handle::File(file) if file.node.id == node => Ok(file),
            _ => Err(Errno(libc::EBADF)),
        }
    }

    /// The open directory `fh` of inode `node`; EBADF for any other.
    pub(super) fn dir(&self, fh: u64, node: u64) -> Result<Arc<DirHandle>, Errno> {
        match self.get(fh)? {
            Handle::Dir(dir) if dir.node.id == node => Ok(dir),
            _ => Err(Errno(libc::EBADF)),
        }
    }

    /// The open root directory `fh`.
    pub(super) fn root(&self, fh: u64) -> Result<Arc<RootListing>, Errno> {
        match self.get(fh)? {
            Handle::Root(listing) => Ok(listing),
            _ => Err(Errno(libc::EBADF)),
        }
    }

    /// Adds a handle; returns its number. ESTALE when its share has gone in the meantime.
    pub(super) fn add(&self, handle: Handle) -> Result<u64, Errno> {
        self.with(|open| {
            let revoked = match &handle {
                Handle::File(file) => file.node.share.is_revoked(),
                Handle::Dir(dir) => dir.node.share.is_revoked(),
                Handle::Root(_) => false,
            };
            if revoked {
                return Err(Errno(libc::ESTALE));
            }
            let fh = open.next;
            open.next = open.next.wrapping_add(1);
            open.handles.insert(fh, handle);
            Ok(fh)
        })
    }

    /// Closes `fh`.
    pub(super) fn remove(&self, fh: u64) {
        // Dropped here, without the lock: the last close of a file can take its time.
        drop(self.with(|open| open.handles.remove(&fh)));
    }

    /// Closes everything of a share that has been revoked.
    pub(super) fn revoke(&self, share: u64) {
        let gone = self.with(|open| {
            let all = std::mem::take(&mut open.handles);
            let (gone, kept) = all
                .into_iter()
                .partition(|(_, one)| one.share() == Some(share));
            open.handles = kept;
            gone
        });
        drop::<HashMap<u64, Handle>>(gone);
    }

    /// Takes everything out, for the caller to close.
    pub(super) fn take_all(&self) -> HashMap<u64, Handle> {
        self.with(|open| std::mem::take(&mut open.handles))
    }
}
