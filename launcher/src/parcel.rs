//! What a machine is made of, and how a launcher is sent it.

use crate::{
    control::{ConsoleDevice, DiskSetUp, MachineSetUp, ShareSetUp, ToLauncher},
    files,
    images::{self, Images, KernelTraits, Prepared},
    life::{Life, host},
    machine::name_of,
    passt,
    program::{LauncherKind, LauncherProgram, Started},
    ring::ConsoleRing,
};
use std::{
    fs::File,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
};
use tokio::task::spawn_blocking;
use vm_core::machine::{MachineError, MachineSpec};
use vm_guest_image::Need;
use vm_guest_protocol::boot::{BootConfig, BootDisk, BootRoot, BootShare};
use vm_trait::{DiskConfig, HostLimits, Mib, NetworkConfig, RootSource, VmConfig};

/// The most vCPUs that a launcher gives a machine.
pub const MAX_VCPUS: u8 = 8;

/// The guest's vsock address. Each machine has a device of its own, so that all can have the same.
const GUEST_CID: u32 = 3;

/// How much of a console is appended to a file in one life.
const CONSOLE_FILE_LIMIT: u64 = 64 << 20;

/// The serial string of the device with the root image.
const ROOT_SERIAL: &str = "root";

/// Starts launchers of one kind and has them make machines.
#[derive(Clone, Debug)]
pub struct Maker {
    /// The kind.
    pub kind: &'static LauncherKind,
    /// The program.
    pub launcher: LauncherProgram,
    /// What machines boot from.
    pub images: Arc<Images>,
    /// The passt of machines whose network needs one. Default [`passt::find`].
    pub passt: Option<PathBuf>,
}

impl Maker {
    /// Checks that what a network needs of kernel and host is there, and gives the passt that it needs, if it needs one.
    ///
    /// # Errors
    /// [`MachineError::Config`] for `network`.
    pub fn passt_for(
        &self,
        kernel: KernelTraits,
        network: &NetworkConfig,
    ) -> Result<Option<PathBuf>, MachineError> {
        images::check_network(kernel, network)?;
        if !matches!(network, NetworkConfig::Passt(_)) {
            return Ok(None);
        }
        let found = passt::find(self.passt.as_deref()).map_err(|error| MachineError::Config {
            field: "network".to_owned(),
            reason: error.to_string(),
        })?;
        Ok(Some(found))
    }

    /// Starts a launcher that says hello, and describes nothing to it.
    ///
    /// # Errors
    /// When it cannot be started, or as [`Life::begin`].
    pub async fn start_bare(&self, spec: &MachineSpec) -> Result<Arc<Life>, MachineError> {
        let (maker, config) = (self.clone(), spec.config.clone());
        let started = spawn_blocking(move || start(&maker, &config)).await;
        let started = started.map_err(|error| MachineError::Failed(error.to_string()))?;
        let (started, ring) = started?;
        Life::begin(started, ring).await
    }

    /// Starts a launcher and has it make the machine. When the future is dropped, nothing is left of it.
    ///
    /// # Errors
    /// [`MachineError::Config`] and others.
    pub async fn make(&self, spec: &MachineSpec) -> Result<Arc<Life>, MachineError> {
        let (maker, config, name) = (self.clone(), spec.config.clone(), name_of(spec));
        // What it made is dropped, and so ended, when this future is dropped.
        let made = spawn_blocking(move || Made::new(&maker, &config, name)).await;
        let made = made.map_err(|error| MachineError::Failed(error.to_string()))??;
        let Made { started, ring, parcel } = made;
        let ring_file = ring.file().try_clone_to_owned().map_err(|error| host(&error))?;
        let life = Life::begin(started, ring).await?;
        let mut doomed = Doomed(Some(life.clone()));
        let (message, fds) = parcel.packet(ring_file.as_fd());
        life.set_up(&message, &fds).await?;
        doomed.0 = None;
        Ok(life)
    }
}

/// Kills a launcher whose machine is not made.
struct Doomed(Option<Arc<Life>>);

impl Drop for Doomed {
    fn drop(&mut self) {
        if let Some(life) = self.0.take() {
            life.kill();
        }
    }
}

/// What a machine is made of, before the first word with its launcher.
struct Made {
    started: Started,
    ring: ConsoleRing,
    parcel: Parcel,
}

/// What a launcher is sent.
struct Parcel {
    set_up: MachineSetUp,
    prepared: Prepared,
    user_initrd: Option<File>,
    boot_part: OwnedFd,
    console_file: Option<File>,
    disks: Vec<File>,
    shares: Vec<OwnedFd>,
}

/// What guest and launcher are told of the host's directories, with the directories.
type Shares = (Vec<BootShare>, Vec<(ShareSetUp, OwnedFd)>);

