//! The actor: one task per machine that carries out its lifecycle, one thing at a time.
//!
//! Because the work is done here and not in the caller's future, a caller that goes away cannot leave anything
//! half-done: the actor finishes it or undoes it. Whatever the actor waits for, it also waits for a stop, for the
//! machine's end and for the deadline.

use super::{
    capture::{Saved, Tracked},
    core::Core,
    lifecycle::Origin,
};
use crate::{
    error::kind_of_exit,
    machine::{Machine, MachineError, MachineExit, MachineStatus},
};
use futures_core::future::BoxFuture;
use std::{
    collections::VecDeque,
    future::{Future, poll_fn},
    pin::pin,
    sync::Arc,
    task::Poll,
    time::Duration,
};
use tokio::sync::oneshot;
use vm_planted_bugs::{Bug, planted};
use vm_trait::{
    CrashReason, ForkOptions, Inspection, Operation, RestoreOptions, Snapshot, SnapshotOptions,
    StateInput, StopOptions, VmErrorKind, VmInstance, VmResult,
};

/// What the actor is asked to do.
pub(crate) enum Work {
    Start(Token),
    Pause,
    Resume,
    Snapshot(SnapshotOptions),
    Restore(Saved, RestoreOptions, Token),
    /// The caller of a start or restore went away before it learnt that it was done.
    Undo(Token),
    Fork(ForkOptions),
    Inspect,
    /// Take over a machine that was forked from another VM's.
    Adopt {
        machine: Arc<dyn Machine>,
        resume: bool,
    },
    Stop(StopOptions),
    Kill,
    /// The last handle was dropped.
    Dispose,
}

/// Names one call of start or restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Token(pub(super) u64);

/// What comes of it.
pub(crate) enum Answer {
    Done,
    Snapshot(Box<Snapshot>),
    Children(Vec<VmResult<Arc<dyn VmInstance>>>),
    Inspection(Box<Inspection>),
}

/// Where an answer goes.
pub(crate) type Reply = oneshot::Sender<Result<Answer, VmErrorKind>>;

/// Work with the place for its answer.
pub(crate) struct Command {
    pub(super) work: Work,
    pub(super) reply: Reply,
}

/// Why waiting for something was given up.
pub(super) enum Cut {
    /// A stop or kill wants to be served.
    Preempted,
    /// Nobody waits for the answer any more.
    CallerGone,
    /// The machine has ended.
    Exited(MachineExit),
    /// The time is over.
    Late(Duration),
}

/// The task that carries out a machine's lifecycle.
pub(super) struct Actor {
    pub(super) core: Arc<Core>,
    /// Waits for the end of the machine that there is.
    pub(super) exit: Option<BoxFuture<'static, MachineExit>>,
    /// The guest was restored or forked and has neither been reseeded nor had its clock set.
    pub(super) stale_guest: bool,
    /// The snapshots that another one can be taken on, the oldest first.
    pub(super) tracked: VecDeque<Tracked>,
    /// Which call began the machine's present or last life.
    brought_up_by: Option<Token>,
}

enum Next {
    Command(Command),
    Exit(MachineExit),
}

impl Work {
    pub(super) fn is_urgent(&self) -> bool {
        matches!(self, Self::Stop(_) | Self::Kill | Self::Dispose)
    }

    fn operation(&self) -> Operation {
        match self {
            Self::Start(_) => Operation::Start,
            Self::Pause => Operation::Pause,
            Self::Resume => Operation::Resume,
            Self::Snapshot(_) => Operation::Snapshot,
            Self::Restore(..) | Self::Adopt { .. } => Operation::Restore,
            Self::Fork(_) => Operation::Fork,
            Self::Inspect => Operation::Inspect,
            Self::Stop(_) => Operation::Stop,
            Self::Undo(_) | Self::Kill | Self::Dispose => Operation::Kill,
        }
    }
}

impl Command {
    pub(super) fn refuse(self, kind: VmErrorKind) {
        let _ = self.reply.send(Err(kind));
    }
}

impl Actor {
    pub(super) fn new(core: Arc<Core>) -> Self {
        Self { core, exit: None, stale_guest: false, tracked: VecDeque::new(), brought_up_by: None }
    }

    pub(super) async fn run(mut self) {
        loop {
            match self.next().await {
                Next::Exit(exit) => self.ended(exit).await,
                Next::Command(Command { work: Work::Dispose, .. }) => {
                    let _ = self.end_by_force().await;
                    if !planted(Bug::EventsNeverEnd) {
                        self.core.lock().subscribers.end();
                    }
                    return;
                }
                Next::Command(command) => self.serve(command).await,
            }
        }
    }

