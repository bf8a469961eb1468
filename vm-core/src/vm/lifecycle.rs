//! Start, stop, kill, pause and resume.

use super::actor::{Actor, Cut, Reply};
use crate::{
    agent::{AgentClient, ClientParts, LinkListener},
    machine::{Machine, MachineError, MachineExit, MachineSpec, Sections},
};
use futures_util::{
    TryFutureExt,
    future::{Either, select, try_join},
};
use std::{future::poll_fn, pin::pin, sync::Arc, task::Poll, time::Duration};
use vm_planted_bugs::{Bug, planted};
use vm_trait::{
    BootStage, BootTimes, Capability, CrashReason, StateInput, StopOptions, VmErrorKind,
};

/// Where a new machine's state comes from.
pub(super) enum Origin {
    Boot,
    Load { sections: Sections, track: bool },
    Forked(Arc<dyn Machine>),
}

/// How bringing a machine up failed.
enum Failure {
    Cut(Cut),
    Machine(MachineError),
    Guest(VmErrorKind),
}

/// How long the guest of a stop has before the host ends it: some of the grace is the host's.
const HOST_SHARE_OF_GRACE: u32 = 5;

impl Actor {
    pub(super) async fn start(&mut self, reply: &mut Reply) -> Result<(), VmErrorKind> {
        self.core.transition(&StateInput::BootBegun);
        let after = self.core.config.timeouts.boot;
        let (stage, failure) = match self.bring_up(reply, after, Origin::Boot, true).await {
            Ok(()) => {
                self.core.transition(&StateInput::Ready);
                return Ok(());
            }
            Err(failed) => failed,
        };
        let reason = match failure {
            // The stop that is waiting removes the machine.
            Failure::Cut(Cut::Preempted) => return Err(VmErrorKind::Interrupted),
            Failure::Cut(Cut::CallerGone) => {
                return self.abandon(VmErrorKind::Interrupted).await;
            }
            Failure::Machine(
                error @ (MachineError::Exhausted(_)
                | MachineError::Config { .. }
                | MachineError::PortInUse(_)
                | MachineError::Unsupported(_)),
            ) => return self.abandon(error.into()).await,
            Failure::Cut(Cut::Late(after)) => format!("not ready within {after:?}"),
            Failure::Cut(Cut::Exited(exit)) => match exit {
                MachineExit::PoweredOff => "the guest powered off".to_owned(),
                MachineExit::Killed => "the VMM process was killed".to_owned(),
                MachineExit::Crashed(reason) => reason.to_string(),
                MachineExit::Failed(why) => format!("{}: {why}", CrashReason::VmmDied),
            },
            Failure::Machine(error) => error.to_string(),
            Failure::Guest(kind) => kind.to_string(),
        };
        self.keep_console();
        let console = last_lines(&self.core.lock().console);
        let kind = VmErrorKind::BootFailed { stage, reason, console };
        let _ = self.remove_machine(&kind).await;
        self.core.transition(&StateInput::Crashed(CrashReason::BootFailed));
        Err(kind)
    }

    /// Removes a machine that did not come up; the VM is then Stopped.
    async fn abandon(&mut self, kind: VmErrorKind) -> Result<(), VmErrorKind> {
        let removed = self.remove_machine(&kind).await;
        if !planted(Bug::FailedReviveStaysStarting) {
            self.core.transition(&StateInput::BootAbandoned);
        }
        removed.and(Err(kind))
    }

    /// Brings up a machine from a captured state; the VM is Starting before and, on failure, Stopped afterwards.
    pub(super) async fn revive(
        &mut self,
        reply: &mut Reply,
        origin: Origin,
        resume: bool,
    ) -> Result<(), VmErrorKind> {
        self.core.transition(&StateInput::BootBegun);
        let after = self.core.config.timeouts.capture;
        let kind = match self.bring_up(reply, after, origin, resume).await {
            Ok(()) => {
                let input = if resume {
                    StateInput::Ready
                } else {
                    self.core.pauses().pause(self.core.now());
                    StateInput::RestoredPaused
                };
                self.core.transition(&input);
                return Ok(());
            }
            Err((_, Failure::Cut(Cut::Preempted))) => return Err(VmErrorKind::Interrupted),
            Err((_, Failure::Cut(Cut::CallerGone))) => VmErrorKind::Interrupted,
            Err((_, Failure::Cut(Cut::Late(after)))) => VmErrorKind::Timeout { after },
            Err((_, Failure::Cut(Cut::Exited(exit)))) => crate::error::kind_of_exit(&exit),
            Err((_, Failure::Machine(error))) => error.into(),
            Err((_, Failure::Guest(kind))) => kind,
        };
        self.abandon(kind).await
    }

