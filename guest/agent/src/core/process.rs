//! The processes that the agent has started.

use super::{
    AgentConfig, ChildInterest, Violation,
    flow::{Intake, Outflow},
};
use crate::os::{Child, ChildExit, Errno, GuestOs, Output, ReadOutcome, Spawned};
use bytes::{Buf, BytesMut};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};
use vm_guest_protocol::{Frame, MAX_DATA, ProcessEntry, ProcessExit, Started, StreamId};
use vm_planted_bugs::{Bug, planted};

/// How many processes are known at most, so that a list of them all fits into a frame.
pub(super) const MAX_PROCESSES: usize = 1000;

/// How many processes that have ended and belong to no stream are kept.
const MAX_ENDED: usize = 64;

/// How many bytes of each output are read at a time where nobody waits for them, and after a process's end. The
/// latter is as much as a pipe holds at most, so what comes after it was not written by the process.
const PULL_BOUND: usize = 1 << 20;

/// How long the end of an output waits for that of the process, with which it mostly comes: one message is cheaper than
/// three.
const EOF_PATIENCE: Duration = Duration::from_millis(5);

/// How long the start of a process waits for what it has to say first, where the host does not mind.
const START_PATIENCE: Duration = Duration::from_millis(50);

const OUTPUTS: [Output; 2] = [Output::Stdout, Output::Stderr];
const SIGKILL: u8 = 9;
const SIGTERM: u8 = 15;

/// A process, from its start until it is forgotten.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Process {
    child: Child,
    pid: u32,
    program: String,
    tty: bool,
    /// Standard output and standard error.
    pub(super) outs: [Outflow; 2],
    stdin: Stdin,
    started: Duration,
    deadline: Option<Duration>,
    timed_out: bool,
    /// The host has not been told of the start.
    start_owed: bool,
    /// When it is told at the latest, where that may wait.
    start_due: Option<Duration>,
    /// When the host is told at the latest that an output has ended.
    eof_due: Option<Duration>,
    exit: Option<ProcessExit>,
    /// Bytes of each output that were read after the end.
    drained: [usize; 2],
    /// The stream that reads it.
    pub(super) reader: Option<StreamId>,
    /// Nobody wants it; it is forgotten once it is gone.
    doomed: bool,
}

/// Standard input on its way to the process.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Stdin {
    intake: Intake,
    pending: BytesMut,
    /// The host has sent all there is.
    complete: bool,
    /// The process can still read; else what comes is dropped.
    open: bool,
}

/// What a program was started with that matters afterwards.
pub(super) struct Origin {
    pub(super) program: String,
    pub(super) tty: bool,
    pub(super) stdin: bool,
    /// The host need not hear of the start at once.
    pub(super) lazy: bool,
    pub(super) timeout: Option<Duration>,
}

impl Process {
    pub(super) fn new(spawned: Spawned, origin: Origin, reader: StreamId, now: Duration) -> Self {
        let mut outs = [Outflow::new(), Outflow::new()];
        if origin.tty {
            outs[1].finish();
        }
        Self {
            child: spawned.child,
            pid: spawned.pid,
            program: origin.program,
            tty: origin.tty,
            outs,
            stdin: Stdin {
                intake: Intake::new(),
                pending: BytesMut::new(),
                complete: false,
                open: origin.stdin,
            },
            started: now,
            deadline: origin.timeout.and_then(|timeout| now.checked_add(timeout)),
            timed_out: false,
            start_owed: true,
            start_due: origin.lazy.then(|| now.saturating_add(START_PATIENCE)),
            eof_due: None,
            exit: None,
            drained: [0; 2],
            reader: Some(reader),
            doomed: false,
        }
    }

    pub(super) fn child(&self) -> Child {
        self.child
    }

    pub(super) fn has_tty(&self) -> bool {
        self.tty
    }

    pub(super) fn has_ended(&self) -> bool {
        self.exit.is_some()
    }

    /// How it ended, once all its output was sent.
    pub(super) fn end_to_send(&self) -> Option<&ProcessExit> {
        self.exit.as_ref().filter(|_| self.outs.iter().all(Outflow::is_done))
    }

    /// Says whether it has ended and nothing more will be read of it.
    fn is_complete(&self) -> bool {
        self.exit.is_some() && (self.doomed || self.outs.iter().all(Outflow::is_ended))
    }

    /// Says whether the host is to be told of the start now; it is not yet where that may travel with other news.
    pub(super) fn start_to_send(&self) -> bool {
        let news = self.exit.is_some() || self.outs.iter().any(Outflow::has_news);
        self.start_owed && (self.start_due.is_none() || news)
    }

    /// Says whether the host is still to be told of the start.
    pub(super) fn owes_start(&self) -> bool {
        self.start_owed
    }

