//! Streams and the life of their machine: states, pauses, ends, cancellation, copies.

use super::{
    guest_streams::{
        accept, connect, dials, echo, fine, finished, has_ended, is_free, listens, passes_on, ping,
        port, round_trip,
    },
    leftovers::nothing_left,
    probe::{SOON, Stage, Vm, crash, cut, works},
    streams::{length, millis, same_bytes},
};
use crate::{
    clause,
    clause::{Broken, Clause, Verdict},
    context::Context,
    ensure, ensure_eq, ensure_err,
};
use futures_util::future::join;
use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, split};
use vm_trait::{
    Capability, ExecStatus, ForkOptions, GuestProcess, GuestStream, OutputOffsets, RestoreOptions,
    SnapshotOptions, StopOptions, VmErrorKind, VmInstanceExt, VmState,
};

/// The clauses on streams and the life of their machine.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(states, "vsock.running_alone",
        "connect and listen are refused with InvalidState in every state but Running", [Vsock], faults: []),
    clause!(pause, "vsock.stalls_while_paused",
        "a stream stands still while the machine is paused, and goes on after resume with every byte",
        [Exec, Vsock, Pause], faults: []),
    clause!(meets_capture, "vsock.connect_waits_for_a_capture",
        "a connect that meets a snapshot of its machine comes through once the machine goes on",
        [Exec, Vsock, Snapshot], faults: []),
    clause!(ends, "vsock.ends_with_its_machine",
        "when a machine is stopped or killed, its streams end, and accept is Interrupted, then and ever after",
        [Exec, Vsock], faults: []).fresh(),
    clause!(crashes, "vsock.ends_with_a_crash",
        "when a machine crashes, its streams end, and accept fails", [Exec, Vsock], faults: [VmmKilled]).fresh(),
    clause!(powers_off, "vsock.ends_with_a_power_off",
        "when a guest powers off, its streams end, and accept is Disconnected",
        [Exec, Vsock, GuestKernel], faults: []).fresh(),
    clause!(next_life, "vsock.belongs_to_one_life",
        "after a restart there are no streams and listeners of before, and their ports are free",
        [Exec, Vsock], faults: []).fresh(),
    clause!(dropped_connects, "vsock.dropped_connects",
        "a connect that is dropped half-way leaves nothing, and the next one works", [Exec, Vsock], faults: []),
    clause!(dropped_accepts, "vsock.dropped_accepts",
        "an accept that is dropped half-way loses no stream", [Exec, Vsock], faults: []),
    clause!(handles, "vsock.handles_do_not_hold",
        "a stream or listener does not keep a machine alive, and leaves nothing once it is dropped",
        [Exec, Vsock], faults: []).fresh(),
    clause!(snapshots, "vsock.snapshot_leaves_the_source",
        "the streams of a machine go on across a snapshot; the restored machine's ends are reset, its listeners listen",
        [Exec, Vsock, Snapshot], faults: []),
    clause!(forks, "vsock.fork_leaves_the_source",
        "the streams of a machine go on across a fork; the children's ends are reset, their listeners listen",
        [Exec, Vsock, Fork], faults: []),
    clause!(restores, "vsock.restore_in_place",
        "a machine that is restored in place has none of the streams and listeners of its life before",
        [Exec, Vsock, Snapshot, RestoreInPlace], faults: [])
    .fresh(),
];

async fn states(ctx: &Context) -> Verdict {
    for stage in Stage::reachable(ctx) {
        let vm = stage.reach(ctx).await?;
        let port = port(ctx);
        let (connected, listening) = (vm.connect(port).await, vm.listen(port).await);
        if stage == Stage::Running {
            ensure_err!(connected, VmErrorKind::ConnectRefused { .. }, "connect in Running");
            listening?;
            continue;
        }
        let state = vm.state();
        ensure_err!(
            connected,
            VmErrorKind::InvalidState { state: said } if *said == state,
            "connect in {stage:?}"
        );
        ensure_err!(
            listening,
            VmErrorKind::InvalidState { state: said } if *said == state,
            "listen in {stage:?}"
        );
        ensure_eq!(vm.state(), state, "the state afterwards");
    }
    Ok(())
}

