//! The system calls of the file server, each as a safe function on descriptors.
//!
//! No call takes a path of more than one component, and none follows a symbolic link but those on
//! the magic links of [`super::self_fd`]. Calls interrupted by a signal are repeated.

use std::ffi::{CStr, c_int, c_long, c_uint};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// An error number, as the guest will see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Errno(pub(super) c_int);

impl Errno {
    /// That of the last failed call on this thread.
    pub(super) fn last() -> Errno {
        Errno(
            io::Error::last_os_error()
                .raw_os_error()
                .unwrap_or(libc::EIO),
        )
    }
}

impl From<Errno> for io::Error {
    fn from(Errno(number): Errno) -> io::Error {
        io::Error::from_raw_os_error(number)
    }
}

/// statx(2)'s answer.
pub(super) type Stat = libc::statx;

const STAT_MASK: c_uint = libc::STATX_BASIC_STATS | libc::STATX_BTIME | STATX_MNT_ID;
const STATX_MNT_ID: c_uint = 0x1000;

/// Runs a system call until it is not interrupted.
fn call(mut syscall: impl FnMut() -> c_long) -> Result<c_long, Errno> {
    loop {
        let result = syscall();
        if result >= 0 {
            return Ok(result);
        }
        let error = Errno::last();
        if error != Errno(libc::EINTR) {
            return Err(error);
        }
    }
}

fn done(syscall: impl FnMut() -> c_long) -> Result<(), Errno> {
    call(syscall).map(drop)
}

fn count(syscall: impl FnMut() -> c_long) -> Result<usize, Errno> {
    call(syscall).map(|count| usize::try_from(count).unwrap_or(0))
}

fn descriptor(syscall: impl FnMut() -> c_long) -> Result<OwnedFd, Errno> {
    let raw = call(syscall)?;
    let raw = c_int::try_from(raw).map_err(|_| Errno(libc::EBADF))?;
    // SAFETY: the kernel has just returned this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// Opens the entry `name` of `dir` as a place (O_PATH): whatever it is, nothing is opened for IO.
///
/// `name` is one component; the resolve flags are there should that ever be false.
pub(super) fn open_place(dir: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    // SAFETY: `open_how` is made of integers; zero is a value of each.
    let mut how: libc::open_how = unsafe { MaybeUninit::zeroed().assume_init() };
    how.flags = (libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC) as u64;
    how.resolve = libc::RESOLVE_BENEATH | libc::RESOLVE_NO_MAGICLINKS | libc::RESOLVE_NO_SYMLINKS;
    // SAFETY: `name` is NUL-terminated and `how` is a live open_how of the size given.
    descriptor(|| unsafe {
        libc::syscall(
            libc::SYS_openat2,
            dir.as_raw_fd(),
            name.as_ptr(),
            &raw const how,
            size_of::<libc::open_how>(),
        )
    })
}

/// openat(2); O_CLOEXEC, O_NOCTTY and O_LARGEFILE are added.
pub(super) fn openat(
    dir: BorrowedFd<'_>,
    name: &CStr,
    flags: c_int,
    mode: libc::mode_t,
) -> Result<OwnedFd, Errno> {
    let flags = flags | libc::O_CLOEXEC | libc::O_NOCTTY | libc::O_LARGEFILE;
    // SAFETY: `name` is NUL-terminated.
    descriptor(|| unsafe { libc::openat(dir.as_raw_fd(), name.as_ptr(), flags, mode).into() })
}

/// open_tree(2): a detached clone of the one mount that `path` is in, rooted at `path`.
pub(super) fn clone_mount(path: &CStr) -> Result<OwnedFd, Errno> {
    // SAFETY: `path` is NUL-terminated.
    descriptor(|| unsafe {
        libc::syscall(
            libc::SYS_open_tree,
            libc::AT_FDCWD,
            path.as_ptr(),
            libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC,
        )
    })
}

pub(super) fn statx(file: BorrowedFd<'_>) -> Result<Stat, Errno> {
    statx_with(file, 0)
}

/// What this host knows of `file`, without asking the server that it may be on.
pub(super) fn statx_known(file: BorrowedFd<'_>) -> Result<Stat, Errno> {
    statx_with(file, libc::AT_STATX_DONT_SYNC)
}

fn statx_with(file: BorrowedFd<'_>, flags: c_int) -> Result<Stat, Errno> {
    let mut stat = MaybeUninit::<Stat>::zeroed();
    // SAFETY: an empty path with AT_EMPTY_PATH, and room for one statx.
    done(|| unsafe {
        c_long::from(libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_SYMLINK_NOFOLLOW | flags,
            STAT_MASK,
            stat.as_mut_ptr(),
        ))
    })?;
    // SAFETY: zeroed, and filled by the kernel.
    Ok(unsafe { stat.assume_init() })
}

