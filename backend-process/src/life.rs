//! [`Life`]: one agent process, its directory, and the certain end of both.

use crate::{AgentProgram, hypervisor::lock};
use bytes::Bytes;
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    fs::MemfdFlags,
    process::{Pid, PidfdFlags, Signal},
};
use std::{
    fs::File,
    io::{self, PipeWriter},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{fs::FileExt, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Child, Stdio},
    sync::{
        Mutex, TryLockError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};
use tokio::sync::watch;
use vm_core::machine::{MachineError, MachineExit, MachineStats};
use vm_guest_agent::linux::{launch, proc_table, remove_tree};

/// How long an agent whose lifeline was cut may take to clean up before it is killed.
const AGENT_GRACE: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// How often what is left of the guest is looked for and killed, and how long after.
const SWEEP_ROUNDS: u32 = 2500;
const SWEEP_PAUSE: Duration = Duration::from_millis(2);

/// How much of the agent's messages is kept for the console.
const CONSOLE_BYTES: u64 = 64 << 10;

/// Where a life is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Fresh,
    Running,
    Ended(MachineExit),
}

/// One agent process, not started, running or ended.
#[derive(Debug)]
pub(crate) struct Life {
    agent: AgentProgram,
    dir: PathBuf,
    user: Option<(u32, u32)>,
    mark: u64,
    phase: watch::Sender<Phase>,
    killed: AtomicBool,
    log: File,
    /// Held for as long as the end takes.
    running: Mutex<Option<Running>>,
}

#[derive(Debug)]
struct Running {
    child: Child,
    /// Names the child whatever becomes of its pid.
    exact: OwnedFd,
    /// When it closes, the agent ends itself and all it started.
    lifeline: Option<PipeWriter>,
}

impl Life {
    /// The socket's name in the directory.
    pub(crate) const SOCKET: &str = "agent.sock";
    /// The name of the guest's own directory in it.
    pub(crate) const SCRATCH: &str = launch::SCRATCH;

    /// Describes a life; there is nothing of it on the host yet.
    pub(crate) fn new(
        agent: AgentProgram,
        dir: PathBuf,
        user: Option<(u32, u32)>,
        mark: u64,
    ) -> Result<Self, MachineError> {
        let log = rustix::fs::memfd_create("vm-guest-agent.log", MemfdFlags::CLOEXEC)
            .map_err(|error| refused(&error.into()))?;
        let (phase, _) = watch::channel(Phase::Fresh);
        let (killed, log) = (AtomicBool::new(false), File::from(log));
        Ok(Self { agent, dir, user, mark, phase, killed, log, running: Mutex::new(None) })
    }

    /// Starts the agent, and gives a descriptor that becomes readable when it ends.
    pub(crate) fn boot(&self) -> Result<OwnedFd, MachineError> {
        let mut running = match self.running.try_lock() {
            Ok(running) => running,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            // Whoever holds it is ending this life.
            Err(TryLockError::WouldBlock) => return Err(MachineError::Ended),
        };
        match self.phase() {
            Phase::Fresh => {}
            Phase::Running => return Err(MachineError::Failed("it runs already".to_owned())),
            Phase::Ended(_) => return Err(MachineError::Ended),
        }
        let started = self.spawn().map_err(|error| refused(&error))?;
        let watch = started.exact.try_clone();
        *running = Some(started);
        self.phase.send_replace(Phase::Running);
        watch.map_err(|error| MachineError::Failed(error.to_string()))
    }

    pub(crate) fn phase(&self) -> Phase {
        self.phase.borrow().clone()
    }

    /// Waits for the end, after which nothing of this life is left.
    pub(crate) async fn ended(&self) -> MachineExit {
        let mut phase = self.phase.subscribe();
        loop {
            if let Phase::Ended(exit) = &*phase.borrow_and_update() {
                return exit.clone();
            }
            // `self` holds the sender, so that this cannot fail.
            let _ = phase.changed().await;
        }
    }

    pub(crate) fn note_kill(&self) {
        self.killed.store(true, Ordering::Release);
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.join(Self::SOCKET)
    }

    pub(crate) fn agent_pid(&self) -> Option<u32> {
        let running = self.running.try_lock().ok()?;
        Some(running.as_ref()?.child.id())
    }

    /// Ends the agent and everything that it started, and removes the directory. It blocks until that is done.
    pub(crate) fn end(&self) -> Result<(), MachineError> {
        let mut running = lock(&self.running);
        if matches!(self.phase(), Phase::Ended(_)) {
            return Ok(());
        }
        let code = match running.as_mut() {
            Some(agent) => end_agent(agent).map_err(|error| {
                MachineError::Failed(format!("the agent cannot be killed: {error}"))
            })?,
            None => None,
        };
        self.sweep()?;
        remove_tree(&self.dir).map_err(|error| host_io(&self.dir, &error))?;
        let exit = match code {
            Some(0) => MachineExit::PoweredOff,
            _ if self.killed.load(Ordering::Acquire) => MachineExit::Killed,
            Some(code) => MachineExit::Failed(format!("the agent ended with status {code}")),
            None => MachineExit::Failed("the agent was killed".to_owned()),
        };
        *running = None;
        self.phase.send_replace(Phase::Ended(exit));
        Ok(())
    }

