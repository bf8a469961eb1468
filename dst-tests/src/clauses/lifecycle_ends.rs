//! Ends that nobody asked for, and waiting for the end.

use super::probe::{
    LONG, SOON, Stage, Vm, begun, crash, millis, order, script, spawn_sh, truthful, until_settled,
    until_state, works,
};
use crate::{
    clause,
    clause::{Broken, Clause, Verdict},
    context::{Context, Task},
    ensure, ensure_eq, ensure_err,
};
use futures_util::future::join_all;
use std::{sync::Arc, time::Duration};
use vm_core::fault::{FaultKind, FaultOrder};
use vm_trait::{
    Capability, CrashReason, Operation, StopOptions, VmErrorKind, VmExit, VmInstanceExt, VmResult,
    VmState,
};

/// The clauses on ends.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(power_off, "lifecycle.power_off_is_seen",
        "a guest that powers off makes the machine Stopped, without a call", [Exec, GuestKernel], faults: []),
    clause!(panic_is_seen, "lifecycle.panic_is_seen",
        "a guest panic makes the machine Crashed, without a call", [Exec, GuestKernel], faults: []),
    clause!(panic_fault, "lifecycle.panic_fails_what_is_under_way",
        "a guest panic fails what is under way with GuestCrashed and its reason",
        [Exec], faults: [GuestPanic]),
    clause!(vmm_death, "lifecycle.vmm_death_is_seen",
        "the death of the VMM makes the machine Crashed without a call, and fails what is under way with VmmCrashed",
        [Exec], faults: [VmmKilled]),
    clause!(vmm_death_any_time, "lifecycle.vmm_death_at_any_moment",
        "the VMM may die at any moment of a boot, an exec, a pause or a stop: the call ends, and the state is true",
        [Exec], faults: [VmmKilled]),
    clause!(host_loss, "lifecycle.host_loss_is_seen",
        "when the host is lost every machine on it is Crashed, and they start again",
        [Exec], faults: [HostLost]),
    clause!(wait_wakes_all, "lifecycle.wait_wakes_all",
        "wait wakes every waiter with the reason of the end", [Exec], faults: []),
    clause!(wait_after_end, "lifecycle.wait_after_the_end",
        "wait of a machine that has ended answers at once and keeps its answer", [], faults: []),
    clause!(wait_in_created, "lifecycle.wait_in_created",
        "wait in Created waits for a life to begin and end", [], faults: []),
    clause!(wait_is_cancellable, "lifecycle.wait_outlasts_a_restart",
        "each wait answers with the end of the life it was called in", [Exec], faults: []),
    clause!(start_after_crash, "lifecycle.start_after_crash",
        "a machine that crashed starts again as often as it crashes", [Exec], faults: [VmmKilled]),
];

async fn power_off(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let running = spawn_sh(&vm, "sleep 1000").await?;
    let outcome = vm.spawn(script("sleep 0.02; poweroff -f")).await?.detach().await;
    drop(outcome);
    until_state(ctx, &vm, VmState::Stopped).await?;
    ensure_eq!(vm.wait().await, VmExit::PoweredOff, "what wait gives");
    ensure_err!(
        ctx.within(SOON, "a wait for a program of a guest that powered off", running.wait())
            .await?,
        VmErrorKind::Disconnected | VmErrorKind::Interrupted | VmErrorKind::GuestCrashed { .. },
        "a program of a guest that powered off"
    );
    truthful(ctx, &vm, "after the guest powered off").await
}

async fn panic_is_seen(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    vm.spawn(script("sleep 0.02; echo c > /proc/sysrq-trigger")).await?.detach().await.ok();
    until_state(ctx, &vm, VmState::Crashed(CrashReason::GuestPanic)).await?;
    ensure_eq!(vm.wait().await, VmExit::Crashed(CrashReason::GuestPanic), "what wait gives");
    truthful(ctx, &vm, "after a panic").await
}

async fn panic_fault(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let outcomes = under_way(ctx, &vm, FaultKind::GuestPanic).await?;
    for outcome in outcomes {
        ensure_err!(
            outcome,
            VmErrorKind::GuestCrashed { reason: CrashReason::GuestPanic },
            "an operation that a panic cut short"
        );
    }
    ensure_eq!(vm.state(), VmState::Crashed(CrashReason::GuestPanic), "the state afterwards");
    truthful(ctx, &vm, "after a panic").await
}

