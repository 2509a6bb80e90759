//! One FUSE request and its reply, as slices of guest memory.
//!
//! The guest may change that memory at any time, so every byte the server decides on is copied
//! once into memory of our own and checked there; only file data, which nobody looks at, goes
//! between the file and the slices directly. Nothing here trusts a length.

use std::ffi::CStr;
use std::os::fd::BorrowedFd;

use vm_memory::VolatileSlice;

use super::BadRequest;
use super::sys::{self, Errno};
use super::wire::{self, InHeader, OutHeader, Wire, WriteIn, opcode};

const IN_HEADER: usize = size_of::<InHeader>();
const OUT_HEADER: usize = size_of::<OutHeader>();
/// The longest request that is copied: an extended attribute of 64 KiB with its name, and to spare.
const MAX_COPIED: usize = 128 << 10;
/// The longest file name (NAME_MAX), in bytes.
const NAME_MAX: usize = 255;
/// The longest symbolic link and path (PATH_MAX without its NUL), in bytes.
const PATH_MAX: usize = 4095;
/// The most segments one vectored read or write takes (IOV_MAX).
const IOV_MAX: usize = 1024;

fn total(slices: &[VolatileSlice<'_>]) -> usize {
    slices
        .iter()
        .fold(0, |sum, slice| sum.saturating_add(slice.len()))
}

/// Calls `each` with the slices that make up `len` bytes from `skip` on.
fn pieces<'a>(
    slices: &[VolatileSlice<'a>],
    mut skip: usize,
    mut len: usize,
    mut each: impl FnMut(VolatileSlice<'a>),
) {
    for slice in slices {
        if len == 0 {
            return;
        }
        if skip >= slice.len() {
            skip -= slice.len();
            continue;
        }
        let count = (slice.len() - skip).min(len);
        if let Ok(piece) = slice.subslice(skip, count) {
            each(piece);
        }
        skip = 0;
        len -= count;
    }
}

/// A request: its header and arguments copied, its file data (WRITE only) still in the guest.
pub(super) struct Request<'a> {
    pub(super) header: InHeader,
    body: Vec<u8>,
    data: Span<'a>,
}

impl<'a> Request<'a> {
    /// Takes a request out of the device-readable part of a descriptor chain.
    pub(super) fn read(slices: &'a [VolatileSlice<'a>]) -> Result<Self, BadRequest> {
        let len = total(slices);
        let copy = |skip: usize, bytes: &mut [u8]| {
            let mut at = 0;
            pieces(slices, skip, bytes.len(), |piece| {
                if let Some(rest) = bytes.get_mut(at..) {
                    at += piece.copy_to(rest);
                }
            });
        };
        let mut head = [0; IN_HEADER];
        if len < IN_HEADER {
            return Err(BadRequest::Short(len));
        }
        copy(0, &mut head);
        let header: InHeader = wire::from_bytes(&head).unwrap_or_default();
        if header.len as usize != len {
            return Err(BadRequest::Length {
                said: header.len,
                got: len,
            });
        }
        let rest = len - IN_HEADER;
        let copied = match header.opcode {
            opcode::WRITE => rest.min(size_of::<WriteIn>()),
            _ => rest,
        };
        if copied > MAX_COPIED {
            return Err(BadRequest::Long {
                opcode: header.opcode,
                len,
            });
        }
        let mut body = vec![0; copied];
        copy(IN_HEADER, &mut body);
        let data = Span {
            slices,
            skip: IN_HEADER + copied,
            len: rest - copied,
        };
        Ok(Request { header, body, data })
    }

    /// The arguments, from their start.
    pub(super) fn args(&self) -> Args<'_> {
        Args(&self.body)
    }

    /// The file data of a WRITE.
    pub(super) fn data(&self) -> &Span<'a> {
        &self.data
    }
}

/// A cursor over the copied arguments; what is missing or malformed is EINVAL.
pub(super) struct Args<'a>(&'a [u8]);

impl<'a> Args<'a> {
    pub(super) fn take<T: Wire>(&mut self) -> Result<T, Errno> {
        let value = wire::from_bytes(self.0).ok_or(Errno(libc::EINVAL))?;
        self.0 = self.0.get(size_of::<T>()..).unwrap_or_default();
        Ok(value)
    }

