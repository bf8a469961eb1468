//! The disk, against a list of bytes.

use super::{EVENT_IDX, VERSION_1, ask, disk_on, file_of, reads, serve_noted, writes};
use crate::{
    block::{BlockDevice, BlockError, BlockOptions, DiskChanges, SECTOR},
    device::Memory,
    testing::{Buffer, Guest, Ring, memory},
};
use proptest::prelude::*;
use std::{
    fs::{File, OpenOptions},
    os::unix::fs::FileExt,
};
use virtio_bindings::virtio_blk::*;
use vm_memory::{Bytes, GuestAddress};

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

const SECTORS: u64 = 64;
const HEADER: u64 = 0x4000;
const STATUS: u64 = 0x5000;
const DATA: u64 = 0x10_0000;
const RINGS: u64 = 0x1000;

fn all_features() -> u64 {
    VERSION_1 | 1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
}

/// A guest with a disk, one request at a time.
struct Machine {
    memory: Memory,
    guest: Guest,
    ring: Ring,
}

impl Machine {
    fn new(device: BlockDevice, features: u64) -> Self {
        // Two regions that touch: a buffer may lie in both.
        let memory = memory(&[(0, 0x12_0000), (0x12_0000, 0x10_0000)]).unwrap();
        let mut guest = Guest::new(device, &memory);
        let ring = Ring::new(&memory, RINGS, 64);
        assert!(guest.start(features, &[&ring]));
        Self { memory, guest, ring }
    }

    /// Asks with the header cut at `cut` and `data` cut into as many parts; gives the status and what came in.
    fn ask(&mut self, kind: u32, sector: u64, data: &[u8], into: u32, cut: u32) -> (u8, Vec<u8>) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.memory.write_slice(&header, GuestAddress(HEADER)).unwrap();
        self.memory.write_slice(data, GuestAddress(DATA)).unwrap();
        self.memory.write_obj(0xffu8, GuestAddress(STATUS)).unwrap();
        let cut = cut.min(16);
        let mut buffers = vec![reads(HEADER, cut), reads(HEADER + u64::from(cut), 16 - cut)];
        let out = u32::try_from(data.len()).unwrap();
        buffers.extend(parts(DATA, out, cut, false));
        buffers.extend(parts(DATA, into, cut, true));
        buffers.push(writes(STATUS, 1));
        let used = ask(&mut self.guest, &mut self.ring, &buffers);
        assert_eq!(used.len(), 1, "{:?}", self.guest.transport.broken());
        let status = self.memory.read_obj(GuestAddress(STATUS)).unwrap();
        assert_eq!(used[0].1, if status == OK || into == 0 { into + 1 } else { 0 });
        let mut bytes = vec![0; into as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(DATA)).unwrap();
        (status, bytes)
    }

    fn read(&mut self, sector: u64, count: u32) -> (u8, Vec<u8>) {
        self.ask(VIRTIO_BLK_T_IN, sector, &[], count * SECTOR as u32, 16)
    }

    fn write(&mut self, sector: u64, data: &[u8]) -> u8 {
        self.ask(VIRTIO_BLK_T_OUT, sector, data, 0, 16).0
    }

    /// Saves the machine, and goes on with a restored one over the same memory and file.
    fn restore(&mut self, file: &File) {
        let state = self.guest.transport.save().unwrap();
        let bytes = postcard::to_allocvec(&state).unwrap();
        let state = postcard::from_bytes(&bytes).unwrap();
        self.guest = Guest::new(disk_on(file), &self.memory);
        self.guest.transport.restore(&state).unwrap();
    }
}

fn parts(at: u64, length: u32, pieces: u32, writable: bool) -> Vec<Buffer> {
    let piece = length.div_ceil(pieces.max(1)).max(1);
    (0..length)
        .step_by(piece as usize)
        .map(|from| Buffer {
            address: at + u64::from(from),
            length: piece.min(length - from),
            writable,
        })
        .collect()
}

