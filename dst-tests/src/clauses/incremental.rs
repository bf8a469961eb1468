//! Snapshots that hold what changed since another one.

use super::probe::{
    LONG, Nonce, Ticker, Vm, crash, disk, millis, order, sh, snapshot_path, started, truthful,
    until_settled,
};
use crate::{
    clause,
    clause::{Broken, Clause, Verdict},
    context::Context,
    ensure, ensure_eq, ensure_err,
};
use vm_core::fault::{FaultKind, FaultOrder};
use vm_trait::{
    Capability, RestoreOptions, Snapshot, SnapshotOptions, StopOptions, VmErrorKind, VmResult,
};

/// The clauses on incremental snapshots.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(as_a_whole, "incremental.restored_as_a_whole",
        "each snapshot of a chain gives the machine as it was then, and the source goes on",
        [Exec, Files, Snapshot, IncrementalSnapshot], faults: []),
    clause!(in_place, "incremental.restored_in_place",
        "a restore in place from a snapshot of a chain brings the machine back as it was then",
        [Exec, Files, Snapshot, RestoreInPlace, IncrementalSnapshot], faults: []),
    clause!(disks, "incremental.disks_are_of_the_instant",
        "a snapshot of a chain holds the disks as of the same instant as memory",
        [Exec, Files, Disks, Snapshot, IncrementalSnapshot], faults: []),
    clause!(branches, "incremental.branches",
        "several snapshots can be taken on the same base, each with all that changed since then",
        [Exec, Files, Snapshot, IncrementalSnapshot], faults: []),
    clause!(of_restored, "incremental.of_a_restored_machine",
        "a machine that was restored and is tracked is captured on the snapshot that it came from",
        [Exec, Files, Snapshot, IncrementalSnapshot], faults: []),
    clause!(beside_forks, "incremental.forks_do_not_disturb",
        "what changes between two snapshots is captured however often the machine was forked or paused meanwhile",
        [Exec, Files, Pause, Fork, Snapshot, IncrementalSnapshot], faults: []),
    clause!(needs_tracking, "incremental.needs_a_tracked_base",
        "a base of which nobody knows what changed since then is refused as such: untracked, of another machine or life",
        [Exec, Files, Snapshot, IncrementalSnapshot], faults: []),
    clause!(needs_its_base, "incremental.needs_its_chain",
        "a snapshot whose base is missing or is another one is refused with SnapshotCorrupt",
        [Exec, Files, Snapshot, IncrementalSnapshot], faults: []),
    clause!(merged, "incremental.merged_needs_no_other",
        "a merged chain is one snapshot with an id of its own that holds what the chain gave",
        [Exec, Files, Snapshot, IncrementalSnapshot], faults: []),
    clause!(travels, "incremental.exported_needs_no_other",
        "the exported bytes of an incremental snapshot can be imported where its base is not",
        [Exec, Files, Snapshot, IncrementalSnapshot], faults: []),
    clause!(failed_one, "incremental.after_failures",
        "after a snapshot of a chain that failed, the next one on the same base misses nothing",
        [Exec, Files, Snapshot, IncrementalSnapshot], faults: [HostDiskFull, SaveFail]),
    clause!(full_merge, "incremental.merge_on_a_full_disk",
        "a merge that has no room fails, leaves no file, and the chain is whole",
        [Exec, Files, Snapshot, IncrementalSnapshot], faults: [HostDiskFull]),
    clause!(torn, "incremental.torn_writes",
        "when the host dies amid a snapshot of a chain or a merge, nothing is taken for whole that is not",
        [Exec, Files, Snapshot, IncrementalSnapshot], faults: [TornWrite]),
    clause!(lost, "incremental.lost_syncs",
        "a snapshot of a chain, or a merge, that the host's disk lost is refused or whole",
        [Exec, Files, Snapshot, IncrementalSnapshot], faults: [LostSync, HostLost]),
    clause!(rot, "incremental.bit_rot",
        "a byte that changed in any file of a chain is noticed by restore, merge and export",
        [Exec, Files, Snapshot, IncrementalSnapshot], faults: [BitRot]),
    clause!(skew, "incremental.other_version",
        "a chain of another version is refused with SnapshotIncompatible and the field",
        [Exec, Files, Snapshot, IncrementalSnapshot], faults: [VersionSkew]),
];

