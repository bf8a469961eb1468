//! [`Image`]: guest memory, or a disk, as snapshots hold it.
//!
//! An image is long and mostly zeros, and of it only what changed may be kept: a snapshot holds *runs* of it, packed, and an
//! [`ImageMap`] that says where they belong. Put over that of its base, and that over its own, they give the [`Image`]:
//! where each part of it stands in which file. Nothing of it has been read then, and nothing verified; what reads it by
//! [`Image::content`] gets what was verified, and what maps the files must wait for [`Image::verify`] before anybody
//! may rely on it.

use crate::{
    container::{ContainerError, Hash, Hasher},
    host_fs::HostFileReader,
};
use bytes::{Bytes, BytesMut};
use std::{
    collections::VecDeque,
    io,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};
use vm_planted_bugs::{Bug, planted};

mod map;

pub use map::{ImageMap, Run};

/// How much is read in one go.
const STEP: u64 = 1 << 20;

/// A part of an image that stands in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where it belongs in the image.
    pub offset: u64,
    /// How long it is.
    pub length: u64,
    /// In which of the image's layers it stands.
    pub layer: usize,
    /// Where in the layer's file it begins.
    pub at: u64,
}

/// An image as a chain of snapshots gives it: pieces in files, and zeros between them.
#[derive(Clone, Debug)]
pub struct Image {
    total: u64,
    layers: Vec<Arc<Layer>>,
    pieces: Vec<Piece>,
}

/// What one snapshot holds of an image.
#[derive(Debug)]
pub struct Layer {
    reader: Arc<dyn HostFileReader>,
    /// For messages.
    path: PathBuf,
    name: String,
    /// Where its content begins in the file.
    start: u64,
    length: u64,
    hash: Hash,
    verified: AtomicBool,
}

impl Layer {
    /// Describes what stands in a file from `start` on and must have this hash.
    pub(crate) fn new(
        reader: Arc<dyn HostFileReader>,
        path: PathBuf,
        name: String,
        (start, length): (u64, u64),
        hash: Hash,
    ) -> Self {
        Self { reader, path, name, start, length, hash, verified: AtomicBool::new(false) }
    }

    /// Gives the file that it stands in.
    #[must_use]
    pub fn reader(&self) -> &Arc<dyn HostFileReader> {
        &self.reader
    }

    /// Reads all of it and compares its hash, once.
    ///
    /// # Errors
    /// [`ContainerError::Corrupt`], [`ContainerError::Io`].
    pub(crate) async fn verify(&self) -> Result<(), ContainerError> {
        if self.verified.load(Ordering::Acquire) {
            return Ok(());
        }
        Cursor::new(self).finish().await
    }

    fn compare(&self, hasher: &Hasher) -> Result<(), ContainerError> {
        if hasher.finish() == self.hash || planted(Bug::ImageIsNotHashed) {
            self.verified.store(true, Ordering::Release);
            return Ok(());
        }
        let path = self.path.display();
        let detail = format!("the hash of section `{}` of {path} does not hold", self.name);
        Err(ContainerError::Corrupt(detail))
    }

    /// Reads bytes of its file.
    async fn read(&self, at: u64, length: u64) -> Result<Bytes, ContainerError> {
        let length = usize::try_from(length)
            .map_err(|_| ContainerError::Corrupt("longer than memory".to_owned()))?;
        self.reader.read_at(at, length).await.map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => {
                ContainerError::Corrupt(format!("{} ends early", self.path.display()))
            }
            _ => ContainerError::io(&self.path, &error),
        })
    }
}

impl Image {
    /// Begins with what a snapshot without a base holds.
    pub(crate) fn new(map: &ImageMap, layer: Arc<Layer>) -> Self {
        let empty = Self { total: 0, layers: Vec::new(), pieces: Vec::new() };
        empty.overlaid(map, layer)
    }

    /// Puts what a snapshot holds over what its base gives.
    pub(crate) fn overlaid(mut self, map: &ImageMap, layer: Arc<Layer>) -> Self {
        let pieces = map::overlay(&self.pieces, map, self.layers.len(), layer.start);
        self.layers.push(layer);
        Self { total: map.total(), layers: self.layers, pieces }
    }

    /// Gives the length, zeros included, in bytes.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Gives what each snapshot of the chain holds of it, the oldest first.
    #[must_use]
    pub fn layers(&self) -> &[Arc<Layer>] {
        &self.layers
    }