    /// Tells of the start.
    pub(super) fn started_frame(&mut self, process: u64) -> Frame {
        self.start_owed = false;
        self.start_due = None;
        Frame::Started(Started {
            process,
            pid: self.pid,
            stdout: self.outs[0].start(),
            stderr: self.outs[1].start(),
            tty: self.tty,
            stdin: self.stdin.intake.base(),
        })
    }

    fn entry(&self, process: u64) -> ProcessEntry {
        ProcessEntry {
            process,
            pid: self.pid,
            program: self.program.clone(),
            exit: self.exit.clone(),
        }
    }

    /// When it has to be looked after though nothing else happens.
    fn due(&self) -> Option<Duration> {
        [self.deadline(), self.eof_due, self.start_due].into_iter().flatten().min()
    }

    /// When its time runs out.
    fn deadline(&self) -> Option<Duration> {
        if planted(Bug::TimeoutIsNotWatched) {
            return None;
        }
        self.deadline.filter(|_| self.exit.is_none() && !self.timed_out && !self.doomed)
    }

    fn room(&self, output: usize, config: &AgentConfig) -> usize {
        let out = &self.outs[output];
        if out.is_ended() || self.doomed {
            0
        } else if self.reader.is_some() {
            config.window_bytes().saturating_sub(out.kept())
        } else {
            PULL_BOUND
        }
    }

    /// Moves what can be moved and takes note of the end. Says whether anything changed.
    pub(super) fn pump(
        &mut self,
        os: &mut dyn GuestOs,
        now: Duration,
        config: &AgentConfig,
    ) -> bool {
        let mut changed = false;
        if self.exit.is_none() {
            if let Some(exit) = os.try_wait(self.child) {
                self.note_exit(exit, now);
                changed = true;
            } else if self.deadline().is_some_and(|deadline| now >= deadline) {
                self.timed_out = true;
                self.kill(os);
                changed = true;
            }
        }
        for output in 0..2 {
            let ended = self.outs[output].is_ended();
            changed |= self.pull(output, os, config);
            if self.exit.is_none() && self.outs[output].is_ended() && !ended {
                self.outs[output].hold_eof(true);
                self.eof_due.get_or_insert(now.saturating_add(EOF_PATIENCE));
            }
        }
        if self.eof_due.is_some_and(|due| self.exit.is_some() || now >= due) {
            self.eof_due = None;
            self.outs.iter_mut().for_each(|out| out.hold_eof(false));
            changed = true;
        }
        if self.start_due.is_some_and(|due| now >= due) {
            self.start_due = None;
            changed = true;
        }
        changed | self.feed(os)
    }

    fn note_exit(&mut self, exit: ChildExit, now: Duration) {
        let (code, signal) = match exit {
            ChildExit::Exited(code) => (Some(code), None),
            ChildExit::Signaled(signal) => (None, Some(signal)),
        };
        let began = if planted(Bug::ElapsedIsUptime) { Duration::ZERO } else { self.started };
        let elapsed = now.saturating_sub(began).as_nanos();
        self.exit = Some(ProcessExit {
            code,
            signal,
            timed_out: self.timed_out,
            elapsed_ns: u64::try_from(elapsed).unwrap_or(u64::MAX),
        });
    }

    /// Reads an output as far as there is room. Says whether anything came.
    fn pull(&mut self, output: usize, os: &mut dyn GuestOs, config: &AgentConfig) -> bool {
        let mut read = 0;
        if self.exit.is_some() && planted(Bug::LastOutputIsLost) {
            let changed = !self.outs[output].is_ended();
            self.outs[output].finish();
            return changed;
        }
        loop {
            let mut room = self.room(output, config);
            if self.reader.is_none() {
                room = room.saturating_sub(read);
            }
            if room == 0 {
                return read > 0;
            }
            let max = room.min(MAX_DATA);
            let out = &mut self.outs[output];
            match os.read_output(self.child, OUTPUTS[output], max) {
                Ok(ReadOutcome::Data(bytes)) if !bytes.is_empty() => {
                    read += bytes.len();
                    out.push(&bytes);
                    if self.reader.is_none() {
                        out.trim(config.retained_detached);
                    }
                    if self.exit.is_some() {
                        self.drained[output] += bytes.len();
                        if self.drained[output] >= PULL_BOUND {
                            out.finish();
                            return true;
                        }
                    }
                }
                Ok(ReadOutcome::WouldBlock | ReadOutcome::Data(_))
                | Err(Errno::AGAIN | Errno::INTR)
                    if self.exit.is_none() =>
                {
                    return read > 0;
                }
                // The process is gone and its pipe is empty, or no one can write to it any more.
                _ => {
                    out.finish();
                    return true;
                }
            }
        }
    }

