//! The state in which vCPUs start: the first at the kernel's 64-bit entry (Linux
//! `Documentation/arch/x86/boot.rst`, "64-bit boot protocol"), the others waiting for a SIPI as KVM
//! makes them.

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

use super::{KvmError, boot_params};

/// Selectors of the boot descriptors, see `boot_params`.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always set.
const RFLAGS_RESERVED: u64 = 1 << 1;

const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, everything write-back: the guest's memory types come from its page tables alone.
const MTRR_ENABLE_WRITE_BACK: u64 = 1 << 11 | 6;

/// Registers of the local APIC (Intel SDM volume 3, 10.4.1) and what firmware leaves in them.
const APIC_LVT_LINT0: usize = 0x350;
const APIC_LVT_LINT1: usize = 0x360;
const DELIVER_EXT_INT: u32 = 0x700;
const DELIVER_NMI: u32 = 0x400;

/// Sets the state that every vCPU starts with.
pub(super) fn prepare(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let entries = [
        (MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        (MSR_MTRR_DEF_TYPE, MTRR_ENABLE_WRITE_BACK),
    ]
    .map(|(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    });
    let msrs = Msrs::from_entries(&entries).map_err(|_| KvmError::too_many("KVM_SET_MSRS"))?;
    let set = vcpu.set_msrs(&msrs).map_err(KvmError::of("KVM_SET_MSRS"))?;
    if let Some(entry) = entries.get(set) {
        return Err(KvmError::refused_msr(entry.index));
    }

    let mut lapic = vcpu.get_lapic().map_err(KvmError::of("KVM_GET_LAPIC"))?;
    for (register, value) in [
        (APIC_LVT_LINT0, DELIVER_EXT_INT),
        (APIC_LVT_LINT1, DELIVER_NMI),
    ] {
        // Constant offsets within the 1 KiB register page.
        for (byte, target) in value
            .to_le_bytes()
            .into_iter()
            .zip(&mut lapic.regs[register..])
        {
            *target = byte as libc::c_char;
        }
    }
    vcpu.set_lapic(&lapic)
        .map_err(KvmError::of("KVM_SET_LAPIC"))
}

/// Points the first vCPU at the kernel's `entry`, with the zero page in RSI.
pub(super) fn start_at(vcpu: &VcpuFd, entry: u64) -> Result<(), KvmError> {
    let mut sregs = vcpu.get_sregs().map_err(KvmError::of("KVM_GET_SREGS"))?;
    let data = segment(DATA_SELECTOR, 0x3, 0);
    sregs.cs = segment(CODE_SELECTOR, 0xb, 1);
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    sregs.tr = kvm_segment {
        s: 0,
        db: 0,
        ..segment(TASK_SELECTOR, 0xb, 0)
    };
    sregs.gdt.base = boot_params::GDT;
    sregs.gdt.limit = 4 * 8 - 1;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.cr3 = boot_params::PML4;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
    vcpu.set_sregs(&sregs)
        .map_err(KvmError::of("KVM_SET_SREGS"))?;

    let regs = kvm_regs {
        rip: entry,
        rsi: boot_params::ZERO_PAGE,
        rflags: RFLAGS_RESERVED,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(KvmError::of("KVM_SET_REGS"))
}

/// A flat, present segment of type `kind`; `long` is 1 for 64-bit code.
fn segment(selector: u16, kind: u8, long: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: 1 - long,
        s: 1,
        l: long,
        g: 1,
        ..Default::default()
    }
}
