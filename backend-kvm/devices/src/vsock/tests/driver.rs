//! A driver for the device: packets out and in, as Linux lays them out or otherwise.

use crate::{
    device::Memory,
    testing::{Buffer, Guest, Ring, memory},
    vsock::{
        Listener, VsockDevice, VsockLimits,
        packet::{HEADER_SIZE, HOST_CID, Header, TYPE_STREAM, op},
    },
};
use std::{
    collections::VecDeque,
    io::{ErrorKind, Read, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{Arc, Mutex},
};
use vm_memory::{Bytes, GuestAddress};

pub(super) const CID: u64 = 3;
pub(super) const RX: u32 = 0;
pub(super) const TX: u32 = 1;
pub(super) const EVENT: u32 = 2;

const RING: u64 = 0x1_0000;
const RX_DATA: u64 = 0x10_0000;
const RX_SLOT: u64 = 0x2000;
const TX_DATA: u64 = 0x20_0000;
const TX_SLOT: u64 = 0x1_2000;
pub(super) const SLOTS: u16 = 32;
const PARTS: u16 = 8;

/// How packets are cut into buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cut {
    /// One buffer, as Linux does since 6.2.
    One,
    /// The header apart, as Linux did before.
    Two,
    /// The header in one, the data in pages, as Linux does with large packets since 6.17.
    Pages,
    /// The header cut too.
    Odd,
}

pub(super) type Incoming = Arc<Mutex<Vec<(Listener, OwnedFd)>>>;

/// A guest with a vsock device.
pub(super) struct Vsock {
    pub(super) guest: Guest,
    pub(super) memory: Memory,
    pub(super) rx: Ring,
    pub(super) tx: Ring,
    pub(super) event: Ring,
    pub(super) cut: Cut,
    /// How many bytes of data a buffer for packets to the guest has.
    pub(super) rx_room: u32,
    pub(super) incoming: Incoming,
    pub(super) inbox: VecDeque<(Header, Vec<u8>)>,
    free_rx: Vec<u16>,
    free_tx: Vec<u16>,
}

impl Vsock {
    pub(super) fn new(cut: Cut, limits: VsockLimits) -> Self {
        let incoming = Incoming::default();
        let to = Arc::clone(&incoming);
        let device = VsockDevice::new(
            CID,
            Box::new(move |listener, stream| {
                to.lock().unwrap().push((listener, stream));
                true
            }),
            limits,
        )
        .unwrap();
        let memory = memory(&[(0, 8 << 20)]).unwrap();
        let ring = |number: u64| Ring::new(&memory, RING + number * 0x4000, 256);
        let (rx, tx, event) = (ring(0), ring(1), ring(2));
        let guest = Guest::new(device, &memory);
        let mut vsock = Self {
            guest,
            memory,
            rx,
            tx,
            event,
            cut,
            rx_room: 3776,
            incoming,
            inbox: VecDeque::new(),
            free_rx: Vec::new(),
            free_tx: Vec::new(),
        };
        vsock.start();
        vsock
    }

    /// Sets the device up as after a reset, with all buffers free and none given to the device.
    pub(super) fn start(&mut self) {
        let ring = |number: u64| Ring::new(&self.memory, RING + number * 0x4000, 256);
        (self.rx, self.tx, self.event) = (ring(0), ring(1), ring(2));
        self.free_rx = (0..SLOTS).rev().collect();
        self.free_tx = (0..SLOTS).rev().collect();
        self.inbox.clear();
        assert!(self.guest.start(1 << 32 | 1, &[&self.rx, &self.tx, &self.event]));
    }

    pub(super) fn device(&mut self) -> &mut VsockDevice {
        self.guest.transport.device_as().unwrap()
    }

    /// Listens on a port without a bound of its own.
    pub(super) fn listen(&mut self, port: u32) {
        self.device().listen(Listener { port, number: 0 }, u32::MAX);
    }

