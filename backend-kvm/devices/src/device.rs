//! [`VirtioDevice`]: what a transport asks of a device.

use std::{any::Any, fmt, os::fd::BorrowedFd, sync::Arc};
use virtio_queue::Queue;

/// A guest's memory; a clone shares it. It notes which pages this process writes to, as a hypervisor notes those that
/// the guest writes to.
pub type Memory = vm_memory::GuestMemoryMmap<vm_memory::bitmap::AtomicBitmap>;

/// Tells the guest's driver something (virtio 1.2, section 2.3). Callable from any thread, also while the transport is in
/// use.
pub trait Interrupt: Send + Sync + fmt::Debug {
    /// Says that used buffers are there.
    fn used(&self);

    /// Says that the device's configuration, or its need for a reset, changed.
    fn config_changed(&self);
}

/// A virtio device behind a transport (virtio 1.2, section 2). One thread at a time uses it.
///
/// Each call does a bounded amount of work and blocks no longer than the host's own input and output does; what is left
/// is announced through [`host_events`](Self::host_events).
///
/// A device that broke is [`reset`](Self::reset) at once by the transport, and not called any more until the driver has
/// reset it too and activates it again. The same holds for one whose driver gave up (status `FAILED`).
pub trait VirtioDevice: Any + Send + fmt::Debug {
    /// Gives the device's type (section 5).
    fn device_type(&self) -> u32;

    /// Gives the largest size of each queue, a power of two at most 32768.
    fn queue_sizes(&self) -> &[u16];

    /// Gives the features that it offers, without the transport's own (`VIRTIO_F_VERSION_1` is the transport's). A device
    /// whose queues may suppress notifications by index offers `VIRTIO_RING_F_EVENT_IDX` here; the transport switches it
    /// on in the queues when the driver takes it.
    fn features(&self) -> u64;

    /// Fills `data` with its configuration from `offset` on; zeros beyond its end.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Starts it: the driver is ready (`DRIVER_OK`). `features` are those that the driver took; `queues` has one for
    /// each of [`queue_sizes`](Self::queue_sizes), those that the driver did not set up being not ready. The rings of a
    /// ready queue are aligned and in memory. After a restore the queues have the indices that
    /// [`queues`](Self::queues) gave, and may hold requests that nobody announces again.
    ///
    /// # Errors
    /// When the driver's set-up makes no sense, for instance when it left out a queue that the device needs.
    fn activate(
        &mut self,
        memory: Memory,
        features: u64,
        queues: Vec<Queue>,
        interrupt: Arc<dyn Interrupt>,
    ) -> Result<(), DeviceBroken>;

    /// Gives its queues while it is active, all of them and in order, so that their indices can be saved; none while it is
    /// not. A device that leaves this as it is cannot be saved while active: the transport refuses.
    fn queues(&self) -> Vec<&Queue> {
        Vec::new()
    }

    /// Does what the guest put into a queue; called when the guest says that something is there, also without reason.
    ///
    /// # Errors
    /// When the guest's queues make no sense.
    fn queue_notified(&mut self, queue: u16) -> Result<(), DeviceBroken>;

    /// Gives a descriptor, the same for the device's whole life, that is readable while the host has something for the
    /// device to do or the device has work left from an earlier call, where it waits for either. It is not readable
    /// after a [`reset`](Self::reset).
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

    /// Forgets the driver: memory, queues, requests and connections. Called also when it was not activated.
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
