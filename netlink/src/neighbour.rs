//! Neighbours (`RTM_*NEIGH`): which hardware address an address has on its link.

use std::net::IpAddr;

use crate::{
    family, ip,
    message::{self, Attributes, Request},
    octets,
    socket::{Refusal, Socket},
};

const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
/// Never asked for again.
pub const NUD_PERMANENT: u16 = 0x80;

/// An entry of the neighbours' table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    pub link: u32,
    pub ip: IpAddr,
    pub mac: Vec<u8>,
    /// `NUD_*`.
    pub state: u16,
}

/// `struct ndmsg`.
fn head(family: u8, link: u32, state: u16) -> [u8; 12] {
    let mut fields = [0; 12];
    fields[0] = family;
    fields[4..8].copy_from_slice(&link.to_ne_bytes());
    fields[8..10].copy_from_slice(&state.to_ne_bytes());
    fields
}

pub fn neighbours(socket: &mut Socket) -> Result<Vec<Neighbour>, Refusal> {
    let mut all = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        let fields = head(family as u8, 0, 0);
        let found = socket.list(|| Request::new(libc::RTM_GETNEIGH, 0).fixed(&fields))?;
        all.extend(found.iter().filter_map(|(_, body)| parse(body)));
    }
    Ok(all)
}

/// Adds it, or gives what is there this hardware address.
pub fn add(socket: &mut Socket, neighbour: &Neighbour) -> Result<(), Refusal> {
    let fields = head(family(neighbour.ip), neighbour.link, neighbour.state);
    let request = Request::new(libc::RTM_NEWNEIGH, libc::NLM_F_CREATE | libc::NLM_F_REPLACE)
        .fixed(&fields)
        .attribute(NDA_DST, &octets(neighbour.ip))
        .attribute(NDA_LLADDR, &neighbour.mac);
    socket.ask(request)
}

pub fn remove(socket: &mut Socket, neighbour: &Neighbour) -> Result<(), Refusal> {
    let fields = head(family(neighbour.ip), neighbour.link, 0);
    let request = Request::new(libc::RTM_DELNEIGH, 0)
        .fixed(&fields)
        .attribute(NDA_DST, &octets(neighbour.ip));
    socket.ask(request)
}

fn parse(body: &[u8]) -> Option<Neighbour> {
    let link = message::u32(body.get(4..)?)?;
    let state = message::u16(body.get(8..)?)?;
    let (mut address, mut mac) = (None, Vec::new());
    for (kind, value) in Attributes(body.get(12..)?) {
        match kind {
            NDA_DST => address = ip(value),
            NDA_LLADDR => mac = value.to_vec(),
            _ => {}
        }
    }
    Some(Neighbour {
        link,
        ip: address?,
        mac,
        state,
    })
}
