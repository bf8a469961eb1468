//! What a kernel finds in memory when it starts: itself, its RAM disk, its command line and tables of the machine.
//!
//! Kernels start by Linux's 64-bit boot protocol (Documentation/arch/x86/boot.rst).

mod acpi;
mod cmdline;
mod initrd;
mod kernel;
mod mp_table;
mod zero_page;

use super::refuse::config;
use crate::control::Refusal;
use std::fs::File;
use vm_kvm_devices::Memory;
use vm_memory::{Bytes, GuestAddress};

pub(super) use acpi::{PM1_CONTROL, PM1_EVENT, SLEEP_ENABLE};
pub(super) use cmdline::Announced;

/// What is booted.
#[derive(Debug)]
pub(super) struct BootSource<'a> {
    /// An ELF vmlinux or a bzImage.
    pub(super) kernel: &'a File,
    /// The parts of the initial RAM disk, in order.
    pub(super) initrd: &'a [File],
    /// The user's words for the command line.
    pub(super) cmdline: &'a str,
    /// Whether the command line names the virtio devices.
    pub(super) devices_in_cmdline: bool,
    /// The virtio devices.
    pub(super) devices: &'a [Announced],
    /// How many vCPUs there are.
    pub(super) vcpus: u8,
}

/// Puts everything into memory and says where the first vCPU begins.
///
/// # Errors
/// [`Refusal::Config`] naming what cannot be booted and why.
pub(super) fn prepare(memory: &Memory, source: &BootSource<'_>) -> Result<u64, Refusal> {
    let kernel = kernel::load(source.kernel, memory)?;
    let initrd = initrd::load(source.initrd, memory, kernel.end, kernel.initrd_max)?;
    let in_cmdline = if source.devices_in_cmdline { source.devices } else { &[] };
    let words = cmdline::write(source.cmdline, in_cmdline, kernel.cmdline_max, memory)?;
    mp_table::write(source.vcpus, memory)?;
    let rsdp = acpi::write(source.vcpus, source.devices, memory)?;
    zero_page::write(memory, &kernel, initrd, words, rsdp)?;
    Ok(kernel.entry)
}

/// Writes a table of ours into memory.
fn place(memory: &Memory, at: u64, bytes: &[u8]) -> Result<(), Refusal> {
    memory
        .write_slice(bytes, GuestAddress(at))
        .map_err(|error| config("memory_mib", format!("a table at {at:#x} does not fit: {error}")))
}
