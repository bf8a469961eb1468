//! The guest: the real agent core on the simulated operating system, moved through its own time.

use super::{
    console::Console,
    lines::Lines,
    link::{Arrival, Pipe},
};
use crate::{
    guest::{DiskImage, OsEvent, SimOs, SocketEnd},
    rng::{Purpose, Streams},
};
use serde::{Deserialize, Serialize};
use std::time::Duration;
use vm_core::machine::MachineExit;
use vm_guest_agent::{
    core::{AgentConfig, AgentCore, ConnId},
    os::GuestOs,
};
use vm_planted_bugs::{Bug, planted};
use vm_trait::CrashReason;

/// How many steps the guest's processes make at one instant before time goes on.
const STEPS: u32 = 10_000;
/// How long a guest computes before the host looks at it again, where its processes never wait.
const SLICE: Duration = Duration::from_millis(1);

/// The agent, its kernel and their clock.
#[derive(Clone, Debug)]
pub(super) struct Guest {
    pub(super) agent: AgentCore,
    pub(super) os: SimOs,
    /// The guest's monotonic time at which the clock stood last.
    base: Duration,
    /// The host's time at which it began to run, while it does.
    running_since: Option<Duration>,
    boot: Option<Boot>,
    /// The agent works on something until then.
    busy_until: Duration,
    /// When processes go on that did not wait.
    slice_at: Option<Duration>,
    /// It takes no more bytes from the host.
    pub(super) deaf: bool,
}

/// A boot under way.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Boot {
    /// When the agent listens.
    pub(super) ready_at: Duration,
    pub(super) fate: BootFate,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum BootFate {
    Listens,
    Panics,
    Hangs,
}

/// A guest as it is saved.
#[derive(Serialize, Deserialize)]
struct Saved {
    agent: AgentCore,
    os: Vec<u8>,
    base: Duration,
    boot: Option<Boot>,
    busy_until: Duration,
    slice_at: Option<Duration>,
}

/// What came of letting the guest run.
#[derive(Debug, Default)]
pub(super) struct Progress {
    /// The guest's time at which it has something to do next.
    pub(super) next: Option<Duration>,
    pub(super) exit: Option<MachineExit>,
    /// It was sent something.
    pub(super) delivered: bool,
}

impl Guest {
    pub(super) fn new(os: SimOs, boot: Boot) -> Self {
        Self {
            agent: AgentCore::new(AgentConfig::default()),
            os,
            base: Duration::ZERO,
            running_since: None,
            boot: Some(boot),
            busy_until: Duration::ZERO,
            slice_at: None,
            deaf: false,
        }
    }

    pub(super) fn listens(&self) -> bool {
        self.boot.is_none() && !self.deaf
    }

    /// Gives the guest's monotonic time.
    pub(super) fn clock(&self, now: Duration) -> Duration {
        self.base + self.running_since.map_or(Duration::ZERO, |since| now.saturating_sub(since))
    }

    /// Gives the host's time at which the guest's clock shows `time`, if it runs on.
    pub(super) fn host_time(&self, time: Duration) -> Option<Duration> {
        Some(self.running_since? + time.saturating_sub(self.base))
    }

    pub(super) fn freeze(&mut self, now: Duration) {
        self.base = self.clock(now);
        self.running_since = None;
        self.os.set_monotonic(self.base);
    }

    pub(super) fn thaw(&mut self, now: Duration) {
        if planted(Bug::ClockRunsWhilePaused) {
            self.base = self.base.max(now);
        }
        self.running_since.get_or_insert(now);
    }

    /// Makes a copy with none of the connections.
    pub(super) fn copy(&self) -> Self {
        let mut copy = self.clone();
        copy.agent.reset_connections();
        if !planted(Bug::CopyKeepsStreams) {
            copy.os.socket_reset();
        }
        copy
    }

    pub(super) fn save(&self) -> Result<Vec<u8>, postcard::Error> {
        postcard::to_allocvec(&Saved {
            agent: self.agent.clone(),
            os: self.os.save()?,
            base: self.base,
            boot: self.boot.clone(),
            busy_until: self.busy_until,
            slice_at: self.slice_at,
        })
    }

    /// Brings a guest back, standing still and with none of its connections.
    pub(super) fn load(
        bytes: &[u8],
        programs: std::sync::Arc<crate::guest::ProgramRegistry>,
    ) -> Result<Self, String> {
        let saved: Saved = match postcard::take_from_bytes(bytes) {
            Ok((saved, [])) => saved,
            Ok(_) => return Err("bytes behind the guest's state".to_owned()),
            Err(error) => return Err(error.to_string()),
        };
        let mut os = SimOs::load(&saved.os, programs).map_err(|error| error.to_string())?;
        os.socket_reset();
        let mut agent = saved.agent;
        agent.reset_connections();
        Ok(Self {
            agent,
            os,
            base: if planted(Bug::LoadedClockBeginsAnew) { Duration::ZERO } else { saved.base },
            running_since: None,
            boot: saved.boot,
            busy_until: saved.busy_until,
            slice_at: saved.slice_at,
            deaf: false,
        })
    }

