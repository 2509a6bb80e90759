//! Addresses of interfaces (`RTM_*ADDR`).

use std::net::IpAddr;

use crate::{
    family, ip,
    message::{self, Attributes, Request},
    octets,
    socket::{Refusal, Socket},
};

const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const IFA_FLAGS: u16 = 8;
/// Not to be looked for on the link before it is used.
pub const IFA_F_NODAD: u32 = 0x02;
/// Neither of a router's making nor for some time only.
pub const IFA_F_PERMANENT: u32 = 0x80;

/// An address that an interface has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    pub link: u32,
    pub ip: IpAddr,
    /// Length in bits.
    pub prefix: u8,
    /// The other end's, where it is not the address itself.
    pub peer: Option<IpAddr>,
    pub broadcast: Option<IpAddr>,
    /// `RT_SCOPE_*`.
    pub scope: u8,
    /// `IFA_F_*`.
    pub flags: u32,
}

pub fn addresses(socket: &mut Socket) -> Result<Vec<Address>, Refusal> {
    let found = socket.list(|| Request::new(libc::RTM_GETADDR, 0).fixed(&[0; 8]))?;
    Ok(found.iter().filter_map(|(_, body)| parse(body)).collect())
}

/// Adds it; one that is there with other properties gets these.
pub fn add(socket: &mut Socket, address: &Address) -> Result<(), Refusal> {
    let flags = libc::NLM_F_CREATE | libc::NLM_F_REPLACE;
    socket.ask(request(libc::RTM_NEWADDR, flags, address))
}

pub fn remove(socket: &mut Socket, address: &Address) -> Result<(), Refusal> {
    socket.ask(request(libc::RTM_DELADDR, 0, address))
}

fn request(kind: u16, flags: i32, address: &Address) -> Request {
    let index = address.link.to_ne_bytes();
    let mut fields = [
        family(address.ip),
        address.prefix,
        0,
        address.scope,
        0,
        0,
        0,
        0,
    ];
    fields[4..].copy_from_slice(&index);
    let local = octets(address.ip);
    let other = address.peer.map_or_else(|| local.clone(), octets);
    let mut request = Request::new(kind, flags)
        .fixed(&fields)
        .attribute(IFA_LOCAL, &local)
        .attribute(IFA_ADDRESS, &other)
        .u32(IFA_FLAGS, address.flags & !IFA_F_PERMANENT);
    if let Some(broadcast) = address.broadcast {
        request = request.attribute(IFA_BROADCAST, &octets(broadcast));
    }
    request
}

fn parse(body: &[u8]) -> Option<Address> {
    let [_, prefix, flags, scope, ..] = *body.first_chunk::<8>()?;
    let link = message::u32(body.get(4..)?)?;
    let (mut address, mut local, mut broadcast) = (None, None, None);
    let mut flags = u32::from(flags);
    for (kind, value) in Attributes(body.get(8..)?) {
        match kind {
            IFA_ADDRESS => address = ip(value),
            IFA_LOCAL => local = ip(value),
            IFA_BROADCAST => broadcast = ip(value),
            IFA_FLAGS => flags = message::u32(value)?,
            _ => {}
        }
    }
    let ip = local.or(address)?;
    Some(Address {
        link,
        ip,
        prefix,
        peer: address.filter(|other| *other != ip),
        broadcast,
        scope,
        flags,
    })
}
