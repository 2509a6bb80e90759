//! The pod's network, as the host has it: interfaces with their addresses, routes, permanent neighbours, in the guest's
//! first network namespace. Each request says all of it; what an earlier one has set and this one no longer says is taken
//! away, and what others in the guest have made is left alone.
//!
//! It takes the kernel milliseconds, on a thread that may wait.

mod device;
mod wanted;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use husk_netlink::address::{self, IFA_F_NODAD, IFA_F_PERMANENT};
use husk_netlink::neighbour::{self, NUD_PERMANENT};
use husk_netlink::route::{self, RTPROT_BOOT, RTPROT_KERNEL};
use husk_netlink::{Address, Link, LinkChange, Neighbour, Refusal, Route, Socket, link};
use husk_proto::agent::SetNetworkRequest;

use crate::fault::Fault;
use wanted::{Interface, Wanted};

/// What was set last, as far as it went.
#[derive(Debug, Default)]
pub struct Network {
    set: Wanted,
}

impl Network {
    /// Makes the network what is said. sysfs is mounted.
    ///
    /// # Errors
    /// The request is wrong, an interface is not there, or the kernel refuses: that is named, and the rest is as it
    /// was set until then.
    pub fn set(&mut self, request: &SetNetworkRequest) -> Result<(), Fault> {
        let wanted = Wanted::read(request)?;
        let mut socket =
            Socket::open().map_err(|error| Fault::of_call("open a rtnetlink socket", error))?;
        for gone in &self.set.interfaces {
            if wanted.interfaces.iter().all(|kept| kept.slot != gone.slot) {
                device::remove(gone.slot)?;
            }
        }
        let slots: Vec<u32> = wanted.interfaces.iter().map(|i| i.slot).collect();
        let found = device::find(&slots)?;
        self.apply(&mut socket, wanted, &found)
    }

    /// `found` are the names that the interfaces have by now.
    fn apply(
        &mut self,
        socket: &mut Socket,
        wanted: Wanted,
        found: &[String],
    ) -> Result<(), Fault> {
        let mut kernel = Kernel(socket);
        kernel.rename(&wanted.interfaces, found)?;
        let links = kernel.links()?;
        for interface in &wanted.interfaces {
            kernel.set_up(interface, find(&links, &interface.name)?)?;
        }
        // From here on everything may be there in part.
        let before = std::mem::replace(&mut self.set, wanted);
        let wanted = &self.set;
        kernel.set_addresses(&before, wanted, &links)?;
        kernel.set_routes(&before, wanted, &links)?;
        kernel.set_neighbours(&before, wanted, &links)
    }
}

/// The kernel, spoken to in the requests' terms.
struct Kernel<'a>(&'a mut Socket);

