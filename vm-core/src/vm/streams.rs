//! Streams to and from the guest's vsock ports.

use super::core::Core;
use crate::{
    agent::PauseClock,
    env::{Elapsed, Env, timeout},
    machine::{Acceptor, Link, Machine, MachineError},
    observe::{Observer, Occurrence, StreamChange},
};
use async_trait::async_trait;
use futures_util::{
    future::{Either, select},
    task::AtomicWaker,
};
use std::{
    collections::BTreeMap,
    fmt,
    future::Future,
    io,
    pin::{Pin, pin},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use vm_guest_protocol::AGENT_PORT;
use vm_planted_bugs::{Bug, planted};
use vm_trait::{
    Capability, GuestListener, GuestListenerHandle, GuestStream, Operation, VmError, VmErrorKind,
    VmId, VmResult,
};

/// What the streams of one life of a machine hang on: it tells them that the machine is going, and that it is gone.
#[derive(Debug, Default)]
pub(super) struct Life {
    /// No stream moves any more.
    cut: AtomicBool,
    state: Mutex<LifeState>,
}

#[derive(Debug, Default)]
struct LifeState {
    /// Why no stream is made any more.
    over: Option<VmErrorKind>,
    last_waiter: u64,
    waiters: BTreeMap<u64, Waker>,
    last_stream: u64,
    streams: BTreeMap<u64, Arc<Halves>>,
}

/// Who waits for a stream.
#[derive(Debug, Default)]
struct Halves {
    reader: AtomicWaker,
    writer: AtomicWaker,
}

impl Life {
    /// Ends the making of streams; those that there are go on. The first reason counts.
    pub(super) fn close(&self, why: &VmErrorKind) {
        let mut state = self.lock();
        state.over.get_or_insert_with(|| why.clone());
        for waker in std::mem::take(&mut state.waiters).into_values() {
            waker.wake();
        }
    }

    /// Ends all streams.
    pub(super) fn cut(&self, why: &VmErrorKind) {
        self.close(why);
        self.cut.store(true, Ordering::Release);
        for halves in self.lock().streams.values() {
            halves.reader.wake();
            halves.writer.wake();
        }
    }

    fn is_cut(&self) -> bool {
        self.cut.load(Ordering::Acquire)
    }

    /// Waits until no stream is made any more, and says why.
    fn over(&self) -> Over<'_> {
        Over { life: self, number: None }
    }

    /// Waits for `work`, but no longer than streams are made.
    async fn unless_over<T>(&self, work: impl Future<Output = T>) -> Result<T, VmErrorKind> {
        match select(self.over(), pin!(work)).await {
            Either::Left((kind, _)) => Err(kind),
            Either::Right((output, _)) => Ok(output),
        }
    }

    fn lock(&self) -> MutexGuard<'_, LifeState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits for the end of a life; it forgets its waker when it is dropped.
struct Over<'a> {
    life: &'a Life,
    number: Option<u64>,
}

impl Future for Over<'_> {
    type Output = VmErrorKind;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<VmErrorKind> {
        let mut state = self.life.lock();
        if let Some(kind) = &state.over {
            return Poll::Ready(kind.clone());
        }
        let number = self.number.unwrap_or(state.last_waiter + 1);
        state.last_waiter = state.last_waiter.max(number);
        state.waiters.insert(number, cx.waker().clone());
        drop(state);
        self.number = Some(number);
        Poll::Pending
    }
}

impl Drop for Over<'_> {
    fn drop(&mut self) {
        if let Some(number) = self.number {
            self.life.lock().waiters.remove(&number);
        }
    }
}

/// What making a stream needs of a machine that runs.
struct Running {
    machine: Arc<dyn Machine>,
    life: Arc<Life>,
    pauses: Arc<PauseClock>,
}

impl Core {
    pub(super) async fn connect(&self, port: u32) -> Result<GuestStream, VmErrorKind> {
        let running = self.may_stream(Operation::Connect)?;
        check_port(port)?;
        if port == AGENT_PORT && !planted(Bug::AgentPortIsOpen) {
            return Err(VmErrorKind::invalid("port", format!("{AGENT_PORT} is the agent's own")));
        }
        let connected = self.ask_machine(&running, running.machine.connect(port)).await;
        let link = connected?.map_err(|error| match error {
            MachineError::NotListening => VmErrorKind::ConnectRefused { port },
            error => error.into(),
        })?;
        let witness = self.witness();
        Ok(wrap(&witness, &running.life, port, link, StreamChange::Connected))
    }

    pub(super) async fn listen(&self, port: u32) -> Result<GuestListener, VmErrorKind> {
        let running = self.may_stream(Operation::Listen)?;
        check_port(port)?;
        let listening = self.ask_machine(&running, running.machine.listen(port)).await;
        Ok(GuestListener::new(Box::new(CoreListener {
            witness: self.witness(),
            env: self.parts.env.clone(),
            patience: self.config.timeouts.kill,
            life: running.life,
            port,
            acceptor: Some(listening??),
        })))
    }

    fn witness(&self) -> Witness {
        Witness { vm: self.id, observer: self.parts.observer.clone() }
    }

    fn may_stream(&self, operation: Operation) -> Result<Running, VmErrorKind> {
        self.require(Capability::Vsock)?;
        let shared = self.lock();
        shared.state.admits(operation)?;
        Ok(Running {
            machine: shared.machine.clone().ok_or(VmErrorKind::Disconnected)?,
            life: shared.life.clone(),
            pauses: shared.pauses.clone(),
        })
    }

