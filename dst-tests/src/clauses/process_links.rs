//! Programs whose link to the host is down or busy at the wrong moment.

use super::{
    guest_streams::{accept, has_ended, port},
    probe::{SOON, order},
    streams::{
        TICKING_CHILD, break_link, fresh_dir, length, no_more_ticks, read_at_least, read_to_end,
        read_until_text, same_bytes, sh,
    },
};
use crate::{
    clause,
    clause::{Broken, Clause, Verdict},
    context::Context,
    ensure,
};
use futures_util::StreamExt;
use std::time::Duration;
use tokio::io::AsyncReadExt;
use vm_core::{
    env::timeout,
    fault::{FaultKind, FaultOrder},
};
use vm_trait::{OutputChannel, Signal, VmEvent, VmInstanceExt};

/// The clauses on programs and their link.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(unread_over_break, "process.unread_output_over_broken_link",
        "output that has arrived and was not read yet is neither lost nor doubled when the link breaks",
        [Exec, Files], faults: [LinkDisconnect]),
    clause!(dropped_while_down, "process.dropped_while_link_is_down",
        "a handle that is dropped while the link is down ends its program once the link is back",
        [Exec, Files], faults: [LinkDisconnect, LinkDelayedAccept])
    .fresh(),
    clause!(dropped_at_once, "process.dropped_is_told_at_once",
        "dropping a handle ends its program at once, though nothing else is asked of the guest",
        [Exec, Vsock], faults: [])
    .fresh(),
];

async fn unread_over_break(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let dir = fresh_dir(ctx, &*vm).await?;
    let content = ctx.bytes(length(ctx, 1, 200_000));
    let file = format!("{dir}/content");
    vm.write(&file, content.clone()).await?;
    let process = vm.spawn(sh("cat \"$1\"; sleep 1000", [file])).await?;
    // It arrives, and nobody reads it.
    ctx.sleep(ctx.time_to_work(Duration::from_millis(300))).await;
    let broken = break_link(ctx, &*vm, FaultKind::LinkDisconnect, 0)?;
    vm.sh("true").await?;
    broken.took_place(ctx)?;
    let read = read_at_least(&process, OutputChannel::Stdout, content.len());
    let mut read = ctx.within(SOON, "the output", read).await??;
    process.signal(Signal::KILL).await?;
    let rest = read_to_end(&process, OutputChannel::Stdout);
    read.extend(ctx.within(SOON, "the end of the output", rest).await??);
    same_bytes(&read, &content, "output that was read after the link broke")?;
    Ok(vm.remove_all(&dir).await?)
}

async fn dropped_while_down(ctx: &Context) -> Verdict {
    // The longer one outlasts the first handshake: what was dropped is then not named in the next.
    let down = Duration::from_secs(ctx.pick(&[3, 7]));
    let vm = ctx.running().await?;
    let dir = fresh_dir(ctx, &*vm).await?;
    let ticks = format!("{dir}/ticks");
    let process = vm.spawn(sh(&format!("{TICKING_CHILD}wait"), [ticks.clone()])).await?;
    read_until_text(ctx, &process, "ready").await?;
    let mut events = vm.events();
    let late = FaultOrder::next(FaultKind::LinkDelayedAccept).on(vm.id()).with_amount(down);
    let late = order(ctx, late)?;
    let broken = break_link(ctx, &*vm, FaultKind::LinkDisconnect, 0)?;
    // It is what the link breaks under, and is given up.
    let _ = timeout(&**ctx.env(), Duration::from_millis(500), vm.ping()).await;
    broken.took_place(ctx)?;
    let lost = async {
        while let Some(event) = events.next().await {
            if matches!(event, VmEvent::AgentLost) {
                return Ok(());
            }
        }
        Err(Broken::new("the events ended"))
    };
    ctx.within(SOON, "the loss of the link", lost).await??;
    drop(process);
    ctx.within(SOON, "a ping over the new link", vm.ping()).await??;
    late.must_have_fired(ctx)?;
    no_more_ticks(ctx, &*vm, &ticks).await?;
    Ok(vm.remove_all(&dir).await?)
}

async fn dropped_at_once(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let port = port(ctx);
    let mut listener = vm.listen(port).await?;
    let script = "while :; do echo tick; sleep 0.02; done | vsock connect \"$1\"";
    let process = vm.spawn(sh(script, [port.to_string()])).await?;
    let mut stream = accept(ctx, &mut listener).await?;
    let mut first = [0; 5];
    let read = ctx.within(SOON, "the program's first word", stream.read_exact(&mut first)).await?;
    ensure!(read.is_ok(), "the program's stream: {read:?}");
    drop(process);
    let end = has_ended(ctx, &mut stream, "a dropped program's stream");
    ctx.within(ctx.time_to_work(Duration::from_secs(1)), "the end of a dropped program", end)
        .await?
}
