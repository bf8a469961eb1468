//! What is refused before a machine or its agent hears of it.

use crate::{
    damaged_image::metadata,
    frames::welcome,
    hostile_agent::on_paused_time,
    machine::{Act, Behaviour, Ill, Ports},
    scripted_agent::{SECOND, answers},
};
use futures_util::FutureExt;
use std::sync::Arc;
use vm_guest_protocol::{Frame, Started};
use vm_trait::{
    Capabilities, Capability, CreateDirOptions, ExecRequest, ForkOptions, GuestFileError,
    RemoveOptions, RestoreOptions, Snapshot, SnapshotOptions, TtySize, User, VmBackend, VmConfig,
    VmErrorKind, VmInstance, VmResult, VmState, WriteOptions,
};

type Vm = Arc<dyn VmInstance>;

/// Gives one that can do everything but this.
fn lacking(capability: Capability) -> Arc<Ill> {
    let scripts = vec![vec![Act::Frame(0, welcome(false))]];
    let all = Capabilities::all().without(Capability::GuestKernel);
    let behaviour = Behaviour { scripts, ports: Ports::Silent, mute: false };
    Ill::able(behaviour, all.without(capability))
}

/// Gives one that can do everything.
fn able() -> Arc<Ill> {
    Ill::playing(vec![vec![Act::Frame(0, welcome(false))]], Ports::Silent)
}

fn snapshot() -> Snapshot {
    Snapshot::new("/nowhere/1.snapshot".into(), metadata(&VmConfig::default()))
}

/// Calls something that needs a capability.
async fn asks(backend: &dyn VmBackend, vm: &Vm, capability: Capability) -> VmResult<()> {
    let tty = TtySize { rows: 24, cols: 80 };
    let x = || ExecRequest::new("x");
    match capability {
        Capability::Exec => vm.exec(x()).await.map(drop),
        Capability::Files => vm.read_file("/a").await.map(drop),
        Capability::Tty => vm.exec(x().tty(tty)).await.map(drop),
        Capability::Users => vm.exec(x().user(User::Name("root".into()))).await.map(drop),
        Capability::Pause => vm.pause().await,
        Capability::Snapshot => vm.snapshot(SnapshotOptions::default()).await.map(drop),
        Capability::RestoreInPlace => vm.restore(&snapshot(), RestoreOptions::default()).await,
        Capability::Fork => vm.fork(ForkOptions::new(1)).await.map(drop),
        Capability::Vsock => vm.connect(5_000).await.map(drop),
        Capability::Inspect => vm.inspect().await.map(drop),
        Capability::IncrementalSnapshot => {
            backend.merge_snapshot(&snapshot(), None).await.map(drop)
        }
        other => panic!("{other} has no operation of its own"),
    }
}

#[test]
fn what_a_backend_cannot_do_is_refused_by_name() {
    const OPERATIONS: [Capability; 11] = [
        Capability::Exec,
        Capability::Files,
        Capability::Tty,
        Capability::Users,
        Capability::Pause,
        Capability::Snapshot,
        Capability::RestoreInPlace,
        Capability::Fork,
        Capability::Vsock,
        Capability::Inspect,
        Capability::IncrementalSnapshot,
    ];
    on_paused_time(async {
        for missing in OPERATIONS {
            let ill = lacking(missing);
            let vm = ill.running(VmConfig::default()).await;
            let error = asks(&ill.backend(), &vm, missing).await.expect_err(missing.name());
            let wanted = VmErrorKind::Unsupported { what: missing.name().to_owned() };
            assert_eq!(error.kind(), &wanted, "without {missing}");
        }
    });
}

#[test]
fn a_snapshot_that_builds_on_others_or_is_built_on_needs_its_own_capability() {
    on_paused_time(async {
        let ill = lacking(Capability::IncrementalSnapshot);
        let vm = ill.running(VmConfig::default()).await;
        let tracked = SnapshotOptions::default().tracked();
        let built = SnapshotOptions::default().on_base(&snapshot());
        let name = Capability::IncrementalSnapshot.name();
        let wanted = VmErrorKind::Unsupported { what: name.to_owned() };
        for options in [tracked, built] {
            let error = vm.snapshot(options).await.unwrap_err();
            assert_eq!(error.kind(), &wanted);
        }
        let tracked = RestoreOptions::default().tracked();
        let error = ill.backend().restore(&snapshot(), tracked).await.unwrap_err();
        assert_eq!(error.kind(), &wanted);
    });
}