    pub(super) fn disks(&self) -> Vec<DiskImage> {
        self.os.disks()
    }

    /// Lets the guest do everything that is due by the host's time `now`.
    pub(super) fn run(
        &mut self,
        now: Duration,
        lines: &mut Lines,
        console: &mut Console,
        streams: &Streams,
    ) -> Progress {
        let mut progress = Progress::default();
        let until = self.clock(now);
        let mut idle_at = None;
        for _ in 0..STEPS {
            let Some(next) = self.next_event(now, lines) else { return progress };
            if next > until {
                progress.next = Some(next);
                return progress;
            }
            let at = next.max(self.os.monotonic());
            // What is due at once, again and again, gets on no faster than the clock.
            if idle_at == Some(at) {
                progress.next = Some(until + SLICE);
                return progress;
            }
            self.os.set_monotonic(at);
            let came = self.instant(at, now, lines, console, streams, &mut progress);
            idle_at = (!came).then_some(at);
            progress.delivered |= came;
            if progress.exit.is_some() {
                return progress;
            }
        }
        progress.next = Some(until + SLICE);
        progress
    }

    /// Gives the guest's time at which something happens next.
    fn next_event(&self, now: Duration, lines: &Lines) -> Option<Duration> {
        if self.os.is_halted() {
            return None;
        }
        if let Some(boot) = &self.boot {
            return (boot.fate != BootFate::Hangs).then_some(boot.ready_at);
        }
        let mut next = self.agent.next_deadline();
        let mut sooner = |time: Option<Duration>| {
            if let Some(time) = time {
                next = Some(next.map_or(time, |known| known.min(time)));
            }
        };
        sooner(self.os.next_wakeup());
        sooner(self.slice_at);
        let heard = |pipe: &Pipe| !self.deaf || pipe.socket.is_some();
        for (conn, pipe) in lines.pipes.iter().filter(|(_, pipe)| heard(pipe)) {
            let due = pipe.due(self.room(*conn, pipe));
            sooner(due.map(|due| self.guest_time(due, now)));
        }
        // The agent does one thing at a time; the processes beside it go on with it.
        if self.busy_until > self.os.monotonic() {
            return Some(next.map_or(self.busy_until, |next| next.max(self.busy_until)));
        }
        next
    }

    /// Gives how many bytes of a connection the guest takes now.
    fn room(&self, conn: ConnId, pipe: &Pipe) -> usize {
        match pipe.socket {
            Some(socket) => self.os.socket_room(socket),
            None if self.agent.wants_input(conn) => usize::MAX,
            None => 0,
        }
    }

    /// Gives the guest's time that belongs to a host time; what came while it stood still comes at once.
    fn guest_time(&self, due: Duration, now: Duration) -> Duration {
        match self.running_since {
            Some(since) => self.base + due.saturating_sub(since),
            None => self.clock(now),
        }
    }

    /// Does all that happens at one instant. Says whether anything came from the host.
    fn instant(
        &mut self,
        at: Duration,
        now: Duration,
        lines: &mut Lines,
        console: &mut Console,
        streams: &Streams,
        progress: &mut Progress,
    ) -> bool {
        if self.boot.is_some() {
            self.finish_boot(console);
            self.take_events(console, progress);
            return false;
        }
        self.slice_at = None;
        let host_time = self.host_time(at).unwrap_or(now);
        let came = self.take_arrivals(host_time, lines);
        self.settle(at, streams);
        self.pass_dials(host_time, lines, streams);
        let delay = self.os.take_agent_delay();
        if !delay.is_zero() {
            self.busy_until = at + delay;
            self.slice_at = Some(self.busy_until);
        } else {
            self.send(lines);
        }
        if self.os.has_events() {
            self.take_events(console, progress);
        }
        came
    }

    fn finish_boot(&mut self, console: &mut Console) {
        let Some(boot) = self.boot.take() else { return };
        if boot.fate == BootFate::Panics {
            self.os.panic("VFS: no working init was found");
        } else {
            console.line("twinvm: guest agent listens");
        }
    }

    fn take_arrivals(&mut self, now: Duration, lines: &mut Lines) -> bool {
        let mut came = false;
        lines.pipes.retain(|conn, pipe| {
            if let Some(socket) = pipe.socket {
                return self.take_for_socket(socket, pipe, now, &mut came);
            }
            if self.deaf {
                return true;
            }
            while let Some(arrival) = pipe.arrive(now, self.room(*conn, pipe)) {
                came = true;
                match arrival {
                    Arrival::Accept => self.agent.connected(*conn),
                    Arrival::Bytes(bytes) => {
                        if self.agent.received(*conn, &bytes, &mut self.os).is_err() {
                            self.agent.disconnected(*conn);
                            pipe.break_down(&mut |_| 0);
                            pipe.end();
                            return !pipe.host_dropped;
                        }
                    }
                    Arrival::Closed => {
                        self.agent.disconnected(*conn);
                        pipe.end();
                        return !pipe.host_dropped;
                    }
                }
            }
            true
        });
        came
    }

