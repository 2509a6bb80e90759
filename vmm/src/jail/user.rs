//! The user namespace, and the capabilities that are left in it.
//!
//! All ids are mapped to themselves: the file server acts as anyone, and files look the same inside and
//! outside. A capability in here counts for inodes, whose owners are mapped; it counts for nothing else of
//! the host's, whose other things belong to the host's user namespace.

use std::{
    fs::{self, File},
    io::{self, Read},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use super::{JailError, check};

/// _LINUX_CAPABILITY_VERSION_3.
const CAPABILITY_VERSION: u32 = 0x2008_0522;
/// capabilities(7). What the file server does to inodes in a guest's name needs these; setting its
/// thread's file system ids needs CAP_SETUID and CAP_SETGID.
const KEPT: [libc::c_ulong; 7] = [
    0,  // CAP_CHOWN
    1,  // CAP_DAC_OVERRIDE
    3,  // CAP_FOWNER
    4,  // CAP_FSETID
    6,  // CAP_SETGID
    7,  // CAP_SETUID
    31, // CAP_SETFCAP
];
/// Securebits, all of them locked: uid 0 brings no capabilities (NOROOT), none goes when the file
/// system uid changes (NO_SETUID_FIXUP), none is kept by or inherited for another program (KEEP_CAPS stays off,
/// NO_CAP_AMBIENT_RAISE).
const SECUREBITS: libc::c_ulong = 0b1110_1111;
/// Of the child that is born into the user namespace, in bytes.
const STACK: usize = 16 << 10;
/// More than any kernel has.
const CAPABILITIES: libc::c_ulong = 64;

/// A user namespace that nobody is in.
pub(super) struct UserNamespace(OwnedFd);

impl UserNamespace {
    /// Makes it, with all ids mapped to themselves.
    ///
    /// Its maps can be written from outside alone, so a short-lived child is born into it.
    pub(super) fn create() -> Result<Self, JailError> {
        let (ours, theirs) = UnixStream::pair().map_err(JailError::of("socketpair"))?;
        let mut wait = Wait {
            parents: ours.as_raw_fd(),
            own: theirs.as_raw_fd(),
        };
        let mut stack = vec![0_u128; STACK / size_of::<u128>()];
        let mut pidfd: libc::c_int = -1;
        let flags = libc::CLONE_NEWUSER | libc::CLONE_PIDFD | libc::CLONE_VM | libc::SIGCHLD;
        // SAFETY: the child has the upper end of a stack that it alone uses, calls two system calls on its own
        // copies of two descriptors, and is gone before `stack` and `wait` are; the descriptor is put where
        // `parent_tid` points to.
        let child = unsafe {
            libc::clone(
                wait_and_end,
                stack.as_mut_ptr_range().end.cast(),
                flags,
                (&raw mut wait).cast(),
                &raw mut pidfd,
            )
        };
        check("make a user namespace", child.into())?;
        drop(theirs);
        // SAFETY: CLONE_PIDFD put a new descriptor there.
        let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
        let namespace = map_all(&pidfd).map_err(JailError::of("map a user namespace's ids"));
        drop(ours);
        // SAFETY: no status is asked for.
        check("collect a child", unsafe {
            libc::waitpid(child, std::ptr::null_mut(), 0).into()
        })?;
        drop(stack);
        Ok(Self(namespace?))
    }

    /// Enters it. Every capability is there again, but for this namespace only.
    pub(super) fn enter(self) -> Result<(), JailError> {
        // SAFETY: a descriptor and a kind.
        check("setns(CLONE_NEWUSER)", unsafe {
            libc::setns(self.0.as_raw_fd(), libc::CLONE_NEWUSER).into()
        })?;
        Ok(())
    }
}

/// The child's descriptors.
struct Wait {
    parents: libc::c_int,
    own: libc::c_int,
}

/// What the child does, in its parent's memory: it ends when its parent lets go of the other end, or dies.
extern "C" fn wait_and_end(wait: *mut libc::c_void) -> libc::c_int {
    // SAFETY: system calls on descriptors that are this process's own copies, and one byte of its stack.
    unsafe {
        let wait = &*wait.cast::<Wait>();
        libc::close(wait.parents);
        let mut byte = 0_u8;
        libc::read(wait.own, (&raw mut byte).cast(), 1);
    }
    0
}

/// Maps the ids of the namespace that the process behind `pidfd` was born into; returns the namespace.
fn map_all(pidfd: &OwnedFd) -> io::Result<OwnedFd> {
    // /proc may be of an outer pid namespace, where the child has another pid than for us.
    let mut about = String::new();
    File::open(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()))?.read_to_string(&mut about)?;
    let pid = about.lines().find_map(|line| line.strip_prefix("Pid:"));
    let pid = pid.ok_or_else(|| io::Error::other("a pidfd without a pid"))?;
    let process = format!("/proc/{}", pid.trim());
    for map in ["uid_map", "gid_map"] {
        fs::write(format!("{process}/{map}"), "0 0 4294967295")?;
    }
    Ok(File::open(format!("{process}/ns/user"))?.into())
}

/// Drops all capabilities that do not act on inodes, from every set and for good.
pub(super) fn keep_inode_capabilities() -> Result<(), JailError> {
    // SAFETY: options that take numbers.
    unsafe {
        let bits = libc::prctl(libc::PR_SET_SECUREBITS, SECUREBITS, 0, 0, 0);
        check("prctl(PR_SET_SECUREBITS)", bits.into())?;
        let cleared = libc::prctl(
            libc::PR_CAP_AMBIENT,
            libc::PR_CAP_AMBIENT_CLEAR_ALL,
            0,
            0,
            0,
        );
        check("prctl(PR_CAP_AMBIENT_CLEAR_ALL)", cleared.into())?;
    }
    let dropped = |capability: &libc::c_ulong| !KEPT.contains(capability);
    for capability in (0..CAPABILITIES).filter(dropped) {
        // SAFETY: an option that takes a number.
        let dropped = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
        match check("prctl(PR_CAPBSET_DROP)", dropped.into()) {
            Ok(_) => {}
            // One that the kernel does not have is the first of many.
            Err(e) if e.cause.raw_os_error() == Some(libc::EINVAL) => break,
            Err(e) => return Err(e),
        }
    }
    set_capabilities(KEPT.iter().fold(0, |set, kept| set | 1 << kept))
}

/// Drops all capabilities of the calling thread.
pub(super) fn drop_capabilities() -> Result<(), JailError> {
    set_capabilities(0)
}

/// Makes `set`, of the first 32 capabilities, the calling thread's effective and permitted ones.
fn set_capabilities(set: u32) -> Result<(), JailError> {
    let header = [CAPABILITY_VERSION, 0];
    // Effective, permitted, inheritable; the first 32, then the rest.
    let sets = [[set, set, 0], [0; 3]];
    // SAFETY: a header and two triples, as version 3 has it; pid 0 is this thread.
    check("capset", unsafe {
        libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr())
    })?;
    Ok(())
}
