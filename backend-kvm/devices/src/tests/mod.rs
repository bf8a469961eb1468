//! The devices behind their transport, driven as a guest drives them.
#![allow(clippy::cast_possible_truncation, reason = "the tests' own numbers are small")]

mod block;
mod entropy;
mod hostile;
mod mmio;

use crate::{
    block::{BlockDevice, BlockOptions},
    device::Memory,
    testing::{Buffer, Guest, Ring},
};
use std::fs::File;
use virtio_bindings::{virtio_config::VIRTIO_F_VERSION_1, virtio_ring::VIRTIO_RING_F_EVENT_IDX};
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};

const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

fn file_of(bytes: &[u8]) -> File {
    use std::io::Write;
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn disk_on(file: &File) -> BlockDevice {
    BlockDevice::new(file.try_clone().unwrap(), &BlockOptions::default().serial("disk0")).unwrap()
}

fn reads(address: u64, length: u32) -> Buffer {
    Buffer { address, length, writable: false }
}

fn writes(address: u64, length: u32) -> Buffer {
    Buffer { address, length, writable: true }
}

/// Puts one chain in from descriptor 0 on, notifies, waits for rest and gives what came back.
fn ask(guest: &mut Guest, ring: &mut Ring, buffers: &[Buffer]) -> Vec<(u32, u32)> {
    ring.chain(0, buffers);
    ring.publish(0);
    guest.notify(0);
    assert!(guest.settle(1_000), "the device does not come to rest");
    ring.take_used()
}

/// Lets the device do what waits in its queue, and checks that memory notes each page that changed by it.
fn serve_noted(guest: &mut Guest, memory: &Memory) {
    let all = |memory: &Memory| -> Vec<Vec<u8>> {
        let read = |region: &_| {
            let mut bytes = vec![0; GuestMemoryRegion::len(region) as usize];
            memory.read_slice(&mut bytes, GuestMemoryRegion::start_addr(region)).unwrap();
            bytes
        };
        memory.iter().map(read).collect()
    };
    memory.iter().for_each(|region| (**region).bitmap().reset());
    let before = all(memory);
    guest.notify(0);
    assert!(guest.settle(1_000), "the device does not come to rest");
    let mut changed = 0;
    for ((region, before), after) in memory.iter().zip(before).zip(all(memory)) {
        for (page, (before, after)) in before.chunks(4096).zip(after.chunks(4096)).enumerate() {
            changed += usize::from(before != after);
            assert!(before == after || (**region).bitmap().is_bit_set(page), "page {page}");
        }
    }
    // The data's, and the ring's.
    assert!(changed > 2, "{changed} pages changed");
}
