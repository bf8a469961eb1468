//! The operating system as a whole.

use super::{
    disk::{Disk, DiskImage, DiskSetup},
    entropy::Pool,
    fault::{FaultSlot, OsFaults},
    pipe::Pipe,
    process::{AGENT, OpenFile, Process},
    program::ProgramRegistry,
    pty::Pty,
    share::{RootInHand, ShareSetup},
    sockets::Sockets,
    vfs::{Caller, Ino, Vfs},
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use vm_guest_agent::os::{Child, ChildExit, Errno, Fd, SysResult};
use vm_guest_protocol::boot::BootRoot;

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
    /// The directories of the host; they come into the guest's hands afterwards.
    pub shares: Vec<ShareSetup>,
    /// Whether a TCP connection to the guest's loopback is the host's to make where nothing in the guest listens.
    pub host_loopback: bool,
}

/// Something that the guest's kernel did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    /// A root that is a directory of the host lacks a directory, and it cannot be made.
    #[error("the root has no directory `{place}` to mount on")]
    Root {
        /// Which one.
        place: &'static str,
    },
    /// A directory of the host cannot be mounted there.
    #[error("host directory {share} cannot be mounted at `{mount}`")]
    Share {
        /// Which directory.
        share: usize,
        /// Where.
        mount: String,
    },
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
///
/// A clone is a fork of the guest: it goes on from the same state on its own, without the fault hooks.
#[derive(Clone, Debug)]
pub struct SimOs {
    pub(super) kernel: Kernel,
    pub(super) programs: Arc<ProgramRegistry>,
    pub(super) faults: FaultSlot,
}

/// The part of a guest that is saved.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Kernel {
    pub(super) now: Duration,
    /// The wall clock's lead over the monotonic one, in nanoseconds.
    pub(super) wall_offset_ns: i128,
    pub(super) hostname: Arc<str>,
    pub(super) vcpus: u32,
    pub(super) max_processes: u32,
    pub(super) vfs: Vfs,
    pub(super) processes: BTreeMap<u32, Process>,
    pub(super) last_pid: u32,
    pub(super) files: BTreeMap<u32, OpenFile>,
    pub(super) pipes: BTreeMap<u32, Pipe>,
    pub(super) ptys: BTreeMap<u32, Pty>,
    pub(super) sockets: Sockets,
    last_id: u32,
    pub(super) children: BTreeMap<Child, AgentChild>,
    pub(super) last_child: u64,
    pub(super) agent_files: BTreeMap<Fd, u32>,
    pub(super) last_fd: u32,
    pub(super) pool: Pool,
    events: Vec<OsEvent>,
    halted: bool,
    pub(super) cpu: Duration,
    pub(super) agent_delay: Duration,
    /// The process that the scheduler looked at last.
    pub(super) turn: u32,
}

/// What the agent holds of a process that it started.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct AgentChild {
    pub(super) pid: u32,
    pub(super) exit: Option<ChildExit>,
    /// The open files of the agent's ends of the pipes.
    pub(super) stdin: Option<u32>,
    pub(super) stdout: Option<u32>,
    pub(super) stderr: Option<u32>,
    pub(super) pty: Option<u32>,
}

impl SimOs {
    /// Boots a guest: mounts its disks, making their directories; no process but the agent is there.
    ///
    /// # Errors
    /// When a disk or a host directory cannot be mounted.
    pub fn new(config: OsConfig, programs: Arc<ProgramRegistry>) -> Result<Self, SetupError> {
        let mut os = Self::unmounted(&config, programs);
        let (disks, shares) = (config.disks, config.shares);
        os.kernel.mount_all(&disks, &shares)?;
        Ok(os)
    }

    /// Boots a guest whose root is a directory of the host, which is the first of its shares from then on.
    ///
    /// # Errors
    /// As [`new`](Self::new), and when the directory lacks what is mounted on.
    pub fn on_shared_root(
        config: OsConfig,
        programs: Arc<ProgramRegistry>,
        root: RootInHand<'_>,
    ) -> Result<Self, SetupError> {
        let mut os = Self::unmounted(&config, programs);
        let entered = os.kernel.vfs.enter_share();
        entered.map_err(|_| SetupError::Root { place: "/" })?;
        let (disks, shares) = (config.disks, config.shares);
        let RootInHand { dir, read_only, room } = root;
        os.give_share(0, dir, read_only, room);
        let mounted = os.kernel.make_places().and_then(|()| os.kernel.mount_all(&disks, &shares));
        os.take_share(0, dir);
        mounted.map(|()| os)
    }

