//! The two directions of a channel: [`Outflow`] keeps output until the host has consumed it, [`Intake`] counts input.

use super::Violation;
use bytes::{Buf, BytesMut};
use serde::{Deserialize, Serialize};
use vm_guest_protocol::{Channel, DEFAULT_WINDOW, Frame, MAX_DATA, StreamId, encode, encode_data};
use vm_planted_bugs::{Bug, planted};

/// No stream adds data to a connection's outgoing bytes once there are this many.
pub(super) const OUTGOING_BOUND: usize = 1 << 20;

/// Output on its way to the host.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Outflow {
    /// The bytes from `start` on.
    kept: BytesMut,
    /// Offset of the oldest byte that is kept. With a reader: how far it has consumed.
    start: u64,
    /// Offset of the next byte to be sent.
    sent: u64,
    /// No byte from here on may be sent.
    limit: u64,
    /// Nothing is added any more.
    ended: bool,
    /// `Eof` waits for the end of the process, to travel with it.
    eof_held: bool,
    /// `Eof` was sent on this connection.
    eof_sent: bool,
    /// The connection was lost and the host has not said where to go on.
    awaiting: bool,
}

impl Outflow {
    /// Makes an empty channel with a reader.
    pub(super) fn new() -> Self {
        Self { limit: u64::from(DEFAULT_WINDOW), ..Self::default() }
    }

    /// Offset of the oldest byte that is kept.
    pub(super) fn start(&self) -> u64 {
        self.start
    }

    fn end(&self) -> u64 {
        self.start + self.kept.len() as u64
    }

    pub(super) fn kept(&self) -> usize {
        self.kept.len()
    }

    pub(super) fn is_ended(&self) -> bool {
        self.ended
    }

    /// Says whether everything was sent, `Eof` too.
    pub(super) fn is_done(&self) -> bool {
        self.eof_sent
    }

    /// Says whether it has anything for the host.
    pub(super) fn has_news(&self) -> bool {
        !self.kept.is_empty() || (self.ended && !self.eof_held && !self.eof_sent)
    }

    /// Says whether all that is kept has been sent and the host would take more.
    pub(super) fn is_hungry(&self) -> bool {
        !self.ended && !self.awaiting && self.sent == self.end() && self.limit > self.sent
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.kept.extend_from_slice(bytes);
    }

    pub(super) fn finish(&mut self) {
        self.ended = true;
    }

    /// Lets `Eof` wait, or not wait any more.
    pub(super) fn hold_eof(&mut self, held: bool) {
        self.eof_held = held;
    }

    /// Drops the oldest bytes above `most`; for a process that nobody reads.
    pub(super) fn trim(&mut self, most: usize) {
        if planted(Bug::OldestOutputIsKept) {
            self.kept.truncate(most);
            return;
        }
        self.release(self.kept.len().saturating_sub(most));
        self.sent = self.sent.max(self.start);
    }

    fn release(&mut self, bytes: usize) {
        self.kept.advance(bytes);
        self.start += bytes as u64;
    }

    /// Gives the channel to a new reader, who asks for the bytes from `from` on, and says where it really begins.
    pub(super) fn attach(&mut self, from: u64) -> u64 {
        let from = if planted(Bug::AttachBeginsAnew) { self.start } else { from };
        let from = from.clamp(self.start, self.end());
        self.consume(from);
        self.sent = from;
        self.limit = from.saturating_add(u64::from(DEFAULT_WINDOW));
        self.eof_sent = false;
        self.awaiting = false;
        from
    }

    fn consume(&mut self, to: u64) {
        let bytes = usize::try_from(to.saturating_sub(self.start)).unwrap_or(usize::MAX);
        self.release(bytes.min(self.kept.len()));
    }

    /// Waits for the host to say where to go on, on a new connection.
    pub(super) fn suspend(&mut self) {
        self.awaiting = true;
        self.eof_sent = false;
    }

    /// Goes on with the oldest byte that is kept.
    pub(super) fn restart(&mut self) {
        self.sent = self.start;
        self.eof_sent = false;
        self.awaiting = false;
    }

    /// Takes the host's credit; the first after a loss says where to go on.
    pub(super) fn credit(&mut self, consumed: u64, window: u32) -> Result<(), Violation> {
        if consumed > self.sent {
            return Err(Violation::Credit);
        }
        let limit = consumed.saturating_add(u64::from(window));
        if consumed < self.start {
            // What is consumed is not kept; a host that goes on must not ask for it.
            if self.awaiting {
                return Err(Violation::Credit);
            }
            self.limit = self.limit.max(limit);
            return Ok(());
        }
        self.consume(consumed);
        self.limit = limit;
        if self.awaiting {
            self.restart();
        }
        Ok(())
    }

