//! The state of one vCPU, read from KVM and written back (Linux `Documentation/virt/kvm/api.rst`).
//!
//! Both orders matter. Reading starts with the run state, which makes KVM finish what is under way.
//! Writing: CPUID before the registers it has a say in; the run state, the registers, the local APIC
//! behind the special registers that enable it; the MSRs behind the local APIC, whose timer mode says
//! what the deadline means; the events last, since the registers throw pending ones away.
//!
//! The time stamp counter is not written here but for all vCPUs together and before, in `clock`.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, Xsave, kvm_mp_state, kvm_msr_entry, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use super::{KvmError, plain};
use crate::state::{self, StateError};

pub(super) const MSR_IA32_TSC: u32 = 0x10;
const MSR_IA32_TSC_DEADLINE: u32 = 0x6e0;
/// KVM's own registers, where the list of MSRs should lack them: clocks, steal time, end of
/// interrupt, polling (Linux `Documentation/virt/kvm/x86/msr.rst`).
const MSR_KVM: std::ops::RangeInclusive<u32> = 0x4b56_4d00..=0x4b56_4d08;
/// The guest's memory types (Intel SDM volume 3, 12.11.2), which KVM has and does not list: variable ranges
/// (KVM has 8), fixed ranges, the default.
const MSR_MTRRS: [std::ops::RangeInclusive<u32>; 5] = [
    0x200..=0x20f,
    0x250..=0x250,
    0x258..=0x259,
    0x268..=0x26f,
    0x2ff..=0x2ff,
];

/// What reading and writing vCPUs needs to know of the host.
#[derive(Clone)]
pub(super) struct Shape {
    /// The MSRs that make up a vCPU's state on this host.
    msrs: Vec<u32>,
    /// Numbers of 32 bits behind the fixed part of the XSAVE area.
    xsave_extra: usize,
}

impl Shape {
    pub(super) fn of_host(kvm: &Kvm, vm: &VmFd) -> Result<Self, KvmError> {
        let list = kvm
            .get_msr_index_list()
            .map_err(KvmError::of("KVM_GET_MSR_INDEX_LIST"))?;
        Ok(Self {
            msrs: with_unlisted(list.as_slice()),
            xsave_extra: xsave_extra(vm),
        })
    }
}

/// KVM presets it to what the host has, and takes that back only with the CPUID of counters and their stores (DS,
/// DTES64), which no guest is shown.
const MSR_IA32_PERF_CAPABILITIES: u32 = 0x345;

/// All MSRs to be saved on a host that lists these. It need not have the others.
fn with_unlisted(listed: &[u32]) -> Vec<u32> {
    let unlisted = MSR_KVM.chain(MSR_MTRRS.into_iter().flatten());
    let unlisted = unlisted.filter(|index| !listed.contains(index));
    let all = listed.iter().copied().chain(unlisted);
    all.filter(|index| *index != MSR_IA32_PERF_CAPABILITIES)
        .collect()
}

fn xsave_extra(vm: &VmFd) -> usize {
    let size = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
    size.saturating_sub(size_of::<kvm_xsave>())
        .div_ceil(size_of::<u32>())
}

/// Reads a vCPU that does not run. `cpuid` is what it was given.
pub(super) fn save(vcpu: &VcpuFd, cpuid: &CpuId, shape: &Shape) -> Result<state::Vcpu, KvmError> {
    let mp_state = vcpu
        .get_mp_state()
        .map_err(KvmError::of("KVM_GET_MP_STATE"))?;
    let regs = vcpu.get_regs().map_err(KvmError::of("KVM_GET_REGS"))?;
    let sregs = vcpu.get_sregs().map_err(KvmError::of("KVM_GET_SREGS"))?;
    let mut xsave =
        Xsave::new(shape.xsave_extra).map_err(|_| KvmError::too_many("KVM_GET_XSAVE2"))?;
    // SAFETY: the area has the size that KVM says it has, and no feature is enabled later on.
    unsafe { vcpu.get_xsave2(&mut xsave) }.map_err(KvmError::of("KVM_GET_XSAVE2"))?;
    let xcrs = vcpu.get_xcrs().map_err(KvmError::of("KVM_GET_XCRS"))?;
    let debugregs = vcpu
        .get_debug_regs()
        .map_err(KvmError::of("KVM_GET_DEBUGREGS"))?;
    let lapic = vcpu.get_lapic().map_err(KvmError::of("KVM_GET_LAPIC"))?;
    let mut msrs = read_msrs(vcpu, &shape.msrs)?;
    keep_timer(&mut msrs);
    let events = vcpu
        .get_vcpu_events()
        .map_err(KvmError::of("KVM_GET_VCPU_EVENTS"))?;

    let area = &xsave.as_fam_struct_ref().xsave.region;
    let area = area.iter().chain(xsave.as_slice());
    Ok(state::Vcpu {
        cpuid: plain::to_bytes(cpuid.as_slice()),
        mp_state: mp_state.mp_state,
        regs: plain::to_bytes(&[regs]),
        sregs: plain::to_bytes(&[sregs]),
        xsave: area.flat_map(|word| word.to_le_bytes()).collect(),
        xcrs: plain::to_bytes(&[xcrs]),
        debugregs: plain::to_bytes(&[debugregs]),
        lapic: plain::to_bytes(&[lapic]),
        msrs: plain::to_bytes(&msrs),
        events: plain::to_bytes(&[events]),
        ..Default::default()
    })
}

