//! TCP between guests and their host: through mapped ports, to the host's loopback, and within the guest.

use super::{
    guest_streams::{
        LONG, fine, finished, has_ended, ping, read_all, round_trip, tool_listens, write,
    },
    probe::{SOON, Vm, started, until_state, works},
    streams::{length, millis, payload, same_bytes},
};
use crate::{
    clause,
    clause::{Broken, Clause, Verdict},
    context::Context,
    ensure, ensure_eq, ensure_err,
};
use bytes::Bytes;
use futures_util::future::{join, try_join_all};
use std::io;
use tokio::io::{AsyncReadExt, AsyncWriteExt, split};
use vm_core::machine::Link;
use vm_trait::{
    Capability, ExecRequest, ExecStatus, GuestProcess, NetworkConfig, PortForward, Signal,
    VmErrorKind, VmState,
};

/// The networks that a host's ports can be mapped over.
pub(super) const NETWORKS: &[Capability] = &[Capability::NetworkTsi, Capability::NetworkPasst];

/// The clauses on connections.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(reached, "network.mapped_port_reaches_guest",
        "what listens in the guest is reached at the mapped port of the host, with bytes both ways", [Exec], faults: [])
    .with_one_of(NETWORKS),
    clause!(bulk, "network.megabytes_go_round",
        "megabytes go both ways at once through a mapped port, every byte once and in order", [Exec], faults: [])
    .with_one_of(NETWORKS),
    clause!(many, "network.many_at_once",
        "many connections to a mapped port go on beside each other and do not mix", [Exec], faults: [])
    .with_one_of(NETWORKS),
    clause!(host_ends_first, "network.host_ends_first",
        "after the host's shutdown the guest reads the end, and what it writes then still arrives", [Exec], faults: [])
    .with_one_of(NETWORKS),
    clause!(guest_dies, "network.program_dies",
        "a program that is killed ends its connections through a mapped port", [Exec], faults: [])
    .with_one_of(NETWORKS),
    clause!(two_ports, "network.ports_do_not_mix",
        "each mapped port of a machine, and of two machines, leads where its configuration says", [Exec], faults: [])
    .with_one_of(NETWORKS),
    clause!(nobody, "network.nothing_listens",
        "a mapped port on which nothing listens in the guest refuses or ends its connections, until something does",
        [Exec], faults: [])
    .with_one_of(NETWORKS),
    clause!(taken_by_machine, "network.taken_by_a_machine",
        "a start that needs a port of a running machine is PortInUse and leaves the VM Stopped, until the port is free",
        [Exec], faults: [])
    .with_one_of(NETWORKS),
    clause!(taken_by_host, "network.taken_by_the_host",
        "a start that needs a port on which the host listens is PortInUse, and takes none of its other ports",
        [Exec], faults: [])
    .with_one_of(NETWORKS),
    clause!(own_loopback, "network.own_loopback",
        "programs of a guest reach each other at its own loopback address, whatever network it has",
        [Exec, GuestKernel], faults: []),
    clause!(none, "network.none_reaches_nothing",
        "a guest without a network reaches no listener of its host's loopback and no other address",
        [Exec, GuestKernel], faults: []),
    clause!(to_host, "network.tsi_reaches_host_loopback",
        "with TSI a program of the guest reaches a listener at the host's loopback address, and is refused without one",
        [Exec, NetworkTsi], faults: []),
    clause!(kept_from_host, "network.passt_keeps_from_host_loopback",
        "with passt a program of the guest is refused at its loopback address where only the host listens",
        [Exec, NetworkPasst, GuestKernel], faults: []),
];

/// Gives the networks to check: all that the backend claims on a real host, one of them where runs are many.
pub(super) fn networks(ctx: &Context) -> Vec<NetworkConfig> {
    let both = [NetworkConfig::tsi(), NetworkConfig::passt()];
    let claimed = both.into_iter().filter(|it| it.capability().is_none_or(|it| ctx.has(it)));
    let claimed: Vec<_> = claimed.collect();
    if ctx.is_simulated() { vec![ctx.pick(&claimed)] } else { claimed }
}

/// Draws a port of the guest that nobody else uses.
pub(super) fn guest_port(ctx: &Context) -> u16 {
    u16::try_from(ctx.draw(2_000, 60_000)).unwrap_or(2_000)
}

