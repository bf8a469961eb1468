//! [`TransportState`]: a transport and its queues as plain data, for snapshots.
//!
//! A device keeps nothing else here: what a guest negotiated is in the registers, what it asked for is in its memory,
//! and the two indices of each queue say how far the device came. Requests are served whole within one call, so none is
//! half done when a machine is saved between calls.

use crate::device::{DeviceBroken, VirtioDevice};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_FEATURES_OK;
use virtio_queue::{Queue, QueueState};

/// The registers of one queue. Addresses are guest physical ones.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueRegisters {
    /// The largest size, which the device gives.
    pub max: u16,
    /// The size that the driver chose.
    pub size: u16,
    /// Whether the driver said that it is set up, and it is.
    pub ready: bool,
    /// Where the descriptor table begins.
    pub descriptors: u64,
    /// Where the available ring begins.
    pub available: u64,
    /// Where the used ring begins.
    pub used: u64,
    /// The index of the next chain to take.
    pub next_available: u16,
    /// The index of the next chain to give back.
    pub next_used: u16,
}

impl QueueRegisters {
    /// Gives them as after a reset.
    #[must_use]
    pub fn new(max: u16) -> Self {
        Self {
            max,
            size: max,
            ready: false,
            descriptors: 0,
            available: 0,
            used: 0,
            next_available: 0,
            next_used: 0,
        }
    }

    /// Makes the queue that they describe; its rings may lie outside memory.
    ///
    /// # Errors
    /// When the size is not a power of two up to the largest, or a ring is not aligned; a queue that is not ready is made
    /// whatever they say.
    pub(crate) fn queue(&self, ready: bool, by_index: bool) -> Result<Queue, virtio_queue::Error> {
        let plain = QueueState { max_size: self.max, size: self.max, ..QueueState::default() };
        if !ready {
            return Queue::try_from(plain);
        }
        Queue::try_from(QueueState {
            size: self.size,
            ready,
            desc_table: self.descriptors,
            avail_ring: self.available,
            used_ring: self.used,
            next_avail: self.next_available,
            next_used: self.next_used,
            event_idx_enabled: by_index,
            ..plain
        })
    }
}

/// The state of a transport and of its device's queues. It holds no pointer and no descriptor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    /// The device's type (virtio 1.2, section 5).
    pub device_type: u32,
    /// The status register.
    pub status: u32,
    /// Which half of the offered features the driver reads.
    pub device_features_select: u32,
    /// Which half of its features the driver writes.
    pub driver_features_select: u32,
    /// The features that the driver took.
    pub driver_features: u64,
    /// Whether it took one whose number is 64 or above.
    pub features_beyond: bool,
    /// Which queue the driver sets up.
    pub queue_select: u32,
    /// The interrupts that the driver has not acknowledged.
    pub interrupt_status: u32,
    /// How often the device's configuration changed.
    pub config_generation: u32,
    /// The queues in order.
    pub queues: Vec<QueueRegisters>,
}

impl TransportState {
    /// Says whether the state may be that of a transport with this device.
    pub(crate) fn check(
        &self,
        device: &dyn VirtioDevice,
        offered: u64,
    ) -> Result<(), RestoreError> {
        if self.device_type != device.device_type() {
            return Err(RestoreError::Device {
                saved: self.device_type,
                here: device.device_type(),
            });
        }
        let negotiated = self.status & VIRTIO_CONFIG_S_FEATURES_OK != 0;
        let missing = self.driver_features & !offered;
        if negotiated && (missing != 0 || self.features_beyond) {
            return Err(RestoreError::Features { missing });
        }
        let sizes = self.queues.iter().map(|queue| queue.max);
        if !sizes.eq(device.queue_sizes().iter().copied()) {
            return Err(RestoreError::Queues);
        }
        Ok(())
    }
}

/// Why a transport cannot be saved.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SaveError {
    /// The device does not give its queues while it is active.
    #[error("the device of type {device_type} does not give its queues")]
    NoQueues {
        /// The device's type.
        device_type: u32,
    },
}

/// Why a saved state cannot be taken up.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// The state is that of another kind of device.
    #[error("the saved device has type {saved}, not {here}")]
    Device {
        /// The saved device's type.
        saved: u32,
        /// The type of the device here.
        here: u32,
    },
    /// The guest uses features that the device here does not offer.
    #[error("the guest uses features {missing:#x}, which the device does not offer")]
    Features {
        /// The features as bits.
        missing: u64,
    },
    /// The saved device has other queues.
    #[error("the saved device has other queues")]
    Queues,
    /// The device does not take its queues.
    #[error(transparent)]
    Refused(DeviceBroken),
}
