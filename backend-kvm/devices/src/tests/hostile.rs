//! Drivers that break the rules.

use super::{EVENT_IDX, VERSION_1, ask, disk_on, file_of, reads, writes};
use crate::{
    device::Memory,
    entropy::EntropyDevice,
    testing::{Buffer, Guest, Ring, memory},
};
use proptest::prelude::*;
use std::{
    fs::File,
    time::{Duration, Instant},
};
use virtio_bindings::{virtio_blk::*, virtio_config::VIRTIO_CONFIG_S_DRIVER_OK, virtio_mmio::*};
use vm_memory::{Bytes, GuestAddress};

const LOW: usize = 0x2_0000;
const HIGH_AT: u64 = 0x10_0000;
const HIGH: usize = 0x1_0000;
const RINGS: u64 = 0x1000;
/// Behind the rings, whatever their size here.
const DATA: u64 = 0x4000;
const SIZE: u16 = 16;
const DISK: usize = 64 << 10;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

fn two_regions() -> Memory {
    memory(&[(0, LOW), (HIGH_AT, HIGH)]).unwrap()
}

fn image(memory: &Memory) -> Vec<u8> {
    let mut bytes = vec![0; LOW + HIGH];
    memory.read_slice(&mut bytes[..LOW], GuestAddress(0)).unwrap();
    memory.read_slice(&mut bytes[LOW..], GuestAddress(HIGH_AT)).unwrap();
    bytes
}

/// Gives the place of guest address `at` in an image.
fn place(at: u64) -> Option<usize> {
    if at < LOW as u64 {
        Some(at as usize)
    } else if (HIGH_AT..HIGH_AT + HIGH as u64).contains(&at) {
        Some((at - HIGH_AT) as usize + LOW)
    } else {
        None
    }
}

#[derive(Clone, Copy, Debug)]
struct Raw {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

/// A descriptor that is good as often as not; its buffer never lies in the rings.
fn raw() -> impl Strategy<Value = Raw> {
    let address = prop_oneof![
        8 => DATA..LOW as u64,
        2 => HIGH_AT..HIGH_AT + HIGH as u64,
        1 => LOW as u64 - 64..LOW as u64 + 64,
        1 => HIGH_AT + HIGH as u64 - 64..u64::MAX,
        1 => u64::MAX - 64..=u64::MAX,
    ];
    let length = prop_oneof![
        4 => Just(512u32), 2 => Just(16), 2 => Just(1), 2 => 0u32..2048, 1 => any::<u32>(),
    ];
    let flags = prop_oneof![12 => 0u16..4, 1 => Just(INDIRECT), 1 => any::<u16>()];
    let next = prop_oneof![12 => 0..SIZE, 1 => any::<u16>()];
    (address, length, flags, next).prop_map(|(address, length, flags, next)| Raw {
        address,
        length,
        flags,
        next,
    })
}

#[derive(Clone, Debug)]
enum Step {
    Describe(u16, Raw),
    /// A chain that may be good: a header for the disk, parts of data, a status.
    Request {
        kind: u32,
        sector: u64,
        parts: Vec<Raw>,
    },
    Publish(u16),
    Index(u16),
    Flags(u16),
    Event(u16),
    Notify(u32),
    HostReady,
    Register(u32, u32),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..SIZE, raw()).prop_map(|(index, raw)| Step::Describe(index, raw)),
        4 => (0u32..15, 0u64..140, prop::collection::vec(raw(), 0..6))
            .prop_map(|(kind, sector, parts)| Step::Request { kind, sector, parts }),
        4 => prop_oneof![8 => 0..SIZE, 1 => any::<u16>()].prop_map(Step::Publish),
        1 => any::<u16>().prop_map(Step::Index),
        1 => any::<u16>().prop_map(Step::Flags),
        1 => any::<u16>().prop_map(Step::Event),
        4 => prop_oneof![8 => Just(0u32), 1 => any::<u32>()].prop_map(Step::Notify),
        2 => Just(Step::HostReady),
        1 => (0u32..0x40, any::<u32>()).prop_map(|(word, value)| Step::Register(word * 4, value)),
    ]
}

