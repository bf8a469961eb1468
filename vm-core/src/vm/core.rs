//! What the handle and the actor of one machine share.

use super::{
    actor::{Actor, Command, Token, Work},
    events::Subscribers,
    streams::Life,
};
use crate::{
    agent::{AgentClient, LinkListener, PauseClock},
    backend::{Live, Parts},
    machine::Machine,
    observe::Occurrence,
};
use bytes::Bytes;
use std::{
    collections::VecDeque,
    fmt,
    future::poll_fn,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    time::Duration,
};
use vm_planted_bugs::{Bug, planted};
use vm_trait::{
    BootTimes, Capability, Operation, StateInput, VmConfig, VmErrorKind, VmEvent, VmExit, VmId,
    VmState,
};

/// What the handle and the actor of one machine share.
pub(crate) struct Core {
    pub(super) id: VmId,
    pub(super) config: Arc<VmConfig>,
    pub(super) parts: Arc<Parts>,
    shared: Mutex<Shared>,
    _live: Live,
}

pub(super) struct Shared {
    pub(super) state: VmState,
    pub(super) queue: VecDeque<Command>,
    pub(super) actor_waker: Option<Waker>,
    state_wakers: Vec<Waker>,
    /// Counts how often the machine became Stopped or Crashed.
    pub(super) ends: u64,
    pub(super) last_exit: Option<VmExit>,
    pub(super) machine: Option<Arc<dyn Machine>>,
    pub(super) client: Option<AgentClient>,
    pub(super) pauses: Arc<PauseClock>,
    /// What the streams of the machine that there is hang on.
    pub(super) life: Arc<Life>,
    /// The console of a machine that is gone.
    pub(super) console: Bytes,
    pub(super) boot: Option<BootTimes>,
    pub(super) up_since: Option<Duration>,
    pub(super) subscribers: Subscribers,
    pub(super) lives: u64,
    calls: u64,
    tokens: u64,
}

impl Core {
    /// Makes a machine in Created and its actor.
    pub(crate) fn create(parts: Arc<Parts>, config: Arc<VmConfig>) -> Arc<Self> {
        let live = parts.count();
        let core = Arc::new(Self {
            id: VmId(if planted(Bug::IdsRepeat) { 1 } else { parts.env.random_u64() }),
            config: if planted(Bug::ConfigIsForgotten) { Arc::default() } else { config },
            parts,
            shared: Mutex::new(Shared {
                state: VmState::Created,
                queue: VecDeque::new(),
                actor_waker: None,
                state_wakers: Vec::new(),
                ends: 0,
                last_exit: None,
                machine: None,
                client: None,
                pauses: Arc::default(),
                life: Arc::default(),
                console: Bytes::new(),
                boot: None,
                up_since: None,
                subscribers: Subscribers::default(),
                lives: 0,
                calls: 0,
                tokens: 0,
            }),
            _live: live,
        });
        let actor = Actor::new(core.clone());
        core.parts.env.spawn("vm", Box::pin(actor.run()));
        core
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn pauses(&self) -> Arc<PauseClock> {
        self.lock().pauses.clone()
    }

    /// Gives how long the present machine stood still in all.
    pub(super) fn stood_still(&self) -> Duration {
        self.pauses().paused(self.now())
    }

    pub(super) fn now(&self) -> Duration {
        self.parts.env.now()
    }

    pub(super) fn has(&self, capability: Capability) -> bool {
        self.parts.hypervisor.capabilities().has(capability)
    }

    /// Refuses what the backend cannot do.
    pub(super) fn require(&self, capability: Capability) -> Result<(), VmErrorKind> {
        if self.has(capability) {
            return Ok(());
        }
        Err(VmErrorKind::Unsupported { what: capability.name().to_owned() })
    }

    /// Queues work for the actor. A stop or kill takes everything before it out of the queue.
    pub(super) fn enqueue(&self, command: Command) {
        let mut shared = self.lock();
        if command.work.is_urgent() {
            let waiting = std::mem::take(&mut shared.queue);
            for earlier in waiting {
                if earlier.work.is_urgent() {
                    shared.queue.push_back(earlier);
                } else {
                    earlier.refuse(VmErrorKind::Interrupted);
                }
            }
        }
        shared.queue.push_back(command);
        shared.wake_actor();
    }

    /// Moves the state, where the input can happen in it, and tells everybody.
    pub(super) fn transition(&self, input: &StateInput) {
        let mut shared = self.lock();
        let Some(next) = shared.state.next(input) else { return };
        if next == shared.state {
            return;
        }
        let from = std::mem::replace(&mut shared.state, next.clone());
        let occurrence = Occurrence::State { from: &from, to: &next };
        self.parts.observer.record(self.id, &occurrence);
        if next.is_ended() {
            shared.ends += 1;
        }
        let kept = planted(Bug::FirstExitIsKept) && shared.last_exit.is_some();
        if next.is_ended() && !kept {
            shared.last_exit = Some(match (&next, input) {
                (VmState::Crashed(reason), _) => VmExit::Crashed(reason.clone()),
                (_, StateInput::PoweredOff) if from != VmState::Stopping => VmExit::PoweredOff,
                _ => VmExit::Stopped,
            });
        }
        let told = match next {
            VmState::Crashed(_) if planted(Bug::CrashHasNoReason) => {
                VmState::Crashed(vm_trait::CrashReason::BootFailed)
            }
            next => next,
        };
        shared.subscribers.publish(&VmEvent::State { from, to: told });
        let woken = if planted(Bug::OneWaiterIsWoken) { 1 } else { usize::MAX };
        for waker in shared.state_wakers.drain(..).take(woken) {
            waker.wake();
        }
    }

    pub(super) fn publish(&self, event: &VmEvent) {
        self.lock().subscribers.publish(event);
    }

    /// Waits until `look` finds what it looks for, looking again at every change of the state.
    pub(super) async fn watch<T>(&self, mut look: impl FnMut(&Shared) -> Option<T>) -> T {
        poll_fn(|cx| {
            let mut shared = self.lock();
            if let Some(found) = look(&shared) {
                return Poll::Ready(found);
            }
            if !shared.state_wakers.iter().any(|known| known.will_wake(cx.waker())) {
                shared.state_wakers.push(cx.waker().clone());
            }
            Poll::Pending
        })
        .await
    }

    /// Names a call of start or restore.
    pub(super) fn next_token(&self) -> Token {
        let mut shared = self.lock();
        shared.tokens += 1;
        Token(shared.tokens)
    }

    /// Begins the account of an operation.
    pub(super) fn call(&self, operation: Operation, detail: &str) -> Call<'_> {
        let number = {
            let mut shared = self.lock();
            shared.calls += 1;
            shared.calls
        };
        let begun = Occurrence::Begun { operation, call: number, detail };
        self.parts.observer.record(self.id, &begun);
        Call { core: self, operation, number, ended: false }
    }

