//! Starts that are given up while nothing else moves the machine on.

use super::probe::{made, order, truthful, until_state};
use crate::{
    clause,
    clause::{Clause, Verdict},
    context::Context,
};
use std::{task::Poll, time::Duration};
use vm_core::{
    env::timeout,
    fault::{FaultKind, FaultOrder},
};
use vm_trait::VmState;

/// The clauses on starts that are given up.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(as_it_succeeds, "cancel.start_as_it_succeeds",
        "a start that is dropped when it has succeeded and its caller has not heard of it is undone", [Exec], faults: []),
    clause!(hanging_start, "cancel.hanging_start",
        "a start that is dropped while the boot hangs is undone at once, not at its deadline",
        [Exec], faults: [BootHang]),
    clause!(refused, "cancel.refused_start",
        "a start that is refused ends nothing when it is dropped before it says so", [Exec], faults: []),
];

async fn as_it_succeeds(ctx: &Context) -> Verdict {
    let vm = ctx.created().await?;
    let mut start = vm.start();
    if let Poll::Ready(done) = futures_util::poll!(&mut start) {
        return Ok(done?);
    }
    until_state(ctx, &vm, VmState::Running).await?;
    drop(start);
    until_state(ctx, &vm, VmState::Stopped).await?;
    truthful(ctx, &vm, "after a start that nobody heard of").await
}

async fn hanging_start(ctx: &Context) -> Verdict {
    let vm = made(ctx, |config| config.timeouts.boot = Duration::from_secs(600)).await?;
    let ordered = order(ctx, FaultOrder::next(FaultKind::BootHang).on(vm.id()))?;
    let given_up = timeout(&**ctx.env(), Duration::from_secs(2), vm.start()).await;
    crate::ensure!(given_up.is_err(), "a boot that hangs ended: {given_up:?}");
    until_state(ctx, &vm, VmState::Stopped).await?;
    ordered.must_have_fired(ctx)?;
    truthful(ctx, &vm, "after a boot that hung").await
}

async fn refused(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    for _ in 0..ctx.draw(1, 3) {
        let mut start = vm.start();
        if let Poll::Ready(done) = futures_util::poll!(&mut start) {
            crate::ensure!(done.is_err(), "a second start succeeded");
        }
    }
    // What a dropped start sets off would have happened by then.
    ctx.sleep(Duration::from_millis(20)).await;
    crate::ensure_eq!(vm.state(), VmState::Running, "the state after refused starts");
    truthful(ctx, &vm, "after refused starts").await
}
