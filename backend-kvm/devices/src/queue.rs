//! [`DeviceQueue`]: a queue whose every chain is checked before a device sees it.
//!
//! It stands on [`virtio_queue::Queue`] for the two rings and walks the descriptor table itself, because that crate's own
//! iterator ends a broken chain as if it were a short one, follows indirect tables that were never offered, and does not
//! look at the order of readable and writable descriptors (virtio 1.2, section 2.7).

use crate::device::{DeviceBroken, Interrupt, Memory};
use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::atomic::{Ordering, fence},
};
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT, desc::split::Descriptor};
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryError, Permissions, ReadVolatile, WriteVolatile,
};

/// What is wrong with what a driver put into a queue.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QueueError {
    /// The driver did not set the queue up, or its rings are not in memory.
    #[error("a queue is not set up in memory")]
    NotReady,
    /// The available ring's index says that more chains wait than the queue has places.
    #[error("the available ring's index jumped")]
    IndexJumped,
    /// A descriptor's number is not below the queue's size.
    #[error("descriptor {0} is outside the table")]
    DescriptorOutside(u16),
    /// A chain has more descriptors than the queue: it has a loop.
    #[error("the chain at descriptor {0} has a loop")]
    Loop(u16),
    /// A descriptor is an indirect table, which was not offered.
    #[error("descriptor {0} is indirect")]
    Indirect(u16),
    /// A readable descriptor follows a writable one.
    #[error("descriptor {0} is readable after a writable one")]
    Order(u16),
    /// A buffer is not wholly in memory.
    #[error("descriptor {0} has a buffer outside memory")]
    BufferOutside(u16),
    /// All the buffers of one chain have more than 4 GiB.
    #[error("the chain at descriptor {0} is longer than 4 GiB")]
    TooLong(u16),
    /// More bytes were asked of a chain than its buffers have.
    #[error("a chain has too few bytes")]
    TooShort,
    /// Guest memory could not be used.
    #[error("guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
    /// The ring could not be used.
    #[error("ring: {0}")]
    Ring(#[from] virtio_queue::Error),
}

impl QueueError {
    /// Says that the driver of `device` made this error.
    #[must_use]
    pub fn of(&self, device: &'static str) -> DeviceBroken {
        DeviceBroken::new(device, self.to_string())
    }
}

/// A buffer in guest memory, wholly inside it and not empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it begins.
    pub address: GuestAddress,
    /// Its length in bytes.
    pub length: u32,
}

/// Buffers one after the other; how the driver cut the bytes into buffers has no meaning (section 2.7.4).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Segments {
    parts: Vec<Segment>,
    length: u32,
}

impl Segments {
    /// Gives the number of bytes in all.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.length
    }

    /// Says whether there is no byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Gives the buffers in order.
    #[must_use]
    pub fn parts(&self) -> &[Segment] {
        &self.parts
    }

    /// Cuts off what follows the first `at` bytes and gives it; all stays where there are no more than `at`.
    #[must_use]
    pub fn split_off(&mut self, at: u32) -> Self {
        let mut rest = Self::default();
        let mut before = 0;
        let mut kept = 0;
        for part in &mut self.parts {
            let keep = part.length.min(at - before);
            if keep > 0 {
                kept += 1;
            }
            if keep < part.length {
                rest.push(Segment {
                    address: GuestAddress(part.address.0 + u64::from(keep)),
                    length: part.length - keep,
                });
                part.length = keep;
            }
            before += keep;
        }
        self.parts.truncate(kept);
        self.length = before;
        rest
    }

    /// Copies the first bytes into `into`, which must not be longer than all of it.
    ///
    /// # Errors
    /// [`QueueError::TooShort`] when it is longer; [`QueueError::Memory`] when memory cannot be read.
    pub fn read(&self, memory: &Memory, into: &mut [u8]) -> Result<(), QueueError> {
        let mut left = into;
        for part in &self.parts {
            let (now, later) = left.split_at_mut(left.len().min(bytes(part.length)));
            memory.read_slice(now, part.address)?;
            left = later;
        }
        if left.is_empty() { Ok(()) } else { Err(QueueError::TooShort) }
    }

    /// Copies `from` over the first bytes; `from` must not be longer than all of it.
    ///
    /// # Errors
    /// [`QueueError::TooShort`] when it is longer, with nothing written; [`QueueError::Memory`] when memory cannot be
    /// written.
    pub fn write(&self, memory: &Memory, from: &[u8]) -> Result<(), QueueError> {
        if from.len() > bytes(self.length) {
            return Err(QueueError::TooShort);
        }
        let mut left = from;
        for part in &self.parts {
            let (now, later) = left.split_at(left.len().min(bytes(part.length)));
            memory.write_slice(now, part.address)?;
            left = later;
        }
        Ok(())
    }

    /// Fills every byte from `source`, which writes straight into guest memory.
    ///
    /// # Errors
    /// When the source fails or ends early; some bytes may have been written.
    pub fn fill_from(
        &self,
        memory: &Memory,
        source: &mut impl ReadVolatile,
    ) -> Result<(), QueueError> {
        for part in &self.parts {
            for slice in memory.get_slices(part.address, bytes(part.length), Permissions::Write)? {
                source.read_exact_volatile(&mut slice?).map_err(GuestMemoryError::from)?;
            }
        }
        Ok(())
    }

    /// Hands every byte to `sink`, which reads straight from guest memory.
    ///
    /// # Errors
    /// When the sink fails or takes no more; it may have taken some bytes.
    pub fn drain_into(
        &self,
        memory: &Memory,
        sink: &mut impl WriteVolatile,
    ) -> Result<(), QueueError> {
        for part in &self.parts {
            for slice in memory.get_slices(part.address, bytes(part.length), Permissions::Read)? {
                sink.write_all_volatile(&slice?).map_err(GuestMemoryError::from)?;
            }
        }
        Ok(())
    }

    /// Appends a buffer; the caller keeps the sum within 32 bits.
    fn push(&mut self, part: Segment) {
        self.length += part.length;
        self.parts.push(part);
    }
}