    /// Takes standard input from the host.
    pub(super) fn stdin_data(
        &mut self,
        offset: u64,
        bytes: &[u8],
        os: &mut dyn GuestOs,
    ) -> Result<(), Violation> {
        let known = self.stdin.intake.data(offset, bytes.len())?;
        let mut fresh = &bytes[known..];
        if !self.accepts_stdin() {
            self.stdin.drop_pending();
            return Ok(());
        }
        if self.stdin.complete || fresh.is_empty() {
            // An earlier stream has ended the input: what comes after it is counted as taken once it is closed.
            return Ok(());
        }
        if self.stdin.pending.is_empty() {
            fresh = &fresh[self.stdin.write(self.child, fresh, os)..];
        }
        if self.stdin.open {
            self.stdin.pending.extend_from_slice(fresh);
        }
        Ok(())
    }

    /// Takes the end of standard input from the host.
    pub(super) fn stdin_end(&mut self, offset: u64, os: &mut dyn GuestOs) -> Result<(), Violation> {
        self.stdin.intake.end(offset)?;
        self.stdin.complete = true;
        self.feed(os);
        Ok(())
    }

    fn accepts_stdin(&self) -> bool {
        self.stdin.open && self.exit.is_none() && !self.doomed
    }

    /// Gives the process what waits for it. Says whether anything changed.
    fn feed(&mut self, os: &mut dyn GuestOs) -> bool {
        if !self.stdin.open {
            return false;
        }
        if !self.accepts_stdin() {
            os.close_stdin(self.child);
            self.stdin.open = false;
            self.stdin.drop_pending();
            return true;
        }
        let mut changed = false;
        let ends = self.stdin.complete && planted(Bug::InputEndsTooEarly);
        while !self.stdin.pending.is_empty() && !ends {
            let pending = std::mem::take(&mut self.stdin.pending);
            let count = self.stdin.write(self.child, &pending, os);
            self.stdin.pending = pending;
            self.stdin.pending.advance(count);
            if count == 0 {
                return changed;
            }
            changed = true;
        }
        if self.stdin.complete && self.stdin.open {
            os.close_stdin(self.child);
            self.stdin.open = false;
            self.stdin.drop_pending();
            changed = true;
        }
        changed
    }

    /// Makes the credit for standard input that is due.
    pub(super) fn stdin_credit(&mut self, config: &AgentConfig) -> Option<Frame> {
        self.stdin.intake.credit(config.window, true)
    }

    /// Makes the credit for standard input that a host is told on a new connection.
    pub(super) fn stdin_credit_now(&mut self, config: &AgentConfig) -> Frame {
        self.stdin.intake.force_credit(config.window)
    }

    /// Gives the process to a new reader.
    pub(super) fn attach(&mut self, reader: StreamId, stdout: u64, stderr: u64) {
        self.reader = Some(reader);
        self.start_owed = true;
        self.start_due = None;
        self.outs[0].attach(stdout);
        self.outs[1].attach(stderr);
        self.stdin.intake.reopen();
    }

    /// Gives a copy of what is known of the host's standard input, for a stream that loses the process.
    pub(super) fn intake(&self) -> Intake {
        self.stdin.intake.clone()
    }

    /// Lets go of the reader; the process goes on.
    fn orphan(&mut self, config: &AgentConfig) {
        self.reader = None;
        for out in &mut self.outs {
            out.trim(config.retained_detached);
        }
    }

    /// Waits for the host to say where to go on, on a new connection.
    pub(super) fn suspend(&mut self) {
        self.outs.iter_mut().for_each(Outflow::suspend);
    }

    /// Begins anew for a host that has heard nothing.
    pub(super) fn restart(&mut self) {
        self.start_owed = true;
        self.start_due = None;
        self.outs.iter_mut().for_each(Outflow::restart);
    }

    fn kill(&self, os: &mut dyn GuestOs) {
        // It fails only where nothing is left to be killed.
        let signal = if planted(Bug::TimeoutAsksPolitely) { SIGTERM } else { SIGKILL };
        let _ = os.signal_group(self.child, signal);
    }

    fn interest(&self, config: &AgentConfig) -> ChildInterest {
        // Where one output has ended the end of all is near, and is awaited before the other output is looked at.
        let reads = |output| self.eof_due.is_none() && self.room(output, config) > 0;
        ChildInterest {
            child: self.child,
            stdout: reads(0),
            stderr: reads(1),
            stdin: self.accepts_stdin() && !self.stdin.pending.is_empty(),
        }
    }
}