/// The MSRs of `wanted` that KVM lets go; it stops at each that it does not.
fn read_msrs(vcpu: &VcpuFd, wanted: &[u32]) -> Result<Vec<kvm_msr_entry>, KvmError> {
    let mut read = Vec::new();
    let mut rest = wanted;
    while !rest.is_empty() {
        let entries: Vec<kvm_msr_entry> = rest
            .iter()
            .map(|index| kvm_msr_entry {
                index: *index,
                ..Default::default()
            })
            .collect();
        let mut msrs =
            Msrs::from_entries(&entries).map_err(|_| KvmError::too_many("KVM_GET_MSRS"))?;
        let got = vcpu
            .get_msrs(&mut msrs)
            .map_err(KvmError::of("KVM_GET_MSRS"))?;
        read.extend_from_slice(msrs.as_slice().get(..got).unwrap_or_default());
        rest = rest.get(got + 1..).unwrap_or_default();
    }
    Ok(read)
}

/// A deadline that has passed reads as zero although its interrupt may not have been raised yet.
/// Written back as zero, it never would be; as a moment in the past, at worst once too often.
fn keep_timer(msrs: &mut [kvm_msr_entry]) {
    let find = |msrs: &[kvm_msr_entry], index| msrs.iter().position(|msr| msr.index == index);
    let now = find(msrs, MSR_IA32_TSC)
        .and_then(|at| msrs.get(at))
        .map(|msr| msr.data);
    let deadline = find(msrs, MSR_IA32_TSC_DEADLINE).and_then(|at| msrs.get_mut(at));
    if let (Some(now), Some(deadline)) = (now, deadline) {
        if deadline.data == 0 {
            deadline.data = now;
        }
    }
}

/// The CPUID that a saved vCPU was given.
pub(super) fn cpuid(saved: &state::Vcpu) -> Result<CpuId, StateError> {
    let wrong = "a vCPU's CPUID";
    let entries = plain::many(&saved.cpuid, wrong)?;
    if entries.len() > KVM_MAX_CPUID_ENTRIES {
        return Err(StateError::Content(wrong));
    }
    CpuId::from_entries(&entries).map_err(|_| StateError::Content(wrong))
}

/// Why a vCPU was not restored.
#[derive(Debug, thiserror::Error)]
pub(super) enum RestoreVcpuError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

