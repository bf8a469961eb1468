//! Doing one thing to machines again and again, and telling how often it went well: restores, forks, boots. What fails
//! once in a hundred times is not seen by clauses that do it once.

use crate::{bench::kvm as kvm_bench, environment::Environment};
use serde::Serialize;
use std::{
    fmt,
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};
use vm_core::env::{Env, timeout};
use vm_sim::SimBackend;
use vm_trait::{
    ExecRequest, ForkOptions, RestoreOptions, SnapshotOptions, VmBackend, VmConfig, VmError, VmId,
    VmInstance, VmInstanceExt,
};

/// How long any one step may take.
const STEP: Duration = Duration::from_secs(90);

/// How much of a console is told.
const TAIL: usize = 3000;

/// How long children are left alone before their memory is looked at.
const IDLE: Duration = Duration::from_secs(3);

/// What is done again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Repeated {
    /// A machine whose vCPUs are all busy is captured once, and restored in each round. A restored one must run a program,
    /// and what kept it busy must go on on every vCPU.
    Restore,
    /// An idle machine is forked once into a child for each round. Each must run a program. Their memory is looked at
    /// before and after.
    Fork,
    /// A machine is booted in each round, kept busy, and must run a program: what fails here too is not the restore's fault.
    Boot,
}

/// What is to be done, and how often.
#[derive(Clone, Copy, Debug)]
pub struct Soak {
    /// What.
    pub what: Repeated,
    /// How often.
    pub rounds: u32,
    /// How many virtual processors the machines have.
    pub vcpus: u8,
}

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub struct Soaked {
    /// What was done.
    pub what: Repeated,
    /// The backend.
    pub backend: &'static str,
    /// How many virtual processors the machines had.
    pub vcpus: u8,
    /// How many rounds were asked for.
    pub asked: u32,
    /// How many rounds there were: fewer where it was ended early.
    pub rounds: u32,
    /// How many of them went well.
    pub well: u32,
    /// The others.
    pub failures: Vec<Failure>,
    /// What was measured, in the order in which it happens.
    pub measured: Vec<Spread>,
}

/// A round that failed.
#[derive(Clone, Debug, Serialize)]
pub struct Failure {
    /// Its number, from 1.
    pub round: u32,
    /// At what.
    pub at: &'static str,
    /// Why: the error, and what is known of the end of the machine.
    pub why: String,
    /// The machine's last words.
    pub console: String,
}

/// Values of one kind.
#[derive(Clone, Debug, Serialize)]
pub struct Spread {
    /// What they are.
    pub what: &'static str,
    /// Their unit.
    pub unit: &'static str,
    /// How many there are.
    pub count: usize,
    /// The least.
    pub min: f64,
    /// The one in the middle.
    pub median: f64,
    /// The most.
    pub max: f64,
}

/// How far it is, and whether it is to end early: what was done until then is told all the same.
#[derive(Debug, Default)]
pub struct Watch {
    /// How many rounds are over.
    pub done: AtomicU32,
    /// How many of them failed.
    pub failed: AtomicU32,
    /// Whether no further round is to begin.
    pub ends: Arc<AtomicBool>,
}

/// Where it is done.
pub(crate) struct Host<'a> {
    backend: &'a dyn VmBackend,
    env: Arc<dyn Env>,
    config: VmConfig,
    /// Gives the memory that is resident for a machine alone, in KiB, where that can be told.
    private_kib: &'a dyn Fn(VmId) -> Option<f64>,
    /// How long busy programs pause at a time, in seconds: a simulated clock stands still while they do not.
    pause: &'a str,
    watch: Arc<Watch>,
}

impl Soak {
    /// Does it on simulated machines, whose times are virtual.
    ///
    /// # Errors
    /// What failed before the first round.
    pub fn simulated(
        self,
        environment: Environment,
        seed: u64,
        watch: Arc<Watch>,
    ) -> Result<Soaked, String> {
        let run = environment.run(seed, move || async move {
            let backend = SimBackend::builder().seed(seed).build();
            let backend = backend.map_err(|error| error.to_string())?;
            let host = Host::simulated(&backend, watch);
            host.soak(self, "sim").await
        });
        run.and_then(|soaked| soaked)
    }

