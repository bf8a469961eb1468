//! Measuring machines of KVM: each stage of a boot, round trips, the VMM's memory, and what cycles leave.

use crate::target::KvmTarget;
use rustix::time::ClockId;
use serde::Serialize;
use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use vm_backend_kvm::{KvmHypervisor, LauncherProgram};
use vm_core::{
    backend::{CoreBackend, CoreParts},
    env::{Env, TokioEnv},
    host_fs::StdFs,
    observe::{Observer, Occurrence},
};
use vm_trait::{
    ExecRequest, ForkOptions, RestoreOptions, RootConfig, SnapshotOptions, VmBackend, VmConfig,
    VmId, VmInstance, VmResult,
};

/// How many round trips the medians of one boot are taken of.
const ROUND_TRIPS: u32 = 50;

/// How many copies are made of a machine of one boot.
const FORKS: u32 = 5;

/// How many snapshots are taken of a machine of one boot, each restored once.
const SNAPSHOTS: u32 = 3;

/// How long what a cycle left may take to go.
const SETTLING: Duration = Duration::from_secs(10);

/// What is to be measured of machines of KVM.
#[derive(Clone, Copy, Debug)]
pub struct KvmBench {
    /// How many boots the medians are taken of.
    pub boots: u32,
    /// How many machines are made, started and killed half-way to look for what they leave.
    pub cycles: u32,
}

/// What was measured of machines of KVM. Times are medians.
#[derive(Clone, Debug, Serialize)]
pub struct KvmMeasured {
    /// How many boots were measured.
    pub boots: u32,
    /// Which program ran them.
    pub launcher: String,
    /// Each stage of a boot, in order, in milliseconds.
    pub stages_ms: BTreeMap<&'static str, f64>,
    /// From the call of `start` to its return, in milliseconds.
    pub start_ms: f64,
    /// The first program that a machine runs, in milliseconds.
    pub first_exec_ms: f64,
    /// A program that does nothing, in microseconds.
    pub exec_round_trip_us: f64,
    /// An answer of the agent, in microseconds.
    pub ping_us: f64,
    /// The one over the other.
    pub exec_over_ping: f64,
    /// Resident memory of the launcher beside the guest's memory, in KiB.
    pub vmm_resident_kib: Option<f64>,
    /// From the call of `fork` to the end of the child's first program, in milliseconds.
    pub fork_to_exec_ms: f64,
    /// Its parts, in order, in milliseconds.
    pub fork_stages_ms: BTreeMap<&'static str, f64>,
    /// Memory of a child that has run nothing yet, as far as it is resident and its own alone, in KiB.
    pub idle_child_private_kib: Option<f64>,
    /// How much of that is its guest's memory.
    pub idle_child_guest_kib: Option<f64>,
    /// The same once the child has run a program, in KiB.
    pub child_private_kib: Option<f64>,
    /// How long the source stood still for a fork, in milliseconds.
    pub fork_paused_ms: f64,
    /// From the call of `snapshot` of a running machine to its return, in milliseconds.
    pub snapshot_ms: f64,
    /// How long the machine stood still meanwhile, in milliseconds.
    pub snapshot_paused_ms: f64,
    /// How long the snapshot's file is, in KiB.
    pub snapshot_kib: f64,
    /// From the call of `restore` to the end of the first program of the new machine, in milliseconds.
    pub restore_to_exec_ms: f64,
    /// Its parts, in order, in milliseconds.
    pub restore_stages_ms: BTreeMap<&'static str, f64>,
    /// From the call of `snapshot` on a base to its return, one program after the base, in milliseconds.
    pub increment_ms: f64,
    /// How long the machine stood still meanwhile, in milliseconds.
    pub increment_paused_ms: f64,
    /// How long the incremental snapshot's file is, in KiB.
    pub increment_kib: f64,
    /// How many cycles of create, start and kill there were.
    pub cycles: u32,
    /// What they left in this process and beside it.
    pub left_over: Vec<String>,
}

