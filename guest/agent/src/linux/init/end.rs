//! The end of the machine.

use super::console;
use rustix::{
    mount::{MountFlags, UnmountFlags},
    system::RebootCommand,
};
use std::{fs, path::Path};

/// How the machine ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Ending {
    /// It is turned off.
    #[default]
    PowerOff,
    /// It is reset.
    Restart,
}

/// Makes all disks durable and whole, and ends the machine. All processes have ended. It returns only where the kernel
/// refuses.
pub(crate) fn end_machine(ending: Ending) {
    unmount_disks();
    rustix::fs::sync();
    console::drain();
    if ending == Ending::PowerOff && can_power_off() {
        let _ = rustix::system::reboot(RebootCommand::PowerOff);
    }
    let _ = rustix::system::reboot(RebootCommand::Restart);
}

/// Says whether turning the machine off would do more than halt it.
///
/// An x86 machine is turned off by ACPI. Without a way to do it Linux halts all processors instead (reboot(2),
/// `kernel_can_power_off`), which the host would wait on for ever; a reset it sees.
fn can_power_off() -> bool {
    cfg!(not(any(target_arch = "x86_64", target_arch = "x86")))
        || Path::new("/sys/firmware/acpi").exists()
}

/// Unmounts what lies on block devices, the last mounted first; what is in use is made read-only.
fn unmount_disks() {
    let table = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    for at in disk_mounts(&table).iter().rev() {
        if rustix::mount::unmount(at.as_str(), UnmountFlags::NOFOLLOW).is_err() {
            // A file system that is read-only already says so at no cost.
            let _ = rustix::mount::mount_remount(at.as_str(), MountFlags::RDONLY, c"");
        }
    }
}

/// Lists where block devices are mounted, in order, from a table in the form of fstab(5).
fn disk_mounts(table: &str) -> Vec<String> {
    table
        .lines()
        .filter_map(|line| {
            let (device, rest) = line.split_once(' ')?;
            let (at, _) = rest.split_once(' ')?;
            device.starts_with("/dev/").then(|| unescape(at))
        })
        .collect()
}

/// Puts back what the table has as `\` and three octal digits: white space and `\` itself.
fn unescape(text: &str) -> String {
    let mut parts = text.split('\\');
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let code = part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code.filter(u8::is_ascii) {
            Some(code) => {
                plain.push(code.into());
                plain.push_str(&part[3..]);
            }
            None => {
                plain.push('\\');
                plain.push_str(part);
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn disks_are_found_among_mounts() {
        let table = "rootfs / rootfs rw 0 0\nproc /proc proc rw 0 0\n\
                     /dev/vdb /data ext4 rw,relatime 0 0\n/dev/vdc /data/a\\040b\\134 ext4 rw 0 0\n";
        assert_eq!(disk_mounts(table), ["/data", "/data/a b\\"]);
    }

    proptest! {
        #[test]
        fn what_was_escaped_is_put_back(path in "/[a-z \t\\\\\u{e9}0-7]{0,20}") {
            let mut escaped = String::new();
            for character in path.chars() {
                match character {
                    ' ' | '\t' | '\\' => escaped += &format!("\\{:03o}", u32::from(character)),
                    other => escaped.push(other),
                }
            }
            prop_assert_eq!(disk_mounts(&format!("/dev/vda {escaped} ext4 rw 0 0")), [path]);
        }

        #[test]
        fn any_table_is_survived(table in "[/dev \\\\0-9\u{e9}\n]{0,60}|\\PC{0,60}") {
            let _ = disk_mounts(&table);
        }
    }
}