    /// Makes a machine, boots or loads it, and waits for its agent, all within `after`.
    async fn bring_up(
        &mut self,
        reply: &mut Reply,
        after: Duration,
        origin: Origin,
        resume: bool,
    ) -> Result<(), (BootStage, Failure)> {
        let core = self.core.clone();
        let began = core.now();
        let left =
            |core: &super::core::Core| after.saturating_sub(core.now().saturating_sub(began));
        let life = {
            let mut shared = core.lock();
            if !planted(Bug::PausesOutliveMachine) {
                shared.pauses = Arc::default();
            }
            shared.life = Arc::default();
            shared.boot = None;
            shared.lives += 1;
            shared.lives
        };
        let boots = matches!(origin, Origin::Boot);
        let at = |stage| move |failure| (stage, failure);
        let (machine, loaded) = match origin {
            Origin::Forked(machine) => (Ok(machine), None),
            Origin::Boot => (self.make(reply, life, left(&core), false).await, None),
            Origin::Load { sections, track } => {
                (self.make(reply, life, left(&core), true).await, Some((sections, track)))
            }
        };
        let machine = machine.map_err(at(BootStage::Machine))?;
        let made_at = core.now();
        self.take_machine(machine.clone());
        let entered = self
            .drive(reply, left(&core), async {
                if boots {
                    return machine.boot().await;
                }
                if let Some((sections, track)) = &loaded {
                    machine.load(sections, *track).await?;
                }
                if resume { machine.resume().await } else { Ok(()) }
            })
            .await;
        let mut outcome = flatten(entered).map_err(at(BootStage::Kernel));
        let entered_at = core.now();
        // What stands in images is verified while the guest gets going. Until it is, nobody may use the machine.
        let sections = loaded.map(|(sections, _)| sections);
        if outcome.is_ok() && resume {
            let greeted = self.greet(reply, left(&core), !boots, sections.as_ref()).await;
            outcome = greeted.map_err(at(BootStage::Handshake));
        } else if outcome.is_ok() {
            self.stale_guest = !planted(Bug::PausedCopyIsNotFresh);
        }
        if let Some(sections) = &sections {
            // A damaged guest may fail in any way; the damage is then the reason.
            let wanted =
                !matches!(&outcome, Err((_, Failure::Cut(Cut::Preempted | Cut::CallerGone))));
            if wanted {
                let verified = self.drive(reply, left(&core), sections.verify()).await;
                flatten(verified).map_err(at(BootStage::Kernel))?;
            }
        }
        outcome?;
        let ready_at = core.now();
        let times = BootTimes::new(
            made_at.saturating_sub(began),
            entered_at.saturating_sub(made_at),
            ready_at.saturating_sub(entered_at),
        );
        let mut shared = core.lock();
        shared.boot = Some(times);
        shared.up_since = Some(ready_at);
        Ok(())
    }

    /// Makes a machine that does not run yet.
    async fn make(
        &mut self,
        reply: &mut Reply,
        life: u64,
        after: Duration,
        loads: bool,
    ) -> Result<Arc<dyn Machine>, Failure> {
        let core = self.core.clone();
        let spec = MachineSpec { vm: core.id, life, config: core.config.clone(), loads };
        let made = core.parts.hypervisor.create(&spec);
        flatten(self.drive(reply, after, made).await)
    }

    fn take_machine(&mut self, machine: Arc<dyn Machine>) {
        let watched = machine.clone();
        self.exit = Some(Box::pin(async move { watched.wait().await }));
        self.stale_guest = false;
        self.core.lock().machine = Some(machine);
    }

