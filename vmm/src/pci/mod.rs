//! The PCI bus: one bus, configured by ports 0xcf8 and 0xcfc ("mechanism #1", PCI 3.0 §3.2.2.3.2).
//!
//! Owned by the VM behind one lock and used on the vCPUs' threads. Interrupts and the doorbells of
//! devices with threads do not come here: they go between KVM and those threads.

pub mod config;
pub mod msix;

use crate::{
    memory::{MMIO_SIZE, MMIO_START},
    state::{self, StateError},
    virtio::{DeviceError, InTheWay},
};

/// Registers relative to port 0xcf8.
const ADDRESS: u16 = 0;
const DATA: u16 = 4;

/// Slots of the bus.
const SLOTS: usize = 32;

/// A device on the bus, as the guest reaches it.
pub trait PciDevice: Send {
    /// Reads the configuration space at `offset`; `data` is 1, 2 or 4 bytes within one dword.
    fn read_config(&self, offset: u8, data: &mut [u8]);
    /// Writes the configuration space, with the same shapes.
    fn write_config(&mut self, offset: u8, data: &[u8]);
    /// Where the memory BAR answers now, if it does.
    fn bar(&self) -> Option<Bar>;
    /// Reads `data.len()` bytes, 1 to 8, at `offset` of the memory BAR.
    fn read_bar(&mut self, offset: u64, data: &mut [u8]);
    /// Writes the memory BAR, with the same shapes.
    fn write_bar(&mut self, offset: u64, data: &[u8]);

    /// Stops all work of the device's own: until [`Self::start`] it neither touches guest memory nor
    /// interrupts.
    fn stop(&mut self) {}

    /// Goes on after [`Self::stop`], or after [`Self::restore`] where it was.
    ///
    /// # Errors
    /// The host refuses, or what was restored is no state to go on from.
    fn start(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// The device was taken out of its slot, stopped: nobody reaches it any more, and what is the host's of it is
    /// given back.
    fn unplug(&mut self) {}

    /// All that the guest could tell this device from a new one by. Called while stopped.
    ///
    /// # Errors
    /// Something is under way that no other machine could go on with.
    fn save(&mut self) -> Result<state::PciFunction, InTheWay>;

    /// Takes over what [`Self::save`] of the same device of another machine returned. Called once,
    /// on a new device.
    ///
    /// # Errors
    /// It is of another device, or nothing that `save` returns; the device must be dropped.
    fn restore(&mut self, saved: &state::PciFunction) -> Result<(), StateError>;
}

/// Where a device's one memory BAR lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bar {
    /// Guest physical address, a multiple of the size.
    pub address: u64,
    /// Bytes; a power of two.
    pub size: u32,
}

/// The machine has more devices than the bus takes.
#[derive(Debug, thiserror::Error)]
pub enum PciError {
    #[error("the PCI bus has no slot left")]
    NoSlot,
    #[error("the MMIO window has no room for a BAR of {0:#x} bytes")]
    NoRoom(u32),
    #[error("slot: nothing was plugged into slot {0} of the PCI bus")]
    NotPlugged(u32),
}

/// What is in a slot.
enum Slot {
    Taken(Occupant),
    /// Nothing any more. The guest may not have noticed: where the BAR was it reads zeros, for Linux' driver waits
    /// without end until the status of a device that it lets go of reads zero (`vp_reset`), gone or not.
    Pulled(Option<Bar>),
}

/// A device in its slot.
struct Occupant {
    device: Box<dyn PciDevice>,
    /// What is plugged into a machine that runs, by its name in messages; none of what it was built with.
    plugged: Option<&'static str>,
}

/// The bus and its devices.
pub struct PciBus {
    /// The configuration address last written to port 0xcf8.
    address: u32,
    slots: Vec<Slot>,
    next_bar: u64,
}

impl Default for PciBus {
    fn default() -> Self {
        Self {
            address: 0,
            slots: Vec::new(),
            next_bar: MMIO_START,
        }
    }
}

