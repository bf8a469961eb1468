//! twinvm's microVMs on libkrun: a launcher process for each machine.
//!
//! [`KrunBackend::builder`] gives a whole backend.
//!
//! # What it needs
//!
//! - `/dev/kvm`, and the right to open it;
//! - a kernel, and its modules where vsock and virtio are modules: see
//!   [`Kernel::find_with_libkrunfw`](vm_guest_image::Kernel::find_with_libkrunfw). It may be the same that machines of KVM
//!   have, or that of libkrunfw, which alone can do TSI; initial file system and agent are the same with either;
//! - for a network by way of it, `passt`, named by [`with_passt`](KrunBackendBuilder::with_passt) or the variable
//!   `TWINVM_PASST`, or found on `PATH`; and a kernel with a driver for virtio's network device;
//! - a launcher program: see [`LauncherProgram::find`]. The simplest is the program itself: its `main` calls
//!   [`run_launcher_if_asked`] before anything else. Only a launcher has libkrun in it, so a program that uses another one
//!   can do without this crate's features.
//!
//! # Features
//!
//! `vendored` (by default) builds libkrun from its crate into the launcher; `system` links the one that is installed, which
//! must have block and network devices.
//!
//! # What a machine is on the host
//!
//! Two processes, and nothing else: the launcher, which answers the owner, and its child, in which libkrun runs the guest;
//! and where the network goes by it, a third, which is passt. All but the launcher stand still while the machine is paused.
//! All end when the owner does, however that comes about.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![deny(unsafe_code)]

mod backend;
mod hypervisor;
#[cfg(any(feature = "vendored", feature = "system"))]
pub mod vmm;

pub use backend::{KrunBackend, KrunBackendBuilder};
pub use hypervisor::{KrunHypervisor, KrunHypervisorBuilder, SetupError};
pub use vm_launcher::{
    control,
    life::StageTimes,
    passt,
    program::{LauncherKind, LauncherProgram, NoLauncher},
};

/// The launcher of libkrun's machines: `vm-krun-launcher`, which the variable `TWINVM_KRUN_LAUNCHER` may name.
pub static LAUNCHER: LauncherKind =
    LauncherKind::new("vm-krun-launcher", "TWINVM_KRUN_LAUNCHER", "TWINVM_RUN_KRUN_LAUNCHER");

/// Becomes the launcher of libkrun's machines where this process was started for that, and then does not return.
///
/// It must be the first thing that `main` does, before there are other threads. Without one of this crate's features
/// there is no libkrun in the program, and this does nothing.
pub fn run_launcher_if_asked() {
    #[cfg(any(feature = "vendored", feature = "system"))]
    LAUNCHER.run_if_asked(vmm::launcher_main);
}
