//! Streams between the host and any port: who listens on the host, and what is under way.

use super::{
    Shared,
    guest::Guest,
    link::{Pipe, SimLink},
};
use crate::{
    guest::Address,
    ledger::Held,
    rng::{Purpose, Streams},
    trace::Tag,
};
use async_trait::async_trait;
use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    future::poll_fn,
    sync::Arc,
    task::{Poll, Waker},
    time::Duration,
};
use vm_core::{
    fault::FaultKind,
    machine::{Acceptor, BACKLOG, Link, MachineError, MachineStatus},
};
use vm_guest_agent::core::ConnId;
use vm_planted_bugs::{Bug, planted};

/// How long the other side takes to answer who connects.
const ANSWER: (Duration, Duration) = (Duration::from_micros(30), Duration::from_micros(300));

/// All connections of a machine, and the ports that its host listens on.
#[derive(Debug, Default)]
pub(super) struct Lines {
    pub(super) pipes: BTreeMap<ConnId, Pipe>,
    listeners: BTreeMap<u32, Listener>,
    /// TCP connections that programs want to the host: socket and port.
    pub(super) tcp_dials: Vec<(u32, u16)>,
    next_conn: u64,
}

#[derive(Debug, Default)]
struct Listener {
    waiting: VecDeque<ConnId>,
    acceptor: Option<Waker>,
}

impl Lines {
    pub(super) fn add(&mut self, pipe: Pipe) -> ConnId {
        let conn = ConnId(self.next_conn);
        self.next_conn += 1;
        self.pipes.insert(conn, pipe);
        conn
    }

    /// Ends everything; the machine is gone.
    pub(super) fn end(&mut self) {
        for pipe in self.pipes.values_mut() {
            pipe.break_down(&mut |_| 0);
            pipe.end();
        }
        self.pipes.retain(|_, pipe| !pipe.host_dropped);
        for mut listener in std::mem::take(&mut self.listeners).into_values() {
            for conn in listener.waiting {
                self.pipes.remove(&conn);
            }
            if let Some(waker) = listener.acceptor.take() {
                waker.wake();
            }
        }
    }

    /// Takes up what the guest's programs dial: the answer comes after a moment.
    pub(super) fn dialled(&mut self, socket: u32, port: u32, now: Duration, streams: &Streams) {
        let answer_at = now + streams.duration(Purpose::Vsock, ANSWER.0, ANSWER.1);
        let listener = self.listeners.get(&port).filter(|it| it.waiting.len() < BACKLOG);
        let accepted = listener.is_some();
        let conn = self.add(Pipe::to_socket(socket, answer_at, accepted));
        if let Some(listener) = self.listeners.get_mut(&port).filter(|_| accepted) {
            listener.waiting.push_back(conn);
            if let Some(waker) = listener.acceptor.take() {
                waker.wake();
            }
        }
    }
}

impl Shared {
    /// Opens a stream to a port of the guest. While the machine stands still, that takes until it goes on.
    pub(super) async fn dial(self: &Arc<Self>, address: Address) -> Result<SimLink, MachineError> {
        let purpose = match address {
            Address::Vsock(_) => Purpose::Vsock,
            Address::Tcp(_) => Purpose::Network,
        };
        self.world().enter().await;
        self.world().delay(purpose, ANSWER.0, ANSWER.1).await;
        loop {
            let mut changed = std::pin::pin!(self.changed());
            changed.as_mut().enable();
            if let Some(dialled) = self.dial_now(address) {
                return dialled;
            }
            changed.await;
        }
    }

    /// Opens a stream at once; `None` while the machine stands still.
    fn dial_now(self: &Arc<Self>, address: Address) -> Option<Result<SimLink, MachineError>> {
        let mut state = self.lock();
        let state = &mut *state;
        match state.status {
            MachineStatus::Running => {}
            MachineStatus::Ended => return Some(Err(MachineError::Ended)),
            MachineStatus::Paused | MachineStatus::Fresh => return None,
        }
        let now = self.world().now();
        let guest = state.guest.as_mut()?;
        let (what, port) = match address {
            Address::Vsock(port) => (8, u64::from(port)),
            Address::Tcp(port) => (11, u64::from(port)),
        };
        let over_tcp = matches!(address, Address::Tcp(_));
        if over_tcp
            && guest.os.socket_listens(address)
            && self.strike(FaultKind::NetRefused).is_some()
        {
            return Some(Err(MachineError::Failed("the host refuses it".to_owned())));
        }
        let conn = guest.os.socket_dial(address).map(|socket| {
            let pipe = Pipe::of_socket(socket);
            state.lines.add(if over_tcp { pipe.over_tcp() } else { pipe })
        });
        let numbers = [what, port, conn.map_or(u64::MAX, |conn| conn.0)];
        self.world().note(Some(self.vm()), Tag::Machine, &numbers, || match conn {
            Some(conn) => format!("{address:?} dialled, connection {}", conn.0),
            None => format!("{address:?} dialled, and nothing listens"),
        });
        let Some(conn) = conn else { return Some(Err(MachineError::NotListening)) };
        if let Some(guest) = &mut state.guest {
            guest.act_again(now);
        }
        self.arm(state, now, now);
        Some(Ok(SimLink::new(Arc::clone(self), conn)))
    }

    /// Listens on a port of the host.
    pub(super) fn listen(self: &Arc<Self>, port: u32) -> Result<SimAcceptor, MachineError> {
        let mut state = self.lock();
        if state.exit.is_some() {
            return Err(MachineError::Ended);
        }
        if state.lines.listeners.contains_key(&port) && !planted(Bug::GuestPortIsShared) {
            return Err(MachineError::PortInUse(port));
        }
        state.lines.listeners.insert(port, Listener::default());
        drop(state);
        let held = self.world().counters.streams.hold();
        Ok(SimAcceptor { machine: Arc::clone(self), port, _held: held })
    }
}

/// Takes the streams that the guest opens to a port.
pub(super) struct SimAcceptor {
    machine: Arc<Shared>,
    port: u32,
    _held: Held,
}

#[async_trait]
impl Acceptor for SimAcceptor {
    async fn accept(&mut self) -> Result<Box<dyn Link>, MachineError> {
        self.machine.world().enter().await;
        let conn = poll_fn(|cx| {
            let mut state = self.machine.lock();
            let Some(listener) = state.lines.listeners.get_mut(&self.port) else {
                return Poll::Ready(Err(MachineError::Ended));
            };
            match listener.waiting.pop_front() {
                Some(conn) => Poll::Ready(Ok(conn)),
                None => {
                    listener.acceptor = Some(cx.waker().clone());
                    Poll::Pending
                }
            }
        });
        let conn = conn.await?;
        Ok(Box::new(SimLink::new(Arc::clone(&self.machine), conn)))
    }
}

impl Drop for SimAcceptor {
    fn drop(&mut self) {
        let listener = self.machine.lock().lines.listeners.remove(&self.port);
        for conn in listener.into_iter().flat_map(|listener| listener.waiting) {
            self.machine.close_link(conn, true);
        }
    }
}

impl fmt::Debug for SimAcceptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimAcceptor").field("port", &self.port).finish_non_exhaustive()
    }
}

impl Guest {
    /// Tells the host what programs dial.
    pub(super) fn pass_dials(&mut self, now: Duration, lines: &mut Lines, streams: &Streams) {
        if self.os.socket_has_dials() {
            for (socket, address) in self.os.socket_take_dials() {
                match address {
                    Address::Vsock(port) => lines.dialled(socket, port, now, streams),
                    Address::Tcp(port) => lines.tcp_dials.push((socket, port)),
                }
            }
        }
    }
}
