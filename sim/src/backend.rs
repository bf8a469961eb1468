//! [`SimBackend`]: the simulated backend.

use crate::{
    coverage::Coverage,
    env::{NoRuntime, SimEnv, SimEnvKind},
    fault::{self, Engine, FaultPlan, PlanError},
    guest::ProgramRegistry,
    host::{SimHost, SimHostLimits},
    ledger::{Counters, Ledger},
    machine::SimHypervisor,
    rng::Streams,
    trace::{Tag, Timeline, TimelineLine, Trace},
    world::{SNAPSHOTS, Watcher, World},
    yields::Yields,
};
use async_trait::async_trait;
use bytes::Bytes;
use std::{collections::BTreeMap, fmt, path::PathBuf, sync::Arc};
use vm_core::{
    backend::{CoreBackend, CoreParts},
    env::Env,
    fault::{FaultControl, FaultKind, FaultOrder, FaultRefused},
    observe::Observer,
};
use vm_trait::{
    Capabilities, Capability, HostLimits, RestoreOptions, Snapshot, VmBackend, VmConfig,
    VmInstance, VmResult,
};

/// The simulated backend: the core of `vm-core` on a simulated host. Clones share everything.
#[derive(Clone)]
pub struct SimBackend {
    core: CoreBackend,
    world: Arc<World>,
}

/// What real machines can do and simulated ones cannot.
const NOT_SIMULATED: [Capability; 2] = [Capability::Root, Capability::Kernel];

/// What a simulation is made of.
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct SimBackendBuilder {
    seed: u64,
    faults: FaultPlan,
    env: SimEnvKind,
    host: SimHostLimits,
    programs: Arc<ProgramRegistry>,
    timeline: Timeline,
    coverage: bool,
    yields: Option<Yields>,
    lacks: Vec<Capability>,
}

