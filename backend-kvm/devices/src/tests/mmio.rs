//! The registers.

use super::{EVENT_IDX, VERSION_1, ask, disk_on, file_of, writes};
use crate::{
    device::{DeviceBroken, Interrupt, Memory, VirtioDevice},
    entropy::EntropyDevice,
    mmio::MMIO_SIZE,
    state::{RestoreError, SaveError},
    testing::{Guest, Ring, memory},
};
use proptest::prelude::*;
use std::sync::Arc;
use virtio_bindings::{virtio_config::*, virtio_mmio::*};
use virtio_queue::Queue;

fn entropy() -> (Memory, Guest, Ring) {
    let memory = memory(&[(0, 0x10000)]).unwrap();
    let guest = Guest::new(EntropyDevice::new().unwrap(), &memory);
    let ring = Ring::new(&memory, 0x1000, 8);
    (memory, guest, ring)
}

#[test]
fn a_driver_finds_the_device() {
    let (_, mut guest, _) = entropy();
    assert_eq!(guest.read(VIRTIO_MMIO_MAGIC_VALUE).to_le_bytes(), *b"virt");
    assert_eq!(guest.read(VIRTIO_MMIO_VERSION), 2);
    assert_eq!(guest.read(VIRTIO_MMIO_DEVICE_ID), 4);
    assert_eq!(guest.offered(), VERSION_1 | EVENT_IDX);
    guest.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 2);
    assert_eq!(guest.read(VIRTIO_MMIO_DEVICE_FEATURES), 0);
    assert_eq!(guest.read(VIRTIO_MMIO_QUEUE_NUM_MAX), 64);
    guest.write(VIRTIO_MMIO_QUEUE_SEL, 1);
    assert_eq!(guest.read(VIRTIO_MMIO_QUEUE_NUM_MAX), 0);
    assert_eq!(guest.read(VIRTIO_MMIO_SHM_LEN_LOW), u32::MAX);
    assert_eq!(guest.read(VIRTIO_MMIO_SHM_LEN_HIGH), u32::MAX);
}

#[test]
fn features_are_refused_without_version_1_and_beyond_the_offer() {
    let (_, mut guest, _) = entropy();
    assert!(!guest.negotiate(0));
    assert!(!guest.negotiate(EVENT_IDX));
    assert!(!guest.negotiate(VERSION_1 | 1));
    assert!(!guest.negotiate(VERSION_1 | 1 << 33));
    assert!(guest.negotiate(VERSION_1));
    assert!(guest.negotiate(VERSION_1 | EVENT_IDX));

    guest.reset();
    guest.add_status(VIRTIO_CONFIG_S_ACKNOWLEDGE);
    guest.add_status(VIRTIO_CONFIG_S_DRIVER);
    guest.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
    guest.write(VIRTIO_MMIO_DRIVER_FEATURES, 1);
    guest.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 2);
    guest.write(VIRTIO_MMIO_DRIVER_FEATURES, 1);
    assert!(!guest.add_status(VIRTIO_CONFIG_S_FEATURES_OK), "a feature above 63 was taken");
}

#[test]
fn status_bits_come_in_order_and_stay() {
    let (_, mut guest, _) = entropy();
    assert!(!guest.add_status(VIRTIO_CONFIG_S_DRIVER));
    assert!(!guest.add_status(VIRTIO_CONFIG_S_DRIVER_OK));
    assert!(guest.add_status(VIRTIO_CONFIG_S_ACKNOWLEDGE));
    assert!(!guest.add_status(VIRTIO_CONFIG_S_FEATURES_OK));
    assert!(guest.add_status(VIRTIO_CONFIG_S_DRIVER));
    guest.write(VIRTIO_MMIO_STATUS, VIRTIO_CONFIG_S_DRIVER);
    assert_eq!(guest.status(), VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER);
    guest.reset();
    assert_eq!(guest.status(), 0);
}

#[test]
fn a_ready_driver_that_says_so_again_changes_nothing() {
    let (_, mut guest, mut ring) = entropy();
    assert!(guest.start(VERSION_1, &[&ring]));
    for _ in 0..3 {
        assert_eq!(ask(&mut guest, &mut ring, &[writes(0x8000, 8)]), [(0, 8)]);
        let (status, state) = (guest.status(), guest.transport.save());
        guest.write(VIRTIO_MMIO_STATUS, status);
        assert_eq!(guest.transport.save(), state);
    }
}

#[test]
fn features_stay_as_they_were_agreed() {
    let (_, mut guest, _) = entropy();
    assert!(guest.negotiate(VERSION_1));
    guest.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
    guest.write(VIRTIO_MMIO_DRIVER_FEATURES, u32::MAX);
    assert_eq!(guest.transport.save().unwrap().driver_features, VERSION_1);
}

