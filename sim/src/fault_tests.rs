//! Faults in whole runs: where they show, and that a run survives any mixture of them.

use crate::{FaultPlan, SimBackend, Timeline, scenario};
use bytes::Bytes;
use std::{collections::BTreeSet, future::Future, sync::Arc, time::Duration};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vm_core::{
    env::{Env, timeout},
    fault::{FaultKind, FaultOrder},
    host_fs::HostFs,
};
use vm_trait::{
    DiskConfig, ExecRequest, ExecStatus, ForkOptions, GuestFileError, MountConfig, NetworkConfig,
    RestoreOptions, Signal, SnapshotOptions, StopOptions, VmBackend, VmConfig, VmErrorKind,
    VmInstance, VmState, WriteOptions,
};

fn in_tokio<F: Future>(run: F) -> F::Output {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_time().start_paused(true).build().unwrap().block_on(run)
}

fn sim(seed: u64, plan: FaultPlan) -> SimBackend {
    SimBackend::builder().seed(seed).faults(plan).timeline(Timeline::Frames).build().unwrap()
}

async fn started(sim: &SimBackend, config: VmConfig) -> Arc<dyn VmInstance> {
    let vm = sim.create(config).await.unwrap();
    vm.start().await.unwrap();
    vm
}

fn fired(sim: &SimBackend, kind: FaultKind) -> u64 {
    sim.fault_control().fired().get(&kind).copied().unwrap_or(0)
}

fn order(sim: &SimBackend, kind: FaultKind) {
    sim.fault_control().order(FaultOrder::next(kind)).unwrap();
}

fn echo() -> ExecRequest {
    ExecRequest::new("echo").arg("hello")
}

#[test]
fn faults_of_programs_befall_the_next_program() {
    use FaultKind as K;
    in_tokio(async {
        let sim = sim(1, FaultPlan::none());
        let vm = started(&sim, VmConfig::default()).await;
        let write = || vm.write_file("/tmp/a", Bytes::new(), WriteOptions::default());
        for kind in [K::SpawnFail, K::ExecKilled, K::ExecHang, K::OutputCut] {
            order(&sim, kind);
            write().await.unwrap();
            assert_eq!(fired(&sim, kind), 0, "{kind} at a file");
            let result = vm.exec(echo().timeout(Duration::from_secs(3))).await;
            match kind {
                K::SpawnFail => {
                    let kind = result.unwrap_err().kind().clone();
                    assert!(matches!(kind, VmErrorKind::ExecFailed { .. }), "{kind}");
                }
                K::ExecKilled => {
                    assert_eq!(result.unwrap().status, ExecStatus::Signaled(Signal::KILL));
                }
                K::ExecHang => assert_eq!(result.unwrap().status, ExecStatus::TimedOut),
                _ => assert!(result.unwrap().stdout.len() <= 6),
            }
            assert_eq!(fired(&sim, kind), 1, "{kind}");
            assert_eq!(vm.exec(echo()).await.unwrap().stdout, "hello\n");
        }
    });
}

#[test]
fn faults_of_files_befall_the_next_file() {
    use FaultKind as K;
    in_tokio(async {
        let sim = sim(1, FaultPlan::none());
        let vm = started(&sim, VmConfig::default()).await;
        let write = |text: &'static str| {
            vm.write_file("/tmp/a", Bytes::from_static(text.as_bytes()), WriteOptions::default())
        };
        write("old").await.unwrap();
        for kind in [K::GuestDiskFull, K::GuestIo] {
            order(&sim, kind);
            assert_eq!(vm.exec(echo()).await.unwrap().stdout, "hello\n");
            assert_eq!(fired(&sim, kind), 0, "{kind} at a program");
            let error = write("new").await.unwrap_err();
            let VmErrorKind::GuestFile { error, .. } = error.kind() else { panic!("{error}") };
            match kind {
                K::GuestDiskFull => assert_eq!(*error, GuestFileError::OutOfSpace),
                _ => assert_eq!(*error, GuestFileError::Io { errno: 5 }),
            }
            assert_eq!(vm.read_file("/tmp/a").await.unwrap(), "old");
        }
        let long = Duration::from_secs(2);
        let slow = FaultOrder::next(K::SlowIo).with_amount(long);
        sim.fault_control().order(slow).unwrap();
        let before = sim.env().now();
        write("new").await.unwrap();
        assert!(sim.env().now() - before >= long);
        assert_eq!(fired(&sim, K::SlowIo), 1);
    });
}

