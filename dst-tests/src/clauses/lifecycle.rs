//! Start, stop and kill.

use super::probe::{
    Nonce, SOON, Stage, Vm, boot_time, disk, made, millis, order, read_until, script, spawn_sh,
    started, truthful, until, until_state, works,
};
use crate::{
    clause,
    clause::{Broken, Clause, Verdict},
    context::Context,
    ensure, ensure_eq, ensure_err,
};
use futures_util::future::{join, join_all};
use std::{collections::BTreeSet, time::Duration};
use vm_core::fault::{FaultKind, FaultOrder};
use vm_trait::{
    Capability, DiskConfig, GuestFileError, Signal, StopOptions, VmErrorKind, VmInstanceExt,
    VmState,
};

/// The clauses on start, stop and kill.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(ids_are_unique, "lifecycle.ids_are_unique",
        "every machine has an id of its own, which never changes", [], faults: []),
    clause!(config_is_kept, "lifecycle.config_is_kept",
        "a machine gives the configuration it was made with, in every state", [], faults: []),
    clause!(start_runs, "lifecycle.start_runs",
        "start boots a machine out of Created, Stopped and Crashed, and it works when start returns",
        [Exec], faults: []),
    clause!(second_start_refused, "lifecycle.second_start_refused",
        "start of a machine that runs is refused with InvalidState and changes nothing",
        [Exec, Files], faults: []),
    clause!(one_of_many_starts, "lifecycle.one_of_many_starts",
        "of starts at the same time one boots the machine and the others get InvalidState",
        [Exec], faults: []),
    clause!(ends_are_idempotent, "lifecycle.ends_are_idempotent",
        "stop and kill answer Ok in every state, any number of times, and keep Created and Crashed",
        [], faults: []),
    clause!(restart_loses_memory, "lifecycle.restart_loses_memory",
        "a restart loses what was in memory, files and processes alike",
        [Exec, Files, GuestKernel], faults: []),
    clause!(disk_outlives_restart, "lifecycle.disk_outlives_restart",
        "what was written to a disk is there after a restart", [Exec, Files, Disks], faults: []),
    clause!(disk_outlives_machine, "lifecycle.disk_outlives_machine",
        "what was written to a disk is there in the next machine that is given the disk",
        [Exec, Files, Disks], faults: []),
    clause!(read_only_disk, "lifecycle.read_only_disk",
        "a read-only disk can be read and refuses every write", [Exec, Files, Disks], faults: []),
    clause!(stop_lets_clean_up, "lifecycle.stop_lets_clean_up",
        "a program that traps the stop signal finishes its clean-up within the grace",
        [Exec, Files, Disks], faults: []),
    clause!(stop_sends_the_signal, "lifecycle.stop_sends_the_signal",
        "stop sends the signal that was asked for", [Exec, Files, Disks], faults: []),
    clause!(stop_ends_stubborn_programs, "lifecycle.stop_ends_stubborn_programs",
        "programs that ignore the stop signal are gone once the grace is over",
        [Exec, Files], faults: []),
    clause!(stop_without_grace, "lifecycle.stop_without_grace",
        "stop with a grace of zero ends the machine at once", [Exec], faults: []),
    clause!(ignored_stop_ends, "lifecycle.ignored_stop_ends",
        "a stop that the guest ignores ends by its deadline with the guest gone",
        [Exec], faults: [StopIgnored]),
    clause!(unheard_stop_ends, "lifecycle.unheard_stop_ends",
        "a stop that does not reach the guest ends by its deadline with the guest gone",
        [Exec], faults: [LinkStall]),
    clause!(kill_preempts_exec, "lifecycle.kill_preempts_exec",
        "kill ends a running exec at once with Interrupted", [Exec], faults: []),
    clause!(ends_preempt_boot, "lifecycle.ends_preempt_boot",
        "stop and kill cut a boot short: it fails with Interrupted and the machine is gone",
        [Exec], faults: [])
    .undisturbed(),
    clause!(ends_preempt_hanging_boot, "lifecycle.ends_preempt_hanging_boot",
        "stop and kill cut a hanging boot short without waiting for its deadline",
        [Exec], faults: [BootHang]),
    clause!(last_handle_ends_machine, "lifecycle.last_handle_ends_machine",
        "dropping the last handle ends the machine, its events and all it had on the host",
        [], faults: []),
];

async fn ids_are_unique(ctx: &Context) -> Verdict {
    let count = ctx.draw(2, 8);
    let mut vms: Vec<Vm> = Vec::new();
    for _ in 0..count {
        vms.push(ctx.created().await?);
    }
    let ids: Vec<_> = vms.iter().map(|vm| vm.id()).collect();
    let different: BTreeSet<_> = ids.iter().collect();
    ensure_eq!(different.len(), vms.len(), "different ids");
    let index = ctx.index(vms.len());
    vms[index].start().await?;
    vms[index].kill().await?;
    ensure_eq!(vms[index].id(), ids[index], "the id after a life");
    Ok(())
}

