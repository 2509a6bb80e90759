//! What makes this guest itself: its clock, its randomness, its name. All of it comes from the host, and before
//! any workload: a clone has woken up with those of its template.

use std::os::fd::AsFd;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::system::sethostname;
use rustix::time::{ClockId, Timespec, clock_settime};

use crate::fault::Fault;
use crate::sys;

const NANOSECONDS: u64 = 1_000_000_000;
/// The kernel's bound on a name (sethostname(2)).
const HOSTNAME_MAX: usize = 64;
/// A clock that is off by less is led back slowly (adjtime(3)), so that time never jumps back for a trifle.
const STEP: Duration = Duration::from_millis(100);

/// Takes the identity of Hello: `entropy` is 32 to 512 bytes, `hostname` at most 64 or none.
pub fn assume(wall_clock_ns: u64, entropy: &[u8], hostname: &str) -> Result<(), Fault> {
    if !(32..=512).contains(&entropy.len()) {
        return Err(Fault::Invalid(format!(
            "entropy: {} bytes are not 32 to 512",
            entropy.len()
        )));
    }
    if hostname.len() > HOSTNAME_MAX {
        return Err(Fault::Invalid(format!(
            "hostname: {} bytes are more than {HOSTNAME_MAX}",
            hostname.len()
        )));
    }
    set(wall_clock_ns)?;
    let random = std::fs::File::open("/dev/urandom")
        .map_err(|error| Fault::of_call("open /dev/urandom", error))?;
    sys::add_entropy(random.as_fd(), entropy)
        .map_err(|error| Fault::of_call("add entropy", error))?;
    if !hostname.is_empty() {
        sethostname(hostname.as_bytes())
            .map_err(|error| Fault::of_call("set the hostname", error.into()))?;
    }
    Ok(())
}

/// Follows the host's clock: steps where it is far off or told to, slews where it is not.
pub fn follow(wall_clock_ns: u64, at_once: bool) -> Result<(), Fault> {
    if at_once {
        return set(wall_clock_ns);
    }
    let host = UNIX_EPOCH + Duration::from_nanos(wall_clock_ns);
    let (ahead, off) = match host.duration_since(SystemTime::now()) {
        Ok(behind) => (false, behind),
        Err(error) => (true, error.duration()),
    };
    if off >= STEP {
        log::info!(
            "the wall clock is {off:?} {} the host's: set",
            if ahead { "ahead of" } else { "behind" }
        );
        return set(wall_clock_ns);
    }
    let micros = i64::try_from(off.as_micros()).unwrap_or(i64::MAX);
    sys::slew_clock(if ahead { -micros } else { micros })
        .map_err(|error| Fault::of_call("slew the clock", error))
}

fn set(wall_clock_ns: u64) -> Result<(), Fault> {
    let now = Timespec {
        tv_sec: i64::try_from(wall_clock_ns / NANOSECONDS).unwrap_or(i64::MAX),
        tv_nsec: (wall_clock_ns % NANOSECONDS) as i64,
    };
    clock_settime(ClockId::Realtime, now)
        .map_err(|error| Fault::of_call("set the clock", error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_that_is_none_is_refused_before_anything_is_set() {
        let short = assume(0, &[0; 31], "").unwrap_err();
        assert!(short.to_string().contains("31 bytes"), "{short}");
        let long = assume(0, &[0; 32], &"x".repeat(65)).unwrap_err();
        assert!(long.to_string().contains("hostname"), "{long}");
    }
}