fn tracked() -> SnapshotOptions {
    SnapshotOptions::default().tracked()
}

fn on(base: &Snapshot) -> SnapshotOptions {
    SnapshotOptions::default().on_base(base)
}

/// A chain, with what its machine held at each of its snapshots.
struct Chain {
    vm: Vm,
    links: Vec<Snapshot>,
    nonces: Vec<Nonce>,
}

impl Chain {
    /// Takes a tracked snapshot and some on it, each after a change.
    async fn take(ctx: &Context, more: (u64, u64)) -> Result<Self, Broken> {
        let vm = ctx.running().await?;
        let nonces = vec![Nonce::plant(ctx, &vm).await?];
        let links = vec![vm.snapshot(tracked()).await?];
        let mut chain = Self { vm, links, nonces };
        for _ in 0..ctx.draw(more.0, more.1) {
            chain.grow(ctx).await?;
        }
        Ok(chain)
    }

    /// Changes something and takes a snapshot of that.
    async fn grow(&mut self, ctx: &Context) -> Verdict {
        let nonce = self.nonces[self.nonces.len() - 1].replace(ctx, &self.vm).await?;
        let path = match ctx.one_in(2) {
            true => {
                Some(snapshot_path(ctx, &self.vm, &format!("{}.snap", self.links.len())).await?)
            }
            false => None,
        };
        let mut options = on(self.last());
        options.path = path;
        let snapshot = self.vm.snapshot(options).await?;
        ensure_eq!(
            snapshot.metadata.base,
            Some(self.last().metadata.id),
            "the base in the metadata"
        );
        self.nonces.push(nonce);
        self.links.push(snapshot);
        Ok(())
    }

    fn last(&self) -> &Snapshot {
        &self.links[self.links.len() - 1]
    }

    fn last_nonce(&self) -> &Nonce {
        &self.nonces[self.nonces.len() - 1]
    }

    /// Checks that the last snapshot gives what it must.
    async fn whole(&self, ctx: &Context, when: &str) -> Verdict {
        let restored = ctx.backend().restore(self.last(), RestoreOptions::running()).await?;
        self.last_nonce().there(&restored, when).await
    }

    /// Removes the files that are left of it.
    async fn done(&self, ctx: &Context) -> Verdict {
        for link in &self.links {
            ctx.backend().delete_snapshot(link).await?;
        }
        Ok(())
    }
}

async fn as_a_whole(ctx: &Context) -> Verdict {
    let mut chain = Chain::take(ctx, (0, 1)).await?;
    let ticker = Ticker::begin(ctx, &chain.vm).await?;
    chain.grow(ctx).await?;
    for _ in 0..ctx.draw(0, 2) {
        chain.grow(ctx).await?;
    }
    let last = ctx.backend().restore(chain.last(), RestoreOptions::running()).await?;
    chain.last_nonce().there(&last, "in a machine from the end of a chain").await?;
    ticker.goes_on(ctx, &last, "in a machine from the end of a chain").await?;
    let any = ctx.index(chain.links.len());
    let restored = ctx.backend().restore(&chain.links[any], RestoreOptions::running()).await?;
    chain.nonces[any].there(&restored, &format!("in a machine from link {any}")).await?;
    chain.last_nonce().there(&chain.vm, "in the source").await?;
    ticker.goes_on(ctx, &chain.vm, "in the source").await?;
    chain.done(ctx).await
}

