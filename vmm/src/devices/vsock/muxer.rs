//! All vsock connections of a guest: which packet belongs to which connection, who may connect, and
//! whose turn it is to send.
//!
//! Owned by the vsock thread; while the device is not active, by the device. It knows nothing of
//! queues: it takes packets and makes packets.
//!
//! The guest may dial one port, [`AGENT_PORT`], and once: the socket for it came with the machine.
//! The host dials any port. Connections with something to send take turns, a burst of packets each.

use std::{
    collections::{HashMap, VecDeque},
    io,
    os::fd::OwnedFd,
};

use husk_proto::{AGENT_PORT, GUEST_CID, HOST_CID};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::{
    connection::{Connection, Ports},
    packet::{Header, OP_REQUEST, OP_RST, TYPE_STREAM},
    socket::HostSocket,
};
use crate::memory::VolatileSlice;

/// Connections at one time, those that only drain included.
pub(super) const CONNECTIONS_MAX: usize = 1024;
/// Resets owed for packets of connections that do not exist. While so many wait for room, the
/// guest's packets are left where they are.
const RESETS_MAX: usize = 256;
/// Packets a connection may send before the next one has its turn.
const BURST: u32 = 16;
/// Host ports of connections that the host dials, clear of every port with a meaning.
pub(super) const FIRST_HOST_PORT: u32 = 1 << 30;

pub(super) struct Muxer {
    /// Sockets are watched edge-triggered, with the connection's place as the event's data.
    epoll: Epoll,
    places: Vec<Option<Connection>>,
    free: Vec<usize>,
    by_ports: HashMap<Ports, usize>,
    /// Places of connections that have a packet.
    ready: VecDeque<usize>,
    burst: u32,
    resets: VecDeque<Header>,
    /// For the guest's first connection to [`AGENT_PORT`].
    agent: Option<OwnedFd>,
    next_host_port: u32,
}

