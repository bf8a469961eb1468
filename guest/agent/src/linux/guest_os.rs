//! [`LinuxOs`]: [`GuestOs`] by real system calls.

use super::{
    errno, ffi, files,
    init::{Ending, end_machine},
    proc_table,
    spawn::{self, Ends},
};
use crate::os::{
    Child, ChildExit, Errno, Fd, GuestOs, Output, ReadOutcome, SpawnSpec, Spawned, SysResult,
};
use bytes::Bytes;
use rustix::{
    fs::{Mode, OFlags},
    io::{Errno as Sys, retry_on_intr},
    process::{Pid, WaitId, WaitIdOptions, WaitIdStatus, WaitOptions},
    termios::SpecialCodeIndex,
    time::{ClockId, Timespec},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    os::fd::BorrowedFd,
    time::Duration,
};
use vm_guest_protocol::{EntryKind, StatEntry, TermSize};

/// The most bytes that one read of a child's output gives.
const READ_MAX: usize = 64 << 10;

/// How often `signal_all` looks again for processes that were forked while it looked.
const KILL_ROUNDS: u32 = 1000;

const KILL: u8 = 9;

/// How often killed processes are looked for at the machine's end, and how long after.
const LAST_ROUNDS: u32 = 1000;
const LAST_PAUSE: Duration = Duration::from_millis(2);

/// What an agent owns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The whole machine: the agent is PID 1.
    Machine,
    /// Everything that descends from this process; it must be a subreaper and do nothing but be the agent.
    Descendants,
    /// Only the children that the agent itself starts, and their process groups.
    Children,
}

/// The real operating system.
#[derive(Debug)]
pub struct LinuxOs {
    scope: Scope,
    children: BTreeMap<Child, Held>,
    next_child: u64,
    /// The signals that a program must have reset before it starts.
    signals: Vec<i32>,
    /// What outputs are read into.
    buffer: Box<[u8]>,
    /// Children that nobody asks after any more and that are not reaped yet.
    released: BTreeSet<i32>,
    /// What is left to close of children that were released.
    closing: Vec<Ends>,
    files: files::Files,
    ending: Ending,
    powered_off: bool,
}

/// A child that the agent holds.
///
/// One that has ended stays unreaped until it is released: so long its pid, and with it its group's id, cannot
/// belong to anybody else.
#[derive(Debug)]
struct Held {
    pid: Pid,
    ends: Ends,
    exit: Option<ChildExit>,
    /// The last byte typed on its terminal.
    last_typed: u8,
    /// Bytes that the terminal did not take yet: the end-of-file characters.
    to_type: Vec<u8>,
}

impl LinuxOs {
    /// Makes an agent's view of the operating system.
    #[must_use]
    pub fn new(scope: Scope) -> Self {
        let signals = match scope {
            // Nothing in an agent's own process changes them afterwards.
            Scope::Machine | Scope::Descendants => ffi::changed_signals(),
            Scope::Children => ffi::all_signals(),
        };
        Self {
            scope,
            children: BTreeMap::new(),
            next_child: 1,
            signals,
            buffer: vec![0; READ_MAX].into_boxed_slice(),
            released: BTreeSet::new(),
            closing: Vec::new(),
            files: files::Files::default(),
            ending: Ending::default(),
            powered_off: false,
        }
    }

    /// Makes [`GuestOs::power_off`] restart the machine.
    pub(super) fn restart_at_the_end(&mut self) {
        self.ending = Ending::Restart;
    }

    /// Says whether [`GuestOs::power_off`] was called.
    #[must_use]
    pub fn powered_off(&self) -> bool {
        self.powered_off
    }