impl Kernel<'_> {
    fn links(&mut self) -> Result<Vec<Link>, Fault> {
        link::links(self.0).map_err(|refusal| refused("list interfaces", refusal))
    }

    /// Gives interfaces their names; `found` are those that they have. One that is in the way has a name for a moment
    /// that nobody wants.
    fn rename(&mut self, interfaces: &[Interface], found: &[String]) -> Result<(), Fault> {
        let links = self.links()?;
        let mut moves: Vec<(u32, &str)> = Vec::new();
        for (interface, found) in interfaces.iter().zip(found) {
            if interface.name != *found {
                moves.push((find(&links, found)?.index, &interface.name));
            }
        }
        for (index, _) in &moves {
            let mut others = moves.iter().filter(|(other, _)| other != index);
            let is_in_the_way = links
                .iter()
                .any(|link| link.index == *index && others.any(|(_, name)| *name == link.name));
            if is_in_the_way {
                self.name(*index, &format!("husk{index}"))?;
            }
        }
        moves
            .iter()
            .try_for_each(|(index, name)| self.name(*index, name))
    }

    fn name(&mut self, index: u32, name: &str) -> Result<(), Fault> {
        link::change(self.0, index, &[LinkChange::Down])
            .and_then(|()| link::change(self.0, index, &[LinkChange::Name(name)]))
            .map_err(|refusal| refused(&format!("interface {name}: name it so"), refusal))
    }

    /// Hardware address and MTU; and up, with no address of the kernel's own making.
    fn set_up(&mut self, interface: &Interface, link: &Link) -> Result<(), Fault> {
        let mut change = |what: &str, change| {
            let changed = link::change(self.0, link.index, &[change]);
            changed.map_err(|refusal| (format!("interface {}: {what}", interface.name), refusal))
        };
        let failed = |(what, refusal): (String, _)| refused(&what, refusal);
        if link.mac != interface.mac {
            change("set its mac", LinkChange::Mac(&interface.mac)).map_err(failed)?;
        }
        if link.mtu != interface.mtu {
            change("set its mtu", LinkChange::Mtu(interface.mtu)).map_err(failed)?;
        }
        if link.is(libc::IFF_UP) {
            return Ok(());
        }
        match change("keep it from addresses of its own", LinkChange::NoLinkLocal) {
            // With an MTU below 1280 there is no IPv6 on it.
            Err((_, refusal)) if refusal.is(libc::EAFNOSUPPORT) => {}
            quiet => quiet.map_err(failed)?,
        }
        change("bring it up", LinkChange::Up).map_err(failed)
    }

    fn set_addresses(
        &mut self,
        before: &Wanted,
        wanted: &Wanted,
        links: &[Link],
    ) -> Result<(), Fault> {
        let is = |one: &Address, other: &Address| {
            one.ip == other.ip && one.prefix == other.prefix && one.peer == other.peer
        };
        for interface in &wanted.interfaces {
            let link = find(links, &interface.name)?.index;
            let of_before = before
                .interfaces
                .iter()
                .filter(|i| i.slot == interface.slot);
            for old in of_before.flat_map(|interface| &interface.addresses) {
                if interface.addresses.iter().any(|kept| is(kept, old)) {
                    continue;
                }
                let gone = address::remove(self.0, &Address { link, ..*old });
                or_not_there(gone, || {
                    format!("interface {}: remove address {}", interface.name, old.ip)
                })?;
            }
        }
        // Only now: with the first address of a network the kernel takes away the others.
        let there =
            address::addresses(self.0).map_err(|refusal| refused("list addresses", refusal))?;
        for interface in &wanted.interfaces {
            let link = find(links, &interface.name)?.index;
            for new in &interface.addresses {
                let new = Address {
                    link,
                    flags: IFA_F_NODAD,
                    ..*new
                };
                let same = |old: &&Address| {
                    old.link == link
                        && is(old, &new)
                        && old.broadcast == new.broadcast
                        && old.scope == new.scope
                        && old.flags & IFA_F_PERMANENT != 0
                };
                if there.iter().any(|old| same(&old)) {
                    continue;
                }
                let mut add = |new: &Address| {
                    address::add(self.0, new).map_err(|refusal| {
                        let what = format!(
                            "interface {}: add address {}/{}",
                            interface.name, new.ip, new.prefix
                        );
                        refused(&what, refusal)
                    })
                };
                add(&new)?;
                if new.ip.is_ipv6() {
                    // Once it is in use at once, it need not show that it was.
                    add(&Address { flags: 0, ..new })?;
                }
            }
        }
        Ok(())
    }

    /// Also takes away the kernel's own routes of addresses, where the host's interfaces are without: which is how
    /// some CNI plugins have a pod reach its neighbours through its gateway alone.
    fn set_routes(
        &mut self,
        before: &Wanted,
        wanted: &Wanted,
        links: &[Link],
    ) -> Result<(), Fault> {
        let there = route::routes(self.0).map_err(|refusal| refused("list routes", refusal))?;
        let resolve = |wanted: &Wanted| -> Vec<Route> {
            let routes = wanted.routes.iter().filter_map(|(route, interface)| {
                let link = match interface.as_str() {
                    "" => 0,
                    name => links.iter().find(|link| link.name == name)?.index,
                };
                Some(Route {
                    link,
                    ..route.clone()
                })
            });
            routes.collect()
        };
        let (old, new) = (resolve(before), resolve(wanted));
        let leads_to = |route: &Route, interface: &Interface| {
            let mut links = links.iter().filter(|link| link.name == interface.name);
            let mut addresses = interface.addresses.iter();
            links.any(|link| link.index == route.link)
                && addresses.any(|address| {
                    let network = network(address.peer.unwrap_or(address.ip), address.prefix);
                    (network, address.prefix) == (route.destination, route.prefix)
                })
        };
        let is_new = |route: &Route| new.iter().any(|new| is(new, route));
        for route in &there {
            let of_an_address = route.protocol == RTPROT_KERNEL
                && route.kind == libc::RTN_UNICAST
                && route.table == u32::from(libc::RT_TABLE_MAIN)
                && wanted
                    .interfaces
                    .iter()
                    .any(|interface| leads_to(route, interface));
            let was_set = old.iter().any(|old| is(old, route));
            if (was_set || of_an_address) && !is_new(route) {
                let gone = route::remove(self.0, route);
                or_not_there(gone, || format!("remove {}", named(route)))?;
            }
        }
        for (route, interface) in &wanted.routes {
            let link = match interface.as_str() {
                "" => 0,
                name => find(links, name)?.index,
            };
            let route = Route {
                link,
                protocol: RTPROT_BOOT,
                ..route.clone()
            };
            if there.iter().any(|there| is(there, &route)) {
                continue;
            }
            route::add(self.0, &route).map_err(|refusal| {
                refused(&format!("add {} dev {interface}", named(&route)), refusal)
            })?;
        }
        Ok(())
    }

    fn set_neighbours(
        &mut self,
        before: &Wanted,
        wanted: &Wanted,
        links: &[Link],
    ) -> Result<(), Fault> {
        for (old, interface) in &before.neighbours {
            let kept = |(new, at): &(Neighbour, String)| new.ip == old.ip && at == interface;
            let link = links.iter().find(|link| link.name == *interface);
            if let (false, Some(link)) = (wanted.neighbours.iter().any(kept), link) {
                let old = Neighbour {
                    link: link.index,
                    ..old.clone()
                };
                let gone = neighbour::remove(self.0, &old);
                or_not_there(gone, || {
                    format!("remove neighbour {} of {interface}", old.ip)
                })?;
            }
        }
        for (new, interface) in &wanted.neighbours {
            let new = Neighbour {
                link: find(links, interface)?.index,
                state: NUD_PERMANENT,
                ..new.clone()
            };
            neighbour::add(self.0, &new).map_err(|refusal| {
                refused(
                    &format!("interface {interface}: add neighbour {}", new.ip),
                    refusal,
                )
            })?;
        }
        Ok(())
    }
}

