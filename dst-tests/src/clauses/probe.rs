//! Ways to look into a machine from outside: nonces, clocks, counters, and whether it is what its state says.

use crate::{
    clause::{Broken, Verdict},
    context::{Context, Task},
    ensure, ensure_eq, ensure_err,
};
use bytes::Bytes;
use std::{
    future::{Future, poll_fn},
    path::PathBuf,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::Poll,
    time::Duration,
};
use vm_core::{
    env::timeout,
    fault::{FaultKind, FaultOrder},
};
use vm_trait::{
    Capability, CrashReason, DiskConfig, ExecRequest, GuestProcess, Operation, SnapshotOptions,
    StopOptions, VmConfig, VmErrorKind, VmInstance, VmInstanceExt, VmResult, VmState,
};

/// A machine, as checks share it.
pub(super) type Vm = Arc<dyn VmInstance>;

/// Within this time what happens by itself must be seen.
pub(super) const SOON: Duration = Duration::from_secs(20);

/// Within this time an operation must end that has a deadline of its own and default timeouts.
pub(super) const LONG: Duration = Duration::from_secs(300);

/// Draws a span of `low..=high` milliseconds.
pub(super) fn millis(ctx: &Context, low: u64, high: u64) -> Duration {
    Duration::from_millis(ctx.draw(low, high))
}

/// Polls `condition` until it holds, and calls the promise broken where it does not soon.
#[track_caller]
pub(super) fn until<'a>(
    ctx: &'a Context,
    what: &'a str,
    mut condition: impl FnMut() -> bool + Send + 'a,
) -> impl Future<Output = Verdict> + Send + 'a {
    let broken = Broken::new(format!("{what}: not so within {SOON:?}"));
    async move {
        let begun = ctx.now();
        while !condition() {
            if ctx.now() - begun > SOON {
                return Err(broken);
            }
            ctx.sleep(Duration::from_millis(2)).await;
        }
        Ok(())
    }
}

/// Waits until the machine is in `state`, asking it for nothing else.
pub(super) async fn until_state(ctx: &Context, vm: &Vm, state: VmState) -> Verdict {
    let what = format!("state {state}");
    match until(ctx, &what, || vm.state() == state).await {
        Ok(()) => Ok(()),
        Err(broken) => Err(Broken::new(format!("{broken}; the state is {}", vm.state()))),
    }
}

/// Waits until no operation is under way, so that the state is a lasting one.
pub(super) async fn until_settled(ctx: &Context, vm: &Vm) -> Verdict {
    let lasting = || !matches!(vm.state(), VmState::Starting | VmState::Stopping);
    until(ctx, "neither Starting nor Stopping", lasting).await
}

/// Spawns each of `works`, and waits until all have begun: on a busy host a task may wait for its first turn longer than
/// anything that is to meet it.
pub(super) async fn begun<T: Send + 'static>(
    ctx: &Context,
    works: impl IntoIterator<Item = impl Future<Output = T> + Send + 'static>,
) -> Result<Vec<Task<T>>, Broken> {
    let begun = Arc::new(AtomicUsize::new(0));
    let spawned = works.into_iter().map(|work| {
        let begun = Arc::clone(&begun);
        ctx.spawn(async move {
            begun.fetch_add(1, Ordering::SeqCst);
            work.await
        })
    });
    let tasks: Vec<_> = spawned.collect();
    until(ctx, "every task has begun", || begun.load(Ordering::SeqCst) == tasks.len()).await?;
    Ok(tasks)
}

/// Makes a machine of a changed default configuration, in Created.
pub(super) async fn made(ctx: &Context, change: impl FnOnce(&mut VmConfig)) -> VmResult<Vm> {
    let mut config = VmConfig::default();
    change(&mut config);
    ctx.backend().create(config).await
}

/// Makes a machine of a changed default configuration and starts it.
pub(super) async fn started(ctx: &Context, change: impl FnOnce(&mut VmConfig)) -> VmResult<Vm> {
    let vm = made(ctx, change).await?;
    vm.start().await?;
    Ok(vm)
}