    pub(super) fn is_broken(&self) -> bool {
        self.guest.transport.broken().is_some()
    }

    /// Gives the device buffers to write to, all that are free.
    pub(super) fn refill(&mut self) {
        self.give(usize::MAX);
    }

    /// Gives the device some buffers to write to.
    pub(super) fn give(&mut self, count: usize) {
        let mut given = false;
        for _ in 0..count {
            let Some(slot) = self.free_rx.pop() else { break };
            let base = RX_DATA + u64::from(slot) * RX_SLOT;
            let buffers = self.buffers(base, self.rx_room, true);
            self.rx.chain(slot * PARTS, &buffers);
            self.rx.publish(slot * PARTS);
            given = true;
        }
        if given {
            self.guest.notify(RX);
        }
    }

    fn buffers(&self, base: u64, data: u32, writable: bool) -> Vec<Buffer> {
        let header = 44u32;
        let lengths: Vec<u32> = match self.cut {
            Cut::One => vec![header + data],
            Cut::Two => vec![header, data],
            Cut::Pages => {
                let pages = data.div_ceil(5).max(1);
                let whole = std::iter::repeat_n(pages, usize::try_from(data / pages).unwrap());
                [header].into_iter().chain(whole).chain([data % pages]).collect()
            }
            Cut::Odd => vec![7, 30, 7 + data / 3, data - data / 3],
        };
        let mut address = base;
        lengths
            .into_iter()
            .filter(|length| *length > 0)
            .map(|length| {
                let buffer = Buffer { address, length, writable };
                address += u64::from(length);
                buffer
            })
            .collect()
    }

