//! Host files that a configuration names: what they must be, and how they are opened and locked.

use crate::life::host;
use rustix::fs::{FlockOperation, Mode, OFlags};
use std::{
    fmt::Display,
    fs::{self, File, OpenOptions},
    io::{self, Read},
    os::{
        fd::OwnedFd,
        unix::fs::{FileTypeExt, OpenOptionsExt},
    },
    path::Path,
    thread,
    time::{Duration, Instant},
};
use vm_core::{
    machine::MachineError,
    shared_root::{self, Entry},
};
use vm_guest_image::{FileSystem, create_disk, identify};
use vm_trait::{DiskConfig, RootSource, VmConfig};

/// How long a disk may stay locked by a machine that is just ending.
const LAST_OWNER: Duration = Duration::from_secs(1);

/// How the archives begin that Linux unpacks as an initial RAM disk.
const INITRDS: &[&[u8]] = &[
    b"070701",
    b"070702",
    &[0x1f, 0x8b],
    b"BZh",
    &[0x5d, 0, 0],
    &[0xfd, b'7', b'z', b'X', b'Z', 0],
    &[0x89, b'L', b'Z', b'O'],
    &[2, 0x21, 0x4c, 0x18],
    &[0x28, 0xb5, 0x2f, 0xfd],
];

/// Checks that the host files of a configuration exist and are what they are named as, but for the kernel.
///
/// # Errors
/// [`MachineError::Config`] with the field.
pub fn check(config: &VmConfig) -> Result<(), MachineError> {
    if let Some(path) = &config.kernel.initrd {
        check_initrd(path).map_err(|reason| flaw("kernel.initrd", path, reason))?;
    }
    let root = |path: &Path, reason: String| flaw("root.source", path, reason);
    match &config.root.source {
        RootSource::Directory(path) => {
            fs::read_dir(path).map_err(|error| root(path, error.to_string()))?;
        }
        RootSource::Image(path) => {
            root_file_system(path)?;
        }
        RootSource::Shared(path) => {
            open_shared_root(path)?;
            shared_root::check(config, entry)?;
        }
        _ => {}
    }
    if let Some(path) = &config.console_file {
        check_console_file(path).map_err(|reason| flaw("console_file", path, reason))?;
    }
    for (index, disk) in config.disks.iter().enumerate() {
        let checked = check_disk(disk);
        checked.map_err(|reason| flaw(&disk_field(index), &disk.path, reason))?;
    }
    for (index, mount) in config.mounts.iter().enumerate() {
        open_mount(index, &mount.path)?;
    }
    Ok(())
}

/// Opens a directory that the guest is to see.
///
/// # Errors
/// [`MachineError::Config`] with the field.
pub fn open_mount(index: usize, path: &Path) -> Result<OwnedFd, MachineError> {
    open_directory(&format!("mounts[{index}].path"), path)
}

/// Opens a directory that is to be the guest's root.
///
/// # Errors
/// [`MachineError::Config`] for `root.source`.
pub fn open_shared_root(path: &Path) -> Result<OwnedFd, MachineError> {
    open_directory("root.source", path)
}

fn open_directory(field: &str, path: &Path) -> Result<OwnedFd, MachineError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fail = |error: io::Error| flaw(field, path, error);
    rustix::fs::open(path, flags, Mode::empty()).map_err(|error| fail(error.into()))
}

/// Says what is at a path.
fn entry(path: &Path) -> Entry {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => Entry::Directory,
        Ok(metadata) if metadata.is_symlink() => Entry::Link,
        Ok(_) => Entry::Other,
        Err(_) => Entry::Missing,
    }
}

/// Says which file system a root image holds.
///
/// # Errors
/// [`MachineError::Config`] for `root.source`.
pub fn root_file_system(path: &Path) -> Result<FileSystem, MachineError> {
    let of_file = || -> Result<FileSystem, String> {
        open_storage(path, true).map_err(|error| error.to_string())?;
        let found = identify(path).map_err(|error| error.to_string())?;
        found.ok_or_else(|| "holds no ext, squashfs or erofs file system".to_owned())
    };
    of_file().map_err(|reason| flaw("root.source", path, reason))
}

/// Opens a root image for reading, locked against writers.
///
/// # Errors
/// [`MachineError::Config`] for `root.source`.
pub fn open_root(path: &Path) -> Result<File, MachineError> {
    open_locked(path, true).map_err(|error| storage_error("root.source", path, &error))
}

/// Opens a disk, locked against every other machine that would clash, and makes one that does not exist. It blocks.
///
/// # Errors
/// [`MachineError::Config`] with the field.
pub fn open_disk(index: usize, disk: &DiskConfig) -> Result<File, MachineError> {
    let field = disk_field(index);
    if !disk.read_only && is_missing(&disk.path) {
        let made = create_disk(&disk.path, disk.size.bytes());
        // Another machine may have been quicker.
        if let Err(error) = made
            && is_missing(&disk.path)
        {
            let path = disk.path.display().to_string();
            return Err(MachineError::HostIo { path, reason: error.to_string() });
        }
    }
    check_disk(disk).map_err(|reason| flaw(&field, &disk.path, reason))?;
    open_locked(&disk.path, disk.read_only)
        .map_err(|error| storage_error(&field, &disk.path, &error))
}

