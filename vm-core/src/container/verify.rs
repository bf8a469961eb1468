//! Reading a container: hash first, then decode.

use super::{
    ContainerError, FORMAT, Hash, MAX_MANIFEST, MAX_SECTION_NAME, MAX_SECTIONS, Manifest,
    SectionEntry,
    hash::Hasher,
    layout::{self, HEADER_LEN, PAGE, TRAILER_LEN, Trailer, corrupt, map_section},
};
use crate::{
    host_fs::{HostFileReader, HostFs},
    image::{Image, ImageMap, Layer},
    machine::Sections,
};
use bytes::Bytes;
use std::{
    collections::BTreeSet,
    future::poll_fn,
    io,
    path::Path,
    pin::pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};
use vm_planted_bugs::{Bug, planted};

/// Files up to this length are read in one go; of longer ones only what is to be decoded.
const READ_AT_ONCE: u64 = 1 << 20;

/// How much is hashed before other tasks get their turn.
const HASH_STEP: usize = 8 << 20;

/// A container of which all is verified but the content of its images.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) manifest: Manifest,
    pub(super) seal: Hash,
    pub(super) plain: Vec<(String, Bytes)>,
    pub(super) images: Vec<(String, ImageMap, Arc<Layer>)>,
}

impl Opened {
    /// Gives what it holds without a base.
    pub(super) fn alone(self) -> (Manifest, Sections) {
        let images = self.images.into_iter();
        let images = images.map(|(name, map, layer)| (name, Image::new(&map, layer))).collect();
        (self.manifest, Sections { plain: self.plain, images })
    }
}

/// Verifies all the bytes of a container without a base. The sections share the buffer.
///
/// # Errors
/// [`ContainerError::Corrupt`]; [`ContainerError::Incompatible`] for another format, and for one with a base.
pub fn verify_bytes(bytes: &Bytes) -> Result<(Manifest, Sections), ContainerError> {
    let mut verifying = pin!(verify_in_steps(bytes));
    // Bytes in memory are there at once; the only pauses are for other tasks.
    let mut context = Context::from_waker(Waker::noop());
    loop {
        if let Poll::Ready(verified) = verifying.as_mut().poll(&mut context) {
            return verified;
        }
    }
}

/// Does as [`verify_bytes`] and lets other tasks run in between.
pub(super) async fn verify_in_steps(bytes: &Bytes) -> Result<(Manifest, Sections), ContainerError> {
    let opened = parse(Arc::new(bytes.clone()), Path::new("these bytes")).await?;
    if let Some(base) = &opened.manifest.base {
        return Err(ContainerError::Incompatible {
            field: "base".to_owned(),
            found: base.id.to_string(),
            wanted: "none: a snapshot that is whole by itself".to_owned(),
        });
    }
    for (_, _, layer) in &opened.images {
        layer.verify().await?;
    }
    Ok(opened.alone())
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

/// Opens a file and verifies all but the content of its images.
pub(super) async fn open_file(fs: &dyn HostFs, path: &Path) -> Result<Opened, ContainerError> {
    let fail = |error: io::Error| ContainerError::io(path, &error);
    let file: Arc<dyn HostFileReader> = fs.open(path).await.map_err(fail)?.into();
    let size = file.size().await.map_err(fail)?;
    if size > READ_AT_ONCE || file.file().is_some() {
        return parse(file, path).await;
    }
    parse(Arc::new(read(&*file, path, 0, size).await?), path).await
}

/// Reads a whole file, after checking that its ends are those of a container of its length.
pub(super) async fn read_file(fs: &dyn HostFs, path: &Path) -> Result<Bytes, ContainerError> {
    let fail = |error: io::Error| ContainerError::io(path, &error);
    let file = fs.open(path).await.map_err(fail)?;
    let size = file.size().await.map_err(fail)?;
    if size > READ_AT_ONCE {
        read_ends(&*file, path, size).await?;
    }
    read(&*file, path, 0, size).await
}

/// Reads the seal of a container whose ends are whole.
pub(super) async fn read_seal(fs: &dyn HostFs, path: &Path) -> Result<Hash, ContainerError> {
    let fail = |error: io::Error| ContainerError::io(path, &error);
    let file = fs.open(path).await.map_err(fail)?;
    let size = file.size().await.map_err(fail)?;
    Ok(read_ends(&*file, path, size).await?.manifest_hash)
}

async fn read(
    file: &dyn HostFileReader,
    path: &Path,
    offset: u64,
    length: u64,
) -> Result<Bytes, ContainerError> {
    let length = usize::try_from(length).map_err(|_| corrupt("longer than memory"))?;
    file.read_at(offset, length).await.map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => corrupt("a part lies outside the file"),
        _ => ContainerError::io(path, &error),
    })
}

