//! The kernel's command line.

use super::place;
use crate::control::{ConsoleDevice, Refusal};
use crate::vmm::layout::{CMDLINE, DEVICE_STEP};
use vm_kvm_devices::Memory;
use vm_launcher::cmdline;

/// A virtio device as the command line announces it.
#[derive(Clone, Copy, Debug)]
pub(in crate::vmm) struct Announced {
    /// Where its registers are.
    pub(in crate::vmm) address: u64,
    /// Its interrupt line.
    pub(in crate::vmm) line: u32,
}

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
    let mut line = line(user, devices);
    cmdline::check(user, &line, max)?;
    line.push('\0');
    place(memory, CMDLINE, line.as_bytes())?;
    Ok(u32::try_from(line.len() - 1).unwrap_or(0))
}

fn line(user: &str, devices: &[Announced]) -> String {
    let words = devices.iter().map(|device| {
        let (size, at) = (DEVICE_STEP >> 10, device.address);
        format!("virtio_mmio.device={size}K@{at:#x}:{}", device.line)
    });
    cmdline::line(ConsoleDevice::SerialPort, user, words)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::layout::{CMDLINE_SIZE, DEVICES, MAX_DEVICES};

    #[test]
    fn the_users_words_come_last_and_win() {
        let devices = [Announced { address: DEVICES, line: 5 }];
        let shown = line("quiet panic=0", &devices);
        assert!(shown.ends_with(" virtio_mmio.device=4K@0xd0000000:5 quiet panic=0"), "{shown}");
    }

    #[test]
    fn the_machines_own_words_leave_room() {
        let devices = [Announced { address: DEVICES, line: 15 }; MAX_DEVICES];
        assert!(line("", &devices).len() < CMDLINE_SIZE / 2);
    }
}
