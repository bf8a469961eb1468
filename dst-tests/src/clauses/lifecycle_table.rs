//! The state table: every operation in every lasting state.

use super::probe::{Stage, Vm, millis, order, truthful};
use crate::{
    clause,
    clause::{Broken, Clause, Verdict},
    context::Context,
    ensure, ensure_eq, ensure_err,
};
use std::time::Duration;
use vm_core::fault::{FaultKind, FaultOrder};
use vm_trait::{
    Capability, CreateDirOptions, ExecRequest, ForkOptions, Operation, OutputOffsets, ProcessId,
    RemoveOptions, RestoreOptions, Snapshot, SnapshotOptions, StopOptions, VmErrorKind,
    VmInstanceExt, VmResult, VmState,
};

/// The clauses on the state table.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(state_table, "lifecycle.state_table",
        "every operation is carried out in the states that the table names, and leads where it says",
        [Exec, Files], faults: []),
    clause!(refusals_change_nothing, "lifecycle.refusals_change_nothing",
        "an operation out of place gets InvalidState with the state, and changes nothing",
        [Exec, Files], faults: []),
    clause!(random_walks, "lifecycle.random_walks",
        "any sequence of operations leads through the states of the table", [Exec, Files], faults: []),
    clause!(restore_in_table, "lifecycle.restore_in_table",
        "restore in place is carried out in Created, Stopped and Crashed alone, and ends Paused or Running as asked",
        [Exec, Files, Snapshot, RestoreInPlace], faults: []),
    clause!(crash_of_paused, "lifecycle.crash_of_paused",
        "a machine that dies while it is paused is Crashed, and starts again",
        [Exec, Pause], faults: [VmmKilled]),
];

/// The operations on a machine that need neither a snapshot nor a wait.
const OPERATIONS: &[Operation] = &[
    Operation::Start,
    Operation::Stop,
    Operation::Kill,
    Operation::Pause,
    Operation::Resume,
    Operation::Ping,
    Operation::Exec,
    Operation::Spawn,
    Operation::AttachProcess,
    Operation::Processes,
    Operation::ReadFile,
    Operation::WriteFile,
    Operation::Stat,
    Operation::ListDir,
    Operation::CreateDir,
    Operation::Remove,
    Operation::Rename,
    Operation::Connect,
    Operation::Listen,
    Operation::Snapshot,
    Operation::Fork,
    Operation::Inspect,
    Operation::Metrics,
];

/// Lists the operations of the table that the backend can do.
pub(super) fn operations(ctx: &Context) -> Vec<Operation> {
    let able = |operation: &Operation| match operation {
        Operation::Pause | Operation::Resume => ctx.has(Capability::Pause),
        Operation::Snapshot => ctx.has(Capability::Snapshot),
        Operation::Fork => ctx.has(Capability::Fork),
        Operation::Inspect => ctx.has(Capability::Inspect),
        Operation::Connect | Operation::Listen => ctx.has(Capability::Vsock),
        _ => true,
    };
    OPERATIONS.iter().copied().filter(able).collect()
}

/// Carries out one operation with plausible arguments, on things of its own.
pub(super) async fn attempt(ctx: &Context, vm: &Vm, operation: Operation) -> VmResult<()> {
    let path = format!("{}/table-{:x}", ctx.scratch(&**vm), ctx.draw(0, u64::MAX));
    match operation {
        Operation::Start => vm.start().await,
        Operation::Stop => vm.stop(StopOptions::default().with_grace(millis(ctx, 0, 50))).await,
        Operation::Kill => vm.kill().await,
        Operation::Pause => vm.pause().await,
        Operation::Resume => vm.resume().await,
        Operation::Ping => vm.ping().await.map(drop),
        Operation::Exec => {
            // A program that never gets on must not keep the caller for ever.
            let limit = Duration::from_millis(300);
            vm.exec(ExecRequest::new("echo").arg("x").timeout(limit)).await.map(drop)
        }
        Operation::Spawn => vm.spawn(ExecRequest::new("sleep").arg("1000")).await.map(drop),
        Operation::AttachProcess => {
            let nobody = ProcessId(u64::MAX - ctx.draw(0, 1000));
            vm.attach_process(nobody, OutputOffsets::default()).await.map(drop)
        }
        Operation::Processes => vm.processes().await.map(drop),
        Operation::ReadFile => vm.read_file("/dev/null").await.map(drop),
        Operation::WriteFile => vm.write(&path, ctx.bytes(10)).await,
        Operation::Stat => vm.stat("/").await.map(drop),
        Operation::ListDir => vm.list_dir("/").await.map(drop),
        Operation::CreateDir => vm.create_dir(&path, CreateDirOptions::default()).await,
        Operation::Remove => vm.remove(&path, RemoveOptions::default()).await,
        Operation::Rename => vm.rename(&path, &format!("{path}-new")).await,
        // Nothing listens there.
        Operation::Connect => vm.connect(super::guest_streams::port(ctx)).await.map(drop),
        Operation::Listen => vm.listen(super::guest_streams::port(ctx)).await.map(drop),
        Operation::Snapshot => {
            let snapshot = vm.snapshot(SnapshotOptions::default()).await?;
            ctx.backend().delete_snapshot(&snapshot).await
        }
        Operation::Fork => {
            for child in vm.fork(ForkOptions::new(1)).await? {
                child?.kill().await?;
            }
            Ok(())
        }
        Operation::Inspect => vm.inspect().await.map(drop),
        _ => vm.metrics().await.map(drop),
    }
}