async fn vmm_death(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let outcomes = under_way(ctx, &vm, FaultKind::VmmKilled).await?;
    for outcome in outcomes {
        ensure_err!(
            outcome,
            VmErrorKind::VmmCrashed { .. },
            "an operation that the VMM's death cut short"
        );
    }
    ensure_eq!(vm.state(), VmState::Crashed(CrashReason::VmmDied), "the state afterwards");
    truthful(ctx, &vm, "after the VMM's death").await
}

async fn vmm_death_any_time(ctx: &Context) -> Verdict {
    let mut choices = vec![Operation::Start, Operation::Exec, Operation::Stop];
    if ctx.has(Capability::Pause) {
        choices.push(Operation::Pause);
    }
    let amid = ctx.pick(&choices);
    let vm = ctx.created().await?;
    let begun = ctx.now();
    vm.start().await?;
    let boot = ctx.now() - begun;
    let most = match amid {
        Operation::Start => {
            vm.kill().await?;
            boot
        }
        _ => Duration::from_millis(100),
    };
    let most = u64::try_from(most.as_micros()).unwrap_or(u64::MAX).max(1);
    let delay = Duration::from_micros(ctx.draw(1, most));
    let ordered =
        order(ctx, FaultOrder::next(FaultKind::VmmKilled).on(vm.id()).with_amount(delay))?;
    let called = async {
        match amid {
            Operation::Start => vm.start().await,
            Operation::Exec => vm.sh("sleep 1000").await.map(drop),
            Operation::Pause => loop {
                if let Err(error) = vm.pause().await {
                    break Err(error);
                }
                if let Err(error) = vm.resume().await {
                    break Err(error);
                }
                ctx.sleep(millis(ctx, 0, 5)).await;
            },
            _ => {
                let stubborn = "trap '' TERM; while :; do sleep 0.02; done";
                spawn_sh(&vm, stubborn).await?.detach().await?;
                vm.stop(StopOptions::default().with_grace(millis(ctx, 0, 200))).await
            }
        }
    };
    let outcome = ctx.within(LONG, amid.name(), called).await?;
    if outcome.is_ok() {
        // No two boots take the same time.
        ctx.sleep(delay).await;
    }
    if !ordered.fired(ctx) && outcome.is_ok() {
        // There was no machine when it was due.
        return Ok(());
    }
    ordered.must_have_fired(ctx)?;
    ctx.within(SOON, "the end of a machine whose VMM died", vm.wait()).await?;
    let state = vm.state();
    let true_one = match amid {
        Operation::Stop => state.is_ended(),
        Operation::Start => {
            matches!(state, VmState::Crashed(CrashReason::VmmDied | CrashReason::BootFailed))
        }
        _ => state == VmState::Crashed(CrashReason::VmmDied),
    };
    ensure!(true_one, "the VMM died amid {amid}, and the machine is {state}");
    truthful(ctx, &vm, &format!("after the VMM's death amid {amid}")).await
}

/// Has several operations under way when a fault strikes, and gives what came of them.
async fn under_way(ctx: &Context, vm: &Vm, kind: FaultKind) -> Result<Vec<VmResult<()>>, Broken> {
    let count = ctx.draw(1, 6);
    let operations = (0..count).map(|n| {
        let vm = Arc::clone(vm);
        async move {
            if n % 2 == 0 {
                vm.sh("sleep 1000").await.map(drop)
            } else {
                spawn_sh(&vm, "sleep 1000").await?.wait().await.map(drop)
            }
        }
    });
    let tasks = begun(ctx, operations).await?;
    ctx.sleep(millis(ctx, 50, 150)).await;
    let ordered = order(ctx, FaultOrder::next(kind).on(vm.id()))?;
    let joined = join_all(tasks.into_iter().map(Task::join));
    let outcomes = ctx.within(SOON, "operations on a machine that died", joined).await?;
    ordered.must_have_fired(ctx)?;
    until_settled(ctx, vm).await?;
    outcomes.into_iter().collect()
}