#[test]
fn faults_of_the_link_are_survived() {
    use FaultKind as K;
    in_tokio(async {
        let sim = sim(1, FaultPlan::none());
        let vm = started(&sim, VmConfig::default()).await;
        for kind in [K::LinkShort, K::LinkStall, K::LinkDisconnect] {
            let amount = Duration::from_secs(2);
            sim.fault_control().order(FaultOrder::next(kind).with_amount(amount)).unwrap();
            let before = sim.env().now();
            assert_eq!(vm.exec(echo()).await.unwrap().stdout, "hello\n", "{kind}");
            let took = sim.env().now() - before;
            assert_eq!(took >= amount, kind == K::LinkStall, "{kind}: {took:?}");
            assert_eq!(fired(&sim, kind), 1, "{kind}");
        }
    });
}

#[test]
fn a_guest_that_ignores_the_stop_is_ended_by_its_deadline() {
    in_tokio(async {
        let sim = sim(1, FaultPlan::none());
        let vm = started(&sim, VmConfig::default()).await;
        order(&sim, FaultKind::StopIgnored);
        let grace = Duration::from_secs(4);
        let before = sim.env().now();
        vm.stop(StopOptions::default().with_grace(grace)).await.unwrap();
        let took = sim.env().now() - before;
        assert!(took >= grace && took < grace + Duration::from_secs(1), "{took:?}");
        assert_eq!((vm.state(), fired(&sim, FaultKind::StopIgnored)), (VmState::Stopped, 1));
    });
}

#[test]
fn the_guest_kernel_kills_its_largest_process() {
    in_tokio(async {
        let sim = sim(1, FaultPlan::none());
        let vm = started(&sim, VmConfig::default()).await;
        let process = vm.spawn(ExecRequest::new("sleep").arg("1000")).await.unwrap();
        order(&sim, FaultKind::GuestOom);
        assert_eq!(process.wait().await.unwrap(), ExecStatus::Signaled(Signal::KILL));
        assert_eq!(vm.exec(echo()).await.unwrap().stdout, "hello\n");
    });
}

#[test]
fn clocks_jump_and_come_right_at_resume() {
    in_tokio(async {
        let sim = sim(1, FaultPlan::none());
        let vm = started(&sim, VmConfig::default()).await;
        let error = async || {
            let output = vm.exec(ExecRequest::new("date").arg("+%s")).await.unwrap();
            let shown: i64 = output.stdout_text().trim().parse().unwrap();
            shown - i64::try_from(sim.env().wall_clock().as_secs()).unwrap()
        };
        assert!(error().await.abs() <= 1);
        for (kind, sign) in [(FaultKind::ClockForward, 1), (FaultKind::ClockBack, -1)] {
            let jump = FaultOrder::next(kind).with_amount(Duration::from_secs(1000));
            sim.fault_control().order(jump).unwrap();
            sim.env().sleep(Duration::from_millis(10)).await;
            assert!((error().await - sign * 1000).abs() <= 1, "{kind}");
            vm.pause().await.unwrap();
            vm.resume().await.unwrap();
            assert!(error().await.abs() <= 1, "{kind}");
        }
    });
}

