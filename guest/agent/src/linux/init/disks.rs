//! Disks, by their serial strings.

use super::{Failed, devices, mounts};
use rustix::{io::Errno, mount::MountFlags};
use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};
use vm_guest_protocol::boot::BootDisk;

const STAGE: &str = "disks";

/// Where block devices are listed.
const LIST: &str = "/sys/block";

/// Mounts disks, outer places before those inside them.
pub(super) fn mount_all(disks: &[BootDisk]) -> Result<(), Failed> {
    let mut disks: Vec<&BootDisk> = disks.iter().collect();
    disks.sort_by_key(|disk| Path::new(&disk.mount).components().count());
    for disk in disks {
        let device = find(STAGE, &disk.serial)?;
        let at = Path::new(&disk.mount);
        mounts::make_dir(at).map_err(Failed::at(STAGE, &disk.mount))?;
        mount(&device, at, disk.read_only).map_err(Failed::at(STAGE, &disk.serial))?;
    }
    Ok(())
}

/// Finds the device of a disk, waiting for it for some seconds.
pub(super) fn find(stage: &'static str, serial: &str) -> Result<PathBuf, Failed> {
    let mut all = Vec::new();
    let found = devices::wait_for(|| {
        all = serials(Path::new(LIST));
        let named = all.iter().find(|(_, it)| it == serial);
        named.map(|(name, _)| Path::new("/dev").join(name)).filter(|device| device.exists())
    });
    found.ok_or_else(|| {
        let seen: Vec<&str> = all.iter().map(|(_, serial)| serial.as_str()).collect();
        Failed::new(stage, format_args!("no disk `{serial}`, only [{}]", seen.join(", ")))
    })
}

/// Lists block devices that have a serial string, by name.
fn serials(list: &Path) -> Vec<(String, String)> {
    // virtio-blk has it at the first place, others at the second.
    devices::list(list, &["serial", "device/serial"])
}

/// Mounts the file system of a device.
pub(super) fn mount(device: &Path, at: &Path, read_only: bool) -> io::Result<()> {
    let kind = identify(&File::open(device)?)?;
    let flags = if read_only { MountFlags::RDONLY } else { MountFlags::empty() };
    match rustix::mount::mount(device, at, kind, flags, c"") {
        // What a journal still holds cannot be written to a device that is read-only.
        Err(Errno::ROFS | Errno::ACCESS) if read_only && kind == EXT => {
            Ok(rustix::mount::mount(device, at, kind, flags, c"noload")?)
        }
        other => Ok(other?),
    }
}

const EXT: &str = "ext4";

/// Says which of the file systems that are expected is on a device, by its magic number: s_magic of ext2 to ext4 at
/// 0x438, those of squashfs at 0 and of erofs at 0x400.
fn identify(device: &File) -> io::Result<&'static str> {
    let mut start = [0; 0x43a];
    match device.read_exact_at(&mut start, 0) {
        Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => return Err(error),
        _ => {}
    }
    if start.starts_with(b"hsqs") {
        Ok("squashfs")
    } else if start[0x400..].starts_with(&0xe0f5_e1e2_u32.to_le_bytes()) {
        Ok("erofs")
    } else if start[0x438..].starts_with(&0xef53_u16.to_le_bytes()) {
        Ok(EXT)
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidData, "no ext, squashfs or erofs file system"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fs;

    fn file_with(bytes: &[u8], at: u64, len: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        file.write_all_at(bytes, at).unwrap();
        file
    }

    #[test]
    fn file_systems_are_told_by_their_magic_numbers() {
        for (magic, at, expected) in [
            (&b"hsqs"[..], 0, "squashfs"),
            (&[0xe2, 0xe1, 0xf5, 0xe0], 0x400, "erofs"),
            (&[0x53, 0xef], 0x438, EXT),
        ] {
            assert_eq!(identify(&file_with(magic, at, 4096)).unwrap(), expected);
            assert!(identify(&file_with(magic, at + 1, 4096)).is_err());
        }
    }

    #[test]
    fn serials_come_from_either_place() {
        let list = tempfile::tempdir().unwrap();
        for (file, text) in [("vdb/serial", "root\n"), ("vda/serial", "disk-1"), ("sr0/size", "1")]
        {
            let path = list.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let nested = list.path().join("nvme0n1/device");
        fs::create_dir_all(&nested).unwrap();
        fs::write(nested.join("serial"), "fast  \n").unwrap();
        let found = serials(list.path());
        let expected = [("nvme0n1", "fast"), ("vda", "disk-1"), ("vdb", "root")];
        assert_eq!(found, expected.map(|(name, serial)| (name.to_owned(), serial.to_owned())));
    }

    proptest! {
        #[test]
        fn any_device_is_survived(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            let _ = identify(&file_with(&bytes, 0, bytes.len() as u64));
        }
    }
}
