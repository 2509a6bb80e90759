//! The guest's time: it stands still from Save to Restore, and never goes backwards.
//!
//! Two clocks go on from where they were: KVM's clock for guests, and the time stamp counter. They go
//! on together, for the guest watches one by the other, and gives the counter up when they drift apart.
//! So both are read at one moment, and what the counter has run since it was set is added to the clock.
//!
//! All vCPUs get the same offset to the host's counter, set as such: a counter written as an MSR within
//! a second of its vCPU's creation is taken by KVM for the attempt to write what is there already
//! (Linux `arch/x86/kvm/x86.c`, `kvm_synchronize_tsc`), and most templates are younger than that.

use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, Msrs, kvm_clock_data, kvm_device_attr,
    kvm_msr_entry,
};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use vmm_sys_util::{errno, ioctl::ioctl_with_ref, ioctl_iow_nr};

use super::{KvmError, vcpu_state::MSR_IA32_TSC};
use crate::state;

ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

/// How far two frequencies of the counter may be apart to pass for one, in millionths: what NTP
/// corrects for in the guest, halved.
const TOLERANCE_PPM: u64 = 250;

/// How often both clocks are read. The quickest time counts: waiting between the two sets them apart.
const LOOKS: u32 = 4;
/// How often KVM's clock is set at most, and how quick is quick enough.
const ATTEMPTS: u32 = 4;
const AT_ONCE_NS: u64 = 200_000;

/// Reads both clocks of a vCPU that does not run, as of one moment.
pub(super) fn save(vm: &VmFd, vcpu: &VcpuFd) -> Result<state::Clock, KvmError> {
    let mut shortest = u64::MAX;
    let mut clock = state::Clock {
        tsc_khz: tsc_khz(vcpu),
        ..Default::default()
    };
    for _ in 0..LOOKS {
        let before = read_tsc(vcpu)?;
        let read = vm.get_clock().map_err(KvmError::of("KVM_GET_CLOCK"))?;
        let took = read_tsc(vcpu)?.saturating_sub(before);
        if took < shortest {
            shortest = took;
            clock.kvmclock_ns = read.clock;
            clock.tsc = before.saturating_add(took / 2);
        }
    }
    Ok(clock)
}

/// The frequency of the guest's counter; 0 when the host does not know.
pub(super) fn tsc_khz(vcpu: &VcpuFd) -> u32 {
    vcpu.get_tsc_khz().unwrap_or(0)
}

/// Why the frequency of a saved counter cannot be had here.
#[derive(Debug, thiserror::Error)]
pub enum FrequencyError {
    #[error(
        "the time stamp counter ran at {saved} kHz, this host's runs at {host} kHz and cannot be \
         scaled"
    )]
    Unscalable { saved: u32, host: u32 },
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

/// Gives a new vCPU a counter of the frequency that was saved.
pub(super) fn scale(vm: &VmFd, vcpu: &VcpuFd, saved: u32) -> Result<(), FrequencyError> {
    let host = tsc_khz(vcpu);
    if saved == 0 || host == 0 || is_same_frequency(saved, host) {
        return Ok(());
    }
    if !vm.check_extension(Cap::TscControl) {
        return Err(FrequencyError::Unscalable { saved, host });
    }
    Ok(vcpu
        .set_tsc_khz(saved)
        .map_err(KvmError::of("KVM_SET_TSC_KHZ"))?)
}

fn is_same_frequency(one: u32, other: u32) -> bool {
    u64::from(one.abs_diff(other)) * 1_000_000 <= u64::from(one) * TOLERANCE_PPM
}

/// Lets the counters of all vCPUs go on from where they were. Before their state is set: a timer's
/// deadline is armed by what the counter shows at that moment.
pub(super) fn restore_tsc<'v>(
    vcpus: impl Iterator<Item = &'v VcpuFd> + Clone,
    saved: &state::Clock,
) -> Result<(), KvmError> {
    let Some(first) = vcpus.clone().next() else {
        return Ok(());
    };
    // What passes between reading the counter and setting the offset passes for the guest too.
    let now = read_tsc(first)?;
    let offset = tsc_offset(first)?.wrapping_add(saved.tsc.wrapping_sub(now));
    for vcpu in vcpus {
        set_tsc_offset(vcpu, offset)?;
    }
    Ok(())
}