pub(super) fn fstatfs(file: BorrowedFd<'_>) -> Result<libc::statfs64, Errno> {
    let mut stat = MaybeUninit::<libc::statfs64>::zeroed();
    // SAFETY: room for one statfs64.
    done(|| unsafe { c_long::from(libc::fstatfs64(file.as_raw_fd(), stat.as_mut_ptr())) })?;
    // SAFETY: zeroed, and filled by the kernel.
    Ok(unsafe { stat.assume_init() })
}

/// The text of the symbolic link that `link` (O_PATH) is.
pub(super) fn readlink(link: BorrowedFd<'_>) -> Result<Vec<u8>, Errno> {
    let mut text = vec![0_u8; libc::PATH_MAX as usize];
    // SAFETY: an empty path and a buffer of the length given.
    let len = count(|| unsafe {
        libc::readlinkat(
            link.as_raw_fd(),
            c"".as_ptr(),
            text.as_mut_ptr().cast(),
            text.len(),
        ) as _
    })?;
    text.truncate(len);
    Ok(text)
}

pub(super) fn mkdirat(dir: BorrowedFd<'_>, name: &CStr, mode: u32) -> Result<(), Errno> {
    // SAFETY: `name` is NUL-terminated.
    done(|| c_long::from(unsafe { libc::mkdirat(dir.as_raw_fd(), name.as_ptr(), mode) }))
}

pub(super) fn mknodat(
    dir: BorrowedFd<'_>,
    name: &CStr,
    mode: u32,
    device: libc::dev_t,
) -> Result<(), Errno> {
    // SAFETY: `name` is NUL-terminated.
    done(|| c_long::from(unsafe { libc::mknodat(dir.as_raw_fd(), name.as_ptr(), mode, device) }))
}

pub(super) fn symlinkat(text: &CStr, dir: BorrowedFd<'_>, name: &CStr) -> Result<(), Errno> {
    // SAFETY: both strings are NUL-terminated.
    done(|| c_long::from(unsafe { libc::symlinkat(text.as_ptr(), dir.as_raw_fd(), name.as_ptr()) }))
}

/// unlinkat(2); `flags` is 0 or AT_REMOVEDIR.
pub(super) fn unlinkat(dir: BorrowedFd<'_>, name: &CStr, flags: c_int) -> Result<(), Errno> {
    // SAFETY: `name` is NUL-terminated.
    done(|| c_long::from(unsafe { libc::unlinkat(dir.as_raw_fd(), name.as_ptr(), flags) }))
}

pub(super) fn renameat2(
    from: BorrowedFd<'_>,
    name: &CStr,
    to: BorrowedFd<'_>,
    new_name: &CStr,
    flags: c_uint,
) -> Result<(), Errno> {
    // SAFETY: both names are NUL-terminated.
    done(|| unsafe {
        libc::syscall(
            libc::SYS_renameat2,
            from.as_raw_fd(),
            name.as_ptr(),
            to.as_raw_fd(),
            new_name.as_ptr(),
            flags,
        )
    })
}

/// Links what the magic link `magic` of `links` stands for as `name` in `dir`.
pub(super) fn link_magic(
    links: BorrowedFd<'_>,
    magic: &CStr,
    dir: BorrowedFd<'_>,
    name: &CStr,
) -> Result<(), Errno> {
    // SAFETY: both names are NUL-terminated.
    done(|| unsafe {
        c_long::from(libc::linkat(
            links.as_raw_fd(),
            magic.as_ptr(),
            dir.as_raw_fd(),
            name.as_ptr(),
            libc::AT_SYMLINK_FOLLOW,
        ))
    })
}

