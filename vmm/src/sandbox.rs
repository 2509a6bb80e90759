//! Leaves everything behind that the machine does not need: the VMM's jail, in its first form.
//!
//! Called once, before any thread exists, in a process that the shim has put into namespaces of its
//! own. From then on the process has five descriptors, no environment, and an empty, read-only root:
//! everything else comes by descriptor. The steps, in the order that matters:
//!
//! 1. descriptors and environment: nothing inherited by accident;
//! 2. no core dumps (they would hold the guest's memory), and nothing in them; not dumpable, no new
//!    privileges;
//! 3. a mount namespace of its own, an empty root in it, and no way back to the host's: not to
//!    procfs, sysfs or cgroupfs either, whose files ask for the uid and not for a capability;
//! 4. *(to come)* Landlock, then the user namespace, dropped capabilities, seccomp: in this order,
//!    for pivot_root fails in a fresh user namespace.

use std::{
    ffi::CStr,
    fs, io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    ptr,
};

use husk_proto::DESCRIPTOR_FD;

/// A step of the jail failed; nothing may run outside of it.
#[derive(Debug, thiserror::Error)]
#[error("sandbox: {step}: {cause}")]
pub struct SandboxError {
    step: &'static str,
    cause: io::Error,
}

/// Enters the sandbox. On an error the process must end.
///
/// What must still be taken from the host by path has to be taken before.
pub fn enter() -> Result<(), SandboxError> {
    clear_environment()?;
    harden_process()?;
    enter_empty_root()
}

/// Closes all descriptors behind the two sockets. Called first of all: what is opened later is
/// meant to stay.
pub fn close_inherited() -> Result<(), SandboxError> {
    let first = DESCRIPTOR_FD as libc::c_uint + 1;
    // SAFETY: no descriptor above the sockets is owned by anything in this process yet.
    check("close_range", unsafe {
        libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, 0)
    })?;
    Ok(())
}

/// Empties the environment, also where `/proc/<pid>/environ` shows it.
fn clear_environment() -> Result<(), SandboxError> {
    unsafe extern "C" {
        static mut environ: *mut *mut libc::c_char;
    }
    // SAFETY: there is no other thread that could use the environment. Its strings are those of the
    // process's start: writable, each ended by a zero, in one piece from the first one on.
    unsafe {
        let mut entry = environ;
        let first = if entry.is_null() {
            ptr::null_mut()
        } else {
            *entry
        };
        if first.is_null() {
            return Ok(());
        }
        while !(*entry).is_null() {
            libc::memset((*entry).cast(), 0, libc::strlen(*entry));
            entry = entry.add(1);
        }
        check("clearenv", libc::clearenv().into())?;
        // The strings are gone; that their place is not shown needs CAP_SYS_RESOURCE, or stays undone.
        libc::prctl(libc::PR_SET_MM, libc::PR_SET_MM_ENV_END, first, 0, 0);
    }
    Ok(())
}

fn harden_process() -> Result<(), SandboxError> {
    let none = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: a valid rlimit.
    let limited = unsafe { libc::setrlimit(libc::RLIMIT_CORE, &none) };
    check("setrlimit(RLIMIT_CORE)", limited.into())?;
    empty_core_dumps().map_err(|cause| SandboxError {
        step: "write /proc/self/coredump_filter",
        cause,
    })?;
    for (step, option, value) in [
        ("prctl(PR_SET_DUMPABLE)", libc::PR_SET_DUMPABLE, 0),
        ("prctl(PR_SET_NO_NEW_PRIVS)", libc::PR_SET_NO_NEW_PRIVS, 1),
    ] {
        // SAFETY: options that take a number.
        check(step, unsafe { libc::prctl(option, value, 0, 0, 0) }.into())?;
    }
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

/// Makes an empty, read-only tmpfs the root, in a mount namespace that no other process shares.
fn enter_empty_root() -> Result<(), SandboxError> {
    // SAFETY: `unshare` takes flags alone.
    check("unshare(CLONE_NEWNS)", unsafe {
        libc::unshare(libc::CLONE_NEWNS).into()
    })?;
    // SAFETY: C strings or null, as mount(2) has it for a change of propagation.
    check("make all mounts private", unsafe {
        libc::mount(
            ptr::null(),
            c"/".as_ptr(),
            ptr::null(),
            libc::MS_REC | libc::MS_PRIVATE,
            ptr::null(),
        )
        .into()
    })?;
    let root = empty_tmpfs()?;
    move_to_root(&root)?;
    // SAFETY: descriptor calls and C strings only. With both arguments ".", the old root is stacked
    // on the new one, where it is taken off.
    unsafe {
        check(
            "fchdir to the new root",
            libc::fchdir(root.as_raw_fd()).into(),
        )?;
        let here = c".".as_ptr();
        check(
            "pivot_root",
            libc::syscall(libc::SYS_pivot_root, here, here),
        )?;
        check(
            "detach the old root",
            libc::umount2(here, libc::MNT_DETACH).into(),
        )?;
        check("chdir to the new root", libc::chdir(c"/".as_ptr()).into())?;
    }
    Ok(())
}

/// A detached tmpfs with nothing in it and no room for anything.
fn empty_tmpfs() -> Result<OwnedFd, SandboxError> {
    const MOUNT_ATTR_RDONLY: libc::c_uint = 0x1;
    const MOUNT_ATTR_NOSUID: libc::c_uint = 0x2;
    const MOUNT_ATTR_NODEV: libc::c_uint = 0x4;
    const MOUNT_ATTR_NOEXEC: libc::c_uint = 0x8;
    const FSCONFIG_SET_STRING: libc::c_uint = 1;
    const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
    const CLOEXEC: libc::c_uint = 1;

    // SAFETY: a C string; a descriptor returned is new and ours.
    let context = unsafe {
        let fd = libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), CLOEXEC);
        OwnedFd::from_raw_fd(check("fsopen(tmpfs)", fd)? as libc::c_int)
    };
    let configure = |command: libc::c_uint, key: Option<&CStr>, value: Option<&CStr>| {
        let pointer = |text: Option<&CStr>| text.map_or(ptr::null(), CStr::as_ptr);
        // SAFETY: C strings or null, as the commands take them.
        check("fsconfig(tmpfs)", unsafe {
            libc::syscall(
                libc::SYS_fsconfig,
                context.as_raw_fd(),
                command,
                pointer(key),
                pointer(value),
                0,
            )
        })
    };
    configure(FSCONFIG_SET_STRING, Some(c"nr_inodes"), Some(c"1"))?;
    configure(FSCONFIG_SET_STRING, Some(c"mode"), Some(c"0500"))?;
    configure(FSCONFIG_CMD_CREATE, None, None)?;
    let attributes = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC;
    // SAFETY: flags alone; a descriptor returned is new and ours.
    unsafe {
        let fd = libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), CLOEXEC, attributes);
        Ok(OwnedFd::from_raw_fd(
            check("fsmount(tmpfs)", fd)? as libc::c_int
        ))
    }
}

/// Mounts `tree` over the root directory, as pivot_root wants a mount point.
fn move_to_root(tree: &OwnedFd) -> Result<(), SandboxError> {
    const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 0x4;
    // SAFETY: descriptors and C strings.
    check("move_mount", unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            c"/".as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH,
        )
    })?;
    Ok(())
}

fn check(step: &'static str, result: libc::c_long) -> Result<libc::c_long, SandboxError> {
    match result {
        0.. => Ok(result),
        _ => Err(SandboxError {
            step,
            cause: io::Error::last_os_error(),
        }),
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