async fn in_place(ctx: &Context) -> Verdict {
    let mut chain = Chain::take(ctx, (1, 2)).await?;
    let any = ctx.index(chain.links.len());
    chain.vm.kill().await?;
    let mut options = RestoreOptions::running();
    options.tracked = true;
    chain.vm.restore(&chain.links[any], options).await?;
    chain.nonces[any].there(&chain.vm, "after a restore in place").await?;
    // From there another branch grows.
    chain.links.truncate(any + 1);
    chain.nonces.truncate(any + 1);
    chain.grow(ctx).await?;
    chain.whole(ctx, "in a machine from the new branch").await?;
    chain.done(ctx).await
}

async fn disks(ctx: &Context) -> Verdict {
    let disk = disk(ctx, "/data");
    let vm = started(ctx, |config| config.disks.push(disk)).await?;
    let on_disk = Nonce::plant_in(ctx, &vm, "/data").await?;
    let kept = Nonce::plant_in(ctx, &vm, "/data").await?;
    sh(&vm, "sync").await?;
    let base = vm.snapshot(tracked()).await?;
    let second = on_disk.replace(ctx, &vm).await?;
    let in_memory = Nonce::plant(ctx, &vm).await?;
    if ctx.one_in(2) {
        sh(&vm, "sync").await?;
    }
    let step = vm.snapshot(on(&base)).await?;
    on_disk.replace(ctx, &vm).await?;
    in_memory.replace(ctx, &vm).await?;
    let restored = ctx.backend().restore(&step, RestoreOptions::running()).await?;
    second.there(&restored, "on the disk of a machine from a chain").await?;
    kept.there(&restored, "on the disk of a machine from a chain, unchanged since the base")
        .await?;
    in_memory.there(&restored, "in its memory").await?;
    ctx.backend().delete_snapshot(&step).await?;
    Ok(ctx.backend().delete_snapshot(&base).await?)
}

async fn branches(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let base = vm.snapshot(tracked()).await?;
    let mut taken = Vec::new();
    let mut nonce = Nonce::plant(ctx, &vm).await?;
    let early = Nonce::plant(ctx, &vm).await?;
    for _ in 0..ctx.draw(2, 3) {
        nonce = nonce.replace(ctx, &vm).await?;
        taken.push((vm.snapshot(on(&base)).await?, nonce.clone()));
    }
    for (snapshot, nonce) in &taken {
        let restored = ctx.backend().restore(snapshot, RestoreOptions::running()).await?;
        nonce.there(&restored, "in a machine from a branch").await?;
        early.there(&restored, "in a machine from a branch, from before all").await?;
        ctx.backend().delete_snapshot(snapshot).await?;
    }
    Ok(ctx.backend().delete_snapshot(&base).await?)
}

async fn of_restored(ctx: &Context) -> Verdict {
    let source = ctx.running().await?;
    let nonce = Nonce::plant(ctx, &source).await?;
    let base = source.snapshot(SnapshotOptions::default()).await?;
    let options = match ctx.one_in(2) {
        true => RestoreOptions::running(),
        false => RestoreOptions::paused(),
    };
    let vm = ctx.backend().restore(&base, options.tracked()).await?;
    if !options.resume {
        vm.resume().await?;
    }
    let kept = Nonce::plant(ctx, &vm).await?;
    let new = nonce.replace(ctx, &vm).await?;
    let step = vm.snapshot(on(&base)).await?;
    let restored = ctx.backend().restore(&step, RestoreOptions::running()).await?;
    new.there(&restored, "in a machine from a step of a restored one").await?;
    kept.there(&restored, "in a machine from a step of a restored one").await?;
    nonce.there(&source, "in the source of all").await?;
    ctx.backend().delete_snapshot(&step).await?;
    Ok(ctx.backend().delete_snapshot(&base).await?)
}

