//! Acting as the guest's caller: whose files new files are, with which umask, and when a write
//! drops set-id bits.
//!
//! The guest's kernel has checked permissions (default_permissions), with groups the host does not
//! know; the host must not check again. So only the *file system ids* and the umask of the thread
//! change, for one call, and SECBIT_NO_SETUID_FIXUP keeps its capabilities while they do. All of
//! that belongs to the thread: nothing here may run on a thread that has not called
//! [`worker_init`], and every change is undone by a guard, or the process ends.

use std::cell::Cell;
use std::ffi::c_long;

use super::FsError;
use super::sys::Errno;

/// _LINUX_CAPABILITY_VERSION_3.
const CAPABILITY_VERSION: u32 = 0x2008_0522;
/// CAP_FSETID: a write or a change of mode keeps set-id bits.
const CAP_FSETID: u32 = 4;
/// SECBIT_NO_SETUID_FIXUP: capabilities stay as they are when the file system uid changes.
const NO_SETUID_FIXUP: libc::c_ulong = 1 << 2;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

type Caps = [CapData; 2];

#[derive(Clone, Copy)]
struct Worker {
    caps: Caps,
    uid: u32,
    gid: u32,
}

thread_local! {
    static WORKER: Cell<Option<Worker>> = const { Cell::new(None) };
}

/// Prepares the calling thread to serve requests; every thread that calls
/// [`FileServer::handle`](super::FileServer::handle) does this once, after it entered its last
/// user namespace, which resets what is set here. Without CAP_SETPCAP, NO_SETUID_FIXUP is set already.
///
/// The thread gets a working directory and a umask of its own; its umask becomes 0.
///
/// # Errors
/// Names the call that failed.
pub fn worker_init() -> Result<(), FsError> {
    let failed = |tried| FsError::Worker {
        tried,
        cause: Errno::last().into(),
    };
    // SAFETY: none of the calls takes memory; unshare(CLONE_FS) gives this thread its own working
    // directory, root and umask, equal to those it shared.
    unsafe {
        if libc::unshare(libc::CLONE_FS) != 0 {
            return Err(failed("unshare the thread's working directory and umask"));
        }
        libc::umask(0);
        let bits = libc::prctl(libc::PR_GET_SECUREBITS);
        if bits < 0 {
            return Err(failed("read the thread's securebits"));
        }
        let bits = bits as libc::c_ulong;
        let set = bits | NO_SETUID_FIXUP;
        if bits != set && libc::prctl(libc::PR_SET_SECUREBITS, set) != 0 {
            return Err(failed("set SECBIT_NO_SETUID_FIXUP (CAP_SETPCAP)"));
        }
    }
    let caps = capget().ok_or_else(|| failed("read the thread's capabilities"))?;
    // -1 is no id: both calls change nothing and return the present one.
    let (uid, gid) = (
        setfs(libc::SYS_setfsuid, u32::MAX),
        setfs(libc::SYS_setfsgid, u32::MAX),
    );
    WORKER.set(Some(Worker { caps, uid, gid }));
    Ok(())
}

/// True once [`worker_init`] has been called on this thread.
pub(super) fn is_worker() -> bool {
    WORKER.get().is_some()
}

fn worker() -> Result<Worker, Errno> {
    WORKER.get().ok_or(Errno(libc::EPERM))
}

/// Sets a file system id; returns the one before.
fn setfs(call: c_long, id: u32) -> u32 {
    // SAFETY: takes an integer; the raw call changes this thread alone.
    unsafe { libc::syscall(call, id) as u32 }
}

fn capget() -> Option<Caps> {
    let header = [CAPABILITY_VERSION, 0];
    let mut caps = Caps::default();
    // SAFETY: a header and two sets, as version 3 has it; pid 0 is this thread.
    let done = unsafe { libc::syscall(libc::SYS_capget, header.as_ptr(), caps.as_mut_ptr()) };
    (done == 0).then_some(caps)
}

fn capset(caps: &Caps) -> Result<(), Errno> {
    let header = [CAPABILITY_VERSION, 0];
    // SAFETY: a header and two sets, as version 3 has it; pid 0 is this thread.
    match unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), caps.as_ptr()) } {
        0 => Ok(()),
        _ => Err(Errno::last()),
    }
}

/// A thread that cannot get its identity back must serve nobody.
fn lost(what: &str) -> ! {
    log::error!(
        "file server: cannot restore the thread's {what}: {:?}",
        Errno::last()
    );
    std::process::abort()
}

/// While it lives, what this thread creates belongs to the caller.
pub(super) struct AsCaller {
    uid: Option<u32>,
    gid: Option<u32>,
    umask: bool,
}

impl AsCaller {
    /// `umask` is applied by the host's kernel as it would be to a process of its own: not at all
    /// where the directory has a default ACL.
    pub(super) fn enter(uid: u32, gid: u32, umask: u32) -> Result<AsCaller, Errno> {
        let worker = worker()?;
        let mut caller = AsCaller {
            uid: None,
            gid: None,
            umask: false,
        };
        if gid != worker.gid {
            // Set first: a failure below is undone by the guard.
            caller.gid = Some(worker.gid);
            change(libc::SYS_setfsgid, gid)?;
        }
        if uid != worker.uid {
            caller.uid = Some(worker.uid);
            change(libc::SYS_setfsuid, uid)?;
        }
        if umask & 0o777 != 0 {
            caller.umask = true;
            // SAFETY: takes an integer; the umask is this thread's own.
            unsafe { libc::umask(umask & 0o777) };
        }
        Ok(caller)
    }
}

/// The calls return no error: a change that did not happen shows only in the next answer.
fn change(call: c_long, id: u32) -> Result<(), Errno> {
    setfs(call, id);
    match setfs(call, u32::MAX) == id {
        true if id != u32::MAX => Ok(()),
        _ => Err(Errno(libc::EPERM)),
    }
}

impl Drop for AsCaller {
    fn drop(&mut self) {
        if self.umask {
            // SAFETY: takes an integer; the umask is this thread's own.
            unsafe { libc::umask(0) };
        }
        for (call, id) in [
            (libc::SYS_setfsuid, self.uid),
            (libc::SYS_setfsgid, self.gid),
        ] {
            if id.is_some_and(|id| change(call, id).is_err()) {
                lost("file system ids");
            }
        }
    }
}

/// While it lives, this thread has no CAP_FSETID: a write drops set-id bits as it does for an
/// ordinary user.
pub(super) struct WithoutFsetid(Caps);

impl WithoutFsetid {
    /// Only when `wanted`.
    pub(super) fn enter_if(wanted: bool) -> Result<Option<WithoutFsetid>, Errno> {
        if !wanted {
            return Ok(None);
        }
        let caps = worker()?.caps;
        let [mut low, high] = caps;
        low.effective &= !(1 << CAP_FSETID);
        capset(&[low, high])?;
        Ok(Some(WithoutFsetid(caps)))
    }
}

impl Drop for WithoutFsetid {
    fn drop(&mut self) {
        if capset(&self.0).is_err() {
            lost("capabilities");
        }
    }
}
