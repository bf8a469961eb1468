//! [`KvmBackend`]: a whole backend with one call.

use crate::{KvmHypervisor, KvmHypervisorBuilder, SetupError};
use std::{path::PathBuf, sync::Arc};
use vm_core::{
    backend::CoreBackend,
    observe::{NoObserver, Observer},
};

/// A backend of KVM machines on tokio and the real file system.
///
/// ```no_run
/// use vm_backend_kvm::KvmBackend;
/// use vm_trait::{VmBackend, VmConfig};
/// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
/// vm_backend_kvm::probe()?;
/// let backend = KvmBackend::builder().build()?;
/// let vm = backend.create(VmConfig::default()).await?;
/// vm.start().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct KvmBackend;

/// Puts a backend of KVM machines together.
#[derive(Clone, Debug)]
#[must_use]
pub struct KvmBackendBuilder {
    hypervisor: KvmHypervisorBuilder,
    snapshots: Option<PathBuf>,
    observer: Arc<dyn Observer>,
}

impl KvmBackend {
    /// Starts from the defaults.
    pub fn builder() -> KvmBackendBuilder {
        KvmBackendBuilder {
            hypervisor: KvmHypervisor::builder(),
            snapshots: None,
            observer: Arc::new(NoObserver),
        }
    }
}

impl KvmBackendBuilder {
    /// Sets the launcher's binary. Default [`LauncherProgram::find`](crate::LauncherProgram::find).
    pub fn with_launcher(mut self, path: impl Into<PathBuf>) -> Self {
        self.hypervisor = self.hypervisor.with_launcher(path);
        self
    }

    /// Sets the kernel of machines whose configuration names none. Default
    /// [`Kernel::find`](vm_guest_image::Kernel::find).
    pub fn with_kernel(mut self, path: impl Into<PathBuf>) -> Self {
        self.hypervisor = self.hypervisor.with_kernel(path);
        self
    }

    /// Sets the directory of the kernel's modules. Default
    /// [`KernelModules::find`](vm_guest_image::KernelModules::find).
    pub fn with_modules(mut self, path: impl Into<PathBuf>) -> Self {
        self.hypervisor = self.hypervisor.with_modules(path);
        self
    }

    /// Sets the directory for snapshots that are given no path; it is made when the first is taken. Default
    /// `twinvm-snapshots-UID` in the system's directory for temporary files.
    pub fn with_snapshots(mut self, path: impl Into<PathBuf>) -> Self {
        self.snapshots = Some(path.into());
        self
    }

    /// Sets who listens. Default nobody.
    pub fn with_observer(mut self, observer: Arc<dyn Observer>) -> Self {
        self.observer = observer;
        self
    }

    /// Makes the backend.
    ///
    /// # Errors
    /// [`SetupError`].
    ///
    /// # Panics
    /// Outside a tokio runtime with I/O and time enabled.
    pub fn build(self) -> Result<CoreBackend, SetupError> {
        let hypervisor = Arc::new(self.hypervisor.build()?);
        Ok(vm_launcher::backend::on_this_host(hypervisor, self.snapshots, self.observer))
    }
}
