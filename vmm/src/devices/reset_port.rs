//! The keyboard controller's one useful trick: pulsing the CPU's reset line.
//!
//! Linux (`reboot=k`) waits until the controller's input buffer is empty and then writes the
//! command. Reads have the busy bit clear, or each would be waited for.

use std::sync::{Arc, Mutex, PoisonError};

use super::console::Console;
use crate::vm::ending::{Cause, Ending};

const PULSE_RESET: u8 = 0xfe;

/// Port 0x64.
pub struct ResetPort {
    pub ending: Ending,
    pub console: Arc<Mutex<Console>>,
}

impl ResetPort {
    pub fn read(&self, data: &mut [u8]) {
        data.fill(0);
    }

    /// Ends the machine. A kernel that panicked before it had found pvpanic shows here too.
    pub fn write(&self, data: &[u8]) {
        if data != [PULSE_RESET] {
            return;
        }
        let console = self.console.lock().unwrap_or_else(PoisonError::into_inner);
        match console.panic_line() {
            Some(line) => self.ending.report(Cause::Panicked, line),
            None => self.ending.report(Cause::Reset, ""),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port() -> ResetPort {
        ResetPort {
            ending: Ending::default(),
            console: Arc::default(),
        }
    }

    #[test]
    fn only_the_reset_command_ends_the_machine() {
        let port = port();
        port.write(&[0xd1]);
        assert!(!port.ending.has_come());
        port.write(&[PULSE_RESET]);
        assert_eq!(port.ending.get().unwrap().cause, Cause::Reset);
    }

    #[test]
    fn a_reset_after_a_panic_is_a_panic() {
        let port = port();
        port.console
            .lock()
            .unwrap()
            .write(0, b"Kernel panic - not syncing: no init\n");
        port.write(&[PULSE_RESET]);
        assert_eq!(port.ending.get().unwrap().cause, Cause::Panicked);
    }
}
