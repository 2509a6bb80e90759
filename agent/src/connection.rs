//! The connections to the host: the contract on one that the agent dials, streams on those it accepts.
//!
//! Owned by `boot`'s main task. A lost contract connection is dialled again for ever; what runs is
//! not touched by it.

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
use tokio::time::{sleep, timeout};
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};
use ttrpc::r#async::Server;
use ttrpc::r#async::transport::Listener;

use crate::service::Service;
use crate::streams::Arrivals;

/// Between two attempts to dial; the host may be busy restoring a clone.
const REDIAL: Duration = Duration::from_millis(10);
/// How long the shim may take to hang up after its answer to Shutdown. It should do so at once.
const GOODBYE: Duration = Duration::from_millis(100);
/// Between two failures to accept, which mean that something is used up.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How a connection came to its end.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    Lost,
    /// The guest is to be powered off.
    ShutDown,
}

/// Listens for streams; to be called before [`dial`], whose peer may send some at once.
pub fn accept_streams(arrivals: Rc<Arrivals>) -> io::Result<impl Future<Output = ()>> {
    let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, STREAM_PORT))?;
    Ok(async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => arrivals.connection(OwnedFd::from(stream)),
                Err(error) => {
                    log::warn!("accept a stream: {error}");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    })
}

/// Dials the host until it answers.
pub async fn dial() -> VsockStream {
    let mut told = false;
    loop {
        match VsockStream::connect(VsockAddr::new(HOST_CID, AGENT_PORT)).await {
            Ok(stream) => return stream,
            Err(error) if told => log::debug!("dial the host: {error}"),
            Err(error) => {
                log::warn!("dial the host, port {AGENT_PORT}: {error}; trying on");
                told = true;
            }
        }
        sleep(REDIAL).await;
    }
}

/// Serves the contract on one connection until its end.
pub async fn serve<S>(socket: S, service: Arc<Service>) -> End
where
    S: AsyncRead + AsyncWrite + Send + Sync + Unpin + 'static,
{
    let shut_down = Arc::clone(&service.shut_down);
    let (alive, mut closed) = oneshot::channel();
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
        log::error!("serve the contract: {error}");
        return End::Lost;
    }
    tokio::select! {
        _ = &mut closed => End::Lost,
        () = shut_down.notified() => {
            // The answer is on its way; the shim hangs up when it has it.
            timeout(GOODBYE, closed).await.ok();
            End::ShutDown
        }
    }
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
