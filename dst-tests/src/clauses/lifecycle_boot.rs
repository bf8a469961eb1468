//! Boots: slow, failing, hanging, and what they leave.

use super::probe::{boot_time, made, millis, order, sh, truthful, works};
use crate::{
    clause,
    clause::{Broken, Clause, Verdict},
    context::Context,
    ensure, ensure_eq, ensure_err,
};
use futures_util::future::join;
use std::time::Duration;
use vm_core::fault::{FaultKind, FaultOrder};
use vm_trait::{CrashReason, VmError, VmErrorKind, VmExit, VmState};

/// The clauses on boots and readiness.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(boot_hang, "lifecycle.boot_hang_ends",
        "a boot that hangs ends by its deadline with BootFailed and the console, and the machine is Crashed",
        [Exec], faults: [BootHang])
    .undisturbed(),
    clause!(boot_panic, "lifecycle.boot_panic_is_fast",
        "a kernel panic during boot ends it long before the deadline, with BootFailed and the console",
        [Exec], faults: [BootPanic]),
    clause!(boot_refused, "lifecycle.boot_refused",
        "a boot that the hypervisor refuses fails with BootFailed, and the next start works",
        [Exec], faults: [BootFail]),
    clause!(boot_slow, "lifecycle.slow_boot_succeeds",
        "a boot that is slow but within its deadline succeeds", [Exec], faults: [BootSlow]),
    clause!(boots_again_and_again, "lifecycle.boots_after_failures",
        "a machine starts again after any number of failed boots", [Exec], faults: [BootFail, BootPanic]),
    clause!(late_listener, "lifecycle.late_agent_is_awaited",
        "start returns only after the handshake, also when the agent accepts late",
        [Exec], faults: [LinkDelayedAccept]),
    clause!(wait_ready_resolves, "lifecycle.wait_ready_resolves",
        "wait_ready returns once the machine runs, and at once where it runs already", [], faults: []),
    clause!(wait_ready_times_out, "lifecycle.wait_ready_times_out",
        "wait_ready gives up after the time it was given, and refuses a time of zero", [], faults: []),
    clause!(console_kept, "lifecycle.console_kept",
        "the console is kept after the machine's end", [Exec, Console, GuestKernel], faults: []),
    clause!(console_bounded, "lifecycle.console_bounded",
        "the console keeps the last bytes and no more than the configuration says",
        [Exec, Console, GuestKernel], faults: []),
];

/// Checks the error of a failed boot; gives the console text it carries.
fn boot_failed(error: &VmError) -> Option<&str> {
    match error.kind() {
        VmErrorKind::BootFailed { console, .. } => Some(console),
        _ => None,
    }
}

async fn boot_hang(ctx: &Context) -> Verdict {
    let deadline = boot_time(ctx).await? * u32::try_from(ctx.draw(2, 4)).unwrap_or(2);
    let vm = made(ctx, |config| config.timeouts.boot = deadline).await?;
    let ordered = order(ctx, FaultOrder::next(FaultKind::BootHang).on(vm.id()))?;
    let begun = ctx.now();
    let start = vm.start();
    let limit = deadline + vm.config().timeouts.kill;
    let outcome = ctx.within(limit, "a hanging boot", start).await?;
    let taken = ctx.now() - begun;
    ensure_err!(&outcome, VmErrorKind::BootFailed { .. }, "a boot that hangs");
    ordered.must_have_fired(ctx)?;
    ensure!(taken >= deadline, "a boot was given up after {taken:?}, the deadline is {deadline:?}");
    ensure_eq!(vm.state(), VmState::Crashed(CrashReason::BootFailed), "the state afterwards");
    let exit = vm.wait().await;
    ensure_eq!(exit, VmExit::Crashed(CrashReason::BootFailed), "what wait gives");
    carries_console(ctx, &outcome, &vm.console())?;
    truthful(ctx, &vm, "after a boot that hung").await
}

async fn boot_panic(ctx: &Context) -> Verdict {
    let vm = made(ctx, |config| config.timeouts.boot = Duration::from_secs(60)).await?;
    let ordered = order(ctx, FaultOrder::next(FaultKind::BootPanic).on(vm.id()))?;
    let outcome = ctx.within(Duration::from_secs(30), "a boot that panics", vm.start()).await?;
    ensure_err!(&outcome, VmErrorKind::BootFailed { .. }, "a boot that panics");
    ordered.must_have_fired(ctx)?;
    ensure!(
        matches!(vm.state(), VmState::Crashed(CrashReason::BootFailed | CrashReason::GuestPanic)),
        "the state after a panic during boot is {}",
        vm.state()
    );
    carries_console(ctx, &outcome, &vm.console())?;
    truthful(ctx, &vm, "after a boot that panicked").await
}

async fn boot_refused(ctx: &Context) -> Verdict {
    let vm = ctx.created().await?;
    let ordered = order(ctx, FaultOrder::next(FaultKind::BootFail).on(vm.id()))?;
    let outcome = vm.start().await;
    ensure_err!(outcome, VmErrorKind::BootFailed { .. }, "a boot that is refused");
    ordered.must_have_fired(ctx)?;
    ensure_eq!(vm.state(), VmState::Crashed(CrashReason::BootFailed), "the state afterwards");
    vm.start().await?;
    works(ctx, &vm, "after a refused boot").await
}

