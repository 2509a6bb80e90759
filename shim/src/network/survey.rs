//! What there is in a pod's network namespace, and what of it the guest is told: interfaces with their addresses, routes
//! in an order in which they can be added, permanent neighbours. What cannot be told is refused by name.

use std::{collections::HashMap, path::Path, sync::Arc};

use husk_netlink::{
    Address, Link, Neighbour, Refusal, Route, Socket,
    address::{self, IFA_F_PERMANENT},
    link, neighbour, octets, route, rule,
};
use husk_proto::agent as api;

use super::{NetworkError, tap};

/// Least and most that an interface's MTU may be (proto/protos/machine.proto, Attach).
const MTU: std::ops::RangeInclusive<u32> = 68..=65535;

/// What the guest is to be told.
#[derive(Debug, Default)]
pub(super) struct Survey {
    pub found: Vec<Found>,
    /// Indexes of all interfaces, also of those that are not to be carried.
    pub there: Vec<u32>,
    pub routes: Vec<api::Route>,
    pub neighbours: Vec<api::Neighbour>,
}

/// An interface to be carried.
#[derive(Debug)]
pub(super) struct Found {
    /// In its namespace.
    pub index: u32,
    pub interface: api::Interface,
}

/// All that a namespace has.
#[derive(Debug, Default)]
struct Inventory {
    links: Vec<Link>,
    addresses: Vec<Address>,
    routes: Vec<Route>,
    neighbours: Vec<Neighbour>,
}

/// Of the socket's namespace, whose name in errors `path` is.
pub(super) fn take(socket: &mut Socket, path: &Path) -> Result<Survey, NetworkError> {
    let failed = |what: &str| {
        let (path, what) = (path.to_owned(), format!("list its {what}"));
        move |cause: Refusal| NetworkError::Kernel {
            path,
            what,
            cause: Arc::new(cause),
        }
    };
    let inventory = Inventory {
        links: link::links(socket).map_err(failed("interfaces"))?,
        addresses: address::addresses(socket).map_err(failed("addresses"))?,
        routes: route::routes(socket).map_err(failed("routes"))?,
        neighbours: neighbour::neighbours(socket).map_err(failed("neighbours"))?,
    };
    let rules = rule::made(socket).map_err(failed("rules"))?;
    if !rules.is_empty() {
        log::warn!(
            "network namespace {}: its policy rules (ip-rule(8), priorities {rules:?}) are not carried into the guest",
            path.display()
        );
    }
    for address in &inventory.addresses {
        let mut links = inventory.links.iter();
        let of_lo = links.any(|l| l.index == address.link && l.is(libc::IFF_LOOPBACK));
        if of_lo && !address.ip.is_loopback() {
            let (path, ip) = (path.display(), address.ip);
            log::warn!("network namespace {path}: lo's address {ip} is not carried into the guest");
        }
    }
    decide(&inventory).map_err(|(subject, reason)| NetworkError::Unfit {
        path: path.to_owned(),
        subject,
        reason,
    })
}

/// Of what, and why not.
type Unfit = (String, String);

fn decide(inventory: &Inventory) -> Result<Survey, Unfit> {
    let mut survey = Survey {
        there: inventory.links.iter().map(|link| link.index).collect(),
        ..Survey::default()
    };
    let mut names = HashMap::new();
    for link in &inventory.links {
        if link.is(libc::IFF_LOOPBACK) {
            names.insert(link.index, link.name.clone());
            continue;
        }
        // The kernel puts interfaces of its own into every namespace (`tunl0`, `gre0`), which are down.
        if tap::is_ours(link) || !link.is(libc::IFF_UP) {
            continue;
        }
        names.insert(link.index, link.name.clone());
        let interface = interface(link, &inventory.addresses)?;
        is_alone(link, &inventory.links)?;
        let index = link.index;
        survey.found.push(Found { index, interface });
    }
    for route in &inventory.routes {
        if let Some(route) = self::route(route, &names)? {
            survey.routes.push(route);
        }
    }
    // A gateway has to be on a link that a route leads to: those without one come first.
    survey.routes.sort_by_key(|route| !route.gateway.is_empty());
    for neighbour in &inventory.neighbours {
        let name = names.get(&neighbour.link);
        if neighbour.state & neighbour::NUD_PERMANENT == 0 || neighbour.mac.len() != 6 {
            continue;
        }
        if let Some(name) = name {
            survey.neighbours.push(api::Neighbour {
                interface: name.clone(),
                ip: octets(neighbour.ip),
                mac: neighbour.mac.clone(),
                ..api::Neighbour::default()
            });
        }
    }
    Ok(survey)
}

