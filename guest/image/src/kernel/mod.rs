//! [`Kernel`]: a kernel found on the host.

mod bzimage;
mod identify;
mod krunfw;
mod search;

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::FileExt,
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use crate::{elf, sealed, unpack};

pub use search::KERNEL_VARIABLE;

/// The largest kernel, unpacked or not, in bytes.
const MAX_KERNEL_BYTES: u64 = 1 << 30;

/// How much of a kernel is searched at once.
const CHUNK_BYTES: usize = 1 << 20;

/// A kernel file that was found and identified. Clones share what was unpacked.
#[derive(Clone, Debug)]
pub struct Kernel {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    file: Arc<OwnedFd>,
    bytes: u64,
    kind: Kind,
    release: Option<String>,
    unpacked: Mutex<Option<KernelFile>>,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Elf,
    /// Where its compressed payload is.
    BzImage {
        payload: u64,
        payload_bytes: u64,
    },
    Krunfw(krunfw::Bundle),
}

/// In what form a kernel file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum KernelFormat {
    /// An ELF file, which build directories call `vmlinux`.
    Elf,
    /// A compressed kernel behind the set-up code for PC firmware, which distributions call `vmlinuz`.
    BzImage,
    /// A kernel inside the shared library libkrunfw.
    Libkrunfw,
}

/// An uncompressed kernel, as an ELF file open for reading. Its position is shared by all clones, so read at explicit
/// offsets.
#[derive(Clone, Debug)]
pub struct KernelFile {
    file: Arc<OwnedFd>,
    bytes: u64,
}

/// A place that was searched, and what was wrong there.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Searched {
    /// Where.
    pub path: PathBuf,
    /// What was wrong.
    pub problem: String,
}

/// Why there is no kernel, or no modules for it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// No kernel at any of the usual places.
    #[error("no kernel found; name one, or set {KERNEL_VARIABLE}. Searched:{}", list(.searched))]
    NotFound {
        /// Where it was looked for.
        searched: Vec<Searched>,
    },
    /// A file cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is not an x86-64 Linux kernel.
    #[error("{}: not an x86-64 Linux kernel (ELF vmlinux, bzImage or libkrunfw) but {found}", path.display())]
    NotAKernel {
        /// Which.
        path: PathBuf,
        /// What it is instead.
        found: String,
    },
    /// A kernel that lacks its end.
    #[error("{}: a truncated kernel: {needed} bytes are needed and {bytes} are there", path.display())]
    Truncated {
        /// Which.
        path: PathBuf,
        /// Its size in bytes.
        bytes: u64,
        /// What its headers call for, in bytes.
        needed: u64,
    },
    /// A bzImage whose payload cannot be unpacked.
    #[error("{}: {reason}", path.display())]
    Payload {
        /// Which.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// No directory with modules for a kernel, which does not have what it needs built in either.
    #[error(
        "no modules found for the kernel {} (release {}); name their directory, or set {}. Searched:{}",
        kernel.display(), release.as_deref().unwrap_or("unknown"), crate::modules::MODULES_VARIABLE, list(.searched)
    )]
    NoModules {
        /// The kernel file.
        kernel: PathBuf,
        /// Its release, if it tells.
        release: Option<String>,
        /// Where they were looked for.
        searched: Vec<Searched>,
    },
    /// A directory with modules that lacks some that every machine needs.
    #[error("{}: lacks the kernel modules {}", directory.display(), names.join(", "))]
    MissingModules {
        /// The directory.
        directory: PathBuf,
        /// The modules that are neither there nor built in.
        names: Vec<String>,
    },
}

impl Kernel {
    /// Finds a kernel.
    ///
    /// Takes `explicit` if given, else the file that `TWINVM_KERNEL` names if it is set; either must be a kernel. Else
    /// takes the first kernel among `/usr/local/lib/twinvm/vmlinux`, `/usr/lib/twinvm/vmlinux`, then, with the host's
    /// own release, `/boot/vmlinux-RELEASE`, `/boot/vmlinuz-RELEASE` and `/lib/modules/RELEASE/vmlinuz`, then
    /// `/boot/vmlinuz`, `/vmlinuz`, and of `/boot/vmlinuz-*` the newest release first. The file may also be a libkrunfw,
    /// which holds a kernel.
    ///
    /// # Errors
    /// That of [`open`](Self::open) for a file that was named, else [`KernelError::NotFound`] with every place searched.
    pub fn find(explicit: Option<&Path>) -> Result<Self, KernelError> {
        search::find(explicit, &[])
    }

