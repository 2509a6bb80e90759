//! Landlock (Linux `Documentation/userspace-api/landlock.rst`): all that the host's kernel has of it.
//!
//! Two domains. The process's knows nothing of files: a domain that handles any right to files refuses
//! to move them between directories, and a share that comes later could not be excepted. The second is for
//! each thread that has no business with files, and refuses all of them (docs/decisions/0012-jail.md).
//!
//! A kernel without Landlock gives none: it adds to what holds without it.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    ptr,
};

use super::{JailError, check};

/// LANDLOCK_CREATE_RULESET_VERSION.
const VERSION: libc::c_uint = 1;
/// All rights to files, by the version of the ABI that brought the last of them.
const FILES: [(i64, u64); 4] = [(1, 0x1fff), (2, 0x3fff), (3, 0x7fff), (5, 0xffff)];
/// LANDLOCK_ACCESS_NET_BIND_TCP and _CONNECT_TCP.
const TCP: (i64, u64) = (4, 0b11);
/// LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET and _SIGNAL.
const OTHERS: (i64, u64) = (6, 0b11);

/// `struct landlock_ruleset_attr`; what a kernel does not know must be zero.
#[repr(C)]
#[derive(Default)]
struct Ruleset {
    files: u64,
    network: u64,
    scoped: u64,
}

/// The process's domain: no TCP, no signals and no abstract sockets to those outside of it.
pub(super) fn leave_network_and_others() -> Result<(), JailError> {
    let version = version();
    let since = |(least, rights): (i64, u64)| if version >= least { rights } else { 0 };
    restrict(&Ruleset {
        files: 0,
        network: since(TCP),
        scoped: since(OTHERS),
    })
}

/// The calling thread's domain: no file, by whatever name.
pub(super) fn leave_files() -> Result<(), JailError> {
    let version = version();
    let known = FILES.iter().rev().find(|(least, _)| version >= *least);
    restrict(&Ruleset {
        files: known.map_or(0, |(_, rights)| *rights),
        ..Ruleset::default()
    })
}

/// The ABI of the host's kernel; less than 1 where there is no Landlock.
fn version() -> i64 {
    // SAFETY: with this flag, the call takes neither memory nor size.
    unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            ptr::null::<Ruleset>(),
            0,
            VERSION,
        )
    }
}

/// Enters a domain that has `ruleset` and no exceptions. One that asks for nothing is none.
fn restrict(ruleset: &Ruleset) -> Result<(), JailError> {
    if ruleset.files | ruleset.network | ruleset.scoped == 0 {
        return Ok(());
    }
    // SAFETY: a live structure of the size given; the descriptor is new and ours.
    let domain = unsafe {
        let fd = libc::syscall(
            libc::SYS_landlock_create_ruleset,
            ptr::from_ref(ruleset),
            size_of::<Ruleset>(),
            0,
        );
        let fd = check("landlock_create_ruleset", fd)?;
        let fd = libc::c_int::try_from(fd).map_err(io::Error::other);
        OwnedFd::from_raw_fd(fd.map_err(JailError::of("landlock_create_ruleset"))?)
    };
    // SAFETY: a descriptor and no flags.
    check("landlock_restrict_self", unsafe {
        libc::syscall(libc::SYS_landlock_restrict_self, domain.as_raw_fd(), 0)
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{fs, thread};

    use super::*;

    /// On a thread of its own, which alone is restricted.
    fn restricted<T: Send + 'static>(
        domain: fn() -> Result<(), JailError>,
        act: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        let restricted = thread::spawn(move || {
            // SAFETY: an option that takes a number, and holds for this thread.
            unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
            domain().unwrap();
            act()
        });
        restricted.join().unwrap()
    }

    fn directory(name: &str) -> std::path::PathBuf {
        let own = format!("husk-landlock-{name}-{}", std::process::id());
        let directory = std::env::temp_dir().join(own);
        for child in ["a", "b"] {
            fs::create_dir_all(directory.join(child)).unwrap();
        }
        fs::write(directory.join("a/file"), "").unwrap();
        directory
    }

    #[test]
    fn a_thread_can_leave_all_files() {
        let place = directory("files");
        let file = place.join("a/file");
        let opened = restricted(leave_files, move || fs::read(file).is_ok());
        assert!(version() < 1 || !opened);
        fs::remove_dir_all(place).unwrap();
    }

    /// Were it not so, the file server could not do it either.
    #[test]
    fn the_processs_domain_lets_files_move_between_directories() {
        let place = directory("move");
        let (from, to) = (place.join("a/file"), place.join("b/file"));
        let moved = restricted(leave_network_and_others, move || fs::rename(from, to));
        moved.unwrap();
        fs::remove_dir_all(place).unwrap();
    }

    #[test]
    fn the_processs_domain_connects_to_nobody() {
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let connected = restricted(leave_network_and_others, move || {
            std::net::TcpStream::connect(address).is_ok()
        });
        assert!(version() < TCP.0 || !connected);
    }
}