/// A simulation that cannot be built.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// No runtime is current.
    #[error(transparent)]
    NoRuntime(#[from] NoRuntime),
    /// The fault plan holds a rule that can never fire.
    #[error(transparent)]
    Plan(#[from] PlanError),
}

impl SimBackendBuilder {
    /// Sets the seed, from which every random choice comes. Default 0.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Sets the faults that are to happen. Default none.
    pub fn faults(mut self, plan: FaultPlan) -> Self {
        self.faults = plan;
        self
    }

    /// Sets where time and tasks come from. Default the runtime that is current at [`build`](Self::build).
    pub fn env(mut self, env: impl Into<SimEnvKind>) -> Self {
        self.env = env.into();
        self
    }

    /// Sets what the host offers.
    pub fn host(mut self, limits: SimHostLimits) -> Self {
        self.host = limits;
        self
    }

    /// Takes a capability away, as from a backend that does not have it. Default none.
    pub fn without(mut self, capability: Capability) -> Self {
        self.lacks.push(capability);
        self
    }

    /// Adds programs to every guest.
    pub fn programs(mut self, programs: impl Into<Arc<ProgramRegistry>>) -> Self {
        self.programs = programs.into();
        self
    }

    /// Sets how much is kept for people. Default nothing.
    pub fn timeline(mut self, timeline: Timeline) -> Self {
        self.timeline = timeline;
        self
    }

    /// Sets whether it is counted which operations are called in which states, and which faults meet them. Default not.
    pub fn coverage(mut self, counted: bool) -> Self {
        self.coverage = counted;
        self
    }

    /// Sets how often other tasks are let first at the seams. Default once in 8 times, and once in 64 under madsim,
    /// whose scheduler explores by itself.
    pub fn yields(mut self, yields: Yields) -> Self {
        self.yields = Some(yields);
        self
    }

    /// Builds the backend. Under tokio, time should be paused.
    ///
    /// # Errors
    /// [`BuildError`] where the plan is no good, or outside a runtime.
    pub fn build(self) -> Result<SimBackend, BuildError> {
        let all = NOT_SIMULATED.iter().copied().fold(Capabilities::all(), Capabilities::without);
        let capabilities = self.lacks.into_iter().fold(all, Capabilities::without);
        self.faults.validate_for(&capabilities)?;
        let streams = Arc::new(Streams::new(self.seed));
        let counters = Arc::new(Counters::default());
        let env = SimEnv::new(self.env, Arc::clone(&streams), Arc::clone(&counters), self.yields)?;
        let world = Arc::new(World::new(
            Arc::new(env),
            Arc::clone(&streams),
            counters,
            Trace::new(self.seed, self.timeline).counting(self.coverage),
            Engine::new(self.faults, streams, capabilities),
            self.programs,
            self.host,
        ));
        let core = CoreBackend::new(CoreParts {
            hypervisor: Arc::new(SimHypervisor::new(Arc::clone(&world))),
            env: Arc::clone(&world.env) as Arc<dyn Env>,
            fs: Arc::new(SimHost(Arc::clone(&world)).fs()),
            snapshots: PathBuf::from(SNAPSHOTS),
            observer: Arc::new(Watcher(Arc::clone(&world))) as Arc<dyn Observer>,
        });
        Ok(SimBackend { core, world })
    }
}

impl SimBackend {
    /// Starts from the defaults: seed 0, no faults.
    pub fn builder() -> SimBackendBuilder {
        SimBackendBuilder::default()
    }

    /// Gives the hash of everything that happened so far.
    #[must_use]
    pub fn fingerprint(&self) -> u128 {
        self.world.trace.fingerprint()
    }

    /// Counts the events that the fingerprint is made of.
    #[must_use]
    pub fn events(&self) -> u64 {
        self.world.trace.events()
    }

    /// Lists what happened so far; nothing unless the timeline was asked for.
    #[must_use]
    pub fn timeline(&self) -> Vec<TimelineLine> {
        self.world.trace.lines()
    }

    /// Gives what was counted so far; nothing unless that was asked for.
    #[must_use]
    pub fn coverage(&self) -> Coverage {
        self.world.trace.coverage()
    }

    /// Gives the means to make faults happen.
    #[must_use]
    pub fn fault_control(&self) -> Arc<dyn FaultControl> {
        Arc::new(Control(Arc::clone(&self.world)))
    }

    /// Counts what is left on the host. Everything is zero once the last handle of every VM is dropped and their tasks
    /// have had a turn.
    #[must_use]
    pub fn ledger(&self) -> Ledger {
        self.world.ledger()
    }

    /// Gives the host.
    #[must_use]
    pub fn host(&self) -> SimHost {
        SimHost(Arc::clone(&self.world))
    }

    /// Gives the environment: clock, tasks and randomness.
    #[must_use]
    pub fn env(&self) -> Arc<SimEnv> {
        Arc::clone(&self.world.env)
    }

    /// Gives the core behind this backend.
    #[must_use]
    pub fn core(&self) -> &CoreBackend {
        &self.core
    }
}

#[async_trait]
impl VmBackend for SimBackend {
    fn name(&self) -> &str {
        self.core.name()
    }

    fn capabilities(&self) -> Capabilities {
        self.core.capabilities()
    }

    fn limits(&self) -> HostLimits {
        self.core.limits()
    }

    async fn create(&self, config: VmConfig) -> VmResult<Arc<dyn VmInstance>> {
        self.core.create(config).await
    }

    async fn restore(
        &self,
        snapshot: &Snapshot,
        options: RestoreOptions,
    ) -> VmResult<Arc<dyn VmInstance>> {
        self.core.restore(snapshot, options).await
    }

    async fn export_snapshot(&self, snapshot: &Snapshot) -> VmResult<Bytes> {
        self.core.export_snapshot(snapshot).await
    }

    async fn import_snapshot(&self, bytes: Bytes) -> VmResult<Snapshot> {
        self.core.import_snapshot(bytes).await
    }

    async fn delete_snapshot(&self, snapshot: &Snapshot) -> VmResult<()> {
        self.core.delete_snapshot(snapshot).await
    }

    async fn merge_snapshot(
        &self,
        snapshot: &Snapshot,
        path: Option<PathBuf>,
    ) -> VmResult<Snapshot> {
        self.core.merge_snapshot(snapshot, path).await
    }
}

impl fmt::Debug for SimBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimBackend").field("world", &self.world).finish_non_exhaustive()
    }
}

/// Orders faults of a simulation.
#[derive(Debug)]
struct Control(Arc<World>);

impl FaultControl for Control {
    fn can(&self, kind: FaultKind) -> bool {
        self.0.faults.can(kind)
    }

    fn order(&self, order: FaultOrder) -> Result<(), FaultRefused> {
        let kind = order.kind;
        let vm = order.vm;
        self.0.faults.order(order, self.0.now())?;
        self.0.note(vm, Tag::Ordered, &[kind as u64], || format!("ordered: {kind}"));
        if fault::is_spontaneous(kind) {
            self.0.wake_machines();
        }
        Ok(())
    }

    fn fired(&self) -> BTreeMap<FaultKind, u64> {
        self.0.faults.fired()
    }

    fn pending(&self) -> Vec<FaultOrder> {
        self.0.faults.pending()
    }
}
