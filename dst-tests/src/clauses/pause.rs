//! Pause and resume.

use super::probe::{
    Nonce, SOON, Stage, TICK, Ticker, Vm, clock_is_right, made, millis, order, script, spawn_sh,
    truthful, uptime, works,
};
use crate::{
    clause,
    clause::{Broken, Clause, Verdict},
    context::Context,
    ensure, ensure_eq, ensure_err,
};
use futures_util::future::join;
use std::{sync::Arc, time::Duration};
use vm_core::fault::{FaultKind, FaultOrder};
use vm_trait::{CrashReason, ExecStatus, Operation, StopOptions, VmErrorKind, VmResult, VmState};

/// The clauses on pause and resume.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(freezes_time, "pause.freezes_guest_time",
        "the guest's monotonic clock does not count the time it is paused",
        [Exec, Pause, GuestKernel], faults: []),
    clause!(freezes_processes, "pause.freezes_processes",
        "no process runs while the machine is paused, and all go on afterwards",
        [Exec, Files, Pause], faults: []),
    clause!(keeps_memory, "pause.keeps_memory",
        "what was in memory before a pause is there after it", [Exec, Files, Pause], faults: []),
    clause!(clock_after_resume, "pause.clock_right_after_resume",
        "the guest's wall clock is within a second of the host's as soon as resume returns",
        [Exec, Pause, GuestKernel], faults: []),
    clause!(clock_forward, "pause.clock_right_after_jump_forward",
        "resume sets the guest's wall clock right also when it had jumped forward",
        [Exec, Pause, GuestKernel], faults: [ClockForward]),
    clause!(clock_back, "pause.clock_right_after_jump_back",
        "resume sets the guest's wall clock right also when it had jumped back",
        [Exec, Pause, GuestKernel], faults: [ClockBack]),
    clause!(fifty_cycles, "pause.fifty_cycles",
        "fifty pauses and resumes in a row lose nothing", [Exec, Files, Pause], faults: []),
    clause!(refuses_guest_operations, "pause.refuses_guest_operations",
        "while paused, operations on programs and files are refused with InvalidState",
        [Exec, Files, Pause], faults: []),
    clause!(ends_while_paused, "pause.stop_and_kill_while_paused",
        "stop and kill end a paused machine", [Exec, Pause], faults: []).fresh(),
    clause!(exec_survives, "pause.exec_under_way_survives",
        "an exec that is under way goes on after a pause and loses no output", [Exec, Pause], faults: []),
    clause!(exec_timeout_stands_still, "pause.exec_timeout_stands_still",
        "the timeout of a program counts guest time: it does not run out during a pause",
        [Exec, Pause, GuestKernel], faults: []),
    clause!(pause_refused, "pause.failed_pause_is_truthful",
        "a pause that fails says so, and the machine goes on", [Exec, Pause], faults: [PauseFail])
    .undisturbed(),
    clause!(pause_stuck, "pause.stuck_pause_ends",
        "a pause that is not answered ends by its deadline, in a truthful state", [Exec, Pause], faults: [PauseStuck])
    .undisturbed(),
    clause!(resume_refused, "pause.failed_resume_is_truthful",
        "a resume that fails says so, in a truthful state", [Exec, Pause], faults: [ResumeFail])
    .undisturbed(),
    clause!(resume_stuck, "pause.stuck_resume_ends",
        "a resume that is not answered ends by its deadline, in a truthful state",
        [Exec, Pause], faults: [ResumeStuck])
    .undisturbed(),
];

async fn freezes_time(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let span = millis(ctx, 100, 300);
    let begun = ctx.now();
    let before = uptime(&vm).await?;
    vm.pause().await?;
    ctx.sleep(span).await;
    vm.resume().await?;
    let after = uptime(&vm).await?;
    let taken = ctx.now() - begun;
    // The clock is read in hundredths.
    let most = taken - span + Duration::from_millis(11);
    let counted = after.saturating_sub(before);
    ensure!(after >= before, "the guest's clock went back from {before:?} to {after:?}");
    ensure!(
        counted <= most,
        "the guest counted {counted:?} in {taken:?} of which it was paused {span:?}"
    );
    Ok(())
}

async fn freezes_processes(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let ticker = Ticker::begin(ctx, &vm).await?;
    let span = millis(ctx, 100, 300);
    let begun = ctx.now();
    let before = ticker.count(&vm).await?;
    vm.pause().await?;
    ctx.sleep(span).await;
    vm.resume().await?;
    let after = ticker.count(&vm).await?;
    let ran = ctx.now() - begun - span;
    let most = u64::try_from(ran.as_millis() / TICK.as_millis()).unwrap_or(u64::MAX) + 2;
    ensure!(
        after - before <= most,
        "a process counted {} times in {ran:?} outside of a pause of {span:?}",
        after - before
    );
    ticker.goes_on(ctx, &vm, "after a pause").await
}

