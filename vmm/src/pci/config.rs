//! The configuration space of a device with one memory BAR (PCI 3.0 chapter 6).
//!
//! BARs of the devices that a machine boots with do not move: the VMM places them before the guest starts, and
//! what a guest writes there only serves to ask for the size. So doorbells are registered with KVM once. The BAR
//! of a device that is plugged in is where the guest puts it: Linux places what it finds on a bus that it scans
//! again, wherever it was.

use super::{Bar, PciDevice};
use crate::{
    state::{PciFunction, StateError},
    virtio::InTheWay,
};

/// Offsets of the header (§6.1).
const VENDOR: usize = 0x00;
const DEVICE: usize = 0x02;
const COMMAND: u8 = 0x04;
const STATUS: usize = 0x06;
const REVISION: usize = 0x08;
const CLASS: usize = 0x09;
const BAR0: u8 = 0x10;
const SUBSYSTEM_VENDOR: usize = 0x2c;
const SUBSYSTEM: usize = 0x2e;
const CAPABILITIES: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;

const STATUS_CAPABILITIES: u8 = 1 << 4;
const COMMAND_MEMORY: u16 = 1 << 1;
/// Memory space, bus master, interrupt disable.
const COMMAND_WRITABLE: u16 = COMMAND_MEMORY | 1 << 2 | 1 << 10;

/// Who a device says it is.
#[derive(Debug, Clone, Copy)]
pub struct Identity {
    pub vendor: u16,
    pub device: u16,
    pub revision: u8,
    /// Class, subclass and programming interface, 24 bits.
    pub class: u32,
    pub subsystem: u16,
}

/// The 256 bytes and which of their bits the guest may change.
pub struct ConfigSpace {
    bytes: [u8; 256],
    writable: [u8; 256],
    bar: Option<Bar>,
    /// The guest places the BAR, and says when it answers.
    movable: bool,
    /// The guest has asked for the BAR's size and not yet written an address back.
    sizing: bool,
    next_capability: usize,
    last_capability: usize,
}

impl ConfigSpace {
    pub fn new(identity: Identity, bar: Option<Bar>) -> Self {
        let mut config = Self {
            bytes: [0; 256],
            writable: [0; 256],
            bar,
            movable: false,
            sizing: false,
            next_capability: FIRST_CAPABILITY,
            last_capability: CAPABILITIES,
        };
        config.put(VENDOR, &identity.vendor.to_le_bytes());
        config.put(DEVICE, &identity.device.to_le_bytes());
        config.put(REVISION, &[identity.revision]);
        let [low, middle, high, _] = identity.class.to_le_bytes();
        config.put(CLASS, &[low, middle, high]);
        config.put(SUBSYSTEM_VENDOR, &identity.vendor.to_le_bytes());
        config.put(SUBSYSTEM, &identity.subsystem.to_le_bytes());
        config.allow(COMMAND.into(), &COMMAND_WRITABLE.to_le_bytes());
        config
    }

    /// The space of a device whose BAR of `size` bytes, a power of two, is nowhere until the guest has placed it.
    pub fn with_movable_bar(identity: Identity, size: u32) -> Self {
        Self {
            movable: true,
            ..Self::new(identity, Some(Bar { address: 0, size }))
        }
    }

    /// Where the BAR answers now.
    pub fn bar(&self) -> Option<Bar> {
        let decoded = !self.movable || self.word(COMMAND) & COMMAND_MEMORY != 0;
        // That the guest has placed none at 0 is how it says that it has not placed it.
        let placed = |bar: &Bar| !self.movable || bar.address != 0;
        self.bar.filter(|bar| decoded && placed(bar))
    }

    /// Adds a capability with this id and body (what follows id and next pointer), of which the
    /// guest may change the bits in `writable`. Returns its offset.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u8 {
        let offset = self.next_capability;
        self.put(offset, &[id, 0]);
        self.put(offset + 2, body);
        self.allow(offset + 2, writable);
        let link = match self.last_capability {
            CAPABILITIES => CAPABILITIES,
            previous => previous + 1,
        };
        self.put(link, &[offset as u8]);
        self.put(STATUS, &[STATUS_CAPABILITIES]);
        self.last_capability = offset;
        self.next_capability = (offset + 2 + body.len()).next_multiple_of(4);
        offset as u8
    }

    pub fn read(&self, offset: u8, data: &mut [u8]) {
        let bar = self.bar_register().to_le_bytes();
        for (at, byte) in (usize::from(offset)..).zip(data) {
            let in_bar = at.checked_sub(BAR0.into()).and_then(|i| bar.get(i));
            *byte = in_bar.or(self.bytes.get(at)).copied().unwrap_or(0xff);
        }
    }

    pub fn write(&mut self, offset: u8, data: &[u8]) {
        if offset == BAR0 {
            self.write_bar(data);
            return;
        }
        for (at, new) in (usize::from(offset)..).zip(data) {
            if let (Some(byte), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *byte = *byte & !mask | new & mask;
            }
        }
    }

    fn write_bar(&mut self, data: &[u8]) {
        if !self.movable {
            self.sizing = data == [0xff; 4];
        } else if let (Some(bar), Ok(address)) = (&mut self.bar, <[u8; 4]>::try_from(data)) {
            // What of the address cannot be set tells the size.
            bar.address = u64::from(u32::from_le_bytes(address) & !(bar.size.wrapping_sub(1)));
        }
    }

    /// The space as the guest has it, for [`Self::restore`]. Of one whose BAR the guest places, that is not all.
    pub fn save(&self) -> PciFunction {
        PciFunction {
            config: self.bytes.to_vec(),
            sizing: self.sizing,
            ..Default::default()
        }
    }

    /// Takes over what the guest wrote into the space of another machine's device.
    ///
    /// # Errors
    /// It is the space of another device: it differs in what no guest can write.
    pub fn restore(&mut self, saved: &PciFunction) -> Result<(), StateError> {
        let other = StateError::Content("the configuration space of another device");
        let Ok(bytes) = <[u8; 256]>::try_from(saved.config.as_slice()) else {
            return Err(other);
        };
        for ((now, new), mask) in self.bytes.iter_mut().zip(bytes).zip(self.writable) {
            if (*now ^ new) & !mask != 0 {
                return Err(other);
            }
            *now = new;
        }
        self.sizing = saved.sizing;
        Ok(())
    }

    /// The 16 bits at `offset`.
    pub fn word(&self, offset: u8) -> u16 {
        let mut bytes = [0; 2];
        self.read(offset, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    /// A 32-bit memory BAR (§6.2.5.1): its address, or the mask that tells its size.
    fn bar_register(&self) -> u32 {
        match self.bar {
            Some(bar) if self.sizing => !(bar.size.wrapping_sub(1)),
            Some(bar) => bar.address as u32,
            None => 0,
        }
    }

    // Offsets and lengths of `put` and `allow` are the device's own constants.
    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }
}

