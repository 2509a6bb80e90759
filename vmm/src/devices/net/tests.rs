//! The device between a driver, which is the test, and a real tap in a network namespace of the test's own thread.
//! They need root.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    time::{Duration, Instant},
};

use virtio_queue::mock::MockSplitQueue;

use super::{tap::Given, *};
use crate::{
    memory::{Bytes, GuestAddress},
    virtio::queue::testing::{BUFFERS, INDIRECT, NEXT, WRITE, offer, queue as testing_queue, ram},
};

pub(crate) const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
/// The type of the tests' frames: for local experiments.
const TYPE: u16 = 0x88b5;
/// Where a header says how many chains its packet lies in.
const NUM_BUFFERS: usize = 10;

/// The host's side of a tap.
pub(crate) struct Network {
    socket: OwnedFd,
    name: String,
}

impl Network {
    /// A tap with so many queues, in a new network namespace that the calling thread is in from now on.
    pub(crate) fn new(queues: usize) -> (Self, Vec<OwnedFd>) {
        // SAFETY: takes flags alone.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "as root");
        // Nobody is to say anything by itself.
        fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap();
        Self::another(queues, "tap0")
    }

    /// Another tap in the same namespace.
    pub(crate) fn another(queues: usize, name: &str) -> (Self, Vec<OwnedFd>) {
        let several = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | several;
        let taps: Vec<OwnedFd> = (0..queues).map(|_| tap(name, flags)).collect();
        // Not later: the socket would be told that it was down.
        set_flags(name, (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short);
        let all = (libc::ETH_P_ALL as u16).to_be();
        // SAFETY: a new descriptor; a live address of the length stated.
        let socket = unsafe {
            let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
            let fd = libc::socket(libc::AF_PACKET, kind, all.into());
            assert!(fd >= 0);
            let mut address: libc::sockaddr_ll = std::mem::zeroed();
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = all;
            let index = std::ffi::CString::new(name).unwrap();
            address.sll_ifindex = libc::if_nametoindex(index.as_ptr()).try_into().unwrap();
            let length = size_of_val(&address) as libc::socklen_t;
            assert_eq!(libc::bind(fd, (&raw const address).cast(), length), 0);
            let patience = libc::timeval {
                tv_sec: 10,
                tv_usec: 0,
            };
            let length = size_of_val(&patience) as libc::socklen_t;
            let option = libc::SO_RCVTIMEO;
            let value = (&raw const patience).cast();
            libc::setsockopt(fd, libc::SOL_SOCKET, option, value, length);
            OwnedFd::from_raw_fd(fd)
        };
        let name = name.to_owned();
        (Self { socket, name }, taps)
    }

    /// Takes the interface away (rtnetlink(7), RTM_DELLINK).
    fn delete(&self) {
        let mut message = Vec::new();
        message.extend(32u32.to_ne_bytes());
        message.extend(libc::RTM_DELLINK.to_ne_bytes());
        message.extend((libc::NLM_F_REQUEST as u16).to_ne_bytes());
        message.extend([0; 12]);
        // SAFETY: a C string; a new descriptor; a live buffer of the length stated.
        unsafe {
            let name = std::ffi::CString::new(self.name.as_str()).unwrap();
            message.extend(libc::if_nametoindex(name.as_ptr()).to_ne_bytes());
            message.extend([0; 8]);
            let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
            let route = libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_ROUTE);
            let route = OwnedFd::from_raw_fd(route);
            let (start, length) = (message.as_ptr().cast(), message.len());
            assert_eq!(libc::send(route.as_raw_fd(), start, length, 0), 32);
        }
    }

    /// Sends a frame to the guest.
    pub(crate) fn send(&self, frame: &[u8]) {
        // SAFETY: pointer and length are those of the frame.
        let sent = unsafe {
            let (start, length) = (frame.as_ptr().cast(), frame.len());
            libc::send(self.socket.as_raw_fd(), start, length, 0)
        };
        assert_eq!(sent, frame.len() as isize, "{}", io::Error::last_os_error());
    }

    /// The next of the tests' frames that came from the guest.
    pub(crate) fn receive(&self) -> Vec<u8> {
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline {
            let mut frame = vec![0; 1 << 17];
            // SAFETY: live buffers of the lengths stated.
            let (length, from) = unsafe {
                let mut from: libc::sockaddr_ll = std::mem::zeroed();
                let mut size = size_of_val(&from) as libc::socklen_t;
                let length = libc::recvfrom(
                    self.socket.as_raw_fd(),
                    frame.as_mut_ptr().cast(),
                    frame.len(),
                    0,
                    (&raw mut from).cast(),
                    &raw mut size,
                );
                (length, from)
            };
            let ours = from.sll_protocol == TYPE.to_be();
            if ours && from.sll_pkttype != libc::PACKET_OUTGOING {
                frame.truncate(length.try_into().unwrap());
                return frame;
            }
        }
        panic!("no frame comes");
    }
}

