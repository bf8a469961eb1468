//! A guest as a list of moves: registers, memory, descriptors and rings in any order.
//!
//! The first byte of a move says what it is, see [`Play::step`]; numbers are in little-endian order, and bytes that the
//! input lacks are zero.

use crate::input::Input;
use vm_kvm_devices::{
    Memory, VirtioDevice,
    testing::{Buffer, Guest, Ring, memory},
};
use vm_memory::{Bytes, GuestAddress};

/// The guest's memory begins at zero, has a hole and a second region.
const LOW: usize = 0x1_0000;
const HIGH_AT: u64 = 0x8_0000;
const HIGH: usize = 0x8000;

/// Where the queue of a start by the rules lies.
const RINGS: u64 = 0x1000;
const RING_SIZE: u16 = 16;

/// Where the buffers of requests by the rules lie.
const DATA: u64 = 0x4000;

/// The most moves of one input.
const MOVES: usize = 128;

/// `VIRTIO_F_VERSION_1`.
const VERSION_1: u64 = 1 << 32;

/// A guest with a device, and how to make the device again.
pub struct Play<M: Fn() -> D, D: VirtioDevice> {
    make: M,
    pub memory: Memory,
    pub guest: Guest,
    pub ring: Ring,
}

impl<M: Fn() -> D, D: VirtioDevice> Play<M, D> {
    pub fn new(make: M) -> Self {
        let memory = memory(&[(0, LOW), (HIGH_AT, HIGH)]).expect("memory");
        let guest = Guest::new(make(), &memory);
        let ring = Ring::new(&memory, RINGS, RING_SIZE);
        Self { make, memory, guest, ring }
    }

    /// Makes all moves of an input; whatever they are, the device must not be left wanting attention for ever.
    pub fn run(&mut self, input: &[u8]) {
        let mut input = Input(input);
        for _ in 0..MOVES {
            if input.0.is_empty() {
                break;
            }
            let before = self.guest.status();
            let reset = self.step(&mut input);
            let status = self.guest.status();
            assert!(reset || status & before == before, "a status bit was taken back");
            assert!(self.guest.transport.active() || !self.guest.host_waits());
        }
    }

    /// Starts the device by the rules with the features that it offers out of `features`, whatever was before.
    pub fn start(&mut self, features: u64) {
        self.ring = Ring::new(&self.memory, RINGS, RING_SIZE);
        let taken = VERSION_1 | features & self.guest.offered();
        assert!(self.guest.start(taken, &[&self.ring]), "a good driver is refused");
    }

    /// Asks by the rules and gives what came back.
    pub fn ask(&mut self, buffers: &[Buffer]) -> Vec<(u32, u32)> {
        self.ring.chain(0, buffers);
        self.ring.publish(0);
        self.guest.notify(0);
        assert!(self.guest.settle(100), "the device does not come to rest");
        self.ring.take_used()
    }

    /// Makes one move; says whether it may have reset the device.
    fn step(&mut self, input: &mut Input<'_>) -> bool {
        match input.byte() % 13 {
            0 => {
                let (register, value) = (u32::from(input.byte()) * 4, input.word());
                self.guest.write(register, value);
                return true;
            }
            1 => {
                let (offset, width) = (input.half(), input.byte() % 17);
                let mut data = vec![0xff; width.into()];
                self.guest.transport.read(offset.into(), &mut data);
            }
            2 => {
                let (offset, width) = (input.half(), input.byte() % 17);
                let data = input.bytes(width);
                self.guest.transport.write(offset.into(), data);
                return true;
            }
            3 => {
                let (at, length) = (address(input), input.byte());
                let data = input.bytes(length);
                let _outside = self.memory.write_slice(data, GuestAddress(at));
            }
            4 => {
                let index = input.byte().into();
                let (address, length) = (address(input), input.length());
                self.ring.descriptor(index, address, length, input.byte().into(), input.half());
            }
            5 => self.ring.publish(input.byte().into()),
            6 => self.ring.set_published(input.half()),
            7 => self.guest.notify(input.byte().into()),
            8 => self.guest.transport.host_ready(),
            9 => {
                self.start(u64::from(input.word()));
                return true;
            }
            10 => {
                // The ring that the next start by registers announces.
                self.ring.size = input.half();
                self.ring.descriptors = address(input);
                self.ring.available = address(input);
                self.ring.used = address(input);
                self.guest.set_up(input.byte().into(), &self.ring);
            }
            11 => self.request(input),
            _ => {
                let state = self.guest.transport.save().expect("devices give their queues");
                let mut guest = Guest::new((self.make)(), &self.memory);
                // A guest may have changed its rings' memory, but not where they are.
                guest.transport.restore(&state).expect("a saved state is taken up");
                assert_eq!(guest.transport.save().as_ref(), Ok(&state));
                self.guest = guest;
            }
        }
        false
    }

    /// Puts a request in that has the form of the disk's: a header, buffers, a byte for the status.
    fn request(&mut self, input: &mut Input<'_>) {
        let mut header = [0; 16];
        header[0] = input.byte();
        header[8..12].copy_from_slice(&input.word().to_le_bytes());
        let _inside = self.memory.write_slice(&header, GuestAddress(DATA));
        let count = input.byte() % 8;
        let mut buffers = vec![Buffer { address: DATA, length: 16, writable: false }];
        buffers.extend((0..count).map(|_| Buffer {
            address: address(input),
            length: input.length(),
            writable: header[0] & 1 == 0,
        }));
        buffers.push(Buffer { address: DATA + 0x100, length: 1, writable: true });
        self.ring.chain(0, &buffers);
        self.ring.publish(0);
    }
}

/// Gives an address: 24 bits as they are, or the end of a region, of memory or of all addresses.
fn address(input: &mut Input<'_>) -> u64 {
    let low = u64::from(input.half());
    match input.byte() {
        0xfd => (LOW as u64).wrapping_sub(low & 0xff),
        0xfe => (HIGH_AT + HIGH as u64).wrapping_sub(low & 0xff),
        0xff => u64::MAX - low,
        high => low | u64::from(high) << 16,
    }
}