async fn beside_forks(ctx: &Context) -> Verdict {
    let mut chain = Chain::take(ctx, (0, 1)).await?;
    let mut planted = Vec::new();
    for _ in 0..ctx.draw(1, 3) {
        planted.push(Nonce::plant(ctx, &chain.vm).await?);
        if ctx.one_in(2) {
            chain.vm.pause().await?;
            chain.vm.resume().await?;
        }
        let children = chain.vm.fork(vm_trait::ForkOptions::new(1)).await?;
        for child in children {
            let child = child?;
            chain.last_nonce().replace(ctx, &child).await?;
            let refused = child.snapshot(on(chain.last())).await;
            let what = "a child's snapshot on the source's base";
            ensure_err!(refused, VmErrorKind::InvalidConfig { field, .. } if field == "base", "{what}");
        }
    }
    chain.grow(ctx).await?;
    let restored = ctx.backend().restore(chain.last(), RestoreOptions::running()).await?;
    chain.last_nonce().there(&restored, "in a machine from a chain with forks").await?;
    for nonce in planted {
        nonce.there(&restored, "in a machine from a chain with forks").await?;
    }
    chain.done(ctx).await
}

/// Checks that a snapshot on a base is refused because of the base.
fn refused_base<T>(outcome: VmResult<T>, what: &str) -> Verdict {
    ensure_err!(outcome, VmErrorKind::InvalidConfig { field, .. } if field == "base", "{what}");
    Ok(())
}

async fn needs_tracking(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let nonce = Nonce::plant(ctx, &vm).await?;
    let untracked = vm.snapshot(SnapshotOptions::default()).await?;
    refused_base(vm.snapshot(on(&untracked)).await, "a snapshot on an untracked one")?;
    let base = vm.snapshot(tracked()).await?;
    let same = on(&base).with_path(&base.path);
    refused_base(vm.snapshot(same).await, "a snapshot at the path of its base")?;
    let other = ctx.backend().restore(&base, RestoreOptions::running()).await?;
    refused_base(other.snapshot(on(&base)).await, "a snapshot on another machine's")?;
    nonce.there(&vm, "after refused snapshots").await?;
    if ctx.can_fault(FaultKind::VmmKilled) && ctx.one_in(2) {
        crash(ctx, &vm).await?;
    } else {
        vm.stop(StopOptions::default().with_grace(millis(ctx, 0, 50))).await?;
    }
    vm.start().await?;
    refused_base(vm.snapshot(on(&base)).await, "a snapshot on one of an earlier life")?;
    ctx.backend().delete_snapshot(&untracked).await?;
    Ok(ctx.backend().delete_snapshot(&base).await?)
}

/// Checks that no machine comes of the last snapshot of a chain.
async fn refused(ctx: &Context, chain: &Chain, when: &str) -> Verdict {
    let last = chain.last();
    let corrupt = |kind: &VmErrorKind| matches!(kind, VmErrorKind::SnapshotCorrupt { .. });
    let restored = ctx.backend().restore(last, RestoreOptions::running()).await;
    let exported = ctx.backend().export_snapshot(last).await;
    let merged = ctx.backend().merge_snapshot(last, None).await;
    let outcomes = [
        ("a restore", restored.map(drop)),
        ("an export", exported.map(drop)),
        ("a merge", merged.map(drop)),
    ];
    for (what, outcome) in outcomes {
        ensure_err!(outcome, kind if corrupt(kind), "{what} of a chain {when}");
    }
    if ctx.has(Capability::RestoreInPlace) {
        chain.vm.kill().await?;
        let outcome = chain.vm.restore(last, RestoreOptions::running()).await;
        ensure_err!(outcome, kind if corrupt(kind), "a restore in place of a chain {when}");
        truthful(ctx, &chain.vm, "after a refused restore").await?;
    }
    Ok(())
}

async fn needs_its_base(ctx: &Context) -> Verdict {
    let mut chain = Chain::take(ctx, (1, 2)).await?;
    let gone = ctx.index(chain.links.len() - 1);
    let link = chain.links.remove(gone);
    chain.nonces.remove(gone);
    ctx.backend().delete_snapshot(&link).await?;
    if ctx.one_in(2) {
        return refused(ctx, &chain, &format!("without its link {gone}")).await;
    }
    // Another snapshot of the same machine, where that was.
    let other = chain.vm.snapshot(SnapshotOptions::default().with_path(&link.path)).await?;
    refused(ctx, &chain, &format!("with another link {gone}")).await?;
    let restored = ctx.backend().restore(&other, RestoreOptions::running()).await?;
    chain.last_nonce().there(&restored, "in a machine from the other link").await?;
    ctx.backend().delete_snapshot(&other).await?;
    chain.done(ctx).await
}

