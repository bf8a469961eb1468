//! [`Connection`]: one stream between the guest and the host.

use super::{
    credit::{Account, Window},
    packet::{HOST_CID, Header, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op},
    poll::Poll,
};
use crate::{
    device::Memory,
    queue::{QueueError, Segments},
};
use rustix::{
    event::epoll::EventFlags,
    io::Errno,
    net::{SendFlags, send},
};
use std::{
    collections::VecDeque,
    io::ErrorKind,
    net::Shutdown,
    os::{fd::AsFd, unix::net::UnixStream},
};
use vm_memory::{GuestMemory, Permissions, ReadVolatile, VolatileMemoryError};

/// The two ends' ports, by which a connection is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

/// The most bytes of one packet to the guest; Linux's drivers have no larger buffers.
pub(super) const MAX_DATA: u32 = 64 << 10;

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The host wants the guest to accept; `asked` once the guest was told.
    Requesting { asked: bool },
    /// Bytes flow.
    Open,
    /// The guest was told that neither direction is used any more.
    Closing,
    /// The guest uses neither direction any more; what it sent still goes to the host, and then the guest hears of it
    /// where it `waits`.
    Draining { waits: bool },
}

/// What becomes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It goes on.
    Keep,
    /// It goes on without the guest, which has forgotten it.
    Orphan,
    /// It ends, and the guest knows or never heard of it.
    Drop,
    /// It ends with a reset for the guest.
    Reset,
}

/// A packet for the guest, or why there is none.
#[derive(Debug)]
pub(super) enum Next {
    /// This one; its data is in the guest's memory.
    Packet(Header),
    /// There is none now.
    Nothing,
    /// The host's stream failed.
    Failed,
}

/// What a connection has for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    Request,
    Response,
    Data,
    Shutdown(u32),
    CreditUpdate,
    CreditRequest,
}

/// One stream between the guest and the host.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    token: u64,
    pub(super) ports: Ports,
    guest_cid: u64,
    phase: Phase,
    /// The tick at which it has waited long enough.
    pub(super) deadline: Option<u64>,
    /// Whether it stands in the row of those that have something for the guest.
    pub(super) queued: bool,
    window: Window,
    account: Account,
    /// What the guest sent and the host's stream had no room for.
    buffer: VecDeque<u8>,
    /// Whether the poll tells when the stream has room again.
    awaits_room: bool,
    /// Whether the stream may have something to read.
    readable: bool,
    /// Whether reading failed, which the stream says only once.
    failed: bool,
    /// Nothing more comes from the host.
    host_finished: bool,
    /// The host takes nothing more.
    host_deaf: bool,
    guest_finished: bool,
    guest_deaf: bool,
    /// Whether the host was told that the guest finished.
    told_host: bool,
    /// What the guest was told of the end, as flags.
    told: u32,
    owes_response: bool,
    owes_update: bool,
    /// Whether the guest was asked for credit since it last gave some.
    asked_credit: bool,
}

impl Connection {
    /// Begins one that the host asked for.
    pub(super) fn requested(
        stream: UnixStream,
        token: u64,
        ports: Ports,
        guest_cid: u64,
        buf_alloc: u32,
        deadline: u64,
    ) -> Self {
        Self {
            stream,
            token,
            ports,
            guest_cid,
            phase: Phase::Requesting { asked: false },
            deadline: Some(deadline),
            queued: false,
            window: Window::new(0),
            account: Account::new(buf_alloc),
            buffer: VecDeque::new(),
            awaits_room: false,
            readable: true,
            failed: false,
            host_finished: false,
            host_deaf: false,
            guest_finished: false,
            guest_deaf: false,
            told_host: false,
            told: 0,
            owes_response: false,
            owes_update: false,
            asked_credit: false,
        }
    }

    /// Begins one that the guest asked for with `request`, and that the host took.
    pub(super) fn accepted(
        stream: UnixStream,
        token: u64,
        ports: Ports,
        guest_cid: u64,
        buf_alloc: u32,
        request: &Header,
    ) -> Self {
        Self {
            phase: Phase::Open,
            deadline: None,
            window: Window::new(request.buf_alloc),
            owes_response: true,
            ..Self::requested(stream, token, ports, guest_cid, buf_alloc, 0)
        }
    }

    /// Gives the bytes that the guest was promised to have stored.
    pub(super) fn promised(&self) -> u32 {
        self.account.buf_alloc()
    }

    /// Gives the host's stream.
    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Says whether the guest knows of it.
    pub(super) fn is_known_to_guest(&self) -> bool {
        !matches!(self.phase, Phase::Requesting { asked: false } | Phase::Draining { waits: false })
    }

