//! The system calls that rustix does not have, each as a safe function.
//!
//! Nearly all of the agent's `unsafe` lives here; elsewhere are the entry point, the two calls of
//! [`fork`], and what is inherited by number. Nothing here decides anything: names, retries and
//! messages belong to the callers.

use std::ffi::{CStr, CString, c_int, c_long, c_void};
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

fn check(result: c_long) -> io::Result<c_long> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Which side of a [`fork`] this is.
pub enum Forked {
    Parent { pid: i32, pidfd: OwnedFd },
    Child,
}

/// clone3(2) without shared memory: fork(2) with namespaces (`CLONE_NEW…`), `CLONE_PARENT`, a pidfd and the
/// cgroup the child is born in. The pid is as the caller's pid namespace has it.
///
/// # Safety
/// In a process with several threads, the child must only make system calls until it executes
/// another program: another thread may have held any lock.
pub unsafe fn fork(flags: u64, cgroup: Option<BorrowedFd>) -> io::Result<Forked> {
    const CLONE_PIDFD: u64 = 0x1000;
    const CLONE_PARENT: u64 = 0x8000;
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    /// `struct clone_args`, as of Linux 5.7.
    #[repr(C, align(8))]
    #[derive(Default)]
    struct CloneArgs {
        flags: u64,
        pidfd: u64,
        child_tid: u64,
        parent_tid: u64,
        exit_signal: u64,
        stack: u64,
        stack_size: u64,
        tls: u64,
        set_tid: u64,
        set_tid_size: u64,
        cgroup: u64,
    }
    let mut pidfd: RawFd = -1;
    let mut arguments = CloneArgs {
        flags: flags | CLONE_PIDFD,
        pidfd: (&raw mut pidfd) as u64,
        // A sibling inherits the exit signal of the caller, and must not name one.
        exit_signal: if flags & CLONE_PARENT == 0 {
            libc::SIGCHLD as u64
        } else {
            0
        },
        ..CloneArgs::default()
    };
    if let Some(cgroup) = cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = u64::from(cgroup.as_raw_fd().unsigned_abs());
    }
    // SAFETY: the arguments are those of clone3 and outlive the call; without CLONE_VM the child has
    // its own copy of the memory. What the child may do is the caller's promise.
    let pid = check(unsafe {
        libc::syscall(libc::SYS_clone3, &raw mut arguments, size_of::<CloneArgs>())
    })?;
    if pid == 0 {
        return Ok(Forked::Child);
    }
    // SAFETY: with CLONE_PIDFD the kernel has stored a new descriptor there, owned by nobody else.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Forked::Parent {
        pid: pid as i32,
        pidfd,
    })
}

/// What a new program gets: itself, its name, and its descriptors from 0 on.
pub struct Program<'a> {
    file: BorrowedFd<'a>,
    argv: [*const libc::c_char; 2],
    environment: [*const libc::c_char; 1],
    descriptors: &'a [OwnedFd],
}

impl<'a> Program<'a> {
    /// `file` and `descriptors` must lie above the numbers that those get, so that none is overwritten
    /// before its turn.
    pub fn new(file: BorrowedFd<'a>, name: &'a CStr, descriptors: &'a [OwnedFd]) -> Self {
        let argv = [name.as_ptr(), ptr::null()];
        Self {
            file,
            argv,
            environment: [ptr::null()],
            descriptors,
        }
    }

    /// Executes the program; on failure ends the process with status 127. Makes system calls only,
    /// so it may follow a [`fork`] in a process with threads.
    pub fn execute(&self) -> ! {
        for (number, descriptor) in self.descriptors.iter().enumerate() {
            // SAFETY: dup2 on two numbers; it touches no memory.
            unsafe { libc::dup2(descriptor.as_raw_fd(), number as c_int) };
        }
        // SAFETY: the two lists end with a null pointer and their strings outlive `self`.
        unsafe {
            libc::syscall(
                libc::SYS_execveat,
                self.file.as_raw_fd(),
                c"".as_ptr(),
                self.argv.as_ptr(),
                self.environment.as_ptr(),
                libc::AT_EMPTY_PATH,
            );
            libc::_exit(127)
        }
    }
}

