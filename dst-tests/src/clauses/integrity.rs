//! Damaged and foreign snapshots.

use super::probe::{Nonce, Vm, made, order, truthful};
use crate::{
    clause,
    clause::{Broken, Clause, Verdict},
    context::Context,
    ensure, ensure_eq, ensure_err,
};
use bytes::Bytes;
use vm_core::fault::{FaultKind, FaultOrder};
use vm_trait::{
    Capability, Mib, RestoreOptions, Snapshot, SnapshotOptions, VmConfig, VmErrorKind,
    VmInstanceExt, VmState,
};

/// The clauses on integrity.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(flips, "integrity.flipped_bytes_refused",
        "a snapshot with a flipped bit anywhere is refused with SnapshotCorrupt", [Snapshot], faults: []),
    clause!(flips_at_the_edges, "integrity.every_header_byte_counts",
        "there is no byte of header and manifest that can be changed unnoticed", [Snapshot], faults: []),
    clause!(truncations, "integrity.truncated_refused",
        "a snapshot that was cut off anywhere is refused with SnapshotCorrupt", [Snapshot], faults: []),
    clause!(extensions, "integrity.extended_refused",
        "a snapshot with bytes added anywhere is refused with SnapshotCorrupt", [Snapshot], faults: []),
    clause!(random_bytes, "integrity.random_bytes_refused",
        "bytes that are no snapshot are refused with SnapshotCorrupt", [Snapshot], faults: []),
    clause!(splices, "integrity.spliced_refused",
        "a snapshot put together from two is refused with SnapshotCorrupt", [Exec, Files, Snapshot], faults: []),
    clause!(bit_rot, "integrity.bit_rot_refused",
        "a restore notices a byte that changed in the file, and leaves the machine as it was",
        [Exec, Files, Snapshot], faults: [BitRot]),
    clause!(bit_rot_in_place, "integrity.bit_rot_refused_in_place",
        "a restore in place notices a byte that changed in the file, and the machine starts afterwards",
        [Exec, Files, Snapshot, RestoreInPlace], faults: [BitRot]),
    clause!(version_skew, "integrity.other_version_refused",
        "a snapshot of another version is refused with SnapshotIncompatible and the field",
        [Exec, Snapshot], faults: [VersionSkew]),
    clause!(other_size, "integrity.other_size_refused",
        "a restore into a machine of another size is refused with SnapshotIncompatible and the field",
        [Exec, Snapshot, RestoreInPlace], faults: []),
    clause!(refused_import_is_harmless, "integrity.refused_import_is_harmless",
        "after refused imports the whole snapshot can still be imported and restored",
        [Exec, Files, Snapshot], faults: []),
];

/// Takes a snapshot of a running machine and gives its bytes.
async fn exported(ctx: &Context, vm: &Vm) -> Result<Bytes, Broken> {
    // A machine that holds more has a longer image, which stands apart from what comes before it.
    if ctx.has(Capability::Files) && ctx.one_in(2) {
        vm.write(&format!("{}/filler", ctx.scratch(&**vm)), ctx.bytes(16 << 10)).await?;
    }
    let snapshot = vm.snapshot(SnapshotOptions::default()).await?;
    let bytes = ctx.backend().export_snapshot(&snapshot).await?;
    ctx.backend().delete_snapshot(&snapshot).await?;
    Ok(bytes)
}

/// Checks that bytes are refused as damaged.
async fn refused(ctx: &Context, bytes: Bytes, what: &str) -> Verdict {
    let outcome = ctx.backend().import_snapshot(bytes).await;
    ensure_err!(outcome, VmErrorKind::SnapshotCorrupt { .. }, "an import of {what}");
    Ok(())
}

/// Draws a position, half of the time near the beginning or the end, where the header and manifest are.
fn position(ctx: &Context, length: usize) -> usize {
    let near = length.min(4096);
    match ctx.draw(0, 3) {
        0 => ctx.index(near),
        1 => length - 1 - ctx.index(near),
        _ => ctx.index(length),
    }
}

/// Changes a byte by a drawn pattern that is not nothing.
fn flip(ctx: &Context, bytes: &Bytes, at: usize) -> Bytes {
    let mut changed = bytes.to_vec();
    let pattern = if ctx.one_in(2) { 1 << ctx.draw(0, 7) } else { ctx.draw(1, 255) };
    changed[at] ^= u8::try_from(pattern).unwrap_or(1);
    changed.into()
}

