//! An agent that sends what it likes.

use crate::{
    frames::{frame, script, welcome},
    machine::{Act, Behaviour, Ill, Ports, flood},
};
use bytes::Bytes;
use proptest::prelude::*;
use std::{
    future::Future,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};
use tokio::time::timeout;
use vm_guest_protocol::{DEFAULT_WINDOW, Frame, MAX_DATA, MAX_PAYLOAD, Started};
use vm_trait::{
    CreateDirOptions, ExecRequest, OutputOffsets, ProcessId, RemoveOptions, StopOptions, VmBackend,
    VmConfig, VmErrorKind, VmInstance, VmResult, VmState, WriteOptions,
};

/// Longer than any deadline of the default configuration, and the exec's below.
const BOUND: Duration = Duration::from_secs(600);
/// What pipes and buffers between agent and client hold.
const SLACK: usize = 64 << 10;

pub(crate) fn on_paused_time<T>(work: impl Future<Output = T>) -> T {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_time().start_paused(true).build().unwrap().block_on(work)
}

/// Checks that an operation ends, and that it fails in a way that an agent can be to blame for.
async fn ends<T>(what: &str, operation: impl Future<Output = VmResult<T>>) {
    let Ok(outcome) = timeout(BOUND, operation).await else { panic!("{what} did not end") };
    if let Err(error) = outcome {
        assert!(
            !matches!(
                error.kind(),
                VmErrorKind::SnapshotCorrupt { .. }
                    | VmErrorKind::HostIo { .. }
                    | VmErrorKind::Interrupted
                    | VmErrorKind::ConnectRefused { .. }
            ),
            "{what}: {error}"
        );
    }
}

/// Runs programs and reads and writes files, all at once.
async fn use_it(vm: &Arc<dyn VmInstance>) {
    let exec = || ExecRequest::new("x").timeout(Duration::from_secs(20)).stdin(vec![7; 5000]);
    let spawned = async {
        let spawned = timeout(BOUND, vm.spawn(exec())).await.expect("spawn did not end");
        let Ok(process) = spawned else { return };
        // Nobody promises that an agent gives output; only that waiting for the end has one.
        let _ = timeout(Duration::from_secs(5), process.read_stdout()).await;
        ends("signal", process.signal(vm_trait::Signal::TERM)).await;
        ends("wait", process.wait()).await;
        let _ = process.offsets();
        ends("detach", process.detach()).await;
    };
    let files = async {
        ends("read_file", vm.read_file("/a")).await;
        ends(
            "write_file",
            vm.write_file("/a", Bytes::from(vec![1; 600_000]), WriteOptions::default()),
        )
        .await;
        ends("list_dir", vm.list_dir("/")).await;
    };
    let names = async {
        ends("stat", vm.stat("/a")).await;
        ends("create_dir", vm.create_dir("/d", CreateDirOptions::default())).await;
        ends("remove", vm.remove("/d", RemoveOptions::default())).await;
        ends("rename", vm.rename("/a", "/b")).await;
    };
    let others = async {
        ends("ping", vm.ping()).await;
        ends("processes", vm.processes()).await;
        ends("metrics", vm.metrics()).await;
        ends("attach", vm.attach_process(ProcessId(3), OutputOffsets::default())).await;
    };
    let pauses = async {
        tokio::time::sleep(Duration::from_secs(3)).await;
        ends("pause", vm.pause()).await;
        ends("resume", vm.resume()).await;
    };
    tokio::join!(ends("exec", vm.exec(exec())), spawned, files, names, others, pauses);
}

fn behaviour(scripts: Vec<Vec<Act>>) -> Behaviour {
    Behaviour { scripts, ports: Ports::Silent, mute: false }
}

/// Starts a machine, or gives `None` where its agent lets it not come up.
async fn start(ill: &Arc<Ill>) -> Option<Arc<dyn VmInstance>> {
    let vm = ill.backend().create(VmConfig::default()).await.expect("create");
    match timeout(BOUND, vm.start()).await.expect("start did not end") {
        Ok(()) => Some(vm),
        Err(error) => {
            assert!(matches!(error.kind(), VmErrorKind::BootFailed { .. }), "{error}");
            assert!(matches!(vm.state(), VmState::Crashed(_)), "{}", vm.state());
            None
        }
    }
}

