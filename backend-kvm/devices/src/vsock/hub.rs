//! [`Hub`]: all connections of one device, whatever its queues do.

use super::{
    Incoming, Listener, VsockLimits,
    connection::{Connection, Fate, Next, Ports},
    greeting::{Greeting, Said},
    packet::{HOST_CID, Header, TYPE_STREAM, op},
    poll::{FIRST_TOKEN, Found, Poll, TICK},
};
use crate::{
    device::Memory,
    queue::{QueueError, Segments},
};
use rustix::{
    event::epoll::EventFlags,
    net::{AddressFamily, SocketType, sockopt},
};
use std::{
    collections::{BTreeMap, VecDeque},
    fmt, io,
    os::{fd::OwnedFd, unix::net::UnixStream},
};

/// What listens on a port of the host.
#[derive(Debug)]
struct Listening {
    number: u64,
    backlog: u32,
    /// Streams that were handed over and that the owner has not taken yet.
    waiting: u32,
}

/// All connections of one device.
pub(super) struct Hub {
    guest_cid: u64,
    incoming: Incoming,
    limits: VsockLimits,
    poll: Poll,
    /// By the host's port.
    listening: BTreeMap<u32, Listening>,
    next_port: u32,
    next_token: u64,
    greetings: BTreeMap<u64, Greeting>,
    connections: BTreeMap<u64, Connection>,
    by_ports: BTreeMap<Ports, u64>,
    /// Resets for the guest, with the packet type that each answers.
    resets: BTreeMap<Ports, u16>,
    /// Those that have something for the guest, each once, in the order of their turns.
    row: VecDeque<u64>,
    /// Whether the last packet was a reset, so that the next is not while a connection waits.
    reset_last: bool,
    /// Bytes that all connections together may have to store.
    promised: u64,
    ticks: u64,
    found: Vec<Found>,
    /// Where a packet's data is gathered for the host.
    scratch: Vec<u8>,
}