#[test]
fn a_driver_that_gives_up_stops_the_device_until_a_reset() {
    let (memory, mut guest, mut ring) = entropy();
    assert!(guest.start(VERSION_1, &[&ring]));
    guest.add_status(VIRTIO_CONFIG_S_FAILED);
    assert!(!guest.transport.active());
    assert!(ask(&mut guest, &mut ring, &[writes(0x8000, 8)]).is_empty());
    assert!(!guest.host_waits(), "its descriptor would wake the host for ever");
    let mut ring = Ring::new(&memory, 0x1000, 8);
    assert!(guest.start(VERSION_1, &[&ring]));
    assert_eq!(ask(&mut guest, &mut ring, &[writes(0x8000, 8)]), [(0, 8)]);
}

#[test]
fn interrupts_are_shown_and_acknowledged() {
    let (_, mut guest, mut ring) = entropy();
    assert!(guest.start(VERSION_1, &[&ring]));
    assert_eq!(guest.read(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    assert_eq!(ask(&mut guest, &mut ring, &[writes(0x8000, 8)]), [(0, 8)]);
    assert_eq!((guest.read(VIRTIO_MMIO_INTERRUPT_STATUS), guest.line.count()), (1, 1));
    guest.write(VIRTIO_MMIO_INTERRUPT_ACK, 1);
    assert_eq!(guest.read(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    ring.set_flags(1);
    assert_eq!(ask(&mut guest, &mut ring, &[writes(0x8000, 8)]), [(0, 8)]);
    assert_eq!(guest.line.count(), 1, "an interrupt that the driver did not want");
}

#[test]
fn interrupts_follow_the_event_index() {
    let (_, mut guest, mut ring) = entropy();
    assert!(guest.start(VERSION_1 | EVENT_IDX, &[&ring]));
    ring.set_used_event(2);
    for (request, interrupts) in [(0, 0), (1, 0), (2, 1), (3, 1)] {
        assert_eq!(ask(&mut guest, &mut ring, &[writes(0x8000, 8)]), [(0, 8)]);
        assert_eq!(guest.line.count(), interrupts, "after request {request}");
    }
}

#[test]
fn nothing_is_served_before_the_driver_is_ready() {
    let (_, mut guest, mut ring) = entropy();
    assert!(guest.negotiate(VERSION_1) && guest.set_up(0, &ring));
    assert!(ask(&mut guest, &mut ring, &[writes(0x8000, 8)]).is_empty());
    assert!(guest.add_status(VIRTIO_CONFIG_S_DRIVER_OK));
    assert!(guest.settle(10));
    assert_eq!(ring.take_used(), [(0, 8)]);
}

#[test]
fn queues_are_set_up_only_between_features_and_readiness() {
    let (_, mut guest, ring) = entropy();
    assert!(!guest.set_up(0, &ring));
    assert!(guest.start(VERSION_1, &[&ring]));
    guest.write(VIRTIO_MMIO_QUEUE_NUM, 2);
    guest.write(VIRTIO_MMIO_QUEUE_DESC_LOW, 0x5000);
    let queue = &guest.transport.save().unwrap().queues[0];
    assert_eq!((queue.size, queue.descriptors), (8, 0x1000));
}

#[test]
fn a_queue_taken_from_a_running_device_breaks_it() {
    let (_, mut guest, mut ring) = entropy();
    assert!(guest.start(VERSION_1, &[&ring]));
    guest.write(VIRTIO_MMIO_QUEUE_READY, 0);
    assert_eq!(guest.read(VIRTIO_MMIO_QUEUE_READY), 0);
    assert_ne!(guest.status() & VIRTIO_CONFIG_S_NEEDS_RESET, 0);
    assert!(ask(&mut guest, &mut ring, &[writes(0x8000, 8)]).is_empty());
}

#[test]
fn a_device_that_breaks_says_so_once_and_rests() {
    let (memory, mut guest, mut ring) = entropy();
    assert!(guest.start(VERSION_1, &[&ring]));
    let generation = guest.read(VIRTIO_MMIO_CONFIG_GENERATION);
    ring.set_published(9);
    guest.notify(0);
    assert!(guest.transport.broken().is_some());
    assert_ne!(guest.status() & VIRTIO_CONFIG_S_NEEDS_RESET, 0);
    assert_eq!(guest.read(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_CONFIG);
    assert_ne!(guest.read(VIRTIO_MMIO_CONFIG_GENERATION), generation);
    assert!(!guest.host_waits(), "its descriptor would wake the host for ever");
    let count = guest.line.count();
    ring.set_published(0);
    guest.notify(0);
    guest.transport.host_ready();
    assert_eq!(guest.line.count(), count);
    let mut ring = Ring::new(&memory, 0x1000, 8);
    assert!(guest.start(VERSION_1, &[&ring]));
    assert!(guest.transport.broken().is_none());
    assert_eq!(ask(&mut guest, &mut ring, &[writes(0x8000, 8)]), [(0, 8)]);
}

#[test]
fn a_device_without_its_queue_does_not_start() {
    let (_, mut guest, _) = entropy();
    assert!(!guest.start(VERSION_1, &[]));
    assert_ne!(guest.status() & VIRTIO_CONFIG_S_NEEDS_RESET, 0);
}

#[test]
fn a_device_is_found_again_by_its_type() {
    let (_, mut guest, _) = entropy();
    assert!(guest.transport.device_as::<EntropyDevice>().is_some());
    assert!(guest.transport.device_as::<crate::BlockDevice>().is_none());
}

#[test]
fn a_state_fits_only_an_equal_device() {
    let (memory, mut guest, ring) = entropy();
    assert!(guest.start(VERSION_1, &[&ring]));
    let state = guest.transport.save().unwrap();
    let mut other = Guest::new(disk_on(&file_of(&[])), &memory);
    assert_eq!(other.transport.restore(&state), Err(RestoreError::Device { saved: 4, here: 2 }));
    let mut equal = Guest::new(EntropyDevice::new().unwrap(), &memory);
    let mut strange = state.clone();
    strange.driver_features |= 1;
    assert_eq!(equal.transport.restore(&strange), Err(RestoreError::Features { missing: 1 }));
    strange = state.clone();
    strange.queues[0].max = 128;
    assert_eq!(equal.transport.restore(&strange), Err(RestoreError::Queues));
    strange = state.clone();
    strange.queues[0].descriptors = u64::MAX - 15;
    assert!(matches!(equal.transport.restore(&strange), Err(RestoreError::Refused(_))));
    assert_eq!(equal.status(), 0);
    strange.queues[0].size = 3;
    assert!(matches!(equal.transport.restore(&strange), Err(RestoreError::Refused(_))));
    equal.transport.restore(&state).unwrap();
    assert!(equal.transport.active());
    assert_eq!(equal.transport.save().unwrap(), state);
}

/// A device that does not give its queues.
#[derive(Debug)]
struct Secretive;

impl VirtioDevice for Secretive {
    fn device_type(&self) -> u32 {
        99
    }
    fn queue_sizes(&self) -> &[u16] {
        &[8]
    }
    fn features(&self) -> u64 {
        0
    }
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(7);
    }
    fn activate(
        &mut self,
        _memory: Memory,
        _features: u64,
        _queues: Vec<Queue>,
        _interrupt: Arc<dyn Interrupt>,
    ) -> Result<(), DeviceBroken> {
        Ok(())
    }
    fn queue_notified(&mut self, _queue: u16) -> Result<(), DeviceBroken> {
        Ok(())
    }
    fn reset(&mut self) {}
}

#[test]
fn an_active_device_that_keeps_its_queues_to_itself_is_not_saved() {
    let memory = memory(&[(0, 0x10000)]).unwrap();
    let mut guest = Guest::new(Secretive, &memory);
    let ring = Ring::new(&memory, 0x1000, 8);
    assert!(guest.transport.save().is_ok());
    assert!(guest.start(VERSION_1, &[&ring]));
    assert_eq!(guest.transport.save(), Err(SaveError::NoQueues { device_type: 99 }));
    let mut byte = [0];
    guest.transport.read(0x1ff, &mut byte);
    assert_eq!(byte, [7], "the configuration is read in any width");
}

proptest! {
    #[test]
    fn any_accesses_leave_the_registers_sane(
        accesses in prop::collection::vec(
            (any::<bool>(), prop_oneof![
                8 => (0u64..0x110).prop_map(|offset| offset & !3),
                1 => 0..MMIO_SIZE + 8,
                1 => any::<u64>(),
            ], prop_oneof![8 => Just(4usize), 1 => 0usize..17], prop_oneof![
                4 => 0u64..16,
                1 => (0u64..0x20).prop_map(|page| page << 12),
                1 => any::<u64>(),
            ]),
            1..200,
        ),
    ) {
        let (_, mut guest, _) = entropy();
        for (write, offset, width, value) in accesses {
            let before = guest.status();
            let mut data = value.to_le_bytes().repeat(3);
            data.truncate(width);
            if write {
                guest.transport.write(offset, &data);
                let reset = offset == u64::from(VIRTIO_MMIO_STATUS) && data == [0; 4];
                prop_assert!(reset || guest.status() & before == before, "a bit was taken back");
            } else {
                guest.transport.read(offset, &mut data);
                prop_assert_eq!(guest.status(), before, "a read changed something");
                if offset.saturating_add(width as u64) > MMIO_SIZE || width != 4 && offset < 0x100 {
                    prop_assert!(data.iter().all(|&byte| byte == 0));
                }
            }
            let status = guest.status();
            let features_ok = status & VIRTIO_CONFIG_S_FEATURES_OK != 0;
            let state = guest.transport.save().unwrap();
            if features_ok {
                prop_assert_eq!(state.driver_features & !(VERSION_1 | EVENT_IDX), 0);
                prop_assert_ne!(state.driver_features & VERSION_1, 0);
            }
            prop_assert!(features_ok || status & VIRTIO_CONFIG_S_DRIVER_OK == 0);
            prop_assert_eq!(guest.read(VIRTIO_MMIO_MAGIC_VALUE).to_le_bytes(), *b"virt");
        }
    }
}
