//! Streams of machines that are copied amid traffic, and traffic that comes at once to copies.

use super::{
    copies::{Way, attached, paused_at_times},
    guest_streams::{LONG, accept, connect, echo, fine, finished, is_free, port, round_trip},
    probe::{SOON, Vm, millis, read_to_end, works},
    streams::{fresh_dir, length, payload, same_bytes},
};
use crate::{
    clause,
    clause::{Broken, Clause, Verdict},
    context::{Context, Task},
    ensure, ensure_eq,
};
use bytes::Bytes;
use futures_util::future::{join_all, try_join, try_join_all};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, split};
use vm_core::env::{Env, timeout};
use vm_trait::{
    ExecRequest, ExecStatus, GuestListener, GuestProcess, GuestStream, ProcessId, VmResult,
};

/// The clauses on streams and snapshots.
pub(super) const SNAPSHOT_CLAUSES: &[Clause] = &[
    clause!(snapshot_in_flight, "snapshot.bytes_in_flight",
        "bytes on their way at a capture reach the source's streams once; a restored machine has true beginnings of \
         them, and the end of every connection, and gives no old byte to a new one",
        [Exec, Files, Snapshot, Vsock], faults: []),
    clause!(snapshot_storm, "snapshot.storm_of_connects",
        "dozens of connects, streams of the guest and programs at once right after a restore all come through",
        [Exec, Snapshot, Vsock], faults: []),
];

/// The clauses on streams and forks.
pub(super) const FORK_CLAUSES: &[Clause] = &[
    clause!(fork_in_flight, "fork.bytes_in_flight",
        "bytes on their way at a fork reach the source's streams once; a child has true beginnings of them, and the \
         end of every connection, and gives no old byte to a new one",
        [Exec, Files, Fork, Vsock], faults: []),
    clause!(fork_storm, "fork.storm_of_connects",
        "dozens of connects, streams of the guest and programs at once right after a fork all come through, in \
         children and source",
        [Exec, Fork, Vsock], faults: []),
];

async fn snapshot_in_flight(ctx: &Context) -> Verdict {
    in_flight(ctx, Way::Restore).await
}

async fn fork_in_flight(ctx: &Context) -> Verdict {
    in_flight(ctx, Way::Fork).await
}

async fn snapshot_storm(ctx: &Context) -> Verdict {
    storm_of_connects(ctx, Way::Restore).await
}

async fn fork_storm(ctx: &Context) -> Verdict {
    storm_of_connects(ctx, Way::Fork).await
}

/// Bytes of which each stretch is found in one place only.
#[derive(Clone, Copy, Debug)]
struct Pattern(u64);

impl Pattern {
    fn new(ctx: &Context) -> Self {
        Self(ctx.draw(0, u64::MAX))
    }

    /// Gives the bytes from `start` on.
    fn piece(self, start: usize, length: usize) -> Bytes {
        let words = (start / 8..(start + length).div_ceil(8)).flat_map(|word| {
            let number = (word as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ self.0;
            (number ^ (number >> 29)).to_le_bytes()
        });
        words.skip(start % 8).take(length).collect()
    }

    /// Checks that some bytes are those from `start` on.
    fn check(self, bytes: &[u8], start: usize, what: &str) -> Verdict {
        same_bytes(bytes, &self.piece(start, bytes.len()), what)
    }
}

/// How far the traffic of a machine goes: until it is told to end, or so many bytes were sent on a stream.
#[derive(Clone, Debug)]
struct Flow {
    env: Arc<dyn Env>,
    ends: Arc<AtomicBool>,
    /// The fewest bytes that came on any way by now.
    came: Arc<[AtomicUsize; 3]>,
}

/// Memory is the guest's limit.
const MOST: usize = 6 << 20;

/// How much is sent at a time.
const PIECE: usize = 24_000;

impl Flow {
    fn new(ctx: &Context) -> Self {
        Self { env: ctx.env().clone(), ends: Arc::default(), came: Arc::default() }
    }

