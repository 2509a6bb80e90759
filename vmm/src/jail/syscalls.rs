//! Which system calls each thread may make, and with which arguments. What is not here is death.
//!
//! Numbers are the only thing a filter sees of a call but its integers: not what a pointer leads to.

use kvm_bindings as kvm;
use libc::c_long;

use super::threads::Role;
use crate::devices::net::vhost::{
    VHOST_GET_FEATURES, VHOST_GET_VRING_BASE, VHOST_NET_SET_BACKEND, VHOST_SET_FEATURES,
    VHOST_SET_MEM_TABLE, VHOST_SET_OWNER, VHOST_SET_VRING_ADDR, VHOST_SET_VRING_BASE,
    VHOST_SET_VRING_CALL, VHOST_SET_VRING_ERR, VHOST_SET_VRING_KICK, VHOST_SET_VRING_NUM,
};

/// A call that is allowed when all conditions hold; several of a number are alternatives.
pub(super) struct Allowed(pub(super) c_long, pub(super) &'static [Condition]);

/// What an argument, by its index, must be; the lower 32 bits of it.
#[derive(Clone, Copy)]
pub(super) enum Condition {
    Is(u8, u32),
    /// None of these bits is set.
    Lacks(u8, u32),
    /// It is this process's pid.
    OwnPid(u8),
}
use Condition::{Is, Lacks, OwnPid};

const fn any(call: c_long) -> Allowed {
    Allowed(call, &[])
}

/// The calls of a thread of this role.
pub(super) fn of(role: Role) -> [&'static [Allowed]; 2] {
    let own = match role {
        Role::Service => SERVICE,
        Role::Vcpu => VCPU,
        Role::Vsock => VSOCK,
        Role::Net => NET,
        Role::Files => FILES,
    };
    [COMMON, own]
}

/// The calls of any thread, and of the one that makes them. What is called most often comes first: a filter
/// looks at the alternatives of a call in this order.
pub(super) fn all() -> [&'static [Allowed]; 7] {
    [COMMON, VCPU, NET, VSOCK, FILES, SERVICE, NURSERY]
}

const PROT_EXEC: u32 = libc::PROT_EXEC as u32;

/// What Rust and glibc need on any thread: memory that is never code, locks, clocks, the thread's own end,
/// and descriptors that there are.
const COMMON: &[Allowed] = &[
    any(libc::SYS_read),
    any(libc::SYS_readv),
    any(libc::SYS_write),
    any(libc::SYS_writev),
    any(libc::SYS_close),
    any(libc::SYS_poll),
    any(libc::SYS_dup),
    Allowed(libc::SYS_fcntl, &[Is(1, libc::F_DUPFD_CLOEXEC as u32)]),
    Allowed(libc::SYS_fcntl, &[Is(1, libc::F_GETFD as u32)]),
    Allowed(libc::SYS_fcntl, &[Is(1, libc::F_GETFL as u32)]),
    Allowed(libc::SYS_mmap, &[Lacks(2, PROT_EXEC)]),
    Allowed(libc::SYS_mprotect, &[Lacks(2, PROT_EXEC)]),
    any(libc::SYS_munmap),
    any(libc::SYS_mremap),
    any(libc::SYS_madvise),
    any(libc::SYS_brk),
    any(libc::SYS_futex),
    any(libc::SYS_sched_yield),
    any(libc::SYS_sched_getaffinity),
    any(libc::SYS_getcpu),
    // Where the host's clock cannot be read without the kernel.
    any(libc::SYS_clock_gettime),
    any(libc::SYS_gettimeofday),
    any(libc::SYS_clock_nanosleep),
    any(libc::SYS_nanosleep),
    any(libc::SYS_restart_syscall),
    any(libc::SYS_getrandom),
    any(libc::SYS_getpid),
    any(libc::SYS_gettid),
    any(libc::SYS_rt_sigprocmask),
    any(libc::SYS_rt_sigreturn),
    any(libc::SYS_rt_sigaction),
    any(libc::SYS_sigaltstack),
    // A vCPU is kicked, and abort(3) kills, by a signal to a thread.
    Allowed(libc::SYS_tgkill, &[OwnPid(0)]),
    any(libc::SYS_rseq),
    any(libc::SYS_set_robust_list),
    Allowed(libc::SYS_prctl, &[Is(0, libc::PR_SET_NAME as u32)]),
    any(libc::SYS_exit),
    any(libc::SYS_exit_group),
];

/// glibc's threads (`nptl/pthread_create.c`): all is shared, nothing is new.
const THREAD: u32 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID) as u32;

