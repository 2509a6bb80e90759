//! The machine service's one connection: accepted before the process began, and the process's whole purpose. Owned by
//! `service`, which ends with it.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures_core::Stream;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::UnixStream,
    sync::Notify,
};

/// The one connection, which tells when the client has closed it: when there is nothing more to be read,
/// when an answer cannot be given any more, and when the server lets go of it for whatever reason.
pub(crate) struct Connection {
    stream: UnixStream,
    closed: Arc<Notify>,
}

impl Connection {
    /// Notifies `closed`.
    pub(crate) fn new(stream: UnixStream, closed: Arc<Notify>) -> Self {
        Self { stream, closed }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.closed.notify_one();
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let result = Pin::new(&mut self.stream).poll_read(cx, buffer);
        let over = match &result {
            Poll::Ready(Ok(())) => buffer.filled().len() == before && buffer.remaining() > 0,
            Poll::Ready(Err(_)) => true,
            Poll::Pending => false,
        };
        if over {
            self.closed.notify_one();
        }
        result
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write(cx, bytes);
        // The server reads no more after that, and first waits for the requests that are under way.
        if matches!(result, Poll::Ready(Err(_))) {
            self.closed.notify_one();
        }
        result
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// A listener that has accepted its one connection already, and waits for ever for another.
pub(crate) struct Once<T>(Option<T>);

impl<T> Once<T> {
    pub(crate) fn new(connection: T) -> Self {
        Self(Some(connection))
    }
}

impl<T: Unpin> Stream for Once<T> {
    type Item = io::Result<T>;

    fn poll_next(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match self.0.take() {
            Some(connection) => Poll::Ready(Some(Ok(connection))),
            None => Poll::Pending,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixStream as StdUnixStream, time::Duration};

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        runtime::Builder,
        time::timeout,
    };

    use super::*;

    /// The VMM must not outlive its client, however it notices.
    #[test]
    fn the_end_of_the_connection_shows_in_every_way() {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            for way in ["read", "write", "drop"] {
                let (client, machine) = StdUnixStream::pair().unwrap();
                machine.set_nonblocking(true).unwrap();
                let closed = Arc::<Notify>::default();
                let stream = UnixStream::from_std(machine).unwrap();
                let mut connection = Connection::new(stream, Arc::clone(&closed));
                let notified = || timeout(Duration::from_millis(20), closed.notified());
                connection.write_all(b"answer").await.unwrap();
                assert!(notified().await.is_err(), "{way}");
                drop(client);
                match way {
                    "read" => drop(connection.read(&mut [0; 8]).await),
                    "write" => assert!(connection.write_all(b"answer").await.is_err()),
                    _ => drop(connection),
                }
                assert!(notified().await.is_ok(), "{way}");
            }
        });
    }
}
