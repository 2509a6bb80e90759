//! Connections as a driver and a host see them: packets on one side, sockets on the other.

use std::{
    io::{ErrorKind, Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    process::Command,
    sync::{Arc, Mutex, atomic::AtomicBool},
};

use husk_proto::{AGENT_PORT, GUEST_CID, HOST_CID};
use protobuf::Message;
use vmm_sys_util::{epoll::EpollEvent, eventfd::EventFd};

use super::{
    Doorway, Thread, Vsock,
    connection::BUFFER,
    muxer::Muxer,
    packet::{
        Header, OP_CREDIT_UPDATE, OP_REQUEST, OP_RESPONSE, OP_RST, OP_RW, OP_SHUTDOWN,
        SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
    },
};
use crate::{
    memory::{Bytes, GuestAddress, GuestMemoryAccess, GuestRam, VolatileSlice},
    virtio::{
        Activation, DeviceError, VirtioDevice,
        queue::testing::{BUFFERS, NEXT, WRITE, offer, queue, ram},
    },
    vm::ending::Ending,
};

const PORT: u32 = 1025;
const ROOM: usize = 4096;

/// A guest: some memory, and packets it makes and takes.
struct Guest {
    ram: GuestRam,
    muxer: Muxer,
    agent: UnixStream,
}

impl Guest {
    fn new() -> Self {
        let (agent, theirs) = UnixStream::pair().unwrap();
        Self {
            ram: ram(),
            muxer: Muxer::new(theirs.into()).unwrap(),
            agent,
        }
    }

    /// A connection that the host has dialled and the guest accepted, with its host port.
    fn connected() -> (Self, UnixStream, u32) {
        let mut guest = Self::new();
        let (ours, theirs) = UnixStream::pair().unwrap();
        guest.muxer.dial(theirs.into(), PORT);
        let request = guest.receive().unwrap().0;
        assert_eq!((request.op, request.dst_port), (OP_REQUEST, PORT));
        guest.send(request.src_port, OP_RESPONSE, 0, b"");
        (guest, ours, request.src_port)
    }

    fn send_as(&mut self, header: Header, payload: &[u8]) {
        let target = GuestAddress(0x1000);
        self.ram.write_slice(payload, target).unwrap();
        let slice = self.ram.get_slice(target, payload.len()).unwrap();
        self.muxer.take(&header, &[slice]);
    }

    fn send(&mut self, host_port: u32, op: u16, flags: u32, payload: &[u8]) {
        let header = Header {
            src_cid: GUEST_CID.into(),
            dst_cid: HOST_CID.into(),
            src_port: PORT,
            dst_port: host_port,
            len: payload.len() as u32,
            kind: TYPE_STREAM,
            op,
            flags,
            buf_alloc: 64 << 10,
            fwd_cnt: 0,
        };
        self.send_as(header, payload);
    }

    fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        self.poll();
        if !self.muxer.has_packet() {
            return None;
        }
        let room: [VolatileSlice<'_>; 1] =
            [self.ram.get_slice(GuestAddress(0x8000), ROOM).unwrap()];
        let header = self.muxer.make(&room)?;
        let mut payload = vec![0; header.len as usize];
        self.ram
            .read_slice(&mut payload, GuestAddress(0x8000))
            .unwrap();
        Some((header, payload))
    }

    /// The operations of all packets there are.
    fn receive_ops(&mut self) -> Vec<(u16, u32)> {
        std::iter::from_fn(|| self.receive())
            .map(|(header, _)| (header.op, header.flags))
            .collect()
    }

    fn poll(&mut self) {
        let mut events = [EpollEvent::default(); 16];
        let ready = self.muxer.epoll().wait(0, &mut events).unwrap();
        for event in &events[..ready] {
            self.muxer
                .socket_ready(event.data() as usize, event.event_set());
        }
    }
}

fn read_all(socket: &mut UnixStream) -> Vec<u8> {
    socket.set_nonblocking(true).unwrap();
    let mut bytes = Vec::new();
    match socket.read_to_end(&mut bytes) {
        Err(e) if e.kind() != ErrorKind::WouldBlock => panic!("{e}"),
        _ => bytes,
    }
}

/// End of file, as opposed to nothing yet.
fn at_end(socket: &mut UnixStream) -> bool {
    socket.set_nonblocking(true).unwrap();
    matches!(socket.read(&mut [0]), Ok(0))
}

#[test]
fn bytes_travel_both_ways() {
    let (mut guest, mut host, port) = Guest::connected();
    host.write_all(b"to the guest").unwrap();
    let (header, payload) = guest.receive().unwrap();
    assert_eq!(
        (header.op, payload.as_slice()),
        (OP_RW, &b"to the guest"[..])
    );
    guest.send(port, OP_RW, 0, b"to the host");
    assert_eq!(read_all(&mut host), b"to the host");
}

#[test]
fn a_refused_connection_is_end_of_file() {
    let mut guest = Guest::new();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    guest.muxer.dial(theirs.into(), PORT);
    let request = guest.receive().unwrap().0;
    guest.send(request.src_port, OP_RST, 0, b"");
    assert!(at_end(&mut ours));
    assert_eq!(guest.receive(), None);
}

#[test]
fn the_agent_connects_once_and_nobody_else() {
    let mut guest = Guest::new();
    guest.send(80, OP_REQUEST, 0, b"");
    assert_eq!(guest.receive_ops(), [(OP_RST, 0)]);
    guest.send(AGENT_PORT, OP_REQUEST, 0, b"");
    assert_eq!(guest.receive_ops(), [(OP_RESPONSE, 0)]);
    guest.send(AGENT_PORT, OP_RW, 0, b"hello");
    assert_eq!(read_all(&mut guest.agent), b"hello");
    // The same ports again: not a new connection but nonsense on the old one.
    guest.send(AGENT_PORT, OP_REQUEST, 0, b"");
    assert_eq!(guest.receive_ops(), [(OP_RST, 0)]);
    guest.send(AGENT_PORT, OP_REQUEST, 0, b"");
    assert_eq!(guest.receive_ops(), [(OP_RST, 0)]);
}

#[test]
fn the_hosts_half_close_reaches_the_guest_behind_its_bytes() {
    let (mut guest, mut host, port) = Guest::connected();
    host.write_all(b"last").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.receive().unwrap().1, b"last");
    assert_eq!(guest.receive_ops(), [(OP_SHUTDOWN, SHUTDOWN_SEND)]);
    guest.send(port, OP_RW, 0, b"still here");
    assert_eq!(read_all(&mut host), b"still here");
    guest.send(port, OP_SHUTDOWN, SHUTDOWN_BOTH, b"");
    assert_eq!(guest.receive_ops(), [(OP_RST, 0)]);
    assert!(at_end(&mut host));
}

