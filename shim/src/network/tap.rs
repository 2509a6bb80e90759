//! A tap in the pod's network namespace: the guest's end of one interface. It is there for as long as somebody has its
//! descriptors, which is the VMM.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use husk_netlink::{LinkChange, Refusal, Socket, link};
use husk_proto::agent::Interface;

const TUN: &str = "/dev/net/tun";
/// What an interface's tap is called: the interface's index behind it.
const PREFIX: &str = "husk-";
/// As many as a device may have (husk-vmm's `devices/net`).
const QUEUES_MAX: u32 = 8;

/// A tap that is up.
#[derive(Debug)]
pub struct Tap {
    /// In its namespace.
    pub index: u32,
    /// One for each queue.
    pub queues: Vec<OwnedFd>,
    /// Of the guest's interface, and not the tap's own.
    pub mac: Vec<u8>,
    pub mtu: u32,
    /// Of the interface that it stands for.
    pub interface: String,
}

/// Of the tap of the interface with this index.
pub(super) fn name(index: u32) -> String {
    format!("{PREFIX}{index}")
}

/// Whether an interface is a tap of ours: by its name and its kind.
pub(super) fn is_ours(link: &link::Link) -> bool {
    link.kind == "tun" && link.name.starts_with(PREFIX)
}

impl Tap {
    /// In this thread's network namespace.
    pub fn make(
        socket: &mut Socket,
        name: &str,
        interface: &Interface,
        queues: u32,
    ) -> Result<Self, Refusal> {
        let queues = queues.clamp(1, QUEUES_MAX);
        let multi = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | multi;
        let mut fds = Vec::new();
        for queue in 0..queues {
            // The first one makes it, and takes nobody else's.
            let exclusive = if queue == 0 { libc::IFF_TUN_EXCL } else { 0 };
            fds.push(open(name, flags | exclusive)?);
        }
        let links = link::links(socket)?;
        let Some(tap) = links.iter().find(|link| link.name == name) else {
            return Err(io::Error::other("it is not there once it is made").into());
        };
        match link::change(socket, tap.index, &[LinkChange::NoLinkLocal]) {
            // There is no IPv6 on it anyway.
            Err(e) if !e.is(libc::EAFNOSUPPORT) => return Err(e),
            _ => {}
        }
        let up = [LinkChange::Mtu(interface.mtu), LinkChange::Up];
        link::change(socket, tap.index, &up)?;
        Ok(Self {
            index: tap.index,
            queues: fds,
            mac: interface.mac.clone(),
            mtu: interface.mtu,
            interface: interface.name.clone(),
        })
    }
}

fn open(name: &str, flags: libc::c_int) -> io::Result<OwnedFd> {
    let named = |e: io::Error| io::Error::new(e.kind(), format!("{TUN}: {e}"));
    let tun = File::options()
        .read(true)
        .write(true)
        .open(TUN)
        .map_err(named)?;
    // SAFETY: ifreq is plain data, for which zeroes are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The name that is taken is shorter than the field, so that its NUL stays.
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name.iter_mut().take(room).zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes an ifreq.
    if unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(tun.into())
}
