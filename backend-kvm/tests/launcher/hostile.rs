//! Owners that make no sense, and kernels that are none.

use crate::{
    Test, launcher,
    owner::{
        Owner, Parts, in_memory,
        payload::{Code, ENTRY, elf},
        ring,
    },
};
use proptest::{
    collection::vec,
    prelude::*,
    test_runner::{Config, TestRunner},
};
use std::{fs::File, os::fd::AsFd};
use vm_backend_kvm::control::{
    Answer, DiskSetUp, FromLauncher, MAX_PACKET, MachineSetUp, Refusal, Request, ToLauncher,
};

pub(crate) const WITHOUT_KVM: &[Test] = &[
    ("packets_that_are_none_end_the_launcher", packets_that_are_none),
    ("messages_out_of_order_end_the_launcher", messages_out_of_order),
    ("descriptors_must_be_those_announced", descriptors_must_match),
];

pub(crate) const WITH_KVM: &[Test] = &[
    ("fields_out_of_bounds_are_named", fields_out_of_bounds_are_named),
    ("files_that_are_no_kernel_are_refused", files_that_are_no_kernel),
    ("damaged_kernels_do_no_harm", damaged_kernels_do_no_harm),
    ("initial_disks_must_fit", initial_disks_must_fit),
    ("what_comes_after_the_set_up_is_checked", what_comes_later_is_checked),
];

fn runner(cases: u32) -> TestRunner {
    TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() })
}

/// Tells which field a set-up was refused for; the process must have ended with a failure.
fn refused_field(owner: &mut Owner, result: Result<(), Refusal>) -> String {
    let Err(Refusal::Config { field, reason }) = result else { panic!("{result:?}") };
    assert!(!reason.is_empty());
    assert_eq!(owner.exited().code(), Some(1));
    field
}

fn packets_that_are_none() {
    let packets = vec(any::<u8>(), 1..300);
    let run = runner(24).run(&packets, |packet| {
        let mut owner = Owner::start(&launcher());
        owner.say_bytes(&packet, &[]).unwrap();
        rustix::net::shutdown(&owner.socket, rustix::net::Shutdown::Write).unwrap();
        // It ends by itself, whether it understood by chance or not.
        owner.exited();
        Ok(())
    });
    run.unwrap();
    let mut owner = Owner::start(&launcher());
    let mut long =
        postcard::to_allocvec(&ToLauncher::Request { id: 0, request: Request::Status }).unwrap();
    long.resize(MAX_PACKET + 1, 0);
    owner.say_bytes(&long, &[]).unwrap();
    assert_eq!(owner.exited().code(), Some(1));
}

fn messages_out_of_order() {
    let boot = ToLauncher::Request { id: 0, request: Request::Boot };
    for early in [boot, ToLauncher::Taken { port: 5, listener: 1, streams: 1 }] {
        let mut owner = Owner::start(&launcher());
        owner.say(&early, &[]).unwrap();
        assert_eq!(owner.exited().code(), Some(1));
        assert!(owner.hear().is_none());
    }
}

fn descriptors_must_match() {
    for count in [0, 1, 3, 9] {
        let parts = Parts::new(&Code::default().spin().elf());
        let files: Vec<File> = (0..count).map(|_| in_memory(&[0; 16])).collect();
        let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        let mut owner = Owner::start(&launcher());
        let result = owner.set_up_with(&parts.set_up, &fds);
        assert_eq!(refused_field(&mut owner, result), "descriptors");
    }
}

/// A field that is out of bounds.
#[derive(Clone, Debug)]
enum Flaw {
    Vcpus(u8),
    MemoryMib(u32),
    Cmdline(String),
    RingBytes(u32),
    VsockCid(u32),
    Serial(String),
    Disks(usize),
}

impl Flaw {
    /// Puts it into a set-up and says which field is to be named.
    fn put(&self, parts: &mut Parts) -> &'static str {
        let set_up: &mut MachineSetUp = &mut parts.set_up;
        match self {
            Self::Vcpus(vcpus) => set_up.vcpus = *vcpus,
            Self::MemoryMib(mib) => set_up.memory_mib = *mib,
            Self::Cmdline(words) => set_up.cmdline.clone_from(words),
            Self::RingBytes(bytes) => set_up.console_ring_bytes = *bytes,
            Self::VsockCid(cid) => set_up.vsock_cid = *cid,
            Self::Serial(serial) => add_disk(parts, serial),
            Self::Disks(count) => (0..*count).for_each(|_| add_disk(parts, "x")),
        }
        match self {
            Self::Vcpus(_) => "vcpus",
            Self::MemoryMib(_) => "memory_mib",
            Self::Cmdline(_) => "cmdline",
            Self::RingBytes(_) => "console_ring_bytes",
            Self::VsockCid(_) => "vsock_cid",
            Self::Serial(_) | Self::Disks(_) => "disks",
        }
    }
}

