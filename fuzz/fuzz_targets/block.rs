//! Any requests to a disk, then good ones.
#![no_main]

mod device;
mod input;

use device::Play;
use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::File;
use vm_kvm_devices::{BlockDevice, BlockOptions, testing::Buffer};
use vm_memory::{Bytes, GuestAddress};

const SECTORS: u64 = 64;

const HEADER: u64 = 0x4000;
const DATA: u64 = 0x5000;
const STATUS: u64 = 0x6000;

fuzz_target!(|input: &[u8]| {
    let file = File::from(memfd_create("disk", MemfdFlags::CLOEXEC).expect("a file"));
    file.set_len(SECTORS * 512 + 100).expect("space");
    // The first byte says how the disk is offered.
    let (how, moves) = input.split_first().unwrap_or((&0, &[]));
    let options = BlockOptions::default().read_only(how & 1 != 0).serial("disk0");
    let make = || BlockDevice::new(file.try_clone().expect("a file"), &options).expect("a disk");
    let mut play = Play::new(make);
    play.start(u64::MAX);
    play.run(moves);
    assert_eq!(file.metadata().expect("a file").len(), SECTORS * 512 + 100);

    play.start(if how & 2 != 0 { u64::MAX } else { 0 });
    play.memory.write_slice(&[how | 1; 512], GuestAddress(DATA)).expect("memory");
    let wrote = ask(&mut play, 1, false);
    play.memory.write_slice(&[0; 512], GuestAddress(DATA)).expect("memory");
    assert_eq!(ask(&mut play, 0, true), 0);
    let mut read = [0; 512];
    play.memory.read_slice(&mut read, GuestAddress(DATA)).expect("memory");
    if how & 1 != 0 {
        assert_eq!((wrote, read), (1, [0; 512]), "a disk that is read only was written");
    } else {
        assert_eq!((wrote, read), (0, [how | 1; 512]));
    }
});

/// Asks for the last sector and gives the status.
fn ask<M: Fn() -> BlockDevice>(play: &mut Play<M, BlockDevice>, kind: u8, writable: bool) -> u8 {
    let mut header = [0; 16];
    header[0] = kind;
    header[8] = 63;
    play.memory.write_slice(&header, GuestAddress(HEADER)).expect("memory");
    play.memory.write_obj(0xffu8, GuestAddress(STATUS)).expect("memory");
    let used = play.ask(&[
        Buffer { address: HEADER, length: 16, writable: false },
        Buffer { address: DATA, length: 512, writable },
        Buffer { address: STATUS, length: 1, writable: true },
    ]);
    assert_eq!(used.len(), 1);
    play.memory.read_obj(GuestAddress(STATUS)).expect("memory")
}
