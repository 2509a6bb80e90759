//! The CPU that the guest sees: what KVM supports, less what a pod has no use for, with the
//! topology of this machine.
//!
//! Taken away: virtualization (SVM, VMX) and performance counters. Added: what KVM provides in the
//! kernel but does not list, or lists only with some hosts (TSC deadline timer, ARAT). Leaves and
//! bits are named as in the Intel SDM volume 2A "CPUID" and AMD's APM volume 3 appendix E.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// Asynchronous page faults: KVM would tell the guest of pages that are still being read in. They
/// cost a shared page and an interrupt per fault, and only pay where guests are swapped out.
const KVM_ASYNC_PF: u32 = 1 << 4 | 1 << 10 | 1 << 14;

/// The CPUID of vCPU `index` of `count`; its APIC id is its index.
pub(super) fn of_vcpu(supported: &CpuId, index: u8, count: u8) -> CpuId {
    let mut cpuid = supported.clone();
    for entry in cpuid.as_mut_slice() {
        restrict(entry);
        topology(entry, index, count);
    }
    cpuid
}

/// The first leaf, as function and index, that is not the same in both; None when all are.
pub(super) fn difference(one: &CpuId, other: &CpuId) -> Option<(u32, u32)> {
    let (one, other) = (one.as_slice(), other.as_slice());
    let missing = |from: &[kvm_cpuid_entry2], of: &[kvm_cpuid_entry2]| {
        let leaf = of.iter().find(|leaf| !from.contains(leaf))?;
        Some((leaf.function, leaf.index))
    };
    // Mostly they lie in the same order too.
    match one == other {
        true => None,
        false => missing(other, one).or_else(|| missing(one, other)),
    }
}

/// Where the guest's physical addresses end, as it is told.
pub(super) fn address_space(cpuid: &CpuId) -> u64 {
    /// As much as processors without the leaf have.
    const LEAST_BITS: u32 = 36;
    let sizes = |entry: &&kvm_cpuid_entry2| entry.function == 0x8000_0008;
    let sizes = cpuid.as_slice().iter().find(sizes);
    let bits = sizes.map_or(LEAST_BITS, |entry| entry.eax & 0xff);
    1u64.checked_shl(bits).unwrap_or(u64::MAX)
}

fn restrict(entry: &mut kvm_cpuid_entry2) {
    match entry.function {
        0x1 => {
            const VMX: u32 = 1 << 5;
            const PDCM: u32 = 1 << 15;
            const X2APIC: u32 = 1 << 21;
            const TSC_DEADLINE: u32 = 1 << 24;
            const HYPERVISOR: u32 = 1 << 31;
            entry.ecx &= !(VMX | PDCM);
            entry.ecx |= X2APIC | TSC_DEADLINE | HYPERVISOR;
        }
        // Thermal and power management: only that the APIC timer always runs.
        0x6 => {
            const ARAT: u32 = 1 << 2;
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (ARAT, 0, 0, 0);
        }
        // Performance counters (Intel), SVM, performance counters (AMD).
        0xa | 0x8000_000a | 0x8000_0022 => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        0x8000_0001 => {
            const SVM: u32 = 1 << 2;
            const IBS: u32 = 1 << 10;
            const PERFCTR_CORE: u32 = 1 << 23;
            const PERFCTR_NB: u32 = 1 << 24;
            const PERFCTR_LLC: u32 = 1 << 28;
            entry.ecx &= !(SVM | IBS | PERFCTR_CORE | PERFCTR_NB | PERFCTR_LLC);
        }
        0x4000_0001 => entry.eax &= !KVM_ASYNC_PF,
        _ => {}
    }
}