    /// Does it on machines of KVM.
    ///
    /// # Errors
    /// Why machines cannot run here, or what failed before the first round.
    pub fn on_kvm(self, watch: Arc<Watch>) -> Result<Soaked, String> {
        let bench = kvm_bench::Open::new()?;
        let hypervisor = bench.hypervisor.clone();
        let private_kib = move |vm| hypervisor.launcher_pid(vm).and_then(kvm_bench::private_kib);
        bench.runtime.block_on(async {
            let host = Host {
                backend: &bench.backend,
                env: bench.env.clone(),
                config: bench.config.clone(),
                private_kib: &private_kib,
                pause: "0.002",
                watch,
            };
            host.soak(self, "kvm").await
        })
    }
}

impl<'a> Host<'a> {
    /// Takes simulated machines.
    fn simulated(backend: &'a SimBackend, watch: Arc<Watch>) -> Self {
        let (env, config) = (backend.env(), VmConfig::default());
        Self { backend, env, config, private_kib: &|_| None, pause: "0.05", watch }
    }
}

impl Host<'_> {
    async fn soak(mut self, soak: Soak, backend: &'static str) -> Result<Soaked, String> {
        self.config.vcpus = soak.vcpus;
        let mut account = Account::default();
        match soak.what {
            Repeated::Restore => self.restores(soak, &mut account).await?,
            Repeated::Fork => self.forks(soak, &mut account).await?,
            Repeated::Boot => {
                for round in 1..=soak.rounds {
                    if self.ends() {
                        break;
                    }
                    let outcome = self.boot_once(&mut account).await;
                    self.over(round, outcome, &mut account);
                }
            }
        }
        let failed = u32::try_from(account.failures.len()).unwrap_or(u32::MAX);
        let rounds = match soak.what {
            Repeated::Fork => soak.rounds,
            _ => self.watch.done.load(Ordering::Relaxed),
        };
        Ok(Soaked {
            what: soak.what,
            backend,
            vcpus: soak.vcpus,
            asked: soak.rounds,
            rounds,
            well: rounds.saturating_sub(failed),
            failures: account.failures,
            measured: account.samples.into_iter().filter_map(Samples::spread).collect(),
        })
    }

    fn ends(&self) -> bool {
        self.watch.ends.load(Ordering::Relaxed)
    }

    /// Takes note of a round that is over.
    fn over(&self, round: u32, outcome: Result<(), Wrong>, account: &mut Account) {
        self.watch.failed.fetch_add(u32::from(outcome.is_err()), Ordering::Relaxed);
        account.note(round, outcome);
        self.watch.done.fetch_add(1, Ordering::Relaxed);
    }

    async fn restores(&self, soak: Soak, account: &mut Account) -> Result<(), String> {
        let source = self.booted().await.map_err(|wrong| wrong.to_string())?;
        let load = Load::begin(self, &*source).await.map_err(|wrong| wrong.to_string())?;
        let begun = self.env.now();
        let snapshot = self.step("snapshot", None, source.snapshot(SnapshotOptions::default()));
        let snapshot = snapshot.await.map_err(|wrong| wrong.to_string())?;
        account.time("snapshot", self.env.now() - begun);
        // The source is not to take processor time from what is restored.
        source.kill().await.map_err(|error| error.to_string())?;
        drop(source);
        for round in 1..=soak.rounds {
            if self.ends() {
                break;
            }
            let begun = self.env.now();
            let restore = self.backend.restore(&snapshot, RestoreOptions::running());
            let outcome = match self.step("restore", None, restore).await {
                Ok(vm) => {
                    account.time("restore", self.env.now() - begun);
                    self.check(&*vm, &load, ("restore to first exec", begun), account).await
                }
                Err(wrong) => Err(wrong),
            };
            self.over(round, outcome, account);
        }
        self.backend.delete_snapshot(&snapshot).await.map_err(|error| error.to_string())
    }

    async fn boot_once(&self, account: &mut Account) -> Result<(), Wrong> {
        let begun = self.env.now();
        let vm = self.booted().await?;
        account.time("boot", self.env.now() - begun);
        let load = Load::begin(self, &*vm).await?;
        self.check(&*vm, &load, ("exec under load", self.env.now()), account).await
    }

    /// Checks a machine that is busy, and ends it.
    async fn check(
        &self,
        vm: &dyn VmInstance,
        load: &Load,
        (first, begun): (&'static str, Duration),
        account: &mut Account,
    ) -> Result<(), Wrong> {
        // A program that ends only with its machine: its error says how that came about.
        let watching = vm.spawn(ExecRequest::new("sleep").arg("1000000"));
        let (output, watch) =
            futures_util::future::join(timeout(&*self.env, STEP, vm.sh("echo alive")), watching)
                .await;
        account.time(first, self.env.now() - begun);
        let went = async {
            let output = within("first exec", output)?;
            if output.stdout_text().trim() != "alive" {
                return Err(Wrong::new(
                    "first exec",
                    format!("it wrote {:?}", output.stdout_text()),
                ));
            }
            load.goes_on(self, vm).await?;
            account.time("load goes on", self.env.now() - begun);
            self.step("kill", Some(vm), vm.kill()).await
        };
        let mut went = went.await;
        if let (Err(wrong), Ok(watch)) = (&mut went, watch)
            && let Ok(Err(ended)) = timeout(&*self.env, Duration::from_secs(5), watch.wait()).await
        {
            wrong.why = format!("{}; the machine: {}", wrong.why, ended.kind());
        }
        went.map_err(|wrong| wrong.of(vm))
    }

    async fn forks(&self, soak: Soak, account: &mut Account) -> Result<(), String> {
        let source = self.booted().await.map_err(|wrong| wrong.to_string())?;
        let begun = self.env.now();
        let options = ForkOptions::new(soak.rounds);
        let children = self.step("fork", Some(&*source), source.fork(options)).await;
        let children = children.map_err(|wrong| wrong.to_string())?;
        account.time("fork of all", self.env.now() - begun);
        let numbered = (1..).zip(&children);
        let alive: Vec<_> =
            numbered.filter_map(|(round, child)| Some((round, child.as_ref().ok()?))).collect();
        for (round, child) in (1..).zip(&children) {
            if let Err(error) = child {
                account.note(round, Err(Wrong::error("fork of a child", error)));
            }
        }
        self.memory(&alive, "private memory of an idle child", account).await;
        for (round, child) in &alive {
            let begun = self.env.now();
            let ran = self.step("first exec", Some(&***child), child.run("true", [""; 0])).await;
            account.time("first exec of a child", self.env.now() - begun);
            self.over(*round, ran.map(drop), account);
        }
        self.memory(&alive, "private memory after one program", account).await;
        let began = self.env.now();
        let programs = alive.iter().map(|(_, child)| child.sh("echo again"));
        let ran = timeout(&*self.env, STEP, futures_util::future::join_all(programs)).await;
        account.time("a program in all at once", self.env.now() - began);
        for ((round, child), ran) in alive.iter().zip(ran.unwrap_or_default()) {
            if let Err(error) = ran {
                account
                    .note(*round, Err(Wrong::error("exec in all at once", &error).of(&***child)));
            }
        }
        self.step("exec in the source", Some(&*source), source.run("true", [""; 0]))
            .await
            .map(drop)
            .map_err(|wrong| wrong.to_string())
    }

    /// Looks at the memory of children that are left alone.
    async fn memory(
        &self,
        children: &[(u32, &Arc<dyn VmInstance>)],
        what: &'static str,
        account: &mut Account,
    ) {
        self.env.sleep(IDLE).await;
        for (_, child) in children {
            if let Some(kib) = (self.private_kib)(child.id()) {
                account.add(what, "KiB", kib);
            }
        }
    }

    async fn booted(&self) -> Result<Arc<dyn VmInstance>, Wrong> {
        let vm = self.step("create", None, self.backend.create(self.config.clone())).await?;
        self.step("start", Some(&*vm), vm.start()).await?;
        Ok(vm)
    }

    async fn step<T>(
        &self,
        at: &'static str,
        vm: Option<&dyn VmInstance>,
        work: impl Future<Output = Result<T, VmError>>,
    ) -> Result<T, Wrong> {
        let outcome = within(at, timeout(&*self.env, STEP, work).await);
        outcome.map_err(|wrong| vm.map_or(wrong.clone(), |vm| wrong.of(vm)))
    }
}

