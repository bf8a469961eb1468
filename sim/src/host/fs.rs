//! The host's file system as the core sees it, with faults.

use super::{HostState, shares::OpenAt};
use crate::{fault::Vms, ledger::Held, rng::Purpose, trace::Tag, world::World};
use async_trait::async_trait;
use bytes::Bytes;
use std::{
    fmt, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use vm_core::{
    fault::FaultKind,
    host_fs::{HostFile, HostFileReader, HostFs},
};

/// The file system of the simulated host.
#[derive(Clone)]
pub struct SimHostFs {
    world: Arc<World>,
}

impl SimHostFs {
    pub(crate) fn new(world: Arc<World>) -> Self {
        Self { world }
    }

    async fn enter(&self) {
        self.world.enter().await;
        self.world.die_if_due();
    }
}

#[async_trait]
impl HostFs for SimHostFs {
    async fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        self.enter().await;
        self.world.host().create_dir_all(path)
    }

    async fn create_new(&self, path: &Path) -> io::Result<Box<dyn HostFile>> {
        self.enter().await;
        let (at, life) = {
            let mut host = self.world.host();
            (host.create_file(path)?, host.losses)
        };
        self.world
            .note(None, Tag::HostFile, &[0, at.number()], || format!("create {}", path.display()));
        Ok(Box::new(Open::new(&self.world, at, life)))
    }

    async fn open(&self, path: &Path) -> io::Result<Box<dyn HostFileReader>> {
        self.enter().await;
        let (at, life, restoring) = {
            let mut host = self.world.host();
            (host.open_file(path)?, host.losses, host.restoring.clone())
        };
        let open = Open::new(&self.world, at.clone(), life);
        // Whatever else is opened for reading is a state to be restored or verified.
        let OpenAt::Disk(inode) = at else { return Ok(Box::new(open)) };
        if self.world.strike(FaultKind::BitRot, Vms::Any(&restoring)).is_some() {
            let mut draw = |bound| self.world.streams.below(Purpose::HostDisk, bound);
            let flipped = self.world.host().disk.flip_bit(inode, &mut draw)?;
            self.world.note(None, Tag::HostFile, &[1, inode, flipped.unwrap_or(0)], || {
                format!("bit {flipped:?} of {} changes", path.display())
            });
        }
        Ok(Box::new(open))
    }

    async fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.enter().await;
        self.world.host().rename(from, to)?;
        self.world.note(None, Tag::HostFile, &[2], || {
            format!("rename {} to {}", from.display(), to.display())
        });
        Ok(())
    }

    async fn remove(&self, path: &Path) -> io::Result<()> {
        self.enter().await;
        self.world.host().remove(path)?;
        self.world.note(None, Tag::HostFile, &[3], || format!("remove {}", path.display()));
        Ok(())
    }

    fn remove_now(&self, path: &Path) {
        let removed = self.world.host().remove(path).is_ok();
        self.world.note(None, Tag::HostFile, &[4, u64::from(removed)], || {
            format!("remove {} at once", path.display())
        });
    }

    async fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.enter().await;
        self.world.host().sync_dir(path)
    }

    async fn list(&self, path: &Path) -> io::Result<Vec<PathBuf>> {
        self.enter().await;
        self.world.host().list(path)
    }
}

impl fmt::Debug for SimHostFs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SimHostFs")
    }
}

/// An open file.
struct Open {
    world: Arc<World>,
    at: OpenAt,
    /// The host's losses when it was opened.
    life: u64,
    _held: Held,
}

impl Open {
    fn new(world: &Arc<World>, at: OpenAt, life: u64) -> Self {
        Self { world: Arc::clone(world), at, life, _held: world.counters.host_files.hold() }
    }

    fn on_disk<T>(&self, act: impl FnOnce(&mut HostState) -> io::Result<T>) -> io::Result<T> {
        let mut host = self.world.host();
        if host.losses != self.life {
            return Err(io::Error::other("the host was lost"));
        }
        act(&mut host)
    }

    fn append(&self, bytes: &Bytes) -> io::Result<()> {
        let capacity = self.world.limits.disk_bytes;
        self.on_disk(|host| host.append(&self.at, bytes, capacity))
    }

    /// Gives a drawn part of what was to be written.
    fn part(&self, bytes: &Bytes) -> Bytes {
        bytes.slice(..self.world.streams.index(Purpose::HostDisk, bytes.len()))
    }
}

#[async_trait]
impl HostFile for Open {
    async fn write_all(&mut self, bytes: Bytes) -> io::Result<()> {
        self.world.enter().await;
        self.world.die_if_due();
        let may = |kind| self.world.faults.may(kind);
        if may(FaultKind::HostDiskFull) || may(FaultKind::TornWrite) {
            let saving = self.world.host().saving.clone();
            // Imports and merges write for no machine.
            let vms = Vms::Any(&saving);
            if self.world.strike(FaultKind::HostDiskFull, vms).is_some() {
                self.append(&self.part(&bytes))?;
                return Err(io::ErrorKind::StorageFull.into());
            }
            if self.world.strike(FaultKind::TornWrite, vms).is_some() {
                self.append(&self.part(&bytes))?;
                self.world.lose_host();
                return Err(io::Error::other("the host was lost"));
            }
        }
        self.append(&bytes)
    }

    async fn sync(&mut self) -> io::Result<()> {
        self.world.enter().await;
        self.world.die_if_due();
        let saving = self.world.host().saving.clone();
        if let Some(fired) = self.world.strike(FaultKind::LostSync, Vms::Any(&saving)) {
            let later = fired.amount(Duration::from_millis(1), Duration::from_secs(2));
            self.on_disk(|host| match self.at {
                OpenAt::Disk(inode) => host.disk.lose_sync(inode),
                OpenAt::Share(..) => Ok(()),
            })?;
            self.world.die_at(self.world.now() + later);
            return Ok(());
        }
        self.on_disk(|host| host.sync(&self.at))
    }
}

#[async_trait]
impl HostFileReader for Open {
    async fn size(&self) -> io::Result<u64> {
        self.world.enter().await;
        self.on_disk(|host| host.len(&self.at))
    }

    async fn read_at(&self, offset: u64, length: usize) -> io::Result<Bytes> {
        self.world.enter().await;
        self.world.die_if_due();
        self.on_disk(|host| host.read(&self.at, offset, length))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let _ = self.on_disk(|host| {
            host.close(&self.at);
            Ok(())
        });
    }
}

impl fmt::Debug for Open {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Open").field("at", &self.at).finish_non_exhaustive()
    }
}