/// Describes a disk of the host with a drawn name, seen at `mount`.
pub(super) fn disk(ctx: &Context, mount: &str) -> DiskConfig {
    DiskConfig::new(ctx.host_path("disk.img"), mount)
}

/// Gives a path for a snapshot that no other run uses, in the directory where the backend keeps them.
pub(super) async fn snapshot_path(ctx: &Context, vm: &Vm, name: &str) -> Result<PathBuf, Broken> {
    let snapshot = vm.snapshot(SnapshotOptions::default()).await?;
    ctx.backend().delete_snapshot(&snapshot).await?;
    Ok(snapshot.path.with_file_name(format!("{:016x}-{name}", ctx.draw(0, u64::MAX))))
}

/// Measures how long a boot takes, to set deadlines by. It is never less than a tenth of a second.
pub(super) async fn boot_time(ctx: &Context) -> Result<Duration, Broken> {
    let begun = ctx.now();
    ctx.running().await?;
    Ok((ctx.now() - begun).max(Duration::from_millis(100)))
}

/// Runs a script that must succeed, and gives what it wrote without white space at its end.
pub(super) async fn sh(vm: &Vm, script: &str) -> Result<String, Broken> {
    let output = vm.sh(script).await?;
    ensure!(
        output.status.success(),
        "`{script}` ended with {:?}: {}",
        output.status,
        output.stderr_text()
    );
    Ok(output.stdout_text().trim_end().to_owned())
}

/// Starts a script and gives the handle to its streams.
pub(super) async fn spawn_sh(vm: &Vm, script: &str) -> VmResult<GuestProcess> {
    vm.spawn(ExecRequest::new("sh").args(["-c", script])).await
}

/// Asks to run a script.
pub(super) fn script(text: &str) -> ExecRequest {
    ExecRequest::new("sh").args(["-c", text])
}

/// Reads a process's standard output until `wanted` is in it, and gives what came.
pub(super) async fn read_until(process: &GuestProcess, wanted: &str) -> Result<String, Broken> {
    let mut seen = Vec::new();
    while let Some(bytes) = process.read_stdout().await? {
        seen.extend_from_slice(&bytes);
        if String::from_utf8_lossy(&seen).contains(wanted) {
            return Ok(String::from_utf8_lossy(&seen).into_owned());
        }
    }
    Err(Broken::new(format!("the output ended before `{wanted}` came")))
}

/// Reads a process's standard output to its end.
pub(super) async fn read_to_end(process: &GuestProcess) -> Result<Vec<u8>, Broken> {
    let mut seen = Vec::new();
    while let Some(bytes) = process.read_stdout().await? {
        seen.extend_from_slice(&bytes);
    }
    Ok(seen)
}

/// A drawn value in a guest file.
#[derive(Clone, Debug)]
pub(super) struct Nonce {
    path: String,
    value: Bytes,
}

impl Nonce {
    /// Writes a nonce below the guest's scratch directory, which is in memory where the guest has a kernel.
    pub(super) async fn plant(ctx: &Context, vm: &Vm) -> Result<Self, Broken> {
        let directory = ctx.scratch(&**vm);
        Self::plant_in(ctx, vm, &directory).await
    }

    /// Writes a nonce below a directory.
    pub(super) async fn plant_in(ctx: &Context, vm: &Vm, directory: &str) -> Result<Self, Broken> {
        let path = format!("{directory}/nonce-{:x}", ctx.draw(0, u64::MAX));
        let size = usize::try_from(ctx.draw(1, 200)).unwrap_or(1);
        let value = ctx.bytes(size);
        vm.write(&path, value.clone()).await?;
        Ok(Self { path, value })
    }

    /// Replaces the value by another one.
    pub(super) async fn replace(&self, ctx: &Context, vm: &Vm) -> VmResult<Self> {
        let mut value = ctx.bytes(self.value.len() + 1).to_vec();
        value[0] = self.value[0].wrapping_add(1);
        let value = Bytes::from(value);
        vm.write(&self.path, value.clone()).await?;
        Ok(Self { path: self.path.clone(), value })
    }

