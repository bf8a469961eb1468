//! Futures that are dropped half-way.

use super::probe::{
    LONG, Nonce, SOON, Stage, Ticker, Vm, boot_time, cut, millis, script, snapshot_path, spawn_sh,
    truthful, until, until_settled, until_state, works,
};
use crate::{
    clause,
    clause::{Broken, Clause, Verdict},
    context::Context,
    ensure, ensure_eq, ensure_err,
};
use std::time::Duration;
use vm_trait::{
    Capability, ForkOptions, Operation, RestoreOptions, Snapshot, SnapshotOptions, StopOptions,
    VmErrorKind, VmInstanceExt, VmState,
};

/// The clauses on cancellation.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(start, "cancel.start",
        "a start that is dropped at any await is undone, and the machine can be started again",
        [Exec], faults: []),
    clause!(restore, "cancel.restore",
        "a restore in place that is dropped at any await is undone, and can be made again",
        [Exec, Files, Snapshot, RestoreInPlace], faults: []),
    clause!(restore_new, "cancel.restore_of_a_new_machine",
        "a restore into a new machine that is dropped at any await leaves nothing",
        [Exec, Files, Snapshot], faults: []),
    clause!(pause, "cancel.pause_and_resume",
        "a pause or resume that is dropped leaves a truthful state, and the guest whole",
        [Exec, Files, Pause], faults: []),
    clause!(snapshot, "cancel.snapshot",
        "a snapshot that is dropped leaves no half-made file, and the machine in the state it had",
        [Exec, Files, Snapshot], faults: []),
    clause!(fork, "cancel.fork",
        "a fork that is dropped leaves the source as it was", [Exec, Files, Fork], faults: []),
    clause!(ends, "cancel.stop_and_kill",
        "a stop or kill that is dropped is carried out all the same", [Exec], faults: []),
    clause!(exec, "cancel.exec_kills",
        "an exec that is dropped kills the program, and the next one works", [Exec, Files], faults: []),
    clause!(file_writes, "cancel.write_is_all_or_nothing",
        "a file write that is dropped leaves the old content or the new one", [Exec, Files], faults: []),
    clause!(queued, "cancel.while_queued",
        "dropping an operation that waits its turn lets the others through", [Exec, Pause], faults: []),
    clause!(anything, "cancel.anything_anytime",
        "any operation dropped at any await leaves a machine that can be used", [Exec, Files], faults: []),
];

async fn start(ctx: &Context) -> Verdict {
    let boot = boot_time(ctx).await?;
    let vm = ctx.created().await?;
    for _ in 0..ctx.draw(1, 3) {
        if cut(ctx, boot, vm.start()).await.transpose()?.is_some() {
            ensure_eq!(vm.state(), VmState::Running, "the state after a start");
            return works(ctx, &vm, "after a start").await;
        }
        until_settled(ctx, &vm).await?;
        let state = vm.state();
        ensure!(
            matches!(state, VmState::Created | VmState::Stopped),
            "after a dropped start the state is {state}"
        );
    }
    truthful(ctx, &vm, "after dropped starts").await
}

/// Takes a snapshot of a machine with a nonce, and measures how long that took.
async fn captured(ctx: &Context) -> Result<(Vm, Nonce, Snapshot, Duration), Broken> {
    let vm = ctx.running().await?;
    let nonce = Nonce::plant(ctx, &vm).await?;
    let begun = ctx.now();
    let snapshot = vm.snapshot(SnapshotOptions::default()).await?;
    let taken = (ctx.now() - begun).max(Duration::from_millis(2));
    Ok((vm, nonce, snapshot, taken))
}

async fn restore(ctx: &Context) -> Verdict {
    let (vm, nonce, snapshot, taken) = captured(ctx).await?;
    vm.kill().await?;
    let restore = vm.restore(&snapshot, RestoreOptions::running());
    if cut(ctx, taken * 2, restore).await.transpose()?.is_none() {
        until_settled(ctx, &vm).await?;
        ensure_eq!(vm.state(), VmState::Stopped, "the state after a dropped restore");
        if ctx.one_in(2) {
            truthful(ctx, &vm, "after a dropped restore").await?;
            vm.kill().await?;
        }
        vm.restore(&snapshot, RestoreOptions::running()).await?;
    }
    nonce.there(&vm, "after a restore").await?;
    Ok(ctx.backend().delete_snapshot(&snapshot).await?)
}