/// Making threads, and what a new one does to confine itself.
const NURSERY: &[Allowed] = &[
    Allowed(libc::SYS_clone, &[Is(0, THREAD)]),
    // Its flags cannot be seen, so it is answered ENOSYS and glibc falls back on clone.
    any(libc::SYS_clone3),
    any(libc::SYS_landlock_create_ruleset),
    Allowed(libc::SYS_landlock_restrict_self, &[Is(1, 0)]),
    any(libc::SYS_capset),
    Allowed(
        libc::SYS_seccomp,
        &[Is(0, libc::SECCOMP_SET_MODE_FILTER), Is(1, 0)],
    ),
];

const STREAM_PAIR: u32 = (libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC) as u32;

/// The machine's connection; building the machine, saving and restoring it.
const SERVICE: &[Allowed] = &[
    any(libc::SYS_epoll_create1),
    any(libc::SYS_epoll_ctl),
    any(libc::SYS_epoll_wait),
    any(libc::SYS_eventfd2),
    any(libc::SYS_recvfrom),
    any(libc::SYS_recvmsg),
    any(libc::SYS_sendto),
    any(libc::SYS_shutdown),
    // tokio makes itself a pair where another of the workspace's programs has it watch signals. Connected
    // streams: a datagram socket of a pair could still send to others by name.
    Allowed(
        libc::SYS_socketpair,
        &[Is(0, libc::AF_UNIX as u32), Is(1, STREAM_PAIR)],
    ),
    Allowed(libc::SYS_ioctl, &[Is(1, libc::FIONBIO as u32)]),
    // Kernel, initrd, and the files of a saved machine.
    any(libc::SYS_statx),
    any(libc::SYS_fstat),
    any(libc::SYS_lseek),
    any(libc::SYS_pread64),
    any(libc::SYS_pwrite64),
    any(libc::SYS_ftruncate),
    Allowed(libc::SYS_prlimit64, &[Is(0, 0), Is(1, libc::RLIMIT_DATA)]),
    ioctl(&[Is(1, KVM_GET_API_VERSION)]),
    ioctl(&[Is(1, KVM_CREATE_VM)]),
    ioctl(&[Is(1, KVM_GET_MSR_INDEX_LIST)]),
    ioctl(&[Is(1, KVM_CHECK_EXTENSION)]),
    ioctl(&[Is(1, KVM_GET_VCPU_MMAP_SIZE)]),
    ioctl(&[Is(1, KVM_GET_SUPPORTED_CPUID)]),
    ioctl(&[Is(1, KVM_CREATE_VCPU)]),
    ioctl(&[Is(1, KVM_SET_USER_MEMORY_REGION)]),
    ioctl(&[Is(1, KVM_SET_TSS_ADDR)]),
    ioctl(&[Is(1, KVM_X86_SET_MSR_FILTER)]),
    ioctl(&[Is(1, KVM_REGISTER_COALESCED_MMIO)]),
    ioctl(&[Is(1, KVM_IOEVENTFD)]),
    ioctl(&[Is(1, KVM_ENABLE_CAP)]),
    ioctl(&[Is(1, KVM_SIGNAL_MSI)]),
    ioctl(&[Is(1, KVM_GET_CLOCK)]),
    ioctl(&[Is(1, KVM_SET_CLOCK)]),
    ioctl(&[Is(1, KVM_GET_TSC_KHZ)]),
    ioctl(&[Is(1, KVM_SET_TSC_KHZ)]),
    ioctl(&[Is(1, KVM_GET_DEVICE_ATTR)]),
    ioctl(&[Is(1, KVM_SET_DEVICE_ATTR)]),
    ioctl(&[Is(1, KVM_KVMCLOCK_CTRL)]),
    ioctl(&[Is(1, KVM_SET_CPUID2)]),
    ioctl(&[Is(1, KVM_SET_REGS)]),
    ioctl(&[Is(1, KVM_GET_SREGS)]),
    ioctl(&[Is(1, KVM_SET_SREGS)]),
    ioctl(&[Is(1, KVM_GET_MSRS)]),
    ioctl(&[Is(1, KVM_SET_MSRS)]),
    ioctl(&[Is(1, KVM_GET_LAPIC)]),
    ioctl(&[Is(1, KVM_SET_LAPIC)]),
    ioctl(&[Is(1, KVM_SET_MP_STATE)]),
    ioctl(&[Is(1, KVM_SET_VCPU_EVENTS)]),
    ioctl(&[Is(1, KVM_SET_DEBUGREGS)]),
    ioctl(&[Is(1, KVM_SET_XSAVE)]),
    ioctl(&[Is(1, KVM_SET_XCRS)]),
    ioctl(&[Is(1, KVM_PRE_FAULT_MEMORY)]),
    // A tap that is plugged in, and what becomes of it when the machine could not be saved.
    ioctl(&[Is(1, TUNGETIFF)]),
    ioctl(&[Is(1, TUNSETVNETHDRSZ)]),
    ioctl(&[Is(1, TUNSETVNETLE)]),
    ioctl(&[Is(1, TUNSETOFFLOAD)]),
    ioctl(&[Is(1, TUNSETQUEUE)]),
    ioctl(&[Is(1, VHOST_GET_FEATURES)]),
    ioctl(&[Is(1, VHOST_SET_OWNER)]),
];

