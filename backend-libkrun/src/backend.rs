//! [`KrunBackend`]: a whole backend with one call.

use crate::{KrunHypervisor, KrunHypervisorBuilder, SetupError};
use std::{path::PathBuf, sync::Arc};
use vm_core::{
    backend::CoreBackend,
    observe::{NoObserver, Observer},
};

/// A backend of libkrun's machines on tokio.
///
/// ```no_run
/// use vm_backend_libkrun::KrunBackend;
/// use vm_trait::{VmBackend, VmConfig};
/// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
/// let backend = KrunBackend::builder().build()?;
/// let vm = backend.create(VmConfig::default()).await?;
/// vm.start().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct KrunBackend;

/// Puts a backend of libkrun's machines together.
#[derive(Clone, Debug)]
#[must_use]
pub struct KrunBackendBuilder {
    hypervisor: KrunHypervisorBuilder,
    observer: Arc<dyn Observer>,
}

impl KrunBackend {
    /// Starts from the defaults.
    pub fn builder() -> KrunBackendBuilder {
        KrunBackendBuilder { hypervisor: KrunHypervisor::builder(), observer: Arc::new(NoObserver) }
    }
}

impl KrunBackendBuilder {
    /// Sets the launcher's binary. Default [`LauncherProgram::find`](crate::LauncherProgram::find).
    pub fn with_launcher(mut self, path: impl Into<PathBuf>) -> Self {
        self.hypervisor = self.hypervisor.with_launcher(path);
        self
    }

    /// Sets the kernel of machines whose configuration names none, which says what the backend claims. It may be a
    /// libkrunfw. Default [`Kernel::find_with_libkrunfw`](vm_guest_image::Kernel::find_with_libkrunfw).
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

    /// Sets the passt of machines whose network goes by it. Default [`passt::find`](vm_launcher::passt::find), for each
    /// machine anew.
    pub fn with_passt(mut self, path: impl Into<PathBuf>) -> Self {
        self.hypervisor = self.hypervisor.with_passt(path);
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
        Ok(vm_launcher::backend::on_this_host(hypervisor, None, self.observer))
    }
}
