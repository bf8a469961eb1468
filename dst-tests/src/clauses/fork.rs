//! Forks.

use super::{
    copies::forked,
    probe::{
        Nonce, SOON, Stage, Ticker, Vm, disk, made, order, random, read_to_end, read_until,
        spawn_sh, started, truthful, uptime, works,
    },
};
use crate::{
    clause,
    clause::{Broken, Clause, Verdict},
    context::Context,
    ensure, ensure_eq, ensure_err,
};
use futures_util::future::{join, join_all};
use std::{collections::BTreeSet, time::Duration};
use vm_core::fault::{FaultKind, FaultOrder};
use vm_trait::{Capability, ForkOptions, StopOptions, VmErrorKind, VmState};

/// The clauses on forks.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(children_have_memory, "fork.children_have_memory",
        "each child has the memory and the processes of the source, and all go on",
        [Exec, Files, Fork], faults: []),
    clause!(isolated, "fork.writes_are_isolated",
        "a write in a child or the source is seen by none of the others", [Exec, Files, Fork], faults: []),
    clause!(own_ids, "fork.children_have_ids",
        "children have ids of their own and the configuration of the source", [Exec, Fork], faults: []),
    clause!(own_randomness, "fork.children_draw_differently",
        "children and source draw different random bytes at once", [Exec, Fork, GuestKernel], faults: []),
    clause!(source_goes_on, "fork.source_goes_on",
        "the source keeps its state, and its streams lose and double no byte", [Exec, Fork], faults: []),
    clause!(grandchildren, "fork.grandchildren",
        "a child can be forked, and outlives its parents", [Exec, Files, Fork], faults: []),
    clause!(of_paused, "fork.of_paused",
        "the fork of a paused machine gives paused children", [Exec, Files, Fork, Pause], faults: []),
    clause!(partial_failure, "fork.partial_failure",
        "a child that cannot be made fails alone; the others and the source go on",
        [Exec, Files, Fork], faults: [ForkChildFail]),
    clause!(count_checked, "fork.count_is_checked",
        "a fork into 0 or more than 1,024 children is refused with InvalidConfig", [Exec, Fork], faults: []),
    clause!(private_disks, "fork.disks_are_private",
        "a write to a child's disk is seen by none of the others", [Exec, Files, Disks, Fork], faults: []),
    clause!(childs_disk, "fork.childs_disk_goes_with_it",
        "what a child wrote to its disk is gone with the child: the source's next life has the source's disk",
        [Exec, Files, Disks, Fork], faults: []),
    clause!(clocks, "fork.monotonic_time_goes_on",
        "a child's monotonic clock goes on from the source's", [Exec, Fork, GuestKernel], faults: []),
    clause!(restartable, "fork.children_are_machines",
        "a child stops, starts and is killed as any machine", [Exec, Files, Fork], faults: []),
];

async fn children_have_memory(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let nonce = Nonce::plant(ctx, &vm).await?;
    let ticker = Ticker::begin(ctx, &vm).await?;
    let children = forked(&vm, ctx.draw(1, 8)).await?;
    for child in &children {
        ensure_eq!(child.state(), VmState::Running, "the state of a child");
        nonce.there(child, "in a child").await?;
        ticker.goes_on(ctx, child, "in a child").await?;
    }
    nonce.there(&vm, "in the source").await?;
    ticker.goes_on(ctx, &vm, "in the source").await
}

async fn isolated(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let nonce = Nonce::plant(ctx, &vm).await?;
    let mut all = forked(&vm, ctx.draw(1, 4)).await?;
    all.push(vm);
    let mut values = Vec::new();
    let mut own = Vec::new();
    for machine in &all {
        values.push(nonce.replace(ctx, machine).await?);
        own.push(Nonce::plant(ctx, machine).await?);
    }
    for (index, machine) in all.iter().enumerate() {
        values[index].there(machine, "what was written last").await?;
        for (other, nonce) in own.iter().enumerate() {
            if other == index {
                nonce.there(machine, "a machine's own file").await?;
            } else {
                nonce.gone(machine, "another machine's file").await?;
            }
        }
    }
    Ok(())
}

async fn own_ids(ctx: &Context) -> Verdict {
    let hostname = format!("h{:x}", ctx.draw(0, u64::MAX));
    let vm = started(ctx, |config| config.hostname = hostname).await?;
    let children = forked(&vm, ctx.draw(1, 6)).await?;
    let ids: BTreeSet<_> = children.iter().chain([&vm]).map(|machine| machine.id()).collect();
    ensure_eq!(ids.len(), children.len() + 1, "different ids");
    for child in &children {
        ensure_eq!(*child.config(), *vm.config(), "the configuration of a child");
    }
    Ok(())
}

async fn own_randomness(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let children = forked(&vm, ctx.draw(2, 6)).await?;
    let all: Vec<&Vm> = children.iter().chain([&vm]).collect();
    let drawn = join_all(all.iter().map(|machine| random(machine))).await;
    let drawn: BTreeSet<_> = drawn.into_iter().collect::<Result<_, _>>()?;
    ensure_eq!(drawn.len(), all.len(), "different random bytes");
    Ok(())
}

async fn source_goes_on(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let lines = ctx.draw(8, 25);
    let program =
        format!("i=0; while [ $i -lt {lines} ]; do echo line $i; i=$((i+1)); sleep 0.01; done");
    let process = spawn_sh(&vm, &program).await?;
    let seen = read_until(&process, "line 1\n").await?;
    let (children, rest) = join(forked(&vm, ctx.draw(1, 4)), read_to_end(&process)).await;
    let children = children?;
    let text = seen + &String::from_utf8_lossy(&rest?);
    let expected: String = (0..lines).map(|n| format!("line {n}\n")).collect();
    ensure_eq!(text, expected, "the output of a process of the source");
    ensure_eq!(vm.state(), VmState::Running, "the state of the source");
    drop(children);
    works(ctx, &vm, "after the children's end").await
}

