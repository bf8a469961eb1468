//! Snapshots and restores that go wrong below.

use super::probe::{
    LONG, Nonce, Stage, Vm, made, millis, order, sh, snapshot_path, truthful, until_settled,
    until_state, works,
};
use crate::{
    clause,
    clause::{Broken, Clause, Verdict},
    context::Context,
    ensure, ensure_eq, ensure_err,
};
use std::time::Duration;
use vm_core::fault::{FaultKind, FaultOrder};
use vm_trait::{
    Capability, CrashReason, RestoreOptions, Snapshot, SnapshotOptions, VmErrorKind, VmState,
};

/// The clauses on captures and restores under faults.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(disk_full, "snapshot.host_disk_full",
        "on a full host disk a snapshot fails, leaves no file, and the one that stood at its path is whole",
        [Exec, Files, Snapshot], faults: [HostDiskFull]),
    clause!(torn_write, "snapshot.torn_write",
        "when the host dies amid a snapshot, no file is taken for a whole one, and the old one is whole",
        [Exec, Files, Snapshot], faults: [TornWrite]),
    clause!(lost_sync, "snapshot.lost_sync",
        "a snapshot that the host's disk lost is refused or whole, never restored in part",
        [Exec, Files, Snapshot], faults: [LostSync, HostLost]),
    clause!(save_fails, "snapshot.failed_save",
        "a snapshot that the machine cannot save fails, leaves no file, and the machine goes on as it was",
        [Exec, Files, Snapshot], faults: [SaveFail]),
    clause!(next_works, "snapshot.works_after_failures",
        "after any number of failed snapshots the next one is whole",
        [Exec, Files, Snapshot], faults: [SaveFail, HostDiskFull]),
    clause!(load_fails, "snapshot.failed_load",
        "a restore that cannot load fails, makes no machine, and the next restore works",
        [Exec, Files, Snapshot], faults: [LoadFail]),
    clause!(load_fails_in_place, "snapshot.failed_load_in_place",
        "a restore in place that cannot load leaves a truthful state and a machine that starts",
        [Exec, Files, Snapshot, RestoreInPlace], faults: [LoadFail]),
    clause!(load_slow, "snapshot.slow_load_succeeds",
        "a restore that is slow but within its deadline succeeds", [Exec, Files, Snapshot], faults: [LoadSlow]),
    clause!(load_too_slow, "snapshot.restore_ends_by_its_deadline",
        "a restore that takes too long ends by its deadline, with no machine left half-made",
        [Exec, Files, Snapshot, RestoreInPlace], faults: [LoadSlow])
    .undisturbed(),
    clause!(crash_amid, "snapshot.crash_amid_a_snapshot",
        "a machine that dies amid a snapshot fails it, and leaves no file",
        [Exec, Files, Snapshot], faults: [VmmKilled]),
];

/// Makes a machine that runs or is paused, with a nonce; gives both.
async fn subject(ctx: &Context) -> Result<(Stage, Vm, Nonce), Broken> {
    let vm = ctx.running().await?;
    let nonce = Nonce::plant(ctx, &vm).await?;
    if ctx.has(Capability::Pause) && ctx.one_in(3) {
        vm.pause().await?;
        return Ok((Stage::Paused, vm, nonce));
    }
    Ok((Stage::Running, vm, nonce))
}

/// Gives a handle to whatever stands at the path, with the metadata of another snapshot.
fn handle(path: &std::path::Path, other: &Snapshot) -> Snapshot {
    Snapshot::new(path.to_owned(), other.metadata.clone())
}

/// Checks that there is no snapshot at the path.
async fn nothing_at(ctx: &Context, path: &std::path::Path, other: &Snapshot) -> Verdict {
    ensure_err!(
        ctx.backend().restore(&handle(path, other), RestoreOptions::running()).await,
        VmErrorKind::HostIo { .. },
        "a restore from where no snapshot was made"
    );
    Ok(())
}

/// Checks that a snapshot is whole: a machine from it has the nonce.
async fn whole(ctx: &Context, snapshot: &Snapshot, nonce: &Nonce, when: &str) -> Verdict {
    let restored = ctx.backend().restore(snapshot, RestoreOptions::running()).await?;
    nonce.there(&restored, when).await
}

/// Takes a snapshot at `path` in the moment of a fault; it must fail.
async fn fails_under(ctx: &Context, vm: &Vm, path: &std::path::Path, kind: FaultKind) -> Verdict {
    let ordered = order(ctx, FaultOrder::next(kind))?;
    let snapshot = vm.snapshot(SnapshotOptions::default().with_path(path));
    let outcome = ctx.within(LONG, "a snapshot that fails", snapshot).await?;
    ordered.must_have_fired(ctx)?;
    ensure_err!(
        outcome,
        VmErrorKind::HostIo { .. }
            | VmErrorKind::ResourceExhausted { .. }
            | VmErrorKind::HypervisorFailed { .. }
            | VmErrorKind::VmmCrashed { .. }
            | VmErrorKind::GuestCrashed { .. },
        "a snapshot under {kind}"
    );
    Ok(())
}

