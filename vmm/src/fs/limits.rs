//! Descriptors: how many this process may hold, and how many of them the guest may use up.
//!
//! Every inode the guest knows and every file it has open costs one, and with it an inode that the
//! host's kernel cannot drop: about a kilobyte that no limit of the pod accounts for. So a guest gets
//! [`GUEST`] of them, whatever the host allows.
//!
//! A guest's kernel remembers what it was told of until its memory is short. When only a quarter is left,
//! it is told of the rest with names that are good for one use, so it forgets each as soon as nobody uses it:
//! walking through any number of files takes longer then, and goes on. Only when so many are in use at once, or
//! the guest does not forget, nothing is left, and it is told so (ENFILE). What it knows it can go on with, and
//! the VMM itself never runs out.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::sys::Errno;

/// The guest's part: inodes that it knows, and open files, together.
const GUEST: libc::rlim_t = 1 << 18;
/// Descriptors that are not the guest's to use up: queues, sockets, shares.
const RESERVED: libc::rlim_t = 4096;
/// As many of them where the host does not allow both.
const RESERVED_LEAST: libc::rlim_t = 512;
/// For one server; tests have many in one process.
const WANTED: libc::rlim_t = if cfg!(test) { 3 } else { 1 } * (GUEST + RESERVED);
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
    Ok(Budget::new(
        usize::try_from(guests_part(limit)).unwrap_or(usize::MAX),
    ))
}

/// Of `limit` descriptors in all.
fn guests_part(limit: libc::rlim_t) -> libc::rlim_t {
    let rest = limit.saturating_sub(RESERVED_LEAST).max(RESERVED_LEAST);
    rest.min(GUEST)
}

/// Sets the limit to [`WANTED`], or where that is not allowed, the soft limit to the hard one.
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
    set(WANTED).or_else(|_| set(limit.rlim_max))
}

/// The number of descriptors the guest may make the server hold, or of anything else that costs.
pub(super) struct Budget {
    left: AtomicUsize,
    /// With no more than this left, nothing is spent on what the guest does not use.
    low: usize,
}

impl Budget {
    pub(super) fn new(descriptors: usize) -> Arc<Budget> {
        Arc::new(Budget {
            left: AtomicUsize::new(descriptors),
            low: descriptors / 4,
        })
    }

    /// Whether there is enough for the guest to remember what it does not use, and to look files up before
    /// it asks for them (READDIRPLUS).
    pub(super) fn is_ample(&self) -> bool {
        self.left.load(Ordering::Relaxed) > self.low
    }

    /// Permission to hold one; ENFILE when the guest has used up its share.
    pub(super) fn take(self: &Arc<Budget>) -> Result<Permit, Errno> {
        self.left
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
        self.0.left.fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_gets_its_part_however_much_the_host_allows() {
        assert_eq!(guests_part(1 << 30), GUEST);
        assert_eq!(guests_part(WANTED), GUEST);
        assert_eq!(guests_part(4096), 4096 - 512);
        assert_eq!(guests_part(100), 512);
    }

    #[test]
    fn what_is_dropped_can_be_taken_again() {
        let budget = Budget::new(4);
        let mut permits: Vec<Permit> = (0..3).filter_map(|_| budget.take().ok()).collect();
        assert!(!budget.is_ample());
        permits.extend(budget.take().ok());
        assert_eq!(budget.take().err(), Some(Errno(libc::ENFILE)));
        permits.clear();
        assert!(budget.is_ample() && budget.take().is_ok());
    }
}