async fn keeps_memory(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let nonce = Nonce::plant(ctx, &vm).await?;
    for round in 1..=ctx.draw(1, 4) {
        vm.pause().await?;
        ensure_eq!(vm.state(), VmState::Paused, "the state after pause");
        ctx.sleep(millis(ctx, 0, 30)).await;
        vm.resume().await?;
        ensure_eq!(vm.state(), VmState::Running, "the state after resume");
        nonce.there(&vm, &format!("after pause {round}")).await?;
    }
    Ok(())
}

async fn clock_after_resume(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    clock_is_right(ctx, &vm, "after boot").await?;
    vm.pause().await?;
    // Long enough for a clock that was not set to be seen to be wrong.
    ctx.sleep(millis(ctx, 2100, 2400)).await;
    vm.resume().await?;
    clock_is_right(ctx, &vm, "after resume").await
}

async fn clock_forward(ctx: &Context) -> Verdict {
    clock_jump(ctx, FaultKind::ClockForward).await
}

async fn clock_back(ctx: &Context) -> Verdict {
    clock_jump(ctx, FaultKind::ClockBack).await
}

async fn clock_jump(ctx: &Context, kind: FaultKind) -> Verdict {
    let vm = ctx.running().await?;
    let by = Duration::from_secs(ctx.draw(5, 100_000));
    let ordered = order(ctx, FaultOrder::next(kind).on(vm.id()).with_amount(by))?;
    let wrong = async {
        while clock_is_right(ctx, &vm, "").await.is_ok() {
            ctx.sleep(Duration::from_millis(5)).await;
        }
    };
    ctx.within(SOON, "a jump of the guest's clock", wrong).await?;
    ordered.must_have_fired(ctx)?;
    let before = uptime(&vm).await?;
    vm.pause().await?;
    vm.resume().await?;
    clock_is_right(ctx, &vm, "after a jump and a resume").await?;
    let counted = uptime(&vm).await?.saturating_sub(before);
    ensure!(counted < Duration::from_secs(4), "the monotonic clock jumped by {counted:?}");
    Ok(())
}

async fn fifty_cycles(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let nonce = Nonce::plant(ctx, &vm).await?;
    let ticker = Ticker::begin(ctx, &vm).await?;
    for cycle in 1..=50 {
        vm.pause().await?;
        if ctx.one_in(4) {
            ctx.sleep(millis(ctx, 0, 5)).await;
        }
        vm.resume().await?;
        if ctx.one_in(10) {
            works(ctx, &vm, &format!("after cycle {cycle}")).await?;
        }
    }
    nonce.there(&vm, "after fifty cycles").await?;
    ticker.goes_on(ctx, &vm, "after fifty cycles").await
}

async fn refuses_guest_operations(ctx: &Context) -> Verdict {
    let vm = Stage::Paused.reach(ctx).await?;
    let begun = ctx.now();
    let operations = super::lifecycle_table::operations(ctx);
    for operation in operations.into_iter().filter(|operation| operation.needs_guest()) {
        let outcome = super::lifecycle_table::attempt(ctx, &vm, operation).await;
        ensure_err!(
            outcome,
            VmErrorKind::InvalidState { state: VmState::Paused },
            "{operation} while paused"
        );
    }
    ensure!(ctx.now() - begun < SOON, "refusals while paused took {:?}", ctx.now() - begun);
    ensure_err!(
        vm.pause().await,
        VmErrorKind::InvalidState { state: VmState::Paused },
        "{} while paused",
        Operation::Pause
    );
    vm.resume().await?;
    works(ctx, &vm, "after refusals").await
}

async fn ends_while_paused(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let process = spawn_sh(&vm, "sleep 1000").await?;
    vm.pause().await?;
    if ctx.one_in(2) {
        ctx.within(SOON, "kill while paused", vm.kill()).await??;
    } else {
        let grace = millis(ctx, 0, 200);
        let stop = vm.stop(StopOptions::default().with_grace(grace));
        ctx.within(grace + SOON, "stop while paused", stop).await??;
    }
    ensure_eq!(vm.state(), VmState::Stopped, "the state after the end of a paused machine");
    ensure_err!(process.wait().await, VmErrorKind::Interrupted, "a program of a paused machine");
    truthful(ctx, &vm, "after the end of a paused machine").await
}

async fn exec_survives(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let lines = ctx.draw(5, 15);
    let text = format!(
        "i=0; while [ $i -lt {lines} ]; do echo line $i; i=$((i+1)); sleep 0.02; done; exit 7"
    );
    let cycles = async {
        for _ in 0..ctx.draw(1, 4) {
            ctx.sleep(millis(ctx, 1, 60)).await;
            vm.pause().await?;
            ctx.sleep(millis(ctx, 1, 60)).await;
            vm.resume().await?;
        }
        VmResult::Ok(())
    };
    // Both begin at once: an exec may only be let in before the first pause.
    let (output, cycles) = join(vm.exec(script(&text)), cycles).await;
    cycles?;
    let output = output?;
    let expected: String = (0..lines).map(|n| format!("line {n}\n")).collect();
    ensure_eq!(output.stdout_text(), expected, "the output of an exec over pauses");
    ensure_eq!(output.status, ExecStatus::Exited(7), "the end of an exec over pauses");
    Ok(())
}

