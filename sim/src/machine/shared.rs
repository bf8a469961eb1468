//! A machine's state and what moves it.

use super::{
    console::Console,
    guest::{Guest, Progress},
    image::Generations,
    lines::Lines,
    link::{Pipe, SimLink},
};
use crate::{
    env::Timer,
    fault::{GuestHook, Vms},
    ledger::Held,
    rng::{Purpose, scale},
    trace::Tag,
    world::{World, nanos},
};
use bytes::Bytes;
use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};
use tokio::sync::{Notify, futures::Notified};
use vm_core::{
    env::Env,
    fault::FaultKind,
    machine::{MachineError, MachineExit, MachineSpec, MachineStatus},
};
use vm_planted_bugs::{Bug, planted};
use vm_trait::VmId;

/// A message takes this long from the host to the guest.
const LATENCY: (Duration, Duration) = (Duration::from_micros(20), Duration::from_micros(400));

/// A machine, as its handle, its driver, its links and the host know it.
pub(crate) struct Shared {
    world: Arc<World>,
    spec: MachineSpec,
    state: Mutex<State>,
    /// It ended, or goes on after a pause.
    changed: Notify,
    number: AtomicU64,
}

/// Which of the host's ports a machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ports {
    /// Those that its configuration maps.
    Mapped,
    /// None: its source has them.
    None,
    /// Those of its source; only a planted bug asks for that.
    TakenOver,
}

pub(super) struct State {
    pub(super) status: MachineStatus,
    pub(super) exit: Option<MachineExit>,
    pub(super) guest: Option<Guest>,
    pub(super) lines: Lines,
    pub(super) console: Console,
    /// The guest's disks are the host's, and not private copies.
    pub(super) disks_attached: bool,
    /// How often the guest had nothing more to do in this life, and waited.
    pub(super) halts: u64,
    /// What changes are known since when.
    pub(super) generations: Generations,
    driver: Driver,
    /// A place on the host, in the ledger too.
    place: Option<Held>,
}

/// The task that lets the guest run, and the timer it waits for.
#[derive(Default)]
struct Driver {
    waker: Option<Waker>,
    timer: Option<(Duration, Timer)>,
}

/// What is to be done once no lock is held.
#[derive(Debug, Default)]
struct Aftermath {
    host_lost: bool,
    /// TCP connections that programs want to the host.
    dials: Vec<(u32, u16)>,
}

impl Shared {
    /// Finds room on the host for a machine.
    pub(super) fn create(
        world: &Arc<World>,
        spec: MachineSpec,
        ports: Ports,
    ) -> Result<Arc<Self>, MachineError> {
        let life = (spec.vm, spec.life);
        let mapped = Arc::clone(&spec.config);
        let mapped = mapped.network.ports();
        let file = spec.config.console_file.as_deref();
        {
            let mut host = world.host();
            host.reserve(&world.limits, spec.config.memory)?;
            let begun = host.share(&spec.config).and_then(|()| {
                let Some(path) = file else { return Ok(()) };
                host.begin_console(path).map_err(|error| {
                    let (path, reason) = (path.display().to_string(), error.to_string());
                    MachineError::HostIo { path, reason }
                })
            });
            let begun = begun.and_then(|()| match ports {
                Ports::Mapped => host.tcp.take(mapped, life),
                Ports::TakenOver => host.tcp.take_over(mapped, life),
                Ports::None => Ok(()),
            });
            if let Err(error) = begun {
                host.release(spec.config.memory);
                return Err(error);
            }
        }
        let console = usize::try_from(spec.config.console_bytes).unwrap_or(usize::MAX);
        let state = State {
            status: MachineStatus::Fresh,
            exit: None,
            guest: None,
            lines: Lines::default(),
            console: Console::new(console, file.is_some()),
            disks_attached: false,
            halts: 0,
            generations: Generations::of_booted(),
            driver: Driver::default(),
            place: Some(world.counters.machines.hold()),
        };
        let shared = Arc::new(Self {
            world: Arc::clone(world),
            spec,
            state: Mutex::new(state),
            changed: Notify::new(),
            number: AtomicU64::new(0),
        });
        if !mapped.is_empty() {
            world.host().tcp.open(life, &shared);
        }
        shared.number.store(world.enlist(&shared), Ordering::Relaxed);
        shared.note(1, || "machine made".to_owned());
        Ok(shared)
    }

