//! Servers are on this machine's loopback; streams are Unix sockets.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;

use tokio::task::{LocalSet, spawn_blocking};
use tokio::time::timeout;
use ttrpc::Code;

use super::*;

/// For what has to come.
const SOON: Duration = Duration::from_secs(60);
const V4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

fn request(stream: u64, addresses: &[IpAddr], port: u16) -> DialRequest {
    DialRequest {
        stream,
        addresses: addresses
            .iter()
            .copied()
            .map(husk_netlink::octets)
            .collect(),
        port: port.into(),
        ..DialRequest::default()
    }
}

/// Of the guest, and the end of a stream that is the host's.
#[derive(Default)]
struct Guest {
    arrivals: Rc<Arrivals>,
    connections: Connections,
    streams: Cell<u64>,
}

impl Guest {
    async fn dial(&self, addresses: &[IpAddr], port: u16) -> (UnixStream, Result<(), Fault>) {
        let id = self.streams.get() + 1;
        self.streams.set(id);
        let (mut host, guest) = UnixStream::pair().unwrap();
        host.write_all(&id.to_le_bytes()).unwrap();
        host.set_read_timeout(Some(SOON)).unwrap();
        self.arrivals.connection(guest.into());
        let request = request(id, addresses, port);
        (host, self.connections.dial(&self.arrivals, &request).await)
    }

    async fn connected(&self, server: &TcpListener) -> (UnixStream, TcpStream) {
        let at = server.local_addr().unwrap();
        let (host, dialled) = self.dial(&[at.ip()], at.port()).await;
        dialled.unwrap();
        let (server, _) = server.accept().unwrap();
        server.set_read_timeout(Some(SOON)).unwrap();
        (host, server)
    }

    /// Until there are no more than these.
    async fn are(&self, count: usize) {
        let there = async {
            while self.connections.0.get() > count {
                sleep(Duration::from_millis(2)).await;
            }
        };
        timeout(SOON, there).await.unwrap();
    }
}

fn listen(ip: IpAddr) -> TcpListener {
    TcpListener::bind((ip, 0)).unwrap()
}

async fn read_to_end(mut from: impl Read + Send + 'static) -> io::Result<Vec<u8>> {
    let read = spawn_blocking(move || {
        let mut got = Vec::new();
        from.read_to_end(&mut got).map(|_| got)
    });
    read.await.unwrap()
}

#[tokio::test]
async fn both_directions_go_to_their_own_end() {
    let test = async {
        let guest = Guest::default();
        let listener = listen(V4);
        let bytes: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
        // Who ends first.
        for hosts_first in [true, false] {
            let (host, server) = guest.connected(&listener).await;
            let (mut first, mut second): (Box<dyn Both>, Box<dyn Both>) = match hosts_first {
                true => (Box::new(host), Box::new(server)),
                false => (Box::new(server), Box::new(host)),
            };
            for _ in 0..2 {
                let said = bytes.clone();
                let writes = spawn_blocking(move || {
                    first.write_all(&said).unwrap();
                    first.end();
                    first
                });
                let reads = spawn_blocking(move || {
                    let mut got = Vec::new();
                    second.read_to_end(&mut got).unwrap();
                    (second, got)
                });
                let (other, got) = reads.await.unwrap();
                assert!(got == bytes, "{} of {}", got.len(), bytes.len());
                (first, second) = (other, writes.await.unwrap());
            }
            guest.are(0).await;
        }
    };
    LocalSet::new().run_until(test).await;
}

trait Both: Read + Write + Send {
    fn end(&self);
}
impl Both for UnixStream {
    fn end(&self) {
        self.shutdown(Shutdown::Write).unwrap();
    }
}
impl Both for TcpStream {
    fn end(&self) {
        self.shutdown(Shutdown::Write).unwrap();
    }
}

