//! What can go wrong, as kinds to branch on and text to read.

use crate::{
    id::VmId,
    state::{CrashReason, Operation, VmState},
};
use serde::{Deserialize, Serialize};
use std::{error::Error, fmt, time::Duration};
use thiserror::Error as ThisError;

/// Shortens `Result<T, VmError>`.
pub type VmResult<T> = Result<T, VmError>;

/// An operation that failed: what was attempted, on which VM, how, and why.
///
/// Branch on [`kind`](Self::kind); the text is for people.
///
/// ```
/// # use vm_sim::SimBackend;
/// # use vm_trait::*;
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> VmResult<()> {
/// # let backend = SimBackend::builder().seed(1).build().expect("inside a runtime");
/// # let vm = backend.create(VmConfig::default()).await?;
/// # vm.start().await?;
/// let error = vm.resume().await.unwrap_err();
/// assert_eq!(error.kind(), &VmErrorKind::InvalidState { state: VmState::Running });
/// assert_eq!(error.kind().code(), "invalid_state");
/// assert!(!error.is_retriable());
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct VmError {
    kind: Box<VmErrorKind>,
    operation: Operation,
    vm: Option<VmId>,
    source: Option<Box<dyn Error + Send + Sync>>,
}

/// How an operation failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ThisError)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum VmErrorKind {
    /// A field of a configuration or request is not acceptable.
    #[error("invalid {field}: {reason}")]
    InvalidConfig {
        /// The field, as a path from the root of the value (`disks[1].path`).
        field: String,
        /// What is wrong with it, and what would be right.
        reason: String,
    },
    /// The operation is not allowed in the state that the VM is in.
    #[error("not allowed while the VM is {state}")]
    InvalidState {
        /// The state at that moment.
        state: VmState,
    },
    /// The backend cannot do this; its capabilities say so too.
    #[error("not supported by this backend: {what}")]
    Unsupported {
        /// What it cannot do.
        what: String,
    },
    /// The operation did not end by its deadline.
    #[error("no result after {after:?}")]
    Timeout {
        /// How long it was given, on the backend's clock.
        after: Duration,
    },
    /// The guest did not come up.
    #[error("boot failed at stage {stage}: {reason}; last console output:\n{console}")]
    BootFailed {
        /// How far it came.
        stage: BootStage,
        /// What stopped it.
        reason: String,
        /// The last lines of the console.
        console: String,
    },
    /// The guest crashed while the operation was under way.
    #[error("the guest crashed: {reason}")]
    GuestCrashed {
        /// Why.
        reason: CrashReason,
    },
    /// The process that runs the machine died while the operation was under way.
    #[error("the VMM process is gone: {reason}")]
    VmmCrashed {
        /// What is known about it.
        reason: String,
    },
    /// The hypervisor refused to do what it was told; the VM is in the state that it says it is in.
    #[error("the hypervisor refused: {reason}")]
    HypervisorFailed {
        /// What it answered.
        reason: String,
    },
    /// The guest agent cannot be reached, or no longer knows this stream.
    #[error("the connection to the guest agent was lost")]
    Disconnected,
    /// A stop or kill took precedence.
    #[error("interrupted by stop or kill")]
    Interrupted,
    /// The program could not be run.
    #[error("cannot run the program: {failure}")]
    ExecFailed {
        /// Why not.
        failure: ExecFailure,
    },
    /// A guest file operation failed.
    #[error("{path}: {error}")]
    GuestFile {
        /// The guest path concerned.
        path: String,
        /// What the guest answered.
        error: GuestFileError,
    },
    /// Nothing in the guest listens on this port, or what listens takes no more connections for now.
    #[error("nothing in the guest listens on port {port}")]
    ConnectRefused {
        /// The guest's port.
        port: u32,
    },
    /// Somebody listens on this port of the host already: on a vsock port the machine itself, on a mapped TCP port
    /// another machine or program.
    #[error("port {port} has a listener already")]
    PortInUse {
        /// The host's port.
        port: u32,
    },
    /// The snapshot's bytes are not what was written.
    #[error("the snapshot is damaged: {detail}")]
    SnapshotCorrupt {
        /// Which check failed.
        detail: String,
    },
    /// The snapshot is whole and cannot be used here.
    #[error("the snapshot does not fit: {field} is {found}, wanted {wanted}")]
    SnapshotIncompatible {
        /// Which field differs.
        field: String,
        /// What the snapshot says.
        found: String,
        /// What is needed here.
        wanted: String,
    },
    /// A limit of the host or of the guest was reached.
    #[error("out of {resource}")]
    ResourceExhausted {
        /// What ran out.
        resource: String,
    },
    /// The host's file system failed.
    #[error("host file {path}: {reason}")]
    HostIo {
        /// The host path concerned.
        path: String,
        /// What it answered.
        reason: String,
    },
    /// A broken promise of twinvm itself; please report it.
    #[error("internal error: {detail}")]
    Internal {
        /// What did not hold.
        detail: String,
    },
}

