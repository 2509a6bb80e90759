//! Builds the machine that was saved, and lets it run on.
//!
//! The order is that of a boot (memory, VM, vCPUs, devices, doorbells) with state filled in: a vCPU's
//! CPUID first of all, then all counters, which its timer is armed by, then the rest of it; the devices
//! behind the vCPUs' local APICs, which their interrupts go to; KVM's clock last. What cannot fit is found
//! out before anything is built.

use std::{
    fs::File,
    io,
    os::fd::OwnedFd,
    sync::{Arc, PoisonError},
    time::Instant,
};

use kvm_bindings::{CpuId, KVM_CAP_PRE_FAULT_MEMORY, KVMIO};
use kvm_ioctls::{Kvm, VcpuFd};
use vmm_sys_util::{ioctl::ioctl_with_mut_ref, ioctl_iowr_nr};

use super::{
    BuildError, Chassis, VCPUS_MAX, Vcpu, Vm, clock, cpuid, create_vcpu, create_vm, open,
    supported_cpuid,
    vcpu_state::{self, RestoreVcpuError},
};
use crate::{
    fs::FileServer,
    memory::image,
    state::{self, StateError},
    virtio::DeviceError,
};

// Linux 6.11 and later; not in the bindings yet.
ioctl_iowr_nr!(KVM_PRE_FAULT_MEMORY, KVMIO, 0xd5, PreFault);

/// `struct kvm_pre_fault_memory`.
#[repr(C)]
struct PreFault {
    gpa: u64,
    size: u64,
    flags: u64,
    padding: [u64; 5],
}

/// What a machine is restored from.
pub struct RestoreConfig {
    /// /dev/kvm.
    pub kvm: OwnedFd,
    pub memory: File,
    pub state: File,
    /// The socket joined to the agent's connection.
    pub agent: OwnedFd,
    /// Runs of memory to be mapped before the vCPUs run.
    pub pages: Option<File>,
}