async fn host_loss(ctx: &Context) -> Verdict {
    let stages = [Stage::Created, Stage::Running, Stage::Stopped];
    let mut vms = Vec::new();
    for _ in 0..ctx.draw(1, 3) {
        let stage = ctx.pick(&stages);
        vms.push((stage, stage.reach(ctx).await?));
    }
    let running = ctx.running().await?;
    let ordered = order(ctx, FaultOrder::next(FaultKind::HostLost))?;
    until_state(ctx, &running, VmState::Crashed(CrashReason::HostLost)).await?;
    ordered.must_have_fired(ctx)?;
    for (stage, vm) in vms {
        match stage {
            Stage::Running => {
                until_state(ctx, &vm, VmState::Crashed(CrashReason::HostLost)).await?;
            }
            _ => ensure!(stage.holds(&vm.state()), "{stage:?} became {}", vm.state()),
        }
        vm.start().await?;
        works(ctx, &vm, "after the host was lost").await?;
    }
    truthful(ctx, &running, "after the host was lost").await
}

async fn wait_wakes_all(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let waiters: Vec<_> = (0..ctx.draw(2, 12))
        .map(|_| {
            let vm = Arc::clone(&vm);
            ctx.spawn(async move { vm.wait().await })
        })
        .collect();
    ctx.sleep(millis(ctx, 0, 50)).await;
    let crashes = Stage::reachable(ctx).contains(&Stage::Crashed);
    if crashes && ctx.one_in(2) {
        crash(ctx, &vm).await?;
    } else if ctx.one_in(2) {
        vm.kill().await?;
    } else {
        vm.stop(StopOptions::default().with_grace(millis(ctx, 0, 50))).await?;
    }
    let expected = match vm.state() {
        VmState::Crashed(reason) => VmExit::Crashed(reason),
        _ => VmExit::Stopped,
    };
    let joined = join_all(waiters.into_iter().map(Task::join));
    for exit in ctx.within(SOON, "waiters of a machine that ended", joined).await? {
        ensure_eq!(exit?, expected, "what a waiter gets");
    }
    Ok(())
}

async fn wait_after_end(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    vm.kill().await?;
    for _ in 0..ctx.draw(1, 4) {
        let exit = ctx.within(SOON, "wait of an ended machine", vm.wait()).await?;
        ensure_eq!(exit, VmExit::Stopped, "what wait gives");
        if ctx.one_in(2) {
            vm.stop(StopOptions::default()).await?;
        }
    }
    Ok(())
}

async fn wait_in_created(ctx: &Context) -> Verdict {
    let vm = ctx.created().await?;
    let waiter = {
        let vm = Arc::clone(&vm);
        ctx.spawn(async move {
            let exit = vm.wait().await;
            (exit, vm.state())
        })
    };
    // An end without a life wakes nobody.
    vm.kill().await?;
    ctx.sleep(millis(ctx, 0, 50)).await;
    vm.start().await?;
    ctx.sleep(millis(ctx, 0, 50)).await;
    vm.kill().await?;
    let (exit, state) = ctx.within(SOON, "a wait that began in Created", waiter.join()).await??;
    ensure_eq!(exit, VmExit::Stopped, "what wait gives");
    ensure_eq!(state, VmState::Stopped, "the state when wait returns");
    Ok(())
}

async fn wait_is_cancellable(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    for _ in 0..ctx.draw(1, 3) {
        let waiter = {
            let vm = Arc::clone(&vm);
            ctx.spawn(async move { vm.wait().await })
        };
        ctx.sleep(millis(ctx, 1, 20)).await;
        vm.kill().await?;
        vm.start().await?;
        let exit = ctx.within(SOON, "a wait over a restart", waiter.join()).await??;
        ensure_eq!(exit, VmExit::Stopped, "the end of the life that wait was called in");
    }
    works(ctx, &vm, "after restarts").await
}

async fn start_after_crash(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    for _ in 0..ctx.draw(1, 4) {
        let ordered = order(ctx, FaultOrder::next(FaultKind::VmmKilled).on(vm.id()))?;
        until_state(ctx, &vm, VmState::Crashed(CrashReason::VmmDied)).await?;
        ordered.must_have_fired(ctx)?;
        ensure_err!(
            vm.sh("true").await,
            VmErrorKind::InvalidState { state: VmState::Crashed(CrashReason::VmmDied) },
            "exec on a crashed machine"
        );
        ctx.within(LONG, "a start after a crash", vm.start()).await??;
        works(ctx, &vm, "after a crash").await?;
    }
    Ok(())
}
