//! When what happened in a container's start: marks, in milliseconds since the shim was executed, for
//! one line of the log. Cheap enough to be kept for every start.

use std::{
    fmt,
    sync::{Mutex, PoisonError},
};

/// Nanoseconds of CLOCK_MONOTONIC, which all processes of the host share.
pub fn monotonic_ns() -> u64 {
    // SAFETY: timespec is plain data, for which zeroes are a value.
    let mut now: libc::timespec = unsafe { std::mem::zeroed() };
    // SAFETY: `now` has room for what clock_gettime(2) writes; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    let (seconds, ns) = (now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs());
    seconds.wrapping_mul(1_000_000_000).wrapping_add(ns)
}

/// The marks of one start.
#[derive(Debug)]
pub struct Timeline {
    /// Of CLOCK_MONOTONIC.
    origin_ns: u64,
    marks: Mutex<Vec<(&'static str, u64)>>,
}

impl Timeline {
    /// Counts from now.
    pub fn new() -> Self {
        Self::since(monotonic_ns())
    }

    /// Counts from a time of [`monotonic_ns`].
    pub fn since(origin_ns: u64) -> Self {
        Self {
            origin_ns,
            marks: Mutex::default(),
        }
    }

    /// `what`, one word, has happened.
    pub fn mark(&self, what: &'static str) {
        let at = monotonic_ns().saturating_sub(self.origin_ns);
        let mut marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        marks.push((what, at));
    }
}

impl Default for Timeline {
    fn default() -> Self {
        Self::new()
    }
}

/// `serve=1.9 vmm=4.0`: what happened, and when, in milliseconds.
impl fmt::Display for Timeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        for (index, (what, at)) in marks.iter().enumerate() {
            let separator = if index == 0 { "" } else { " " };
            let (ms, tenth) = (at / 1_000_000, at / 100_000 % 10);
            write!(f, "{separator}{what}={ms}.{tenth}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_show_in_order_with_their_times() {
        let timeline = Timeline::since(monotonic_ns().saturating_sub(1_500_000_000));
        timeline.mark("vmm");
        timeline.mark("agent");
        let text = timeline.to_string();
        assert!(
            text.starts_with("vmm=15") && text.contains(" agent=15"),
            "{text}"
        );
        assert_eq!(Timeline::new().to_string(), "");
    }
}
