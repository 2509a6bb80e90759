//! A /dev/vhost-net, by its descriptor: a pair of queues that the host's kernel can serve (Linux
//! `include/uapi/linux/vhost.h`). It reads and writes the guest's memory by this process' mapping of it; what a
//! descriptor points at it looks up in the table that it is given, the rings it takes where it is told, unchecked.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::Arc,
};

use vmm_sys_util::eventfd::EventFd;

use super::{F_MRG_RXBUF, tap::Tap};
use crate::{
    memory::{GuestAddress, GuestMemoryAccess, GuestMemoryRegion, GuestRam, MemoryRegionAddress},
    virtio::{
        F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1,
        queue::{Queue, QueueError},
    },
};

pub(crate) const VHOST_GET_FEATURES: u32 = request(READ, 0x00, size_of::<u64>());
pub(crate) const VHOST_SET_FEATURES: u32 = request(WRITE, 0x00, size_of::<u64>());
pub(crate) const VHOST_SET_OWNER: u32 = request(0, 0x01, 0);
/// Its size is that of the table's head alone.
pub(crate) const VHOST_SET_MEM_TABLE: u32 = request(WRITE, 0x03, size_of::<u64>());
pub(crate) const VHOST_SET_VRING_NUM: u32 = request(WRITE, 0x10, size_of::<VringState>());
pub(crate) const VHOST_SET_VRING_ADDR: u32 = request(WRITE, 0x11, size_of::<VringAddresses>());
pub(crate) const VHOST_SET_VRING_BASE: u32 = request(WRITE, 0x12, size_of::<VringState>());
pub(crate) const VHOST_GET_VRING_BASE: u32 = request(READ | WRITE, 0x12, size_of::<VringState>());
pub(crate) const VHOST_SET_VRING_KICK: u32 = request(WRITE, 0x20, size_of::<VringFile>());
pub(crate) const VHOST_SET_VRING_CALL: u32 = request(WRITE, 0x21, size_of::<VringFile>());
pub(crate) const VHOST_SET_VRING_ERR: u32 = request(WRITE, 0x22, size_of::<VringFile>());
pub(crate) const VHOST_NET_SET_BACKEND: u32 = request(WRITE, 0x30, size_of::<VringFile>());

const WRITE: u32 = 1;
const READ: u32 = 2;

// Linux `include/uapi/asm-generic/ioctl.h`; 0xaf is VHOST_VIRTIO.
const fn request(direction: u32, number: u32, size: usize) -> u32 {
    direction << 30 | (size as u32) << 16 | 0xaf << 8 | number
}

/// Features that are the kernel's part of what device and driver agree on; all others are the tap's. It must have them.
const FEATURES: u64 = F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC | F_MRG_RXBUF;
/// No descriptor (VHOST_FILE_UNBIND).
const NONE: libc::c_int = -1;

#[repr(C)]
struct VringState {
    index: u32,
    number: u32,
}

#[repr(C)]
struct VringFile {
    index: u32,
    fd: libc::c_int,
}

/// Where the rings are, in this process.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct VringAddresses {
    index: u32,
    flags: u32,
    descriptors: u64,
    used: u64,
    available: u64,
    log: u64,
}

/// Bytes of rings (virtio 1.2 §2.7): before their entries, with the event index, and of an entry.
const RING: u64 = 6;
const AVAILABLE_ENTRY: u64 = 2;
const USED_ENTRY: u64 = 8;
const DESCRIPTOR: u64 = 16;

/// Why a descriptor cannot serve a pair of queues.
#[derive(Debug, thiserror::Error)]
pub enum VhostError {
    #[error("vhost_fds: not /dev/vhost-net (VHOST_GET_FEATURES: {0})")]
    NotVhost(#[source] io::Error),
    #[error(
        "vhost_fds: not a /dev/vhost-net that knows all of {FEATURES:#x} (VHOST_GET_FEATURES: {0:#x})"
    )]
    Lacks(u64),
    #[error("vhost_fds: in use already (VHOST_SET_OWNER)")]
    Owned,
    #[error("vhost_fds: {call}: {cause}")]
    Host {
        call: &'static str,
        cause: io::Error,
    },
}

