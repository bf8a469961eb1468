//! Metrics.

use super::probe::{SOON, Stage, millis, order, spawn_sh};
use crate::{
    clause,
    clause::{Clause, Verdict},
    context::Context,
    ensure, ensure_eq,
};
use std::time::Duration;
use vm_core::fault::{FaultKind, FaultOrder};
use vm_trait::VmInstanceExt;

/// The clauses on metrics.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(always_answer, "metrics.in_every_state",
        "metrics can be had in every state, and say nothing of a life that is not", [], faults: []),
    clause!(uptime, "metrics.uptime_counts",
        "the uptime counts from the handshake of this life on, pauses included", [Exec], faults: []),
    clause!(paused, "metrics.paused_counts",
        "the time paused counts the pauses of this life", [Pause], faults: []),
    clause!(boot_times, "metrics.boot_times_add_up",
        "the stages of a boot add up to no more than the start took", [], faults: []),
    clause!(processes, "metrics.processes_are_counted",
        "the programs that run are counted", [Exec], faults: []),
    clause!(bytes_counted, "metrics.agent_bytes_are_counted",
        "bytes to and from the agent are counted", [Exec, Files], faults: []),
    clause!(reconnects, "metrics.reconnects_are_counted",
        "connections to the agent that were made anew are counted", [Exec], faults: [LinkDisconnect])
    .undisturbed(),
];

async fn always_answer(ctx: &Context) -> Verdict {
    let stage = ctx.pick(&Stage::reachable(ctx));
    let vm = stage.reach(ctx).await?;
    let metrics = ctx.within(SOON, "metrics", vm.metrics()).await??;
    if stage == Stage::Created {
        ensure_eq!(metrics.uptime, None, "the uptime in Created");
        ensure_eq!(metrics.boot, None, "the boot times in Created");
        ensure_eq!(metrics.processes.unwrap_or(0), 0, "the programs in Created");
    }
    if matches!(stage, Stage::Stopped | Stage::Crashed) {
        ensure_eq!(metrics.uptime, None, "the uptime after the end");
    }
    ensure!(stage.holds(&vm.state()), "after metrics in {stage:?}: {}", vm.state());
    Ok(())
}

async fn uptime(ctx: &Context) -> Verdict {
    let vm = ctx.created().await?;
    for life in 1..=ctx.draw(1, 2) {
        let starting = ctx.now();
        vm.start().await?;
        let started = ctx.now();
        ctx.sleep(millis(ctx, 10, 150)).await;
        let before = ctx.now();
        let Some(uptime) = vm.metrics().await?.uptime else {
            return Ok(());
        };
        let (low, high) = (before - started, ctx.now() - starting);
        ensure!(
            (low..=high).contains(&uptime),
            "in life {life} the uptime is {uptime:?}, not from {low:?} to {high:?}"
        );
        vm.kill().await?;
    }
    Ok(())
}

async fn paused(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    // A machine that is a copy stood still at first.
    let before = vm.metrics().await?.paused.unwrap_or_default();
    let (mut low, mut high) = (before, before);
    for _ in 0..ctx.draw(1, 3) {
        let begun = ctx.now();
        vm.pause().await?;
        let span = millis(ctx, 5, 60);
        ctx.sleep(span).await;
        vm.resume().await?;
        low += span;
        high += ctx.now() - begun;
        ctx.sleep(millis(ctx, 0, 20)).await;
    }
    if let Some(paused) = vm.metrics().await?.paused {
        ensure!(
            (low..=high).contains(&paused),
            "the time paused is {paused:?}, not from {low:?} to {high:?}"
        );
    }
    vm.pause().await?;
    ctx.sleep(millis(ctx, 20, 50)).await;
    let metrics = vm.metrics().await?;
    if let (Some(uptime), Some(paused)) = (metrics.uptime, metrics.paused) {
        ensure!(paused >= low + Duration::from_millis(20), "a pause that goes on is not counted");
        ensure!(uptime >= paused, "paused {paused:?} in a life of {uptime:?}");
    }
    Ok(())
}

async fn boot_times(ctx: &Context) -> Verdict {
    let vm = ctx.created().await?;
    let begun = ctx.now();
    vm.start().await?;
    let taken = ctx.now() - begun;
    if let Some(boot) = vm.metrics().await?.boot {
        ensure!(boot.total() <= taken, "the stages add up to {:?} of {taken:?}", boot.total());
        ensure!(boot.total() > Duration::ZERO || taken.is_zero(), "a boot that took no time");
    }
    Ok(())
}

async fn processes(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let mut running = Vec::new();
    for _ in 0..ctx.draw(1, 5) {
        running.push(spawn_sh(&vm, "sleep 1000").await?);
    }
    let count = u64::try_from(running.len()).unwrap_or(0);
    let Some(counted) = vm.metrics().await?.processes else {
        return Ok(());
    };
    ensure_eq!(counted, count, "the programs that run");
    let Some(last) = running.pop() else {
        return Ok(());
    };
    last.signal(vm_trait::Signal::KILL).await?;
    last.wait().await?;
    ensure_eq!(vm.metrics().await?.processes, Some(count - 1), "the programs that still run");
    Ok(())
}

async fn bytes_counted(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let before = vm.metrics().await?;
    let length = ctx.draw(1000, 100_000);
    let path = format!("{}/counted", ctx.scratch(&*vm));
    vm.write(&path, ctx.bytes(usize::try_from(length).unwrap_or(1000))).await?;
    let between = vm.metrics().await?;
    vm.read_file(&path).await?;
    let after = vm.metrics().await?;
    if let (Some(before), Some(between)) = (before.agent_bytes_sent, between.agent_bytes_sent) {
        let sent = between - before;
        ensure!(sent >= length, "{sent} bytes were sent to write {length}");
    }
    if let (Some(between), Some(after)) = (between.agent_bytes_received, after.agent_bytes_received)
    {
        let received = after - between;
        ensure!(received >= length, "{received} bytes were received to read {length}");
    }
    Ok(())
}

async fn reconnects(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let Some(before) = vm.metrics().await?.agent_reconnects else {
        return Ok(());
    };
    ensure_eq!(before, 0, "connections made anew since the start");
    let count = ctx.draw(1, 3);
    for _ in 0..count {
        let ordered = order(ctx, FaultOrder::next(FaultKind::LinkDisconnect).on(vm.id()))?;
        let begun = ctx.now();
        while !ordered.fired(ctx) {
            ensure!(ctx.now() - begun < SOON, "the link was used and did not break");
            vm.ping().await.ok();
        }
        // Afterwards there is a connection, or this would not be answered.
        ctx.within(SOON, "a ping over a new connection", vm.ping()).await?.ok();
        vm.ping().await?;
    }
    let counted = vm.metrics().await?.agent_reconnects;
    ensure_eq!(counted, Some(count), "connections made anew");
    Ok(())
}
