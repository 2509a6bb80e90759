//! Attributes: reading them, changing them, and what else is known of an inode without opening it.

use std::os::fd::AsFd;

use super::creds::WithoutFsetid;
use super::inode::Node;
use super::message::{Answer, Request};
use super::overlay;
use super::server::FileServer;
use super::sys::{self, Errno, Stat};
use super::wire::{self, Attr, AttrOut, EntryOut, StatfsOut, StatxOut, StatxTime, fattr};

const NANOS: u32 = 1_000_000_000;

impl FileServer {
    pub(super) fn getattr(&self, request: &Request<'_>) -> Result<Answer, Errno> {
        let node = self.nodes.get(request.header.nodeid)?;
        attributes(&node)
    }

    pub(super) fn statx(&self, request: &Request<'_>) -> Result<Answer, Errno> {
        let node = self.nodes.get(request.header.nodeid)?;
        let stat = sys::statx(node.place())?;
        let (attr_valid, attr_valid_nsec) = node.share.attr_valid(&stat);
        let stat = wire_statx(&stat);
        Ok(Answer::of(&StatxOut {
            attr_valid,
            attr_valid_nsec,
            stat,
            ..Default::default()
        }))
    }

    pub(super) fn setattr(&self, request: &Request<'_>) -> Result<Answer, Errno> {
        let asked: wire::SetattrIn = request.args().take()?;
        let node = self.nodes.get(request.header.nodeid)?;
        let has = |flag| asked.valid & flag != 0;
        node.note_change();
        if has(fattr::UID | fattr::GID) {
            let given = |flag, id| if has(flag) { id } else { u32::MAX };
            let (uid, gid) = (given(fattr::UID, asked.uid), given(fattr::GID, asked.gid));
            // The host's kernel drops set-id bits and file capabilities, as FATTR_KILL_SUIDGID
            // asks for.
            sys::chown(node.place(), uid, gid)?;
        }
        if has(fattr::MODE) {
            self.links.chmod(node.place(), asked.mode & 0o7777)?;
        }
        if has(fattr::SIZE) {
            let _ordinary = WithoutFsetid::enter_if(has(fattr::KILL_SUIDGID))?;
            self.truncate(&node, has(fattr::FH).then_some(asked.fh), asked.size)?;
        }
        if has(fattr::ATIME | fattr::MTIME) {
            let atime = time(
                has(fattr::ATIME),
                has(fattr::ATIME_NOW),
                asked.atime,
                asked.atimensec,
            )?;
            let mtime = time(
                has(fattr::MTIME),
                has(fattr::MTIME_NOW),
                asked.mtime,
                asked.mtimensec,
            )?;
            sys::set_times(node.place(), &[atime, mtime])?;
        }
        overlay::settle(&self.nodes, &node);
        attributes(&node)
    }

    fn truncate(&self, node: &Node, fh: Option<u64>, size: u64) -> Result<(), Errno> {
        let size = libc::off_t::try_from(size).map_err(|_| Errno(libc::EFBIG))?;
        if !node.is_file() {
            return Err(Errno(libc::EINVAL));
        }
        let done = match fh {
            Some(fh) => {
                let handle = self.handles.file(fh, node.id)?;
                sys::ftruncate(handle.file(&self.links).as_fd(), size)
            }
            None => {
                let file = self.links.open(node.place(), libc::O_WRONLY)?;
                sys::ftruncate(file.as_fd(), size)
            }
        };
        node.note_write();
        done
    }

    pub(super) fn statfs(&self, request: &Request<'_>) -> Result<Answer, Errno> {
        let node = self.nodes.get(request.header.nodeid)?;
        let fs = sys::fstatfs(node.place())?;
        let narrow = |value: i64| u32::try_from(value).unwrap_or(u32::MAX);
        Ok(Answer::of(&StatfsOut {
            blocks: fs.f_blocks,
            bfree: fs.f_bfree,
            bavail: fs.f_bavail,
            files: fs.f_files,
            ffree: fs.f_ffree,
            bsize: narrow(fs.f_bsize),
            namelen: narrow(fs.f_namelen),
            frsize: narrow(fs.f_frsize),
            ..Default::default()
        }))
    }

