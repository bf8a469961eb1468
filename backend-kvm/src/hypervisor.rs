//! [`KvmHypervisor`]: makes machines that are KVM's.

use crate::{
    console::ConsoleRing,
    control::{DiskSetUp, MachineSetUp, ToLauncher},
    files,
    images::{Images, Prepared},
    launcher::{LauncherProgram, NoLauncher, Started},
    life::{Life, Lives, StageTimes, host},
    machine::{KvmMachine, name_of},
    snapshot::load::Saved,
};
use async_trait::async_trait;
use std::{
    env,
    fs::File,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};
use tokio::task::spawn_blocking;
use vm_core::machine::{Hypervisor, Machine, MachineError, MachineSpec};
use vm_guest_image::Need;
use vm_guest_protocol::boot::{BootConfig, BootDisk, BootRoot};
use vm_trait::{Capabilities, Capability, DiskConfig, HostLimits, Mib, RootSource, VmConfig, VmId};

/// The most vCPUs that the VMM gives a machine.
const MAX_VCPUS: u8 = 8;

/// The guest's vsock address. Each machine has a device of its own, so that all can have the same.
const GUEST_CID: u32 = 3;

/// How much of a console is appended to a file in one life.
const CONSOLE_FILE_LIMIT: u64 = 64 << 20;

/// The serial string of the device with the root image.
const ROOT_SERIAL: &str = "root";

/// What machines of this kind can do.
const CLAIMS: &[Capability] = &[
    Capability::Exec,
    Capability::Files,
    Capability::Tty,
    Capability::Users,
    Capability::Pause,
    Capability::Disks,
    Capability::GuestKernel,
    Capability::MemoryLimit,
    Capability::Console,
    Capability::Vsock,
    Capability::Root,
    Capability::Kernel,
    Capability::ConsoleFile,
    Capability::Fork,
    Capability::Snapshot,
    Capability::RestoreInPlace,
    Capability::Inspect,
    Capability::IncrementalSnapshot,
    Capability::Limits,
];

/// Why machines of this kind cannot be made here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SetupError {
    /// There is no launcher to run.
    #[error(transparent)]
    NoLauncher(#[from] NoLauncher),
}

/// Makes machines that are KVM's, each in a launcher process of its own.
///
/// It needs a tokio runtime with I/O and time. Kernels and initial file systems are prepared once and shared by all its
/// machines.
#[derive(Debug)]
pub struct KvmHypervisor {
    launcher: LauncherProgram,
    images: Arc<Images>,
    lives: Arc<Lives>,
    limits: OnceLock<HostLimits>,
}

/// Puts a [`KvmHypervisor`] together.
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct KvmHypervisorBuilder {
    launcher: Option<PathBuf>,
    kernel: Option<PathBuf>,
    modules: Option<PathBuf>,
}

impl KvmHypervisorBuilder {
    /// Sets the launcher's binary. Default [`LauncherProgram::find`].
    pub fn with_launcher(mut self, path: impl Into<PathBuf>) -> Self {
        self.launcher = Some(path.into());
        self
    }

    /// Sets the kernel of machines whose configuration names none. Default [`Kernel::find`](vm_guest_image::Kernel::find).
    pub fn with_kernel(mut self, path: impl Into<PathBuf>) -> Self {
        self.kernel = Some(path.into());
        self
    }

    /// Sets the directory of the kernel's modules. Default
    /// [`KernelModules::find`](vm_guest_image::KernelModules::find).
    pub fn with_modules(mut self, path: impl Into<PathBuf>) -> Self {
        self.modules = Some(path.into());
        self
    }

    /// Makes the hypervisor. Whether the host can run machines at all is for [`probe`](crate::probe()) to say; a missing
    /// kernel is an error of the machine that would need it.
    ///
    /// # Errors
    /// [`SetupError`].
    pub fn build(self) -> Result<KvmHypervisor, SetupError> {
        let launcher = match self.launcher {
            Some(path) => LauncherProgram::at(path)?,
            None => LauncherProgram::find()?,
        };
        Ok(KvmHypervisor {
            launcher,
            images: Arc::new(Images::new(self.kernel, self.modules)),
            lives: Arc::default(),
            limits: OnceLock::new(),
        })
    }
}

impl KvmHypervisor {
    /// Starts from the defaults.
    pub fn builder() -> KvmHypervisorBuilder {
        KvmHypervisorBuilder::default()
    }

    /// Gives what machines of this kind can do, on whatever host.
    #[must_use]
    pub fn claims() -> Capabilities {
        CLAIMS.iter().copied().collect()
    }

    /// Gives the launcher that runs the machines.
    #[must_use]
    pub fn launcher(&self) -> &LauncherProgram {
        &self.launcher
    }