/// Gives the buffers that a device may write of the chain at `head`: none if it is no chain. This is the
/// specification's text again, written apart from the device's walk.
fn writable_of(memory: &Memory, head: u16) -> Vec<(u64, u32)> {
    let mut list = Vec::new();
    let mut seen = [false; SIZE as usize];
    let mut index = head;
    loop {
        let Some(seen) = seen.get_mut(usize::from(index)) else { return Vec::new() };
        if std::mem::replace(seen, true) {
            return Vec::new();
        }
        let at = GuestAddress(RINGS + 16 * u64::from(index));
        let bytes: [u8; 16] = memory.read_obj(at).unwrap();
        let address = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        let length = u32::from_le_bytes(bytes[8..12].try_into().unwrap());
        let flags = u16::from_le_bytes(bytes[12..14].try_into().unwrap());
        let next = u16::from_le_bytes(bytes[14..].try_into().unwrap());
        if length > 0 {
            let last = address.checked_add(u64::from(length) - 1);
            let whole = last.is_some_and(|last| {
                place(address).zip(place(last)).is_some_and(|(from, to)| {
                    to.checked_sub(from) == Some(length as usize - 1)
                        && (address < HIGH_AT) == (last < HIGH_AT)
                })
            });
            if flags & INDIRECT != 0 || !whole {
                return Vec::new();
            }
        }
        if flags & WRITE != 0 {
            list.push((address, length));
        }
        if flags & NEXT == 0 {
            return list;
        }
        index = next;
    }
}

/// Does a step that may make the device write, and checks that nothing but what it may write changed.
fn watched(
    memory: &Memory,
    ring: &Ring,
    guest: &mut Guest,
    act: impl FnOnce(&mut Guest),
) -> Result<(), TestCaseError> {
    let before = image(memory);
    let mut allowed = vec![false; before.len()];
    let used = ring.used as usize;
    allowed[used..used + 6 + 8 * usize::from(SIZE)].fill(true);
    for slot in 0..u64::from(SIZE) {
        let head = memory.read_obj(GuestAddress(ring.available + 4 + 2 * slot)).unwrap();
        for (address, length) in writable_of(memory, head) {
            let Some(from) = place(address).filter(|_| length > 0) else { continue };
            allowed[from..from + length as usize].fill(true);
        }
    }
    let started = Instant::now();
    act(guest);
    prop_assert!(started.elapsed() < Duration::from_secs(5), "it took too long");
    let after = image(memory);
    for (at, (old, new)) in before.iter().zip(&after).enumerate() {
        prop_assert!(old == new || allowed[at], "byte {at:#x} of the image changed");
    }
    Ok(())
}

fn play(
    memory: &Memory,
    ring: &mut Ring,
    guest: &mut Guest,
    steps: &[Step],
) -> Result<(), TestCaseError> {
    for step in steps {
        match step {
            Step::Describe(index, raw) => {
                ring.descriptor(*index, raw.address, raw.length, raw.flags, raw.next);
            }
            Step::Request { kind, sector, parts } => {
                put_header(memory, DATA, *kind, *sector);
                let mut buffers = vec![reads(DATA, 16)];
                buffers.extend(parts.iter().map(|raw| Buffer {
                    address: raw.address,
                    length: raw.length,
                    writable: raw.flags & WRITE != 0,
                }));
                buffers.push(writes(DATA + 16, 1));
                ring.chain(0, &buffers);
                ring.publish(0);
            }
            Step::Publish(head) => ring.publish(*head),
            Step::Index(index) => ring.set_published(*index),
            Step::Flags(flags) => ring.set_flags(*flags),
            Step::Event(index) => ring.set_used_event(*index),
            Step::Notify(queue) => watched(memory, ring, guest, |guest| guest.notify(*queue))?,
            Step::HostReady => watched(memory, ring, guest, |guest| guest.transport.host_ready())?,
            Step::Register(register, value) => {
                watched(memory, ring, guest, |guest| guest.write(*register, *value))?;
            }
        }
        prop_assert!(guest.transport.active() || !guest.host_waits());
    }
    Ok(())
}

fn put_header(memory: &Memory, at: u64, kind: u32, sector: u64) {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    memory.write_slice(&header, GuestAddress(at)).unwrap();
}