    pub(crate) fn vm(&self) -> VmId {
        self.spec.vm
    }

    pub(super) fn spec(&self) -> &MachineSpec {
        &self.spec
    }

    pub(super) fn world(&self) -> &Arc<World> {
        &self.world
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn note(&self, what: u64, text: impl FnOnce() -> String) {
        self.world.note(Some(self.spec.vm), Tag::Machine, &[what, self.spec.life], text);
    }

    pub(super) fn note_bytes(&self, tag: Tag, bytes: &[u8], now: Duration) {
        let numbers = [bytes.len() as u64];
        self.world.trace.record(now, Some(self.spec.vm), tag, &numbers, bytes, String::new);
    }

    /// Takes note of what the guest has written on its console.
    fn note_console(&self, console: &mut Console, now: Duration) {
        let fresh = console.take_fresh();
        if !fresh.is_empty() {
            let text = || format!("console: {}", String::from_utf8_lossy(fresh).trim_end());
            self.world.trace.record(now, Some(self.spec.vm), Tag::Console, &[], fresh, text);
            self.file_console(console);
        }
    }

    /// Appends to the console's file. What the host cannot take is lost; the guest does not wait for it.
    fn file_console(&self, console: &mut Console) {
        let Some(path) = &self.spec.config.console_file else { return };
        let bytes = console.take_for_file();
        if !bytes.is_empty() {
            let appended = self.world.host().append_console(path, &bytes, &self.world.limits);
            let numbers = [10, bytes.len() as u64, u64::from(appended.is_ok())];
            self.world.note(Some(self.spec.vm), Tag::HostFile, &numbers, || match appended {
                Ok(()) => format!("console: {} bytes to {}", bytes.len(), path.display()),
                Err(error) => format!("console: {}: {error}", path.display()),
            });
        }
    }

    pub(super) fn strike(&self, kind: FaultKind) -> Option<crate::fault::Fired> {
        self.world.strike(kind, Vms::One(self.spec.vm))
    }

    /// Puts a guest into a machine that had none, running or standing still.
    pub(super) fn install(self: &Arc<Self>, state: &mut State, mut guest: Guest, running: bool) {
        guest.os.set_faults(Some(Box::new(GuestHook::new(&self.world, self.spec.vm))));
        if running {
            guest.thaw(self.world.now());
        }
        state.guest = Some(guest);
        state.status = if running { MachineStatus::Running } else { MachineStatus::Paused };
        let machine = Arc::downgrade(self);
        let drive = std::future::poll_fn(move |cx| match machine.upgrade() {
            Some(machine) => machine.drive(cx),
            None => Poll::Ready(()),
        });
        self.world.env.spawn("machine", Box::pin(drive));
    }

    /// Ends the machine in any condition; the first end counts.
    pub(crate) fn end(&self, exit: MachineExit) {
        let mut state = self.lock();
        self.finish(&mut state, exit);
    }

    fn finish(&self, state: &mut State, exit: MachineExit) {
        if state.exit.is_some() {
            return;
        }
        self.note(2, || format!("machine ended: {exit:?}"));
        state.status = MachineStatus::Ended;
        state.exit = Some(exit);
        self.file_console(&mut state.console);
        let mut host = self.world.host();
        host.release(self.spec.config.memory);
        host.tcp.free((self.spec.vm, self.spec.life));
        if state.disks_attached {
            let images = state.guest.as_ref().map(Guest::disks).unwrap_or_default();
            let mut images = images.into_iter();
            for disk in &self.spec.config.disks {
                host.detach(disk, images.next());
            }
            state.disks_attached = false;
        }
        drop(host);
        if let Some(guest) = &mut state.guest {
            self.with_shares(guest, |guest| guest.os.let_go_of_shares());
        }
        state.guest = None;
        let place = state.place.take();
        if planted(Bug::EndedMachineIsKept) {
            std::mem::forget(place);
        }
        state.lines.end();
        state.driver.timer = None;
        if let Some(waker) = state.driver.waker.take() {
            waker.wake();
        }
        self.world.strike_off(self.number.load(Ordering::Relaxed));
        self.changed.notify_waiters();
    }

    /// Lets the guest do something with what it has of the host in hand.
    fn with_shares<T>(&self, guest: &mut Guest, act: impl FnOnce(&mut Guest) -> T) -> T {
        let config = &self.spec.config;
        if config.mounts.is_empty() && config.root.shared_directory().is_none() {
            return act(guest);
        }
        let capacity = self.world.limits.disk_bytes;
        self.world.host().give_shares(config, &mut guest.os, capacity);
        let done = act(guest);
        self.world.host().take_shares(config, &mut guest.os);
        done
    }

    /// Waits until the machine has ended, or goes on after a pause.
    pub(super) fn changed(&self) -> Notified<'_> {
        self.changed.notified()
    }

