//! What a file is, told by its content.

use std::{
    fs::File,
    io,
    os::unix::fs::{FileExt, FileTypeExt},
    path::Path,
    sync::{Arc, Mutex},
};

use rustix::fs::{CWD, Mode, OFlags, openat};

use super::{Inner, Kernel, KernelError, Kind, MAX_KERNEL_BYTES, bzimage, krunfw::Bundle, scan};
use crate::{elf, unpack};

const BANNER: &[u8] = b"Linux version ";

pub(super) fn open(path: &Path) -> Result<Kernel, KernelError> {
    let failed = |source| KernelError::Io { path: path.to_owned(), source };
    let not_a_kernel =
        |found: &str| KernelError::NotAKernel { path: path.to_owned(), found: found.to_owned() };
    // Not to wait for a writer if it is a pipe.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file =
        File::from(openat(CWD, path, flags, Mode::empty()).map_err(|error| failed(error.into()))?);
    let status = file.metadata().map_err(failed)?;
    if !status.is_file() {
        let kind = status.file_type();
        return Err(not_a_kernel(match () {
            () if kind.is_dir() => "a directory",
            () if kind.is_fifo() => "a pipe",
            () => "a device or socket",
        }));
    }
    let bytes = status.len();
    if bytes > MAX_KERNEL_BYTES {
        return Err(not_a_kernel("a file of more than 1 GiB"));
    }
    let head = head(&file, bytes).map_err(failed)?;
    let truncated = |needed| KernelError::Truncated { path: path.to_owned(), bytes, needed };
    let (kind, release) = if head.starts_with(b"\x7fELF") {
        let header = elf::Header::parse(&head).map_err(|wrong| not_a_kernel(&wrong.to_string()))?;
        let bundle = match header.interpreter || !header.upper_half {
            true => {
                let program = "an ELF program that runs in user space";
                let found = Bundle::find(&file).unwrap_or(Err(program));
                Some(found.map_err(not_a_kernel)?)
            }
            false => None,
        };
        if header.segments_end > bytes {
            return Err(truncated(header.segments_end));
        }
        let kind = bundle.map_or(Kind::Elf, Kind::Krunfw);
        (kind, banner_release(&file, bytes).map_err(failed)?)
    } else {
        let header =
            bzimage::Header::parse(&head).ok_or_else(|| not_a_kernel(name_content(&head)))?;
        let header = header.map_err(not_a_kernel)?;
        let needed = header.payload + header.payload_bytes;
        if needed > bytes {
            return Err(truncated(needed));
        }
        (
            Kind::BzImage { payload: header.payload, payload_bytes: header.payload_bytes },
            header.release,
        )
    };
    let inner = Inner {
        path: path.to_owned(),
        file: Arc::new(file.into()),
        bytes,
        kind,
        release,
        unpacked: Mutex::default(),
    };
    Ok(Kernel { inner: Arc::new(inner) })
}

/// The word before the first blank or zero byte, if it can be a release.
pub(super) fn first_word(text: &[u8]) -> Option<String> {
    let end = text.iter().position(|byte| matches!(byte, 0 | b' ' | b'\n'))?;
    let word = std::str::from_utf8(&text[..end]).ok()?;
    // It becomes a part of a path.
    let fits = word.starts_with(|first: char| first.is_ascii_digit())
        && word.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/');
    fits.then(|| word.to_owned())
}

fn head(file: &File, bytes: u64) -> io::Result<Vec<u8>> {
    let length = usize::try_from(bytes).unwrap_or(usize::MAX).min(bzimage::HEAD_BYTES);
    let mut head = vec![0; length];
    file.read_exact_at(&mut head, 0)?;
    Ok(head)
}

/// The release in the line that the kernel prints first.
fn banner_release(file: &File, bytes: u64) -> io::Result<Option<String>> {
    let mut release = None;
    scan(file, bytes, 256, |chunk| {
        let mut places = memchr::memmem::find_iter(chunk, BANNER);
        release = places.find_map(|place| {
            let text = &chunk[place + BANNER.len()..];
            first_word(&text[..text.len().min(200)])
        });
        release.is_none()
    })?;
    Ok(release)
}

/// Says what a file is that is neither ELF nor bzImage.
fn name_content(head: &[u8]) -> &'static str {
    if head.is_empty() {
        return "an empty file";
    }
    if let Some(method) = unpack::Method::of(head) {
        return match method {
            unpack::Method::Gzip => "a file compressed with gzip",
            unpack::Method::Xz => "a file compressed with xz",
            unpack::Method::Zstd => "a file compressed with zstd",
            _ => "a compressed file",
        };
    }
    if head.get(0x38..0x3c) == Some(b"ARM\x64") {
        return "an ARM64 kernel image";
    }
    if head.get(0x38..0x3c) == Some(b"RSC\x05") {
        return "a RISC-V kernel image";
    }
    if head.starts_with(b"070701") || head.starts_with(b"070702") {
        return "a cpio archive, such as an initial file system";
    }
    if head.starts_with(b"MZ") {
        return "a program for UEFI or Windows";
    }
    if head.iter().all(|byte| byte.is_ascii_graphic() || byte.is_ascii_whitespace()) {
        return "text";
    }
    "something else"
}