fn set_flags(name: &str, flags: libc::c_short) {
    let mut interface = named(name);
    interface.ifr_ifru.ifru_flags = flags;
    // SAFETY: a new descriptor; a live ifreq.
    let set = unsafe {
        let any = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        let any = OwnedFd::from_raw_fd(any);
        libc::ioctl(any.as_raw_fd(), libc::SIOCSIFFLAGS, &raw mut interface)
    };
    assert_eq!(set, 0);
}

fn named(name: &str) -> libc::ifreq {
    // SAFETY: all-zero is a valid ifreq.
    let mut interface: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in interface.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte as libc::c_char;
    }
    interface
}

fn tap(name: &str, flags: libc::c_int) -> OwnedFd {
    let file = File::options().read(true).write(true).open("/dev/net/tun");
    let file = file.expect("/dev/net/tun");
    let mut interface = named(name);
    interface.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: a live ifreq.
    let made = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut interface) };
    assert_eq!(made, 0, "{}", io::Error::last_os_error());
    file.into()
}

/// A frame of the tests' type.
pub(crate) fn frame(length: usize, fill: u8) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(MAC);
    frame.extend(TYPE.to_be_bytes());
    frame.resize(length, fill);
    frame
}

fn first(network: (Network, Vec<OwnedFd>)) -> (Network, Tap) {
    let (network, fds) = network;
    (network, Tap::all(fds).unwrap().remove(0))
}

/// The chains that were used, with the bytes in each.
fn used(driver: &MockSplitQueue<'_, GuestRam>) -> Vec<(u32, u32)> {
    let used = driver.used();
    let count = u16::from_le(used.idx().load());
    (0..count)
        .map(|entry| {
            let element = used.ring().ref_at(entry.into()).unwrap().load();
            (element.id(), element.len())
        })
        .collect()
}

fn bytes(ram: &GuestRam, address: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    ram.read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

/// Has the receiver work until it has given `wanted` chains back.
fn receive(
    receiver: &mut Receiver<'_>,
    tap: &Tap,
    driver: &MockSplitQueue<'_, GuestRam>,
    wanted: u16,
) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while u16::from_le(driver.used().idx().load()) < wanted {
        assert!(Instant::now() < deadline, "no packet comes");
        receiver.turn(tap, &mut true).unwrap();
    }
}

#[test]
fn a_packet_lies_in_as_many_chains_as_it_needs() {
    let (network, tap) = first(Network::new(1));
    let ram = ram();
    let (driver, queue) = testing_queue(&ram, 0);
    let mut receiver = Receiver::new(&ram, queue, true, 2001);
    let chains: Vec<_> = (0..8u64)
        .map(|at| (BUFFERS + at * 0x1000, 400, WRITE, 0))
        .collect();
    offer(&driver, 0, &chains);
    network.send(&frame(1000, 7));
    receive(&mut receiver, &tap, &driver, 3);
    assert_eq!(used(&driver), [(0, 400), (1, 400), (2, 212)]);
    let header = bytes(&ram, BUFFERS, HEADER_SIZE);
    assert_eq!(header[NUM_BUFFERS..], [3, 0]);
    let mut got = bytes(&ram, BUFFERS + 12, 388);
    got.extend(bytes(&ram, BUFFERS + 0x1000, 400));
    got.extend(bytes(&ram, BUFFERS + 0x2000, 212));
    assert!(got == frame(1000, 7));
    // There is no room left for any packet: the next one waits, and what is left was never taken.
    network.send(&frame(60, 8));
    let mut ready = true;
    assert!(!receiver.turn(&tap, &mut ready).unwrap());
    assert!(ready);
    assert_eq!(receiver.into_queue().state().next_avail, 3);
}