async fn config_is_kept(ctx: &Context) -> Verdict {
    let mut config = vm_trait::VmConfig::default();
    config.name = Some(format!("n{:x}", ctx.draw(0, u64::MAX)));
    config.labels.insert(ctx.text(20), ctx.text(20));
    config.console_bytes = u32::try_from(ctx.draw(1024, 1 << 20)).unwrap_or(1024);
    let vm = ctx.backend().create(config.clone()).await?;
    ensure_eq!(*vm.config(), config, "the configuration in Created");
    ensure_eq!(vm.capabilities(), ctx.backend().capabilities(), "capabilities of a machine");
    let stage = ctx.pick(&Stage::reachable(ctx));
    stage.bring(ctx, &vm).await?;
    ensure_eq!(*vm.config(), config, "the configuration in {stage:?}");
    Ok(())
}

async fn start_runs(ctx: &Context) -> Verdict {
    let stages: Vec<_> = Stage::reachable(ctx)
        .into_iter()
        .filter(|stage| matches!(stage, Stage::Created | Stage::Stopped | Stage::Crashed))
        .collect();
    let stage = ctx.pick(&stages);
    let vm = stage.reach(ctx).await?;
    vm.start().await?;
    ensure_eq!(vm.state(), VmState::Running, "the state after start out of {stage:?}");
    works(ctx, &vm, "after start").await
}

async fn second_start_refused(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let nonce = Nonce::plant(ctx, &vm).await?;
    for _ in 0..ctx.draw(1, 3) {
        ensure_err!(
            vm.start().await,
            VmErrorKind::InvalidState { state: VmState::Running },
            "start of a running machine"
        );
    }
    nonce.there(&vm, "after a refused start").await
}

async fn one_of_many_starts(ctx: &Context) -> Verdict {
    let vm = ctx.created().await?;
    let count = ctx.draw(2, 6);
    let outcomes = join_all((0..count).map(|_| vm.start())).await;
    let started = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
    ensure_eq!(started, 1, "starts that were carried out");
    for outcome in outcomes.into_iter().filter(Result::is_err) {
        ensure_err!(
            outcome,
            VmErrorKind::InvalidState { state: VmState::Running },
            "a start that came too late"
        );
    }
    works(ctx, &vm, "after starts at the same time").await
}

async fn ends_are_idempotent(ctx: &Context) -> Verdict {
    let stage = ctx.pick(&Stage::reachable(ctx));
    let vm = stage.reach(ctx).await?;
    let before = vm.state();
    let expected = match stage {
        Stage::Created | Stage::Crashed => before,
        _ => VmState::Stopped,
    };
    for round in 1..=ctx.draw(1, 4) {
        if ctx.one_in(2) {
            vm.kill().await?;
        } else {
            vm.stop(StopOptions::default().with_grace(millis(ctx, 0, 100))).await?;
        }
        ensure_eq!(vm.state(), expected, "the state after end {round} out of {stage:?}");
    }
    Ok(())
}

async fn restart_loses_memory(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let nonce = Nonce::plant(ctx, &vm).await?;
    let process = spawn_sh(&vm, "sleep 1000").await?.detach().await?;
    end(ctx, &vm).await?;
    vm.start().await?;
    nonce.gone(&vm, "after a restart").await?;
    let known = vm.processes().await?;
    ensure!(
        known.iter().all(|info| info.id != process || info.program != "sh"),
        "a process outlived a restart"
    );
    Ok(())
}

async fn disk_outlives_restart(ctx: &Context) -> Verdict {
    let disk = disk(ctx, "/data");
    let vm = started(ctx, |config| config.disks.push(disk)).await?;
    let nonce = Nonce::plant_in(ctx, &vm, "/data").await?;
    for round in 1..=ctx.draw(1, 3) {
        end(ctx, &vm).await?;
        vm.start().await?;
        nonce.there(&vm, &format!("after restart {round}")).await?;
    }
    Ok(())
}

async fn disk_outlives_machine(ctx: &Context) -> Verdict {
    let disk = disk(ctx, "/data");
    let first = started(ctx, |config| config.disks.push(disk.clone())).await?;
    let nonce = Nonce::plant_in(ctx, &first, "/data").await?;
    end(ctx, &first).await?;
    drop(first);
    let mount = ctx.pick(&["/data", "/mnt", "/a/b"]);
    let moved = DiskConfig { mount: mount.to_owned(), ..disk };
    let second = started(ctx, |config| config.disks.push(moved)).await?;
    nonce.moved("/data", mount).there(&second, "in the next machine").await
}