/// Opens the host's directories of a configuration, the root before all others; the guest knows its name.
fn shares_of(config: &VmConfig) -> Result<Shares, MachineError> {
    let mut boot = Vec::new();
    let mut shares = Vec::new();
    if let Some(path) = config.root.shared_directory() {
        let (name, read_only) = (BootShare::ROOT.to_owned(), config.root.read_only);
        shares.push((ShareSetUp { name, read_only }, files::open_shared_root(path)?));
    }
    for (index, mount) in config.mounts.iter().enumerate() {
        let (name, read_only) = (BootShare::name_of(index), mount.read_only);
        boot.push(BootShare { name: name.clone(), mount: mount.mount.clone(), read_only });
        shares.push((ShareSetUp { name, read_only }, files::open_mount(index, &mount.path)?));
    }
    Ok((boot, shares))
}

impl Made {
    fn new(maker: &Maker, config: &VmConfig, name: String) -> Result<Self, MachineError> {
        // First, so that it comes up while the rest is made.
        let (started, ring) = start(maker, config)?;
        Ok(Self { started, ring, parcel: Parcel::new(maker, config, name)? })
    }
}

impl Parcel {
    fn new(maker: &Maker, config: &VmConfig, name: String) -> Result<Self, MachineError> {
        let (root_dir, root_image) = match &config.root.source {
            RootSource::BuiltIn | RootSource::Shared(_) => (None, None),
            RootSource::Directory(path) => (Some(path.as_path()), None),
            RootSource::Image(path) => (None, Some(path.as_path())),
            _ => return Err(MachineError::Unsupported("this kind of root".to_owned())),
        };
        let prepared = maker.images.prepare(config.kernel.path.as_deref(), root_dir)?;
        let passt = maker.passt_for(prepared.traits, &config.network)?;
        let mut devices = Devices::default();
        let mut needs = vec![Need::Vsock, Need::Entropy];
        let root = match root_image {
            Some(path) => devices.add_root(path, config.root.read_only, &mut needs)?,
            None if config.root.shared_directory().is_some() => {
                BootRoot::Shared { read_only: config.root.read_only }
            }
            None => BootRoot::Initial { read_only: config.root.read_only },
        };
        let disks = devices.add_disks(config, &mut needs)?;
        let (boot_shares, shares) = shares_of(config)?;
        if !shares.is_empty() {
            needs.push(Need::Shares);
        }
        needs.extend(passt.as_ref().map(|_| Need::Network));
        let modules = prepared.image.modules();
        if let Some(need) = needs.iter().find(|need| !modules.supports(**need)) {
            let reason = format!("neither the kernel nor its modules have what {need:?} needs");
            return Err(MachineError::Config { field: "kernel.path".to_owned(), reason });
        }
        let boot = BootConfig {
            hostname: config.hostname.clone(),
            modules: prepared.image.modules_for(&needs),
            root,
            disks,
            shares: boot_shares,
            network: passt.as_ref().map(|_| passt::GUEST_NETWORK),
        };
        let part = prepared.image.part_for(&boot);
        let boot_part = part.map_err(|error| MachineError::Failed(error.to_string()))?;
        let user_initrd = config.kernel.initrd.as_deref().map(files::open_initrd).transpose()?;
        let console_file = config.console_file.as_deref().map(files::open_console_file);
        let console_file = console_file.transpose()?;
        let set_up = MachineSetUp {
            cmdline: config.kernel.cmdline.clone(),
            console_device: match prepared.traits.drives_serial_port {
                true => ConsoleDevice::SerialPort,
                false => ConsoleDevice::Virtio,
            },
            devices_in_cmdline: !prepared.traits.finds_devices_by_acpi
                || turns_acpi_off(&config.kernel.cmdline),
            initrd_parts: 2 + u8::from(user_initrd.is_some()),
            disks: devices.set_ups,
            shares: shares.iter().map(|(set_up, _)| set_up.clone()).collect(),
            passt: passt.map(PathBuf::into_os_string),
            ..plain_set_up(config, name, console_file.is_some())
        };
        let disks = devices.files;
        let shares = shares.into_iter().map(|(_, directory)| directory).collect();
        Ok(Self { set_up, prepared, user_initrd, boot_part, console_file, disks, shares })
    }

