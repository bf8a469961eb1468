//! Directories of the host, by their virtiofs tags.

use super::{Failed, mounts};
use rustix::{io::Errno, mount::MountFlags};
use std::{
    fs,
    path::Path,
    thread,
    time::{Duration, Instant},
};
use vm_guest_protocol::boot::BootShare;

const STAGE: &str = "shares";

const KIND: &str = "virtiofs";

/// How long a device may take to appear, and how long is waited before it is tried again.
const PATIENCE: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(10);

/// Mounts host directories. No program gains rights by a file of the host, and none of its devices is the guest's.
pub(super) fn mount_all(shares: &[BootShare]) -> Result<(), Failed> {
    if shares.is_empty() {
        return Ok(());
    }
    let known = fs::read_to_string("/proc/filesystems").map_err(Failed::at(STAGE, KIND))?;
    if !is_known(&known) {
        return Err(Failed::new(
            STAGE,
            "this kernel has no virtiofs: neither built in nor as a module",
        ));
    }
    for share in shares {
        let at = Path::new(&share.mount);
        mounts::make_dir(at).map_err(Failed::at(STAGE, &share.mount))?;
        mount(share)
            .map_err(Failed::at(STAGE, format_args!("{} at {}", share.tag, share.mount)))?;
    }
    Ok(())
}

/// Says whether a list of file systems, as the kernel writes it, has virtiofs.
fn is_known(list: &str) -> bool {
    list.lines().any(|line| line.split_ascii_whitespace().next_back() == Some(KIND))
}

fn mount(share: &BootShare) -> rustix::io::Result<()> {
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV;
    if share.read_only {
        flags |= MountFlags::RDONLY;
    }
    let end = Instant::now() + PATIENCE;
    loop {
        match rustix::mount::mount(&share.tag, &share.mount, KIND, flags, c"") {
            // There is no device of that tag yet.
            Err(Errno::INVAL) if Instant::now() < end => thread::sleep(PAUSE),
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_s_list_of_file_systems_is_read() {
        assert!(is_known("nodev\tproc\n\text4\nnodev\tvirtiofs\n"));
        assert!(is_known("\tvirtiofs"));
        assert!(!is_known("nodev\tvirtiofsd\n\tfuse\n"));
        assert!(!is_known(""));
    }
}
