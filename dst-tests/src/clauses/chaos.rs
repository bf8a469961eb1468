//! Random operations under random faults, held to what is possible.

use super::probe::{LONG, Stage, Vm, boot_time, cut, millis, script, until, until_settled};
use crate::{
    clause,
    clause::{Broken, Clause, Verdict},
    context::{Context, Task},
    ensure, ensure_err,
};
use bytes::Bytes;
use futures_util::future::{Either, join_all, select};
use std::{convert::Infallible, pin::pin, sync::Arc, time::Duration};
use vm_core::fault::{FaultKind, FaultOrder, FaultScope};
use vm_trait::{
    Capability, GuestFileError, Operation, RestoreOptions, Snapshot, SnapshotOptions, VmConfig,
    VmErrorKind, VmInstanceExt, VmResult, VmState,
};

/// The clauses on chaos.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(sequential, "chaos.one_after_the_other",
        "whatever fails below, every operation ends as it may, the state is true, and data is never half or old",
        [Exec, Files], faults: [])
    .undisturbed(),
    clause!(concurrent, "chaos.at_the_same_time",
        "whatever fails below and whoever calls, every operation ends as it may, and the machine can be brought back",
        [Exec, Files], faults: [])
    .undisturbed(),
    clause!(dropped, "chaos.with_dropped_futures",
        "whatever fails below, dropped operations leave a machine that can be brought back",
        [Exec, Files], faults: [])
    .undisturbed(),
];

/// How long a program may take that takes no time, unless a fault befalls it.
const PROGRAM: Duration = Duration::from_millis(300);

/// What an independent model knows of a machine.
struct Model {
    /// The state it was last seen in.
    stage: Stage,
    /// What the file in memory may hold; nothing where there may be no file.
    memory: Vec<Option<Bytes>>,
    /// A snapshot, and what the file may hold in it.
    captured: Option<(Snapshot, Vec<Option<Bytes>>)>,
    /// Faults were ordered: operations may fail, and machines may die by themselves.
    disturbed: bool,
}

/// Short deadlines, so that what hangs does not hang for long.
fn impatient(ctx: &Context, config: &mut VmConfig, boot: Duration) {
    // A boot that hangs costs a real host all of it.
    config.timeouts.boot = boot * if ctx.is_simulated() { 20 } else { 6 };
    config.timeouts.pause = Duration::from_millis(500);
    config.timeouts.capture = Duration::from_secs(5);
    config.timeouts.request = Duration::from_millis(800);
    config.timeouts.link = Duration::from_millis(400);
    config.timeouts.kill = Duration::from_secs(2);
}

/// Gives a span within which any one operation must have ended.
fn limit(vm: &Vm) -> Duration {
    let timeouts = &vm.config().timeouts;
    PROGRAM
        + timeouts.boot
        + timeouts.capture
        + timeouts.request * 2
        + timeouts.link
        + (timeouts.pause + timeouts.kill) * 2
        + Duration::from_secs(1)
}

/// Orders a drawn fault, where any can be made.
fn disturb(ctx: &Context, vm: &Vm) -> Result<Option<FaultKind>, Broken> {
    let kinds: Vec<_> = FaultKind::ALL
        .iter()
        .copied()
        // What a disk lies about comes out at a time of its own, and has a clause of its own.
        .filter(|kind| *kind != FaultKind::LostSync && ctx.can_fault(*kind))
        .collect();
    if kinds.is_empty() {
        return Ok(None);
    }
    let kind = ctx.pick(&kinds);
    let fault = FaultOrder::next(kind).with_amount(millis(ctx, 1, 600));
    let fault = match kind.scope() {
        // These belong to the host, or to machines that are not there yet.
        FaultScope::Create | FaultScope::Snapshot | FaultScope::Restore | FaultScope::Fork => fault,
        _ => fault.on(vm.id()),
    };
    ctx.fault(fault)?;
    Ok(Some(kind))
}

