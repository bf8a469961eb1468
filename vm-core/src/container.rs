//! The snapshot container, format 2: sections of a machine's state in one file, every byte of it accounted for.
//!
//! ```text
//! header    64 bytes  magic, format, hash of both
//! sections            one after the other; one of a page or more begins on a page boundary, after zeros
//! manifest            JSON: metadata, compatibility, configuration; name, place and hash of every section
//! trailer   64 bytes  magic, total length, place and hash of the manifest, hash of all that
//! ```
//!
//! What is read is checked from the outside inwards, and nothing is decoded before its hash held: header, trailer,
//! manifest, sections; lengths must add up to the file's, and padding must be zeros where it must be. So any flipped,
//! missing or extra byte is [`ContainerError::Corrupt`]. A file of another format is
//! [`ContainerError::Incompatible`] in the field `format`, but only where the header's hash holds.
//!
//! Guest memory and disks are sections of a kind of their own, [images](crate::image): packed, without zeros, and with a
//! map that says where the content belongs. [`open`] verifies all but their content, which is never decoded; whoever uses
//! it sees to its verification.
//!
//! The images of a container with a base hold only what changed since the base was written, and so on along the chain.
//! A container names its base by path and by *seal*, the hash of its manifest: a base that is missing or is another one
//! makes all that build on it [`ContainerError::Corrupt`]. [`merge`] writes a chain as one container.
//!
//! What is written appears under its name at once and whole: it grows under a temporary name in the same directory,
//! is made durable, and is then renamed. A crash at any point leaves the old file or the new one, and perhaps a
//! temporary one for [`sweep`].
//!
//! The hashes find damage, not forgery: whoever can write the file can write its hashes. What is in the sections stays
//! input that their reader must check. [`verify_bytes`] never panics and allocates no more than a small multiple of
//! its input, whatever that is; it is the function to fuzz.

use crate::host_fs::HostFs;
use bytes::Bytes;
use std::{io, path::Path, sync::Arc};
use vm_trait::VmErrorKind;

mod chain;
mod hash;
mod layout;
mod manifest;
mod temp_file;
mod verify;
mod writer;

pub use chain::{Chain, MAX_CHAIN, merge, open};
pub use hash::Hash;
pub(crate) use hash::Hasher;
pub use manifest::{BaseLink, BasePath, Compatibility, Manifest, SectionEntry};
pub use verify::verify_bytes;
pub use writer::{ContainerWriter, Sealed};

/// The format that is written and read here.
pub const FORMAT: u32 = 2;

/// The most sections of a container.
pub const MAX_SECTIONS: usize = 4096;

/// The longest name of a section, in bytes.
pub const MAX_SECTION_NAME: usize = 128;

/// The longest manifest, in bytes.
pub const MAX_MANIFEST: usize = 16 << 20;

/// How a container could not be written or used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ContainerError {
    /// The bytes are not what was written.
    #[error("damaged: {0}")]
    Corrupt(String),
    /// The container is whole and cannot be used here.
    #[error("{field} is {found}, wanted {wanted}")]
    Incompatible {
        /// Which field differs.
        field: String,
        /// What the container says.
        found: String,
        /// What is needed here.
        wanted: String,
    },
    /// The host's file system failed.
    #[error("{path}: {reason}")]
    Io {
        /// The file concerned.
        path: String,
        /// How it failed.
        kind: io::ErrorKind,
        /// What it answered.
        reason: String,
        /// Whether it was for lack of space.
        out_of_space: bool,
    },
    /// The writer was not used as it must be, or asked for more than a container holds.
    #[error("cannot be written: {0}")]
    Misuse(String),
}

impl ContainerError {
    pub(crate) fn io(path: &Path, error: &io::Error) -> Self {
        let out_of_space =
            matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
        Self::Io {
            path: path.display().to_string(),
            kind: error.kind(),
            reason: error.to_string(),
            out_of_space,
        }
    }
}

/// What ran out when a disk of the host is full.
const DISK_SPACE: &str = "host disk space";

impl From<ContainerError> for VmErrorKind {
    fn from(error: ContainerError) -> Self {
        match error {
            ContainerError::Corrupt(detail) => Self::SnapshotCorrupt { detail },
            ContainerError::Incompatible { field, found, wanted } => {
                Self::SnapshotIncompatible { field, found, wanted }
            }
            ContainerError::Io { out_of_space: true, .. } => {
                Self::ResourceExhausted { resource: DISK_SPACE.to_owned() }
            }
            ContainerError::Io { path, reason, .. } => Self::HostIo { path, reason },
            ContainerError::Misuse(detail) => Self::Internal { detail },
        }
    }
}

impl From<ContainerError> for crate::machine::MachineError {
    fn from(error: ContainerError) -> Self {
        match error {
            ContainerError::Corrupt(detail) => Self::Corrupt(detail),
            ContainerError::Incompatible { field, found, wanted } => {
                Self::Incompatible { field, found, wanted }
            }
            ContainerError::Io { out_of_space: true, .. } => Self::Exhausted(DISK_SPACE.to_owned()),
            ContainerError::Io { path, reason, .. } => Self::HostIo { path, reason },
            ContainerError::Misuse(detail) => Self::Failed(detail),
        }
    }
}

/// Reads a whole container file that has no base, and gives its bytes after verifying all of them.
///
/// # Errors
/// As [`open`]; [`ContainerError::Incompatible`] in the field `base` for one that has a base.
pub async fn read_verified(fs: &dyn HostFs, path: &Path) -> Result<Bytes, ContainerError> {
    let bytes = verify::read_file(fs, path).await?;
    verify::verify_in_steps(&bytes).await?;
    Ok(bytes)
}

/// Gives the seal of a container whose ends are whole, without reading the rest.
///
/// # Errors
/// As [`open`].
pub async fn seal(fs: &dyn HostFs, path: &Path) -> Result<Hash, ContainerError> {
    verify::read_seal(fs, path).await
}

/// Verifies the bytes of a container and writes them to a file, as atomically as [`ContainerWriter::finish`].
/// `temp_tag` must be fresh.
///
/// # Errors
/// As [`open`], and nothing is written then; [`ContainerError::Io`].
pub async fn write_verified(
    fs: Arc<dyn HostFs>,
    path: &Path,
    bytes: Bytes,
    temp_tag: u64,
) -> Result<Manifest, ContainerError> {
    let (manifest, _) = verify::verify_in_steps(&bytes).await?;
    let mut file = temp_file::TempFile::create(fs, path, temp_tag).await?;
    file.write_all(bytes).await?;
    file.commit().await?;
    Ok(manifest)
}

/// Removes the temporary files that writers which died left in a directory, and says how many. A directory that does
/// not exist has none.
///
/// Only files named as writers name theirs are touched. A writer at work in that directory would lose its file and
/// fail: sweep before the first one.
///
/// # Errors
/// [`ContainerError::Io`] for the first file that could not be removed, after trying all.
pub async fn sweep(fs: &dyn HostFs, dir: &Path) -> Result<usize, ContainerError> {
    temp_file::sweep(fs, dir).await
}

#[cfg(test)]
mod tests;
