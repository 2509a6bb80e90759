//! Directories: reading them, plainly and with a lookup of each entry.
//!
//! An entry's offset is the host's own (getdents64), which the host's file systems keep right while
//! entries come and go. Entries read ahead of what fits a reply are kept for the next one, as the C
//! library keeps them for readdir(3).

use std::ffi::CStr;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, PoisonError};

use super::handle::{DirHandle, Handle};
use super::limits::{Budget, Permit};
use super::message::{Answer, Reply, Request};
use super::server::FileServer;
use super::sys::{self, Errno};
use super::wire::{self, Dirent, EntryOut, FSYNC_FDATASYNC, OpenOut};

/// Bytes of entries asked of the host at once.
const READ_AHEAD: usize = 32 << 10;
/// Open directories that keep what was read ahead; the others read it again. A guest may have as many
/// directories open as its budget has descriptors, and would fill gigabytes of this process with them.
pub(super) const KEPT_AHEAD: usize = 256;
/// The largest reply.
const MAX_LISTING: usize = 1 << 20;

impl FileServer {
    pub(super) fn opendir(&self, request: &Request<'_>) -> Result<Answer, Errno> {
        let node = self.nodes.get(request.header.nodeid)?;
        if !node.is_dir() {
            return Err(Errno(libc::ENOTDIR));
        }
        let permit = self.budget.take()?;
        let dir = sys::openat(node.place(), c".", libc::O_RDONLY | libc::O_DIRECTORY, 0)?;
        let open_flags = node.share.opendir_flags();
        let fh = self
            .handles
            .add(Handle::Dir(Arc::new(DirHandle::new(node, dir, permit))))?;
        Ok(Answer::of(&OpenOut {
            fh,
            open_flags,
            backing_id: 0,
        }))
    }

    /// READDIR, and with `plus` READDIRPLUS.
    pub(super) fn readdir(
        &self,
        request: &Request<'_>,
        reply: &Reply<'_>,
        plus: bool,
    ) -> Result<Answer, Errno> {
        let asked: wire::ReadIn = request.args().take()?;
        let handle = self.handles.dir(asked.fh, request.header.nodeid)?;
        let mut out = Listing::new(asked.size, reply, plus)?;
        let mut stream = handle.stream.lock().unwrap_or_else(PoisonError::into_inner);
        let listed = self.fill(&mut out, &handle, &mut stream, asked.offset);
        stream.rest(&self.read_ahead);
        listed.map(|()| out.answer())
    }

    /// Puts into `out` what fits of the entries from `offset` on.
    fn fill(
        &self,
        out: &mut Listing,
        handle: &DirHandle,
        stream: &mut DirStream,
        offset: u64,
    ) -> Result<(), Errno> {
        stream.seek(handle.dir(), offset)?;
        loop {
            let entry = match stream.peek(handle.dir()) {
                Ok(Some(entry)) => entry,
                Ok(None) => break,
                Err(error) if out.is_empty() => return Err(error),
                Err(_) => break,
            };
            // Before the lookup: an entry the guest is not told of must not be counted as told.
            if !out.fits(entry.name.count_bytes()) {
                break;
            }
            let (mut ino, mut told) = (entry.ino, EntryOut::default());
            let dots = matches!(entry.name.to_bytes(), b"." | b"..");
            if out.plus && !dots && self.budget.is_ample() {
                match self.enter(&handle.node, entry.name) {
                    Ok((node, stat)) => {
                        ino = stat.stx_ino;
                        told = self.entry(&node, &stat);
                    }
                    // Removed since it was read.
                    Err(Errno(libc::ENOENT)) => {
                        stream.advance();
                        continue;
                    }
                    // Listed without its attributes; the guest asks again when it needs them.
                    Err(_) => {}
                }
            }
            out.push(entry.name.to_bytes(), ino, entry.off, entry.kind, told);
            stream.advance();
        }
        Ok(())
    }

    pub(super) fn fsyncdir(&self, request: &Request<'_>) -> Result<Answer, Errno> {
        let asked: wire::FsyncIn = request.args().take()?;
        let handle = self.handles.dir(asked.fh, request.header.nodeid)?;
        sys::fsync(handle.dir(), asked.fsync_flags & FSYNC_FDATASYNC != 0)?;
        Ok(Answer::Empty)
    }
}

/// The entries of a reply.
pub(super) struct Listing {
    bytes: Vec<u8>,
    size: usize,
    plus: bool,
}

impl Listing {
    /// `size`: bytes the guest has asked for.
    pub(super) fn new(size: u32, reply: &Reply<'_>, plus: bool) -> Result<Listing, Errno> {
        let size = size as usize;
        if size > reply.room() {
            return Err(Errno(libc::EINVAL));
        }
        Ok(Listing {
            bytes: Vec::new(),
            size: size.min(MAX_LISTING),
            plus,
        })
    }

