//! A share: one subtree, its name in the root directory, and how long the guest may believe what
//! it was told about it.
//!
//! The guest's kernel gets no notice of changes made elsewhere, so these times are the whole of
//! the coherence protocol:
//!
//! * *exclusive*: nobody but this guest changes the subtree. Everything is believed for a day,
//!   names that do not exist too, and file data and directories stay cached from one open to the
//!   next.
//! * otherwise: names and attributes are believed for one tick of the guest's clock, enough that
//!   one path walk asks once for each component, and data until the next open.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::sys::Stat;
use super::wire::{FOPEN_CACHE_DIR, FOPEN_KEEP_CACHE, FOPEN_NOFLUSH};

/// How long something may be believed: seconds and nanoseconds.
pub(super) type Valid = (u64, u32);

const DAY: Valid = (86_400, 0);
/// Rounded up to one tick by the guest.
const TICK: Valid = (0, 1_000_000);

/// A subtree as the guest sees it. Its name lives in the server's root directory.
pub(super) struct Share {
    /// Unlike that of any other share, past or present.
    pub(super) id: u64,
    pub(super) exclusive: bool,
    revoked: AtomicBool,
    /// Mounts of the subtree that something was changed on. In the guest each is a file system of its
    /// own, which is synced by itself.
    written: Mutex<BTreeSet<u64>>,
}

impl Share {
    pub(super) fn new(id: u64, exclusive: bool) -> Share {
        Share {
            id,
            exclusive,
            revoked: AtomicBool::new(false),
            written: Mutex::default(),
        }
    }

    /// No inode may be added from now on. Under the inode table's lock.
    pub(super) fn revoke(&self) {
        self.revoked.store(true, Ordering::Release);
    }

    pub(super) fn is_revoked(&self) -> bool {
        self.revoked.load(Ordering::Acquire)
    }

    fn written(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that something was changed on `mount`, so that its next SYNCFS has something to do.
    pub(super) fn note_write(&self, mount: u64) {
        self.written().insert(mount);
    }

    /// True when something was changed on `mount` since the last call.
    pub(super) fn take_written(&self, mount: u64) -> bool {
        self.written().remove(&mount)
    }

    /// How long a name may be believed.
    pub(super) fn entry_valid(&self) -> Valid {
        if self.exclusive { DAY } else { TICK }
    }

    /// How long a name may be believed not to exist; `None`: not at all.
    pub(super) fn absence_valid(&self) -> Option<Valid> {
        self.exclusive.then_some(DAY)
    }

    /// How long attributes may be believed.
    ///
    /// Set-id files are asked about each time: with HANDLE_KILLPRIV_V2 the host drops the bits on
    /// a write, and the guest's kernel does not look before the time is up (fs/fuse/file.c).
    pub(super) fn attr_valid(&self, stat: &Stat) -> Valid {
        let mode = u32::from(stat.stx_mode);
        let set_id = mode & (libc::S_ISUID | libc::S_ISGID) != 0;
        match mode & libc::S_IFMT {
            libc::S_IFREG if set_id => TICK,
            _ if self.exclusive => DAY,
            _ => TICK,
        }
    }

    /// The flags of a reply to OPEN and CREATE. Without FLUSH, close(2) costs the guest nothing;
    /// others must see data that a mapping has changed when a file opened for writing is closed.
    pub(super) fn open_flags(&self, writes: bool) -> u32 {
        match (self.exclusive, writes) {
            (true, _) => FOPEN_KEEP_CACHE | FOPEN_NOFLUSH,
            (false, false) => FOPEN_NOFLUSH,
            (false, true) => 0,
        }
    }

    /// The flags of a reply to OPENDIR.
    pub(super) fn opendir_flags(&self) -> u32 {
        if self.exclusive {
            FOPEN_KEEP_CACHE | FOPEN_CACHE_DIR
        } else {
            0
        }
    }
}
