//! Machines that do what their kernels and owners say.

use crate::{
    Test, launcher,
    owner::{Owner, PATIENCE, Parts, payload::Code},
};
use std::{
    fs,
    io::{Read, Write},
    os::fd::AsFd,
    os::unix::net::UnixStream,
    thread::sleep,
    time::{Duration, Instant},
};
use vm_backend_kvm::control::{
    Answer, DiskSetUp, End, FromLauncher, Refusal, Request, Stats, Status,
};

pub(crate) const TESTS: &[Test] = &[
    ("a_guest_prints_and_powers_off", prints_and_powers_off),
    ("every_end_is_told_apart", every_end_is_told_apart),
    ("marks_are_told_once", marks_are_told_once),
    ("registers_of_devices_are_there", registers_of_devices_are_there),
    ("a_paused_machine_stands_still", a_paused_machine_stands_still),
    ("sleeping_and_waiting_vcpus_pause_too", sleeping_vcpus_pause_too),
    ("operations_out_of_place_are_refused", operations_out_of_place_are_refused),
    ("nothing_listens_before_the_driver_is_there", nothing_listens_yet),
    ("connections_wait_for_a_paused_machine", connections_wait_for_a_paused_machine),
    ("a_line_without_an_end_is_shown", a_line_without_an_end_is_shown),
    ("a_console_flood_delays_no_answer", a_flood_delays_no_answer),
    ("the_console_survives_a_kill", the_console_survives_a_kill),
    ("the_vmm_is_small", the_vmm_is_small),
    ("memory_around_the_hole_works", memory_around_the_hole_works),
    ("many_disks_share_lines", many_disks_share_lines),
    ("a_paused_machine_is_looked_at", a_paused_machine_is_looked_at),
];

/// Starts a machine with this kernel.
fn boot(code: &Code) -> (Owner, Parts) {
    let parts = Parts::new(&code.elf());
    let mut owner = Owner::start(&launcher());
    owner.set_up(&parts).unwrap();
    owner.ask(Request::Boot).unwrap();
    (owner, parts)
}

fn status(owner: &mut Owner) -> Status {
    match owner.ask(Request::Status).unwrap() {
        Answer::Status(status) => status,
        other => panic!("{other:?}"),
    }
}

fn stats(owner: &mut Owner) -> Stats {
    match owner.ask(Request::Stats).unwrap() {
        Answer::Stats(stats) => stats,
        other => panic!("{other:?}"),
    }
}

/// Waits until `check` gives something.
pub(crate) fn until<T>(what: &str, mut check: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = check() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited for {what}");
        sleep(Duration::from_millis(2));
    }
}

fn prints_and_powers_off() {
    let (mut owner, parts) = boot(&Code::default().print("hello\n").power_off());
    assert_eq!(owner.hear_end(), End::PoweredOff);
    assert!(owner.exited().success());
    assert_eq!(parts.console(), (6, b"hello\n".to_vec()));
    assert!(owner.hear().is_none());
}

fn every_end_is_told_apart() {
    const PANIC: &str = "Kernel panic - not syncing: x\n";
    let ends = [
        (Code::default().reset(), End::Reset),
        (Code::default().print(PANIC).reset(), End::Panicked),
        (Code::default().print(PANIC).triple_fault(), End::Panicked),
        (Code::default().print("Kernel panic - not").reset(), End::Reset),
    ];
    for (code, expected) in ends {
        let (mut owner, _) = boot(&code);
        assert_eq!(owner.hear_end(), expected);
        owner.exited();
    }
    let (mut owner, parts) = boot(&Code::default().triple_fault());
    let End::Failed(why) = owner.hear_end() else { panic!("it did not fail") };
    assert!(why.contains("triple fault"), "{why}");
    let console = parts.console_text();
    assert!(console.contains(&why), "{console}");
}