/// chmod of what the magic link `magic` of `links` stands for.
pub(super) fn chmod_magic(
    links: BorrowedFd<'_>,
    magic: &CStr,
    mode: libc::mode_t,
) -> Result<(), Errno> {
    // SAFETY: `magic` is NUL-terminated.
    done(|| c_long::from(unsafe { libc::fchmodat(links.as_raw_fd(), magic.as_ptr(), mode, 0) }))
}

/// chown of `file` itself; `u32::MAX` leaves an id as it is.
pub(super) fn chown(file: BorrowedFd<'_>, uid: u32, gid: u32) -> Result<(), Errno> {
    // SAFETY: an empty path with AT_EMPTY_PATH.
    done(|| unsafe {
        c_long::from(libc::fchownat(
            file.as_raw_fd(),
            c"".as_ptr(),
            uid,
            gid,
            libc::AT_EMPTY_PATH | libc::AT_SYMLINK_NOFOLLOW,
        ))
    })
}

/// Access and modification time of `file` itself (UTIME_NOW and UTIME_OMIT as in utimensat(2)).
pub(super) fn set_times(file: BorrowedFd<'_>, times: &[libc::timespec; 2]) -> Result<(), Errno> {
    // SAFETY: an empty path with AT_EMPTY_PATH, and two timespecs.
    done(|| unsafe {
        c_long::from(libc::utimensat(
            file.as_raw_fd(),
            c"".as_ptr(),
            times.as_ptr(),
            libc::AT_EMPTY_PATH,
        ))
    })
}

pub(super) fn ftruncate(file: BorrowedFd<'_>, size: libc::off_t) -> Result<(), Errno> {
    // SAFETY: no memory is handed over.
    done(|| c_long::from(unsafe { libc::ftruncate(file.as_raw_fd(), size) }))
}

/// preadv(2) into memory that `iovecs` describe, which the caller keeps mapped and writable.
pub(super) fn preadv(
    file: BorrowedFd<'_>,
    iovecs: &[libc::iovec],
    offset: libc::off_t,
) -> Result<usize, Errno> {
    let segments = c_int::try_from(iovecs.len()).map_err(|_| Errno(libc::EINVAL))?;
    // SAFETY: guest memory, which only the guest and the kernel look at; see `message::Span`.
    count(|| unsafe { libc::preadv(file.as_raw_fd(), iovecs.as_ptr(), segments, offset) as _ })
}

/// pwritev2(2) from memory that `iovecs` describe, which the caller keeps mapped.
pub(super) fn pwritev2(
    file: BorrowedFd<'_>,
    iovecs: &[libc::iovec],
    offset: libc::off_t,
    flags: c_int,
) -> Result<usize, Errno> {
    let segments = c_int::try_from(iovecs.len()).map_err(|_| Errno(libc::EINVAL))?;
    // SAFETY: guest memory, which only the guest and the kernel look at; see `message::Span`.
    count(|| unsafe {
        libc::pwritev2(file.as_raw_fd(), iovecs.as_ptr(), segments, offset, flags) as _
    })
}

/// The next directory entries, as struct linux_dirent64; 0 at the end.
pub(super) fn getdents(dir: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<usize, Errno> {
    // SAFETY: a buffer of the length given.
    count(|| unsafe {
        libc::syscall(
            libc::SYS_getdents64,
            dir.as_raw_fd(),
            buffer.as_mut_ptr(),
            c_uint::try_from(buffer.len()).unwrap_or(c_uint::MAX),
        )
    })
}

pub(super) fn lseek(file: BorrowedFd<'_>, offset: u64, whence: c_int) -> Result<u64, Errno> {
    let offset = libc::off_t::try_from(offset).map_err(|_| Errno(libc::EINVAL))?;
    // SAFETY: no memory is handed over.
    let at = call(|| unsafe { libc::lseek(file.as_raw_fd(), offset, whence) })?;
    Ok(at.unsigned_abs())
}

pub(super) fn fallocate(
    file: BorrowedFd<'_>,
    mode: c_int,
    offset: libc::off_t,
    len: libc::off_t,
) -> Result<(), Errno> {
    // SAFETY: no memory is handed over.
    done(|| c_long::from(unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) }))
}

