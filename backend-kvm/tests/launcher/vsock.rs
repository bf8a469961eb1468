//! A guest with a small vsock driver that connects to its owner.

use crate::{
    Test, launcher,
    machine::until,
    owner::{Owner, Parts, payload::Code},
};
use std::{
    io::Write,
    ops::Range,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
};
use vm_backend_kvm::control::{Answer, FromLauncher, Request, ToLauncher};

pub(crate) const TESTS: &[Test] =
    &[("no_more_streams_wait_than_the_backlog", no_more_wait_than_the_backlog)];

/// The port of the host that the guest connects to.
const PORT: u32 = 7;

pub(crate) const DEVICE: u64 = 0xd000_0000;

/// Queues, with the data of each buffer in 64 bytes: what the guest receives, and what it sends.
pub(crate) const QUEUES: [Queue; 2] =
    [Queue { number: 0, at: 0x11_0000 }, Queue { number: 1, at: 0x11_4000 }];
pub(crate) const SLOTS: u16 = 64;
const SLOT: u32 = 64;

/// Where in a packet its operation is (virtio 1.2, section 5.10.6).
const OPERATION: u32 = 30;
const REQUEST: u8 = 1;
const RESPONSE: u8 = 2;
const RST: u8 = 3;

pub(crate) struct Queue {
    pub(crate) number: u32,
    pub(crate) at: u32,
}

impl Queue {
    pub(crate) fn available(&self) -> u32 {
        self.at + 0x1000
    }

    pub(crate) fn used(&self) -> u32 {
        self.at + 0x1800
    }

    pub(crate) fn slot(&self, number: u32) -> u32 {
        self.at + 0x2000 + number * SLOT
    }

    /// Makes the queue as it is in memory, with all buffers in their order in its rings, and so many given out.
    pub(crate) fn memory(&self, given: u16, packet: impl Fn(u16) -> Vec<u8>) -> Vec<u8> {
        let mut memory = vec![0; 0x4000];
        let mut put = |at: u32, bytes: &[u8]| {
            let at = usize::try_from(at - self.at).unwrap();
            memory[at..at + bytes.len()].copy_from_slice(bytes);
        };
        put(self.available() + 2, &given.to_le_bytes());
        for number in 0..SLOTS {
            let (packet, slot) = (packet(number), self.slot(number.into()));
            let writable = packet.is_empty();
            let length = if writable { SLOT } else { u32::try_from(packet.len()).unwrap() };
            put(slot, &packet);
            let descriptor = self.at + 16 * u32::from(number);
            put(descriptor, &u64::from(slot).to_le_bytes());
            put(descriptor + 8, &length.to_le_bytes());
            put(descriptor + 12, &[if writable { 2 } else { 0 }, 0]);
            put(self.available() + 4 + 2 * u32::from(number), &number.to_le_bytes());
        }
        memory
    }

    fn set_up(&self, device: u64, code: Code) -> Code {
        [
            (0x30, self.number),
            (0x38, SLOTS.into()),
            (0x80, self.at),
            (0x90, self.available()),
            (0xa0, self.used()),
            (0x44, 1),
        ]
        .into_iter()
        .fold(code, |code, (register, value)| code.write_memory(device + register, value))
    }
}

/// A request to connect to the host, from a port of its own for each.
fn request(number: u16) -> Vec<u8> {
    let mut packet = Vec::new();
    packet.extend(3_u64.to_le_bytes());
    packet.extend(2_u64.to_le_bytes());
    packet.extend((1000 + u32::from(number)).to_le_bytes());
    packet.extend(PORT.to_le_bytes());
    packet.extend([0; 4]);
    packet.extend([1, 0, REQUEST, 0]);
    packet.extend([0; 4]);
    packet.extend((64_u32 << 10).to_le_bytes());
    packet.extend([0; 4]);
    packet
}

/// Starts a device with these queues.
pub(crate) fn start(mut code: Code, device: u64, queues: &[Queue]) -> Code {
    for status in [0, 1, 3] {
        code = code.write_memory(device + 0x70, status);
    }
    // Version 1, which is bit 32, and nothing else.
    for (register, value) in [(0x24, 0), (0x20, 0), (0x24, 1), (0x20, 1), (0x70, 0xb)] {
        code = code.write_memory(device + register, value);
    }
    code = queues.iter().fold(code, |code, queue| queue.set_up(device, code));
    code.write_memory(device + 0x70, 0xf)
}

