//! The real guest agent as a process of this host.

use super::{
    Detail, Run, RunReport, Target,
    recorder::Records,
    tokio::{Opened, run_in_real_time},
};
use crate::{clause::Clause, history::Assignment, runner::cores, session::Limits};
use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};
use tempfile::TempDir;
use vm_backend_process::{AgentProgram, ProcessHypervisor};
use vm_core::{
    backend::{CoreBackend, CoreParts},
    env::Env,
    fault::{FaultControl, FaultKind, FaultOrder, FaultRefused},
    host_fs::StdFs,
    machine::Hypervisor,
};
use vm_trait::{Capabilities, VmId};

/// The real guest agent as a process of this host, in real time. Each run has a directory of its own.
///
/// The program that uses it must call [`vm_backend_process::run_agent_if_asked`] first in `main`.
#[derive(Debug)]
pub struct ProcessTarget {
    capabilities: Capabilities,
    fit: Result<(), String>,
}

impl ProcessTarget {
    /// Finds out what can be run here.
    #[must_use]
    pub fn new() -> Self {
        let hypervisor = AgentProgram::find().and_then(ProcessHypervisor::new);
        match hypervisor {
            Ok(hypervisor) => Self { capabilities: hypervisor.capabilities(), fit: Ok(()) },
            Err(error) => {
                Self { capabilities: Capabilities::default(), fit: Err(error.to_string()) }
            }
        }
    }
}

impl Default for ProcessTarget {
    fn default() -> Self {
        Self::new()
    }
}

impl Target for ProcessTarget {
    fn name(&self) -> &str {
        "process"
    }

    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn can_fault(&self, kind: FaultKind) -> bool {
        kind == FaultKind::VmmKilled
    }

    fn environment(&self) -> &str {
        "tokio with real time"
    }

    fn fit(&self) -> Result<(), String> {
        self.fit.clone()
    }

    fn parallel_runs(&self) -> Option<usize> {
        // Most runs wait; more of them than cores would only make deadlines tight.
        Some(cores().max(2))
    }

    fn replay_line(&self, clause: &Clause, seed: u64) -> String {
        let id = clause.id;
        format!(
            "cargo run --release -p vm-dst -- replay --seed {seed:#x} --clause {id} --backend process"
        )
    }

    fn run(&self, clause: &'static Clause, seed: u64, detail: Detail) -> RunReport {
        run(Run::of(clause, seed), detail)
    }

    fn carry_out(&self, assignment: &Arc<Assignment>, detail: Detail) -> RunReport {
        run(Run::of_script(assignment), detail)
    }
}

fn run(run: Run, detail: Detail) -> RunReport {
    let records = Records::new(detail);
    let opened = records.clone();
    let mut report = run_in_real_time(run, Limits::REAL, |env| async move { open(env, &opened) });
    report.timeline = records.take();
    report
}

fn open(env: Arc<dyn Env>, records: &Records) -> Result<Opened, String> {
    let base = base_directory().map_err(|error| format!("no directory for the run: {error}"))?;
    let host = tempfile::tempdir().map_err(|error| format!("no directory for the run: {error}"))?;
    let hypervisor = AgentProgram::find()
        .and_then(|agent| ProcessHypervisor::with_base(agent, base.path()))
        .map_err(|error| error.to_string())?;
    let hypervisor = Arc::new(hypervisor);
    let core = CoreBackend::new(CoreParts {
        hypervisor: hypervisor.clone(),
        env: env.clone(),
        fs: Arc::new(StdFs),
        snapshots: base.path().join("snapshots"),
        observer: records.observer(&env),
    });
    let faults = ProcessFaults { hypervisor: hypervisor.clone(), env, state: Arc::default() };
    Ok(Opened {
        backend: Arc::new(core),
        scratch: Arc::new(move |vm| hypervisor.scratch_dir(vm.id()).display().to_string()),
        faults: Some(records.faults(Arc::new(faults))),
        host_dir: host.path().to_owned(),
        // It owns the directories, which are so removed once the run is over.
        leftovers: Arc::new(move || {
            let _kept = &host;
            leftovers(base.path())
        }),
    })
}

