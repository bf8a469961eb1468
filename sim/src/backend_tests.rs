//! Whole runs: the real core and agent on the simulated host.

use crate::{FaultPlan, SimBackend, SimHostLimits, Timeline, Yields};
use proptest::prelude::*;
use std::{future::Future, sync::Arc, time::Duration};
use vm_core::{
    env::Env,
    fault::{FaultKind, FaultOrder},
};
use vm_trait::{
    Capability, CrashReason, ForkOptions, RestoreOptions, SnapshotOptions, StopOptions, VmBackend,
    VmConfig, VmErrorKind, VmInstance, VmState, WriteOptions,
};

/// Runs in paused tokio time.
fn in_tokio<F: Future>(run: F) -> F::Output {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_time().start_paused(true).build().unwrap().block_on(run)
}

#[cfg(madsim)]
fn in_madsim<F: Future>(seed: u64, run: F) -> F::Output {
    madsim::runtime::Runtime::with_seed_and_config(seed, madsim::Config::default()).block_on(run)
}

fn sim(seed: u64, plan: FaultPlan) -> SimBackend {
    SimBackend::builder().seed(seed).faults(plan).timeline(Timeline::Frames).build().unwrap()
}

async fn started(sim: &SimBackend) -> Arc<dyn VmInstance> {
    let vm = sim.create(VmConfig::default()).await.unwrap();
    vm.start().await.unwrap();
    vm
}

/// Gives the tasks of what was dropped a turn.
async fn settle(sim: &SimBackend) {
    for _ in 0..50 {
        if sim.ledger().is_clear() {
            return;
        }
        sim.env().sleep(Duration::from_millis(100)).await;
    }
}

fn print(sim: &SimBackend) -> String {
    sim.timeline().iter().map(|line| format!("{line}\n")).collect()
}

async fn life(sim: &SimBackend) {
    let vm = started(sim).await;
    vm.ping().await.unwrap();
    let content: Vec<u8> = (0..200_000_u32).map(|n| u8::try_from(n % 253).unwrap()).collect();
    vm.write_file("/tmp/a", content.clone().into(), WriteOptions::default()).await.unwrap();
    assert_eq!(vm.read_file("/tmp/a").await.unwrap(), content);
    vm.pause().await.unwrap();
    let snapshot = vm.snapshot(SnapshotOptions::default()).await.unwrap();
    vm.resume().await.unwrap();
    let twin = sim.restore(&snapshot, RestoreOptions::running()).await.unwrap();
    assert_eq!(twin.read_file("/tmp/a").await.unwrap(), content);
    vm.stop(StopOptions::default()).await.unwrap();
    assert_eq!(vm.state(), VmState::Stopped);
    vm.start().await.unwrap();
    twin.kill().await.unwrap();
    sim.delete_snapshot(&snapshot).await.unwrap();
}

/// Runs a life and gives its fingerprint, having checked that nothing is left.
async fn fingerprint(seed: u64) -> u128 {
    let sim = sim(seed, FaultPlan::none());
    life(&sim).await;
    settle(&sim).await;
    assert!(sim.ledger().is_clear(), "left: {}\n{}", sim.ledger(), print(&sim));
    assert_eq!(sim.host().files(), Vec::<std::path::PathBuf>::new());
    sim.fingerprint()
}

#[test]
fn a_run_is_a_function_of_its_seed_under_paused_tokio() {
    for seed in 0..5 {
        let print = in_tokio(fingerprint(seed));
        assert_eq!(print, in_tokio(fingerprint(seed)), "seed {seed}");
        assert_ne!(print, in_tokio(fingerprint(seed + 100)), "seed {seed}");
    }
}

#[cfg(madsim)]
#[test]
fn a_run_is_a_function_of_its_seed_under_madsim() {
    for seed in 0..5 {
        let print = in_madsim(seed, fingerprint(seed));
        assert_eq!(print, in_madsim(seed, fingerprint(seed)), "seed {seed}");
        assert_ne!(print, in_madsim(seed, fingerprint(seed + 100)), "seed {seed}");
    }
}

#[test]
fn it_refuses_to_be_built_without_a_runtime_or_with_a_bad_plan() {
    use crate::BuildError;
    let bare = SimBackend::builder().build();
    assert!(matches!(bare, Err(BuildError::NoRuntime(_))));
    let plan = FaultPlan::none().with_probability(FaultKind::BootFail, 0.0);
    let refused = in_tokio(async { SimBackend::builder().faults(plan).build() });
    assert!(matches!(refused, Err(BuildError::Plan(_))));
}

#[test]
fn a_run_is_a_function_of_its_seed_under_turmoil() {
    let run = |seed: u64| {
        let print = Arc::new(std::sync::Mutex::new(0));
        let result = Arc::clone(&print);
        let mut host = turmoil::Builder::new()
            .simulation_duration(Duration::from_secs(3600))
            .rng_seed(seed)
            .build();
        host.client("user", async move {
            *result.lock().unwrap() = fingerprint(seed).await;
            Ok(())
        });
        host.run().unwrap();
        *print.lock().unwrap()
    };
    for seed in 0..3 {
        let print = run(seed);
        assert_ne!(print, 0);
        assert_eq!(print, run(seed), "seed {seed}");
        assert_ne!(print, run(seed + 100), "seed {seed}");
    }
}

