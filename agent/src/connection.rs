//! The connections to the host: the contract on one that the agent dials, streams on those it accepts.
//!
//! Owned by `boot`'s main task. The contract's connection is dialled once and lives as long as the guest: the VMM
//! lets nobody dial a second time, and the shim ends the VM when it closes. A clone goes on with its template's.

use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::stream::{self, StreamExt};
use husk_proto::agent_ttrpc::create_agent;
use husk_proto::{AGENT_PORT, HOST_CID, STREAM_PORT};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::oneshot;
use tokio::time::sleep;
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};
use ttrpc::r#async::Server;
use ttrpc::r#async::transport::Listener;

use crate::service::Service;
use crate::streams::Arrivals;

/// Between two failures to accept, which mean that something is used up.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Listens for streams; to be called before [`dial`], whose peer may send some at once. They are the
/// host's: vsock asks nobody for a privilege, and a container that reached this port could name the
/// streams of others.
pub fn accept_streams(arrivals: Rc<Arrivals>) -> io::Result<impl Future<Output = ()>> {
    let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, STREAM_PORT))?;
    Ok(async move {
        loop {
            match listener.accept().await {
                Ok((stream, peer)) if peer.cid() == HOST_CID => {
                    arrivals.connection(OwnedFd::from(stream));
                }
                // Not a word for each: whoever does this does it in a loop.
                Ok((_, peer)) => log::debug!("a stream of {peer:?} is none of the host's: closed"),
                Err(error) => {
                    log::warn!("accept a stream: {error}");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    })
}

/// Dials the host, which waits for it.
pub async fn dial() -> io::Result<VsockStream> {
    VsockStream::connect(VsockAddr::new(HOST_CID, AGENT_PORT)).await
}

/// Serves the contract on one connection; says how it came to its end.
pub async fn serve<S>(socket: S, service: Arc<Service>) -> String
where
    S: AsyncRead + AsyncWrite + Send + Sync + Unpin + 'static,
{
    let (alive, closed) = oneshot::channel();
    let watched = Watched {
        socket,
        alive: Some(alive),
    };
    // One connection, and no end of the listener: ttrpc would take that for its own.
    let connections = stream::once(async { Ok(watched) }).chain(stream::pending());
    let mut server = Server::new()
        .register_service(create_agent(service))
        .add_listener(Listener::new(connections));
    if let Err(error) = server.start().await {
        return format!("serve the contract: {error}");
    }
    // Never sent to: what ends is the sender.
    closed.await.ok();
    "the host has hung up".into()
}

/// A socket that tells when it is closed from the other side, or dropped.
struct Watched<S> {
    socket: S,
    alive: Option<oneshot::Sender<()>>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.socket).poll_read(context, buffer);
        let ended = match &read {
            Poll::Ready(Ok(())) => buffer.filled().len() == before && buffer.remaining() > 0,
            Poll::Ready(Err(_)) => true,
            Poll::Pending => false,
        };
        if ended {
            self.alive = None;
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(context, bytes)
    }
    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(context)
    }
}
