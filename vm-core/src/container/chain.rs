//! Chains: snapshots that hold what changed since their bases.

use super::{
    ContainerError, ContainerWriter, Hash, Manifest, Sealed,
    verify::{Opened, open_file},
};
use crate::{
    host_fs::HostFs,
    image::{Image, ImageMap, Layer},
    machine::{MachineError, SectionSink, Sections},
};
use std::{collections::BTreeMap, io, path::Path, sync::Arc};
use vm_planted_bugs::{Bug, planted};
use vm_trait::SnapshotMetadata;

/// The most containers of a chain, the whole one at its end included.
pub const MAX_CHAIN: usize = 32;

/// A container and those that it builds on.
#[derive(Debug)]
pub struct Chain {
    /// What the container says of itself.
    pub manifest: Manifest,
    /// What all of them give.
    pub sections: Sections,
    /// The container's seal.
    pub seal: Hash,
    /// How many there are.
    pub length: usize,
}

/// Opens a container and those that it builds on. All is verified but the content of images.
///
/// # Errors
/// [`ContainerError::Corrupt`], also for a chain with a missing or an altered link; [`ContainerError::Incompatible`] for
/// another format; [`ContainerError::Io`].
pub async fn open(fs: &dyn HostFs, path: &Path) -> Result<Chain, ContainerError> {
    let first = open_file(fs, path).await?;
    let mut bases = Vec::new();
    let mut at = path.to_owned();
    while let Some(link) = &bases.last().unwrap_or(&first).manifest.base {
        if bases.len() + 1 >= MAX_CHAIN {
            return Err(ContainerError::Corrupt(format!("a chain of more than {MAX_CHAIN}")));
        }
        at = link.path.seen_from(&at);
        let opened = open_file(fs, &at).await.map_err(|error| of_base(error, &at))?;
        if planted(Bug::AnyBaseWillDo) {
            bases.push(opened);
            continue;
        }
        if opened.seal != link.seal || opened.manifest.metadata.id != link.id {
            let (id, at) = (link.id, at.display());
            let detail = format!("{at} is not the snapshot {id} that this one was taken on");
            return Err(ContainerError::Corrupt(detail));
        }
        bases.push(opened);
    }
    let length = bases.len() + 1;
    let mut below = BTreeMap::new();
    for base in bases.into_iter().rev() {
        below = overlaid(&base.manifest, base.images, below)?;
    }
    let Opened { manifest, seal, plain, images } = first;
    let mut images = overlaid(&manifest, images, below)?;
    // In the order of the file.
    let order = manifest.sections.iter().filter(|entry| entry.image);
    let images = order.filter_map(|entry| images.remove_entry(&entry.name)).collect();
    Ok(Chain { manifest, sections: Sections { plain, images }, seal, length })
}

/// Writes a container and all that it builds on as one, in a file of its own, as atomically as
/// [`ContainerWriter::finish`]. The metadata is the first one's, but for what `change` changes. `temp_tag` must be fresh.
///
/// # Errors
/// As [`open`], also where the content of an image is damaged; nothing is written then. [`ContainerError::Io`].
pub async fn merge(
    fs: Arc<dyn HostFs>,
    path: &Path,
    target: &Path,
    temp_tag: u64,
    change: impl FnOnce(&mut SnapshotMetadata) + Send,
) -> Result<(Manifest, Sealed), ContainerError> {
    let Chain { mut manifest, sections, .. } = open(&*fs, path).await?;
    let mut writer = ContainerWriter::create(fs, target, temp_tag).await?;
    if let Err(Stopped::Reading(error)) = copy(&manifest, &sections, &mut writer).await {
        return Err(error);
    }
    change(&mut manifest.metadata);
    if !planted(Bug::MergeKeepsBase) {
        manifest.metadata.base = None;
    }
    manifest.base = None;
    let Manifest { metadata, config, compatibility, .. } = manifest.clone();
    let sealed = writer.finish(metadata, config, compatibility, None).await?;
    Ok((manifest, sealed))
}

/// Why a copy went no further.
enum Stopped {
    Reading(ContainerError),
    /// The writer says why when it is finished.
    Writing,
}

impl From<ContainerError> for Stopped {
    fn from(error: ContainerError) -> Self {
        Self::Reading(error)
    }
}

impl From<MachineError> for Stopped {
    fn from(_: MachineError) -> Self {
        Self::Writing
    }
}

/// Writes all sections in the order of the file.
async fn copy(
    manifest: &Manifest,
    sections: &Sections,
    writer: &mut ContainerWriter,
) -> Result<(), Stopped> {
    for entry in &manifest.sections {
        if entry.image {
            let Ok(image) = sections.image(&entry.name) else { continue };
            writer.begin_image(&entry.name, image.total()).await?;
            let mut content = image.read_through();
            while let Some((offset, bytes)) = content.next().await? {
                if planted(Bug::MergeDropsLastPiece) && offset + bytes.len() as u64 == image.total()
                {
                    continue;
                }
                writer.write_at(offset, bytes).await?;
            }
        } else if let Some(bytes) = sections.find(&entry.name) {
            writer.begin(&entry.name).await?;
            writer.write(bytes.clone()).await?;
        }
    }
    Ok(())
}

/// Puts the images of a container over what lies below it.
fn overlaid(
    manifest: &Manifest,
    images: Vec<(String, ImageMap, Arc<Layer>)>,
    mut below: BTreeMap<String, Image>,
) -> Result<BTreeMap<String, Image>, ContainerError> {
    let mut above = BTreeMap::new();
    for (name, map, layer) in images {
        let image = match (below.remove(&name), &manifest.base) {
            (Some(image), _) => image.overlaid(&map, layer),
            (None, None) => Image::new(&map, layer),
            (None, Some(_)) => {
                return Err(ContainerError::Corrupt(format!("its base has no image `{name}`")));
            }
        };
        above.insert(name, image);
    }
    Ok(above)
}

/// Says of an error that it is one of a base.
fn of_base(error: ContainerError, path: &Path) -> ContainerError {
    let path = path.display();
    match error {
        ContainerError::Io { kind: io::ErrorKind::NotFound, .. } => {
            ContainerError::Corrupt(format!("its base {path} is missing"))
        }
        ContainerError::Corrupt(detail) => {
            ContainerError::Corrupt(format!("its base {path}: {detail}"))
        }
        other => other,
    }
}