    /// Gives the parts that stand in files, in ascending order; no two overlap. All else is zeros.
    #[must_use]
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Reads all that is in files and compares hashes, where that was not done before.
    ///
    /// # Errors
    /// [`ContainerError::Corrupt`], [`ContainerError::Io`].
    pub async fn verify(&self) -> Result<(), ContainerError> {
        for layer in &self.layers {
            layer.verify().await?;
        }
        Ok(())
    }

    /// Reads a piece, or a part of one, without verifying it.
    ///
    /// # Errors
    /// [`ContainerError::Corrupt`] where the file is too short, [`ContainerError::Io`].
    pub async fn read(&self, piece: Piece) -> Result<Bytes, ContainerError> {
        let layer = self.layers.get(piece.layer);
        let layer = layer.ok_or_else(|| ContainerError::Corrupt("no such layer".to_owned()))?;
        layer.read(piece.at, piece.length).await
    }

    /// Begins to read the whole image, from front to back.
    #[must_use]
    pub fn read_through(&self) -> ReadThrough<'_> {
        let cursors = self.layers.iter().map(|layer| Cursor::new(layer)).collect();
        ReadThrough { pieces: self.pieces.iter().copied().collect(), cursors }
    }

    /// Gives the whole image, verified.
    ///
    /// # Errors
    /// [`ContainerError::Corrupt`], also for one of more than `at_most` bytes; [`ContainerError::Io`].
    pub async fn content(&self, at_most: u64) -> Result<Bytes, ContainerError> {
        let total = usize::try_from(self.total).ok().filter(|_| self.total <= at_most);
        let total = total.ok_or_else(|| {
            ContainerError::Corrupt(format!("an image of {} bytes, not {at_most}", self.total))
        })?;
        let mut content = BytesMut::new();
        let mut parts = self.read_through();
        while let Some((offset, bytes)) = parts.next().await? {
            content.resize(usize::try_from(offset).unwrap_or(total), 0);
            content.extend_from_slice(&bytes);
        }
        content.resize(total, 0);
        Ok(content.freeze())
    }
}

/// An image on its way through memory. What it gives is verified only once it has given all.
#[derive(Debug)]
pub struct ReadThrough<'a> {
    pieces: VecDeque<Piece>,
    cursors: Vec<Cursor<'a>>,
}

impl ReadThrough<'_> {
    /// Gives the next bytes that stand in files and where they belong, at most 1 MiB; all between them is zeros. After the
    /// last ones, compares the hashes of all that was read, which is every byte of every layer, once.
    ///
    /// # Errors
    /// [`ContainerError::Corrupt`], [`ContainerError::Io`]; nothing that it gave may be used then.
    pub async fn next(&mut self) -> Result<Option<(u64, Bytes)>, ContainerError> {
        let Some(piece) = self.pieces.front_mut() else {
            for cursor in &mut self.cursors {
                cursor.finish().await?;
            }
            return Ok(None);
        };
        let length = piece.length.min(STEP);
        let part = *piece;
        if length == piece.length {
            self.pieces.pop_front();
        } else {
            *piece = Piece {
                offset: part.offset + length,
                length: piece.length - length,
                at: part.at + length,
                ..part
            };
        }
        let bytes = self.cursors[part.layer].take(part.at, length).await?;
        Ok(Some((part.offset, bytes)))
    }
}

/// A place in a layer: all before it was hashed.
#[derive(Debug)]
struct Cursor<'a> {
    layer: &'a Layer,
    at: u64,
    hasher: Hasher,
}

impl<'a> Cursor<'a> {
    fn new(layer: &'a Layer) -> Self {
        Self { layer, at: layer.start, hasher: Hasher::new() }
    }

    /// Reads on up to `at`, and gives what stands there. The pieces of a layer ascend in its file as they do in the image.
    async fn take(&mut self, at: u64, length: u64) -> Result<Bytes, ContainerError> {
        self.skip_to(at).await?;
        let bytes = self.layer.read(at, length).await?;
        self.hasher.update(&bytes);
        self.at = at + length;
        Ok(bytes)
    }

    async fn skip_to(&mut self, end: u64) -> Result<(), ContainerError> {
        while self.at < end {
            let step = (end - self.at).min(STEP);
            self.hasher.update(&self.layer.read(self.at, step).await?);
            self.at += step;
        }
        Ok(())
    }

    /// Reads what is left, and compares the hash of all.
    async fn finish(&mut self) -> Result<(), ContainerError> {
        self.skip_to(self.layer.start + self.layer.length).await?;
        self.layer.compare(&self.hasher)
    }
}