async fn restore_new(ctx: &Context) -> Verdict {
    let (vm, nonce, snapshot, taken) = captured(ctx).await?;
    drop(vm);
    let running = RestoreOptions::running();
    for _ in 0..ctx.draw(1, 3) {
        let restore = ctx.backend().restore(&snapshot, running);
        if let Some(restored) = cut(ctx, taken * 2, restore).await.transpose()? {
            nonce.there(&restored, "in a restored machine").await?;
        }
    }
    until(ctx, "nothing left of dropped restores", || ctx.leftovers().is_empty()).await?;
    let restored = ctx.backend().restore(&snapshot, running).await?;
    nonce.there(&restored, "after dropped restores").await?;
    Ok(ctx.backend().delete_snapshot(&snapshot).await?)
}

async fn pause(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let nonce = Nonce::plant(ctx, &vm).await?;
    let ticker = Ticker::begin(ctx, &vm).await?;
    for _ in 0..ctx.draw(1, 4) {
        let before = vm.state();
        let most = Duration::from_millis(5);
        let (outcome, after) = match before {
            VmState::Running => (cut(ctx, most, vm.pause()).await, VmState::Paused),
            _ => (cut(ctx, most, vm.resume()).await, VmState::Running),
        };
        if let Some(outcome) = outcome {
            outcome?;
        }
        // It had begun, so it is carried out.
        until_state(ctx, &vm, after).await?;
    }
    truthful(ctx, &vm, "after dropped pauses").await?;
    nonce.there(&vm, "after dropped pauses").await?;
    ticker.goes_on(ctx, &vm, "after dropped pauses").await
}

async fn snapshot(ctx: &Context) -> Verdict {
    let (vm, nonce, other, taken) = captured(ctx).await?;
    let stage = match ctx.has(Capability::Pause) && ctx.one_in(3) {
        true => Stage::Paused,
        false => Stage::Running,
    };
    if stage == Stage::Paused {
        vm.pause().await?;
    }
    let path = snapshot_path(ctx, &vm, "dropped.snap").await?;
    let options = SnapshotOptions::default().with_path(&path);
    let outcome = cut(ctx, taken, vm.snapshot(options.clone())).await.transpose()?;
    // Whatever stands there must be whole; a file that was finished at the last moment may stand.
    let handle = Snapshot::new(path.clone(), other.metadata.clone());
    match ctx.backend().restore(&handle, RestoreOptions::running()).await {
        Ok(restored) => nonce.there(&restored, "in a machine from a dropped snapshot").await?,
        refused => {
            ensure!(outcome.is_none(), "a snapshot that was taken cannot be restored");
            ensure_err!(refused, VmErrorKind::HostIo { .. }, "a restore from a dropped snapshot");
        }
    }
    let back = || stage.holds(&vm.state());
    until(ctx, "the state before the dropped snapshot", back).await?;
    let whole = vm.snapshot(options).await?;
    let restored = ctx.backend().restore(&whole, RestoreOptions::running()).await?;
    nonce.there(&restored, "in a machine from the next snapshot").await?;
    truthful(ctx, &vm, "after a dropped snapshot").await?;
    nonce.there(&vm, "after a dropped snapshot").await?;
    ctx.backend().delete_snapshot(&other).await?;
    Ok(ctx.backend().delete_snapshot(&whole).await?)
}

async fn fork(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let nonce = Nonce::plant(ctx, &vm).await?;
    let ticker = Ticker::begin(ctx, &vm).await?;
    let count = u32::try_from(ctx.draw(1, 4)).unwrap_or(1);
    for _ in 0..ctx.draw(1, 3) {
        cut(ctx, Duration::from_millis(20), vm.fork(ForkOptions::new(count))).await;
        until(ctx, "Running after a dropped fork", || vm.state() == VmState::Running).await?;
        nonce.there(&vm, "after a dropped fork").await?;
    }
    ticker.goes_on(ctx, &vm, "after a dropped fork").await?;
    let children = vm.fork(ForkOptions::new(count)).await?;
    for child in children {
        nonce.there(&child?, "in a child of the next fork").await?;
    }
    Ok(())
}

