//! File data: opening regular files, reading and writing them straight from and to guest memory.

use std::ffi::c_int;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use super::creds::WithoutFsetid;
use super::handle::{FileHandle, Handle, writes};
use super::inode::Node;
use super::message::{Answer, Reply, Request};
use super::overlay;
use super::server::{FileServer, MAX_TRANSFER};
use super::sys::{self, Errno};
use super::wire::{
    self, FSYNC_FDATASYNC, OPEN_KILL_SUIDGID, OpenOut, WRITE_CACHE, WRITE_KILL_SUIDGID, WriteOut,
};

/// The most one COPY_FILE_RANGE does before it answers: the caller comes back for the rest, and
/// no thread is lost to one request.
const MAX_COPY: u64 = 64 << 20;
/// pwritev2(2): append, whatever the offset.
const RWF_APPEND: c_int = 0x10;

/// What of the guest's open flags is the host's business.
///
/// Not O_APPEND: write-back of a mapping may come by any handle, and would append; appending is
/// done by request. Not O_DIRECT: guest memory need not be aligned. Not O_NONBLOCK, not O_CREAT.
pub(super) fn host_flags(flags: u32) -> c_int {
    const KEPT: c_int =
        libc::O_ACCMODE | libc::O_TRUNC | libc::O_SYNC | libc::O_DSYNC | libc::O_NOATIME;
    flags as c_int & KEPT
}

impl FileServer {
    pub(super) fn open(&self, request: &Request<'_>) -> Result<Answer, Errno> {
        let asked: wire::OpenIn = request.args().take()?;
        let node = self.nodes.get(request.header.nodeid)?;
        let flags = host_flags(asked.flags);
        let permit = self.budget.take()?;
        let file = {
            let _ordinary = WithoutFsetid::enter_if(asked.open_flags & OPEN_KILL_SUIDGID != 0)?;
            self.open_file(&node, flags)?
        };
        if writes(flags) || flags & libc::O_TRUNC != 0 {
            node.note_write();
            overlay::settle(&self.nodes, &node);
        }
        let open_flags = node.share.open_flags(writes(flags));
        let handle = FileHandle::new(node, file, flags & !libc::O_TRUNC, permit);
        let fh = self.handles.add(Handle::File(Arc::new(handle)))?;
        Ok(Answer::of(&OpenOut {
            fh,
            open_flags,
            backing_id: 0,
        }))
    }

    fn open_file(&self, node: &Node, flags: c_int) -> Result<OwnedFd, Errno> {
        match (node.is_file(), node.is_dir()) {
            (true, _) => self.links.open(node.place(), flags),
            (_, true) => Err(Errno(libc::EISDIR)),
            _ => Err(Errno(libc::ENXIO)),
        }
    }

    pub(super) fn read(&self, request: &Request<'_>, reply: &Reply<'_>) -> Result<Answer, Errno> {
        let asked: wire::ReadIn = request.args().take()?;
        if asked.size > MAX_TRANSFER {
            return Err(Errno(libc::EINVAL));
        }
        let handle = self.handles.file(asked.fh, request.header.nodeid)?;
        let file = handle.file(&self.links);
        let room = reply.data(asked.size as usize)?;
        room.read_from(file.as_fd(), asked.offset)
            .map(Answer::InPlace)
    }

    pub(super) fn write(&self, request: &Request<'_>) -> Result<Answer, Errno> {
        let asked: wire::WriteIn = request.args().take()?;
        if asked.size as usize != request.data().len() || asked.size > MAX_TRANSFER {
            return Err(Errno(libc::EINVAL));
        }
        let handle = self.handles.file(asked.fh, request.header.nodeid)?;
        let node = &handle.node;
        // Where others append too, only the host knows where the end is.
        let appends = asked.flags as c_int & libc::O_APPEND != 0
            && asked.write_flags & WRITE_CACHE == 0
            && !node.share.exclusive;
        let flags = if appends { RWF_APPEND } else { 0 };
        let _ordinary = WithoutFsetid::enter_if(asked.write_flags & WRITE_KILL_SUIDGID != 0)?;
        node.note_change();
        let file = handle.file(&self.links);
        let written = request.data().write_to(file.as_fd(), asked.offset, flags)?;
        Ok(Answer::of(&WriteOut {
            size: u32::try_from(written).unwrap_or(u32::MAX),
            padding: 0,
        }))
    }

