//! The VM of a machine: built once from [`Config`], then running until it ends.
//!
//! Order of building, measured to matter: memory before vCPUs and interrupt controllers, for each
//! later registration waits for a grace period of those that exist; doorbells last.
//!
//! A [`Vm`] is driven by the service; its vCPUs and devices run on threads of their own and report
//! the end to its [`Ending`].

mod attach;
pub mod boot_params;
mod bus;
mod clock;
mod coalesced;
mod cpuid;
pub mod ending;
pub mod kernel;
mod mp_table;
mod msr;
mod plain;
mod registers;
mod restore;
mod routes;
mod save;
pub mod vcpu;
mod vcpu_state;

pub use self::{
    attach::{AttachError, Interface},
    restore::{RestoreConfig, RestoreError, Restored},
    save::SaveError,
};

use std::{
    fs::File,
    io,
    os::fd::{IntoRawFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
};

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_CAP_COALESCED_PIO, KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES,
    kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};

use self::{
    bus::GuestBus,
    coalesced::CoalescedWrites,
    ending::Ending,
    routes::Routes,
    vcpu::{StuckVcpus, Vcpu, Vcpus},
};
use crate::{
    devices::{
        console::Console,
        fs::FsDevice,
        pvpanic::{self, Pvpanic},
        reset_port::ResetPort,
        rng::Rng,
        vsock::{Dialer, Vsock},
    },
    fs::FileServer,
    memory::{
        self, GuestMemoryAccess, GuestMemoryRegion, GuestRam, MemoryError, MemoryRegionAddress,
    },
    pci::{PciBus, PciError, config::HostBridge, msix::MessageSink},
    virtio::{
        DeviceError, VirtioDevice,
        pci::{self, Doorbells, VirtioPci},
    },
};

/// The most vCPUs a machine has.
pub const VCPUS_MAX: u8 = 64;
/// Three pages that KVM needs on Intel, below the end of the MMIO hole.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// What a machine is made of.
pub struct Config {
    /// /dev/kvm.
    pub kvm: OwnedFd,
    pub kernel: File,
    pub initrd: File,
    /// The socket joined to the guest's connection to the agent port.
    pub agent: OwnedFd,
    pub memory_bytes: u64,
    /// 1 to [`VCPUS_MAX`].
    pub vcpus: u8,
    /// vCPUs that the guest makes room for: `vcpus` to [`VCPUS_MAX`].
    pub possible_vcpus: u8,
    /// Appended to the VMM's own command line.
    pub cmdline: String,
}

/// A call of KVM, or one made for it, failed.
#[derive(Debug, thiserror::Error)]
#[error("{call}: {cause}")]
pub struct KvmError {
    call: &'static str,
    cause: io::Error,
}

impl KvmError {
    fn of(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |e| Self {
            call,
            cause: e.into(),
        }
    }

    /// Whether KVM did not like what it was given, and is not just short of something.
    fn is_refusal(&self) -> bool {
        // Without an errno it is our own finding about the values.
        matches!(
            self.cause.raw_os_error(),
            None | Some(libc::EINVAL | libc::E2BIG)
        )
    }

    fn refused_msr(index: u32) -> Self {
        Self {
            call: "KVM_SET_MSRS",
            cause: io::Error::other(format!("register {index:#x} was refused")),
        }
    }

    fn too_many(call: &'static str) -> Self {
        Self {
            call,
            cause: io::ErrorKind::ArgumentListTooLong.into(),
        }
    }
}

