//! The jail: what is left to a VMM whose guest has taken it over. It may harm its own pod, and nothing
//! else. docs/security.md says the same in the operator's words, thread by thread.
//!
//! The shim clones the process into pid, ipc and uts namespaces of its own, and puts it into the pod's
//! network namespace. The rest happens here, before any thread exists, in the order that
//! works:
//!
//! 1. [`prepare`]: nothing inherited by accident; a user namespace is made, while the host's procfs
//!    can be reached by whom may write its maps ([`user`]);
//! 2. *between the two, what must be taken from the host by path is taken (main.rs);*
//! 3. the environment goes;
//! 4. [`limits`]: no core dumps, and nothing in them; not dumpable; no new privileges;
//! 5. [`root`]: a mount namespace with an empty root, and no way back to the host's: not to procfs,
//!    sysfs or cgroupfs either, whose files ask for the uid and not for a capability;
//! 6. [`landlock`]: no TCP, and neither signals nor abstract sockets to anybody outside;
//! 7. [`user`]: into the user namespace, which comes last of the namespaces, for pivot_root fails in a
//!    fresh one. From here on no capability counts for anything of the host's but inodes, and only
//!    those that act on inodes are kept;
//! 8. [`seccomp`]: the system calls that any thread needs, and death for every other;
//! 9. [`threads`]: each thread gives up what the others need. All threads are made by one that does
//!    nothing else, for a thread inherits what its maker has given up.
//!
//! Threads share their memory: who has taken over one can make another act for him. What 9 takes away is
//! a second line; what holds against arbitrary code is 1 to 8.

mod landlock;
mod limits;
mod root;
mod seccomp;
mod syscalls;
mod threads;
mod user;

use std::{io, ptr};

use husk_proto::DESCRIPTOR_FD;

pub use self::{
    limits::limit_memory,
    threads::{Role, spawn},
};

/// A step of the jail failed; nothing may run outside of it.
#[derive(Debug, thiserror::Error)]
#[error("jail: {step}: {cause}")]
pub struct JailError {
    step: &'static str,
    cause: io::Error,
}

/// What was made outside and is needed to enter.
pub struct Outside {
    user: user::UserNamespace,
}

/// Closes all descriptors behind the two sockets, and makes the user namespace. Called first of all:
/// what is opened later is meant to stay.
///
/// # Errors
/// The host lets no user namespace be made, or /proc is not mounted.
pub fn prepare() -> Result<Outside, JailError> {
    close_inherited()?;
    share_one_heap();
    Ok(Outside {
        user: user::UserNamespace::create()?,
    })
}

impl Outside {
    /// Enters the jail. On an error the process must end.
    ///
    /// What must still be taken from the host by path has to be taken before. No other thread exists.
    ///
    /// # Errors
    /// Names the step that the kernel refused.
    pub fn enter(self) -> Result<(), JailError> {
        self.leave_host()?;
        seccomp::install(seccomp::process())?;
        threads::start_nursery()?;
        threads::confine(Role::Service)
    }

    /// All of the jail but the filters and what single threads give up: for tests, which show that
    /// this holds by itself.
    ///
    /// # Errors
    /// As [`Self::enter`].
    pub fn leave_host(self) -> Result<(), JailError> {
        clear_environment()?;
        limits::harden()?;
        root::enter_empty_root()?;
        landlock::leave_network_and_others()?;
        self.user.enter()?;
        user::keep_inode_capabilities()
    }
}

/// Has all threads allocate from one heap. glibc gives each its own otherwise, and when it makes one smaller it opens
/// a file of /proc/sys (`check_may_shrink_heap`), for which most threads here would die. It is less memory, too.
fn share_one_heap() {
    // SAFETY: an option that takes a number, before any other thread exists.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

fn close_inherited() -> Result<(), JailError> {
    let first = DESCRIPTOR_FD as libc::c_uint + 1;
    // SAFETY: no descriptor above the sockets is owned by anything in this process yet.
    check("close_range", unsafe {
        libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, 0)
    })?;
    Ok(())
}

/// Empties the environment, also where `/proc/<pid>/environ` shows it.
fn clear_environment() -> Result<(), JailError> {
    unsafe extern "C" {
        static mut environ: *mut *mut libc::c_char;
    }
    // SAFETY: there is no other thread that could use the environment. Its strings are those of the
    // process's start: writable, each ended by a zero, in one piece from the first one on.
    unsafe {
        let mut entry = environ;
        let first = if entry.is_null() {
            ptr::null_mut()
        } else {
            *entry
        };
        if first.is_null() {
            return Ok(());
        }
        while !(*entry).is_null() {
            libc::memset((*entry).cast(), 0, libc::strlen(*entry));
            entry = entry.add(1);
        }
        check("clearenv", libc::clearenv().into())?;
        // The strings are gone; that their place is not shown needs CAP_SYS_RESOURCE, or stays undone.
        libc::prctl(libc::PR_SET_MM, libc::PR_SET_MM_ENV_END, first, 0, 0);
    }
    Ok(())
}

/// A system call's answer, which is negative when it was refused.
fn check(step: &'static str, result: libc::c_long) -> Result<libc::c_long, JailError> {
    match result {
        0.. => Ok(result),
        _ => Err(JailError::last(step)),
    }
}

impl JailError {
    /// The last failed call of this thread's.
    fn last(step: &'static str) -> Self {
        Self::of(step)(io::Error::last_os_error())
    }

    fn of(step: &'static str) -> impl Fn(io::Error) -> Self {
        move |cause| Self { step, cause }
    }
}
