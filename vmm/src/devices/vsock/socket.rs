//! The host's end of a connection: a stream socket, read and written straight from and to guest
//! memory, never waiting.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use crate::memory::VolatileSlice;

/// The most buffers one call takes; what is left over is for the next call.
const IOVECS_MAX: usize = 64;
/// Bytes thrown away per read, and reads, when a socket is closed.
const DISCARD: usize = 16 << 10;
const DISCARD_READS: usize = 64;

/// A connected stream socket. Dropping it ends the connection, whoever else has the socket.
pub(super) struct HostSocket {
    fd: OwnedFd,
    /// Others go on with the socket: only this descriptor is closed.
    left: bool,
}

/// What came of reading or writing a socket.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Transfer {
    /// This many bytes, at least 1.
    Bytes(usize),
    /// Nothing now: the socket will become ready.
    NotNow,
    /// Nothing any more: end of file for a read, no reader for a write, or an error.
    Over,
}

impl HostSocket {
    pub(super) fn new(fd: OwnedFd) -> Self {
        Self { fd, left: false }
    }

    /// Closes this descriptor and does nothing to the connection.
    pub(super) fn leave(mut self) {
        self.left = true;
    }

    /// Fills `target` with what the host has sent.
    pub(super) fn receive(&self, target: &[VolatileSlice<'_>]) -> Transfer {
        self.transfer(target, |fd, message| {
            // SAFETY: the message's iovecs point at guest memory, which stays mapped for the call;
            // the guest may write there too, and nothing is assumed about the contents.
            unsafe { libc::recvmsg(fd, message, libc::MSG_DONTWAIT) }
        })
    }

    /// Sends `source` to the host.
    pub(super) fn send(&self, source: &[VolatileSlice<'_>]) -> Transfer {
        self.transfer(source, |fd, message| {
            // SAFETY: as for `receive`.
            unsafe { libc::sendmsg(fd, message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) }
        })
    }

    /// Sends bytes of the VMM's own.
    pub(super) fn send_bytes(&self, bytes: &[u8]) -> Transfer {
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: pointer and length are those of `bytes`.
        let sent = unsafe {
            libc::send(
                self.fd.as_raw_fd(),
                bytes.as_ptr().cast(),
                bytes.len(),
                flags,
            )
        };
        outcome(sent)
    }

    /// What receiving would come to, without receiving.
    pub(super) fn peek(&self) -> Transfer {
        let mut byte = 0u8;
        let flags = libc::MSG_DONTWAIT | libc::MSG_PEEK;
        // SAFETY: room for the one byte asked for.
        let peeked = unsafe { libc::recv(self.fd.as_raw_fd(), (&raw mut byte).cast(), 1, flags) };
        outcome(peeked)
    }

    fn transfer(
        &self,
        slices: &[VolatileSlice<'_>],
        call: impl Fn(libc::c_int, *mut libc::msghdr) -> isize,
    ) -> Transfer {
        let guards: Vec<_> = slices
            .iter()
            .take(IOVECS_MAX)
            .map(|slice| slice.ptr_guard_mut())
            .collect();
        let mut iovecs: Vec<libc::iovec> = guards
            .iter()
            .map(|guard| libc::iovec {
                iov_base: guard.as_ptr().cast(),
                iov_len: guard.len(),
            })
            .collect();
        // SAFETY: all-zero is a valid message without address, buffers and control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = iovecs.as_mut_ptr();
        message.msg_iovlen = iovecs.len();
        outcome(call(self.fd.as_raw_fd(), &mut message))
    }

    /// The guest takes no more: writers on the host get EPIPE.
    pub(super) fn stop_reading(&self) {
        self.shutdown(libc::SHUT_RD);
    }

    /// The guest sends no more: readers on the host get end of file behind what was sent.
    pub(super) fn stop_writing(&self) {
        self.shutdown(libc::SHUT_WR);
    }

    fn shutdown(&self, how: libc::c_int) {
        // SAFETY: no pointers. An error says that the other end is gone, which shows elsewhere.
        unsafe { libc::shutdown(self.fd.as_raw_fd(), how) };
    }
}

impl AsRawFd for HostSocket {
    fn as_raw_fd(&self) -> libc::c_int {
        self.fd.as_raw_fd()
    }
}

impl Drop for HostSocket {
    /// A Unix socket closed with unread data gives its peer ECONNRESET instead of end of file, so
    /// what the guest never took is taken here. Nothing can follow it after the shutdown.
    fn drop(&mut self) {
        if self.left {
            return;
        }
        self.shutdown(libc::SHUT_RDWR);
        let mut scratch = [0u8; DISCARD];
        for _ in 0..DISCARD_READS {
            let flags = libc::MSG_DONTWAIT;
            // SAFETY: pointer and length are those of `scratch`.
            let got = unsafe {
                libc::recv(
                    self.fd.as_raw_fd(),
                    scratch.as_mut_ptr().cast(),
                    scratch.len(),
                    flags,
                )
            };
            if got <= 0 {
                break;
            }
        }
    }
}

fn outcome(result: isize) -> Transfer {
    match usize::try_from(result) {
        Ok(0) => Transfer::Over,
        Ok(bytes) => Transfer::Bytes(bytes),
        Err(_) => match io::Error::last_os_error().kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Transfer::NotNow,
            _ => Transfer::Over,
        },
    }
}
