//! Byte streams to and from the guest's vsock ports. The guest's side is the tool `vsock`.

use super::{
    guest_streams::{
        LONG, accept, connect, dials, echo, fine, finished, is_free, is_refused, listens, ping,
        port, read_all, round_trip, write,
    },
    probe::{SOON, works},
    streams::{length, millis, payload, same_bytes},
};
use crate::{
    clause,
    clause::{Clause, Verdict},
    context::Context,
    ensure, ensure_eq, ensure_err,
};
use futures_util::future::{join_all, try_join_all};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vm_core::env::timeout;
use vm_trait::{ExecStatus, Signal, VmErrorKind, VmInstanceExt};

/// The clauses on streams.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(echoed, "vsock.bytes_go_round",
        "every byte that is written to a stream arrives once and in order, both ways", [Exec, Vsock], faults: []),
    clause!(megabytes, "vsock.megabytes_go_round",
        "megabytes go both ways at once, whatever the sizes of writes and reads", [Exec, Vsock], faults: []),
    clause!(many, "vsock.many_at_once",
        "many streams to one port go on beside each other and do not mix", [Exec, Vsock], faults: []),
    clause!(host_ends_first, "vsock.host_ends_first",
        "after the host's shutdown the guest reads the end, and what it writes then still arrives",
        [Exec, Vsock], faults: []),
    clause!(guest_ends_first, "vsock.guest_ends_first",
        "after the guest's shutdown the host reads the end, and what it writes then still arrives",
        [Exec, Vsock], faults: []),
    clause!(refused, "vsock.refused_without_listener",
        "connect to a port on which nothing listens is ConnectRefused, which may be tried again, until something does",
        [Exec, Vsock], faults: []),
    clause!(slow_reader, "vsock.slow_reader_stalls_itself_alone",
        "a stream that nobody reads takes a bounded number of bytes, stalls nothing else, and loses nothing",
        [Exec, Vsock], faults: [])
    .undisturbed(),
    clause!(guest_dials, "vsock.guest_connects",
        "a program in the guest reaches a listener of the host, with bytes both ways", [Exec, Vsock], faults: []),
    clause!(accept_order, "vsock.accept_in_order",
        "streams are accepted in the order in which the guest opened them", [Exec, Vsock], faults: [])
    .undisturbed(),
    clause!(guest_refused, "vsock.guest_is_refused",
        "a program in the guest is refused at a port of the host without a listener", [Exec, Vsock], faults: []),
    clause!(backlog, "vsock.backlog_is_bounded",
        "streams that nobody accepts are kept, and too many of them refused", [Exec, Vsock], faults: [])
    .undisturbed(),
    clause!(host_drops, "vsock.dropped_by_the_host",
        "the guest reads what was written before a stream was dropped, and then its end", [Exec, Vsock], faults: []),
    clause!(guest_dies, "vsock.dropped_by_the_guest",
        "a program that dies ends its streams", [Exec, Vsock], faults: []),
    clause!(listener_drops, "vsock.dropped_listener",
        "a dropped listener frees its port: what waited is closed, and what comes later refused, until the next",
        [Exec, Vsock], faults: []),
    clause!(two_listeners, "vsock.port_in_use",
        "a second listener on a port is PortInUse, on another port or machine it is not", [Vsock], faults: []),
    clause!(bad_ports, "vsock.bad_ports",
        "the ports 0 and 4294967295, and the agent's own for connect, are refused with InvalidConfig",
        [Vsock], faults: []),
];

async fn echoed(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let (_server, port) = echo(ctx, &vm).await?;
    for _ in 0..ctx.draw(1, 4) {
        let bytes = payload(ctx, 300_000);
        round_trip(ctx, connect(ctx, &vm, port).await?, &bytes).await?;
    }
    Ok(())
}

async fn megabytes(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let (_server, port) = echo(ctx, &vm).await?;
    let most = if ctx.heavy(6) { 3 << 20 } else { 1 << 18 };
    let bytes = ctx.bytes(length(ctx, most / 2, most));
    round_trip(ctx, connect(ctx, &vm, port).await?, &bytes).await
}

async fn many(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let (_server, port) = echo(ctx, &vm).await?;
    let trips = (0..ctx.draw(2, 24)).map(|_| {
        let bytes = payload(ctx, 70_000);
        let vm = &vm;
        async move { round_trip(ctx, connect(ctx, vm, port).await?, &bytes).await }
    });
    let trips: Vec<_> = trips.collect();
    try_join_all(trips).await.map(drop)
}

async fn host_ends_first(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let (_server, port) = echo(ctx, &vm).await?;
    let mut stream = connect(ctx, &vm, port).await?;
    let bytes = ctx.bytes(length(ctx, 1, 40_000));
    write(ctx, &mut stream, &bytes).await?;
    fine("shutdown", stream.shutdown().await)?;
    ensure!(stream.write(b"more").await.is_err(), "a write after shutdown was taken");
    ctx.sleep(millis(ctx, 0, 50)).await;
    same_bytes(&read_all(ctx, &mut stream, bytes.len()).await?, &bytes, "after the host's end")
}

