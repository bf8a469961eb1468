//! The vocabulary of twinvm: one object-safe async trait for virtual machines.
//!
//! A program that runs work inside virtual machines holds an `Arc<dyn VmInstance>` and depends on this
//! crate alone. It tests against the simulated backend and picks a real one in production; all of them
//! are held to one behavioural contract.
//!
//! # Map of the crate
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`instance`] | [`VmInstance`], the trait itself |
//! | [`ext`] | [`VmInstanceExt`], comfort built from the trait alone |
//! | [`backend`] | [`VmBackend`], which makes instances |
//! | [`state`] | [`VmState`] and the one pure function that decides every transition |
//! | [`config`] | [`VmConfig`], its validation and limits |
//! | [`exec`] | requests, outputs and running guest processes |
//! | [`file`](mod@file) | guest files: metadata, entries, options |
//! | [`stream`] | byte streams to and from the guest's vsock ports |
//! | [`snapshot`] | snapshot handles, metadata and options |
//! | [`metrics`] | counters and boot-stage times |
//! | [`event`] | what a VM reports unasked |
//! | [`error`] | [`VmError`] and its kinds |
//! | [`capability`] | what a backend can do |
#![forbid(unsafe_code)]

pub mod backend;
pub mod capability;
pub mod config;
pub mod error;
pub mod event;
pub mod exec;
pub mod ext;
pub mod file;
pub mod id;
mod inspection;
pub mod instance;
pub mod metrics;
pub mod snapshot;
pub mod state;
pub mod stream;

pub use backend::VmBackend;
pub use capability::{Capabilities, Capability};
pub use config::{
    DiskConfig, HostLimits, KernelConfig, Limit, Mib, MountConfig, NetworkConfig, PortForward,
    PortMap, Resource, RootConfig, RootSource, Timeouts, VmConfig, VmConfigBuilder,
};
pub use error::{BootStage, ExecFailure, GuestFileError, VmError, VmErrorKind, VmResult};
pub use event::{EventStream, VmEvent};
pub use exec::{
    ExecOutput, ExecRequest, ExecStatus, GuestProcess, GuestProcessHandle, OutputChannel,
    OutputOffsets, ProcessId, ProcessInfo, Signal, Stdin, TtySize, User,
};
pub use ext::VmInstanceExt;
pub use file::{CreateDirOptions, DirEntry, FileKind, FileStat, RemoveOptions, WriteOptions};
pub use id::{SnapshotId, VmId};
pub use inspection::{Inspection, MemoryRegion, VcpuInspection};
pub use instance::{ForkOptions, StopOptions, VmExit, VmInstance};
pub use metrics::{BootTimes, VmMetrics};
pub use snapshot::{RestoreOptions, Snapshot, SnapshotMetadata, SnapshotOptions};
pub use state::{CrashReason, Operation, StateInput, VmState};
pub use stream::{GuestListener, GuestListenerHandle, GuestStream, GuestStreamIo};