/// The host bridge in slot 0: kernels take a bus without one for no bus.
pub struct HostBridge(ConfigSpace);

impl Default for HostBridge {
    fn default() -> Self {
        // QEMU's generic host bridge: no kernel has quirks for it.
        let identity = Identity {
            vendor: 0x1b36,
            device: 0x0008,
            revision: 0,
            class: 0x06_0000,
            subsystem: 0,
        };
        Self(ConfigSpace::new(identity, None))
    }
}

impl PciDevice for HostBridge {
    fn read_config(&self, offset: u8, data: &mut [u8]) {
        self.0.read(offset, data);
    }
    fn write_config(&mut self, offset: u8, data: &[u8]) {
        self.0.write(offset, data);
    }
    fn bar(&self) -> Option<Bar> {
        self.0.bar()
    }
    fn read_bar(&mut self, _: u64, _: &mut [u8]) {}
    fn write_bar(&mut self, _: u64, _: &[u8]) {}
    fn save(&mut self) -> Result<PciFunction, InTheWay> {
        Ok(self.0.save())
    }
    fn restore(&mut self, saved: &PciFunction) -> Result<(), StateError> {
        self.0.restore(saved)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BAR: Bar = Bar {
        address: 0xc000_4000,
        size: 0x4000,
    };

    fn config() -> ConfigSpace {
        let identity = Identity {
            vendor: 0x1af4,
            device: 0x1053,
            revision: 1,
            class: 0x02_8000,
            subsystem: 0x40,
        };
        ConfigSpace::new(identity, Some(BAR))
    }

    fn dword(config: &ConfigSpace, offset: u8) -> u32 {
        let mut data = [0; 4];
        config.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn a_bar_tells_its_size_and_stays_where_it_is() {
        let mut config = config();
        assert_eq!(dword(&config, BAR0), 0xc000_4000);
        config.write(BAR0, &[0xff; 4]);
        assert_eq!(dword(&config, BAR0), 0xffff_c000);
        config.write(BAR0, &0xd000_0000u32.to_le_bytes());
        assert_eq!(dword(&config, BAR0), 0xc000_4000);
        config.write(BAR0 + 4, &[0xff; 4]);
        assert_eq!(dword(&config, BAR0 + 4), 0);
    }

    #[test]
    fn only_writable_bits_change() {
        let mut config = config();
        config.write(0, &[0; 4]);
        config.write(COMMAND, &[0xff; 4]);
        assert_eq!(dword(&config, 0), 0x1053_1af4);
        assert_eq!(config.word(COMMAND), COMMAND_WRITABLE);
    }

    #[test]
    fn capabilities_form_a_list() {
        let mut config = config();
        let first = config.add_capability(0x09, &[5, 6, 7], &[]);
        let second = config.add_capability(0x11, &[0; 10], &[0, 0xc0]);
        assert_eq!(dword(&config, 0x34) & 0xff, u32::from(first));
        assert_eq!(dword(&config, first), 0x0605_0009 | u32::from(second) << 8);
        assert_eq!(dword(&config, second) & 0xff00, 0);
        config.write(second, &[0xff; 4]);
        assert_eq!(dword(&config, second), 0xc000_0011);
    }

    #[test]
    fn only_the_same_device_s_space_is_taken_over() {
        let mut before = config();
        before.write(COMMAND, &[6]);
        before.write(BAR0, &[0xff; 4]);
        let saved = before.save();
        let mut after = config();
        after.restore(&saved).unwrap();
        assert_eq!(after.word(COMMAND), 6);
        assert_eq!(dword(&after, BAR0), 0xffff_c000);
        let mut other = saved.clone();
        other.config[DEVICE] ^= 1;
        assert!(config().restore(&other).is_err());
        other.config.truncate(255);
        assert!(config().restore(&other).is_err());
    }

    #[test]
    fn reads_past_the_end_are_all_ones() {
        let mut data = [0; 4];
        config().read(0xfe, &mut data);
        assert_eq!(data, [0, 0, 0xff, 0xff]);
    }
}
