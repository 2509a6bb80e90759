//! The CPU that the guest sees: of what KVM supports the leaves that are named here, with the topology
//! of this machine.
//!
//! A leaf that a later KVM adds is not shown before somebody has looked at it. Within the leaves that are,
//! KVM's choice of features stands, so that a mitigation that it learns of reaches the guest; taken away is
//! what a pod has no use for: virtualization (SVM, VMX), performance counters and tracing, enclaves,
//! resource control, numbers of this one processor. Added: what KVM provides in the kernel but does not
//! list, or lists only with some hosts (TSC deadline timer, ARAT). Leaves and bits are named as in the
//! Intel SDM volume 2A "CPUID" and AMD's APM volume 3 appendix E.
//!
//! [`super::msr`] is the other half: what is not shown here cannot be read there.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// KVM's features that husk's guests are offered (Linux `Documentation/virt/kvm/x86/cpuid.rst`): clock, steal
/// time, end of interrupt, yielding and waking, flushing and sending to other vCPUs, polling.
///
/// Not asynchronous page faults, by which KVM would tell the guest of pages that are still being read in:
/// they cost a shared page and an interrupt per fault, and only pay where guests are swapped out.
const KVM_FEATURES: u32 = 1 << 0 // KVM_FEATURE_CLOCKSOURCE
    | 1 << 1 // KVM_FEATURE_NOP_IO_DELAY
    | 1 << 3 // KVM_FEATURE_CLOCKSOURCE2
    | 1 << 5 // KVM_FEATURE_STEAL_TIME
    | 1 << 6 // KVM_FEATURE_PV_EOI
    | 1 << 7 // KVM_FEATURE_PV_UNHALT
    | 1 << 9 // KVM_FEATURE_PV_TLB_FLUSH
    | 1 << 11 // KVM_FEATURE_PV_SEND_IPI
    | 1 << 12 // KVM_FEATURE_POLL_CONTROL
    | 1 << 13 // KVM_FEATURE_PV_SCHED_YIELD
    | 1 << 24; // KVM_FEATURE_CLOCKSOURCE_STABLE_BIT

/// The CPUID of vCPU `index` of `count`; its APIC id is its index.
pub(super) fn of_vcpu(supported: &CpuId, index: u8, count: u8) -> CpuId {
    let mut cpuid = supported.clone();
    cpuid.retain(is_shown);
    for entry in cpuid.as_mut_slice() {
        restrict(entry);
        topology(entry, index, count);
    }
    end_ranges(&mut cpuid);
    cpuid
}

/// The leaves that a guest is shown; of those with sub-leaves also which.
fn is_shown(entry: &kvm_cpuid_entry2) -> bool {
    match entry.function {
        // Vendor, features, caches and TLBs, power management, extended states.
        0x0..=0x2 | 0x4 | 0x6 | 0xd => true,
        // More features.
        0x7 => entry.index <= 2,
        // Topology.
        0xb | 0x1f => true,
        // AMX tiles, AVX10.
        0x1d | 0x1e => entry.index <= 1,
        0x24 => entry.index == 0,
        // KVM's signature and its features.
        0x4000_0000 | 0x4000_0001 => true,
        // Features, the model's name, caches and TLBs, invariant counter, sizes of addresses.
        0x8000_0000..=0x8000_0008 => true,
        // What is fast, caches, topology, more features.
        0x8000_001a | 0x8000_001d | 0x8000_001e | 0x8000_0021 => true,
        // Among them the processor's serial number (3), MONITOR (5), performance counters (0xa, 0x80000022),
        // resource control (0xf, 0x10, 0x80000020), SGX (0x12), tracing (0x14, 0x1c), frequencies (0x15, 0x16),
        // SVM (0x8000000a), sampling (0x8000001b), SEV (0x8000001f), topology of the host (0x80000026).
        _ => false,
    }
}