    /// Says whether there is more to be sent, after a moment in which the guest can work.
    async fn more(&self, sent: usize) -> bool {
        self.env.sleep(Duration::from_millis(1)).await;
        while sent >= MOST && !self.ends.load(Ordering::Relaxed) {
            self.env.sleep(Duration::from_millis(5)).await;
        }
        !self.ends.load(Ordering::Relaxed)
    }

    /// Takes note of bytes that came on a way.
    fn note(&self, way: usize, count: usize) {
        self.came[way].fetch_add(count, Ordering::Relaxed);
    }

    /// Waits until bytes came on all ways.
    async fn flows(&self, ctx: &Context) -> Verdict {
        let came = self.came.clone();
        super::probe::until(ctx, "bytes on every way", || {
            came.iter().all(|count| count.load(Ordering::Relaxed) > 0)
        })
        .await
    }
}

/// Writes a pattern to a stream and ends it; gives how much it was.
async fn fill(
    flow: Flow,
    mut stream: impl tokio::io::AsyncWrite + Unpin,
    pattern: Pattern,
) -> std::io::Result<usize> {
    let mut sent = 0;
    while flow.more(sent).await {
        stream.write_all(&pattern.piece(sent, PIECE)).await?;
        sent += PIECE;
    }
    stream.shutdown().await?;
    Ok(sent)
}

/// Reads a stream to its end.
async fn drain(
    flow: Flow,
    way: usize,
    mut stream: impl tokio::io::AsyncRead + Unpin,
) -> std::io::Result<Vec<u8>> {
    let mut all = Vec::new();
    loop {
        let count = stream.read_buf(&mut all).await?;
        if count == 0 {
            return Ok(all);
        }
        flow.note(way, count);
    }
}

/// A machine with traffic on all ways: to a program that keeps what comes, round through an echo, from a program, and
/// in and out of a program's standard streams.
struct Traffic {
    dir: String,
    pattern: Pattern,
    flow: Flow,
    echo_port: u32,
    _echo: GuestProcess,
    echoed: (Task<std::io::Result<usize>>, Task<std::io::Result<Vec<u8>>>),
    sink: GuestProcess,
    sink_port: u32,
    sunk: Task<std::io::Result<usize>>,
    dialler: GuestProcess,
    dialled_port: u32,
    _listener: GuestListener,
    dialled: Task<std::io::Result<Vec<u8>>>,
    tee: Arc<GuestProcess>,
    teed: (Task<VmResult<usize>>, Task<VmResult<Vec<u8>>>),
}

/// Up to where the guest's own stream counts.
const COUNT: u32 = 120_000;

impl Traffic {
    async fn begin(ctx: &Context, vm: &Vm) -> Result<Self, Broken> {
        let dir = fresh_dir(ctx, &**vm).await?;
        let (pattern, flow) = (Pattern::new(ctx), Flow::new(ctx));
        let (echo_server, echo_port) = echo(ctx, vm).await?;
        let (reader, writer) = split(connect(ctx, vm, echo_port).await?);
        let echoed = (
            ctx.spawn(fill(flow.clone(), writer, pattern)),
            ctx.spawn(drain(flow.clone(), 0, reader)),
        );
        let sink_port = port(ctx);
        let sink = keeps(ctx, vm, sink_port, &format!("{dir}/sunk")).await?;
        let stream = connect(ctx, vm, sink_port).await?;
        let sunk = ctx.spawn(fill(flow.clone(), stream, pattern));
        let dialled_port = port(ctx);
        let mut listener = vm.listen(dialled_port).await?;
        let counts = format!("seq 1 {COUNT} | vsock connect {dialled_port}");
        let dialler = vm.spawn(ExecRequest::new("sh").args(["-c", &counts])).await?;
        let stream = accept(ctx, &mut listener).await?;
        let dialled = ctx.spawn(drain(flow.clone(), 1, stream));
        let tee = ExecRequest::new("tee").arg(format!("{dir}/teed")).open_stdin();
        let tee = Arc::new(vm.spawn(tee).await?);
        let teed = (
            ctx.spawn(tell(flow.clone(), tee.clone(), pattern)),
            ctx.spawn(hear(flow.clone(), 2, tee.clone())),
        );
        Ok(Self {
            dir,
            pattern,
            flow,
            echo_port,
            _echo: echo_server,
            echoed,
            sink,
            sink_port,
            sunk,
            dialler,
            dialled_port,
            _listener: listener,
            dialled,
            tee,
            teed,
        })
    }