    /// The next `len` bytes.
    pub(super) fn bytes(&mut self, len: usize) -> Result<&'a [u8], Errno> {
        let (bytes, rest) = self.0.split_at_checked(len).ok_or(Errno(libc::EINVAL))?;
        self.0 = rest;
        Ok(bytes)
    }

    fn string(&mut self, max: usize) -> Result<&'a CStr, Errno> {
        let text = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno(libc::EINVAL))?;
        if text.count_bytes() > max {
            return Err(Errno(libc::ENAMETOOLONG));
        }
        self.0 = self.0.get(text.count_bytes() + 1..).unwrap_or_default();
        Ok(text)
    }

    /// A name in a directory: one component, never "." or "..". This is the only way a name of the
    /// guest's gets to the host, so that no path walk below can leave its directory.
    pub(super) fn name(&mut self) -> Result<&'a CStr, Errno> {
        let name = self.string(NAME_MAX)?;
        match name.to_bytes() {
            b"" | b"." | b".." => Err(Errno(libc::EINVAL)),
            bytes if bytes.contains(&b'/') => Err(Errno(libc::EINVAL)),
            _ => Ok(name),
        }
    }

    /// The name of an extended attribute.
    pub(super) fn xattr(&mut self) -> Result<&'a CStr, Errno> {
        self.string(NAME_MAX).map_err(|error| match error {
            Errno(libc::ENAMETOOLONG) => Errno(libc::ERANGE),
            other => other,
        })
    }

    /// The text of a symbolic link: opaque to the server, which never follows one.
    pub(super) fn link_text(&mut self) -> Result<&'a CStr, Errno> {
        self.string(PATH_MAX)
    }
}

/// What an operation answers.
pub(super) enum Answer {
    /// The header alone.
    Empty,
    /// The header and these bytes.
    Bytes(Vec<u8>),
    /// The header; the operation has put this many bytes behind it.
    InPlace(usize),
}

impl Answer {
    pub(super) fn of<T: Wire>(value: &T) -> Answer {
        Answer::Bytes(wire::as_bytes(value).to_vec())
    }
}

/// The room for a reply: the device-writable part of a descriptor chain.
pub(super) struct Reply<'a> {
    slices: &'a [VolatileSlice<'a>],
    room: usize,
}

impl<'a> Reply<'a> {
    /// `None` when there is no room for the header.
    pub(super) fn new(slices: &'a [VolatileSlice<'a>]) -> Option<Self> {
        let room = total(slices).checked_sub(OUT_HEADER)?;
        Some(Reply { slices, room })
    }

    /// Bytes that fit behind the header.
    pub(super) fn room(&self) -> usize {
        self.room
    }

    /// `len` bytes behind the header, to be filled in place.
    pub(super) fn data(&self, len: usize) -> Result<Span<'a>, Errno> {
        if len > self.room {
            return Err(Errno(libc::EINVAL));
        }
        Ok(Span {
            slices: self.slices,
            skip: OUT_HEADER,
            len,
        })
    }

    /// Writes header and answer; returns the length of the whole reply.
    pub(super) fn finish(self, unique: u64, answer: Result<Answer, Errno>) -> usize {
        let (error, bytes, len) = match answer {
            Ok(Answer::Empty) => (0, Vec::new(), 0),
            Ok(Answer::Bytes(bytes)) if bytes.len() <= self.room => {
                let len = bytes.len();
                (0, bytes, len)
            }
            Ok(Answer::InPlace(len)) if len <= self.room => (0, Vec::new(), len),
            Ok(_) => (libc::EIO, Vec::new(), 0),
            Err(Errno(error)) => (error, Vec::new(), 0),
        };
        let len = OUT_HEADER + len;
        let header = OutHeader {
            len: u32::try_from(len).unwrap_or(u32::MAX),
            error: -error,
            unique,
        };
        self.put(0, wire::as_bytes(&header));
        self.put(OUT_HEADER, &bytes);
        len
    }

    fn put(&self, skip: usize, bytes: &[u8]) {
        let mut rest = bytes;
        pieces(self.slices, skip, bytes.len(), |piece| {
            let (now, later) = rest.split_at(piece.len().min(rest.len()));
            piece.copy_from(now);
            rest = later;
        });
    }
}

