//! Machines in launcher processes: those of KVM and those of libkrun.

use super::{
    Detail, Run, RunReport, Target,
    guest_root::{copied_root, root},
    real::{FaultyHypervisor, FillingFs, RealFaults, RunDir},
    recorder::Records,
    tokio::{real_env, real_time_runtime, run_setup},
};
use crate::{
    clause::Clause,
    context::Setup,
    history::Assignment,
    host_network::RealHostNetwork,
    panics::PanicSink,
    pool::{HandleEnv, WarmPool},
    runner::cores,
    session::Limits,
    template::{MachineSource, Note, Template},
};
use async_trait::async_trait;
use bytes::Bytes;
use futures_core::future::BoxFuture;
use std::{
    path::PathBuf,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};
use tokio::runtime::Runtime;
use vm_backend_kvm::{Fitness, KvmHypervisor, probe};
use vm_backend_libkrun::KrunHypervisor;
use vm_core::{
    backend::{CoreBackend, CoreParts},
    env::Env,
    fault::{FaultKind, FaultScope},
    host_fs::StdFs,
    machine::Hypervisor,
    observe::{NoObserver, Observer},
};
use vm_guest_image::{Kernel, KernelError, KernelModules};
use vm_trait::{
    Capabilities, Capability, ExecRequest, HostLimits, RestoreOptions, Snapshot, VmBackend,
    VmConfig, VmId, VmInstance, VmResult,
};

/// How long a run may take; under software emulation a single boot takes many seconds.
const LIMITS: Limits =
    Limits { check: Duration::from_secs(300), leftovers: Duration::from_secs(60) };

/// What lists the programs of a guest, but for its kernel's threads, its first process and the lister itself, with one
/// program for all of them: each start of one takes tens of milliseconds under software emulation.
const LIST_PROGRAMS: &str = r#"
set -- /proc/[0-9]*/exe
links=$(ls -l "$@" 2>/dev/null)
printf '%s\n' "$links" | while read -r line; do
    case $line in
    *" /proc/1/exe -> "* | *" /proc/$$/exe -> "*) ;;
    *" -> "*) echo "${line#* /proc/}" ;;
    esac
done"#;

/// A hypervisor whose machines are launcher processes.
pub trait Launchers: Hypervisor + Sized + 'static {
    /// The backend's name.
    const NAME: &str;
    /// Where its runs take place.
    const ENVIRONMENT: &str;

    /// Gives what its machines can do with the kernel that is found on this host.
    fn claims() -> Capabilities;

    /// Finds the kernel that its machines have where none is named.
    ///
    /// # Errors
    /// As [`Kernel::find`].
    fn kernel() -> Result<Kernel, KernelError> {
        Kernel::find(None)
    }

    /// Makes one of what is found on this host.
    ///
    /// # Errors
    /// What is missing.
    fn found() -> Result<Self, String>;

    /// Gives the pid of a VM's launcher while it runs.
    fn pid(&self, vm: VmId) -> Option<u32>;

    /// Names the launcher's program.
    fn program(&self) -> String;
}

impl Launchers for KvmHypervisor {
    const NAME: &str = "kvm";
    const ENVIRONMENT: &str = "tokio with real time, machines of KVM";

    fn claims() -> Capabilities {
        Self::claims()
    }

    fn found() -> Result<Self, String> {
        Self::builder().build().map_err(|error| error.to_string())
    }

    fn pid(&self, vm: VmId) -> Option<u32> {
        self.launcher_pid(vm)
    }

    fn program(&self) -> String {
        self.launcher().to_string()
    }
}

impl Launchers for KrunHypervisor {
    const NAME: &str = "libkrun";
    const ENVIRONMENT: &str = "tokio with real time, machines of libkrun";

    fn claims() -> Capabilities {
        static CLAIMS: OnceLock<Capabilities> = OnceLock::new();
        let found = || Self::claims_with(&<Self as Launchers>::kernel().ok()?).ok();
        *CLAIMS.get_or_init(|| found().unwrap_or_else(Self::claims))
    }