impl Muxer {
    pub(super) fn new(agent: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            epoll: Epoll::new()?,
            places: Vec::new(),
            free: Vec::new(),
            by_ports: HashMap::new(),
            ready: VecDeque::new(),
            burst: 0,
            resets: VecDeque::new(),
            agent: Some(agent),
            next_host_port: FIRST_HOST_PORT,
        })
    }

    /// Every connection that is not over.
    pub(super) fn connections(&self) -> impl Iterator<Item = &Connection> {
        self.places.iter().flatten()
    }

    /// Resets for packets that belong to nothing.
    pub(super) fn resets_owed(&self) -> &VecDeque<Header> {
        &self.resets
    }

    /// The socket for the guest's first connection, until it comes.
    pub(super) fn agent(&self) -> Option<&OwnedFd> {
        self.agent.as_ref()
    }

    pub(super) fn take_agent(&mut self) -> Option<OwnedFd> {
        self.agent.take()
    }

    pub(super) fn next_host_port(&self) -> u32 {
        self.next_host_port
    }

    pub(super) fn set_next_host_port(&mut self, port: u32) {
        self.next_host_port = port;
    }

    /// Where sockets are watched. The thread adds events of its own, with data from
    /// [`CONNECTIONS_MAX`] on.
    pub(super) fn epoll(&self) -> &Epoll {
        &self.epoll
    }

    /// Dials `guest_port` for the socket `fd`. A socket that cannot be served is closed, which its
    /// other end sees as a refusal.
    pub(super) fn dial(&mut self, fd: OwnedFd, guest_port: u32) {
        let mut ports = Ports {
            host: self.next_host_port,
            guest: guest_port,
        };
        while self.by_ports.contains_key(&ports) {
            ports.host = following_port(ports.host);
        }
        self.next_host_port = following_port(ports.host);
        self.add(Connection::dial(HostSocket::new(fd), ports));
    }

    /// The socket of the connection at `place` is ready.
    pub(super) fn socket_ready(&mut self, place: usize, events: EventSet) {
        let failed = events.contains(EventSet::ERROR);
        let hung_up = failed || events.contains(EventSet::HANG_UP);
        let readable = events.intersects(EventSet::IN | EventSet::READ_HANG_UP);
        if let Some(Some(connection)) = self.places.get_mut(place) {
            connection.host_ready(readable, events.contains(EventSet::OUT), hung_up);
            self.settle(place);
        }
    }

    /// Whether another packet of the guest's can be taken.
    pub(super) fn takes_packets(&self) -> bool {
        self.resets.len() < RESETS_MAX
    }

    /// Whether there is, as far as is known, a packet for the guest.
    pub(super) fn has_packet(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// A packet of the guest's, with a payload as long as its header says.
    pub(super) fn take(&mut self, header: &Header, payload: &[VolatileSlice<'_>]) {
        // Who lies about its address gets no answer: it would go elsewhere (virtio 1.2 §5.10.6.4).
        if header.src_cid != u64::from(GUEST_CID) || header.dst_cid != u64::from(HOST_CID) {
            return;
        }
        let ports = Ports {
            host: header.dst_port,
            guest: header.src_port,
        };
        let place = self.by_ports.get(&ports).copied();
        match place {
            _ if header.kind != TYPE_STREAM => self.refuse(header),
            Some(place) => {
                if let Some(Some(connection)) = self.places.get_mut(place) {
                    connection.take(header, payload);
                    self.settle(place);
                }
            }
            None if header.op == OP_REQUEST && ports.host == AGENT_PORT => {
                match self.agent.take() {
                    Some(fd) => {
                        self.add(Connection::accept(HostSocket::new(fd), ports, header));
                    }
                    None => self.refuse(header),
                }
            }
            None if header.op == OP_RST => {}
            None => self.refuse(header),
        }
    }

    /// The next packet for the guest, its payload already in `room`, which is not empty. None when
    /// there is nothing after all.
    pub(super) fn make(&mut self, room: &[VolatileSlice<'_>]) -> Option<Header> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(reset);
        }
        while let Some(place) = self.ready.front().copied() {
            let packet = match self.places.get_mut(place) {
                Some(Some(connection)) => connection.make(room),
                _ => None,
            };
            self.burst += 1;
            let goes_on = packet.is_some() && self.burst < BURST && self.has_packet_at(place);
            if !goes_on {
                self.burst = 0;
                self.ready.pop_front();
                if let Some(Some(connection)) = self.places.get_mut(place) {
                    connection.queued = false;
                }
                self.settle(place);
            }
            if packet.is_some() {
                return packet;
            }
        }
        None
    }

    /// Closes every connection; the guest's driver has forgotten them.
    pub(super) fn reset(&mut self) {
        self.places.clear();
        self.free.clear();
        self.by_ports.clear();
        self.ready.clear();
        self.resets.clear();
        self.burst = 0;
    }

    /// Drops every connection, and leaves the sockets to others.
    pub(super) fn leave(&mut self) {
        for connection in self.places.drain(..).flatten() {
            connection.leave();
        }
        self.reset();
    }

    fn has_packet_at(&self, place: usize) -> bool {
        matches!(self.places.get(place), Some(Some(connection)) if connection.has_packet())
    }

    pub(super) fn add(&mut self, connection: Connection) {
        let live = self.places.len() - self.free.len();
        if live >= CONNECTIONS_MAX {
            log::warn!("vsock: {live} connections are open, one more is refused");
            return;
        }
        let place = self.free.pop().unwrap_or_else(|| {
            self.places.push(None);
            self.places.len() - 1
        });
        let events =
            EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        let watched = self.epoll.ctl(
            ControlOperation::Add,
            connection.descriptor(),
            EpollEvent::new(events, place as u64),
        );
        if let Err(e) = watched {
            log::warn!("vsock: watch a socket: {e}");
            self.free.push(place);
            return;
        }
        self.by_ports.insert(connection.ports, place);
        if let Some(slot) = self.places.get_mut(place) {
            *slot = Some(connection);
        }
        self.settle(place);
    }

    /// Draws the consequences of what happened to the connection at `place`.
    fn settle(&mut self, place: usize) {
        let Some(slot) = self.places.get_mut(place) else {
            return;
        };
        let Some(connection) = slot else {
            return;
        };
        if connection.is_forgotten() && self.by_ports.get(&connection.ports) == Some(&place) {
            self.by_ports.remove(&connection.ports);
        }
        if connection.is_over() {
            // The socket leaves the epoll with its last descriptor. A place still in the queue of
            // turns finds nobody there, or its next holder one turn early.
            *slot = None;
            self.free.push(place);
        } else if connection.has_packet() && !connection.queued {
            connection.queued = true;
            self.ready.push_back(place);
        }
    }

    /// Answers a packet that belongs to nothing.
    fn refuse(&mut self, header: &Header) {
        if header.op != OP_RST {
            self.resets.push_back(Header {
                src_cid: header.dst_cid,
                dst_cid: header.src_cid,
                src_port: header.dst_port,
                dst_port: header.src_port,
                kind: header.kind,
                op: OP_RST,
                ..Header::default()
            });
        }
    }
}

fn following_port(port: u32) -> u32 {
    match port.checked_add(1) {
        // The last value means "any port".
        Some(next) if next != u32::MAX => next,
        _ => FIRST_HOST_PORT,
    }
}
