//! The directories of the host that guests mount, or have as their roots.

use super::HostState;
use crate::guest::{ProgramRegistry, RootInHand, SharedDir, SimOs};
use bytes::Bytes;
use std::{
    io,
    path::{Path, PathBuf},
};
use vm_core::{
    machine::MachineError,
    shared_root::{self, Entry},
};
use vm_planted_bugs::{Bug, planted};
use vm_trait::VmConfig;

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

/// A directory of the host that a guest has.
#[derive(Clone, Copy, Debug)]
struct Share<'a> {
    path: &'a Path,
    read_only: bool,
}

/// Lists the directories of the host that a guest has, a root that is shared before all others.
fn shared_by(config: &VmConfig) -> impl Iterator<Item = Share<'_>> {
    let read_only = config.root.read_only && !planted(Bug::SharedRootIsWritable);
    let root = config.root.shared_directory().map(|path| Share { path, read_only });
    let mounts = config.mounts.iter();
    let mounts = mounts.map(|it| Share { path: &it.path, read_only: it.read_only });
    root.into_iter().chain(mounts)
}

impl HostState {
    /// Checks that the directories that a machine is to have are there.
    pub(crate) fn check_shares(&self, config: &VmConfig) -> Result<(), MachineError> {
        let paths: Vec<&Path> = shared_by(config).map(|share| share.path).collect();
        for (index, path) in paths.iter().copied().enumerate() {
            let flaw = |reason: &str| MachineError::Config {
                field: match index.checked_sub(paths.len() - config.mounts.len()) {
                    Some(mount) => format!("mounts[{mount}].path"),
                    None => "root.source".to_owned(),
                },
                reason: format!("{}: {reason}", path.display()),
            };
            if self.shares.contains_key(path) {
                continue;
            }
            if self.share_of(path).is_some() {
                return Err(flaw(
                    "within a directory that is mounted; the simulator takes that one only",
                ));
            }
            if !self.disk.has_dir(path) {
                return Err(flaw("no such directory"));
            }
            let around = self.shares.keys().any(|share| share.starts_with(path));
            let clashes = |other: &&Path| other.starts_with(path) || path.starts_with(other);
            if around || paths[..index].iter().any(clashes) {
                return Err(flaw(
                    "around or within another one; the simulator takes one of them only",
                ));
            }
        }
        shared_root::check(config, |path| self.entry(path))
    }

    /// Says what is at a path.
    fn entry(&self, path: &Path) -> Entry {
        if let Some((share, below)) = self.share_of(path) {
            return self.shares.get(share).map_or(Entry::Missing, |dir| dir.entry(&below));
        }
        if self.disk.has_dir(path) {
            Entry::Directory
        } else if self.disk.has_file(path) {
            Entry::Other
        } else {
            Entry::Missing
        }
    }

    /// Makes a directory that holds what guests with these programs begin with.
    pub(super) fn make_guest_root(
        &mut self,
        path: &Path,
        programs: &ProgramRegistry,
    ) -> io::Result<()> {
        let near = |share: &PathBuf| share.starts_with(path) || path.starts_with(share);
        if self.entry(path) != Entry::Missing || self.shares.keys().any(near) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        self.disk.create_dir_all(path)?;
        self.shares.insert(path.to_path_buf(), SharedDir::guest_root(programs));
        Ok(())
    }

    /// Gives the directory of a shared root, and the room that the host has beside what is in it.
    pub(crate) fn root_in_hand(
        &mut self,
        config: &VmConfig,
        capacity: u64,
    ) -> Option<RootInHand<'_>> {
        let room = capacity.saturating_sub(self.used());
        let root = shared_by(config).next().filter(|_| config.root.shared_directory().is_some())?;
        let dir = self.shares.get_mut(root.path)?;
        Some(RootInHand { dir, read_only: root.read_only, room })
    }

    /// Makes directories ones that guests have.
    pub(crate) fn share(&mut self, config: &VmConfig) -> Result<(), MachineError> {
        self.check_shares(config)?;
        for Share { path, .. } in shared_by(config) {
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
            self.shares.insert(path.to_path_buf(), dir);
        }
        Ok(())
    }

    /// Puts what a guest has of the host into its hands.
    pub(crate) fn give_shares(&mut self, config: &VmConfig, os: &mut SimOs, capacity: u64) {
        let room = capacity.saturating_sub(self.used());
        for (index, share) in shared_by(config).enumerate() {
            if let Some(dir) = self.shares.get_mut(share.path) {
                os.give_share(index, dir, share.read_only, room);
            }
        }
    }

    /// Takes what a guest has of the host back.
    pub(crate) fn take_shares(&mut self, config: &VmConfig, os: &mut SimOs) {
        for (index, share) in shared_by(config).enumerate() {
            if let Some(dir) = self.shares.get_mut(share.path) {
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
