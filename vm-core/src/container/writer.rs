//! Writing a container, section by section.

use super::{
    BaseLink, Compatibility, ContainerError, FORMAT, Hash, MAX_MANIFEST, MAX_SECTION_NAME,
    MAX_SECTIONS, Manifest, SectionEntry,
    hash::Hasher,
    layout::{self, PAGE, TRAILER_LEN, Trailer, map_section},
    temp_file::TempFile,
    verify::hash_in_steps,
};
use crate::{
    host_fs::HostFs,
    image::{ImageMap, Run},
    machine::{MachineError, SectionSink},
};
use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use std::{collections::BTreeSet, path::Path, sync::Arc};
use vm_planted_bugs::{Bug, planted};
use vm_trait::{SnapshotMetadata, VmConfig};

/// Small pieces are gathered up to this length before they are written.
const GATHER: usize = 64 << 10;

/// Writes a container; it has its name only once [`finish`](Self::finish) returns. Dropped before, it leaves nothing.
#[derive(Debug)]
pub struct ContainerWriter {
    file: TempFile,
    /// What is still to be written to the file.
    gathered: BytesMut,
    /// How long the file is, with what is gathered.
    position: u64,
    names: BTreeSet<String>,
    sections: Vec<SectionEntry>,
    open: Option<OpenSection>,
    /// Why it can no longer be finished; also set while a call is under way, in case that is dropped.
    broken: Option<ContainerError>,
}

/// A section that can still grow.
#[derive(Debug)]
struct OpenSection {
    name: String,
    hasher: Hasher,
    length: u64,
    /// Where it stands; decided once it is a page long, or at its end.
    offset: Option<u64>,
    /// Its first bytes, until its place is decided.
    held: BytesMut,
    /// Where they belong, of an image.
    map: Option<ImageMap>,
}

/// What a written container is known by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// How long the file is, in bytes.
    pub length: u64,
    /// The hash of its manifest, which holds the hashes of all else: no other content has it.
    pub seal: Hash,
}

impl ContainerWriter {
    /// Begins a container under a temporary name beside `path`, made from `temp_tag`, which must be fresh.
    ///
    /// # Errors
    /// [`ContainerError::Io`].
    pub async fn create(
        fs: Arc<dyn HostFs>,
        path: &Path,
        temp_tag: u64,
    ) -> Result<Self, ContainerError> {
        let file = TempFile::create(fs, path, temp_tag).await?;
        let header = layout::header(FORMAT);
        Ok(Self {
            file,
            gathered: BytesMut::from(&header[..]),
            position: header.len() as u64,
            names: BTreeSet::new(),
            sections: Vec::new(),
            open: None,
            broken: None,
        })
    }

    /// Ends the container, makes it durable, gives it its name, and says what it became. A file that stood at that name
    /// is replaced. With a base, what its images do not say is what stands there.
    ///
    /// # Errors
    /// [`ContainerError::Io`]: the old file, if there was one, is then as it was, unless only the directory could not
    /// be made durable; then the new one stands whole at the name. So it is when the manifest
    /// cannot be encoded. The first error of a section is given again.
    pub async fn finish(
        mut self,
        metadata: SnapshotMetadata,
        config: VmConfig,
        compatibility: Compatibility,
        base: Option<BaseLink>,
    ) -> Result<Sealed, ContainerError> {
        if let Some(error) = self.broken {
            return Err(error);
        }
        self.end_with_map().await?;
        let sections = self.sections;
        let manifest = Manifest { format: FORMAT, metadata, compatibility, config, base, sections };
        // The one thing that JSON cannot hold is a path of a disk that is not Unicode.
        let manifest = serde_json::to_vec(&manifest)
            .map_err(|error| self.file.refuse(&format!("the manifest: {error}")))?;
        if manifest.len() > MAX_MANIFEST {
            let reason =
                format!("the manifest has {} bytes, at most {MAX_MANIFEST}", manifest.len());
            return Err(self.file.refuse(&reason));
        }
        let manifest_length = manifest.len() as u64;
        let total_length = self.position + manifest_length + TRAILER_LEN as u64;
        let trailer = Trailer {
            total_length,
            manifest_offset: self.position,
            manifest_length,
            manifest_hash: Hash::of(&manifest),
        };
        self.gathered.extend_from_slice(&manifest);
        self.gathered.extend_from_slice(&trailer.encode());
        self.file.write_all(self.gathered.freeze()).await?;
        self.file.commit().await?;
        Ok(Sealed { length: total_length, seal: trailer.manifest_hash })
    }