async fn read_only_disk(ctx: &Context) -> Verdict {
    let disk = disk(ctx, "/data");
    let first = started(ctx, |config| config.disks.push(disk.clone())).await?;
    let nonce = Nonce::plant_in(ctx, &first, "/data").await?;
    first.stop(StopOptions::default()).await?;
    drop(first);
    let second =
        started(ctx, |config| config.disks.push(DiskConfig { read_only: true, ..disk })).await?;
    nonce.there(&second, "on a read-only disk").await?;
    ensure_err!(
        nonce.replace(ctx, &second).await,
        VmErrorKind::GuestFile { error: GuestFileError::ReadOnly, .. },
        "a write to a read-only disk"
    );
    let output = second.sh("echo x > /data/new").await?;
    ensure!(!output.status.success(), "a program could write to a read-only disk");
    nonce.there(&second, "after refused writes").await
}

async fn stop_lets_clean_up(ctx: &Context) -> Verdict {
    let disk = disk(ctx, "/data");
    let vm = started(ctx, |config| config.disks.push(disk)).await?;
    let word = format!("{:x}", ctx.draw(0, u64::MAX));
    let clean_up = format!("0.0{}", ctx.draw(1, 9));
    let program = format!(
        "trap 'sleep {clean_up}; echo {word} > /data/end; exit 0' TERM; echo ready; \
         while :; do sleep 0.02; done"
    );
    let process = spawn_sh(&vm, &program).await?;
    read_until(&process, "ready").await?;
    vm.stop(StopOptions::default().with_grace(SOON)).await?;
    vm.start().await?;
    ensure_eq!(vm.read_to_string("/data/end").await?, format!("{word}\n"), "the clean-up's file");
    Ok(())
}

async fn stop_sends_the_signal(ctx: &Context) -> Verdict {
    const SIGNALS: &[(&str, Signal)] = &[
        ("HUP", Signal::HUP),
        ("INT", Signal::INT),
        ("USR1", Signal::USR1),
        ("USR2", Signal::USR2),
        ("TERM", Signal::TERM),
    ];
    let disk = disk(ctx, "/data");
    let vm = started(ctx, |config| config.disks.push(disk)).await?;
    let traps: String = SIGNALS
        .iter()
        .map(|(name, _)| format!("trap 'echo {name} > /data/signal; exit 0' {name}; "))
        .collect();
    let process =
        spawn_sh(&vm, &format!("{traps} echo ready; while :; do sleep 0.02; done")).await?;
    read_until(&process, "ready").await?;
    let (name, _) = ctx.pick(SIGNALS);
    let text = ctx.pick(&[name.to_owned(), format!("SIG{name}"), name.to_ascii_lowercase()]);
    let signal: Signal = text.parse().map_err(|error| Broken::new(format!("{error}")))?;
    let options = StopOptions::default().with_grace(SOON).with_signal(signal);
    vm.stop(options).await?;
    vm.start().await?;
    ensure_eq!(vm.read_to_string("/data/signal").await?, format!("{name}\n"), "the signal sent");
    Ok(())
}

async fn stop_ends_stubborn_programs(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let process = spawn_sh(&vm, "trap '' TERM; echo ready; while :; do sleep 0.02; done").await?;
    read_until(&process, "ready").await?;
    let grace = millis(ctx, 10, 200);
    let begun = ctx.now();
    vm.stop(StopOptions::default().with_grace(grace)).await?;
    let taken = ctx.now() - begun;
    ensure!(taken <= grace + SOON, "the stop took {taken:?} with a grace of {grace:?}");
    ensure_eq!(vm.state(), VmState::Stopped, "the state after a stop");
    ensure_err!(process.wait().await, VmErrorKind::Interrupted, "a stubborn program's handle");
    Ok(())
}

async fn stop_without_grace(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let process = spawn_sh(&vm, "trap 'sleep 1000' TERM; echo ready; sleep 1000").await?;
    read_until(&process, "ready").await?;
    let stop = vm.stop(StopOptions::default().with_grace(Duration::ZERO));
    ctx.within(SOON, "a stop without grace", stop).await??;
    ensure_eq!(vm.state(), VmState::Stopped, "the state after a stop");
    Ok(())
}

async fn ignored_stop_ends(ctx: &Context) -> Verdict {
    let vm = made(ctx, |config| config.timeouts.kill = millis(ctx, 500, 2000)).await?;
    vm.start().await?;
    let process = spawn_sh(&vm, "sleep 1000").await?;
    let grace = millis(ctx, 20, 300);
    let ordered = order(ctx, FaultOrder::next(FaultKind::StopIgnored).on(vm.id()))?;
    let deadline = grace + vm.config().timeouts.kill;
    let stop = vm.stop(StopOptions::default().with_grace(grace));
    ctx.within(deadline + Duration::from_millis(100), "an ignored stop", stop).await??;
    ordered.must_have_fired(ctx)?;
    ensure_eq!(vm.state(), VmState::Stopped, "the state after an ignored stop");
    ensure_err!(process.wait().await, VmErrorKind::Interrupted, "a program of the guest");
    truthful(ctx, &vm, "after an ignored stop").await
}