#[test]
fn the_guests_half_close_reaches_the_host_behind_its_bytes() {
    let (mut guest, mut host, port) = Guest::connected();
    guest.send(port, OP_RW, 0, b"last");
    guest.send(port, OP_SHUTDOWN, SHUTDOWN_SEND, b"");
    assert_eq!(read_all(&mut host), b"last");
    assert!(at_end(&mut host));
    host.write_all(b"still here").unwrap();
    assert_eq!(guest.receive().unwrap().1, b"still here");
    // The guest's own end is no news for it.
    drop(host);
    assert_eq!(guest.receive_ops(), [(OP_SHUTDOWN, SHUTDOWN_SEND)]);
}

#[test]
fn a_guest_that_reads_no_more_breaks_the_hosts_pipe() {
    let (mut guest, mut host, port) = Guest::connected();
    guest.send(port, OP_SHUTDOWN, SHUTDOWN_RECEIVE, b"");
    assert_eq!(
        host.write_all(b"x").unwrap_err().kind(),
        ErrorKind::BrokenPipe
    );
    assert_eq!(guest.receive_ops(), []);
}

#[test]
fn a_host_that_reads_no_more_breaks_the_guests_pipe() {
    let (mut guest, host, port) = Guest::connected();
    host.shutdown(Shutdown::Read).unwrap();
    guest.send(port, OP_RW, 0, b"x");
    assert_eq!(guest.receive_ops(), [(OP_SHUTDOWN, SHUTDOWN_RECEIVE)]);
    // What was on its way is dropped, and counted.
    guest.send(port, OP_RW, 0, &[0; 4096]);
    assert_eq!(guest.receive_ops(), []);
}

#[test]
fn a_closed_host_ends_both_directions() {
    let (mut guest, mut host, port) = Guest::connected();
    host.write_all(b"bye").unwrap();
    drop(host);
    assert_eq!(guest.receive().unwrap().1, b"bye");
    assert_eq!(guest.receive_ops(), [(OP_SHUTDOWN, SHUTDOWN_BOTH)]);
    guest.send(port, OP_RST, 0, b"");
    assert_eq!(guest.receive_ops(), []);
    guest.send(port, OP_RW, 0, b"who?");
    assert_eq!(guest.receive_ops(), [(OP_RST, 0)]);
}

