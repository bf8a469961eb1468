//! Kernel files: what they are, and how they come into memory.

use crate::control::Refusal;
use crate::vmm::{
    layout::{CMDLINE_SIZE, HIGH_MEMORY},
    memory::FileAt,
    refuse::{config, failed},
};
use linux_loader::loader::{BzImage, Elf, KernelLoader, bootparam::setup_header};
use rustix::fs::{FileType, fstat};
use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
};
use vm_kvm_devices::Memory;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// A kernel in memory.
#[derive(Debug)]
pub(super) struct Kernel {
    /// Where it is entered, in 64-bit mode.
    pub(super) entry: u64,
    /// Where the memory ends that it needs before it manages memory itself.
    pub(super) end: u64,
    /// The highest address of a RAM disk's last byte.
    pub(super) initrd_max: u64,
    /// The most bytes of its command line, without the final zero.
    pub(super) cmdline_max: usize,
    /// A bzImage's header.
    pub(super) header: Option<setup_header>,
}

/// The most program headers; a Linux kernel has about five.
const MAX_SEGMENTS: u16 = 64;

const PT_LOAD: u32 = 1;
const EM_X86_64: u16 = 62;

/// The boot protocol from which on kernels have the fields used here (2.12).
const MIN_PROTOCOL: u16 = 0x020c;
/// `XLF_KERNEL_64`: the kernel has the 64-bit entry point, at 0x200.
const KERNEL_64: u16 = 1;
const ENTRY_64_OFFSET: u64 = 0x200;
const SETUP_HEADER_OFFSET: u64 = 0x1f1;
const BZIMAGE_MAGIC: (usize, &[u8]) = (0x202, b"HdrS");

/// Reads a kernel into memory.
///
/// # Errors
/// [`Refusal::Config`] for a file that is no kernel, or that is cut off, or memory that is too small for it.
pub(super) fn load(file: &File, memory: &Memory) -> Result<Kernel, Refusal> {
    let about = fstat(file).map_err(|error| failed("the kernel", error))?;
    if !FileType::from_raw_mode(about.st_mode).is_file() {
        return Err(unfit("it is not a regular file"));
    }
    let mut file = FileAt::new(file, u64::try_from(about.st_size).unwrap_or(0));
    let mut start = [0_u8; 0x206];
    let read = read_up_to(&mut file, 0, &mut start)?;
    if start[..read].starts_with(b"\x7fELF") {
        load_elf(&mut file, memory)
    } else if start[..read].get(BZIMAGE_MAGIC.0..) == Some(BZIMAGE_MAGIC.1) {
        load_bzimage(&mut file, memory)
    } else if read < start.len() {
        Err(unfit("it is too short to be an ELF vmlinux or a bzImage"))
    } else {
        Err(unfit("it is neither an ELF vmlinux nor a bzImage"))
    }
}

fn unfit(reason: impl Into<String>) -> Refusal {
    config("kernel", reason)
}

fn load_elf(file: &mut FileAt<'_>, memory: &Memory) -> Result<Kernel, Refusal> {
    let mut header = [0_u8; 64];
    if read_up_to(file, 0, &mut header)? < header.len() {
        return Err(unfit("its ELF header is cut off"));
    }
    if header[4] != 2 || header[5] != 1 || u16_at(&header, 18) != EM_X86_64 {
        return Err(unfit("it is an ELF file, but not a 64-bit one for x86-64"));
    }
    let entry = u64_at(&header, 24);
    let end = check_segments(file, memory, &header)?;
    // With an offset given, notes are not looked at.
    Elf::load(memory, Some(GuestAddress(0)), file, None)
        .map_err(|error| unfit(format!("it cannot be loaded: {error}")))?;
    Ok(Kernel {
        entry,
        end,
        initrd_max: u64::from(u32::MAX),
        cmdline_max: CMDLINE_SIZE - 1,
        header: None,
    })
}

