//! A request for a network, read: what is malformed is refused here, by the name of its field.

use std::collections::HashSet;
use std::net::IpAddr;

use husk_netlink::{Address, Neighbour, Route, family, ip, route};
use husk_proto::agent as api;

use crate::fault::Fault;

/// Slots of a PCI bus.
const SLOTS: u32 = 32;
/// As the contract has it (machine.proto, Attach).
const MTU: std::ops::RangeInclusive<u32> = 68..=65535;
/// Bytes of a name, with its NUL.
const IFNAMSIZ: usize = 16;

/// A network, in the order of the request.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    pub(super) interfaces: Vec<Interface>,
    /// Each with its interface's name, "" for none: the index is the kernel's to say.
    pub(super) routes: Vec<(Route, String)>,
    pub(super) neighbours: Vec<(Neighbour, String)>,
}

#[derive(Debug)]
pub(super) struct Interface {
    pub(super) slot: u32,
    pub(super) name: String,
    pub(super) mac: Vec<u8>,
    pub(super) mtu: u32,
    pub(super) addresses: Vec<Address>,
}

impl Wanted {
    pub(super) fn read(request: &api::SetNetworkRequest) -> Result<Self, Fault> {
        let mut wanted = Self::default();
        let (mut slots, mut names) = (HashSet::new(), HashSet::new());
        for (number, interface) in request.interfaces.iter().enumerate() {
            let at = format!("interfaces[{number}]");
            let read = self::interface(&at, interface)?;
            if !slots.insert(read.slot) {
                return invalid(format!("{at}.slot: {} is another one's", read.slot));
            }
            if !names.insert(read.name.clone()) {
                return invalid(format!("{at}.name: {:?} is another one's", read.name));
            }
            wanted.interfaces.push(read);
        }
        for (number, route) in request.routes.iter().enumerate() {
            let read = self::route(&format!("routes[{number}]"), route)?;
            wanted.routes.push((read, route.interface.clone()));
        }
        for (number, neighbour) in request.neighbours.iter().enumerate() {
            let at = format!("neighbours[{number}]");
            let read = Neighbour {
                link: 0,
                ip: address(&format!("{at}.ip"), &neighbour.ip)?,
                mac: mac(&at, &neighbour.mac)?,
                state: 0,
            };
            wanted.neighbours.push((read, neighbour.interface.clone()));
        }
        Ok(wanted)
    }
}

fn interface(at: &str, interface: &api::Interface) -> Result<Interface, Fault> {
    let (slot, name, mtu) = (interface.slot, &interface.name, interface.mtu);
    if slot == 0 || slot >= SLOTS {
        return invalid(format!("{at}.slot: {slot} is none of an interface"));
    }
    // As the kernel has it (dev_valid_name).
    let odd = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
    let reserved = ["", ".", "..", "lo"].contains(&name.as_str());
    if reserved || name.len() >= IFNAMSIZ || name.contains(odd) {
        return invalid(format!("{at}.name: {name:?} cannot be an interface's"));
    }
    if !MTU.contains(&mtu) {
        return invalid(format!("{at}.mtu: {mtu} is not within {MTU:?}"));
    }
    let addresses = interface
        .addresses
        .iter()
        .enumerate()
        .map(|(number, address)| {
            let at = format!("{at}.addresses[{number}]");
            let ip = self::address(&format!("{at}.ip"), &address.ip)?;
            let peer = optional(&format!("{at}.peer"), &address.peer)?;
            if peer.is_some_and(|peer| family(peer) != family(ip)) {
                return invalid(format!("{at}.peer: not of the address' family"));
            }
            Ok(Address {
                link: 0,
                ip,
                prefix: prefix(&at, ip, address.prefix)?,
                peer,
                broadcast: optional(&format!("{at}.broadcast"), &address.broadcast)?,
                scope: byte(&format!("{at}.scope"), address.scope)?,
                flags: 0,
            })
        });
    Ok(Interface {
        slot,
        name: name.clone(),
        mac: mac(at, &interface.mac)?,
        mtu,
        addresses: addresses.collect::<Result<_, Fault>>()?,
    })
}

fn route(at: &str, route: &api::Route) -> Result<Route, Fault> {
    let destination = address(&format!("{at}.destination"), &route.destination)?;
    let source = optional(&format!("{at}.source"), &route.source)?;
    if source.is_some_and(|source| family(source) != family(destination)) {
        return invalid(format!("{at}.source: not of the destination's family"));
    }
    let kind = byte(&format!("{at}.kind"), route.kind)?;
    if kind == libc::RTN_UNICAST && route.interface.is_empty() {
        return invalid(format!("{at}.interface: is empty"));
    }
    Ok(Route {
        destination,
        prefix: prefix(at, destination, route.prefix)?,
        gateway: optional(&format!("{at}.gateway"), &route.gateway)?,
        source,
        link: 0,
        scope: byte(&format!("{at}.scope"), route.scope)?,
        metric: route.metric,
        onlink: route.onlink,
        kind,
        table: route.table,
        mtu: route.mtu,
        protocol: route::RTPROT_BOOT,
        beyond: None,
    })
}

fn address(at: &str, bytes: &[u8]) -> Result<IpAddr, Fault> {
    ip(bytes).map_or_else(
        || invalid(format!("{at}: {} bytes are no address", bytes.len())),
        Ok,
    )
}

fn optional(at: &str, bytes: &[u8]) -> Result<Option<IpAddr>, Fault> {
    match bytes {
        [] => Ok(None),
        bytes => address(at, bytes).map(Some),
    }
}

fn mac(at: &str, bytes: &[u8]) -> Result<Vec<u8>, Fault> {
    match bytes.len() {
        6 => Ok(bytes.to_vec()),
        length => invalid(format!("{at}.mac: {length} bytes are no hardware address")),
    }
}

fn prefix(at: &str, ip: IpAddr, prefix: u32) -> Result<u8, Fault> {
    let most = if ip.is_ipv4() { 32 } else { 128 };
    match u8::try_from(prefix) {
        Ok(prefix) if prefix <= most => Ok(prefix),
        _ => invalid(format!("{at}.prefix: {prefix} is more than {most}")),
    }
}

fn byte(at: &str, value: u32) -> Result<u8, Fault> {
    u8::try_from(value).or_else(|_| invalid(format!("{at}: {value} is more than 255")))
}

fn invalid<T>(message: String) -> Result<T, Fault> {
    Err(Fault::Invalid(message))
}