/// Why a machine was not built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    #[error("vcpus: {0} is not between 1 and {VCPUS_MAX}")]
    Vcpus(u32),
    #[error("possible_vcpus: {possible} is not between {vcpus}, the vCPUs, and {VCPUS_MAX}")]
    PossibleVcpus { possible: u32, vcpus: u8 },
    #[error("kvm: the descriptor is not /dev/kvm (KVM_GET_API_VERSION answers {0})")]
    NotKvm(i32),
    #[error("kvm: the host's KVM lacks {0}")]
    Lacks(&'static str),
    #[error(
        "kvm: this CPU shows neither VMX nor SVM: /dev/kvm is served by a paravirtual KVM, which \
         cannot run a kernel"
    )]
    Paravirtual,
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Kernel(#[from] kernel::KernelError),
    #[error(transparent)]
    BootParams(#[from] boot_params::BootParamsError),
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error(transparent)]
    Pci(#[from] PciError),
    #[error(transparent)]
    Device(#[from] DeviceError),
}

impl BuildError {
    /// Whether the client asked for something that cannot be; else the host failed.
    pub fn is_clients(&self) -> bool {
        use kernel::KernelError;
        match self {
            Self::Vcpus(_) | Self::PossibleVcpus { .. } | Self::NotKvm(_) => true,
            Self::Memory(e) => e.is_clients(),
            Self::Kernel(e) => !matches!(e, KernelError::Io { .. } | KernelError::Load(_)),
            Self::BootParams(e) => !matches!(
                e,
                boot_params::BootParamsError::Initrd(_)
                    | boot_params::BootParamsError::MapInitrd(_)
                    | boot_params::BootParamsError::Random(_)
                    | boot_params::BootParamsError::Memory(_)
            ),
            _ => false,
        }
    }
}

/// A machine that was started.
pub struct Vm {
    kvm: Kvm,
    fd: Arc<VmFd>,
    routes: Arc<Routes>,
    vcpus: Vcpus,
    pci: Arc<Mutex<PciBus>>,
    console: Arc<Mutex<Console>>,
    dialer: Dialer,
    ending: Ending,
    // Keeps the memory mapped as long as anything of the machine lives.
    ram: GuestRam,
    possible_vcpus: u8,
    /// The memory and the vCPUs are not those that its guest has booted with.
    grown: bool,
}

/// The machine around its vCPUs: memory and devices, nothing of which works yet.
struct Chassis {
    kvm: Kvm,
    fd: Arc<VmFd>,
    pci: PciBus,
    console: Arc<Mutex<Console>>,
    dialer: Dialer,
    ending: Ending,
    ram: GuestRam,
}

impl Vm {
    /// Builds the machine and starts its vCPUs.
    pub fn boot(config: Config, files: Arc<FileServer>) -> Result<Self, BuildError> {
        let regions = memory::layout(config.memory_bytes)?;
        let low_end = regions.first().map_or(0, |(_, length)| *length);
        let ram = memory::allocate(config.memory_bytes)?;
        let entry = load(&config, &ram, &regions, low_end)?;
        let kvm = open(config.kvm)?;
        let fd = Arc::new(create_vm(&kvm, &ram)?);
        let vcpus = create_vcpus(&kvm, &fd, config.vcpus, config.possible_vcpus, entry)?;
        let chassis = Chassis::assemble(kvm, fd, ram, config.agent, files)?;
        chassis.start(vcpus, config.possible_vcpus)
    }

    pub fn ending(&self) -> &Ending {
        &self.ending
    }

    /// Joins sockets to the guest's vsock ports.
    pub fn dialer(&self) -> &Dialer {
        &self.dialer
    }

    /// Stops all vCPUs; returns once none of them runs.
    pub async fn pause(&self) -> Result<(), StuckVcpus> {
        self.vcpus.pause().await
    }

    pub fn resume(&self) {
        self.vcpus.resume();
    }

    /// Whether the vCPUs were told to pause.
    pub fn paused(&self) -> bool {
        self.vcpus.paused()
    }

    /// Ends all vCPUs for good; returns once none of them runs.
    pub async fn quit(&self) -> Result<(), StuckVcpus> {
        self.vcpus.quit().await
    }

    /// The last of what the guest kernel printed.
    pub fn console(&self) -> Vec<u8> {
        let console = self.console.lock().unwrap_or_else(PoisonError::into_inner);
        console.contents()
    }

    pub fn exits(&self) -> &vcpu::Exits {
        self.vcpus.exits()
    }
}

impl Chassis {
    /// Puts the devices on the bus of a VM whose vCPUs exist.
    fn assemble(
        kvm: Kvm,
        fd: Arc<VmFd>,
        ram: GuestRam,
        agent: OwnedFd,
        files: Arc<FileServer>,
    ) -> Result<Self, BuildError> {
        let ending = Ending::default();
        let console: Arc<Mutex<Console>> = Arc::default();
        let (vsock, dialer) = Vsock::new(agent, ending.clone())?;
        let slots: [Box<dyn VirtioDevice>; 3] = [
            Box::new(vsock),
            Box::new(FsDevice::new(files, ending.clone())),
            Box::new(Rng::default()),
        ];
        let mut pci = populate(slots, &fd, &ram, &ending)?;
        let bar = pci.place_bar(pvpanic::BAR_SIZE)?;
        let pvpanic = Pvpanic::new(bar, ending.clone(), Arc::clone(&console));
        pci.add(Box::new(pvpanic))?;
        Ok(Self {
            kvm,
            fd,
            pci,
            console,
            dialer,
            ending,
            ram,
        })
    }

    /// Lets the vCPUs run. On an error none has, and no device works on.
    fn start(self, vcpus: Vec<Vcpu>, possible_vcpus: u8) -> Result<Vm, BuildError> {
        let coalesced = coalesce(&self.fd, vcpus.first().map(|vcpu| &vcpu.fd));
        let pci = Arc::new(Mutex::new(self.pci));
        let started = coalesced.and_then(|coalesced| {
            let bus = GuestBus {
                pci: Arc::clone(&pci),
                console: Arc::clone(&self.console),
                reset_port: ResetPort {
                    ending: self.ending.clone(),
                    console: Arc::clone(&self.console),
                },
                coalesced,
            };
            Vcpus::start(vcpus, bus, self.ending.clone())
        });
        if started.is_err() {
            // Those of a restored machine work already, and the threads of vCPUs that there are hold on
            // to them yet.
            pci.lock().unwrap_or_else(PoisonError::into_inner).stop();
        }
        Ok(Vm {
            kvm: self.kvm,
            routes: Arc::new(Routes::new(Arc::clone(&self.fd))),
            fd: self.fd,
            vcpus: started?,
            pci,
            console: self.console,
            dialer: self.dialer,
            ending: self.ending,
            ram: self.ram,
            possible_vcpus,
            grown: false,
        })
    }
}

/// Takes the descriptor of /dev/kvm, and makes sure it is one that can run a kernel.
fn open(fd: OwnedFd) -> Result<Kvm, BuildError> {
    // SAFETY: the descriptor is owned and passes its ownership on.
    let kvm = unsafe { <Kvm as std::os::fd::FromRawFd>::from_raw_fd(fd.into_raw_fd()) };
    let version = kvm.get_api_version();
    if u32::try_from(version) != Ok(KVM_API_VERSION) {
        return Err(BuildError::NotKvm(version));
    }
    for (cap, name) in [
        (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
        (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
        (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
        (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
        (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
        (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
        (Cap::Xsave2, "KVM_CAP_XSAVE2"),
        (Cap::X86MsrFilter, "KVM_CAP_X86_MSR_FILTER"),
    ] {
        if !kvm.check_extension(cap) {
            return Err(BuildError::Lacks(name));
        }
    }
    match has_virtualization() {
        true => Ok(kvm),
        false => Err(BuildError::Paravirtual),
    }
}

/// Whether this CPU has VMX or SVM (Intel SDM volume 2A, AMD APM volume 3: CPUID).
fn has_virtualization() -> bool {
    use std::arch::x86_64::__cpuid;
    // SAFETY: every x86-64 CPU has the instruction. (Newer compilers know.)
    #[allow(unused_unsafe)]
    let cpuid = |leaf| unsafe { __cpuid(leaf) };
    let vmx = cpuid(1).ecx & 1 << 5 != 0;
    let svm = cpuid(0x8000_0000).eax >= 0x8000_0001 && cpuid(0x8000_0001).ecx & 1 << 2 != 0;
    vmx || svm
}

/// Fills guest memory with everything the kernel starts with. Returns its entry.
fn load(
    config: &Config,
    ram: &GuestRam,
    regions: &[(u64, u64)],
    low_end: u64,
) -> Result<u64, BuildError> {
    let fewer = (config.vcpus < config.possible_vcpus).then_some(config.vcpus);
    let cmdline = boot_params::cmdline(&config.cmdline, fewer)?;
    let kernel = kernel::load(&config.kernel, ram, low_end)?;
    let initrd = boot_params::load_initrd(&config.initrd, ram, kernel.end, low_end)?;
    boot_params::write(ram, regions, &cmdline, initrd)?;
    mp_table::write(ram, config.possible_vcpus).map_err(boot_params::BootParamsError::from)?;
    Ok(kernel.entry)
}

fn create_vm(kvm: &Kvm, ram: &GuestRam) -> Result<VmFd, KvmError> {
    let vm = kvm.create_vm().map_err(KvmError::of("KVM_CREATE_VM"))?;
    // First of all: later it would wait for everybody who looks at memory.
    msr::without_counters(&vm)?;
    msr::restrict(&vm)?;
    for (slot, region) in (0..).zip(ram.iter()) {
        let host = region
            .get_host_address(MemoryRegionAddress(0))
            .map_err(|e| KvmError {
                call: "find guest memory",
                cause: io::Error::other(e),
            })?;
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: host as u64,
        };
        // SAFETY: the range is a mapping of ours, which outlives the VM: `Vm` holds it.
        unsafe { vm.set_user_memory_region(region) }
            .map_err(KvmError::of("KVM_SET_USER_MEMORY_REGION"))?;
    }
    vm.set_tss_address(TSS_ADDRESS)
        .map_err(KvmError::of("KVM_SET_TSS_ADDR"))?;
    // Local APICs in the kernel and nothing else: no I/O APIC, so no routes reserved for one.
    let split = kvm_enable_cap {
        cap: KVM_CAP_SPLIT_IRQCHIP,
        ..Default::default()
    };
    vm.enable_cap(&split)
        .map_err(KvmError::of("KVM_ENABLE_CAP(KVM_CAP_SPLIT_IRQCHIP)"))?;
    Ok(vm)
}

/// The first `count` vCPUs of the `possible` ones, ready to run; the first at the kernel's `entry`.
fn create_vcpus(
    kvm: &Kvm,
    vm: &VmFd,
    count: u8,
    possible: u8,
    entry: u64,
) -> Result<Vec<Vcpu>, KvmError> {
    let supported = supported_cpuid(kvm)?;
    let mut vcpus = Vec::new();
    for index in 0..count {
        let vcpu = create_vcpu(vm, index, cpuid::of_vcpu(&supported, index, possible))?;
        registers::prepare(&vcpu.fd)?;
        if index == 0 {
            registers::start_at(&vcpu.fd, entry)?;
        }
        vcpus.push(vcpu);
    }
    Ok(vcpus)
}

fn create_vcpu(vm: &VmFd, index: u8, cpuid: CpuId) -> Result<Vcpu, KvmError> {
    let fd = vm
        .create_vcpu(index.into())
        .map_err(KvmError::of("KVM_CREATE_VCPU"))?;
    fd.set_cpuid2(&cpuid)
        .map_err(KvmError::of("KVM_SET_CPUID2"))?;
    let index = index.into();
    Ok(Vcpu { index, fd, cpuid })
}

fn supported_cpuid(kvm: &Kvm) -> Result<CpuId, KvmError> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(KvmError::of("KVM_GET_SUPPORTED_CPUID"))
}

/// Has KVM collect port writes, where it can.
fn coalesce(vm: &VmFd, vcpu: Option<&VcpuFd>) -> Result<Option<CoalescedWrites>, KvmError> {
    let Some(vcpu) = vcpu else {
        return Ok(None);
    };
    if vm.check_extension_raw(KVM_CAP_COALESCED_PIO.into()) <= 0 {
        return Ok(None);
    }
    for (port, width) in bus::COALESCED {
        vm.register_coalesced_mmio(IoEventAddress::Pio(port.into()), width)
            .map_err(KvmError::of("KVM_REGISTER_COALESCED_MMIO"))?;
    }
    let ring = CoalescedWrites::map(vcpu).map_err(|cause| KvmError {
        call: "map the ring of coalesced writes",
        cause,
    })?;
    Ok(Some(ring))
}

/// A bus with the host bridge and the virtio devices in their slots, their doorbells registered.
fn populate(
    devices: [Box<dyn VirtioDevice>; 3],
    vm: &Arc<VmFd>,
    ram: &GuestRam,
    ending: &Ending,
) -> Result<PciBus, BuildError> {
    let mut bus = PciBus::default();
    bus.add(Box::new(HostBridge::default()))?;
    for device in devices {
        let bar = bus.place_bar(pci::BAR_SIZE)?;
        let sink = Arc::clone(vm) as Arc<dyn MessageSink>;
        let device = VirtioPci::new(device, bar, ram.clone(), sink, ending.clone())?;
        for (address, doorbell) in device.doorbells() {
            vm.watch(address, doorbell).map_err(|cause| KvmError {
                call: "KVM_IOEVENTFD",
                cause,
            })?;
        }
        bus.add(Box::new(device))?;
    }
    Ok(bus)
}
