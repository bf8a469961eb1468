//! The client of the guest agent: many requests at once over one link that may break.
//!
//! A session outlives its connections. While the link is down, requests wait; when it is back, every stream goes on
//! where it was. Only when the agent was out of reach for longer than [`Timeouts::link`](vm_trait::Timeouts) do they
//! fail as Disconnected.

mod files;
mod link;
mod pause_clock;
mod process;
mod stream;

pub(crate) use pause_clock::PauseClock;

use crate::{
    env::Env,
    machine::Machine,
    observe::{Observer, Occurrence},
};
use bytes::BytesMut;
use std::{
    collections::BTreeMap,
    future::poll_fn,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    task::{Poll, Waker},
    time::Duration,
};
use stream::{End, Stream};
use vm_guest_protocol::{Frame, GuestError, Hello, Reply, Request, StreamId, encode};
use vm_planted_bugs::{Bug, planted};
use vm_trait::{Timeouts, VmErrorKind, VmId};

/// A client of one machine's agent. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct AgentClient {
    inner: Arc<Inner>,
}

/// What a client is made for.
#[derive(Clone, Debug)]
pub(crate) struct ClientParts {
    pub(crate) vm: VmId,
    pub(crate) env: Arc<dyn Env>,
    pub(crate) observer: Arc<dyn Observer>,
    pub(crate) machine: Arc<dyn Machine>,
    pub(crate) timeouts: Timeouts,
    pub(crate) pauses: Arc<PauseClock>,
    /// Learns of losses.
    pub(crate) listener: Weak<dyn LinkListener>,
}

/// Learns that the link was lost or is back.
pub(crate) trait LinkListener: Send + Sync + std::fmt::Debug {
    /// Takes note.
    fn link(&self, up: bool);
}

#[derive(Debug)]
struct Inner {
    parts: ClientParts,
    state: Mutex<ClientState>,
}

#[derive(Debug)]
struct ClientState {
    session: u128,
    next_stream: StreamId,
    streams: BTreeMap<StreamId, Stream>,
    /// Encoded frames that the link has not taken yet.
    out: BytesMut,
    link: LinkState,
    /// Nothing but the request to power off is sent any more, and no stream is closed.
    shutting_down: bool,
    /// Whether the listener was told that the link was lost, and not yet that it is back.
    loss_is_told: bool,
    /// Why no request can be made any more.
    dead: Option<VmErrorKind>,
    link_waker: Option<Waker>,
    up_wakers: Vec<Waker>,
    /// How often the handshake was completed.
    session_count: u64,
    sent_bytes: u64,
    received_bytes: u64,
    reconnects: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LinkState {
    /// No connection yet, or lost and being made anew.
    Down,
    /// The handshake is complete.
    Up,
    /// Out of reach for longer than the link may be.
    Lost,
}

/// What the client has counted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ClientCounters {
    pub(crate) sent_bytes: u64,
    pub(crate) received_bytes: u64,
    pub(crate) reconnects: u64,
}

impl AgentClient {
    /// Makes a client and begins to dial.
    pub(crate) fn connect(parts: ClientParts) -> Self {
        let session = u128::from(parts.env.random_u64()) << 64 | u128::from(parts.env.random_u64());
        let state = ClientState {
            session,
            next_stream: 1,
            streams: BTreeMap::new(),
            out: BytesMut::new(),
            link: LinkState::Down,
            shutting_down: false,
            loss_is_told: false,
            dead: None,
            link_waker: None,
            up_wakers: Vec::new(),
            session_count: 0,
            sent_bytes: 0,
            received_bytes: 0,
            reconnects: 0,
        };
        let inner = Arc::new(Inner { parts, state: Mutex::new(state) });
        let env = inner.parts.env.clone();
        env.spawn("agent link", Box::pin(link::run(inner.clone())));
        Self { inner }
    }

    /// Waits until the handshake is complete.
    pub(crate) async fn ready(&self) -> Result<(), VmErrorKind> {
        poll_fn(|cx| {
            let mut state = self.inner.lock();
            if let Some(kind) = &state.dead {
                return Poll::Ready(Err(kind.clone()));
            }
            if state.link == LinkState::Up {
                return Poll::Ready(Ok(()));
            }
            if !state.up_wakers.iter().any(|known| known.will_wake(cx.waker())) {
                state.up_wakers.push(cx.waker().clone());
            }
            Poll::Pending
        })
        .await
    }