    /// Says whether it has something for the guest.
    pub(super) fn has_work(&self) -> bool {
        self.work().is_some()
    }

    /// Says whether it waits for the guest to make room.
    pub(super) fn is_stalled(&self) -> bool {
        self.phase == Phase::Open && self.readable && !self.host_finished && self.window.room() == 0
    }

    /// Asks the guest for credit once more, where it waits for it.
    pub(super) fn ask_again(&mut self) {
        self.asked_credit = false;
    }

    /// Makes the next packet for the guest; data goes straight from the stream into `room`.
    ///
    /// # Errors
    /// When guest memory cannot be written.
    pub(super) fn next(&mut self, memory: &Memory, room: &Segments) -> Result<Next, QueueError> {
        loop {
            let (operation, len, flags) = match self.work() {
                None => return Ok(Next::Nothing),
                Some(Work::Request) => {
                    self.phase = Phase::Requesting { asked: true };
                    (op::REQUEST, 0, 0)
                }
                Some(Work::Response) => {
                    self.owes_response = false;
                    (op::RESPONSE, 0, 0)
                }
                Some(Work::Data) => match self.read(memory, room)? {
                    Read::Bytes(count) => {
                        self.window.sent(count);
                        (op::RW, count, 0)
                    }
                    Read::Later => {
                        self.readable = false;
                        continue;
                    }
                    Read::End => {
                        self.host_finished = true;
                        continue;
                    }
                    Read::Failed => return Ok(Next::Failed),
                },
                Some(Work::Shutdown(flags)) => {
                    self.told = flags;
                    (op::SHUTDOWN, 0, flags)
                }
                Some(Work::CreditUpdate) => (op::CREDIT_UPDATE, 0, 0),
                Some(Work::CreditRequest) => {
                    self.asked_credit = true;
                    (op::CREDIT_REQUEST, 0, 0)
                }
            };
            self.owes_update = false;
            return Ok(Next::Packet(Header {
                src_cid: HOST_CID,
                dst_cid: self.guest_cid,
                src_port: self.ports.host,
                dst_port: self.ports.guest,
                len,
                kind: TYPE_STREAM,
                op: operation,
                flags,
                buf_alloc: self.account.buf_alloc(),
                fwd_cnt: self.account.tell(),
            }));
        }
    }

    /// Begins to wait for the guest's answer to the end of both directions, until `deadline`; false where it does not
    /// wait for one.
    pub(super) fn close_by(&mut self, deadline: u64) -> bool {
        let ended = self.phase == Phase::Open && self.told == SHUTDOWN_RECEIVE | SHUTDOWN_SEND;
        if ended {
            self.phase = Phase::Closing;
            self.deadline = Some(deadline);
        }
        ended
    }

    /// Takes a packet of the guest's other than a request. `data` is what stands behind the header; `scratch` is a place
    /// to copy it to.
    ///
    /// # Errors
    /// When guest memory cannot be read.
    pub(super) fn take(
        &mut self,
        header: &Header,
        memory: &Memory,
        data: Segments,
        scratch: &mut [u8],
        poll: &Poll,
    ) -> Result<Fate, QueueError> {
        self.window.update(header.buf_alloc, header.fwd_cnt);
        if self.window.room() > 0 {
            self.asked_credit = false;
        }
        Ok(match header.op {
            op::RST => self.guest_reset(),
            op::RESPONSE => self.response(),
            op::SHUTDOWN => self.shutdown(header.flags),
            op::RW => return self.data(header.len, memory, data, scratch, poll),
            op::CREDIT_UPDATE if self.is_open() => Fate::Keep,
            op::CREDIT_REQUEST if self.is_open() => {
                self.owes_update = true;
                Fate::Keep
            }
            _ => Fate::Reset,
        })
    }

    /// Does what the poll announced of the stream.
    pub(super) fn host_event(&mut self, flags: EventFlags, poll: &Poll) -> Fate {
        if flags.intersects(EventFlags::HUP | EventFlags::ERR) {
            if matches!(self.phase, Phase::Requesting { .. }) {
                return self.end();
            }
            // Both directions are shut, whoever did it; what the host sent before can still be read.
            self.host_deaf();
        }
        self.readable = true;
        if flags.contains(EventFlags::OUT) { self.flush(poll) } else { self.after_flush() }
    }

    /// Ends it: with a reset where the guest knows of it.
    pub(super) fn end(&self) -> Fate {
        if self.is_known_to_guest() { Fate::Reset } else { Fate::Drop }
    }

