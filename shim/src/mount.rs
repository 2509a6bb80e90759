//! The mount system calls that shares are made of. No policy: what to mount is decided in `shares`.
//! What is mounted is mounted in a namespace of its own, so nothing shows in the host's table.

use std::{
    ffi::{CStr, CString},
    io,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
    ptr,
};

/// Attributes of a detached mount, as `MOUNT_ATTR_*` of mount_setattr(2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// For the mount itself.
    pub set: u64,
    /// For it and every mount below it (`rro`, `rnosuid`, …).
    pub set_recursive: u64,
}

fn c_string(bytes: &[u8]) -> io::Result<CString> {
    CString::new(bytes).map_err(|_| io::Error::other("a NUL byte in a path or option"))
}

fn outcome(result: impl Into<i64>) -> io::Result<i64> {
    match result.into() {
        -1 => Err(io::Error::last_os_error()),
        value => Ok(value),
    }
}

/// mount(2). `data` holds what is left of the options when the flags are taken out.
pub fn mount(source: &str, target: &Path, fstype: &str, flags: u64, data: &str) -> io::Result<()> {
    let source = c_string(source.as_bytes())?;
    let target = c_string(target.as_os_str().as_bytes())?;
    let fstype = c_string(fstype.as_bytes())?;
    let data = c_string(data.as_bytes())?;
    let data = if data.is_empty() {
        ptr::null()
    } else {
        data.as_ptr().cast()
    };
    // SAFETY: every pointer is null or to a NUL-terminated string that outlives the call.
    outcome(unsafe {
        libc::mount(
            source.as_ptr(),
            target.as_ptr(),
            fstype.as_ptr(),
            flags,
            data,
        )
    })?;
    Ok(())
}

/// Takes a mount out of its namespace at once, whatever still uses it.
pub fn unmount(target: &Path) -> io::Result<()> {
    let target = c_string(target.as_os_str().as_bytes())?;
    // SAFETY: the string outlives the call.
    outcome(unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH | libc::UMOUNT_NOFOLLOW) })?;
    Ok(())
}

/// A copy of the mount tree at `path`, attached nowhere; with the mounts below it if `recursive`.
pub fn open_tree(path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let path = c_string(path.as_os_str().as_bytes())?;
    let mut flags = libc::OPEN_TREE_CLONE | libc::O_CLOEXEC as u32;
    if recursive {
        flags |= libc::AT_RECURSIVE as u32;
    }
    // SAFETY: the string outlives the call.
    let fd = outcome(unsafe {
        libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags)
    })?;
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Attaches a detached mount at `target`, in this thread's mount namespace.
pub fn attach(tree: impl AsFd, target: &Path) -> io::Result<()> {
    const EMPTY: &CStr = c"";
    let target = c_string(target.as_os_str().as_bytes())?;
    // SAFETY: both strings outlive the call.
    outcome(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_fd().as_raw_fd(),
            EMPTY.as_ptr(),
            libc::AT_FDCWD,
            target.as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH,
        )
    })?;
    Ok(())
}

/// What every share is to the host, whatever it is to the guest, whose own mount of it decides there:
/// nothing is executed from it and no device opened through it, not even by a VMM that its guest has won.
const HOSTS: u64 = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;

/// Has a detached mount, and with `recursive` those below it, show other owners: as the map of a user namespace
/// says, of which the ids inside are the files' own.
pub fn map_ids(tree: impl AsFd, recursive: bool, namespace: impl AsFd) -> io::Result<()> {
    let namespace = namespace.as_fd().as_raw_fd();
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: u64::from(namespace.unsigned_abs()),
    };
    let depth = if recursive { libc::AT_RECURSIVE } else { 0 };
    change(tree, depth.unsigned_abs(), attributes)
}

/// Cuts a detached mount off from all propagation and gives it its attributes.
pub fn seal(tree: impl AsFd, attributes: Attributes) -> io::Result<()> {
    let recursive = libc::AT_RECURSIVE as u32;
    let everywhere = attributes.set_recursive | HOSTS;
    set_attributes(&tree, recursive, everywhere, libc::MS_PRIVATE)?;
    if attributes.set != 0 {
        set_attributes(&tree, 0, attributes.set, 0)?;
    }
    Ok(())
}

fn set_attributes(tree: impl AsFd, flags: u32, set: u64, propagation: u64) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: set,
        attr_clr: 0,
        propagation,
        userns_fd: 0,
    };
    change(tree, flags, attributes)
}

fn change(tree: impl AsFd, flags: u32, attributes: libc::mount_attr) -> io::Result<()> {
    const EMPTY: &CStr = c"";
    // SAFETY: the path and the structure outlive the call, and the size is the structure's.
    outcome(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_fd().as_raw_fd(),
            EMPTY.as_ptr(),
            libc::AT_EMPTY_PATH as u32 | flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    })?;
    Ok(())
}

/// Gives this thread a mount namespace of its own, which sees the host's mounts come and go but
/// shows it none, and a working directory of its own. Both end with the thread.
pub fn leave_host_namespace() -> io::Result<()> {
    // SAFETY: unshare(2) takes no pointers.
    outcome(unsafe { libc::unshare(libc::CLONE_NEWNS) })?;
    mount(
        "none",
        Path::new("/"),
        "",
        libc::MS_REC | libc::MS_SLAVE,
        "",
    )
}
