//! Snapshots of machines whose state is nothing, and what the core keeps of them.

use crate::{
    frames::welcome,
    hostile_agent::on_paused_time,
    machine::{Act, Ill, Ports},
    scripted_agent::{SECOND, answers},
};
use std::{fs, path::Path, sync::Arc};
use tempfile::{TempDir, tempdir};
use vm_core::{container::MAX_CHAIN, machine::Generation};
use vm_guest_protocol::{Frame, Reply};
use vm_trait::{
    RestoreOptions, Snapshot, SnapshotOptions, VmBackend, VmConfig, VmErrorKind, VmInstance,
    VmResult,
};

/// Gives the directory of snapshots, its backend, and a machine of it that runs.
async fn running(script: Vec<Act>) -> (TempDir, Arc<dyn VmBackend>, Arc<dyn VmInstance>) {
    let dir = tempdir().expect("a directory");
    let backend = Ill::playing(vec![script], Ports::Silent).backend_in(dir.path());
    let vm = backend.create(VmConfig::default()).await.expect("create");
    vm.start().await.expect("it comes up");
    (dir, Arc::new(backend), vm)
}

async fn on_top(vm: &dyn VmInstance, base: &Snapshot) -> VmResult<Snapshot> {
    vm.snapshot(SnapshotOptions::default().on_base(base)).await
}

fn is_refused(outcome: VmResult<Snapshot>) -> bool {
    matches!(
        outcome.unwrap_err().kind(),
        VmErrorKind::InvalidConfig { field, .. } if field == "base"
    )
}

fn files(dir: &Path) -> usize {
    fs::read_dir(dir).expect("the directory").count()
}

#[test]
fn the_time_between_a_restore_and_the_resume_counts_as_paused() {
    on_paused_time(async {
        let script = answers(vec![vec![Frame::Done(Reply::Processes(Vec::new()))]]);
        let (_dir, backend, vm) = running(script).await;
        let snapshot = vm.snapshot(SnapshotOptions::default()).await.unwrap();
        let restored = backend.restore(&snapshot, RestoreOptions::paused()).await.unwrap();
        tokio::time::sleep(SECOND * 3).await;
        restored.resume().await.unwrap();
        tokio::time::sleep(SECOND * 2).await;
        let paused = restored.metrics().await.unwrap().paused.unwrap();
        assert!((SECOND * 3..SECOND * 4).contains(&paused), "{paused:?}");
    });
}

#[test]
fn as_many_tracked_snapshots_as_promised_can_be_built_on() {
    on_paused_time(async {
        let (_dir, _backend, vm) = running(vec![Act::Frame(0, welcome(false))]).await;
        let mut taken = Vec::new();
        for _ in 0..=Generation::KEPT {
            taken.push(vm.snapshot(SnapshotOptions::default().tracked()).await.unwrap());
        }
        assert!(is_refused(on_top(&*vm, &taken[0]).await), "the oldest is not known any more");
        on_top(&*vm, &taken[1]).await.expect("the oldest that is known");
    });
}

#[test]
fn a_chain_grows_up_to_its_bound() {
    on_paused_time(async {
        let (_dir, _backend, vm) = running(vec![Act::Frame(0, welcome(false))]).await;
        let mut last = vm.snapshot(SnapshotOptions::default().tracked()).await.unwrap();
        for _ in 1..MAX_CHAIN {
            last = on_top(&*vm, &last).await.expect("room in the chain");
        }
        assert!(is_refused(on_top(&*vm, &last).await));
    });
}

#[test]
fn an_export_leaves_no_file_behind() {
    on_paused_time(async {
        let (dir, backend, vm) = running(vec![Act::Frame(0, welcome(false))]).await;
        let base = vm.snapshot(SnapshotOptions::default().tracked()).await.unwrap();
        let top = on_top(&*vm, &base).await.unwrap();
        assert_eq!(files(dir.path()), 2);
        backend.export_snapshot(&top).await.unwrap();
        assert_eq!(files(dir.path()), 2);
    });
}