#[test]
fn what_it_was_built_without_is_unsupported() {
    in_tokio(async {
        let sim = SimBackend::builder().without(Capability::Fork).build().unwrap();
        let vm = started(&sim).await;
        let error = vm.fork(ForkOptions::new(1)).await.unwrap_err();
        assert!(matches!(error.kind(), VmErrorKind::Unsupported { .. }), "{error}");
        assert!(!sim.capabilities().has(Capability::Fork));
        let order = FaultOrder::next(FaultKind::ForkChildFail);
        assert!(sim.fault_control().order(order).is_err());
    });
}

#[test]
fn the_timeline_tells_what_happened() {
    in_tokio(async {
        let sim = sim(3, FaultPlan::none());
        life(&sim).await;
        let text = print(&sim);
        for word in ["start #", "created -> starting", "running -> paused", "Ping", "machine ended"]
        {
            assert!(text.contains(word), "no {word} in\n{text}");
        }
        let quiet = SimBackend::builder().seed(3).build().unwrap();
        life(&quiet).await;
        assert!(quiet.timeline().is_empty() && quiet.events() > 0);
    });
}

#[test]
fn the_host_runs_out_of_machines_and_memory() {
    in_tokio(async {
        let limits = SimHostLimits::default().with_machines(1);
        let sim = SimBackend::builder().host(limits).build().unwrap();
        let first = started(&sim).await;
        let second = sim.create(VmConfig::default()).await.unwrap();
        let error = second.start().await.unwrap_err();
        assert!(matches!(error.kind(), VmErrorKind::ResourceExhausted { .. }), "{error}");
        drop(first);
        settle(&sim).await;
        second.start().await.unwrap();
    });
}

#[test]
fn losing_the_host_ends_all_machines() {
    in_tokio(async {
        let sim = sim(1, FaultPlan::none());
        let (one, two) = (started(&sim).await, started(&sim).await);
        sim.fault_control().order(FaultOrder::next(FaultKind::HostLost)).unwrap();
        for vm in [&one, &two] {
            vm.wait().await;
            assert_eq!(vm.state(), VmState::Crashed(CrashReason::HostLost));
        }
        assert_eq!(sim.host().losses(), 1);
        one.start().await.unwrap();
        one.ping().await.unwrap();
    });
}

/// Faults whose effect a ping shows or survives.
#[test]
fn ordered_faults_fire_once_on_their_vm() {
    for kind in [FaultKind::GuestPanic, FaultKind::VmmKilled] {
        in_tokio(async {
            let sim = sim(1, FaultPlan::none());
            let (one, two) = (started(&sim).await, started(&sim).await);
            let control = sim.fault_control();
            let later = Duration::from_secs(5);
            control.order(FaultOrder::next(kind).on(two.id()).with_amount(later)).unwrap();
            let before = sim.env().now();
            two.wait().await;
            let took = sim.env().now() - before;
            assert!(took >= later && took < later + Duration::from_secs(1), "{took:?}");
            assert!(matches!(two.state(), VmState::Crashed(_)));
            one.ping().await.unwrap();
            assert_eq!(control.fired().get(&kind), Some(&1));
            assert_eq!(control.pending(), []);
        });
    }
}

#[test]
fn every_fault_of_an_operation_shows_there() {
    use FaultKind as K;
    for kind in [K::CreateExhausted, K::BootFail, K::BootPanic, K::BootHang] {
        in_tokio(async {
            let sim = sim(1, FaultPlan::none().with_occasion(kind, 1));
            let vm = sim.create(VmConfig::default()).await.unwrap();
            vm.start().await.unwrap_err();
            assert_eq!(sim.fault_control().fired().get(&kind), Some(&1), "{kind}\n{}", print(&sim));
            vm.start().await.unwrap();
        });
    }
    for kind in [K::PauseFail, K::PauseStuck, K::ResumeFail, K::ResumeStuck] {
        in_tokio(async {
            let sim = sim(1, FaultPlan::none().with_occasion(kind, 1));
            let vm = started(&sim).await;
            let failed = match kind {
                K::PauseFail | K::PauseStuck => vm.pause().await.is_err(),
                _ => {
                    vm.pause().await.unwrap();
                    vm.resume().await.is_err()
                }
            };
            assert!(failed, "{kind}");
            assert_eq!(sim.fault_control().fired().get(&kind), Some(&1), "{kind}");
        });
    }
    for kind in [K::SaveFail, K::HostDiskFull, K::TornWrite] {
        in_tokio(async {
            let sim = sim(1, FaultPlan::none().with_occasion(kind, 1));
            let vm = started(&sim).await;
            vm.snapshot(SnapshotOptions::default()).await.unwrap_err();
            assert_eq!(sim.fault_control().fired().get(&kind), Some(&1), "{kind}");
        });
    }
    for kind in [K::BitRot, K::LoadFail, K::VersionSkew] {
        in_tokio(async {
            let sim = sim(1, FaultPlan::none().with_occasion(kind, 1));
            let vm = started(&sim).await;
            let snapshot = vm.snapshot(SnapshotOptions::default()).await.unwrap();
            sim.restore(&snapshot, RestoreOptions::paused()).await.unwrap_err();
            assert_eq!(sim.fault_control().fired().get(&kind), Some(&1), "{kind}");
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn benign_faults_change_no_outcome(seed: u64) {
        in_tokio(async {
            let sim = sim(seed, FaultPlan::benign_swarm(seed));
            life(&sim).await;
            settle(&sim).await;
            assert!(sim.ledger().is_clear(), "left: {}\n{}", sim.ledger(), print(&sim));
        });
    }

    #[test]
    fn yields_change_no_outcome(seed: u64, often in 1_u32..4) {
        in_tokio(async {
            let sim = SimBackend::builder().seed(seed).yields(Yields::one_in(often + 1)).build().unwrap();
            life(&sim).await;
        });
    }
}