fn within<T, E>(at: &'static str, outcome: Result<Result<T, VmError>, E>) -> Result<T, Wrong> {
    match outcome {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(Wrong::error(at, &error)),
        Err(_) => Err(Wrong::new(at, format!("not within {STEP:?}"))),
    }
}

/// What went wrong in a round.
#[derive(Clone, Debug)]
struct Wrong {
    at: &'static str,
    why: String,
    console: String,
}

impl Wrong {
    fn new(at: &'static str, why: String) -> Self {
        Self { at, why, console: String::new() }
    }

    fn error(at: &'static str, error: &VmError) -> Self {
        Self::new(at, error.to_string())
    }

    /// Adds what the machine has to say.
    fn of(mut self, vm: &dyn VmInstance) -> Self {
        if self.console.is_empty() {
            self.why = format!("{}; it is {}", self.why, vm.state());
            let console = vm.console();
            let tail = &console[console.len().saturating_sub(TAIL)..];
            self.console = String::from_utf8_lossy(tail).into_owned();
        }
        self
    }
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.at, self.why)?;
        if self.console.is_empty() { Ok(()) } else { write!(f, "\n{}", self.console) }
    }
}

/// Programs that keep a machine busy: one for each vCPU that writes memory and a file, and one that lives by timers.
struct Load {
    /// What shows how far all of them are, a number each.
    look: String,
}

