//! The model-specific registers that the guest may touch: those named here, and no other.
//!
//! Whatever KVM makes of a register, today or in a later kernel, a guest that asks for one that is not in the
//! list gets a general protection fault (KVM_X86_SET_MSR_FILTER, Linux `Documentation/virt/kvm/api.rst`), as
//! on a processor that lacks it. KVM answers that by itself: no exit to the VMM (KVM_CAP_X86_USER_SPACE_MSR stays
//! off), so there is nothing here that a guest could keep busy. The filter is for guests alone: what is
//! saved and restored ([`super::vcpu_state`]) is not asked of it. The local APIC's registers
//! (x2APIC, 0x800 to 0x8ff) pass it always.
//!
//! Numbers and names are those of the Intel SDM volume 4, AMD's APM volume 2 appendix A, and Linux
//! `Documentation/virt/kvm/x86/msr.rst`.

use std::ops::RangeInclusive;

use kvm_bindings::{KVM_CAP_PMU_CAPABILITY, KVM_PMU_CAP_DISABLE, kvm_enable_cap};
use kvm_ioctls::{MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};

use super::KvmError;

/// What the guest may read and write, as far as KVM and its CPUID go along.
///
/// Not among them, and why: performance counters and everything that samples or traces (other pods'
/// work shows in them); virtualization (0x3a, 0x480 to 0x491, 0xc0010114, 0xc0010117); frequencies, energy
/// and temperature (0x198, 0x19c, 0x1b0, 0x606 and what follows: channels between tenants, where they are
/// real); the processor's inventory number (0x4f, 0xc00102f1); KVM's asynchronous page faults and migration
/// control, which CPUID does not offer; the registers of Hyper-V and Xen.
const ALLOWED: [RangeInclusive<u32>; 41] = [
    // Time stamp counter; KVM's clock by its old numbers.
    0x10..=0x12,
    // IA32_PLATFORM_ID and IA32_BIOS_SIGN_ID: a kernel on Intel reads them unasked. KVM's are made up.
    0x17..=0x17,
    0x8b..=0x8b,
    // IA32_APIC_BASE, IA32_TSC_ADJUST.
    0x1b..=0x1b,
    0x3b..=0x3b,
    // IA32_SPEC_CTRL, IA32_PRED_CMD: mitigations.
    0x48..=0x49,
    // MSR_PLATFORM_INFO: of it KVM has only whether CPUID can be made to fault.
    0xce..=0xce,
    // IA32_UMWAIT_CONTROL.
    0xe1..=0xe1,
    // Memory types.
    0xfe..=0xfe,
    0x200..=0x20f,
    0x250..=0x250,
    0x258..=0x259,
    0x268..=0x26f,
    0x277..=0x277,
    0x2ff..=0x2ff,
    // IA32_ARCH_CAPABILITIES, IA32_FLUSH_CMD, IA32_TSX_CTRL: mitigations.
    0x10a..=0x10b,
    0x122..=0x122,
    // MSR_MISC_FEATURES_ENABLES: CPUID faulting.
    0x140..=0x140,
    // SYSENTER.
    0x174..=0x176,
    // Machine checks, of which there are those that the VMM would report: none.
    0x179..=0x17b,
    0x400..=0x47f,
    // IA32_MISC_ENABLE.
    0x1a0..=0x1a0,
    // IA32_XFD, IA32_XFD_ERR, IA32_XSS.
    0x1c4..=0x1c5,
    0xda0..=0xda0,
    // IA32_DEBUGCTL: single steps from branch to branch.
    0x1d9..=0x1d9,
    // Shadow stacks and branch tracking.
    0x6a0..=0x6a0,
    0x6a2..=0x6a2,
    0x6a4..=0x6a8,
    // IA32_TSC_DEADLINE.
    0x6e0..=0x6e0,
    // KVM's clock, steal time, end of interrupt, polling.
    0x4b56_4d00..=0x4b56_4d01,
    0x4b56_4d03..=0x4b56_4d05,
    // EFER, STAR, LSTAR, CSTAR, SFMASK.
    0xc000_0080..=0xc000_0084,
    // FS.base, GS.base, KernelGSbase, TSC_AUX.
    0xc000_0100..=0xc000_0103,
    // SYSCFG, HWCR: a kernel on AMD reads them unasked.
    0xc001_0010..=0xc001_0010,
    0xc001_0015..=0xc001_0015,
    // NB_CFG, interrupt pending, MMIO configuration base: likewise on some families; zero.
    0xc001_001f..=0xc001_001f,
    0xc001_0055..=0xc001_0055,
    0xc001_0058..=0xc001_0058,
    // VIRT_SPEC_CTRL: a mitigation.
    0xc001_011f..=0xc001_011f,
    // Known errata that the processor is free of.
    0xc001_0140..=0xc001_0141,
    // DE_CFG: LFENCE serializes.
    0xc001_1029..=0xc001_1029,
];

