//! Captures of what changed.

use crate::{
    Test,
    copies::{counts_on, fork},
    launcher,
    machine::until,
    owner::{Owner, Parts, in_memory, payload::Code},
    saved::{Captured, Content, Packed, Told, capture, overlaid, tracked, try_capture},
    vsock::{DEVICE, QUEUES, Queue, SLOTS, signal, start},
};
use std::{collections::BTreeSet, os::unix::fs::FileExt};
use vm_backend_kvm::control::{Answer, DiskSetUp, Refusal, Request};

pub(crate) const TESTS: &[Test] = &[
    ("captures_of_what_changed_make_a_whole", make_a_whole),
    ("what_changed_since_a_machine_was_loaded_is_captured", since_loaded),
    ("what_devices_write_is_captured", what_devices_write),
    ("unknown_generations_are_refused", unknown_generations),
    ("a_generation_survives_a_capture_that_nobody_reads", survives_the_unread),
    ("copies_know_no_generations", copies_know_none),
];

const PAGES: u32 = 64;
const STAMPS: u32 = 0x100_0000;

/// A machine that writes a count to one page after the other, and stands still.
fn stamping() -> (Owner, Parts) {
    let parts = Parts::new(&Code::default().stamp_for_ever(STAMPS, PAGES, 500).elf());
    let mut owner = Owner::start(&launcher());
    owner.set_up(&parts).unwrap();
    owner.ask(Request::Boot).unwrap();
    until("the guest to count", || (parts.console().0 > u64::from(PAGES)).then_some(()));
    assert_eq!(owner.ask(Request::Pause), Ok(Answer::Done));
    (owner, parts)
}

/// Lets a machine run for some counts more; says how far it has come then.
fn go_on(owner: &mut Owner, parts: &Parts) -> u8 {
    let before = parts.console().0;
    assert_eq!(owner.ask(Request::Resume), Ok(Answer::Done));
    until("the guest to count", || (parts.console().0 > before + 5).then_some(()));
    assert_eq!(owner.ask(Request::Pause), Ok(Answer::Done));
    *parts.console().1.last().unwrap()
}

fn make_a_whole() {
    let (mut owner, parts) = stamping();
    let mut layers = vec![tracked(&mut owner, &parts, None)];
    assert_eq!(layers[0].generation, Some(1));
    for number in 1..6 {
        let came = go_on(&mut owner, &parts);
        let whole = capture(&mut owner, &parts);
        let since = layers.last().unwrap().generation;
        let layer = tracked(&mut owner, &parts, since);
        assert_eq!(layer.generation, Some(number + 1));
        assert!(
            has_pages(&layer.memory, 5..u64::from(PAGES) + 30),
            "{:?}",
            addresses(&layer.memory)
        );
        layers.push(layer);
        let all: Vec<_> = layers.iter().collect();
        assert!(overlaid(all.iter().map(|layer| &layer.memory)) == overlaid([&whole.memory]));
        let (mut loaded, shown) = Packed::new(&all).load(&parts.set_up).unwrap();
        let again = capture(&mut loaded, &shown);
        assert!(overlaid([&again.memory]) == overlaid([&whole.memory]));
        assert_eq!(loaded.ask(Request::Resume), Ok(Answer::Done));
        counts_on(&shown, came, 0);
    }
    // Since an earlier one, it is all from there on.
    let last = capture(&mut owner, &parts);
    let (pipe, _) = try_capture(&mut owner, &parts, layers[1].generation, false).unwrap();
    let since_second = crate::saved::read(pipe);
    let both = [&layers[0].memory, &layers[1].memory, &since_second.memory];
    assert!(overlaid(both) == overlaid([&last.memory]));
    // Nothing happened in between.
    let nothing = tracked(&mut owner, &parts, layers[5].generation);
    assert!(nothing.memory.is_empty(), "{:?}", addresses(&nothing.memory));
}