fn marks_are_told_once() {
    let code = Code::default().out_byte(0x7e0, 1).out_byte(0x7e0, 1).out_byte(0x7e0, 2);
    let (mut owner, _) = boot(&code.power_off());
    assert_eq!(owner.hear_end(), End::PoweredOff);
    let marks: Vec<(u8, u64)> = owner
        .heard
        .iter()
        .map(|message| match message {
            FromLauncher::Mark { mark, at_ns } => (*mark, *at_ns),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(marks.iter().map(|(mark, _)| *mark).collect::<Vec<_>>(), [1, 2]);
    assert!(marks[0].1 <= marks[1].1 && marks[0].1 > 0);
}

/// The first device is vsock, the second gives entropy, and there is no third.
fn registers_of_devices_are_there() {
    let code = Code::default()
        .map_devices()
        .print_memory(0xd000_0000)
        .print_memory(0xd000_0004)
        .print_memory(0xd000_0008)
        .print_memory(0xd000_1008)
        .write_memory(0xd000_2000, 7)
        .print_memory(0xd000_2000)
        .print("\n")
        .power_off();
    let (mut owner, parts) = boot(&code);
    assert_eq!(owner.hear_end(), End::PoweredOff);
    let words: Vec<u32> = parts.console().1[..20]
        .chunks(4)
        .map(|word| u32::from_le_bytes(word.try_into().unwrap()))
        .collect();
    assert_eq!(words, [0x7472_6976, 2, 19, 4, u32::MAX]);
}

fn a_paused_machine_stands_still() {
    let (mut owner, parts) = boot(&Code::default().print_slowly_for_ever(b'.', 2000));
    for _ in 0..5 {
        let before = parts.console().0;
        until("the guest to run", || (parts.console().0 > before).then_some(()));
        assert_eq!(status(&mut owner), Status::Running);
        assert_eq!(owner.ask(Request::Pause), Ok(Answer::Done));
        assert_eq!(status(&mut owner), Status::Paused);
        let (stood, counted) = (parts.console().0, stats(&mut owner));
        sleep(Duration::from_millis(50));
        assert_eq!(parts.console().0, stood);
        let later = stats(&mut owner);
        assert_eq!(later.vm_exits, counted.vm_exits);
        assert_eq!(owner.ask(Request::Resume), Ok(Answer::Done));
        until("the guest to go on", || (parts.console().0 > stood).then_some(()));
    }
    let counted = stats(&mut owner);
    assert!(counted.vm_exits > Some(0) && counted.vcpu_time_ns > 0);
    assert!((4096..16 << 20).contains(&counted.guest_resident_bytes), "{counted:?}");
}

/// A processor that sleeps, and those that wait to be started, are in KVM and must come out.
fn sleeping_vcpus_pause_too() {
    let mut parts = Parts::new(&Code::default().print("x\n").halt().elf());
    parts.set_up.vcpus = 8;
    let mut owner = Owner::start(&launcher());
    owner.set_up(&parts).unwrap();
    owner.ask(Request::Boot).unwrap();
    until("the guest to run", || (parts.console().0 > 0).then_some(()));
    for _ in 0..20 {
        assert_eq!(owner.ask(Request::Pause), Ok(Answer::Done));
        assert_eq!(owner.ask(Request::Resume), Ok(Answer::Done));
    }
}

fn operations_out_of_place_are_refused() {
    let parts = Parts::new(&Code::default().print("x\n").spin().elf());
    let mut owner = Owner::start(&launcher());
    owner.set_up(&parts).unwrap();
    let refused = |status| Err(Refusal::State(status));
    assert_eq!(status(&mut owner), Status::Fresh);
    assert_eq!(owner.ask(Request::Pause), refused(Status::Fresh));
    assert_eq!(owner.ask(Request::Resume), refused(Status::Fresh));
    assert_eq!(owner.ask(Request::Boot), Ok(Answer::Done));
    assert_eq!(owner.ask(Request::Boot), refused(Status::Running));
    assert_eq!(owner.ask(Request::Resume), refused(Status::Running));
    assert_eq!(owner.ask(Request::Pause), Ok(Answer::Done));
    assert_eq!(owner.ask(Request::Pause), refused(Status::Paused));
    assert_eq!(owner.ask(Request::Boot), refused(Status::Paused));
    let listen = Request::Listen { port: 7, listener: 1, backlog: 16 };
    for request in [listen, Request::Unlisten { port: 8 }] {
        assert_eq!(owner.ask(request), Ok(Answer::Done));
    }
}

fn nothing_listens_yet() {
    let (mut owner, _) = boot(&Code::default().spin());
    let (mut ours, its) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(owner.ask_with(Request::Connect, &[its.as_fd()]), Ok(Answer::Done));
    drop(its);
    let _ = ours.write_all(b"CONNECT 1024\n");
    let mut answer = Vec::new();
    // A hang-up, or a reset where the greeting was never read.
    let _ = ours.read_to_end(&mut answer);
    assert_eq!(answer, b"");
}

fn connections_wait_for_a_paused_machine() {
    let (mut owner, _) = boot(&Code::default().spin());
    assert_eq!(owner.ask(Request::Pause), Ok(Answer::Done));
    let connect = |owner: &mut Owner| {
        let (ours, its) = UnixStream::pair().unwrap();
        let asked = owner.ask_with(Request::Connect, &[its.as_fd()]);
        (&ours).write_all(b"CONNECT 1024\n").unwrap();
        (ours, asked)
    };
    let mut waiting = Vec::new();
    let refused = loop {
        match connect(&mut owner) {
            (ours, Ok(Answer::Done)) => waiting.push(ours),
            (_, refused) => break refused,
        }
    };
    assert!(matches!(refused, Err(Refusal::Exhausted(_))), "{refused:?}");
    assert_eq!(waiting.len(), 256);
    // Nobody answers before the machine goes on, and somebody may have gone away by then.
    waiting.truncate(16);
    for mut ours in &waiting {
        ours.set_nonblocking(true).unwrap();
        assert_eq!(ours.read(&mut [0]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
        ours.set_nonblocking(false).unwrap();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
    }
    assert_eq!(owner.ask(Request::Resume), Ok(Answer::Done));
    for mut ours in waiting {
        // There is nobody in this guest: a hang-up.
        let mut answer = Vec::new();
        let _ = ours.read_to_end(&mut answer);
        assert_eq!(answer, b"");
    }
    assert_eq!(status(&mut owner), Status::Running);
}

fn a_line_without_an_end_is_shown() {
    let (_owner, parts) = boot(&Code::default().print("login: ").spin());
    until("the line", || (parts.console_text() == "login: ").then_some(()));
}

fn a_flood_delays_no_answer() {
    let (mut owner, parts) = boot(&Code::default().print_for_ever(b'#'));
    until("a flood", || (parts.console().0 > 1000).then_some(()));
    for _ in 0..50 {
        let asked = Instant::now();
        status(&mut owner);
        assert!(asked.elapsed() < Duration::from_millis(500), "{:?}", asked.elapsed());
    }
}

fn the_console_survives_a_kill() {
    let (mut owner, parts) = boot(&Code::default().print("last words\n").print_for_ever(b'#'));
    until("the guest to print", || (parts.console().0 > 5000).then_some(()));
    owner.child.kill().unwrap();
    owner.child.wait().unwrap();
    let (count, kept) = parts.console();
    assert!(count > 5000);
    assert_eq!(kept.len() as u64, count.min(u64::from(parts.set_up.console_ring_bytes)));
    let printed = if count == kept.len() as u64 { &kept[11..] } else { &kept[..] };
    assert!(printed.iter().all(|&byte| byte == b'#'));
}

fn the_vmm_is_small() {
    let (owner, parts) = boot(&Code::default().print("x\n").spin());
    until("the guest to run", || (parts.console().0 > 0).then_some(()));
    let maps = fs::read_to_string(format!("/proc/{}/smaps", owner.child.id())).unwrap();
    let guest = u64::from(parts.set_up.memory_mib) << 10;
    let (mut size, mut beside) = (0, 0);
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let name = words.next().unwrap_or_default();
        let value: u64 = words.next().and_then(|value| value.parse().ok()).unwrap_or(0);
        match name {
            "Size:" => size = value,
            "Rss:" if size != guest => beside += value,
            _ => {}
        }
    }
    // Without optimisation, the program itself is larger than what is promised for the whole.
    let most = if cfg!(debug_assertions) { 16 << 10 } else { 5 << 10 };
    assert!(beside > 0 && beside <= most, "{beside} KiB");
}

/// The kernel's tables end below 3 GiB, and what is above 4 GiB is memory too.
fn memory_around_the_hole_works() {
    for memory_mib in [64, 3071, 3072, 3073, 5 << 10] {
        let mut parts = Parts::new(&Code::default().print("x\n").power_off().elf());
        parts.set_up.memory_mib = memory_mib;
        let mut owner = Owner::start(&launcher());
        owner.set_up(&parts).unwrap();
        owner.ask(Request::Boot).unwrap();
        assert_eq!(owner.hear_end(), End::PoweredOff, "{memory_mib}");
    }
}

fn many_disks_share_lines() {
    let mut code = Code::default().map_devices();
    for device in 0..20 {
        code = code.print_memory(0xd000_0008 + device * 0x1000);
    }
    let mut parts = Parts::new(&code.print("\n").power_off().elf());
    for disk in 0..17 {
        let serial = format!("disk{disk}");
        parts.set_up.disks.push(DiskSetUp { serial, read_only: disk % 2 == 0 });
        parts.disks.push(crate::owner::in_memory(&[0; 4096]));
    }
    let mut owner = Owner::start(&launcher());
    owner.set_up(&parts).unwrap();
    owner.ask(Request::Boot).unwrap();
    assert_eq!(owner.hear_end(), End::PoweredOff);
    let kinds: Vec<u8> = parts.console().1.chunks(4).map(|word| word[0]).take(20).collect();
    let mut expected = vec![19, 4];
    expected.extend([2; 17]);
    expected.push(0xff);
    assert_eq!(kinds, expected);
}

fn a_paused_machine_is_looked_at() {
    const COUNTER: u32 = 0x20_0000;
    let mut parts = Parts::new(&Code::default().count_for_ever(COUNTER, 2000).elf());
    (parts.set_up.vcpus, parts.set_up.memory_mib) = (2, 4096);
    let mut owner = Owner::start(&launcher());
    owner.set_up(&parts).unwrap();
    assert_eq!(owner.ask(Request::Inspect), Err(Refusal::State(Status::Fresh)));
    owner.ask(Request::Boot).unwrap();
    until("the guest to count", || (parts.console().0 > 3).then_some(()));
    assert_eq!(owner.ask(Request::Inspect), Err(Refusal::State(Status::Running)));
    let mut look = || {
        assert_eq!(owner.ask(Request::Pause), Ok(Answer::Done));
        let Ok(Answer::Inspection(seen)) = owner.ask(Request::Inspect) else { panic!("not seen") };
        assert_eq!(owner.ask(Request::Resume), Ok(Answer::Done));
        seen
    };
    let seen = look();
    let regions: Vec<_> = seen.memory.iter().map(|region| (region.start, region.bytes)).collect();
    assert_eq!(regions, [(0, 3 << 30), (4 << 30, 1 << 30)]);
    let [first, second] = &seen.vcpus[..] else { panic!("{:?}", seen.vcpus) };
    // It prints by way of a port, and the other vCPU waits to be started.
    assert!(first.exits["io_out"] > 3, "{:?}", first.exits);
    assert_eq!(second.exits.get("io_out"), None);
    assert!(first.registers["rip"] > 0x10_0000, "{:?}", first.registers);
    assert!(first.last_exit.is_some());
    let count = parts.console().0;
    until("the guest to count on", || (parts.console().0 > count + 3).then_some(()));
    assert!(look().vcpus[0].exits["io_out"] > first.exits["io_out"]);
}