    fn is_open(&self) -> bool {
        matches!(self.phase, Phase::Open | Phase::Closing)
    }

    fn work(&self) -> Option<Work> {
        match self.phase {
            Phase::Requesting { asked: false } => return Some(Work::Request),
            Phase::Requesting { asked: true } | Phase::Draining { .. } => return None,
            Phase::Open | Phase::Closing => {}
        }
        if self.owes_response {
            return Some(Work::Response);
        }
        if self.readable && !self.host_finished && self.window.room() > 0 {
            return Some(Work::Data);
        }
        let ended = if self.host_finished { SHUTDOWN_SEND } else { 0 }
            | if self.host_deaf { SHUTDOWN_RECEIVE } else { 0 };
        if ended != self.told {
            return Some(Work::Shutdown(ended));
        }
        if self.owes_update || self.account.is_due() {
            return Some(Work::CreditUpdate);
        }
        (self.is_stalled() && !self.asked_credit).then_some(Work::CreditRequest)
    }

    fn read(&mut self, memory: &Memory, room: &Segments) -> Result<Read, QueueError> {
        if self.failed {
            return Ok(Read::Failed);
        }
        let mut left = room.len().min(self.window.room()).min(MAX_DATA);
        let mut read = 0;
        for part in room.parts() {
            let length = usize::try_from(part.length.min(left)).unwrap_or(0);
            for slice in memory.get_slices(part.address, length, Permissions::Write)? {
                let mut slice = slice?;
                let count = match read_some(&self.stream, &mut slice) {
                    Read::Bytes(count) => count,
                    // What was read goes first; the same is seen again afterwards.
                    other if read > 0 => {
                        self.failed = matches!(other, Read::Failed);
                        return Ok(Read::Bytes(read));
                    }
                    other => return Ok(other),
                };
                read += count;
                left -= count;
                if usize::try_from(count).is_ok_and(|count| count < slice.len()) || left == 0 {
                    return Ok(Read::Bytes(read));
                }
            }
        }
        Ok(if read > 0 { Read::Bytes(read) } else { Read::Later })
    }

    fn guest_reset(&self) -> Fate {
        // Linux resets what its peer did not answer for 8 s; what it had sent before it finished is still the host's.
        if self.guest_finished && !self.buffer.is_empty() { Fate::Orphan } else { Fate::Drop }
    }

    /// Goes on without the guest until the host has what the guest sent.
    pub(super) fn orphan(&mut self) {
        self.phase = Phase::Draining { waits: false };
        self.deadline = None;
    }

    fn response(&mut self) -> Fate {
        if self.phase != (Phase::Requesting { asked: true }) {
            return self.end();
        }
        let line = format!("OK {}\n", self.ports.host);
        // The stream is fresh: it has room for a line, or its host made it useless.
        match send_some(&self.stream, line.as_bytes()) {
            Sent::Bytes(count) if count == line.len() => {
                self.phase = Phase::Open;
                self.deadline = None;
                Fate::Keep
            }
            _ => Fate::Reset,
        }
    }

