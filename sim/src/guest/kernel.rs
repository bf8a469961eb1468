//! The operating system as a whole.

use super::{DiskImage, DiskSetup, OsFaults, ProgramRegistry, fault::FaultSlot};
use std::{sync::Arc, time::Duration};

/// What a guest is made of.
#[derive(Clone, Debug)]
pub struct OsConfig {
    /// Bytes of memory, which files outside disks and processes share.
    pub memory: u64,
    /// Virtual CPUs, as `nproc` counts them.
    pub vcpus: u32,
    /// The host name.
    pub hostname: String,
    /// The first state of the random pool.
    pub seed: [u8; 32],
    /// The most processes at a time.
    pub max_processes: u32,
    /// The disks.
    pub disks: Vec<DiskSetup>,
}

/// Something that the guest's kernel did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OsEvent {
    /// A line on the console, without its newline.
    Console(String),
    /// The machine was turned off.
    PowerOff,
    /// The machine was reset.
    Reboot,
    /// The kernel panicked; the console says so too.
    Panic(String),
}

/// A guest that cannot be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SetupError {
    /// A disk cannot be mounted there.
    #[error("disk {disk} cannot be mounted at `{mount}`")]
    Mount {
        /// Which disk.
        disk: usize,
        /// Where.
        mount: String,
    },
}

/// Bytes that are no saved guest for these programs.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The bytes are not what `save` wrote.
    #[error("not a saved guest: {0}")]
    Malformed(String),
    /// A program of the guest is not registered.
    #[error("the guest's program `{0}` is not registered")]
    UnknownProgram(String),
}

/// What a run did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RunReport {
    /// How many steps processes made.
    pub steps: u32,
    /// The virtual CPU time they took.
    pub cpu: Duration,
    /// Whether processes could go on at once: the budget was used up.
    pub more: bool,
}

/// The operating system of one guest. The machine drives it: it sets the clock with
/// [`set_monotonic`](Self::set_monotonic), lets processes run with [`run`](Self::run), and takes what the kernel
/// did with [`take_events`](Self::take_events).
#[derive(Clone, Debug)]
pub struct SimOs {
    programs: Arc<ProgramRegistry>,
    faults: FaultSlot,
    now: Duration,
}

impl SimOs {
    /// Boots a guest: mounts its disks; no process but the agent is there.
    ///
    /// # Errors
    /// When a disk cannot be mounted.
    pub fn new(config: OsConfig, programs: Arc<ProgramRegistry>) -> Result<Self, SetupError> {
        let _ = config;
        Ok(Self { programs, faults: FaultSlot::default(), now: Duration::ZERO })
    }

    /// Moves the monotonic clock; it never goes back.
    pub fn set_monotonic(&mut self, now: Duration) {
        self.now = self.now.max(now);
    }

    /// Gives the wall clock, as time since the Unix epoch.
    #[must_use]
    pub fn wall_clock(&self) -> Duration {
        self.now
    }

    /// Moves the wall clock by this many nanoseconds, as a clock fault does.
    pub fn shift_wall_clock(&mut self, nanoseconds: i64) {
        let _ = nanoseconds;
    }

    /// Lets processes run, in turn, for at most `budget` steps.
    pub fn run(&mut self, budget: u32) -> RunReport {
        self.run_ordered(budget, &mut |_| 0)
    }

    /// Lets processes run for at most `budget` steps; `pick(n)` draws which of `n` processes comes next.
    pub fn run_ordered(
        &mut self,
        budget: u32,
        pick: &mut dyn FnMut(usize) -> usize,
    ) -> RunReport {
        let _ = (budget, pick);
        RunReport::default()
    }

    /// Says whether a process could go on now.
    #[must_use]
    pub fn has_runnable(&self) -> bool {
        false
    }

    /// Gives the monotonic time at which a sleeping process wakes next, if any.
    #[must_use]
    pub fn next_wakeup(&self) -> Option<Duration> {
        None
    }

    /// Takes what the kernel did since the last call, in order.
    pub fn take_events(&mut self) -> Vec<OsEvent> {
        Vec::new()
    }

    /// Takes how long the agent's calls were slowed by faults since the last call.
    pub fn take_agent_delay(&mut self) -> Duration {
        Duration::ZERO
    }

    /// Gives what each disk durably holds, in the order of the configuration.
    #[must_use]
    pub fn disks(&self) -> Vec<DiskImage> {
        Vec::new()
    }

    /// Installs or removes the hooks of a fault plan. They are no part of the guest's state.
    pub fn set_faults(&mut self, faults: Option<Box<dyn OsFaults>>) {
        self.faults = FaultSlot(faults);
    }

    /// Takes the hooks of a fault plan out.
    pub fn take_faults(&mut self) -> Option<Box<dyn OsFaults>> {
        self.faults.0.take()
    }

    /// Panics the kernel: no process runs any more. The agent's own death is one such case.
    pub fn panic(&mut self, reason: &str) {
        let _ = reason;
    }

    /// Says whether the kernel has been turned off, reset or has panicked.
    #[must_use]
    pub fn is_halted(&self) -> bool {
        false
    }

    /// Gives the bytes of memory in use.
    #[must_use]
    pub fn memory_used(&self) -> u64 {
        0
    }

    /// Gives the virtual CPU time used so far.
    #[must_use]
    pub fn cpu_time(&self) -> Duration {
        Duration::ZERO
    }

    /// Counts the processes beside the agent.
    #[must_use]
    pub fn process_count(&self) -> usize {
        0
    }

    /// Writes the guest's whole state. Events not yet taken belong to it.
    #[must_use]
    pub fn save(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Brings a saved guest back.
    ///
    /// # Errors
    /// When the bytes are damaged, or one of the guest's programs is not registered.
    pub fn load(bytes: &[u8], programs: Arc<ProgramRegistry>) -> Result<Self, LoadError> {
        let _ = (bytes, programs);
        Err(LoadError::Malformed("skeleton".into()))
    }
}
