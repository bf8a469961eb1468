//! Deadlines, and an agent that is out of reach.

use super::probe::{Nonce, SOON, Vm, millis, order, script, started, truthful, until, works};
use crate::{
    clause,
    clause::{Broken, Clause, Verdict},
    context::Context,
    ensure, ensure_eq, ensure_err,
};
use std::time::Duration;
use vm_core::fault::{FaultKind, FaultOrder};
use vm_trait::{
    ExecStatus, ForkOptions, SnapshotOptions, Timeouts, VmErrorKind, VmInstanceExt, VmState,
};

/// The clauses on deadlines.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(ping, "deadline.ping_measures",
        "ping answers with the round-trip time", [Exec], faults: []),
    clause!(paused_time, "deadline.pauses_do_not_count",
        "time that the machine is paused does not count against the deadline of what is under way",
        [Exec, Pause], faults: [LinkStall]),
    clause!(stall, "deadline.stalled_link",
        "while the agent is out of reach operations end by their deadline, and afterwards they work",
        [Exec], faults: [LinkStall])
    .undisturbed(),
    clause!(short_stall, "deadline.short_stall_is_waited_out",
        "a stall within the deadline fails nothing and loses nothing", [Exec, Files], faults: [LinkStall])
    .undisturbed(),
    clause!(stalled_capture, "deadline.stuck_capture_ends",
        "a snapshot of a machine that cannot be paused ends by its deadline, in a truthful state",
        [Exec, Snapshot], faults: [PauseStuck])
    .undisturbed(),
    clause!(stalled_fork, "deadline.stuck_fork_ends",
        "a fork of a machine that cannot be paused ends by its deadline, in a truthful state",
        [Exec, Fork], faults: [PauseStuck])
    .undisturbed(),
    clause!(slow_files, "deadline.slow_files",
        "operations on files of a slow disk succeed or end by their deadline, and the machine works afterwards",
        [Exec, Files], faults: [SlowIo])
    .undisturbed(),
    clause!(timeout_is_told, "deadline.program_timeout_is_a_status",
        "a program whose own time runs out is TimedOut, which is no error", [Exec], faults: []),
    clause!(no_deadline_for_programs, "deadline.programs_may_run_long",
        "a program may run longer than every timeout of the machine", [Exec], faults: [])
    .undisturbed(),
];

/// Makes a running machine with short deadlines for what needs the agent.
async fn impatient(ctx: &Context, link: Duration, request: Duration) -> Result<Vm, Broken> {
    let vm = started(ctx, |config| {
        config.timeouts.link = link;
        config.timeouts.request = request;
    });
    Ok(vm.await?)
}

async fn ping(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    for _ in 0..ctx.draw(1, 4) {
        let begun = ctx.now();
        let said = vm.ping().await?;
        let taken = ctx.now() - begun;
        ensure!(said <= taken, "ping says {said:?} and took {taken:?}");
    }
    ctx.within(SOON, "a ping beside a program", async {
        let program = vm.exec(script("sleep 0.05"));
        futures_util::future::join(program, vm.ping()).await.1
    })
    .await??;
    Ok(())
}

async fn paused_time(ctx: &Context) -> Verdict {
    const REQUEST: Duration = Duration::from_secs(10);
    let vm = started(ctx, |config| config.timeouts.request = REQUEST).await?;
    let stalled = FaultOrder::next(FaultKind::LinkStall).on(vm.id());
    let ordered = order(ctx, stalled.with_amount(Duration::from_secs(1)))?;
    let pinging = vm.clone();
    let ping = ctx.spawn(async move { pinging.ping().await });
    ctx.sleep(Duration::from_millis(200)).await;
    ordered.must_have_fired(ctx)?;
    vm.pause().await?;
    ctx.sleep(REQUEST * 2).await;
    vm.resume().await?;
    ctx.within(SOON, "a ping over a pause", ping.join()).await???;
    works(ctx, &vm, "after a pause amid a ping").await
}

async fn stall(ctx: &Context) -> Verdict {
    let (link, request) = (millis(ctx, 100, 300), millis(ctx, 100, 300));
    let vm = impatient(ctx, link, request).await?;
    let longer = link.max(request) * 2 + millis(ctx, 0, 100);
    let stall = FaultOrder::next(FaultKind::LinkStall).on(vm.id()).with_amount(longer);
    let ordered = order(ctx, stall)?;
    let begun = ctx.now();
    let limit = link.max(request) + Duration::from_millis(100);
    // The fault strikes at one of the next moments that bytes move.
    while !ordered.fired(ctx) {
        ensure!(ctx.now() - begun < SOON, "the link was used and did not stall");
        match ctx.within(limit, "a ping over a stalled link", vm.ping()).await? {
            Ok(_) => {}
            refused => ensure_err!(
                refused,
                VmErrorKind::Disconnected | VmErrorKind::Timeout { .. },
                "a ping over a stalled link"
            ),
        }
    }
    ensure_eq!(vm.state(), VmState::Running, "the state while the agent is out of reach");
    let outcome = ctx.within(limit, "an exec over a stalled link", vm.sh("true")).await?;
    if let Err(error) = outcome {
        ensure!(error.is_retriable(), "an exec over a stalled link: {error}");
    }
    ctx.sleep(longer).await;
    works(ctx, &vm, "after a stall").await
}