    /// Follows the directory `from` to where it is seen as `to`.
    pub(super) fn moved(&self, from: &str, to: &str) -> Self {
        let rest = self.path.strip_prefix(from).unwrap_or(&self.path);
        Self { path: format!("{to}{rest}"), value: self.value.clone() }
    }

    /// Checks that the machine has it.
    pub(super) async fn there(&self, vm: &Vm, when: &str) -> Verdict {
        let found = vm.read_file(&self.path).await?;
        ensure!(found == self.value, "{when}: the nonce is not the one that was written");
        Ok(())
    }

    /// Checks that the machine does not have it.
    pub(super) async fn gone(&self, vm: &Vm, when: &str) -> Verdict {
        ensure!(!vm.exists(&self.path).await?, "{when}: the nonce is still there");
        Ok(())
    }
}

/// A guest process that counts as long as it runs: a file grows by a byte about every 20 ms.
#[derive(Debug)]
pub(super) struct Ticker {
    /// Held, because dropping it would end the process.
    _process: GuestProcess,
    path: String,
}

/// How long a [`Ticker`] waits between two counts.
pub(super) const TICK: Duration = Duration::from_millis(20);

impl Ticker {
    /// Starts one, and waits until it has counted.
    pub(super) async fn begin(ctx: &Context, vm: &Vm) -> Result<Self, Broken> {
        let path = format!("{}/ticks-{:x}", ctx.scratch(&**vm), ctx.draw(0, u64::MAX));
        let script = format!("while :; do echo >> {path}; sleep 0.02; done");
        let ticker = Self { _process: spawn_sh(vm, &script).await?, path };
        let begun = ctx.now();
        while !vm.exists(&ticker.path).await? {
            ensure!(ctx.now() - begun < SOON, "a process did not count within {SOON:?}");
            ctx.sleep(Duration::from_millis(5)).await;
        }
        Ok(ticker)
    }

    /// Reads how far it has counted, in a machine that has it.
    pub(super) async fn count(&self, vm: &Vm) -> Result<u64, Broken> {
        Ok(vm.stat(&self.path).await?.size)
    }

    /// Checks that it goes on counting in a machine that has it.
    pub(super) async fn goes_on(&self, ctx: &Context, vm: &Vm, when: &str) -> Verdict {
        let (before, begun) = (self.count(vm).await?, ctx.now());
        while self.count(vm).await? <= before {
            ensure!(ctx.now() - begun < SOON, "{when}: a process that ran does not go on");
            ctx.sleep(TICK).await;
        }
        Ok(())
    }
}

/// Reads the guest's monotonic clock.
pub(super) async fn uptime(vm: &Vm) -> Result<Duration, Broken> {
    uptime_of(&sh(vm, "cat /proc/uptime").await?)
}

/// Reads the first line of `/proc/uptime`.
pub(super) fn uptime_of(text: &str) -> Result<Duration, Broken> {
    let seconds = text.split_whitespace().next().and_then(|word| word.parse::<f64>().ok());
    match seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()) {
        Some(uptime) => Ok(uptime),
        None => Err(Broken::new(format!("/proc/uptime reads `{text}`"))),
    }
}

/// Checks that the guest's wall clock is within a second of the host's.
pub(super) async fn clock_is_right(ctx: &Context, vm: &Vm, when: &str) -> Verdict {
    let before = ctx.env().wall_clock();
    let text = sh(vm, "date +%s").await?;
    let after = ctx.env().wall_clock();
    let guest: u64 = text.parse().map_err(|_| Broken::new(format!("`date +%s` wrote `{text}`")))?;
    // The guest gives whole seconds, cut off.
    let (low, high) = (before.as_secs().saturating_sub(1), after.as_secs() + 1);
    ensure!(
        (low..=high).contains(&guest),
        "{when}: the guest's clock shows {guest}, the host's {} to {}",
        before.as_secs(),
        after.as_secs()
    );
    Ok(())
}

