//! [`ProcessHypervisor`]: makes machines that are processes.

use crate::{AgentProgram, life::Life, machine::ProcessMachine};
use async_trait::async_trait;
use std::{
    collections::BTreeMap,
    env, fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};
use vm_core::machine::{Hypervisor, Machine, MachineError, MachineSpec};
use vm_trait::{Capabilities, Capability, HostLimits, Mib, VmConfig, VmId};

/// The user and group that an agent of root's becomes.
const NOBODY: (u32, u32) = (65_534, 65_534);

/// The longest path that a Unix socket can have.
const MAX_SOCKET_PATH: usize = 107;

/// How long a VM's next life waits for the traces of the last one to be gone.
const LAST_LIFE: Duration = Duration::from_secs(10);

/// Why machines of this kind cannot be made here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SetupError {
    /// There is no agent to run.
    #[error(
        "no agent program at {looked_at}; call run_agent_if_asked() first in main, or set TWINVM_AGENT"
    )]
    NoAgent {
        /// Where it was looked for last.
        looked_at: PathBuf,
    },
    /// The base directory does not do.
    #[error("base directory {path}: {reason}")]
    BaseDirectory {
        /// The directory.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The operating system gave no random numbers.
    #[error("no random numbers: {0}")]
    Random(io::Error),
}

/// Makes machines that are agent processes of this host. See the [crate] for what they are good for.
#[derive(Debug)]
pub struct ProcessHypervisor {
    agent: AgentProgram,
    base: PathBuf,
    nonce: u64,
    user: Option<(u32, u32)>,
    lives: Lives,
}

/// The lives that have not ended, by VM.
pub(crate) type Lives = Arc<Mutex<BTreeMap<VmId, Arc<Life>>>>;

impl ProcessHypervisor {
    /// Makes machines in the system's directory for temporary files.
    ///
    /// # Errors
    /// [`SetupError`].
    pub fn new(agent: AgentProgram) -> Result<Self, SetupError> {
        Self::with_base(agent, &env::temp_dir())
    }

    /// Makes machines in `base`. An agent that runs as another user than the owner must be able to remove its own
    /// directory there, as in `/tmp`: `base` must then be writable for all.
    ///
    /// # Errors
    /// [`SetupError`].
    pub fn with_base(agent: AgentProgram, base: &Path) -> Result<Self, SetupError> {
        let refused = |reason: String| SetupError::BaseDirectory { path: base.to_owned(), reason };
        let base = base.canonicalize().map_err(|error| refused(error.to_string()))?;
        let mode = fs::metadata(&base).map_err(|error| refused(error.to_string()))?.mode();
        let user = rustix::process::geteuid().is_root().then_some(NOBODY);
        if user.is_some() && mode & 0o3 != 0o3 {
            return Err(refused("not writable for the agent's user".to_owned()));
        }
        let nonce = random_u64().map_err(SetupError::Random)?;
        let hypervisor = Self { agent, base, nonce, user, lives: Lives::default() };
        let socket = hypervisor.dir(VmId(0)).join(Life::SOCKET);
        match socket.as_os_str().len() {
            0..=MAX_SOCKET_PATH => Ok(hypervisor),
            _ => Err(refused("too long for the name of a socket in it".to_owned())),
        }
    }

    /// Gives the directory that a VM's guest can write in while the VM lives; also before that, as it only depends on
    /// the VM's id.
    #[must_use]
    pub fn scratch_dir(&self, vm: VmId) -> PathBuf {
        self.dir(vm).join(Life::SCRATCH)
    }

    /// Gives the pid of a VM's agent while it runs.
    #[must_use]
    pub fn agent_pid(&self, vm: VmId) -> Option<u32> {
        let life = lock(&self.lives).get(&vm).cloned()?;
        life.agent_pid()
    }

    fn dir(&self, vm: VmId) -> PathBuf {
        self.base.join(format!("twinvm-{:016x}-{vm}", self.nonce))
    }
}

#[async_trait]
impl Hypervisor for ProcessHypervisor {
    fn name(&self) -> &str {
        "process"
    }

    fn arch(&self) -> &str {
        env::consts::ARCH
    }

    fn capabilities(&self) -> Capabilities {
        // No limits on programs: the mark by which what an agent leaves is found is one of them.
        Capabilities::from_iter([Capability::Exec, Capability::Files, Capability::Tty])
    }

    fn limits(&self) -> HostLimits {
        let vcpus = thread::available_parallelism().map_or(1, usize::from);
        HostLimits {
            max_vcpus: u8::try_from(vcpus).unwrap_or(u8::MAX),
            max_memory: total_memory().unwrap_or(VmConfig::MIN_MEMORY),
        }
    }

    fn check(&self, config: &VmConfig) -> Result<(), MachineError> {
        if config.disks.is_empty() {
            return Ok(());
        }
        Err(MachineError::Unsupported("disks".to_owned()))
    }

    async fn create(&self, spec: &MachineSpec) -> Result<Arc<dyn Machine>, MachineError> {
        let last = lock(&self.lives).get(&spec.vm).cloned();
        if let Some(last) = last
            && tokio::time::timeout(LAST_LIFE, last.ended()).await.is_err()
        {
            return Err(MachineError::Failed("the VM's last life has not ended".to_owned()));
        }
        let mark = random_u64().map_err(|error| MachineError::Failed(error.to_string()))?;
        let mark = (mark >> 2) | 1 << 62;
        let life = Life::new(self.agent.clone(), self.dir(spec.vm), self.user, mark)?;
        let life = Arc::new(life);
        lock(&self.lives).insert(spec.vm, Arc::clone(&life));
        Ok(Arc::new(ProcessMachine::new(spec.vm, life, Arc::clone(&self.lives))))
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn random_u64() -> io::Result<u64> {
    let mut bytes = [0; 8];
    // So few bytes come whole or not at all.
    rustix::io::retry_on_intr(|| {
        rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty())
    })?;
    Ok(u64::from_le_bytes(bytes))
}

fn total_memory() -> Option<Mib> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(Mib(u32::try_from(kib / 1024).unwrap_or(u32::MAX)))
}