async fn pause(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let (_server, port) = echo(ctx, &vm).await?;
    let stream = connect(ctx, &vm, port).await?;
    let bytes = ctx.bytes(length(ctx, 100_000, 1_000_000));
    let came = Arc::new(AtomicUsize::new(0));
    let (mut reader, mut writer) = split(stream);
    let sending = {
        let bytes = bytes.clone();
        ctx.spawn(async move {
            writer.write_all(&bytes).await?;
            writer.shutdown().await
        })
    };
    let receiving = {
        let came = Arc::clone(&came);
        ctx.spawn(async move {
            let mut all = Vec::new();
            while reader.read_buf(&mut all).await? > 0 {
                came.store(all.len(), Ordering::Relaxed);
            }
            Ok::<_, std::io::Error>(all)
        })
    };
    for _ in 0..ctx.draw(1, 3) {
        ctx.sleep(Duration::from_micros(ctx.draw(0, 3_000))).await;
        vm.pause().await?;
        // What had left the guest may still arrive.
        ctx.sleep(millis(ctx, 900, 1_000)).await;
        let before = came.load(Ordering::Relaxed);
        ctx.sleep(millis(ctx, 100, 300)).await;
        let after = came.load(Ordering::Relaxed);
        ensure_eq!(after, before, "the bytes that came from a paused machine");
        vm.resume().await?;
    }
    fine("sending across pauses", sending.join().await?)?;
    let all = ctx.within(super::guest_streams::LONG, "the rest", receiving.join()).await??;
    same_bytes(&fine("receiving across pauses", all)?, &bytes, "across pauses")
}

/// A machine with a stream that was used, a reader that waits, and an accept that waits.
struct Waiting {
    stream: GuestStream,
    _server: GuestProcess,
    accepting: crate::context::Task<(Result<(), VmErrorKind>, Result<(), VmErrorKind>)>,
}

impl Waiting {
    async fn begin(ctx: &Context, vm: &Vm) -> Result<Self, Broken> {
        let (server, port) = echo(ctx, vm).await?;
        let mut stream = connect(ctx, vm, port).await?;
        ping(ctx, &mut stream, "before the end").await?;
        let mut listener = vm.listen(port).await?;
        let accepting = ctx.spawn(async move {
            let kind = |error: vm_trait::VmError| error.kind().clone();
            let first = listener.accept().await.map(drop).map_err(kind);
            (first, listener.accept().await.map(drop).map_err(kind))
        });
        Ok(Self { stream, _server: server, accepting })
    }

    /// Lets `end` end the machine, and checks that everything ends with it. Gives how accept failed.
    async fn ended(
        mut self,
        ctx: &Context,
        end: impl Future<Output = Verdict>,
    ) -> Result<VmErrorKind, Broken> {
        let reading = async {
            // Half of the time, the read waits already.
            if ctx.one_in(2) {
                ctx.sleep(millis(ctx, 50, 200)).await;
            }
            has_ended(ctx, &mut self.stream, "a stream of a machine that ends").await
        };
        let ending = async {
            ctx.sleep(millis(ctx, 0, 20)).await;
            end.await
        };
        let (ended, read) = join(ending, reading).await;
        ended?;
        read?;
        let (first, second) =
            ctx.within(SOON, "accept on a machine that ended", self.accepting.join()).await??;
        let Err(kind) = first else { return Err(Broken::new("accept gave a stream at the end")) };
        ensure_eq!(second, Err(kind.clone()), "the next accept");
        Ok(kind)
    }
}

async fn ends(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let waiting = Waiting::begin(ctx, &vm).await?;
    let end = async {
        if ctx.one_in(2) {
            return Ok(vm.kill().await?);
        }
        Ok(vm.stop(StopOptions::default().with_grace(millis(ctx, 0, 200))).await?)
    };
    let kind = waiting.ended(ctx, end).await?;
    ensure_eq!(kind, VmErrorKind::Interrupted, "how accept failed");
    Ok(())
}

async fn crashes(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let waiting = Waiting::begin(ctx, &vm).await?;
    let kind = waiting.ended(ctx, crash(ctx, &vm)).await?;
    ensure!(
        matches!(kind, VmErrorKind::VmmCrashed { .. } | VmErrorKind::GuestCrashed { .. }),
        "accept failed with {kind}"
    );
    Ok(())
}