/// Whether two routes are one, whoever has made them.
fn is(one: &Route, other: &Route) -> bool {
    let anybodys = |route: &Route| Route {
        protocol: RTPROT_BOOT,
        // Of a route that leads nowhere: IPv6 has it lead to lo.
        link: if route.kind == libc::RTN_UNICAST {
            route.link
        } else {
            0
        },
        ..route.clone()
    };
    anybodys(one) == anybodys(other)
}

/// The first address of the network that so many bits of an address name.
fn network(ip: IpAddr, prefix: u8) -> IpAddr {
    let cleared = |bits: u32| bits.saturating_sub(prefix.into());
    match ip {
        IpAddr::V4(ip) => {
            let mask = u32::MAX.checked_shl(cleared(32)).unwrap_or(0);
            Ipv4Addr::from_bits(ip.to_bits() & mask).into()
        }
        IpAddr::V6(ip) => {
            let mask = u128::MAX.checked_shl(cleared(128)).unwrap_or(0);
            Ipv6Addr::from_bits(ip.to_bits() & mask).into()
        }
    }
}

fn named(route: &Route) -> String {
    let via = route.gateway.map(|gateway| format!(" via {gateway}"));
    format!(
        "route {}/{}{}",
        route.destination,
        route.prefix,
        via.unwrap_or_default()
    )
}

fn find<'a>(links: &'a [Link], name: &str) -> Result<&'a Link, Fault> {
    let found = links.iter().find(|link| link.name == name);
    found.ok_or_else(|| Fault::NotFound(format!("interface {name}: there is none of this name")))
}

fn or_not_there(gone: Result<(), Refusal>, what: impl FnOnce() -> String) -> Result<(), Fault> {
    match gone {
        Err(refusal)
            if ![libc::ESRCH, libc::ENOENT, libc::EADDRNOTAVAIL, libc::ENODEV]
                .iter()
                .any(|errno| refusal.is(*errno)) =>
        {
            Err(refused(&what(), refusal))
        }
        _ => Ok(()),
    }
}

fn refused(what: &str, refusal: Refusal) -> Fault {
    Fault::Broken(format!("{what}: {refusal}"))
}

#[cfg(test)]
mod tests;
