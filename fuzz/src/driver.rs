//! A driver that obeys nothing: guest memory, and queues in it that a device was activated with.

use std::{
    io,
    sync::{Arc, Mutex},
};

use arbitrary::Arbitrary;
use husk_vmm::{
    memory::{Bytes, GuestAddress, GuestRam},
    pci::{Bar, PciDevice, msix::MessageSink},
    virtio::{
        Activation, DeviceError, Kind, VirtioDevice,
        pci::{BAR_SIZE, VirtioPci},
        queue::Queue,
    },
    vm::ending::Ending,
};

/// Bytes of guest memory: two regions that touch, so that buffers can lie across their border.
pub(crate) const RAM: u64 = 0x4_0000;
const BORDER: u64 = 0x2_0000;
/// Where the rings of queue `n` lie: the descriptor table, then the two rings.
const RINGS: u64 = 0x2000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x1800;
/// Behind the rings of three queues.
pub(crate) const BUFFERS: u64 = 0x8000;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;

/// Interrupts go nowhere.
pub(crate) struct Nowhere;

impl MessageSink for Nowhere {
    fn send(&self, address: u64, _: u32) -> io::Result<()> {
        match address & 1 {
            0 => Ok(()),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

/// Guest memory of [`RAM`] bytes.
pub(crate) fn ram() -> GuestRam {
    let (low, high) = (BORDER as usize, (RAM - BORDER) as usize);
    GuestRam::from_ranges(&[(GuestAddress(0), low), (GuestAddress(BORDER), high)])
        .expect("guest memory")
}

/// Takes what it is activated with, and does nothing else.
pub(crate) struct Tap {
    pub(crate) kind: Kind,
    pub(crate) taken: Arc<Mutex<Option<Activation>>>,
}

impl VirtioDevice for Tap {
    fn kind(&self) -> Kind {
        self.kind
    }
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        *self.taken.lock().expect("the lock") = Some(activation);
        Ok(())
    }
    fn stop(&mut self) -> Vec<Queue> {
        let taken = self.taken.lock().expect("the lock").take();
        taken.map_or(Vec::new(), |activation| activation.queues)
    }
}

/// What a device with queues of these sizes is activated with. With `event_idx` the driver has agreed on that.
pub(crate) fn activation(sizes: &'static [u16], event_idx: bool) -> Activation {
    let taken = Arc::default();
    let tap = Tap {
        kind: Kind {
            name: "tap",
            id: 1,
            class: 0,
            queues: sizes,
            features: 0,
            doorbells: true,
        },
        taken: Arc::clone(&taken),
    };
    let bar = Bar {
        address: 0xc000_0000,
        size: BAR_SIZE,
    };
    let mut transport = VirtioPci::new(
        Box::new(tap),
        bar,
        ram(),
        Arc::new(Nowhere),
        Ending::default(),
    )
    .expect("a transport");
    bring_up(&mut transport, sizes, event_idx);
    let activation = taken.lock().expect("the lock").take();
    activation.expect("the device is active")
}

/// What a good driver writes (virtio 1.2 §3.1.1).
pub(crate) fn bring_up(transport: &mut dyn PciDevice, sizes: &[u16], event_idx: bool) {
    let mut write = |offset: u64, value: u32| transport.write_bar(offset, &value.to_le_bytes());
    write(0x14, 3);
    for (select, features) in [(0, u32::from(event_idx) << 29 | 1 << 28), (1, 1)] {
        write(0x08, select);
        write(0x0c, features);
    }
    write(0x14, 11);
    for (index, size) in (0..).zip(sizes) {
        let start = index * RINGS as u32;
        write(0x16, index);
        write(0x18, u32::from(*size).min(MOST.into()));
        write(0x20, start);
        write(0x28, start + AVAILABLE as u32);
        write(0x30, start + USED as u32);
        write(0x1c, 1);
    }
    write(0x14, 15);
}

/// Entries of a queue here, whatever a device would take: so the rings fit.
pub(crate) const MOST: u16 = 128;

/// A place in guest memory, or not.
#[derive(Arbitrary, Debug, Clone, Copy)]
pub(crate) enum Place {
    Buffer(u16),
    Ring(u16),
    Border(u8),
    End(u8),
    Any(u64),
}

impl Place {
    pub(crate) fn address(self) -> u64 {
        match self {
            Place::Buffer(at) => BUFFERS + u64::from(at) % (RAM - BUFFERS),
            Place::Ring(at) => u64::from(at) % BUFFERS,
            Place::Border(at) => BORDER - 128 + u64::from(at),
            Place::End(at) => RAM - 128 + u64::from(at),
            Place::Any(at) => at,
        }
    }
}

/// Bytes of a buffer.
#[derive(Arbitrary, Debug, Clone, Copy)]
pub(crate) enum Length {
    Short(u8),
    Middle(u16),
    Any(u32),
}

impl Length {
    pub(crate) fn bytes(self) -> u32 {
        match self {
            Length::Short(bytes) => bytes.into(),
            Length::Middle(bytes) => bytes.into(),
            Length::Any(bytes) => bytes,
        }
    }
}

/// A descriptor (virtio 1.2 §2.7.5).
#[derive(Arbitrary, Debug, Clone, Copy)]
pub(crate) struct Descriptor {
    pub(crate) place: Place,
    pub(crate) length: Length,
    pub(crate) flags: u8,
    pub(crate) next: u8,
}

/// What a driver does to the memory of queue `0` to `2`.
#[derive(Arbitrary, Debug, Clone, Copy)]
pub(crate) enum Deed {
    /// Writes a descriptor into the table.
    Describe(u8, Descriptor),
    /// Writes one where an indirect table may lie.
    Indirect(Place, Descriptor),
    /// Offers a chain by its head.
    Offer(u8),
    /// Says how many chains it has offered.
    Index(u16),
    /// The field behind the available ring: when it wants an interrupt.
    UsedEvent(u16),
    Flags(u16),
    Scribble(Place, [u8; 8]),
}

impl Deed {
    pub(crate) fn act(self, ram: &GuestRam, queue: u8) {
        let start = u64::from(queue % 3) * RINGS;
        // Half of what is written misses on purpose.
        let put = |address: u64, bytes: &[u8]| drop(ram.write_slice(bytes, GuestAddress(address)));
        match self {
            Deed::Describe(index, descriptor) => put(
                start + 16 * u64::from(index % MOST as u8),
                &descriptor.bytes(),
            ),
            Deed::Indirect(place, descriptor) => put(place.address(), &descriptor.bytes()),
            Deed::Offer(head) => offer(ram, queue, head.into()),
            Deed::Index(index) => put(start + AVAILABLE + 2, &index.to_le_bytes()),
            Deed::UsedEvent(index) => put(
                start + AVAILABLE + 4 + 2 * u64::from(MOST),
                &index.to_le_bytes(),
            ),
            Deed::Flags(flags) => put(start + AVAILABLE, &flags.to_le_bytes()),
            Deed::Scribble(place, bytes) => put(place.address(), &bytes),
        }
    }
}

impl Descriptor {
    fn bytes(self) -> [u8; 16] {
        descriptor(
            self.place.address(),
            self.length.bytes(),
            u16::from(self.flags) & 7,
            self.next.into(),
        )
    }
}

fn descriptor(address: u64, length: u32, flags: u16, next: u16) -> [u8; 16] {
    let value = u128::from(address)
        | u128::from(length) << 64
        | u128::from(flags) << 96
        | u128::from(next) << 112;
    value.to_le_bytes()
}

/// Offers the chain at `head` as a good driver does. Nothing when the index cannot be read.
pub(crate) fn offer(ram: &GuestRam, queue: u8, head: u16) {
    let available = u64::from(queue % 3) * RINGS + AVAILABLE;
    let Ok(index) = ram.read_obj::<u16>(GuestAddress(available + 2)) else {
        return;
    };
    let entry = available + 4 + 2 * u64::from(index % MOST);
    let put = |address: u64, value: u16| {
        drop(ram.write_slice(&value.to_le_bytes(), GuestAddress(address)));
    };
    put(entry, head);
    put(available + 2, index.wrapping_add(1));
}

/// Writes a chain of buffers into the table from `first` on, and offers it.
pub(crate) fn offer_chain(ram: &GuestRam, queue: u8, first: u16, buffers: &[(u64, u32, u16)]) {
    for (index, (address, length, flags)) in (0..).zip(buffers) {
        let last = usize::from(index) + 1 == buffers.len();
        let flags = flags | if last { 0 } else { NEXT };
        let at = (first + index) % MOST;
        let bytes = descriptor(*address, *length, flags, (at + 1) % MOST);
        let table = u64::from(queue % 3) * RINGS;
        drop(ram.write_slice(&bytes, GuestAddress(table + 16 * u64::from(at))));
    }
    offer(ram, queue, first % MOST);
}
