//! The empty root: a mount namespace in which nothing of the host's can be named.

use std::{
    ffi::CStr,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    ptr,
};

use super::{JailError, check};

/// Makes an empty, read-only tmpfs the root, in a mount namespace that no other process shares.
pub(super) fn enter_empty_root() -> Result<(), JailError> {
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
fn empty_tmpfs() -> Result<OwnedFd, JailError> {
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
fn move_to_root(tree: &OwnedFd) -> Result<(), JailError> {
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