/// What changed since a machine was loaded can be told without a log, also when there is one.
fn since_loaded() {
    let (mut owner, parts) = stamping();
    let base = capture(&mut owner, &parts);
    drop(owner);
    let packed = Packed::new(&[&base]);
    let (mut owner, parts) = packed.load_with(&parts.set_up, Vec::new(), true).unwrap();
    let unchanged = tracked(&mut owner, &parts, Some(0));
    assert!(has_pages(&unchanged.memory, 0..30), "{:?}", addresses(&unchanged.memory));
    for _ in 0..3 {
        let came = go_on(&mut owner, &parts);
        let whole = capture(&mut owner, &parts);
        let since = tracked(&mut owner, &parts, Some(0));
        assert!(
            has_pages(&since.memory, 5..u64::from(PAGES) + 30),
            "{:?}",
            addresses(&since.memory)
        );
        assert!(overlaid([&base.memory, &since.memory]) == overlaid([&whole.memory]));
        let packed = Packed::new(&[&base, &since]);
        let (mut loaded, shown) = packed.load(&parts.set_up).unwrap();
        assert_eq!(loaded.ask(Request::Resume), Ok(Answer::Done));
        counts_on(&shown, came, 0);
    }
    // A machine that was not to be tracked does not know when it was loaded.
    let (mut owner, parts) = packed.load(&parts.set_up).unwrap();
    let refused = try_capture(&mut owner, &parts, Some(0), true).err();
    assert_eq!(refused, Some(Refusal::Generation(0)));
}

fn unknown_generations() {
    let (mut owner, parts) = stamping();
    for unknown in [0, 1, u64::MAX] {
        for track in [false, true] {
            let refused = try_capture(&mut owner, &parts, Some(unknown), track).err();
            assert_eq!(refused, Some(Refusal::Generation(unknown)));
        }
    }
    let numbers: Vec<_> =
        (0..10).map(|_| tracked(&mut owner, &parts, None).generation.unwrap()).collect();
    assert!(numbers.windows(2).all(|pair| pair[0] < pair[1]), "{numbers:?}");
    for (number, known) in numbers.iter().zip([[false; 2].as_slice(), &[true; 8]].concat()) {
        let result = try_capture(&mut owner, &parts, Some(*number), false);
        assert_eq!(result.err(), (!known).then_some(Refusal::Generation(*number)));
    }
}

fn survives_the_unread() {
    let (mut owner, parts) = stamping();
    let base = tracked(&mut owner, &parts, None);
    let mut latest = base.generation;
    for _ in 0..3 {
        go_on(&mut owner, &parts);
        let (pipe, generation) = try_capture(&mut owner, &parts, latest, true).unwrap();
        drop(pipe);
        latest = generation;
    }
    go_on(&mut owner, &parts);
    let whole = capture(&mut owner, &parts);
    let since = tracked(&mut owner, &parts, base.generation);
    assert!(overlaid([&base.memory, &since.memory]) == overlaid([&whole.memory]));
}

fn copies_know_none() {
    let (mut owner, parts) = stamping();
    let base = tracked(&mut owner, &parts, None);
    let mut copy = fork(&mut owner, &parts);
    let refused = try_capture(&mut copy.link, &copy.parts, base.generation, false).err();
    assert_eq!(refused, base.generation.map(Refusal::Generation));
    let of_copy = tracked(&mut copy.link, &copy.parts, None);
    assert!(overlaid([&of_copy.memory]) == overlaid([&base.memory]));
    // The original's go on.
    go_on(&mut owner, &parts);
    let whole = capture(&mut owner, &parts);
    let since = tracked(&mut owner, &parts, base.generation);
    assert!(overlaid([&base.memory, &since.memory]) == overlaid([&whole.memory]));
}

/// A guest's requests to its disk, each a header, a page of data and a status.
struct Exchange {
    /// Whether the guest writes.
    out: bool,
    /// What its page holds at first.
    data: u8,
    /// Where on the disk.
    at: u64,
}

