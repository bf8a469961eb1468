//! twinvm's microVMs on Linux KVM: a VMM in a launcher process for each machine.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

pub mod control;
pub mod vmm;