impl PciBus {
    /// Reserves a BAR of `size` bytes, a power of two, for the device added next.
    pub fn place_bar(&mut self, size: u32) -> Result<Bar, PciError> {
        let address = self.next_bar.next_multiple_of(u64::from(size.max(1)));
        let end = address + u64::from(size);
        if end > MMIO_START + MMIO_SIZE {
            return Err(PciError::NoRoom(size));
        }
        self.next_bar = end;
        Ok(Bar { address, size })
    }

    /// Puts a device of the machine's own into the next slot, before any is plugged in.
    pub fn add(&mut self, device: Box<dyn PciDevice>) -> Result<(), PciError> {
        self.occupy(device, None).map(drop)
    }

    /// Puts a device into a free slot, whose number is the answer. The guest finds it when it looks, and does not
    /// where it thinks that it knows what is there. So slots that have been used come last.
    pub fn plug(
        &mut self,
        name: &'static str,
        device: Box<dyn PciDevice>,
    ) -> Result<u32, PciError> {
        self.occupy(device, Some(name))
    }

    fn occupy(
        &mut self,
        device: Box<dyn PciDevice>,
        plugged: Option<&'static str>,
    ) -> Result<u32, PciError> {
        let occupant = Slot::Taken(Occupant { device, plugged });
        if self.slots.len() < SLOTS {
            self.slots.push(occupant);
            return Ok(self.slots.len() as u32 - 1);
        }
        let mut slots = (0..).zip(&mut self.slots);
        let pulled = slots.find(|(_, slot)| matches!(slot, Slot::Pulled(_)));
        let (number, slot) = pulled.ok_or(PciError::NoSlot)?;
        *slot = occupant;
        Ok(number)
    }

    /// Takes out what was plugged into a slot, whatever it is doing. The guest then finds nobody there.
    pub fn unplug(&mut self, slot: u32) -> Result<(), PciError> {
        let place = usize::try_from(slot).ok();
        let place = place.and_then(|slot| self.slots.get_mut(slot));
        let Some(place) = place.filter(|place| place.plugged().is_some()) else {
            return Err(PciError::NotPlugged(slot));
        };
        let bar = place.device().and_then(|device| device.bar());
        if let Some(device) = place.device() {
            device.stop();
            device.unplug();
        }
        *place = Slot::Pulled(bar);
        Ok(())
    }

    fn devices(&mut self) -> impl Iterator<Item = &mut Box<dyn PciDevice>> {
        self.slots.iter_mut().filter_map(Slot::device)
    }

    /// A read of port 0xcf8 + `register`. What is not there leaves `data` as it is.
    pub fn read_port(&mut self, register: u16, data: &mut [u8]) {
        if register == ADDRESS && data.len() == 4 {
            data.copy_from_slice(&self.address.to_le_bytes());
        } else if let Some((offset, device)) = self.selected(register, data.len()) {
            device.read_config(offset, data);
        }
    }

    /// A write to port 0xcf8 + `register`.
    pub fn write_port(&mut self, register: u16, data: &[u8]) {
        match (register, <[u8; 4]>::try_from(data)) {
            (ADDRESS, Ok(address)) => self.address = u32::from_le_bytes(address),
            _ => {
                if let Some((offset, device)) = self.selected(register, data.len()) {
                    device.write_config(offset, data);
                }
            }
        }
    }

    pub fn read_mmio(&mut self, address: u64, data: &mut [u8]) {
        if let Some((offset, device)) = self.at(address, data.len()) {
            device.read_bar(offset, data);
        } else if self.slots.iter().any(|slot| slot.was_at(address)) {
            data.fill(0);
        }
    }

    pub fn write_mmio(&mut self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.at(address, data.len()) {
            device.write_bar(offset, data);
        }
    }

    /// Stops all devices, see [`PciDevice::stop`].
    pub fn stop(&mut self) {
        for device in self.devices() {
            device.stop();
        }
    }