fn range(sector: u64, count: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(count.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

#[derive(Clone, Debug)]
enum Op {
    Write { sector: u64, count: u64, seed: u8, odd: usize },
    Read { sector: u64, count: u32, odd: u32 },
    Zero { sector: u64, count: u32, unmap: bool },
    Discard { ranges: Vec<(u64, u32)> },
    Flush,
    Id,
    Unknown(u32),
    Restore,
}

fn op() -> impl Strategy<Value = Op> {
    let sector = prop_oneof![8 => 0..SECTORS + 4, 1 => any::<u64>()];
    let odd = prop_oneof![8 => Just(0u32), 1 => 1u32..512];
    prop_oneof![
        4 => (sector.clone(), 0..8u64, any::<u8>(), odd.clone()).prop_map(
            |(sector, count, seed, odd)| Op::Write { sector, count, seed, odd: odd as usize }),
        4 => (sector.clone(), 0..8u32, odd).prop_map(
            |(sector, count, odd)| Op::Read { sector, count, odd }),
        1 => (sector.clone(), 0..8u32, any::<bool>()).prop_map(
            |(sector, count, unmap)| Op::Zero { sector, count, unmap }),
        1 => prop::collection::vec((sector, 0..8u32), 0..20).prop_map(
            |ranges| Op::Discard { ranges }),
        1 => Just(Op::Flush),
        1 => Just(Op::Id),
        1 => (14u32..).prop_map(Op::Unknown),
        1 => Just(Op::Restore),
    ]
}

fn fits(sector: u64, count: u64) -> bool {
    sector.checked_add(count).is_some_and(|end| end <= SECTORS)
}

fn part(sector: u64, count: u64) -> std::ops::Range<usize> {
    (sector * SECTOR) as usize..((sector + count) * SECTOR) as usize
}

fn step(machine: &mut Machine, file: &File, model: &mut [u8], op: &Op, cut: u32) {
    let expect = |good: bool| if good { OK } else { IOERR };
    match op {
        Op::Write { sector, count, seed, odd } => {
            let length = *count as usize * SECTOR as usize + odd;
            let data: Vec<u8> = (0..length).map(|i| seed.wrapping_add(i as u8)).collect();
            let good = *odd == 0 && fits(*sector, *count);
            let (status, _) = machine.ask(VIRTIO_BLK_T_OUT, *sector, &data, 0, cut);
            assert_eq!(status, expect(good));
            if good {
                model[part(*sector, *count)].copy_from_slice(&data);
            }
        }
        Op::Read { sector, count, odd } => {
            let good = *odd == 0 && fits(*sector, (*count).into());
            let length = count * SECTOR as u32 + odd;
            let (status, bytes) = machine.ask(VIRTIO_BLK_T_IN, *sector, &[], length, cut);
            assert_eq!(status, expect(good));
            if good {
                assert_eq!(bytes, model[part(*sector, (*count).into())]);
            }
        }
        Op::Zero { sector, count, unmap } => {
            let data = range(*sector, *count, (*unmap).into());
            let (status, _) = machine.ask(VIRTIO_BLK_T_WRITE_ZEROES, 0, &data, 0, cut);
            let good = fits(*sector, (*count).into());
            assert_eq!(status, expect(good));
            if good {
                model[part(*sector, (*count).into())].fill(0);
            }
        }
        Op::Discard { ranges } => {
            let data: Vec<u8> =
                ranges.iter().flat_map(|&(sector, count)| range(sector, count, 0)).collect();
            let (status, _) = machine.ask(VIRTIO_BLK_T_DISCARD, 0, &data, 0, cut);
            let fit = ranges.iter().all(|&(sector, count)| fits(sector, count.into()));
            let good = fit && ranges.len() <= 16;
            assert_eq!(status, expect(good));
            for &(sector, count) in ranges.iter().filter(|_| good) {
                // What a discarded sector reads as is open, but here it is what the file then holds.
                let part = part(sector, count.into());
                file.read_exact_at(&mut model[part.clone()], part.start as u64).unwrap();
            }
        }
        Op::Flush => assert_eq!(machine.ask(VIRTIO_BLK_T_FLUSH, 0, &[], 0, cut).0, OK),
        Op::Id => {
            let (status, id) = machine.ask(VIRTIO_BLK_T_GET_ID, 0, &[], 20, cut);
            assert_eq!((status, &id[..6]), (OK, b"disk0\0".as_slice()));
        }
        Op::Unknown(kind) => assert_eq!(machine.ask(*kind, 0, &[], 0, cut).0, UNSUPP),
        Op::Restore => machine.restore(file),
    }
}

proptest! {
    #[test]
    fn what_was_written_is_read(
        ops in prop::collection::vec((op(), 0u32..17), 1..40),
        by_index: bool,
    ) {
        // The last sector is incomplete: out of reach.
        let file = file_of(&vec![0xaa; (SECTORS * SECTOR) as usize + 100]);
        let mut model = vec![0xaa; (SECTORS * SECTOR) as usize];
        let features = all_features() | if by_index { EVENT_IDX } else { 0 };
        let mut machine = Machine::new(disk_on(&file), features);
        for (op, cut) in &ops {
            step(&mut machine, &file, &mut model, op, *cut);
        }
        let mut held = vec![0; model.len() + 100];
        file.read_exact_at(&mut held, 0).unwrap();
        model.extend([0xaa; 100]);
        prop_assert_eq!(held, model);
        prop_assert_eq!(file.metadata().unwrap().len(), SECTORS * SECTOR + 100);
    }
}

#[test]
fn the_configuration_says_the_size_and_the_limits() {
    let file = file_of(&[0; 1536]);
    let mut machine = Machine::new(disk_on(&file), all_features());
    let mut config = [0xff; 80];
    machine.guest.transport.read(0x100, &mut config);
    assert_eq!(config[..8], 3u64.to_le_bytes());
    assert_eq!(config[20..24], 512u32.to_le_bytes());
    assert_eq!(config[36..40], (1u32 << 22).to_le_bytes());
    assert_eq!(config[60..], [0; 20]);
    let mut byte = [0xff];
    machine.guest.transport.read(0x100 + 57, &mut byte);
    assert_eq!(byte, [0]);
    machine.guest.transport.read(0xfff, &mut byte);
    assert_eq!(byte, [0]);
}

#[test]
fn a_read_only_disk_refuses_to_change() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    std::fs::write(&path, vec![5; 4096]).unwrap();
    let file = File::open(&path).unwrap();
    let error = BlockDevice::new(file.try_clone().unwrap(), &BlockOptions::default());
    assert!(matches!(error, Err(BlockError::NotWritable)));
    let disk = BlockDevice::new(file, &BlockOptions::default().read_only(true)).unwrap();
    let mut machine = Machine::new(disk, VERSION_1 | 1 << VIRTIO_BLK_F_RO);
    assert_eq!(machine.guest.offered() & 1 << VIRTIO_BLK_F_DISCARD, 0);
    assert_eq!(machine.write(0, &[1; 512]), IOERR);
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        assert_eq!(machine.ask(kind, 0, &range(0, 1, 0), 0, 16).0, IOERR);
    }
    assert_eq!(machine.read(0, 8), (OK, vec![5; 4096]));
}