    /// Waits for the machine's end or the next command, in this order.
    async fn next(&mut self) -> Next {
        let Self { core, exit, .. } = self;
        poll_fn(|cx| {
            if let Some(waiting) = exit
                && let Poll::Ready(how) = waiting.as_mut().poll(cx)
            {
                *exit = None;
                return Poll::Ready(Next::Exit(how));
            }
            let mut shared = core.lock();
            if let Some(command) = shared.queue.pop_front() {
                return Poll::Ready(Next::Command(command));
            }
            shared.watch_actor(cx);
            Poll::Pending
        })
        .await
    }

    async fn serve(&mut self, command: Command) {
        let Command { work, mut reply } = command;
        let admitted = {
            let state = &self.core.lock().state;
            let twice = state.is_ended() && matches!(work, Work::Stop(_) | Work::Kill);
            match planted(Bug::StopTwiceFails) && twice {
                true => Err(VmErrorKind::InvalidState { state: state.clone() }),
                false => state.admits(work.operation()),
            }
        };
        let done = |done: Result<(), VmErrorKind>| done.map(|()| Answer::Done);
        let answer = match (admitted, work) {
            (Err(kind), _) => Err(kind),
            (Ok(()), Work::Start(token)) => {
                self.brought_up_by = Some(token);
                done(Box::pin(self.start(&mut reply)).await)
            }
            (Ok(()), Work::Pause) => done(self.pause().await),
            (Ok(()), Work::Resume) => done(self.resume().await),
            (Ok(()), Work::Snapshot(options)) => {
                let taken = Box::pin(self.snapshot(&mut reply, options)).await;
                taken.map(|snapshot| Answer::Snapshot(Box::new(snapshot)))
            }
            (Ok(()), Work::Restore(saved, options, token)) => {
                self.brought_up_by = Some(token);
                done(Box::pin(self.restore(&mut reply, saved, options)).await)
            }
            (Ok(()), Work::Fork(options)) => {
                Box::pin(self.fork(&mut reply, &options)).await.map(Answer::Children)
            }
            (Ok(()), Work::Inspect) => Box::pin(self.inspect(&mut reply))
                .await
                .map(|seen| Answer::Inspection(Box::new(seen))),
            (Ok(()), Work::Adopt { machine, resume }) => {
                let origin = Origin::Forked(machine);
                done(Box::pin(self.revive(&mut reply, origin, resume)).await)
            }
            (Ok(()), Work::Undo(token))
                if self.brought_up_by != Some(token) && !planted(Bug::RefusedStartIsUndone) =>
            {
                Ok(Answer::Done)
            }
            (Ok(()), Work::Stop(options)) => done(self.stop(&options).await),
            (Ok(()), Work::Undo(_) | Work::Kill | Work::Dispose) => done(self.end_by_force().await),
        };
        // A caller that is gone does not need its answer.
        let _ = reply.send(answer);
    }

    /// Waits for `work`, but no longer than `after`, and no longer than it is wanted and the machine lives.
    pub(super) async fn drive<T>(
        &mut self,
        reply: &mut Reply,
        after: Duration,
        work: impl Future<Output = T>,
    ) -> Result<T, Cut> {
        let Self { core, exit, .. } = self;
        let mut work = pin!(work);
        let mut alarm: Option<BoxFuture<'static, ()>> = None;
        poll_fn(|cx| {
            if let Poll::Ready(output) = work.as_mut().poll(cx) {
                return Poll::Ready(Ok(output));
            }
            if let Some(waiting) = exit
                && let Poll::Ready(how) = waiting.as_mut().poll(cx)
            {
                *exit = None;
                return Poll::Ready(Err(Cut::Exited(how)));
            }
            {
                let mut shared = core.lock();
                if shared.is_urgent(false) {
                    return Poll::Ready(Err(Cut::Preempted));
                }
                shared.watch_actor(cx);
            }
            if reply.poll_closed(cx).is_ready() && !planted(Bug::GoneCallerIsServed) {
                return Poll::Ready(Err(Cut::CallerGone));
            }
            if planted(Bug::DeadlineForgotten) {
                return Poll::Pending;
            }
            let alarm = alarm.get_or_insert_with(|| core.parts.env.sleep(after));
            alarm.as_mut().poll(cx).map(|()| Err(Cut::Late(after)))
        })
        .await
    }

