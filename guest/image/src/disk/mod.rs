//! Disk images: making new ones, telling what others hold.

mod ext4;

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, RenameFlags, linkat, openat, renameat_with},
    io::Errno,
    rand::{GetRandomFlags, getrandom},
};

use crate::modules::Need;

/// The smallest disk image that [`create_disk`] makes: 1 MiB.
pub const MIN_DISK_BYTES: u64 = 1 << 20;

/// The largest disk image that [`create_disk`] makes: 8 TiB.
pub const MAX_DISK_BYTES: u64 = 8 << 40;

/// Disks have sectors of this size.
const SECTOR: u64 = 512;

/// A file system that guests can mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum FileSystem {
    /// Ext2, ext3 or ext4, all of which Linux mounts as ext4.
    Ext,
    /// Squashfs, which is read-only.
    Squashfs,
    /// EROFS, which is read-only.
    Erofs,
}

/// Why there is no disk image.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// Something of this name exists.
    #[error("{}: exists already", path.display())]
    AlreadyExists {
        /// Which.
        path: PathBuf,
    },
    /// Disks cannot have this size.
    #[error("a disk cannot have {bytes} bytes: between 1 MiB and 8 TiB, in multiples of 512")]
    Size {
        /// What was asked for.
        bytes: u64,
    },
    /// A file cannot be written or read.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl FileSystem {
    /// What a machine needs to mount it.
    #[must_use]
    pub fn need(self) -> Need {
        match self {
            Self::Ext => Need::Ext4,
            Self::Squashfs => Need::Squashfs,
            Self::Erofs => Need::Erofs,
        }
    }

    /// Whether it can be written to.
    #[must_use]
    pub fn is_writable(self) -> bool {
        matches!(self, Self::Ext)
    }
}

/// Makes a new raw disk image of `bytes` bytes that holds an empty ext4 file system, with a journal from 8 MiB on.
///
/// The root directory belongs to root with the permissions 0755. The file is sparse: it takes up what is written to
/// it. Its name appears when it is whole, and never replaces anything. Blocks on the file system.
///
/// # Errors
/// [`DiskError`]; then nothing is left behind.
pub fn create_disk(path: &Path, bytes: u64) -> Result<(), DiskError> {
    if !(MIN_DISK_BYTES..=MAX_DISK_BYTES).contains(&bytes) || !bytes.is_multiple_of(SECTOR) {
        return Err(DiskError::Size { bytes });
    }
    let mut seed = [0; 32];
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::AlreadyExists => DiskError::AlreadyExists { path: path.to_owned() },
        _ => DiskError::Io { path: path.to_owned(), source: error },
    };
    if fs::symlink_metadata(path).is_ok() {
        return Err(DiskError::AlreadyExists { path: path.to_owned() });
    }
    getrandom(&mut seed, GetRandomFlags::empty()).map_err(|error| failed(error.into()))?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let identity = ext4::Identity { random: seed, seconds: u32::try_from(now).unwrap_or(u32::MAX) };
    let format = |file: &File| {
        file.set_len(bytes)?;
        ext4::format(file, bytes, &identity)?;
        file.sync_all()
    };
    create_whole(path, &seed, format).map_err(failed)
}

/// Tells which file system a disk image or block device holds, by its magic number; `None` if it is none that guests
/// are known to mount.
///
/// # Errors
/// [`DiskError::Io`] if it cannot be read.
pub fn identify(path: &Path) -> Result<Option<FileSystem>, DiskError> {
    let failed = |source| DiskError::Io { path: path.to_owned(), source };
    // Not to wait for a writer if it is a pipe, which cannot be read at an offset either.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file =
        File::from(openat(CWD, path, flags, Mode::empty()).map_err(|error| failed(error.into()))?);
    let holds = |at, magic: &[u8]| -> Result<bool, DiskError> {
        let mut found = vec![0; magic.len()];
        match file.read_exact_at(&mut found, at) {
            Ok(()) => Ok(found == magic),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(error) => Err(failed(error)),
        }
    };
    Ok(if holds(0, b"hsqs")? {
        Some(FileSystem::Squashfs)
    } else if holds(1024, &0xe0f5_e1e2_u32.to_le_bytes())? {
        Some(FileSystem::Erofs)
    } else if holds(1024 + 0x38, &0xef53_u16.to_le_bytes())? {
        Some(FileSystem::Ext)
    } else {
        None
    })
}

/// Makes a file that has its name only once `fill` has succeeded.
fn create_whole(
    path: &Path,
    seed: &[u8],
    fill: impl Fn(&File) -> io::Result<()>,
) -> io::Result<()> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match openat(CWD, directory, flags, Mode::from_raw_mode(0o600)) {
        Ok(file) => {
            use std::os::fd::AsRawFd;
            let file = File::from(file);
            fill(&file)?;
            let nameless = format!("/proc/self/fd/{}", file.as_raw_fd());
            linkat(CWD, nameless, CWD, path, AtFlags::SYMLINK_FOLLOW)?;
        }
        // Not all file systems have files without a name.
        Err(Errno::OPNOTSUPP | Errno::ISDIR) => {
            let mut aside = std::ffi::OsString::from(".");
            aside.push(name);
            aside.push(seed.iter().take(8).map(|byte| format!("{byte:02x}")).collect::<String>());
            let aside = directory.join(aside);
            create_aside(&aside, path, fill).inspect_err(|_| {
                let _ = fs::remove_file(&aside);
            })?;
        }
        Err(error) => return Err(error.into()),
    }
    File::open(directory)?.sync_all()
}

fn create_aside(
    aside: &Path,
    path: &Path,
    fill: impl Fn(&File) -> io::Result<()>,
) -> io::Result<()> {
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(aside)?;
    fill(&file)?;
    match renameat_with(CWD, aside, CWD, path, RenameFlags::NOREPLACE) {
        Err(Errno::INVAL | Errno::NOSYS) => {
            fs::hard_link(aside, path)?;
            fs::remove_file(aside)
        }
        result => Ok(result?),
    }
}
