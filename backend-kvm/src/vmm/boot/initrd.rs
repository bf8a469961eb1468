//! The initial RAM disk: its parts one after the other at the top of low memory.

use crate::control::Refusal;
use crate::vmm::{
    memory::FileAt,
    refuse::{config, failed},
};
use rustix::fs::{FileType, fstat};
use std::fs::File;
use vm_kvm_devices::Memory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// Where a RAM disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Initrd {
    /// Its first byte.
    pub(super) start: u64,
    /// How long it is.
    pub(super) len: u32,
}

/// Reads the parts, each at a multiple of 4, above `kernel_end` and up to `highest`.
///
/// # Errors
/// [`Refusal::Config`] where they are no files or do not fit.
pub(super) fn load(
    parts: &[File],
    memory: &Memory,
    kernel_end: u64,
    highest: u64,
) -> Result<Option<Initrd>, Refusal> {
    let mut sizes = Vec::with_capacity(parts.len());
    let mut total = 0_u64;
    for part in parts {
        let about = fstat(part).map_err(|error| failed("the initial RAM disk", error))?;
        if !FileType::from_raw_mode(about.st_mode).is_file() {
            return Err(config("initrd_parts", "a part is not a regular file"));
        }
        let size = u64::try_from(about.st_size).unwrap_or(0);
        total = total.next_multiple_of(4).saturating_add(size);
        sizes.push(size);
    }
    if total == 0 {
        return Ok(None);
    }
    let low = memory.iter().next().map_or(0, GuestMemoryRegion::len);
    let top = low.min(highest.saturating_add(1));
    let start = top.checked_sub(total).map(|start| start & !0xfff);
    let (Some(start), Ok(len)) = (start.filter(|&start| start >= kernel_end), u32::try_from(total))
    else {
        return Err(config(
            "memory_mib",
            format!(
                "kernel and initial RAM disk need {} MiB below {} MiB",
                kernel_end.saturating_add(total).div_ceil(1 << 20),
                top >> 20
            ),
        ));
    };
    let mut at = start;
    for (part, size) in parts.iter().zip(sizes) {
        at = at.next_multiple_of(4);
        let count = usize::try_from(size).unwrap_or(usize::MAX);
        memory
            .read_exact_volatile_from(GuestAddress(at), &mut FileAt::new(part, size), count)
            .map_err(|error| config("initrd_parts", format!("a part is unreadable: {error}")))?;
        at += size;
    }
    Ok(Some(Initrd { start, len }))
}
