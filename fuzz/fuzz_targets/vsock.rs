//! A guest's vsock packets, rings and memory, and hosts beside it, in any order; then a connection by the rules.
//!
//! The first byte of a move says what it is, see [`Play::step`]; numbers are in little-endian order, and bytes that the
//! input lacks are zero.
#![no_main]

mod input;

use input::Input;
use libfuzzer_sys::fuzz_target;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};
use std::{
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{Arc, Mutex},
};
use vm_kvm_devices::{
    Memory, VsockDevice, VsockLimits,
    testing::{Buffer, Guest, Ring, memory},
    vsock::Listener,
};
use vm_memory::{Bytes, GuestAddress};

const CID: u64 = 3;
const MEMORY: usize = 0x2_0000;
const RINGS: u64 = 0x1000;
const RING_SIZE: u16 = 32;
const TX_DATA: u64 = 0x8000;
const RX_DATA: u64 = 0x1_0000;
const RX_SLOT: u64 = 0x800;

/// The most moves of one input.
const MOVES: usize = 192;

/// The most connections.
const CONNECTIONS: usize = 6;

fuzz_target!(|input: &[u8]| {
    let mut play = Play::new();
    let mut input = Input(input);
    for _ in 0..MOVES {
        if input.0.is_empty() {
            break;
        }
        play.step(&mut input);
        let active = play.guest.transport.active();
        let streams = play.device().streams();
        assert!(streams <= CONNECTIONS && (active || streams == 0));
        assert!(active || !play.guest.host_waits());
    }
    play.finish();
});

struct Play {
    memory: Memory,
    guest: Guest,
    rings: [Ring; 3],
    incoming: Arc<Mutex<Vec<OwnedFd>>>,
    hosts: Vec<OwnedFd>,
}

impl Play {
    fn new() -> Self {
        let memory = memory(&[(0, MEMORY)]).expect("memory");
        let incoming = Arc::<Mutex<Vec<OwnedFd>>>::default();
        let to = Arc::clone(&incoming);
        let mut limits = VsockLimits::default();
        limits.connections = CONNECTIONS;
        limits.buffer = 8 << 10;
        let incoming_to = move |_port, stream| {
            to.lock().expect("one thread").push(stream);
            true
        };
        let mut device = VsockDevice::new(CID, Box::new(incoming_to), limits).expect("a device");
        device.listen(Listener { port: 5, number: 1 }, u32::MAX);
        let guest = Guest::new(device, &memory);
        let rings = rings(&memory);
        let mut play = Self { memory, guest, rings, incoming, hosts: Vec::new() };
        play.start();
        play
    }

    fn start(&mut self) {
        self.rings = rings(&self.memory);
        let [rx, tx, event] = &self.rings;
        assert!(self.guest.start(1 << 32 | 1, &[rx, tx, event]), "a good driver is refused");
    }

    fn device(&mut self) -> &mut VsockDevice {
        self.guest.transport.device_as().expect("a vsock device")
    }