async fn powers_off(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let waiting = Waiting::begin(ctx, &vm).await?;
    let end = async {
        // Whether the guest still answers is not the question.
        let _ = vm.sh("poweroff -f").await;
        super::probe::until_state(ctx, &vm, VmState::Stopped).await
    };
    let kind = waiting.ended(ctx, end).await?;
    ensure_eq!(kind, VmErrorKind::Disconnected, "how accept failed");
    Ok(())
}

async fn next_life(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let (_server, guest_port) = echo(ctx, &vm).await?;
    let mut stream = connect(ctx, &vm, guest_port).await?;
    let host_port = port(ctx);
    let mut listener = vm.listen(host_port).await?;
    vm.kill().await?;
    vm.start().await?;
    has_ended(ctx, &mut stream, "a stream of the life before").await?;
    let outcome = ctx.within(SOON, "accept of the life before", listener.accept()).await?;
    ensure_err!(outcome, VmErrorKind::Interrupted, "accept of the life before");
    let mut next = vm.listen(host_port).await?;
    drop(listener);
    let process = dials(&vm, host_port).await?;
    drop(accept(ctx, &mut next).await?);
    ensure_eq!(finished(ctx, &process).await?.0, ExecStatus::Exited(0), "a tool of the next life");
    let server = listens(ctx, &vm, &["--echo"], guest_port).await?;
    round_trip(ctx, connect(ctx, &vm, guest_port).await?, &ctx.bytes(1_000)).await?;
    drop(server);
    Ok(())
}

async fn dropped_connects(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let (_server, port) = echo(ctx, &vm).await?;
    for _ in 0..ctx.draw(1, 6) {
        let target = if ctx.one_in(3) { port + 1 } else { port };
        match cut(ctx, Duration::from_millis(2), vm.connect(target)).await {
            Some(Ok(mut stream)) => ping(ctx, &mut stream, "a connect that was in time").await?,
            Some(refused) => {
                ensure_err!(refused, VmErrorKind::ConnectRefused { .. }, "a connect");
            }
            None => {}
        }
    }
    round_trip(ctx, connect(ctx, &vm, port).await?, &ctx.bytes(10_000)).await?;
    works(ctx, &vm, "after dropped connects").await
}

async fn dropped_accepts(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let port = port(ctx);
    let mut listener = vm.listen(port).await?;
    let mut programs = Vec::new();
    let mut streams = Vec::new();
    let count = ctx.draw(1, 8);
    for number in 0..count {
        let process = dials(&vm, port).await?;
        process.write_stdin(vec![u8::try_from(number).unwrap_or(0)]).await?;
        programs.push(process);
        for _ in 0..ctx.draw(0, 4) {
            let taken = cut(ctx, Duration::from_millis(10), listener.accept()).await;
            streams.extend(taken.transpose()?);
        }
    }
    while u64::try_from(streams.len()).unwrap_or(u64::MAX) < count {
        streams.push(accept(ctx, &mut listener).await?);
    }
    let mut seen = BTreeSet::new();
    for stream in &mut streams {
        let first = ctx.within(SOON, "the first byte", stream.read_u8()).await?;
        seen.insert(u64::from(fine("the first byte", first)?));
    }
    ensure_eq!(seen, (0..count).collect::<BTreeSet<_>>(), "the streams that were accepted");
    Ok(())
}

async fn handles(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let (server, guest_port) = echo(ctx, &vm).await?;
    let mut stream = connect(ctx, &vm, guest_port).await?;
    ping(ctx, &mut stream, "before the drop").await?;
    let mut listener = vm.listen(port(ctx)).await?;
    drop((vm, server));
    has_ended(ctx, &mut stream, "a stream of a machine that was dropped").await?;
    let outcome = ctx.within(SOON, "accept on a dropped machine", listener.accept()).await?;
    ensure_err!(outcome, VmErrorKind::Interrupted, "accept on a dropped machine");
    drop((stream, listener));
    nothing_left(ctx).await
}

/// A machine with an echo and a stream to it, and with a program that holds a connection of its own.
struct Source {
    vm: Vm,
    port: u32,
    stream: GuestStream,
    held: GuestStream,
    holder: GuestProcess,
    _server: GuestProcess,
}

