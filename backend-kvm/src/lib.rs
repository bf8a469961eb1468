//! twinvm's microVMs on Linux KVM: a VMM in a launcher process for each machine.
//!
//! [`KvmBackend::builder`] gives a whole backend. [`probe()`] says beforehand whether this host can run machines at all.
//!
//! # What it needs
//!
//! - `/dev/kvm`, and the right to open it;
//! - a kernel, and its modules where vsock and virtio are modules: see [`Kernel::find`](vm_guest_image::Kernel::find)
//!   and [`KernelModules::find`](vm_guest_image::KernelModules::find);
//! - a launcher program: see [`LauncherProgram::find`]. The simplest is the program itself: its `main` calls
//!   [`run_launcher_if_asked`] before anything else.
//!
//! # What a machine is on the host
//!
//! One process, and nothing else: no file, no socket with a name. What the process shares with its owner is
//! [`control`]'s socket pair and memory. It ends when its owner does, however that comes about.
//!
//! The owner's side is in the other modules of this crate; [`vmm`] runs in the launcher process.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![deny(unsafe_code)]

mod backend;
mod console;
pub mod control;
mod files;
mod hypervisor;
mod images;
mod launcher;
mod life;
mod machine;
mod packet;
mod probe;
mod ready;
mod snapshot;
mod sync;
pub mod vmm;

pub use backend::{KvmBackend, KvmBackendBuilder};
pub use hypervisor::{KvmHypervisor, KvmHypervisorBuilder, SetupError};
pub use launcher::{
    LAUNCHER_VARIABLE, LauncherProgram, NoLauncher, RUN_LAUNCHER_VARIABLE, run_launcher_if_asked,
};
pub use life::StageTimes;
pub use probe::{Fitness, NotFit, probe};
