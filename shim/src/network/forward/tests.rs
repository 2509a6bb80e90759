//! In a network namespace of this machine, dialled from within; the guest is a stand-in.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    os::fd::OwnedFd,
    sync::Mutex,
    thread,
};

use tokio::{
    io::Interest,
    sync::mpsc,
    time::{sleep, timeout},
};

use super::{super::tests::Place, *};
use crate::{network::Network, ready};

/// For what has to come.
const SOON: Duration = Duration::from_secs(60);

/// Takes what the guest is asked for, and does what it is told with it.
struct Guest {
    asked: mpsc::UnboundedSender<(api::DialRequest, std::os::unix::net::UnixStream)>,
    refuses: bool,
}

type Asked = mpsc::UnboundedReceiver<(api::DialRequest, std::os::unix::net::UnixStream)>;

impl Guest {
    fn new(refuses: bool) -> (Arc<Self>, Asked) {
        let (asked, told) = mpsc::unbounded_channel();
        (Arc::new(Self { asked, refuses }), told)
    }
}

impl Dial for Guest {
    async fn dial(&self, request: api::DialRequest, stream: OwnedFd) -> Result<(), Fault> {
        let mut stream = std::os::unix::net::UnixStream::from(stream);
        let mut header = [0; 8];
        stream.read_exact(&mut header).unwrap();
        assert_eq!(u64::from_le_bytes(header), request.stream);
        assert_ne!(request.stream, 0);
        self.asked.send((request, stream)).unwrap();
        match self.refuses {
            true => Err(Fault::internal("nobody listens")),
            false => Ok(()),
        }
    }
}

/// As a client does, on a thread of the namespace.
fn dial(place: &Place, to: &str) -> thread::JoinHandle<io::Result<TcpStream>> {
    let namespace = place.namespace.try_clone().unwrap();
    let to: SocketAddr = to.parse().unwrap();
    thread::spawn(move || {
        // SAFETY: setns(2) takes numbers only.
        let entered = unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) };
        assert_eq!(entered, 0, "as root");
        let stream = TcpStream::connect_timeout(&to, SOON)?;
        stream.set_read_timeout(Some(SOON))?;
        Ok(stream)
    })
}

async fn joined<T: Send + 'static>(thread: thread::JoinHandle<T>) -> T {
    let joined = tokio::task::spawn_blocking(|| thread.join().unwrap());
    joined.await.unwrap()
}

async fn dialled(place: &Place, to: &str) -> TcpStream {
    let dialled = async {
        loop {
            match joined(dial(place, to)).await {
                // The kernel has an address of IPv6 a moment later than it says.
                Err(e)
                    if matches!(
                        e.kind(),
                        io::ErrorKind::NetworkUnreachable | io::ErrorKind::AddrNotAvailable
                    ) => {}
                dialled => return dialled.unwrap(),
            }
        }
    };
    timeout(SOON, dialled).await.unwrap()
}

/// Waits until nobody listens: what another test is about to execute has a copy of all descriptors for a moment.
async fn is_refused(place: &Place, to: &str) {
    let refused = async {
        loop {
            match joined(dial(place, to)).await {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => {}
                Err(e) => return e.kind(),
            }
        }
    };
    let kind = timeout(SOON, refused).await.unwrap();
    assert_eq!(kind, io::ErrorKind::ConnectionRefused);
}

async fn read_to_end(mut stream: impl Read + Send + 'static) -> io::Result<Vec<u8>> {
    let read = tokio::task::spawn_blocking(move || {
        let mut got = Vec::new();
        stream.read_to_end(&mut got).map(|_| got)
    });
    timeout(SOON, read).await.unwrap().unwrap()
}

/// Until who dials is not refused any more.
async fn until_forwarded(place: &Place, asked: &mut Asked) {
    let forwarded = async {
        let refused = |e: io::Error| e.kind() == io::ErrorKind::ConnectionRefused;
        while joined(dial(place, "127.0.0.1:1")).await.is_err_and(refused) {
            sleep(Duration::from_millis(5)).await;
        }
        asked.recv().await.unwrap();
    };
    timeout(SOON, forwarded).await.unwrap();
}

