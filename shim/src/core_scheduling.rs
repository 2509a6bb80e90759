//! Core scheduling (Linux `Documentation/admin-guide/hw-vuln/core-scheduling.rst`): a pod whose VMM has a cookie
//! of its own never runs on a core while anything but itself runs on the core's other hardware threads. So
//! what leaks from one hardware thread to another leaks to nobody.

use std::io;

const PR_SCHED_CORE: libc::c_int = 62;
const PR_SCHED_CORE_GET: libc::c_ulong = 0;
const PR_SCHED_CORE_CREATE: libc::c_ulong = 1;
const SCOPE_THREAD: libc::c_ulong = 0;
const SCOPE_THREAD_GROUP: libc::c_ulong = 1;

/// Gives this process a cookie that no other has; false, with errno, when it has none. A host on which no core
/// has more than one thread in use (ENODEV) has nothing to be kept apart.
///
/// A system call and nothing else: may be called in a child that must not do more.
pub(crate) fn share_with_nobody() -> bool {
    // SAFETY: takes numbers; pid 0 is the caller.
    let done = unsafe {
        libc::prctl(
            PR_SCHED_CORE,
            PR_SCHED_CORE_CREATE,
            0,
            SCOPE_THREAD_GROUP,
            0,
        )
    };
    // SAFETY: errno is this thread's own.
    done == 0 || unsafe { *libc::__errno_location() } == libc::ENODEV
}

/// What this host says to core scheduling: true when it has threads to keep apart, false when it has none.
///
/// # Errors
/// Its kernel cannot.
pub(crate) fn on_this_host() -> io::Result<bool> {
    let mut cookie: libc::c_ulong = 0;
    // SAFETY: room for one cookie; pid 0 is the caller.
    let got = unsafe {
        libc::prctl(
            PR_SCHED_CORE,
            PR_SCHED_CORE_GET,
            0,
            SCOPE_THREAD,
            &raw mut cookie,
        )
    };
    match got {
        0 => Ok(true),
        _ => match io::Error::last_os_error() {
            e if e.raw_os_error() == Some(libc::ENODEV) => Ok(false),
            e => Err(e),
        },
    }
}

/// Why there is none, for whoever asked for it.
pub(crate) fn refusal(cause: &io::Error) -> String {
    match cause.raw_os_error() {
        Some(libc::EINVAL) => {
            "the host's kernel cannot keep others off a pod's cores (it was built without CONFIG_SCHED_CORE)"
                .into()
        }
        _ => format!("keep others off the pod's cores: {cause}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_cannot_is_named() {
        let said = refusal(&io::Error::from_raw_os_error(libc::EINVAL));
        assert!(said.contains("CONFIG_SCHED_CORE"), "{said}");
        let said = refusal(&io::Error::from_raw_os_error(libc::ENOMEM));
        assert!(
            said.ends_with("Cannot allocate memory (os error 12)"),
            "{said}"
        );
    }
}
