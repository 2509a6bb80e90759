//! News of rtnetlink's: that something has changed. What there is now is for a list to say.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use crate::{
    message,
    socket::{self, Header},
};

/// `RTNLGRP_LINK`: interfaces.
pub const LINKS: u32 = 1;
/// `RTNLGRP_IPV4_IFADDR` and `RTNLGRP_IPV6_IFADDR`.
pub const ADDRESSES: [u32; 2] = [5, 9];
/// `RTNLGRP_IPV4_ROUTE` and `RTNLGRP_IPV6_ROUTE`.
pub const ROUTES: [u32; 2] = [7, 11];

/// What is heard of one network namespace. Never waits, but where that is asked for.
#[derive(Debug)]
pub struct News(OwnedFd);

impl News {
    /// Of these groups, `RTNLGRP_*`, in this thread's network namespace.
    pub fn of(groups: &[u32]) -> io::Result<Self> {
        let fd = socket::open(libc::SOCK_NONBLOCK)?;
        // What has no address of its own hears nothing from the kernel, whose address is 0.
        socket::bind(&fd)?;
        for group in groups {
            let group = *group as i32;
            let name = libc::NETLINK_ADD_MEMBERSHIP;
            socket::option(&fd, libc::SOL_NETLINK, name, &group)?;
        }
        Ok(Self(fd))
    }

    /// Waits until there may be some; not always that long, as a signal ends it.
    pub fn wait(&self, limit: Duration) -> io::Result<()> {
        let mut poll = libc::pollfd {
            fd: self.0.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let limit = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: `poll` is one pollfd.
        match unsafe { libc::poll(&raw mut poll, 1, limit) } {
            -1 => match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::Interrupted => Ok(()),
                e => Err(e),
            },
            _ => Ok(()),
        }
    }
}

/// Takes all that has come to a [`News`]. Whether any of it was about something else than these interfaces, by index.
pub fn take(from: impl AsFd, of_no_interest: &[u32]) -> io::Result<bool> {
    let mut room = vec![0; socket::ROOM];
    let mut news = false;
    loop {
        let length = match socket::receive(from.as_fd(), &mut room) {
            Ok(length) => length,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(news),
            // Some were lost, which is news too.
            Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => {
                news = true;
                continue;
            }
            Err(e) => return Err(e),
        };
        let mut rest = room.get(..length).unwrap_or_default();
        while let Some((header, body, next)) = socket::split(rest) {
            rest = next;
            let link = link(header, body);
            news |= !link.is_some_and(|link| of_no_interest.contains(&link));
        }
    }
}

impl AsFd for News {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<News> for OwnedFd {
    fn from(news: News) -> Self {
        news.0
    }
}

/// The interface that a message is about, where its fixed part says so.
fn link(header: Header, body: &[u8]) -> Option<u32> {
    match header.kind {
        libc::RTM_NEWLINK | libc::RTM_DELLINK | libc::RTM_NEWADDR | libc::RTM_DELADDR => {
            message::u32(body.get(4..)?)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::thread::JoinHandleExt, thread, time::Instant};

    use super::*;

    extern "C" fn nothing(_: libc::c_int) {}

    /// As process 1 gets one of each child that ends.
    #[test]
    fn a_signal_ends_a_wait_and_is_no_error() {
        let handler = nothing as extern "C" fn(libc::c_int);
        // SAFETY: the handler does nothing; no other test has this signal.
        unsafe { libc::signal(libc::SIGUSR1, handler as libc::sighandler_t) };
        let news = News::of(&[]).unwrap();
        let begun = Instant::now();
        let waits = thread::spawn(move || news.wait(Duration::from_secs(600)));
        while !waits.is_finished() {
            // SAFETY: the thread is not joined yet.
            unsafe { libc::pthread_kill(waits.as_pthread_t(), libc::SIGUSR1) };
            thread::yield_now();
        }
        waits.join().unwrap().unwrap();
        assert!(begun.elapsed() < Duration::from_secs(600));
    }
}
