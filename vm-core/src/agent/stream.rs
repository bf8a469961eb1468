//! One stream of a session, as the host sees it.

use bytes::Bytes;
use std::{collections::VecDeque, task::Waker};
use vm_guest_protocol::{
    Channel, DEFAULT_WINDOW, Frame, GuestError, MAX_DATA, ProcessExit, Reply, Request, Started,
};
use vm_planted_bugs::{Bug, planted};
use vm_trait::VmErrorKind;

/// How many bytes of a channel the host holds for a reader.
pub(super) const WINDOW: u64 = DEFAULT_WINDOW as u64;

/// One stream of a session.
#[derive(Debug)]
pub(super) struct Stream {
    /// Repeated after a loss for as long as nothing was heard of it.
    pub(super) request: Request,
    pub(super) started: Option<Started>,
    pub(super) stdout: Incoming,
    pub(super) stderr: Incoming,
    pub(super) stdin: Outgoing,
    pub(super) end: Option<End>,
    wakers: Vec<Waker>,
}

/// No channel has more bytes than this, and no agent may say so: offsets can be added to.
const FURTHEST: u64 = 1 << 62;

/// How a stream ended.
#[derive(Clone, Debug)]
pub(super) enum End {
    Done(Reply),
    Failed(GuestError),
    Exited(ProcessExit),
    /// Not by the agent: the link, the machine or a stop ended it.
    Cut(VmErrorKind),
}

/// A frame that the agent should not have sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Breach(pub(super) &'static str);

/// A channel from the guest.
#[derive(Debug, Default)]
pub(super) struct Incoming {
    chunks: VecDeque<Bytes>,
    /// Offset of the byte after the last one received.
    received: u64,
    /// Bytes that are held for the reader.
    held: u64,
    /// Offset up to which the agent may send.
    granted: u64,
    /// How many bytes the channel had in all, once that is known.
    eof: Option<u64>,
}

/// A channel to the guest.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    /// What the agent has not consumed, from `base` on.
    kept: VecDeque<Bytes>,
    base: u64,
    /// Offset of the byte after the last one in `kept`.
    end: u64,
    /// Offset of the next byte to send on this connection.
    sent: u64,
    limit: u64,
    /// Whether nothing more will be appended.
    closed: bool,
    eof_sent: bool,
}

impl Stream {
    pub(super) fn new(request: Request) -> Self {
        Self {
            request,
            started: None,
            stdout: Incoming::new(0),
            stderr: Incoming::new(0),
            stdin: Outgoing::new(),
            end: None,
            wakers: Vec::new(),
        }
    }

    /// Takes in a frame of the agent. Frames that repeat what is known are ignored.
    pub(super) fn accept(&mut self, frame: Frame) -> Result<(), Breach> {
        match frame {
            Frame::Started(started) if self.started.is_none() => {
                if [started.stdout, started.stderr, started.stdin].iter().any(|it| *it > FURTHEST) {
                    return Err(Breach("an offset that nobody reaches"));
                }
                self.stdout = Incoming::new(started.stdout);
                self.stderr = Incoming::new(started.stderr);
                self.stdin.start_at(started.stdin);
                self.started = Some(started);
            }
            Frame::Started(_) => {}
            Frame::Data { channel, offset, bytes } => {
                self.incoming(channel)?.receive(offset, &bytes)?;
            }
            Frame::Eof { channel, offset } => self.incoming(channel)?.end(offset)?,
            Frame::Credit { channel: Channel::Stdin, consumed, window } => {
                self.stdin.credit(consumed, window)?;
            }
            Frame::Done(reply) => self.finish(End::Done(reply)),
            Frame::Failed(error) => self.finish(End::Failed(error)),
            Frame::Exited(exit) => self.finish(End::Exited(exit)),
            _ => return Err(Breach("a frame that only the host sends")),
        }
        self.wake();
        Ok(())
    }

    /// Ends the stream, unless it has ended already.
    pub(super) fn finish(&mut self, end: End) {
        if self.end.is_none() {
            self.end = Some(end);
        }
        self.wake();
    }

    /// Has `waker` woken at the next change.
    pub(super) fn register(&mut self, waker: &Waker) {
        if !self.wakers.iter().any(|known| known.will_wake(waker)) {
            self.wakers.push(waker.clone());
        }
    }

