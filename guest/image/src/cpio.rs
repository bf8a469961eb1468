//! The archive that Linux unpacks as its first file system: cpio in the "newc" form.
//!
//! Source: the kernel's `Documentation/driver-api/early-userspace/buffer-format.rst` and `init/initramfs.c`. Time
//! stamps are 0 and inode numbers count up, so that the same input makes the same bytes.

use std::{
    fs::File,
    io::{self, Read, Write},
};

/// The longest name that Linux unpacks, without its final zero byte (`PATH_MAX` counts that byte).
pub(crate) const MAX_NAME_BYTES: usize = 4095;

/// The largest file that the format can hold: its size has eight hexadecimal digits.
pub(crate) const MAX_FILE_BYTES: u64 = 0xffff_ffff;

/// Archives end at a multiple of this, as `cpio` writes them; Linux asks for 4 between two archives.
const END_ALIGNMENT: usize = 512;

const TRAILER: &[u8] = b"TRAILER!!!";

pub(crate) const TYPE_FILE: u32 = 0o100_000;
pub(crate) const TYPE_DIRECTORY: u32 = 0o040_000;
pub(crate) const TYPE_SYMLINK: u32 = 0o120_000;
pub(crate) const TYPE_CHARACTER_DEVICE: u32 = 0o020_000;

/// What the archive keeps of a file beside its name and content.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Metadata {
    /// Type and permissions, as in `st_mode`.
    pub(crate) mode: u32,
    pub(crate) user: u32,
    pub(crate) group: u32,
    /// Major and minor number of a device file.
    pub(crate) device: (u32, u32),
}

impl Metadata {
    /// Of something that belongs to root.
    pub(crate) fn of_root(mode: u32) -> Self {
        Self { mode, ..Self::default() }
    }
}

/// An archive being written.
#[derive(Debug)]
pub(crate) struct Archive {
    out: File,
    written: u64,
    next_inode: u32,
}

impl Archive {
    pub(crate) fn new(out: File) -> Self {
        Self { out, written: 0, next_inode: 1 }
    }

    /// Adds one entry whose content is at hand.
    ///
    /// Names and contents beyond [`MAX_NAME_BYTES`] and [`MAX_FILE_BYTES`] are refused with `InvalidInput`, because
    /// Linux would skip them without a word.
    pub(crate) fn add(
        &mut self,
        name: &[u8],
        metadata: Metadata,
        content: &[u8],
    ) -> io::Result<()> {
        let size = u32::try_from(content.len())
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        self.header(name, metadata, size)?;
        self.out.write_all(content)?;
        self.written += u64::from(size);
        self.pad(4)
    }

    /// Adds a regular file with the first `size` bytes of `content`.
    ///
    /// Fails with `UnexpectedEof` if there are fewer.
    pub(crate) fn add_file(
        &mut self,
        name: &[u8],
        metadata: Metadata,
        content: &File,
        size: u32,
    ) -> io::Result<()> {
        self.header(name, metadata, size)?;
        let copied = io::copy(&mut content.take(u64::from(size)), &mut self.out)?;
        if copied != u64::from(size) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.written += copied;
        self.pad(4)
    }

    /// Ends the archive; returns its file and length in bytes.
    pub(crate) fn finish(mut self) -> io::Result<(File, u64)> {
        self.next_inode = 0;
        self.header(TRAILER, Metadata::default(), 0)?;
        self.pad(END_ALIGNMENT)?;
        Ok((self.out, self.written))
    }

    fn header(&mut self, name: &[u8], metadata: Metadata, size: u32) -> io::Result<()> {
        if name.is_empty() || name.len() > MAX_NAME_BYTES || name.contains(&0) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let links = if metadata.mode & 0o170_000 == TYPE_DIRECTORY { 2 } else { 1 };
        let name_size = u32::try_from(name.len() + 1)
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let fields = [
            self.next_inode,
            metadata.mode,
            metadata.user,
            metadata.group,
            links,
            0,
            size,
            0,
            0,
            metadata.device.0,
            metadata.device.1,
            name_size,
            0,
        ];
        let mut bytes = Vec::with_capacity(116 + name.len());
        bytes.extend_from_slice(b"070701");
        for field in fields {
            write!(bytes, "{field:08x}")?;
        }
        bytes.extend_from_slice(name);
        bytes.push(0);
        self.out.write_all(&bytes)?;
        self.written += u64::from(name_size) + 110;
        self.next_inode = self.next_inode.wrapping_add(1);
        self.pad(4)
    }

    fn pad(&mut self, alignment: usize) -> io::Result<()> {
        let zeros = [0; END_ALIGNMENT];
        let beyond = usize::try_from(self.written % alignment as u64).unwrap_or(0);
        let missing = (alignment - beyond) % alignment;
        self.out.write_all(&zeros[..missing])?;
        self.written += missing as u64;
        Ok(())
    }
}