/// Draws random bytes in the guest.
pub(super) async fn random(vm: &Vm) -> Result<Bytes, Broken> {
    let output = vm.sh("head -c 16 /dev/urandom").await?;
    ensure_eq!(output.stdout.len(), 16, "random bytes of the guest");
    Ok(output.stdout)
}

/// Checks that programs run.
pub(super) async fn works(ctx: &Context, vm: &Vm, when: &str) -> Verdict {
    let word = format!("{:x}", ctx.draw(0, u64::MAX));
    match vm.run("echo", [word.as_str()]).await {
        Ok(output) => ensure_eq!(output.stdout_text(), format!("{word}\n"), "{when}: echo"),
        Err(error) => {
            return Err(Broken::new(format!("{when}: the machine does not work: {error}")));
        }
    }
    Ok(())
}

/// Checks that the machine is what its state says, and that it can be used from there; it is Running afterwards.
pub(super) async fn truthful(ctx: &Context, vm: &Vm, when: &str) -> Verdict {
    until_settled(ctx, vm).await?;
    let state = vm.state();
    if state == VmState::Running {
        return works(ctx, vm, when).await;
    }
    let refused = vm.run("echo", ["x"]).await;
    ensure_err!(
        refused,
        VmErrorKind::InvalidState { state: said } if *said == state,
        "{when}: exec while {state}"
    );
    match state {
        VmState::Paused => match vm.resume().await {
            // A resume that was dropped before is still carried out, and came first.
            Err(error) if matches!(error.kind(), VmErrorKind::InvalidState { state } if *state == VmState::Running) =>
                {}
            resumed => resumed?,
        },
        _ => vm.start().await?,
    }
    ensure_eq!(vm.state(), VmState::Running, "{when}: after leaving {state}");
    works(ctx, vm, &format!("{when}, after leaving {state}")).await
}

/// Polls `future` at most a drawn number of times and for a drawn while up to `most`, then drops it. Gives its output
/// where it ended before.
pub(super) async fn cut<F: Future>(ctx: &Context, most: Duration, future: F) -> Option<F::Output> {
    let micros = u64::try_from(most.as_micros()).unwrap_or(u64::MAX).max(1);
    // Half of the time the number of polls decides, which comes upon awaits that take no time.
    let (mut left, most) = match ctx.one_in(2) {
        true => (ctx.draw(1, 12), most.max(Duration::from_millis(1))),
        false => (u64::MAX, Duration::from_micros(ctx.draw(1, micros))),
    };
    let mut future = pin!(future);
    let polled = poll_fn(|task| {
        if let Poll::Ready(output) = future.as_mut().poll(task) {
            return Poll::Ready(Some(output));
        }
        left -= 1;
        if left == 0 { Poll::Ready(None) } else { Poll::Pending }
    });
    timeout(&**ctx.env(), most, polled).await.ok().flatten()
}

/// Orders a fault for a machine, and gives what to check with afterwards that it has happened.
pub(super) fn order(ctx: &Context, order: FaultOrder) -> Result<Ordered, Broken> {
    let ordered = Ordered { kind: order.kind, before: ctx.fired(order.kind) };
    ctx.fault(order)?;
    Ok(ordered)
}

/// A fault that was ordered.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ordered {
    kind: FaultKind,
    before: u64,
}

impl Ordered {
    /// Says whether it has happened.
    pub(super) fn fired(self, ctx: &Context) -> bool {
        ctx.fired(self.kind) > self.before
    }

    /// Calls the check broken where it has not happened.
    #[track_caller]
    pub(super) fn must_have_fired(self, ctx: &Context) -> Verdict {
        if self.fired(ctx) {
            return Ok(());
        }
        Err(Broken::new(format!("the fault {} was ordered and did not happen", self.kind)))
    }
}

/// A lasting state, to be brought about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Created,
    Running,
    Paused,
    Stopped,
    Crashed,
}