/// Reads header and trailer.
async fn read_ends(
    file: &dyn HostFileReader,
    path: &Path,
    size: u64,
) -> Result<Trailer, ContainerError> {
    let short = || corrupt("too short for a snapshot");
    if size < HEADER_LEN as u64 {
        return Err(short());
    }
    // First, so that another format is told from damage whatever comes behind the header.
    let header = read(file, path, 0, HEADER_LEN as u64).await?;
    layout::check_header(header.first_chunk().ok_or_else(short)?)?;
    let trailer_at = size.checked_sub(TRAILER_LEN as u64);
    let trailer_at = trailer_at.filter(|at| *at >= HEADER_LEN as u64).ok_or_else(short)?;
    let trailer = read(file, path, trailer_at, TRAILER_LEN as u64).await?;
    Trailer::decode(trailer.first_chunk().ok_or_else(short)?, size)
}

/// Verifies all but the content of images.
async fn parse(reader: Arc<dyn HostFileReader>, path: &Path) -> Result<Opened, ContainerError> {
    let size = reader.size().await.map_err(|error| ContainerError::io(path, &error))?;
    let trailer = read_ends(&*reader, path, size).await?;
    if trailer.manifest_length > MAX_MANIFEST as u64 {
        return Err(corrupt("the manifest is too long"));
    }
    let encoded = read(&*reader, path, trailer.manifest_offset, trailer.manifest_length).await?;
    if Hash::of(&encoded) != trailer.manifest_hash && !planted(Bug::ManifestIsNotHashed) {
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
    check_places(&*reader, path, &manifest.sections, trailer.manifest_offset).await?;
    let mut opened =
        Opened { seal: trailer.manifest_hash, plain: Vec::new(), images: Vec::new(), manifest };
    let mut entries = opened.manifest.sections.iter();
    while let Some(entry) = entries.next() {
        let name = entry.name.clone();
        if !entry.image {
            opened.plain.push((name, section(&*reader, path, entry).await?));
            continue;
        }
        let map = entries.next().filter(|map| !map.image && map.name == map_section(&name));
        let map =
            map.ok_or_else(|| ContainerError::Corrupt(format!("image `{name}` has no map")))?;
        let map = ImageMap::decode(&section(&*reader, path, map).await?)
            .map_err(|why| ContainerError::Corrupt(format!("the map of `{name}`: {why}")))?;
        if map.packed() != entry.length {
            let (length, packed) = (entry.length, map.packed());
            let detail = format!("image `{name}`: {length} bytes for runs of {packed}");
            return Err(ContainerError::Corrupt(detail));
        }
        let place = (entry.offset, entry.length);
        let layer = Layer::new(reader.clone(), path.to_owned(), name.clone(), place, entry.hash);
        opened.images.push((name, map, Arc::new(layer)));
    }
    Ok(opened)
}

/// Reads a section and compares its hash.
async fn section(
    file: &dyn HostFileReader,
    path: &Path,
    entry: &SectionEntry,
) -> Result<Bytes, ContainerError> {
    let content = read(file, path, entry.offset, entry.length).await?;
    let mut hasher = Hasher::new();
    hash_in_steps(&mut hasher, &content).await;
    if hasher.finish() == entry.hash || planted(Bug::SectionIsNotHashed) {
        return Ok(content);
    }
    Err(ContainerError::Corrupt(format!("the hash of section `{}` does not hold", entry.name)))
}

/// Checks that sections, and zeros between them, fill the file from the header up to `end`.
async fn check_places(
    file: &dyn HostFileReader,
    path: &Path,
    entries: &[SectionEntry],
    end: u64,
) -> Result<(), ContainerError> {
    if entries.len() > MAX_SECTIONS {
        return Err(corrupt("too many sections"));
    }
    let mut names = BTreeSet::new();
    let mut position = HEADER_LEN as u64;
    for entry in entries {
        let name = &entry.name;
        if name.is_empty() || name.len() > MAX_SECTION_NAME || !names.insert(name) {
            return Err(corrupt("a section without a name of its own"));
        }
        let section_end = entry.offset.checked_add(entry.length);
        if layout::place(position, entry.length) != Some(entry.offset)
            || section_end.is_none_or(|section_end| section_end > end)
        {
            return Err(ContainerError::Corrupt(format!("section `{name}` is not in its place")));
        }
        // Less than a page, by where the section stands.
        debug_assert!(entry.offset - position < PAGE);
        let padding = read(file, path, position, entry.offset - position).await?;
        if padding.iter().any(|byte| *byte != 0) && !planted(Bug::PaddingIsNotChecked) {
            return Err(ContainerError::Corrupt(format!("padding before section `{name}`")));
        }
        position = entry.offset + entry.length;
    }
    if position != end {
        return Err(corrupt("the sections do not end where the manifest begins"));
    }
    Ok(())
}
