//! The directories of the host that guests mount.

use super::HostState;
use crate::guest::{SharedDir, SimOs};
use bytes::Bytes;
use std::{
    io,
    path::{Path, PathBuf},
};
use vm_core::machine::MachineError;
use vm_trait::MountConfig;

/// A file of the host that is open.
#[derive(Clone, Debug)]
pub(super) enum OpenAt {
    /// On the disk, by its number.
    Disk(u64),
    /// In a directory that guests mount, by its number there.
    Share(PathBuf, u32),
}

impl OpenAt {
    pub(super) fn number(&self) -> u64 {
        match self {
            Self::Disk(number) => *number,
            Self::Share(_, number) => u64::from(*number),
        }
    }
}

impl HostState {
    /// Checks that the directories that a machine is to mount are there.
    pub(crate) fn check_mounts(&self, mounts: &[MountConfig]) -> Result<(), MachineError> {
        for (index, mount) in mounts.iter().enumerate() {
            let flaw = |reason: &str| MachineError::Config {
                field: format!("mounts[{index}].path"),
                reason: format!("{}: {reason}", mount.path.display()),
            };
            if self.shares.contains_key(&mount.path) {
                continue;
            }
            if self.share_of(&mount.path).is_some() {
                return Err(flaw(
                    "within a directory that is mounted; the simulator takes that one only",
                ));
            }
            if !self.disk.has_dir(&mount.path) {
                return Err(flaw("no such directory"));
            }
            let within = self.shares.keys().find(|path| path.starts_with(&mount.path));
            let listed = mounts[..index].iter().map(|it| &it.path);
            let clashes =
                |path: &&PathBuf| path.starts_with(&mount.path) || mount.path.starts_with(path);
            if within.or_else(|| listed.into_iter().find(clashes)).is_some() {
                return Err(flaw(
                    "around or within another one; the simulator takes one of them only",
                ));
            }
        }
        Ok(())
    }

    /// Makes directories ones that guests mount.
    pub(crate) fn share(&mut self, mounts: &[MountConfig]) -> Result<(), MachineError> {
        self.check_mounts(mounts)?;
        for MountConfig { path, .. } in mounts {
            if self.shares.contains_key(path) {
                continue;
            }
            let mut dir = SharedDir::default();
            for (name, content) in self.disk.take_tree(path) {
                let moved = match content {
                    None => dir.make_dirs(&name),
                    Some(content) => dir.create(&name).and_then(|file| {
                        dir.append(file, &content, u64::MAX)?;
                        dir.sync(file);
                        Ok(())
                    }),
                };
                moved.map_err(|error| MachineError::HostIo {
                    path: path.join(&name).display().to_string(),
                    reason: error.to_string(),
                })?;
            }
            self.shares.insert(path.clone(), dir);
        }
        Ok(())
    }

    /// Puts what a guest mounts into its hands.
    pub(crate) fn give_shares(&mut self, mounts: &[MountConfig], os: &mut SimOs, capacity: u64) {
        let room = capacity.saturating_sub(self.used());
        for (index, mount) in mounts.iter().enumerate() {
            if let Some(dir) = self.shares.get_mut(&mount.path) {
                os.give_share(index, dir, mount.read_only, room);
            }
        }
    }

    /// Takes what a guest mounts back.
    pub(crate) fn take_shares(&mut self, mounts: &[MountConfig], os: &mut SimOs) {
        for (index, mount) in mounts.iter().enumerate() {
            if let Some(dir) = self.shares.get_mut(&mount.path) {
                os.take_share(index, dir);
            }
        }
    }

    /// Counts the bytes that are in use of the disk.
    pub(crate) fn used(&self) -> u64 {
        self.disk.used() + self.shares.values().map(SharedDir::used).sum::<u64>()
    }

    /// Gives the directory that guests mount that a path is in, and the path in it.
    fn share_of(&self, path: &Path) -> Option<(&PathBuf, PathBuf)> {
        let share = self.shares.keys().find(|share| path.starts_with(share))?;
        Some((share, path.strip_prefix(share).ok()?.to_path_buf()))
    }

