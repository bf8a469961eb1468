//! Operations at the same time.

use super::probe::{
    LONG, Nonce, SOON, Stage, Vm, begun, millis, script, spawn_sh, truthful, until_settled, works,
};
use crate::{
    clause,
    clause::{Broken, Clause, Verdict},
    context::{Context, Task},
    ensure, ensure_eq, ensure_err,
};
use futures_util::future::{join, join_all};
use std::{sync::Arc, time::Duration};
use vm_trait::{
    Capability, Operation, SnapshotOptions, StopOptions, VmErrorKind, VmInstanceExt, VmResult,
    VmState,
};

/// The clauses on concurrency.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(in_order, "concurrency.lifecycle_in_order_of_arrival",
        "lifecycle operations that are called at the same time are served in order of arrival",
        [Exec, Files, Pause], faults: []),
    clause!(beside_each_other, "concurrency.programs_run_beside_each_other",
        "programs and file operations run beside each other", [Exec, Files], faults: [])
    .undisturbed(),
    clause!(long_exec_blocks_nothing, "concurrency.an_exec_blocks_no_lifecycle",
        "an exec that runs does not hold up lifecycle operations", [Exec, Pause], faults: [])
    .fresh(),
    clause!(stop_interrupts, "concurrency.ends_interrupt_all",
        "stop and kill interrupt every operation under way, promptly", [Exec, Files], faults: [])
    .fresh(),
    clause!(ends_interrupt_lifecycle, "concurrency.ends_interrupt_lifecycle",
        "stop and kill take precedence over lifecycle operations that wait or run",
        [Exec, Snapshot, Pause], faults: [])
    .fresh(),
    clause!(refused_after_stop, "concurrency.refused_after_the_end",
        "what is called after a stop has returned sees Stopped", [Exec, Files], faults: [])
    .fresh(),
    clause!(ends_together, "concurrency.ends_together",
        "stops and kills at the same time are all Ok", [Exec], faults: [])
    .fresh(),
    clause!(storm, "concurrency.storm",
        "a storm of lifecycle operations from many tasks ends, in a truthful state", [Exec], faults: []),
    clause!(machines_apart, "concurrency.machines_are_apart",
        "machines of one backend do not wait for, see or end each other", [Exec, Files], faults: [])
    .fresh(),
];

async fn in_order(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let mut choices = vec![Operation::Pause, Operation::Resume, Operation::Start];
    if ctx.has(Capability::Snapshot) {
        choices.push(Operation::Snapshot);
    }
    let operations: Vec<_> = (0..ctx.draw(3, 12)).map(|_| ctx.pick(&choices)).collect();
    // All are polled for the first time in this order, which is their order of arrival.
    let calls =
        operations.iter().map(|operation| super::lifecycle_table::attempt(ctx, &vm, *operation));
    let outcomes = ctx.within(LONG, "operations in a queue", join_all(calls)).await?;
    let mut stage = Stage::Running;
    for (operation, outcome) in operations.iter().zip(outcomes) {
        if stage.allows(*operation) {
            ensure!(outcome.is_ok(), "{operations:?}: {operation} in {stage:?}: {outcome:?}");
            stage = stage.after(*operation);
        } else {
            ensure_err!(
                outcome,
                VmErrorKind::InvalidState { state } if stage.holds(state),
                "{operations:?}: {operation} in {stage:?}"
            );
        }
    }
    ensure!(stage.holds(&vm.state()), "{operations:?}: at the end: {}", vm.state());
    truthful(ctx, &vm, "after a queue of operations").await
}

async fn beside_each_other(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let count = ctx.draw(8, 24);
    let begun = ctx.now();
    let span = ctx.time_to_work(Duration::from_millis(300));
    let sleep = format!("sleep {}", span.as_secs_f64());
    let programs = (0..count).map(|_| vm.sh(&sleep));
    let files = async {
        ctx.sleep(millis(ctx, 1, 50)).await;
        let nonce = Nonce::plant(ctx, &vm).await?;
        nonce.there(&vm, "beside programs").await?;
        Result::<Duration, Broken>::Ok(ctx.now() - begun)
    };
    let (outputs, files) = join(join_all(programs), files).await;
    let taken = ctx.now() - begun;
    for output in outputs {
        ensure!(output?.status.success(), "`{sleep}` failed");
    }
    let files = files?;
    ensure!(files <= taken, "files were served after {files:?} of {taken:?}");
    let in_turn = span * u32::try_from(count).unwrap_or(8);
    ensure!(taken < in_turn / 2, "{count} programs of {span:?} took {taken:?}");
    Ok(())
}