/// Resets the device and writes and reads a sector as a good driver does.
fn disk_works(memory: &Memory, guest: &mut Guest, seed: u8) {
    let mut ring = Ring::new(memory, RINGS, SIZE);
    assert!(guest.start(VERSION_1 | 1 << VIRTIO_BLK_F_FLUSH, &[&ring]));
    let sector = [seed; 512];
    memory.write_slice(&sector, GuestAddress(0x6000)).unwrap();
    for (kind, data) in
        [(VIRTIO_BLK_T_OUT, reads(0x6000, 512)), (VIRTIO_BLK_T_IN, writes(0x7000, 512))]
    {
        put_header(memory, 0x5000, kind, 100);
        memory.write_obj(9u8, GuestAddress(0x5100)).unwrap();
        let used = ask(guest, &mut ring, &[reads(0x5000, 16), data, writes(0x5100, 1)]);
        assert_eq!(used.len(), 1);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x5100)).unwrap(), 0);
    }
    let mut read = [0; 512];
    memory.read_slice(&mut read, GuestAddress(0x7000)).unwrap();
    assert_eq!(read, sector);
}

fn entropy_works(memory: &Memory, guest: &mut Guest) {
    let mut ring = Ring::new(memory, RINGS, SIZE);
    assert!(guest.start(VERSION_1, &[&ring]));
    assert_eq!(ask(guest, &mut ring, &[writes(0x6000, 100)]), [(0, 100)]);
}