    /// Sent for files opened for writing on shares that are not exclusive: see [`Share::open_flags`].
    ///
    /// [`Share::open_flags`]: super::share::Share::open_flags
    pub(super) fn flush(&self, request: &Request<'_>) -> Result<Answer, Errno> {
        let asked: wire::FlushIn = request.args().take()?;
        let handle = self.handles.file(asked.fh, request.header.nodeid)?;
        sys::flush(handle.file(&self.links).as_fd())?;
        Ok(Answer::Empty)
    }

    /// RELEASE and RELEASEDIR.
    pub(super) fn release(&self, request: &Request<'_>) -> Result<Answer, Errno> {
        let asked: wire::ReleaseIn = request.args().take()?;
        self.handles.remove(asked.fh);
        Ok(Answer::Empty)
    }

    pub(super) fn fsync(&self, request: &Request<'_>) -> Result<Answer, Errno> {
        let asked: wire::FsyncIn = request.args().take()?;
        let handle = self.handles.file(asked.fh, request.header.nodeid)?;
        let data_only = asked.fsync_flags & FSYNC_FDATASYNC != 0;
        sys::fsync(handle.file(&self.links).as_fd(), data_only)?;
        Ok(Answer::Empty)
    }

    pub(super) fn lseek(&self, request: &Request<'_>) -> Result<Answer, Errno> {
        let asked: wire::LseekIn = request.args().take()?;
        let handle = self.handles.file(asked.fh, request.header.nodeid)?;
        // The others are the guest's kernel's own; no handle's position is ever used here.
        let whence = match asked.whence as c_int {
            whence @ (libc::SEEK_DATA | libc::SEEK_HOLE) => whence,
            _ => return Err(Errno(libc::EINVAL)),
        };
        let offset = sys::lseek(handle.file(&self.links).as_fd(), asked.offset, whence)?;
        Ok(Answer::of(&wire::LseekOut { offset }))
    }

    pub(super) fn fallocate(&self, request: &Request<'_>) -> Result<Answer, Errno> {
        let asked: wire::FallocateIn = request.args().take()?;
        let handle = self.handles.file(asked.fh, request.header.nodeid)?;
        let wide = |value| libc::off_t::try_from(value).map_err(|_| Errno(libc::EFBIG));
        let (offset, length) = (wide(asked.offset)?, wide(asked.length)?);
        // The request does not say whether the caller has CAP_FSETID; root has, as a rule.
        let _ordinary = WithoutFsetid::enter_if(request.header.uid != 0)?;
        handle.node.note_change();
        let file = handle.file(&self.links);
        sys::fallocate(file.as_fd(), asked.mode as c_int, offset, length)?;
        Ok(Answer::Empty)
    }

    pub(super) fn copy_file_range(&self, request: &Request<'_>) -> Result<Answer, Errno> {
        let asked: wire::CopyFileRangeIn = request.args().take()?;
        let from = self.handles.file(asked.fh_in, request.header.nodeid)?;
        let to = self.handles.file(asked.fh_out, asked.nodeid_out)?;
        let wide = |value| libc::off64_t::try_from(value).map_err(|_| Errno(libc::EINVAL));
        let (from_at, to_at) = (wide(asked.off_in)?, wide(asked.off_out)?);
        let len = asked.len.min(MAX_COPY) as usize;
        // As in fallocate.
        let _ordinary = WithoutFsetid::enter_if(request.header.uid != 0)?;
        to.node.note_change();
        let (from, to) = (from.file(&self.links), to.file(&self.links));
        let copied = sys::copy_file_range(from.as_fd(), from_at, to.as_fd(), to_at, len)?;
        Ok(Answer::of(&WriteOut {
            size: u32::try_from(copied).unwrap_or(u32::MAX),
            padding: 0,
        }))
    }

    pub(super) fn syncfs(&self, request: &Request<'_>) -> Result<Answer, Errno> {
        let node = self.nodes.get(request.header.nodeid)?;
        self.sync_share(&node)?;
        Ok(Answer::Empty)
    }

    /// Syncs the file system that `node` is on, unless nothing was written to it: an
    /// unmount in the guest asks as well, and the host's file system is not only ours.
    pub(super) fn sync_share(&self, node: &Node) -> Result<(), Errno> {
        if !node.share.take_written(node.mount) {
            return Ok(());
        }
        let synced = match node.is_dir() {
            true => sys::openat(node.place(), c".", libc::O_RDONLY | libc::O_DIRECTORY, 0),
            false => self.open_file(node, libc::O_RDONLY),
        }
        .and_then(|file| sys::syncfs(file.as_fd()));
        synced.inspect_err(|_| node.note_change())
    }
}
