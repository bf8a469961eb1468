//! Time in copies of machines: timers, clocks, and how soon a copy can be used.

use super::{
    copies::{Captured, Way, attached},
    probe::{Vm, clock_is_right, millis, read_to_end, read_until, spawn_sh, uptime, uptime_of},
};
use crate::{
    clause,
    clause::{Broken, Clause, Verdict},
    context::Context,
    ensure, ensure_eq,
};
use futures_util::future::try_join_all;
use std::time::Duration;
use vm_trait::{Capability, ExecStatus, GuestProcess};

/// The clauses on time in restored machines.
pub(super) const SNAPSHOT_CLAUSES: &[Clause] = &[
    clause!(snapshot_sleeper, "snapshot.sleep_goes_on",
        "a sleep under way ends in source and restored machine after what was left of it, whatever passed in between",
        [Exec, Snapshot, GuestKernel], faults: []),
    clause!(snapshot_reachable, "snapshot.reachable_at_once",
        "the first program of a restored machine runs within 100 ms of guest time from the capture; where the host is \
         real, in a second and what forty programs take there besides",
        [Exec, Pause, Snapshot, GuestKernel], faults: [])
    .undisturbed(),
];

/// The clauses on time in children.
pub(super) const FORK_CLAUSES: &[Clause] = &[
    clause!(fork_sleeper, "fork.sleep_goes_on",
        "a sleep under way ends in source and children after what was left of it, also in children that stood still",
        [Exec, Fork, GuestKernel], faults: []),
    clause!(fork_reachable, "fork.reachable_at_once",
        "the first program of a child runs within 100 ms of guest time from the fork; where the host is real, in a \
         second and what forty programs take there besides",
        [Exec, Fork, Pause, GuestKernel], faults: [])
    .undisturbed(),
];

/// The clock of the guest is read in hundredths.
const HUNDREDTH: Duration = Duration::from_millis(11);

async fn snapshot_sleeper(ctx: &Context) -> Verdict {
    sleeper(ctx, Way::Restore).await
}

async fn fork_sleeper(ctx: &Context) -> Verdict {
    sleeper(ctx, Way::Fork).await
}

async fn snapshot_reachable(ctx: &Context) -> Verdict {
    reachable(ctx, Way::Restore).await
}

async fn fork_reachable(ctx: &Context) -> Verdict {
    reachable(ctx, Way::Fork).await
}

/// A program that sleeps, and reads the clock before and after.
struct Sleeper {
    process: GuestProcess,
    span: Duration,
    /// What it read before.
    text: String,
    /// The host's clock before and after it began to sleep.
    begun: (Duration, Duration),
}

impl Sleeper {
    async fn begin(ctx: &Context, vm: &Vm, span: Duration) -> Result<Self, Broken> {
        let seconds = span.as_secs_f64();
        let script = format!("cat /proc/uptime; sleep {seconds}; cat /proc/uptime");
        let before = ctx.now();
        let process = spawn_sh(vm, &script).await?;
        let text = read_until(&process, "\n").await?;
        Ok(Self { process, span, text, begun: (before, ctx.now()) })
    }

    /// Waits for its end, and checks how long it slept on the guest's clock, and that on the host's clock as much passed
    /// from `from` on as was left when it was captured, which was at `captured` at the latest.
    async fn ends(
        &self,
        ctx: &Context,
        (vm, process): (&Vm, &GuestProcess),
        (captured, from): (Duration, Duration),
        when: &str,
    ) -> Verdict {
        let limit = self.span + super::probe::SOON;
        let rest = ctx.within(limit, "the end of a program that sleeps", read_to_end(process));
        let rest = rest.await??;
        let over = ctx.now() - from;
        ensure_eq!(process.wait().await?, ExecStatus::Exited(0), "{when}: the end of a sleep");
        let rest = String::from_utf8_lossy(&rest);
        let (began, ended) =
            (uptime_of(&self.text)?, uptime_of(rest.trim_end().lines().last().unwrap_or(""))?);
        let slept = ended.saturating_sub(began);
        let span = self.span;
        // From the start, or the time in between counted: that is longer by more than this.
        let slack = span / 2 + delay(ctx, vm).await?;
        ensure!(
            slept + HUNDREDTH >= span && slept <= span + slack,
            "{when}: a sleep of {span:?} took {slept:?} of the guest's time"
        );
        let left = span.saturating_sub(captured - self.begun.0);
        ensure!(
            over + HUNDREDTH >= left,
            "{when}: of a sleep {left:?} were left at least, and it ended in {over:?}"
        );
        Ok(())
    }
}