    fn unmounted(config: &OsConfig, programs: Arc<ProgramRegistry>) -> Self {
        let mut kernel = Kernel {
            now: Duration::ZERO,
            wall_offset_ns: 0,
            hostname: config.hostname.as_str().into(),
            vcpus: config.vcpus,
            max_processes: config.max_processes,
            vfs: Vfs::new(programs.base(), config.memory),
            processes: BTreeMap::new(),
            last_pid: AGENT,
            files: BTreeMap::new(),
            pipes: BTreeMap::new(),
            ptys: BTreeMap::new(),
            sockets: Sockets::default(),
            last_id: 0,
            children: BTreeMap::new(),
            last_child: 0,
            agent_files: BTreeMap::new(),
            last_fd: 0,
            pool: Pool::new(config.seed),
            events: Vec::new(),
            halted: false,
            cpu: Duration::ZERO,
            agent_delay: Duration::ZERO,
            turn: 0,
        };
        if config.host_loopback {
            kernel.sockets.reach_host();
        }
        Self { kernel, programs, faults: FaultSlot::default() }
    }

    /// Moves the monotonic clock; it never goes back.
    pub fn set_monotonic(&mut self, now: Duration) {
        self.kernel.now = self.kernel.now.max(now);
    }

    /// Gives the wall clock, as time since the Unix epoch.
    #[must_use]
    pub fn wall_clock(&self) -> Duration {
        Duration::from_nanos(self.kernel.wall_ns())
    }

    /// Moves the wall clock by this many nanoseconds, as a clock fault does.
    pub fn shift_wall_clock(&mut self, nanoseconds: i64) {
        self.kernel.wall_offset_ns += i128::from(nanoseconds);
    }

    /// Takes what the kernel did since the last call, in order.
    pub fn take_events(&mut self) -> Vec<OsEvent> {
        std::mem::take(&mut self.kernel.events)
    }

    /// Says whether the kernel did something that was not taken yet.
    #[must_use]
    pub fn has_events(&self) -> bool {
        !self.kernel.events.is_empty()
    }

    /// Takes how long the agent's calls were slowed by faults since the last call.
    pub fn take_agent_delay(&mut self) -> Duration {
        std::mem::take(&mut self.kernel.agent_delay)
    }

    /// Gives what each disk durably holds, in the order of the configuration.
    #[must_use]
    pub fn disks(&self) -> Vec<DiskImage> {
        self.kernel.vfs.durable_images().collect()
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
        self.kernel.panic(reason);
    }

    /// Kills the process that uses most memory, as the kernel does when memory runs out, and says whether there
    /// was one.
    pub fn kill_for_memory(&mut self) -> bool {
        let alive = self.kernel.processes.iter().filter(|(_, it)| it.is_alive());
        let victim = alive.max_by_key(|(pid, it)| (it.memory, **pid)).map(|(pid, _)| *pid);
        victim.is_some_and(|pid| {
            self.kernel.oom_kill(pid);
            true
        })
    }

    /// Writes a line on the console.
    pub fn log(&mut self, line: &str) {
        self.kernel.log(line);
    }

    /// Says whether the kernel has been turned off, reset or has panicked.
    #[must_use]
    pub fn is_halted(&self) -> bool {
        self.kernel.halted
    }

    /// Gives the bytes of memory in use.
    #[must_use]
    pub fn memory_used(&self) -> u64 {
        self.kernel.vfs.memory_used()
    }

    /// Gives the virtual CPU time used so far.
    #[must_use]
    pub fn cpu_time(&self) -> Duration {
        self.kernel.cpu
    }

    /// Counts the processes beside the agent that have not ended.
    #[must_use]
    pub fn process_count(&self) -> usize {
        self.kernel.processes.values().filter(|it| it.is_alive()).count()
    }

    /// Gives the programs that this guest knows.
    #[must_use]
    pub fn programs(&self) -> &Arc<ProgramRegistry> {
        &self.programs
    }
}

impl Kernel {
    pub(super) fn wall_ns(&self) -> u64 {
        let now = i128::try_from(self.now.as_nanos()).unwrap_or(i128::MAX);
        u64::try_from(now.saturating_add(self.wall_offset_ns).max(0)).unwrap_or(u64::MAX)
    }

