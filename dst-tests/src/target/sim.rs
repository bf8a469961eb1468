//! The simulated backend.

use super::{Detail, Run, RunReport, Target};
use crate::{
    clause::Clause,
    context::Setup,
    environment::Environment,
    history::Assignment,
    panics::PanicSink,
    session::{Kept, Limits, judge, keep},
};
use std::{fmt, path::PathBuf, sync::Arc, time::Duration};
use vm_core::{fault::FaultKind, host_fs::HostFs};
use vm_sim::{Coverage, FaultPlan, SimBackend, Timeline, fault};
use vm_trait::{Capabilities, VmBackend};

/// The simulated backend in one of its environments.
///
/// Runs with odd seeds have background faults that no promise may be affected by; runs with even seeds have only
/// those that a clause asks for.
pub struct SimTarget {
    environment: Environment,
    capabilities: Result<Capabilities, String>,
    through: Option<Arc<Through>>,
}

/// Puts something between a check and the backend.
pub type Through = dyn Fn(Arc<dyn VmBackend>) -> Arc<dyn VmBackend> + Send + Sync;

impl SimTarget {
    /// Simulates in `environment`.
    #[must_use]
    pub fn new(environment: Environment) -> Self {
        let capabilities = environment.run(0, || async {
            let built = SimBackend::builder().build();
            built.map(|backend| backend.capabilities()).map_err(|error| error.to_string())
        });
        Self { environment, capabilities: capabilities.and_then(|built| built), through: None }
    }

    /// Puts something between the checks and the backend: to plant a defect that a suite must find.
    #[must_use]
    pub fn seen_through(
        mut self,
        through: impl Fn(Arc<dyn VmBackend>) -> Arc<dyn VmBackend> + Send + Sync + 'static,
    ) -> Self {
        self.through = Some(Arc::new(through));
        self
    }
}

impl Target for SimTarget {
    fn name(&self) -> &str {
        "sim"
    }

    fn capabilities(&self) -> Capabilities {
        self.capabilities.clone().unwrap_or_default()
    }

    fn can_fault(&self, kind: FaultKind) -> bool {
        fault::can(kind)
    }

    fn environment(&self) -> &str {
        self.environment.describe()
    }

    fn fit(&self) -> Result<(), String> {
        self.capabilities.clone().map(drop)
    }

    fn is_deterministic(&self) -> bool {
        true
    }

    fn test_seeds(&self) -> u64 {
        24
    }

    fn patience(&self) -> Duration {
        Duration::from_secs(120)
    }

    fn replay_line(&self, clause: &Clause, seed: u64) -> String {
        let id = clause.id;
        let line =
            format!("cargo run --release -p vm-dst -- replay --seed {seed:#x} --clause {id}");
        if self.environment == Environment::best() {
            return line;
        }
        format!("{line} --env {}", self.environment)
    }

    fn run(&self, clause: &'static Clause, seed: u64, detail: Detail) -> RunReport {
        self.simulate(Run::of(clause, seed), detail, false).0
    }

    fn carry_out(&self, assignment: &Arc<Assignment>, detail: Detail) -> RunReport {
        self.simulate(Run::of_script(assignment), detail, false).0
    }
}

impl SimTarget {
    /// Runs one clause once, and counts what happened.
    #[must_use]
    pub fn run_counted(&self, clause: &'static Clause, seed: u64) -> (RunReport, Coverage) {
        self.simulate(Run::of(clause, seed), Detail::Fingerprint, true)
    }

    fn simulate(&self, run: Run, detail: Detail, counted: bool) -> (RunReport, Coverage) {
        let sink = PanicSink::default();
        let guard = sink.join();
        let environment = self.environment;
        let (seed, through) = (run.seed, self.through.clone());
        let run =
            environment.run(seed, move || simulate(environment, run, (detail, counted), through));
        drop(guard);
        let (verdict, mut report, coverage) = match run.and_then(|built| built) {
            Ok((broken, report, coverage)) => (Ok(broken), report, coverage),
            Err(text) => (Err(text), RunReport::default(), Coverage::default()),
        };
        report.broken = judge(verdict, &sink);
        (report, coverage)
    }
}

impl fmt::Debug for SimTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimTarget").field("environment", &self.environment).finish_non_exhaustive()
    }
}

async fn simulate(
    environment: Environment,
    run: Run,
    (detail, counted): (Detail, bool),
    through: Option<Arc<Through>>,
) -> Result<(Option<String>, RunReport, Coverage), String> {
    let (clause, seed) = (run.clause, run.seed);
    let faults = match seed % 2 {
        0 => FaultPlan::none(),
        _ if clause.undisturbed => FaultPlan::none(),
        _ => FaultPlan::benign_swarm(seed),
    };
    let timeline = match detail {
        // The same seed does the same again: what is wanted can be written down then.
        Detail::Fingerprint | Detail::Record => Timeline::Off,
        Detail::Timeline => Timeline::Events,
        Detail::Frames => Timeline::Frames,
    };
    let backend = SimBackend::builder()
        .seed(seed)
        .faults(faults)
        .timeline(timeline)
        .coverage(counted)
        .build()
        .map_err(|error| error.to_string())?;
    let host = backend.clone();
    let host_dir = PathBuf::from("/tmp/twinvm-contract");
    let made = host.host().fs().create_dir_all(&host_dir).await;
    made.map_err(|error| format!("{}: {error}", host_dir.display()))?;
    let setup = Setup {
        env: backend.env(),
        faults: Some(backend.fault_control()),
        scratch: Arc::new(|_| "/tmp".to_owned()),
        host_dir,
        host_fs: Arc::new(backend.host().fs()),
        host_network: Arc::new(backend.host()),
        guest_root: {
            let host = backend.host();
            Arc::new(move |path| {
                let made = host.make_guest_root(&path);
                Box::pin(async { made })
            })
        },
        warm: None,
        template: None,
        leftovers: Arc::new(move || host.ledger().leftovers()),
        backend: match through {
            Some(through) => through(Arc::new(backend.clone())),
            None => Arc::new(backend.clone()),
        },
    };
    let sleep = |duration| environment.sleep(duration);
    let Kept { broken, faults_ordered } = keep(setup, run, Limits::SIMULATED, sleep).await;
    let report = RunReport {
        faults_ordered,
        faults_fired: backend.fault_control().fired(),
        fingerprint: Some(backend.fingerprint()),
        timeline: backend.timeline(),
        ..RunReport::default()
    };
    Ok((broken, report, backend.coverage()))
}