/// How far a boot came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum BootStage {
    /// The machine was being made.
    Machine,
    /// The kernel was entered.
    Kernel,
    /// The agent accepted a connection and has not finished the handshake.
    Handshake,
}

/// Why a program could not be run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ThisError)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ExecFailure {
    /// No such program.
    #[error("not found")]
    NotFound,
    /// The file exists and cannot be executed.
    #[error("not executable")]
    NotExecutable,
    /// The working directory does not exist or cannot be entered.
    #[error("working directory not usable")]
    BadWorkingDirectory,
    /// No such user.
    #[error("no such user")]
    UnknownUser,
    /// Not permitted to run as that user.
    #[error("not permitted")]
    NotPermitted,
    /// The guest is out of processes or memory.
    #[error("the guest is out of processes or memory")]
    OutOfResources,
    /// No process of that id is known to the agent.
    #[error("no such process")]
    NoSuchProcess,
    /// Anything else, with the guest's errno.
    #[error("guest error {errno}")]
    Other {
        /// The guest's errno.
        errno: i32,
    },
}

/// How a guest file operation failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ThisError)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum GuestFileError {
    #[error("not found")]
    NotFound,
    #[error("permission denied")]
    PermissionDenied,
    #[error("already exists")]
    AlreadyExists,
    #[error("not a directory")]
    NotADirectory,
    #[error("is a directory")]
    IsADirectory,
    #[error("directory not empty")]
    DirectoryNotEmpty,
    #[error("no space left")]
    OutOfSpace,
    #[error("read-only file system")]
    ReadOnly,
    #[error("not an absolute, normalised path")]
    InvalidPath,
    #[error("guest error {errno}")]
    Io {
        /// The guest's errno.
        errno: i32,
    },
}

impl VmError {
    /// Makes an error of `kind` for `operation`.
    #[must_use]
    pub fn new(operation: Operation, kind: VmErrorKind) -> Self {
        Self { kind: Box::new(kind), operation, vm: None, source: None }
    }

    /// Names the VM concerned.
    #[must_use]
    pub fn with_vm(mut self, vm: VmId) -> Self {
        self.vm = Some(vm);
        self
    }

    /// Names the operation that was attempted, where a lower layer named another.
    #[must_use]
    pub fn with_operation(mut self, operation: Operation) -> Self {
        self.operation = operation;
        self
    }

    /// Keeps the error of a lower layer as the source.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Gives the kind, to branch on.
    #[must_use]
    pub fn kind(&self) -> &VmErrorKind {
        &self.kind
    }

    /// Gives the operation that failed.
    #[must_use]
    pub fn operation(&self) -> Operation {
        self.operation
    }

    /// Gives the VM concerned, where there was one.
    #[must_use]
    pub fn vm(&self) -> Option<VmId> {
        self.vm
    }

    /// Says whether the same call may succeed if it is made again, with nothing else done in between.
    #[must_use]
    pub fn is_retriable(&self) -> bool {
        self.kind.is_retriable()
    }