    fn kernel() -> Result<Kernel, KernelError> {
        Kernel::find_with_libkrunfw(None)
    }

    fn found() -> Result<Self, String> {
        Self::builder().build().map_err(|error| error.to_string())
    }

    fn pid(&self, vm: VmId) -> Option<u32> {
        self.launcher_pid(vm)
    }

    fn program(&self) -> String {
        self.launcher().to_string()
    }
}

/// Machines of KVM. The program that uses it should call [`vm_backend_kvm::run_launcher_if_asked`] first in `main`.
pub type KvmTarget = LauncherTarget<KvmHypervisor>;

/// Machines of libkrun. The program that uses it should call [`vm_backend_libkrun::run_launcher_if_asked`] first in `main`.
pub type KrunTarget = LauncherTarget<KrunHypervisor>;

/// Machines that are launcher processes, in real time.
///
/// Clauses that [share machines](Clause::shares_machine) have them from a pool. The others have machines of their own;
/// all of them share kernels and initial file systems, which are prepared once. Where the backend can fork, machines of
/// default configuration are forked of one that was booted.
///
/// Machines whose configuration names no root have the directory that `TWINVM_ROOT` names, because most clauses need
/// a shell.
#[derive(Debug)]
pub struct LauncherTarget<H> {
    host: OnceLock<Result<Host<H>, String>>,
    bench: OnceLock<Result<SharedBench<H>, String>>,
}

impl<H> Default for LauncherTarget<H> {
    fn default() -> Self {
        Self { host: OnceLock::new(), bench: OnceLock::new() }
    }
}

/// What this host has for such machines.
#[derive(Debug)]
struct Host<H> {
    hypervisor: Arc<H>,
    root: PathBuf,
}

/// What clauses share: a backend in a runtime of its own, and its pool.
#[derive(Debug)]
struct SharedBench<H> {
    hypervisor: Arc<H>,
    backend: Backend,
    env: Arc<dyn Env>,
    faults: RealFaults,
    pool: WarmPool,
    /// Where the backend can fork.
    template: Option<Template>,
    panics: PanicSink,
    host_dir: Arc<RunDir>,
    /// Last, so that it outlives what lives in it.
    _runtime: Runtime,
}

impl<H: Launchers> LauncherTarget<H> {
    /// Names the backend; what can be run here is found out when it is asked.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Says line by line what of all that is needed was found here, and what was not.
    #[must_use]
    pub fn findings() -> Vec<String> {
        let mut lines = Vec::new();
        let mut line = |what: &str, found: Result<String, String>| {
            lines.push(match found {
                Ok(found) => format!("{what}: {found}"),
                Err(why) => format!("{what}: none: {why}"),
            });
        };
        line("kvm", probe().map(describe).map_err(|why| why.to_string()));
        let kernel = H::kernel();
        let found = kernel.as_ref().map(|kernel| {
            let release = kernel.release().unwrap_or("of unknown release");
            format!("{} ({release})", kernel.path().display())
        });
        line("kernel", found.map_err(ToString::to_string));
        let modules = match &kernel {
            Ok(kernel) => KernelModules::find(kernel, None).map_err(|error| error.to_string()),
            Err(_) => Err("there is no kernel".to_owned()),
        };
        let place = |modules: KernelModules| match modules.directory() {
            Some(directory) => directory.display().to_string(),
            None => "built into the kernel".to_owned(),
        };
        line("modules", modules.map(place));
        line("launcher", H::found().map(|found| found.program()));
        if H::claims().has(Capability::NetworkPasst) {
            line("passt", passt());
        }
        line("root", root().map(|root| root.display().to_string()));
        lines
    }

    /// Gives the hypervisor and the root directory, where machines can run here.
    ///
    /// # Errors
    /// Why they cannot.
    pub fn parts(&self) -> Result<(Arc<H>, PathBuf), String> {
        self.host().map(|host| (host.hypervisor.clone(), host.root.clone()))
    }

