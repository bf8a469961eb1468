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
use vm_planted_bugs::{Bug, planted};
use vm_trait::{
    Capabilities, Capability, HostLimits, Operation, RestoreOptions, Snapshot, SnapshotId,
    SnapshotMetadata, VmBackend, VmConfig, VmError, VmErrorKind, VmInstance, VmResult,
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
        let mut limits = hypervisor.limits();
        if planted(Bug::LargestIsRefused) {
            limits.max_vcpus -= 1;
        }
        if !planted(Bug::HostIsNotAsked) {
            config.validate_for(&limits)?;
        }
        if !planted(Bug::UnclaimedIsTaken) {
            config.validate_with(hypervisor.capabilities())?;
        }
        if planted(Bug::FilesAreNotLookedAt) {
            return Ok(());
        }
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
        if options.tracked {
            self.require(Capability::IncrementalSnapshot)?;
        }
        let chain = container::open(&*self.parts.fs, &snapshot.path).await?;
        let manifest = &chain.manifest;
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
        let saved = Saved::Opened(snapshot.path.clone(), Box::new(chain));
        vm.restore_saved(saved, options).await?;
        Ok(Arc::new(vm))
    }

    /// Gives the bytes of a snapshot, and of all that it builds on as those of one.
    async fn export(&self, snapshot: &Snapshot) -> Result<Bytes, VmErrorKind> {
        self.require(Capability::Snapshot)?;
        let fs = &self.parts.fs;
        if container::open(&**fs, &snapshot.path).await?.length == 1 {
            return Ok(container::read_verified(&**fs, &snapshot.path).await?);
        }
        let merged = Scratch { fs, path: self.new_path().await? };
        self.merge_into(snapshot, &merged.path).await?;
        Ok(container::read_verified(&**fs, &merged.path).await?)
    }

    async fn merge(
        &self,
        snapshot: &Snapshot,
        path: Option<PathBuf>,
    ) -> Result<Snapshot, VmErrorKind> {
        self.require(Capability::IncrementalSnapshot)?;
        let path = match path {
            Some(path) => path,
            None => self.new_path().await?,
        };
        let metadata = self.merge_into(snapshot, &path).await?;
        Ok(Snapshot::new(path, metadata))
    }

    async fn merge_into(
        &self,
        snapshot: &Snapshot,
        path: &Path,
    ) -> Result<SnapshotMetadata, VmErrorKind> {
        let env = &self.parts.env;
        let (tag, id) = (env.random_u64(), SnapshotId(env.random_u64()));
        let fs = self.parts.fs.clone();
        let merged = container::merge(fs, &snapshot.path, path, tag, |metadata| {
            if !planted(Bug::MergeKeepsId) {
                metadata.id = id;
            }
        })
        .await?;
        Ok(merged.0.metadata)
    }

    /// Gives a path in the snapshot directory at which nothing is.
    async fn new_path(&self) -> Result<PathBuf, VmErrorKind> {
        Ok(self.parts.snapshot_path(SnapshotId(self.parts.env.random_u64())).await?)
    }

    async fn import(&self, bytes: Bytes) -> Result<Snapshot, VmErrorKind> {
        self.require(Capability::Snapshot)?;
        let (manifest, _) = container::verify_bytes(&bytes)?;
        manifest.compatibility.check(&compatible_with(&self.parts, &manifest.config))?;
        // A name of its own: importing twice gives two files, and neither can replace a snapshot that is in use.
        let path = self.new_path().await?;
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

/// A file that is only there while it is needed.
struct Scratch<'a> {
    fs: &'a Arc<dyn HostFs>,
    path: PathBuf,
}

impl Drop for Scratch<'_> {
    fn drop(&mut self) {
        self.fs.remove_now(&self.path);
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
        let bytes = self.export(snapshot).await;
        bytes.map_err(|kind| VmError::new(Operation::ExportSnapshot, kind))
    }

    async fn import_snapshot(&self, bytes: Bytes) -> VmResult<Snapshot> {
        let imported = self.import(bytes).await;
        imported.map_err(|kind| VmError::new(Operation::ImportSnapshot, kind))
    }

    async fn delete_snapshot(&self, snapshot: &Snapshot) -> VmResult<()> {
        let fail = |kind| VmError::new(Operation::DeleteSnapshot, kind);
        self.require(Capability::Snapshot).map_err(fail)?;
        if planted(Bug::DeletedIsKept) {
            return Ok(());
        }
        let path: &Path = &snapshot.path;
        self.parts.fs.remove(path).await.map_err(|error| {
            let (path, reason) = (path.display().to_string(), error.to_string());
            fail(VmErrorKind::HostIo { path, reason })
        })
    }

    async fn merge_snapshot(
        &self,
        snapshot: &Snapshot,
        path: Option<PathBuf>,
    ) -> VmResult<Snapshot> {
        let merged = self.merge(snapshot, path).await;
        merged.map_err(|kind| VmError::new(Operation::MergeSnapshot, kind))
    }
}