/// A request of the driver's: all its buffers are in memory, readable ones first, at most 4 GiB in all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// The number of its first descriptor, by which it is given back.
    pub head: u16,
    /// What the driver wrote for the device.
    pub readable: Segments,
    /// Where the device writes.
    pub writable: Segments,
}

/// What a device did with one chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handled {
    /// How many bytes of the writable buffers were written, counted from the first without a gap.
    pub written: u32,
    /// How many bytes the request moved, which count against the [`Budget`].
    pub moved: u64,
}

/// How much one call does, so that a busy device does not starve the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// At most this many chains.
    pub chains: u16,
    /// No further chain after this many bytes.
    pub bytes: u64,
}

/// A device's side of one queue.
#[derive(Debug)]
pub struct DeviceQueue {
    device: &'static str,
    queue: Queue,
    memory: Memory,
}

impl DeviceQueue {
    /// Takes a queue that the driver set up; `device` is named in errors.
    ///
    /// # Errors
    /// When it is not ready or its rings are not in memory.
    pub fn new(device: &'static str, queue: Queue, memory: Memory) -> Result<Self, DeviceBroken> {
        if !queue.is_valid(&memory) {
            return Err(QueueError::NotReady.of(device));
        }
        Ok(Self { device, queue, memory })
    }