async fn ends(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let process = spawn_sh(&vm, "sleep 1000").await?;
    let grace = millis(ctx, 0, 100);
    let outcome = if ctx.one_in(2) {
        cut(ctx, Duration::from_millis(5), vm.kill()).await
    } else {
        cut(ctx, grace, vm.stop(StopOptions::default().with_grace(grace))).await
    };
    if let Some(outcome) = outcome {
        outcome?;
    }
    until_state(ctx, &vm, VmState::Stopped).await?;
    ensure_err!(
        ctx.within(SOON, "a program's end", process.wait()).await?,
        VmErrorKind::Interrupted,
        "a program of a machine whose end was dropped"
    );
    truthful(ctx, &vm, "after a dropped end").await
}

async fn exec(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let path = format!("{}/ticks-{:x}", ctx.scratch(&*vm), ctx.draw(0, u64::MAX));
    let text = format!("while :; do echo >> {path}; sleep 0.01; done");
    for _ in 0..ctx.draw(1, 3) {
        let ended = cut(ctx, Duration::from_millis(60), vm.exec(script(&text))).await;
        ensure!(ended.is_none(), "a program without end ended: {ended:?}");
    }
    let (mut last, begun) = (None, ctx.now());
    loop {
        let size = match vm.exists(&path).await? {
            true => vm.stat(&path).await?.size,
            false => 0,
        };
        if last == Some(size) {
            break;
        }
        ensure!(ctx.now() - begun < SOON, "the program of a dropped exec goes on");
        last = Some(size);
        ctx.sleep(Duration::from_millis(60)).await;
    }
    works(ctx, &vm, "after dropped execs").await
}

async fn file_writes(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let path = format!("{}/written-{:x}", ctx.scratch(&*vm), ctx.draw(0, u64::MAX));
    let length = ctx.draw(1, 300_000);
    let length = usize::try_from(length).unwrap_or(1);
    let mut known = vec![ctx.bytes(length)];
    vm.write(&path, known[0].clone()).await?;
    for _ in 0..ctx.draw(1, 4) {
        let length = usize::try_from(ctx.draw(1, 300_000)).unwrap_or(1);
        let next = ctx.bytes(length);
        known.push(next.clone());
        let most = Duration::from_millis(10);
        let ended = cut(ctx, most, vm.write(&path, next.clone())).await.transpose()?;
        let found = vm.read_file(&path).await?;
        ensure!(known.contains(&found), "the file is none of the contents that were written");
        ensure!(ended.is_none() || found == next, "a write that was Ok is not there");
    }
    works(ctx, &vm, "after dropped writes").await
}

async fn queued(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    // The first holds the turn, the second waits for it and is dropped, the third comes after it.
    let first = vm.pause();
    let second = cut(ctx, Duration::from_millis(1), vm.resume());
    let third = async {
        ctx.sleep(Duration::from_millis(30)).await;
        match vm.state() {
            VmState::Paused => vm.resume().await,
            _ => vm.pause().await,
        }
    };
    let all = futures_util::future::join3(first, second, third);
    let (first, second, third) = ctx.within(LONG, "operations around a dropped one", all).await?;
    first?;
    if let Some(second) = second {
        second?;
    }
    // The dropped one may have been carried out just before, so that the third came too late.
    if third.is_err() {
        ensure_err!(third, VmErrorKind::InvalidState { .. }, "an operation behind a dropped one");
    }
    truthful(ctx, &vm, "after a dropped operation in the queue").await
}

async fn anything(ctx: &Context) -> Verdict {
    let operations: Vec<Operation> = super::lifecycle_table::operations(ctx);
    let stage = ctx.pick(&Stage::reachable(ctx));
    let vm = stage.reach(ctx).await?;
    for _ in 0..ctx.draw(2, 8) {
        let operation = ctx.pick(&operations);
        let attempt = super::lifecycle_table::attempt(ctx, &vm, operation);
        cut(ctx, Duration::from_millis(30), attempt).await;
    }
    // What was dropped may still be carried out; wait until nothing has changed for a while.
    let mut last = (vm.state(), ctx.now());
    until(ctx, "a state that stays", || {
        if vm.state() != last.0 {
            last = (vm.state(), ctx.now());
        }
        ctx.now() - last.1 > Duration::from_millis(200)
    })
    .await?;
    truthful(ctx, &vm, "after dropped operations").await
}