impl Stage {
    /// Lists the states that can be brought about here.
    pub(super) fn reachable(ctx: &Context) -> Vec<Self> {
        let mut stages = vec![Self::Created, Self::Running, Self::Stopped];
        if ctx.has(Capability::Pause) {
            stages.push(Self::Paused);
        }
        if crash_fault(ctx).is_some() {
            stages.push(Self::Crashed);
        }
        stages
    }

    /// Makes a machine that is in this state.
    pub(super) async fn reach(self, ctx: &Context) -> Result<Vm, Broken> {
        if self == Self::Created {
            return Ok(ctx.created().await?);
        }
        let vm = ctx.running_alone().await?;
        self.bring_running(ctx, &vm).await?;
        Ok(vm)
    }

    /// Brings a machine in Created into this state.
    pub(super) async fn bring(self, ctx: &Context, vm: &Vm) -> Verdict {
        if self == Self::Created {
            return Ok(());
        }
        vm.start().await?;
        self.bring_running(ctx, vm).await
    }

    /// Brings a running machine into this state, which is not Created.
    async fn bring_running(self, ctx: &Context, vm: &Vm) -> Verdict {
        match self {
            Self::Created | Self::Running => {}
            Self::Paused => vm.pause().await?,
            Self::Stopped => {
                let grace = millis(ctx, 0, 50);
                vm.stop(StopOptions::default().with_grace(grace)).await?;
            }
            Self::Crashed => crash(ctx, vm).await?,
        }
        ensure!(self.holds(&vm.state()), "on the way to {self:?}: the state is {}", vm.state());
        Ok(())
    }

    /// Says whether a state is this one.
    pub(super) fn holds(self, state: &VmState) -> bool {
        matches!(
            (self, state),
            (Self::Created, VmState::Created)
                | (Self::Running, VmState::Running)
                | (Self::Paused, VmState::Paused)
                | (Self::Stopped, VmState::Stopped)
                | (Self::Crashed, VmState::Crashed(_))
        )
    }

    /// Says whether the design's table allows `operation` here. Written out a second time on purpose: the
    /// backends use the table in `vm-trait`.
    pub(super) fn allows(self, operation: Operation) -> bool {
        match operation {
            Operation::Start | Operation::Restore => {
                matches!(self, Self::Created | Self::Stopped | Self::Crashed)
            }
            Operation::Pause => self == Self::Running,
            Operation::Resume | Operation::Inspect => self == Self::Paused,
            Operation::Snapshot | Operation::Fork => {
                matches!(self, Self::Running | Self::Paused)
            }
            Operation::Stop | Operation::Kill | Operation::Metrics => true,
            _ => self == Self::Running,
        }
    }

    /// Gives the state that the design's table puts after an allowed operation.
    pub(super) fn after(self, operation: Operation) -> Self {
        match operation {
            Operation::Start | Operation::Resume => Self::Running,
            Operation::Pause => Self::Paused,
            Operation::Stop | Operation::Kill => match self {
                Self::Created | Self::Crashed => self,
                _ => Self::Stopped,
            },
            _ => self,
        }
    }
}

fn crash_fault(ctx: &Context) -> Option<(FaultKind, CrashReason)> {
    let faults = [
        (FaultKind::VmmKilled, CrashReason::VmmDied),
        (FaultKind::GuestPanic, CrashReason::GuestPanic),
    ];
    faults.into_iter().find(|(kind, _)| ctx.can_fault(*kind))
}

/// Crashes a running or paused machine from outside.
pub(super) async fn crash(ctx: &Context, vm: &Vm) -> Verdict {
    let Some((kind, reason)) = crash_fault(ctx) else {
        return Err(Broken::new("this target cannot make a machine crash"));
    };
    let ordered = order(ctx, FaultOrder::next(kind).on(vm.id()))?;
    until_state(ctx, vm, VmState::Crashed(reason)).await?;
    ordered.must_have_fired(ctx)
}
