//! The MP table: how the kernel learns of its CPUs without ACPI (Intel MultiProcessor
//! Specification 1.4, chapter 4).
//!
//! It lists local APICs and their two local interrupt lines and no I/O APIC: there is none, devices
//! interrupt by message. One interrupt is assigned all the same, or Linux takes the table for broken
//! and says so.

use crate::memory::{Bytes, GuestAddress, GuestRam};

/// Where the kernel looks for the floating pointer structure: the BIOS area.
const POINTER: u64 = 0xf_0000;
const TABLE: u64 = POINTER + POINTER_SIZE as u64;
const POINTER_SIZE: usize = 16;
const HEADER_SIZE: usize = 44;
const LOCAL_APIC: u32 = 0xfee0_0000;
const SPEC_1_4: u8 = 4;
/// Integrated APIC, as KVM reports it.
const APIC_VERSION: u8 = 0x14;

/// Entry types (§4.3).
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

const CPU_ENABLED: u8 = 1;
const CPU_BOOT: u8 = 2;

/// Interrupt types (§4.3.4) and the value that means every local APIC.
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;
const ALL_APICS: u8 = 0xff;

/// Writes the table for `vcpus` CPUs with the APIC ids 0, 1, 2 …
pub(super) fn write(ram: &GuestRam, vcpus: u8) -> Result<(), crate::memory::GuestMemoryError> {
    ram.write_slice(&pointer(), GuestAddress(POINTER))?;
    ram.write_slice(&table(vcpus), GuestAddress(TABLE))
}

fn pointer() -> Vec<u8> {
    let mut bytes = b"_MP_".to_vec();
    bytes.extend_from_slice(&(TABLE as u32).to_le_bytes());
    bytes.push((POINTER_SIZE / 16) as u8);
    bytes.push(SPEC_1_4);
    bytes.push(0);
    bytes.resize(POINTER_SIZE, 0);
    set_checksum(&mut bytes, 10);
    bytes
}

fn table(vcpus: u8) -> Vec<u8> {
    let mut entries = Vec::new();
    for apic_id in 0..vcpus {
        let boot = if apic_id == 0 { CPU_BOOT } else { 0 };
        entries.extend_from_slice(&[PROCESSOR, apic_id, APIC_VERSION, CPU_ENABLED | boot]);
        // CPU signature and feature flags: the kernel asks CPUID.
        entries.extend_from_slice(&[0; 16]);
    }
    entries.extend_from_slice(&[BUS, 0]);
    entries.extend_from_slice(b"ISA   ");
    entries.extend_from_slice(&[IO_INTERRUPT, INT, 0, 0, 0, 0, 0, 0]);
    for (kind, line) in [(EXT_INT, 0), (NMI, 1)] {
        entries.extend_from_slice(&[LOCAL_INTERRUPT, kind, 0, 0, 0, 0, ALL_APICS, line]);
    }

    let mut bytes = b"PCMP".to_vec();
    let length = (HEADER_SIZE + entries.len()) as u16;
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(&[SPEC_1_4, 0]);
    bytes.extend_from_slice(b"HUSK    HUSK POD    ");
    // No OEM table.
    bytes.extend_from_slice(&[0; 6]);
    bytes.extend_from_slice(&(u16::from(vcpus) + 4).to_le_bytes());
    bytes.extend_from_slice(&LOCAL_APIC.to_le_bytes());
    bytes.resize(HEADER_SIZE, 0);
    bytes.extend_from_slice(&entries);
    set_checksum(&mut bytes, 7);
    bytes
}

/// Makes the bytes' sum zero (§4.1).
fn set_checksum(bytes: &mut [u8], at: usize) {
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(byte) = bytes.get_mut(at) {
        *byte = sum.wrapping_neg();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_structures_sum_to_zero() {
        for vcpus in [1, 2, 64] {
            for bytes in [pointer(), table(vcpus)] {
                let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
                assert_eq!(sum, 0);
            }
        }
    }

    #[test]
    fn the_length_and_count_are_those_of_the_entries() {
        let table = table(64);
        assert_eq!(
            usize::from(u16::from_le_bytes([table[4], table[5]])),
            table.len()
        );
        assert_eq!(u16::from_le_bytes([table[34], table[35]]), 68);
        assert_eq!(table.len(), HEADER_SIZE + 64 * 20 + 8 + 3 * 8);
    }
}