impl Hub {
    /// Makes one without connections.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub(super) fn new(guest_cid: u64, incoming: Incoming, limits: VsockLimits) -> io::Result<Self> {
        Ok(Self {
            guest_cid,
            incoming,
            limits,
            poll: Poll::new()?,
            listening: BTreeMap::new(),
            next_port: FIRST_PORT,
            next_token: FIRST_TOKEN,
            greetings: BTreeMap::new(),
            connections: BTreeMap::new(),
            by_ports: BTreeMap::new(),
            resets: BTreeMap::new(),
            row: VecDeque::new(),
            reset_last: false,
            promised: 0,
            ticks: 0,
            found: Vec::new(),
            scratch: Vec::new(),
        })
    }

    pub(super) fn guest_cid(&self) -> u64 {
        self.guest_cid
    }

    pub(super) fn poll(&self) -> &Poll {
        &self.poll
    }

    pub(super) fn listen(&mut self, listener: Listener, backlog: u32) {
        let listening = Listening { number: listener.number, backlog, waiting: 0 };
        self.listening.insert(listener.port, listening);
    }

    pub(super) fn taken(&mut self, listener: Listener, streams: u32) {
        if let Some(listening) = self.listening.get_mut(&listener.port)
            && listening.number == listener.number
        {
            listening.waiting = listening.waiting.saturating_sub(streams);
        }
    }

    pub(super) fn unlisten(&mut self, port: u32) {
        self.listening.remove(&port);
    }

    pub(super) fn next_port(&self) -> u32 {
        self.next_port
    }

    /// Continues to give out ports at `port`, as far as that is one to be given out.
    pub(super) fn set_next_port(&mut self, port: u32) {
        self.next_port = if (FIRST_PORT..u32::MAX).contains(&port) { port } else { FIRST_PORT };
    }

    /// Gives the number of streams of all kinds.
    pub(super) fn streams(&self) -> usize {
        self.connections.len() + self.greetings.len()
    }

    /// Ends everything without a word to the guest. Listeners stay, and so does what waits at them: the owner has it.
    pub(super) fn clear(&mut self) {
        for connection in self.connections.values() {
            self.poll.remove(connection.stream());
        }
        for greeting in self.greetings.values() {
            self.poll.remove(&greeting.stream);
        }
        self.greetings = BTreeMap::new();
        self.connections = BTreeMap::new();
        self.by_ports = BTreeMap::new();
        self.resets = BTreeMap::new();
        self.row = VecDeque::new();
        self.promised = 0;
        self.scratch = Vec::new();
        self.poll.rest();
    }

    /// Takes a host's stream, which says where it wants to go; closes it where that cannot be.
    pub(super) fn greet(&mut self, stream: OwnedFd) {
        let is_stream = sockopt::socket_type(&stream) == Ok(SocketType::STREAM)
            && sockopt::socket_domain(&stream) == Ok(AddressFamily::UNIX);
        if !is_stream || self.is_full() {
            return;
        }
        let stream = UnixStream::from(stream);
        let token = self.take_token();
        if stream.set_nonblocking(true).is_err() || self.poll.add(&stream, token).is_err() {
            return;
        }
        self.greetings.insert(token, Greeting::new(stream, self.deadline()));
        self.poll.tick(true);
    }

    /// Does some of what the poll announces.
    pub(super) fn host_ready(&mut self) {
        let mut found = std::mem::take(&mut self.found);
        self.poll.wait(&mut found);
        for found in found.drain(..) {
            match found {
                Found::Tick => self.tick(),
                Found::Stream(token, flags) => self.stream_event(token, flags),
            }
        }
        self.found = found;
    }

    /// Counts a tick, and ends what has waited too long.
    pub(super) fn tick(&mut self) {
        self.ticks += 1;
        let now = self.ticks;
        let late = |deadline: u64| deadline <= now;
        let greetings: Vec<u64> =
            self.greetings.iter().filter(|(_, g)| late(g.deadline)).map(|(t, _)| *t).collect();
        for token in greetings {
            self.end_greeting(token);
        }
        let mut ended = Vec::new();
        let mut stalled = Vec::new();
        for (token, connection) in &mut self.connections {
            if connection.deadline.is_some_and(late) {
                ended.push(*token);
            } else if connection.is_stalled() {
                connection.ask_again();
                stalled.push(*token);
            }
        }
        for token in ended {
            let fate = self.connections[&token].end();
            self.settle(token, fate);
        }
        let waits = !stalled.is_empty()
            || !self.greetings.is_empty()
            || self.connections.values().any(|connection| connection.deadline.is_some());
        self.poll.tick(waits);
        for token in stalled {
            self.settle(token, Fate::Keep);
        }
    }

    /// Says whether there is something for the guest.
    pub(super) fn has_work(&self) -> bool {
        !self.row.is_empty() || !self.resets.is_empty()
    }

    /// Says whether the guest must take some of its resets before it is listened to.
    pub(super) fn is_clogged(&self) -> bool {
        self.resets.len() >= self.limits.connections.max(1)
    }

    /// Makes the next packet for the guest; data goes straight into `room`. `None` where there is nothing.
    ///
    /// # Errors
    /// When guest memory cannot be written.
    pub(super) fn next(
        &mut self,
        memory: &Memory,
        room: &Segments,
    ) -> Result<Option<Header>, QueueError> {
        loop {
            let reset_now = !self.reset_last || self.row.is_empty();
            if let Some((ports, kind)) = reset_now.then(|| self.resets.pop_first()).flatten() {
                self.reset_last = true;
                return Ok(Some(self.reset_header(ports, kind)));
            }
            self.reset_last = false;
            let Some(token) = self.row.pop_front() else {
                return Ok(None);
            };
            let Some(connection) = self.connections.get_mut(&token) else {
                continue;
            };
            connection.queued = false;
            match connection.next(memory, room)? {
                Next::Packet(header) => {
                    self.settle(token, Fate::Keep);
                    return Ok(Some(header));
                }
                Next::Nothing => self.settle(token, Fate::Keep),
                Next::Failed => self.settle(token, Fate::Reset),
            }
        }
    }

    /// Takes a packet of the guest's with what stands behind its header.
    ///
    /// # Errors
    /// When guest memory cannot be read.
    pub(super) fn take(
        &mut self,
        header: &Header,
        memory: &Memory,
        data: Segments,
    ) -> Result<(), QueueError> {
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            return Ok(());
        }
        let ports = Ports { host: header.dst_port, guest: header.src_port };
        if header.kind != TYPE_STREAM {
            if header.op != op::RST {
                self.resets.insert(ports, header.kind);
            }
            return Ok(());
        }
        match (self.by_ports.get(&ports).copied(), header.op) {
            (Some(token), op::REQUEST) => self.settle(token, Fate::Reset),
            (Some(token), _) => {
                if self.scratch.is_empty() {
                    // Fresh memory takes room only where it is written.
                    self.scratch = vec![0; SCRATCH];
                }
                if let Some(connection) = self.connections.get_mut(&token) {
                    let fate =
                        connection.take(header, memory, data, &mut self.scratch, &self.poll)?;
                    self.settle(token, fate);
                }
            }
            (None, op::REQUEST) => self.accept(ports, header),
            (None, op::RST) => {
                self.resets.remove(&ports);
            }
            (None, _) => {
                self.resets.insert(ports, TYPE_STREAM);
            }
        }
        Ok(())
    }

    fn accept(&mut self, ports: Ports, request: &Header) {
        // A guest that asks anew has given up what it had there.
        self.resets.remove(&ports);
        if self.try_accept(ports, request).is_none() {
            self.resets.insert(ports, TYPE_STREAM);
        }
    }

    fn try_accept(&mut self, ports: Ports, request: &Header) -> Option<()> {
        let listening = self.listening.get(&ports.host)?;
        if listening.waiting >= listening.backlog || self.is_full() {
            return None;
        }
        let listener = Listener { port: ports.host, number: listening.number };
        let (ours, hosts) = UnixStream::pair().ok()?;
        ours.set_nonblocking(true).ok()?;
        let token = self.take_token();
        self.poll.add(&ours, token).ok()?;
        if !(self.incoming)(listener, hosts.into()) {
            self.poll.remove(&ours);
            return None;
        }
        if let Some(listening) = self.listening.get_mut(&ports.host) {
            listening.waiting += 1;
        }
        let buf_alloc = self.promise();
        self.by_ports.insert(ports, token);
        self.connections.insert(
            token,
            Connection::accepted(ours, token, ports, self.guest_cid, buf_alloc, request),
        );
        self.settle(token, Fate::Keep);
        Some(())
    }

    fn stream_event(&mut self, token: u64, flags: EventFlags) {
        if let Some(greeting) = self.greetings.get_mut(&token) {
            match greeting.read() {
                Said::Part => return,
                Said::Nonsense => return self.end_greeting(token),
                Said::Port(port) => self.request(token, port),
            }
        }
        // Unknown where the stream ended after its event was noted.
        if let Some(connection) = self.connections.get_mut(&token) {
            let fate = connection.host_event(flags, &self.poll);
            self.settle(token, fate);
        }
    }

    /// Asks the guest for what a host said that it wants.
    fn request(&mut self, token: u64, port: u32) {
        let Some(greeting) = self.greetings.remove(&token) else {
            return;
        };
        let ports = Ports { host: self.take_port(), guest: port };
        let buf_alloc = self.promise();
        let deadline = self.deadline();
        self.by_ports.insert(ports, token);
        self.connections.insert(
            token,
            Connection::requested(
                greeting.stream,
                token,
                ports,
                self.guest_cid,
                buf_alloc,
                deadline,
            ),
        );
    }

    fn end_greeting(&mut self, token: u64) {
        if let Some(greeting) = self.greetings.remove(&token) {
            self.poll.remove(&greeting.stream);
        }
    }

    /// Does with a connection what it came to.
    fn settle(&mut self, token: u64, fate: Fate) {
        let deadline = self.deadline();
        let Some(connection) = self.connections.get_mut(&token) else {
            return;
        };
        match fate {
            Fate::Keep => {
                connection.close_by(deadline);
                if connection.deadline.is_some() || connection.is_stalled() {
                    self.poll.tick(true);
                }
                if connection.has_work() && !connection.queued {
                    connection.queued = true;
                    self.row.push_back(token);
                }
            }
            Fate::Orphan => {
                connection.orphan();
                self.by_ports.remove(&connection.ports);
            }
            Fate::Drop | Fate::Reset => {
                self.poll.remove(connection.stream());
                self.promised -= u64::from(connection.promised());
                let ports = connection.ports;
                self.connections.remove(&token);
                // An orphan's ports may be another's by now.
                if self.by_ports.get(&ports) == Some(&token) {
                    self.by_ports.remove(&ports);
                    if fate == Fate::Reset {
                        self.resets.insert(ports, TYPE_STREAM);
                    }
                }
            }
        }
    }

    fn reset_header(&self, ports: Ports, kind: u16) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: ports.host,
            dst_port: ports.guest,
            kind,
            op: op::RST,
            ..Header::default()
        }
    }

    /// Says whether no further stream is taken. Resets count, so that their number has a bound too.
    fn is_full(&self) -> bool {
        self.streams() + self.resets.len() >= self.limits.connections
    }

    /// Promises the guest room for a new connection: less where many have some already.
    fn promise(&mut self) -> u32 {
        let full = u64::from(self.limits.buffer);
        let promise = if self.promised + full <= self.limits.all_buffers {
            self.limits.buffer
        } else {
            self.limits.buffer.min(SMALL_BUFFER)
        };
        self.promised += u64::from(promise);
        promise
    }

    fn deadline(&self) -> u64 {
        let ticks = self.limits.timeout.as_millis().div_ceil(TICK.as_millis());
        self.ticks.saturating_add(u64::try_from(ticks).unwrap_or(u64::MAX)).saturating_add(1)
    }

    fn take_token(&mut self) -> u64 {
        let token = self.next_token;
        self.next_token += 1;
        token
    }

    /// Gives a port that no connection has. There are far more than connections.
    fn take_port(&mut self) -> u32 {
        loop {
            let port = self.next_port;
            self.next_port = if port + 1 < u32::MAX { port + 1 } else { FIRST_PORT };
            let all = Ports { host: port, guest: 0 }..=Ports { host: port, guest: u32::MAX };
            let taken = self.by_ports.range(all.clone()).next().is_some()
                || self.resets.range(all).next().is_some()
                || self.listening.contains_key(&port);
            if !taken {
                return port;
            }
        }
    }
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hub")
            .field("guest_cid", &self.guest_cid)
            .field("listening", &self.listening)
            .field("streams", &self.streams())
            .field("resets", &self.resets.len())
            .finish_non_exhaustive()
    }
}

/// The first port for a host that connects.
pub(super) const FIRST_PORT: u32 = 1 << 30;

/// What a connection may store when all together may already store much, in bytes.
const SMALL_BUFFER: u32 = 16 << 10;

/// How much of a packet is copied at once, in bytes.
const SCRATCH: usize = 64 << 10;