impl Load {
    /// Starts them, and waits until all have done something.
    async fn begin(host: &Host<'_>, vm: &dyn VmInstance) -> Result<Self, Wrong> {
        let pause = host.pause;
        let mut look = String::new();
        for number in 0..host.config.vcpus {
            let count = format!("/tmp/load-count-{number}");
            let script = format!(
                "i=0; while :; do i=$((i+1)); \
                     if [ $((i%50)) = 0 ]; then echo $i >{count}.new; mv {count}.new {count}; \
                         yes $i | head -c 300000 >/tmp/load-block-{number}; sleep {pause}; fi; \
                 done"
            );
            Self::spawn(host, vm, &script).await?;
            look += &format!("cat {count}; ");
        }
        let ticks = "/tmp/load-ticks";
        let script = format!(
            "i=0; while :; do i=$((i+1)); echo $i >{ticks}.new; mv {ticks}.new {ticks}; sleep 0.02; done"
        );
        Self::spawn(host, vm, &script).await?;
        look += &format!("cat {ticks}");
        let load = Self { look };
        load.goes_on(host, vm).await?;
        Ok(load)
    }

    async fn spawn(host: &Host<'_>, vm: &dyn VmInstance, script: &str) -> Result<(), Wrong> {
        let request = ExecRequest::new("sh").args(["-c", script]);
        let process = host.step("start of the load", Some(vm), vm.spawn(request)).await?;
        host.step("start of the load", Some(vm), process.detach()).await.map(drop)
    }