    /// Counts what the agent and all that it started use.
    pub(crate) fn stats(&self) -> MachineStats {
        let Some(agent) = self.agent_pid().and_then(|pid| i32::try_from(pid).ok()) else {
            return MachineStats::default();
        };
        let rows = proc_table::processes();
        let mut tree = proc_table::descendants(&rows, agent);
        tree.extend(rows.iter().find(|row| row.pid == agent));
        let ticks: u64 = tree.iter().map(|row| row.cpu_ticks).sum();
        let pages: u64 = tree.iter().map(|row| row.resident_pages).sum();
        let second = rustix::param::clock_ticks_per_second().max(1);
        let cpu = Duration::from_nanos(ticks.saturating_mul(1_000_000_000 / second));
        MachineStats {
            cpu_time: Some(cpu),
            memory_used_bytes: Some(pages * rustix::param::page_size() as u64),
            ..MachineStats::default()
        }
    }

    /// Gives the last of what the agent itself had to say.
    pub(crate) fn console(&self) -> Bytes {
        let length = self.log.metadata().map_or(0, |metadata| metadata.len());
        let kept = length.min(CONSOLE_BYTES);
        let mut bytes = vec![0; usize::try_from(kept).unwrap_or(0)];
        match self.log.read_exact_at(&mut bytes, length - kept) {
            Ok(()) => Bytes::from(bytes),
            Err(_) => Bytes::new(),
        }
    }

    fn spawn(&self) -> io::Result<Running> {
        let (lifeline_end, lifeline) = io::pipe()?;
        let mut command = self.agent.command();
        command
            .arg0("vm-guest-agent")
            .arg("--listen-unix")
            .arg(self.socket())
            .arg("--die-with-parent")
            .args(["--mark", &self.mark.to_string()])
            .arg("--own-dir")
            .arg(&self.dir)
            .current_dir("/")
            .stdin(lifeline_end)
            .stdout(Stdio::null())
            .stderr(self.log.try_clone()?);
        if let Some((uid, gid)) = self.user {
            command.args(["--user", &format!("{uid}:{gid}")]);
        }
        let mut child = command.spawn()?;
        let exact = pid_of(&child)
            .and_then(|pid| Ok(rustix::process::pidfd_open(pid, PidfdFlags::empty())?));
        match exact {
            Ok(exact) => Ok(Running { child, exact, lifeline: Some(lifeline) }),
            Err(error) => {
                child.kill()?;
                child.wait()?;
                Err(error)
            }
        }
    }

    /// Kills what the agent left, wherever it went: all of it carries the mark.
    fn sweep(&self) -> Result<(), MachineError> {
        for _ in 0..SWEEP_ROUNDS {
            let left = proc_table::marked(self.mark);
            if left.is_empty() {
                return Ok(());
            }
            for row in left {
                // One that is gone already is what is wanted.
                let _ = row.signal(9);
            }
            thread::sleep(SWEEP_PAUSE);
        }
        Err(MachineError::Failed(
            "processes of the guest are left that cannot be killed".to_owned(),
        ))
    }
}

/// Ends the agent, by its lifeline if it still listens to that, and reaps it. Gives its exit code.
fn end_agent(agent: &mut Running) -> io::Result<Option<i32>> {
    drop(agent.lifeline.take());
    let mut exit = [PollFd::from_borrowed_fd(agent.exact.as_fd(), PollFlags::IN)];
    let waited = rustix::event::poll(&mut exit, Some(&AGENT_GRACE));
    if !matches!(waited, Ok(1..)) {
        // One that has ended meanwhile is what is wanted.
        let _ = rustix::process::pidfd_send_signal(&agent.exact, Signal::KILL);
    }
    Ok(agent.child.wait()?.code())
}

fn pid_of(child: &Child) -> io::Result<Pid> {
    i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(|| io::Error::other("not a process id"))
}

fn host_io(path: &Path, error: &io::Error) -> MachineError {
    MachineError::HostIo { path: path.display().to_string(), reason: error.to_string() }
}

/// Says why the host gave no process.
fn refused(error: &io::Error) -> MachineError {
    use rustix::io::Errno;
    let what = match Errno::from_io_error(error) {
        Some(Errno::AGAIN) => "processes",
        Some(Errno::NOMEM) => "memory",
        Some(Errno::MFILE | Errno::NFILE) => "file descriptors",
        _ => return MachineError::Failed(format!("the agent could not be started: {error}")),
    };
    MachineError::Exhausted(what.to_owned())
}
