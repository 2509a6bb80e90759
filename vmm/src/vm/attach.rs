//! Network interfaces that are plugged into a machine, and pulled out of it again.
//!
//! The bus is locked for it, as for a vCPU's access: whether the vCPUs run makes no difference.

use std::{
    os::fd::OwnedFd,
    sync::{Arc, PoisonError},
};

use super::Vm;
use crate::{
    devices::net::{self, Net, Tap, TapError, Vhost, VhostError},
    pci::{PciError, msix::MessageSink},
    virtio::{
        DeviceError,
        pci::{Doorbells, VirtioPci},
    },
};

/// What an interface is made of.
pub struct Interface {
    /// The tap's queues.
    pub taps: Vec<OwnedFd>,
    /// None, or a /dev/vhost-net for each of them.
    pub vhosts: Vec<OwnedFd>,
    /// The guest's.
    pub mac: Vec<u8>,
    pub mtu: u32,
}

/// Why an interface was not plugged in.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    #[error("tap_fds: {0} queues, not 1 to {max}", max = net::PAIRS_MAX)]
    Queues(usize),
    #[error("vhost_fds: {vhosts} for {queues} queues")]
    Vhosts { vhosts: usize, queues: usize },
    #[error("mac: {0} bytes, not 6")]
    Mac(usize),
    #[error("mac: not that of one interface")]
    Multicast,
    #[error("mtu: {0} is not between 68 and 65535")]
    Mtu(u32),
    #[error(transparent)]
    Tap(#[from] TapError),
    #[error(transparent)]
    Vhost(#[from] VhostError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Bus(#[from] PciError),
}

impl AttachError {
    /// Whether the client asked for something that cannot be; else the host failed, or there is no room.
    pub fn is_clients(&self) -> bool {
        match self {
            Self::Queues(_)
            | Self::Vhosts { .. }
            | Self::Mac(_)
            | Self::Multicast
            | Self::Mtu(_) => true,
            Self::Tap(e) => !matches!(e, TapError::Host { .. }),
            Self::Vhost(e) => !matches!(e, VhostError::Host { .. }),
            Self::Device(_) | Self::Bus(_) => false,
        }
    }
}

impl Vm {
    /// Plugs an interface in. The answer is its slot on the PCI bus, where the guest finds it when it looks again.
    ///
    /// # Errors
    /// It is not one, or there is no room for it, or the host refuses; nothing of it is kept then.
    pub fn attach(&self, interface: Interface) -> Result<u32, AttachError> {
        let queues = interface.taps.len();
        if !(1..=net::PAIRS_MAX).contains(&queues) {
            return Err(AttachError::Queues(queues));
        }
        let vhosts = interface.vhosts.len();
        if vhosts != 0 && vhosts != queues {
            return Err(AttachError::Vhosts { vhosts, queues });
        }
        let mac = <[u8; 6]>::try_from(interface.mac.as_slice());
        let mac = mac.map_err(|_| AttachError::Mac(interface.mac.len()))?;
        // Linux would take a random one in the place of such.
        if mac == [0; 6] || mac.first().is_some_and(|byte| byte & 1 != 0) {
            return Err(AttachError::Multicast);
        }
        let mtu = Some(interface.mtu).filter(|mtu| net::MTU.contains(mtu));
        let mtu = mtu.and_then(|mtu| u16::try_from(mtu).ok());
        let mtu = mtu.ok_or(AttachError::Mtu(interface.mtu))?;
        let taps = Tap::all(interface.taps)?;
        let vhosts = Vhost::all(interface.vhosts)?;
        let device = Net::new(taps, vhosts, mac, mtu, self.ending.clone())?;
        let device = VirtioPci::pluggable(
            Box::new(device),
            self.ram.clone(),
            Arc::clone(&self.routes) as Arc<dyn MessageSink>,
            Arc::clone(&self.fd) as Arc<dyn Doorbells>,
            self.ending.clone(),
        )?;
        let mut pci = self.pci.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(pci.plug(net::NAME, Box::new(device))?)
    }

    /// Pulls out what was plugged into `slot`, whatever the guest is doing with it. The tap is closed.
    ///
    /// # Errors
    /// Nothing was plugged in there.
    pub fn detach(&self, slot: u32) -> Result<(), PciError> {
        let mut pci = self.pci.lock().unwrap_or_else(PoisonError::into_inner);
        pci.unplug(slot)
    }
}