impl Stdin {
    /// Writes once, and says how much went; all of it when the process does not read any more.
    fn write(&mut self, child: Child, bytes: &[u8], os: &mut dyn GuestOs) -> usize {
        if bytes.is_empty() {
            return 0;
        }
        let count = match os.write_stdin(child, bytes) {
            Ok(count) => count.min(bytes.len()),
            Err(Errno::AGAIN | Errno::INTR) => 0,
            Err(_) => {
                os.close_stdin(child);
                self.open = false;
                bytes.len()
            }
        };
        self.intake.take(count);
        count
    }

    fn drop_pending(&mut self) {
        self.pending = BytesMut::new();
        self.intake.take_all();
    }
}

/// All processes, by id.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Processes {
    all: BTreeMap<u64, Process>,
    /// Those that still have to be advanced, in the order of their start.
    live: Vec<u64>,
    /// Those that have ended and belong to no stream, oldest end first.
    ended: VecDeque<u64>,
    last: u64,
}

impl Processes {
    pub(super) fn is_full(&self) -> bool {
        self.all.len() >= MAX_PROCESSES
    }

    pub(super) fn add(&mut self, process: Process) -> u64 {
        self.last += 1;
        if planted(Bug::ProcessIdIsReused) {
            self.last = (1..).find(|id| !self.all.contains_key(id)).unwrap_or(self.last);
        }
        self.all.insert(self.last, process);
        self.live.push(self.last);
        self.last
    }

    /// Finds a process that someone may still want.
    pub(super) fn get_mut(&mut self, id: u64) -> Option<&mut Process> {
        self.all.get_mut(&id).filter(|process| !process.doomed)
    }

    pub(super) fn entries(&self) -> Vec<ProcessEntry> {
        let wanted = self.all.iter().filter(|(_, process)| !process.doomed);
        wanted.map(|(id, process)| process.entry(*id)).collect()
    }

    pub(super) fn next_deadline(&self) -> Option<Duration> {
        self.live.iter().filter_map(|id| self.all.get(id)?.due()).min()
    }

    pub(super) fn interest(&self, config: &AgentConfig) -> Vec<ChildInterest> {
        let live = self.live.iter().filter_map(|id| self.all.get(id));
        live.map(|process| process.interest(config)).collect()
    }

    /// Advances every live process, and calls `changed` for each that did.
    pub(super) fn advance(
        &mut self,
        os: &mut dyn GuestOs,
        config: &AgentConfig,
        mut changed: impl FnMut(&mut Process),
    ) {
        if self.live.is_empty() {
            return;
        }
        let now = os.monotonic();
        let mut index = 0;
        while let Some(&id) = self.live.get(index) {
            let Some(process) = self.all.get_mut(&id) else {
                self.live.remove(index);
                continue;
            };
            if process.pump(os, now, config) {
                changed(process);
            }
            if !process.is_complete() {
                index += 1;
                continue;
            }
            os.release(process.child);
            let (doomed, orphan) = (process.doomed, process.reader.is_none());
            self.live.remove(index);
            if doomed || (orphan && planted(Bug::EndedIsForgotten)) {
                self.all.remove(&id);
            } else if orphan {
                self.keep_ended(id);
            }
        }
    }

    fn keep_ended(&mut self, id: u64) {
        self.ended.push_back(id);
        if self.ended.len() > MAX_ENDED
            && let Some(oldest) = self.ended.pop_front()
        {
            self.all.remove(&oldest);
        }
    }

    /// Gives a process to a new reader. The caller has checked that it is known.
    pub(super) fn attach(&mut self, id: u64, reader: StreamId, stdout: u64, stderr: u64) {
        if let Some(process) = self.get_mut(id) {
            process.attach(reader, stdout, stderr);
            self.ended.retain(|other| *other != id);
        }
    }

    /// Takes a process's reader away; it goes on, or is kept as one that has ended.
    pub(super) fn orphan(&mut self, id: u64, config: &AgentConfig) {
        let Some(process) = self.all.get_mut(&id) else { return };
        process.orphan(config);
        if process.is_complete() {
            self.keep_ended(id);
        }
    }

    /// Kills a process's group and forgets it.
    pub(super) fn doom(&mut self, id: u64, os: &mut dyn GuestOs) {
        let Some(process) = self.all.get_mut(&id) else { return };
        if process.is_complete() {
            self.all.remove(&id);
            return;
        }
        process.doomed = true;
        process.reader = None;
        process.outs = [Outflow::default(), Outflow::default()];
        process.stdin.drop_pending();
        if process.exit.is_none() {
            if !planted(Bug::DoomedLivesOn) {
                process.kill(os);
            }
            return;
        }
        os.release(process.child);
        self.all.remove(&id);
        self.live.retain(|other| *other != id);
    }
}