/// Says whether an operation can fail like this at all.
fn possible(operation: Operation, kind: &VmErrorKind) -> bool {
    use Operation as O;
    match kind {
        VmErrorKind::InvalidState { .. } => !matches!(operation, O::Stop | O::Kill | O::Metrics),
        VmErrorKind::InvalidConfig { .. }
        | VmErrorKind::Unsupported { .. }
        | VmErrorKind::Internal { .. } => false,
        VmErrorKind::HypervisorFailed { .. } => matches!(
            operation,
            O::Pause | O::Resume | O::Snapshot | O::Restore | O::Fork | O::Inspect | O::Metrics
        ),
        VmErrorKind::BootFailed { .. } => matches!(operation, O::Start | O::Restore),
        VmErrorKind::ExecFailed { .. } => {
            matches!(operation, O::Exec | O::Spawn | O::AttachProcess)
        }
        VmErrorKind::GuestFile { .. } => matches!(
            operation,
            O::ReadFile
                | O::WriteFile
                | O::Stat
                | O::ListDir
                | O::CreateDir
                | O::Remove
                | O::Rename
        ),
        VmErrorKind::SnapshotCorrupt { .. } | VmErrorKind::SnapshotIncompatible { .. } => {
            operation == O::Restore
        }
        VmErrorKind::HostIo { .. } => {
            matches!(operation, O::Snapshot | O::Restore | O::Fork | O::Start)
        }
        VmErrorKind::Disconnected => {
            // A machine that goes on is told the time, after a capture too.
            operation.needs_guest()
                || matches!(operation, O::Resume | O::Snapshot | O::Fork | O::Connect | O::Listen)
        }
        VmErrorKind::ConnectRefused { .. } => operation == O::Connect,
        VmErrorKind::PortInUse { .. } => operation == O::Listen,
        VmErrorKind::ResourceExhausted { .. } => {
            matches!(operation, O::Start | O::Restore | O::Fork | O::Snapshot)
                || operation.needs_guest()
        }
        _ => !matches!(operation, O::Stop | O::Kill),
    }
}

/// Checks how an operation ended. One caller at a time is never interrupted.
fn judge(operation: Operation, outcome: &VmResult<()>, disturbed: bool, alone: bool) -> Verdict {
    let Err(error) = outcome else { return Ok(()) };
    let kind = error.kind();
    ensure!(possible(operation, kind), "{operation} cannot fail like this: {error}");
    ensure!(
        !(alone && matches!(kind, VmErrorKind::Interrupted)),
        "{operation} was interrupted by nobody: {error}"
    );
    let ordinary = matches!(
        kind,
        VmErrorKind::InvalidState { .. }
            | VmErrorKind::Interrupted
            | VmErrorKind::ExecFailed { .. }
            | VmErrorKind::GuestFile { .. }
            | VmErrorKind::ConnectRefused { .. }
    );
    ensure!(disturbed || ordinary, "{operation} failed without a fault: {error}");
    Ok(())
}

/// Gives the lasting state that the machine is in.
async fn seen(ctx: &Context, vm: &Vm) -> Result<Stage, Broken> {
    until_settled(ctx, vm).await?;
    let state = vm.state();
    let stages = [Stage::Created, Stage::Running, Stage::Paused, Stage::Stopped, Stage::Crashed];
    let found = stages.into_iter().find(|stage| stage.holds(&state));
    found.ok_or_else(|| Broken::new(format!("a lasting state {state}")))
}

impl Model {
    /// Takes note of a state that nothing of this model's own doing led to.
    fn drift(&mut self, to: Stage) -> Verdict {
        ensure!(
            to == self.stage || (self.disturbed && matches!(to, Stage::Crashed | Stage::Stopped)),
            "{:?} became {to:?} by itself",
            self.stage
        );
        self.enter(to);
        Ok(())
    }

    /// Takes note of the state; memory ends with the machine.
    fn enter(&mut self, to: Stage) {
        if !matches!(to, Stage::Running | Stage::Paused) {
            self.memory = vec![None];
        }
        self.stage = to;
    }