    /// Fails everything that is under way, and every later request, and lets the link go.
    pub(crate) fn end(&self, kind: &VmErrorKind) {
        let mut state = self.inner.lock();
        state.dead.get_or_insert_with(|| kind.clone());
        state.cut_streams(kind);
        state.wake_link();
        state.wake_up_waiters();
    }

    /// Fails everything that is under way and every later request, but keeps the link for
    /// [`shutdown`](Self::shutdown); the guest's processes are left to it.
    pub(crate) fn interrupt(&self) {
        let mut state = self.inner.lock();
        state.shutting_down = true;
        let why = if planted(Bug::InterruptedLooksLost) {
            VmErrorKind::Disconnected
        } else {
            VmErrorKind::Interrupted
        };
        state.cut_streams(&why);
        state.wake_up_waiters();
    }

    /// Asks the guest to power off. Resolves once the agent has accepted that.
    pub(crate) async fn shutdown(&self, signal: u8, grace: Duration) -> Result<(), VmErrorKind> {
        let grace_ns = u64::try_from(grace.as_nanos()).unwrap_or(u64::MAX);
        let guard = self.open_always(Request::Shutdown { signal, grace_ns })?;
        guard.outcome().await.map(drop)
    }

    /// Sets the guest's wall clock.
    pub(crate) async fn set_clock(&self, wall: Duration) -> Result<(), VmErrorKind> {
        let wall_ns = u64::try_from(wall.as_nanos()).unwrap_or(u64::MAX);
        self.unary(Request::SetClock { wall_ns }).await.map(drop)
    }

    /// Reseeds the guest's random pool.
    pub(crate) async fn reseed(&self, entropy: [u8; 32]) -> Result<(), VmErrorKind> {
        self.unary(Request::Reseed { entropy }).await.map(drop)
    }

    /// Gives the round-trip time of a request.
    pub(crate) async fn ping(&self) -> Result<Duration, VmErrorKind> {
        let began = self.inner.parts.env.now();
        self.unary(Request::Ping).await?;
        Ok(self.inner.parts.env.now().saturating_sub(began))
    }

    /// Has the link send what it was left to send at leisure.
    pub(crate) fn flush(&self) {
        self.inner.lock().wake_link();
    }

    pub(crate) fn counters(&self) -> ClientCounters {
        let state = self.inner.lock();
        ClientCounters {
            sent_bytes: state.sent_bytes,
            received_bytes: state.received_bytes,
            reconnects: state.reconnects,
        }
    }

    /// Makes a request that is answered once, within the time that requests have.
    async fn unary(&self, request: Request) -> Result<Reply, VmErrorKind> {
        let timeout = self.inner.parts.timeouts.request;
        let guard = self.open(request)?;
        self.deadline(timeout, guard.outcome()).await
    }

    /// Waits for `work`, but no longer than `after` of time in which the machine was not paused.
    async fn deadline<T>(
        &self,
        after: Duration,
        work: impl Future<Output = Result<T, VmErrorKind>>,
    ) -> Result<T, VmErrorKind> {
        let parts = &self.inner.parts;
        parts
            .pauses
            .timeout(&*parts.env, after, work)
            .await
            .unwrap_or_else(|elapsed| Err(VmErrorKind::Timeout { after: elapsed.after }))
    }

    fn open(&self, request: Request) -> Result<StreamGuard, VmErrorKind> {
        let state = self.inner.lock();
        if state.shutting_down {
            return Err(state.dead.clone().unwrap_or(VmErrorKind::Interrupted));
        }
        drop(state);
        self.open_always(request)
    }

    fn open_always(&self, request: Request) -> Result<StreamGuard, VmErrorKind> {
        self.open_with(request, |_| {})
    }

