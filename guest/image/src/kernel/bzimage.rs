//! The header of a bzImage: the kernel's `Documentation/arch/x86/boot.rst`.

use crate::elf::{u16_at, u32_at};

const SIGNATURE: usize = 0x202;
/// The first protocol whose header tells where the payload is.
const PAYLOAD_PROTOCOL: u16 = 0x208;
/// The first protocol whose header tells whether the kernel has a 64-bit entry.
const ENTRY_64_PROTOCOL: u16 = 0x20c;
const LOADED_HIGH: u8 = 1;
const ENTRY_64: u16 = 1;
const SECTOR: u64 = 512;

/// The length of a file's head that [`Header::parse`] wants: the set-up code, at most 255 sectors and one.
pub(super) const HEAD_BYTES: usize = 256 * 512;

/// What is needed of the header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// Where the compressed kernel starts in the file.
    pub(super) payload: u64,
    pub(super) payload_bytes: u64,
    pub(super) release: Option<String>,
}

impl Header {
    /// Reads the header from a file's first bytes; `None` if it is no bzImage at all, and what it is instead of a
    /// fitting one as the error.
    pub(super) fn parse(head: &[u8]) -> Option<Result<Self, &'static str>> {
        (head.get(SIGNATURE..SIGNATURE + 4)? == b"HdrS")
            .then(|| Self::fields(head).unwrap_or(Err("a truncated bzImage")))
    }

    fn fields(head: &[u8]) -> Option<Result<Self, &'static str>> {
        let protocol = u16_at(head, 0x206)?;
        if protocol < PAYLOAD_PROTOCOL {
            return Some(Err("a kernel image from before Linux 2.6.26"));
        }
        if head.get(0x211)? & LOADED_HIGH == 0 {
            return Some(Err("a zImage"));
        }
        if protocol < ENTRY_64_PROTOCOL || u16_at(head, 0x236)? & ENTRY_64 == 0 {
            return Some(Err("a 32-bit bzImage"));
        }
        // 0 means 4, for the sake of very old loaders.
        let sectors = match *head.get(0x1f1)? {
            0 => 4,
            sectors => u64::from(sectors),
        };
        let protected_mode = (sectors + 1) * SECTOR;
        let payload = protected_mode + u64::from(u32_at(head, 0x248)?);
        let payload_bytes = u64::from(u32_at(head, 0x24c)?);
        if payload_bytes == 0 {
            return Some(Err("a bzImage without a payload"));
        }
        Some(Ok(Self { payload, payload_bytes, release: release(head) }))
    }
}

/// The first word of the version that the header points to.
fn release(head: &[u8]) -> Option<String> {
    let pointer = usize::from(u16_at(head, 0x20e)?);
    if pointer == 0 {
        return None;
    }
    let text = head.get(pointer + 0x200..)?;
    super::identify::first_word(&text[..text.len().min(256)])
}