    /// Takes note of what an operation did to the state.
    fn moved(&mut self, operation: Operation, done: bool, to: Stage) -> Verdict {
        let from = self.stage;
        let after = from.after(operation);
        let died = self.disturbed && matches!(to, Stage::Crashed | Stage::Stopped);
        // What failed may have been done all the same where its answer was lost.
        let fits = if done { to == after } else { to == from || (self.disturbed && to == after) };
        // A capture stops the machine for a while, and it may not get going again.
        let stuck = self.disturbed
            && !done
            && matches!(operation, Operation::Snapshot | Operation::Fork)
            && to == Stage::Paused;
        ensure!(
            fits || died || stuck,
            "{operation} in {from:?} ({}) led to {to:?}",
            if done { "Ok" } else { "failed" }
        );
        if operation == Operation::Start && matches!(to, Stage::Running) {
            self.memory = vec![None];
        }
        self.enter(to);
        Ok(())
    }
}

/// Carries out one drawn operation and holds it to the model.
async fn step(ctx: &Context, vm: &Vm, path: &str, model: &mut Model) -> Verdict {
    model.drift(seen(ctx, vm).await?)?;
    let mut choices = super::lifecycle_table::operations(ctx);
    let file = [Operation::ReadFile, Operation::WriteFile];
    choices.extend(file.iter().cycle().take(6));
    if model.captured.is_some() && ctx.has(Capability::RestoreInPlace) {
        choices.extend([Operation::Restore; 2]);
    }
    if !model.stage.allows(Operation::Exec) {
        // Lead back to where most operations are allowed.
        choices.extend([Operation::Start, Operation::Start, Operation::Resume, Operation::Resume]);
        choices.retain(|operation| *operation != Operation::Resume || ctx.has(Capability::Pause));
    }
    let operation = ctx.pick(&choices);
    let outcome = match operation {
        Operation::WriteFile => write(ctx, vm, path, model).await?,
        Operation::ReadFile => read(ctx, vm, path, model).await?,
        Operation::Snapshot => capture(ctx, vm, model).await?,
        Operation::Restore => restore(ctx, vm, model).await?,
        other => {
            let attempt = super::lifecycle_table::attempt(ctx, vm, other);
            ctx.within(limit(vm) + Duration::from_millis(50), other.name(), attempt).await?
        }
    };
    judge(operation, &outcome, model.disturbed, true)?;
    let refused = outcome
        .as_ref()
        .err()
        .is_some_and(|error| matches!(error.kind(), VmErrorKind::InvalidState { .. }));
    let to = seen(ctx, vm).await?;
    if model.disturbed
        && !refused
        && !model.stage.allows(operation)
        && Stage::Crashed.allows(operation)
    {
        // The machine died just before.
        model.enter(Stage::Crashed);
    }
    if !model.stage.allows(operation) {
        ensure!(refused, "{operation} in {:?}: {outcome:?}", model.stage);
        return model.drift(to);
    }
    // A machine that died in between is seen as such by what comes after.
    ensure!(!refused || model.disturbed, "{operation} in {:?}: {outcome:?}", model.stage);
    if operation == Operation::Restore {
        let fits = match outcome {
            Ok(()) => matches!(to, Stage::Running | Stage::Paused) || model.disturbed,
            Err(_) => !matches!(to, Stage::Running | Stage::Paused),
        };
        ensure!(fits, "a restore in {:?} that was {outcome:?} led to {to:?}", model.stage);
        model.enter(to);
        return Ok(());
    }
    model.moved(operation, outcome.is_ok(), to)
}

async fn write(
    ctx: &Context,
    vm: &Vm,
    path: &str,
    model: &mut Model,
) -> Result<VmResult<()>, Broken> {
    let contents = ctx.bytes(usize::try_from(ctx.draw(0, 70_000)).unwrap_or(0));
    let write = vm.write(path, contents.clone());
    let outcome = ctx.within(limit(vm), "a file write", write).await?;
    match &outcome {
        Ok(()) => model.memory = vec![Some(contents)],
        // It may have been written all the same, now or a little later.
        Err(error) if !matches!(error.kind(), VmErrorKind::InvalidState { .. }) => {
            model.memory.push(Some(contents));
        }
        Err(_) => {}
    }
    Ok(outcome)
}