async fn forwarded(place: &Place) -> (Network, Asked) {
    let (guest, mut asked) = Guest::new(false);
    let network = place.begin();
    network.forward(guest.clone());
    // Is one.
    network.forward(guest);
    until_forwarded(place, &mut asked).await;
    (network, asked)
}

fn shown(request: &api::DialRequest) -> (Vec<String>, u32) {
    let addresses = request.addresses.iter();
    let addresses = addresses.map(|bytes| husk_netlink::ip(bytes).unwrap().to_string());
    (addresses.collect(), request.port)
}

#[tokio::test]
async fn who_dials_any_address_of_the_namespace_is_carried_to_the_guest() {
    let place = Place::new();
    place.ok("ip address add 10.9.0.2/24 dev lo; ip address add fd09::2/64 nodad dev lo");
    is_refused(&place, "127.0.0.1:80").await;
    let (network, mut asked) = forwarded(&place).await;
    for (to, addresses, port) in [
        ("127.0.0.1:80", &["127.0.0.1", "::1"][..], 80),
        ("127.9.8.7:65535", &["127.9.8.7", "::1"], 65535),
        ("[::1]:22", &["::1", "127.0.0.1"], 22),
        ("[::ffff:127.0.0.1]:23", &["127.0.0.1", "::1"], 23),
        ("10.9.0.2:24", &["10.9.0.2"], 24),
        ("[fd09::2]:25", &["fd09::2"], 25),
    ] {
        let mut client = dialled(&place, to).await;
        let (request, mut guest) = timeout(SOON, asked.recv()).await.unwrap().unwrap();
        let addresses = addresses.iter().map(|ip| (*ip).to_owned()).collect();
        assert_eq!(shown(&request), (addresses, port), "{to}");
        client.write_all(b"there").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(
            read_to_end(guest.try_clone().unwrap()).await.unwrap(),
            b"there"
        );
        // The other direction is open as long as somebody speaks there.
        guest.write_all(b"and back").unwrap();
        guest.shutdown(Shutdown::Write).unwrap();
        assert_eq!(read_to_end(client).await.unwrap(), b"and back", "{to}");
    }
    network.undo().await;
    is_refused(&place, "127.0.0.1:80").await;
    // It is over.
    network.forward(Guest::new(false).0);
    is_refused(&place, "127.0.0.1:80").await;
}

/// UDP is, and who listens there is not asked.
#[tokio::test]
async fn udp_is_left_alone_and_who_listens_in_the_namespace_does_not_answer_for_the_guest() {
    let place = Place::new();
    let namespace = place.namespace.try_clone().unwrap();
    let listening = thread::spawn(move || {
        // SAFETY: setns(2) takes numbers only.
        unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) };
        let udp = std::net::UdpSocket::bind("127.0.0.1:80").unwrap();
        udp.set_read_timeout(Some(SOON)).unwrap();
        udp.connect("127.0.0.1:80").unwrap();
        (std::net::TcpListener::bind("127.0.0.1:80").unwrap(), udp)
    });
    let (listener, udp) = listening.join().unwrap();
    let (_network, mut asked) = forwarded(&place).await;
    let client = dialled(&place, "127.0.0.1:80").await;
    let (_, guest) = timeout(SOON, asked.recv()).await.unwrap().unwrap();
    drop(guest);
    assert!(read_to_end(client).await.is_err());
    listener.set_nonblocking(true).unwrap();
    let nobody = listener.accept().unwrap_err();
    assert_eq!(nobody.kind(), io::ErrorKind::WouldBlock);
    udp.send(b"itself").unwrap();
    let mut got = [0; 6];
    assert_eq!(udp.recv(&mut got).unwrap(), 6);
}