/// Checks what an ELF file's program headers say, and gives the end of the last segment.
fn check_segments(
    file: &mut FileAt<'_>,
    memory: &Memory,
    header: &[u8; 64],
) -> Result<u64, Refusal> {
    let (entry, table, count) = (u64_at(header, 24), u64_at(header, 32), u16_at(header, 56));
    if u16_at(header, 54) != 56 || count == 0 || count > MAX_SEGMENTS {
        return Err(unfit("its program headers are malformed"));
    }
    let mut end = 0;
    let mut entered = false;
    for number in 0..u64::from(count) {
        let mut segment = [0_u8; 56];
        let at = table.checked_add(number * 56).ok_or_else(|| unfit("its headers overflow"))?;
        if read_up_to(file, at, &mut segment)? < segment.len() {
            return Err(unfit("its program headers are cut off"));
        }
        if u32_at(&segment, 0) != PT_LOAD || u64_at(&segment, 40) == 0 {
            continue;
        }
        let (offset, to) = (u64_at(&segment, 8), u64_at(&segment, 24));
        let (in_file, in_memory) = (u64_at(&segment, 32), u64_at(&segment, 40));
        if offset.checked_add(in_file).is_none_or(|end| end > file.len()) || in_file > in_memory {
            return Err(unfit("a segment is cut off"));
        }
        let segment_end = must_fit(memory, to, in_memory)?;
        end = end.max(segment_end);
        entered |= (to..to + in_file).contains(&entry);
    }
    if !entered {
        return Err(unfit("its entry point is in none of its segments"));
    }
    Ok(end)
}

fn load_bzimage(file: &mut FileAt<'_>, memory: &Memory) -> Result<Kernel, Refusal> {
    let mut raw = [0_u8; 0x280];
    let read = read_up_to(file, 0, &mut raw)?;
    if read < raw.len() {
        return Err(unfit("its setup header is cut off"));
    }
    let field = usize::try_from(SETUP_HEADER_OFFSET).unwrap_or(0);
    let version = u16_at(&raw, 0x206);
    if version < MIN_PROTOCOL || u16_at(&raw, 0x236) & KERNEL_64 == 0 {
        return Err(unfit(format!(
            "it is a bzImage of boot protocol {}.{:02} without a 64-bit entry point",
            version >> 8,
            version & 0xff
        )));
    }
    let setup_sectors = match raw[field] {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let body = (setup_sectors + 1) * 512;
    // In units of 16 bytes; what follows the body may be a signature.
    let body_len = u64::from(u32_at(&raw, 0x1f4)) * 16;
    if body_len == 0 || body + body_len > file.len().next_multiple_of(16) {
        return Err(unfit("it is a bzImage that is cut off"));
    }
    let to = u64_at(&raw, 0x258);
    let init_size = u64::from(u32_at(&raw, 0x260));
    let end = must_fit(memory, to, init_size.max(file.len() - body.min(file.len())))?;
    let loaded = BzImage::load(memory, Some(GuestAddress(to)), file, None)
        .map_err(|error| unfit(format!("it cannot be loaded: {error}")))?;
    let header = loaded.setup_header;
    let cmdline_size = header.map_or(0, |header| header.cmdline_size);
    Ok(Kernel {
        entry: to + ENTRY_64_OFFSET,
        end,
        initrd_max: header.map_or(0, |header| u64::from(header.initrd_addr_max)),
        cmdline_max: usize::try_from(cmdline_size).unwrap_or(0).min(CMDLINE_SIZE - 1),
        header,
    })
}

/// Checks that a range is in memory below the hole and above what every PC keeps for itself; gives its end.
fn must_fit(memory: &Memory, start: u64, len: u64) -> Result<u64, Refusal> {
    let low = memory.iter().next().map_or(0, GuestMemoryRegion::len);
    let end = start.checked_add(len).ok_or_else(|| unfit("a segment's address overflows"))?;
    if start < HIGH_MEMORY {
        return Err(unfit(format!("it wants to be at {start:#x}, below 1 MiB")));
    }
    if end > low {
        let needed = end.div_ceil(1 << 20);
        return Err(config("memory_mib", format!("the kernel alone needs {needed} MiB")));
    }
    Ok(end)
}

/// Reads until `buf` is full or the file ends; says how much it got.
fn read_up_to(file: &mut FileAt<'_>, at: u64, buf: &mut [u8]) -> Result<usize, Refusal> {
    let mut done = 0;
    file.seek(SeekFrom::Start(at)).map_err(|error| failed("the kernel", error))?;
    while done < buf.len() {
        match file.read(&mut buf[done..]) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed("the kernel", error)),
        }
    }
    Ok(done)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
