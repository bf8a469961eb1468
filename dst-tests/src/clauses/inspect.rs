//! Looking at a machine from outside.

use super::probe::{Stage, Vm};
use crate::{
    clause,
    clause::{Broken, Clause, Verdict},
    context::Context,
    ensure, ensure_eq, ensure_err,
};
use vm_trait::{
    ForkOptions, Inspection, RestoreOptions, SnapshotOptions, VmConfig, VmErrorKind, VmInstance,
    VmInstanceExt, VmState,
};

/// The clauses on inspection.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(shape, "inspect.is_of_the_machine",
        "an inspection has every vCPU with registers and exits, and exactly the memory that is configured",
        [Pause, Inspect], faults: []),
    clause!(still, "inspect.changes_nothing",
        "a machine that stands still looks the same each time, and another way once it ran on",
        [Exec, Pause, Inspect], faults: []),
    clause!(refused, "inspect.of_paused_machines_alone",
        "a machine that is not Paused is not looked at, and its state stays", [Exec, Files, Inspect], faults: []),
    clause!(forked, "inspect.child_stands_where_its_parent_stood",
        "the vCPUs of a forked child have the registers of its parent", [Pause, Fork, Inspect], faults: []),
    clause!(restored, "inspect.restored_stands_where_it_was_captured",
        "the vCPUs of a restored machine have the registers with which they were captured",
        [Pause, Snapshot, Inspect], faults: []),
];

/// Looks at a machine, and checks that what is seen makes sense.
async fn look(vm: &dyn VmInstance) -> Result<Inspection, Broken> {
    let seen = vm.inspect().await?;
    let VmConfig { vcpus, memory, .. } = vm.config();
    ensure_eq!(seen.vcpus.len(), usize::from(*vcpus), "the vCPUs");
    for (id, vcpu) in seen.vcpus.iter().enumerate() {
        ensure!(!vcpu.registers.is_empty(), "vCPU {id} has no registers");
        match &vcpu.last_exit {
            Some(last) => {
                ensure!(
                    vcpu.exits.contains_key(last),
                    "vCPU {id}: {last} is not in {:?}",
                    vcpu.exits
                );
            }
            None => ensure!(vcpu.exits.is_empty(), "vCPU {id}: {:?} and no last one", vcpu.exits),
        }
    }
    let (mut bytes, mut end) = (0, 0);
    for region in &seen.memory {
        ensure!(region.bytes > 0 && region.start >= end, "memory overlaps: {:?}", seen.memory);
        end = region.start + region.bytes;
        bytes += region.bytes;
    }
    ensure_eq!(bytes, memory.bytes(), "the memory in {:?}", seen.memory);
    Ok(seen)
}

/// Checks that two machines stand at the same place.
fn same_place(one: &Inspection, other: &Inspection, what: &str) -> Verdict {
    for (id, (one, other)) in one.vcpus.iter().zip(&other.vcpus).enumerate() {
        for (name, value) in &one.registers {
            let found = other.registers.get(name);
            ensure_eq!(found, Some(value), "{what}: {name} of vCPU {id}");
        }
    }
    ensure_eq!(one.memory, other.memory, "{what}: the memory");
    Ok(())
}

async fn shape(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    vm.pause().await?;
    let seen = look(&*vm).await?;
    ensure!(
        seen.vcpus.iter().any(|vcpu| vcpu.exits.values().any(|count| *count > 0)),
        "no vCPU ever came back: {:?}",
        seen.vcpus
    );
    Ok(vm.resume().await?)
}

async fn still(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    vm.pause().await?;
    let first = look(&*vm).await?;
    ctx.sleep(super::probe::millis(ctx, 1, 50)).await;
    ensure_eq!(look(&*vm).await?, first, "the second look at a machine that stands still");
    vm.resume().await?;
    vm.sh("true").await?;
    vm.pause().await?;
    ensure!(look(&*vm).await? != first, "the machine ran on and looks as before");
    Ok(vm.resume().await?)
}

async fn refused(ctx: &Context) -> Verdict {
    let stages: Vec<_> =
        Stage::reachable(ctx).into_iter().filter(|stage| *stage != Stage::Paused).collect();
    let stage = ctx.pick(&stages);
    let vm: Vm = stage.reach(ctx).await?;
    let before = vm.state();
    ensure_err!(
        vm.inspect().await,
        VmErrorKind::InvalidState { state } if *state == before,
        "a look at a machine in {stage:?}"
    );
    ensure_eq!(vm.state(), before, "the state after a refused look");
    Ok(())
}

async fn forked(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    vm.pause().await?;
    let parent = look(&*vm).await?;
    for child in vm.fork(ForkOptions::new(2)).await? {
        let child = child?;
        ensure_eq!(child.state(), VmState::Paused, "the child of a paused machine");
        same_place(&parent, &look(&*child).await?, "a forked child")?;
    }
    same_place(&parent, &look(&*vm).await?, "the parent after a fork")?;
    Ok(vm.resume().await?)
}

async fn restored(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    vm.pause().await?;
    let source = look(&*vm).await?;
    let snapshot = vm.snapshot(SnapshotOptions::default()).await?;
    let restored = ctx.backend().restore(&snapshot, RestoreOptions::paused()).await?;
    same_place(&source, &look(&*restored).await?, "a restored machine")?;
    restored.resume().await?;
    drop(restored);
    Ok(ctx.backend().delete_snapshot(&snapshot).await?)
}
