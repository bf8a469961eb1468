//! Captured machine states.

use crate::{
    config::Mib,
    id::{SnapshotId, VmId},
};
use serde::{Deserialize, Serialize};
use std::{path::PathBuf, time::Duration};

/// A handle to a captured state, kept in a file of the backend's host.
///
/// The handle is plain data: it can be stored and used by another process. Its metadata is a copy; what counts is
/// in the file and is verified when the snapshot is used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Snapshot {
    /// Where it is kept.
    pub path: PathBuf,
    /// What it holds.
    pub metadata: SnapshotMetadata,
}

impl Snapshot {
    /// Puts a handle together; for backends.
    #[must_use]
    pub fn new(path: PathBuf, metadata: SnapshotMetadata) -> Self {
        Self { path, metadata }
    }
}

/// What a snapshot holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotMetadata {
    /// Its name.
    pub id: SnapshotId,
    /// The machine that it was taken from.
    pub vm: VmId,
    /// The kind of backend that wrote it.
    pub backend: String,
    /// When, since the Unix epoch, on the host's clock.
    pub taken_at: Duration,
    /// The guest's architecture.
    pub arch: String,
    /// How many vCPUs the machine has.
    pub vcpus: u8,
    /// How much memory the machine has.
    pub memory: Mib,
    /// Free text of its owner.
    #[serde(default)]
    pub label: Option<String>,
    /// The snapshot whose file is needed too, of an incremental one.
    #[serde(default)]
    pub base: Option<SnapshotId>,
}

/// How a snapshot is to be taken.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct SnapshotOptions {
    /// The file to write. Default a new one in the backend's snapshot directory. A file that stands there is
    /// replaced once the new one is whole.
    pub path: Option<PathBuf>,
    /// Free text to keep in the metadata.
    pub label: Option<String>,
    /// Keep track of what changes from this snapshot on, so that a later one can be taken with it as its base. The
    /// guest pays for that with each first write to a page. Needs
    /// [`IncrementalSnapshot`](crate::Capability::IncrementalSnapshot). Default false.
    pub tracked: bool,
    /// Hold only what changed since this snapshot, which must be one of the last eight tracked ones of this life of the
    /// machine: taken, or restored from, with `tracked`; or a copy of one that was exported whole and imported. The new one is
    /// tracked itself, and needs the file that is named here. Neither it nor those below it may be moved,
    /// changed or deleted as long as the new one is needed, but for all of a chain that is moved together. Default none.
    pub base: Option<Box<Snapshot>>,
}

impl SnapshotOptions {
    /// Sets the file to write.
    #[must_use]
    pub fn with_path(mut self, path: impl Into<PathBuf>) -> Self {
        self.path = Some(path.into());
        self
    }

    /// Asks for track to be kept of what changes from here on.
    #[must_use]
    pub fn tracked(mut self) -> Self {
        self.tracked = true;
        self
    }

    /// Asks for what changed since `base`.
    #[must_use]
    pub fn on_base(mut self, base: &Snapshot) -> Self {
        self.base = Some(Box::new(base.clone()));
        self
    }

    /// Sets the free text.
    #[must_use]
    pub fn with_label(mut self, label: impl Into<String>) -> Self {
        self.label = Some(label.into());
        self
    }
}

/// How a snapshot is to be restored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct RestoreOptions {
    /// Let the guest run at once; else it stands still in Paused. Default false.
    pub resume: bool,
    /// Keep track of what changes from the restored state on, so that an incremental snapshot can be taken with this one
    /// as its base: see [`SnapshotOptions::tracked`]. Default false.
    pub tracked: bool,
}

impl RestoreOptions {
    /// Asks for a machine that runs.
    #[must_use]
    pub fn running() -> Self {
        Self { resume: true, tracked: false }
    }

    /// Asks for a machine that stands still.
    #[must_use]
    pub fn paused() -> Self {
        Self { resume: false, tracked: false }
    }

    /// Asks for track to be kept of what changes.
    #[must_use]
    pub fn tracked(mut self) -> Self {
        self.tracked = true;
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restore_that_keeps_track_still_runs_or_stands_still() {
        for options in [RestoreOptions::running(), RestoreOptions::paused()] {
            let tracked = options.tracked();
            assert_eq!((options.tracked, tracked.tracked), (false, true));
            assert_eq!(options.resume, tracked.resume);
        }
        assert!(RestoreOptions::running().resume && !RestoreOptions::paused().resume);
    }
}