    /// Connects to the agent and makes the guest fit for use: its clock, and after a restore its random pool. Meanwhile what
    /// it was restored from is verified.
    async fn greet(
        &mut self,
        reply: &mut Reply,
        after: Duration,
        restored: bool,
        sections: Option<&Sections>,
    ) -> Result<(), Failure> {
        let machine = self.machine().map_err(Failure::Guest)?;
        let client = self.client_for(machine);
        let (core, own_kernel) = (self.core.clone(), self.core.has(Capability::GuestKernel));
        let verified = async {
            let Some(sections) = sections else { return Ok(()) };
            sections.verify().await.map_err(Failure::Machine)
        };
        let talk = async {
            client.ready().await?;
            if own_kernel {
                // Both at once: a restored guest is slow at first, and each has a way to go.
                let reseed = async {
                    if !restored || planted(Bug::RestoredIsNotReseeded) {
                        return Ok(());
                    }
                    let mut entropy = [0; 32];
                    core.parts.env.fill_random(&mut entropy);
                    client.reseed(entropy).await
                };
                let set_clock = async {
                    if restored && planted(Bug::RestoredClockIsNotSet) {
                        return Ok(());
                    }
                    client.set_clock(core.parts.env.wall_clock()).await
                };
                try_join(reseed, set_clock).await?;
            }
            Ok(())
        };
        let greeted = try_join(verified, talk.map_err(Failure::Guest));
        match self.drive(reply, after, greeted).await {
            Ok(Ok(_)) => {
                self.stale_guest = false;
                Ok(())
            }
            Ok(Err(failure)) => Err(failure),
            Err(cut) => Err(Failure::Cut(cut)),
        }
    }

    fn client_for(&self, machine: Arc<dyn Machine>) -> AgentClient {
        let core = &self.core;
        let pauses = core.pauses();
        let client = AgentClient::connect(ClientParts {
            vm: core.id,
            env: core.parts.env.clone(),
            observer: core.parts.observer.clone(),
            machine,
            timeouts: core.config.timeouts.clone(),
            pauses,
            listener: Arc::downgrade(&(core.clone() as Arc<dyn LinkListener>)),
        });
        if let Some(old) = core.lock().client.replace(client.clone()) {
            old.end(&VmErrorKind::Disconnected);
        }
        client
    }

    pub(super) async fn pause(&mut self) -> Result<(), VmErrorKind> {
        self.hold().await?;
        self.core.transition(&StateInput::PauseDone);
        Ok(())
    }

    /// Stops the vCPUs without a change of state.
    pub(super) async fn hold(&mut self) -> Result<(), VmErrorKind> {
        let machine = self.machine()?;
        let client = self.core.lock().client.clone();
        if let Some(client) = client {
            client.flush();
        }
        let after = self.core.config.timeouts.pause;
        let kind = match self.insist(after, async { machine.pause().await }).await {
            Ok(Ok(())) => {
                self.core.pauses().pause(self.core.now());
                return Ok(());
            }
            Ok(Err(error)) => error.into(),
            Err(cut) => self.give_up(cut).await,
        };
        self.settle().await;
        Err(kind)
    }

    pub(super) async fn resume(&mut self) -> Result<(), VmErrorKind> {
        let resumed = self.let_go().await;
        if resumed.is_ok() {
            self.core.transition(&StateInput::ResumeDone);
        }
        resumed
    }

    /// Lets the vCPUs run, without a change of state where that goes well. The guest's clock is right afterwards.
    pub(super) async fn let_go(&mut self) -> Result<(), VmErrorKind> {
        let machine = self.machine()?;
        let after = self.core.config.timeouts.pause;
        let kind = match self.insist(after, async { machine.resume().await }).await {
            Ok(Ok(())) => {
                self.core.pauses().resume(self.core.now());
                if planted(Bug::ResumeForgetsClock) && !self.stale_guest {
                    return Ok(());
                }
                return self.refresh_guest(after).await;
            }
            Ok(Err(error)) => error.into(),
            Err(cut) => self.give_up(cut).await,
        };
        self.settle().await;
        Err(kind)
    }