    /// Opens a stream; `prepare` may give it input to send at once.
    fn open_with(
        &self,
        request: Request,
        prepare: impl FnOnce(&mut Stream),
    ) -> Result<StreamGuard, VmErrorKind> {
        if !vm_guest_protocol::frame::fits(&request) && !planted(Bug::RequestMayBeTooLarge) {
            return Err(VmErrorKind::invalid("request", "larger than a frame may be"));
        }
        let mut state = self.inner.lock();
        if let Some(kind) = &state.dead {
            return Err(kind.clone());
        }
        let id = state.next_stream;
        state.next_stream = id.checked_add(1).ok_or_else(|| VmErrorKind::ResourceExhausted {
            resource: "stream numbers of this session".to_owned(),
        })?;
        let mut stream = Stream::new(request);
        prepare(&mut stream);
        state.streams.insert(id, stream);
        self.inner.announce(&mut state, id);
        state.wake_link();
        Ok(StreamGuard { client: self.clone(), id })
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, ClientState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Encodes a frame for the link, where there is one; what is not sent now is repeated when it is back.
    fn send(&self, state: &mut ClientState, stream: StreamId, frame: &Frame) {
        if state.link == LinkState::Up {
            encode(stream, frame, &mut state.out);
            self.record(&Occurrence::Frame { sent: true, stream, frame });
        }
    }

    fn record(&self, occurrence: &Occurrence<'_>) {
        self.parts.observer.record(self.parts.vm, occurrence);
    }

    /// Sends what makes a stream known to the agent on a new connection, or for the first time.
    fn announce(&self, state: &mut ClientState, id: StreamId) {
        let Some(stream) = state.streams.get_mut(&id) else { return };
        if stream.end.is_some() || state.link != LinkState::Up {
            return;
        }
        if stream.started.is_some() {
            for channel in stream.outputs() {
                let Some(stream) = state.streams.get_mut(&id) else { return };
                if let Some(credit) = stream.channel_mut(*channel).credit(*channel, true) {
                    self.send(state, id, &credit);
                }
            }
        } else if !(planted(Bug::RequestIsNotRepeated) && state.reconnects > 0) {
            let open = Frame::Open(stream.request.clone());
            self.send(state, id, &open);
        }
        self.send_input(state, id);
    }

    /// Sends as much input of a stream as the agent will hold.
    fn send_input(&self, state: &mut ClientState, id: StreamId) {
        if state.link != LinkState::Up {
            return;
        }
        while let Some(frame) = state.streams.get_mut(&id).and_then(|it| it.stdin.next_frame()) {
            self.send(state, id, &frame);
        }
    }

    /// Puts the first frame of a connection together, and gives the streams that it names.
    fn hello(&self, state: &ClientState, resume: bool) -> (Frame, Vec<StreamId>) {
        let live: Vec<_> =
            if resume { state.streams.keys().copied().collect() } else { Vec::new() };
        let hello = Hello {
            version: vm_guest_protocol::PROTOCOL_VERSION,
            session: state.session,
            resume,
            live: live.clone(),
        };
        (Frame::Hello(hello), live)
    }
}

impl ClientState {
    fn cut_streams(&mut self, kind: &VmErrorKind) {
        for stream in self.streams.values_mut() {
            stream.finish(End::Cut(kind.clone()));
        }
    }

    fn wake_link(&mut self) {
        if let Some(waker) = self.link_waker.take() {
            waker.wake();
        }
    }