async fn disk_full(ctx: &Context) -> Verdict {
    let (stage, vm, nonce) = subject(ctx).await?;
    let path = snapshot_path(ctx, &vm, "full.snap").await?;
    let free = path.with_extension("free");
    let old = vm.snapshot(SnapshotOptions::default().with_path(&path)).await?;
    let taken = if ctx.one_in(2) { &path } else { &free };
    fails_under(ctx, &vm, taken, FaultKind::HostDiskFull).await?;
    ensure!(stage.holds(&vm.state()), "in {stage:?}, after a failed snapshot: {}", vm.state());
    nothing_at(ctx, &free, &old).await?;
    whole(ctx, &old, &nonce, "in a machine from the old snapshot").await?;
    truthful(ctx, &vm, "after a failed snapshot").await?;
    nonce.there(&vm, "in the source of a failed snapshot").await?;
    Ok(ctx.backend().delete_snapshot(&old).await?)
}

async fn torn_write(ctx: &Context) -> Verdict {
    let (_, vm, nonce) = subject(ctx).await?;
    let path = snapshot_path(ctx, &vm, "torn.snap").await?;
    let free = path.with_extension("free");
    let old = vm.snapshot(SnapshotOptions::default().with_path(&path)).await?;
    let taken = if ctx.one_in(2) { &path } else { &free };
    fails_under(ctx, &vm, taken, FaultKind::TornWrite).await?;
    until_settled(ctx, &vm).await?;
    whole(ctx, &old, &nonce, "in a machine from the snapshot before the host died").await?;
    nothing_at(ctx, &free, &old).await?;
    truthful(ctx, &vm, "after the host died amid a snapshot").await?;
    Ok(ctx.backend().delete_snapshot(&old).await?)
}

async fn lost_sync(ctx: &Context) -> Verdict {
    let (_, vm, nonce) = subject(ctx).await?;
    let old = vm.snapshot(SnapshotOptions::default()).await?;
    let ordered = order(ctx, FaultOrder::next(FaultKind::LostSync))?;
    let taken = vm.snapshot(SnapshotOptions::default()).await;
    ordered.must_have_fired(ctx)?;
    if !matches!(vm.state(), VmState::Crashed(_)) {
        let lost = order(ctx, FaultOrder::next(FaultKind::HostLost))?;
        until_state(ctx, &vm, VmState::Crashed(CrashReason::HostLost)).await?;
        lost.must_have_fired(ctx)?;
    }
    whole(ctx, &old, &nonce, "in a machine from the snapshot that was synced").await?;
    if let Ok(snapshot) = taken {
        match ctx.backend().restore(&snapshot, RestoreOptions::running()).await {
            Ok(restored) => nonce.there(&restored, "in a machine from a lost snapshot").await?,
            refused => ensure_err!(
                refused,
                VmErrorKind::SnapshotCorrupt { .. } | VmErrorKind::HostIo { .. },
                "a restore from a snapshot that the disk lost"
            ),
        }
    }
    truthful(ctx, &vm, "after the host was lost").await
}

async fn save_fails(ctx: &Context) -> Verdict {
    let (stage, vm, nonce) = subject(ctx).await?;
    let path = snapshot_path(ctx, &vm, "unsaved.snap").await?;
    let old = vm.snapshot(SnapshotOptions::default()).await?;
    fails_under(ctx, &vm, &path, FaultKind::SaveFail).await?;
    ensure!(stage.holds(&vm.state()), "in {stage:?}, after a failed save: {}", vm.state());
    nothing_at(ctx, &path, &old).await?;
    truthful(ctx, &vm, "after a failed save").await?;
    nonce.there(&vm, "in the source of a failed save").await?;
    Ok(ctx.backend().delete_snapshot(&old).await?)
}

async fn next_works(ctx: &Context) -> Verdict {
    let (_, vm, nonce) = subject(ctx).await?;
    let path = snapshot_path(ctx, &vm, "last.snap").await?;
    for _ in 0..ctx.draw(1, 4) {
        let kind = ctx.pick(&[FaultKind::SaveFail, FaultKind::HostDiskFull]);
        fails_under(ctx, &vm, &path, kind).await?;
    }
    let snapshot = vm.snapshot(SnapshotOptions::default().with_path(&path)).await?;
    whole(ctx, &snapshot, &nonce, "in a machine from the snapshot after failures").await?;
    Ok(ctx.backend().delete_snapshot(&snapshot).await?)
}

async fn load_fails(ctx: &Context) -> Verdict {
    let (_, vm, nonce) = subject(ctx).await?;
    let snapshot = vm.snapshot(SnapshotOptions::default()).await?;
    let ordered = order(ctx, FaultOrder::next(FaultKind::LoadFail))?;
    let outcome = ctx.backend().restore(&snapshot, RestoreOptions::running()).await;
    ordered.must_have_fired(ctx)?;
    ensure!(outcome.is_err(), "a restore that could not load was Ok");
    whole(ctx, &snapshot, &nonce, "in a machine after a failed load").await?;
    Ok(ctx.backend().delete_snapshot(&snapshot).await?)
}