/// One after the other, each when its owner says so.
const EXCHANGES: &[Exchange] = &[
    Exchange { out: true, data: 7, at: 1 << 20 },
    // Zeros come into a page that held something, and the other way round.
    Exchange { out: false, data: 9, at: 2 << 20 },
    Exchange { out: false, data: 0, at: 3 << 20 },
    Exchange { out: true, data: 8, at: 4 << 20 },
    // Zeros where there was something.
    Exchange { out: true, data: 0, at: 1 << 20 },
];

const DISK: u64 = DEVICE + 0x2000;
const DISK_QUEUE: Queue = Queue { number: 0, at: 0x11_8000 };
const DATA: u32 = 0x12_0000;

/// A kernel that asks its disk once, prints a letter, and waits for a packet from the host before it asks again.
fn asking() -> Vec<u8> {
    let [receives, sends] = &QUEUES;
    let mut code = start(Code::default().map_devices(), DEVICE, &QUEUES);
    code = start(code, DISK, &[DISK_QUEUE]);
    for number in 1..=u16::try_from(EXCHANGES.len()).unwrap() {
        code = code
            .write_memory(DISK_QUEUE.available().into(), u32::from(number) << 16)
            .write_memory(DISK + 0x50, 0)
            .await_word(DISK_QUEUE.used() + 2, number)
            .print("x")
            .await_word(receives.used() + 2, number);
    }
    let mut memory = receives.memory(SLOTS, |_| Vec::new());
    memory.extend(sends.memory(0, |_| vec![0; 4]));
    memory.extend(disk_memory());
    code.spin().elf_with(receives.at.into(), &memory)
}

/// The disk's queue with all requests, each of three buffers, and their pages.
fn disk_memory() -> Vec<u8> {
    let queue = &DISK_QUEUE;
    let mut memory = vec![0; usize::try_from(DATA - queue.at).unwrap()];
    let mut put = |at: u32, bytes: &[u8]| {
        let at = usize::try_from(at - queue.at).unwrap();
        memory[at..at + bytes.len()].copy_from_slice(bytes);
    };
    for (number, exchange) in (0_u16..).zip(EXCHANGES) {
        let (head, slot) = (3 * number, queue.slot(number.into()));
        put(slot, &u32::from(exchange.out).to_le_bytes());
        put(slot + 8, &(exchange.at / 512).to_le_bytes());
        let buffers = [
            (slot, 16, 1),
            (DATA + u32::from(number) * 4096, 4096, if exchange.out { 1 } else { 3 }),
            (slot + 32, 1, 2),
        ];
        for (descriptor, (address, length, flags)) in (head..).zip(buffers) {
            let at = queue.at + 16 * u32::from(descriptor);
            put(at, &u64::from(address).to_le_bytes());
            put(at + 8, &u32::to_le_bytes(length));
            put(at + 12, &u16::to_le_bytes(flags));
            put(at + 14, &(descriptor + 1).to_le_bytes());
        }
        put(queue.available() + 4 + 2 * u32::from(number), &head.to_le_bytes());
    }
    memory.extend(EXCHANGES.iter().flat_map(|exchange| [exchange.data; 4096]));
    memory
}