/// Writes everything but CPUID and time stamp counter into a vCPU that has its CPUID.
pub(super) fn restore(
    vm: &VmFd,
    vcpu: &VcpuFd,
    saved: &state::Vcpu,
) -> Result<(), RestoreVcpuError> {
    let mp_state = kvm_mp_state {
        mp_state: saved.mp_state,
    };
    vcpu.set_mp_state(mp_state)
        .map_err(KvmError::of("KVM_SET_MP_STATE"))?;
    vcpu.set_regs(&plain::one(&saved.regs, "a vCPU's registers")?)
        .map_err(KvmError::of("KVM_SET_REGS"))?;
    vcpu.set_sregs(&plain::one(&saved.sregs, "a vCPU's special registers")?)
        .map_err(KvmError::of("KVM_SET_SREGS"))?;
    restore_xsave(vm, vcpu, &saved.xsave)?;
    vcpu.set_xcrs(&plain::one(
        &saved.xcrs,
        "a vCPU's extended control registers",
    )?)
    .map_err(KvmError::of("KVM_SET_XCRS"))?;
    vcpu.set_debug_regs(&plain::one(&saved.debugregs, "a vCPU's debug registers")?)
        .map_err(KvmError::of("KVM_SET_DEBUGREGS"))?;
    vcpu.set_lapic(&plain::one(&saved.lapic, "a vCPU's local APIC")?)
        .map_err(KvmError::of("KVM_SET_LAPIC"))?;
    restore_msrs(vcpu, &saved.msrs)?;
    vcpu.set_vcpu_events(&plain::one(&saved.events, "a vCPU's events")?)
        .map_err(KvmError::of("KVM_SET_VCPU_EVENTS"))?;
    // So that the guest's watchdogs forgive it the time. Guests without kvm-clock have no such wish.
    let _ = vcpu.kvmclock_ctrl();
    Ok(())
}

fn restore_xsave(vm: &VmFd, vcpu: &VcpuFd, saved: &[u8]) -> Result<(), RestoreVcpuError> {
    let wrong = StateError::Content("a vCPU's XSAVE area has another size than this host's");
    let extra = xsave_extra(vm);
    let mut xsave = Xsave::new(extra).map_err(|_| KvmError::too_many("KVM_SET_XSAVE"))?;
    let fixed = xsave.as_fam_struct_ref().xsave.region.len();
    if saved.len() != (fixed + extra) * size_of::<u32>() {
        return Err(wrong.into());
    }
    let mut words = plain::many::<u32>(saved, "a vCPU's XSAVE area")?.into_iter();
    // SAFETY: the length of the variable part is not changed.
    let area = unsafe { xsave.as_mut_fam_struct() };
    area.xsave
        .region
        .iter_mut()
        .zip(&mut words)
        .for_each(|(to, from)| *to = from);
    xsave
        .as_mut_slice()
        .iter_mut()
        .zip(words)
        .for_each(|(to, from)| *to = from);
    // SAFETY: the area has the size that KVM says it reads.
    unsafe { vcpu.set_xsave2(&xsave) }.map_err(KvmError::of("KVM_SET_XSAVE"))?;
    Ok(())
}

fn restore_msrs(vcpu: &VcpuFd, saved: &[u8]) -> Result<(), RestoreVcpuError> {
    let mut entries: Vec<kvm_msr_entry> = plain::many(saved, "a vCPU's MSRs")?;
    entries.retain(|msr| msr.index != MSR_IA32_TSC);
    let msrs = Msrs::from_entries(&entries).map_err(|_| KvmError::too_many("KVM_SET_MSRS"))?;
    let set = vcpu.set_msrs(&msrs).map_err(KvmError::of("KVM_SET_MSRS"))?;
    match entries.get(set) {
        Some(refused) => Err(KvmError::refused_msr(refused.index).into()),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn msrs(deadline: u64) -> Vec<kvm_msr_entry> {
        [(MSR_IA32_TSC, 1000), (MSR_IA32_TSC_DEADLINE, deadline)]
            .map(|(index, data)| kvm_msr_entry {
                index,
                data,
                ..Default::default()
            })
            .to_vec()
    }

    #[test]
    fn a_timer_that_has_just_fired_fires_again() {
        for (deadline, kept) in [(0, 1000), (5000, 5000)] {
            let mut msrs = msrs(deadline);
            keep_timer(&mut msrs);
            assert_eq!(msrs[1].data, kept);
        }
    }

    /// The default type is set before the kernel starts, see `registers`; a clone's would be "uncacheable".
    #[test]
    fn what_kvm_does_not_list_is_saved_too_and_nothing_twice() {
        let msrs = with_unlisted(&[MSR_IA32_TSC, 0x4b56_4d01, 0x2ff]);
        for index in [MSR_IA32_TSC, 0x4b56_4d01, 0x4b56_4d08, 0x200, 0x26f, 0x2ff] {
            let times = msrs.iter().filter(|msr| **msr == index).count();
            assert_eq!(times, 1, "{index:#x}");
        }
        assert_eq!(msrs.len(), 9 + 16 + 1 + 2 + 8 + 1 + 1);
        assert_eq!(with_unlisted(&[0x345]), with_unlisted(&[]));
    }
}