    /// Tells those who wait for the machine to go on.
    pub(super) fn goes_on(&self) {
        self.changed.notify_waiters();
    }

    pub(super) async fn wait(&self) -> MachineExit {
        loop {
            let mut changed = std::pin::pin!(self.changed());
            changed.as_mut().enable();
            if let Some(exit) = self.lock().exit.clone() {
                return exit;
            }
            changed.await;
        }
    }

    /// Lets the driver look again when to act next.
    pub(crate) fn wake_driver(&self) {
        let state = self.lock();
        if let Some(waker) = &state.driver.waker {
            waker.wake_by_ref();
        }
    }

    pub(crate) fn turn_deaf(&self) {
        if let Some(guest) = &mut self.lock().guest {
            guest.deaf = true;
        }
    }

    /// Makes sure that the driver acts at `due`.
    pub(super) fn arm(&self, state: &mut State, due: Duration, now: Duration) {
        if state.status != MachineStatus::Running {
            return;
        }
        if state.driver.timer.as_ref().is_some_and(|(known, _)| *known <= due) {
            return;
        }
        let Some(waker) = state.driver.waker.clone() else {
            // The driver has not begun; it will find out by itself.
            return;
        };
        let mut timer = self.world.env.timer(due.saturating_sub(now));
        if due <= now || Pin::new(&mut timer).poll(&mut Context::from_waker(&waker)).is_ready() {
            waker.wake();
        } else {
            state.driver.timer = Some((due, timer));
        }
    }

