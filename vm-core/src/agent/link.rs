//! The task that keeps the link: dials, shakes hands, carries frames, and dials again.

use super::{ClientState, Inner, LinkState};
use crate::{env::timeout, machine::Link, observe::Occurrence};
use bytes::{Buf, BytesMut};
use futures_core::future::BoxFuture;
use futures_util::future::{Either, select};
use std::{
    future::{Future, poll_fn},
    io,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};
use vm_guest_protocol::{
    AGENT_PORT, Decoder, Frame, PROTOCOL_VERSION, Request, StreamId, Welcome, encode,
};
use vm_planted_bugs::{Bug, planted};
use vm_trait::VmErrorKind;

const FIRST_BACKOFF: Duration = Duration::from_millis(5);
const LAST_BACKOFF: Duration = Duration::from_millis(100);
/// How many connections may fall in a row as soon as they were made before dialling slows down.
const SHORT_LIVES: u32 = 3;
/// How many reads in a row one poll may do before it lets others run.
const READS_A_POLL: u32 = 64;

/// A link whose handshake is complete.
struct Connection {
    link: Box<dyn Link>,
    decoder: Decoder,
    /// The streams that the agent was told of as live.
    live: Vec<StreamId>,
}

/// Why a connection or a dial came to nothing.
#[derive(Debug)]
enum Fall {
    /// The connection broke; the session may go on.
    Lost,
    /// The agent broke the protocol; the session is over.
    Breach,
    /// The client has ended.
    Ended,
}

/// Keeps the link of a client until it ends.
pub(super) async fn run(inner: Arc<Inner>) {
    let env = inner.parts.env.clone();
    let mut established = false;
    let mut down_since: Option<Duration> = None;
    let mut failed_dials = 0;
    let mut short_lives = 0_u32;
    let mut backoff = FIRST_BACKOFF;
    loop {
        let dialled = until_ended(&inner, async {
            inner.parts.pauses.running().await;
            dial(&inner, established).await
        });
        let fall = match dialled.await {
            Ok(Ok((connection, welcome))) => {
                inner.up(&welcome, established, failed_dials, &connection.live);
                (established, down_since, failed_dials) = (true, None, 0);
                let up_at = env.now();
                let fall = serve(&inner, connection).await;
                inner.down();
                // An agent that ends every connection at once is not dialled ever faster.
                if env.now().saturating_sub(up_at) < FIRST_BACKOFF {
                    short_lives = short_lives.saturating_add(1);
                } else {
                    (short_lives, backoff) = (0, FIRST_BACKOFF);
                }
                fall
            }
            Ok(Err(fall)) => {
                failed_dials += 1;
                fall
            }
            Err(()) => Fall::Ended,
        };
        match fall {
            Fall::Ended => return,
            Fall::Breach => {
                inner.lose_session();
                established = false;
            }
            Fall::Lost => {}
        }
        if inner.has_been_up() {
            let now = inner.running_time();
            let since = *down_since.get_or_insert(now);
            if now.saturating_sub(since) >= inner.parts.timeouts.link {
                inner.lose_session();
                (established, down_since) = (false, Some(now));
            }
        }
        if failed_dials > 0 || short_lives > SHORT_LIVES {
            let slept = until_ended(&inner, env.sleep(backoff)).await;
            if slept.is_err() {
                return;
            }
            backoff = (backoff * 2).min(LAST_BACKOFF);
        }
    }
}

/// Waits for `work`, or for the client's end.
async fn until_ended<T>(inner: &Inner, work: impl Future<Output = T>) -> Result<T, ()> {
    let ended = poll_fn(|cx| {
        let mut state = inner.lock();
        if state.dead.is_some() {
            return Poll::Ready(());
        }
        state.watch_link(cx);
        Poll::Pending
    });
    match select(pin!(ended), pin!(work)).await {
        Either::Left(_) => Err(()),
        Either::Right((output, _)) => Ok(output),
    }
}

async fn dial(inner: &Inner, resume: bool) -> Result<(Connection, Welcome), Fall> {
    let link = inner.parts.machine.connect(AGENT_PORT).await.map_err(|_| Fall::Lost)?;
    let patience = (inner.parts.timeouts.link / 2).max(Duration::from_millis(10));
    let hands = timeout(&*inner.parts.env, patience, shake_hands(inner, link, resume));
    hands.await.unwrap_or(Err(Fall::Lost))
}