    /// Waits for something that must not be left half-done, for whoever asked.
    pub(super) async fn insist<T>(
        &mut self,
        after: Duration,
        work: impl Future<Output = T>,
    ) -> Result<T, Cut> {
        let (mut reply, _kept) = oneshot::channel();
        self.drive(&mut reply, after, work).await
    }

    pub(super) fn machine(&self) -> Result<Arc<dyn Machine>, VmErrorKind> {
        let machine = self.core.lock().machine.clone();
        machine.ok_or_else(|| VmErrorKind::Internal { detail: "there is no machine".to_owned() })
    }

    /// The machine ended by itself: says so, then frees what is left of it.
    pub(super) async fn ended(&mut self, exit: MachineExit) {
        let input = exit.crash().map_or(StateInput::PoweredOff, StateInput::Crashed);
        let (client, life) = {
            let shared = self.core.lock();
            (shared.client.clone(), shared.life.clone())
        };
        self.keep_console();
        self.core.transition(&input);
        life.close(&kind_of_exit(&exit));
        if let Some(client) = client {
            client.end(&kind_of_exit(&exit));
        }
        let _ = self.remove_machine(&kind_of_exit(&exit)).await;
    }

    /// Gives the kind of error for what was given up, and takes note of an end.
    pub(super) async fn give_up(&mut self, cut: Cut) -> VmErrorKind {
        match cut {
            Cut::Preempted | Cut::CallerGone => VmErrorKind::Interrupted,
            Cut::Late(after) => VmErrorKind::Timeout { after },
            Cut::Exited(exit) => {
                let kind = kind_of_exit(&exit);
                self.ended(exit).await;
                kind
            }
        }
    }

    /// After something went wrong: makes the state what the machine really is. A machine that does not answer is
    /// killed.
    pub(super) async fn settle(&mut self) {
        let Ok(machine) = self.machine() else { return };
        let patience = self.core.config.timeouts.pause;
        let status = self.insist(patience, async { machine.status().await }).await;
        match status {
            Ok(Ok(MachineStatus::Running)) => {
                self.core.pauses().resume(self.core.now());
                self.core.transition(&StateInput::ResumeDone);
            }
            Ok(Ok(MachineStatus::Paused)) => {
                self.core.pauses().pause(self.core.now());
                if !planted(Bug::PausedIsNotSettled) {
                    self.core.transition(&StateInput::PauseDone);
                }
            }
            Ok(Ok(MachineStatus::Ended) | Err(MachineError::Ended)) | Err(Cut::Exited(_)) => {
                let exit = machine.wait().await;
                self.exit = None;
                self.ended(exit).await;
            }
            // The stop that is waiting will see to it.
            Err(Cut::Preempted) => {}
            Ok(Ok(MachineStatus::Fresh) | Err(_)) | Err(Cut::Late(_) | Cut::CallerGone) => {
                self.condemn().await;
            }
        }
    }

    /// Kills a machine that cannot be trusted any more.
    pub(super) async fn condemn(&mut self) {
        self.exit = None;
        self.ended(MachineExit::Crashed(CrashReason::Unresponsive)).await;
    }

    pub(super) fn keep_console(&self) {
        let mut shared = self.core.lock();
        if let Some(machine) = shared.machine.clone().filter(|_| !planted(Bug::ConsoleIsDropped)) {
            shared.console = machine.console();
        }
    }

    /// Kills the machine that there is, and forgets it.
    pub(super) async fn remove_machine(&mut self, why: &VmErrorKind) -> Result<(), VmErrorKind> {
        self.keep_console();
        let (machine, client, life) = {
            let mut shared = self.core.lock();
            if !planted(Bug::UptimeIsKept) {
                shared.up_since = None;
            }
            (shared.machine.take(), shared.client.take(), shared.life.clone())
        };
        life.cut(why);
        if let Some(client) = client {
            client.end(why);
        }
        self.stale_guest = false;
        if !planted(Bug::BasesOutliveMachine) {
            self.tracked.clear();
        }
        self.exit = None;
        let Some(machine) = machine else { return Ok(()) };
        let env = self.core.parts.env.clone();
        let after = self.core.config.timeouts.kill;
        match crate::env::timeout(&*env, after, machine.kill()).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(VmErrorKind::Internal {
                detail: format!("the machine was not removed: {error}"),
            }),
            Err(_) => Err(VmErrorKind::Internal {
                detail: format!("the machine was not removed within {after:?}"),
            }),
        }
    }
}