async fn boot_slow(ctx: &Context) -> Verdict {
    let delay = millis(ctx, 50, 300);
    let vm = ctx.created().await?;
    let slow = FaultOrder::next(FaultKind::BootSlow).on(vm.id()).with_amount(delay);
    let ordered = order(ctx, slow)?;
    let begun = ctx.now();
    vm.start().await?;
    ordered.must_have_fired(ctx)?;
    let taken = ctx.now() - begun;
    ensure!(taken >= delay, "a boot slowed by {delay:?} took {taken:?}");
    works(ctx, &vm, "after a slow boot").await
}

async fn boots_again_and_again(ctx: &Context) -> Verdict {
    let vm = ctx.created().await?;
    for _ in 0..ctx.draw(1, 4) {
        let kind = ctx.pick(&[FaultKind::BootFail, FaultKind::BootPanic]);
        let ordered = order(ctx, FaultOrder::next(kind).on(vm.id()))?;
        let outcome = vm.start().await;
        ensure!(
            outcome.as_ref().err().and_then(boot_failed).is_some(),
            "a start under {kind}: {outcome:?}"
        );
        ordered.must_have_fired(ctx)?;
        ensure!(vm.state().is_ended(), "the state after {kind} is {}", vm.state());
    }
    vm.start().await?;
    works(ctx, &vm, "after failed boots").await
}

async fn late_listener(ctx: &Context) -> Verdict {
    let delay = millis(ctx, 20, 300);
    let vm = ctx.created().await?;
    let late = FaultOrder::next(FaultKind::LinkDelayedAccept).on(vm.id()).with_amount(delay);
    let ordered = order(ctx, late)?;
    vm.start().await?;
    ordered.must_have_fired(ctx)?;
    ensure_eq!(vm.state(), VmState::Running, "the state when start returns");
    works(ctx, &vm, "after a late handshake").await
}

async fn wait_ready_resolves(ctx: &Context) -> Verdict {
    let vm = ctx.created().await?;
    let delay = millis(ctx, 0, 50);
    let start = async {
        ctx.sleep(delay).await;
        vm.start().await
    };
    let ready = async {
        let ready = vm.wait_ready(vm.config().timeouts.boot).await;
        (ready, vm.state())
    };
    let ((ready, state), start) = join(ready, start).await;
    start?;
    ready?;
    ensure_eq!(state, VmState::Running, "the state when wait_ready returns");
    vm.wait_ready(millis(ctx, 100, 200)).await?;
    Ok(())
}

async fn wait_ready_times_out(ctx: &Context) -> Verdict {
    let vm = ctx.created().await?;
    ensure_err!(
        vm.wait_ready(Duration::ZERO).await,
        VmErrorKind::InvalidConfig { .. },
        "a wait of zero"
    );
    let given = millis(ctx, 10, 150);
    let begun = ctx.now();
    let outcome = vm.wait_ready(given).await;
    let taken = ctx.now() - begun;
    ensure_err!(
        outcome,
        VmErrorKind::Timeout { after } if *after == given,
        "wait_ready of a machine that nobody starts"
    );
    ensure!(taken >= given, "wait_ready gave up after {taken:?} of {given:?}");
    ensure!(taken <= given + Duration::from_secs(1), "wait_ready took {taken:?} for {given:?}");
    ensure_eq!(vm.state(), VmState::Created, "the state after wait_ready");
    Ok(())
}

async fn console_kept(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    ensure!(!vm.console().is_empty(), "the console of a booted machine is empty");
    let word = format!("word-{:x}", ctx.draw(0, u64::MAX));
    sh(&vm, &format!("echo {word} > /dev/console")).await?;
    ctx.sleep(Duration::from_millis(20)).await;
    vm.kill().await?;
    let text = String::from_utf8_lossy(&vm.console()).into_owned();
    ensure!(text.contains(&word), "the console lost its last line at the machine's end");
    Ok(())
}

async fn console_bounded(ctx: &Context) -> Verdict {
    let size = ctx.draw(1024, 4096);
    let vm = made(ctx, |config| {
        config.console_bytes = u32::try_from(size).unwrap_or(1024);
    })
    .await?;
    vm.start().await?;
    let (word, lines) = (format!("word-{:x}", ctx.draw(0, u64::MAX)), ctx.draw(200, 400));
    let script = format!(
        "i=0; while [ $i -lt {lines} ]; do echo line $i of many > /dev/console; i=$((i+1)); done; \
         echo {word} > /dev/console"
    );
    sh(&vm, &script).await?;
    ctx.sleep(Duration::from_millis(20)).await;
    let console = vm.console();
    let kept = u64::try_from(console.len()).unwrap_or(u64::MAX);
    ensure!(kept <= size, "{kept} console bytes are kept, {size} were asked for");
    ensure!(kept >= size / 2, "only {kept} of {size} console bytes are kept");
    let text = String::from_utf8_lossy(&console).into_owned();
    ensure!(text.contains(&word), "the console lost its last line");
    Ok(())
}

/// Checks that a failed boot carries the console's last lines, where there is a console.
fn carries_console(ctx: &Context, outcome: &Result<(), VmError>, console: &[u8]) -> Verdict {
    if !ctx.has(vm_trait::Capability::Console) {
        return Ok(());
    }
    let carried = outcome.as_ref().err().and_then(boot_failed).unwrap_or_default();
    let last = carried.lines().rev().find(|line| !line.trim().is_empty());
    let Some(last) = last else {
        return Err(Broken::new("a failed boot carries no console line"));
    };
    let whole = String::from_utf8_lossy(console);
    ensure!(whole.contains(last.trim()), "`{last}` is not a line of the console");
    Ok(())
}