/// A kernel that sends so many requests at once, prints the operation of each answer, and waits for a packet from the
/// host before the next round.
fn kernel(rounds: &[u16]) -> Vec<u8> {
    let [receives, sends] = &QUEUES;
    let mut code = start(Code::default().map_devices(), DEVICE, &QUEUES);
    let (mut sent, mut received) = (0, 0);
    for count in rounds {
        sent += count;
        let first = received;
        received += count;
        code = code
            .write_memory(sends.available().into(), u32::from(sent) << 16)
            .write_memory(DEVICE + 0x50, sends.number)
            .await_word(receives.used() + 2, received);
        for slot in first..received {
            code = code.print_byte(receives.slot(slot.into()) + OPERATION);
        }
        received += 1;
        code = code.await_word(receives.used() + 2, received);
    }
    let mut memory = receives.memory(SLOTS, |_| Vec::new());
    memory.extend(sends.memory(0, request));
    code.spin().elf_with(receives.at.into(), &memory)
}

fn listen(owner: &mut Owner, listener: u64, backlog: u32) {
    let listen = Request::Listen { port: PORT, listener, backlog };
    assert_eq!(owner.ask(listen), Ok(Answer::Done));
}

fn taken(owner: &Owner, listener: u64, streams: u32) {
    owner.say(&ToLauncher::Taken { port: PORT, listener, streams }, &[]).unwrap();
}

/// Takes so many streams that the guest opened, all of one listener, and sees that there are no more.
fn streams(
    owner: &mut Owner,
    listener: u64,
    count: usize,
    answers: usize,
    parts: &Parts,
) -> Vec<OwnedFd> {
    let mut streams = Vec::new();
    for _ in 0..count {
        let (message, fds) = owner.hear().unwrap();
        assert_eq!(message, FromLauncher::Incoming { port: PORT, listener });
        assert_eq!(fds.len(), 1);
        streams.extend(fds);
    }
    until("the answers", || (parts.console().1.len() == answers).then_some(()));
    owner.ask(Request::Status).unwrap();
    assert_eq!(owner.heard, []);
    streams
}

/// Connects to the guest, which takes this as a signal to go on, for as long as the stream lives.
pub(crate) fn signal(owner: &mut Owner) -> UnixStream {
    let (mut ours, its) = UnixStream::pair().unwrap();
    ours.write_all(b"CONNECT 1\n").unwrap();
    assert_eq!(owner.ask_with(Request::Connect, &[its.as_fd()]), Ok(Answer::Done));
    ours
}

fn no_more_wait_than_the_backlog() {
    let parts = Parts::new(&kernel(&[40, 8, 6, 4]));
    let accepted = |answers: Range<usize>| {
        let answers = parts.console().1[answers].to_vec();
        assert!(answers.iter().all(|answer| [RESPONSE, RST].contains(answer)), "{answers:?}");
        answers.iter().filter(|answer| **answer == RESPONSE).count()
    };
    let mut owner = Owner::start(&launcher());
    owner.set_up(&parts).unwrap();
    listen(&mut owner, 1, 16);
    owner.ask(Request::Boot).unwrap();
    let mut open = streams(&mut owner, 1, 16, 40, &parts);
    assert_eq!(accepted(0..40), 16);

    // As many as were taken, and by this listener.
    taken(&owner, 2, 9);
    taken(&owner, 1, 3);
    let _first = signal(&mut owner);
    open.extend(streams(&mut owner, 1, 3, 48, &parts));
    assert_eq!(accepted(40..48), 3);

    // The next listener has a backlog of its own, and what is said late of the last one makes no room in it.
    assert_eq!(owner.ask(Request::Unlisten { port: PORT }), Ok(Answer::Done));
    listen(&mut owner, 2, 2);
    let _second = signal(&mut owner);
    open.extend(streams(&mut owner, 2, 2, 54, &parts));
    assert_eq!(accepted(48..54), 2);
    taken(&owner, 1, 16);
    let _third = signal(&mut owner);
    open.extend(streams(&mut owner, 2, 0, 58, &parts));
    assert_eq!(accepted(54..58), 0);
}