    /// Notes a measured time.
    pub(super) fn took(&self, stage: &'static str, duration: Duration) {
        self.parts.observer.record(self.id, &Occurrence::Took { stage, duration });
    }
}

impl Shared {
    pub(super) fn wake_actor(&mut self) {
        if let Some(waker) = self.actor_waker.take() {
            waker.wake();
        }
    }

    pub(super) fn watch_actor(&mut self, cx: &Context<'_>) {
        match &mut self.actor_waker {
            Some(known) => known.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
    }

    /// Says whether a stop or kill waits to be served, or, for `kills_only`, a kill.
    pub(super) fn is_urgent(&self, kills_only: bool) -> bool {
        if planted(Bug::StopWaitsItsTurn) {
            return false;
        }
        self.queue.iter().any(|command| match command.work {
            Work::Stop(_) => !kills_only,
            Work::Kill | Work::Dispose => true,
            _ => false,
        })
    }
}

impl LinkListener for Core {
    fn link(&self, up: bool) {
        self.publish(if up { &VmEvent::AgentBack } else { &VmEvent::AgentLost });
    }
}

impl fmt::Debug for Core {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Core").field("id", &self.id).finish_non_exhaustive()
    }
}

/// The account of one operation: how it ended, or that it was dropped.
pub(super) struct Call<'a> {
    core: &'a Core,
    operation: Operation,
    number: u64,
    ended: bool,
}

impl Call<'_> {
    /// Notes the end and gives the result as callers see it.
    pub(super) fn end<T>(mut self, result: Result<T, VmErrorKind>) -> vm_trait::VmResult<T> {
        self.ended = true;
        self.note(result.as_ref().map_or_else(VmErrorKind::code, |_| "ok"));
        let (operation, vm) = (self.operation, self.core.id);
        result.map_err(|kind| {
            let error = vm_trait::VmError::new(operation, kind);
            if planted(Bug::CallForgetsMachine) { error } else { error.with_vm(vm) }
        })
    }

    fn note(&self, outcome: &'static str) {
        let (operation, call) = (self.operation, self.number);
        let ended = Occurrence::Ended { operation, call, outcome };
        self.core.parts.observer.record(self.core.id, &ended);
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        if !self.ended {
            self.note("dropped");
        }
    }
}
