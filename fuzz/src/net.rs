//! A pair of the network device's queues, and its control queue, between a guest that offers any chains and a host
//! that sends packets of any length. Nothing longer than a packet may reach the host.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use arbitrary::{Arbitrary, Unstructured};
use husk_vmm::{
    devices::net::Turns,
    memory::{Bytes, GuestAddress, GuestRam},
};

use crate::driver::{BUFFERS, Deed, RAM, WRITE, activation, offer_chain};

const SIZES: [u16; 3] = [128, 128, 16];
const RECEIVE: u8 = 0;
const TRANSMIT: u8 = 1;
const CONTROL: u8 = 2;
/// Bytes of the longest packet with its headers (`PACKET_MAX`).
const PACKET_MAX: isize = 12 + 18 + (1 << 16);

#[derive(Arbitrary, Debug)]
struct Input {
    event_idx: bool,
    mergeable: bool,
    longest: u16,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    /// Buffers for packets to the guest: how many, and bytes of each.
    Room(u8, u16),
    /// A packet in so many pieces, of so many bytes.
    Send(u8, u32),
    Command([u8; 4], u8),
    Deed(u8, Deed),
    HostSends(u16),
    HostReads,
    Turn,
    /// The device is stopped and started again.
    Restart,
}

pub(crate) fn run(data: &[u8]) {
    let Ok(input) = Input::arbitrary_take_rest(Unstructured::new(data)) else {
        return;
    };
    let activation = activation(&SIZES, input.event_idx);
    let ram = activation.ram;
    let (host, theirs) = packet_pair();
    let start = |queues, tap| Turns::new(&ram, queues, tap, input.mergeable, input.longest);
    let tap = || theirs.try_clone().expect("a second descriptor");
    let mut device = start(activation.queues, tap()).expect("a device");
    let mut next = [0; 3];
    for step in input.steps.into_iter().take(256) {
        match step {
            Step::Room(count, bytes) => {
                for _ in 0..count % 32 {
                    let at = BUFFERS + u64::from(next[0]) * 512 % (RAM - BUFFERS);
                    offer_chain(&ram, RECEIVE, next[0], &[(at, bytes.into(), WRITE)]);
                    next[0] = (next[0] + 1) % 128;
                }
            }
            Step::Send(pieces, bytes) => {
                let pieces = u32::from(pieces % 8) + 1;
                let chain = vec![(BUFFERS, bytes / pieces, 0); pieces as usize];
                offer_chain(&ram, TRANSMIT, next[1], &chain);
                next[1] = (next[1] + pieces as u16) % 120;
            }
            Step::Command(command, answer) => command_chain(&ram, &mut next[2], command, answer),
            Step::Deed(queue, deed) => deed.act(&ram, queue),
            Step::HostSends(bytes) => send(&host, bytes.into()),
            Step::HostReads => receive(&host),
            Step::Turn => {
                if device.turn().is_err() {
                    // The machine ends.
                    return;
                }
            }
            Step::Restart => device = start(device.stop(), tap()).expect("a device"),
        }
    }
    // Whatever was left: nothing of it may hang.
    for _ in 0..4 {
        if device.turn().is_err() {
            return;
        }
    }
}

fn command_chain(ram: &GuestRam, next: &mut u16, command: [u8; 4], answer: u8) {
    // The class is right more often than not.
    let command = match command {
        [class, rest @ ..] if class % 4 != 0 => [&[4, 0][..], &rest[1..]].concat(),
        command => command.to_vec(),
    };
    let at = BUFFERS + 64;
    drop(ram.write_slice(&command, GuestAddress(at)));
    let answer = u32::from(answer % 3);
    let chain = [(at, command.len() as u32, 0), (at + 8, answer, WRITE)];
    offer_chain(ram, CONTROL, *next, &chain);
    *next = (*next + 2) % 16;
}

/// Sockets that give and take a packet at a call, as a tap does.
fn packet_pair() -> (OwnedFd, OwnedFd) {
    let mut pair = [0; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: room for two descriptors, which are new and ours.
    unsafe {
        let made = libc::socketpair(libc::AF_UNIX, kind, 0, pair.as_mut_ptr());
        assert_eq!(made, 0, "a socket pair");
        (OwnedFd::from_raw_fd(pair[0]), OwnedFd::from_raw_fd(pair[1]))
    }
}

fn send(host: &OwnedFd, bytes: usize) {
    let packet = vec![7u8; bytes];
    // SAFETY: pointer and length are those of the packet.
    unsafe {
        let (start, flags) = (packet.as_ptr().cast(), libc::MSG_NOSIGNAL);
        libc::send(host.as_raw_fd(), start, bytes, flags);
    }
}

fn receive(host: &OwnedFd) {
    let mut byte = 0u8;
    // SAFETY: room for the one byte that is kept.
    let length = unsafe {
        let start = (&raw mut byte).cast();
        libc::recv(host.as_raw_fd(), start, 1, libc::MSG_TRUNC)
    };
    assert!(length <= PACKET_MAX, "a packet of {length} bytes");
}
