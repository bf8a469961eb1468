//! [`KvmHypervisor`]: makes machines that are KVM's.

use crate::{
    LAUNCHER,
    control::{MachineSetUp, ToLauncher},
    machine::KvmMachine,
    snapshot::load::Saved,
};
use async_trait::async_trait;
use std::{
    env,
    fs::File,
    os::fd::{AsFd, BorrowedFd},
    path::PathBuf,
    sync::{Arc, OnceLock},
};
use vm_core::machine::{Hypervisor, Machine, MachineError, MachineSpec};
use vm_launcher::{
    files,
    images::Images,
    life::{Lives, StageTimes},
    parcel::{self, Devices, MAX_VCPUS, Maker, plain_set_up},
    program::{LauncherProgram, NoLauncher},
};
use vm_trait::{Capabilities, Capability, HostLimits, RootSource, VmConfig, VmId};

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
    maker: Maker,
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
            Some(path) => LauncherProgram::at(&LAUNCHER, path)?,
            None => LauncherProgram::find(&LAUNCHER)?,
        };
        let images = Arc::new(Images::new(self.kernel, self.modules));
        Ok(KvmHypervisor {
            maker: Maker { kind: &LAUNCHER, launcher, images, passt: None },
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
        &self.maker.launcher
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
        self.maker.images.check_kernel(config.kernel.path.as_deref())?;
        files::check(config)
    }

    async fn create(&self, spec: &MachineSpec) -> Result<Arc<dyn Machine>, MachineError> {
        let life = match spec.loads {
            // What it boots from, if it ever does, comes with what is loaded.
            true => self.maker.start_bare(spec).await?,
            false => self.maker.make(spec).await?,
        };
        Ok(Arc::new(KvmMachine::new(spec, life, &self.lives)))
    }
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

fn host_limits() -> HostLimits {
    let most = kvm_ioctls::Kvm::new().map_or(usize::from(MAX_VCPUS), |kvm| kvm.get_max_vcpus());
    parcel::host_limits(most)
}
