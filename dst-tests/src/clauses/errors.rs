//! What errors say.

use super::probe::{Nonce, Stage, Vm, made, order, truthful, works};
use crate::{
    clause,
    clause::{Broken, Clause, Verdict},
    context::Context,
    ensure, ensure_eq,
};
use std::time::Duration;
use vm_core::fault::{FaultKind, FaultOrder};
use vm_trait::{
    Capability, ForkOptions, Operation, RestoreOptions, SnapshotOptions, VmError, VmErrorKind,
    VmInstanceExt,
};

/// The clauses on errors.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(names, "errors.name_machine_and_operation",
        "an error says on which machine what was attempted, as data and as text", [Exec, Files], faults: []),
    clause!(file_errors, "errors.name_the_path",
        "an error on a guest file names the path that was asked for", [Exec, Files], faults: []),
    clause!(retriable_capture, "errors.retriable_capture",
        "a capture that failed with an error worth another try succeeds when it is tried again",
        [Exec, Files, Snapshot], faults: [HostDiskFull]),
    clause!(retriable_link, "errors.retriable_link",
        "an operation that failed for want of the agent succeeds when it is tried again",
        [Exec], faults: [LinkStall])
    .undisturbed(),
    clause!(restart_needed, "errors.restart_needed",
        "an error that asks for a restart means it: the machine has ended, and works after a start",
        [Exec], faults: [VmmKilled, BootFail]),
    clause!(not_both, "errors.no_restart_for_refusals",
        "a refused operation asks neither for another try nor for a restart", [Exec, Files], faults: []),
    clause!(fork_children, "errors.of_children",
        "the error of a child that could not be made is of the fork, and says why",
        [Exec, Fork], faults: [ForkChildFail]),
];

/// Checks what an error says of where it belongs.
fn belongs(error: &VmError, vm: &Vm, operation: Operation) -> Verdict {
    ensure_eq!(error.vm(), Some(vm.id()), "the machine of: {error}");
    ensure_eq!(error.operation(), operation, "the operation of: {error}");
    let text = error.to_string();
    ensure!(text.contains(&vm.id().to_string()), "the text does not name the machine: {text}");
    ensure!(text.contains(operation.name()), "the text does not name the operation: {text}");
    ensure!(!error.kind().code().is_empty(), "an error without a code: {text}");
    ensure!(
        !(error.is_retriable() && error.requires_restart()),
        "an error that asks for another try and for a restart: {text}"
    );
    Ok(())
}

async fn names(ctx: &Context) -> Verdict {
    let stage = ctx.pick(&Stage::reachable(ctx));
    let vm = stage.reach(ctx).await?;
    for operation in super::lifecycle_table::operations(ctx) {
        if !stage.allows(operation) {
            match super::lifecycle_table::attempt(ctx, &vm, operation).await {
                Err(error) => belongs(&error, &vm, operation)?,
                Ok(()) => return Err(Broken::new(format!("{operation} in {stage:?} was Ok"))),
            }
        }
    }
    if stage == Stage::Running {
        let missing = vm.run("/no/such/program", []).await;
        let Err(error) = missing else {
            return Err(Broken::new("a program that does not exist ran"));
        };
        belongs(&error, &vm, Operation::Exec)?;
    }
    Ok(())
}

async fn file_errors(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let path = format!("{}/missing-{:x}", ctx.scratch(&*vm), ctx.draw(0, u64::MAX));
    let (error, operation) = match ctx.draw(0, 3) {
        0 => (vm.read_file(&path).await.err(), Operation::ReadFile),
        1 => (vm.stat(&path).await.err(), Operation::Stat),
        2 => (vm.list_dir(&path).await.err(), Operation::ListDir),
        _ => (vm.rename(&path, "/tmp/x").await.err(), Operation::Rename),
    };
    let Some(error) = error else {
        return Err(Broken::new(format!("{operation} of a missing file was Ok")));
    };
    belongs(&error, &vm, operation)?;
    ensure!(
        matches!(error.kind(), VmErrorKind::GuestFile { path: said, .. } if *said == path),
        "the error does not name {path}: {error}"
    );
    ensure!(!error.is_retriable() && !error.requires_restart(), "{error}: asks for more");
    Ok(())
}