async fn guest_ends_first(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let port = port(ctx);
    let server = listens(ctx, &vm, &[], port).await?;
    let mut stream = connect(ctx, &vm, port).await?;
    let (from_guest, from_host) = (payload(ctx, 100_000), payload(ctx, 100_000));
    server.write_stdin(from_guest.clone()).await?;
    server.close_stdin().await?;
    let came = read_all(ctx, &mut stream, from_guest.len()).await?;
    same_bytes(&came, &from_guest, "what the guest wrote")?;
    ctx.sleep(millis(ctx, 0, 50)).await;
    write(ctx, &mut stream, &from_host).await?;
    drop(stream);
    let (status, out, error) = finished(ctx, &server).await?;
    ensure_eq!(status, ExecStatus::Exited(0), "the guest's tool, which said `{error}`");
    same_bytes(&out, &from_host, "what the host wrote after the guest's end")
}

async fn refused(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let port = port(ctx);
    for round in 0..ctx.draw(1, 2) {
        let outcome = ctx.within(SOON, "a refused connect", vm.connect(port)).await?;
        if let Err(error) = &outcome {
            ensure!(error.is_retriable(), "round {round}: {error} is not retriable");
        }
        ensure_err!(outcome, VmErrorKind::ConnectRefused { port: said } if *said == port, "round {round}");
        let server = listens(ctx, &vm, &["--echo"], port).await?;
        ping(ctx, &mut connect(ctx, &vm, port).await?, "once something listens").await?;
        server.signal(Signal::KILL).await?;
        server.wait().await?;
    }
    let outcome = ctx.within(SOON, "a refused connect", vm.connect(port)).await?;
    ensure_err!(outcome, VmErrorKind::ConnectRefused { .. }, "once nothing listens any more");
    works(ctx, &vm, "after refused connects").await
}

async fn slow_reader(ctx: &Context) -> Verdict {
    const MOST: usize = 16 << 20;
    let vm = ctx.running().await?;
    let (_server, port) = echo(ctx, &vm).await?;
    let mut slow = connect(ctx, &vm, port).await?;
    let pattern = ctx.bytes(65_521);
    let mut sent = 0;
    loop {
        let piece = &pattern[sent % pattern.len()..];
        match timeout(&**ctx.env(), Duration::from_secs(2), slow.write(piece)).await {
            Ok(written) => sent += fine("a write to the slow stream", written)?,
            Err(_) => break,
        }
        ensure!(sent < MOST, "a stream that nobody reads took {sent} bytes");
    }
    works(ctx, &vm, "beside a stalled stream").await?;
    ctx.within(SOON, "ping beside a stalled stream", vm.ping()).await??;
    round_trip(ctx, connect(ctx, &vm, port).await?, &payload(ctx, 100_000)).await?;
    let wanted: Vec<_> = pattern.iter().copied().cycle().take(sent).collect();
    let (mut reader, mut writer) = tokio::io::split(slow);
    let ends = async { fine("shutdown", writer.shutdown().await) };
    let read = read_all(ctx, &mut reader, sent);
    let (ended, came) = futures_util::future::join(ends, read).await;
    ended?;
    same_bytes(&came?, &wanted, "what the stalled stream held")
}

async fn guest_dials(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let port = port(ctx);
    let mut listener = vm.listen(port).await?;
    ensure_eq!(listener.port(), port, "the port of the listener");
    for _ in 0..ctx.draw(1, 3) {
        let process = dials(&vm, port).await?;
        let mut stream = accept(ctx, &mut listener).await?;
        ensure_eq!(stream.port(), port, "the port of the stream");
        let (from_guest, from_host) = (payload(ctx, 100_000), payload(ctx, 100_000));
        process.write_stdin(from_guest.clone()).await?;
        process.close_stdin().await?;
        let came = read_all(ctx, &mut stream, from_guest.len()).await?;
        same_bytes(&came, &from_guest, "what the guest wrote")?;
        write(ctx, &mut stream, &from_host).await?;
        drop(stream);
        let (status, out, error) = finished(ctx, &process).await?;
        ensure_eq!(status, ExecStatus::Exited(0), "the guest's tool, which said `{error}`");
        same_bytes(&out, &from_host, "what the host wrote")?;
    }
    Ok(())
}

async fn accept_order(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let port = port(ctx);
    let mut listener = vm.listen(port).await?;
    let mut programs = Vec::new();
    let count = ctx.draw(2, 6);
    for number in 0..count {
        let process = dials(&vm, port).await?;
        process.write_stdin(vec![u8::try_from(number).unwrap_or(0)]).await?;
        programs.push(process);
        // Which of two programs comes first is the guest's affair; so the second begins well after the first.
        ctx.sleep(Duration::from_millis(200)).await;
    }
    for number in 0..count {
        let mut stream = accept(ctx, &mut listener).await?;
        let first = ctx.within(SOON, "the first byte", stream.read_u8()).await?;
        ensure_eq!(u64::from(fine("the first byte", first)?), number, "which stream came");
    }
    for process in &programs {
        ensure_eq!(finished(ctx, process).await?.0, ExecStatus::Exited(0), "a guest's tool");
    }
    Ok(())
}

