//! The random bytes.

use super::{EVENT_IDX, VERSION_1, ask, reads, serve_noted, writes};
use crate::{
    entropy::{EntropyDevice, REQUEST_LIMIT},
    testing::{Buffer, Guest, Ring, memory},
};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn each_buffer_is_filled_and_nothing_else(
        lengths in prop::collection::vec(0u32..40_000, 1..6),
        by_index: bool,
    ) {
        let memory = memory(&[(0, 0x10000), (0x10_0000, 0x40000)]).unwrap();
        let mut guest = Guest::new(EntropyDevice::new().unwrap(), &memory);
        let mut ring = Ring::new(&memory, 0x1000, 16);
        let features = if by_index { VERSION_1 | EVENT_IDX } else { VERSION_1 };
        prop_assert!(guest.start(features, &[&ring]));
        let mut at = 0x10_0001;
        let buffers: Vec<Buffer> = lengths.iter().map(|&length| {
            let buffer = writes(at, length);
            at += u64::from(length) + 64;
            buffer
        }).collect();
        let total: u32 = lengths.iter().sum();
        let used = ask(&mut guest, &mut ring, &buffers);
        if total == 0 {
            prop_assert!(guest.transport.broken().is_some());
            return Ok(());
        }
        prop_assert_eq!(used, [(0, total.min(REQUEST_LIMIT))]);
        let mut left = total.min(REQUEST_LIMIT) as usize;
        for buffer in buffers {
            let mut bytes = vec![0; buffer.length as usize + 64];
            memory.read_slice(&mut bytes, GuestAddress(buffer.address)).unwrap();
            let filled = left.min(buffer.length as usize);
            left -= filled;
            prop_assert!(bytes[filled..].iter().all(|&byte| byte == 0));
            if filled >= 64 {
                let zeros = bytes[..filled].iter().filter(|&&byte| byte == 0).count();
                prop_assert!(zeros < filled / 4, "{zeros} zeros in {filled} bytes");
            }
        }
    }
}

#[test]
fn two_requests_get_different_bytes() {
    let memory = memory(&[(0, 0x10000)]).unwrap();
    let mut guest = Guest::new(EntropyDevice::new().unwrap(), &memory);
    let mut ring = Ring::new(&memory, 0x1000, 16);
    assert!(guest.start(VERSION_1, &[&ring]));
    let mut draw = || {
        assert_eq!(ask(&mut guest, &mut ring, &[writes(0x8000, 32)]), [(0, 32)]);
        memory.read_obj::<[u8; 32]>(GuestAddress(0x8000)).unwrap()
    };
    assert_ne!(draw(), draw());
}

#[test]
fn a_buffer_to_read_breaks_it() {
    let memory = memory(&[(0, 0x10000)]).unwrap();
    let mut guest = Guest::new(EntropyDevice::new().unwrap(), &memory);
    let mut ring = Ring::new(&memory, 0x1000, 16);
    assert!(guest.start(VERSION_1, &[&ring]));
    assert!(ask(&mut guest, &mut ring, &[reads(0x8000, 8), writes(0x9000, 8)]).is_empty());
    assert!(guest.transport.broken().is_some());
}

#[test]
fn many_requests_are_served_over_several_calls() {
    let memory = memory(&[(0, 0x10_0000)]).unwrap();
    let mut guest = Guest::new(EntropyDevice::new().unwrap(), &memory);
    let mut ring = Ring::new(&memory, 0x1000, 64);
    assert!(guest.start(VERSION_1, &[&ring]));
    for head in 0..64 {
        ring.chain(head, &[writes(0x8000, REQUEST_LIMIT)]);
        ring.publish(head);
    }
    guest.notify(0);
    let first = ring.take_used().len();
    assert!((1..16).contains(&first), "{first} requests in one call");
    assert!(guest.host_waits());
    assert!(guest.settle(64));
    assert_eq!(first + ring.take_used().len(), 64);
}

#[test]
fn memory_notes_what_was_drawn() {
    let memory = memory(&[(0, 0x10_0000)]).unwrap();
    let mut guest = Guest::new(EntropyDevice::new().unwrap(), &memory);
    let mut ring = Ring::new(&memory, 0x1000, 16);
    assert!(guest.start(VERSION_1, &[&ring]));
    ring.chain(0, &[writes(0x8ff0, 3 * 4096)]);
    ring.publish(0);
    serve_noted(&mut guest, &memory);
    assert_eq!(ring.take_used(), [(0, 3 * 4096)]);
}
