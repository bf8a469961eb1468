//! A driver that plays the guest: it keeps to the rules through [`Guest`] and [`Ring`]'s chains, or breaks them through
//! single descriptors, indices and registers.

use crate::{
    device::{Memory, VirtioDevice},
    mmio::{IrqLine, MmioTransport, QUEUE_NOTIFY_OFFSET},
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};
use virtio_bindings::{virtio_config, virtio_mmio, virtio_ring};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

/// An interrupt line that counts.
#[derive(Debug, Default)]
pub struct CountingLine(AtomicU64);

impl CountingLine {
    /// Gives how often it was raised.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

impl IrqLine for CountingLine {
    fn trigger(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// Makes memory of regions, each with its first address and its length in bytes.
///
/// # Errors
/// When regions overlap or the host has no memory.
pub fn memory(regions: &[(u64, usize)]) -> Result<Memory, vm_memory::mmap::FromRangesError> {
    let regions: Vec<_> = regions.iter().map(|&(at, length)| (GuestAddress(at), length)).collect();
    Memory::from_ranges(&regions)
}

/// A buffer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Where it begins.
    pub address: u64,
    /// Its length in bytes.
    pub length: u32,
    /// Whether the device writes it.
    pub writable: bool,
}

/// The driver's side of a queue. What lies outside memory is not written.
#[derive(Clone, Debug)]
pub struct Ring {
    memory: Memory,
    /// The number of descriptors.
    pub size: u16,
    /// Where the descriptor table begins.
    pub descriptors: u64,
    /// Where the available ring begins.
    pub available: u64,
    /// Where the used ring begins.
    pub used: u64,
    published: u16,
    seen: u16,
}

impl Ring {
    /// Lays out a queue of `size` descriptors from `base` on, which is a multiple of 16, and clears it.
    #[must_use]
    pub fn new(memory: &Memory, base: u64, size: u16) -> Self {
        let places = u64::from(size);
        let available = base + 16 * places;
        let ring = Self {
            memory: memory.clone(),
            size,
            descriptors: base,
            available,
            used: (available + 6 + 2 * places).next_multiple_of(4),
            published: 0,
            seen: 0,
        };
        for at in base..ring.end() {
            ring.put(at, 0u8);
        }
        ring
    }

    /// Gives the first address behind the used ring.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.used + 6 + 8 * u64::from(self.size)
    }

    /// Writes one descriptor.
    pub fn descriptor(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let at = self.descriptors.wrapping_add(16 * u64::from(index));
        self.put(at, Descriptor::new(address, length, flags, next));
    }

    /// Writes a chain into the descriptors from `first` on and gives the index behind its last.
    pub fn chain(&self, first: u16, buffers: &[Buffer]) -> u16 {
        let mut index = first;
        for (number, buffer) in buffers.iter().enumerate() {
            let mut flags = if buffer.writable { virtio_ring::VRING_DESC_F_WRITE } else { 0 };
            if number + 1 < buffers.len() {
                flags |= virtio_ring::VRING_DESC_F_NEXT;
            }
            let next = index.wrapping_add(1);
            let flags = u16::try_from(flags).unwrap_or(0);
            self.descriptor(index, buffer.address, buffer.length, flags, next);
            index = next;
        }
        index
    }

    /// Makes the chain at `head` available.
    pub fn publish(&mut self, head: u16) {
        let place = u64::from(self.published.checked_rem(self.size).unwrap_or(0));
        self.put(self.available.wrapping_add(4 + 2 * place), head.to_le());
        self.set_published(self.published.wrapping_add(1));
    }

    /// Sets the available ring's index.
    pub fn set_published(&mut self, index: u16) {
        self.published = index;
        self.put(self.available.wrapping_add(2), index.to_le());
    }

    /// Sets the available ring's flags.
    pub fn set_flags(&self, flags: u16) {
        self.put(self.available, flags.to_le());
    }

    /// Sets the index of the used chain from which on the driver wants to hear.
    pub fn set_used_event(&self, index: u16) {
        self.put(self.available.wrapping_add(4 + 2 * u64::from(self.size)), index.to_le());
    }

    /// Gives what the device gave back since the last call: the head and the bytes written, at most one round of it.
    pub fn take_used(&mut self) -> Vec<(u32, u32)> {
        let index = u16::from_le(self.get(self.used.wrapping_add(2)).unwrap_or(0));
        let mut list = Vec::new();
        while self.seen != index && list.len() < usize::from(self.size) {
            let place = u64::from(self.seen.checked_rem(self.size).unwrap_or(0));
            let at = self.used.wrapping_add(4 + 8 * place);
            let head: u32 = self.get(at).unwrap_or(u32::MAX);
            let length: u32 = self.get(at.wrapping_add(4)).unwrap_or(u32::MAX);
            list.push((u32::from_le(head), u32::from_le(length)));
            self.seen = self.seen.wrapping_add(1);
        }
        list
    }

    fn put(&self, at: u64, value: impl vm_memory::ByteValued) {
        let _outside: Result<(), GuestMemoryError> = self.memory.write_obj(value, GuestAddress(at));
    }

