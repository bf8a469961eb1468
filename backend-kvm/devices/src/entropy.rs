//! [`EntropyDevice`]: random bytes for the guest (virtio 1.2, section 5.4).

use crate::{
    device::{DeviceBroken, Interrupt, Memory, VirtioDevice},
    queue::{Budget, Chain, DeviceQueue, Handled, Wakeup},
};
use rustix::rand::{GetRandomFlags, getrandom};
use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
};
use virtio_bindings::{virtio_ids::VIRTIO_ID_RNG, virtio_ring::VIRTIO_RING_F_EVENT_IDX};
use virtio_queue::Queue;

/// The most bytes that one request gets; one that asks more gets this many.
pub const REQUEST_LIMIT: u32 = 64 << 10;

/// A source of random bytes, drawn from the host's kernel at each request. How many a guest draws is not limited over
/// time.
#[derive(Debug)]
pub struct EntropyDevice {
    wakeup: Wakeup,
    active: Option<(DeviceQueue, Arc<dyn Interrupt>)>,
}

impl EntropyDevice {
    /// Makes one.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self { wakeup: Wakeup::new()?, active: None })
    }

    fn serve(&mut self) -> Result<(), DeviceBroken> {
        let Some((queue, interrupt)) = &mut self.active else { return Ok(()) };
        if queue.serve(BUDGET, &**interrupt, fill)? {
            self.wakeup.raise();
        }
        Ok(())
    }
}

impl VirtioDevice for EntropyDevice {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(
        &mut self,
        memory: Memory,
        _features: u64,
        queues: Vec<Queue>,
        interrupt: Arc<dyn Interrupt>,
    ) -> Result<(), DeviceBroken> {
        let Ok([queue]) = <[Queue; 1]>::try_from(queues) else {
            return Err(DeviceBroken::new(NAME, "it has one queue"));
        };
        self.active = Some((DeviceQueue::new(NAME, queue, memory)?, interrupt));
        // The queue of a restored machine may hold requests that were announced to the saved one.
        self.wakeup.raise();
        Ok(())
    }

    fn queues(&self) -> Vec<&Queue> {
        self.active.iter().map(|(queue, _)| queue.queue()).collect()
    }

    fn queue_notified(&mut self, _queue: u16) -> Result<(), DeviceBroken> {
        self.serve()
    }

    fn host_events(&self) -> Option<BorrowedFd<'_>> {
        Some(self.wakeup.as_fd())
    }

    fn host_ready(&mut self) -> Result<(), DeviceBroken> {
        self.wakeup.lower();
        self.serve()
    }

    fn reset(&mut self) {
        self.active = None;
        self.wakeup.lower();
    }
}

fn fill(memory: &Memory, chain: &mut Chain) -> Result<Handled, DeviceBroken> {
    if !chain.readable.is_empty() || chain.writable.is_empty() {
        return Err(DeviceBroken::new(NAME, "a request has buffers to write only"));
    }
    let _unused = chain.writable.split_off(REQUEST_LIMIT);
    let mut rest = std::mem::take(&mut chain.writable);
    let written = rest.len();
    let mut random = [0; 4096];
    while !rest.is_empty() {
        let next = rest.split_off(PIECE);
        let piece = &mut random[..rest.len().min(PIECE) as usize];
        draw(piece).map_err(|error| DeviceBroken::new(NAME, format!("the host: {error}")))?;
        rest.write(memory, piece).map_err(|error| error.of(NAME))?;
        rest = next;
    }
    Ok(Handled { written, moved: written.into() })
}

/// Fills `piece` with random bytes of the host's.
fn draw(piece: &mut [u8]) -> rustix::io::Result<()> {
    let mut done = 0;
    while done < piece.len() {
        done +=
            rustix::io::retry_on_intr(|| getrandom(&mut piece[done..], GetRandomFlags::empty()))?;
    }
    Ok(())
}

const NAME: &str = "entropy device";

const QUEUE_SIZE: u16 = 64;

/// How many bytes are drawn at a time.
const PIECE: u32 = 4096;

/// What one call does at most: about a millisecond of drawing.
const BUDGET: Budget = Budget { chains: 64, bytes: 256 << 10 };
