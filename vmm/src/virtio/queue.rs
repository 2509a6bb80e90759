//! A split virtqueue (virtio 1.2 §2.7) with its doorbell and interrupt, as devices use it.
//!
//! Whoever serves the queue owns it; there is no lock. The ring, the descriptors and what they point
//! at are the guest's: a chain is copied out as checked slices of guest memory, or refused.

use std::{
    io,
    num::Wrapping,
    sync::{
        Arc,
        atomic::{Ordering, fence},
    },
};

use virtio_queue::{Queue as Ring, QueueOwnedT, QueueState, QueueT};
use vmm_sys_util::eventfd::EventFd;

use crate::{
    memory::{Bytes, GuestAddress, GuestMemoryAccess, GuestMemoryError, GuestRam, VolatileSlice},
    pci::msix::Msix,
};

/// The most buffers one chain may have: more than any driver of Linux makes.
const BUFFERS_MAX: usize = 1024;

/// The rings (virtio 1.2 §2.7.6, §2.7.8): bytes before their entries, and of an entry.
const RING_HEADER: u64 = 4;
const AVAILABLE_ENTRY: u64 = 2;
const USED_ENTRY: u64 = 8;

/// What a driver did to a queue that no driver may do.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    #[error("the rings do not lie in guest memory")]
    Rings,
    #[error("more chains offered than the queue has entries")]
    AvailableIndex,
    #[error("a descriptor chain is broken at its head {0}")]
    BrokenChain(u16),
    #[error("a descriptor chain has more than {BUFFERS_MAX} buffers")]
    LongChain,
    #[error("a buffer of {length} bytes at {address:#x} is not in guest memory")]
    Buffer { address: u64, length: u32 },
    #[error("a descriptor chain has a readable buffer behind a writable one")]
    Order,
    #[error("a descriptor chain is shorter than its header")]
    NoHeader,
    #[error("{0}")]
    Ring(#[from] virtio_queue::Error),
    #[error("{0}")]
    Memory(#[from] GuestMemoryError),
}

/// An interrupt of a device: one of its vectors, or none.
#[derive(Clone)]
pub struct Interrupt {
    pub(super) msix: Arc<Msix>,
    pub(super) vector: u16,
}

/// A queue in use.
pub struct Queue {
    ring: Ring,
    doorbell: EventFd,
    interrupt: Interrupt,
    /// The used index when the driver was last told of what was used.
    told: Wrapping<u16>,
}

/// The buffers of one request, in guest memory.
pub struct Chain<'m> {
    head: u16,
    /// What the device may read, then what it may write.
    pub readable: Vec<VolatileSlice<'m>>,
    pub writable: Vec<VolatileSlice<'m>>,
}

impl Interrupt {
    /// Has `call` raise it, until [`Self::unwire`].
    pub fn wire(&self, call: &Arc<EventFd>) {
        self.msix.wire(self.vector, call);
    }

    pub fn unwire(&self, call: &Arc<EventFd>) {
        self.msix.unwire(call);
    }
}

impl Queue {
    /// Takes a queue as the driver has configured it. `ring` must be marked ready.
    pub(super) fn new(
        ring: Ring,
        ram: &GuestRam,
        doorbell: EventFd,
        interrupt: Interrupt,
    ) -> Result<Self, QueueError> {
        if !ring.is_valid(ram) {
            return Err(QueueError::Rings);
        }
        Ok(Self {
            told: Wrapping(ring.next_used()),
            ring,
            doorbell,
            interrupt,
        })
    }

    /// Ready when the driver has rung; read it with [`Self::quiet`].
    pub fn doorbell(&self) -> &EventFd {
        &self.doorbell
    }

    /// Clears the doorbell.
    pub fn quiet(&self) -> io::Result<()> {
        match self.doorbell.read() {
            Err(e) if e.kind() != io::ErrorKind::WouldBlock => Err(e),
            _ => Ok(()),
        }
    }

