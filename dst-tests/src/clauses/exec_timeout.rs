//! `exec`: time limits.

use super::{
    probe::order,
    streams::{TICKING_CHILD, fresh_dir, millis, no_more_ticks, sh},
};
use crate::{
    clause,
    clause::{Clause, Verdict},
    context::Context,
    ensure, ensure_eq,
};
use std::time::Duration;
use vm_core::fault::{FaultKind, FaultOrder};
use vm_trait::{ExecRequest, ExecStatus, VmInstanceExt};

/// What `exec` promises of time limits.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(timeout_kills_group, "exec.timeout_kills_group",
        "a program whose time is over is killed with all its descendants", [Exec, Files], faults: []),
    clause!(timeout_keeps_output, "exec.timeout_keeps_output",
        "what a program wrote before its time was over is kept", [Exec], faults: []),
    clause!(timeout_is_in_time, "exec.timeout_is_in_time",
        "a time limit strikes when the time is over: not before, and not long after", [Exec], faults: []),
    clause!(timeout_not_reached, "exec.timeout_not_reached",
        "a program that ends within its time limit ends as it would without", [Exec], faults: []),
    clause!(timeout_defies_traps, "exec.timeout_defies_traps",
        "a program that ignores signals is ended by its time limit all the same", [Exec], faults: []),
    clause!(hang_ends_by_timeout, "exec.hang_ends_by_timeout",
        "a program that never gets on is ended by its time limit", [Exec], faults: [ExecHang]),
];

/// What may pass between the end of a limit and the caller's hearing of it, on a busy host.
const REACTION: Duration = Duration::from_secs(10);

async fn timeout_kills_group(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let dir = fresh_dir(ctx, &*vm).await?;
    let (child, grandchild) = (format!("{dir}/child"), format!("{dir}/grandchild"));
    let script = format!("{TICKING_CHILD}sh -c '{TICKING_CHILD}sleep 600' sh \"$2\"");
    let request = sh(&script, [child.clone(), grandchild.clone()]);
    let got = vm.exec(request.timeout(ctx.time_to_work(millis(ctx, 500, 900)))).await?;
    ensure_eq!(got.status, ExecStatus::TimedOut, "status");
    ensure_eq!(got.stdout_text(), "ready\nready\n", "stdout");
    no_more_ticks(ctx, &*vm, &child).await?;
    no_more_ticks(ctx, &*vm, &grandchild).await
}

async fn timeout_keeps_output(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let (out, err) = (ctx.text(200), ctx.text(200));
    let script = "printf %s \"$1\"; printf %s \"$2\" >&2; sleep 600";
    let request =
        sh(script, [out.clone(), err.clone()]).timeout(ctx.time_to_work(millis(ctx, 900, 1200)));
    let got = vm.exec(request).await?;
    ensure_eq!(got.status, ExecStatus::TimedOut, "status");
    ensure_eq!(got.stdout_text(), out, "stdout");
    ensure_eq!(got.stderr_text(), err, "stderr");
    Ok(())
}

async fn timeout_is_in_time(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let limit = millis(ctx, 50, 300);
    let before = ctx.now();
    let got = vm.exec(ExecRequest::new("sleep").arg("600").timeout(limit)).await?;
    let took = ctx.now().saturating_sub(before);
    ensure_eq!(got.status, ExecStatus::TimedOut, "status");
    ensure!(got.elapsed >= limit, "ended after {:?} of {limit:?}", got.elapsed);
    ensure!(took <= limit + REACTION, "told after {took:?}, the limit was {limit:?}");
    Ok(())
}

async fn timeout_not_reached(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let code = u8::try_from(ctx.draw(0, 255)).unwrap_or(0);
    let limit = ctx.pick(&[Duration::from_secs(300), Duration::from_secs(86_400), Duration::MAX]);
    let request =
        sh("sleep \"0.$2\"; exit \"$1\"", [code.to_string(), ctx.draw(0, 99).to_string()]);
    let before = ctx.now();
    let got = vm.exec(request.timeout(limit)).await?;
    let took = ctx.now().saturating_sub(before);
    ensure_eq!(got.status, ExecStatus::Exited(code), "status under {limit:?}");
    ensure!(took < REACTION * 2, "told after {took:?}");
    Ok(())
}

async fn timeout_defies_traps(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let script = "trap '' HUP INT TERM; echo deaf; while true; do sleep 1; done";
    let before = ctx.now();
    let got =
        vm.exec(sh(script, [""; 0]).timeout(ctx.time_to_work(millis(ctx, 900, 1200)))).await?;
    let took = ctx.now().saturating_sub(before);
    ensure_eq!(got.status, ExecStatus::TimedOut, "status");
    ensure_eq!(got.stdout_text(), "deaf\n", "stdout");
    ensure!(took < REACTION * 2, "told after {took:?}");
    Ok(())
}

async fn hang_ends_by_timeout(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let limit = millis(ctx, 50, 1000);
    let trouble = order(ctx, FaultOrder::next(FaultKind::ExecHang).on(vm.id()))?;
    let before = ctx.now();
    let got = vm.exec(ExecRequest::new("true").timeout(limit)).await?;
    let took = ctx.now().saturating_sub(before);
    ensure_eq!(got.status, ExecStatus::TimedOut, "status");
    ensure!(took <= limit + REACTION, "told after {took:?}, the limit was {limit:?}");
    trouble.must_have_fired(ctx)?;
    let got = vm.run("true", []).await?;
    ensure!(got.status.success(), "the next program: {got:?}");
    Ok(())
}
