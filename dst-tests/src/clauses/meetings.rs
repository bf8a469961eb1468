//! One operation and one thing that happens meanwhile: a fault, a start, a stop.

use super::{
    lifecycle_table::{attempt, operations},
    probe::{
        LONG, Stage, Vm, made, millis, order, read_until, spawn_sh, truthful, until_settled,
        until_state, works,
    },
};
use crate::{
    clause,
    clause::{Clause, Verdict},
    context::Context,
    ensure, ensure_eq,
};
use std::time::Duration;
use vm_core::{
    env::timeout,
    fault::{FaultKind, FaultOrder},
};
use vm_trait::{
    Capability, Operation, RestoreOptions, Snapshot, SnapshotOptions, StopOptions, VmErrorKind,
    VmResult, VmState,
};

/// The clauses on what meets.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(fault_amid, "chaos.fault_amid_one_operation",
        "whatever goes wrong amid one operation, it ends, the state is true, and the machine can be brought back",
        [Exec, Files], faults: [VmmKilled]),
    clause!(link_amid, "chaos.link_fault_amid_one_operation",
        "trouble of the link amid one operation is not seen by its caller",
        [Exec, Files], faults: [LinkDisconnect, LinkStall, LinkShort, LinkDelayedAccept]),
    clause!(passing, "chaos.called_in_passing_states",
        "an operation that is called while the machine starts or stops ends, and the state is true afterwards",
        [Exec, Files], faults: [BootSlow]),
    clause!(waits, "chaos.waits_in_every_state",
        "wait and wait_ready answer as the state is, in every state", [Exec], faults: []),
    clause!(restore_amid, "chaos.fault_amid_a_restore",
        "a restore in place that meets a fault leaves a truthful state, whatever the state was before",
        [Exec, Files, Snapshot, RestoreInPlace], faults: [BitRot, LoadFail, LoadSlow, VersionSkew, CreateExhausted]),
];

/// How long a wait is waited for that may have no end.
const A_WHILE: Duration = Duration::from_millis(50);

/// Carries out an operation, of a wait only the beginning.
async fn call(ctx: &Context, vm: &Vm, operation: Operation) -> VmResult<()> {
    match operation {
        Operation::Wait => {
            let _ = timeout(&**ctx.env(), A_WHILE, vm.wait()).await;
            Ok(())
        }
        Operation::WaitReady => vm.wait_ready(A_WHILE).await,
        operation => attempt(ctx, vm, operation).await,
    }
}

/// Lists the operations that the guest answers.
fn of_the_guest(ctx: &Context) -> Vec<Operation> {
    operations(ctx).into_iter().filter(|operation| operation.needs_guest()).collect()
}

async fn fault_amid(ctx: &Context) -> Verdict {
    const FROM_OUTSIDE: [FaultKind; 2] = [FaultKind::VmmKilled, FaultKind::HostLost];
    const OF_GUESTS: [FaultKind; 2] = [FaultKind::GuestPanic, FaultKind::GuestOom];
    const OF_CLOCKS: [FaultKind; 2] = [FaultKind::ClockForward, FaultKind::ClockBack];
    let paused = ctx.has(Capability::Pause) && ctx.one_in(4);
    let idle = ctx.one_in(8);
    let mut kinds = FROM_OUTSIDE.to_vec();
    let mut choices = vec![Operation::Wait, Operation::Snapshot, Operation::Fork];
    if !paused {
        kinds.extend(OF_GUESTS);
        choices.extend(of_the_guest(ctx));
        choices.push(Operation::Stop);
        if idle {
            kinds.extend(OF_CLOCKS);
        }
    }
    kinds.retain(|kind| ctx.can_fault(*kind));
    choices.retain(|it| {
        matches!(it, Operation::Wait | Operation::Stop) || operations(ctx).contains(it)
    });
    let (kind, operation) = (ctx.pick(&kinds), ctx.pick(&choices));
    let vm = ctx.running_alone().await?;
    if paused {
        vm.pause().await?;
    }
    let after = match OF_CLOCKS.contains(&kind) {
        true => Duration::from_secs(ctx.draw(10, 10_000)),
        // At once, it meets what takes no time on the machine's clock.
        false if ctx.one_in(3) => Duration::ZERO,
        false => Duration::from_micros(ctx.draw(0, 1_500)),
    };
    let ordered = order(ctx, FaultOrder::next(kind).on(vm.id()).with_amount(after))?;
    if !idle {
        // How it ends does not matter, as long as it does.
        let _ = ctx.within(LONG, operation.name(), call(ctx, &vm, operation)).await?;
    }
    ctx.sleep(Duration::from_millis(20)).await;
    if !ordered.fired(ctx) {
        // The machine had ended before it was due.
        return Ok(());
    }
    if FROM_OUTSIDE.contains(&kind) {
        // On a real host that is heard of a little later.
        ctx.within(LONG, "the end of a machine that was killed", vm.wait()).await?;
    }
    truthful(ctx, &vm, &format!("after {kind} amid {operation}")).await
}