/// Maps free ports of the host to ports of the guest.
pub(super) async fn mapped(
    ctx: &Context,
    network: &NetworkConfig,
    count: u16,
) -> Result<NetworkConfig, Broken> {
    let (mut network, first) = (network.clone(), guest_port(ctx));
    for number in 0..count {
        network = network.with_port(ctx.host_port().await?, first + number);
    }
    Ok(network)
}

/// A running machine with a network.
pub(super) struct Networked {
    pub(super) vm: Vm,
    pub(super) network: NetworkConfig,
}

impl Networked {
    /// Starts a machine with so many mapped ports.
    pub(super) async fn start(
        ctx: &Context,
        network: &NetworkConfig,
        count: u16,
    ) -> Result<Self, Broken> {
        let network = mapped(ctx, network, count).await?;
        Self::start_with(ctx, network).await
    }

    /// Starts a machine with this network.
    pub(super) async fn start_with(ctx: &Context, network: NetworkConfig) -> Result<Self, Broken> {
        let vm = started(ctx, |config| config.network = network.clone()).await?;
        Ok(Self { vm, network })
    }

    /// Gives one of the mapped ports.
    pub(super) fn port(&self, index: usize) -> PortForward {
        self.network.ports()[index]
    }

    /// Starts an echo in the guest behind the first mapped port.
    pub(super) async fn echo(&self, ctx: &Context) -> Result<GuestProcess, Broken> {
        self.listens(ctx, &["--echo"], 0).await
    }

    /// Starts the guest's `tcp listen` with these words behind a mapped port.
    pub(super) async fn listens(
        &self,
        ctx: &Context,
        words: &[&str],
        index: usize,
    ) -> Result<GuestProcess, Broken> {
        tool_listens(ctx, &self.vm, "tcp", words, self.port(index).guest.into()).await
    }

    /// Connects to the first mapped port, where something listens.
    pub(super) async fn connect(&self, ctx: &Context) -> Result<Box<dyn Link>, Broken> {
        connect(ctx, self.port(0).host).await
    }

    /// Checks that an echo is reached behind the first mapped port.
    pub(super) async fn echoes(&self, ctx: &Context, when: &str) -> Verdict {
        ping(ctx, &mut self.connect(ctx).await?, when).await
    }

    /// Checks that nothing is reached at a mapped port, as where nothing listens behind it.
    pub(super) async fn leads_nowhere(&self, ctx: &Context, index: usize, when: &str) -> Verdict {
        leads_nowhere(ctx, self.port(index).host, when).await
    }
}

/// Connects to a port of the host, which must come about soon.
pub(super) async fn connect(ctx: &Context, port: u16) -> Result<Box<dyn Link>, Broken> {
    let what = format!("connecting to the host's port {port}");
    fine(&what, ctx.within(SOON, &what, ctx.host_connect(port)).await?)
}

/// Checks that a connection to a port of the host is refused, or ends with no byte.
pub(super) async fn leads_nowhere(ctx: &Context, port: u16, when: &str) -> Verdict {
    let what = format!("{when}: connecting to the host's port {port}");
    match ctx.within(SOON, &what, ctx.host_connect(port)).await? {
        Ok(mut stream) => {
            let mut byte = [0];
            let read = ctx.within(SOON, when, stream.read(&mut byte)).await?;
            ensure!(!matches!(read, Ok(1..)), "{when}: something answers on port {port}");
            has_ended(ctx, &mut stream, when).await
        }
        Err(error) => {
            let ended = [io::ErrorKind::ConnectionRefused, io::ErrorKind::ConnectionReset];
            ensure!(ended.contains(&error.kind()), "{what} fails with {error}");
            Ok(())
        }
    }
}

/// Starts the guest's `tcp connect` to an address, with its standard input open.
pub(super) async fn dials(vm: &Vm, address: &str, port: u16) -> Result<GuestProcess, Broken> {
    let request = ExecRequest::new("tcp").args(["connect", address, &port.to_string()]);
    Ok(vm.spawn(request.open_stdin()).await?)
}

