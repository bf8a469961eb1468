//! What a vCPU is and how it begins.

mod cpuid;
mod registers;
mod state;

pub(super) use cpuid::Model;
pub(super) use registers::{enter_kernel, prepare_all, registers_of, write_tables};
pub(super) use state::{StateKinds, VcpuState};
