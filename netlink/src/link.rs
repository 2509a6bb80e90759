//! Network interfaces (`RTM_*LINK`).

use crate::{
    message::{self, Attributes, Request},
    socket::{Refusal, Socket},
};

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINK: u16 = 5;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_LINK_NETNSID: u16 = 37;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;

/// An interface that is there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    /// `ARPHRD_*`.
    pub hardware: u16,
    /// `IFF_*`.
    pub flags: u32,
    pub mtu: u32,
    pub mac: Vec<u8>,
    /// As in `ip link add type`; empty for hardware.
    pub kind: String,
    /// The interface that this one is on top of, or whose other end it is, where that is in the same namespace.
    pub lower: Option<u32>,
    /// The bridge or bond that this one is a part of.
    pub master: Option<u32>,
}

impl Link {
    pub fn is(&self, flag: i32) -> bool {
        self.flags & (flag as u32) != 0
    }
}

/// What is to become of an interface.
#[derive(Clone, Copy, Debug)]
pub enum LinkChange<'a> {
    Name(&'a str),
    Mac(&'a [u8]),
    Mtu(u32),
    Up,
    Down,
    /// No IPv6 address of its own making.
    NoLinkLocal,
}

/// `struct ifinfomsg`.
fn head(index: u32, flags: u32, change: u32) -> [u8; 16] {
    let mut fields = [0; 16];
    fields[4..8].copy_from_slice(&index.to_ne_bytes());
    fields[8..12].copy_from_slice(&flags.to_ne_bytes());
    fields[12..16].copy_from_slice(&change.to_ne_bytes());
    fields
}

pub fn links(socket: &mut Socket) -> Result<Vec<Link>, Refusal> {
    let found = socket.list(|| Request::new(libc::RTM_GETLINK, 0).fixed(&head(0, 0, 0)))?;
    Ok(found.iter().filter_map(|(_, body)| parse(body)).collect())
}

/// All at once.
pub fn change(socket: &mut Socket, index: u32, changes: &[LinkChange<'_>]) -> Result<(), Refusal> {
    let up = libc::IFF_UP as u32;
    let (mut flags, mut mask) = (0, 0);
    for change in changes {
        match change {
            LinkChange::Up => (flags, mask) = (up, up),
            LinkChange::Down => (flags, mask) = (0, up),
            _ => {}
        }
    }
    let mut request = Request::new(libc::RTM_NEWLINK, 0).fixed(&head(index, flags, mask));
    for change in changes {
        request = match change {
            LinkChange::Name(name) => request.string(IFLA_IFNAME, name),
            LinkChange::Mac(mac) => request.attribute(IFLA_ADDRESS, mac),
            LinkChange::Mtu(mtu) => request.u32(IFLA_MTU, *mtu),
            LinkChange::NoLinkLocal => request.nested(IFLA_AF_SPEC, |families| {
                families.nested(libc::AF_INET6 as u16, |inet6| {
                    inet6.attribute(IFLA_INET6_ADDR_GEN_MODE, &[IN6_ADDR_GEN_MODE_NONE])
                })
            }),
            LinkChange::Up | LinkChange::Down => request,
        };
    }
    socket.ask(request)
}

fn parse(body: &[u8]) -> Option<Link> {
    let mut link = Link {
        hardware: message::u16(body.get(2..)?)?,
        index: message::u32(body.get(4..)?)?,
        flags: message::u32(body.get(8..)?)?,
        ..Link::default()
    };
    let mut elsewhere = false;
    for (kind, value) in Attributes(body.get(16..)?) {
        match kind {
            IFLA_ADDRESS => link.mac = value.to_vec(),
            IFLA_IFNAME => link.name = message::string(value),
            IFLA_MTU => link.mtu = message::u32(value)?,
            IFLA_LINK => link.lower = message::u32(value),
            IFLA_LINK_NETNSID => elsewhere = true,
            IFLA_MASTER => link.master = message::u32(value),
            IFLA_LINKINFO => {
                let mut info = Attributes(value);
                let kind = info.find(|(kind, _)| *kind == IFLA_INFO_KIND);
                link.kind = kind
                    .map(|(_, value)| message::string(value))
                    .unwrap_or_default();
            }
            _ => {}
        }
    }
    if elsewhere || link.lower == Some(link.index) {
        link.lower = None;
    }
    Some(link)
}