/// Running the guest; saying what state it is in; what the guest has devices do at once, that is
/// interrupts, random bytes, the end of its connections, and where its plugged-in devices are and what they do
/// for it.
const VCPU: &[Allowed] = &[
    ioctl(&[Is(1, KVM_RUN)]),
    ioctl(&[Is(1, KVM_SIGNAL_MSI)]),
    ioctl(&[Is(1, KVM_CHECK_EXTENSION)]),
    ioctl(&[Is(1, KVM_GET_CLOCK)]),
    ioctl(&[Is(1, KVM_GET_TSC_KHZ)]),
    ioctl(&[Is(1, KVM_GET_DEVICE_ATTR)]),
    ioctl(&[Is(1, KVM_GET_REGS)]),
    ioctl(&[Is(1, KVM_GET_SREGS)]),
    ioctl(&[Is(1, KVM_GET_MSRS)]),
    ioctl(&[Is(1, KVM_GET_LAPIC)]),
    ioctl(&[Is(1, KVM_GET_MP_STATE)]),
    ioctl(&[Is(1, KVM_GET_VCPU_EVENTS)]),
    ioctl(&[Is(1, KVM_GET_DEBUGREGS)]),
    ioctl(&[Is(1, KVM_GET_XSAVE2)]),
    ioctl(&[Is(1, KVM_GET_XCRS)]),
    ioctl(&[Is(1, KVM_IOEVENTFD)]),
    ioctl(&[Is(1, KVM_IRQFD)]),
    ioctl(&[Is(1, KVM_SET_GSI_ROUTING)]),
    ioctl(&[Is(1, TUNSETOFFLOAD)]),
    ioctl(&[Is(1, TUNSETQUEUE)]),
    any(libc::SYS_epoll_ctl),
    any(libc::SYS_recvfrom),
    any(libc::SYS_shutdown),
];

/// Streams between the guest and sockets that there are.
const VSOCK: &[Allowed] = &[
    ioctl(&[Is(1, KVM_SIGNAL_MSI)]),
    any(libc::SYS_epoll_ctl),
    any(libc::SYS_epoll_wait),
    any(libc::SYS_recvfrom),
    any(libc::SYS_recvmsg),
    any(libc::SYS_sendmsg),
    any(libc::SYS_sendto),
    any(libc::SYS_shutdown),
];