#[derive(Default)]
pub(super) struct Samples(BTreeMap<&'static str, Vec<f64>>);

impl Samples {
    pub(super) fn add(&mut self, what: &'static str, value: f64) {
        self.0.entry(what).or_default().push(value);
    }

    pub(super) fn median(&self, what: &str) -> Option<f64> {
        let mut values = self.0.get(what)?.clone();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied()
    }
}

impl KvmBench {
    /// The names of a boot's stages, in order.
    pub const STAGES: &'static [&'static str] =
        &["launcher_spawn", "launcher_hello", "vm_setup", "kernel_to_init", "init_to_ready"];

    /// The names of the parts of a restore with its first program, in order.
    pub const RESTORE_STAGES: &'static [&'static str] =
        &["restore_open", "restore_machine", "restore_load", "restore_handshake", "restore_exec"];

    /// The names of the parts of a fork with the child's first program, in order: until the child is made, until it
    /// runs, until its agent has answered, until the program has ended.
    pub const FORK_STAGES: &'static [&'static str] =
        &["fork_machine", "fork_resume", "fork_handshake", "fork_exec"];

    /// Measures, and calls `progress` with how much of the whole is done, from 0 to 1.
    ///
    /// # Errors
    /// Why machines cannot run here, or what failed.
    pub fn run(&self, progress: &mut dyn FnMut(f64)) -> Result<KvmMeasured, String> {
        let Open { hypervisor, backend, stopwatch, config, runtime, .. } = &Open::new()?;
        let bench = Bench { hypervisor, backend, stopwatch };
        runtime.block_on(self.measure(&bench, config, progress))
    }

    async fn measure(
        &self,
        bench: &Bench<'_>,
        config: &VmConfig,
        progress: &mut dyn FnMut(f64),
    ) -> Result<KvmMeasured, String> {
        let steps = f64::from(self.boots + self.cycles + 1);
        // The kernel and the initial file system are prepared once and for all.
        bench.boot(config, &mut Samples::default()).await?;
        let mut samples = Samples::default();
        for done in 0..self.boots {
            progress(f64::from(done + 1) / steps);
            bench.boot(config, &mut samples).await?;
        }
        let before = Held::now();
        for done in 0..self.cycles {
            progress(f64::from(self.boots + done + 1) / steps);
            cycle(bench.backend, config, done).await?;
        }
        let left_over = before.left_over().await;
        let median = |what: &str| samples.median(what).unwrap_or(f64::NAN);
        let stages = Self::STAGES.iter().map(|stage| (*stage, median(stage)));
        Ok(KvmMeasured {
            boots: self.boots,
            launcher: bench.hypervisor.launcher().to_string(),
            stages_ms: stages.collect(),
            start_ms: median("start"),
            first_exec_ms: median("first_exec"),
            exec_round_trip_us: median("exec"),
            ping_us: median("ping"),
            exec_over_ping: median("exec") / median("ping"),
            vmm_resident_kib: samples.median("vmm_resident"),
            fork_to_exec_ms: median("fork_to_exec"),
            fork_stages_ms: Self::FORK_STAGES.iter().map(|part| (*part, median(part))).collect(),
            idle_child_private_kib: samples.median("idle_child_private"),
            idle_child_guest_kib: samples.median("idle_child_guest"),
            child_private_kib: samples.median("child_private"),
            fork_paused_ms: median("fork_paused"),
            snapshot_ms: median("snapshot"),
            snapshot_paused_ms: median("snapshot_paused"),
            snapshot_kib: median("snapshot_kib"),
            restore_to_exec_ms: median("restore_to_exec"),
            restore_stages_ms: Self::RESTORE_STAGES
                .iter()
                .map(|part| (*part, median(part)))
                .collect(),
            increment_ms: median("increment"),
            increment_paused_ms: median("increment_paused"),
            increment_kib: median("increment_kib"),
            cycles: self.cycles,
            left_over,
        })
    }
}

/// Machines of KVM to measure, in a runtime of their own.
pub(crate) struct Open {
    pub(crate) hypervisor: Arc<KvmHypervisor>,
    pub(crate) backend: CoreBackend,
    pub(crate) env: Arc<dyn Env>,
    pub(crate) config: VmConfig,
    pub(crate) runtime: Runtime,
    stopwatch: Arc<Stopwatch>,
    _snapshots: TempDir,
}

impl Open {
    pub(crate) fn new() -> Result<Self, String> {
        let (found, root) = KvmTarget::new().parts()?;
        let hypervisor = with_launcher_beside(found)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .map_err(|error| format!("no tokio runtime: {error}"))?;
        let stopwatch = Arc::new(Stopwatch::default());
        let snapshots = tempfile::tempdir().map_err(|error| error.to_string())?;
        let env: Arc<dyn Env> = {
            let _inside = runtime.enter();
            let real = TokioEnv::real(|bytes| {
                // Machines would then share a name, which fails.
                let _ = getrandom::fill(bytes);
            });
            Arc::new(real)
        };
        let backend = CoreBackend::new(CoreParts {
            hypervisor: hypervisor.clone(),
            env: env.clone(),
            fs: Arc::new(StdFs),
            snapshots: snapshots.path().to_owned(),
            observer: stopwatch.clone(),
        });
        let mut config = VmConfig::default();
        config.root = RootConfig::directory(root);
        Ok(Self { hypervisor, backend, env, config, runtime, stopwatch, _snapshots: snapshots })
    }
}