#[test]
fn a_machine_that_cannot_be_inspected_though_its_backend_says_so_is_told() {
    on_paused_time(async {
        let ill = able();
        let vm = ill.running(VmConfig::default()).await;
        vm.pause().await.unwrap();
        let error = vm.inspect().await.unwrap_err();
        assert!(matches!(error.kind(), VmErrorKind::Unsupported { .. }), "{error}");
    });
}

#[test]
fn paths_that_are_none_never_reach_the_guest() {
    on_paused_time(async {
        let ill = able();
        let vm = ill.running(VmConfig::default()).await;
        let path = "not/absolute";
        let refused = [
            vm.read_file(path).await.map(drop),
            vm.write_file(path, "x".into(), WriteOptions::default()).await,
            vm.stat(path).await.map(drop),
            vm.list_dir(path).await.map(drop),
            vm.create_dir(path, CreateDirOptions::default()).await,
            vm.remove(path, RemoveOptions::default()).await,
            vm.rename(path, "/b").await,
            vm.rename("/b", path).await,
        ];
        for outcome in refused {
            let error = outcome.unwrap_err();
            let wanted = GuestFileError::InvalidPath;
            assert!(
                matches!(error.kind(), VmErrorKind::GuestFile { error, .. } if *error == wanted),
                "{error}"
            );
        }
        assert_eq!(ill.opened(), []);
    });
}

#[test]
fn terminals_without_rows_or_columns_never_reach_the_guest() {
    on_paused_time(async {
        let on_terminal = Started { process: 9, pid: 7, stdout: 0, stderr: 0, tty: true, stdin: 0 };
        let scripts = vec![answers(vec![vec![Frame::Started(on_terminal)]])];
        let ill = Ill::playing(scripts, Ports::Silent);
        let vm = ill.running(VmConfig::default()).await;
        tokio::time::sleep(SECOND).await;
        let right = TtySize { rows: 24, cols: 80 };
        let process = vm.spawn(ExecRequest::new("x").tty(right)).await.unwrap();
        let sent = ill.sent().len();
        for (rows, cols) in [(0, 80), (24, 0)] {
            let size = TtySize { rows, cols };
            let refused = [
                vm.exec(ExecRequest::new("x").tty(size)).await.map(drop),
                process.resize(size).await,
            ];
            for outcome in refused {
                let error = outcome.unwrap_err();
                assert!(
                    matches!(error.kind(), VmErrorKind::InvalidConfig { field, .. } if field == "tty"),
                    "{error}"
                );
            }
        }
        assert_eq!(ill.sent().len(), sent);
    });
}

#[test]
fn a_kill_takes_what_waits_before_it_out_of_the_queue() {
    on_paused_time(async {
        let scripts = vec![vec![Act::Frame(0, welcome(false))]];
        let ill = Ill::new(Behaviour { scripts, ports: Ports::Silent, mute: true });
        let vm = ill.running(VmConfig::default()).await;
        let (paused, resumed, killed) = tokio::join!(vm.pause(), vm.resume(), async {
            tokio::time::sleep(SECOND).await;
            vm.kill().await
        });
        killed.unwrap();
        assert_eq!(paused.unwrap_err().kind(), &VmErrorKind::Interrupted);
        assert_eq!(resumed.unwrap_err().kind(), &VmErrorKind::Interrupted);
    });
}

#[test]
fn a_start_that_is_refused_ends_nothing_when_it_is_dropped() {
    on_paused_time(async {
        let ill = able();
        let vm = ill.running(VmConfig::default()).await;
        assert!(vm.start().now_or_never().is_none());
        assert!(vm.restore(&snapshot(), RestoreOptions::default()).now_or_never().is_none());
        tokio::time::sleep(SECOND).await;
        assert_eq!(vm.state(), VmState::Running);
    });
}