async fn flips(ctx: &Context) -> Verdict {
    let bytes = exported(ctx, &ctx.running().await?).await?;
    for _ in 0..ctx.draw(4, 8) {
        let at = position(ctx, bytes.len());
        let what = format!("{} bytes with a flip at {at}", bytes.len());
        refused(ctx, flip(ctx, &bytes, at), &what).await?;
    }
    Ok(())
}

async fn flips_at_the_edges(ctx: &Context) -> Verdict {
    /// Above this size only the beginning is tried: each import reads all of the bytes.
    const SMALL: usize = 1 << 20;
    let bytes = exported(ctx, &ctx.running().await?).await?;
    let edge = bytes.len().min(4096);
    // One run in 32 goes through every position, the others through a stretch of them.
    let positions: Vec<usize> = if bytes.len() <= SMALL && ctx.one_in(32) {
        (0..edge).chain(bytes.len() - edge..bytes.len()).collect()
    } else {
        let start = ctx.index(edge);
        (start..edge.min(start + 8)).collect()
    };
    for at in positions {
        let what = format!("{} bytes with a flip at {at}", bytes.len());
        refused(ctx, flip(ctx, &bytes, at), &what).await?;
    }
    Ok(())
}

async fn truncations(ctx: &Context) -> Verdict {
    let bytes = exported(ctx, &ctx.running().await?).await?;
    refused(ctx, Bytes::new(), "nothing").await?;
    refused(ctx, bytes.slice(..bytes.len() - 1), "all but the last byte").await?;
    for _ in 0..ctx.draw(3, 6) {
        let length = position(ctx, bytes.len());
        let what = format!("the first {length} of {} bytes", bytes.len());
        refused(ctx, bytes.slice(..length), &what).await?;
    }
    let at = position(ctx, bytes.len());
    let mut without = bytes.to_vec();
    without.remove(at);
    refused(ctx, without.into(), &format!("all bytes but that at {at}")).await
}

async fn extensions(ctx: &Context) -> Verdict {
    let bytes = exported(ctx, &ctx.running().await?).await?;
    for _ in 0..ctx.draw(2, 4) {
        let more = ctx.draw(1, 5000);
        let more = usize::try_from(more).unwrap_or(1);
        let extra = if ctx.one_in(2) { ctx.bytes(more) } else { Bytes::from(vec![0; more]) };
        let at = ctx.pick(&[bytes.len(), 0, position(ctx, bytes.len())]);
        let changed = [&bytes[..at], &extra[..], &bytes[at..]].concat();
        refused(ctx, changed.into(), &format!("a snapshot with {more} bytes added at {at}"))
            .await?;
    }
    let twice = [&bytes[..], &bytes[..]].concat();
    refused(ctx, twice.into(), "a snapshot twice over").await
}

async fn random_bytes(ctx: &Context) -> Verdict {
    for _ in 0..ctx.draw(3, 6) {
        let length = usize::try_from(ctx.draw(0, 10_000)).unwrap_or(0);
        let bytes = if ctx.one_in(4) { Bytes::from(vec![0; length]) } else { ctx.bytes(length) };
        refused(ctx, bytes, &format!("{length} bytes that are no snapshot")).await?;
    }
    Ok(())
}

async fn splices(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let nonce = Nonce::plant(ctx, &vm).await?;
    let first = exported(ctx, &vm).await?;
    nonce.replace(ctx, &vm).await?;
    let second = exported(ctx, &vm).await?;
    let same = first.iter().zip(&second).take_while(|(one, other)| one == other).count();
    let shorter = first.len().min(second.len());
    ensure!(same < shorter, "two snapshots of different states are the same");
    // A cut where both are the same on one side would give one of the two.
    let alike_at_end =
        first.iter().rev().zip(second.iter().rev()).take_while(|(one, other)| one == other).count();
    let (low, high) = (same + 1, shorter.saturating_sub(alike_at_end));
    if low >= high {
        return Ok(());
    }
    for _ in 0..ctx.draw(2, 4) {
        let at = low + ctx.index(high - low);
        let spliced = [&first[..at], &second[at..]].concat();
        if spliced != first && spliced != second {
            refused(ctx, spliced.into(), &format!("two snapshots joined at {at}")).await?;
        }
    }
    Ok(())
}