async fn short_stall(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let span = millis(ctx, 20, 250);
    let stall = FaultOrder::next(FaultKind::LinkStall).on(vm.id()).with_amount(span);
    let ordered = order(ctx, stall.after(u32::try_from(ctx.draw(0, 4)).unwrap_or(0)))?;
    let begun = ctx.now();
    while !ordered.fired(ctx) {
        ensure!(ctx.now() - begun < SOON, "the link was used and did not stall");
        let nonce = Nonce::plant(ctx, &vm).await?;
        nonce.there(&vm, "over a stall").await?;
    }
    works(ctx, &vm, "after a short stall").await
}

async fn stalled_capture(ctx: &Context) -> Verdict {
    let vm = short_captures(ctx).await?;
    let ordered = order(ctx, FaultOrder::next(FaultKind::PauseStuck).on(vm.id()))?;
    let Timeouts { capture, kill, .. } = vm.config().timeouts;
    let snapshot = vm.snapshot(SnapshotOptions::default());
    let outcome = ctx.within(capture + kill, "a stuck snapshot", snapshot).await?;
    ordered.must_have_fired(ctx)?;
    ensure_err!(outcome, VmErrorKind::Timeout { .. }, "a snapshot of a machine that is stuck");
    truthful(ctx, &vm, "after a stuck snapshot").await
}

async fn stalled_fork(ctx: &Context) -> Verdict {
    let vm = short_captures(ctx).await?;
    let ordered = order(ctx, FaultOrder::next(FaultKind::PauseStuck).on(vm.id()))?;
    let Timeouts { capture, kill, .. } = vm.config().timeouts;
    let fork = vm.fork(ForkOptions::new(2));
    let outcome = ctx.within(capture + kill, "a stuck fork", fork).await?;
    ordered.must_have_fired(ctx)?;
    ensure_err!(outcome, VmErrorKind::Timeout { .. }, "a fork of a machine that is stuck");
    truthful(ctx, &vm, "after a stuck fork").await
}

/// Makes a running machine with short deadlines for pauses and captures.
async fn short_captures(ctx: &Context) -> Result<Vm, Broken> {
    let vm = started(ctx, |config| {
        config.timeouts.pause = millis(ctx, 200, 500);
        config.timeouts.capture = millis(ctx, 500, 1500);
        config.timeouts.kill = millis(ctx, 1000, 2000);
    });
    Ok(vm.await?)
}

async fn slow_files(ctx: &Context) -> Verdict {
    let request = millis(ctx, 150, 300);
    let vm = impatient(ctx, Duration::from_secs(10), request).await?;
    let slow = millis(ctx, 10, 600);
    let ordered = order(ctx, FaultOrder::next(FaultKind::SlowIo).on(vm.id()).with_amount(slow))?;
    let path = format!("{}/slow-{:x}", ctx.scratch(&*vm), ctx.draw(0, u64::MAX));
    let contents = ctx.bytes(usize::try_from(ctx.draw(1, 5000)).unwrap_or(1));
    let limit = request * 2 + Duration::from_millis(100);
    let write = vm.write(&path, contents.clone());
    let outcome = ctx.within(limit, "a write to a slow disk", write).await?;
    ordered.must_have_fired(ctx)?;
    match outcome {
        Ok(()) => ensure_eq!(vm.read_file(&path).await?, contents, "what was written slowly"),
        refused => ensure_err!(refused, VmErrorKind::Timeout { .. }, "a write to a slow disk"),
    }
    ctx.sleep(slow).await;
    works(ctx, &vm, "after a slow disk").await
}

async fn timeout_is_told(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let limit = millis(ctx, 20, 200);
    let request = script("echo begun; sleep 1000").timeout(limit);
    let output = ctx.within(limit + SOON, "a program with a timeout", vm.exec(request)).await??;
    ensure_eq!(output.status, ExecStatus::TimedOut, "a program whose time ran out");
    ensure!(output.elapsed >= limit, "it ran for {:?} of {limit:?}", output.elapsed);
    works(ctx, &vm, "after a program's timeout").await
}

async fn no_deadline_for_programs(ctx: &Context) -> Verdict {
    // Slow hosts need about so much for a request.
    let short = Duration::from_millis(500);
    let vm = started(ctx, |config| {
        config.timeouts.request = short;
        config.timeouts.link = short;
        config.timeouts.pause = short;
        config.timeouts.capture = short;
    })
    .await?;
    let word = format!("{:x}", ctx.draw(0, u64::MAX));
    let output = vm.sh(&format!("sleep 1.6; echo {word}")).await?;
    ensure_eq!(output.stdout_text(), format!("{word}\n"), "a program of 1.6 s");
    let silent = ctx.now();
    until(ctx, "a while without a word", || ctx.now() - silent > short * 5 / 2).await?;
    works(ctx, &vm, "after a while without a word").await
}