pub(super) fn copy_file_range(
    from: BorrowedFd<'_>,
    mut from_offset: libc::off64_t,
    to: BorrowedFd<'_>,
    mut to_offset: libc::off64_t,
    len: usize,
) -> Result<usize, Errno> {
    // SAFETY: two live offsets.
    count(|| unsafe {
        libc::copy_file_range(
            from.as_raw_fd(),
            &raw mut from_offset,
            to.as_raw_fd(),
            &raw mut to_offset,
            len,
            0,
        ) as _
    })
}

pub(super) fn fsync(file: BorrowedFd<'_>, data_only: bool) -> Result<(), Errno> {
    // SAFETY: no memory is handed over.
    done(|| unsafe {
        c_long::from(match data_only {
            true => libc::fdatasync(file.as_raw_fd()),
            false => libc::fsync(file.as_raw_fd()),
        })
    })
}

pub(super) fn syncfs(file: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: no memory is handed over.
    done(|| c_long::from(unsafe { libc::syncfs(file.as_raw_fd()) }))
}

/// dup(2), for the close(2) of the copy alone: what the guest's close means to a file system.
pub(super) fn flush(file: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: no memory is handed over.
    let copy =
        call(|| unsafe { c_long::from(libc::fcntl(file.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 0)) })?;
    // SAFETY: the copy is ours alone. close(2) is not repeated: it never leaves the descriptor open.
    match unsafe { libc::close(copy as c_int) } {
        0 => Ok(()),
        _ => Err(Errno::last()),
    }
}

/// flock(2), never waiting; true when the lock was taken.
pub(super) fn try_flock(file: BorrowedFd<'_>, kind: c_int) -> bool {
    // SAFETY: no memory is handed over.
    unsafe { libc::flock(file.as_raw_fd(), kind | libc::LOCK_NB) == 0 }
}

/// Makes `dir` the working directory of this thread (which has one of its own).
pub(super) fn fchdir(dir: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: no memory is handed over.
    done(|| c_long::from(unsafe { libc::fchdir(dir.as_raw_fd()) }))
}

/// getxattr(2) on a name in the working directory; its links are followed.
pub(super) fn getxattr(place: &CStr, name: &CStr, value: &mut [u8]) -> Result<usize, Errno> {
    // SAFETY: two NUL-terminated strings and a buffer of the length given.
    count(|| unsafe {
        let room = value.as_mut_ptr().cast();
        libc::getxattr(place.as_ptr(), name.as_ptr(), room, value.len()) as _
    })
}

/// listxattr(2) on a name in the working directory.
pub(super) fn listxattr(place: &CStr, names: &mut [u8]) -> Result<usize, Errno> {
    // SAFETY: a NUL-terminated string and a buffer of the length given.
    count(|| unsafe {
        libc::listxattr(place.as_ptr(), names.as_mut_ptr().cast(), names.len()) as _
    })
}

/// setxattr(2) on a name in the working directory.
pub(super) fn setxattr(place: &CStr, name: &CStr, value: &[u8], flags: c_int) -> Result<(), Errno> {
    // SAFETY: two NUL-terminated strings and a buffer of the length given.
    done(|| unsafe {
        let bytes = value.as_ptr().cast();
        c_long::from(libc::setxattr(
            place.as_ptr(),
            name.as_ptr(),
            bytes,
            value.len(),
            flags,
        ))
    })
}

/// removexattr(2) on a name in the working directory.
pub(super) fn removexattr(place: &CStr, name: &CStr) -> Result<(), Errno> {
    // SAFETY: two NUL-terminated strings.
    done(|| c_long::from(unsafe { libc::removexattr(place.as_ptr(), name.as_ptr()) }))
}
