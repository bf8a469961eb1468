//! The kernel's command line.

use super::place;
use crate::control::Refusal;
use crate::vmm::{
    layout::{CMDLINE, DEVICE_STEP},
    refuse::config,
};
use std::fmt::Write;
use vm_kvm_devices::Memory;

/// A virtio device as the command line announces it.
#[derive(Clone, Copy, Debug)]
pub(in crate::vmm) struct Announced {
    /// Where its registers are.
    pub(in crate::vmm) address: u64,
    /// Its interrupt line.
    pub(in crate::vmm) line: u32,
}

/// Words for every kernel, in front of the user's so that those win.
///
/// Panics reset at once (`panic=-1`), which is how the VMM learns of them; reset by the keyboard controller needs no
/// ACPI. There is no PCI to probe, one serial port, and a timer that works without a check. The processor's random
/// numbers are trusted: the hypervisor could read the guest's pool anyway.
const BASE: &str = "console=ttyS0 loglevel=4 panic=-1 reboot=k pci=off no_timer_check noreplace-smp \
    8250.nr_uarts=1 io_delay=none cryptomgr.notests random.trust_cpu=on";

/// Writes the command line; says how long it is.
///
/// # Errors
/// [`Refusal::Config`] when it is longer than the kernel takes or holds what no command line may.
pub(super) fn write(
    user: &str,
    devices: &[Announced],
    max: usize,
    memory: &Memory,
) -> Result<u32, Refusal> {
    if let Some(bad) = user.chars().find(|c| !c.is_ascii() || c.is_ascii_control()) {
        return Err(config("cmdline", format!("{bad:?} is no printable ASCII character")));
    }
    let mut line = BASE.to_owned();
    for device in devices {
        let (size, at) = (DEVICE_STEP >> 10, device.address);
        // Writing to a string cannot fail.
        let _ = write!(line, " virtio_mmio.device={size}K@{at:#x}:{}", device.line);
    }
    if !user.is_empty() {
        line.push(' ');
        line.push_str(user);
    }
    if line.len() > max {
        let own = line.len() - user.len();
        let reason = format!("{} bytes with {own} of the machine's own, {max} fit", line.len());
        return Err(config("cmdline", reason));
    }
    line.push('\0');
    place(memory, CMDLINE, line.as_bytes())?;
    Ok(u32::try_from(line.len() - 1).unwrap_or(0))
}