#[test]
fn what_was_sent_before_a_close_arrives_though_the_host_is_slow() {
    let (mut guest, mut host, port) = Guest::connected();
    let mut expected = Vec::new();
    for i in 0..BUFFER as usize / ROOM {
        let piece = [i as u8; ROOM];
        guest.send(port, OP_RW, 0, &piece);
        expected.extend_from_slice(&piece);
    }
    guest.send(port, OP_SHUTDOWN, SHUTDOWN_BOTH, b"");
    assert!(guest.receive_ops().contains(&(OP_RST, 0)));
    let mut got = Vec::new();
    while got.len() < expected.len() {
        got.extend(read_all(&mut host));
        guest.poll();
    }
    assert_eq!(got, expected);
    assert!(at_end(&mut host));
}

#[test]
fn a_slow_host_gives_credit_as_it_reads() {
    let (mut guest, mut host, port) = Guest::connected();
    // The socket takes some, the backlog the rest, until all credit is used.
    let mut sent = 0u32;
    let mut forwarded = 0;
    while sent.wrapping_sub(forwarded) < BUFFER {
        guest.send(port, OP_RW, 0, &[7; ROOM]);
        sent += ROOM as u32;
        while let Some((header, _)) = guest.receive() {
            assert_eq!(header.op, OP_CREDIT_UPDATE);
            forwarded = header.fwd_cnt;
        }
    }
    let mut got = read_all(&mut host).len();
    let mut last = 0;
    while got < sent as usize {
        while let Some((header, _)) = guest.receive() {
            assert_eq!((header.op, header.buf_alloc), (OP_CREDIT_UPDATE, BUFFER));
            assert!(header.fwd_cnt > last);
            last = header.fwd_cnt;
        }
        got += read_all(&mut host).len();
    }
    assert!(last > forwarded);
}

#[test]
fn a_guest_that_sends_beyond_its_credit_is_cut_off() {
    let (mut guest, host, port) = Guest::connected();
    let mut ops = Vec::new();
    for _ in 0..4 * BUFFER as usize / ROOM {
        guest.send(port, OP_RW, 0, &[7; ROOM]);
        ops.extend(guest.receive_ops());
    }
    assert!(ops.contains(&(OP_RST, 0)));
    drop(host);
}

#[test]
fn nothing_is_sent_beyond_the_guests_credit() {
    let (mut guest, mut host, port) = Guest::connected();
    host.write_all(&[1; 100 << 10]).unwrap();
    let mut got = 0;
    while let Some((header, payload)) = guest.receive() {
        assert_eq!(header.op, OP_RW);
        got += payload.len();
    }
    assert_eq!(got, 64 << 10);
    let credit = Header {
        src_cid: GUEST_CID.into(),
        dst_cid: HOST_CID.into(),
        src_port: PORT,
        dst_port: port,
        kind: TYPE_STREAM,
        op: OP_CREDIT_UPDATE,
        buf_alloc: 64 << 10,
        fwd_cnt: 64 << 10,
        ..Header::default()
    };
    guest.send_as(credit, b"");
    while let Some((_, payload)) = guest.receive() {
        got += payload.len();
    }
    assert_eq!(got, 100 << 10);
}

#[test]
fn lies_about_credit_send_no_more_than_there_is() {
    let (mut guest, mut host, port) = Guest::connected();
    host.write_all(b"abc").unwrap();
    let lie = Header {
        src_cid: GUEST_CID.into(),
        dst_cid: HOST_CID.into(),
        src_port: PORT,
        dst_port: port,
        kind: TYPE_STREAM,
        op: OP_CREDIT_UPDATE,
        buf_alloc: u32::MAX,
        fwd_cnt: 0x8000_0000,
        ..Header::default()
    };
    guest.send_as(lie, b"");
    while guest.receive().is_some() {}
}

#[test]
fn foreign_addresses_and_types_get_nowhere() {
    let mut guest = Guest::new();
    let stranger = Header {
        src_cid: 77,
        dst_cid: HOST_CID.into(),
        dst_port: AGENT_PORT,
        kind: TYPE_STREAM,
        op: OP_REQUEST,
        ..Header::default()
    };
    guest.send_as(stranger, b"");
    assert_eq!(guest.receive_ops(), []);
    let sequenced = Header {
        src_cid: GUEST_CID.into(),
        kind: 2,
        ..stranger
    };
    guest.send_as(sequenced, b"");
    assert_eq!(guest.receive_ops(), [(OP_RST, 0)]);
}