    fn shutdown(&mut self, flags: u32) -> Fate {
        match self.phase {
            Phase::Requesting { .. } => return Fate::Reset,
            Phase::Draining { .. } => return Fate::Keep,
            Phase::Open | Phase::Closing => {}
        }
        if flags & SHUTDOWN_RECEIVE != 0 && !self.guest_deaf {
            self.guest_deaf = true;
            self.host_finished = true;
            // It fails only where the host is gone.
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        if flags & SHUTDOWN_SEND != 0 {
            self.guest_finished = true;
        }
        if self.guest_deaf && self.guest_finished {
            self.phase = Phase::Draining { waits: true };
            self.deadline = None;
        }
        self.after_flush()
    }

    fn data(
        &mut self,
        length: u32,
        memory: &Memory,
        mut data: Segments,
        scratch: &mut [u8],
        poll: &Poll,
    ) -> Result<Fate, QueueError> {
        let too_much = length > data.len() || !self.account.receive(length);
        if !self.is_open() || self.guest_finished || too_much {
            return Ok(Fate::Reset);
        }
        let mut left = length;
        while left > 0 {
            if self.host_deaf {
                self.account.forward(left);
                return Ok(Fate::Keep);
            }
            let piece = left.min(u32::try_from(scratch.len()).unwrap_or(u32::MAX));
            let bytes = &mut scratch[..usize::try_from(piece).unwrap_or(0)];
            data.read(memory, bytes)?;
            data = data.split_off(piece);
            left -= piece;
            if self.deliver(bytes, poll) == Fate::Reset {
                return Ok(Fate::Reset);
            }
        }
        Ok(Fate::Keep)
    }

    /// Sends bytes to the host; what its stream has no room for is stored.
    fn deliver(&mut self, bytes: &[u8], poll: &Poll) -> Fate {
        let mut rest = bytes;
        while self.buffer.is_empty() && !rest.is_empty() {
            match send_some(&self.stream, rest) {
                Sent::Bytes(count) => {
                    self.forward(count);
                    rest = &rest[count..];
                }
                Sent::Later => break,
                Sent::Deaf => {
                    self.forward(rest.len());
                    self.host_deaf();
                    return Fate::Keep;
                }
                Sent::Failed => return Fate::Reset,
            }
        }
        if rest.is_empty() {
            return Fate::Keep;
        }
        self.store(rest);
        self.await_room(true, poll)
    }

    fn store(&mut self, bytes: &[u8]) {
        let needed = self.buffer.len() + bytes.len();
        if needed > self.buffer.capacity() {
            // Doubles, but never beyond what the guest may send.
            let limit = usize::try_from(self.account.buf_alloc()).unwrap_or(usize::MAX);
            let wanted = (self.buffer.capacity() * 2).min(limit).max(needed);
            self.buffer.reserve_exact(wanted - self.buffer.len());
        }
        self.buffer.extend(bytes);
    }

    /// Sends what is stored, as far as the stream has room.
    fn flush(&mut self, poll: &Poll) -> Fate {
        while !self.buffer.is_empty() {
            match send_some(&self.stream, self.buffer.as_slices().0) {
                Sent::Bytes(count) => {
                    self.forward(count);
                    self.buffer.drain(..count);
                }
                Sent::Later => return Fate::Keep,
                Sent::Deaf => self.host_deaf(),
                Sent::Failed => return self.end(),
            }
        }
        self.buffer = VecDeque::new();
        match self.await_room(false, poll) {
            Fate::Keep => self.after_flush(),
            other => other,
        }
    }

    /// Ends the stream's direction to the host once the guest finished and all it sent is there.
    fn after_flush(&mut self) -> Fate {
        if !self.guest_finished || !self.buffer.is_empty() {
            return Fate::Keep;
        }
        if let Phase::Draining { .. } = self.phase {
            return self.end();
        }
        // Once only: each time raises an event.
        if !self.told_host {
            self.told_host = true;
            // It fails only where the host is gone.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        Fate::Keep
    }

    /// Notes that the host takes nothing more; what it would have got is gone.
    fn host_deaf(&mut self) {
        self.host_deaf = true;
        self.forward(self.buffer.len());
        self.buffer = VecDeque::new();
    }

    fn forward(&mut self, bytes: usize) {
        // Never more than was received, which is counted in 32 bits.
        self.account.forward(u32::try_from(bytes).unwrap_or(u32::MAX));
    }

    fn await_room(&mut self, on: bool, poll: &Poll) -> Fate {
        if self.awaits_room != on {
            self.awaits_room = on;
            if poll.change(&self.stream, self.token, on).is_err() {
                return self.end();
            }
        }
        Fate::Keep
    }
}

/// What reading a stream gave.
#[derive(Debug)]
enum Read {
    Bytes(u32),
    Later,
    End,
    Failed,
}

fn read_some(
    stream: &UnixStream,
    slice: &mut vm_memory::VolatileSlice<'_, impl vm_memory::bitmap::BitmapSlice>,
) -> Read {
    loop {
        return match stream.as_fd().read_volatile(slice) {
            Ok(0) => Read::End,
            Ok(count) => Read::Bytes(u32::try_from(count).unwrap_or(u32::MAX)),
            Err(VolatileMemoryError::IOError(error)) => match error.kind() {
                ErrorKind::WouldBlock => Read::Later,
                ErrorKind::Interrupted => continue,
                _ => Read::Failed,
            },
            Err(_) => Read::Failed,
        };
    }
}

/// What writing to a stream gave.
#[derive(Debug)]
enum Sent {
    Bytes(usize),
    Later,
    /// The host does not read any more.
    Deaf,
    Failed,
}

fn send_some(stream: &UnixStream, bytes: &[u8]) -> Sent {
    loop {
        return match send(stream, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(0) | Err(Errno::AGAIN) => Sent::Later,
            Ok(count) => Sent::Bytes(count),
            Err(Errno::INTR) => continue,
            Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => Sent::Deaf,
            Err(_) => Sent::Failed,
        };
    }
}