    /// Gives the descriptor that becomes readable when a child's output can be read.
    #[must_use]
    pub fn output_fd(&self, child: Child, output: Output) -> Option<BorrowedFd<'_>> {
        self.children.get(&child)?.ends.output(output)
    }

    /// Gives the descriptor that becomes writable when a child takes input.
    #[must_use]
    pub fn stdin_fd(&self, child: Child) -> Option<BorrowedFd<'_>> {
        self.children.get(&child)?.ends.input()
    }

    /// Says whether a child was released since the last [`reap`](Self::reap), which is then due.
    #[must_use]
    pub fn has_released(&self) -> bool {
        !self.closing.is_empty()
    }

    /// Reaps the ended processes that nobody asks after: released children, and orphans where the scope has any. It
    /// closes what was held of released children: that may wait until what they have said is on its way.
    pub fn reap(&mut self) {
        self.closing.clear();
        self.released.retain(|pid| Pid::from_raw(*pid).is_some_and(|pid| !reaped(pid)));
        if self.scope == Scope::Children {
            return;
        }
        while let Some(pid) = ffi::peek_ended() {
            if self.holds(pid) {
                // The kernel names the same one every time, so the others must be found in the table.
                self.reap_from_table();
                return;
            }
            if !Pid::from_raw(pid).is_some_and(reaped) {
                return;
            }
        }
    }

    fn reap_from_table(&self) {
        let me = rustix::process::getpid().as_raw_pid();
        for row in proc_table::processes() {
            if row.parent == me && row.ended && !self.holds(row.pid) {
                let _ = Pid::from_raw(row.pid).is_some_and(reaped);
            }
        }
    }

    fn holds(&self, pid: i32) -> bool {
        self.children.values().any(|held| held.pid.as_raw_pid() == pid)
    }

    fn held(&mut self, child: Child) -> SysResult<&mut Held> {
        self.children.get_mut(&child).ok_or(Errno::SRCH)
    }

    /// Waits until processes that were killed are gone, which may hold disks; not for ever, as one that waits for a
    /// broken device never is.
    fn end_processes(&mut self) {
        for _ in 0..LAST_ROUNDS {
            self.reap();
            if !self.has_processes() {
                return;
            }
            self.signal_all(KILL);
            std::thread::sleep(LAST_PAUSE);
        }
    }

    /// Lists the live processes of the guest but the agent.
    fn others(&self) -> Vec<proc_table::ProcessRow> {
        let rows = proc_table::processes();
        if self.scope == Scope::Children {
            let groups: BTreeSet<i32> =
                self.children.values().map(|held| held.pid.as_raw_pid()).collect();
            let ours = |row: &&proc_table::ProcessRow| {
                !row.ended && (groups.contains(&row.group) || self.released.contains(&row.group))
            };
            return rows.iter().filter(ours).copied().collect();
        }
        let me = rustix::process::getpid().as_raw_pid();
        let below = proc_table::descendants(&rows, me).into_iter();
        below.filter(|row| !row.ended).collect()
    }
}

impl Held {
    fn notice_exit(&mut self) -> Option<ChildExit> {
        if self.exit.is_none() {
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
            match retry_on_intr(|| rustix::process::waitid(WaitId::Pid(self.pid), options)) {
                Ok(Some(status)) => self.exit = exit_of(&status),
                Ok(None) => {}
                // Somebody else reaped it; how it ended is lost.
                Err(_) => self.exit = Some(ChildExit::Signaled(KILL)),
            }
        }
        self.exit
    }

    /// Types what the terminal did not take before.
    fn type_on(&mut self) {
        if let (Some(master), false) = (self.ends.terminal(), self.to_type.is_empty())
            && let Ok(written) = retry_on_intr(|| rustix::io::write(master, &self.to_type))
        {
            self.to_type.drain(..written);
        }
    }
}

impl GuestOs for LinuxOs {
    fn monotonic(&self) -> Duration {
        let now = rustix::time::clock_gettime(ClockId::Monotonic);
        let part = |value: i64| u64::try_from(value).unwrap_or(0);
        Duration::from_secs(part(now.tv_sec)) + Duration::from_nanos(part(now.tv_nsec))
    }

    fn set_wall_clock(&mut self, since_epoch: Duration) -> SysResult<()> {
        if self.scope != Scope::Machine {
            return Err(Errno::PERM);
        }
        let time = Timespec {
            tv_sec: i64::try_from(since_epoch.as_secs()).map_err(|_| Errno::INVAL)?,
            tv_nsec: since_epoch.subsec_nanos().into(),
        };
        rustix::time::clock_settime(ClockId::Realtime, time).map_err(errno)
    }

