//! Networks and the life of their machine: pauses, ends, copies, and faults on the way.

use super::{
    guest_streams::{LONG, fine, has_ended, passes_on, ping},
    network_ports::{NETWORKS, Networked, cannot_start, connect, leads_nowhere, networks},
    probe::{SOON, Vm, crash, order, works},
    streams::{length, millis, same_bytes},
};
use crate::{
    clause,
    clause::{Broken, Clause, Verdict},
    context::Context,
    ensure, ensure_err,
};
use futures_util::future::join;
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, split};
use vm_core::{
    fault::{FaultKind, FaultOrder},
    machine::Link,
};
use vm_trait::{
    Capability, ExecStatus, ForkOptions, GuestProcess, NetworkConfig, OutputOffsets, ProcessId,
    RestoreOptions, Signal, SnapshotOptions, StopOptions, VmErrorKind, VmState,
};

/// The clauses on networks and the life of their machine.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(come_free, "network.ports_come_free",
        "after a stop, a kill, a crash and the drop of a machine its ports are the host's again, at once", [Exec],
        faults: [])
    .with_one_of(NETWORKS),
    clause!(ends, "network.ends_with_its_machine",
        "when a machine ends, its connections end, and in its next life its ports lead into that", [Exec], faults: [])
    .with_one_of(NETWORKS),
    clause!(pause, "network.stalls_while_paused",
        "a connection stands still while the machine is paused, and goes on after resume with every byte",
        [Exec, Pause], faults: [])
    .with_one_of(NETWORKS),
    clause!(meets_pause, "network.connect_waits_for_resume",
        "a connection that is begun while the machine is paused is served once it goes on", [Exec, Pause], faults: [])
    .with_one_of(NETWORKS),
    clause!(snapshots, "network.restored_needs_its_ports",
        "a restore is PortInUse while the source has the ports; later it has them, its listeners listen, and its old \
         connections are reset",
        [Exec, Snapshot], faults: [])
    .with_one_of(NETWORKS),
    clause!(forks, "network.fork_keeps_ports",
        "a fork leaves the ports and connections to the source; a child has none until it is started anew",
        [Exec, Fork], faults: [])
    .with_one_of(NETWORKS),
    clause!(restores, "network.restored_in_place",
        "a machine that is restored in place has its ports, and none of the connections of its life before",
        [Exec, Snapshot, RestoreInPlace], faults: [])
    .with_one_of(NETWORKS),
    clause!(refused, "network.refused_connection",
        "a connection that the host refuses fails alone, and the next one comes through", [Exec], faults: [NetRefused])
    .with_one_of(NETWORKS),
    clause!(reset, "network.reset_connection",
        "a connection that is reset gives a true beginning of what was sent and then its end, on both sides, and \
         leaves others alone",
        [Exec], faults: [NetReset])
    .with_one_of(NETWORKS),
    clause!(slow, "network.slow_connection",
        "a slow network delays bytes, and none is lost or out of order", [Exec], faults: [NetSlow])
    .with_one_of(NETWORKS),
];

/// Checks that the host can have the port.
async fn is_free(ctx: &Context, port: u16, when: &str) -> Verdict {
    let listened = ctx.host_listen(port).await;
    ensure!(listened.is_ok(), "{when} port {port} is not free: {:?}", listened.err());
    Ok(())
}

async fn come_free(ctx: &Context) -> Verdict {
    for network in networks(ctx) {
        let mut machine = Networked::start(ctx, &network, 2).await?;
        let ports = [machine.port(0).host, machine.port(1).host];
        let crashes = ctx.can_fault(FaultKind::VmmKilled);
        let mut ends = vec!["a stop", "a kill", "a drop"];
        ends.extend(crashes.then_some("a crash"));
        if ctx.is_simulated() {
            ends = vec![ctx.pick(&ends)];
        }
        for end in ends {
            if machine.vm.state() != VmState::Running {
                machine.vm.start().await?;
            }
            // Somebody has a connection as it ends.
            let _echo = machine.echo(ctx).await?;
            let mut stream = machine.connect(ctx).await?;
            ping(ctx, &mut stream, "before the end").await?;
            match end {
                "a stop" => {
                    let grace = millis(ctx, 0, 200);
                    machine.vm.stop(StopOptions::default().with_grace(grace)).await?;
                }
                "a kill" => machine.vm.kill().await?,
                "a crash" => crash(ctx, &machine.vm).await?,
                _ => {
                    let next = super::probe::made(ctx, |config| {
                        config.network = machine.network.clone();
                    });
                    drop(_echo);
                    drop(std::mem::replace(&mut machine.vm, next.await?));
                    has_ended(ctx, &mut stream, "after a drop").await?;
                    // Its end is the work of a task of the backend's.
                    ctx.sleep(Duration::from_millis(500)).await;
                }
            }
            for port in ports {
                is_free(ctx, port, &format!("after {end}")).await?;
                leads_nowhere(ctx, port, &format!("after {end}")).await?;
            }
        }
    }
    Ok(())
}

