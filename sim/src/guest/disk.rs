//! Disks: what of them survives a crash, and how they are attached.

use serde::{Deserialize, Serialize};

/// What a disk durably holds: what a guest that boots after a crash finds. An empty one is a disk that was just
/// made. Cloning copies no file contents.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct DiskImage {}

/// A disk as it is attached to a new guest.
#[derive(Clone, Debug)]
pub struct DiskSetup {
    /// Where it is mounted: an absolute, normalised path other than `/`.
    pub mount: String,
    /// How many bytes it holds.
    pub capacity: u64,
    /// Whether writes fail with `ROFS`.
    pub read_only: bool,
    /// What is on it.
    pub image: DiskImage,
}