    /// Lists the channels on which output comes.
    pub(super) fn outputs(&self) -> &'static [Channel] {
        match self.request {
            Request::Exec(_) | Request::Attach { .. } => &[Channel::Stdout, Channel::Stderr],
            _ => &[Channel::Stdout],
        }
    }

    pub(super) fn channel_mut(&mut self, channel: Channel) -> &mut Incoming {
        if channel == Channel::Stderr { &mut self.stderr } else { &mut self.stdout }
    }

    fn incoming(&mut self, channel: Channel) -> Result<&mut Incoming, Breach> {
        match channel {
            Channel::Stdin => Err(Breach("output on the input channel")),
            channel if self.started.is_some() => Ok(self.channel_mut(channel)),
            _ => Err(Breach("data before the start")),
        }
    }

    fn wake(&mut self) {
        for waker in self.wakers.drain(..) {
            waker.wake();
        }
    }
}

impl Incoming {
    fn new(offset: u64) -> Self {
        Self { received: offset, granted: offset + WINDOW, ..Self::default() }
    }

    fn receive(&mut self, offset: u64, bytes: &Bytes) -> Result<(), Breach> {
        let length = bytes.len() as u64;
        if offset > self.received {
            return Err(Breach("bytes are missing"));
        }
        let end = offset.checked_add(length).ok_or(Breach("offset overflow"))?;
        if end > self.granted || self.eof.is_some_and(|eof| end > eof) {
            return Err(Breach("more bytes than allowed"));
        }
        let repeated = planted(Bug::RepeatedOutputIsKept);
        let known = if repeated { 0 } else { self.received - offset };
        if known < length {
            let skip = usize::try_from(known).map_err(|_| Breach("offset overflow"))?;
            self.held += length - known;
            self.received = self.received.max(end);
            self.chunks.push_back(bytes.slice(skip..));
        }
        Ok(())
    }

    fn end(&mut self, offset: u64) -> Result<(), Breach> {
        if offset != self.received {
            return Err(Breach("the channel ends elsewhere"));
        }
        self.eof = Some(offset);
        Ok(())
    }

    /// Takes the next bytes out, if any.
    pub(super) fn take(&mut self) -> Option<Bytes> {
        let chunk = self.chunks.pop_front()?;
        let given = chunk.len() as u64;
        self.held -= if planted(Bug::CreditLeaks) { given.min(4096) } else { given };
        Some(chunk)
    }

    /// Gives the offset of the next byte that `take` gives.
    pub(super) fn position(&self) -> u64 {
        self.received - self.held
    }

    pub(super) fn at_end(&self) -> bool {
        self.chunks.is_empty() && self.eof.is_some()
    }

    /// Gives the credit to send: always when asked anew after a loss, else when enough room came free.
    pub(super) fn credit(&mut self, channel: Channel, anew: bool) -> Option<Frame> {
        let limit = self.position() + WINDOW;
        if !anew && (self.eof.is_some() || limit - self.granted < WINDOW / 2) {
            return None;
        }
        self.granted = limit;
        // What is held here and was not given on is lost with this handle; the agent must keep it for the next one.
        let consumed = self.position();
        let window = u32::try_from(limit - consumed).unwrap_or(u32::MAX);
        Some(Frame::Credit { channel, consumed, window })
    }
}

impl Outgoing {
    fn new() -> Self {
        Self { limit: u64::from(DEFAULT_WINDOW), ..Self::default() }
    }

    /// Goes on where an earlier stream to the same process ended.
    fn start_at(&mut self, offset: u64) {
        if self.end == 0 && self.base == 0 {
            (self.base, self.sent, self.end) = (offset, offset, offset);
            self.limit = offset + WINDOW;
        }
    }

    /// Appends bytes to be sent.
    pub(super) fn push(&mut self, bytes: Bytes) {
        if !bytes.is_empty() {
            self.end += bytes.len() as u64;
            self.kept.push_back(bytes);
        }
    }

    /// Says that nothing more will be appended.
    pub(super) fn close(&mut self) {
        self.closed = true;
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }

    /// Says whether the agent has consumed nearly all that was appended, so that more may come.
    pub(super) fn has_room(&self) -> bool {
        self.end - self.base < WINDOW
    }

