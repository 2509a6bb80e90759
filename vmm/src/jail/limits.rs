//! Resource limits, and what makes the process opaque: no core dump, and nothing in one.

use std::{fs, io};

use super::{JailError, check, threads};

/// What no thread needs any of.
const NONE: [(&str, libc::__rlimit_resource_t); 5] = [
    ("setrlimit(RLIMIT_CORE)", libc::RLIMIT_CORE),
    ("setrlimit(RLIMIT_MEMLOCK)", libc::RLIMIT_MEMLOCK),
    ("setrlimit(RLIMIT_MSGQUEUE)", libc::RLIMIT_MSGQUEUE),
    ("setrlimit(RLIMIT_NICE)", libc::RLIMIT_NICE),
    ("setrlimit(RLIMIT_RTPRIO)", libc::RLIMIT_RTPRIO),
];

/// Bytes of writable memory that the VMM may have beside its guest's: up to 256 MiB of it are the file
/// server's for the files that a guest may know, as many for its connections' bytes, and each thread's stack
/// counts in full.
const OWN_MEMORY: u64 = 768 << 20;

/// Sets the limits that hold from the start. That of open files is the file server's (fs/limits.rs), that
/// of threads is not here: the kernel does not count those of the host's uid 0.
pub(super) fn harden() -> Result<(), JailError> {
    for (step, resource) in NONE {
        limit(step, resource, 0)?;
    }
    empty_core_dumps().map_err(JailError::of("write /proc/self/coredump_filter"))?;
    for (step, option, value) in [
        ("prctl(PR_SET_DUMPABLE)", libc::PR_SET_DUMPABLE, 0),
        ("prctl(PR_SET_NO_NEW_PRIVS)", libc::PR_SET_NO_NEW_PRIVS, 1),
    ] {
        // SAFETY: options that take a number.
        check(step, unsafe { libc::prctl(option, value, 0, 0, 0) }.into())?;
    }
    Ok(())
}

/// Limits the process's writable memory to `guest`, the bytes mapped for guests, and what a VMM needs beside. To
/// be called on the service's thread once the guest has its memory. Does nothing outside of the jail.
///
/// # Errors
/// The limit in force is lower.
pub fn limit_memory(guest: u64) -> Result<(), JailError> {
    match threads::in_jail() {
        true => limit(
            "setrlimit(RLIMIT_DATA)",
            libc::RLIMIT_DATA,
            guest.saturating_add(OWN_MEMORY),
        ),
        false => Ok(()),
    }
}

/// Sets both limits, which then nobody here can raise again.
fn limit(
    step: &'static str,
    resource: libc::__rlimit_resource_t,
    most: u64,
) -> Result<(), JailError> {
    let limit = libc::rlimit {
        rlim_cur: most,
        rlim_max: most,
    };
    // SAFETY: a live rlimit.
    check(step, unsafe { libc::setrlimit(resource, &limit) }.into())?;
    Ok(())
}

/// Leaves no memory for a core dump to hold (core(5)). A handler that core_pattern pipes to is given one
/// whatever the limit; and the process stays not dumpable only where fs.suid_dumpable says so, for
/// the file server changes its file system uid.
fn empty_core_dumps() -> io::Result<()> {
    match fs::write("/proc/self/coredump_filter", "0") {
        // A kernel that makes no core dumps.
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_core_dump_would_hold_no_memory() {
        empty_core_dumps().unwrap();
        let filter = fs::read_to_string("/proc/self/coredump_filter").unwrap();
        assert_eq!(filter.trim(), "00000000");
    }
}