async fn long_exec_blocks_nothing(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let tasks: Vec<_> = (0..ctx.draw(1, 6))
        .map(|_| {
            let vm = Arc::clone(&vm);
            ctx.spawn(async move { vm.exec(script("sleep 1000")).await })
        })
        .collect();
    ctx.sleep(millis(ctx, 10, 50)).await;
    ctx.within(SOON, "a pause beside execs", vm.pause()).await??;
    ctx.within(SOON, "a resume beside execs", vm.resume()).await??;
    ctx.within(SOON, "kill beside execs", vm.kill()).await??;
    for task in tasks {
        ensure_err!(task.join().await?, VmErrorKind::Interrupted, "an exec that kill cut short");
    }
    Ok(())
}

/// Has different operations under way that do not end by themselves, each of which has begun.
async fn under_way(ctx: &Context, vm: &Vm, count: u64) -> Result<Vec<Task<VmResult<()>>>, Broken> {
    let operations = (0..count).map(|_| {
        let vm = Arc::clone(vm);
        let kind = ctx.draw(0, 3);
        async move {
            match kind {
                0 => vm.sh("sleep 1000").await.map(drop),
                1 => spawn_sh(&vm, "sleep 1000").await?.wait().await.map(drop),
                2 => {
                    let process = spawn_sh(&vm, "sleep 1000").await?;
                    process.read_stdout().await.map(drop)
                }
                _ => {
                    let request = script("sleep 1000").open_stdin();
                    let process = vm.spawn(request).await?;
                    // More than any buffer between here and a program that does not read.
                    loop {
                        process.write_stdin(vec![0; 1 << 16]).await?;
                    }
                }
            }
        }
    });
    begun(ctx, operations).await
}

async fn stop_interrupts(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let tasks = under_way(ctx, &vm, 16).await?;
    ctx.sleep(millis(ctx, 50, 150)).await;
    let begun = ctx.now();
    let grace = millis(ctx, 0, 100);
    if ctx.one_in(2) {
        vm.kill().await?;
    } else {
        vm.stop(StopOptions::default().with_grace(grace)).await?;
    }
    let joined = join_all(tasks.into_iter().map(Task::join));
    for outcome in ctx.within(SOON, "operations that were cut short", joined).await? {
        ensure_err!(outcome?, VmErrorKind::Interrupted, "an operation that was cut short");
    }
    let taken = ctx.now() - begun;
    ensure!(taken <= grace + SOON, "it took {taken:?} to interrupt everything");
    truthful(ctx, &vm, "after everything was interrupted").await
}

async fn ends_interrupt_lifecycle(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let calls: Vec<_> = (0..ctx.draw(2, 8))
        .map(|n| {
            let vm = Arc::clone(&vm);
            ctx.spawn(async move {
                match n % 3 {
                    0 => vm.snapshot(SnapshotOptions::default()).await.map(Some),
                    1 => vm.pause().await.map(|()| None),
                    _ => vm.resume().await.map(|()| None),
                }
            })
        })
        .collect();
    ctx.sleep(Duration::from_micros(ctx.draw(0, 20_000))).await;
    ctx.within(SOON, "kill beside lifecycle operations", vm.kill()).await??;
    ensure_eq!(vm.state(), VmState::Stopped, "the state after kill");
    let joined = join_all(calls.into_iter().map(Task::join));
    for outcome in ctx.within(SOON, "lifecycle operations beside kill", joined).await? {
        match outcome? {
            Ok(Some(snapshot)) => ctx.backend().delete_snapshot(&snapshot).await?,
            Ok(None) => {}
            refused => ensure_err!(
                refused,
                VmErrorKind::Interrupted | VmErrorKind::InvalidState { .. },
                "a lifecycle operation beside kill"
            ),
        }
    }
    ensure_eq!(vm.state(), VmState::Stopped, "the state once all have ended");
    truthful(ctx, &vm, "after kill beside lifecycle operations").await
}