    /// Gives the queue with its indices.
    #[must_use]
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Gives the guest's memory.
    #[must_use]
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Takes the next chain that the driver made available, if there is one.
    ///
    /// # Errors
    /// When the ring or the chain makes no sense.
    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        let mut waiting = self.queue.iter(&self.memory).map_err(|error| match error {
            virtio_queue::Error::InvalidAvailRingIndex => QueueError::IndexJumped,
            virtio_queue::Error::QueueNotReady => QueueError::NotReady,
            other => QueueError::Ring(other),
        })?;
        match waiting.next().map(|chain| chain.head_index()) {
            Some(head) => self.walk(head).map(Some),
            None => Ok(None),
        }
    }

    /// Puts the chain that was popped last back, to be popped again.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Asks the driver to announce chains from now on, or not to; it may do so all the same. Gives true where some wait
    /// already that it will not announce.
    ///
    /// # Errors
    /// When the ring cannot be used.
    pub fn announce(&mut self, on: bool) -> Result<bool, QueueError> {
        if on {
            return Ok(self.queue.enable_notification(&self.memory)?);
        }
        self.queue.disable_notification(&self.memory)?;
        Ok(false)
    }

    /// Gives a chain back to the driver with the number of bytes written to it.
    ///
    /// # Errors
    /// When the ring cannot be written.
    pub fn push(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        Ok(self.queue.add_used(&self.memory, head, written)?)
    }

    /// Says whether the driver wants to hear of what was pushed since the last call.
    ///
    /// # Errors
    /// When the ring cannot be read.
    pub fn needs_interrupt(&mut self) -> Result<bool, QueueError> {
        if self.queue.event_idx_enabled() {
            return Ok(self.queue.needs_notification(&self.memory)?);
        }
        // The driver's flag must be read after the used index was written (section 2.7.7.1).
        fence(Ordering::SeqCst);
        let flags: u16 =
            self.memory.load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)?;
        Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }

    /// Serves chains with `handle` until none is left or the budget is used up, then interrupts once if the driver wants
    /// it. Gives true when the budget ended it: the caller must come again.
    ///
    /// Chains before a broken one are served and announced.
    ///
    /// # Errors
    /// When the ring or a chain makes no sense, or `handle` says so.
    pub fn serve(
        &mut self,
        budget: Budget,
        interrupt: &dyn Interrupt,
        mut handle: impl FnMut(&Memory, &mut Chain) -> Result<Handled, DeviceBroken>,
    ) -> Result<bool, DeviceBroken> {
        let before = self.queue.next_used();
        let outcome = self.serve_some(budget, &mut handle);
        if self.queue.next_used() != before
            && self.needs_interrupt().map_err(|error| error.of(self.device))?
        {
            interrupt.used();
        }
        outcome
    }

    fn serve_some(
        &mut self,
        budget: Budget,
        handle: &mut impl FnMut(&Memory, &mut Chain) -> Result<Handled, DeviceBroken>,
    ) -> Result<bool, DeviceBroken> {
        let device = self.device;
        let broken = |error: QueueError| error.of(device);
        let mut bytes_left = budget.bytes;
        // Each turn of the outer loop costs one chain too: a driver that moves its index to and fro gets no endless loop.
        let mut chains_left = budget.chains;
        self.queue.disable_notification(&self.memory).map_err(|error| broken(error.into()))?;
        while chains_left > 0 && bytes_left > 0 {
            chains_left -= 1;
            if let Some(mut chain) = self.pop().map_err(broken)? {
                let handled = handle(&self.memory, &mut chain)?;
                self.push(chain.head, handled.written).map_err(broken)?;
                bytes_left = bytes_left.saturating_sub(handled.moved);
            } else if !self
                .queue
                .enable_notification(&self.memory)
                .map_err(|error| broken(error.into()))?
            {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Reads the chain that begins at `head` and checks it.
    fn walk(&self, head: u16) -> Result<Chain, QueueError> {
        let mut chain =
            Chain { head, readable: Segments::default(), writable: Segments::default() };
        let mut index = head;
        for _ in 0..self.queue.size() {
            let descriptor = self.descriptor(index)?;
            if descriptor.refers_to_indirect_table() {
                return Err(QueueError::Indirect(index));
            }
            let part = Segment { address: descriptor.addr(), length: descriptor.len() };
            if !descriptor.is_write_only() && !chain.writable.parts.is_empty() {
                return Err(QueueError::Order(index));
            }
            if part.length > 0 {
                self.append(&mut chain, index, part, descriptor.is_write_only())?;
            }
            if !descriptor.has_next() {
                return Ok(chain);
            }
            index = descriptor.next();
        }
        Err(QueueError::Loop(head))
    }

    fn append(
        &self,
        chain: &mut Chain,
        index: u16,
        part: Segment,
        writable: bool,
    ) -> Result<(), QueueError> {
        let access = if writable { Permissions::Write } else { Permissions::Read };
        chain
            .readable
            .length
            .checked_add(chain.writable.length)
            .and_then(|sum| sum.checked_add(part.length))
            .ok_or(QueueError::TooLong(chain.head))?;
        if !self.memory.check_range(part.address, bytes(part.length), access) {
            return Err(QueueError::BufferOutside(index));
        }
        if writable {
            chain.writable.push(part);
        } else {
            chain.readable.push(part);
        }
        Ok(())
    }

    fn descriptor(&self, index: u16) -> Result<Descriptor, QueueError> {
        if index >= self.queue.size() {
            return Err(QueueError::DescriptorOutside(index));
        }
        // Cannot overflow: the whole table was found in memory when the queue was taken.
        let address = self.queue.desc_table() + u64::from(index) * DESCRIPTOR_SIZE;
        Ok(self.memory.read_obj(GuestAddress(address))?)
    }
}

/// An event that a device raises for itself, to be called again by who watches it.
#[derive(Debug)]
pub struct Wakeup(OwnedFd);

impl Wakeup {
    /// Makes one that is not raised.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn new() -> std::io::Result<Self> {
        use rustix::event::{EventfdFlags, eventfd};
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Raises it, which makes the descriptor readable.
    pub fn raise(&self) {
        // It fails only where the counter is full, and then the descriptor is readable as it is.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Lowers it.
    pub fn lower(&self) {
        // It fails only where the counter is zero, and then it is low as it is.
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

impl AsFd for Wakeup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The size of a descriptor in bytes (section 2.7.5).
const DESCRIPTOR_SIZE: u64 = 16;

/// Gives a length as an index: no smaller on any host that has KVM.
pub(crate) fn bytes(length: u32) -> usize {
    usize::try_from(length).unwrap_or(usize::MAX)
}