/// Why a machine was not restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error(
        "state: CPUID leaf {function:#x}.{index:#x} of vCPU {vcpu} is not what this host offers"
    )]
    Cpuid {
        vcpu: usize,
        function: u32,
        index: u32,
    },
    #[error("state: {0}")]
    Frequency(#[from] clock::FrequencyError),
    /// KVM refused to take a part of the state.
    #[error("state: {0}")]
    Refused(super::KvmError),
    #[error(transparent)]
    Build(#[from] BuildError),
}

impl RestoreError {
    /// Whether the saved machine is at fault, as none like it will ever run here: the client throws it
    /// away for that. Else the host failed, or whoever asked.
    pub fn is_the_images(&self) -> bool {
        match self {
            Self::State(StateError::Read(e)) => e.kind() == io::ErrorKind::UnexpectedEof,
            Self::State(_) | Self::Cpuid { .. } => true,
            Self::Frequency(clock::FrequencyError::Unscalable { .. }) => true,
            Self::Frequency(clock::FrequencyError::Kvm(e)) | Self::Refused(e) => e.is_refusal(),
            Self::Build(BuildError::Memory(e)) => e.is_clients(),
            // The devices are ours; what their queues hold is the image's.
            Self::Build(BuildError::Device(e)) => !matches!(e, DeviceError::Host { .. }),
            Self::Build(_) => false,
        }
    }
}

impl From<RestoreVcpuError> for RestoreError {
    fn from(error: RestoreVcpuError) -> Self {
        match error {
            RestoreVcpuError::State(e) => Self::State(e),
            RestoreVcpuError::Kvm(e) => Self::Refused(e),
        }
    }
}

impl Vm {
    /// Builds the machine and lets its vCPUs run on.
    ///
    /// # Errors
    /// The files are no machine's, or not one of this host's; or the host refuses. Nothing is left
    /// behind but address space.
    pub fn restore(config: RestoreConfig, files: Arc<FileServer>) -> Result<Self, RestoreError> {
        let began = Instant::now();
        let saved = state::read(&config.state)?;
        let kvm = open(config.kvm)?;
        let cpuids = cpuids(&kvm, &saved)?;
        let clocks = saved.clock.as_ref();
        let clocks = clocks.ok_or(StateError::Content("no clock"))?;
        let bus = saved.bus.as_ref();
        let bus = bus.ok_or(StateError::Content("no devices"))?;

        let spans: Vec<image::Span> = saved.data.iter().map(Into::into).collect();
        let ram = image::map_image(saved.memory_bytes, &config.memory, &spans)
            .map_err(BuildError::from)?;
        let fd = Arc::new(create_vm(&kvm, &ram).map_err(BuildError::from)?);
        let mut vcpus: Vec<Vcpu> = Vec::new();
        for (index, cpuid) in (0..).zip(cpuids) {
            let vcpu = create_vcpu(&fd, index, cpuid).map_err(BuildError::from)?;
            clock::scale(&fd, &vcpu.fd, clocks.tsc_khz)?;
            vcpus.push(vcpu);
        }
        clock::restore_tsc(vcpus.iter().map(|vcpu| &vcpu.fd), clocks)
            .map_err(RestoreError::Refused)?;
        for (vcpu, saved) in vcpus.iter().zip(&saved.vcpus) {
            vcpu_state::restore(&fd, &vcpu.fd, saved)?;
        }
        let mut chassis = Chassis::assemble(kvm, fd, ram, config.agent, files)?;
        chassis.pci.restore(bus)?;
        if let Some(console) = saved.console.as_ref() {
            let mut port = chassis
                .console
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            port.restore(console);
        }
        if let (Some(pages), Some(first)) = (config.pages, vcpus.first()) {
            prefetch(&chassis, &first.fd, &pages);
        }
        if let Some(first) = vcpus.first() {
            clock::restore_kvmclock(&chassis.fd, &first.fd, clocks)
                .map_err(RestoreError::Refused)?;
        }
        if let Err(e) = chassis.pci.start() {
            chassis.pci.stop();
            return Err(BuildError::from(e).into());
        }
        let vm = chassis.start(vcpus)?;
        log::debug!("restored in {:?}", began.elapsed());
        Ok(vm)
    }
}

/// Maps the listed pages, for this process and, where KVM can, for the guest: each page saves the guest
/// a fault of either kind. `vcpu` has its state.
fn prefetch(chassis: &Chassis, vcpu: &VcpuFd, pages: &File) {
    let mut can = chassis
        .fd
        .check_extension_raw(KVM_CAP_PRE_FAULT_MEMORY.into())
        > 0;
    let runs = image::read_prefetch(pages);
    image::prefetch(&chassis.ram, &runs, |gpa, size| {
        let mut range = PreFault {
            gpa,
            size,
            flags: 0,
            padding: [0; 5],
        };
        if can {
            // SAFETY: the structure is live and laid out as KVM has it, which writes back how far it
            // came; it names guest memory alone.
            let result = unsafe { ioctl_with_mut_ref(vcpu, KVM_PRE_FAULT_MEMORY(), &mut range) };
            // Without nested paging there is no table to be filled.
            can = result == 0;
        }
    });
}

/// The CPUID of each saved vCPU, all of which this host offers.
fn cpuids(kvm: &Kvm, saved: &state::Machine) -> Result<Vec<CpuId>, RestoreError> {
    let count = u8::try_from(saved.vcpus.len()).ok();
    let count = count.filter(|count| (1..=VCPUS_MAX).contains(count));
    let count = count.ok_or(StateError::Content("an impossible number of vCPUs"))?;
    let supported = supported_cpuid(kvm).map_err(BuildError::from)?;
    let mut cpuids = Vec::new();
    for (index, vcpu) in (0..count).zip(&saved.vcpus) {
        let was = vcpu_state::cpuid(vcpu)?;
        let offered = cpuid::of_vcpu(&supported, index, count);
        if let Some((function, leaf)) = cpuid::difference(&was, &offered) {
            return Err(RestoreError::Cpuid {
                vcpu: index.into(),
                function,
                index: leaf,
            });
        }
        cpuids.push(was);
    }
    Ok(cpuids)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{memory::MemoryError, vm::KvmError};

    fn refused(errno: i32) -> KvmError {
        KvmError {
            call: "KVM_SET_SREGS",
            cause: io::Error::from_raw_os_error(errno),
        }
    }

    #[test]
    fn an_image_is_blamed_for_what_it_holds_and_not_for_a_shortage() {
        let images: [RestoreError; 6] = [
            StateError::Checksum.into(),
            StateError::Read(io::ErrorKind::UnexpectedEof.into()).into(),
            RestoreError::Refused(refused(libc::EINVAL)),
            RestoreError::Refused(KvmError::refused_msr(0x10)),
            BuildError::Memory(MemoryError::Span).into(),
            clock::FrequencyError::Unscalable { saved: 1, host: 2 }.into(),
        ];
        for error in images {
            assert!(error.is_the_images(), "{error}");
        }
        let hosts: [RestoreError; 7] = [
            StateError::Read(io::Error::from_raw_os_error(libc::EIO)).into(),
            RestoreError::Refused(refused(libc::ENOMEM)),
            clock::FrequencyError::Kvm(refused(libc::EINTR)).into(),
            BuildError::Kvm(refused(libc::EINVAL)).into(),
            BuildError::NotKvm(-1).into(),
            BuildError::Memory(MemoryError::Image(io::ErrorKind::OutOfMemory.into())).into(),
            BuildError::Device(DeviceError::Host {
                device: "fs",
                call: "start a thread",
                cause: io::Error::from_raw_os_error(libc::EAGAIN),
            })
            .into(),
        ];
        for error in hosts {
            assert!(!error.is_the_images(), "{error}");
        }
    }
}
