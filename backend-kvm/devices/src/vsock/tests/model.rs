//! Many connections at once against a guest that behaves as Linux's sockets do: every byte arrives once and in order,
//! every end is seen, and nothing is left.

use super::driver::{Cut, Vsock, answer, packet, read_some};
use crate::vsock::{
    VsockLimits,
    packet::{Header, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, op},
};
use proptest::prelude::*;
use std::{
    collections::{BTreeMap, VecDeque},
    io::Write,
    net::Shutdown,
    os::unix::net::UnixStream,
};

/// A guest's socket.
struct Socket {
    host_port: u32,
    guest_port: u32,
    buf_alloc: u32,
    sent: u32,
    host_alloc: u32,
    host_forwarded: u32,
    /// Packets that the program has not read.
    queue: VecDeque<Vec<u8>>,
    read: u32,
    received: u64,
    sent_end: bool,
    /// What the host said of its end.
    host_flags: u32,
    reset: bool,
}

impl Socket {
    fn new(host_port: u32, guest_port: u32, buf_alloc: u32) -> Self {
        Self {
            host_port,
            guest_port,
            buf_alloc,
            sent: 0,
            host_alloc: 0,
            host_forwarded: 0,
            queue: VecDeque::new(),
            read: 0,
            received: 0,
            sent_end: false,
            host_flags: 0,
            reset: false,
        }
    }

    fn packet(&self, operation: u16) -> Header {
        Header {
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.read,
            ..packet(operation, self.host_port, self.guest_port)
        }
    }

    fn credit(&self) -> u32 {
        self.host_alloc - self.sent.wrapping_sub(self.host_forwarded)
    }

    /// Linux since 6.12.92 resets what this does not hold for.
    fn holds(&self) -> bool {
        let bytes: usize = self.queue.iter().map(Vec::len).sum();
        bytes + 576 * self.queue.len() <= usize::try_from(self.buf_alloc).unwrap()
    }
}

/// Both ends of a connection, and what went in.
struct Pair {
    host: Option<UnixStream>,
    /// The `OK` line is still to come.
    greeted: bool,
    socket: Option<Socket>,
    host_sent: u64,
    host_read: u64,
    host_ended: bool,
    guest_sent: u64,
    saw_end: bool,
    /// Whether an end was closed while bytes were on their way to it: then some may be lost.
    cut: bool,
}

#[derive(Clone, Debug)]
enum Step {
    HostConnects,
    GuestConnects,
    HostWrites(usize, usize),
    HostReads(usize, usize),
    GuestWrites(usize, usize),
    GuestReads(usize, usize),
    HostFinishes(usize),
    GuestFinishes(usize),
    HostCloses(usize),
    GuestCloses(usize),
    Refill(usize),
    HostReady,
    Tick,
}

fn step() -> impl Strategy<Value = Step> {
    let size = || prop_oneof![3 => 1usize..200, 2 => 1usize..5000, 1 => 1usize..150_000];
    let which = || 0usize..64;
    prop_oneof![
        2 => Just(Step::HostConnects),
        2 => Just(Step::GuestConnects),
        8 => (which(), size()).prop_map(|(n, size)| Step::HostWrites(n, size)),
        8 => (which(), size()).prop_map(|(n, size)| Step::HostReads(n, size)),
        8 => (which(), size()).prop_map(|(n, size)| Step::GuestWrites(n, size)),
        8 => (which(), size()).prop_map(|(n, size)| Step::GuestReads(n, size)),
        1 => which().prop_map(Step::HostFinishes),
        1 => which().prop_map(Step::GuestFinishes),
        1 => which().prop_map(Step::HostCloses),
        1 => which().prop_map(Step::GuestCloses),
        4 => (0usize..12).prop_map(Step::Refill),
        8 => Just(Step::HostReady),
        1 => Just(Step::Tick),
    ]
}

/// The byte at a place of a stream, another for each pair and direction.
fn byte(pair: usize, to_host: bool, at: u64) -> u8 {
    let mixed = (at ^ (at >> 8)).wrapping_mul(31) + (pair as u64) * 7 + u64::from(to_host) * 101;
    mixed.to_le_bytes()[0]
}