    fn record(&self, name: usize) -> usize {
        let head = size_of::<Dirent>() + if self.plus { size_of::<EntryOut>() } else { 0 };
        (head + name).next_multiple_of(8)
    }

    /// True when an entry with a name of that many bytes still fits.
    fn fits(&self, name: usize) -> bool {
        self.bytes.len() + self.record(name) <= self.size
    }

    fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Adds an entry; false when it does not fit. `off`: where the entry after it is.
    pub(super) fn push(
        &mut self,
        name: &[u8],
        ino: u64,
        off: u64,
        kind: u32,
        entry: EntryOut,
    ) -> bool {
        if !self.fits(name.len()) {
            return false;
        }
        let end = self.bytes.len() + self.record(name.len());
        if self.plus {
            self.bytes.extend_from_slice(wire::as_bytes(&entry));
        }
        let namelen = u32::try_from(name.len()).unwrap_or(u32::MAX);
        self.bytes.extend_from_slice(wire::as_bytes(&Dirent {
            ino,
            off,
            namelen,
            kind,
        }));
        self.bytes.extend_from_slice(name);
        self.bytes.resize(end, 0);
        true
    }

    pub(super) fn answer(self) -> Answer {
        Answer::Bytes(self.bytes)
    }
}

/// One entry of struct linux_dirent64.
struct HostEntry<'a> {
    ino: u64,
    off: u64,
    kind: u32,
    name: &'a CStr,
}

/// Where an open directory is: entries read from the host and not yet told.
pub(super) struct DirStream {
    buffer: Vec<u8>,
    at: usize,
    /// Of the entry at `at`: its length, and the offset after it.
    current: (usize, u64),
    /// The offset the guest will ask for when it goes on from here; `None` when the host's directory
    /// is elsewhere.
    offset: Option<u64>,
    /// For `buffer` to be kept from one request to the next: one of [`KEPT_AHEAD`].
    kept: Option<Permit>,
}

impl Default for DirStream {
    fn default() -> DirStream {
        DirStream {
            buffer: Vec::new(),
            at: 0,
            current: (0, 0),
            offset: Some(0),
            kept: None,
        }
    }
}

impl DirStream {
    fn seek(&mut self, dir: BorrowedFd<'_>, offset: u64) -> Result<(), Errno> {
        if self.offset != Some(offset) {
            sys::lseek(dir, offset, libc::SEEK_SET)?;
            self.buffer.clear();
            self.at = 0;
            self.offset = Some(offset);
        }
        Ok(())
    }

    /// The next entry; `None` at the end.
    fn peek(&mut self, dir: BorrowedFd<'_>) -> Result<Option<HostEntry<'_>>, Errno> {
        if self.at >= self.buffer.len() {
            self.at = 0;
            self.buffer.resize(READ_AHEAD, 0);
            let len = sys::getdents(dir, &mut self.buffer).inspect_err(|_| self.buffer.clear())?;
            self.buffer.truncate(len);
            if len == 0 {
                self.buffer = Vec::new();
                return Ok(None);
            }
        }
        let rest = self.buffer.get(self.at..).unwrap_or_default();
        let (entry, len) = parse(rest).ok_or(Errno(libc::EIO))?;
        self.current = (len, entry.off);
        Ok(Some(entry))
    }

    fn advance(&mut self) {
        let (len, off) = self.current;
        self.at += len;
        self.offset = Some(off);
    }

    /// A request is over: keeps what was read ahead where one of `spare` is left, or lets go of it.
    fn rest(&mut self, spare: &Arc<Budget>) {
        if self.at < self.buffer.len() {
            self.kept = self.kept.take().or_else(|| spare.take().ok());
            if self.kept.is_some() {
                return;
            }
            // What is let go of must be read again.
            self.offset = None;
        }
        self.buffer = Vec::new();
        self.at = 0;
        self.kept = None;
    }

    /// Bytes of memory it has.
    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        self.buffer.capacity()
    }
}

/// The first entry of `bytes` and its length.
fn parse(bytes: &[u8]) -> Option<(HostEntry<'_>, usize)> {
    // struct linux_dirent64: u64 ino, i64 off, u16 reclen, u8 type, then the name.
    let ino = u64::from_ne_bytes(bytes.get(..8)?.try_into().ok()?);
    let off = u64::from_ne_bytes(bytes.get(8..16)?.try_into().ok()?);
    let len = usize::from(u16::from_ne_bytes(bytes.get(16..18)?.try_into().ok()?));
    let kind = u32::from(*bytes.get(18)?);
    let name = CStr::from_bytes_until_nul(bytes.get(19..len)?).ok()?;
    Some((
        HostEntry {
            ino,
            off,
            kind,
            name,
        },
        len,
    ))
}
