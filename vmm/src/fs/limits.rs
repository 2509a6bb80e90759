//! Descriptors: how many this process may hold, and how many of them the guest may use up.
//!
//! Every inode the guest knows and every file it has open costs one. When its part is used up the
//! guest is told so (ENFILE); the VMM itself never runs out.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::sys::Errno;

/// Descriptors asked for: what the kernel allows at most unless told otherwise (fs.nr_open).
const WANTED: libc::rlim_t = 1 << 20;
/// Descriptors that are not the guest's to use up: queues, sockets, shares.
const RESERVED: libc::rlim_t = 512;
/// Entries that the descriptor table gets at once.
const TABLE: libc::rlim_t = 4096;

/// Raises the limit of open files and makes the descriptor table large; returns the guest's part.
///
/// The table grows by doubling, and in a process with threads each time waits for an RCU grace
/// period: 7 to 15 ms, measured, in the middle of a request. With a single thread it does not wait,
/// so it is grown now, before there are others.
pub(super) fn prepare() -> io::Result<Arc<Budget>> {
    let limit = raise_open_files()?;
    let highest = TABLE.min(limit).saturating_sub(1);
    // SAFETY: no memory is handed over; the copy is ours alone, and closed at once.
    unsafe {
        let copy = libc::fcntl(libc::STDERR_FILENO, libc::F_DUPFD_CLOEXEC, highest);
        if copy >= 0 {
            drop(OwnedFd::from_raw_fd(copy));
        }
    }
    let guests = limit.saturating_sub(RESERVED).max(RESERVED);
    Ok(Budget::new(usize::try_from(guests).unwrap_or(usize::MAX)))
}

/// Raises the limit to [`WANTED`], or where that is not allowed, the soft limit to the hard one.
/// Returns the limit in force.
fn raise_open_files() -> io::Result<libc::rlim_t> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: a live rlimit.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let set = |most| {
        let limit = libc::rlimit {
            rlim_cur: most,
            rlim_max: most,
        };
        // SAFETY: a live rlimit.
        match unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } {
            0 => Ok(most),
            _ => Err(io::Error::last_os_error()),
        }
    };
    match limit.rlim_max < WANTED {
        true => set(WANTED).or_else(|_| set(limit.rlim_max)),
        false => set(limit.rlim_max),
    }
}

/// The number of descriptors the guest may make the server hold.
pub(super) struct Budget(AtomicUsize);

impl Budget {
    pub(super) fn new(descriptors: usize) -> Arc<Budget> {
        Arc::new(Budget(AtomicUsize::new(descriptors)))
    }

    /// Permission to hold one descriptor; ENFILE when the guest has used up its share.
    pub(super) fn take(self: &Arc<Budget>) -> Result<Permit, Errno> {
        self.0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                left.checked_sub(1)
            })
            .map(|_| Permit(self.clone()))
            .map_err(|_| Errno(libc::ENFILE))
    }
}

/// Goes back to its [`Budget`] when dropped.
pub(super) struct Permit(Arc<Budget>);

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.0.fetch_add(1, Ordering::Relaxed);
    }
}