async fn link_amid(ctx: &Context) -> Verdict {
    let vm = ctx.running_alone().await?;
    for _ in 0..ctx.draw(2, 4) {
        let kind = ctx.pick(&[
            FaultKind::LinkDisconnect,
            FaultKind::LinkStall,
            FaultKind::LinkShort,
            FaultKind::LinkDelayedAccept,
        ]);
        let wanted = FaultOrder::next(kind).on(vm.id()).with_amount(millis(ctx, 5, 200));
        let ordered = order(ctx, wanted)?;
        if kind == FaultKind::LinkDelayedAccept {
            ctx.fault(FaultOrder::next(FaultKind::LinkDisconnect).on(vm.id()))?;
        }
        let operation = ctx.pick(&of_the_guest(ctx));
        let outcome = ctx.within(LONG, operation.name(), call(ctx, &vm, operation)).await?;
        if let Err(error) = outcome {
            let of_the_guest = matches!(
                error.kind(),
                VmErrorKind::GuestFile { .. } | VmErrorKind::ExecFailed { .. }
            );
            ensure!(of_the_guest, "{operation} saw {kind}: {error}");
        }
        works(ctx, &vm, &format!("after {kind} amid {operation}")).await?;
        ordered.must_have_fired(ctx)?;
    }
    Ok(())
}

/// Calls an operation in a state that passes. Of restores it needs a snapshot.
async fn call_in_passing(
    ctx: &Context,
    vm: &Vm,
    operation: Operation,
    snapshot: Option<&Snapshot>,
) -> Verdict {
    let called = async {
        match snapshot {
            Some(snapshot) => vm.restore(snapshot, RestoreOptions::running()).await,
            None => call(ctx, vm, operation).await,
        }
    };
    // How it ends depends on what it waited for.
    ctx.within(LONG, operation.name(), called).await.map(drop)
}

async fn passing(ctx: &Context) -> Verdict {
    let vm = ctx.running_alone().await?;
    let mut choices = operations(ctx);
    choices.extend([Operation::Wait, Operation::WaitReady]);
    let restores = ctx.has(Capability::Snapshot) && ctx.has(Capability::RestoreInPlace);
    if restores {
        choices.push(Operation::Restore);
    }
    let operation = ctx.pick(&choices);
    let snapshot = match operation {
        Operation::Restore => Some(vm.snapshot(SnapshotOptions::default()).await?),
        _ => None,
    };
    let passing = if ctx.one_in(2) { VmState::Starting } else { VmState::Stopping };
    let handle = vm.clone();
    let task = if passing == VmState::Starting {
        vm.kill().await?;
        let slow = FaultOrder::next(FaultKind::BootSlow).on(vm.id());
        ctx.fault(slow.with_amount(millis(ctx, 500, 2000)))?;
        ctx.spawn(async move { handle.start().await })
    } else {
        let process =
            spawn_sh(&vm, "trap '' TERM; echo ready; while :; do sleep 0.02; done").await?;
        read_until(&process, "ready").await?;
        let grace = millis(ctx, 200, 1000);
        ctx.spawn(async move { handle.stop(StopOptions::default().with_grace(grace)).await })
    };
    until_state(ctx, &vm, passing.clone()).await?;
    call_in_passing(ctx, &vm, operation, snapshot.as_ref()).await?;
    // A start may have been cut short.
    let _ = ctx.within(LONG, "what was under way", task.join()).await??;
    truthful(ctx, &vm, &format!("after {operation} in {passing}")).await?;
    if let Some(snapshot) = snapshot {
        ctx.backend().delete_snapshot(&snapshot).await?;
    }
    Ok(())
}

async fn waits(ctx: &Context) -> Verdict {
    let stage = ctx.pick(&Stage::reachable(ctx));
    let vm = stage.reach(ctx).await?;
    let ready = vm.wait_ready(A_WHILE).await;
    ensure_eq!(ready.is_ok(), stage == Stage::Running, "whether wait_ready succeeds");
    if let Err(error) = ready {
        let timed_out = matches!(error.kind(), VmErrorKind::Timeout { .. });
        ensure!(timed_out, "wait_ready in {stage:?}: {error}");
    }
    let waited = timeout(&**ctx.env(), A_WHILE, vm.wait()).await.is_ok();
    ensure_eq!(waited, matches!(stage, Stage::Stopped | Stage::Crashed), "whether wait answers");
    ensure!(stage.holds(&vm.state()), "after waits in {stage:?}: {}", vm.state());
    Ok(())
}

async fn restore_amid(ctx: &Context) -> Verdict {
    let source = ctx.running_alone().await?;
    let snapshot = source.snapshot(SnapshotOptions::default()).await?;
    drop(source);
    let vm = made(ctx, |_| {}).await?;
    let down = [Stage::Created, Stage::Stopped, Stage::Crashed];
    let reachable = Stage::reachable(ctx);
    let down: Vec<_> = down.into_iter().filter(|stage| reachable.contains(stage)).collect();
    let stage = ctx.pick(&down);
    stage.bring(ctx, &vm).await?;
    let kind = ctx.pick(&[
        FaultKind::BitRot,
        FaultKind::LoadFail,
        FaultKind::LoadSlow,
        FaultKind::VersionSkew,
        FaultKind::CreateExhausted,
    ]);
    let ordered =
        order(ctx, FaultOrder::next(kind).on(vm.id()).with_amount(millis(ctx, 500, 3000)))?;
    let restored = vm.restore(&snapshot, RestoreOptions::running()).await;
    ordered.must_have_fired(ctx)?;
    let slow = kind == FaultKind::LoadSlow;
    ensure_eq!(restored.is_ok(), slow, "whether a restore succeeds that meets a fault");
    until_settled(ctx, &vm).await?;
    truthful(ctx, &vm, &format!("after a restore in {stage:?} that met {kind}")).await?;
    Ok(ctx.backend().delete_snapshot(&snapshot).await?)
}
