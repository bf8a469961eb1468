//! What is told of a machine's end, and when.

use super::probe::{SOON, made, read_until, script, spawn_sh, until_state};
use crate::{
    clause,
    clause::{Clause, Verdict},
    context::Context,
    ensure, ensure_eq,
};
use futures_util::future::join;
use std::time::Duration;
use vm_trait::{CrashReason, StopOptions, VmExit, VmInstanceExt, VmState};

/// The clauses on what is told of an end.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(stopped_means_gone, "lifecycle.stopped_means_gone",
        "while a guest still uses the grace of a stop the state is Stopping, and wait waits", [Exec], faults: []),
    clause!(each_life, "lifecycle.wait_tells_of_each_life",
        "wait tells of each life of a machine how that one ended", [Exec, GuestKernel], faults: []),
];

async fn stopped_means_gone(ctx: &Context) -> Verdict {
    /// How far apart the two may be that come from the same event.
    const APART: Duration = Duration::from_millis(250);
    let vm = ctx.running().await?;
    let program = "trap 'sleep 1; exit 0' TERM; echo ready; while :; do sleep 0.02; done";
    let process = spawn_sh(&vm, program).await?;
    read_until(&process, "ready").await?;
    let told = async {
        vm.wait().await;
        (vm.state(), ctx.now())
    };
    let stop = async {
        let stopped = vm.stop(StopOptions::default().with_grace(SOON)).await;
        stopped.map(|()| ctx.now())
    };
    let ((state, told), stopped) = join(told, stop).await;
    let early = stopped?.saturating_sub(told);
    ensure_eq!(state, VmState::Stopped, "the state when wait answered");
    ensure!(early < APART, "Stopped was told {early:?} before the stop was done");
    Ok(())
}

async fn each_life(ctx: &Context) -> Verdict {
    let vm = made(ctx, |_| {}).await?;
    for life in 1..=ctx.draw(2, 4) {
        vm.start().await?;
        let end = ctx.draw(0, 2);
        let wanted = match end {
            0 => VmExit::Stopped,
            1 => VmExit::PoweredOff,
            _ => VmExit::Crashed(CrashReason::GuestPanic),
        };
        if end == 0 {
            vm.stop(StopOptions::default()).await?;
        } else {
            let program = if end == 1 { "poweroff -f" } else { "echo c > /proc/sysrq-trigger" };
            vm.spawn(script(&format!("sleep 0.02; {program}"))).await?.detach().await.ok();
            let state =
                if end == 1 { VmState::Stopped } else { VmState::Crashed(CrashReason::GuestPanic) };
            until_state(ctx, &vm, state).await?;
        }
        ensure_eq!(vm.wait().await, wanted, "what wait tells of a life");
        ensure!(vm.sh("true").await.is_err(), "a program ran after the end of life {life}");
    }
    Ok(())
}