    /// Ends it, and checks that everything arrived in the source, and once.
    async fn ends(self, ctx: &Context, vm: &Vm) -> Verdict {
        self.flow.ends.store(true, Ordering::Relaxed);
        let pattern = self.pattern;
        let all = async {
            let sent = fine("writing to an echo", self.echoed.0.join().await?)?;
            let came = fine("reading from an echo", self.echoed.1.join().await?)?;
            ensure_eq!(came.len(), sent, "the bytes that an echo gave back");
            pattern.check(&came, 0, "what an echo gave back")?;
            let sent = fine("writing to a program", self.sunk.join().await?)?;
            ensure_eq!(finished(ctx, &self.sink).await?.0, ExecStatus::Exited(0), "its end");
            let kept = vm.read_file(&format!("{}/sunk", self.dir)).await?;
            ensure_eq!(kept.len(), sent, "the bytes that a program kept");
            pattern.check(&kept, 0, "what a program kept")?;
            let came = fine("reading from a program", self.dialled.join().await?)?;
            same_bytes(&came, counted().as_bytes(), "what a program sent")?;
            ensure_eq!(finished(ctx, &self.dialler).await?.0, ExecStatus::Exited(0), "its end");
            let sent = self.teed.0.join().await??;
            let came = self.teed.1.join().await??;
            ensure_eq!(came.len(), sent, "the bytes that came out of a program");
            pattern.check(&came, 0, "what came out of a program")?;
            ensure_eq!(self.tee.wait().await?, ExecStatus::Exited(0), "its end");
            Ok(())
        };
        ctx.within(LONG, "the rest of the traffic", all).await?
    }

    /// Names what a copy is looked at by.
    fn traces(&self) -> Traces {
        Traces {
            dir: self.dir.clone(),
            pattern: self.pattern,
            echo_port: self.echo_port,
            sink: (self.sink.id(), self.sink_port),
            dialler: (self.dialler.id(), self.dialled_port),
            tee: self.tee.id(),
        }
    }
}

/// Writes a pattern to a program and ends its input; gives how much it was.
async fn tell(flow: Flow, process: Arc<GuestProcess>, pattern: Pattern) -> VmResult<usize> {
    let mut sent = 0;
    while flow.more(sent).await {
        process.write_stdin(pattern.piece(sent, PIECE)).await?;
        sent += PIECE;
    }
    process.close_stdin().await?;
    Ok(sent)
}

/// Reads what a program writes to its end.
async fn hear(flow: Flow, way: usize, process: Arc<GuestProcess>) -> VmResult<Vec<u8>> {
    let mut all = Vec::new();
    while let Some(bytes) = process.read_stdout().await? {
        flow.note(way, bytes.len());
        all.extend_from_slice(&bytes);
    }
    Ok(all)
}

/// Starts a program that keeps in a file what the host writes to a port.
async fn keeps(ctx: &Context, vm: &Vm, port: u32, path: &str) -> Result<GuestProcess, Broken> {
    let script = format!("exec vsock listen {port} >{path}");
    let process = vm.spawn(ExecRequest::new("sh").args(["-c", &script]).open_stdin()).await?;
    let mut said = Vec::new();
    while !String::from_utf8_lossy(&said).contains("listening") {
        match ctx.within(SOON, "the guest's `vsock listen`", process.read_stderr()).await?? {
            Some(bytes) => said.extend_from_slice(&bytes),
            None => return Err(Broken::new("`vsock listen` ended before it listened")),
        }
    }
    Ok(process)
}

fn counted() -> String {
    (1..=COUNT).map(|number| format!("{number}\n")).collect()
}

/// What the traffic of a source is found by in copies of it.
struct Traces {
    dir: String,
    pattern: Pattern,
    echo_port: u32,
    sink: (ProcessId, u32),
    dialler: (ProcessId, u32),
    tee: ProcessId,
}

impl Traces {
    /// Checks a copy: its connections have ended, what came over them is a true beginning, and nothing of it comes to
    /// those that are made next.
    async fn copied(&self, ctx: &Context, copy: &Vm, when: &str) -> Verdict {
        for (what, id) in [("listened", self.sink.0), ("dialled", self.dialler.0)] {
            let process = attached(copy, id).await?;
            let (status, _, said) = finished(ctx, &process).await?;
            let by_itself = matches!(status, ExecStatus::Exited(_));
            ensure!(by_itself, "{when}: a program that {what} ended with {status:?}: {said}");
        }
        let kept = copy.read_file(&format!("{}/sunk", self.dir)).await?;
        self.pattern.check(&kept, 0, &format!("{when}: what a program had kept"))?;
        self.standard_streams(ctx, copy, when).await?;
        let (one, other) = (ctx.bytes(length(ctx, 1, 9_000)), payload(ctx, 70_000));
        let trips = [
            round_trip(ctx, connect(ctx, copy, self.echo_port).await?, &one),
            round_trip(ctx, connect(ctx, copy, self.echo_port).await?, &other),
        ];
        try_join_all(trips).await?;
        let path = format!("{}/later", self.dir);
        let later = keeps(ctx, copy, self.sink.1, &path).await?;
        let mut stream = connect(ctx, copy, self.sink.1).await?;
        super::guest_streams::write(ctx, &mut stream, &one).await?;
        fine("shutdown", stream.shutdown().await)?;
        ensure_eq!(finished(ctx, &later).await?.0, ExecStatus::Exited(0), "{when}: the next end");
        same_bytes(&copy.read_file(&path).await?, &one, "what the next program kept")?;
        self.next_dial(ctx, copy, when).await
    }

