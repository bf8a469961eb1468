//! Backends on tokio and real time.

use super::{Detail, Run, RunReport, Target, guest_root::copied_root};
use crate::{
    clause::Clause,
    context::{Scratch, Setup},
    history::Assignment,
    host_network::RealHostNetwork,
    panics::{PanicSink, caught},
    session::{Kept, Limits, judge, keep},
};
use futures_core::future::BoxFuture;
use std::{collections::BTreeMap, fmt, future::Future, path::PathBuf, sync::Arc, time::Duration};
use tokio::runtime::{self, Runtime};
use vm_core::{
    env::{Env, TokioEnv},
    fault::{FaultControl, FaultKind},
};
use vm_trait::{Capabilities, VmBackend};

type Factory = dyn Fn() -> BoxFuture<'static, Result<Opened, String>> + Send + Sync;
type Fit = dyn Fn() -> Result<(), String> + Send + Sync;

/// A backend on tokio's multi-thread runtime and real time; each run gets a runtime and a backend of its own.
pub struct TokioTarget {
    name: String,
    capabilities: Capabilities,
    factory: Box<Factory>,
    fit: Box<Fit>,
    faults: Vec<FaultKind>,
    parallel_runs: Option<usize>,
    test_seeds: u64,
    limits: Limits,
}

/// A backend as it was opened for one run, and what goes with it.
pub struct Opened {
    /// The backend.
    pub backend: Arc<dyn VmBackend>,
    /// Gives a directory of the guest that a check may write in, without a slash at its end.
    pub scratch: Arc<Scratch>,
    /// A directory of the host that exists, for snapshots and disks.
    pub host_dir: PathBuf,
    /// How faults are made to happen, where they can be.
    pub faults: Option<Arc<dyn FaultControl>>,
    /// Lists what is left on the host. It must not hold the backend.
    pub leftovers: Arc<dyn Fn() -> Vec<String> + Send + Sync>,
}

impl Opened {
    /// Opens a backend whose guests have a `/tmp`, that makes no faults happen and keeps nothing on the host.
    #[must_use]
    pub fn new(backend: Arc<dyn VmBackend>) -> Self {
        Self {
            backend,
            scratch: Arc::new(|_| "/tmp".to_owned()),
            host_dir: std::env::temp_dir(),
            faults: None,
            leftovers: Arc::new(Vec::new),
        }
    }

    fn into_setup(self, env: Arc<dyn Env>) -> Setup {
        Setup {
            backend: self.backend,
            env,
            faults: self.faults,
            scratch: self.scratch,
            host_dir: self.host_dir,
            host_fs: Arc::new(vm_core::host_fs::StdFs),
            host_network: Arc::new(RealHostNetwork::default()),
            guest_root: copied_root(),
            leftovers: self.leftovers,
            warm: None,
            template: None,
        }
    }
}

impl TokioTarget {
    /// Names a backend, what it claims, and how one is made for a run.
    pub fn new<F, B>(name: impl Into<String>, claims: Capabilities, make: F) -> Self
    where
        F: Fn() -> B + Send + Sync + 'static,
        B: Future<Output = Arc<dyn VmBackend>> + Send + 'static,
    {
        Self::opened_by(name, claims, move || {
            let made = make();
            async move { Ok(Opened::new(made.await)) }
        })
    }

    /// As [`new`](Self::new), for a backend that can fail to open or has more to it.
    pub fn opened_by<F, B>(name: impl Into<String>, claims: Capabilities, open: F) -> Self
    where
        F: Fn() -> B + Send + Sync + 'static,
        B: Future<Output = Result<Opened, String>> + Send + 'static,
    {
        Self {
            name: name.into(),
            capabilities: claims,
            factory: Box::new(move || Box::pin(open())),
            fit: Box::new(|| Ok(())),
            faults: Vec::new(),
            parallel_runs: None,
            test_seeds: 4,
            limits: Limits::REAL,
        }
    }

    /// Asks `fit` whether the backend can run on this host at all.
    #[must_use]
    pub fn with_fit(
        mut self,
        fit: impl Fn() -> Result<(), String> + Send + Sync + 'static,
    ) -> Self {
        self.fit = Box::new(fit);
        self
    }