    /// Gives the pid of a VM's launcher while it runs.
    #[must_use]
    pub fn launcher_pid(&self, vm: VmId) -> Option<u32> {
        self.lives.of(vm)?.pid()
    }

    /// Gives how long the stages of the VM's present life took so far, while the VM exists.
    #[must_use]
    pub fn stages(&self, vm: VmId) -> Option<StageTimes> {
        Some(self.lives.of(vm)?.stages())
    }
}

#[async_trait]
impl Hypervisor for KvmHypervisor {
    fn name(&self) -> &str {
        "kvm"
    }

    fn arch(&self) -> &str {
        env::consts::ARCH
    }

    fn capabilities(&self) -> Capabilities {
        Self::claims()
    }

    fn limits(&self) -> HostLimits {
        self.limits.get_or_init(host_limits).clone()
    }

    fn check(&self, config: &VmConfig) -> Result<(), MachineError> {
        self.images.check_kernel(config.kernel.path.as_deref())?;
        files::check(config)
    }

    async fn create(&self, spec: &MachineSpec) -> Result<Arc<dyn Machine>, MachineError> {
        let (launcher, images, config) =
            (self.launcher.clone(), self.images.clone(), spec.config.clone());
        let name = name_of(spec);
        if spec.loads {
            // What it boots from, if it ever does, comes with what is loaded.
            let started = spawn_blocking(move || start(&launcher, &config)).await;
            let started = started.map_err(|error| MachineError::Failed(error.to_string()))?;
            let (started, ring) = started?;
            let life = Life::begin(started, ring).await?;
            return Ok(Arc::new(KvmMachine::new(spec, life, &self.lives)));
        }
        // What it made is dropped, and so ended, when this future is dropped.
        let made = spawn_blocking(move || Made::new(&launcher, &images, &config, name)).await;
        let made = made.map_err(|error| MachineError::Failed(error.to_string()))??;
        let Made { started, ring, parcel } = made;
        let ring_file = ring.file().try_clone_to_owned().map_err(|error| host(&error))?;
        let life = Life::begin(started, ring).await?;
        let machine = KvmMachine::new(spec, life.clone(), &self.lives);
        let (message, fds) = parcel.packet(ring_file.as_fd());
        life.set_up(&message, &fds).await?;
        Ok(Arc::new(machine))
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
}

impl Made {
    fn new(
        launcher: &LauncherProgram,
        images: &Images,
        config: &VmConfig,
        name: String,
    ) -> Result<Self, MachineError> {
        // First, so that it comes up while the rest is made.
        let (started, ring) = start(launcher, config)?;
        Ok(Self { started, ring, parcel: Parcel::new(images, config, name)? })
    }
}

impl Parcel {
    fn new(images: &Images, config: &VmConfig, name: String) -> Result<Self, MachineError> {
        let (root_dir, root_image) = match &config.root.source {
            RootSource::BuiltIn => (None, None),
            RootSource::Directory(path) => (Some(path.as_path()), None),
            RootSource::Image(path) => (None, Some(path.as_path())),
            _ => return Err(MachineError::Unsupported("this kind of root".to_owned())),
        };
        let prepared = images.prepare(config.kernel.path.as_deref(), root_dir)?;
        let mut devices = Devices::default();
        let mut needs = vec![Need::Vsock, Need::Entropy];
        let root = match root_image {
            Some(path) => devices.add_root(path, config.root.read_only, &mut needs)?,
            None => BootRoot::Initial { read_only: config.root.read_only },
        };
        let disks = devices.add_disks(config, &mut needs)?;
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
            ..BootConfig::default()
        };
        let part = prepared.image.part_for(&boot);
        let boot_part = part.map_err(|error| MachineError::Failed(error.to_string()))?;
        let user_initrd = config.kernel.initrd.as_deref().map(files::open_initrd).transpose()?;
        let console_file = config.console_file.as_deref().map(files::open_console_file);
        let console_file = console_file.transpose()?;
        let set_up = MachineSetUp {
            cmdline: config.kernel.cmdline.clone(),
            devices_in_cmdline: !prepared.devices_by_acpi || turns_acpi_off(&config.kernel.cmdline),
            initrd_parts: 2 + u8::from(user_initrd.is_some()),
            disks: devices.set_ups,
            ..plain_set_up(config, name, console_file.is_some())
        };
        let disks = devices.files;
        Ok(Self { set_up, prepared, user_initrd, boot_part, console_file, disks })
    }