    /// Gives the next frame that may be sent now.
    pub(super) fn next_frame(&mut self) -> Option<Frame> {
        let channel = Channel::Stdin;
        if self.sent == self.end {
            if self.closed && !self.eof_sent {
                self.eof_sent = true;
                return Some(Frame::Eof { channel, offset: self.end });
            }
            return None;
        }
        let room = usize::try_from(self.limit.saturating_sub(self.sent)).unwrap_or(usize::MAX);
        if room == 0 {
            return None;
        }
        let mut skip = usize::try_from(self.sent - self.base).ok()?;
        for chunk in &self.kept {
            if skip < chunk.len() {
                let most = (chunk.len() - skip).min(room).min(MAX_DATA);
                let frame = Frame::Data {
                    channel,
                    offset: self.sent,
                    bytes: chunk.slice(skip..skip + most),
                };
                self.sent += most as u64;
                return Some(frame);
            }
            skip -= chunk.len();
        }
        None
    }

    /// Forgets what was sent and not consumed on a connection that is lost; the agent's next credit says from where to
    /// repeat.
    pub(super) fn rewind(&mut self) {
        if !planted(Bug::InputIsNotRepeated) {
            self.sent = self.base;
        }
        self.eof_sent = planted(Bug::EofIsNotRepeated) && self.eof_sent;
    }

