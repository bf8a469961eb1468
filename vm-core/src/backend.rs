//! [`CoreBackend`]: a whole backend out of a hypervisor and an environment.

use crate::{
    container::{self, ContainerError},
    env::Env,
    host_fs::HostFs,
    machine::Hypervisor,
    observe::Observer,
    vm::{CoreVm, Saved, compatible_with},
};
use async_trait::async_trait;
use bytes::Bytes;
use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};
use vm_trait::{
    Capabilities, Capability, HostLimits, Operation, RestoreOptions, Snapshot, SnapshotId,
    VmBackend, VmConfig, VmError, VmErrorKind, VmInstance, VmResult,
};

/// What a backend is made of.
#[derive(Clone, Debug)]
pub struct CoreParts {
    /// Makes the machines.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// Clock, tasks and randomness.
    pub env: Arc<dyn Env>,
    /// Where snapshots are kept.
    pub fs: Arc<dyn HostFs>,
    /// The directory for snapshots that are given no path.
    pub snapshots: PathBuf,
    /// Who listens.
    pub observer: Arc<dyn Observer>,
}

/// A backend whose machines are made by a [`Hypervisor`] and run by this crate. Clones share everything.
#[derive(Clone, Debug)]
pub struct CoreBackend {
    parts: Arc<Parts>,
}

/// What all machines of a backend share.
#[derive(Debug)]
pub(crate) struct Parts {
    parts: CoreParts,
    live: AtomicUsize,
}

impl CoreBackend {
    /// Puts a backend together.
    #[must_use]
    pub fn new(parts: CoreParts) -> Self {
        Self { parts: Arc::new(Parts { parts, live: AtomicUsize::new(0) }) }
    }

    /// Counts the VMs of this backend that are not entirely gone: those with handles, and those whose machines are
    /// still being removed.
    #[must_use]
    pub fn live(&self) -> usize {
        self.parts.live.load(Ordering::Relaxed)
    }

    /// Removes the temporary files that writers of snapshots left in the snapshot directory when they died. Call it
    /// once at start, while no other process writes there.
    ///
    /// # Errors
    /// [`VmErrorKind::HostIo`].
    pub async fn sweep(&self) -> VmResult<()> {
        let swept = container::sweep(&*self.parts.fs, &self.parts.snapshots).await;
        swept.map(drop).map_err(|error| VmError::new(Operation::Snapshot, error.into()))
    }

    fn check(&self, config: &VmConfig) -> Result<(), VmErrorKind> {
        let hypervisor = &self.parts.hypervisor;
        config.validate_for(&hypervisor.limits())?;
        config.validate_with(hypervisor.capabilities())?;
        Ok(hypervisor.check(config)?)
    }

    fn require(&self, capability: Capability) -> Result<(), VmErrorKind> {
        if self.capabilities().has(capability) {
            return Ok(());
        }
        Err(VmErrorKind::Unsupported { what: capability.name().to_owned() })
    }

    async fn restore_new(
        &self,
        snapshot: &Snapshot,
        options: RestoreOptions,
    ) -> Result<Arc<dyn VmInstance>, VmErrorKind> {
        self.require(Capability::Snapshot)?;
        let (manifest, sections) = container::open(&*self.parts.fs, &snapshot.path).await?;
        manifest.compatibility.check(&compatible_with(&self.parts, &manifest.config))?;
        self.check(&manifest.config).map_err(|kind| match kind {
            VmErrorKind::InvalidConfig { field, reason } => VmErrorKind::SnapshotIncompatible {
                field,
                found: reason,
                wanted: "a machine that this host can run".to_owned(),
            },
            kind => kind,
        })?;
        let vm = CoreVm::create(&self.parts, Arc::new(manifest.config.clone()));
        vm.restore_saved(Saved::Loaded(Box::new(manifest), sections), options).await?;
        Ok(Arc::new(vm))
    }

    async fn import(&self, bytes: Bytes) -> Result<Snapshot, VmErrorKind> {
        self.require(Capability::Snapshot)?;
        let (manifest, _) = container::verify_bytes(&bytes)?;
        manifest.compatibility.check(&compatible_with(&self.parts, &manifest.config))?;
        // A name of its own: importing twice gives two files, and neither can replace a snapshot that is in use.
        let path = self.parts.snapshot_path(SnapshotId(self.parts.env.random_u64())).await?;
        let tag = self.parts.env.random_u64();
        let manifest = container::write_verified(self.parts.fs.clone(), &path, bytes, tag).await?;
        Ok(Snapshot::new(path, manifest.metadata))
    }
}

impl std::ops::Deref for Parts {
    type Target = CoreParts;

    fn deref(&self) -> &CoreParts {
        &self.parts
    }
}

impl Parts {
    /// Gives the file for a snapshot that is given no path, in a directory that is there then.
    pub(crate) async fn snapshot_path(&self, id: SnapshotId) -> Result<PathBuf, ContainerError> {
        let made = self.fs.create_dir_all(&self.snapshots).await;
        made.map_err(|error| ContainerError::io(&self.snapshots, &error))?;
        Ok(self.snapshots.join(format!("{id}.twinvm")))
    }

    /// Counts a VM for as long as the returned token lives.
    pub(crate) fn count(self: &Arc<Self>) -> Live {
        self.live.fetch_add(1, Ordering::Relaxed);
        Live(self.clone())
    }
}

/// Counts one VM.
#[derive(Debug)]
pub(crate) struct Live(Arc<Parts>);

impl Drop for Live {
    fn drop(&mut self) {
        self.0.live.fetch_sub(1, Ordering::Relaxed);
    }
}

#[async_trait]
impl VmBackend for CoreBackend {
    fn name(&self) -> &str {
        self.parts.hypervisor.name()
    }

    fn capabilities(&self) -> Capabilities {
        self.parts.hypervisor.capabilities()
    }

    fn limits(&self) -> HostLimits {
        self.parts.hypervisor.limits()
    }

    async fn create(&self, config: VmConfig) -> VmResult<Arc<dyn VmInstance>> {
        self.check(&config).map_err(|kind| VmError::new(Operation::Create, kind))?;
        Ok(Arc::new(CoreVm::create(&self.parts, Arc::new(config))))
    }

    async fn restore(
        &self,
        snapshot: &Snapshot,
        options: RestoreOptions,
    ) -> VmResult<Arc<dyn VmInstance>> {
        let restored = self.restore_new(snapshot, options).await;
        restored.map_err(|kind| VmError::new(Operation::Restore, kind))
    }

    async fn export_snapshot(&self, snapshot: &Snapshot) -> VmResult<Bytes> {
        let fail = |kind| VmError::new(Operation::ExportSnapshot, kind);
        self.require(Capability::Snapshot).map_err(fail)?;
        let bytes = container::read_verified(&*self.parts.fs, &snapshot.path).await;
        bytes.map_err(|error| fail(error.into()))
    }

    async fn import_snapshot(&self, bytes: Bytes) -> VmResult<Snapshot> {
        let imported = self.import(bytes).await;
        imported.map_err(|kind| VmError::new(Operation::ImportSnapshot, kind))
    }

    async fn delete_snapshot(&self, snapshot: &Snapshot) -> VmResult<()> {
        let fail = |kind| VmError::new(Operation::DeleteSnapshot, kind);
        self.require(Capability::Snapshot).map_err(fail)?;
        let path: &Path = &snapshot.path;
        self.parts.fs.remove(path).await.map_err(|error| {
            let (path, reason) = (path.display().to_string(), error.to_string());
            fail(VmErrorKind::HostIo { path, reason })
        })
    }
}
