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
mod hypervisor;
mod machine;
mod probe;
mod snapshot;
pub mod vmm;

use vm_launcher::sync;

pub use backend::{KvmBackend, KvmBackendBuilder};
pub use hypervisor::{KvmHypervisor, KvmHypervisorBuilder, SetupError};
pub use probe::{Fitness, NotFit, probe};
pub use vm_launcher::{
    control,
    life::StageTimes,
    program::{LauncherKind, LauncherProgram, NoLauncher},
};

/// The launcher of KVM machines: `vm-kvm-launcher`, which the variable `TWINVM_KVM_LAUNCHER` may name.
pub static LAUNCHER: LauncherKind =
    LauncherKind::new("vm-kvm-launcher", "TWINVM_KVM_LAUNCHER", "TWINVM_RUN_KVM_LAUNCHER");

/// Becomes the launcher of KVM machines where this process was started for that, and then does not return.
///
/// It must be the first thing that `main` does, before there are other threads. A program that calls it needs no other
/// binary to run machines; see [`LauncherProgram::find`] for when it is used.
pub fn run_launcher_if_asked() {
    LAUNCHER.run_if_asked(vmm::launcher_main);
}
