//! `tmpcopyup`: a tmpfs that begins with what it covers.
//!
//! As with runc: directories, files, links and devices with owners and modes; hard links become files of their own,
//! times and extended attributes are new. The source is the image's business and is never left: names are opened
//! one at a time, relative to descriptors, and no link is followed.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Uid, chmodat, chownat, mkdirat, mknodat,
    openat, readlinkat, statat, symlinkat,
};

/// Copies what is in the directory `from` into the empty directory `to`, which nobody else can reach yet.
pub(super) fn copy_up(from: BorrowedFd, to: BorrowedFd) -> io::Result<()> {
    let (from, to) = (directory(from, c".")?, directory(to, c".")?);
    for entry in Dir::read_from(&from)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let stat = statat(&from, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        one(&from, &to, name, kind, &stat)?;
        if kind == FileType::Directory {
            // One after the other: a directory may hold more of them than descriptors may be open.
            let (from, to) = (from.as_fd(), to.as_fd());
            copy_up(directory(from, name)?.as_fd(), directory(to, name)?.as_fd())?;
        }
    }
    Ok(())
}

fn one(from: &OwnedFd, to: &OwnedFd, name: &CStr, kind: FileType, stat: &Stat) -> io::Result<()> {
    let private = Mode::from_raw_mode(0o600);
    match kind {
        FileType::Directory => mkdirat(to, name, Mode::from_raw_mode(0o700))?,
        FileType::Symlink => symlinkat(readlinkat(from, name, Vec::new())?, to, name)?,
        FileType::RegularFile => {
            let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let source = openat(from, name, flags | OFlags::RDONLY, Mode::empty())?;
            let new = flags | OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
            let target = openat(to, name, new, private)?;
            io::copy(&mut File::from(source), &mut File::from(target))?;
        }
        special => mknodat(to, name, special, private, stat.st_rdev)?,
    }
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    chownat(to, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    if kind != FileType::Symlink {
        // After the owner, whose change takes set-id bits away.
        chmodat(
            to,
            name,
            Mode::from_raw_mode(stat.st_mode & 0o7777),
            AtFlags::empty(),
        )?;
    }
    Ok(())
}

fn directory(parent: BorrowedFd, name: &CStr) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(parent, name, flags, Mode::empty())?)
}
