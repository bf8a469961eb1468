//! Guest files.

use serde::{Deserialize, Serialize};
use std::time::Duration;

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A device, pipe or socket.
    Other,
}

/// A file's metadata.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct FileStat {
    /// What it is.
    pub kind: FileKind,
    /// Its size in bytes.
    pub size: u64,
    /// Permission bits, such as `0o644`.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last change of its content, since the Unix epoch, on the guest's clock.
    pub modified: Duration,
}

impl FileStat {
    /// Puts metadata together; for backends.
    #[must_use]
    pub fn new(kind: FileKind, size: u64, mode: u32) -> Self {
        Self { kind, size, mode, uid: 0, gid: 0, modified: Duration::ZERO }
    }

    /// Sets the owner.
    #[must_use]
    pub fn with_owner(mut self, uid: u32, gid: u32) -> Self {
        self.uid = uid;
        self.gid = gid;
        self
    }

    /// Sets the time of the last change.
    #[must_use]
    pub fn with_modified(mut self, modified: Duration) -> Self {
        self.modified = modified;
        self
    }
}

/// A name in a directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct DirEntry {
    /// The name; bytes that are not UTF-8 are replaced.
    pub name: String,
    /// What it names.
    pub kind: FileKind,
}

impl DirEntry {
    /// Puts an entry together; for backends.
    #[must_use]
    pub fn new(name: impl Into<String>, kind: FileKind) -> Self {
        Self { name: name.into(), kind }
    }
}

/// How a file is to be written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct WriteOptions {
    /// Permission bits. Default those of the file that is replaced, else `0o644`.
    pub mode: Option<u32>,
}

/// How a directory is to be made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CreateDirOptions {
    /// Make missing parents too, and accept a directory that is already there.
    pub recursive: bool,
    /// Permission bits. Default `0o755`.
    pub mode: Option<u32>,
}

/// How something is to be removed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RemoveOptions {
    /// Remove a directory with all it holds. Symbolic links in it are removed, never followed.
    pub recursive: bool,
}