fn flaws() -> impl Strategy<Value = Flaw> {
    prop_oneof![
        prop_oneof![Just(0_u8), 9_u8..].prop_map(Flaw::Vcpus),
        prop_oneof![0_u32..64, (1 << 20) + 1..u32::MAX].prop_map(Flaw::MemoryMib),
        "[ -~]{0,20}[\n\0\u{7f}é][ -~]{0,20}".prop_map(Flaw::Cmdline),
        (2048_usize..20_000).prop_map(|len| Flaw::Cmdline("x".repeat(len))),
        (RING_LEN + 1..u32::MAX).prop_map(Flaw::RingBytes),
        prop_oneof![0_u32..3, Just(u32::MAX)].prop_map(Flaw::VsockCid),
        "[a-z]{21,60}".prop_map(Flaw::Serial),
        (18_usize..25).prop_map(Flaw::Disks),
    ]
}

const RING_LEN: u32 = crate::owner::RING;

fn add_disk(parts: &mut Parts, serial: &str) {
    parts.set_up.disks.push(DiskSetUp { serial: serial.to_owned(), read_only: false });
    parts.disks.push(in_memory(&[0; 512]));
}

fn fields_out_of_bounds_are_named() {
    let run = runner(60).run(&flaws(), |flaw| {
        let mut parts = Parts::new(&Code::default().spin().elf());
        let field = flaw.put(&mut parts);
        let mut owner = Owner::start(&launcher());
        let result = owner.set_up(&parts);
        prop_assert_eq!(refused_field(&mut owner, result), field);
        Ok(())
    });
    run.unwrap();
}

fn files_that_are_no_kernel() {
    let good = Code::default().spin().elf();
    let with = |at: usize, byte: u8| {
        let mut file = good.clone();
        file[at] = byte;
        file
    };
    let no_kernels: Vec<(&str, Vec<u8>)> = vec![
        ("empty", Vec::new()),
        ("text", b"#!/bin/sh\n".repeat(100)),
        ("only a magic", good[..4].to_vec()),
        ("cut in the header", good[..40].to_vec()),
        ("cut in the program headers", good[..100].to_vec()),
        ("cut in the segment", good[..good.len() - 1].to_vec()),
        ("32 bits", with(4, 1)),
        ("big endian", with(5, 2)),
        ("for arm64", with(18, 183)),
        ("no segments", with(56, 0)),
        ("too many segments", with(57, 1)),
        ("entered nowhere", elf(ENTRY + 100, ENTRY, &[0xf4], 1)),
        ("below 1 MiB", elf(0x1000, 0x1000, &[0xf4], 1)),
        ("overflowing", elf(u64::MAX - 1, u64::MAX - 1, &[0xf4], 4)),
        ("half a bzImage", bzimage(0x20f, 1, 0x8000)[..0x250].to_vec()),
        ("a bzImage that is cut off", bzimage(0x20f, 1, 0x10_0000)),
        ("an old bzImage", bzimage(0x20a, 1, 0x1000)),
        ("a bzImage for 32 bits", bzimage(0x20f, 0, 0x1000)),
    ];
    for (what, file) in no_kernels {
        let mut owner = Owner::start(&launcher());
        let result = owner.set_up(&Parts::new(&file));
        assert_eq!(refused_field(&mut owner, result), "kernel", "{what}");
    }
    for file in [elf(ENTRY, ENTRY, &[0xf4], 64 << 20), elf(3 << 30, 3 << 30, &[0xf4], 1)] {
        let mut owner = Owner::start(&launcher());
        let result = owner.set_up(&Parts::new(&file));
        assert_eq!(refused_field(&mut owner, result), "memory_mib");
    }
    let mut owner = Owner::start(&launcher());
    let mut parts = Parts::new(&[]);
    parts.kernel = File::open("/dev/null").unwrap();
    let result = owner.set_up(&parts);
    assert_eq!(refused_field(&mut owner, result), "kernel");
}

