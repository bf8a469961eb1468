//! Directories of the host, which all come by one virtiofs device.

use super::{Failed, devices, mounts};
use rustix::{io::Errno, mount::MountFlags};
use std::{fs, path::Path};
use vm_guest_protocol::boot::{BootConfig, BootRoot, BootShare};

const STAGE: &str = "shares";

const KIND: &str = "virtiofs";

const NEITHER: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);

/// Where their device is mounted, beneath a directory that hides it. It stays mounted: some kernels forget what a directory
/// of it is once they have no use for its parent.
const PLACE: &str = "/run/twinvm-shares";

/// Mounts host directories beside the root. No program gains rights by a file of them, and none of their devices is the
/// guest's.
pub(super) fn mount_all(config: &BootConfig) -> Result<(), Failed> {
    let has_device = matches!(config.root, BootRoot::Shared { .. });
    if config.shares.is_empty() && !has_device {
        return Ok(());
    }
    if !has_device {
        mount_device(STAGE)?;
    }
    for share in &config.shares {
        mounts::make_dir(share.mount.as_ref()).map_err(Failed::at(STAGE, &share.mount))?;
        bind(share)
            .map_err(Failed::at(STAGE, format_args!("{} at {}", share.name, share.mount)))?;
    }
    let flags = NEITHER | MountFlags::RDONLY;
    rustix::mount::mount("tmpfs", PLACE, "tmpfs", flags, c"mode=0")
        .map_err(Failed::at(STAGE, PLACE))
}

/// Mounts the directory of the host that is to be the root, before all others. Programs gain rights by its files, as by
/// those of every root.
pub(super) fn mount_root(at: &str, read_only: bool) -> Result<(), Failed> {
    const STAGE: &str = "root";
    mount_device(STAGE)?;
    let mut flags = MountFlags::BIND | MountFlags::NODEV;
    flags.set(MountFlags::RDONLY, read_only);
    rustix::mount::mount_bind(Path::new(PLACE).join(BootShare::ROOT), at)
        .and_then(|()| rustix::mount::mount_remount(at, flags, c""))
        .map_err(Failed::at(STAGE, "the host's directory"))
}

fn mount_device(stage: &'static str) -> Result<(), Failed> {
    let known = fs::read_to_string("/proc/filesystems").map_err(Failed::at(stage, KIND))?;
    if !is_known(&known) {
        return Err(Failed::new(
            stage,
            "this kernel has no virtiofs: neither built in nor as a module",
        ));
    }
    mounts::make_dir(PLACE.as_ref()).map_err(Failed::at(stage, PLACE))?;
    wait_and_mount().map_err(Failed::at(stage, format_args!("{} at {PLACE}", BootShare::TAG)))
}

/// Says whether a list of file systems, as the kernel writes it, has virtiofs.
fn is_known(list: &str) -> bool {
    list.lines().any(|line| line.split_ascii_whitespace().next_back() == Some(KIND))
}

fn wait_and_mount() -> rustix::io::Result<()> {
    let mounted = devices::wait_for(|| {
        match rustix::mount::mount(BootShare::TAG, PLACE, KIND, NEITHER, c"") {
            // There is no device of that tag yet.
            Err(Errno::INVAL) => None,
            other => Some(other),
        }
    });
    mounted.unwrap_or(Err(Errno::INVAL))
}

/// Shows one directory of the device where it is to be seen.
fn bind(share: &BootShare) -> rustix::io::Result<()> {
    rustix::mount::mount_bind(Path::new(PLACE).join(&share.name), &share.mount)?;
    if share.read_only {
        let flags = MountFlags::BIND | MountFlags::RDONLY | NEITHER;
        rustix::mount::mount_remount(&share.mount, flags, c"")?;
    }
    Ok(())
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
