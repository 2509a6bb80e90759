//! rtnetlink (rtnetlink(7)) as far as the shim speaks it in a pod's network namespace and the agent in the guest: the
//! same links, addresses, routes and neighbours, read on one side and written on the other. It decides nothing.
//!
//! A [`socket::Socket`] belongs to the network namespace of the thread that opened it, wherever it is used. Calls wait for the
//! kernel, so they belong on a thread that may; each wait has an end.

pub mod address;
pub mod link;
pub mod message;
pub mod neighbour;
pub mod news;
pub mod route;
pub mod rule;
pub mod socket;

pub use address::Address;
pub use link::{Link, LinkChange};
pub use neighbour::Neighbour;
pub use news::News;
pub use route::Route;
pub use socket::{Refusal, Socket};

/// The address that so many bytes are, in network order.
pub fn ip(bytes: &[u8]) -> Option<std::net::IpAddr> {
    let four = <[u8; 4]>::try_from(bytes).map(std::net::IpAddr::from);
    let sixteen = || <[u8; 16]>::try_from(bytes).map(std::net::IpAddr::from);
    four.or_else(|_| sixteen()).ok()
}

/// An address in network order.
pub fn octets(ip: std::net::IpAddr) -> Vec<u8> {
    match ip {
        std::net::IpAddr::V4(ip) => ip.octets().to_vec(),
        std::net::IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// rtnetlink's number of its family.
pub fn family(ip: std::net::IpAddr) -> u8 {
    match ip {
        std::net::IpAddr::V4(_) => libc::AF_INET as u8,
        std::net::IpAddr::V6(_) => libc::AF_INET6 as u8,
    }
}
