//! Lines from eventfds that the host's kernel signals to the guest's local APICs: irqfds, each with a GSI of its own and
//! a route from there to its message.
//!
//! KVM knows only the table of all routes, and each change of it waits for all who look at it. So they are for devices
//! alone that have nobody in this process to signal for them (docs/decisions/0008).

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex, PoisonError},
};

use kvm_bindings::{KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use crate::pci::msix::MessageSink;

/// A machine's routes, in the one process that sets any.
pub(super) struct Routes {
    vm: Arc<VmFd>,
    /// What has a line: by its GSI, address and data of its message.
    lines: Mutex<BTreeMap<u32, (u64, u32)>>,
}

impl Routes {
    pub(super) fn new(vm: Arc<VmFd>) -> Self {
        let lines = Mutex::default();
        Self { vm, lines }
    }

    fn set(&self, lines: &BTreeMap<u32, (u64, u32)>) -> io::Result<()> {
        let entries: Vec<_> = lines.iter().map(entry).collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(io::Error::other)?;
        Ok(self.vm.set_gsi_routing(&table)?)
    }
}

impl MessageSink for Routes {
    fn send(&self, address: u64, data: u32) -> io::Result<()> {
        self.vm.send(address, data)
    }

    fn lead(&self, call: &EventFd, address: u64, data: u32) -> io::Result<u32> {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        // There are fewer devices than numbers.
        let line = (0..).find(|line| !lines.contains_key(line)).unwrap_or(0);
        lines.insert(line, (address, data));
        let led = self.set(&lines);
        let led = led.and_then(|()| Ok(self.vm.register_irqfd(call, line)?));
        if let Err(e) = led {
            lines.remove(&line);
            return Err(e);
        }
        Ok(line)
    }

    fn cut(&self, call: &EventFd, line: u32) -> io::Result<()> {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        // Its route stays until the next change: nothing leads there.
        lines.remove(&line);
        Ok(self.vm.unregister_irqfd(call, line)?)
    }
}

fn entry((line, (address, data)): (&u32, &(u64, u32))) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi: *line,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    entry.u.msi.address_lo = *address as u32;
    entry.u.msi.address_hi = (address >> 32) as u32;
    entry.u.msi.__bindgen_anon_1.devid = 0;
    entry.u.msi.data = *data;
    entry
}
