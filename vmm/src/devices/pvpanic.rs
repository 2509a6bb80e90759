//! pvpanic: one register by which the guest kernel says how it ends
//! (QEMU `docs/specs/pvpanic.rst`; Linux `drivers/misc/pvpanic`).

use std::sync::{Arc, Mutex, PoisonError};

use super::console::Console;
use crate::{
    pci::{
        Bar, PciDevice,
        config::{ConfigSpace, Identity},
    },
    state::{PciFunction, StateError},
    virtio::InTheWay,
    vm::ending::{Cause, Ending},
};

/// Bytes of the BAR; the register is the first.
pub const BAR_SIZE: u32 = 16;

/// Events, the same bits for "can be reported" (read) and "has happened" (write).
const PANICKED: u8 = 1 << 0;
const CRASH_LOADED: u8 = 1 << 1;
const SHUTDOWN: u8 = 1 << 2;

pub struct Pvpanic {
    config: ConfigSpace,
    ending: Ending,
    console: Arc<Mutex<Console>>,
}

impl Pvpanic {
    pub fn new(bar: Bar, ending: Ending, console: Arc<Mutex<Console>>) -> Self {
        let identity = Identity {
            vendor: 0x1b36,
            device: 0x0011,
            revision: 1,
            class: 0x08_8000,
            subsystem: 0x1100,
        };
        Self {
            config: ConfigSpace::new(identity, Some(bar)),
            ending,
            console,
        }
    }

    fn event(&self, event: u8) {
        if event & PANICKED != 0 {
            let console = self.console.lock().unwrap_or_else(PoisonError::into_inner);
            let line = console.panic_line();
            let line = line.unwrap_or_else(|| "the kernel printed no reason".to_string());
            self.ending.report(Cause::Panicked, line);
        } else if event & SHUTDOWN != 0 {
            self.ending.report(Cause::PoweredOff, "");
        } else if event & CRASH_LOADED != 0 {
            // The guest goes on in a crash kernel, which will end it.
            log::info!("the guest kernel panicked and starts its crash kernel");
        }
    }
}

impl PciDevice for Pvpanic {
    fn read_config(&self, offset: u8, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn write_config(&mut self, offset: u8, data: &[u8]) {
        self.config.write(offset, data);
    }

    fn bar(&self) -> Option<Bar> {
        self.config.bar()
    }

    fn read_bar(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (0, Some(register)) = (offset, data.first_mut()) {
            *register = PANICKED | CRASH_LOADED | SHUTDOWN;
        }
    }

    fn write_bar(&mut self, offset: u64, data: &[u8]) {
        if let (0, [event]) = (offset, data) {
            self.event(*event);
        }
    }

    fn save(&mut self) -> Result<PciFunction, InTheWay> {
        Ok(self.config.save())
    }

    fn restore(&mut self, saved: &PciFunction) -> Result<(), StateError> {
        self.config.restore(saved)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end_after(printed: &[u8], event: u8) -> Option<Cause> {
        let ending = Ending::default();
        let console: Arc<Mutex<Console>> = Arc::default();
        console.lock().unwrap().write(0, printed);
        let bar = Bar {
            address: 0xc000_0000,
            size: BAR_SIZE,
        };
        Pvpanic::new(bar, ending.clone(), console).write_bar(0, &[event]);
        ending.get().map(|end| end.cause)
    }

    #[test]
    fn events_end_the_machine() {
        assert_eq!(end_after(b"", SHUTDOWN), Some(Cause::PoweredOff));
        assert_eq!(end_after(b"Kernel panic", PANICKED), Some(Cause::Panicked));
        assert_eq!(end_after(b"", PANICKED | SHUTDOWN), Some(Cause::Panicked));
        assert_eq!(end_after(b"", CRASH_LOADED), None);
        assert_eq!(end_after(b"", 0x80), None);
    }
}