/// Checks that a program in the guest cannot connect there: it says so, and ends with 1.
async fn is_refused(ctx: &Context, vm: &Vm, address: &str, port: u16) -> Verdict {
    let process = dials(vm, address, port).await?;
    let what = format!("a connect to {address}");
    let (status, out, error) = ctx.within(SOON, &what, finished(ctx, &process)).await??;
    ensure!(
        status == ExecStatus::Exited(1) && !error.is_empty() && out.is_empty(),
        "`tcp connect {address} {port}` ended with {status:?} and said `{error}`"
    );
    Ok(())
}

/// Sends bytes through an echo, and checks that they come back; the connection stays open to its end.
async fn exchange(ctx: &Context, stream: Box<dyn Link>, bytes: &Bytes) -> Verdict {
    let (mut reader, mut writer) = split(stream);
    let mut came = vec![0; bytes.len()];
    let read = async {
        let read = ctx.within(LONG, "what an echo sends back", reader.read_exact(&mut came));
        fine("what an echo sends back", read.await?)
    };
    let (sent, read) = join(write(ctx, &mut writer, bytes), read).await;
    sent?;
    read?;
    same_bytes(&came, bytes, "what an echo sent back")
}

async fn reached(ctx: &Context) -> Verdict {
    for network in networks(ctx) {
        let machine = Networked::start(ctx, &network, 1).await?;
        let _echo = machine.echo(ctx).await?;
        for _ in 0..ctx.draw(1, 4) {
            exchange(ctx, machine.connect(ctx).await?, &payload(ctx, 300_000)).await?;
        }
        works(ctx, &machine.vm, "beside its network").await?;
    }
    Ok(())
}

async fn bulk(ctx: &Context) -> Verdict {
    for network in networks(ctx) {
        let machine = Networked::start(ctx, &network, 1).await?;
        let _echo = machine.echo(ctx).await?;
        let most = if ctx.heavy(6) { 3 << 20 } else { 1 << 18 };
        let bytes = ctx.bytes(length(ctx, most / 2, most));
        exchange(ctx, machine.connect(ctx).await?, &bytes).await?;
    }
    Ok(())
}

async fn many(ctx: &Context) -> Verdict {
    for network in networks(ctx) {
        let machine = Networked::start(ctx, &network, 1).await?;
        let _echo = machine.echo(ctx).await?;
        let trips = (0..ctx.draw(2, 24)).map(|_| {
            let bytes = payload(ctx, 70_000);
            let machine = &machine;
            async move { exchange(ctx, machine.connect(ctx).await?, &bytes).await }
        });
        let trips: Vec<_> = trips.collect();
        try_join_all(trips).await?;
    }
    Ok(())
}

async fn host_ends_first(ctx: &Context) -> Verdict {
    for network in networks(ctx) {
        let machine = Networked::start(ctx, &network, 1).await?;
        let _echo = machine.echo(ctx).await?;
        let bytes = ctx.bytes(length(ctx, 1, 40_000));
        round_trip(ctx, machine.connect(ctx).await?, &bytes).await?;
        let mut stream = machine.connect(ctx).await?;
        write(ctx, &mut stream, &bytes).await?;
        fine("shutdown", stream.shutdown().await)?;
        ctx.sleep(millis(ctx, 0, 50)).await;
        same_bytes(&read_all(ctx, &mut stream, bytes.len()).await?, &bytes, "after the end")?;
    }
    Ok(())
}

async fn guest_dies(ctx: &Context) -> Verdict {
    for network in networks(ctx) {
        let machine = Networked::start(ctx, &network, 1).await?;
        let echo = machine.echo(ctx).await?;
        let mut stream = machine.connect(ctx).await?;
        ping(ctx, &mut stream, "before its program was killed").await?;
        echo.signal(Signal::KILL).await?;
        echo.wait().await?;
        has_ended(ctx, &mut stream, "after its program was killed").await?;
        works(ctx, &machine.vm, "after a connection's program was killed").await?;
    }
    Ok(())
}

