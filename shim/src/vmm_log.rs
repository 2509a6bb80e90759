//! What husk-vmm writes to its stderr, carried into the shim's log: bounded in lines and rate, since
//! a guest may be able to make it talk. Keeps the last line, which explains a death.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tokio::io::Interest;

use crate::{ready, untrusted};

/// Bytes of one line; the rest of it is dropped.
const LINE: usize = 512;
/// Lines per [`WINDOW`].
const LINES: u32 = 100;
const WINDOW: Duration = Duration::from_secs(10);

/// The VMM's log so far.
#[derive(Debug)]
pub struct VmmLog {
    partial: Vec<u8>,
    last: String,
    window: Instant,
    lines: u32,
    dropped: u32,
}

fn read(pipe: &OwnedFd, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the buffer has that many bytes.
    let count = unsafe { libc::read(pipe.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

impl VmmLog {
    /// Reads `stderr` in a task until the VMM closes it.
    pub fn drain(stderr: OwnedFd) -> io::Result<Arc<Mutex<Self>>> {
        // SAFETY: F_SETFL takes a number; the other status flags of a new pipe are clear.
        if unsafe { libc::fcntl(stderr.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let pipe = ready::watch(stderr, Interest::READABLE)?;
        let log = Arc::new(Mutex::new(Self::new()));
        let sink = log.clone();
        tokio::spawn(async move {
            let mut buffer = [0; 1024];
            while let Ok(mut ready) = pipe.readable().await {
                match ready.try_io(|pipe| read(pipe.get_ref(), &mut buffer)) {
                    Ok(Ok(0) | Err(_)) => break,
                    Ok(Ok(count)) => sink
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .take(buffer.get(..count).unwrap_or_default()),
                    Err(_not_ready) => {}
                }
            }
            sink.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .end_line();
        });
        Ok(log)
    }

    fn new() -> Self {
        Self {
            partial: Vec::new(),
            last: String::new(),
            window: Instant::now(),
            lines: 0,
            dropped: 0,
        }
    }

    /// The last whole line; empty if there was none.
    pub fn last_line(&self) -> &str {
        &self.last
    }

    fn take(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if byte == b'\n' {
                self.end_line();
            } else if self.partial.len() < LINE {
                self.partial.push(byte);
            }
        }
    }

    fn end_line(&mut self) {
        let line = untrusted::message(&String::from_utf8_lossy(&self.partial));
        self.partial.clear();
        if line.is_empty() {
            return;
        }
        if self.window.elapsed() > WINDOW {
            if self.dropped > 0 {
                log::warn!("husk-vmm: {} lines dropped", self.dropped);
            }
            (self.window, self.lines, self.dropped) = (Instant::now(), 0, 0);
        }
        if self.lines < LINES {
            self.lines += 1;
            log::info!("husk-vmm: {line}");
        } else {
            self.dropped = self.dropped.saturating_add(1);
        }
        self.last = line;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_bounded_in_length_and_number() {
        let mut log = VmmLog::new();
        log.take(b"first\nsecond");
        assert_eq!(log.last_line(), "first");
        log.take(&[b'x'; 10 * LINE]);
        log.take(b"\n");
        assert_eq!(log.last_line().len(), LINE);
        for _ in 0..3 * LINES {
            log.take(b"again\n");
        }
        assert_eq!((log.lines, log.last_line()), (LINES, "again"));
        assert_eq!(log.dropped, 2 * LINES + 2);
    }
}
