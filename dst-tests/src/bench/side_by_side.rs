//! Measuring machines of KVM and of libkrun in one run, turn by turn, by what both can do.

use super::kvm::{Samples, millis, resident_beside_guest};
use crate::target::{LauncherTarget, Launchers};
use serde::Serialize;
use std::{fs, sync::Arc, time::Instant};
use vm_backend_kvm::KvmHypervisor;
use vm_backend_libkrun::KrunHypervisor;
use vm_core::{backend::CoreBackend, observe::NoObserver};
use vm_trait::{ExecRequest, RootConfig, VmBackend, VmConfig};

/// How many round trips the medians of one boot are taken of.
const ROUND_TRIPS: u32 = 50;

/// What is to be measured of both.
#[derive(Clone, Copy, Debug)]
pub struct SideBySide {
    /// How many boots of each the medians are taken of.
    pub boots: u32,
}

/// What was measured of one of them. Times are medians.
#[derive(Clone, Debug, Serialize)]
pub struct Side {
    /// The backend.
    pub backend: &'static str,
    /// Which program ran the machines.
    pub launcher: String,
    /// From the call of `start` to its return, when the agent has answered, in milliseconds.
    pub start_ms: f64,
    /// A program that does nothing, in microseconds.
    pub exec_round_trip_us: f64,
    /// An answer of the agent, in microseconds.
    pub ping_us: f64,
    /// A pause and a resume, in milliseconds.
    pub pause_resume_ms: f64,
    /// Resident memory of the machine's processes beside the guest's memory, in KiB.
    pub resident_kib: Option<f64>,
}

impl SideBySide {
    /// Measures, and calls `progress` with how much of the whole is done, from 0 to 1.
    ///
    /// # Errors
    /// Why machines cannot run here, or what failed.
    pub fn run(&self, progress: &mut dyn FnMut(f64)) -> Result<Vec<Side>, String> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .map_err(|error| format!("no tokio runtime: {error}"))?;
        let inside = runtime.enter();
        let (kvm, krun) = (Bench::<KvmHypervisor>::new()?, Bench::<KrunHypervisor>::new()?);
        drop(inside);
        runtime.block_on(async {
            // The kernel and the initial file system are prepared once and for all.
            kvm.boot(&mut Samples::default()).await?;
            krun.boot(&mut Samples::default()).await?;
            let (mut of_kvm, mut of_krun) = (Samples::default(), Samples::default());
            for done in 0..self.boots {
                progress(f64::from(done) / f64::from(self.boots));
                kvm.boot(&mut of_kvm).await?;
                krun.boot(&mut of_krun).await?;
            }
            Ok(vec![kvm.side(&of_kvm), krun.side(&of_krun)])
        })
    }
}

/// Machines of one kind.
struct Bench<H> {
    hypervisor: Arc<H>,
    backend: CoreBackend,
    config: VmConfig,
}

impl<H: Launchers> Bench<H> {
    fn new() -> Result<Self, String> {
        let (hypervisor, root) = LauncherTarget::<H>::default().parts()?;
        let observer = Arc::new(NoObserver);
        let backend = vm_launcher::backend::on_this_host(hypervisor.clone(), None, observer);
        let mut config = VmConfig::default();
        config.root = RootConfig::directory(root);
        Ok(Self { hypervisor, backend, config })
    }

    async fn boot(&self, samples: &mut Samples) -> Result<(), String> {
        let text = |error: vm_trait::VmError| format!("{}: {error}", H::NAME);
        let vm = self.backend.create(self.config.clone()).await.map_err(text)?;
        let began = Instant::now();
        vm.start().await.map_err(text)?;
        samples.add("start", millis(began.elapsed()));
        for _ in 0..ROUND_TRIPS {
            let began = Instant::now();
            vm.exec(ExecRequest::new("true")).await.map_err(text)?;
            samples.add("exec", millis(began.elapsed()) * 1000.0);
            samples.add("ping", millis(vm.ping().await.map_err(text)?) * 1000.0);
        }
        let began = Instant::now();
        vm.pause().await.map_err(text)?;
        vm.resume().await.map_err(text)?;
        samples.add("pause", millis(began.elapsed()));
        let guest_kib = u64::from(self.config.memory.0) << 10;
        if let Some(launcher) = self.hypervisor.pid(vm.id()) {
            let processes = with_children(launcher);
            let of_each = processes.into_iter().filter_map(|pid| resident_of(pid, guest_kib));
            samples.add("resident", of_each.sum());
        }
        vm.kill().await.map_err(text)
    }

    fn side(&self, samples: &Samples) -> Side {
        let median = |what: &str| samples.median(what).unwrap_or(f64::NAN);
        Side {
            backend: H::NAME,
            launcher: self.hypervisor.program(),
            start_ms: median("start"),
            exec_round_trip_us: median("exec"),
            ping_us: median("ping"),
            pause_resume_ms: median("pause"),
            resident_kib: samples.median("resident"),
        }
    }
}

/// Gives a process and its children.
fn with_children(pid: u32) -> Vec<u32> {
    let list = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let children = list.split_whitespace().filter_map(|child| child.parse().ok());
    std::iter::once(pid).chain(children).collect()
}

/// Gives a process's resident memory without the guest's, in KiB.
fn resident_of(pid: u32, guest_kib: u64) -> Option<f64> {
    resident_beside_guest(pid, guest_kib).or_else(|| {
        // It has no guest's memory.
        let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix("Rss:"))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u32>().ok().map(f64::from)
    })
}