    fn share_mut(&mut self, path: &Path) -> Option<(PathBuf, &mut SharedDir, PathBuf)> {
        let (share, below) = self.share_of(path)?;
        let share = share.clone();
        let dir = self.shares.get_mut(&share)?;
        Some((share, dir, below))
    }

    // The file system, on the disk and in these directories.

    pub(super) fn create_dir_all(&mut self, path: &Path) -> io::Result<()> {
        match self.share_mut(path) {
            Some((_, dir, below)) => dir.make_dirs(&below),
            None => self.disk.create_dir_all(path),
        }
    }

    pub(super) fn create_file(&mut self, path: &Path) -> io::Result<OpenAt> {
        match self.share_mut(path) {
            Some((share, dir, below)) => Ok(OpenAt::Share(share, dir.create(&below)?)),
            None => Ok(OpenAt::Disk(self.disk.create(path)?)),
        }
    }

    pub(super) fn open_file(&mut self, path: &Path) -> io::Result<OpenAt> {
        match self.share_mut(path) {
            Some((share, dir, below)) => Ok(OpenAt::Share(share, dir.open(&below)?)),
            None => Ok(OpenAt::Disk(self.disk.open(path)?)),
        }
    }

    pub(super) fn close(&mut self, at: &OpenAt) {
        if let OpenAt::Disk(number) = at {
            self.disk.close(*number);
        }
    }

    pub(super) fn append(&mut self, at: &OpenAt, bytes: &Bytes, capacity: u64) -> io::Result<()> {
        let others = self.used() - self.disk.used();
        let room = capacity.saturating_sub(self.used());
        match at {
            OpenAt::Disk(number) => {
                self.disk.append(*number, bytes, capacity.saturating_sub(others))
            }
            OpenAt::Share(share, file) => self.dir(share)?.append(*file, bytes, room),
        }
    }

    pub(super) fn sync(&mut self, at: &OpenAt) -> io::Result<()> {
        match at {
            OpenAt::Disk(number) => self.disk.sync(*number),
            OpenAt::Share(share, file) => {
                self.dir(share)?.sync(*file);
                Ok(())
            }
        }
    }

    pub(super) fn len(&mut self, at: &OpenAt) -> io::Result<u64> {
        match at {
            OpenAt::Disk(number) => self.disk.len(*number),
            OpenAt::Share(share, file) => self.dir(share)?.len(*file),
        }
    }

    pub(super) fn read(&mut self, at: &OpenAt, offset: u64, length: usize) -> io::Result<Bytes> {
        match at {
            OpenAt::Disk(number) => self.disk.read(*number, offset, length),
            OpenAt::Share(share, file) => self.dir(share)?.read(*file, offset, length),
        }
    }

    pub(super) fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        let (share, other) = (self.share_of(from), self.share_of(to));
        match (share, other) {
            (None, None) => self.disk.rename(from, to),
            (Some((one, below)), Some((other, to))) if one == other => {
                let one = one.clone();
                self.dir(&one)?.rename(&below, &to)
            }
            _ => Err(io::ErrorKind::CrossesDevices.into()),
        }
    }

    pub(super) fn remove(&mut self, path: &Path) -> io::Result<()> {
        match self.share_mut(path) {
            Some((_, dir, below)) => dir.remove(&below),
            None => self.disk.remove(path),
        }
    }

    pub(super) fn sync_dir(&mut self, path: &Path) -> io::Result<()> {
        match self.share_mut(path) {
            // Names are durable with the first file that is.
            Some((_, dir, below)) => {
                dir.list(&below)?;
                dir.sync_names();
                Ok(())
            }
            None => self.disk.sync_dir(path),
        }
    }

    pub(super) fn list(&mut self, path: &Path) -> io::Result<Vec<PathBuf>> {
        match self.share_mut(path) {
            Some((_, dir, below)) => {
                Ok(dir.list(&below)?.into_iter().map(|name| path.join(name)).collect())
            }
            None => self.disk.list(path),
        }
    }

    fn dir(&mut self, share: &Path) -> io::Result<&mut SharedDir> {
        self.shares.get_mut(share).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}