async fn ends(ctx: &Context) -> Verdict {
    for network in networks(ctx) {
        let machine = Networked::start(ctx, &network, 1).await?;
        let _echo = machine.echo(ctx).await?;
        let mut stream = machine.connect(ctx).await?;
        ping(ctx, &mut stream, "before the end").await?;
        let ending = async {
            ctx.sleep(millis(ctx, 0, 20)).await;
            machine.vm.kill().await
        };
        let read = has_ended(ctx, &mut stream, "a connection of a machine that ends");
        let (ended, read) = join(ending, read).await;
        ended?;
        read?;
        machine.vm.start().await?;
        machine.leads_nowhere(ctx, 0, "in the next life").await?;
        let _echo = machine.echo(ctx).await?;
        machine.echoes(ctx, "in the next life").await?;
    }
    Ok(())
}

async fn pause(ctx: &Context) -> Verdict {
    for network in networks(ctx) {
        let machine = Networked::start(ctx, &network, 1).await?;
        let _echo = machine.echo(ctx).await?;
        let bytes = ctx.bytes(length(ctx, 100_000, 1_000_000));
        let came = Arc::new(AtomicUsize::new(0));
        let (mut reader, mut writer) = split(machine.connect(ctx).await?);
        let sending = {
            let bytes = bytes.clone();
            ctx.spawn(async move { writer.write_all(&bytes).await.map(|()| writer) })
        };
        let receiving = {
            let (came, length) = (Arc::clone(&came), bytes.len());
            ctx.spawn(async move {
                let mut all = Vec::new();
                while all.len() < length {
                    match reader.read_buf(&mut all).await {
                        Ok(0) => break,
                        Ok(_) => came.store(all.len(), Ordering::Relaxed),
                        Err(error) => return (all, Err(error)),
                    }
                }
                (all, Ok(()))
            })
        };
        for _ in 0..ctx.draw(1, 3) {
            ctx.sleep(Duration::from_micros(ctx.draw(0, 3_000))).await;
            machine.vm.pause().await?;
            // What had left the guest may still arrive.
            ctx.sleep(millis(ctx, 900, 1_000)).await;
            let before = came.load(Ordering::Relaxed);
            ctx.sleep(millis(ctx, 100, 300)).await;
            let after = came.load(Ordering::Relaxed);
            ensure!(after == before, "{} bytes came from a paused machine", after - before);
            machine.vm.resume().await?;
        }
        let sent = sending.join().await?;
        let (all, received) = ctx.within(LONG, "the rest", receiving.join()).await??;
        // A real passt gives up a guest that does not answer for some seconds, which a busy host can make of a pause.
        let may_reset = matches!(network, NetworkConfig::Passt(_)) && !ctx.is_simulated();
        if may_reset && (received.is_err() || sent.is_err()) {
            ensure!(bytes.starts_with(&all), "what came before a reset is not what was sent");
            continue;
        }
        let _writer = fine("sending across pauses", sent)?;
        fine("receiving across pauses", received)?;
        same_bytes(&all, &bytes, "across pauses")?;
    }
    Ok(())
}

async fn meets_pause(ctx: &Context) -> Verdict {
    for network in networks(ctx) {
        let machine = Networked::start(ctx, &network, 1).await?;
        let _echo = machine.echo(ctx).await?;
        machine.vm.pause().await?;
        let served = async {
            let mut stream = match ctx.host_connect(machine.port(0).host).await {
                Ok(stream) => stream,
                Err(error) => return Err(Broken::new(format!("connecting: {error}"))),
            };
            ping(ctx, &mut stream, "in a connection from beside a pause").await?;
            Ok(ctx.now())
        };
        let resumed = async {
            ctx.sleep(millis(ctx, 100, 2_000)).await;
            let begun = ctx.now();
            machine.vm.resume().await?;
            Ok::<_, Broken>(begun)
        };
        let both = ctx.within(LONG, "a connection that meets a pause", join(served, resumed));
        let (served, resumed) = both.await?;
        let (served, resumed) = (served?, resumed?);
        ensure!(served >= resumed, "a paused machine served a connection");
    }
    Ok(())
}

