//! One vsock connection: a host socket on one side, the guest's stream on the other.
//!
//! Its two directions end apart from each other, as with any stream socket:
//!
//! ```text
//!             host end of file           guest took note
//! to guest:  Open ───────────────► Ended ┄┄┄┄┄┄┄┄┄┄┄┄┄► (SHUTDOWN told)
//!
//!             guest SHUTDOWN(send)           backlog empty
//! to host:   Open ───────────────► Flushing ──────────────► Ended (shutdown(2) of the socket)
//!               └── no reader on the host ──────────────────┘     (SHUTDOWN told)
//! ```
//!
//! and the connection as a whole goes through these phases:
//!
//! ```text
//! Requested ──RESPONSE──► Established ──RST, or SHUTDOWN of both directions──► Draining ──► over
//!     └────────RST──────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! *Requested*: the host has dialled, the guest has not answered. *Draining*: the guest has forgotten
//! the connection, and what it had sent before still has to reach the host. A connection that the
//! guest dialled starts Established, owing the RESPONSE.
//!
//! Flow control (virtio 1.2 §5.10.6.3): neither side sends more than the other said it can buffer.
//! Towards the guest, bytes are read from the socket straight into a packet, and only as many as there
//! is credit and room for: nothing is buffered here. From the guest, bytes go straight to the socket,
//! and what the socket does not take waits in `backlog`, which the credit given bounds. So a host that
//! does not read stalls its own connection and no other.
//!
//! Packets are made when the guest has room for one: the connection only remembers what it owes.

use std::{collections::VecDeque, num::Wrapping, os::fd::AsRawFd};

use husk_proto::{GUEST_CID, HOST_CID};

use super::{
    packet::{
        Header, OP_CREDIT_REQUEST, OP_CREDIT_UPDATE, OP_REQUEST, OP_RESPONSE, OP_RST, OP_RW,
        OP_SHUTDOWN, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
    },
    socket::{HostSocket, Transfer},
};
use crate::{
    memory::VolatileSlice,
    state,
    virtio::queue::{split, total},
};

/// Bytes that a connection buffers for the host: the credit a guest is given.
pub(super) const BUFFER: u32 = 256 << 10;
/// A guest is told of new credit when this much of it has gathered.
const CREDIT_STEP: u32 = BUFFER / 4;
/// Bytes of the backlog copied out per write.
const FLUSH: usize = 64 << 10;

/// The ports of a connection: what makes it one of many.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Requested,
    Established,
    Draining,
    Over,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ToHost {
    Open,
    /// The guest will send no more; the backlog remains.
    Flushing,
    Ended,
}

/// What the guest has to be told, in this order.
#[derive(Debug, Default)]
struct Owed {
    request: bool,
    response: bool,
    reset: bool,
    credit: bool,
}

pub(super) struct Connection {
    pub(super) ports: Ports,
    socket: HostSocket,
    phase: Phase,
    owed: Owed,

    /// The socket may have something to read; it said so, or was not asked yet.
    readable: bool,
    to_guest_open: bool,
    /// Bytes sent to the guest, and what the guest said of its buffer.
    sent: Wrapping<u32>,
    guest_buffer: u32,
    guest_taken: Wrapping<u32>,

    to_host: ToHost,
    backlog: VecDeque<u8>,
    /// Bytes received from the guest, how many of them have left the backlog, and how many of those
    /// the guest knows of.
    received: Wrapping<u32>,
    forwarded: Wrapping<u32>,
    forwarded_told: Wrapping<u32>,

    /// The other end of the socket was closed.
    hung_up: bool,
    /// SHUTDOWN flags that the guest knows of, or that it caused itself.
    shutdown_told: u32,
    /// Waits in the muxer's queue of connections with something to send.
    pub(super) queued: bool,
}

impl Connection {
    /// A connection that the host dials.
    pub(super) fn dial(socket: HostSocket, ports: Ports) -> Self {
        let owed = Owed {
            request: true,
            ..Owed::default()
        };
        Self::new(socket, ports, Phase::Requested, owed)
    }

    /// A connection that the guest dialled with `request`.
    pub(super) fn accept(socket: HostSocket, ports: Ports, request: &Header) -> Self {
        let owed = Owed {
            response: true,
            ..Owed::default()
        };
        let mut connection = Self::new(socket, ports, Phase::Established, owed);
        connection.note_credit(request);
        connection
    }