async fn two_ports(ctx: &Context) -> Verdict {
    for network in networks(ctx) {
        let one = Networked::start(ctx, &network, 2).await?;
        // The other machine has the same ports inside.
        let swapped = NetworkConfig::with_port;
        let (first, second) = (one.port(0).guest, one.port(1).guest);
        let other = swapped(network.clone(), ctx.host_port().await?, second);
        let other = swapped(other, ctx.host_port().await?, first);
        let other = Networked::start_with(ctx, other).await?;
        let mut told = Vec::new();
        for machine in [&one, &other] {
            for index in 0..2 {
                let word = ctx.bytes(16);
                let server = machine.listens(ctx, &[], index).await?;
                server.write_stdin(word.clone()).await?;
                server.close_stdin().await?;
                told.push((machine.port(index).host, word, server));
            }
        }
        if ctx.one_in(2) {
            told.reverse();
        }
        for (port, word, server) in told {
            let mut stream = connect(ctx, port).await?;
            let came = read_all(ctx, &mut stream, word.len()).await?;
            same_bytes(&came, &word, &format!("what comes from the host's port {port}"))?;
            drop(stream);
            let (status, _, error) = finished(ctx, &server).await?;
            ensure_eq!(status, ExecStatus::Exited(0), "the guest's tool, which said `{error}`");
        }
    }
    Ok(())
}

async fn nobody(ctx: &Context) -> Verdict {
    for network in networks(ctx) {
        let machine = Networked::start(ctx, &network, 2).await?;
        machine.leads_nowhere(ctx, 0, "before anything listens").await?;
        let echo = machine.echo(ctx).await?;
        machine.echoes(ctx, "once something listens").await?;
        machine.leads_nowhere(ctx, 1, "beside one that something listens on").await?;
        echo.signal(Signal::KILL).await?;
        echo.wait().await?;
        machine.leads_nowhere(ctx, 0, "once nothing listens any more").await?;
        works(ctx, &machine.vm, "after connections that led nowhere").await?;
    }
    Ok(())
}

/// Checks that a machine cannot start because of this port, and is Stopped then.
pub(super) async fn cannot_start(ctx: &Context, vm: &Vm, port: u16, why: &str) -> Verdict {
    ensure_err!(
        ctx.within(LONG, "a start without its port", vm.start()).await?,
        VmErrorKind::PortInUse { port: said } if *said == u32::from(port),
        "a start that needs port {port}, {why}"
    );
    until_state(ctx, vm, VmState::Stopped).await
}

async fn taken_by_machine(ctx: &Context) -> Verdict {
    for network in networks(ctx) {
        let first = Networked::start(ctx, &network, 1).await?;
        let _echo = first.echo(ctx).await?;
        let port = first.port(0).host;
        let wants = network.clone().with_port(ctx.host_port().await?, 2_000);
        let wants = wants.with_port(port, guest_port(ctx).max(2_001));
        let second = super::probe::made(ctx, |config| config.network = wants.clone()).await?;
        for _ in 0..ctx.draw(1, 2) {
            cannot_start(ctx, &second, port, "which a machine has").await?;
        }
        first.echoes(ctx, "beside a machine that wants its port").await?;
        works(ctx, &first.vm, "beside a machine that wants its port").await?;
        first.vm.kill().await?;
        second.start().await?;
        works(ctx, &second, "once the port was free").await?;
        cannot_start(ctx, &first.vm, port, "which the other machine has now").await?;
    }
    Ok(())
}

async fn taken_by_host(ctx: &Context) -> Verdict {
    for network in networks(ctx) {
        let wants = mapped(ctx, &network, 3).await?;
        let taken = ctx.pick(wants.ports()).host;
        let vm = super::probe::made(ctx, |config| config.network = wants.clone()).await?;
        let listener = fine("listening on the host", ctx.host_listen(taken).await)?;
        cannot_start(ctx, &vm, taken, "which the host has").await?;
        for port in wants.ports().iter().filter(|port| port.host != taken) {
            let listened = ctx.host_listen(port.host).await;
            drop(fine("listening on a port of a machine that did not start", listened)?);
        }
        drop(listener);
        vm.start().await?;
        let machine = Networked { vm, network: wants };
        let _echo = machine.echo(ctx).await?;
        machine.echoes(ctx, "once the port was free").await?;
    }
    Ok(())
}

