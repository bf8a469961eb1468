//! The byte streams between the host and the guest: to its agent, and to its vsock sockets.

use super::Shared;
use crate::ledger::Held;
use bytes::{Buf, Bytes, BytesMut};
use std::{
    collections::VecDeque,
    fmt, io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use vm_guest_agent::core::ConnId;

/// How many bytes are under way in each direction at most.
const CAPACITY: usize = 256 << 10;

/// What is under way on one connection.
#[derive(Debug, Default)]
pub(super) struct Pipe {
    to_guest: BytesMut,
    /// How many bytes arrive when; times never go back.
    arrivals: VecDeque<(Duration, usize)>,
    to_host: BytesMut,
    /// The guest's socket; none on the agent's connections.
    pub(super) socket: Option<u32>,
    /// It goes over the network.
    pub(super) tcp: bool,
    /// When the guest accepts, or hears of the host's answer.
    pub(super) accept_at: Duration,
    pub(super) accepted: bool,
    /// The host refuses what the guest dialled.
    pub(super) refused: bool,
    /// Nothing moves until then.
    stalled_until: Duration,
    /// The host writes no more; the guest hears of it behind the bytes under way.
    host_closed: bool,
    /// The host's end is gone.
    pub(super) host_dropped: bool,
    /// The guest's socket heard that the host writes no more, and that it is gone.
    told: (bool, bool),
    /// The guest writes no more.
    guest_done: bool,
    /// The guest's end is gone.
    guest_closed: bool,
    /// The connection broke.
    broken: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

/// What the guest is to do about a connection next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Arrival {
    Accept,
    Bytes(Bytes),
    Closed,
}

impl Pipe {
    pub(super) fn new(accept_at: Duration) -> Self {
        Self { accept_at, ..Self::default() }
    }

    /// Makes a connection that the host opened to a socket.
    pub(super) fn of_socket(socket: u32) -> Self {
        Self { socket: Some(socket), accepted: true, ..Self::default() }
    }

    /// Makes a connection that the guest opens from a socket.
    pub(super) fn to_socket(socket: u32, answer_at: Duration, accepted: bool) -> Self {
        let refused = !accepted;
        Self { socket: Some(socket), accept_at: answer_at, refused, ..Self::default() }
    }

    /// Lets it go over the network.
    pub(super) fn over_tcp(self) -> Self {
        Self { tcp: true, ..self }
    }

    /// Gives the time from which on the guest has something to do here, when it takes so many bytes.
    pub(super) fn due(&self, room: usize) -> Option<Duration> {
        let when = if self.guest_closed {
            return None;
        } else if !self.accepted {
            self.accept_at
        } else if let Some((at, _)) = self.arrivals.front() {
            if room == 0 {
                return None;
            }
            *at
        } else if self.has_news() {
            Duration::ZERO
        } else {
            return None;
        };
        Some(if self.broken { when } else { when.max(self.stalled_until) })
    }

    /// Says whether the guest is yet to hear how the host's end fares.
    fn has_news(&self) -> bool {
        self.broken
            || match self.socket {
                None => self.host_closed,
                Some(_) => self.told != (self.host_closed, self.host_dropped),
            }
    }

    /// Takes what has arrived by `now`, `room` bytes at most.
    pub(super) fn arrive(&mut self, now: Duration, room: usize) -> Option<Arrival> {
        if self.due(room).is_none_or(|due| due > now) {
            return None;
        }
        if !self.accepted {
            self.accepted = true;
            return Some(Arrival::Accept);
        }
        let mut length = 0;
        while let Some((at, more)) = self.arrivals.front_mut()
            && *at <= now
            && length < room
        {
            let taken = (*more).min(room - length);
            length += taken;
            *more -= taken;
            if *more == 0 {
                self.arrivals.pop_front();
            }
        }
        if length == 0 {
            self.told = (self.host_closed, self.host_dropped);
            return Some(Arrival::Closed);
        }
        let bytes = self.to_guest.split_to(length).freeze();
        wake(&mut self.writer);
        Some(Arrival::Bytes(bytes))
    }

    /// Puts bytes of the guest under way, as many as there is room for.
    pub(super) fn send(&mut self, outgoing: &mut BytesMut) -> bool {
        if self.broken || self.host_dropped {
            outgoing.clear();
            return false;
        }
        let room = CAPACITY.saturating_sub(self.to_host.len()).min(outgoing.len());
        if room == 0 {
            return false;
        }
        let bytes = outgoing.split_to(room);
        if self.to_host.is_empty() {
            self.to_host = bytes;
        } else {
            self.to_host.extend_from_slice(&bytes);
        }
        wake(&mut self.reader);
        true
    }

    /// Gives how many bytes of the guest can be put under way.
    pub(super) fn room_to_host(&self) -> usize {
        CAPACITY.saturating_sub(self.to_host.len())
    }

    /// Puts bytes of a socket under way, no more than there is room for.
    pub(super) fn send_bytes(&mut self, bytes: &[u8]) {
        if !self.broken && !self.host_dropped && !bytes.is_empty() {
            self.to_host.extend_from_slice(bytes);
            wake(&mut self.reader);
        }
    }

    /// The guest writes no more.
    pub(super) fn finish(&mut self) {
        if !self.guest_done {
            self.guest_done = true;
            wake(&mut self.reader);
        }
    }

    /// Ends the guest's side: the agent does not know the connection any more.
    pub(super) fn end(&mut self) {
        self.guest_closed = true;
        self.wake_all();
    }

    /// Says whether the connection broke.
    pub(super) fn is_broken(&self) -> bool {
        self.broken
    }

    /// Says whether the guest's end is gone.
    pub(super) fn guest_is_gone(&self) -> bool {
        self.guest_closed
    }

    /// Breaks the connection; `kept` says which part of the bytes under way still arrives.
    pub(super) fn break_down(&mut self, kept: &mut dyn FnMut(usize) -> usize) {
        self.broken = true;
        let to_guest = kept(self.to_guest.len() + 1);
        self.to_guest.truncate(to_guest);
        let mut left = to_guest;
        self.arrivals.retain_mut(|(_, length)| {
            *length = left.min(*length);
            left -= *length;
            *length > 0
        });
        let to_host = kept(self.to_host.len() + 1);
        self.to_host.truncate(to_host);
        self.wake_all();
    }

    pub(super) fn stall(&mut self, until: Duration) {
        self.stalled_until = self.stalled_until.max(until);
    }

    /// Gives the time at which a stall ends that the host's end waits for.
    pub(super) fn stall_end(&self, now: Duration) -> Option<Duration> {
        let awaited = self.reader.is_some() || self.writer.is_some();
        (awaited && self.stalled_until > now).then_some(self.stalled_until)
    }

    pub(super) fn is_stalled(&self, now: Duration) -> bool {
        self.stalled_until > now && !self.broken
    }

    /// Wakes the host's end, which may go on after a stall.
    pub(super) fn wake_after_stall(&mut self, now: Duration) {
        if !self.stalled_until.is_zero() && self.stalled_until <= now {
            self.stalled_until = Duration::ZERO;
            self.wake_all();
        }
    }

    fn wake_all(&mut self) {
        wake(&mut self.reader);
        wake(&mut self.writer);
    }

    /// Takes bytes from the host; `None` where there is no room for any.
    pub(super) fn write(&mut self, bytes: &[u8], arrive_at: Duration) -> Option<usize> {
        let room = CAPACITY.saturating_sub(self.to_guest.len()).min(bytes.len());
        if room == 0 {
            return None;
        }
        self.to_guest.extend_from_slice(&bytes[..room]);
        match self.arrivals.back_mut() {
            Some((at, length)) if *at >= arrive_at => *length += room,
            _ => self.arrivals.push_back((arrive_at, room)),
        }
        Some(room)
    }

    /// Gives the time before which nothing that is sent now may arrive.
    pub(super) fn last_arrival(&self) -> Option<Duration> {
        self.arrivals.back().map(|(at, _)| *at)
    }
}

fn wake(waker: &mut Option<Waker>) {
    if let Some(waker) = waker.take() {
        waker.wake();
    }
}

fn register(slot: &mut Option<Waker>, cx: &Context<'_>) {
    match slot {
        Some(waker) => waker.clone_from(cx.waker()),
        None => *slot = Some(cx.waker().clone()),
    }
}

/// The host's end of a connection.
pub(super) struct SimLink {
    machine: Arc<Shared>,
    conn: ConnId,
    _held: Held,
}

impl SimLink {
    pub(super) fn new(machine: Arc<Shared>, conn: ConnId) -> Self {
        let held = machine.world().counters.streams.hold();
        Self { machine, conn, _held: held }
    }
}

impl AsyncRead for SimLink {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let machine = &self.machine;
        let world = machine.world();
        let mut state = machine.lock();
        let now = world.now();
        let Some(pipe) = state.lines.pipes.get_mut(&self.conn) else {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        };
        if pipe.is_stalled(now) {
            register(&mut pipe.reader, cx);
            let until = pipe.stalled_until;
            machine.arm(&mut state, until, now);
            return Poll::Pending;
        }
        if !pipe.to_host.is_empty() && machine.reset(pipe) {
            machine.arm(&mut state, now, now);
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        if pipe.to_host.is_empty() {
            if pipe.broken {
                return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
            }
            if pipe.guest_closed || pipe.guest_done {
                return Poll::Ready(Ok(()));
            }
            register(&mut pipe.reader, cx);
            return Poll::Pending;
        }
        if world.yields() {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let most = pipe.to_host.len().min(buf.remaining());
        let length = machine.shorten(most);
        buf.put_slice(&pipe.to_host[..length]);
        machine.note_bytes(crate::trace::Tag::ToHost, &pipe.to_host[..length], now);
        pipe.to_host.advance(length);
        machine.host_has_read(&mut state, now);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for SimLink {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let machine = &self.machine;
        let world = machine.world();
        let mut state = machine.lock();
        let now = world.now();
        let Some(pipe) = state.lines.pipes.get_mut(&self.conn) else {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        };
        if pipe.broken || pipe.guest_closed || pipe.host_closed {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        if world.yields() {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        if machine.trouble(pipe, now) {
            machine.arm(&mut state, now, now);
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let length = machine.shorten(buf.len());
        let arrive_at = machine.arrival(pipe, now);
        let Some(taken) = pipe.write(&buf[..length], arrive_at) else {
            register(&mut pipe.writer, cx);
            return Poll::Pending;
        };
        machine.note_bytes(crate::trace::Tag::ToGuest, &buf[..taken], now);
        let due = pipe.due(usize::MAX).unwrap_or(arrive_at);
        machine.arm(&mut state, due, now);
        Poll::Ready(Ok(taken))
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.machine.close_link(self.conn, false);
        Poll::Ready(Ok(()))
    }
}

impl Drop for SimLink {
    fn drop(&mut self) {
        self.machine.close_link(self.conn, true);
    }
}

impl fmt::Debug for SimLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimLink").field("conn", &self.conn).finish_non_exhaustive()
    }
}

impl Shared {
    /// Ends the host's side of a connection, or, where it is dropped, the host's end as a whole.
    pub(super) fn close_link(&self, conn: ConnId, dropped: bool) {
        let now = self.world().now();
        let mut state = self.lock();
        if let Some(pipe) = state.lines.pipes.get_mut(&conn) {
            pipe.host_closed = true;
            pipe.host_dropped |= dropped;
            let unknown = pipe.guest_closed || (!pipe.accepted && pipe.socket.is_none());
            let due = pipe.due(usize::MAX);
            if dropped && unknown {
                state.lines.pipes.remove(&conn);
            } else if let Some(due) = due {
                self.arm(&mut state, due, now);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const AT: Duration = Duration::from_millis(1);

    proptest! {
        #[test]
        fn bytes_arrive_in_order_and_whole(pieces in prop::collection::vec((prop::collection::vec(any::<u8>(), 1..2000), 0_u64..3), 1..40), step in 1_u64..5) {
            let mut pipe = Pipe::new(Duration::ZERO);
            prop_assert_eq!(pipe.arrive(Duration::ZERO, usize::MAX), Some(Arrival::Accept));
            let (mut sent, mut got) = (Vec::new(), Vec::new());
            let mut clock = 0;
            for (bytes, gap) in pieces {
                clock += gap;
                if let Some(taken) = pipe.write(&bytes, AT * u32::try_from(clock).unwrap()) {
                    sent.extend_from_slice(&bytes[..taken]);
                }
                if clock % step == 0 {
                    let now = AT * u32::try_from(clock / 2).unwrap();
                    while let Some(Arrival::Bytes(bytes)) = pipe.arrive(now, usize::MAX) {
                        got.extend_from_slice(&bytes);
                    }
                }
            }
            while let Some(Arrival::Bytes(bytes)) = pipe.arrive(Duration::MAX, usize::MAX) {
                got.extend_from_slice(&bytes);
            }
            prop_assert_eq!(got, sent);
        }

        #[test]
        fn a_broken_connection_delivers_a_prefix_and_then_its_end(length in 1_usize..3000, kept in 0_usize..3000) {
            let mut pipe = Pipe::new(Duration::ZERO);
            pipe.arrive(Duration::ZERO, usize::MAX);
            let bytes: Vec<_> = (0..length).map(|n| u8::try_from(n % 251).unwrap()).collect();
            pipe.write(&bytes, AT);
            pipe.break_down(&mut |bound| kept.min(bound - 1));
            let mut got = Vec::new();
            while let Some(Arrival::Bytes(bytes)) = pipe.arrive(Duration::MAX, usize::MAX) {
                got.extend_from_slice(&bytes);
            }
            prop_assert_eq!(&got[..], &bytes[..kept.min(length)]);
            prop_assert_eq!(pipe.arrive(Duration::MAX, usize::MAX), Some(Arrival::Closed));
        }

        #[test]
        fn nothing_arrives_while_stalled(until in 2_u32..50) {
            let mut pipe = Pipe::new(Duration::ZERO);
            pipe.arrive(Duration::ZERO, usize::MAX);
            pipe.write(b"x", AT);
            pipe.stall(AT * until);
            prop_assert_eq!(pipe.due(usize::MAX), Some(AT * until));
            prop_assert_eq!(pipe.arrive(AT * (until - 1), usize::MAX), None);
            prop_assert_eq!(pipe.arrive(AT * until, usize::MAX), Some(Arrival::Bytes(Bytes::from_static(b"x"))));
        }
    }

    #[test]
    fn the_buffers_are_bounded() {
        let mut pipe = Pipe::new(Duration::ZERO);
        let much = vec![0; CAPACITY + 7];
        assert_eq!(pipe.write(&much, AT), Some(CAPACITY));
        assert_eq!(pipe.write(b"more", AT), None);
        let mut outgoing = BytesMut::from(&much[..]);
        assert!(pipe.send(&mut outgoing));
        assert_eq!(outgoing.len(), 7);
        assert!(!pipe.send(&mut outgoing));
    }
}