impl Source {
    async fn make(ctx: &Context) -> Result<Self, Broken> {
        let vm = ctx.running().await?;
        let (server, port) = echo(ctx, &vm).await?;
        let mut stream = connect(ctx, &vm, port).await?;
        ping(ctx, &mut stream, "before the copy").await?;
        let other = port + 1;
        let holder = listens(ctx, &vm, &[], other).await?;
        let held = connect(ctx, &vm, other).await?;
        let mut source = Self { vm, port, stream, held, holder, _server: server };
        source.goes_on(ctx, "before the copy").await?;
        Ok(source)
    }

    /// Checks that both streams go on.
    async fn goes_on(&mut self, ctx: &Context, when: &str) -> Verdict {
        ping(ctx, &mut self.stream, when).await?;
        passes_on(ctx, &mut self.held, &self.holder, when).await
    }

    /// Checks that in a copy of the machine the connection is gone, and the listener there.
    async fn copied(&mut self, ctx: &Context, copy: &Vm) -> Verdict {
        let holder = copy.attach_process(self.holder.id(), OutputOffsets::default()).await?;
        let status = ctx.within(SOON, "the end of a copied connection", holder.wait()).await??;
        ensure!(matches!(status, ExecStatus::Exited(_)), "the copy's program ended by {status:?}");
        round_trip(ctx, connect(ctx, copy, self.port).await?, &ctx.bytes(5_000)).await?;
        is_free(&**copy, self.port).await
    }
}

async fn meets_capture(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let (_server, port) = echo(ctx, &vm).await?;
    for _ in 0..ctx.draw(1, 2) {
        let connects = async {
            for _ in 0..ctx.draw(6, 12) {
                ctx.sleep(millis(ctx, 0, 30)).await;
                let mut stream = connect(ctx, &vm, port).await?;
                ping(ctx, &mut stream, "in a stream from beside a snapshot").await?;
            }
            Result::<(), Broken>::Ok(())
        };
        let (snapshot, connected) = join(vm.snapshot(SnapshotOptions::default()), connects).await;
        connected?;
        ctx.backend().delete_snapshot(&snapshot?).await?;
    }
    Ok(())
}

async fn snapshots(ctx: &Context) -> Verdict {
    let mut source = Source::make(ctx).await?;
    let pauses = ctx.has(Capability::Pause) && ctx.one_in(3);
    if pauses {
        source.vm.pause().await?;
    }
    let snapshot = source.vm.snapshot(SnapshotOptions::default()).await?;
    if pauses {
        source.vm.resume().await?;
    }
    source.goes_on(ctx, "after a snapshot").await?;
    let copy = ctx.backend().restore(&snapshot, RestoreOptions::running()).await?;
    source.copied(ctx, &copy).await?;
    source.goes_on(ctx, "after a restore of its snapshot").await?;
    Ok(ctx.backend().delete_snapshot(&snapshot).await?)
}

async fn forks(ctx: &Context) -> Verdict {
    let mut source = Source::make(ctx).await?;
    let listener = source.vm.listen(source.port).await?;
    let count = u32::try_from(ctx.draw(1, 3)).unwrap_or(1);
    let children = source.vm.fork(ForkOptions::new(count)).await?;
    source.goes_on(ctx, "after a fork").await?;
    for child in children {
        source.copied(ctx, &child?).await?;
    }
    source.goes_on(ctx, "beside its children").await?;
    ensure_err!(
        source.vm.listen(source.port).await,
        VmErrorKind::PortInUse { .. },
        "a second listener after a fork"
    );
    drop(listener);
    Ok(())
}

async fn restores(ctx: &Context) -> Verdict {
    let mut source = Source::make(ctx).await?;
    let mut listener = source.vm.listen(source.port).await?;
    let snapshot = source.vm.snapshot(SnapshotOptions::default()).await?;
    source.vm.kill().await?;
    has_ended(ctx, &mut source.stream, "before a restore in place").await?;
    source.vm.restore(&snapshot, RestoreOptions::running()).await?;
    has_ended(ctx, &mut source.held, "after a restore in place").await?;
    let outcome = ctx.within(SOON, "accept of the life before", listener.accept()).await?;
    ensure_err!(outcome, VmErrorKind::Interrupted, "accept of the life before");
    let vm = source.vm.clone();
    source.copied(ctx, &vm).await?;
    Ok(ctx.backend().delete_snapshot(&snapshot).await?)
}
