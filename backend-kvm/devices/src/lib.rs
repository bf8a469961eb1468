//! The virtio devices of twinvm's KVM machines: transport, block, entropy and vsock.
//!
//! Nothing here knows KVM or a thread: a device gets a guest's memory, its queues and a way to interrupt, and is told
//! when the guest or the host has something for it. The guest is hostile: whatever its queues hold, a device does its
//! work, ignores it or breaks ([`DeviceBroken`]); it never panics, hangs or touches memory out of bounds.
#![forbid(unsafe_code)]

pub mod block;
pub mod device;
pub mod entropy;
pub mod mmio;
pub mod queue;
pub mod state;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod vsock;

pub use block::{BlockDevice, BlockOptions, DiskChanges};
pub use device::{DeviceBroken, Interrupt, Memory, VirtioDevice};
pub use entropy::EntropyDevice;
pub use mmio::{IrqLine, MmioTransport};
pub use state::TransportState;
pub use vsock::{VsockDevice, VsockLimits, VsockState};

#[cfg(test)]
mod tests;