/// A machine whose port leads to an echo, and that holds connections.
struct Source {
    machine: Networked,
    echo: GuestProcess,
    stream: Box<dyn Link>,
    /// A program with a connection of its own, and the host's end of it.
    holder: GuestProcess,
    held: Box<dyn Link>,
}

impl Source {
    async fn make(ctx: &Context, network: &NetworkConfig) -> Result<Self, Broken> {
        let machine = Networked::start(ctx, network, 2).await?;
        let echo = machine.echo(ctx).await?;
        let stream = machine.connect(ctx).await?;
        let holder = machine.listens(ctx, &[], 1).await?;
        let held = connect(ctx, machine.port(1).host).await?;
        let mut source = Self { machine, echo, stream, holder, held };
        source.goes_on(ctx, "before the copy").await?;
        Ok(source)
    }

    /// Checks that both connections go on.
    async fn goes_on(&mut self, ctx: &Context, when: &str) -> Verdict {
        ping(ctx, &mut self.stream, when).await?;
        passes_on(ctx, &mut self.held, &self.holder, when).await
    }
}

/// Checks that in a copy of a machine a program's connection is gone.
async fn is_reset_in(ctx: &Context, copy: &Vm, program: ProcessId) -> Verdict {
    let holder = copy.attach_process(program, OutputOffsets::default()).await?;
    let status = ctx.within(SOON, "the end of a copied connection", holder.wait()).await??;
    ensure!(matches!(status, ExecStatus::Exited(_)), "the copy's program ended by {status:?}");
    Ok(())
}

async fn snapshots(ctx: &Context) -> Verdict {
    for network in networks(ctx) {
        let mut source = Source::make(ctx, &network).await?;
        let pauses = ctx.has(Capability::Pause) && ctx.one_in(3);
        if pauses {
            source.machine.vm.pause().await?;
        }
        let snapshot = source.machine.vm.snapshot(SnapshotOptions::default()).await?;
        if pauses {
            source.machine.vm.resume().await?;
        }
        source.goes_on(ctx, "after a snapshot").await?;
        let port = u32::from(source.machine.port(0).host);
        ensure_err!(
            ctx.backend().restore(&snapshot, RestoreOptions::running()).await,
            VmErrorKind::PortInUse { port: said } if *said == port,
            "a restore while the source has its ports"
        );
        source.goes_on(ctx, "after a restore that was refused").await?;
        source.machine.vm.kill().await?;
        has_ended(ctx, &mut source.stream, "when the source was killed").await?;
        let paused = ctx.has(Capability::Pause) && ctx.one_in(2);
        let options = if paused { RestoreOptions::paused() } else { RestoreOptions::running() };
        let copy = ctx.backend().restore(&snapshot, options).await?;
        if paused {
            copy.resume().await?;
        }
        source.machine.echoes(ctx, "in the restored machine").await?;
        is_reset_in(ctx, &copy, source.holder.id()).await?;
        let port = source.machine.port(0).host;
        cannot_start(ctx, &source.machine.vm, port, "which the restored machine has").await?;
        ctx.backend().delete_snapshot(&snapshot).await?;
    }
    Ok(())
}

async fn forks(ctx: &Context) -> Verdict {
    for network in networks(ctx) {
        let mut source = Source::make(ctx, &network).await?;
        let count = u32::try_from(ctx.draw(1, 2)).unwrap_or(1);
        let children = source.machine.vm.fork(ForkOptions::new(count)).await?;
        let children = children.into_iter().collect::<Result<Vec<_>, _>>()?;
        source.goes_on(ctx, "after a fork").await?;
        source.machine.echoes(ctx, "after a fork").await?;
        for child in &children {
            is_reset_in(ctx, child, source.holder.id()).await?;
            works(ctx, child, "a child without ports").await?;
        }
        // Only the children have the echo now.
        source.echo.signal(Signal::KILL).await?;
        source.echo.wait().await?;
        source.machine.leads_nowhere(ctx, 0, "once the source's own listener is gone").await?;
        let child = ctx.pick(&children);
        drop(children);
        child.kill().await?;
        let port = source.machine.port(0).host;
        cannot_start(ctx, &child, port, "which the source has").await?;
        source.machine.vm.kill().await?;
        child.start().await?;
        let network = source.machine.network.clone();
        let child = Networked { vm: child, network };
        let _echo = child.echo(ctx).await?;
        child.echoes(ctx, "in a child that was started anew").await?;
    }
    Ok(())
}

