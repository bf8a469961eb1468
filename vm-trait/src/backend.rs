//! What makes machines.

use crate::{
    capability::{Capabilities, Capability},
    config::{HostLimits, VmConfig},
    error::{VmError, VmErrorKind, VmResult},
    instance::VmInstance,
    snapshot::{RestoreOptions, Snapshot},
    state::Operation,
};
use async_trait::async_trait;
use bytes::Bytes;
use std::{fmt, path::PathBuf, sync::Arc};

/// A kind of virtual machine on this host.
///
/// ```
/// # use vm_sim::SimBackend;
/// # use vm_trait::*;
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> VmResult<()> {
/// # let backend = SimBackend::builder().seed(1).build().expect("inside a runtime");
/// # let vm = backend.create(VmConfig::default()).await?;
/// # vm.start().await?;
/// let snapshot = vm.snapshot(SnapshotOptions::default()).await?;
/// let bytes = backend.export_snapshot(&snapshot).await?;
/// let copy = backend.import_snapshot(bytes).await?;
/// let other = backend.restore(&copy, RestoreOptions::running()).await?;
/// assert_ne!(other.id(), vm.id());
/// backend.delete_snapshot(&copy).await?;
/// # Ok(())
/// # }
/// ```
#[async_trait]
pub trait VmBackend: Send + Sync + fmt::Debug {
    /// Gives the backend's short name (`sim`, `kvm`, `libkrun`).
    fn name(&self) -> &str;

    /// Gives what machines of this backend can do.
    fn capabilities(&self) -> Capabilities;

    /// Gives the limits that configurations are checked against.
    fn limits(&self) -> HostLimits;

    /// Makes a machine in state Created. Nothing runs yet.
    ///
    /// # Errors
    /// [`InvalidConfig`](crate::VmErrorKind::InvalidConfig) for the first bad field;
    /// [`ResourceExhausted`](crate::VmErrorKind::ResourceExhausted).
    async fn create(&self, config: VmConfig) -> VmResult<Arc<dyn VmInstance>>;

    /// Makes a new machine from a snapshot. Several may be made of one.
    ///
    /// # Errors
    /// [`SnapshotCorrupt`](crate::VmErrorKind::SnapshotCorrupt),
    /// [`SnapshotIncompatible`](crate::VmErrorKind::SnapshotIncompatible),
    /// [`PortInUse`](crate::VmErrorKind::PortInUse) as for [`VmInstance::start`],
    /// [`Unsupported`](crate::VmErrorKind::Unsupported).
    async fn restore(
        &self,
        snapshot: &Snapshot,
        options: RestoreOptions,
    ) -> VmResult<Arc<dyn VmInstance>>;

    /// Gives a snapshot's bytes after verifying them, to be carried elsewhere. Those of an incremental one hold all that it
    /// builds on.
    ///
    /// # Errors
    /// [`SnapshotCorrupt`](crate::VmErrorKind::SnapshotCorrupt), [`HostIo`](crate::VmErrorKind::HostIo),
    /// [`Unsupported`](crate::VmErrorKind::Unsupported).
    async fn export_snapshot(&self, snapshot: &Snapshot) -> VmResult<Bytes>;

    /// Verifies the bytes of an exported snapshot and keeps them in a file of this host.
    ///
    /// # Errors
    /// As [`restore`](Self::restore); nothing is kept then.
    async fn import_snapshot(&self, bytes: Bytes) -> VmResult<Snapshot>;

    /// Removes a snapshot's file. Machines made from it go on; incremental snapshots that build on it can no longer be
    /// used.
    ///
    /// # Errors
    /// [`HostIo`](crate::VmErrorKind::HostIo), [`Unsupported`](crate::VmErrorKind::Unsupported).
    async fn delete_snapshot(&self, snapshot: &Snapshot) -> VmResult<()>;

    /// Writes what an incremental snapshot and all that it builds on hold as one snapshot that needs no other. It has an
    /// id of its own, and a file of its own, or that of `path`; the others stay as they are. When the future is dropped,
    /// nothing is left of it.
    ///
    /// ```
    /// # use vm_sim::SimBackend;
    /// # use vm_trait::*;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> VmResult<()> {
    /// # let backend = SimBackend::builder().seed(1).build().expect("inside a runtime");
    /// # let vm = backend.create(VmConfig::default()).await?;
    /// # vm.start().await?;
    /// let base = vm.snapshot(SnapshotOptions::default().tracked()).await?;
    /// vm.write("/tmp/work", "done").await?;
    /// let step = vm.snapshot(SnapshotOptions::default().on_base(&base)).await?;
    /// let whole = backend.merge_snapshot(&step, None).await?;
    /// backend.delete_snapshot(&step).await?;
    /// backend.delete_snapshot(&base).await?;
    /// let other = backend.restore(&whole, RestoreOptions::running()).await?;
    /// assert_eq!(other.read_to_string("/tmp/work").await?, "done");
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`restore`](Self::restore), also where one of the chain is missing or is not the one that was built on;
    /// [`ResourceExhausted`](crate::VmErrorKind::ResourceExhausted), [`HostIo`](crate::VmErrorKind::HostIo). Nothing is
    /// kept then.
    async fn merge_snapshot(
        &self,
        _snapshot: &Snapshot,
        _path: Option<PathBuf>,
    ) -> VmResult<Snapshot> {
        let what = Capability::IncrementalSnapshot.name().to_owned();
        Err(VmError::new(Operation::MergeSnapshot, VmErrorKind::Unsupported { what }))
    }
}