async fn exec_timeout_stands_still(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let limit = ctx.time_to_work(Duration::from_millis(1000));
    let span = limit + millis(ctx, 100, 400);
    let paused = {
        let vm = Arc::clone(&vm);
        async move {
            ctx.sleep(millis(ctx, 30, 80)).await;
            vm.pause().await?;
            ctx.sleep(span).await;
            vm.resume().await
        }
    };
    let (output, paused) =
        join(vm.exec(script("sleep 0.2; echo done").timeout(limit)), paused).await;
    paused?;
    let output = output?;
    ensure_eq!(output.status, ExecStatus::Exited(0), "a program of 200 ms, paused for {span:?}");
    ensure!(
        output.elapsed < limit,
        "it is said to have run for {:?} of guest time",
        output.elapsed
    );
    Ok(())
}

/// Makes a running machine with a short deadline for pauses.
async fn with_short_pauses(ctx: &Context) -> Result<Vm, Broken> {
    let vm = made(ctx, |config| config.timeouts.pause = millis(ctx, 200, 600)).await?;
    vm.start().await?;
    Ok(vm)
}

/// Checks a machine whose pause or resume went wrong.
async fn usable_or_given_up(ctx: &Context, vm: &Vm, stays: VmState, when: &str) -> Verdict {
    let given_up = VmState::Crashed(CrashReason::Unresponsive);
    let state = vm.state();
    ensure!(state == stays || state == given_up, "{when}: the state is {state}");
    truthful(ctx, vm, when).await
}

async fn pause_refused(ctx: &Context) -> Verdict {
    let vm = with_short_pauses(ctx).await?;
    let ordered = order(ctx, FaultOrder::next(FaultKind::PauseFail).on(vm.id()))?;
    let outcome = vm.pause().await;
    ordered.must_have_fired(ctx)?;
    ensure_err!(outcome, VmErrorKind::HypervisorFailed { .. }, "a pause that is refused");
    ensure_eq!(vm.state(), VmState::Running, "the state after a refused pause");
    works(ctx, &vm, "after a refused pause").await?;
    vm.pause().await?;
    ensure_eq!(vm.state(), VmState::Paused, "the state after the next pause");
    truthful(ctx, &vm, "after a refused pause and a good one").await
}

async fn pause_stuck(ctx: &Context) -> Verdict {
    let vm = with_short_pauses(ctx).await?;
    let ordered = order(ctx, FaultOrder::next(FaultKind::PauseStuck).on(vm.id()))?;
    let limit = vm.config().timeouts.pause + vm.config().timeouts.kill;
    let outcome = ctx.within(limit, "a stuck pause", vm.pause()).await?;
    ordered.must_have_fired(ctx)?;
    let after = vm.config().timeouts.pause;
    ensure_err!(
        outcome,
        VmErrorKind::Timeout { after: said } if *said == after,
        "a pause that is not answered"
    );
    // The machine may have been paused all the same; then the state must say so.
    let stays = if vm.state() == VmState::Paused { VmState::Paused } else { VmState::Running };
    usable_or_given_up(ctx, &vm, stays, "after a stuck pause").await
}

async fn resume_refused(ctx: &Context) -> Verdict {
    let vm = with_short_pauses(ctx).await?;
    vm.pause().await?;
    let ordered = order(ctx, FaultOrder::next(FaultKind::ResumeFail).on(vm.id()))?;
    let outcome = vm.resume().await;
    ordered.must_have_fired(ctx)?;
    ensure_err!(outcome, VmErrorKind::HypervisorFailed { .. }, "a resume that is refused");
    usable_or_given_up(ctx, &vm, VmState::Paused, "after a refused resume").await
}

async fn resume_stuck(ctx: &Context) -> Verdict {
    let vm = with_short_pauses(ctx).await?;
    vm.pause().await?;
    let ordered = order(ctx, FaultOrder::next(FaultKind::ResumeStuck).on(vm.id()))?;
    let limit = vm.config().timeouts.pause + vm.config().timeouts.kill;
    let outcome = ctx.within(limit, "a stuck resume", vm.resume()).await?;
    ordered.must_have_fired(ctx)?;
    ensure_err!(outcome, VmErrorKind::Timeout { .. }, "a resume that is not answered");
    let stays = if vm.state() == VmState::Running { VmState::Running } else { VmState::Paused };
    usable_or_given_up(ctx, &vm, stays, "after a stuck resume").await
}
