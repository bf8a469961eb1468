//! [`HostFs`]: where snapshots are kept.
//!
//! What is written is durable only after `sync` on the file; a name is durable only after `sync_dir` on its directory.
//! The simulated host takes that literally.

use async_trait::async_trait;
use bytes::Bytes;
use std::{
    fmt,
    fs::File,
    io,
    path::{Path, PathBuf},
};

mod std_fs;

pub use std_fs::StdFs;

/// A file system of the host.
#[async_trait]
pub trait HostFs: Send + Sync + fmt::Debug {
    /// Makes a directory and its missing parents; one that is there already is fine.
    ///
    /// # Errors
    /// The file system's.
    async fn create_dir_all(&self, path: &Path) -> io::Result<()>;

    /// Makes a new file that nothing stood at before.
    ///
    /// # Errors
    /// The file system's.
    async fn create_new(&self, path: &Path) -> io::Result<Box<dyn HostFile>>;

    /// Opens a file for reading.
    ///
    /// # Errors
    /// The file system's.
    async fn open(&self, path: &Path) -> io::Result<Box<dyn HostFileReader>>;

    /// Renames a file, replacing one that stands at `to`.
    ///
    /// # Errors
    /// The file system's.
    async fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file.
    ///
    /// # Errors
    /// The file system's.
    async fn remove(&self, path: &Path) -> io::Result<()>;

    /// Removes a file without waiting, as well as it can be done; for the drop of a half-written one.
    fn remove_now(&self, path: &Path);

    /// Makes the names in a directory durable.
    ///
    /// # Errors
    /// The file system's.
    async fn sync_dir(&self, path: &Path) -> io::Result<()>;

    /// Lists the files of a directory, sorted.
    ///
    /// # Errors
    /// The file system's.
    async fn list(&self, path: &Path) -> io::Result<Vec<PathBuf>>;
}

/// A file being written.
#[async_trait]
pub trait HostFile: Send + fmt::Debug {
    /// Appends all of `bytes`.
    ///
    /// # Errors
    /// The file system's; any part may then have been written.
    async fn write_all(&mut self, bytes: Bytes) -> io::Result<()>;

    /// Makes the content durable.
    ///
    /// # Errors
    /// The file system's.
    async fn sync(&mut self) -> io::Result<()>;
}

/// A file being read. It stays as it was opened when another file takes its name.
#[async_trait]
pub trait HostFileReader: Send + Sync + fmt::Debug {
    /// Gives the size in bytes.
    ///
    /// # Errors
    /// The file system's.
    async fn size(&self) -> io::Result<u64>;

    /// Reads exactly `length` bytes from `offset` on.
    ///
    /// # Errors
    /// The file system's; `UnexpectedEof` where there are fewer.
    async fn read_at(&self, offset: u64, length: usize) -> io::Result<Bytes>;

    /// Gives the file itself, to be mapped, where there is one.
    fn file(&self) -> Option<&File> {
        None
    }
}

/// Bytes in memory are read like a file.
#[async_trait]
impl HostFileReader for Bytes {
    async fn size(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }

    async fn read_at(&self, offset: u64, length: usize) -> io::Result<Bytes> {
        let start = usize::try_from(offset).ok();
        let range = start.and_then(|start| Some(start..start.checked_add(length)?));
        let range = range.filter(|range| range.end <= self.len());
        range.map(|range| self.slice(range)).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }
}