async fn bit_rot(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let nonce = Nonce::plant(ctx, &vm).await?;
    let snapshot = vm.snapshot(SnapshotOptions::default()).await?;
    let spare = vm.snapshot(SnapshotOptions::default()).await?;
    let ordered = order(ctx, FaultOrder::next(FaultKind::BitRot))?;
    let outcome = ctx.backend().restore(&snapshot, RestoreOptions::running()).await;
    ordered.must_have_fired(ctx)?;
    ensure_err!(outcome, VmErrorKind::SnapshotCorrupt { .. }, "a restore from a rotten file");
    nonce.there(&vm, "in the source").await?;
    let restored = ctx.backend().restore(&spare, RestoreOptions::running()).await?;
    nonce.there(&restored, "in a machine from another snapshot").await?;
    ctx.backend().delete_snapshot(&spare).await?;
    Ok(ctx.backend().delete_snapshot(&snapshot).await?)
}

async fn bit_rot_in_place(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let snapshot: Snapshot = vm.snapshot(SnapshotOptions::default()).await?;
    vm.kill().await?;
    let ordered = order(ctx, FaultOrder::next(FaultKind::BitRot))?;
    let outcome = vm.restore(&snapshot, RestoreOptions::running()).await;
    ordered.must_have_fired(ctx)?;
    ensure_err!(outcome, VmErrorKind::SnapshotCorrupt { .. }, "a restore from a rotten file");
    ensure!(vm.state().is_ended(), "after a refused restore the state is {}", vm.state());
    truthful(ctx, &vm, "after a refused restore").await?;
    Ok(ctx.backend().delete_snapshot(&snapshot).await?)
}

async fn version_skew(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let snapshot = vm.snapshot(SnapshotOptions::default()).await?;
    let ordered = order(ctx, FaultOrder::next(FaultKind::VersionSkew))?;
    let outcome = ctx.backend().restore(&snapshot, RestoreOptions::running()).await;
    ordered.must_have_fired(ctx)?;
    ensure_err!(
        outcome,
        VmErrorKind::SnapshotIncompatible { field, found, wanted }
            if !field.is_empty() && found != wanted,
        "a restore from another version's snapshot"
    );
    truthful(ctx, &vm, "after a refused restore").await?;
    Ok(ctx.backend().delete_snapshot(&snapshot).await?)
}

async fn other_size(ctx: &Context) -> Verdict {
    let limits = ctx.backend().limits();
    let vm = ctx.running().await?;
    let snapshot = vm.snapshot(SnapshotOptions::default()).await?;
    vm.kill().await?;
    let by_memory = limits.max_vcpus < 2 || ctx.one_in(2);
    let VmConfig { memory, vcpus, .. } = *vm.config();
    let other = made(ctx, |config| {
        if by_memory {
            let least = u64::from(VmConfig::MIN_MEMORY.0);
            let drawn = Mib(u32::try_from(ctx.draw(least, u64::from(memory.0) - 1)).unwrap_or(64));
            config.memory = drawn;
        } else {
            config.vcpus = vcpus + 1;
        }
    })
    .await?;
    let expected = if by_memory { "memory" } else { "vcpus" };
    let outcome = other.restore(&snapshot, RestoreOptions::running()).await;
    ensure_err!(
        outcome,
        VmErrorKind::SnapshotIncompatible { field, .. } if field == expected,
        "a restore into a machine of other {expected}"
    );
    ensure!(
        !matches!(other.state(), VmState::Running | VmState::Paused),
        "after a refused restore the state is {}",
        other.state()
    );
    truthful(ctx, &other, "after a refused restore").await?;
    Ok(ctx.backend().delete_snapshot(&snapshot).await?)
}

async fn refused_import_is_harmless(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let nonce = Nonce::plant(ctx, &vm).await?;
    let bytes = exported(ctx, &vm).await?;
    for _ in 0..ctx.draw(1, 3) {
        refused(ctx, flip(ctx, &bytes, position(ctx, bytes.len())), "damaged bytes").await?;
    }
    let imported = ctx.backend().import_snapshot(bytes).await?;
    let restored = ctx.backend().restore(&imported, RestoreOptions::running()).await?;
    nonce.there(&restored, "in a machine from an imported snapshot").await?;
    let output = restored.run("true", []).await?;
    ensure_eq!(output.status.success(), true, "`true` in it");
    Ok(ctx.backend().delete_snapshot(&imported).await?)
}