    pub(super) fn readlink(&self, request: &Request<'_>) -> Result<Answer, Errno> {
        let node = self.nodes.get(request.header.nodeid)?;
        Ok(Answer::Bytes(sys::readlink(node.place())?))
    }

    /// What the guest is told when it is told of an inode.
    pub(super) fn entry(&self, node: &Node, stat: &Stat) -> EntryOut {
        // What may be believed for no time at all the guest's kernel keeps no longer than it is in use, and
        // then forgets (Linux fs/fuse/dir.c, fuse_dentry_delete): see `limits.rs`.
        let (entry_valid, entry_valid_nsec) = match self.budget.is_ample() {
            true => node.share.entry_valid(),
            false => (0, 0),
        };
        let (attr_valid, attr_valid_nsec) = node.share.attr_valid(stat);
        let mut attr = wire_attr(stat);
        if node.submount && self.has_submounts() {
            attr.flags |= wire::ATTR_SUBMOUNT;
        }
        EntryOut {
            nodeid: node.id,
            // Node ids are never used again, so one generation does.
            generation: 0,
            entry_valid,
            attr_valid,
            entry_valid_nsec,
            attr_valid_nsec,
            attr,
        }
    }
}

fn attributes(node: &Node) -> Result<Answer, Errno> {
    let stat = sys::statx(node.place())?;
    let (attr_valid, attr_valid_nsec) = node.share.attr_valid(&stat);
    let attr = wire_attr(&stat);
    Ok(Answer::of(&AttrOut {
        attr_valid,
        attr_valid_nsec,
        dummy: 0,
        attr,
    }))
}

fn time(given: bool, now: bool, seconds: u64, nanos: u32) -> Result<libc::timespec, Errno> {
    let (tv_sec, tv_nsec) = match (given, now) {
        (false, _) => (0, libc::UTIME_OMIT),
        (true, true) => (0, libc::UTIME_NOW),
        // The kernel sends its signed seconds as they are.
        (true, false) if nanos < NANOS => (seconds as i64, i64::from(nanos)),
        (true, false) => return Err(Errno(libc::EINVAL)),
    };
    Ok(libc::timespec { tv_sec, tv_nsec })
}

/// A device number as the kernel packs it into 32 bits (new_encode_dev).
fn encode_device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

fn wire_attr(stat: &Stat) -> Attr {
    Attr {
        ino: stat.stx_ino,
        size: stat.stx_size,
        blocks: stat.stx_blocks,
        atime: stat.stx_atime.tv_sec as u64,
        mtime: stat.stx_mtime.tv_sec as u64,
        ctime: stat.stx_ctime.tv_sec as u64,
        atimensec: stat.stx_atime.tv_nsec,
        mtimensec: stat.stx_mtime.tv_nsec,
        ctimensec: stat.stx_ctime.tv_nsec,
        mode: u32::from(stat.stx_mode),
        nlink: stat.stx_nlink,
        uid: stat.stx_uid,
        gid: stat.stx_gid,
        rdev: encode_device(stat.stx_rdev_major, stat.stx_rdev_minor),
        blksize: stat.stx_blksize,
        flags: 0,
    }
}

fn wire_statx(stat: &Stat) -> wire::Statx {
    let time = |time: &libc::statx_timestamp| StatxTime {
        sec: time.tv_sec,
        nsec: time.tv_nsec,
        reserved: 0,
    };
    wire::Statx {
        mask: stat.stx_mask & (libc::STATX_BASIC_STATS | libc::STATX_BTIME),
        blksize: stat.stx_blksize,
        nlink: stat.stx_nlink,
        uid: stat.stx_uid,
        gid: stat.stx_gid,
        mode: stat.stx_mode,
        ino: stat.stx_ino,
        size: stat.stx_size,
        blocks: stat.stx_blocks,
        atime: time(&stat.stx_atime),
        btime: time(&stat.stx_btime),
        ctime: time(&stat.stx_ctime),
        mtime: time(&stat.stx_mtime),
        rdev_major: stat.stx_rdev_major,
        rdev_minor: stat.stx_rdev_minor,
        ..Default::default()
    }
}