    fn packet<'a>(&'a self, ring: BorrowedFd<'a>) -> (ToLauncher, Vec<BorrowedFd<'a>>) {
        let mut fds = vec![self.prepared.kernel.as_fd()];
        // The user's comes first, so that the files of the others win.
        fds.extend(self.user_initrd.as_ref().map(AsFd::as_fd));
        fds.extend([self.prepared.image.file(), self.boot_part.as_fd(), ring]);
        fds.extend(self.console_file.as_ref().map(AsFd::as_fd));
        fds.extend(self.disks.iter().map(AsFd::as_fd));
        fds.extend(self.shares.iter().map(AsFd::as_fd));
        (ToLauncher::SetUp(Box::new(self.set_up.clone())), fds)
    }
}

/// Starts a launcher, and makes the ring for its machine's console. It blocks.
fn start(maker: &Maker, config: &VmConfig) -> Result<(Started, ConsoleRing), MachineError> {
    let started = maker.launcher.start(maker.kind).map_err(|error| host(&error))?;
    let ring = ConsoleRing::new(config.console_bytes).map_err(|error| host(&error))?;
    Ok((started, ring))
}

/// Describes a machine without disks and with nothing to boot.
/// Its disks come as it is sent.
#[must_use]
pub fn plain_set_up(config: &VmConfig, name: String, console_file: bool) -> MachineSetUp {
    MachineSetUp {
        name,
        vcpus: config.vcpus,
        memory_mib: config.memory.0,
        cmdline: String::new(),
        devices_in_cmdline: false,
        console_device: ConsoleDevice::SerialPort,
        initrd_parts: 0,
        console_ring_bytes: config.console_bytes,
        console_file,
        console_file_limit: CONSOLE_FILE_LIMIT,
        disks: Vec::new(),
        shares: Vec::new(),
        vsock_cid: GUEST_CID,
        network: config.network.clone(),
        passt: None,
    }
}

/// Whether a kernel with these words ignores the tables of ACPI
/// (<https://docs.kernel.org/admin-guide/kernel-parameters.html>).
fn turns_acpi_off(cmdline: &str) -> bool {
    cmdline.split_whitespace().any(|word| matches!(word, "acpi=off" | "acpi=ht"))
}

/// The block devices of a machine.
#[derive(Debug, Default)]
pub struct Devices {
    /// What they are.
    pub set_ups: Vec<DiskSetUp>,
    /// Their files, in the same order.
    pub files: Vec<File>,
}

impl Devices {
    /// Adds the device of a root image, and says what of the kernel it needs.
    ///
    /// # Errors
    /// [`MachineError::Config`] for `root.source`.
    pub fn add_root(
        &mut self,
        path: &Path,
        read_only: bool,
        needs: &mut Vec<Need>,
    ) -> Result<BootRoot, MachineError> {
        let file = files::open_root(path)?;
        needs.extend([Need::Block, files::root_file_system(path)?.need()]);
        if !read_only {
            needs.push(Need::Overlay);
        }
        // What the guest writes goes to a layer in its memory.
        self.set_ups.push(DiskSetUp { serial: ROOT_SERIAL.to_owned(), read_only: true });
        self.files.push(file);
        Ok(BootRoot::Disk { serial: ROOT_SERIAL.to_owned(), read_only })
    }

    fn add_disks(
        &mut self,
        config: &VmConfig,
        needs: &mut Vec<Need>,
    ) -> Result<Vec<BootDisk>, MachineError> {
        let mut boot_disks = Vec::new();
        for (index, disk) in config.disks.iter().enumerate() {
            let serial = self.add_disk(index, disk, None)?;
            let (mount, read_only) = (disk.mount.clone(), disk.read_only);
            boot_disks.push(BootDisk { serial, mount, read_only });
        }
        if !boot_disks.is_empty() {
            needs.extend([Need::Block, Need::Ext4]);
        }
        Ok(boot_disks)
    }

    /// Adds a disk with a file of its own, or the one that the configuration names; gives its serial string.
    ///
    /// # Errors
    /// [`MachineError::Config`] with the field.
    pub fn add_disk(
        &mut self,
        index: usize,
        disk: &DiskConfig,
        own: Option<File>,
    ) -> Result<String, MachineError> {
        let serial = format!("disk{index}");
        self.files.push(own.map_or_else(|| files::open_disk(index, disk), Ok)?);
        self.set_ups.push(DiskSetUp { serial: serial.clone(), read_only: disk.read_only });
        Ok(serial)
    }
}

/// Gives the limits of this host, on which KVM gives a machine at most so many vCPUs.
#[must_use]
pub fn host_limits(most_vcpus: usize) -> HostLimits {
    let host = rustix::system::sysinfo();
    let bytes = host.totalram.saturating_mul(u64::from(host.mem_unit));
    HostLimits {
        max_vcpus: u8::try_from(most_vcpus).unwrap_or(MAX_VCPUS).min(MAX_VCPUS),
        max_memory: Mib(u32::try_from(bytes >> 20).unwrap_or(u32::MAX)),
    }
}