    pub(super) fn next_id(&mut self) -> u32 {
        loop {
            self.last_id = self.last_id.wrapping_add(1);
            let id = self.last_id;
            let taken = self.files.contains_key(&id)
                || self.pipes.contains_key(&id)
                || self.ptys.contains_key(&id);
            if !taken {
                return id;
            }
        }
    }

    pub(super) fn is_halted(&self) -> bool {
        self.halted
    }

    pub(super) fn log(&mut self, line: &str) {
        self.events.push(OsEvent::Console(line.to_owned()));
    }

    fn kernel_message(&mut self, text: &str) {
        let micros = self.now.as_micros();
        self.log(&format!("[{:5}.{:06}] {text}", micros / 1_000_000, micros % 1_000_000));
    }

    pub(super) fn panic(&mut self, reason: &str) {
        if !self.halted {
            self.kernel_message(&format!("Kernel panic - not syncing: {reason}"));
            self.halted = true;
            self.events.push(OsEvent::Panic(reason.to_owned()));
        }
    }

    pub(super) fn power_off(&mut self) {
        if !self.halted {
            self.kernel_message("reboot: Power down");
            self.halted = true;
            self.events.push(OsEvent::PowerOff);
        }
    }

    pub(super) fn reboot(&mut self) {
        if !self.halted {
            self.kernel_message("reboot: Restarting system");
            self.halted = true;
            self.events.push(OsEvent::Reboot);
        }
    }

    pub(super) fn oom_kill(&mut self, pid: u32) {
        let Some(process) = self.processes.get(&pid) else { return };
        let name = process.argv.first().map_or("", |name| name.rsplit('/').next().unwrap_or(name));
        let text = format!(
            "Out of memory: Killed process {pid} ({name}) total-vm:{}kB, UID:{}",
            process.memory / 1024,
            process.uid
        );
        self.kernel_message(&text);
        self.terminate(pid, ChildExit::Signaled(super::signals::KILL));
    }

    /// Mounts disks and directories of the host, making the directories that they are mounted on.
    fn mount_all(&mut self, disks: &[DiskSetup], shares: &[ShareSetup]) -> Result<(), SetupError> {
        // A disk may be mounted on a directory of another one, which must be mounted first.
        let mut order: Vec<_> = disks.iter().enumerate().collect();
        order.sort_by_key(|(index, setup)| (setup.mount.matches('/').count(), *index));
        let mut mounted = BTreeMap::new();
        for (index, setup) in order {
            let refused = |_| SetupError::Mount { disk: index, mount: setup.mount.clone() };
            let at = self.mount_point(&setup.mount).map_err(refused)?;
            self.vfs.mount(&setup.mount, at, Disk::new(setup)).map_err(refused)?;
            mounted.insert(index, at);
        }
        self.vfs.set_disk_order(mounted.into_values());
        for (share, ShareSetup { mount }) in shares.iter().enumerate() {
            let refused = |_| SetupError::Share { share, mount: mount.clone() };
            let at = self.mount_point(mount).map_err(refused)?;
            self.vfs.mount_share(mount, at).map_err(refused)?;
        }
        Ok(())
    }

    /// Makes what is missing of the directories that every root has, in a root that is the host's.
    fn make_places(&mut self) -> Result<(), SetupError> {
        for place in BootRoot::PLACES {
            let made = self.vfs.make_place(&booting(self.vfs.top, &self.processes), place);
            made.map_err(|_| SetupError::Root { place })?;
        }
        Ok(())
    }

    /// Makes the directories of a mount point where they are missing.
    fn mount_point(&mut self, path: &str) -> SysResult<Ino> {
        if !path.starts_with('/')
            || path.split('/').skip(1).any(|name| matches!(name, "" | "." | ".."))
        {
            return Err(Errno::INVAL);
        }
        for (end, _) in path.match_indices('/').skip(1).chain([(path.len(), "")]) {
            let who = booting(self.vfs.top, &self.processes);
            match self.vfs.mkdir(&who, &path[..end], 0o755) {
                Ok(_) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(errno),
            }
        }
        let at = self.vfs.find(&self.caller(AGENT), path, true)?;
        let is_mounted = at.node == super::tree::TOP;
        if self.vfs.is_dir(at) && !is_mounted { Ok(at) } else { Err(Errno::NOTDIR) }
    }
}

/// Says who makes directories as a guest boots, when its clocks show nothing yet.
fn booting(cwd: Ino, processes: &BTreeMap<u32, Process>) -> Caller<'_> {
    Caller { pid: AGENT, uid: 0, gid: 0, cwd, umask: 0, now_ns: 0, processes }
}