/// Prefers the launcher's own binary beside this program to this program as launcher, even where it is the older of the
/// two: this program's allocator and code are far larger, and are not the VMM's. Build both before measuring.
fn with_launcher_beside(found: Arc<KvmHypervisor>) -> Result<Arc<KvmHypervisor>, String> {
    let this = std::env::current_exe().ok();
    let beside = this.as_deref().and_then(Path::parent).map(|dir| dir.join("vm-kvm-launcher"));
    match beside.filter(|path| path.is_file()) {
        Some(path) if *found.launcher() == LauncherProgram::ThisProgram => {
            let made = KvmHypervisor::builder().with_launcher(path).build();
            made.map(Arc::new).map_err(|error| error.to_string())
        }
        _ => Ok(found),
    }
}

/// What everything is measured with.
struct Bench<'a> {
    hypervisor: &'a KvmHypervisor,
    backend: &'a CoreBackend,
    stopwatch: &'a Stopwatch,
}

impl Bench<'_> {
    async fn boot(&self, config: &VmConfig, samples: &mut Samples) -> Result<(), String> {
        let hypervisor = self.hypervisor;
        let text = |error: vm_trait::VmError| error.to_string();
        let vm = self.backend.create(config.clone()).await.map_err(text)?;
        let began = Instant::now();
        vm.start().await.map_err(text)?;
        let (took, ready_at) = (began.elapsed(), monotonic());
        samples.add("start", millis(took));
        let began = Instant::now();
        vm.exec(ExecRequest::new("true")).await.map_err(text)?;
        samples.add("first_exec", millis(began.elapsed()));
        let stages = hypervisor.stages(vm.id()).ok_or("the machine is gone")?;
        samples.add("launcher_spawn", millis(stages.launcher_spawn));
        samples.add("launcher_hello", millis(stages.launcher_hello));
        if let Some(setup) = stages.vm_setup {
            samples.add("vm_setup", millis(setup));
        }
        if let (Some(kernel), Some(init_at)) = (stages.kernel_to_init, stages.init_at) {
            samples.add("kernel_to_init", millis(kernel));
            samples.add("init_to_ready", millis(ready_at.saturating_sub(init_at)));
        }
        for _ in 0..ROUND_TRIPS {
            let began = Instant::now();
            vm.exec(ExecRequest::new("true")).await.map_err(text)?;
            samples.add("exec", millis(began.elapsed()) * 1000.0);
            samples.add("ping", millis(vm.ping().await.map_err(text)?) * 1000.0);
        }
        if let Some(kib) = hypervisor
            .launcher_pid(vm.id())
            .and_then(|pid| resident_beside_guest(pid, guest_kib(config)))
        {
            samples.add("vmm_resident", kib);
        }
        for _ in 0..FORKS {
            self.fork(&*vm, samples).await.map_err(text)?;
        }
        for _ in 0..SNAPSHOTS {
            self.snapshot(&*vm, samples).await.map_err(text)?;
        }
        self.increments(&*vm, samples).await.map_err(text)?;
        vm.kill().await.map_err(text)
    }

    /// Forks a running machine and runs a program in the child.
    async fn fork(&self, vm: &dyn VmInstance, samples: &mut Samples) -> VmResult<()> {
        let began = Instant::now();
        let children = vm.fork(ForkOptions::new(1)).await?;
        samples.add("fork_paused", self.stopwatch.last("paused for a fork"));
        let back = began.elapsed();
        for child in children {
            let child = child?;
            let process = self.hypervisor.launcher_pid(child.id());
            let looked = Instant::now();
            let idle = process.and_then(|pid| private_parts(pid, guest_kib(child.config())));
            let looked = looked.elapsed();
            child.exec(ExecRequest::new("true")).await?;
            let whole = began.elapsed().saturating_sub(looked);
            samples.add("fork_to_exec", millis(whole));
            samples.add("fork_exec", millis(whole.saturating_sub(back)));
            if let Some(parts) = child.metrics().await?.boot {
                samples.add("fork_machine", millis(back.saturating_sub(parts.total())));
                samples.add("fork_resume", millis(parts.kernel));
                samples.add("fork_handshake", millis(parts.handshake));
            }
            if let Some((all, of_guest)) = idle {
                samples.add("idle_child_private", all);
                samples.add("idle_child_guest", of_guest);
            }
            if let Some(kib) = process.and_then(private_kib) {
                samples.add("child_private", kib);
            }
            child.kill().await?;
        }
        Ok(())
    }

    /// Captures a running machine, makes another one of the snapshot and runs a program in it.
    async fn snapshot(&self, vm: &dyn VmInstance, samples: &mut Samples) -> VmResult<()> {
        let began = Instant::now();
        let snapshot = vm.snapshot(SnapshotOptions::default()).await?;
        samples.add("snapshot", millis(began.elapsed()));
        samples.add("snapshot_paused", self.stopwatch.last("paused for a snapshot"));
        samples.add("snapshot_kib", file_kib(&snapshot.path));
        let began = Instant::now();
        let restored = self.backend.restore(&snapshot, RestoreOptions::running()).await?;
        let back = began.elapsed();
        restored.exec(ExecRequest::new("true")).await?;
        samples.add("restore_to_exec", millis(began.elapsed()));
        samples.add("restore_exec", millis(began.elapsed() - back));
        if let Some(parts) = restored.metrics().await?.boot {
            samples.add("restore_open", millis(back.saturating_sub(parts.total())));
            samples.add("restore_machine", millis(parts.machine));
            samples.add("restore_load", millis(parts.kernel));
            samples.add("restore_handshake", millis(parts.handshake));
        }
        restored.kill().await?;
        self.backend.delete_snapshot(&snapshot).await
    }

    /// Captures a machine and then, again and again, what a program changed.
    async fn increments(&self, vm: &dyn VmInstance, samples: &mut Samples) -> VmResult<()> {
        let mut chain = vec![vm.snapshot(SnapshotOptions::default().tracked()).await?];
        for _ in 0..SNAPSHOTS {
            vm.exec(ExecRequest::new("true")).await?;
            let began = Instant::now();
            let step =
                vm.snapshot(SnapshotOptions::default().on_base(&chain[chain.len() - 1])).await?;
            samples.add("increment", millis(began.elapsed()));
            samples.add("increment_paused", self.stopwatch.last("paused for a snapshot"));
            samples.add("increment_kib", file_kib(&step.path));
            chain.push(step);
        }
        for snapshot in chain {
            self.backend.delete_snapshot(&snapshot).await?;
        }
        Ok(())
    }
}