    /// Waits for the machine's answer as long as a request may take, the machine lives, and nobody stops it.
    async fn ask_machine<T>(
        &self,
        running: &Running,
        asked: impl Future<Output = Result<T, MachineError>>,
    ) -> Result<Result<T, MachineError>, VmErrorKind> {
        let after = self.config.timeouts.request;
        let answer = running.life.unless_over(async {
            match asked.await {
                // Why it has ended is known in a moment.
                Err(MachineError::Ended) => std::future::pending().await,
                answer => answer,
            }
        });
        let answer = running.pauses.timeout(&*self.parts.env, after, answer).await;
        answer.unwrap_or_else(|Elapsed { after }| Err(VmErrorKind::Timeout { after }))
    }
}

fn check_port(port: u32) -> Result<(), VmErrorKind> {
    if port == 0 || port == u32::MAX {
        return Err(VmErrorKind::invalid("port", format!("{port} given, 1 to 4294967294 exist")));
    }
    Ok(())
}

/// Reports of streams, which may outlive their machine.
#[derive(Clone, Debug)]
struct Witness {
    vm: VmId,
    observer: Arc<dyn Observer>,
}

/// A listener that fails once the life of its machine is over.
struct CoreListener {
    witness: Witness,
    env: Arc<dyn Env>,
    /// How long it may take until the end of a machine is known.
    patience: Duration,
    life: Arc<Life>,
    port: u32,
    /// Gone once the life is over.
    acceptor: Option<Box<dyn Acceptor>>,
}

impl CoreListener {
    async fn next(&mut self) -> Result<GuestStream, VmErrorKind> {
        let (life, acceptor) = (&self.life, &mut self.acceptor);
        let accepted = life.unless_over(async {
            match acceptor {
                Some(acceptor) => acceptor.accept().await,
                None => Err(MachineError::Ended),
            }
        });
        let kind = match accepted.await {
            Ok(Ok(link)) => {
                let (port, change) = (self.port, StreamChange::Accepted);
                return Ok(wrap(&self.witness, life, port, link, change));
            }
            Ok(Err(MachineError::Ended)) => {
                let why = timeout(&*self.env, self.patience, life.over()).await;
                why.unwrap_or(VmErrorKind::Disconnected)
            }
            Ok(Err(error)) => return Err(error.into()),
            Err(kind) => kind,
        };
        self.acceptor = None;
        Err(kind)
    }
}

#[async_trait]
impl GuestListenerHandle for CoreListener {
    fn port(&self) -> u32 {
        self.port
    }

    async fn accept(&mut self) -> VmResult<GuestStream> {
        let vm = self.witness.vm;
        let accepted = self.next().await;
        accepted.map_err(|kind| VmError::new(Operation::Listen, kind).with_vm(vm))
    }
}

impl fmt::Debug for CoreListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CoreListener").field("port", &self.port).finish_non_exhaustive()
    }
}

fn wrap(
    witness: &Witness,
    life: &Arc<Life>,
    port: u32,
    link: Box<dyn Link>,
    change: StreamChange,
) -> GuestStream {
    let halves = Arc::<Halves>::default();
    let number = {
        let mut state = life.lock();
        state.last_stream += 1;
        let number = state.last_stream;
        state.streams.insert(number, halves.clone());
        number
    };
    let (witness, life) = (witness.clone(), life.clone());
    let stream = CoreStream { witness, life, number, port, halves, link };
    stream.record(change);
    GuestStream::new(port, Box::new(stream))
}

/// A stream that ends with the life of its machine.
struct CoreStream {
    witness: Witness,
    life: Arc<Life>,
    number: u64,
    port: u32,
    halves: Arc<Halves>,
    link: Box<dyn Link>,
}

impl CoreStream {
    fn record(&self, change: StreamChange) {
        let occurrence = Occurrence::Stream { number: self.number, port: self.port, change };
        self.witness.observer.record(self.witness.vm, &occurrence);
    }

    /// Turns waiting into an error once the machine is gone.
    fn unless_cut<T>(
        life: &Life,
        waiter: &AtomicWaker,
        cx: &Context<'_>,
        polled: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if polled.is_ready() {
            return polled;
        }
        waiter.register(cx.waker());
        if life.is_cut() { Poll::Ready(Err(reset())) } else { Poll::Pending }
    }
}

impl AsyncRead for CoreStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let stream = &mut *self;
        let polled = Pin::new(&mut *stream.link).poll_read(cx, buf);
        Self::unless_cut(&stream.life, &stream.halves.reader, cx, polled)
    }
}

impl AsyncWrite for CoreStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.life.is_cut() {
            return Poll::Ready(Err(reset()));
        }
        let stream = &mut *self;
        let polled = Pin::new(&mut *stream.link).poll_write(cx, buf);
        Self::unless_cut(&stream.life, &stream.halves.writer, cx, polled)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let stream = &mut *self;
        let polled = Pin::new(&mut *stream.link).poll_flush(cx);
        Self::unless_cut(&stream.life, &stream.halves.writer, cx, polled)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let stream = &mut *self;
        let polled = Pin::new(&mut *stream.link).poll_shutdown(cx);
        Self::unless_cut(&stream.life, &stream.halves.writer, cx, polled)
    }
}

impl Drop for CoreStream {
    fn drop(&mut self) {
        self.life.lock().streams.remove(&self.number);
        self.record(StreamChange::Dropped);
    }
}

fn reset() -> io::Error {
    io::ErrorKind::ConnectionReset.into()
}