    /// Breaks the writer until [`settle`](Self::settle), in case the call in between is dropped.
    fn arm(&mut self) -> Result<(), ContainerError> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        self.broken = Some(ContainerError::Misuse("a write was given up half-way".to_owned()));
        Ok(())
    }

    fn settle(&mut self, result: Result<(), ContainerError>) -> Result<(), MachineError> {
        self.broken = result.clone().err();
        Ok(result?)
    }

    async fn end_section(&mut self) -> Result<(), ContainerError> {
        let Some(section) = self.open.take() else { return Ok(()) };
        let offset = match section.offset {
            Some(offset) => offset,
            None => {
                let offset = self.position;
                self.append(section.held.freeze()).await?;
                offset
            }
        };
        let image = section.map.is_some();
        let OpenSection { name, length, hasher, .. } = section;
        self.sections.push(SectionEntry { name, offset, length, hash: hasher.finish(), image });
        Ok(())
    }

    /// Ends a section, and writes the map of an image behind it.
    async fn end_with_map(&mut self) -> Result<(), ContainerError> {
        let image = self
            .open
            .as_ref()
            .and_then(|section| Some((map_section(&section.name), section.map.as_ref()?.encode())));
        self.end_section().await?;
        let Some((name, map)) = image else { return Ok(()) };
        self.open_section(&name, None)?;
        self.grow_section(map).await?;
        self.end_section().await
    }

    async fn append(&mut self, bytes: Bytes) -> Result<(), ContainerError> {
        self.position += bytes.len() as u64;
        if self.gathered.len() + bytes.len() <= GATHER {
            self.gathered.extend_from_slice(&bytes);
            return Ok(());
        }
        if !self.gathered.is_empty() {
            let gathered = self.gathered.split().freeze();
            self.file.write_all(gathered).await?;
        }
        if bytes.len() < GATHER / 2 {
            self.gathered.extend_from_slice(&bytes);
            return Ok(());
        }
        self.file.write_all(bytes).await
    }

    async fn begin_section(
        &mut self,
        name: &str,
        map: Option<ImageMap>,
    ) -> Result<(), ContainerError> {
        self.end_with_map().await?;
        self.open_section(name, map)
    }

    fn open_section(&mut self, name: &str, map: Option<ImageMap>) -> Result<(), ContainerError> {
        if name.is_empty() || name.len() > MAX_SECTION_NAME {
            return Err(ContainerError::Misuse(format!("`{name}` cannot name a section")));
        }
        if self.sections.len() >= MAX_SECTIONS {
            return Err(ContainerError::Misuse(format!("more than {MAX_SECTIONS} sections")));
        }
        if !self.names.insert(name.to_owned()) {
            return Err(ContainerError::Misuse(format!("two sections `{name}`")));
        }
        self.open = Some(OpenSection {
            name: name.to_owned(),
            hasher: Hasher::new(),
            length: 0,
            offset: None,
            held: BytesMut::new(),
            map,
        });
        Ok(())
    }

    /// Adds a run to the map of the image that is open.
    fn add_run(&mut self, offset: u64, length: u64, content: bool) -> Result<(), ContainerError> {
        let section = self.open.as_mut();
        let Some((name, map)) =
            section.and_then(|section| Some((&section.name, section.map.as_mut()?)))
        else {
            return Err(ContainerError::Misuse("an offset outside of any image".to_owned()));
        };
        let added = map.add(Run { offset, length, content });
        added.map_err(|why| ContainerError::Misuse(format!("image `{name}`: {why}")))
    }

    async fn grow_section(&mut self, bytes: Bytes) -> Result<(), ContainerError> {
        let Some(section) = &mut self.open else {
            return Err(ContainerError::Misuse("bytes outside of any section".to_owned()));
        };
        let hashed = if planted(Bug::HashBeforeLastWrite) { bytes.len() / 2 } else { bytes.len() };
        hash_in_steps(&mut section.hasher, &bytes[..hashed]).await;
        section.length += bytes.len() as u64;
        if section.offset.is_none() {
            if section.length < PAGE {
                section.held.extend_from_slice(&bytes);
                return Ok(());
            }
            let offset = self.position.next_multiple_of(PAGE);
            section.offset = Some(offset);
            let held = section.held.split().freeze();
            let padding = usize::try_from(offset - self.position).unwrap_or_default();
            self.append(Bytes::from_static(&ZEROS[..padding])).await?;
            self.append(held).await?;
        }
        self.append(bytes).await
    }
}

#[async_trait]
impl SectionSink for ContainerWriter {
    async fn begin(&mut self, name: &str) -> Result<(), MachineError> {
        self.arm()?;
        let result = self.begin_section(name, None).await;
        self.settle(result)
    }

    async fn write(&mut self, bytes: Bytes) -> Result<(), MachineError> {
        self.arm()?;
        let result = match &self.open {
            Some(section) if section.map.is_some() => {
                Err(ContainerError::Misuse("bytes of an image without an offset".to_owned()))
            }
            _ => self.grow_section(bytes).await,
        };
        self.settle(result)
    }

    async fn begin_image(&mut self, name: &str, total: u64) -> Result<(), MachineError> {
        self.arm()?;
        let result = self.begin_section(name, Some(ImageMap::new(total))).await;
        self.settle(result)
    }

    async fn write_at(&mut self, offset: u64, bytes: Bytes) -> Result<(), MachineError> {
        self.arm()?;
        let mut result = self.add_run(offset, bytes.len() as u64, true);
        if result.is_ok() {
            result = self.grow_section(bytes).await;
        }
        self.settle(result)
    }

    async fn zeros_at(&mut self, offset: u64, length: u64) -> Result<(), MachineError> {
        self.arm()?;
        let result = self.add_run(offset, length, false);
        self.settle(result)
    }
}

static ZEROS: [u8; 4096] = [0; 4096];
