//! A backend written directly on `vm-trait`, without `vm-core`: guests that are nothing but a file tree in memory.
//!
//! It claims `files` and nothing else, keeps every promise that this binds it to, and answers `Unsupported` to all
//! the rest. `tests/contract.rs` holds it to the contract in twenty lines.
#![forbid(unsafe_code)]

mod instance;
mod tree;

use async_trait::async_trait;
use bytes::Bytes;
use instance::MemoryVm;
use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};
use vm_trait::{
    Capabilities, Capability, HostLimits, Mib, Operation, RestoreOptions, Snapshot, VmBackend,
    VmConfig, VmError, VmErrorKind, VmId, VmInstance, VmResult,
};

/// Makes guests that are nothing but a file tree in memory.
#[derive(Debug, Default)]
pub struct MemoryBackend {
    made: AtomicU64,
}

#[async_trait]
impl VmBackend for MemoryBackend {
    fn name(&self) -> &str {
        "memory"
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::from_iter([Capability::Files])
    }

    fn limits(&self) -> HostLimits {
        HostLimits { max_vcpus: 1, max_memory: Mib(1024) }
    }

    async fn create(&self, config: VmConfig) -> VmResult<Arc<dyn VmInstance>> {
        let fits = config.validate_for(&self.limits());
        let checked = fits.and_then(|()| config.validate_with(self.capabilities()));
        checked.map_err(|kind| VmError::new(Operation::Create, kind))?;
        let id = VmId(self.made.fetch_add(1, Ordering::Relaxed) + 1);
        Ok(Arc::new(MemoryVm::new(id, config, self.capabilities())))
    }

    async fn restore(&self, _: &Snapshot, _: RestoreOptions) -> VmResult<Arc<dyn VmInstance>> {
        Err(unsupported(Operation::Restore, "snapshots"))
    }

    async fn export_snapshot(&self, _: &Snapshot) -> VmResult<Bytes> {
        Err(unsupported(Operation::ExportSnapshot, "snapshots"))
    }

    async fn import_snapshot(&self, _: Bytes) -> VmResult<Snapshot> {
        Err(unsupported(Operation::ImportSnapshot, "snapshots"))
    }

    async fn delete_snapshot(&self, _: &Snapshot) -> VmResult<()> {
        Err(unsupported(Operation::DeleteSnapshot, "snapshots"))
    }
}

pub(crate) fn unsupported(operation: Operation, what: &str) -> VmError {
    VmError::new(operation, VmErrorKind::Unsupported { what: what.to_owned() })
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_contract_is_plugged_in_within_twenty_lines() {
        let lines = include_str!("../tests/contract.rs").lines().count();
        assert!(lines <= 20, "{lines} lines");
    }
}