async fn merged(ctx: &Context) -> Verdict {
    let chain = Chain::take(ctx, (1, 3)).await?;
    let path = match ctx.one_in(2) {
        true => Some(snapshot_path(ctx, &chain.vm, "merged.snap").await?),
        false => None,
    };
    let whole = ctx.backend().merge_snapshot(chain.last(), path.clone()).await?;
    let (metadata, last) = (&whole.metadata, &chain.last().metadata);
    ensure!(metadata.id != last.id, "a merged snapshot has the id of another one");
    ensure_eq!(metadata.base, None, "the base of a merged snapshot");
    ensure_eq!((metadata.vm, metadata.taken_at), (last.vm, last.taken_at), "machine and time");
    ensure!(path.is_none_or(|path| whole.path == path), "a merged snapshot is at {:?}", whole.path);
    chain.whole(ctx, "in a machine from a chain that was merged").await?;
    chain.done(ctx).await?;
    let restored = ctx.backend().restore(&whole, RestoreOptions::running()).await?;
    chain.last_nonce().there(&restored, "in a machine from a merged chain").await?;
    Ok(ctx.backend().delete_snapshot(&whole).await?)
}

async fn travels(ctx: &Context) -> Verdict {
    let chain = Chain::take(ctx, (1, 2)).await?;
    let bytes = ctx.backend().export_snapshot(chain.last()).await?;
    chain.done(ctx).await?;
    let imported = ctx.backend().import_snapshot(bytes).await?;
    ensure_eq!(imported.metadata.base, None, "the base of an imported snapshot");
    let restored = ctx.backend().restore(&imported, RestoreOptions::running()).await?;
    chain.last_nonce().there(&restored, "in a machine from an exported chain").await?;
    Ok(ctx.backend().delete_snapshot(&imported).await?)
}

async fn failed_one(ctx: &Context) -> Verdict {
    let mut chain = Chain::take(ctx, (0, 1)).await?;
    let kept = Nonce::plant(ctx, &chain.vm).await?;
    for _ in 0..ctx.draw(1, 3) {
        let kind = ctx.pick(&[FaultKind::SaveFail, FaultKind::HostDiskFull]);
        let ordered = order(ctx, FaultOrder::next(kind))?;
        let taking = chain.vm.snapshot(on(chain.last()));
        let outcome = ctx.within(LONG, "a snapshot that fails", taking).await?;
        ordered.must_have_fired(ctx)?;
        ensure!(outcome.is_err(), "a snapshot of a chain under {kind} was Ok");
    }
    chain.grow(ctx).await?;
    let restored = ctx.backend().restore(chain.last(), RestoreOptions::running()).await?;
    kept.there(&restored, "from before snapshots that failed").await?;
    chain.last_nonce().there(&restored, "in a machine from a chain with failures").await?;
    chain.done(ctx).await
}

async fn full_merge(ctx: &Context) -> Verdict {
    let chain = Chain::take(ctx, (1, 2)).await?;
    let path = snapshot_path(ctx, &chain.vm, "merged.snap").await?;
    let ordered = order(ctx, FaultOrder::next(FaultKind::HostDiskFull))?;
    let merging = ctx.backend().merge_snapshot(chain.last(), Some(path.clone()));
    let outcome = ctx.within(LONG, "a merge that fails", merging).await?;
    ordered.must_have_fired(ctx)?;
    ensure_err!(outcome, VmErrorKind::ResourceExhausted { .. }, "a merge on a full disk");
    let nothing = Snapshot::new(path, chain.last().metadata.clone());
    ensure_err!(
        ctx.backend().restore(&nothing, RestoreOptions::running()).await,
        VmErrorKind::HostIo { .. },
        "a restore from where nothing was merged"
    );
    chain.whole(ctx, "in a machine from a chain that could not be merged").await?;
    chain.done(ctx).await
}

