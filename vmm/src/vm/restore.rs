//! Builds the machine that was saved, and lets it run on.
//!
//! It may be given more than was saved: memory behind all that it had, and vCPUs that wait as at a boot.
//! The guest knows nothing of the one before its agent is told, and of the other that they may come.
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
    registers, supported_cpuid,
    vcpu_state::{self, RestoreVcpuError},
};
use crate::{
    fs::FileServer,
    memory::{
        self, Ungrowable,
        image::{self, Later, Prefetch},
    },
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
    /// Runs of memory to be mapped before they are asked for.
    pub pages: Option<File>,
    /// What it is to have, in bytes; 0: as saved.
    pub memory_bytes: u64,
    /// How many it is to have; 0: as saved.
    pub vcpus: u32,
}

/// Memory that a machine has beyond what was saved; 0 and 0 where there is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Added {
    /// Guest-physical address.
    pub start: u64,
    pub bytes: u64,
}

/// A machine that runs on.
pub struct Restored {
    pub vm: Vm,
    pub added: Added,
    /// Left to be mapped.
    pub later: Later,
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
    #[error("vcpus: {wanted} is not between {saved}, as were saved, and {possible}")]
    Vcpus {
        wanted: u32,
        saved: usize,
        possible: u8,
    },
    #[error(transparent)]
    Memory(#[from] Ungrowable),
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
            Self::Build(_) | Self::Vcpus { .. } | Self::Memory(_) => false,
        }
    }

    /// Whether it was asked to become what it cannot.
    pub fn is_of_size(&self) -> bool {
        matches!(self, Self::Vcpus { .. } | Self::Memory(_))
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
    pub fn restore(
        config: RestoreConfig,
        files: Arc<FileServer>,
    ) -> Result<Restored, RestoreError> {
        let began = Instant::now();
        let saved = state::read(&config.state)?;
        let kvm = open(config.kvm)?;
        let (cpuids, possible) = cpuids(&kvm, &saved, config.vcpus)?;
        let end = cpuids.first().map_or(0, cpuid::address_space);
        let added = memory::addition(saved.memory_bytes, config.memory_bytes, end)?;
        let grown = added.is_some() || cpuids.len() > saved.vcpus.len();
        let clocks = saved.clock.as_ref();
        let clocks = clocks.ok_or(StateError::Content("no clock"))?;
        let bus = saved.bus.as_ref();
        let bus = bus.ok_or(StateError::Content("no devices"))?;

        let spans: Vec<image::Span> = saved.data.iter().map(Into::into).collect();
        let ram = image::map_image(saved.memory_bytes, &config.memory, &spans, added)
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
        for vcpu in vcpus.iter().skip(saved.vcpus.len()) {
            registers::prepare(&vcpu.fd).map_err(BuildError::from)?;
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
        let pages = config.pages.as_ref();
        let pages = pages.map_or_else(Vec::new, |pages| image::read_prefetch(pages, &chassis.ram));
        if let Some(first) = vcpus.first() {
            let early = pages.iter().filter(|run| run.early);
            prefetch(&chassis, &first.fd, early);
            clock::restore_kvmclock(&chassis.fd, &first.fd, clocks)
                .map_err(RestoreError::Refused)?;
        }
        if let Err(e) = chassis.pci.start() {
            chassis.pci.stop();
            return Err(BuildError::from(e).into());
        }
        let later = pages.into_iter().filter(|run| !run.early);
        let later = Later::new(chassis.ram.clone(), later);
        let mut vm = chassis.start(vcpus, possible)?;
        vm.grown = grown;
        log::debug!("restored in {:?}", began.elapsed());
        let (start, bytes) = added.unwrap_or_default();
        let added = Added { start, bytes };
        Ok(Restored { vm, added, later })
    }
}

/// Maps `runs` of pages, for this process and, where KVM can, for the guest: each page saves the guest
/// a fault of either kind. `vcpu` has its state.
fn prefetch<'a>(chassis: &Chassis, vcpu: &VcpuFd, runs: impl Iterator<Item = &'a Prefetch>) {
    let mut can = chassis
        .fd
        .check_extension_raw(KVM_CAP_PRE_FAULT_MEMORY.into())
        > 0;
    for run in runs {
        let mapped = image::prefetch(&chassis.ram, run, |gpa, size| {
            let mut range = PreFault {
                gpa,
                size,
                flags: 0,
                padding: [0; 5],
            };
            if can {
                // SAFETY: the structure is live and laid out as KVM has it, which writes back how far it
                // came; it names guest memory alone.
                let result =
                    unsafe { ioctl_with_mut_ref(vcpu, KVM_PRE_FAULT_MEMORY(), &mut range) };
                // Without nested paging there is no table to be filled.
                can = result == 0;
            }
        });
        if let Err(e) = mapped {
            log::debug!("prefetch: {e}");
            break;
        }
    }
}

