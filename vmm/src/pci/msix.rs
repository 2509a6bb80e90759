//! MSI-X: a device's interrupt vectors (PCI 3.0 §6.8.2), delivered by KVM_SIGNAL_MSI.
//!
//! The table is shared between the vCPUs, which program it, and the device's threads, which signal.
//! A message is sent as the table has it at that moment: no GSI routes, no irqfds, nothing to
//! update in the kernel when the guest moves or masks a vector.
//!
//! But for what the host's kernel signals itself, by an eventfd: such a vector is wired to it, by an irqfd that
//! follows the table. While the vector is masked there is none, and the eventfd's counter remembers.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use kvm_bindings::kvm_msi;
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use crate::state::{MsixVector, StateError};

/// Bytes of one table entry: address (8), data (4), vector control (4).
const ENTRY: usize = 16;
const VECTOR_CONTROL_MASKED: u32 = 1;
/// Bits of Message Control.
const ENABLE: u16 = 1 << 15;
const MASK_ALL: u16 = 1 << 14;

/// The MSI-X capability: id, and the bits of its body the guest may write.
pub const CAPABILITY: u8 = 0x11;
pub const CAPABILITY_WRITABLE: [u8; 2] = (ENABLE | MASK_ALL).to_le_bytes();

/// Delivers messages to the guest's local APICs.
pub trait MessageSink: Send + Sync {
    fn send(&self, address: u64, data: u32) -> io::Result<()>;

    /// From now on `call` sends this message, with no thread of this process between; at once if it is ready already.
    /// The answer is for [`Self::cut`].
    ///
    /// # Errors
    /// The kernel refuses, or the message is none.
    fn lead(&self, call: &EventFd, address: u64, data: u32) -> io::Result<u32> {
        let _ = (call, address, data);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// The end of [`Self::lead`].
    ///
    /// # Errors
    /// The kernel refuses.
    fn cut(&self, call: &EventFd, line: u32) -> io::Result<()> {
        let _ = (call, line);
        Err(io::ErrorKind::Unsupported.into())
    }
}

impl MessageSink for VmFd {
    fn send(&self, address: u64, data: u32) -> io::Result<()> {
        let message = kvm_msi {
            address_lo: address as u32,
            address_hi: (address >> 32) as u32,
            data,
            ..Default::default()
        };
        self.signal_msi(message).map(drop).map_err(Into::into)
    }
}

#[derive(Debug, Clone, Copy)]
struct Vector {
    address: u64,
    data: u32,
    control: u32,
    pending: bool,
}

/// An eventfd that raises a vector.
struct Wire {
    vector: u16,
    call: Arc<EventFd>,
    /// The message that it sends, by which line; none while it is held back.
    message: Option<(u64, u32)>,
    line: Option<u32>,
}

struct Table {
    vectors: Vec<Vector>,
    control: u16,
    wires: Vec<Wire>,
}

/// The vectors of one device.
pub struct Msix {
    table: Mutex<Table>,
    sink: Arc<dyn MessageSink>,
}

impl Msix {
    /// `count` vectors, all masked.
    pub fn new(count: u16, sink: Arc<dyn MessageSink>) -> Self {
        let vector = Vector {
            address: 0,
            data: 0,
            control: VECTOR_CONTROL_MASKED,
            pending: false,
        };
        Self {
            table: Mutex::new(Table {
                vectors: vec![vector; count.into()],
                control: 0,
                wires: Vec::new(),
            }),
            sink,
        }
    }

    /// The capability's body for tables in BAR 0 at the given offsets, multiples of 8.
    pub fn capability(&self, table_offset: u32, pending_offset: u32) -> Vec<u8> {
        let last = self.lock().vectors.len().saturating_sub(1) as u16;
        let mut body = last.to_le_bytes().to_vec();
        body.extend_from_slice(&table_offset.to_le_bytes());
        body.extend_from_slice(&pending_offset.to_le_bytes());
        body
    }

    /// Raises `vector`, or notes it as pending while it is masked. A vector that does not exist, as
    /// the "no vector" of virtio, is nothing.
    pub fn signal(&self, vector: u16) {
        let mut table = self.lock();
        if table.control & ENABLE == 0 {
            return;
        }
        if let Some(vector) = table.vectors.get_mut(usize::from(vector)) {
            vector.pending = true;
        }
        self.deliver(&mut table);
    }