#[test]
fn a_read_only_disk_in_a_writable_file_stays_as_it_is() {
    let file = file_of(&[5; 4096]);
    let options = BlockOptions::default().read_only(true);
    let disk = BlockDevice::new(file.try_clone().unwrap(), &options).unwrap();
    let mut machine = Machine::new(disk, VERSION_1 | 1 << VIRTIO_BLK_F_RO);
    assert_eq!(machine.write(0, &[1; 512]), IOERR);
    assert_eq!(machine.ask(VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(0, 1, 0), 0, 16).0, IOERR);
    assert_eq!(machine.read(0, 8), (OK, vec![5; 4096]));
}

#[test]
fn a_write_is_kept_at_once_where_the_driver_cannot_flush() {
    // This file takes every write, but the host cannot sync it.
    for (features, expected) in [(all_features(), OK), (VERSION_1, IOERR)] {
        let file = OpenOptions::new().read(true).write(true).open("/dev/zero").unwrap();
        let mut disk = BlockDevice::new(file, &BlockOptions::default()).unwrap();
        disk.pretend_sectors(8);
        assert_eq!(Machine::new(disk, features).write(0, &[1; 512]), expected);
    }
}

#[test]
fn a_restored_disk_serves_what_was_announced_to_the_saved_one() {
    let file = file_of(&[1; 4096]);
    let mut machine = Machine::new(disk_on(&file), all_features());
    machine.memory.write_slice(&[0; 16], GuestAddress(HEADER)).unwrap();
    assert!(machine.guest.settle(10));
    machine.ring.chain(0, &[reads(HEADER, 16), writes(DATA, 512), writes(STATUS, 1)]);
    machine.ring.publish(0);
    machine.restore(&file);
    assert!(machine.guest.settle(10));
    assert_eq!(machine.ring.take_used(), [(0, 513)]);
}