    fn get<T: vm_memory::ByteValued>(&self, at: u64) -> Option<T> {
        self.memory.read_obj(GuestAddress(at)).ok()
    }
}

/// A guest with one device.
#[derive(Debug)]
pub struct Guest {
    /// The device's registers.
    pub transport: MmioTransport,
    /// The device's interrupt line.
    pub line: Arc<CountingLine>,
}

impl Guest {
    /// Puts a device into a guest with this memory.
    #[must_use]
    pub fn new(device: impl VirtioDevice, memory: &Memory) -> Self {
        let line = Arc::new(CountingLine::default());
        let irq: Arc<dyn IrqLine> = Arc::<CountingLine>::clone(&line);
        Self { transport: MmioTransport::new(Box::new(device), memory.clone(), irq), line }
    }

    /// Reads a register.
    pub fn read(&mut self, register: u32) -> u32 {
        let mut data = [0; 4];
        self.transport.read(register.into(), &mut data);
        u32::from_le_bytes(data)
    }

    /// Writes a register.
    pub fn write(&mut self, register: u32, value: u32) {
        self.transport.write(register.into(), &value.to_le_bytes());
    }

    /// Reads the status register.
    pub fn status(&mut self) -> u32 {
        self.read(virtio_mmio::VIRTIO_MMIO_STATUS)
    }

    /// Adds bits to the status register as a driver does, and says whether they stand there then.
    pub fn add_status(&mut self, bits: u32) -> bool {
        let status = self.status();
        self.write(virtio_mmio::VIRTIO_MMIO_STATUS, status | bits);
        self.status() & bits == bits
    }

    /// Resets the device.
    pub fn reset(&mut self) {
        self.write(virtio_mmio::VIRTIO_MMIO_STATUS, 0);
    }

    /// Reads the features that are offered.
    pub fn offered(&mut self) -> u64 {
        let mut half = |select| {
            self.write(virtio_mmio::VIRTIO_MMIO_DEVICE_FEATURES_SEL, select);
            u64::from(self.read(virtio_mmio::VIRTIO_MMIO_DEVICE_FEATURES))
        };
        half(0) | half(1) << 32
    }

    /// Resets the device and takes features; gives what the device says to them.
    pub fn negotiate(&mut self, features: u64) -> bool {
        self.reset();
        self.add_status(virtio_config::VIRTIO_CONFIG_S_ACKNOWLEDGE);
        self.add_status(virtio_config::VIRTIO_CONFIG_S_DRIVER);
        for (select, half) in [(0, features & u64::from(u32::MAX)), (1, features >> 32)] {
            self.write(virtio_mmio::VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
            let half = u32::try_from(half).unwrap_or(0);
            self.write(virtio_mmio::VIRTIO_MMIO_DRIVER_FEATURES, half);
        }
        self.add_status(virtio_config::VIRTIO_CONFIG_S_FEATURES_OK)
    }

    /// Sets up a queue; says whether the device took it.
    pub fn set_up(&mut self, queue: u32, ring: &Ring) -> bool {
        self.write(virtio_mmio::VIRTIO_MMIO_QUEUE_SEL, queue);
        self.write(virtio_mmio::VIRTIO_MMIO_QUEUE_NUM, ring.size.into());
        for (register, address) in [
            (virtio_mmio::VIRTIO_MMIO_QUEUE_DESC_LOW, ring.descriptors),
            (virtio_mmio::VIRTIO_MMIO_QUEUE_AVAIL_LOW, ring.available),
            (virtio_mmio::VIRTIO_MMIO_QUEUE_USED_LOW, ring.used),
        ] {
            let half = |bits: u64| u32::try_from(bits & u64::from(u32::MAX)).unwrap_or(0);
            self.write(register, half(address));
            self.write(register + 4, half(address >> 32));
        }
        self.write(virtio_mmio::VIRTIO_MMIO_QUEUE_READY, 1);
        self.read(virtio_mmio::VIRTIO_MMIO_QUEUE_READY) == 1
    }

    /// Does all that a driver does from reset to readiness; says whether the device works for it.
    pub fn start(&mut self, features: u64, rings: &[&Ring]) -> bool {
        if !self.negotiate(features) {
            return false;
        }
        for (queue, ring) in (0..).zip(rings) {
            if !self.set_up(queue, ring) {
                return false;
            }
        }
        self.add_status(virtio_config::VIRTIO_CONFIG_S_DRIVER_OK);
        self.transport.active()
    }

    /// Says that something is in a queue.
    pub fn notify(&mut self, queue: u32) {
        self.transport.write(QUEUE_NOTIFY_OFFSET, &queue.to_le_bytes());
    }

    /// Says whether the device has something to do for the host.
    #[must_use]
    pub fn host_waits(&self) -> bool {
        let Some(events) = self.transport.host_events() else { return false };
        let mut list = [PollFd::new(&events, PollFlags::IN)];
        poll(&mut list, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }

    /// Lets the device do what it has to do for the host, at most `turns` times; says whether it came to rest.
    pub fn settle(&mut self, turns: u32) -> bool {
        for _ in 0..turns {
            if !self.host_waits() {
                return true;
            }
            self.transport.host_ready();
        }
        !self.host_waits()
    }
}