    /// Checks that each of them gets ahead.
    async fn goes_on(&self, host: &Host<'_>, vm: &dyn VmInstance) -> Result<(), Wrong> {
        const AT: &str = "load goes on";
        let (mut first, begun) = (None, host.env.now());
        loop {
            let output = host.step(AT, Some(vm), vm.sh(&self.look)).await?;
            let text = output.stdout_text();
            let now: Vec<u64> = text.lines().filter_map(|line| line.parse().ok()).collect();
            let all = usize::from(host.config.vcpus) + 1;
            match &first {
                None if now.len() == all => first = Some(now),
                Some(first) if now.iter().zip(first).all(|(now, first)| now > first) => {
                    return Ok(());
                }
                _ => {}
            }
            if host.env.now() - begun > STEP {
                let why = format!("after {STEP:?} it stands at {text:?}, at first at {first:?}");
                return Err(Wrong::new(AT, why).of(vm));
            }
            host.env.sleep(Duration::from_millis(20)).await;
        }
    }
}

/// What is noted of the rounds.
#[derive(Default)]
struct Account {
    failures: Vec<Failure>,
    samples: Vec<Samples>,
}

struct Samples {
    what: &'static str,
    unit: &'static str,
    values: Vec<f64>,
}

impl Account {
    /// Takes note of a round; the first failure of one counts.
    fn note(&mut self, round: u32, outcome: Result<(), Wrong>) {
        if let Err(Wrong { at, why, console }) = outcome
            && self.failures.iter().all(|failure| failure.round != round)
        {
            self.failures.push(Failure { round, at, why, console });
        }
    }

    fn time(&mut self, what: &'static str, took: Duration) {
        self.add(what, "ms", took.as_secs_f64() * 1000.0);
    }

    fn add(&mut self, what: &'static str, unit: &'static str, value: f64) {
        match self.samples.iter_mut().find(|samples| samples.what == what) {
            Some(samples) => samples.values.push(value),
            None => self.samples.push(Samples { what, unit, values: vec![value] }),
        }
    }
}

impl Samples {
    fn spread(mut self) -> Option<Spread> {
        self.values.sort_by(f64::total_cmp);
        let (min, max) = (*self.values.first()?, *self.values.last()?);
        let (count, median) = (self.values.len(), self.values[self.values.len() / 2]);
        Some(Spread { what: self.what, unit: self.unit, count, min, median, max })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_sim::FaultPlan;

    fn soak(what: Repeated, rounds: u32) -> Soak {
        Soak { what, rounds, vcpus: 2 }
    }

    #[test]
    fn rounds_on_good_machines_go_well() {
        for what in [Repeated::Restore, Repeated::Fork, Repeated::Boot] {
            let watch = Arc::new(Watch::default());
            let soaked = soak(what, 4).simulated(Environment::Tokio, 7, watch.clone()).unwrap();
            assert_eq!((soaked.well, soaked.rounds), (4, 4), "{:?}", soaked.failures);
            assert_eq!(watch.done.load(Ordering::Relaxed), 4);
            assert!(soaked.measured.iter().all(|spread| spread.min <= spread.median));
            assert!(
                soaked.measured.iter().any(|spread| spread.count == 4),
                "{:?}",
                soaked.measured
            );
        }
    }

    #[test]
    fn one_that_is_ended_tells_what_was_done() {
        let watch = Arc::new(Watch::default());
        watch.ends.store(true, Ordering::Relaxed);
        let soaked = soak(Repeated::Restore, 4).simulated(Environment::Tokio, 7, watch).unwrap();
        assert_eq!((soaked.asked, soaked.rounds, soaked.well), (4, 0, 0));
    }

    #[test]
    fn bad_rounds_are_told() {
        let run = Environment::Tokio.run(7, || async {
            let plan = FaultPlan::none()
                .with_occasion(vm_core::fault::FaultKind::LoadFail, 2)
                .with_occasion(vm_core::fault::FaultKind::SpawnFail, 20);
            let backend = SimBackend::builder().seed(7).faults(plan).build().unwrap();
            let host = Host::simulated(&backend, Arc::default());
            host.soak(soak(Repeated::Restore, 8), "sim").await
        });
        let soaked = run.unwrap().unwrap();
        assert_eq!(soaked.failures.len(), 2, "{:?}", soaked.failures);
        assert_eq!((soaked.failures[0].round, soaked.failures[0].at), (2, "restore"));
        assert_eq!(soaked.well, 6);
    }
}