#[test]
fn a_file_that_cannot_be_a_disk_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    let open = |options: &mut OpenOptions| options.create(true).open(&path).unwrap();
    let options = BlockOptions::default();
    let file = open(OpenOptions::new().write(true));
    assert!(matches!(BlockDevice::new(file, &options), Err(BlockError::NotReadable)));
    let file = open(OpenOptions::new().read(true).append(true));
    assert!(matches!(BlockDevice::new(file, &options), Err(BlockError::Appending)));
    let long = options.serial("123456789012345678901");
    let file = open(OpenOptions::new().read(true).write(true));
    assert!(matches!(BlockDevice::new(file, &long), Err(BlockError::Serial)));
}

#[test]
fn features_that_were_not_taken_are_not_there() {
    let file = file_of(&[1; 4096]);
    let mut machine = Machine::new(disk_on(&file), VERSION_1);
    for kind in [VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        assert_eq!(machine.ask(kind, 0, &range(0, 1, 0), 0, 16).0, UNSUPP);
    }
    assert_eq!(machine.write(1, &[2; 512]), OK);
    assert_eq!(machine.read(0, 2).1, [vec![1; 512], vec![2; 512]].concat());
}

#[test]
fn flags_that_are_unknown_are_unsupported() {
    let file = file_of(&[1; 4096]);
    let mut machine = Machine::new(disk_on(&file), all_features());
    for (kind, flags) in [
        (VIRTIO_BLK_T_DISCARD, 1),
        (VIRTIO_BLK_T_DISCARD, 2),
        (VIRTIO_BLK_T_WRITE_ZEROES, 2),
        (VIRTIO_BLK_T_WRITE_ZEROES, u32::MAX),
    ] {
        assert_eq!(machine.ask(kind, 0, &range(0, 1, flags), 0, 16).0, UNSUPP);
    }
    let part = &range(0, 1, 0)[..15];
    assert_eq!(machine.ask(VIRTIO_BLK_T_DISCARD, 0, part, 0, 16).0, IOERR);
    assert_eq!(machine.read(0, 8), (OK, vec![1; 4096]));
}

#[test]
fn a_file_that_shrank_is_an_input_error() {
    let file = file_of(&[1; 4096]);
    let mut machine = Machine::new(disk_on(&file), all_features());
    file.set_len(1000).unwrap();
    assert_eq!(machine.read(0, 8).0, IOERR);
    assert_eq!(machine.read(7, 1).0, IOERR);
    assert_eq!(machine.read(0, 1), (OK, vec![1; 512]));
}

#[test]
fn a_host_without_space_is_an_input_error() {
    // Every write to this file fails with ENOSPC; it has no length, so the machine's disk is made longer by hand.
    let file = OpenOptions::new().read(true).write(true).open("/dev/full").unwrap();
    let mut disk = BlockDevice::new(file, &BlockOptions::default()).unwrap();
    disk.pretend_sectors(8);
    let mut machine = Machine::new(disk, all_features());
    assert_eq!(machine.write(0, &[1; 512]), IOERR);
    assert_eq!(machine.ask(VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(0, 1, 0), 0, 16).0, IOERR);
    assert_eq!(machine.read(0, 1), (OK, vec![0; 512]));
    assert_eq!(machine.ask(VIRTIO_BLK_T_FLUSH, 0, &[], 0, 16).0, IOERR);
    assert_eq!(machine.ask(VIRTIO_BLK_T_FLUSH, 0, &[], 0, 16).0, IOERR);
}

#[test]
fn one_call_does_not_serve_a_full_queue_of_long_requests() {
    const LENGTH: u32 = 1 << 20;
    let file = file_of(&[]);
    file.set_len(LENGTH.into()).unwrap();
    let mut machine = Machine::new(disk_on(&file), all_features());
    machine.memory.write_slice(&[0; 16], GuestAddress(HEADER)).unwrap();
    for head in (0..60).step_by(3) {
        machine.ring.chain(head, &[reads(HEADER, 16), writes(DATA, LENGTH), writes(STATUS, 1)]);
        machine.ring.publish(head);
    }
    machine.guest.notify(0);
    assert_eq!(machine.ring.take_used().len(), 4);
    assert!(machine.guest.host_waits());
    assert_eq!(machine.guest.line.count(), 1, "one interrupt for a call");
    assert!(machine.guest.settle(10));
    assert_eq!(machine.ring.take_used().len(), 16);
}