    fn reseed(&mut self, entropy: &[u8; 32]) -> SysResult<()> {
        if self.scope != Scope::Machine {
            return Err(Errno::PERM);
        }
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let random = rustix::fs::open("/dev/urandom", flags, Mode::empty()).map_err(errno)?;
        ffi::add_entropy(std::os::fd::AsFd::as_fd(&random), entropy)
    }

    fn spawn(&mut self, spec: &SpawnSpec) -> SysResult<Spawned> {
        let started = spawn::spawn(spec, self.scope, &self.signals)?;
        let child = Child(self.next_child);
        self.next_child += 1;
        let pid = started.pid;
        let held =
            Held { pid, ends: started.ends, exit: None, last_typed: b'\n', to_type: Vec::new() };
        self.children.insert(child, held);
        Ok(Spawned { child, pid: pid.as_raw_pid().unsigned_abs() })
    }

    fn read_output(&mut self, child: Child, output: Output, max: usize) -> SysResult<ReadOutcome> {
        let held = self.children.get_mut(&child).ok_or(Errno::SRCH)?;
        held.type_on();
        let Some(fd) = held.ends.output(output) else {
            return Ok(ReadOutcome::Eof);
        };
        let buffer = &mut self.buffer[..max.min(READ_MAX)];
        match retry_on_intr(|| rustix::io::read(fd, &mut *buffer)) {
            Ok(0) if max > 0 => Ok(ReadOutcome::Eof),
            Ok(0) | Err(Sys::AGAIN) => Ok(ReadOutcome::WouldBlock),
            Ok(read) => Ok(ReadOutcome::Data(Bytes::copy_from_slice(&buffer[..read]))),
            // How a terminal says that its last user is gone.
            Err(Sys::IO) if held.ends.terminal().is_some() => Ok(ReadOutcome::Eof),
            Err(error) => Err(errno(error)),
        }
    }

    fn write_stdin(&mut self, child: Child, bytes: &[u8]) -> SysResult<usize> {
        let held = self.held(child)?;
        let Some(fd) = held.ends.input() else {
            return Err(Errno::PIPE);
        };
        match retry_on_intr(|| rustix::io::write(fd, bytes)) {
            Ok(written) => {
                if let Some(last) = bytes[..written].last() {
                    held.last_typed = *last;
                }
                Ok(written)
            }
            Err(Sys::AGAIN) => Ok(0),
            Err(Sys::IO) if held.ends.terminal().is_some() => Err(Errno::PIPE),
            Err(error) => Err(errno(error)),
        }
    }

    fn close_stdin(&mut self, child: Child) {
        let Ok(held) = self.held(child) else {
            return;
        };
        match &mut held.ends {
            Ends::Pipes { stdin, .. } => *stdin = None,
            Ends::Terminal(master) => {
                let code = rustix::termios::tcgetattr(&*master)
                    .map_or(4, |modes| modes.special_codes[SpecialCodeIndex::VEOF]);
                // Within a line the first one only hands the line over.
                let times = if held.last_typed == b'\n' { 1 } else { 2 };
                held.to_type = vec![code; times];
                held.last_typed = b'\n';
                held.type_on();
            }
        }
    }

    fn resize(&mut self, child: Child, size: TermSize) -> SysResult<()> {
        let master = self.held(child)?.ends.terminal().ok_or(Errno::NOTTY)?;
        spawn::set_size(master, size)
    }

    fn signal_group(&mut self, child: Child, signal: u8) -> SysResult<()> {
        let held = self.held(child)?;
        let group = held.pid.as_raw_pid();
        let ended = held.notice_exit().is_some();
        // Unreaped members take signals without a word, so the table must say whether any other is left.
        if ended && !proc_table::processes().iter().any(|row| row.group == group && !row.ended) {
            return Err(Errno::SRCH);
        }
        ffi::kill(-group, signal)
    }

    fn try_wait(&mut self, child: Child) -> Option<ChildExit> {
        let held = self.held(child).ok()?;
        held.type_on();
        held.notice_exit()
    }