/// Packets between the guest and a tap that there is, and how many of its queues are used; or having the host's kernel
/// move them.
const NET: &[Allowed] = &[
    ioctl(&[Is(1, KVM_SIGNAL_MSI)]),
    ioctl(&[Is(1, TUNSETQUEUE)]),
    ioctl(&[Is(1, KVM_IRQFD)]),
    ioctl(&[Is(1, KVM_SET_GSI_ROUTING)]),
    ioctl(&[Is(1, VHOST_SET_FEATURES)]),
    ioctl(&[Is(1, VHOST_SET_MEM_TABLE)]),
    ioctl(&[Is(1, VHOST_SET_VRING_NUM)]),
    ioctl(&[Is(1, VHOST_SET_VRING_ADDR)]),
    ioctl(&[Is(1, VHOST_SET_VRING_BASE)]),
    ioctl(&[Is(1, VHOST_GET_VRING_BASE)]),
    ioctl(&[Is(1, VHOST_SET_VRING_KICK)]),
    ioctl(&[Is(1, VHOST_SET_VRING_CALL)]),
    ioctl(&[Is(1, VHOST_SET_VRING_ERR)]),
    ioctl(&[Is(1, VHOST_NET_SET_BACKEND)]),
    any(libc::SYS_epoll_ctl),
    any(libc::SYS_epoll_wait),
];

/// What is asked for of files (`fs/sys.rs`) in somebody's name (`fs/creds.rs`).
const FILES: &[Allowed] = &[
    ioctl(&[Is(1, KVM_SIGNAL_MSI)]),
    Allowed(libc::SYS_unshare, &[Is(0, libc::CLONE_FS as u32)]),
    Allowed(libc::SYS_prctl, &[Is(0, libc::PR_GET_SECUREBITS as u32)]),
    any(libc::SYS_capget),
    any(libc::SYS_capset),
    any(libc::SYS_setfsuid),
    any(libc::SYS_setfsgid),
    any(libc::SYS_umask),
    any(libc::SYS_fchdir),
    any(libc::SYS_openat),
    any(libc::SYS_openat2),
    any(libc::SYS_statx),
    any(libc::SYS_fstatfs),
    any(libc::SYS_readlinkat),
    any(libc::SYS_mkdirat),
    any(libc::SYS_mknodat),
    any(libc::SYS_symlinkat),
    any(libc::SYS_unlinkat),
    any(libc::SYS_renameat2),
    any(libc::SYS_linkat),
    any(libc::SYS_fchmodat),
    any(libc::SYS_fchownat),
    any(libc::SYS_utimensat),
    any(libc::SYS_ftruncate),
    any(libc::SYS_fallocate),
    any(libc::SYS_preadv),
    any(libc::SYS_pwritev2),
    any(libc::SYS_copy_file_range),
    any(libc::SYS_getdents64),
    any(libc::SYS_lseek),
    any(libc::SYS_fsync),
    any(libc::SYS_fdatasync),
    any(libc::SYS_syncfs),
    any(libc::SYS_flock),
    any(libc::SYS_getxattr),
    any(libc::SYS_listxattr),
    any(libc::SYS_setxattr),
    any(libc::SYS_removexattr),
];

const fn ioctl(conditions: &'static [Condition]) -> Allowed {
    Allowed(libc::SYS_ioctl, conditions)
}

// Linux `include/uapi/linux/if_tun.h`.
const TUNSETOFFLOAD: u32 = libc::TUNSETOFFLOAD as u32;
const TUNGETIFF: u32 = libc::TUNGETIFF as u32;
const TUNSETVNETHDRSZ: u32 = libc::TUNSETVNETHDRSZ as u32;
const TUNSETQUEUE: u32 = libc::TUNSETQUEUE as u32;
const TUNSETVNETLE: u32 = libc::TUNSETVNETLE as u32;