    /// Sends what may be sent. Says whether the full connection was all that kept it from sending more.
    pub(super) fn flush(&mut self, stream: StreamId, channel: Channel, out: &mut BytesMut) -> bool {
        if self.awaiting || self.eof_sent {
            return false;
        }
        let end = self.end();
        let until = if planted(Bug::CreditIsIgnored) { end } else { end.min(self.limit) };
        while self.sent < until {
            if out.len() >= OUTGOING_BOUND {
                return true;
            }
            let at = usize::try_from(self.sent - self.start).unwrap_or(usize::MAX);
            let count = usize::try_from(until - self.sent).unwrap_or(MAX_DATA).min(MAX_DATA);
            encode_data(stream, channel, self.sent, &self.kept[at..at + count], out);
            self.sent += count as u64;
        }
        if self.ended && !self.eof_held && self.sent == end {
            encode(stream, &Frame::Eof { channel, offset: end }, out);
            self.eof_sent = true;
        }
        false
    }
}

/// Counts the bytes of an input channel; who holds them is the user's business.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Intake {
    /// Offset of the first byte of the stream that sends them now.
    base: u64,
    /// How many bytes have come.
    received: u64,
    /// How many of them have gone where they belong.
    taken: u64,
    /// How many bytes the host may send in all.
    granted: u64,
    /// The last `taken` that the host was told.
    told: u64,
    /// How many bytes there are in all, once the host has said so.
    eof: Option<u64>,
}

impl Intake {
    pub(super) fn new() -> Self {
        let granted = u64::from(DEFAULT_WINDOW);
        Self { base: 0, received: 0, taken: 0, granted, told: 0, eof: None }
    }

    pub(super) fn base(&self) -> u64 {
        self.base
    }

    /// Counts a frame's bytes, and gives how many at its beginning were received before.
    pub(super) fn data(&mut self, offset: u64, length: usize) -> Result<usize, Violation> {
        let end = offset.saturating_add(length as u64);
        if offset > self.received {
            return Err(Violation::Gap);
        }
        if end > self.granted {
            return Err(Violation::Overrun);
        }
        let known = usize::try_from(self.received - offset).unwrap_or(usize::MAX).min(length);
        if known < length && self.eof.is_some() {
            return Err(Violation::AfterEof);
        }
        self.received = self.received.max(end);
        Ok(known)
    }

    /// Takes the end of the channel.
    pub(super) fn end(&mut self, offset: u64) -> Result<(), Violation> {
        match self.eof {
            Some(known) if known == offset => Ok(()),
            None if offset == self.received => {
                self.eof = Some(offset);
                Ok(())
            }
            None if offset > self.received => Err(Violation::Gap),
            _ => Err(Violation::AfterEof),
        }
    }

    /// Lets another host stream go on after the last byte, whatever was said of the end.
    pub(super) fn reopen(&mut self) {
        self.eof = None;
        self.base = self.received;
        self.told = self.base;
        self.granted = self.base.saturating_add(u64::from(DEFAULT_WINDOW));
    }

    /// Counts bytes that have gone where they belong.
    pub(super) fn take(&mut self, bytes: usize) {
        let bytes = if planted(Bug::InputIsCountedShort) { bytes / 2 } else { bytes };
        self.taken = (self.taken + bytes as u64).min(self.received);
    }

    pub(super) fn take_all(&mut self) {
        self.taken = self.received;
    }

    /// Makes the credit that the host should have now: when half the window is used up, or, if `eager`, when nothing
    /// is left to be taken.
    pub(super) fn credit(&mut self, window: u32, eager: bool) -> Option<Frame> {
        let target = self.taken.saturating_add(u64::from(window));
        let half = target >= self.granted.saturating_add(u64::from(window / 2).max(1));
        let drained = eager && self.taken == self.received && self.taken > self.told;
        (half || drained).then(|| self.force_credit(window))
    }

    /// Makes the credit that the host is told after a loss.
    pub(super) fn force_credit(&mut self, window: u32) -> Frame {
        self.granted = self.granted.max(self.taken.saturating_add(u64::from(window)));
        // What an earlier stream sent is none of this one's business, even where it has not been taken.
        let consumed = self.taken.max(self.base);
        self.told = consumed;
        let window = u32::try_from(self.granted - consumed).unwrap_or(u32::MAX);
        Frame::Credit { channel: Channel::Stdin, consumed, window }
    }
}
