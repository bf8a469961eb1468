//! Incremental snapshots and what stands in the place of their base.

use super::probe::{Nonce, Vm, sh, truthful};
use crate::{
    clause,
    clause::{Clause, Verdict},
    context::Context,
    ensure, ensure_err,
};
use vm_trait::{RestoreOptions, Snapshot, SnapshotOptions, VmErrorKind, VmInstanceExt};

/// The clauses on bases.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(replaced, "incremental.replaced_base_is_refused",
        "a snapshot is not taken on a base whose file is another one by now",
        [Exec, Files, Snapshot, IncrementalSnapshot], faults: []),
    clause!(very_base, "incremental.needs_the_very_base",
        "a snapshot whose base was replaced by one that holds the same is refused with SnapshotCorrupt",
        [Exec, Pause, Snapshot, IncrementalSnapshot], faults: []),
    clause!(copied, "incremental.a_copy_of_the_base_will_do",
        "a snapshot is taken on an imported copy of its base, needs that copy and nothing else, and is refused on what was merged",
        [Exec, Snapshot, IncrementalSnapshot], faults: []),
    clause!(went_away, "incremental.what_went_is_gone",
        "what became zeros or was removed since the base is so in the copy, also after a merge",
        [Exec, Files, Snapshot, IncrementalSnapshot], faults: []),
    clause!(in_place, "incremental.changes_amid_a_file",
        "each of several snapshots on one base has every change within a file since then",
        [Exec, Files, Snapshot, IncrementalSnapshot], faults: []),
];

async fn replaced(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let base = vm.snapshot(SnapshotOptions::default().tracked()).await?;
    ctx.backend().delete_snapshot(&base).await?;
    let other = vm.snapshot(SnapshotOptions::default().with_path(&base.path)).await?;
    ensure_err!(
        vm.snapshot(SnapshotOptions::default().on_base(&base)).await,
        VmErrorKind::SnapshotCorrupt { .. },
        "a snapshot on a base that was replaced"
    );
    truthful(ctx, &vm, "after a snapshot that was refused").await?;
    Ok(ctx.backend().delete_snapshot(&other).await?)
}

async fn very_base(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    vm.pause().await?;
    let base = vm.snapshot(SnapshotOptions::default().tracked()).await?;
    let step = vm.snapshot(SnapshotOptions::default().on_base(&base)).await?;
    ctx.backend().delete_snapshot(&base).await?;
    // The machine stood still: it holds the same, byte for byte.
    let other = vm.snapshot(SnapshotOptions::default().with_path(&base.path)).await?;
    let restored = ctx.backend().restore(&step, RestoreOptions::paused()).await;
    ensure_err!(restored, VmErrorKind::SnapshotCorrupt { .. }, "a restore over another base");
    ctx.backend().delete_snapshot(&step).await?;
    Ok(ctx.backend().delete_snapshot(&other).await?)
}

async fn copied(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let base = vm.snapshot(SnapshotOptions::default().tracked()).await?;
    let nonce = Nonce::plant(ctx, &vm).await?;
    let merged = ctx.backend().merge_snapshot(&base, None).await?;
    ensure_err!(
        vm.snapshot(SnapshotOptions::default().on_base(&merged)).await,
        VmErrorKind::InvalidConfig { field, .. } if field == "base",
        "a snapshot on what was merged from its base"
    );
    let bytes = ctx.backend().export_snapshot(&base).await?;
    let copy = ctx.backend().import_snapshot(bytes).await?;
    ensure!(copy.path != base.path, "an import went to the file of the original");
    let step = vm.snapshot(SnapshotOptions::default().on_base(&copy)).await?;
    for gone in [&base, &merged] {
        ctx.backend().delete_snapshot(gone).await?;
    }
    let restored = ctx.backend().restore(&step, RestoreOptions::running()).await?;
    nonce.there(&restored, "in a machine from a snapshot on a copy of its base").await?;
    ctx.backend().delete_snapshot(&copy).await?;
    let restored = ctx.backend().restore(&step, RestoreOptions::running()).await;
    ensure_err!(restored, VmErrorKind::SnapshotCorrupt { .. }, "a restore without the copy");
    Ok(ctx.backend().delete_snapshot(&step).await?)
}

async fn went_away(ctx: &Context) -> Verdict {
    const LENGTH: usize = 128 << 10;
    let vm = ctx.running().await?;
    let scratch = ctx.scratch(&*vm);
    let (zeroed, removed) = (format!("{scratch}/zeroed"), format!("{scratch}/removed"));
    vm.write(&removed, ctx.bytes(2 * LENGTH)).await?;
    vm.write(&zeroed, ctx.bytes(LENGTH)).await?;
    let base = vm.snapshot(SnapshotOptions::default().tracked()).await?;
    vm.remove_all(&removed).await?;
    vm.write(&zeroed, vec![0; LENGTH]).await?;
    let step = vm.snapshot(SnapshotOptions::default().on_base(&base)).await?;
    let merged = ctx.backend().merge_snapshot(&step, None).await?;
    for (snapshot, what) in [(&step, "a chain"), (&merged, "a merged chain")] {
        let copy = ctx.backend().restore(snapshot, RestoreOptions::running()).await?;
        let found = copy.read_file(&zeroed).await?;
        let right = found.len() == LENGTH && found.iter().all(|byte| *byte == 0);
        ensure!(right, "in a machine from {what} zeros are something else");
        ensure!(!copy.exists(&removed).await?, "in a machine from {what} a removed file is there");
    }
    for snapshot in [&merged, &step, &base] {
        ctx.backend().delete_snapshot(snapshot).await?;
    }
    Ok(())
}

/// Writes a word amid a file without changing its length.
async fn change(vm: &Vm, path: &str, word: &str, at: usize) -> Verdict {
    let script = format!("printf {word} | dd of={path} bs=1 seek={at} conv=notrunc 2>/dev/null");
    sh(vm, &script).await.map(drop)
}

async fn in_place(ctx: &Context) -> Verdict {
    const LENGTH: usize = 256 << 10;
    let vm = ctx.running().await?;
    let path = format!("{}/amid", ctx.scratch(&*vm));
    let mut content = ctx.bytes(LENGTH).to_vec();
    vm.write(&path, content.clone()).await?;
    let base = vm.snapshot(SnapshotOptions::default().tracked()).await?;
    let mut taken: Vec<(Snapshot, Vec<u8>)> = Vec::new();
    for _ in 0..ctx.draw(2, 4) {
        let word = format!("{:08x}", ctx.draw(0, u64::from(u32::MAX)));
        let at = ctx.index(LENGTH - word.len());
        change(&vm, &path, &word, at).await?;
        content[at..at + word.len()].copy_from_slice(word.as_bytes());
        let snapshot = vm.snapshot(SnapshotOptions::default().on_base(&base)).await?;
        taken.push((snapshot, content.clone()));
    }
    for (snapshot, content) in &taken {
        let copy = ctx.backend().restore(snapshot, RestoreOptions::running()).await?;
        ensure!(copy.read_file(&path).await? == content[..], "a change amid a file is missing");
        ctx.backend().delete_snapshot(snapshot).await?;
    }
    Ok(ctx.backend().delete_snapshot(&base).await?)
}
