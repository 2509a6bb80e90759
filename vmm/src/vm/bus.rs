//! What the guest's port and MMIO accesses reach. Runs on the vCPUs' threads.
//!
//! Ports that nobody claims read as all ones, as on a real bus: that is how the kernel finds out
//! that there is no PIC, PIT or RTC.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::coalesced::CoalescedWrites;
use crate::{
    devices::{console::Console, reset_port::ResetPort},
    pci::PciBus,
};

const PCI_CONFIG: u16 = 0xcf8;
const PCI_CONFIG_LAST: u16 = 0xcff;
const SERIAL: u16 = 0x3f8;
const SERIAL_LAST: u16 = 0x3ff;
const KEYBOARD_DATA: u16 = 0x60;
const KEYBOARD_COMMAND: u16 = 0x64;

/// The ports whose writes KVM may collect, with the width of the range.
pub(super) const COALESCED: [(u16, u32); 2] = [(PCI_CONFIG, 4), (SERIAL, 1)];

/// The guest's address spaces.
pub(super) struct GuestBus {
    pub(super) pci: Arc<Mutex<PciBus>>,
    pub(super) console: Arc<Mutex<Console>>,
    pub(super) reset_port: ResetPort,
    /// None when the host's KVM cannot collect port writes.
    pub(super) coalesced: Option<CoalescedWrites>,
}

impl GuestBus {
    /// Serves the writes that KVM has collected. Must come before an exit is served.
    pub(super) fn drain(&self) {
        if let Some(coalesced) = &self.coalesced {
            coalesced.drain(|port, data| self.write_port(port, data));
        }
    }

    pub(super) fn read_port(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        match port {
            PCI_CONFIG..=PCI_CONFIG_LAST => self.pci().read_port(port - PCI_CONFIG, data),
            SERIAL..=SERIAL_LAST => lock(&self.console).read(port - SERIAL, data),
            KEYBOARD_DATA | KEYBOARD_COMMAND => self.reset_port.read(data),
            _ => {}
        }
    }

    pub(super) fn write_port(&self, port: u16, data: &[u8]) {
        match port {
            PCI_CONFIG..=PCI_CONFIG_LAST => self.pci().write_port(port - PCI_CONFIG, data),
            SERIAL..=SERIAL_LAST => lock(&self.console).write(port - SERIAL, data),
            KEYBOARD_COMMAND => self.reset_port.write(data),
            _ => {}
        }
    }

    pub(super) fn read_mmio(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        self.pci().read_mmio(address, data);
    }

    pub(super) fn write_mmio(&self, address: u64, data: &[u8]) {
        self.pci().write_mmio(address, data);
    }

    fn pci(&self) -> MutexGuard<'_, PciBus> {
        lock(&self.pci)
    }
}

/// A build with `panic = "abort"` never sees a poisoned lock.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