fn what_devices_write() {
    const DISK_BYTES: u64 = 8 << 20;
    let mut parts = Parts::new(&asking());
    for (serial, read_only) in [("data", false), ("other", false)] {
        parts.set_up.disks.push(DiskSetUp { serial: serial.to_owned(), read_only });
        let disk = in_memory(&[]);
        disk.set_len(DISK_BYTES).unwrap();
        parts.disks.push(disk);
    }
    parts.disks[0].write_all_at(&[5; 9000], 3 << 20).unwrap();
    let mut owner = Owner::start(&launcher());
    owner.set_up(&parts).unwrap();
    owner.ask(Request::Boot).unwrap();
    let mut layers: Vec<Captured> = Vec::new();
    let mut signals = Vec::new();
    for (number, exchange) in (0_u32..).zip(EXCHANGES) {
        until("an answer", || (parts.console().0 == u64::from(number) + 1).then_some(()));
        assert_eq!(owner.ask(Request::Pause), Ok(Answer::Done));
        let whole = capture(&mut owner, &parts);
        let since = layers.last().and_then(|layer| layer.generation);
        layers.push(tracked(&mut owner, &parts, since));
        assert!(overlaid(layers.iter().map(|layer| &layer.memory)) == overlaid([&whole.memory]));
        let of_disks =
            |captured: &Captured| captured.disks.get(&0x100).cloned().unwrap_or_default();
        let disks: Vec<_> = layers.iter().map(of_disks).collect();
        assert!(overlaid(&disks) == overlaid([&of_disks(&whole)]));
        assert_eq!(whole.disks.get(&0x101), None);
        if number > 0 {
            let layer = layers.last().unwrap();
            let told = addresses(&layer.memory);
            for other in 0..u32::try_from(EXCHANGES.len()).unwrap() {
                let page = u64::from(DATA + other * 4096);
                assert_eq!(told.contains(&page), other == number && !exchange.out, "{told:?}");
            }
            let changed: Vec<_> = addresses(&of_disks(layer)).into_iter().collect();
            let first = exchange.at..exchange.at + (64 << 10);
            let expected: Vec<_> =
                if exchange.out { first.step_by(4096).collect() } else { Vec::new() };
            assert_eq!(changed, expected);
            assert_eq!(layer.disks.get(&0x101), None);
        }
        assert_eq!(owner.ask(Request::Resume), Ok(Answer::Done));
        signals.push(signal(&mut owner));
    }
    // Read zeros and written ones were told as such.
    let zeros = |content: &Content, at: u64| {
        content.iter().any(|(start, told)| match told {
            Told::Zeros(len) => (*start..start + len).contains(&at),
            Told::Content(_) => false,
        })
    };
    assert!(zeros(&layers[1].memory, u64::from(DATA) + 4096));
    assert!(zeros(&layers[4].disks[&0x100], 1 << 20));
    restored_goes_on(&layers[..3], &parts);
}

/// A machine that is made of some layers sends its disk what it would have sent next.
fn restored_goes_on(layers: &[Captured], parts: &Parts) {
    let disks: Vec<_> = parts.disks.iter().map(|_| in_memory(&vec![0; 8 << 20])).collect();
    let packed = Packed::new(&layers.iter().collect::<Vec<_>>());
    let (mut owner, parts) = packed.load_with(&parts.set_up, disks, true).unwrap();
    assert_eq!(owner.ask(Request::Resume), Ok(Answer::Done));
    let _signal = signal(&mut owner);
    until("an answer", || (parts.console().0 == 1).then_some(()));
    assert_eq!(owner.ask(Request::Pause), Ok(Answer::Done));
    let mut found = [0; 4096];
    parts.disks[0].read_exact_at(&mut found, 4 << 20).unwrap();
    assert_eq!(found, [8; 4096]);
    let (pipe, _) = try_capture(&mut owner, &parts, Some(0), false).unwrap();
    let since = crate::saved::read(pipe);
    let whole = capture(&mut owner, &parts);
    let all = layers.iter().map(|layer| &layer.memory).chain([&since.memory]);
    assert!(overlaid(all) == overlaid([&whole.memory]));
    assert_eq!(since.disks.keys().collect::<Vec<_>>(), [&0x100]);
    let expected = (4 << 20..(4 << 20) + (64 << 10)).step_by(4096);
    assert_eq!(addresses(&since.disks[&0x100]), expected.collect());
}

/// Gives the pages that something was told of.
fn addresses(content: &Content) -> BTreeSet<u64> {
    let pages = |(at, told): (&u64, &Told)| {
        let len = match told {
            Told::Content(bytes) => bytes.len() as u64,
            Told::Zeros(len) => *len,
        };
        (*at..at + len).step_by(4096)
    };
    content.iter().flat_map(pages).collect()
}

fn has_pages(content: &Content, count: std::ops::Range<u64>) -> bool {
    count.contains(&(addresses(content).len() as u64))
}