#[test]
fn some_children_of_a_fork_fail() {
    in_tokio(async {
        let plan = FaultPlan::none().with_occasion(FaultKind::ForkChildFail, 2);
        let sim = sim(1, plan);
        let vm = started(&sim, VmConfig::default()).await;
        let children = vm.fork(ForkOptions::new(3)).await.unwrap();
        let made: Vec<_> = children.iter().map(Result::is_ok).collect();
        assert_eq!(made, [true, false, true]);
        for child in children.into_iter().flatten() {
            assert_eq!(child.exec(echo()).await.unwrap().stdout, "hello\n");
        }
    });
}

#[test]
fn a_lost_sync_is_found_when_the_host_is_back() {
    for seed in 0..20 {
        in_tokio(async {
            let sim = sim(seed, FaultPlan::none());
            let vm = started(&sim, VmConfig::default()).await;
            order(&sim, FaultKind::LostSync);
            let snapshot = vm.snapshot(SnapshotOptions::default()).await.unwrap();
            vm.wait().await;
            assert_eq!(sim.host().losses(), 1);
            let restored = sim.restore(&snapshot, RestoreOptions::running()).await;
            assert!(restored.is_err(), "a damaged snapshot was restored");
        });
    }
}

#[test]
fn durable_disks_outlive_machine_and_host() {
    in_tokio(async {
        let sim = sim(1, FaultPlan::none());
        let config = || {
            let disk = DiskConfig::new("/disks/a", "/data");
            VmConfig::builder().with_disk(disk).build().unwrap()
        };
        let vm = started(&sim, config()).await;
        let text = Bytes::from_static(b"kept");
        vm.write_file("/data/a", text.clone(), WriteOptions::default()).await.unwrap();
        let second = sim.create(config()).await.unwrap();
        second.start().await.unwrap_err();
        // A copy made from memory has a disk of its own.
        let snapshot = vm.snapshot(SnapshotOptions::default()).await.unwrap();
        let twin = sim.restore(&snapshot, RestoreOptions::running()).await.unwrap();
        let other = Bytes::from_static(b"other");
        twin.write_file("/data/a", other, WriteOptions::default()).await.unwrap();
        sim.host().crash();
        vm.wait().await;
        second.start().await.unwrap();
        assert_eq!(second.read_file("/data/a").await.unwrap(), text);
        assert_eq!(sim.host().guest_disks(), [std::path::PathBuf::from("/disks/a")]);
    });
}

/// Does a bit of everything, whatever comes of it.
async fn anything(sim: &SimBackend) {
    let _ = sim.host().fs().create_dir_all("/shared".as_ref()).await;
    let config = VmConfig::builder().with_mount(MountConfig::new("/shared", "/mnt/shared"));
    let Ok(vm) = sim.create(config.build().unwrap()).await else { return };
    for round in 0..3 {
        let _ = vm.start().await;
        let _ = vm.exec(echo().timeout(Duration::from_secs(60))).await;
        let _ = vm.write_file("/tmp/a", vec![7; 100_000].into(), WriteOptions::default()).await;
        let _ = vm.read_file("/tmp/a").await;
        let _ =
            vm.write_file("/mnt/shared/a", vec![7; 9_000].into(), WriteOptions::default()).await;
        let _ = vm.read_file("/mnt/shared/a").await;
        let _ = vm.pause().await;
        let _ = vm.resume().await;
        if let Ok(snapshot) = vm.snapshot(SnapshotOptions::default()).await {
            if let Ok(twin) = sim.restore(&snapshot, RestoreOptions::running()).await {
                let _ = twin.exec(echo().timeout(Duration::from_secs(60))).await;
            }
            let _ = sim.delete_snapshot(&snapshot).await;
        }
        if let Ok(children) = vm.fork(ForkOptions::new(2)).await {
            for child in children.into_iter().flatten() {
                let _ = child.ping().await;
            }
        }
        if round == 1 {
            let _ = vm.kill().await;
        } else {
            let _ = vm.stop(StopOptions::default()).await;
        }
        assert!(!matches!(vm.state(), VmState::Starting | VmState::Stopping));
    }
    Box::pin(over_the_network(sim)).await;
}