    fn new(socket: HostSocket, ports: Ports, phase: Phase, owed: Owed) -> Self {
        Self {
            ports,
            socket,
            phase,
            owed,
            readable: true,
            to_guest_open: true,
            sent: Wrapping(0),
            guest_buffer: 0,
            guest_taken: Wrapping(0),
            to_host: ToHost::Open,
            backlog: VecDeque::new(),
            received: Wrapping(0),
            forwarded: Wrapping(0),
            forwarded_told: Wrapping(0),
            hung_up: false,
            shutdown_told: 0,
            queued: false,
        }
    }

    /// A connection at rest, or why it is not, in words.
    pub(super) fn save(&self) -> Result<state::VsockConnection, String> {
        let open = self.phase == Phase::Established
            && self.to_guest_open
            && self.to_host == ToHost::Open
            && !self.hung_up
            && self.shutdown_told == 0;
        if !open {
            return Err("the agent's connection is being closed".to_owned());
        }
        if !self.backlog.is_empty() {
            let bytes = self.backlog.len();
            return Err(format!("{bytes} bytes of the agent's wait for the host"));
        }
        match self.socket.peek() {
            Transfer::Bytes(_) => return Err("bytes for the agent wait for the guest".to_owned()),
            Transfer::Over => return Err("the host has closed the agent's connection".to_owned()),
            Transfer::NotNow => {}
        }
        Ok(state::VsockConnection {
            host_port: self.ports.host,
            guest_port: self.ports.guest,
            sent: self.sent.0,
            guest_buffer: self.guest_buffer,
            guest_taken: self.guest_taken.0,
            received: self.received.0,
            forwarded_told: self.forwarded_told.0,
            owes_response: self.owed.response,
            owes_credit: self.owed.credit,
            ..Default::default()
        })
    }

    /// Goes on with a saved connection at another socket. The numbers bind nobody but the guest they
    /// came from: whatever they are, no more is buffered than [`BUFFER`].
    pub(super) fn restore(socket: HostSocket, saved: &state::VsockConnection) -> Self {
        let ports = Ports {
            host: saved.host_port,
            guest: saved.guest_port,
        };
        let owed = Owed {
            response: saved.owes_response,
            credit: saved.owes_credit,
            ..Owed::default()
        };
        Self {
            sent: Wrapping(saved.sent),
            guest_buffer: saved.guest_buffer,
            guest_taken: Wrapping(saved.guest_taken),
            received: Wrapping(saved.received),
            // The backlog is empty.
            forwarded: Wrapping(saved.received),
            forwarded_told: Wrapping(saved.forwarded_told),
            ..Self::new(socket, ports, Phase::Established, owed)
        }
    }

    /// Drops it, and leaves its socket to others.
    pub(super) fn leave(self) {
        self.socket.leave();
    }

    /// Bytes of the guest's that wait for the host.
    #[cfg(feature = "fuzzing")]
    pub(super) fn backlog(&self) -> usize {
        self.backlog.len()
    }

    pub(super) fn descriptor(&self) -> libc::c_int {
        self.socket.as_raw_fd()
    }

    /// Nothing is left to do; the connection can be dropped.
    pub(super) fn is_over(&self) -> bool {
        self.phase == Phase::Over && !self.owed.reset
    }

    /// The guest has forgotten this connection: its ports are free.
    pub(super) fn is_forgotten(&self) -> bool {
        matches!(self.phase, Phase::Draining | Phase::Over)
    }

    /// There is something for the guest that can be sent now.
    pub(super) fn has_packet(&self) -> bool {
        self.owed.reset
            || match self.phase {
                Phase::Requested => self.owed.request,
                Phase::Established => {
                    self.owed.response
                        || self.owed.credit
                        || self.shutdown_news() != 0
                        || (self.readable && self.to_guest_open && self.credit() > 0)
                }
                Phase::Draining | Phase::Over => false,
            }
    }