/// Says whether an operation was let in: it was carried out, or failed for want of what it was given.
fn admitted(outcome: &VmResult<()>) -> bool {
    outcome.as_ref().err().is_none_or(|error| {
        matches!(
            error.kind(),
            VmErrorKind::GuestFile { .. }
                | VmErrorKind::ExecFailed { .. }
                | VmErrorKind::ConnectRefused { .. }
        )
    })
}

/// Carries out an operation and checks what came of it against the table; gives the stage afterwards.
async fn step(ctx: &Context, vm: &Vm, stage: Stage, operation: Operation) -> Result<Stage, Broken> {
    let before = vm.state();
    let outcome = attempt(ctx, vm, operation).await;
    let expected = if stage.allows(operation) {
        ensure!(admitted(&outcome), "{operation} in {stage:?}: {outcome:?}");
        stage.after(operation)
    } else {
        ensure_err!(
            outcome,
            VmErrorKind::InvalidState { state } if *state == before,
            "{operation} in {stage:?}"
        );
        ensure_eq!(vm.state(), before, "the state after a refused {operation}");
        stage
    };
    ensure!(expected.holds(&vm.state()), "after {operation} in {stage:?}: {}", vm.state());
    Ok(expected)
}

async fn state_table(ctx: &Context) -> Verdict {
    let stage = ctx.pick(&Stage::reachable(ctx));
    let allowed: Vec<_> =
        operations(ctx).into_iter().filter(|operation| stage.allows(*operation)).collect();
    let vm = stage.reach(ctx).await?;
    step(ctx, &vm, stage, ctx.pick(&allowed)).await?;
    truthful(ctx, &vm, "after an operation of the table").await
}

async fn refusals_change_nothing(ctx: &Context) -> Verdict {
    let stage = ctx.pick(&Stage::reachable(ctx));
    let vm = stage.reach(ctx).await?;
    for operation in operations(ctx) {
        if !stage.allows(operation) {
            step(ctx, &vm, stage, operation).await?;
        }
    }
    truthful(ctx, &vm, "after refusals").await
}

async fn random_walks(ctx: &Context) -> Verdict {
    let operations = operations(ctx);
    // Half of the steps change the state, or the walk would stay where programs run.
    let moves: Vec<_> = operations
        .iter()
        .copied()
        .filter(|operation| {
            matches!(
                operation,
                Operation::Start
                    | Operation::Stop
                    | Operation::Kill
                    | Operation::Pause
                    | Operation::Resume
            )
        })
        .collect();
    let vm = ctx.created().await?;
    let mut stage = Stage::Created;
    for _ in 0..ctx.draw(4, 16) {
        let operation = ctx.pick(if ctx.one_in(2) { &moves } else { &operations });
        stage = step(ctx, &vm, stage, operation).await?;
    }
    truthful(ctx, &vm, "after a walk").await
}

async fn restore_in_table(ctx: &Context) -> Verdict {
    let source = ctx.running().await?;
    let snapshot: Snapshot = source.snapshot(SnapshotOptions::default()).await?;
    source.kill().await?;
    let stage = ctx.pick(&Stage::reachable(ctx));
    let vm = stage.reach(ctx).await?;
    let before = vm.state();
    let resume = ctx.one_in(2);
    let options = if resume { RestoreOptions::running() } else { RestoreOptions::paused() };
    let outcome = vm.restore(&snapshot, options).await;
    if stage.allows(Operation::Restore) {
        outcome?;
        let expected = if resume { VmState::Running } else { VmState::Paused };
        ensure_eq!(vm.state(), expected, "the state after a restore out of {stage:?}");
    } else {
        ensure_err!(
            outcome,
            VmErrorKind::InvalidState { state } if *state == before,
            "restore in {stage:?}"
        );
        ensure_eq!(vm.state(), before, "the state after a refused restore");
    }
    truthful(ctx, &vm, "after a restore").await?;
    Ok(ctx.backend().delete_snapshot(&snapshot).await?)
}

async fn crash_of_paused(ctx: &Context) -> Verdict {
    let vm = Stage::Paused.reach(ctx).await?;
    let ordered = order(ctx, FaultOrder::next(FaultKind::VmmKilled).on(vm.id()))?;
    super::probe::until_state(ctx, &vm, VmState::Crashed(vm_trait::CrashReason::VmmDied)).await?;
    ordered.must_have_fired(ctx)?;
    truthful(ctx, &vm, "after a crash while paused").await
}
