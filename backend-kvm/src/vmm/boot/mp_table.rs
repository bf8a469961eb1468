//! The MP table (Intel MultiProcessor Specification 1.4), for kernels without ACPI.

use super::place;
use crate::control::Refusal;
use crate::vmm::layout::{IO_APIC, LOCAL_APIC, MP_TABLE};
use vm_kvm_devices::Memory;

/// As KVM's local APIC and I/O APIC report themselves.
const APIC_VERSION: u8 = 0x14;
const IO_APIC_VERSION: u8 = 0x11;
const LINES: u8 = 24;
const FLOATING_POINTER_LEN: u64 = 16;

/// Writes the table.
///
/// # Errors
/// Never with memory of the least size; [`Refusal::Config`] otherwise.
pub(super) fn write(vcpus: u8, memory: &Memory) -> Result<(), Refusal> {
    let table = table(vcpus);
    let at = MP_TABLE + FLOATING_POINTER_LEN;
    let mut pointer = b"_MP_".to_vec();
    pointer.extend(low_half(at).to_le_bytes());
    // Length in units of 16 bytes, revision 1.4, checksum, and no default configuration.
    pointer.extend([1, 4, 0, 0, 0, 0, 0, 0]);
    pointer[10] = checksum(&pointer);
    place(memory, MP_TABLE, &pointer)?;
    place(memory, at, &table)
}

fn table(vcpus: u8) -> Vec<u8> {
    let io_apic = vcpus;
    let mut entries: Vec<u8> = Vec::new();
    let mut count = 0_u16;
    let mut add = |entry: &[u8]| {
        entries.extend(entry);
        count += 1;
    };
    for id in 0..vcpus {
        let flags = if id == 0 { 3 } else { 1 };
        let mut entry = vec![0, id, APIC_VERSION, flags, 0, 6, 0, 0];
        // Features: an FPU and an APIC.
        entry.extend(0x201_u32.to_le_bytes());
        entry.extend([0; 8]);
        add(&entry);
    }
    add(b"\x01\x00ISA   ");
    let mut entry = vec![2, io_apic, IO_APIC_VERSION, 1];
    entry.extend(IO_APIC.to_le_bytes());
    add(&entry);
    for line in 0..LINES {
        add(&[3, 0, 0, 0, 0, line, io_apic, line]);
    }
    // LINT0 is the old interrupt controller's, LINT1 is for NMIs, on every processor.
    add(&[4, 3, 0, 0, 0, 0, 0xff, 0]);
    add(&[4, 1, 0, 0, 0, 0, 0xff, 1]);

    let mut table = b"PCMP".to_vec();
    let len = u16::try_from(44 + entries.len()).unwrap_or(u16::MAX);
    table.extend(len.to_le_bytes());
    table.extend([4, 0]);
    table.extend(b"TWINVM  MICROVM     ");
    table.extend([0; 6]);
    table.extend(count.to_le_bytes());
    table.extend(LOCAL_APIC.to_le_bytes());
    table.extend([0; 4]);
    table.extend(entries);
    table[7] = checksum(&table);
    table
}

/// Gives the byte that makes the sum of all zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

fn low_half(address: u64) -> u32 {
    u32::try_from(address).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_sum_up_to_zero_and_fit() {
        for vcpus in 1..=8 {
            let table = table(vcpus);
            assert_eq!(checksum(&table), 0);
            assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
            assert!(table.len() + 16 <= 1024, "{}", table.len());
        }
    }
}