async fn unheard_stop_ends(ctx: &Context) -> Verdict {
    let vm = made(ctx, |config| config.timeouts.kill = millis(ctx, 500, 2000)).await?;
    vm.start().await?;
    let process = spawn_sh(&vm, "sleep 1000").await?;
    let stall = FaultOrder::next(FaultKind::LinkStall).on(vm.id()).with_amount(SOON * 10);
    let ordered = order(ctx, stall)?;
    let grace = millis(ctx, 20, 300);
    let deadline = grace + vm.config().timeouts.kill;
    let stop = vm.stop(StopOptions::default().with_grace(grace));
    ctx.within(deadline + SOON, "a stop that nobody hears", stop).await??;
    ordered.must_have_fired(ctx)?;
    ensure_eq!(vm.state(), VmState::Stopped, "the state after a stop that nobody heard");
    ensure_err!(process.wait().await, VmErrorKind::Interrupted, "a program of the guest");
    truthful(ctx, &vm, "after a stop that nobody heard").await
}

async fn kill_preempts_exec(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let delay = millis(ctx, 0, 100);
    let killed = async {
        ctx.sleep(delay).await;
        vm.kill().await
    };
    let both = join(vm.exec(script("sleep 1000")), killed);
    let (exec, kill) = ctx.within(delay + SOON, "kill with an exec under way", both).await?;
    kill?;
    ensure_err!(exec, VmErrorKind::Interrupted, "an exec that kill cut short");
    ensure_eq!(vm.state(), VmState::Stopped, "the state after kill");
    Ok(())
}

async fn ends_preempt_boot(ctx: &Context) -> Verdict {
    let boot = boot_time(ctx).await?;
    let vm = ctx.created().await?;
    let percent = u32::try_from(ctx.draw(2, 100)).unwrap_or(2);
    let ended = async {
        ctx.sleep(boot * percent / 100).await;
        end(ctx, &vm).await
    };
    let (start, stop) = join(vm.start(), ended).await;
    stop?;
    // A boot may be shorter than the one that was measured, and be over by then.
    if start.is_err() {
        ensure_err!(start, VmErrorKind::Interrupted, "a boot that was cut short");
    }
    ensure_eq!(vm.state(), VmState::Stopped, "the state after a boot was cut short");
    truthful(ctx, &vm, "after a boot was cut short").await
}

async fn ends_preempt_hanging_boot(ctx: &Context) -> Verdict {
    let vm = ctx.created().await?;
    let ordered = order(ctx, FaultOrder::next(FaultKind::BootHang).on(vm.id()))?;
    let ended = async {
        until(ctx, "a boot that hangs", || ordered.fired(ctx)).await?;
        ctx.sleep(millis(ctx, 0, 300)).await;
        ensure_eq!(vm.state(), VmState::Starting, "the state during a boot that hangs");
        ctx.within(SOON, "stop or kill of a hanging boot", end(ctx, &vm)).await?
    };
    let (start, ended) = join(vm.start(), ended).await;
    ended?;
    ensure_err!(start, VmErrorKind::Interrupted, "a hanging boot that was cut short");
    until_state(ctx, &vm, VmState::Stopped).await?;
    truthful(ctx, &vm, "after a hanging boot was cut short").await
}

async fn last_handle_ends_machine(ctx: &Context) -> Verdict {
    use futures_util::StreamExt;
    let stage = ctx.pick(&Stage::reachable(ctx));
    let vm = stage.reach(ctx).await?;
    let mut events = vm.events();
    if stage == Stage::Running && ctx.has(Capability::Exec) {
        spawn_sh(&vm, "sleep 1000").await?.detach().await?;
    }
    let second = std::sync::Arc::clone(&vm);
    drop(vm);
    ctx.sleep(millis(ctx, 0, 50)).await;
    ensure!(stage.holds(&second.state()), "a machine ended with a handle left");
    drop(second);
    until(ctx, "nothing left of a machine without handles", || ctx.leftovers().is_empty()).await?;
    let rest = async { while events.next().await.is_some() {} };
    ctx.within(SOON, "the end of the events of a dropped machine", rest).await
}

/// Ends a machine by stop or by kill, as drawn.
async fn end(ctx: &Context, vm: &Vm) -> Verdict {
    if ctx.one_in(2) {
        vm.kill().await?;
    } else {
        vm.stop(StopOptions::default().with_grace(millis(ctx, 0, 100))).await?;
    }
    Ok(())
}