    /// Says which faults its [`FaultControl`] can make happen.
    #[must_use]
    pub fn with_faults(mut self, kinds: impl IntoIterator<Item = FaultKind>) -> Self {
        self.faults = kinds.into_iter().collect();
        self
    }

    /// Lets only so many runs go on at a time.
    #[must_use]
    pub fn with_parallel_runs(mut self, runs: usize) -> Self {
        self.parallel_runs = Some(runs.max(1));
        self
    }

    /// Sets how many seeds a test runs where no variable says so.
    #[must_use]
    pub fn with_test_seeds(mut self, seeds: u64) -> Self {
        self.test_seeds = seeds;
        self
    }

    /// Sets how long a run may take.
    #[must_use]
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }
}

/// Runs a clause on a backend that `open` makes, in a runtime of its own and real time.
pub(super) fn run_in_real_time<B>(
    run: Run,
    limits: Limits,
    open: impl FnOnce(Arc<dyn Env>) -> B,
) -> RunReport
where
    B: Future<Output = Result<Opened, String>>,
{
    let sink = PanicSink::default();
    run_setup(run, limits, &sink, |env| {
        let opened = open(env.clone());
        async { Ok(opened.await?.into_setup(env)) }
    })
}

/// As [`run_in_real_time`], for what is more than an [`Opened`], and with the panics of other threads in `sink`.
pub(super) fn run_setup<B>(
    run: Run,
    limits: Limits,
    sink: &PanicSink,
    open: impl FnOnce(Arc<dyn Env>) -> B,
) -> RunReport
where
    B: Future<Output = Result<Setup, String>>,
{
    let guard = sink.join();
    let work = || {
        let runtime = real_time_runtime(sink)?;
        let end = runtime.block_on(async {
            let setup = open(real_env()).await?;
            let faults = setup.faults.clone();
            let kept = keep(setup, run, limits, tokio::time::sleep).await;
            Ok((kept, faults))
        });
        // Tasks that a backend leaves running must not keep the run from ending.
        runtime.shutdown_timeout(Duration::from_secs(5));
        end
    };
    let end = caught(work).and_then(|end| end);
    drop(guard);
    let (verdict, faults_ordered, faults) = match end {
        Ok((Kept { broken, faults_ordered }, faults)) => (Ok(broken), faults_ordered, faults),
        Err(text) => (Err(text), BTreeMap::new(), None),
    };
    RunReport {
        broken: judge(verdict, sink),
        faults_ordered,
        faults_fired: faults.map(|faults| faults.fired()).unwrap_or_default(),
        ..RunReport::default()
    }
}

/// Makes the environment of real time in the current runtime.
pub(super) fn real_env() -> Arc<dyn Env> {
    Arc::new(TokioEnv::real(|bytes| {
        // A host without randomness makes names clash, which the contract then shows.
        let _ = getrandom::fill(bytes);
    }))
}

pub(super) fn real_time_runtime(sink: &PanicSink) -> Result<Runtime, String> {
    let sink = sink.clone();
    runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("contract")
        .on_thread_start(move || sink.join_for_good())
        .enable_all()
        .build()
        .map_err(|error| format!("no tokio runtime: {error}"))
}

impl Target for TokioTarget {
    fn name(&self) -> &str {
        &self.name
    }

    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn can_fault(&self, kind: FaultKind) -> bool {
        self.faults.contains(&kind)
    }

    fn environment(&self) -> &str {
        "tokio with real time"
    }

    fn fit(&self) -> Result<(), String> {
        (self.fit)()
    }

    fn parallel_runs(&self) -> Option<usize> {
        self.parallel_runs
    }

    fn test_seeds(&self) -> u64 {
        self.test_seeds
    }

    fn patience(&self) -> Duration {
        (self.limits.check + self.limits.leftovers) * 2
    }

    fn run(&self, clause: &'static Clause, seed: u64, _detail: Detail) -> RunReport {
        run_in_real_time(Run::of(clause, seed), self.limits, |_| (self.factory)())
    }

    fn carry_out(&self, assignment: &Arc<Assignment>, _detail: Detail) -> RunReport {
        run_in_real_time(Run::of_script(assignment), self.limits, |_| (self.factory)())
    }
}

impl fmt::Debug for Opened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Opened").field("backend", &self.backend).finish_non_exhaustive()
    }
}

impl fmt::Debug for TokioTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokioTarget").field("name", &self.name).finish_non_exhaustive()
    }
}
