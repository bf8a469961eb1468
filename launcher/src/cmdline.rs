//! The words of a kernel's command line that do not depend on the VMM.

use crate::{
    control::{ConsoleDevice, Refusal},
    inside::refuse::config,
};

/// Words for every kernel but the one that names its console, in front of the user's so that those win.
///
/// Panics reset at once (`panic=-1`), which is how the VMM learns of them; reset by the keyboard controller needs no
/// ACPI. There is no PCI to probe, one serial port, and a timer that works without a check. The processor's random
/// numbers are trusted: the hypervisor could read the guest's pool anyway.
pub const BASE: &str = "loglevel=4 panic=-1 reboot=k pci=off no_timer_check noreplace-smp \
    8250.nr_uarts=1 io_delay=none cryptomgr.notests random.trust_cpu=on";

/// Leaves out the files of tracefs, of which stock kernels before 6.6 make thousands: a quarter of their time to the
/// first process. Kernels without such an initcall ignore it, and a guest whose own words name the parameter (`none`
/// will do) keeps its files.
pub const NO_TRACE_FILES: &str = "initcall_blacklist=tracer_init_tracefs";

/// Puts a command line together: words for every kernel, those that announce devices, the user's.
#[must_use]
pub fn line(
    console: ConsoleDevice,
    user: &str,
    devices: impl IntoIterator<Item = String>,
) -> String {
    let console = match console {
        ConsoleDevice::SerialPort => "ttyS0",
        ConsoleDevice::Virtio => "hvc0",
    };
    let mut line = format!("console={console} {BASE}");
    if !user.split_whitespace().any(|word| word.starts_with("initcall_blacklist=")) {
        line.push(' ');
        line.push_str(NO_TRACE_FILES);
    }
    for device in devices {
        line.push(' ');
        line.push_str(&device);
    }
    if !user.is_empty() {
        line.push(' ');
        line.push_str(user);
    }
    line
}

/// Checks the characters of the user's words, and that a whole line is no longer than `max`.
///
/// # Errors
/// [`Refusal::Config`].
pub fn check(user: &str, line: &str, max: usize) -> Result<(), Refusal> {
    if let Some(bad) = user.chars().find(|c| !c.is_ascii() || c.is_ascii_control()) {
        return Err(config("cmdline", format!("{bad:?} is no printable ASCII character")));
    }
    if line.len() > max {
        let own = line.len() - user.len();
        let reason = format!("{} bytes with {own} of the machine's own, {max} fit", line.len());
        return Err(config("cmdline", reason));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_users_words_come_last_and_win() {
        let serial = ConsoleDevice::SerialPort;
        let shown = line(serial, "quiet panic=0", ["device=1".to_owned()]);
        assert!(shown.starts_with("console=ttyS0 ") && shown.contains(NO_TRACE_FILES));
        assert!(line(ConsoleDevice::Virtio, "", []).starts_with("console=hvc0 "));
        assert!(shown.ends_with(" device=1 quiet panic=0"), "{shown}");
        let shown = line(serial, "initcall_blacklist=none", []);
        assert_eq!(shown.matches("initcall_blacklist=").count(), 1);
    }

    #[test]
    fn odd_characters_and_long_lines_are_refused() {
        for (user, max, good) in
            [("a b", 3, true), ("a b", 2, false), ("a\nb", 9, false), ("ä", 9, false)]
        {
            assert_eq!(check(user, user, max).is_ok(), good, "{user:?}");
        }
    }
}
