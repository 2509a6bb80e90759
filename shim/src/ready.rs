//! Descriptors in the event loop: the one place where they are registered. It owns nothing.

use std::{io, os::fd::OwnedFd};

use tokio::io::{Interest, unix::AsyncFd};

/// Registers a descriptor, which must not block. To be called in a tokio runtime.
pub fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    try_watch(fd, interest).map_err(|(_, cause)| cause)
}

/// As [`watch`], for who needs the descriptor all the more when it cannot be registered.
pub fn try_watch(
    fd: OwnedFd,
    interest: Interest,
) -> Result<AsyncFd<OwnedFd>, (OwnedFd, io::Error)> {
    // SAFETY: an OwnedFd is open and stays the same descriptor for as long as the AsyncFd owns it.
    let registered = unsafe { AsyncFd::register_with_interest(fd, interest) };
    registered.map_err(|e| e.into_parts())
}