async fn own_loopback(ctx: &Context) -> Verdict {
    let mut networks = vec![NetworkConfig::None];
    if NETWORKS.iter().any(|network| ctx.has(*network)) {
        networks.extend(self::networks(ctx));
    }
    for network in networks {
        let vm = started(ctx, |config| config.network = network.clone()).await?;
        let port = guest_port(ctx);
        let _echo = tool_listens(ctx, &vm, "tcp", &["--echo"], port.into()).await?;
        for _ in 0..ctx.draw(1, 3) {
            let bytes = ctx.bytes(length(ctx, 1, 50_000));
            let process = dials(&vm, "127.0.0.1", port).await?;
            process.write_stdin(bytes.clone()).await?;
            process.close_stdin().await?;
            let (status, out, error) = finished(ctx, &process).await?;
            ensure_eq!(status, ExecStatus::Exited(0), "a program with {network:?}: `{error}`");
            same_bytes(&out, &bytes, "what came back over the guest's own loopback")?;
        }
    }
    Ok(())
}

async fn none(ctx: &Context) -> Verdict {
    let vm = started(ctx, |config| config.network = NetworkConfig::None).await?;
    let port = ctx.host_port().await?;
    let mut listener = fine("listening on the host", ctx.host_listen(port).await)?;
    // Addresses that hosts of machines have, that routers have, and one that is nobody's.
    let drawn = format!("10.{}.{}.1", ctx.draw(0, 255), ctx.draw(0, 255));
    let others = ["169.254.2.2", "192.168.127.1", "10.0.2.2", "192.0.2.1", drawn.as_str()];
    for address in ["127.0.0.1", "127.0.0.2"].iter().chain(&others) {
        is_refused(ctx, &vm, address, port).await?;
    }
    let accepted = vm_core::env::timeout(&**ctx.env(), millis(ctx, 100, 300), listener.accept());
    ensure!(accepted.await.is_err(), "a guest without a network reached its host");
    // The port leads to the host's own listener, and to no guest.
    let taking = ctx.within(SOON, "accept", listener.accept());
    let (mine, theirs) = join(connect(ctx, port), taking).await;
    let (mut mine, mut theirs) = (mine?, fine("accept", theirs?)?);
    fine("writing", mine.write_all(b"here").await)?;
    drop(mine);
    same_bytes(&read_all(ctx, &mut theirs, 4).await?, b"here", "within the host")?;
    works(ctx, &vm, "after it reached nothing").await
}

async fn to_host(ctx: &Context) -> Verdict {
    let machine = Networked::start_with(ctx, NetworkConfig::tsi()).await?;
    let vm = &machine.vm;
    let port = ctx.host_port().await?;
    is_refused(ctx, vm, "127.0.0.1", port).await?;
    let mut listener = fine("listening on the host", ctx.host_listen(port).await)?;
    for _ in 0..ctx.draw(1, 3) {
        let process = dials(vm, "127.0.0.1", port).await?;
        let accepted = ctx.within(SOON, "a connection of the guest", listener.accept()).await?;
        let mut stream = fine("accept", accepted)?;
        let (from_guest, from_host) = (payload(ctx, 100_000), payload(ctx, 100_000));
        process.write_stdin(from_guest.clone()).await?;
        let mut came = vec![0; from_guest.len()];
        let read = ctx.within(LONG, "bytes of the guest", stream.read_exact(&mut came)).await?;
        fine("bytes of the guest", read)?;
        same_bytes(&came, &from_guest, "what the guest wrote")?;
        write(ctx, &mut stream, &from_host).await?;
        fine("shutdown", stream.shutdown().await)?;
        let (status, out, error) = finished(ctx, &process).await?;
        ensure_eq!(status, ExecStatus::Exited(0), "the guest's tool, which said `{error}`");
        same_bytes(&out, &from_host, "what the host wrote")?;
    }
    drop(listener);
    is_refused(ctx, vm, "127.0.0.1", port).await
}

async fn kept_from_host(ctx: &Context) -> Verdict {
    let machine = Networked::start(ctx, &NetworkConfig::passt(), 1).await?;
    let port = ctx.host_port().await?;
    let mut listener = fine("listening on the host", ctx.host_listen(port).await)?;
    // Neither a port of the host's own nor one that leads into this very machine.
    for there in [port, machine.port(0).host] {
        is_refused(ctx, &machine.vm, "127.0.0.1", there).await?;
    }
    let accepted = vm_core::env::timeout(&**ctx.env(), millis(ctx, 100, 300), listener.accept());
    ensure!(
        accepted.await.is_err(),
        "a guest with passt reached a listener of its host's loopback"
    );
    let _echo = machine.echo(ctx).await?;
    machine.echoes(ctx, "beside what is not reached").await
}