/// Says by how much a host delays what takes no time: not at all where it is simulated, else by what ten programs take.
async fn delay(ctx: &Context, vm: &Vm) -> Result<Duration, Broken> {
    let mut slowest = Duration::ZERO;
    for _ in 0..3 {
        let begun = ctx.now();
        uptime(vm).await?;
        slowest = slowest.max(ctx.now() - begun);
    }
    Ok(if ctx.is_simulated() { Duration::ZERO } else { slowest * 10 })
}

/// Lets a stretch of time pass, up to an hour where that costs nothing.
async fn stretch(ctx: &Context) {
    let most = if ctx.is_simulated() { 3_600_000 } else { 1_500 };
    let low = if ctx.one_in(2) { most / 2 } else { 1_000 };
    ctx.sleep(millis(ctx, low, most)).await;
}

async fn sleeper(ctx: &Context, way: Way) -> Verdict {
    let vm = ctx.running().await?;
    let sleeper = Sleeper::begin(ctx, &vm, millis(ctx, 5_000, 6_000)).await?;
    ctx.sleep(sleeper.span * 6 / 10).await;
    // Children that are to stand still for a while have to be made of a machine that does.
    let pauses = ctx.has(Capability::Pause) && way == Way::Fork && ctx.one_in(2);
    if pauses {
        vm.pause().await?;
    }
    let captured = way.capture(&vm, ctx.draw(1, 2)).await?;
    let captured_at = ctx.now();
    let waits = pauses || matches!(captured, Captured::Snapshot(..));
    if pauses {
        vm.resume().await?;
    }
    let source = async {
        let slow = captured_at - sleeper.begun.1;
        ensure!(slow < sleeper.span + super::probe::SOON, "a capture took {slow:?}");
        sleeper
            .ends(ctx, (&vm, &sleeper.process), (captured_at, captured_at), "in the source")
            .await
    };
    let copied = async {
        if waits {
            stretch(ctx).await;
        }
        let from = ctx.now();
        let copies = captured.running(ctx).await?;
        try_join_all(copies.iter().map(|copy| async {
            let process = attached(copy, sleeper.process.id()).await?;
            sleeper.ends(ctx, (copy, &process), (captured_at, from), way.copy()).await
        }))
        .await?;
        for copy in &copies {
            clock_is_right(ctx, copy, way.copy()).await?;
        }
        Ok(())
    };
    let (source, copied) = futures_util::future::join(source, copied).await;
    source?;
    copied
}

async fn reachable(ctx: &Context, way: Way) -> Verdict {
    const MOST: Duration = Duration::from_millis(100);
    // All that a new copy touches is to be mapped for it first, and other copies are made beside it.
    let slack = |delay: Duration| match ctx.is_simulated() {
        true => delay,
        false => Duration::from_secs(1) + delay * 4,
    };
    let vm = ctx.running().await?;
    ctx.sleep(millis(ctx, 0, 200)).await;
    let mut host_delay = delay(ctx, &vm).await?;
    let begun = ctx.now();
    let before = uptime(&vm).await?;
    vm.pause().await?;
    // So long at most the guest ran on after its clock was read.
    let ran_on = ctx.now() - begun;
    let captured = way.capture(&vm, 1).await?;
    if ctx.one_in(2) {
        stretch(ctx).await;
    }
    let begun = ctx.now();
    let copies = captured.running(ctx).await?;
    for copy in &copies {
        let after = uptime(copy).await?;
        let (took, on_host) = (after.saturating_sub(before), ctx.now() - begun);
        host_delay = host_delay.max(delay(ctx, copy).await?);
        ensure!(
            after >= before && took <= on_host + ran_on + HUNDREDTH,
            "{}: the clock went from {before:?} at the capture to {after:?}; the copy was made {on_host:?} ago, and \
             the source ran on for {ran_on:?}",
            way.copy()
        );
        ensure!(
            took <= MOST + ran_on + HUNDREDTH + slack(host_delay),
            "{}: the first program ran {took:?} of guest time after the capture, of which the source had {ran_on:?}; \
             on the host's clock the copy took {on_host:?}, and ten programs take {host_delay:?} there",
            way.copy()
        );
    }
    vm.resume().await?;
    Ok(())
}