#[tokio::test]
async fn whom_the_guest_refuses_is_reset() {
    let place = Place::new();
    let (guest, mut asked) = Guest::new(true);
    let network = place.begin();
    network.forward(guest);
    until_forwarded(&place, &mut asked).await;
    // It may be before the client has looked whether there is a connection.
    let error = match joined(dial(&place, "127.0.0.1:80")).await {
        Ok(client) => read_to_end(client).await.unwrap_err(),
        Err(error) => error,
    };
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn what_breaks_off_on_one_side_is_reset_on_the_other() {
    let place = Place::new();
    let (_network, mut asked) = forwarded(&place).await;
    // The guest's side, as the VMM ends it: first what it reads.
    let client = dialled(&place, "127.0.0.1:80").await;
    let (_, mut guest) = timeout(SOON, asked.recv()).await.unwrap().unwrap();
    guest.write_all(b"half a").unwrap();
    guest.shutdown(Shutdown::Read).unwrap();
    guest.shutdown(Shutdown::Write).unwrap();
    let error = read_to_end(client).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);

    // The client's.
    let client = dialled(&place, "127.0.0.1:80").await;
    let (_, guest) = timeout(SOON, asked.recv()).await.unwrap().unwrap();
    client.set_nonblocking(true).unwrap();
    let client = tokio::net::TcpStream::from_std(client).unwrap();
    client.set_zero_linger().unwrap();
    drop(client);
    let guest = ready::watch(guest.into(), Interest::READABLE).unwrap();
    let mut room = [0; 8];
    assert_eq!(ready::read(&guest, &mut room).await.unwrap(), 0);
    assert!(is_gone(guest.as_raw_fd()));
}

#[tokio::test]
async fn connections_end_with_the_network() {
    let place = Place::new();
    let (network, mut asked) = forwarded(&place).await;
    let client = dialled(&place, "[::1]:80").await;
    let (_, guest) = timeout(SOON, asked.recv()).await.unwrap().unwrap();
    network.undo().await;
    // An end, or a reset.
    assert!(read_to_end(client).await.is_ok_and(|got| got.is_empty()));
    assert_eq!(read_to_end(guest).await.unwrap(), b"");
    is_refused(&place, "[::1]:80").await;
}

#[tokio::test]
async fn there_is_a_bound_and_room_again() {
    let place = Place::new();
    let (_network, mut asked) = forwarded(&place).await;
    let mut clients = Vec::new();
    let mut guests = Vec::new();
    for _ in 0..CONNECTIONS {
        clients.push(dialled(&place, "127.0.0.1:80").await);
        guests.push(timeout(SOON, asked.recv()).await.unwrap().unwrap().1);
    }
    // Waits to be accepted.
    let waiting = dialled(&place, "127.0.0.1:81").await;
    let early = timeout(Duration::from_millis(100), asked.recv()).await;
    assert!(early.is_err());
    guests.pop();
    let (request, _guest) = timeout(SOON, asked.recv()).await.unwrap().unwrap();
    assert_eq!(request.port, 81);
    drop(waiting);
}

#[tokio::test]
async fn what_goes_both_ways_is_whole() {
    let place = Place::new();
    let (_network, mut asked) = forwarded(&place).await;
    let client = dialled(&place, "127.0.0.1:80").await;
    let (_, guest) = timeout(SOON, asked.recv()).await.unwrap().unwrap();
    let bytes: Arc<Vec<u8>> = Arc::new((0..8_000_000u32).map(|i| (i % 251) as u8).collect());
    let late = Arc::new(Mutex::new(Vec::new()));
    for mut end in [
        Box::new(client.try_clone().unwrap()) as Box<dyn Write + Send>,
        Box::new(guest.try_clone().unwrap()),
    ] {
        let bytes = bytes.clone();
        late.lock().unwrap().push(thread::spawn(move || {
            end.write_all(&bytes).unwrap();
        }));
    }
    let exact = |mut stream: Box<dyn Read + Send>| {
        let length = bytes.len();
        tokio::task::spawn_blocking(move || {
            let mut got = vec![0; length];
            stream.read_exact(&mut got).unwrap();
            got
        })
    };
    // Open until both have all: the end of both directions at once would be a break.
    let _open = guest.try_clone().unwrap();
    let (there, back) = (exact(Box::new(guest)), exact(Box::new(client)));
    assert!(timeout(SOON, there).await.unwrap().unwrap() == *bytes);
    assert!(timeout(SOON, back).await.unwrap().unwrap() == *bytes);
}