async fn load_fails_in_place(ctx: &Context) -> Verdict {
    let (_, vm, nonce) = subject(ctx).await?;
    let snapshot = vm.snapshot(SnapshotOptions::default()).await?;
    vm.kill().await?;
    let ordered = order(ctx, FaultOrder::next(FaultKind::LoadFail).on(vm.id()))?;
    let outcome = vm.restore(&snapshot, RestoreOptions::running()).await;
    ordered.must_have_fired(ctx)?;
    ensure!(outcome.is_err(), "a restore that could not load was Ok");
    ensure!(vm.state().is_ended(), "after a failed load the state is {}", vm.state());
    if ctx.one_in(2) {
        vm.restore(&snapshot, RestoreOptions::running()).await?;
        nonce.there(&vm, "after a failed load and a good one").await?;
    } else {
        truthful(ctx, &vm, "after a failed load").await?;
    }
    Ok(ctx.backend().delete_snapshot(&snapshot).await?)
}

async fn load_slow(ctx: &Context) -> Verdict {
    let (_, vm, nonce) = subject(ctx).await?;
    let snapshot = vm.snapshot(SnapshotOptions::default()).await?;
    let delay = millis(ctx, 50, 300);
    let ordered = order(ctx, FaultOrder::next(FaultKind::LoadSlow).with_amount(delay))?;
    let begun = ctx.now();
    let restored = ctx.backend().restore(&snapshot, RestoreOptions::running()).await?;
    ordered.must_have_fired(ctx)?;
    ensure!(ctx.now() - begun >= delay, "a load slowed by {delay:?} took less");
    nonce.there(&restored, "after a slow load").await?;
    Ok(ctx.backend().delete_snapshot(&snapshot).await?)
}

async fn load_too_slow(ctx: &Context) -> Verdict {
    let vm = made(ctx, |config| config.timeouts.capture = Duration::from_millis(1500)).await?;
    vm.start().await?;
    let nonce = Nonce::plant(ctx, &vm).await?;
    let snapshot = vm.snapshot(SnapshotOptions::default()).await?;
    vm.kill().await?;
    let deadline = vm.config().timeouts.capture;
    let slow = FaultOrder::next(FaultKind::LoadSlow).with_amount(deadline * 10);
    let ordered = order(ctx, slow.on(vm.id()))?;
    let restore = vm.restore(&snapshot, RestoreOptions::running());
    let limit = deadline + vm.config().timeouts.kill;
    let outcome = ctx.within(limit, "a restore that takes too long", restore).await?;
    ordered.must_have_fired(ctx)?;
    ensure_err!(outcome, VmErrorKind::Timeout { .. }, "a restore that takes too long");
    ensure!(vm.state().is_ended(), "after a restore ran out of time: {}", vm.state());
    vm.restore(&snapshot, RestoreOptions::running()).await?;
    nonce.there(&vm, "in the next restore").await?;
    Ok(ctx.backend().delete_snapshot(&snapshot).await?)
}

async fn crash_amid(ctx: &Context) -> Verdict {
    let (_, vm, _) = subject(ctx).await?;
    let old = vm.snapshot(SnapshotOptions::default()).await?;
    let begun = ctx.now();
    let path = snapshot_path(ctx, &vm, "amid.snap").await?;
    let usual = ctx.now() - begun;
    let percent = u32::try_from(ctx.draw(0, 100)).unwrap_or(0);
    let ordered = order(
        ctx,
        FaultOrder::next(FaultKind::VmmKilled).on(vm.id()).with_amount(usual * percent / 100),
    )?;
    let outcome = vm.snapshot(SnapshotOptions::default().with_path(&path)).await;
    until_state(ctx, &vm, VmState::Crashed(CrashReason::VmmDied)).await?;
    ordered.must_have_fired(ctx)?;
    match outcome {
        // It may have been over before.
        Ok(snapshot) => {
            let restored = ctx.backend().restore(&snapshot, RestoreOptions::running()).await?;
            works(ctx, &restored, "in a machine from the last snapshot").await?;
            ctx.backend().delete_snapshot(&snapshot).await?;
        }
        refused => {
            // The machine may have died before its turn came.
            ensure_err!(
                refused,
                VmErrorKind::VmmCrashed { .. }
                    | VmErrorKind::InvalidState { state: VmState::Crashed(CrashReason::VmmDied) },
                "a snapshot cut short by a crash"
            );
            nothing_at(ctx, &path, &old).await?;
        }
    }
    vm.start().await?;
    ensure_eq!(sh(&vm, "echo alive").await?, "alive", "a machine that crashed amid a snapshot");
    Ok(ctx.backend().delete_snapshot(&old).await?)
}