    /// Makes one move.
    fn step(&mut self, input: &mut Input<'_>) {
        let kind = input.byte() % 16;
        match kind {
            0 | 1 => self.packet(input),
            2 => self.give(input.byte() % 8, u32::from(input.half() % 0x800), input.byte() % 3),
            3 => self.guest.transport.host_ready(),
            4 => self.guest.notify(u32::from(input.byte() % 4)),
            5 => {
                let ring = usize::from(input.byte() % 3);
                let (index, address, length) = (input.byte(), address(input), input.length());
                let (flags, next) = (u16::from(input.byte() % 8), u16::from(input.byte() % 40));
                self.rings[ring].descriptor(u16::from(index % 40), address, length, flags, next);
            }
            6 => {
                let ring = usize::from(input.byte() % 3);
                self.rings[ring].publish(u16::from(input.byte() % 40));
            }
            7 => {
                let ring = usize::from(input.byte() % 3);
                self.rings[ring].set_published(input.half());
            }
            8 => {
                let line = format!("CONNECT {}\n", 1 + input.byte() % 3);
                self.connect(line.as_bytes());
            }
            9 => {
                let length = input.byte() % 40;
                let said = input.bytes(length).to_vec();
                self.connect(&said);
            }
            10 => {
                let length = usize::from(input.half() % 0x4000);
                if let Some(host) = self.host(input.byte()) {
                    let _ = send(host, &vec![7; length], SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
                }
            }
            11 => {
                let length = usize::from(input.half());
                if let Some(host) = self.host(input.byte()) {
                    let _ = recv(host, &mut vec![0; length], RecvFlags::DONTWAIT);
                }
            }
            12 => {
                let (number, how) = (input.byte(), input.byte());
                match (self.host(number), how % 4) {
                    (Some(host), 0) => drop(shutdown(host, Shutdown::Write)),
                    (Some(host), 1) => drop(shutdown(host, Shutdown::Read)),
                    (Some(_), _) => {
                        let at = usize::from(number) % self.hosts.len();
                        self.hosts.remove(at);
                    }
                    (None, _) => {}
                }
            }
            13 => {
                let (at, length) = (address(input), input.byte());
                let data = input.bytes(length);
                let _outside = self.memory.write_slice(data, GuestAddress(at));
            }
            14 => match input.byte() % 5 {
                0 => {
                    let listener = listener(input);
                    self.device().listen(listener, u32::from(input.byte() % 4));
                }
                1 => self.device().unlisten(6),
                2 => {
                    let listener = listener(input);
                    self.device().taken(listener, u32::from(input.byte() % 8));
                }
                _ => drop(self.device().reset_connections()),
            },
            _ => match input.byte() % 4 {
                0 => self.start(),
                1 => self.guest.reset(),
                _ => drop(self.guest.settle(4)),
            },
        }
    }

    /// Sends a packet whose fields are near what makes sense.
    fn packet(&mut self, input: &mut Input<'_>) {
        let choice = input.byte();
        let host_port = if choice & 1 == 0 {
            (1 << 30) + u32::from(input.byte() % 8)
        } else {
            u32::from(5 + input.byte() % 3)
        };
        let guest_port = 1 + u32::from(input.byte() % 3);
        let operation = u16::from(input.byte() % 9);
        let data = if operation == 5 { input.half() % 0x4000 } else { 0 };
        let length = if choice & 2 == 0 { u32::from(data) } else { input.word() };
        let flags = if operation == 4 { u32::from(input.byte()) } else { 0 };
        let credit = if choice & 4 == 0 { 1 << 16 } else { input.word() };
        let forwarded = if choice & 8 == 0 { 0 } else { input.word() };
        let kind = if choice & 0x70 == 0x70 { input.half() } else { 1 };
        let from = if choice & 0x80 == 0 { CID } else { input.byte().into() };
        let header = header(
            [from, 2],
            [guest_port, host_port],
            length,
            kind,
            operation,
            [flags, credit, forwarded],
        );
        self.send(&header, data.into());
    }

    fn send(&mut self, header: &[u8], data: u32) {
        self.memory.write_slice(header, GuestAddress(TX_DATA)).expect("inside memory");
        let cut = 44 + data / 2;
        self.rings[1].chain(
            28,
            &[
                Buffer { address: TX_DATA, length: cut, writable: false },
                Buffer {
                    address: TX_DATA + u64::from(cut),
                    length: 44 + data - cut,
                    writable: false,
                },
            ],
        );
        self.rings[1].publish(28);
        self.guest.notify(1);
    }

    fn give(&mut self, slot: u8, length: u32, parts: u8) {
        let address = RX_DATA + u64::from(slot) * RX_SLOT;
        let cut = if parts == 0 { length } else { length.min(44 * u32::from(parts)) };
        let head = u16::from(slot) * 2;
        self.rings[0].chain(
            head,
            &[
                Buffer { address, length: cut, writable: true },
                Buffer { address: address + u64::from(cut), length: length - cut, writable: true },
            ],
        );
        self.rings[0].publish(head);
        self.guest.notify(0);
    }

    fn connect(&mut self, said: &[u8]) {
        let (host, device) = UnixStream::pair().expect("a pair");
        let _ = send(&host, said, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
        self.device().accept_host(device.into());
        self.hosts.push(host.into());
    }

    fn host(&mut self, number: u8) -> Option<&OwnedFd> {
        self.hosts.append(&mut self.incoming.lock().expect("one thread"));
        let count = self.hosts.len().max(1);
        self.hosts.get(usize::from(number) % count)
    }

    /// Starts again and connects a host by the rules.
    fn finish(&mut self) {
        self.hosts.clear();
        self.incoming.lock().expect("one thread").clear();
        self.start();
        assert_eq!(self.device().streams(), 0);
        self.connect(b"CONNECT 9\nhello");
        self.give(0, 0x700, 0);
        let port = self.device().save().next_port;
        assert!(self.guest.settle(100), "the device does not come to rest");
        let request: [u8; 44] = self.received();
        let expected = header([2, CID], [port, 9], 0, 1, 1, [0, 8 << 10, 0]);
        assert_eq!(request[..], expected);
        self.give(0, 0x700, 0);
        self.send(&header([CID, 2], [9, port], 0, 1, 2, [0, 1 << 16, 0]), 0);
        assert!(self.guest.settle(100), "the device does not come to rest");
        let data: [u8; 49] = self.received();
        assert_eq!(data[44..], *b"hello");
        let mut line = [0; 32];
        let (_, count) = recv(&self.hosts[0], &mut line[..], RecvFlags::DONTWAIT).expect("a line");
        assert_eq!(line[..count], *format!("OK {port}\n").as_bytes());
    }

    fn received<const N: usize>(&mut self) -> [u8; N] {
        assert_eq!(self.rings[0].take_used(), [(0, N as u32)]);
        let mut bytes = [0; N];
        self.memory.read_slice(&mut bytes, GuestAddress(RX_DATA)).expect("inside memory");
        bytes
    }
}

fn listener(input: &mut Input<'_>) -> Listener {
    Listener { port: 6, number: u64::from(input.byte() % 2) }
}

fn rings(memory: &Memory) -> [Ring; 3] {
    [0, 1, 2].map(|number| Ring::new(memory, RINGS + number * 0x1000, RING_SIZE))
}

fn header(
    cids: [u64; 2],
    ports: [u32; 2],
    length: u32,
    kind: u16,
    operation: u16,
    rest: [u32; 3],
) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(44);
    bytes.extend(cids.iter().flat_map(|cid| cid.to_le_bytes()));
    bytes.extend(ports.iter().flat_map(|port| port.to_le_bytes()));
    bytes.extend(length.to_le_bytes());
    bytes.extend(kind.to_le_bytes());
    bytes.extend(operation.to_le_bytes());
    bytes.extend(rest.iter().flat_map(|field| field.to_le_bytes()));
    bytes
}

/// Gives an address: 17 bits, or the end of memory or of all addresses.
fn address(input: &mut Input<'_>) -> u64 {
    let low = u64::from(input.half());
    match input.byte() {
        0xfe => (MEMORY as u64).wrapping_sub(low & 0xff),
        0xff => u64::MAX - low,
        high => low | u64::from(high & 1) << 16,
    }
}