async fn shake_hands(
    inner: &Inner,
    mut link: Box<dyn Link>,
    resume: bool,
) -> Result<(Connection, Welcome), Fall> {
    let (hello, live) = inner.hello(&inner.lock(), resume);
    let mut bytes = BytesMut::new();
    encode(0, &hello, &mut bytes);
    inner.record(&Occurrence::Frame { sent: true, stream: 0, frame: &hello });
    link.write_all(&bytes).await.map_err(|_| Fall::Lost)?;
    let mut decoder = Decoder::default();
    loop {
        if let Some((stream, frame)) = decoder.next_frame().map_err(|_| Fall::Breach)? {
            inner.record(&Occurrence::Frame { sent: false, stream, frame: &frame });
            return match frame {
                Frame::Welcome(welcome) if welcome.version == PROTOCOL_VERSION => {
                    Ok((Connection { link, decoder, live }, welcome))
                }
                Frame::Refused(refusal) => {
                    inner.refused(&refusal);
                    Err(Fall::Ended)
                }
                _ => Err(Fall::Breach),
            };
        }
        let read = link.read_buf(decoder.buffer_mut()).await.map_err(|_| Fall::Lost)?;
        if read == 0 {
            return Err(Fall::Lost);
        }
    }
}

/// Carries frames both ways until the connection falls.
async fn serve(inner: &Inner, connection: Connection) -> Fall {
    let Connection { link, decoder, .. } = connection;
    let mut carrier = Carrier {
        inner,
        link,
        decoder,
        sending: BytesMut::new(),
        heartbeat: None,
        heard: false,
        asked: false,
    };
    poll_fn(|cx| carrier.poll(cx)).await
}

struct Carrier<'a> {
    inner: &'a Inner,
    link: Box<dyn Link>,
    decoder: Decoder,
    sending: BytesMut,
    heartbeat: Option<BoxFuture<'static, ()>>,
    /// Whether anything arrived since the last beat.
    heard: bool,
    /// Whether the agent was asked at the last beat.
    asked: bool,
}

impl Carrier<'_> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Fall> {
        for _ in 0..READS_A_POLL {
            {
                let mut state = self.inner.lock();
                if state.dead.is_some() {
                    return Poll::Ready(Fall::Ended);
                }
                state.watch_link(cx);
                if self.sending.is_empty() {
                    std::mem::swap(&mut self.sending, &mut state.out);
                }
            }
            if let Err(fall) = self.poll_send(cx) {
                return Poll::Ready(fall);
            }
            match self.poll_receive(cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(fall)) => return Poll::Ready(fall),
                Poll::Pending => {
                    let more = self.sending.is_empty() && !self.inner.lock().out.is_empty();
                    if more {
                        continue;
                    }
                    return self.poll_heartbeat(cx);
                }
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Result<(), Fall> {
        while !self.sending.is_empty() {
            match Pin::new(&mut self.link).poll_write(cx, &self.sending) {
                Poll::Ready(Ok(0) | Err(_)) => return Err(Fall::Lost),
                Poll::Ready(Ok(written)) => {
                    self.sending.advance(written);
                    self.inner.lock().sent_bytes += written as u64;
                }
                Poll::Pending => break,
            }
        }
        Ok(())
    }

    /// Reads once, and hands on every whole frame.
    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Fall>> {
        let read = match poll_read(&mut self.link, cx, self.decoder.buffer_mut()) {
            Poll::Ready(Ok(0) | Err(_)) => return Poll::Ready(Err(Fall::Lost)),
            Poll::Ready(Ok(read)) => read,
            Poll::Pending => return Poll::Pending,
        };
        self.heard = true;
        let mut state = self.inner.lock();
        state.received_bytes += read as u64;
        loop {
            match self.decoder.next_frame() {
                Ok(Some((stream, frame))) => {
                    if self.inner.dispatch(&mut state, stream, frame).is_err() {
                        return Poll::Ready(Err(Fall::Breach));
                    }
                }
                Ok(None) => return Poll::Ready(Ok(())),
                Err(_) => return Poll::Ready(Err(Fall::Breach)),
            }
        }
    }

    /// Asks an agent that has been silent while something waits for it, and gives the connection up if it stays so.
    fn poll_heartbeat(&mut self, cx: &mut Context<'_>) -> Poll<Fall> {
        if self.heartbeat.is_none() && self.inner.lock().streams.is_empty() {
            return Poll::Pending;
        }
        let parts = &self.inner.parts;
        loop {
            let beat =
                self.heartbeat.get_or_insert_with(|| parts.env.sleep(parts.timeouts.link / 4));
            if beat.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            self.heartbeat = None;
            let heard = std::mem::take(&mut self.heard);
            if self.inner.lock().streams.values().all(|stream| stream.end.is_some()) {
                self.asked = false;
                return Poll::Pending;
            }
            if heard || parts.pauses.is_paused() {
                self.asked = false;
            } else if self.asked {
                return Poll::Ready(Fall::Lost);
            } else {
                self.asked = true;
                self.inner.ask();
                cx.waker().wake_by_ref();
            }
        }
    }
}