async fn retriable_capture(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let nonce = Nonce::plant(ctx, &vm).await?;
    let ordered = order(ctx, FaultOrder::next(FaultKind::HostDiskFull))?;
    let outcome = vm.snapshot(SnapshotOptions::default()).await;
    ordered.must_have_fired(ctx)?;
    let Err(error) = outcome else {
        return Err(Broken::new("a snapshot on a full disk was Ok"));
    };
    belongs(&error, &vm, Operation::Snapshot)?;
    ensure!(error.is_retriable(), "{error}: said not to be worth another try");
    let snapshot = vm.snapshot(SnapshotOptions::default()).await?;
    let restored = ctx.backend().restore(&snapshot, RestoreOptions::running()).await?;
    nonce.there(&restored, "in a machine from the second try").await?;
    Ok(ctx.backend().delete_snapshot(&snapshot).await?)
}

async fn retriable_link(ctx: &Context) -> Verdict {
    let span = Duration::from_millis(ctx.draw(1500, 3000));
    // Long enough for a program's start on an emulated processor.
    let timeout = Duration::from_millis(500);
    let vm = made(ctx, |config| {
        config.timeouts.link = timeout;
        config.timeouts.request = timeout;
    })
    .await?;
    vm.start().await?;
    let stall = FaultOrder::next(FaultKind::LinkStall).on(vm.id()).with_amount(span);
    let ordered = order(ctx, stall)?;
    let begun = ctx.now();
    let mut failed = 0;
    loop {
        match vm.ping().await {
            Ok(_) if ordered.fired(ctx) && ctx.now() - begun > span => break,
            Ok(_) => {}
            Err(error) => {
                belongs(&error, &vm, Operation::Ping)?;
                ensure!(error.is_retriable(), "{error}: said not to be worth another try");
                failed += 1;
            }
        }
        let limit = span * 2 + super::probe::SOON;
        ensure!(ctx.now() - begun < limit, "{failed} pings failed, and none succeeds");
        ctx.sleep(Duration::from_millis(5)).await;
    }
    ordered.must_have_fired(ctx)?;
    works(ctx, &vm, "after tries over a stalled link").await
}

async fn restart_needed(ctx: &Context) -> Verdict {
    let vm = ctx.created().await?;
    let (error, operation) = if ctx.one_in(2) {
        let ordered = order(ctx, FaultOrder::next(FaultKind::BootFail).on(vm.id()))?;
        let outcome = vm.start().await;
        ordered.must_have_fired(ctx)?;
        (outcome.err(), Operation::Start)
    } else {
        vm.start().await?;
        let by = Duration::from_millis(ctx.draw(1, 80));
        let killed = FaultOrder::next(FaultKind::VmmKilled).on(vm.id()).with_amount(by);
        let ordered = order(ctx, killed)?;
        let outcome = vm.sh("sleep 1000").await;
        ordered.must_have_fired(ctx)?;
        (outcome.err(), Operation::Exec)
    };
    let Some(error) = error else {
        return Err(Broken::new(format!("{operation} on a machine that died was Ok")));
    };
    belongs(&error, &vm, operation)?;
    ensure!(error.requires_restart(), "{error}: said to need no restart");
    super::probe::until(ctx, "the machine has ended", || vm.state().is_ended()).await?;
    truthful(ctx, &vm, "after the restart that an error asked for").await
}

async fn not_both(ctx: &Context) -> Verdict {
    let stage = ctx.pick(&Stage::reachable(ctx));
    let vm = stage.reach(ctx).await?;
    for operation in super::lifecycle_table::operations(ctx) {
        if stage.allows(operation) {
            continue;
        }
        if let Err(error) = super::lifecycle_table::attempt(ctx, &vm, operation).await {
            ensure!(!error.is_retriable(), "{error}: said to be worth another try");
            ensure!(!error.requires_restart(), "{error}: said to need a restart");
        }
    }
    let bad = made(ctx, |config| config.vcpus = 0).await;
    let Err(error) = bad else {
        return Err(Broken::new("a machine without vCPUs was made"));
    };
    ensure!(!error.is_retriable() && !error.requires_restart(), "{error}: asks for more");
    Ok(())
}

async fn fork_children(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    if ctx.has(Capability::Pause) && ctx.one_in(3) {
        vm.pause().await?;
    }
    let ordered = order(ctx, FaultOrder::next(FaultKind::ForkChildFail))?;
    let children = vm.fork(ForkOptions::new(2)).await?;
    ordered.must_have_fired(ctx)?;
    let errors: Vec<_> = children.into_iter().filter_map(Result::err).collect();
    ensure_eq!(errors.len(), 1, "children that failed");
    ensure_eq!(errors[0].operation(), Operation::Fork, "the operation of a child's error");
    ensure!(
        !matches!(
            errors[0].kind(),
            VmErrorKind::InvalidState { .. } | VmErrorKind::Unsupported { .. }
        ),
        "a child's error: {}",
        errors[0]
    );
    truthful(ctx, &vm, "after a child failed").await
}
