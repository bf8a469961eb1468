//! What is left on the host: nothing.

use super::probe::{Stage, Ticker, Vm, boot_time, cut, disk, millis, script, spawn_sh, until};
use crate::{
    clause,
    clause::{Broken, Clause, Verdict},
    context::Context,
};
use std::{sync::Arc, time::Duration};
use vm_core::fault::{FaultKind, FaultOrder};
use vm_trait::{Capability, ForkOptions, RestoreOptions, SnapshotOptions, VmInstanceExt};

/// The clauses on leftovers.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(in_every_state, "leftovers.none_in_every_state",
        "a machine that is dropped in any state leaves nothing on the host", [Exec], faults: []),
    clause!(after_work, "leftovers.none_after_work",
        "a machine that is dropped amid programs, streams and files leaves nothing", [Exec, Files], faults: []),
    clause!(after_dropped_start, "leftovers.none_after_a_dropped_start",
        "a machine that is dropped while it boots leaves nothing", [Exec], faults: []),
    clause!(after_failures, "leftovers.none_after_failures",
        "failed boots leave nothing", [Exec], faults: [BootFail, BootPanic]),
    clause!(after_captures, "leftovers.none_after_captures",
        "snapshots, machines restored from them and forks leave nothing but the snapshots",
        [Exec, Snapshot], faults: []),
    clause!(after_dropped_captures, "leftovers.none_after_dropped_captures",
        "captures that are dropped half-way leave nothing", [Exec, Snapshot], faults: []),
    clause!(after_stop, "leftovers.none_after_stop",
        "a machine that was stopped leaves nothing, also before it is dropped", [Exec], faults: []),
    clause!(handles_do_not_hold, "leftovers.handles_of_processes_do_not_hold",
        "a process handle or event stream does not keep a machine alive", [Exec], faults: []),
    clause!(many_lives, "leftovers.none_after_many_lives",
        "many machines, one after the other and side by side, leave nothing", [Exec, Files], faults: []),
];

/// Checks that nothing is left, after as long as it takes to go.
pub(super) async fn nothing_left(ctx: &Context) -> Verdict {
    let outcome = until(ctx, "nothing is left on the host", || ctx.leftovers().is_empty()).await;
    outcome.map_err(|broken| Broken::new(format!("{broken}: {:?}", ctx.leftovers())))
}

async fn in_every_state(ctx: &Context) -> Verdict {
    let stage = ctx.pick(&Stage::reachable(ctx));
    drop(stage.reach(ctx).await?);
    nothing_left(ctx).await
}

async fn after_work(ctx: &Context) -> Verdict {
    let vm = if ctx.has(Capability::Disks) {
        let disk = disk(ctx, "/data");
        super::probe::started(ctx, |config| config.disks.push(disk)).await?
    } else {
        ctx.running().await?
    };
    let ticker = Ticker::begin(ctx, &vm).await?;
    let process = vm.spawn(script("cat").open_stdin()).await?;
    process.write_stdin(ctx.bytes(1000)).await?;
    let detached = spawn_sh(&vm, "sleep 1000").await?.detach().await?;
    let task = {
        let vm = Arc::clone(&vm);
        ctx.spawn(async move { vm.sh("sleep 0.1").await })
    };
    ctx.sleep(millis(ctx, 0, 60)).await;
    let _ = detached;
    drop((vm, ticker, process));
    drop(task.join().await?);
    nothing_left(ctx).await
}

async fn after_dropped_start(ctx: &Context) -> Verdict {
    let boot = boot_time(ctx).await?;
    let vm = ctx.created().await?;
    if ctx.can_fault(FaultKind::BootHang) && ctx.one_in(2) {
        ctx.fault(FaultOrder::next(FaultKind::BootHang).on(vm.id()))?;
    }
    cut(ctx, boot, vm.start()).await;
    drop(vm);
    nothing_left(ctx).await
}

async fn after_failures(ctx: &Context) -> Verdict {
    let vm = ctx.created().await?;
    for _ in 0..ctx.draw(1, 3) {
        let kind = ctx.pick(&[FaultKind::BootFail, FaultKind::BootPanic]);
        let ordered = super::probe::order(ctx, FaultOrder::next(kind).on(vm.id()))?;
        vm.start().await.err();
        ordered.must_have_fired(ctx)?;
    }
    if ctx.one_in(2) {
        // A crashed machine holds nothing either.
        nothing_left(ctx).await?;
    }
    drop(vm);
    nothing_left(ctx).await
}

/// Takes a snapshot, restores from it and forks, as drawn; gives what came of it.
async fn capture(ctx: &Context, vm: &Vm) -> Result<Vec<Vm>, Broken> {
    let snapshot = vm.snapshot(SnapshotOptions::default()).await?;
    let mut all = Vec::new();
    for _ in 0..ctx.draw(0, 2) {
        let resume = ctx.pick(&[RestoreOptions::running(), RestoreOptions::paused()]);
        all.push(ctx.backend().restore(&snapshot, resume).await?);
    }
    if ctx.has(Capability::Fork) {
        let count = u32::try_from(ctx.draw(1, 3)).unwrap_or(1);
        for child in vm.fork(ForkOptions::new(count)).await? {
            all.push(child?);
        }
    }
    ctx.backend().delete_snapshot(&snapshot).await?;
    Ok(all)
}

async fn after_captures(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let others = capture(ctx, &vm).await?;
    if ctx.one_in(2) {
        drop(vm);
        drop(others);
    } else {
        drop(others);
        drop(vm);
    }
    nothing_left(ctx).await
}

async fn after_dropped_captures(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let snapshot = vm.snapshot(SnapshotOptions::default()).await?;
    for _ in 0..ctx.draw(1, 3) {
        let most = Duration::from_millis(30);
        match ctx.draw(0, 2) {
            0 => {
                let taken = cut(ctx, most, vm.snapshot(SnapshotOptions::default())).await;
                if let Some(taken) = taken.transpose()? {
                    ctx.backend().delete_snapshot(&taken).await?;
                }
            }
            1 => {
                let restore = ctx.backend().restore(&snapshot, RestoreOptions::running());
                cut(ctx, most, restore).await;
            }
            _ if ctx.has(Capability::Fork) => {
                cut(ctx, most, vm.fork(ForkOptions::new(2))).await;
            }
            _ => {}
        }
    }
    ctx.backend().delete_snapshot(&snapshot).await?;
    drop(vm);
    nothing_left(ctx).await
}

async fn after_stop(ctx: &Context) -> Verdict {
    let vm = Stage::Stopped.reach(ctx).await?;
    nothing_left(ctx).await?;
    vm.start().await?;
    vm.kill().await?;
    nothing_left(ctx).await
}

async fn handles_do_not_hold(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let process = spawn_sh(&vm, "sleep 1000").await?;
    let events = vm.events();
    drop(vm);
    let ended = ctx.within(super::probe::SOON, "a program's end", process.wait()).await?;
    if let Ok(status) = ended {
        return Err(Broken::new(format!("a program of a dropped machine ended with {status:?}")));
    }
    nothing_left(ctx).await?;
    drop(events);
    Ok(())
}

async fn many_lives(ctx: &Context) -> Verdict {
    for _ in 0..ctx.draw(1, 3) {
        let mut vms: Vec<Vm> = Vec::new();
        for _ in 0..ctx.draw(1, 4) {
            let stage = ctx.pick(&Stage::reachable(ctx));
            vms.push(stage.reach(ctx).await?);
        }
        drop(vms);
    }
    nothing_left(ctx).await
}