#[test]
fn a_packet_too_long_for_its_chain_is_lost_and_the_next_is_not() {
    let (network, tap) = first(Network::new(1));
    let ram = ram();
    let (driver, queue) = testing_queue(&ram, 0);
    let mut receiver = Receiver::new(&ram, queue, false, 2000);
    // The header lies in pieces.
    offer(
        &driver,
        0,
        &[
            (BUFFERS, 11, WRITE | NEXT, 1),
            (BUFFERS + 11, 111, WRITE, 0),
        ],
    );
    network.send(&frame(111, 1));
    network.send(&frame(110, 2));
    receive(&mut receiver, &tap, &driver, 1);
    assert_eq!(used(&driver), [(0, 122)]);
    assert!(bytes(&ram, BUFFERS + 12, 110) == frame(110, 2));
    assert_eq!(bytes(&ram, BUFFERS + 10, 2), [1, 0]);
}

/// A chain may have more buffers than a call takes: they are as much room as there can be, whatever may come.
#[test]
fn a_chain_of_tiny_buffers_holds_what_a_call_can_fill() {
    let (network, tap) = first(Network::new(1));
    let ram = ram();
    let (driver, queue) = testing_queue(&ram, 0);
    let mut receiver = Receiver::new(&ram, queue, true, PACKET_MAX);
    let table = BUFFERS + 0x1_0000;
    chain_of_bytes(&ram, table, WRITE);
    offer(&driver, 0, &[(table, 1024 * 16, INDIRECT, 0)]);
    // With the header, a byte more than fits, and as much.
    network.send(&frame(1012, 1));
    network.send(&frame(1011, 2));
    receive(&mut receiver, &tap, &driver, 1);
    assert_eq!(used(&driver), [(0, 1023)]);
    assert!(bytes(&ram, BUFFERS + 12, 1011) == frame(1011, 2));
    assert_eq!(bytes(&ram, BUFFERS + NUM_BUFFERS as u64, 2), [1, 0]);
}

/// An indirect table of 1,024 buffers of a byte each, one behind the other.
fn chain_of_bytes(ram: &GuestRam, table: u64, flags: u16) {
    for index in 0..1024u64 {
        let next = if index == 1023 { 0 } else { NEXT };
        let descriptor = u128::from(BUFFERS + index)
            | 1 << 64
            | u128::from(flags | next) << 96
            | u128::from(index + 1) << 112;
        let place = GuestAddress(table + 16 * index);
        ram.write_slice(&descriptor.to_le_bytes(), place).unwrap();
    }
}

#[test]
fn a_chain_without_room_for_a_header_is_an_error() {
    let (_network, tap) = first(Network::new(1));
    let ram = ram();
    let (driver, queue) = testing_queue(&ram, 0);
    let mut receiver = Receiver::new(&ram, queue, true, 2000);
    offer(&driver, 0, &[(BUFFERS, 11, WRITE, 0)]);
    let error = receiver.turn(&tap, &mut true).unwrap_err();
    assert_eq!(
        error.to_string(),
        "net: receive queue: a descriptor chain is shorter than its header"
    );
}

#[test]
fn what_no_tap_takes_is_lost_and_the_rest_is_sent() {
    let (network, tap) = first(Network::new(1));
    let ram = ram();
    let (driver, queue) = testing_queue(&ram, 0);
    let mut transmitter = Transmitter::new(&ram, queue);
    // At 0: a packet in pieces. At 0x1000: one whose header is nonsense.
    ram.write_slice(&[0; HEADER_SIZE], GuestAddress(BUFFERS))
        .unwrap();
    ram.write_slice(&frame(200, 5), GuestAddress(BUFFERS + 12))
        .unwrap();
    let nonsense = [
        1, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0,
    ];
    ram.write_slice(&nonsense, GuestAddress(BUFFERS + 0x1000))
        .unwrap();
    ram.write_slice(&frame(200, 6), GuestAddress(BUFFERS + 0x100c))
        .unwrap();
    offer(
        &driver,
        0,
        &[
            // Shorter than a header; longer than any packet; nothing to read; nonsense; good.
            (BUFFERS, 11, 0, 0),
            (BUFFERS, PACKET_MAX as u32 + 1, 0, 0),
            (BUFFERS, 100, WRITE, 0),
            (BUFFERS + 0x1000, 212, 0, 0),
            (BUFFERS, 5, NEXT, 5),
            (BUFFERS + 5, 100, NEXT, 6),
            (BUFFERS + 105, 107, 0, 0),
        ],
    );
    let mut ready = true;
    assert!(!transmitter.turn(&tap, &mut ready).unwrap());
    assert!(ready);
    assert_eq!(used(&driver), [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0)]);
    assert!(network.receive() == frame(200, 5));
}