    /// Takes what has arrived for a socket. Says whether the connection goes on.
    fn take_for_socket(
        &mut self,
        socket: u32,
        pipe: &mut Pipe,
        now: Duration,
        came: &mut bool,
    ) -> bool {
        if pipe.host_dropped && pipe.guest_is_gone() {
            return false;
        }
        while let Some(arrival) = pipe.arrive(now, self.os.socket_room(socket)) {
            *came = true;
            match arrival {
                Arrival::Accept => {
                    self.os.socket_answer(socket, !pipe.refused);
                    if pipe.refused {
                        return false;
                    }
                }
                Arrival::Bytes(bytes) => self.os.socket_deliver(socket, bytes),
                Arrival::Closed if pipe.is_broken() => {
                    self.os.socket_lost(socket);
                    pipe.end();
                    return !pipe.host_dropped;
                }
                Arrival::Closed => {
                    self.os.socket_peer_closed(socket, pipe.host_dropped);
                    if pipe.host_dropped {
                        return false;
                    }
                }
            }
        }
        true
    }

    /// Lets agent and processes go on until both wait.
    fn settle(&mut self, at: Duration, streams: &Streams) {
        let mut budget = STEPS;
        loop {
            let agent = self.agent.advance(&mut self.os);
            if self.os.is_halted() {
                return;
            }
            let mut pick = |n| if n < 2 { 0 } else { streams.index(Purpose::GuestSchedule, n) };
            let report = self.os.run_ordered(budget, &mut pick);
            budget = budget.saturating_sub(report.steps);
            if report.more && budget == 0 {
                self.slice_at = Some(at + report.cpu.max(SLICE));
                return;
            }
            if !agent && report.steps == 0 {
                return;
            }
        }
    }

    /// Has the agent look at its processes again at once.
    pub(super) fn act_again(&mut self, now: Duration) {
        self.slice_at = Some(self.clock(now));
    }

    /// Hands on what waited for room. Says whether there was anything.
    pub(super) fn send_waiting(&mut self, lines: &mut Lines) -> bool {
        if self.busy_until > self.os.monotonic() {
            return false;
        }
        let mut waited = false;
        for (conn, pipe) in lines.pipes.iter_mut().filter(|(_, pipe)| pipe.accepted) {
            if let Some(socket) = pipe.socket {
                waited |= self.send_of_socket(socket, pipe);
            } else if let Some(outgoing) = self.agent.outgoing(*conn)
                && !outgoing.is_empty()
            {
                waited |= pipe.send(outgoing);
            }
        }
        waited
    }

    /// Hands on what a socket holds. Says whether there was anything.
    fn send_of_socket(&mut self, socket: u32, pipe: &mut Pipe) -> bool {
        if pipe.guest_is_gone() {
            return false;
        }
        let mut sent = false;
        loop {
            let (bytes, end) = self.os.socket_take(socket, pipe.room_to_host());
            pipe.send_bytes(&bytes);
            sent |= !bytes.is_empty();
            match end {
                SocketEnd::Open if bytes.is_empty() => return sent,
                SocketEnd::Open => {}
                SocketEnd::Done => {
                    pipe.finish();
                    return sent;
                }
                SocketEnd::Gone => {
                    pipe.end();
                    return sent;
                }
            }
        }
    }

    /// Hands what the agent has to say to the links.
    fn send(&mut self, lines: &mut Lines) {
        self.send_waiting(lines);
        for conn in self.agent.to_close() {
            let sent = self.agent.outgoing(conn).is_none_or(|outgoing| outgoing.is_empty());
            if sent {
                self.agent.disconnected(conn);
                if let Some(pipe) = lines.pipes.get_mut(&conn) {
                    pipe.end();
                }
            }
        }
    }

    /// Passes the kernel's doings on.
    pub(super) fn take_events(&mut self, console: &mut Console, progress: &mut Progress) {
        for event in self.os.take_events() {
            match event {
                OsEvent::Console(line) => console.line(&line),
                OsEvent::PowerOff | OsEvent::Reboot => {
                    progress.exit.get_or_insert(MachineExit::PoweredOff);
                }
                OsEvent::Panic(_) if planted(Bug::PanicLooksLikePowerOff) => {
                    progress.exit.get_or_insert(MachineExit::PoweredOff);
                }
                OsEvent::Panic(_) => {
                    let crash = MachineExit::Crashed(CrashReason::GuestPanic);
                    progress.exit.get_or_insert(crash);
                }
            }
        }
    }
}