    fn release(&mut self, child: Child) {
        if let Some(held) = self.children.remove(&child) {
            self.released.insert(held.pid.as_raw_pid());
            self.closing.push(held.ends);
        }
    }

    fn signal_all(&mut self, signal: u8) {
        if self.scope == Scope::Machine {
            // The kernel leaves PID 1 itself out.
            let _ = ffi::kill(-1, signal);
            return;
        }
        let mut signalled = BTreeSet::new();
        for _ in 0..KILL_ROUNDS {
            let others = self.others();
            let mut new = false;
            for row in others {
                if signalled.insert((row.pid, row.started)) {
                    let _ = row.signal(signal);
                    new = true;
                }
            }
            // What is killed cannot fork any more, so the rounds end when they find nothing new.
            if signal != KILL || !new {
                return;
            }
        }
    }

    fn has_processes(&mut self) -> bool {
        !self.others().is_empty()
    }

    fn open_read(&mut self, path: &str) -> SysResult<Fd> {
        self.files.open_read(path)
    }

    fn create_new(&mut self, path: &str, mode: u32) -> SysResult<Fd> {
        self.files.create_new(path, mode)
    }

    fn read(&mut self, fd: Fd, max: usize) -> SysResult<Bytes> {
        self.files.read(fd, max)
    }

    fn write_all(&mut self, fd: Fd, bytes: &[u8]) -> SysResult<()> {
        self.files.write_all(fd, bytes)
    }

    fn sync_file(&mut self, fd: Fd) -> SysResult<()> {
        self.files.sync(fd)
    }

    fn set_owner_and_mode(
        &mut self,
        fd: Fd,
        owner: Option<(u32, u32)>,
        mode: u32,
    ) -> SysResult<()> {
        self.files.set_owner_and_mode(fd, owner, mode)
    }

    fn close(&mut self, fd: Fd) {
        self.files.close(fd);
    }

    fn sync_dir(&mut self, path: &str) -> SysResult<()> {
        files::sync_dir(path)
    }

    fn lstat(&mut self, path: &str) -> SysResult<StatEntry> {
        files::stat(path, false)
    }

    fn stat(&mut self, path: &str) -> SysResult<StatEntry> {
        files::stat(path, true)
    }

    fn read_link(&mut self, path: &str) -> SysResult<String> {
        files::read_link(path)
    }

    fn read_dir(&mut self, path: &str) -> SysResult<Vec<(String, EntryKind)>> {
        files::read_dir(path)
    }

    fn mkdir(&mut self, path: &str, mode: u32) -> SysResult<()> {
        files::mkdir(path, mode)
    }

    fn rmdir(&mut self, path: &str) -> SysResult<()> {
        files::rmdir(path)
    }

    fn unlink(&mut self, path: &str) -> SysResult<()> {
        files::unlink(path)
    }

    fn rename(&mut self, from: &str, to: &str) -> SysResult<()> {
        files::rename(from, to)
    }

    fn sync_all(&mut self) {
        // Elsewhere the disks are the host's; the agent's own files were made durable one by one.
        if self.scope == Scope::Machine {
            rustix::fs::sync();
        }
    }

    fn power_off(&mut self) {
        self.powered_off = true;
        if self.scope == Scope::Machine {
            self.end_processes();
            // Open files keep their file systems from being unmounted.
            self.files = files::Files::default();
            // Where the kernel refuses, the main loop ends, and with PID 1 the machine.
            end_machine(self.ending);
        }
    }
}

/// Reaps a child if it has ended. One that is not our child counts as reaped.
fn reaped(pid: Pid) -> bool {
    !matches!(retry_on_intr(|| rustix::process::waitpid(Some(pid), WaitOptions::NOHANG)), Ok(None))
}

fn exit_of(status: &WaitIdStatus) -> Option<ChildExit> {
    let byte = |number: i32| u8::try_from(number & 0xff).unwrap_or(u8::MAX);
    status
        .exit_status()
        .map(|code| ChildExit::Exited(byte(code)))
        .or_else(|| status.terminating_signal().map(|signal| ChildExit::Signaled(byte(signal))))
}