#[test]
fn resets_are_bounded() {
    let mut guest = Guest::new();
    let mut taken = 0;
    while guest.muxer.takes_packets() {
        guest.send(9, OP_RW, 0, b"noise");
        taken += 1;
        assert!(taken < 1000);
    }
    while guest.receive().is_some() {}
    assert!(guest.muxer.takes_packets());
}

#[test]
fn connections_take_turns() {
    let (mut guest, mut first, _) = Guest::connected();
    let (mut second, theirs) = UnixStream::pair().unwrap();
    guest.muxer.dial(theirs.into(), PORT);
    let request = guest.receive().unwrap().0;
    guest.send(request.src_port, OP_RESPONSE, 0, b"");
    first.write_all(&[1; 64 << 10]).unwrap();
    second.write_all(&[2; 64 << 10]).unwrap();
    let order: Vec<u8> = (0..32).map(|_| guest.receive().unwrap().1[0]).collect();
    assert!(order.contains(&1) && order.contains(&2));
}

#[test]
fn a_driver_reset_closes_every_socket() {
    let (mut guest, mut host, _) = Guest::connected();
    guest.muxer.reset();
    assert!(at_end(&mut host));
}

type Outcome = Result<bool, DeviceError>;
/// Descriptors, as `testing::offer` takes them.
type Descriptors<'a> = &'a [(u64, u32, u16, u16)];

/// What the device's thread makes of room and packets, with `bytes` at the start of the buffers and
/// a connection that wants to be made.
fn serve(bytes: &[u8], room: Descriptors<'_>, packets: Descriptors<'_>) -> (Outcome, Outcome) {
    let ram = ram();
    ram.write_slice(bytes, GuestAddress(BUFFERS)).unwrap();
    let (receiver, receive) = queue(&ram, 0);
    let (transmitter, transmit) = queue(&ram, 0x1_0000);
    let (_, event) = queue(&ram, 0x2_0000);
    for (driver, descriptors) in [(receiver, room), (transmitter, packets)] {
        if !descriptors.is_empty() {
            offer(&driver, 0, descriptors);
        }
    }
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut muxer = Box::new(Muxer::new(theirs.into()).unwrap());
    muxer.dial(ours.into(), PORT);
    let mut thread = Thread {
        ram: ram.clone(),
        receive,
        transmit,
        event,
        muxer,
        doorway: Arc::new(Doorway {
            waiting: Mutex::default(),
            stopping: AtomicBool::new(false),
            wake: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
        }),
    };
    (thread.take_packets(), thread.give_packets())
}

#[test]
fn packets_that_lie_about_their_length_fail_the_device() {
    let (short, _) = serve(b"", &[], &[(BUFFERS, 43, 0, 0)]);
    assert!(matches!(short, Err(DeviceError::Queue { .. })), "{short:?}");
    let header = Header {
        len: u32::MAX,
        ..Header::default()
    };
    let (long, _) = serve(&header.to_bytes(), &[], &[(BUFFERS, 4096, 0, 0)]);
    assert!(matches!(long, Err(DeviceError::Driver { .. })), "{long:?}");
}

#[test]
fn room_without_space_for_a_byte_fails_the_device() {
    let (_, given) = serve(b"", &[(BUFFERS, 44, WRITE, 0)], &[]);
    assert!(matches!(given, Err(DeviceError::Queue { .. })), "{given:?}");
}

#[test]
fn packets_go_into_room_of_any_shape() {
    let room = [
        (BUFFERS, 10, WRITE | NEXT, 1),
        (BUFFERS + 100, 40, WRITE | NEXT, 2),
        (BUFFERS + 200, 1, WRITE, 0),
    ];
    let (taken, given) = serve(b"", &room, &[]);
    assert!(!taken.unwrap() && !given.unwrap());
}

#[test]
fn a_guest_that_has_not_dialled_yet_dials_the_clones_host() {
    let saved = Guest::new().muxer.save().unwrap();
    let mut clone = Guest::new();
    clone.muxer.restore(&saved).unwrap();
    clone.send(AGENT_PORT, OP_REQUEST, 0, b"");
    assert_eq!(clone.receive_ops(), [(OP_RESPONSE, 0)]);
    clone.send(AGENT_PORT, OP_RW, 0, b"hello");
    assert_eq!(read_all(&mut clone.agent), b"hello");
}