    /// Has `call` raise `vector`, whatever the guest makes of it, until [`Self::unwire`].
    pub fn wire(&self, vector: u16, call: &Arc<EventFd>) {
        let mut table = self.lock();
        table.wires.push(Wire {
            vector,
            call: Arc::clone(call),
            message: None,
            line: None,
        });
        self.deliver(&mut table);
    }

    /// `call` raises nothing any more.
    pub fn unwire(&self, call: &Arc<EventFd>) {
        let mut table = self.lock();
        table.wires.retain_mut(|wire| {
            let goes = Arc::ptr_eq(&wire.call, call);
            if goes {
                self.lead(wire, None);
            }
            !goes
        });
    }

    /// The guest wrote Message Control.
    pub fn set_control(&self, control: u16) {
        let mut table = self.lock();
        table.control = control;
        self.deliver(&mut table);
    }

    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let table = self.lock();
        let Some((vector, at)) = locate(offset, data.len()) else {
            return;
        };
        if let Some(vector) = table.vectors.get(vector) {
            let bytes = vector.to_bytes();
            if let Some(source) = bytes.get(at..at + data.len()) {
                data.copy_from_slice(source);
            }
        }
    }

    pub fn write_table(&self, offset: u64, data: &[u8]) {
        let mut table = self.lock();
        let Some((vector, at)) = locate(offset, data.len()) else {
            return;
        };
        if let Some(vector) = table.vectors.get_mut(vector) {
            let mut bytes = vector.to_bytes();
            if let Some(target) = bytes.get_mut(at..at + data.len()) {
                target.copy_from_slice(data);
                vector.set_bytes(&bytes);
            }
        }
        self.deliver(&mut table);
    }

