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

/// Leaves out the files of tracefs, of which stock kernels before 6.6 make thousands: a quarter of their time to the
/// first process. Kernels without such an initcall ignore it, and a guest whose own words name the parameter (`none`
/// will do) keeps its files.
const NO_TRACE_FILES: &str = "initcall_blacklist=tracer_init_tracefs";

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
    let mut line = line(user, devices);
    if line.len() > max {
        let own = line.len() - user.len();
        let reason = format!("{} bytes with {own} of the machine's own, {max} fit", line.len());
        return Err(config("cmdline", reason));
    }
    line.push('\0');
    place(memory, CMDLINE, line.as_bytes())?;
    Ok(u32::try_from(line.len() - 1).unwrap_or(0))
}

fn line(user: &str, devices: &[Announced]) -> String {
    let mut line = BASE.to_owned();
    if !user.split_whitespace().any(|word| word.starts_with("initcall_blacklist=")) {
        line.push(' ');
        line.push_str(NO_TRACE_FILES);
    }
    for device in devices {
        let (size, at) = (DEVICE_STEP >> 10, device.address);
        // Writing to a string cannot fail.
        let _ = write!(line, " virtio_mmio.device={size}K@{at:#x}:{}", device.line);
    }
    if !user.is_empty() {
        line.push(' ');
        line.push_str(user);
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::layout::{CMDLINE_SIZE, DEVICES, MAX_DEVICES};

    #[test]
    fn the_users_words_come_last_and_win() {
        let devices = [Announced { address: DEVICES, line: 5 }];
        let shown = line("quiet panic=0", &devices);
        assert!(shown.starts_with(BASE) && shown.contains(NO_TRACE_FILES));
        assert!(shown.ends_with(" virtio_mmio.device=4K@0xd0000000:5 quiet panic=0"), "{shown}");
        let shown = line("initcall_blacklist=none", &[]);
        assert_eq!(shown.matches("initcall_blacklist=").count(), 1);
    }

    #[test]
    fn the_machines_own_words_leave_room() {
        let devices = [Announced { address: DEVICES, line: 15 }; MAX_DEVICES];
        assert!(line("", &devices).len() < CMDLINE_SIZE / 2);
    }
}
