//! Reading a container: hash first, then decode.

use super::{
    ContainerError, FORMAT, Hash, MAX_MANIFEST, MAX_SECTION_NAME, MAX_SECTIONS, Manifest,
    SectionEntry,
    hash::Hasher,
    layout::{self, HEADER_LEN, TRAILER_LEN, Trailer, corrupt},
};
use crate::{
    host_fs::{HostFileReader, HostFs},
    machine::Sections,
};
use bytes::Bytes;
use std::{collections::BTreeSet, future::poll_fn, io, path::Path, task::Poll};

/// Files up to this length are read in one go; of longer ones the ends are checked first.
const READ_AT_ONCE: u64 = 1 << 20;

/// How much is hashed before other tasks get their turn.
const HASH_STEP: usize = 8 << 20;

/// Verifies the bytes of a container. The sections share the buffer.
///
/// # Errors
/// [`ContainerError::Corrupt`], or [`ContainerError::Incompatible`] for another format.
pub fn verify_bytes(bytes: &Bytes) -> Result<(Manifest, Sections), ContainerError> {
    let (manifest, sections) = verify_frame(bytes)?;
    for (entry, (_, content)) in manifest.sections.iter().zip(&sections.0) {
        check_hash(entry, Hash::of(content))?;
    }
    Ok((manifest, sections))
}

/// Does as [`verify_bytes`] and lets other tasks run in between.
pub(super) async fn verify_in_steps(bytes: &Bytes) -> Result<(Manifest, Sections), ContainerError> {
    let (manifest, sections) = verify_frame(bytes)?;
    for (entry, (_, content)) in manifest.sections.iter().zip(&sections.0) {
        let mut hasher = Hasher::new();
        hash_in_steps(&mut hasher, content).await;
        check_hash(entry, hasher.finish())?;
    }
    Ok((manifest, sections))
}

/// Hashes `bytes` and lets other tasks run in between.
pub(super) async fn hash_in_steps(hasher: &mut Hasher, bytes: &[u8]) {
    for (index, step) in bytes.chunks(HASH_STEP).enumerate() {
        if index > 0 {
            let mut yielded = false;
            poll_fn(|context| {
                if std::mem::replace(&mut yielded, true) {
                    return Poll::Ready(());
                }
                context.waker().wake_by_ref();
                Poll::Pending
            })
            .await;
        }
        hasher.update(step);
    }
}

/// Reads a whole file, after checking that its ends are those of a container of its length.
pub(super) async fn read(fs: &dyn HostFs, path: &Path) -> Result<Bytes, ContainerError> {
    let fail = |error: io::Error| match error.kind() {
        io::ErrorKind::UnexpectedEof => corrupt("the file ends early"),
        _ => ContainerError::io(path, &error),
    };
    let file = fs.open(path).await.map_err(fail)?;
    let file: &dyn HostFileReader = &*file;
    let size = file.size().await.map_err(fail)?;
    if size > READ_AT_ONCE {
        let header = file.read_at(0, HEADER_LEN).await.map_err(fail)?;
        layout::check_header(first(&header)?)?;
        let at = size - TRAILER_LEN as u64;
        let trailer = file.read_at(at, TRAILER_LEN).await.map_err(fail)?;
        Trailer::decode(last(&trailer)?, size)?;
    }
    let length = usize::try_from(size).map_err(|_| corrupt("longer than memory"))?;
    file.read_at(0, length).await.map_err(fail)
}

/// Verifies all but the contents of the sections.
fn verify_frame(bytes: &Bytes) -> Result<(Manifest, Sections), ContainerError> {
    layout::check_header(first(bytes)?)?;
    let trailer = Trailer::decode(last(bytes)?, bytes.len() as u64)?;
    if trailer.manifest_length > MAX_MANIFEST as u64 {
        return Err(corrupt("the manifest is too long"));
    }
    let encoded = slice(bytes, trailer.manifest_offset, trailer.manifest_length)?;
    if Hash::of(&encoded) != trailer.manifest_hash {
        return Err(corrupt("the manifest's hash does not hold"));
    }
    // Its hash holds, so it is as it was written, by someone who put something else into it.
    let manifest: Manifest =
        serde_json::from_slice(&encoded).map_err(|error| ContainerError::Incompatible {
            field: "manifest".to_owned(),
            found: error.to_string(),
            wanted: format!("one of format {FORMAT}"),
        })?;
    if manifest.format != FORMAT {
        return Err(corrupt("header and manifest name different formats"));
    }
    let sections = cut(bytes, &manifest.sections, trailer.manifest_offset)?;
    Ok((manifest, sections))
}

/// Cuts the sections out, and checks that they and zeros fill the file from the header up to `end`.
fn cut(bytes: &Bytes, entries: &[SectionEntry], end: u64) -> Result<Sections, ContainerError> {
    if entries.len() > MAX_SECTIONS {
        return Err(corrupt("too many sections"));
    }
    let mut names = BTreeSet::new();
    let mut sections = Vec::with_capacity(entries.len());
    let mut position = HEADER_LEN as u64;
    for entry in entries {
        let name = &entry.name;
        if name.is_empty() || name.len() > MAX_SECTION_NAME || !names.insert(name) {
            return Err(corrupt("a section without a name of its own"));
        }
        if layout::place(position, entry.length) != Some(entry.offset) {
            return Err(ContainerError::Corrupt(format!("section `{name}` is not in its place")));
        }
        let padding = slice(bytes, position, entry.offset - position)?;
        if padding.iter().any(|byte| *byte != 0) {
            return Err(ContainerError::Corrupt(format!("padding before section `{name}`")));
        }
        sections.push((name.clone(), slice(bytes, entry.offset, entry.length)?));
        position = entry.offset + entry.length;
    }
    if position != end {
        return Err(corrupt("the sections do not end where the manifest begins"));
    }
    Ok(Sections(sections))
}

fn check_hash(entry: &SectionEntry, hash: Hash) -> Result<(), ContainerError> {
    if hash == entry.hash {
        return Ok(());
    }
    Err(ContainerError::Corrupt(format!("the hash of section `{}` does not hold", entry.name)))
}

fn slice(bytes: &Bytes, offset: u64, length: u64) -> Result<Bytes, ContainerError> {
    let range = || {
        let end = usize::try_from(offset.checked_add(length)?).ok()?;
        let start = usize::try_from(offset).ok()?;
        (end <= bytes.len()).then_some(start..end)
    };
    range().map(|range| bytes.slice(range)).ok_or_else(|| corrupt("a part lies outside the file"))
}

fn first<const N: usize>(bytes: &Bytes) -> Result<&[u8; N], ContainerError> {
    bytes.first_chunk().ok_or_else(|| corrupt("too short for a snapshot"))
}

fn last<const N: usize>(bytes: &Bytes) -> Result<&[u8; N], ContainerError> {
    bytes.last_chunk().ok_or_else(|| corrupt("too short for a snapshot"))
}