    /// Lets all devices go on, see [`PciDevice::start`].
    ///
    /// # Errors
    /// That of the first that cannot; the others go on.
    pub fn start(&mut self) -> Result<(), DeviceError> {
        let started = self.devices().map(|device| device.start());
        started.fold(Ok(()), Result::and)
    }

    /// The bus and its devices, which are stopped.
    ///
    /// # Errors
    /// What is in the way of the first that cannot be saved; a device that was plugged in: the machine that is
    /// restored would not have it.
    pub fn save(&mut self) -> Result<state::Bus, InTheWay> {
        let mut slots = (0..).zip(&self.slots);
        let plugged = slots.find_map(|(number, slot)| Some((number, slot.plugged()?)));
        if let Some((slot, device)) = plugged {
            let what = format!("it is plugged into slot {slot} of the PCI bus");
            return Err(InTheWay { device, what });
        }
        let functions = self.devices().map(|device| device.save());
        let functions = functions.collect::<Result<_, _>>()?;
        Ok(state::Bus {
            address: self.address,
            functions,
            ..Default::default()
        })
    }

    /// Takes over what [`Self::save`] returned, into new devices in the same slots.
    ///
    /// # Errors
    /// The devices are not the same, or what they remember is damaged.
    pub fn restore(&mut self, saved: &state::Bus) -> Result<(), StateError> {
        if saved.functions.len() != self.devices().count() {
            return Err(StateError::Content("the machine has other devices"));
        }
        self.address = saved.address;
        for (device, saved) in self.devices().zip(&saved.functions) {
            device.restore(saved)?;
        }
        Ok(())
    }

    /// The device and configuration offset that an access of `length` bytes to the data port means.
    fn selected(&mut self, register: u16, length: usize) -> Option<(u8, &mut Box<dyn PciDevice>)> {
        const ENABLE: u32 = 1 << 31;
        const BUS_AND_FUNCTION: u32 = 0xff << 16 | 0x7 << 8;
        let byte = register.checked_sub(DATA)?;
        let within_dword =
            usize::from(byte).checked_add(length)? <= 4 && [1, 2, 4].contains(&length);
        if !within_dword || self.address & ENABLE == 0 || self.address & BUS_AND_FUNCTION != 0 {
            return None;
        }
        let slot = (self.address >> 11 & 0x1f) as usize;
        let offset = (self.address & 0xfc) as u8 | byte as u8;
        Some((offset, self.slots.get_mut(slot)?.device()?))
    }

    /// The device whose BAR holds the whole access.
    fn at(&mut self, address: u64, length: usize) -> Option<(u64, &mut Box<dyn PciDevice>)> {
        self.devices().find_map(|device| {
            let bar = device.bar()?;
            let offset = address.checked_sub(bar.address)?;
            let end = offset.checked_add(length as u64)?;
            (end <= u64::from(bar.size)).then_some((offset, device))
        })
    }
}

impl Slot {
    fn device(&mut self) -> Option<&mut Box<dyn PciDevice>> {
        match self {
            Self::Taken(occupant) => Some(&mut occupant.device),
            Self::Pulled(_) => None,
        }
    }