async fn restores(ctx: &Context) -> Verdict {
    for network in networks(ctx) {
        let mut source = Source::make(ctx, &network).await?;
        let snapshot = source.machine.vm.snapshot(SnapshotOptions::default()).await?;
        source.machine.vm.kill().await?;
        source.machine.vm.restore(&snapshot, RestoreOptions::running()).await?;
        has_ended(ctx, &mut source.stream, "after a restore in place").await?;
        has_ended(ctx, &mut source.held, "after a restore in place").await?;
        source.machine.echoes(ctx, "after a restore in place").await?;
        is_reset_in(ctx, &source.machine.vm, source.holder.id()).await?;
        ctx.backend().delete_snapshot(&snapshot).await?;
    }
    Ok(())
}

async fn refused(ctx: &Context) -> Verdict {
    for network in networks(ctx) {
        let machine = Networked::start(ctx, &network, 1).await?;
        let _echo = machine.echo(ctx).await?;
        let mut other = machine.connect(ctx).await?;
        let fault = FaultOrder::next(FaultKind::NetRefused).on(machine.vm.id());
        let ordered = order(ctx, fault)?;
        machine.leads_nowhere(ctx, 0, "a connection that the host refuses").await?;
        ordered.must_have_fired(ctx)?;
        machine.echoes(ctx, "after a connection that was refused").await?;
        ping(ctx, &mut other, "beside a connection that was refused").await?;
    }
    Ok(())
}

async fn reset(ctx: &Context) -> Verdict {
    for network in networks(ctx) {
        let machine = Networked::start(ctx, &network, 2).await?;
        let holder = machine.listens(ctx, &[], 1).await?;
        let _echo = machine.echo(ctx).await?;
        let mut other = machine.connect(ctx).await?;
        ping(ctx, &mut other, "before the fault").await?;
        let mut stream = connect(ctx, machine.port(1).host).await?;
        let bytes = ctx.bytes(length(ctx, 1, 20_000));
        let skip = u32::try_from(ctx.draw(0, 3)).unwrap_or(0);
        let fault = FaultOrder::next(FaultKind::NetReset).on(machine.vm.id()).after(skip);
        let ordered = order(ctx, fault)?;
        let begun = ctx.now();
        let mut sent = Vec::new();
        while ctx.within(SOON, "a write", stream.write_all(&bytes)).await?.is_ok() {
            sent.extend_from_slice(&bytes);
            ensure!(ctx.now() - begun < SOON, "a connection that is to be reset goes on");
            ctx.sleep(Duration::from_millis(1)).await;
        }
        // A part of what could not be written as a whole may have gone out.
        sent.extend_from_slice(&bytes);
        ordered.must_have_fired(ctx)?;
        has_ended(ctx, &mut stream, "a connection that was reset").await?;
        let (status, out, error) = super::guest_streams::finished(ctx, &holder).await?;
        ensure!(
            status == ExecStatus::Exited(1) && !error.is_empty(),
            "the guest's tool ended with {status:?} and said `{error}`"
        );
        ensure!(sent.starts_with(&out), "the guest read other bytes than were sent");
        ping(ctx, &mut other, "beside a connection that was reset").await?;
        machine.echoes(ctx, "after a connection was reset").await?;
    }
    Ok(())
}

async fn slow(ctx: &Context) -> Verdict {
    for network in networks(ctx) {
        let machine = Networked::start(ctx, &network, 1).await?;
        let _echo = machine.echo(ctx).await?;
        let mut stream = machine.connect(ctx).await?;
        let delay = Duration::from_millis(ctx.draw(100, 3_000));
        let fault = FaultOrder::next(FaultKind::NetSlow).on(machine.vm.id()).with_amount(delay);
        let ordered = order(ctx, fault)?;
        let begun = ctx.now();
        ping(ctx, &mut stream, "over a slow network").await?;
        ordered.must_have_fired(ctx)?;
        ensure!(ctx.now() - begun >= delay, "a slow network took {:?}", ctx.now() - begun);
        ping(ctx, &mut stream, "after the network was slow").await?;
    }
    Ok(())
}