/// Whether all packets of the interface are its own: what is redirected never comes to a bridge or another interface
/// behind it.
fn is_alone(link: &Link, links: &[Link]) -> Result<(), Unfit> {
    let name = |index: u32| {
        let other = links.iter().find(|other| other.index == index);
        other.map_or_else(|| format!("interface {index}"), |other| other.name.clone())
    };
    let reason = match (link.lower, link.master) {
        (_, Some(master)) => format!("it is a part of {}", name(master)),
        // Its other end, which has packets of its own.
        (Some(_), None) if link.kind == "veth" => return Ok(()),
        (Some(lower), None) => format!("it is on top of {}, which has its packets", name(lower)),
        // What drops all packets need not ask for addresses.
        (None, None) if link.is(libc::IFF_NOARP) && link.kind != "dummy" => {
            "it asks nobody for addresses (NOARP), and a microVM's would".into()
        }
        (None, None) => return Ok(()),
    };
    Err((format!("interface {}", link.name), reason))
}

fn interface(link: &Link, addresses: &[Address]) -> Result<api::Interface, Unfit> {
    let subject = format!("interface {}", link.name);
    let unfit = |reason: String| Err((subject.clone(), reason));
    if link.hardware != libc::ARPHRD_ETHER || link.mac.len() != 6 {
        let (hardware, kind) = (link.hardware, &link.kind);
        return unfit(format!(
            "its hardware is no ethernet (ARPHRD {hardware}, {kind:?}): only that can be carried into a microVM"
        ));
    }
    if !MTU.contains(&link.mtu) {
        return unfit(format!("mtu {} is not within {MTU:?}", link.mtu));
    }
    let mut interface = api::Interface {
        name: link.name.clone(),
        mac: link.mac.clone(),
        mtu: link.mtu,
        ..api::Interface::default()
    };
    for address in addresses
        .iter()
        .filter(|address| address.link == link.index)
    {
        // Of a router's making: the guest hears the router itself.
        if address.flags & IFA_F_PERMANENT == 0 {
            continue;
        }
        interface.addresses.push(api::Address {
            ip: octets(address.ip),
            prefix: address.prefix.into(),
            broadcast: address.broadcast.map(octets).unwrap_or_default(),
            scope: address.scope.into(),
            peer: address.peer.map(octets).unwrap_or_default(),
            ..api::Address::default()
        });
    }
    Ok(interface)
}

/// None for what the guest's kernel makes itself, or hears from a router; and for what belongs to no interface of the guest.
fn route(route: &Route, names: &HashMap<u32, String>) -> Result<Option<api::Route>, Unfit> {
    let leads = route.kind == libc::RTN_UNICAST;
    let is_the_kernels = route.protocol == route::RTPROT_KERNEL && !leads;
    let is_the_routers = route.protocol == route::RTPROT_RA;
    if route.table == u32::from(libc::RT_TABLE_LOCAL) || is_the_kernels || is_the_routers {
        return Ok(None);
    }
    let interface = match names.get(&route.link) {
        _ if !leads => String::new(),
        Some(name) => name.clone(),
        // Through several, or through one that is not carried.
        None if route.beyond.is_none() => return Ok(None),
        None => String::new(),
    };
    if let Some(beyond) = route.beyond {
        let subject = format!("route to {}/{}", route.destination, route.prefix);
        let reason = format!("{beyond} cannot be carried into a microVM");
        return Err((subject, reason));
    }
    Ok(Some(api::Route {
        destination: octets(route.destination),
        prefix: route.prefix.into(),
        gateway: route.gateway.map(octets).unwrap_or_default(),
        source: route.source.map(octets).unwrap_or_default(),
        interface,
        scope: route.scope.into(),
        metric: route.metric,
        onlink: route.onlink,
        kind: route.kind.into(),
        table: route.table,
        mtu: route.mtu,
        ..api::Route::default()
    }))
}
