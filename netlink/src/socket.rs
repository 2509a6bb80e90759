//! A rtnetlink socket: one request after the other, each answered by the kernel before the call returns.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    time::Duration,
};

use thiserror::Error;

use crate::message::{self, Attributes, HEADER, Request};

/// For the kernel to answer: it does so at once, but for whoever holds its lock.
const LIMIT: Duration = Duration::from_secs(10);
/// More than any message of the kernel's has (`NLMSG_GOODSIZE`, and what it gives who reads with so much room).
pub(crate) const ROOM: usize = 64 << 10;
/// A list that changes while it is read is read again so many times.
const ATTEMPTS: usize = 8;

/// Why the kernel refuses a request.
#[derive(Debug, Error)]
#[error("{cause}{}{said}", if .said.is_empty() { "" } else { ": " })]
pub struct Refusal {
    pub cause: io::Error,
    /// Its own words, where it has any.
    pub said: String,
}

impl Refusal {
    pub fn is(&self, errno: i32) -> bool {
        self.cause.raw_os_error() == Some(errno)
    }
}

impl From<io::Error> for Refusal {
    fn from(cause: io::Error) -> Self {
        let said = String::new();
        Self { cause, said }
    }
}

/// A connection to the kernel's rtnetlink.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    sequence: u32,
}

impl Socket {
    /// In this thread's network namespace.
    pub fn open() -> io::Result<Self> {
        let fd = open(0)?;
        let limit = libc::timeval {
            tv_sec: LIMIT.as_secs() as libc::time_t,
            tv_usec: 0,
        };
        option(&fd, libc::SOL_SOCKET, libc::SO_RCVTIMEO, &limit)?;
        // Words with an errno; and lists of what was asked for alone.
        option(&fd, libc::SOL_NETLINK, libc::NETLINK_EXT_ACK, &1i32)?;
        option(&fd, libc::SOL_NETLINK, libc::NETLINK_GET_STRICT_CHK, &1i32)?;
        Ok(Self { fd, sequence: 0 })
    }

    /// Has the kernel do something.
    pub fn ask(&mut self, request: Request) -> Result<(), Refusal> {
        self.exchange(request, libc::NLM_F_ACK, &mut |_, _| {})
            .map(drop)
    }

    /// Has the kernel list something: kind (`RTM_NEW*`) and body of each message.
    pub fn list(&mut self, request: impl Fn() -> Request) -> Result<Vec<(u16, Vec<u8>)>, Refusal> {
        for _ in 0..ATTEMPTS {
            let mut found = Vec::new();
            let whole = self.exchange(request(), libc::NLM_F_DUMP, &mut |kind, body| {
                found.push((kind, body.to_vec()));
            })?;
            if whole {
                return Ok(found);
            }
        }
        Err(io::Error::other("the list changes faster than it is read").into())
    }

    /// Whether the answer is of one moment.
    fn exchange(
        &mut self,
        mut request: Request,
        flags: i32,
        each: &mut dyn FnMut(u16, &[u8]),
    ) -> Result<bool, Refusal> {
        self.sequence = self.sequence.wrapping_add(1);
        request.flag(flags);
        let bytes = request.finish(self.sequence);
        // SAFETY: the buffer outlives the call.
        let sent = unsafe {
            libc::send(
                self.fd.as_raw_fd(),
                bytes.as_ptr().cast(),
                bytes.len(),
                libc::MSG_NOSIGNAL,
            )
        };
        if sent < 0 {
            return Err(io::Error::last_os_error().into());
        }
        let mut room = vec![0; ROOM];
        let mut whole = true;
        loop {
            let length = receive(self.fd.as_fd(), &mut room).map_err(|e| match e.kind() {
                io::ErrorKind::WouldBlock => {
                    let message = format!("the kernel did not answer within {LIMIT:?}");
                    io::Error::new(io::ErrorKind::TimedOut, message)
                }
                _ => e,
            })?;
            let mut rest = room.get(..length).unwrap_or_default();
            while let Some((header, body, next)) = split(rest) {
                rest = next;
                if header.sequence != self.sequence {
                    continue;
                }
                whole &= i32::from(header.flags) & libc::NLM_F_DUMP_INTR == 0;
                match i32::from(header.kind) {
                    libc::NLMSG_ERROR | libc::NLMSG_DONE => {
                        return verdict(header, body).map(|()| whole);
                    }
                    _ => each(header.kind, body),
                }
            }
        }
    }
}

