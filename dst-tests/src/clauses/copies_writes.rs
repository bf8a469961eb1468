//! Copies of machines whose programs write, and many copies of one machine.

use super::{
    copies::{Way, Writer, attached, forked, paused_at_times},
    probe::{SOON, Vm, disk, millis, random, read_to_end, script, started, works},
};
use crate::{
    clause,
    clause::{Clause, Verdict},
    context::Context,
    ensure, ensure_eq,
};
use futures_util::future::{join, try_join_all};
use std::collections::BTreeSet;
use vm_trait::{Capability, ExecStatus, GuestProcess};

/// The clauses on snapshots of machines whose programs write.
pub(super) const SNAPSHOT_CLAUSES: &[Clause] = &[
    clause!(snapshot_writes, "snapshot.amid_writes",
        "a snapshot amid heavy writes is of one instant, programs in memory included, and the source goes on unharmed",
        [Exec, Files, Snapshot], faults: []),
    clause!(snapshot_disks, "snapshot.disks_amid_writes",
        "a snapshot amid heavy writes to memory and a disk is of the same instant of both",
        [Exec, Files, Disks, Snapshot], faults: []),
];

/// The clauses on forks of machines whose programs write, and on many forks.
pub(super) const FORK_CLAUSES: &[Clause] = &[
    clause!(fork_writes, "fork.amid_writes",
        "a fork amid heavy writes is of one instant, and source and children go on unharmed",
        [Exec, Files, Fork], faults: []),
    clause!(fork_disks, "fork.disks_amid_writes",
        "a fork amid heavy writes to memory and a disk is of the same instant of both",
        [Exec, Files, Disks, Fork], faults: []),
    clause!(again_and_again, "fork.again_and_again",
        "a machine can be forked again and again while its programs write; each child is of its own instant",
        [Exec, Files, Fork], faults: []),
    clause!(own_outcomes, "fork.children_have_outcomes",
        "a program that waits at a fork can be told something else in each child, and ends there in its own way",
        [Exec, Fork], faults: []),
    clause!(descendants, "fork.descendants_draw_differently",
        "children of children, machines restored of them, and the source draw different random bytes at once",
        [Exec, Fork, GuestKernel], faults: []),
];

async fn snapshot_writes(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    amid_writes(ctx, Way::Restore, &vm, None).await
}

async fn fork_writes(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    amid_writes(ctx, Way::Fork, &vm, None).await
}

async fn snapshot_disks(ctx: &Context) -> Verdict {
    let disk = disk(ctx, "/data");
    let vm = started(ctx, |config| config.disks.push(disk)).await?;
    amid_writes(ctx, Way::Restore, &vm, Some("/data")).await
}

async fn fork_disks(ctx: &Context) -> Verdict {
    let disk = disk(ctx, "/data");
    let vm = started(ctx, |config| config.disks.push(disk)).await?;
    amid_writes(ctx, Way::Fork, &vm, Some("/data")).await
}

async fn amid_writes(ctx: &Context, way: Way, vm: &Vm, disk: Option<&str>) -> Verdict {
    let memory = ctx.scratch(&**vm);
    let memory = memory.as_str();
    let mut writers = Vec::new();
    for number in 0..if ctx.heavy(3) { 2 } else { 1 } {
        let places = match disk {
            None => (memory, memory),
            Some(disk) if number % 2 == 0 => (disk, memory),
            Some(disk) => (memory, disk),
        };
        writers.push(Writer::begin(ctx, vm, places).await?);
    }
    let mut rounds = Vec::new();
    for _ in 0..ctx.draw(1, 2) {
        ctx.sleep(millis(ctx, 0, 60)).await;
        let written = try_join_all(writers.iter().map(|writer| writer.written(vm))).await?;
        let copies = way.copies(ctx, vm, ctx.draw(1, 2)).await?;
        rounds.push((written, copies));
    }
    for (written, copies) in &rounds {
        for copy in copies {
            for (writer, least) in writers.iter().zip(written) {
                writer.copied(ctx, copy, *least, way.copy()).await?;
            }
        }
    }
    let last = rounds.pop().map(|(written, _)| written).unwrap_or_default();
    for (writer, least) in writers.into_iter().zip(last) {
        writer.source(ctx, vm, least).await?;
    }
    Ok(())
}

async fn again_and_again(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let scratch = ctx.scratch(&*vm);
    let writer = Writer::begin(ctx, &vm, (&scratch, &scratch)).await?;
    let mut kept = Vec::new();
    let mut least = 0;
    for _ in 0..ctx.draw(4, 8) {
        ctx.sleep(millis(ctx, 0, 30)).await;
        least = writer.written(&vm).await?;
        let mut children = forked(&vm, ctx.draw(1, 3)).await?;
        // Some go at once, some stay beside the others.
        if let Some(child) = children.pop().filter(|_| ctx.one_in(2)) {
            kept.push((least, child));
        }
    }
    for (least, child) in &kept {
        writer.copied(ctx, child, *least, "in a child of one of many forks").await?;
    }
    writer.source(ctx, &vm, least).await
}

async fn own_outcomes(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let waits = script("echo ready; read word; echo got $word; exit $word").open_stdin();
    let process = vm.spawn(waits).await?;
    super::probe::read_until(&process, "ready\n").await?;
    let paused = paused_at_times(ctx, &vm).await?;
    let mut children = forked(&vm, ctx.draw(2, 8)).await?;
    for child in children.iter().filter(|_| paused) {
        child.resume().await?;
    }
    if paused {
        vm.resume().await?;
    }
    let killed = children.swap_remove(ctx.index(children.len()));
    let id = process.id();
    let told = (1_u8..).zip(&children).map(|(code, child)| async move {
        is_told(ctx, &attached(child, id).await?, code, &format!("in child {code}")).await
    });
    let (ended, told) = join(killed.kill(), try_join_all(told)).await;
    ended?;
    told?;
    is_told(ctx, &process, 100, "in the source").await?;
    works(ctx, &vm, "after the children's ends").await
}

/// Tells a program that waits a number, with which it is to end.
async fn is_told(ctx: &Context, process: &GuestProcess, code: u8, when: &str) -> Verdict {
    process.write_stdin(format!("{code}\n")).await?;
    let said =
        ctx.within(SOON, "the end of a program that is told", read_to_end(process)).await??;
    let said = String::from_utf8_lossy(&said);
    ensure!(said.ends_with(&format!("got {code}\n")), "{when}: the program said `{said}`");
    ensure_eq!(process.wait().await?, ExecStatus::Exited(code), "{when}: its end");
    Ok(())
}

async fn descendants(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let mut machines = forked(&vm, ctx.draw(1, 3)).await?;
    for parent in 0..machines.len() {
        let of_child = forked(&machines[parent], ctx.draw(1, 2)).await?;
        machines.extend(of_child);
    }
    if ctx.has(Capability::Snapshot) {
        let copied = machines[ctx.index(machines.len())].clone();
        machines.extend(Way::Restore.copies(ctx, &copied, 2).await?);
    }
    machines.push(vm);
    let mut drawn = BTreeSet::new();
    for round in 1..=2 {
        // All at once: none may wait for what another one brings in.
        let bytes = try_join_all(machines.iter().map(random)).await?;
        drawn.extend(bytes);
        ensure_eq!(
            drawn.len(),
            machines.len() * round,
            "different random bytes after {round} draws"
        );
    }
    Ok(())
}