#[test]
fn a_request_that_no_driver_may_make_so_long_moves_nothing() {
    let file = file_of(&[]);
    file.set_len(64 << 20).unwrap();
    let mut machine = Machine::new(disk_on(&file), all_features());
    machine.memory.write_slice(&[0; 16], GuestAddress(HEADER)).unwrap();
    let mut buffers = vec![reads(HEADER, 16)];
    buffers.extend([writes(DATA, 1 << 20); 17]);
    buffers.push(writes(STATUS, 1));
    assert_eq!(ask(&mut machine.guest, &mut machine.ring, &buffers), [(0, 0)]);
    assert_eq!(machine.memory.read_obj::<u8>(GuestAddress(STATUS)).unwrap(), IOERR);
}

#[test]
fn memory_notes_what_is_read_into_it() {
    let file = file_of(&[5; 64 * SECTOR as usize]);
    let mut machine = Machine::new(disk_on(&file), all_features());
    machine.memory.write_slice(&[0; 16], GuestAddress(HEADER)).unwrap();
    // The buffer lies in both regions.
    let buffers = [reads(HEADER, 16), writes(0x12_0000 - 512, 9 * 512), writes(STATUS, 1)];
    machine.ring.chain(0, &buffers);
    machine.ring.publish(0);
    serve_noted(&mut machine.guest, &machine.memory);
    assert_eq!(machine.ring.take_used(), [(0, 9 * 512 + 1)]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn what_changes_on_a_disk_is_noted(ops in prop::collection::vec((0..4u8, 0..4_000u64, 1..300u32), 1..8)) {
        const LENGTH: usize = 4_096 * SECTOR as usize;
        let file = file_of(&vec![9; LENGTH]);
        let disk = disk_on(&file);
        let changes = disk.changes();
        prop_assert_eq!(changes.part_bytes(), 64 << 10);
        let mut machine = Machine::new(disk, all_features());
        for (kind, sector, count) in ops {
            let count = count.min(4_096 - u32::try_from(sector).unwrap());
            let read = || {
                let mut bytes = vec![0; LENGTH];
                file.read_exact_at(&mut bytes, 0).unwrap();
                bytes
            };
            let before = read();
            let (kind, data) = match kind {
                0 => (VIRTIO_BLK_T_IN, Vec::new()),
                1 => (VIRTIO_BLK_T_OUT, vec![kind; count as usize * SECTOR as usize]),
                2 => (VIRTIO_BLK_T_DISCARD, range(sector, count, 0)),
                _ => (VIRTIO_BLK_T_WRITE_ZEROES, range(sector, count, 0)),
            };
            machine.ask(kind, sector, &data, 0, 16);
            let noted = changes.take();
            prop_assert_eq!(noted.len(), 1);
            for (number, (before, after)) in before.chunks(64 << 10).zip(read().chunks(64 << 10)).enumerate() {
                let (noted, touched) = (noted[0] >> number & 1 == 1, (sector * 512) >> 16 <= number as u64
                    && number as u64 <= ((sector + u64::from(count)) * 512 - 1) >> 16);
                prop_assert!(noted || before == after);
                prop_assert!(!noted || touched && kind != VIRTIO_BLK_T_IN);
            }
            prop_assert!(changes.take().iter().all(|word| *word == 0));
        }
    }
}

#[test]
fn the_note_of_a_huge_disk_stays_small() {
    for bytes in [0, 1, 1 << 20, (1 << 40) + 1, 1 << 50, u64::MAX / 2] {
        let changes = DiskChanges::new(bytes);
        assert!(changes.part_bytes().is_power_of_two());
        let parts = changes.take().len() as u64 * 64;
        assert!(
            parts * 1_u64.max(changes.part_bytes() / 64) >= bytes / 64 && parts <= 32 << 20,
            "{bytes}"
        );
    }
}
