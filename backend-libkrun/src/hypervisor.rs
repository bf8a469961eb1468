//! [`KrunHypervisor`]: makes machines that are libkrun's.

use crate::LAUNCHER;
use async_trait::async_trait;
use std::{
    env,
    path::PathBuf,
    sync::{Arc, OnceLock},
};
use vm_core::machine::{Hypervisor, Machine, MachineError, MachineSpec};
use vm_guest_image::{Kernel, KernelError, KernelModules};
use vm_launcher::{
    files,
    images::{Images, KernelTraits},
    life::{Lives, StageTimes},
    machine::LauncherMachine,
    parcel::{self, MAX_VCPUS, Maker},
    program::{LauncherProgram, NoLauncher},
};
use vm_trait::{Capabilities, Capability, HostLimits, VmConfig, VmId};

/// What machines of this kind can do with any kernel.
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
    Capability::Root,
    Capability::Kernel,
    Capability::ConsoleFile,
    Capability::Mounts,
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

/// Makes machines that are libkrun's, each in a launcher process of its own.
///
/// It needs a tokio runtime with I/O and time. Kernels and initial file systems are prepared once and shared by all its
/// machines.
#[derive(Debug)]
pub struct KrunHypervisor {
    maker: Maker,
    lives: Arc<Lives>,
    limits: OnceLock<HostLimits>,
}

/// Puts a [`KrunHypervisor`] together.
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct KrunHypervisorBuilder {
    launcher: Option<PathBuf>,
    kernel: Option<PathBuf>,
    modules: Option<PathBuf>,
    passt: Option<PathBuf>,
}

impl KrunHypervisorBuilder {
    /// Sets the launcher's binary. Default [`LauncherProgram::find`].
    pub fn with_launcher(mut self, path: impl Into<PathBuf>) -> Self {
        self.launcher = Some(path.into());
        self
    }

    /// Sets the kernel of machines whose configuration names none, which says what the backend claims. It may be a
    /// libkrunfw. Default [`Kernel::find_with_libkrunfw`].
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

    /// Sets the passt of machines whose network goes by it. Default [`passt::find`](vm_launcher::passt::find), for each
    /// machine anew.
    pub fn with_passt(mut self, path: impl Into<PathBuf>) -> Self {
        self.passt = Some(path.into());
        self
    }

    /// Makes the hypervisor. A missing kernel or passt is an error of the machine that would need it.
    ///
    /// # Errors
    /// [`SetupError`].
    pub fn build(self) -> Result<KrunHypervisor, SetupError> {
        let launcher = match self.launcher {
            Some(path) => LauncherProgram::at(&LAUNCHER, path)?,
            None => LauncherProgram::find(&LAUNCHER)?,
        };
        let images = Arc::new(Images::new(self.kernel, self.modules).with_libkrunfw());
        Ok(KrunHypervisor {
            maker: Maker { kind: &LAUNCHER, launcher, images, passt: self.passt },
            lives: Arc::default(),
            limits: OnceLock::new(),
        })
    }
}

impl KrunHypervisor {
    /// Starts from the defaults.
    pub fn builder() -> KrunHypervisorBuilder {
        KrunHypervisorBuilder::default()
    }

    /// Gives what machines of this kind can do with any kernel.
    #[must_use]
    pub fn claims() -> Capabilities {
        CLAIMS.iter().copied().collect()
    }

    /// Gives what they can do with this kernel and the modules that [are found](KernelModules::find) for it. It reads all of
    /// the kernel.
    ///
    /// # Errors
    /// When the kernel cannot be read, or lacks modules.
    pub fn claims_with(kernel: &Kernel) -> Result<Capabilities, KernelError> {
        KernelTraits::of(kernel, &KernelModules::find(kernel, None)?).map(claims)
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

    /// Gives how long the stages of the VM's present life took so far, while the VM exists. How far the guest's start has
    /// come is not known here.
    #[must_use]
    pub fn stages(&self, vm: VmId) -> Option<StageTimes> {
        Some(self.lives.of(vm)?.stages())
    }
}

#[async_trait]
impl Hypervisor for KrunHypervisor {
    fn name(&self) -> &str {
        "libkrun"
    }

    fn arch(&self) -> &str {
        env::consts::ARCH
    }

    fn capabilities(&self) -> Capabilities {
        // Without a kernel there will be no machine, and creating one says so.
        self.maker.images.check_kernel(None).map_or_else(|_| Self::claims(), claims)
    }

    fn limits(&self) -> HostLimits {
        self.limits.get_or_init(|| parcel::host_limits(usize::from(MAX_VCPUS))).clone()
    }

    fn check(&self, config: &VmConfig) -> Result<(), MachineError> {
        let kernel = self.maker.images.check_kernel(config.kernel.path.as_deref())?;
        self.maker.passt_for(kernel, &config.network)?;
        files::check(config)
    }

    async fn create(&self, spec: &MachineSpec) -> Result<Arc<dyn Machine>, MachineError> {
        if spec.loads {
            return Err(MachineError::Unsupported("restore".to_owned()));
        }
        let life = self.maker.make(spec).await?;
        Ok(Arc::new(LauncherMachine::new(spec, life, &self.lives)))
    }
}

fn claims(kernel: KernelTraits) -> Capabilities {
    let tsi = kernel.has_tsi.then_some(Capability::NetworkTsi);
    let passt = kernel.drives_virtio_net.then_some(Capability::NetworkPasst);
    CLAIMS.iter().copied().chain(tsi).chain(passt).collect()
}
