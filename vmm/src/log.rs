//! The VMM's log: lines on standard error, which the shim keeps.
//!
//! Bounded: much of what is logged can be brought about by a guest, so lines are dropped when they
//! come too fast, and the number of those is said later. What comes once in a machine's life is never dropped.

use std::{
    io::Write,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use log::{LevelFilter, Log, Metadata, Record};

/// Lines that may come at once, and the time it takes to earn another.
const BURST: u32 = 64;
const PER_LINE: Duration = Duration::from_secs(1);
/// Target of records that come once and are written whatever came before.
pub const ONCE: &str = "once";
/// Bytes of the longest line.
const LINE_MAX: usize = 1024;

struct Bounded(Mutex<Budget>);

struct Budget {
    lines: u32,
    dropped: u64,
    earned_at: Instant,
}

/// Sends log records to standard error from now on. Called once, at the start.
pub fn start(level: LevelFilter) {
    let budget = Budget {
        lines: BURST,
        dropped: 0,
        earned_at: Instant::now(),
    };
    let log = Box::new(Bounded(Mutex::new(budget)));
    // Fails only when a log was set before, which then stays.
    if log::set_boxed_logger(log).is_ok() {
        log::set_max_level(level);
    }
}

impl Log for Bounded {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let mut budget = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(dropped) = budget.admit(record.target(), Instant::now()) else {
            return;
        };
        drop(budget);
        let mut line = format!("{}: {}", record.level(), record.args()).replace('\n', " ");
        if line.len() > LINE_MAX {
            line = line.chars().take(LINE_MAX).collect();
        }
        if dropped > 0 {
            line = format!("{line} ({dropped} lines before were dropped)");
        }
        line.push('\n');
        // Nobody can be told that this failed.
        let _ = std::io::stderr().write_all(line.as_bytes());
    }

    fn flush(&self) {}
}

impl Budget {
    /// As [`Self::spend`], for a record with this target.
    fn admit(&mut self, target: &str, now: Instant) -> Option<u64> {
        match target {
            ONCE => Some(std::mem::take(&mut self.dropped)),
            _ => self.spend(now),
        }
    }

    /// Pays for a line: the number of lines dropped since the last one, or none if it is dropped.
    fn spend(&mut self, now: Instant) -> Option<u64> {
        let earned = now.saturating_duration_since(self.earned_at).as_secs() / PER_LINE.as_secs();
        if earned > 0 {
            self.lines = u64::from(self.lines)
                .saturating_add(earned)
                .min(BURST.into()) as u32;
            self.earned_at = now;
        }
        match self.lines.checked_sub(1) {
            Some(left) => {
                self.lines = left;
                Some(std::mem::take(&mut self.dropped))
            }
            None => {
                self.dropped += 1;
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_dropped_and_counted() {
        let start = Instant::now();
        let mut budget = Budget {
            lines: BURST,
            dropped: 0,
            earned_at: start,
        };
        let written = (0..1000).filter_map(|_| budget.spend(start)).count();
        assert_eq!(written, BURST as usize);
        let later = start + Duration::from_secs(2);
        assert_eq!(budget.spend(later), Some(1000 - u64::from(BURST)));
        assert_eq!(budget.spend(later), Some(0));
        assert_eq!(budget.spend(later), None);
    }

    #[test]
    fn the_end_is_said_behind_any_flood() {
        let now = Instant::now();
        let mut budget = Budget {
            lines: 0,
            dropped: 0,
            earned_at: now,
        };
        assert_eq!(budget.admit("virtio_queue", now), None);
        assert_eq!(budget.admit(ONCE, now), Some(1));
    }
}