#[tokio::test]
async fn the_first_address_that_answers_is_taken() {
    let test = async {
        let guest = Guest::default();
        let listener = listen(V6);
        let port = listener.local_addr().unwrap().port();
        let (host, dialled) = guest.dial(&[V4, V6], port).await;
        dialled.unwrap();
        let (mut server, _) = listener.accept().unwrap();
        server.write_all(b"x").unwrap();
        drop(server);
        assert_eq!(read_to_end(host).await.unwrap(), b"x");
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn why_nobody_answers_is_said_of_each() {
    let test = async {
        let guest = Guest::default();
        let port = listen(V4).local_addr().unwrap().port();
        let (host, dialled) = guest.dial(&[V4, V6], port).await;
        let fault = dialled.unwrap_err();
        let text = fault.to_string();
        let said = format!(
            "127.0.0.1:{port}: Connection refused (os error 111); [::1]:{port}: Connection refused"
        );
        assert!(text.starts_with(&said), "{text}");
        let ttrpc::Error::RpcStatus(status) = ttrpc::Error::from(fault) else {
            panic!("no status");
        };
        assert_eq!(status.code(), Code::UNAVAILABLE);
        assert_eq!(read_to_end(host).await.unwrap(), b"");
        guest.are(0).await;
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test(start_paused = true)]
async fn who_does_not_answer_is_given_up() {
    let test = async {
        let guest = Guest::default();
        let listener = listen(V4);
        rustix::net::listen(&listener, 0).unwrap();
        let at = listener.local_addr().unwrap();
        // Until the kernel lets those wait who ask.
        let mut full = Vec::new();
        while let Ok(client) = TcpStream::connect_timeout(&at, Duration::from_millis(200)) {
            full.push(client);
        }
        let (_host, dialled) = guest.dial(&[V4, V6], at.port()).await;
        let text = dialled.unwrap_err().to_string();
        assert_eq!(text, format!("{at}: no answer within 10s"));
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn what_breaks_off_on_one_side_breaks_off_on_the_other() {
    let test = async {
        let guest = Guest::default();
        let listener = listen(V4);
        let (host, server) = guest.connected(&listener).await;
        rustix::net::sockopt::set_socket_linger(&server, Some(Duration::ZERO)).unwrap();
        drop(server);
        assert_eq!(read_to_end(host.try_clone().unwrap()).await.unwrap(), b"");
        guest.are(0).await;
        assert!(Channel::new(host.into()).unwrap().hung_up());

        // The host's end: at once, and behind the end of one direction.
        for ends_first in [false, true] {
            let (host, server) = guest.connected(&listener).await;
            if ends_first {
                host.shutdown(Shutdown::Write).unwrap();
                assert_eq!(read_to_end(server.try_clone().unwrap()).await.unwrap(), b"");
            }
            drop(host);
            guest.are(0).await;
            let mut server = server;
            let error = server.write_all(b"?").and_then(|()| server.read(&mut [0]));
            assert!(error.is_err());
        }
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn there_is_a_bound_and_room_again() {
    let test = async {
        let guest = Guest::default();
        let listener = listen(V4);
        let mut all = Vec::new();
        for _ in 0..CONNECTIONS {
            all.push(guest.connected(&listener).await);
        }
        let at = listener.local_addr().unwrap();
        let (_, dialled) = guest.dial(&[at.ip()], at.port()).await;
        let text = dialled.unwrap_err().to_string();
        assert!(text.contains("256 connections"), "{text}");
        all.pop();
        guest.are(CONNECTIONS - 1).await;
        guest.connected(&listener).await;
        // None of those that are there has noticed.
        let (mut host, server) = all.swap_remove(0);
        host.write_all(b"x").unwrap();
        host.shutdown(Shutdown::Write).unwrap();
        assert_eq!(read_to_end(server).await.unwrap(), b"x");
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn what_is_malformed_is_refused_by_its_field() {
    let guest = Guest::default();
    let dial = async |request: DialRequest| {
        let dialled = guest.connections.dial(&guest.arrivals, &request).await;
        match dialled.unwrap_err() {
            Fault::Invalid(text) => text,
            other => panic!("{other}"),
        }
    };
    assert_eq!(dial(request(0, &[V4], 1)).await, "stream: is 0");
    assert!(dial(request(1, &[V4], 0)).await.starts_with("port: 0 is"));
    let mut large = request(1, &[V4], 1);
    large.port = 65536;
    assert!(dial(large).await.starts_with("port: 65536 is"));
    assert!(dial(request(1, &[], 1)).await.starts_with("addresses: 0"));
    let many = dial(request(1, &[V4; 5], 1)).await;
    assert!(many.starts_with("addresses: 5"), "{many}");
    let mut odd = request(1, &[V4, V6], 1);
    odd.addresses[1].pop();
    assert_eq!(dial(odd).await, "addresses[1]: has 15 bytes");
    guest.are(0).await;
}