/// Opens the file that a console is appended to.
///
/// # Errors
/// [`MachineError::Config`] for `console_file`.
pub fn open_console_file(path: &Path) -> Result<File, MachineError> {
    let opened = OpenOptions::new().append(true).create(true).mode(0o600).open(path);
    opened.map_err(|error| flaw("console_file", path, error.to_string()))
}

/// Makes an empty file without a name, which goes with its last descriptor.
///
/// # Errors
/// [`MachineError::HostIo`] with the directory for temporary files.
pub fn nameless() -> Result<File, MachineError> {
    let dir = std::env::temp_dir();
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::fs::open(&dir, flags, Mode::RUSR | Mode::WUSR) {
        Ok(file) => Ok(file.into()),
        Err(error) => {
            let path = dir.display().to_string();
            Err(MachineError::HostIo { path, reason: io::Error::from(error).to_string() })
        }
    }
}

/// Opens a user's initial RAM disk.
///
/// # Errors
/// [`MachineError::Config`] for `kernel.initrd`.
pub fn open_initrd(path: &Path) -> Result<File, MachineError> {
    check_initrd(path).map_err(|reason| flaw("kernel.initrd", path, reason))?;
    File::open(path).map_err(|error| flaw("kernel.initrd", path, error.to_string()))
}

fn check_initrd(path: &Path) -> Result<(), String> {
    let text = |error: io::Error| error.to_string();
    if !fs::metadata(path).map_err(text)?.is_file() {
        return Err("not a file".to_owned());
    }
    let mut head = Vec::new();
    File::open(path).map_err(text)?.take(8).read_to_end(&mut head).map_err(text)?;
    if INITRDS.iter().any(|magic| head.starts_with(magic)) {
        return Ok(());
    }
    Err("neither a cpio archive (newc) nor a compressed one".to_owned())
}

fn check_console_file(path: &Path) -> Result<(), String> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => return Err("a directory".to_owned()),
        Ok(_) => return Ok(()),
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err("cannot be reached".to_owned());
        }
        Err(_) => {}
    }
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    match fs::metadata(parent.unwrap_or(Path::new("."))) {
        Ok(metadata) if metadata.is_dir() => Ok(()),
        Ok(_) => Err("what it would stand in is no directory".to_owned()),
        Err(error) => Err(format!("the directory it would stand in: {error}")),
    }
}

fn check_disk(disk: &DiskConfig) -> Result<(), String> {
    match open_storage(&disk.path, disk.read_only) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound && !disk.read_only => {
            let parent = disk.path.parent().filter(|parent| !parent.as_os_str().is_empty());
            let parent = fs::metadata(parent.unwrap_or(Path::new(".")));
            return match parent {
                Ok(metadata) if metadata.is_dir() => Ok(()),
                Ok(_) => Err("what it would stand in is no directory".to_owned()),
                Err(error) => Err(format!("the directory it would stand in: {error}")),
            };
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err("not there, and a read-only disk is not made".to_owned());
        }
        Err(error) => return Err(error.to_string()),
    }
    match identify(&disk.path).map_err(|error| error.to_string())? {
        Some(FileSystem::Ext) => Ok(()),
        _ => Err("holds no ext2, ext3 or ext4 file system".to_owned()),
    }
}

/// Opens a file or block device.
fn open_storage(path: &Path, read_only: bool) -> io::Result<File> {
    // Opening a pipe or terminal must not hang or have effects.
    let kind = fs::metadata(path)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(io::Error::other("neither a file nor a block device"));
    }
    OpenOptions::new().read(true).write(!read_only).open(path)
}

/// Opens a file or block device and locks it: against all others for writing, against writers for reading. The lock
/// goes with the descriptor, also into another process, and ends when the last copy is closed.
fn open_locked(path: &Path, read_only: bool) -> io::Result<File> {
    let file = open_storage(path, read_only)?;
    let how = match read_only {
        true => FlockOperation::NonBlockingLockShared,
        false => FlockOperation::NonBlockingLockExclusive,
    };
    let patience = Instant::now() + LAST_OWNER;
    loop {
        match rustix::fs::flock(&file, how) {
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < patience => {
                thread::sleep(Duration::from_millis(10));
            }
            result => {
                result?;
                return Ok(file);
            }
        }
    }
}

fn storage_error(field: &str, path: &Path, error: &io::Error) -> MachineError {
    if error.kind() == io::ErrorKind::WouldBlock {
        return flaw(field, path, "in use by another machine");
    }
    match host(error) {
        exhausted @ MachineError::Exhausted(_) => exhausted,
        _ => flaw(field, path, error),
    }
}

fn disk_field(index: usize) -> String {
    format!("disks[{index}].path")
}

fn flaw(field: &str, path: &Path, reason: impl Display) -> MachineError {
    MachineError::Config {
        field: field.to_owned(),
        reason: format!("{}: {reason}", path.display()),
    }
}

fn is_missing(path: &Path) -> bool {
    fs::symlink_metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}