    /// Says whether the VM must be started or restored before it can be used again.
    #[must_use]
    pub fn requires_restart(&self) -> bool {
        self.kind.requires_restart()
    }
}

impl VmErrorKind {
    /// See [`VmError::is_retriable`].
    #[must_use]
    pub fn is_retriable(&self) -> bool {
        matches!(
            self,
            Self::Timeout { .. }
                | Self::Disconnected
                | Self::HypervisorFailed { .. }
                | Self::ResourceExhausted { .. }
                | Self::HostIo { .. }
                | Self::ConnectRefused { .. }
        )
    }

    /// See [`VmError::requires_restart`].
    #[must_use]
    pub fn requires_restart(&self) -> bool {
        matches!(
            self,
            Self::BootFailed { .. }
                | Self::GuestCrashed { .. }
                | Self::VmmCrashed { .. }
                | Self::Interrupted
        )
    }

    /// Gives a short code that stays the same between versions, for logs and metrics.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::InvalidConfig { .. } => "invalid_config",
            Self::InvalidState { .. } => "invalid_state",
            Self::Unsupported { .. } => "unsupported",
            Self::Timeout { .. } => "timeout",
            Self::BootFailed { .. } => "boot_failed",
            Self::GuestCrashed { .. } => "guest_crashed",
            Self::VmmCrashed { .. } => "vmm_crashed",
            Self::HypervisorFailed { .. } => "hypervisor_failed",
            Self::Disconnected => "disconnected",
            Self::Interrupted => "interrupted",
            Self::ExecFailed { .. } => "exec_failed",
            Self::GuestFile { .. } => "guest_file",
            Self::ConnectRefused { .. } => "connect_refused",
            Self::PortInUse { .. } => "port_in_use",
            Self::SnapshotCorrupt { .. } => "snapshot_corrupt",
            Self::SnapshotIncompatible { .. } => "snapshot_incompatible",
            Self::ResourceExhausted { .. } => "resource_exhausted",
            Self::HostIo { .. } => "host_io",
            Self::Internal { .. } => "internal",
        }
    }

    /// Makes an [`InvalidConfig`](Self::InvalidConfig).
    #[must_use]
    pub fn invalid(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::InvalidConfig { field: field.into(), reason: reason.into() }
    }
}

impl fmt::Display for VmError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.operation)?;
        if let Some(vm) = self.vm {
            write!(f, " on {vm}")?;
        }
        write!(f, ": {}", self.kind)
    }
}

impl Error for VmError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_deref().map(|source| source as &(dyn Error + 'static))
    }
}

impl BootStage {
    /// Names the stage as reports do.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Machine => "machine",
            Self::Kernel => "kernel",
            Self::Handshake => "handshake",
        }
    }
}

impl fmt::Display for BootStage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_says_what_on_which_vm_and_why() {
        let error = VmError::new(Operation::Exec, VmErrorKind::Disconnected).with_vm(VmId(0xabc));
        assert_eq!(
            error.to_string(),
            "exec on vm-0000000000000abc: the connection to the guest agent was lost"
        );
        assert!(error.is_retriable() && !error.requires_restart());
        let error = VmError::new(Operation::Exec, VmErrorKind::Interrupted);
        assert!(!error.is_retriable() && error.requires_restart());
    }

    #[test]
    fn the_error_of_a_lower_layer_is_the_source() {
        let error = VmError::new(Operation::Exec, VmErrorKind::Disconnected);
        assert!(error.source().is_none());
        let error = error.with_source(std::io::Error::other("the pipe broke"));
        assert_eq!(error.source().unwrap().to_string(), "the pipe broke");
    }

    #[test]
    fn every_boot_stage_is_shown_as_it_is_written() {
        for stage in [BootStage::Machine, BootStage::Kernel, BootStage::Handshake] {
            assert_eq!(serde_json::to_value(stage).unwrap(), stage.name());
            assert_eq!(stage.to_string(), stage.name());
        }
    }
}