/// execve(2). Returns only to say why it failed.
pub fn execve(path: &CStr, args: &[CString], env: &[CString]) -> io::Error {
    let list = |strings: &[CString]| -> Vec<*const libc::c_char> {
        strings
            .iter()
            .map(|text| text.as_ptr())
            .chain([ptr::null()])
            .collect()
    };
    let (args, env) = (list(args), list(env));
    // SAFETY: both lists end with a null pointer; their strings are borrowed for the whole call.
    unsafe { libc::execve(path.as_ptr(), args.as_ptr(), env.as_ptr()) };
    io::Error::last_os_error()
}

/// Ends the process at once: no destructors, no flushing.
pub fn exit(status: c_int) -> ! {
    // SAFETY: _exit takes a number and does not return.
    unsafe { libc::_exit(status) }
}

/// What [`mount_setattr`] changes: `struct mount_attr` of mount_setattr(2).
#[repr(C)]
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct MountAttributes {
    pub set: u64,
    pub clear: u64,
    /// `MS_PRIVATE` and its like; 0 leaves it.
    pub propagation: u64,
    pub userns_fd: u64,
}

/// mount_setattr(2) on the mount whose root `mount` is, or on all below it too.
pub fn mount_setattr(
    mount: BorrowedFd,
    recursive: bool,
    attributes: &MountAttributes,
) -> io::Result<()> {
    let depth = if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a string, the attributes are borrowed for the call with their true size.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | depth,
            ptr::from_ref(attributes),
            size_of::<MountAttributes>(),
        )
    })
    .map(drop)
}

/// Gives up a capability (by number) for good; `EINVAL` past the last one the kernel has.
pub fn drop_bounding(capability: u32) -> io::Result<()> {
    // SAFETY: prctl with numbers only.
    check(c_long::from(unsafe {
        libc::prctl(libc::PR_CAPBSET_DROP, c_long::from(capability), 0, 0, 0)
    }))
    .map(drop)
}

/// Sets every signal to its default action and blocks none: an ignored signal would outlive execve.
pub fn reset_signals() {
    for signal in 1..=64 {
        // SAFETY: SIG_DFL runs no code of ours; the two signals that refuse return an error.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    // SAFETY: an all-zero sigset_t is a valid value, and sigemptyset makes it the empty set.
    unsafe {
        let mut none: libc::sigset_t = zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut());
    }
}

/// Registers a descriptor with the runtime.
pub fn watched(descriptor: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd always names the same open descriptor, and closes it only when dropped.
    unsafe { AsyncFd::register_with_interest(descriptor, interest) }.map_err(io::Error::from)
}

/// A descriptor this process was started with.
///
/// # Safety
/// It must be open, and nothing else may own it from here on.
pub unsafe fn inherited(number: RawFd) -> OwnedFd {
    // SAFETY: as the caller promises.
    unsafe { OwnedFd::from_raw_fd(number) }
}

/// Marks `first` and all descriptors above it close-on-exec (close_range(2)).
pub fn close_on_exec_from(first: u32) -> io::Result<()> {
    const CLOSE_RANGE_CLOEXEC: c_long = 4;
    // SAFETY: with this flag the call closes nothing.
    check(unsafe {
        libc::syscall(
            libc::SYS_close_range,
            c_long::from(first),
            c_long::from(u32::MAX),
            CLOSE_RANGE_CLOEXEC,
        )
    })
    .map(drop)
}

/// unshare(2) for the calling thread.
pub fn unshare(flags: c_int) -> io::Result<()> {
    // SAFETY: a number in; namespaces are not memory.
    check(c_long::from(unsafe { libc::unshare(flags) })).map(drop)
}

/// personality(2).
pub fn personality(persona: u64) -> io::Result<()> {
    // SAFETY: a number.
    check(c_long::from(unsafe { libc::personality(persona) })).map(drop)
}

