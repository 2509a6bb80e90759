//! The vsock device between a guest that sends any packets and a host whose sockets come, stall and go. Neither
//! connections nor what waits for the host may grow past their bounds.

use std::{
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
};

use arbitrary::{Arbitrary, Unstructured};
use husk_proto::{AGENT_PORT, GUEST_CID, HOST_CID};
use husk_vmm::{
    devices::vsock::Turns,
    memory::{Bytes, GuestAddress, GuestRam},
};

use crate::driver::{BUFFERS, Deed, RAM, WRITE, activation, offer_chain};

const SIZES: [u16; 3] = [128, 128, 16];
const RECEIVE: u8 = 0;
const TRANSMIT: u8 = 1;
/// Ports of connections that the host dials begin here (`FIRST_HOST_PORT`).
const FIRST_HOST_PORT: u32 = 1 << 30;
const SOCKETS_MAX: usize = 24;

#[derive(Arbitrary, Debug)]
enum Step {
    Send(Packet),
    /// Buffers for packets to the guest: how many, and bytes of each.
    Room(u8, u16),
    Deed(u8, Deed),
    Dial(u32),
    HostSends(u8, u16),
    HostReads(u8, u16),
    HostShuts(u8, bool),
    HostCloses(u8),
    Turn,
    Save,
}

#[derive(Arbitrary, Debug)]
struct Packet {
    from: Port,
    to: Port,
    op: u8,
    flags: u8,
    buffer: u32,
    taken: u32,
    payload: u16,
    /// The header lies about something.
    lie: Option<Lie>,
}

#[derive(Arbitrary, Debug)]
enum Port {
    Agent,
    Streams,
    Dialled(u8),
    Any(u32),
}

impl Port {
    fn number(&self) -> u32 {
        match self {
            Port::Agent => AGENT_PORT,
            Port::Streams => AGENT_PORT + 1,
            Port::Dialled(index) => FIRST_HOST_PORT + u32::from(index % 8),
            Port::Any(port) => *port,
        }
    }
}

#[derive(Arbitrary, Debug)]
enum Lie {
    Source(u64),
    Destination(u64),
    Length(u32),
    Kind(u16),
}

impl Packet {
    fn header(&self) -> [u8; 44] {
        let (mut source, mut destination) = (u64::from(GUEST_CID), u64::from(HOST_CID));
        let (mut length, mut kind) = (u32::from(self.payload), 1);
        match self.lie {
            Some(Lie::Source(cid)) => source = cid,
            Some(Lie::Destination(cid)) => destination = cid,
            Some(Lie::Length(bytes)) => length = bytes,
            Some(Lie::Kind(other)) => kind = other,
            None => {}
        }
        let mut header = Vec::new();
        header.extend(source.to_le_bytes());
        header.extend(destination.to_le_bytes());
        header.extend(self.from.number().to_le_bytes());
        header.extend(self.to.number().to_le_bytes());
        header.extend(length.to_le_bytes());
        header.extend(u16::to_le_bytes(kind));
        header.extend(u16::from(self.op % 9).to_le_bytes());
        header.extend(u32::from(self.flags).to_le_bytes());
        header.extend(self.buffer.to_le_bytes());
        header.extend(self.taken.to_le_bytes());
        header.try_into().expect("44 bytes")
    }
}

pub(crate) fn run(data: &[u8]) {
    let Ok((event_idx, steps)) = <(bool, Vec<Step>)>::arbitrary_take_rest(Unstructured::new(data))
    else {
        return;
    };
    let activation = activation(&SIZES, event_idx);
    let ram = activation.ram.clone();
    let (agent, theirs) = UnixStream::pair().expect("a socket pair");
    agent.set_nonblocking(true).expect("a flag");
    let (mut device, dialer) = Turns::new(theirs.into(), activation).expect("a device");
    let mut sockets = vec![Some(agent)];
    let mut guest = Guest::default();
    for step in steps {
        let socket = |sockets: &mut Vec<Option<UnixStream>>, index: u8| {
            let index = usize::from(index) % sockets.len();
            sockets
                .get_mut(index)
                .and_then(Option::take)
                .map(|socket| (index, socket))
        };
        match step {
            Step::Send(packet) => guest.send(&ram, &packet),
            Step::Room(count, bytes) => guest.room(&ram, count, bytes),
            Step::Deed(queue, deed) => deed.act(&ram, queue),
            Step::Dial(port) if sockets.len() < SOCKETS_MAX => {
                let (ours, theirs) = UnixStream::pair().expect("a socket pair");
                ours.set_nonblocking(true).expect("a flag");
                dialer.dial(theirs.into(), port);
                sockets.push(Some(ours));
            }
            Step::Dial(_) => {}
            Step::HostSends(index, bytes) => {
                if let Some((index, mut socket)) = socket(&mut sockets, index) {
                    let _ = socket.write(&vec![7; bytes.into()]);
                    sockets[index] = Some(socket);
                }
            }
            Step::HostReads(index, bytes) => {
                if let Some((index, mut socket)) = socket(&mut sockets, index) {
                    let _ = socket.read(&mut vec![0; bytes.into()]);
                    sockets[index] = Some(socket);
                }
            }
            Step::HostShuts(index, write) => {
                if let Some((index, socket)) = socket(&mut sockets, index) {
                    let _ = socket.shutdown(match write {
                        true => Shutdown::Write,
                        false => Shutdown::Read,
                    });
                    sockets[index] = Some(socket);
                }
            }
            Step::HostCloses(index) => drop(socket(&mut sockets, index)),
            Step::Turn => {
                if device.turn().is_err() {
                    // The machine ends.
                    return;
                }
                let (connections, _) = device.held();
                assert!(connections <= sockets.len(), "{connections} connections");
            }
            Step::Save => device.save_and_restore(),
        }
    }
    // Whatever was left: nothing of it may hang.
    for _ in 0..4 {
        if device.turn().is_err() {
            return;
        }
    }
}

/// Where the guest's next chains go.
#[derive(Default)]
struct Guest {
    sent: u16,
    room: u16,
}

impl Guest {
    /// A packet in two descriptors, or three where its payload is long.
    fn send(&mut self, ram: &GuestRam, packet: &Packet) {
        let at = BUFFERS + u64::from(self.sent % 16) * 64;
        drop(ram.write_slice(&packet.header(), GuestAddress(at)));
        let payload = u32::from(packet.payload);
        let whole = [
            (at, 44, 0),
            (BUFFERS + 1024, payload / 2, 0),
            (RAM / 2 - 512, payload - payload / 2, 0),
        ];
        let chain = if payload == 0 {
            &whole[..1]
        } else {
            &whole[..]
        };
        offer_chain(ram, TRANSMIT, self.sent, chain);
        self.sent = (self.sent + chain.len() as u16) % 126;
    }

    fn room(&mut self, ram: &GuestRam, count: u8, bytes: u16) {
        for _ in 0..count % 32 {
            let at = RAM / 2 + u64::from(self.room) * 64;
            offer_chain(ram, RECEIVE, self.room, &[(at, bytes.into(), WRITE)]);
            self.room = (self.room + 1) % 128;
        }
    }
}
