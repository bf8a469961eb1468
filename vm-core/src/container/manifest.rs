//! What a container says of itself.

use super::{ContainerError, Hash};
use serde::{Deserialize, Serialize};
use std::{
    fmt,
    path::{Path, PathBuf},
};
use vm_trait::{Mib, SnapshotId, SnapshotMetadata, VmConfig};

/// The contents of a container. Fields that a reader does not know are ignored; one that it must know needs another
/// format.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The format, as in the header.
    pub format: u32,
    /// What the snapshot holds.
    pub metadata: SnapshotMetadata,
    /// What a machine must be like to load it.
    pub compatibility: Compatibility,
    /// The configuration of the machine.
    pub config: VmConfig,
    /// The snapshot that images build on, where this one holds only what changed since then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<BaseLink>,
    /// The sections, in the order of the file.
    pub sections: Vec<SectionEntry>,
}

/// Which snapshot another one builds on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseLink {
    /// Its name.
    pub id: SnapshotId,
    /// Where it was kept.
    pub path: BasePath,
    /// Its [seal](super::Sealed::seal).
    pub seal: Hash,
}

/// Where the file of a base is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BasePath {
    /// In the same directory: both can be moved together.
    Beside(PathBuf),
    /// At this path.
    At(PathBuf),
}

impl BasePath {
    /// Describes where `base` is for a snapshot at `path`.
    #[must_use]
    pub fn of(base: &Path, path: &Path) -> Self {
        match base.file_name() {
            Some(name) if base.parent() == path.parent() => Self::Beside(name.into()),
            _ => Self::At(base.to_owned()),
        }
    }

    /// Gives the path of the base of a snapshot at `path`.
    #[must_use]
    pub fn seen_from(&self, path: &Path) -> PathBuf {
        match self {
            Self::Beside(name) => path.with_file_name(name),
            Self::At(base) => base.clone(),
        }
    }
}

/// What a machine must be like to load a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compatibility {
    /// The kind of backend.
    pub backend: String,
    /// The guest's architecture.
    pub arch: String,
    /// How many vCPUs.
    pub vcpus: u8,
    /// How much memory.
    pub memory: Mib,
    /// The version of the protocol that the guest agent speaks.
    pub agent_protocol: u16,
}

/// A section's place in the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SectionEntry {
    /// Its name; no other section has it.
    pub name: String,
    /// Where it begins.
    pub offset: u64,
    /// How long it is.
    pub length: u64,
    /// The hash of its bytes.
    pub hash: Hash,
    /// Whether it is an image; the next section is then its map.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub image: bool,
}

impl Compatibility {
    /// Compares with what is `wanted` here, field by field.
    ///
    /// # Errors
    /// [`ContainerError::Incompatible`] for the first field that differs.
    pub fn check(&self, wanted: &Self) -> Result<(), ContainerError> {
        fn same<T: PartialEq + fmt::Display>(
            field: &str,
            found: &T,
            wanted: &T,
        ) -> Result<(), ContainerError> {
            if found == wanted {
                return Ok(());
            }
            Err(ContainerError::Incompatible {
                field: field.to_owned(),
                found: found.to_string(),
                wanted: wanted.to_string(),
            })
        }
        same("backend", &self.backend, &wanted.backend)?;
        same("arch", &self.arch, &wanted.arch)?;
        same("vcpus", &self.vcpus, &wanted.vcpus)?;
        same("memory", &self.memory, &wanted.memory)?;
        same("agent_protocol", &self.agent_protocol, &wanted.agent_protocol)
    }
}
