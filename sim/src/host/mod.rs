//! [`SimHost`]: the simulated host with its limits, its disk and its loopback ports.

mod disk;
mod fs;
mod shares;
mod tcp;

pub use fs::SimHostFs;
pub(crate) use tcp::Target;
pub use tcp::{SimTcpListener, SimTcpStream};

use crate::{
    guest::{DiskImage, SharedDir},
    rng::Purpose,
    world::World,
};
use bytes::Bytes;
use disk::Disk;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, io,
    path::{Path, PathBuf},
    sync::Arc,
};
use tcp::TcpPorts;
use vm_core::machine::MachineError;
use vm_trait::{DiskConfig, Mib, VmId};

/// The device that takes no byte, as on Linux.
const FULL: &str = "/dev/full";

/// What the simulated host offers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct SimHostLimits {
    /// The most machines at a time. Default 4,096.
    pub machines: u32,
    /// The most memory of all machines together. Default 1 TiB.
    pub memory: Mib,
    /// The most vCPUs of one machine. Default 64.
    pub vcpus_per_machine: u8,
    /// The most memory of one machine. Default 64 GiB.
    pub memory_per_machine: Mib,
    /// How many bytes the disk holds. Default 1 TiB.
    pub disk_bytes: u64,
}

impl Default for SimHostLimits {
    fn default() -> Self {
        Self {
            machines: 4096,
            memory: Mib(1 << 20),
            vcpus_per_machine: 64,
            memory_per_machine: Mib(64 << 10),
            disk_bytes: 1 << 40,
        }
    }
}

impl SimHostLimits {
    /// Sets how many machines there may be at a time.
    #[must_use]
    pub fn with_machines(mut self, machines: u32) -> Self {
        self.machines = machines;
        self
    }

    /// Sets how much memory all machines may have together.
    #[must_use]
    pub fn with_memory(mut self, memory: Mib) -> Self {
        self.memory = memory;
        self
    }

    /// Sets how many bytes the disk holds.
    #[must_use]
    pub fn with_disk_bytes(mut self, bytes: u64) -> Self {
        self.disk_bytes = bytes;
        self
    }
}

/// The simulated host.
#[derive(Clone)]
pub struct SimHost(pub(crate) Arc<World>);

impl SimHost {
    /// Gives its file system. A directory that machines are to mount is made there first.
    #[must_use]
    pub fn fs(&self) -> SimHostFs {
        SimHostFs::new(Arc::clone(&self.0))
    }

    /// Loses the host: all machines die, and of its disk there remains what was durable, and a drawn part of what was
    /// not. The host is back at once.
    pub fn crash(&self) {
        self.0.lose_host();
    }

    /// Counts how often the host was lost.
    #[must_use]
    pub fn losses(&self) -> u64 {
        self.0.host().losses
    }

    /// Lists the files on its disk, guests' disks and the directories that guests mount excepted.
    #[must_use]
    pub fn files(&self) -> Vec<PathBuf> {
        self.0.host().disk.files()
    }

    /// Counts the bytes that those files take.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.0.host().used()
    }

    /// Makes a directory that can be a guest's [shared](vm_trait::RootSource::Shared) root: it holds the files and
    /// programs that guests have else. What it stands in is made too.
    ///
    /// # Errors
    /// `AlreadyExists`, also within and around directories that guests have; `NotADirectory`.
    pub fn make_guest_root(&self, path: &Path) -> io::Result<()> {
        self.0.host().make_guest_root(path, &self.0.programs)
    }

    /// Changes one bit of a file for good; the seed decides which, and it is given back, where the file has any.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn rot(&self, path: &Path) -> io::Result<Option<u64>> {
        let mut host = self.0.host();
        let file = host.disk.open(path)?;
        let flipped = host.disk.flip_bit(file, &mut |n| self.0.streams.below(Purpose::HostDisk, n));
        host.disk.close(file);
        flipped
    }

    /// Lists the guests' disks.
    #[must_use]
    pub fn guest_disks(&self) -> Vec<PathBuf> {
        self.0.host().guest_disks.keys().cloned().collect()
    }
}

impl fmt::Debug for SimHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimHost").field("limits", &self.0.limits).finish_non_exhaustive()
    }
}