    /// The next chain that the driver offers, or none.
    pub fn pop<'m>(&mut self, ram: &'m GuestRam) -> Result<Option<Chain<'m>>, QueueError> {
        let mut available = self.ring.iter(ram).map_err(|e| match e {
            virtio_queue::Error::InvalidAvailRingIndex => QueueError::AvailableIndex,
            other => QueueError::Ring(other),
        })?;
        let Some(mut descriptors) = available.next() else {
            return Ok(None);
        };
        let mut chain = Chain {
            head: descriptors.head_index(),
            readable: Vec::new(),
            writable: Vec::new(),
        };
        // The iterator ends early where a descriptor cannot be read: then the last one promised more.
        let mut complete = false;
        for descriptor in &mut descriptors {
            if chain.readable.len() + chain.writable.len() >= BUFFERS_MAX {
                return Err(QueueError::LongChain);
            }
            complete = !descriptor.has_next();
            let buffers = if descriptor.is_write_only() {
                &mut chain.writable
            } else if chain.writable.is_empty() {
                &mut chain.readable
            } else {
                return Err(QueueError::Order);
            };
            for slice in ram.get_slices(descriptor.addr(), descriptor.len() as usize) {
                buffers.push(slice.map_err(|_| QueueError::Buffer {
                    address: descriptor.addr().0,
                    length: descriptor.len(),
                })?);
            }
        }
        match complete {
            true => Ok(Some(chain)),
            false => Err(QueueError::BrokenChain(chain.head)),
        }
    }

    /// Puts the chain popped last back; it will be popped again.
    pub fn unpop(&mut self) {
        self.ring.go_to_previous_position();
    }

    /// Gives a chain back to the driver with `written` bytes in its writable buffers.
    pub fn push(&mut self, ram: &GuestRam, head: u16, written: usize) -> Result<(), QueueError> {
        let written = u32::try_from(written).unwrap_or(u32::MAX);
        Ok(self.ring.add_used(ram, head, written)?)
    }

    /// Gives chains back at once, each with the bytes written to it: the driver sees all of them, or none yet.
    pub fn push_all(&mut self, ram: &GuestRam, chains: &[(u16, usize)]) -> Result<(), QueueError> {
        let Some(((head, written), before)) = chains.split_last() else {
            return Ok(());
        };
        let mut next = self.ring.next_used();
        for (head, written) in before {
            let entry = u64::from(next % self.ring.size().max(1));
            let address = self.ring.used_ring().checked_add(RING_HEADER);
            let address = address.and_then(|ring| ring.checked_add(entry * USED_ENTRY));
            let written = u32::try_from(*written).unwrap_or(u32::MAX);
            let element = u64::from(*head) | u64::from(written) << 32;
            let address = GuestAddress(address.ok_or(QueueError::Rings)?);
            ram.write_slice(&element.to_le_bytes(), address)?;
            next = next.wrapping_add(1);
        }
        self.ring.set_next_used(next);
        self.push(ram, *head, *written)
    }

    /// Interrupts the driver if it wants to know of what was pushed since the last call.
    pub fn signal(&mut self, ram: &GuestRam) -> Result<(), QueueError> {
        if self.is_told(ram)? {
            self.interrupt.msix.signal(self.interrupt.vector);
        }
        Ok(())
    }

    /// Whether the driver wants to know of what was pushed since it was last asked.
    fn is_told(&mut self, ram: &GuestRam) -> Result<bool, QueueError> {
        let used = Wrapping(self.ring.next_used());
        let told = std::mem::replace(&mut self.told, used);
        // What was pushed must be visible before the driver's wish is read.
        fence(Ordering::SeqCst);
        Ok(match self.ring.event_idx_enabled() {
            // It wishes to be told when a certain entry is used (§2.7.7.2).
            true => used - self.used_event(ram)? - Wrapping(1) < used - told,
            false => used != told,
        })
    }

    /// The entry of the used ring that the driver wishes to be told of.
    fn used_event(&self, ram: &GuestRam) -> Result<Wrapping<u16>, QueueError> {
        let behind = RING_HEADER + AVAILABLE_ENTRY * u64::from(self.ring.size());
        let address = self.ring.avail_ring().checked_add(behind);
        let address = GuestAddress(address.ok_or(QueueError::Rings)?);
        let event: u16 = ram.load(address, Ordering::Relaxed)?;
        Ok(Wrapping(u16::from_le(event)))
    }

    /// Asks for the doorbell on the next chain. True when one is there already: pop on.
    pub fn arm(&mut self, ram: &GuestRam) -> Result<bool, QueueError> {
        Ok(self.ring.enable_notification(ram)?)
    }

    /// The next chain that the driver offers, or none: then the doorbell rings for it.
    pub fn pop_or_arm<'m>(&mut self, ram: &'m GuestRam) -> Result<Option<Chain<'m>>, QueueError> {
        match self.pop(ram)? {
            None if self.arm(ram)? => self.pop(ram),
            popped => Ok(popped),
        }
    }

    /// Asks for no doorbell until [`Self::arm`].
    pub fn disarm(&mut self, ram: &GuestRam) -> Result<(), QueueError> {
        Ok(self.ring.disable_notification(ram)?)
    }

    /// The host's kernel has served the queue up to its entry `next`, all of which it has given back.
    pub fn go_to(&mut self, next: u16) {
        self.ring.set_next_avail(next);
        self.ring.set_next_used(next);
        self.told = Wrapping(next);
    }

    /// The interrupt that tells the driver.
    pub fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// Where the queue stands.
    pub fn state(&self) -> QueueState {
        self.ring.state()
    }
}