    fn packet<'a>(&'a self, ring: BorrowedFd<'a>) -> (ToLauncher, Vec<BorrowedFd<'a>>) {
        let mut fds = vec![self.prepared.kernel.as_fd()];
        // The user's comes first, so that the files of the others win.
        fds.extend(self.user_initrd.as_ref().map(AsFd::as_fd));
        fds.extend([self.prepared.image.file(), self.boot_part.as_fd(), ring]);
        fds.extend(self.console_file.as_ref().map(AsFd::as_fd));
        fds.extend(self.disks.iter().map(AsFd::as_fd));
        (ToLauncher::SetUp(Box::new(self.set_up.clone())), fds)
    }
}

/// Starts a launcher, and makes the ring for its machine's console. It blocks.
fn start(
    launcher: &LauncherProgram,
    config: &VmConfig,
) -> Result<(Started, ConsoleRing), MachineError> {
    let started = launcher.start().map_err(|error| host(&error))?;
    let ring = ConsoleRing::new(config.console_bytes).map_err(|error| host(&error))?;
    Ok((started, ring))
}

/// What a launcher is sent of a machine that was saved.
pub(crate) struct LoadParcel {
    set_up: MachineSetUp,
    saved: Saved,
    track: bool,
    console_file: Option<File>,
    disks: Vec<File>,
}

impl LoadParcel {
    /// Puts together what was saved and what the configuration names. It blocks.
    pub(crate) fn new(
        mut saved: Saved,
        config: &VmConfig,
        name: String,
        track: bool,
    ) -> Result<Self, MachineError> {
        let mut devices = Devices::default();
        if let RootSource::Image(path) = &config.root.source {
            devices.add_root(path, config.root.read_only, &mut Vec::new())?;
        }
        let mut restored = saved.disks.drain(..);
        for (index, disk) in config.disks.iter().enumerate() {
            let own = if disk.read_only { None } else { restored.next() };
            devices.add_disk(index, disk, own)?;
        }
        drop(restored);
        let console_file = config.console_file.as_deref().map(files::open_console_file);
        let console_file = console_file.transpose()?;
        let logs = console_file.is_some();
        let set_up = MachineSetUp { disks: devices.set_ups, ..plain_set_up(config, name, logs) };
        Ok(Self { set_up, saved, track, console_file, disks: devices.files })
    }

    /// Gives the message, and its descriptors in order.
    pub(crate) fn packet<'a>(&'a self, ring: BorrowedFd<'a>) -> (ToLauncher, Vec<BorrowedFd<'a>>) {
        let Saved { state, pieces, memory, disks: _ } = &self.saved;
        let mut fds = vec![state.as_fd(), pieces.as_fd()];
        fds.extend(memory.iter().map(AsFd::as_fd));
        fds.push(ring);
        fds.extend(self.console_file.as_ref().map(AsFd::as_fd));
        fds.extend(self.disks.iter().map(AsFd::as_fd));
        let set_up = Box::new(self.set_up.clone());
        // More would not fit beside a packet, which is refused when it is sent.
        let memory_files = u8::try_from(memory.len()).unwrap_or(u8::MAX);
        (ToLauncher::Load { set_up, memory_files, track: self.track }, fds)
    }
}

/// Describes a machine without disks and with nothing to boot.
fn plain_set_up(config: &VmConfig, name: String, console_file: bool) -> MachineSetUp {
    MachineSetUp {
        name,
        vcpus: config.vcpus,
        memory_mib: config.memory.0,
        cmdline: String::new(),
        devices_in_cmdline: false,
        initrd_parts: 0,
        console_ring_bytes: config.console_bytes,
        console_file,
        console_file_limit: CONSOLE_FILE_LIMIT,
        disks: Vec::new(),
        vsock_cid: GUEST_CID,
    }
}

/// Whether a kernel with these words ignores the tables of ACPI
/// (<https://docs.kernel.org/admin-guide/kernel-parameters.html>).
fn turns_acpi_off(cmdline: &str) -> bool {
    cmdline.split_whitespace().any(|word| matches!(word, "acpi=off" | "acpi=ht"))
}

/// The block devices of a machine.
#[derive(Default)]
struct Devices {
    set_ups: Vec<DiskSetUp>,
    files: Vec<File>,
}

impl Devices {
    fn add_root(
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
    fn add_disk(
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

fn host_limits() -> HostLimits {
    let most = kvm_ioctls::Kvm::new().map_or(usize::from(MAX_VCPUS), |kvm| kvm.get_max_vcpus());
    let host = rustix::system::sysinfo();
    let bytes = host.totalram.saturating_mul(u64::from(host.mem_unit));
    HostLimits {
        max_vcpus: u8::try_from(most).unwrap_or(MAX_VCPUS).min(MAX_VCPUS),
        max_memory: Mib(u32::try_from(bytes >> 20).unwrap_or(u32::MAX)),
    }
}
