//! Routes (`RTM_*ROUTE`).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::{
    family, ip,
    message::{self, Attributes, Request},
    octets,
    socket::{Refusal, Socket},
};

const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_PREFSRC: u16 = 7;
const RTA_METRICS: u16 = 8;
const RTA_MULTIPATH: u16 = 9;
const RTA_TABLE: u16 = 15;
const RTA_VIA: u16 = 18;
const RTA_ENCAP: u16 = 22;
const RTAX_MTU: u16 = 2;
const RTNH_F_ONLINK: u32 = 4;
/// `struct rtmsg`.
const HEAD: usize = 12;

/// Routes of the kernel's own, of addresses.
pub const RTPROT_KERNEL: u8 = 2;
/// As `ip route add` and CNI's plugins have it.
pub const RTPROT_BOOT: u8 = 3;
/// Of router advertisements.
pub const RTPROT_RA: u8 = 9;

/// A route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    pub destination: IpAddr,
    /// Length in bits.
    pub prefix: u8,
    /// Possibly of the other family.
    pub gateway: Option<IpAddr>,
    /// Preferred source.
    pub source: Option<IpAddr>,
    /// 0: none.
    pub link: u32,
    /// `RT_SCOPE_*`.
    pub scope: u8,
    pub metric: u32,
    pub onlink: bool,
    /// `RTN_*`.
    pub kind: u8,
    pub table: u32,
    /// 0: the link's.
    pub mtu: u32,
    /// `RTPROT_*`.
    pub protocol: u8,
    /// What it has beyond that, by the name that ip-route(8) has for it.
    pub beyond: Option<&'static str>,
}

/// Of both families and all tables, without what the kernel has made of others for a while.
pub fn routes(socket: &mut Socket) -> Result<Vec<Route>, Refusal> {
    let mut all = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        let mut fields = [0; HEAD];
        fields[0] = family as u8;
        let found = socket.list(|| Request::new(libc::RTM_GETROUTE, 0).fixed(&fields))?;
        all.extend(found.iter().filter_map(|(_, body)| parse(body)));
    }
    Ok(all)
}

/// Adds it beside others to the same destination.
pub fn add(socket: &mut Socket, route: &Route) -> Result<(), Refusal> {
    let flags = libc::NLM_F_CREATE | libc::NLM_F_APPEND;
    socket.ask(request(libc::RTM_NEWROUTE, flags, route))
}

pub fn remove(socket: &mut Socket, route: &Route) -> Result<(), Refusal> {
    socket.ask(request(libc::RTM_DELROUTE, 0, route))
}

fn request(kind: u16, flags: i32, route: &Route) -> Request {
    let mut fields = [0; HEAD];
    fields[0] = family(route.destination);
    fields[1] = route.prefix;
    // Which says a table below 256 again, and is what counts where the attribute is not known.
    fields[4] = u8::try_from(route.table).unwrap_or(0);
    fields[5] = route.protocol;
    fields[6] = route.scope;
    fields[7] = route.kind;
    if route.onlink {
        fields[8..].copy_from_slice(&RTNH_F_ONLINK.to_ne_bytes());
    }
    let mut request = Request::new(kind, flags)
        .fixed(&fields)
        .u32(RTA_TABLE, route.table);
    if route.prefix > 0 {
        request = request.attribute(RTA_DST, &octets(route.destination));
    }
    if route.link != 0 {
        request = request.u32(RTA_OIF, route.link);
    }
    if route.metric != 0 {
        request = request.u32(RTA_PRIORITY, route.metric);
    }
    if let Some(source) = route.source {
        request = request.attribute(RTA_PREFSRC, &octets(source));
    }
    match route.gateway {
        Some(gateway) if family(gateway) == fields[0] => {
            request = request.attribute(RTA_GATEWAY, &octets(gateway));
        }
        Some(gateway) => {
            // `struct rtvia`.
            let mut via = u16::from(family(gateway)).to_ne_bytes().to_vec();
            via.extend_from_slice(&octets(gateway));
            request = request.attribute(RTA_VIA, &via);
        }
        None => {}
    }
    if route.mtu != 0 {
        request = request.nested(RTA_METRICS, |metrics| metrics.u32(RTAX_MTU, route.mtu));
    }
    request
}

fn parse(body: &[u8]) -> Option<Route> {
    let [
        of,
        prefix,
        source_prefix,
        tos,
        table,
        protocol,
        scope,
        kind,
        ..,
    ] = *body.first_chunk::<HEAD>()?;
    let flags = message::u32(body.get(8..)?)?;
    let any: IpAddr = match i32::from(of) {
        libc::AF_INET => Ipv4Addr::UNSPECIFIED.into(),
        libc::AF_INET6 => Ipv6Addr::UNSPECIFIED.into(),
        _ => return None,
    };
    if flags & libc::RTM_F_CLONED != 0 {
        return None;
    }
    let mut route = Route {
        destination: any,
        prefix,
        gateway: None,
        source: None,
        link: 0,
        scope,
        metric: 0,
        onlink: flags & RTNH_F_ONLINK != 0,
        kind,
        table: table.into(),
        mtu: 0,
        protocol,
        beyond: None,
    };
    if tos != 0 {
        route.beyond = Some("tos");
    }
    if source_prefix != 0 {
        route.beyond = Some("from");
    }
    for (kind, value) in Attributes(body.get(HEAD..)?) {
        match kind {
            RTA_DST => route.destination = ip(value)?,
            RTA_OIF => route.link = message::u32(value)?,
            RTA_GATEWAY => route.gateway = ip(value),
            RTA_VIA => route.gateway = ip(value.get(2..)?),
            RTA_PRIORITY => route.metric = message::u32(value)?,
            RTA_PREFSRC => route.source = ip(value),
            RTA_TABLE => route.table = message::u32(value)?,
            RTA_METRICS => {
                for (metric, value) in Attributes(value) {
                    match metric {
                        RTAX_MTU => route.mtu = message::u32(value)?,
                        // Of no weight with a value of 0, which the kernel lists for IPv6.
                        _ if value.iter().all(|byte| *byte == 0) => {}
                        _ => route.beyond = Some("a metric other than mtu"),
                    }
                }
            }
            RTA_MULTIPATH => route.beyond = Some("nexthop"),
            RTA_ENCAP => route.beyond = Some("encap"),
            _ => {}
        }
    }
    Some(route)
}