/// As many as a call takes; and one of 64 KiB.
#[test]
fn a_chain_of_tiny_buffers_is_sent() {
    let (network, tap) = first(Network::new(1));
    let ram = ram();
    let (driver, queue) = testing_queue(&ram, 0);
    let table = BUFFERS + 0x1_0000;
    chain_of_bytes(&ram, table, 0);
    let header = [0; HEADER_SIZE];
    ram.write_slice(&header, GuestAddress(BUFFERS)).unwrap();
    let place = GuestAddress(BUFFERS + HEADER_SIZE as u64);
    ram.write_slice(&frame(60_000, 5), place).unwrap();
    let chains = [(table, 1024 * 16, INDIRECT, 0), (BUFFERS, 60_012, 0, 0)];
    offer(&driver, 0, &chains);
    let mut transmitter = Transmitter::new(&ram, queue);
    transmitter.turn(&tap, &mut true).unwrap();
    assert_eq!(used(&driver), [(0, 0), (1, 0)]);
    assert!(network.receive() == frame(1012, 5));
    assert_eq!(network.receive().len(), 60_000);
}

/// The packet that a full tap does not take is the next one that it does.
#[test]
fn a_full_tap_is_waited_for() {
    let mut pair = [0; 2];
    let kind = libc::SOCK_DGRAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: room for two descriptors, which are new and ours.
    let [host, tap] = unsafe {
        let made = libc::socketpair(libc::AF_UNIX, kind, 0, pair.as_mut_ptr());
        assert_eq!(made, 0);
        pair.map(|fd| OwnedFd::from_raw_fd(fd))
    };
    let (host, tap) = (std::os::unix::net::UnixDatagram::from(host), Tap::from(tap));
    let ram = ram();
    let (driver, queue) = testing_queue(&ram, 0);
    let mut transmitter = Transmitter::new(&ram, queue);
    let mut full = 0;
    while matches!(tap.give(&[vector_of(&[1; 20])]), Given::Sent) {
        full += 1;
    }
    ram.write_slice(&[2; 20], GuestAddress(BUFFERS)).unwrap();
    offer(&driver, 0, &[(BUFFERS, 20, 0, 0)]);
    let mut ready = true;
    assert!(!transmitter.turn(&tap, &mut ready).unwrap());
    assert_eq!((ready, used(&driver)), (false, vec![]));
    let mut packet = [0; 32];
    for _ in 0..full {
        assert_eq!(host.recv(&mut packet).unwrap(), 20);
    }
    // Whether it is ready is for others to find out.
    assert!(!transmitter.turn(&tap, &mut ready).unwrap());
    assert_eq!(used(&driver), []);
    assert!(!transmitter.turn(&tap, &mut true).unwrap());
    assert_eq!(used(&driver), [(0, 0)]);
    assert_eq!(host.recv(&mut packet).unwrap(), 20);
    assert_eq!(packet[..20], [2; 20]);
}

fn vector_of(bytes: &[u8]) -> libc::iovec {
    libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    }
}

#[test]
fn an_interface_that_is_down_or_gone_takes_packets_away() {
    let (network, tap) = first(Network::new(1));
    let ram = ram();
    let (driver, queue) = testing_queue(&ram, 0);
    let mut transmitter = Transmitter::new(&ram, queue);
    set_flags(&network.name, 0);
    offer(&driver, 0, &[(BUFFERS, 100, 0, 0)]);
    let mut ready = true;
    assert!(!transmitter.turn(&tap, &mut ready).unwrap() && ready);
    assert_eq!(used(&driver), [(0, 0)]);

    network.delete();
    let gone = tap.set_offload(0).unwrap_err();
    assert_eq!(gone.raw_os_error(), Some(libc::EBADFD));
    offer(&driver, 1, &[(BUFFERS, 100, 0, 0)]);
    assert!(!transmitter.turn(&tap, &mut ready).unwrap() && ready);
    assert_eq!(used(&driver), [(0, 0), (1, 0)]);
    let (receiving, queue) = testing_queue(&ram, 0x8000);
    let mut receiver = Receiver::new(&ram, queue, true, 100);
    offer(&receiving, 0, &[(BUFFERS, 100, WRITE, 0)]);
    assert!(!receiver.turn(&tap, &mut ready).unwrap() && !ready);
}

