//! Descriptors in the event loop: the one place where they are registered. It owns nothing.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

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

/// Waits for bytes, and reads some. 0 is the end of file.
pub async fn read(from: &AsyncFd<OwnedFd>, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        let mut ready = from.readable().await?;
        let attempt = ready.try_io(|from| {
            // SAFETY: the buffer has that many bytes.
            let count =
                unsafe { libc::read(from.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
            usize::try_from(count).map_err(|_| io::Error::last_os_error())
        });
        if let Ok(outcome) = attempt {
            return outcome;
        }
    }
}