    fn host(&self) -> Result<&Host<H>, String> {
        self.host.get_or_init(Host::find).as_ref().map_err(Clone::clone)
    }

    fn bench(&self) -> Result<&SharedBench<H>, String> {
        self.bench.get_or_init(|| SharedBench::new(self.host()?)).as_ref().map_err(Clone::clone)
    }

    /// Runs a clause in the runtime and on the backend that it has in common with others: on machines that it shares, or
    /// on machines of its own that are forked.
    fn run_beside_others(&self, run: Run) -> RunReport {
        let bench = match self.bench() {
            Ok(bench) => bench,
            Err(why) => return RunReport { broken: Some(why), ..RunReport::default() },
        };
        let faults = bench.faults.for_run();
        let shares = run.clause.shares_machine();
        let backend = bench.backend.for_run(&faults);
        let template = bench.template.clone();
        let setup = Setup {
            // What a shared machine leaves is found when it is given back.
            leftovers: if shares {
                Arc::new(Vec::new)
            } else {
                backend.launchers(&bench.hypervisor)
            },
            warm: shares.then(|| bench.pool.clone()),
            template: template.map(|template| template.noting(backend.noter())),
            backend: Arc::new(backend),
            env: bench.env.clone(),
            faults: Some(Arc::new(faults.clone())),
            scratch: Arc::new(|_| "/tmp".to_owned()),
            host_dir: bench.host_dir.path().to_owned(),
            host_fs: Arc::new(StdFs),
            host_network: Arc::new(RealHostNetwork::default()),
            guest_root: copied_root(),
        };
        let sink = PanicSink::default();
        let guard = sink.join();
        let mut report = run_setup(run, LIMITS, &sink, |_| async { Ok(setup) });
        drop(guard);
        faults.forget_pending();
        for panic in bench.panics.take() {
            let broken = report.broken.unwrap_or_else(|| "a task panicked".to_owned());
            report.broken = Some(format!("{broken}; {panic}"));
        }
        report
    }

    fn run_alone(&self, run: Run, detail: Detail) -> RunReport {
        let host = match self.host() {
            Ok(host) => host,
            Err(why) => return RunReport { broken: Some(why), ..RunReport::default() },
        };
        let sink = PanicSink::default();
        let guard = sink.join();
        let records = Records::new(detail);
        let opened = records.clone();
        let clause = run.clause;
        let mut report =
            run_setup(run, LIMITS, &sink, |env| async move { host.open(env, clause, &opened) });
        drop(guard);
        report.timeline = records.take();
        report
    }
}

impl<H: Launchers> Target for LauncherTarget<H> {
    fn name(&self) -> &str {
        H::NAME
    }

    fn capabilities(&self) -> Capabilities {
        H::claims()
    }

    fn can_fault(&self, kind: FaultKind) -> bool {
        RealFaults::KINDS.contains(&kind)
            || (kind == FaultKind::HostDiskFull && RunDir::can_be_full())
    }

    fn environment(&self) -> &str {
        H::ENVIRONMENT
    }

    fn fit(&self) -> Result<(), String> {
        self.host().map(drop)
    }

    fn parallel_runs(&self) -> Option<usize> {
        Some(runs_at_a_time())
    }

    fn patience(&self) -> Duration {
        (LIMITS.check + LIMITS.leftovers) * 2
    }

    fn replay_line(&self, clause: &Clause, seed: u64) -> String {
        let id = clause.id;
        let backend = H::NAME;
        format!(
            "cargo run --release -p vm-dst -- replay --seed {seed:#x} --clause {id} --backend {backend}"
        )
    }

    fn run(&self, clause: &'static Clause, seed: u64, detail: Detail) -> RunReport {
        // A record is made of machines that no other run has.
        let beside_others = matches!(detail, Detail::Fingerprint | Detail::Record);
        let forked = H::claims().has(Capability::Fork) && forks(clause);
        if (clause.shares_machine() || forked) && beside_others {
            return self.run_beside_others(Run::of(clause, seed));
        }
        self.run_alone(Run::of(clause, seed), detail)
    }