/// A clone of a guest whose agent is connected, with the host's end of its agent's socket and a duplicate
/// of its own.
fn clone_of_connected() -> (Vsock, UnixStream, UnixStream) {
    let mut guest = Guest::new();
    guest.send(AGENT_PORT, OP_REQUEST, 0, b"");
    let saved = guest.muxer.save().unwrap();
    assert!(saved.agent.is_some());
    let (host, agent) = UnixStream::pair().unwrap();
    let kept = agent.try_clone().unwrap();
    let (mut clone, _) = Vsock::new(agent.into(), Ending::default()).unwrap();
    clone.restore(&saved.write_to_bytes().unwrap()).unwrap();
    (clone, host, kept)
}

#[test]
fn a_clone_that_never_runs_leaves_the_agents_socket_as_it_was() {
    let (clone, mut host, mut kept) = clone_of_connected();
    drop(clone);
    assert!(!at_end(&mut host));
    host.write_all(b"to the next").unwrap();
    assert_eq!(read_all(&mut kept), b"to the next");

    // Nor does it matter how far it came.
    let (mut clone, mut host, mut kept) = clone_of_connected();
    let ram = ram();
    let queues = [0, 0x1_0000, 0x2_0000].map(|start| queue(&ram, start).1);
    let activation = Activation {
        features: 0,
        ram: ram.clone(),
        queues: queues.into(),
    };
    clone.activate(activation).unwrap();
    drop(clone);
    assert!(!at_end(&mut host));
    host.write_all(b"to the next").unwrap();
    assert_eq!(read_all(&mut kept), b"to the next");
}

#[test]
fn an_agents_connection_that_is_over_stays_over() {
    let mut guest = Guest::new();
    guest.send(AGENT_PORT, OP_REQUEST, 0, b"");
    guest.send(AGENT_PORT, OP_RST, 0, b"");
    let mut clone = Guest::new();
    clone.muxer.restore(&guest.muxer.save().unwrap()).unwrap();
    assert!(at_end(&mut clone.agent));
}

#[test]
fn only_the_agents_connection_at_rest_is_saved() {
    let (guest, _host, _) = Guest::connected();
    assert!(guest.muxer.save().unwrap_err().contains("1025"));

    let mut guest = Guest::new();
    guest.send(AGENT_PORT, OP_REQUEST, 0, b"");
    assert!(guest.muxer.save().unwrap().agent.owes_response);
    guest.receive_ops();
    guest.agent.write_all(b"x").unwrap();
    assert!(
        guest
            .muxer
            .save()
            .unwrap_err()
            .contains("wait for the guest")
    );
    assert_eq!(guest.receive().unwrap().1, b"x");
    assert!(!guest.muxer.save().unwrap().agent.owes_response);
    guest.send(AGENT_PORT, OP_SHUTDOWN, SHUTDOWN_SEND, b"");
    assert!(guest.muxer.save().unwrap_err().contains("being closed"));

    let mut guest = Guest::new();
    guest.send(AGENT_PORT, OP_REQUEST, 0, b"");
    drop(std::mem::replace(
        &mut guest.agent,
        UnixStream::pair().unwrap().0,
    ));
    assert!(guest.muxer.save().unwrap_err().contains("host has closed"));
}

/// In a process of its own, which has no room for the stack of another thread.
#[test]
fn a_device_whose_thread_cannot_start_stays_as_it_was() {
    const ALONE: &str = "HUSK_VSOCK_ALONE";
    if std::env::var_os(ALONE).is_none() {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--nocapture", "--test-threads", "1"])
            .arg("a_device_whose_thread_cannot_start_stays_as_it_was")
            .env(ALONE, "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && text.contains("1 passed"),
            "{output:?}"
        );
        return;
    }
    let (mut clone, mut host, mut kept) = clone_of_connected();
    let ram = ram();
    let activation = || Activation {
        features: 0,
        ram: ram.clone(),
        queues: [0, 0x1_0000, 0x2_0000]
            .map(|start| queue(&ram, start).1)
            .into(),
    };
    let memory = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = memory.split(' ').next().unwrap().parse().unwrap();
    limit_memory(pages * 4096 + (512 << 10));
    let error = clone.activate(activation()).unwrap_err();
    assert!(error.to_string().contains("start a thread"), "{error}");
    assert!(!at_end(&mut host));
    limit_memory(libc::RLIM_INFINITY);
    clone.activate(activation()).unwrap();
    drop(clone);
    assert!(!at_end(&mut host));
    host.write_all(b"to the next").unwrap();
    assert_eq!(read_all(&mut kept), b"to the next");
}

fn limit_memory(bytes: u64) {
    let limit = libc::rlimit {
        rlim_cur: bytes,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: a live rlimit.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_AS, &limit) }, 0);
}