/// Lets KVM's clock go on from where it was, as far as the counter of `vcpu` has by now. Behind the
/// counters, which it is derived from.
pub(super) fn restore_kvmclock(
    vm: &VmFd,
    vcpu: &VcpuFd,
    saved: &state::Clock,
) -> Result<(), KvmError> {
    let khz = tsc_khz(vcpu);
    for _ in 0..ATTEMPTS {
        let now = read_tsc(vcpu)?;
        let passed = nanoseconds(now.saturating_sub(saved.tsc), khz);
        let clock = kvm_clock_data {
            clock: saved.kvmclock_ns.saturating_add(passed),
            ..Default::default()
        };
        vm.set_clock(&clock)
            .map_err(KvmError::of("KVM_SET_CLOCK"))?;
        let took = read_tsc(vcpu)?.saturating_sub(now);
        if nanoseconds(took, khz) <= AT_ONCE_NS {
            break;
        }
    }
    Ok(())
}

/// How long a counter of so many kHz takes for `ticks`; 0 when nobody knows.
fn nanoseconds(ticks: u64, khz: u32) -> u64 {
    let nanoseconds = (u128::from(ticks) * 1_000_000).checked_div(khz.into());
    nanoseconds.map_or(0, |ns| u64::try_from(ns).unwrap_or(u64::MAX))
}

fn read_tsc(vcpu: &VcpuFd) -> Result<u64, KvmError> {
    let entry = kvm_msr_entry {
        index: MSR_IA32_TSC,
        ..Default::default()
    };
    let mut msrs = Msrs::from_entries(&[entry]).map_err(|_| KvmError::too_many("KVM_GET_MSRS"))?;
    vcpu.get_msrs(&mut msrs)
        .map_err(KvmError::of("KVM_GET_MSRS"))?;
    Ok(msrs.as_slice().first().map_or(0, |msr| msr.data))
}

fn tsc_offset(vcpu: &VcpuFd) -> Result<u64, KvmError> {
    let mut offset = 0u64;
    let attribute = tsc_offset_attribute(&raw mut offset);
    // SAFETY: the attribute's address is that of a live u64, which KVM writes.
    let result = unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) };
    answered("KVM_GET_DEVICE_ATTR(KVM_VCPU_TSC_OFFSET)", result).map(|()| offset)
}

fn set_tsc_offset(vcpu: &VcpuFd, mut offset: u64) -> Result<(), KvmError> {
    let attribute = tsc_offset_attribute(&raw mut offset);
    // SAFETY: the attribute's address is that of a live u64, which KVM reads.
    let result = unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) };
    answered("KVM_SET_DEVICE_ATTR(KVM_VCPU_TSC_OFFSET)", result)
}

fn tsc_offset_attribute(value: *mut u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: value as u64,
        flags: 0,
    }
}

fn answered(call: &'static str, result: libc::c_int) -> Result<(), KvmError> {
    match result {
        0 => Ok(()),
        _ => Err(KvmError::of(call)(errno::Error::last())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_nanoseconds_by_frequency() {
        assert_eq!(nanoseconds(2_500_000, 2_500_000), 1_000_000);
        assert_eq!(nanoseconds(1, 0), 0);
        assert_eq!(nanoseconds(u64::MAX, 1), u64::MAX);
    }

    #[test]
    fn frequencies_within_tolerance_are_one() {
        assert!(is_same_frequency(2_000_000, 2_000_499));
        assert!(is_same_frequency(2_000_000, 1_999_501));
        assert!(!is_same_frequency(2_000_000, 2_000_501));
        assert!(!is_same_frequency(1, u32::MAX));
    }
}
