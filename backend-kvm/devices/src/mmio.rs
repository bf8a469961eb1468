//! [`MmioTransport`]: the registers through which a driver finds and drives a device (virtio 1.2, section 4.2.2, register
//! layout version 2; the legacy layout is not offered).
//!
//! What a driver does wrong has no effect where the specification leaves that open: accesses of a wrong width, offset or
//! at a wrong time read as zero or are ignored. A driver that makes no sense to the *device* breaks it: the device is
//! reset, the status shows `DEVICE_NEEDS_RESET`, the driver is told by a configuration change, and nothing more happens
//! until it resets the device. The machine goes on.

use crate::device::{DeviceBroken, Interrupt, Memory, VirtioDevice};
use crate::state::{QueueRegisters, RestoreError, SaveError, TransportState};
use std::{
    any::Any,
    fmt,
    os::fd::BorrowedFd,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};
use virtio_bindings::{
    virtio_config::{
        VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
        VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
        VIRTIO_F_VERSION_1,
    },
    virtio_mmio::{
        VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_DEVICE_FEATURES,
        VIRTIO_MMIO_DEVICE_FEATURES_SEL, VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES,
        VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING,
        VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_MAGIC_VALUE,
        VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH,
        VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_NUM,
        VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL,
        VIRTIO_MMIO_QUEUE_USED_HIGH, VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_SHM_BASE_HIGH,
        VIRTIO_MMIO_SHM_BASE_LOW, VIRTIO_MMIO_SHM_LEN_HIGH, VIRTIO_MMIO_SHM_LEN_LOW,
        VIRTIO_MMIO_STATUS, VIRTIO_MMIO_VENDOR_ID, VIRTIO_MMIO_VERSION,
    },
    virtio_ring::VIRTIO_RING_F_EVENT_IDX,
};
use virtio_queue::{Queue, QueueT};

/// The size in bytes of a transport's range of addresses.
pub const MMIO_SIZE: u64 = 0x1000;

/// Where in its range a driver writes the number of a queue, as four bytes in little-endian order, to say that something
/// is there. An ioeventfd on this address with a length of 4 and the queue's number as datum takes the place of
/// [`MmioTransport::write`]; its owner calls [`MmioTransport::queue_notified`].
pub const QUEUE_NOTIFY_OFFSET: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

/// The length in bytes of the write that notifies.
pub const QUEUE_NOTIFY_LENGTH: u32 = 4;

/// An interrupt line of the machine, raised as an edge. Other devices may share it.
pub trait IrqLine: Send + Sync + fmt::Debug {
    /// Raises it once.
    fn trigger(&self);
}

/// The registers of one device. One thread at a time uses it.
#[derive(Debug)]
pub struct MmioTransport {
    device: Box<dyn VirtioDevice>,
    memory: Memory,
    lines: Arc<Lines>,
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    /// The driver took a feature whose number is 64 or above.
    features_beyond: bool,
    queue_select: u32,
    queues: Vec<QueueRegisters>,
    broken: Option<DeviceBroken>,
}

impl MmioTransport {
    /// Puts a device behind registers, as after power-on.
    #[must_use]
    pub fn new(device: Box<dyn VirtioDevice>, memory: Memory, irq: Arc<dyn IrqLine>) -> Self {
        let queues = device.queue_sizes().iter().map(|&max| QueueRegisters::new(max)).collect();
        Self {
            device,
            memory,
            lines: Arc::new(Lines {
                status: AtomicU32::new(0),
                generation: AtomicU32::new(0),
                irq,
            }),
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            features_beyond: false,
            queue_select: 0,
            queues,
            broken: None,
        }
    }

    /// Gives the device.
    #[must_use]
    pub fn device(&self) -> &dyn VirtioDevice {
        &*self.device
    }

    /// Gives the device as what it is, for the calls that only this kind has; none where it is of another kind.
    pub fn device_as<D: VirtioDevice>(&mut self) -> Option<&mut D> {
        let device: &mut dyn Any = &mut *self.device;
        device.downcast_mut()
    }

    /// Says what the driver did, where it broke the device and has not reset it since.
    #[must_use]
    pub fn broken(&self) -> Option<&DeviceBroken> {
        self.broken.as_ref()
    }