/// One package of `count` cores, one thread each.
fn topology(entry: &mut kvm_cpuid_entry2, index: u8, count: u8) {
    let (id, count) = (u32::from(index), u32::from(count));
    // Bits of an APIC id that tell cores apart.
    let id_bits = count.next_power_of_two().trailing_zeros();
    match entry.function {
        0x1 => {
            const HTT: u32 = 1 << 28;
            entry.ebx = entry.ebx & 0x0000_ffff | id << 24 | count << 16;
            entry.edx = if count > 1 {
                entry.edx | HTT
            } else {
                entry.edx & !HTT
            };
        }
        // Deterministic cache parameters: the cores of the package, and private caches.
        0x4 if entry.eax & 0x1f != 0 => {
            entry.eax = entry.eax & 0x0000_3fff | (count - 1).min(0x3f) << 26;
        }
        0xb | 0x1f => {
            const SMT: u32 = 1 << 8;
            const CORE: u32 = 2 << 8;
            (entry.eax, entry.ebx, entry.ecx) = match entry.index {
                0 => (0, 1, SMT),
                1 => (id_bits, count, CORE | 1),
                other => (0, 0, other),
            };
            entry.edx = id;
        }
        0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | id_bits << 12 | (count - 1),
        // Cache properties (AMD): not shared between cores.
        0x8000_001d => entry.eax &= 0x0000_3fff,
        0x8000_001e => {
            (entry.eax, entry.ebx, entry.ecx) = (id, id & 0xff, 0);
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> CpuId {
        let entry = |function, index| kvm_cpuid_entry2 {
            function,
            index,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        };
        let leaves = [
            entry(0x1, 0),
            entry(0x6, 0),
            entry(0xa, 0),
            entry(0xb, 0),
            entry(0xb, 1),
            entry(0x8000_0001, 0),
            entry(0x8000_0008, 0),
            entry(0x8000_000a, 0),
        ];
        CpuId::from_entries(&leaves).unwrap()
    }

    fn leaf(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid
            .as_slice()
            .iter()
            .find(|e| (e.function, e.index) == (function, index))
            .unwrap()
    }

    #[test]
    fn virtualization_and_counters_are_hidden() {
        let cpuid = of_vcpu(&supported(), 0, 1);
        assert_eq!(leaf(&cpuid, 0x1, 0).ecx & 1 << 5, 0);
        assert_eq!(leaf(&cpuid, 0x8000_0001, 0).ecx & 1 << 2, 0);
        assert_eq!(leaf(&cpuid, 0xa, 0).eax, 0);
        assert_eq!(leaf(&cpuid, 0x8000_000a, 0).edx, 0);
        assert_eq!(leaf(&cpuid, 0x6, 0).eax, 4);
    }

    #[test]
    fn a_leaf_that_differs_is_named() {
        let one = of_vcpu(&supported(), 0, 1);
        assert_eq!(difference(&one, &one.clone()), None);
        let mut other = one.clone();
        other.as_mut_slice()[5].ecx ^= 1;
        assert_eq!(difference(&one, &other), Some((0x8000_0001, 0)));
        let fewer = CpuId::from_entries(&one.as_slice()[1..]).unwrap();
        assert_eq!(difference(&one, &fewer), Some((0x1, 0)));
        assert_eq!(difference(&fewer, &one), Some((0x1, 0)));
    }

    #[test]
    fn addresses_have_as_many_bits_as_the_guest_is_told() {
        let with = |eax| {
            let entry = kvm_cpuid_entry2 {
                function: 0x8000_0008,
                eax,
                ..Default::default()
            };
            address_space(&CpuId::from_entries(&[entry]).unwrap())
        };
        assert_eq!(with(0x3028), 1 << 40);
        assert_eq!(with(0xff), u64::MAX);
        assert_eq!(address_space(&CpuId::from_entries(&[]).unwrap()), 1 << 36);
    }

    #[test]
    fn every_vcpu_knows_its_place() {
        let cpuid = of_vcpu(&supported(), 2, 3);
        assert_eq!(leaf(&cpuid, 0x1, 0).ebx >> 16, 2 << 8 | 3);
        let core = leaf(&cpuid, 0xb, 1);
        assert_eq!((core.eax, core.ebx, core.edx), (2, 3, 2));
        assert_eq!(leaf(&cpuid, 0x8000_0008, 0).ecx & 0xf0ff, 2 << 12 | 2);
    }
}