#[test]
fn commands_are_answered() {
    let (_network, fds) = Network::new(4);
    let ports = Ports::new(Tap::all(fds).unwrap(), vec![]).unwrap();
    let ram = ram();
    let (driver, mut queue) = testing_queue(&ram, 0);
    let mut at = 0;
    let mut ask = |command: &[u8]| {
        ram.write_slice(command, GuestAddress(BUFFERS)).unwrap();
        ram.write_slice(&[9], GuestAddress(BUFFERS + 64)).unwrap();
        let length = command.len() as u32;
        let chain = [(BUFFERS, length, NEXT, at + 1), (BUFFERS + 64, 1, WRITE, 0)];
        offer(&driver, at, &chain);
        at += 2;
        assert!(!control::turn(&ram, &mut queue, &ports).unwrap());
        (bytes(&ram, BUFFERS + 64, 1)[0], ports.used())
    };
    assert_eq!(ask(&[4, 0, 1, 0]), (0, 1));
    assert_eq!(ask(&[4, 0, 4, 0]), (0, 4));
    assert_eq!(ask(&[4, 0, 2, 0]), (0, 2));
    for refused in [
        &[4, 0, 0, 0][..],
        &[4, 0, 5, 0],
        &[4, 0, 1],
        &[4, 1, 1, 0],
        &[1, 0, 1, 0],
    ] {
        assert_eq!(ask(refused), (1, 2), "{refused:?}");
    }
    // No command at all.
    let (driver, mut queue) = testing_queue(&ram, 0x8000);
    offer(
        &driver,
        0,
        &[(BUFFERS, 1, NEXT, 1), (BUFFERS + 64, 1, WRITE, 0)],
    );
    assert!(control::turn(&ram, &mut queue, &ports).is_err());
}

#[test]
fn the_tap_is_asked_for_what_the_driver_takes() {
    let all = F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_ECN;
    for (features, flags) in [
        (0, 0),
        (all, 0b1111),
        (all & !F_GUEST_CSUM, 0),
        (F_GUEST_CSUM | F_GUEST_ECN, 1),
        (F_GUEST_CSUM | F_GUEST_TSO4, 0b11),
        (F_GUEST_CSUM | F_GUEST_TSO6 | F_GUEST_ECN, 0b1101),
        (FEATURES & !all, 0),
    ] {
        assert_eq!(offload(features), flags, "{features:#x}");
        let (_network, tap) = first(Network::new(1));
        tap.set_offload(offload(features)).unwrap();
    }
}

#[test]
fn the_configuration_is_the_interfaces() {
    let (_network, fds) = Network::new(2);
    let net = Net::new(Tap::all(fds).unwrap(), vec![], MAC, 9000, Ending::default()).unwrap();
    let mut config = [0xaa; 14];
    net.read_config(0, &mut config);
    assert_eq!(
        config,
        [2, 0, 0, 0, 0, 9, 1, 0, 2, 0, 0x28, 0x23, 0xaa, 0xaa]
    );
    let mut mtu = [0; 2];
    net.read_config(10, &mut mtu);
    assert_eq!(u16::from_le_bytes(mtu), 9000);
    net.read_config(u64::MAX, &mut mtu);
    assert_eq!((net.kind().queues.len(), net.ports.used()), (5, 1));
    assert_eq!(net.kind().features, FEATURES | F_CTRL_VQ | F_MQ);
}

#[test]
fn what_is_no_tap_is_refused_by_name() {
    let tap_flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let (_network, fds) = Network::new(1);
    let message = |fds| {
        Tap::all(fds)
            .err()
            .map_or_else(String::new, |e| e.to_string())
    };
    let null = || OwnedFd::from(File::open("/dev/null").unwrap());
    assert_eq!(
        message(vec![null()]),
        "tap_fds: not an attached queue of a tap (TUNGETIFF: Inappropriate ioctl for device (os error 25))"
    );
    let bare = File::options().read(true).write(true).open("/dev/net/tun");
    assert!(
        message(vec![bare.unwrap().into()]).contains("TUNGETIFF: File descriptor in bad state")
    );
    let error = message(vec![tap("other", tap_flags & !libc::IFF_VNET_HDR)]);
    assert_eq!(error, "tap_fds: the tap was made without IFF_VNET_HDR");
    let tun = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    assert!(message(vec![tap("tun", tun)]).ends_with("IFF_TAP"));
    let mut mixed = fds;
    mixed.push(tap("other", tap_flags));
    assert!(message(mixed).ends_with("IFF_MULTI_QUEUE"));
    let several = tap_flags | libc::IFF_MULTI_QUEUE;
    let mixed = vec![tap("one", several), tap("two", several)];
    assert_eq!(message(mixed), "tap_fds: the queues are not all of one tap");
    Tap::all(vec![tap("one", several), tap("one", several)]).unwrap();
}
