//! How errors of the seams become errors of the trait; the only place that decides.

use crate::machine::{MachineError, MachineExit};
use vm_trait::{CrashReason, VmErrorKind};

impl From<MachineError> for VmErrorKind {
    fn from(error: MachineError) -> Self {
        match error {
            MachineError::Config { field, reason } => Self::InvalidConfig { field, reason },
            MachineError::Unsupported(what) => Self::Unsupported { what },
            MachineError::Exhausted(resource) => Self::ResourceExhausted { resource },
            MachineError::NotListening => Self::Disconnected,
            MachineError::PortInUse(port) => Self::PortInUse { port },
            MachineError::Ended => Self::VmmCrashed { reason: "the machine has ended".to_owned() },
            MachineError::Incompatible { field, found, wanted } => {
                Self::SnapshotIncompatible { field, found, wanted }
            }
            MachineError::Corrupt(detail) => Self::SnapshotCorrupt { detail },
            MachineError::HostIo { path, reason } => Self::HostIo { path, reason },
            MachineError::Failed(reason) => Self::HypervisorFailed { reason },
        }
    }
}

/// Gives the kind with which operations fail when a machine ends under them.
pub(crate) fn kind_of_exit(exit: &MachineExit) -> VmErrorKind {
    match exit {
        MachineExit::PoweredOff | MachineExit::Killed => VmErrorKind::Disconnected,
        MachineExit::Crashed(CrashReason::GuestPanic) => {
            VmErrorKind::GuestCrashed { reason: CrashReason::GuestPanic }
        }
        MachineExit::Crashed(reason) => VmErrorKind::VmmCrashed { reason: reason.to_string() },
        MachineExit::Failed(why) => VmErrorKind::VmmCrashed { reason: why.clone() },
    }
}