    /// Says whether the driver is ready and the device works for it.
    #[must_use]
    pub fn active(&self) -> bool {
        const STOPPED: u32 = VIRTIO_CONFIG_S_NEEDS_RESET | VIRTIO_CONFIG_S_FAILED;
        self.status & (VIRTIO_CONFIG_S_DRIVER_OK | STOPPED) == VIRTIO_CONFIG_S_DRIVER_OK
    }

    /// Does what the guest's read of `data.len()` bytes at `offset` in the range gives.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Ok(register) = u32::try_from(offset) else { return };
        let within = offset.checked_add(data.len() as u64).is_some_and(|end| end <= MMIO_SIZE);
        if !within {
            return;
        }
        if register >= VIRTIO_MMIO_CONFIG {
            self.device.read_config(offset - u64::from(VIRTIO_MMIO_CONFIG), data);
        } else if data.len() == 4 {
            data.copy_from_slice(&self.register(register).to_le_bytes());
        }
    }

    /// Does what the guest's write of `data` at `offset` in the range asks.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        // No device here has a configuration field that a driver may write.
        let (Ok(register), Ok(value)) = (u32::try_from(offset), <[u8; 4]>::try_from(data)) else {
            return;
        };
        let value = u32::from_le_bytes(value);
        match register {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES => self.take_features(value),
            VIRTIO_MMIO_QUEUE_SEL => self.queue_select = value,
            VIRTIO_MMIO_QUEUE_READY => self.set_queue_ready(value),
            VIRTIO_MMIO_QUEUE_NOTIFY => {
                if let Ok(queue) = u16::try_from(value) {
                    self.queue_notified(queue);
                }
            }
            VIRTIO_MMIO_INTERRUPT_ACK => {
                self.lines.status.fetch_and(!value, Ordering::AcqRel);
            }
            VIRTIO_MMIO_STATUS => self.set_status(value),
            _ => self.set_up_queue(register, value),
        }
    }

    /// Tells the device that the guest put something into a queue: its driver wrote the number at
    /// [`QUEUE_NOTIFY_OFFSET`]. Ignored while the device is not active and for a queue that it does not have.
    pub fn queue_notified(&mut self, queue: u16) {
        if self.active() && usize::from(queue) < self.queues.len() {
            let outcome = self.device.queue_notified(queue);
            self.settle(outcome);
        }
    }

    /// Gives the descriptor that is readable while the device has something to do for the host, the same for the
    /// transport's whole life; [`host_ready`](Self::host_ready) is then to be called.
    #[must_use]
    pub fn host_events(&self) -> Option<BorrowedFd<'_>> {
        self.device.host_events()
    }

    /// Lets the device do what [`host_events`](Self::host_events) announced. Ignored while the device is not active.
    pub fn host_ready(&mut self) {
        if self.active() {
            let outcome = self.device.host_ready();
            self.settle(outcome);
        }
    }

    /// Gives the state of the registers and the queues, to be restored into a transport with an equal device.
    ///
    /// # Errors
    /// When the device is active and does not give its queues.
    pub fn save(&self) -> Result<TransportState, SaveError> {
        let mut queues = self.queues.clone();
        if self.active() {
            let running = self.device.queues();
            if running.len() != queues.len() {
                return Err(SaveError::NoQueues { device_type: self.device.device_type() });
            }
            for (registers, queue) in queues.iter_mut().zip(running) {
                registers.next_available = queue.next_avail();
                registers.next_used = queue.next_used();
            }
        }
        Ok(TransportState {
            device_type: self.device.device_type(),
            status: self.status,
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            driver_features: self.driver_features,
            features_beyond: self.features_beyond,
            queue_select: self.queue_select,
            interrupt_status: self.lines.status.load(Ordering::Acquire),
            config_generation: self.lines.generation.load(Ordering::Acquire),
            queues,
        })
    }

    /// Takes up a saved state, activating the device where it was active. The transport must be new, its memory that of
    /// the saved machine, its device equal to the saved one. An interrupt that the guest had not acknowledged is raised
    /// again.
    ///
    /// # Errors
    /// When the state does not fit the device; nothing was changed then. When the device refuses its queues; the
    /// transport is then as new.
    pub fn restore(&mut self, state: &TransportState) -> Result<(), RestoreError> {
        state.check(&*self.device, self.offered())?;
        self.status = state.status;
        self.device_features_select = state.device_features_select;
        self.driver_features_select = state.driver_features_select;
        self.driver_features = state.driver_features;
        self.features_beyond = state.features_beyond;
        self.queue_select = state.queue_select;
        self.queues.clone_from(&state.queues);
        self.lines.generation.store(state.config_generation, Ordering::Release);
        self.lines.status.store(state.interrupt_status, Ordering::Release);
        if self.active()
            && let Err(broken) = self.activate()
        {
            self.reset();
            return Err(RestoreError::Refused(broken));
        }
        if state.interrupt_status != 0 {
            self.lines.irq.trigger();
        }
        Ok(())
    }

    fn register(&self, register: u32) -> u32 {
        match register {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => 2,
            VIRTIO_MMIO_DEVICE_ID => self.device.device_type(),
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => match self.device_features_select {
                0 => low(self.offered()),
                1 => high(self.offered()),
                _ => 0,
            },
            VIRTIO_MMIO_QUEUE_NUM_MAX => self.selected().map_or(0, |queue| queue.max.into()),
            VIRTIO_MMIO_QUEUE_READY => self.selected().map_or(0, |queue| queue.ready.into()),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.lines.status.load(Ordering::Acquire),
            VIRTIO_MMIO_STATUS => self.status,
            // No shared memory: a region that does not exist has the length -1 (section 4.2.2.1).
            VIRTIO_MMIO_SHM_LEN_LOW
            | VIRTIO_MMIO_SHM_LEN_HIGH
            | VIRTIO_MMIO_SHM_BASE_LOW
            | VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            VIRTIO_MMIO_CONFIG_GENERATION => self.lines.generation.load(Ordering::Acquire),
            _ => 0,
        }
    }

    fn offered(&self) -> u64 {
        self.device.features() | 1 << VIRTIO_F_VERSION_1
    }

    fn selected(&self) -> Option<&QueueRegisters> {
        usize::try_from(self.queue_select).ok().and_then(|index| self.queues.get(index))
    }

    /// Says whether the driver is between its features and its readiness, the only time at which it sets up queues.
    fn setting_up(&self) -> bool {
        const ALL: u32 = VIRTIO_CONFIG_S_FEATURES_OK
            | VIRTIO_CONFIG_S_DRIVER_OK
            | VIRTIO_CONFIG_S_FAILED
            | VIRTIO_CONFIG_S_NEEDS_RESET;
        self.status & ALL == VIRTIO_CONFIG_S_FEATURES_OK
    }

    fn take_features(&mut self, value: u32) {
        let driver_there = self.status & VIRTIO_CONFIG_S_DRIVER != 0;
        if !driver_there || self.status & VIRTIO_CONFIG_S_FEATURES_OK != 0 {
            return;
        }
        let taken = &mut self.driver_features;
        match self.driver_features_select {
            0 => *taken = *taken >> 32 << 32 | u64::from(value),
            1 => *taken = u64::from(value) << 32 | *taken & u64::from(u32::MAX),
            _ => self.features_beyond |= value != 0,
        }
    }

    fn set_up_queue(&mut self, register: u32, value: u32) {
        if !self.setting_up() {
            return;
        }
        let Ok(index) = usize::try_from(self.queue_select) else { return };
        let Some(queue) = self.queues.get_mut(index).filter(|queue| !queue.ready) else { return };
        match register {
            // A size that does not fit is kept as zero, with which no queue becomes ready.
            VIRTIO_MMIO_QUEUE_NUM => queue.size = u16::try_from(value).unwrap_or(0),
            VIRTIO_MMIO_QUEUE_DESC_LOW => set_low(&mut queue.descriptors, value),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => set_high(&mut queue.descriptors, value),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_low(&mut queue.available, value),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_high(&mut queue.available, value),
            VIRTIO_MMIO_QUEUE_USED_LOW => set_low(&mut queue.used, value),
            VIRTIO_MMIO_QUEUE_USED_HIGH => set_high(&mut queue.used, value),
            _ => {}
        }
    }

    /// A queue becomes ready only where its size is allowed and its rings are aligned and in memory: otherwise the
    /// driver reads back that it is not. A running device cannot do without a queue, so taking one away breaks it.
    fn set_queue_ready(&mut self, value: u32) {
        let setting_up = self.setting_up();
        let active = self.active();
        let memory = self.memory.clone();
        let Ok(index) = usize::try_from(self.queue_select) else { return };
        let Some(registers) = self.queues.get_mut(index) else { return };
        if setting_up {
            registers.ready = value == 1
                && registers.queue(true, false).is_ok_and(|queue| queue.is_valid(&memory));
        } else if active && value == 0 && registers.ready {
            registers.ready = false;
            let reason = format!("queue {index} was taken away");
            self.settle(Err(DeviceBroken::new("transport", reason)));
        }
    }

    /// Follows section 2.1 and 3.1: a write of zero resets; otherwise each bit is taken only after those that come
    /// before it, and none is ever taken back.
    fn set_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        let added = value & !self.status;
        if added & VIRTIO_CONFIG_S_FAILED != 0 {
            self.status |= VIRTIO_CONFIG_S_FAILED;
            self.device.reset();
            return;
        }
        if self.status & (VIRTIO_CONFIG_S_FAILED | VIRTIO_CONFIG_S_NEEDS_RESET) != 0 {
            return;
        }
        for (bit, after) in [
            (VIRTIO_CONFIG_S_ACKNOWLEDGE, 0),
            (VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_ACKNOWLEDGE),
            (VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_DRIVER),
            (VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK),
        ] {
            let refused = bit == VIRTIO_CONFIG_S_FEATURES_OK && !self.features_fit();
            if added & bit == 0 || self.status & after != after || refused {
                continue;
            }
            self.status |= bit;
            if bit == VIRTIO_CONFIG_S_DRIVER_OK {
                let outcome = self.activate();
                self.settle(outcome);
            }
        }
    }

    fn features_fit(&self) -> bool {
        !self.features_beyond
            && self.driver_features & !self.offered() == 0
            && self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0
    }

    fn activate(&mut self) -> Result<(), DeviceBroken> {
        let by_index = self.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let queues = self
            .queues
            .iter()
            .map(|registers| registers.queue(registers.ready, by_index))
            .collect::<Result<Vec<Queue>, _>>()
            .map_err(|error| DeviceBroken::new("transport", error.to_string()))?;
        if queues.iter().any(|queue| queue.ready() && !queue.is_valid(&self.memory)) {
            return Err(DeviceBroken::new("transport", "a ready queue is not in memory"));
        }
        self.device.activate(
            self.memory.clone(),
            self.driver_features,
            queues,
            Arc::clone(&self.lines) as Arc<dyn Interrupt>,
        )
    }

    /// Keeps the machine going when the device broke.
    fn settle(&mut self, outcome: Result<(), DeviceBroken>) {
        if let Err(broken) = outcome {
            self.device.reset();
            self.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
            self.broken = Some(broken);
            self.lines.config_changed();
        }
    }

    fn reset(&mut self) {
        self.device.reset();
        self.status = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.driver_features = 0;
        self.features_beyond = false;
        self.queue_select = 0;
        for queue in &mut self.queues {
            *queue = QueueRegisters::new(queue.max);
        }
        self.broken = None;
        self.lines.status.store(0, Ordering::Release);
    }
}

/// What the device changes from any thread.
#[derive(Debug)]
struct Lines {
    status: AtomicU32,
    generation: AtomicU32,
    irq: Arc<dyn IrqLine>,
}

impl Interrupt for Lines {
    fn used(&self) {
        self.status.fetch_or(VIRTIO_MMIO_INT_VRING, Ordering::AcqRel);
        self.irq.trigger();
    }

    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.status.fetch_or(VIRTIO_MMIO_INT_CONFIG, Ordering::AcqRel);
        self.irq.trigger();
    }
}

/// "virt" in little-endian order.
const MAGIC: u32 = u32::from_le_bytes(*b"virt");

/// "twin" in little-endian order; drivers make nothing of it.
const VENDOR: u32 = u32::from_le_bytes(*b"twin");

fn low(value: u64) -> u32 {
    let [a, b, c, d, ..] = value.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

fn high(value: u64) -> u32 {
    low(value >> 32)
}

fn set_low(of: &mut u64, value: u32) {
    *of = *of >> 32 << 32 | u64::from(value);
}

fn set_high(of: &mut u64, value: u32) {
    *of = u64::from(value) << 32 | *of & u64::from(u32::MAX);
}