/// Lets the host talk to a guest through a mapped port, whatever comes of it.
async fn over_the_network(sim: &SimBackend) {
    let network = NetworkConfig::tsi().with_port(80, 2_000);
    let config = VmConfig::builder().with_network(network).build().unwrap();
    let Ok(vm) = sim.create(config).await else { return };
    let _ = vm.start().await;
    let echo = ExecRequest::new("tcp").args(["listen", "--echo", "2000"]);
    let _echo = vm.spawn(echo).await;
    let (env, host) = (sim.env(), sim.host());
    for _ in 0..5 {
        env.sleep(Duration::from_secs(1)).await;
        let talk = async {
            let mut stream = host.connect(80).await?;
            let mut came = [0; 5_000];
            stream.write_all(&came).await?;
            stream.read_exact(&mut came).await
        };
        // A guest that hangs is no fault of the network's.
        let _ = timeout(&*env, Duration::from_secs(60), talk).await;
    }
}

/// Runs under a swarm of faults to its end, and gives the fingerprint and the faults that happened.
async fn swarmed(seed: u64) -> (u128, BTreeSet<FaultKind>) {
    let sim = sim(seed, FaultPlan::swarm(seed));
    let print = |sim: &SimBackend| {
        sim.timeline().iter().map(|line| format!("{line}\n")).collect::<String>()
    };
    let day = Duration::from_secs(24 * 3600);
    let ended = timeout(&*sim.env(), day, anything(&sim)).await;
    assert!(ended.is_ok(), "seed {seed} hangs\n{}", print(&sim));
    for _ in 0..100 {
        if sim.ledger().is_clear() {
            break;
        }
        sim.env().sleep(Duration::from_secs(1)).await;
    }
    let ledger = sim.ledger();
    assert!(ledger.is_clear(), "seed {seed} leaves {ledger}\n{}", print(&sim));
    (sim.fingerprint(), sim.fault_control().fired().into_keys().collect())
}

#[test]
fn any_mixture_of_faults_ends_and_leaves_nothing() {
    let mut seen = BTreeSet::new();
    for seed in 0..150 {
        let (print, fired) = in_tokio(swarmed(seed));
        assert_eq!(print, in_tokio(swarmed(seed)).0, "seed {seed}");
        seen.extend(fired);
    }
    let never: Vec<_> = FaultKind::ALL.iter().filter(|kind| !seen.contains(kind)).collect();
    assert!(never.is_empty(), "these never happened: {never:?}");
}

#[cfg(madsim)]
#[test]
fn any_mixture_of_faults_ends_and_leaves_nothing_under_madsim() {
    use madsim::{Config, runtime::Runtime};
    for seed in 0..60 {
        let run = || Runtime::with_seed_and_config(seed, Config::default()).block_on(swarmed(seed));
        assert_eq!(run(), run(), "seed {seed}");
    }
}

#[test]
fn scenarios_hold_and_repeat() {
    for seed in 0..10 {
        let outcome = in_tokio(scenario::mixed(seed, 50)).unwrap();
        assert_eq!(outcome, in_tokio(scenario::mixed(seed, 50)).unwrap());
    }
    let day = in_tokio(scenario::idle(1)).unwrap();
    assert!(day.virtual_time >= Duration::from_secs(24 * 3600));
}

#[cfg(madsim)]
#[test]
fn scenarios_hold_and_repeat_under_madsim() {
    use madsim::{Config, runtime::Runtime};
    for seed in 0..10 {
        let run = || {
            let runtime = Runtime::with_seed_and_config(seed, Config::default());
            runtime.block_on(scenario::mixed(seed, 50)).unwrap()
        };
        assert_eq!(run(), run());
    }
}