    /// Checks the program whose standard streams were in use: it waits for more, and has what had come.
    async fn standard_streams(&self, ctx: &Context, copy: &Vm, when: &str) -> Verdict {
        let process = attached(copy, self.tee).await?;
        let start = usize::try_from(process.offsets().stdout).unwrap_or(usize::MAX);
        process.close_stdin().await?;
        let out = ctx.within(LONG, "the end of `tee`", read_to_end(&process)).await??;
        ensure_eq!(process.wait().await?, ExecStatus::Exited(0), "{when}: the end of `tee`");
        let kept = copy.read_file(&format!("{}/teed", self.dir)).await?;
        self.pattern.check(&kept, 0, &format!("{when}: what a program had read"))?;
        ensure_eq!(start + out.len(), kept.len(), "{when}: where its output ends");
        same_bytes(&out, &kept[start..], "its output")
    }

    /// Checks that the first stream to a port that the guest had dialled is a new one.
    async fn next_dial(&self, ctx: &Context, copy: &Vm, when: &str) -> Verdict {
        let mut listener = copy.listen(self.dialler.1).await?;
        let old = timeout(&**ctx.env(), millis(ctx, 1, 20), listener.accept()).await;
        ensure!(old.is_err(), "{when}: a stream of before came to a new listener");
        let bytes = payload(ctx, 40_000);
        dial_once(ctx, copy, &mut listener, &bytes).await?;
        drop(listener);
        is_free(&**copy, self.dialler.1).await
    }
}

/// Lets a program of the guest dial, and checks that its bytes come.
async fn dial_once(ctx: &Context, vm: &Vm, listener: &mut GuestListener, bytes: &Bytes) -> Verdict {
    let program = super::guest_streams::dials(vm, listener.port()).await?;
    program.write_stdin(bytes.clone()).await?;
    program.close_stdin().await?;
    let mut stream = accept(ctx, listener).await?;
    let came = super::guest_streams::read_all(ctx, &mut stream, bytes.len()).await?;
    same_bytes(&came, bytes, "what a program sent")?;
    drop(stream);
    ensure_eq!(finished(ctx, &program).await?.0, ExecStatus::Exited(0), "the end of the program");
    Ok(())
}

async fn in_flight(ctx: &Context, way: Way) -> Verdict {
    let vm = ctx.running().await?;
    let traffic = Traffic::begin(ctx, &vm).await?;
    let traces = traffic.traces();
    traffic.flow.flows(ctx).await?;
    ctx.sleep(Duration::from_micros(ctx.draw(0, 20_000))).await;
    let paused = paused_at_times(ctx, &vm).await?;
    let captured = way.capture(&vm, ctx.draw(1, 2)).await?;
    if paused {
        vm.resume().await?;
    }
    let ends_first = ctx.one_in(2);
    let copied = async {
        let copies = captured.running(ctx).await?;
        for copy in &copies {
            traces.copied(ctx, copy, way.copy()).await?;
        }
        Ok::<_, Broken>(())
    };
    if ends_first {
        traffic.ends(ctx, &vm).await?;
        copied.await
    } else {
        copied.await?;
        traffic.ends(ctx, &vm).await
    }
}

/// What a storm comes to: echoes on several ports.
struct Ports {
    _servers: Vec<GuestProcess>,
    ports: Vec<u32>,
}

async fn storm_of_connects(ctx: &Context, way: Way) -> Verdict {
    let vm = ctx.running().await?;
    let mut all = Ports { _servers: Vec::new(), ports: Vec::new() };
    let mut open: Vec<GuestStream> = Vec::new();
    for _ in 0..ctx.draw(2, 4) {
        let (server, port) = echo(ctx, &vm).await?;
        for _ in 0..ctx.draw(0, 3) {
            open.push(connect(ctx, &vm, port).await?);
        }
        all._servers.push(server);
        all.ports.push(port);
    }
    let copies = way.copies(ctx, &vm, if way == Way::Fork { ctx.draw(1, 3) } else { 1 }).await?;
    // A fork's source has its own storm, at the same time.
    let also = (way == Way::Fork).then_some(&vm);
    try_join_all(copies.iter().chain(also).map(|machine| storm(ctx, machine, &all.ports))).await?;
    for stream in &mut open {
        super::guest_streams::ping(ctx, stream, "a stream of the source after the storm").await?;
    }
    works(ctx, &vm, "after the storm").await
}

/// Does dozens of things at once.
async fn storm(ctx: &Context, vm: &Vm, ports: &[u32]) -> Verdict {
    let streams = (0..ctx.draw(24, 48)).map(|_| {
        let (port, bytes) = (ctx.pick(ports), payload(ctx, 5_000));
        async move { round_trip(ctx, connect(ctx, vm, port).await?, &bytes).await }
    });
    let streams: Vec<_> = streams.collect();
    let programs: Vec<_> = (0..ctx.draw(4, 8)).map(|_| works(ctx, vm, "amid a storm")).collect();
    let dials = async {
        let mut listener = vm.listen(port(ctx)).await?;
        // No more than a listener keeps.
        let count = length(ctx, 2, 10);
        let begun = (0..count).map(|_| super::guest_streams::dials(vm, listener.port()));
        let programs: Vec<GuestProcess> =
            join_all(begun).await.into_iter().collect::<Result<_, _>>()?;
        for _ in 0..count {
            drop(accept(ctx, &mut listener).await?);
        }
        for program in &programs {
            let ended = finished(ctx, program).await?.0;
            ensure_eq!(ended, ExecStatus::Exited(0), "the end of a program that dialled");
        }
        Ok(())
    };
    let all = try_join(try_join(try_join_all(streams), try_join_all(programs)), dials);
    ctx.within(LONG, "a storm", all).await?.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn pieces_fit_together(salt: u64, start in 0_usize..1000, length in 0_usize..1000) {
            let pattern = Pattern(salt);
            let whole = pattern.piece(0, 2000);
            prop_assert_eq!(pattern.piece(start, length), &whole[start..start + length]);
            prop_assert!(pattern.check(&whole[start..], start, "").is_ok());
            prop_assert!(pattern.check(&whole[start..], start + 1, "").is_err());
        }
    }
}