    /// The pending bits, one per vector.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let table = self.lock();
        let bits = table
            .vectors
            .iter()
            .take(64)
            .enumerate()
            .fold(0u64, |bits, (i, vector)| {
                bits | u64::from(vector.pending) << i
            });
        let bytes = bits.to_le_bytes();
        for (at, byte) in (offset..).zip(data) {
            let source = usize::try_from(at).ok().and_then(|at| bytes.get(at));
            *byte = source.copied().unwrap_or(0);
        }
    }

    /// Forgets interrupts not yet delivered: their device was reset.
    pub fn clear_pending(&self) {
        let mut table = self.lock();
        for vector in &mut table.vectors {
            vector.pending = false;
        }
    }

    /// The table and which vectors are pending, for [`Self::restore`].
    pub fn save(&self) -> Vec<MsixVector> {
        let table = self.lock();
        let vectors = table.vectors.iter().map(|vector| MsixVector {
            address: vector.address,
            data: vector.data,
            control: vector.control,
            pending: vector.pending,
            ..Default::default()
        });
        vectors.collect()
    }

    /// Takes over a saved table with Message Control as the guest wrote it. Sends nothing.
    ///
    /// # Errors
    /// The table is of another size.
    pub fn restore(&self, saved: &[MsixVector], control: u16) -> Result<(), StateError> {
        let mut table = self.lock();
        if saved.len() != table.vectors.len() {
            return Err(StateError::Content("an MSI-X table of another device"));
        }
        table.control = control;
        for (vector, saved) in table.vectors.iter_mut().zip(saved) {
            *vector = Vector {
                address: saved.address,
                data: saved.data,
                control: saved.control & VECTOR_CONTROL_MASKED,
                pending: saved.pending,
            };
        }
        Ok(())
    }

    /// Sends what is pending and not masked, and has the wires follow the table.
    fn deliver(&self, table: &mut Table) {
        let open = table.control & ENABLE != 0 && table.control & MASK_ALL == 0;
        for wire in &mut table.wires {
            let vector = table.vectors.get(usize::from(wire.vector));
            let vector =
                vector.filter(|vector| open && vector.control & VECTOR_CONTROL_MASKED == 0);
            self.lead(wire, vector.map(|vector| (vector.address, vector.data)));
        }
        if !open {
            return;
        }
        for vector in &mut table.vectors {
            if !vector.pending || vector.control & VECTOR_CONTROL_MASKED != 0 {
                continue;
            }
            vector.pending = false;
            // The guest chose the address. One that names no APIC reaches nobody, as on hardware.
            if let Err(e) = self.sink.send(vector.address, vector.data) {
                log::debug!("KVM_SIGNAL_MSI to {:#x}: {e}", vector.address);
            }
        }
    }

    fn lead(&self, wire: &mut Wire, message: Option<(u64, u32)>) {
        if wire.message == message {
            return;
        }
        wire.message = message;
        if let Some(line) = wire.line.take() {
            if let Err(e) = self.sink.cut(&wire.call, line) {
                log::warn!("vector {}: cut its irqfd: {e}", wire.vector);
            }
        }
        if let Some((address, data)) = message {
            match self.sink.lead(&wire.call, address, data) {
                Ok(line) => wire.line = Some(line),
                // As above.
                Err(e) => log::debug!("irqfd to {address:#x}: {e}"),
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Vector {
    fn to_bytes(self) -> [u8; ENTRY] {
        let low = u128::from(self.address);
        let high = u128::from(self.data) | u128::from(self.control) << 32;
        (low | high << 64).to_le_bytes()
    }

    fn set_bytes(&mut self, bytes: &[u8; ENTRY]) {
        let value = u128::from_le_bytes(*bytes);
        self.address = value as u64;
        self.data = (value >> 64) as u32;
        self.control = (value >> 96) as u32 & VECTOR_CONTROL_MASKED;
    }
}

/// Vector and byte of an access to the table; accesses are 4 or 8 bytes, aligned.
fn locate(offset: u64, length: usize) -> Option<(usize, usize)> {
    let offset = usize::try_from(offset).ok()?;
    let aligned = matches!(length, 4 | 8) && offset % length == 0;
    aligned.then_some((offset / ENTRY, offset % ENTRY))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Messages, and those that lines lead to.
    #[derive(Default)]
    struct Sent(Mutex<Vec<(u64, u32)>>, Mutex<Vec<Option<(u64, u32)>>>);

    impl MessageSink for Sent {
        fn send(&self, address: u64, data: u32) -> io::Result<()> {
            self.0.lock().unwrap().push((address, data));
            Ok(())
        }
        fn lead(&self, _: &EventFd, address: u64, data: u32) -> io::Result<u32> {
            let mut lines = self.1.lock().unwrap();
            lines.push(Some((address, data)));
            Ok(lines.len() as u32 - 1)
        }
        fn cut(&self, _: &EventFd, line: u32) -> io::Result<()> {
            let line = self.1.lock().unwrap()[line as usize].take();
            line.map(drop).ok_or(io::ErrorKind::NotFound.into())
        }
    }

    impl Msix {
        fn read_all(&self, table: &mut [u8]) {
            for (offset, bytes) in (0..).step_by(8).zip(table.chunks_mut(8)) {
                self.read_table(offset, bytes);
            }
        }
    }

    fn msix() -> (Arc<Sent>, Msix) {
        let sent = Arc::new(Sent::default());
        let msix = Msix::new(2, Arc::clone(&sent) as Arc<dyn MessageSink>);
        msix.write_table(16, &0xfee0_1000u64.to_le_bytes());
        msix.write_table(24, &0x41u32.to_le_bytes());
        (sent, msix)
    }

    #[test]
    fn a_masked_vector_waits_and_is_delivered_once() {
        let (sent, msix) = msix();
        msix.set_control(ENABLE);
        msix.signal(1);
        msix.signal(1);
        let mut pending = [0; 8];
        msix.read_pending(0, &mut pending);
        assert_eq!(pending[0], 2);
        assert!(sent.0.lock().unwrap().is_empty());
        msix.write_table(28, &0u32.to_le_bytes());
        assert_eq!(*sent.0.lock().unwrap(), [(0xfee0_1000, 0x41)]);
        msix.signal(1);
        assert_eq!(sent.0.lock().unwrap().len(), 2);
    }

    #[test]
    fn the_function_mask_and_enable_bit_hold_back() {
        let (sent, msix) = msix();
        msix.write_table(28, &0u32.to_le_bytes());
        msix.signal(1);
        msix.set_control(ENABLE | MASK_ALL);
        msix.signal(1);
        assert!(sent.0.lock().unwrap().is_empty());
        msix.set_control(ENABLE);
        assert_eq!(sent.0.lock().unwrap().len(), 1);
    }

    #[test]
    fn a_wire_leads_where_the_table_says_while_the_vector_is_open() {
        let (sent, msix) = msix();
        let lines = || {
            sent.1
                .lock()
                .unwrap()
                .iter()
                .flatten()
                .copied()
                .collect::<Vec<_>>()
        };
        let call = Arc::new(EventFd::new(0).unwrap());
        msix.write_table(28, &0u32.to_le_bytes());
        msix.wire(1, &call);
        assert_eq!(lines(), []);
        msix.set_control(ENABLE);
        assert_eq!(lines(), [(0xfee0_1000, 0x41)]);
        // A vector of no queue's is nothing.
        let nobody = Arc::new(EventFd::new(0).unwrap());
        msix.wire(0xffff, &nobody);
        assert_eq!(lines(), [(0xfee0_1000, 0x41)]);
        // Linux moves one: masked, changed, open.
        msix.write_table(28, &1u32.to_le_bytes());
        assert_eq!(lines(), []);
        msix.write_table(24, &0x52u32.to_le_bytes());
        assert_eq!(lines(), []);
        msix.write_table(28, &0u32.to_le_bytes());
        assert_eq!(lines(), [(0xfee0_1000, 0x52)]);
        let before = sent.1.lock().unwrap().len();
        msix.set_control(ENABLE | MASK_ALL);
        assert_eq!(lines(), []);
        msix.set_control(ENABLE);
        msix.set_control(ENABLE);
        assert_eq!(lines(), [(0xfee0_1000, 0x52)]);
        assert_eq!(sent.1.lock().unwrap().len(), before + 1);
        msix.unwire(&call);
        msix.unwire(&nobody);
        msix.set_control(0);
        msix.set_control(ENABLE);
        assert_eq!(lines(), []);
    }

    #[test]
    fn a_restored_table_sends_where_the_guest_wanted() {
        let (sent, before) = msix();
        before.set_control(ENABLE);
        before.signal(1);
        let (_, after) = msix();
        after.restore(&before.save(), ENABLE).unwrap();
        let mut pending = [0; 1];
        after.read_pending(0, &mut pending);
        assert_eq!(pending, [2]);
        assert!(sent.0.lock().unwrap().is_empty());
        assert!(after.restore(&[], ENABLE).is_err());
    }

    /// Every access of up to 8 bytes, against bytes of which only aligned words are written.
    #[test]
    fn a_table_is_bytes_of_which_the_reserved_ones_stay_zero() {
        let (_, msix) = msix();
        let mut model = [0; 2 * ENTRY];
        msix.read_all(&mut model);
        for offset in 0..3 * ENTRY {
            for length in 1..=8 {
                let value = (offset * 37 + length * 11) as u8 | 0xf0;
                msix.write_table(offset as u64, &vec![value; length]);
                let aligned = matches!(length, 4 | 8) && offset % length == 0;
                if let Some(bytes) = model.get_mut(offset..offset + length).filter(|_| aligned) {
                    bytes.fill(value);
                    for entry in model.chunks_mut(ENTRY) {
                        entry[12] &= VECTOR_CONTROL_MASKED as u8;
                        entry[13..].fill(0);
                    }
                }
                let mut table = [0; 2 * ENTRY];
                msix.read_all(&mut table);
                assert_eq!(table, model, "{length} bytes at {offset}");
            }
        }
    }

    #[test]
    fn vectors_and_accesses_that_do_not_exist_do_nothing() {
        let (sent, msix) = msix();
        msix.set_control(ENABLE);
        msix.signal(0xffff);
        msix.write_table(32, &[0; 4]);
        msix.write_table(u64::MAX - 3, &[0; 4]);
        msix.write_table(1, &[0; 4]);
        let mut data = [7; 4];
        msix.read_table(1 << 40, &mut data);
        assert_eq!(data, [7; 4]);
        assert!(sent.0.lock().unwrap().is_empty());
        msix.read_table(24, &mut data);
        assert_eq!(u32::from_le_bytes(data), 0x41);
    }
}