impl<'m> Chain<'m> {
    /// The descriptor to give back with [`Queue::push`].
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Takes the first `N` readable bytes out of the chain.
    pub fn read_header<const N: usize>(&mut self) -> Result<[u8; N], QueueError> {
        let mut header = [0; N];
        let (first, rest) = split(&self.readable, N)?;
        let mut at = 0;
        for slice in first {
            if let Some(target) = header.get_mut(at..) {
                at += slice.copy_to(target);
            }
        }
        self.readable = rest;
        Ok(header)
    }

    /// Takes the first `length` writable bytes out of the chain.
    pub fn take_writable(&mut self, length: usize) -> Result<Vec<VolatileSlice<'m>>, QueueError> {
        let (first, rest) = split(&self.writable, length)?;
        self.writable = rest;
        Ok(first)
    }
}

/// Bytes in all of `slices`.
pub fn total(slices: &[VolatileSlice<'_>]) -> usize {
    slices.iter().map(|slice| slice.len()).sum()
}

/// Copies `bytes` into `slices`, which must have room for them.
pub fn fill(slices: &[VolatileSlice<'_>], bytes: &[u8]) {
    let mut rest = bytes;
    for slice in slices {
        let (now, later) = rest.split_at(rest.len().min(slice.len()));
        slice.copy_from(now);
        rest = later;
    }
}

/// The first `length` bytes of `slices`, and what follows.
pub fn split<'m>(
    slices: &[VolatileSlice<'m>],
    length: usize,
) -> Result<(Vec<VolatileSlice<'m>>, Vec<VolatileSlice<'m>>), QueueError> {
    let mut left = length;
    let (mut first, mut rest) = (Vec::new(), Vec::new());
    for slice in slices {
        let here = left.min(slice.len());
        left -= here;
        let (before, behind) = slice.split_at(here).map_err(|_| QueueError::NoHeader)?;
        if !before.is_empty() {
            first.push(before);
        }
        if !behind.is_empty() {
            rest.push(behind);
        }
    }
    match left {
        0 => Ok((first, rest)),
        _ => Err(QueueError::NoHeader),
    }
}

#[cfg(test)]
pub(crate) mod testing {
    //! Queues whose driver is the test.

    use std::{io, sync::Mutex};

    use virtio_queue::{
        desc::{RawDescriptor, split::Descriptor},
        mock::MockSplitQueue,
    };

    use super::*;
    use crate::{memory::GuestAddress, pci::msix::MessageSink};

    pub(crate) const NEXT: u16 = 1;
    pub(crate) const WRITE: u16 = 2;
    pub(crate) const INDIRECT: u16 = 4;

    /// Where the test's buffers may lie; the rings are at the start of memory.
    pub(crate) const BUFFERS: u64 = 0x10_0000;

    /// Counts the messages sent.
    #[derive(Default)]
    pub(crate) struct Count(pub(crate) Mutex<usize>);

    impl MessageSink for Count {
        fn send(&self, _: u64, _: u32) -> io::Result<()> {
            *self.0.lock().unwrap() += 1;
            Ok(())
        }
    }

    pub(crate) fn ram() -> GuestRam {
        GuestRam::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap()
    }

    /// A queue of 16 entries at `start` and its driver's side.
    pub(crate) fn queue(ram: &GuestRam, start: u64) -> (MockSplitQueue<'_, GuestRam>, Queue) {
        let driver = MockSplitQueue::create(ram, GuestAddress(start), 16);
        let ring: Ring = driver.create_queue().unwrap();
        let msix = Arc::new(Msix::new(1, Arc::new(Count::default())));
        let interrupt = Interrupt { msix, vector: 0 };
        let doorbell = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        (driver, Queue::new(ring, ram, doorbell, interrupt).unwrap())
    }

    /// Offers chains, as (address, length, flags, next) of all their descriptors from `first` on.
    pub(crate) fn offer(
        driver: &MockSplitQueue<'_, GuestRam>,
        first: u16,
        descriptors: &[(u64, u32, u16, u16)],
    ) {
        let descriptors: Vec<RawDescriptor> = descriptors
            .iter()
            .map(|&(address, length, flags, next)| {
                Descriptor::new(address, length, flags, next).into()
            })
            .collect();
        driver.add_desc_chains(&descriptors, first).unwrap();
    }
}

#[cfg(test)]
mod tests {
    use super::{testing::*, *};
    use crate::memory::{Bytes, GuestAddress};

    fn pop_one(descriptors: &[(u64, u32, u16, u16)]) -> Result<(usize, usize), QueueError> {
        let ram = ram();
        let (driver, mut queue) = queue(&ram, 0);
        offer(&driver, 0, descriptors);
        let chain = queue.pop(&ram)?.unwrap();
        Ok((total(&chain.readable), total(&chain.writable)))
    }

    #[test]
    fn a_chain_is_split_into_readable_and_writable() {
        let lengths = pop_one(&[
            (BUFFERS, 44, NEXT, 1),
            (BUFFERS + 0x1000, 100, NEXT, 2),
            (BUFFERS + 0x2000, 7, WRITE, 0),
        ]);
        assert_eq!(lengths.unwrap(), (144, 7));
    }

    #[test]
    fn hostile_chains_are_errors() {
        // Outside of memory, over its end, and over the end of the address space.
        for (address, length) in [(1 << 40, 1), ((4 << 20) - 1, 2), (u64::MAX, 2)] {
            let result = pop_one(&[(address, length, 0, 0)]);
            assert!(
                matches!(result, Err(QueueError::Buffer { .. })),
                "{result:?}"
            );
        }
        let order = pop_one(&[(BUFFERS, 1, WRITE | NEXT, 1), (BUFFERS, 1, 0, 0)]);
        assert!(matches!(order, Err(QueueError::Order)));
        // A loop, and a descriptor that does not exist.
        let endless = pop_one(&[(BUFFERS, 1, NEXT, 1), (BUFFERS, 1, NEXT, 0)]);
        assert!(matches!(endless, Err(QueueError::BrokenChain(0))));
        let missing = pop_one(&[(BUFFERS, 1, NEXT, 999)]);
        assert!(matches!(missing, Err(QueueError::BrokenChain(0))));
        // Indirect tables: of a broken size, outside of memory, within another.
        for (address, length) in [(BUFFERS, 15), (1 << 40, 16), (u64::MAX - 7, 32)] {
            let result = pop_one(&[(address, length, INDIRECT, 0)]);
            assert!(matches!(result, Err(QueueError::BrokenChain(0))));
        }
    }

    #[test]
    fn an_available_index_from_nowhere_is_an_error() {
        let ram = ram();
        let (driver, mut queue) = queue(&ram, 0);
        driver.avail().idx().store(u16::to_le(1000));
        assert!(matches!(queue.pop(&ram), Err(QueueError::AvailableIndex)));
    }

    #[test]
    fn an_indirect_table_may_not_be_endless() {
        let ram = ram();
        let (driver, mut queue) = queue(&ram, 0);
        for index in 0..2000u64 {
            let descriptor: virtio_queue::desc::RawDescriptor =
                virtio_queue::desc::split::Descriptor::new(BUFFERS, 1, NEXT, index as u16 + 1)
                    .into();
            ram.write_obj(descriptor, GuestAddress(BUFFERS + 16 * index))
                .unwrap();
        }
        offer(&driver, 0, &[(BUFFERS, 2000 * 16, INDIRECT, 0)]);
        assert!(matches!(queue.pop(&ram), Err(QueueError::LongChain)));
    }

    /// What the driver must never see is a part of them.
    #[test]
    fn chains_given_back_together_are_told_of_once() {
        let ram = ram();
        let (driver, mut queue) = queue(&ram, 0);
        queue.ring.set_event_idx(true);
        queue.ring.set_next_used(14);
        queue.told = Wrapping(14);
        queue.push_all(&ram, &[]).unwrap();
        assert_eq!(driver.used().idx().load(), 0);
        queue.push_all(&ram, &[(3, 10), (1, 20), (7, 30)]).unwrap();
        assert_eq!(u16::from_le(driver.used().idx().load()), 17);
        for (entry, id, written) in [(14, 3, 10), (15, 1, 20), (0, 7, 30)] {
            let element = driver.used().ring().ref_at(entry).unwrap().load();
            assert_eq!((element.id(), element.len()), (id, written));
        }
        // It wishes to be told of the second of them: the last that was pushed is not the only one that counts.
        let before = queue.told;
        let event = GuestAddress(queue.ring.avail_ring() + RING_HEADER + 2 * 16);
        for (wish, wanted) in [
            (13u16, false),
            (14, true),
            (15, true),
            (16, true),
            (17, false),
        ] {
            ram.write_obj(wish.to_le(), event).unwrap();
            queue.told = before;
            assert_eq!(queue.is_told(&ram).unwrap(), wanted, "{wish}");
            assert!(!queue.is_told(&ram).unwrap(), "told twice of {wish}");
        }
    }

    /// Slices of all lengths up to 3, split everywhere.
    #[test]
    fn a_split_loses_no_byte_and_makes_none() {
        let mut memory: Vec<u8> = (0..9).collect();
        for lengths in (0..64).map(|n| [n & 3, n >> 2 & 3, n >> 4 & 3]) {
            let mut rest = &mut memory[..];
            let mut slices = Vec::new();
            for length in lengths {
                let (now, later) = rest.split_at_mut(length);
                slices.push(VolatileSlice::from(now));
                rest = later;
            }
            let bytes = |slices: &[VolatileSlice<'_>]| -> Vec<u8> {
                let mut all = Vec::new();
                for slice in slices {
                    let mut copy = vec![0; slice.len()];
                    slice.copy_to(&mut copy);
                    all.extend(copy);
                }
                all
            };
            let whole = bytes(&slices);
            for at in 0..=10 {
                match split(&slices, at) {
                    Ok((first, rest)) => {
                        assert_eq!(
                            (bytes(&first), bytes(&rest)),
                            (whole[..at].to_vec(), whole[at..].to_vec())
                        );
                        assert!(first.iter().chain(&rest).all(|slice| !slice.is_empty()));
                    }
                    Err(_) => assert!(at > whole.len()),
                }
            }
        }
    }

    #[test]
    fn a_header_may_lie_in_pieces() {
        let ram = ram();
        let (driver, mut queue) = queue(&ram, 0);
        ram.write_slice(b"abcdef", GuestAddress(BUFFERS)).unwrap();
        offer(&driver, 0, &[(BUFFERS, 1, NEXT, 1), (BUFFERS + 1, 5, 0, 0)]);
        let mut chain = queue.pop(&ram).unwrap().unwrap();
        assert_eq!(&chain.read_header::<3>().unwrap(), b"abc");
        assert_eq!(total(&chain.readable), 3);
        assert!(matches!(
            chain.read_header::<4>(),
            Err(QueueError::NoHeader)
        ));
    }
}
