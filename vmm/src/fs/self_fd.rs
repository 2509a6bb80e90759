//! A detached clone of /proc/self/fd: the one way from a place (O_PATH) back to an open file.
//!
//! A magic link in that directory leads to the very inode a descriptor stands for, whatever has
//! been renamed or unlinked since. Nothing else of procfs comes with it: the clone's root is the
//! fd directory, `..` ends there, and its entries are descriptors this process has anyway.
//!
//! It must be taken by the process that uses it, in its last pid namespace, while /proc is still
//! mounted. The /proc of an outer pid namespace will do: a process is visible in all of them.

use std::ffi::{CStr, c_int};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use super::sys::{self, Errno};

/// The clone.
pub(super) struct SelfFd(OwnedFd);

impl SelfFd {
    /// Takes the clone and makes sure that it shows this process's descriptors.
    pub(super) fn take() -> Result<SelfFd, Errno> {
        let clone = SelfFd(sys::clone_mount(c"/proc/self/fd")?);
        let (probe, _other_end) = UnixStream::pair().map_err(|_| Errno::last())?;
        let seen = clone.open(probe.as_fd(), libc::O_PATH)?;
        let (seen, own) = (sys::statx(seen.as_fd())?, sys::statx(probe.as_fd())?);
        let same = |a: &sys::Stat| (a.stx_dev_major, a.stx_dev_minor, a.stx_ino);
        if same(&seen) != same(&own) {
            return Err(Errno(libc::ESRCH));
        }
        Ok(clone)
    }

    #[cfg(test)]
    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Opens anew what `place` stands for. The caller has made sure that it is a regular file or a
    /// directory: anything else could wait or act.
    pub(super) fn open(&self, place: BorrowedFd<'_>, flags: c_int) -> Result<OwnedFd, Errno> {
        sys::openat(self.0.as_fd(), Name::of(place).as_c_str(), flags, 0)
    }

    /// linkat(2) of `place` to `name` in `dir`.
    pub(super) fn link(
        &self,
        place: BorrowedFd<'_>,
        dir: BorrowedFd<'_>,
        name: &CStr,
    ) -> Result<(), Errno> {
        sys::link_magic(self.0.as_fd(), Name::of(place).as_c_str(), dir, name)
    }

    /// chmod of `place`.
    pub(super) fn chmod(&self, place: BorrowedFd<'_>, mode: u32) -> Result<(), Errno> {
        sys::chmod_magic(self.0.as_fd(), Name::of(place).as_c_str(), mode)
    }

    /// Calls `act` with a path that stands for `place` as seen from the working directory of this
    /// worker thread: the calls on extended attributes know no directory descriptor before
    /// Linux 6.13.
    pub(super) fn with_path<T>(
        &self,
        place: BorrowedFd<'_>,
        act: impl FnOnce(&CStr) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        // A thread that shares its working directory with others must not move them.
        if !super::creds::is_worker() {
            return Err(Errno(libc::EPERM));
        }
        sys::fchdir(self.0.as_fd())?;
        act(Name::of(place).as_c_str())
    }
}

/// A descriptor's number in decimal, without allocating.
struct Name([u8; 12]);

impl Name {
    fn of(place: BorrowedFd<'_>) -> Name {
        let mut number = place.as_raw_fd().unsigned_abs();
        let mut digits = [0; 12];
        // From the end: the last byte stays NUL.
        for at in (0..11).rev() {
            if let Some(digit) = digits.get_mut(at) {
                *digit = b'0' + (number % 10) as u8;
            }
            number /= 10;
            if number == 0 {
                digits.rotate_left(at);
                break;
            }
        }
        Name(digits)
    }

    fn as_c_str(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.0).unwrap_or(c"")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Write};

    #[test]
    fn a_descriptor_has_its_number_for_a_name() {
        for number in [0, 7, 10, 123, 99_999, i32::MAX] {
            // SAFETY: never used as a descriptor, only for its number.
            let place = unsafe { BorrowedFd::borrow_raw(number) };
            assert_eq!(
                Name::of(place).as_c_str().to_str().unwrap(),
                number.to_string()
            );
        }
    }

    #[test]
    fn an_unlinked_file_can_be_opened_for_writing() {
        let links = SelfFd::take().unwrap();
        let dir = tempfile_dir();
        let path = dir.join("file");
        File::create(&path).unwrap();
        let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
        // SAFETY: AT_FDCWD is a constant that openat knows.
        let here = unsafe { BorrowedFd::borrow_raw(libc::AT_FDCWD) };
        let place = sys::openat(here, &name, libc::O_PATH, 0).unwrap();
        std::fs::remove_file(&path).unwrap();
        let mut file = File::from(links.open(place.as_fd(), libc::O_RDWR).unwrap());
        file.write_all(b"still here").unwrap();
        let mut text = String::new();
        let again = links.open(place.as_fd(), libc::O_RDONLY).unwrap();
        File::from(again).read_to_string(&mut text).unwrap();
        assert_eq!(text, "still here");
        std::fs::remove_dir(dir).unwrap();
    }

    fn tempfile_dir() -> std::path::PathBuf {
        let dir = std::env::temp_dir().join(format!("husk-self-fd-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        dir
    }
}