async fn read(
    ctx: &Context,
    vm: &Vm,
    path: &str,
    model: &mut Model,
) -> Result<VmResult<()>, Broken> {
    let outcome = ctx.within(limit(vm), "a file read", vm.read_file(path)).await?;
    let found = match outcome {
        Ok(bytes) => Some(bytes),
        Err(error) => match error.kind() {
            VmErrorKind::GuestFile { error: GuestFileError::NotFound, .. } => None,
            _ => return Ok(Err(error)),
        },
    };
    let size = found.as_ref().map(Bytes::len);
    ensure!(model.memory.contains(&found), "the file ({size:?} bytes) is none that was written");
    Ok(Ok(()))
}

async fn capture(ctx: &Context, vm: &Vm, model: &mut Model) -> Result<VmResult<()>, Broken> {
    let snapshot = vm.snapshot(SnapshotOptions::default());
    match ctx.within(limit(vm), "a snapshot", snapshot).await? {
        Ok(snapshot) => {
            if let Some((old, _)) = model.captured.replace((snapshot, model.memory.clone())) {
                ctx.backend().delete_snapshot(&old).await.ok();
            }
            Ok(Ok(()))
        }
        Err(error) => Ok(Err(error)),
    }
}

async fn restore(ctx: &Context, vm: &Vm, model: &mut Model) -> Result<VmResult<()>, Broken> {
    let Some((snapshot, memory)) = model.captured.clone() else {
        return Err(Broken::new("a restore without a snapshot was drawn"));
    };
    let resume = ctx.pick(&[RestoreOptions::running(), RestoreOptions::paused()]);
    let outcome = ctx.within(limit(vm), "a restore", vm.restore(&snapshot, resume)).await?;
    if outcome.is_ok() {
        model.memory = memory;
    }
    Ok(outcome)
}

/// Brings the machine back after faults, of which some may still be waiting for their occasion.
async fn bring_back(ctx: &Context, vm: &Vm, faults: u64) -> Verdict {
    ctx.within(limit(vm), "kill at the end", vm.kill()).await??;
    let mut last = None;
    for _ in 0..=faults * 4 + 2 {
        // Stalls and delays that were ordered are over by then.
        ctx.sleep(Duration::from_millis(300)).await;
        if !matches!(vm.state(), VmState::Running) {
            match ctx.within(limit(vm), "a start at the end", vm.start()).await? {
                Ok(()) => {}
                Err(error) => {
                    ensure!(!matches!(vm.state(), VmState::Starting), "{error}: still Starting");
                    last = Some(error.to_string());
                    continue;
                }
            }
        }
        let program = script("echo alive").timeout(PROGRAM);
        match ctx.within(limit(vm), "an exec at the end", vm.exec(program)).await? {
            Ok(output) if output.stdout_text() == "alive\n" => return Ok(()),
            other => last = Some(format!("{other:?}")),
        }
    }
    Err(Broken::new(format!("the machine cannot be brought back: {}", last.unwrap_or_default())))
}

/// Drops the machine and checks that nothing is left.
async fn nothing_left(ctx: &Context, vm: Vm) -> Verdict {
    drop(vm);
    let outcome = until(ctx, "nothing is left on the host", || ctx.leftovers().is_empty()).await;
    outcome.map_err(|broken| Broken::new(format!("{broken}: {:?}", ctx.leftovers())))
}

async fn sequential(ctx: &Context) -> Verdict {
    let boot = boot_time(ctx).await?;
    let vm = super::probe::made(ctx, |config| impatient(ctx, config, boot)).await?;
    let path = format!("{}/chaos-{:x}", ctx.scratch(&*vm), ctx.draw(0, u64::MAX));
    let mut model =
        Model { stage: Stage::Created, memory: vec![None], captured: None, disturbed: false };
    // Some runs are quiet, some stormy.
    let (calm, mut faults) = (ctx.pick(&[3, 6, 12, u64::MAX]), 0);
    // Every third step or so boots a machine, which takes seconds on a real host.
    let (least, most) = if ctx.is_simulated() { (30, 60) } else { (12, 24) };
    for _ in 0..ctx.draw(least, most) {
        if ctx.one_in(calm) && disturb(ctx, &vm)?.is_some() {
            model.disturbed = true;
            faults += 1;
        }
        step(ctx, &vm, &path, &mut model).await?;
    }
    bring_back(ctx, &vm, faults).await?;
    if let Some((snapshot, _)) = model.captured {
        ctx.backend().delete_snapshot(&snapshot).await.ok();
    }
    nothing_left(ctx, vm).await
}