    fn credit(&mut self, consumed: u64, window: u32) -> Result<(), Breach> {
        // A stream that attaches learns here, if not from `Started`, how far earlier ones came.
        if consumed > FURTHEST {
            return Err(Breach("an offset that nobody reaches"));
        }
        self.start_at(consumed);
        if consumed > self.end {
            return Err(Breach("credit for bytes that were never sent"));
        }
        while self.base < consumed {
            let Some(chunk) = self.kept.front_mut() else { break };
            let done = usize::try_from(consumed - self.base).unwrap_or(usize::MAX);
            if done < chunk.len() {
                *chunk = chunk.slice(done..);
                self.base = consumed;
            } else {
                self.base += chunk.len() as u64;
                self.kept.pop_front();
            }
        }
        self.sent = self.sent.max(self.base);
        self.limit = self.limit.max(consumed.saturating_add(u64::from(window)));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn started() -> Stream {
        let mut stream = Stream::new(Request::Ping);
        let started = Started { process: 1, pid: 2, stdout: 0, stderr: 0, tty: false, stdin: 0 };
        stream.accept(Frame::Started(started)).unwrap();
        stream
    }

    fn data(offset: u64, bytes: &[u8]) -> Frame {
        Frame::Data { channel: Channel::Stdout, offset, bytes: Bytes::copy_from_slice(bytes) }
    }

    proptest! {
        #[test]
        fn repeated_output_arrives_once(
            content in prop::collection::vec(any::<u8>(), 1..200),
            jumps in prop::collection::vec((0_usize..200, 1_usize..50), 0..20),
        ) {
            let mut stream = started();
            let mut next = 0;
            let mut got = Vec::new();
            for (back, length) in jumps {
                let start = next - back.min(next);
                let end = (start + length).min(content.len());
                if start < end {
                    stream.accept(data(start as u64, &content[start..end])).unwrap();
                    next = next.max(end);
                }
                while let Some(chunk) = stream.stdout.take() {
                    got.extend_from_slice(&chunk);
                }
            }
            prop_assert_eq!(&got[..], &content[..next]);
            prop_assert_eq!(stream.stdout.position(), next as u64);
        }

        #[test]
        fn input_is_repeated_from_where_the_agent_is(
            pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..100), 1..8),
            consumed in 0_usize..400,
        ) {
            let all = pieces.concat();
            let mut out = Outgoing::new();
            for piece in pieces {
                out.push(piece.into());
            }
            out.close();
            while out.next_frame().is_some() {}
            let consumed = consumed.min(all.len());
            out.rewind();
            out.credit(consumed as u64, DEFAULT_WINDOW).unwrap();
            let mut got = Vec::new();
            let mut eof = None;
            while let Some(frame) = out.next_frame() {
                match frame {
                    Frame::Data { offset, bytes, .. } => {
                        prop_assert_eq!(offset, (consumed + got.len()) as u64);
                        got.extend_from_slice(&bytes);
                    }
                    Frame::Eof { offset, .. } => eof = Some(offset),
                    other => prop_assert!(false, "{:?}", other),
                }
            }
            prop_assert_eq!(&got[..], &all[consumed..]);
            prop_assert_eq!(eof, Some(all.len() as u64));
        }
    }

    #[test]
    fn room_is_given_again_once_half_of_it_came_free() {
        let mut incoming = Incoming::new(7);
        let mut received = 7;
        let mut read = |incoming: &mut Incoming, count: u64| {
            let bytes = Bytes::from(vec![0; usize::try_from(count).unwrap()]);
            incoming.receive(received, &bytes).unwrap();
            received += count;
            incoming.take();
        };
        read(&mut incoming, WINDOW / 2 - 1);
        assert_eq!(incoming.credit(Channel::Stdout, false), None);
        read(&mut incoming, 1);
        let credit =
            |consumed| Frame::Credit { channel: Channel::Stdout, consumed, window: DEFAULT_WINDOW };
        assert_eq!(incoming.credit(Channel::Stdout, false), Some(credit(7 + WINDOW / 2)));
        assert_eq!(incoming.credit(Channel::Stdout, false), None);
        assert_eq!(incoming.credit(Channel::Stdout, true), Some(credit(7 + WINDOW / 2)));
        read(&mut incoming, WINDOW);
        incoming.end(7 + WINDOW / 2 + WINDOW).unwrap();
        assert_eq!(incoming.credit(Channel::Stdout, false), None, "nothing more comes");
    }

    #[test]
    fn a_window_of_input_is_kept_and_no_more_is_asked_for() {
        let mut out = Outgoing::new();
        out.push(Bytes::from(vec![0; usize::try_from(WINDOW).unwrap() - 1]));
        assert!(out.has_room());
        out.push(Bytes::from_static(b"x"));
        assert!(!out.has_room());
        while out.next_frame().is_some() {}
        assert!(!out.has_room(), "it may have to be sent again");
        out.credit(1, DEFAULT_WINDOW).unwrap();
        assert!(out.has_room());
    }

    #[test]
    fn an_agent_that_takes_what_was_never_sent_is_caught() {
        let credit = |consumed| Frame::Credit { channel: Channel::Stdin, consumed, window: 9 };
        for (consumed, fits) in [(0, true), (5, true), (6, false), (FURTHEST + 1, false)] {
            let mut stream = started();
            stream.stdin.push(Bytes::from_static(b"12345"));
            assert_eq!(stream.accept(credit(consumed)).is_ok(), fits, "{consumed} of 5");
        }
        // Of one that attaches, it is told so how far earlier ones came; there is an end to that, too.
        assert!(started().accept(credit(FURTHEST)).is_ok());
        assert!(started().accept(credit(FURTHEST + 1)).is_err());
    }

    #[test]
    fn an_agent_that_sends_too_much_or_leaves_a_gap_is_caught() {
        let mut stream = started();
        let chunk = vec![0; MAX_DATA];
        for piece in 0..WINDOW / MAX_DATA as u64 {
            stream.accept(data(piece * MAX_DATA as u64, &chunk)).unwrap();
        }
        assert!(stream.accept(data(WINDOW, &[1])).is_err());
        assert!(started().accept(data(1, &[1])).is_err());
        let early = Stream::new(Request::Ping).accept(data(0, &[1]));
        assert!(early.is_err());
        let bytes = Bytes::from_static(b"x");
        let input = Frame::Data { channel: Channel::Stdin, offset: 0, bytes };
        assert!(started().accept(input).is_err());
    }

    #[test]
    fn what_comes_again_after_the_end_of_a_channel_changes_nothing() {
        let mut stream = started();
        let eof = || Frame::Eof { channel: Channel::Stdout, offset: 3 };
        for frame in [data(0, b"abc"), eof(), data(0, b"ab"), data(0, b"abc"), eof()] {
            stream.accept(frame).unwrap();
        }
        assert_eq!(stream.stdout.take(), Some("abc".into()));
        assert_eq!(stream.stdout.take(), None);
        assert!(stream.stdout.at_end());
        assert!(stream.accept(data(3, b"d")).is_err());
    }

    #[test]
    fn a_program_starts_once_and_not_where_nobody_comes() {
        let at = |stdout| {
            let (process, pid) = (1, 2);
            Frame::Started(Started { process, pid, stdout, stderr: 0, tty: false, stdin: 0 })
        };
        let mut stream = started();
        stream.accept(data(0, b"abc")).unwrap();
        stream.accept(at(100)).unwrap();
        stream.accept(data(3, b"d")).unwrap();
        assert_eq!(stream.stdout.take(), Some("abc".into()));
        assert_eq!(stream.stdout.take(), Some("d".into()));
        for (stdout, fits) in [(FURTHEST, true), (FURTHEST + 1, false)] {
            let accepted = Stream::new(Request::Ping).accept(at(stdout));
            assert_eq!(accepted.is_ok(), fits, "{stdout}");
        }
    }
}
