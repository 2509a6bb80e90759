//! The guest kernel's early serial port: a transmit-only 16550 whose output is kept in a ring.
//!
//! The transmitter is always empty, the receiver too, and there is no interrupt: just what
//! `earlyprintk=serial` polls. What the guest prints is untrusted and bounded; it is shown to people
//! when something went wrong.

use std::collections::VecDeque;

use crate::state;

/// Bytes of output kept: the last ones.
pub const KEPT: usize = 64 << 10;

/// Registers (PC16550D data sheet, table II).
const THR: u16 = 0;
const IIR: u16 = 2;
const LCR: u16 = 3;
const LSR: u16 = 5;
const LCR_DLAB: u8 = 1 << 7;
const IIR_NO_INTERRUPT: u8 = 1;
const LSR_THR_EMPTY: u8 = 1 << 5;
const LSR_TRANSMITTER_EMPTY: u8 = 1 << 6;

/// Longest line of the console that is reported as the reason of a panic.
const PANIC_LINE_MAX: usize = 256;
const PANIC: &[u8] = b"Kernel panic";

/// The serial port and what was printed on it.
#[derive(Debug, Default)]
pub struct Console {
    kept: VecDeque<u8>,
    line_control: u8,
}

impl Console {
    /// Reads `register`, 0 to 7; every byte of `data` becomes its value.
    pub fn read(&self, register: u16, data: &mut [u8]) {
        let value = match register {
            LSR => LSR_THR_EMPTY | LSR_TRANSMITTER_EMPTY,
            IIR => IIR_NO_INTERRUPT,
            LCR => self.line_control,
            _ => 0,
        };
        data.fill(value);
    }

    /// Writes `data` to `register`, 0 to 7.
    pub fn write(&mut self, register: u16, data: &[u8]) {
        match register {
            // With DLAB set, the register is the baud rate's.
            THR if self.line_control & LCR_DLAB == 0 => self.print(data),
            LCR => self.line_control = data.first().copied().unwrap_or(0),
            _ => {}
        }
    }

    fn print(&mut self, data: &[u8]) {
        let surplus = (self.kept.len() + data.len()).saturating_sub(KEPT);
        self.kept.drain(..surplus.min(self.kept.len()));
        self.kept.extend(data.iter().rev().take(KEPT).rev());
    }

    /// The last of what the guest printed, at most [`KEPT`] bytes.
    pub fn contents(&self) -> Vec<u8> {
        self.kept.iter().copied().collect()
    }

    /// The port and what it keeps, for [`Self::restore`].
    pub fn save(&self) -> state::Console {
        state::Console {
            kept: self.contents(),
            line_control: self.line_control.into(),
            ..Default::default()
        }
    }

    /// Goes on where another machine's port was saved.
    pub fn restore(&mut self, saved: &state::Console) {
        self.kept.clear();
        self.print(&saved.kept);
        self.line_control = saved.line_control as u8;
    }

    /// The last line that tells of a kernel panic, made printable.
    pub fn panic_line(&self) -> Option<String> {
        let contents = self.contents();
        let line = contents.split(|byte| *byte == b'\n').rev().find(|line| {
            let ends_report = line.windows(7).any(|w| w == b"---[ en");
            !ends_report && line.windows(PANIC.len()).any(|window| window == PANIC)
        })?;
        let text = String::from_utf8_lossy(line);
        let printable = text.chars().filter(|c| !c.is_control());
        Some(printable.take(PANIC_LINE_MAX).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_bytes_are_kept() {
        let mut console = Console::default();
        for _ in 0..KEPT {
            console.write(THR, b"a");
        }
        console.write(THR, b"end");
        let contents = console.contents();
        assert_eq!(contents.len(), KEPT);
        assert!(contents.ends_with(b"aend"));
        console.write(THR, &[b'x'; 2 * KEPT]);
        assert_eq!(console.contents(), [b'x'; KEPT]);
    }

    #[test]
    fn a_clone_prints_behind_what_was_printed() {
        let mut before = Console::default();
        before.write(THR, b"boot, ");
        before.write(LCR, &[LCR_DLAB]);
        let mut after = Console::default();
        after.restore(&before.save());
        after.write(THR, b"\x01");
        after.write(LCR, &[3]);
        after.write(THR, b"clone");
        assert_eq!(after.contents(), b"boot, clone");
        after.restore(&state::Console {
            kept: vec![b'x'; 2 * KEPT],
            ..Default::default()
        });
        assert_eq!(after.contents().len(), KEPT);
    }

    #[test]
    fn the_baud_rate_is_not_printed() {
        let mut console = Console::default();
        console.write(LCR, &[LCR_DLAB | 3]);
        console.write(THR, b"\x01");
        console.write(LCR, &[3]);
        console.write(THR, b"y");
        assert_eq!(console.contents(), b"y");
    }

    #[test]
    fn the_panic_is_found_and_made_printable() {
        let mut console = Console::default();
        assert_eq!(console.panic_line(), None);
        console.write(
            THR,
            b"[    0.1] Kernel panic - not syncing: no \x1b[1minit\r\nCPU: 0\n\
              [    0.2] ---[ end Kernel panic - not syncing ]---\n",
        );
        assert_eq!(
            console.panic_line().unwrap(),
            "[    0.1] Kernel panic - not syncing: no [1minit"
        );
    }
}