/// Tells the guest where each range of leaves ends: behind its last leaf that is shown.
fn end_ranges(cpuid: &mut CpuId) {
    for base in [0, 0x4000_0000, 0x8000_0000] {
        let range = base..=base + 0xffff;
        let functions = cpuid.as_slice().iter().map(|entry| entry.function);
        let Some(last) = functions.filter(|leaf| range.contains(leaf)).max() else {
            continue;
        };
        let mut entries = cpuid.as_mut_slice().iter_mut();
        if let Some(first) = entries.find(|entry| entry.function == base) {
            first.eax = first.eax.min(last);
        }
    }
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
    match (entry.function, entry.index) {
        (0x1, _) => {
            const DTES64: u32 = 1 << 2;
            const MONITOR: u32 = 1 << 3;
            const DS_CPL: u32 = 1 << 4;
            const VMX: u32 = 1 << 5;
            const SMX: u32 = 1 << 6;
            const PDCM: u32 = 1 << 15;
            const X2APIC: u32 = 1 << 21;
            const TSC_DEADLINE: u32 = 1 << 24;
            const HYPERVISOR: u32 = 1 << 31;
            entry.ecx &= !(DTES64 | MONITOR | DS_CPL | VMX | SMX | PDCM);
            entry.ecx |= X2APIC | TSC_DEADLINE | HYPERVISOR;
            const PSN: u32 = 1 << 18;
            const DS: u32 = 1 << 21;
            entry.edx &= !(PSN | DS);
        }
        // Thermal and power management: only that the APIC timer always runs.
        (0x6, _) => {
            const ARAT: u32 = 1 << 2;
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (ARAT, 0, 0, 0);
        }
        (0x7, 0) => {
            const SUBLEAVES: u32 = 2;
            entry.eax = entry.eax.min(SUBLEAVES);
            const SGX: u32 = 1 << 2;
            const RDT_M: u32 = 1 << 12;
            const RDT_A: u32 = 1 << 15;
            const PT: u32 = 1 << 25;
            entry.ebx &= !(SGX | RDT_M | RDT_A | PT);
            const SGX_LC: u32 = 1 << 30;
            entry.ecx &= !SGX_LC;
            const HYBRID: u32 = 1 << 15;
            const PCONFIG: u32 = 1 << 18;
            const ARCH_LBR: u32 = 1 << 19;
            entry.edx &= !(HYBRID | PCONFIG | ARCH_LBR);
        }
        (0x7, 1) => {
            const PPIN: u32 = 1 << 0;
            entry.ebx &= !PPIN;
        }
        (0x4000_0001, _) => {
            (entry.ebx, entry.ecx, entry.edx) = (0, 0, 0);
            entry.eax &= KVM_FEATURES;
        }
        (0x8000_0001, _) => {
            const SVM: u32 = 1 << 2;
            const IBS: u32 = 1 << 10;
            const SKINIT: u32 = 1 << 12;
            const LWP: u32 = 1 << 15;
            const PERFCTR_CORE: u32 = 1 << 23;
            const PERFCTR_NB: u32 = 1 << 24;
            const PERFTSC: u32 = 1 << 27;
            const PERFCTR_LLC: u32 = 1 << 28;
            const MWAITX: u32 = 1 << 29;
            const PERFCTR: u32 = PERFCTR_CORE | PERFCTR_NB | PERFTSC | PERFCTR_LLC;
            entry.ecx &= !(SVM | IBS | SKINIT | LWP | PERFCTR | MWAITX);
        }
        // Power management: only that the counter never changes its frequency.
        (0x8000_0007, _) => {
            const INVARIANT_TSC: u32 = 1 << 8;
            (entry.eax, entry.ebx, entry.ecx) = (0, 0, 0);
            entry.edx &= INVARIANT_TSC;
        }
        // RDPRU reads counters of the host's; the rest says how far it and INVLPGB go.
        (0x8000_0008, _) => {
            const INVLPGB: u32 = 1 << 3;
            const RDPRU: u32 = 1 << 4;
            const PPIN: u32 = 1 << 23;
            entry.ebx &= !(INVLPGB | RDPRU | PPIN);
            entry.edx = 0;
        }
        // Not how large a patch of its microcode is.
        (0x8000_0021, _) => {
            const MICROCODE_PATCH_SIZE: u32 = 0xffff;
            entry.ebx &= !MICROCODE_PATCH_SIZE;
        }
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

    /// More than any KVM lists today, with every bit set.
    fn supported() -> CpuId {
        let bases = [0, 0x4000_0000, 0x8000_0000, 0xc000_0000];
        let functions = bases.into_iter().flat_map(|base| base..base + 0x30);
        let leaves = functions.map(|function| (function, 0));
        let others = [
            (0x7, 1),
            (0x7, 2),
            (0x7, 3),
            (0xb, 1),
            (0xd, 1),
            (0xd, 9),
            (0x1d, 1),
        ];
        let entry = |(function, index)| kvm_cpuid_entry2 {
            function,
            index,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        };
        let leaves: Vec<_> = leaves.chain(others).map(entry).collect();
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
    fn virtualization_counters_and_serials_are_hidden() {
        let cpuid = of_vcpu(&supported(), 0, 1);
        let hidden = |function, index, register: fn(&kvm_cpuid_entry2) -> u32, bits: &[u32]| {
            let shown = register(&leaf(&cpuid, function, index));
            for bit in bits {
                assert_eq!(shown & 1 << bit, 0, "{function:#x}.{index}: bit {bit}");
            }
        };
        // MONITOR, VMX, SMX, performance counters, debug store, the serial number.
        hidden(0x1, 0, |leaf| leaf.ecx, &[2, 3, 4, 5, 6, 15]);
        hidden(0x1, 0, |leaf| leaf.edx, &[18, 21]);
        // SGX, resource control, tracing, hybrid cores, branch records, the inventory number.
        hidden(0x7, 0, |leaf| leaf.ebx, &[2, 12, 15, 25]);
        hidden(0x7, 0, |leaf| leaf.ecx, &[30]);
        hidden(0x7, 0, |leaf| leaf.edx, &[15, 18, 19]);
        hidden(0x7, 1, |leaf| leaf.ebx, &[0]);
        // SVM, IBS, SKINIT, LWP, performance counters; RDPRU and the inventory number.
        hidden(
            0x8000_0001,
            0,
            |leaf| leaf.ecx,
            &[2, 10, 12, 15, 23, 24, 27, 28, 29],
        );
        hidden(0x8000_0008, 0, |leaf| leaf.ebx, &[3, 4, 23]);
        assert_eq!(leaf(&cpuid, 0x8000_0007, 0).edx, 1 << 8);
        assert_eq!(leaf(&cpuid, 0x6, 0).eax, 4);
        assert_eq!(leaf(&cpuid, 0x4000_0001, 0).eax, KVM_FEATURES);
    }

    #[test]
    fn leaves_that_nobody_has_looked_at_are_not_shown() {
        let cpuid = of_vcpu(&supported(), 0, 1);
        let shown = |function: u32| cpuid.as_slice().iter().any(|e| e.function == function);
        let hidden = [
            0x3,
            0x5,
            0x9,
            0xa,
            0xf,
            0x10,
            0x12,
            0x14,
            0x15,
            0x16,
            0x17,
            0x19,
            0x1a,
            0x1b,
            0x1c,
            0x23,
            0x2f,
            0x4000_0002,
            0x4000_0010,
            0x8000_000a,
            0x8000_001b,
            0x8000_001c,
            0x8000_001f,
            0x8000_0020,
            0x8000_0022,
            0x8000_0026,
            0xc000_0000,
            0xc000_0001,
        ];
        for function in hidden {
            assert!(!shown(function), "{function:#x}");
        }
        assert!(
            cpuid
                .as_slice()
                .iter()
                .all(|e| (e.function, e.index) != (0x7, 3))
        );
        // And the guest is told where to stop.
        assert_eq!(leaf(&cpuid, 0, 0).eax, 0x24);
        assert_eq!(leaf(&cpuid, 0x7, 0).eax, 2);
        assert_eq!(leaf(&cpuid, 0x4000_0000, 0).eax, 0x4000_0001);
        assert_eq!(leaf(&cpuid, 0x8000_0000, 0).eax, 0x8000_0021);
    }

    /// A guest that does not know of a cure for its processor goes without.
    #[test]
    fn mitigations_are_shown_as_the_host_has_them() {
        let cpuid = of_vcpu(&supported(), 0, 1);
        let shown = |function, index, register: fn(&kvm_cpuid_entry2) -> u32, bits: &[u32]| {
            let shown = register(&leaf(&cpuid, function, index));
            for bit in bits {
                assert_ne!(shown & 1 << bit, 0, "{function:#x}.{index}: bit {bit}");
            }
        };
        // MD_CLEAR, RTM_ALWAYS_ABORT, TSX_FORCE_ABORT, IBRS, STIBP, L1D_FLUSH, ARCH_CAPABILITIES, SSBD.
        shown(0x7, 0, |leaf| leaf.edx, &[10, 11, 13, 26, 27, 28, 29, 31]);
        // PSFD, IPRED_CTRL, RRSBA_CTRL, DDPD_U, BHI_CTRL, MCDT_NO.
        shown(0x7, 2, |leaf| leaf.edx, &[0, 1, 2, 3, 4, 5]);
        // IBPB, IBRS, STIBP, always on, preferred, same mode; SSBD, VIRT_SSBD, SSB_NO; PSFD, BTC_NO, IBPB_RET.
        shown(
            0x8000_0008,
            0,
            |leaf| leaf.ebx,
            &[12, 14, 15, 16, 17, 18, 19, 24, 25, 26, 28, 29, 30],
        );
        // LFENCE, VERW_CLEAR, automatic IBRS, SBPB, IBPB_BRTYPE, SRSO_NO, SRSO_USER_KERNEL_NO; TSA_SQ_NO, TSA_L1_NO.
        shown(0x8000_0021, 0, |leaf| leaf.eax, &[2, 5, 8, 27, 28, 29, 30]);
        shown(0x8000_0021, 0, |leaf| leaf.ecx, &[1, 2]);
    }

    #[test]
    fn a_leaf_that_differs_is_named() {
        let one = of_vcpu(&supported(), 0, 1);
        assert_eq!(difference(&one, &one.clone()), None);
        let mut other = one.clone();
        let changed = other.as_mut_slice().last_mut().unwrap();
        changed.ecx ^= 1;
        let changed = (changed.function, changed.index);
        assert_eq!(difference(&one, &other), Some(changed));
        let fewer = CpuId::from_entries(&one.as_slice()[1..]).unwrap();
        assert_eq!(difference(&one, &fewer), Some((0x0, 0)));
        assert_eq!(difference(&fewer, &one), Some((0x0, 0)));
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