fn bytes(pair: usize, to_host: bool, from: u64, count: usize) -> Vec<u8> {
    (from..).take(count).map(|at| byte(pair, to_host, at)).collect()
}

struct World {
    vsock: Vsock,
    pairs: Vec<Pair>,
    by_ports: BTreeMap<(u32, u32), usize>,
    /// Packets that found no buffer.
    waiting: VecDeque<(Header, Vec<u8>)>,
    next_guest_port: u32,
    buf_alloc: u32,
}

const LISTENED: u32 = 5000;

impl World {
    fn new(cut: Cut, buf_alloc: u32, buffer: u32) -> Self {
        let limits = VsockLimits { connections: 24, buffer, ..VsockLimits::default() };
        let mut vsock = Vsock::new(cut, limits);
        vsock.listen(LISTENED);
        Self {
            vsock,
            pairs: Vec::new(),
            by_ports: BTreeMap::new(),
            waiting: VecDeque::new(),
            next_guest_port: 1000,
            buf_alloc,
        }
    }

    fn send(&mut self, header: Header, data: &[u8]) {
        self.waiting.push_back((header, data.to_vec()));
        self.send_waiting();
    }

    fn send_waiting(&mut self) {
        while let Some((header, data)) = self.waiting.pop_front() {
            if !self.vsock.try_send(header, &data) {
                self.waiting.push_front((header, data));
                return;
            }
        }
    }

    fn send_of(&mut self, pair: usize, operation: u16, flags: u32) {
        if let Some(socket) = &self.pairs[pair].socket {
            let header = Header { flags, ..socket.packet(operation) };
            self.send(header, &[]);
        }
    }

    fn pair(&mut self, number: usize) -> Option<usize> {
        (!self.pairs.is_empty()).then(|| number % self.pairs.len())
    }

    fn act(&mut self, step: &Step) {
        match *step {
            Step::HostConnects => {
                self.next_guest_port += 1;
                let host = self.vsock.host(self.next_guest_port);
                // Known by the guest's port until the guest hears of it.
                self.by_ports.insert((0, self.next_guest_port), self.pairs.len());
                self.pairs.push(Pair::new(Some(host), None));
            }
            Step::GuestConnects => {
                self.next_guest_port += 1;
                let socket = Socket::new(LISTENED, self.next_guest_port, self.buf_alloc);
                self.by_ports.insert((LISTENED, self.next_guest_port), self.pairs.len());
                let request = socket.packet(op::REQUEST);
                self.pairs.push(Pair::new(None, Some(socket)));
                self.send(request, &[]);
            }
            Step::HostWrites(n, size) => self.host_writes(n, size),
            Step::HostReads(n, size) => {
                if let Some(pair) = self.pair(n) {
                    self.host_reads(pair, size);
                }
            }
            Step::GuestWrites(n, size) => self.guest_writes(n, size),
            Step::GuestReads(n, size) => {
                if let Some(pair) = self.pair(n) {
                    self.guest_reads(pair, size);
                }
            }
            Step::HostFinishes(n) => {
                let Some(pair) = self.pair(n) else { return };
                if let Some(host) =
                    self.pairs[pair].host.as_ref().filter(|_| self.pairs[pair].greeted)
                {
                    let _ = host.shutdown(Shutdown::Write);
                    self.pairs[pair].host_ended = true;
                }
            }
            Step::GuestFinishes(n) => {
                let Some(pair) = self.pair(n) else { return };
                self.guest_finishes(pair);
            }
            Step::HostCloses(n) => {
                let Some(pair) = self.pair(n) else { return };
                self.pairs[pair].host = None;
                self.pairs[pair].cut = true;
            }
            Step::GuestCloses(n) => {
                let Some(pair) = self.pair(n) else { return };
                self.guest_closes(pair);
            }
            Step::Refill(count) => self.vsock.give(count),
            Step::HostReady => self.vsock.guest.transport.host_ready(),
            Step::Tick => self.vsock.tick(1),
        }
        self.take_packets();
        self.take_incoming();
        self.send_waiting();
        assert!(!self.vsock.is_broken());
    }