    fn wake_up_waiters(&mut self) {
        for waker in self.up_wakers.drain(..) {
            waker.wake();
        }
    }
}

/// An open stream. Dropping it closes the stream; a process that was not detached is then killed.
#[derive(Debug)]
struct StreamGuard {
    client: AgentClient,
    id: StreamId,
}

impl StreamGuard {
    /// Waits until `look` finds what it looks for in the stream.
    async fn wait<T>(&self, mut look: impl FnMut(&mut Stream) -> Option<T>) -> T {
        poll_fn(|cx| {
            let mut state = self.client.inner.lock();
            let found = match state.streams.get_mut(&self.id) {
                Some(stream) => {
                    let found = look(stream);
                    if found.is_none() {
                        stream.register(cx.waker());
                    }
                    found
                }
                None => None,
            };
            found.map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }

    /// Waits for the stream's end, where that is a plain answer.
    async fn outcome(&self) -> Result<Reply, VmErrorKind> {
        match self.wait(|stream| stream.end.clone()).await {
            End::Done(reply) => Ok(reply),
            End::Failed(error) => Err(kind_of(&error)),
            End::Cut(kind) => Err(kind),
            End::Exited(_) => Err(odd_answer()),
        }
    }

    /// Waits for the agent's first answer.
    async fn started(&self) -> Result<vm_guest_protocol::Started, VmErrorKind> {
        self.wait(|stream| match (&stream.started, &stream.end) {
            (Some(started), _) => Some(Ok(started.clone())),
            (None, Some(End::Failed(error))) => Some(Err(kind_of(error))),
            (None, Some(End::Cut(kind))) => Some(Err(kind.clone())),
            (None, Some(_)) => Some(Err(odd_answer())),
            (None, None) => None,
        })
        .await
    }

    /// Changes the stream, then sends what that allows to be sent.
    fn update<T>(&self, change: impl FnOnce(&mut Stream) -> T) -> Option<T> {
        let inner = &self.client.inner;
        let mut state = inner.lock();
        let changed = change(state.streams.get_mut(&self.id)?);
        inner.send_input(&mut state, self.id);
        state.wake_link();
        Some(changed)
    }

    /// Tells the agent of the room that came free on a channel, where that is enough to mention.
    fn grant(&self, channel: vm_guest_protocol::Channel) {
        let inner = &self.client.inner;
        let mut state = inner.lock();
        let Some(stream) = state.streams.get_mut(&self.id) else { return };
        if let Some(credit) = stream.channel_mut(channel).credit(channel, false) {
            inner.send(&mut state, self.id, &credit);
            state.wake_link();
        }
    }
}

impl Drop for StreamGuard {
    fn drop(&mut self) {
        let inner = &self.client.inner;
        let mut state = inner.lock();
        let Some(stream) = state.streams.remove(&self.id) else { return };
        if state.shutting_down {
            return;
        }
        if !planted(Bug::DroppedStaysOpen) {
            inner.send(&mut state, self.id, &Frame::Close);
        }
        // The agent only forgets a stream that has ended: that may travel with the next request.
        let over = matches!(stream.end, Some(End::Done(_) | End::Failed(_) | End::Exited(_)));
        if !over && !planted(Bug::DropWaitsForNextRequest) {
            state.wake_link();
        }
    }
}

/// The agent answered with something that does not belong to the request.
fn odd_answer() -> VmErrorKind {
    VmErrorKind::Internal { detail: "the agent's answer does not fit the request".to_owned() }
}

/// Maps an error of the guest to a kind; the only place that does.
fn kind_of(error: &GuestError) -> VmErrorKind {
    use vm_guest_protocol::GuestErrorKind as G;
    use vm_trait::{ExecFailure, GuestFileError};
    let exec = |failure| VmErrorKind::ExecFailed { failure };
    let file = |error_kind| VmErrorKind::GuestFile { path: error.path.clone(), error: error_kind };
    match error.kind {
        G::NotFound => file(GuestFileError::NotFound),
        G::PermissionDenied => file(GuestFileError::PermissionDenied),
        G::AlreadyExists => file(GuestFileError::AlreadyExists),
        G::NotADirectory => file(GuestFileError::NotADirectory),
        G::IsADirectory => file(GuestFileError::IsADirectory),
        G::DirectoryNotEmpty => file(GuestFileError::DirectoryNotEmpty),
        G::OutOfSpace if planted(Bug::FullDiskLooksLikeIo) => {
            file(GuestFileError::Io { errno: error.errno })
        }
        G::OutOfSpace => file(GuestFileError::OutOfSpace),
        G::ReadOnly => file(GuestFileError::ReadOnly),
        G::InvalidPath => file(GuestFileError::InvalidPath),
        G::ProgramNotFound => exec(ExecFailure::NotFound),
        G::ProgramNotExecutable => exec(ExecFailure::NotExecutable),
        G::BadWorkingDirectory => exec(ExecFailure::BadWorkingDirectory),
        G::UnknownUser => exec(ExecFailure::UnknownUser),
        G::UserNotPermitted => exec(ExecFailure::NotPermitted),
        G::NoSuchProcess => exec(ExecFailure::NoSuchProcess),
        G::OutOfResources => exec(ExecFailure::OutOfResources),
        G::InvalidArgument => VmErrorKind::invalid("request", "refused by the guest agent"),
        G::Unsupported => VmErrorKind::Unsupported { what: "this request to the guest".to_owned() },
        _ if error.path.is_empty() => exec(ExecFailure::Other { errno: error.errno }),
        _ => file(GuestFileError::Io { errno: error.errno }),
    }
}