async fn guest_refused(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let port = port(ctx);
    is_refused(ctx, &vm, port, "without a listener").await?;
    let _other = vm.listen(port + 1).await?;
    is_refused(ctx, &vm, port, "with a listener on another port").await
}

async fn backlog(ctx: &Context) -> Verdict {
    const KEPT: usize = 16;
    const TRIED: usize = 40;
    let vm = ctx.running().await?;
    let port = port(ctx);
    let mut listener = vm.listen(port).await?;
    let begun: Vec<_> = join_all((0..TRIED).map(|_| dials(&vm, port))).await;
    let programs = begun.into_iter().collect::<Result<Vec<_>, _>>()?;
    // Those that were refused end by themselves; the others wait for the host.
    ctx.sleep(Duration::from_secs(2)).await;
    let running = vm.processes().await?.iter().filter(|process| process.status.is_none()).count();
    ensure!(running >= KEPT, "only {running} streams were kept");
    ensure!(running < TRIED, "{running} streams were kept");
    for _ in 0..running {
        drop(accept(ctx, &mut listener).await?);
    }
    let mut kept = 0;
    for process in &programs {
        kept += usize::from(finished(ctx, process).await?.0 == ExecStatus::Exited(0));
    }
    ensure_eq!(kept, running, "the tools that were served");
    // There is room again.
    let process = dials(&vm, port).await?;
    drop(accept(ctx, &mut listener).await?);
    ensure_eq!(finished(ctx, &process).await?.0, ExecStatus::Exited(0), "the next tool");
    Ok(())
}

async fn host_drops(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let port = port(ctx);
    let server = listens(ctx, &vm, &[], port).await?;
    let mut stream = connect(ctx, &vm, port).await?;
    let bytes = payload(ctx, 100_000);
    write(ctx, &mut stream, &bytes).await?;
    drop(stream);
    let (status, out, error) = finished(ctx, &server).await?;
    ensure_eq!(status, ExecStatus::Exited(0), "the guest's tool, which said `{error}`");
    same_bytes(&out, &bytes, "what was written before the drop")
}

async fn guest_dies(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let port = port(ctx);
    let server = listens(ctx, &vm, &[], port).await?;
    let mut stream = connect(ctx, &vm, port).await?;
    let bytes = ctx.bytes(length(ctx, 1, 10_000));
    server.write_stdin(bytes.clone()).await?;
    let mut came = vec![0; bytes.len()];
    let read = ctx.within(LONG, "bytes of the guest", stream.read_exact(&mut came)).await?;
    fine("bytes of the guest", read)?;
    same_bytes(&came, &bytes, "bytes of the guest")?;
    server.signal(Signal::KILL).await?;
    super::guest_streams::has_ended(ctx, &mut stream, "after the program was killed").await?;
    works(ctx, &vm, "after a stream's program was killed").await
}

async fn listener_drops(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let port = port(ctx);
    let listener = vm.listen(port).await?;
    let waiting = dials(&vm, port).await?;
    if ctx.one_in(2) {
        ctx.sleep(millis(ctx, 1, 100)).await;
    }
    drop(listener);
    // It was connected and is closed, or came too late.
    finished(ctx, &waiting).await?;
    is_refused(ctx, &vm, port, "after the listener was dropped").await?;
    let mut next = vm.listen(port).await?;
    let process = dials(&vm, port).await?;
    drop(accept(ctx, &mut next).await?);
    ensure_eq!(finished(ctx, &process).await?.0, ExecStatus::Exited(0), "the next listener's tool");
    Ok(())
}

async fn two_listeners(ctx: &Context) -> Verdict {
    let (vm, other) = (ctx.running().await?, ctx.running().await?);
    let port = port(ctx);
    let first = vm.listen(port).await?;
    ensure_err!(
        vm.listen(port).await,
        VmErrorKind::PortInUse { port: said } if *said == port,
        "a second listener"
    );
    let _beside = vm.listen(port + 1).await?;
    let _elsewhere = other.listen(port).await?;
    drop(first);
    is_free(&*vm, port).await?;
    is_free(&*vm, port).await
}

async fn bad_ports(ctx: &Context) -> Verdict {
    const AGENT_PORT: u32 = 1024;
    let vm = ctx.running().await?;
    for port in [0, u32::MAX] {
        ensure_err!(
            vm.listen(port).await,
            VmErrorKind::InvalidConfig { field, .. } if field == "port",
            "listen on port {port}"
        );
    }
    for port in [0, u32::MAX, AGENT_PORT] {
        ensure_err!(
            vm.connect(port).await,
            VmErrorKind::InvalidConfig { field, .. } if field == "port",
            "connect to port {port}"
        );
    }
    vm.ping().await?;
    // The host's ports are its own.
    is_free(&*vm, AGENT_PORT).await?;
    let (low, high) = (1, u32::MAX - 1);
    is_free(&*vm, ctx.pick(&[low, high])).await?;
    ensure!(vm.exists("/").await?, "the machine works on");
    Ok(())
}