async fn grandchildren(ctx: &Context) -> Verdict {
    let mut vm = ctx.running().await?;
    let mut nonces = vec![Nonce::plant(ctx, &vm).await?];
    for _ in 0..ctx.draw(1, 3) {
        let mut children = forked(&vm, ctx.draw(1, 2)).await?;
        vm = children.pop().ok_or_else(|| Broken::new("no child"))?;
        drop(children);
        for nonce in &nonces {
            nonce.there(&vm, "in a descendant").await?;
        }
        nonces.push(Nonce::plant(ctx, &vm).await?);
    }
    works(ctx, &vm, "after the parents' end").await
}

async fn of_paused(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let nonce = Nonce::plant(ctx, &vm).await?;
    vm.pause().await?;
    let children = forked(&vm, ctx.draw(1, 4)).await?;
    ensure_eq!(vm.state(), VmState::Paused, "the state of the source");
    for child in &children {
        ensure_eq!(child.state(), VmState::Paused, "the state of a child");
        child.resume().await?;
        nonce.there(child, "in a child").await?;
    }
    vm.resume().await?;
    nonce.there(&vm, "in the source").await
}

async fn partial_failure(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let nonce = Nonce::plant(ctx, &vm).await?;
    let count = u32::try_from(ctx.draw(2, 6)).unwrap_or(2);
    let skip = u32::try_from(ctx.draw(0, u64::from(count) - 1)).unwrap_or(0);
    let ordered = order(ctx, FaultOrder::next(FaultKind::ForkChildFail).after(skip))?;
    let children = vm.fork(ForkOptions::new(count)).await?;
    ordered.must_have_fired(ctx)?;
    ensure_eq!(children.len(), usize::try_from(count).unwrap_or(0), "the number of outcomes");
    let failed = children.iter().filter(|child| child.is_err()).count();
    ensure_eq!(failed, 1, "children that failed");
    for child in children.into_iter().flatten() {
        nonce.there(&child, "in a child beside one that failed").await?;
    }
    ensure_eq!(vm.state(), VmState::Running, "the state of the source");
    nonce.there(&vm, "in the source").await?;
    let again = forked(&vm, 1).await?;
    nonce.there(&again[0], "in a child of the next fork").await
}

async fn count_checked(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let count = ctx.pick(&[0, 1025, u32::MAX, u32::try_from(ctx.draw(1025, 1 << 20)).unwrap_or(0)]);
    ensure_err!(
        vm.fork(ForkOptions::new(count)).await,
        VmErrorKind::InvalidConfig { field, .. } if field == "count",
        "a fork into {count} children"
    );
    truthful(ctx, &vm, "after a refused fork").await
}

async fn private_disks(ctx: &Context) -> Verdict {
    let disk = disk(ctx, "/data");
    let vm = started(ctx, |config| config.disks.push(disk)).await?;
    let nonce = Nonce::plant_in(ctx, &vm, "/data").await?;
    let mut all = forked(&vm, ctx.draw(1, 3)).await?;
    all.push(vm);
    let mut values = Vec::new();
    for machine in &all {
        nonce.there(machine, "on the disk after a fork").await?;
        values.push(nonce.replace(ctx, machine).await?);
    }
    for (machine, value) in all.iter().zip(&values) {
        value.there(machine, "on the disk that a machine wrote to").await?;
    }
    Ok(())
}

async fn childs_disk(ctx: &Context) -> Verdict {
    let disk = disk(ctx, "/data");
    let vm = started(ctx, |config| config.disks.push(disk)).await?;
    let nonce = Nonce::plant_in(ctx, &vm, "/data").await?;
    let children = forked(&vm, ctx.draw(1, 2)).await?;
    for child in &children {
        nonce.replace(ctx, child).await?;
    }
    vm.stop(StopOptions::default()).await?;
    for child in &children {
        child.stop(StopOptions::default()).await?;
    }
    drop(children);
    vm.start().await?;
    nonce.there(&vm, "on the disk after the children's end").await
}

async fn clocks(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let begun = ctx.now();
    let before = uptime(&vm).await?;
    let children = forked(&vm, ctx.draw(1, 3)).await?;
    for child in &children {
        let after = uptime(child).await?;
        let most = ctx.now() - begun + Duration::from_millis(11);
        ensure!(after >= before, "a child's clock went back from {before:?} to {after:?}");
        ensure!(after - before <= most, "a child counted {:?} in {most:?}", after - before);
        super::probe::clock_is_right(ctx, child, "in a child").await?;
    }
    Ok(())
}

async fn restartable(ctx: &Context) -> Verdict {
    let paused = ctx.has(Capability::Pause) && ctx.one_in(3);
    let vm = made(ctx, |_| {}).await?;
    (if paused { Stage::Paused } else { Stage::Running }).bring(ctx, &vm).await?;
    let children = forked(&vm, ctx.draw(1, 2)).await?;
    for child in &children {
        ctx.within(SOON, "the end of a child", child.kill()).await??;
        ensure_eq!(child.state(), VmState::Stopped, "the state of a child that was killed");
        truthful(ctx, child, "after a child's end").await?;
    }
    truthful(ctx, &vm, "after the children's restarts").await
}