    /// The name of a device that was plugged in.
    fn plugged(&self) -> Option<&'static str> {
        match self {
            Self::Taken(occupant) => occupant.plugged,
            Self::Pulled(_) => None,
        }
    }

    /// Whether the BAR of what was pulled out of here was at that address.
    fn was_at(&self, address: u64) -> bool {
        match self {
            Self::Pulled(Some(bar)) => address
                .checked_sub(bar.address)
                .is_some_and(|offset| offset < u64::from(bar.size)),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(u8, Option<Bar>);

    impl PciDevice for Echo {
        fn read_config(&self, offset: u8, data: &mut [u8]) {
            data.fill(self.0 + offset);
        }
        fn write_config(&mut self, _: u8, data: &[u8]) {
            self.0 = data[0];
        }
        fn bar(&self) -> Option<Bar> {
            self.1
        }
        fn read_bar(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(self.0 + offset as u8);
        }
        fn write_bar(&mut self, _: u64, data: &[u8]) {
            self.0 = data[0];
        }
        fn save(&mut self) -> Result<state::PciFunction, InTheWay> {
            Ok(state::PciFunction {
                config: vec![self.0],
                ..Default::default()
            })
        }
        fn restore(&mut self, saved: &state::PciFunction) -> Result<(), StateError> {
            self.0 = saved.config[0];
            Ok(())
        }
    }

    fn bus() -> PciBus {
        let mut bus = PciBus::default();
        bus.add(Box::new(Echo(1, None))).unwrap();
        let bar = bus.place_bar(0x1000).unwrap();
        bus.add(Box::new(Echo(100, Some(bar)))).unwrap();
        bus
    }

    fn read(bus: &mut PciBus, register: u16, length: usize) -> Vec<u8> {
        let mut data = vec![0xff; length];
        bus.read_port(register, &mut data);
        data
    }

    #[test]
    fn the_address_selects_slot_and_register() {
        let mut bus = bus();
        bus.write_port(ADDRESS, &0x8000_0808u32.to_le_bytes());
        assert_eq!(read(&mut bus, ADDRESS, 4), 0x8000_0808u32.to_le_bytes());
        assert_eq!(read(&mut bus, DATA + 2, 2), [110, 110]);
        bus.write_port(DATA, &[7, 0, 0, 0]);
        assert_eq!(read(&mut bus, DATA, 1), [15]);
    }

    #[test]
    fn nobody_answers_for_what_is_not_there() {
        let mut bus = bus();
        // No enable bit, another bus, another function, an empty slot.
        for address in [0x0000_0800u32, 0x8001_0800, 0x8000_0900, 0x8000_1800] {
            bus.write_port(ADDRESS, &address.to_le_bytes());
            assert_eq!(read(&mut bus, DATA, 4), [0xff; 4], "{address:#x}");
        }
        // Accesses across a dword or of odd sizes.
        bus.write_port(ADDRESS, &0x8000_0800u32.to_le_bytes());
        for (register, length) in [(DATA + 3, 2), (DATA, 3), (DATA, 0), (1, 1), (DATA, 400)] {
            assert_eq!(read(&mut bus, register, length), vec![0xff; length]);
            bus.write_port(register, &vec![0; length]);
        }
    }

    #[test]
    fn a_bus_is_restored_slot_by_slot() {
        let mut before = bus();
        before.write_port(ADDRESS, &0x8000_0808u32.to_le_bytes());
        before.write_port(DATA, &[7]);
        let saved = before.save().unwrap();
        let mut after = bus();
        after.restore(&saved).unwrap();
        assert_eq!(read(&mut after, ADDRESS, 4), 0x8000_0808u32.to_le_bytes());
        assert_eq!(read(&mut after, DATA, 1), [15]);
        assert!(PciBus::default().restore(&saved).is_err());
    }

    #[test]
    fn what_is_plugged_in_can_be_taken_out_and_nothing_else() {
        let mut bus = bus();
        let slots: Vec<u32> = (0..30)
            .map(|_| bus.plug("echo", Box::new(Echo(50, None))).unwrap())
            .collect();
        assert_eq!(slots, (2..32).collect::<Vec<_>>());
        let full = bus.plug("echo", Box::new(Echo(50, None)));
        assert!(matches!(full, Err(PciError::NoSlot)));
        let error = bus.save().unwrap_err();
        assert_eq!(
            error.to_string(),
            "echo: it is plugged into slot 2 of the PCI bus"
        );

        bus.write_port(ADDRESS, &0x8000_3800u32.to_le_bytes());
        assert_eq!(read(&mut bus, DATA, 1), [50]);
        bus.unplug(7).unwrap();
        assert_eq!(read(&mut bus, DATA, 1), [0xff]);
        for slot in [0, 1, 7, 32, u32::MAX] {
            let refused = bus.unplug(slot);
            assert!(matches!(refused, Err(PciError::NotPlugged(of)) if of == slot));
        }
        assert_eq!(bus.plug("echo", Box::new(Echo(60, None))).unwrap(), 7);
        bus.unplug(9).unwrap();
        bus.unplug(8).unwrap();
        assert_eq!(bus.plug("echo", Box::new(Echo(60, None))).unwrap(), 8);
        assert_eq!(bus.plug("echo", Box::new(Echo(60, None))).unwrap(), 9);
        for slot in 2..32 {
            bus.unplug(slot).unwrap();
        }
        assert_eq!(bus.save().unwrap().functions.len(), 2);
    }

    /// Or a guest that lets go of it would wait for it without end.
    #[test]
    fn where_a_device_was_pulled_out_zeros_are_read() {
        let mut bus = bus();
        let bar = Bar {
            address: 0x1000_0000,
            size: 0x1000,
        };
        let slot = bus.plug("echo", Box::new(Echo(50, Some(bar)))).unwrap();
        let read = |bus: &mut PciBus, address| {
            let mut data = [0xff; 4];
            bus.read_mmio(address, &mut data);
            data
        };
        assert_eq!(read(&mut bus, bar.address + 4), [54; 4]);
        bus.unplug(slot).unwrap();
        assert_eq!(read(&mut bus, bar.address + 4), [0; 4]);
        for nobody in [bar.address - 1, bar.address + 0x1000, u64::MAX] {
            assert_eq!(read(&mut bus, nobody), [0xff; 4]);
        }
        // Who is there now comes first, and there is another slot for it.
        let other = bus.plug("echo", Box::new(Echo(60, Some(bar)))).unwrap();
        assert_eq!((other, read(&mut bus, bar.address)), (slot + 1, [60; 4]));
    }

    #[test]
    fn bars_are_aligned_and_bounded() {
        let mut bus = PciBus::default();
        assert_eq!(bus.place_bar(0x10).unwrap().address, MMIO_START);
        assert_eq!(bus.place_bar(0x4000).unwrap().address, MMIO_START + 0x4000);
        assert!(bus.place_bar(1 << 30).is_err());
    }

    /// BARs of all sizes, and accesses around each of their borders.
    #[test]
    fn bars_neither_overlap_nor_reach_beyond_themselves() {
        let mut bus = PciBus::default();
        let mut bars = Vec::new();
        for (number, shift) in (0..).zip([4, 14, 4, 12, 20, 14, 24, 4]) {
            let bar = bus.place_bar(1 << shift).unwrap();
            bus.add(Box::new(Echo(number << 4, Some(bar)))).unwrap();
            assert_eq!(bar.address % u64::from(bar.size), 0);
            bars.push(bar);
        }
        let borders = bars
            .iter()
            .flat_map(|bar| [bar.address, bar.address + u64::from(bar.size)]);
        for border in borders {
            for address in border - 9..border + 9 {
                for length in 1..=8_u64 {
                    let whole = |bar: &Bar| {
                        bar.address <= address
                            && address + length <= bar.address + u64::from(bar.size)
                    };
                    let holders: Vec<_> = (0..).zip(&bars).filter(|(_, bar)| whole(bar)).collect();
                    assert!(holders.len() <= 1);
                    let found = bus.at(address, length as usize).map(|(offset, _)| offset);
                    let wanted = holders.first().map(|(_, bar)| address - bar.address);
                    assert_eq!(found, wanted, "{length} bytes at {address:#x}");
                }
            }
        }
    }

    #[test]
    fn mmio_reaches_only_whole_accesses_within_a_bar() {
        let mut bus = bus();
        let mut data = [0xff; 8];
        bus.read_mmio(MMIO_START + 3, &mut data[..4]);
        assert_eq!(data[..4], [103; 4]);
        let mut past = [0xff; 8];
        bus.read_mmio(MMIO_START + 0xffc, &mut past);
        bus.read_mmio(u64::MAX, &mut past);
        assert_eq!(past, [0xff; 8]);
    }
}