/// Takes another snapshot, or merges the chain, in the moment of a fault.
async fn write_under(ctx: &Context, chain: &Chain) -> Result<VmResult<Snapshot>, Broken> {
    let last = chain.last();
    if ctx.one_in(2) {
        let taking = chain.vm.snapshot(on(last));
        return ctx.within(LONG, "a snapshot as the host dies", taking).await;
    }
    let merging = ctx.backend().merge_snapshot(last, None);
    ctx.within(LONG, "a merge as the host dies", merging).await
}

async fn torn(ctx: &Context) -> Verdict {
    let chain = Chain::take(ctx, (1, 2)).await?;
    let ordered = order(ctx, FaultOrder::next(FaultKind::TornWrite))?;
    let outcome = write_under(ctx, &chain).await?;
    ordered.must_have_fired(ctx)?;
    ensure!(outcome.is_err(), "what was torn was Ok");
    until_settled(ctx, &chain.vm).await?;
    chain.whole(ctx, "in a machine from the chain before the host died").await?;
    truthful(ctx, &chain.vm, "after the host died").await?;
    chain.done(ctx).await
}

async fn lost(ctx: &Context) -> Verdict {
    let chain = Chain::take(ctx, (1, 2)).await?;
    let ordered = order(ctx, FaultOrder::next(FaultKind::LostSync))?;
    let written = write_under(ctx, &chain).await?;
    ordered.must_have_fired(ctx)?;
    if !chain.vm.state().is_ended() {
        let lost = order(ctx, FaultOrder::next(FaultKind::HostLost))?;
        until_settled(ctx, &chain.vm).await?;
        super::probe::until(ctx, "the host to be lost", || chain.vm.state().is_ended()).await?;
        lost.must_have_fired(ctx)?;
    }
    chain.whole(ctx, "in a machine from the chain that was synced").await?;
    if let Ok(snapshot) = written {
        match ctx.backend().restore(&snapshot, RestoreOptions::running()).await {
            Ok(restored) => {
                chain.last_nonce().there(&restored, "in a machine from a lost snapshot").await?;
            }
            refused => ensure_err!(
                refused,
                VmErrorKind::SnapshotCorrupt { .. } | VmErrorKind::HostIo { .. },
                "a restore from a snapshot that the disk lost"
            ),
        }
    }
    truthful(ctx, &chain.vm, "after the host was lost").await
}

async fn rot(ctx: &Context) -> Verdict {
    let chain = Chain::take(ctx, (1, 2)).await?;
    let ordered = order(ctx, FaultOrder::next(FaultKind::BitRot))?;
    let outcome = match ctx.draw(0, 2) {
        0 => ctx.backend().restore(chain.last(), RestoreOptions::running()).await.map(drop),
        1 => ctx.backend().merge_snapshot(chain.last(), None).await.map(drop),
        _ => ctx.backend().export_snapshot(chain.last()).await.map(drop),
    };
    ordered.must_have_fired(ctx)?;
    ensure_err!(outcome, VmErrorKind::SnapshotCorrupt { .. }, "a use of a rotten chain");
    chain.last_nonce().there(&chain.vm, "in the source").await?;
    refused(ctx, &chain, "with a rotten link").await?;
    chain.done(ctx).await
}

async fn skew(ctx: &Context) -> Verdict {
    let chain = Chain::take(ctx, (1, 2)).await?;
    let ordered = order(ctx, FaultOrder::next(FaultKind::VersionSkew))?;
    let outcome = ctx.backend().restore(chain.last(), RestoreOptions::running()).await;
    ordered.must_have_fired(ctx)?;
    ensure_err!(
        outcome,
        VmErrorKind::SnapshotIncompatible { field, found, wanted }
            if !field.is_empty() && found != wanted,
        "a restore from another version's chain"
    );
    chain.whole(ctx, "in a machine from a chain of this version").await?;
    chain.done(ctx).await
}