/// What fails of a call, and which.
pub(super) type Failed = (&'static str, io::Error);

/// A pair of queues that the kernel can serve.
pub struct Vhost {
    fd: OwnedFd,
    /// By which it tells the driver, of the receive queue and the transmit queue.
    calls: [Arc<EventFd>; 2],
    /// By which it tells of a queue that it cannot serve. Others may wake by it who waits for that.
    pub(super) broken: EventFd,
}

impl Vhost {
    /// Takes them, for this process' memory; the kernel starts a thread for each.
    ///
    /// # Errors
    /// They are none, or the host refuses.
    pub fn all(fds: Vec<OwnedFd>) -> Result<Vec<Self>, VhostError> {
        fds.into_iter().map(Self::own).collect()
    }

    fn own(fd: OwnedFd) -> Result<Self, VhostError> {
        let eventfd = || {
            let made = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
            made.map_err(|cause| VhostError::Host {
                call: "eventfd",
                cause,
            })
        };
        let vhost = Self {
            fd,
            calls: [Arc::new(eventfd()?), Arc::new(eventfd()?)],
            broken: eventfd()?,
        };
        let mut features = 0u64;
        vhost
            .ask(VHOST_GET_FEATURES, &raw mut features)
            .map_err(VhostError::NotVhost)?;
        if features & FEATURES != FEATURES {
            return Err(VhostError::Lacks(features));
        }
        let owned = vhost.ask(VHOST_SET_OWNER, std::ptr::null_mut::<u8>());
        owned.map_err(|cause| match cause.raw_os_error() {
            Some(libc::EBUSY) => VhostError::Owned,
            _ => VhostError::Host {
                call: "VHOST_SET_OWNER",
                cause,
            },
        })?;
        Ok(vhost)
    }

    /// By which queue `index`, 0 or 1, tells the driver.
    pub(super) fn call(&self, index: u32) -> &Arc<EventFd> {
        let [receive, transmit] = &self.calls;
        if index == 0 { receive } else { transmit }
    }

    /// Before any queue: what was agreed on, and the memory that descriptors may lead to.
    pub(super) fn prepare(&self, ram: &GuestRam, features: u64) -> Result<(), Failed> {
        let mut features = features & FEATURES;
        self.ask(VHOST_SET_FEATURES, &raw mut features)
            .map_err(|e| ("VHOST_SET_FEATURES", e))?;
        let mut table = memory_table(ram).map_err(|e| ("find guest memory", e))?;
        self.ask(VHOST_SET_MEM_TABLE, table.as_mut_ptr())
            .map_err(|e| ("VHOST_SET_MEM_TABLE", e))
    }

    /// Says where queue `index` is and stands, and how to ring. Nothing is served yet.
    pub(super) fn set_up(
        &self,
        index: u32,
        queue: &Queue,
        addresses: &Addresses,
    ) -> Result<(), Failed> {
        let stands = queue.state();
        for (name, request, number) in [
            ("VHOST_SET_VRING_NUM", VHOST_SET_VRING_NUM, stands.size),
            (
                "VHOST_SET_VRING_BASE",
                VHOST_SET_VRING_BASE,
                stands.next_avail,
            ),
        ] {
            let number = number.into();
            let mut state = VringState { index, number };
            self.ask(request, &raw mut state).map_err(|e| (name, e))?;
        }
        let mut addresses = VringAddresses {
            index,
            ..addresses.0
        };
        self.ask(VHOST_SET_VRING_ADDR, &raw mut addresses)
            .map_err(|e| ("VHOST_SET_VRING_ADDR", e))?;
        for (name, request, fd) in [
            (
                "VHOST_SET_VRING_ERR",
                VHOST_SET_VRING_ERR,
                self.broken.as_raw_fd(),
            ),
            (
                "VHOST_SET_VRING_CALL",
                VHOST_SET_VRING_CALL,
                self.call(index).as_raw_fd(),
            ),
            (
                "VHOST_SET_VRING_KICK",
                VHOST_SET_VRING_KICK,
                queue.doorbell().as_raw_fd(),
            ),
        ] {
            self.tell(name, request, index, fd)?;
        }
        Ok(())
    }

    /// Serves queue `index` by this queue of the tap; or no more: then nothing of it is under way when this returns.
    pub(super) fn serve(&self, index: u32, tap: Option<&Tap>) -> Result<(), Failed> {
        let fd = tap.map_or(NONE, Tap::as_raw_fd);
        self.tell("VHOST_NET_SET_BACKEND", VHOST_NET_SET_BACKEND, index, fd)
    }

    /// Where queue `index` stands, which is served no more. It lets go of everything that [`Self::set_up`] gave it.
    pub(super) fn take_back(&self, index: u32) -> Result<u16, Failed> {
        let mut state = VringState { index, number: 0 };
        self.ask(VHOST_GET_VRING_BASE, &raw mut state)
            .map_err(|e| ("VHOST_GET_VRING_BASE", e))?;
        for (name, request) in [
            ("VHOST_SET_VRING_KICK", VHOST_SET_VRING_KICK),
            ("VHOST_SET_VRING_CALL", VHOST_SET_VRING_CALL),
        ] {
            self.tell(name, request, index, NONE)?;
        }
        // What it had to tell is of no use to another driver. They may be empty.
        let _ = (self.call(index).read(), self.broken.read());
        Ok(state.number as u16)
    }

    fn tell(
        &self,
        name: &'static str,
        request: u32,
        index: u32,
        fd: libc::c_int,
    ) -> Result<(), Failed> {
        let mut file = VringFile { index, fd };
        self.ask(request, &raw mut file).map_err(|e| (name, e))
    }

    /// `argument` is what the request says, and live.
    fn ask<T>(&self, request: u32, argument: *mut T) -> io::Result<()> {
        // SAFETY: each caller passes what its request reads or writes. What the kernel does with the memory that it
        // is told of is the guest's: `Addresses` and the memory table name guest memory alone, which stays mapped
        // until the process ends.
        match unsafe { libc::ioctl(self.fd.as_raw_fd(), request.into(), argument) } {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// A queue's rings in this process, all of which is guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Addresses(VringAddresses);

impl Addresses {
    /// Of the rings as the driver has them.
    pub(super) fn of(queue: &Queue, ram: &GuestRam) -> Result<Self, QueueError> {
        let state = queue.state();
        let size = u64::from(state.size);
        Ok(Self(VringAddresses {
            index: 0,
            flags: 0,
            descriptors: address(ram, state.desc_table, DESCRIPTOR * size)?,
            used: address(ram, state.used_ring, RING + USED_ENTRY * size)?,
            available: address(ram, state.avail_ring, RING + AVAILABLE_ENTRY * size)?,
            log: 0,
        }))
    }
}

/// Where so many bytes of guest memory are in this process. They lie in one piece in either, or are refused: behind a
/// region of the guest's memory is memory of the VMM's.
fn address(ram: &GuestRam, guest: u64, length: u64) -> Result<u64, QueueError> {
    let (region, at) = ram
        .to_region_addr(GuestAddress(guest))
        .ok_or(QueueError::Rings)?;
    let length = usize::try_from(length).map_err(|_| QueueError::Rings)?;
    let slice = region
        .get_slice(at, length)
        .map_err(|_| QueueError::Rings)?;
    Ok(slice.ptr_guard_mut().as_ptr() as u64)
}

/// `struct vhost_memory`: how many regions; of each the guest's address, bytes, this process' address, and nothing.
fn memory_table(ram: &GuestRam) -> io::Result<Vec<u64>> {
    let mut table = vec![ram.num_regions() as u64];
    for region in ram.iter() {
        let host = region.get_host_address(MemoryRegionAddress(0));
        let host = host.map_err(io::Error::other)?;
        table.extend([region.start_addr().0, region.len(), host as u64, 0]);
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::virtio::queue::testing::{queue as testing_queue, ram};

    #[test]
    fn requests_are_those_of_the_header() {
        // As strace has them.
        for (request, number) in [
            (VHOST_GET_FEATURES, 0x8008_af00),
            (VHOST_SET_FEATURES, 0x4008_af00),
            (VHOST_SET_OWNER, 0xaf01),
            (VHOST_SET_MEM_TABLE, 0x4008_af03),
            (VHOST_SET_VRING_NUM, 0x4008_af10),
            (VHOST_SET_VRING_ADDR, 0x4028_af11),
            (VHOST_SET_VRING_BASE, 0x4008_af12),
            (VHOST_GET_VRING_BASE, 0xc008_af12),
            (VHOST_SET_VRING_KICK, 0x4008_af20),
            (VHOST_SET_VRING_CALL, 0x4008_af21),
            (VHOST_SET_VRING_ERR, 0x4008_af22),
            (VHOST_NET_SET_BACKEND, 0x4008_af30),
        ] {
            assert_eq!(request, number);
        }
    }

    #[test]
    fn rings_are_guest_memory_in_one_piece() {
        let two = GuestRam::from_ranges(&[
            (GuestAddress(0), 0x1_0000),
            (GuestAddress(0x1_0000), 0x1_0000),
        ])
        .unwrap();
        let first = address(&two, 0, 0x1_0000).unwrap();
        assert_eq!(address(&two, 0xfff0, 16).unwrap(), first + 0xfff0);
        for (guest, length) in [
            (0xfff0, 17),
            (0, 0x1_0001),
            (0x1_fff0, 17),
            (0x2_0000, 1),
            (u64::MAX, 16),
            (0, u64::MAX),
        ] {
            let refused = address(&two, guest, length);
            assert!(
                matches!(refused, Err(QueueError::Rings)),
                "{guest:#x}+{length:#x}"
            );
        }
        let table = memory_table(&two).unwrap();
        assert_eq!((table.len(), table[0]), (9, 2));
        assert_eq!(table[1..5], [0, 0x1_0000, first, 0]);
    }

    #[test]
    fn a_queues_rings_are_found() {
        let ram = ram();
        let (_, queue) = testing_queue(&ram, 0x8000);
        let addresses = Addresses::of(&queue, &ram).unwrap().0;
        let start = address(&ram, 0, 1).unwrap();
        let state = queue.state();
        let found = [addresses.descriptors, addresses.available, addresses.used];
        let there = [state.desc_table, state.avail_ring, state.used_ring];
        assert_eq!(found, there.map(|at| start + at));
    }

    #[test]
    fn what_is_no_vhost_is_refused_by_name() {
        let null = OwnedFd::from(File::open("/dev/null").unwrap());
        let error = Vhost::all(vec![null]).err().unwrap();
        assert_eq!(
            error.to_string(),
            "vhost_fds: not /dev/vhost-net (VHOST_GET_FEATURES: Inappropriate ioctl for device (os error 25))"
        );
    }
}