/// Gives how long a file is, in KiB.
fn file_kib(path: &Path) -> f64 {
    let length = fs::metadata(path).map_or(0, |about| about.len() >> 10);
    f64::from(u32::try_from(length).unwrap_or(u32::MAX))
}

/// Keeps the last time that each stage took in the core, whichever machine it was of.
#[derive(Debug, Default)]
struct Stopwatch(Mutex<BTreeMap<&'static str, Duration>>);

impl Stopwatch {
    fn last(&self, stage: &str) -> f64 {
        let times = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        times.get(stage).map_or(f64::NAN, |time| millis(*time))
    }
}

impl Observer for Stopwatch {
    fn record(&self, _: VmId, occurrence: &Occurrence<'_>) {
        if let Occurrence::Took { stage, duration } = occurrence {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(*stage, *duration);
        }
    }
}

/// Sums up a process's memory that is resident and its own alone, in KiB.
pub(crate) fn private_kib(pid: u32) -> Option<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    private_of(&text)
}

fn private_of(rollup: &str) -> Option<f64> {
    let kib = |name: &str| -> Option<u32> {
        let line = rollup.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix("kB")?.trim().parse().ok()
    };
    Some(f64::from(kib("Private_Clean:")? + kib("Private_Dirty:")?))
}

/// Makes, starts and kills a machine, at different moments of its boot.
async fn cycle(backend: &CoreBackend, config: &VmConfig, number: u32) -> Result<(), String> {
    let vm = backend.create(config.clone()).await.map_err(|error| error.to_string())?;
    let patience = Duration::from_millis(u64::from(number % 10) * 40);
    let _ = tokio::time::timeout(patience, vm.start()).await;
    vm.kill().await.map_err(|error| error.to_string())
}

/// How much memory a guest of this configuration has, in KiB.
fn guest_kib(config: &VmConfig) -> u64 {
    u64::from(config.memory.0) << 10
}

