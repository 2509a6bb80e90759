//! One descriptor that bytes flow through, without blocking: pipe end, terminal master or socket.
//!
//! The least that copying needs, over the descriptor itself, so that all three kinds are copied by
//! the same code. Owns the descriptor; closing is dropping.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::net::SendFlags;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::sys;

/// What one read moves at most; a pipe holds as much.
const BUFFER: usize = 64 << 10;

#[derive(Debug)]
pub struct Channel(AsyncFd<OwnedFd>);

impl Channel {
    /// Takes the descriptor and makes it non-blocking: that is a property of this end alone.
    pub fn new(descriptor: OwnedFd) -> io::Result<Self> {
        fcntl_setfl(&descriptor, fcntl_getfl(&descriptor)? | OFlags::NONBLOCK)?;
        Ok(Self(sys::watched(
            descriptor,
            Interest::READABLE | Interest::WRITABLE,
        )?))
    }

    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }

    /// Some bytes into `buffer`; 0 is the end. A terminal whose other side is closed ends too (EIO).
    pub async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut guard = self.0.readable().await?;
            match guard.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), &mut *buffer)?)) {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) if error.raw_os_error() == Some(libc::EIO) => return Ok(0),
                Ok(done) => return done,
                Err(_would_block) => {}
            }
        }
    }

    pub async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut guard = self.0.writable().await?;
            match guard.try_io(|fd| Ok(rustix::io::write(fd.get_ref(), bytes)?)) {
                Ok(Ok(count)) => bytes = bytes.get(count..).unwrap_or_default(),
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
                Err(_would_block) => {}
            }
        }
        Ok(())
    }

    /// Tells the other side of a socket that nothing more will come.
    pub fn shutdown_write(&self) -> io::Result<()> {
        Ok(rustix::net::shutdown(
            self.as_fd(),
            rustix::net::Shutdown::Write,
        )?)
    }

    /// Returns when nobody can read from the other end of a pipe any more.
    pub async fn broken(&self) -> io::Result<()> {
        loop {
            let mut guard = self.0.ready(Interest::ERROR).await?;
            if guard.ready().is_error() || guard.ready().is_write_closed() {
                return Ok(());
            }
            guard.clear_ready();
        }
    }

    /// Whether nobody can read from the other end of a socket any more. Asked by sending nothing: poll(2)
    /// tells of a vsock peer that is gone only once this end is shut down, too (vsock_poll in
    /// net/vmw_vsock/af_vsock.c).
    pub fn hung_up(&self) -> bool {
        rustix::net::send(self.as_fd(), &[], SendFlags::NOSIGNAL | SendFlags::DONTWAIT).is_err()
    }

    /// Copies to `to` until the end. Holds a buffer only while bytes flow: most streams of most
    /// containers are silent, and guest memory is what a pod costs.
    pub async fn copy_to(&self, to: &Channel) -> io::Result<()> {
        loop {
            let mut guard = self.0.readable().await?;
            let mut buffer = vec![0; BUFFER];
            loop {
                match guard.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), &mut buffer)?)) {
                    Ok(Ok(0)) => return Ok(()),
                    Ok(Ok(count)) => {
                        to.write_all(buffer.get(..count).unwrap_or_default())
                            .await?
                    }
                    Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                    Ok(Err(error)) if error.raw_os_error() == Some(libc::EIO) => return Ok(()),
                    Ok(Err(error)) => return Err(error),
                    Err(_would_block) => break,
                }
                // A fast stream must not keep the agent from everything else.
                tokio::task::coop::consume_budget().await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Shutdown;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    fn pipe() -> (Channel, Channel) {
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        (Channel::new(read).unwrap(), Channel::new(write).unwrap())
    }

    #[tokio::test]
    async fn a_copy_is_whole_and_ends() {
        let ((from, into), (out, to)) = (pipe(), pipe());
        let bytes: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
        let write = async {
            into.write_all(&bytes).await.unwrap();
            drop(into);
        };
        let copy = async {
            from.copy_to(&to).await.unwrap();
            drop(to);
        };
        let read = async {
            let (mut all, mut buffer) = (Vec::new(), [0; 10_000]);
            loop {
                match out.read(&mut buffer).await.unwrap() {
                    0 => break all,
                    count => all.extend_from_slice(&buffer[..count]),
                }
            }
        };
        let ((), (), all) = tokio::join!(write, copy, read);
        assert!(all == bytes);
    }

    #[tokio::test]
    async fn the_end_of_a_peers_writing_is_no_hang_up() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let ours = Channel::new(ours.into()).unwrap();
        assert!(!ours.hung_up());
        theirs.shutdown(Shutdown::Write).unwrap();
        assert!(!ours.hung_up());
        drop(theirs);
        assert!(ours.hung_up());
    }

    #[tokio::test]
    async fn a_pipe_without_readers_is_noticed_while_idle() {
        let (read, write) = pipe();
        assert!(
            timeout(Duration::from_millis(20), write.broken())
                .await
                .is_err()
        );
        drop(read);
        timeout(Duration::from_secs(2), write.broken())
            .await
            .unwrap()
            .unwrap();
    }
}