async fn refused_after_stop(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let tasks = under_way(ctx, &vm, ctx.draw(0, 4)).await?;
    ctx.sleep(millis(ctx, 0, 30)).await;
    vm.stop(StopOptions::default().with_grace(millis(ctx, 0, 30))).await?;
    for operation in super::lifecycle_table::operations(ctx) {
        if Stage::Stopped.allows(operation) {
            continue;
        }
        ensure_err!(
            super::lifecycle_table::attempt(ctx, &vm, operation).await,
            VmErrorKind::InvalidState { state: VmState::Stopped },
            "{operation} after a stop"
        );
    }
    drop(tasks);
    Ok(())
}

async fn ends_together(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let ends = (0..ctx.draw(2, 8)).map(|_| {
        let (vm, kill) = (&vm, ctx.one_in(2));
        let grace = millis(ctx, 0, 100);
        async move {
            if kill {
                vm.kill().await
            } else {
                vm.stop(StopOptions::default().with_grace(grace)).await
            }
        }
    });
    for outcome in ctx.within(SOON, "ends at the same time", join_all(ends)).await? {
        outcome?;
    }
    ensure_eq!(vm.state(), VmState::Stopped, "the state after ends at the same time");
    truthful(ctx, &vm, "after ends at the same time").await
}

async fn storm(ctx: &Context) -> Verdict {
    let vm = ctx.created().await?;
    let pauses = ctx.has(Capability::Pause);
    let tasks: Vec<_> = (0..ctx.draw(2, 5))
        .map(|_| {
            let steps: Vec<_> =
                (0..ctx.draw(1, 5)).map(|_| (ctx.draw(0, 5), millis(ctx, 0, 30))).collect();
            let (vm, env) = (Arc::clone(&vm), Arc::clone(ctx.env()));
            ctx.spawn(async move {
                let mut outcomes = Vec::new();
                for (kind, delay) in steps {
                    env.sleep(delay).await;
                    outcomes.push(match kind {
                        0 | 1 => vm.start().await,
                        2 => vm.kill().await,
                        3 => vm.stop(StopOptions::default().with_grace(delay)).await,
                        4 if pauses => vm.pause().await,
                        5 if pauses => vm.resume().await,
                        _ => vm.sh("sleep 0.01").await.map(drop),
                    });
                }
                outcomes
            })
        })
        .collect();
    let joined = join_all(tasks.into_iter().map(Task::join));
    for outcomes in ctx.within(LONG, "a storm", joined).await? {
        for outcome in outcomes?.into_iter().filter(Result::is_err) {
            ensure_err!(
                outcome,
                VmErrorKind::InvalidState { .. } | VmErrorKind::Interrupted,
                "an operation of a storm"
            );
        }
    }
    until_settled(ctx, &vm).await?;
    truthful(ctx, &vm, "after a storm").await
}

async fn machines_apart(ctx: &Context) -> Verdict {
    let count = usize::try_from(ctx.draw(2, 4)).unwrap_or(2);
    let vms: Vec<Vm> =
        join_all((0..count).map(|_| ctx.running())).await.into_iter().collect::<VmResult<_>>()?;
    let mut nonces = Vec::new();
    for vm in &vms {
        nonces.push(Nonce::plant(ctx, vm).await?);
    }
    let ended = ctx.index(count);
    vms[ended].kill().await?;
    for (index, vm) in vms.iter().enumerate().filter(|(index, _)| *index != ended) {
        nonces[index].there(vm, "in a machine beside one that ended").await?;
        for (other, nonce) in nonces.iter().enumerate() {
            // The process backend shares the host's files; there the paths differ all the same.
            if other != index && ctx.has(Capability::GuestKernel) {
                nonce.gone(vm, "another machine's file").await?;
            }
        }
        works(ctx, vm, "beside a machine that ended").await?;
    }
    Ok(())
}