async fn concurrent(ctx: &Context) -> Verdict {
    let boot = boot_time(ctx).await?;
    let vm = super::probe::made(ctx, |config| impatient(ctx, config, boot)).await?;
    let choices = super::lifecycle_table::operations(ctx);
    let faults = ctx.draw(0, 6);
    let mut disturbed = false;
    for _ in 0..faults {
        disturbed |= disturb(ctx, &vm)?.is_some();
    }
    for _ in 0..ctx.draw(4, 8) {
        if vm.state() != VmState::Running {
            let outcome = ctx.within(limit(&vm), "a start", vm.start()).await?;
            let outcome = outcome.or_else(|error| match error.kind() {
                VmErrorKind::InvalidState { state: VmState::Paused } => Ok(()),
                _ => Err(error),
            });
            judge(Operation::Start, &outcome, disturbed, true)?;
        }
        let operations: Vec<_> = (0..ctx.draw(2, 8)).map(|_| ctx.pick(&choices)).collect();
        let calls = operations
            .iter()
            .map(|operation| super::lifecycle_table::attempt(ctx, &vm, *operation));
        let all = limit(&vm) * u32::try_from(operations.len()).unwrap_or(1);
        let again = pin!(resume_again(ctx, &vm));
        let calls = select(join_all(calls), again);
        let outcomes = match ctx.within(all, "operations at the same time", calls).await? {
            Either::Left((outcomes, _)) => outcomes,
            Either::Right((never, _)) => match never {},
        };
        for (operation, outcome) in operations.iter().zip(&outcomes) {
            // A snapshot that was taken is deleted on the host, a child that was made is killed.
            judge(*operation, outcome, disturbed, false)?;
        }
        until_settled(ctx, &vm).await?;
    }
    bring_back(ctx, &vm, faults).await?;
    nothing_left(ctx, vm).await
}

/// Lets the guest run on whenever it stands still for long: a program under way in it cannot end before.
async fn resume_again(ctx: &Context, vm: &Vm) -> Infallible {
    loop {
        ctx.sleep(Duration::from_secs(1)).await;
        if vm.state() == VmState::Paused {
            vm.resume().await.ok();
        }
    }
}

async fn dropped(ctx: &Context) -> Verdict {
    let boot = boot_time(ctx).await?;
    let vm = super::probe::made(ctx, |config| impatient(ctx, config, boot)).await?;
    let choices = super::lifecycle_table::operations(ctx);
    let faults = ctx.draw(0, 5);
    for _ in 0..faults {
        disturb(ctx, &vm)?;
    }
    // Beside the calls that are dropped someone else goes on calling.
    let beside: Task<VmResult<()>> = {
        let (vm, env, rounds) = (Arc::clone(&vm), Arc::clone(ctx.env()), ctx.draw(1, 10));
        ctx.spawn(async move {
            for _ in 0..rounds {
                env.sleep(Duration::from_millis(20)).await;
                let program = script("sleep 0.01").timeout(PROGRAM);
                let _ = vm.exec(program).await;
            }
            Ok(())
        })
    };
    for _ in 0..ctx.draw(5, 20) {
        if vm.state() != VmState::Running && ctx.one_in(2) {
            let outcome = ctx.within(limit(&vm), "a start", vm.start()).await?;
            if outcome.is_err() {
                ensure_err!(
                    outcome,
                    kind if possible(Operation::Start, kind),
                    "a start amid dropped operations"
                );
            }
        }
        let operation = ctx.pick(&choices);
        let attempt = super::lifecycle_table::attempt(ctx, &vm, operation);
        cut(ctx, Duration::from_millis(40), attempt).await;
    }
    // A program in a guest that was left paused would not end by itself.
    ctx.within(limit(&vm), "kill amid calls", vm.kill()).await??;
    ctx.within(LONG, "the calls beside", beside.join()).await???;
    bring_back(ctx, &vm, faults).await?;
    nothing_left(ctx, vm).await
}