/// Makes a bzImage of 16 KiB that says it has a body of `body` bytes.
fn bzimage(version: u16, xloadflags: u16, body: u32) -> Vec<u8> {
    let mut file = vec![0; 16 << 10];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1f4, &(body / 16).to_le_bytes());
    put(0x1fe, &[0x55, 0xaa]);
    put(0x202, b"HdrS");
    put(0x206, &version.to_le_bytes());
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(0x236, &xloadflags.to_le_bytes());
    put(0x238, &2047_u32.to_le_bytes());
    put(0x258, &0x100_0000_u64.to_le_bytes());
    put(0x260, &0x10_0000_u32.to_le_bytes());
    file
}

fn damaged_kernels_do_no_harm() {
    let good = [Code::default().spin().elf(), bzimage(0x20f, 1, 0x2000)];
    let damage = (0..2_usize, vec((0..0x280_usize, any::<u8>()), 1..4), any::<Option<u16>>());
    let run = runner(60).run(&damage, |(which, changes, cut)| {
        let mut file = good[which].clone();
        for (at, byte) in changes {
            file[at] = byte;
        }
        if let Some(cut) = cut {
            file.truncate(usize::from(cut));
        }
        let mut owner = Owner::start(&launcher());
        match owner.set_up(&Parts::new(&file)) {
            Ok(()) => prop_assert!(owner.ask(Request::Status).is_ok()),
            result @ Err(_) => {
                let field = refused_field(&mut owner, result);
                prop_assert!(field == "kernel" || field == "memory_mib", "{}", field);
            }
        }
        Ok(())
    });
    run.unwrap();
}

fn initial_disks_must_fit() {
    let with = |sizes: &[u64]| {
        let mut parts = Parts::new(&Code::default().spin().elf());
        parts.set_up.initrd_parts = u8::try_from(sizes.len()).unwrap();
        for &size in sizes {
            let part = in_memory(&[]);
            part.set_len(size).unwrap();
            parts.initrd.push(part);
        }
        parts
    };
    for (sizes, fits) in [
        (vec![], true),
        (vec![0], true),
        (vec![0, 0, 5], true),
        (vec![1, 2, 3, 4097], true),
        (vec![62 << 20], true),
        (vec![63 << 20], false),
        (vec![32 << 20, 32 << 20], false),
        (vec![1 << 40], false),
        (vec![i64::MAX.cast_unsigned()], false),
    ] {
        let mut owner = Owner::start(&launcher());
        let result = owner.set_up(&with(&sizes));
        if fits {
            assert_eq!(result, Ok(()), "{sizes:?}");
        } else {
            assert_eq!(refused_field(&mut owner, result), "memory_mib", "{sizes:?}");
        }
    }
}

fn what_comes_later_is_checked() {
    let set_up = || {
        let parts = Parts::new(&Code::default().spin().elf());
        let mut owner = Owner::start(&launcher());
        owner.set_up(&parts).unwrap();
        assert_eq!(
            owner.ask(Request::Listen { port: 5, listener: 1, backlog: 16 }),
            Ok(Answer::Done)
        );
        (owner, parts)
    };
    let request = |request| ToLauncher::Request { id: 9, request };
    let spare = ring(16);
    let (mut owner, _parts) = set_up();
    owner.say(&request(Request::Connect), &[]).unwrap();
    assert_eq!(owner.exited().code(), Some(1));
    let (mut owner, _parts) = set_up();
    owner.say(&request(Request::Status), &[spare.as_fd()]).unwrap();
    assert_eq!(owner.exited().code(), Some(1));
    let (mut owner, _parts) = set_up();
    let taken = ToLauncher::Taken { port: 5, listener: 1, streams: u32::MAX };
    owner.say(&taken, &[]).unwrap();
    assert!(owner.ask(Request::Status).is_ok());
    owner.say(&taken, &[spare.as_fd()]).unwrap();
    assert_eq!(owner.exited().code(), Some(1));
    let (mut owner, parts) = set_up();
    owner.say(&ToLauncher::SetUp(Box::new(parts.set_up.clone())), &[]).unwrap();
    assert_eq!(owner.exited().code(), Some(1));
    // A descriptor that is no stream is a connection that fails, no more.
    let (mut owner, _parts) = set_up();
    assert_eq!(owner.ask_with(Request::Connect, &[spare.as_fd()]), Ok(Answer::Done));
    owner.say(&request(Request::Status), &[]).unwrap();
    assert!(matches!(owner.hear(), Some((FromLauncher::Reply { id: 9, .. }, _))));
}