/// Checks that the machine can be ended, whatever its agent does.
async fn can_be_ended(vm: &Arc<dyn VmInstance>, by_force: bool) {
    if by_force {
        timeout(Duration::from_secs(1), vm.kill()).await.expect("kill did not end").expect("kill");
    } else {
        let grace = StopOptions::default().with_grace(Duration::from_secs(3));
        timeout(Duration::from_secs(5), vm.stop(grace))
            .await
            .expect("stop did not end")
            .expect("stop");
    }
    assert_eq!(vm.state(), VmState::Stopped);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn every_operation_ends(scripts in prop::collection::vec(script(), 1..5), by_force in any::<bool>()) {
        on_paused_time(async {
            let ill = Ill::new(behaviour(scripts));
            let Some(vm) = start(&ill).await else { return };
            use_it(&vm).await;
            can_be_ended(&vm, by_force).await;
        });
    }

    #[test]
    fn answers_to_real_requests_in_any_order(frames in prop::collection::vec((1_u32..8, frame()), 1..40)) {
        // It waits for requests, so that the frames meet streams that are open.
        let acts = std::iter::once(Act::Frame(0, welcome(false)))
            .chain(std::iter::once(Act::Listen))
            .chain(frames.into_iter().map(|(stream, frame)| Act::Frame(stream, frame)));
        on_paused_time(async {
            let ill = Ill::new(behaviour(vec![acts.collect()]));
            let Some(vm) = start(&ill).await else { return };
            use_it(&vm).await;
            can_be_ended(&vm, true).await;
        });
    }

    #[test]
    fn output_that_nobody_reads_is_bounded(length in 1_usize..MAX_DATA) {
        let started = Started { process: 1, pid: 1, stdout: 0, stderr: 0, tty: false, stdin: 0 };
        let script = vec![
            Act::Frame(0, welcome(false)),
            Act::Listen,
            Act::Frame(1, Frame::Started(started)),
            Act::Flood(1, vec![9; length]),
        ];
        on_paused_time(async {
            let ill = Ill::new(behaviour(vec![script]));
            let vm = start(&ill).await.expect("it comes up");
            let process = vm.spawn(ExecRequest::new("x")).await;
            tokio::time::sleep(Duration::from_secs(20)).await;
            let taken = ill.most_taken.load(Ordering::Relaxed);
            let data = DEFAULT_WINDOW as usize + MAX_DATA + SLACK;
            let header = flood(1, 0, &vec![0; length]).len() - length;
            let most = data + data.div_ceil(length) * header;
            assert!(taken <= most, "{taken} bytes were taken, at most {most} are to be");
            drop(process);
            can_be_ended(&vm, true).await;
        });
    }
}

#[test]
fn an_agent_that_ends_every_connection_is_not_dialled_ever_faster() {
    let moment = Act::Wait(Duration::from_millis(1));
    let breach = vec![Act::Frame(0, welcome(false)), moment, Act::Bytes(vec![0xff; 64])];
    on_paused_time(async {
        let ill = Ill::new(behaviour(vec![breach]));
        let Some(vm) = start(&ill).await else { panic!("it comes up") };
        tokio::time::sleep(Duration::from_secs(10)).await;
        let dials = ill.dials.load(Ordering::Relaxed);
        assert!(dials < 200, "{dials} dials in ten seconds");
        ends("ping", vm.ping()).await;
        can_be_ended(&vm, true).await;
    });
}

#[test]
fn a_frame_that_is_too_long_is_not_waited_for() {
    // A header that announces more than any frame may have, and then bytes without end.
    let mut bytes = u32::MAX.to_le_bytes().to_vec();
    bytes.resize(2 * MAX_PAYLOAD, 1);
    let script = vec![Act::Frame(0, welcome(false)), Act::Listen, Act::Bytes(bytes)];
    on_paused_time(async {
        let ill = Ill::new(behaviour(vec![script]));
        let vm = start(&ill).await.expect("it comes up");
        ends("ping", vm.ping()).await;
        let taken = ill.most_taken.load(Ordering::Relaxed);
        assert!(taken < MAX_PAYLOAD, "{taken} bytes were taken");
        can_be_ended(&vm, true).await;
    });
}