// Linux `include/uapi/linux/kvm.h`, in its order of numbers.
const KVM_GET_API_VERSION: u32 = io(0x00);
const KVM_CREATE_VM: u32 = io(0x01);
const KVM_GET_MSR_INDEX_LIST: u32 = iowr::<kvm::kvm_msr_list>(0x02);
const KVM_CHECK_EXTENSION: u32 = io(0x03);
const KVM_GET_VCPU_MMAP_SIZE: u32 = io(0x04);
const KVM_GET_SUPPORTED_CPUID: u32 = iowr::<kvm::kvm_cpuid2>(0x05);
const KVM_CREATE_VCPU: u32 = io(0x41);
const KVM_SET_USER_MEMORY_REGION: u32 = iow::<kvm::kvm_userspace_memory_region>(0x46);
const KVM_SET_TSS_ADDR: u32 = io(0x47);
const KVM_REGISTER_COALESCED_MMIO: u32 = iow::<kvm::kvm_coalesced_mmio_zone>(0x67);
const KVM_SET_GSI_ROUTING: u32 = iow::<kvm::kvm_irq_routing>(0x6a);
const KVM_IRQFD: u32 = iow::<kvm::kvm_irqfd>(0x76);
const KVM_IOEVENTFD: u32 = iow::<kvm::kvm_ioeventfd>(0x79);
const KVM_SET_CLOCK: u32 = iow::<kvm::kvm_clock_data>(0x7b);
const KVM_GET_CLOCK: u32 = ior::<kvm::kvm_clock_data>(0x7c);
const KVM_RUN: u32 = io(0x80);
const KVM_GET_REGS: u32 = ior::<kvm::kvm_regs>(0x81);
const KVM_SET_REGS: u32 = iow::<kvm::kvm_regs>(0x82);
const KVM_GET_SREGS: u32 = ior::<kvm::kvm_sregs>(0x83);
const KVM_SET_SREGS: u32 = iow::<kvm::kvm_sregs>(0x84);
const KVM_GET_MSRS: u32 = iowr::<kvm::kvm_msrs>(0x88);
const KVM_SET_MSRS: u32 = iow::<kvm::kvm_msrs>(0x89);
const KVM_GET_LAPIC: u32 = ior::<kvm::kvm_lapic_state>(0x8e);
const KVM_SET_LAPIC: u32 = iow::<kvm::kvm_lapic_state>(0x8f);
const KVM_SET_CPUID2: u32 = iow::<kvm::kvm_cpuid2>(0x90);
const KVM_GET_MP_STATE: u32 = ior::<kvm::kvm_mp_state>(0x98);
const KVM_SET_MP_STATE: u32 = iow::<kvm::kvm_mp_state>(0x99);
const KVM_GET_VCPU_EVENTS: u32 = ior::<kvm::kvm_vcpu_events>(0x9f);
const KVM_SET_VCPU_EVENTS: u32 = iow::<kvm::kvm_vcpu_events>(0xa0);
const KVM_GET_DEBUGREGS: u32 = ior::<kvm::kvm_debugregs>(0xa1);
const KVM_SET_DEBUGREGS: u32 = iow::<kvm::kvm_debugregs>(0xa2);
const KVM_SET_TSC_KHZ: u32 = io(0xa2);
const KVM_GET_TSC_KHZ: u32 = io(0xa3);
const KVM_ENABLE_CAP: u32 = iow::<kvm::kvm_enable_cap>(0xa3);
const KVM_SET_XSAVE: u32 = iow::<kvm::kvm_xsave>(0xa5);
const KVM_SIGNAL_MSI: u32 = iow::<kvm::kvm_msi>(0xa5);
const KVM_GET_XCRS: u32 = ior::<kvm::kvm_xcrs>(0xa6);
const KVM_SET_XCRS: u32 = iow::<kvm::kvm_xcrs>(0xa7);
const KVM_KVMCLOCK_CTRL: u32 = io(0xad);
const KVM_X86_SET_MSR_FILTER: u32 = iow::<kvm::kvm_msr_filter>(0xc6);
const KVM_GET_XSAVE2: u32 = ior::<kvm::kvm_xsave>(0xcf);
const KVM_PRE_FAULT_MEMORY: u32 = iowr::<[u64; 8]>(0xd5);
const KVM_SET_DEVICE_ATTR: u32 = iow::<kvm::kvm_device_attr>(0xe1);
const KVM_GET_DEVICE_ATTR: u32 = iow::<kvm::kvm_device_attr>(0xe2);

// Linux `include/uapi/asm-generic/ioctl.h`.
const fn request(direction: u32, number: u32, size: usize) -> u32 {
    direction << 30 | (size as u32) << 16 | kvm::KVMIO << 8 | number
}

const fn io(number: u32) -> u32 {
    request(0, number, 0)
}

const fn iow<T>(number: u32) -> u32 {
    request(1, number, size_of::<T>())
}

const fn ior<T>(number: u32) -> u32 {
    request(2, number, size_of::<T>())
}

const fn iowr<T>(number: u32) -> u32 {
    request(3, number, size_of::<T>())
}