/// What the host holds.
#[derive(Debug, Default)]
pub(crate) struct HostState {
    disk: Disk,
    guest_disks: BTreeMap<PathBuf, GuestDisk>,
    /// The directories that guests mount or did mount, by their paths; none is within another.
    shares: BTreeMap<PathBuf, SharedDir>,
    pub(crate) tcp: TcpPorts,
    machines: u32,
    memory: u64,
    /// Counts the host's losses; what was opened before one is gone.
    losses: u64,
    /// VMs that are being saved, and restored.
    pub(crate) saving: BTreeSet<VmId>,
    pub(crate) restoring: BTreeSet<VmId>,
}

#[derive(Debug, Default)]
struct GuestDisk {
    image: DiskImage,
    size: Mib,
    writers: u32,
    readers: u32,
}

impl HostState {
    /// Makes a host whose disk holds an empty directory for snapshots.
    pub(crate) fn new(snapshots: &Path) -> Self {
        let mut host = Self::default();
        // It cannot fail: nothing stands in the way on an empty disk.
        let _ = host.disk.create_dir_all(snapshots);
        host
    }

    /// Finds room for a machine.
    pub(crate) fn reserve(
        &mut self,
        limits: &SimHostLimits,
        memory: Mib,
    ) -> Result<(), MachineError> {
        if self.machines >= limits.machines {
            return Err(MachineError::Exhausted("machines".to_owned()));
        }
        if self.memory + memory.bytes() > limits.memory.bytes() {
            return Err(MachineError::Exhausted("memory".to_owned()));
        }
        self.machines += 1;
        self.memory += memory.bytes();
        Ok(())
    }

    pub(crate) fn release(&mut self, memory: Mib) {
        self.machines = self.machines.saturating_sub(1);
        self.memory = self.memory.saturating_sub(memory.bytes());
    }

    /// Attaches a guest's disk, making it where it is missing, and gives what is on it and its size.
    pub(crate) fn attach(&mut self, config: &DiskConfig) -> Result<(DiskImage, Mib), MachineError> {
        let refuse = |reason: &str| {
            let path = config.path.display().to_string();
            Err(MachineError::HostIo { path, reason: reason.to_owned() })
        };
        if config.read_only && !self.guest_disks.contains_key(&config.path) {
            return refuse("no such disk, and a read-only one is not made");
        }
        let disk = self
            .guest_disks
            .entry(config.path.clone())
            .or_insert_with(|| GuestDisk { size: config.size, ..GuestDisk::default() });
        if disk.writers > 0 || (!config.read_only && disk.readers > 0) {
            return refuse("in use by another machine");
        }
        if config.read_only {
            disk.readers += 1;
        } else {
            disk.writers += 1;
        }
        Ok((disk.image.clone(), disk.size))
    }

    /// Takes a guest's disk back, with what it holds now where the guest could write.
    pub(crate) fn detach(&mut self, config: &DiskConfig, image: Option<DiskImage>) {
        let Some(disk) = self.guest_disks.get_mut(&config.path) else { return };
        if config.read_only {
            disk.readers = disk.readers.saturating_sub(1);
            return;
        }
        disk.writers = disk.writers.saturating_sub(1);
        if let Some(image) = image {
            disk.image = image;
        }
    }

    /// Makes the file of a console, where it is not there.
    pub(crate) fn begin_console(&mut self, path: &Path) -> io::Result<()> {
        if path != Path::new(FULL) {
            let file = self.disk.open_or_create(path)?;
            self.disk.close(file);
        }
        Ok(())
    }

    /// Appends to the file of a console, as much as fits.
    pub(crate) fn append_console(
        &mut self,
        path: &Path,
        bytes: &Bytes,
        limits: &SimHostLimits,
    ) -> io::Result<()> {
        if path == Path::new(FULL) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let file = self.disk.open_or_create(path)?;
        let appended = self.disk.append(file, bytes, limits.disk_bytes);
        self.disk.close(file);
        appended
    }

    /// Loses what is not durable. What it gives is to be dropped when the host is not locked any more.
    pub(crate) fn crash(&mut self, draw: &mut dyn FnMut(u64) -> u64) -> Vec<SimTcpStream> {
        self.losses += 1;
        self.disk.crash(draw);
        self.shares.values_mut().for_each(SharedDir::crash);
        self.tcp.crash()
    }

    pub(crate) fn temporary_files(&self) -> u64 {
        self.disk.temporary_files()
    }
}