    /// Sets the clock of a guest that runs again, and reseeds one that was restored. A restored guest that cannot be
    /// reseeded must not be used.
    async fn refresh_guest(&mut self, after: Duration) -> Result<(), VmErrorKind> {
        if self.stale_guest {
            let (mut reply, _kept) = tokio::sync::oneshot::channel();
            let failure = match self.greet(&mut reply, after, true, None).await {
                Ok(()) => return Ok(()),
                Err(failure) => failure,
            };
            let kind = match failure {
                Failure::Cut(cut) => self.give_up(cut).await,
                Failure::Machine(error) => error.into(),
                Failure::Guest(kind) => kind,
            };
            self.condemn().await;
            return Err(kind);
        }
        let client = self.core.lock().client.clone();
        let Some(client) = client.filter(|_| self.core.has(Capability::GuestKernel)) else {
            return Ok(());
        };
        let wall = self.core.parts.env.wall_clock();
        let kind = match self.insist(after, client.set_clock(wall)).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(kind)) => kind,
            Err(cut) => self.give_up(cut).await,
        };
        self.settle().await;
        Err(kind)
    }

    pub(super) async fn stop(&mut self, options: &StopOptions) -> Result<(), VmErrorKind> {
        let (client, life, graceful) = {
            let shared = self.core.lock();
            let runs =
                shared.state == vm_trait::VmState::Running && !planted(Bug::StopIgnoresGrace);
            (shared.client.clone(), shared.life.clone(), runs && !options.grace.is_zero())
        };
        self.core.transition(&StateInput::StopBegun);
        life.close(&VmErrorKind::Interrupted);
        if let Some(client) = &client {
            client.interrupt();
        }
        if planted(Bug::StoppedBeforeGone) {
            self.core.transition(&StateInput::StopDone);
        }
        if let Some(client) = client.filter(|_| graceful) {
            self.ask_to_end(&client, options).await;
        }
        let removed = self.remove_machine(&VmErrorKind::Interrupted).await;
        self.core.transition(&StateInput::StopDone);
        removed
    }

    /// Asks the guest to power off, and waits for that as long as the grace allows and no kill comes.
    async fn ask_to_end(&mut self, client: &AgentClient, options: &StopOptions) {
        let env = self.core.parts.env.clone();
        if self.core.pauses().is_paused() {
            // The stop cut a snapshot or fork short, which held the vCPUs.
            if let Ok(machine) = self.machine() {
                let after = self.core.config.timeouts.pause;
                let _ = crate::env::timeout(&*env, after, machine.resume()).await;
                self.core.pauses().resume(self.core.now());
            }
        }
        let guest_share = options.grace - options.grace / HOST_SHARE_OF_GRACE;
        let signal = if planted(Bug::StopSendsItsOwnSignal) { 15 } else { options.signal.0 };
        let asking = client.shutdown(signal, guest_share);
        let Some(exit) = self.exit.take() else { return };
        let core = self.core.clone();
        let killed = poll_fn(|cx| {
            let mut shared = core.lock();
            if shared.is_urgent(true) {
                return Poll::Ready(());
            }
            shared.watch_actor(cx);
            Poll::Pending
        });
        let mut asking = pin!(asking);
        let gone = pin!(async {
            // An agent that cannot be asked still leaves the time to the guest: it may be going down by itself.
            if let Either::Left((_, exit)) = select(&mut asking, exit).await {
                exit.await;
            }
        });
        let killed = pin!(killed);
        let until = select(gone, killed);
        if planted(Bug::StopGraceHasNoEnd) {
            until.await;
            return;
        }
        let _ = crate::env::timeout(&*env, options.grace, until).await;
    }

    /// Kills the machine, in any state.
    pub(super) async fn end_by_force(&mut self) -> Result<(), VmErrorKind> {
        self.core.transition(&StateInput::StopBegun);
        let client = self.core.lock().client.clone();
        if let Some(client) = client {
            client.end(&VmErrorKind::Interrupted);
        }
        let removed = self.remove_machine(&VmErrorKind::Interrupted).await;
        self.core.transition(&StateInput::StopDone);
        removed
    }
}

fn flatten<T>(driven: Result<Result<T, MachineError>, Cut>) -> Result<T, Failure> {
    match driven {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(Failure::Machine(error)),
        Err(cut) => Err(Failure::Cut(cut)),
    }
}

/// Gives the end of a console for an error: at most 20 lines and 4 KiB.
fn last_lines(console: &[u8]) -> String {
    const BYTES: usize = 4 << 10;
    const LINES: usize = 20;
    let tail = &console[console.len().saturating_sub(BYTES)..];
    let text = String::from_utf8_lossy(tail);
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}