    /// The driver's poll.
    fn drive(self: &Arc<Self>, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            let mut aftermath = Aftermath::default();
            let over = self.drive_once(cx, &mut aftermath);
            self.world.die_if_due();
            if aftermath.host_lost {
                self.world.lose_host();
            }
            let dials = std::mem::take(&mut aftermath.dials);
            // Each has an answer that the driver is to bring.
            let again = !dials.is_empty();
            for (socket, port) in dials {
                self.reach_host(socket, port);
            }
            match over {
                Some(Poll::Pending) if again => {}
                Some(poll) => return poll,
                None => {}
            }
        }
    }

    /// Lets the guest run until it waits; `None` where it does not.
    fn drive_once(&self, cx: &mut Context<'_>, aftermath: &mut Aftermath) -> Option<Poll<()>> {
        let mut state = self.lock();
        let state = &mut *state;
        if state.exit.is_some() {
            return Some(Poll::Ready(()));
        }
        if !state.driver.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            state.driver.waker = Some(cx.waker().clone());
        }
        let now = self.world.now();
        let due = self.step(state, now, aftermath);
        if aftermath.host_lost {
            return None;
        }
        if state.exit.is_some() {
            return Some(Poll::Ready(()));
        }
        let Some(due) = due else {
            state.driver.timer = None;
            return Some(Poll::Pending);
        };
        if state.driver.timer.as_ref().is_some_and(|(known, _)| *known == due && due > now) {
            return Some(Poll::Pending);
        }
        let mut timer = self.world.env.timer(due.saturating_sub(now));
        if Pin::new(&mut timer).poll(cx).is_ready() {
            return None;
        }
        state.driver.timer = Some((due, timer));
        Some(Poll::Pending)
    }

    /// Lets the guest do what is due, and gives the host's time at which it is to act next.
    fn step(
        &self,
        state: &mut State,
        now: Duration,
        aftermath: &mut Aftermath,
    ) -> Option<Duration> {
        match state.status {
            MachineStatus::Running => {}
            MachineStatus::Paused => return self.stand_still(state, now, aftermath),
            MachineStatus::Fresh | MachineStatus::Ended => return None,
        }
        let guest = state.guest.as_mut()?;
        let (lines, console) = (&mut state.lines, &mut state.console);
        let mut progress =
            self.with_shares(guest, |guest| guest.run(now, lines, console, &self.world.streams));
        state.halts += 1;
        aftermath.dials.append(&mut state.lines.tcp_dials);
        let mut next = progress.next.and_then(|next| guest.host_time(next));
        let clock = nanos(guest.clock(now));
        self.world.trace.record(now, Some(self.spec.vm), Tag::Clock, &[clock], &[], String::new);
        if self.world.faults.may_befall() && guest.listens() && progress.exit.is_none() {
            self.befall(state, now, &mut progress, aftermath);
            next = earliest(next, self.world.faults.next_befalling(self.spec.vm, true));
        }
        self.note_console(&mut state.console, now);
        if let Some(exit) = progress.exit {
            self.finish(state, exit);
            return None;
        }
        for pipe in state.lines.pipes.values_mut() {
            if !pipe.is_stalled(now) {
                pipe.wake_after_stall(now);
            }
            next = earliest(next, pipe.stall_end(now));
        }
        earliest(next, self.world.dies_at())
    }

    /// Lets only what comes from outside happen to a paused machine.
    fn stand_still(
        &self,
        state: &mut State,
        now: Duration,
        aftermath: &mut Aftermath,
    ) -> Option<Duration> {
        if !self.world.faults.may_befall() || !state.guest.as_ref()?.listens() {
            return None;
        }
        let mut progress = Progress::default();
        self.befall(state, now, &mut progress, aftermath);
        if let Some(exit) = progress.exit {
            self.finish(state, exit);
            return None;
        }
        self.world.faults.next_befalling(self.spec.vm, false)
    }

    /// Lets faults befall the machine.
    fn befall(
        &self,
        state: &mut State,
        now: Duration,
        progress: &mut Progress,
        aftermath: &mut Aftermath,
    ) {
        let runs = state.status == MachineStatus::Running;
        for fault in self.world.faults.befall(self.spec.vm, now, progress.delivered, runs) {
            self.world.note_fault(Some(self.spec.vm), fault.kind, &fault.fired);
            let Some(guest) = &mut state.guest else { return };
            match fault.kind {
                FaultKind::GuestPanic => guest.os.panic("Fatal exception in interrupt"),
                FaultKind::GuestOom => {
                    self.with_shares(guest, |guest| guest.os.kill_for_memory());
                    guest.act_again(now);
                }
                FaultKind::VmmKilled => {
                    progress.exit.get_or_insert(MachineExit::Failed("it was killed".to_owned()));
                }
                FaultKind::HostLost => aftermath.host_lost = true,
                FaultKind::ClockForward | FaultKind::ClockBack => {
                    let most = Duration::from_secs(3600 * 24 * 30);
                    let far = fault.fired.amount(Duration::from_secs(1), most);
                    let far = i64::try_from(far.as_nanos()).unwrap_or(i64::MAX);
                    let ahead = fault.kind == FaultKind::ClockForward;
                    guest.os.shift_wall_clock(if ahead { far } else { -far });
                }
                _ => {}
            }
            guest.take_events(&mut state.console, progress);
        }
    }

    /// Lets a guest that is about to be stopped do what is due.
    pub(super) fn catch_up(&self, state: &mut State, now: Duration) -> Result<(), MachineError> {
        state.driver.timer = None;
        let Some(guest) = &mut state.guest else { return Err(MachineError::Ended) };
        let (lines, console) = (&mut state.lines, &mut state.console);
        let progress =
            self.with_shares(guest, |guest| guest.run(now, lines, console, &self.world.streams));
        self.note_console(&mut state.console, now);
        match progress.exit {
            Some(exit) => {
                self.finish(state, exit);
                Err(MachineError::Ended)
            }
            None => Ok(()),
        }
    }

    /// Dials the agent.
    pub(super) fn connect(self: &Arc<Self>) -> Result<SimLink, MachineError> {
        let accept_late = self.strike(FaultKind::LinkDelayedAccept);
        let mut state = self.lock();
        let now = self.world.now();
        if state.exit.is_some() {
            return Err(MachineError::Ended);
        }
        if !state.guest.as_ref().is_some_and(Guest::listens) {
            return Err(MachineError::NotListening);
        }
        let late = accept_late.map_or(Duration::ZERO, |fired| {
            fired.amount(Duration::from_millis(1), Duration::from_secs(2))
        });
        let conn = state.lines.add(Pipe::new(now + late));
        drop(state);
        self.world.note(Some(self.spec.vm), Tag::Machine, &[7, conn.0, nanos(late)], || {
            format!("dialled, connection {}", conn.0)
        });
        Ok(SimLink::new(Arc::clone(self), conn))
    }

    pub(super) fn console(&self) -> Bytes {
        self.lock().console.to_bytes()
    }

    /// Lets the link's faults happen at a write of the host; says whether the connection broke.
    pub(super) fn trouble(&self, pipe: &mut Pipe, now: Duration) -> bool {
        if pipe.tcp {
            if let Some(fired) = self.strike(FaultKind::NetSlow) {
                let long = fired.amount(Duration::from_millis(1), Duration::from_secs(5));
                pipe.stall(now + long);
            }
            return self.reset(pipe);
        }
        if let Some(fired) = self.strike(FaultKind::LinkStall) {
            let long = fired.amount(Duration::from_millis(1), Duration::from_secs(20));
            pipe.stall(now + long);
        }
        // A stream to a socket ends with one of its ends, and not on its way.
        if pipe.socket.is_none() && self.strike(FaultKind::LinkDisconnect).is_some() {
            pipe.break_down(&mut |bound| self.world.streams.index(Purpose::Link, bound));
            return true;
        }
        false
    }

    /// Lets a connection over the network be reset; says whether it was.
    pub(super) fn reset(&self, pipe: &mut Pipe) -> bool {
        let resets = pipe.tcp && !pipe.is_broken() && self.strike(FaultKind::NetReset).is_some();
        if resets {
            pipe.break_down(&mut |bound| self.world.streams.index(Purpose::Network, bound));
        }
        resets
    }

    /// Gives how many of `most` bytes are moved.
    pub(super) fn shorten(&self, most: usize) -> usize {
        match self.strike(FaultKind::LinkShort) {
            Some(fired) if most > 1 => {
                let bound = u64::try_from(most - 1).unwrap_or(u64::MAX);
                1 + usize::try_from(scale(fired.random, bound)).unwrap_or(0)
            }
            _ => most,
        }
    }

    /// Gives when bytes that are sent now arrive; behind those that are under way.
    pub(super) fn arrival(&self, pipe: &Pipe, now: Duration) -> Duration {
        match pipe.last_arrival() {
            Some(last) if last > now => last,
            _ => now + self.world.streams.duration(Purpose::RequestLatency, LATENCY.0, LATENCY.1),
        }
    }

    /// Lets the guest send on, now that the host has made room.
    pub(super) fn host_has_read(&self, state: &mut State, now: Duration) {
        if state.status != MachineStatus::Running {
            return;
        }
        let Some(guest) = &mut state.guest else { return };
        if guest.send_waiting(&mut state.lines) {
            guest.act_again(now);
            self.arm(state, now, now);
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        debug_assert!(self.lock().exit.is_some(), "the handle ends its machine");
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("vm", &self.spec.vm).finish_non_exhaustive()
    }
}

fn earliest(one: Option<Duration>, other: Option<Duration>) -> Option<Duration> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.min(other)),
        (one, other) => one.or(other),
    }
}
