//! Connections to servers of the pod, in the guest's first network namespace, for who dials them on the host: a TCP
//! connection on one side, a stream from the host on the other, and bytes between the two until both directions
//! have ended.
//!
//! What breaks off on one side is reset on the other. A connection outlives neither its server nor the host's interest.

use std::cell::Cell;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use husk_proto::agent::DialRequest;
use tokio::net::TcpStream;
use tokio::task::spawn_local;
use tokio::time::{Instant, sleep, timeout_at};

use crate::channel::Channel;
use crate::fault::Fault;
use crate::streams::Arrivals;

/// For a server to be reached, by all of its addresses together.
const PATIENCE: Duration = Duration::from_secs(10);
/// Connections at once, of which the shim has fewer.
const CONNECTIONS: usize = 256;
/// Addresses of one server.
const ADDRESSES: usize = 4;
/// Between two looks whether the host still wants a connection that it writes nothing to any more.
const LOOK: Duration = Duration::from_secs(1);

/// How many connections there are.
#[derive(Default)]
pub struct Connections(Rc<Cell<usize>>);

/// One of them.
struct Place(Rc<Cell<usize>>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.set(self.0.get().saturating_sub(1));
    }
}

impl Connections {
    fn take(&self) -> Result<Place, Fault> {
        let taken = self.0.get();
        if taken >= CONNECTIONS {
            let full = format!("{CONNECTIONS} connections from the host are open already");
            return Err(Fault::Unavailable(full));
        }
        self.0.set(taken.saturating_add(1));
        Ok(Place(Rc::clone(&self.0)))
    }

    /// Connects a stream to a server. Its bytes go on being carried.
    pub async fn dial(&self, arrivals: &Arrivals, request: &DialRequest) -> Result<(), Fault> {
        let servers = servers(request)?;
        let place = self.take()?;
        let stream = arrivals.claim("stream", request.stream).await?;
        let stream = stream.ok_or_else(|| Fault::Invalid("stream: is 0".into()))?;
        let server = connect(&servers).await.map_err(Fault::Unavailable)?;
        let server = server
            .into_std()
            .and_then(|server| Channel::new(server.into()))
            .map_err(|error| Fault::of_call("watch a connection", error))?;
        spawn_local(async move {
            if let Err(error) = relay(&stream, &server).await {
                log::debug!("a connection from the host broke off: {error}");
                // The server is told of it, where it could be a common end.
                reset(&server).ok();
            }
            drop(place);
        });
        Ok(())
    }
}

fn servers(request: &DialRequest) -> Result<Vec<SocketAddr>, Fault> {
    let port = u16::try_from(request.port).ok().filter(|port| *port != 0);
    let port =
        port.ok_or_else(|| Fault::Invalid(format!("port: {} is no TCP port", request.port)))?;
    let count = request.addresses.len();
    if count == 0 || count > ADDRESSES {
        let wrong = format!("addresses: {count}, where 1 to {ADDRESSES} can be");
        return Err(Fault::Invalid(wrong));
    }
    let servers = request.addresses.iter().enumerate().map(|(i, bytes)| {
        let wrong = || Fault::Invalid(format!("addresses[{i}]: has {} bytes", bytes.len()));
        husk_netlink::ip(bytes)
            .map(|ip: IpAddr| SocketAddr::new(ip, port))
            .ok_or_else(wrong)
    });
    servers.collect()
}

/// The first that answers, or why none does.
async fn connect(servers: &[SocketAddr]) -> Result<TcpStream, String> {
    let deadline = Instant::now() + PATIENCE;
    let mut refusals = Vec::new();
    for server in servers {
        match timeout_at(deadline, TcpStream::connect(server)).await {
            Ok(Ok(connected)) => return Ok(connected),
            Ok(Err(error)) => refusals.push(format!("{server}: {error}")),
            Err(_) => {
                refusals.push(format!("{server}: no answer within {PATIENCE:?}"));
                break;
            }
        }
    }
    Err(refusals.join("; "))
}

/// Both directions, each to its own end.
async fn relay(stream: &Channel, server: &Channel) -> io::Result<()> {
    let there = async {
        stream.copy_to(server).await?;
        server.shutdown_write()
    };
    let back = async {
        server.copy_to(stream).await?;
        stream.shutdown_write()
    };
    let (mut there, mut back) = (std::pin::pin!(there), std::pin::pin!(back));
    let gone = async {
        while !stream.hung_up() {
            sleep(LOOK).await;
        }
        io::Error::from(io::ErrorKind::ConnectionReset)
    };
    tokio::select! {
        ended = &mut back => {
            ended?;
            there.await
        }
        ended = &mut there => {
            ended?;
            // Its host may have ended one direction, or be gone; and a silent server would never notice.
            tokio::select! {
                ended = back => ended,
                error = gone => Err(error),
            }
        }
    }
}

/// Has the connection end with a reset when it is closed.
fn reset(server: &Channel) -> io::Result<()> {
    rustix::net::sockopt::set_socket_linger(server.as_fd(), Some(Duration::ZERO))?;
    Ok(())
}

#[cfg(test)]
mod tests;