/// Guest memory that file data is read into or written from, without a copy in between.
pub(super) struct Span<'a> {
    slices: &'a [VolatileSlice<'a>],
    skip: usize,
    len: usize,
}

impl Span<'_> {
    /// Bytes in the span.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Fills the span from `file` at `offset`; short only at the end of the file, because FUSE
    /// takes a short read for it.
    pub(super) fn read_from(&self, file: BorrowedFd<'_>, offset: u64) -> Result<usize, Errno> {
        match self.transfer(offset, |iovecs, at| sys::preadv(file, iovecs, at)) {
            (done, None) => Ok(done),
            (_, Some(error)) => Err(error),
        }
    }

    /// Writes the span to `file` at `offset`, with RWF_ `flags`; returns the bytes written, an
    /// error only when none was.
    pub(super) fn write_to(
        &self,
        file: BorrowedFd<'_>,
        offset: u64,
        flags: libc::c_int,
    ) -> Result<usize, Errno> {
        match self.transfer(offset, |iovecs, at| sys::pwritev2(file, iovecs, at, flags)) {
            (0, Some(error)) => Err(error),
            (done, _) => Ok(done),
        }
    }

    /// Repeats `step` until the span is done, nothing more comes, or an error.
    fn transfer(
        &self,
        offset: u64,
        mut step: impl FnMut(&[libc::iovec], libc::off_t) -> Result<usize, Errno>,
    ) -> (usize, Option<Errno>) {
        let mut done = 0;
        while done < self.len {
            let at = offset.checked_add(done as u64).map(libc::off_t::try_from);
            let Some(Ok(at)) = at else {
                return (done, Some(Errno(libc::EINVAL)));
            };
            let mut guards = Vec::new();
            let mut iovecs: Vec<libc::iovec> = Vec::new();
            let mut full = false;
            pieces(self.slices, self.skip + done, self.len - done, |piece| {
                if full {
                    return;
                }
                let guard = piece.ptr_guard_mut();
                let base = guard.as_ptr();
                let segments = iovecs.len();
                match iovecs.last_mut() {
                    // Neighbours in guest memory: one segment.
                    Some(last) if last.iov_base.wrapping_byte_add(last.iov_len) == base.cast() => {
                        last.iov_len += piece.len();
                    }
                    _ if segments == IOV_MAX => {
                        full = true;
                        return;
                    }
                    _ => iovecs.push(libc::iovec {
                        iov_base: base.cast(),
                        iov_len: piece.len(),
                    }),
                }
                guards.push(guard);
            });
            match step(&iovecs, at) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) => return (done, Some(error)),
            }
        }
        (done, None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A request and the room for its reply, each cut at every two places.
    #[test]
    fn slices_mean_what_they_mean_together() {
        let header = InHeader {
            len: 60,
            opcode: opcode::WRITE + 1000,
            unique: 9,
            ..Default::default()
        };
        let body: Vec<u8> = (0..20).collect();
        let whole = [wire::as_bytes(&header), &body].concat();
        for first in 0..=whole.len() {
            for second in first..=whole.len() {
                let mut bytes = whole.clone();
                let (one, rest) = bytes.split_at_mut(first);
                let (two, three) = rest.split_at_mut(second - first);
                let slices = [one, two, three].map(VolatileSlice::from);
                let request = Request::read(&slices).unwrap();
                assert_eq!((request.header.unique, &request.body), (9, &body));
                assert!(Request::read(&slices[..2]).is_err() || second == whole.len());
            }
        }
        let answer: Vec<u8> = (0..30).collect();
        for first in 0..=50 {
            for room in first..=50 {
                let mut bytes = vec![0xa5; room];
                let (one, two) = bytes.split_at_mut(first);
                let slices = [one, two].map(VolatileSlice::from);
                let Some(reply) = Reply::new(&slices) else {
                    assert!(room < OUT_HEADER);
                    continue;
                };
                let length = reply.finish(9, Ok(Answer::Bytes(answer.clone())));
                let fits = room >= OUT_HEADER + answer.len();
                assert_eq!(length, OUT_HEADER + if fits { answer.len() } else { 0 });
                assert!(bytes[length..].iter().all(|byte| *byte == 0xa5));
                assert!(!fits || bytes[OUT_HEADER..length] == answer[..]);
            }
        }
    }
}