/// Sums up a process's resident memory without the mapping that is the guest's, in KiB.
pub(super) fn resident_beside_guest(pid: u32, guest_kib: u64) -> Option<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).ok()?;
    let (all, of_guest) = sums_of(&text, &["Rss:"], guest_kib)?;
    Some(all - of_guest)
}

/// Sums up a process's memory that is resident and its own alone, in KiB, and what of it is the guest's.
fn private_parts(pid: u32, guest_kib: u64) -> Option<(f64, f64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).ok()?;
    sums_of(&text, &["Private_Clean:", "Private_Dirty:"], guest_kib)
}

/// Sums up some lines of all mappings, in KiB, and of the mapping that is the guest's: of those that are large enough, the
/// one with the most in it.
fn sums_of(smaps: &str, names: &[&str], guest_kib: u64) -> Option<(f64, f64)> {
    let kib = |line: &str, name: &str| -> Option<u64> {
        line.strip_prefix(name)?.trim().strip_suffix("kB")?.trim().parse().ok()
    };
    let (mut sum, mut of_guest, mut size, mut here) = (0, None::<u64>, 0, 0);
    for line in smaps.lines() {
        if let Some(found) = kib(line, "Size:") {
            (size, here) = (found, 0);
        } else if let Some(found) = names.iter().find_map(|name| kib(line, name)) {
            (sum, here) = (sum + found, here + found);
            if size >= guest_kib {
                of_guest = of_guest.max(Some(here));
            }
        }
    }
    let number = |kib: u64| u32::try_from(kib).ok().map(f64::from);
    Some((number(sum)?, number(of_guest?)?))
}

/// What this process holds of the host.
struct Held {
    descriptors: usize,
    children: usize,
    mappings: usize,
}

impl Held {
    fn now() -> Self {
        let count = |path: &str| fs::read_dir(path).map_or(0, Iterator::count);
        let threads = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
        let children = threads.filter_map(|thread| {
            let list = fs::read_to_string(thread.path().join("children")).ok()?;
            Some(list.split_whitespace().count())
        });
        let mappings = fs::read_to_string("/proc/self/maps").unwrap_or_default();
        let guests = mappings.lines().filter(|line| line.contains("memfd:"));
        Self {
            descriptors: count("/proc/self/fd"),
            children: children.sum(),
            mappings: guests.count(),
        }
    }

    /// Says what is held now and was not before, once it had time to go.
    async fn left_over(&self) -> Vec<String> {
        let deadline = Instant::now() + SETTLING;
        loop {
            let now = Self::now();
            let more = [
                ("descriptors", self.descriptors, now.descriptors),
                ("child processes", self.children, now.children),
                ("mappings", self.mappings, now.mappings),
            ];
            let more = more.into_iter().filter(|(_, before, after)| after > before);
            let left: Vec<_> =
                more.map(|(what, before, after)| format!("{} {what}", after - before)).collect();
            if left.is_empty() || Instant::now() >= deadline {
                return left;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

pub(super) fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

fn monotonic() -> Duration {
    let time = rustix::time::clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_memory_is_summed_up() {
        let rollup =
            "0-1 ---p 00:00 0 [rollup]\nRss: 99 kB\nPrivate_Clean:   4 kB\nPrivate_Dirty:  30 kB\n";
        assert_eq!(private_of(rollup), Some(34.0));
        assert_eq!(private_of("Private_Clean: 4 kB\n"), None);
    }

    #[test]
    fn the_guests_memory_is_told_apart() {
        let smaps = "1-2 r-xp\nSize:   100 kB\nRss:   60 kB\n3-4 rw-p\nSize: 131072 kB\nRss: 90000 kB\n\
                     5-6 rw-p\nSize: 8192 kB\nRss:   20 kB\n7-8 rw-p\nSize: 1048576 kB\nRss: 0 kB\n";
        assert_eq!(sums_of(smaps, &["Rss:"], 131_072), Some((90_080.0, 90_000.0)));
        assert_eq!(sums_of(smaps, &["Rss:"], 2_000_000), None);
        let private = "1-2 rw-p\nSize: 131072 kB\nPrivate_Clean: 4 kB\nPrivate_Dirty: 30 kB\n3-4 rw-p\nSize: 8 kB\n\
                       Private_Clean: 0 kB\nPrivate_Dirty: 6 kB\n";
        assert_eq!(
            sums_of(private, &["Private_Clean:", "Private_Dirty:"], 131_072),
            Some((40.0, 34.0))
        );
    }
}
