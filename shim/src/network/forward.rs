//! Port-forward: whoever dials an address of the pod's network namespace from within it, on the host, reaches the guest. The
//! connection ends here (`steer`); the agent is asked for another one, to the same address and port, and bytes are carried
//! between the two until both directions have ended.
//!
//! It owns the connections, which end with it. What breaks off on one side is reset on the other.

use std::{
    future::Future,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsRawFd, OwnedFd, RawFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use husk_netlink::octets;
use husk_proto::agent as api;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream, UnixStream},
    sync::Semaphore,
    task::JoinSet,
    time::sleep,
};

use crate::{fault::Fault, identity, stdio};

/// Connections at once. More wait in the kernel, as for any busy server.
const CONNECTIONS: usize = 128;
/// Bytes moved at once, of which there is room for each direction of each connection.
const CHUNK: usize = 32 << 10;
/// After a connection that could not be accepted for want of something.
const PAUSE: Duration = Duration::from_secs(1);

/// Who has the guest connect.
pub trait Dial: Send + Sync + 'static {
    /// Returns once there is a connection to what the request names, which `stream` is carried to. Bounded.
    fn dial(
        &self,
        request: api::DialRequest,
        stream: OwnedFd,
    ) -> impl Future<Output = Result<(), Fault>> + Send;
}

/// Accepts until it is dropped, or says why it cannot.
pub(super) async fn serve(listener: OwnedFd, guest: Arc<impl Dial>) -> io::Error {
    let listener = match TcpListener::from_std(listener.into()) {
        Ok(listener) => listener,
        Err(e) => return e,
    };
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        // Nobody closes it.
        let slot = slots.clone().acquire_owned().await;
        let mut client = match listener.accept().await {
            Ok((client, _)) => client,
            Err(e) => {
                log::debug!("accept a connection to the pod: {e}");
                sleep(PAUSE).await;
                continue;
            }
        };
        while connections.try_join_next().is_some() {}
        let guest = guest.clone();
        connections.spawn(async move {
            let carried = carry(&mut client, &*guest).await;
            if let Err((to, why)) = carried {
                log::debug!("connection to {to} of the pod: {why}");
                // The client is told of it, where it could be a common end.
                let _ = client.set_zero_linger();
            }
            drop((client, slot));
        });
    }
}

/// Carries a connection, until it ends in both directions, to whom it was made to.
async fn carry(client: &mut TcpStream, guest: &impl Dial) -> Result<(), (SocketAddr, Fault)> {
    let nowhere = (IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0).into();
    let failed = |to| move |e: io::Error| (to, Fault::internal(e));
    let to = client.local_addr().map_err(failed(nowhere))?;
    client.set_nodelay(true).map_err(failed(to))?;
    let id = identity::stream_id().map_err(failed(to))?;
    let (near, far) = stdio::pair(id).map_err(failed(to))?;
    let near = UnixStream::from_std(near).map_err(failed(to))?;
    let request = request(id, to);
    guest
        .dial(request, far)
        .await
        .map_err(|fault| (to, fault))?;
    relay(client, near).await.map_err(failed(to))
}

/// What the guest is asked for who has dialled `to`. Its loopback is both families': a client tries one after the other as
/// long as it is refused, and here it is not.
fn request(stream: u64, to: SocketAddr) -> api::DialRequest {
    let ip = to.ip().to_canonical();
    let other = match ip {
        IpAddr::V4(ip) if ip.is_loopback() => Some(Ipv6Addr::LOCALHOST.into()),
        IpAddr::V6(ip) if ip.is_loopback() => Some(Ipv4Addr::LOCALHOST.into()),
        _ => None,
    };
    api::DialRequest {
        stream,
        addresses: [Some(ip), other]
            .into_iter()
            .flatten()
            .map(octets)
            .collect(),
        port: to.port().into(),
        ..api::DialRequest::default()
    }
}

/// Both directions, each to its own end.
async fn relay(client: &mut TcpStream, mut guest: UnixStream) -> io::Result<()> {
    let (mut from_client, mut to_client) = client.split();
    let socket = guest.as_raw_fd();
    let (mut from_guest, mut to_guest) = guest.split();
    let client_has_ended = AtomicBool::new(false);
    let there = async {
        copy(&mut from_client, &mut to_guest).await?;
        client_has_ended.store(true, Ordering::Relaxed);
        to_guest.shutdown().await
    };
    let back = async {
        copy(&mut from_guest, &mut to_client).await?;
        // Not the end of what the server had to say: of the server, or of the guest.
        if !client_has_ended.load(Ordering::Relaxed) && is_gone(socket) {
            return Err(io::Error::from(io::ErrorKind::ConnectionReset));
        }
        to_client.shutdown().await
    };
    tokio::try_join!(there, back).map(drop)
}

async fn copy(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
) -> io::Result<()> {
    let mut room = vec![0; CHUNK];
    loop {
        let count = from.read(&mut room).await?;
        if count == 0 {
            return Ok(());
        }
        to.write_all(room.get(..count).unwrap_or_default()).await?;
    }
}

/// Whether both directions have ended, of which we have ended none. The VMM closes the one from us first (vmm/src/devices/vsock), so that
/// it shows as soon as the end of the other is read.
fn is_gone(socket: RawFd) -> bool {
    let mut poll = libc::pollfd {
        fd: socket,
        events: 0,
        revents: 0,
    };
    // SAFETY: `poll` is one pollfd, and a timeout of 0 does not wait.
    unsafe { libc::poll(&raw mut poll, 1, 0) > 0 && poll.revents & libc::POLLHUP != 0 }
}

#[cfg(test)]
mod tests;