/// Makes a directory that agents of another user can make and remove their own directories in.
fn base_directory() -> std::io::Result<TempDir> {
    let base = tempfile::Builder::new().prefix("vmdst-").tempdir()?;
    fs::set_permissions(base.path(), fs::Permissions::from_mode(0o1777))?;
    Ok(base)
}

fn leftovers(base: &Path) -> Vec<String> {
    let mut left = Vec::new();
    match fs::read_dir(base) {
        Ok(entries) => {
            left.extend(entries.flatten().map(|entry| format!("file {}", entry.path().display())));
        }
        Err(error) => left.push(format!("{}: {error}", base.display())),
    }
    left.extend(agents_of(base).map(|pid| format!("agent process {pid}")));
    left
}

/// Finds the agents whose arguments name `base`.
fn agents_of(base: &Path) -> impl Iterator<Item = u32> {
    let name = base.as_os_str().as_encoded_bytes().to_owned();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(move |entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let arguments = fs::read(entry.path().join("cmdline")).ok()?;
        arguments.windows(name.len()).any(|part| part == name).then_some(pid)
    })
}

/// Kills agents.
#[derive(Debug)]
struct ProcessFaults {
    hypervisor: Arc<ProcessHypervisor>,
    env: Arc<dyn Env>,
    state: Arc<Mutex<FaultState>>,
}

#[derive(Debug, Default)]
struct FaultState {
    killed: u64,
    pending: Vec<FaultOrder>,
}

impl FaultControl for ProcessFaults {
    fn can(&self, kind: FaultKind) -> bool {
        kind == FaultKind::VmmKilled
    }

    fn order(&self, order: FaultOrder) -> Result<(), FaultRefused> {
        let refused =
            |reason: &str| Err(FaultRefused { kind: order.kind, reason: reason.to_owned() });
        if order.kind != FaultKind::VmmKilled {
            return refused("on this backend only agents can be killed");
        }
        let Some(vm) = order.vm else {
            return refused("the order must name the VM whose agent is to be killed");
        };
        if order.skip > 0 {
            return refused("it has no occasions to let pass");
        }
        let Some(delay) = order.amount.filter(|delay| !delay.is_zero()) else {
            if kill(&self.hypervisor, vm) {
                lock(&self.state).killed += 1;
                return Ok(());
            }
            return refused("the VM has no agent at this moment");
        };
        lock(&self.state).pending.push(order.clone());
        let (hypervisor, state) = (Arc::downgrade(&self.hypervisor), self.state.clone());
        let slept = self.env.sleep(delay);
        let task = async move {
            slept.await;
            let killed = hypervisor.upgrade().is_some_and(|hypervisor| kill(&hypervisor, vm));
            let mut state = lock(&state);
            if killed {
                state.killed += 1;
                state.pending.retain(|other| *other != order);
            }
        };
        self.env.spawn("fault", Box::pin(task));
        Ok(())
    }

    fn fired(&self) -> BTreeMap<FaultKind, u64> {
        let killed = lock(&self.state).killed;
        (killed > 0).then_some((FaultKind::VmmKilled, killed)).into_iter().collect()
    }

    fn pending(&self) -> Vec<FaultOrder> {
        lock(&self.state).pending.clone()
    }
}

fn kill(hypervisor: &ProcessHypervisor, vm: VmId) -> bool {
    let pid = hypervisor.agent_pid(vm).and_then(|pid| i32::try_from(pid).ok());
    let pid = pid.and_then(rustix::process::Pid::from_raw);
    pid.is_some_and(|pid| rustix::process::kill_process(pid, rustix::process::Signal::KILL).is_ok())
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
