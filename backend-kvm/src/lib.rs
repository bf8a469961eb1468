//! twinvm's microVMs on Linux KVM: a VMM in a launcher process for each machine.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![deny(unsafe_code)]

mod console;
pub mod control;
mod launcher;
mod life;
mod machine;
mod packet;
pub mod vmm;

pub use launcher::{
    LAUNCHER_VARIABLE, LauncherProgram, NoLauncher, RUN_LAUNCHER_VARIABLE, run_launcher_if_asked,
};
pub use life::StageTimes;