/// In this thread's network namespace; `flags` are `SOCK_*`.
pub(crate) fn open(flags: i32) -> io::Result<OwnedFd> {
    // SAFETY: socket(2) takes numbers only.
    let fd = check(unsafe {
        libc::socket(
            libc::AF_NETLINK,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC | flags,
            libc::NETLINK_ROUTE,
        )
    })?;
    // SAFETY: the kernel just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Gives it an address of the kernel's choice.
pub(crate) fn bind(fd: &OwnedFd) -> io::Result<()> {
    // SAFETY: sockaddr_nl is plain data, for which zeroes are a value.
    let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
    address.nl_family = libc::AF_NETLINK as libc::sa_family_t;
    // SAFETY: the address is as long as is said, and outlives the call.
    check(unsafe {
        libc::bind(
            fd.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_nl>() as libc::socklen_t,
        )
    })
    .map(drop)
}

pub(crate) fn option<T>(fd: &OwnedFd, level: i32, name: i32, value: &T) -> io::Result<()> {
    // SAFETY: the value is as long as is said, and outlives the call.
    check(unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            name,
            (&raw const *value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    })
    .map(drop)
}

/// The next datagram, of which nothing is cut off.
pub(crate) fn receive(fd: BorrowedFd<'_>, room: &mut [u8]) -> io::Result<usize> {
    loop {
        // SAFETY: the buffer is as long as is said.
        let got = unsafe {
            libc::recv(
                fd.as_raw_fd(),
                room.as_mut_ptr().cast(),
                room.len(),
                libc::MSG_TRUNC,
            )
        };
        match usize::try_from(got) {
            Ok(got) if got > room.len() => {
                return Err(io::Error::other("an answer beyond all measure"));
            }
            Ok(got) => return Ok(got),
            Err(_) => {}
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// `struct nlmsghdr`, as far as it counts.
#[derive(Clone, Copy)]
pub(crate) struct Header {
    pub(crate) kind: u16,
    flags: u16,
    sequence: u32,
}

/// The first message: its header, its body, and what comes behind it.
pub(crate) fn split(bytes: &[u8]) -> Option<(Header, &[u8], &[u8])> {
    let length = message::u32(bytes)? as usize;
    let header = Header {
        kind: message::u16(bytes.get(4..)?)?,
        flags: message::u16(bytes.get(6..)?)?,
        sequence: message::u32(bytes.get(8..)?)?,
    };
    let body = bytes.get(HEADER..length)?;
    let rest = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some((header, body, rest))
}

/// What an NLMSG_ERROR or NLMSG_DONE says: an errno, 0 for none, and perhaps words.
fn verdict(header: Header, body: &[u8]) -> Result<(), Refusal> {
    /// `NLM_F_CAPPED`: of the request there is only the header.
    const CAPPED: u16 = 0x100;
    const NLMSGERR_ATTR_MSG: u16 = 1;
    let errno = (message::u32(body).unwrap_or(0) as i32).wrapping_neg();
    if errno == 0 {
        return Ok(());
    }
    let rest = body.get(4..).unwrap_or_default();
    let words = match i32::from(header.kind) {
        libc::NLMSG_ERROR if header.flags & CAPPED == 0 => {
            let request = message::u32(rest).unwrap_or(0) as usize;
            rest.get(request.next_multiple_of(4)..)
        }
        libc::NLMSG_ERROR => rest.get(HEADER..),
        _ => Some(rest),
    };
    let words = Attributes(words.unwrap_or_default());
    let said = words
        .into_iter()
        .find(|(kind, _)| *kind == NLMSGERR_ATTR_MSG);
    Err(Refusal {
        cause: io::Error::from_raw_os_error(errno),
        said: said
            .map(|(_, words)| message::string(words))
            .unwrap_or_default(),
    })
}

fn check(result: i32) -> io::Result<i32> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        value => Ok(value),
    }
}