    /// The guest's packet of `header`, with `payload` as long as the header says.
    pub(super) fn take(&mut self, header: &Header, payload: &[VolatileSlice<'_>]) {
        self.note_credit(header);
        match (self.phase, header.op) {
            (_, OP_RST) => self.forget(),
            (Phase::Requested, OP_RESPONSE) => self.phase = Phase::Established,
            (Phase::Established, OP_RW) => self.take_data(payload),
            (Phase::Established, OP_SHUTDOWN) => self.take_shutdown(header.flags),
            (Phase::Established, OP_CREDIT_REQUEST) => self.owed.credit = true,
            (Phase::Established, OP_CREDIT_UPDATE) => {}
            // Whatever else: the guest and we do not mean the same connection.
            _ => self.abort(),
        }
    }

    /// The socket became ready, or its other end was closed.
    pub(super) fn host_ready(&mut self, readable: bool, writable: bool, hung_up: bool) {
        self.readable |= readable || hung_up;
        self.hung_up |= hung_up;
        if writable || hung_up {
            self.flush();
        }
        if hung_up && self.phase == Phase::Requested {
            self.abort();
        }
    }

    /// The next packet for the guest, its payload already in `room`; none if there is nothing after
    /// all. `room` is not empty.
    pub(super) fn make(&mut self, room: &[VolatileSlice<'_>]) -> Option<Header> {
        if self.owed.reset {
            self.owed.reset = false;
            return Some(self.packet(OP_RST));
        }
        match self.phase {
            Phase::Requested if self.owed.request => {
                self.owed.request = false;
                Some(self.packet(OP_REQUEST))
            }
            Phase::Established if self.owed.response => {
                self.owed.response = false;
                Some(self.packet(OP_RESPONSE))
            }
            Phase::Established => self
                .make_data(room)
                .or_else(|| self.make_shutdown())
                .or_else(|| self.owed.credit.then(|| self.packet(OP_CREDIT_UPDATE))),
            _ => None,
        }
    }

    fn make_data(&mut self, room: &[VolatileSlice<'_>]) -> Option<Header> {
        if !self.readable || !self.to_guest_open {
            return None;
        }
        let length = total(room).min(self.credit() as usize);
        let (target, _) = split(room, length).ok()?;
        if target.is_empty() {
            return None;
        }
        match self.socket.receive(&target) {
            Transfer::Bytes(bytes) => {
                let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
                self.sent += bytes;
                let mut packet = self.packet(OP_RW);
                packet.len = bytes;
                Some(packet)
            }
            Transfer::NotNow => {
                self.readable = false;
                None
            }
            Transfer::Over => {
                self.to_guest_open = false;
                None
            }
        }
    }

    fn make_shutdown(&mut self) -> Option<Header> {
        let news = self.shutdown_news();
        if news == 0 {
            return None;
        }
        self.shutdown_told |= news;
        let mut packet = self.packet(OP_SHUTDOWN);
        packet.flags = news;
        Some(packet)
    }

    /// The ends of our side that the guest does not know of.
    fn shutdown_news(&self) -> u32 {
        let mut flags = 0;
        if !self.to_guest_open {
            flags |= SHUTDOWN_SEND;
        }
        if self.to_host == ToHost::Ended || (self.hung_up && !self.to_guest_open) {
            flags |= SHUTDOWN_RECEIVE;
        }
        flags & !self.shutdown_told
    }

    /// Every packet tells the guest of its credit.
    fn packet(&mut self, op: u16) -> Header {
        self.owed.credit = false;
        self.forwarded_told = self.forwarded;
        Header {
            src_cid: HOST_CID.into(),
            dst_cid: GUEST_CID.into(),
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            len: 0,
            kind: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc: BUFFER,
            fwd_cnt: self.forwarded.0,
        }
    }

    fn note_credit(&mut self, header: &Header) {
        self.guest_buffer = header.buf_alloc;
        self.guest_taken = Wrapping(header.fwd_cnt);
    }

    /// Bytes the guest can still buffer.
    fn credit(&self) -> u32 {
        let in_flight = (self.sent - self.guest_taken).0;
        self.guest_buffer.saturating_sub(in_flight)
    }

    fn take_data(&mut self, payload: &[VolatileSlice<'_>]) {
        let length = u32::try_from(total(payload)).unwrap_or(u32::MAX);
        let buffered = (self.received - self.forwarded).0;
        let beyond_credit = length > BUFFER.saturating_sub(buffered);
        if beyond_credit || self.to_host == ToHost::Flushing {
            self.abort();
            return;
        }
        self.received += length;
        if self.to_host == ToHost::Ended {
            // Sent before the guest knew that nobody reads: gone, as in any broken pipe.
            self.note_forwarded(length as usize);
            return;
        }
        let mut rest = payload.to_vec();
        while self.backlog.is_empty() && !rest.is_empty() {
            match self.socket.send(&rest) {
                Transfer::Bytes(bytes) => {
                    self.note_forwarded(bytes);
                    rest = split(&rest, bytes).map_or(Vec::new(), |(_, rest)| rest);
                }
                Transfer::NotNow => break,
                Transfer::Over => {
                    self.note_forwarded(total(&rest));
                    self.end_to_host();
                    return;
                }
            }
        }
        for slice in rest {
            let mut copy = vec![0; slice.len()];
            slice.copy_to(&mut copy);
            self.backlog.extend(copy);
        }
    }

    fn take_shutdown(&mut self, flags: u32) {
        if flags & SHUTDOWN_SEND != 0 && self.to_host == ToHost::Open {
            self.to_host = ToHost::Flushing;
        }
        if flags & SHUTDOWN_RECEIVE != 0 && self.to_guest_open {
            self.to_guest_open = false;
            self.shutdown_told |= SHUTDOWN_SEND;
            self.socket.stop_reading();
        }
        if flags & SHUTDOWN_BOTH == SHUTDOWN_BOTH {
            // The guest closed its socket and waits for our word that we know.
            self.owed.reset = true;
            self.forget();
        } else {
            self.flush();
        }
    }

    /// Writes the backlog as far as the socket takes it.
    fn flush(&mut self) {
        while !self.backlog.is_empty() {
            let (front, _) = self.backlog.as_slices();
            let chunk = front.get(..front.len().min(FLUSH)).unwrap_or(front);
            match self.socket.send_bytes(chunk) {
                Transfer::Bytes(bytes) => {
                    self.backlog.drain(..bytes.min(self.backlog.len()));
                    self.note_forwarded(bytes);
                }
                Transfer::NotNow => return,
                Transfer::Over => {
                    self.note_forwarded(self.backlog.len());
                    self.end_to_host();
                    break;
                }
            }
        }
        // A stalled reader's buffer is not kept for its next stall.
        self.backlog = VecDeque::new();
        match (self.phase, self.to_host) {
            (Phase::Draining, _) => self.phase = Phase::Over,
            (_, ToHost::Flushing) => self.end_to_host(),
            _ => {}
        }
    }

    fn end_to_host(&mut self) {
        if self.to_host == ToHost::Flushing {
            // The guest ended this direction itself: no news for it.
            self.shutdown_told |= SHUTDOWN_RECEIVE;
        }
        self.to_host = ToHost::Ended;
        self.backlog = VecDeque::new();
        self.socket.stop_writing();
    }

    fn note_forwarded(&mut self, bytes: usize) {
        self.forwarded += u32::try_from(bytes).unwrap_or(u32::MAX);
        if (self.forwarded - self.forwarded_told).0 >= CREDIT_STEP {
            self.owed.credit = true;
        }
    }

    /// The guest knows this connection no more. What it had sent still goes to the host.
    fn forget(&mut self) {
        if self.is_forgotten() {
            return;
        }
        self.phase = Phase::Draining;
        self.socket.stop_reading();
        self.flush();
    }

    /// Ends the connection in disagreement.
    fn abort(&mut self) {
        if !self.is_forgotten() {
            self.owed.reset = true;
            self.forget();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn connection(saved: &state::VsockConnection) -> (UnixStream, Connection) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (
            theirs,
            Connection::restore(HostSocket::new(ours.into()), saved),
        )
    }

    const EDGES: [u32; 8] = [
        0,
        1,
        2,
        BUFFER,
        1 << 31,
        u32::MAX - BUFFER,
        u32::MAX - 1,
        u32::MAX,
    ];

    /// Counters around every border at which they turn over, or a guest lies.
    #[test]
    fn credit_is_what_the_guest_has_left_and_never_more() {
        for sent in EDGES {
            for guest_taken in EDGES {
                for guest_buffer in EDGES {
                    let saved = state::VsockConnection {
                        sent,
                        guest_taken,
                        guest_buffer,
                        ..Default::default()
                    };
                    let (_host, connection) = connection(&saved);
                    let in_flight = u64::from(sent.wrapping_sub(guest_taken));
                    let left = u64::from(guest_buffer).saturating_sub(in_flight);
                    assert_eq!(u64::from(connection.credit()), left);
                }
            }
        }
    }

    /// A host that reads nothing, and a guest whose counters are anywhere, that sends packets of every kind of length.
    #[test]
    fn what_waits_for_the_host_never_outgrows_the_buffer() {
        let mut bytes = vec![7; BUFFER as usize + 1];
        for received in EDGES {
            for length in [64, 4096, BUFFER / 3, BUFFER - 1, BUFFER, BUFFER + 1] {
                let saved = state::VsockConnection {
                    received,
                    forwarded_told: received,
                    ..Default::default()
                };
                let (_host, mut connection) = connection(&saved);
                let header = Header {
                    op: OP_RW,
                    len: length,
                    buf_alloc: BUFFER,
                    ..Header::default()
                };
                for _ in 0..4 * BUFFER / length + 1000 {
                    let payload = VolatileSlice::from(&mut bytes[..length as usize]);
                    connection.take(&header, &[payload]);
                    assert!(connection.backlog.len() <= BUFFER as usize);
                    if connection.is_forgotten() {
                        break;
                    }
                }
                assert!(
                    connection.is_forgotten(),
                    "{length}: it was given credit for ever"
                );
            }
        }
    }
}