    fn carry_out(&self, assignment: &Arc<Assignment>, detail: Detail) -> RunReport {
        self.run_alone(Run::of_script(assignment), detail)
    }
}

impl<H: Launchers> Host<H> {
    fn find() -> Result<Self, String> {
        probe().map_err(|why| why.to_string())?;
        let kernel = H::kernel().map_err(|error| error.to_string())?;
        KernelModules::find(&kernel, None).map_err(|error| error.to_string())?;
        if H::claims().has(Capability::NetworkPasst) {
            passt()?;
        }
        Ok(Self { hypervisor: Arc::new(H::found()?), root: root()? })
    }

    /// Puts a backend together that has faults, in the environment given.
    fn backend(
        &self,
        env: Arc<dyn Env>,
        observer: Arc<dyn Observer>,
        dir: &Arc<RunDir>,
    ) -> Backend {
        let finder = self.hypervisor.clone();
        let find_pid = Arc::new(move |vm| finder.pid(vm));
        let faults = RealFaults::new(RealFaults::KINDS, env.clone(), find_pid)
            .with_disk_to_fill(dir.is_small());
        let hypervisor = FaultyHypervisor {
            inner: self.hypervisor.clone() as Arc<dyn Hypervisor>,
            faults: faults.clone(),
            root: Some(self.root.clone()),
        };
        let core = CoreBackend::new(CoreParts {
            hypervisor: Arc::new(hypervisor),
            env,
            fs: Arc::new(FillingFs { dir: dir.clone(), faults: faults.clone() }),
            snapshots: dir.path().join("snapshots"),
            observer,
        });
        Backend { core, faults, made: Arc::default() }
    }

    fn open(&self, env: Arc<dyn Env>, clause: &Clause, records: &Records) -> Result<Setup, String> {
        let fills = clause.needs_faults.contains(&FaultKind::HostDiskFull)
            || (clause.group() == "history" && RunDir::can_be_full());
        let dir = match fills {
            true => Arc::new(RunDir::that_can_be_full()?),
            false => Arc::new(RunDir::new()?),
        };
        let backend = self.backend(env.clone(), records.observer(&env), &dir);
        let (faults, launchers) = (backend.faults.clone(), backend.launchers(&self.hypervisor));
        let host_dir = dir.path().to_owned();
        Ok(Setup {
            backend: Arc::new(backend),
            env,
            faults: Some(records.faults(Arc::new(faults))),
            scratch: Arc::new(|_| "/tmp".to_owned()),
            host_dir,
            host_fs: Arc::new(StdFs),
            host_network: Arc::new(RealHostNetwork::default()),
            guest_root: copied_root(),
            // It owns the directory, which is so removed once the run is over.
            leftovers: Arc::new(move || {
                let _kept = &dir;
                launchers()
            }),
            warm: None,
            template: None,
        })
    }
}

/// Counts the runs that go on at a time: one more than cores, because they wait now and then. More would only make
/// deadlines tight.
fn runs_at_a_time() -> usize {
    cores() + 1
}

/// Says whether a clause that has machines of its own can have them forked, and on a backend that others use too: whether
/// all faults that it orders name their VM, so that they can hit no other's.
fn forks(clause: &Clause) -> bool {
    let of_its_own = |kind: &FaultKind| {
        matches!(kind, FaultKind::VmmKilled | FaultKind::GuestPanic)
            || matches!(kind.scope(), FaultScope::Exec | FaultScope::File | FaultScope::Link)
    };
    // Chaos and histories draw their faults as they go.
    !matches!(clause.group(), "chaos" | "history") && clause.needs_faults.iter().all(of_its_own)
}

