//! The fixed parts of a container: header, trailer, and where sections stand.

use super::{
    ContainerError, FORMAT,
    hash::{HASH_LEN, Hash},
};
use vm_planted_bugs::{Bug, planted};

const HEADER_MAGIC: &[u8; 16] = b"\x89twinvm snap\r\n\x1a\n";
const TRAILER_MAGIC: &[u8; 8] = b"twinvm.\n";

pub(super) const HEADER_LEN: usize = 64;
pub(super) const TRAILER_LEN: usize = 64;

/// Sections of this length or more begin at a multiple of it, so that they can be mapped.
pub(super) const PAGE: u64 = 4096;

/// Gives the header: magic, format, zeros, hash of these.
pub(super) fn header(format: u32) -> [u8; HEADER_LEN] {
    let mut bytes = [0; HEADER_LEN];
    bytes[..16].copy_from_slice(HEADER_MAGIC);
    bytes[16..20].copy_from_slice(&format.to_le_bytes());
    let hash = Hash::of(&bytes[..HEADER_LEN - HASH_LEN]);
    bytes[HEADER_LEN - HASH_LEN..].copy_from_slice(&hash.to_bytes());
    bytes
}

/// Checks a header, and that it is of the format known here.
pub(super) fn check_header(bytes: &[u8; HEADER_LEN]) -> Result<(), ContainerError> {
    if !bytes.starts_with(HEADER_MAGIC) {
        return Err(corrupt("this is not a snapshot"));
    }
    let (fields, hash) = bytes.split_at(HEADER_LEN - HASH_LEN);
    if Hash::of(fields).to_bytes() != *hash && !planted(Bug::HeaderIsNotHashed) {
        return Err(corrupt("the header's hash does not hold"));
    }
    let format = u32::from_le_bytes([fields[16], fields[17], fields[18], fields[19]]);
    if format != FORMAT {
        return Err(ContainerError::Incompatible {
            field: "format".to_owned(),
            found: format.to_string(),
            wanted: FORMAT.to_string(),
        });
    }
    if fields[20..].iter().any(|byte| *byte != 0) {
        return Err(corrupt("the header has bytes set that this format does not use"));
    }
    Ok(())
}

/// Where the manifest is, and what it must hash to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Trailer {
    pub(super) total_length: u64,
    pub(super) manifest_offset: u64,
    pub(super) manifest_length: u64,
    pub(super) manifest_hash: Hash,
}

impl Trailer {
    pub(super) fn encode(&self) -> [u8; TRAILER_LEN] {
        let mut bytes = [0; TRAILER_LEN];
        bytes[..8].copy_from_slice(TRAILER_MAGIC);
        bytes[8..16].copy_from_slice(&self.total_length.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.manifest_offset.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.manifest_length.to_le_bytes());
        bytes[32..48].copy_from_slice(&self.manifest_hash.to_bytes());
        let hash = Hash::of(&bytes[..48]);
        bytes[48..].copy_from_slice(&hash.to_bytes());
        bytes
    }

    /// Checks the hash, then decodes, then checks that the lengths add up to `total_length`.
    pub(super) fn decode(
        bytes: &[u8; TRAILER_LEN],
        total_length: u64,
    ) -> Result<Self, ContainerError> {
        let (fields, hash) = bytes.split_at(TRAILER_LEN - HASH_LEN);
        if Hash::of(fields).to_bytes() != *hash || !fields.starts_with(TRAILER_MAGIC) {
            return Err(corrupt("the trailer's hash does not hold; the file may be cut short"));
        }
        let number = |at: usize| {
            let mut le = [0; 8];
            le.copy_from_slice(&fields[at..at + 8]);
            u64::from_le_bytes(le)
        };
        let mut manifest_hash = [0; HASH_LEN];
        manifest_hash.copy_from_slice(&fields[32..48]);
        let trailer = Self {
            total_length: number(8),
            manifest_offset: number(16),
            manifest_length: number(24),
            manifest_hash: Hash::from_bytes(manifest_hash),
        };
        if trailer.total_length != total_length {
            return Err(ContainerError::Corrupt(format!(
                "{} bytes were written, {total_length} are here",
                trailer.total_length
            )));
        }
        let end = trailer.manifest_offset.checked_add(trailer.manifest_length);
        if trailer.manifest_offset < HEADER_LEN as u64
            || end != total_length.checked_sub(TRAILER_LEN as u64)
        {
            return Err(corrupt("the manifest is not where it must be"));
        }
        Ok(trailer)
    }
}

/// Gives where a section of `length` bytes stands that comes after the first `position` bytes.
pub(super) fn place(position: u64, length: u64) -> Option<u64> {
    if length < PAGE { Some(position) } else { position.checked_next_multiple_of(PAGE) }
}

/// Gives the name of the section with an image's map.
pub(super) fn map_section(image: &str) -> String {
    format!("{image}.map")
}

pub(super) fn corrupt(detail: &str) -> ContainerError {
    ContainerError::Corrupt(detail.to_owned())
}