fn disk() -> (Memory, File, Guest) {
    let memory = two_regions();
    let file = file_of(&[0; DISK]);
    let guest = Guest::new(disk_on(&file), &memory);
    (memory, file, guest)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn a_disk_survives_any_chains(steps in prop::collection::vec(step(), 1..60), by_index: bool) {
        let (memory, file, mut guest) = disk();
        disk_works(&memory, &mut guest, 1);
        let mut ring = Ring::new(&memory, RINGS, SIZE);
        let taken = 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_DISCARD
            | 1 << VIRTIO_BLK_F_WRITE_ZEROES
            | if by_index { EVENT_IDX } else { 0 };
        prop_assert!(guest.start(VERSION_1 | taken, &[&ring]));
        play(&memory, &mut ring, &mut guest, &steps)?;
        prop_assert_eq!(file.metadata().unwrap().len(), DISK as u64);
        disk_works(&memory, &mut guest, 2);
    }

    #[test]
    fn entropy_survives_any_chains(steps in prop::collection::vec(step(), 1..60), by_index: bool) {
        let memory = two_regions();
        let mut guest = Guest::new(EntropyDevice::new().unwrap(), &memory);
        entropy_works(&memory, &mut guest);
        let mut ring = Ring::new(&memory, RINGS, SIZE);
        let features = VERSION_1 | if by_index { EVENT_IDX } else { 0 };
        prop_assert!(guest.start(features, &[&ring]));
        play(&memory, &mut ring, &mut guest, &steps)?;
        entropy_works(&memory, &mut guest);
    }

    #[test]
    fn rings_anywhere_do_no_harm(
        size in prop_oneof![4 => (0u32..9).prop_map(|power| 1u16 << power), 1 => any::<u16>()],
        places in prop::collection::vec(prop_oneof![
            4 => (0..LOW as u64).prop_map(|at| at & !15),
            1 => 0..LOW as u64,
            2 => (0u64..6).prop_map(|words| LOW as u64 - words * 16),
            1 => (0u64..6).prop_map(|words| HIGH_AT - words * 16),
            1 => any::<u64>(),
            1 => u64::MAX - 64..=u64::MAX,
        ], 3),
        overlap: bool,
        filling in any::<[u8; 32]>(),
        notifications in 1usize..6,
        by_index: bool,
    ) {
        let (memory, file, mut guest) = disk();
        // A small period makes the same bytes serve as indices, descriptors and headers.
        memory.write_slice(&filling.repeat(LOW / 32), GuestAddress(0)).unwrap();
        let mut ring = Ring::new(&memory, 0, 0);
        (ring.size, ring.descriptors, ring.available, ring.used) =
            (size, places[0], places[1], if overlap { places[1] & !3 } else { places[2] });
        let features = VERSION_1 | if by_index { EVENT_IDX } else { 0 };
        let allowed = size.is_power_of_two() && size <= 256;
        let inside = |at: u64, length: u64| {
            place(at).is_some() && at.checked_add(length - 1).is_some_and(|last| {
                place(last).is_some() && (at < HIGH_AT) == (last < HIGH_AT)
            })
        };
        let places = u64::from(size);
        let good = allowed
            && ring.descriptors.is_multiple_of(16) && inside(ring.descriptors, 16 * places)
            && ring.available.is_multiple_of(2) && inside(ring.available, 6 + 2 * places)
            && ring.used.is_multiple_of(4) && inside(ring.used, 6 + 8 * places);
        prop_assert!(guest.negotiate(features));
        prop_assert_eq!(guest.set_up(0, &ring), good);
        guest.add_status(VIRTIO_CONFIG_S_DRIVER_OK);
        prop_assert_eq!(guest.transport.active(), good);
        for _ in 0..notifications {
            let started = Instant::now();
            guest.notify(0);
            guest.transport.host_ready();
            prop_assert!(started.elapsed() < Duration::from_secs(5));
        }
        prop_assert_eq!(file.metadata().unwrap().len(), DISK as u64);
        disk_works(&memory, &mut guest, 3);
    }

    #[test]
    fn what_came_before_a_broken_chain_is_done(
        good in 0u16..3,
        bad in prop_oneof![
            Just("loop"), Just("outside table"), Just("head outside"), Just("order"),
            Just("outside memory"), Just("wraps"), Just("indirect"), Just("no status"),
            Just("no header"), Just("too long"), Just("index"),
        ],
    ) {
        let (memory, _, mut guest) = disk();
        let mut ring = Ring::new(&memory, RINGS, SIZE);
        prop_assert!(guest.start(VERSION_1 | 1 << VIRTIO_BLK_F_FLUSH, &[&ring]));
        put_header(&memory, 0x5000, VIRTIO_BLK_T_OUT, 5);
        memory.write_slice(&[7; 512], GuestAddress(0x6000)).unwrap();
        for request in 0..good {
            let status = writes(0x5100 + u64::from(request), 1);
            ring.chain(request * 3, &[reads(0x5000, 16), reads(0x6000, 512), status]);
            ring.publish(request * 3);
        }
        let mut head = 9;
        let header = reads(0x5000, 16);
        match bad {
            "loop" => {
                ring.descriptor(9, 0x5000, 16, NEXT, 10);
                ring.descriptor(10, 0x6000, 512, NEXT, 9);
            }
            "outside table" => ring.descriptor(9, 0x5000, 16, NEXT, SIZE),
            "head outside" => head = SIZE,
            "order" => drop(ring.chain(9, &[header, writes(0x7000, 512), reads(0x6000, 512)])),
            "outside memory" => drop(ring.chain(9, &[header, reads(LOW as u64 - 1, 2)])),
            "wraps" => drop(ring.chain(9, &[header, writes(u64::MAX, 2)])),
            "indirect" => {
                ring.descriptor(9, 0x5000, 16, NEXT, 10);
                ring.descriptor(10, 0x5110, 1, WRITE | INDIRECT, 0);
            }
            "no status" => drop(ring.chain(9, &[header, reads(0x6000, 512)])),
            "no header" => drop(ring.chain(9, &[reads(0x5000, 15), writes(0x7000, 513)])),
            "too long" => drop(ring.chain(9, &[header, writes(0, u32::MAX), writes(0, 512)])),
            _ => {}
        }
        ring.publish(head);
        if bad == "index" {
            ring.set_published(good + SIZE + 1);
        }
        guest.notify(0);
        // A ring whose index jumped shows none of its chains for sure.
        let served = if bad == "index" { 0 } else { usize::from(good) };
        prop_assert_eq!(ring.take_used().len(), served);
        for request in 0..served as u64 {
            prop_assert_eq!(memory.read_obj::<u8>(GuestAddress(0x5100 + request)).unwrap(), 0);
        }
        prop_assert!(guest.transport.broken().is_some(), "{bad} is not noticed");
        let status = guest.read(VIRTIO_MMIO_INTERRUPT_STATUS);
        prop_assert_eq!(status & VIRTIO_MMIO_INT_VRING != 0, served > 0);
        prop_assert!(status & VIRTIO_MMIO_INT_CONFIG != 0);
        disk_works(&memory, &mut guest, 4);
    }
}
