//! [`VirtioDevice`]: what a transport asks of a device.

use std::{fmt, os::fd::BorrowedFd, sync::Arc};
use virtio_queue::Queue;

/// A guest's memory.
pub type Memory = vm_memory::GuestMemoryMmap<()>;

/// Tells the guest's driver something.
pub trait Interrupt: Send + Sync + fmt::Debug {
    /// Says that used buffers are there.
    fn used(&self);

    /// Says that the device's configuration, or its need for a reset, changed.
    fn config_changed(&self);
}

/// A virtio device behind a transport (virtio 1.2, section 2). One thread at a time uses it.
///
/// A device that broke is not called any more until the driver resets it.
pub trait VirtioDevice: Send + fmt::Debug {
    /// Gives the device's type (section 5).
    fn device_type(&self) -> u32;

    /// Gives the largest size of each queue, a power of two at most 32768.
    fn queue_sizes(&self) -> &[u16];

    /// Gives the features that it offers, without the transport's own (`VIRTIO_F_VERSION_1` is the transport's).
    fn features(&self) -> u64;

    /// Fills `data` with its configuration from `offset` on; zeros beyond its end.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Starts it: the driver is ready (`DRIVER_OK`). `features` are those that the driver took; `queues` has one for
    /// each of [`queue_sizes`](Self::queue_sizes), those that the driver did not set up being not ready.
    ///
    /// # Errors
    /// When the driver's set-up makes no sense.
    fn activate(
        &mut self,
        memory: Memory,
        features: u64,
        queues: Vec<Queue>,
        interrupt: Arc<dyn Interrupt>,
    ) -> Result<(), DeviceBroken>;

    /// Does what the guest put into a queue; called when the guest says that something is there, also without reason.
    ///
    /// # Errors
    /// When the guest's queues make no sense.
    fn queue_notified(&mut self, queue: u16) -> Result<(), DeviceBroken>;

    /// Gives a descriptor, the same for the device's whole life, that is readable while the host has something for the
    /// device to do, where it waits for anything of the host's.
    fn host_events(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Does what [`host_events`](Self::host_events) announced; called also without reason.
    ///
    /// # Errors
    /// When the guest's queues make no sense.
    fn host_ready(&mut self) -> Result<(), DeviceBroken> {
        Ok(())
    }

    /// Forgets the driver: memory, queues, requests and connections.
    fn reset(&mut self);
}

/// A guest's driver did what no driver may; the device must be reset before it does anything again.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{device}: {reason}")]
pub struct DeviceBroken {
    /// Which device.
    pub device: &'static str,
    /// What the driver did.
    pub reason: String,
}

impl DeviceBroken {
    /// Says what the driver did.
    #[must_use]
    pub fn new(device: &'static str, reason: impl Into<String>) -> Self {
        Self { device, reason: reason.into() }
    }
}
