//! [`RunDir`]: where a run's files are, if need be on a disk that can be full; [`FillingFs`] fills it when that is due.

use super::RealFaults;
use async_trait::async_trait;
use bytes::Bytes;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};
use std::{
    ffi::CString,
    io,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};
use tempfile::TempDir;
use vm_core::{
    fault::FaultKind,
    host_fs::{HostFile, HostFileReader, HostFs, StdFs},
};

/// How much has room on a disk that is not full, in KiB: some snapshots of small machines.
const ROOM_KIB: u64 = 512 << 10;

/// The directory of a run.
#[derive(Debug)]
pub(in crate::target) struct RunDir {
    dir: TempDir,
    /// Whether it is a file system of its own.
    mounted: bool,
}

impl RunDir {
    /// Makes one on the disk for such files.
    pub(in crate::target) fn new() -> Result<Self, String> {
        let dir = tempfile::tempdir();
        let dir = dir.map_err(|error| format!("no directory for the run: {error}"))?;
        Ok(Self { dir, mounted: false })
    }

    /// Makes one that is a file system of its own, in memory.
    pub(in crate::target) fn that_can_be_full() -> Result<Self, String> {
        let mut dir = Self::new()?;
        let options = size(ROOM_KIB);
        mount("tmpfs", dir.path(), "tmpfs", MountFlags::NOSUID, options.as_deref())
            .map_err(|error| format!("no file system for the run: {error}"))?;
        dir.mounted = true;
        Ok(dir)
    }

    /// Whether this process may mount file systems.
    pub(in crate::target) fn can_be_full() -> bool {
        static CAN: OnceLock<bool> = OnceLock::new();
        *CAN.get_or_init(|| Self::that_can_be_full().is_ok())
    }

    pub(in crate::target) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Whether it is a file system of its own.
    pub(in crate::target) fn is_small(&self) -> bool {
        self.mounted
    }

    /// Makes it as large as what it holds.
    fn fill(&self) -> io::Result<()> {
        let about = rustix::fs::statvfs(self.path())?;
        self.resize((about.f_blocks - about.f_bfree) * (about.f_frsize >> 10))
    }

    fn make_room(&self) -> io::Result<()> {
        self.resize(ROOM_KIB)
    }

    fn resize(&self, kib: u64) -> io::Result<()> {
        // No size at all would be any size.
        let size = size(kib.max(4)).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(mount_remount(self.path(), MountFlags::NOSUID, &*size)?)
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        if self.mounted {
            // Whoever still has a file of it open keeps that alone.
            let _ = unmount(self.path(), UnmountFlags::DETACH);
        }
    }
}

fn size(kib: u64) -> Option<CString> {
    CString::new(format!("size={kib}k")).ok()
}

/// The real file system, on whose small disk there is no room for what is written when a full disk is due.
#[derive(Clone, Debug)]
pub(in crate::target) struct FillingFs {
    pub(in crate::target) dir: Arc<RunDir>,
    pub(in crate::target) faults: RealFaults,
}

#[async_trait]
impl HostFs for FillingFs {
    async fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        StdFs.create_dir_all(path).await
    }

    async fn create_new(&self, path: &Path) -> io::Result<Box<dyn HostFile>> {
        let file = StdFs.create_new(path).await?;
        if !path.starts_with(self.dir.path()) {
            return Ok(file);
        }
        Ok(Box::new(FillingFile { file, fs: self.clone() }))
    }

    async fn open(&self, path: &Path) -> io::Result<Box<dyn HostFileReader>> {
        StdFs.open(path).await
    }

    async fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        StdFs.rename(from, to).await
    }

    async fn remove(&self, path: &Path) -> io::Result<()> {
        StdFs.remove(path).await
    }

    fn remove_now(&self, path: &Path) {
        StdFs.remove_now(path);
    }

    async fn sync_dir(&self, path: &Path) -> io::Result<()> {
        StdFs.sync_dir(path).await
    }

    async fn list(&self, path: &Path) -> io::Result<Vec<PathBuf>> {
        StdFs.list(path).await
    }
}

#[derive(Debug)]
struct FillingFile {
    file: Box<dyn HostFile>,
    fs: FillingFs,
}

#[async_trait]
impl HostFile for FillingFile {
    async fn write_all(&mut self, bytes: Bytes) -> io::Result<()> {
        let FillingFs { dir, faults } = &self.fs;
        if !dir.is_small() || faults.strike(FaultKind::HostDiskFull, None).is_none() {
            return self.file.write_all(bytes).await;
        }
        dir.fill()?;
        let written = self.file.write_all(bytes).await;
        dir.make_room()?;
        written
    }

    async fn sync(&mut self) -> io::Result<()> {
        self.file.sync().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_disk_is_full_and_has_room_again() {
        let Ok(disk) = RunDir::that_can_be_full() else {
            // Mounting is not for everybody; the fault is then one that cannot be made to happen.
            assert!(!RunDir::can_be_full());
            return;
        };
        assert!(disk.is_small() && RunDir::can_be_full());
        let path = disk.path().to_owned();
        fs::write(path.join("before"), vec![1; 100_000]).unwrap();
        disk.fill().unwrap();
        let error = fs::write(path.join("full"), vec![1; 100_000]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        disk.make_room().unwrap();
        fs::write(path.join("after"), vec![1; 100_000]).unwrap();
        assert_eq!(fs::read(path.join("before")).unwrap(), vec![1; 100_000]);
        drop(disk);
        assert!(!path.exists());
    }
}