/// Where registers are, as AMD's and Intel's own bitmaps have it; and KVM's.
const WINDOWS: [u32; 4] = [0, 0x4b56_4d00, 0xc000_0000, 0xc001_0000];
/// Registers of each.
const WINDOW: u32 = 0x2000;

/// Restricts the guests of a new VM, which has no vCPU yet.
///
/// # Errors
/// KVM refuses: there is no running without it.
pub(super) fn restrict(vm: &VmFd) -> Result<(), KvmError> {
    let bitmaps = WINDOWS.map(|base| (base, bitmap(base)));
    let ranges = bitmaps.each_ref().map(|(base, bitmap)| MsrFilterRange {
        flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
        base: *base,
        msr_count: WINDOW,
        bitmap,
    });
    vm.set_msr_filter(MsrFilterDefaultAction::DENY, &ranges)
        .map_err(KvmError::of("KVM_X86_SET_MSR_FILTER"))
}

/// Which registers of the window that starts at `base` are allowed, a bit each.
fn bitmap(base: u32) -> [u8; (WINDOW / 8) as usize] {
    let mut bitmap = [0; (WINDOW / 8) as usize];
    for register in ALLOWED.into_iter().flatten() {
        let Some(at) = register.checked_sub(base) else {
            continue;
        };
        if let Some(byte) = bitmap.get_mut((at / 8) as usize) {
            *byte |= 1 << (at % 8);
        }
    }
    bitmap
}

/// Takes the performance counters away from a new VM, which has no vCPU yet. CPUID alone would not do: an
/// AMD processor has four counters that no leaf speaks of, and KVM has them too.
///
/// # Errors
/// KVM has counters and does not let go of them.
pub(super) fn without_counters(vm: &VmFd) -> Result<(), KvmError> {
    let can = vm.check_extension_raw(KVM_CAP_PMU_CAPABILITY.into());
    if u32::try_from(can).unwrap_or(0) & KVM_PMU_CAP_DISABLE == 0 {
        // Where KVM has none, there are none to be taken away.
        return Ok(());
    }
    let disable = kvm_enable_cap {
        cap: KVM_CAP_PMU_CAPABILITY,
        args: [KVM_PMU_CAP_DISABLE.into(), 0, 0, 0],
        ..Default::default()
    };
    vm.enable_cap(&disable)
        .map_err(KvmError::of("KVM_ENABLE_CAP(KVM_CAP_PMU_CAPABILITY)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_allowed(register: u32) -> bool {
        WINDOWS.into_iter().any(|base| {
            let bitmap = bitmap(base);
            let at = register.checked_sub(base).filter(|at| *at < WINDOW);
            at.is_some_and(|at| bitmap[(at / 8) as usize] & 1 << (at % 8) != 0)
        })
    }

    #[test]
    fn every_register_of_the_list_passes() {
        for register in ALLOWED.into_iter().flatten() {
            assert!(is_allowed(register), "{register:#x}");
        }
    }

    #[test]
    fn counters_virtualization_and_serials_do_not_pass() {
        let refused = [
            // Intel: counters and their events, global control, last branches, sampling, tracing.
            0xc1,
            0x186,
            0x309,
            0x345,
            0x38d,
            0x38f,
            0x3f1,
            0x680,
            0x1c8,
            0x1db,
            0x570,
            0x600,
            // AMD: counters, global control, sampling.
            0xc001_0000,
            0xc001_0004,
            0xc001_0200,
            0xc000_0300,
            0xc001_1030,
            // VMX, SVM.
            0x3a,
            0x480,
            0x491,
            0xc001_0114,
            0xc001_0117,
            0xc000_0104,
            // Inventory numbers, SGX keys, frequencies, energy, temperature, microcode's update.
            0x4e,
            0x4f,
            0x8c,
            0xc001_02f0,
            0xc001_02f1,
            0x198,
            0x606,
            0x611,
            0x19c,
            0xe7,
            0xe8,
            0x79,
            // Asynchronous page faults, migration control; what KVM may add; Hyper-V, Xen.
            0x4b56_4d02,
            0x4b56_4d06,
            0x4b56_4d07,
            0x4b56_4d08,
            0x4b56_4d09,
            0x4000_0000,
            0x4000_0200,
        ];
        for register in refused {
            assert!(!is_allowed(register), "{register:#x}");
        }
    }

    #[test]
    fn the_filter_fits_kvm() {
        const { assert!(WINDOW / 8 <= kvm_bindings::KVM_MSR_FILTER_MAX_BITMAP_SIZE) };
        const { assert!(WINDOWS.len() <= kvm_bindings::KVM_MSR_FILTER_MAX_RANGES as usize) };
        let windows = WINDOWS.windows(2);
        assert!({ windows }.all(|two| two[0] + WINDOW <= two[1]));
    }
}