    /// Takes what the device wrote.
    pub(super) fn collect(&mut self) {
        for (head, length) in self.rx.take_used() {
            let slot = u16::try_from(head).unwrap() / PARTS;
            let mut bytes = vec![0; usize::try_from(length).unwrap()];
            let base = RX_DATA + u64::from(slot) * RX_SLOT;
            self.memory.read_slice(&mut bytes, GuestAddress(base)).unwrap();
            let header = Header::decode(bytes[..HEADER_SIZE].try_into().unwrap());
            assert_eq!(usize::try_from(header.len).unwrap(), bytes.len() - HEADER_SIZE);
            assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID));
            self.inbox.push_back((header, bytes[HEADER_SIZE..].to_vec()));
            self.free_rx.push(slot);
        }
        for (head, length) in self.tx.take_used() {
            assert_eq!(length, 0);
            self.free_tx.push(u16::try_from(head).unwrap() / PARTS);
        }
    }

    /// Sends a packet; false where the device holds all buffers.
    pub(super) fn try_send(&mut self, header: Header, data: &[u8]) -> bool {
        self.collect();
        let Some(slot) = self.free_tx.pop() else { return false };
        let base = TX_DATA + u64::from(slot) * TX_SLOT;
        self.memory.write_slice(&header.encode(), GuestAddress(base)).unwrap();
        self.memory.write_slice(data, GuestAddress(base + 44)).unwrap();
        let buffers = self.buffers(base, u32::try_from(data.len()).unwrap(), false);
        self.tx.chain(slot * PARTS, &buffers);
        self.tx.publish(slot * PARTS);
        self.guest.notify(TX);
        true
    }

    pub(super) fn send(&mut self, header: Header, data: &[u8]) {
        assert!(self.try_send(header, data), "the device holds all buffers");
    }

    /// Lets the device come to rest, with buffers enough.
    pub(super) fn settle(&mut self) {
        for _ in 0..1000 {
            self.refill();
            assert!(self.guest.settle(10_000));
            let before = self.inbox.len();
            self.collect();
            if self.inbox.len() == before {
                return;
            }
        }
        panic!("the device never rests");
    }

    /// Lets time pass for the device.
    pub(super) fn tick(&mut self, count: usize) {
        for _ in 0..count {
            self.device().hub.tick();
        }
        self.guest.transport.host_ready();
    }

    /// Gives the next packet, after the device came to rest.
    pub(super) fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        if self.inbox.is_empty() {
            self.settle();
        }
        self.inbox.pop_front()
    }

    /// Gives the operations of all packets that there are.
    pub(super) fn operations(&mut self) -> Vec<u16> {
        self.settle();
        self.inbox.drain(..).map(|(header, _)| header.op).collect()
    }

    /// Connects a host's stream to `port` of the guest, as far as the device takes it.
    pub(super) fn host(&mut self, port: u32) -> UnixStream {
        let mut host = self.bare_host();
        // It fails where the device closed it at once.
        let _ = host.write_all(format!("CONNECT {port}\n").as_bytes());
        host
    }

    /// Hands a host's stream over that has said nothing.
    pub(super) fn bare_host(&mut self) -> UnixStream {
        let (host, device) = UnixStream::pair().unwrap();
        host.set_nonblocking(true).unwrap();
        self.device().accept_host(device.into());
        host
    }

    /// Connects a host to the guest, which accepts; gives the stream after its `OK` and the host's port.
    pub(super) fn connected(&mut self, port: u32) -> (UnixStream, u32) {
        let mut host = self.host(port);
        let (request, _) = self.receive().unwrap();
        assert_eq!((request.op, request.dst_port), (op::REQUEST, port));
        self.send(answer(&request, op::RESPONSE), &[]);
        self.settle();
        let line = format!("OK {}\n", request.src_port);
        let mut said = vec![0; line.len()];
        host.read_exact(&mut said).unwrap();
        assert_eq!(said, line.as_bytes());
        (host, request.src_port)
    }

    /// Connects the guest to a port that the host listens on; gives the host's stream.
    pub(super) fn guest_connected(&mut self, host_port: u32, guest_port: u32) -> UnixStream {
        self.listen(host_port);
        self.send(packet(op::REQUEST, host_port, guest_port), &[]);
        let (response, _) = self.receive().unwrap();
        assert_eq!((response.op, response.src_port), (op::RESPONSE, host_port));
        let (listener, stream) = self.incoming.lock().unwrap().pop().unwrap();
        assert_eq!(listener.port, host_port);
        let stream = UnixStream::from(stream);
        stream.set_nonblocking(true).unwrap();
        stream
    }
}

/// Makes a packet of the guest's.
pub(super) fn packet(operation: u16, host_port: u32, guest_port: u32) -> Header {
    Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: guest_port,
        dst_port: host_port,
        kind: TYPE_STREAM,
        op: operation,
        buf_alloc: 256 << 10,
        ..Header::default()
    }
}

/// Makes a packet that answers one of the host's.
pub(super) fn answer(to: &Header, operation: u16) -> Header {
    packet(operation, to.src_port, to.dst_port)
}

/// Makes a packet with data.
pub(super) fn data(host_port: u32, guest_port: u32, bytes: &[u8]) -> Header {
    Header { len: u32::try_from(bytes.len()).unwrap(), ..packet(op::RW, host_port, guest_port) }
}

/// What a host's stream gives at most: its bytes, and whether it ended.
pub(super) fn read_some(stream: &mut UnixStream, most: usize) -> (Vec<u8>, bool) {
    let mut all = Vec::new();
    let mut bytes = vec![0; 16 << 10];
    while all.len() < most {
        let want = bytes.len().min(most - all.len());
        match stream.read(&mut bytes[..want]) {
            Ok(0) => return (all, true),
            Ok(count) => all.extend_from_slice(&bytes[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return (all, true),
            Err(error) => panic!("{error}"),
        }
    }
    (all, false)
}

/// Reads all that is there.
pub(super) fn read_all(stream: &mut UnixStream) -> (Vec<u8>, bool) {
    read_some(stream, usize::MAX)
}