    fn host_writes(&mut self, n: usize, size: usize) {
        let Some(pair) = self.pair(n) else { return };
        let state = &mut self.pairs[pair];
        let Some(host) = state.host.as_mut().filter(|_| !state.host_ended) else { return };
        match host.write(&bytes(pair, false, state.host_sent, size)) {
            Ok(count) => state.host_sent += count as u64,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            // Only one that the device never took, because it has as many as it may.
            Err(_) => assert!(state.cut || !state.greeted, "the host's stream broke"),
        }
    }

    fn host_reads(&mut self, pair: usize, size: usize) -> usize {
        let state = &mut self.pairs[pair];
        let Some(host) = &mut state.host else { return 0 };
        let (mut got, end) = read_some(host, if state.greeted { size } else { size.max(64) });
        if !state.greeted && !got.is_empty() {
            let line = got.iter().position(|byte| *byte == b'\n').expect("the line comes whole");
            assert!(got.starts_with(b"OK "));
            got.drain(..=line);
            state.greeted = true;
        }
        assert_eq!(got, bytes(pair, true, state.host_read, got.len()));
        state.host_read += got.len() as u64;
        state.saw_end |= end;
        got.len()
    }

    fn guest_writes(&mut self, n: usize, size: usize) {
        let Some(pair) = self.pair(n) else { return };
        let state = &mut self.pairs[pair];
        let Some(socket) = state.socket.as_mut().filter(|socket| {
            !socket.sent_end && !socket.reset && socket.host_flags & SHUTDOWN_RECEIVE == 0
        }) else {
            return;
        };
        let mut left = u32::try_from(size).unwrap().min(socket.credit());
        let mut packets = Vec::new();
        while left > 0 {
            let count = left.min(65_536);
            left -= count;
            let data = bytes(pair, true, state.guest_sent, usize::try_from(count).unwrap());
            socket.sent = socket.sent.wrapping_add(count);
            state.guest_sent += u64::from(count);
            packets.push((Header { len: count, ..socket.packet(op::RW) }, data));
        }
        for (header, data) in packets {
            self.send(header, &data);
        }
    }

    fn guest_reads(&mut self, pair: usize, size: usize) -> usize {
        let state = &mut self.pairs[pair];
        let Some(socket) = &mut state.socket else { return 0 };
        let mut got = 0;
        while let Some(data) = socket.queue.front()
            && got < size
        {
            assert_eq!(*data, bytes(pair, false, socket.received, data.len()));
            socket.received += data.len() as u64;
            got += data.len();
            socket.read = socket.read.wrapping_add(u32::try_from(data.len()).unwrap());
            socket.queue.pop_front();
        }
        if got > 0 && socket.queue.is_empty() && !socket.reset {
            self.send_of(pair, op::CREDIT_UPDATE, 0);
        }
        got
    }

    fn guest_finishes(&mut self, pair: usize) {
        if let Some(socket) = &mut self.pairs[pair].socket
            && !socket.sent_end
            && !socket.reset
            && socket.host_alloc > 0
        {
            socket.sent_end = true;
            self.send_of(pair, op::SHUTDOWN, SHUTDOWN_SEND);
        }
    }