/// Reads what there is into `buffer`.
fn poll_read(
    link: &mut Box<dyn Link>,
    cx: &mut Context<'_>,
    buffer: &mut BytesMut,
) -> Poll<io::Result<usize>> {
    buffer.reserve(4 << 10);
    pin!(link.read_buf(buffer)).poll(cx)
}

impl Inner {
    /// Takes in a frame of the agent.
    fn dispatch(&self, state: &mut ClientState, id: StreamId, frame: Frame) -> Result<(), ()> {
        self.record(&Occurrence::Frame { sent: false, stream: id, frame: &frame });
        if id == 0 || id >= state.next_stream {
            return Err(());
        }
        // A stream that was closed here may have had frames under way.
        let Some(stream) = state.streams.get_mut(&id) else { return Ok(()) };
        let credit = matches!(frame, Frame::Credit { .. });
        stream.accept(frame).map_err(|_| ())?;
        if credit {
            self.send_input(state, id);
        }
        Ok(())
    }

    fn up(&self, welcome: &Welcome, established: bool, failed_dials: u32, live: &[StreamId]) {
        let resumed = established && welcome.resumed;
        self.record(&Occurrence::LinkUp { resumed, failed_dials });
        let mut state = self.lock();
        state.out.clear();
        if established && !welcome.resumed {
            state.cut_streams(&VmErrorKind::Disconnected);
        }
        let back = state.session_count > 0;
        state.session_count += 1;
        state.link = LinkState::Up;
        // What was dropped while hands were shaken was live when that began.
        for id in live.iter().filter(|_| resumed) {
            if !state.streams.contains_key(id) {
                self.send(&mut state, *id, &Frame::Close);
            }
        }
        let ids: Vec<_> = state.streams.keys().copied().collect();
        for id in ids {
            if let Some(stream) = state.streams.get_mut(&id) {
                stream.stdin.rewind();
            }
            self.announce(&mut state, id);
        }
        if back && !planted(Bug::ReconnectsAreNotCounted) {
            state.reconnects += 1;
        }
        state.wake_up_waiters();
        let lost = std::mem::take(&mut state.loss_is_told) || planted(Bug::ReturnWithoutLoss);
        drop(state);
        if back && lost && !planted(Bug::ReturnIsNotTold) {
            self.tell_listener(true);
        }
    }

    fn down(&self) {
        self.record(&Occurrence::LinkDown);
        let mut state = self.lock();
        state.link = LinkState::Down;
        state.out.clear();
        let ended = state.dead.is_some() || state.shutting_down;
        state.loss_is_told = !ended;
        drop(state);
        if !ended {
            self.tell_listener(false);
        }
    }

    /// Gives the session up: what is under way fails, and the next connection begins a new one.
    fn lose_session(&self) {
        let session = (u128::from(self.parts.env.random_u64()) << 64)
            | u128::from(self.parts.env.random_u64());
        let mut state = self.lock();
        state.session = session;
        state.link = LinkState::Lost;
        state.cut_streams(&VmErrorKind::Disconnected);
    }

    /// The agent speaks another version: nothing will ever work.
    fn refused(&self, refusal: &vm_guest_protocol::Refusal) {
        let vm_guest_protocol::Refusal::Version { agent } = refusal;
        let kind = VmErrorKind::Unsupported {
            what: format!("the guest agent speaks protocol {agent}, the host {PROTOCOL_VERSION}"),
        };
        let mut state = self.lock();
        state.dead.get_or_insert_with(|| kind.clone());
        state.cut_streams(&kind);
        state.wake_up_waiters();
    }

    /// Sends a request whose answer nobody waits for, to hear something.
    fn ask(&self) {
        let mut state = self.lock();
        let id = state.next_stream;
        if let Some(next) = id.checked_add(1) {
            state.next_stream = next;
            self.send(&mut state, id, &Frame::Open(Request::Ping));
            self.send(&mut state, id, &Frame::Close);
        }
    }

    fn tell_listener(&self, up: bool) {
        if let Some(listener) = self.parts.listener.upgrade() {
            listener.link(up);
        }
    }

    fn has_been_up(&self) -> bool {
        self.lock().session_count > 0
    }

    /// Gives the time that the machine was not paused.
    fn running_time(&self) -> Duration {
        let now = self.parts.env.now();
        now.saturating_sub(self.parts.pauses.paused(now))
    }
}

impl ClientState {
    fn watch_link(&mut self, cx: &Context<'_>) {
        match &mut self.link_waker {
            Some(known) => known.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
    }
}