    /// Finds a kernel as [`find`](Self::find) does, but takes that of an installed libkrunfw before one of the
    /// host's own: `libkrunfw.so.5` in `lib64`, `lib/x86_64-linux-gnu` and `lib` of `/usr/local` and `/usr`.
    ///
    /// # Errors
    /// As [`find`](Self::find).
    pub fn find_with_libkrunfw(explicit: Option<&Path>) -> Result<Self, KernelError> {
        search::find(explicit, &search::LIBKRUNFW)
    }

    /// Opens and identifies a kernel file.
    ///
    /// # Errors
    /// [`KernelError::Io`], or [`KernelError::NotAKernel`] and [`KernelError::Truncated`] for other contents.
    pub fn open(path: &Path) -> Result<Self, KernelError> {
        identify::open(path)
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// In what form it is.
    #[must_use]
    pub fn format(&self) -> KernelFormat {
        match self.inner.kind {
            Kind::Elf => KernelFormat::Elf,
            Kind::BzImage { .. } => KernelFormat::BzImage,
            Kind::Krunfw(_) => KernelFormat::Libkrunfw,
        }
    }

    /// Its release, such as `6.1.0-41-cloud-amd64`, if the file tells.
    #[must_use]
    pub fn release(&self) -> Option<&str> {
        self.inner.release.as_deref()
    }

    /// The file itself, open for reading, in the form that [`format`](Self::format) names.
    #[must_use]
    pub fn file(&self) -> KernelFile {
        KernelFile { file: self.inner.file.clone(), bytes: self.inner.bytes }
    }

    /// The kernel as an uncompressed ELF file: the file itself if it is one, else what is in it, unpacked into a sealed
    /// file in memory. That is done once and blocks for up to a few seconds; clones share it.
    ///
    /// Payloads may be compressed with gzip, xz, lzma, zstd or lz4.
    ///
    /// # Errors
    /// [`KernelError::Payload`] and [`KernelError::Io`].
    pub fn elf(&self) -> Result<KernelFile, KernelError> {
        if matches!(self.inner.kind, Kind::Elf) {
            return Ok(self.file());
        }
        let mut unpacked = self.inner.unpacked.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = &*unpacked {
            return Ok(file.clone());
        }
        let file = match self.inner.kind {
            Kind::Elf => self.file(),
            Kind::BzImage { payload, payload_bytes } => self.unpack(payload, payload_bytes)?,
            Kind::Krunfw(bundle) => self.io(self.extract(&bundle))?,
        };
        Ok(unpacked.insert(file).clone())
    }

    /// Whether a virtio driver that looks for devices in the tables of ACPI is built into the kernel, as far as its bytes
    /// tell: they hold the id that Linux's `drivers/virtio/virtio_mmio.c` matches there. It reads all of the kernel.
    ///
    /// # Errors
    /// Those of [`elf`](Self::elf).
    pub fn finds_virtio_by_acpi(&self) -> Result<bool, KernelError> {
        self.contains(&[b"LNRO0005\0"])
    }

    /// Whether it prints to a serial port, as far as its bytes tell: they name the driver of PCs' ports, 8250. It reads all
    /// of the kernel.
    ///
    /// # Errors
    /// Those of [`elf`](Self::elf).
    pub fn drives_serial_port(&self) -> Result<bool, KernelError> {
        self.contains(&[b"serial8250"])
    }

    /// Whether it can have the host's sockets in place of its own (TSI), as far as its bytes tell: they hold the word of
    /// the command line that turns it on. It reads all of the kernel.
    ///
    /// # Errors
    /// Those of [`elf`](Self::elf).
    pub fn has_tsi(&self) -> Result<bool, KernelError> {
        self.contains(&[b"tsi_hijack\0"])
    }

    /// Whether the driver of virtio's network device is built into the kernel, as far as its bytes tell: they hold the
    /// driver's name. It reads all of the kernel.
    ///
    /// # Errors
    /// Those of [`elf`](Self::elf).
    pub fn drives_virtio_net(&self) -> Result<bool, KernelError> {
        self.contains(&[b"\0virtio_net\0"])
    }

    /// Whether each of these strings of bytes is in the uncompressed kernel.
    pub(crate) fn contains(&self, strings: &[&[u8]]) -> Result<bool, KernelError> {
        let kernel = self.elf()?;
        let source = File::from(self.io(kernel.file.try_clone())?);
        let mut found = vec![false; strings.len()];
        self.io(scan(&source, kernel.bytes, 256, |chunk| {
            for (string, found) in strings.iter().zip(&mut found) {
                *found = *found || memchr::memmem::find(chunk, string).is_some();
            }
            !found.iter().all(|found| *found)
        }))?;
        Ok(found.into_iter().all(|found| found))
    }

    /// Makes an ELF file of what a libkrunfw holds.
    fn extract(&self, bundle: &krunfw::Bundle) -> io::Result<KernelFile> {
        let mut file = sealed::in_memory("twinvm-kernel")?;
        let headers = bundle.elf_headers();
        io::Write::write_all(&mut file, &headers)?;
        let source = File::from(self.inner.file.try_clone()?);
        let mut chunk = vec![0; CHUNK_BYTES];
        let mut done = 0;
        while done < bundle.bytes {
            let left = usize::try_from(bundle.bytes - done).unwrap_or(usize::MAX);
            let part = &mut chunk[..left.min(CHUNK_BYTES)];
            source.read_exact_at(part, bundle.start + done)?;
            io::Write::write_all(&mut file, part)?;
            done += part.len() as u64;
        }
        sealed::seal(&file)?;
        Ok(KernelFile { file: Arc::new(file.into()), bytes: headers.len() as u64 + bundle.bytes })
    }

    fn unpack(&self, payload: u64, payload_bytes: u64) -> Result<KernelFile, KernelError> {
        let bad = |reason: String| KernelError::Payload { path: self.inner.path.clone(), reason };
        let length = usize::try_from(payload_bytes)
            .map_err(|_| bad("the payload is too large".to_owned()))?;
        let mut packed = vec![0; length];
        let source = File::from(self.io(self.inner.file.try_clone())?);
        self.io(source.read_exact_at(&mut packed, payload))?;
        let mut file = self.io(sealed::in_memory("twinvm-kernel"))?;
        let bytes = if packed.starts_with(b"\x7fELF") {
            self.io(io::Write::write_all(&mut file, &packed))?;
            payload_bytes
        } else {
            let method = unpack::Method::of(&packed)
                .ok_or_else(|| bad("the payload is compressed in an unknown way".to_owned()))?;
            unpack::unpack(method, &packed, &mut file, MAX_KERNEL_BYTES)
                .map_err(|error| bad(format!("payload: {error}")))?
        };
        let head = self.io(read_head(&file, bytes))?;
        let header =
            elf::Header::parse(&head).map_err(|wrong| bad(format!("the payload is {wrong}")))?;
        if header.segments_end > bytes {
            return Err(bad("the payload is a truncated ELF file".to_owned()));
        }
        self.io(sealed::seal(&file))?;
        Ok(KernelFile { file: Arc::new(file.into()), bytes })
    }

    fn io<T>(&self, result: io::Result<T>) -> Result<T, KernelError> {
        result.map_err(|source| KernelError::Io { path: self.inner.path.clone(), source })
    }
}

impl KernelFile {
    /// The file's length in bytes.
    #[must_use]
    #[allow(clippy::len_without_is_empty, reason = "no kernel is empty")]
    pub fn len(&self) -> u64 {
        self.bytes
    }
}

impl AsFd for KernelFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The first bytes of a file, enough for [`elf::Header::parse`].
fn read_head(file: &File, bytes: u64) -> io::Result<Vec<u8>> {
    let length = usize::try_from(bytes).unwrap_or(usize::MAX).min(elf::HEAD_BYTES);
    let mut head = vec![0; length];
    file.read_exact_at(&mut head, 0)?;
    Ok(head)
}

/// Hands the file's bytes to `look` in chunks that overlap by `overlap`, until it answers `false`.
fn scan(
    file: &File,
    bytes: u64,
    overlap: usize,
    mut look: impl FnMut(&[u8]) -> bool,
) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut start = 0;
    while start < bytes {
        let left = usize::try_from(bytes - start).unwrap_or(usize::MAX);
        let length = left.min(CHUNK_BYTES);
        file.read_exact_at(&mut chunk[..length], start)?;
        if !look(&chunk[..length]) || length == left {
            break;
        }
        start += (length - overlap) as u64;
    }
    Ok(())
}

fn list(searched: &[Searched]) -> String {
    searched
        .iter()
        .map(|place| format!("\n  {}: {}", place.path.display(), place.problem))
        .collect()
}