    fn guest_closes(&mut self, pair: usize) {
        if let Some(socket) = &mut self.pairs[pair].socket
            && socket.host_alloc > 0
            && !socket.reset
        {
            socket.sent_end = true;
            self.send_of(pair, op::SHUTDOWN, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
            self.pairs[pair].cut = true;
        }
    }

    fn take_incoming(&mut self) {
        let incoming: Vec<_> = self.vsock.incoming.lock().unwrap().drain(..).collect();
        for (listener, stream) in incoming {
            assert_eq!(listener.port, LISTENED);
            let stream = UnixStream::from(stream);
            stream.set_nonblocking(true).unwrap();
            // In the order in which the guest asked.
            let pair = self
                .pairs
                .iter()
                .position(|pair| pair.host.is_none() && !pair.greeted && !pair.cut)
                .expect("nobody asked");
            self.pairs[pair].host = Some(stream);
            self.pairs[pair].greeted = true;
        }
    }

    fn take_packets(&mut self) {
        self.vsock.collect();
        while let Some((header, data)) = self.vsock.inbox.pop_front() {
            self.take(&header, data);
        }
    }

    fn take(&mut self, header: &Header, data: Vec<u8>) {
        let ports = (header.src_port, header.dst_port);
        if header.op == op::REQUEST {
            let pair = self.by_ports[&(0, header.dst_port)];
            let mut socket = Socket::new(ports.0, ports.1, self.buf_alloc);
            socket.host_alloc = header.buf_alloc;
            let response = Header { buf_alloc: self.buf_alloc, ..answer(header, op::RESPONSE) };
            self.by_ports.insert(ports, pair);
            self.pairs[pair].socket = Some(socket);
            return self.send(response, &[]);
        }
        let pair = self.by_ports[&ports];
        let state = &mut self.pairs[pair];
        let socket = state.socket.as_mut().unwrap();
        if header.op != op::RST {
            socket.host_alloc = header.buf_alloc;
            socket.host_forwarded = header.fwd_cnt;
        }
        match header.op {
            op::RW => {
                socket.queue.push_back(data);
                assert!(socket.holds(), "the device overran the guest");
                assert_eq!(socket.host_flags & SHUTDOWN_SEND, 0, "data after the end");
            }
            op::RST => {
                assert!(state.cut || state.host.is_none(), "reset without reason");
                socket.reset = true;
            }
            op::SHUTDOWN => {
                socket.host_flags |= header.flags;
                if socket.host_flags == SHUTDOWN_SEND | SHUTDOWN_RECEIVE && socket.queue.is_empty()
                {
                    socket.reset = true;
                    self.send_of(pair, op::RST, 0);
                }
            }
            op::CREDIT_REQUEST => self.send_of(pair, op::CREDIT_UPDATE, 0),
            op::RESPONSE | op::CREDIT_UPDATE => {}
            other => panic!("operation {other}"),
        }
    }

    /// Lets everything flow until nothing does.
    fn drain(&mut self) {
        let mut quiet = 0;
        while quiet < 3 {
            self.vsock.refill();
            self.vsock.guest.settle(10_000);
            self.take_packets();
            self.take_incoming();
            self.send_waiting();
            let mut moved = 0;
            for pair in 0..self.pairs.len() {
                moved += self.host_reads(pair, usize::MAX) + self.guest_reads(pair, usize::MAX);
            }
            self.vsock.tick(1);
            quiet = if moved == 0 { quiet + 1 } else { 0 };
        }
    }

    fn check(&mut self) {
        for pair in 0..self.pairs.len() {
            let state = &self.pairs[pair];
            if state.cut || !state.greeted {
                continue;
            }
            let socket = state.socket.as_ref().unwrap();
            assert_eq!(socket.received, state.host_sent, "pair {pair}: to the guest");
            assert_eq!(state.host_read, state.guest_sent, "pair {pair}: to the host");
            assert_eq!(state.saw_end, socket.sent_end, "pair {pair}: the guest's end");
            let told = socket.host_flags & SHUTDOWN_SEND != 0;
            assert_eq!(told, state.host_ended, "pair {pair}: the host's end");
        }
        for pair in 0..self.pairs.len() {
            self.pairs[pair].host = None;
            self.pairs[pair].cut = true;
            self.guest_closes(pair);
        }
        self.drain();
        assert_eq!(self.vsock.device().streams(), 0, "nothing is left");
    }
}

impl Pair {
    fn new(host: Option<UnixStream>, socket: Option<Socket>) -> Self {
        Self {
            host,
            greeted: false,
            socket,
            host_sent: 0,
            host_read: 0,
            host_ended: false,
            guest_sent: 0,
            saw_end: false,
            cut: false,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn every_byte_arrives_once_and_every_end_is_seen(
        cut in prop_oneof![Just(Cut::One), Just(Cut::Two), Just(Cut::Pages), Just(Cut::Odd)],
        buf_alloc in prop_oneof![Just(256u32 << 10), 8192u32..100_000],
        buffer in prop_oneof![Just(256u32 << 10), 1024u32..100_000],
        steps in proptest::collection::vec(step(), 1..250),
    ) {
        let mut world = World::new(cut, buf_alloc, buffer);
        for step in &steps {
            world.act(step);
        }
        world.drain();
        world.check();
    }
}