impl<H: Launchers> SharedBench<H> {
    fn new(host: &Host<H>) -> Result<Self, String> {
        let panics = PanicSink::default();
        let runtime = real_time_runtime(&panics)?;
        let host_dir = Arc::new(RunDir::new()?);
        let env: Arc<dyn Env> = {
            let _inside = runtime.enter();
            Arc::new(HandleEnv::new(real_env(), runtime.handle().clone()))
        };
        let backend = host.backend(env.clone(), Arc::new(NoObserver), &host_dir);
        let faults = backend.faults.clone();
        let shared: Arc<dyn VmBackend> = Arc::new(backend.for_run(&faults));
        let template = H::claims().has(Capability::Fork).then(|| Template::new(shared.clone()));
        let source = match &template {
            Some(template) => MachineSource::Fork(template.clone()),
            None => MachineSource::Boot(shared),
        };
        let pool = WarmPool::new(
            source,
            env.clone(),
            Arc::new(|_| "/tmp".to_owned()),
            Arc::new(|vm| Box::pin(look(vm)) as BoxFuture<'static, Result<(), String>>),
            runs_at_a_time(),
        );
        let hypervisor = host.hypervisor.clone();
        Ok(Self {
            hypervisor,
            backend,
            env,
            faults,
            pool,
            template,
            panics,
            host_dir,
            _runtime: runtime,
        })
    }
}

/// Looks for programs in a guest that are there for nobody.
async fn look(vm: Arc<dyn VmInstance>) -> Result<(), String> {
    let listed = vm.exec(ExecRequest::new("sh").args(["-c", LIST_PROGRAMS])).await;
    let listed = listed.map_err(|error| error.to_string())?;
    match listed.stdout_text().trim() {
        "" => Ok(()),
        programs => Err(format!("programs run on: {}", programs.replace('\n', ", "))),
    }
}

fn describe(fitness: Fitness) -> String {
    let Fitness { instructions_per_second, max_vcpus, nested, slow, .. } = fitness;
    let nested = if nested { ", on a virtual machine" } else { "" };
    let slow = if slow { ", slow" } else { "" };
    let millions = instructions_per_second / 1e6;
    format!("{millions:.0} million instructions a second, up to {max_vcpus} vCPUs{nested}{slow}")
}

/// Finds the program that networks by way of it take.
fn passt() -> Result<String, String> {
    let found = vm_backend_libkrun::passt::find(None);
    found.map(|path| path.display().to_string()).map_err(|error| error.to_string())
}

/// The core with a note of every machine that was made.
#[derive(Debug)]
struct Backend {
    core: CoreBackend,
    faults: RealFaults,
    made: Arc<Mutex<Vec<VmId>>>,
}

impl Backend {
    /// Gives the same backend with the account of another run.
    fn for_run(&self, faults: &RealFaults) -> Self {
        Self { core: self.core.clone(), faults: faults.clone(), made: Arc::default() }
    }

    fn note(&self, made: VmResult<Arc<dyn VmInstance>>) -> VmResult<Arc<dyn VmInstance>> {
        made.inspect(|vm| (self.noter())(vm))
    }

    /// Gives what takes note of a machine that this run made.
    fn noter(&self) -> Arc<Note> {
        let (made, faults) = (self.made.clone(), self.faults.clone());
        Arc::new(move |vm| {
            made.lock().unwrap_or_else(PoisonError::into_inner).push(vm.id());
            faults.know(vm);
        })
    }

    /// Gives what lists the launchers of machines that this run made and that live on.
    fn launchers<H: Launchers>(
        &self,
        hypervisor: &Arc<H>,
    ) -> Arc<dyn Fn() -> Vec<String> + Send + Sync> {
        let (made, hypervisor) = (self.made.clone(), hypervisor.clone());
        Arc::new(move || {
            let made = made.lock().unwrap_or_else(PoisonError::into_inner);
            let left = made.iter().filter_map(|vm| {
                let pid = hypervisor.pid(*vm)?;
                Some(format!("launcher process {pid} of {vm}"))
            });
            left.collect()
        })
    }
}

#[async_trait]
impl VmBackend for Backend {
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
        self.note(self.core.create(config).await)
    }

    async fn restore(
        &self,
        snapshot: &Snapshot,
        options: RestoreOptions,
    ) -> VmResult<Arc<dyn VmInstance>> {
        self.note(self.core.restore(snapshot, options).await)
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