/// pidfd_send_signal(2) with any signal number, 0 included.
pub fn signal(pidfd: BorrowedFd, signal: i32) -> io::Result<()> {
    // SAFETY: numbers, and a null siginfo, which means the default one.
    check(unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            ptr::null::<c_void>(),
            0,
        )
    })
    .map(drop)
}

/// kill(2) with any signal number.
pub fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: numbers only.
    check(c_long::from(unsafe { libc::kill(pid, signal) })).map(drop)
}

/// Mixes `bytes` into the kernel's random pool, credits them in full, and reseeds from it (random(4)).
pub fn add_entropy(random: BorrowedFd, bytes: &[u8]) -> io::Result<()> {
    const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
    const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
    // struct rand_pool_info: bits of entropy, size in bytes, the bytes.
    let length = i32::try_from(bytes.len()).map_err(io::Error::other)?;
    let mut pool = Vec::with_capacity(bytes.len().saturating_add(8));
    pool.extend_from_slice(&length.saturating_mul(8).to_ne_bytes());
    pool.extend_from_slice(&length.to_ne_bytes());
    pool.extend_from_slice(bytes);
    // SAFETY: the buffer is a whole rand_pool_info whose size field tells its true length.
    check(c_long::from(unsafe {
        libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, pool.as_ptr())
    }))?;
    // SAFETY: this request has no argument.
    check(c_long::from(unsafe {
        libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG)
    }))
    .map(drop)
}

/// Leads the wall clock on by so many microseconds, at 0.5 ms a second (adjtimex(2), ADJ_OFFSET_SINGLESHOT).
pub fn slew_clock(microseconds: i64) -> io::Result<()> {
    // SAFETY: an all-zero timex is a valid value: no change.
    let mut change: libc::timex = unsafe { zeroed() };
    change.modes = libc::ADJ_OFFSET_SINGLESHOT;
    change.offset = microseconds;
    // SAFETY: the structure lives across the call.
    check(c_long::from(unsafe { libc::adjtimex(&raw mut change) })).map(drop)
}

/// Brings a network interface up (netdevice(7)); `socket` is any internet socket.
pub fn interface_up(socket: BorrowedFd, name: &CStr) -> io::Result<()> {
    // SAFETY: an all-zero ifreq is a valid value: an empty name.
    let mut request: libc::ifreq = unsafe { zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.to_bytes()) {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
    // SAFETY: SIOCSIFFLAGS reads an ifreq, which `request` is.
    check(c_long::from(unsafe {
        libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request)
    }))
    .map(drop)
}

/// Makes the kernel print messages more urgent than `level` on its console (syslog(2), action 8).
pub fn console_level(level: c_int) -> io::Result<()> {
    const SYSLOG_ACTION_CONSOLE_LEVEL: c_int = 8;
    // SAFETY: this action takes the level in place of a length and no buffer.
    check(c_long::from(unsafe {
        libc::klogctl(SYSLOG_ACTION_CONSOLE_LEVEL, ptr::null_mut(), level)
    }))
    .map(drop)
}

/// One instruction of eBPF: `struct bpf_insn` (include/uapi/linux/bpf.h).
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    pub code: u8,
    /// Destination in the low, source in the high four bits.
    pub registers: u8,
    pub offset: i16,
    pub immediate: i32,
}

