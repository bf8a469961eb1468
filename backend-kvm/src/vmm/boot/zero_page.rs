//! `boot_params`, what a boot loader says to Linux.

use super::{initrd::Initrd, kernel::Kernel};
use crate::control::Refusal;
use crate::vmm::{
    layout::{ACPI, ACPI_END, BASE_MEMORY_END, CMDLINE, HIGH_MEMORY, MP_TABLE, ZERO_PAGE},
    refuse::config,
};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use vm_kvm_devices::Memory;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

const RAM: u32 = 1;
const RESERVED: u32 = 2;
/// "Undefined" in the list of boot loaders.
const UNDEFINED_LOADER: u8 = 0xff;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;

/// Writes it.
///
/// # Errors
/// Never with memory of the least size; [`Refusal::Config`] otherwise.
pub(super) fn write(
    memory: &Memory,
    kernel: &Kernel,
    initrd: Option<Initrd>,
    cmdline_len: u32,
    rsdp: u64,
) -> Result<(), Refusal> {
    let low_half = |address: u64| u32::try_from(address).unwrap_or(0);
    let mut params = boot_params::default();
    if let Some(header) = kernel.header {
        params.hdr = header;
    } else {
        params.hdr.boot_flag = BOOT_FLAG;
        params.hdr.header = HEADER_MAGIC;
        params.hdr.kernel_alignment = 0x20_0000;
        params.hdr.cmdline_size = cmdline_len;
    }
    params.hdr.type_of_loader = UNDEFINED_LOADER;
    params.hdr.cmd_line_ptr = low_half(CMDLINE);
    if let Some(initrd) = initrd {
        params.hdr.ramdisk_image = low_half(initrd.start);
        params.hdr.ramdisk_size = initrd.len;
    }
    params.acpi_rsdp_addr = rsdp;
    let map = memory_map(memory);
    params.e820_table[..map.len()].copy_from_slice(&map);
    params.e820_entries = u8::try_from(map.len()).unwrap_or(0);
    memory
        .write_obj(params, GuestAddress(ZERO_PAGE))
        .map_err(|error| config("memory_mib", error.to_string()))
}

fn memory_map(memory: &Memory) -> Vec<boot_e820_entry> {
    let entry = |start: u64, end: u64, kind| boot_e820_entry {
        addr: start,
        size: end - start,
        r#type: kind,
    };
    let mut map = vec![
        entry(0, MP_TABLE, RAM),
        entry(MP_TABLE, BASE_MEMORY_END, RESERVED),
        entry(ACPI, ACPI_END, RESERVED),
    ];
    for region in memory.iter() {
        let start = region.start_addr().0.max(HIGH_MEMORY);
        map.push(entry(start, region.last_addr().raw_value() + 1, RAM));
    }
    map
}