/// The CPUID of each vCPU, those that were saved first: all of them this host offers. Of `wanted` vCPUs,
/// or with 0 of those that were saved. The second is how many the guest knows of.
fn cpuids(
    kvm: &Kvm,
    saved: &state::Machine,
    wanted: u32,
) -> Result<(Vec<CpuId>, u8), RestoreError> {
    let (count, possible) = vcpus(saved, wanted)?;
    let supported = supported_cpuid(kvm).map_err(BuildError::from)?;
    let mut cpuids = Vec::new();
    for (index, vcpu) in (0..possible).zip(&saved.vcpus) {
        let was = vcpu_state::cpuid(vcpu)?;
        let offered = cpuid::of_vcpu(&supported, index, possible);
        if let Some((function, leaf)) = cpuid::difference(&was, &offered) {
            return Err(RestoreError::Cpuid {
                vcpu: index.into(),
                function,
                index: leaf,
            });
        }
        cpuids.push(was);
    }
    let further = (0..count).skip(cpuids.len());
    cpuids.extend(further.map(|index| cpuid::of_vcpu(&supported, index, possible)));
    Ok((cpuids, possible))
}

/// How many vCPUs the machine gets, and how many its guest knows of.
fn vcpus(saved: &state::Machine, wanted: u32) -> Result<(u8, u8), RestoreError> {
    let impossible = StateError::Content("an impossible number of vCPUs");
    let known = match saved.possible_vcpus {
        0 => u8::try_from(saved.vcpus.len()).ok(),
        possible => u8::try_from(possible).ok(),
    };
    let fits =
        |known: &u8| *known <= VCPUS_MAX && (1..=usize::from(*known)).contains(&saved.vcpus.len());
    let possible = known.filter(fits).ok_or(impossible)?;
    let count = match wanted {
        0 => u8::try_from(saved.vcpus.len()).ok(),
        wanted => u8::try_from(wanted).ok(),
    };
    let fits = |count: &u8| *count <= possible && usize::from(*count) >= saved.vcpus.len();
    let count = count.filter(fits).ok_or(RestoreError::Vcpus {
        wanted,
        saved: saved.vcpus.len(),
        possible,
    })?;
    Ok((count, possible))
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
        let hosts: [RestoreError; 8] = [
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
            RestoreError::Vcpus {
                wanted: 9,
                saved: 1,
                possible: 8,
            },
        ];
        for error in hosts {
            assert!(!error.is_the_images(), "{error}");
        }
    }

    #[test]
    fn vcpus_are_those_that_the_guest_knows_of() {
        let machine = |saved, possible_vcpus| state::Machine {
            vcpus: vec![state::Vcpu::default(); saved],
            possible_vcpus,
            ..Default::default()
        };
        for (saved, possible, wanted, given) in [
            (1, 8, 0, (1, 8)),
            (1, 8, 1, (1, 8)),
            (1, 8, 8, (8, 8)),
            (2, 0, 0, (2, 2)),
            (2, 0, 2, (2, 2)),
            (64, 64, 64, (64, 64)),
        ] {
            let machine = machine(saved, possible);
            assert_eq!(vcpus(&machine, wanted).unwrap(), given);
        }
        for (saved, possible, wanted) in [(1, 8, 9), (1, 8, 256), (4, 8, 2), (1, 0, 2)] {
            let error = vcpus(&machine(saved, possible), wanted).unwrap_err();
            assert!(error.is_of_size(), "{error}");
            let named = format!("vcpus: {wanted} is not between {saved}");
            assert!(error.to_string().starts_with(&named), "{error}");
        }
        for (saved, possible) in [(0, 0), (0, 8), (65, 0), (3, 2), (1, 65), (1, 256)] {
            let error = vcpus(&machine(saved, possible), 0).unwrap_err();
            assert!(error.is_the_images(), "{error}");
        }
    }
}