/// Loads a program of type `BPF_PROG_TYPE_CGROUP_DEVICE` and attaches it to `cgroup`, beside those
/// of its ancestors. The cgroup then keeps it.
pub fn attach_device_program(cgroup: BorrowedFd, program: &[Instruction]) -> io::Result<()> {
    const BPF_PROG_LOAD: c_int = 5;
    const BPF_PROG_ATTACH: c_int = 8;
    const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
    const BPF_CGROUP_DEVICE: u32 = 6;
    const BPF_F_ALLOW_MULTI: u32 = 2;
    /// The head of `union bpf_attr` for BPF_PROG_LOAD.
    #[repr(C)]
    struct Load {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
        kernel_version: u32,
        flags: u32,
    }
    /// The head of `union bpf_attr` for BPF_PROG_ATTACH.
    #[repr(C)]
    struct Attach {
        target: u32,
        program: u32,
        kind: u32,
        flags: u32,
    }
    let load = Load {
        kind: BPF_PROG_TYPE_CGROUP_DEVICE,
        count: u32::try_from(program.len()).map_err(io::Error::other)?,
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
    };
    // SAFETY: `load` is the head of a bpf_attr of the given size; the kernel takes the rest as zero. The
    // instructions and the license outlive the call.
    let loaded = check(unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_LOAD,
            &raw const load,
            size_of::<Load>(),
        )
    })?;
    // SAFETY: the call returned a new descriptor, owned by nobody else.
    let loaded = unsafe { OwnedFd::from_raw_fd(loaded as RawFd) };
    let attach = Attach {
        target: cgroup.as_raw_fd().unsigned_abs(),
        program: loaded.as_raw_fd().unsigned_abs(),
        kind: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    // SAFETY: as above, for BPF_PROG_ATTACH.
    check(unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_ATTACH,
            &raw const attach,
            size_of::<Attach>(),
        )
    })
    .map(drop)
}

/// `struct sock_filter`: an instruction of classic BPF.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(into = "u64", from = "u64")]
pub struct FilterInstruction {
    pub code: u16,
    pub jt: u8,
    pub jf: u8,
    pub k: u32,
}

impl From<u64> for FilterInstruction {
    fn from(bytes: u64) -> Self {
        Self::from(&bytes.to_ne_bytes())
    }
}

impl From<FilterInstruction> for u64 {
    fn from(instruction: FilterInstruction) -> Self {
        let [c0, c1] = instruction.code.to_ne_bytes();
        let [k0, k1, k2, k3] = instruction.k.to_ne_bytes();
        Self::from_ne_bytes([c0, c1, instruction.jt, instruction.jf, k0, k1, k2, k3])
    }
}

impl From<&[u8; 8]> for FilterInstruction {
    /// As in memory, which is how libseccomp exports it.
    fn from(&[c0, c1, jt, jf, k0, k1, k2, k3]: &[u8; 8]) -> Self {
        Self {
            code: u16::from_ne_bytes([c0, c1]),
            jt,
            jf,
            k: u32::from_ne_bytes([k0, k1, k2, k3]),
        }
    }
}

/// seccomp(2), SECCOMP_SET_MODE_FILTER, for this thread and what it executes.
pub fn filter_calls(program: &[FilterInstruction], flags: u64) -> io::Result<()> {
    /// `struct sock_fprog`.
    #[repr(C)]
    struct Program {
        length: u16,
        instructions: *const FilterInstruction,
    }
    let program = Program {
        length: u16::try_from(program.len()).map_err(io::Error::other)?,
        instructions: program.as_ptr(),
    };
    // SAFETY: the program and its instructions, of the length that is said, outlive the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const program,
        )
    })
    .map(drop)
}

/// `struct sched_attr` of sched_setattr(2).
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub struct SchedulerAttributes {
    pub size: u32,
    pub policy: u32,
    pub flags: u64,
    pub nice: i32,
    pub priority: u32,
    pub runtime: u64,
    pub deadline: u64,
    pub period: u64,
    pub utilisation_minimum: u32,
    pub utilisation_maximum: u32,
}

/// sched_setattr(2) for this process; `size` is filled in.
pub fn set_scheduler(attributes: &SchedulerAttributes) -> io::Result<()> {
    let attributes = SchedulerAttributes {
        size: size_of::<SchedulerAttributes>() as u32,
        ..*attributes
    };
    // SAFETY: the attributes say their own size and outlive the call.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) }).map(drop)
}

/// ioprio_set(2) for this process: class and level.
pub fn set_io_priority(class: u16, level: u16) -> io::Result<()> {
    const IOPRIO_WHO_PROCESS: c_int = 1;
    const IOPRIO_CLASS_SHIFT: u32 = 13;
    let value = c_int::from(class) << IOPRIO_CLASS_SHIFT | c_int::from(level);
    // SAFETY: numbers alone.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, value) }).map(drop)
}
